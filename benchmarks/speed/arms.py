"""What is compared: the arms of each workload, and whose turn it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.speed.workloads import Workload

OFF = (
    "engine={fused_lora: false, padding_free: false, supervised_loss: false, read_positions: false, "
    "attention: sdpa, compiled_attention: false, fast_dropout: false, compiled_dropout: false}"
)
DTYPE = "backbone.dtype="
BASE = "Trainer + peft"
"""What all others are compared with."""
TUNED = "Trainer + peft, tuned"
FULL = "peftkit, full fine-tuning"


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    tool: Literal["peftkit", "trainer", "trl", "adapters"]
    method: str = "lora"
    overrides: tuple[str, ...] = ()
    """Of peftkit's configuration."""
    is_tuned: bool = False
    """By someone who knows: weights in bfloat16 under autocast, examples of similar length in a batch, the fastest
    attention, no gradient checkpointing."""


PEFTKIT = Arm("peftkit", "peftkit")


def arms_of(workload: Workload, held: str | None = None) -> list[Arm]:
    """The arms of a workload, in the order of the first round.

    Args:
        held: the dtype in which frozen weights were held where it was measured; default: here.
    """
    other = "float32" if (held or workload.held) == "bfloat16" else "bfloat16"
    arms = [
        Arm("Trainer, full fine-tuning", "trainer", "full"),
        Arm(BASE, "trainer"),
        Arm(TUNED, "trainer", is_tuned=True),
        PEFTKIT,
        Arm(f"peftkit, {other}", "peftkit", overrides=(f"{DTYPE}{other}",)),
        Arm("peftkit, micro-batches of 8", "peftkit", overrides=("training.micro_batch_size=8",)),
        Arm("peftkit, engine off", "peftkit", overrides=(OFF,)),
        Arm(f"peftkit, engine off, {other}", "peftkit", overrides=(OFF, f"{DTYPE}{other}")),
        Arm(FULL, "peftkit", "full"),
    ]
    if workload.is_causal:
        arms += [Arm("TRL SFTTrainer", "trl"), Arm("TRL SFTTrainer, tuned", "trl", is_tuned=True)]
    else:
        arms.append(Arm("adapters", "adapters"))
    for method in workload.methods:
        arms += [
            Arm(f"peftkit, {method}", "peftkit", method),
            Arm(f"peftkit, {method}, engine off", "peftkit", method, (OFF,)),
        ]
    return arms


def in_turn(arms: list[Arm], number: int) -> list[Arm]:
    """The order of round `number`: no arm is always behind the same other."""
    start = number % len(arms)
    return arms[start:] + arms[:start]
