"""A run that is told to stop saves a checkpoint first: SIGTERM, which preempted machines get, and Ctrl-C.

In: signals. Out: after the step in which one came, the number of the signal. Several processes agree on a step, also
when only one of them got the signal.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from lora_gen_jax.training.c_signals import set_c_handler

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# JAX's handler of SIGTERM, a C function that it installs once; None until the first run of this process is over.
_jax_handler: int | None = None


class StopSignals:
    """While it is entered, SIGTERM and SIGINT are noted; a second one does what it did before.

    In several processes JAX itself watches for SIGTERM and tells all of them; SIGINT in one is passed on so.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.together = jax.process_count() > 1
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python lets only its main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS[1:] if self.together else SIGNALS:
                self.handlers[number] = signal.signal(number, self._note)
            if self.together and _jax_handler is not None:
                set_c_handler(signal.SIGTERM, _jax_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _jax_handler
        self._restore()
        if self.together and threading.current_thread() is threading.main_thread():
            # JAX would go on noting SIGTERM, and nobody asks any more until the next run.
            _jax_handler = set_c_handler(signal.SIGTERM, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if self.together:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        while self.handlers:
            number, handler = self.handlers.popitem()
            signal.signal(number, handler)

    def before(self, step: int) -> int | None:
        """The signal that came before any process asked; every process asks once, before its first step from `step`."""
        if not self.together:
            return self.received
        # Asked for nothing yet, JAX has the processes stop at 1. From here on they stop behind the last step asked for.
        early = multihost_utils.reached_preemption_sync_point(1)
        multihost_utils.reached_preemption_sync_point(max(1, step))
        return signal.SIGTERM if early else None

    def after(self, step: int) -> int | None:
        """The signal that ends the run after this step; every process asks after every step."""
        if self.together:
            stop = multihost_utils.reached_preemption_sync_point(step)
            return (self.received or signal.SIGTERM) if stop else None
        return self.received
