"""The thread between requests and the batch: nothing that was accepted is forgotten, whatever happens."""

import queue
import threading

import numpy as np
import pytest
from helpers import raises

from lora_gen_jax.errors import DataError
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.inference.decode import GenerationSettings
from lora_gen_jax.inference.engine import Engine
from lora_gen_jax.inference.work import GenerationRequest, Progress
from lora_gen_jax.serving.scheduler import Closing, Failed, QueueFull, Scheduler


class Puppet:
    """An engine of two rows that takes a step when the test says so; each step draws one token a row."""

    slots, rows, rank = 16, 2, 0

    def __init__(self, steps=10**6, failing=None):
        self.free, self.working, self.failing = [1, 0], {}, failing
        self.allowed = threading.Semaphore(steps)
        self.admitted = threading.Event()

    def check(self, work):
        if len(work.ids) == 0:
            raise DataError("the prompt is empty", field="prompt", code="empty")

    def admit(self, works):
        if self.failing == "admit":
            raise MemoryError("no room")
        rows = [self.free.pop() for _ in works]
        self.working |= {row: work.settings.max_new_tokens for row, work in zip(rows, works, strict=True)}
        self.admitted.set()
        return rows, self._draw(rows)

    def step(self, eager=False):
        if not self.working:
            return []
        if self.failing == "step":
            raise MemoryError("no room")
        self.allowed.acquire()
        return self._draw(list(self.working))

    def cancel(self, row):
        del self.working[row]
        self.free.append(row)

    def _draw(self, rows):
        progress = []
        for row in rows:
            self.working[row] -= 1
            finish = None if self.working[row] else "length"
            progress.append(Progress(row, [7], [-0.5], finish))
            if finish:
                self.cancel(row)
        return progress


class Listener(queue.Queue):
    """Collects what it is told."""

    def __call__(self, tokens):
        self.put(tokens)

    def end(self):
        """(ids, finish) once there is one."""
        ids = []
        while True:
            tokens = self.get(timeout=20)
            ids += tokens.ids
            if tokens.finish is not None:
                assert self.empty()
                return ids, tokens.finish


def submit(scheduler, count, length=3):
    listeners = [Listener() for _ in range(count)]
    return listeners, scheduler.submit_all([GenerationRequest([1, 2], GenerationSettings(length))] * count, listeners)


def test_works_wait_for_rows_and_all_of_them_end():
    scheduler = Scheduler(Puppet(), queue_limit=10)
    listeners, _ = submit(scheduler, 7)
    assert [listener.end() for listener in listeners] == [([7, 7, 7], "length")] * 7
    assert (scheduler.generated_tokens, scheduler.read_tokens) == (21, 14)
    assert scheduler.close(20)
    assert (scheduler.waiting, scheduler.running) == (0, 0)


def test_all_of_a_request_is_accepted_or_nothing():
    engine = Puppet(steps=0)
    scheduler = Scheduler(engine, queue_limit=4)
    busy, _ = submit(scheduler, 2)
    assert engine.admitted.wait(20)
    waiting, _ = submit(scheduler, 3)
    with raises(QueueFull, "queue", "3 sequences", 4, code="queue_full"):
        submit(scheduler, 2)
    assert scheduler.waiting == 3
    with raises(DataError, "prompt", code="empty"):
        scheduler.submit_all(
            [GenerationRequest([1], GenerationSettings(2)), GenerationRequest([], GenerationSettings(2))],
            [Listener(), Listener()],
        )
    assert scheduler.waiting == 3
    engine.allowed.release(100)
    assert all(listener.end()[1] == "length" for listener in busy + waiting)
    assert scheduler.close(20)


def test_a_cancelled_work_is_told_so_whether_it_waits_or_runs():
    engine = Puppet(steps=0)
    scheduler = Scheduler(engine, queue_limit=10)
    listeners, tickets = submit(scheduler, 4)
    assert engine.admitted.wait(20)
    for ticket in (tickets[0], tickets[3], tickets[3]):
        ticket.cancel()
    engine.allowed.release(100)
    ends = [listener.end() for listener in listeners]
    assert [end for _, end in ends] == ["cancelled", "length", "length", "cancelled"]
    assert ends[3][0] == []
    tickets[1].cancel()  # has ended: nothing happens
    assert scheduler.close(20)
    assert sorted(engine.free) == [0, 1]


def test_a_listener_that_raises_loses_its_own_work_alone(caplog):
    engine = Puppet()
    scheduler = Scheduler(engine, queue_limit=10)

    def broken(tokens):
        raise OSError("gone")

    good = Listener()
    scheduler.submit_all(
        [GenerationRequest([1], GenerationSettings(9)), GenerationRequest([1], GenerationSettings(3))], [broken, good]
    )
    assert good.end() == ([7, 7, 7], "length")
    assert scheduler.close(20)
    assert sorted(engine.free) == [0, 1]
    assert "a listener failed" in caplog.text


@pytest.mark.parametrize("failing", ["admit", "step"])
def test_when_the_engine_fails_everybody_is_told_and_nothing_more_is_accepted(failing, caplog):
    scheduler = Scheduler(Puppet(failing=failing), queue_limit=10)
    listeners, _ = submit(scheduler, 4)
    assert [listener.end()[1] for listener in listeners] == ["failed"] * 4
    assert not scheduler.close(20)
    assert not scheduler.alive
    with raises(Failed, "server", code="failed"):
        submit(scheduler, 1)
    assert "no room" in caplog.text


def test_closing_finishes_what_was_accepted_and_accepts_nothing_more():
    engine = Puppet(steps=0)
    scheduler = Scheduler(engine, queue_limit=10)
    listeners, _ = submit(scheduler, 4)
    assert engine.admitted.wait(20)
    closed = []
    thread = threading.Thread(target=lambda: closed.append(scheduler.close(20)))
    thread.start()
    while not scheduler._closing:
        pass
    with raises(Closing, "server", code="closing"):
        submit(scheduler, 1)
    engine.allowed.release(100)
    assert [listener.end()[1] for listener in listeners] == ["length"] * 4
    thread.join()
    assert closed == [True]


def test_what_is_unfinished_when_the_time_is_over_is_cancelled():
    engine = Puppet(steps=1)
    scheduler = Scheduler(engine, queue_limit=10)
    listeners, _ = submit(scheduler, 3, length=9)
    threading.Timer(0.3, lambda: engine.allowed.release(1)).start()
    assert not scheduler.close(0.05)
    assert [listener.end()[1] for listener in listeners] == ["cancelled"] * 3


def test_works_of_a_real_engine_are_checked_before_they_are_accepted(specializer):
    edge = specializer.pair.edge
    scheduler = Scheduler(Engine(edge.plain, rows=1, slots=16), queue_limit=2)
    with raises(DataError, "max_new_tokens", 16, code="too long"):
        scheduler.submit(GenerationRequest([5] * 10, GenerationSettings(7)), Listener())
    with raises(DataError, "gates", "(2, 4)"):
        scheduler.submit(
            GenerationRequest([5], GenerationSettings(2), Gates.of_all(np.zeros((2, 4), np.float32))), Listener()
        )
    assert scheduler.close(20)
