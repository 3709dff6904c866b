"""Measures the arms of a workload in turn, a process each, and keeps what is done."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed import peftkit_arm
from benchmarks.speed.arms import Arm, arms_of, in_turn
from benchmarks.speed.floor import BYTES, floor
from benchmarks.speed.plan import Plan, is_made, read_plan
from benchmarks.speed.processes import answer, lacks
from benchmarks.speed.results import Results, steady_rate
from benchmarks.speed.stock import PACKAGES
from benchmarks.speed.workloads import Workload
from peftkit.environment import describe
from peftkit.errors import JobError, UsageError


@dataclass(frozen=True)
class Rounds:
    """A measurement of one workload."""

    workload: Workload
    steps: int
    work: Path
    """Where plans and made backbones are kept between calls."""
    results: Results
    pythons: dict[str, str]
    """The interpreter of each stock tool."""

    def measure(self, rounds: int, names: Sequence[str] = ()) -> None:
        """Complete all arms, or those that are named, up to `rounds` rounds.

        Raises:
            JobError: an arm of peftkit failed, or computed other tokens than planned; what is done is kept.
        """
        known = arms_of(self.workload)
        if unknown := [name for name in names if name not in {one.name for one in known}]:
            listed = "; ".join(one.name for one in known)
            raise UsageError(f"--arms: '{unknown[0]}' is no arm of {self.workload.name}; there are: {listed}")
        arms = [one for one in known if not names or one.name in names]
        self.results.set("environment", describe())
        self.results.set("held", self.workload.held)
        for number in range(rounds):
            self._rates(number)
            for arm in in_turn(arms, number):
                if not self.results.has(arm.name, number):
                    self._take(arm, number)
        self.results.set("floor", self._floors())

    def _take(self, arm: Arm, number: int) -> None:
        plan = self._plan("full" if arm.method == "full" else "lora")
        if arm.tool != "peftkit" and (why := lacks(self.pythons[arm.tool], PACKAGES[arm.tool])):
            return self._miss(arm, why)
        try:
            figures = self._trained(arm, plan)
        except JobError as error:
            if arm.tool == "peftkit":
                raise
            return self._miss(arm, str(error))
        if figures["tokens"] != sum(plan.tokens):
            raise JobError(f"{arm.name} saw {figures['tokens']:,} tokens, and {sum(plan.tokens):,} are planned")
        self.results.put(arm.name, number, figures)
        size = figures["growth_bytes"] / 2**20
        tell(f"round {number + 1}: {arm.name}: {steady_rate(figures):,.0f} tokens/s, {size:,.0f} MiB")
        return None

    def _trained(self, arm: Arm, plan: Plan) -> dict[str, Any]:
        """The figures of an arm, from a process of its own."""
        if arm.tool == "peftkit":
            figures = peftkit_arm.train(self.workload.file, self._settings(arm))
            times = peftkit_arm.step_seconds(figures.pop("mean_tokens_per_second"), plan.tokens)
            return figures | {"step_seconds": times, "step_tokens": plan.tokens}
        attention = self._attention() if arm.is_tuned else None
        asked = {"plan": str(self._folder(arm.method)), "tool": arm.tool, "is_tuned": arm.is_tuned}
        return answer("stock", asked | {"attention": attention}, self.pythons[arm.tool])

    def _miss(self, arm: Arm, why: str) -> None:
        self.results.miss(arm.name, why)
        tell(f"{arm.name} is missing: {why}")

    def _settings(self, arm: Arm) -> list[str]:
        return [*self.workload.settings(arm.method, self.steps, self.work), *arm.overrides]

    def _attention(self) -> str:
        """What the tuned arms attend with: tried once, and kept."""
        if "attention" not in self.results.kept:
            asked = {"plan": str(self._folder("lora")), "choose": True}
            self.results.set("attention", answer("stock", asked))
        return str(self.results.kept["attention"]["attention"])

    def _folder(self, method: str) -> Path:
        return self.work / self.workload.name / method

    def _plan(self, method: str) -> Plan:
        """The plan of the full or the LoRA arms; made where it is not there."""
        settings, folder = self.workload.settings(method, self.steps, self.work), self._folder(method)
        if method == "lora":
            # the stock arms hold what they hold in their own precision; adapters start from the same numbers in all
            settings = (*settings, "backbone.dtype=float32")
        if not is_made(folder, self.workload.file, settings):
            shutil.rmtree(folder, ignore_errors=True)
            asked = {"config": str(self.workload.file), "overrides": list(settings), "folder": str(folder)}
            answer("plan", asked)
        return read_plan(folder)

    def _rates(self, number: int) -> None:
        """The machine's rates at the beginning of a round."""
        rates = self.results.kept.get("rates", {})
        if str(number) not in rates:
            self.results.set("rates", rates | {str(number): answer("rates", {})})

    def _floors(self) -> dict[str, Any]:
        """By method and dtype, at the best rates of all rounds: what the hardware can do, not what it did."""
        taken = list(self.results.kept["rates"].values())
        rates = {name: max(one[name] for one in taken) for name in taken[0]}
        found: dict[str, Any] = {}
        for method in ("lora", "full"):
            plan = self._plan(method)
            found[method] = {dtype: floor(plan.shapes, plan.amount, rates, dtype) for dtype in BYTES}
        return found | {"step_tokens": plan.amount.tokens}


def tell(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)
