"""A run's own files, damaged: those that only show progress never stop
it, the others are named with their remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kr_ray.audits.runs import RunScores
from kr_ray.classifiers.networks import load_classifier
from kr_ray.cluster.attack import _has_scores
from kr_ray.cluster.train import _keeping_refusals, _raise_refusal
from kr_ray.config import ConfigError
from kr_ray.data.checks import DataError, read_npz
from kr_ray.generators.biggan.sampling import BigGanSampler
from kr_ray.generators.dp_merf.features import Embedding
from kr_ray.generators.dp_merf.network import MerfSampler
from kr_ray.generators.edm.checkpoint import EdmCheckpoint
from kr_ray.privacy.scores import SampleScores
from kr_ray.privacy.shadow import ShadowScores
from kr_ray.runs.artifacts import ArtifactError, load_arrays, save_tensors
from kr_ray.runs.locks import RemoteLock
from kr_ray.runs.progress import look_at_stage, report_progress
from kr_ray.runs.storage import RemotePath
from kr_ray.synthesis.pool import load_pool

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"


DAMAGED = (
    b"",
    b"null",
    b"[]",
    b"{",
    bytes(50),
    b"\xff\xfe",
    b'{"fingerprint": 3}',
    b'{"fingerprint": "x"}',
    LFS,
)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_progress_file_never_blocks_a_run(content: bytes, tmp_path: Path) -> None:
    report_progress(tmp_path, "good", 0.5, "loss 1.0")
    (tmp_path / "progress" / "bad.json").write_bytes(content)
    (tmp_path / "trials.json").write_bytes(content)
    looked = look_at_stage(tmp_path, 2, 10.0)
    assert (looked.share, looked.note, looked.running) == (0.25, "loss 1.0", None)


def test_reports_with_impossible_figures_are_not_summed_up(tmp_path: Path) -> None:
    for number, share in enumerate((0.5, 2.0, -1.0, float("nan"), float("inf"), True)):
        path = tmp_path / "progress" / f"{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"share": share, "note": ""}))
    (tmp_path / "progress" / "cas.json").write_text('{"share": 1.0, "note": "", "cas": "high"}')
    looked = look_at_stage(tmp_path, 4, 10.0)
    assert looked.share == (0.5 + 1.0) / 4  # JSON's true is Python's 1
    assert looked.best_cas is None


def load_sampler(path: Path) -> BigGanSampler:
    return BigGanSampler.load(
        path,
        torch.device("cpu"),
        latent_std=1.0,
        prior=torch.ones(2) / 2,
        seed=0,
        batch_size=4,
        standing_batches=1,
    )


def foreign_arrays(path: Path) -> None:
    np.savez(path, logits=np.zeros((2, 2), np.float32), stamp=np.array("other"))


def test_damaged_arrays_and_weights_of_a_run_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    readers: tuple[Callable[[], object], ...] = (
        lambda: SampleScores.load(path),
        lambda: ShadowScores.load(path),
    )
    for content in (b"", bytes(100), b"PK\x03\x04 nothing", LFS):
        path.write_bytes(content)
        for read in readers:
            with pytest.raises(ArtifactError, match=r"x\.npz` must be a complete \.npz file, but got"):
                read()
    foreign_arrays(path)
    with pytest.raises(ArtifactError, match="shadow model, but holds something else; delete it"):
        ShadowScores.load(path)
    weights = tmp_path / "w.safetensors"
    save_tensors(weights, {"a": torch.zeros(2)}, {"width": 4})
    for load in (lambda: load_classifier(weights, torch.device("cpu")), lambda: load_sampler(weights)):
        with pytest.raises(
            ArtifactError, match=r"w\.safetensors must hold a \w+, but holds something else; delete it"
        ):
            load()


def test_one_flipped_bit_in_an_audit_run_s_logits_has_it_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    good = RunScores(np.ones((3, 2, 2), np.float32), np.ones((4, 2), np.float32), 0.5, 1.0)
    good.save(path, "stamp")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(np.float32(1).tobytes())] ^= 1
    for content in (b"", bytes(100), LFS, whole[:-40], bytes(flipped)):
        path.write_bytes(content)
        assert RunScores.load(path, "stamp") is None
    path.write_bytes(whole)
    found = RunScores.load(path, "stamp")
    assert found is not None and np.array_equal(found.samples, good.samples)


class Unreachable(RemotePath):
    """A file in a store that does not answer."""

    def open(self, *_: Any, **__: Any) -> Any:
        raise OSError("AWS Error NETWORK_CONNECTION")

    def exists(self, **_: Any) -> bool:
        return True

    is_file = exists


def test_a_store_that_does_not_answer_is_no_damage() -> None:
    path = Unreachable("/bucket/x.npz")
    for load in (load_arrays, lambda path: RunScores.load(path, "stamp"), _has_scores):
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            load(path)
    with pytest.raises(
        DataError, match=r"but got one that cannot be read \(AWS Error NETWORK_CONNECTION\); try again later"
    ):
        read_npz(path, ("a",))


def test_weights_of_another_kind_are_refused_with_their_remedy(tmp_path: Path) -> None:
    path, cpu = tmp_path / "w.safetensors", torch.device("cpu")
    loaders: tuple[Callable[[], object], ...] = (
        lambda: load_classifier(path, cpu), lambda: load_sampler(path), lambda: EdmCheckpoint.load(path),
        lambda: MerfSampler.open(path, cpu), lambda: Embedding.load(path), lambda: load_pool(path, "print"),
    )  # fmt: skip
    for metadata in (
        {"network": "other", "config": {"kind": "edm"}, "fingerprint": "print"},
        {"config": 3},
        ["no", "mapping"],
    ):
        save_tensors(path, {"a": torch.zeros(2)}, metadata)  # type: ignore[arg-type]
        for load in loaders:
            with pytest.raises(ArtifactError, match=r"w\.safetensors.*; (delete|open)"):
                load()


def test_a_damaged_lock_in_a_store_is_held_until_its_lease_is_over(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"{half")
    lock = RemoteLock(tmp_path / "lock")  # of a store's path only reading is needed here
    assert lock._read() == lock._read() != {}  # unchanged, so that it is free once `LEASE_S` has gone by
    assert lock._holder() != lock._owner


@pytest.mark.parametrize(
    "error", [DataError("wrong set"), ArtifactError("damaged"), ConfigError("wrong key")]
)
def test_what_a_worker_refuses_is_told_by_the_driver_and_not_tried_again(
    error: Exception, tmp_path: Path
) -> None:
    file = tmp_path / "refused.json"
    with _keeping_refusals(file, alone=True):  # Ray Train sees a worker that ends without an error
        raise error
    with pytest.raises(type(error), match=str(error)):
        _raise_refusal(file)
    assert not file.exists()
    _raise_refusal(file)  # nothing was refused
    with pytest.raises(type(error)), _keeping_refusals(file, alone=False):
        raise error
    with pytest.raises(ZeroDivisionError), _keeping_refusals(file, alone=True):
        raise ZeroDivisionError
