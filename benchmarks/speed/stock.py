"""The process of a stock arm: transformers' Trainer alone or with peft, TRL's SFTTrainer, or `adapters`.

    python -m benchmarks.speed.stock '{"plan": …, "tool": "trainer", "is_tuned": false, "attention": null}'

prints its figures as one line of JSON. Steps begin from the weights of the plan, and take its batches in their order,
but for arms that group examples by length.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.speed.plan import ADAPTER, HEADS, Plan, read_plan
from peftkit.data.collate import collate
from peftkit.errors import JobError
from peftkit.memory import peak_resident_bytes, reset_peak, resident_bytes

PACKAGES = {"trainer": ("peft",), "trl": ("trl", "peft"), "adapters": ("adapters",)}
"""What each tool needs beside torch and transformers."""
ATTENTIONS = ("sdpa", "eager")
SCHEDULES = {"constant": "constant_with_warmup"}


class Clock:
    """When each step ended, its loss, and the real tokens that it saw."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.ended: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []

    @property
    def step_seconds(self) -> list[float]:
        """From the end of one step to that of the next; the first from where it began."""
        assert self.started is not None
        return [after - before for before, after in pairwise([self.started, *self.ended])]


def train(
    folder: Path,
    tool: str,
    is_tuned: bool,
    attention: str | None,
    ready: Callable[[Any], object] | None = None,
    is_bfloat16: bool | None = None,
) -> dict[str, Any]:
    """Train as a plan says; returns the figures of the arm.

    Args:
        attention: transformers' name of it; None: what transformers takes by itself.
        ready: called with the model before the first step.
        is_bfloat16: weights and autocast; default: where it is tuned.
    """
    import torch
    import transformers

    plan, clock = read_plan(folder), Clock()
    # what is resident before the backbone loads has all libraries in it
    for name in PACKAGES[tool]:
        import_module(name)
    assert transformers.Trainer
    assert getattr(transformers, plan.model_class)
    reset_peak()
    before = resident_bytes()
    half = is_tuned if is_bfloat16 is None else is_bfloat16
    model = prepared_model(plan, folder, tool, half, attention)
    if ready:
        ready(model)
    with tempfile.TemporaryDirectory() as output:
        trainer_of(plan, model, tool, is_tuned, half, output, clock).train()
    peak = peak_resident_bytes()
    if plan.method == "lora" and not any(
        "lora_B" in name and bool(one.any()) for name, one in model.named_parameters()
    ):
        raise JobError(f"{tool}: B is zero in every layer, as it was before: LoRA was not trained")
    figures = {
        "tokens": sum(clock.tokens),
        "step_tokens": clock.tokens,
        "step_seconds": clock.step_seconds,
        "losses": clock.losses,
        "peak_bytes": peak,
        "growth_bytes": peak - before,
        "attention": attention or "",
        "versions": {name: version(name) for name in ("transformers", *PACKAGES[tool])},
    }
    if torch.cuda.is_available():
        figures["growth_bytes"] = torch.cuda.max_memory_allocated()
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return figures


def prepared_model(plan: Plan, folder: Path, tool: str, is_bfloat16: bool, attention: str | None) -> Any:
    """The model with what trains in it, at the weights of the plan where the tool gives them the same names."""
    import torch
    import transformers
    from safetensors.torch import load_file

    how = {"attn_implementation": attention} if attention else {}
    model = getattr(transformers, plan.model_class).from_pretrained(
        plan.backbone,
        config=transformers.AutoConfig.from_pretrained(folder),
        dtype=torch.bfloat16 if is_bfloat16 else torch.float32,
        **how,
    )
    if (folder / HEADS).is_file():
        left = model.load_state_dict(load_file(folder / HEADS), strict=False)
        assert not left.unexpected_keys
    if plan.method == "full":
        return model
    settings = json.loads((folder / ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    if tool == "adapters":
        import adapters

        adapters.init(model)
        config = adapters.LoRAConfig(
            r=settings["r"], alpha=settings["lora_alpha"], dropout=settings["lora_dropout"],
            attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True,
        )  # fmt: skip
        model.add_adapter("speed", config=config)
        model.train_adapter("speed")
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder / ADAPTER, is_trainable=True)


def trainer_of(plan: Plan, model: Any, tool: str, is_tuned: bool, is_bfloat16: bool, output: str, clock: Clock) -> Any:
    """The tool's trainer, at its defaults but for what the plan sets; tuned where it is asked to be."""
    import transformers

    settings, tuned = plan.training, {}
    common = {
        "output_dir": output, "per_device_train_batch_size": settings["batch_size"], "max_steps": len(plan.batches),
        "learning_rate": settings["learning_rate"], "weight_decay": settings["weight_decay"],
        "warmup_steps": plan.warmup_steps, "max_grad_norm": settings["max_gradient_norm"] or 0.0,
        "lr_scheduler_type": SCHEDULES.get(settings["schedule"], settings["schedule"]), "seed": settings["seed"],
        "save_strategy": "no", "report_to": "none", "logging_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "use_cpu": not _has_gpu(),
    }  # fmt: skip
    if is_tuned:
        tuned = {"train_sampling_strategy": "group_by_length"}
    if is_tuned and tool == "trl":
        tuned["gradient_checkpointing"] = False  # its own default recomputes activations
    if is_bfloat16:
        tuned["bf16"] = True
    examples: Any = [one for batch in plan.batches for one in batch]
    given = {"model": model, "callbacks": [_callback(clock)]}
    if tool == "trl":
        import datasets
        import trl

        return _measured(trl.SFTTrainer, clock, is_tuned)(
            args=trl.SFTConfig(**common, **tuned, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=datasets.Dataset.from_list(examples),
            processing_class=transformers.AutoTokenizer.from_pretrained(plan.tokenizer),
            **given,
        )
    base = transformers.Trainer
    if tool == "adapters":
        import adapters

        base = adapters.AdapterTrainer
    return _measured(base, clock, is_tuned)(
        args=transformers.TrainingArguments(**common, **tuned),
        train_dataset=examples,
        data_collator=lambda features: collate(features, plan.pad_id),
        **given,
    )


def fastest_attention(folder: Path, repeats: int = 3) -> dict[str, Any]:
    """Which attention the tuned model trains fastest with, by whole steps of its first batches."""
    import torch

    plan = read_plan(folder)
    seconds = {}
    for name in ATTENTIONS:
        model = prepared_model(plan, folder, "trainer", True, name).train()
        times = []
        for examples in (plan.batches * repeats)[: repeats + 1]:
            batch = collate(examples, plan.pad_id)
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            model.zero_grad()
            times.append(time.perf_counter() - start)
        seconds[name] = sorted(times[1:])[repeats // 2]  # the first one sets things up
    return {"attention": min(seconds, key=lambda name: seconds[name]), "seconds": seconds}


def _measured(base: Any, clock: Clock, is_free: bool) -> Any:
    """A trainer that keeps its losses and, unless it is free to choose, takes the examples in their order."""

    class Measured(base):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            if is_free:
                return super()._get_train_sampler(*args, **kwargs)
            from torch.utils.data import SequentialSampler

            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.tokens.append(int(inputs["attention_mask"].sum()))
            found = super().compute_loss(model, inputs, *args, **kwargs)
            loss = found[0] if isinstance(found, tuple) else found
            clock.losses.append(float(loss.detach()))
            return found

    return Measured


def _callback(clock: Clock) -> Any:
    import transformers

    class Watching(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if clock.started is None:
                clock.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.ended.append(time.perf_counter())

    return Watching()


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    where = Path(asked.pop("plan"))
    print(json.dumps(fastest_attention(where) if asked.pop("choose", False) else train(where, **asked)))
