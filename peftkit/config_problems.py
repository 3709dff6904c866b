"""What pydantic finds wrong with a configuration, told with file, line and the name that was meant."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from peftkit.config_file import Document, KeyPath
from peftkit.errors import MOST_TOLD
from peftkit.schema import Section, did_you_mean, nearest, shown

_WANTED = {
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a section with keys"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "a whole number"),
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
}


def problems(document: Document, root: type[Section]) -> list[str]:
    """One line a problem, in file order: file and line (or command line), key, what is wrong, what was meant.

    Misspelt names are told and mended in a copy, which is checked again, so that they hide nothing and are
    not told a second time as missing.
    """
    return _Problems(document, root).all()


class _Problems:
    def __init__(self, document: Document, root: type[Section]) -> None:
        lines, overridden = dict(document.lines), set(document.overridden)
        self._document = Document(document.source, copy.deepcopy(document.tree), lines, overridden)
        self._root = root
        self._found: dict[str, float] = {}

    def all(self) -> list[str]:
        errors = self._errors()
        while not self._enough() and self._mend(errors):
            errors = self._errors()
        self._describe(errors)
        return sorted(self._found, key=lambda message: self._found[message])

    def _enough(self) -> bool:
        """Whether no more can be told; looking for what was meant takes a while for each."""
        return len(self._found) > MOST_TOLD

    def _errors(self) -> list[ErrorDetails]:
        try:
            self._root.model_validate_json(json.dumps(self._root.completed(self._document.tree)), strict=True)
        except ValidationError as error:
            return error.errors(include_url=False)
        return []

    def _tell(self, path: KeyPath, message: str) -> None:
        key = f"{_dotted(path)}: " if path else ""
        self._found.setdefault(f"{self._document.where(path)}: {key}{message}", self._document.order(path))

    # --- names -------------------------------------------------------------------------------------

    def _mend(self, errors: Sequence[ErrorDetails]) -> bool:
        """Tell and mend what is misspelt; False when nothing was."""
        forbidden = [error["loc"] for error in errors if error["type"] == "extra_forbidden"]
        forbidden = forbidden[: MOST_TOLD + 1]
        unknown = [(*_walk(self._root, self._document.tree, place[:-1]), str(place[-1])) for place in forbidden]
        mended = [self._tell_left_over(unknown)]
        mended += [self._mend_key((*section, name), valid) for section, valid, name in unknown]
        mended += [self._mend_kind(error) for error in errors if error["type"].startswith("union_tag")]
        return any(mended)

    def _mend_key(self, path: KeyPath, valid: Sequence[type[Section]]) -> bool:
        """Tell an unknown key and rename it to the one that was meant; without one it goes."""
        section, name = path[:-1], str(path[-1])
        written = _value_at(self._document.tree, section)
        if not isinstance(written, dict) or name not in written:
            return False  # told among those that another kind left over, or not a key of the file
        names = {field for one in valid for field in one.model_fields}
        meant = nearest(name, sorted(names))
        others = [kind for kind, fields in self._kinds(section).items() if name in fields]
        if meant is None and others:
            self._tell(path, f"kind '{_kind(valid[0])}' has no such key, only {', '.join(others)}")
        else:
            self._tell(path, f"unknown key{did_you_mean(name, names)}")
        self._move(path, meant)
        return True

    def _mend_kind(self, error: ErrorDetails) -> bool:
        """Tell and mend a misspelt `kind`, key or value."""
        section, _ = _walk(self._root, self._document.tree, error["loc"])
        context, written = error.get("ctx") or {}, _value_at(self._document.tree, section)
        kinds, key = self._kinds(section), str(context["discriminator"]).strip("'")
        if error["type"] == "union_tag_not_found":
            valid = {field for fields in kinds.values() for field in fields}
            near = nearest(key, [name for name in written if name not in valid])
            if near:
                self._tell((*section, near), f"unknown key; did you mean '{key}'?")
                self._move((*section, near), key)
            return near is not None
        near = nearest(str(context["tag"]), sorted(kinds))
        if near:
            self._tell((*section, key), f"no kind '{shown(str(context['tag']))}'; did you mean '{near}'?")
            self._replace_kind(section, key, near)
        return near is not None

    def _tell_left_over(self, unknown: Sequence[tuple[KeyPath, list[type[Section]], str]]) -> bool:
        """Keys of the file's kind, which stay when the command line changes the kind alone, are one problem."""
        left_over: dict[KeyPath, list[str]] = {}
        for section, _, name in unknown:
            kind_changed = (*section, "kind") in self._document.overridden
            of_other_kind = any(name in fields for fields in self._kinds(section).values())
            if kind_changed and of_other_kind and (*section, name) not in self._document.overridden:
                left_over.setdefault(section, []).append(name)
                self._move((*section, name), None)
        for section, names in left_over.items():
            kind = _value_at(self._document.tree, section)["kind"]
            self._tell(
                (*section, "kind"),
                f"'{kind}' has no {', '.join(names)}, which {self._document.source} sets; "
                f"replace the whole section: {_dotted(section)}='{{kind: {kind}}}'",
            )
        return bool(left_over)

    def _kinds(self, section: KeyPath) -> dict[str, set[str]]:
        """The kinds that the section at a path can have, with their keys."""
        sections = [self._root]
        for part in section:
            sections = sections if isinstance(part, int) else _inner_sections(sections, part)
        return {kind: set(one.model_fields) for one in sections if (kind := _kind(one)) is not None}

    def _move(self, path: KeyPath, meant: str | None) -> None:
        """Give a key the name that was meant; it goes when there is none, or when that one is there already."""
        section = _value_at(self._document.tree, path[:-1])
        value = section.pop(path[-1])
        if meant is None or meant in section:
            return
        section[meant] = value
        new, lines, overridden = (*path[:-1], meant), self._document.lines, self._document.overridden
        for old in [key for key in lines if key[: len(path)] == path]:
            lines[(*new, *old[len(path) :])] = lines[old]
        overridden |= {(*new, *old[len(path) :]) for old in overridden if old[: len(path)] == path}

    def _replace_kind(self, section: KeyPath, key: str, kind: str) -> None:
        parent, written = _value_at(self._document.tree, section[:-1]), _value_at(self._document.tree, section)
        parent[section[-1]] = written | {key: kind} if isinstance(written, dict) else kind

    # --- values ------------------------------------------------------------------------------------

    def _describe(self, errors: Sequence[ErrorDetails]) -> None:
        """Tell everything else; what the members of a union say about one value is one problem."""
        at: dict[KeyPath, list[ErrorDetails]] = {}
        for error in errors:
            at.setdefault(_walk(self._root, self._document.tree, error["loc"])[0], []).append(error)
        for path, group in at.items():
            if self._enough():
                return
            if len(group) > 1 and all(error["input"] == group[0]["input"] for error in group):
                self._tell(path, f"should be {' or '.join(map(_wanted, group))}, got {_shown(group[0]['input'])}")
                continue
            for error in group:
                self._describe_one(path, error)

    def _describe_one(self, path: KeyPath, error: ErrorDetails) -> None:
        context = error.get("ctx") or {}
        match error["type"]:
            case "missing":
                self._tell(path, "missing")
            case "extra_forbidden":
                self._tell(path, "unknown key")
            case "union_tag_not_found":
                self._tell(path, f"'kind' is missing; it can be: {', '.join(self._kinds(path))}")
            case "union_tag_invalid":
                hint = did_you_mean(str(context["tag"]), self._kinds(path))
                self._tell(
                    (*path, str(context["discriminator"]).strip("'")), f"no kind '{shown(str(context['tag']))}'{hint}"
                )
            case "literal_error":
                choice = [one.strip(" '") for one in str(context["expected"]).replace(" or ", ",").split(",")]
                self._tell(path, f"{_shown(error['input'])} is not a choice{did_you_mean(str(error['input']), choice)}")
            case "value_error":
                self._tell(path, str(context.get("error", error["msg"])))
            case _:
                self._tell(path, f"should be {_wanted(error)}, got {_shown(error['input'])}{_without_quotes(error)}")


def _wanted(error: ErrorDetails) -> str:
    return _WANTED.get(error["type"], error["msg"].removeprefix("Input should be "))


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "a section" if isinstance(value, dict) else "a list"
    return f"'{shown(value)}'" if isinstance(value, str) else json.dumps(value)


def _without_quotes(error: ErrorDetails) -> str:
    """The mend for a number in quotes."""
    if isinstance(error["input"], str) and error["type"] in ("int_type", "float_type"):
        with suppress(ValueError):
            float(error["input"])
            return f"; write {error['input']} without quotes"
    return ""


def _walk(root: type[Section], tree: Any, location: Sequence[str | int]) -> tuple[KeyPath, list[type[Section]]]:
    """The path in the file of a pydantic location, and the sections that can be there.

    A location also holds what a file does not: the kind of a section after its key, and names of union members.
    """
    sections, node, path = [root], tree, list[str | int]()
    for part in location:
        of_kind = [section for section in sections if len(sections) > 1 and _kind(section) == part]
        is_field = any(part in section.model_fields for section in sections)
        if of_kind:
            sections = of_kind
        elif isinstance(part, int) or is_field or (isinstance(node, dict) and part in node):
            sections = sections if isinstance(part, int) else _inner_sections(sections, part)
            node = _child(node, part)
            path.append(part)
    return tuple(path), sections


def _child(node: Any, part: str | int) -> Any:
    try:
        return node[part]
    except (KeyError, IndexError, TypeError):
        return None


def _value_at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _kind(section: type[Section]) -> str | None:
    return str(section.model_fields["kind"].default) if "kind" in section.model_fields else None


def _inner_sections(sections: Sequence[type[Section]], key: str | int) -> list[type[Section]]:
    fields = [section.model_fields[str(key)] for section in sections if str(key) in section.model_fields]
    return list(dict.fromkeys(inner for field in fields for inner in _sections_in(field.annotation)))


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
