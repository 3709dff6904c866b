"""Exports beside what they were made of, through each format's own reader: ONNX Runtime, transformers' GGUF, peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from conftest import write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
)

from peftkit.artifacts.export_gguf import export_gguf
from peftkit.artifacts.export_onnx import OnnxReport, export_onnx
from peftkit.artifacts.export_vllm import export_vllm
from peftkit.artifacts.loading import load_run
from peftkit.cli import main
from peftkit.errors import ArtifactError, UsageError

LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def run_of(root: Path, tiny_bert: Path, toy_data: Path, real_data: Path) -> Callable[..., Path]:
    """The folder of a finished run, by a name; trained once, never written to."""
    sentences = [
        {"prompt": f"Once there was a {one}", "completion": " who was happy."} for one in ["cat", "dog", "cow", "pig"]
    ]
    for split in ("train", "dev"):
        write_jsonl(root / f"stories_{split}.jsonl", sentences)
    tasks: dict[str, dict[str, Any]] = {
        "sentiment": {"kind": "sequence_classification"},
        "mean": {"kind": "sequence_classification", "pooling": "mean"},
        "entities": {"kind": "token_classification"},
        "stories": {"kind": "completion"},
    }

    def train(name: str, method: dict[str, Any] = LORA, backbone: Path = tiny_bert, steps: int = 4) -> Path:
        task, folder = name.partition("-")[0], root / name
        if folder.exists():
            return folder
        files = {
            "stories": {split: str(root / f"stories_{split}.jsonl") for split in ("train", "dev")},
            "entities": {split: str(toy_data / f"entities_{split}.conll") for split in ("train", "dev", "test")},
        }.get(task, {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")})
        tree = {
            "backbone": {"name": str(backbone)},
            "task": tasks[task] | {"data": files, "max_length": 32},
            "method": method,
            "training": {"learning_rate": 0.01, "max_steps": steps, "batch_size": 16, "seed": 1},
            "audit": {"allow": ["overlap-dev", "duplicates"]},
            "output": {"folder": str(folder)},
        }
        (root / f"{name}.yaml").write_text(json.dumps(tree))
        assert main(["train", str(root / f"{name}.yaml")]) == 0
        return folder

    return train


@pytest.fixture(scope="module")
def stories(real_weights: Path) -> Path:
    """A Llama of 260 thousand weights that tells stories."""
    folder = real_weights / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


# --- ONNX ---------------------------------------------------------------------------------------------------------


def _by_hand(folder: Path, texts: list[str], file: str = "model.onnx") -> list[numpy.ndarray]:
    """The first output for each text alone, as somebody without peftkit computes it."""
    session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [one.name for one in session.get_inputs()]
    return [
        session.run(None, {name: tokenizer(text, return_tensors="np")[name] for name in names})[0][0] for text in texts
    ]


@pytest.fixture(scope="module")
def exported(run_of: Callable[..., Path], root: Path) -> tuple[Path, OnnxReport]:
    """The sentiment run in ONNX, in 8 bits too."""
    return root / "onnx", export_onnx(run_of("sentiment"), root / "onnx", int8=True)


def _check_probabilities(
    run: Path, texts: list[str], logits: list[numpy.ndarray], capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(["predict", str(run), *texts]) == 0
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    for answer, one in zip(answers, logits, strict=True):
        chances = numpy.exp(one) / numpy.exp(one).sum()
        assert [answer["probabilities"][name] for name in ("negative", "positive")] == pytest.approx(chances, abs=1e-5)


def _texts(toy_data: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (toy_data / "sentiment_test.jsonl").read_text().splitlines()]


def test_a_classifier_gives_the_same_labels_in_onnx_runtime(
    run_of: Callable[..., Path], exported: tuple[Path, OnnxReport], toy_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, report = exported
    assert report.rows == 60 and report.graphs["model.onnx"].equal == 60
    assert report.graphs["model.onnx"].relative <= 1e-5
    assert report.graphs["model.onnx"].scores == pytest.approx(report.scores)
    texts = _texts(toy_data)
    _check_probabilities(run_of("sentiment"), texts, _by_hand(folder, texts), capfd)


def test_what_8_bits_cost_is_measured(exported: tuple[Path, OnnxReport], toy_data: Path) -> None:
    folder, report = exported
    small = report.graphs["model_int8.onnx"]
    assert small.bytes < report.graphs["model.onnx"].bytes and small.relative < 0.5
    whole, rounded = (numpy.stack(_by_hand(folder, _texts(toy_data), one)) for one in report.graphs)
    assert abs(whole - rounded).max() > 1e-4
    labels = [json.loads(line)["label"] for line in (toy_data / "sentiment_test.jsonl").read_text().splitlines()]
    right = [("negative", "positive")[one] == label for one, label in zip(rounded.argmax(-1), labels, strict=True)]
    assert small.scores["accuracy"] == pytest.approx(sum(right) / 60, abs=0.02)
    assert small.equal == pytest.approx(int((whole.argmax(-1) == rounded.argmax(-1)).sum()), abs=1)


def test_a_merged_model_with_mean_pooling_is_exported(
    run_of: Callable[..., Path], toy_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(run_of("mean")), str(tmp_path / "merged")]) == 0
    report = export_onnx(tmp_path / "merged", tmp_path / "out")
    assert (report.pooling, report.rows) == ("mean", 5) and report.graphs["model.onnx"].equal == 5
    texts = _texts(toy_data)
    _check_probabilities(run_of("mean"), texts, [one.mean(0) for one in _by_hand(tmp_path / "out", texts)], capfd)


def test_a_tagger_is_exported(run_of: Callable[..., Path], tmp_path: Path) -> None:
    report = export_onnx(run_of("entities"), tmp_path / "out")
    assert report.rows == 60 == report.graphs["model.onnx"].equal
    assert report.graphs["model.onnx"].scores == pytest.approx(report.scores)


def test_answers_are_exported_as_two_outputs(tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_pretrained(tiny_bert).eval()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    report = export_onnx(tmp_path / "model", tmp_path / "out")
    assert report.outputs == ("start_logits", "end_logits") and report.graphs["model.onnx"].equal == 5
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(
        "the good film", "alice met bob in paris", return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**batch)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    start, end = session.run(["start_logits", "end_logits"], {name: one.numpy() for name, one in batch.items()})
    assert abs(start - expected.start_logits.numpy()).max() <= 1e-5
    assert abs(end - expected.end_logits.numpy()).max() <= 1e-5


def test_a_graph_that_computes_something_else_is_not_handed_out(
    run_of: Callable[..., Path], exported: tuple[Path, OnnxReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.artifacts import export_onnx as exporter

    changed = AutoModelForSequenceClassification.from_pretrained(_merged(run_of("sentiment"), tmp_path / "merged"))
    with torch.no_grad():
        changed.classifier.bias[0] += 1e-3
    changed.save_pretrained(tmp_path / "merged")
    # a stale graph, of the model as it was
    monkeypatch.setattr(exporter, "_write_graph", lambda *given: shutil.copy(exported[0] / "model.onnx", given[-1]))
    with pytest.raises(ArtifactError, match=r"does not compute what the model does: logits differ by 0.001"):
        export_onnx(tmp_path / "merged", tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["merged"]


def _merged(run: Path, target: Path) -> Path:
    assert main(["merge", str(run), str(target)]) == 0
    return target


def test_onnx_needs_its_extra(run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(
        UsageError, match=r"onnx, onnxruntime, onnxscript is not installed; pip install 'peftkit\[export\]'"
    ):
        export_onnx(run_of("sentiment"), tmp_path / "out")


# --- GGUF ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_llama_is_read_back_by_transformers_and_tells_the_same(
    precision: Any, stories: Path, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of("stories", backbone=stories)
    report = export_gguf(run, tmp_path / "out", precision=precision)
    saved = load_run(run)
    merged = saved.run.method.merge(saved.model)
    how: dict[str, Any] = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True)}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **how)
    for name, parameter in merged.named_parameters():
        wide = precision == "float32" or parameter.ndim < 2
        assert torch.equal(dict(found.named_parameters())[name], parameter if wide else parameter.half().float()), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    own = AutoTokenizer.from_pretrained(stories)
    for text in ("Once upon a time, 3 dogs", "two  spaces", "Ünïcode — 汉字"):
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert report.prompts == 5 and (report.equal_texts == 5 or precision == "float16")
    assert (report.largest_difference == 0) == (precision == "float32")
    told = merged.generate(
        **own(report.texts[1][0], return_tensors="pt"), do_sample=False, max_new_tokens=24, pad_token_id=2
    )
    assert own.decode(told[0], skip_special_tokens=True).endswith(report.texts[1][1]) or precision == "float16"


def test_byte_level_tokenizers_and_untied_outputs_are_written_too(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat in 1997"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(fast) + 3, intermediate_size=48, bos_token_id=0, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    report = export_gguf(tmp_path / "model", tmp_path / "out", ["the cat", "in 1997"])
    assert report.equal_texts == 2 and report.tensors == 12


def test_a_weight_that_is_read_back_otherwise_is_refused(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.artifacts import gguf_writer

    monkeypatch.setattr(gguf_writer, "permuted", lambda weight, heads: weight)
    with pytest.raises(ArtifactError, match=r"q_proj.weight' was read back from GGUF with other values"):
        export_gguf(stories, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_gguf_would_not_tell_is_refused(
    run_of: Callable[..., Path], tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run_of("sentiment")), str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "GGUF is written of Llama language models only" in capfd.readouterr().err
    assert main(["export", str(tiny_llama), str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "the tokenizer (WordLevel" in capfd.readouterr().err
    scaled = Path(shutil.copytree(tiny_llama, tmp_path / "scaled"))
    config = json.loads((scaled / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (scaled / "config.json").write_text(json.dumps(config))
    assert main(["export", str(scaled), str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "scales its positions" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


# --- vLLM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [
        ("stories", LORA, 4),
        ("stories-rslora", {"kind": "lora", "rank": 3, "variant": "rslora", "targets": "query_value"}, 4),
        ("stories-adalora", {"kind": "adalora", "target_rank": 2}, 20),
    ],
)
def test_an_adapter_for_vllm_has_one_rank_and_the_same_function(
    name: str, method: dict[str, Any], steps: int, stories: Path, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of(name, method, stories, steps)
    report = export_vllm(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {one.shape[0 if ".lora_A." in key else 1] for key, one in tensors.items()} == {config["r"]} == {report.rank}
    assert report.max_lora_rank == 8 and config["lora_alpha"] == config["r"]
    ids = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(stories)
    with torch.no_grad():
        expected = load_run(run).model(ids).logits
        found = PeftModel.from_pretrained(plain, str(tmp_path / "out"))(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_adapters_beyond_the_limits_are_told_all_of_them(
    stories: Path, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    dora = run_of("stories-dora", {"kind": "lora", "rank": 2, "variant": "dora"}, stories)
    biased = run_of("sentiment-bias", {"kind": "peft", "type": "lora", "r": 2, "lora_bias": True})
    told = {
        dora: ["full rank (method 'lora')", "peftkit combine RUN --weights 1 --rank R OUT"],
        biased: ["LoRA of language models", "saved whole (classifier)", "trained biases ('bert"],
    }
    for run, reasons in told.items():
        with pytest.raises(UsageError) as refused:
            export_vllm(run, tmp_path / "out")
        assert all(reason in str(refused.value) for reason in reasons)
    assert main(["combine", str(dora), "--weights", "1", "--rank", "2", str(tmp_path / "plain")]) == 0
    assert export_vllm(tmp_path / "plain", tmp_path / "out").rank == 2


# --- requests -----------------------------------------------------------------------------------------------------


def test_wrong_requests_are_refused_in_plain_words(
    run_of: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = str(run_of("sentiment")), str(tmp_path / "out")
    refused = {
        "no folder": ["nowhere", out, "--format", "onnx"],
        "exists; name a new folder": [run, str(tmp_path), "--format", "onnx"],
        "lies inside": [run, f"{run}/out", "--format", "onnx"],
        "--int8 is for": [run, out, "--format", "gguf", "--int8"],
        "--float16 is for": [run, out, "--format", "onnx", "--float16"],
        "--data and --probe-rows": [run, out, "--format", "vllm", "--probe-rows", "2"],
        "no file": [run, out, "--format", "onnx", "--data", f"{tmp_path}/none.txt"],
        "invalid choice: 'tflite'": [run, out, "--format", "tflite"],
    }
    for message, arguments in refused.items():
        assert main(["export", *arguments]) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ") and message in error, error
    assert not list(tmp_path.iterdir())


def test_texts_are_enough_to_compare_on(
    run_of: Callable[..., Path],
    exported: tuple[Path, OnnxReport],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peftkit.artifacts import export_onnx as exporter

    monkeypatch.setattr(exporter, "_write_graph", lambda *given: shutil.copy(exported[0] / "model.onnx", given[-1]))
    (tmp_path / "texts.txt").write_text("a good film\nthe sad , sad story\n")
    arguments = ["--format", "onnx", "--data", str(tmp_path / "texts.txt")]
    assert main(["export", str(run_of("sentiment")), str(tmp_path / "out"), *arguments]) == 0
    told = capfd.readouterr().out
    assert "2 of 2 predictions equal" in told and "accuracy" not in told
    assert json.loads((tmp_path / "out" / "export.json").read_text())["rows"] == 2
