"""What a training cost in time, energy and carbon dioxide, as a card tells it.

No power is guessed: without the watts that its reader names, a card has time and hardware alone.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from peftkit.errors import UsageError

JOULES = 3.6e6
"""In a kilowatt-hour."""
HOW_TO_ADD = (
    "energy and emissions were not measured; `peftkit card --watts W --co2-per-kwh G` adds an estimate, by the power "
    "that the machine drew and the grams that its grid emits"
)


@dataclass(frozen=True)
class Power:
    """What somebody knows of the machine and its grid."""

    watts: float | None = None
    """Drawn by all that the run trained on, together."""
    grams: float | None = None
    """Of CO2 equivalents for a kilowatt-hour."""

    def check(self) -> None:
        """Refuse numbers that are none, and a grid without a machine.

        Raises:
            UsageError: names the option.
        """
        for option, value in (("--watts", self.watts), ("--co2-per-kwh", self.grams)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{option} {value:g}: give a number above 0")
        if self.grams is not None and self.watts is None:
            raise UsageError("--co2-per-kwh needs --watts, the power that the machine drew while it trained")


def metadata(manifest: dict[str, Any], power: Power) -> dict[str, Any] | None:
    """The Hub's `co2_eq_emissions`; None where nothing is known."""
    if power.watts is None or power.grams is None:
        return None
    found = {
        "emissions": round(_kilowatt_hours(manifest, power.watts) * power.grams, 3),
        "source": f"estimate: {_seconds(manifest):,.0f} s of training x {power.watts:g} W x {power.grams:g} g/kWh",
        "training_type": "fine-tuning",
    }
    return found | ({"hardware_used": told_hardware(manifest)} if manifest.get("hardware") else {})


def told(manifest: dict[str, Any], power: Power) -> list[str]:
    """Lines for a reader."""
    lines = [f"trained on {told_hardware(manifest)}"]
    if power.watts is None:
        return [*lines, HOW_TO_ADD]
    hours = _kilowatt_hours(manifest, power.watts)
    line = f"estimated, not measured: {hours:.3g} kWh, at {power.watts:g} W for {_seconds(manifest):,.0f} s of training"
    if power.grams is not None:
        line += f"; {hours * power.grams:.3g} g CO2 equivalents, at {power.grams:g} g a kWh"
    return [*lines, f"{line}; evaluations, loading and tuning are not in it"]


def told_hardware(manifest: dict[str, Any]) -> str:
    """The machine in words."""
    machine = manifest.get("hardware")
    if not machine:
        return "hardware that was not recorded"
    gpus = [f"{count} x {name}" for name, count in Counter(machine["gpus"]).items()]
    return ", ".join([*gpus, f"{machine['processor']} ({machine['cores']} cores)"])


def _seconds(manifest: dict[str, Any]) -> float:
    return float(manifest["training"]["seconds"])


def _kilowatt_hours(manifest: dict[str, Any], watts: float) -> float:
    return _seconds(manifest) * watts / JOULES
