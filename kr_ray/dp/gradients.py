"""Per-image gradients, clipped and summed by Opacus, with noise from our own key. The one module that imports
Opacus.

Opacus' own sampler and normaliser are not used: it takes q = 1/len(loader) and divides by int(N /
len(loader)), which both depend on the private number of images in another way than the accounting says (130
images with batch 64 become q = 1/3 and 43).

Weights must lie in memory in torch's own order: with channels_last ones Opacus 1.6 gives wrong gradients
without a word, 85 % off in mode `hooks` and 31 % in `ghost` (ResNet14, against one image at a time).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.nn import functional as F

Mode = Literal["hooks", "functorch", "ghost"]
Draw = Callable[[torch.Size, int], Tensor]
"""Standard normal noise, float64, of a shape, for the parameter of an index."""


class _SecretNoise(DPOptimizer):  # type: ignore[misc]
    """Opacus' clipping and summing; the noise is drawn by `draw`, added in float64, and the sum divided by a
    public constant."""

    draw: Draw

    def add_noise(self) -> None:
        scale = self.noise_multiplier * self.max_grad_norm
        for index, parameter in enumerate(self.params):
            noise = scale * self.draw(parameter.shape, index).to(parameter.device)
            total = parameter.summed_grad.double() + noise
            parameter.grad = (total / self.expected_batch_size).to(parameter.dtype).view_as(parameter)


class _Clipped(_SecretNoise, DPOptimizer):
    """Gradients of every image are there and are clipped."""


class _GhostClipped(_SecretNoise, DPOptimizerFastGradientClipping):
    """Only their norms are there; a second backward pass makes the clipped sum."""


class PrivateGradients:
    """The steps of DP-SGD on `model` (Abadi et al. 2016, algorithm 1).

    Args:
        model: without batch norm and without operations in place; hooks are attached, its names stay.
        optimizer: of its parameters.
        noise_multiplier: standard deviation of the noise over `max_grad_norm`.
        divisor: the expected batch size, a public constant.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        mode: Mode,
        noise_multiplier: float,
        max_grad_norm: float,
        divisor: int,
    ) -> None:
        self.ghost = mode == "ghost"
        noisy = partial(
            _GhostClipped if self.ghost else _Clipped,
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=divisor,
            loss_reduction="sum",
        )
        self.model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if self.ghost:
            hooks = GradSampleHooksFastGradientClipping(
                model, max_grad_norm=max_grad_norm, loss_reduction="sum", strict=True
            )
            self.optimizer: _SecretNoise = noisy()
            loss = nn.CrossEntropyLoss(reduction="sum")
            self._ghost_loss = DPLossFastGradientClipping(hooks, self.optimizer, loss, loss_reduction="sum")
        else:
            GradSampleHooks(model, force_functorch=mode == "functorch", loss_reduction="sum", strict=True)
            self.optimizer = noisy()

    def step(
        self,
        batches: list[tuple[Tensor, Tensor]],
        forward: Callable[[Tensor], Tensor],
        copies: int,
        draw: Draw,
    ) -> None:
        """One private step on one Poisson batch, given in pieces that fit into memory.

        Args:
            batches: images float32 [n * copies, C, H, W], the copies of an image next to each other, and
                targets float32 [n, K]; an empty list is an empty batch, whose step is noise alone.
            forward: images to logits float32 [n * copies, K].
            draw: this step's noise.
        """
        self.optimizer.draw = draw
        self.optimizer.zero_grad()
        if not batches:
            for parameter in self.optimizer.params:
                parameter.summed_grad = torch.zeros_like(parameter)
            self.optimizer.add_noise()
            self.optimizer.original_optimizer.step()
        for index, (images, targets) in enumerate(batches):
            self.optimizer.signal_skip_step(index + 1 < len(batches))
            self.optimizer.zero_grad()
            self._backward(forward(images), targets.repeat_interleave(copies, 0), copies)
            self.optimizer.step()
        self._drop()

    def _backward(self, logits: Tensor, targets: Tensor, copies: int) -> None:
        if self.ghost:
            self._ghost_loss(logits, targets).backward()
            return
        F.cross_entropy(logits, targets, reduction="sum").backward()
        for parameter in self.optimizer.params:
            # In float32: a norm that is rounded to bfloat16 would let an image exceed the bound by 0.4 %.
            each = parameter.grad_sample.float()
            parameter.grad_sample = each.unflatten(0, (-1, copies)).mean(1) if copies > 1 else each

    def _drop(self) -> None:
        """Un-noised sums and single images' gradients must outlive no step: they would be private facts in a
        saved object."""
        for parameter in self.optimizer.params:
            parameter.grad_sample = parameter.summed_grad = None
