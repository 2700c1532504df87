"""A decoder-only GPT in plain PyTorch: every size and every part a field of GPTConfig.

Dimensions: B batch, T time (tokens), C channels (n_embd), H heads (n_head), K heads of keys and values (n_kv_head),
D head width (C / H), V vocabulary.
Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019, whose architecture the
defaults are, at CodeGPT-70M's sizes: 69,560,064 parameters. Given their weights it computes the logits of GPT-2, of
StarCoder's GPTBigCode (n_kv_head=1) and of Qwen3 (rope, rms_norm, swiglu, qk_norm, bias=False); tests compare them.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ops.attention import causal_attention
from ops.cross_entropy import IGNORE, PLAIN, linear_cross_entropy
from runtime.device import bf16_is_native
from runtime.errors import UserError


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int = 10  # transformer blocks
    n_head: int = 8  # attention heads a block; each is n_embd / n_head wide
    n_embd: int = 448  # width of the residual stream
    block_size: int = 1024  # context length, tokens
    vocab_size: int = 100_352  # rows of the embedding: the tokenizer's ids, padded up to a multiple of 128
    dropout: float = 0.0  # probability of zeroing an activation while training
    bias: bool = True  # biases in the linear layers and layer norms
    n_kv_head: int | None = None  # heads of keys and values, shared among n_head; 1 is multi-query, None is n_head
    mlp_width: int | None = None  # hidden width of the MLP; None is 4 n_embd, with swiglu 8/3 of it: as many weights
    swiglu: bool = False  # a gated MLP, silu(gate) x up, in the place of GELU (Shazeer, 2020)
    rms_norm: bool = False  # RMSNorm in the place of LayerNorm (Zhang and Sennrich, 2019)
    rope_theta: float | None = None  # base of rotary positions (Su et al., 2021), such as 10000; None learns positions
    qk_norm: bool = False  # RMSNorm of each query and key (Henry et al., 2020)
    tied: bool = True  # the output head is the embedding
    zero_init: bool = False  # what adds to the residual stream starts at zero
    document_end: int | None = None  # id that ends documents, beyond which attention does not reach; None: it does

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "n_kv_head", "mlp_width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd is {self.n_embd}, not a multiple of n_head, {self.n_head}; change either")
        if self.n_head % self.kv_heads:
            raise UserError(
                f"n_kv_head is {self.n_kv_head}, which does not divide n_head, {self.n_head}; change either"
            )
        if self.rope_theta is not None and (not 1 < self.rope_theta < math.inf or self.head_width % 2):
            raise UserError(
                f"rope_theta is {self.rope_theta}, n_embd / n_head {self.head_width}; rotary positions want a base "
                "above 1 and heads of an even width"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head


class KVCache:
    """Keys and values of the tokens seen so far, for up to `block_size` tokens of `batch_size` sequences.

    A `static` one takes single tokens at a place held on the device and attends over all its length behind a mask, so
    that each step runs the same kernels on the same memory, as CUDA graphs want; the other attends over what it holds.
    `dtype` may be another than the model's: attention of single tokens on a CPU is the faster in fp32.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype, static: bool = False
    ):
        shape = (config.n_layer, batch_size, config.kv_heads, config.block_size, config.head_width)  # (L, B, K, T, D)
        fresh = torch.zeros if static else torch.empty  # what is masked must not be NaN; what is not touched is free
        self.keys, self.values = (fresh(shape, device=device, dtype=dtype) for _ in range(2))
        self.static, self.length = static, 0  # tokens held
        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # the same, on the device
        self._mark()

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, (B, K, T, D) each; return all held, (B, K, length + T, D), or if static
        the whole of the cache."""
        if self.static and k.size(2) == 1:
            self.keys[layer].index_copy_(2, self.place, k)
            self.values[layer].index_copy_(2, self.place, v)
            return self.keys[layer], self.values[layer]
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def mask(self, T: int, S: int) -> torch.Tensor | None:
        """Which of `S` keys each of the newest `T` tokens sees, those up to its own place: bool, or None for all."""
        if self.static and T == 1:
            return (torch.arange(S, device=self.place.device) <= self.place)[None]  # (1, S)
        return None if T == 1 else torch.ones(T, S, dtype=torch.bool, device=self.place.device).tril(S - T)

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens
        self.place.fill_(self.length)

    def take(self, rows: torch.Tensor) -> "KVCache":
        """A cache of these rows of this one, which may repeat: many samples of one prompt, or those not finished."""
        cache = copy.copy(self)
        shape = (*self.keys.shape[:1], len(rows), *self.keys.shape[2:])
        fresh = self.keys.new_zeros if self.static else self.keys.new_empty
        cache.keys, cache.values, cache.place = fresh(shape), fresh(shape), self.place + 0
        for new, held in ((cache.keys, self.keys), (cache.values, self.values)):
            new[:, :, :, : self.length] = held[:, rows, :, : self.length]
        cache._mark()
        return cache

    def _mark(self) -> None:
        """Tell the compiler that a static cache stays where it is, or it makes no CUDA graph of what writes to it."""
        for tensor in (self.keys, self.values, self.place) if self.static else ():
            torch._dynamo.mark_static_address(tensor, guard=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2), times a weight; computed in fp32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).to(x.dtype)


def layer_norm(config: GPTConfig) -> nn.Module:
    return RMSNorm(config.n_embd) if config.rms_norm else nn.LayerNorm(config.n_embd, bias=config.bias)


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn each pair (i, i + D/2) of x (B, H, T, D) by its angle; `rotation` holds cosines and sines, (T, D/2) each."""
    cos, sin = rotation
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Context(NamedTuple):
    """What attention in all layers has in common: None where the model has no such thing."""

    cache: KVCache | None
    rotation: tuple[torch.Tensor, torch.Tensor] | None  # of the tokens' places
    documents: torch.Tensor | None  # (B, T), which document of its row each token is in


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        kv_width = config.kv_heads * config.head_width
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_k = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.c_v = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.q_norm, self.k_norm = (RMSNorm(config.head_width) if config.qk_norm else nn.Identity() for _ in range(2))
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (c(x).view(B, T, -1, C // self.n_head).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        q, k = self.q_norm(q), self.k_norm(k)  # (B, H, T, D), (B, K, T, D)
        if context.rotation is not None:
            q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        cache = context.cache
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D), S = cached + T
        S = k.size(2)
        if cache is None or T == S > 1:
            dropout = self.dropout if self.training else 0.0
            y = causal_attention(q.to(k.dtype), k, v, dropout, context.documents)
        else:
            gqa = k.size(1) < self.n_head
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=cache.mask(T, S), enable_gqa=gqa)
        y = y.to(x.dtype).transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's form of GELU, x (1 + tanh u) / 2; compiled as x sigmoid(2 u), the same at half the cost on a CPU."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    y = x.float()
    return (y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        gated = -(-config.n_embd * 8 // 3 // 32) * 32  # a multiple of 32, for the matrix products
        width = config.mlp_width or (gated if config.swiglu else 4 * config.n_embd)
        self.c_gate = nn.Linear(config.n_embd, width, bias=config.bias) if config.swiglu else None
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = gelu(self.c_fc(x)) if self.c_gate is None else F.silu(self.c_gate(x)) * self.c_fc(x)
        return self.resid_dropout(self.c_proj(hidden))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.rope_theta is None else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = layer_norm(config)
        # None is wte's weights; decoding.py puts another one in its place
        self.head: nn.Module | None = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.chunked_loss = True  # never hold all logits (loss.py), or have torch make them all
        self.kernels = PLAIN  # and these are what compile_training and compile_decoding put in place
        self.compiled_trunk: Callable[..., torch.Tensor] | None = None
        self.compiled_decode: Callable[..., torch.Tensor] | None = None
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2 scales what adds to the residual stream by its depth
                nn.init.normal_(parameter, std=0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.wte.weight if self.head is None else self.head.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """tokens (B, T) ids, T <= block_size. Returns logits (B, T, V), or with targets (B, T), where IGNORE does not
        count, the mean cross-entropy in nats, an fp32 scalar: 0 if no target counts."""
        n_most = self.config.block_size
        assert tokens.size(1) <= n_most, f"{tokens.size(1)} tokens exceed block_size {n_most}"
        if targets is None:
            return self._head(self._trunk(self._embed(tokens, None), None, self._documents(tokens)))
        x = (self.compiled_trunk or self._trunk)(self._embed(tokens, None), None, self._documents(tokens))
        if self.chunked_loss:
            return linear_cross_entropy(x.flatten(0, 1), self.head_weight, targets.flatten(), self.kernels)
        logits = self._head(x).float().flatten(0, 1)  # (B T, V)
        loss = F.cross_entropy(logits, targets.flatten().long(), ignore_index=IGNORE)
        return torch.where((targets != IGNORE).any(), loss, 0.0)  # torch's mean of no target is NaN

    def decode(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Append tokens (B, T) to the cache; returns the logits (B, V) that follow the last of them.

        The cached length plus T must not exceed block_size. Prefill is a call with the prompt, a step one with T = 1.
        All tokens count as one document.
        """
        assert cache.length + tokens.size(1) <= self.config.block_size, "beyond block_size"
        compiled = self.compiled_decode if cache.static and tokens.size(1) == 1 else None
        if compiled is not None:
            tokens = tokens.flatten().view(-1, 1)  # of one stride whatever it is a column of: no new compilation
        logits = (compiled or self._decode)(tokens, cache)
        cache.advance(tokens.size(1))
        return logits

    def _decode(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self._head(self._trunk(self._embed(tokens, cache), cache, None)[:, -1])

    def compile_training(self, compiled: bool = True) -> None:
        """Compile, in place, what a training step runs; or undo that."""
        self.compiled_trunk, self.kernels = None, PLAIN
        self.__dict__.pop("forward", None)
        torch.compiler.assume_constant_result(bf16_is_native)  # measured as it is traced, which attention asks for
        if compiled and self.chunked_loss:
            self.compiled_trunk, self.kernels = torch.compile(self._trunk, dynamic=False), PLAIN.compiled()
        elif compiled:
            self.forward = torch.compile(self.forward, dynamic=False)

    def compile_decoding(self) -> None:
        """Compile, in place, the step of one token on a static cache: on a GPU as one CUDA graph."""
        self.compiled_decode = torch.compile(self._decode, dynamic=False, mode="reduce-overhead")

    def _embed(self, tokens: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        # A sparse gradient adds itself to the head's, where a dense one would be as large as the embedding. Not on a
        # GPU, where that has never run.
        sparse = self.chunked_loss and self.config.tied and tokens.device.type == "cpu"
        x = F.embedding(tokens, self.wte.weight, sparse=sparse)  # (B, T, C)
        return x if self.wpe is None else x + self._at_places(self.wpe.weight, cache, tokens.size(1))

    def _at_places(self, table: torch.Tensor, cache: KVCache | None, T: int) -> torch.Tensor:
        """The rows of `table` (block_size, ...) that belong to the places of T new tokens."""
        if cache is not None and cache.static and T == 1:
            return table[cache.place]
        past = cache.length if cache is not None else 0
        return table[past : past + T]

    def _documents(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Which document of its row each token is in, (B, T) int32, if attention minds: the id that ends one begins the
        next, which therefore sees it."""
        end = self.config.document_end
        return None if end is None else (tokens == end).cumsum(1, dtype=torch.int32)

    def _rotation(self, cache: KVCache | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines of rotary positions for the new tokens x (B, T, C), (T, D/2) each."""
        if self.config.rope_theta is None:
            return None
        steps = torch.arange(0, self.config.head_width, 2, device=x.device) / self.config.head_width  # (D/2)
        places = torch.arange(self.config.block_size, device=x.device)
        angles = self._at_places(places, cache, x.size(1))[:, None] * self.config.rope_theta**-steps
        return angles.cos(), angles.sin()

    def _trunk(self, x: torch.Tensor, cache: KVCache | None, documents: torch.Tensor | None) -> torch.Tensor:
        context = Context(cache, self._rotation(cache, x), documents)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # half the bytes of the residual stream
        x = self.drop(x)
        for block in self.h:
            x = block(x, context)
        x = self.ln_f(x)  # (B, T, C), which autocast on a GPU makes fp32
        return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.wte.weight) if self.head is None else self.head(x)  # (..., V)

    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token at full context: 6 a weight in a matrix product, 12 L C T
        for attention (Chowdhery et al., PaLM, 2022, appendix B)."""
        config = self.config
        matmul_weights = sum(p.numel() for p in self.h.parameters() if p.dim() == 2) + self.head_weight.numel()
        return 6 * matmul_weights + 12 * config.n_layer * config.n_embd * config.block_size
