"""AdaLoRA against the paper's equations in float64, plain peft, and itself uninterrupted."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import peftkit
from peftkit.artifacts.store import save
from peftkit.backbones.load import Backbone, load, wrap
from peftkit.cli import main
from peftkit.config import Run, load_run
from peftkit.disk import file_sha256
from peftkit.errors import MethodError
from peftkit.evaluation import evaluate
from peftkit.methods import AdaLoRA
from peftkit.methods.adalora_allocation import kept_triplets, triplet_scores
from peftkit.methods.base import trained_parameters
from peftkit.prepare import Prepared, prepare
from peftkit.session import start
from peftkit.training import batches, loop
from peftkit.training.loop import train
from peftkit.training.record import TrainRecord

METHOD = {"kind": "adalora", "target_rank": 2, "initial_rank": 4, "alpha": 8}
TRAINING = {"learning_rate": 0.01, "epochs": 3, "batch_size": 16, "seed": 1}  # 30 steps
MATRICES, STEPS, WARMUP, LAST = 12, 30, 4, 17
"""Of the tiny BERT; round(.12 × 30) = 4 steps of warm-up, the last reallocation round(.44 × 30) = 13 before the end."""
IDS = torch.tensor([[2, 10, 11, 12, 13, 3], [4, 20, 21, 22, 23, 24]])
LABELS = torch.tensor([0, 1])

WriteConfig = Callable[..., Path]


@pytest.fixture
def pictures() -> None:
    """For tests that look at what is drawn, which takes as long as the toy training itself."""


@pytest.fixture(autouse=True)
def _draw_only_if_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("peftkit.training.loop.learning_curve", lambda *_: None)
        monkeypatch.setattr("peftkit.methods.adalora_picture.draw_trajectory", lambda *_: None)


@pytest.fixture
def make_run(write_config: WriteConfig, tmp_path: Path) -> Callable[..., Run]:
    """A toy run in a folder of its own."""
    count = itertools.count()

    def make(method: dict[str, Any] | None = None, folder: str = "", **training: Any) -> Run:
        where = {"folder": str(tmp_path / (folder or f"run{next(count)}"))}
        return load_run(write_config(method=METHOD | (method or {}), training=TRAINING | training, output=where))

    return make


def attached(run: Run) -> tuple[Prepared, Backbone, Any]:
    start(run)
    data = prepare(run)
    backbone = load(run.backbone, data.head)
    return data, backbone, run.method.attach(backbone, run.training.total_steps(len(data.train)))


def trained(run: Run) -> tuple[TrainRecord, Any]:
    """The run without the evaluations around it."""
    data, _, model = attached(run)
    return train(model, run, data, start(run)), model


def events(run: Run, key: str = "loss") -> list[dict[str, Any]]:
    lines = (folder_of(run) / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if key in event]


def folder_of(run: Run) -> Path:
    assert run.output.folder
    return Path(run.output.folder)


def paper_budget(step: int, first: int, final: int, warmup: int, last: int) -> float:
    """The authors' schedule: all of the first budget, then a cubic fall, then the final one."""
    if step <= warmup:
        return first
    return final + (first - final) * (1 - (min(step, last) - warmup) / (last - warmup)) ** 3


def tiny(tiny_bert: Path) -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification.from_pretrained(tiny_bert)


def own_loop(model: Any, method: AdaLoRA, steps: range, optimizer: Any = None, after: Any = None) -> None:
    """A training loop as a user writes it."""
    optimizer = optimizer or torch.optim.AdamW(trained_parameters(model).values(), lr=0.02)
    model.train()
    for step in steps:
        penalty = method.penalty(model)
        assert penalty is not None
        (model(input_ids=IDS, labels=LABELS).loss + penalty).backward()
        optimizer.step()
        method.after_step(model, step)
        if after:
            after(step)
        optimizer.zero_grad()


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return float((one - two).abs().max()) <= tolerance * max(1.0, float(two.abs().max()))


# --- the schedule -------------------------------------------------------------------------------------------------


def test_total_rank_follows_the_cubic_budget(make_run: Callable[..., Run], pictures: None) -> None:
    run = make_run()
    _, model = trained(run)
    logged = events(run)
    budgets = [int(paper_budget(step, 4 * MATRICES, 2 * MATRICES, WARMUP, LAST)) for step in range(1, STEPS + 1)]
    assert [event["rank_budget"] for event in logged] == budgets
    assert [event["total_rank"] for event in logged] == budgets
    assert budgets[:WARMUP] == [48] * WARMUP and budgets[LAST - 1 :] == [24] * (STEPS - LAST + 1)
    assert budgets[WARMUP] < 48 and budgets[LAST - 8] > 24
    singular = [p for name, p in model.named_parameters() if ".lora_E." in name]
    assert sum(int(one.count_nonzero()) for one in singular) == 24
    assert (folder_of(run) / "rank_trajectory.png").read_bytes().startswith(b"\x89PNG")


def test_reallocations_come_as_often_as_asked(make_run: Callable[..., Run]) -> None:
    run = make_run({"allocate_every": 4, "warmup_fraction": 0.2})
    trained(run)
    ranks = [event["total_rank"] for event in events(run)]
    changed = [step for step in range(2, STEPS + 1) if ranks[step - 1] != ranks[step - 2]]
    assert changed == [8, 12, 16]
    for step in changed:
        assert ranks[step - 1] == int(paper_budget(step, 48, 24, 6, LAST))


@pytest.mark.parametrize(("steps", "every"), [(60, 1), (1000, 2), (50_000, 110)])
def test_the_defaults_are_about_those_of_the_paper(steps: int, every: int, tiny_bert: Path) -> None:
    model: Any = peftkit.attach(tiny(tiny_bert), AdaLoRA(target_rank=8), total_steps=steps)
    config = model.peft_config["default"]
    assert (config.init_r, config.target_r, config.total_step) == (12, 8, steps)
    assert (config.tinit, config.tfinal, config.deltaT) == (round(0.12 * steps), round(0.44 * steps), every)


def test_a_training_without_room_for_the_schedule_is_refused(
    make_run: Callable[..., Run], tiny_bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = r"1 optimizer steps \(total_steps\) leave .* 0 of warm-up, 1 after the last .* every 1 .* take 3; train"
    with pytest.raises(MethodError, match=message):
        peftkit.attach(tiny(tiny_bert), AdaLoRA(target_rank=2))
    make_run({"allocate_every": 7})
    config = str(tmp_path / "config.yaml")
    assert main(["train", config, "training.max_steps=30"]) == 2
    error = capfd.readouterr().err
    assert (
        "30 optimizer steps (total_steps) leave" in error
        and "one every 7 between take 32; train for more steps" in error
    )
    assert not (tmp_path / "run0").exists()
    assert AdaLoRA(target_rank=2, allocate_every=7).check_steps(32) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("settings", [{}, {"warmup_fraction": 0.0}, {"final_fraction": 0.0}, {"allocate_every": 9}])
def test_the_steps_that_are_asked_for_are_the_fewest(settings: dict[str, Any]) -> None:
    method = AdaLoRA(**settings)

    def fits(steps: int) -> bool:
        try:
            method.check_steps(steps)
        except MethodError as error:
            assert f"take {fewest}; train" in str(error)
            return False
        return True

    every = settings.get("allocate_every", 1)
    room = [
        steps - round(method.warmup_fraction * steps) - max(1, round(method.final_fraction * steps))
        for steps in range(99)
    ]
    fewest = next(steps for steps in range(99) if room[steps] >= 2 * every)
    assert [steps for steps in range(1, fewest + 3) if fits(steps)] == [fewest, fewest + 1, fewest + 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_rank": 4, "initial_rank": 4},
            "initial_rank 4 leaves nothing to prune.* exceed target_rank, which is 4",
        ),
        ({"warmup_fraction": 0.5, "final_fraction": 0.5}, "together they must stay below 1"),
        ({"sensitivity_smoothing": 1.0}, "less than 1"),
        ({"rank": 4}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdaLoRA(**settings)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (AdaLoRA(target_rank=30), r"rank 45 exceeds '.*', which is 32 × 32; lower method\.target_rank"),
        (AdaLoRA(target_rank=2, initial_rank=33), r"rank 33 exceeds .*; lower method\.initial_rank"),
        (AdaLoRA(targets=("query", "word_embeddings")), "'bert.embeddings.word_embeddings' is an embedding"),
        (AdaLoRA(targets="qeury"), "did you mean 'query'"),
    ],
)
def test_what_does_not_fit_the_model_is_told_from_its_shapes(method: AdaLoRA, message: str, tiny_bert: Path) -> None:
    backbone = wrap(tiny(tiny_bert).to("meta"))
    with pytest.raises(MethodError, match=message):
        method.added_parameters(backbone.model, backbone.layout)


# --- importance ---------------------------------------------------------------------------------------------------


def test_importance_is_that_of_the_paper(tiny_bert: Path) -> None:
    method = AdaLoRA(target_rank=2, initial_rank=4, alpha=8, sensitivity_smoothing=0.8, uncertainty_smoothing=0.7)
    model: Any = peftkit.attach(tiny(tiny_bert), method, total_steps=STEPS)
    weights = {n: p for n, p in trained_parameters(model).items() if ".lora_" in n}
    mean = {name: np.zeros(p.shape) for name, p in weights.items()}
    spread = {name: np.zeros(p.shape) for name, p in weights.items()}
    before: dict[str, Tensor] = {}

    def by_hand(step: int) -> None:
        for name, p in weights.items():
            assert p.grad is not None
            sensitivity = np.abs(before[name].double().numpy() * p.grad.double().numpy())  # (8)
            mean[name] = 0.8 * mean[name] + 0.2 * sensitivity  # (9)
            spread[name] = 0.7 * spread[name] + 0.3 * np.abs(sensitivity - mean[name])  # (10)

    optimizer = torch.optim.AdamW(weights.values(), lr=0.02)
    step_taken = optimizer.step

    def step_and_keep(*_: Any) -> None:  # before reallocation masks them
        step_taken()
        before.update({name: p.detach().clone() for name, p in weights.items()})

    optimizer.step = step_and_keep  # type: ignore[method-assign]
    for step in range(1, 11):
        own_loop(model, method, range(step, step + 1), optimizer, by_hand)
        expected = []
        for name in (name for name in weights if ".lora_E." in name):
            scores = {part: mean[part] * spread[part] for part in (name.replace("lora_E", f"lora_{x}") for x in "AEB")}
            a, e, b = scores.values()
            expected.append(e[:, 0] + a.mean(axis=1) + b.mean(axis=0))  # (11) and (7)
        for one, other in zip(triplet_scores(model), expected, strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-4, atol=1e-12 * np.concatenate(expected).max())
    budget = int(paper_budget(10, 4 * MATRICES, 2 * MATRICES, WARMUP, LAST))
    best = set(np.argsort(-np.concatenate(expected))[:budget].tolist())
    alive = torch.cat([p[:, 0] != 0 for name, p in weights.items() if ".lora_E." in name])
    assert set(alive.nonzero()[:, 0].tolist()) == best


@pytest.mark.parametrize("budget", [1, 5, 6, 7, 11])
def test_equal_importance_does_not_move_the_budget(budget: int) -> None:
    scores = [
        torch.tensor([0.5, 0.0, 0.0, 0.5]),
        torch.tensor([0.0, 0.0, 0.0, 0.0]),
        torch.tensor([0.5, 1.0, 0.0, 0.5]),
    ]
    kept = torch.cat(kept_triplets(scores, budget))
    together = torch.cat(scores)
    assert int(kept.sum()) == budget
    assert together[kept].min() >= together[~kept].max()
    for score in together.unique():  # the first of equal ones
        among = kept[together == score].int()
        assert torch.equal(among, among.sort(descending=True).values)


def test_the_final_rank_is_the_budget_whatever_ties(tiny_bert: Path) -> None:
    method = AdaLoRA(**METHOD)
    model: Any = peftkit.attach(tiny(tiny_bert), method, total_steps=STEPS)

    def tie(step: int) -> None:
        for average in (model.base_model.rankallocator.exp_avg_ipt, model.base_model.rankallocator.exp_avg_unc):
            for held in average.values():
                held.fill_(0.5)

    own_loop(model, method, range(1, LAST), after=tie)
    own_loop(model, method, range(LAST, LAST + 1))
    assert method.figures(model)["total_rank"] == 2 * MATRICES
    alive = [int(p.count_nonzero()) for name, p in model.named_parameters() if ".lora_E." in name]
    assert alive == [4] * 6 + [0] * 6


# --- the penalty --------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_formula_and_what_peft_adds(tiny_bert: Path) -> None:
    method = AdaLoRA(**METHOD | {"orthogonality": 0.3})
    model: Any = peftkit.attach(tiny(tiny_bert), method, total_steps=STEPS)
    own_loop(model, method, range(1, 4))
    norms = []
    for name, p in model.named_parameters():
        matrix = p.detach().double().numpy()
        if ".lora_A." in name:
            norms.append(np.sqrt(((matrix @ matrix.T - np.eye(4)) ** 2).sum()))
        elif ".lora_B." in name:
            norms.append(np.sqrt(((matrix.T @ matrix - np.eye(4)) ** 2).sum()))
    assert len(norms) == 2 * MATRICES
    penalty = method.penalty(model)
    assert penalty is not None and float(penalty.detach()) == pytest.approx(0.3 * np.mean(norms), rel=1e-6)
    gradients = torch.autograd.grad(
        penalty, [p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n]
    )
    assert all(bool(one.any()) for one in gradients)

    for mode in (True, False):
        with torch.no_grad():
            found = model.train(mode)(input_ids=IDS, labels=LABELS)
            assert torch.equal(found.loss, cross_entropy(found.logits, LABELS))  # the task's loss, and nothing else
            model.peft_config["default"].orth_reg_weight = 0.3
            theirs = model(input_ids=IDS, labels=LABELS).loss
            model.peft_config["default"].orth_reg_weight = 0.0
        assert float(theirs - found.loss) == pytest.approx(float(penalty.detach()), abs=1e-6)
    assert AdaLoRA(orthogonality=0).penalty(model) is None


def test_the_penalty_is_trained_and_not_in_the_logged_loss(make_run: Callable[..., Run]) -> None:
    asked, without = make_run({"orthogonality": 0.5}, max_steps=4), make_run({"orthogonality": 0.0}, max_steps=4)
    trained(asked), trained(without)
    first = [events(run)[0] for run in (asked, without)]
    assert first[0]["loss"].hex() == first[1]["loss"].hex()
    assert first[0]["gradient_norm"] > first[1]["gradient_norm"]
    assert first[0]["penalty"] == pytest.approx(0.5 * math.sqrt(4), rel=0.02) and "penalty" not in first[1]


# --- against peft's own training ----------------------------------------------------------------------------------


def test_training_is_that_of_plain_peft(make_run: Callable[..., Run], tiny_bert: Path) -> None:
    run = make_run(max_steps=STEPS, keep_best=False, max_gradient_norm=0.5, learning_rate=0.004)
    record, model = trained(run)
    start(run)
    data = prepare(run)
    backbone = load(run.backbone, data.head)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=WARMUP, tfinal=STEPS - LAST, deltaT=1, total_step=STEPS, orth_reg_weight=0.5,
        lora_alpha=8, target_modules=["query", "key", "value", "dense"], exclude_modules=r".*pooler.*",
        task_type="SEQ_CLS",  # without it peft goes around the model that adds the penalty
    )  # fmt: skip
    theirs: Any = get_peft_model(backbone.model, config)  # type: ignore[arg-type]
    losses = train_by_hand(theirs, data)
    assert record.losses == pytest.approx(losses, abs=1e-4)
    ours = {name: p for name, p in trained_parameters(model).items() if ".lora_" in name}
    others = {name: p for name, p in trained_parameters(theirs).items() if ".lora_" in name}
    assert ours.keys() == others.keys()
    for name, p in ours.items():
        if ".lora_E." in name:
            assert torch.equal(p == 0, others[name] == 0), f"other triplets of {name} are left"
    assert sum(int((p != 0).sum()) for n, p in others.items() if ".lora_E." in n) == 24
    assert close(logits(model), logits(theirs), 1e-3)


def train_by_hand(model: Any, data: Prepared) -> list[float]:
    """peft's documented loop, on the same batches."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.004, weight_decay=0.0)
    ahead, losses = batches.steps(data.train.encoded.lengths, 16, 1, False), []
    model.train()
    for step in range(STEPS):
        examples = [data.train.encoded.examples[index] for index in next(ahead)[1]]
        longest = max(len(one["input_ids"]) for one in examples)
        pad = [longest - len(one["input_ids"]) for one in examples]
        ids = torch.tensor([one["input_ids"] + [0] * p for one, p in zip(examples, pad, strict=True)])
        mask = torch.tensor([[1] * (longest - p) + [0] * p for p in pad])
        labels = torch.tensor([one["labels"] for one in examples])
        found = model(input_ids=ids, attention_mask=mask, labels=labels)  # its loss has the penalty
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 0.004 * (STEPS - step) / STEPS
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(float(cross_entropy(found.logits.detach(), labels)))
    return losses


def test_micro_batches_do_not_change_training(make_run: Callable[..., Run]) -> None:
    runs = [make_run(micro_batch_size=size, max_steps=15, learning_rate=0.003) for size in (16, 4)]
    (whole, model), (parts, other) = map(trained, runs)
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)
    assert parts.losses != whole.losses
    assert ranks_of(other) == ranks_of(model)
    assert [e["penalty"] for e in events(runs[0])] == pytest.approx([e["penalty"] for e in events(runs[1])], abs=1e-5)


def ranks_of(model: Any) -> list[int]:
    return [int(p.count_nonzero()) for name, p in model.named_parameters() if ".lora_E." in name]


def test_evaluating_more_often_does_not_change_training(make_run: Callable[..., Run], tmp_path: Path) -> None:
    hashes, losses = [], []
    for every in ("epoch", 3):
        run = make_run({"dropout": 0.1}, evaluate_every=every, keep_best=False)
        record, model = trained(run)
        (tmp_path / str(every)).mkdir()
        run.method.save(model, tmp_path / str(every))
        hashes.append(file_sha256(tmp_path / str(every) / "adapter_model.safetensors"))
        losses.append([loss.hex() for loss in record.losses])
        assert len(record.evaluations) == (3 if every == "epoch" else 10)
    assert losses[0] == losses[1]
    assert hashes[0] == hashes[1]


# --- what would be a silent failure -------------------------------------------------------------------------------


@pytest.fixture
def fresh(tiny_bert: Path) -> tuple[AdaLoRA, Any]:
    method = AdaLoRA(**METHOD | {"allocate_every": 2})
    return method, peftkit.attach(tiny(tiny_bert), method, total_steps=STEPS)


def test_a_loop_that_never_reallocates_is_told(fresh: tuple[AdaLoRA, Any], tmp_path: Path) -> None:
    method, model = fresh
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.02)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    optimizer.step()
    with pytest.raises(
        MethodError, match=r"no reallocation had happened by step 6, .* \(step 7 follows step 0\); .*load_state"
    ):
        method.after_step(model, 7)
    unsettled = (
        r"total rank is still 48, not 24: the last step seen is 0 of 30, and the last reallocation is due at step 17"
    )
    with pytest.raises(MethodError, match=unsettled):
        method.finish(model, tmp_path)
    with pytest.raises(MethodError, match=unsettled):
        method.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_calls_once_an_epoch_are_told(fresh: tuple[AdaLoRA, Any]) -> None:
    method, model = fresh
    own_loop(model, method, range(5, 6))
    with pytest.raises(MethodError, match=r"no reallocation had happened by step 6, .* \(step 10 follows step 5\)"):
        own_loop(model, method, range(10, 11))


@pytest.mark.parametrize("step", [0, 2, 3])
def test_steps_that_do_not_count_up_are_told(step: int, fresh: tuple[AdaLoRA, Any]) -> None:
    method, model = fresh
    own_loop(model, method, range(1, 4))
    with pytest.raises(MethodError, match=f"step {step} follows step 3; count optimizer steps, the first is 1"):
        method.after_step(model, step)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_cleared_too_early_are_told(set_to_none: bool, fresh: tuple[AdaLoRA, Any]) -> None:
    method, model = fresh
    message = (
        "gradients that importance is measured by are gone" if set_to_none else "importance of every weight is zero"
    )
    model(input_ids=IDS, labels=LABELS).loss.backward()
    model.zero_grad(set_to_none=set_to_none)
    with pytest.raises(MethodError, match=rf"{message}; .* before"):
        for step in range(1, LAST):
            method.after_step(model, step)


def test_triplets_that_came_back_are_told(fresh: tuple[AdaLoRA, Any], tmp_path: Path) -> None:
    method, model = fresh
    own_loop(model, method, range(1, LAST + 1))
    assert method.is_settled(model)
    method.finish(model, None)
    for name, p in model.named_parameters():
        if ".lora_E." in name:
            p.data.fill_(1.0)  # as training on without `after_step` does
    with pytest.raises(MethodError, match=r"total rank is 48 at the end, not the budget of 24; method\.after_step"):
        method.finish(model, tmp_path)


def test_weights_before_the_last_reallocation_are_never_the_best(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    worsening = itertools.count(100, -1)
    scored = loop._Loop._dev_scores

    def scores(self: Any) -> Any:
        found = scored(self)
        return type(found)(**vars(found) | {"values": dict.fromkeys(found.values, float(next(worsening)))})

    monkeypatch.setattr(loop._Loop, "_dev_scores", scores)
    run = make_run(evaluate_every=3, early_stopping_patience=2)
    record, model = trained(run)
    assert record.best_step == 18  # the first evaluation since step 17
    assert record.steps == 24  # two evaluations without gain after it, and none counted before
    assert sum(ranks_of(model)) == 24
    assert run.method.is_settled(model)


# --- fp16 and bf16 ------------------------------------------------------------------------------------------------


def test_a_skipped_step_is_no_reallocation(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    run = make_run({"allocate_every": 4, "warmup_fraction": 0.2})
    seen = iter(range(1, STEPS + 1))
    monkeypatch.setattr(
        Accelerator, "optimizer_step_was_skipped", property(lambda _: next(seen) in (1, 8, 12, 13, LAST))
    )
    _, model = trained(run)
    assert [one.step for one in model.allocation.history] == [9, 14, 16, LAST + 1]
    assert sum(ranks_of(model)) == 24
    for one in model.allocation.history:
        assert sum(one.ranks) == one.budget == int(paper_budget(one.step, 48, 24, 6, LAST))


def test_a_run_whose_steps_were_all_skipped_is_told(fresh: tuple[AdaLoRA, Any]) -> None:
    method, model = fresh
    for step in range(1, LAST):
        method.skipped_step(model, step)
    with pytest.raises(MethodError, match="importance of every weight is zero"):
        own_loop(model, method, range(LAST, LAST + 1))


def test_bf16_reaches_the_budget(make_run: Callable[..., Run]) -> None:
    exact, _ = trained(make_run(max_steps=10))
    rounded, model = trained(make_run(precision="bf16", max_steps=10))
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, abs=0.15)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    assert sum(ranks_of(model)) == 24


def test_a_backbone_in_bfloat16(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(max_steps=6)
    run = run.model_copy(update={"backbone": run.backbone.model_copy(update={"dtype": "bfloat16"})})
    _, model = trained(run)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    (tmp_path / "saved").mkdir()
    run.method.save(model, tmp_path / "saved")
    again = run.method.load(load(run.backbone, prepare(run).head), tmp_path / "saved")
    assert close(logits(again), logits(model), 1e-6)


# --- resuming -----------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_again_and_again_is_the_uninterrupted_one(
    make_run: Callable[..., Run], pictures: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    training = {"evaluate_every": 4, "learning_rate": 0.005}
    whole, stopped = (make_run({"dropout": 0.1}, folder, **training) for folder in ("whole", "stopped"))
    save_finished(whole)
    for step, from_step in ((5, 0), (11, 4), (15, 8), (22, 12), (30, 20)):  # warm-up, twice the fall, the end
        stop_after(stopped, step, monkeypatch)
        assert ("continuing from step" in capfd.readouterr().out) == bool(from_step)
        assert (folder_of(stopped) / "checkpoints" / f"step-{step - step % 4}").is_dir()
    save_finished(stopped)
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "rank_trajectory.png"):
        assert file_sha256(folder_of(stopped) / file) == file_sha256(folder_of(whole) / file), file
    for key in ("loss", "penalty", "gradient_norm", "total_rank", "rank_budget", "dev_accuracy"):
        assert [float(e[key]).hex() for e in events(stopped, key)] == [float(e[key]).hex() for e in events(whole, key)]


def stop_after(run: Run, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a step has been logged, and die there."""
    taken = loop._Loop._train_step

    def step_or_die(self: Any, *arguments: Any) -> None:
        taken(self, *arguments)
        if self.progress.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop._Loop, "_train_step", step_or_die)
        data, _, model = attached(run)
        accelerator = start(run)
        try:
            train(model, run, data, accelerator)
        except KeyboardInterrupt:
            accelerator.run_lock.release()  # type: ignore[attr-defined]
        else:
            raise AssertionError("was not stopped")


def save_finished(run: Run) -> None:
    data, backbone, model = attached(run)
    accelerator = start(run)
    record = train(model, run, data, accelerator)
    save(run, data, backbone, model, record, {"after": evaluate(model, run.task, data.test, accelerator)}, accelerator)


@pytest.mark.parametrize("at", [2, 10, 20])
def test_a_loop_of_ones_own_resumes_with_state(at: int, tiny_bert: Path, fresh: tuple[AdaLoRA, Any]) -> None:
    method, whole = fresh

    def optimizer_of(model: Any) -> Any:
        return torch.optim.AdamW(trained_parameters(model).values(), lr=0.02)

    first = optimizer_of(whole)
    own_loop(whole, method, range(1, at + 1), first)
    weights = {name: p.detach().clone() for name, p in trained_parameters(whole).items()}
    state = {name: tensor.clone() for name, tensor in method.state(whole).items()}
    moments = copy.deepcopy(first.state_dict())
    again: Any = peftkit.attach(tiny(tiny_bert), method, total_steps=STEPS)
    second = optimizer_of(again)
    second.load_state_dict(moments)
    for name, p in trained_parameters(again).items():
        p.data.copy_(weights[name])
    method.load_state(again, state)
    own_loop(whole, method, range(at + 1, STEPS + 1), first)
    own_loop(again, method, range(at + 1, STEPS + 1), second)
    assert again.allocation.history == whole.allocation.history
    for name, p in trained_parameters(whole).items():
        assert torch.equal(p, trained_parameters(again)[name]), name


# --- what is saved ------------------------------------------------------------------------------------------------


@pytest.fixture
def settled(tiny_bert: Path) -> Iterator[tuple[AdaLoRA, Any]]:
    """Trained to the end, with two matrices that lost all their rank."""
    method = AdaLoRA(**METHOD)
    model: Any = peftkit.attach(tiny(tiny_bert), method, total_steps=STEPS)

    def forget(step: int) -> None:
        for name, average in model.base_model.rankallocator.exp_avg_ipt.items():
            if "layer.0.attention.self.key" in name or "layer.1.output" in name:
                average.zero_()

    own_loop(model, method, range(1, STEPS + 1), after=forget)
    assert ranks_of(model).count(0) >= 2
    yield method, model


def saved_to(folder: Path, method: AdaLoRA, model: Any) -> dict[str, Tensor]:
    folder.mkdir()
    method.save(model, folder)
    return load_file(folder / "adapter_model.safetensors")


def test_the_saved_adapter_is_pruned_and_loads_in_plain_peft(
    settled: tuple[AdaLoRA, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    method, model = settled
    tensors = saved_to(tmp_path / "saved", method, model)
    ranks = {n: int(p.count_nonzero()) for n, p in model.named_parameters() if ".lora_E." in n}
    for name, rank in ranks.items():
        stem = name.removesuffix(".lora_E.default")
        found = [tensors.get(f"{stem}.lora_{part}.weight") for part in "AB"]
        if rank:
            assert found[0] is not None and found[1] is not None
            assert found[0].shape[0] == found[1].shape[1] == rank
        else:
            assert found == [None, None]
    assert sum(len(one) for name, one in tensors.items() if ".lora_A." in name) == 24

    reference = logits(model)
    theirs: Any = PeftModel.from_pretrained(tiny(tiny_bert), tmp_path / "saved")
    assert close(logits(theirs), reference, 1e-6)
    loss = theirs(input_ids=IDS, labels=LABELS).loss
    assert float(loss.detach()) == pytest.approx(float(cross_entropy(reference, LABELS)), abs=1e-6)
    ours = method.load(wrap(tiny(tiny_bert)), tmp_path / "saved")
    assert close(logits(ours), reference, 1e-6)
    assert not trained_parameters(ours)
    assert saved_to(tmp_path / "again", method, ours).keys() == tensors.keys()


def test_every_matrix_has_the_scale_that_tools_without_patterns_use(
    settled: tuple[AdaLoRA, Any], tmp_path: Path
) -> None:
    tensors = saved_to(tmp_path / "saved", *settled)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == max(len(one) for name, one in tensors.items() if ".lora_A." in name)
    for name in config["target_modules"]:
        rank = len(tensors[f"base_model.model.{name}.lora_A.weight"])
        assert rank == config["rank_pattern"].get(name, config["r"])
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        assert alpha / rank == pytest.approx(config["lora_alpha"] / config["r"]) == pytest.approx(8 / 4, rel=1e-5)


def test_counts_while_training_and_saved(settled: tuple[AdaLoRA, Any], tiny_bert: Path, tmp_path: Path) -> None:
    method, model = settled
    backbone = wrap(tiny(tiny_bert))
    # query, key, value, output 32 × 32, up 64 × 32, down 32 × 64, in each of two layers
    assert method.added_parameters(backbone.model, backbone.layout) == 2 * 4 * (4 * 65 + 2 * 97)
    assert sum(p.numel() for n, p in trained_parameters(model).items() if ".lora_" in n) == 2 * 4 * (4 * 65 + 2 * 97)
    least, most = method.stored_bounds(backbone.model, backbone.layout)
    found = sum(one.numel() for n, one in saved_to(tmp_path / "saved", method, model).items() if ".lora_" in n)
    assert least <= found <= most
    assert method.figures(model)["stored_parameters"] == found
    assert method.stored_parameters(backbone.model, backbone.layout) == most


@pytest.mark.parametrize(("target", "initial"), [(1, 2), (2, 3), (1, 4)])
def test_bounds_are_those_of_every_allocation(target: int, initial: int, tiny_llama: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    backbone = wrap(AutoModelForSequenceClassification.from_pretrained(tiny_llama))
    method = AdaLoRA(target_rank=target, initial_rank=initial, targets="value+up")
    widths = [16 + 32, 64 + 32] * 2  # grouped queries; a feed-forward network of 64
    allocations = itertools.product(range(initial + 1), repeat=4)
    sizes = [sum(map(math.prod, zip(a, widths, strict=True))) for a in allocations if sum(a) == 4 * target]
    assert method.stored_bounds(backbone.model, backbone.layout) == (min(sizes), max(sizes))


def test_merged_it_computes_the_same(settled: tuple[AdaLoRA, Any], tiny_bert: Path, tmp_path: Path) -> None:
    method, model = settled
    saved_to(tmp_path / "saved", method, model)
    reference = logits(model)
    assert not close(reference, logits(tiny(tiny_bert)), 1e-2)
    for one in (model, method.load(wrap(tiny(tiny_bert)), tmp_path / "saved")):
        merged = method.merge(one)
        assert isinstance(merged, BertForSequenceClassification)
        assert close(logits(merged), reference, 1e-5)


def test_a_part_of_a_fused_projection(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0)

    def gpt2() -> Any:
        torch.manual_seed(0)
        return GPT2ForSequenceClassification(config)

    method = AdaLoRA(target_rank=1, initial_rank=4, targets="query+value+up")
    model: Any = peftkit.attach(gpt2(), method, total_steps=STEPS)
    own_loop(model, method, range(1, STEPS + 1))
    tensors = saved_to(tmp_path / "saved", method, model)
    assert sum(len(one) for name, one in tensors.items() if ".lora_A." in name) == 6
    reference = logits(model)
    loaded = method.load(wrap(gpt2()), tmp_path / "saved")
    assert close(logits(loaded), reference, 1e-6)
    merged = method.merge(model)
    assert list(merged.state_dict()) == list(gpt2().state_dict())
    assert close(logits(merged), reference, 1e-5)


def test_gradient_checkpointing_does_not_change_training(make_run: Callable[..., Run]) -> None:
    plain, model = trained(make_run(learning_rate=0.002, max_steps=8))
    saving, other = trained(make_run(learning_rate=0.002, max_steps=8, gradient_checkpointing=True))
    assert saving.losses == pytest.approx(plain.losses, abs=1e-6)
    assert ranks_of(other) == ranks_of(model)
