"""The generator stage (section 3.2): train BigGAN-Deep, keep a checkpoint every few epochs, watch for collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from kr_ray.classifiers.networks import load_classifier
from kr_ray.classifiers.ticks import Save, State
from kr_ray.compute.devices import pick_device
from kr_ray.compute.parallel import from_first, worker_rank
from kr_ray.compute.seeding import derive_seed, seeded_generator
from kr_ray.config import GeneratorConfig
from kr_ray.data.images import Splits, class_prior
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.generators.biggan.networks import Discriminator, Generator
from kr_ray.generators.biggan.sampling import Sampler, save_generator
from kr_ray.generators.biggan.training import train_generator
from kr_ray.generators.collapse import measure_collapse, within_class_spread
from kr_ray.generators.interface import GeneratorCheckpoint, checkpoint_file
from kr_ray.runs.artifacts import atomic_write, write_json

GRID_ROWS = 8


class CheckpointKeeper:
    """Writes each checkpoint with its sample grid, and says when the training has collapsed for good."""

    def __init__(self, run: Path, splits: Splits, config: GeneratorConfig, seed: int) -> None:
        self.run, self.splits, self.config, self.seed = run, splits, config, seed
        self.device = pick_device()
        self.teacher = load_classifier(run / "teacher" / "weights.safetensors", self.device)
        self.prior = class_prior(splits.train.labels, splits.num_classes)
        some = torch.randperm(len(splits.train), generator=seeded_generator(seed, "alarm real"))[: 4 * config.collapse.images]
        real = splits.train.subset(some).to(self.device)
        self.real_spread = within_class_spread(self.teacher, real.images, real.labels)
        self.collapse: list[dict[str, Any]] = []

    def keep(self, checkpoint: GeneratorCheckpoint) -> bool:
        """Write and judge `checkpoint` (the first worker does); True if the training is to stop."""
        self.collapse.append(from_first(lambda: self._keep(checkpoint)))
        return self.has_collapsed()

    def _keep(self, checkpoint: GeneratorCheckpoint) -> dict[str, Any]:
        path = self.run / checkpoint_file(checkpoint.epoch)
        save_generator(path, checkpoint, self.config, self.splits.num_classes, self.splits.channels)
        sampler = Sampler.load(path, self.device)
        sampler.set_latent_std(1.0, derive_seed(self.seed, "alarm"), self.prior, batches=4, batch_size=64)
        self._save_grid(sampler, path.with_suffix(".png"))
        classes = torch.multinomial(
            self.prior, self.config.collapse.images, replacement=True, generator=seeded_generator(self.seed, "alarm classes")
        )
        images = sampler.images(classes, seeded_generator(self.seed, "alarm images"))
        found = measure_collapse(self.teacher, images, classes.to(self.device), self.real_spread, self.config.collapse)
        return {"epoch": checkpoint.epoch} | found

    def has_collapsed(self) -> bool:
        """Whether the last `patience` checkpoints all raised the alarm and that is to end the training."""
        recent = self.collapse[-self.config.collapse.patience :]
        return (
            self.config.collapse.action == "stop"
            and len(recent) == self.config.collapse.patience
            and all(row["alarm"] for row in recent)
        )

    def _save_grid(self, sampler: Sampler, path: Path) -> None:
        """One column per class (at most 20), the same latents at every checkpoint so that the eye can follow them."""
        classes = torch.arange(min(self.splits.num_classes, 20)).repeat(GRID_ROWS)
        images: Tensor = sampler.images(classes, seeded_generator(self.seed, "grid"))
        with atomic_write(path) as temporary:
            save_image(image_grid(images, columns=min(self.splits.num_classes, 20)).float() / 255, temporary, format="png")


def train_generator_stage(run: Path, folder: Path, config: GeneratorConfig, seed: int, state: State | None, save: Save) -> None:
    """Train the GAN; leaves checkpoints/epoch_*.safetensors with a PNG grid each, and result.json, in `folder`."""
    splits = load_stored_splits(run / SPLITS_FILE)
    keeper = CheckpointKeeper(run, splits, config, derive_seed(seed, "checkpoint"))
    curve: list[dict[str, float]] = []
    if state is not None:
        curve, keeper.collapse = list(state["curve"]), list(state["collapse"])

    def on_state(epoch: int, gan: dict[str, Any]) -> None:
        alarms = float(sum(row["alarm"] for row in keeper.collapse))
        figures = curve[-1] | {"share": epoch / config.epochs, "collapse_alarms": alarms}
        save({"gan": gan, "curve": curve, "collapse": keeper.collapse}, figures)

    if not keeper.has_collapsed():  # a state may have been saved right after the alarm that ended the training
        train_generator(
            splits.train,
            splits.num_classes,
            config,
            derive_seed(seed, "generator"),
            keeper.device,
            resume=None if state is None else state["gan"],
            on_epoch=curve.append,
            on_checkpoint=keeper.keep,
            on_state=on_state,
            save_state_every=max(1, min(config.checkpoint_every, config.epochs // 20)),
        )
    if worker_rank() != 0:
        return
    networks = {"g": Generator, "d": Discriminator}
    counts = {
        f"parameters_{name}": sum(p.numel() for p in network(config, splits.num_classes, splits.channels).parameters())
        for name, network in networks.items()
    }
    epochs = [row["epoch"] for row in keeper.collapse]
    write_json(folder / "result.json", {"checkpoints": epochs, "curve": curve, "collapse": keeper.collapse, **counts})


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Tile images row by row with a border of 1 px: uint8 [N, C, H, W] -> uint8 [3, rows, columns] on the CPU."""
    grid: Tensor = make_grid(images.cpu(), nrow=columns, padding=1, pad_value=255)
    return grid
