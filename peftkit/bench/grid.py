"""What a grid file says: backbones × data sets × methods × amounts of training data, and seeds. Nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from peftkit.backbones.load import BackboneSettings
from peftkit.bench.entries import GridData, GridMethod, Partial
from peftkit.bench.probes import Name, Probes, with_kinds
from peftkit.data.augment import AnyAugmentation
from peftkit.engine.settings import Engine
from peftkit.schema import Section, did_you_mean

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Tuning(Section):
    """How a learning rate is chosen."""

    seed: Seed = 0
    extensions: Annotated[int, Field(ge=0)] = 2
    """How many rates beyond the given ones are tried at most, one after the other."""


class Grid(Section):
    """What is compared."""

    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[\w-]+$")]
    backbones: dict[Name, BackboneSettings]
    data: dict[Name, GridData]
    methods: dict[Name, GridMethod]
    budgets: tuple[Literal["all"] | Annotated[int, Field(gt=0)], ...] = ("all",)
    """Training rows: all, or so many of each class (of tasks without classes: in all), drawn anew for each seed."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1, 2, 3, 4, 5)
    """Each changes the head's and the method's initialisation, dropout, and the order of the data, which is the same
    for all methods."""
    tuning: Tuning = Tuning()
    training: Partial = Field(default_factory=dict)
    engine: Engine = Engine()
    probe: Probes | None = None
    """What is looked at for forgetting; of several, the first that fits the model of a task."""
    robustness: tuple[AnyAugmentation, ...] = ()
    """Changes of the test texts under which the tuned model is scored again."""

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """A probe is of features unless it says otherwise."""
        return tree | {"probe": with_kinds(tree["probe"])} if "probe" in tree else tree

    @model_validator(mode="after")
    def _names_what_there_is(self) -> Grid:
        for name, one in self.data.items():
            _refuse_unknown(f"data.{name}.backbones", one.backbones, self.backbones)
        for name, method in self.methods.items():
            _refuse_unknown(f"methods.{name}.data", method.data, self.data)
        return self

    @model_validator(mode="after")
    def _compares(self) -> Grid:
        for name, data in self.data.items():
            kinds = {one.method.kind for one in self.methods.values() if not one.data or name in one.data}
            if missing := [kind for kind in data.always if kind not in kinds]:
                rates = "" if missing[0] == "prompting" else ", learning_rates: […]"
                raise ValueError(
                    f"methods lack {' and '.join(missing)} on data.{name}, beside which the others are judged; add "
                    f"`{missing[0]}: {{method: {{kind: {missing[0]}}}{rates}}}`"
                )
        if self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed {self.tuning.seed} is one of seeds; choose another, for fairness")
        for name in ("seeds", "budgets"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has one value twice")
        return self


def _refuse_unknown(where: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: no '{name}'{did_you_mean(name, known)}")
