"""A YAML file as plain data that remembers the line of every key, plus `section.key=value` overrides.

YAML 1.1 has three traps that change a run without a word: `1e-4` is text, `no` is false, and of two equal
keys the last wins. Here `1e-4` is a number, only `true` and `false` are booleans, and a repeated key is an
error (YAML 1.2's core schema). What is read is bounded: see `peftkit.config_limits`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peftkit.config_limits import MOST_DEPTH, MOST_KEY, Budget, TooMuch, character_problem, read_text
from peftkit.errors import ConfigError, UsageError
from peftkit.schema import shown

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"


MOST_DIGITS = 30
LARGEST = 2**63 - 1
"""Whole number; what reads it next has 64 bits for it."""

_CORE_SCHEMA = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
)


class _CoreSchemaLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's idea of booleans, numbers and null, which stops at what is too much to read."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._budget = Budget()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        with self._budget.inside(event.start_mark.line + 1):
            if not isinstance(event, yaml.AliasEvent):
                self._budget.spend(getattr(event, "value", ""), event.start_mark.line + 1)
            return super().compose_node(parent, index)


class _CoreSchemaDumper(yaml.SafeDumper):
    """SafeDumper that also quotes the texts which YAML 1.2 would read as something else, such as `1e5`."""


_CoreSchemaLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _CORE_SCHEMA:
    for _class in (_CoreSchemaLoader, _CoreSchemaDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    """PyYAML's own takes 010 for eight. More digits than any setting has are not worth the time to read them."""
    digits = loader.construct_scalar(node)
    return int(digits) if len(digits) <= MOST_DIGITS else math.inf


_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:int", _decimal)


@dataclass
class Document:
    """The tree of a configuration and where each of its keys came from."""

    source: str
    tree: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overridden: set[KeyPath] = field(default_factory=set)

    def where(self, path: KeyPath) -> str:
        """`file.yaml:12` of the key, of its nearest parent, or `command line`."""
        at = self._origin(path)
        return at if isinstance(at, str) else f"{self.source}:{at}" if at else self.source

    def order(self, path: KeyPath) -> float:
        """Sorts keys as they stand in the file; what the file lacks, and then the command line, come last."""
        at = self._origin(path)
        return math.inf if isinstance(at, str) else at or sys.maxsize

    def _origin(self, path: KeyPath) -> int | str | None:
        if path and path not in self.lines and any(key[: len(path)] == path for key in self.overridden):
            return COMMAND_LINE
        for length in range(len(path), 0, -1):
            if path[:length] in self.overridden:
                return COMMAND_LINE
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def read_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Read a configuration file and apply `section.key=value` overrides, which win.

    Raises:
        UsageError: the file is missing or unreadable, or an override has no `=`.
        ConfigError: invalid YAML, or a repeated key, with its line.
    """
    document = parse_document(read_text(path), str(path))
    for override in overrides:
        _apply(document, override)
    return document


def parse_document(text: str, source: str) -> Document:
    """Parse YAML text; `source` is what error messages call it."""
    tree, lines = parse_tree(text, source)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError([f"{source}:1: expected sections such as `backbone:`, found {type(tree).__name__}"])
    return Document(source, tree, lines)


def parse_tree(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Whatever YAML text holds, and the lines of its keys.

    Raises:
        ConfigError: invalid YAML, a repeated key, or more than is read.
    """
    reader = _Reader(source)
    try:
        node = _compose(text, source)
        tree = None if node is None else reader.build(node, ())
    except TooMuch as error:
        raise ConfigError([f"{source}:{error.line}: {error}"]) from error
    if reader.problems:
        raise ConfigError(reader.problems)
    return tree, reader.lines


def to_yaml(tree: dict[str, Any]) -> str:
    """YAML text that `parse_document` reads back as the same tree."""
    return yaml.dump(tree, Dumper=_CoreSchemaDumper, sort_keys=False, allow_unicode=True)


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return _CoreSchemaLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        # a quote that is never closed is better looked for where it opens
        at_end = error.problem_mark is None or error.problem_mark.index >= len(text.rstrip())
        mark = error.context_mark if at_end and error.context_mark else error.problem_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        what = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([f"{place}: not valid YAML: {what}"]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError([f"{source}:{line}: not valid YAML: character {error.character!r} is not allowed"]) from error


class _Reader:
    """Builds plain data from YAML nodes, and notes where each key stands and what is wrong with it."""

    def __init__(self, source: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []
        self._source = source
        self._open: list[yaml.Node] = []
        self._budget = Budget()
        self._loader = _CoreSchemaLoader("")

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if any(node is outer for outer in self._open):
            return self._refuse(node, f"{_dotted(path)}: this alias stands inside what it names")
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            self._budget.spend(node.value, line)
            return self._scalar(node, path)
        self._budget.spend("", line)
        self._open.append(node)
        with self._budget.inside(line):
            built = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._list(node, path)
        self._open.pop()
        return built

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, f"{_dotted(path) or 'the file'}: a key must be one word")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            here = (*path, key)
            self._budget.spend(key, line)
            if problem := character_problem(key) or _length_problem(key):
                self._refuse(key_node, f"{_dotted(path) or 'the file'}: a key with {problem}")
                continue
            if key == "<<" and key_node.style is None:
                self._refuse(key_node, f"{_dotted(here)}: merge keys are not read; write out what they would add")
                continue
            if key in mapping:
                self._refuse(key_node, f"'{_dotted(here)}' stands here and in line {self.lines[here]}; keep one")
            self.lines[here] = line
            mapping[key] = self.build(value_node, here)
        return mapping

    def _list(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        for position, item in enumerate(node.value):
            self.lines[(*path, position)] = item.start_mark.line + 1
        return [self.build(item, (*path, position)) for position, item in enumerate(node.value)]

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        try:
            value = self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            return self._refuse(node, f"{_dotted(path)}: {getattr(error, 'problem', error)}")
        if isinstance(value, (int, float)) and not _is_number(value):
            return self._refuse(node, f"{_dotted(path)}: {shown(node.value)} is too large for a number")
        if isinstance(value, str) and (problem := character_problem(value)):
            return self._refuse(node, f"{_dotted(path)}: {problem}")
        if value is not None and not isinstance(value, (str, int, float)):
            return self._refuse(node, f"{_dotted(path)}: {node.tag} is not read; write text, a number, true or false")
        return value

    def _refuse(self, node: yaml.Node, problem: str) -> None:
        self.problems.append(f"{self._source}:{node.start_mark.line + 1}: {problem}")


def _is_number(value: int | float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST


def _length_problem(key: str) -> str | None:
    return f"{len(key):,} characters, where no name has more than {MOST_KEY}" if len(key) > MOST_KEY else None


def _apply(document: Document, override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = tuple(dotted.split("."))
    if not equals or not all(keys):
        raise UsageError(f"'{shown(override)}' is not an override; write it as section.key=value")
    if len(keys) > MOST_DEPTH or any(character_problem(key) or _length_problem(key) for key in keys):
        raise UsageError(f"'{shown(dotted)}' is no key of a configuration; write it as section.key=value")
    value = _parse_value(text, override)
    target = document.tree
    for key in keys[:-1]:
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise UsageError(f"'{shown(override)}': '{key}' holds a value, not a section")
    target[keys[-1]] = value
    for known in [known for known in document.lines if known[: len(keys)] == keys]:
        del document.lines[known]
    document.overridden.add(keys)


def _parse_value(text: str, override: str) -> Any:
    """The value of an override; a whole section can be given as `{kind: full}`."""
    line = f"value: {text}"
    try:
        node: Any = _compose(line, "override")
        tree = parse_document(line, "override").tree
    except ConfigError as error:
        problem = error.problems[0].partition(": ")[2]
        hint = "; put the value in quotes if it is text" if "not valid YAML" in problem else ""
        raise UsageError(f"'{shown(override)}': {problem}{hint}") from error
    # ` #` starts a comment, which on a command line nobody means
    if len(node.value) != 1 or node.value[0][1].end_mark.index < len(line.rstrip()):
        raise UsageError(f"'{shown(override)}': only a part of the value would be read; put it in quotes")
    return tree["value"]


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
