"""Templates, and prompts cut to a length: what is written, what is refused, and what is left of a long text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftkit.config import load_run
from peftkit.data.files import Rows
from peftkit.data.prompts import fitted_prompts, leading_tokens
from peftkit.data.templates import check, columns, pieces, render, render_rows
from peftkit.errors import ConfigError, DataError

# fmt: off
WORDS = [
    "review", ":", "sentiment", "good", "bad", "film", "one", "two", "three", "four", "five", "six", "nine", "ten",
]
# fmt: on


def rows_of(*records: dict[str, Any]) -> Rows:
    return Rows("train.jsonl", list(records), range(1, len(records) + 1))


def word_tokenizer(before: list[str], behind: list[str]) -> Any:
    """One token a word, and special tokens around every text."""
    ids = {word: index for index, word in enumerate(["<s>", "</s>", "<cls>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = " ".join([*before, "$A", *behind])
    special = [(token, ids[token]) for token in {*before, *behind}]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_columns_stand_where_the_template_names_them() -> None:
    record = {"text": "a film", "stars": 4, "half": 4.5, "more text": "x", "unused": None}
    assert render("Review: {text}\nStars: {stars}", record) == "Review: a film\nStars: 4"
    assert render("{more text}{half}", record) == "x4.5"
    assert render("no column", record) == "no column"


def test_braces_are_written_twice_and_values_keep_theirs() -> None:
    assert render('{{"text": "{text}"}}', {"text": "a"}) == '{"text": "a"}'
    assert render("{{{text}}}", {"text": "{other} }}"}) == "{{other} }}}"
    assert list(pieces("{{a}}{b}c")) == [("{a}", "b"), ("c", None)]


def test_columns_are_told_once_and_in_order() -> None:
    assert columns("{b} {a} {b} {{c}}") == ("b", "a")


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{text", "'{' at character 1 has no other half"),
        ("text}", "'}' at character 5 has no other half"),
        ("a {} b", "'{}' at character 3 names no column"),
        ("a { } b", "'{ }' at character 3 names no column"),
    ],
)
def test_a_wrong_template_says_where(template: str, fault: str) -> None:
    with pytest.raises(ValueError, match=r"write '{{' and '}}' for braces") as error:
        check(template)
    assert fault in str(error.value)


def test_a_wrong_template_is_a_fault_of_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "backbone: {name: x}\nmethod: {kind: head}\ntraining: {learning_rate: 0.1}\n"
        "task:\n  kind: label_words\n  data: {train: a.tsv}\n  template: 'Review: {text'\n"
    )
    with pytest.raises(ConfigError, match=r"run.yaml:7: task.template: '\{' at character 9 has no other half"):
        load_run(file)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"sentence": "a"}, "no column 'sentense' for the template; did you mean 'sentence'?"),
        ({"sentense": None}, "'sentense' is null, which a template cannot write"),
        ({"sentense": ["a"]}, "'sentense' holds a list; a template takes text and numbers"),
    ],
)
def test_a_value_that_cannot_be_written_is_refused(record: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError) as error:
        render("{sentense}", record)
    assert fault in str(error.value)


def test_rows_say_their_place() -> None:
    rows = rows_of({"text": "a"}, {"text": None})
    assert render_rows("<{text}>", rows.head(1)) == ["<a>"]
    with pytest.raises(DataError, match=r"^train.jsonl:2: 'text' is null"):
        render_rows("{text}", rows)
    with pytest.raises(DataError, match=r"^train.jsonl: no column 'txt'; did you mean 'text'"):
        render_rows("{txt}", rows)


def test_only_texts_are_cut_the_longest_first() -> None:
    tokenizer = word_tokenizer(["<s>"], [])
    record = {"one": "one two three four five six", "two": "nine ten"}
    template = "review : {one} {two} sentiment :"
    whole, cut = fitted_prompts(template, rows_of(record), tokenizer, room=12)
    assert (whole, cut) == (["review : one two three four five six nine ten sentiment :"], 0)
    for room, expected in {11: "one two three four five nine ten", 8: "one two nine ten", 6: "one nine"}.items():
        texts, cut = fitted_prompts(template, rows_of(record, {"one": "a", "two": "b"}), tokenizer, room)
        assert (texts[0], cut) == (f"review : {expected} sentiment :", 1)
        assert texts[1] == "review : a b sentiment :"


def test_what_stands_in_front_is_never_cut() -> None:
    tokenizer = word_tokenizer([], [])
    rows = rows_of({"one": "one two three"})
    texts, cut = fitted_prompts("{one} :", rows, tokenizer, room=4, preamble="good film ")
    assert (texts, cut) == (["good film one :"], 1)
    with pytest.raises(DataError, match=r"train.jsonl:1: the template, the demonstrations and the answer leave no"):
        fitted_prompts("{one} :", rows, tokenizer, room=3, preamble="good film ")
    with pytest.raises(DataError, match=r"train.jsonl:1: the template and the answer leave no token for the text"):
        fitted_prompts("{one} :", rows, tokenizer, room=1)


@pytest.mark.parametrize(
    ("before", "behind", "expected"),
    [([], [], []), (["<s>"], [], [0]), (["<s>"], ["</s>"], [0]), ([], ["</s>"], []), (["<s>", "<cls>"], [], [0, 2])],
)
def test_special_tokens_in_front_are_told_from_those_behind(
    before: list[str], behind: list[str], expected: list[int]
) -> None:
    assert leading_tokens(word_tokenizer(before, behind)) == expected


def test_a_tokenizer_of_words_in_pieces_has_leading_tokens_too(tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    assert leading_tokens(tokenizer) == [tokenizer.cls_token_id]
