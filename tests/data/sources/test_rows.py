import gzip
import json
import sys
from pathlib import Path

import pytest

from data.documents import Document, Rejection, SourceConfig
from data.sources.rows import RowFile, read_rows
from runtime.errors import UserError

GOOD = {"repo_name": "a/b", "path": "x.py", "content": "x = 1\n", "license": "mit", "stars": 3}
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def records(path: Path, **settings) -> list[Document | Rejection]:
    return list(RowFile(path, SourceConfig(**settings)).records(skip=0))


def test_bad_lines_are_rejected_by_reason_and_nothing_else_is_lost(tmp_path):
    lines = [json.dumps(GOOD), "{", "[1]", json.dumps({**GOOD, "content": 1}), json.dumps({"content": "x"})]
    lines += [json.dumps({**GOOD, "content": "\ud800"}), "", json.dumps({**GOOD, "content": "\x00 <|endoftext|>"})]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = records(path)
    reasons = [record.reason for record in found if isinstance(record, Rejection)]
    assert reasons == ["malformed line"] * 3 + ["no column 'repo_name'", "lone surrogate", "empty"]
    assert found[0] == Document("x = 1\n", "a/b", "x.py", ("mit",), "Python", 3)
    assert found[-1].text == "\x00 <|endoftext|>"


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.zst", ".parquet"])
def test_a_damaged_file_gives_what_can_be_read_and_says_so(suffix, damage, tmp_path):
    path = tmp_path / f"a{suffix}"
    _write(path, [{**GOOD, "content": f"x = {i**9}\n" * 3} for i in range(20_000)])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) * 2 // 3]
    elif damage == "flipped":
        data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    else:
        data = bytearray(b"nothing of the kind\n" * 10)
    path.write_bytes(data)
    found = records(path)
    reasons = [record.reason for record in found if isinstance(record, Rejection)]
    assert reasons[-1] == "file breaks off" or (damage == "foreign" and set(reasons) == {"malformed line"})
    if damage == "flipped" and suffix == ".json.gz":
        return  # gzip's checksum comes last: until then, what the flipped bytes became looks like text
    assert reasons in (["file breaks off"], ["malformed line", "file breaks off"])
    documents = [record for record in found if isinstance(record, Document)]
    assert all(d.text == f"x = {i**9}\n" * 3 for i, d in enumerate(documents))
    assert len(documents) > 5000 or damage == "foreign" or suffix == ".parquet"


def test_a_line_or_document_that_is_too_large_is_counted_and_the_next_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    long = json.dumps({**GOOD, "content": "x" * 50_000_000})
    path.write_text(
        "\n".join([json.dumps(GOOD), long, json.dumps({**GOOD, "content": "y" * 20_000_000}), json.dumps(GOOD)])
    )
    found = records(path)
    assert [record.reason for record in found if isinstance(record, Rejection)] == ["too large", "too large"]
    assert len(found) == 4 and found[0] == found[3] == Document("x = 1\n", "a/b", "x.py", ("mit",), "Python", 3)


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".json.zst", ".parquet"])
def test_every_format_gives_the_same_documents_after_any_skip(suffix, tmp_path):
    rows = [
        {"content": f"x = {i}\n", "max_stars_repo_name": f"u/{i}", "max_stars_repo_path": f"{i}.go"} for i in range(200)
    ]
    rows = [{**row, "max_stars_repo_licenses": ["MIT", "ISC"], "max_stars_count": 7.0} for row in rows]
    _write(tmp_path / f"a{suffix}", rows)
    file = RowFile(tmp_path / f"a{suffix}", SourceConfig())
    found = list(file.records(skip=0))
    assert found == [Document(f"x = {i}\n", f"u/{i}", f"{i}.go", ("MIT", "ISC"), "Go", 7) for i in range(200)]
    for skip in (1, 64, 199, 200):
        assert list(file.records(skip)) == found[skip:]


def test_columns_are_settings_and_rows_without_repository_stand_for_themselves(tmp_path):
    _write(
        tmp_path / "a.jsonl", [{"body": "x", "lang": "Lua"}, {"body": "y", "lang": None}, {"body": "x", "name": "f.rb"}]
    )
    found = records(tmp_path / "a.jsonl", text_column="body", repo_column=None, path_column="name", language="Python")
    assert [record.language for record in found] == ["Lua", "Python", "Ruby"]
    assert found[0].repo == found[2].repo != found[1].repo


def test_problem_files_are_read_whole_or_refused(tmp_path):
    _write(tmp_path / "a.parquet", [GOOD])
    assert read_rows(tmp_path / "a.parquet") == [GOOD]
    (tmp_path / "b.jsonl").write_text("{}\n[]\n")
    with pytest.raises(UserError, match=r"b.jsonl, row 2: not a JSON object"):
        read_rows(tmp_path / "b.jsonl")


def _write(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
