"""Data parallelism: several processes train one model, each on its share of every step.

    torchrun --nproc_per_node=2 train.py configs/tiny.py     # one process per GPU, or two on a CPU

torchrun tells each process its rank through environment variables. Every process holds the whole model. Gradients are
averaged once per step, after the last micro-step: with accumulation there is little computation to overlap that with.
The model has no wrapper, so its names, its compilation and its checkpoints are those of a single process.

In a single process, started without torchrun, nothing here communicates.
"""

import os
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.device import is_out_of_memory
from runtime.errors import UserError

PATIENCE = timedelta(days=1)  # others wait while rank 0 evaluates and saves; if it dies, torchrun ends them


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun set them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: torch.device) -> torch.device:
    """`device`, or under torchrun this process's own CUDA device. Raises UserError if there are too few of them."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank_and_world()[1] == 1 or device.type != "cuda":
        return device
    if device.index is not None or local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this machine has no device of its own among {torch.cuda.device_count()}; leave out "
            "the number in --device, and set --nproc_per_node to at most the number of devices"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def started(device: torch.device) -> Iterator[None]:
    """A context in which the processes are connected and rank 0 alone writes to stdout. They leave it together."""
    rank, world_size = rank_and_world()
    if world_size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # `agree` and `highest` go through gloo even on GPUs: CPU tensors do not wait for the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            yield
            agree(False)
    finally:
        dist.destroy_process_group()


@contextmanager
def rank_0_first() -> Iterator[None]:
    """A context that rank 0 completes before the others enter it: they find the files that it wrote, and it is the one
    to report a user's mistake."""
    rank, _ = rank_and_world()
    if rank > 0:
        agree(False)
    yield
    if rank == 0:
        agree(False)


def highest(value: int) -> int:
    """The highest `value` of all ranks. Waits for all of them."""
    if rank_and_world()[1] == 1:
        return value
    values = torch.tensor(value)
    _reduce(values, dist.ReduceOp.MAX)
    return int(values)


def agree(flag: bool) -> bool:
    """Whether `flag` is true in any rank. Waits for all of them."""
    return bool(highest(int(flag)))


def average(tensors: Iterable[torch.Tensor], weight: torch.Tensor) -> None:
    """Replace each of `tensors` (all of one dtype and device) by its mean over the ranks, weighted by each rank's
    `weight`, a scalar of 0 or more. All ranks get the same bits. If all weights are 0, the mean is 0."""
    _, world_size = rank_and_world()
    if world_size == 1:
        return
    tensors = list(tensors)
    # One exchange of one flat tensor is faster than many small ones. Its last element becomes the sum of the weights.
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_ones(1)])
    flat *= weight.to(flat)
    _reduce(flat, dist.ReduceOp.SUM)
    flat /= flat[-1].clamp(min=torch.finfo(flat.dtype).tiny)
    for tensor, mean in zip(tensors, flat[:-1].split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def seed_rank(seed: int, step: int) -> None:
    """Seed every rank except 0 for `step`. Rank 0 keeps the random state that checkpoints save, so a continued run
    repeats the random numbers of all ranks."""
    rank, _ = rank_and_world()
    if rank > 0:
        torch.manual_seed(random.Random(f"{seed} {rank} {step}").getrandbits(63))


def _reduce(tensor: torch.Tensor, operation: dist.ReduceOp) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:  # usually a closed connection
        if is_out_of_memory(error):
            raise
        rank, _ = rank_and_world()
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"rank {rank}: lost the other processes ({reason}); if one has ended, see its message above"
        ) from None
