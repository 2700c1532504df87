import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import GPT, IGNORE, Context, GPTConfig, KVCache
from runtime.config import load_config
from runtime.errors import UserError
from train import TrainConfig

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=128)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    for parameter in model.parameters():  # nothing left at zero or one, where a mistake would not show
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_default_sizes_are_codegpt_70m():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.n_parameters() == 69_560_064
    assert model.flops_per_token() == pytest.approx(469e6, rel=1e-3)


PUBLISHED = {  # parameters; all but the first rounded, and the names may round further down
    "70m": 69_560_064,
    "codeparrot_110m": 110e6,
    "codeparrot_1b5": 1.5e9,
    "polycoder_160m": 160e6,
    "polycoder_400m": 0.4e9,
    "polycoder_2b7": 2.7e9,
    "starcoder_1b": 1.1e9,
    "starcoder_15b": 15.5e9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_the_systems_we_follow_have_their_published_sizes(name):
    config = load_config(TrainConfig, [str(Path(__file__).parent.parent / "configs" / f"{name}.py")])
    with torch.device("meta"):
        n_parameters = GPT(config).n_parameters()
    assert n_parameters == pytest.approx(PUBLISHED[name], rel=0 if name == "70m" else 0.035)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Ready to be compared: nothing at zero or one, where a mistake would not show."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1 if parameter.dim() == 1 else 0.0, std=0.05)
    return model.eval()


def assert_same_logits(model: GPT, weights: dict[str, torch.Tensor], reference: torch.nn.Module) -> None:
    """Given the reference's weights, `model` computes its logits, at once and token by token."""
    model.load_state_dict(weights)
    model.eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 40))
    cache = KVCache(model.config, 2, tokens.device, torch.float32)
    with torch.no_grad():
        want = reference(tokens).logits
        assert (model(tokens) - want).abs().max() < 1e-4
        for t, column in enumerate(tokens.split(1, 1)):
            assert (model.decode(column, cache) - want[:, t]).abs().max() < 1e-4


def gpt2_weights(reference: torch.nn.Module, kv_width: int, transposed: bool) -> dict[str, torch.Tensor]:
    """Weights of GPT-2 and its kin under our names: q, k and v apart, and as nn.Linear stores them."""
    weights = {}
    for name, value in reference.transformer.state_dict().items():
        if transposed and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.T
        if "c_attn" in name:
            parts = value.split([len(value) - 2 * kv_width, kv_width, kv_width])
            weights |= {name.replace("c_attn", c): part for c, part in zip(("c_q", "c_k", "c_v"), parts, strict=True)}
        else:
            weights[name] = value
    return weights


def test_logits_equal_hugging_face_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    reference = randomized(GPT2LMHeadModel(GPT2Config(n_layer=3)))
    model = GPT(GPTConfig(n_layer=3, n_head=12, n_embd=768, block_size=1024, vocab_size=50257))
    assert_same_logits(model, gpt2_weights(reference, 768, transposed=True), reference)


def test_logits_equal_hugging_face_gpt_bigcode():
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 128, "vocab_size": 512}
    reference = randomized(GPTBigCodeForCausalLM(GPTBigCodeConfig(n_positions=64, multi_query=True, **sizes)))
    model = GPT(GPTConfig(block_size=64, n_kv_head=1, **sizes))
    assert_same_logits(model, gpt2_weights(reference, 32, transposed=False), reference)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_hugging_face_qwen3(tied):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    theirs = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128}
    theirs |= {"head_dim": 16, "intermediate_size": 352, "vocab_size": 512, "tie_word_embeddings": tied}
    theirs |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    reference = randomized(Qwen3ForCausalLM(Qwen3Config(max_position_embeddings=64, **theirs)))
    parts = {"swiglu": True, "rms_norm": True, "qk_norm": True, "rope_theta": 10_000.0, "bias": False, "tied": tied}
    sizes = {"n_layer": 3, "n_head": 8, "n_kv_head": 2, "n_embd": 128, "mlp_width": 352, "block_size": 64}
    names = [("model.embed_tokens", "wte"), ("model.layers", "h"), ("model.norm", "ln_f"), ("lm_head", "head")]
    names += [("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"), ("self_attn", "attn")]
    names += [("q_proj", "c_q"), ("k_proj", "c_k"), ("v_proj", "c_v"), ("o_proj", "c_proj")]
    names += [("gate_proj", "c_gate"), ("up_proj", "c_fc"), ("down_proj", "c_proj")]
    weights = {}
    for name, value in reference.state_dict().items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        if not (tied and name == "head.weight"):
            weights[name] = value
    assert_same_logits(GPT(GPTConfig(vocab_size=512, **sizes, **parts)), weights, reference)


def test_future_tokens_do_not_change_past_logits(model):
    tokens = torch.randint(0, 128, (2, 24))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 128
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-2)


@pytest.mark.parametrize("pieces", [[24], [1] * 24, [5, 1, 1, 9, 8], [23, 1]])
def test_cached_logits_equal_full_forward_however_the_text_is_cut(model, pieces):
    tokens = torch.randint(0, 128, (3, 24))
    full = model(tokens)  # (B, T, V)
    cache, end = KVCache(SMALL, 3, tokens.device, torch.float32), 0
    with torch.no_grad():
        for length in pieces:
            logits = model.decode(tokens[:, end : end + length], cache)
            end += length
            assert torch.allclose(logits, full[:, end - 1], atol=1e-5)


MODERN = {"swiglu": True, "rms_norm": True, "qk_norm": True, "rope_theta": 100.0, "bias": False, "n_kv_head": 1}


@pytest.mark.parametrize("static", [False, True])
def test_cached_logits_of_the_modern_architecture_equal_full_forward(static):
    config = dataclasses.replace(SMALL, tied=False, **MODERN)
    model = randomized(GPT(config))
    tokens = torch.randint(0, 128, (3, 24))
    full = model(tokens)
    cache, end = KVCache(config, 3, tokens.device, torch.float32, static), 0
    with torch.no_grad():
        for length in [5, *[1] * 19]:
            logits = model.decode(tokens[:, end : end + length], cache)
            end += length
            assert torch.allclose(logits, full[:, end - 1], atol=1e-5)


def test_attention_does_not_reach_beyond_a_documents_end():
    config = dataclasses.replace(SMALL, document_end=7, rope_theta=100.0)  # learned positions would tell the two apart
    model = randomized(GPT(config))
    one, other = torch.randint(8, 128, (2, 11)), torch.randint(8, 128, (2, 12))
    end = torch.full((2, 1), 7)
    joined = model(torch.cat([one, end, other], 1))
    assert torch.allclose(joined[:, :11], model(one), atol=1e-5)
    assert torch.allclose(joined[:, 11:], model(torch.cat([end, other], 1)), atol=1e-5), "it begins what follows"
    plain = randomized(GPT(dataclasses.replace(config, document_end=None)))
    assert not torch.allclose(plain(torch.cat([one, end, other], 1))[:, 11:], joined[:, 11:], atol=1e-4)


def test_zero_init_makes_blocks_that_change_nothing_at_first():
    model = GPT(dataclasses.replace(SMALL, zero_init=True, **MODERN)).eval()
    x = torch.randn(1, 5, 32)
    assert torch.equal(model.h[0](x, Context(None, None, model._rotation(None, x), None)), x)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_the_chunked_loss_equal_the_plain_ones(tied):
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SMALL, tied=tied, **MODERN))
    tokens, gradients = torch.randint(0, 128, (2, 24)), []
    for chunked in (True, False):
        model.chunked_loss = chunked
        model.zero_grad()
        model(tokens, tokens.roll(-1, 1)).backward()
        gradients.append([p.grad.to_dense() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_ignored_targets_do_not_count(model):
    tokens, targets = torch.randint(0, 128, (2, 24)), torch.randint(0, 128, (2, 24))
    ignored = targets.clone()
    ignored[1:] = IGNORE
    assert torch.allclose(model(tokens, ignored), model(tokens[:1], targets[:1]))
    assert not torch.allclose(model(tokens, targets), model(tokens[:1], targets[:1]), atol=1e-3)


def test_residual_projections_start_smaller_with_depth():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=2, n_embd=128, block_size=8, vocab_size=64))
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[3].attn.c_q.bias.abs().max() == 0


@pytest.mark.parametrize(
    "sizes",
    [{"n_embd": 450}, {"n_layer": 0}, {"dropout": 1.0}, {"n_kv_head": 3}, {"rope_theta": 10.0, "n_embd": 8 * 7}],
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UserError, match=next(iter(sizes))):
        GPTConfig(**sizes)


def test_losses_of_single_targets_hold_few_logits_and_equal_those_of_all():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SMALL, vocab_size=100_352, n_layer=1, n_embd=8, n_head=1, block_size=512)).eval()
    tokens, targets = torch.randint(0, 100_352, (2, 2, 512))
    targets[0, ::3] = IGNORE
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (100_352,):
                largest = max(largest, out.numel() * out.element_size())
            return out

    with torch.no_grad(), Watch():
        losses = model.losses(tokens, targets)
    assert 0 < largest <= 2**27
    with torch.no_grad():
        whole = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    assert torch.allclose(losses, whole[targets.flatten() != IGNORE], atol=1e-5)
