"""Validation scores with noise: made at the one place where an accuracy on validation images is counted, so
that whatever is chosen by them is post-processing. The people of the validation images pay for it, those of
the training images do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kr_ray.dp.noise import forget_key, noise_key


@dataclass(frozen=True)
class NoisyScores:
    """How a stage's students are judged.

    Attributes:
        folder: of the stage, where its key lies until the stage is done.
        noise_multiplier: standard deviation of the noise on the number of correct answers, of which one image
            changes one.
        images: that every score is counted on.
        scores: at most so many are made.
        insecure_key: see `kr_ray.dp.noise.noise_key`.
    """

    folder: Path
    noise_multiplier: float
    images: int
    scores: int
    insecure_key: str = ""

    def begin(self) -> None:
        """Lay down the key, before the first of many workers asks for it."""
        noise_key(self.folder, self.insecure_key)

    def end(self) -> None:
        """Forget the key: all scores stand in the stage's folder."""
        forget_key(self.folder)

    def of(self, accuracy: float, student: str, tick: int) -> float:
        """The noisy accuracy in [0, 1] of a student, named by all that decides it, after so many ticks.

        Asked again it is the same.
        """
        key = noise_key(self.folder, self.insecure_key)
        noise = float(key.gaussian((1,), "score", student, tick))
        return min(1.0, max(0.0, accuracy + self.noise_multiplier * noise / self.images))
