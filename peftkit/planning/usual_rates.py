"""Learning rates that are worth trying for each kind of method, the likeliest first.

Rates of full, head, lora, adalora, bottleneck and prefix are those that did best, and their neighbours, in
benchmarks/results/main (MiniLM, 200 steps); the others' are of shipped configurations that were run to their end
(docs/results.md and benchmarks/results/reuters_r8.json). Small models and short trainings take greater rates than the
papers, whose ranges for models of 110 M parameters and more reach in from below: full 2e-5 to 5e-5 (Devlin et al.
2019), bottleneck 3e-5 to 3e-3 (Houlsby et al. 2019), bitfit 1e-4 to 9e-4 (Ben Zaken et al. 2022), lora 2e-4 to 5e-4
(Hu et al. 2021), ia3 3e-3 (Liu et al. 2022), prompt 0.3 (Lester et al. 2021).
"""

from __future__ import annotations

USUAL_RATES: dict[str, tuple[float, ...]] = {
    "full": (1e-4, 2e-4, 5e-5, 2e-5),
    "head": (3e-2, 1e-1, 1e-2, 3e-3),
    "lora": (1e-3, 2e-3, 5e-4, 2e-4),
    "adalora": (8e-3, 1.6e-2, 4e-3, 2e-3),
    "bottleneck": (1e-3, 2e-3, 5e-4, 2e-4),
    "prefix": (3e-2, 1e-1, 1e-2, 3e-3),
    "bitfit": (3e-3, 1e-2, 1e-3, 4e-4),
    "layernorm": (3e-3, 1e-2, 1e-3, 4e-4),
    "ia3": (1e-2, 3e-3, 3e-2, 1e-3),
    "vera": (1e-2, 3e-2, 3e-3, 1e-3),
    "prompt": (1e-2, 3e-2, 1e-1, 3e-1),
    "p_tuning": (1e-2, 3e-3, 3e-2, 1e-3),
    "top_layers": (5e-4, 1e-3, 2e-4, 1e-4),
}
"""Kind → rates in the order in which they are tried."""


def rates_to_try(kind: str, own: float | None = None) -> tuple[float, ...]:
    """Rates in the order of trial: `own` first, then the usual ones; of a kind without any, twice and half of `own`."""
    usual = USUAL_RATES.get(kind, ())
    if own is None:
        return usual
    return tuple(dict.fromkeys((own, *(usual or (2 * own, own / 2)))))
