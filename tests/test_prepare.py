import gzip
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from small_corpus import (
    arguments,
    digests,
    python_documents,
    texts_of,
    write_json_gz,
)

from data.pipeline import assemble_shards, work_units
from data.pipeline.split import split_of
from data.shards import SPLITS
from prepare import PrepareConfig, prepare
from runtime.config import load_config
from runtime.errors import UserError

ROOT = Path(__file__).parent.parent


def test_decoded_shards_equal_the_documents_in_order_with_end_of_text_between(shards):
    for split in SPLITS:
        expected = [row["content"] for row in python_documents() if split_of(row["repo_name"], 0, 0.3) == split]
        assert texts_of(shards, split) == expected
        total = shards.meta["splits"][split]
        assert total["documents"] == len(expected) and total["tokens"] == len(shards.split(split))
        assert total["bytes"] == sum(len(text.encode()) for text in expected)
        assert len(shards.entries[split]) > 1
        assert np.load(shards.path / shards.entries[split][0]["file"]).dtype == np.uint16


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, limit_s: float = 60) -> None:
    """Returns when the condition holds or the process has ended; kills the process and fails after `limit_s`."""
    end = time.monotonic() + limit_s
    while process.poll() is None and not condition():
        if time.monotonic() > end:
            process.kill()
            pytest.fail(f"nothing happened in {limit_s} s")
        time.sleep(0.01)


def test_killed_anywhere_and_run_again_gives_the_same_bytes(corpus, shards, tmp_path):
    command = [sys.executable, "prepare.py", *arguments(corpus, tmp_path / "stdlib")]
    chance = random.Random(0)
    codes = []
    while len(codes) < 4 and not (tmp_path / "stdlib").exists():
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: (tmp_path / "stdlib.partial" / "bpe.json").exists(), process)
        time.sleep(chance.uniform(0.0, 0.2) + (0.3 if codes else 0.0))  # it starts in about 0.3 s
        process.send_signal(signal.SIGKILL)
        codes.append(process.wait(timeout=60))
    assert set(codes) <= {0, -signal.SIGKILL} and -signal.SIGKILL in codes
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    assert digests(tmp_path / "stdlib") == digests(shards.path)
    assert not (tmp_path / "stdlib.partial").exists()


@pytest.mark.parametrize("moment", ["unit", "shard", "meta.json", "rename", "cleaning up"])
def test_stopped_at_a_given_moment_it_loses_nothing_that_was_done(moment, corpus, shards, tmp_path, monkeypatch):
    import prepare as prepare_module

    def die_before(module, name, condition):
        function = getattr(module, name)

        def wrapped(*arguments, **keywords):
            if condition(*arguments):
                raise KeyboardInterrupt
            return function(*arguments, **keywords)

        patch.setattr(module, name, wrapped)

    config = load_config(PrepareConfig, arguments(corpus, tmp_path / "stdlib", "--workers=1"))
    work = tmp_path / "stdlib.partial"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "unit":
            die_before(work_units, "_write", lambda _, name, *__: name == "00001_00001")
        elif moment == "shard":
            die_before(assemble_shards, "write_shard", lambda path, *_: path.name == "train_00001.npy")
        elif moment == "meta.json":
            die_before(prepare_module, "write_json", lambda path, _: path.stem == "meta")
        elif moment == "rename":
            die_before(os, "replace", lambda source, _: str(source).endswith(".partial"))
        else:
            die_before(prepare_module, "_remove_leftovers", lambda path: True)
        prepare(config)
    done = [path for path in work.rglob("*") if path.suffix in (".json", ".npy") and path.name != "report.json"]
    times = {path.name: path.stat().st_mtime_ns for path in done}
    assert (tmp_path / "stdlib").exists() == (moment == "cleaning up") == (not done)
    time.sleep(0.01)
    prepare(config)
    assert digests(tmp_path / "stdlib") == digests(shards.path)
    again = [path for path in (tmp_path / "stdlib").iterdir() if path.name in times]
    assert all(path.stat().st_mtime_ns == times[path.name] for path in again if path.name != "meta.json")


def test_two_preparations_of_one_name_wait_for_each_other(corpus, shards, tmp_path):
    command = [sys.executable, "prepare.py", *arguments(corpus, tmp_path / "stdlib")]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    try:
        outputs = [process.communicate(timeout=100)[0].decode() for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    assert digests(tmp_path / "stdlib") == digests(shards.path)


def test_after_a_mistake_is_corrected_the_same_name_can_be_prepared(corpus, tmp_path, run_program):
    wrong = arguments(corpus, tmp_path / "x", "--tokenizer=missing.json")
    assert run_program(prepare, PrepareConfig, *wrong)[0] == 2 and not list(tmp_path.iterdir())
    assert run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"))[0] == 0
    (tmp_path / "y").mkdir()
    exit_code, _, err = run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "y"))
    assert exit_code == 2 and "exists already, but holds no shards" in err


def stop_at(module: ModuleType, name: str, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepares until the function `name` of `module` is called."""

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, die)
        prepare(config)


def test_a_half_made_folder_with_the_tokenizers_former_file_name_is_continued(corpus, shards, tmp_path, monkeypatch):
    config = load_config(PrepareConfig, arguments(corpus, tmp_path / "x", "--workers=1"))
    stop_at(assemble_shards, "write_shard", config, monkeypatch)
    work = tmp_path / "x.partial"
    (work / "bpe.json").rename(work / "tokenizer.json")

    def fail(*arguments):
        raise AssertionError("a unit was made again")

    monkeypatch.setattr(work_units, "_write", fail)
    prepare(config)
    (tmp_path / "x" / "tokenizer.json").rename(tmp_path / "x" / "bpe.json")
    assert digests(tmp_path / "x") == digests(shards.path)


def test_a_source_that_changed_under_a_killed_run_is_noticed(corpus, tmp_path, monkeypatch):
    import prepare as module

    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    config = load_config(PrepareConfig, arguments(folder, tmp_path / "x"))
    stop_at(module, "_publish", config, monkeypatch)
    with gzip.open(folder / "file-000000000001.json.gz", "a") as file:
        file.write(b"{}\n")
    with pytest.raises(UserError, match="the source's files have changed since it was begun"):
        prepare(config)


def test_prepared_shards_are_left_alone_and_other_settings_refused(corpus, shards, tmp_path, run_program):
    before = digests(shards.path)
    exit_code, out, _ = run_program(prepare, PrepareConfig, *arguments(corpus, shards.path))
    assert exit_code == 0 and "prepared already" in out
    exit_code, _, err = run_program(prepare, PrepareConfig, *arguments(corpus, shards.path, "--seed=1"))
    assert exit_code == 2 and "made with other settings: seed was 0, is 1" in err and err.count("\n") == 1
    assert run_program(prepare, PrepareConfig, f"--name={shards.path}", "--verify")[0] == 0
    assert digests(shards.path) == before


def test_a_disk_too_small_is_said_before_anything_is_done(corpus, tmp_path, run_program, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    exit_code, out, err = run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"))
    assert exit_code == 2 and "GB of disk, 0.00 GB are free; free some" in err.splitlines()[-1]
    assert "needs about 0.0" in out and not list(tmp_path.iterdir())


ROW = {"repo_name": "a/b", "content": "x = 1\n"}


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], [], "0 documents for training, 0 for validation, dropped: none"),
        ([ROW], [], "each split needs one: fix what was dropped, add repositories, change --val_fraction"),
        ([ROW], ["--tokenizer=train:many"], "wants a number of ids"),
        ([ROW], ["--tokenizer=missing.json"], "missing.json: no such file"),
        ([ROW], ["--val_fraction=1"], "val_fraction is 1.0"),
        ([ROW], ["--val_files=*54*"], "--val_files=*54*: matches none of 1 inputs"),
        ([ROW], ["--filters=tidy"], "--filters: unknown 'tidy'"),
        ([ROW], ["--language_weights=Python:2"], "'Python:2' is not LANGUAGE=NUMBER"),
        ([ROW], ["--split_by=user"], "split_by is 'user'; it must be repo or file"),
        ([ROW], ["--decontaminate=missing.jsonl"], "--decontaminate=missing.jsonl: no such file"),
        ([ROW], ["--opt_out=missing.txt"], "missing.txt"),
        ([ROW], ["--part=0/4"], "--part=0/4: wants I/N with I in 1 .. N"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_shards(rows, more, message, tmp_path, run_program):
    write_json_gz(tmp_path / "a.json.gz", rows)
    exit_code, _, err = run_program(prepare, PrepareConfig, *arguments(tmp_path, tmp_path / "out", *more))
    assert exit_code == 2
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json.gz"]
