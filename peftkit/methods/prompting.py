"""Prompting: nothing is trained; solved examples of train may stand in front of every input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from peftkit.disk import write_text
from peftkit.errors import NotMergeable
from peftkit.methods.base import Method

if TYPE_CHECKING:
    from torch import nn

    from peftkit.backbones.layouts import Layout
    from peftkit.backbones.load import Backbone
    from peftkit.backbones.quantization import Quantization
    from peftkit.tasks.base import Task

RECORD = "prompting.json"


class Prompting(Method):
    """The untouched backbone, told by its prompt what to do: the row that training must beat.

    The wording of the prompt is the task's; here is only how many solved examples it shows (Brown et al. 2020,
    section 2: zero-, one- and few-shot).
    """

    artifact: ClassVar[str] = "prompting"
    trains: ClassVar[bool] = False
    kind: Literal["prompting"] = "prompting"
    shots: Annotated[int, Field(ge=0)] = 0
    """Rows of train shown with their answers in front of every input, as many of each class as can be."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Which rows those are, and their order."""

    def attach(self, backbone: Backbone, total_steps: int) -> nn.Module:
        return backbone.model.requires_grad_(False)

    def conflicts(self, *, task: Task, dtype: str, quantization: Quantization | None, checkpointing: bool) -> list[str]:
        if "demonstrations" not in type(task).model_fields:
            return [
                f"method 'prompting' trains nothing, and task '{task.kind}' has a head that would stay random; "
                "use a task with a prompt, such as label_words"
            ]
        given = len(getattr(task, "demonstrations", ()))
        if self.shots and given not in (0, self.shots):
            return [f"method.shots is {self.shots} and task.demonstrations has {given}; leave one out"]
        return []

    def save(self, model: nn.Module, folder: Path) -> None:
        write_text(folder / RECORD, json.dumps({"trained_parameters": 0}) + "\n")

    def load(self, backbone: Backbone, folder: Path) -> nn.Module:
        return backbone.model.requires_grad_(False)

    def merge(self, model: nn.Module) -> nn.Module:
        raise NotMergeable(
            "prompting trains nothing, so there is nothing to merge; ship the backbone itself with the prompt, "
            "task.template and task.demonstrations in run.yaml: `peftkit bundle RUN OUT` makes one folder of both"
        )

    def added_parameters(self, model: nn.Module, layout: Layout) -> int:
        return 0
