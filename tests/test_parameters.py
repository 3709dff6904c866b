"""`peftkit params` against published counts, instantiated models and saved files."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from peftkit.backbones.load import wrap
from peftkit.cli import main
from peftkit.errors import MethodError, UsageError
from peftkit.methods import METHODS
from peftkit.methods.base import trained_parameters
from peftkit.planning.parameters import count_methods
from peftkit.planning.specs import parse_method, published
from peftkit.planning.survey import survey

KEYS = [
    "method",
    "label",
    "adapter_parameters",
    "tuned_parameters",
    "head_parameters",
    "trainable_parameters",
    "saved_parameters",
    "saved_parameters_lowest",
    "backbone_parameters",
    "trainable_percent",
    "note",
]
ROBERTA_BASE = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LLAMA_7B: dict[str, Any] = {}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.fixture
def params(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Ask for counts of methods on a folder that holds a config.json and nothing else."""

    def ask(model_type: str, settings: dict[str, Any], *arguments: str) -> list[dict[str, Any]]:
        AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
        assert main(["params", "--backbone", str(tmp_path), "--json", *arguments]) == 0
        out = capsys.readouterr()
        assert out.err == ""
        return json.loads(out.out)

    return ask


def linears(model: nn.Module, inside: str) -> list[tuple[int, int]]:
    """(in, out) of the linear layers below a module whose name contains `inside`."""
    return [
        (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear) and inside in n
    ]


def instantiated(model_type: str, settings: dict[str, Any], auto: str = "AutoModel", labels: int = 2) -> nn.Module:
    config = AutoConfig.for_model(model_type, num_labels=labels, **settings)
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)


class TestPublishedCounts:
    def test_roberta_base_query_value(self, params: Any) -> None:
        (found,) = params("roberta", ROBERTA_BASE, "--method", "lora:rank=8,targets=query_value")
        assert list(found) == KEYS
        assert found == {
            "method": "lora:rank=8,targets=query_value",
            "label": "lora:rank=8,targets=query_value",
            "adapter_parameters": 294_912,  # the 0.3M of Hu et al. 2021, table 2
            "tuned_parameters": 0,
            "head_parameters": 0,
            "trainable_parameters": 294_912,
            "saved_parameters": 294_912,
            "saved_parameters_lowest": 294_912,
            "backbone_parameters": 124_645_632,
            "trainable_percent": pytest.approx(100 * 294_912 / (124_645_632 + 294_912), rel=1e-12),
            "note": "",
        }

    def test_bert_base(self, params: Any) -> None:
        found = params("bert", {}, *("--method", "lora:rank=4"), *("--method", "full"), *("--method", "head"))
        assert [one["method"] for one in found] == ["lora:rank=4", "full", "head"]
        each = 4 * (768 + 768) * 4 + 2 * 4 * (768 + 3072)
        assert found[0]["adapter_parameters"] == 12 * each == 663_552
        assert {one["backbone_parameters"] for one in found} == {109_482_240}
        assert found[1]["trainable_parameters"] == found[1]["saved_parameters"] == 109_482_240
        assert found[1]["trainable_percent"] == 100
        assert found[2]["trainable_parameters"] == 0

    def test_llama_7b_query_value(self, params: Any) -> None:
        (found,) = params("llama", LLAMA_7B, "--method", "lora:rank=8,targets=query+value")
        assert found["adapter_parameters"] == 4_194_304
        assert found["backbone_parameters"] == 6_738_415_616 - 32_000 * 4096  # without the output embedding

    def test_all_of_llama_70b_with_grouped_queries(self, params: Any) -> None:
        (found,) = params("llama", LLAMA_70B, "--method", "lora:rank=16,variant=dora")
        d, kv, ffn = 8192, 1024, 28672
        shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, ffn), (d, ffn), (ffn, d)]
        assert found["adapter_parameters"] == 80 * sum(16 * (a + b) + b for a, b in shapes)


class TestHeads:
    @pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "llama", "bart", "t5"])
    @pytest.mark.parametrize("labels", [2, 7])
    def test_head_counts_are_the_instantiated_models(self, params: Any, model_type: str, labels: int) -> None:
        for task, auto in (
            ("sequence_classification", "AutoModelForSequenceClassification"),
            ("token_classification", "AutoModelForTokenClassification"),
        ):
            if (model_type, task) == ("bart", "token_classification"):
                continue  # transformers has no such model
            asked = ("--method", "head", "--task", task, "--labels", str(labels))
            (found,) = params(model_type, {}, *asked)
            model: Any = instantiated(model_type, {}, auto, labels)
            backbone = next(m for n, m in model.named_children() if isinstance(m, transformers.PreTrainedModel))
            if model_type == "t5":
                names = ("classification_head.", "classifier.")
                head = sum(p.numel() for n, p in model.named_parameters() if n.startswith(names))
            else:
                head = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in backbone.parameters())
            assert found["head_parameters"] == found["trainable_parameters"] == found["saved_parameters"] == head > 0
            assert found["adapter_parameters"] == 0
            assert found["backbone_parameters"] + head == sum(p.numel() for p in model.parameters())

    def test_full_counts_the_head(self, params: Any) -> None:
        (found,) = params("bert", {}, "--method", "full", "--task", "sequence_classification", "--labels", "3")
        assert found["head_parameters"] == 768 * 3 + 3
        assert found["trainable_parameters"] == 109_482_240 + 768 * 3 + 3
        assert found["trainable_percent"] == 100


class TestTargets:
    def test_attention_is_query_key_value_output(self, params: Any) -> None:
        one, two = params(
            "bert", {}, *("--method", "lora:targets=attention"), *("--method", "lora:targets=query+key+value+output")
        )
        assert [one[key] for key in KEYS[2:]] == [two[key] for key in KEYS[2:]]
        assert one["adapter_parameters"] == 12 * 4 * 8 * (768 + 768)

    @pytest.mark.parametrize(
        ("model_type", "settings"),
        [
            ("t5", {"feed_forward_proj": "relu"}),
            ("t5", {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}),
            ("bart", {"decoder_layers": 2}),
            ("bert", {}),
            ("llama", {"num_hidden_layers": 3}),
        ],
    )
    def test_all_is_every_linear_of_the_blocks(self, params: Any, model_type: str, settings: dict[str, Any]) -> None:
        (found,) = params(model_type, settings, *("--method", "lora:rank=2"), *("--task", "sequence_classification"))
        shapes = linears(
            instantiated(model_type, settings), {"t5": ".block.", "bert": ".layer."}.get(model_type, "layers.")
        )
        if model_type in ("t5", "bart"):
            cross = "EncDecAttention" if model_type == "t5" else "encoder_attn"
            assert len(linears(instantiated(model_type, settings), cross)) % 4 == 0 < len(shapes)
        assert found["adapter_parameters"] == sum(2 * (a + b) for a, b in shapes)


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_llama"])
@pytest.mark.parametrize(
    "spec",
    [
        "lora:rank=4",
        "lora:rank=4,variant=dora,targets=attention",
        "lora:rank=4,variant=rslora,targets=query+down",
        "lora:rank=4,initialization=pissa",
        "lora:rank=4,initialization=olora,variant=dora,targets=query_value",
        "head",
        "full",
    ],
)
def test_count_is_what_trains_and_what_is_saved(
    base: str, spec: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    (counted,) = count_methods(str(folder), [spec], "sequence_classification", 3)
    auto = transformers.AutoModelForSequenceClassification
    method = parse_method(spec)
    model = method.attach(wrap(auto.from_pretrained(folder, num_labels=3)), 10)
    trained = {name: p.numel() for name, p in trained_parameters(model).items()}
    adapter = sum(n for name, n in trained.items() if ".lora_" in name)
    assert counted.adapter_parameters == adapter
    assert counted.trainable_parameters == sum(trained.values())
    method.save(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert counted.saved_parameters == sum(tensor.numel() for tensor in load_file(file).values())
    total = sum(p.numel() for p in auto.from_pretrained(folder, num_labels=3).parameters())
    assert counted.backbone_parameters + counted.head_parameters == total
    assert counted.trainable_percent == pytest.approx(100 * sum(trained.values()) / (total + adapter))


class TestSpecs:
    @pytest.mark.parametrize(
        ("text", "rank"), [("0.3M", 300_000), ("2k", 2_000), ("1.5k", 1_500), ("1B", 10**9), ("12", 12)]
    )
    def test_numbers_with_a_suffix(self, text: str, rank: int) -> None:
        assert parse_method(f"lora:rank={text}").model_dump()["rank"] == rank

    def test_lists_are_joined_by_plus(self, params: Any) -> None:
        (found,) = params("bert", {}, "--method", "lora:rank=2,alpha=1e-1,targets=query+up")
        assert found["adapter_parameters"] == 12 * 2 * (768 + 768 + 768 + 3072)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--method", "lorra"], "--method lorra: no method 'lorra'; did you mean 'lora'?"),
            (["--method", "lora:rnk=8"], "--method lora:rnk=8: 'lora' has no 'rnk'; did you mean 'rank'?"),
            (["--method", "lora:variant=dorra"], "variant: no 'dorra'; did you mean 'dora'?"),
            (["--method", "lora:rank"], "'rank' is not key=value"),
            (["--method", "lora:rank=0"], "rank: Input should be greater than 0"),
            (["--method", "lora:rank=yes"], "rank: Input should be a valid integer"),
            (["--method", "lora:rank=8.5"], "rank: Input should be a valid integer"),
            (["--method", "lora:rank=4,rank=8"], "'rank' is given twice; keep one"),
            (["--method", "lora:targets=7"], "targets: Input should be a valid string"),
            (["--method", "lora:targets=querry"], "target 'querry' matches no module"),
            (["--method", "lora:rank=1M"], "rank 1000000 exceeds 'encoder.layer.0.attention.self.query'"),
            (["--method", "lora:rank=3,initialization=orthogonal"], "needs an even rank, not 3"),
            (["--method", "lora:initialization=pisa"], "'pisa' is not an initialization; it can be: default"),
            (["--method", "head", "--task", "sequence_clasification"], "did you mean 'sequence_classification'?"),
            (["--method", "head", "--task", "token_classification", "--labels", "0"], "at least one output, not 0"),
            (["--method", "lora", "--backbone", "/no/such/folder"], "backbone.name: no folder /no/such/folder"),
        ],
    )
    def test_bad_requests_exit_2_with_one_message(
        self, tiny_bert: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["params", "--backbone", str(tiny_bert), *arguments]) == 2
        out = capsys.readouterr()
        assert out.out == ""
        assert message in out.err.replace("\n", " ")
        assert out.err.count("error") == 1
        assert "Traceback" not in out.err

    def test_unknown_architecture_and_folder_without_config(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["params", "--backbone", str(tmp_path), "--method", "lora"]) == 1
        assert "has no config.json" in capsys.readouterr().err
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
        assert main(["params", "--backbone", str(tmp_path), "--method", "lora"]) == 1
        assert "no layout for model type 'opt'" in capsys.readouterr().err

    def test_table_for_people(self, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["params", "--backbone", str(tiny_bert), "--method", "lora:rank=4", "--method", "full"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.split()][:1] == ["method"]
        assert any(line.startswith("lora:rank=4") for line in lines)
        assert any("100.0000 %" in line for line in lines)


PNG = b"\x89PNG\r\n\x1a\n"


class TestAll:
    def test_every_kind_is_published(self) -> None:
        assert {spec.text.partition(":")[0] for spec in published()} == METHODS.keys() - {"peft", "prompting"}
        assert len({(spec.label, spec.text) for spec in published()}) == len(published())

    @pytest.mark.parametrize("base", ["tiny_bert", "tiny_llama"])
    def test_rows_are_what_trains_and_the_reasons_why_not(self, base: str, request: pytest.FixtureRequest) -> None:
        folder = request.getfixturevalue(base)
        answers = survey(str(folder), None, "sequence_classification", 3)
        assert {(one.spec, one.label) for one in answers} == {(spec.text, spec.label) for spec in published()}
        auto = transformers.AutoModelForSequenceClassification
        trained = []
        for answer in answers:
            backbone = wrap(auto.from_pretrained(folder, num_labels=3))
            if answer.counts is None:
                with pytest.raises(MethodError) as caught:
                    parse_method(answer.spec).attach(backbone, 100)
                assert answer.note == str(caught.value)
                continue
            model = parse_method(answer.spec).attach(backbone, 100)
            trained.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
            assert answer.counts.trainable_parameters == trained[-1]
        assert trained == sorted(trained)
        assert len(trained) > 10
        refused = [answer.counts is None for answer in answers]
        assert refused == sorted(refused)
        assert any(refused)

    def test_table(self, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["params", "--backbone", str(tiny_bert), "--all"]) == 0
        shown = capsys.readouterr().out
        header, *rows = shown.partition("\n\n")[0].splitlines()
        assert header.split() == ["method", "size", "adapter", "tuned", "head", "trainable", "saved", "share"]
        adalora = next(row for row in rows if row.startswith("AdaLoRA"))
        # 12 matrices of rank 12 at first, 96 triplets in the end; one of 32 × 32 has 64 numbers, one of 32 × 64 has 96
        assert adalora.split()[-8:-3] == ["target_rank=8", "10,896", "0", "0", "10,896"]
        assert adalora.split()[-3] == f"{96 * 64:,}–{48 * 96 + 48 * 64:,}"
        houlsby = "not on this backbone: adapters (Houlsby et al. 2019): a bottleneck wider than the layer"
        assert [line for line in shown.splitlines() if line.startswith(houlsby)]

    def test_csv_has_the_same_rows_as_json(self, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = []
        for form in ("--json", "--csv"):
            assert main(["params", "--backbone", str(tiny_bert), "--all", form]) == 0
            found.append(capsys.readouterr().out)
        rows = list(csv.DictReader(io.StringIO(found[1])))
        assert list(rows[0]) == KEYS
        assert rows == [{key: "" if v is None else str(v) for key, v in row.items()} for row in json.loads(found[0])]
        assert rows[-1]["trainable_parameters"] == ""
        assert rows[-1]["note"]

    def test_chart(self, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["params", "--backbone", str(tiny_bert), "--all", "--task", "token_classification", "--chart"]
        assert main([*command, str(tmp_path / "new" / "chart.PNG")]) == 0
        assert (tmp_path / "new" / "chart.PNG").read_bytes().startswith(PNG)
        assert main([*command, str(tmp_path / "chart.svg"), "--budget", "2k"]) == 0
        drawn = (tmp_path / "chart.svg").read_text(encoding="utf-8")
        answers = survey(str(tiny_bert), None, "token_classification", 2, "2k")
        for answer in answers:
            name = html.escape(f"{answer.label}  {answer.size}".rstrip())
            assert (f"<!-- {name} -->" in drawn) == (answer.counts is not None)
            assert f"<!-- {answer.trainable:,} -->" in drawn or answer.counts is None
        assert len(answers) > 10
        assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["chart.PNG", "chart.svg"]
        capsys.readouterr()
        assert main([*command, str(tmp_path / "chart.svg" / "chart.svg")]) == 2
        assert f"{tmp_path / 'chart.svg'} is a file" in capsys.readouterr().err

    def test_a_chart_that_fails_leaves_the_older_one(
        self, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from matplotlib.figure import Figure

        def break_off(figure: Figure, file: Path, **_: Any) -> None:
            file.write_bytes(PNG)
            raise RuntimeError("broken off")

        (tmp_path / "chart.png").write_text("older")
        monkeypatch.setattr(Figure, "savefig", break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            main(["params", "--backbone", str(tiny_bert), "--method", "full", "--chart", str(tmp_path / "chart.png")])
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"chart.png": "older"}

    @pytest.mark.filterwarnings("error")
    def test_a_chart_of_nothing_that_trains(self, tiny_bert: Path, tmp_path: Path) -> None:
        command = ["params", "--backbone", str(tiny_bert), "--method", "head", "--chart", str(tmp_path / "chart.png")]
        assert main(command) == 0
        assert (tmp_path / "chart.png").read_bytes().startswith(PNG)


def budgeted(folder: Path, spec: str) -> int | None:
    """What a method trains beside the head, or None where it cannot be: asked one by one."""
    try:
        (found,) = count_methods(str(folder), [spec], None, 2)
    except UsageError:
        return None
    return found.trainable_parameters - found.head_parameters


class TestBudget:
    def ask(self, folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
        assert main(["params", "--backbone", str(folder), "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    @pytest.mark.parametrize(
        ("spec", "size", "most"),
        [
            ("lora", "rank", 33),
            ("lora:targets=query+up,variant=dora", "rank", 33),
            ("lora:initialization=orthogonal", "rank", 33),
            ("adalora", "target_rank", 22),
            ("vera", "rank", 70),
            ("bottleneck", "bottleneck_size", 33),
            ("bottleneck:placement=houlsby,train_layernorm=true", "bottleneck_size", 33),
            ("prefix", "length", 64),
            ("prompt", "length", 65),
            ("p_tuning", "length", 65),
            ("top_layers", "layers", 3),
        ],
    )
    def test_no_size_comes_closer(
        self, tiny_bert: Path, capsys: pytest.CaptureFixture[str], spec: str, size: str, most: int
    ) -> None:
        sized = {n: f"{spec}{',' if ':' in spec else ':'}{size}={n}" for n in range(1, most + 1)}
        counts = {n: found for n, text in sized.items() if (found := budgeted(tiny_bert, text)) is not None}
        middle = sorted(counts.values())[len(counts) // 2]
        for budget in (1, min(counts.values()), middle - 1, middle + 1, middle + 40):
            (found,) = self.ask(tiny_bert, capsys, "--method", spec, "--budget", str(budget))
            distances = {n: abs(count - budget) for n, count in counts.items()}
            best = min(n for n in distances if distances[n] == min(distances.values()))
            assert re.search(rf"[:,]{size}=(\d+)", found["method"])[1] == str(best)  # type: ignore[index]
            assert found["adapter_parameters"] + found["tuned_parameters"] == counts[best]
            assert found["budget"] == budget
            assert found["deviation_percent"] == pytest.approx(100 * (counts[best] - budget) / budget, rel=1e-12)
            outside = (
                "smallest" if budget < min(counts.values()) else "largest" if budget > max(counts.values()) else ""
            )
            assert found["note"] == outside
            again = parse_method(found["method"]).model_dump()
            assert again == parse_method(sized[best]).model_dump()

    @pytest.mark.parametrize(
        ("spec", "largest"),
        [
            ("lora", "lora:rank=32"),
            ("lora:initialization=orthogonal", "lora:rank=32,initialization=orthogonal"),
            ("bottleneck", "bottleneck:bottleneck_size=32"),
            ("prompt", "prompt:length=63"),
            ("top_layers", "top_layers:layers=2"),
            ("adalora", "adalora:target_rank=21"),  # 32 at first
        ],
    )
    def test_more_than_the_largest(
        self, tiny_bert: Path, capsys: pytest.CaptureFixture[str], spec: str, largest: str
    ) -> None:
        (found,) = self.ask(tiny_bert, capsys, "--method", spec, "--budget", "1B")
        assert (found["method"], found["note"]) == (largest, "largest")
        (exact,) = self.ask(tiny_bert, capsys, "--method", spec, "--budget", str(budgeted(tiny_bert, largest)))
        assert (exact["method"], exact["note"], exact["deviation_percent"]) == (largest, "", 0)

    def test_roberta_base(self, params: Any) -> None:
        specs = ["lora:targets=query_value", "bottleneck:placement=houlsby", "ia3", "full"]
        found = params("roberta", ROBERTA_BASE, "--budget", "0.3M", *(word for s in specs for word in ("--method", s)))
        assert [one["method"] for one in found] == [
            "lora:rank=8,targets=query_value",
            "bottleneck:bottleneck_size=8,placement=houlsby",  # 313,536; with 7 units it is 276,648
            "ia3",
            "full",
        ]
        assert [one["note"] for one in found] == ["", "", "fixed", "fixed"]
        assert found[0]["deviation_percent"] == pytest.approx(-1.696)

    def test_the_head_is_not_part_of_it(self, params: Any) -> None:
        asked = ("--method", "lora", "--budget", "1.4M", "--task", "sequence_classification")
        (found,) = params("roberta", ROBERTA_BASE, *asked)
        assert found["method"] == "lora:rank=8"
        assert found["head_parameters"] == 592_130

    def test_all(self, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = self.ask(tiny_bert, capsys, "--all", "--budget", "3k")
        assert {one["method"].partition(":")[0] for one in found} == METHODS.keys() - {"peft", "prompting"}
        assert [one["method"] for one in found if one["method"].startswith("prompt")] == ["prompt:length=63"]
        assert all(one["trainable_parameters"] for one in found if one["note"] != "fixed")
        assert main(["params", "--backbone", str(tiny_bert), "--all", "--budget", "3k"]) == 0
        shown = capsys.readouterr().out
        assert "from 3,000" in shown.splitlines()[0]
        assert "budget 3,000 is of adapter + tuned, without the head" in shown
        assert re.search(r"^top layers +layers=1 .* \+\d+\.\d\d % \(smallest\) ", shown, flags=re.MULTILINE)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--method", "lora:rank=8", "--budget", "1k"], "--budget finds 'rank'; leave it out"),
            (["--method", "lora", "--budget", "many"], "--budget: 'many' is not a number of parameters such as"),
            (["--method", "lora", "--budget", "0"], "--budget: '0' is not a number of parameters"),
            (["--method", "lora", "--budget", "1.5"], "--budget: '1.5' is not a number of parameters"),
            (["--method", "lora", "--budget=-5k"], "--budget: '-5k' is not a number of parameters"),
            (["--method", "bottleneck:reduction_factor=8", "--budget", "1k"], "say the same thing; give one of them"),
            (["--method", "lora:targets=querry", "--budget", "1k"], "target 'querry' matches no module"),
            (["--method", "lora", "--all"], "argument --all: not allowed with argument --method"),
            ([], "one of the arguments --method --all is required"),
            (["--all", "--csv", "--json"], "argument --json: not allowed with argument --csv"),
            (["--all", "--chart", "chart.jpeg"], "--chart: chart.jpeg must end in .png, .svg or .pdf"),
            (["--all", "--task", "sequence_clasification"], "did you mean 'sequence_classification'?"),
        ],
    )
    def test_bad_requests_exit_2_with_one_message(
        self, tiny_bert: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["params", "--backbone", str(tiny_bert), *arguments]) == 2
        out = capsys.readouterr()
        assert out.out == ""
        assert message in out.err
        assert out.err.count("\n") == 1


COUNT_70B = """
import json, resource, sys, time
start = time.monotonic()
from peftkit.cli import main
specs = ["lora:rank=16", "lora:rank=16,variant=dora", "full"]
code = main(["params", "--backbone", sys.argv[1], "--json", *(a for s in specs for a in ("--method", s))])
code = code or main(["params", "--backbone", sys.argv[1], "--all", "--budget", "20M", "--csv"])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"code": code, "seconds": time.monotonic() - start, "cpu": used.ru_utime + used.ru_stime,
    "peak": used.ru_maxrss * 1024, "peft": "peft" in sys.modules}), file=sys.stderr)
"""


def test_70_billion_parameters_are_counted_quickly_in_little_memory_and_without_peft(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **LLAMA_70B).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", COUNT_70B, str(tmp_path)], capture_output=True, text=True, check=True)
    used = json.loads(done.stderr.splitlines()[-1])
    asked, end, every = done.stdout.partition("\n]\n")
    lora, _, full = json.loads(asked + end)
    assert used["code"] == 0
    rows = list(csv.DictReader(io.StringIO(every)))
    assert len(rows) > 15
    assert next(row["note"] for row in rows if not row["trainable_parameters"]).startswith("method 'bitfit': llama")
    assert full["backbone_parameters"] == 68_976_648_192 - 32_000 * 8192  # Llama 2 70B without its output embedding
    assert lora["adapter_parameters"] == 207_093_760
    assert used["peft"] is False
    assert used["cpu"] < 30, used  # processor time: the wall clock of a busy machine says nothing
    assert used["peak"] < 2 * 2**30, used
