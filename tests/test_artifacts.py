"""The run directory: nothing half-written, nothing of other inputs reused, one driver at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kr_ray.data.images import LabelledImages, Splits
from kr_ray.data.store import load_stored_splits, save_splits
from kr_ray.runs.artifacts import (
    ArtifactError,
    RunDirectory,
    atomic_write,
    fingerprint,
    list_runs,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    with pytest.raises(OSError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert read_json(path) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_and_metadata_survive_and_garbage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": torch.arange(3)}, {"width": 4})
    tensors, metadata = load_tensors(path)
    assert tensors["a"].tolist() == [0, 1, 2] and metadata == {"width": 4}
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ArtifactError, match="delete it"):
        load_tensors(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        load_tensors(tmp_path / "none")


def test_fingerprints_ignore_key_order_only() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_a_stage_is_done_for_its_inputs_only_and_partial_work_of_others_is_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    folder = run.begin("teacher", "one")
    (folder / "partial").touch()
    assert run.begin("teacher", "one") == folder and (folder / "partial").exists()
    assert run.result("teacher", "one") is None
    run.finish("teacher", "one", {"accuracy": 0.9})
    assert run.result("teacher", "one") == {"accuracy": 0.9}
    assert run.result("teacher", "two") is None
    attempt = run.begin("teacher", "two")
    assert not (attempt / "partial").exists()
    run.finish("teacher", "two", {"accuracy": 0.8})
    assert not (folder / "partial").exists()
    assert run.result("teacher", "one") is None


def test_one_driver_at_a_time_and_a_killed_one_is_seen(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "demo")
    with run:
        run.set_status(state="running")
        with pytest.raises(ArtifactError, match="in use"), RunDirectory(tmp_path / "demo"):
            pass
        assert [status.state for status in list_runs(tmp_path).values()] == ["running"]
    assert [status.state for status in list_runs(tmp_path).values()] == ["finished"]
    run.set_status(state="running")  # as a killed driver leaves it
    assert [status.state for status in list_runs(tmp_path).values()] == ["killed"]


def test_stored_splits_are_the_same_bytes(tmp_path: Path) -> None:
    def part(seed: int) -> LabelledImages:
        random = torch.Generator().manual_seed(seed)
        return LabelledImages(
            torch.randint(0, 256, (5, 3, 8, 8), generator=random).to(torch.uint8), torch.arange(5) % 2
        )

    splits = Splits("made", ("a", "b"), part(1), part(2), part(3))
    save_splits(tmp_path / "s.safetensors", splits)
    stored = load_stored_splits(tmp_path / "s.safetensors")
    assert stored.digest() == splits.digest() and stored.class_names == ("a", "b")
