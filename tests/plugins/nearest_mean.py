"""A throw-away method, in one file outside the package: each
image gets the class whose mean image is nearest.

Nearest class mean is a linear classifier: logits = 2 x.m - m.m, up to a constant.
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
from kr_ray.config import MethodSection
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.interface import ClassifierPart, Part, Site
from kr_ray.runs.results import ClassifierResult
from kr_ray.runs.stages import WEIGHTS_FILE, Save, State


class NearestMeanSection(MethodSection):
    kind: Literal["nearest_mean"] = "nearest_mean"
    shrinkage: float = 0.0
    """Share of the mean of all images in each class's mean."""

    def member(self) -> NearestMean:
        return NearestMean(self)


SECTIONS = (NearestMeanSection,)


@dataclass(frozen=True)
class NearestMean:
    section: NearestMeanSection
    title: str = "Nearest class mean"
    note: str = "no training: a mean feature per class"
    takes_over: tuple[str, ...] = ()

    def parts(self, site: Site, name: str) -> Sequence[ClassifierPart]:
        def work(folder: Path, state: State | None, save: Save) -> ClassifierResult | None:
            return None if worker_rank() else self.fit(site, folder)

        return [Part(name=name, inputs=[self.section], result=ClassifierResult, work=work)]

    def fit(self, site: Site, folder: Path) -> ClassifierResult:
        """The means are those of the features of an untrained network, whose head they become."""
        splits = load_stored_splits(site.path / SPLITS_FILE)
        model = new_classifier(splits.num_classes, splits.channels, site.config.classifier, site.seed).eval()
        with torch.inference_mode():
            features = model.features(splits.train.images.float() / 127.5 - 1)
        of_class = [features[splits.train.labels == k].mean(0) for k in range(splits.num_classes)]
        means = torch.lerp(torch.stack(of_class), features.mean(0, keepdim=True), self.section.shrinkage)
        head = dict(model.named_children())["head"]
        head.weight.data, head.bias.data = 2 * means, -(means**2).sum(1)
        save_classifier(folder / WEIGHTS_FILE, model)
        on_test, on_validation = (
            predict_logits(model, part.images, torch.device("cpu"))
            for part in (splits.test, splits.validation)
        )
        return ClassifierResult(
            test_accuracy=accuracy(on_test, splits.test.labels),
            test_loss=0.0,
            val_accuracy=accuracy(on_validation, splits.validation.labels),
            confusion=confusion_matrix(on_test, splits.test.labels),
            steps=0,
            images_seen=len(splits.train),
            batch_size=1,
            learning_rate=0.0,
            parameters=means.numel(),
            seconds=0.0,
        )
