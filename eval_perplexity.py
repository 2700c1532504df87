"""Loss, perplexity and bits per byte of a trained model on held-out shards.

    python eval_perplexity.py --out_dir=out/tiny
    python eval_perplexity.py --out_dir=out/tiny --dataset=other --max_tokens=1_000_000

Bits per byte, total nats / ln 2 / bytes of the text, is the figure that compares models with different tokenizers.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint import latest_run, load
from config import run_stage
from dataloader import Loader
from device import autocast, resolve_device, resolve_dtype
from model import GPT, IGNORE
from shards import SPLITS, TokenStream, open_shards
from tokenizer import Tokenizer


@dataclass(frozen=True)
class EvalConfig:
    out_dir: str | None = None  # folder of the run, or a .pt file; None takes the latest run under out/
    checkpoint: str = "last"  # last, or best: the lowest validation loss
    dataset: str | None = None  # shards to score, a folder under data/shards or a path; None takes the run's own
    split: str = "val"  # val or train
    max_tokens: int | None = None  # score a seeded choice of blocks of about this many tokens; None scores all
    batch_size: int = 16  # sequences at once
    device: str | None = None  # cuda, mps or cpu; None takes the best there is
    dtype: str | None = None  # of the matrix products: float32, bfloat16, float16; None takes the device's native one

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"--split={self.split}: not one of {', '.join(SPLITS)}")
        for name in ("batch_size", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


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
    device, context = model.wpe.weight.device, model.config.block_size
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
    loss = nats / n_tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else math.inf,
        "tokens": n_tokens,
        "bytes": n_bytes,
    }


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Load the run, score the split, print the figures and return them."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    out_dir = config.out_dir or latest_run()
    model, tokenizer, payload = load(out_dir, device, config.checkpoint)
    shards = open_shards(config.dataset or payload["config"]["dataset"])
    if shards.meta["tokenizer_sha256"] != payload["tokenizer_sha256"]:
        raise ValueError(
            f"{shards.path}: tokenized with another tokenizer than {out_dir} was trained with; prepare the text "
            "again with the run's own, or score another --dataset"
        )
    figures = evaluate_loss(
        model,
        shards.split(config.split),
        tokenizer,
        batch_size=config.batch_size,
        dtype=dtype,
        max_tokens=config.max_tokens,
    )
    print(
        f"{out_dir} at step {payload['step']} on {shards.path}/{config.split}: "
        f"loss {figures['loss']:.4f} nats/token, perplexity {figures['perplexity']:.3f}, "
        f"{figures['bits_per_byte']:.4f} bits per byte ({figures['tokens']:,} tokens, {figures['bytes']:,} bytes)"
    )
    return figures


if __name__ == "__main__":
    run_stage(evaluate, EvalConfig)
