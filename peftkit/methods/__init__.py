"""Fine-tuning methods. `AnyMethod` is the registry: add a class to the union and it is known everywhere."""

from typing import Annotated

from pydantic import Field

from peftkit.methods.full import Full
from peftkit.methods.lora import LoRA
from peftkit.methods.partial import HeadOnly

AnyMethod = Annotated[LoRA | Full | HeadOnly, Field(discriminator="kind")]

__all__ = ["AnyMethod", "Full", "HeadOnly", "LoRA"]
