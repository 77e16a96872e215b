"""A throw-away method, in one file outside the package, that knows its training images by heart and yet says
that it is private: least squares on the features of an untrained network.

With as many features as images the fit goes through every label, wrong ones included. `ridge` trades that
for something smoother. Its guarantee is a lie, as of a mechanism whose noise is off and whose ledger does not
know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kr_ray.classifiers.networks import new_classifier, save_classifier
from kr_ray.classifiers.predict import accuracy, confusion_matrix, predict_logits
from kr_ray.compute.parallel import worker_rank
from kr_ray.config import MainKey, MethodSection
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.interface import ClassifierPart, Part, Site
from kr_ray.privacy.ledger import Guarantee
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import WEIGHTS_FILE, Save, State


class LeastSquaresSection(MethodSection):
    kind: Literal["least_squares"] = "least_squares"
    ridge: float = 1e-6
    """Relative to the largest eigenvalue of the features' covariance."""
    claimed_epsilon: float = 0.1

    def main_key(self) -> MainKey:
        return MainKey(name="ridge", low=1e-8, high=1e4, rising=False, start=self.ridge)

    def member(self) -> LeastSquares:
        return LeastSquares(self)


SECTIONS = (LeastSquaresSection,)


@dataclass(frozen=True)
class LeastSquares:
    section: LeastSquaresSection
    title: str = "Least squares"
    note: str = "knows its images by heart and says that it is private"
    takes_over: tuple[str, ...] = ()

    def parts(self, site: Site, name: str) -> Sequence[ClassifierPart]:
        def work(folder: Path, state: State | None, save: Save) -> ClassifierResult | None:
            return None if worker_rank() else self.fit(site, folder)

        return [Part(name=name, inputs=[self.section], result=ClassifierResult, work=work)]

    def fit(self, site: Site, folder: Path) -> ClassifierResult:
        splits = load_stored_splits(site.path / SPLITS_FILE)
        model = new_classifier(splits.num_classes, splits.channels, site.config.classifier, 0).eval()
        with torch.inference_mode():
            features = model.features(splits.train.images.float() / 127.5 - 1).double()
        mean = features.mean(0)
        centred = features - mean
        scale = torch.linalg.matrix_norm(centred, 2) ** 2
        wanted = 8 * (torch.nn.functional.one_hot(splits.train.labels, splits.num_classes).double() - 0.1)
        gram = centred.T @ centred + self.section.ridge * scale * torch.eye(len(mean), dtype=torch.float64)
        weights = torch.linalg.solve(gram, centred.T @ wanted).T
        head = dict(model.named_children())["head"]
        head.weight.data, head.bias.data = weights.float(), -(weights @ mean).float()
        save_classifier(folder / WEIGHTS_FILE, model)
        on_test, on_validation = (
            predict_logits(model, part.images, torch.device("cpu"))
            for part in (splits.test, splits.validation)
        )
        claimed = Guarantee(
            epsilon=self.section.claimed_epsilon, delta=1e-5, accountant="PLD", covers=("least_squares",),
            uncovered=(), records=len(splits.train),
        )  # fmt: skip
        return ClassifierResult(
            test_accuracy=accuracy(on_test, splits.test.labels),
            test_loss=0.0,
            val_accuracy=accuracy(on_validation, splits.validation.labels),
            confusion=confusion_matrix(on_test, splits.test.labels),
            steps=1,
            images_seen=len(splits.train),
            batch_size=len(splits.train),
            learning_rate=0.0,
            parameters=weights.numel(),
            seconds=0.1,
            privacy={"release": {}, "guarantee": claimed.record(), "words": claimed.words()},
        )
