"""Likelihood of text under a causal model: our models by blocks, and whole documents under ours or Hugging Face's.

A document is scored from its first token on, which follows an end-of-text. A window is as long as the model's context
and moves on by a stride. Every token is scored once, with at least context - stride tokens before it if the document
has as many. The end-of-text after a document is not scored.

Perplexity per Pygments token, exp(nats / tokens of the language's lexer, white space included), does not depend on the
model's tokenizer. Source: Xu et al., "A Systematic Evaluation of Large Language Models of Code" (PolyCoder), 2022.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from data.shards import TokenStream
from data.tokenizer import Tokenizer
from dataloader import Loader
from model import GPT, IGNORE
from runtime.device import autocast
from runtime.errors import UserError
from weights.checkpoint import load

MOST_TOKENS = 2**15  # in a forward pass over documents: more take memory and gain no speed


@dataclass
class Scored:
    """Sums over a text, and the figures computed from them."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    pygments_tokens: int | None = 0  # None if some of the text has no lexer

    def add(self, other: "Scored") -> None:
        self.nats += other.nats
        self.tokens += other.tokens
        self.bytes += other.bytes
        counts = (self.pygments_tokens, other.pygments_tokens)
        self.pygments_tokens = None if None in counts else sum(counts)

    def figures(self) -> dict[str, Any]:
        figures = {
            "loss": self.nats / max(1, self.tokens),
            "perplexity": math.exp(min(self.nats / max(1, self.tokens), 700.0)),
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else math.inf,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }
        if self.pygments_tokens:
            figures["perplexity_per_pygments_token"] = math.exp(min(self.nats / self.pygments_tokens, 700.0))
            figures["pygments_tokens"] = self.pygments_tokens
        return figures


@torch.no_grad()
def evaluate_loss(
    model: GPT,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    dtype: torch.dtype,
    max_tokens: int | None = None,
) -> dict[str, float]:
    """Score `stream` in blocks of the model's context. Returns the loss in nats per token, perplexity, bits per byte,
    and how many tokens and bytes were scored.

    `max_tokens` scores at most that many, and at least one block. The blocks come from a fixed permutation, so that two
    models with the same context are scored on the same text. End-of-text tokens add nats, but no bytes.
    """
    device, context = model.wte.weight.device, model.config.block_size
    loader = Loader(stream, context, batch_size, seed=0)
    n_blocks = loader.n_blocks if max_tokens is None else max(1, min(loader.n_blocks, max_tokens // context))
    bytes_per_id = torch.from_numpy(tokenizer.bytes_per_id())
    nats, n_tokens, n_bytes = 0.0, 0, 0
    training = model.training
    model.eval()
    for step in range(math.ceil(n_blocks / batch_size)):
        inputs, targets = loader.batch(step)  # (B, T) each
        targets[n_blocks - step * batch_size :] = IGNORE  # rows after the last block; a smaller batch would recompile
        with autocast(device, dtype):
            loss = model(inputs.to(device), targets.to(device))
        counted = targets[targets != IGNORE]
        nats += loss.item() * len(counted)
        n_tokens += len(counted)
        n_bytes += int(bytes_per_id[counted].sum())
    model.train(training)
    return Scored(nats, n_tokens, n_bytes).figures()


@dataclass
class Scorer:
    """A model to score documents with: ours or Hugging Face's."""

    name: str
    context: int  # tokens it can see
    start: int  # the id that begins a document
    encode: Callable[[str], list[int]]
    losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of ids and targets (B, T), in nats: as GPT.losses
    device: torch.device
    totals: dict[str, Scored] = field(default_factory=dict)  # by language


def load_scorer(name: str, checkpoint: str, device: torch.device, dtype: torch.dtype) -> Scorer:
    """A scorer for the run in the folder `name`, or for the Hugging Face model in it if it has a config.json."""
    if (Path(name) / "config.json").is_file():
        return _load_hugging_face(name, device, dtype)
    model, tokenizer, _ = load(name, device, checkpoint)

    def losses(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with autocast(device, dtype):
            return model.losses(tokens, targets)

    return Scorer(name, model.config.block_size, tokenizer.end_of_text, tokenizer.encode, losses, device)


def _load_hugging_face(name: str, device: torch.device, dtype: torch.dtype) -> Scorer:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(f"{name}: a Hugging Face model needs transformers: pip install transformers") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True).to(device).eval()
    except Exception as error:  # incomplete folders make its readers raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not a model that transformers can load ({reason}); give its folder") from None
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise UserError(f"{name}: its tokenizer has no token to begin a document with; give another model")
    sizes = (getattr(model.config, name, None) for name in ("n_positions", "max_position_embeddings"))
    context = next(filter(None, sizes), 2048)

    def losses(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        parts = []
        for row, row_targets in zip(tokens.split(1), targets.split(1), strict=True):  # the logits of one row at a time
            length = int((row_targets[0] != IGNORE).nonzero().max()) + 1  # without the padding
            row, row_targets = row[:, :length], row_targets[:, :length]
            counted = row_targets != IGNORE
            with autocast(device, dtype):
                logits = model(input_ids=row).logits[counted].float()  # (n, V)
            parts.append(F.cross_entropy(logits, row_targets[counted], reduction="none"))
        return torch.cat(parts)

    return Scorer(name, context, start, lambda text: tokenizer.encode(text, add_special_tokens=False), losses, device)


@torch.no_grad()
def score_documents(scorer: Scorer, documents: Iterable[tuple[str, str]], stride: int, batch_size: int) -> None:
    """Add the scores of documents, (language, text) each, to the scorer's totals by language. `batch_size` windows go
    through the model at once, or fewer if they have more than MOST_TOKENS."""
    batch_size = max(1, min(batch_size, MOST_TOKENS // scorer.context))
    batch: list[tuple[str, list[int], list[int]]] = []  # language, inputs, targets
    for language, text in documents:
        ids = [scorer.start, *scorer.encode(text)]
        total = scorer.totals.setdefault(language, Scored())
        total.add(Scored(0.0, len(ids) - 1, len(text.encode()), pygments_tokens(language, text)))
        for inputs, targets in windows(ids, scorer.context, stride):
            batch.append((language, inputs, targets))
            if len(batch) == batch_size:
                _add_nats(scorer, batch)
                batch = []
    if batch:
        _add_nats(scorer, batch)


def _add_nats(scorer: Scorer, batch: list[tuple[str, list[int], list[int]]]) -> None:
    """Add the nats of a batch of windows, (language, inputs, targets) each, to the scorer's totals."""
    length = max(len(inputs) for _, inputs, _ in batch)
    inputs = torch.full((len(batch), length), scorer.start)  # (B, T); padding at the end changes nothing before it
    targets = torch.full((len(batch), length), IGNORE)  # (B, T)
    for row, (_, window, window_targets) in enumerate(batch):
        inputs[row, : len(window)] = torch.tensor(window)
        targets[row, : len(window)] = torch.tensor(window_targets)
    counted = targets != IGNORE  # (B, T)
    nats = torch.zeros(targets.shape, dtype=torch.float64)  # (B, T)
    nats[counted] = scorer.losses(inputs.to(scorer.device), targets.to(scorer.device)).cpu().double()
    for (language, *_), row_nats in zip(batch, nats.sum(1).tolist(), strict=True):
        scorer.totals[language].nats += row_nats


def windows(ids: list[int], context: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yields inputs and targets of windows over a document, at most `context` long and `stride` apart. Each id but the
    first is a target once; where an earlier window had it, the target is IGNORE."""
    scored, begin = 0, 0  # targets so far, index of the window's first id
    while scored < len(ids) - 1:
        end = min(begin + context, len(ids) - 1)
        yield ids[begin:end], [IGNORE] * (scored - begin) + ids[scored + 1 : end + 1]
        scored, begin = end, begin + stride


def pygments_tokens(language: str, text: str) -> int | None:
    """How many tokens the language's lexer finds in the text; None without such a lexer, or without Pygments."""
    try:
        from pygments.lexers import get_lexer_by_name
        from pygments.util import ClassNotFound
    except ImportError:
        return None
    try:
        return sum(1 for _ in get_lexer_by_name(language.lower()).get_tokens(text))
    except ClassNotFound:
        return None
