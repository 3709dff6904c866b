"""The report of a comparison, from the raw results: a page, Markdown and tables. Needs neither torch nor peft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftkit.bench import block_charts, block_tables, overview, summing_up
from peftkit.bench.analysis import Analysis, analyse
from peftkit.bench.document import Fold, Heading, Items, Links, Paragraph, Part
from peftkit.bench.markdown import markdown
from peftkit.bench.page import page
from peftkit.bench.provenance import different_data
from peftkit.bench.recommend import Recommendation, recommend
from peftkit.bench.results import Block, Results, read
from peftkit.bench.spreadsheets import cells_csv, runs_csv
from peftkit.disk import require_writable, write_text
from peftkit.errors import UsageError
from peftkit.schema import did_you_mean

MARGIN = 0.01
REFERENCES = ("full", "lora")

FILES = ("report.html", "report.md", "results.csv", "cells.csv")


@dataclass(frozen=True)
class Written:
    """What a report was made of, and where it is."""

    results: Results
    files: tuple[Path, ...]
    advice: tuple[tuple[Block, Recommendation | None], ...]


def report(
    folder: Path,
    out: Path,
    references: Sequence[str] = (),
    margin: float = MARGIN,
    mixed: bool = False,
    title: str = "",
) -> Written:
    """Write `report.html`, `report.md`, `results.csv` and `cells.csv`; the same results give the same bytes.

    Args:
        references: methods that all others are compared with; full fine-tuning and LoRA unless told.
        margin: of "as good as": absolute for shares such as accuracy, else a share of the reference's mean score.
        mixed: let finished runs of different versions, code or machines stand together; the report says which.

    Raises:
        UsageError: nothing to report on, an unknown reference, mixed results, or a folder that cannot be written to.
        DataError: results that cannot be compared.
    """
    if not 0 < margin < 1:
        raise UsageError(f"a margin of {margin}: give a number between 0 and 1, as 0.01 for one point of accuracy")
    for name in FILES:
        require_writable(out / name)
    results = read(folder, mixed)
    methods = dict.fromkeys(entry.method for block in results.blocks for entry in block.entries)
    for name in references:
        if name not in methods:
            raise UsageError(f"{folder}: no method '{name}' to compare with{did_you_mean(name, methods)}")
    named = list(dict.fromkeys(references)) or [name for name in REFERENCES if name in methods]
    analyses = [analyse(block, named, margin) for block in results.blocks]
    styles = {name: at for at, name in enumerate([*named, *(one for one in methods if one not in named)])}
    advice = [(one, recommend(one, baselines(results, one.block))) for one in analyses]
    grids = ", ".join(sorted({record.key.grid for record in results.records}))
    parts = _parts(title or f"Comparison {grids}", results, advice, named, margin, styles)
    texts = (
        page(title or f"Comparison {grids}", parts),
        markdown(parts),
        runs_csv(results),
        cells_csv(analyses, named),
    )
    for name, text in zip(FILES, texts, strict=True):
        write_text(out / name, text)
    return Written(results, tuple(out / name for name in FILES), tuple((one.block, found) for one, found in advice))


def baselines(results: Results, block: Block) -> dict[str, float]:
    """Scores that need no tuning: the most frequent answer, and the untuned backbone; from runs of the same data."""
    found = {}
    alike = [
        run for one in results.blocks if (one.backbone, one.data) == (block.backbone, block.data) for run in one.runs
    ]
    for name in ("majority", "untuned"):
        value = block_tables.untested(name, block.runs)
        value = block_tables.untested(name, alike) if value is None else value
        if value is not None:
            found[name] = value
    return found


def _parts(
    title: str,
    results: Results,
    advice: Sequence[tuple[Analysis, Recommendation | None]],
    references: Sequence[str],
    margin: float,
    styles: block_charts.Styles,
) -> list[Part]:
    analyses = [one for one, _ in advice]
    anchors = {one.block.place: f"block-{at}" for at, one in enumerate(analyses, 1)}
    parts: list[Part] = [
        Heading(title, 1),
        Paragraph(summing_up.sentence(results)),
        *summing_up.warnings(results, references),
        Heading("Which method to use"),
        overview.recommendations(advice),
        Links([(one.block.title, anchors[one.block.place]) for one in analyses]),
        *_section("All scores", overview.summary(analyses)),
        *summing_up.how_to_read(references, margin, analyses),
    ]
    for one, found in advice:
        parts += _block(one, found, results, references, styles, anchors[one.block.place])
    won, shown = overview.wins(analyses), overview.detectable(analyses)
    parts += _section("Fewer training rows", overview.few_shot(analyses, styles))
    parts += _section("Wins, ties and losses", [won] if won else [])
    parts += _section("Do data sets agree?", overview.ranks(analyses))
    parts += _section("What these results could have shown", [shown] if shown else [])
    parts += _section("What is missing, failed or left out", summing_up.gaps(results))
    parts += _section("What it took", summing_up.total_cost(results))
    return [*parts, *_section("Versions and machines", summing_up.provenance(results))]


def _section(title: str, parts: Sequence[Part]) -> list[Part]:
    return [Heading(title), *parts] if parts else []


def _block(
    one: Analysis,
    advice: Recommendation | None,
    results: Results,
    references: Sequence[str],
    styles: block_charts.Styles,
    anchor: str,
) -> list[Part]:
    block, known = one.block, baselines(results, one.block)
    parts: list[Part] = [Heading(block.title, 2, anchor)]
    if not one.scored:
        return [*parts, Paragraph("No final run has a score yet.", "warning"), *_rates(one)]
    parts += [Paragraph(advice.text, "advice", "Use")] if advice else []
    for note in (*_cautions(one), *_collapsed(one, known)):
        parts.append(Paragraph(note, "warning"))
    parts += [block_charts.scores(one, styles, known), block_tables.scores(one, known)]
    if len(one.groups.members) > 1:
        sets = [f"{chr(97 + at)}: {', '.join(names)}" for at, names in enumerate(one.groups.members[:26])]
        parts.append(Fold("Methods that are not separable", [Items(sets)]))
    parts += [Heading("What it costs", 3), block_tables.costs(one, next(iter(references), None))]
    parts += [block_charts.key(one, styles), *block_charts.pareto(one, styles)]
    if table := block_tables.afterwards(one):
        parts += [Heading("After training", 3), table, *block_charts.forgetting_against_learning(one, styles)]
    if noted := list(_noted(one)):
        parts.append(Fold("What the scores leave out", [Items(noted)]))
    if drawn := block_charts.curves(one, styles):
        parts.append(Fold("Learning curves", drawn))
    return [*parts, *_rates(one)]


def _rates(one: Analysis) -> list[Part]:
    found = block_tables.learning_rates(one)
    if found is None:
        return []
    table, notes = found
    title = f"Learning rates that were tried{f' ({len(notes)} to be noted)' if notes else ''}"
    return [Fold(title, [table, *([Items(notes)] if notes else [])])]


def _collapsed(one: Analysis, known: Mapping[str, float]) -> Iterator[str]:
    """Seeds that learnt nothing, which a mean hides."""
    if "majority" not in known:
        return
    for row in one.scored:
        scored = zip(row.entry.seeds, row.entry.samples.values if row.entry.samples else (), strict=True)
        lower = one.block.lower_is_better
        lost = [
            str(seed) for seed, value in scored if (value >= known["majority"] if lower else value <= known["majority"])
        ]
        if lost:
            seeds = f"seed{'' if len(lost) == 1 else 's'} {', '.join(lost)}"
            yield f"{row.entry.method}: {seeds} did no better than always giving the most frequent answer."


def _noted(one: Analysis) -> Iterator[str]:
    """What of the test rows was cut, or is no part of the score, and of which methods."""
    found: dict[str, list[str]] = {}
    for row in one.scored:
        for note in dict.fromkeys(note for run in row.entry.runs for note in run.notes if note.startswith("test: ")):
            found.setdefault(note.removeprefix("test: "), []).append(row.entry.method)
    for note, methods in found.items():
        of = "all methods" if len(methods) == len(one.scored) else ", ".join(methods)
        yield f"{of}: {note}"


def _cautions(one: Analysis) -> list[str]:
    told = []
    seeds = {len(row.entry.seeds) for row in one.scored}
    if seeds == {1}:
        told.append(
            "Every method has one seed: intervals and tests are over test examples alone, and how much a score changes "
            "from seed to seed is not in them. Nothing here tells whether a difference would come out again."
        )
    if any(not row.entry.per_example for row in one.scored):
        told.append(
            f"{one.block.headline} is no ratio of sums over examples: intervals and tests are over seeds alone "
            "(Student's t), and the chance of the test examples is not in them."
        )
    if unvaried := [row.entry.method for row in one.scored if row.entry.unvaried and len(row.entry.seeds) > 1]:
        told.append(
            f"{', '.join(unvaried)}: every seed gives the same {one.block.headline}, so there is no interval, and a "
            "difference from it has the chance of the other method's seeds alone."
        )
    apart = [row.entry.method for row in one.scored if row.entry.method not in one.pairs.names]
    if apart and len(one.scored) > 1:
        told.append(f"Not compared for want of shared seeds or test rows: {', '.join(apart)}.")
    if len(one.scored) == 1:
        told.append("One method has a score: there is nothing to compare it with.")
    if unlike := different_data(one.block.runs):
        told.append(f"Methods were not trained on the same tokens and labels, of seed {', '.join(map(str, unlike))}.")
    return told
