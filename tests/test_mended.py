"""Faults that once were, each with the test that showed it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import peftkit
from peftkit.cli import main
from peftkit.config import Run, load_run
from peftkit.errors import UsageError
from peftkit.tasks import SequenceClassification


def test_class_weights_can_be_a_list_in_yaml(write_config: Callable[..., Path], toy_data: Path) -> None:
    weights = "task.loss={kind: weighted, weights: [0.5, 2.5]}"
    assert load_run(write_config(), [weights]).task.loss.class_weights([1, 1]) == [0.5, 2.5]


def test_the_schema_takes_names_of_losses_and_metrics() -> None:
    schema = Run.model_json_schema()
    task = schema["$defs"]["SequenceClassification"]["properties"]
    assert "weighted" in json.dumps(task["loss"])
    assert {"type": "string"} in task["metrics"]["items"]["anyOf"]


def test_the_adapter_is_the_same_file_from_every_process(tmp_path: Path, tiny_bert: Path) -> None:
    """peft keeps targets in a set, whose order follows the process's hash seed."""
    code = (
        "import sys; from pathlib import Path; import peftkit\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "from transformers.utils import logging; logging.disable_progress_bar()\n"
        "method = peftkit.LoRA(rank=2, targets='query+value+up')\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "method.save(peftkit.attach(model, method), Path(sys.argv[2]))\n"
    )
    texts = set()
    for seed in ("1", "2", "3"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {"PYTHONHASHSEED": seed, "PATH": "", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", code, str(tiny_bert), str(folder)], check=True, env=environment)
        texts.add((folder / "adapter_config.json").read_text())
    assert len(texts) == 1


def test_all_missing_files_are_told_before_anything_else(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = "task.data={train: absent/train.jsonl, test: '${NO_SUCH_FOLDER}/test.jsonl'}"
    assert main(["train", str(write_config()), files]) == 2
    told = capsys.readouterr().err
    assert "absent/train.jsonl: no such file" in told
    assert "NO_SUCH_FOLDER is not set" in told
    assert not (tmp_path / "run").exists()


def test_inputs_longer_than_the_backbone_takes_are_refused(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_config()), "task.max_length=65"]) == 2
    assert "takes at most 64 tokens" in capsys.readouterr().err


def test_full_fine_tuning_of_half_precision_is_refused_by_validate(
    write_config: Callable[..., Path], tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(backbone={"name": str(tiny_bert), "dtype": "bfloat16"}, method={"kind": "full"})
    assert main(["validate", str(config)]) == 2
    assert "backbone.dtype: float32" in capsys.readouterr().err


def test_two_processes_cannot_train_into_one_folder(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    other = FileLock(folder / ".lock")
    with other:
        assert main(["train", str(write_config())]) == 2
    assert "another process is training into" in capsys.readouterr().err
    assert main(["train", str(write_config())]) == 0
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("verb", ["train", "merge"])
def test_a_target_under_a_file_is_refused_before_any_work(
    verb: str, write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    if verb == "train":
        arguments = [str(write_config()), f"output.folder={file / 'run'}"]
    else:
        assert main(["train", str(write_config()), "training.max_steps=1"]) == 0
        arguments = [str(tmp_path / "run"), str(file / "merged")]
    assert main([verb, *arguments]) == 2
    assert f"{file} is a file" in capsys.readouterr().err


def test_input_that_is_not_utf8_is_one_error(write_config: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["train", str(write_config()), "training.max_steps=1"]) == 0
    command = [sys.executable, "-m", "peftkit.cli", "predict", str(tmp_path / "run")]
    done = subprocess.run(command, input=b"caf\xe9 good\n", capture_output=True)
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr


def test_texts_and_second_texts_must_be_as_many() -> None:
    task = SequenceClassification(text="a", text_pair="b")
    with pytest.raises(UsageError, match="1 texts and 2 second texts"):
        task.rows_from_text(["one"], ["two", "three"])


@pytest.mark.parametrize("count", ["0", "-3"])
def test_a_merge_is_compared_on_some_rows(count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path), str(tmp_path / "out"), f"--probe-rows={count}"]) == 2
    assert "not a positive number" in capsys.readouterr().err


def test_a_warm_up_longer_than_the_run_is_refused(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_config()), "training.warmup_steps=40"]) == 2
    assert "40 of 40 steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_relative_backbone_is_found_from_elsewhere(
    write_config: Callable[..., Path], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(backbone={"name": tiny_bert.name})
    monkeypatch.chdir(tiny_bert.parent)
    assert main(["train", str(config), "training.max_steps=1"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(tmp_path / "run"), "good film"]) == 0


def test_other_rows_from_python_are_another_run(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{word} film", "label": word} for word in ("good", "bad")] * 8
    run = peftkit.Run(
        audit={"allow": ("duplicates", "overlap-dev", "overlap-test")},
        backbone=peftkit.Backbone(name=str(tiny_bert)),
        task=SequenceClassification(max_length=16),
        method=peftkit.HeadOnly(),
        training=peftkit.Training(learning_rate=0.01, max_steps=1, batch_size=4),
    )
    folders = {
        peftkit.train(run, peftkit.splits_from(train=some, dev=some, test=some)).folder for some in (rows, rows[:8])
    }
    assert len(folders) == 2


@pytest.mark.parametrize("revision", ["1e5", "08", "no", "12e3456"])
def test_run_yaml_keeps_text_that_looks_like_a_number(
    revision: str, write_config: Callable[..., Path], tiny_bert: Path, tmp_path: Path
) -> None:
    config = write_config(backbone={"name": str(tiny_bert)})
    assert main(["train", str(config), f"backbone.revision='{revision}'", "training.max_steps=1"]) == 0
    assert load_run(tmp_path / "run" / "run.yaml").backbone.revision == revision
