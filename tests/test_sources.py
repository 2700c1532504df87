import gzip
import json

import pytest

from data.sources import Document, JsonLinesSource, LocalSource, Rejection, open_source


def test_local_source_reads_this_pythons_standard_library_and_packages():
    source = open_source("local")
    repos = {repo for repo, *_ in source.files}
    assert {"python/json", "torch", "numpy"} <= repos
    document = next(record for record in source.records(skip=0) if isinstance(record, Document))
    assert document.text == source.files[0][2].read_text(encoding="utf-8")


def test_a_vendored_copy_belongs_to_the_package_it_copies(tmp_path):
    for name in ("pip/main.py", "pip/_vendor/rich/box.py", "pip/_vendor/six.py", "rich/box.py", "six.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "rich/latin.py").write_bytes(b"# \xe9\n")
    records = list(LocalSource({tmp_path: ""}).records(skip=0))
    assert [record.repo for record in records if isinstance(record, Document)] == ["pip", "rich", "rich", "six", "six"]
    assert [record.reason for record in records if isinstance(record, Rejection)] == ["not UTF-8"]


def test_a_giant_package_is_cut_to_a_share_of_its_files_and_others_stay_whole(tmp_path):
    for name, count in (("giant", 1000), ("small", 10)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.py").write_text(f"x = {i:096}")  # 100 bytes
    files = [file[:2] for file in LocalSource({tmp_path: ""}, package_bytes=20_000).files]
    giant, small = (sum(repo == name for repo, _ in files) for name in ("giant", "small"))
    assert 150 < giant < 250 and small == 10
    assert files == [file[:2] for file in LocalSource({tmp_path: ""}, package_bytes=20_000).files]
    assert len(LocalSource({tmp_path: ""}).files) == 1010


def test_bad_lines_are_rejected_by_reason_and_nothing_else_is_lost(tmp_path):
    good = {"repo_name": "a/b", "path": "x.py", "content": "x = 1\n", "license": "mit", "stars": 3}
    lines = [json.dumps(good), "{", "[1]", json.dumps({**good, "content": None}), json.dumps({"content": "x"})]
    lines += [json.dumps({**good, "content": "\ud800"}), "", json.dumps({**good, "content": "\x00 <|endoftext|>"})]
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write("\n".join(lines))
    whole = (tmp_path / "a.json.gz").read_bytes()
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"\n".join([json.dumps(good).encode()] * 9999))[:-20])
    (tmp_path / "c.json.gz").write_bytes(b"no gzip")
    (tmp_path / "d.json.gz").write_bytes(whole)
    records = list(JsonLinesSource(f"{tmp_path}/*.json.gz").records(skip=0))
    reasons = [record.reason for record in records if isinstance(record, Rejection)]
    of_one_file = ["malformed line"] * 3 + ["no column 'repo_name'", "lone surrogate", "empty"]
    assert reasons == [*of_one_file, "file breaks off", "file breaks off", *of_one_file]
    documents = [record for record in records if isinstance(record, Document)]
    assert documents[0] == documents[-2] == Document("x = 1\n", "a/b", "x.py", "mit")
    assert documents[1].text == documents[-1].text == "\x00 <|endoftext|>"
    assert len(documents) > 9000


def test_records_can_be_read_from_any_place_on(corpus):
    source = JsonLinesSource(f"{corpus}/*.gz")
    records = list(source.records(skip=0))
    for skip in (1, len(records) // 2, len(records) - 1, len(records)):
        assert list(source.records(skip=skip)) == records[skip:]


def test_unknown_sources_and_empty_globs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--source=hub: unknown; use local, or files:GLOB"):
        open_source("hub")
    with pytest.raises(ValueError, match="no file matches; check the path, and quote the pattern"):
        open_source(f"files:{tmp_path}/*.gz")
