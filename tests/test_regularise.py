"""R-Drop, adversarial training and dropout against their formulas."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkit.backbones.dropout import has_dropout, set_dropout
from peftkit.backbones.load import load
from peftkit.cli import main
from peftkit.config import Run, load_run
from peftkit.data.collate import collate
from peftkit.errors import BackboneError, TrainingError, UsageError
from peftkit.evaluation import evaluate
from peftkit.prepare import Prepared, prepare
from peftkit.session import start
from peftkit.tasks.outputs import divergences, together
from peftkit.training.loop import train
from peftkit.training.record import TrainRecord
from peftkit.training.regularise import Adversarial, Objective, RDrop, embedding_layers, perturbations

WriteConfig = Callable[..., Path]
TRAINING = {"learning_rate": 0.01, "epochs": 1, "batch_size": 16, "seed": 1}


def softmax(logits: list[float]) -> list[float]:
    return [math.exp(one) / sum(map(math.exp, logits)) for one in logits]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# --- what two passes say ------------------------------------------------------------------------------------------

ONE, OTHER = [[0.3, -1.2, 2.0], [0.0, 0.5, 0.1]], [[1.3, 0.2, -0.4], [0.0, 0.5, 0.1]]


def test_the_divergence_of_classes_is_the_mean_of_both_kls() -> None:
    found = divergences("classes", torch.tensor(ONE).double(), torch.tensor(OTHER).double())
    p, q = softmax(ONE[0]), softmax(OTHER[0])
    assert found.tolist() == pytest.approx([(kl(p, q) + kl(q, p)) / 2, 0.0])


def test_the_divergence_of_marks_is_that_of_each_yes_or_no() -> None:
    found = divergences("marks", torch.tensor(ONE).double(), torch.tensor(OTHER).double())
    pairs = []
    for a, b in zip(ONE[0], OTHER[0], strict=True):
        p, q = ([1 / (1 + math.exp(-one)), 1 / (1 + math.exp(one))] for one in (a, b))
        pairs.append((kl(p, q) + kl(q, p)) / 2)
    assert found.tolist() == pytest.approx([sum(pairs) / 3, 0.0])


def test_the_divergence_of_numbers_is_that_of_two_normal_distributions() -> None:
    one, other = torch.tensor([[1.5], [0.0]]).double(), torch.tensor([[-0.5], [0.0]]).double()
    # squared error is twice the negative log-likelihood of variance 1, so the divergence is taken twice too
    normal = [torch.distributions.Normal(x.squeeze(-1), 1.0) for x in (one, other)]
    both = torch.distributions.kl_divergence(*normal) + torch.distributions.kl_divergence(*reversed(normal))
    assert divergences("number", one, other).tolist() == pytest.approx(both.tolist())


def test_together_is_the_mean_of_probabilities() -> None:
    logits = [torch.tensor(ONE), torch.tensor(OTHER)]
    classes = torch.stack([one.softmax(-1) for one in logits]).mean(0)
    torch.testing.assert_close(together("classes", logits).softmax(-1), classes)
    marks = torch.stack([one.sigmoid() for one in logits]).mean(0)
    torch.testing.assert_close(together("marks", logits).sigmoid(), marks)
    torch.testing.assert_close(together("number", logits), (logits[0] + logits[1]) / 2)


# --- objectives on a tiny model -----------------------------------------------------------------------------------


@pytest.fixture
def setting(write_config: WriteConfig, tmp_path: Path) -> Callable[..., Any]:
    """(run, data, model in float64, a batch, class weights) of a toy run."""

    def make(dropout: float | None = None, method: str = "full", loss: str = "weighted") -> Any:
        config = write_config(method={"kind": method}, training=TRAINING)
        overrides = [f"task.loss={loss}", *([f"backbone.dropout={dropout}"] if dropout is not None else [])]
        run = load_run(config, overrides)
        data = prepare(run)
        torch.manual_seed(0)
        backbone = load(run.backbone, data.head)
        model = run.method.attach(backbone, 1).double().train()
        batch = collate(data.train.encoded.examples[:5], data.train.pad_id)
        return run, data, model, batch, torch.tensor(data.class_weights).double()

    return make


def logits_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def test_r_drop_is_half_of_the_papers_equation_4(setting: Callable[..., Any]) -> None:
    run, _, model, batch, weights = setting(dropout=0.3)
    torch.manual_seed(7)
    found = RDrop(run.task, 0.8, model).loss(model, model, batch, weights, 0)
    torch.manual_seed(7)
    passes = [logits_of(model, batch).tolist(), logits_of(model, batch).tolist()]
    expected = 0.0
    for one, other, label in zip(*passes, batch["labels"].tolist(), strict=True):
        p, q, weight = softmax(one), softmax(other), float(weights[label])
        likelihood = -math.log(p[label]) - math.log(q[label])
        expected += weight * (likelihood + 0.8 * (kl(p, q) + kl(q, p)) / 2) / 2
    assert passes[0] != passes[1]
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_r_drop_of_a_model_without_dropout_is_refused(write_config: WriteConfig) -> None:
    run = load_run(write_config(training=TRAINING), ["training.r_drop=1"])
    data = prepare(run)
    model = run.method.attach(load(run.backbone, data.head), 10)
    with pytest.raises(UsageError, match=r"this model has none: set backbone.dropout, or method.dropout"):
        train(model, run, data, start(run))


def test_the_perturbation_is_epsilon_along_the_gradient(setting: Callable[..., Any]) -> None:
    run, _, model, batch, weights = setting()
    objective = Adversarial(run.task, 0.5, model)
    first = objective.loss(model, model, batch, weights, 0)
    first.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    # the same by hand: embeddings given to the model, the gradient by autograd, the step by the formula
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def loss_at(states: torch.Tensor) -> torch.Tensor:
        logits = model(inputs_embeds=states, attention_mask=batch["attention_mask"]).logits
        return (nn.functional.cross_entropy(logits, batch["labels"], reduction="none") * weights[batch["labels"]]).sum()

    clean = loss_at(embedded)
    (gradient,) = torch.autograd.grad(clean, embedded)
    lengths = gradient.flatten(1).norm(dim=1)
    step = 0.5 * gradient / lengths[:, None, None]
    assert step.flatten(1).norm(dim=1).tolist() == pytest.approx([0.5] * 5)
    moved = loss_at((embedded + step).detach())

    second = objective.loss(model, model, batch, weights, 1)
    assert float(first.detach()) == pytest.approx(float(clean.detach()) / 2, rel=1e-6)
    assert float(second.detach()) == pytest.approx(float(moved.detach()) / 2, rel=1e-5)
    assert float(second.detach()) > float(first.detach())
    second.backward()
    assert any(not torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if name in before)
    assert not any(layer._forward_hooks for layer in embedding_layers(model))


def test_a_frozen_embedding_is_perturbed_too_and_stays_frozen(setting: Callable[..., Any]) -> None:
    run, _, model, batch, weights = setting(method="head")
    objective = Adversarial(run.task, 0.5, model)
    losses = []
    for number in range(objective.passes):
        losses.append(objective.loss(model, model, batch, weights, number))
        losses[-1].backward()
    assert float(losses[1].detach()) > float(losses[0].detach())
    assert all(p.grad is None for name, p in model.named_parameters() if "embeddings" in name)


def test_what_has_no_gradient_is_not_perturbed() -> None:
    gradients = [torch.zeros(3, 2, 2), torch.zeros(3, 1, 2)]
    gradients[0][0], gradients[1][0] = 2.0, 1.0
    gradients[0][1, 0, 0] = math.inf
    first, second = perturbations(gradients, 3.0)
    norm = math.sqrt(4 * 4 + 2 * 1)
    assert first[0].flatten().tolist() == pytest.approx([6 / norm] * 4)
    assert second[0].flatten().tolist() == pytest.approx([3 / norm] * 2)
    assert not first[1:].any() and not second[1:].any()


def test_both_sides_of_an_encoder_decoder_are_perturbed() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    layers = embedding_layers(model)
    calls: list[int] = []
    for layer in layers:
        layer.register_forward_hook(lambda part, inputs, output: calls.append(inputs[0].shape[1]))
    model(input_ids=torch.arange(1, 7)[None], decoder_input_ids=torch.arange(1, 4)[None])
    assert sorted(calls) == [3, 6]


def test_packed_rows_are_not_perturbed_as_one(setting: Callable[..., Any]) -> None:
    run, _, model, batch, weights = setting()
    flat = {"input_ids": batch["input_ids"].flatten()[None], "attention_mask": batch["attention_mask"].flatten()[None]}

    class Packed(Objective):
        def summed_loss(self, model: nn.Module, batch: dict[str, Any], weights: torch.Tensor) -> torch.Tensor:
            return logits_of(model, flat).sum()

    objective = Adversarial(Packed(run.task), 0.5, model)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"5 examples came to the embeddings as 1 rows.*turn packing off"):
        objective.loss(model, model, batch, weights, 0)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(write_config: WriteConfig, tmp_path: Path) -> Callable[..., tuple[TrainRecord, nn.Module, Path]]:
    count = iter(range(100))

    def _fit(*overrides: str, **training: Any) -> tuple[TrainRecord, nn.Module, Path]:
        folder = tmp_path / f"run{next(count)}"
        config = write_config(training=TRAINING | training, output={"folder": str(folder)})
        run = load_run(config, overrides)
        accelerator = start(run)
        data = prepare(run)
        model = run.method.attach(load(run.backbone, data.head), run.training.total_steps(len(data.train)))
        return train(model, run, data, accelerator), model, folder

    return _fit


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_micro_batches_do_not_change_adversarial_training(fit: Callable[..., Any]) -> None:
    # AdamW would move by the sign of what is little more than rounding
    options = {"adversarial": 1.0, "max_steps": 3, "keep_best": False, "optimizer": "sgd"}
    (whole, one, _), (cut, other, _) = fit(**options), fit(**options, micro_batch_size=3)
    plain, _, _ = fit(max_steps=3, keep_best=False, optimizer="sgd")
    assert whole.losses == pytest.approx(cut.losses, abs=1e-5)
    assert whole.losses[0] > plain.losses[0]  # the same model, and the loss at the perturbed inputs is greater
    for name, value in trained(one).items():
        torch.testing.assert_close(value, trained(other)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("aid", [{"r_drop": 1.0}, {"adversarial": 0.5}])
def test_a_run_goes_on_with_the_same_bytes(aid: dict[str, float], fit: Callable[..., Any], tmp_path: Path) -> None:
    options = aid | {"max_steps": 6, "evaluate_every": 3, "micro_batch_size": 5, "precision": "bf16"}
    whole, one, _ = fit("backbone.dropout=0.1", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftkit.training.loop._Loop._finish", _raise)
        patch.setattr("peftkit.training.loop._Loop._has_stalled", lambda self: self.progress.step >= 3)
        with pytest.raises(KeyboardInterrupt):
            fit("backbone.dropout=0.1", **options)
    interrupted = tmp_path / "run1"
    assert (interrupted / "checkpoints" / "step-3").is_dir()
    resumed, other, _ = fit("backbone.dropout=0.1", f"output.folder={interrupted}", **options)
    assert resumed.losses == whole.losses
    assert all(torch.equal(value, trained(other)[name]) for name, value in trained(one).items())


def _raise(self: Any) -> None:
    raise KeyboardInterrupt


def test_both_aids_at_once_are_refused(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(training=TRAINING | {"r_drop": 1.0, "adversarial": 1.0})
    assert main(["validate", str(config)]) == 2
    assert "r_drop and adversarial are both set; keep one" in capsys.readouterr().err


# --- several processes --------------------------------------------------------------------------------------------


def _one_of_two(rank: int, port: int, folder: Path, config: Path) -> None:
    """Gradients of each objective on half of a batch, averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    run = load_run(config)
    data = prepare(run)
    torch.manual_seed(0)
    model = run.method.attach(load(run.backbone, data.head), 1).eval()  # without dropout, so that it can be compared
    wrapped = nn.parallel.DistributedDataParallel(model)
    for name, objective in _objectives(run, model).items():
        gradients = _gradients(objective, model, wrapped, data, range(rank, 6, 2))
        if rank == 0:
            torch.save({key: 2 * value for key, value in gradients.items()}, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


def _objectives(run: Run, model: nn.Module) -> dict[str, Objective]:
    return {"r_drop": RDrop(run.task, 1.0, model), "adversarial": Adversarial(run.task, 0.5, model)}


def _gradients(
    objective: Objective, model: nn.Module, wrapped: Any, data: Prepared, indices: range
) -> dict[str, torch.Tensor]:
    import contextlib

    model.zero_grad()
    weights = torch.tensor(data.class_weights)
    batch = collate([data.train.encoded.examples[index] for index in indices], data.train.pad_id)
    for number in range(objective.passes):
        last = number == objective.passes - 1
        with contextlib.nullcontext() if last or wrapped is model else wrapped.no_sync():
            objective.loss(wrapped, model, batch, weights, number).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_two_processes_have_the_gradients_of_one(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(method={"kind": "full"}, training=TRAINING, backbone=_with_dropout(write_config))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # not forked: what other tests started (OpenMP, autograd, tokenizers) has locks that a fork may find held for ever
    processes: Any = torch.multiprocessing.spawn(_one_of_two, (port, tmp_path, config), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the two processes do not end"
    finally:
        for process in processes.processes:
            process.kill()
    run = load_run(config)
    data = prepare(run)
    torch.manual_seed(0)
    model = run.method.attach(load(run.backbone, data.head), 1).eval()
    for name, objective in _objectives(run, model).items():
        one, two = _gradients(objective, model, model, data, range(6)), torch.load(tmp_path / f"{name}.pt")
        assert one.keys() == two.keys() and any(value.any() for value in one.values())
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)


def _with_dropout(write_config: WriteConfig) -> dict[str, Any]:
    import yaml

    name = yaml.safe_load(write_config().read_text())["backbone"]["name"]
    return {"name": name, "dropout": 0.2}


# --- dropout of the backbone --------------------------------------------------------------------------------------


def test_backbone_dropout_reaches_every_dropout_of_the_model(write_config: WriteConfig) -> None:
    config = write_config(training=TRAINING)
    for value, overrides in ((0.0, []), (0.25, ["backbone.dropout=0.25"])):
        run = load_run(config, overrides)
        model = load(run.backbone, prepare(run).head).model
        modules = [part.p for part in model.modules() if isinstance(part, nn.Dropout)]
        assert len(modules) > 5 and set(modules) == {value}
        assert has_dropout(model) == bool(value)


def test_backbone_dropout_is_for_training_alone(write_config: WriteConfig) -> None:
    run = load_run(write_config(training=TRAINING), ["backbone.dropout=0.5"])
    data, accelerator = prepare(run), start(run)
    torch.manual_seed(0)
    model = run.method.attach(load(run.backbone, data.head), 10)
    scores = [evaluate(model, run.task, data.dev, accelerator).predictions for _ in range(2)]
    assert scores[0] == scores[1]


def test_dropout_of_architectures_by_their_own_names() -> None:
    from transformers import BartConfig, BartModel, DistilBertConfig, GPT2Config, LlamaConfig, MambaConfig, T5Config

    assert "resid_pdrop" in set_dropout(GPT2Config(), 0.2)
    assert set_dropout(T5Config(), 0.2) == ["classifier_dropout", "dropout_rate"]
    assert "seq_classif_dropout" in set_dropout(DistilBertConfig(), 0.2)
    llama = LlamaConfig()
    assert set_dropout(llama, 0.2) == ["attention_dropout"] and llama.attention_dropout == 0.2
    with pytest.raises(BackboneError, match=r"backbone.dropout: 'mamba' has no dropout in its configuration"):
        set_dropout(MambaConfig(), 0.2)
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 9, "max_position_embeddings": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    bart = BartConfig(**sizes, **heads, pad_token_id=0)  # its dropouts are numbers, not modules
    set_dropout(bart, 0.0)
    assert not has_dropout(BartModel(bart))
    set_dropout(bart, 0.1)
    assert has_dropout(BartModel(bart))


def test_a_backbone_without_dropout_is_told_before_weights_load(
    write_config: WriteConfig, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftkit.backbones.dropout.NAMES", frozenset())
    run = load_run(write_config(training=TRAINING), ["backbone.dropout=0.5"])
    with pytest.raises(BackboneError, match="'bert' has no dropout"):
        prepare(run)
    assert not json.loads((tiny_bert / "config.json").read_text())["hidden_dropout_prob"]
