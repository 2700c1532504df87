"""The micro-batch: how many sequences go through the model at once. It affects speed and memory, not the results."""

import dataclasses

import torch

from runtime.device import is_out_of_memory
from runtime.errors import UserError
from training.compilation import try_micro_step
from training.recipe import Recipe
from training.run import Run

MOST_TOKENS = {"cuda": 2**16, "cpu": 2**12}  # per micro-step: keeps a GPU busy, fits a CPU's caches


def divide_among_ranks(recipe: Recipe, batch_size: int | None, world_size: int) -> int | None:
    """The micro-batch of each process: `batch_size`, or a process's share of the largest step if that is smaller; None
    stays None. Raises UserError if a step cannot be divided into equal shares of whole micro-batches."""
    sizes = recipe.step_sizes()
    rank_batch_size = max(1, min(batch_size or 1, sizes[-1] // world_size))
    if not divides_steps(recipe, rank_batch_size, world_size):
        micro_steps = max(1, round(sizes[0] / (world_size * rank_batch_size)))
        tokens = micro_steps * world_size * rank_batch_size * recipe.block_size << recipe.ramp_doublings
        raise UserError(
            f"tokens_per_step is {recipe.tokens_per_step}, {sizes[0]} sequences at first, which {world_size} processes "
            f"cannot share in micro-steps of {rank_batch_size}; set --tokens_per_step={tokens}, or another "
            "--batch_size or --nproc_per_node"
        )
    return None if batch_size is None else rank_batch_size


def divides_steps(recipe: Recipe, batch_size: int, world_size: int) -> bool:
    """Whether each process's share of every step is a multiple of `batch_size`, or smaller than it."""
    for sequences in recipe.step_sizes():
        share, rest = divmod(sequences, world_size)
        if rest or share % min(batch_size, share):
            return False
    return True


def choose_batch_size(run: Run, world_size: int) -> None:
    """If the run's batch_size is None, set and print the largest micro-batch that divides this process's share of every
    step, has at most MOST_TOKENS, and on a GPU fits in memory, as estimated from two trial micro-steps."""
    if run.config.batch_size is not None:
        return
    most = max(1, MOST_TOKENS.get(run.device.type, MOST_TOKENS["cpu"]) // run.config.block_size)
    if run.device.type == "cuda":
        most = min(most, _fitting_in_memory(run))
    share = run.config.step_sizes()[-1] // world_size
    found = max(n for n in range(1, min(share, most) + 1) if divides_steps(run.config, n, world_size))
    run.config = dataclasses.replace(run.config, batch_size=found)
    print(f"batch_size: {found}")


def smaller_divisor(n: int) -> int:
    """The largest divisor of `n` that is at most half of it."""
    return next(n // d for d in range(2, n + 1) if n % d == 0)


def _fitting_in_memory(run: Run) -> int:
    """How many sequences fit in a GPU's memory if each further one takes as much as the second."""
    peak_bytes = []  # of micro-steps of one and of two sequences, parameters and gradients included
    try:
        for batch_size in (1, 2):
            torch.cuda.reset_peak_memory_stats(run.device)
            try_micro_step(run, batch_size)
            peak_bytes.append(torch.cuda.max_memory_allocated(run.device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        run.model.zero_grad(set_to_none=True)
        return 1
    bytes_per_sequence = max(1, peak_bytes[1] - peak_bytes[0])
    unallocated_bytes, _ = torch.cuda.mem_get_info(run.device)
    usable_bytes = 0.9 * (unallocated_bytes + torch.cuda.memory_reserved(run.device))
    adam_bytes = 0 if run.optimizers[0].state else 8 * run.model.n_parameters()  # allocated at the first step
    return max(1, 1 + int((usable_bytes - adam_bytes - peak_bytes[0]) / bytes_per_sequence))
