"""Requests to stop, as a flag that a loop can check: a signal, or output that nobody reads any more."""

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


class Interruption:
    """A context that notes SIGINT, SIGTERM, SIGHUP and a broken pipe on stdout or stderr (Ctrl-C stops `tee` too), so
    that a loop can save before it ends. Calling it returns whether one was noted. A second signal acts as usual; with
    `patient` it is noted too, because torchrun passes on signals that its processes may already have received."""

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.signum: int | None = None
        self.handlers: dict[int, Any] = {}
        self.streams = sys.stdout, sys.stderr

    def __enter__(self) -> "Interruption":
        sys.stdout, sys.stderr = (_Unbreakable(stream, self._note) for stream in self.streams)
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
            handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as nohup sets it
            self.handlers = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, *exception: object) -> None:
        sys.stdout, sys.stderr = self.streams
        self._restore_handlers()

    def __call__(self) -> bool:
        return self.signum is not None

    def leave(self, message: str | None) -> None:
        """End the program as the signal would have, with `message` on stderr."""
        if message is not None:
            print(message, file=sys.stderr)
        raise SystemExit(128 + (self.signum or 0))

    def _note(self, signum: int, frame: object = None) -> None:
        self.signum = signum
        if not self.patient:
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class _Unbreakable:
    """A text stream that, when its reader has left, notes SIGPIPE and ignores further writes."""

    SIGPIPE = 13

    def __init__(self, stream: Any, note: Callable[[int], None]):
        self.stream, self.note = stream, note

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.note(self.SIGPIPE)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.note(self.SIGPIPE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
