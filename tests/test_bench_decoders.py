"""Grids of language models: prompting among the rows, what is compared, what is forgotten, and one size for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from grids import grid_of, problems_of, run_here

from peftkit.bench.cells import Cell, cells, planned_cells
from peftkit.bench.grid import Grid
from peftkit.bench.launch import job_of
from peftkit.bench.report import report
from peftkit.bench.store import Answers, Record, Store
from peftkit.bench.worker import Job, outcome
from peftkit.planning.survey import survey

TEMPLATE = "{text} was"


@pytest.fixture
def tree(tiny_llama: Path, toy_data: Path) -> dict[str, Any]:
    """A small grid of a decoder as YAML holds it: label words, and text that follows."""
    files = {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "dev", "test")}
    words = {
        "kind": "label_words",
        "data": files | {"limit": 24},
        "template": TEMPLATE,
        "words": {"negative": " bad", "positive": " good"},
        "max_length": 60,
    }
    text = {
        "kind": "completion",
        "data": files | {"limit": 12},
        "prompt_template": TEMPLATE,
        "completion_template": " {label}",
        "end_token": False,
        "max_length": 56,
        "generation": {"max_new_tokens": 2, "metrics": ["exact_match", "bleu"], "limit": 6},
    }
    return {
        "name": "toy",
        "backbones": {"llama": {"name": str(tiny_llama)}},
        "data": {"words": {"task": words}, "text": {"task": text, "score": "bleu"}},
        "methods": {
            "full": {"method": {"kind": "full"}, "learning_rates": [4e-3]},
            "lora": {"method": {"kind": "lora", "rank": 2}, "learning_rates": [1e-2]},
            "zero-shot": {"method": {"kind": "prompting"}},
            "two-shot": {"method": {"kind": "prompting", "shots": 2}, "max_length": 60},
        },
        "seeds": [1, 2],
        "tuning": {"extensions": 0},
        "training": {"max_steps": 4, "evaluate_every": 4, "batch_size": 8},
    }


def done(cell: Cell, seed: int, rate: float | None, folder: Path) -> tuple[Record, Answers]:
    record, answers = outcome(job_of(cell.final(seed, rate), cell.grid, folder))
    assert record.error is None
    assert answers is not None
    return record, answers


def by_name(grid: Grid) -> dict[tuple[str, str], Cell]:
    return {(one.data, one.method): one for one in cells(grid)}


class TestPrompting:
    def test_all_of_a_grid_and_its_report(self, tree: dict[str, Any], tmp_path: Path) -> None:
        grid, store = grid_of(tree, tmp_path), Store(tmp_path / "results")
        store.plan(planned_cells(grid))
        run_here(grid, store)
        records = list(store.records())
        assert {one.status for one in records} == {"finished"}, [one.error for one in records if one.error]
        prompted = [one for one in records if one.key.method == "two-shot" and one.key.data == "words"]
        assert [one.run["method"]["seed"] for one in sorted(prompted, key=lambda one: one.key.seed)] == [1, 2]
        assert all(one.cost and one.cost.steps == 0 and one.trainable_parameters == 0 for one in prompted)
        assert {one.untuned for one in records} == {None}
        report(store.folder, tmp_path / "report")
        page = (tmp_path / "report" / "report.md").read_text()
        assert "bleu is no ratio of sums over examples" in page
        assert "zero-shot: every seed gives the same bleu" in page
        assert "all methods: text is generated for 6 of 12 rows, and the loss is of all" in page
        assert "trained on the same tokens" not in page

    def test_solved_rows_are_drawn_anew_by_each_seed(self, tree: dict[str, Any], tmp_path: Path) -> None:
        cell = by_name(grid_of(tree, tmp_path))["words", "two-shot"]
        first, second = (cell.final(seed, None).run for seed in (1, 2))
        assert (first.method.seed, second.method.seed) == (1, 2)
        assert first.task.max_length == 60
        from peftkit.demonstrations import with_demonstrations

        splits = first.task.splits()
        shown = [with_demonstrations(run, splits).task.demonstrations for run in (first, second)]
        assert shown[0] != shown[1]

    def test_a_decoder_without_its_prompt_is_no_comparison(self, tree: dict[str, Any], tmp_path: Path) -> None:
        methods = {name: one for name, one in tree["methods"].items() if "shot" not in name}
        told = problems_of(tree | {"methods": methods}, tmp_path)
        assert "methods lack prompting on data.words" in told
        assert "`prompting: {method: {kind: prompting}}`" in told

    @pytest.mark.parametrize(
        ("method", "told"),
        [
            ({"method": {"kind": "prompting", "shots": 2, "seed": 3}}, "each of the grid's seeds draws solved rows"),
            ({"method": {"kind": "head"}, "learning_rates": [1e-3]}, "task 'label_words' has no head"),
            ({"method": {"kind": "ia3"}, "learning_rates": [1e-3], "max_length": 9}, "read inputs of one length"),
            ({"method": {"kind": "ia3"}, "learning_rates": [1e-3], "data": ["word"]}, "no 'word'; did you mean 'words"),
        ],
    )
    def test_impossible_rows(self, tree: dict[str, Any], tmp_path: Path, method: dict[str, Any], told: str) -> None:
        tree["methods"]["odd"] = method
        assert told in problems_of(tree, tmp_path)

    def test_rows_of_a_head_and_of_a_prompt_in_one_grid(
        self, tree: dict[str, Any], tiny_bert: Path, tmp_path: Path
    ) -> None:
        files = tree["data"]["words"]["task"]["data"]
        tree["backbones"]["bert"] = {"name": str(tiny_bert)}
        tree["data"]["words"]["backbones"] = ["llama"]
        tree["data"]["classes"] = {"task": {"kind": "sequence_classification", "data": files, "max_length": 32}}
        del tree["data"]["text"]
        tree["methods"]["head"] = {"method": {"kind": "head"}, "learning_rates": [1e-2], "data": ["classes"]}
        for name in ("zero-shot", "two-shot"):
            tree["methods"][name]["data"] = ["words"]
        found = {(one.backbone, one.data, one.method) for one in cells(grid_of(tree, tmp_path))}
        assert found == {
            *(("llama", "words", method) for method in ("full", "lora", "zero-shot", "two-shot")),
            *((backbone, "classes", m) for backbone in ("llama", "bert") for m in ("full", "lora", "head")),
        }

    def test_what_a_method_needs_otherwise(self, tree: dict[str, Any], tmp_path: Path) -> None:
        quantized = {"quantization": {"kind": "nf4"}}
        tree["methods"]["qlora"] = tree["methods"]["lora"] | {"backbone": quantized}
        runs = {name: cell.final(1, 1e-2).run for (_, name), cell in by_name(grid_of(tree, tmp_path)).items()}
        assert runs["qlora"].backbone.quantization is not None
        assert runs["lora"].backbone.quantization is None


class TestScore:
    def test_the_figure_that_is_named_is_compared(self, tree: dict[str, Any], tmp_path: Path) -> None:
        plain = by_name(grid_of(tree, tmp_path))["text", "zero-shot"].final(1, None)
        tree["data"]["text"]["score"] = "exact_match"
        cell = by_name(grid_of(tree, tmp_path))["text", "zero-shot"]
        record, answers = done(cell, 1, None, tmp_path)
        assert record.id != plain.id
        assert record.test is not None
        assert (record.test.headline, record.test.lower_is_better) == ("exact_match", False)
        assert record.test.value == record.test.values["exact_match"]
        assert len(answers.numerators) == 6  # as many texts as were written

    def test_an_unknown_one(self, tree: dict[str, Any], tmp_path: Path) -> None:
        tree["data"]["text"]["score"] = "blue"
        assert "task 'completion' has no 'blue'; did you mean 'bleu'?" in problems_of(tree, tmp_path)


class TestLanguageModelProbe:
    @pytest.fixture
    def probe(self, tmp_path: Path, toy_data: Path) -> dict[str, Any]:
        rows = [json.loads(line) for line in (toy_data / "sentiment_train.jsonl").read_text().splitlines()]
        file = write_jsonl(tmp_path / "general.jsonl", [{"line": row["text"]} for row in rows])
        return {
            "kind": "language_model",
            "name": "general",
            "data": {"train": str(file), "test": str(file)},
            "text": "line",
            "separator": " .",
            "blocks": 5,
            "max_length": 20,
        }

    def test_it_is_transformers_own_loss_before_and_after(
        self, tree: dict[str, Any], probe: dict[str, Any], tiny_llama: Path, tmp_path: Path
    ) -> None:
        from peftkit.artifacts.store import load_run
        from peftkit.config import in_folder
        from peftkit.experiment import train

        cell = by_name(grid_of(tree | {"probe": probe}, tmp_path))["words", "lora"]
        found = done(cell, 1, 1e-1, tmp_path)[0].forgetting
        assert found is not None
        assert found.lower_is_better
        blocks = self.blocks(probe, tiny_llama)
        assert found.before == pytest.approx(self.loss(plain(tiny_llama), blocks), abs=1e-5)
        train(in_folder(cell.final(1, 1e-1).run, str(tmp_path / "alone")))
        tuned = load_run(tmp_path / "alone").model
        assert found.after == pytest.approx(self.loss(tuned, blocks), abs=1e-5)
        assert abs(found.after - found.before) > 1e-3
        assert len(list((tmp_path / "probes").iterdir())) == 1
        again = done(cell, 1, 1e-1, tmp_path / "elsewhere")[0].forgetting
        assert again == found

    def blocks(self, probe: dict[str, Any], backbone: Path) -> list[list[int]]:
        """Blocks 0, 1/5 … of all whole ones of the joined text, by the tokenizer alone."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(backbone)
        lines = Path(probe["data"]["test"]).read_text().splitlines()
        ids = [token for line in lines for token in tokenizer(f"{json.loads(line)['line']} .").input_ids]
        whole = [ids[at : at + 20] for at in range(0, len(ids) - 19, 20)]
        return [whole[index * len(whole) // 5] for index in range(5)]

    def loss(self, model: Any, blocks: list[list[int]]) -> float:
        import torch

        with torch.no_grad():
            losses = [float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in blocks]
        return sum(losses) / len(losses)

    def test_a_prefix_stays_on(self, tree: dict[str, Any], probe: dict[str, Any], tmp_path: Path) -> None:
        prefix = {"method": {"kind": "prefix", "length": 4}, "learning_rates": [1e-6]}
        prompting = {"method": {"kind": "prompting"}}
        tree["methods"] = {"full": tree["methods"]["full"], "prefix": prefix, "zero-shot": prompting}
        tree["data"]["words"]["task"]["max_length"] = 40
        grid = by_name(grid_of(tree | {"probe": probe}, tmp_path))
        hardly = done(grid["words", "prefix"], 1, 1e-6, tmp_path)[0].forgetting
        nothing = done(grid["words", "zero-shot"], 1, None, tmp_path)[0].forgetting
        assert hardly is not None
        assert nothing is not None
        assert nothing.after == nothing.before == hardly.before
        assert hardly.after != hardly.before  # a random prefix that a learning rate of 1e-6 left where it was

    def test_too_long_a_block(self, tree: dict[str, Any], probe: dict[str, Any], tmp_path: Path) -> None:
        grid = grid_of(tree | {"probe": probe | {"max_length": 80}}, tmp_path)
        record, _ = outcome(job_of(by_name(grid)["words", "zero-shot"].final(1, None), grid, tmp_path))
        assert "probe.max_length is 80, but" in str(record.error)
        assert "takes at most 64 tokens" in str(record.error)

    def test_each_cell_has_the_first_that_fits(
        self, tree: dict[str, Any], probe: dict[str, Any], tiny_bert: Path, toy_data: Path, tmp_path: Path
    ) -> None:
        files = {split: str(toy_data / f"sentiment_{split}.jsonl") for split in ("train", "test")}
        classes = tree["data"]["words"]["task"]["data"]
        features = {"name": "topics", "data": files}
        tree = tree | {
            "data": {"classes": {"task": {"kind": "sequence_classification", "data": classes, "max_length": 32}}},
            "methods": {
                "full": tree["methods"]["full"],
                "head": {"method": {"kind": "head"}, "learning_rates": [1e-2]},
            },
        }
        alone = next(cells(grid_of(tree | {"probe": features}, tmp_path)))
        both = next(cells(grid_of(tree | {"probe": [probe, features]}, tmp_path)))
        assert both.final(1, 4e-3).id == alone.final(1, 4e-3).id  # and so with the results of either grid
        job = job_of(both.final(1, 4e-3), both.grid, tmp_path)
        assert Job.model_validate_json(job.model_dump_json()) == job
        forgotten = done(both, 1, 4e-3, tmp_path)[0].forgetting  # a decoder has features of a text too
        assert forgotten is not None
        assert forgotten.probe == "topics"
        told = problems_of(tree | {"probe": probe}, tmp_path)
        assert "probe 'general' is of a language model's loss, and a model of task 'sequence_classification'" in told
        assert "list one of kind: features beside it" in told

    def test_slips_in_it_are_told_where_they_are(
        self, tree: dict[str, Any], probe: dict[str, Any], tmp_path: Path
    ) -> None:
        assert "did you mean 'blocks'" in problems_of(tree | {"probe": [probe | {"blokcs": 3}]}, tmp_path)
        assert "did you mean 'language_model'" in problems_of(
            tree | {"probe": probe | {"kind": "langage_model"}}, tmp_path
        )
        assert "probe.name: missing" in problems_of(tree | {"probe": {"data": probe["data"]}}, tmp_path)


def plain(backbone: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(backbone).eval()


class TestMatched:
    def test_the_size_is_that_of_the_budget_of_params(self, tree: dict[str, Any], tmp_path: Path) -> None:
        tree["methods"] |= {
            "matched": {"method": {"kind": "lora"}, "parameters": "3k", "learning_rates": [1e-2]},
            "prefix": {"method": {"kind": "prefix"}, "parameters": 3000, "learning_rates": [1e-2]},
        }
        del tree["data"]["text"]
        tree["data"]["words"]["task"]["max_length"] = 16
        grid = by_name(grid_of(tree, tmp_path))
        answers = survey(tree["backbones"]["llama"]["name"], ["lora", "prefix"], "label_words", 2, "3000")
        for name, answer in zip(("matched", "prefix"), answers, strict=True):
            record, _ = done(grid["words", name], 1, 1e-2, tmp_path)
            assert record.key.parameters == 3000
            assert record.trainable_parameters == answer.trainable
            size, _, value = answer.size.partition("=")
            assert record.run["method"][size] == int(value)
            # the next size is further off
            assert abs(answer.trainable - 3000) <= answer.trainable / int(value) / 2

    @pytest.mark.parametrize(
        ("method", "parameters", "told"),
        [
            ({"kind": "ia3"}, 2000, "method 'ia3' has no size to set; leave parameters out"),
            (
                {"kind": "lora"},
                10,
                "the least that method 'lora' can train here is 1,024, with rank=1",
            ),
            ({"kind": "top_layers"}, 10**7, "the most that method 'top_layers' can train here is"),
            ({"kind": "prefix"}, 3000, "needs length=47, and with task.max_length 60 that is more than the 64 tokens"),
            ({"kind": "lora", "rank": 4}, 2000, "method.rank and parameters say the same thing"),
            ({"kind": "lora"}, "2 k", "should be a whole number, got '2 k'"),
        ],
    )
    def test_what_cannot_be_is_told_before_anything_starts(
        self, tree: dict[str, Any], tmp_path: Path, method: dict[str, Any], parameters: Any, told: str
    ) -> None:
        tree["methods"]["odd"] = {"method": method, "parameters": parameters, "learning_rates": [1e-3]}
        assert told in problems_of(tree, tmp_path)
