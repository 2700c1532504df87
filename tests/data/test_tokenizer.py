import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rustbpe
import tiktoken
from small_corpus import python_documents

from data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, train_tokenizer
from runtime.errors import UserError

needs_cl100k = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR does not name a folder with cl100k_base"
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["content"] for row in python_documents()]


@pytest.fixture(scope="module")
def tokenizer(texts) -> Tokenizer:
    return train_tokenizer(texts, 1024)


def test_trained_merges_encode_through_tiktoken_as_in_the_trainer(texts, tokenizer):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), 1023)
    assert tokenizer.vocab_size == 1024
    for text in [*texts, "naïve 日本語 🐍\r\n\t\x00", " " * 5000]:
        ids = tokenizer.encode(text)
        assert ids == trainer.encode(text)
        assert tokenizer.decode(ids) == text


def test_text_is_ordinary_text_and_documents_end_with_end_of_text(tokenizer):
    text = "print('<|endoftext|>')"
    assert tokenizer.end_of_text not in tokenizer.encode(text)
    with ThreadPoolExecutor(2) as pool:
        (ids,) = tokenizer.encode_documents([[text]], pool)
    assert ids.dtype == np.uint32
    assert ids.tolist() == [*tokenizer.encode(text), tokenizer.end_of_text]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_a_saved_tokenizer_is_the_same_tokenizer(texts, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "bpe.json")
    loaded = load_tokenizer(str(tmp_path / "bpe.json"))
    assert loaded.sha256 == tokenizer.sha256
    assert all(loaded.encode(text) == tokenizer.encode(text) for text in texts[:50])
    assert '" self"' in (tmp_path / "bpe.json").read_text()


def test_too_small_a_corpus_says_how_many_ids_it_gave(capsys):
    tokenizer = train_tokenizer(["x = 1\n" * 10], 4096)
    assert f"gave {tokenizer.vocab_size} ids, not the 4096 asked for" in capsys.readouterr().err
    assert tokenizer.decode(tokenizer.encode("é = x")) == "é = x"


def test_streaming_never_yields_half_a_character(tokenizer):
    text = "s = '日本語 🐍 naïve'"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    decoder.push(tokenizer.encode("é")[0])
    assert decoder.flush() == "\ufffd"


def test_bytes_per_id_add_up_to_the_text(texts, tokenizer):
    counts = tokenizer.bytes_per_id()
    assert counts[tokenizer.end_of_text] == 0
    assert all(counts[tokenizer.encode(text)].sum() == len(text.encode()) for text in texts[:50])


@needs_cl100k
def test_cl100k_base_survives_its_file(tmp_path, texts):
    tokenizer = load_tokenizer("cl100k_base")
    assert tokenizer.vocab_size == 100_277
    assert tokenizer.undefined_ids() == [100_256, *range(100_261, 100_276)]
    tokenizer.save(tmp_path / "bpe.json")
    loaded = load_tokenizer(str(tmp_path / "bpe.json"))
    original = tiktoken.get_encoding("cl100k_base")
    assert all(loaded.encode(text) == original.encode_ordinary(text) for text in texts[:50])


def test_no_network_is_an_error_that_says_how_to_go_on(monkeypatch):
    def unreachable(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(UserError, match=r"could not be downloaded.*TIKTOKEN_CACHE_DIR.*--tokenizer=train:4096"):
        load_tokenizer("cl100k_base")


@pytest.mark.parametrize("content", ["", "{}", '{"tokens": ["a", "a"]}', "[1]", "\xff\x00"])
def test_what_is_no_tokenizer_file_is_refused(content, tmp_path):
    path = tmp_path / "bpe.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="not a tokenizer file"):
        load_tokenizer(str(path))
