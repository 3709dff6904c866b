"""Configuration files: the shipped ones with changes, through `peftkit validate`."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import strategies as st

from benchmarks.fuzzing.mutations import TEXTS, changed_bytes, changed_tree
from benchmarks.fuzzing.watch import Finding, told, watched
from peftkit import shipped
from peftkit.config import load_run, validate
from peftkit.config_file import parse_document, to_yaml

# fmt: off
TEXTUAL = (
    ": ", "- ", "? ", "[", "]", "{", "}", ",", "#", " #", "'", '"', "|\n", ">-\n", "&a ", "*a", "<<: *a", "!!int ",
    "!!python/object:os.system ", "!<x> ", "%YAML 1.2\n", "%TAG ! x\n", "---\n", "...\n", "\t", "\n", "\r", "\r\n",
    "\0", "\x85", "\u2028", "\ufeff", "🙂", '"\\ud800"', '"\\0"', '"\\x1b[2J"', "1" * 5000, "9" * 20, "1e999", ".inf",
    ".nan", "~", "null", "true", "no", "0o7", "0x7", "1_0", "2026-01-01", "a: &a [*a]", "[[[[[[[[", "- - - - ",
)
# fmt: on
TOKENS = (*(one.encode() for one in TEXTUAL), b"\xff", b"\xc3", b"\xed\xa0\x80")
Example = tuple[bytes, tuple[str, ...]]


class Configs:
    """An example is a file's bytes and overrides."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "config.yaml"
        self.texts = [file.read_bytes() for file in shipped.configs()]

    def examples(self) -> st.SearchStrategy[Example]:
        return _examples(self)

    def check(self, example: Example) -> bool:
        """Examine one file; returns whether it is a run."""
        content, overrides = example
        self._file.write_bytes(content)
        with watched():
            if told(["validate", str(self._file), *overrides]):
                return False
            run = load_run(self._file, overrides)
            if validate(parse_document(to_yaml(run.model_dump(mode="json")), "again")) != run:
                raise Finding("the resolved run reads back as another")
        return True


@st.composite
def _examples(draw: st.DrawFn, configs: Configs) -> Example:
    text = configs.texts[draw(st.integers(0, len(configs.texts) - 1))]
    how = draw(st.sampled_from(("tree", "tree", "text", "both", "random")))
    if how == "random":
        return draw(st.binary(max_size=200)), ()
    if how in ("tree", "both"):
        tree = changed_tree(draw, yaml.safe_load(text), nested=60)
        flow = draw(st.sampled_from((None, True, False)))
        written = yaml.safe_dump(tree, allow_unicode=True, default_flow_style=flow, sort_keys=False)
        text = written.encode("utf-8", "surrogatepass")
    if how in ("text", "both"):
        text = changed_bytes(draw, text, TOKENS)
    return text, tuple(draw(st.lists(_overrides(), max_size=2)))


def _overrides() -> st.SearchStrategy[str]:
    keys = st.sampled_from(
        ("method", "method.kind", "method.rank", "training.seed", "training", "task.data.train", "output.folder", "a.b")
    )
    values = st.one_of(st.sampled_from(TEXTS), st.text(max_size=20), st.integers().map(str))
    return st.builds("{}={}".format, keys, values).map(lambda one: one.replace("\0", ""))
