import copy
import dataclasses
import math
import re
import time

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from inference.generate import generate_tokens
from inference.optimize import QUANTIZATIONS, Float16Linear, Int8Linear, PackedLinear, optimize
from model import GPT, GPTConfig, KVCache
from runtime.errors import UserError


@pytest.fixture(scope="module")
def model(lively_model) -> GPT:
    return lively_model


def greedy(model: GPT, n_tokens: int = 100, n_samples: int = 1) -> torch.Tensor:
    steps = generate_tokens(model, torch.arange(10)[None], lambda logits: logits.argmax(-1), n_samples)
    return torch.stack([next(steps) for _ in range(n_tokens)], dim=1)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_packed_weights_leave_greedy_decoding_in_fp32_unchanged(model, n_samples):
    packed = copy.deepcopy(model)
    optimize(packed, n_samples)
    assert isinstance(packed.head, PackedLinear)
    decoded = greedy(packed, n_samples=n_samples)
    assert torch.equal(decoded, greedy(model, n_samples=n_samples)) and len(decoded.unique()) > 10


def test_int8_weights_are_within_half_a_step_of_their_row(model):
    rounded = copy.deepcopy(model)
    optimize(rounded, quantize="int8")
    assert isinstance(rounded.head, Int8Linear) and rounded.head.weight.dtype == torch.int8
    scale = rounded.head.scale.float()[:, None]
    error = rounded.head.weight * scale - model.wte.weight
    assert (error.abs() <= 0.501 * scale).all()
    assert (scale < 1.01 * model.wte.weight.abs().amax(1, keepdim=True) / 127).all()
    x = torch.randn(2, 20, 64)
    # torch's int8 product with bf16's seven bits of mantissa, and the one of many rows
    for rows, tolerance in ((x[:, :1], 2**-7), (x, 2**-20 if rounded.head.many_dtype == torch.float32 else 2**-7)):
        exact = rows @ (model.wte.weight + error).T
        assert (rounded.head(rows) - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("width", [100, 65, 96, 8])
def test_int8_products_read_no_further_than_the_weights(width):
    """torch's own takes 16 or 32 columns at a time, and of other widths whatever lies behind them."""
    torch.manual_seed(0)
    weight = torch.randn(33, width)
    for dtype in (torch.float32, torch.bfloat16):
        layer = Int8Linear(weight.to(dtype), torch.ones(33, dtype=dtype), 1)
        for rows in range(1, 7):
            x = torch.randn(rows, width).to(dtype)
            exact = x.float() @ (layer.weight * layer.scale.float()[:, None]).T + 1
            y = layer(x)
            assert y.dtype == dtype and (y - exact).norm() < 2**-6 * exact.norm()


def test_fp16_weights_decode_as_fp32_does(model):
    rounded = copy.deepcopy(model)
    try:
        optimize(rounded, 3, "float16")
    except ValueError as error:
        pytest.skip(str(error))  # FBGEMM is for x86
    assert isinstance(rounded.head, Float16Linear)
    for x in torch.randn(1, 64), torch.randn(2, 3, 64):
        exact = x @ model.wte.weight.T
        assert (rounded.head(x) - exact).norm() < 2**-11 * exact.norm()
    assert isinstance(rounded.h[0].mlp.c_fc, Float16Linear)
    x = torch.randn(4, 64)
    assert torch.allclose(rounded.h[0].mlp.c_fc(x), model.h[0].mlp.c_fc(x), atol=1e-2)


def test_products_that_this_torch_lacks_are_refused_by_name_and_a_slow_one_says_so(model, monkeypatch, capsys):
    class Missing(Int8Linear):
        def forward(self, x):
            raise NotImplementedError

    class Slow(Int8Linear):
        def forward(self, x):
            time.sleep(0.01)
            return super().forward(x)

    monkeypatch.setitem(QUANTIZATIONS, "int8", Missing)
    with pytest.raises(UserError, match=r"--quantize=int8: this torch, .* has no such products"):
        optimize(copy.deepcopy(model), quantize="int8")
    monkeypatch.setitem(QUANTIZATIONS, "int8", Slow)
    optimize(copy.deepcopy(model), 8, "int8")
    assert re.search(
        r"--quantize=int8: decoding 8 at once, this processor takes \d+\.\d times as long as in float32; leave it out, "
        "or decode at most 4 at once",
        capsys.readouterr().err,
    )


def test_quantized_weights_are_for_cpus():
    """On a GPU their products would read more bytes than those of bf16."""
    elsewhere = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=16)).to("meta")
    for name in QUANTIZATIONS:
        with pytest.raises(UserError, match=f"--quantize={name}: only for CPUs; on this device use --dtype=bfloat16"):
            optimize(elsewhere, quantize=name)


def test_a_static_cache_gives_the_same_logits(model):
    tokens = torch.randint(0, 640, (3, 40))
    logits = []
    with torch.no_grad():
        for static in (False, True):
            cache = KVCache(model.config, 3, tokens.device, torch.float32, static)
            steps = [model.decode(tokens[:, :10], cache)]
            steps += [model.decode(tokens[:, t, None], cache) for t in range(10, 30)]
            whole, cache = cache, KVCache(model.config, 2, tokens.device, torch.float32, static)
            cache.copy_rows(whole, torch.tensor([2, 0]))
            steps += [model.decode(tokens[[2, 0], t, None], cache) for t in range(30, 40)]
            logits.append(steps)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*logits, strict=True))


@pytest.mark.parametrize("n_samples", [1, 3, 20])
@pytest.mark.parametrize("modern", [False, True])
def test_steps_on_a_static_cache_are_compiled_once(modern, n_samples, model, monkeypatch):
    """However many rows, however long the text, which moves the window; and a second text is not compiled again."""
    if modern:
        parts = {"rope_theta": 100.0, "rms_norm": True, "qk_norm": True, "swiglu": True, "n_kv_head": 1}
        model = GPT(dataclasses.replace(model.config, **parts)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(model, "compiled_decode", torch.compile(model._decode, dynamic=False, backend=backend))
    first = greedy(model, n_samples=n_samples)
    (cache,) = [cache for rows, cache in model.idle_caches.items() if rows == n_samples]
    second = greedy(model, n_tokens=50, n_samples=n_samples)
    assert model.idle_caches[n_samples] is cache, "another cache would record CUDA graphs anew"
    for one_token in torch.arange(n_samples)[:, None], torch.tensor([[5]]):
        steps = generate_tokens(model, one_token, lambda logits: logits.argmax(-1), n_samples)
        assert [len(next(steps)) for _ in range(2)] == [n_samples] * 2
    monkeypatch.undo()
    model.idle_caches.clear()
    assert torch.equal(first, greedy(model, n_samples=n_samples)) and torch.equal(second, first[:, :50])
    assert len(compiled) == 1


def test_an_infinity_in_a_text_does_not_spoil_the_next_one(model, monkeypatch):
    """The cache of a compiled step is used again, and what is masked counts 0 times what it is."""
    model = copy.deepcopy(model)
    monkeypatch.setattr(model, "compiled_decode", model._decode)
    model.head = torch.nn.Linear(64, 640, bias=False).requires_grad_(False)
    good = greedy(model, n_tokens=20)
    model.wte.weight.data[639] = torch.inf
    spoilt = generate_tokens(model, torch.full((1, 40), 639), lambda logits: logits.argmax(-1))
    assert len(next(spoilt)) == 1
    spoilt.close()
    assert torch.equal(greedy(model, n_tokens=20), good)


def test_a_compiled_step_makes_nothing_that_grows_with_the_cache():
    """It writes keys and values in place: in the compiler's own code, no buffer depends on the cache's length."""
    sizes = []
    for block_size in (64, 512):
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size, vocab_size=128)).eval()
        model.compile_decoding()
        cache = KVCache(model.config, 3, torch.device("cpu"), torch.float32, static=True)
        with torch.inference_mode(), torch._inductor.config.patch(force_disable_caches=True):
            model.decode(torch.zeros((3, 2), dtype=torch.int64), cache)  # a prompt
            _, (code,) = run_and_get_code(model.decode, torch.zeros((3, 1), dtype=torch.int64), cache)
        shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
        sizes.append([math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes])
    assert sizes[0] == sizes[1] and len(sizes[0]) > 5
