"""Encoders for ONNX Runtime: the merged model as one graph, compared with torch before it is handed out.

torch's exporter is the one on `torch.export`, which proves that the lengths it leaves open are open; the older one by
tracing writes branches and sizes of its one example into the graph, with a warning.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.artifacts.export import REPORT, TEXTS, Exportable, opened
from peftkit.artifacts.merge import REPORT as MERGED
from peftkit.artifacts.onnx_session import OUTPUTS, Batch, OnnxFigures, figures, predicted
from peftkit.artifacts.target import check_new_folder
from peftkit.data.collate import collate
from peftkit.data.rows import Rows
from peftkit.disk import whole_folder, write_text
from peftkit.errors import ArtifactError, UsageError, first_line
from peftkit.prepare import Split, encode_split
from peftkit.quiet import quiet_libraries
from peftkit.tensor_files import parse_object

MODEL, SMALL = "model.onnx", "model_int8.onnx"
TOLERANCE = 1e-4
"""Largest accepted |Δlogit| / max(1, largest |logit|) between the graph and torch, both in float32."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LARGEST = 2**31 - 2**24
"""Bytes of weights that fit into the one file, which protobuf ends at 2 GiB; larger ones lie in a second one."""
BATCH = 16
"""Examples that are compared at once."""


@dataclass(frozen=True)
class OnnxReport:
    """What was exported, and how far it is from the model that was evaluated."""

    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    pooling: str
    """`mean` and `markers`: token logits are averaged, as of a merged model."""
    rows: int
    compared_on: str
    tolerance: float
    scores: dict[str, float]
    """Of the task in torch."""
    graphs: dict[str, OnnxFigures]


def export_onnx(
    source: Path, target: Path, rows: Rows | None = None, most_rows: int | None = None, int8: bool = False
) -> OnnxReport:
    """Write an encoder as ONNX, run it in ONNX Runtime, and compare; nothing is left unless it computes the same.

    Args:
        source: a finished run, or a folder with a merged model.
        rows: to compare on; of a run in place of its test split, else one text a row in the column `text`.
        int8: write a second file with dynamically quantised weights, whose cost is measured and not limited.

    Raises:
        UsageError: no encoder, or ONNX is not installed.
        ArtifactError: the graph computes something else.
    """
    _require("onnx", "onnxruntime", "onnxscript")
    check_new_folder(target, [source], "an export")
    found = opened(source)
    if found.head.model_class not in OUTPUTS:
        raise UsageError(
            f"{source} is a {type(found.model).__name__}; ONNX is for encoders that classify texts or tokens, or "
            "answer questions: use --format gguf for a Llama, or ship the merged model"
        )
    split, batches, name = _compared_on(found, rows, most_rows)
    inputs = tuple(key for key in INPUTS if key in batches[0])
    before, scores = predicted(found, split)
    with whole_folder(target) as partial:
        _write_graph(found, inputs, batches, partial / MODEL)
        if int8:
            _quantise(partial / MODEL, partial / SMALL)
        with quiet_libraries():
            found.tokenizer.save_pretrained(partial)
            found.model.config.save_pretrained(partial)  # type: ignore[union-attr, operator]
        report = OnnxReport(
            format="onnx",
            inputs=inputs,
            outputs=OUTPUTS[found.head.model_class],
            pooling=_pooling(found),
            rows=len(split) if split else sum(len(one["input_ids"]) for one in batches),
            compared_on=name,
            tolerance=TOLERANCE,
            scores=scores,
            graphs={one: figures(found, split, batches, before, partial / one) for one in (MODEL, SMALL)[: 1 + int8]},
        )
        if not report.graphs[MODEL].relative <= TOLERANCE:
            raise ArtifactError(
                f"the ONNX graph does not compute what the model does: logits differ by "
                f"{report.graphs[MODEL].largest_difference:.2g} ({report.graphs[MODEL].relative:.2g} relative, "
                f"{TOLERANCE:g} allowed); nothing was written"
            )
        write_text(partial / REPORT, json.dumps(asdict(report), indent=2) + "\n")
    return report


def _require(*packages: str) -> None:
    if missing := [one for one in packages if importlib.util.find_spec(one) is None]:
        raise UsageError(f"{', '.join(missing)} is not installed; pip install 'peftkit[export]'")


def _compared_on(found: Exportable, rows: Rows | None, most: int | None) -> tuple[Split | None, list[Batch], str]:
    """(the split of a run, batches of it or of texts, what they are)."""
    if found.saved is None:
        texts = [str(one["text"]) for one in rows.records] if rows is not None else list(TEXTS)
        encoding = found.tokenizer(texts[:most], truncation=True)
        keys = [key for key in encoding if key in INPUTS[::2]]
        examples = [{key: encoding[key][index] for key in keys} for index in range(len(texts[:most]))]
        return None, _batches(examples, found), rows.source if rows is not None else "built-in texts"
    saved = found.saved
    held = rows if rows is not None else saved.run.task.splits().held_out
    held = held if most is None else held.head(most)
    split = encode_split(saved.run, held.source, held, saved.head, saved.tokenizer, supervised=False)
    return split, _batches(split.encoded.examples, found), held.source


def _batches(examples: Sequence[Any], found: Exportable) -> list[Batch]:
    """Batches of different sizes and lengths; the first is a single example."""
    pad = int(found.tokenizer.pad_token_id or 0)
    starts = [0, *range(1, len(examples), BATCH)]
    cuts = zip(starts, [*starts[1:], len(examples)], strict=True)
    found_batches = [collate(examples[start:end], pad) for start, end in cuts]
    return [{key: batch[key] for key in INPUTS if key in batch} for batch in found_batches]


def _write_graph(found: Exportable, inputs: tuple[str, ...], batches: Sequence[Batch], file: Path) -> None:
    import torch
    from torch import nn

    names = OUTPUTS[found.head.model_class]

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = found.model

        def forward(self, *values: Any) -> tuple[Any, ...]:
            output = self.model(**dict(zip(inputs, values, strict=True)))
            return tuple(getattr(output, name) for name in names)

    examples, tokens = torch.export.Dim("examples"), torch.export.Dim("tokens")
    # sizes of 0 and 1 would be taken for constants
    example = [torch.cat([batches[0][key]] * 2)[:, :16].repeat(1, 2) for key in inputs]
    held = sum(one.numel() * one.element_size() for one in found.model.parameters())
    try:
        with _quiet_exporter():
            torch.onnx.export(
                Graph().eval(),
                tuple(example),
                str(file),
                input_names=list(inputs),
                output_names=list(names),
                dynamic_shapes=(tuple({0: examples, 1: tokens} for _ in inputs),),
                external_data=held > LARGEST,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch.export raises many kinds for what it cannot follow
        raise ArtifactError(f"torch cannot export {type(found.model).__name__} to ONNX: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what is said of optional packages, of shapes that are equal on purpose, and of newer names."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None), quiet_libraries():
            warnings.filterwarnings("ignore", "# The axis name")
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _quantise(file: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises to prepare the graph, which torch's exporter did
    try:
        quantize_dynamic(str(file), str(target), weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logger.setLevel(level)


def _pooling(found: Exportable) -> str:
    if found.saved is not None:
        return str(getattr(found.saved.run.task, "pooling", "none"))
    merged = found.folder / MERGED
    return str(parse_object(merged.read_bytes(), merged).get("pooling", "none")) if merged.is_file() else "none"
