import json

import pytest
from small_corpus import (
    prepared,
    python_documents,
    texts_of,
    write_json_gz,
)

from data.pipeline.split import split_of
from data.shards import SPLITS
from data.tokenizer import load_tokenizer
from runtime.errors import UserError


def test_languages_are_weighed_counted_and_validated_apart(tmp_path):
    names = {"Python": "py", "Go": "go", "C#": "cs"}
    rows = [
        {"content": f"{name} {i}\n", "repo_name": f"u/{name}{i}", "path": f"x.{extension}"}
        for name, extension in names.items()
        for i in range(200)
    ]
    write_json_gz(tmp_path / "a.json.gz", rows)
    shards = prepared(tmp_path, tmp_path / "out", "--language_weights=Python=2.5,Go=0.5")
    train = texts_of(shards, "train")
    count = {name: sum(text.startswith(name) for text in train) for name in names}
    val = {name: texts_of(shards, "val", name) for name in names}
    assert all(texts and all(text.startswith(name) for text in texts) for name, texts in val.items())
    assert sum(map(len, val.values())) == len(texts_of(shards, "val"))
    with pytest.raises(UserError, match=r"no val shards of 'Pyhton'; there are C#, Go, Python"):
        shards.split("val", "Pyhton")
    n_train = {name: 200 - len(val[name]) for name in names}
    assert 2.3 * n_train["Python"] < count["Python"] < 2.7 * n_train["Python"] and count["C#"] == n_train["C#"]
    assert 50 < count["Go"] < 90 and shards.meta["rejected"]["language weight"] == n_train["Go"] - count["Go"] > 50
    assert all(train.count(text) in (2, 3) for text in train if text.startswith("Python"))
    report = json.loads((shards.path / "report.json").read_text())
    assert report["languages"]["C#"]["kept"]["documents"] == 200
    assert report["languages"]["Python"]["kept"]["documents"] == count["Python"] + len(val["Python"])
    assert {entry["file"] for entry in shards.entries["val"]} == {
        *("val_Python_00000.npy", "val_Go_00000.npy", "val_C-sharp_00000.npy")
    }


def test_max_tokens_stops_at_the_document_that_reaches_it(corpus, tmp_path):
    shards = prepared(corpus, tmp_path / "some", "--max_tokens=300_000")
    assert shards.meta["rejected"] == {"beyond max_tokens": shards.meta["rejected"]["beyond max_tokens"]}
    tokenizer = load_tokenizer(str(shards.path / "bpe.json"))
    kept = {split: texts_of(shards, split) for split in SPLITS}
    n_kept = sum(map(len, kept.values()))
    documents = [row for row in python_documents()[: n_kept + 1]]
    for split in SPLITS:  # the first ones, and no other
        assert kept[split] == [d["content"] for d in documents[:n_kept] if split_of(d["repo_name"], 0, 0.3) == split]
    last = len(tokenizer.encode(documents[n_kept - 1]["content"])) + 1
    total = sum(shards.meta["splits"][split]["tokens"] for split in SPLITS)
    assert total - last < 300_000 <= total
