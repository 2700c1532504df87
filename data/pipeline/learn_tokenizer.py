"""The tokenizer of a corpus: a known one, or one learnt from a sample of it."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data.documents import Document, Input, fraction, utf8_bytes
from data.pipeline.report import progress_bar
from data.pipeline.split import is_validation
from data.pipeline.steps import PipelineConfig, Refinery
from data.pipeline.tally import Tally
from data.sequences import SPECIALS
from data.shards import tokenizer_file
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from runtime.errors import UserError
from runtime.files import write_json

SAMPLED_INPUTS = 8  # the sample comes from at most this many inputs; inputs of a hub are downloaded for it
HELD_OUT_BYTES = 2**21  # validation text on which tokenizers are compared


def tokenizer_for(config: PipelineConfig, inputs: list[Input], folder: Path) -> Tokenizer:
    """The tokenizer that the settings ask for. It is kept in `folder`, so that a run that continues uses the same one.
    For a trained one, tokenizers.json compares it with cl100k_base. Raises UserError if it cannot be loaded."""
    path = tokenizer_file(folder)
    if path.exists():
        return load_tokenizer(str(path))
    held_out: list[str] = []
    tokenizer = make_tokenizer(config, _sample(inputs, config, held_out))
    if config.tokenizer.startswith("train:"):
        write_json(folder / "tokenizers.json", _compared(tokenizer, held_out))
    tokenizer.save(path)
    return tokenizer


def make_tokenizer(config: PipelineConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that the settings ask for, with the special tokens that they need; train:N learns from `texts`."""
    needs_specials = config.metadata_rate or config.fim_rate or config.notebooks or "commits:" in config.source
    specials = SPECIALS if needs_specials else ()
    kind, _, size = config.tokenizer.partition(":")
    if kind != "train":
        return load_tokenizer(config.tokenizer).with_specials(specials)
    if not size.isdecimal():
        raise UserError(f"--tokenizer={config.tokenizer}: wants a number of ids, such as train:4096")
    return train_tokenizer(texts, int(size) - len(specials)).with_specials(specials)


def spread(inputs: list[Input], count: int) -> list[Input]:
    """At most `count` of the inputs, spread evenly over the source."""
    return [inputs[index] for index in np.unique(np.linspace(0, len(inputs) - 1, count).astype(int))]


def _sample(inputs: list[Input], config: PipelineConfig, held_out: list[str]) -> Iterator[str]:
    """Cleaned training documents, chosen by a hash of repository and path from some of the inputs, up to
    `tokenizer_sample_bytes`. Validation text among them is added to `held_out`, up to HELD_OUT_BYTES."""
    chosen = spread(inputs, SAMPLED_INPUTS)
    rate = config.tokenizer_sample_bytes / max(1, sum(item.text_bytes for item in chosen))
    refinery = Refinery(dataclasses.replace(config, decontaminate=None, redact=False))
    left, left_held_out = config.tokenizer_sample_bytes, HELD_OUT_BYTES
    with progress_bar("sampling for the tokenizer", left) as bar:
        for item in chosen:
            for document in (record for record in item.records(skip=0) if isinstance(record, Document)):
                is_val = is_validation(item, config.val_files) or refinery.split(document) == "val"
                draw = fraction(f"sample {config.seed} {document.repo} {document.path}")
                if draw >= rate or (is_val and left_held_out <= 0):
                    continue
                for cleaned in refinery.clean([document], Tally()):  # none if the filters drop it
                    n_bytes = utf8_bytes(cleaned.text)
                    if is_val:
                        left_held_out -= n_bytes
                        held_out.append(cleaned.text)
                    else:
                        left -= n_bytes
                        bar.update(n_bytes)
                        yield cleaned.text
                if left <= 0:
                    return


def _compared(tokenizer: Tokenizer, held_out: list[str]) -> dict[str, float]:
    """Bytes per token on the held-out text, of a new tokenizer and, if it can be loaded, of cl100k_base."""
    tokenizers = {tokenizer.name: tokenizer}
    try:
        tokenizers["cl100k_base"] = load_tokenizer("cl100k_base")
    except UserError:
        print("cl100k_base could not be loaded: the new tokenizer is not compared with it", file=sys.stderr)
    n_bytes = sum(map(utf8_bytes, held_out))
    counts = {
        name: sum(len(ids) - 1 for ids in one.encode_documents([[text] for text in held_out]) if ids is not None)
        for name, one in tokenizers.items()
    }
    return {name: round(n_bytes / count, 4) for name, count in counts.items() if count}
