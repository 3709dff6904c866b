"""Faults that once were, each with the test that showed it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit.cli import main
from peftkit.config import Run, load_run


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


@pytest.mark.parametrize("revision", ["1e5", "08", "no", "12e3456"])
def test_run_yaml_keeps_text_that_looks_like_a_number(
    revision: str, write_config: Callable[..., Path], tiny_bert: Path, tmp_path: Path
) -> None:
    config = write_config(backbone={"name": str(tiny_bert)})
    assert main(["train", str(config), f"backbone.revision='{revision}'", "training.max_steps=1"]) == 0
    assert load_run(tmp_path / "run" / "run.yaml").backbone.revision == revision
