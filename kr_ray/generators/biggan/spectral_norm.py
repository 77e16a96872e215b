"""Layers with a spectrally normalised weight, and networks that compute
all their norms together, once per weight update.

Miyato et al. 2018 (arXiv 1802.05957), section 2.1 and algorithm 1.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.compute.parallel import JointNorm, batch_norm

NORM_EPS = 1e-4
NORM_MOMENTUM = 0.1


# --- layers -------------------------------------------------------------------------------------------------


class SpectralLayer(nn.Module):
    """Holds `weight` (trained) and `folded`, its spectrally
    normalised form, which alone enters the forward pass.

    The owning SpectralNetwork computes `folded`. The weight may hold
    several matrices that are normalised one by one.
    """

    weight: nn.Parameter
    folded: Tensor
    kept: Tensor | None = None
    count: int = 1

    def matrices(self) -> Tensor:
        """The weight as [count, rows, columns]. Columns run (y, x, input), so
        that no copy of a channels_last weight is made."""
        weight = self.weight.permute(0, 2, 3, 1) if self.weight.ndim == 4 else self.weight
        return weight.reshape(self.count, len(weight) // self.count, -1)

    def shaped(self, matrices: Tensor) -> Tensor:
        """Inverse of `matrices`."""
        if self.weight.ndim != 4:
            return matrices.reshape(self.weight.shape)
        rows, inputs, height, width = self.weight.shape
        return matrices.reshape(rows, height, width, inputs).permute(0, 3, 1, 2)


class Conv(SpectralLayer):
    """Same-size convolution with square kernel `size`; the weight lies in channels_last order."""

    def __init__(self, inputs: int, outputs: int, size: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, size, size, inputs).permute(0, 3, 1, 2))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.folded, self.bias, padding=self.weight.shape[-1] // 2)


class Linear(SpectralLayer):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.folded, self.bias)


class Embedding(SpectralLayer):
    def __init__(self, entries: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(entries, size))

    def forward(self, index: Tensor) -> Tensor:
        return functional.embedding(index, self.folded)


class ConditionalNorm(SpectralLayer, JointNorm):
    """Batch norm, then ReLU, whose gain and bias are linear in the
    condition: one product for both, normalised apart."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, condition: int, features: int) -> None:
        super().__init__()
        self.count = 2
        self.momentum = NORM_MOMENTUM
        self.weight = nn.Parameter(torch.zeros(2 * features, condition))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [N, features, H, W], condition [N, condition] -> relu(norm(x) * (1 + gain) + bias)."""
        gain, bias = functional.linear(condition, self.folded).chunk(2, dim=1)
        gain = gain + 1
        if self.training and self.joint:
            x = batch_norm(x, self.running_mean, self.running_var, None, None, self.momentum, NORM_EPS)
        elif self.training:
            x = functional.batch_norm(
                x, self.running_mean, self.running_var, None, None, True, self.momentum, NORM_EPS
            )
        else:
            # The statistics are constants here, so they go into gain and
            # bias: one pass over x instead of two.
            gain = gain * (self.running_var + NORM_EPS).rsqrt()
            bias = bias - self.running_mean * gain
        gain, bias = gain.to(x.dtype), bias.to(x.dtype)
        return torch.addcmul(bias[:, :, None, None], x, gain[:, :, None, None]).relu_()


class Norm(JointNorm):
    """Unconditional batch norm with gain and bias, then ReLU: G's last one."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.momentum = NORM_MOMENTUM
        self.gain = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training and self.joint:
            normal = batch_norm(x, mean, var, self.gain, self.bias, self.momentum, NORM_EPS)
        else:
            normal = functional.batch_norm(
                x, mean, var, self.gain, self.bias, self.training, self.momentum, NORM_EPS
            )
        return functional.relu(normal)


# --- network ------------------------------------------------------------------------------------------------


class SpectralNetwork(nn.Module):
    """A network all of whose spectral norms are computed together, once per weight update.

    sigma = u^T W v with u, v from power iteration (Miyato et al. 2018, algorithm 1); gradients flow through
    sigma, not through u and v, as in torch's own spectral norm. The difference is when: there an iteration
    runs at every forward. Equal-shaped matrices go through batched products: some 20 kernel calls instead of
    some 1000 for the 32-px generator.
    """

    _groups: list[list[SpectralLayer]]
    _plain = False

    def build_spectral_norm(self) -> None:
        groups: dict[tuple[int, int], list[SpectralLayer]] = defaultdict(list)
        for module in self.modules():
            if isinstance(module, SpectralLayer):
                _, rows, columns = module.matrices().shape
                groups[rows, columns].append(module)
        self._groups = list(groups.values())
        for index, ((rows, columns), layers) in enumerate(groups.items()):
            matrices = sum(layer.count for layer in layers)
            self.register_buffer(f"u{index}", torch.zeros(matrices, 1, rows))
            self.register_buffer(f"v{index}", torch.zeros(matrices, 1, columns))
        self.initialise(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def initialise(self, random: torch.Generator) -> None:
        """Fresh orthogonal weights and zero biases, drawn on the CPU, then 15 power iterations."""
        for module in self.modules():
            if isinstance(module, SpectralLayer):
                blank = torch.empty(module.matrices().shape)
                for matrix in blank:
                    nn.init.orthogonal_(matrix, generator=random)
                module.weight.copy_(module.shaped(blank))
                if isinstance(getattr(module, "bias", None), Tensor):
                    module.get_parameter("bias").zero_()
            elif isinstance(module, nn.Embedding):
                nn.init.orthogonal_(module.weight, generator=random)
        for index in range(len(self._groups)):
            u = self.get_buffer(f"u{index}")
            u.copy_(functional.normalize(torch.randn(u.shape, generator=random), dim=2))
        for _ in range(15):
            self.refresh_spectral_norm()

    def refresh_spectral_norm(self, iterate: bool = True) -> None:
        """Recompute every folded weight; call after each weight update, outside autocast.

        With gradients enabled the folded weights are part of the autograd
        graph and serve exactly one backward pass.

        Args:
            iterate: do one power iteration first; False recomputes from the
                stored u and v (after loading a state).
        """
        for index, layers in enumerate(self._groups):
            matrices = torch.cat([layer.matrices() for layer in layers])
            if not self._plain:
                u, v = self.get_buffer(f"u{index}"), self.get_buffer(f"v{index}")
                if iterate:
                    with torch.no_grad():
                        v.copy_(functional.normalize(u @ matrices, dim=2))
                        u.copy_(functional.normalize(v @ matrices.mT, dim=2))
                # Cloned: the buffers change in place at the next call,
                # perhaps before this graph's backward pass.
                matrices = matrices / (u.clone() @ matrices @ v.mT.clone())
            for layer, folded in zip(
                layers, torch.split(matrices, [layer.count for layer in layers]), strict=True
            ):
                layer.folded = layer.shaped(folded)
        if self._groups[0][0].weight.is_cuda and not torch.is_grad_enabled() and not self._plain:
            self._keep_folded()

    def _keep_folded(self) -> None:
        """Constant folded weights stay where they are in memory: captured graphs
        go on reading them there after a later refresh."""
        layers = [layer for group in self._groups for layer in group]
        for layer in layers:
            if layer.kept is None or layer.kept.device != layer.folded.device:
                layer.kept = torch.empty_like(layer.folded)
        kept = [layer.kept for layer in layers if layer.kept is not None]
        torch._foreach_copy_(kept, [layer.folded for layer in layers])
        for layer, place in zip(layers, kept, strict=True):
            layer.folded = place

    def folded_weights(self) -> dict[str, Tensor]:
        """Everything a forward pass needs, detached: the state without u
        and v, folded in place of trained weights.

        The tensors are not copies; they hold until the next refresh.
        """
        weights = {
            name: value.detach() for name, value in self.state_dict().items() if not _is_power_vector(name)
        }
        for name, module in self.named_modules():
            if isinstance(module, SpectralLayer):
                weights[f"{name}.weight"] = module.folded.detach()
        return weights

    @torch.no_grad()
    def load_folded_weights(self, weights: dict[str, Tensor]) -> None:
        """Become a network with plain weights: `refresh_spectral_norm` no longer divides.

        Raises:
            ValueError: names or shapes differ from this architecture's.
        """
        own = {
            name: value
            for name, value in self.state_dict(keep_vars=True).items()
            if not _is_power_vector(name)
        }
        wrong = sorted(own.keys() ^ weights.keys())
        wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
        if wrong:
            raise ValueError(
                f"generator weights must fit the architecture, but got {len(wrong)} "
                f"missing, extra or differently shaped tensors, first {wrong[0]!r}; load "
                "them with the config they were saved with"
            )
        for name, value in weights.items():
            own[name].copy_(value)
        self._plain = True
        self.refresh_spectral_norm()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves to another device or dtype take the folded weights along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.refresh_spectral_norm(iterate=False)
        return self


def _is_power_vector(name: str) -> bool:
    return name[0] in "uv" and name[1:].isdigit()
