import json

from small_corpus import (
    prepared,
    python_documents,
    texts_of,
)

from data.pipeline.split import split_of
from data.tokenizer import load_tokenizer


def test_redaction_and_tokenizer_comparison_are_reported(corpus, tmp_path):
    shards = prepared(corpus, tmp_path / "x", "--redact", "--tokenizer=train:600")
    report = json.loads((shards.path / "report.json").read_text())
    assert report["redacted"]["email"] > 10
    assert "<EMAIL>" in "".join(texts_of(shards, "train") + texts_of(shards, "val"))
    held_out = [row["content"] for row in python_documents() if split_of(row["repo_name"], 0, 0.3) == "val"]
    n_bytes = sum(len(text.encode()) for text in held_out)
    tokenizers = report["tokenizers"]
    assert next(iter(tokenizers)) == "bpe-600"
    for name, bytes_per_token in tokenizers.items():  # cl100k_base too, where its vocabulary can be loaded
        tokenizer = load_tokenizer(str(shards.path / "bpe.json") if name == "bpe-600" else name)
        n_tokens = sum(len(tokenizer.encode(text)) for text in held_out)
        assert bytes_per_token == round(n_bytes / n_tokens, 4)
