"""Checkpoint files, standing statistics and draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_models import generator_config, seeded
from torch import Tensor

from kr_ray.config import BigGanConfig
from kr_ray.data.images import class_prior
from kr_ray.generators.biggan.networks import Generator, to_uint8
from kr_ray.generators.biggan.sampling import BigGanSampler
from kr_ray.generators.checkpoints import image_grid
from kr_ray.generators.interface import Checkpoint, save_checkpoint
from kr_ray.runs.artifacts import ArtifactError

CPU = torch.device("cpu")
PRIOR = class_prior(torch.tensor([0, 0, 1, 2]), 3)


def config() -> BigGanConfig:
    return generator_config(architecture="tiny16", attention_resolution=8)


def trained() -> Generator:
    generator = Generator(config(), 3, 1)
    generator.initialise(seeded(11))
    return generator


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint = Checkpoint(
        5, trained().folded_weights(), images_seen=1234, figures={"loss_d": 1.3, "loss_g": 0.8}
    )
    save_checkpoint(tmp_path / "epoch_0005.safetensors", checkpoint, config(), num_classes=3, channels=1)
    return tmp_path / "epoch_0005.safetensors"


def loaded(
    path: Path,
    latent_std: float = 1.0,
    seed: int = 0,
    batches: int = 4,
    prior: Tensor = PRIOR,
    device: torch.device = CPU,
) -> BigGanSampler:
    return BigGanSampler.load(
        path, device, latent_std=latent_std, prior=prior, seed=seed, batch_size=16, standing_batches=batches
    )


def test_the_file_is_plain_and_alone(path: Path) -> None:
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        assert "latent_dim" in file.metadata()["json"]
        assert "linear.weight" in file.keys()  # noqa: SIM118


def test_a_missing_file_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        loaded(tmp_path / "none.safetensors")


def test_images_are_those_of_the_saved_generator(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kr_ray.compute.devices.mixed_dtype", lambda device: None
    )  # exact comparison needs float32
    sampler = loaded(path, latent_std=2.0, batches=3)
    labels = torch.arange(20) % 3
    images = sampler.images(labels, seeded(1))
    assert images.dtype == torch.uint8
    assert images.shape == (20, 1, 16, 16)
    reference = trained().eval()
    random = seeded(9)
    batches = [torch.randn(64, 16, generator=random) * 2 for _ in range(30)]
    classes = [torch.multinomial(PRIOR, 64, replacement=True, generator=random) for _ in range(30)]
    reference.estimate_statistics(batches, classes)
    with torch.no_grad():
        expected = to_uint8(reference(torch.randn(20, 16, generator=seeded(1)) * 2, labels), "sigmoid")
    # The statistics come from other draws, so equal up to their sampling error.
    assert (images.int() - expected.int()).abs().float().mean() < 8


def test_equal_seeds_give_equal_images(path: Path) -> None:
    labels = torch.arange(33) % 3
    one, two, other = (loaded(path, seed=0).images(labels, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    loaded(path, 2.5)
    assert torch.equal(loaded(path).images(labels, seeded(1)), one), (
        "statistics must not remember the std before"
    )


def test_statistics_follow_the_latent_std(path: Path) -> None:
    near, far = loaded(path, 1.0)._generator, loaded(path, 2.5)._generator
    assert far.blocks[0].norm1.running_var.mean() > 2 * near.blocks[0].norm1.running_var.mean()


def test_wrong_std_and_prior_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="`latent_std > 0` must hold"):
        loaded(path, latent_std=-1.0)
    with pytest.raises(ValueError, match="one entry per class"):
        loaded(path, prior=PRIOR[:2])


def test_grid_places_images_row_by_row() -> None:
    images = torch.arange(1, 5, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    grid = image_grid(images, columns=2)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 7, 7)
    assert grid[0, 1::3, 1::3].tolist()[:2] == [[1, 2], [3, 4]] or grid[0, [1, 4]][:, [1, 4]].tolist() == [
        [1, 2],
        [3, 4],
    ]


@pytest.mark.gpu
def test_sampler_on_a_gpu(path: Path) -> None:
    assert loaded(path, device=torch.device("cuda")).images(torch.arange(3), seeded()).device.type == "cuda"
