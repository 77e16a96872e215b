"""From noise to images: the probability-flow ODE, solved in a few steps (Karras et al. 2022, sections 3 and
4).

With x = image + sigma noise the ODE is dx / d sigma = (x - D(x; sigma)) / sigma (equation 4 with Table 1,
last column).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from kr_ray.config import EdmSampling

Denoiser = Callable[[Tensor, float], Tensor]
"""D: noisy images [N, C, S, S] and their noise level -> clean ones, same shape."""

MAX_CHURN = math.sqrt(2) - 1
"""EDM's bound of gamma, so that a step never adds more noise than is in the image (section 4)."""


class Answer(NamedTuple):
    """What the denoiser said at a noise level."""

    denoised: Tensor
    sigma: float


def noise_levels(sampling: EdmSampling) -> list[float]:
    """`steps` levels from sigma_max to sigma_min, then 0 (equation 5)."""
    inverse, last = 1 / sampling.rho, sampling.steps - 1
    high, low = sampling.sigma_max**inverse, sampling.sigma_min**inverse
    return [(high + step / last * (low - high)) ** sampling.rho for step in range(sampling.steps)] + [0.0]


def solve(denoiser: Denoiser, start: Tensor, sampling: EdmSampling, fresh: Tensor | None = None) -> Tensor:
    """Follow the ODE from sigma_max to 0.

    Args:
        start: sigma_max * standard normal, float32 [N, C, S, S].
        fresh: where `sampling.churn > 0`: standard normal [steps, N, C, S, S].

    Returns:
        The images, as `start`.

    Raises:
        ValueError: `fresh` is missing or not wanted.
    """
    if (fresh is not None) != (sampling.churn > 0):
        raise ValueError(
            f"`fresh` must be given exactly when churn > 0, but got churn={sampling.churn}, "
            f"fresh={'nothing' if fresh is None else tuple(fresh.shape)}; draw [steps, N, C, S, S]"
        )
    x, before = start, None
    for step, (sigma, following) in enumerate(pairwise(noise_levels(sampling))):
        if fresh is not None:
            x, sigma = _churned(x, sigma, sampling, fresh[step])
        now = Answer(denoiser(x, sigma), sigma)
        if sampling.solver == "heun":
            x = _heun(denoiser, x, now, following)
        else:
            x = _towards(x, _extrapolated(now, before, following), sigma, following)
        before = now if sampling.solver == "dpmpp_2m" else None
    return x


def _churned(x: Tensor, sigma: float, sampling: EdmSampling, fresh: Tensor) -> tuple[Tensor, float]:
    """Raise the noise by gamma = min(S_churn / steps, sqrt(2) - 1) (Algorithm 2, lines 5 to 7; S_noise = 1,
    at every level)."""
    raised = sigma * (1 + min(sampling.churn / sampling.steps, MAX_CHURN))
    return x + math.sqrt(raised**2 - sigma**2) * fresh, raised


def _towards(x: Tensor, denoised: Tensor, sigma: float, following: float) -> Tensor:
    """The exact step where D is constant, which is also Euler's step of the ODE (and DDIM's)."""
    share = following / sigma
    return share * x + (1 - share) * denoised


def _extrapolated(now: Answer, before: Answer | None, following: float) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): D in the middle of the step in lambda
    = -ln sigma.

    The line through the last two answers; the last answer itself at the first step and on the way to 0,
    where lambda has no end.
    """
    if before is None or following == 0:
        return now.denoised
    step, last_step = math.log(now.sigma / following), math.log(before.sigma / now.sigma)
    return now.denoised + (now.denoised - before.denoised) * (step / (2 * last_step))


def _heun(denoiser: Denoiser, x: Tensor, now: Answer, following: float) -> Tensor:
    """Euler's step, corrected by the mean of both ends' slopes (Algorithm 1); plain Euler on the way to 0."""
    euler = _towards(x, now.denoised, now.sigma, following)
    if following == 0:
        return euler
    slope, slope_there = (x - now.denoised) / now.sigma, (euler - denoiser(euler, following)) / following
    return x + (following - now.sigma) / 2 * (slope + slope_there)
