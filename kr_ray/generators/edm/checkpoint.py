"""The file between training and sampling: averaged weights, and all that is needed to draw from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kr_ray.config import EdmConfig
from kr_ray.generators.edm.networks import UNet
from kr_ray.generators.interface import Checkpoint, save_checkpoint
from kr_ray.runs.artifacts import ArtifactError, holding, load_tensors

KIND = "edm"
FIGURES = ("loss", "image_size", "sigma_data")


@dataclass(frozen=True)
class EdmCheckpoint(Checkpoint):
    """The averaged network after some epochs.

    `figures` holds the mean `loss` of the last epoch, the side `image_size` in pixels, and `sigma_data`, the
    std of the real pixels on the scale of [-1, 1]: one aggregate number of the private images.

    Attributes:
        config: of the training.
        num_classes: of the images, without the "none" class.
        channels: 1 or 3.
    """

    config: EdmConfig
    num_classes: int
    channels: int

    @property
    def image_size(self) -> int:
        return int(self.figures["image_size"])

    @property
    def sigma_data(self) -> float:
        return self.figures["sigma_data"]

    def save(self, path: Path) -> None:
        """Write atomically as safetensors."""
        save_checkpoint(path, self, self.config, self.num_classes, self.channels)

    @classmethod
    def load(cls, path: Path) -> EdmCheckpoint:
        """Read what `save` wrote.

        Raises:
            kr_ray.runs.artifacts.ArtifactError: the file is missing, broken, or another kind of generator's.
        """
        weights, metadata = load_tensors(path)
        with holding(path, "a diffusion model"):
            kind = metadata.get("config", {}).get("kind", "unknown")
            if kind != KIND:
                raise ArtifactError(
                    f"`kind: {KIND}` must be in the metadata of {path}, but it says {kind!r}; "
                    "open it with its own kind of generator, or run the generator stage again"
                )
            return cls(
                epoch=metadata["epoch"],
                weights=weights,
                images_seen=metadata["images_seen"],
                figures={name: metadata[name] for name in FIGURES},
                config=EdmConfig.model_validate(metadata["config"], strict=False),
                num_classes=metadata["num_classes"],
                channels=metadata["channels"],
            )

    def network(self) -> UNet:
        """The network with these weights, on the CPU."""
        network = UNet(self.config, self.num_classes, self.channels)
        network.load_state_dict(self.weights)
        return network
