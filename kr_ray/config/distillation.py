"""Configuration of data set distillation. Imports neither torch nor ray."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from kr_ray.config.data import DataConfig
from kr_ray.config.methods import MainKey, MethodSection

AUTHORS_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Images per class -> outer steps and inner epochs of gradient matching, in the authors' code."""


class Defaults(NamedTuple):
    """What an objective's authors use."""

    iterations: int
    image_learning_rate: float


DEFAULTS = {"dm": Defaults(20_000, 1.0), "dsa": Defaults(1_000, 0.1), "mtt": Defaults(10_000, 1_000.0)}
MANY_PER_CLASS, FASTER = 100, 10
"""`dm` moves its images so many times faster from so many images per class on."""


class DistillationSection(MethodSection):
    """Data set distillation: a few images per class, made so that a classifier learns from them what it
    learns from all; then that classifier. Keys left null have the value that the objective's authors use."""

    kind: Literal["distillation"] = "distillation"
    objective: Literal["dm", "dsa", "mtt"] = "dm"
    """`dm`: mean features of random networks are matched (Zhao & Bilen, WACV 2023). `dsa`: gradients of
    networks in training are (Zhao & Bilen, ICML 2021; with `augmentation: none` it is their DC, ICLR 2021).
    `mtt`: what a few steps on the images do to a network is matched with what epochs on the real ones did
    (Cazenavette et al., CVPR 2022), with DATM's alignment of difficulty (Guo et al., ICLR 2024) in
    `start_epochs` and `soft_labels`."""
    images_per_class: int = Field(10, ge=1)
    """The distilled set is so large."""
    initialisation: Literal["real", "noise", "ood"] = "real"
    """What the images start as. `real`: private images, which the result then resembles. `ood`: images of
    another, public set (`ood`), given classes at random."""
    ood: DataConfig | None = None
    """Of `initialisation: ood`: the public set, read like `data` (its `image_size` is the run's own; colour
    images become grey for a grey set, and the reverse). Its training images are used."""
    initial_canaries: float = Field(0.0, ge=0, le=1)
    """Of `initialisation: real`, in the worst-case audit: this share of a run's canaries is forced into the
    first images, as far as there is room in their (given) classes. Few would come there by chance."""
    iterations: int | None = Field(None, ge=1)
    """Null: 20,000 (`dm`), 1,000 (`dsa`), 10,000 (`mtt`)."""
    real_batch: int = Field(256, ge=1)
    """Real images of every class at a step, of `dm` and `dsa`."""
    image_learning_rate: float | None = Field(None, gt=0)
    """Of the images, of mean 0 and standard deviation 1. Null: 1 (`dm`; 10 from 100 images per class on), 0.1
    (`dsa`), 1,000 (`mtt`). Images that do not start as real ones may need more."""
    image_momentum: float = Field(0.5, ge=0, lt=1)
    """Of the images' steps, and of what `mtt` learns beside them."""
    augmentation: Literal["siamese", "none"] = "siamese"
    """`siamese`: differentiable augmentation with the same random numbers for real and distilled images (Zhao
    & Bilen 2021, section 3): colour, crop, cutout, scale, rotation, and flip where
    `classifier.horizontal_flip`."""
    network: Literal["convnet3"] = "convnet3"
    """Of the matching, whatever `classifier.network` is. Its norm must look at one image alone, for batch
    norm would mix the classes."""
    network_width: int = Field(128, ge=4)
    """Filters of every layer of that network."""
    network_learning_rate: float = Field(0.01, gt=0)
    """Of `dsa` and `mtt`: of the networks that are trained along the way."""
    network_batch: int = Field(256, ge=1)
    """Images of a step of those networks, real or distilled."""
    outer_steps: int | None = Field(None, ge=1)
    """Of `dsa`: changes of the images per iteration, that is, per network. Null: the authors' table
    (`images_per_class` up to 50)."""
    inner_epochs: int | None = Field(None, ge=1)
    """Of `dsa`: the network's epochs on the images between two changes of them. Null: the authors' table."""
    experts: int = Field(100, ge=1)
    """Of `mtt`: networks trained on the real images, anew in every run of an audit, since they bear the
    private images. They are kept in memory and are deleted at the end."""
    start_epochs: tuple[int, int] = (0, 25)
    """Of `mtt`: the first and last epoch of an expert from which may be matched. Late epochs hold what is
    hard to learn, which only many images per class can carry (DATM)."""
    start_widening: float = Field(0.0, ge=0, le=1)
    """Of `mtt`: over this share of the iterations the last start epoch grows from the first one (DATM). 0:
    all are there from the start (MTT)."""
    matched_epochs: int = Field(2, ge=1)
    """Of `mtt`: so many epochs of an expert are matched at a time."""
    student_steps: int = Field(20, ge=1)
    """Of `mtt`: with so many steps on the distilled images, which are all kept in memory."""
    rate_learning_rate: float = Field(1e-5, ge=0)
    """Of `mtt`: of those steps' own learning rate, which is learnt; it starts at `network_learning_rate`."""
    soft_labels: bool = False
    """Of `mtt`: the labels are learnt, too, from an expert's answers on (DATM)."""
    label_learning_rate: float = Field(2.0, gt=0)
    """Of `soft_labels`."""
    store: Literal["float32", "uint8"] = "float32"
    """What the set is kept as, and the classifier trained on. The Parquet file beside it holds uint8 in any
    case, cut to the range of images: only with `uint8` the classifier saw just what is handed on."""
    student_augmentation: Literal["distillation", "recipe"] = "distillation"
    """How the classifier's images are augmented. `distillation`: as they were when they were made, which is
    the papers' way; images are only good under what they were made for. `recipe`: as `classifier` says."""
    epochs: int = Field(1000, ge=1)
    """Of the classifier, in passes over the distilled images."""

    def main_key(self) -> MainKey:
        return MainKey(
            name="images_per_class",
            low=1,
            high=1000 if self.objective == "dm" else 50,
            rising=True,
            start=self.images_per_class,
            whole=True,
        )

    @model_validator(mode="after")
    def _keys_fit_each_other(self) -> DistillationSection:
        if wrong := [*self._initialisation_mistakes(), *self._other_mistakes()]:
            raise ValueError("; ".join(wrong))
        return self

    def _initialisation_mistakes(self) -> list[str]:
        wrong = []
        if (self.initialisation == "ood") != (self.ood is not None):
            wrong.append(
                "`ood` must be given exactly with initialisation: ood, but got "
                f"initialisation={self.initialisation}, ood={'a set' if self.ood else 'null'}; name a public "
                "set there, such as ood: {name: pneumoniamnist}"
            )
        if self.initial_canaries and self.initialisation != "real":
            wrong.append(
                "`initial_canaries: 0` must hold unless initialisation is real, but got "
                f"{self.initial_canaries:g} with {self.initialisation}; canaries are real images"
            )
        return wrong

    def _other_mistakes(self) -> list[str]:
        wrong = []
        if not 0 <= self.start_epochs[0] <= self.start_epochs[1]:
            wrong.append(
                "`0 <= first <= last` must hold for start_epochs, but got "
                f"{list(self.start_epochs)}; swap them"
            )
        if self.soft_labels and self.objective != "mtt":
            wrong.append(
                f"`objective: mtt` must hold with soft_labels, but got {self.objective}; the others do not "
                "train on the labels: set soft_labels: false"
            )
        if self.student_augmentation == "recipe" and self.store != "uint8":
            wrong.append(
                "`store: uint8` must hold with student_augmentation: recipe, whose operations are defined on "
                f"0..255, but got {self.store}; use uint8, or student_augmentation: distillation"
            )
        return wrong

    @property
    def steps(self) -> int:
        """`iterations`, or the authors'."""
        return self.iterations or DEFAULTS[self.objective].iterations

    @property
    def image_rate(self) -> float:
        """`image_learning_rate`, or the authors'."""
        faster = FASTER if self.objective == "dm" and self.images_per_class >= MANY_PER_CLASS else 1
        return self.image_learning_rate or DEFAULTS[self.objective].image_learning_rate * faster

    @property
    def loops(self) -> tuple[int, int]:
        """Outer steps and inner epochs of gradient matching."""
        outer, inner = AUTHORS_LOOPS[max(key for key in AUTHORS_LOOPS if key <= self.images_per_class)]
        return self.outer_steps or outer, self.inner_epochs or inner
