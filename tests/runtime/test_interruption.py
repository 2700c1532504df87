import os
import signal
import sys

import pytest

from runtime.interruption import Interruption


def test_the_first_signal_is_noted_and_the_second_acts():
    with Interruption() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            interrupted.leave("saved")
    assert stop.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_leaves_is_noted_and_writing_goes_on(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with Interruption() as interrupted:
            print("x", flush=True)
            print("y", flush=True)
            assert interrupted()
        assert sys.stdout is broken
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that closing it has where to write


def test_what_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_with_patience_a_second_signal_is_noted_too():
    """torchrun passes on to its processes what they may have had already, and they are still saving."""
    with Interruption(patient=True) as interrupted:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupted()
        with pytest.raises(SystemExit) as stop:
            interrupted.leave(None)
    assert stop.value.code == 128 + signal.SIGTERM
