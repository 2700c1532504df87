"""Cross-entropy of a linear head that never holds all logits: it works by chunks of rows.

A GPT's logits are its largest tensor by far: 16 x 1024 tokens with a vocabulary of 100k take 3.3 GB in bf16, as much
again for their gradient, and twice that in fp32. Here a chunk of rows goes through the head, its softmax gives the loss
and at once the gradients, and the next chunk reuses its memory. On a CPU, a chunk is also cut into blocks of columns,
which stay in the processor's cache between the matrix product that makes them and the passes over them.

Sources: Liger Kernel's fused linear cross-entropy (Hsu et al., 2024), for gradients in the forward pass; Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018, for combining the softmax of blocks.
Dimensions: N rows (tokens), C channels, V vocabulary, R rows of a chunk, K columns of a block.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

IGNORE = -1  # a target that does not count in the loss
CHUNK_BYTES = 2**27  # of logits held at once; larger chunks make better matrix products
GPU_CHUNK_BYTES, GPU_PLAIN_CHUNK_BYTES = 2**31, 2**28  # compiled and plain kernels; these hold fp32 copies too
GPU_FEWEST_CHUNKS = 2  # so that with half the rows a chunk is half as large, whatever its bytes
BLOCK_ROW_BYTES = 2**14  # most bytes of a row of a block on a CPU: 8,192 columns in bf16, 4,096 in fp32


def exponentials(logits: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the highest of each row of logits (R, K), and the sum of the row's exp(logits - highest), fp32 (R,) each.
    Writes these exponentials to `out` if it is given."""
    x = logits.float()
    highest = x.amax(-1)
    exponential = (x - highest[:, None]).exp()
    if out is not None:
        out.copy_(exponential)
    return highest, exponential.sum(-1)


def gradients(
    block: torch.Tensor,
    highest: torch.Tensor | None,
    factor: torch.Tensor,
    target: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the gradient of a block of logits (R, K), (softmax - one_hot) * scale, to `out`. `block` holds the logits,
    and `highest` (R,) the highest of each row, or `block` holds their exponentials and `highest` is None. `factor` (R,)
    turns exponentials into softmax * scale. `target` (R,), int32, is the target's column, outside 0..K-1 if in none."""
    exponential = block.float() if highest is None else (block.float() - highest[:, None]).exp()
    columns = torch.arange(block.size(1), device=block.device, dtype=torch.int32)
    hit = torch.where(columns == target[:, None], scale[:, None], 0.0)
    out.copy_(exponential * factor[:, None] - hit)


class Kernels(NamedTuple):
    """The passes over logits, plain or compiled."""

    exponentials: Callable[..., Any] = exponentials
    gradients: Callable[..., Any] = gradients

    def compiled(self) -> "Kernels":
        return Kernels(*(torch.compile(kernel, dynamic=False) for kernel in self))


PLAIN = Kernels()


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    kernels: Kernels = PLAIN,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """Returns the mean cross-entropy in nats, an fp32 scalar, of the logits x weight^T against the targets that are
    not IGNORE; 0 if all are.

    x is (N, C), weight (V, C), targets (N,). Products run in x's dtype; sums, softmax and weight's gradient are fp32.
    Gradients can be taken once. `chunk_bytes` bounds the logits of a chunk; up to twice that is held, and without
    compiled `kernels` some fp32 copies more.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if chunk_bytes is None:
        on_gpu = GPU_PLAIN_CHUNK_BYTES if kernels is PLAIN else GPU_CHUNK_BYTES
        chunk_bytes = on_gpu if x.device.type == "cuda" else CHUNK_BYTES
    sizes = _sizes(len(x), len(weight), x, chunk_bytes)
    with torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, kernels, sizes, wanted)


def _sizes(n_rows: int, n_columns: int, x: torch.Tensor, chunk_bytes: int) -> tuple[int, int]:
    """The number of rows of a chunk, and of columns of a block."""
    n_chunks = max(1, -(-n_rows * n_columns * x.element_size() // chunk_bytes))
    if x.device.type == "cuda":  # chunks of equal size: another size would compile the kernels again
        n_chunks = max(n_chunks, min(GPU_FEWEST_CHUNKS, n_rows))
        n_chunks = next((n for n in range(n_chunks, 2 * n_chunks) if n_rows % n == 0), n_chunks)
    fewest_blocks = -(-n_columns * x.element_size() // BLOCK_ROW_BYTES)
    divisors = [n for n in range(fewest_blocks, 2 * fewest_blocks + 1) if n_columns % n == 0]
    n_blocks = divisors[0] if divisors and x.device.type == "cpu" else 1
    return -(-n_rows // n_chunks), n_columns // n_blocks


def _fp16_scale(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A factor for gradients in fp16, a scalar on the device: a power of two that keeps small gradients above fp16's
    smallest number, and with which no product can overflow, whatever the targets.

    The sizes of the gradients of a column of logits add up to at most the factor, those of a row to twice that. A
    scaler of the loss cannot prevent an overflow here, because it multiplies what comes out.
    """
    largest_x, largest_weight = (torch.linalg.vector_norm(tensor, math.inf).float() for tensor in (x, weight))
    largest = torch.maximum(largest_x, 2 * largest_weight).clamp(min=1)
    return 2.0 ** (torch.finfo(torch.float16).max / 2 / largest).log2().floor()


def _scan(xs, blocks, targets, kernels, scratch, held) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the highest logit of each row in each block, the sum of its exponentials, (blocks, R) each, and the
    target's logit of each row (R,). Leaves the logits of the last block in `scratch`, and the exponentials of all
    blocks in `held`, or of the last if it has room for one, or of none."""
    highest, sums = torch.empty(2, len(blocks), len(xs), device=xs.device)
    target_logits = torch.zeros(len(xs), device=xs.device)
    for i, (block, target) in enumerate(zip(blocks, targets, strict=True)):
        logits = torch.mm(xs, block.t(), out=scratch)  # (R, K)
        found = logits.gather(1, target.clamp(0, len(block) - 1).long()[:, None]).squeeze(1)
        in_block = (target >= 0) & (target < len(block))
        target_logits = torch.where(in_block, found.float(), target_logits)
        highest[i], sums[i] = kernels.exponentials(logits, held[min(i, len(held) - 1)] if held else None)
    return highest, sums, target_logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, kernels, sizes, wanted):
        n_rows, n_columns = sizes
        blocks = weight.to(x.dtype).split(n_columns)  # (K, C) each
        boost = _fp16_scale(x, weight) if wanted and x.dtype == torch.float16 else 1.0
        counted = targets != IGNORE
        scale = counted.float() * (boost / counted.sum().clamp(min=1))  # (N,)
        losses = torch.zeros(len(x), device=x.device)
        dx = torch.zeros_like(x, dtype=torch.float32) if wanted else None
        dweight = torch.empty_like(weight, dtype=torch.float32) if wanted else None
        scratch = x.new_empty(n_rows, n_columns)
        # On a CPU exponentials cost more than memory: they are kept. On a GPU they are computed again from the logits.
        n_held = (len(blocks) if wanted else 1) if x.device.type == "cpu" else 0
        held = x.new_empty(n_held, n_rows, n_columns).unbind()
        for start in range(0, len(x), n_rows):
            chunk = slice(start, start + n_rows)
            xs, s = x[chunk], scale[chunk]  # (R, C), (R,)
            if len(xs) < n_rows:
                scratch, held = scratch[: len(xs)], [exponential[: len(xs)] for exponential in held]
            columns = [targets[chunk].int() - i * n_columns for i in range(len(blocks))]  # of targets, in each block
            highest, sums, target_logits = _scan(xs, blocks, columns, kernels, scratch, held)
            log_sum = (highest + sums.log()).logsumexp(0)  # (R,)
            losses[chunk] = (log_sum - target_logits) * s
            if not wanted:
                continue
            factors = (highest - log_sum).exp() * s  # (blocks, R)
            for i, (block, dblock) in enumerate(zip(blocks, dweight.split(n_columns), strict=True)):
                kept = (held[i], None) if held else (scratch, highest[i])
                kernels.gradients(*kept, factors[i], columns[i], s, scratch)  # (R, K)
                dx[chunk] += scratch @ block
                product = scratch.t() @ xs  # (K, C)
                if start == 0:
                    dblock.copy_(product)
                else:
                    dblock.add_(product)
        ctx.dx, ctx.dweight, ctx.boost, ctx.dtype = dx, dweight, boost, x.dtype
        return losses.sum() / boost

    @staticmethod
    def backward(ctx, gradient):
        dx, dweight = ctx.dx, ctx.dweight
        del ctx.dx, ctx.dweight  # so that autograd can take their memory
        gradient = gradient / ctx.boost
        if gradient.device.type != "cpu" or gradient != 1:  # on a GPU, comparing would wait for it
            dx.mul_(gradient)
            dweight.mul_(gradient)
        return dx.to(ctx.dtype), dweight, None, None, None, None
