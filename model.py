"""A decoder-only GPT in plain PyTorch. Each of its sizes and parts is a field of GPTConfig.

Dimensions: B batch, T time (new tokens), S all tokens that attention can see (cached and new), C channels (n_embd),
H heads of queries (n_head), K heads of keys and values (n_kv_head), D head width (C / H), V vocabulary, L layers.

The defaults are the architecture of GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners",
2019) at the size of CodeGPT-70M, 69,560,064 parameters. With their weights this file computes the logits of GPT-2, of
StarCoder's GPTBigCode (n_kv_head=1) and of Qwen3 (rope, rms_norm, swiglu, qk_norm, bias=False); tests compare them.
"""

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
    n_head: int = 8  # attention heads per block; each is n_embd / n_head wide
    n_embd: int = 448  # width of the residual stream
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 100_352  # rows of the embedding: the tokenizer's ids, padded to a multiple of 128
    dropout: float = 0.0  # probability of zeroing an activation during training
    bias: bool = True  # biases in linear layers and layer norms
    n_kv_head: int | None = None  # heads of keys and values, shared by the n_head queries; 1: multi-query; None: n_head
    mlp_width: int | None = None  # hidden width of the MLP; None: 4 n_embd, or with swiglu 8/3 n_embd, as many weights
    swiglu: bool = False  # gated MLP, silu(gate) x up, instead of GELU (Shazeer, 2020)
    rms_norm: bool = False  # RMSNorm instead of LayerNorm (Zhang and Sennrich, 2019)
    rope_theta: float | None = None  # base of rotary positions (Su et al., 2021), such as 10000; None learns positions
    qk_norm: bool = False  # RMSNorm of each query and key (Henry et al., 2020)
    tied: bool = True  # the output head uses the weights of the embedding
    zero_init: bool = False  # start the output layers of attention and MLP at zero, so that blocks change nothing yet
    document_end: int | None = None  # attention stops at documents that end with this token id; None ignores them

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "n_kv_head", "mlp_width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd is {self.n_embd}, not a multiple of n_head, {self.n_head}; change one")
        if self.n_head % self.kv_heads:
            raise UserError(f"n_kv_head is {self.n_kv_head}, not a divisor of n_head, {self.n_head}; change one")
        if self.rope_theta is not None and (not 1 < self.rope_theta < math.inf or self.head_width % 2):
            raise UserError(
                f"rope_theta is {self.rope_theta}, n_embd / n_head is {self.head_width}; rotary positions need a "
                "base above 1 and an even head width"
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

    A plain cache attends over the tokens it holds. A `static` one, given a single token, attends over all `block_size`
    positions behind a mask, and reads its length from the device: each step then runs the same kernels on the same
    memory, which CUDA graphs need. `dtype` may differ from the model's: on a CPU, single tokens are faster in fp32.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype, static: bool = False
    ):
        shape = (batch_size, config.kv_heads, config.block_size, config.head_width)  # (B, K, S, D)
        # Masked values must not be NaN: a static cache starts at zero. Untouched pages of torch.empty cost no memory.
        new = torch.zeros if static else torch.empty
        # A tensor for each layer: into one of all layers the compiler would not write in place, but copy the whole.
        self.keys, self.values = (
            [new(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in range(2)
        )
        self.static = static
        self.length = 0  # tokens held, which is the position of the next one
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # the same number, on the device
        if static:
            # What to add to a single token's scores: 0 for the tokens held, -inf for the rest.
            self.visible = torch.full((1, config.block_size), -math.inf, device=device, dtype=dtype)
            for tensor in (*self.keys, *self.values, self.position, self.visible):
                # They keep their addresses; else the compiler would make no CUDA graph of writes to them.
                torch._dynamo.mark_static_address(tensor, guard=False)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, (B, K, T, D) each. Returns all that it holds, (B, K, S, D) each, where
        S = length + T; for a single token in a static cache, S = block_size."""
        keys, values = self.keys[layer], self.values[layer]
        if self.static and k.size(2) == 1:
            keys.index_copy_(2, self.position, k.to(keys.dtype))
            values.index_copy_(2, self.position, v.to(values.dtype))
            return keys, values
        end = self.length + k.size(2)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, T: int) -> torch.Tensor | None:
        """What to add to the scores of `T` new tokens, (T, S): 0 for keys up to their own position, -inf for others.
        None if each sees all, or if there are none but theirs. To be called before they are appended."""
        device, dtype = self.position.device, self.keys[0].dtype
        if T > 1 and self.length:
            return torch.full((T, self.length + T), -math.inf, dtype=dtype, device=device).triu(self.length + 1)
        return self.visible.index_fill_(1, self.position, 0.0) if T == 1 and self.static else None

    def at_positions(self, table: torch.Tensor, T: int) -> torch.Tensor:
        """The rows of `table` (block_size, ...) at the positions of `T` new tokens, (T, ...)."""
        return table[self.position] if self.static and T == 1 else table[self.length : self.length + T]

    def advance(self, n_tokens: int) -> None:
        """Count tokens that were appended."""
        if n_tokens > 1:
            self.move_to(self.length + n_tokens)
        else:  # `mask` has made it visible
            self.length += 1
            self.position.fill_(self.length)

    def clear(self) -> None:
        """Empty the cache for another text. An infinity that this one left would spoil it: 0 times that is NaN."""
        torch._foreach_zero_([*self.keys, *self.values])
        self.move_to(0)

    def move_to(self, length: int) -> None:
        """Hold the first `length` tokens from now on, to read the rest of the text again."""
        self.length = length
        self.position.fill_(length)
        if self.static:
            self.visible[:, :length], self.visible[:, length:] = 0.0, -math.inf

    def copy_rows(self, source: "KVCache", rows: torch.Tensor) -> None:
        """Hold what these rows of `source` hold, (B,) indices that may repeat: to draw many samples of one prompt, or
        drop finished ones."""
        for mine, theirs in zip((*self.keys, *self.values), (*source.keys, *source.values), strict=True):
            mine[:, :, : source.length] = theirs[rows, :, : source.length]
        self.move_to(source.length)


def _at_positions(table: torch.Tensor, cache: KVCache | None, T: int) -> torch.Tensor:
    return table[:T] if cache is None else cache.at_positions(table, T)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6), times a weight; computed in fp32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).to(x.dtype)


def layer_norm(config: GPTConfig) -> nn.Module:
    return RMSNorm(config.n_embd) if config.rms_norm else nn.LayerNorm(config.n_embd, bias=config.bias)


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate each pair (i, i + D/2) of x (B, H, T, D) by its angle; `rotation`: cosines and sines, (T, D/2) each."""
    cos, sin = rotation
    a, b = x.float().chunk(2, -1)  # (B, H, T, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Context(NamedTuple):
    """What the attention of all layers shares. Each field is None if it is not used."""

    cache: KVCache | None
    mask: torch.Tensor | None  # of the keys that tokens see, (T, S), if a cache holds others than theirs
    rotation: tuple[torch.Tensor, torch.Tensor] | None  # cosines and sines of the tokens' positions, (T, D/2) each
    documents: torch.Tensor | None  # (B, T), the number of the document that each token belongs to


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
        D = C // self.n_head
        q = self.c_q(x).view(B, T, -1, D).transpose(1, 2)  # (B, H, T, D)
        k = self.c_k(x).view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        v = self.c_v(x).view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        cache = context.cache
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D), in the cache's dtype
        if cache is None or (T > 1 and context.mask is None):  # all keys are those of the T tokens
            dropout = self.dropout if self.training else 0.0
            y = causal_attention(q.to(k.dtype), k, v, dropout, context.documents)  # (B, H, T, D)
        else:
            gqa = k.size(1) < self.n_head
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=context.mask, enable_gqa=gqa)
        y = y.to(q.dtype).transpose(1, 2).reshape(B, T, C)  # (B, T, C); x may be fp32 where autocast makes q bf16
        return self.resid_dropout(self.c_proj(y))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's form of GELU, x (1 + tanh u) / 2. Compiled, it is x sigmoid(2 u): equal, at half the cost on a CPU."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    y = x.float()
    return (y * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        gated_width = 32 * math.ceil(config.n_embd * 8 / 3 / 32)  # rounded up to suit the matrix products
        width = config.mlp_width or (gated_width if config.swiglu else 4 * config.n_embd)
        self.c_gate = nn.Linear(config.n_embd, width, bias=config.bias) if config.swiglu else None
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = gelu(self.c_fc(x)) if self.c_gate is None else F.silu(self.c_gate(x)) * self.c_fc(x)  # (B, T, width)
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
        # None: the head is wte's weights. inference/optimize.py puts a head of its own here.
        self.head: nn.Module | None = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.chunked_loss = True  # compute the loss by chunks of rows (ops/cross_entropy.py); False holds all logits
        self.kernels = PLAIN  # compile_training and compile_decoding replace this one and the next two
        self.compiled_trunk: Callable[..., torch.Tensor] | None = None
        self.compiled_decode: Callable[..., torch.Tensor] | None = None
        self.idle_caches: dict[int, KVCache] = {}  # static ones by their rows: a compiled step is tied to their memory
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # as in GPT-2: 2 n_layer of these add to the residual stream
                nn.init.normal_(parameter, std=0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer))

    @property
    def head_weight(self) -> torch.Tensor:
        return self.wte.weight if self.head is None else self.head.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the logits (B, T, V) that follow each of tokens (B, T), T <= block_size; with targets (B, T), their
        mean cross-entropy in nats, an fp32 scalar. Targets of IGNORE do not count; if all are, the loss is 0."""
        assert tokens.size(1) <= self.config.block_size, f"{tokens.size(1)} tokens exceed block_size"
        documents = self._documents(tokens)
        if targets is None:
            return self._head(self._trunk(self._embed(tokens, None), None, documents))
        trunk = self.compiled_trunk or self._trunk
        x = trunk(self._embed(tokens, None), None, documents)  # (B, T, C)
        if self.chunked_loss:
            return linear_cross_entropy(x.flatten(0, 1), self.head_weight, targets.flatten(), self.kernels)
        logits = self._head(x).float().flatten(0, 1)  # (B T, V)
        loss = F.cross_entropy(logits, targets.flatten().long(), ignore_index=IGNORE)
        return torch.where((targets != IGNORE).any(), loss, 0.0)  # torch's mean over no target is NaN

    def losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the cross-entropy in nats of each of targets (B, T) that is not IGNORE, (n,) fp32, in their order.
        For evaluation: without gradients, the logits of a few hundred targets are held at once."""
        counted = targets != IGNORE  # (B, T)
        x = self._trunk(self._embed(tokens, None), None, self._documents(tokens))[counted]  # (n, C)
        n_rows = max(1, 2**27 // (4 * self.config.vocab_size))  # 128 MB of fp32 logits
        parts = zip(x.split(n_rows), targets[counted].long().split(n_rows), strict=True)
        return torch.cat([F.cross_entropy(self._head(rows).float(), ids, reduction="none") for rows, ids in parts])

    def decode(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Append tokens (B, T) to the cache. Returns the logits (B, V) after the last of them.

        Prefill is a call with the prompt; each decoding step is one with T = 1. The cached length plus T must not
        exceed block_size. All tokens count as one document.
        """
        assert cache.length + tokens.size(1) <= self.config.block_size, "beyond block_size"
        # A prompt of one token is read eagerly, as longer ones: its rows may be fewer than those that are decoded.
        compiled = self.compiled_decode if cache.static and tokens.size(1) == 1 and cache.length else None
        if compiled is not None:
            tokens = tokens.contiguous().view(-1, 1)  # the same strides for every slice, so that none recompiles
        logits = (compiled or self._decode)(tokens, cache)
        cache.advance(tokens.size(1))
        return logits

    def _decode(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self._head(self._trunk(self._embed(tokens, cache), cache, None)[:, -1])

    def compile_training(self, compiled: bool = True) -> None:
        """Compile, in place, what a training step runs; with compiled=False, undo that."""
        self.compiled_trunk, self.kernels = None, PLAIN
        self.__dict__.pop("forward", None)  # an earlier compiled forward, which hides the method
        torch.compiler.assume_constant_result(bf16_is_native)  # attention calls it: measure once, while tracing
        if compiled and self.chunked_loss:
            self.compiled_trunk, self.kernels = torch.compile(self._trunk, dynamic=False), PLAIN.compiled()
        elif compiled:
            self.forward = torch.compile(self.forward, dynamic=False)

    @property
    def is_compiled(self) -> bool:
        """Whether training steps run compiled code."""
        return self.compiled_trunk is not None or "forward" in vars(self)

    def compile_decoding(self) -> None:
        """Compile, in place, the step of one token on a static cache; on a GPU it becomes one CUDA graph."""
        self.compiled_decode = torch.compile(self._decode, dynamic=False, mode="reduce-overhead")

    def _embed(self, tokens: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        # A tied embedding's gradient is added to the head's. Sparse, it saves a tensor as large as the embedding. Not
        # on a GPU, where this has never run.
        sparse = self.chunked_loss and self.config.tied and tokens.device.type == "cpu"
        x = F.embedding(tokens, self.wte.weight, sparse=sparse)  # (B, T, C)
        return x if self.wpe is None else x + _at_positions(self.wpe.weight, cache, tokens.size(1))

    def _documents(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The number of the document that each token belongs to, (B, T) int32; None unless document_end is set. The
        id that ends a document counts as the first token of the next, which can attend to it."""
        end = self.config.document_end
        return None if end is None else (tokens == end).cumsum(1, dtype=torch.int32)

    def _rotation(self, cache: KVCache | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines of rotary positions for the new tokens x (B, T, C), (T, D/2) each. With a cache whose rows
        differ in length (inference/batching.py), (B, 1, T, D/2)."""
        if self.config.rope_theta is None:
            return None
        exponents = torch.arange(0, self.config.head_width, 2, device=x.device) / self.config.head_width  # (D/2)
        positions = _at_positions(torch.arange(self.config.block_size, device=x.device), cache, x.size(1))  # (T)
        positions = positions if positions.dim() == 1 else positions[:, None]
        angles = positions[..., None] * self.config.rope_theta**-exponents  # (T, D/2)
        return angles.cos(), angles.sin()

    def _trunk(self, x: torch.Tensor, cache: KVCache | None, documents: torch.Tensor | None) -> torch.Tensor:
        """Blocks and final norm: embeddings x (B, T, C) to what the head reads, (B, T, C)."""
        mask = None if cache is None else cache.mask(x.size(1))
        context = Context(cache, mask, self._rotation(cache, x), documents)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = self.drop(x.to(dtype))  # autocast halves the bytes of the residual stream
        for block in self.h:
            x = block(x, context)
        return self.ln_f(x).to(dtype)  # autocast on a GPU makes the norm's output fp32

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.wte.weight) if self.head is None else self.head(x)  # (..., V)

    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token at full context: 6 per weight in a matrix product, 12 L C T
        for attention (Chowdhery et al., PaLM, 2022, appendix B)."""
        config = self.config
        matmul_weights = sum(p.numel() for p in self.h.parameters() if p.dim() == 2) + self.head_weight.numel()
        return 6 * matmul_weights + 12 * config.n_layer * config.n_embd * config.block_size
