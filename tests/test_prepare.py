import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARD_SETTINGS, python_documents, write_json_gz

from config import load_config
from data.prepare import PrepareConfig, prepare, split_of
from dataloader import SPLITS, Shards
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


def arguments(corpus: Path, path: Path, *more: str) -> list[str]:
    return [f"--name={path}", f"--source=files:{corpus}/*.gz", *SHARD_SETTINGS, *more]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_decoded_shards_equal_the_documents_in_order_with_end_of_text_between(shards):
    tokenizer = load_tokenizer(str(shards.path / "tokenizer.json"))
    for split in SPLITS:
        expected = [row["content"] for row in python_documents() if split_of(row["repo_name"], 0, 0.3) == split]
        stream = shards.split(split)
        tokens = stream.read(0, len(stream))
        assert tokens[-1] == tokenizer.end_of_text
        ends = np.flatnonzero(tokens == tokenizer.end_of_text)
        decoded = [tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
        assert decoded == [text + "<|endoftext|>" for text in expected]
        total = shards.meta["splits"][split]
        assert total["documents"] == len(expected) and total["tokens"] == len(stream)
        assert total["bytes"] == sum(len(text.encode()) for text in expected)
        assert (
            len(shards.entries[split]) > 1
            and np.load(shards.path / shards.entries[split][0]["file"]).dtype == np.uint16
        )


def test_train_and_validation_share_no_repository_and_meet_the_fraction():
    repos = [f"user{i}/repo" for i in range(10_000)]
    in_val = sum(split_of(repo, 0, 0.1) == "val" for repo in repos)
    assert 900 < in_val < 1100  # and split_of sees the repository alone, so a repository is on one side as a whole
    assert {split_of(repo, 1, 0.1) for repo in repos if split_of(repo, 0, 0.1) == "val"} == {"train", "val"}


def test_killed_anywhere_and_run_again_gives_the_same_bytes(corpus, shards, tmp_path):
    command = [sys.executable, "-m", "data.prepare", *arguments(corpus, tmp_path / "stdlib")]
    chance, kills = random.Random(0), 0
    while kills < 3 and not (tmp_path / "stdlib").exists():
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "stdlib.partial").exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.3) + (1.0 if kills else 0.0))  # a second to start, once the folder is there
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert digests(tmp_path / "stdlib") == digests(shards.path)
    assert not (tmp_path / "stdlib.partial").exists()


def test_a_continued_run_does_not_redo_finished_shards(corpus, shards, tmp_path, monkeypatch):
    from data import prepare as module

    def die_at_third(path, tokens, vocab_size, write=module.write_shard):
        if path.name == shards.entries["train"][2]["file"]:
            raise KeyboardInterrupt
        return write(path, tokens, vocab_size)

    config = load_config(PrepareConfig, arguments(corpus, tmp_path / "stdlib"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_shard", die_at_third)
        prepare(config)
    names = [entry["file"] for entry in shards.entries["train"][:2]]
    finished = {name: (tmp_path / "stdlib.partial" / name).stat().st_mtime_ns for name in names}
    assert not (tmp_path / "stdlib").exists()
    time.sleep(0.01)
    prepare(config)
    assert all((tmp_path / "stdlib" / name).stat().st_mtime_ns == t for name, t in finished.items())
    assert Shards(tmp_path / "stdlib").fingerprint() == shards.fingerprint()


@pytest.mark.parametrize("moment", ["last unit noted", "meta.json written", "folder named"])
def test_killed_while_publishing_loses_nothing(moment, corpus, shards, tmp_path, monkeypatch):
    from data import prepare as module

    def die_before(function, condition):
        def wrapped(*args):
            if condition(*args):
                raise KeyboardInterrupt
            return function(*args)

        return wrapped

    config = load_config(PrepareConfig, arguments(corpus, tmp_path / "stdlib"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "last unit noted":
            patch.setattr(module, "_write_json", die_before(module._write_json, lambda path, _: path.stem == "meta"))
        elif moment == "meta.json written":
            patch.setattr(os, "replace", die_before(os.replace, lambda source, _: str(source).endswith(".partial")))
        else:
            patch.setattr(module, "_remove_notes", die_before(module._remove_notes, lambda path: True))
        prepare(config)
    assert (tmp_path / "stdlib").exists() == (moment == "folder named")
    prepare(config)
    assert digests(tmp_path / "stdlib") == digests(shards.path)


def test_a_mistake_mended_is_not_held_against_the_user(corpus, tmp_path, run_program):
    wrong = arguments(corpus, tmp_path / "x", "--tokenizer=missing.json")
    assert run_program(prepare, PrepareConfig, *wrong)[0] == 2 and not list(tmp_path.iterdir())
    assert run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"))[0] == 0
    (tmp_path / "y").mkdir()
    code, _, err = run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "y"))
    assert code == 2 and "is there already, and holds no shards" in err


def test_a_source_that_changed_under_a_killed_run_is_noticed(corpus, tmp_path, monkeypatch):
    from data import prepare as module

    def die(*args):
        raise KeyboardInterrupt

    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    config = load_config(PrepareConfig, arguments(folder, tmp_path / "x"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_write_units", die)
        prepare(config)
    (folder / "file-000000000001.json.gz").touch()
    with pytest.raises(ValueError, match="the source's files have changed since it was begun"):
        prepare(config)


def test_a_document_that_defeats_the_tokenizer_is_skipped(tmp_path):
    rows = [{"repo_name": f"r/{i}", "content": "x = 1\n" * 50, "path": "a.py"} for i in range(20)]
    rows.insert(3, {"repo_name": "r/x", "content": " " * 1_000_000, "path": "spaces.py"})
    rows[3]["content"] += "x"
    write_json_gz(tmp_path / "a.json.gz", rows)
    meta = prepare(load_config(PrepareConfig, arguments(tmp_path, tmp_path / "x", "--tokenizer_sample_bytes=100")))
    assert meta["rejected"] == {"cannot be tokenized": 1}
    assert sum(meta["splits"][split]["documents"] for split in SPLITS) == 20


def test_max_tokens_stops_at_the_document_that_reaches_it(corpus, tmp_path):
    meta = prepare(load_config(PrepareConfig, arguments(corpus, tmp_path / "some", "--max_tokens=300_000")))
    total = sum(meta["splits"][split]["tokens"] for split in SPLITS)
    assert 300_000 <= total < 350_000


def test_prepared_shards_are_left_alone_and_other_settings_refused(corpus, shards, tmp_path, run_program):
    before = digests(shards.path)
    code, out, _ = run_program(prepare, PrepareConfig, *arguments(corpus, shards.path))
    assert code == 0 and "prepared already" in out
    code, _, err = run_program(prepare, PrepareConfig, *arguments(corpus, shards.path, "--seed=1"))
    assert code == 2 and "made with other settings: seed was 0, is 1" in err and err.count("\n") == 1
    assert run_program(prepare, PrepareConfig, f"--name={shards.path}", "--verify")[0] == 0
    assert digests(shards.path) == before


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], [], "0 documents for training, 0 for validation, skipped: none"),
        (
            [{"repo_name": "a/b", "content": "x = 1\n"}],
            [],
            "each split needs one: mend what was skipped, add repositories or change --val_fraction",
        ),
        ([{"repo_name": "a/b", "content": "x = 1\n"}], ["--tokenizer=train:many"], "wants a number of ids"),
        ([{"repo_name": "a/b", "content": "x = 1\n"}], ["--tokenizer=missing.json"], "missing.json: no such file"),
        ([{"repo_name": "a/b", "content": "x = 1\n"}], ["--val_fraction=1"], "val_fraction is 1.0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_shards(rows, more, message, tmp_path, run_program):
    write_json_gz(tmp_path / "a.json.gz", rows)
    code, _, err = run_program(prepare, PrepareConfig, *arguments(tmp_path, tmp_path / "out", *more))
    assert code == 2
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()
