"""The device a model runs on: its choice, precision, random generators, peak speed and memory."""

import ctypes
import functools
import math
import re
import sys
import time

import torch
import torch.nn.functional as F

from runtime.errors import UserError

# Dense peak of the tensor cores, FLOP/s in bf16 (fp16 where bf16 is not native) with fp32 sums, from the vendor's data
# sheets, by a part of the device's name; the first that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "RTX PRO 6000 Blackwell Server": 480e12,  # Colab's G4
    "RTX PRO 6000": 504e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str | None) -> torch.device:
    """The device called `name`; None takes the first available of CUDA, MPS and the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name}: not a device; use cuda, cuda:1, mps or cpu") from None
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing or not available.get(device.type, False):
        raise UserError(f"--device={name}: this machine has none that torch can use; leave out --device or use cpu")
    if device.type == "cuda":
        _require_code_for(device)
    return device


def _require_code_for(device: torch.device) -> None:
    """Raise UserError if the GPU is older than any that this build of torch has code for."""
    capability = torch.cuda.get_device_capability(device)
    built = [tuple(map(int, found)) for arch in torch.cuda.get_arch_list() for found in re.findall(r"_(\d+)(\d)", arch)]
    if built and capability < min(built):
        raise UserError(
            f"{torch.cuda.get_device_name(device)}: too old for this build, torch {torch.__version__}; install the one "
            'for CUDA 12.6, pip install "torch<2.15" --index-url https://download.pytorch.org/whl/cu126, or use '
            "--device=cpu"
        )


def resolve_dtype(
    name: str | None, device: torch.device, rows: int = 256, width: int = 512, began_in: str | None = None
) -> torch.dtype:
    """The dtype of matrix products called `name`; None takes the one that is fast on `device`.

    On CUDA that is bf16 if the compute capability has it (torch.cuda.is_bf16_supported() counts emulation), else fp16.
    On a CPU it is bf16 if that is measured to be faster for `rows` rows in a model of that `width`, else fp32; a run
    that `began_in` one of them keeps it unless it is far slower here, to continue bit for bit. On MPS it is fp32.
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
    longest = {"bfloat16": 1.5, "float32": 1 / 1.5}.get(began_in, 1 / 1.2)  # bf16 is taken if it takes less
    return torch.bfloat16 if bf16_time < longest else torch.float32


def relative_time(dtype: torch.dtype, rows: int = 256, width: int = 512) -> float:
    """The time of a matrix product in `dtype` on this CPU, divided by the time of the same product in fp32. It has
    `rows` rows, at most 256, and an MLP's weights at that `width`, at most 512. Measured once per process, in 0.1 s.

    A processor's flags do not tell: an emulated dtype takes 5 to 60 times as long as fp32, one with instructions of its
    own half as long or less, but only if torch's libraries use them.
    """
    return _relative_time(dtype, min(rows, 256), min(width, 512))


@functools.cache
def _relative_time(dtype: torch.dtype, rows: int, width: int) -> float:
    sizes = (rows, width), (4 * width, width)
    operands = {d: [torch.ones(size, dtype=d) for size in sizes] for d in (torch.float32, dtype)}
    best_s = dict.fromkeys(operands, math.inf)
    t_end = time.perf_counter() + 0.1
    for attempt in range(10):
        enough = time.perf_counter() > t_end or best_s[dtype] > 3 * best_s[torch.float32]
        if attempt > 3 and enough:  # not sooner: the first products set up their library, or another program interferes
            break
        for d, (x, weight) in operands.items():
            with torch.autocast("cpu", enabled=False):
                t0 = time.perf_counter()
                F.linear(x, weight)
                best_s[d] = min(best_s[d], time.perf_counter() - t0)
    return best_s[dtype] / best_s[torch.float32]


def bf16_is_native() -> bool:
    """Whether this CPU has instructions for bf16 products: these take half as long as fp32, emulated ones four times as
    long or more. The bound is far from both, so a continued run gets the same answer."""
    return relative_time(torch.bfloat16) < 2


def warn_if_slow(dtype: torch.dtype, device: torch.device, rows: int = 256, width: int = 512) -> None:
    """Warn if matrix products in `dtype` are slower than in fp32 on this CPU."""
    if device.type != "cpu" or dtype == torch.float32:
        return
    times = relative_time(dtype, rows, width)
    if times > 1.1:
        name = str(dtype).removeprefix("torch.")
        message = f"this processor takes {times:.1f} times as long for a matrix product as with --dtype=float32"
        print(f"warning: --dtype={name}: {message}", file=sys.stderr)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products run in `dtype`; weights and reductions stay in fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks for the next step; with another C library, do nothing.

    By default glibc returns each block to the system, which zeroes its pages again for the next step: a tenth of a
    step's time on two cores, for about a tenth more memory (docs/log.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return
    mallopt(ctypes.c_int(-3), ctypes.c_int(2**30))  # M_MMAP_THRESHOLD
    mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: torch's allocator, or cuBLAS, Triton or the compiler on its behalf."""
    signs = ("OutOfMemoryError", "[CUDA]: out of memory", "CUDA error: out of memory", "CUDA out of memory")
    signs += ("_STATUS_ALLOC_FAILED", "DefaultCPUAllocator", "MPS backend out of memory")
    text = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in signs)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's random generators that training on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Go back to a state from `rng_state`; generators that it lacks (saved on other hardware) are left alone."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b(?!.*(Ti|Laptop|Max-Q))", name)), None
    )


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory this process has held: allocated by torch on CUDA, else resident; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
