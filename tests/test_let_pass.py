"""What the data stage lets pass with a remark, no later stage dies of. In this process, without Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_stage import noise, npz_config
from test_never_destroy import LocalPipeline

from kr_ray.audits.copies import measure_copies
from kr_ray.audits.design import design_audit
from kr_ray.cluster import attack
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.runs.results import DATA, TEACHER
from kr_ray.synthesis.student_set import StudentSpec


def here(name: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *_: Any) -> list[Any]:
    return [function(*values) for values in arguments]


def test_copies_lacking_classes_and_constant_images_end_no_later_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the test images are training images, the validation and the test
    split lack a class each, some images are constant."""
    train, validation, test = noise(90, 1, classes=3), noise(20, 2, classes=2), noise(20, 3, classes=3)
    train.images[30:34] = 7  # one constant image, four times
    test.images[:10], test.images[10:13] = train.images[40:50], 200
    test = LabelledImages(test.images, test.labels.clamp(min=1))
    config = npz_config(
        tmp_path, Splits("odd", ("a", "b", "c"), train, validation, test), max_copied_share=0.5
    )
    small = {"epochs": 1, "checkpoint_every": 1, "d_steps": 1, "batch_size": 16}
    config = config.model_copy(update={"generator": config.generator.model_copy(update=small)})
    with LocalPipeline(config) as pipeline:
        pipeline.run_until("generator")
        run, results = pipeline.run.path, pipeline.results
        said = " | ".join(results[DATA].remarks())
        for part in ("10 of 20 test images are also", "3 of 90 training images repeat",
                     "4 of 90 training images are constant",
                     "3 of 20 test images are constant", "validation split has no image of 1 of 3",
                     "test split has no image of 1 of 3"):  # fmt: skip
            assert part in said
        shutil.copytree(run / "teacher", run / "student")  # any classifier will do
        monkeypatch.setattr(attack, "run_tasks", here)
        attack.train_shadows(run, run / "shadows", config)
        accuracy = results[TEACHER].test_accuracy
        found = attack.attack_models(run, {"teacher": accuracy, "student": accuracy}, 3, config)
        assert found.members == 90 - 3 - 10 and found.non_members == 20 - 10 - 2
        assert found.attack_models[2].note == "no shadow model saw this class"
        spec = StudentSpec(config.generator, 1, config.synthesis, 1, 0)
        copies = measure_copies(run, tmp_path, spec, config.audit.copies.model_copy(update={"images": 20}), 0)
        assert (copies.train, copies.test) == (87, 8)
        design = design_audit(
            Splits("odd", ("a", "b", "c"), train, validation, test), config.audit.worst_case, 1
        )
        assert (
            design.excluded == 4 + 10
            and torch.isin(torch.from_numpy(design.reference), torch.arange(10)).sum() == 0
        )
