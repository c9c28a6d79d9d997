"""Jobs as processes, several at a time, each on a core of its own.

In: jobs in the order in which they start, and the command of one. Out: the jobs that failed. Ctrl-C and SIGTERM end
all processes; training runs save a checkpoint first. A process also ends when the one that started it is gone.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from lora_gen_jax.errors import Stopped
from lora_gen_jax.tables.jobs import Job

POLL, TAIL_LINES = 0.2, 15
# A process that saves a checkpoint has this long before it is killed.
GRACE = 120.0


class Process(Protocol):
    """A started job; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Its status; None while it runs."""
        ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


# From a job and the number of its place, which is free, to its process.
Start = Callable[[Job, int], Process]


class TablesStopped(Stopped):
    """The tables were stopped by a signal; what is finished is kept."""

    def __init__(self, received: int):
        super().__init__(received, 0)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}: the same command goes on"


def run_jobs(jobs: Sequence[Job], start: Start, places: int, say: Callable[[str], None]) -> list[Job]:
    """Runs all jobs, `places` at a time, and returns those that failed.

    Raises:
        TablesStopped: after a signal, when all processes have ended.
    """
    waiting, running = deque(jobs), {}
    failed: list[Job] = []
    progress = Progress(jobs, say)
    with noted_signals() as received:
        try:
            while waiting or running:
                for place in [i for i in range(places) if i not in running][: len(waiting)]:
                    job = waiting.popleft()
                    running[place] = (job, start(job, place), time.monotonic())
                    progress.started(job)
                if received:
                    raise TablesStopped(received[0])
                for place, (job, process, began) in list(running.items()):
                    if (status := process.poll()) is None:
                        continue
                    del running[place]
                    if status:
                        failed.append(job)
                    progress.ended(job, status, time.monotonic() - began)
                time.sleep(POLL if running else 0)
        finally:
            end([process for _, process, _ in running.values()])
    return failed


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted in a list; a second one does what it did before.

    Not `StopSignals`, which asks JAX, and this process must leave the accelerator to its jobs.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: Any) -> None:
        received.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def end(processes: Sequence[Process]) -> None:
    """Ends processes: asks them, and kills those that do not end in time."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(POLL)
    for process in processes:
        if process.poll() is None:
            process.kill()


class Progress:
    """Lines about jobs, with the time that passed and an estimate of what is left."""

    def __init__(self, jobs: Sequence[Job], say: Callable[[str], None]):
        self.total, self.say, self.began = len(jobs), say, time.monotonic()
        self.left, self.done, self.number = sum(job.work for job in jobs), 0.0, 0

    def started(self, job: Job) -> None:
        self.say(f"{job.name}: starting; log in {job.log}")

    def ended(self, job: Job, status: int, seconds: float) -> None:
        """Says how a job ended, with the end of its log where it failed."""
        self.number, self.done, self.left = self.number + 1, self.done + job.work, self.left - job.work
        elapsed = time.monotonic() - self.began
        how = f"failed with status {status}" if status else "done"
        left = f", about {minutes(elapsed * self.left / self.done)} left" if self.left > 0 and self.done else ""
        times = f"{minutes(elapsed)} so far{left}"
        self.say(f"{job.name}: {how} in {minutes(seconds)}; {self.number} of {self.total}, {times}")
        if status:
            self.say("\n".join(f"    {line}" for line in tail(job)))


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    """A time as people say it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def tail(job: Job) -> list[str]:
    """The last lines of a job's log, and where the rest is."""
    try:
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return [*lines[-TAIL_LINES:], f"(the whole log: {job.log})"]


def start_process(command: Sequence[str], job: Job) -> Process:
    """A job's process, out of the terminal's reach: the one that starts it passes signals on. It logs to a file."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def cores() -> list[int]:
    """Numbers of the processor's cores that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(core: int) -> None:
    """Keeps this process to one core, where the system can; before JAX starts its threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def end_with_parent() -> None:
    """Has this process ended as by SIGTERM when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def platform() -> str:
    """What JAX runs on: asked in a process of its own, as a process that asks holds the accelerator from then on.

    Jobs need that accelerator.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu"
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return found[-1] if found else "cpu"
