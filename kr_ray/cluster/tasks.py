"""Independent pieces of work as Ray tasks: shadow models, attack models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayTaskError

from kr_ray.cluster.quiet import raise_as_ours
from kr_ray.config import ConfigError, Resources
from kr_ray.data.checks import DataError
from kr_ray.runs.artifacts import ArtifactError

T = TypeVar("T")

REFUSALS = (ArtifactError, ConfigError, DataError)
"""Our own errors about what a person has given: another try would end the same."""


def run_tasks(
    name: str,
    function: Callable[..., T],
    arguments: Sequence[tuple[Any, ...]],
    resources: Resources,
    max_retries: int,
) -> list[T]:
    """`[function(*a) for a in arguments]`, as many at a time as the cluster has room for; a task whose worker
    dies is retried.

    What `function` raises is raised here as it was there.
    """

    def work(*values: Any) -> T:
        torch.set_num_threads(resources.threads)
        return function(*values)

    task = ray.remote(num_cpus=resources.cpu, num_gpus=resources.gpu, max_retries=max_retries)(work)
    running = [task.options(name=f"{name} {index}").remote(*values) for index, values in enumerate(arguments)]
    try:
        return ray.get(running)
    except RayTaskError as error:
        raise_as_ours(error)
