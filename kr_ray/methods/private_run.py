"""What a whole run will release of its real images, known before anything starts.

What leaves a run is its student, its generator and what is drawn from it. The private parts of these are the
generator, and the teacher where its answers teach the student. Their events compose to one epsilon; a part
without an event makes it infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from kr_ray.config import Config, ConfigError, DpMerfConfig, Section
from kr_ray.config.dp import DpdfdSection, DpSgdSection, PrivacySection
from kr_ray.config.privacy import readers
from kr_ray.generators.dp_merf.training import plan_dp_merf
from kr_ray.methods.dp_sgd import dp_sgd_recipe, plan_dp_sgd, private_gradients
from kr_ray.methods.dpdfd.plan import plan_dpdfd
from kr_ray.methods.dpdfd.teachers import check_shards
from kr_ray.privacy.accountants import gaussian
from kr_ray.privacy.ledger import Guarantee, LedgerError, calibrate_noise, default_delta, guarantee
from kr_ray.runs.results import DataResult

if TYPE_CHECKING:
    from dp_accounting import DpEvent

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class PrivatePlan:
    """What is promised before anything starts.

    Attributes:
        delta: of every figure.
        training: to the people of the training images.
        validation: to those of the validation images; None where they decide nothing.
        score_noise: noise multiplier of a validation score; None where there are none.
    """

    delta: float
    training: Guarantee
    validation: Guarantee | None
    score_noise: float | None


def plan_private_run(config: Config, training: int, validation: int, scores: int) -> PrivatePlan:
    """Check the keys and compose what will be released; needs no images.

    Args:
        training, validation: images.
        scores: validation scores that select.

    Raises:
        ConfigError: an epsilon or delta out of range, a target that cannot be kept, a batch larger than the
            set or a shard, or a library is missing.
    """
    privacy = config.privacy
    assert privacy is not None, "only private runs are planned"
    delta = run_delta(config, training)
    try:
        events = {
            name: _event_of(config, fitted(config, name, section, training), training)
            for name, section in readers(config).items()
        }
        unit = {"unit": privacy.unit, "group_size": privacy.images_per_unit}
        promised = guarantee(events, training, delta, **unit)  # type: ignore[arg-type]
        _check_kept(config, promised)
        noise = score_noise(config, training, scores) if scores else None
        scored = {"validation scores": gaussian(noise, scores)} if noise else {}
        told = guarantee(scored, validation, delta, **unit) if scored else None  # type: ignore[arg-type]
    except LedgerError as error:
        raise ConfigError(f"privacy: {error}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(str(error)) from error
    return PrivatePlan(delta, promised, told, noise)


def check_part(config: Config, section: Section, data: DataResult) -> None:
    """Refuse a private part that these images cannot bear: a batch larger than the set or a shard, a class
    that shards would miss, an epsilon or delta that cannot be.

    Raises:
        ConfigError: it is refused; other parts never are.
    """
    if isinstance(section, DpSgdSection):
        private_gradients()
    try:
        _event_of(config, section, data.train)
    except ModuleNotFoundError as error:
        raise ConfigError(str(error)) from error
    if isinstance(section, DpdfdSection) and section.accounting == "sound":
        check_shards(torch.tensor(data.class_counts), section.teachers)


def run_delta(config: Config, training: int) -> float:
    """Of the whole run, for so many training images."""
    assert config.privacy is not None
    return default_delta(training) if config.privacy.delta is None else config.privacy.delta


def fitted(config: Config, name: str, section: S, records: int) -> S:
    """The section of part `name`, with what the others leave of the run's target where it says nothing of
    its noise."""
    privacy = config.privacy
    if not isinstance(section, PrivacySection) or not section.is_open:
        return section
    assert privacy is not None and privacy.target_epsilon is not None, "refused with the configuration"
    others = {key: part for key, part in readers(config).items() if key != name}
    spent = {key: _event_of(config, part, records) for key, part in others.items()}
    if missing := [key for key, event in spent.items() if event is None]:
        raise ConfigError(_without_noise(config, missing[0]))
    try:
        noise = calibrate_noise(
            lambda z: _certain(_event_of(config, _with_noise(section, z), records)),
            privacy.target_epsilon,
            run_delta(config, records),
            [event for event in spent.values() if event is not None],
            privacy.images_per_unit,
        )
    except LedgerError as error:
        raise ConfigError(f"{name}: {error}") from error
    return _with_noise(section, noise)


def score_noise(config: Config, training: int, scores: int) -> float:
    """Noise multiplier of each of so many validation scores.

    Raises:
        LedgerError: the run's target cannot be kept with any noise.
    """
    privacy = config.privacy
    assert privacy is not None
    if privacy.score_noise_multiplier is not None:
        return privacy.score_noise_multiplier
    assert privacy.target_epsilon is not None, "refused with the configuration"
    return calibrate_noise(
        lambda z: gaussian(z, scores),
        privacy.target_epsilon,
        run_delta(config, training),
        group_size=privacy.images_per_unit,
    )


def _with_noise(section: S, noise: float) -> S:
    return section.model_copy(update={"noise_multiplier": noise})


def _certain(event: DpEvent | None) -> DpEvent:
    assert event is not None, "an open part is a private one"
    return event


def _event_of(config: Config, section: Section, records: int) -> DpEvent | None:
    match section:
        case DpMerfConfig():
            return plan_dp_merf(section, records)[1]
        case DpSgdSection():
            return plan_dp_sgd(section, dp_sgd_recipe(section, config.classifier), records).event
        case DpdfdSection():
            return plan_dpdfd(section, records).event
        case _:
            return None


def _check_kept(config: Config, promised: Guarantee) -> None:
    """Refuse a run that is known to miss its target."""
    assert config.privacy is not None
    target = config.privacy.target_epsilon
    if target is None:
        return
    if promised.uncovered:
        raise ConfigError(_without_noise(config, promised.uncovered[0]))
    if promised.epsilon > target:
        raise ConfigError(
            f"`privacy.target_epsilon` must be kept by the whole run, but got {target:g}, and "
            f"{' and '.join(promised.covers)} give {promised.epsilon:.4g} at "
            f"delta={promised.delta:.2g}; give them more noise, or leave one part's noise open"
        )


def _without_noise(config: Config, part: str) -> str:
    kinds: Mapping[str, str] = {"generator": config.generator.kind, "teacher": config.teacher.kind}
    remedy = {"generator": "generator.kind: dp_merf", "teacher": "teacher.kind: dp_sgd, or labelling: hard"}
    return (
        f"`privacy.target_epsilon` can only be kept if all parts have noise, but {part} ({kinds[part]}) "
        f"releases private facts without any; use {remedy[part]}"
    )
