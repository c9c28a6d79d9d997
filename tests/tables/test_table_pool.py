"""Jobs as processes: how many at a time, what a failure does, and that a signal ends them all."""

import os
import signal
import sys

import pytest

from lora_gen_jax.tables import pool
from lora_gen_jax.tables.jobs import make_jobs


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pool, "POLL", 0.01)
    monkeypatch.setattr(pool, "GRACE", 0.2)


class Fake:
    """A process that ends after some polls; it remembers what was done to it."""

    def __init__(self, polls, status=0):
        self.left, self.status, self.told = polls, status, []

    def poll(self):
        self.left -= 1
        return self.status if self.left < 0 else None

    def terminate(self):
        self.told.append("terminate")

    def kill(self):
        self.told.append("kill")


def test_two_places_are_kept_busy_and_a_failure_does_not_stop_the_others(tables):
    jobs, began, lines = make_jobs(tables)[:6], [], []
    jobs[1].log.parent.mkdir(parents=True)
    jobs[1].log.write_text("".join(f"line {i}\n" for i in range(30)))

    def start(job, place):
        began.append((job.name, place))
        return Fake(6 if job is jobs[0] else 0, status=2 if job is jobs[1] else 0)

    assert pool.run_jobs(jobs, start, 2, lines.append) == [jobs[1]]
    # The first place is held by the long job; the others follow each other in the second.
    assert began == [(jobs[0].name, 0), *((job.name, 1) for job in jobs[1:])]
    text = "\n".join(lines)
    assert f"{jobs[1].name}: failed with status 2" in text
    assert "    line 29\n" in text
    assert "line 14\n" not in text
    assert f"(the whole log: {jobs[1].log})" in text
    assert f"{jobs[0].name}: done" in text
    assert "6 of 6" in text


def test_a_signal_ends_all_processes(tables):
    jobs, made = make_jobs(tables)[:3], []

    def start(job, place):
        made.append(Fake(10**9))
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(pool.TablesStopped) as raised:
        pool.run_jobs(jobs, start, 2, lambda line: None)
    assert raised.value.signal == signal.SIGTERM
    assert "SIGTERM" in str(raised.value)
    assert [process.told for process in made] == [["terminate", "kill"]] * 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_real_process_logs_and_fails(tables):
    job, lines = make_jobs(tables)[0], []
    code = "import sys; print('it began'); sys.exit('it broke')"

    def start(job, place):
        return pool.start_process([sys.executable, "-c", code], job)

    assert pool.run_jobs([job], start, 1, lines.append) == [job]
    assert job.log.read_text() == "it began\nit broke\n"
    assert "    it broke\n" in "\n".join(lines)
