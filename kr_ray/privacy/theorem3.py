"""The epsilon that DPDFD's paper prints. It is not a guarantee; it is here so that it can be shown beside the
honest one."""

from __future__ import annotations

import math

from scipy import optimize

NOT_A_GUARANTEE = "not a guarantee"
WHY = (
    "the noise's std is sigma * C, so C cancels, yet theorem 3 keeps C^2; "
    "and one private image can change all B gradients of a step"
)


def printed_epsilon(
    norm_bound: float, teachers: int, batch_size: int, steps: int, sigma: float, delta: float
) -> float:
    """Theorem 3 of "Model Conversion via Differentially Private Data-Free Distillation" (Liu et al., IJCAI
    2024), as printed.

    The least over lambda > 1 of 2 C^2 n B T lambda / sigma^2 + log((lambda - 1) / lambda) - (log delta + log
    lambda) / (lambda - 1).

    Args:
        norm_bound: C.
        teachers: n.
        batch_size: B.
        steps: T.
        sigma: noise scale; the noise's std is sigma * C.
        delta: in (0, 1).
    """
    slope = 2 * norm_bound**2 * teachers * batch_size * steps / sigma**2

    def at(log_excess: float) -> float:
        excess = math.exp(log_excess)
        order = 1 + excess
        return slope * order + math.log(excess / order) - (math.log(delta) + math.log(order)) / excess

    found = optimize.minimize_scalar(at, bounds=(-10.0, 25.0), method="bounded", options={"xatol": 1e-8})
    return float(found.fun)
