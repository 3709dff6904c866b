"""Fine-tuning methods. `AnyMethod` is the registry: add a class to the union and it is known everywhere."""

from typing import Annotated, get_args

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.full import Full
from peftkit.methods.lora import LoRA
from peftkit.methods.partial import HeadOnly

AnyMethod = Annotated[LoRA | Full | HeadOnly, Field(discriminator="kind")]
METHODS: dict[str, type[Method]] = {
    method.model_fields["kind"].default: method for method in get_args(get_args(AnyMethod)[0])
}

__all__ = ["METHODS", "AnyMethod", "Full", "HeadOnly", "LoRA"]
