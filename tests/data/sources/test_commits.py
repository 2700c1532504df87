import subprocess
from pathlib import Path

from data.documents import Document, Rejection
from data.sources.commits import Commits


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_commits_become_before_message_and_after(tmp_path):
    git(tmp_path, "init", "-b", "main")
    history = [
        ("first", {"a.py": b"x = 1\n", "b é.py": b"y = 1\n", "c.png": b"1", "d.py": b"\xe9"}),
        ("Second: more\n\nwith a body\n", {"a.py": b"x = 2\n", "c.png": b"2", "d.py": b"\xe8", "new.py": b"z = 1\n"}),
        ("third", {"a.py": b"x = 3\n", "b é.py": b"y = 3" + b" " * 200}),
    ]
    for message, files in history:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-m", message)
    source = Commits(tmp_path, max_bytes=150)
    records = list(source.records(skip=0))
    changes = [
        (r.path.partition("/")[2], *(text for _, text in r.sections)) for r in records if isinstance(r, Document)
    ]
    assert changes == [
        ("a.py", "x = 1\n", "Second: more\n\nwith a body", "x = 2\n"),
        ("a.py", "x = 2\n", "third", "x = 3\n"),
    ]
    assert [record.reason for record in records if isinstance(record, Rejection)] == ["not UTF-8", "too large"]
    assert records[0].language == "Python" and records[0].repo == tmp_path.name
    assert [marker for marker, _ in records[0].sections] == ["<commit_before>", "<commit_msg>", "<commit_after>"]
    for skip in range(1, len(records) + 1):
        assert list(source.records(skip)) == records[skip:]
