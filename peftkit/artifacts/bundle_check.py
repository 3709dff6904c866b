"""What a process of its own makes of a bundle: `python -m peftkit.artifacts.bundle_check BUNDLE FOLDER`.

It reads rows from FOLDER, and leaves there the token ids that the bundle makes of them, and its logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.inference import in_precision
from peftkit.artifacts.loading import SavedRun, load_run
from peftkit.data.collate import collate
from peftkit.data.rows import Rows
from peftkit.errors import ArtifactError, PeftkitError
from peftkit.prepare import Split, encode_split
from peftkit.tasks.language_model import LanguageModel

if TYPE_CHECKING:
    from torch import Tensor

ROWS, EXAMPLES, LOGITS = "rows.json", "examples.json", "logits.safetensors"
MOST_LOGITS = 2**24
"""Numbers that are compared; 64 MiB."""


def main(folder: Path, work: Path) -> None:
    """Load, tokenize, compute, write."""
    from safetensors.torch import save_file

    asked = json.loads((work / ROWS).read_text(encoding="utf-8"))
    saved = load_run(folder)
    split = encoded(saved, Rows(asked["source"], asked["records"], range(1, len(asked["records"]) + 1)))
    (work / EXAMPLES).write_text(json.dumps(list(split.encoded.examples)), encoding="utf-8")
    save_file({"logits": compared_logits(saved, split)}, work / LOGITS)


def encoded(saved: SavedRun, rows: Rows) -> Split:
    """The rows as the model reads them; a language model is compared where it is scored, so its rows need answers."""
    supervised = isinstance(saved.run.task, LanguageModel)
    return encode_split(saved.run, rows.source, rows, saved.head, saved.tokenizer, supervised)


def compared_logits(saved: SavedRun, split: Split) -> Tensor:
    """The logits of example after example, in one row: as many as may be held."""
    import torch

    task, device = saved.run.task, next(saved.model.parameters()).device
    found: list[Tensor] = []
    held = 0
    with torch.no_grad(), in_precision(saved.run, device):
        for example in split.encoded.examples:
            batch: dict[str, Any] = collate([example], split.pad_id, device)
            if isinstance(task, LanguageModel):
                logits = task.supervised_logits(saved.model, batch)[0]
            else:
                logits = task.logits(saved.model, batch)
            found.append(logits.float().cpu().flatten())
            held += found[-1].numel()
            if held >= MOST_LOGITS:
                break
    if not held:
        raise ArtifactError("nothing to compare the bundle on: no row has a token that is predicted; give others")
    return torch.cat(found)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except PeftkitError as error:
        sys.exit(f"error: {error}")
