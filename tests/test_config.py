"""Configurations: whatever is wrong is refused with file, line and mend; whatever is right means one thing."""

from __future__ import annotations

import os
import string
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from peftkit.cli import main
from peftkit.config import Run, load_run, run_id, settings_of, validate
from peftkit.config_file import parse_document, read_document, to_yaml
from peftkit.errors import ConfigError, UsageError
from peftkit.methods import METHODS
from peftkit.schema import nearest
from peftkit.session import RUN_FILE, claim

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs").glob("*.yaml"))
LORA = CONFIGS[0].with_name("sst2_lora.yaml")
SMALL = """\
backbone:
  name: bundled:minilm
task:
  kind: sequence_classification
  data:
    train: train.tsv
method:
  kind: lora
training:
  learning_rate: 1e-3
"""
Path_ = tuple[str, ...]


def problems_of(text: str, source: str = "f.yaml") -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        validate(parse_document(text, source))
    return caught.value.problems


def overridden(*overrides: str, file: Path = LORA) -> Run:
    return validate(read_document(file, overrides))


def override_problems(*overrides: str, file: Path = LORA) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        overridden(*overrides, file=file)
    return caught.value.problems


# --- every key of every shipped configuration, misspelt --------------------------------------------


def keys_in(text: str) -> Iterator[tuple[int, Path_]]:
    """Line index and path of every key, read from the indentation alone."""
    open_: list[tuple[int, str]] = []
    for index, line in enumerate(text.splitlines()):
        stripped = line.lstrip()
        if not stripped or stripped.startswith("#") or ":" not in stripped:
            continue
        indent = len(line) - len(stripped)
        open_ = [(level, key) for level, key in open_ if level < indent]
        open_.append((indent, stripped.partition(":")[0]))
        yield index, tuple(key for _, key in open_)


def first_seen() -> dict[Path, list[tuple[int, Path_]]]:
    """The keys of each configuration that no earlier one has in a section of the same kind.

    The fields of `kind: peft` are peft's own, which are checked when a run starts.
    """
    seen: set[tuple[str, Path_]] = set()
    found: dict[Path, list[tuple[int, Path_]]] = {}
    for file in CONFIGS:
        text = file.read_text(encoding="utf-8")
        kinds = {name: section.get("kind", "") for name, section in yaml.safe_load(text).items()}
        for index, path in keys_in(text):
            of_peft = kinds[path[0]] == "peft" and path[-1] not in ("kind", "method")
            if not of_peft and (kinds[path[0]], path) not in seen:
                seen.add((kinds[path[0]], path))
                found.setdefault(file, []).append((index, path))
    return found


FIRST_SEEN = first_seen()


def misspellings(word: str) -> set[str]:
    """Each letter left out, each doubled, each swapped with the next, and the middle one replaced."""
    found = {word[:i] + word[i + 1 :] for i in range(len(word))}
    found |= {word[:i] + word[i] + word[i:] for i in range(len(word))}
    found |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    middle = len(word) // 2
    return (found | {word[:middle] + "x" + word[middle + 1 :]}) - {word}


@cache
def run_schema() -> dict[str, Any]:
    return Run.model_json_schema()


def valid_siblings(path: Path_, kinds: dict[str, str]) -> set[str]:
    """The names that are valid beside a key, from the JSON Schema rather than from the code that finds them."""
    schema = run_schema()
    node: dict[str, Any] = schema
    for part in path[:-1]:
        node = node["properties"][part]
        if "discriminator" in node:
            node = {"$ref": node["discriminator"]["mapping"][kinds[part]]}
        while "properties" not in node:
            choices = [one for one in node.get("anyOf", node.get("oneOf", ())) if one.keys() & {"$ref", "oneOf"}]
            node = choices[0] if choices else schema["$defs"][node["$ref"].rpartition("/")[2]]
    return set(node["properties"])


@pytest.mark.parametrize("file", FIRST_SEEN, ids=lambda file: file.stem)
def test_every_misspelling_of_every_key_is_refused_with_line_and_mend(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    kinds = {name: section["kind"] for name, section in yaml.safe_load(text).items() if "kind" in section}
    for index, path in FIRST_SEEN[file]:
        for wrong in misspellings(path[-1]) - valid_siblings(path, kinds):
            lines = text.splitlines()
            lines[index] = lines[index].replace(path[-1], wrong, 1)
            dotted = ".".join((*path[:-1], wrong))
            expected = f"{file}:{index + 1}: {dotted}: unknown key; did you mean '{path[-1]}'?"
            assert problems_of("\n".join(lines), str(file)) == (expected,)


def test_every_section_and_method_is_among_them() -> None:
    paths = [path for keys in FIRST_SEEN.values() for _, path in keys]
    assert len(paths) > 60
    assert {path[0] for path in paths} == {"backbone", "task", "method", "training"}
    assert paths.count(("method", "kind")) == len(METHODS)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        *[("tsak", "task"), ("task.knid", "kind"), ("task.data.trian", "train")],
        *[("method.rnak", "rank"), ("method.kidn", "kind"), ("output.fodler", "folder")],
    ],
)
def test_a_misspelt_key_on_the_command_line_says_so(path: str, meant: str) -> None:
    assert override_problems(f"{path}=1")[0] == f"command line: {path}: unknown key; did you mean '{meant}'?"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "peftkit.cli", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("path", [("method",), ("method", "rank"), ("task", "data", "train"), ("task", "kind")])
def test_the_command_line_refuses_a_misspelt_file(path: Path_, tmp_path: Path) -> None:
    text = LORA.read_text(encoding="utf-8")
    index = next(index for index, found in keys_in(text) if found == path)
    lines, wrong = text.splitlines(), path[-1] + path[-1][-1]
    lines[index] = lines[index].replace(path[-1], wrong, 1)
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(lines), encoding="utf-8")
    for verb in ("validate", "train"):
        done = command(verb, str(file))
        assert (done.returncode, done.stdout) == (2, "")
        dotted = ".".join((*path[:-1], wrong))
        assert done.stderr == f"error: {file}:{index + 1}: {dotted}: unknown key; did you mean '{path[-1]}'?\n"


@pytest.mark.parametrize("file", FIRST_SEEN, ids=lambda file: file.stem)
def test_every_misspelling_of_every_kind_is_refused(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for index, path in FIRST_SEEN[file]:
        if path[-1] != "kind":
            continue
        right = text.splitlines()[index].partition(": ")[2]
        for wrong in misspellings(right):
            lines = text.splitlines()
            lines[index] = lines[index].replace(right, wrong)
            (told,) = problems_of("\n".join(lines), str(file))
            meant = told.removeprefix(f"{file}:{index + 1}: {'.'.join(path)}: no kind '{wrong}'; did you mean ")
            # `f4` is as near to nf4 as to fp4
            assert meant in {f"'{right}'?", "'fp4'?" if right == "nf4" else ""}


@pytest.mark.parametrize(
    ("name", "candidates", "meant"),
    [
        ("evd", ["seed", "dev"], "dev"),
        ("deev", ["seed", "dev"], "dev"),
        ("labesl", ["label", "labels"], "labels"),
        ("learning-rate", ["learning_rate", "max_steps"], "learning_rate"),
        ("Rank", ["rank", "alpha"], "rank"),
        ("batch", ["batch_size", "epochs"], "batch_size"),
        ("colour", ["rank", "alpha", "targets"], None),
    ],
)
def test_the_nearest_name_needs_the_fewest_slips(name: str, candidates: list[str], meant: str | None) -> None:
    assert nearest(name, candidates) == meant


# --- wrong values ----------------------------------------------------------------------------------


def wrong_values(value: Any) -> list[tuple[str, str]]:
    """Values of another type, and what the message must say was found."""
    if isinstance(value, str):
        return [("3", "got 3"), ("[a]", "a list"), ("{a: b}", "a section"), ("true", "got true")]
    if isinstance(value, bool):
        return [("yes", "got 'yes'"), ("1", "got 1"), ("'true'", "got 'true'")]
    if isinstance(value, list):
        return [("many", "got 'many'"), ("3", "got 3"), ("{a: b}", "a section")]
    return [("many", "got 'many'"), (f"'{value}'", "without quotes"), ("true", "got true"), ("[1]", "a list")]


@pytest.mark.parametrize("file", FIRST_SEEN, ids=lambda file: file.stem)
def test_values_of_another_type_are_refused(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    tree = parse_document(text, str(file)).tree
    for index, path in FIRST_SEEN[file]:
        value: Any = tree
        for part in path:
            value = value[part]
        if isinstance(value, dict) or path[-1] in ("kind", "targets"):
            continue
        for wrong, found in wrong_values(value):
            if found == "a section" and path[:2] == ("task", "data"):
                continue  # a file may be one, with format and columns
            lines = text.splitlines()
            lines[index] = f"{lines[index].partition(':')[0]}: {wrong}"
            (problem,) = problems_of("\n".join(lines), str(file))
            assert problem.startswith(f"{file}:{index + 1}: {'.'.join(path)}: "), problem
            assert found in problem or problem.endswith("is not a choice; did you mean 'linear'?") or wrong in problem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.keep_best=yes", "training.keep_best: should be true or false, got 'yes'"),
        ("training.seed='7'", "training.seed: should be a whole number, got '7'; write 7 without quotes"),
        ("training.seed=true", "training.seed: should be a whole number, got true"),
        ("training.batch_size=1.5", "training.batch_size: should be a whole number, got 1.5"),
        ("training.batch_size=0", "training.batch_size: should be greater than 0, got 0"),
        ("training.schedule=liner", "training.schedule: 'liner' is not a choice; did you mean 'linear'?"),
        ("training.evaluate_every=never", "training.evaluate_every: should be 'epoch' or a whole number, got 'never'"),
        ("method.targets=5", "method.targets: should be text or a list, got 5"),
        ("method=lora", "method: should be a section with keys, got 'lora'"),
        ("method=", "method: should be a section with keys, got null"),
        ("method={rank: 4}", "method: 'kind' is missing; it can be: "),
        ("method.kind=qqqq", "method.kind: no kind 'qqqq'; it can be: "),
        ("task.loss.kind=wieghted", "task.loss.kind: no kind 'wieghted'; did you mean 'weighted'?"),
        ("task.loss=wieghted", "task.loss.kind: no kind 'wieghted'; did you mean 'weighted'?"),
        ("task.loss={kind: focal, gama: 2}", "task.loss.gama: unknown key; did you mean 'gamma'?"),
        ("task.metrics=[{nam: f1}]", "task.metrics.0.nam: unknown key; did you mean 'name'?"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    (problem,) = override_problems(override)
    assert problem.startswith(f"command line: {message}")


# --- what YAML does to the unwary ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-3", -3), ("+3", 3), ("010", 10)],
        *[("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("n", "n"), ("True", True), ("false", False)],
        *[("1_000", "1_000"), ("12:30", "12:30"), ("2024-01-31", "2024-01-31"), ("0x10", "0x10"), ("", None)],
        *[("~", None), ("null", None), ("'1e-4'", "1e-4"), ("[1e-4, no]", [1e-4, "no"]), ("nan", "nan")],
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: Any) -> None:
    read = parse_document(f"a: {text}", "f.yaml").tree["a"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: 'a' stands here and in line 1; keep one"),
        ("a:\n  b: 1\n\n  b: 2\n", "f.yaml:4: 'a.b' stands here and in line 2; keep one"),
        ("a: [{b: 1,\n b: 2}]\n", "f.yaml:2: 'a.0.b' stands here and in line 1; keep one"),
        ("a: 1\n1: 1\n'1': 2\n", "f.yaml:3: '1' stands here and in line 2; keep one"),
        ("a: 1\nb:\n\tc: 1\n", "f.yaml:3: not valid YAML"),
        ("a: 1\nb: 'x\nc: 2\n", "f.yaml:2: not valid YAML: while scanning a quoted scalar"),
        ("a: 1\nb: [1, 2\n", "f.yaml:2: not valid YAML: while parsing a flow sequence"),
        ("- a\n- b\n", "f.yaml:1: expected sections such as `backbone:`, found list"),
        ("just text\n", "f.yaml:1: expected sections such as `backbone:`, found str"),
        ("a: 1\nb: &b [*b]\n", "f.yaml:2: b.0: this alias stands inside what it names"),
        ("a: 1\nb: *nowhere\n", "f.yaml:2: not valid YAML: found undefined alias 'nowhere'"),
        ("b: &b {c: 1}\nd:\n  <<: *b\n", "f.yaml:3: d.<<: merge keys are not read"),
        ("a: 1\n? [x, y]\n: 2\n", "f.yaml:2: the file: a key must be one word"),
        ("a: 1\nb: !!binary aGk=\n", "f.yaml:2: b: tag:yaml.org,2002:binary is not read"),
        ("a: 1\nb: !!python/object:os.system x\n", "f.yaml:2: b: could not determine a constructor"),
        ("a: 1\nb: 1e999\n", "f.yaml:2: b: 1e999 is too large for a number"),
        ("a: 1\nb: x\x00y\n", "f.yaml:2: not valid YAML: character"),
        ("---\na: 1\n---\nb: 1\n", "f.yaml:3: not valid YAML: expected a single document"),
    ],
)
def test_yaml_that_means_nothing_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document(text, "f.yaml")
    assert str(caught.value).startswith(problem)
    assert len(caught.value.problems) == 1


def test_every_repeated_key_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document("a: 1\na: 2\nb: {c: 1, c: 2}\n", "f.yaml")
    assert [problem[:8] for problem in caught.value.problems] == ["f.yaml:2", "f.yaml:3"]


def test_anchors_name_a_value_that_stands_twice() -> None:
    assert parse_document("a: &x {b: 1}\nc: *x\n", "f.yaml").tree == {"a": {"b": 1}, "c": {"b": 1}}


def test_keys_that_are_not_text_are_unknown_keys() -> None:
    found = problems_of(f"{SMALL}1: x\nnull: y\ntrue: z\n")
    assert [problem.partition("; ")[0] for problem in found] == [
        f"f.yaml:{line}: {key}: unknown key" for line, key in ((11, "1"), (12, "null"), (13, "true"))
    ]


def test_an_empty_file_lacks_every_section() -> None:
    for text in ("", "# only a comment\n", "---\n"):
        assert problems_of(text) == tuple(
            f"f.yaml: {section}: missing" for section in ("backbone", "task", "method", "training")
        )


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SMALL, encoding="utf-8")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for name, message in {
        "mien.yaml": f"no configuration file {tmp_path}/mien.yaml; did you mean '{tmp_path}/mine.yaml'?",
        "qqqqqqqqqqqq": f"no configuration file {tmp_path}/qqqqqqqqqqqq; `peftkit ls` lists what is shipped",
        "no/such/folder.yaml": f"no configuration file {tmp_path}/no/such/folder.yaml; `peftkit ls`",
        "binary.yaml": f"cannot read {tmp_path}/binary.yaml: ",
        "": f"{tmp_path} is a folder; name a configuration file in it",
    }.items():
        with pytest.raises(UsageError) as caught:
            load_run(tmp_path / name)
        assert str(caught.value).startswith(message)


def test_a_file_from_windows_reads_the_same(tmp_path: Path) -> None:
    file = tmp_path / "windows.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert validate(read_document(file)) == validate(parse_document(SMALL, "f.yaml"))


# --- overrides -------------------------------------------------------------------------------------


def test_overrides_win_over_the_file() -> None:
    run = overridden("method.rank=3", "training.learning_rate=1e-4", "task.data.limit=5", "training.max_steps=null")
    assert isinstance(run.method.model_dump()["rank"], int)
    assert run.method.model_dump()["rank"] == 3
    assert (run.training.learning_rate, run.training.max_steps, run.task.data.limit) == (1e-4, None, 5)


def test_an_override_can_replace_a_whole_section() -> None:
    assert overridden("method={kind: full}").method == METHODS["full"]()
    run = overridden("method={kind: lora, rank: 2}", "method.alpha=4")
    assert (run.method.model_dump()["rank"], run.method.model_dump()["alpha"]) == (2, 4.0)
    assert overridden("task.data={train: x.tsv}").task.data.model_dump(exclude_defaults=True) == {"train": "x.tsv"}


def test_an_override_can_hold_lists_equals_signs_and_nothing() -> None:
    run = overridden("output.trackers=[tensorboard]", "output.folder=a=b=c", "task.data.dev=", "method.targets=[a, b]")
    assert (run.output.trackers, run.output.folder, run.task.data.dev) == (("tensorboard",), "a=b=c", None)
    assert run.method.model_dump()["targets"] == ("a", "b")


def test_an_override_makes_the_section_it_needs() -> None:
    assert "output" not in read_document(LORA).tree
    assert overridden("output.overwrite=true").output.overwrite is True


def test_the_last_of_equal_overrides_wins() -> None:
    assert overridden("training.seed=1", "training.seed=2").training.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training", "'training' is not an override; write it as section.key=value"),
        ("=3", "'=3' is not an override"),
        ("training..seed=3", "'training..seed=3' is not an override"),
        ("backbone.name.first=3", "'backbone.name.first=3': 'name' holds a value, not a section"),
        ("training.seed=[1", "'training.seed=[1': not valid YAML"),
        ("output.folder=a: b", "'output.folder=a: b': not valid YAML"),
        ("task.data.train=a #1.tsv", "'task.data.train=a #1.tsv': only a part of the value would be read"),
        ("output.folder=a\nb: c", "'output.folder=a\\nb: c': only a part of the value would be read"),
        ("method={kind: full, kind: lora}", "'method={kind: full, kind: lora}': 'value.kind' stands here"),
    ],
)
def test_what_is_not_an_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        overridden(override)
    assert str(caught.value).startswith(message)


def test_quotes_keep_a_value_whole() -> None:
    assert overridden("output.folder='a #1: b'").output.folder == "a #1: b"


def test_changing_the_kind_alone_says_how_to_replace_the_section() -> None:
    assert override_problems("method.kind=full") == (
        f"command line: method.kind: 'full' has no rank, alpha, dropout, targets, which {LORA} sets; "
        "replace the whole section: method='{kind: full}'",
    )


def test_a_key_of_another_kind_says_whose_it_is() -> None:
    (problem,) = problems_of(SMALL.replace("kind: lora", "kind: full\n  rank: 4"))
    assert problem.startswith("f.yaml:9: method.rank: kind 'full' has no such key, only ")
    assert "lora" in problem


# --- all problems at once --------------------------------------------------------------------------

BROKEN = """\
trainig:
  learning_rate: 0
  sceduhle: liner
method:
  knid: lroa
  rnak: '8'
task:
  kind: sequence_classification
  data:
    trian: 3
  txet: sentence
backbone:
  nmae: 5
  dtype: float8
extra: 1
"""


def test_all_problems_come_at_once_in_file_order() -> None:
    assert problems_of(BROKEN) == (
        "f.yaml:1: trainig: unknown key; did you mean 'training'?",
        "f.yaml:2: training.learning_rate: should be greater than 0, got 0",
        "f.yaml:3: training.sceduhle: unknown key; did you mean 'schedule'?",
        "f.yaml:3: training.schedule: 'liner' is not a choice; did you mean 'linear'?",
        "f.yaml:5: method.knid: unknown key; did you mean 'kind'?",
        "f.yaml:5: method.kind: no kind 'lroa'; did you mean 'lora'?",
        "f.yaml:6: method.rnak: unknown key; did you mean 'rank'?",
        "f.yaml:6: method.rank: should be a whole number, got '8'; write 8 without quotes",
        "f.yaml:10: task.data.trian: unknown key; did you mean 'train'?",
        "f.yaml:10: task.data.train: should be text, got 3",
        "f.yaml:11: task.txet: unknown key; did you mean 'text'?",
        "f.yaml:13: backbone.nmae: unknown key; did you mean 'name'?",
        "f.yaml:13: backbone.name: should be text, got 5",
        "f.yaml:14: backbone.dtype: 'float8' is not a choice; did you mean 'float16'?",
        "f.yaml:15: extra: unknown key; it can be: audit, backbone, engine, method, output, task, training",
    )


def test_what_the_file_lacks_and_the_command_line_come_last() -> None:
    text = SMALL.replace("method:\n  kind: lora\n", "").replace("name:", "nam:")
    document = parse_document(text, "f.yaml")
    document.tree["training"]["seed"] = -1
    document.overridden.add(("training", "seed"))
    with pytest.raises(ConfigError) as caught:
        validate(document)
    assert caught.value.problems == (
        "f.yaml:2: backbone.nam: unknown key; did you mean 'name'?",
        "f.yaml: method: missing",
        "command line: training.seed: should be greater than or equal to 0, got -1",
    )


def test_problems_between_keys_are_told_beside_misspelt_ones() -> None:
    text = f"{SMALL}  warmup_ratoi: 0.1\n  warmup_steps: 10\n"
    assert problems_of(text) == (
        "f.yaml:9: training: warmup_steps and warmup_ratio are both set; keep one",
        "f.yaml:11: training.warmup_ratoi: unknown key; did you mean 'warmup_ratio'?",
    )


# --- the name of a run, and the resolved run -------------------------------------------------------


def leaves(tree: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def other_value(value: Any) -> Sequence[str]:
    """Values to try in place of one; at least one of them is valid and different."""
    if isinstance(value, bool):
        return ["false" if value else "true"]
    if isinstance(value, (int, float)):
        return [str(value + 1), str(value / 2 + 0.1), "0.5"]
    words = ["token_classification", "full", "bfloat16", "float16", "mean", "sgd", "cosine", "bf16", "rslora", "dora"]
    return [*words, "gaussian", "7", "0.5", "[a, b]", "[f1]", "[{kind: swap}]", "{kind: focal}", "other", "{a: 1}"]


def replaced(section: Any, path: Path_, value: Any) -> Any:
    """The section with another value in one place, which nothing checks."""
    inner = value if len(path) == 1 else replaced(getattr(section, path[0]), path[1:], value)
    return section.model_copy(update={path[0]: inner})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_the_run_id_changes_with_every_setting_but_output_and_audit() -> None:
    run = overridden()
    seen = {run_id(run)}
    for path, value in leaves(settings_of(run)):
        if path[-1] == "kind":
            continue
        for other in other_value(value):
            try:
                changed = overridden(f"{'.'.join(path)}={other}")
            except UsageError:
                continue
            if changed != run:
                break
        else:
            changed = replaced(run, path, "other")  # of fields that are valid only beside others
        assert run_id(changed) not in seen, path
        seen.add(run_id(changed))
    assert run_id(overridden("method={kind: full}")) not in seen


def test_the_run_id_is_stable() -> None:
    run = overridden()
    assert run_id(run) == run_id(overridden("output.folder=elsewhere", "output.overwrite=true"))
    assert run_id(run) == run_id(overridden("training.checkpoint_every=5"))
    assert run_id(run) == run_id(overridden("audit.allow=[duplicates]", "audit.overlap=0.5"))
    tree = yaml.safe_load(LORA.read_text(encoding="utf-8"))
    tree["training"]["learning_rate"] = 0.001
    backwards = {name: dict(reversed(section.items())) for name, section in reversed(tree.items())}
    assert list(backwards) != list(tree)
    assert run_id(validate(parse_document(to_yaml(backwards), "f.yaml"))) == run_id(run)
    code = f"from pathlib import Path; from peftkit.config import *; print(run_id(load_run(Path({str(LORA)!r}))))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == run_id(run)
    assert len(run_id(run)) == 16
    assert set(run_id(run)) <= set(string.hexdigits.lower())


def test_a_default_that_is_written_out_is_the_same_run() -> None:
    assert run_id(overridden("training.optimizer=adamw", "method.variant=plain")) == run_id(overridden())


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_shipped_configuration_is_valid_and_gets_a_folder(file: Path) -> None:
    run = load_run(file)
    assert run.output.folder == f"runs/{file.stem}-{run_id(run)[:8]}"
    assert file.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_resolved_run_reads_back_as_the_same_run(file: Path, tmp_path: Path) -> None:
    run = load_run(file, [f"output.folder={tmp_path / 'run'}", "training.learning_rate=1e-7"])
    alone: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, num_processes=1, process_index=0)
    claim(run, alone)
    assert load_run(tmp_path / "run" / RUN_FILE) == run


@pytest.mark.parametrize(
    "text", ["1e5", "12e3456", "08", "010", "no", "yes", "null", "~", "", "true", "1.", "1_000", "12:30", "=", "<<"]
)
def test_texts_that_look_like_something_else_are_written_as_text(text: str) -> None:
    tree = {"a": {"b": text, "c": [text, 1e-7, None, True, 3]}}
    assert parse_document(to_yaml(tree), "f.yaml").tree == tree


def test_a_run_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        overridden().training.seed = 3  # type: ignore[misc]


# --- what is too much to read ----------------------------------------------------------------------


def bomb(levels: int) -> str:
    """Nine aliases of nine aliases …: some hundred bytes that mean 9 ** levels values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, levels)]
    return "".join(lines)


TOO_MUCH = {
    "as many keys": ("".join(f"k{i}: 1\n" for i in range(20_001)), "more than 20,000 keys and values"),
    "brackets": ("a: " + "[" * 5000, ":1: nested more than 50 deep, which is not read"),
    "dashes": ("a:\n" + "- " * 5000, ":2: nested more than 50 deep, which is not read"),
    "depth by aliases": (
        "a: &a " + "[" * 30 + "]" * 30 + "\nb: " + "[" * 30 + "*a" + "]" * 30,
        ":1: nested more than 50 deep, which is not read",
    ),
    "a long key": (f"? {'x' * 1000}\n: 1\n", ":1: the file: a key with 1,000 characters, where no name has more"),
    "a million digits": ("a: " + "1" * 10**5, f":1: a: {'1' * 99}… is too large for a number"),
    "more than 64 bits": ("a: 9223372036854775808", ":1: a: 9223372036854775808 is too large for a number"),
    "NUL": ('a: "x\\0"\n', ":1: a: a NUL character, which no setting has; leave it out"),
    "half a character": ('a: "x\\ud800"\n', ":1: a: half a character (\\ud800 to \\udfff alone); write both halves"),
    "half a character in a key": ('"x\\ud800": 1\n', ":1: the file: a key with half a character"),
}


@pytest.mark.parametrize(("text", "problem"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_is_too_much_is_one_problem(
    text: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text, encoding="utf-8")
    assert main(["validate", str(file)]) == 2
    told = capsys.readouterr().err
    assert problem in told
    assert told.count("\n") == 1
    assert len(told) < 500


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (bomb(10), "f.yaml:1: more than 20,000 keys and values, those that aliases repeat included, are not read"),
        (f"a: &a {'x' * 20_000}\nb: [{', '.join(['*a'] * 99)}]\n", "f.yaml:1: more than 1,048,576 characters of val"),
    ],
    ids=["a billion values", "a long text many times"],
)
def test_a_bomb_of_aliases_is_refused_before_time_or_memory_is_spent(text: str, problem: str) -> None:
    tracemalloc.start()
    start = time.process_time()  # not of the clock, which counts what else the machine does
    assert problems_of(text)[0].startswith(problem)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 5
    assert peak < 20 * 2**20


def test_files_that_are_no_configurations_are_refused_before_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "large.yaml").open("wb") as stream:
        stream.truncate(2**40)  # a hole, which takes no room on the disk
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    for name, message in {
        "large.yaml": "has more than 1,048,576 bytes, the most that is read of a configuration; keep settings in it",
        "pipe.yaml": "is no plain file; write what it gives into a file, and name that",
        "/dev/zero": "/dev/zero is no plain file",
        "latin.yaml": "latin.yaml: line 2 has byte 0xe9, which is not UTF-8; save it as UTF-8",
        "latin.yaml/more": "no configuration file",
        ".": "is a folder; name a configuration file in it",
        "x" * 300: "cannot read",
    }.items():
        assert main(["validate", str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


def test_of_a_file_with_thousands_of_problems_the_first_are_told() -> None:
    """Each name that was meant takes a while to find."""
    many = {
        "top": "".join(f"k{i}: 1\n" for i in range(2000)),
        "section": "".join(f"  k{i}: 1\n" for i in range(2000)),
        "changes": f"output:\n  allow_changes: [{', '.join(f'k{i}' for i in range(2000))}]\n",
        "lists": f"output:\n  allow_changes: [{', '.join('1' * 2000)}]\n",
    }
    for text in many.values():
        start = time.process_time()
        problems = problems_of(SMALL + text)
        assert len(problems) <= 101
        assert time.process_time() - start < 5
    assert problems[-1] == "… and more than these 100; mend them first"


def test_a_terminal_is_not_told_what_it_would_act_on() -> None:
    (problem,) = problems_of(SMALL + '  schedule: "\\e[2J\\n"\n')
    assert problem.startswith("f.yaml:11: training.schedule: '\\x1b[2J\\n' is not a choice")


@pytest.mark.parametrize("override", [".".join("a" * 60) + "=1", "a\udcff=1", f"{'a' * 300}=1"])
def test_an_override_of_what_is_no_key(override: str) -> None:
    with pytest.raises(UsageError, match=r"is no key of a configuration; write it as section\.key=value"):
        overridden(override)


def test_an_override_with_half_a_character_is_told_without_it() -> None:
    with pytest.raises(UsageError, match=r"^'output.folder=\\ud800': not valid YAML: character"):
        overridden("output.folder=\ud800")
