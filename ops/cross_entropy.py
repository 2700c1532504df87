"""Cross-entropy of a linear head that never holds all logits: by chunks of rows, with the gradients made on the way.

A GPT's logits are its largest tensor by far: 16 x 1024 tokens of a 100k vocabulary take 3.3 GB in bf16, as much again
for their gradient, and twice that in fp32. Here a chunk of rows goes through the head, its softmax gives the loss and
at once the gradients, and its memory serves the next chunk. On a CPU the chunk is cut into blocks of columns besides,
which stay in the cache between the matrix product that makes them and the passes over them.

Sources: the fused linear cross-entropy of Liger Kernel (Hsu et al., 2024), for gradients in the forward pass; Milakov
and Gimelshein, "Online normalizer calculation for softmax", 2018, for a softmax of blocks put together afterwards.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

IGNORE = -1  # a target that does not count in the loss
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**31}  # of logits held at once; larger chunks make better matrix products
BLOCK_ROW_BYTES = 2**14  # of a row of logits made at once on a CPU, at most: 8,192 columns in bf16, 4,096 in fp32
FP16_SCALE = 2.0**12  # keeps the smallest gradients of fp16 above its smallest number


def exponentials(logits: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits (R, K): write exp(logits - their row's highest) to `out`; returns that highest, and the sums of the
    exponentials, fp32 (R,) each."""
    x = logits.float()
    highest = x.amax(-1)
    exponential = (x - highest[:, None]).exp()
    out.copy_(exponential)
    return highest, exponential.sum(-1)


def gradients(
    exponential: torch.Tensor, factor: torch.Tensor, place: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """Write (softmax - one_hot) scale of a block (R, K) to `out`: `factor` (R,) makes softmax times scale of the
    exponentials, and `place` (R,), int32, is the target's column, if it is one of these."""
    columns = torch.arange(exponential.size(1), device=exponential.device, dtype=torch.int32)
    hit = torch.where(columns == place[:, None], scale[:, None], 0.0)
    out.copy_(exponential.float() * factor[:, None] - hit)


class Kernels(NamedTuple):
    """The passes over logits, as they are or compiled."""

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
    """Mean cross-entropy in nats, an fp32 scalar, of the logits x weight^T against targets without those of
    IGNORE; 0 if no target is left.

    x is (N, C), weight (V, C), targets (N,). The products run in x's dtype, sums and softmax in fp32. The gradients of
    x and weight, weight's accumulated in fp32, can be taken once. `chunk_bytes` bounds the logits of a chunk; about
    twice that is held, and without compiled `kernels` on a GPU some fp32 copies more.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    sizes = _sizes(len(x), len(weight), x, chunk_bytes or CHUNK_BYTES.get(x.device.type, 2**27))
    with torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, kernels, sizes, wanted)


def _sizes(n_rows: int, n_columns: int, x: torch.Tensor, chunk_bytes: int) -> tuple[int, int]:
    """Rows of a chunk and columns of a block."""
    n_chunks = -(-n_rows * n_columns * x.element_size() // chunk_bytes)
    fewest = -(-n_columns * x.element_size() // BLOCK_ROW_BYTES)
    fits = [n for n in range(fewest, 2 * fewest + 1) if n_columns % n == 0]
    n_blocks = fits[0] if fits and x.device.type == "cpu" else 1
    return -(-n_rows // max(1, n_chunks)), n_columns // n_blocks


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, kernels, sizes, wanted):
        rows, columns = sizes
        blocks = weight.to(x.dtype).split(columns)
        boost = FP16_SCALE if x.dtype == torch.float16 else 1.0
        counts = targets != IGNORE
        scale = counts.float() * (boost / counts.sum().clamp(min=1))
        losses = torch.zeros(len(x), device=x.device)
        dx = torch.zeros_like(x, dtype=torch.float32) if wanted else None
        dweight = torch.empty_like(weight, dtype=torch.float32) if wanted else None
        scratch = x.new_empty(rows, columns)
        held = x.new_empty(len(blocks) if wanted else 1, rows, columns)
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            xs, s = x[chunk], scale[chunk]
            places = [targets[chunk].int() - i * columns for i in range(len(blocks))]
            highest, sums = torch.empty(2, len(blocks), len(xs), device=x.device)
            target_logits = torch.zeros(len(xs), device=x.device)
            for i, (block, place) in enumerate(zip(blocks, places, strict=True)):
                logits = torch.mm(xs, block.t(), out=scratch[: len(xs)])  # (R, K)
                found = logits.gather(1, place.clamp(0, columns - 1).long()[:, None]).squeeze(1)
                target_logits = torch.where((place >= 0) & (place < columns), found.float(), target_logits)
                highest[i], sums[i] = kernels.exponentials(logits, held[i if wanted else 0, : len(xs)])
            log_sum = (highest + sums.log()).logsumexp(0)  # (R,)
            losses[chunk] = (log_sum - target_logits) * s
            if not wanted:
                continue
            factors = (highest - log_sum).exp() * s  # (blocks, R)
            for i, (block, place, dblock) in enumerate(zip(blocks, places, dweight.split(columns), strict=True)):
                gradient = scratch[: len(xs)]
                kernels.gradients(held[i, : len(xs)], factors[i], place, s, gradient)
                dx[chunk] += gradient @ block
                product = gradient.t() @ xs
                dblock.copy_(product) if start == 0 else dblock.add_(product)
        ctx.dx, ctx.dweight, ctx.boost, ctx.dtype = dx, dweight, boost, x.dtype
        return losses.sum() / boost

    @staticmethod
    def backward(ctx, gradient):
        dx, dweight = ctx.dx, ctx.dweight
        del ctx.dx, ctx.dweight  # so that autograd can take their memory
        gradient = gradient / ctx.boost
        if gradient.device.type != "cpu" or gradient != 1:  # reading it on a GPU would wait for it
            dx.mul_(gradient), dweight.mul_(gradient)
        return dx.to(ctx.dtype), dweight, None, None, None, None
