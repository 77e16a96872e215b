"""Upper against lower bounds: what the ledger promises, attacked; and a mechanism whose noise is off is
caught."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kr_ray.classifiers.networks import new_classifier
from kr_ray.config import ClassifierConfig, DpMerfConfig
from kr_ray.config.dp import DpSgdSection
from kr_ray.data.images import LabelledImages
from kr_ray.dp.noise import NoiseKey, insecure_key
from kr_ray.generators.dp_merf.features import RandomFeatures, release_embedding
from kr_ray.generators.dp_merf.training import plan_dp_merf
from kr_ray.methods.dp_sgd import DpSgdTraining, plan_dp_sgd
from kr_ray.privacy.accountants import epsilon_of, gaussian, poisson_gaussian
from kr_ray.privacy.epsilon import epsilon_bounds
from kr_ray.privacy.ledger import guarantee

pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:grad and param")
DELTA = 1e-5
AUDITS = 1000
ALLOWED = 50 + 3 * math.sqrt(AUDITS * 0.05 * 0.95)
"""5 % of the audits and three standard deviations of that count."""


def attacked(
    random: np.random.Generator, noise_multiplier: float, noise: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Samples [1, 400], each a Gaussian mechanism of its own: the best attack's scores, which are its
    outputs, and membership."""
    member = random.random((1, 400)) < 0.5
    return member + noise * noise_multiplier * random.normal(size=member.shape), member


@pytest.mark.parametrize("noise_multiplier", [4.0, 1.0])
def test_audits_of_a_thousand_gaussian_mechanisms_keep_below_the_guarantee(noise_multiplier: float) -> None:
    random = np.random.default_rng(0)
    promised = guarantee({"release": gaussian(noise_multiplier)}, 5000, DELTA)
    above, best = {"clopper_pearson": 0, "one_run": 0}, 0.0
    for audit in range(AUDITS):
        found = epsilon_bounds(*attacked(random, noise_multiplier), seed=audit, delta=DELTA)
        for name in above:
            above[name] += promised.contradicted_by(getattr(found, name))
        best = max(best, found.clopper_pearson)
    assert max(above.values()) <= ALLOWED
    assert best > 0.2 * promised.epsilon, "audits that never find anything prove nothing"


def test_a_gaussian_mechanism_without_its_noise_contradicts_its_guarantee_every_time() -> None:
    random = np.random.default_rng(0)
    promised = guarantee({"release": gaussian(3.0)}, 5000, DELTA)
    for audit in range(20):
        found = epsilon_bounds(*attacked(random, 3.0, noise=False), seed=audit, delta=DELTA)
        assert promised.contradicted_by(found.clopper_pearson) and promised.contradicted_by(found.one_run)


class NoNoise(NoiseKey):
    """A broken mechanism: the ledger believes in noise that is not there."""

    def gaussian(self, shape: tuple[int, ...] | torch.Size, *context: str | int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)


def step_scores(noise: bool, runs: int) -> tuple[np.ndarray, np.ndarray, float]:
    """One step of DP-SGD on 8 images, with or without the first, `runs` times with fresh noise; scored by the
    likelihood ratio.

    Everything is known to the attacker but the first image's presence, as differential privacy supposes: the
    score is the step's projection on what that image adds, in units of the bound. Returns scores, membership
    and the promised epsilon.
    """
    recipe = ClassifierConfig(
        width=4, norm="group", precision="full", crop_padding=0, horizontal_flip=False, warmup_epochs=0
    )
    section = DpSgdSection(
        noise_multiplier=3.0, epochs=1, expected_batch_size=8, max_grad_norm=0.1, delta=1e-5
    )
    images = torch.randint(
        0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    plan = plan_dp_sgd(section, recipe, 8)
    assert plan.steps == 1 and plan.sampling_probability == 1
    model = new_classifier(2, 1, recipe, 0)
    real = LabelledImages(images, torch.arange(8) % 2)
    training = DpSgdTraining(model, real, recipe, section, plan, insecure_key("0"), 0, torch.device("cpu"))
    start = torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()])
    pixels, targets = training._pieces()[0]

    def step(key: NoiseKey, present: bool) -> Tensor:
        torch.nn.utils.vector_to_parameters(start.clone(), training.model.parameters())
        training.key, training.step = key, 0
        first = 0 if present else 1
        training._pieces = lambda: [(pixels[first:], targets[first:])]  # type: ignore[method-assign]
        training.train_until(1)
        return torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()]) - start

    quiet = NoNoise(b"")
    adds = step(quiet, True) - step(quiet, False)
    member = np.random.default_rng(0).random(runs) < 0.5
    keys = (insecure_key(str(run)) if noise else quiet for run in range(runs))
    unit = training.schedule.rate(0) * section.max_grad_norm / section.expected_batch_size
    assert adds.norm() == pytest.approx(unit, rel=1e-3), "the first image's gradient is clipped"
    scores = [
        float(step(key, bool(present)) @ adds) / unit**2 for key, present in zip(keys, member, strict=True)
    ]
    return np.array([scores]), member[None], epsilon_of([plan.event], DELTA)[0]


def test_a_private_step_keeps_its_guarantee_and_one_without_noise_is_caught() -> None:
    scores, member, promised = step_scores(noise=True, runs=240)
    found = epsilon_bounds(scores, member, seed=0, delta=DELTA)
    assert found.clopper_pearson <= promised and found.one_run <= promised
    # The noise along what an image adds is 3 times what it adds: the multiplier that is accounted for.
    assert scores[member].std() == pytest.approx(3, rel=0.25) and scores[~member].std() == pytest.approx(
        3, rel=0.25
    )
    scores, member, promised = step_scores(noise=False, runs=120)
    found = epsilon_bounds(scores, member, seed=0, delta=DELTA)
    assert found.clopper_pearson > promised and promised == pytest.approx(1.27, abs=0.05)


def merf_scores(noise_multiplier: float, noise: bool, runs: int) -> tuple[np.ndarray, np.ndarray, float]:
    """DP-MERF's release of 8 images of a class, with or without the first, `runs` times with fresh noise.

    The attacker knows the other images and the frequencies, and sees what the generator sees: the noisy mean
    features, whose divisor is itself noisy. It cancels in the ratio of two projections, on what the first
    image adds beside the others and on the others. Returns scores, membership and the promised epsilon.
    """
    keys = {"random_features": 400, "kernel_variance": 0.5, "delta": 1e-5}
    section = DpMerfConfig.model_validate(keys | {"noise_multiplier": noise_multiplier})
    pixels = torch.randint(
        0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    real = LabelledImages(pixels, torch.zeros(8, dtype=torch.int64))
    features = RandomFeatures.draw(64, section, 0)
    own = features(pixels.float() / 255).double()
    others = own[1:].sum(0)
    along = others / others.norm()
    adds = own[0] - (own[0] @ along) * along
    member = np.random.default_rng(0).random(runs) < 0.5
    scores = []
    for run, present in enumerate(member):
        key = insecure_key(str(run)) if noise else NoNoise(b"")
        shown = real if present else real.subset(torch.arange(1, 8))
        seen = release_embedding(shown, 1, features, noise_multiplier, section.prior_share, key).means[:, 0]
        scores.append(float(seen.double() @ adds) / float(seen.double() @ along))
    return np.array([scores]), member[None], epsilon_of([plan_dp_merf(section, 8)[1]], DELTA)[0]


def test_a_released_embedding_keeps_its_guarantee_and_one_without_noise_is_caught() -> None:
    scores, member, promised = merf_scores(0.7, noise=True, runs=400)
    found = epsilon_bounds(scores, member, seed=0, delta=DELTA)
    assert 0.5 < found.clopper_pearson <= promised and found.one_run <= promised
    scores, member, promised = merf_scores(2.0, noise=False, runs=400)
    found = epsilon_bounds(scores, member, seed=0, delta=DELTA)
    assert found.clopper_pearson > promised == pytest.approx(1.99, abs=0.05)


def test_subsampled_steps_are_more_private_than_whole_ones_and_audits_agree() -> None:
    """10 steps at q = 0.1: the sum of what a member adds in the steps it is sampled for; audits keep below
    the (smaller) bound."""
    random, promised = np.random.default_rng(0), epsilon_of([poisson_gaussian(0.1, 1.0, 10)], DELTA)[0]
    assert promised < epsilon_of([gaussian(1.0, 10)], DELTA)[0]
    above = 0
    for audit in range(300):
        member = random.random((1, 400)) < 0.5
        sampled = random.binomial(10, 0.1, size=member.shape)
        scores = member * sampled + math.sqrt(10) * random.normal(size=member.shape)
        found = epsilon_bounds(scores, member, seed=audit, delta=DELTA).clopper_pearson
        above += found > promised
    assert above <= 15 + 3 * math.sqrt(300 * 0.05 * 0.95)
