"""Byte-pair tokenizers: a class around tiktoken.Encoding, its file format, and training on a corpus.

    tokenizer = load_tokenizer("cl100k_base")            # or "gpt2", or the path of a bpe.json
    tokenizer = train_tokenizer(texts, vocab_size=4096)  # rustbpe learns the merges, tiktoken encodes with them

The file is JSON: name, split pattern, special tokens with their ids, and the tokens in order of rank, each byte written
as the character with its number. Equal tokenizers make equal files, so the file's sha256 identifies the tokenizer.
"""

import codecs
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from runtime.errors import UserError
from runtime.files import atomic_write

END_OF_TEXT = "<|endoftext|>"
NAMED = ("cl100k_base", "gpt2")


class Special(str):
    """The name of a special token, as a piece of a sequence. Any other string in a sequence is ordinary text."""

    __slots__ = ()


class Tokenizer:
    """Encodes text as ids and decodes them. The name of a special token in a text is encoded as ordinary text."""

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]):
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.name, self.pattern, self.specials = name, pattern, specials
        self.tokens = sorted(ranks, key=ranks.__getitem__)  # bytes of each ordinary id, in order of id
        self.end_of_text = specials[END_OF_TEXT]
        self.vocab_size = self.encoding.n_vocab  # the largest id + 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as ordinary text. A lone surrogate, which has no UTF-8 form, becomes U+FFFD."""
        return self.encoding.encode_ordinary(text)

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """The ids of a sequence of Specials and texts. Raises UserError on a Special that this tokenizer lacks."""
        missing = [piece for piece in pieces if isinstance(piece, Special) and piece not in self.specials]
        if missing:
            raise UserError(f"tokenizer {self.name}: has no {missing[0]}; use a model trained with --fim_rate")
        return [int(token) for piece in pieces for token in self._encode_piece(piece)]

    def with_specials(self, names: Iterable[str]) -> "Tokenizer":
        """This tokenizer with more special tokens, whose ids follow all others. Those it already has are unchanged."""
        new = [str(name) for name in names if name not in self.specials]
        if not new:
            return self
        specials = self.specials | {name: self.vocab_size + index for index, name in enumerate(new)}
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return Tokenizer(self.name, self.pattern, ranks, specials)

    def encode_documents(
        self, documents: Sequence[Sequence[str]], pool: ThreadPoolExecutor | None = None
    ) -> list[np.ndarray | None]:
        """The ids of each document, uint32, with end-of-text last. A document is a sequence of Specials and texts. The
        result is None where tiktoken's regular expression gives up (a run of a million spaces). The encoder releases
        the interpreter's lock, so the threads of `pool`, if given, run in parallel."""
        return list((pool.map if pool else map)(self._encode_document, documents))

    def _encode_document(self, pieces: Sequence[str]) -> np.ndarray | None:
        try:
            ids = [self._encode_piece(piece) for piece in pieces]
        except ValueError:
            return None
        return np.concatenate([*ids, np.array([self.end_of_text], dtype=np.uint32)])

    def _encode_piece(self, piece: str) -> np.ndarray:
        if isinstance(piece, Special):
            return np.array([self.specials[piece]], dtype=np.uint32)
        return self.encoding.encode_to_numpy(piece, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(ids)

    def undefined_ids(self) -> list[int]:
        """The ids below vocab_size that no token has; cl100k_base has 16 of them."""
        return sorted(set(range(self.vocab_size)) - set(range(len(self.tokens))) - set(self.specials.values()))

    def bytes_per_id(self) -> np.ndarray:
        """The bytes of text that each id stands for, int64 (vocab_size,); 0 for special tokens."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        counts[: len(self.tokens)] = [len(token) for token in self.tokens]
        return counts

    def to_json(self) -> str:
        """The text of the tokenizer's file, with one token per line."""
        head = {"name": self.name, "pattern": self.pattern, "specials": self.specials}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        tokens = ",\n".join(json.dumps(token.decode("latin-1")) for token in self.tokens)
        return "{\n" + "\n".join(lines) + '\n"tokens": [\n' + tokens + "\n]\n}\n"

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the tokenizer's file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str, where: str) -> "Tokenizer":
        """The tokenizer in the `text` of a file. Raises UserError, which names `where`, if the text is not one."""
        try:
            data = json.loads(text)
            ranks = {token.encode("latin-1"): rank for rank, token in enumerate(data["tokens"])}
            if len(ranks) < len(data["tokens"]) or END_OF_TEXT not in data["specials"]:
                raise KeyError
            return cls(data["name"], data["pattern"], ranks, data["specials"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{where}: not a tokenizer file of this project (Hugging Face's tokenizer.json is another format); "
                "make one with prepare.py --tokenizer=train:N"
            ) from None

    def save(self, path: Path) -> None:
        """Write the tokenizer's file, whole or not at all."""
        with atomic_write(path) as file:
            file.write(self.to_json())


class StreamDecoder:
    """Decodes ids one at a time, holding back the bytes of a character that is not yet complete."""

    def __init__(self, tokenizer: Tokenizer):
        self.encoding = tokenizer.encoding
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that are complete with `token`."""
        return self.utf8.decode(self.encoding.decode_single_token_bytes(token))

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an incomplete character, else nothing."""
        return self.utf8.decode(b"", final=True)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `name`: one of NAMED, or the path of a file. Raises UserError if it is missing or damaged."""
    if name not in NAMED:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"tokenizer {name}: no such file; use the bpe.json of shards, or one of {', '.join(NAMED)}")
        return Tokenizer.from_json(path.read_bytes().decode("utf-8", "replace"), name)
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken passes on whatever its HTTP client raises
        raise UserError(
            f"tokenizer {name}: could not be downloaded ({type(error).__name__}); connect once, or copy tiktoken's "
            "cache here and set TIKTOKEN_CACHE_DIR to it, or train your own with --tokenizer=train:4096"
        ) from None
    return Tokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of `vocab_size` ids, end-of-text included, with GPT-4's split pattern.

    A corpus that is too small gives fewer ids and a warning. Raises UserError if `vocab_size` is out of range.
    """
    import rustbpe  # only training needs it

    if not 257 <= vocab_size <= 2**20:
        raise UserError(f"tokenizer of {vocab_size} ids: ask for 257 (the bytes and end-of-text) to 2**20")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + 1 < vocab_size:
        print(
            f"warning: the corpus gave {len(ranks) + 1} ids, not the {vocab_size} asked for; "
            "train on more text or ask for fewer",
            file=sys.stderr,
        )
    return Tokenizer(f"bpe-{len(ranks) + 1}", trainer.get_pattern(), ranks, {END_OF_TEXT: len(ranks)})
