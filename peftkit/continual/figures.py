"""What a sequence of tasks keeps of them, from the matrix R of scores.

R[i][j] is the score on the test of task j once the tasks 0 … i were learnt, one after the other. Only what the figures
need is there: R[i][j] for j ≤ i, and R[i−1][i], of a task before it is learnt; None stands for everything else.
Scores are greater where better.

Sources: Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory for Continual Learning", section 2 (ACC, BWT, FWT);
Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", section 3 (forgetting); Riemer et al. 2019, "Learning
to Learn without Forgetting", section 4 (learning accuracy). They count tasks from 1, and here they count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

Matrix = Sequence[Sequence[float | None]]
"""R, one row for each task that was learnt."""


def average_accuracy(matrix: Matrix) -> float:
    """ACC = 1/T Σ_j R[T−1][j]: the mean score on all tasks in the end."""
    return mean(_score(matrix, len(matrix) - 1, task) for task in range(len(matrix)))


def learning_accuracy(matrix: Matrix) -> float:
    """LA = 1/T Σ_j R[j][j]: the mean score on each task when it was just learnt."""
    return mean(_score(matrix, task, task) for task in range(len(matrix)))


def backward_transfer(matrix: Matrix) -> float:
    """BWT = 1/(T−1) Σ_{j<T−1} (R[T−1][j] − R[j][j]): below 0 where later tasks cost earlier ones something.

    Raises:
        ValueError: fewer than two tasks.
    """
    last = _last(matrix)
    return mean(_score(matrix, last, task) - _score(matrix, task, task) for task in range(last))


def forgetting(matrix: Matrix) -> float:
    """F = 1/(T−1) Σ_{j<T−1} max_{j≤i<T−1} (R[i][j] − R[T−1][j]): how far each task fell from its best.

    The best is over the rows before the last one, as in the paper, so that F is below 0 where the last task helped the
    earlier ones. Rows before a task was learnt are left out: its head was fresh.

    Raises:
        ValueError: fewer than two tasks.
    """
    last = _last(matrix)
    best = [max(_score(matrix, row, task) for row in range(task, last)) for task in range(last)]
    return mean(one - _score(matrix, last, task) for task, one in enumerate(best))


def forward_transfer(matrix: Matrix, untuned: Sequence[float]) -> float | None:
    """FWT = 1/(T−1) Σ_{j>0} (R[j−1][j] − b[j]): what earlier tasks do for one that is not yet learnt.

    None where R[j−1][j] is: an adapter for each task alone gives nothing to the next.

    Args:
        untuned: b, the score of each task with the untouched backbone and the same fresh head.

    Raises:
        ValueError: fewer than two tasks.
    """
    ahead = [matrix[task - 1][task] for task in range(1, _last(matrix) + 1)]
    found = [score - start for score, start in zip(ahead, untuned[1:], strict=True) if score is not None]
    return mean(found) if len(found) == len(ahead) else None


def _last(matrix: Matrix) -> int:
    if len(matrix) < 2:
        raise ValueError("what is kept and transferred is defined for two tasks and more")
    return len(matrix) - 1


def _score(matrix: Matrix, row: int, task: int) -> float:
    score = matrix[row][task]
    if score is None:
        raise ValueError(f"R[{row}][{task}] is missing")
    return score
