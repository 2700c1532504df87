"""Our Muon beside torch.optim.Muon, whose orthogonalization is in bf16 unless a test makes it another."""

import functools

import pytest
import torch

from training.muon import Muon, orthogonalize, symmetric_product

SHAPES = [(48, 48), (48, 48), (33, 48), (32, 96), (96, 32), (7, 64), (64, 1)]
SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
MOVED = 4 * SETTINGS["lr"] * 0.2  # the root mean square by which four steps may move a weight


def after_steps(make, dtype: torch.dtype, products: torch.dtype, n_steps: int = 4) -> list[torch.Tensor]:
    """The matrices, of `dtype`, after some steps on the same gradients, under autocast to `products`."""
    generator = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    parameters = [torch.nn.Parameter(randn(shape).to(dtype)) for shape in SHAPES]
    optimizer = make(parameters)
    for _ in range(n_steps):
        for parameter in parameters:
            parameter.grad = randn(parameter.shape).to(dtype)
        with torch.autocast("cpu", products, enabled=products == torch.bfloat16):
            optimizer.step()
    return [parameter.detach() for parameter in parameters]


def torchs(parameters) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **SETTINGS)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Units of rounding times 3.4445^5, the slope of five polynomials at zero: what raises a small singular value.
    [(torch.float64, 485 * 2**-53), (torch.float32, 485 * 2**-24), (torch.bfloat16, 8 * 2**-8)],
)
def test_steps_are_torchs_in_equal_arithmetic(dtype, tolerance, monkeypatch):
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    ours = after_steps(lambda parameters: Muon(parameters, **SETTINGS), weights, dtype)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.to(dtype, copy=True))
    theirs = after_steps(torchs, weights, torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).square().mean().sqrt() < tolerance * MOVED


def test_a_checkpoint_of_torchs_muon_goes_on():
    def changed_over(parameters):
        """torch's optimizer for a step on other gradients, then ours with its state."""
        first = torchs(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        first.step()
        optimizer = Muon(parameters, **SETTINGS)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": first.state_dict()["state"], "param_groups": groups})
        return optimizer

    def unchanged(parameters):
        optimizer = torchs(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer

    ours, theirs = (after_steps(make, torch.float32, torch.bfloat16) for make in (changed_over, unchanged))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).square().mean().sqrt() < 0.1 * MOVED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (5, 40)])
def test_singular_values_become_about_one(shape, dtype):
    """Also in fp16, T4's arithmetic, and of gradients small and large."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    x = (u * torch.linspace(1.0, 0.1, u.size(-1))) @ vh
    for scale in (1.0, 1e-5, 1e15):
        values = torch.linalg.svdvals(orthogonalize(x * scale, dtype).float())
        assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("shape", [(48, 48), (32, 96)])
def test_degenerate_gradients_stay_finite(shape):
    """Zero, of rank one, and with values from 1 to 1e-8: what the Gram matrix's rounding could blow up. In bf16 torch's
    iteration is off by 100% for rank one."""
    torch.manual_seed(0)
    rank_one = torch.randn(shape[0], 1) @ torch.randn(1, shape[1])
    steep = torch.randn(shape) * torch.logspace(0, -8, shape[1])
    exact = orthogonalize(torch.stack([torch.zeros(shape), rank_one, steep]).double(), torch.float64)
    got = orthogonalize(torch.stack([torch.zeros(shape), rank_one, steep]))
    assert got[0].abs().max() == 0
    for a, b in zip(got[1:], exact[1:], strict=True):
        assert (a - b).norm() < 0.1 * b.norm()


def test_a_symmetric_product_is_the_product():
    a = torch.randn(3, 9, 9, dtype=torch.float64)
    assert torch.allclose(symmetric_product(a, a.mT), a @ a.mT)
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1)
