"""Several processes that train one model, each on its share of every step: data parallelism.

    torchrun --nproc_per_node=2 train.py configs/tiny.py     # a process a GPU, or two on a CPU

torchrun tells each process its rank through the environment. Every process holds the whole model, and gradients are
averaged once a step, after the last micro-step: with accumulation there is little to overlap that with, and without a
wrapper around the model its names, its compilation and its checkpoints are those of a single process.

Alone, every function here does nothing.
"""

import os
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.errors import UserError

PATIENCE = timedelta(days=1)  # the others wait while rank 0 evaluates and saves; torchrun ends them if it dies


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says: (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: torch.device) -> torch.device:
    """Of CUDA devices the one of this process. Raises UserError if there are fewer than processes."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank_and_world()[1] == 1 or device.type != "cuda":
        return device
    if device.index is not None or local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this machine has no device of its own among {torch.cuda.device_count()}; "
            "leave out the number in --device, and start no more processes than devices with --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def started(device: torch.device) -> Iterator[None]:
    """The processes, connected; only rank 0 writes to stdout. Left together, unless by an error."""
    rank, world_size = rank_and_world()
    if world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What the processes agree on goes through gloo even on GPUs: it needs no answer from the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            yield
            agree(False)
    finally:
        dist.destroy_process_group()


@contextmanager
def rank_0_first() -> Iterator[None]:
    """The body, in rank 0 before the others: they find the files as it left them, and leave it to say what is wrong."""
    rank, _ = rank_and_world()
    if rank:
        agree(False)
    yield
    if not rank:
        agree(False)


def highest(value: int) -> int:
    """The highest of what the ranks give. Waits for all of them."""
    if rank_and_world()[1] == 1:
        return value
    values = torch.tensor(value)
    _reduce(values, dist.ReduceOp.MAX)
    return int(values)


def agree(flag: bool) -> bool:
    """Whether `flag` is true in any rank. Waits for all of them."""
    return bool(highest(int(flag)))


def average(tensors: Iterable[torch.Tensor], weight: torch.Tensor) -> None:
    """Replace each of `tensors`, of one dtype and device, by its mean over the ranks, where each rank counts by its
    `weight`, a scalar of 0 or more; the result is the same, bit for bit, in all. Weights of 0 everywhere give 0."""
    _, world_size = rank_and_world()
    if world_size == 1:
        return
    tensors = list(tensors)
    # One exchange: many small ones wait for each other. The last number becomes the sum of the weights.
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_ones(1)])
    flat *= weight.to(flat)
    _reduce(flat, dist.ReduceOp.SUM)
    flat /= flat[-1].clamp(min=torch.finfo(flat.dtype).tiny)
    for tensor, mean in zip(tensors, flat[:-1].split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def seed_rank(seed: int, step: int) -> None:
    """Give every rank but 0 randomness of its own for `step`. Rank 0 goes on with its own, which checkpoints keep; so
    a run that is continued repeats that of every rank."""
    rank, _ = rank_and_world()
    if rank:
        torch.manual_seed(random.Random(f"{seed} {rank} {step}").getrandbits(63))


def _reduce(tensor: torch.Tensor, operation: dist.ReduceOp) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # as a rule the connection closed
        rank, _ = rank_and_world()
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"rank {rank}: no exchange with the other processes ({reason}); if one has ended, what it said is why"
        ) from None
