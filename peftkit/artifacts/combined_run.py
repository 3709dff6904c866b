"""A run folder whose weights were computed from other runs instead of trained; every verb takes it as any other run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.lora_writer import lora_model
from peftkit.artifacts.low_rank import Change, dense
from peftkit.artifacts.manifest import FORMAT
from peftkit.artifacts.store import file_hashes, saved_parameters
from peftkit.artifacts.updates import Origin, plain_backbone
from peftkit.config import Run, run_id
from peftkit.config_file import to_yaml
from peftkit.disk import manifest_sha256, write_text
from peftkit.environment import versions
from peftkit.methods.base import Method
from peftkit.methods.full import Full
from peftkit.session import HEADER, MANIFEST, RUN_FILE

if TYPE_CHECKING:
    from torch import Tensor


def write_adapter(
    folder: Path, like: Origin, changes: Mapping[str, Change], heads: Mapping[str, Tensor], record: dict[str, Any]
) -> None:
    """A run of method `lora`, whose adapter makes these changes; peft loads it by itself.

    Args:
        folder: exists, and is empty.
        like: whose backbone, task and settings it has.
        record: how it came to be, for the manifest.
    """
    backbone = like.load_backbone()
    method, model = lora_model(backbone, changes, heads)
    artifact = folder / method.artifact
    artifact.mkdir()
    method.save(model, artifact)
    _seal(folder, like, like.run.model_copy(update={"method": method}), backbone.head_modules, record)


def write_model(
    folder: Path, like: Origin, changes: Mapping[str, Change], heads: Mapping[str, Tensor], record: dict[str, Any]
) -> None:
    """A run of method `full`: a plain transformers model in float32, each weight rounded once. Arguments as above."""
    backbone = plain_backbone(like)
    tokenizer: Any = backbone.tokenizer
    parameters = dict(backbone.model.named_parameters())
    for name, change in changes.items():
        parameters[name].data.copy_(parameters[name].data.double() + dense(change))
    for name, value in heads.items():
        parameters[name].data.copy_(value)
    method = Full()
    artifact = folder / method.artifact
    artifact.mkdir()
    method.save(backbone.model, artifact)
    tokenizer.save_pretrained(artifact)
    plain = like.run.backbone.model_copy(update={"dtype": "float32", "quantization": None})
    run = like.run.model_copy(update={"method": method, "backbone": plain})
    _seal(folder, like, run, like.trained_heads, record)


def _seal(folder: Path, like: Origin, run: Run, trained_heads: tuple[str, ...], record: dict[str, Any]) -> None:
    """Write configuration and manifest beside the weights."""
    identity = _identity(run, record)
    write_text(folder / RUN_FILE, f"{HEADER}{identity}\n{to_yaml(run.model_dump(mode='json'))}")
    method: Method = run.method
    manifest = {
        "format": FORMAT,
        "run_id": identity,
        "backbone": like.manifest["backbone"],
        "task": run.task.kind,
        "head": dataclasses.asdict(like.head),
        "trained_heads": list(trained_heads),
        "method": method.model_dump(mode="json"),
        "artifact": method.artifact,
        "scores": {},
        "combined": record,
        "notes": ["computed from other runs by `peftkit combine`; its scores are those that `peftkit evaluate` tells"],
        "versions": versions(),
        "saved_parameters": saved_parameters(folder / method.artifact),
        "files": file_hashes(folder, folder / method.artifact),
    }
    text = json.dumps(manifest | {"sha256": manifest_sha256(manifest)}, indent=2, ensure_ascii=False)
    write_text(folder / MANIFEST, f"{text}\n")


def _identity(run: Run, record: dict[str, Any]) -> str:
    """Sixteen hex digits: of the settings, and of what was combined in which way."""
    told = json.dumps([run_id(run), record], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
