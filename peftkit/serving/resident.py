"""One backbone in memory, and the models of any number of runs that share its weights."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.loading import SavedRun, load_run
from peftkit.artifacts.manifest import read_manifest
from peftkit.backbones.load import Head, load
from peftkit.backbones.runs import MANIFEST
from peftkit.disk import file_sha256
from peftkit.errors import UsageError
from peftkit.serving.mixing import Mixer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CAUSAL, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"


@dataclass(eq=False)
class Adapter:
    """A run by the name that requests call it by."""

    name: str
    folder: Path
    saved: SavedRun
    sha256: str
    """Of its manifest: whether the folder has changed since."""
    own_bytes: int
    """What its model holds that the backbone does not."""
    alone: str
    """Why no other adapter's texts can be in its batches; empty where they can."""
    layers: Mapping[str, Any] = field(default_factory=dict)
    """What it adds to the backbone's linear layers, by their names in the resident model."""
    tokenizing: threading.Lock = field(default_factory=threading.Lock)
    """A tokenizer of Rust may not be used by two threads at a time."""


class Resident:
    """The backbone that all adapters of a process share.

    Adapters are loaded like any run, with every check of that, one after the other; then what is equal byte for byte to
    a tensor of the backbone becomes that tensor, whatever its name. So memory holds the backbone once (twice while one
    more is loaded), for every method.
    """

    def __init__(self, folders: Mapping[str, Path], device: torch.device) -> None:
        manifests = {name: read_manifest(folder) for name, folder in folders.items()}
        self.device = device
        self.weights_sha256 = ""
        self._kept: dict[str, Tensor] = {}
        first = next(iter(folders))
        for name, manifest in manifests.items():
            self._check_same(name, folders[name], manifest, first, folders[first], manifests[first])
        heads = {name: Head.from_dict(manifest["head"]) for name, manifest in manifests.items()}
        writing = (name for name, head in heads.items() if head.model_class in (CAUSAL, SEQ2SEQ))
        chosen = next(writing, first)
        one = load_run(folders[chosen])
        self.weights_sha256 = one.backbone.weights_sha256
        self.backbone_name = one.backbone.name
        self.settings = one.run.backbone
        self.model = self._load_backbone(one.run.backbone, heads[chosen])
        self.mixer = Mixer(self.model)

    def _load_backbone(self, settings: Any, head: Head) -> nn.Module:
        """The backbone itself, with nothing of any run in it; what it holds is what others share."""
        loaded = load(settings, replace(head, new_tokens=()))
        model = loaded.model.eval().requires_grad_(False)
        self._share(model, keep=True)
        return model

    def adopt(self, name: str, folder: Path) -> Adapter:
        """Load a run, let it share the backbone's weights, and find out whether its texts can go with others'.

        Raises:
            UsageError: no finished run, or one over another backbone.
            ArtifactError: its files changed, or do not fit.
        """
        manifest = read_manifest(folder)
        if manifest["backbone"]["weights_sha256"] != self.weights_sha256:
            raise UsageError(_other_backbone(name, folder, manifest["backbone"]["name"], self.backbone_name))
        saved = load_run(folder)
        if _held(saved.run.backbone) != _held(self.settings):
            raise UsageError(
                f"{name} ({folder}) holds the backbone in {_held(saved.run.backbone)}, and the others in "
                f"{_held(self.settings)}; serve it by a process of its own"
            )
        own_bytes = self._share(saved.model, keep=False)
        layers, alone = self.mixer.examine(saved)
        return Adapter(name, folder, saved, file_sha256(folder / MANIFEST), own_bytes, alone, layers)

    def backbone_bytes(self) -> int:
        """What the shared tensors take."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def _share(self, model: nn.Module, keep: bool) -> int:
        """Put the kept tensor in the place of each equal one; returns the bytes of all others, which go to the device.

        Args:
            keep: the others are kept from now on.
        """
        own = 0
        done: set[int] = set()
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None or id(tensor) in done:
                    continue
                done.add(id(tensor))
                mark = _fingerprint(tensor)
                kept = self._kept.get(mark)
                if kept is None:
                    kept = tensor.data.to(self.device)
                    own += kept.nbytes
                    if keep:
                        self._kept[mark] = kept
                tensor.data = kept
        return own

    def _check_same(
        self, name: str, folder: Path, manifest: dict[str, Any], first: str, folder_of_first: Path, wanted: Any
    ) -> None:
        if manifest["backbone"]["weights_sha256"] != wanted["backbone"]["weights_sha256"]:
            expected = f"{wanted['backbone']['name']}, as {first} ({folder_of_first})"
            raise UsageError(_other_backbone(name, folder, manifest["backbone"]["name"], expected))


def _other_backbone(name: str, folder: Path, theirs: str, ours: str) -> str:
    return (
        f"{name} ({folder}) was trained on other weights ({theirs}) than those that are served ({ours}); one process "
        "holds one backbone: start another `peftkit serve` for it"
    )


def _held(settings: Any) -> str:
    packed = settings.quantization
    return str(settings.dtype) if packed is None else f"{settings.dtype}, quantised as {packed.model_dump(mode='json')}"


def _fingerprint(tensor: Tensor) -> str:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(flat.numpy().data).hexdigest()}"
