"""What was read back from disk beside what was computed in float64."""

from __future__ import annotations

from typing import Any

from peftkit.artifacts.low_rank import Change, dense, length, scale_of
from peftkit.errors import ArtifactError

TOLERANCE = 1e-6
"""Largest accepted difference between a change that was read back and the one in float64, relative to the numbers that
it is summed from: float32 holds them to 6e-8."""


def compared(
    exact: dict[str, Change], written: dict[str, Change], found: dict[str, Change], beside: dict[str, float]
) -> dict[str, Any]:
    """Errors of what was read back: `truncation`, `truncated` and `rounding`, as a `CombineReport` has them.

    Args:
        exact: what was wanted.
        written: the same after re-compression.
        found: what the files add.
        beside: the largest number of each parameter of the backbone that its change was added to before it was stored.

    Raises:
        ArtifactError: the files add something else than was written.
    """
    import torch

    rounding, lost, total, truncated = 0.0, 0.0, 0.0, {}
    for name in dict.fromkeys([*exact, *written, *found]):
        wanted = dense(exact[name]) if name in exact else torch.zeros(())
        meant = dense(written[name]) if name in written else torch.zeros(())
        read = dense(found[name]) if name in found else torch.zeros(())
        scale = beside.get(name, 0.0) + (scale_of(written[name]) if name in written else 0.0)
        rounding = max(rounding, float((read - meant).abs().max()) / (scale or 1.0))
        off, size = length(read - wanted), length(wanted)
        truncated[name] = off / (size or 1.0)
        lost, total = lost + off**2, total + size**2
        # written so that a difference that is not a number is refused too
        if not rounding <= TOLERANCE:
            raise ArtifactError(
                f"'{name}' was read back with another change than was computed ({rounding:.2g} relative, "
                f"{TOLERANCE:g} allowed); nothing was written"
            )
    return {"truncation": (lost / (total or 1.0)) ** 0.5, "truncated": truncated, "rounding": rounding}
