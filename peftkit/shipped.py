"""The recipes and configurations that come with peftkit."""

from __future__ import annotations

import ast
from pathlib import Path

from peftkit.errors import UsageError
from peftkit.schema import did_you_mean


def folder() -> Path:
    """Where they lie: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    return next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())


def recipes() -> dict[Path, str]:
    """Recipe scripts with the first line of their docstrings."""
    return {file: _docstring(file).partition("\n")[0] for file in sorted(folder().glob("*.py"))}


def configs() -> dict[Path, str]:
    """Configurations with the comment on their first line."""
    return _with_comments("configs")


def sequences() -> dict[Path, str]:
    """Configurations of recipes/continual.py with the comment on their first line."""
    return _with_comments("sequences")


def launches() -> dict[Path, str]:
    """Accelerate configurations, for `peftkit launch --accelerate`, with the comment on their first line."""
    return _with_comments("accelerate")


def copy(name: str, target: Path | None) -> Path:
    """Copy a shipped file by its name to `target`, by default here under the same name; never over another file."""
    shipped = {file.name: file for file in (*recipes(), *configs(), *sequences(), *launches())}
    source = shipped.get(name) or shipped.get(f"{name}.yaml")
    if source is None:
        raise UsageError(f"nothing is shipped as '{name}'{did_you_mean(name, shipped)}")
    target = target or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if not target.parent.is_dir():
        raise UsageError(f"no folder {target.parent}")
    try:
        with target.open("xb") as stream:
            stream.write(source.read_bytes())
    except FileExistsError:
        raise UsageError(f"{target} exists; name another file") from None
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    return target


def _docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def _with_comments(name: str) -> dict[Path, str]:
    found = sorted((folder() / name).glob("*.yaml"))
    return {file: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in found}
