"""How well numbers are predicted: correlations by scipy, and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


class RegressionReport(evaluate.Metric):
    """`compute(predictions=…, references=…)` for numbers.

    Returns pearson and spearman in [−1, 1], and mse and mae in the references' unit (squared for mse). A correlation
    with something constant is undefined; it counts as 0.0, so a model that ignores its input gets no credit.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(keep_in_memory=True, **options)

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Regression",
            citation="",
            inputs_description="numbers",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr

        found, wanted = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        constant = np.ptp(found) == 0 or np.ptp(wanted) == 0
        return {
            "pearson": 0.0 if constant else float(pearsonr(found, wanted).statistic),
            "spearman": 0.0 if constant else float(spearmanr(found, wanted).statistic),
            "mse": float(np.mean((found - wanted) ** 2)),
            "mae": float(np.mean(np.abs(found - wanted))),
        }
