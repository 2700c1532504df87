"""A model made ready for decoding, where a token costs the reading of every weight: packed, or as int8.

On a CPU weights are packed once into the blocks in which oneDNN's products read them, which nn.Linear does at every
call: 2.8 times as fast a head for one row in bf16 (docs/log.md). As int8 they take half the bytes of bf16, each output
row with its own scale, the arithmetic as before: for a batch of one to four. Source: Dettmers et al., "LLM.int8()",
2022, for rows scaled by their largest weight. On a GPU the step of one token is compiled, to be a CUDA graph: written,
and never run.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, KVCache

QUANTIZATIONS = ("int8",)


class PackedLinear(nn.Module):
    """x weight^T + bias, of a weight (N, K) in the layout of a CPU's products for `batch_size` rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, batch_size: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch_size)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """x weight^T + bias, of a weight (N, K) rounded to int8."""

    MOST_ROWS = 4  # of activations that torch's int8 product is the faster for

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, batch_size: int):
        super().__init__()
        self.scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-7).to(weight.dtype)  # (N)
        steps = weight.float() / self.scale.float()[:, None]
        self.weight, self.bias = steps.round().clamp(-127, 127).to(torch.int8), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.size(-1))
        if rows.device.type == "cpu" and len(rows) <= self.MOST_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def prepare(model: GPT, batch_size: int = 1, quantize: str | None = None) -> None:
    """Put weights as decoding reads them in the place of the linear layers' and the head's, for about `batch_size` rows
    at once; the embedding stays as it was. `quantize` is None or one of QUANTIZATIONS. The model is for decoding alone
    then.
    """
    device = model.wte.weight.device
    linear: Callable[..., nn.Module] | None = Int8Linear if quantize else PackedLinear if _can_pack(model) else None
    if linear is not None:
        model.head = linear(model.head_weight.detach(), None, batch_size)
        for parent in list(model.h.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, linear(child.weight.detach(), child.bias, batch_size))
    if device.type == "cuda":
        compile_step(model, batch_size)


def compile_step(model: GPT, batch_size: int) -> None:
    """Compile the step of one token, trying it on `batch_size` rows; where that fails, warn and leave it as it was."""
    model.compile_decoding()
    weight = model.wte.weight
    cache = KVCache(model.config, batch_size, weight.device, weight.dtype, static=True)
    try:
        model.decode(torch.zeros((batch_size, 1), dtype=torch.int64, device=weight.device), cache)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, an unsupported platform: the compiler raises anything
        model.compiled_decode = None
        reason = str(error).strip().split("\n")[0]
        print(f"warning: torch.compile failed ({reason}); decoding without it, slower", file=sys.stderr)


def _can_pack(model: GPT) -> bool:
    """Whether this torch, on this machine, has packed products in the model's dtype."""
    weight = model.h[0].attn.c_proj.weight.detach()
    if weight.device.type != "cpu":
        return False
    try:
        PackedLinear(weight, None, 1)(weight.new_zeros(1, weight.size(1)))
    except (AttributeError, RuntimeError):  # another build or processor
        return False
    return True
