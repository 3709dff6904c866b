"""What a merge is proven by: faults that are planted in each of its stages, and what is refused before it begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from merging import METHODS, described, llama, made, rows
from safetensors.torch import load_file, save_file

from benchmarks.made_runs import make_run
from peftkit.artifacts.fresh_process import Rereader
from peftkit.artifacts.loading import merge_backbone
from peftkit.artifacts.merge import merge, write_merged
from peftkit.artifacts.rounding import rounded
from peftkit.artifacts.settings import MergeSettings
from peftkit.artifacts.store import load_run
from peftkit.artifacts.streamed import merge_streamed
from peftkit.cli import main
from peftkit.disk import file_sha256, manifest_sha256
from peftkit.errors import ArtifactError, NotMergeable, UsageError

Fault = Callable[[Path], None]
IN_WEIGHTS = ("bias forgotten", "transposed delta", "tied weight not copied", "missing head", "one bit")
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("proof")
    return {"bert": tiny_bert} | {name: llama(root / name, tied=name == "tied") for name in ("tied", "untied")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, backbones: dict[str, Path]) -> dict[str, Path]:
    """Runs that are never written to."""
    root = tmp_path_factory.mktemp("proof_runs")
    cells = {"relations": ("bert", "lora"), "text": ("tied", "lora_bias"), "classes": ("untied", "lora")}
    return {task: made(backbones[name], task, method, root / task) for task, (name, method) in cells.items()}


def altered(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Fault:
    """Change tensors of a file."""

    def fault(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file({one: tensor.contiguous() for one, tensor in tensors.items()}, folder / name, {"format": "pt"})

    return fault


def said(name: str, **values: Any) -> Fault:
    """Change what a JSON file says; None leaves it out."""

    def fault(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        tree = {key: value for key, value in (tree | values).items() if value is not None}
        (folder / name).write_text(json.dumps(tree))

    return fault


def without(name: str) -> Fault:
    return lambda folder: (folder / name).unlink()


def stale(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")


def old_adapter(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def _scaled(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"] *= 1.001


def _transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].T


def _no_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.bias"].zero_()


def _no_head(tensors: dict[str, torch.Tensor]) -> None:
    for name in [one for one in tensors if one.startswith("classifier")]:
        del tensors[name]


def _untied(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])


def _bit(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors[f"{LAYER}.weight"]
    weight.view(torch.int32)[0, 0] ^= 1


def _new_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors["bert.embeddings.word_embeddings.weight"][-1] = 0


FILES: dict[str, tuple[str, Fault, str]] = {
    "wrong scale": ("text", altered("model.safetensors", _scaled), "not W . ΔW"),
    "transposed delta": ("text", altered("model.safetensors", _transposed), "not W . ΔW"),
    "bias forgotten": ("text", altered("model.safetensors", _no_bias), "not W . ΔW"),
    "one bit": ("text", altered("model.safetensors", _bit), "not W . ΔW"),
    "tied weight not copied": ("text", altered("model.safetensors", _untied), "share|not W"),
    "output no longer tied": ("text", said("config.json", tie_word_embeddings=False), "tie_word_embeddings False"),
    "row of a new token": ("relations", altered("model.safetensors", _new_row), "not W . ΔW"),
    "missing head": ("relations", altered("model.safetensors", _no_head), "missing weights: classifier"),
    "wrong label names": ("relations", said("config.json", id2label={"0": "none", "1": "near"}), "its labels are none"),
    "label names left out": ("relations", said("config.json", id2label=None, label2id=None), "id2label"),
    "tokenizer without the added token": ("relations", said("tokenizer.json", added_tokens=[]), "tokenizer differs"),
    "missing tokenizer": ("relations", without("tokenizer.json"), "tokenizer|read back"),
    "missing generation config": ("text", without("generation_config.json"), "generation_config.json is missing"),
    "other generation config": ("text", said("generation_config.json", max_new_tokens=8), "max_new_tokens 8"),
    "stale file": ("text", stale, "does not belong there"),
    "stale adapter": ("text", old_adapter, "adapter_model.safetensors does not belong there"),
    "other dtype said": ("text", said("config.json", dtype="float16"), "float16"),
    "no weights": ("text", without("model.safetensors"), "read back"),
    "chat template": ("text", other_template, "chat template"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_fault_in_the_files_is_caught(
    name: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, fault, message = FILES[name]

    def faulty(merged: Any, saved: Any, folder: Path, settings: MergeSettings) -> Any:
        expected = write_merged(merged, saved, folder, settings)
        fault(folder)
        return expected

    monkeypatch.setattr("peftkit.artifacts.merge.write_merged", faulty)
    with pytest.raises(ArtifactError, match=message):
        merge(load_run(runs[task]), tmp_path / "out", rows(task), MergeSettings(dtype="float32"))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_left_out_is_caught(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(merged: Any, saved: Any, folder: Path, settings: MergeSettings) -> Any:
        expected = write_merged(merged, saved, folder, settings)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        last = sorted(folder.glob("model-*.safetensors"))[-1]
        last.unlink()
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != last.name}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return expected

    monkeypatch.setattr("peftkit.artifacts.merge.write_merged", faulty)
    with pytest.raises(ArtifactError, match="missing weights"):
        merge(load_run(runs["text"]), tmp_path / "out", rows("text"), MergeSettings(shard_bytes=50_000))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_cast_twice_are_caught(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No logit tells: both roundings are far below the tolerance of bfloat16."""
    from transformers import LlamaForCausalLM

    cast = LlamaForCausalLM.to
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda self, kind: cast(cast(self, torch.float16), kind))
    with pytest.raises(ArtifactError, match=r"not W \+ ΔW, cast once"):
        merge(load_run(runs["text"]), tmp_path / "out", rows("text"), MergeSettings(dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["scale", "transposed", "left out"])
def test_a_fault_in_the_arithmetic_is_caught(
    fault: str, dtype: Any, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 before anything is cast, where the tolerance of bfloat16 does not hide it."""
    from peft.tuners.lora import Linear

    delta = Linear.get_delta_weight
    faults = {"scale": lambda one: one * 1.05, "transposed": lambda one: one.T, "left out": lambda one: one * 0}

    def faulty(self: Any, adapter: str) -> torch.Tensor:
        found = delta(self, adapter)
        square = found.shape[0] == found.shape[1]
        return faults[fault](found) if square or fault != "transposed" else found

    monkeypatch.setattr(Linear, "get_delta_weight", faulty)
    with pytest.raises(ArtifactError, match="the merge itself is not the one that was evaluated"):
        merge(load_run(runs["classes"]), tmp_path / "out", rows("classes"), MergeSettings(dtype=dtype))
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_of_another_run_is_caught(
    runs: dict[str, Path], backbones: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the same shapes, whose merge is right in itself."""
    other = made(backbones["untied"], "classes", "rslora", tmp_path / "other")
    saved, wrong = load_run(runs["classes"]), load_run(other)
    monkeypatch.setattr("peftkit.artifacts.merge.in_full_precision", lambda *_, **__: wrong.model)
    with pytest.raises(ArtifactError, match="not the one that was evaluated: logits differ"):
        merge(saved, tmp_path / "out", rows("classes"))
    assert not (tmp_path / "out").exists()


def test_a_process_with_peft_is_no_witness(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = Rereader.describe

    def partial(self: Rereader, *arguments: Any, **options: Any) -> Any:
        found, logits = describe(self, *arguments, **options)
        return found | {"imported": ["peft"]}, logits

    monkeypatch.setattr(Rereader, "describe", partial)
    with pytest.raises(ArtifactError, match="not plain transformers: it imported peft"):
        merge(load_run(runs["classes"]), tmp_path / "out", rows("classes"))


def test_float64_is_nearer_to_the_exact_sum(runs: dict[str, Path], tmp_path: Path) -> None:
    """W + 2 · B A in float64, cast once, bit for bit."""
    merge(load_run(runs["classes"]), tmp_path / "out", rows("classes"), MergeSettings(precision="float64"))
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{LAYER}.weight"]
    adapter = load_file(runs["classes"] / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{LAYER}.lora_{one}.weight"].double() for one in "AB")
    base = Path(json.loads((runs["classes"] / "manifest.json").read_text())["backbone"]["folder"])
    weight = load_file(base / "model.safetensors")[f"{LAYER}.weight"].double()
    assert torch.equal(found, (weight + 2.0 * (b @ a)).float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float64_is_rounded_once(dtype: Any, copied: Path, tmp_path: Path) -> None:
    """Sums that lie 2^-40 beside the middle of two numbers, which float32 takes for the middle, as torch's own cast
    does on its way to 16 bits; then the even number is taken, and here the odd one is nearer."""
    base = Path(json.loads((copied / "manifest.json").read_text())["backbone"]["folder"])
    weight = load_file(base / "model.safetensors")[f"{LAYER}.weight"].double()
    bits = {"bfloat16": 8, "float16": 11}[dtype]
    mantissas, exponents = numpy.frexp(weight[0].numpy())
    middles = numpy.ldexp(
        2 * numpy.trunc(numpy.ldexp(mantissas, bits - 1)) + numpy.sign(mantissas) / 2, exponents - bits
    )
    file = copied / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    a, b = (tensors[f"base_model.model.{LAYER}.lora_{one}.weight"].zero_() for one in "AB")
    a[0], a[1] = torch.from_numpy(middles) - weight[0], torch.from_numpy(numpy.ldexp(middles, -40))
    b[0, :2] = 0.5  # the scale is 2
    save_file(tensors, file, {"format": "pt"})
    signed(copied)
    settings = MergeSettings(precision="float64", dtype=dtype)
    merge(load_run(copied), tmp_path / "out", rows("classes"), settings)
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{LAYER}.weight"][0].double()
    exact = (weight[0] + a[0].double() + a[1].double()).numpy()
    nearest = numpy.ldexp(numpy.rint(numpy.ldexp(numpy.frexp(exact)[0], bits)), numpy.frexp(exact)[1] - bits)
    assert (nearest != weight[0].float().numpy()).any() and (exact != middles).all()
    assert (found.numpy() == nearest).all()
    assert not torch.equal(torch.from_numpy(exact).to(getattr(torch, dtype)).double(), found)
    merge_streamed(copied, tmp_path / "streamed", settings)
    assert file_sha256(tmp_path / "streamed" / "model.safetensors") == file_sha256(tmp_path / "out/model.safetensors")


def test_every_kind_of_number_is_rounded_to_the_nearest() -> None:
    """As numpy casts to float16, which goes there at once; subnormal, infinite and none among them."""
    chance = numpy.random.default_rng(0)
    values = numpy.ldexp(1 + chance.integers(0, 2**12, 4000) / 2**11, chance.integers(-30, 18, 4000))
    values *= chance.choice([-1, 1], 4000) * (1 + chance.choice([-1, 0, 1], 4000) * 2.0**-40)
    values = numpy.concatenate([values, [0.0, -0.0, numpy.inf, -numpy.inf, numpy.nan]])
    with numpy.errstate(over="ignore"):
        wanted = values.astype(numpy.float16)
    tensor = torch.from_numpy(values)
    found = rounded(tensor, torch.float16)
    assert (found.numpy().view(numpy.int16) == wanted.view(numpy.int16))[:-1].all() and found[-1].isnan()
    assert not torch.equal(tensor[:-1].half(), found[:-1])
    assert torch.equal(rounded(tensor[:-1].float(), torch.float16), tensor[:-1].float().half())
    assert torch.equal(rounded(torch.arange(3), torch.float16), torch.arange(3))


def test_the_report_has_the_figures(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "probe.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows("relations").records))
    target = tmp_path / "out"
    assert main(["merge", str(runs["relations"]), str(target), "--data", str(file), "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    report = json.loads((target / "peftkit_merge.json").read_text())
    assert f"{report['equal_predictions']} of 12 predictions equal after re-reading" in out
    assert f"micro_f1 {report['score']['before']:.6g} before, {report['score']['after']:.6g} after" in out
    assert report["score"]["name"] == "micro_f1" and 0 < report["relative"] <= report["tolerance"] == 5e-3
    assert 0 <= report["mean_divergence"] <= report["largest_divergence"] < 1e-4
    assert report["files"] == {
        one.name: file_sha256(one) for one in target.iterdir() if one.name != "peftkit_merge.json"
    }
    assert report["settings"]["dtype"] == "float16" and report["settings"]["probe"] == str(file)


def test_rows_without_labels_are_compared_and_not_scored(runs: dict[str, Path], tmp_path: Path) -> None:
    saved = load_run(runs["classes"])
    report = merge(saved, tmp_path / "out", saved.run.task.rows_from_text(["good film", "a sad story"]))
    assert (report.rows, report.score) == (2, None)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]], ids=["input", "output"])
def test_what_was_tied_and_adapted_on_one_side_is_tied_no_more(
    targets: list[str], backbones: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ΔW is of the input alone, or of the output alone, and one matrix cannot be both."""
    monkeypatch.setitem(METHODS, "one side", METHODS["lora"] | {"targets": targets})
    run = made(backbones["tied"], "text", "one side", tmp_path / "run")
    report = merge(load_run(run), tmp_path / "out", rows("text"))
    assert report.relative <= 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    with pytest.raises(NotMergeable, match="share"):
        merge_streamed(run, tmp_path / "streamed", MergeSettings())


# --- quantised backbones -------------------------------------------------------------------------------------------


def test_a_quantised_run_is_merged_in_three_ways(
    backbones: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Onto what training saw it is nearest to what was evaluated; each says how near."""
    run = made(backbones["untied"], "classes", "lora", tmp_path / "run", quantization={"kind": "nf4"})
    file = tmp_path / "probe.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows("classes", 40).records))
    ways = {"trained": [], "full-precision": ["--onto", "full-precision"], "requantized": ["--requantize"]}
    far = {}
    for way, options in ways.items():
        assert main(["merge", str(run), str(tmp_path / way), "--data", str(file), *options]) == 0
        report = json.loads((tmp_path / way / "peftkit_merge.json").read_text())
        assert report["settings"]["dtype"] == "bfloat16" and report["settings"]["onto"] == way
        assert f"({report['relative']:.2g} relative" in capsys.readouterr().out
        far[way] = report["mean_divergence"]
    assert far["trained"] < min(far["full-precision"], far["requantized"])
    config = json.loads((tmp_path / "requantized" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    base = load_file(backbones["untied"] / "model.safetensors")[f"{LAYER}.weight"].double()
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{LAYER}.lora_{one}.weight"].double() for one in "AB")
    full = load_file(tmp_path / "full-precision" / "model.safetensors")[f"{LAYER}.weight"]
    torch.testing.assert_close(full, (base + 2.0 * (b @ a)).to(torch.bfloat16), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("option", [["--requantize"], ["--onto", "full-precision"]])
def test_other_runs_have_no_such_ways(
    option: list[str], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", str(runs["classes"]), str(tmp_path / "out"), "--data", str(tmp_path / "one.txt")]
    (tmp_path / "one.txt").write_text("good film\n")
    assert main([*arguments, *option]) == 2
    assert "is for runs over a quantised backbone" in capsys.readouterr().err


def test_blocks_that_transformers_cannot_save_are_refused(backbones: dict[str, Path], tmp_path: Path) -> None:
    held = {"quantization": {"kind": "nf4", "block_size": 32}}
    saved = load_run(made(backbones["untied"], "classes", "lora", tmp_path / "run", **held))
    with pytest.raises(UsageError, match="blocks of 64 alone"):
        merge(saved, tmp_path / "out", rows("classes"), MergeSettings(onto="requantized"))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["classes"], tmp_path / "copy"))


def refused(capsys: pytest.CaptureFixture[str], run: Path, target: Path, *options: str) -> str:
    (run.parent / "one.txt").write_text("good film\n")
    assert main(["merge", str(run), str(target), "--data", str(run.parent / "one.txt"), *options]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and not target.exists()
    return error


def signed(run: Path, **changes: Any) -> None:
    """Write a manifest anew, as whoever changes a run on purpose would."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["files"] = {name: file_sha256(run / name) for name in manifest["files"]}
    manifest |= changes
    (run / "manifest.json").write_text(json.dumps(manifest | {"sha256": manifest_sha256(manifest)}))


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["in memory", "streaming"])
def test_another_base_is_refused(
    streaming: list[str], copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    signed(copied, backbone=manifest["backbone"] | {"weights_sha256": "0" * 64})
    error = refused(capsys, copied, tmp_path / "out", *streaming)
    assert "is not the backbone that" in error and "000000000000…" in error


def test_nan_in_the_adapter_is_refused(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    signed(copied)
    assert "holds NaN" in refused(capsys, copied, tmp_path / "out")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("peftkit.disk.shutil.disk_usage", lambda place: usage._replace(free=2**21))
    for options in ([], ["--streaming"]):
        error = refused(capsys, copied, tmp_path / "out", *options)
        assert "the merged model needs" in error and "are free" in error


@pytest.mark.parametrize("size", ["2 apples", "0", "-1GB", "1.5GB"])
def test_a_size_that_is_none_is_refused(
    size: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"'{size}' is no size" in refused(capsys, copied, tmp_path / "out", f"--shard-size={size}")


def test_a_process_that_dies_is_told(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftkit.artifacts.fresh_process.MODULE", "no_such_module")
    reader = Rereader()
    with pytest.raises(ArtifactError, match=r"ended by itself \(code 1: .*No module named no_such_module"):
        merge(load_run(runs["classes"]), tmp_path / "out", rows("classes"), reader=reader)
    reader.kill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["in memory", "streaming"])
def test_a_run_that_was_built_on_another_is_merged(
    streaming: list[str], runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the first one's merged model was removed, which is made again."""
    first = Path(shutil.copytree(runs["text"], tmp_path / "first"))
    run = described(first, "text", "rslora", tmp_path / "second")
    merge_backbone(run)
    second = make_run(run, run.task.head(rows("text")), tmp_path / "second")
    shutil.rmtree(first / "merged")
    file = tmp_path / "probe.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows("text", 4).records))
    assert main(["merge", str(second), str(tmp_path / "out"), "--data", str(file), *streaming]) == 0
    assert "4 of 4 predictions equal" in capsys.readouterr().out
