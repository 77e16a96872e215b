"""Keeps what a generator's training hands out: checkpoints, states, rows."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from kr_ray.config import GeneratorSection
from kr_ray.generators.checkpoints import CheckpointedTraining
from kr_ray.generators.interface import Checkpoint, GeneratorTraining
from kr_ray.runs.figures import CollapsePoint


class Recorder:
    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at
        self.checkpoints: list[Checkpoint] = []
        self.collapse: list[CollapsePoint] = []
        self.states: dict[int, bytes] = {}
        self.rows: list[dict[str, float]] = []

    def keep(self, checkpoint: Checkpoint) -> bool:
        self.checkpoints.append(checkpoint)
        return checkpoint.epoch == self.stop_at

    def has_collapsed(self) -> bool:
        return False

    def save(self, state: dict[str, Any], row: dict[str, float]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.states[state["training"]["epoch"]] = buffer.getvalue()

    def whole_state(self, epoch: int) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(io.BytesIO(self.states[epoch]), weights_only=True)
        return loaded

    def state(self, epoch: int) -> dict[str, Any]:
        """Of the networks."""
        training: dict[str, Any] = self.whole_state(epoch)["training"]
        return training

    def finish(
        self,
        training: GeneratorTraining,
        section: GeneratorSection,
        resume: dict[str, Any] | None = None,
        states_every: int | None = None,
    ) -> Recorder:
        checkpointed = CheckpointedTraining(training, section, self, resume, states_every)
        checkpointed.finish(self.save)
        self.rows = checkpointed.curve
        return self


def assert_bit_equal(one: Any, two: Any, path: str = "") -> None:
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_bit_equal(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, two), path
    else:
        assert one == two, path
