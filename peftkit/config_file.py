"""A YAML file as plain data that remembers the line of every key, plus `section.key=value` overrides.

YAML 1.1 has three traps that change a run without a word: `1e-4` is text, `no` is false, and of two equal
keys the last wins. Here `1e-4` is a number, only `true` and `false` are booleans, and a repeated key is an
error (YAML 1.2's core schema).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peftkit.errors import ConfigError, UsageError
from peftkit.schema import nearest

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"


class _CoreSchemaLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's idea of booleans, numbers and null."""


_CoreSchemaLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _CoreSchemaLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


@dataclass
class Document:
    """The tree of a configuration and where each of its keys came from."""

    source: str
    tree: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overridden: set[KeyPath] = field(default_factory=set)

    def where(self, path: KeyPath) -> str:
        """`file.yaml:12` of the key, of its nearest parent, or `command line`."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overridden:
                return COMMAND_LINE
            if path[:length] in self.lines:
                return f"{self.source}:{self.lines[path[:length]]}"
        return self.source


def read_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Read a configuration file and apply `section.key=value` overrides, which win.

    Raises:
        UsageError: the file is missing or unreadable, or an override has no `=`.
        ConfigError: invalid YAML, or a repeated key, with its line.
    """
    document = parse_document(_read_text(path), str(path))
    for override in overrides:
        _apply(document, override)
    return document


def parse_document(text: str, source: str) -> Document:
    """Parse YAML text; `source` is what error messages call it."""
    loader = _CoreSchemaLoader(text)
    try:
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        problems: list[str] = []
        tree = _build(loader, node, (), lines, problems, source) if node else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{source}:{line}: not valid YAML: {error.problem}"]) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{source}: not valid YAML: {error}"]) from error
    finally:
        loader.dispose()
    if problems:
        raise ConfigError(problems)
    if not isinstance(tree, dict):
        raise ConfigError([f"{source}:1: expected sections such as `backbone:`, found {type(tree).__name__}"])
    return Document(source, tree, lines)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a configuration file in it")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else None
        hint = f"; did you mean '{path.parent / near}'?" if near else "; `peftkit ls` lists what is shipped"
        raise UsageError(f"no configuration file {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def _build(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    path: KeyPath,
    lines: dict[KeyPath, int],
    problems: list[str],
    source: str,
) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, lines, problems, source)
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            lines[(*path, position)] = item.start_mark.line + 1
        return [
            _build(loader, item, (*path, position), lines, problems, source) for position, item in enumerate(node.value)
        ]
    return loader.construct_object(node)  # type: ignore[no-untyped-call]


def _build_mapping(
    loader: yaml.SafeLoader,
    node: yaml.MappingNode,
    path: KeyPath,
    lines: dict[KeyPath, int],
    problems: list[str],
    source: str,
) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        line = key_node.start_mark.line + 1
        here = (*path, key)
        if key in mapping:
            problems.append(f"{source}:{line}: '{_dotted(here)}' stands here and in line {lines[here]}; keep one")
        lines[here] = line
        mapping[key] = _build(loader, value_node, here, lines, problems, source)
    return mapping


def _apply(document: Document, override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = tuple(dotted.split("."))
    if not equals or not all(keys):
        raise UsageError(f"'{override}' is not an override; write it as section.key=value")
    value = _parse_value(text, override)
    target = document.tree
    for key in keys[:-1]:
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise UsageError(f"'{override}': '{key}' holds a value, not a section")
    target[keys[-1]] = value
    for known in [known for known in document.lines if known[: len(keys)] == keys]:
        del document.lines[known]
    document.overridden.add(keys)


def _parse_value(text: str, override: str) -> Any:
    try:
        return parse_document(f"value: {text}", "override").tree["value"]
    except ConfigError as error:
        raise UsageError(f"'{override}': the value is not valid YAML; quote it") from error


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
