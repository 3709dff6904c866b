"""The shipped configurations that shard, launched on two CPU processes: what comes out is what one process gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_jobs import LIMIT, launched

from peftkit.cli import main

NF4 = {"quantization": {"kind": "nf4", "block_size": 32, "compute_dtype": "float32"}}


@pytest.mark.parametrize(("name", "held"), [("fsdp2", {}), ("fsdp2_qlora", NF4)])
def test_a_sharded_run_is_that_of_one_process(
    name: str, held: dict[str, Any], tiny_bert: Path, toy_data: Path, tmp_path: Path
) -> None:
    data = {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")}
    config = {
        "backbone": {"name": str(tiny_bert)} | held,
        "task": {"kind": "sequence_classification", "data": data, "max_length": 32},
        "method": {"kind": "lora", "rank": 4, "targets": "all"},
        "training": {"learning_rate": 0.003, "max_steps": 5, "evaluate_every": 3, "batch_size": 16, "keep_best": False},
        "output": {"folder": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with launched(tmp_path, accelerate=name) as job:
        printed, said = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, said
    assert re.search(r"sharded +[\d.]+ MiB of weights over 2 processes; [\d.]+ MiB whole in each", printed)

    assert main(["train", str(tmp_path / "run.yaml"), f"output.folder={tmp_path / 'one'}"]) == 0
    two, one = (load_file(tmp_path / place / "adapter" / "adapter_model.safetensors") for place in ("run", "one"))
    assert two.keys() == one.keys()
    for tensor in two:
        torch.testing.assert_close(two[tensor], one[tensor], rtol=0, atol=1e-4)
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
