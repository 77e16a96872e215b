"""Runs and data in an object store, against an S3-speaking server on loopback.
Google's store (gs://) is not tested here: there is none."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import torch
from conftest import tiny_config
from filelock import Timeout
from PIL import Image
from store import BUCKET, SECRET, UNAVAILABLE, Store, running_store

from kr_ray.config import ConfigError, DataConfig
from kr_ray.config.file import parse_config
from kr_ray.data.checks import DataError
from kr_ray.data.datasets import load_splits
from kr_ray.runs import locks
from kr_ray.runs.artifacts import (
    ArtifactError,
    RunDirectory,
    atomic_write,
    list_runs,
    load_state,
    load_tensors,
    read_json,
    run_status,
    save_state,
    save_tensors,
    write_json,
)
from kr_ray.runs.locks import RemoteLock, is_locked
from kr_ray.runs.progress import read_progress, report_progress
from kr_ray.runs.storage import (
    LocationError,
    RemotePath,
    check_location,
    list_files,
    local_copy,
    local_output,
    remove_tree,
    storage_path,
    upload,
)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as running:
        yield running


@pytest.fixture
def remote(store: Store, request: pytest.FixtureRequest) -> RemotePath:
    """A folder of the test's own."""
    return RemotePath(f"s3://{BUCKET}/{request.node.name}")


@pytest.fixture
def quick_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease stays long: on a busy machine a holder's beat can be late."""
    for name, seconds in (("BEAT_S", 0.1), ("SETTLE_S", 0.2)):
        monkeypatch.setattr(locks, name, seconds)


# --- locations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["runs", "/shared/runs", "~/runs", "s3://bucket", "s3://bucket/a/b", "gs://bucket/runs", "file:///a"],
)
def test_locations_that_are_taken(text: str) -> None:
    assert check_location(text) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://key:password@bucket/runs", "no credentials"),
        ("s3://bucket/runs?endpoint_override=localhost", "AWS_ENDPOINT_URL"),
        ("s3:///runs", "s3://bucket/folder"),
        ("hdfs://host/runs", "s3://, gs:// or file://"),
    ],
)
def test_locations_that_are_refused_with_the_key_and_the_remedy(text: str, said: str) -> None:
    with pytest.raises(LocationError, match=said) as refused:
        storage_path(text)
    assert "password" not in str(refused.value)
    with pytest.raises(ConfigError, match=rf"storage: .*{said}") as refused_config:
        tiny_config(storage=text)
    assert "password" not in str(refused_config.value)


def test_local_locations_are_plain_paths() -> None:
    assert type(storage_path("runs")) is type(Path("runs"))
    assert storage_path("~/runs") == Path.home() / "runs"
    assert storage_path("file:///shared/runs") == Path("/shared/runs")


# --- paths --------------------------------------------------------------------------------------------------


def test_a_remote_path_stays_one_through_all_that_pathlib_derives() -> None:
    path = storage_path("s3://bucket/runs") / "tiny" / Path("data", "splits.safetensors")
    assert isinstance(path, RemotePath)
    assert str(path) == f"{path}" == "s3://bucket/runs/tiny/data/splits.safetensors"
    assert (path.name, path.suffix, path.parent.name) == ("splits.safetensors", ".safetensors", "data")
    assert str(path.with_suffix(".png")) == "s3://bucket/runs/tiny/data/splits.png"
    assert str(path.parent.with_name("x").resolve()) == "s3://bucket/runs/tiny/x"
    assert type(path.parent) is RemotePath
    assert pickle.loads(pickle.dumps(path)) == path
    assert type(pickle.loads(pickle.dumps(path))) is RemotePath
    assert path != Path("s3:/bucket/runs/tiny/data/splits.safetensors").with_name("x")


def test_what_would_write_beside_the_program_is_refused() -> None:
    path = RemotePath("s3://bucket/file")
    for attempt in (lambda: os.fspath(path), lambda: path.rename("x"), lambda: np.load(path)):
        with pytest.raises(TypeError, match="object store"):
            attempt()
    with pytest.raises(ValueError, match="atomic_write"):
        path.open("wb")


def look_at(root: Path) -> dict[str, object]:
    """What pathlib says of a tree."""

    def name(path: Path) -> str:
        return str(path.relative_to(root))

    return {
        "texts": {name(file.path): file.path.read_text() for file in list_files(root)},
        "sizes": [file.size for file in list_files(root)],
        "one": [name(file.path) for file in list_files(root / "a" / "status.json")],
        "children": sorted(name(path) for path in root.iterdir()),
        "status": sorted(name(path) for path in root.glob("*/status.json")),
        "json": sorted(name(path) for path in (root / "a").glob("*.json")),
        "exact": [name(path) for path in root.glob("a/deep/x.txt")],
        "kinds": [
            (path.exists(), path.is_file(), path.is_dir())
            for path in (root, root / "a", root / "a/status.json", root / "no")
        ],
        "nothing": [list_files(root / "no"), list(root.glob("no/*.json"))],
    }


def test_a_remote_tree_looks_as_the_same_local_one(remote: RemotePath, tmp_path: Path) -> None:
    for root in (remote, tmp_path):
        for name, text in (
            ("a/status.json", "{}"),
            ("b/status.json", "[]"),
            ("a/deep/x.txt", "Übung"),
            ("c/other", ""),
        ):
            with atomic_write(root / name) as temporary:
                temporary.write_text(text)
    assert look_at(remote) == look_at(tmp_path)
    for root in (remote, tmp_path):
        (root / "b/status.json").unlink()
        (root / "b/status.json").unlink(missing_ok=True)
        remove_tree(root / "a")
        remove_tree(root / "never")
        with pytest.raises(FileNotFoundError):
            (root / "a/status.json").read_bytes()
    assert {str(file.path.relative_to(remote)) for file in list_files(remote)} == {"c/other"}


def test_copies_and_outputs(remote: RemotePath) -> None:
    with local_output(remote / "study.journal") as file:
        file.write_text("one line")
    with pytest.raises(KeyError), local_output(remote / "broken.journal") as file:
        file.write_text("half")
        raise KeyError
    assert [(remote / name).read_text() for name in ("study.journal", "broken.journal")] == [
        "one line",
        "half",
    ]
    with local_copy(remote) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["broken.journal", "study.journal"]
    with local_copy(remote / "study.journal") as file:
        assert file.name == "study.journal"
        assert file.read_text() == "one line"
    assert not file.exists()
    with pytest.raises(FileNotFoundError, match="nothing"), local_copy(remote / "nothing"):
        pass


# --- artefacts ----------------------------------------------------------------------------------------------


def test_artefacts_come_back_as_they_were(remote: RemotePath) -> None:
    tensors = {"weight": torch.arange(6).view(2, 3), "bias": torch.tensor([0.5])}
    save_tensors(remote / "w.safetensors", tensors, {"width": 4})
    loaded, metadata = load_tensors(remote / "w.safetensors")
    assert metadata == {"width": 4}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    save_state(remote / "state.pt", {"step": 3, "nested": {"x": torch.ones(2)}})
    state = load_state(remote / "state.pt")
    assert state is not None
    assert state["step"] == 3
    assert load_state(remote / "none.pt") is None
    with pytest.raises(ArtifactError, match="does not exist"):
        load_tensors(remote / "none.safetensors")
    with pytest.raises(KeyError), atomic_write(remote / "half") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert not (remote / "half").exists()


def test_progress_is_read_latest_first(remote: RemotePath) -> None:
    for unit, share in (("a", 0.5), ("b", 1.0)):
        report_progress(remote, unit, share)
    assert {unit.share for unit in read_progress(remote)} == {0.5, 1.0}
    assert read_progress(remote / "not begun") == []


def test_an_object_that_another_writes_meanwhile_is_read_whole_or_not_at_all(
    store: Store, remote: RemotePath
) -> None:
    path = remote / "status.json"
    write_json(path, "short")
    store.before_next_get = lambda: write_json(path, "a longer one")
    assert read_json(path) == "a longer one"
    store.before_next_get = lambda: write_json(path, "")
    assert read_json(path) == ""
    store.before_next_get = path.unlink
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    assert store.before_next_get is None


# --- faults -------------------------------------------------------------------------------------------------


def test_a_store_that_fails_for_some_seconds_is_asked_again_also_from_a_worker(
    store: Store, remote: RemotePath
) -> None:
    write_json(remote / "x.json", 1)
    impatient = pyarrow.fs.S3FileSystem(
        endpoint_override=os.environ["AWS_ENDPOINT_URL"],
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=3),
    )
    store.failures = 3
    with pytest.raises(OSError, match="AWS Error"):
        impatient.get_file_info(remote.key)
    travelled = pickle.loads(pickle.dumps(remote.filesystem))
    store.failures = 3
    with travelled.open_input_file((remote / "x.json").key) as file:
        assert file.read() == b"1"
    assert store.failures == 0
    store.failures = 3
    write_json(remote / "x.json", 2)
    assert store.failures == 0
    assert read_json(remote / "x.json") == 2


def test_credentials_do_not_travel(store: Store, remote: RemotePath) -> None:
    assert SECRET.encode() not in pickle.dumps(remote.filesystem) + pickle.dumps(remote)


@pytest.mark.parametrize(("refusals", "said"), [(100, "ACCESS_DENIED"), (0, "NO_SUCH_BUCKET")])
def test_a_store_that_refuses_is_named_with_the_remedy(store: Store, refusals: int, said: str) -> None:
    run = RemotePath("s3://nobody-s/run")
    store.failures, store.status = refusals, "403 Forbidden"
    with (
        pytest.raises(ArtifactError, match=f"`storage` must be a bucket.*{run}.*{said}.*credentials"),
        RunDirectory(run),
    ):
        pass
    store.failures, store.status = 0, UNAVAILABLE


# --- locks --------------------------------------------------------------------------------------------------


def test_a_held_run_is_refused_and_a_left_one_is_free(remote: RemotePath, quick_locks: None) -> None:
    with RunDirectory(remote / "run") as run:
        run.set_status(state="running")
        assert is_locked(remote / "run/.lock")
        with pytest.raises(ArtifactError, match="in use"), RunDirectory(remote / "run"):
            pass
        assert run_status(remote / "run").state == "running"
    assert not is_locked(remote / "run/.lock")
    assert [row.state for row in list_runs(remote).values()] == ["finished"]
    with RunDirectory(remote / "run"):
        pass


def test_the_lock_of_a_killed_holder_is_taken_over(
    remote: RemotePath, quick_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LEASE_S", 0.6)
    (remote / ".lock").write_bytes(json.dumps({"owner": "killed", "beats": 7}).encode())
    with RemoteLock(remote / ".lock"):
        assert read_json(remote / ".lock")["owner"] != "killed"
    assert not (remote / ".lock").exists()


def test_of_many_at_the_same_moment_one_gets_the_lock(
    remote: RemotePath, quick_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SETTLE_S", 2.0)  # on a busy machine a request can take long
    contenders, taken = [RemoteLock(remote / ".lock") for _ in range(4)], []

    def contend(lock: RemoteLock) -> None:
        try:
            lock.acquire(timeout=0)
            taken.append(lock)
        except Timeout:
            pass

    threads = [threading.Thread(target=contend, args=(lock,)) for lock in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    taken[0].release()


def test_who_lost_the_lock_while_suspended_is_interrupted(
    remote: RemotePath, quick_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = threading.Event()
    monkeypatch.setattr(locks._thread, "interrupt_main", interrupted.set)
    with RemoteLock(remote / ".lock"):
        for _ in range(100):  # a beat under way may still overwrite it
            write_json(remote / ".lock", {"owner": "another", "beats": 1})
            if interrupted.wait(0.3):
                break
    assert interrupted.is_set()
    assert read_json(remote / ".lock")["owner"] == "another"


def test_who_waits_gets_the_lock_when_it_is_released(remote: RemotePath, quick_locks: None) -> None:
    first, second = RemoteLock(remote / ".lock"), RemoteLock(remote / ".lock", timeout=30)
    first.acquire()
    waiting = threading.Thread(target=second.acquire)
    waiting.start()
    first.release()
    waiting.join()
    assert read_json(remote / ".lock")["owner"] == second._owner
    second.release()


# --- data ---------------------------------------------------------------------------------------------------


def made_npz(path: Path) -> Path:
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 40), ("val", 20), ("test", 20)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 2
    np.savez(path, **arrays)
    return path


def test_an_npz_of_a_store_is_the_local_one(remote: RemotePath, tmp_path: Path) -> None:
    local = made_npz(tmp_path / "mine.npz")
    upload(local, remote / "mine.npz")
    found = [
        load_splits(DataConfig(name="npz", path=str(path), image_size=8))
        for path in (local, remote / "mine.npz")
    ]
    assert found[0].digest() == found[1].digest()


def test_a_folder_of_a_store_is_the_local_one(remote: RemotePath, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for number in range(12):
            file = tmp_path / label / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
            upload(file, remote / label / file.name)
    found = [
        load_splits(DataConfig(name="folder", path=str(path), image_size=8)) for path in (tmp_path, remote)
    ]
    assert found[0].digest() == found[1].digest()
    assert found[1].class_names == ("cat", "dog")


def test_refusals_name_the_store_and_not_the_copy(remote: RemotePath) -> None:
    (remote / "broken.npz").write_bytes(b"not an npz")
    with pytest.raises(DataError, match=str(remote / "broken.npz")) as refused:
        load_splits(DataConfig(name="npz", path=str(remote / "broken.npz")))
    assert "kr_ray-data" not in str(refused.value)
    with pytest.raises(DataError, match=r"data\.path"):
        load_splits(DataConfig(name="npz", path=str(remote / "none.npz")))
    with pytest.raises(DataError, match=f"{remote}/medmnist"):
        load_splits(DataConfig(name="pneumoniamnist", root=str(remote), download=False))


def test_a_public_set_is_read_from_a_store(remote: RemotePath, shared_data: Path) -> None:
    file = shared_data / "medmnist" / "breastmnist.npz"
    if not file.exists():
        pytest.skip("BreastMNIST is not beside the project")
    upload(file, remote / "medmnist" / file.name)
    keys = {"name": "breastmnist", "image_size": 8, "download": False}
    found = [load_splits(DataConfig(**keys, root=str(root))) for root in (shared_data, remote)]
    assert found[0].digest() == found[1].digest()


def test_data_locations_are_checked_with_the_rest_of_the_configuration() -> None:
    raw = {
        "name": "x",
        "data": {"name": "npz", "path": "s3://a:b@bucket/x.npz", "root": "ftp://x"},
        "generator": {},
    }
    with pytest.raises(ConfigError, match=r"(?s)data.root: .*ftp.*data.path: .*credentials"):
        parse_config(raw)


# --- stages in a store --------------------------------------------------------------------------------------


def test_a_successor_takes_its_place_in_a_store_and_foreign_bytes_are_found(remote: RemotePath) -> None:
    run = RunDirectory(remote / "run")

    def work(inputs: str, value: int) -> Path:
        folder = run.begin("teacher", inputs)
        save_tensors(folder / "weights.safetensors", {"value": torch.tensor([value])})
        return folder

    assert work("one", 1) == run / "teacher"
    run.finish("teacher", "one", {"value": 1})
    attempt = work("two", 2)
    assert attempt == remote / "run" / "teacher.next"
    assert run.result("teacher", "one") == {"value": 1}  # as a killed attempt leaves it
    run.finish("teacher", "two", {"value": 2})
    assert run.result("teacher", "two") == {"value": 2} and run.result("teacher", "one") is None
    assert load_tensors(run / "teacher" / "weights.safetensors")[0]["value"].tolist() == [2]
    assert not attempt.exists()
    assert RunDirectory(run.path).result("teacher", "two") == {
        "value": 2
    }  # whose objects have other times since they were copied
    save_tensors(
        run / "teacher" / "weights.safetensors", {"value": torch.tensor([3, 3])}
    )  # a store tells whole seconds
    assert run.result("teacher", "two") is None


def test_a_kill_while_a_store_copies_the_successor_loses_nothing(
    remote: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(remote / "run")
    for inputs in ("one", "two"):
        save_tensors(
            run.begin("teacher", inputs) / "weights.safetensors", {"value": torch.tensor([len(inputs)])}
        )
        if inputs == "one":
            run.finish("teacher", inputs, {})

    def killed(*paths: RemotePath) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kr_ray.runs.attempts.copy_objects", killed)
        run.finish("teacher", "two", {"value": 2})
    assert RunDirectory(run.path).result("teacher", "two") == {"value": 2}
    assert (run / "teacher" / "weights.safetensors").exists() and not (run / "teacher.next").exists()
