"""What a report says of the results as a whole: how many, how to read them, what is missing, what they took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from peftkit.bench import numbers
from peftkit.bench.analysis import LEVEL, Analysis
from peftkit.bench.block_tables import state
from peftkit.bench.document import Cell, Fold, Items, Paragraph, Part, Table
from peftkit.bench.numbers import NOTHING, Scale
from peftkit.bench.provenance import described, in_words, runs
from peftkit.bench.results import Results
from peftkit.bench.store import Record

MOST_LISTED = 200


def sentence(results: Results) -> str:
    """How much there is."""
    counted = [run for block in results.blocks for run in block.runs]
    trials = [record for record in results.records if record.key.phase == "trial"]
    failed = [run for block in results.blocks for entry in block.entries for run in entry.failed]
    missing = sum(len(entry.missing) for block in results.blocks for entry in block.entries)
    seeds = {len(entry.seeds) for block in results.blocks for entry in block.scored}
    spread = f", {_range(seeds)} seed{'' if seeds == {1} else 's'} a method" if seeds else ""
    return (
        f"{runs(len(counted))} scored on test{spread}, tuned in {len(trials):,} trials on dev; {len(failed):,} failed "
        f"or out of memory, {missing:,} missing, {len(results.damaged):,} damaged."
    )


def warnings(results: Results, references: Sequence[str]) -> Iterator[Part]:
    """What a reader must know before anything else."""
    if results.differing:
        told = "; ".join(in_words(results.differing))
        yield Paragraph(
            f"These results are mixed, as was asked for. Runs differ in {told}.", "warning", "Mixed results."
        )
    if results.damaged:
        files = ", ".join(list(results.damaged)[:5])
        more = ", …" if len(results.damaged) > 5 else ""
        yield Paragraph(
            f"{len(results.damaged)} files could not be read or do not fit, and none of them counts: {files}{more}.",
            "warning",
            "Damaged files.",
        )
    if not references:
        yield Paragraph(
            "Neither full fine-tuning nor LoRA is here to compare with (--reference names another).", "note"
        )


def how_to_read(references: Sequence[str], margin: float, analyses: Sequence[Analysis]) -> list[Part]:
    """What the figures are and how they were tested."""
    shares = sum(one.block.is_share for one in analyses)
    told = [Scale(True).margin(margin) + " of a hundred"] if shares else []
    if shares < len(analyses):
        told.append(f"{100 * margin:g} % of the first reference's mean where the score is no share")
    texts = [
        "Every method is tuned on dev with trials over its learning rate; the final runs, one a seed, are scored on "
        "test once. Scores are means over seeds.",
        "Intervals hold the expected score over new seeds and new test examples with a probability of 95 %: two-way "
        "random effects, seeds crossed with examples, on the logit scale for shares.",
        f"Differences from {' and '.join(references) or 'a reference'} are paired over seeds and examples. p is "
        "two-sided, after Holm's correction over all methods of a block against that reference. “Better” and “worse” "
        f"mean p ≤ {LEVEL:g}.",
        f"“As good as” is a test of its own: that the difference is less than {', or '.join(told)}, either way (two "
        "one-sided tests, with Holm's correction). “Better within the margin” is both. “Not separable” means that "
        "neither was shown: it is no evidence of equality.",
        "Methods that share a group letter are not separable from one another (all pairs of a block, with Holm's "
        "correction).",
        "What is recommended is the cheapest of the methods that are as good as the best mean: those that are not "
        "separable from it, even before correction, and have a mean within the margin of its mean, or were tested to "
        "be no worse by the margin. "
        "Of these, the fewest trainable parameters win, then the shortest training.",
        "Memory growth is what of the peak came with the model and its training. Forgetting is the change on a probe "
        "that the backbone was not tuned for.",
    ]
    return [Fold("How to read this", [Items(texts)])]


def gaps(results: Results) -> list[Part]:
    """Cells that are not whole, with the errors; files that are damaged; runs that do not count."""
    rows: list[Sequence[Cell | str]] = []
    for block in results.blocks:
        for entry in block.entries:
            if told := state(entry):
                unscored = entry.failed or [trial for trial in entry.trials if trial.status != "finished"]
                errors = dict.fromkeys(map(_error, unscored))
                rows.append([block.title, entry.method, Cell(told, "bad"), "; ".join(errors) or NOTHING])
    failed = [one for one in results.records if one.key.phase == "trial" and one.status != "finished"]
    lists = [
        ("Trials that failed", [f"{_place(one)}: {_error(one)}" for one in failed]),
        ("Damaged files", [f"{name}: {why}" for name, why in sorted(results.damaged.items())]),
        ("Runs that are whole and do not count", results.left_out),
    ]
    table = [Table(["data set · backbone · budget", "method", "what", "why"], rows, words=(1, 2, 3))] if rows else []
    return [
        *table,
        *(Fold(f"{title} ({len(texts):,})", [Items(_some(texts))], True) for title, texts in lists if texts),
    ]


def total_cost(results: Results) -> list[Part]:
    """Runs and hours, of each method and of all."""
    by_method: dict[str, list[Record]] = {}
    for record in results.records:
        by_method.setdefault(record.key.method, []).append(record)
    rows = [_cost(name, found) for name, found in sorted(by_method.items())]
    head = ["method", "trials", "final runs", "failed", "training", "evaluation of test", "steps", "tokens"]
    return [
        Table(head, [*rows, _cost("all", results.records)], "Of everything that was run, failures as far as known.")
    ]


def provenance(results: Results) -> list[Part]:
    """Versions, code and machines of the finished runs."""
    finished = [record for record in results.records if record.status == "finished"]
    if not finished:
        return []
    same = described(finished[0])
    rows = [
        [name, "; ".join(f"{one} ({runs(count)})" for one, count in results.differing[name].items())]
        if name in results.differing
        else [name, same.get(name, NOTHING)]
        for name in dict.fromkeys([*same, *results.differing])
    ]
    return [Table(["what", "of all finished runs"], rows, words=(1,))]


def _cost(name: str, records: Iterable[Record]) -> list[str]:
    found = list(records)
    costs = [one.cost for one in found if one.cost]
    counts = [sum(one.key.phase == phase for one in found) for phase in ("trial", "final")]
    failed = sum(one.status != "finished" for one in found)
    return [
        name,
        *(f"{count:,}" for count in (*counts, failed)),
        numbers.seconds(sum(one.seconds for one in costs)),
        numbers.seconds(sum(one.evaluation_seconds or 0.0 for one in costs)),
        *(f"{sum(values):,}" for values in ([one.steps for one in costs], [one.tokens for one in costs])),
    ]


def _error(record: Record) -> str:
    what = "out of memory" if record.status == "out_of_memory" else "failed"
    return f"{what}: {record.error.splitlines()[0][:300]}" if record.error else what


def _place(record: Record) -> str:
    key = record.key
    return f"{key.data}, {key.backbone}, {key.budget}, {key.method}, learning rate {numbers.rate(key.learning_rate)}"


def _some(texts: Sequence[str]) -> list[str]:
    more = [f"and {len(texts) - MOST_LISTED:,} more"] if len(texts) > MOST_LISTED else []
    return [*texts[:MOST_LISTED], *more]


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
