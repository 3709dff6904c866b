"""What pydantic found wrong with a configuration, told with file, line and the name that was meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic_core import ErrorDetails

from peftkit.config_file import Document, KeyPath
from peftkit.schema import Section, did_you_mean, nearest


def problems(document: Document, errors: Sequence[ErrorDetails], root: type[Section]) -> list[str]:
    """One line a problem: file and line (or command line), key, what is wrong, the name that was meant.

    A key that is missing because it was misspelt is reported once, as misspelt.
    """
    found: dict[str, None] = {}
    misspelt: set[KeyPath] = set()
    for error in errors:
        if error["type"] in ("extra_forbidden", "union_tag_not_found"):
            path = _tree_path(document.tree, error["loc"])
            message, meant = _unknown_key(document, error, path, root)
            found[message] = None
            misspelt.add(meant)
    for error in errors:
        path = _tree_path(document.tree, error["loc"])
        if error["type"] in ("extra_forbidden", "union_tag_not_found") or path in misspelt:
            continue
        found[_describe(document, error, path, root)] = None
    return list(found)


def _unknown_key(document: Document, error: ErrorDetails, path: KeyPath, root: type[Section]) -> tuple[str, KeyPath]:
    """The message for a key nobody knows, and the path of the key that was meant."""
    if error["type"] == "union_tag_not_found":
        section, tag = path, str((error.get("ctx") or {}).get("discriminator", "'kind'")).strip("'")
        written = _value_at(document.tree, section)
        near = nearest(tag, [str(key) for key in written]) if isinstance(written, dict) else None
        if near is None:
            kinds = ", ".join(_tags(root, section))
            return f"{document.where(section)}: {_dotted(section)}: '{tag}' is missing ({kinds})", (
                *section,
                tag,
            )
        at = (*section, near)
        return f"{document.where(at)}: {_dotted(at)}: unknown key; did you mean '{tag}'?", (*section, tag)
    names = _field_names(root, error["loc"][:-1])
    name = str(path[-1])
    message = f"{document.where(path)}: {_dotted(path)}: unknown key{did_you_mean(name, names)}"
    return message, (*path[:-1], nearest(name, names) or name)


def _describe(document: Document, error: ErrorDetails, path: KeyPath, root: type[Section]) -> str:
    start = f"{document.where(path)}: {_dotted(path)}: " if path else f"{document.where(path)}: "
    context = error.get("ctx") or {}
    match error["type"]:
        case "missing":
            return f"{start}missing"
        case "union_tag_invalid":
            tag = str(context["tag"])
            at = (*path, str(context["discriminator"]).strip("'"))
            hint = did_you_mean(tag, _tags(root, path))
            return f"{document.where(at)}: {_dotted(at)}: no kind '{tag}'{hint}"
        case "literal_error":
            return f"{start}'{error['input']}' is not a choice{_choice_hint(error)}"
        case "value_error":
            return f"{start}{context.get('error', error['msg'])!s}"
        case _:
            return f"{start}{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _choice_hint(error: ErrorDetails) -> str:
    expected = str((error.get("ctx") or {}).get("expected", ""))
    return did_you_mean(str(error["input"]), [c.strip(" '") for c in expected.replace(" or ", ",").split(",")])


def _tree_path(tree: Any, location: Sequence[str | int]) -> KeyPath:
    """A pydantic location without the names of union members, which the file does not have."""
    path: list[str | int] = []
    node = tree
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        known = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if known:
            path.append(part)
            node = node[part]  # type: ignore[index]
        elif is_last and isinstance(node, dict):
            path.append(part)
    return tuple(path)


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


def _field_names(root: type[Section], location: Sequence[str | int]) -> set[str]:
    """The keys that are valid at a pydantic location, in which the kind of a section follows its key."""
    sections = [root]
    for part in location:
        of_kind = [section for section in sections if len(sections) > 1 and _kind(section) == part]
        sections = of_kind or _inner_sections(sections, part)
    return {name for section in sections for name in section.model_fields}


def _tags(root: type[Section], path: KeyPath) -> list[str]:
    """The kinds that the section at `path` can have."""
    sections = [root]
    for part in path:
        sections = _inner_sections(sections, part)
    return [kind for section in sections if (kind := _kind(section)) is not None]


def _inner_sections(sections: Sequence[type[Section]], key: str | int) -> list[type[Section]]:
    fields = [section.model_fields[str(key)] for section in sections if str(key) in section.model_fields]
    return list(dict.fromkeys(inner for field in fields for inner in _sections_in(field.annotation)))


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
