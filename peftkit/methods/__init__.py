"""Fine-tuning methods. `AnyMethod` is the registry: add a class to the union and it is known everywhere."""

from typing import Annotated, get_args

from pydantic import Field

from peftkit.methods.adalora import AdaLoRA
from peftkit.methods.any_peft import Peft
from peftkit.methods.base import Method
from peftkit.methods.bottleneck import Bottleneck
from peftkit.methods.full import Full
from peftkit.methods.ia3 import IA3
from peftkit.methods.lora import LoRA
from peftkit.methods.partial import BitFit, HeadOnly, LayerNorm, TopLayers
from peftkit.methods.prefix import Prefix
from peftkit.methods.prompt import PromptTuning, PTuning
from peftkit.methods.prompting import Prompting
from peftkit.methods.vera import VeRA

AnyMethod = Annotated[
    LoRA
    | AdaLoRA
    | Full
    | HeadOnly
    | BitFit
    | LayerNorm
    | TopLayers
    | Bottleneck
    | IA3
    | PromptTuning
    | PTuning
    | VeRA
    | Prefix
    | Prompting
    | Peft,
    Field(discriminator="kind"),
]
METHODS: dict[str, type[Method]] = {
    method.model_fields["kind"].default: method for method in get_args(get_args(AnyMethod)[0])
}

__all__ = [
    "IA3",
    "METHODS",
    "AdaLoRA",
    "AnyMethod",
    "BitFit",
    "Bottleneck",
    "Full",
    "HeadOnly",
    "LayerNorm",
    "LoRA",
    "PTuning",
    "Peft",
    "Prefix",
    "PromptTuning",
    "Prompting",
    "TopLayers",
    "VeRA",
]
