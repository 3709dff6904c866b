"""Everything that the audit looks for: name, how grave it is, what it means and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "stop", "warning", "note"]
"""`error`: the task cannot use these rows, so no training starts; `stop`: training stops unless the finding is allowed
by name; `warning` and `note` are told."""


@dataclass(frozen=True)
class Check:
    """One kind of fault."""

    name: str
    severity: Severity
    meaning: str
    mend: str
    threshold: str = ""
    """The setting that says from which share of the rows on it stops training all the same."""


CHECKS = {
    check.name: check
    for check in (
        # files and rows
        Check("refused", "error", "the file or its rows cannot be read for this task", "mend the file"),
        Check("empty-text", "warning", "a text is empty or white space", "fill it in or remove the row"),
        Check("not-text", "warning", "a text column holds something that is not text", "write it as text"),
        Check("header-row", "stop", "a row repeats the names of the columns", "remove it: files were joined"),
        Check("long-text", "warning", "a text is far too long to be one", "look for a missing line end or quote"),
        Check(
            "text-reads-as-missing",
            "warning",
            "a text such as NA or null, which pandas and others read as missing",
            "make sure that it is meant; peftkit reads it as text",
        ),
        # what is there twice
        Check("duplicates", "warning", "a row has the text of an earlier one", "remove all but one", "duplicates"),
        Check(
            "overlap-dev", "warning", "a text of dev is in train too", "remove it from train, or carve again", "overlap"
        ),
        Check("overlap-test", "warning", "a text of test is in train too", "remove it from train", "overlap"),
        Check("overlap-dev-test", "warning", "a text of test is in dev too", "remove it from dev"),
        Check(
            "conflicting-labels", "warning", "one text has several labels", "decide on one, or remove them", "conflicts"
        ),
        # labels
        Check("missing-label", "warning", "a row has no label", "fill it in or remove the row"),
        Check("unknown-label", "warning", "a label of dev or test never occurs in train", "mend the label"),
        Check("mixed-label-types", "stop", "labels are numbers in some rows and text in others", "write all alike"),
        Check("label-typo", "stop", "a rare label is all but equal to a frequent one", "write both alike"),
        Check(
            "label-reads-as-missing",
            "warning",
            "a label such as NA or None, which pandas and others read as missing",
            "make sure that it is a class of its own",
        ),
        Check("rare-label", "warning", "a label has next to no rows in train", "add rows, or merge labels"),
        Check("absent-label", "warning", "a label of the task has no row in train", "add rows, or leave it out"),
        Check("one-sided-labels", "warning", "nearly all rows have one label", "read accuracy beside macro_f1"),
        # columns
        Check("label-per-row", "stop", "nearly every row has a label of its own", "name the right column as label"),
        Check("swapped-columns", "stop", "the text column holds the labels and the reverse", "swap them in the task"),
        Check("swapped-row", "stop", "a row has its label where its text belongs", "swap its fields"),
        Check("shifted-row", "stop", "a row's label stands in another column", "move its fields back"),
        Check("numeric-text", "warning", "the text column holds numbers", "name the right column as text"),
        Check("quoted-fields", "warning", "texts are wrapped in quotes", "a .tsv has no quotes: write them without"),
        # characters
        Check("mojibake", "warning", "UTF-8 that was read as another encoding and saved", "decode it again as UTF-8"),
        Check("replacement-character", "warning", "U+FFFD stands where a character was lost", "convert it once more"),
        Check("control-character", "warning", "a control character is in a text", "remove it"),
        Check("nul-character", "stop", "a NUL is in a text", "write the data again"),
        Check("byte-order-mark", "warning", "a byte order mark is inside a text", "remove U+FEFF"),
        Check("lone-surrogate", "warning", "half a character, which is no UTF-8", "write the character whole"),
        # tokens
        Check("truncated", "note", "rows are cut at max_length", "raise task.max_length"),
        Check("dropped", "note", "rows of train are left out", "mend them", "dropped"),
        Check(
            "all-masked", "warning", "nothing of an example is supervised", "raise max_length, or see the row", "masked"
        ),
        Check("no-end-token", "warning", "the end token is never learnt, so text never ends", "set end_token: true"),
        Check("pad-is-end-token", "note", "padding and end are one token; the end stays supervised", "nothing to do"),
        Check("no-tokens", "warning", "the tokenizer makes no token of a text", "remove the row"),
        Check("unknown-tokens", "warning", "many tokens are not in the vocabulary", "take a backbone of this language"),
    )
}
