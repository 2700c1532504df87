import shutil
from pathlib import Path

import numpy as np
import pytest

from data.shards import Shards, TokenStream, tokenizer_file
from runtime.errors import UserError


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards.path, tmp_path / "copy"))


def test_verify_finds_a_flipped_byte(copy):
    Shards(copy).verify()
    path = copy / Shards(copy).entries["train"][1]["file"]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name}: sha256 differs from meta.json; prepare the data again"):
        Shards(copy).verify()


def test_missing_cut_or_foreign_files_are_named(copy):
    shards = Shards(copy)
    first = copy / shards.entries["train"][0]["file"]
    first.write_bytes(first.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{first.name}: damaged, not"):
        shards.split("train")
    first.write_bytes(b"not numpy")
    with pytest.raises(UserError, match=f"{first.name}: damaged, not"):
        shards.split("train")
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: missing"):
        shards.split("train")
    (copy / "bpe.json").write_text("{}")
    with pytest.raises(UserError, match=r"bpe.json: missing, or not the tokenizer of these shards"):
        shards.tokenizer_text()
    (copy / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta.json: damaged"):
        Shards(copy)
    with pytest.raises(UserError, match=r"nowhere/meta.json: not found; prepare the data with"):
        Shards(copy / "nowhere")


def test_shards_made_before_the_tokenizers_file_was_named_bpe_json_are_still_read(copy):
    text = Shards(copy).tokenizer_text()
    (copy / "bpe.json").rename(copy / "tokenizer.json")
    assert tokenizer_file(copy) == copy / "tokenizer.json"
    assert Shards(copy).tokenizer_text() == text
    Shards(copy).verify()
    (copy / "bpe.json").write_text(text)
    (copy / "tokenizer.json").write_text("{}")
    assert tokenizer_file(copy) == copy / "bpe.json"
    assert Shards(copy).tokenizer_text() == text


def test_an_id_beyond_the_vocabulary_is_an_error_not_a_crash_on_the_device():
    stream = TokenStream([np.array([7, 8, 2**31], dtype=np.uint32)], 50, Path("test"))
    rows = np.empty((1, 2), dtype=np.int32)
    stream.read_rows(np.array([0]), rows)
    assert stream.read(0, 2).tolist() == rows[0].tolist() == [7, 8]
    with pytest.raises(UserError, match="holds id 2147483648, the vocabulary ends at 49"):
        stream.read(1, 2)
    with pytest.raises(UserError, match="holds id 2147483648, the vocabulary ends at 49"):
        stream.read_rows(np.array([1]), rows)
