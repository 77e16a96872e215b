"""Which real images are used."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from kr_ray.config.base import Location, Section


class DataConfig(Section):
    """Which real images are used. Table 5 gives the split sizes of the paper's nine sets."""

    added: ClassVar[frozenset[str]] = frozenset({"max_copied_share"})

    name: str
    """`digits`, `cifar10`, `cifar100`, `fashionmnist`, a MedMNIST flag
    such as `pneumoniamnist`, `npz` or `folder`."""
    root: Location = "data"
    """Folder searched before anything is downloaded: `medmnist/*.npz`,
    `fashionmnist/*.gz`, `cifar10/...`. Of a store it is only read."""
    path: Location = ""
    """The user's own data: an `.npz` with MedMNIST's keys (`name: npz`) or a
    folder of class sub-folders (`name: folder`)."""
    image_size: int = Field(32, ge=8, le=256)
    """Images are resized once, bilinearly and antialiased, to this height and width."""
    download: bool = True
    """Whether a public set that is not below `root` may be downloaded."""
    validation_share: float = Field(0.15, gt=0, lt=0.5)
    """Share split off for validation where a set has no official one (digits, folder)."""
    test_share: float = Field(0.15, gt=0, lt=0.5)
    """Share split off for testing where a set has no official one (digits, folder)."""
    split_seed: int = Field(0, ge=0)
    """Of the splits and subsets made here; another one is another data set."""
    max_train_images: int = Field(0, ge=0)
    """Seeded, stratified subset of the training split, for small machines; 0 = all."""
    max_validation_images: int = Field(0, ge=0)
    """As `max_train_images`, of the validation split."""
    max_test_images: int = Field(0, ge=0)
    """As `max_train_images`, of the test split."""
    max_copied_share: float = Field(0.1, ge=0, le=0.5)
    """So many of the validation or test images may be pixel-exact copies of another split's, which are told
    and left out of the audit; a set with more is refused."""

    @model_validator(mode="after")
    def _path_fits_name(self) -> DataConfig:
        if (self.name in ("npz", "folder")) != bool(self.path):
            raise ValueError(
                "`path` must be set exactly when `name` is npz or folder, but got "
                f"name={self.name!r}, path={self.path!r}; set data.path to your file or folder, or remove it"
            )
        return self
