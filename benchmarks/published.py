"""Write the report of the published comparison, and README's section on it, from the raw results.

    python -m benchmarks.published

Reads benchmarks/results/main (made by `peftkit bench run benchmarks/grids/main.yaml`), and needs neither torch nor the
data: every figure of the report and of README's section comes from the records and answers that lie there. Its runs
were made on two kinds of machine, which both say, with what runs that were made on both differ by
(`benchmarks/repeated.py`).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.orderings import ORDERINGS, Verdict, lost, verdicts
from peftkit.bench import numbers
from peftkit.bench.analysis import Analysis, Row, analyse
from peftkit.bench.numbers import NOTHING, Scale
from peftkit.bench.provenance import runs
from peftkit.bench.report import MARGIN, REFERENCES, report
from peftkit.bench.results import Block, Entry, read

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "main"
REPEATED = FOLDER.with_name("repeated.json")
README = ROOT / "README.md"
BEGIN, END = "<!-- from here to the end: python -m benchmarks.published -->\n", "<!-- end -->\n"
NAMES = {"sst2": "SST-2", "tweet_emotion": "TweetEval emotion", "wnut17": "WNUT-17"}


def main() -> None:
    report(FOLDER, FOLDER / "report", mixed=True)
    README.write_text(with_section(README.read_text(encoding="utf-8"), section()), encoding="utf-8")


def section(folder: Path = FOLDER) -> str:
    """README's words on the published comparison."""
    results = read(folder, mixed=True)
    analyses = [analyse(block, REFERENCES, MARGIN) for block in results.blocks]
    parts = [
        _under_way(analyses),
        *_machines(results.differing),
        _scores(analyses),
        _costs(analyses),
        *_lost_seeds(analyses),
        *_forgotten(analyses),
        _agreement(verdicts(analyses)),
    ]
    return "\n\n".join(parts) + "\n"


def with_section(text: str, new: str) -> str:
    """The text with what stands between the two marks replaced."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"{README}: the marks {BEGIN.strip()} and {END.strip()} are not there")
    return f"{before}{BEGIN}{new}{END}{after}"


def _under_way(analyses: Sequence[Analysis]) -> str:
    rows = [row for one in analyses for row in one.rows]
    done = sum(_is_finished(row.entry) for row in rows)
    gaps = "" if done == len(rows) else f"; {len(rows) - done} are not finished, shown as {NOTHING}"
    return fill(
        "The grid `benchmarks/grids/main.yaml`: MiniLM, methods at their papers' sizes, 200 steps of 16 examples, at "
        f"least four learning rates tried for each, five seeds; {done} of {len(rows)} cells are finished{gaps}. Scores "
        "are of test, in points, with 95 % intervals over new seeds and new examples; methods that share a letter "
        "within a column are not separable. Learning curves, Pareto fronts, paired tests and what is recommended are "
        "in [the report](benchmarks/results/main/report/report.md); every answer of every run lies beside it."
    )


def _machines(differing: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Where the runs were made, and what that changes."""
    if set(differing) - {"processor", "platform"}:
        raise SystemExit(f"{FOLDER}: runs differ in {', '.join(differing)}, and only machines were to differ")
    if not differing:
        return []
    processors = " and ".join(f"{name} ({runs(count)})" for name, count in differing["processor"].items())
    again = json.loads(REPEATED.read_text(encoding="utf-8"))
    mean, most, spread = (
        numbers.true_minus(f"{100 * again[name]:{how}.2f}")
        for name, how in (("mean_difference", "+"), ("largest_difference", ""), ("spread_over_seeds", ""))
    )
    return [
        fill(
            f"Runs are of two processors, {processors}. {again['count']} of the one, made again on the other, score "
            f"{mean} points on average and at most {most} apart, where seeds have a standard deviation of {spread} "
            "([figures](benchmarks/results/repeated.json))."
        )
    ]


def _scores(analyses: Sequence[Analysis]) -> str:
    head = [f"{NAMES.get(one.block.data, one.block.data)}, {_headline(one.block)}" for one in analyses]
    lines = [[method, *(_score(one, method) for one in analyses)] for method in _methods(analyses)]
    return _table(["method", *head], lines)


def _costs(analyses: Sequence[Analysis]) -> str:
    """Of the first data set, where a head has two outputs."""
    first, lines = analyses[0], []
    for method in _methods(analyses):
        row = _finished(first, method)
        if row is None:
            continue
        runs = row.entry.runs
        seconds = numbers.mean(run.cost.seconds if run.cost else None for run in runs)
        growth = numbers.mean(run.cost.memory_growth_bytes if run.cost else None for run in runs)
        changed = [run.merged_answers_changed for run in runs if run.merged_answers_changed is not None]
        lines.append(
            [
                method,
                numbers.count(numbers.mean(run.trainable_parameters for run in runs)),
                numbers.size(numbers.mean(run.artifact_bytes for run in runs)),
                numbers.seconds(seconds),
                numbers.size(growth),
                str(sum(changed)) if changed else "does not merge",
            ]
        )
    name = NAMES.get(first.block.data, first.block.data)
    head = [f"{name}: method", "trainable", "artifact", "training", "memory growth", "answers that merging changed"]
    return _table(head, lines) + "\n\nTraining is of one thread on a machine that other work shared."


def _lost_seeds(analyses: Sequence[Analysis]) -> list[str]:
    """Runs that did no better than the most frequent answer."""
    astray = [
        f"{row.entry.method} on {NAMES.get(one.block.data, one.block.data)}, seed {run.key.seed} "
        f"(learning rate {numbers.rate(run.key.learning_rate)})"
        for one in analyses
        for row in one.rows
        for run in row.entry.runs
        if run.test and run.majority and run.test.value <= run.majority.value
    ]
    if not astray:
        return []
    told = f"No better than the most frequent answer: {'; '.join(astray)}."
    return [
        fill(f"{told} One tuning seed can choose a rate at the edge of divergence, and the intervals say so."),
    ]


def _forgotten(analyses: Sequence[Analysis]) -> list[str]:
    """What a frozen probe of other texts lost."""
    lines = []
    for method in _methods(analyses):
        cells = [_lost(_finished(one, method)) for one in analyses]
        if any(cell != NOTHING for cell in cells):
            lines.append([method, *cells])
    before = {run.forgetting.before for one in analyses for run in one.block.runs if run.forgetting}
    if not lines or not before:
        return []
    head = [f"after {NAMES.get(one.block.data, one.block.data)}" for one in analyses]
    told = (
        f"Points that a frozen linear probe (BANKING77, {100 * max(before):.1f} before tuning) loses, mean over seeds:"
    )
    return [f"{told}\n\n{_table(['forgetting', *head], lines)}"]


def _agreement(found: Iterable[Verdict]) -> str:
    by_claim: dict[str, list[Verdict]] = {ordering.claim: [] for ordering in ORDERINGS}
    for one in found:
        by_claim[one.claim].append(one)
    data = [NAMES.get(one.data, one.data) for one in next(iter(by_claim.values()))]
    lines = [[f"{claim} ({ones[0].source})", *(_word(one) for one in ones)] for claim, ones in by_claim.items() if ones]
    return "What the literature agrees on, and what these runs say (difference, 95 % interval, p after Holm):\n\n" + (
        _table(["ordering", *data], lines)
    )


def _word(one: Verdict) -> str:
    return one.word if one.evidence == NOTHING else f"{one.word}: {one.evidence}"


def _methods(analyses: Sequence[Analysis]) -> list[str]:
    """Best mean rank first, as far as finished; then the others as planned."""
    planned = list(dict.fromkeys(entry.method for one in analyses for entry in one.block.entries))
    scores: dict[str, list[float]] = {}
    for one in analyses:
        ranked = [row.entry.method for row in one.scored if _finished(one, row.entry.method)]
        for at, method in enumerate(ranked):
            scores.setdefault(method, []).append(at / len(ranked))
    most = max((len(found) for found in scores.values()), default=0)
    return sorted(
        planned,
        key=lambda name: (
            most - len(scores.get(name, [])),
            numbers.mean(scores.get(name, [])) or 0.0,
            planned.index(name),
        ),
    )


def _finished(analysis: Analysis, method: str) -> Row | None:
    row = analysis.row(method)
    return row if row and _is_finished(row.entry) else None


def _is_finished(entry: Entry) -> bool:
    """Whether every seed that was asked for has its run."""
    return 0 < len(entry.planned) == len(entry.runs)


def _score(analysis: Analysis, method: str) -> str:
    row = _finished(analysis, method)
    if row is None or row.interval is None:
        return NOTHING
    scale = Scale(analysis.block.is_share)
    return f"{scale.score(row.mean)} ({scale.between(row.interval.low, row.interval.high)}) {row.letters}".strip()


def _lost(row: Row | None) -> str:
    mean = numbers.mean(lost(row.entry if row else None).values())
    return NOTHING if mean is None else numbers.true_minus(f"{100 * mean:.1f}")


def fill(text: str) -> str:
    """The paragraph in lines."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _headline(block: Block) -> str:
    return block.headline.replace("_", " ") or NOTHING


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    ruled = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruled, *lines))


if __name__ == "__main__":
    main()
