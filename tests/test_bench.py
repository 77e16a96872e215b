"""The benchmark: turns and medians by a clock of our own, equal work on
both sides of a comparison, the document's shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from kr_ray import cli
from kr_ray.bench import run as bench_run
from kr_ray.bench.captured import graphs_and_compilation
from kr_ray.bench.document import TimingRow
from kr_ray.bench.harness import DeviceRates, Figure, Meter, Variant, device_rates, measure, ratio, throughput
from kr_ray.bench.materials import CHANNELS, NUM_CLASSES, PLAIN, Bench, gan_config, random_images, recipe
from kr_ray.bench.plain_gan import PlainConditionalNorm, PlainDiscriminator, PlainGanSteps, PlainGenerator
from kr_ray.bench.plain_loops import PlainClassifierSteps
from kr_ray.bench.sizes import CPU, GPU, Sizes
from kr_ray.bench.table import markdown_table
from kr_ray.bench.training import ProductSteps
from kr_ray.classifiers.networks import new_classifier
from kr_ray.generators.biggan.networks import Attention, Discriminator, Generator
from kr_ray.generators.biggan.spectral_norm import ConditionalNorm, SpectralLayer
from kr_ray.generators.biggan.training import discriminator_loss, generator_loss

DEVICE = torch.device("cpu")
TINY = Sizes(
    image_size=16,
    architecture="tiny16",
    gan_channels=4,
    gan_batch=8,
    augmented_images=32,
    loader_images=32,
    steps=((4, 16, 2),),
    optimised=(4, 4),
    generated_images=16,
    generation_batch=16,
    student_images=32,
    student_epochs=2,
    regeneration_rate=1,
    sweep_width=4,
    sweep_images=64,
    sweep_epochs=2,
    attack_classes=2,
    attack_rows=200,
    audit_runs=8,
    audit_canaries=10,
    audit_queries=2,
    matrix_side=64,
    copied_bytes=2**16,
)
FIGURE_KEYS = {"name", "value", "low", "high", "rounds", "unit", "rule", "target", "passed"}
TIMING_KEYS = {
    "name", "median_s", "low_s", "high_s", "rounds", "images_per_s", "flops", "matrix_share", "copy_share",
    "peak_bytes",
}  # fmt: skip


# --- harness ------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that only work moves on, and who did it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[str] = []

    def worker(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes `seconds` in turn; the first is the warm-up's."""
        left = list(seconds)

        def work() -> None:
            self.turns.append(name)
            self.now += left.pop(0)

        return work


def test_variants_take_turns_in_flipped_order() -> None:
    time = FakeTime()
    variants = [Variant(name, time.worker(name, 9, 1, 1, 1)) for name in "abc"]
    measure(variants, 3, Meter(DEVICE, lambda: time.now))
    assert "".join(time.turns) == "abc" + "abc" + "cba" + "abc"


def test_ratio_is_the_median_of_the_rounds_ratios_and_leaves_the_warm_up_out() -> None:
    time = FakeTime()
    variants = [
        Variant("slow", time.worker("slow", 99, 4, 6, 30), 12),
        Variant("fast", time.worker("fast", 99, 2, 2, 3), 12),
    ]
    slow, fast = measure(variants, 3, Meter(DEVICE, lambda: time.now)).values()
    assert slow.seconds == (4, 6, 30)
    assert slow.median_s == 6
    found = ratio("r", [slow], [fast], "at least", 3)
    assert (found.values, found.value, found.passed) == ((2, 3, 10), 3, True)
    assert ratio("sum", [slow], [fast, fast]).value == 1.5
    assert throughput("images", fast).values == (6, 6, 4)


def test_work_in_other_processes_states_its_own_seconds() -> None:
    time = FakeTime()
    (timing,) = measure(
        [Variant("x", lambda: 0.25, times_itself=True)], 2, Meter(DEVICE, lambda: time.now)
    ).values()
    assert timing.seconds == (0.25, 0.25)


@pytest.mark.parametrize(
    ("rule", "target", "passed"),
    [
        ("at most", 2.0, True),
        ("at most", 1.9, False),
        ("at least", 2.0, True),
        ("at least", 2.1, False),
        ("at most", None, None),
    ],
)
def test_verdict(rule: Any, target: float | None, passed: bool | None) -> None:
    assert Figure("f", (1.0, 2.0, 9.0), "x", rule, target).passed is passed


def test_shares_of_the_devices_rates() -> None:
    left, right = torch.zeros(8, 4), torch.zeros(4, 2)
    time = FakeTime()

    def multiply() -> None:
        torch.mm(left, right)
        time.now += 0.5

    (timing,) = measure(
        [Variant("mm", multiply, 10, bytes_moved=6)], 2, Meter(DEVICE, lambda: time.now)
    ).values()
    assert timing.flops == 2 * 8 * 4 * 2
    row = TimingRow.of(timing, DeviceRates("float32", matrix_flops=1024.0, copy_bytes=24.0))
    assert row.matrix_share == pytest.approx(0.25)
    assert row.copy_share == pytest.approx(0.5)
    assert row.images_per_s == pytest.approx(20)


# --- both sides compute the same ----------------------------------------------------------------------------


def plain_gradients(name: str, layer: nn.Module) -> list[Tensor]:
    """Of the plain counterpart of a product's layer, in the order of its parameters."""
    parts = [layer.gain, layer.bias] if isinstance(layer, PlainConditionalNorm) else [layer]
    weights = torch.cat([part.parametrizations.weight.original.grad for part in parts])  # type: ignore[union-attr]
    bias = getattr(layer, "bias", None)
    return [weights, bias.grad] if isinstance(bias, Tensor) else [weights]


def test_plain_networks_have_the_products_outputs_and_gradients() -> None:
    config = gan_config(CPU, channels=8)
    generator, discriminator = (
        Generator(config, NUM_CLASSES, CHANNELS),
        Discriminator(config, NUM_CLASSES, CHANNELS),
    )
    with torch.no_grad():  # gains of attention start at 0 and would hide it; embeddings and biases likewise
        for network in (generator, discriminator):
            for module in network.modules():
                if isinstance(module, Attention):
                    module.gain.fill_(0.5)
            for _ in range(2):
                network.refresh_spectral_norm()
    plain_g, plain_d = PlainGenerator(generator), PlainDiscriminator(discriminator)
    for module in [*plain_g.modules(), *plain_d.modules()]:
        if isinstance(module, _SpectralNorm):
            module.eval()  # no power iteration: the product does one per update, torch one per forward pass
    for mine, theirs in ((generator, plain_g), (discriminator, plain_d)):
        assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(8)
    latents, real = (
        torch.randn(8, config.latent_dim, generator=random),
        torch.rand(8, CHANNELS, 32, 32, generator=random),
    )
    for network in (generator, discriminator):
        network.refresh_spectral_norm(iterate=False)
    outputs = []
    for g, d in ((generator, discriminator), (plain_g, plain_d)):
        fake = g(latents, labels)
        on_real, on_fake = d(real, labels), d(fake, labels)
        (discriminator_loss(on_real, on_fake, config) + generator_loss(on_fake, config)).backward()
        outputs.append((fake, on_real, on_fake))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    compared = 0
    for mine, theirs in ((generator, plain_g), (discriminator, plain_d)):
        for name, layer in mine.named_modules():
            if isinstance(layer, SpectralLayer):
                expected = plain_gradients(name, theirs.get_submodule(name))
                found = [p.grad for p in layer.parameters()]
                torch.testing.assert_close(
                    found, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
                )
                assert any(gradient.abs().max() > 1e-4 for gradient in expected), name
                compared += 1
    assert compared > 50
    assert any(isinstance(module, ConditionalNorm) for module in generator.modules())


def test_plain_classifier_starts_with_the_products_loss() -> None:
    keys = recipe(width=4, batch_size=32, precision="full", **PLAIN)
    images = random_images(32, 16, DEVICE)
    plain = PlainClassifierSteps(new_classifier(NUM_CLASSES, CHANNELS, keys, seed=0), images, keys)
    assert plain.run() == pytest.approx(ProductSteps(images, keys).run(), abs=1e-5)


def test_plain_gan_takes_its_steps() -> None:
    config = gan_config(TINY, d_steps=2)
    generator, discriminator = (
        Generator(config, NUM_CLASSES, CHANNELS),
        Discriminator(config, NUM_CLASSES, CHANNELS),
    )
    plain = PlainGanSteps(generator, discriminator, random_images(32, 16, DEVICE), config)
    before = {name: value.clone() for name, value in plain.average.items()}
    plain.run()
    steps = [
        next(iter(optimizer.state.values()))["step"].item()
        for optimizer in (plain.optimizer_d, plain.optimizer_g)
    ]
    assert steps == [4, 2]
    assert any(not torch.equal(before[name], value) for name, value in plain.average.items())


def test_every_way_of_calling_is_measured_on_equal_work(tmp_path: Path) -> None:
    """On a CPU the three ways are one, so that the ratios are near 1; what they
    give on a GPU is tested there (test_graphs.py)."""
    meter = Meter(DEVICE)
    rates = device_rates(meter, torch.float32, matrix_side=32, copied_bytes=1024)
    found = graphs_and_compilation(Bench(meter, TINY, 1, rates, tmp_path, 1))
    assert {timing.flops for timing in found.timings[:3]} == {found.timings[0].flops} != {0}
    assert len(found.figures) == 2 * (3 + 3 + 2)


# --- suites and document ------------------------------------------------------------------------------------

IN_PROCESS = [suite.name for suite in bench_run.SUITES if not suite.needs_ray and not suite.needs_gpu]


def check_document(document: dict[str, Any], names: list[str]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert set(document) == {"date", "seconds", "rounds", "environment", "rates", "suites"}
    assert {"processor", "cores", "threads", "versions", "device"} <= set(document["environment"])
    assert list(document["suites"]) == names
    for suite in document["suites"].values():
        assert set(suite) == {"seconds", "skipped", "figures", "timings", "notes"}
        assert suite["skipped"] is None
        assert any(figure["target"] is not None for figure in suite["figures"])
        for figure in suite["figures"]:
            assert set(figure) == FIGURE_KEYS
            assert 0 < figure["low"] <= figure["value"] <= figure["high"]
            assert figure["passed"] in ((None,) if figure["target"] is None else (True, False))
        for timing in suite["timings"]:
            assert set(timing) == TIMING_KEYS
            assert 0 < timing["low_s"] <= timing["median_s"] <= timing["high_s"]


def test_every_suite_of_this_process_gives_its_document() -> None:
    document = bench_run.run_bench(IN_PROCESS, 2, DEVICE, 1, TINY)
    check_document(asdict(document), IN_PROCESS)
    table = markdown_table(document)
    for suite in document.suites.values():
        for figure in suite.figures:
            assert f"| {figure.name} |" in table


@pytest.mark.slow
def test_students_side_by_side_through_ray() -> None:
    document = bench_run.run_bench(["sweep"], 1, DEVICE, 1, TINY)
    check_document(asdict(document), ["sweep"])
    assert len(document.suites["sweep"].timings) == 6


def test_what_cannot_run_here_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run.importlib.util, "find_spec", lambda name: None)
    suites = bench_run.run_bench(["sweep", "graphs"], 1, DEVICE, 1, TINY).suites
    assert suites["sweep"].skipped == "skipped: Ray is not installed"
    assert suites["graphs"].skipped.startswith("skipped: for GPUs only")


def test_a_failing_suite_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left\nlong explanation")

    suites = (bench_run.Suite("broken", fail), bench_run.SUITES[0])
    monkeypatch.setattr(bench_run, "SUITES", suites)
    document = bench_run.run_bench([], 1, DEVICE, 1, TINY)
    assert document.suites["broken"].skipped == "failed: OutOfMemoryError: no memory left"
    assert document.suites["augmentation"].skipped is None
    assert "| broken | failed: OutOfMemoryError: no memory left |" in markdown_table(document)


def test_a_gpu_gets_larger_work_of_the_same_kind() -> None:
    assert GPU.gan_channels == 128
    assert (64, 256) in [step[:2] for step in GPU.steps]
    assert all(
        batch * steps == images for images, (_, batch, steps) in zip((25_600, 25_600), GPU.steps, strict=True)
    )


def test_command_writes_json_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_run, "CPU", TINY)
    out, table = tmp_path / "deep" / "bench.json", tmp_path / "bench.md"
    arguments = [
        "bench",
        "--suite",
        "optimiser",
        "--rounds",
        "2",
        "--out",
        str(out),
        "--markdown",
        str(table),
    ]
    assert cli.main(arguments) == 0
    check_document(json.loads(out.read_text()), ["optimiser"])
    assert "optimiser, clip and average" in table.read_text()
    assert "at most 0.5x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "`--suite` must be one of augmentation"),
        (["--rounds", "0"], "`--rounds >= 1` must hold"),
    ],
)
def test_command_refuses_what_it_does_not_know(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
