import json
import os
import random
import shutil
import signal

import pytest
from small_corpus import (
    arguments,
    digests,
    prepared,
    python_documents,
    texts_of,
    write_json_gz,
)

from data.pipeline import work_units
from data.shards import Shards
from prepare import PrepareConfig, prepare
from runtime.config import load_config


def test_the_number_of_workers_and_parts_does_not_change_a_byte(tmp_path, corpus):
    rows = python_documents() * 2
    random.Random(0).shuffle(rows)  # copies in other files, units and parts
    for index in range(5):
        write_json_gz(tmp_path / f"{index}.json.gz", rows[index * len(rows) // 5 : (index + 1) * len(rows) // 5])
    settings = ("--near_threshold=0.7", "--fim_rate=0.5", "--max_tokens=800_000")
    alone = prepared(tmp_path, tmp_path / "alone", "--workers=1", *settings)
    prepared(tmp_path, tmp_path / "three", "--workers=3", *settings)
    assert digests(tmp_path / "three") == digests(alone.path)
    assert alone.meta["rejected"]["exact duplicate"] > 0
    for part in (2, 1):
        prepare(load_config(PrepareConfig, arguments(tmp_path, tmp_path / "parts", f"--part={part}/2", *settings)))
    shutil.move(tmp_path / "0.json.gz", tmp_path / "away")  # joining needs the parts alone
    prepared(tmp_path, tmp_path / "parts", "--merge=2", *settings)
    assert digests(tmp_path / "parts") == digests(alone.path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["alone", "parts", "three"]


def test_a_worker_that_is_killed_ends_the_run_in_one_line_and_nothing_is_lost(corpus, shards, tmp_path, monkeypatch):
    config = load_config(PrepareConfig, arguments(corpus, tmp_path / "stdlib", "--workers=2"))
    write = work_units._write

    def die(work, name, *arguments):
        if name == "00001_00001":
            os.kill(os.getpid(), signal.SIGKILL)
        write(work, name, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="a worker ended with exit code -9; if memory"):
        patch.setattr(work_units, "_write", die)
        prepare(config)
    prepare(config)
    assert digests(tmp_path / "stdlib") == digests(shards.path)


def test_thousands_of_inputs_are_shared_out(tmp_path):
    row = {"repo_name": "u/0", "path": "x.py"}
    for number in range(4000):
        text = f"{number} = x\n"
        (tmp_path / f"{number:04d}.json").write_text(json.dumps({**row, "repo_name": f"u/{number}", "content": text}))
    settings = [f"--name={tmp_path}/out", f"--source=files:{tmp_path}/*.json", "--tokenizer=train:257", "--workers=2"]
    prepare(load_config(PrepareConfig, settings))
    shards = Shards(tmp_path / "out")
    assert sorted(texts_of(shards, "train") + texts_of(shards, "val")) == sorted(f"{i} = x\n" for i in range(4000))
