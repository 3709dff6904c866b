"""What holds for every method on every architecture, checked in one pass over one cell of the grid."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import Place, backbone_of, evaluated, loss_of, on_meta
from contract_variants import Variant
from safetensors import safe_open
from torch import Tensor, nn

from peftkit.artifacts.vetting import check_artifact
from peftkit.backbones.layouts import block_modules, layout_for
from peftkit.backbones.modules import head_modules
from peftkit.backbones.quantize import dequantize
from peftkit.data.sources import DataSettings
from peftkit.errors import BackboneError, MethodError, NotMergeable
from peftkit.methods.base import Method, module_parameters, trained_parameters
from peftkit.tasks.sequence_classification import SequenceClassification

SEED, HEAD_SEED = 0, 1
FREE_BYTES = 64 * 1024
TASK = SequenceClassification(data=DataSettings(name="none"))


class Reloader:
    """Another Python process that loads what was saved here."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("contract_reload.py")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=pipe, stdout=pipe, text=True)

    def logits(self, variant: Variant, place: Place, checkpoint: Path, folder: Path) -> Tensor:
        """What the saved adapter computes over the untouched checkpoint."""
        assert self.process.stdin
        assert self.process.stdout
        packed = place.quantization and place.quantization.model_dump()
        request = {"method": variant.settings, "model_class": place.model_class, "quantization": packed}
        print(json.dumps(request | {"checkpoint": str(checkpoint), "folder": str(folder)}), file=self.process.stdin)
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert "error" not in found, f"reload in another process: {found['error']}"
        return torch.tensor(found["logits"])

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)


@dataclass(frozen=True)
class Counts:
    """Parameters of a method on a model."""

    added: int
    stored: int
    tuned: int
    head: int


def attached(variant: Variant, place: Place, checkpoint: Path) -> nn.Module | str:
    """The model to train, with as many parameters as were counted from shapes alone; or why there is none."""
    backbone = backbone_of(checkpoint, place.model_class, HEAD_SEED, place.quantization)
    torch.manual_seed(SEED)
    try:
        counts = counted(variant, place)
        model = variant.method.attach(backbone, variant.steps)
    except (MethodError, BackboneError) as error:
        assert "fault of peftkit" not in str(error), str(error)
        return str(error)
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    expected = counts.added + counts.tuned + counts.head
    assert trained == expected, f"{trained} parameters train, not {expected}"
    return model


@functools.cache
def counted(variant: Variant, place: Place) -> Counts:
    """The closed forms, from shapes alone."""
    return counts_of(variant.method, on_meta(place))


def counts_of(method: Method, model: Any) -> Counts:
    """The closed forms on a model, which may be on the meta device."""
    layout, heads = layout_for(model.config.model_type, model), head_modules(model)
    return Counts(
        added=method.added_parameters(model, layout),
        stored=method.stored_parameters(model, layout),
        tuned=method.tuned_parameters(model, heads),
        head=module_parameters(model, heads),
    )


def check_cell(
    variant: Variant, place: Place, checkpoint: Path, folder: Path, reloader: Reloader, model: nn.Module
) -> tuple[str, str]:
    """The whole contract of a freshly attached `model`; `folder` does not exist yet and takes what is saved.

    Returns:
        Why it has no merged form, and why no gradient checkpointing; both empty where it has.
    """
    cell = _Cell(variant, place, checkpoint)
    cell.check_start(model)
    cell.check_what_trains(model)
    cell.check_training(model)
    checkpointing = cell.check_same_seed(model)
    cell.check_saved(model, folder)
    cell.check_reload(model, folder, reloader)
    if place.quantization is not None:
        return cell.check_merge_in_full_precision(model, folder), checkpointing
    return cell.check_merge(model), checkpointing


class _Cell:
    def __init__(self, variant: Variant, place: Place, checkpoint: Path) -> None:
        self.variant, self.method, self.place, self.checkpoint = variant, variant.method, place, checkpoint
        self.plain = backbone_of(checkpoint, place.model_class, HEAD_SEED, place.quantization)
        self.untouched = self.logits(self.plain.model)
        self.keys = list(self.plain.model.state_dict())
        self.counts = counts_of(self.method, self.plain.model)

    def logits(self, model: nn.Module) -> Tensor:
        return evaluated(model, self.place.model_class)

    def check_start(self, model: nn.Module) -> None:
        """The function before the first step is what the paper says."""
        found, start = self.logits(model), self.variant.start
        assert found.isfinite().all()
        if start == "same":
            assert torch.equal(found, self.untouched), f"starts {difference(found, self.untouched):.2g} away"
        elif start == "rounded":
            assert close(found, self.untouched, 1e-5), f"starts {difference(found, self.untouched):.2g} away"
        else:
            assert not close(found, self.untouched, 1e-3), "does nothing to the model before it is trained"

    def check_what_trains(self, model: nn.Module) -> None:
        """What trains is what the method names and the head, as many as its closed form says."""
        assert self.counts == counted(self.variant, self.place), "counted otherwise on meta"
        trained = trained_parameters(model)
        own = [name for name in trained if not is_of(name, self.plain.head_modules)]
        strangers = [name for name in own if not re.search(self.variant.trained, name)]
        assert not strangers, f"trains {strangers[:3]}"
        if self.variant.places:
            places = {re.split(self.variant.trained, name)[0] for name in own}
            assert len(places) == self.variant.places(self.plain.model)

    def check_training(self, model: nn.Module) -> None:
        """All that trains gets gradients and moves; nothing else moves by a bit."""
        before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
        started = self.logits(model)
        self.train(model)
        after = tensors_of(model)
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        expected = set(trained_parameters(model))
        odd = [name for name in sorted(changed ^ expected) if not re.search(self.variant.may_stay, name)]
        assert not odd, f"moved and does not train, or trains and stayed: {odd[:4]}"
        assert not torch.equal(self.logits(model), started)

    def train(self, model: nn.Module) -> None:
        """As the training loop does it: penalty, gradients, step, `after_step`."""
        trained = trained_parameters(model)
        groups = [{"params": [p], "lr": 0.02 * self.method.learning_rate_factor(n)} for n, p in trained.items()]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
        model.train()
        for step in range(1, self.variant.steps + 1):
            self.gradients(model)
            if step == 1:
                with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
                odd = sorted(with_gradient ^ trained.keys())
                assert not odd, f"has a gradient and does not train, or trains without one: {odd[:4]}"
            optimizer.step()
            self.method.after_step(model, step)
            optimizer.zero_grad()
        self.method.finish(model, None)

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        loss = loss_of(model, self.place.model_class)
        penalty = self.method.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        return {name: p.grad.clone() for name, p in trained_parameters(model).items() if p.grad is not None}

    def check_same_seed(self, model: nn.Module) -> str:
        """Another model trained from the same seed is the same; its gradients are those with checkpointing."""
        twin = attached(self.variant, self.place, self.checkpoint)
        assert not isinstance(twin, str)
        self.train(twin)
        ours, theirs = tensors_of(model), tensors_of(twin)
        differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not differing, f"differs from the same seed: {differing[:3]}"
        return self.check_checkpointing(twin)

    def check_checkpointing(self, model: nn.Module) -> str:
        """Activations computed twice give the same gradients as those that were kept."""
        plain: Any = self.plain.model
        if not plain.supports_gradient_checkpointing:
            return "transformers does not have it for this architecture"
        conflicts = self.method.conflicts(task=TASK, dtype="float32", quantization=None, checkpointing=True)
        if conflicts:
            return "; ".join(conflicts)
        kept = self.gradients(model.train())
        model.zero_grad()
        # its name from transformers 5.23 on, and before
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        calls: list[None] = []
        for block in block_modules(model, layout_for(self.place.architecture)).values():
            for part in block.modules():  # from transformers 5.23 on hooks of the block itself stay outside
                part.register_forward_pre_hook(lambda *_: calls.append(None))
        loss_of(model, self.place.model_class)
        once = len(calls)
        recomputed = self.gradients(model)
        assert len(calls) > 2 * once, "nothing was computed again"
        for name, gradient in kept.items():
            assert close(recomputed[name], gradient, 1e-6), f"gradient of {name}"
        return ""

    def check_saved(self, model: nn.Module, folder: Path) -> None:
        """The files hold what is counted and little else. The head is moved first, so that its saving shows."""
        for name, parameter in trained_parameters(model).items():
            if is_of(name, self.plain.head_modules):
                parameter.data += 0.1
        folder.mkdir(parents=True)
        self.method.save(model, folder)
        files = [file for file in folder.rglob("*") if file.is_file()]
        check_artifact(folder, self.method)  # what was saved here is not taken for a stranger's
        sizes = list(saved_sizes(files))
        found, expected = sum(count for count, _ in sizes), self.expected_in_file(model)
        assert found == expected, f"the files hold {found} numbers, not {expected}"
        allowed = 1.02 * sum(size for _, size in sizes) + FREE_BYTES
        assert sum(file.stat().st_size for file in files) <= allowed, "the files hold more than what was trained"

    def expected_in_file(self, model: nn.Module) -> int:
        """Numbers that were counted beforehand; what training decides is told by `figures`, within bounds."""
        least, most = self.method.stored_bounds(self.plain.model, self.plain.layout)
        added = int(self.method.figures(model).get("stored_parameters", self.counts.stored))
        assert least <= added <= most
        if self.variant.kind == "full":  # a whole model has its buffers too
            added += sum(tensor.numel() for name, tensor in model.named_buffers() if name in self.keys)
        return added + self.counts.tuned + self.counts.head

    def check_reload(self, model: nn.Module, folder: Path, reloader: Reloader) -> None:
        """Another process gets the same logits from the files."""
        ours = self.logits(model)
        theirs = reloader.logits(self.variant, self.place, self.checkpoint, folder)
        tolerance = 1e-5 if self.variant.rewrites_base else 1e-6
        assert close(theirs, ours, tolerance), f"reloaded, it computes {difference(theirs, ours):.2g} else"

    def check_merge(self, model: nn.Module) -> str:
        """The merged model is a plain one of the same function, or there is a reason why there is none."""
        ours = self.logits(model)
        try:
            merged = self.method.merge(model)
        except NotMergeable as error:
            assert len(str(error)) > 20, "gives no reason"
            return str(error)
        assert list(merged.state_dict()) == self.keys
        assert type(merged) is type(self.plain.model)
        theirs = self.logits(merged)
        assert close(theirs, ours, 1e-5), f"merged, it computes {difference(theirs, ours):.2g} else"
        return ""

    def check_merge_in_full_precision(self, model: nn.Module, folder: Path) -> str:
        """The same over plain layers with the values of the quantised ones, which is how quantised runs are merged."""
        quantised, self.plain = self.logits(model), backbone_of(self.checkpoint, self.place.model_class, HEAD_SEED)
        self.keys = list(self.plain.model.state_dict())
        whole = backbone_of(self.checkpoint, self.place.model_class, HEAD_SEED, self.place.quantization)
        dequantize(whole.model)
        loaded = self.method.load(whole, folder)
        assert close(self.logits(loaded), quantised, 1e-5), "computes something else over the same values"
        return self.check_merge(loaded)


def is_of(name: str, heads: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to the head, where peft wrapped it too."""
    plain = re.sub(r"^base_model\.(model\.)?|\.modules_to_save\.default", "", name)
    return any(plain.startswith(f"{head}.") for head in heads)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; packed codes as the bytes they are, for seen as floating point some are no numbers."""
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.data.view(torch.uint8) if hasattr(t, "quant_state") else t.detach() for name, t in found}


def saved_sizes(files: list[Path]) -> Iterator[tuple[int, int]]:
    """(numbers, bytes) of every tensor in safetensors files."""
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as saved:
                for name in saved.keys():  # noqa: SIM118
                    tensor = saved.get_tensor(name)
                    yield tensor.numel(), tensor.nbytes


def difference(one: Tensor, two: Tensor) -> float:
    """Largest |Δ| over max(1, largest)."""
    return float((one - two).abs().max()) / max(1.0, float(two.abs().max()))


def close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    """Equal up to `tolerance` of the largest, or of 1."""
    return one.shape == two.shape and difference(one, two) <= tolerance
