"""peft's configuration classes: which there are, which of their fields a person sets, and what is wrong with those."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import MethodError
from peftkit.quiet import quiet_libraries
from peftkit.schema import did_you_mean

ELSEWHERE = {
    "adalora": "it follows a schedule, which kind: adalora keeps",
    "prompt_tuning": "use kind: prompt, which puts right what peft leaves to the caller",
    "p_tuning": "use kind: p_tuning, which puts right what peft leaves to the caller",
    "prefix_tuning": "use kind: prefix, which works with every cache and with gradient checkpointing",
    **dict.fromkeys(("poly", "multitask_prompt_tuning"), "it wants the number of a task with every batch"),
    "cpt": "its prompt is made of the token ids of labelled examples",
    "cartridge": "it starts from the keys and values of a text that it is given",
    "xlora": "it mixes adapters that were trained before",
    "shadow": "it runs a model of its own beside the backbone",
    "adaption_prompt": "it replaces whole attention modules of some decoders and saves no head",
}
"""Types that are refused, and why."""
OURS = {
    "peft_type": "say it with `type`",
    "target_modules": "say it with `targets`",
    **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"), "name the modules with `targets`"),
    "modules_to_save": "the task's head is trained and saved with every method",
    "fan_in_fan_out": "it follows from the modules",
    "boft_n_butterfly_factor": "it stays 1, to which peft sets it wherever its CUDA kernel cannot be compiled",
    "task_type": "it follows from the task",
    **dict.fromkeys(("base_model_name_or_path", "revision"), "say it with `backbone`"),
    **dict.fromkeys(("inference_mode", "auto_mapping", "peft_version"), "peft fills it in itself"),
}
"""Fields that are filled in from elsewhere. Those that choose among the targets would be ignored beside full names."""
INITIALIZATIONS = {
    **dict.fromkeys(("eva", "corda", "lora_ga"), "is computed from batches of data, which a method does not see"),
    "loftq": "quantises the backbone itself, and its files would not fit the untouched one",
    **dict.fromkeys(("pissa", "olora"), "rewrites the backbone; use kind: lora, whose `initialization` can save it"),
}
"""Values of `init_…` fields that are refused, and why."""


def config_class(kind: str) -> Any:
    """peft's configuration class for its name of a method, in small or large letters.

    Raises:
        MethodError: peft has none, with the name that was meant; or the method cannot be run this way.
    """
    with quiet_libraries():
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {str(name.value).lower(): one for name, one in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = kind.lower()
    if name in ELSEWHERE:
        raise MethodError(f"type '{kind}' cannot be run through kind: peft: {ELSEWHERE[name]}")
    if name not in known:
        raise MethodError(f"peft has no type '{kind}'{did_you_mean(name, known.keys() - ELSEWHERE.keys())}")
    return known[name]


def field_names(kind: str) -> set[str]:
    """What the configuration class of a type takes."""
    return {field.name for field in dataclasses.fields(config_class(kind)) if field.init}


def has_packed_layers(kind: str) -> bool:
    """Whether peft has layers of a type for what bitsandbytes packs; looked up on the disk, for peft is slow to import.

    peft puts layers of other types around packed ones too, and computes with the codes.
    """
    peft = importlib.util.find_spec("peft")
    return peft is not None and (Path(str(peft.origin)).parent / "tuners" / kind.lower() / "bnb.py").is_file()


def checked_fields(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a person gave, in the types of peft's class.

    Raises:
        MethodError: unknown, filled in from elsewhere, of another type, or an initialization that cannot be had.
    """
    known = field_names(kind) - OURS.keys()
    for name, value in given.items():
        if name in OURS:
            raise MethodError(f"{name} is not set by hand: {OURS[name]}")
        if name not in known:
            raise MethodError(f"{name}: type '{kind}' has no such field{did_you_mean(name, known)}")
        start = str(value).split("_niter_")[0]
        if name.startswith("init") and start in INITIALIZATIONS:
            raise MethodError(f"{name}: '{value}' {INITIALIZATIONS[start]}")
    hints = typing.get_type_hints(config_class(kind))
    return {name: _of_type(hints[name], name, value) for name, value in given.items()}


def _of_type(hint: Any, name: str, value: Any) -> Any:
    """The value as peft's annotation says, read as strictly as the rest of a configuration."""
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import to_json

    try:
        return TypeAdapter(hint).validate_json(to_json(value), strict=True)
    except ValidationError as error:
        wanted = dict.fromkeys(one["msg"].removeprefix("Input should be ") for one in error.errors())
        raise MethodError(f"{name} should be {' or '.join(wanted)}, got {value!r}") from None
