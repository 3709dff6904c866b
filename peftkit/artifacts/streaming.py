"""A merge that reads one tensor, writes one tensor and holds no model: for models larger than memory.

What it writes is byte for byte what a merge in memory writes. One that was stopped goes on with the next file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.checkpoints import NAMES, Checkpoint, write_file
from peftkit.artifacts.hollow import Hollow, hollow
from peftkit.artifacts.layers import Layers
from peftkit.artifacts.loading import merge_backbone, original_settings
from peftkit.artifacts.rounding import rounded
from peftkit.artifacts.settings import BESIDE, MergeSettings
from peftkit.artifacts.vetting import vetted
from peftkit.backbones.load import BackboneSettings, Head, save_tokenizer
from peftkit.backbones.weight_files import INDEX, weight_files, weights_sha256
from peftkit.config import Run
from peftkit.disk import file_sha256, follow_umask, manifest_sha256, require_space, sync, write_text
from peftkit.environment import versions
from peftkit.errors import ArtifactError, NotMergeable, UsageError
from peftkit.quiet import quiet_libraries
from peftkit.tensor_files import BYTES, parse_object, read_header

if TYPE_CHECKING:
    from torch import Tensor, dtype

PROGRESS = "progress.json"


@dataclass
class Stream:
    """A run to be merged tensor by tensor."""

    folder: Path
    manifest: dict[str, Any]
    run: Run
    head: Head
    source: Hollow
    layers: Layers
    dtype: str

    @property
    def tokenizer(self) -> Any:
        """The backbone's, with what the run added."""
        return self.source.backbone.tokenizer


def opened(folder: Path, settings: MergeSettings) -> Stream:
    """The run, over a backbone without weights.

    Raises:
        NotMergeable: the method has no merged form, or none that is made layer by layer.
        ArtifactError: files changed, or the backbone's weights are others.
        UsageError: what is only done in memory.
    """
    manifest, run = vetted(folder)
    settings.check(run.backbone)
    for option, given in (
        ("--requantize packs", settings.onto == "requantized"),
        ("--quantize packs", settings.pack),
        ("--drop-layers shortens", settings.drop_layers),
    ):
        if given:
            raise UsageError(f"{option} a whole model, and a merge that is streamed holds none; leave it out")
    backbone = original_settings(run.backbone, manifest, original=settings.onto == "full-precision")
    merge_backbone(run.model_copy(update={"backbone": backbone}))
    head, artifact = Head.from_dict(manifest["head"]), folder / manifest["artifact"]
    source = hollow(backbone, head, _trained_names(run, artifact))
    found, wanted = weights_sha256(source.files), manifest["backbone"]["weights_sha256"]
    if found != wanted:
        raise ArtifactError(
            f"{run.backbone.name} is not the backbone that {folder} was trained on: its weights hash to {found[:12]}…, "
            f"not {wanted[:12]}…; restore those weights or set the same revision"
        )
    layers = _layers(run, source, artifact, backbone, settings)
    return Stream(folder, manifest, run, head, source, layers, settings.dtype_for(run.backbone))


def write(stream: Stream, target: Path, settings: MergeSettings) -> Path:
    """Write the merged model into a folder beside `target`, which is returned; what is there of the same merge stays.

    Raises:
        ArtifactError: no room on the disk, or a tensor that is no number.
    """
    import torch

    shapes, files, index = _plan(stream, settings)
    working = working_folder(target)
    key = _key(stream, settings)
    done = _done(working, key)
    sizes = (math.prod(shape) * BYTES[NAMES[str(kind).removeprefix("torch.")]] for kind, shape in shapes.values())
    require_space(working, sum(sizes) + BESIDE, "the merged model needs", "name a folder on another disk")
    working.mkdir(parents=True, exist_ok=True)
    cast = getattr(torch, stream.dtype)

    def made(name: str) -> Iterator[Tensor]:
        for piece in stream.layers.parts(stream.source.saved[name]):
            yield rounded(piece, cast)

    with torch.no_grad():
        for file, names in files.items():
            if file in done:
                continue
            partial = working / f".{file}.partial"
            write_file(partial, {name: shapes[name] for name in names}, made)
            sync(partial)
            partial.rename(working / file)
            done[file] = file_sha256(working / file)
            write_text(working / PROGRESS, json.dumps({"key": key, "done": done}))
    if index is not None:
        write_text(working / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    _write_rest(stream, working)
    follow_umask(working)
    return working


def working_folder(target: Path) -> Path:
    """Where what is finished of a merge lies until all of it is."""
    return target.with_name(f".{target.name}.streaming")


def finish(working: Path, target: Path) -> None:
    """Give what was written, and found right, its name."""
    (working / PROGRESS).unlink()
    for one in (*working.iterdir(), working):
        sync(one)
    working.rename(target)
    sync(target.parent)


def _trained_names(run: Run, artifact: Path) -> list[str]:
    """Parameters of the backbone that the run has values of its own for, by its names in the model."""
    from peftkit.methods.in_model import WEIGHTS, InModel

    return list(read_header(artifact / WEIGHTS)) if isinstance(run.method, InModel) else []


def _layers(run: Run, source: Hollow, artifact: Path, backbone: BackboneSettings, settings: MergeSettings) -> Layers:
    from peftkit.backbones.new_tokens import fold_backbone
    from peftkit.methods.from_peft import FromPeft
    from peftkit.methods.full import Full
    from peftkit.methods.partial import HeadOnly, Partial

    if isinstance(run.method, Full):
        # its own files are the model, new tokens and all
        source.checkpoint = Checkpoint(weight_files(artifact))
        source.sources, source.brought = {own: name for name, own in source.saved.items()}, set()
        fold_backbone(source.backbone)
        return Layers(
            source, source.backbone.model, backbone.model_copy(update={"dtype": "float32"}), settings.precision
        )
    if not isinstance(run.method, FromPeft | Partial | HeadOnly) or not _one_by_one(run.method):
        raise NotMergeable(_reason(run))
    return Layers(source, run.method.load(source.backbone, artifact), backbone, settings.precision)


def _one_by_one(method: Any) -> bool:
    """Whether merging a layer changes its own weights and nothing else; not so of all types that peft has."""
    return method.kind != "peft" or method.type.lower() == "lora"


def _reason(run: Run) -> str:
    """Why the method has no merged form, in its own words."""
    from torch import nn

    if run.method.kind != "peft":
        try:
            run.method.merge(nn.Module())
        except NotMergeable as error:
            return str(error)
    kind = getattr(run.method, "type", run.method.kind)
    return f"--streaming: method '{kind}' is merged in memory alone; leave it out"


def _plan(
    stream: Stream, settings: MergeSettings
) -> tuple[dict[str, tuple[dtype, tuple[int, ...]]], dict[str, list[str]], dict[str, Any] | None]:
    """Types and shapes by name, the names in each file, and the index of several files, as transformers has them."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    cast = getattr(torch, stream.dtype)
    shapes = {
        name: (cast if kind.is_floating_point else kind, shape) for name, (kind, shape) in stream.source.shapes.items()
    }
    state = {name: torch.empty(shape, dtype=kind, device="meta") for name, (kind, shape) in shapes.items()}
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=settings.shard_bytes
    )
    total = sum(math.prod(shape) for name, (_, shape) in shapes.items() if name not in stream.source.buffers)
    index = {"metadata": {"total_parameters": total, **split.metadata}, "weight_map": split.tensor_to_filename}
    return shapes, split.filename_to_tensors, index if split.is_sharded else None


def _key(stream: Stream, settings: MergeSettings) -> str:
    """What a merge must have in common with one that was stopped to go on with its files."""
    return manifest_sha256(
        {
            "run": stream.manifest,
            "settings": asdict(settings) | {"dtype": stream.dtype},
            "versions": versions(),
        }
    )


def _done(working: Path, key: str) -> dict[str, str]:
    """Files that an earlier call finished, with their hashes; whatever else is there goes."""
    file = working / PROGRESS
    if file.is_file():
        found = parse_object(file.read_bytes(), file)
        if found.get("key") == key:
            kept = {n: h for n, h in found["done"].items() if (working / n).is_file() and file_sha256(working / n) == h}
            for one in working.iterdir():
                if one.name not in {*kept, PROGRESS}:
                    one.unlink()
            return kept
    shutil.rmtree(working, ignore_errors=True)
    return {}


def _write_rest(stream: Stream, folder: Path) -> None:
    """Everything that lies beside the weights, as transformers writes it."""
    import torch

    model: Any = stream.source.backbone.model
    model.config.dtype, model.config.architectures = getattr(torch, stream.dtype), [type(model).__name__]
    with quiet_libraries():
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        save_tokenizer(stream.tokenizer, folder)
