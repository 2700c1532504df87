"""Being asked to stop: signals, and a reader of the output that leaves, become a flag that a loop can read."""

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


class Interruption:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted, and so is a reader of the output that leaves (Ctrl-C stops
    `tee` too), so that the loop can save before leaving. A second signal acts as it always does, or with `patient` is
    noted too: torchrun passes on a signal that its processes may have had already. True when called after the first."""

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.signum: int | None = None
        self.handlers: dict[int, Any] = {}
        self.streams = sys.stdout, sys.stderr

    def __enter__(self) -> "Interruption":
        sys.stdout, sys.stderr = (_Unbreakable(stream, self._note) for stream in self.streams)
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
            handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup stays nohup
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
    """A text stream that notes SIGPIPE, and goes on silently, when its reader has left."""

    SIGPIPE = 13

    def __init__(self, stream: Any, note: Callable[[int], None]):
        self.stream, self.note = stream, note

    def write(self, text: str) -> int:
        return self._try(lambda: self.stream.write(text), len(text))

    def flush(self) -> None:
        self._try(self.stream.flush, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, action: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return action()
        except OSError:
            self.note(self.SIGPIPE)
            return otherwise
