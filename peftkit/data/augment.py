"""Changed copies of training rows (EDA, Wei & Zou 2019; back-translation, Sennrich et al. 2016)."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from peftkit.data.rows import Rows
from peftkit.errors import DataError, UsageError
from peftkit.schema import Section

Rate = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
WORD = re.compile(r"^(\W*)(\w[\w'’-]*?)(\W*)$")
"""What stands before a word, the word, and what stands after it."""


class Augmentation(Section, ABC):
    """One way to change a text that should leave its label as it was."""

    kind: str
    copies: int = Field(default=1, ge=1)
    """Changed copies of each training row."""
    seed: int = Field(default=0, ge=0)

    @abstractmethod
    def changed(self, texts: Sequence[str], chances: Sequence[random.Random]) -> list[str]:
        """Each text changed, with a source of chance of its own; as it was where there is nothing to change."""


class ByWord(Augmentation):
    """A change of single words; what stands between them stays."""

    rate: Rate = 0.1
    """Share of the words of a text, of which at least one changes."""

    def changed(self, texts: Sequence[str], chances: Sequence[random.Random]) -> list[str]:
        return [self._of(text, chance) for text, chance in zip(texts, chances, strict=True)]

    def _of(self, text: str, chance: random.Random) -> str:
        # words and what stands between them take turns
        parts = re.split(r"(\s+)", text.strip())
        return "".join(self.change(parts[::2], [*parts[1::2], ""], chance))

    @abstractmethod
    def change(self, words: list[str], gaps: list[str], chance: random.Random) -> list[str]:
        """What the text becomes, given its words and what follows each of them."""

    def _count(self, words: Sequence[str]) -> int:
        return max(1, round(self.rate * len(words)))


class Deletion(ByWord):
    """Each word goes with probability `rate`; one at least stays, and one at least goes where there are two."""

    kind: Literal["deletion"] = "deletion"

    def change(self, words: list[str], gaps: list[str], chance: random.Random) -> list[str]:
        kept = [index for index in range(len(words)) if chance.random() >= self.rate]
        if len(kept) == len(words) > 1:
            kept.remove(chance.choice(kept))
        kept = kept or [chance.randrange(len(words))]
        return [words[index] + gaps[index] for index in kept[:-1]] + [words[kept[-1]]]


class Swap(ByWord):
    """Two words change places, `rate` · words times."""

    kind: Literal["swap"] = "swap"

    def change(self, words: list[str], gaps: list[str], chance: random.Random) -> list[str]:
        for _ in range(self._count(words) if len(words) > 1 else 0):
            one, other = chance.sample(range(len(words)), 2)
            words[one], words[other] = words[other], words[one]
        return [word + gap for word, gap in zip(words, gaps, strict=True)]


class Typos(ByWord):
    """One slip of the finger in a word of three letters or more: two letters swapped, or one left out or doubled."""

    kind: Literal["typos"] = "typos"

    def change(self, words: list[str], gaps: list[str], chance: random.Random) -> list[str]:
        long = [index for index, word in enumerate(words) if (match := WORD.match(word)) and len(match[2]) > 2]
        for index in chance.sample(long, min(self._count(words), len(long))):
            match = WORD.match(words[index])
            assert match is not None
            words[index] = f"{match[1]}{_mistyped(match[2], chance)}{match[3]}"
        return [word + gap for word, gap in zip(words, gaps, strict=True)]


def _mistyped(word: str, chance: random.Random) -> str:
    at = chance.randrange(len(word) - 1)
    slip = chance.randrange(3)
    if slip == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :] if slip == 1 else word[: at + 1] + word[at:]


class Synonyms(ByWord):
    """English words are replaced by others of a meaning in WordNet, which nltk reads; stop words stay.

    Only words in the form that WordNet has them in, so that "films" does not become "movie".
    """

    kind: Literal["synonyms"] = "synonyms"

    def changed(self, texts: Sequence[str], chances: Sequence[random.Random]) -> list[str]:
        wordnet()
        return super().changed(texts, chances)

    def change(self, words: list[str], gaps: list[str], chance: random.Random) -> list[str]:
        order = list(range(len(words)))
        chance.shuffle(order)
        left = self._count(words)
        for index in order:
            match = WORD.match(words[index])
            choice = synonyms(match[2]) if match and left else []
            if match and choice:
                words[index] = f"{match[1]}{chance.choice(choice)}{match[3]}"
                left -= 1
        return [word + gap for word, gap in zip(words, gaps, strict=True)]


class BackTranslation(Augmentation):
    """Into another language and back, by two encoder-decoders of the user's, such as a pair of Marian models."""

    kind: Literal["back_translation"] = "back_translation"
    forward: Name
    """A folder or hub id."""
    backward: Name
    forward_prefix: str = ""
    """What stands before each text, as T5 wants it: `translate English to German: `."""
    backward_prefix: str = ""
    temperature: float | None = Field(default=None, gt=0)
    """Sample at it; without, the likeliest word is taken, and all copies of a row are alike."""
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int = Field(default=16, ge=1)

    def changed(self, texts: Sequence[str], chances: Sequence[random.Random]) -> list[str]:
        from peftkit.data.translation import translated

        found = list(texts)
        for name, prefix in ((self.forward, self.forward_prefix), (self.backward, self.backward_prefix)):
            seed = chances[0].randrange(2**31)
            found = translated(found, name, prefix, self.max_new_tokens, self.batch_size, self.temperature, seed)
        return [new if new.strip() else old for new, old in zip(found, texts, strict=True)]


AnyAugmentation = Annotated[Deletion | Swap | Typos | Synonyms | BackTranslation, Field(discriminator="kind")]


def augmented(train: Rows, columns: Sequence[str], operations: Sequence[Augmentation]) -> tuple[Rows, str]:
    """The rows and after them their changed copies, which keep the places of their sources; and a note that counts.

    What is drawn for a row depends on seed, operation, copy, column and the row's position alone.
    """
    train.require(*columns)
    rows, told = [train], []
    for number, operation in enumerate(operations):
        made = [
            _copies(train, columns, operation, f"{operation.seed}/{number}/{copy}") for copy in range(operation.copies)
        ]
        count = sum(map(len, made))
        same = operation.copies * len(train) - count
        told.append(
            f"{count:,} by {operation.kind}" + (f" ({same:,} came out unchanged and are left out)" if same else "")
        )
        rows += made
    records = [record for one in rows for record in one.records]
    places = [place for one in rows for place in one.places]
    result = replace(train, records=records, places=places)
    added = len(result) - len(train)
    return result, f"augmentation added {added:,} rows to the {len(train):,} of train: {', '.join(told)}"


def _copies(train: Rows, columns: Sequence[str], operation: Augmentation, seed: str) -> Rows:
    """One changed copy of each row in which something did change."""
    changed = changed_rows(train, columns, operation, seed)
    return changed.take(i for i, record in enumerate(changed.records) if record != train.records[i])


def changed_rows(rows: Rows, columns: Sequence[str], operation: Augmentation, seed: str) -> Rows:
    """Every row with the texts of these columns changed, or as it was where there is nothing to change."""
    changed = {}
    for column in columns:
        texts = [record[column] for record in rows.records]
        wrong = next((index for index, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise DataError(f"{rows.where(wrong)}: no text in '{column}'; remove the row or fill it in")
        chances = [random.Random(f"{seed}/{column}/{index}") for index in range(len(texts))]
        changed[column] = operation.changed(texts, chances)
    records = [record | {column: changed[column][i] for column in columns} for i, record in enumerate(rows.records)]
    return replace(rows, records=records)


def wordnet() -> Any:
    """nltk's WordNet.

    Raises:
        UsageError: it is not on this machine.
    """
    from nltk.corpus import wordnet as found

    try:
        found.ensure_loaded()
    except (LookupError, OSError):
        raise UsageError(
            "augmentation by synonyms needs WordNet, which nltk does not find: run `python -m nltk.downloader wordnet` "
            "once, or set NLTK_DATA to a folder that holds corpora/wordnet"
        ) from None
    return found


def synonyms(word: str) -> list[str]:
    """Other words of any meaning of `word` in WordNet, by name; with its capital letter. None for stop words."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    lower = word.lower()
    if lower in ENGLISH_STOP_WORDS:
        return []
    meanings = [one.lemma_names() for one in wordnet().synsets(lower)]
    found = {name.replace("_", " ") for names in meanings if lower in map(str.lower, names) for name in names}
    others = sorted(name for name in found if name.lower() != lower)
    return [name[0].upper() + name[1:] if word[0].isupper() else name for name in others]
