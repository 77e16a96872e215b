"""Students as Ray Tune trials: the checkpoint sweep, the tuning and the comparison of labelling strategies.

Every trial keeps its history and its training state in a folder named by what it is. A trial that Ray starts
again, because it was paused, its worker died or the whole program was killed, reports what is in the history
and computes only what is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray
import ray.train
import torch
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner

from kr_ray.classifiers.ticks import Score, TickedTraining, Ticks, told_as_it_is
from kr_ray.cluster.hyperband import Reported, TrialKeys
from kr_ray.cluster.pools import draw_pools
from kr_ray.cluster.quiet import in_a_line, killed_for_memory, quiet_tune
from kr_ray.cluster.runtime import ray_storage
from kr_ray.cluster.stream import student_images
from kr_ray.cluster.telemetry import Publisher
from kr_ray.cluster.train import run_workers
from kr_ray.cluster.watched import TrialCounts, with_resources
from kr_ray.compute.parallel import worker_rank
from kr_ray.config import ClassifierConfig, ClusterConfig
from kr_ray.dp.scores import NoisyScores
from kr_ray.methods.knowledge_recycling import start_student
from kr_ray.runs.artifacts import fingerprint, load_state, save_state
from kr_ray.runs.attempts import stage_name
from kr_ray.runs.progress import report_progress
from kr_ray.runs.stages import STATE_FILE, Row, State
from kr_ray.synthesis.stream import CollapsedGenerator
from kr_ray.synthesis.student_set import StudentSpec


@dataclass(frozen=True)
class StudentWork:
    """One student and the folder of its history; `cluster` says where its images are made, which changes no
    number, and `scores` how it is judged in a private run."""

    run: Path
    folder: Path
    spec: StudentSpec
    recipe: ClassifierConfig
    ticks: Ticks
    cluster: ClusterConfig
    scores: NoisyScores | None = None

    @property
    def stamp(self) -> str:
        """Of all that decides the student's numbers within a run."""
        ticks = self.ticks
        return fingerprint(*self.spec.stamp(), self.recipe.stamp(), [ticks.count, ticks.validated])

    def load(self) -> State | None:
        """The saved state, unless it is another student's that had the same name
        (a library's update may change suggestions)."""
        state = load_state(self.folder / STATE_FILE)
        return state if state is not None and state.get("stamp") == self.stamp else None

    def save(self, state: State) -> None:
        save_state(self.folder / STATE_FILE, state | {"stamp": self.stamp})

    def history(self) -> list[Row]:
        state = self.load()
        return [] if state is None else list(state["history"])

    @property
    def title(self) -> str:
        """As the dashboard shows it."""
        return f"{self.run.name}_{stage_name(self.folder.parent.parent)}_{self.folder.name}"

    def publisher(self, history: list[Row]) -> Publisher:
        return Publisher(self.folder.parent.parent, self.folder.name, history[-1] if history else None)

    def start(self) -> TickedTraining:
        """The student's training, from the saved state."""
        images = student_images(self.cluster, self.title)
        return start_student(self.run, self.spec, self.recipe, self.ticks, self.load(), images, self._score())

    def _score(self) -> Score:
        if (scores := self.scores) is None:
            return told_as_it_is
        return lambda accuracy, tick: scores.of(accuracy, self.stamp, tick)

    def advance(self, training: TickedTraining, publisher: Publisher | None) -> None:
        """Train for a tick; the worker that has the publisher keeps and tells what came out."""
        try:
            training.advance()
        except CollapsedGenerator:
            training.give_up()
        if publisher is None:
            return
        history = training.history
        # A finished student's weights are of no further use: it was trained to be judged.
        self.save({"history": history} if training.finished else training.state_dict())
        share = len(history) / self.ticks.count
        cas = history[-1].get("val_accuracy")
        note = f"{self.folder.name}: CAS {cas:.3f}" if cas is not None else self.folder.name
        rate = history[-1].get("images_per_second")
        report_progress(
            self.folder.parent.parent, self.folder.name, share, note, cas=cas, images_per_second=rate
        )
        publisher.publish(history[-1])

    def train_until(self, tick: int) -> None:
        """Inside a Ray Train worker: train with the others until `tick` ticks are done."""
        training = self.start()
        publisher = self.publisher(training.history) if worker_rank() == 0 else None
        try:
            while len(training.history) < tick:
                self.advance(training, publisher)
                ray.train.report(dict(training.history[-1]))
        finally:
            training.close()
            if publisher is not None:
                publisher.close()

    def val_cas(self) -> float | None:
        """Validation CAS at the end of the schedule, or None if it has not got there."""
        history = self.history()
        return history[-1]["val_accuracy"] if len(history) == self.ticks.count else None


def read_history(folder: Path) -> list[Row]:
    """The ticks that the student of this folder has been trained for."""
    state = load_state(folder / STATE_FILE)
    return [] if state is None else list(state["history"])


class StudentTrial(tune.Trainable):
    """One `step` is one tick of a student's training."""

    def setup(self, config: TrialKeys) -> None:
        self.work: StudentWork = self.student_work(config)
        self.history = self.work.history()
        self.tick = 0
        self.training: TickedTraining | None = None
        self.publisher: Publisher | None = None

    def __repr__(self) -> str:
        """On the dashboard, which asks once: an actor trains one trial after another."""
        return f"{self.work.run.name}_{stage_name(self.work.folder.parent.parent)}"

    def reset_config(self, new_config: TrialKeys) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def student_work(self, config: TrialKeys) -> StudentWork:
        return config["work"]

    def step(self) -> Reported:
        if self.tick == len(self.history):
            if self.work.cluster.trial_workers > 1:
                self._train_on_workers()
            else:
                self._train_tick()
        row = self.history[self.tick]
        self.tick += 1
        names = {"images_seen": "images_seen", "train_loss": "train_loss", "val_accuracy": "cas"}
        figures = {"resource": self.tick} | {name: row[key] for key, name in names.items() if key in row}
        return figures | {tune.result.DONE: self.tick == self.work.ticks.count}

    def _train_tick(self) -> None:
        torch.set_num_threads(self.work.cluster.trial.threads)
        if self.publisher is None:
            self.publisher = self.work.publisher(self.history)
        if self.training is None:
            self.training = self.work.start()
        self.work.advance(self.training, self.publisher)
        self.history = self.training.history

    def _train_on_workers(self) -> None:
        """To the tick at which the student is judged next: a worker group
        takes seconds to start, too many for one tick."""
        work = self.work
        until = next(k for k in range(self.tick + 1, work.ticks.count + 1) if work.ticks.validates(k - 1))
        workers = work.cluster.trial_workers
        run_workers(
            partial(work.train_until, until),
            work.folder,
            work.title,
            work.cluster.trial,
            work.cluster.max_retries,
            (workers, workers),
        )
        self.history = work.history()

    def cleanup(self) -> None:
        if self.training is not None:
            self.training.close()
        if self.publisher is not None:
            self.publisher.close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, int]:
        return {"tick": self.tick}

    def load_checkpoint(self, checkpoint: dict[str, int] | None) -> None:
        self.tick = checkpoint["tick"] if checkpoint else 0


class TuningTrial(StudentTrial):
    """A student whose generation parameters come from the searcher, beside what all trials share.

    It is judged at the rungs of its bracket (`judged`, by trial number) and nowhere else.
    """

    def student_work(self, config: TrialKeys) -> StudentWork:
        shared: StudentWork = config["shared"]
        tuned = {name: config[name] for name in config["names"]}
        spec = replace(shared.spec, synthesis=shared.spec.synthesis.with_values(tuned))
        ticks = Ticks(shared.ticks.count, config["judged"][config["trial"]])
        return StudentWork(
            shared.run,
            trial_folder(shared.folder, config["trial"]),
            spec,
            shared.recipe,
            ticks,
            shared.cluster,
            shared.scores,
        )


def trial_folder(stage: Path, trial: int) -> Path:
    return stage / "trials" / f"{trial:04d}"


def trial_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Of a trial itself. Where several workers train its student, they ask for theirs; the trial only waits
    for them, and takes a byte for form's sake."""
    return cluster.trial.model_dump() if cluster.trial_workers == 1 else {"memory": 1}


def _trials_at_a_time(cluster: ClusterConfig) -> int | None:
    """None: Tune counts trials by their own resources, which include those of the only worker."""
    if cluster.trial_workers == 1:
        return None
    demand = {
        kind.upper(): count * cluster.trial_workers
        for kind, count in cluster.trial.model_dump().items()
        if count
    }
    there = ray.cluster_resources()
    return max(1, min((int(there.get(kind, 0) / count) for kind, count in demand.items()), default=1))


def train_students(works: Sequence[StudentWork], stage: Path, cluster: ClusterConfig) -> list[float]:
    """Validation CAS of every student; they run side by side, as many as the cluster has room for.

    Raises:
        RuntimeError: a student failed more than `cluster.max_retries` times; the others' results are kept.
    """
    for retries_left in reversed(range(cluster.max_retries + 1)):
        missing = [work for work in works if work.val_cas() is None]
        if missing:
            draw_pools(missing[0].run, [work.spec for work in missing], stage, cluster)
        errors = _tune(missing, stage, cluster) if missing else []
        if not errors:
            break
        if not retries_left or not any(map(killed_for_memory, errors)):
            raise RuntimeError(
                f"every student must end without error, but {len(errors)} of {len(missing)} failed with "
                f"max_retries={cluster.max_retries}: {in_a_line(errors[0])}; remove the cause and run the "
                "same command again: what was computed is kept"
            )
    found = [work.val_cas() for work in works]
    if None in found:  # Tune returns normally when it is interrupted
        raise KeyboardInterrupt
    return [cas for cas in found if cas is not None]


def _tune(works: Sequence[StudentWork], stage: Path, cluster: ClusterConfig) -> list[Exception]:
    """Train the students as the trials of one Tune experiment; returns what went wrong."""
    tuner = Tuner(
        with_resources(StudentTrial, trial_resources(cluster)),
        param_space={"work": tune.grid_search(list(works))},
        tune_config=TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=_trials_at_a_time(cluster),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=RunConfig(
            name="ray_tune",
            **ray_storage(stage),
            verbose=0,
            failure_config=FailureConfig(max_failures=cluster.max_retries),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[TrialCounts(stage)],
        ),
    )
    try:
        with quiet_tune(len(works)):
            return tuner.fit().errors
    except RuntimeError as error:
        if out_of_memory := killed_for_memory(error):
            return [out_of_memory]
        raise
