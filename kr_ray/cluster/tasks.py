"""Independent pieces of work as Ray tasks: shadow models, attack models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import torch

from kr_ray.config import Resources

T = TypeVar("T")


def run_tasks(
    name: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], resources: Resources, max_retries: int
) -> list[T]:
    """`[function(*a) for a in arguments]`, as many at a time as the cluster has room for; a task whose worker dies is retried."""

    def work(*values: Any) -> T:
        torch.set_num_threads(resources.threads)
        return function(*values)

    task = ray.remote(num_cpus=resources.cpu, num_gpus=resources.gpu, max_retries=max_retries)(work)
    return ray.get([task.options(name=f"{name} {index}").remote(*values) for index, values in enumerate(arguments)])
