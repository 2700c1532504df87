"""Where a model runs and in which arithmetic: device, precision, peak speed, memory used."""

import ctypes
import re
import sys

import torch

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
        raise ValueError(f"--device={name}: not a device; use cuda, cuda:1, mps or cpu") from None
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing or not available.get(device.type, False):
        raise ValueError(f"--device={name}: this machine has none that torch can use; leave it out or use cpu")
    return device


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The arithmetic of the matrix products; with None, bf16 where the hardware has it natively, fp16 on older CUDA
    devices, else fp32. torch.cuda.is_bf16_supported() counts emulation, so the compute capability decides."""
    if name is not None:
        if name not in DTYPES:
            raise ValueError(f"--dtype={name}: not one of {', '.join(DTYPES)}")
        if name == "float16" and device.type == "cpu":
            raise ValueError("--dtype=float16: not for training on a CPU; use bfloat16 or float32")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        probes = (getattr(torch.cpu, p, None) for p in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return torch.bfloat16 if any(probe() for probe in probes if probe) else torch.float32
    return torch.float32


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
