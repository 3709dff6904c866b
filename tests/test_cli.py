"""The command line and the recipes as a person meets them: real processes, exit codes, what is on the screen."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkit import console, shipped
from peftkit.cli import _parsers, main
from peftkit.console import guard
from peftkit.errors import ConfigError, UsageError

RECIPES = Path(__file__).parents[1] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
LORA = RECIPES / "configs" / "sst2_lora.yaml"
VERBS = sorted(_parsers()[1])
Finished = subprocess.CompletedProcess[str]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def python(*arguments: object, folder: Path | None = None) -> Finished:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


def peftkit(*arguments: object, folder: Path | None = None) -> Finished:
    return python("-m", "peftkit.cli", *arguments, folder=folder)


# --- quick, and without what takes seconds to import -----------------------------------------------


def test_the_quick_verbs_import_nothing_heavy(tmp_path: Path) -> None:
    calls = [["--help"], *([verb, "--help"] for verb in VERBS), ["ls"], ["schema"], ["validate", str(LORA)]]
    calls += [["cp", "sst2_lora", str(tmp_path)], ["train", str(tmp_path / "absent.yaml")], ["trian"], ["predict"]]
    code = (
        "import json, sys\n"
        "from peftkit.cli import main\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        main(call)\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, call\n"
        "    heavy = {'torch', 'peft', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, (call, heavy)\n"
    )
    done = python("-c", code, json.dumps(calls))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sst2_lora.yaml").is_file()


@pytest.mark.parametrize("arguments", [["--help"], ["validate", str(LORA)]], ids=["help", "validate"])
def test_the_quick_verbs_are_quick(arguments: list[str]) -> None:
    """Beside the import of torch, because how fast machines are differs, and one machine's speed from hour to hour."""

    def least(call: Callable[[], Finished]) -> float:
        seconds = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert call().returncode == 0
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            # the processor's, which other work does not lengthen as it does the clock's
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(seconds)

    assert least(lambda: peftkit(*arguments)) <= 0.4 * least(lambda: python("-c", "import torch"))


# --- each verb -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: peftkit {verb}")


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert set(VERBS) <= set(re.findall(r"^    (\S+(?: \w+)?)(?:  |$)", shown, re.MULTILINE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the following arguments are required: VERB; `peftkit --help` shows what there is\n"),
        (["trian"], "error: no verb 'trian'; did you mean 'train'?\n"),
        (["--verbose"], "error: "),
        (
            ["train"],
            "error: the following arguments are required: CONFIG; `peftkit train --help` shows what there is\n",
        ),
        (["train", "absent.yaml"], "error: no configuration file absent.yaml; `peftkit ls` lists what is shipped\n"),
        (["train", str(LORA), "--quick"], "error: unrecognized arguments: --quick; `peftkit train --help`"),
        (["validate", str(LORA), "rank"], "error: 'rank' is not an override; write it as section.key=value\n"),
        (["merge", "one"], "error: the following arguments are required: OUT; `peftkit merge --help`"),
        (["merge", "a", "b", "--probe-rows", "many"], "error: argument --probe-rows: many is not a positive number"),
        (["params"], "error: the following arguments are required: --backbone; `peftkit params --help`"),
        (["cp", "sst2_loar"], "error: nothing is shipped as 'sst2_loar'; did you mean 'sst2_lora.yaml'?\n"),
        (["fetch", "minilmm"], "error: there is no bundled backbone or data set 'minilmm'; did you mean 'minilm'?\n"),
        (["evaluate", "absent"], "error: no run folder absent\n"),
        (["predict", "absent", "a text"], "error: no run folder absent\n"),
    ],
)
def test_a_wrong_request_ends_with_two_and_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1


def test_several_problems_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("methd:\n  knd: lora\n", encoding="utf-8")
    done = peftkit("validate", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: 5 problems",
        f"  {file}:1: methd: unknown key; did you mean 'method'?",
        f"  {file}:2: method.knd: unknown key; did you mean 'kind'?",
        *(f"  {file}: {section}: missing" for section in ("backbone", "task", "training")),
    ]


def test_ls_shows_every_recipe_and_configuration_with_a_summary() -> None:
    lines = peftkit("ls").stdout.splitlines()
    for file in (*RECIPES.glob("*.py"), *CONFIGS):
        (line,) = [line for line in lines if line.split()[0] == file.name]
        assert len(line.split()) > 3, line


def test_cp_never_overwrites(tmp_path: Path) -> None:
    assert peftkit("cp", "sst2_lora", folder=tmp_path).stdout == "wrote sst2_lora.yaml\n"
    mine = tmp_path / "sst2_lora.yaml"
    assert mine.read_bytes() == LORA.read_bytes()
    mine.write_text("mine", encoding="utf-8")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    for target, named in (([], "sst2_lora.yaml"), ([mine], mine), ([tmp_path], mine), (["dangling"], "dangling")):
        done = peftkit("cp", "sst2_lora.yaml", *target, folder=tmp_path)
        assert (done.returncode, done.stderr) == (2, f"error: {named} exists; name another file\n")
    assert mine.read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "elsewhere").exists()
    done = peftkit("cp", "lora.py", "absent/lora.py", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: no folder absent\n")


def test_every_shipped_file_can_be_copied(tmp_path: Path) -> None:
    for file in (*shipped.recipes(), *shipped.configs(), *shipped.sequences()):
        assert shipped.copy(file.name, tmp_path).read_bytes() == file.read_bytes()


def test_schema_is_a_json_schema_that_knows_every_key_of_the_shipped_configurations() -> None:
    schema = json.loads(peftkit("schema").stdout)
    assert schema["required"] == ["backbone", "task", "method", "training"]
    for file in CONFIGS:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        if tree["method"]["kind"] == "prompting":
            tree.setdefault("training", {})  # which a method that trains nothing may do without
        assert_covers(schema, schema, tree)


def assert_covers(schema: dict[str, Any], node: dict[str, Any], tree: dict[str, Any]) -> None:
    while "properties" not in node:
        if isinstance(node.get("additionalProperties"), dict):
            return  # names of the user's own
        if "discriminator" in node:
            node = {"$ref": node["discriminator"]["mapping"][tree["kind"]]}
        choices = [one for one in node.get("anyOf", node.get("oneOf", ())) if one.get("type", "object") == "object"]
        node = choices[0] if choices else schema["$defs"][node["$ref"].rpartition("/")[2]]
    is_open = tree.get("kind") == "peft"  # whose other fields are peft's own
    assert node["additionalProperties"] is is_open
    assert set(node.get("required", ())) <= tree.keys()
    assert is_open or tree.keys() <= node["properties"].keys()
    for key, value in tree.items():
        if isinstance(value, dict):
            assert_covers(schema, node["properties"][key], value)


def test_validate_names_what_is_not_on_this_machine(tmp_path: Path) -> None:
    done = peftkit("validate", LORA, "task.data={train: absent.tsv}")
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{LORA}: valid (run ")
    assert second.startswith("not on this machine: ")
    assert "absent.tsv" in second
    assert (done.returncode, done.stderr) == (0, "")


def test_env_prints_versions() -> None:
    import torch

    found = json.loads(peftkit("env").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cores"] == os.cpu_count()
    assert isinstance(found["gpus"], list)


def test_options_and_positional_arguments_mix() -> None:
    verbs = _parsers()[1]
    options = verbs["predict"].parse_intermixed_args(["run", "--text-pair", "b", "a", "--file", "f", "c"])
    assert (options.texts, options.text_pair, options.file) == (["a", "c"], ["b"], Path("f"))
    options = verbs["evaluate"].parse_intermixed_args(["--json", "run", "--data", "file"])
    assert (options.run, options.json, options.data) == (Path("run"), True, Path("file"))
    assert verbs["train"].parse_intermixed_args(["file"]).overrides == []


# --- how it ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["ls", "schema", "--help"])
def test_a_reader_that_goes_away_is_no_error(verb: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "peftkit.cli", verb]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment(), timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_other_processes_leave_the_telling_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(console.time, "sleep", waited.append)

    def fail() -> None:
        raise UsageError("wrong")

    for rank, seconds in (("0", []), ("1", [console.PATIENCE])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert guard(fail) == 2
        assert waited == seconds
        # what only another process knows is not lost
        assert capsys.readouterr().err == "error: wrong\n"


def test_problems_of_one_and_of_many_read_well(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*problems: str) -> Callable[[], None]:
        def action() -> None:
            raise ConfigError(problems)

        return action

    assert guard(fail("one")) == 2
    assert guard(fail("one", "two")) == 2
    assert capsys.readouterr().err == "error: one\nerror: 2 problems\n  one\n  two\n"


def test_an_error_that_nobody_foresaw_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guard(lambda: 1 / 0)


# --- recipes ---------------------------------------------------------------------------------------


OF_RUNS = sorted(file for file in RECIPES.glob("*.py") if file.stem != "continual")


@pytest.mark.parametrize("recipe", OF_RUNS, ids=lambda file: file.stem)
def test_a_recipe_refuses_the_configuration_of_another_method(recipe: Path) -> None:
    takes_lora = recipe.stem in ("lora", "qlora", "from_peft")
    other = RECIPES / "configs" / ("sst2_full.yaml" if takes_lora else "sst2_lora.yaml")
    done = python(recipe, "--config", other)
    assert (done.returncode, done.stdout) == (2, "")
    kind = "full" if takes_lora else "lora"
    assert done.stderr.startswith(f"error: {other}: this recipe trains '")
    assert done.stderr.endswith(f"', not '{kind}'\n")
    assert done.stderr.count("\n") == 1


def test_the_recipe_of_sequences_refuses_the_configuration_of_a_run() -> None:
    done = python(RECIPES / "continual.py", "--config", RECIPES / "configs" / "sst2_lora.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sst2_lora.yaml:4: task: unknown key; did you mean 'tasks'?" in done.stderr


def test_a_recipe_without_a_configuration_says_what_it_needs() -> None:
    done = python(RECIPES / "lora.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the following arguments are required: --config; ")


def test_a_usage_error_appears_once_under_two_processes(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(LORA.read_text(encoding="utf-8").replace("rank:", "rnak:"), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, str(RECIPES / "lora.py")]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--config", str(file)],
        env=environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("method.rnak: unknown key; did you mean 'rank'?") == 1
    assert time.monotonic() - started < 60
