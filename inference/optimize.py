"""Make a model ready for decoding, where each token costs the reading of every weight: pack or quantize the weights.

On a CPU, weights are packed once into the blocks that oneDNN's products read; nn.Linear does that at every call.
`quantize` stores them in fewer bytes, which makes decoding of one to four rows faster:

    float16   half of fp32's bytes, products in fp32 (FBGEMM's, x86 only); logits are within 0.1%
    int8      a quarter, with a scale per output row (Dettmers et al., "LLM.int8()", 2022); products in bf16

The gain depends on the processor, so `optimize` measures it, and warns if decoding is slower than in fp32. docs/log.md
has figures. On a GPU the step of one token is compiled to a CUDA graph: written, and never run.
"""

import contextlib
import math
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from inference.generate import generate_tokens
from model import GPT
from runtime.device import is_out_of_memory, relative_time
from runtime.errors import UserError

MEASURED_WEIGHTS = 2**24  # of the head, at most, to time layers with: more than a CPU's cache holds


class PackedLinear(nn.Module):
    """x weight^T + bias, with a weight (N, K) in the layout of oneDNN's products for `batch_size` rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, batch_size: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch_size)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PlainLinear(nn.Module):
    """x weight^T + bias, with a weight (N, K) as it is: the fallback."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, batch_size: int):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Float16Linear(nn.Module):
    """x weight^T + bias, with a weight (N, K) rounded to fp16; the product widens it to fp32 in registers."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, batch_size: int):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)


class Int8Linear(nn.Module):
    """x weight^T + bias, with a weight (N, K) rounded to int8."""

    FEW_DTYPE = torch.bfloat16  # torch's int8 product is fast for it on all CPUs; for fp32, on some a scalar loop
    MOST_ROWS = 4  # rows of x up to which torch's int8 product is faster than a dequantized one
    STRIDE = 32  # columns that it reads at once; of a width that is no multiple of this it reads past the end

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, batch_size: int):
        super().__init__()
        emulated = weight.dtype != torch.float32 and relative_time(weight.dtype) > 1
        self.many_dtype = torch.float32 if emulated else weight.dtype
        self.most_rows = self.MOST_ROWS if weight.size(1) % self.STRIDE == 0 else 0
        scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-7) * (1 + 2**-8)  # bf16 must not round it too small
        self.scale = scale.to(self.FEW_DTYPE)  # (N)
        steps = weight.float() / self.scale.float()[:, None]
        self.weight, self.bias = steps.round().clamp(-127, 127).to(torch.int8), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.size(-1))
        if len(rows) <= self.most_rows:
            y = torch._weight_int8pack_mm(rows.to(self.FEW_DTYPE), self.weight, self.scale)
        else:
            y = F.linear(rows.to(self.many_dtype), self.weight.to(self.many_dtype)) * self.scale.to(self.many_dtype)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


QUANTIZATIONS: dict[str, type[nn.Module]] = {"float16": Float16Linear, "int8": Int8Linear}


@torch.no_grad()
def optimize(model: GPT, batch_size: int = 1, quantize: str | None = None) -> None:
    """Replace, in place, the linear layers and the head by layers that are fast for about `batch_size` rows at once;
    the embedding stays. The model can then only decode. `quantize` is None or one of QUANTIZATIONS.

    Raises UserError for a quantization that this machine cannot run.
    """
    head = model.head_weight.detach()
    layer = _choose_layer(head, batch_size, quantize)
    if head.device.type == "cpu":
        _warn_if_slower(layer, head, batch_size, quantize)
    if layer is not PlainLinear:
        model.head = layer(head, None, batch_size)
        for parent in list(model.h.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    bias = None if child.bias is None else child.bias.detach()
                    setattr(parent, name, layer(child.weight.detach(), bias, batch_size))
    if head.device.type == "cuda":
        compile_step(model, batch_size)


def _choose_layer(head: torch.Tensor, batch_size: int, quantize: str | None) -> type[nn.Module]:
    """The kind of layer to use for weights like `head`: one that this torch can run on this machine."""
    if quantize is None:
        packs = head.device.type == "cpu" and _runs(PackedLinear, head, batch_size)
        return PackedLinear if packs else PlainLinear
    if head.device.type != "cpu":  # the products there would first widen all weights: slower than 16-bit weights
        raise UserError(f"--quantize={quantize}: only for CPUs; on this device use --dtype=bfloat16 or float16")
    layer = QUANTIZATIONS[quantize]
    if not _runs(layer, head, batch_size):
        raise UserError(
            f"--quantize={quantize}: this torch, {torch.__version__}, has no such products for this processor; leave "
            "it out"
        )
    return layer


def _runs(layer: type[nn.Module], weight: torch.Tensor, batch_size: int) -> bool:
    try:
        made = layer(weight[:32], None, batch_size)
        for rows in (1, batch_size):
            made(weight.new_zeros(rows, weight.size(1)))
    except (AttributeError, RuntimeError) as error:  # another build or processor
        if is_out_of_memory(error):
            raise
        return False
    return True


def _warn_if_slower(layer: type[nn.Module], head: torch.Tensor, batch_size: int, quantize: str | None) -> None:
    """Warn if decoding `batch_size` rows with `layer` is slower here than in fp32, timed on a part of the head."""
    if head.dtype == torch.float32 and quantize is None:
        return
    weight = head[: max(1, MEASURED_WEIGHTS // head.size(1))]
    fp32 = weight.float()
    x, x_fp32 = (tensor.new_ones(batch_size, tensor.size(1)) for tensor in (weight, fp32))
    made = layer(weight, None, batch_size)
    made_fp32 = _choose_layer(fp32, batch_size, None)(fp32, None, batch_size)
    best_s = best_fp32_s = math.inf
    for _ in range(7):  # in turn, so that both meet the same load
        best_s = min(best_s, _seconds_of(made, x))
        best_fp32_s = min(best_fp32_s, _seconds_of(made_fp32, x_fp32))
    times = best_s / best_fp32_s
    if times > 1.1:
        flag = f"--quantize={quantize}" if quantize else f"--dtype={str(head.dtype).removeprefix('torch.')}"
        remedy = ", or decode at most 4 at once" if quantize == "int8" and batch_size > 4 else ""
        print(
            f"warning: {flag}: decoding {batch_size} at once, this processor takes {times:.1f} times as long as in "
            f"float32; leave it out{remedy}",
            file=sys.stderr,
        )


def _seconds_of(layer: nn.Module, x: torch.Tensor) -> float:
    t0 = time.perf_counter()
    layer(x)
    return time.perf_counter() - t0


def compile_step(model: GPT, batch_size: int) -> None:
    """Compile the step of one token and try it on `batch_size` rows. If that fails, warn and decode without it."""
    model.compile_decoding()
    start = torch.zeros((batch_size, 1), dtype=torch.int64, device=model.wte.weight.device)
    try:
        with contextlib.closing(generate_tokens(model, start, lambda logits: logits.argmax(-1), batch_size)) as steps:
            for _ in range(4):  # reads the prompt, compiles, records a CUDA graph, runs it
                next(steps)
    except Exception as error:  # no compiler, an unsupported platform: the compiler raises anything
        if is_out_of_memory(error):
            raise
        model.compiled_decode = None
        model.idle_caches.clear()
        reason = str(error).strip().split("\n")[0]
        print(f"warning: torch.compile failed ({reason}); decoding without it, slower", file=sys.stderr)
