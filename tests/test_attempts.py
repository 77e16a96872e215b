"""A finished result stays until its successor is whole, is known by its
bytes, and no damaged file of a run blocks it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kr_ray.runs.artifacts import (
    ArtifactError,
    RunDirectory,
    fingerprint,
    list_runs,
    load_state,
    load_tensors,
    read_json,
    save_state,
    save_tensors,
    write_json,
)
from kr_ray.runs.attempts import beside, replace_folder, stage_name
from kr_ray.runs.storage import LocationError, RemotePath, list_files, remove_tree, sha256_of


def work(run: RunDirectory, inputs: str, value: int, stage: str = "teacher") -> Path:
    """A whole stage, whose artefact holds `value`; returns the folder it was made in."""
    folder = run.begin(stage, inputs)
    save_tensors(folder / "weights.safetensors", {"value": torch.tensor([value])})
    run.finish(stage, inputs, {"value": value})
    return folder


def weights(run: RunDirectory, stage: str = "teacher") -> int:
    return int(load_tensors(run / stage / "weights.safetensors")[0]["value"])


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def run(tmp_path: Path, told: list[str]) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "demo", told.append)


# --- never destroy before the successor stands --------------------------------------------------------------


def test_a_finished_result_stays_where_it_is_until_its_successor_is_whole(run: RunDirectory) -> None:
    assert work(run, "one", 1) == run / "teacher"  # nothing to keep: no second folder
    attempt = run.begin("teacher", "two")
    assert attempt == beside(run / "teacher") and stage_name(attempt) == "teacher"
    save_tensors(attempt / "weights.safetensors", {"value": torch.tensor([2])})
    run.heartbeat("teacher", 3.0, {})
    assert weights(run) == 1 and run.result("teacher", "one") == {
        "value": 1
    }  # as a failed or killed attempt leaves it
    assert (
        run.begin("teacher", "two") == attempt and run.spent_s("teacher") == 3.0
    )  # which goes on from what it has
    run.finish("teacher", "two", {"value": 2})
    assert (
        weights(run) == 2
        and run.result("teacher", "two") == {"value": 2}
        and run.result("teacher", "one") is None
    )
    assert not attempt.exists()


def test_an_attempt_on_yet_other_inputs_begins_empty_and_the_result_still_stays(run: RunDirectory) -> None:
    work(run, "one", 1)
    (run.begin("teacher", "two") / "partial").touch()
    assert not (run.begin("teacher", "three") / "partial").exists()
    assert run.result("teacher", "one") == {"value": 1}


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_kill_while_the_successor_takes_its_place_loses_neither(run: RunDirectory, moment: str) -> None:
    work(run, "one", 1)
    attempt = run.begin("teacher", "two")
    save_tensors(attempt / "weights.safetensors", {"value": torch.tensor([2])})
    shutil.copytree(run / "teacher", run.path / "kept")
    shutil.copytree(attempt, run.path / "attempt")
    run.finish("teacher", "two", {"value": 2})
    done = (run / "teacher" / "done.json").read_bytes()
    shutil.rmtree(run / "teacher")  # back to the moment after the marker was written
    (run.path / "attempt").rename(attempt)
    (attempt / "done.json").write_bytes(done)
    if moment == "before":
        (run.path / "kept").rename(run / "teacher")
    assert RunDirectory(run.path).result("teacher", "two") == {"value": 2}
    assert weights(run) == 2 and not attempt.exists()


def test_a_folder_moved_to_another_disk_and_linked_back_is_emptied_and_keeps_its_place(
    run: RunDirectory, tmp_path: Path
) -> None:
    (work(run, "one", 1) / "old_state").touch()
    disk = tmp_path / "disk"
    disk.mkdir()
    shutil.move(run / "teacher", disk / "teacher")
    (run / "teacher").symlink_to(disk / "teacher")
    assert run.result("teacher", "one") == {"value": 1}
    assert work(run, "two", 2).parent == disk  # there is room there
    assert weights(run) == 2 and not (run / "teacher" / "old_state").exists()
    assert (run / "teacher").is_symlink() and list(disk.iterdir()) == [disk / "teacher"]
    (run / "teacher" / "done.json").unlink()
    (run / "teacher" / "old_state").touch()  # partial work of other inputs behind the link
    assert not (run.begin("teacher", "three") / "old_state").exists()
    run.finish("teacher", "three", {})
    assert (run / "teacher").is_symlink() and run.result("teacher", "three") == {}


def test_a_stage_whose_folder_is_shared_by_all_inputs_keeps_it(run: RunDirectory) -> None:
    """The worst case: its scores name their own inputs, so that with more models the others still stand."""
    folder = run.begin("worst_case", "worst_case")
    (folder / "scores").touch()
    run.finish("worst_case", "4 models", {"models": 4})
    assert run.begin("worst_case", "worst_case") == folder and (folder / "scores").exists()
    assert run.result("worst_case", "4 models") == {"models": 4} == run.latest("worst_case")


def test_what_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "full").mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(
        LocationError,
        match=r"full` must be a folder that can be removed.*Permission denied.*remove it yourself",
    ):
        remove_tree(tmp_path / "full")


def test_a_link_to_a_folder_stays_and_what_is_in_the_folder_goes(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    remove_tree(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and list((tmp_path / "target").iterdir()) == []
    remove_tree(tmp_path / "nothing")


def test_bytes_are_on_the_disk_before_their_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or rename(*paths))
    save_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)})
    save_state(tmp_path / "state.pt", {"a": 1})
    write_json(tmp_path / "done.json", {})
    assert calls == ["fsync", "replace"] * 3
    write_json(tmp_path / "progress.json", {}, durable=False)
    assert calls[6:] == ["replace"]


# --- artefacts are known by their bytes ---------------------------------------------------------------------


def test_the_done_marker_names_every_output_with_its_hash(run: RunDirectory) -> None:
    folder = run.begin("generator", "one")
    for name in (
        "checkpoints/epoch_0001.safetensors",
        "scores_00.npz",
        "report.html",
        "state.pt",
        "tiny/state.pt",
        "progress/a.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    run.finish("generator", "one", {})
    outputs = read_json(folder / "done.json")["outputs"]
    assert set(outputs) == {"checkpoints/epoch_0001.safetensors", "scores_00.npz", "report.html"}
    for name, output in outputs.items():
        assert output["sha256"] == hashlib.sha256(name.encode()).hexdigest() and output["size"] == len(name)


@pytest.mark.parametrize("harm", ["another_run's", "deleted", "one_bit", "a_folder"])
def test_an_output_that_is_not_what_was_written_is_made_again_and_said(
    run: RunDirectory, tmp_path: Path, told: list[str], harm: str
) -> None:
    work(run, "one", 1)
    other = RunDirectory(tmp_path / "runs" / "other")
    work(other, "one", 2)
    path = run / "teacher" / "weights.safetensors"
    if harm == "another_run's":
        shutil.copy(other / "teacher" / "weights.safetensors", path)
    elif harm == "one_bit":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
        if harm == "a_folder":
            path.mkdir()
    assert run.result("teacher", "one") is None
    assert run.result("teacher", "one") is None
    assert len(told) == 1 and str(path) in told[0] and "teacher is made again" in told[0]
    work(run, "one", 1)
    assert run.result("teacher", "one") == {"value": 1} and weights(run) == 1


def test_a_copied_run_still_stands_and_is_read_once(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(run, "one", 1)
    shutil.copytree(run.path, tmp_path / "copy", copy_function=shutil.copyfile)  # other times
    read: list[Path] = []
    monkeypatch.setattr("kr_ray.runs.outputs.sha256_of", lambda path: read.append(path) or sha256_of(path))
    for _ in range(2):
        assert RunDirectory(tmp_path / "copy").result("teacher", "one") == {"value": 1}
        assert len(read) == 1


def test_bytes_that_changed_without_a_sign_are_found_before_they_are_used(run: RunDirectory) -> None:
    work(run, "one", 1)
    path = run / "teacher" / "weights.safetensors"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run.result("teacher", "one") == {"value": 1}
    with pytest.raises(
        ArtifactError,
        match=r"weights\.safetensors` must hold what its stage wrote.* delete it and run the same command",
    ):
        run.begin("student", "of the teacher")
    path.unlink()  # the remedy
    again = RunDirectory(run.path)
    assert again.result("teacher", "one") is None
    work(again, "one", 1)
    again.begin("student", "of the teacher")


# --- damaged files of a run ---------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "null": lambda path: path.write_text("null"),
    "list": lambda path: path.write_text("[]"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "binary": lambda path: path.write_bytes(bytes(range(128, 256))),
    "deep": lambda path: path.write_text("[" * 100_000),
    "folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()),
    "wrong_types": lambda path: path.write_text(
        '{"fingerprint": 1, "spent_s": "x", "state": 7, "updated": "now", "share": []}'
    ),
    "result_removed": lambda path: write_json(path, read_json(path) | {"result": {}}),
}


@pytest.mark.parametrize("file", ["teacher/done.json", "teacher/started.json", "status.json"])
@pytest.mark.parametrize("harm", DAMAGE)
def test_no_damaged_file_of_a_run_blocks_it(run: RunDirectory, file: str, harm: str) -> None:
    with run:
        work(run, "one", 1)
    DAMAGE[harm](run / file)
    with RunDirectory(run.path) as again:
        if again.result("teacher", "one") is None:
            again.begin("teacher", "one")
            again.heartbeat("teacher", again.spent_s("teacher"), {})
            work(again, "one", 1)
        assert again.result("teacher", "one") == {"value": 1} and weights(again) == 1
    assert read_json(run / "status.json")["state"] == "finished"


def test_what_a_damaged_marker_lies_beside_is_kept_until_its_successor_stands(run: RunDirectory) -> None:
    work(run, "one", 1)
    (run / "teacher" / "done.json").write_text("")
    assert run.begin("teacher", "one") == run / "teacher"  # whose state goes on from its end
    (run / "teacher" / "done.json").write_text("")
    assert run.begin("teacher", "two") == beside(run / "teacher") and weights(run) == 1
    work(run, "two", 2)
    assert weights(run) == 2 and run.result("teacher", "two") == {"value": 2}


def test_what_version_0_1_finished_stands(run: RunDirectory) -> None:
    """It sealed nothing and recorded no outputs."""
    work(run, "one", 1)
    (run / "teacher" / "done.json").write_text('{"fingerprint": "one", "result": {"value": 1}}')
    assert run.result("teacher", "one") == {"value": 1} and run.stands_since_version_0_1("teacher", "one")
    assert run.result("teacher", "two") is None and not run.stands_since_version_0_1("teacher", "two")
    assert run.begin("teacher", "two") == beside(run / "teacher") and weights(run) == 1


def test_a_changed_result_is_not_taken_for_the_one_that_was_written(run: RunDirectory) -> None:
    work(run, "one", 1)
    path = run / "teacher" / "done.json"
    write_json(path, read_json(path) | {"result": {"value": 9}})
    assert run.result("teacher", "one") is None and run.latest("teacher") is None


def test_a_damaged_training_state_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": torch.tensor(3)})
    whole = path.read_bytes()
    for content in (b"", b"junk" * 99, bytes(len(whole)), whole[:-40], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert load_state(path) is None
    path.write_bytes(whole)
    assert load_state(path) == {"step": torch.tensor(3)}


def test_what_ray_train_would_refuse_of_a_killed_attempt_is_removed(tmp_path: Path) -> None:
    from kr_ray.cluster.train import drop_damaged

    folder, snapshot = (
        tmp_path / "tiny_teacher",
        tmp_path / "tiny_teacher" / "checkpoint_manager_snapshot.json",
    )
    drop_damaged(folder)  # the first attempt
    sound = {
        "ray_version": "2",
        "checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}],
        "current_report_index": 1,
    }

    def leave(text: str) -> None:
        (folder / "checkpoint_1").mkdir(parents=True, exist_ok=True)
        snapshot.write_text(text)
        drop_damaged(folder)

    for whole in (sound, sound | {"checkpoint_results": []}):
        leave(json.dumps(whole))
        assert snapshot.exists() and (folder / "checkpoint_1").exists()
    of_another = json.dumps(sound | {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2"}]})
    for text in ("", "null", "[]", "{}", '{"checkpoint_results": [1]}', json.dumps(sound)[:-5], of_another):
        leave(text)
        assert not folder.exists()


def test_one_damaged_status_hides_no_run(run: RunDirectory) -> None:
    with run:
        pass
    for name, harm in DAMAGE.items():
        if name not in ("result_removed",):
            (run.path.parent / name).mkdir()
            write_json(run.path.parent / name / "status.json", {"state": "finished", "updated": 1.0})
            harm(run.path.parent / name / "status.json")
    found = list_runs(run.path.parent)
    assert found["demo"].state == "finished"
    others = {name: status for name, status in found.items() if name != "demo"}
    assert set(others) == set(DAMAGE) - {"result_removed"}
    assert all(s.state == "unreadable" and name in s.error for name, s in others.items())


# --- files behind links -------------------------------------------------------------------------------------


def test_a_lock_that_cannot_be_looked_at_hides_no_run(run: RunDirectory) -> None:
    with run:
        pass
    other = run.path.parent / "other"
    (other / ".lock").mkdir(parents=True)
    write_json(other / "status.json", {"state": "running", "updated": 1.0})
    assert [(name, status.state) for name, status in list_runs(run.path.parent).items()] == [
        ("demo", "finished"),
        ("other", "running"),
    ]
    with (
        pytest.raises(ArtifactError, match=r"\.lock` must be a file that can be locked.*remove it"),
        RunDirectory(other),
    ):
        pass


def test_files_behind_links_are_listed_and_loops_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "archive" / "a" / "deep").mkdir(parents=True)
    (tmp_path / "archive" / "a" / "deep" / "1.png").write_text("one")
    (tmp_path / "farm").mkdir()
    for name in ("a", "b"):
        (tmp_path / "farm" / name).symlink_to(tmp_path / "archive" / "a")
    (tmp_path / "archive" / "a" / "up").symlink_to(tmp_path / "farm")  # farm/a/up is farm again
    (tmp_path / "farm" / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "farm" / "file.png").symlink_to(tmp_path / "archive" / "a" / "deep" / "1.png")

    def seen() -> dict[str, int]:
        return {
            str(file.path.relative_to(tmp_path / "farm")): file.size for file in list_files(tmp_path / "farm")
        }

    assert seen() == {"a/deep/1.png": 3, "b/deep/1.png": 3, "file.png": 3}
    (tmp_path / "archive" / "a" / "deep" / "2.png").write_text("2")
    assert set(seen()) == {"a/deep/1.png", "a/deep/2.png", "b/deep/1.png", "b/deep/2.png", "file.png"}


# --- object stores ------------------------------------------------------------------------------------------


def test_a_successor_in_a_store_is_whole_until_it_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The markers go after everything is copied and before anything is removed."""
    done: list[str] = []
    old, new = RemotePath("s3://bucket/run/teacher"), RemotePath("s3://bucket/run/teacher.next")
    monkeypatch.setattr("kr_ray.runs.attempts.remove_tree", lambda path: done.append(f"remove {path.name}"))
    monkeypatch.setattr(
        "kr_ray.runs.attempts.copy_objects", lambda path, target: done.append(f"copy to {target.name}")
    )
    monkeypatch.setattr(
        RemotePath, "unlink", lambda path, missing_ok=False: done.append(f"unlink {path.name}")
    )
    replace_folder(old, new, ("done.json", "started.json"))
    assert done == [
        "remove teacher",
        "copy to teacher",
        "unlink done.json",
        "unlink started.json",
        "remove teacher.next",
    ]


def test_a_seal_does_not_depend_on_how_json_writes_keys(run: RunDirectory) -> None:
    run.begin("tuning", "one")
    run.finish("tuning", "one", {"history": {2: 0.5, 10: 0.25}, "pair": (1, 2)})  # type: ignore[dict-item]
    assert run.result("tuning", "one") == {"history": {"2": 0.5, "10": 0.25}, "pair": [1, 2]}
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
