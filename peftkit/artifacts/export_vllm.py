"""A run's adapter as vLLM takes it: within what vLLM documents, read back and compared, with the command that loads it.

vLLM's limits are those of its `PEFTHelper` and `LoRAConfig` (0.11): one rank and one scale for all modules, no DoRA, no
bias, no module saved whole, ranks up to 512, and linear layers of the architectures in its table of models with LoRA.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.artifacts.export import REPORT
from peftkit.artifacts.loading import load_run
from peftkit.artifacts.lora_writer import lora_model
from peftkit.artifacts.low_rank import Change, LowRank
from peftkit.artifacts.reread import compared
from peftkit.artifacts.target import check_new_folder
from peftkit.artifacts.updates import Update, update_of
from peftkit.disk import whole_folder, write_text
from peftkit.errors import UsageError
from peftkit.methods.peft_files import CONFIG, WEIGHTS
from peftkit.tensor_files import parse_object, read_tensors

if TYPE_CHECKING:
    from torch import nn

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` can be."""
ARCHITECTURES = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "opt"}
)
"""By transformers' names, those of vLLM's table of models with LoRA that peftkit knows."""


@dataclass(frozen=True)
class VllmReport:
    """The adapter as it was written."""

    format: str
    rank: int
    """Of all modules; smaller ones are filled up with zeros."""
    modules: int
    max_lora_rank: int
    """The least that vLLM must be started with."""
    base: str
    truncation: float
    """‖ΔW − what was read back‖ / ‖ΔW‖."""
    rounding: float

    @property
    def command(self) -> str:
        """How vLLM serves it."""
        return f"vllm serve {self.base} --enable-lora --max-lora-rank {self.max_lora_rank} --lora-modules NAME=OUT"


def export_vllm(source: Path, target: Path) -> VllmReport:
    """Write the adapter of a run of a causal language model.

    Raises:
        UsageError: names every limit of vLLM that it is beyond, with the way around.
        ArtifactError: what was read back is something else.
    """
    check_new_folder(target, [source], "an export")
    update = update_of(load_run(source))
    backbone = update.origin.load_backbone()
    config: Any = backbone.model.config
    if problems := _problems(update, config.model_type):
        raise UsageError(f"{source}: vLLM does not take this adapter: {'; '.join(problems)}")
    rank = max(change.rank for change in update.changes.values())
    even = {name: _filled(change, rank) for name, change in update.changes.items()}
    with whole_folder(target) as partial:
        method, model = lora_model(backbone, even, {})
        method.save(model, partial)
        _name_briefly(partial / CONFIG, list(even), backbone.model)
        found = compared(update.changes, even, _reread(partial), {})
        report = VllmReport(
            format="vllm",
            rank=rank,
            modules=len(even),
            max_lora_rank=next(one for one in RANKS if one >= rank),
            base=str(update.origin.manifest["backbone"]["folder"] or update.origin.run.backbone.name),
            truncation=found["truncation"],
            rounding=found["rounding"],
        )
        write_text(partial / REPORT, json.dumps(asdict(report) | {"command": report.command}, indent=2) + "\n")
    return report


def _problems(update: Update, model_type: str) -> list[str]:
    """Every limit that the run is beyond."""
    origin, found = update.origin, []
    if origin.head.model_class != "AutoModelForCausalLM":
        found.append("it serves LoRA of language models; `peftkit serve` serves classifiers")
    elif model_type not in ARCHITECTURES:
        found.append(f"its table of models with LoRA does not list '{model_type}'; merge the run")
    if update.heads:
        found.append(f"modules that are saved whole ({', '.join(origin.trained_heads)}); merge the run")
    dense = [name for name, change in update.changes.items() if not isinstance(change, LowRank)]
    if biases := [name for name in dense if name.endswith(".bias")]:
        found.append(f"trained biases ('{biases[0]}'); merge the run")
    if len(dense) > len(biases):
        found.append(
            f"a change of full rank (method '{origin.run.method.kind}'); merge the run, or make a LoRA of it with "
            "`peftkit combine RUN --weights 1 --rank R OUT`"
        )
    products = {name: change for name, change in update.changes.items() if isinstance(change, LowRank)}
    if embeddings := [name for name, change in products.items() if "embed" in name]:
        found.append(
            f"an adapter on embeddings ('{embeddings[0]}'); leave them out of method.targets, or merge the run"
        )
    if over := [name for name, change in products.items() if change.rank > RANKS[-1]]:
        found.append(
            f"rank {products[over[0]].rank} of '{over[0]}', where {RANKS[-1]} is the most; lower it with "
            "`peftkit combine RUN --weights 1 --rank 512 OUT`"
        )
    if not update.changes:
        found.append("it changes nothing of the backbone")
    return found


def _filled(change: LowRank, rank: int) -> LowRank:
    """The same product with zeros up to this rank."""
    more = rank - change.rank
    b = change.b.new_zeros(change.b.shape[0], more)
    a = change.a.new_zeros(more, change.a.shape[1])
    return dataclasses.replace(change, b=_beside(change.b, b, 1), a=_beside(change.a, a, 0))


def _beside(one: Any, other: Any, side: int) -> Any:
    import torch

    return torch.cat([one, other], dim=side)


def _name_briefly(file: Path, names: list[str], model: nn.Module) -> None:
    """Name targets by their last part, as vLLM's own examples do, where that names no others."""
    adapted = {name.removesuffix(".weight") for name in names}
    last = {name.rpartition(".")[2] for name in adapted}
    if {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last} == adapted:
        config = parse_object(file.read_bytes(), file)
        write_text(file, json.dumps(config | {"target_modules": sorted(last)}, indent=2, sort_keys=True))


def _reread(folder: Path) -> dict[str, Change]:
    """What the files say, as vLLM reads them: one scale, alpha / r."""
    config = parse_object((folder / CONFIG).read_bytes(), folder / CONFIG)
    tensors = {name.removeprefix("base_model.model."): one for name, one in read_tensors(folder / WEIGHTS).items()}
    scale = config["lora_alpha"] / config["r"]
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        f"{name}.weight": LowRank(
            tensors[f"{name}.lora_B.weight"].double() * scale, tensors[f"{name}.lora_A.weight"].double()
        )
        for name in modules
    }
