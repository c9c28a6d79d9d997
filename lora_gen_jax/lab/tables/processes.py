"""Jobs in processes of their own, one after another: each has the whole machine, and its memory back afterwards.

In: jobs and the command of one. Out: the jobs that failed. Ctrl-C and SIGTERM are passed on to the running job, which
saves a checkpoint. A job also ends when the process that started it is gone.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lora_gen_jax.errors import Stopped
from lora_gen_jax.lab.tables.jobs import Job

TAIL_LINES = 15


class TablesStopped(Stopped):
    """The tables were stopped by a signal; what is finished is kept."""

    def __init__(self, received: int):
        super().__init__(received, 0)

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}: the same command goes on"


def run_jobs(jobs: Sequence[Job], command: Callable[[Job], Sequence[str]]) -> list[Job]:
    """Runs all jobs and returns those that failed.

    Raises:
        TablesStopped: after a signal, when the running job has ended.
    """
    failed = []
    for number, job in enumerate(jobs, 1):
        say(f"{job.name}: starting, {number} of {len(jobs)}; log in {job.log}")
        began = time.monotonic()
        if status := run_process(command(job), job):
            failed.append(job)
        how = f"failed with status {status}" if status else "done"
        say(f"{job.name}: {how} in {minutes(time.monotonic() - began)}")
        if status:
            lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
            say("\n".join(f"    {line}" for line in [*lines, f"(the whole log: {job.log})"]))
    return failed


def run_process(command: Sequence[str], job: Job) -> int:
    """The status of a job's process, which logs to a file.

    It is out of the terminal's reach, so that it receives a signal once, from here. A second signal kills it.

    Raises:
        TablesStopped: after a signal, when the process has ended.
    """
    received: list[int] = []
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with (
        job.log.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):

        def pass_on(number: int, frame: Any) -> None:
            process.send_signal(signal.SIGKILL if received else signal.SIGTERM)
            received.append(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        raise TablesStopped(received[0])
    return status


def end_with_parent() -> None:
    """Ends this process, as SIGTERM would, when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def say(text: str) -> None:
    """Prints a line of progress."""
    print(text, file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
