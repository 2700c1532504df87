import json
import os
import stat
import tempfile
from pathlib import Path

from data.documents import Document, Input, Rejection, SourceConfig
from data.sources.folders import folder_files, local_files
from data.sources.rows import RowFile

LIMIT = 2**24


def records(inputs: list[Input]) -> list[Document | Rejection]:
    return [record for item in inputs for record in item.records(skip=0)]


def test_a_vendored_copy_belongs_to_the_package_it_copies(tmp_path):
    for name in ("pip/main.py", "pip/_vendor/rich/box.py", "pip/_vendor/six.py", "rich/box.py", "six.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "rich/latin.py").write_bytes(b"# \xe9\n")
    found = records(local_files({tmp_path: ""}, None, LIMIT))
    assert [record.repo for record in found if isinstance(record, Document)] == ["pip", "rich", "rich", "six", "six"]
    assert [record.reason for record in found if isinstance(record, Rejection)] == ["not UTF-8"]


def test_a_giant_package_is_cut_to_a_share_of_its_files_and_others_stay_whole(tmp_path):
    for name, count in (("giant", 1000), ("small", 10)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.py").write_text(f"x = {i:096}")  # 100 bytes
    files = [file for item in local_files({tmp_path: ""}, 20_000, LIMIT) for file in item.files]
    giant, small = (sum(file.repo == name for file in files) for name in ("giant", "small"))
    assert 150 < giant < 250 and small == 10
    assert files == [file for item in local_files({tmp_path: ""}, 20_000, LIMIT) for file in item.files]
    assert sum(len(item.files) for item in local_files({tmp_path: ""}, None, LIMIT)) == 1010


def test_a_folder_gives_its_source_files_and_counts_what_cannot_be_read(tmp_path):
    checkout = tmp_path / "work"
    for name in ("a/main.py", "a/.git/hook.py", "a/node_modules/x.js", "b/lib.rs", "setup.py", "b/picture.png"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("let x = 1;\n")
    (checkout / "a/empty.py").write_bytes(b"")
    (checkout / "a/latin.c").write_bytes(b"// \xe9\n")
    (checkout / "b/loop").symlink_to(checkout)
    (checkout / "b/gone.go").symlink_to(checkout / "nowhere.go")
    os.mkfifo(checkout / "b/pipe.py")
    (checkout / "b/big.sql").write_text("x" * 101)
    found = records(folder_files(checkout, 100))
    documents = [(record.repo, record.path, record.language) for record in found if isinstance(record, Document)]
    assert documents == [
        ("a", "a/empty.py", "Python"),
        ("a", "a/main.py", "Python"),
        ("b", "b/lib.rs", "Rust"),
        ("work", "setup.py", "Python"),
    ]
    rejected = [(record.reason, Path(record.where).name) for record in found if isinstance(record, Rejection)]
    assert sorted(rejected) == [
        ("not UTF-8", "latin.c"),
        ("not a file", "pipe.py"),
        ("symbolic link", "gone.go"),
        ("symbolic link", "loop"),
        ("too large", "big.sql"),
    ]


def test_files_without_permission_are_counted():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        for file in ("a/x.py", "b/y.py", "c/z.py", "rows.jsonl"):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text("x = 1\n")
        for file in ("a/x.py", "b", "rows.jsonl"):
            (folder / file).chmod(0)
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:  # root may read everything, so a child gives up its rights
            if os.geteuid() == 0:
                os.setuid(65534)
            inputs = [*folder_files(folder, 100), RowFile(folder / "rows.jsonl", SourceConfig())]
            os.write(writer, json.dumps([[type(r).__name__, r[0]] for r in records(inputs)]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        found = json.loads(os.read(reader, 10_000))
        (folder / "b").chmod(stat.S_IRWXU)
    assert sorted(found) == [["Document", "x = 1\n"], *[["Rejection", "unreadable"]] * 3]


def test_a_file_that_goes_away_while_it_is_read_is_counted(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    inputs = folder_files(tmp_path, 100)
    (tmp_path / "a.py").unlink()
    gone, kept = records(inputs)
    assert isinstance(gone, Rejection) and gone.reason == "unreadable" and isinstance(kept, Document)
