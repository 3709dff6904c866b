"""benchmarks/speed: the same work in all arms, the floor's arithmetic, the gate, what is kept and what is reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.speed import gate, peftkit_arm, processes, profile, report, rounds, scaling, seeds, stock
from benchmarks.speed.arms import BASE, OFF, PEFTKIT, TUNED, arms_of, in_turn
from benchmarks.speed.floor import Amount, floor, flops, moved, unread_flops
from benchmarks.speed.gate import NO_DROPOUT, Course, compared, engines, of_peftkit, of_stock
from benchmarks.speed.plan import is_made, make_plan, read_plan
from benchmarks.speed.results import RESULTS, Results, medians
from benchmarks.speed.rounds import Rounds
from benchmarks.speed.together import Way, held, together
from benchmarks.speed.workloads import WORKLOADS, Workload
from peftkit.bench.store import Cost, Record, Store
from peftkit.bench.worker import Job
from peftkit.config import load_run
from peftkit.errors import JobError, UsageError

STEPS, BATCH = 3, 8
RATES = {"float32": 1e11, "bfloat16": 4e11, "bandwidth": 1e10}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Trainer writes Accelerate's settings into the environment and into a state that lasts."""
    from accelerate.state import AcceleratorState

    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def toy(write_config: Callable[..., Path]) -> Workload:
    """Sentiment on the tiny BERT."""
    return Workload("sst2", "Toy", str(write_config().with_suffix("")), BATCH)


def settings(toy: Workload, tmp_path: Path, method: str = "lora") -> tuple[str, ...]:
    more = NO_DROPOUT if method == "lora" else ()
    return (*toy.settings(method, STEPS, tmp_path), *more, "training.keep_best=false")


@pytest.fixture
def completions(tmp_path: Path, tiny_llama: Path) -> Path:
    """The configuration of a tiny Llama that completes sentences."""
    import yaml

    rows = [{"prompt": "the film was", "completion": " good and bright" if one % 3 else " bad"} for one in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "backbone": {"name": str(tiny_llama)},
        "task": {
            "kind": "completion",
            "data": {"train": str(tmp_path / "rows.jsonl"), "dev_fraction": 0.1},
            "max_length": 24,
        },
        "method": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all"},
        "training": {"learning_rate": 0.01, "max_steps": STEPS, "batch_size": BATCH, "weight_decay": 0.01, "seed": 1},
    }
    (tmp_path / "completions.yaml").write_text(yaml.safe_dump(run))
    return tmp_path / "completions.yaml"


@pytest.mark.parametrize("kind", ["lora", "full", "causal"])
def test_the_floor_counts_what_torch_counts(kind: str, toy: Workload, completions: Path, tmp_path: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config, overrides = (completions, ()) if kind == "causal" else (toy.file, settings(toy, tmp_path, kind))
    plan = make_plan(config, overrides, tmp_path / "plan")
    example = max((one for batch in plan.batches for one in batch), key=lambda one: len(one["input_ids"]))
    model = stock.prepared_model(plan, tmp_path / "plan", "trainer", False, "eager").train()
    length, labels = len(example["input_ids"]), torch.tensor([example["labels"]] * 2)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([example["input_ids"]] * 2), labels=labels).loss.backward()
    parts = flops(plan.shapes, Amount(2 * length, 2, 2 * length, 2 * length**2))
    if kind == "causal":
        parts["attention"] *= 2  # the eager formula computes what the mask hides, too
    # beside these, Llama multiplies positions by frequencies
    assert sum(parts.values()) == pytest.approx(counter.get_total_flops(), rel=2e-3 if kind == "causal" else 1e-12)


def test_the_floor_is_the_formula_of_lora(toy: Workload, tmp_path: Path) -> None:
    plan = make_plan(toy.file, settings(toy, tmp_path), tmp_path / "plan")
    width, inner, rank, tokens, texts, squares = 32, 64, 8, 100.0, 10.0, 1200.0
    block = 4 * width * width + 2 * width * inner
    sides = 4 * 2 * width + 2 * (width + inner)
    by_hand = (
        tokens * (2 * 2 * block + 2 * (2 * block - 3 * width * width))  # nothing trains below the first projections
        + tokens * (6 * rank * 2 * sides - 3 * 2 * rank * width)
        + texts * (2 * 2 * width * width + 3 * 2 * width * 2)  # the pooler, and the head that trains
        + 2 * 12 * width * squares
    )
    amount = Amount(tokens, texts, 0, squares)
    assert sum(flops(plan.shapes, amount).values()) == pytest.approx(by_hand)
    of_last = 2 * 2 * (2 * width * width + 2 * width * inner) + 6 * rank * (4 * width + 2 * (width + inner))
    assert unread_flops(plan.shapes, amount) == pytest.approx((tokens - texts) * of_last)
    found = floor(plan.shapes, amount, RATES, "bfloat16")
    traffic = sum(moved(plan.shapes, amount, "bfloat16").values())
    assert found["seconds"] == pytest.approx(by_hand / 4e11 + traffic / 1e10)
    kept = 2 * (width * 3 + inner + 3 * width + inner)  # of a token: what goes into products, attends, is squashed
    assert moved(plan.shapes, amount, "float32")["kept activations"] == pytest.approx(4 * tokens * kept)


def test_stock_and_peftkit_train_alike_by_every_technique(toy: Workload, tmp_path: Path) -> None:
    overrides = settings(toy, tmp_path)
    plan = make_plan(toy.file, overrides, tmp_path / "plan")
    reference = of_stock(tmp_path / "plan", STEPS)
    assert len(plan.batches) == len(reference.losses) == len(reference.gradients) == STEPS
    assert reference.losses.std() > 1e-4
    for number, (name, engine) in enumerate(engines().items()):
        course = of_peftkit(
            toy.file, (*overrides, f"engine={json.dumps(engine)}", f"output.folder={tmp_path / str(number)}"), STEPS
        )
        found = compared(reference, course)
        assert found["passes"], (name, found)
        assert found["kept_bytes"] > 0
    faster = of_peftkit(
        toy.file, (*overrides, "training.learning_rate=0.02", f"output.folder={tmp_path / 'faster'}"), STEPS
    )
    assert not compared(reference, faster)["passes"]


def test_stock_and_peftkit_complete_alike(completions: Path, tmp_path: Path) -> None:
    overrides = ("training.evaluate_every=3", "training.keep_best=false")
    make_plan(completions, overrides, tmp_path / "plan")
    course = of_peftkit(completions, (*overrides, f"output.folder={tmp_path / 'run'}"), STEPS)
    assert compared(of_stock(tmp_path / "plan", STEPS), course)["passes"]


def test_the_gate_goes_on_where_it_stopped(toy: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def train(module: str, asked: dict[str, Any]) -> dict[str, Any]:
        if len(made) == 4:
            made.append({})
            raise JobError("out of time")
        made.append(asked)
        losses = np.array([1.0, 0.5]) + (1e-3 if "bfloat16" in str(asked) else 0.0) + 1e-6 * (asked["kind"] != "stock")
        Path(asked["folder"]).mkdir(parents=True, exist_ok=True)
        Course(losses, np.ones((2, 3), np.float32), 7).save(Path(asked["file"]))
        return {}

    monkeypatch.setattr(gate, "answer", train)

    def results() -> Results:
        return Results(tmp_path / "gate-sst2.json", {"workload": "sst2", "steps": 2, "batch": BATCH})

    with pytest.raises(JobError):
        gate.gate(toy, 2, BATCH, tmp_path, results())
    found = gate.gate(toy, 2, BATCH, tmp_path, results())
    settings = found["settings"]
    assert list(settings) == [
        BASE, f"{BASE}, one thread", *gate.engines(), f"{BASE}, bfloat16", "all together, bfloat16",
    ]  # fmt: skip
    assert len(made) == len(settings) + 1
    assert found["passes"]
    measured = [f"{BASE}, one thread", f"{BASE}, bfloat16", "all together, bfloat16"]
    assert [name for name, one in settings.items() if not one["is_gated"]] == measured
    assert not settings[f"{BASE}, bfloat16"]["passes"]
    assert settings["fused_lora"]["largest_loss_difference"] == pytest.approx(1e-6)
    assert sum(one.get("threads") == 1 for one in made) == 1
    assert gate.gate(toy, 2, BATCH, tmp_path, results()) == found
    assert len(made) == len(settings) + 1


def test_the_gate_sees_a_wrong_loss_and_a_turned_gradient() -> None:
    right = Course(np.array([1.0, 0.9]), np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32), 10)
    assert compared(right, right)["passes"]
    moved_loss = compared(right, Course(right.losses + np.array([0.0, 2e-5]), right.gradients, 10))
    assert (moved_loss["passes"], moved_loss["at_step"]) == (False, 2)
    turned = Course(right.losses, np.array([[1.0, 0.0], [0.01, 1.0]], dtype=np.float32), 10)
    assert not compared(right, turned)["passes"]


def in_process(module: str, asked: dict[str, Any], python: str = "") -> dict[str, Any]:
    """What the processes do, without their start."""
    if module == "plan":
        make_plan(Path(asked["config"]), asked["overrides"], Path(asked["folder"]))
        return {}
    return RATES if module == "rates" else stock.train(Path(asked.pop("plan")), **asked)


def train_here(arguments: list[str], python: str = "") -> str:
    from peftkit.experiment import train

    train(load_run(Path(arguments[3]), arguments[4:]))
    return ""


def test_arms_do_the_same_work_once(toy: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "answer", in_process)
    monkeypatch.setattr(peftkit_arm, "run", train_here)
    pythons = {"trainer": "python", "trl": "no-such-python", "adapters": "no-such-python"}
    monkeypatch.setattr(rounds, "lacks", lambda python, _: "not there" if python == "no-such-python" else "")
    results = Results(tmp_path / "results.json", {"workload": "sst2", "steps": STEPS})
    measured = Rounds(toy, STEPS, tmp_path / "work", results, pythons)
    measured.measure(1, [BASE, PEFTKIT.name, "adapters"])
    assert results.kept["missing"] == {"adapters": "not there"}
    ours, theirs = (results.kept["arms"][name]["0"] for name in (PEFTKIT.name, BASE))
    assert ours["step_tokens"] == theirs["step_tokens"] == read_plan(tmp_path / "work" / "sst2" / "lora").tokens
    # LoRA's dropout falls behind B, which is zero at the first step
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], abs=1e-5)
    assert len(ours["step_seconds"]) == len(theirs["step_seconds"]) == STEPS
    # nothing but steps is in the time of training
    assert sum(ours["step_seconds"]) == pytest.approx(ours["seconds"], rel=0.05)
    before = json.dumps(results.kept["arms"])
    again = Results(tmp_path / "results.json", {"workload": "sst2", "steps": STEPS})
    monkeypatch.setattr(peftkit_arm, "run", None)
    Rounds(toy, STEPS, tmp_path / "work", again, pythons).measure(1, [BASE, PEFTKIT.name])
    assert json.dumps(again.kept["arms"]) == before
    with pytest.raises(UsageError, match="another steps"):
        Results(tmp_path / "results.json", {"workload": "sst2", "steps": 9})
    with pytest.raises(UsageError, match="Trainer \\+ peft"):
        measured.measure(1, [BASE, "trainer"])


def test_a_plan_is_made_again_for_other_settings(toy: Workload, tmp_path: Path) -> None:
    overrides = settings(toy, tmp_path)
    made = make_plan(toy.file, overrides, tmp_path / "plan")
    assert read_plan(tmp_path / "plan") == made
    assert is_made(tmp_path / "plan", toy.file, overrides)
    assert not is_made(tmp_path / "plan", toy.file, [*overrides, "training.seed=2"])


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_arm_of_peftkit_is_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.workloads.made_backbone", lambda folder, *_: folder)
    workload = WORKLOADS[name]
    measured = Rounds(workload, 12, tmp_path, Results(tmp_path / "none.json", {}), {})
    for arm in arms_of(workload):
        if arm.tool != "peftkit":
            continue
        run = load_run(workload.file, measured._settings(arm))
        assert run.training.batch_size == workload.batch
        assert run.training.max_steps == 12
        assert run.training.micro_batch_size == (8 if "of 8" in arm.name else workload.batch)
        assert run.engine.fused_lora is (OFF not in arm.overrides)
        run.method.check_steps(12)
    assert load_run(workload.file, measured._settings(PEFTKIT)).backbone.dtype == workload.held


def test_no_arm_is_always_behind_the_same_other() -> None:
    arms = arms_of(WORKLOADS["sst2"])
    orders = [in_turn(arms, number) for number in range(len(arms))]
    assert all(sorted(map(arms.index, order)) == list(range(len(arms))) for order in orders)
    assert {order[0].name for order in orders} == {arm.name for arm in arms}


def test_step_times_come_out_of_mean_rates() -> None:
    assert peftkit_arm.step_seconds([100.0, 80.0, 100.0], [100, 60, 240]) == pytest.approx([1.0, 1.0, 2.0])


def test_a_process_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(JobError, match="exit code 3:\nthe reason"):
        processes.run(["-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"])
    assert "no-such-python" in processes.lacks("no-such-python", ["torch"])


def test_scores_over_seeds_are_compared_in_pairs() -> None:
    chance = np.random.default_rng(0)
    right = chance.random((3, 400)) < 0.9

    how = {"transform": "identity", "lower_is_better": False}

    def arm(right: Any) -> dict[str, Any]:
        return {
            str(seed): {"numerators": row.astype(float).tolist(), "denominators": [1.0] * len(row)} | how
            for seed, row in enumerate(right, start=1)
        }

    other = np.where(chance.random((3, 400)) < 0.02, ~right, right)
    found = seeds.compare({"peftkit": arm(right), "worse": arm(chance.random((3, 400)) < 0.6), "other": arm(other)}, 3)
    verdicts = {(one["first"], one["second"]): one["distinguishable"] for one in found["pairs"]}
    assert verdicts["peftkit", "worse"]
    assert len(verdicts) == 3
    assert found["scores"]["peftkit"] == pytest.approx(right.mean(1).tolist())


def test_texts_have_just_so_many_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    point = scaling.Point(length=16, batch=4)
    folder = scaling.texts(tmp_path / "texts", tiny_bert, point, 2)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    assert {len(tokenizer(row["sentence"])["input_ids"]) for row in rows} == {16}
    assert len(rows) == 8
    values = [(axis, getattr(one, axis)) for axis, one in scaling.points()]
    assert len(set(values)) == len(values) == sum(map(len, scaling.AXES.values()))


def made_results(folder: Path) -> None:
    """Of SST-2: stock at 100 tokens/s, tuned at twice and peftkit at six times that after the first step, in two
    rounds."""
    kept = Results(folder / "sst2.json", {"workload": "sst2", "steps": 2, "batch": 32})
    for arm, rate, size in ((BASE, 100, 1000), (TUNED, 200, 900), (PEFTKIT.name, 600, 400)):
        for number in range(2):
            figures = {"step_tokens": [1000] * 3, "step_seconds": [99.0, *[1000 / rate] * 2], "losses": [1.0, 0.9, 0.8]}
            kept.put(arm, number, figures | {"growth_bytes": size * 2**20, "peak_bytes": size * 2**21})
    kept.miss("adapters", "not there\nat all")
    one = {"flops": {"attention": 1e9}, "bytes": {"inputs": 1e6}, "flops_a_second": 1e11, "bytes_a_second": 1e10}
    one |= {"seconds": 1.0, "tokens_per_second": 1000.0, "tokens_per_second_without_unread": 1100.0}
    kept.set("floor", {"lora": {"bfloat16": one, "float32": one}, "full": {"bfloat16": one}, "step_tokens": 1000.0})
    kept.set("environment", {"processor": "a processor", "threads": 2, "versions": {"torch": "2"}})
    kept.set("command", "python -m benchmarks.speed --workload sst2")
    kept.set("held", "bfloat16")


def test_the_report_says_what_the_files_say(tmp_path: Path) -> None:
    made_results(tmp_path / "results")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "engine.md").write_text(f"before\n\n{report.ENGINE[0]}\nstale\n{report.ENGINE[1]}\n\nafter\n")
    written = report.write(tmp_path / "results", docs)
    assert [file.name for file in written] == ["speed.md", "speed.svg", "engine.md"]
    page = (docs / "speed.md").read_text()
    assert "| peftkit | 600 | 6.00 × | 1.667 | 400 | 40 % | 60 % |" in page
    assert "`peftkit` has frozen weights in bfloat16 there" in page
    assert "| adapters | missing |" in page
    assert "adapters is missing: not there\n" in page
    assert "| sst2 | ≥ 2 times Trainer + peft, tuned | 3.00 | yes |" in page
    assert "| sst2 | ≤ 0.7 of the memory of Trainer + peft | 0.40 | yes |" in page
    engine = (docs / "engine.md").read_text()
    assert "| peftkit | 600 |" in engine
    assert "stale" not in engine
    assert engine.startswith("before") and engine.endswith("after\n")
    chart = (docs / "speed.svg").read_bytes()
    report.write(tmp_path / "results", docs)
    assert (docs / "speed.svg").read_bytes() == chart
    assert medians(json.loads((tmp_path / "results" / "sst2.json").read_text()))[PEFTKIT.name]["rounds"] == 2


def test_the_page_is_that_of_the_result_files() -> None:
    file = report.DOCS / report.PAGE
    kept = {name: report._read(RESULTS / f"{name}.json") for name in WORKLOADS}
    measured = {name: one for name, one in kept.items() if one and one.get("arms")}
    assert file.exists() == bool(measured)
    if measured:
        assert file.read_text(encoding="utf-8") == report.page(measured, RESULTS)


def test_gradients_of_the_first_steps_and_of_some_later_ones_are_compared() -> None:
    assert gate.chosen_steps(3) == {0, 1, 2}
    chosen = gate.chosen_steps(200)
    assert {*range(10)} <= chosen
    assert len(chosen) <= gate.COMPARED
    assert max(chosen) == 195


class Made:
    """In place of what makes runs: a record that says what each took."""

    ending = False

    def __init__(self, threads: int) -> None:
        self.threads, self.asked = threads, []  # type: ignore[var-annotated]

    def make(self, job: Job) -> tuple[int, str]:
        self.asked.append(job.key.learning_rate)
        cost = Cost(
            seconds=3.0 if self.threads == 2 else 5.0, steps=2, tokens=600, tokens_per_second=200.0, peak_memory_bytes=1
        )
        losses = ((1, 0.5), (2, 0.25 + (1e-7 if self.threads == 1 and job.key.learning_rate == 4e-4 else 0.0)))
        record = Record(id=job.id, key=job.key, status="finished", cost=cost, losses=losses)
        Store(Path(job.folder)).add(record)
        return 0, ""

    def close(self) -> None:
        pass

    def end(self) -> None:
        pass


def test_runs_at_once_are_compared_with_one_after_the_other(toy: Workload, tmp_path: Path) -> None:
    ways = {"one after the other": Way(1, 2, Made(2)), "together": Way(2, 1, Made(1))}
    sizes = iter([*[100] * 2, *[150] * 20])

    def measure() -> dict[str, Any]:
        results = Results(tmp_path / "together-sst2.json", {"workload": "sst2", "runs": 4, "steps": 2})
        results.set("command", "python -m benchmarks.speed --together 4")
        return together(toy, 4, 2, tmp_path, results, ways, lambda: next(sizes))

    found = measure()
    asked = [sorted(one.maker.asked) for one in ways.values()]  # type: ignore[attr-defined]
    assert asked == [[1e-4, 2e-4, 4e-4, 8e-4]] * 2
    assert found["one after the other"]["tokens_per_second"] == pytest.approx(4 * 600 / 12)
    assert found["together"]["tokens_per_second"] == pytest.approx(4 * 600 / 10)
    assert found["gain"] == pytest.approx(1.2)
    assert found["largest_loss_differences"] == pytest.approx([0.0, 0.0, 1e-7, 0.0])
    assert measure() == found
    assert [len(one.maker.asked) for one in ways.values()] == [4, 4], "what is kept is not measured again"  # type: ignore[attr-defined]
    page = report.page({}, tmp_path)
    (tmp_path / "together-wnut17.json").write_text(json.dumps({"asked": {}, "one after the other": {}}))
    assert report.page({}, tmp_path) == page, "what is not finished is not shown"
    assert "| sst2 | 4 | 2 | 1 | 240 |" in page
    assert "1.20 times the speed, " in page


def test_memory_that_processes_share_counts_once() -> None:
    program = "import os, time; held = b'x' * (200 * 2**20); os.fork() and os.fork(); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        found = held(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
    # two of the three that share them
    assert 2 / 3 * 200 * 2**20 < found < 2 / 3 * 250 * 2**20


def test_a_profile_is_of_all_of_a_step(toy: Workload, tmp_path: Path) -> None:
    overrides = [*settings(toy, tmp_path), "training.max_steps=5"]
    found = profile._one({"config": str(toy.file), "overrides": overrides, "steps": 2})
    assert list(found) == [*profile.KINDS, profile.OTHER, profile.CALLS]
    assert found["products of matrices"] > 0
    assert found["attention"] > 0
    assert found[profile.CALLS] > 0
    kept = {"command": "python -m benchmarks.speed --profile", "seconds": {"float32": found, "bfloat16": found}}
    (tmp_path / "profile-sst2.json").write_text(json.dumps(kept))
    page = report.page({}, tmp_path)
    shares = [float(line.split(" | ")[1].removesuffix(" %")) for line in page.splitlines() if " %" in line]
    assert sum(shares) == pytest.approx(100, abs=len(shares))


def test_what_operations_took_is_sorted_by_kind() -> None:
    events = {"aten::mm": 3.0, "peftkit::attend_in_row": 2.0, "aten::strange": 0.5, "_Project": 7.0, "aten::mul_": 1.0}
    found = profile.by_kind(events, 10.0)
    assert {kind: took for kind, took in found.items() if took} == {
        "products of matrices": 3.0,
        "attention": 2.0,
        "sums and products, number by number": 1.0,
        profile.OTHER: 0.5,
        profile.CALLS: 3.5,
    }
