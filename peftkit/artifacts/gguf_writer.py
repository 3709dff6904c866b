"""A Llama as one GGUF file, through the `gguf` package: configuration, tokenizer and weights by llama.cpp's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftkit.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

Precision = Literal["float32", "float16"]
LLAMA_3 = r"\p{N}{1,3}"
"""A part of Llama 3's pattern for cutting texts, which no other pattern that GGUF knows by name has beside `(?i:'s`."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens."""


def check_model(model: Any, name: str) -> None:
    """Refuse what is no Llama, or one with parts that the file would not tell of.

    Raises:
        UsageError: names the part.
    """
    config = model.config
    if config.model_type != "llama" or not type(model).__name__.endswith("ForCausalLM"):
        raise UsageError(f"{name} is a {type(model).__name__}; GGUF is written of Llama language models only")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UsageError(f"{name} scales its positions ('{rope['rope_type']}'), which is not written to GGUF here")
    for setting in ("attention_bias", "mlp_bias"):
        if getattr(config, setting, False):
            raise UsageError(f"{name} has biases in its blocks ({setting}), which is not written to GGUF here")


def write(model: nn.Module, tokenizer: PreTrainedTokenizerBase, file: Path, precision: Precision) -> None:
    """Write the file; matrices in this precision, all else in float32.

    Raises:
        UsageError: a tokenizer that GGUF has no name for.
    """
    import gguf

    writer = gguf.GGUFWriter(str(file), "llama")
    try:
        _write_config(writer, model, precision)
        _write_tokenizer(writer, tokenizer, model)
        for name, tensor in _tensors(model):
            wide = precision == "float32" or tensor.ndim < 2
            writer.add_tensor(name, tensor if wide else tensor.astype("float16"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def permuted(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head in llama.cpp's order: it turns neighbours by one angle, transformers one half with the
    other."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def _write_config(writer: Any, model: Any, precision: Precision) -> None:
    import gguf

    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(str(getattr(config, "_name_or_path", "") or "merged"))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if precision == "float32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: Any) -> list[tuple[str, NDArray[Any]]]:
    """Names and values, without the output's where it is tied to the embeddings."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = []
    for name, parameter in model.named_parameters():
        value = parameter.detach().float()
        if (part := name.split(".")[-2]) in heads:
            value = permuted(value, heads[part])
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            raise UsageError(f"GGUF has no name for '{name}' of a Llama; ship the merged model")
        found.append((known, value.contiguous().numpy()))
    return found


def _write_tokenizer(writer: Any, tokenizer: Any, model: Any) -> None:
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, pre = _kind(said)
    merges = [" ".join(one) if isinstance(one, list) else one for one in said["model"]["merges"]]
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {max(ids.values()) + 1:,} tokens and the model {model.config.vocab_size:,} embeddings"
        )
    tokens = [f"[PAD{index}]" for index in range(model.config.vocab_size)]
    kinds = [UNUSED] * len(tokens)
    special = {one["content"]: CONTROL if one["special"] else USER_DEFINED for one in said["added_tokens"]}
    for token, index in ids.items():
        tokens[index], kinds[index] = token, special.get(token, NORMAL)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if kind == "llama":
        order = {merge.replace(" ", ""): -float(rank + 1) for rank, merge in reversed(list(enumerate(merges)))}
        last = -float(len(merges) + 1)
        writer.add_token_scores([order.get(token, last) for token in tokens])
        kinds = [BYTE if _is_byte(token) else found for token, found in zip(tokens, kinds, strict=True)]
        unknown = tokenizer.unk_token_id
        kinds = [UNKNOWN if index == unknown else found for index, found in enumerate(kinds)]
        writer.add_add_space_prefix("prepend" in json.dumps([said["normalizer"], said["pre_tokenizer"]]).lower())
    else:
        writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    _write_special(writer, tokenizer)


def _write_special(writer: Any, tokenizer: Any) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _kind(said: dict[str, Any]) -> tuple[str, str]:
    """(llama.cpp's name of the tokenizer, its name of how texts are cut first).

    Raises:
        UsageError: it has none that could be proven here.
    """
    model, pre = said["model"], json.dumps(said["pre_tokenizer"] or {})
    if model["type"] == "BPE" and model.get("byte_fallback") and "▁" in model["vocab"]:
        return "llama", "default"
    if model["type"] == "BPE" and (said["pre_tokenizer"] or {}).get("type") == "ByteLevel":
        return "gpt2", "gpt-2"
    if model["type"] == "BPE" and json.dumps(LLAMA_3)[1:-1] in pre and "ByteLevel" in pre:
        return "gpt2", "llama-bpe"
    raise UsageError(
        f"the tokenizer ({model['type']}, {pre[:80]}) is none of those that are written to GGUF: byte-level BPE that "
        "is cut as GPT-2's or Llama 3's, or SentencePiece BPE; ship the merged model"
    )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
