"""The plain way of training and sampling BigGAN-Deep: the product's
networks, layer by layer from torch's own parts.

torch's `spectral_norm` parametrisation does a power iteration at every forward pass and divides anew at every
evaluation; gain and bias of a conditional batch norm are two products; everything is float32 and contiguous;
both networks are differentiated in both steps; optimisers and average loop over tensors. The parameters are
as many as the product's, and the function is the same (tests/test_bench.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from kr_ray.bench.plain_loops import average_in_a_loop
from kr_ray.config import BigGanConfig
from kr_ray.data.images import LabelledImages
from kr_ray.generators.biggan.networks import Attention, Discriminator, Generator, GeneratorBlock, from_uint8
from kr_ray.generators.biggan.spectral_norm import (
    NORM_EPS,
    NORM_MOMENTUM,
    ConditionalNorm,
    Conv,
    Embedding,
    Linear,
    SpectralLayer,
    SpectralNetwork,
)
from kr_ray.generators.biggan.training import discriminator_loss, generator_loss

# --- layers -------------------------------------------------------------------------------------------------


class PlainConditionalNorm(nn.Module):
    """Batch norm, one normalised linear layer for the gain and one for the bias, ReLU."""

    def __init__(self, condition: int, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(features, NORM_EPS, NORM_MOMENTUM, affine=False)
        self.gain = nn.Linear(condition, features, bias=False)
        self.bias = nn.Linear(condition, features, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, bias = self.gain(condition), self.bias(condition)
        return functional.relu(self.norm(x) * (1 + gain[:, :, None, None]) + bias[:, :, None, None])


def plain_layer(layer: SpectralLayer) -> nn.Module:
    """torch's own layer with the weights of `layer`, not yet normalised."""
    weight = layer.weight.detach().clone(memory_format=torch.contiguous_format)
    plain: Any
    if isinstance(layer, ConditionalNorm):
        plain = PlainConditionalNorm(weight.shape[1], len(weight) // 2)
        halves = weight.chunk(2)
        plain.gain.weight.data, plain.bias.weight.data = halves[0].clone(), halves[1].clone()
        plain.norm.running_mean, plain.norm.running_var = (
            layer.running_mean.clone(),
            layer.running_var.clone(),
        )
        return plain
    if isinstance(layer, Conv):
        outputs, inputs, side, _ = weight.shape
        plain = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=layer.bias is not None)
    elif isinstance(layer, Linear):
        plain = nn.Linear(weight.shape[1], len(weight))
    else:
        assert isinstance(layer, Embedding)
        plain = nn.Embedding(*weight.shape)
    plain.get_parameter("weight").data = weight
    if isinstance(getattr(layer, "bias", None), Tensor):
        plain.get_parameter("bias").data = layer.get_parameter("bias").detach().clone()
    return plain


class PlainGeneratorBlock(GeneratorBlock):
    """The shortcut is doubled before its 1x1 convolution, which is then four times the work."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.norm2(self.conv1(self.norm1(x, condition)), condition)
        if self.upsample:
            hidden = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        hidden = self.conv3(self.norm3(self.conv2(hidden), condition))
        merged: Tensor = self.conv4(self.norm4(hidden, condition)) + self.shortcut(x)
        return merged


# --- networks -----------------------------------------------------------------------------------------------


class PlainGenerator(nn.Module):
    """Same arguments and result as `Generator.forward`."""

    def __init__(self, network: Generator) -> None:
        super().__init__()
        self.output = network.output
        plain = _with_plain_layers(network)
        self.embedding, self.linear, self.blocks = plain.embedding, plain.linear, plain.blocks
        self.norm, self.to_pixels = plain.norm, plain.to_pixels

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        condition = torch.cat([self.embedding(labels), latents], dim=1)
        x = self.linear(condition).reshape(len(labels), 4, 4, -1).permute(0, 3, 1, 2).contiguous()
        for block in self.blocks:
            x = block(x) if isinstance(block, Attention) else block(x, condition)
        pixels = self.to_pixels(self.norm(x))
        return torch.sigmoid(pixels) if self.output == "sigmoid" else torch.tanh(pixels)


class PlainDiscriminator(nn.Module):
    """Same arguments and result as `Discriminator.forward`."""

    def __init__(self, network: Discriminator) -> None:
        super().__init__()
        plain = _with_plain_layers(network)
        self.stem, self.blocks, self.linear, self.embedding = (
            plain.stem,
            plain.blocks,
            plain.linear,
            plain.embedding,
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        pooled = functional.relu(x).sum((2, 3))
        logits: Tensor = self.linear(pooled).squeeze(1) + (self.embedding(labels) * pooled).sum(1)
        return logits


def _with_plain_layers(
    network: SpectralNetwork,
) -> Any:  # its layers are no longer those that its class declares
    """A copy with torch's layers in place of the product's, normalised
    by power vectors that equal the product's."""
    with torch.no_grad():
        network.refresh_spectral_norm(iterate=False)  # leaves no graph behind, which could not be copied
    plain: Any = copy.deepcopy(network)
    vectors = _power_vectors(network)
    for name, layer in network.named_modules():
        if not isinstance(layer, SpectralLayer):
            continue
        parent = plain.get_submodule(name.rpartition(".")[0])
        replaced = plain_layer(layer)
        setattr(parent, name.rpartition(".")[2], replaced)
        parts = (replaced.gain, replaced.bias) if isinstance(replaced, PlainConditionalNorm) else (replaced,)
        for part, (u, v) in zip(parts, vectors[name], strict=True):
            _normalise(part, u, v)
    for block in plain.modules():
        if isinstance(block, GeneratorBlock):
            block.__class__ = PlainGeneratorBlock
    return plain


def _power_vectors(network: SpectralNetwork) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The power vectors (u, v) of every matrix of every layer, by the layer's name."""
    names = {module: name for name, module in network.named_modules()}
    found = {}
    for index, layers in enumerate(network._groups):
        u, v = network.get_buffer(f"u{index}")[:, 0], network.get_buffer(f"v{index}")[:, 0]
        start = 0
        for layer in layers:
            found[names[layer]] = [(u[k], v[k]) for k in range(start, start + layer.count)]
            start += layer.count
    return found


def _normalise(layer: nn.Module, u: Tensor, v: Tensor) -> None:
    """Put torch's spectral norm on `layer`, with u and v as they are."""
    spectral_norm(layer)
    norm: Any = layer.parametrizations.weight[0]  # type: ignore[union-attr,index]
    if isinstance(layer, nn.Conv2d):  # the product's columns run (y, x, input), torch's (input, y, x)
        v = v.view(*layer.kernel_size, layer.in_channels).permute(2, 0, 1).flatten()
    norm._u.copy_(u)
    norm._v.copy_(v)


# --- training -----------------------------------------------------------------------------------------------


class PlainGanSteps:
    """One pass over the images, with a G step after every `d_steps` D
    steps; draws from `random` in the product's order."""

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        images: LabelledImages,
        config: BigGanConfig,
        random: torch.Generator | None = None,
    ) -> None:
        self.images, self.config, self.random = images, config, random
        self.generator = PlainGenerator(generator).to(images.images.device)
        self.discriminator = PlainDiscriminator(discriminator).to(images.images.device)
        betas = (config.beta1, config.beta2)
        d_class = torch.optim.AdamW if config.d_optimizer == "adamw" else torch.optim.Adam
        self.optimizer_d = d_class(
            self.discriminator.parameters(),
            config.learning_rate_d,
            betas,
            weight_decay=config.d_weight_decay,
            foreach=False,
        )
        self.optimizer_g = torch.optim.Adam(
            self.generator.parameters(), config.learning_rate_g, betas, foreach=False
        )
        self.average = {name: value.detach().clone() for name, value in self._averaged().items()}

    def run(self) -> None:
        order = torch.randperm(len(self.images), generator=self.random, device=self.images.labels.device)
        for step, index in enumerate(order.split(self.config.batch_size), start=1):
            self._d_step(index)
            if step % self.config.d_steps == 0:
                self._g_step()

    def _d_step(self, index: Tensor) -> None:
        real, labels = from_uint8(self.images.images[index], self.config.output), self.images.labels[index]
        latents, fake_labels = self._draw()
        fake = self.generator(latents, fake_labels).detach()
        on_real, on_fake = self.discriminator(real, labels), self.discriminator(fake, fake_labels)
        loss = discriminator_loss(on_real, on_fake, self.config)
        self.optimizer_d.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer_d.step()

    def _g_step(self) -> None:
        latents, labels = self._draw()
        loss = generator_loss(self.discriminator(self.generator(latents, labels), labels), self.config)
        self.optimizer_g.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer_g.step()
        average_in_a_loop(self.average, self._averaged(), self.config.ema_decay)

    def _draw(self) -> tuple[Tensor, Tensor]:
        device, size = self.images.labels.device, self.config.batch_size
        latents = torch.randn(size, self.config.latent_dim, generator=self.random, device=device)
        return latents, self.images.labels[
            torch.randint(len(self.images), (size,), generator=self.random, device=device)
        ]

    def _averaged(self) -> dict[str, Tensor]:
        return {
            name: value for name, value in self.generator.state_dict().items() if value.is_floating_point()
        }
