import dataclasses
import itertools

import pytest
import torch

from model import GPT
from runtime.errors import UserError
from training.recipe import Recipe, learning_rate, make_optimizers

SMALL = Recipe(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=16, vocab_size=128, tokens_per_step=128)


def test_stable_then_linear_to_zero():
    recipe = dataclasses.replace(
        SMALL, max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.0, decay="linear", decay_share=0.5
    )
    rates = [learning_rate(step, recipe) for step in range(101)]
    assert rates[9:56] == [1.0] * 47 and rates[55] == 1.0
    assert rates[56] == pytest.approx(1 - 1 / 45) and rates[100] == 0
    assert all(a - b == pytest.approx(1 / 45) for a, b in itertools.pairwise(rates[55:]))


def test_a_batch_ramp_doubles_at_even_distances_and_counts_its_tokens():
    recipe = dataclasses.replace(SMALL, ramp_doublings=3, ramp_steps=6)
    sizes = [recipe.tokens_at(step) for step in range(8)]
    assert sizes == [16, 16, 32, 32, 64, 64, 128, 128]
    assert [recipe.tokens_before(step) for step in range(9)] == [sum(sizes[:step]) for step in range(9)]
    assert recipe.step_sizes() == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ramp_doublings": 4}, "tokens_per_step is 128, not a multiple of 256"),
        ({"ramp_doublings": 20_000}, "tokens_per_step is 128, not a multiple of"),
        ({"ramp_doublings": 2}, "ramp_steps is 0, ramp_doublings 2; give both"),
        ({"embedding_rate": -1.0}, "embedding_rate is -1.0"),
        ({"min_lr": 1.0}, "min_lr is 1.0, above learning_rate"),
        ({"ramp_doublings": 2, "ramp_steps": 5}, "ramp_steps is 5, ramp_doublings 2; give both"),
        ({"optimizer": "sgd"}, "--optimizer=sgd: not one of adamw, muon"),
        ({"decay": "sqrt"}, "--decay=sqrt: not one of cosine, linear"),
        ({"decay_share": 0.0}, "decay_share is 0.0"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


def test_muon_turns_each_of_q_k_and_v_by_an_orthogonal_matrix_and_leaves_the_rest_to_adamw():
    torch.manual_seed(0)
    recipe = dataclasses.replace(SMALL, optimizer="muon", weight_decay=0.0, swiglu=True, learning_rate=1e-2)
    model = GPT(recipe)
    adamw, muon = make_optimizers(model, recipe, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = [names[id(p)].split(".", 2)[2] for p in muon.param_groups[0]["params"]]
    parts = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_gate", "mlp.c_fc", "mlp.c_proj"]
    assert taken == [f"{part}.weight" for part in parts] * 2
    assert {"wte.weight", "wpe.weight", "ln_f.weight"} <= {
        names[id(p)] for g in adamw.param_groups for p in g["params"]
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 128, (4, 16))
    model(tokens, tokens.roll(1)).backward()
    muon.step()
    for name in ("h.0.attn.c_q.weight", "h.0.attn.c_k.weight", "h.1.mlp.c_gate.weight"):
        change = (model.get_parameter(name) - before[name]).detach()
        scale = recipe.learning_rate * 0.2 * max(change.shape) ** 0.5  # the root mean square of AdamW's steps
        values = torch.linalg.svdvals(change) / scale
        middle = values.sort().values[len(values) // 4 :]  # of near zero ones five iterations make too little
        assert middle.min() > 0.5 and middle.max() < 1.4, "Newton and Schulz bring them near 1"
