"""A GPU's small kernels launched at once: functions replayed as
CUDA graphs, networks compiled where that pays.

A ResNet14 step on 32-px images is some 400 kernels of a few microseconds; launching them one by one from
Python takes longer than computing them. On a CPU everything here is the plain call.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kr_ray.compute.parallel import worker_count

WARM_UPS = 3
"""Plain calls before a capture: whatever is allocated, chosen or
compiled on first use must be there by then."""


@dataclass(frozen=True)
class Policy:
    """What is done on a GPU.

    Attributes:
        capture: whether functions are captured.
        compile: networks, wherever it repays the time that it takes, always, or never.
    """

    capture: bool = True
    compile: Literal["where_it_pays", "always", "never"] = "where_it_pays"


_policy = Policy()


@contextmanager
def policy(**keys: Any) -> Iterator[None]:
    """Another policy for what is made within: benchmarks and tests compare the ways of calling."""
    global _policy
    before, _policy = _policy, replace(_policy, **keys)
    try:
        yield
    finally:
        _policy = before


Network = TypeVar("Network", bound=nn.Module)
Key = tuple[tuple[torch.Size, torch.dtype], ...]


class Captured:
    """A function of tensors that, on a GPU, is captured at its fourth call and
    replayed from then on; elsewhere it is just called.

    What the function reads besides its arguments must keep its place in memory and be changed in place only;
    its own random draws, decisions by value and waits for the device are not allowed. Calls whose arguments
    differ in shape or type are captured apart.

    Args:
        function: tensors -> a tensor, several, or None. A result belongs to the caller: it is a copy.
        active: False: always call the function plainly.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, active: bool = True) -> None:
        self._function = function
        # A collective operation or a scaler's decision can't be replayed blindly.
        self._active = active and _policy.capture and device.type == "cuda" and worker_count() == 1
        self._calls: dict[Key, int] = {}
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]] = {}

    @property
    def active(self) -> bool:
        """Whether calls are or will be replays."""
        return self._active

    def __call__(self, *inputs: Tensor) -> Any:
        if not self._active or is_in_torch_dispatch_mode():  # a counter of operations must see each of them
            return self._function(*inputs)
        key = tuple((value.shape, value.dtype) for value in inputs)
        if key not in self._graphs:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= WARM_UPS:
                return self._on_side_stream(inputs)
            self._graphs[key] = self._capture(inputs)
        graph, static, result = self._graphs[key]
        for own, given in zip(static, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return _copied(result)

    def _on_side_stream(self, inputs: tuple[Tensor, ...]) -> Any:
        """As torch asks of the calls before a capture, so that autograd's
        nodes are not tied to the default stream."""
        side, current = _side_stream(inputs[0].device), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = self._function(*inputs)
        current.wait_stream(side)
        return result

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]:
        static = tuple(value.clone() for value in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_side_stream(inputs[0].device)):
            result = self._function(*static)
        return graph, static, result


def plain_calls() -> AbstractContextManager[None]:
    """What is made within is neither captured nor compiled."""
    return policy(capture=False, compile="never")


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all calls: autograd's nodes stay with the stream that they were made on."""
    return torch.cuda.Stream(device)


def _copied(result: Any) -> Any:
    """Tensors of a replay are overwritten by the next one."""
    if isinstance(result, Tensor):
        return result.clone()
    return None if result is None else tuple(_copied(part) for part in result)


def compiled(network: Network, device: torch.device, images: float, pays_from: float) -> Network:
    """`network` through torch.compile if that pays on a GPU, else `network` itself; the weights are shared.

    What was compiled for one network serves the next of its kind in the same process at once (and in the next
    process after 2 s instead of 10, from the compiler's files). So a process that trains student after
    student compiles as soon as those asked for so far would have repaid it together.

    Args:
        images: that the network will be shown.
        pays_from: so many of them save the time that compiling takes.
    """
    able = (
        device.type == "cuda" and worker_count() == 1 and any(map(shutil.which, ("cc", "gcc", "clang")))
    )  # for Triton's launchers
    wanted = {"always": True, "never": False, "where_it_pays": _repaid(type(network), images, pays_from)}[
        _policy.compile
    ]
    return torch.compile(network, dynamic=False) if able and wanted else network  # type: ignore[return-value]


_images_asked_for: dict[tuple[type[nn.Module], float], float] = {}


def _repaid(kind: type[nn.Module], images: float, pays_from: float) -> bool:
    """Whether networks of this kind, in this use (each has its own price),
    have been asked for enough images in this process."""
    key = (kind, pays_from)
    _images_asked_for[key] = _images_asked_for.get(key, 0.0) + images
    return _images_asked_for[key] >= pays_from
