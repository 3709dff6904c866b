"""Combined runs: ΔW in float64 from the files alone, plain peft, and naive numpy, as what the result must be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import WORDS, save_word_tokenizer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from peftkit.artifacts.combination import Recipe, linear
from peftkit.artifacts.combine import combine
from peftkit.artifacts.loading import in_full_precision, load_run
from peftkit.artifacts.low_rank import LowRank, added, dense, inner, length, nearest, nearest_to
from peftkit.artifacts.updates import update_of
from peftkit.backbones.load import weight_files, weights_sha256
from peftkit.cli import main
from peftkit.disk import file_sha256, manifest_sha256
from peftkit.errors import ArtifactError, UsageError

RUNS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8},
    "rslora": {"kind": "lora", "rank": 2, "variant": "rslora", "targets": "query_value"},
    "beside": {"kind": "peft", "type": "lora", "r": 2, "lora_bias": True},
    "in_place": {"kind": "peft", "type": "lora", "r": 3, "bias": "lora_only"},
    "embeddings": {"kind": "lora", "rank": 2, "targets": "query+word_embeddings"},
    "adalora": {"kind": "adalora", "target_rank": 2},
    "dora": {"kind": "lora", "rank": 2, "variant": "dora"},
    "full": {"kind": "full"},
}
PRODUCTS = ("lora", "rslora", "beside", "in_place", "embeddings", "adalora")
"""What an adapter can hold."""
Deltas = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, toy_data: Path) -> Path:
    """A folder with a finished run of each kind, which tests do not write to."""
    root = tmp_path_factory.mktemp("runs")
    for name, method in RUNS.items():
        _train(root / name, tiny_bert, toy_data, method, 20 if name == "adalora" else 4)
    return root


def _train(
    folder: Path, backbone: Path, data: Path, method: dict[str, Any], steps: int, more: dict[str, Any] | None = None
) -> None:
    files = {split: str(data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")}
    tree = {
        "backbone": {"name": str(backbone)} | (more or {}),
        "task": {"kind": "sequence_classification", "data": files, "max_length": 32},
        "method": method,
        "training": {"learning_rate": 0.01, "max_steps": steps, "batch_size": 16, "seed": len(folder.name)},
        "output": {"folder": str(folder)},
    }
    folder.with_suffix(".yaml").write_text(json.dumps(tree))
    assert main(["train", str(folder.with_suffix(".yaml"))]) == 0


def _deltas(run: Path, backbone: Path) -> Deltas:
    """ΔW of every parameter in float64, by the methods' formulas from the saved files alone."""
    base = {f"bert.{name}": value.double() for name, value in load_file(backbone / "model.safetensors").items()}
    if (run / "model").is_dir():
        tuned = load_file(run / "model" / "model.safetensors")
        return {name: tuned[name].double() - value for name, value in base.items() if name in tuned}
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    saved = {
        name.removeprefix("base_model.model."): value.double()
        for name, value in load_file(run / "adapter" / "adapter_model.safetensors").items()
    }
    found: Deltas = {}
    for key, a in saved.items():
        if not key.endswith((".lora_A.weight", ".lora_embedding_A")):
            continue
        module = key.partition(".lora_")[0]
        rank = config["rank_pattern"].get(module, config["r"])
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        assert a.shape[0] == rank
        if key.endswith("_embedding_A"):
            found[f"{module}.weight"] = scale * (saved[f"{module}.lora_embedding_B"] @ a).T
            continue
        change, weight = scale * saved[f"{module}.lora_B.weight"] @ a, base[f"{module}.weight"]
        if config["use_dora"]:
            lengths = saved[f"{module}.lora_magnitude_vector"]
            tuned = weight + change
            change = (lengths / tuned.norm(dim=1))[:, None] * tuned - weight
        found[f"{module}.weight"] = change
        if f"{module}.lora_B.bias" in saved:
            found[f"{module}.bias"] = scale * saved[f"{module}.lora_B.bias"]
        if f"{module}.base_layer.bias" in saved:
            found[f"{module}.bias"] = saved[f"{module}.base_layer.bias"] - base[f"{module}.bias"]
    return found


def _summed(parts: Sequence[Deltas], weights: Sequence[float]) -> Deltas:
    found: Deltas = {}
    for one, weight in zip(parts, weights, strict=True):
        for name, value in one.items():
            found[name] = found.get(name, 0) + weight * value
    return found


def _by_peft(adapter: Path, backbone: Path) -> Deltas:
    """What plain peft adds to a backbone that it loads by itself, merged in float64."""
    plain = AutoModelForSequenceClassification.from_pretrained(backbone)
    before = {name: value.detach().double().clone() for name, value in plain.named_parameters()}
    merged = PeftModel.from_pretrained(plain, str(adapter)).double().merge_and_unload()
    return {n: v.detach() - before[n] for n, v in merged.named_parameters() if not n.startswith("classifier")}


def _assert_alike(found: Deltas, expected: Deltas, tolerance: float = 2e-6) -> None:
    for name in found.keys() | expected.keys():
        ours, theirs = (side.get(name, torch.zeros(())) for side in (found, expected))
        assert (ours - theirs).abs().max() <= tolerance, name


def _combine(runs: Path, names: Sequence[str], weights: Sequence[float], target: Path, **more: Any) -> Any:
    options = {key: more.pop(key) for key in ("how", "density", "seed") if key in more}
    return combine([runs / one for one in names], target, Recipe(tuple(weights), **options), **more)


# --- linear -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_weight_1_is_itself(name: str, runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    report = _combine(runs, [name], [1.0], tmp_path / "out")
    assert report.result == ("adapter" if name in PRODUCTS else "model")
    again = load_run(tmp_path / "out")
    batch = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with torch.no_grad():
        expected = load_run(runs / name).model(**batch).logits
        assert (again.model(**batch).logits - expected).abs().max() <= 1e-5
    _assert_alike(_deltas(tmp_path / "out", tiny_bert), _deltas(runs / name, tiny_bert))
    assert {*update_of(again).heads} == {"classifier.weight", "classifier.bias"}


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_the_sum_is_that_of_float64_in_any_order_read_by_peft_itself(
    data: st.DataObject, runs: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    names = data.draw(st.permutations(PRODUCTS))[: data.draw(st.integers(1, 4))]
    weights = data.draw(st.lists(st.floats(-2, 2, width=16), min_size=len(names), max_size=len(names)))
    target = tmp_path / "out"
    shutil.rmtree(target, ignore_errors=True)
    if not any(weights):
        with pytest.raises(UsageError, match="not all 0"):
            _combine(runs, names, weights, target)
        return
    report = _combine(runs, names, weights, target, head="1")
    assert report.result == "adapter"
    expected = _summed([_deltas(runs / name, tiny_bert) for name in names], weights)
    _assert_alike(_by_peft(target / "adapter", tiny_bert), expected)
    backwards = tmp_path / "backwards"
    shutil.rmtree(backwards, ignore_errors=True)
    _combine(runs, names[::-1], weights[::-1], backwards, head=str(len(names)))
    _assert_alike(_deltas(backwards, tiny_bert), expected)


def test_biases_are_held_beside_embeddings_which_have_none(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    names, weights = ["embeddings", "in_place", "beside"], [-0.5, 2.0, 1.0]
    _combine(runs, names, weights, tmp_path / "out", head="1")
    expected = _summed([_deltas(runs / name, tiny_bert) for name in names], weights)
    _assert_alike(_by_peft(tmp_path / "out" / "adapter", tiny_bert), expected)


matrices = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def _product(chance: torch.Generator, rank: int, transposed: bool = False) -> LowRank:
    draw = {"generator": chance, "dtype": torch.float64}
    return LowRank(torch.randn(6, rank, **draw), torch.randn(rank, 5, **draw), transposed)


@given(
    chance=matrices, ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), rank=st.integers(1, 6), t=st.booleans()
)
def test_products_of_any_ranks_add_up_and_are_cut_to_the_nearest(
    chance: torch.Generator, ranks: list[int], rank: int, t: bool
) -> None:
    parts = [_product(chance, one, t) for one in ranks]
    whole = added(parts)
    exact = sum(dense(one) for one in parts)
    assert torch.allclose(dense(whole), exact, atol=1e-12) and whole.rank <= 5
    assert length(whole) == pytest.approx(float(exact.norm()))
    assert inner(parts[0], whole) == pytest.approx(float((dense(parts[0]) * exact).sum()), abs=1e-9)
    tail = numpy.linalg.svd(exact.numpy(), compute_uv=False)[rank:]
    for cut in (nearest(whole, rank), nearest_to(exact, rank, t)):
        assert cut.rank <= rank
        assert float((dense(cut) - exact).norm()) == pytest.approx(float(numpy.sqrt((tail**2).sum())), abs=1e-9)


@given(chance=matrices, weights=st.lists(st.floats(-3, 3), min_size=2, max_size=2), factor=st.floats(-3, 3))
def test_a_combination_is_linear_in_its_weights(chance: torch.Generator, weights: list[float], factor: float) -> None:
    changes: list[dict[str, Any]] = [
        {"w": _product(chance, 2)},
        {"w": _product(chance, 3), "b": torch.ones(6).double()},
    ]
    once, scaled = linear(changes, weights), linear(changes, [factor * one for one in weights])
    for name, change in scaled.items():
        expected = factor * dense(once[name]) if name in once else torch.zeros(())
        assert torch.allclose(dense(change), expected.double(), atol=1e-9)


def test_a_rank_gives_the_nearest_adapter_and_tells_its_distance(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    names, weights = ["lora", "rslora", "dora"], [1.0, -0.5, 0.7]
    report = _combine(runs, names, weights, tmp_path / "out", rank=3, head="2")
    expected = _summed([_deltas(runs / name, tiny_bert) for name in names], weights)
    found = _by_peft(tmp_path / "out" / "adapter", tiny_bert)
    squares = {name: (numpy.linalg.svd(one.numpy(), compute_uv=False)[3:] ** 2).sum() for name, one in expected.items()}
    whole = sum(float((one**2).sum()) for one in expected.values())
    assert report.truncation == pytest.approx((sum(squares.values()) / whole) ** 0.5, rel=1e-4)
    for name, one in expected.items():
        assert float((found[name] - one).norm()) == pytest.approx(squares[name] ** 0.5, rel=1e-3, abs=1e-6)
        assert numpy.linalg.matrix_rank(found[name].numpy(), tol=1e-5) <= 3


def test_what_no_adapter_holds_becomes_a_plain_model(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    names, weights = ["lora", "dora", "full"], [1.0, 0.5, -0.25]
    report = _combine(runs, names, weights, tmp_path / "out", head="average" if min(weights) > 0 else "3")
    assert report.result == "model"
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    base = {f"bert.{name}": one.double() for name, one in load_file(tiny_bert / "model.safetensors").items()}
    found = {n: p.detach().double() - base[n] for n, p in plain.named_parameters() if n in base}
    expected = _summed([_deltas(runs / name, tiny_bert) for name in names], weights)
    _assert_alike(found, {name: one for name, one in expected.items() if name in found})
    with pytest.raises(UsageError, match="no adapter can hold the change of 'bert"):
        _combine(runs, names, weights, tmp_path / "other", head="3", rank=2)
    assert not (tmp_path / "other").exists()


def test_small_changes_may_be_stored_within_large_weights(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    report = _combine(runs, ["lora", "dora"], [1e-4, 1e-4], tmp_path / "out", head="1")
    assert report.result == "model" and report.rounding <= 1e-7 < report.truncation


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_changes_are_of_the_weights_that_training_saw(
    variant: str, tiny_bert: Path, toy_data: Path, tmp_path: Path
) -> None:
    method = {"kind": "lora", "rank": 2, "variant": variant}
    quantization = {"kind": "nf4", "block_size": 32}
    _train(tmp_path / "run", tiny_bert, toy_data, method, 3, {"quantization": quantization})
    report = _combine(tmp_path, ["run"], [1.0], tmp_path / "out")
    assert report.result == ("adapter" if variant == "plain" else "model")
    batch = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with torch.no_grad():
        # by full products on both sides: packed layers multiply in bfloat16
        expected, found = (in_full_precision(load_run(tmp_path / name))(**batch).logits for name in ("run", "out"))
    assert (expected - found).abs().max() <= 1e-5
    _train(tmp_path / "whole", tiny_bert, toy_data, method, 1)
    with pytest.raises(UsageError, match=r"other backbone\.quantization"):
        _combine(tmp_path, ["run", "whole"], [1.0, 1.0], tmp_path / "both")


# --- TIES, DARE, magnitude ----------------------------------------------------------------------------------------


def _largest(delta: Deltas, density: float) -> Deltas:
    sizes = numpy.sort(numpy.concatenate([one.abs().numpy().ravel() for one in delta.values()]))[::-1]
    least = sizes[round(density * len(sizes)) - 1]
    return {name: torch.where(one.abs() >= least, one, 0.0) for name, one in delta.items()}


def test_magnitude_pruning_keeps_the_largest_of_each_run(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    names, weights = ["lora", "dora"], [1.0, -0.5]
    _combine(runs, names, weights, tmp_path / "out", head="1", how="magnitude", density=0.3)
    parts = [_largest(_deltas(runs / name, tiny_bert), 0.3) for name in names]
    _assert_alike(_deltas(tmp_path / "out", tiny_bert), _summed(parts, weights))


def test_ties_trims_elects_and_averages(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    names, weights = ["lora", "rslora", "dora"], [0.7, 0.7, 0.7]
    _combine(runs, names, weights, tmp_path / "out", head="1", how="ties", density=0.2)
    parts = [_largest(_deltas(runs / name, tiny_bert), 0.2) for name in names]
    expected = {}
    for name in parts[0]:
        columns = numpy.stack([one[name].numpy().ravel() for one in parts if name in one], axis=1)
        values = []
        for column in columns:
            agreeing = [value for value in column if value * column.sum() > 0]
            values.append(0.7 * numpy.mean(agreeing) if agreeing else 0.0)
        expected[name] = torch.tensor(values, dtype=torch.float64).view(parts[0][name].shape)
    _assert_alike(_deltas(tmp_path / "out", tiny_bert), expected)


def test_dare_drops_at_random_and_scales_up(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    def drawn(target: str, names: Sequence[str], weights: Sequence[float], seed: int) -> Deltas:
        _combine(runs, names, weights, tmp_path / target, head="1", how="dare", density=0.25, seed=seed)
        return _deltas(tmp_path / target, tiny_bert)

    whole, found = _deltas(runs / "dora", tiny_bert), drawn("one", ["dora"], [1.0], 3)
    kept = total = 0
    for name, one in whole.items():
        close = (found[name] - 4 * one).abs() <= 2e-6
        assert (close | (found[name].abs() <= 2e-6)).all(), name
        kept += int(((found[name].abs() > 1e-5) & (one.abs() > 1e-5)).sum())
        total += int((one.abs() > 1e-5).sum())
    assert abs(kept / total - 0.25) < 5 * (0.25 * 0.75 / total) ** 0.5
    _assert_alike(drawn("again", ["dora"], [1.0], 3), found, 0.0)
    other = drawn("other", ["dora"], [1.0], 4)
    assert any((other[name] - found[name]).abs().max() > 1e-3 for name in found)
    both = drawn("both", ["dora", "lora"], [1.0, -1.0], 3)
    _assert_alike(drawn("turned", ["lora", "dora"], [-1.0, 1.0], 3), both)


# --- fused projections --------------------------------------------------------------------------------------------


def test_parts_of_fused_projections_become_changes_of_the_whole(tmp_path: Path, toy_data: Path) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path / "gpt2"
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": len(WORDS) + 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    save_word_tokenizer(folder)
    _train(tmp_path / "part", folder, toy_data, {"kind": "lora", "rank": 2, "targets": "query_value"}, 3)
    _train(tmp_path / "whole", folder, toy_data, {"kind": "lora", "rank": 3, "targets": "c_attn"}, 3)
    _combine(tmp_path, ["part", "whole"], [1.0, -2.0], tmp_path / "out", head="2")
    saved = [
        {name.partition("transformer.")[2]: one.double() for name, one in load_file(file).items()}
        for file in (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("part", "whole"))
    ]
    expected = torch.zeros(16, 48, dtype=torch.float64)
    for index, role in ((0, "query"), (2, "value")):
        factors = [saved[0][f"h.0.attn.c_attn.{role}.lora_{one}.weight"] for one in "BA"]
        expected[:, 16 * index : 16 * (index + 1)] += 8 * (factors[0] @ factors[1]).T
    b, a = (saved[1][f"h.0.attn.c_attn.lora_{one}.weight"] for one in "BA")
    expected -= 2 * (16 / 3) * (b @ a).T
    plain = GPT2ForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=1)
    before = plain.transformer.h[0].attn.c_attn.weight.detach().double().clone()
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "out" / "adapter")).double().merge_and_unload()
    found = merged.transformer.h[0].attn.c_attn.weight.detach() - before
    assert (found - expected).abs().max() <= 2e-6


# --- heads, refusals and faults -----------------------------------------------------------------------------------


def test_heads_that_differ_need_a_choice(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"different heads \(other values of classifier.*--head N"):
        _combine(runs, ["lora", "dora"], [1, 1], tmp_path / "out")
    heads = [update_of(load_run(runs / name)).heads for name in ("lora", "rslora")]
    for choice, shares in (("1", (1, 0)), ("2", (0, 1)), ("average", (0.25, 0.75))):
        _combine(runs, ["lora", "rslora"], [1, 3], tmp_path / choice, head=choice)
        found = update_of(load_run(tmp_path / choice)).heads
        for name, value in found.items():
            expected = shares[0] * heads[0][name] + shares[1] * heads[1][name]
            assert torch.allclose(value, expected, atol=1e-6), (choice, name)
    with pytest.raises(UsageError, match="negative"):
        _combine(runs, ["lora", "rslora"], [1, -3], tmp_path / "out", head="average")
    with pytest.raises(UsageError, match="--head 3: give the number of a run, 1 to 2"):
        _combine(runs, ["lora", "rslora"], [1, 1], tmp_path / "out", head="3")
    assert not (tmp_path / "out").exists()


def _resealed(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that says something else, as a run that was made elsewhere would."""
    file = run / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    change(manifest)
    file.write_text(json.dumps(manifest | {"sha256": manifest_sha256(manifest)}))


@pytest.mark.parametrize("field", ["weights_sha256", "revision", "name"])
def test_runs_of_other_backbones_are_refused(field: str, runs: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs / "rslora", tmp_path / "other"))
    _resealed(
        other, lambda one: one["backbone"].update({field: "other", **({"folder": None} if field == "name" else {})})
    )
    with pytest.raises(UsageError, match=f"different backbones \\({field}: .* and other\\)"):
        combine([runs / "lora", other], tmp_path / "out", Recipe((1, 1)), head="1")
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_lies_elsewhere_is_the_same(runs: Path, tiny_bert: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_bert, tmp_path / "moved"))
    other = Path(shutil.copytree(runs / "rslora", tmp_path / "other"))
    assert weights_sha256(weight_files(moved)) == weights_sha256(weight_files(tiny_bert))
    _resealed(other, lambda one: one["backbone"].update(name=str(moved), folder=str(moved)))
    combine([runs / "lora", other], tmp_path / "out", Recipe((1, 1)), head="1")


def test_what_is_no_number_or_changed_is_refused(runs: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(runs / "lora", tmp_path / "broken"))
    file = broken / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="changed after it was written"):
        combine([broken, runs / "rslora"], tmp_path / "out", Recipe((1, 1)), head="1")
    _resealed(broken, lambda one: one["files"].update({"adapter/adapter_model.safetensors": file_sha256(file)}))
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        combine([broken, runs / "rslora"], tmp_path / "out", Recipe((1, 1)), head="1")
    assert not list(tmp_path.glob("*out*"))


REFUSED = {
    "2 runs and 3 weights": ["lora", "rslora", "--weights", "1", "2", "3", "OUT"],
    "2 runs and 1 weights": ["lora", "rslora", "--weights=1", "OUT"],
    "not all 0": ["lora", "rslora", "--weights", "0", "0", "OUT"],
    "must be numbers": ["lora", "--weights", "nan", "OUT"],
    "given twice": ["lora", "rslora", "lora", "--weights", "1", "1", "1", "OUT"],
    "not a number": ["lora", "--weights", "OUT"],
    "give at least one run": ["--weights", "1", "OUT"],
    "no run folder": ["lora", "nowhere", "--weights", "1", "1", "OUT"],
    "exists; name a new folder": ["lora", "--weights", "1", "rslora"],
    "lies inside": ["lora", "--weights", "1", "lora/inner"],
    "--how ties needs --density": ["lora", "--weights", "1", "OUT", "--how", "ties"],
    "--density is for": ["lora", "--weights", "1", "OUT", "--density", "0.5"],
    "--density 1.5 must be": ["lora", "--weights", "1", "OUT", "--how", "ties", "--density", "1.5"],
    "--seed is for": ["lora", "--weights", "1", "OUT", "--seed", "1"],
    "0 is not a positive number": ["lora", "--weights", "1", "OUT", "--rank", "0"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_requests_are_refused_in_plain_words(
    message: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    before = sorted(runs.rglob("*"))
    arguments = [str(tmp_path / "out") if one == "OUT" else one for one in REFUSED[message]]
    assert main(["combine", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir()) and sorted(runs.rglob("*")) == before


@pytest.mark.parametrize("fault", ["scale", "missing", "head"])
def test_a_fault_in_writing_is_caught_by_reading_back(
    fault: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.artifacts import combine as verb

    honest = verb.write_adapter

    def write(folder: Path, like: Any, changes: Any, heads: Any, record: Any) -> None:
        first = next(iter(changes))
        if fault == "scale":
            changes = changes | {first: changes[first].times(1.001)}
        if fault == "missing":
            changes = {name: one for name, one in changes.items() if name != first}
        if fault == "head":
            heads = {name: one + 1e-3 for name, one in heads.items()}
        honest(folder, like, changes, heads, record)

    monkeypatch.setattr(verb, "write_adapter", write)
    with pytest.raises(ArtifactError, match="nothing was written"):
        _combine(runs, ["lora", "rslora"], [1, 1], tmp_path / "out", head="1")
    assert not list(tmp_path.iterdir())


def test_the_result_is_a_run_for_every_verb(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    arguments = [str(runs / "lora"), str(runs / "rslora"), "--weights", "0.5", "-1", out, "--head", "1"]
    assert main(["combine", *arguments]) == 0
    told = capfd.readouterr().out
    assert "combined  -1 × " in told and "an adapter of rank 4 to 6 on 12 matrices" in told
    for verb in (["evaluate", out], ["predict", out, "a good film"], ["merge", out, str(tmp_path / "merged")]):
        assert main(verb) == 0
    capfd.readouterr()
    assert main(["combine", out, "--weights", "2", str(tmp_path / "again"), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["result"] == "adapter" and set(report["ranks"].values()) == {4, 6}
    assert json.loads((tmp_path / "again" / "combination.json").read_text()) == report
