"""Several workers take the steps of one: batch norm, gradients,
classifier and GAN, and a worker that is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import test_classifier
import torch
import torch.multiprocessing
from conftest import tiny_recipe, tiny_settings
from test_classifier import training as classifier_training
from test_gan import CPU, small_gan, tiny_images
from torch import Tensor

from kr_ray.compute.parallel import (
    BatchNorm2d,
    average,
    check_batch,
    join_norms,
    own_slice,
    worker_count,
    worker_rank,
)
from kr_ray.config import ConfigError, Resources
from kr_ray.config.file import parse_config
from kr_ray.generators.biggan.training import GanTraining
from kr_ray.runs.artifacts import read_json

STEPS = 4


def _worker(rank: int, count: int, folder: str, work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count
    )
    torch.save(work(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def on_workers(count: int, folder: Path, work: Callable[[], Any]) -> list[Any]:
    """What `work` gives in each of `count` processes joined by gloo."""
    torch.multiprocessing.spawn(_worker, (count, str(folder), work), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


# --- batch norm ---------------------------------------------------------------------------------------------


def normalise_batch() -> dict[str, Tensor]:
    """A batch norm's output, running statistics and gradients on a fixed batch of 8."""
    torch.manual_seed(0)
    norm = BatchNorm2d(3)
    join_norms(norm)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = (torch.randn(8, 3, 4, 5) * 3 + 50).requires_grad_()
    part = own_slice(x)
    out = norm(part)
    (out * own_slice(torch.randn(8, 3, 4, 5))).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    count = worker_count()
    return {
        "out": out.detach(),
        "mean": norm.running_mean,
        "var": norm.running_var,
        "x": own_slice(x.grad),
        "weight": average(norm.weight.grad) * count,
    }


@pytest.mark.parametrize("workers", [2, 3])
def test_joint_batch_norm_equals_torchs_on_the_whole_batch(tmp_path: Path, workers: int) -> None:
    whole, parts = normalise_batch(), on_workers(workers, tmp_path, normalise_batch)
    for name in ("out", "x"):
        torch.testing.assert_close(
            torch.cat([part[name] for part in parts]), whole[name], rtol=1e-4, atol=1e-4
        )
    for name in ("mean", "var", "weight"):
        torch.testing.assert_close(parts[0][name], whole[name], rtol=1e-4, atol=1e-4)
        assert all(torch.equal(parts[0][name], part[name]) for part in parts)


# --- the two loops ------------------------------------------------------------------------------------------


def first_classifier_steps() -> list[float]:
    training = classifier_training(tiny_recipe(precision="full", min_steps=0, batch_size=16), epochs=4)
    losses = [training.train_until(step + 1) for step in range(STEPS)]
    weights = torch.cat([value.flatten().double() for value in training.model.state_dict().values()])
    return [*losses, weights.sum().item(), weights.norm().item()]


def first_gan_epochs() -> list[float]:
    training = GanTraining(tiny_images(), 2, small_gan(precision="full", horizontal_flip=True), 7, CPU)
    rows = [training.train_epoch() for _ in range(2)]
    statistics = training.generator.state_dict()
    figures = [row[key] for row in rows for key in ("loss_d", "loss_g", "logit_real", "logit_fake")]
    return [*figures, *(value.norm().item() for name, value in statistics.items() if "running" in name)]


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("work", [first_classifier_steps, first_gan_epochs])
def test_workers_take_the_steps_of_one(tmp_path: Path, work: Callable[[], list[float]], workers: int) -> None:
    """Three share a batch of 16, or of 4, unevenly."""
    alone, (first, *others) = work(), on_workers(workers, tmp_path, work)
    assert all(other == first for other in others)  # the workers stay in step, bit for bit
    assert first == pytest.approx(alone, rel=1e-3)


def refused() -> str:
    try:
        check_batch(1, "generator.batch_size")
    except ConfigError as error:
        return str(error)
    return ""


def test_more_workers_than_images_of_a_batch_are_refused(tmp_path: Path) -> None:
    assert all(
        "got a batch of 1 (from generator.batch_size" in text for text in on_workers(2, tmp_path, refused)
    )
    with pytest.raises(
        ConfigError, match=r"classifier\.batch_size >= cluster\.workers.*batch_size=64, 65 workers"
    ):
        parse_config(tiny_settings(cluster={"trial_workers": 65}))
    with pytest.raises(ConfigError, match=r"min_workers <= workers.*min_workers=3, workers=2"):
        parse_config(tiny_settings(cluster={"workers": 2, "min_workers": 3}))
    for key, demand in (("workers", "train"), ("trial_workers", "trial")):
        with pytest.raises(ConfigError, match=rf"{demand}\.gpu >= 1.*NCCL takes no two workers on one GPU"):
            parse_config(tiny_settings(cluster={key: 2, demand: {"gpu": 0.5}}))


# --- under Ray ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from kr_ray.cluster.runtime import ray_session

    local = parse_config(tiny_settings(cluster={"address": "local", "train": {"cpu": 1.0}})).cluster
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # workers import this file
        with ray_session(local):
            yield
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(cluster: None, tmp_path: Path) -> None:
    from kr_ray.classifiers.ticks import TickedTraining, Ticks
    from kr_ray.cluster.train import train_on_cluster
    from kr_ray.data.images import LabelledImages
    from kr_ray.runs.artifacts import write_json
    from kr_ray.runs.stages import Save, State

    recipe = tiny_recipe(precision="full", min_steps=0, batch_size=16)

    def train(folder: Path, victim: int) -> dict[str, Any]:
        def work(state: State | None, save: Save) -> None:
            ticked = TickedTraining(
                classifier_training(recipe),
                LabelledImages(*test_classifier.images_of_two_classes()),
                Ticks(4),
                state,
            )
            while not ticked.finished:
                row = ticked.advance()
                save(ticked.state_dict(), row)
                if row["tick"] == 1 and worker_rank() == victim and not (folder / "killed").exists():
                    (folder / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            if worker_rank() == 0:
                write_json(
                    folder / "history.json",
                    {"rows": ticked.history, "workers": torch.distributed.get_world_size()},
                )

        folder.mkdir()
        train_on_cluster(work, folder, Resources(cpu=1.0), 2, workers=(2, 2))
        return dict(read_json(folder / "history.json"))

    undisturbed, killed = train(tmp_path / "undisturbed", -1), train(tmp_path / "killed", 1)
    assert (tmp_path / "killed" / "killed").exists()
    assert undisturbed["workers"] == killed["workers"] == 2
    figures = [[row["train_loss"], row["val_accuracy"]] for row in undisturbed["rows"]]
    assert [[row["train_loss"], row["val_accuracy"]] for row in killed["rows"]] == figures
