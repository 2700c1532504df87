import pytest
import torch
import torch.nn.functional as F

from ops.attention import CHUNK, causal_attention


@pytest.fixture(params=[True, False], ids=["bf16 native", "bf16 emulated"])
def either_processor(request, monkeypatch) -> None:
    """Attention as processors with and without bf16 instructions choose it, whichever this one is."""
    monkeypatch.setattr("ops.attention.bf16_is_native", lambda: request.param)


@pytest.mark.parametrize("T", [1, 7, CHUNK, 2 * CHUNK + 3])
def test_bf16_attention_on_a_cpu_and_its_gradients_are_torchs(T, either_processor):
    torch.manual_seed(0)
    qkv = torch.randn(2, T, 3, 2, 24).bfloat16()
    gradient = torch.randn(2, 2, T, 24)

    def run(attend, tensor):
        tensor = tensor.detach().clone().requires_grad_()
        y = attend(*tensor.permute(2, 0, 3, 1, 4))
        y.backward(gradient.to(y.dtype))
        return y.detach(), tensor.grad

    want = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), qkv.double())
    got = run(lambda q, k, v: causal_attention(q, k, v, 0.0), qkv)
    torchs = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), qkv)
    for a, b, theirs in zip(got, want, torchs, strict=True):
        assert (a - b).norm() < 0.02 * b.norm() + 1e-6
        assert (a - b).norm() < 2 * (theirs - b).norm() + 1e-6, "as near to the truth as torch's own"


def test_bf16_attention_on_a_cpu_minds_documents_and_shared_heads_as_torchs_does(either_processor):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 200, 24).bfloat16() for heads in (4, 2, 2))
    gradient = torch.randn(2, 4, 200, 24)
    documents = (torch.rand(2, 200) < 0.02).cumsum(1, dtype=torch.int32)
    assert documents.max() > 1

    def run(dtype):
        tensors = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        y = causal_attention(*tensors, 0.0, documents)
        y.backward(gradient.to(dtype))
        return y.detach(), *(t.grad for t in tensors)

    for ours, exact in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert (ours - exact).norm() < 0.02 * exact.norm()


def test_the_operators_are_sound_under_autograd_and_the_compiler():
    inputs = [torch.randn(1, 2, 9, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    for documents in (None, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]], dtype=torch.int32)):
        operator = torch.ops.codegpt.chunked_attention.default
        torch.library.opcheck(operator, [*inputs, documents], rtol=0.05, atol=0.05)
