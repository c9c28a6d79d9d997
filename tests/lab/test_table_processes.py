"""Jobs as processes: their logs, what a failure does, and what a signal does."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lora_gen_jax.lab.tables.jobs import make_jobs
from lora_gen_jax.lab.tables.run import TablesStopped, run_jobs

WAITING = """
import signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_failing_job_shows_the_end_of_its_log_and_does_not_stop_the_others(tables, capsys):
    jobs = make_jobs(tables)[:3]
    code = "for i in range(30): print('line', i)\nimport sys; sys.exit('it broke' if sys.argv[1] == '{}' else 0)"

    def command(job):
        return [sys.executable, "-c", code.format(jobs[1].name), job.name]

    assert run_jobs(jobs, command) == [jobs[1]]
    said = capsys.readouterr().err
    assert f"{jobs[1].name}: failed with status 1" in said
    assert "    line 16\n" in said
    assert "line 15\n" not in said
    assert f"    it broke\n    (the whole log: {jobs[1].log})" in said
    assert f"{jobs[2].name}: starting, 3 of 3" in said
    assert f"{jobs[2].name}: done" in said
    assert jobs[2].log.read_text().endswith("line 29\n")


@pytest.mark.parametrize("received", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_job_end_and_starts_no_other(tables, received):
    jobs, before = make_jobs(tables)[:2], signal.getsignal(received)

    def interrupt():
        until = time.monotonic() + 60
        while time.monotonic() < until and not (jobs[0].log.exists() and "ready" in jobs[0].log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), received)

    threading.Thread(target=interrupt).start()
    with pytest.raises(TablesStopped) as raised:
        run_jobs(jobs, lambda job: [sys.executable, "-c", WAITING])
    assert raised.value.signal == received
    assert received.name in str(raised.value)
    assert jobs[0].log.read_text() == "ready\nsaved\n"
    assert not jobs[1].log.exists()
    assert signal.getsignal(received) is before


def test_a_job_ends_with_the_process_that_started_it(tmp_path):
    child = (
        "from lora_gen_jax.lab.tables.run import end_with_parent; import os, time; end_with_parent();"
        f" open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {json.dumps(child)}])\n"
        f"pid = {str(tmp_path / 'pid')!r}\n"
        "while not (os.path.exists(pid) and os.path.getsize(pid)): time.sleep(0.02)\n"
    )
    subprocess.run([sys.executable, "-c", parent], check=True)
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 30
    while time.monotonic() < until and runs(pid):
        time.sleep(0.05)
    assert not runs(pid)


def runs(pid):
    """Whether a process is there that is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
