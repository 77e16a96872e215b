"""A whole run with one epsilon: the section, and what it forbids the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from kr_ray.config.base import Section
from kr_ray.config.dp import DpdfdTeacher, PrivacySection

if TYPE_CHECKING:
    from kr_ray.config.generators import GeneratorSection
    from kr_ray.config.methods import OwnTeacherSection, SynthesisConfig
    from kr_ray.config.run import Config


class RunPrivacyConfig(Section):
    """What leaves the run (student, generator, synthetic set) keeps one epsilon: the releases of all parts
    that it is made of are composed, and what would leak beside them is switched off or stays inside."""

    target_epsilon: float | None = Field(None, gt=0, le=50)
    """Of the whole run, kept or refused before anything starts. One private part may then leave its noise
    open: it takes what the others leave. Null: the report says what came out."""
    delta: float | None = Field(None, gt=0, lt=1)
    """Null: min(1e-5, N^-1.1) for N training images. Must lie below 1/N, of the validation images too where
    they select."""
    unit: str = Field("image", pattern=r"^[a-z][a-z ]*$", max_length=30)
    """Whose presence is hidden, as the report calls it: image, patient, ..."""
    images_per_unit: int = Field(1, ge=1)
    """Images that one of them has at most (group privacy). Nothing can check it."""
    selection: Literal["fixed", "noisy"] = "fixed"
    """`fixed`: the last checkpoint and the parameters as configured; no validation image decides anything.
    `noisy`: checkpoint sweep and tuning as ever, but every validation score has noise."""
    score_noise_multiplier: float | None = Field(None, gt=0)
    """`noisy`: standard deviation of the noise on the number of correct answers behind each score (one image
    changes it by 1). Null: fitted to `target_epsilon` for the people of the validation images, who pay for
    it alone."""
    insecure_noise_key: str = ""
    """For tests: noise on scores that can be repeated, and so subtracted. The run is marked as not
    private."""

    @property
    def aims(self) -> list[Any]:
        """What noise is fitted to, as JSON values."""
        return [self.target_epsilon, self.delta, self.images_per_unit]

    @model_validator(mode="after")
    def _scores_have_noise(self) -> RunPrivacyConfig:
        if self.selection == "noisy" and self.score_noise_multiplier is None and self.target_epsilon is None:
            raise ValueError(
                "`score_noise_multiplier` or `target_epsilon` must be given with selection: noisy, but got "
                "neither; give one, or use selection: fixed"
            )
        return self


def readers(config: Config) -> dict[str, Section]:
    """The parts of a student that read training images, by the names of their stages: no teacher that it
    never asks."""
    parts: dict[str, Section] = {"generator": config.generator}
    return parts | ({"teacher": config.teacher} if config.synthesis.asks_the_teacher else {})


def fitted_to(config: Config, name: str, section: Section) -> list[Any]:
    """What decides the noise of a part that leaves it open, beside itself: for fingerprints. No more than
    that, for a part that is made anew is a second release."""
    if not isinstance(section, PrivacySection) or not section.is_open or config.privacy is None:
        return []
    return [*config.privacy.aims, *(part for key, part in readers(config).items() if key != name)]


def selects(config: Config) -> bool:
    """Whether validation images choose checkpoint and generation parameters."""
    return config.privacy is None or config.privacy.selection == "noisy"


def asks_the_generator(config: Config) -> bool:
    """Whether the teacher is taught about the generator's images, so that it comes after it."""
    return isinstance(config.teacher, DpdfdTeacher) and config.teacher.ask_about == "generator"


def private_run_mistakes(sections: Mapping[str, Any]) -> list[str]:
    """What a run must not do beside its mechanisms, as far as the sections concerned are there."""
    generator, teacher, synthesis = (sections.get(name) for name in ("generator", "teacher", "synthesis"))
    wrong = _released_prior_mistakes(generator, synthesis) + _order_mistakes(generator, teacher)
    wrong += _noise_mistakes(sections)
    return wrong + (_leaks_beside(sections) if sections.get("privacy") else [])


def _noise_mistakes(sections: Mapping[str, Any]) -> list[str]:
    """Noise that nobody names, and places where no noise can be kept secret."""
    parts = {name: sections.get(name) for name in ("generator", "teacher")}
    private = {name: part for name, part in parts.items() if isinstance(part, PrivacySection)}
    opened = [name for name, part in private.items() if part.is_open]
    privacy, cluster, wrong = sections.get("privacy"), sections.get("cluster"), []
    if opened and (privacy is None or privacy.target_epsilon is None):
        wrong.append(
            f"`{opened[0]}.noise_multiplier` or `{opened[0]}.target_epsilon` must be given, but got neither; "
            "give one, or privacy.target_epsilon for the whole run"
        )
    if len(opened) > 1:
        wrong.append(
            "at most one part may leave its noise open to privacy.target_epsilon, but got "
            f"{' and '.join(opened)}; give one of them a noise_multiplier or a target_epsilon"
        )
    if private and cluster and cluster.workers != 1:
        wrong.append(
            f"`cluster.workers: 1` must hold for a private {next(iter(private))}, but got "
            f"workers={cluster.workers}; a release is made once, by one worker"
        )
    if private and "://" in sections.get("storage", ""):
        wrong.append(
            f"`storage` must be a local or shared folder for a private {next(iter(private))}, but got "
            f"{sections['storage']!r}; the key of its noise must lie where only its owner can read"
        )
    return wrong


def _leaks_beside(sections: Mapping[str, Any]) -> list[str]:
    """What would tell of the real images without noise."""
    generator, synthesis, student = (sections.get(name) for name in ("generator", "synthesis", "student"))
    wrong = []
    if synthesis and synthesis.class_prior == "real":
        wrong.append(
            "`synthesis.class_prior` must be uniform or released with `privacy`, but got real; the real "
            "class frequencies would be released without noise: use uniform"
        )
    if generator and generator.collapse.action != "off":
        wrong.append(
            "`generator.collapse.action: off` must hold with `privacy`, but got "
            f"{generator.collapse.action}; the alarm compares with real images: use off"
        )
    if (tracking := sections.get("tracking")) and tracking.mlflow:
        wrong.append(
            f"`tracking.mlflow` must be empty with `privacy`, but got {tracking.mlflow!r}; the server would "
            "be told scores and curves of real images: remove it"
        )
    if student and student.from_parquet:
        wrong.append(
            f"`student.from_parquet` must be empty with `privacy`, but got {student.from_parquet!r}; nothing "
            "is known of what an exported set released: remove one of them"
        )
    return wrong


def _released_prior_mistakes(
    generator: GeneratorSection | None, synthesis: SynthesisConfig | None
) -> list[str]:
    if generator is None or synthesis is None or synthesis.class_prior != "released":
        return []
    if generator.releases_prior:
        return []
    return [
        "`synthesis.class_prior: released` needs a generator that releases noisy class frequencies "
        f"(dp_merf), but got generator.kind={generator.kind}; use uniform"
    ]


def _order_mistakes(generator: GeneratorSection | None, teacher: OwnTeacherSection | None) -> list[str]:
    """A teacher that asks about the generator's images cannot watch over its training."""
    if generator is None or not isinstance(teacher, DpdfdTeacher) or teacher.ask_about != "generator":
        return []
    if generator.collapse.action == "off":
        return []
    return [
        "`generator.collapse.action: off` must hold with a teacher that asks about the generator's images, "
        f"but got {generator.collapse.action}; use off, or teacher.ask_about: student"
    ]
