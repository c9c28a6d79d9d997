"""One thread that keeps the batch full: works wait in a queue, rows take them as they become free.

In: `GenerationRequest`s from any thread. Out: `Tokens`, told to each work's listener as they are generated. All
programs on the device are called only from this thread.
"""

import collections
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.inference.engine import Engine
from lora_gen_jax.inference.work import GenerationRequest, Progress

log = logging.getLogger(__name__)


class QueueFull(LoraGenError):
    """As many works wait as may."""


class Closing(LoraGenError):
    """Nothing more is accepted."""


class Failed(LoraGenError):
    """The programs on the device have failed; nothing more can be generated."""


class Tokens(NamedTuple):
    """What a listener is told, once or several times; nothing follows after a `finish`.

    Attributes:
        ids, logprobs: new since the last time; the stop id is left out.
        finish: how the sequence has ended; None while it goes on.
    """

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length", "cancelled", "failed"] | None


Listener = Callable[[Tokens], None]


class Ticket:
    """A work that was accepted."""

    def __init__(self, scheduler: "Scheduler", work: GenerationRequest, listener: Listener):
        self.scheduler, self.work, self.listener = scheduler, work, listener
        self.row: int | None = None
        self.ended = False

    def cancel(self) -> None:
        """Frees its row at the next step; the listener is told "cancelled", unless it has ended before."""
        self.scheduler._cancel(self)

    def tell(self, tokens: Tokens) -> None:
        """Tells the listener, which may not break the thread."""
        self.ended = tokens.finish is not None
        try:
            self.listener(tokens)
        except Exception:
            log.exception("a listener failed; its work is dropped")
            if not self.ended:
                self.cancel()


class Scheduler:
    """Runs an engine until it is closed.

    Args:
        engine: nothing else may call it from now on.
        queue_limit: works that may wait for a row.

    Attributes:
        longest: a prompt and its new tokens are at most this many.
        rows: sequences that are generated at the same time.
        rank: of the factors that a row has room for beside its gates.
    """

    def __init__(self, engine: Engine, queue_limit: int):
        self.engine, self.queue_limit = engine, queue_limit
        self.longest, self.rows, self.rank = engine.slots, engine.rows, engine.rank
        self.generated_tokens = self.read_tokens = 0
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._joining: list[Ticket] = []
        self._running: dict[int, Ticket] = {}
        self._cancelling: list[Ticket] = []
        self._changed = threading.Condition()
        self._closing = self._failed = self._abandon = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Works that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Works that have a row."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether works are being done."""
        return self._thread.is_alive() and not self._failed

    def submit(self, work: GenerationRequest, listener: Listener) -> Ticket:
        """As `submit_all`, of one work."""
        return self.submit_all([work], [listener])[0]

    def submit_all(self, works: Sequence[GenerationRequest], listeners: Sequence[Listener]) -> list[Ticket]:
        """Accepts works, all of them or none.

        Args:
            works: what to generate.
            listeners: one a work; called from the scheduler's thread, which they must not hold up.
        """
        for work in works:
            self.engine.check(work)
        tickets = [Ticket(self, work, listener) for work, listener in zip(works, listeners, strict=True)]
        with self._changed:
            if self._failed:
                problem = "the programs on the device have failed: the server must be started again"
                raise Failed(problem, field="server", code="failed")
            if self._closing:
                remedy = "ask another one, or later"
                raise Closing("the server is shutting down", field="server", code="closing", remedy=remedy)
            if len(self._waiting) + len(tickets) > self.queue_limit:
                problem = f"{len(self._waiting)} sequences wait, there is room for {self.queue_limit}"
                raise QueueFull(problem, field="queue", code="queue_full", remedy="try again later")
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def close(self, timeout: float) -> bool:
        """Accepts nothing more and finishes what was accepted.

        Args:
            timeout: seconds; what is unfinished then is cancelled.

        Returns:
            whether everything was finished.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        finished = not self._thread.is_alive()
        if not finished:
            with self._changed:
                self._abandon = True
                self._changed.notify()
            self._thread.join()
        return finished and not self._failed

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._cancelling.append(ticket)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._next():
                pass
        except BaseException:
            log.exception("the engine failed; all requests end here")
            with self._changed:
                self._failed = True
        with self._changed:
            left = [*self._running.values(), *self._joining, *self._waiting]
            self._running, self._joining = {}, []
            self._waiting.clear()
        for ticket in left:
            ticket.tell(Tokens([], [], "failed" if self._failed else "cancelled"))

    def _next(self) -> bool:
        """One round: rows are freed, filled, and decoded; False when there is nothing more to do ever."""
        with self._changed:
            while not (self._waiting or self._running or self._cancelling or self._closing):
                self._changed.wait()
            if self._abandon or (self._closing and not (self._waiting or self._running)):
                return False
            cancelling, self._cancelling = self._cancelling, []
        for ticket in cancelling:
            self._drop(ticket)
        with self._changed:
            self._joining = [self._waiting.popleft() for _ in range(min(len(self.engine.free), len(self._waiting)))]
        if self._joining:
            rows, progress = self.engine.admit([ticket.work for ticket in self._joining])
            self._running |= dict(zip(rows, self._joining, strict=True))
            self.read_tokens += sum(len(ticket.work.ids) for ticket in self._joining)
            self._joining = []
            self._tell(progress)
        self._tell(self.engine.step(eager=bool(self._waiting)))
        return True

    def _tell(self, progress: list[Progress]) -> None:
        for row, ids, logprobs, finish in progress:
            self.generated_tokens += len(ids)
            ticket = self._running[row] if finish is None else self._running.pop(row)
            ticket.tell(Tokens(ids, logprobs, finish))

    def _drop(self, ticket: Ticket) -> None:
        if ticket.ended:
            return
        row = next((row for row, running in self._running.items() if running is ticket), None)
        if row is None:
            with self._changed:
                self._waiting.remove(ticket)
        else:
            self.engine.cancel(row)
            del self._running[row]
        ticket.tell(Tokens([], [], "cancelled"))

    def warm_up(self) -> None:
        """Compiles all programs; to be called before the first work is submitted."""
        self.engine.warm_up()
