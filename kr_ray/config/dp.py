"""Configuration of the private methods. Imports neither torch nor ray."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from kr_ray.config.base import Section
from kr_ray.config.generators import CollapseConfig, GeneratorSection, SamplingSection
from kr_ray.config.methods import MainKey, MethodSection, OwnTeacherSection

CITED_OTHERS_WEIGHT = 8.0
"""Of decoupled distillation, CIFAR-100 settings (Zhao et al. 2022, section 4); the DPDFD paper names none."""

SIDE_MULTIPLE = 4
"""Of the images that dp_merf draws: its network doubles the side twice."""


class PrivacySection(Section):
    """What every private method is told: how much noise, or what guarantee to fit it to."""

    may_stay_open: ClassVar[bool] = False
    """Whether neither may be given: the part then takes what `privacy.target_epsilon` leaves it."""

    noise_multiplier: float | None = Field(None, gt=0)
    """Standard deviation of the noise over the sensitivity. Exactly one of this and `target_epsilon` is
    given; neither by one part of a run with `privacy.target_epsilon`, which takes what the others leave."""
    target_epsilon: float | None = Field(None, gt=0, le=50)
    """The noise is fitted so that this part alone keeps it. Above 50 epsilon says nothing about a person."""
    delta: float | None = Field(None, gt=0, lt=1)
    """Null: min(1e-5, N^-1.1) for N training images. Must lie below 1/N."""
    insecure_noise_key: str = ""
    """For tests: noise that can be repeated, and so subtracted. Whatever is made with it is marked as not
    private."""

    @model_validator(mode="after")
    def _one_of_noise_and_target(self) -> PrivacySection:
        if self.is_open and self.may_stay_open:
            return self
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(
                "exactly one of `noise_multiplier` and `target_epsilon` must be given, but got "
                f"noise_multiplier={self.noise_multiplier}, target_epsilon={self.target_epsilon}; use "
                "target_epsilon: 1 (strong) to 10"
            )
        return self

    @property
    def is_open(self) -> bool:
        """Whether the section says nothing about its noise."""
        return self.noise_multiplier is None and self.target_epsilon is None


class DpSgdSection(PrivacySection, MethodSection):
    """DP-SGD (Abadi et al. 2016) on real images; keys have Opacus' names."""

    kind: Literal["dp_sgd"] = "dp_sgd"
    norm: Literal["group"] = "group"
    """Of the private network: batch norm would mix the images of a batch, which no guarantee allows."""
    epochs: int = Field(20, ge=1)
    """Steps are epochs * N / expected_batch_size."""
    expected_batch_size: int = Field(1024, ge=1)
    """Every image enters a batch with probability expected_batch_size / N, independently (Poisson); the sum
    is divided by this."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest norm of an image's gradient; longer ones are cut to it."""
    max_physical_batch_size: int = Field(256, ge=1)
    """Images (with their augmented copies) whose gradients are in memory at once; changes no number but
    rounding."""
    grad_sample_mode: Literal["hooks", "functorch", "ghost"] = "hooks"
    """How Opacus finds per-image gradients; `hooks` is the fastest for ResNet14."""
    augmentation_multiplicity: int = Field(1, ge=1)
    """Augmented copies of an image whose gradients are averaged before clipping (De et al. 2022, section
    3.2)."""
    trivial_augment: bool = False
    """Few private steps learn better from plain crops and flips (of the classifier's section)."""
    learning_rate: float = Field(2.0, gt=0)
    """Highest rate, of the schedule of `classifier`."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of SGD, on the noisy gradients."""
    weight_decay: float = Field(0.0, ge=0)
    """L2; it reads no image and costs no privacy."""

    def main_key(self) -> MainKey:
        """Down to noise so small that its epsilon bounds nothing: equal accuracy is what counts there."""
        return MainKey(
            name="noise_multiplier",
            low=0.02,
            high=50.0,
            rising=False,
            start=self.noise_multiplier,
            excludes=("target_epsilon",),
        )

    @model_validator(mode="after")
    def _copies_fit_the_mode(self) -> DpSgdSection:
        if self.grad_sample_mode == "ghost" and self.augmentation_multiplicity > 1:
            raise ValueError(
                "`augmentation_multiplicity == 1` must hold with grad_sample_mode: ghost, but got "
                f"{self.augmentation_multiplicity}; use hooks, for ghost clipping never sees the gradients "
                "that would be averaged"
            )
        return self


class DpMerfConfig(PrivacySection, GeneratorSection):
    """DP-MERF (Harder et al. 2021): the mean random Fourier features of each class, released once with
    noise; all that follows sees these numbers alone."""

    added: ClassVar[frozenset[str]] = frozenset()
    may_stay_open: ClassVar[bool] = True
    releases_prior: ClassVar[bool] = True

    kind: Literal["dp_merf"] = "dp_merf"
    """Of generator; tells this section from the others'."""
    random_features: int = Field(2_000, ge=2, multiple_of=2)
    """Numbers by which the kernel is approximated: cosines and sines together."""
    kernel_variance: float | None = Field(None, gt=0)
    """Of the Gaussian kernel on pixels in [0, 1]. Null: 127 per 784 values (the authors' for Fashion-MNIST),
    in proportion."""
    prior_share: float = Field(0.1, gt=0, lt=1)
    """Of the privacy (as precision of the noise) that the class histogram takes; the features take the
    rest."""
    steps: int = Field(600, ge=1)
    """Gradient steps of the whole training, which sees the released numbers alone."""
    batch_size: int = Field(100, ge=2)
    """Generated images of one gradient step."""
    epochs: int = Field(5, ge=1)
    """Equal parts that `steps` falls into. No pass over the real images, which are read once."""
    learning_rate: float = Field(1e-2, gt=0)
    """First rate of the generator's Adam."""
    latent_dim: int = Field(5, ge=1)
    """Numbers of a latent vector."""
    channels: tuple[int, int] = (16, 8)
    """Of the generator's two feature maps."""
    collapse: CollapseConfig = CollapseConfig(action="off")
    """Off, for the alarm compares with real images."""

    @model_validator(mode="after")
    def _every_part_has_a_step(self) -> DpMerfConfig:
        if self.epochs > self.steps:
            raise ValueError(
                f"`epochs <= steps` must hold, but got epochs={self.epochs}, steps={self.steps}; "
                "use epochs: 5"
            )
        return self

    def images_trained(self, real: int) -> int:
        return self.steps * self.batch_size

    def measured(self, batch: int) -> Self:
        """A step per epoch, of its own batch: smaller ones would not hold every class twice."""
        return self.model_copy(update={"steps": 10**6, "epochs": 10**6})

    def fits(self, image_size: int, sampling: SamplingSection | None = None) -> list[str]:
        if image_size % SIDE_MULTIPLE == 0:
            return []
        return [
            f"`data.image_size` must be a multiple of {SIDE_MULTIPLE} for generator.kind=dp_merf, but got "
            f"{image_size}; use {SIDE_MULTIPLE * round(image_size / SIDE_MULTIPLE)}"
        ]


class DpdfdSection(PrivacySection, MethodSection):
    """DPDFD (Liu et al. 2024), made sound; see kr_ray.methods.dpdfd. Default noise: give `target_epsilon`."""

    kind: Literal["dpdfd"] = "dpdfd"
    accounting: Literal["sound", "paper"] = "sound"
    """`sound`: teachers on disjoint shards, every answer recorded once. `paper`: one teacher asked anew at
    every step; the printed epsilon is no guarantee and is said to be none."""
    answer: Literal["gradients", "votes"] = "gradients"
    """What a teacher says of an image: the gradient of its loss by the student's output, or a vote for a
    class."""
    bound: Literal["normalise", "clip"] = "normalise"
    """How a gradient is kept to `norm_bound`: made just so long, or cut where it is longer."""
    norm_bound: float = Field(1.0, gt=0)
    """C. Under `sound` it changes no epsilon, for the noise grows with it."""
    teachers: int = Field(50, ge=1)
    """K, of `sound`: disjoint shards, each with a teacher of its own."""
    teacher_epochs: int = Field(10, ge=1)
    """Passes of a teacher over its shard."""
    queries: int = Field(1000, ge=1)
    """Q, of `sound`: generated images that are answered, over all rounds."""
    rounds: int = Field(4, ge=1)
    """Of `sound` with `gradients`: the student learns from the answers so far before it asks again."""
    batch_size: int = Field(64, ge=1)
    """Generated images of one step."""
    steps: int = Field(1000, ge=1)
    """Steps of the student: of algorithm 1 (`paper`), or over the recorded answers (`sound`)."""
    generator_steps: int = Field(200, ge=0)
    """Of `sound`: steps of the generator against the student before every round."""
    answer_rate: float = Field(1.0, gt=0)
    """The paper's gamma: how far the student's output is moved along the noisy gradient."""
    others_weight: float | None = Field(None, ge=0)
    """Of what the teacher thinks of the classes that it does not choose, in its loss. Null: 8, as in the
    cited work, under `paper`; 0
    under `sound`, where an image is asked about once: with 8 that part makes up most of the bounded gradient,
        and outputs moved along
    it named the teacher's class in 0 of 2,000 draws (10 classes, from equal outputs; with 1 in 78 %, with 0
    in all)."""
    student_learning_rate: float = Field(0.05, gt=0)
    """Of the student's SGD."""
    generator_learning_rate: float = Field(1e-3, gt=0)
    """Of the generator's Adam."""
    latent_dim: int = Field(100, ge=1)
    """Numbers of a latent vector."""
    cross_entropy: float = Field(1.0, ge=0)
    """Weight of the generator's one-hot term (equation 5, first term; the paper has 1)."""
    alpha: float = Field(1.0, ge=0)
    """Of the information entropy (second term)."""
    beta: float = Field(1.0, ge=0)
    """Of the activation norm (third term)."""

    def main_key(self) -> MainKey:
        return MainKey(
            name="noise_multiplier",
            low=0.1,
            high=1000.0,
            rising=False,
            start=self.noise_multiplier,
            excludes=("target_epsilon",),
        )

    @model_validator(mode="after")
    def _votes_are_of_several(self) -> DpdfdSection:
        if self.accounting == "paper" and self.answer == "votes":
            raise ValueError(
                "`answer: votes` must go with `accounting: sound`, but got "
                "paper; a single teacher's vote is its answer"
            )
        if self.accounting == "paper" and self.noise_multiplier is None:
            raise ValueError(
                "`noise_multiplier` must be given with accounting: paper, but got target_epsilon; use 100, "
                "the paper's, for its "
                "printed epsilon cannot be aimed at"
            )
        return self

    @property
    def weight_of_others(self) -> float:
        """`others_weight`, or what it defaults to."""
        default = CITED_OTHERS_WEIGHT if self.accounting == "paper" else 0.0
        return default if self.others_weight is None else self.others_weight


class DpSgdTeacher(DpSgdSection, OwnTeacherSection):
    """The run's teacher, trained with DP-SGD: its answers to generated images may then leave the run."""

    added: ClassVar[frozenset[str]] = frozenset()
    may_stay_open: ClassVar[bool] = True
    step_cost: ClassVar[float] = 2.65
    """ResNet14 of width 12 at 16 px on a CPU, mode `hooks`."""

    kind: Literal["dp_sgd"] = "dp_sgd"
    """Of teacher; tells this section from the others'."""

    @property
    def passes(self) -> int:
        return self.epochs


class DpdfdTeacher(DpdfdSection, OwnTeacherSection):
    """The run's teacher, taught by noisy answers of teachers on disjoint shards (PATE, with
    `answer: votes`)."""

    added: ClassVar[frozenset[str]] = frozenset()
    may_stay_open: ClassVar[bool] = True

    kind: Literal["dpdfd"] = "dpdfd"
    """Of teacher; tells this section from the others'."""
    ask_about: Literal["generator", "student"] = "generator"
    """Whose images are answered: the run's generator's, at its last checkpoint, or those of one trained
    against the asking student."""

    @property
    def passes(self) -> int:
        return self.teacher_epochs

    @model_validator(mode="after")
    def _is_sound(self) -> DpdfdTeacher:
        if self.accounting != "sound":
            raise ValueError(
                "`accounting: sound` must hold for a teacher, but got paper, whose epsilon is no guarantee; "
                "use sound"
            )
        return self
