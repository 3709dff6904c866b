"""Finished runs through the real command line: what is in the folder, predictions, merging, and every refusal."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FILLERS, entity_rows, sentiment_rows, write_jsonl
from safetensors.torch import load_file

from peftkit.artifacts.merge import merge
from peftkit.artifacts.store import load_run
from peftkit.cli import main
from peftkit.data.collate import collate
from peftkit.prepare import encode_split

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"},
    "full": {"kind": "full"},
    "head": {"kind": "head"},
}
RATES = {"lora": 0.01, "full": 0.003, "head": 0.05}
KINDS = ("sentiment-lora", "sentiment-lora-mean", "sentiment-full", "sentiment-head", "entities-lora", "entities-full")
MERGED = ("sentiment-lora", "sentiment-lora-mean", "sentiment-full", "entities-lora", "pairs-lora")


def pair_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Two texts that are the same, or not."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        one, two = (" ".join(chance.choices(FILLERS, k=3)) for _ in range(2))
        same = chance.random() < 0.5
        rows.append({"first": one, "second": one if same else two, "label": "same" if same else "other"})
    return rows


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, toy_data: Path) -> Callable[..., Path]:
    """Writes a configuration by its kind, such as `sentiment-lora-mean`."""
    root = tmp_path_factory.mktemp("configured")
    for seed, split in enumerate(("train", "dev", "test")):
        write_jsonl(root / f"pairs_{split}.jsonl", pair_rows(60, seed))

    def write(kind: str, folder: Path) -> Path:
        data, method, *pooling = kind.split("-")
        files = {
            split: str(root / f"pairs_{split}.jsonl" if data == "pairs" else next(toy_data.glob(f"{data}_{split}.*")))
            for split in ("train", "dev", "test")
        }
        task: dict[str, Any] = {"kind": "sequence_classification", "data": files, "max_length": 32}
        if data == "entities":
            task["kind"] = "token_classification"
        if data == "pairs":
            task |= {"text": "first", "text_pair": "second"}
        if pooling:
            task["pooling"] = pooling[0]
        tree = {
            "backbone": {"name": str(tiny_bert)},
            "task": task,
            "method": METHODS[method],
            "training": {"learning_rate": RATES[method], "epochs": 4, "batch_size": 16, "seed": 1},
            "output": {"folder": str(folder)},
        }
        file = root / f"{kind}.yaml"
        file.write_text(json.dumps(tree))
        return file

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, configured: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of a finished run of a kind; trained once, never written to by tests."""
    root = tmp_path_factory.mktemp("finished")

    def train(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            assert main(["train", str(configured(kind, folder))]) == 0
        return folder

    return train


@pytest.fixture
def copied(finished: Callable[[str], Path], tmp_path: Path) -> Path:
    """A finished run to do harm to."""
    return Path(shutil.copytree(finished("sentiment-lora"), tmp_path / "copy"))


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _answers(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capfd.readouterr()
    assert main(["predict", *arguments]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return _lines(out)


def _refused(capfd: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    capfd.readouterr()
    assert main(arguments) == code
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    return error


# --- the run folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_is_complete(kind: str, finished: Callable[[str], Path]) -> None:
    folder = finished(kind)
    artifact = {"lora": "adapter", "full": "model", "head": "head"}[kind.split("-")[1]]
    names = {"run.yaml", "log.jsonl", "predictions.jsonl", "scores.json", "manifest.json", "learning_curve.png"}
    assert {one.name for one in folder.iterdir()} == names | {artifact}
    assert set(_json(folder / "scores.json")) == {"majority", "before", "after"}
    manifest = _json(folder / "manifest.json")
    assert set(manifest["files"]) == {"run.yaml"} | {f"{artifact}/{one.name}" for one in (folder / artifact).iterdir()}
    assert (folder / "run.yaml").read_text().startswith(f"# run {manifest['run_id']}\n")
    saved = [load_file(one) for one in (folder / artifact).glob("*.safetensors")]
    assert manifest["saved_parameters"] == sum(t.numel() for tensors in saved for t in tensors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_follow_from_the_predictions(kind: str, finished: Callable[[str], Path], toy_data: Path) -> None:
    folder = finished(kind)
    lines = _lines((folder / "predictions.jsonl").read_text(encoding="utf-8"))
    scores = _json(folder / "scores.json")
    assert [line["index"] for line in lines] == list(range(60))
    if kind.startswith("entities"):
        _check_entity_scores(lines, scores, toy_data)
    else:
        _check_class_scores(lines, scores, toy_data)


def _check_class_scores(lines: list[dict[str, Any]], scores: dict[str, Any], toy_data: Path) -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    rows = _lines((toy_data / "sentiment_test.jsonl").read_text())
    references, predicted = [row["label"] for row in rows], [line["prediction"]["label"] for line in lines]
    assert [line["reference"] for line in lines] == references
    after = scores["after"]["values"]
    assert after["accuracy"] == pytest.approx(accuracy_score(references, predicted))
    assert after["macro_f1"] == pytest.approx(f1_score(references, predicted, average="macro"))
    assert after["matthews"] == pytest.approx(matthews_corrcoef(references, predicted))
    train = _lines((toy_data / "sentiment_train.jsonl").read_text())
    most = max(("negative", "positive"), key=[row["label"] for row in train].count)
    assert scores["majority"]["values"]["accuracy"] == pytest.approx(references.count(most) / 60)


def _check_entity_scores(lines: list[dict[str, Any]], scores: dict[str, Any], toy_data: Path) -> None:
    from seqeval.metrics import f1_score, precision_score

    references, predicted = [line["reference"] for line in lines], [line["prediction"]["tags"] for line in lines]
    assert references == [row["tags"] for row in entity_rows(60, seed=2)]
    assert scores["after"]["values"]["entity_f1"] == pytest.approx(f1_score(references, predicted))
    assert scores["after"]["values"]["entity_precision"] == pytest.approx(precision_score(references, predicted))
    assert scores["majority"]["values"]["entity_f1"] == 0
    assert scores["after"]["values"]["entity_f1"] > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_gives_the_recorded_scores(
    kind: str, finished: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished(kind)
    capfd.readouterr()
    assert main(["evaluate", str(folder), "--json"]) == 0
    again, after = json.loads(capfd.readouterr().out), _json(folder / "scores.json")["after"]
    assert again["scores"] == after["values"]
    assert again["per_class"] == after["per_class"]


def test_evaluate_takes_any_file_with_the_columns(
    finished: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = sentiment_rows(30, seed=9)
    with (tmp_path / "new.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    folder = str(finished("sentiment-lora"))
    answers = _answers(capfd, folder, *(row["text"] for row in rows))
    assert main(["evaluate", folder, "--data", str(tmp_path / "new.csv"), "--json"]) == 0
    right = [answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert json.loads(capfd.readouterr().out)["scores"]["accuracy"] == pytest.approx(sum(right) / 30)


def test_modes_follow_the_umask(configured: Callable[..., Path], tmp_path: Path) -> None:
    mask = 0o027
    code = (
        f"import os, sys; os.umask({mask})\n"
        "from peftkit.cli import main\n"
        "run, out = sys.argv[2:]\n"
        "sys.exit(main(['train', sys.argv[1], 'training.max_steps=1']) or main(['merge', run, out]))"
    )
    run, out = tmp_path / "run", tmp_path / "merged"
    command = [sys.executable, "-c", code, str(configured("sentiment-lora", run)), str(run), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model shards" not in done.stderr and "Traceback" not in done.stderr
    for entry in (run, out, *run.rglob("*"), *out.rglob("*")):
        wanted = (0o777 if entry.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(entry.stat().st_mode) == wanted, entry


# --- predict ------------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_evaluation(
    finished: Callable[[str], Path], toy_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for kind in ("sentiment-lora", "sentiment-lora-mean", "sentiment-full", "sentiment-head"):
        folder = finished(kind)
        answers = _answers(capfd, str(folder), "--file", str(toy_data / "sentiment_test.jsonl"))
        recorded = _lines((folder / "predictions.jsonl").read_text())
        for answer, line in zip(answers, recorded, strict=True):
            assert answer["label"] == line["prediction"]["label"]
            assert answer["probabilities"] == pytest.approx(line["prediction"]["probabilities"], abs=1e-6)
            assert sum(answer["probabilities"].values()) == pytest.approx(1)
            assert (
                answer["probability"]
                == answer["probabilities"][answer["label"]]
                == max(answer["probabilities"].values())
            )


def test_every_way_of_giving_texts_gives_the_same_answers(
    finished: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, texts = str(finished("sentiment-lora")), ["a good film", "the sad , sad story", "music"]
    expected = _answers(capfd, folder, *texts)
    assert [one["text"] for one in expected] == texts
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(f'"{text}"' for text in texts) + "\n")
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    for name in ("texts.txt", "texts.csv", "texts.jsonl"):
        assert _answers(capfd, folder, "--file", str(tmp_path / name)) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    assert _answers(capfd, folder) == expected


def test_pairs_are_given_as_options_or_with_a_tab(
    finished: Callable[[str], Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(finished("pairs-lora"))
    answers = _answers(capfd, folder, "the film", "a story", "--text-pair", "the film", "--text-pair", "music was")
    assert [(one["text"], one["text_pair"]) for one in answers] == [("the film", "the film"), ("a story", "music was")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the film\tthe film\na story\tmusic was\n"))
    assert _answers(capfd, folder) == answers
    assert "pairs of texts" in _refused(capfd, 2, "predict", folder, "the film")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the film\n"))
    assert "a tab" in _refused(capfd, 2, "predict", folder)


def test_entities_have_offsets(
    finished: Callable[[str], Path], toy_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished("entities-lora")
    rows = entity_rows(60, seed=2)
    answers = _answers(capfd, str(folder), *(" ".join(row["tokens"]) for row in rows))
    recorded = _lines((folder / "predictions.jsonl").read_text())
    assert sum(len(one["entities"]) for one in answers) > 60
    for answer, line, row in zip(answers, recorded, rows, strict=True):
        assert [one["type"] for one in answer["entities"]] == _entity_types(line["prediction"]["tags"])
        for one in answer["entities"]:
            assert answer["text"] == " ".join(row["tokens"])
            assert answer["text"][one["start"] : one["end"]] == one["text"]
            assert 0 < one["probability"] <= 1


def _entity_types(tags: list[str]) -> list[str]:
    """The type of each entity: a B, or an I that continues nothing of its type."""
    before = ["O", *tags[:-1]]
    return [
        tag[2:] for last, tag in zip(before, tags, strict=True) if tag != "O" and (tag[0] == "B" or last[2:] != tag[2:])
    ]


def test_a_run_with_trackers_predicts(
    configured: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = str(configured("sentiment-head", tmp_path / "run"))
    assert main(["train", config, "output.trackers=[tensorboard]", "training.max_steps=1"]) == 0
    assert len(_answers(capfd, str(tmp_path / "run"), "a good film")) == 1


# --- what other tools make of it ----------------------------------------------------------------------------------

FRESH = """
import json, sys
import torch, transformers
from transformers import AutoTokenizer

answers = {}
for name, case in json.load(open(sys.argv[1])).items():
    auto = getattr(transformers, case["model_class"])
    if case["adapter"]:
        from peft import PeftModel
        base = auto.from_pretrained(case["base"], num_labels=case["labels"])
        model, tokenizer = PeftModel.from_pretrained(base, case["adapter"]), AutoTokenizer.from_pretrained(case["base"])
    else:
        model, tokenizer = auto.from_pretrained(case["merged"]), AutoTokenizer.from_pretrained(case["merged"])
    model.eval()
    logits = []
    for text in case["texts"]:
        text = text if isinstance(text, list) else [text]
        batch = tokenizer(*text, return_tensors="pt") if not case["words"] else tokenizer(
            text, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**batch).logits[0]
        logits.append((found.mean(0) if case["mean"] else found).tolist())
    answers[name] = {"logits": logits, "labels": list(model.config.id2label.values())}
assert "peftkit" not in sys.modules
json.dump(answers, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def elsewhere(
    finished: Callable[[str], Path], tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Logits of merged models and adapters in one fresh process that has transformers and peft alone."""
    root = tmp_path_factory.mktemp("elsewhere")
    cases: dict[str, dict[str, Any]] = {}
    for kind in MERGED:
        folder, target = finished(kind), root / kind
        assert main(["merge", str(folder), str(target)]) == 0
        manifest = _json(folder / "manifest.json")
        case = {"model_class": manifest["head"]["model_class"], "labels": len(manifest["head"]["labels"])}
        case |= {"texts": _texts(kind), "words": kind.startswith("entities"), "mean": kind.endswith("mean")}
        case |= {"base": str(tiny_bert), "merged": str(target), "adapter": None}
        cases[f"{kind} merged"] = case
        if "lora" in kind:
            cases[f"{kind} adapter"] = case | {"adapter": str(folder / "adapter")}
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-c", FRESH, str(root / "cases.json"), str(root / "answers.json")]
    subprocess.run(command, check=True, cwd=root)
    found: dict[str, dict[str, Any]] = _json(root / "answers.json")
    return found


def _texts(kind: str) -> list[Any]:
    if kind.startswith("pairs"):
        return [[row["first"], row["second"]] for row in pair_rows(12, seed=7)]
    if kind.startswith("entities"):
        return [row["tokens"] for row in entity_rows(12, seed=7)]
    return [row["text"] for row in sentiment_rows(12, seed=7)]


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize("kind", MERGED)
def test_other_tools_compute_the_same(
    kind: str, form: str, elsewhere: dict[str, dict[str, Any]], finished: Callable[[str], Path]
) -> None:
    if f"{kind} {form}" not in elsewhere:
        assert kind == "sentiment-full"  # which has no adapter
        return
    answer = elsewhere[f"{kind} {form}"]
    own = _own_logits(finished(kind), kind)
    for mine, theirs in zip(own, answer["logits"], strict=True):
        allowed = 1e-5 * max(1.0, float(mine.abs().max()))
        torch.testing.assert_close(torch.tensor(theirs), mine, rtol=0, atol=allowed)
    if form == "merged":
        assert answer["labels"] == _json(finished(kind) / "manifest.json")["head"]["labels"]


def _own_logits(folder: Path, kind: str) -> list[torch.Tensor]:
    saved = load_run(folder)
    task = saved.run.task
    if kind.startswith("pairs"):
        rows = task.rows_from_text(*(list(texts) for texts in zip(*_texts(kind), strict=True)))
    else:
        rows = task.rows_from_text([" ".join(t) if isinstance(t, list) else t for t in _texts(kind)])
    split = encode_split(saved.run, "probe", rows, saved.head, saved.tokenizer, supervised=False)
    with torch.no_grad():
        return [task.logits(saved.model, collate([one], split.pad_id))[0] for one in split.encoded.examples]


# --- merging that fails -------------------------------------------------------------------------------------------


def test_a_merge_that_changed_the_model_is_refused(
    finished: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertForSequenceClassification

    save = BertForSequenceClassification.save_pretrained

    def tampered(self: Any, folder: Path, **options: Any) -> None:
        with torch.no_grad():
            self.bert.encoder.layer[1].output.dense.weight[0] += 0.01
        save(self, folder, **options)

    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", tampered)
    error = _refused(capfd, 1, "merge", str(finished("sentiment-lora")), str(tmp_path / "merged"))
    assert "not the one that was evaluated" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device", "x")])
def test_a_merge_cut_short_leaves_nothing(
    fault: Any,
    finished: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(self: Any, folder: Path, *_: Any, **__: Any) -> None:
        assert (folder / "model.safetensors").is_file()
        raise fault

    monkeypatch.setattr("peftkit.artifacts.fresh_process.Rereader.describe", read)
    code = main(["merge", str(finished("sentiment-lora")), str(tmp_path / "merged")])
    assert code == (130 if fault is KeyboardInterrupt else 1)
    assert list(tmp_path.iterdir()) == []


def test_where_a_merged_model_cannot_go(copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert "exists" in _refused(capfd, 2, "merge", str(copied), str(tmp_path / "there"))
    before = sorted(copied.rglob("*"))
    assert f"lies inside {copied};" in _refused(capfd, 2, "merge", str(copied), str(copied / "merged"))
    around = str(tmp_path / "there" / ".." / "copy" / "m")
    assert f"lies inside {copied};" in _refused(capfd, 2, "merge", str(copied), around)
    assert sorted(copied.rglob("*")) == before
    assert main(["merge", str(copied), str(tmp_path / "new" / "parent" / "merged")]) == 0
    assert (tmp_path / "new" / "parent" / "merged" / "peftkit_merge.json").is_file()


def test_a_failed_merge_makes_no_parent_folder(copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copied / "adapter" / "adapter_model.safetensors").unlink()
    _refused(capfd, 1, "merge", str(copied), str(tmp_path / "new" / "merged"))
    assert not (tmp_path / "new").exists()


# --- runs that cannot be trusted ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "run.yaml", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["changed", "cut", "removed"])
def test_a_tampered_file_is_named(name: str, damage: str, copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = copied / name
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-20])
    else:
        # one byte, so that the file still parses
        place = content.rindex(b"1")
        file.write_bytes(content[:place] + b"2" + content[place + 1 :])
    unfinished = (name, damage) == ("manifest.json", "removed")
    error = _refused(capfd, 2 if unfinished else 1, "predict", str(copied), "a good film")
    assert Path(name).name in error and str(copied) in error


def test_other_weights_under_the_same_name_are_refused(
    configured: Callable[..., Path], tiny_bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    config = str(configured("sentiment-lora", tmp_path / "run"))
    assert main(["train", config, f"backbone.name={base}", "training.max_steps=1"]) == 0
    tensors = load_file(base / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    error = _refused(capfd, 1, "evaluate", str(tmp_path / "run"))
    assert f"{base} (model.safetensors) is not the backbone" in error


@pytest.mark.parametrize("verb", ["evaluate", "predict", "merge"])
def test_what_is_no_finished_run_is_refused(
    verb: str, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rest = {"evaluate": [], "predict": ["text"], "merge": [str(tmp_path / "out")]}[verb]
    assert "no run folder" in _refused(capfd, 2, verb, str(tmp_path / "missing"), *rest)
    (copied / "manifest.json").unlink()
    assert "is not finished" in _refused(capfd, 2, verb, str(copied), *rest)
    (tmp_path / "foreign").mkdir()
    assert "is not a run folder" in _refused(capfd, 2, verb, str(tmp_path / "foreign"), *rest)


# --- folders that belong to something else ------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(
    configured: Callable[..., Path], finished: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished("sentiment-head")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    config = str(configured("sentiment-head", folder))
    error = _refused(capfd, 2, "train", config)
    accuracy = _json(folder / "scores.json")["after"]["values"]["accuracy"]
    assert "holds this run, finished" in error and f"accuracy {accuracy:.4f}" in error
    assert "belongs to run" in _refused(capfd, 2, "train", config, "training.seed=5")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_overwriting_trains_again(configured: Callable[..., Path], tmp_path: Path) -> None:
    config = str(configured("sentiment-head", tmp_path / "run"))
    assert main(["train", config, "training.max_steps=1"]) == 0
    (tmp_path / "run" / "notes.txt").write_text("of the old run")
    assert main(["train", config, "training.max_steps=2", "output.overwrite=true"]) == 0
    assert _json(tmp_path / "run" / "manifest.json")["training"]["steps"] == 2
    assert not (tmp_path / "run" / "notes.txt").exists()


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("content", ["thesis.txt", "run.yaml"])
def test_a_folder_of_something_else_is_left_alone(
    content: str, overwrite: str, configured: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine" / content
    file.parent.mkdir()
    file.write_text("backbone: {}\n")  # a run.yaml that peftkit did not write
    config = str(configured("sentiment-head", tmp_path / "mine"))
    assert "not a run folder" in _refused(capfd, 2, "train", config, f"output.overwrite={overwrite}")
    assert "is a file" in _refused(capfd, 2, "train", config, f"output.folder={file}", f"output.overwrite={overwrite}")
    assert file.read_text() == "backbone: {}\n"


def test_a_link_to_a_run_can_be_overwritten(configured: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    config = str(configured("sentiment-head", tmp_path / "link"))
    for _ in range(2):
        assert main(["train", config, "training.max_steps=1", "output.overwrite=true"]) == 0
    assert (tmp_path / "real" / "manifest.json").is_file() and (tmp_path / "link").is_symlink()


def test_bad_data_leave_no_run_folder(
    configured: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [*sentiment_rows(20, seed=1), {"text": "", "label": "positive"}]
    file = write_jsonl(tmp_path / "bad.jsonl", rows)
    config = str(configured("sentiment-lora", tmp_path / "run"))
    assert "bad.jsonl:21" in _refused(capfd, 1, "train", config, f"task.data.train={file}")
    assert not (tmp_path / "run").exists()


# --- from Python --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Any:
    """A run on rows and with a metric that were given in Python."""
    import datasets
    import evaluate

    import peftkit

    class Misses(evaluate.Metric):
        """How many answers are wrong."""

        def _info(self) -> evaluate.MetricInfo:
            features = datasets.Features({one: datasets.Value("int64") for one in ("predictions", "references")})
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, int]:
            return {"misses": sum(p != r for p, r in zip(predictions, references, strict=True))}

    folder = tmp_path_factory.mktemp("in_memory") / "run"
    run = peftkit.Run(
        backbone=peftkit.Backbone(name=str(tiny_bert)),
        task=peftkit.SequenceClassification(max_length=32),
        method=peftkit.LoRA(rank=2),
        training=peftkit.Training(learning_rate=0.01, epochs=1),
        output=peftkit.Output(folder=str(folder)),
    )
    splits = peftkit.splits_from(
        train=sentiment_rows(60, seed=0), dev=sentiment_rows(20, seed=1), test=sentiment_rows(40, seed=2)
    )
    return peftkit.train(run, splits=splits, metrics=[Misses()])


def test_rows_and_metrics_can_be_given_in_python(in_memory: Any) -> None:
    after = in_memory.evaluations["after"].scores.values
    assert after["misses"] == round(40 * (1 - after["accuracy"]))
    assert in_memory.score == after["accuracy"]
    assert all("dev_misses" in one for one in in_memory.record.evaluations)
    assert _json(in_memory.folder / "scores.json")["after"]["values"] == after
    lines = _lines((in_memory.folder / "predictions.jsonl").read_text())
    assert [line["place"] for line in lines] == [f"test row {number}" for number in range(1, 41)]


def test_a_run_from_python_predicts_and_merges(
    in_memory: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, rows = in_memory.folder, sentiment_rows(40, seed=2)
    answers = _answers(capfd, str(folder), *(row["text"] for row in rows))
    recorded = _lines((folder / "predictions.jsonl").read_text())
    assert [one["label"] for one in answers] == [line["prediction"]["label"] for line in recorded]
    file = write_jsonl(tmp_path / "test.jsonl", rows)
    assert main(["evaluate", str(folder), "--data", str(file), "--json"]) == 0
    scores = json.loads(capfd.readouterr().out)["scores"]
    assert scores["accuracy"] == in_memory.score
    assert "task.data names no rows" in _refused(capfd, 2, "evaluate", str(folder))
    saved = load_run(folder)
    report = merge(saved, tmp_path / "merged", saved.run.task.rows_from_text([row["text"] for row in rows]))
    assert report.equal_predictions == report.rows == 40


def test_a_run_without_rows_is_refused(
    configured: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured("sentiment-lora", tmp_path / "run")
    assert "task.data names no rows" in _refused(capfd, 2, "train", str(config), "task.data=null")
    tree = _json(config)
    del tree["task"]["data"]
    config.write_text(json.dumps(tree))
    assert "data is missing" in _refused(capfd, 2, "validate", str(config))
    assert not (tmp_path / "run").exists()


def test_a_run_from_python_has_a_folder(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peftkit

    monkeypatch.chdir(tmp_path)
    run = peftkit.Run(
        backbone=peftkit.Backbone(name=str(tiny_bert)),
        task=peftkit.SequenceClassification(max_length=32),
        method=peftkit.HeadOnly(),
        training=peftkit.Training(learning_rate=0.01, max_steps=1),
    )
    result = peftkit.train(run, splits=peftkit.splits_from(train=sentiment_rows(30), label="label"))
    assert result.folder.parent == Path("runs") and result.folder.name.startswith("head-")
    assert [one.name for one in tmp_path.iterdir()] == ["runs"]
