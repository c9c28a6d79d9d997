"""Disks that are full or cannot be written to: told once, in our words.

In: whatever other libraries raise, log and print of it, in threads and while Python ends. Out: the reason, and silence.
"""

import errno
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Not every one that a file can have: a block that reads cannot meet these.
_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_REASONS = tuple(map(os.strerror, _NUMBERS))
# Of checkpoints' threads, and of the event loops in them.
_LOGGERS = ("absl", "asyncio")
_SHORT = re.compile(r"\d+ requested and \d+ written")  # NumPy's words
_SECONDS = 10.0  # in which the errors come that follow from one
_ENDED = "Event loop is closed"


def disk_reason(error: BaseException | None) -> str | None:
    """What is wrong with a disk, as the system says it; None for an error that comes of something else.

    Libraries that are not written in Python have the system's words in a text of their own; handlers that fail in turn
    have the first error as their context.
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return os.strerror(error.errno)
        if reason := _named(str(error)):
            return reason
        waiting += [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]
    return None


def _named(text: str) -> str | None:
    if _SHORT.search(text):
        return os.strerror(errno.ENOSPC)
    return next((reason for reason in _REASONS if reason in text), None)


class DiskErrors(logging.Filter):
    """What was said of the disk beside the main thread's error.

    Attributes:
        reason: the first one's; None while there was none.
    """

    reason: str | None = None
    _until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether other libraries' log may say something: not of the disk, nor of what follows from that."""
        error = record.exc_info[1] if record.exc_info else None
        return not self.hides(error, record.getMessage())

    def hides(self, error: BaseException | None, text: str = "") -> bool:
        """Notes a disk's error; whether it, or what follows soon after one, is to be hidden."""
        if reason := disk_reason(error) or _named(text):
            self.reason, self._until = self.reason or reason, time.monotonic() + _SECONDS
        return time.monotonic() < self._until


@contextmanager
def told_once() -> Iterator[DiskErrors]:
    """A block in which other libraries say nothing of a full disk; nor, if it was full, later, while Python ends."""
    found = DiskErrors()
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    shown, shown_of_thread, shown_unraisable = hooks

    later: list[tuple[Any, BaseException, Any]] = []

    def of_callback(kind: Any, error: BaseException, trace: Any) -> None:
        # What writes arrays calls back into an event loop that has ended by the error, before that is told anywhere.
        if not found.hides(error) and str(error) == _ENDED:
            later.append((kind, error, trace))
        elif not found.hides(error):
            shown(kind, error, trace)

    def of_thread(args: Any) -> None:
        if not found.hides(args.exc_value):
            shown_of_thread(args)

    def unraisable(args: Any) -> None:
        if not found.hides(args.exc_value):
            shown_unraisable(args)

    sys.excepthook, threading.excepthook, sys.unraisablehook = of_callback, of_thread, unraisable
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(found)
    try:
        yield found
    finally:
        if found.reason is None:
            sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
            for name in _LOGGERS:
                logging.getLogger(name).removeFilter(found)
            for error in later:
                shown(*error)
