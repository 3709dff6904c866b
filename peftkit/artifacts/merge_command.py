"""`peftkit merge`: what can be asked of it, and what it says. Imports nothing heavy before it is asked."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.console import positive
from peftkit.errors import UsageError

if TYPE_CHECKING:
    from peftkit.artifacts.proof import MergeReport
    from peftkit.artifacts.settings import MergeSettings
    from peftkit.data.rows import Rows

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ONTO = {
    "trained": "onto the values that training saw",
    "full-precision": "onto the checkpoint before it was quantised",
    "requantized": "onto the values that training saw, and packed anew",
}


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of `peftkit merge`."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN")
    add("target", type=Path, metavar="OUT")
    add("--data", type=Path, metavar="FILE", help="rows, or texts (.txt), to compare on (default: the dev split)")
    add("--probe-rows", type=positive, metavar="N", help="compare on the first N rows (default: all)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of the saved weights (default: the backbone's; bfloat16 if quantised)")
    add("--precision", choices=("float32", "float64"), default="float32", help="what W + ΔW is computed in")
    add("--shard-size", metavar="SIZE", default="50GB", help="the most bytes of a file, such as 2GB (default: 50GB)")
    add("--streaming", action="store_true", help="tensor by tensor, as models that do not fit into memory always are")
    packed = "pack the linear layers of the blocks with bitsandbytes, for transformers; what it costs is measured"
    add("--quantize", choices=("nf4", "fp4", "int8"), help=packed)
    add("--drop-layers", type=positive, default=0, metavar="N", help="leave out the top N blocks; the score is told")
    which = parser.add_mutually_exclusive_group()
    onto = "of a quantised run: full-precision adds ΔW to the checkpoint before it was quantised"
    which.add_argument("--onto", choices=("trained", "full-precision"), default="trained", help=onto)
    which.add_argument(
        "--requantize", action="store_const", dest="onto", const="requantized", help="pack the merged weights anew"
    )


def settings_of(options: argparse.Namespace) -> MergeSettings:
    """What the options come to.

    Raises:
        UsageError: a size that is none.
    """
    from peftkit.artifacts.settings import MergeSettings

    return MergeSettings(
        options.dtype,
        options.precision,
        size_of(options.shard_size),
        options.onto,
        pack=options.quantize,
        drop_layers=options.drop_layers,
    )


def size_of(text: str) -> int:
    """Bytes of `2GB`, `500MiB` or a plain number.

    Raises:
        UsageError: it is no size.
    """
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in UNITS or not int(found[1]):
        raise UsageError(f"--shard-size: '{text}' is no size; write a number of bytes, or one such as 2GB or 500MiB")
    return int(found[1]) * UNITS[found[2].upper()]


def answer(options: argparse.Namespace, read: Callable[[Any, Path], Rows]) -> str:
    """Merge, and say what was found.

    Args:
        read: the rows in a file, for a task.
    """
    from peftkit.artifacts.merge import merge
    from peftkit.artifacts.store import load_run, read_manifest
    from peftkit.artifacts.streamed import merge_streamed, needs_streaming
    from peftkit.artifacts.target import check_new_folder

    settings = settings_of(options)
    read_manifest(options.run)
    check_new_folder(options.target, [options.run], "a merge")
    too_large = needs_streaming(options.run, settings)
    if too_large:
        return shown(merge_streamed(options.run, options.target, settings), options.target)
    saved = load_run(options.run)
    rows = read(saved.run.task, options.data) if options.data else saved.run.task.splits().dev
    probe = rows.head(options.probe_rows) if options.probe_rows else rows
    if options.streaming:
        return shown(merge_streamed(options.run, options.target, settings, probe, saved), options.target)
    return shown(merge(saved, options.target, probe, settings), options.target)


def smaller(settings: dict[str, Any]) -> list[str]:
    """In what the merged model is less than the run, by what a report says of its settings."""
    packed, dropped = settings.get("packing"), settings.get("drop_layers")
    found = []
    if packed:
        found.append(f"linear layers of the blocks packed in {packed}")
    if dropped:
        found.append(f"the top {dropped} blocks left out" if dropped > 1 else "the top block left out")
    return found


def sizes(report: dict[str, Any]) -> str:
    """What was written beside what the whole model takes."""
    written, whole = (report[name] / 2**20 for name in ("bytes", "whole_bytes"))
    return f"{written:,.1f} MiB, where the whole model takes {whole:,.1f} in {report['settings']['dtype']}"


def shown(report: MergeReport, target: Path) -> str:
    """The figures in words."""
    settings, lines = report.settings, []
    if settings["quantization"]:
        lines.append(f"{settings['dtype']}, computed in {settings['precision']} {ONTO[settings['onto']]}")
    if report.layers:
        lines.append(
            f"streamed: {report.layers:,} adapted layers compute the same after re-reading (largest difference "
            f"{report.layer_difference:.2g} relative, {settings['layer_tolerance']:g} allowed), and all other weights "
            "are equal"
        )
    if report.layers and not report.rows:
        lines.append("the whole model was not run: it does not fit into memory beside itself")
    if report.rows:
        agreement = report.argmax_agreement
        agreed = "" if agreement is None else f", argmax alike in {100 * agreement:.4g} %"
        limit = f"{report.tolerance:g} allowed" if settings["limited"] else "measured, and not limited"
        lines.append(
            f"{report.equal_predictions:,} of {report.rows:,} predictions equal after re-reading; largest logit "
            f"difference {report.largest_difference:.2g} ({report.relative:.2g} relative, {limit}){agreed}, divergence "
            f"{report.mean_divergence:.2g} on average and {report.largest_divergence:.2g} at most"
        )
    if report.score:
        lines.append(f"{report.score['name']} {report.score['before']:.6g} before, {report.score['after']:.6g} after")
    if less := smaller(settings):
        lines.append(f"{' and '.join(less)}: {sizes(vars(report))}")
    if report.rows < report.examples:
        lines.append(
            f"compared on the first {report.rows:,} of {report.examples:,} examples; memory is set aside for no more"
        )
    lines.append(f"wrote {target}: transformers.{report.model_class}.from_pretrained('{target}')")
    if report.pooling == "mean":
        lines.append("pooling is `mean`: average its token logits over the attention mask")
    if report.pooling == "markers":
        lines.append("pooling is `markers`: average its token logits at the two opening markers")
    return "\n".join(lines)
