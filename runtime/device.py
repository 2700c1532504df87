"""Where a model runs and in which arithmetic: device, precision, peak speed, memory used."""

import ctypes
import functools
import math
import re
import sys
import time

import torch
import torch.nn.functional as F

from runtime.errors import UserError

# Dense peak of the tensor cores, FLOP/s in bf16 (fp16 where bf16 is not native), from the vendor's data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str | None) -> torch.device:
    """The device called `name`; with None the best one here: CUDA, then MPS, then the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name}: not a device; use cuda, cuda:1, mps or cpu") from None
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing or not available.get(device.type, False):
        raise UserError(f"--device={name}: this machine has none that torch can use; leave it out or use cpu")
    return device


def resolve_dtype(
    name: str | None, device: torch.device, rows: int = 256, width: int = 512, began_in: str | None = None
) -> torch.dtype:
    """The arithmetic of the matrix products called `name`; with None the one that is fast on `device`.

    On CUDA that is bf16 where it is native, else fp16: the compute capability decides, because
    torch.cuda.is_bf16_supported() counts emulation. On a CPU it is bf16 if that is measured to be the faster for `rows`
    rows of a model of that `width`; a run that `began_in` one of the two keeps it unless it is by far the slower here,
    so that it continues bit for bit. Elsewhere it is fp32.
    """
    if name is not None:
        if name not in DTYPES:
            raise UserError(f"--dtype={name}: not one of {', '.join(DTYPES)}")
        if name == "float16" and device.type == "cpu":
            raise UserError("--dtype=float16: not for training on a CPU; use bfloat16 or float32")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type != "cpu":
        return torch.float32
    bf16_time = relative_time(torch.bfloat16, rows, width)
    slowest = {"bfloat16": 1.5, "float32": 1 / 1.5}.get(began_in, 1 / 1.2)  # bf16's time up to which it is taken
    return torch.bfloat16 if bf16_time < slowest else torch.float32


def relative_time(dtype: torch.dtype, rows: int = 256, width: int = 512) -> float:
    """How many times as long as in fp32 a matrix product in `dtype` takes on this CPU: of `rows` rows, at most 256,
    with the weights of a transformer's MLP of that `width`, at most 512. Measured once per process, in some 0.1 s.

    A flag of the processor does not tell: what is emulated takes 5 to 60 times as long, and what has instructions of
    its own half as long or less, if torch's libraries use them.
    """
    return _relative_time(dtype, min(rows, 256), min(width, 512))


@functools.cache
def _relative_time(dtype: torch.dtype, rows: int, width: int) -> float:
    sizes = (rows, width), (4 * width, width)
    operands = {d: [torch.ones(size, dtype=d) for size in sizes] for d in (torch.float32, dtype)}
    best_s = dict.fromkeys(operands, math.inf)
    t_end = time.perf_counter() + 0.1
    for attempt in range(10):
        if (attempt > 1 and time.perf_counter() > t_end) or best_s[dtype] > 3 * best_s[torch.float32]:
            break
        for d, (x, weight) in operands.items():
            with torch.autocast("cpu", enabled=False):
                t0 = time.perf_counter()
                F.linear(x, weight)
                best_s[d] = min(best_s[d], time.perf_counter() - t0)
    return best_s[dtype] / best_s[torch.float32]


def bf16_is_native() -> bool:
    """Whether this CPU has instructions for products in bf16: then they take about half of fp32's time, and emulated
    four times as long or longer. Far from both lies the bound, so that a run that goes on finds the same."""
    return relative_time(torch.bfloat16) < 2


def warn_if_slow(dtype: torch.dtype, device: torch.device, rows: int = 256, width: int = 512) -> None:
    """Say by how much products in `dtype` are slower than in fp32 on this CPU, if they are."""
    if device.type == "cpu" and dtype != torch.float32 and (times := relative_time(dtype, rows, width)) > 1.1:
        name = str(dtype).removeprefix("torch.")
        print(
            f"warning: --dtype={name}: this processor takes {times:.1f} times as long for a matrix product as with "
            "--dtype=float32",
            file=sys.stderr,
        )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products run in `dtype`; weights and reductions stay in fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Have the C library keep large blocks that are freed, for the next step to use again, where it is glibc.

    By default it gives each back to the system, and its pages are zeroed one by one when the next step asks for them: a
    tenth of a step's time on two cores, saved for about as much more memory (docs/log.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return
    mallopt(ctypes.c_int(-3), ctypes.c_int(2**30))  # M_MMAP_THRESHOLD
    mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory this process has held: allocated by torch on CUDA, resident elsewhere (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
