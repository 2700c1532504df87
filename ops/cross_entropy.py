"""Cross-entropy of a linear head that never holds all logits: it works by chunks of rows.

A GPT's logits are its largest tensor by far: 16 x 1024 tokens with a vocabulary of 100k take 3.3 GB in bf16, as much
again for their gradient, and twice that in fp32. Here a chunk of rows goes through the head, its softmax gives the loss
and at once the gradients, and the next chunk reuses its memory. On a CPU, a chunk is also cut into blocks of columns,
which stay in the processor's cache between the matrix product that makes them and the passes over them.

Sources: Liger Kernel's fused linear cross-entropy (Hsu et al., 2024), for gradients in the forward pass; Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018, for combining the softmax of blocks.
Dimensions: N rows (tokens), C channels, V vocabulary, R rows of a chunk, K columns of a block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

IGNORE = -1  # a target that does not count in the loss
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**31}  # of logits held at once; larger chunks make better matrix products
BLOCK_ROW_BYTES = 2**14  # most bytes of a row of a block on a CPU: 8,192 columns in bf16, 4,096 in fp32
FP16_SCALE = 2.0**12  # keeps the smallest gradients of fp16 above its smallest number


def exponentials(logits: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write exp(logits - the highest of their row) of logits (R, K) to `out`. Returns the highest of each row, and the
    sum of its exponentials, fp32 (R,) each."""
    x = logits.float()
    highest = x.amax(-1)
    exponential = (x - highest[:, None]).exp()
    out.copy_(exponential)
    return highest, exponential.sum(-1)


def gradients(
    exponential: torch.Tensor, factor: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the gradient of a block of logits (R, K), (softmax - one_hot) * scale, to `out`. `factor` (R,) turns the
    exponentials into softmax * scale. `target` (R,), int32, is the target's column, outside 0..K-1 if in no column."""
    columns = torch.arange(exponential.size(1), device=exponential.device, dtype=torch.int32)
    hit = torch.where(columns == target[:, None], scale[:, None], 0.0)
    out.copy_(exponential.float() * factor[:, None] - hit)


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
    Gradients can be taken once. `chunk_bytes` bounds the logits of a chunk; about twice that is held, and on a GPU
    without compiled `kernels` some fp32 copies more.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    sizes = _sizes(len(x), len(weight), x, chunk_bytes or CHUNK_BYTES.get(x.device.type, 2**27))
    with torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, kernels, sizes, wanted)


def _sizes(n_rows: int, n_columns: int, x: torch.Tensor, chunk_bytes: int) -> tuple[int, int]:
    """The number of rows of a chunk, and of columns of a block."""
    n_chunks = -(-n_rows * n_columns * x.element_size() // chunk_bytes)
    fewest_blocks = -(-n_columns * x.element_size() // BLOCK_ROW_BYTES)
    divisors = [n for n in range(fewest_blocks, 2 * fewest_blocks + 1) if n_columns % n == 0]
    n_blocks = divisors[0] if divisors and x.device.type == "cpu" else 1
    return -(-n_rows // max(1, n_chunks)), n_columns // n_blocks


def _scan(xs, blocks, targets, kernels, scratch, held) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the highest logit of each row in each block, the sum of its exponentials, (blocks, R) each, and the
    target's logit of each row (R,). Leaves the exponentials in `held`, if it has room for more than one block."""
    highest, sums = torch.empty(2, len(blocks), len(xs), device=xs.device)
    target_logits = torch.zeros(len(xs), device=xs.device)
    for i, (block, target) in enumerate(zip(blocks, targets, strict=True)):
        logits = torch.mm(xs, block.t(), out=scratch[: len(xs)])  # (R, K)
        found = logits.gather(1, target.clamp(0, len(block) - 1).long()[:, None]).squeeze(1)
        in_block = (target >= 0) & (target < len(block))
        target_logits = torch.where(in_block, found.float(), target_logits)
        highest[i], sums[i] = kernels.exponentials(logits, held[min(i, len(held) - 1), : len(xs)])
    return highest, sums, target_logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, kernels, sizes, wanted):
        n_rows, n_columns = sizes
        blocks = weight.to(x.dtype).split(n_columns)  # (K, C) each
        boost = FP16_SCALE if x.dtype == torch.float16 else 1.0
        counted = targets != IGNORE
        scale = counted.float() * (boost / counted.sum().clamp(min=1))  # (N,)
        losses = torch.zeros(len(x), device=x.device)
        dx = torch.zeros_like(x, dtype=torch.float32) if wanted else None
        dweight = torch.empty_like(weight, dtype=torch.float32) if wanted else None
        scratch = x.new_empty(n_rows, n_columns)
        held = x.new_empty(len(blocks) if wanted else 1, n_rows, n_columns)
        for start in range(0, len(x), n_rows):
            chunk = slice(start, start + n_rows)
            xs, s = x[chunk], scale[chunk]  # (R, C), (R,)
            columns = [targets[chunk].int() - i * n_columns for i in range(len(blocks))]  # of targets, in each block
            highest, sums, target_logits = _scan(xs, blocks, columns, kernels, scratch, held)
            log_sum = (highest + sums.log()).logsumexp(0)  # (R,)
            losses[chunk] = (log_sum - target_logits) * s
            if not wanted:
                continue
            factors = (highest - log_sum).exp() * s  # (blocks, R)
            for i, (block, dblock) in enumerate(zip(blocks, dweight.split(n_columns), strict=True)):
                gradient = scratch[: len(xs)]  # (R, K)
                kernels.gradients(held[i, : len(xs)], factors[i], columns[i], s, gradient)
                dx[chunk] += gradient @ block
                product = gradient.t() @ xs  # (K, C)
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
