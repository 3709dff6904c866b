"""How close written text is to its references: BLEU, chrF and TER by sacreBLEU, ROUGE by rouge-score, exact match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, Literal, get_args

from peftkit.errors import DataError, UsageError
from peftkit.metrics.numbers import final_number
from peftkit.schema import did_you_mean

TextScore = Literal["bleu", "bleu_zh", "bleu_char", "bleu_intl", "chrf", "ter", "rouge", "exact_match", "gsm8k"]
TEXT_SCORES: tuple[TextScore, ...] = get_args(TextScore)
ROUGES = ("rouge1", "rouge2", "rougeL")

References = Sequence[Sequence[str]]
OF_EACH = ("exact_match", "gsm8k", *ROUGES)
"""Figures that are the mean over texts of a figure of each."""


def text_scores(names: Sequence[str], predictions: Sequence[str], references: References) -> dict[str, float]:
    """Corpus figures of `predictions`, each against one or more references; their numbers may differ.

    Every figure is on the scale that its library and the literature use:

    - `bleu`: 0–100, more is better. sacreBLEU, `case:mixed|eff:no|tok:13a|smooth:exp` (Post 2018). The tokenizer 13a
      is for languages that put spaces between words; `bleu_zh` (Chinese), `bleu_char` (every character is a token)
      and `bleu_intl` (Unicode punctuation) differ in it alone.
    - `chrf`: 0–100, more is better. sacreBLEU, `case:mixed|eff:yes|nc:6|nw:0|space:no` (chrF2; Popović 2015).
    - `ter`: less is better; 0 is equal, over 100 is possible. sacreBLEU,
      `case:lc|tok:tercom|norm:no|punct:yes|asian:no` (Snover et al. 2006).
    - `rouge`: gives `rouge1`, `rouge2` and `rougeL`, F-measures in [0, 1], the mean over examples of the best
      reference (Lin 2004). rouge-score with the Porter stemmer; it sees nothing but a–z and 0–9.
    - `exact_match`: the share in [0, 1] that equals a reference, white space at the ends and its amount aside.
    - `gsm8k`: the share in [0, 1] whose final number equals a reference's, as numbers: 72 is 72.00 and 1,000 is 1000.
      The final number is the one after `####`; without that mark it is the last number of the text (Cobbe et al. 2021).

    Raises:
        UsageError: an unknown name, or ROUGE for a script that it cannot see.
        DataError: no predictions, or one without reference; for `gsm8k`, a reference without a number.
    """
    for name in names:
        if name not in FUNCTIONS:
            raise UsageError(f"no text score '{name}'{did_you_mean(name, TEXT_SCORES)}")
    if not predictions:
        raise DataError("no predictions to score; give at least one row")
    pairs = zip(predictions, references, strict=True)
    without = [index for index, (_, ours) in enumerate(pairs, 1) if not ours]
    if without:
        raise DataError(f"prediction {without[0]:,} has no reference to compare with; give each row at least one")
    values: dict[str, float] = {}
    for name in dict.fromkeys(names):
        found = FUNCTIONS[name](predictions, references)
        values |= found if isinstance(found, dict) else {name: found}
    return values


def names_of(scores: Sequence[str]) -> tuple[str, ...]:
    """The figures that these scores give."""
    return tuple(name for score in scores for name in (ROUGES if score == "rouge" else (score,)))


def of_each(figure: str, predictions: Sequence[str], references: References) -> list[float] | None:
    """What each text has of a figure that is the mean over texts; None where it is of the corpus as a whole."""
    if figure not in OF_EACH:
        return None
    if figure in ROUGES:
        return _rouges(predictions, references)[figure]
    return (_exact if figure == "exact_match" else _same_number)(predictions, references)


def _rouges(predictions: Sequence[str], references: References) -> dict[str, list[float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of each text, as F-measures in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenize import tokenize

    if not any(tokenize(text, None) for ours in references for text in ours):
        raise UsageError("ROUGE counts words of a–z and 0–9 only, and no reference has any; score with chrf instead")
    scorer = RougeScorer(ROUGES, use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    best = [scorer.score_multi(list(ours), prediction) for prediction, ours in pairs]
    return {name: [one[name].fmeasure for one in best] for name in ROUGES}


def _exact(predictions: Sequence[str], references: References) -> list[float]:
    """1 for each prediction that equals a reference but for white space."""
    pairs = zip(predictions, references, strict=True)
    return [float(_spaced(one) in map(_spaced, ours)) for one, ours in pairs]


def _same_number(predictions: Sequence[str], references: References) -> list[float]:
    """1 for each prediction whose final number equals that of a reference."""
    right = []
    for index, (prediction, ours) in enumerate(zip(predictions, references, strict=True), 1):
        wanted = [final_number(text) for text in ours]
        if None in wanted:
            raise DataError(f"reference {index:,} has no final number ('{ours[0][-40:]}'), which gsm8k compares")
        right.append(float(final_number(prediction) in wanted))
    return right


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _sacrebleu(metric: str, **options: Any) -> Callable[[Sequence[str], References], float]:
    def score(predictions: Sequence[str], references: References) -> float:
        import sacrebleu.metrics

        # an empty reference is a fact, but sacreBLEU takes it for none; as a space it still has no words
        streams = zip_longest(*([text or " " for text in ours] for ours in references))
        scorer = getattr(sacrebleu.metrics, metric)(**options)
        return float(scorer.corpus_score(list(predictions), [list(stream) for stream in streams]).score)

    return score


def _spaced(text: str) -> str:
    return " ".join(text.split())


# `force`: without it sacreBLEU writes a warning for text that looks tokenised, and computes the same
FUNCTIONS: dict[str, Callable[[Sequence[str], References], float | dict[str, float]]] = {
    "bleu": _sacrebleu("BLEU", force=True),
    "bleu_zh": _sacrebleu("BLEU", force=True, tokenize="zh"),
    "bleu_char": _sacrebleu("BLEU", force=True, tokenize="char"),
    "bleu_intl": _sacrebleu("BLEU", force=True, tokenize="intl"),
    "chrf": _sacrebleu("CHRF"),
    "ter": _sacrebleu("TER"),
    "rouge": lambda predictions, references: {
        name: _mean(values) for name, values in _rouges(predictions, references).items()
    },
    "exact_match": lambda predictions, references: _mean(_exact(predictions, references)),
    "gsm8k": lambda predictions, references: _mean(_same_number(predictions, references)),
}
