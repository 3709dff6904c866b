"""The options of `peftkit combine`, `diff`, `extract` and `export`, and what they answer."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.console import positive
from peftkit.errors import UsageError

if TYPE_CHECKING:
    from peftkit.artifacts.combine import CombineReport
    from peftkit.artifacts.diff import DiffReport, Pair
    from peftkit.artifacts.extract import ExtractReport

MOST_SHOWN = 3
"""Parameters whose error is told one by one; the report beside the result has all."""


def add_combine_options(parser: argparse.ArgumentParser) -> None:
    """Runs, weights and the new folder may stand in any order that keeps weights behind `--weights`."""
    parser.add_argument("places", nargs="*", default=[], metavar="RUN… OUT", help="the runs, and the new folder")
    parser.add_argument(
        "--weights", nargs="+", required=True, metavar="W", help="one number a run, as 1 -0.5 or --weights=1,-0.5"
    )
    parser.add_argument("--how", choices=("linear", "ties", "dare", "magnitude"), default="linear")
    parser.add_argument(
        "--density", type=float, metavar="D", help="the share of numbers that ties, dare, magnitude keep"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of what dare draws (default: 0)")
    parser.add_argument("--rank", type=positive, metavar="R", help="re-compress to the nearest adapter of this rank")
    parser.add_argument("--head", metavar="N", help="where heads differ: that of the Nth run, or average")
    parser.add_argument("--json", action="store_true")


def add_diff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", type=Path, metavar="A")
    parser.add_argument("other", type=Path, metavar="B")
    parser.add_argument("--json", action="store_true")


def add_extract_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="the untouched model: a name, or a folder")
    parser.add_argument("tuned", metavar="TUNED", help="the same model after training, or a finished run")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--rank", type=positive, required=True, metavar="R")
    parser.add_argument("--leave-out", action="store_true", help="go on without changes that no adapter holds")
    parser.add_argument("--json", action="store_true")


def add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN", help="a finished run, or a folder with a merged model")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--format", choices=("onnx", "gguf", "vllm"), required=True)
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="rows, or one text a line (.txt), to compare on (default: test split)"
    )
    parser.add_argument("--probe-rows", type=positive, metavar="N", help="compare on the first N (default: all)")
    parser.add_argument("--int8", action="store_true", help="onnx: a second file in 8 bits, its cost measured")
    parser.add_argument("--float16", action="store_true", help="gguf: matrices in 16 bits")
    parser.add_argument("--json", action="store_true")


def combine(options: argparse.Namespace) -> str:
    """Combine, and tell what came of it."""
    weights, rest = _numbers(options.weights)
    places = [Path(one) for one in (*options.places, *rest)]
    if not weights:
        raise UsageError(f"--weights {options.weights[0]}: not a number; give one for each run, as 1 -0.5")
    if len(places) < 2:
        raise UsageError("give at least one run, and the new folder: peftkit combine RUN… --weights W… OUT")
    if options.how == "linear" and options.density is not None:
        raise UsageError("--density is for --how ties, dare and magnitude; leave it out, or say how")
    if options.how != "linear" and options.density is None:
        raise UsageError(f"--how {options.how} needs --density, the share of numbers to keep, such as 0.2")
    if options.seed is not None and options.how != "dare":
        raise UsageError("--seed is for --how dare; nothing else is drawn")
    from peftkit.artifacts.combination import Recipe
    from peftkit.artifacts.combine import combine as combine_runs

    density = 1.0 if options.density is None else options.density
    recipe = Recipe(tuple(weights), options.how, density, options.seed or 0)
    report = combine_runs(places[:-1], places[-1], recipe, options.rank, options.head)
    return json.dumps(asdict(report), indent=2) if options.json else _combined(report, places[-1])


def diff(options: argparse.Namespace) -> str:
    """Compare two runs."""
    from peftkit.artifacts.diff import diff as diff_runs

    report = diff_runs(options.one, options.other)
    return json.dumps(asdict(report), indent=2, ensure_ascii=False) if options.json else _different(report)


def extract(options: argparse.Namespace) -> str:
    """Extract an adapter, and tell how near it is."""
    from peftkit.artifacts.extract import extract as extract_adapter

    report = extract_adapter(options.base, options.tuned, options.target, options.rank, options.leave_out)
    return json.dumps(asdict(report), indent=2) if options.json else _extracted(report, options.target)


def export(options: argparse.Namespace) -> str:
    """Export, and tell how it was compared."""
    if options.int8 and options.format != "onnx":
        raise UsageError("--int8 is for --format onnx; leave it out")
    if options.float16 and options.format != "gguf":
        raise UsageError("--float16 is for --format gguf; leave it out")
    if options.format == "vllm" and (options.data or options.probe_rows):
        raise UsageError("--data and --probe-rows: an adapter for vLLM is compared by its weights; leave them out")
    answer = {"onnx": _onnx, "gguf": _gguf, "vllm": _vllm}[options.format]
    report, lines = answer(options)
    return json.dumps(asdict(report), indent=2, ensure_ascii=False) if options.json else "\n".join(lines)


def _onnx(options: argparse.Namespace) -> tuple[Any, list[str]]:
    from peftkit.artifacts.export_onnx import export_onnx

    report = export_onnx(options.source, options.target, _rows(options), options.probe_rows, options.int8)
    lines = [f"compared  {report.rows:,} rows of {report.compared_on} in ONNX Runtime"]
    if report.scores:
        lines.append(f"torch     {_scores(report.scores)}")
    for name, graph in report.graphs.items():
        allowed = f", {report.tolerance:g} allowed" if name == "model.onnx" else ""
        lines.append(
            f"{name}  {graph.bytes / 2**20:.1f} MiB, {graph.equal:,} of {report.rows:,} predictions equal, largest "
            f"logit difference {graph.largest_difference:.2g} ({graph.relative:.2g} relative{allowed})"
        )
        lines += [f"          {_scores(graph.scores)}"] if graph.scores else []
    if report.pooling in ("mean", "markers"):
        what = "over the attention mask" if report.pooling == "mean" else "at the two opening markers"
        lines.append(f"pooling is `{report.pooling}`: average its token logits {what}")
    return report, [*lines, f"wrote {options.target}: onnxruntime.InferenceSession('{options.target}/model.onnx')"]


def _gguf(options: argparse.Namespace) -> tuple[Any, list[str]]:
    from peftkit.artifacts.export_gguf import export_gguf
    from peftkit.typed import lines_of

    prompts = lines_of(options.data)[: options.probe_rows] if options.data else None
    report = export_gguf(options.source, options.target, prompts, "float16" if options.float16 else "float32")
    return report, [
        f"compared  {report.tensors} weights as read back by transformers: largest difference "
        f"{report.largest_difference:.2g}; {report.equal_texts} of {report.prompts} prompts continued alike",
        f"wrote {options.target}/model.gguf ({report.bytes / 2**20:.1f} MiB, {report.precision})",
    ]


def _vllm(options: argparse.Namespace) -> tuple[Any, list[str]]:
    from peftkit.artifacts.export_vllm import export_vllm

    report = export_vllm(options.source, options.target)
    return report, [
        f"adapter   rank {report.rank} on {report.modules} modules; {report.truncation:.2g} of ‖ΔW‖ off as read back",
        f"wrote {options.target}: {report.command.replace('OUT', str(options.target))}",
    ]


def _rows(options: argparse.Namespace) -> Any:
    """The rows of `--data`; of a text file, one a line, as a run's task or a plain model takes them."""
    if options.data is None:
        return None
    from peftkit.artifacts.manifest import read_saved_config
    from peftkit.backbones.runs import is_run
    from peftkit.data.rows import Rows
    from peftkit.typed import lines_of, typed_rows

    if is_run(options.source):
        return typed_rows(read_saved_config(options.source).task, [], None, options.data)
    texts = lines_of(options.data)
    return Rows(str(options.data), [{"text": text} for text in texts], range(1, len(texts) + 1))


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def _numbers(given: list[str]) -> tuple[list[float], list[str]]:
    """The weights, and what stood behind them: `--weights 1 -0.5 OUT` has the folder among them."""
    numbers: list[float] = []
    for index, word in enumerate(given):
        try:
            numbers += [float(one) for one in word.split(",")]
        except ValueError:
            return numbers, given[index:]
    return numbers, []


def _combined(report: CombineReport, target: Path) -> str:
    share = f", density {report.density:g}" if report.how != "linear" else ""
    lines = [f"combined  {weight:g} × {run}" for run, weight in report.weights.items()]
    lines.append(f"how       {report.how}{share}; head: {report.head}")
    if report.result == "adapter":
        ranks = sorted(report.ranks.values())
        span = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        lines.append(
            f"result    an adapter of rank {span} on {len(ranks)} matrices, in peft's format: {target}/adapter"
        )
    else:
        lines.append(f"result    a plain transformers model in float32, because no adapter holds it: {target}/model")
    lines += _errors(report)
    lines.append(f"wrote {target}, a run for predict, evaluate, merge and combine")
    return "\n".join(lines)


def _extracted(report: ExtractReport, target: Path) -> str:
    lines = [
        f"extracted rank {report.rank} on {report.adapted} matrices; saved whole: {', '.join(report.kept) or 'nothing'}"
    ]
    if report.left_out:
        lines.append(f"left out  {', '.join(report.left_out)}: the result is not the whole of {report.tuned}")
    lines += _errors(report)
    lines.append(f"wrote {target}: peft.PeftModel.from_pretrained(base, '{target}')")
    return "\n".join(lines)


def _errors(report: CombineReport | ExtractReport) -> list[str]:
    """The error over everything, and of the parameters that are furthest off."""
    worst = sorted(report.truncated.items(), key=lambda one: -one[1])[:MOST_SHOWN]
    lines = [
        f"error     {report.truncation:.3g} of ‖ΔW‖ as read back from disk (float32 rounding: {report.rounding:.1g})"
    ]
    return lines + [f"          {error:.3g}  {name}" for name, error in worst if report.truncation > 1e-5]


def _different(report: DiffReport) -> str:
    from peftkit.tables import table

    lines = [f"A {report.runs[0]}", f"B {report.runs[1]}"]
    lines.append(table([["ΔW of", "‖A‖", "‖B‖", "cosine"], *map(_row, (*report.parameters, report.whole))]))
    lines.append(f"heads     {report.heads or 'equal'}")
    lines += [f"settings  {name}: {old} and {new}" for name, (old, new) in report.settings.items()]
    for name in dict.fromkeys([*report.scores[0], *report.scores[1]]):
        pair = (f"{side[name]:.4f}" if name in side else "none" for side in report.scores)
        lines.append(f"scores    {name}: {' and '.join(pair)}")
    return "\n".join(lines)


def _row(pair: Pair) -> list[str]:
    cosine = "" if pair.cosine is None else f"{pair.cosine:.3f}"
    return [pair.name, *(f"{norm:.4g}" for norm in pair.norms), cosine]
