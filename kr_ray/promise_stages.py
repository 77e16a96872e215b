"""A private run's part in its stages: what is refused before Ray starts, noise on the scores that decide, and
the one epsilon of all that leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr_ray.config import Section
from kr_ray.config.privacy import selects
from kr_ray.runs.figures import PrivacyRecord
from kr_ray.runs.results import DATA, GuaranteeResult, PrivateResult
from kr_ray.stages import StageRunner

if TYPE_CHECKING:
    from kr_ray.dp.scores import NoisyScores


class PromiseStages(StageRunner):
    """What a run does for its promise to the people of its images; nothing where it makes none."""

    _checked = False

    def _check_privacy(self) -> None:
        """Refuse private parts that the images cannot bear, and a private run whose promise cannot be kept,
        before Ray is started for any of it; once, for fitting noise takes seconds.

        Raises:
            ConfigError: see `check_part` and `plan_private_run`.
        """
        from kr_ray.methods.private_run import check_part, fitted, plan_private_run

        c, data = self.config, self.results[DATA]
        if self._checked:
            return
        if c.privacy is not None:
            plan_private_run(c, data.train, data.validation, sum(self._scores().values()))
        for name, part in (("generator", c.generator), ("teacher", c.teacher)):
            check_part(c, fitted(c, name, part, data.train), data)
        self._checked = True

    def _check_part(self, section: Section) -> None:
        from kr_ray.methods.private_run import check_part

        check_part(self.config, section, self.results[DATA])

    def _scores(self) -> dict[str, int]:
        """Validation scores that decide anything, by stage."""
        from kr_ray.cluster.sweep import selection_scores

        return selection_scores(self.config) if selects(self.config) else {}

    def _noise_of_scores(self) -> list[Any]:
        """What decides it, for fingerprints."""
        if self.config.privacy is None:
            return []
        privacy = self.config.privacy
        noise = [privacy.score_noise_multiplier, privacy.insecure_noise_key, sum(self._scores().values())]
        return [*privacy.aims, *noise]

    @contextmanager
    def _noisy_scores(self, stage: str, folder: Path) -> Iterator[NoisyScores | None]:
        """How the stage's students are judged in a private run; None: as they are. Within the block its key
        lies in the folder, and stays there if the block is left by an error, to be taken up again."""
        privacy = self.config.privacy
        if privacy is None:
            yield None
            return
        from kr_ray.dp.scores import NoisyScores
        from kr_ray.methods.private_run import score_noise

        data, scores = self.results[DATA], self._scores()
        noise = score_noise(self.config, data.train, sum(scores.values()))
        noisy = NoisyScores(folder, noise, data.validation, scores[stage], privacy.insecure_noise_key)
        noisy.begin()
        yield noisy
        noisy.end()

    def _of_scores(self, scores: NoisyScores | None) -> PrivacyRecord | None:
        """What a stage's scores told of the validation images."""
        if scores is None:
            return None
        from kr_ray.dp.release import privacy_record
        from kr_ray.methods.private_run import run_delta
        from kr_ray.privacy.accountants import gaussian

        event = gaussian(scores.noise_multiplier, scores.scores)
        delta = run_delta(self.config, self.results[DATA].train)
        return privacy_record(
            "validation scores",
            event,
            scores.images,
            delta,
            bool(scores.insecure_key),
            noise_multiplier=scores.noise_multiplier,
            scores=scores.scores,
        )

    def _guarantee(self, folder: Path) -> GuaranteeResult:
        """One epsilon for all that leaves: the events of every stage that the student stands on. A stage that
        reads real images and has none makes it infinite."""
        from kr_ray.methods.private_run import run_delta
        from kr_ray.privacy.whole_run import Reader, whole_run
        from kr_ray.runs.figures import Bound

        privacy, data = self.config.privacy, self.results[DATA]
        assert privacy is not None
        found, stages = dict(self.results.items()), []
        insecure = False
        for name in sorted(self.ancestors("student")):
            result = found[name]
            told = result.privacy if isinstance(result, PrivateResult) else None
            insecure |= bool(told and told.guarantee.insecure_noise)
            stages.append(Reader(name, self.stages[name].reads, told.release if told else None))
        bounds = whole_run(
            stages,
            {"training": data.train, "validation": data.validation},
            run_delta(self.config, data.train),
            unit=privacy.unit,
            group_size=privacy.images_per_unit,
            insecure_noise=insecure,
        )
        told_of = {split: bound for split, bound in bounds.items() if bound.covers or bound.uncovered}
        return GuaranteeResult(
            bounds={split: Bound.model_validate(bound.record()) for split, bound in told_of.items()},
            words={split: bound.words() for split, bound in told_of.items()},
        )
