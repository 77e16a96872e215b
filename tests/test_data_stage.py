"""What the data stage refuses, says and sees again: leaks between splits,
empty images, edits behind links, foreign artefacts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from kr_ray.cli import main
from kr_ray.config import Config, ConfigError
from kr_ray.data.checks import DataError
from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.remarks import check_copies, count_copies, remark
from kr_ray.data.store import load_stored_splits
from kr_ray.pipeline import Pipeline
from kr_ray.runs.artifacts import RunDirectory, read_json, write_json


class Notices:
    """A watcher that only listens."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.skipped: dict[str, bool] = {}

    def stage_started(self, stage: str) -> None: ...
    def stage_progress(self, stage: str, progress: object) -> None: ...
    def stage_finished(self, stage: str, result: dict[str, Any], skipped: bool) -> None:
        self.skipped[stage] = skipped

    def notice(self, text: str) -> None:
        self.texts.append(text)


def run(config: Config, until: str = "data") -> tuple[dict[str, Any], Notices]:
    notices = Notices()
    with Pipeline(config, notices) as pipeline:
        return pipeline.run_until(until).model_dump(), notices


def noise(count: int, seed: int, classes: int = 2) -> LabelledImages:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(50, 256, (count, 1, 16, 16), generator=random, dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count) % classes)


def noise_splits(test_copies: int = 0, validation_copies: int = 0, repeated: int = 0) -> Splits:
    train, validation, test = noise(100, 1), noise(20, 2), noise(40, 3)
    train.images[100 - repeated :] = train.images[:repeated]
    test.images[:test_copies] = train.images[40 : 40 + test_copies]
    validation.images[:validation_copies] = train.images[:validation_copies]
    return Splits("noise", ("a", "b"), train, validation, test)


def write_npz(path: Path, splits: Splits) -> Path:
    arrays = {}
    for key, part in (("train", splits.train), ("val", splits.validation), ("test", splits.test)):
        arrays[f"{key}_images"], arrays[f"{key}_labels"] = part.images[:, 0].numpy(), part.labels.numpy()
    np.savez(path, **arrays)
    return path


def npz_config(tmp_path: Path, splits: Splits, **data: Any) -> Config:
    path = write_npz(tmp_path / "set.npz", splits)
    keys = {
        "name": "npz",
        "path": str(path),
        "image_size": 16,
        "max_train_images": 0,
        "max_test_images": 0,
    } | data
    return tiny_config(data=keys, storage=str(tmp_path / "runs"))


# --- leaks between splits -----------------------------------------------------------------------------------


def test_copies_are_counted_as_constructed() -> None:
    counts = count_copies(noise_splits(test_copies=3, validation_copies=2, repeated=5))
    assert counts.model_dump() == {
        "within_train": 5,
        "validation_in_train": 2,
        "test_in_train": 3,
        "test_in_validation": 0,
        "distinct_train": 100
        - 5
        - 5
        - 3,  # the repeated with their originals (two of which are validation's), and the test's
    }


def test_sound_splits_get_no_remark_and_no_refusal() -> None:
    splits = noise_splits()
    counts = count_copies(splits)
    check_copies(splits, counts, 0.0)
    assert counts.model_dump() == dict.fromkeys(counts.model_dump(), 0) | {"distinct_train": 100}
    assert remark(splits, counts) == []


def test_a_few_copies_are_said_and_more_are_refused_with_a_remedy(tmp_path: Path) -> None:
    few, notices = run(npz_config(tmp_path, noise_splits(test_copies=4)))
    assert few["duplicates"]["test_in_train"] == 4
    expected = (
        "4 of 40 test images are also training images: test accuracies count "
        "them, the audit and the copies stage leave them out"
    )
    assert few["remarked"] == [expected] and notices.texts == [f"data: {expected}"]
    many = npz_config(tmp_path, noise_splits(test_copies=5, validation_copies=3))
    with pytest.raises(
        DataError, match=r"<= 0\.1` must hold.*3 of 20 validation.*5 of 40 test.*remove the copies"
    ) as caught:
        run(many)
    assert "data.max_copied_share" in str(caught.value)
    assert run(npz_config(tmp_path, noise_splits(test_copies=5, validation_copies=3), max_copied_share=0.2))[
        0
    ]["remarked"]


def test_a_test_set_inside_the_training_set_is_refused_by_the_data_stage(tmp_path: Path) -> None:
    splits = noise_splits()
    inside = Splits(
        "inside", splits.class_names, splits.train, splits.train.subset(torch.arange(20)), splits.train
    )
    with pytest.raises(
        DataError, match=r"20 of 20 validation images are also training images; 100 of 100 test images"
    ):
        run(npz_config(tmp_path, inside, max_copied_share=0.5))
    assert not (tmp_path / "runs" / "tiny" / "data" / "done.json").exists()


def test_constant_images_are_refused_as_copies_and_called_constant(tmp_path: Path) -> None:
    black = {
        n: LabelledImages(torch.zeros(n, 1, 16, 16, dtype=torch.uint8), torch.arange(n) % 2)
        for n in (40, 20, 21)
    }
    with pytest.raises(
        DataError, match=r"constant images, all pixels alike: 40 training, 20 validation, 21 test"
    ):
        run(npz_config(tmp_path, Splits("black", ("a", "b"), black[40], black[20], black[21])))


def test_empty_images_and_lacking_classes_get_a_remark() -> None:
    splits = noise_splits()
    splits.train.images[7], splits.train.images[9] = 80, 90
    splits.test.images[:3] = torch.tensor([0, 1], dtype=torch.uint8).repeat(128).view(16, 16)
    splits.test.images[1, 0, 0, 0], splits.test.images[2, 0, 0, 1] = 2, 2  # three different ones
    lacking = Splits(
        "x", ("a", "b"), splits.train, splits.validation.subset(splits.validation.labels == 0), splits.test
    )
    assert remark(lacking, count_copies(lacking)) == [
        "2 of 100 training images are constant, all pixels alike (the first: number 7)",
        "the validation split has no image of 1 of 2 classes (b): its figures say nothing on them",
        "3 of 40 test images are nearly black, no value above 10 of 255 (the first: number 0); were they "
        "scaled to [0, 1] before they were saved?",
    ]


def test_an_audit_that_the_data_cannot_bear_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    one, other = noise_splits(), noise_splits()
    one.train.images[:] = other.train.images[0]  # one picture, a hundred times
    config = npz_config(tmp_path, one)
    worst_case = config.audit.worst_case.model_copy(update={"arms": ("teacher",)})
    config = config.model_copy(update={"audit": config.audit.model_copy(update={"worst_case": worst_case})})
    with pytest.raises(DataError, match=r"audit\.worst_case\.canaries <= 0"):
        run(config, "report")
    assert not (tmp_path / "runs" / "tiny" / "teacher").exists()


# --- stale and foreign inputs -------------------------------------------------------------------------------


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12), dtype=np.uint8))


def farm(tmp_path: Path) -> Path:
    """Class folders that are links into an archive."""
    for k, name in enumerate("ab"):
        (tmp_path / "archive" / name).mkdir(parents=True)
        for i in range(60):
            picture(1000 * k + i).save(tmp_path / "archive" / name / f"{i:03d}.png")
    (tmp_path / "farm").mkdir()
    for name in "ab":
        (tmp_path / "farm" / name).symlink_to(tmp_path / "archive" / name)
    return tmp_path / "farm"


def test_an_edit_behind_linked_class_folders_is_read_again(tmp_path: Path) -> None:
    data = {
        "name": "folder",
        "path": str(farm(tmp_path)),
        "image_size": 16,
        "max_train_images": 0,
        "max_test_images": 0,
    }
    config = tiny_config(data=data, storage=str(tmp_path / "runs"))
    first, _ = run(config)
    assert run(config)[1].skipped == {"data": True}
    for i in range(60, 70):
        picture(i).save(tmp_path / "archive" / "a" / f"{i:03d}.png")
    second, notices = run(config)
    assert notices.skipped == {"data": False}
    assert sum(second[split] - first[split] for split in ("train", "validation", "test")) == 10
    picture(99).save(tmp_path / "archive" / "b" / "000.png")
    assert run(config)[0]["digest"] != second["digest"]


@pytest.mark.parametrize("harm", ["another_run's", "deleted"])
def test_the_stored_images_are_those_of_the_digest_or_are_read_again(tmp_path: Path, harm: str) -> None:
    config = npz_config(tmp_path, noise_splits())
    result, _ = run(config)
    stored = tmp_path / "runs" / "tiny" / "data" / "splits.safetensors"
    if harm == "deleted":
        stored.unlink()
    else:
        other = tmp_path / "other"
        other.mkdir()
        run(npz_config(other, Splits("other", ("a", "b"), noise(100, 7), noise(20, 8), noise(40, 9))))
        shutil.copy(other / "runs" / "tiny" / "data" / "splits.safetensors", stored)
        assert load_stored_splits(stored).digest() != result["digest"]
    again, notices = run(config)
    assert again["digest"] == result["digest"] == load_stored_splits(stored).digest()
    assert (
        len(notices.texts) == 1
        and str(stored) in notices.texts[0]
        and "data is made again" in notices.texts[0]
    )


def test_runs_inside_the_data_folder_are_refused(tmp_path: Path) -> None:
    data = {"name": "folder", "path": str(farm(tmp_path)), "image_size": 16}
    with pytest.raises(ConfigError, match=r"storage` must not lie in data\.path"):
        run(tiny_config(data=data, storage=str(tmp_path / "farm" / "runs")))


def test_other_threads_than_the_default_are_other_inputs() -> None:
    def stamp(stage: str, **cluster: Any) -> str:
        pipeline = Pipeline(tiny_config(cluster=cluster), Notices())
        pipeline.prints |= dict.fromkeys(pipeline.stages, "of those before")
        return pipeline.stamp(pipeline.stages[stage])

    trial, train = {"trial": {"cpu": 1.0}}, {"train": {"cpu": 2.0}}
    assert (
        stamp("shadows", **trial)
        == stamp("shadows", trial={"cpu": 0.5})
        != stamp("shadows", trial={"cpu": 2.0})
    )
    assert (
        stamp("teacher", **train)
        == stamp("teacher", **train, trial={"cpu": 2.0})
        != stamp("teacher", train={"cpu": 4.0})
    )


# --- never destroy ------------------------------------------------------------------------------------------


def test_a_wrong_parquet_set_is_refused_at_once_and_costs_no_finished_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = npz_config(tmp_path, noise_splits())
    run(config)
    directory = RunDirectory(tmp_path / "runs" / "tiny")
    folder = directory.begin("student", "of the generator")
    (folder / "weights.safetensors").write_text("the student")
    directory.finish("student", "of the generator", {"test_accuracy": 0.9})
    table = {
        "image": pa.array([[1, 2, 3]] * 20, pa.list_(pa.uint8(), 3)),
        "soft_label": pa.array([[0.1] * 10] * 20, pa.list_(pa.float32(), 10)),
    }
    pq.write_table(pa.table(table), tmp_path / "wrong.parquet")
    write_json(tmp_path / "config.yaml", config.model_dump(mode="json"))  # JSON is YAML
    assert (
        main(
            [
                "student",
                str(tmp_path / "config.yaml"),
                "--set",
                f"student.from_parquet={tmp_path / 'wrong.parquet'}",
            ]
        )
        == 2
    )
    assert "wrong.parquet" in capsys.readouterr().err
    assert (folder / "weights.safetensors").read_text() == "the student"
    assert RunDirectory(directory.path).result("student", "of the generator") == {"test_accuracy": 0.9}


def test_what_another_process_cannot_remove_ends_the_command_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = npz_config(tmp_path, noise_splits())
    folder = tmp_path / "runs" / "tiny" / "data"
    folder.mkdir(parents=True)
    write_json(folder / "started.json", {"fingerprint": "of others", "spent_s": 1.0})

    def refuse(path: str) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    write_json(tmp_path / "config.yaml", config.model_dump(mode="json"))
    assert main(["teacher", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert "can be removed" in error and str(folder) in error and "Error:" not in error
    assert read_json(folder / "started.json")["fingerprint"] == "of others"
