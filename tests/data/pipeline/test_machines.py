import os

import pytest
from small_corpus import (
    arguments,
    digests,
    prepared,
)

from prepare import PrepareConfig, prepare
from runtime.config import load_config


def test_a_failed_or_stopped_joining_keeps_every_part(tmp_path, corpus, run_program, monkeypatch):
    from data.pipeline import machines as module

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
    assert code == 2 and "x.part-2-of-2: missing or not complete; first run --part=2/2" in err
    assert run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"), "--part=2/2")[0] == 0
    code, _, err = run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"), "--merge=2", "--seed=1")
    assert code == 2 and "made with other settings: seed was 0, is 1" in err
    assert run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "x"), "--merge=2")[0] == 0
    assert run_program(prepare, PrepareConfig, *arguments(corpus, tmp_path / "y"), "--part=3/2")[0] == 2
