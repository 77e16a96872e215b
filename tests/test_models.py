"""Parameter counts against published ones; folded spectral norm
against torch's own; fast paths against naive ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kr_ray.classifiers.resnet import ResNet14
from kr_ray.config import BigGanConfig
from kr_ray.generators.biggan.networks import (
    Discriminator,
    DiscriminatorBlock,
    Generator,
    GeneratorBlock,
    from_uint8,
    to_uint8,
)
from kr_ray.generators.biggan.spectral_norm import ConditionalNorm, Conv, SpectralLayer, SpectralNetwork


def generator_config(**keys: Any) -> BigGanConfig:
    return BigGanConfig.model_validate_json(json.dumps(BigGanConfig.expand(keys)))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- ResNet14 -----------------------------------------------------------------------------------------------


def test_resnet14_has_the_published_size() -> None:
    assert parameters(ResNet14(10, 3)) == 2_777_674  # 2.778M


def test_resnet14_has_fourteen_layers() -> None:
    convolutions = [
        m for m in ResNet14(10, 3, 4).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(convolutions) + 1 == 14


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 32), (1, 33)])
def test_resnet14_shapes(channels: int, size: int) -> None:
    model = ResNet14(7, channels, width=4, random=seeded())
    images = torch.randn(2, channels, size, size, generator=seeded(1))
    assert model.features(images).shape == (2, 16)
    torch.testing.assert_close(model(images), model.eval().head(model.features(images)), atol=10, rtol=10)
    assert model(images).shape == (2, 7)


def test_resnet14_weights_depend_on_the_given_generator_only() -> None:
    state = torch.get_rng_state()
    one, two, other = (ResNet14(3, 1, 4, random=seeded(s)).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["stem.weight"], other["stem.weight"])


def test_resnet14_without_generator_follows_the_global_seed() -> None:
    weights = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            weights.append(ResNet14(3, 1, 4).stem.weight.detach())
    assert torch.equal(*weights)


# --- BigGAN-Deep: sizes and shapes --------------------------------------------------------------------------


@pytest.mark.slow
def test_kr41m_has_the_sizes_of_table_3() -> None:
    config = generator_config(architecture="kr41m")
    assert round(parameters(Generator(config, 10, 3)) / 1e6, 2) == 41.01
    assert round(parameters(Discriminator(config, 10, 3)) / 1e6, 2) == 39.13


def test_studiogan32_has_the_public_sizes() -> None:
    config = generator_config(architecture="studiogan32", d_in=[1, 4, 4], d_out=[4, 4, 4])
    assert round(parameters(Discriminator(config, 10, 3)) / 1e6, 2) == 3.18
    assert round(parameters(Generator(config, 10, 3)) / 1e6, 2) == 9.34


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "keys",
    [
        {"architecture": "tiny16"},
        {"architecture": "tiny16", "depth": 2, "attention_resolution": 8},
        {
            "architecture": "small32",
            "channels": 4,
            "attention_resolution": 16,
            "latent_dim": 6,
            "shared_dim": 5,
        },
    ],
)
def test_shapes_and_ranges(keys: dict[str, Any], channels: int) -> None:
    for preset, low in (("ours", 0.0), ("vanilla", -1.0)):
        config = generator_config(preset=preset, **keys)
        generator, discriminator = Generator(config, 3, channels), Discriminator(config, 3, channels)
        labels = torch.tensor([0, 1, 2, 0])
        images = generator(5 * torch.randn(4, config.latent_dim, generator=seeded()), labels)
        assert images.shape == (4, channels, config.image_size, config.image_size)
        assert images.dtype == torch.float32
        assert low <= images.min() < images.max() <= 1
        assert discriminator(images, labels).shape == (4,)
        attention = [name for name, _ in generator.named_parameters() if name.endswith("query.weight")]
        assert len(attention) == bool(config.attention_resolution)


def test_a_table_that_does_not_join_is_refused() -> None:
    with pytest.raises(ValueError, match=r"g_in\[k \+ 1\] == g_out\[k\]"):
        generator_config(architecture="small32", g_in=[4, 4, 4], g_out=[4, 2, 2])


def test_uint8_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(pixels, "sigmoid"), "sigmoid"), pixels)
    assert torch.equal(to_uint8(from_uint8(pixels, "tanh"), "tanh"), pixels)
    assert from_uint8(pixels, "tanh").min() == -1


# --- spectral norm ------------------------------------------------------------------------------------------


def power_iteration(weight: Tensor, u: Tensor) -> Tensor:
    """The normalised matrix after one iteration of torch.nn.utils.spectral_norm, in its training mode."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    layer = nn.utils.spectral_norm(layer)
    del layer.weight_orig
    layer.weight_orig, layer.weight_u = weight, u.clone()
    captured: list[Tensor] = []
    layer.register_forward_hook(lambda module, _, __: captured.append(module.weight))
    layer(torch.zeros(1, weight.shape[1], dtype=weight.dtype))
    return captured[0]


def naive_refresh(network: SpectralNetwork) -> None:
    """Layer by layer, matrix by matrix, with torch's own spectral norm, from the network's present u."""
    for index, layers in enumerate(network._groups):
        vectors = iter(network.get_buffer(f"u{index}")[:, 0])
        for layer in layers:
            layer.folded = layer.shaped(
                torch.stack([power_iteration(m, next(vectors)) for m in layer.matrices()])
            )


@pytest.mark.parametrize("build", [Generator, Discriminator])
def test_folded_spectral_norm_equals_torchs(build: type[SpectralNetwork]) -> None:
    config = generator_config(architecture="tiny16", depth=2, attention_resolution=8)
    network = build(config, 3, 3)  # type: ignore[arg-type]
    for parameter in network.parameters():  # far from orthogonal, so that the iteration has not converged
        nn.init.normal_(parameter, std=1 if parameter.ndim > 1 else 0.1, generator=seeded(parameter.numel()))
    labels = torch.tensor([0, 1, 2, 2])
    first = torch.randn(4, config.latent_dim if build is Generator else 3 * 16 * 16, generator=seeded())
    inputs = first if build is Generator else first.reshape(4, 3, 16, 16)
    results = []
    for refresh in (naive_refresh, SpectralNetwork.refresh_spectral_norm):
        network.zero_grad()
        refresh(network)
        out = network(inputs, labels)
        (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        results.append((out.detach(), gradients))
    (naive_out, naive_gradients), (out, gradients) = results
    torch.testing.assert_close(out, naive_out, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == naive_gradients.keys() == dict(network.named_parameters()).keys()
    # Biases right before a batch norm have gradient zero but for
    # rounding: measured against the largest gradient.
    floor = 1e-2 * max(gradient.abs().max() for gradient in naive_gradients.values())
    for name, gradient in gradients.items():
        naive = naive_gradients[name]
        assert (gradient - naive).abs().max() <= 1e-5 * torch.maximum(naive.abs().max(), floor), name


def test_iterations_converge_to_unit_spectral_norm() -> None:
    network = Generator(generator_config(architecture="tiny16"), 3, 1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=seeded(parameter.numel()))
    with torch.no_grad():
        for _ in range(300):
            network.refresh_spectral_norm()
    for layer in network.modules():
        if isinstance(layer, SpectralLayer):
            layer.weight.data.copy_(layer.folded)
            torch.testing.assert_close(
                torch.linalg.matrix_norm(layer.matrices(), ord=2), torch.ones(layer.count), atol=1e-3, rtol=0
            )


def test_recomputing_without_iteration_repeats_the_folded_weights() -> None:
    network = Discriminator(generator_config(architecture="tiny16"), 3, 1)
    network.refresh_spectral_norm()
    before = {name: weight.clone() for name, weight in network.folded_weights().items()}
    network.refresh_spectral_norm(iterate=False)
    assert all(torch.equal(weight, before[name]) for name, weight in network.folded_weights().items())


def test_plain_generator_equals_the_normalised_one() -> None:
    config = generator_config(architecture="tiny16", attention_resolution=8)
    trained, plain = Generator(config, 3, 1), Generator(config, 3, 1)
    trained.initialise(seeded(3))
    plain.load_folded_weights(trained.folded_weights())
    latents, labels = torch.randn(4, config.latent_dim, generator=seeded()), torch.tensor([0, 1, 2, 0])
    for mode in (True, False):
        torch.testing.assert_close(trained.train(mode)(latents, labels), plain.train(mode)(latents, labels))


def test_weights_of_another_architecture_are_refused() -> None:
    weights = Generator(generator_config(architecture="tiny16"), 3, 1).folded_weights()
    with pytest.raises(ValueError, match="must fit the architecture"):
        Generator(generator_config(architecture="tiny16"), 4, 1).load_folded_weights(weights)


def test_initialisation_is_orthogonal_seeded_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    generator = Generator(generator_config(architecture="tiny16"), 3, 1)
    assert torch.equal(state, torch.get_rng_state())
    matrix = generator.linear.matrices()[0]
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(matrix.shape[1]), atol=1e-5, rtol=0)


# --- fast paths ---------------------------------------------------------------------------------------------


def fold_plainly(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, SpectralLayer):
            nn.init.normal_(layer.weight, std=0.3, generator=seeded(layer.weight.numel()))
            layer.folded = layer.weight


def naive_norm(layer: ConditionalNorm, x: Tensor, condition: Tensor) -> Tensor:
    gain, bias = (condition @ half.T for half in layer.weight.chunk(2))
    if layer.training:
        normal = functional.batch_norm(x, None, None, training=True, eps=1e-4)
    else:
        normal = functional.batch_norm(x, layer.running_mean, layer.running_var, eps=1e-4)
    return functional.relu(normal * (1 + gain)[:, :, None, None] + bias[:, :, None, None])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("upsample", [True, False])
def test_generator_block_equals_the_naive_one(training: bool, upsample: bool) -> None:
    block = GeneratorBlock(8, 6, condition=5, ratio=2, upsample=upsample).train(training)
    fold_plainly(block)
    for module in block.modules():
        if isinstance(module, ConditionalNorm):
            module.running_mean.normal_(generator=seeded(1))
            module.running_var.uniform_(0.5, 2, generator=seeded(2))
    x, condition = torch.randn(3, 8, 4, 4, generator=seeded(3)), torch.randn(3, 5, generator=seeded(4))

    def up(maps: Tensor) -> Tensor:
        return maps.repeat_interleave(2, 2).repeat_interleave(2, 3) if upsample else maps

    def conv(layer: Conv, maps: Tensor) -> Tensor:
        return functional.conv2d(maps, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    hidden = conv(block.conv1, naive_norm(block.norm1, x, condition))
    hidden = conv(block.conv2, up(naive_norm(block.norm2, hidden, condition)))
    hidden = conv(block.conv3, naive_norm(block.norm3, hidden, condition))
    hidden = conv(block.conv4, naive_norm(block.norm4, hidden, condition))
    expected = hidden + conv(block.shortcut, up(x))
    torch.testing.assert_close(block(x, condition), expected, atol=1e-5, rtol=1e-5)


def test_discriminator_block_equals_the_naive_one() -> None:
    block = DiscriminatorBlock(4, 6, ratio=2, downsample=True)
    fold_plainly(block)
    x = torch.randn(2, 4, 8, 8, generator=seeded())
    kept = x.clone()
    hidden = functional.conv2d(x.relu(), block.conv1.weight, block.conv1.bias)
    hidden = functional.conv2d(hidden.relu(), block.conv2.weight, block.conv2.bias, padding=1)
    hidden = functional.conv2d(hidden.relu(), block.conv3.weight, block.conv3.bias, padding=1)
    hidden = functional.conv2d(functional.avg_pool2d(hidden, 2).relu(), block.conv4.weight, block.conv4.bias)
    assert block.shortcut is not None
    skip = functional.avg_pool2d(functional.conv2d(x, block.shortcut.weight, block.shortcut.bias), 2)
    torch.testing.assert_close(block(x), hidden + skip, atol=1e-5, rtol=1e-5)
    assert torch.equal(x, kept), "the input must survive: the shortcut and the attention read it too"


def test_standing_statistics_are_the_mean_over_batches() -> None:
    config = generator_config(architecture="tiny16")
    generator = Generator(config, 3, 1).eval()
    latents = [torch.randn(8, config.latent_dim, generator=seeded(k)) for k in range(3)]
    labels = [torch.randint(3, (8,), generator=seeded(k)) for k in range(3)]
    first = generator.blocks[0].norm1  # its input depends on no other norm
    seen: list[Tensor] = []
    handle = first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    generator.estimate_statistics(latents, labels)
    handle.remove()
    torch.testing.assert_close(first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert not generator.training
