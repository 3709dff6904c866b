"""What README tells people to type works as it stands."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from benchmarks import published

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_three_examples() -> None:
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("code", EXAMPLES, ids=["own model", "own data", "own metric"])
def test_example_runs_and_prints_what_it_says(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*\)  # (.+)", code):
        assert expected in printed


def test_every_file_that_is_linked_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", ["recipes", "reuters_r8"])
def test_the_figures_are_those_of_the_result_file(name: str) -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "recipes.py"))
    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert module["summary"](results["runs"]) in README


@pytest.mark.parametrize(("family", "methods"), [("reuters_r8_smollm2", 3), ("reuters_r8", 12)])
def test_every_method_beats_the_head_alone(family: str, methods: int) -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "reuters_r8.json").read_text())["runs"]
    split = [(run["config"].partition(f"{family}_")[2], run["scores"]["after"]["accuracy"]) for run in runs]
    scores = {kind: score for kind, score in split if kind and not kind.startswith("smollm2_")}
    head = scores.pop("head")
    assert len(scores) >= methods
    assert min(scores.values()) > head


def test_every_command_is_one_that_the_parser_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.cli import _parsers

    _, verbs = _parsers()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    lines = re.findall(r"^peftkit (.+?)(?:\s+#.*)?$", blocks, flags=re.MULTILINE)
    assert lines
    for line in lines:
        words = _words(line)
        count = 2 if words[0] == "bench" else 1
        verbs[" ".join(words[:count])].parse_intermixed_args(words[count:])


def _words(line: str) -> list[str]:
    import shlex

    return shlex.split(line.partition(" | ")[0])


def test_the_comparison_is_what_its_command_writes() -> None:
    assert published.with_section(README, published.section()) == README
