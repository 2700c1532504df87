import shutil
from pathlib import Path

import numpy as np
import pytest

from data.shards import Shards, TokenStream


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards.path, tmp_path / "copy"))


def test_verify_finds_a_flipped_byte(copy):
    Shards(copy).verify()
    path = copy / Shards(copy).entries["train"][1]["file"]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name}: sha256 differs from meta.json; prepare the data again"):
        Shards(copy).verify()


def test_missing_cut_or_foreign_files_are_named(copy):
    shards = Shards(copy)
    first, second = (copy / entry["file"] for entry in shards.entries["train"][:2])
    first.write_bytes(first.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{first.name}: damaged, not"):
        shards.split("train")
    first.write_bytes(b"not numpy")
    with pytest.raises(ValueError, match=f"{first.name}: damaged, not"):
        shards.split("train")
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name}: missing"):
        shards.split("train")
    (copy / "bpe.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bpe.json: missing, or not the tokenizer of these shards"):
        shards.tokenizer_text()
    (copy / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta.json: damaged"):
        Shards(copy)
    with pytest.raises(ValueError, match=r"nowhere/meta.json: not found; prepare the data with"):
        Shards(copy / "nowhere")
    assert second.exists()


def test_an_id_beyond_the_vocabulary_is_an_error_not_a_crash_on_the_device():
    with pytest.raises(ValueError, match="holds id 99, the vocabulary ends at 49"):
        TokenStream([np.arange(100, dtype=np.uint16)], 50, Path("test")).read(90, 10)
