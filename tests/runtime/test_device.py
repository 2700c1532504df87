import time

import pytest
import torch

from runtime.device import (
    autocast,
    peak_flops,
    peak_memory_bytes,
    relative_time,
    resolve_device,
    resolve_dtype,
    warn_if_slow,
)
from runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_cuda_takes_bf16_only_where_it_is_native(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # as a T4 says, though it emulates it
    assert resolve_dtype(None, torch.device("cuda")) == expected


def test_a_gpu_that_this_torch_has_no_code_for_is_one_line_that_names_the_build(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_name", "Tesla V100-SXM2-16GB")):
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"])
    for capability in ((7, 5), (8, 9), (10, 3), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert resolve_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(UserError, match=r"V100.*too old for this build, .*CUDA 12\.6"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 480),
        ("Tesla T4", 65),
        ("NVIDIA A1000", None),
    ],
)
def test_a_gpus_peak_is_found_by_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)


def test_mps_is_fp32_and_names_override():
    assert resolve_dtype(None, torch.device("mps")) == torch.float32
    assert resolve_dtype("float32", CPU) == torch.float32


@pytest.mark.parametrize(
    ("bf16_time", "began_in", "expected"),
    [
        (0.5, None, torch.bfloat16),
        (0.95, None, torch.float32),
        (5.0, None, torch.float32),
        (0.95, "bfloat16", torch.bfloat16),  # a measurement near one must not change a run that goes on
        (0.8, "float32", torch.float32),
        (5.0, "bfloat16", torch.float32),  # a run that moved to another processor
        (0.5, "float32", torch.bfloat16),
    ],
)
def test_a_cpu_takes_what_it_measures_to_be_fast_and_a_run_keeps_what_it_began_in(
    bf16_time, began_in, expected, monkeypatch
):
    monkeypatch.setattr("runtime.device._relative_time", lambda dtype, rows, width: bf16_time)
    assert resolve_dtype(None, CPU, began_in=began_in) == expected


def test_the_measurement_finds_a_slow_arithmetic_slow_and_says_so(capsys):
    assert relative_time(torch.float64) > 1.2, "half as many numbers in a register"
    warn_if_slow(torch.float64, CPU)
    assert "--dtype=float64: this processor takes" in capsys.readouterr().err
    warn_if_slow(torch.float32, CPU)
    assert not capsys.readouterr().err


def test_one_slow_product_does_not_make_an_arithmetic_slow(monkeypatch):
    """The first one of a dtype sets up its library, and a busy machine may stop any of them for a while."""
    from runtime import device

    calls = []

    def linear(x, weight):
        calls.append(x.dtype)
        time.sleep(0.05 if calls.count(torch.bfloat16) == 1 and x.dtype == torch.bfloat16 else 0.002)

    device._relative_time.cache_clear()
    monkeypatch.setattr("runtime.device.F.linear", linear)
    assert relative_time(torch.bfloat16, 4, 8) < 2
    device._relative_time.cache_clear()


def test_autocast_leaves_the_measurement_alone(monkeypatch):
    """Measured in a forward pass under autocast, it must compare what it says."""
    from runtime import device

    seen = []

    def linear(x, weight):
        seen.append((x @ weight.T).dtype)
        return x

    device._relative_time.cache_clear()
    monkeypatch.setattr("runtime.device.F.linear", linear)
    with autocast(CPU, torch.bfloat16):
        relative_time(torch.bfloat16, 4, 8)
    device._relative_time.cache_clear()
    assert set(seen) == {torch.float32, torch.bfloat16}


def test_what_is_not_there_is_refused():
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(UserError, match=f"--device={missing}: this machine has none"):
        resolve_device(missing)
    with pytest.raises(UserError, match="not for training on a CPU"):
        resolve_dtype("float16", CPU)


def test_autocast_runs_products_in_the_dtype():
    a = torch.randn(4, 4)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32
    assert peak_memory_bytes(CPU) > 2**20
