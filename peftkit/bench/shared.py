"""What runs share, made once by a process that forks one for each of them: encoded data and weights.

A fork reads its parent's memory where it lies, and has a copy only of what it writes; so nothing that a run does with
what it was given reaches another.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from peftkit.backbones.load import BEFORE, BackboneSettings, Head, load
from peftkit.bench.worker import Job, rows_of
from peftkit.demonstrations import lacking
from peftkit.memory import reset_peak
from peftkit.prepare import Prepared, prepare

if TYPE_CHECKING:
    from torch import Tensor, nn

KEPT = 4
"""Prepared data that are kept: trials, which do not have test, and final runs of two data sets."""


class Shared:
    """Data and weights of the runs that were made ready last."""

    def __init__(self, with_weights: bool = True) -> None:
        """
        Args:
            with_weights: hold weights too, which is for nothing where runs are made one after the other.
        """
        self._with_weights = with_weights
        self._data: dict[str, Prepared] = {}
        self._weights: dict[str, Tensor] = {}
        self._loaded: tuple[BackboneSettings, Head] | None = None

    def make_ready(self, job: Job) -> None:
        """Have what a job needs. What cannot be had is left to the run, which meets the same error and tells it."""
        if lacking(job.run):
            return  # whose prompts, and so data, no other run has
        try:
            data = self.data(job) or prepare(job.run, rows_of(job))
            # the latest last, so that the one that was not asked for the longest goes
            self._data = {**{key: one for key, one in self._data.items() if one is not data}, _key(job): data}
            for key in list(self._data)[:-KEPT]:
                del self._data[key]
            if self._with_weights and job.run.backbone.quantization is None:
                self._load(job.run.backbone, data.head)
        except Exception:
            self._weights, self._loaded = {}, None

    def data(self, job: Job) -> Prepared | None:
        """Prepared data that are those of a job; None where there are none."""
        return self._data.get(_key(job))

    def lend_weights(self, model: nn.Module) -> None:
        """Let a model that was just loaded read its weights here, as far as they are the same, and drop its own."""
        import torch

        lent = 0
        for name, own in model.named_parameters():
            here = self._weights.get(name)
            if here is not None and here.dtype == own.dtype and torch.equal(here, own):
                own.data = here
                lent += here.numel() * here.element_size()
        # they count as the run's own, as in a process that has loaded them, and what was dropped does not
        setattr(model, BEFORE, getattr(model, BEFORE) - lent)
        reset_peak()

    def _load(self, settings: BackboneSettings, head: Head) -> None:
        if self._loaded == (settings, head):
            return
        self._weights, self._loaded = {}, None  # before there are new ones, not after
        model = load(settings, head).model
        self._weights = {name: one.detach() for name, one in model.named_parameters()}
        self._loaded = settings, head


def _key(job: Job) -> str:
    """All that prepared data depend on."""
    run, key = job.run, job.key
    seed = None if key.budget == "all" else key.seed
    rows = [run.task.model_dump(mode="json"), key.phase, key.budget, seed, job.dev_rows]
    backbone = [run.backbone.name, run.backbone.revision]
    return json.dumps([*rows, *backbone, run.training.evaluation_batch_size, lacking(run)], sort_keys=True)
