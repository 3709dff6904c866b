"""A Llama as GGUF, read back by transformers and asked for the same texts before it is handed out."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftkit.artifacts.export import REPORT, TEXTS, opened
from peftkit.artifacts.gguf_writer import Precision, check_model, write
from peftkit.artifacts.target import check_new_folder
from peftkit.backbones.gguf import load_gguf_model, load_gguf_tokenizer
from peftkit.disk import whole_folder, write_text
from peftkit.errors import ArtifactError
from peftkit.quiet import quiet_libraries

FILE = "model.gguf"
NEW_TOKENS = 24
"""Tokens that each prompt is continued by."""
BATCH = 10
"""Prompts that are continued at once."""


@dataclass(frozen=True)
class GgufReport:
    """The file beside the merged model."""

    format: str
    precision: Precision
    bytes: int
    tensors: int
    largest_difference: float
    """Largest |ΔW| of what was read back; 0 in float32."""
    prompts: int
    equal_texts: int
    """Prompts that both continue alike, taking the likeliest token each time."""
    texts: tuple[tuple[str, str], ...]
    """(prompt, what the file's model makes of it)."""


def export_gguf(
    source: Path, target: Path, prompts: Sequence[str] | None = None, precision: Precision = "float32"
) -> GgufReport:
    """Write, read back, compare; nothing is left unless it is the same model.

    In float32 every weight must be read back bit for bit and every prompt be continued alike; in float16 every matrix
    as its float16 rounding, and how many prompts are continued alike is told.

    Args:
        source: a finished run of a Llama, or a folder with a merged one.

    Raises:
        UsageError: no Llama, or a tokenizer that GGUF has no name for.
        ArtifactError: what was read back is something else.
    """
    check_new_folder(target, [source], "an export")
    found = opened(source)
    check_model(found.model, str(source))
    asked = tuple(prompts or TEXTS)
    with whole_folder(target) as partial:
        write(found.model, found.tokenizer, partial / FILE, precision)
        # transformers draws its conversion bar with tqdm itself, which only a redirected stderr silences
        with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):
            reread = load_gguf_model(partial / FILE).eval()
            tokenizer = load_gguf_tokenizer(partial / FILE, found.tokenizer.model_max_length)
        difference = _compared(found.model, reread, precision)
        _refuse_other_tokens(found.tokenizer, tokenizer, asked)
        expected, texts = _continued(found.model, found.tokenizer, asked), _continued(reread, tokenizer, asked)
        report = GgufReport(
            format="gguf",
            precision=precision,
            bytes=(partial / FILE).stat().st_size,
            tensors=len(list(found.model.parameters())),
            largest_difference=difference,
            prompts=len(asked),
            equal_texts=sum(one == other for one, other in zip(expected, texts, strict=True)),
            texts=tuple(zip(asked, texts, strict=True)),
        )
        if precision == "float32" and report.equal_texts < report.prompts:
            raise ArtifactError(
                f"the GGUF file continues only {report.equal_texts} of {report.prompts} prompts as the merged model "
                "does; nothing was written"
            )
        write_text(partial / REPORT, json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    return report


def _compared(model: Any, reread: Any, precision: Precision) -> float:
    """The largest difference of a weight; refused where one is not what was written."""
    import torch

    largest, found = 0.0, dict(reread.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = parameter.detach().float()
        written = wanted.half().float() if precision == "float16" and wanted.ndim > 1 else wanted
        if name not in found or not torch.equal(found[name].float(), written):
            raise ArtifactError(f"'{name}' was read back from GGUF with other values; nothing was written")
        largest = max(largest, float((written - wanted).abs().max()))
    return largest


def _refuse_other_tokens(ours: Any, theirs: Any, texts: Sequence[str]) -> None:
    """Refuse a file whose tokenizer reads texts otherwise."""
    for text in texts:
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            raise ArtifactError(
                f"the tokenizer that was read back from GGUF makes other tokens of {text[:60]!r}; nothing was written: "
                "ship the merged model"
            )
    for name in ("bos_token_id", "eos_token_id", "chat_template"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ArtifactError(f"the tokenizer was read back from GGUF with another {name}; nothing was written")


def _continued(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The continuation of each prompt, greedily; batches are filled up on the left."""
    return [
        text for start in range(0, len(prompts), BATCH) for text in _batch(model, tokenizer, prompts[start:][:BATCH])
    ]


def _batch(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    import torch

    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[fill] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    how = {"do_sample": False, "use_cache": True, "max_new_tokens": NEW_TOKENS, "pad_token_id": fill}
    with torch.no_grad(), quiet_libraries():
        made = model.generate(ids, attention_mask=mask, **how)
    return [tokenizer.decode(row[longest:], skip_special_tokens=True) for row in made]
