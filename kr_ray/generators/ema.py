"""Exponential moving average of a generator, measured in images seen rather than in steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

REFERENCE_BATCH = 64
"""Batch size of Table 3, at which `ema_decay` is given."""


def half_life_in_images(decay: float, d_steps: int) -> float:
    """Half-life that `decay` per G step means at the paper's batch of 64 (Table 3), in real images seen by D.

    One G step goes with `d_steps` D steps of 64 fresh real images, so that 0.9999 at 4 D steps is a half-life
    of ln 0.5 / ln 0.9999 = 6931 G steps = 1.77 million images, whatever batch size is used in fact.
    """
    return math.log(0.5) / math.log(decay) * REFERENCE_BATCH * d_steps


class ExponentialAverage:
    """Average of named float tensors with a half-life in images.

    Half-life rule: min(half-life of `decay`, `rampup` x images seen so far), after Karras et al. (EDM, arXiv
    2206.00364, appendix F.2). The paper starts its average at step 1000 without a ramp; on 1,080 images
    (8,400 G steps in 500 epochs) such an average would still be dominated by its start at the end.

    Args:
        tensors: live values; copied.
        half_life: upper bound of the half-life in images, > 0.
        rampup: the half-life never exceeds this share of the images seen.
    """

    def __init__(self, tensors: dict[str, Tensor], half_life: float, rampup: float) -> None:
        self.half_life, self.rampup = half_life, rampup
        self.average = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def decay(self, images: int, images_seen: int) -> float:
        """Weight that the old average keeps over a step of `images`,
        when `images_seen` were seen including them."""
        half_life = min(self.half_life, self.rampup * images_seen)
        return float(0.5 ** (images / half_life))

    @torch.no_grad()
    def update(self, tensors: dict[str, Tensor], weight: Tensor) -> None:
        """Move towards `tensors` (same names and shapes) by one step;
        `weight`, float64 [] on their device, is 1 - `decay`."""
        old, new = list(self.average.values()), [tensors[name].detach() for name in self.average]
        if weight.device.type == "cpu":
            torch._foreach_lerp_(old, new, float(weight))
            return
        # Read on the device, so that a captured graph follows the ramp.
        change = torch._foreach_sub(new, old)
        torch._foreach_mul_(change, weight.to(change[0].dtype))
        torch._foreach_add_(old, change)

    @torch.no_grad()
    def load(self, average: dict[str, Tensor]) -> None:
        """Continue from a saved `average`."""
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
