"""Files of a run that somebody else may have made, looked at before anything of them is loaded.

A manifest proves that files belong together, not that they mean well: whoever makes a run folder makes its manifest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from peftkit.artifacts.manifest import check_files, read_manifest, read_saved_config
from peftkit.config import Run
from peftkit.errors import ArtifactError
from peftkit.methods.base import Method
from peftkit.methods.peft_files import CONFIG, WEIGHTS
from peftkit.tensor_files import parse_object, plain_size, read_header

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
MOST_CONFIG = 2**19
"""Bytes of an adapter's configuration."""
MOST_RANK = 2**16
MOST_NAMES = 2**16
PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
"""A module's name, which peft takes for a regular expression where it stands in a pattern."""
EMPTY = (
    *("auto_mapping", "layer_replication", "layers_to_transform", "layers_pattern", "exclude_modules"),
    *("megatron_config", "target_parameters", "trainable_token_indices"),
)
"""Fields of peft's that import, repeat or choose modules; peftkit writes none of them."""
SIZES = ("r", "rank", "num_virtual_tokens", "oft_block_size", "n_frequency", "init_r", "target_r")


def vetted(folder: Path) -> tuple[dict[str, Any], Run]:
    """Manifest and configuration of a finished run whose files are those that were written, and nothing but weights.

    Raises:
        UsageError: `folder` is not a finished run.
        ArtifactError: files changed since they were written, or could be something else than a saved run.
    """
    manifest = read_manifest(folder)
    check_names(folder, manifest)
    check_files(folder, manifest)
    run = read_saved_config(folder)
    method = run.method
    if manifest["artifact"] != method.artifact:
        raise ArtifactError(f"{folder}: its manifest names another sub-folder than method '{method.kind}' writes")
    if method.trains:
        check_artifact(folder / method.artifact, method)
    return manifest, run


def check_names(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest that names files outside of its folder, or what is no plain file.

    Raises:
        ArtifactError: names the file.
    """
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ArtifactError(f"{folder}: its manifest lists no files; restore it")
    for name in files:
        path = PurePosixPath(str(name))
        if "\0" in str(name):
            raise ArtifactError(f"{folder}: its manifest names {_short(name)}, which is no file's name")
        if path.is_absolute() or ".." in path.parts or "\\" in str(name) or not path.parts:
            raise ArtifactError(f"{folder}: its manifest names '{name}', which is outside of the folder")
        for length in range(1, len(path.parts)):
            if folder.joinpath(*path.parts[:length]).is_symlink():
                raise ArtifactError(f"{folder.joinpath(*path.parts[:length])} is a link; put the folder itself there")
        plain_size(folder / name)


def check_artifact(folder: Path, method: Method) -> None:
    """Refuse a saved method whose files could do or be something else than weights and what they mean.

    Args:
        folder: the sub-folder of a run that `method.save` wrote to.

    Raises:
        ArtifactError: names the file, and what is wrong with it.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(f"{folder} is {'a link' if folder.is_symlink() else 'no folder'}; the run is not whole")
    largest = 0
    for entry in sorted(folder.iterdir()):
        if entry.suffix in PICKLES:
            raise ArtifactError(
                f"{entry} may be a pickle, which can run code when it is read; remove it, or convert it to safetensors "
                "where that does no harm"
            )
        plain_size(entry)
        if entry.suffix == ".safetensors":
            largest = max([largest, *(side for one in read_header(entry).values() for side in one.shape)])
    if (folder / CONFIG).exists():
        if not (folder / WEIGHTS).exists():
            raise ArtifactError(f"{folder / WEIGHTS} is missing; restore it, or train again")
        _check_config(folder / CONFIG, method, largest)


def _check_config(file: Path, method: Method, largest: int) -> None:
    """`largest` is the longest side of a saved tensor: peft makes room for a rank before it looks at them."""
    if plain_size(file) > MOST_CONFIG:
        raise ArtifactError(f"{file} is larger than {MOST_CONFIG:,} bytes; it is no adapter's configuration")
    config = parse_object(file.read_bytes(), file)
    for problem in _problems(config, method):
        raise ArtifactError(f"{file}: {problem}")
    ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()] if peft_type(method) == "LORA" else []
    if ranks and max(ranks) > largest:
        raise ArtifactError(f"{file}: a rank of {max(ranks)}, where no saved tensor has a side longer than {largest}")


def _problems(config: dict[str, Any], method: Method) -> Iterator[str]:
    expected = peft_type(method)
    if config.get("peft_type") != expected:
        yield f"peft_type is {_short(config.get('peft_type'))}, and method '{method.kind}' is saved as {expected}"
    for name in EMPTY:
        if config.get(name):
            yield f"{name} is {_short(config[name])}, which peftkit neither writes nor loads; leave it out"
    for name in ("target_modules", "feedforward_modules", "modules_to_save"):
        yield from _name_problems(name, config.get(name))
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            yield f"{name} is {_short(pattern)}, not an object"
            continue
        yield from _name_problems(name, list(pattern))
        if bad := [value for value in pattern.values() if not _is_size(value, whole=name == "rank_pattern")]:
            yield f"{name} has {_short(bad[0])} for a value"
    for name in SIZES:
        if name in config and config[name] is not None and not _is_size(config[name], whole=True):
            yield f"{name} is {_short(config[name])}, not a whole number from 0 to {MOST_RANK:,}"


def peft_type(method: Method) -> str:
    """peft's name for the method as it is saved."""
    known = {"adalora": "LORA", "prompt": "PROMPT_TUNING"}
    return known.get(method.kind) or str(getattr(method, "type", method.kind)).upper()


def _name_problems(field: str, names: Any) -> Iterator[str]:
    if names is None:
        return
    if not isinstance(names, list) or len(names) > MOST_NAMES:
        yield f"{field} is {_short(names)}, not a list of at most {MOST_NAMES:,} module names"
        return
    for name in names:
        if not isinstance(name, str) or len(name) > 1000 or not PLAIN_NAME.fullmatch(name):
            yield f"{field} has {_short(name)}, which is no module's name; patterns are not loaded"
            return


def _is_size(value: Any, whole: bool) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value <= MOST_RANK


def _short(value: Any) -> str:
    text = repr(value[:20] if isinstance(value, (list, str)) else value)
    return text if len(text) <= 60 else f"{text[:59]}…"
