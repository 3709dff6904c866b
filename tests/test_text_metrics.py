"""Text figures against sacreBLEU and rouge-score called directly, formulas worked by hand, and real answers."""

from __future__ import annotations

import json
import math
import socket
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from peftkit.errors import DataError, UsageError
from peftkit.metrics.numbers import final_number, numbers
from peftkit.metrics.text import TEXT_SCORES, text_scores

PREDICTIONS = [
    "A man in a blue shirt is standing on a ladder cleaning a window .",
    "Two dogs are running through the snow.",
    "",
    "Girls talking.",
]
ONE = [
    ["A man in a blue shirt stands on a ladder, cleaning the window."],
    ["Two dogs run through deep snow."],
    ["A child plays."],
    ["The girls are talking."],
]
UNEVEN = [
    ["A man in a blue shirt stands on a ladder, cleaning the window.", "A man on a ladder cleans a window."],
    ["Two dogs run through deep snow."],
    ["A child plays.", "A kid is playing.", "Children play outside."],
    ["The girls are talking.", "Girls talking."],
]


def streams(references: list[list[str]]) -> list[list[str | None]]:
    """As sacreBLEU takes them: the first reference of every example, then the second, …; None where there is none."""
    longest = max(map(len, references))
    return [[one[k] if k < len(one) else None for one in references] for k in range(longest)]


class TestAgainstTheLibraries:
    @pytest.mark.parametrize("references", [ONE, UNEVEN])
    def test_sacrebleu(self, references: list[list[str]]) -> None:
        found = text_scores(["bleu", "chrf", "ter", "bleu_char", "bleu_zh", "bleu_intl"], PREDICTIONS, references)
        given = (PREDICTIONS, streams(references))
        assert found == {
            "bleu": sacrebleu.corpus_bleu(*given).score,
            "chrf": sacrebleu.corpus_chrf(*given).score,
            "ter": sacrebleu.corpus_ter(*given).score,
            "bleu_char": sacrebleu.corpus_bleu(*given, tokenize="char").score,
            "bleu_zh": sacrebleu.corpus_bleu(*given, tokenize="zh").score,
            "bleu_intl": sacrebleu.corpus_bleu(*given, tokenize="intl").score,
        }
        assert 0 < found["bleu"] < 100

    @pytest.mark.parametrize(
        ("name", "signature"),
        [
            ("BLEU", "case:mixed|eff:no|tok:13a|smooth:exp"),
            ("CHRF", "case:mixed|eff:yes|nc:6|nw:0|space:no"),
            ("TER", "case:lc|tok:tercom|norm:no|punct:yes|asian:no"),
        ],
    )
    def test_the_signatures_are_those_of_the_docstring(self, name: str, signature: str) -> None:
        scorer = getattr(sacrebleu.metrics, name)()
        scorer.corpus_score(["a"], [["a"]])
        assert signature in str(scorer.get_signature())
        assert f"`{signature}`" in str(text_scores.__doc__)

    @pytest.mark.parametrize("references", [ONE, UNEVEN])
    def test_rouge_is_the_mean_over_examples_of_the_best_reference(self, references: list[list[str]]) -> None:
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        found = text_scores(["rouge"], PREDICTIONS, references)
        for name in ("rouge1", "rouge2", "rougeL"):
            best = [
                max(scorer.score(reference, prediction)[name].fmeasure for reference in ours)
                for prediction, ours in zip(PREDICTIONS, references, strict=True)
            ]
            assert found[name] == pytest.approx(sum(best) / len(best), abs=1e-12)

    def test_a_second_reference_can_only_help(self) -> None:
        names = ["bleu", "chrf", "rouge"]
        one, more = (text_scores(names, PREDICTIONS, references) for references in (ONE, UNEVEN))
        assert all(more[name] > one[name] for name in one)


class TestByHand:
    def test_bleu(self) -> None:
        # "the cat sat on mat" of 5 against 6 words: precisions 5/5, 3/4, 2/3, 1/2; brevity penalty e^(1 − 6/5)
        expected = 100 * math.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
        found = text_scores(["bleu"], ["the cat sat on mat"], [["the cat sat on the mat"]])
        assert found["bleu"] == pytest.approx(expected)

    def test_rouge(self) -> None:
        # stemmed, "cats running" and "the cat runs" share cat and run: P 2/2, R 2/3; the bigram too: P 1/1, R 1/2
        found = text_scores(["rouge"], ["cats running"], [["the cat runs"]])
        assert found == pytest.approx({"rouge1": 4 / 5, "rouge2": 2 / 3, "rougeL": 4 / 5})

    def test_ter(self) -> None:
        assert text_scores(["ter"], ["a b c d"], [["a x c d e"]])["ter"] == pytest.approx(100 * 2 / 5)

    def test_exact_match(self) -> None:
        predictions = [" Paris\n", "new  york", "paris", "a.", "b", ""]
        references = [["Paris"], ["new york"], ["Paris"], ["a"], ["a", "b"], [""]]
        assert text_scores(["exact_match"], predictions, references) == {"exact_match": 4 / 6}

    def test_equal_texts(self) -> None:
        texts = ["The cat sat on the mat, 3 times.", "Another dog ran far away from 4 cats."]
        found = text_scores(TEXT_SCORES, texts, [[text] for text in texts])
        best = dict.fromkeys(("rouge1", "rouge2", "rougeL", "exact_match", "gsm8k"), 1.0)
        best |= dict.fromkeys(("bleu", "bleu_zh", "bleu_char", "bleu_intl", "chrf"), 100.0) | {"ter": 0.0}
        assert found == pytest.approx(best)

    def test_nothing_written(self) -> None:
        found = text_scores(TEXT_SCORES, ["", ""], [["a long reference 1"], ["another one 2", "b 2"]])
        assert found.pop("ter") == pytest.approx(100 * (4 + 2) / (4 + 2.5))  # over the mean length of the references
        assert set(found.values()) == {0.0}

    def test_an_empty_reference_counts_as_one_without_words(self) -> None:
        # one of two words in the only example that has words, plus one insertion where none should be
        found = text_scores(["ter", "exact_match"], ["x", "", "a b"], [[""], [""], ["a c"]])
        assert found == {"ter": pytest.approx(100 * 2 / 2), "exact_match": 1 / 3}
        assert text_scores(["bleu", "chrf"], ["the cat sat on a mat", ""], [["the cat sat on a mat"], ["", "a"]]) == {
            "bleu": pytest.approx(100),
            "chrf": pytest.approx(100),
        }


class TestGSM8K:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", 18),
            ("#### 18", 18),
            ("####18", 18),
            ("####\n 18\n7", 18),
            ("16 eggs.\n#### $1,800.00.", 1800),
            ("#### 18 dollars, or 20", 18),
            ("#### -5", -5),
            ("#### 5\nQuestion: what next?\n#### 7", 5),
            ("#### none\n5", None),
            ("12 ####", None),
            ("The answer is 72.", 72),
            ("It is 72.0 of 72", 72),
            ("first 3, then 4,000", 4000),
            ("€ 3.50!", Fraction(7, 2)),
            ("so 3/4 of it", Fraction(3, 4)),
            ("16-3", 3),
            ("16 - 3", 3),
            ("= -3", -3),
            ("(−3)", -3),
            ("-$40", -40),
            ("$-40", -40),
            (".5", Fraction(1, 2)),
            ("- 5 apples", 5),
            ("1,234,567", 1234567),
            ("5 %", 5),
            ("1/0", 1),
            ("no number", None),
            ("", None),
        ],
    )
    def test_final_number(self, text: str, number: Any) -> None:
        assert final_number(text) == number

    def test_every_number_of_a_text(self) -> None:
        assert numbers("1,2 and 3,000 or 1234,567") == [1, 2, 3000, 1234, 567]

    def test_the_share_of_equal_numbers(self) -> None:
        references = [["a\n#### 72"], ["#### 1,000"], ["#### 3"], ["#### 4", "#### 5"], ["#### 6"], ["7"]]
        predictions = ["it is 72.00", "$1000.", "#### 4, not 3", "five: 5", "", "so 7 #### 8"]
        assert text_scores(["gsm8k"], predictions, references) == {"gsm8k": 3 / 6}

    def test_the_real_answers(self, real_data: Path) -> None:
        lines = (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
        answers = [json.loads(line)["answer"] for line in lines]
        # whatever the form, the mark is on the last line and nothing follows the number
        expected = [int(answer.rsplit(" ", 1)[1].replace(",", "")) for answer in answers]
        assert [final_number(answer) for answer in answers] == expected
        # solutions without the last line end with the answer nearly always, so the last number is a fair fallback
        without = [answer.rsplit("\n", 1)[0] for answer in answers]
        said = [f"So the answer is {number:,}.00." for number in expected]
        references = [[answer] for answer in answers]
        assert text_scores(["gsm8k"], said, references)["gsm8k"] == 1
        assert text_scores(["gsm8k"], without, references)["gsm8k"] > 0.9
        assert text_scores(["gsm8k"], [f"#### {number + 1}" for number in expected], references)["gsm8k"] == 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("names", "predictions", "references", "error", "message"),
        [
            (["blue"], ["a"], [["a"]], UsageError, "no text score 'blue'; did you mean 'bleu'"),
            (["f1"], ["a"], [["a"]], UsageError, "it can be: bleu, bleu_char"),
            (["bleu"], [], [], DataError, "no predictions to score"),
            (["bleu"], ["a", "b"], [["a"], []], DataError, "prediction 2 has no reference"),
            (["rouge"], ["да"], [["да"]], UsageError, "ROUGE counts words of a–z and 0–9 only"),
            (["gsm8k"], ["3", "4"], [["3"], ["four"]], DataError, r"reference 2 has no final number \('four'\)"),
        ],
    )
    def test_message(
        self,
        names: list[str],
        predictions: list[str],
        references: list[list[str]],
        error: type[Exception],
        message: str,
    ) -> None:
        with pytest.raises(error, match=message):
            text_scores(names, predictions, references)

    def test_unequal_numbers_of_rows(self) -> None:
        for name in TEXT_SCORES:
            with pytest.raises(ValueError, match="zip"):
                text_scores([name], ["1", "2"], [["1"]])


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert set(text_scores(TEXT_SCORES, ["cat 3"], [["cat 3"]])) == {
        *(set(TEXT_SCORES) - {"rouge"}),
        "rouge1",
        "rouge2",
        "rougeL",
    }
