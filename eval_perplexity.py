"""Loss, perplexity and bits per byte of a trained model on held-out text, overall and by language.

    python eval_perplexity.py --out_dir=out/tiny                              # shards, in blocks, as during training
    python eval_perplexity.py --out_dir=out/tiny --stride=128                 # their documents, in sliding windows
    python eval_perplexity.py --out_dir=out/tiny --files='src/**/*.py'        # files
    python eval_perplexity.py --out_dir=out/tiny --compare=models/gpt2 --files='src/**/*.py'   # beside another model

Bits per byte, total nats / ln 2 / bytes of the text, compares models with different tokenizers. So does perplexity per
Pygments token, PolyCoder's measure (pip install pygments). evaluation/likelihood.py says how documents are scored.
"""

import glob
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.documents import fraction, language_of
from data.shards import SPLITS, Shards, open_shards
from evaluation.likelihood import Scored, evaluate_loss, load_scorer, score_documents
from runtime.config import run_stage
from runtime.device import resolve_device, resolve_dtype, warn_if_slow
from runtime.errors import UserError
from weights.checkpoint import latest_run, load, open_run


@dataclass(frozen=True)
class PerplexityConfig:
    out_dir: str | None = None  # folder of the run, or a .pt file; None takes the latest run under out/
    checkpoint: str = "last"  # checkpoint to load: last, or best, of the lowest validation loss
    compare: str | None = None  # another run, or the folder of a Hugging Face model, to score on the same text
    dataset: str | None = None  # shards to score, a folder under data/shards or a path; None takes the run's own
    split: str = "val"  # split of the shards to score: val or train
    files: str | None = None  # files to score instead of shards: patterns such as 'src/**/*.py', joined by ;
    stride: int | None = None  # tokens between windows over documents; None: blocks (shards) or half a context (files)
    max_tokens: int | None = None  # score a fixed selection of about this many tokens; None scores all
    batch_size: int = 16  # most sequences per forward pass
    device: str | None = None  # cuda, mps or cpu; None takes the best available
    dtype: str | None = None  # precision of matrix products: float32, bfloat16, float16; None: the fastest here

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"--split={self.split}: not one of {', '.join(SPLITS)}")
        for name in ("batch_size", "max_tokens", "stride"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.files is not None and self.dataset is not None:
            raise UserError("--files and --dataset name different texts; give one of them")


def eval_perplexity(config: PerplexityConfig) -> dict[str, Any]:
    """Score one or two models, print a table and return the figures, with "languages" in them; by model if two."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    warn_if_slow(dtype, device)
    out_dir = config.out_dir or latest_run()
    if config.files is None and config.stride is None and config.compare is None:
        return _score_blocks(config, out_dir, device, dtype)
    scorers = [load_scorer(name, config.checkpoint, device, dtype) for name in (out_dir, config.compare) if name]
    source = config.files or config.dataset or "the shards"
    stride = config.stride or min(scorer.context for scorer in scorers) // 2 or 1
    for scorer in scorers:
        if stride > scorer.context:
            raise UserError(f"--stride={stride}: more than the context of {scorer.name}, {scorer.context}; lower it")
        if config.files is not None:
            n_bytes, documents = _files(config.files)
        else:
            n_bytes, documents = _of_shards(out_dir, config.checkpoint, config.dataset, config.split)
        documents = _select(config.max_tokens, n_bytes, documents)
        score_documents(scorer, documents, stride, config.batch_size)
        if not scorer.totals:
            raise UserError(f"{source}: no document to score; raise --max_tokens, or give others")
    figures: dict[str, Any] = {}
    for scorer in scorers:
        overall = Scored()
        for total in scorer.totals.values():
            overall.add(total)
        by_language = {language: scorer.totals[language].figures() for language in sorted(scorer.totals)}
        settings = {"context": scorer.context, "stride": stride}
        figures[scorer.name] = {**overall.figures(), **settings, "languages": by_language}
    contexts = ", ".join(f"{scorer.name} sees {scorer.context} tokens" for scorer in scorers)
    print(f"documents of {source} in windows that move on by {stride}; {contexts}")
    print(perplexity_table(figures))
    return figures if config.compare else figures[scorers[0].name]


def _score_blocks(config: PerplexityConfig, out_dir: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    model, tokenizer, payload = load(out_dir, device, config.checkpoint)
    shards = open_shards(config.dataset or payload["config"]["dataset"])
    _require_tokenizer(shards, payload, out_dir)
    settings = {"batch_size": config.batch_size, "dtype": dtype, "max_tokens": config.max_tokens}
    figures = evaluate_loss(model, shards.split(config.split), tokenizer, **settings)
    print(
        f"{out_dir} at step {payload['step']} on {shards.path}/{config.split}: "
        f"loss {figures['loss']:.4f} nats/token, perplexity {figures['perplexity']:.3f}, "
        f"{figures['bits_per_byte']:.4f} bits per byte ({figures['tokens']:,} tokens, {figures['bytes']:,} bytes)"
    )
    languages = sorted({entry["language"] for entry in shards.entries[config.split] if "language" in entry})
    if len(languages) > 1:
        figures["languages"] = {}
        for language in languages:
            stream = shards.split(config.split, language)
            if len(stream) > model.config.block_size:
                figures["languages"][language] = evaluate_loss(model, stream, tokenizer, **settings)
        print(perplexity_table({out_dir: figures}))
    return figures


def _select(max_tokens: int | None, n_bytes: int, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The (language, text) documents, of `n_bytes` in all. With `max_tokens`, a fixed selection of them by hash, of
    about four bytes per token."""
    share = 1.0 if max_tokens is None else 4 * max_tokens / max(1, n_bytes)
    return ((language, text) for language, text in documents if share >= 1 or fraction(text) < share)


def _files(patterns: str) -> tuple[int, Iterator[tuple[str, str]]]:
    """The size of all files that match, in bytes, and the language and text of each."""
    found = {path for pattern in patterns.split(";") for path in glob.glob(pattern.strip(), recursive=True)}
    paths = [path for path in sorted(map(Path, found)) if path.is_file()]
    if not paths:
        raise UserError(f"--files={patterns}: no such files; give patterns such as 'src/**/*.py'")

    def read() -> Iterator[tuple[str, str]]:
        for path in paths:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                print(f"warning: {path}: not UTF-8 text; left out", file=sys.stderr)
                continue
            if text:
                yield language_of(str(path)) or "other", text

    return sum(path.stat().st_size for path in paths), read()


def _of_shards(out_dir: str, checkpoint: str, dataset: str | None, split: str) -> tuple[int, Iterator[tuple[str, str]]]:
    """The size of a split of `dataset`, or of the run's own shards, estimated in bytes, and the language and text of
    each of its documents."""
    tokenizer, payload = open_run(out_dir, checkpoint)
    shards = open_shards(dataset or payload["config"]["dataset"])
    _require_tokenizer(shards, payload, out_dir)
    languages = sorted({entry.get("language") or "" for entry in shards.entries[split]})
    streams = {language: shards.split(split, language or None) for language in languages}

    def read() -> Iterator[tuple[str, str]]:
        for language, stream in streams.items():
            rest = np.empty(0, dtype=np.int64)  # the beginning of a document whose end is not yet read
            for start in range(0, len(stream), 2**20):
                tokens = np.concatenate([rest, stream.read(start, min(2**20, len(stream) - start))])
                *documents, rest = np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text) + 1)
                for document in documents:
                    if text := tokenizer.decode(document[:-1].tolist()):
                        yield language or "other", text

    return 4 * sum(map(len, streams.values())), read()


def _require_tokenizer(shards: Shards, payload: dict[str, Any], out_dir: str) -> None:
    if shards.meta["tokenizer_sha256"] != payload["tokenizer_sha256"]:
        raise UserError(
            f"{shards.path}: tokenized with another tokenizer than that of {out_dir}; prepare the text again with the "
            "run's tokenizer, or score another --dataset"
        )


def perplexity_table(figures: dict[str, dict[str, Any]]) -> str:
    """Models side by side: rows for each language, and for all."""
    width = max(map(len, figures))
    heads = ("loss", "perplexity", "bits/byte", "per Pygments token", "tokens", "bytes")
    lines = [f"{'language':16} {'model':{width}} " + " ".join(f"{head:>{max(10, len(head))}}" for head in heads)]
    for language in [*sorted({name for f in figures.values() for name in f["languages"]}), "all"]:
        for model, all_figures in figures.items():
            f = all_figures if language == "all" else all_figures["languages"].get(language)
            if f is None:
                continue
            lexed = f.get("perplexity_per_pygments_token")
            lines.append(
                f"{language:16} {model:{width}} {f['loss']:10.4f} {f['perplexity']:10.3f} {f['bits_per_byte']:10.4f} "
                + (f"{lexed:18.3f}" if lexed else f"{'-':>18}")
                + f" {f['tokens']:10,} {f['bytes']:10,}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(eval_perplexity, PerplexityConfig)
