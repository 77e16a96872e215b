"""The run's configuration as frozen typed sections; `config_file` reads them.

Imports neither torch nor ray, so that a wrong key is refused within a fraction of a second. Defaults are the
Knowledge Recycling paper's (arXiv 2407.15526; Tables 3 and 4); where the paper is silent the docstring says so.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from kr_ray.config_limits import too_large
from kr_ray.storage import check_location

Location = Annotated[str, AfterValidator(check_location)]
"""A local path, or a URI s3://bucket/folder or gs://bucket/folder."""


class ConfigError(ValueError):
    """The configuration is refused. The message lists every mistake with key path, value and remedy."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent type conversion, no number beyond all reason."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _within_limits(cls, value: Any, info: ValidationInfo) -> Any:
        if wrong := too_large(str(info.field_name), value):
            raise ValueError(wrong)
        return value


class DataConfig(Section):
    """Which real images are used. Table 5 gives the split sizes of the paper's nine sets."""

    name: str
    """`digits`, `cifar10`, `cifar100`, `fashionmnist`, a MedMNIST flag such as `pneumoniamnist`, `npz` or `folder`."""
    root: Location = "data"
    """Folder searched before anything is downloaded: `medmnist/*.npz`, `fashionmnist/*.gz`, `cifar10/...`. Of a store it is only read."""
    path: Location = ""
    """The user's own data: an `.npz` with MedMNIST's keys (`name: npz`) or a folder of class sub-folders (`name: folder`)."""
    image_size: int = Field(32, ge=8, le=256)
    """Images are resized once, bilinearly and antialiased, to this height and width."""
    download: bool = True
    validation_share: float = Field(0.15, gt=0, lt=0.5)
    """Share split off for validation where a set has no official one (digits, folder)."""
    test_share: float = Field(0.15, gt=0, lt=0.5)
    """Share split off for testing where a set has no official one (digits, folder)."""
    split_seed: int = Field(0, ge=0)
    max_train_images: int = Field(0, ge=0)
    """Seeded, stratified subset of the training split, for small machines; 0 = all."""
    max_validation_images: int = Field(0, ge=0)
    max_test_images: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _path_fits_name(self) -> DataConfig:
        if (self.name in ("npz", "folder")) != bool(self.path):
            raise ValueError(
                "`path` must be set exactly when `name` is npz or folder, but got "
                f"name={self.name!r}, path={self.path!r}; set data.path to your file or folder, or remove it"
            )
        return self


class ClassifierConfig(Section):
    """ResNet14 (6n+2 with n = 2, widths 64/128/256) and the training recipe of Table 4.

    Teacher, students and shadow models share both (section 3.1).
    """

    width: int = Field(64, ge=4)
    """Channels of the first stage."""
    batch_size: int = Field(256, ge=2)
    learning_rate: float = Field(0.5, gt=0)
    warmup_epochs: int = Field(10, ge=0)
    warmup_learning_rate: float = Field(1e-5, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    clip: Literal["global", "per_parameter"] = "global"
    """The paper says `clipnorm`: Keras clips each variable by itself, most frameworks the global norm."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Applies to hard labels only."""
    trivial_augment: bool = True
    mixup_alpha: float = Field(0.2, ge=0)
    horizontal_flip: bool = True
    crop_padding: int = Field(2, ge=0)
    precision: Literal["mixed", "full"] = "mixed"
    min_steps: int = Field(1000, ge=0)
    """Budgets of fewer gradient steps than this use a smaller batch (and rate); 0 = the paper's recipe unchanged."""


class TeacherConfig(Section):
    epochs: int = Field(500, ge=1)


class CollapseConfig(Section):
    """Alarm on one small generated set per checkpoint: what the teacher thinks of it and how varied it is."""

    images: int = Field(256, ge=16)
    min_agreement: float = Field(0.0, ge=0, le=1)
    """Alarm when (agreement - chance) / (1 - chance) is at or below this: 0 = no better than chance, 1 = never good enough."""
    min_diversity: float = Field(0.1, ge=0)
    """Alarm when the within-class spread of teacher features is below this share of the real images' spread."""
    action: Literal["record", "stop"] = "record"
    patience: int = Field(3, ge=1)
    """`stop` ends the training after this many alarmed checkpoints in a row."""


class GeneratorConfig(Section):
    """BigGAN-Deep; `preset` fills the training keys (Table 3), `architecture` the channel tables. Own keys win."""

    preset: Literal["ours", "vanilla"] = "ours"
    architecture: Literal["studiogan32", "kr41m", "small32", "small16", "tiny16"] = "studiogan32"
    latent_dim: int = Field(128, ge=2)
    shared_dim: int = Field(128, ge=2)
    channels: int = Field(ge=4)
    """The unit of the four channel tables."""
    g_in: tuple[int, ...]
    g_out: tuple[int, ...]
    d_in: tuple[int, ...]
    """Input multiples of D's stages; a leading 1 is the stem's width."""
    d_out: tuple[int, ...]
    depth: int = Field(2, ge=1)
    bottleneck_ratio: int = Field(ge=1)
    attention_resolution: int = Field(16, ge=0)
    """Self-attention where the feature map has this side; 0 = none."""
    loss: Literal["logistic", "hinge"]
    output: Literal["sigmoid", "tanh"]
    precision: Literal["mixed", "full"]
    d_optimizer: Literal["adamw", "adam"]
    d_weight_decay: float = Field(ge=0)
    d_label_smoothing: float = Field(ge=0, lt=0.5)
    d_steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=2)
    learning_rate_g: float = Field(2e-4, gt=0)
    learning_rate_d: float = Field(2e-4, gt=0)
    beta1: float = Field(0.5, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    horizontal_flip: bool = False
    """Mirror real images at random before D sees them."""
    ema_decay: float = Field(0.9999, gt=0, lt=1)
    """Per G step at the paper's batch; converted to a half-life in images (see training.ema)."""
    ema_rampup: float = Field(0.05, gt=0, le=1)
    """The half-life never exceeds this share of the images seen so far."""
    epochs: int = Field(500, ge=1)
    """One epoch is one pass of D over the real training images; every D step takes a fresh batch."""
    checkpoint_every: int = Field(5, ge=1)
    collapse: CollapseConfig = CollapseConfig()

    @model_validator(mode="after")
    def _tables_fit(self) -> GeneratorConfig:
        if not len(self.g_in) == len(self.g_out) >= 1:
            raise ValueError(
                f"`len(g_in) == len(g_out) >= 1` must hold, but got g_in={self.g_in}, g_out={self.g_out}; "
                "give one entry per doubling of the image"
            )
        if not len(self.d_in) == len(self.d_out) >= len(self.g_in):
            raise ValueError(
                f"`len(d_in) == len(d_out) >= len(g_in)` must hold, but got d_in={self.d_in}, d_out={self.d_out}; "
                "give one entry per D stage"
            )
        for letter, inputs, outputs in (("g", self.g_in, self.g_out), ("d", self.d_in, self.d_out)):
            if inputs[1:] != outputs[:-1]:
                raise ValueError(
                    f"`{letter}_in[k + 1] == {letter}_out[k]` must hold, but got {letter}_in={inputs}, {letter}_out={outputs}; "
                    "each stage reads what the one before gives"
                )
        if len(self.d_in) > len(self.g_in) + 2:
            raise ValueError(
                f"`len(d_in) <= len(g_in) + 2` must hold, but got d_in={self.d_in}, g_in={self.g_in}; D halves the image once per "
                "stage: remove stages"
            )
        if min(self.g_in + self.g_out + self.d_in + self.d_out) < 1:
            raise ValueError("channel tables must hold positive multiples of `channels`; remove the zero or negative ones")
        return self

    @property
    def image_size(self) -> int:
        """Side of the generated images: 4 px doubled once per G stage."""
        return 4 * 2 ** len(self.g_in)


class SynthesisConfig(Section):
    """How a synthetic set is drawn and labelled (sections 3.4 and 3.5); tuning varies three of these."""

    labelling: Literal["gkd", "gap_filler", "filter", "hard"] = "gkd"
    class_prior: Literal["real", "uniform"] = "real"
    latent_std: float = Field(1.0, gt=0)
    regeneration_rate: int = Field(10, ge=1)
    """Epochs between two regenerations; an epoch here is one pass over the synthetic set, whatever its size."""
    cardinality_scale: int = Field(1, ge=1)
    """Synthetic over real training images."""
    epoch_unit: Literal["synthetic", "real"] = "synthetic"
    """What a student's budget counts. `synthetic` (the paper): passes over the scaled set, so the scale multiplies the work.
    `real`: passes of real size. Tuning always counts in passes of real size, so that all scales are compared at equal work."""
    confidence_threshold: float = Field(0.9, ge=0, lt=1)
    """`gap_filler`: the least teacher probability of the kept label."""
    batch_size: int = Field(128, ge=2)
    standing_batches: int = Field(16, ge=1)
    """Batches that re-estimate G's batch-norm statistics at each (checkpoint, latent std)."""
    max_draws: int = Field(20, ge=1)
    """Filtering strategies give up after drawing this many times the wanted number of images."""


class CheckpointsConfig(Section):
    search: Literal["exhaustive", "halving"] = "exhaustive"
    epochs: int = Field(100, ge=1)
    shortening: int = Field(9, ge=2)
    """`halving`: all checkpoints are first tried on complete schedules that are this many times shorter."""
    budget: float = Field(0.35, gt=0, lt=1)
    """`halving`: its share of the exhaustive sweep's epochs; as many of the best go on to the whole schedule as it allows."""


class TuningConfig(Section):
    """TPE with Hyperband over three generation parameters (section 3.5)."""

    trials: int = Field(50, ge=1)
    epochs: int = Field(100, ge=1)
    searcher: Literal["optuna", "hyperopt", "random"] = "optuna"
    latent_std: tuple[float, float] = (1.0, 2.5)
    regeneration_rate: tuple[int, int] = (1, 10)
    cardinality_scale: tuple[int, int] = (1, 10)
    reduction_factor: int = Field(3, ge=2)
    rungs: int = Field(9, ge=1)
    """Hyperband's resource R. The resource is images seen, in units of 1/R of a trial's budget, which is `epochs` passes of real
    size for every trial, whatever its cardinality scale; the first rung must lie past the learning-rate warm-up."""
    startup_trials: int = Field(10, ge=1)
    """Random trials before TPE models anything."""
    brackets_in_flight: int = Field(1, ge=1)
    """Hyperband brackets that run side by side; 1 is the strict sequence. More keeps more workers busy (50 trials on 8 slots: 84
    rounds at 1, 47 at 2), but TPE learns later. Part of the search, not of the machine: it must not follow the number of
    workers, or results would."""

    @model_validator(mode="after")
    def _ranges_fit(self) -> TuningConfig:
        bad = [
            f"`0 < low <= high` must hold, but got {key}={list(pair)}; swap or widen the two bounds"
            for key in ("latent_std", "regeneration_rate", "cardinality_scale")
            if not 0 < (pair := getattr(self, key))[0] <= pair[1]
        ]
        if self.trials > 1 and 1 < self.rungs < self.reduction_factor:
            bad.append(
                f"`rungs >= reduction_factor` must hold, but got rungs={self.rungs}, reduction_factor={self.reduction_factor}; "
                "else no trial could be stopped early (rungs: 1 switches Hyperband off)"
            )
        smallest = self.rungs // self.reduction_factor ** int(math.log(self.rungs, self.reduction_factor) + 1e-9)
        if smallest / self.rungs <= 0.1:
            bad.append(
                f"the first rung must lie past the warm-up, a tenth of a trial, but with rungs={self.rungs}, "
                f"reduction_factor={self.reduction_factor} it is at {smallest / self.rungs:.3f}; use rungs: 9 with reduction_factor: 3"
            )
        if bad:
            raise ValueError("; ".join(bad))
        return self


class StudentConfig(Section):
    epochs: int = Field(500, ge=1)
    from_parquet: Location = ""
    """A labelled synthetic set that `kr export` wrote, a file or folder: train on it alone. Then a run has neither teacher nor generator,
    nor what is made with them; of the real images only validation and test images are shown to the student."""
    equal_compute_teacher: bool = True
    """Also train a teacher for as many gradient steps as the student."""


class ShadowAttackConfig(Section):
    """Shokri-style membership inference (section 3.6)."""

    shadow_models: int = Field(10, ge=2)
    epochs: int = Field(500, ge=1)
    attack_holdout: float = Field(0.2, gt=0, lt=0.9)
    """Share of the shadow models whose scores only select among the attack models."""
    max_svc_rows: int = Field(20000, ge=100)


class CopiesConfig(Section):
    """Whether generated images are copies of training images, and how well they cover the real ones."""

    images: int = Field(2000, ge=100)
    """Generated for the comparison, and at most so many test images as its yardstick."""
    quantile: float = Field(0.01, gt=0, lt=0.5)
    """A generated image is a near-copy if it is as near to a training image as the nearest such share of the test images is."""
    encoder: Location = ""
    """TorchScript or ONNX file of the feature space; empty: the teacher's penultimate layer. A TorchScript file is a program that
    is run: give only files you trust."""
    encoder_size: int = Field(0, ge=0)
    """Images are resized to this side for the encoder; 0 = as they are."""
    encoder_normalisation: Literal["none", "imagenet"] = "none"


ArmName = Literal["teacher", "kr", "student_only"]


class AuditConfig(ShadowAttackConfig):
    """The paper's attack, and the worst-case audit: whole pipelines trained again with and without canaries.

    Protocol of Zhao & Zhang, "Does Training with Synthetic Data Truly Protect Privacy?" (ICLR 2025): 500 canaries, 32 models.
    """

    arms: tuple[ArmName, ...] = ()
    """What is trained again in every one of `models` runs: `teacher` (real data, no defence), `kr` (teacher, generator and
    student), `student_only` (a student of this run's own generator). Empty: no worst-case audit, which costs many trainings."""
    models: int = Field(32, ge=4)
    """Runs; even, because every audit sample is a member in exactly half of them. More of them extend an audit already made."""
    canary_kind: Literal["mislabeled", "outlier", "random"] = "mislabeled"
    canaries: int = Field(0, ge=0)
    """0 = 500, or as many as `max_canary_share` allows if those are fewer."""
    population: int = Field(0, ge=0)
    """Correctly labelled audit samples, for the average beside the worst case; 0 = as for `canaries`."""
    max_canary_share: float = Field(0.1, gt=0, le=0.25)
    """Most of the training split that may be canaries, and again that may be population samples. Half of them are missing in a
    run: more would make its models differ from the ones they stand for."""
    reference: int = Field(1000, ge=10)
    """At most this many test images, trained on by no model, against which scores are calibrated."""
    queries: int = Field(18, ge=1, le=18)
    """Images a model is asked for each audit sample: itself, its mirror image and shifts, as far as training augments so."""
    keep_models: bool = False
    """Keep the models of all runs; else only their logits stay."""
    copies: CopiesConfig = CopiesConfig()

    @model_validator(mode="after")
    def _runs_come_in_pairs(self) -> AuditConfig:
        if self.models % 2:
            raise ValueError(
                f"`models` must be even, but got models={self.models}; use {self.models + 1}: every sample is in half of them"
            )
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"`arms` must be different, but got {list(self.arms)}; name each once")
        return self

    def worst_case_keys(self) -> dict[str, Any]:
        """What decides the worst-case audit's figures, as JSON."""
        return self.model_dump(mode="json", exclude={*ShadowAttackConfig.model_fields, "keep_models", "copies"})

    def shadow_attack(self) -> ShadowAttackConfig:
        """The keys of the paper's attack alone."""
        return ShadowAttackConfig(**self.model_dump(include=set(ShadowAttackConfig.model_fields)))


class Resources(Section):
    cpu: float = Field(1.0, ge=0)
    gpu: float = Field(0.0, ge=0)


class ClusterConfig(Section):
    """Where Ray runs. `local` starts an own Ray in this process, `auto` joins the one the job was submitted to."""

    address: str = "auto-or-local"
    """`auto-or-local`: join RAY_ADDRESS if set (as under `ray job submit`), else start a local Ray."""
    train: Resources = Resources(cpu=2.0)
    """Of one teacher, generator or final-student worker."""
    workers: int = Field(1, ge=1)
    """Of teacher, generator and final student, each with its slice of every batch and `train`'s resources. Results are those of
    one worker up to rounding."""
    min_workers: int = Field(0, ge=0)
    """Begin, and after a loss go on, with as few as these while no more find room (Ray Train's elastic training); 0: exactly `workers`."""
    trial: Resources = Resources(cpu=1.0)
    """Of one worker of a student trial, of a shadow model or attack model; fractions of a GPU are allowed."""
    trial_workers: int = Field(1, ge=1)
    """Of one student trial; several train it as they do the final student, in a TorchTrainer that the trial starts."""
    stream: Literal["on_device", "ray_data"] = "on_device"
    """Who makes the students' images: the training itself, between two epochs, or `makers` that send them through Ray Data while it
    trains. Both give the same students; on few CPUs the first is faster."""
    makers: int = Field(1, ge=1)
    """Of one student, with `maker`'s resources each."""
    maker: Resources = Resources(cpu=0.0)
    """Of one maker. A CPU that is asked for here must be left by the students (`train`, `trial`), or both wait for ever."""
    max_retries: int = Field(3, ge=0)
    dashboard: bool = False

    @property
    def worker_counts(self) -> tuple[int, int]:
        """Least and most workers of a Ray Train stage."""
        return self.min_workers or self.workers, self.workers

    @model_validator(mode="after")
    def _workers_fit(self) -> ClusterConfig:
        if self.min_workers > self.workers:
            raise ValueError(
                f"`min_workers <= workers` must hold, but got min_workers={self.min_workers}, workers={self.workers}; use 0 for a fixed number"
            )
        for name, count in (("train", self.workers), ("trial", self.trial_workers)):
            gpu, key = getattr(self, name).gpu, "workers" if name == "train" else "trial_workers"
            if count > 1 and 0 < gpu < 1:
                raise ValueError(
                    f"`{name}.gpu >= 1` (or 0) must hold with several workers, but got {key}={count}, {name}.gpu={gpu}; "
                    f"NCCL takes no two workers on one GPU: use {name}.gpu: 1, or {key}: 1"
                )
        return self


class TrackingConfig(Section):
    """Trackers beside the run's own report."""

    mlflow: str = ""
    """URI of an MLflow server, or `sqlite:////path/mlflow.db`; empty = none. Credentials belong in MLflow's environment variables."""

    @model_validator(mode="after")
    def _holds_no_secret(self) -> TrackingConfig:
        if "@" in urlsplit(self.mlflow).netloc:
            raise ValueError(
                "`mlflow` must hold no user or password, for reports and logs show it, but got one; set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


class Config(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """Of the run and its folder."""
    seed: int = Field(0, ge=0)
    storage: Location = "runs"
    """Where all runs are kept, each in a folder of its name: a path that all nodes see, or a URI of an object store."""
    data: DataConfig
    classifier: ClassifierConfig = ClassifierConfig()
    teacher: TeacherConfig = TeacherConfig()
    generator: GeneratorConfig
    synthesis: SynthesisConfig = SynthesisConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    tuning: TuningConfig = TuningConfig()
    student: StudentConfig = StudentConfig()
    audit: AuditConfig = AuditConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Config:
        if wrong := cross_section_mistakes({name: getattr(self, name) for name in type(self).model_fields}):
            raise ValueError("\n".join(wrong))
        return self


def cross_section_mistakes(sections: dict[str, Any]) -> list[str]:
    """Rules between sections, as far as the sections concerned are there (the others hold mistakes of their own)."""
    wrong = []
    generator, data = sections.get("generator"), sections.get("data")
    if generator and data and generator.image_size != data.image_size:
        wrong.append(
            f"`data.image_size == 4 * 2**len(generator.g_in)` must hold, but got data.image_size={data.image_size}, "
            f"generator.g_in={list(generator.g_in)} ({generator.image_size} px); choose the architecture for that size"
        )
    if generator and generator.attention_resolution:
        sides = _powers_of_two(8, generator.image_size // 2)
        if generator.attention_resolution not in sides:
            wrong.append(
                f"`generator.attention_resolution` must be a feature-map side among {sides}, "
                f"but got {generator.attention_resolution}; use 0 for none"
            )
    if generator and generator.checkpoint_every > generator.epochs:
        wrong.append(
            "`generator.checkpoint_every <= generator.epochs` must hold, but got "
            f"checkpoint_every={generator.checkpoint_every}, epochs={generator.epochs}; else there is no checkpoint"
        )
    cluster = sections.get("cluster")
    for name in ("classifier", "generator"):
        workers = max(cluster.workers, cluster.trial_workers) if cluster else 1
        if name in sections and sections[name].batch_size < workers:
            wrong.append(
                f"`{name}.batch_size >= cluster.workers` (and trial_workers) must hold, but got batch_size={sections[name].batch_size}, "
                f"{workers} workers; every worker takes a slice of a batch: use fewer workers"
            )
    tuning = sections.get("tuning")
    if tuning and tuning.rungs > tuning.epochs:
        wrong.append(
            f"`tuning.rungs <= tuning.epochs` must hold, but got rungs={tuning.rungs}, epochs={tuning.epochs}; "
            "a rung is at least one epoch long"
        )
    return wrong


def _powers_of_two(low: int, high: int) -> list[int]:
    return [2**k for k in range(int(math.log2(low)), int(math.log2(max(high, 1))) + 1)]
