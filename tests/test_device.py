import pytest
import torch

from device import autocast, peak_memory_bytes, resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_cuda_takes_bf16_only_where_it_is_native(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # as a T4 says, though it emulates it
    assert resolve_dtype(None, torch.device("cuda")) == expected


def test_mps_is_fp32_and_names_override():
    assert resolve_dtype(None, torch.device("mps")) == torch.float32
    assert resolve_dtype("float32", CPU) == torch.float32
    assert resolve_dtype(None, CPU) in (torch.float32, torch.bfloat16)


def test_what_is_not_there_is_refused():
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(ValueError, match=f"--device={missing}: this machine has none"):
        resolve_device(missing)
    with pytest.raises(ValueError, match="not for training on a CPU"):
        resolve_dtype("float16", CPU)


def test_autocast_runs_products_in_the_dtype():
    a = torch.randn(4, 4)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32
    assert peak_memory_bytes(CPU) > 2**20
