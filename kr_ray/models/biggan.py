"""BigGAN-Deep for small images, with spectral norms folded once per weight update.

Architecture: Brock et al. 2019 (arXiv 1809.11096), appendix B, in the variant that the public 32-px tables of the
Knowledge Recycling paper's settings point to: 1x1 convolutions on G's shortcuts and on D's where the shape changes, latent
and shared class embedding concatenated into the first linear layer and into every conditional batch norm, a projection head
(Miyato and Koyama 2018) on sum-pooled features. Parameters at 10 classes and 3 channels: `studiogan32` 9.34M (G), `kr41m`
41.01M (G) and 39.13M (D).

Weights are initialised orthogonally (Brock et al., section 3), biases with zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.config import GeneratorConfig
from kr_ray.parallel import JointNorm, batch_norm

NORM_EPS = 1e-4
NORM_MOMENTUM = 0.1


# --- layers with a spectrally normalised weight ----------------------------------------------------------------------


class SpectralLayer(nn.Module):
    """Holds `weight` (trained) and `folded`, its spectrally normalised form, which alone enters the forward pass.

    The owning SpectralNetwork computes `folded`. The weight may hold several matrices that are normalised one by one.
    """

    weight: nn.Parameter
    folded: Tensor
    kept: Tensor | None = None
    count: int = 1

    def matrices(self) -> Tensor:
        """The weight as [count, rows, columns]. Columns run (y, x, input), so that no copy of a channels_last weight is made."""
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
    """Batch norm, then ReLU, whose gain and bias are linear in the condition: one product for both, normalised apart."""

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
            x = functional.batch_norm(x, self.running_mean, self.running_var, None, None, True, self.momentum, NORM_EPS)
        else:
            # The statistics are constants here, so they go into gain and bias: one pass over x instead of two.
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
            normal = functional.batch_norm(x, mean, var, self.gain, self.bias, self.training, self.momentum, NORM_EPS)
        return functional.relu(normal)


class SpectralNetwork(nn.Module):
    """A network all of whose spectral norms are computed together, once per weight update.

    sigma = u^T W v with u, v from power iteration (Miyato et al. 2018, algorithm 1); gradients flow through sigma, not
    through u and v, as in torch's own spectral norm. The difference is when: there an iteration runs at every forward.
    Equal-shaped matrices go through batched products: some 20 kernel calls instead of some 1000 for the 32-px generator.
    """

    _groups: list[list[SpectralLayer]]
    _plain = False

    def _build_spectral_norm(self) -> None:
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
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh orthogonal weights and zero biases from a CPU generator, then 15 power iterations."""
        for module in self.modules():
            if isinstance(module, SpectralLayer):
                blank = torch.empty(module.matrices().shape)
                for matrix in blank:
                    nn.init.orthogonal_(matrix, generator=generator)
                module.weight.copy_(module.shaped(blank))
                if isinstance(getattr(module, "bias", None), Tensor):
                    module.get_parameter("bias").zero_()
            elif isinstance(module, nn.Embedding):
                nn.init.orthogonal_(module.weight, generator=generator)
        for index in range(len(self._groups)):
            u = self.get_buffer(f"u{index}")
            u.copy_(functional.normalize(torch.randn(u.shape, generator=generator), dim=2))
        for _ in range(15):
            self.refresh_spectral_norm()

    def refresh_spectral_norm(self, iterate: bool = True) -> None:
        """Recompute every folded weight; call after each weight update, outside autocast.

        With gradients enabled the folded weights are part of the autograd graph and serve exactly one backward pass.

        Args:
            iterate: do one power iteration first; False recomputes from the stored u and v (after loading a state).
        """
        for index, layers in enumerate(self._groups):
            matrices = torch.cat([layer.matrices() for layer in layers])
            if not self._plain:
                u, v = self.get_buffer(f"u{index}"), self.get_buffer(f"v{index}")
                if iterate:
                    with torch.no_grad():
                        v.copy_(functional.normalize(u @ matrices, dim=2))
                        u.copy_(functional.normalize(v @ matrices.mT, dim=2))
                # Cloned: the buffers change in place at the next call, perhaps before this graph's backward pass.
                matrices = matrices / (u.clone() @ matrices @ v.mT.clone())
            for layer, folded in zip(layers, torch.split(matrices, [layer.count for layer in layers]), strict=True):
                layer.folded = layer.shaped(folded)
        if self._groups[0][0].weight.is_cuda and not torch.is_grad_enabled() and not self._plain:
            self._keep_folded()

    def _keep_folded(self) -> None:
        """Constant folded weights stay where they are in memory: captured graphs go on reading them there after a later refresh."""
        layers = [layer for group in self._groups for layer in group]
        for layer in layers:
            if layer.kept is None or layer.kept.device != layer.folded.device:
                layer.kept = torch.empty_like(layer.folded)
        kept = [layer.kept for layer in layers if layer.kept is not None]
        torch._foreach_copy_(kept, [layer.folded for layer in layers])
        for layer, place in zip(layers, kept, strict=True):
            layer.folded = place

    def folded_weights(self) -> dict[str, Tensor]:
        """Everything a forward pass needs, detached: the state without u and v, folded in place of trained weights.

        The tensors are not copies; they hold until the next refresh.
        """
        weights = {name: value.detach() for name, value in self.state_dict().items() if not _is_power_vector(name)}
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
        own = {name: value for name, value in self.state_dict(keep_vars=True).items() if not _is_power_vector(name)}
        wrong = sorted(own.keys() ^ weights.keys())
        wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
        if wrong:
            raise ValueError(
                f"generator weights must fit the architecture, but got {len(wrong)} missing, extra or differently shaped "
                f"tensors, first {wrong[0]!r}; load them with the config they were saved with"
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


# --- blocks ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with a gain that starts at 0 (Zhang et al. 2019, as in BigGAN): keys and values are pooled 2x2."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query = Conv(features, max(features // 8, 1), 1, bias=False)
        self.key = Conv(features, max(features // 8, 1), 1, bias=False)
        self.value = Conv(features, max(features // 2, 1), 1, bias=False)
        self.out = Conv(max(features // 2, 1), features, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        query = self.query(x).flatten(2)
        key = functional.max_pool2d(self.key(x), 2).flatten(2)
        value = functional.max_pool2d(self.value(x), 2).flatten(2)
        weights = torch.softmax(query.mT @ key, dim=-1)
        mixed = (value @ weights.mT).reshape(batch, -1, height, width)
        attended: Tensor = x + self.gain.to(x.dtype) * self.out(mixed)
        return attended


def _doubled(x: Tensor) -> Tensor:
    """Nearest neighbour, in x's own type: autocast would widen it, and with it all that follows, to float32."""
    with torch.autocast(x.device.type, enabled=False):
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")


class GeneratorBlock(nn.Module):
    """1x1, 3x3, 3x3, 1x1 with conditional norms; optionally doubles the side after the first 1x1."""

    def __init__(self, inputs: int, outputs: int, condition: int, ratio: int, upsample: bool) -> None:
        super().__init__()
        hidden = max(inputs // ratio, 1)
        self.upsample = upsample
        self.norm1 = ConditionalNorm(condition, inputs)
        self.conv1 = Conv(inputs, hidden, 1)
        self.norm2 = ConditionalNorm(condition, hidden)
        self.conv2 = Conv(hidden, hidden, 3)
        self.norm3 = ConditionalNorm(condition, hidden)
        self.conv3 = Conv(hidden, hidden, 3)
        self.norm4 = ConditionalNorm(condition, hidden)
        self.conv4 = Conv(hidden, outputs, 1)
        self.shortcut = Conv(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.norm2(self.conv1(self.norm1(x, condition)), condition)
        # Nearest-neighbour doubling and a 1x1 convolution commute; this order does a quarter of the shortcut's work.
        skip = self.shortcut(x)
        if self.upsample:
            hidden, skip = _doubled(hidden), _doubled(skip)
        hidden = self.conv3(self.norm3(self.conv2(hidden), condition))
        merged: Tensor = self.conv4(self.norm4(hidden, condition)) + skip
        return merged


class DiscriminatorBlock(nn.Module):
    """Pre-activated 1x1, 3x3, 3x3, 1x1; optionally halves the side by average pooling before the last 1x1."""

    def __init__(self, inputs: int, outputs: int, ratio: int, downsample: bool) -> None:
        super().__init__()
        hidden = max(outputs // ratio, 1)
        self.downsample = downsample
        self.conv1 = Conv(inputs, hidden, 1)
        self.conv2 = Conv(hidden, hidden, 3)
        self.conv3 = Conv(hidden, hidden, 3)
        self.conv4 = Conv(hidden, outputs, 1)
        self.shortcut = Conv(inputs, outputs, 1) if downsample or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(functional.relu(x))
        hidden = self.conv2(functional.relu(hidden, inplace=True))
        hidden = self.conv3(functional.relu(hidden, inplace=True))
        if self.downsample:
            # Pooling and a 1x1 convolution commute: pooled first, the shortcut costs a quarter.
            hidden, x = functional.avg_pool2d(hidden, 2), functional.avg_pool2d(x, 2)
        hidden = self.conv4(functional.relu(hidden))
        merged: Tensor = hidden + (x if self.shortcut is None else self.shortcut(x))
        return merged


# --- the two networks ------------------------------------------------------------------------------------------------


class Generator(SpectralNetwork):
    """Latents and labels to images.

    Args:
        config: channel tables and sizes; `len(g_in)` doublings from 4 px.
        num_classes: number of labels.
        channels: 1 or 3.
    """

    def __init__(self, config: GeneratorConfig, num_classes: int, channels: int) -> None:
        super().__init__()
        unit, self.output = config.channels, config.output
        self.latent_dim, self.num_classes = config.latent_dim, num_classes
        condition = config.latent_dim + config.shared_dim
        self.embedding = nn.Embedding(num_classes, config.shared_dim, _weight=torch.zeros(num_classes, config.shared_dim))
        self.linear = Linear(condition, 16 * unit * config.g_in[0])
        self.blocks = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(zip(config.g_in, config.g_out, strict=True)):
            for depth in range(config.depth):
                last = depth == config.depth - 1
                width = unit * (outputs if last else inputs)
                self.blocks.append(GeneratorBlock(unit * inputs, width, condition, config.bottleneck_ratio, upsample=last))
            if 8 * 2**stage == config.attention_resolution:
                self.blocks.append(Attention(unit * outputs))
        self.norm = Norm(unit * config.g_out[-1])
        self.to_pixels = Conv(unit * config.g_out[-1], channels, 3)
        self._build_spectral_norm()

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """latents float [N, latent_dim], labels int64 [N] -> float32 [N, C, S, S], in [0, 1] (sigmoid) or [-1, 1] (tanh)."""
        condition = torch.cat([self.embedding(labels), latents], dim=1)
        # The first linear's outputs are read as (y, x, channel), so that the map is channels_last from the start.
        x = self.linear(condition).reshape(len(labels), 4, 4, -1).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x) if isinstance(block, Attention) else block(x, condition)
        pixels = self.to_pixels(self.norm(x)).float()
        return torch.sigmoid(pixels) if self.output == "sigmoid" else torch.tanh(pixels)

    @torch.no_grad()
    def estimate_statistics(self, latents: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        """Replace the running batch-norm statistics by the mean over these batches ("standing statistics", Brock et al.)."""
        norms = [module for module in self.modules() if isinstance(module, ConditionalNorm | Norm)]
        was_training = self.training
        self.train()
        for index, (batch, classes) in enumerate(zip(latents, labels, strict=True)):
            for norm in norms:
                norm.momentum = 1 / (index + 1)
            self(batch, classes)
        for norm in norms:
            norm.momentum = NORM_MOMENTUM
        self.train(was_training)


class Discriminator(SpectralNetwork):
    """Images and labels to one realness logit each. Every stage but the last halves the side in its first block."""

    def __init__(self, config: GeneratorConfig, num_classes: int, channels: int) -> None:
        super().__init__()
        unit, side = config.channels, config.image_size
        self.stem = Conv(channels, unit * config.d_in[0], 3)
        self.blocks = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(zip(config.d_in, config.d_out, strict=True)):
            halve = stage < len(config.d_in) - 1
            side //= 2 if halve else 1
            for depth in range(config.depth):
                width = unit * (inputs if depth == 0 else outputs)
                self.blocks.append(DiscriminatorBlock(width, unit * outputs, config.bottleneck_ratio, halve and depth == 0))
            if halve and side == config.attention_resolution:
                self.blocks.append(Attention(unit * outputs))
        self.linear = Linear(unit * config.d_out[-1], 1)
        self.embedding = Embedding(num_classes, unit * config.d_out[-1])
        self._build_spectral_norm()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images float [N, C, S, S] in G's output range, labels int64 [N] -> float32 logits [N]."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        # Sums over 16 to 64 pixels and over all channels: in full precision even under autocast.
        with torch.autocast(x.device.type, enabled=False):
            pooled = functional.relu(x.float()).sum((2, 3))
            projection = (self.embedding(labels) * pooled).sum(1)
            logits: Tensor = self.linear(pooled).squeeze(1) + projection
        return logits


def to_uint8(images: Tensor, output: Literal["sigmoid", "tanh"]) -> Tensor:
    """Generated float images in G's output range -> uint8 in [0, 255], rounded, same shape."""
    unit = images if output == "sigmoid" else (images + 1) / 2
    return (unit * 255).round_().clamp_(0, 255).to(torch.uint8)


def from_uint8(images: Tensor, output: Literal["sigmoid", "tanh"]) -> Tensor:
    """uint8 images -> float32 in G's output range: what D sees of the real data. Inverse of `to_uint8`."""
    unit = images.float().div_(255)
    return unit if output == "sigmoid" else unit.mul_(2).sub_(1)
