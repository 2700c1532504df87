"""The recipe of a training run: the tokens per step, the learning rate and the optimizer.

Tokens and rate are functions of the step and the settings, so a run needs nothing but its step to continue.
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
    tokens_per_step: int = 2**19  # tokens per optimizer step, a multiple of batch_size x block_size
    ramp_doublings: int = 0  # batch ramp: begin with tokens_per_step / 2^ramp_doublings tokens; 0 is no ramp
    ramp_steps: int = 0  # batch ramp: steps until tokens_per_step is reached, by doublings at equal intervals
    max_steps: int = 5912  # optimizer steps in all
    learning_rate: float = 6e-4  # highest learning rate, reached at the end of the warmup
    min_lr: float = 6e-5  # lowest learning rate, reached at max_steps
    warmup_steps: int = 222  # steps in which the learning rate rises linearly, at the beginning
    decay: str = "cosine"  # how the learning rate falls: cosine or linear
    decay_share: float = 1.0  # last share of the steps after the warmup, in which the rate falls; constant before
    optimizer: str = "adamw"  # optimizer of the blocks' matrices, adamw or muon; AdamW trains all other weights
    momentum: float = 0.95  # Muon's momentum
    embedding_rate: float = 1.0  # learning rate of the embeddings and the head, in units of learning_rate
    weight_decay: float = 0.01  # weight decay of the 2-D weights
    beta1: float = 0.9  # AdamW's decay of the mean of the gradients
    beta2: float = 0.999  # AdamW's decay of the mean of the squared gradients
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
        tokens, steps_left = 0, step
        for doublings_left in range(self.ramp_doublings, 0, -1):  # one stage of the ramp each
            stage_steps = min(self.ramp_steps // self.ramp_doublings, steps_left)
            tokens += stage_steps * (self.tokens_per_step >> doublings_left)
            steps_left -= stage_steps
        return tokens + steps_left * self.tokens_per_step

    def tokens_at(self, step: int) -> int:
        """Tokens of step `step`, counted from 0."""
        return self.tokens_before(step + 1) - self.tokens_before(step)

    def step_sizes(self) -> list[int]:
        """Sequences per step: at first, then after each doubling."""
        return [(self.tokens_per_step >> left) // self.block_size for left in range(self.ramp_doublings, -1, -1)]


def learning_rate(step: int, recipe: Recipe) -> float:
    """The learning rate of `step`: rises linearly to `learning_rate` over `warmup_steps`, stays there, and falls to
    `min_lr` at `max_steps`, along half a cosine or a line."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    n_decay = recipe.decay_share * max(1, recipe.max_steps - recipe.warmup_steps)
    progress = min(1.0, max(0.0, 1 - (recipe.max_steps - step) / n_decay))
    remaining = 1 - progress if recipe.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.min_lr + remaining * (recipe.learning_rate - recipe.min_lr)


def make_optimizers(model: GPT, recipe: Recipe, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW, with weight decay on the 2-D weights only (Loshchilov and Hutter, 2019), and for recipe.optimizer "muon"
    also Muon, which then trains the blocks' matrices. It orthogonalizes q, k and v separately: they are parameters of
    their own."""
    parameters = list(model.parameters())
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    in_blocks = set(map(id, matrices))
    embeddings = [p for p in parameters if p.dim() >= 2 and id(p) not in in_blocks]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": embeddings, "rate": recipe.embedding_rate, "weight_decay": recipe.weight_decay},
        {"params": vectors, "rate": 1.0, "weight_decay": 0.0},
    ]
    block_group = {"params": matrices, "rate": 1.0, "weight_decay": recipe.weight_decay}
    lr, betas, fused = recipe.learning_rate, (recipe.beta1, recipe.beta2), device.type in ("cuda", "cpu")
    if recipe.optimizer == "adamw":
        optimizers = [torch.optim.AdamW([*groups, block_group], lr=lr, betas=betas, fused=fused)]
    else:
        adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
        optimizers = [adamw, Muon([block_group], lr, momentum=recipe.momentum)]
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, parameters)), "the optimizers must hold each parameter once"
    return optimizers
