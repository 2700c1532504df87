import json

from small_corpus import (
    prepared,
    texts_of,
)


def test_redaction_and_tokenizer_comparison_are_reported(corpus, tmp_path):
    shards = prepared(corpus, tmp_path / "x", "--redact", "--tokenizer=train:600")
    report = json.loads((shards.path / "report.json").read_text())
    assert report["redacted"]["email"] > 10
    assert "<EMAIL>" in "".join(texts_of(shards, "train") + texts_of(shards, "val"))
    assert 1.5 < report["tokenizers"]["bpe-600"] < report["tokenizers"].get("cl100k_base", 9)
