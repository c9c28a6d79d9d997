"""Two processes that are told to stop: in their first training, in one after it, and between the two."""

import signal
import subprocess
import sys

import pytest
from jobs import free_port

RUNS = """
import os, signal, sys, time
from lora_gen_jax.config import DistributedConfig
from lora_gen_jax.errors import Stopped
from lora_gen_jax.training import distributed

port, process, told_in, number = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])

def tell():
    if process == 1:
        os.kill(os.getpid(), number)

try:
    with distributed.job(DistributedConfig(f"127.0.0.1:{port}", 2, process)):
        for run in (1, 2):
            if told_in == run - 0.5:
                tell()
                time.sleep(3)  # until JAX has told both
            with distributed.StopSignals() as signals:
                for step in range(300 if told_in == run else 16):
                    if told_in == run and step == 3:
                        tell()
                    time.sleep(0.1)
                    if stop := signals.stop():
                        print("stopped in run", run, "at", step, "by", int(stop), flush=True)
                        raise Stopped(stop, step)
                print("ended", run, flush=True)
except Stopped:
    sys.exit()
tell()
time.sleep(3 - 2 * process)
os._exit(0)
"""


def told(told_in, number):
    port = str(free_port())
    commands = [[sys.executable, "-c", RUNS, port, str(i), str(told_in), str(int(number))] for i in range(2)]
    started = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        said = [process.communicate(timeout=240)[0].splitlines() for process in started]
        own = [[line for line in lines if line and "[Gloo]" not in line] for lines in said]
        return [(lines, process.returncode) for lines, process in zip(own, started, strict=True)]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize(
    ("run", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGINT)], ids=["first", "second", "ctrl_c"]
)
def test_both_stop_after_the_same_step_in_every_training_of_a_process(run, number):
    (one, first), (two, second) = told(run, number)
    assert (first, second) == (0, 0)
    assert one[:-1] == two[:-1] == ["ended 1"][: run - 1]
    stop, by = one[-1].split(" by ")
    assert stop.startswith(f"stopped in run {run} at ")
    assert 3 <= int(stop.split()[-1]) < 300
    assert two[-1] == f"{stop} by {int(number)}"
    assert by == str(int(signal.SIGTERM))


@pytest.mark.parametrize("run", [1, 2])
def test_told_before_a_training_both_stop_before_its_first_step(run):
    (one, first), (two, second) = told(run - 0.5, signal.SIGTERM)
    assert (first, second) == (0, 0)
    stop = f"stopped in run {run} at 0 by {int(signal.SIGTERM)}"
    assert one == two == [*["ended 1"][: run - 1], stop]


def test_after_the_job_sigterm_ends_a_process():
    (_, _), (two, second) = told(3, signal.SIGTERM)
    assert two == ["ended 1", "ended 2"]
    assert second == -signal.SIGTERM
