"""Scores of whole documents under any causal model, ours or Hugging Face's: nats, tokens, bytes, Pygments tokens.

A document is scored from its first token on, which follows an end-of-text. A window is as long as the model's context
and moves on by a stride: every token is scored once, with at least context - stride tokens before it where the document
has as many. The end-of-text after a document is no text, and not scored.

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


@dataclass
class Scored:
    """Sums over some text, and the figures that follow from them."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    pygments_tokens: int | None = 0  # None if some of the text has no lexer

    def add(self, other: "Scored") -> None:
        self.nats, self.tokens, self.bytes = (
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
        )
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
    """Score `stream` in blocks of the model's context, each from its own beginning: loss in nats a token, perplexity,
    bits per byte, and the tokens and bytes scored.

    `max_tokens` scores that many at most (one block at least), in blocks picked by a fixed permutation, so that two
    models with the same context are scored on the same text. End-of-text tokens count in the nats and hold no bytes.
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
        targets[n_blocks - step * batch_size :] = IGNORE  # beyond the last block; the shape stays, for the compiler
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
    """A model of any make, as scoring sees it."""

    name: str
    context: int  # tokens it can see
    start: int  # the id that begins a document
    encode: Callable[[str], list[int]]
    logits: Callable[[torch.Tensor], torch.Tensor]  # (B, T) ids to (B, T, V)
    device: torch.device
    totals: dict[str, Scored] = field(default_factory=dict)  # by language


def load_scorer(name: str, checkpoint: str, device: torch.device, dtype: torch.dtype) -> Scorer:
    """The run in the folder `name`, or the Hugging Face model if there is a config.json in it."""
    if (Path(name) / "config.json").is_file():
        return _load_hugging_face(name, device, dtype)
    model, tokenizer, _ = load(name, device, checkpoint)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with autocast(device, dtype):
            return model(tokens)

    return Scorer(name, model.config.block_size, tokenizer.end_of_text, tokenizer.encode, logits, device)


def _load_hugging_face(name: str, device: torch.device, dtype: torch.dtype) -> Scorer:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(f"{name}: a Hugging Face model needs transformers: pip install transformers") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True).to(device).eval()
    except Exception as error:  # whatever a folder that lacks something leads its readers to
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not a model that transformers can load ({reason}); give its folder") from None
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    if start is None:
        raise UserError(f"{name}: its tokenizer has no token to begin a document with; give another model")
    context = next(
        (v for k in ("n_positions", "max_position_embeddings") if (v := getattr(model.config, k, None))), 2048
    )

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        with autocast(device, dtype):
            return model(input_ids=tokens).logits

    return Scorer(name, context, start, lambda text: tokenizer.encode(text, add_special_tokens=False), logits, device)


@torch.no_grad()
def score_documents(scorer: Scorer, documents: Iterable[tuple[str, str]], stride: int, batch_size: int) -> None:
    """Add the scores of documents, (language, text) each, to the scorer's totals by language."""
    pending: list[tuple[str, list[int], list[int]]] = []  # language, inputs, targets

    def flush() -> None:
        length = max(len(inputs) for _, inputs, _ in pending)
        inputs = torch.full((len(pending), length), scorer.start)  # (B, T); what follows the end changes nothing before
        targets = torch.full((len(pending), length), IGNORE)
        for row, (_, i, t) in enumerate(pending):
            inputs[row, : len(i)], targets[row, : len(t)] = torch.tensor(i), torch.tensor(t)
        counted = targets != IGNORE  # (B, T)
        logits = scorer.logits(inputs.to(scorer.device))[counted.to(scorer.device)].float()  # (scored, V)
        nats = torch.zeros(targets.shape, dtype=torch.float64)
        losses = F.cross_entropy(logits, targets[counted].to(scorer.device), reduction="none")  # (scored)
        nats[counted] = losses.cpu().double()
        for (language, *_), row_nats in zip(pending, nats.sum(1).tolist(), strict=True):
            scorer.totals[language].nats += row_nats
        pending.clear()

    for language, text in documents:
        ids = [scorer.start, *scorer.encode(text)]
        total = scorer.totals.setdefault(language, Scored())
        total.add(Scored(0.0, len(ids) - 1, len(text.encode()), pygments_tokens(language, text)))
        for inputs, targets in windows(ids, scorer.context, stride):
            pending.append((language, inputs, targets))
            if len(pending) == batch_size:
                flush()
    if pending:
        flush()


def windows(ids: list[int], context: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and targets of windows over a document, at most `context` long, each moved on by `stride`: every id but
    the first is a target once, and IGNORE where an earlier window had it."""
    scored = 0  # targets so far
    begin = 0
    while scored < len(ids) - 1:
        end = min(begin + context, len(ids) - 1)
        yield ids[begin:end], [IGNORE] * (scored - begin) + ids[scored + 1 : end + 1]
        scored, begin = end, begin + stride


def pygments_tokens(language: str, text: str) -> int | None:
    """The tokens that the lexer of the language cuts the text into; None if there is none, or no Pygments."""
    try:
        from pygments.lexers import get_lexer_by_name
        from pygments.util import ClassNotFound
    except ImportError:
        return None
    try:
        return sum(1 for _ in get_lexer_by_name(language.lower()).get_tokens(text))
    except ClassNotFound:
        return None
