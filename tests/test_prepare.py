import bisect
import gzip
import hashlib
import json
import os
import random
import re
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
from data.prepare import PrepareConfig, prepare
from data.refine import split_of
from shards import SPLITS, Shards
from tokenizer import END_OF_TEXT, load_tokenizer

ROOT = Path(__file__).parent.parent


def arguments(corpus: Path, path: Path, *more: str) -> list[str]:
    return [f"--name={path}", f"--source=files:{corpus}/*.gz", *SHARD_SETTINGS, *more]


def prepared(corpus: Path, path: Path, *more: str) -> Shards:
    prepare(load_config(PrepareConfig, arguments(corpus, path, *more)))
    return Shards(path)


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the report, which tells seconds."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    return {name: digest for name, digest in files.items() if name != "report.json"}


def texts_of(shards: Shards, split: str, language: str | None = None) -> list[str]:
    """The documents of a split, decoded."""
    tokenizer = load_tokenizer(str(shards.path / "tokenizer.json"))
    stream = shards.split(split, language)
    tokens = stream.read(0, len(stream))
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text) + 1)
    assert len(parts[-1]) == 0, "the last document ends with end-of-text"
    return [tokenizer.decode(part).removesuffix(END_OF_TEXT) for part in parts[:-1]]


def test_decoded_shards_equal_the_documents_in_order_with_end_of_text_between(shards):
    for split in SPLITS:
        expected = [row["content"] for row in python_documents() if split_of(row["repo_name"], 0, 0.3) == split]
        assert texts_of(shards, split) == expected
        total = shards.meta["splits"][split]
        assert total["documents"] == len(expected) and total["tokens"] == len(shards.split(split))
        assert total["bytes"] == sum(len(text.encode()) for text in expected)
        assert len(shards.entries[split]) > 1
        assert np.load(shards.path / shards.entries[split][0]["file"]).dtype == np.uint16


def test_train_and_validation_share_no_repository_and_meet_the_fraction():
    repos = [f"user{i}/repo" for i in range(10_000)]
    in_val = sum(split_of(repo, 0, 0.1) == "val" for repo in repos)
    assert 900 < in_val < 1100  # and split_of sees the repository alone, so a repository is on one side as a whole
    assert {split_of(repo, 1, 0.1) for repo in repos if split_of(repo, 0, 0.1) == "val"} == {"train", "val"}


def test_killed_anywhere_and_run_again_gives_the_same_bytes(corpus, shards, tmp_path):
    command = [sys.executable, "-m", "data.prepare", *arguments(corpus, tmp_path / "stdlib")]
    chance, kills = random.Random(0), 0
    while kills < 4 and not (tmp_path / "stdlib").exists():
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "stdlib.partial" / "tokenizer.json").exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.2) + (0.3 if kills else 0.0))  # it starts in about 0.3 s
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert digests(tmp_path / "stdlib") == digests(shards.path)
    assert not (tmp_path / "stdlib.partial").exists()


@pytest.mark.parametrize("moment", ["unit", "shard", "meta.json", "rename", "cleaning up"])
def test_stopped_at_a_given_moment_it_loses_nothing_that_was_done(moment, corpus, shards, tmp_path, monkeypatch):
    from data import prepare as prepare_module
    from data import publish, units

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
            die_before(units, "_write", lambda _, name, *__: name == "00001_00001")
        elif moment == "shard":
            die_before(publish, "write_shard", lambda path, *_: path.name == "train_00001.npy")
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


def test_the_number_of_workers_and_parts_does_not_change_a_byte(tmp_path, corpus):
    rows = python_documents() * 2
    random.Random(0).shuffle(rows)  # copies in other files, units and parts
    for place in range(5):
        write_json_gz(tmp_path / f"{place}.json.gz", rows[place * len(rows) // 5 : (place + 1) * len(rows) // 5])
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


def test_a_failed_or_stopped_joining_keeps_every_part(tmp_path, corpus, run_program, monkeypatch):
    from data import parts as module

    for part in (1, 2):
        prepare(load_config(PrepareConfig, arguments(corpus, tmp_path / "x", f"--part={part}/2", "--workers=1")))
    units = sorted(path.name for path in tmp_path.glob("x.part-*/units/*"))
    code, _, err = run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"), "--merge=2", "--part=1/2")
    assert code == 2 and "--part and --merge: one run does one of them" in err
    moved = []

    def die_at_seventh(source, target, move=os.replace):
        moved.append(source)
        if len(moved) == 7:
            raise KeyboardInterrupt
        move(source, target)

    config = load_config(PrepareConfig, arguments(corpus, tmp_path / "x", "--merge=2"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.os, "replace", die_at_seventh)
        prepare(config)
    assert sorted(path.name for path in tmp_path.glob("x.part*/units/*")) == units
    prepare(config)
    alone = prepared(corpus, tmp_path / "alone", "--workers=1")
    assert digests(tmp_path / "x") == digests(alone.path)


def test_joining_wants_all_parts_complete_and_alike(tmp_path, corpus, run_program):
    run = [*arguments(corpus, tmp_path / "x"), "--part=1/2"]
    assert run_program(prepare, PrepareConfig, *run)[0] == 0
    code, _, err = run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"), "--merge=2")
    assert code == 2 and "x.part-2-of-2: not there or not complete; run --part=2/2 to its end first" in err
    assert run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"), "--part=2/2")[0] == 0
    code, _, err = run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"), "--merge=2", "--seed=1")
    assert code == 2 and "made with other settings: seed was 0, is 1" in err
    assert run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"), "--merge=2")[0] == 0
    assert run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "y"), "--part=3/2")[0] == 2


def code(number: int, n_words: int = 400) -> str:
    """Python that passes every filter, unlike any other number's."""
    chance = random.Random(number)
    words = [f"value_{chance.randrange(10**9)}" for _ in range(n_words)]
    lines = [f"    {word} = {place}  # {word} counts" for place, word in enumerate(words)]
    return f"def compute_{number}():\n    '''Compute number {number}.'''\n" + "\n".join(lines) + "\n"


def like(number: int, jaccard: float) -> str:
    """Code whose set of words has that Jaccard similarity to `code(number)`'s."""
    mine, other = code(number).splitlines(), code(number + 1000).splitlines()

    def mixed(n_changed: int) -> str:
        return "\n".join([*mine[:2], *other[2:n_changed], *mine[n_changed:]]) + "\n"

    def unlikeness(n_changed: int) -> float:
        a, b = (set(re.findall(r"\w+", text)) for text in (code(number), mixed(n_changed)))
        return -len(a & b) / len(a | b)

    return mixed(bisect.bisect_left(range(len(mine)), -jaccard, lo=2, key=unlikeness))


def test_every_planted_bad_document_is_dropped_for_its_own_reason_and_no_good_one(tmp_path):
    problem = {
        "task_id": "Planted/7",
        "prompt": 'def area(w, h):\n    """Return the area of a rectangle with sides w and h."""\n',
        "entry_point": "area",
        "canonical_solution": "    surface = w * h\n    if surface < 0:\n        return None\n    return surface\n",
    }
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    (tmp_path / "opt_out.txt").write_text("alice  # asked on Monday\nBob/secret\n")
    good = [{"content": code(i), "repo_name": f"user/{i}", "path": f"{i}.py", "license": "mit"} for i in range(60)]
    good += [{**good[i], "content": like(i, 0.5)} for i in range(10)]
    lines = [code(i).splitlines() for i in range(60)]
    bad = {
        "long_line": [code(100) + "# " + "x" * 2000],
        "long_mean_line": ["\n".join(" ".join(line.split()) * 5 for line in lines[1][2:40])],
        "few_letters": [code(101, 5) + "# " + "\n# ".join(["=-" * 40] * 60)],
        "generated": ["# AUTOGENERATED by a machine\n" + code(102)],
        "config_or_test": ["# This is a test file\n" + code(103)],
        "no_keywords": ["\n".join(f"name_{i} = 'letters'" for i in range(50))],
        "few_assignments": ["def f():\n" + "    return 1\n" * 9],
        "comments": ["def f():\n" + "    number = 1\n" * 90],
        "chars_per_token": [
            "def f():  # "
            + "counts " * 9
            + "\n"
            + "".join(f"    x = {chr(0x4E00 + i) * 3 + chr(0x5E00 + i) * 3}\n" for i in range(90))
        ],
        "few_tokens": ["def compute():  # counts counts counts\n" + "    value = 1\n" * 5],
        "exact duplicate": [code(3).replace("    ", "\t"), code(4) + "\n\n"],
        "near duplicate": [like(i, 0.9) for i in range(10, 30)],
        "xml": ['<?xml version="1.0"?>\n' + code(106)],
        "contaminated": [
            code(104) + problem["canonical_solution"],
            code(105) + "# RETURN the area of a\trectangle with\n sides W and H.",
        ],
        "empty": ["", " \n\t"],
    }
    rows = [
        {"content": text, "repo_name": f"bad/{i} {reason}", "path": "bad.py", "license": "mit"}
        for reason, some in bad.items()
        for i, text in enumerate(some)
    ]
    rows += [
        {"content": code(200), "repo_name": "x/license unknown", "path": "x.py"},
        {"content": code(201), "repo_name": "x/license not wanted", "path": "x.py", "license": "gpl-3.0"},
        {"content": code(202), "repo_name": "alice/opted out", "path": "x.py", "license": "mit"},
        {"content": code(203), "repo_name": "bob/secret", "path": "x.py", "license": "mit"},
        {"content": code(204), "repo_name": "x/language not wanted", "path": "x.go", "license": "mit"},
        {
            "content": "<p a=1 b=2 c=3 d=4 e=5>" + "a <br class=wide>" * 99,
            "repo_name": "x/html",
            "path": "x.html",
            "license": "mit",
        },
        {
            "content": '{"a": ' + "1" * 200 + ', "b": "=====" }',
            "repo_name": "x/data_file",
            "path": "x.json",
            "license": "mit",
        },
    ]
    everything = good + rows  # copies come after what they are copies of; the rest in any order
    write_json_gz(tmp_path / "a.json.gz", everything[: len(good) // 2])
    write_json_gz(tmp_path / "b.json.gz", everything[len(good) // 2 :])
    filters = "--filters=codeparrot_v2,santacoder,polycoder"
    shards = prepared(
        tmp_path,
        tmp_path / "out",
        *(
            filters,
            "--config_test_rate=1",
            "--no_keywords_rate=1",
            "--max_line_length=1500",
            "--min_chars_per_token=1.2",
        ),
        *("--near_threshold=0.85", f"--decontaminate={tmp_path}/problems.jsonl", "--licenses=permissive"),
        *(f"--opt_out={tmp_path}/opt_out.txt", "--languages=Python,HTML,JSON"),
    )
    expected = {reason: len(some) for reason, some in bad.items()}
    expected |= {
        "html": 1,
        "data_file": 1,
        "license unknown": 1,
        "license not wanted": 1,
        "opted out": 2,
        "language not wanted": 1,
    }
    assert shards.meta["rejected"] == expected
    kept = texts_of(shards, "train") + texts_of(shards, "val")
    assert sorted(kept) == sorted(row["content"] for row in good)
    report = json.loads((shards.path / "report.json").read_text())
    assert report["problems"] == {"Planted/7": 2}
    steps = {step["step"]: step for step in report["steps"]}
    assert steps["read"]["documents"] == len(everything) and steps["shards"]["documents"] == len(good)
    assert steps["shards"]["tokens"] == sum(shards.meta["splits"][split]["tokens"] for split in SPLITS)
    assert steps["shards"]["bytes"] == sum(len(row["content"].encode()) for row in good)


def test_a_dry_run_shows_what_is_dropped_and_writes_nothing(tmp_path, run_program):
    rows = [{"content": code(i), "repo_name": f"u/{i}", "path": "x.py"} for i in range(20)]
    rows += [{"content": "# autogenerated\nx = 1\n", "repo_name": "u/made", "path": "gen.py"}, rows[3]]
    write_json_gz(tmp_path / "a.json.gz", rows)
    some = arguments(tmp_path, tmp_path / "out", "--dry_run=100", "--filters=codeparrot", "--near_threshold=0.85")
    exit_code, out, _ = run_program(prepare, PrepareConfig, *some)
    assert exit_code == 0 and [path.name for path in tmp_path.iterdir()] == ["a.json.gz"]
    assert "generated: 1 of 22" in out and "u/made: gen.py\n    | # autogenerated\n    | x = 1" in out
    assert "exact duplicate: 1 of 22" in out and "u/3: x.py, as u/3: x.py" in out
    assert "22 documents read, 2 dropped; nothing was written" in out


def test_adversarial_text_round_trips_or_is_rejected_by_name(tmp_path):
    texts = [
        "<|endoftext|><fim_prefix><reponame>",
        "\x00\x00 = 1",
        "\ufeffx = 1\r\n\r",
        "a" * 300_000,
        " " * 300_000 + "y",
    ]
    texts += ["é" * 300_000, "\U0010ffff\u2028\x85", "\n" * 300_000 + "x", "<|fim_prefix|>", "\ufffd"]
    rows = [{"content": text, "repo_name": f"u/{i}", "path": "x.py"} for i, text in enumerate(texts)]
    write_json_gz(tmp_path / "a.json.gz", [*rows, {"content": "\ud800", "repo_name": "u/x", "path": "x.py"}])
    spaces = {"content": " " * 1_000_000 + "x", "repo_name": "u/y", "path": "x.py"}
    write_json_gz(tmp_path / "b.json.gz", [spaces])
    shards = prepared(tmp_path, tmp_path / "out", "--tokenizer_sample_bytes=100", "--fim_rate=0", "--metadata_rate=0")
    assert shards.meta["rejected"] == {"lone surrogate": 1, "cannot be tokenized": 1}
    assert sorted(texts_of(shards, "train") + texts_of(shards, "val")) == sorted(texts)


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
    with pytest.raises(ValueError, match=r"no val shards of 'Pyhton'; there are C#, Go, Python"):
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


def test_commits_notebooks_and_metadata_bring_starcoders_specials(tmp_path):
    cells = [{"cell_type": "code", "source": "x = 1", "outputs": []}]
    rows = [{"content": json.dumps({"cells": cells}), "repo_name": f"u/{i}", "path": "n.ipynb"} for i in range(20)]
    write_json_gz(tmp_path / "a.json.gz", rows)
    shards = prepared(tmp_path, tmp_path / "out", "--notebooks", "--exact_duplicates=False", "--tokenizer=train:275")
    assert shards.meta["vocab_size"] == 275  # 256 bytes, end-of-text and StarCoder's 18
    assert set(texts_of(shards, "train")) == {"<jupyter_start><jupyter_code>x = 1<empty_output>"}


def test_redaction_and_tokenizer_comparison_are_reported(corpus, tmp_path):
    shards = prepared(corpus, tmp_path / "x", "--redact", "--tokenizer=train:600")
    report = json.loads((shards.path / "report.json").read_text())
    assert report["redacted"]["email"] > 10
    assert "<EMAIL>" in "".join(texts_of(shards, "train") + texts_of(shards, "val"))
    assert 1.5 < report["tokenizers"]["bpe-600"] < report["tokenizers"].get("cl100k_base", 9)


def test_max_tokens_stops_at_the_document_that_reaches_it(corpus, tmp_path):
    shards = prepared(corpus, tmp_path / "some", "--max_tokens=300_000")
    assert shards.meta["rejected"] == {"beyond max_tokens": shards.meta["rejected"]["beyond max_tokens"]}
    tokenizer = load_tokenizer(str(shards.path / "tokenizer.json"))
    kept = {split: texts_of(shards, split) for split in SPLITS}
    n_kept = sum(map(len, kept.values()))
    documents = [row for row in python_documents()[: n_kept + 1]]
    for split in SPLITS:  # the first ones, and no other
        assert kept[split] == [d["content"] for d in documents[:n_kept] if split_of(d["repo_name"], 0, 0.3) == split]
    last = len(tokenizer.encode(documents[n_kept - 1]["content"])) + 1
    total = sum(shards.meta["splits"][split]["tokens"] for split in SPLITS)
    assert total - last < 300_000 <= total


def test_a_worker_that_is_killed_ends_the_run_in_one_line_and_nothing_is_lost(corpus, shards, tmp_path, monkeypatch):
    from data import units

    config = load_config(PrepareConfig, arguments(corpus, tmp_path / "stdlib", "--workers=2"))
    write = units._write

    def die(work, name, *arguments):
        if name == "00001_00001":
            os.kill(os.getpid(), signal.SIGKILL)
        write(work, name, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="a worker ended with exit code -9; if memory"):
        patch.setattr(units, "_write", die)
        prepare(config)
    prepare(config)
    assert digests(tmp_path / "stdlib") == digests(shards.path)


def test_two_preparations_of_one_name_wait_for_each_other(corpus, shards, tmp_path):
    command = [sys.executable, "-m", "data.prepare", *arguments(corpus, tmp_path / "stdlib")]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    outputs = [process.communicate()[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert digests(tmp_path / "stdlib") == digests(shards.path)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    rows = [{"content": code(i, 700), "repo_name": f"u/{i}", "path": "x.py"} for i in range(60)]
    peaks = []
    for n_files in (1, 8):
        folder = tmp_path / str(n_files)
        folder.mkdir()
        for number in range(n_files):
            write_json_gz(folder / f"{number}.json.gz", [{**row, "path": f"{number}.py"} for row in rows] * 2)
        settings = [
            "--workers=1",
            "--unit_bytes=1000000",
            "--tokenizer_sample_bytes=100000",
            "--exact_duplicates=False",
        ]
        script = (
            "import sys; from config import load_config; from data.prepare import *; "
            "prepare(load_config(PrepareConfig, sys.argv[1:])); "
            "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
        )
        command = [sys.executable, "-c", script, *arguments(folder, folder / "out"), *settings]
        result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        peaks.append(int(result.stdout.split()[-1]) / 1000)
    assert peaks[1] < peaks[0] + 15, f"{peaks} MB for 4 and 32 MB of text"


def test_files_that_settings_name_count_by_what_they_hold(corpus, tmp_path, run_program):
    (tmp_path / "out").write_text("nobody\n")
    run = [*arguments(corpus, tmp_path / "x"), f"--opt_out={tmp_path}/out"]
    assert run_program(prepare, PrepareConfig, *run)[0] == 0
    (tmp_path / "out").write_text("somebody\n")
    code, _, err = run_program(prepare, PrepareConfig, *run)
    assert code == 2 and "made with other settings: files was" in err


def test_thousands_of_inputs_are_shared_out(tmp_path):
    row = {"repo_name": "u/0", "path": "x.py"}
    for number in range(4000):
        text = f"{number} = x\n"
        (tmp_path / f"{number:04d}.json").write_text(json.dumps({**row, "repo_name": f"u/{number}", "content": text}))
    settings = [f"--name={tmp_path}/out", f"--source=files:{tmp_path}/*.json", "--tokenizer=train:257", "--workers=2"]
    prepare(load_config(PrepareConfig, settings))
    shards = Shards(tmp_path / "out")
    assert sorted(texts_of(shards, "train") + texts_of(shards, "val")) == sorted(f"{i} = x\n" for i in range(4000))


def test_a_mistake_mended_is_not_held_against_the_user(corpus, tmp_path, run_program):
    wrong = arguments(corpus, tmp_path / "x", "--tokenizer=missing.json")
    assert run_program(prepare, PrepareConfig, *wrong)[0] == 2 and not list(tmp_path.iterdir())
    assert run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"))[0] == 0
    (tmp_path / "y").mkdir()
    exit_code, _, err = run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "y"))
    assert exit_code == 2 and "is there already, and holds no shards" in err


def test_a_source_that_changed_under_a_killed_run_is_noticed(corpus, tmp_path, monkeypatch):
    from data import prepare as module

    def die(*arguments):
        raise KeyboardInterrupt

    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    config = load_config(PrepareConfig, arguments(folder, tmp_path / "x"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_publish", die)
        prepare(config)
    with gzip.open(folder / "file-000000000001.json.gz", "a") as file:
        file.write(b"{}\n")
    with pytest.raises(ValueError, match="the source's files have changed since it was begun"):
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
    assert "disk: needs about 0.0" in out and not list(tmp_path.iterdir())


ROW = {"repo_name": "a/b", "content": "x = 1\n"}


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], [], "0 documents for training, 0 for validation, dropped: none"),
        ([ROW], [], "each split needs one: mend what was dropped, add repositories, change --val_fraction"),
        ([ROW], ["--tokenizer=train:many"], "wants a number of ids"),
        ([ROW], ["--tokenizer=missing.json"], "missing.json: no such file"),
        ([ROW], ["--val_fraction=1"], "val_fraction is 1.0"),
        ([ROW], ["--val_files=*54*"], "--val_files=*54*: matches none of 1 inputs"),
        ([ROW], ["--filters=tidy"], "--filters: unknown 'tidy'"),
        ([ROW], ["--language_weights=Python:2"], "'Python:2' is no LANGUAGE=NUMBER"),
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
