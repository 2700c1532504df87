import pytest
import torch

from model import GPT, IGNORE, GPTConfig, KVCache

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


def test_logits_equal_hugging_face_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    reference = GPT2LMHeadModel(GPT2Config()).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257)).eval()
    weights = {name.removeprefix("transformer."): value for name, value in reference.state_dict().items()}
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # theirs are stored transposed
    model.load_state_dict({k: weights[k].T if k.endswith(linear) else weights[k] for k in model.state_dict()})
    tokens = torch.randint(0, 50257, (2, 100))
    with torch.no_grad():
        assert (model(tokens) - reference(tokens).logits).abs().max() < 1e-4


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
    assert model.h[3].attn.c_attn.bias.abs().max() == 0


@pytest.mark.parametrize("sizes", [{"n_embd": 450}, {"n_layer": 0}, {"dropout": 1.0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        GPTConfig(**sizes)
