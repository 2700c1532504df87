"""Small real data that the tests share: files of the standard library, shards of them, and similar code."""

import bisect
import gzip
import hashlib
import json
import random
import re
import sysconfig
from pathlib import Path

import numpy as np
import torch

from data.shards import Shards
from data.tokenizer import END_OF_TEXT, load_tokenizer
from model import GPT, GPTConfig
from prepare import PrepareConfig, prepare
from runtime.config import load_config

SHARD_SETTINGS = ("--tokenizer=train:512", "--val_fraction=0.3", "--unit_bytes=250000", "--shard_tokens=100000")
PACKAGES = ("asyncio", "concurrent", "email", "html", "http", "importlib", "json", "logging", "tkinter", "unittest")


def python_documents() -> list[dict[str, str]]:
    """About 3 MB of the standard library, in codeparrot-clean's columns; each package is a repository."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [path for name in PACKAGES for path in sorted((stdlib / name).rglob("*.py"))]
    rows = [(path.relative_to(stdlib), path.read_text(encoding="utf-8")) for path in files]
    return [
        {"repo_name": f"python/{path.parts[0]}", "path": str(path), "content": text, "license": "psf"}
        for path, text in rows
        if text.strip()
    ]


def write_json_gz(path: Path, rows: list[dict[str, str]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def arguments(corpus: Path, path: Path, *more: str) -> list[str]:
    return [f"--name={path}", f"--source=files:{corpus}/*.gz", *SHARD_SETTINGS, *more]


def prepared(corpus: Path, path: Path, *more: str) -> Shards:
    prepare(load_config(PrepareConfig, arguments(corpus, path, *more)))
    return Shards(path)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file but report.json, which holds timings."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    return {name: digest for name, digest in files.items() if name != "report.json"}


def texts_of(shards: Shards, split: str, language: str | None = None) -> list[str]:
    """The documents of a split, decoded."""
    tokenizer = load_tokenizer(str(shards.path / "bpe.json"))
    stream = shards.split(split, language)
    tokens = stream.read(0, len(stream))
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text) + 1)
    assert len(parts[-1]) == 0, "the last document ends with end-of-text"
    return [tokenizer.decode(part).removesuffix(END_OF_TEXT) for part in parts[:-1]]


def code(number: int, n_words: int = 400) -> str:
    """Python that passes every filter and resembles the code of no other number."""
    chance = random.Random(number)
    words = [f"value_{chance.randrange(10**9)}" for _ in range(n_words)]
    lines = [f"    {word} = {index}  # {word} counts" for index, word in enumerate(words)]
    return f"def compute_{number}():\n    '''Compute number {number}.'''\n" + "\n".join(lines) + "\n"


def like(number: int, jaccard: float) -> str:
    """Code whose set of words has that Jaccard similarity to the words of `code(number)`."""
    mine, other = code(number).splitlines(), code(number + 1000).splitlines()

    def mixed(n_changed: int) -> str:
        return "\n".join([*mine[:2], *other[2:n_changed], *mine[n_changed:]]) + "\n"

    def unlikeness(n_changed: int) -> float:
        a, b = (set(re.findall(r"\w+", text)) for text in (code(number), mixed(n_changed)))
        return -len(a & b) / len(a | b)

    return mixed(bisect.bisect_left(range(len(mine)), -jaccard, lo=2, key=unlikeness))


def make_lively_model(block_size: int) -> GPT:
    """Two random layers, 640 ids; greedy decoding does not end in a loop of one token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=block_size, vocab_size=640)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(model.wpe.weight)
    torch.nn.init.ones_(model.ln_f.weight)
    return model


class FakeScore:
    """Stands in for evaluation.during_training.QuickScore: always has a score."""

    def __init__(self, *settings: object):
        pass

    def __enter__(self) -> "FakeScore":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def score(self, *model: object) -> dict[str, float]:
        return {"humaneval_pass@1": 0.0, "humaneval_compiles": 0.5, "humaneval_problems": 10}
