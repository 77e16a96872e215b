"""DP-MERF: features against the kernel, the release against its sensitivity, the training against what was
released."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kr_ray.compute.seeding import derive_seed
from kr_ray.config import ConfigError, DpMerfConfig, SamplingSection
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import SPLITS_FILE, save_splits
from kr_ray.dp.noise import KEY_FILE, insecure_key, noise_key
from kr_ray.generators.checkpoints import train_generator
from kr_ray.generators.dp_merf.features import Embedding, RandomFeatures, release_embedding
from kr_ray.generators.dp_merf.member import DpMerf
from kr_ray.generators.dp_merf.network import MerfGenerator, MerfSampler
from kr_ray.generators.dp_merf.training import MerfTraining, plan_dp_merf
from kr_ray.generators.interface import released_prior
from kr_ray.privacy.accountants import epsilon_of, event_of_record, gaussian
from kr_ray.runs.artifacts import ArtifactError, load_state, load_tensors, save_state, save_tensors
from kr_ray.runs.results import GeneratorResult

SECTION = DpMerfConfig(noise_multiplier=2.0, random_features=200, steps=60, batch_size=20)
SHAPE = (1, 8, 8)
LAST = "checkpoints/epoch_0005.safetensors"


def bars(count: int, seed: int = 0) -> LabelledImages:
    """Two easy classes, 3 to 1: a bright left or a bright upper half, with noise."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, *SHAPE), generator=random, dtype=torch.uint8)
    labels = (torch.arange(count) % 4 == 0).long()
    images[labels == 0, :, :, :4] += 180
    images[labels == 1, :, :4, :] += 180
    return LabelledImages(images, labels)


def features(section: DpMerfConfig = SECTION) -> RandomFeatures:
    return RandomFeatures.draw(64, section, 0)


def stored(run: Path, count: int = 400) -> Path:
    save_splits(run / SPLITS_FILE, Splits("bars", ("left", "top"), bars(count), bars(40, 1), bars(40, 2)))
    return run


def nothing(state: dict[str, Any], row: dict[str, float]) -> None:
    pass


def trained(
    run: Path,
    folder: Path,
    section: DpMerfConfig = SECTION,
    state: dict[str, Any] | None = None,
    save: Any = nothing,
) -> GeneratorResult:
    """As the run's generator is trained: without a teacher, for nobody watches for collapse."""
    found = train_generator(run, folder, DpMerf(section), seed=0, state=state, save=save)
    assert found is not None
    return found


def test_features_have_norm_one_and_the_kernels_products() -> None:
    section = SECTION.model_copy(update={"random_features": 20_000, "kernel_variance": 3.0})
    pixels = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = features(section)(pixels)
    assert torch.allclose(found.norm(dim=1), torch.ones(6), atol=1e-5)
    distances = torch.cdist(pixels.flatten(1), pixels.flatten(1))
    assert torch.allclose(found @ found.T, torch.exp(-(distances**2) / 6.0), atol=0.03)


def test_the_default_kernel_is_the_authors_at_28_pixels_and_scales_with_the_values() -> None:
    many = DpMerfConfig(noise_multiplier=1.0)
    for values, variance in ((784, 127.0), (3 * 32 * 32, 127.0 * 3072 / 784)):
        assert RandomFeatures.draw(values, many, 0).frequencies.var() == pytest.approx(1 / variance, rel=0.01)


def raw(
    images: LabelledImages, key_text: str = "k", section: DpMerfConfig = SECTION
) -> tuple[Tensor, Tensor]:
    """The released sums, undone from the means: [features, K], and counts [K]."""
    key = insecure_key(key_text)
    embedding = release_embedding(
        images, 2, features(section), section.noise_multiplier or 1.0, section.prior_share, key
    )
    exact = torch.bincount(images.labels, minlength=2).double()
    counts = exact + 2.0 * (1 + 1e-5) / math.sqrt(section.prior_share) * key.gaussian((2,), "counts")
    return embedding.means.double() * counts, counts


def test_without_one_image_both_sums_move_by_one_at_most() -> None:
    """Zero-out: equal noise, one image less; the release's sensitivity is that of its noise multiplier."""
    images = bars(60)
    whole, without = raw(images), raw(images.subset(torch.arange(60) != 7))
    assert (whole[0] - without[0]).norm() == pytest.approx(1.0, abs=1e-3)
    assert (whole[1] - without[1]).norm() == pytest.approx(1.0, abs=1e-9)
    other = features()(bars(60).images[7:8].float() / 255)[0]
    assert torch.allclose((whole[0] - without[0])[:, images.labels[7]].float(), other, atol=1e-4)


def test_the_noise_of_features_and_counts_is_together_one_gaussian_of_the_stated_multiplier() -> None:
    """Precisions add: 1/z_f^2 + 1/z_c^2 = 1/z^2, measured on an empty class of many features and over many
    keys."""
    section = SECTION.model_copy(update={"random_features": 20_000})
    images = LabelledImages(torch.zeros(5, *SHAPE, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    found = features(section)
    counts, z_f = [], 0.0
    for number in range(400):
        key = insecure_key(str(number))
        counts.append(key.gaussian((2,), "counts") * 2.0 / math.sqrt(section.prior_share))
    embedding = release_embedding(images, 2, found, 2.0, section.prior_share, insecure_key("0"))
    noisy_count = 5 + counts[0][0] * (1 + 1e-5)
    clean = 5 * found(torch.zeros(1, *SHAPE))[0]
    z_f = float((embedding.means[:, 0].double() * noisy_count - clean).std())
    z_c = float(torch.cat(counts).std())
    assert 1 / z_f**2 + 1 / z_c**2 == pytest.approx(1 / 4, rel=0.03)


def test_counts_swallowed_by_noise_give_a_prior_all_the_same() -> None:
    few = bars(4)
    embedding = release_embedding(few, 2, features(), 1000.0, 0.1, insecure_key("k"))
    assert (
        embedding.prior.sum() == pytest.approx(1.0)
        and (embedding.prior >= 0).all()
        and embedding.means.isfinite().all()
    )
    priors = [
        release_embedding(few, 2, features(), 1e6, 0.1, insecure_key(str(number))).prior
        for number in range(20)
    ]
    assert any(torch.equal(prior, torch.tensor([0.5, 0.5], dtype=torch.float64)) for prior in priors)


def test_the_prior_follows_the_classes_up_to_its_noise() -> None:
    embedding = release_embedding(bars(4000), 2, features(), 3.73, 0.1, insecure_key("k"))
    assert embedding.prior[0] == pytest.approx(0.75, abs=5 * 3.73 / math.sqrt(0.1) / 4000)


def test_the_distance_is_unbiased() -> None:
    """Mean over many batches of images drawn from few = the distance of the exact means, computed
    directly."""
    drawn = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    known = features()(torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(2))).mean(0)
    embedding = Embedding(known[:, None], torch.ones(1, dtype=torch.float64), SHAPE)
    section = SECTION.model_copy(update={"batch_size": 4})
    training = MerfTraining(embedding, features(), section, 0, torch.device("cpu"))
    random = torch.Generator().manual_seed(3)
    losses = [float(training._distance(drawn[torch.randint(5, (4,), generator=random)])) for _ in range(4000)]
    exact = float((features()(drawn).mean(0) - known).square().sum())
    assert sum(losses) / 4000 == pytest.approx(exact, abs=4 * torch.tensor(losses).std().item() / 4000**0.5)


def test_a_generator_fitted_to_two_classes_draws_them(tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"steps": 400, "random_features": 1000, "kernel_variance": 5.0})
    found = trained(stored(tmp_path / "run", 2000), tmp_path / "part", section)
    assert found.checkpoints == [5] and found.collapse == [] and len(found.curve) == 5
    sampler = DpMerf(section).open(tmp_path / "part" / LAST, SamplingSection(), device=torch.device("cpu"))
    labels = torch.arange(40) % 2
    images = sampler.images(labels, torch.Generator().manual_seed(0))
    assert images.dtype == torch.uint8 and images.shape == (40, *SHAPE)
    drawn = images.float()
    left, top = drawn[:, 0, :, :4].mean((1, 2)), drawn[:, 0, :4].mean((1, 2))
    assert ((left < top) == labels.bool()).double().mean() > 0.9
    assert torch.equal(images, sampler.images(labels, torch.Generator().manual_seed(0)))
    assert sampler.images(labels[:0], torch.Generator()).shape == (0, *SHAPE)
    assert found.parameters == {"generator": sum(p.numel() for p in sampler.network.parameters())}


def test_a_training_that_ends_early_passes_through_the_same_states(tmp_path: Path) -> None:
    """`up_to`, of the audit's runs: the rate falls with the share of the whole training."""
    section = SECTION.model_copy(update={"checkpoint_every": 2, "epochs": 4, "insecure_noise_key": "k"})
    run = stored(tmp_path / "run")
    trained(run, tmp_path / "whole", section)
    train_generator(run, tmp_path / "short", DpMerf(section).up_to(2), seed=0, state=None, save=nothing)
    one, other = (
        load_tensors(tmp_path / name / "checkpoints" / "epoch_0002.safetensors")[0]
        for name in ("whole", "short")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "short" / "checkpoints" / "epoch_0004.safetensors").exists()


class Killed(Exception):
    """Ends a training in the place of a kill."""


@pytest.mark.parametrize("kill_at", [1, 3])
def test_a_killed_training_releases_once_and_ends_with_the_same_weights(tmp_path: Path, kill_at: int) -> None:
    """Killed at the first save after the release, or in the middle; afterwards the private images are gone
    and not needed."""
    run, secret = stored(tmp_path / "run"), os.urandom(32)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / KEY_FILE).write_bytes(secret)
    whole = trained(run, tmp_path / "whole")
    folder = tmp_path / "killed"

    def save(state: dict[str, Any], row: dict[str, float]) -> None:
        assert not (folder / KEY_FILE).exists(), "nothing is left to draw noise for"
        if row["epoch"] == kill_at:
            raise Killed
        save_state(folder / "state.pt", state)

    with pytest.raises(Killed):
        trained(run, folder, save=save)
    released = (folder / "release.safetensors").read_bytes()
    changed = Splits("bars", ("left", "top"), bars(400, 9), bars(40, 1), bars(40, 2))
    save_splits(run / SPLITS_FILE, changed)
    again = trained(run, folder, state=load_state(folder / "state.pt"))
    assert (
        (folder / "release.safetensors").read_bytes()
        == released
        == (tmp_path / "whole" / "release.safetensors").read_bytes()
    )
    one, other = (load_tensors(tmp_path / name / LAST)[0] for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.privacy is not None and whole.privacy == again.privacy
    assert event_of_record(whole.privacy.release) == gaussian(2.0)


def test_a_kill_between_key_and_release_replays_the_same_noise(tmp_path: Path) -> None:
    """The key is written first: whoever goes on draws with it."""
    run = stored(tmp_path / "run")
    key = noise_key(tmp_path / "part")
    trained(run, tmp_path / "part")
    exact = release_embedding(bars(400), 2, drawn(), 2.0, 0.1, key)
    kept = Embedding.load(tmp_path / "part" / "release.safetensors")
    assert torch.equal(kept.means, exact.means) and torch.equal(kept.prior, exact.prior)
    assert not any(
        key.secret in path.read_bytes() for path in (tmp_path / "part").rglob("*") if path.is_file()
    )


def drawn() -> RandomFeatures:
    """The features of a run of seed 0."""
    return RandomFeatures.draw(64, SECTION, derive_seed(0, "generator"))


def test_the_result_says_what_was_released_and_not_how_many_images_a_class_has(tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"noise_multiplier": None, "target_epsilon": 2.0, "delta": 1e-5})
    found = trained(stored(tmp_path / "run"), tmp_path / "part", section).privacy
    assert found is not None
    assert epsilon_of([event_of_record(found.release)], 1e-5)[0] == pytest.approx(2.0, rel=2e-3)
    assert found.guarantee.epsilon is not None and found.guarantee.epsilon <= 2.0
    prior = released_prior(tmp_path / "part" / LAST)
    assert prior.tolist() != [0.75, 0.25] and prior.sum() == pytest.approx(1)


def test_a_damaged_release_is_not_made_again(tmp_path: Path) -> None:
    run, part = stored(tmp_path / "run"), tmp_path / "part"
    trained(run, part)
    (part / "release.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"spends the images. privacy again"):
        trained(run, part)
    assert (part / "release.safetensors").read_bytes() == b"damaged"


def test_another_kinds_checkpoint_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"config": {"kind": "edm"}})
    with pytest.raises(ArtifactError, match=r"`kind: dp_merf` must be in the metadata .* says 'edm'"):
        MerfSampler.open(tmp_path / "other.safetensors", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"`synthesis.class_prior: released` needs class frequencies"):
        released_prior(tmp_path / "other.safetensors")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"`image_size` must be a multiple of 4 for dp_merf, but got 30 x 30; use 32"
    ):
        MerfGenerator(2, (1, 30, 30), 5, (16, 8))
    with pytest.raises(ConfigError, match=r"`delta < 1/N` must hold"):
        plan_dp_merf(SECTION.model_copy(update={"delta": 0.01}), 400)
    with pytest.raises(ConfigError, match=r"dp_merf: `target_epsilon` must be reachable"):
        plan_dp_merf(SECTION.model_copy(update={"noise_multiplier": None, "target_epsilon": 1e-7}), 400)
