"""The pipeline's own stages over a finished run: a changed key, an attempt given up,
the same attempt again. In this process, without Ray."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from test_data_stage import Notices

from kr_ray.audits.design import design_audit
from kr_ray.audits.runs import AuditPlan
from kr_ray.config import Config
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.methods.interface import Part
from kr_ray.pipeline import Pipeline
from kr_ray.runs.artifacts import load_state, read_json, save_state
from kr_ray.runs.results import GENERATOR, R
from kr_ray.synthesis.student_set import StudentSpec

STATE = "local_state.pt"


class LocalPipeline(Pipeline):
    """Trains in this process; states are kept in the stage's folder, as Ray Train keeps them there."""

    def __init__(self, config: Config, give_up_after: int = 10**9) -> None:
        super().__init__(config, Notices())
        self.states_left = give_up_after
        self.began_with: dict[str, bool] = {}

    def connect(self) -> None: ...

    def _train(self, part: Part[R], folder: Path) -> R:
        def save(state: dict[str, Any], row: dict[str, float]) -> None:
            if not self.states_left:
                raise KeyboardInterrupt
            self.states_left -= 1
            save_state(folder / STATE, state)

        state = load_state(folder / STATE)
        self.began_with[folder.name] = state is not None
        return part.work(folder, state, save)


def tiny(storage: Path, epochs: int = 2, **classifier: Any) -> Config:
    return tiny_config(
        storage=str(storage),
        classifier={"min_steps": 10} | classifier,
        teacher={"epochs": 1},
        generator={"epochs": epochs, "checkpoint_every": 1, "d_steps": 1, "batch_size": 16},
    )


def files(run: Path) -> dict[str, str]:
    """SHA-256 of every artefact by its name below the run."""
    found = [
        path
        for path in run.rglob("*")
        if path.suffix in (".safetensors", ".png") and ".next" not in str(path)
    ]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with a teacher and a generator of two checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    with LocalPipeline(tiny(folder)) as pipeline:
        pipeline.run_until("generator")
    return folder


def test_an_attempt_given_up_leaves_the_old_run_and_goes_on_later(storage: Path, tmp_path: Path) -> None:
    run = storage / "tiny"
    before = files(run)
    assert set(before) == {
        "data/splits.safetensors", "teacher/weights.safetensors",
        *(f"generator/checkpoints/epoch_000{k}.{kind}" for k in (1, 2) for kind in ("safetensors", "png")),
    }  # fmt: skip
    with (
        pytest.raises(KeyboardInterrupt),
        LocalPipeline(tiny(storage, epochs=3), give_up_after=2) as pipeline,
    ):
        pipeline.run_until("generator")
    assert files(run) == before and (run / "generator.next" / STATE).exists()
    with LocalPipeline(tiny(storage)) as pipeline:  # the old configuration again: nothing is to be done
        pipeline.run_until("generator")
    assert pipeline.skipped == {"data": True, "teacher": True, "generator": True} and files(run) == before
    with LocalPipeline(tiny(storage, epochs=3)) as pipeline:
        pipeline.run_until("generator")
    assert pipeline.results[GENERATOR].checkpoints == [1, 2, 3] and pipeline.began_with == {
        "generator.next": True
    }
    assert not (run / "generator.next").exists()
    with LocalPipeline(tiny(tmp_path, epochs=3)) as undisturbed:
        undisturbed.run_until("generator")
    assert files(run) == files(tmp_path / "tiny")
    assert set(read_json(run / "generator" / "done.json")["outputs"]) == {
        f"checkpoints/epoch_000{k}.safetensors" for k in (1, 2, 3)
    }


def test_a_deleted_checkpoint_is_made_again_and_what_was_built_on_it_stands(storage: Path) -> None:
    run = storage / "tiny"
    config = Config.model_validate(Pipeline(tiny(storage, epochs=3), Notices()).config)
    with LocalPipeline(config) as pipeline:
        pipeline.run_until("generator")
    before = files(run)
    (run / "generator" / "checkpoints" / "epoch_0001.safetensors").unlink()
    with LocalPipeline(config) as pipeline:
        pipeline.run_until("generator")
    assert pipeline.skipped == {"data": True, "teacher": True, "generator": False} and files(run) == before


def test_the_arms_train_in_a_run_of_their_own_on_top_of_each_other(storage: Path, tmp_path: Path) -> None:
    """`fixed_generator` puts the audited run's checkpoint in the place
    of the one that the arm `kr` has trained."""
    config = tiny_config(
        storage=str(storage),
        classifier={"min_steps": 4},
        teacher={"epochs": 1},
        generator={"epochs": 1, "checkpoint_every": 1, "d_steps": 1, "batch_size": 16},
        audit={
            "worst_case": {
                "arms": ["teacher", "kr", "fixed_generator"],
                "models": 4,
                "queries": 1,
                "max_canary_share": 0.25,
                "keep_models": True,
            }
        },
    )
    run = storage / "tiny"
    splits = load_stored_splits(run / SPLITS_FILE)
    plan = AuditPlan(
        run=run,
        folder=tmp_path / "worst_case",
        config=config,
        student=StudentSpec(config.generator, 1, config.synthesis, 1, 0),
        design=design_audit(splits, config.audit.worst_case, 1),
        digest=splits.digest(),
    )
    plan.train(0, lambda share, what: None)
    assert plan.missing(0) == []
    own = tmp_path / "worst_case" / "runs" / "0"
    assert {path.name for path in own.iterdir() if path.is_dir()} == {
        "teacher",
        "generator",
        "student_kr",
        "student_fixed_generator",
    }
    checkpoint = "checkpoints/epoch_0001.safetensors"
    assert (own / "generator" / checkpoint).read_bytes() == (run / "generator" / checkpoint).read_bytes()
    before = files(own)
    plan.scores_file(0, "kr").write_bytes(b"damaged")
    assert plan.missing(0) == ["kr"]
    plan.train(0, lambda share, what: None)
    assert plan.missing(0) == []
    after = files(own)
    assert {name for name in after if before.get(name) != after[name]} == {
        f"generator/{checkpoint}",
        # of the arm `kr`, in the place of the audited run's checkpoint, which has none
        "generator/checkpoints/epoch_0001.png",
    }


def test_an_export_that_fails_leaves_the_exported_set(tmp_path: Path) -> None:
    from kr_ray.cluster.stream import _export
    from kr_ray.synthesis.parquet_set import parquet_schema

    class Made:
        """What Ray Data would write, or not."""

        def __init__(self, text: str) -> None:
            self.text = text

        def stream(self, *arguments: Any) -> Made:
            return self

        def write_parquet(self, path: str, **options: Any) -> None:
            Path(path).mkdir()
            (Path(path) / "part.parquet").write_text(self.text)
            if not self.text:
                raise RuntimeError("no room left")

    folder, schema = tmp_path / "synthetic", parquet_schema((1, 4, 4), 2, {})
    _export(Made("first"), folder, schema)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no room"):
        _export(Made(""), folder, schema)  # type: ignore[arg-type]
    assert (folder / "part.parquet").read_text() == "first"
    _export(Made("second"), folder, schema)  # type: ignore[arg-type]
    assert (folder / "part.parquet").read_text() == "second" and list(tmp_path.iterdir()) == [folder]
