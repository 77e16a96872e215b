"""EDM's equations and solvers against the paper, a closed form, and diffusers.

For Gaussian images of std s0 the best denoiser is D(x; sigma) = s0^2 / (s0^2 + sigma^2) x, and the ODE takes
x at sigma_max to x s0 / sqrt(s0^2 + sigma_max^2) (Karras et al. 2022, equation 4; one integration).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kr_ray.config import EdmSampling
from kr_ray.generators.edm import preconditioning
from kr_ray.generators.edm.preconditioning import coefficients, denoise, from_uint8, pixel_std, to_uint8
from kr_ray.generators.edm.solvers import noise_levels, solve

SIGMA_DATA = 0.64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_network(images: Tensor, c_noise: Tensor, classes: Tensor) -> Tensor:
    """Smooth, not linear, and different for each noise level and class."""
    return torch.sin(2 * images + c_noise[:, None, None, None]) + 0.1 * classes[:, None, None, None]


# --- preconditioning and loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.64, 3.0, 80.0])
def test_coefficients_are_those_of_table_1(sigma: float) -> None:
    found = coefficients(torch.tensor(sigma, dtype=torch.float64), SIGMA_DATA)
    assert found.skip.item() == pytest.approx(SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2))
    assert found.out.item() == pytest.approx(sigma * SIGMA_DATA / math.sqrt(SIGMA_DATA**2 + sigma**2))
    assert found.into.item() == pytest.approx(1 / math.sqrt(sigma**2 + SIGMA_DATA**2))
    assert found.noise.item() == pytest.approx(math.log(sigma) / 4)


def test_the_loss_is_equation_2_with_the_weight_of_table_1() -> None:
    images, noise = normal(5, 3, 8, 8).tanh(), normal(5, 3, 8, 8, seed=1)
    sigma = torch.tensor([0.003, 0.2, 0.9, 4.0, 60.0], dtype=torch.float64)
    classes = torch.arange(5)
    expected = 0.0
    for image, own, level, label in zip(images, noise, sigma, classes, strict=True):
        noisy = image + level * own
        into = 1 / (level**2 + SIGMA_DATA**2).sqrt()
        answer = some_network((into * noisy)[None], level.log()[None] / 4, label[None])[0]
        skip = SIGMA_DATA**2 / (level**2 + SIGMA_DATA**2)
        out = level * SIGMA_DATA / (level**2 + SIGMA_DATA**2).sqrt()
        weight = (level**2 + SIGMA_DATA**2) / (level * SIGMA_DATA) ** 2
        expected += (weight * (skip * noisy + out * answer - image).square().mean()).item() / 5
    found = preconditioning.loss(some_network, images, noise, sigma, classes, SIGMA_DATA)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("data_std", [0.2, SIGMA_DATA, 1.5])
@pytest.mark.parametrize("sigma", [0.05, 0.64, 10.0])
def test_on_gaussian_images_the_best_network_gives_the_closed_form_and_the_least_loss(
    data_std: float, sigma: float
) -> None:
    """Its loss is lambda times the variance s0^2 sigma^2 / (s0^2 + sigma^2): 1 where s0 = sigma_data."""
    level = torch.full((40_000,), sigma, dtype=torch.float64)
    skip, out, into, _ = coefficients(level[0], SIGMA_DATA)
    slope = (data_std**2 / (data_std**2 + sigma**2) - skip) / (out * into)
    images, noise = data_std * normal(40_000, 1, 1, 1), normal(40_000, 1, 1, 1, seed=1)
    classes = torch.zeros(40_000, dtype=torch.int64)

    def loss_at(factor: float) -> float:
        def network(x: Tensor, c_noise: Tensor, classes: Tensor) -> Tensor:
            return (slope + factor) * x

        return preconditioning.loss(network, images, noise, level, classes, SIGMA_DATA).item()

    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    least = weight * data_std**2 * sigma**2 / (data_std**2 + sigma**2)
    assert loss_at(0.0) == pytest.approx(least, rel=0.03)  # 4 standard errors of a mean of squares
    assert loss_at(0.0) < min(loss_at(-0.2), loss_at(0.2))
    if data_std == SIGMA_DATA:
        assert least == pytest.approx(1) and abs(slope) < 1e-12
    noisy = images + sigma * noise
    denoised = denoise(lambda x, c_noise, classes: slope * x, noisy, level, classes, SIGMA_DATA)
    torch.testing.assert_close(denoised, data_std**2 / (data_std**2 + sigma**2) * noisy, rtol=1e-5, atol=1e-5)


def test_a_half_precision_answer_is_taken_to_float32() -> None:
    images = normal(4, 1, 4, 4).float()
    sigma = torch.full((4,), 80.0)

    def network(x: Tensor, c_noise: Tensor, classes: Tensor) -> Tensor:
        assert x.dtype == c_noise.dtype == torch.float32
        return torch.zeros_like(x, dtype=torch.bfloat16)

    classes = torch.zeros(4, dtype=torch.int64)
    assert preconditioning.loss(network, images, images, sigma, classes, SIGMA_DATA).dtype == torch.float32
    assert denoise(network, images, sigma, classes, SIGMA_DATA).dtype == torch.float32


def test_training_noise_is_log_normal() -> None:
    logs = preconditioning.noise_levels(normal(100_000), -1.2, 1.2).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert logs.std().item() == pytest.approx(1.2, abs=0.02)


def test_pixels_survive_the_round_trip_and_their_std_is_numpys() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(pixels)), pixels)
    assert torch.equal(to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))
    skewed = (pixels.float() ** 2 / 256).to(torch.uint8)
    assert pixel_std(skewed) == pytest.approx(from_uint8(skewed).numpy().astype("float64").std(), rel=1e-6)
    assert pixel_std(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)) == 0.01


# --- solvers ------------------------------------------------------------------------------------------------


def gaussian_error(solver: str, steps: int, data_std: float = SIGMA_DATA) -> float:
    """Relative distance of the end point to the closed form's."""
    sampling = EdmSampling.model_validate({"solver": solver, "steps": steps})
    factor = data_std / math.sqrt(data_std**2 + sampling.sigma_max**2)

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        return data_std**2 / (data_std**2 + sigma**2) * x

    start = sampling.sigma_max * normal(64)
    end = solve(denoiser, start, sampling)
    return ((end - factor * start).norm() / (factor * start).norm()).item()


@pytest.mark.parametrize(
    ("solver", "at_32", "fold"), [("dpmpp_2m", 0.008, 4.7), ("heun", 0.008, 4.6), ("euler", 0.1, 2.0)]
)
def test_solvers_reach_the_gaussians_end_point_with_their_order(
    solver: str, at_32: float, fold: float
) -> None:
    """Twice the steps: at most a quarter of a second-order solver's error, half of a first-order one's."""
    coarse, fine = gaussian_error(solver, 16), gaussian_error(solver, 32)
    assert fine < at_32
    assert coarse / fine == pytest.approx(fold, abs=0.1)


def test_few_steps_keep_the_spread_that_was_computed_for_them() -> None:
    """Sampled over true std at 6 steps from sigma 20 to 0.01, computed apart: 1.10 at 0.64, 0.75 at 0.05."""
    assert gaussian_error("dpmpp_2m", 6) == pytest.approx(0.10, abs=0.01)
    assert gaussian_error("dpmpp_2m", 6, data_std=0.05) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "euler"])
@pytest.mark.parametrize("churn", [0.0, 8.0])
def test_samples_have_the_gaussians_std_with_and_without_churn(solver: str, churn: float) -> None:
    sampling = EdmSampling.model_validate({"solver": solver, "steps": 64, "churn": churn})

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        return SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2) * x

    count = 20_000
    fresh = normal(64, count, seed=1) if churn else None
    samples = solve(denoiser, sampling.sigma_max * normal(count), sampling, fresh)
    assert samples.mean().item() == pytest.approx(0, abs=0.02)
    # Euler under-disperses. Where 2M extrapolates over churned steps, its error is of first order, too.
    second_order = solver == "heun" or (solver == "dpmpp_2m" and not churn)
    assert samples.std().item() == pytest.approx(SIGMA_DATA, rel=0.02 if second_order else 0.08)


def test_churn_forgets_the_start() -> None:
    def end(churn: float) -> Tensor:
        sampling = EdmSampling(steps=16, churn=churn)
        fresh = normal(16, 2000, seed=1) if churn else None
        start = sampling.sigma_max * normal(2000)
        return solve(lambda x, sigma: SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2) * x, start, sampling, fresh)

    def correlation(churn: float) -> float:
        return torch.corrcoef(torch.stack([normal(2000), end(churn)]))[0, 1].item()

    assert correlation(0.0) == pytest.approx(1) and correlation(1.0) > correlation(16.0)
    with pytest.raises(ValueError, match=r"churn=2.0, fresh=nothing; draw \[steps, N, C, S, S\]"):
        solve(lambda x, sigma: x, normal(1), EdmSampling(churn=2.0))
    with pytest.raises(ValueError, match=r"exactly when churn > 0, but got churn=0.0, fresh=\(6, 1\)"):
        solve(lambda x, sigma: x, normal(1), EdmSampling(), normal(6, 1))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 0.0, 1.3])
def test_evaluations_count_what_the_network_is_asked(solver: str, guidance: float) -> None:
    sampling = EdmSampling.model_validate({"solver": solver, "steps": 5, "guidance": guidance})
    asked = []

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return x

    solve(denoiser, normal(2), sampling)
    assert sampling.evaluations == len(asked) * (2 if guidance == 1.3 else 1)


# --- diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [6, 8, 16])
def test_grid_and_samples_are_those_of_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    sampling = EdmSampling(steps=steps)
    scheduler: Any = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=sampling.sigma_min, sigma_max=sampling.sigma_max, sigma_data=SIGMA_DATA, rho=sampling.rho
    )
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(
        scheduler.sigmas.double(), torch.tensor(noise_levels(sampling)).double(), rtol=1e-6, atol=0
    )

    classes = torch.arange(6) % 3
    start = sampling.sigma_max * normal(6, 1, 8, 8).float()
    theirs = start
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(theirs, time)
        # Its "epsilon" is the raw answer F: the scheduler preconditions by itself.
        answer = some_network(scaled, time.expand(6), classes)
        theirs = scheduler.step(answer, time, theirs).prev_sample

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        return denoise(some_network, x, torch.full((6,), sigma), classes, SIGMA_DATA)

    ours = solve(denoiser, start, sampling)
    assert (ours - theirs).abs().max() < 5e-6 * theirs.std()
