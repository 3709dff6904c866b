"""Advice on a method: what is run next follows from results and time, and what is said from what was measured."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_jsonl

from peftkit.bench.advice import candidates, conduct, schedule
from peftkit.bench.advice.prices import SLACK, Price, Prices, Timed, makespan
from peftkit.bench.advice.recipe import write_recipe
from peftkit.bench.advice.schedule import (
    SEEDS,
    Arm,
    Limits,
    Outcome,
    Plan,
    Results,
    Rung,
    Trial,
    least_seconds,
    next_plan,
    survivors,
)
from peftkit.bench.advice.subject import subject_of
from peftkit.bench.processes import Processes
from peftkit.bench.store import Answers, Cost, Record, Score, Store
from peftkit.bench.worker import Job, outcome
from peftkit.cli import main
from peftkit.config import load_run
from peftkit.methods import METHODS, Full, LoRA
from peftkit.planning.usual_rates import USUAL_RATES, rates_to_try

RATES = {name: USUAL_RATES[name] for name in ("full", "head", "lora", "adalora", "prefix", "bitfit")}
CEILING = {"full": 0.90, "head": 0.70, "lora": 0.91, "adalora": 0.88, "prefix": 0.80, "bitfit": 0.86}
STEP = {"full": 0.5, "head": 0.1, "lora": 0.35, "adalora": 0.6, "prefix": 0.25, "bitfit": 0.35}


def learnt(trial: Trial) -> float:
    """A curve without noise: the second rate of each method is the best of it, and lora of all."""
    arm = trial.arm
    distance = abs(math.log(arm.learning_rate / RATES[arm.method][1]))
    return CEILING[arm.method] * (1 - math.exp(-trial.steps / 50)) - 0.04 * distance


def prices_of(start: float = 8.0) -> Prices:
    known = {name: Price(start, step) for name, step in STEP.items()}
    return Prices(known, Price(start, max(STEP.values())), 1.0)


class Simulation:
    """A comparison whose runs take what they are expected to, times `slower`."""

    def __init__(self, seconds: float, start: float = 8.0, slower: float = 1.0, rates: Any = RATES) -> None:
        self.left, self.start, self.slower, self.rates = seconds, start, slower, rates
        self.rungs: list[Rung] = []
        self.plans: list[Plan] = []
        self.results: dict[Trial, Outcome] = {}

    def plan(self, results: Results | None = None) -> Plan | None:
        seen = prices_of(self.start) if not self.rungs else self._seen()
        return next_plan(self.rates, self.rungs, results or self.results, seen, Limits(self.left, 2, 1, 600))

    def _seen(self) -> Prices:
        known = {name: Price(self.slower * self.start, self.slower * step) for name, step in STEP.items()}
        return Prices(known, Price(self.start, 1.0), self.slower)

    def run(self, score: Callable[[Trial], float | None] = learnt) -> Simulation:
        while (plan := self.plan()) is not None:
            self.plans.append(plan)
            self.rungs.append(plan.rung)
            self.left -= makespan([self.took(one) for one in plan.rung.trials], 2)
            self.results |= {one: Outcome(score(one)) for one in plan.rung.trials}
        return self

    def took(self, trial: Trial) -> float:
        return self.slower * prices_of(self.start).seconds(trial.arm.method, trial.steps, trial.last) / SLACK


class TestSchedule:
    @pytest.mark.parametrize("seconds", [600, 1800, 7200])
    def test_the_best_arm_survives_and_all_that_was_promised_fits(self, seconds: float) -> None:
        done = Simulation(seconds).run()
        last = [rung for rung in done.rungs if rung.last]
        best = max((arm for arm in done.rungs[0].arms), key=lambda arm: learnt(Trial(arm, 10**6, 0, True)))
        assert best in last[0].arms
        assert best.method == "lora"
        assert {arm.method for arm in last[0].arms} >= {"full", "lora"}
        assert len({arm.method for arm in last[0].arms}) == len(last[0].arms)
        assert done.left >= 0
        assert all(plan.seconds <= seconds for plan in done.plans)
        assert last[0].seeds == SEEDS
        lengths = [rung.steps for rung in done.rungs if not rung.last] + [last[0].steps]
        assert lengths == sorted(lengths)
        assert {rung.steps for rung in last} == {last[0].steps}

    def test_each_rung_keeps_the_best_third(self) -> None:
        first, second, *_ = Simulation(7200).run().rungs
        by_hand = sorted(first.arms, key=lambda arm: -learnt(Trial(arm, first.steps, 0, False)))
        kept = by_hand[: math.ceil(len(first.arms) / 3)]
        assert set(second.arms) == {*kept, next(arm for arm in by_hand if arm.method == "full")}

    def test_more_time_tries_more_rates_and_then_more_seeds(self) -> None:
        tried = [len(Simulation(seconds).run().rungs[0].arms) for seconds in (300, 600, 7200)]
        assert tried == sorted(set(tried))
        seeds = [seed for rung in Simulation(7200).run().rungs if rung.last for seed in rung.seeds]
        assert seeds == [1, 2, 3, 4, 5]

    def test_the_same_results_lead_to_the_same_runs(self) -> None:
        done = Simulation(1800).run()
        for count in range(len(done.rungs)):
            again = Simulation(done.plans[count].seconds + 1)
            again.rungs = done.rungs[:count]
            known = [(one, done.results[one]) for rung in again.rungs for one in rung.trials]
            random.Random(count).shuffle(known)
            results = dict(known)
            first = again.plan(results)
            assert first is not None
            assert first == again.plan(dict(reversed(known)))
            if count:
                assert first.rung.arms == done.rungs[count].arms

    @pytest.mark.parametrize("slower", [1.5, 3.0])
    def test_a_machine_that_is_slower_than_thought_gets_less_to_do(self, slower: float) -> None:
        fast, slow = Simulation(1200).run(), Simulation(1200, slower=slower).run()
        assert slow.rungs[0] == fast.rungs[0]
        assert slow.left >= 0
        assert sum(slow.took(t) for r in slow.rungs[1:] for t in r.trials) / slower < sum(
            fast.took(t) for r in fast.rungs[1:] for t in r.trials
        )
        assert slow.rungs[-1].last

    def test_too_little_time_is_told_with_what_would_do(self) -> None:
        limits = Limits(60.0, 2, 1, 600)
        assert next_plan(RATES, [], {}, prices_of(), limits) is None
        needed = least_seconds(RATES, prices_of(), limits)
        assert needed > 60
        plan = Simulation(needed + 0.01).plan()
        assert plan is not None
        assert plan.seeds == len(SEEDS)
        short = Simulation(needed - 0.01).plan()
        assert short is None or short.seeds < len(SEEDS)

    def test_what_failed_goes_no_further(self) -> None:
        done = Simulation(1800).run(lambda trial: None if trial.arm.method in ("full", "lora") else learnt(trial))
        assert {arm.method for rung in done.rungs[1:] for arm in rung.arms}.isdisjoint({"full", "lora"})
        assert done.rungs[-1].last
        nothing = Simulation(1800).run(lambda trial: None)
        assert len(nothing.rungs) == 1

    def test_equal_scores_are_told_apart_by_the_loss(self) -> None:
        arms = tuple(Arm(method=name, learning_rate=1e-3) for name in ("lora", "head", "prefix"))
        rung = Rung(steps=20, arms=arms)
        losses = {"lora": 0.5, "head": 0.7, "prefix": 0.3}
        results = {one: Outcome(0.6, losses[one.arm.method]) for one in rung.trials}
        assert [arm.method for arm in survivors(rung, results, 2)] == ["prefix", "lora"]

    def test_a_few_methods_with_one_rate_meet_at_once(self) -> None:
        plan = Simulation(600, rates={"lora": (1e-3,), "head": (1e-2,)}).plan()
        assert plan is not None
        assert (plan.rung.last, plan.rung.seeds, len(plan.rung.arms)) == (True, SEEDS, 2)


class TestPrices:
    def test_of_runs(self) -> None:
        runs = [
            Timed("lora", 10, seconds=15.0, training=5.0, answering=2.0),
            Timed("lora", 30, seconds=25.0, training=15.0),
            Timed("full", 10, seconds=20.0, training=10.0),
        ]
        prices = Prices.of(runs)
        assert prices is not None
        assert prices.seconds("lora", 100, False) == pytest.approx(SLACK * (9 + 100 * 0.5))
        assert prices.seconds("lora", 100, True) == pytest.approx(SLACK * (9 + 100 * 0.5 + 2))
        assert prices.seconds("unseen", 10, False) == pytest.approx(SLACK * (10 + 10 * 1.0))
        assert Prices.of([]) is None

    def test_on_several_workers(self) -> None:
        assert makespan([5, 4, 3, 3, 3], 2) == 10  # 5 + 3 and 4 + 3, then 3
        assert makespan([], 2) == 0
        for _ in range(50):
            costs = [random.Random(_).randint(1, 9) for _ in range(7)]
            best = min(
                max(sum(part), sum(costs) - sum(part)) for size in range(8) for part in combinations(costs, size)
            )
            assert best <= makespan(costs, 2) <= best * 7 / 6  # Graham 1969: at most 4/3 − 1/(3 · workers)

    def test_every_usual_rate_is_of_a_method_that_trains(self) -> None:
        assert all(METHODS[kind].trains for kind in USUAL_RATES)
        assert all(len(set(rates)) == len(rates) and min(rates) > 0 for rates in USUAL_RATES.values())
        assert rates_to_try("lora", 2e-3)[:2] == (2e-3, 1e-3)
        assert rates_to_try("peft", 1e-2) == (1e-2, 2e-2, 5e-3)


@pytest.fixture
def config(write_config: Callable[..., Path], toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy run whose test split would be refused by whoever looks at it."""
    monkeypatch.chdir(tmp_path)
    bad = write_jsonl(tmp_path / "test.jsonl", [{"text": "good", "label": "unheard of"}])
    files = {"train": str(toy_data / "sentiment_train.jsonl"), "dev": str(toy_data / "sentiment_dev.jsonl")}
    task = {"kind": "sequence_classification", "data": files | {"test": str(bad)}, "max_length": 32}
    training = {"learning_rate": 0.01, "max_steps": 16, "batch_size": 16, "warmup_steps": 4, "seed": 7}
    file = write_config(training=training)
    tree = yaml.safe_load(file.read_text()) | {"task": task}
    del tree["output"]
    file.write_text("# mine\n" + yaml.safe_dump(tree, sort_keys=False))
    return file


class Made:
    """Workers that compute nothing: what a run scores is made up from what is true of its method."""

    def __init__(self, truth: Mapping[str, float], rows: int = 40) -> None:
        self.truth, self.rows, self.done = truth, rows, list[Job]()
        self.fails: dict[str, Any] = {}
        self.stop_after = math.inf

    def work(self, _: Any, job: Job, store: Store) -> None:
        if len(self.done) >= self.stop_after:
            raise KeyboardInterrupt
        self.done.append(job)
        key, steps = job.key, job.run.training.max_steps
        known: dict[str, Any] = {"id": job.id, "key": key, "run": job.run.model_dump(mode="json")}
        if key.method in self.fails:
            store.add(Record(**known, status=self.fails[key.method], error="no room for 3 GiB"))
            return
        wrong = round((1 - self.truth[key.method]) * self.rows)
        chance = random.Random(f"{key.method}{key.learning_rate}{key.seed}")
        lost = set(chance.sample(range(self.rows), wrong))
        right = [float(row not in lost) for row in range(self.rows)]
        cost = Cost(seconds=1e-3, steps=steps or 0, tokens=1, tokens_per_second=1.0, peak_memory_bytes=1)
        score = Score(headline="accuracy", value=sum(right) / self.rows)
        answers = Answers(predictions=tuple(right), numerators=tuple(right), denominators=(1.0,) * self.rows)
        trained = {"full": 1_000_000, "lora": 5_000, "head": 66}[key.method]
        record = Record(**known, status="finished", dev=score, cost=cost, trainable_parameters=trained)
        store.add(record, answers if job.answers else None)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    one = Made({"full": 0.9, "lora": 0.9, "head": 0.5})
    monkeypatch.setattr(Processes, "work", lambda self, job, store: one.work(self, job, store))
    yield one


THREE = ["--method", "full", "--method", "lora", "--method", "head", "--workers", "1"]


class TestCommandLine:
    def test_real_runs_from_start_to_recipe(
        self, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[str] = []

        def here(_: Any, job: Job, store: Store) -> None:
            done.append(job.id)
            store.add(*outcome(job))

        monkeypatch.setattr(Processes, "work", here)
        monkeypatch.setattr(schedule, "MOST_SEEDS", len(SEEDS))
        monkeypatch.setattr(candidates, "rates_to_try", lambda kind, own: USUAL_RATES[kind][:2])
        command = ["advise", str(config), "--budget-minutes", "60", "--method", "full", "--method", "head", "--json"]
        assert main([*command, "--workers", "1"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["method"] in ("full", "head")
        assert {one["method"] for one in told["arms"]} == {"full", "head"}
        assert told["dev_rows"] == 40
        assert told["used_seconds"] < told["budget_seconds"] == 3600
        assert any("40 rows of dev" in doubt for doubt in told["doubts"])
        store = Store(Path(told["folder"]))
        records = list(store.records())
        assert len(records) == len(done) == len(set(done))
        assert all((one.status, one.key.phase, one.test) == ("finished", "trial", None) for one in records)
        kept = [store.answers(one.id) for one in records if one.key.seed == 1]
        values = [one.dev.value for one in records if one.key.seed == 1 and one.dev]
        assert [sum(one.numerators) / sum(one.denominators) for one in kept] == values

        again = len(done)
        assert main([*command, "--workers", "1"]) == 2
        assert "config_advised.yaml exists" in capsys.readouterr().err
        assert main([*command, "--workers", "1", "--overwrite", "--budget-minutes", "0.01"]) == 0
        second = json.loads(capsys.readouterr().out)
        assert len(done) == again
        assert {name: second[name] for name in ("method", "learning_rate", "arms")} == {
            name: told[name] for name in ("method", "learning_rate", "arms")
        }
        assert main(["validate", told["output"]]) == 0
        run, own = load_run(Path(told["output"])), load_run(config)
        assert run.training == own.training.model_copy(update={"learning_rate": told["learning_rate"]})
        assert (run.task, run.backbone) == (own.task, own.backbone)
        assert run.method.kind == told["method"]

    def test_the_cheapest_that_is_as_good_is_advised(
        self, config: Path, made: Made, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made.truth = {"full": 1.0, "lora": 1.0, "head": 0.5}
        assert main(["advise", str(config), "--budget-minutes", "2", *THREE]) == 0
        told = capsys.readouterr().out
        assert "Use lora at learning rate" in told
        assert "The difference from full is within the noise of these rows and seeds." in told
        assert "head" not in told.partition("Use lora")[2]
        last = [job for job in made.done if job.answers and job.key.seed]
        assert {job.key.seed for job in last} == {1, 2, 3, 4, 5}
        assert {job.key.method for job in last} == {"full", "lora"}
        text = (config.parent / "config_advised.yaml").read_text()
        assert "# mine" in text
        assert "kind: lora\n  rank: 4\n  alpha: 8\n" in text

    def test_what_stopped_goes_on_without_repeating(
        self, config: Path, made: Made, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["advise", str(config), "--budget-minutes", "2", *THREE]
        made.stop_after = 5
        assert main(command) == 130
        made.stop_after = math.inf
        assert main(command) == 0
        names = [job.id for job in made.done]
        assert len(names) == len(set(names))
        told = capsys.readouterr().out
        assert "going on with 10 of 13 runs of 16 steps" in told
        stopped = told.partition("Use ")[2]
        shutil.rmtree(config.parent / "runs")
        made.done.clear()
        assert main([*command, "--overwrite"]) == 0
        assert sorted(job.id for job in made.done) == sorted(names)
        assert capsys.readouterr().out.partition("Use ")[2].partition("used")[0] == stopped.partition("used")[0]

    def test_what_does_not_fit_into_memory_is_said(
        self, config: Path, made: Made, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made.fails = {"full": "out_of_memory"}
        assert main(["advise", str(config), "--budget-minutes", "2", *THREE]) == 0
        told = capsys.readouterr().out
        assert "A run of full ran out of memory: no room for 3 GiB." in told
        assert sum(job.key.method == "full" for job in made.done) == 1
        made.fails = dict.fromkeys(("full", "lora", "head"), "failed")
        assert main(["advise", str(config), "--budget-minutes", "2", "--folder", "other", "--overwrite", *THREE]) == 1
        assert "no method could be run; full failed: no room for 3 GiB" in capsys.readouterr().err

    def test_time_that_ends_in_the_middle(
        self, config: Path, made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After the first rung all is so slow that nothing more would fit."""
        command = ["advise", str(config), "--budget-minutes", "2", *THREE]
        monkeypatch.setattr(conduct.Conduct, "left", property(lambda self: 100 - 1e4 * (len(self.records) > 14)))
        assert main(command) == 0
        told = capsys.readouterr().out
        assert "One run each, and no test of the difference." in told
        assert "The time was up before the last rung was complete" in told

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["--budget-minutes", "0"], "0 is not a number of minutes above 0"),
            (["--budget-minutes", "nan"], "nan is not a number of minutes above 0"),
            ([], "the following arguments are required: --budget-minutes"),
            (["--budget-minutes", "1", "--method", "loraa"], "no method 'loraa'; did you mean 'lora'?"),
            (["--budget-minutes", "1", "--method", "lora"], "1 method can be tried, and a comparison takes two"),
            (["--budget-minutes", "1", "--output", "config.yaml"], "config.yaml exists; name another file"),
            (["--budget-minutes", "1", "--output", "."], "is a folder"),
            (["--budget-minutes", "1", "task.data=null"], "the rows must be given in Python"),
            (["--budget-minutes", "1", "task.data.dev=nowhere.jsonl"], "nowhere.jsonl: no such file"),
            (["--budget-minutes", "1", "method={kind: prompting}"], "method 'prompting' trains nothing"),
            (["--budget-minutes", "1", "method.start_from=runs/other"], "method.start_from is set"),
        ],
    )
    def test_what_cannot_be(
        self, config: Path, made: Made, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
    ) -> None:
        assert main(["advise", str(config), *arguments]) == 2
        assert told in capsys.readouterr().err
        assert not made.done

    def test_too_short_a_time(
        self, config: Path, made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(conduct.Conduct, "left", property(lambda self: 100.0 if len(self.records) < 2 else 1e-9))
        assert main(["advise", str(config), "--budget-minutes", "0.5", *THREE]) == 2
        assert "0.5 minutes are too few here: to compare 3 methods takes about" in capsys.readouterr().err


class TestSubject:
    def test_a_trial_is_the_configuration_with_another_method_and_length(self, config: Path) -> None:
        run = load_run(config)
        subject = subject_of("config", run, ["full", "lora"])
        assert subject.steps == 16
        arm = Arm(method="full", learning_rate=2e-4)
        found = subject.run_of(Trial(arm, 8, 3, True))
        changes = {
            "learning_rate": 2e-4,
            "seed": 3,
            "max_steps": 8,
            "evaluate_every": 8,
            "keep_best": False,
            "warmup_steps": None,
            "warmup_ratio": 0.25,
        }
        assert found.training == run.training.model_copy(update=changes)
        assert found.method == Full()
        assert (found.task, found.backbone) == (run.task, run.backbone)
        assert subject.run_of(Trial(Arm(method="lora", learning_rate=1e-3), 8, 3, True)).method == run.method
        assert subject.rates["lora"][0] == 0.01

    def test_what_cannot_be_tried_is_left_out_with_the_reason(self, config: Path) -> None:
        run = load_run(config, ["backbone.dtype=bfloat16"])
        subject = subject_of("config", run, [])
        assert set(subject.candidates.left_out) == {"full", "bitfit"}
        assert "backbone.dtype: float32" in subject.candidates.left_out["full"]
        assert "lora" in subject.candidates.chosen

    def test_dev_that_is_carved_is_told(self, config: Path) -> None:
        subject = subject_of("config", load_run(config, ["task.data.dev=null"]), ["full", "lora"])
        assert subject.dev_rows == 16
        assert any("16 of 160 training rows set aside" in note for note in subject.notes)

    def test_many_rows_of_dev_are_drawn_from(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("peftkit.bench.advice.subject.DEV_ROWS", 10)
        subject = subject_of("config", load_run(config), ["full", "lora"])
        job = subject.job(Trial(Arm(method="lora", learning_rate=0.01), 2, 1, True), config.parent)
        record, answers = outcome(job)
        assert record.error is None
        assert answers is not None
        assert len(answers.predictions) == subject.dev_rows == 10


class TestRecipe:
    TEXT = """\
# about this run
task: {kind: sequence_classification, data: {train: a.csv}}

method:  # the old one
  kind: full
# before training
training:
  learning_rate: 0.0001  # tuned
  epochs: 2
backbone: {name: bundled:minilm}
"""

    def test_the_file_stays_as_it_was_but_for_two_places(self, tmp_path: Path) -> None:
        file, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
        file.write_text(self.TEXT)
        write_recipe(file, [], LoRA(rank=4, alpha=8), 2e-3, ["so it was found"], target)
        section = "method:\n  kind: lora\n  rank: 4\n  alpha: 8\n"
        expected = self.TEXT.replace("method:  # the old one\n  kind: full\n", section).replace("0.0001", "2e-3")
        assert target.read_text() == "# so it was found\n" + expected

    @pytest.mark.parametrize(
        ("change", "overrides"),
        [
            (
                (
                    "training:\n  learning_rate: 0.0001  # tuned\n  epochs: 2",
                    "training: {learning_rate: 1e-4, epochs: 2}",
                ),
                [],
            ),
            (("x", "x"), ["training.epochs=2"]),
            (("x", "x"), ["training.learning_rate=5"]),
        ],
    )
    def test_other_forms_say_the_same(self, tmp_path: Path, change: tuple[str, str], overrides: list[str]) -> None:
        file, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
        file.write_text(self.TEXT.replace(*change))
        write_recipe(file, overrides, LoRA(), 0.00123456, [], target)
        found, own = load_run(target), load_run(file)
        assert found.training == own.training.model_copy(update={"learning_rate": 0.00123456})
        assert found.method == LoRA()
        assert (found.task, found.backbone) == (own.task, own.backbone)
