import types

import pytest
import torch
import torch.nn.functional as F

from ops.cross_entropy import (
    GPU_CHUNK_BYTES,
    GPU_PLAIN_CHUNK_BYTES,
    IGNORE,
    PLAIN,
    _sizes,
    exponentials,
    gradients,
    linear_cross_entropy,
)

N, C, V = 96, 32, 1024


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, V, (N,), dtype=torch.int32)
    targets[::7] = IGNORE
    return torch.randn(N, C), torch.randn(V, C), targets


def with_gradients(loss, x, weight, targets) -> tuple[torch.Tensor, ...]:
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in (x, weight))
    value = loss(x, weight, targets)
    (value * 3).backward()
    return value.detach(), x.grad, weight.grad


def reference(x, weight, targets) -> torch.Tensor:
    return F.cross_entropy(x @ weight.t(), targets.long(), ignore_index=IGNORE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("chunk_bytes", [1, 50_000, 2**30])
def test_loss_and_gradients_equal_float64_whatever_the_chunks(problem, dtype, tolerance, chunk_bytes):
    x, weight, targets = problem
    x = x.to(dtype)
    want = with_gradients(reference, x.double(), weight.to(dtype).double(), targets)
    got = with_gradients(lambda *args: linear_cross_entropy(*args, chunk_bytes=chunk_bytes), x, weight, targets)
    assert got[0].dtype == got[2].dtype == torch.float32 and got[1].dtype == dtype
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("block_row_bytes", [512, 2**14])
def test_blocks_of_columns_and_compiled_passes_change_nothing(block_row_bytes, problem, monkeypatch):
    monkeypatch.setattr("ops.cross_entropy.BLOCK_ROW_BYTES", block_row_bytes)
    want = with_gradients(reference, *(tensor.double() for tensor in problem[:2]), problem[2])
    for kernels in (PLAIN, PLAIN.compiled()):
        got = with_gradients(lambda *args, k=kernels: linear_cross_entropy(*args, k, chunk_bytes=100_000), *problem)
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() < 2e-6 * b.norm()


def test_logits_far_apart_neither_overflow_nor_lose_the_target(problem):
    x, weight, targets = problem
    x, targets = x * 100, targets.clamp(min=0)
    want = with_gradients(reference, x.double(), weight.double(), targets)
    got = with_gradients(lambda *args: linear_cross_entropy(*args, chunk_bytes=50_000), x, weight, targets)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all() and (a - b).norm() < 1e-5 * b.norm()


def test_no_more_logits_than_asked_for_are_held(problem):
    """Of the tensors made, none is as large as a chunk and a half, though all logits would be 48 chunks."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and C not in out.shape:  # neither x nor weight
                largest = max(largest, out.numel() * out.element_size())
            return out

    x, weight, targets = problem
    with Watch(), torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, chunk_bytes=8192)
    assert 0 < largest <= 1.5 * 8192 and loss == pytest.approx(reference(x, weight, targets).item(), rel=1e-5)


def test_the_reference_of_newer_torch_agrees(problem):
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is None:
        pytest.skip("this torch has no linear_cross_entropy")
    x, weight, targets = problem
    want = theirs(x, weight, targets.long(), ignore_index=IGNORE)
    assert linear_cross_entropy(x, weight, targets) == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("chunk_bytes", [8192, 2**30])
def test_without_any_target_the_loss_and_its_gradients_are_zero(problem, chunk_bytes):
    x, weight, targets = problem
    got = with_gradients(
        lambda *args: linear_cross_entropy(*args, chunk_bytes=chunk_bytes), x, weight, torch.full_like(targets, IGNORE)
    )
    assert [tensor.abs().max().item() for tensor in got] == [0.0, 0.0, 0.0]


def test_a_token_at_half_of_all_places_does_not_overflow_fp16(problem):
    """Its gradient is a sum over half of the rows, which the scale of fp16 gradients must leave room for."""
    x, weight, targets = problem
    x, targets = (60 * x.sign()).half(), torch.where(torch.arange(N) % 2 == 0, 7, targets.clamp(min=0)).int()
    x[:, 0] = 60.0
    want = with_gradients(reference, x.double(), weight.half().double(), targets)
    got = with_gradients(linear_cross_entropy, x, weight, targets)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all() and (a - b).norm() < 1e-2 * b.norm()


def test_gpu_chunks_are_of_one_size_and_shrink_with_the_micro_batch():
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)
    for chunk_bytes in (GPU_CHUNK_BYTES, GPU_PLAIN_CHUNK_BYTES):
        for vocabulary in (100_352, 16_384):
            rows = [_sizes(n * 1024, vocabulary, on_gpu, chunk_bytes)[0] for n in (64, 32, 16, 12, 8, 4, 2, 1)]
            assert all(n * 1024 % r == 0 for n, r in zip((64, 32, 16, 12, 8, 4, 2, 1), rows, strict=True))
            assert all(2 * r * vocabulary <= chunk_bytes for r in rows) and rows[-1] <= 512


@pytest.mark.parametrize("highest_given", [False, True])
def test_gradients_from_logits_are_those_from_exponentials(highest_given, problem):
    """A GPU computes them from the logits, in place; a CPU from the exponentials that it kept."""
    x, weight, targets = problem
    logits = x @ weight.t()
    kept = torch.empty_like(logits)
    highest, sums = exponentials(logits, kept)
    scale, out = torch.rand(N), logits.clone()
    factor = scale / sums
    gradients(out if highest_given else kept, highest if highest_given else None, factor, targets, scale, out)
    one_hot = F.one_hot(targets.clamp(min=0).long(), V) * (targets != IGNORE)[:, None]
    assert torch.allclose(out, (logits.softmax(-1) - one_hot) * scale[:, None], atol=1e-6)
