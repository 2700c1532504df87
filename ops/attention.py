"""Causal attention for training: our own kernel in bf16 on a CPU, torch's everywhere else.

torch's fused kernel for CPUs works on tiles that are too small for bf16 products. Ours multiplies a chunk of queries
with all keys that they may see, one product per head: 1.4 times as fast at 1,024 tokens of 8 heads, 1.9 times at 256 of
4 (docs/log.md). The backward pass computes the softmax again (Dao et al., "FlashAttention", 2022), so nothing of size
T x T is kept. In fp32 torch's kernel is 1.1 to 1.2 times as fast as ours, and where bf16 is emulated 1.8 to 3.7 times.
"""

import math

import torch
import torch.nn.functional as F

from runtime.device import bf16_is_native

CHUNK = 128  # queries at once: fewer compute less above the diagonal, more make larger products


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns, for each query, the mean of the values up to its own position, weighted by softmax(q k / sqrt(D)).

    q and the result are (B, H, T, D), k and v (B, K, T, D): each of the K heads serves H / K query heads. `dropout` is
    the share of weights to zero. `documents` (B, T) numbers documents; no query sees keys of another document.
    """
    if k.size(1) < q.size(1):
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))  # (B, H, T, D)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not dropout and bf16_is_native():
        return torch.ops.codegpt.chunked_attention(q, k, v, documents)
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()  # (B, 1, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


@torch.library.custom_op("codegpt::chunked_attention", mutates_args=())
def chunked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None
) -> torch.Tensor:
    shape = q.shape
    q, k, v = (t.contiguous().flatten(0, 1) for t in (q, k, v))  # (B H, T, D)
    y = torch.empty_like(q)
    future = _future(q)
    for start in range(0, q.size(1), CHUNK):
        end = min(start + CHUNK, q.size(1))
        weights = _weights(q[:, start:end], k[:, :end], future, documents)
        torch.bmm(weights, v[:, :end], out=y[:, start:end])
    return y.view(shape)


@torch.library.custom_op("codegpt::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = q.shape
    dy, q, k, v = (t.contiguous().flatten(0, 1) for t in (dy, q, k, v))  # (B H, T, D)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(q, dtype=torch.float32) for _ in range(2))
    future, scale = _future(q), 1 / math.sqrt(q.size(-1))
    for start in range(0, q.size(1), CHUNK):
        end = min(start + CHUNK, q.size(1))
        q_rows, dy_rows = q[:, start:end], dy[:, start:end]  # (B H, rows, D)
        weights = _weights(q_rows, k[:, :end], future, documents)  # (B H, rows, end)
        dv[:, :end] += weights.transpose(1, 2) @ dy_rows
        dweights = dy_rows @ v[:, :end].transpose(1, 2)
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dq[:, start:end] = (dscores @ k[:, :end]).mul_(scale)
        dk[:, :end] += dscores.transpose(1, 2) @ q_rows
    return dq.view(shape), dk.mul_(scale).to(q.dtype).view(shape), dv.to(q.dtype).view(shape)


def _future(q: torch.Tensor) -> torch.Tensor:
    """A mask (CHUNK, CHUNK) to add to scores: it hides from each query the keys after its own position."""
    return torch.full((CHUNK, CHUNK), -math.inf, dtype=q.dtype, device=q.device).triu(1)


def _weights(q: torch.Tensor, k: torch.Tensor, future: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Attention weights (B H, rows, end) of the queries q (B H, rows, D), the last rows of the keys k (B H, end, D)."""
    rows, end = q.size(1), k.size(1)
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(q.size(-1)))
    scores[:, :, -rows:] += future[:rows, :rows]
    if documents is not None:
        other = documents[:, end - rows : end, None] != documents[:, None, :end]  # (B, rows, end)
        scores.view(len(documents), -1, rows, end).masked_fill_(other[:, None], -math.inf)
    return torch.softmax(scores, -1)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return *torch.ops.codegpt.chunked_attention_backward(dy, *ctx.saved_tensors), None


# The shapes that the compiler needs: outputs are contiguous and otherwise like q.
chunked_attention.register_fake(lambda q, k, v, documents: q.new_empty(q.shape))
chunked_attention_backward.register_fake(lambda dy, q, k, v, documents: tuple(q.new_empty(q.shape) for _ in range(3)))
chunked_attention.register_autograd(_backward, setup_context=_save_inputs)
