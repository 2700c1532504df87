"""The recipe of a training run: how many tokens a step, at which learning rate, by which optimizer.

Everything here is a function of the step and the settings, so a run that goes on needs nothing but its step.
"""

import math
from dataclasses import dataclass

import torch

from model import GPT, GPTConfig
from runtime.errors import UserError
from training.muon import Muon

OPTIMIZERS = ("adamw", "muon")
DECAYS = ("cosine", "linear")


@dataclass(frozen=True)
class Recipe(GPTConfig):
    tokens_per_step: int = 2**19  # tokens an optimizer step, a multiple of batch_size x block_size
    ramp_doublings: int = 0  # the batch begins at tokens_per_step / 2^this, and doubles as often,
    ramp_steps: int = 0  # at even distances, until it is whole at this step
    max_steps: int = 5912  # optimizer steps in all
    learning_rate: float = 6e-4  # the highest, at the end of the warmup
    min_lr: float = 6e-5  # the lowest, at max_steps
    warmup_steps: int = 222  # steps of linear rise
    decay: str = "cosine"  # how the rate falls: cosine, or linear
    decay_share: float = 1.0  # in this share of the steps after the warmup, the last; before that it is stable
    optimizer: str = "adamw"  # of the blocks' matrices: adamw, or muon; AdamW has the rest
    momentum: float = 0.95  # Muon's
    embedding_rate: float = 1.0  # learning rate of the embeddings and the head, in units of learning_rate
    weight_decay: float = 0.01  # of the 2-D weights
    beta1: float = 0.9  # AdamW: decay of the mean of gradients
    beta2: float = 0.999  # AdamW: decay of the mean of their squares
    grad_clip: float | None = 1.0  # highest norm of the gradient; None does not clip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens_per_step", "max_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "weight_decay", "min_lr", "embedding_rate", "ramp_doublings", "ramp_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr is {self.min_lr}, above learning_rate, {self.learning_rate}; lower it")
        if self.learning_rate <= 0 or (self.grad_clip is not None and self.grad_clip <= 0):
            raise UserError("learning_rate and grad_clip must be above 0, or grad_clip None")
        if not all(0 <= getattr(self, name) < 1 for name in ("beta1", "beta2", "momentum")):
            raise UserError(
                f"beta1 is {self.beta1}, beta2 {self.beta2}, momentum {self.momentum}; each must be at least 0 and "
                "below 1"
            )
        for name, known in (("optimizer", OPTIMIZERS), ("decay", DECAYS)):
            if getattr(self, name) not in known:
                raise UserError(f"--{name}={getattr(self, name)}: not one of {', '.join(known)}")
        if not 0 < self.decay_share <= 1:
            raise UserError(f"decay_share is {self.decay_share}; it must be above 0, and 1 at most")
        smallest = self.block_size << min(self.ramp_doublings, 64)
        if self.tokens_per_step % smallest:
            raise UserError(
                f"tokens_per_step is {self.tokens_per_step}, not a multiple of {smallest}, block_size doubled "
                f"ramp_doublings times; set --tokens_per_step={-(-self.tokens_per_step // smallest) * smallest}"
            )
        if bool(self.ramp_doublings) != bool(self.ramp_steps) or self.ramp_steps % max(1, self.ramp_doublings):
            raise UserError(
                f"ramp_steps is {self.ramp_steps}, ramp_doublings {self.ramp_doublings}; give both or neither, and "
                "ramp_steps as a multiple of the other"
            )

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before `step`."""
        tokens, at = 0, 0
        for doubling in range(self.ramp_doublings):  # what is left of each stage of the ramp
            stage = min(self.ramp_steps // self.ramp_doublings, step - at)
            tokens += stage * (self.tokens_per_step >> (self.ramp_doublings - doubling))
            at += stage
        return tokens + (step - at) * self.tokens_per_step

    def tokens_at(self, step: int) -> int:
        """Tokens of the step that is `step`, counted from 0."""
        return self.tokens_before(step + 1) - self.tokens_before(step)

    def step_sizes(self) -> list[int]:
        """Sequences of a step: of the first, and of those after each doubling."""
        return [(self.tokens_per_step >> left) // self.block_size for left in range(self.ramp_doublings, -1, -1)]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear rise to `learning_rate` over `warmup_steps`, then stable, then down to `min_lr` at `max_steps`, by half a
    cosine or in a line."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    n_decay = recipe.decay_share * max(1, recipe.max_steps - recipe.warmup_steps)
    progress = min(1.0, max(0.0, 1 - (recipe.max_steps - step) / n_decay))
    left = 1 - progress if recipe.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.min_lr + left * (recipe.learning_rate - recipe.min_lr)


def make_optimizers(model: GPT, recipe: Recipe, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW with decay on the 2-D weights only (Loshchilov and Hutter, 2019), and if it is asked for, Muon for the
    blocks' matrices.

    Muon sees q, k and v apart, because they are parameters of their own.
    """
    parameters = list(model.parameters())
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    in_blocks = set(map(id, matrices))
    embeddings = [p for p in parameters if p.dim() >= 2 and id(p) not in in_blocks]
    decayed = {"weight_decay": recipe.weight_decay}
    groups = [
        {"params": embeddings, "rate": recipe.embedding_rate, **decayed},
        {"params": [p for p in parameters if p.dim() < 2], "rate": 1.0, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        groups.append({"params": matrices, "rate": 1.0, **decayed})
    betas, fused = (recipe.beta1, recipe.beta2), device.type in ("cuda", "cpu")
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, fused=fused)
    ]
    if recipe.optimizer == "muon":
        settings = {"momentum": recipe.momentum, **decayed}
        optimizers.append(Muon([{"params": matrices, "rate": 1.0}], recipe.learning_rate, **settings))
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, parameters)), "the optimizers must hold each parameter once"
    return optimizers
