"""Muon: an optimizer that replaces each momentum matrix by the nearest orthogonal one, for the blocks' 2-D weights.

The steps and the state are torch.optim.Muon's (match_rms_adamw): a run begun with one continues with the other. They
differ in how the orthogonal matrix is computed. torch iterates in bf16 on any hardware, one matrix at a time; on a CPU
without bf16 instructions that takes 94% of a step of the tiny model. This one iterates in autocast's dtype, as the rest
of a step does, on all matrices of one shape together.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the scale of a step from Liu
et al., "Muon is Scalable for LLM Training", 2025.
"""

import math
from collections.abc import Iterable

import torch

COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan's polynomial, five times
SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for matrices, with Nesterov momentum and decoupled weight decay; `lr` is on AdamW's scale.

    A step orthogonalizes in autocast's dtype, or without autocast in the parameters'. Momentum and weights keep theirs.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.dim() != 2:
                raise ValueError(f"Muon: a parameter of shape {tuple(parameter.shape)}; it takes matrices only")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step with all matrices that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _step_together(self, parameters: list[torch.Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        """Take a step with matrices of one shape."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        grads = [parameter.grad for parameter in parameters]
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        updates = torch.stack(torch._foreach_lerp(grads, means, momentum))  # (N, rows, columns)
        device = updates.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else updates.dtype
        updates = orthogonalize(updates, dtype).to(parameters[0].dtype)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        rms = 0.2 * math.sqrt(max(parameters[0].shape))  # gives a step the mean square that AdamW's usually have
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-lr * rms)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Replace the singular values s of each of `matrices` (N, rows, columns) by p(p(...p(s / norm))), with
    p(s) = a s + b s^3 + c s^5: within 0.3 of 1 unless s is tiny. Computed in `dtype`.

    This is the Newton-Schulz iteration. Each step multiplies X by a polynomial in the Gram matrix G = X X^T; all such
    polynomials are symmetric and commute. So for a wide X, in fp32, only their product Q and Q G Q are iterated, and X
    is multiplied by Q once, at the end. In bf16 the rounding errors of G would grow too large.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    x = x.to(dtype)  # (N, m, n), m <= n
    m, n = x.shape[1:]
    # With r = n / m, the Gram matrix takes 2 r + 17 products of m^3, X itself 5 (2 r + 1).
    x = _iterate_gram(x) if dtype == torch.float32 and n > 1.5 * m else _iterate(x)
    return x.mT if tall else x


def _iterate(x: torch.Tensor) -> torch.Tensor:
    """The iteration on X itself, for `x` of (N, m, n)."""
    for a, b, c in COEFFICIENTS:
        gram = symmetric_product(x, x.mT)
        x = torch.baddbmm(x, symmetric_product(gram, gram).mul_(c).add_(gram, alpha=b), x, beta=a)
    return x


def _iterate_gram(x: torch.Tensor) -> torch.Tensor:
    """The iteration on X's Gram matrix, for `x` of (N, m, n)."""
    gram, product = symmetric_product(x, x.mT), None
    for number, (a, b, c) in enumerate(COEFFICIENTS, start=1):
        factor = symmetric_product(gram, gram).mul_(c).add_(gram, alpha=b)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)  # a I + b G + c G^2
        product = factor if product is None else symmetric_product(product, factor)
        if number < len(COEFFICIENTS):
            gram = symmetric_product(symmetric_product(gram, factor), factor)
    return torch.bmm(product, x)


def symmetric_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of `a` (N, m, k) and `b` (N, k, m), which the caller knows to be symmetric: one of the two blocks off
    the diagonal is copied from the other, which saves a quarter of the work."""
    half = a.size(1) // 2
    out = a.new_empty(a.size(0), a.size(1), a.size(1))
    torch.bmm(a[:, :half], b[:, :, :half], out=out[:, :half, :half])
    torch.bmm(a[:, half:], b, out=out[:, half:])
    out[:, :half, half:] = out[:, half:, :half].mT
    return out
