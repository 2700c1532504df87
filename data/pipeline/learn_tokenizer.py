"""The tokenizer of a corpus: a known one, or one learnt from a sample of it."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data.documents import Document, Input, fraction, utf8_bytes
from data.pipeline.report import progress_bar
from data.pipeline.steps import RefineConfig, Refinery, Tally, is_validation
from data.sequences import SPECIALS
from data.shards import tokenizer_file
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from runtime.errors import UserError
from runtime.files import write_json

SAMPLED_INPUTS = 8  # the sample comes from at most this many, spread over the source; a hub's are downloaded for it
HELD_OUT_BYTES = 2**21  # validation text on which tokenizers are compared


def tokenizer_for(config: RefineConfig, inputs: list[Input], folder: Path) -> Tokenizer:
    """The tokenizer the settings ask for, kept in `folder`, so that a run that goes on uses the same; beside one that
    is trained, tokenizers.json compares it with cl100k_base. Raises UserError if it cannot be had."""
    path = tokenizer_file(folder)
    if path.exists():
        return load_tokenizer(str(path))
    held_out: list[str] = []
    tokenizer = make_tokenizer(config, _sample(inputs, config, held_out))
    if config.tokenizer.startswith("train:"):
        write_json(folder / "tokenizers.json", _compared(tokenizer, held_out))
    tokenizer.save(path)
    return tokenizer


def make_tokenizer(config: RefineConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer the settings ask for, with the special tokens they need, learnt from `texts` if it is to be."""
    needs_specials = config.metadata_rate or config.fim_rate or config.notebooks or "commits:" in config.source
    specials = SPECIALS if needs_specials else ()
    kind, _, size = config.tokenizer.partition(":")
    if kind != "train":
        return load_tokenizer(config.tokenizer).with_specials(specials)
    if not size.isdecimal():
        raise UserError(f"--tokenizer={config.tokenizer}: wants a number of ids, such as train:4096")
    return train_tokenizer(texts, int(size) - len(specials)).with_specials(specials)


def _sample(inputs: list[Input], config: RefineConfig, held_out: list[str]) -> Iterator[str]:
    """Cleaned training documents, chosen by a hash of repository and path, from inputs spread evenly over the source,
    up to `tokenizer_sample_bytes`; some of the validation text among them goes to `held_out`."""
    chosen = [inputs[place] for place in np.unique(np.linspace(0, len(inputs) - 1, SAMPLED_INPUTS).astype(int))]
    rate = config.tokenizer_sample_bytes / max(1, sum(item.text_bytes for item in chosen))
    refinery = Refinery(dataclasses.replace(config, decontaminate=None, redact=False))
    left, left_held_out = config.tokenizer_sample_bytes, HELD_OUT_BYTES
    with progress_bar("sampling for the tokenizer", left) as bar:
        for item in chosen:
            for document in (record for record in item.records(skip=0) if isinstance(record, Document)):
                is_val = is_validation(item, config) or refinery.split(document) == "val"
                draw = fraction(f"sample {config.seed} {document.repo} {document.path}")
                if draw >= rate or (is_val and left_held_out <= 0):
                    continue
                for text in (kept.text for kept in refinery.clean([document], Tally())):
                    if is_val:
                        left_held_out -= utf8_bytes(text)
                        held_out.append(text)
                    else:
                        left -= utf8_bytes(text)
                        bar.update(utf8_bytes(text))
                        yield text
                if left <= 0:
                    return


def _compared(tokenizer: Tokenizer, held_out: list[str]) -> dict[str, float]:
    """Bytes a token on the same held-out text, of a new tokenizer and of cl100k_base if that can be had."""
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
