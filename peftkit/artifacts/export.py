"""A finished run, or a merged model, in the form that another runtime loads; read back before it is handed out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.artifacts.loading import SavedRun, in_full_precision, load_run
from peftkit.artifacts.plain_model import load_plain
from peftkit.backbones.load import BackboneSettings, Head, load_tokenizer
from peftkit.backbones.runs import is_run
from peftkit.errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

REPORT = "export.json"
TEXTS = (
    "The shares rose by two percent after the announcement.",
    "Once upon a time there was a little girl who lived near the sea.",
    "What is the capital of France?",
    "Not what I had hoped for: the story is thin, and the actors seem to know it.",
    "In 1997 the company moved from Boston to New York.",
)
"""What a model without data of its own is compared on."""


@dataclass(frozen=True)
class Exportable:
    """A plain model with its tokenizer, and the run that it comes from if there is one."""

    folder: Path
    model: nn.Module
    """In float32, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    head: Head
    saved: SavedRun | None


def opened(folder: Path) -> Exportable:
    """The merged model of a run, or the plain model in a folder.

    Raises:
        UsageError: neither is there.
        NotMergeable: the run's method has no merged form.
    """
    if is_run(folder):
        saved = load_run(folder)
        model = saved.run.method.merge(in_full_precision(saved))
        return Exportable(folder, model.eval().requires_grad_(False), saved.tokenizer, saved.head, saved)
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}; name a finished run or a merged model")
    model, head = load_plain(str(folder))
    return Exportable(
        folder, model.requires_grad_(False), load_tokenizer(BackboneSettings(name=str(folder))), head, None
    )
