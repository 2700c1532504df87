"""How the next token is drawn: the settings, top-k, top-p, and the draw itself.

torch is imported only where a token is drawn: programs that just read settings start in a tenth of the time without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import UserError

if TYPE_CHECKING:
    import torch

NUCLEUS = 1024  # likeliest tokens sorted for top-p; all are only if these do not suffice


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int = 256  # most tokens per completion; end-of-text ends it sooner
    temperature: float = 0.8  # below 1: likelier text; above 1: more varied; 0 takes the likeliest token each time
    top_k: int | None = None  # sample among the k likeliest tokens only
    top_p: float | None = 0.95  # sample among the likeliest tokens that make up this probability
    seed: int = 0  # seed of the random draws

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.temperature < 0:
            raise UserError(f"--temperature={self.temperature}: must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k={self.top_k}: must be at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p}: must be above 0 and at most 1, or None")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed={self.seed}: must be 0 or more, and below 2**63")


def choose_token(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | Sequence[torch.Generator]
) -> torch.Tensor:
    """Returns a token id for each row of logits (B, V), (B,): the likeliest at temperature 0, else drawn after top-k
    and then top-p, with one generator for all rows or one for each."""
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
    if temperature < 1e-6:  # dividing by smaller ones overflows
        return logits.argmax(-1)
    ids = None  # of the columns, once they are not all V
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # (B, K) each, the likeliest first
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p is not None:
        if ids is None:
            probabilities, ids = _likeliest(probabilities, top_p)
        likelier = probabilities.cumsum(-1) - probabilities  # the sum of all before it: 0 for the first, which stays
        probabilities = probabilities.masked_fill(likelier > top_p, 0.0)
    chosen = draw(probabilities, generator)
    return chosen if ids is None else ids.gather(-1, chosen[:, None])[:, 0]


def draw(probabilities: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> torch.Tensor:
    """Returns a column index for each row of probabilities (B, K), which need not sum to one: where one uniform number
    falls in their running sum. (torch.multinomial draws K numbers per row.)"""
    import torch

    dtype = torch.float32 if probabilities.device.type == "mps" else torch.float64  # MPS has no float64
    sums = probabilities.to(dtype).cumsum(-1)
    where = {"dtype": dtype, "device": sums.device}
    if isinstance(generator, torch.Generator):
        uniform = torch.rand(len(sums), 1, **where, generator=generator)
    else:
        uniform = torch.cat([torch.rand(1, 1, **where, generator=one) for one in generator])  # (B, 1)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp_(max=sums.size(-1) - 1)[:, 0]


def _likeliest(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest of probabilities (B, V), in order, and their ids: at least as many as make up `top_p`. NUCLEUS
    usually do; if any row needs more, all rows are fully sorted."""
    likeliest, ids = probabilities.topk(min(NUCLEUS, probabilities.size(-1)))
    if bool((likeliest.sum(-1) < top_p).any()):
        likeliest, ids = probabilities.sort(descending=True)
    return likeliest, ids
