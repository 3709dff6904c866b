"""The two languages of a multilingual translation model, as its tokenizer marks them in the text."""

from __future__ import annotations

from typing import Any

from peftkit.errors import UsageError
from peftkit.schema import did_you_mean


def set_languages(tokenizer: Any, source: str | None, target: str | None) -> dict[str, int]:
    """Tell the tokenizer what it reads and writes.

    Returns:
        The generation settings that make a text begin in the target language, by transformers' names; none where the
        tokenizer knows no languages.

    Raises:
        UsageError: languages for a tokenizer that knows none, none for one that does, or one it does not know.
    """
    name = type(tokenizer).__name__
    if not (hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")):
        if source is not None:
            raise UsageError(
                f"task.source_language: {name} marks no languages; say them in task.source_prefix, such as "
                "'translate English to German: ' (T5) or '>>deu<< ' (Marian with several target languages)"
            )
        return {}
    if source is None or target is None:
        # transformers would take its default for the source, and the source for the target
        raise UsageError(f"{name} marks languages; set task.source_language and task.target_language")
    for field, language in (("source_language", source), ("target_language", target)):
        _check_known(tokenizer, field, language)
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    code = int(tokenizer.convert_tokens_to_ids(target))
    first = tokenizer(text_target=[""])["input_ids"][0][0]
    # mBART-50 and NLLB begin targets with the language; mBART ends them with it and starts its decoder from there
    return {"forced_bos_token_id" if first == code else "decoder_start_token_id": code}


def _check_known(tokenizer: Any, field: str, language: str) -> None:
    special = {str(token) for token in tokenizer.all_special_tokens}
    known = special | {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if language not in known:
        languages = known - set(map(str, tokenizer.special_tokens_map.values()))
        raise UsageError(f"task.{field}: no language '{language}'{did_you_mean(language, languages)}")
