"""A decoder-only GPT in plain PyTorch: GPT-2's architecture, every size a field of GPTConfig.

Dimensions: B batch, T time (tokens), C channels (n_embd), H heads (n_head), D head width (C / H), V vocabulary.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019. Given GPT-2's weights it
computes GPT-2's logits. The defaults are CodeGPT-70M's sizes: 69,560,064 parameters.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -1  # a target that does not count in the loss


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int = 10  # transformer blocks
    n_head: int = 8  # attention heads a block; each is n_embd / n_head wide
    n_embd: int = 448  # width of the residual stream
    block_size: int = 1024  # context length, tokens
    vocab_size: int = 100_352  # rows of the embedding: the tokenizer's ids, padded up to a multiple of 128
    dropout: float = 0.0  # probability of zeroing an activation while training
    bias: bool = True  # biases in the linear layers and layer norms

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, not a multiple of n_head, {self.n_head}; change either")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")


class KVCache:
    """Keys and values of the tokens seen so far, for up to `block_size` tokens of `batch_size` sequences."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        head_width = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_width)  # (L, B, H, T, D)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, (B, H, T, D) each; return all held, (B, H, length + T, D)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def repeated(self, batch_size: int) -> "KVCache":
        """A cache of `batch_size` sequences that begin with the tokens of this one, which has a single sequence."""
        cache = KVCache.__new__(KVCache)
        cache.keys, cache.values, cache.length = (
            *(held.repeat_interleave(batch_size, dim=1) for held in (self.keys, self.values)),
            self.length,
        )
        return cache


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D), S = cached + T
        S = k.size(2)
        # A query sees the keys up to its own place. With a cache, one query sees them all and needs no mask.
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=T == S and T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2's own form
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resid_dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head: tied weights
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2 scales what adds to the residual stream by its depth
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """tokens (B, T) ids, T <= block_size. Returns logits (B, T, V), or with targets (B, T), where IGNORE does not
        count, the mean cross-entropy in nats, an fp32 scalar."""
        logits = self._head(self._hidden(tokens, None))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.view(-1), ignore_index=IGNORE)

    def decode(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Append tokens (B, T) to the cache; returns the logits (B, V) that follow the last of them.

        The cached length plus T must not exceed block_size. Prefill is a call with the prompt, a step one with T = 1.
        """
        x = self._hidden(tokens, cache)
        cache.length += tokens.size(1)
        return self._head(x[:, -1])

    def _hidden(self, tokens: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        past = cache.length if cache is not None else 0
        end = past + tokens.size(1)
        assert end <= self.config.block_size, f"{end} tokens exceed block_size {self.config.block_size}"
        x = self.drop(self.wte(tokens) + self.wpe.weight[past:end])  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
        return self.ln_f(x)  # (B, T, C)

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.wte.weight)  # (..., V)

    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token at full context: 6 a weight in a matrix product, 12 L C T
        for attention (Chowdhery et al., PaLM, 2022, appendix B)."""
        config = self.config
        matmul_weights = config.n_layer * 12 * config.n_embd**2 + config.vocab_size * config.n_embd
        return 6 * matmul_weights + 12 * config.n_layer * config.n_embd * config.block_size
