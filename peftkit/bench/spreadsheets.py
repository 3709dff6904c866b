"""The figures of a report as comma-separated values: one row a final run, and one a cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from peftkit.bench import numbers
from peftkit.bench.analysis import Analysis, Row
from peftkit.bench.block_tables import chosen_rate, state
from peftkit.bench.results import Results
from peftkit.bench.store import Record

Figures = dict[str, str | int | float | None]


def runs_csv(results: Results) -> str:
    """Every final run, failed ones too."""
    order = sorted(results.finals, key=lambda one: (*one.key.cell, one.key.seed, one.id))
    counted = {run.id for block in results.blocks for run in block.runs}
    return _written([_run(record, record.id in counted) for record in order])


def cells_csv(analyses: Sequence[Analysis], references: Sequence[str]) -> str:
    """Every cell, missing ones too."""
    return _written([_cell(one, row, references) for one in analyses for row in one.rows])


def _run(record: Record, counted: bool) -> Figures:
    key = record.key
    row: Figures = {
        "id": record.id,
        "grid": key.grid,
        "backbone": key.backbone,
        "data": key.data,
        "budget": key.budget,
        "method": key.method,
        "seed": key.seed,
        "learning_rate": key.learning_rate,
        "status": record.status,
        "counted": int(counted),
        "error": record.error,
        "headline": record.test.headline if record.test else None,
    }
    for name, score in (
        ("dev", record.dev),
        ("test", record.test),
        ("merged", record.merged),
        ("majority", record.majority),
        ("untuned", record.untuned),
    ):
        row[name] = score.value if score else None
    row |= {f"test_{name}": value for name, value in (record.test.values.items() if record.test else ())}
    row |= {f"robustness_{name}": score.value for name, score in record.robustness.items()}
    row |= {f"elsewhere_{name}": score.value for name, score in record.elsewhere.items()}
    for name in ("merged_answers_changed", "best_step", "trainable_parameters", "head_parameters"):
        row[name] = getattr(record, name)
    row |= {"matched_to_parameters": key.parameters} if key.parameters else {}
    for name in ("total_parameters", "saved_parameters", "artifact_bytes"):
        row[name] = getattr(record, name)
    row |= record.cost.model_dump() if record.cost else {}
    if record.forgetting:
        row |= {f"forgetting_{name}": value for name, value in record.forgetting.model_dump().items()}
    return row | {"data_sha256": record.data_sha256, "code": record.code}


def _cell(analysis: Analysis, row: Row, references: Sequence[str]) -> Figures:
    block, runs = analysis.block, row.entry.runs
    found: Figures = {
        "backbone": block.backbone,
        "data": block.data,
        "budget": block.budget,
        "method": row.entry.method,
        "seeds": len(runs),
        "failed": len(row.entry.failed),
        "missing": len(row.entry.missing),
        "state": state(row.entry),
        "learning_rate": chosen_rate(row.entry),
        "headline": block.headline,
        "mean": row.mean,
        "low": row.interval.low if row.interval else None,
        "high": row.interval.high if row.interval else None,
        "interval": row.over,
        "group": row.letters,
    }
    for name in references:
        found |= _against(row, name, analysis.margin)
    if runs and runs[0].key.parameters:
        found["matched_to_parameters"] = runs[0].key.parameters
    costs = [run.cost for run in runs if run.cost]
    return found | {
        "trainable_parameters": numbers.mean(run.trainable_parameters for run in runs),
        "head_parameters": numbers.mean(run.head_parameters for run in runs),
        "artifact_bytes": numbers.mean(run.artifact_bytes or None for run in runs),
        "seconds": numbers.mean(one.seconds for one in costs),
        "tokens_per_second": numbers.mean(one.tokens_per_second or None for one in costs),
        "memory_growth_bytes": numbers.mean(one.memory_growth_bytes for one in costs),
        "peak_memory_bytes": numbers.mean(one.peak_memory_bytes for one in costs),
        "merged_mean": numbers.mean(run.merged.value if run.merged else None for run in runs),
    }


def _against(row: Row, reference: str, margin: float) -> Figures:
    one = row.against.get(reference)
    if one is None:
        return {f"{reference}_{name}": None for name in ("difference", "low", "high", "p", "p_holm", "verdict")}
    apart = one.difference
    return {
        f"{reference}_difference": apart.mean,
        f"{reference}_low": apart.low,
        f"{reference}_high": apart.high,
        f"{reference}_p": apart.p_value,
        f"{reference}_p_holm": one.p_adjusted,
        f"{reference}_p_equivalent_holm": one.p_equivalent,
        f"{reference}_margin": margin,
        f"{reference}_verdict": one.verdict,
    }


def _written(rows: Sequence[Mapping[str, object]]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _shown(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _shown(value: object) -> object:
    """Numbers as they are; text that a spreadsheet would compute gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
