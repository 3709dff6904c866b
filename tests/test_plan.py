"""What a run will hold, without weights, against the same run with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from peftkit.backbones.layouts import layout_for
from peftkit.backbones.load import Backbone, chosen_config, resolve_config
from peftkit.backbones.modules import head_modules
from peftkit.cli import main
from peftkit.config import Run, load_run
from peftkit.data.collate import collate
from peftkit.methods.base import trained_parameters
from peftkit.planning.held import Trace
from peftkit.planning.ledger import Ledger
from peftkit.planning.machines import gpus, memory_size
from peftkit.planning.states import optimizer_bytes
from peftkit.planning.trace import attached, trace_model, traced
from peftkit.planning.workload import Workload, from_data
from peftkit.prepare import Prepared, prepare
from peftkit.training.optimizer import make_optimizer

WriteConfig = Callable[..., Path]
PADDED: dict[str, Any] = {"engine": {"padding_free": False}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "targets": "all"},
    "lora dropout": {"kind": "lora", "rank": 4, "targets": "all", "dropout": 0.1},
    "dora": {"kind": "lora", "rank": 4, "targets": "all", "variant": "dora"},
    "bottleneck": {"kind": "bottleneck", "bottleneck_size": 8},
    "prefix": {"kind": "prefix", "length": 4},
    "prompt": {"kind": "prompt", "length": 4},
    "full": {"kind": "full"},
}


def configured(write_config: WriteConfig, **sections: Any) -> Path:
    """A toy run whose sections, `task` among them, are replaced."""
    file = write_config()
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | sections))
    return file


def weigh(rows: int, longest: int, supervised: int) -> float:
    return rows * longest + supervised


def planned(run: Run) -> tuple[Prepared, Workload]:
    data = prepare(run)
    return data, from_data(run, data, 1, weigh)


def with_values(run: Run, data: Prepared, blocks: int | None = None) -> torch.nn.Module:
    """The run's model with random weights, built by transformers itself."""
    import transformers

    config = chosen_config(run.backbone, resolve_config(run.backbone))
    data.head.configure(config)
    dtype = getattr(torch, run.backbone.dtype)
    model = getattr(transformers, data.head.model_class).from_config(config, dtype=dtype)
    return run.method.attach(Backbone(model, None, layout_for(config.model_type), head_modules(model)), 100)


def figures(trace: Trace) -> dict[str, Any]:
    return {name: value for name, value in vars(trace).items() if name not in ("step", "predict")}


def completion(tmp_path: Path, backbone: Path, **sections: Any) -> dict[str, Any]:
    rows = [{"q": "the film was " * (1 + index % 3), "a": "good and bright"} for index in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "completion", "prompt_template": "{q}", "completion_template": " {a}", "max_length": 32}
    return {"backbone": {"name": str(backbone)}, "task": task | {"data": {"train": str(file)}}} | sections


@pytest.mark.parametrize(
    ("name", "variant"),
    [*((name, "plain") for name in METHODS), ("lora", "checkpointed"), ("full", "checkpointed"), ("lora", "bf16")],
)
def test_a_step_holds_without_values_what_it_holds_with_them(
    name: str, variant: str, write_config: WriteConfig
) -> None:
    training: dict[str, Any] = {"learning_rate": 0.01, "epochs": 1, "batch_size": 16, "micro_batch_size": 8}
    training |= {"plain": {}, "checkpointed": {"gradient_checkpointing": True}, "bf16": {"precision": "bf16"}}[variant]
    run = load_run(write_config(method=METHODS[name], training=training))
    data, work = planned(run)
    real = trace_model(Ledger(), with_values(run, data), run, work)
    assert figures(traced(run, data.head, work)) == figures(real)
    assert real.peak > real.weights


@pytest.mark.parametrize("variant", ["plain", "checkpointed", "bfloat16"])
def test_a_language_model_holds_its_logits(
    variant: str, tmp_path: Path, tiny_llama: Path, write_config: WriteConfig
) -> None:
    training: dict[str, Any] = {"learning_rate": 0.01, "epochs": 1, "batch_size": 8}
    sections = completion(tmp_path, tiny_llama, method=METHODS["lora"])
    if variant == "bfloat16":
        sections["backbone"]["dtype"] = "bfloat16"
    run = load_run(
        configured(write_config, **sections, training=training | {"gradient_checkpointing": variant == "checkpointed"})
    )
    data, work = planned(run)
    real = trace_model(Ledger(), with_values(run, data), run, work)
    assert figures(traced(run, data.head, work)) == figures(real)


def test_a_block_of_bert_keeps_what_its_equations_need(write_config: WriteConfig) -> None:
    """Of T tokens: the block's input; q, k, v; what attention gives, with a sum for each head, and its mask in float32;
    both sums that are normalised, with mean and deviation; the first normalised one; the FFN's inner values before and
    after GELU."""
    run = load_run(write_config(method=METHODS["full"], **PADDED))
    data, work = planned(run)
    two, three = (traced(run, data.head, work, blocks) for blocks in (2, 3))
    rows, longest = work.shape
    hidden, inner, heads = 32, 64, 4
    numbers = hidden + 3 * hidden + (hidden + heads + longest) + 2 * (hidden + 2) + hidden + 2 * inner
    assert three.kept - two.kept == 4 * rows * longest * numbers


def test_a_block_of_llama_keeps_what_its_equations_need(
    tmp_path: Path, tiny_llama: Path, write_config: WriteConfig
) -> None:
    """Of T tokens: twice a norm's input, its scale, the scaled and the weighted one; q, k, v after rotation; what
    attention gives, with a sum for each head, and its mask in float32; gate, SiLU of it, up, and their product.
    Queries are not grouped."""
    folder = tmp_path / "llama"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    run = load_run(configured(write_config, **completion(tmp_path, folder, method=METHODS["full"], **PADDED)))
    data, work = planned(run)
    two, three = (traced(run, data.head, work, blocks) for blocks in (2, 3))
    rows, longest = work.shape
    hidden, inner, heads = 32, 64, 4
    numbers = 2 * (3 * hidden + 1) + 3 * hidden + (hidden + heads + longest) + 4 * inner
    assert three.kept - two.kept == 4 * rows * longest * numbers


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_take_their_codes_and_scales(kind: str, write_config: WriteConfig, tiny_bert: Path) -> None:
    from peftkit.backbones.load import load
    from peftkit.backbones.quantize import packed

    backbone = {"name": str(tiny_bert), "quantization": {"kind": kind, "compute_dtype": "float32"}}
    backbone["quantization"] |= {"block_size": 32} if kind == "nf4" else {}
    run = load_run(configured(write_config, backbone=backbone))
    data, work = planned(run)
    loaded = load(run.backbone, data.head)
    codes: Any = packed(loaded.model)
    model = run.method.attach(loaded, 100)
    plain = [p for p in model.parameters() if p.dtype not in (torch.uint8, torch.int8)]
    plain += [one for name, one in model.named_buffers() if not name.endswith("scales")]
    trace = traced(run, data.head, work)
    assert trace.weights == codes.bytes + sum(one.nbytes for one in plain)
    real = trace_model(Ledger(), model, run, work)
    assert abs(trace.peak - real.peak) < 0.02 * real.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_deep_model_is_a_line_through_two_shallow_ones(
    method: str, checkpointing: bool, write_config: WriteConfig
) -> None:
    training = {"learning_rate": 0.01, "epochs": 1, "batch_size": 16, "gradient_checkpointing": checkpointing}
    run = load_run(write_config(method=METHODS[method], training=training))
    data, work = planned(run)
    two, three, seven = (traced(run, data.head, work, blocks) for blocks in (2, 3, 7))
    assert vars(three.with_blocks(two, 7)) == vars(seven)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_gradients_and_states_are_those_of_a_real_step(
    optimizer: str, method: str, write_config: WriteConfig
) -> None:
    training = {"learning_rate": 0.01, "epochs": 1, "batch_size": 16, "optimizer": optimizer}
    run = load_run(write_config(method=METHODS[method], training=training))
    data, work = planned(run)
    model = with_values(run, data)
    found = make_optimizer(model, run.training, run.method)
    batch = collate(work.micro_batches[0], work.pad_id)
    run.task.summed_loss(model, batch, torch.tensor(work.class_weights)).backward()
    gradients = sum(p.grad.nbytes for p in trained_parameters(model).values() if p.grad is not None)
    found.step()
    # what the factored optimizer keeps as plain numbers takes four bytes a parameter here
    states = sum(
        value.nbytes if isinstance(value, torch.Tensor) else 4
        for state in found.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) or name == "RMS"
    )
    trace = traced(run, data.head, work)
    assert (trace.trained, trace.state) == (gradients, states)
    assert trace.state == optimizer_bytes(optimizer, trained_parameters(model).values())
    assert trace.trained_parameters == sum(p.numel() for p in trained_parameters(model).values())


def test_planning_leaves_the_random_numbers_of_the_run_alone(write_config: WriteConfig) -> None:
    run = load_run(write_config())
    data, work = planned(run)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    traced(run, data.head, work)
    assert torch.equal(torch.rand(4), expected)


def test_nothing_of_the_model_is_allocated(write_config: WriteConfig) -> None:
    run = load_run(write_config())
    data, _ = planned(run)
    assert {p.device.type for p in attached(run, data.head).parameters()} == {"meta"}


def test_gpus_are_read_in_the_ways_people_write_them() -> None:
    assert gpus("4xA100-80GB").count == 4
    assert gpus("a100").name == gpus("A100-80GB").name == gpus("NVIDIA A100 80GB".replace(" 80", "-80")).name
    assert gpus("2 × rtx 4090").count == 2
    assert memory_size("1.5GiB") == 3 * 2**29
    assert memory_size("24GB") == 24 * 10**9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "4xA10O"], "--gpus"),
        (["--gpus", "0xT4"], "--gpus"),
        (["--memory", "lots"], "--memory"),
        (["--memory", "0GiB"], "--memory"),
        (["--processes", "0"], "--processes"),
        (["--compare", "lora,nonsense"], "nonsense"),
    ],
)
def test_what_cannot_be_read_is_said_once(
    arguments: list[str], words: str, write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(write_config()), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_a_plan_compares_methods_and_shows_what_would_fit(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(write_config()), "--gpus", "T4", "--compare", "lora,full", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["change"] is None
    lora, full = found["compare"]
    assert lora["peak_bytes"] == found["peak_bytes"]
    assert full["trained_parameters"] > lora["trained_parameters"]
    limit = found["peak_bytes"] - 1
    assert main([*arguments[:-1], "--json", "--memory", f"{limit / 2**20:.6f}MiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert found["change"]["peak_bytes"] <= limit
    assert "=" in found["change"]["set"]


def test_without_data_every_text_is_as_long_as_allowed(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"train": "nowhere.tsv", "test": "nowhere.tsv"}
    task = {"kind": "sequence_classification", "data": data, "max_length": 24}
    assert main(["plan", str(configured(write_config, task=task)), "--gpus", "T4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "upper bound" in found["batches"] and "nowhere.tsv" in found["batches"]
    assert found["micro_batch"] == [16, 24]
    budget = ["training.micro_batch_tokens=100"]
    assert main(["plan", str(configured(write_config, task=task)), "--gpus", "T4", "--json", *budget]) == 0
    assert json.loads(capsys.readouterr().out)["micro_batch"] == [4, 24]


def test_micro_batches_have_no_more_tokens_than_they_may(write_config: WriteConfig) -> None:
    training = {"learning_rate": 0.01, "epochs": 1, "batch_size": 16, "micro_batch_tokens": 40}
    data, work = planned(load_run(write_config(training=training)))
    rows, longest = work.shape
    assert rows * longest <= 40 < (rows + 1) * longest
    assert work.step_parts > 16 * min(data.train.encoded.lengths) / 40


SEVENTY = """
import json, resource, sys, time
from peftkit.cli import main
start = time.process_time()
code = main(["plan", sys.argv[1], "--gpus", "8xH100", "--accelerate", "fsdp2", "--json"])
print(json.dumps([code, time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""


def test_the_page_says_what_was_measured() -> None:
    import runpy

    root = Path(__file__).parents[1]
    runs = json.loads((root / "benchmarks" / "results" / "plan.json").read_text())["runs"]
    page = (root / "docs" / "plan.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(root / "benchmarks" / "plan.py"))["as_markdown"](runs) in page


def test_a_training_is_expected_to_share_what_its_processes_share() -> None:
    from types import SimpleNamespace

    from peftkit.planning.announced import _sharding
    from peftkit.planning.estimate import SHARDING
    from peftkit.training.sharding import Sharding

    found = [
        _sharding(SimpleNamespace(num_processes=processes, sharding=sharding))
        for processes, sharding in ((1, None), (2, None), (2, Sharding()))
    ]
    assert tuple(found) == SHARDING == ("none", "ddp", "fsdp2")


def test_every_optimizer_can_be_planned() -> None:
    from peftkit.config import TrainingSettings
    from peftkit.planning.estimate import TEMPORARIES
    from peftkit.planning.states import OF_ONE

    names = set(get_args(TrainingSettings.model_fields["optimizer"].annotation))
    assert OF_ONE.keys() == TEMPORARIES.keys() == names


def test_seventy_billion_parameters_take_seconds_and_little_memory(tmp_path: Path, write_config: WriteConfig) -> None:
    from transformers import LlamaConfig

    folder = tmp_path / "seventy"
    LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    sections = completion(tmp_path, folder, method={"kind": "lora", "rank": 16, "targets": "all"})
    sections["backbone"]["dtype"] = "bfloat16"
    sections["task"]["max_length"] = 2048
    training = {"learning_rate": 1e-4, "max_steps": 100, "batch_size": 8, "gradient_checkpointing": True}
    file = configured(write_config, **sections, training=training)
    done = subprocess.run(
        [sys.executable, "-c", SEVENTY, str(file)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.strip().splitlines()
    code, seconds, gib = json.loads(last)
    found = json.loads("\n".join(text))
    assert code == 0
    assert found["parameters"] == 70_553_706_496 + 207_093_760  # Llama-2's paper has 70 billion with 32,000 tokens
    assert seconds < 60
    assert gib < 2
