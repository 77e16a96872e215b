"""Data-parallel training by plain torch.distributed: N workers with about
B/N images each take the step of one worker with B.

Every worker holds the whole training set, draws the same random numbers (order, augmentation, MixUp, latents)
for the whole batch and computes on its slice of it. Gradients are averaged, and batch statistics are those of
the whole batch (`batch_norm`), so the curve is the one-worker curve up to rounding, for classifiers and GANs
alike. With one worker every function here is the identity or torch's own, bit for bit.

Gradients are averaged by hand after the backward pass, in one all-reduce, where torch's
DistributedDataParallel would overlap it with the backward pass: DDP hooks into `forward`, but the GAN's
spectral norms are computed outside it, once per weight update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from kr_ray.config import ConfigError

T = TypeVar("T")


def worker_count() -> int:
    """Workers of this training; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def worker_rank() -> int:
    """0 for the worker that validates, writes files and saves states."""
    return dist.get_rank() if dist.is_initialized() else 0


def check_batch(batch_size: int, key: str) -> None:
    """Every worker needs an image.

    Raises:
        ConfigError: `batch_size` is less than the number of workers.
    """
    if batch_size < worker_count():
        raise ConfigError(
            f"`batch >= cluster.workers` must hold, but got a batch of {batch_size} (from {key} and the "
            f"number of images) for {worker_count()} workers; use fewer workers"
        )


def own_slice(batch: Tensor) -> Tensor:
    """This worker's share of a batch [B, ...] that all workers hold:
    [B/N, ...], the first B mod N workers one more."""
    return batch.tensor_split(worker_count())[worker_rank()]


def slice_weight(batch_size: int) -> float:
    """Of the mean over this worker's slice, so that the mean over the
    workers is the batch's; 1 where N divides B."""
    least, more = divmod(batch_size, worker_count())
    return (least + (worker_rank() < more)) * worker_count() / batch_size


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the workers. Call after
    backward and before unscaling or clipping."""
    if worker_count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= worker_count()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(
        gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
    )


def average(value: Tensor) -> Tensor:
    """Mean over the workers, outside autograd; `value` itself with one worker."""
    if worker_count() == 1:
        return value
    mean = value.clone()
    dist.all_reduce(mean)
    return mean / worker_count()


def from_first(compute: Callable[[], T]) -> T:
    """What `compute` gives on the first worker, on all of them. Others
    wait, so that their decisions can't part."""
    if worker_count() == 1:
        return compute()
    box = [compute() if worker_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Training-mode `functional.batch_norm` over the workers' joint batch; x is [B/N, C, H, W].

    torch's SyncBatchNorm is for CUDA only. Here mean and variance are two small differentiable all-reduces
    (their backward pass sums the workers' gradients), which NCCL and gloo both have. Statistics are taken in
    float32. Slices may differ in size.
    """
    wide = x.float()
    own_count = wide.new_full((1,), wide.numel() // wide.shape[1])
    total, count = all_reduce(torch.cat([wide.sum((0, 2, 3)), own_count])).split([wide.shape[1], 1])
    mean = total / count
    centred = wide - mean[:, None, None]
    var = all_reduce(centred.square().sum((0, 2, 3))) / count
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    normal = centred * (var + eps).rsqrt()[:, None, None]
    if gain is not None and bias is not None:
        normal = torch.addcmul(bias[:, None, None], normal, gain[:, None, None])
    return normal.to(x.dtype)


class JointNorm(nn.Module):
    """A batch norm that can take its statistics over all workers.

    Only within a data-parallel training (`join_norms`): a network that one worker
    samples from or validates must not wait for others.
    """

    joint = False


def join_norms(network: nn.Module) -> None:
    """Let the network's batch norms take their training statistics over all workers from now on."""
    for module in network.modules():
        if isinstance(module, JointNorm):
            module.joint = worker_count() > 1


class BatchNorm2d(nn.BatchNorm2d, JointNorm):
    """torch's BatchNorm2d; over all workers after `join_norms`."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.joint and self.training):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        return batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.momentum, self.eps
        )
