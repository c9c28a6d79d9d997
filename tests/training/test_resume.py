"""Runs that are killed, told to stop or lose a process, and go on with the same command: bit for bit the same."""

import os
import random
import signal
import time

import jax
import numpy as np
import pytest
from jobs import batches, metrics, saved, saved_steps, wait_for

pytestmark = pytest.mark.timeout(1800)
STEPS = 36
SETTINGS = {"steps": STEPS, "checkpoint_every": 4, "validate_every": 20}
# Rarely, so that a process is lost in a step and not while both write a checkpoint.
OF_TWO = SETTINGS | {"checkpoint_every": 12}


@pytest.fixture(scope="module")
def whole(jobs):
    """The config file of a run that nothing disturbed."""
    config = jobs.config("whole", **SETTINGS)
    jobs.finish(config)
    return config


@pytest.fixture(scope="module")
def whole_of_two(jobs):
    """The same by two processes."""
    config = jobs.config("whole_of_two", **OF_TWO)
    jobs.finish_together(config)
    return config


def same_run(config, undisturbed):
    """State, order of the data and metrics are those of the undisturbed run."""
    one, other = config.with_suffix(""), undisturbed.with_suffix("")
    jax.tree.map(np.testing.assert_array_equal, saved(one), saved(other))
    assert metrics(one) == metrics(other)
    assert [step for step, _ in metrics(one)] == list(range(1, STEPS + 1))
    assert metrics(one, "validation_loss") == metrics(other, "validation_loss")
    # Every attempt at a step had the batch that belongs to it.
    assert batches(config) == batches(undisturbed)


def last_step(directory):
    return max((step for step, _ in metrics(directory)), default=0)


def test_a_run_that_is_killed_and_stopped_ends_as_if_it_had_not_been(jobs, whole):
    config = jobs.config("disturbed", **SETTINGS)
    killed(jobs, config, at=random.Random(0).randint(3, 6), workers=2)
    stopped(jobs, config, signal.SIGTERM, 143, at=12, workers=1)
    killed(jobs, config, at=20, writing=True)
    stopped(jobs, config, signal.SIGINT, 130, at=27, workers=1)
    jobs.finish(config)
    assert "resuming at step" in jobs.said(config)
    same_run(config, whole)


def killed(jobs, config, at, writing=False, workers=0):
    """A run that gets to step `at` and is killed, if asked for while it writes; its workers end with it."""
    directory = config.with_suffix("")
    flags, seconds = ("--data.workers", str(workers)), 0.02 if writing else 0.2
    # A log of its own: Python's tracker of the workers' resources says a last word after all have ended.
    process = jobs.start(config, *flags, name="killed", step_seconds=seconds)
    assert wait_for(lambda: last_step(directory) >= at, process), "the run ended before it could be killed"
    if writing:
        assert wait_for(lambda: any((directory / "checkpoints").glob("*tmp*")), process, every=0.002)
    building = [pid for pid in _children(process.pid) if "spawn_main" in _command(pid)]
    assert len(building) == workers
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    end = time.monotonic() + 20
    while any("spawn_main" in _command(pid) for pid in building):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.1)


def stopped(jobs, config, number, status, at, workers=0):
    """A run that is told to stop at about step `at`, and saves the step that the signal came in."""
    directory = config.with_suffix("")
    process = jobs.start(config, "--data.workers", str(workers), step_seconds=0.2)
    assert wait_for(lambda: last_step(directory) >= at, process)
    before = last_step(directory)
    process.send_signal(number)
    after = last_step(directory)
    assert process.wait(timeout=300) == status
    # A step is known when the next one runs; the signal may find the start of the one after that.
    step = saved_steps(directory)[-1]
    assert before + 1 <= step <= after + 2
    assert last_step(directory) == step
    said = jobs.said(config)
    end = f"stopped by {number.name} at step {step}: the checkpoint is saved, the same command goes on"
    # Python's own resource tracker, a process of its own, may have the last word.
    own = [line for line in said.splitlines() if "resource_tracker" not in line and "warnings.warn" not in line]
    assert own[-1] == end
    assert "Traceback" not in said


def _children(parent):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == parent:
                    found.append(pid)
        except OSError:
            continue
    return found


def _command(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


def test_two_processes_stop_together_and_a_lost_one_ends_the_other_and_the_job_goes_on(jobs, whole_of_two):
    config = jobs.config("two", **OF_TWO)
    directory = config.with_suffix("")
    processes = jobs.start_together(config, step_seconds=0.1)
    assert wait_for(lambda: last_step(directory) >= 5, processes[0])
    processes[1].terminate()
    assert [process.wait(timeout=60) for process in processes] == [143, 143]
    step = saved_steps(directory)[-1]
    assert 6 <= step < 20
    line = f"stopped by SIGTERM at step {step}: the checkpoint is saved, the same command goes on"
    assert line in jobs.said(config, "process0")
    # Told before the first step, while they load and compile, they stop where they were.
    processes = jobs.start_together(config, told_early=True)
    assert [process.wait(timeout=300) for process in processes] == [143, 143]
    assert line in jobs.said(config, "process0")
    assert saved_steps(directory)[-1] == step
    goes_on_when_one_is_lost(jobs, config)
    jobs.finish_together(config)
    same_run(config, whole_of_two)


def goes_on_when_one_is_lost(jobs, config):
    """First process 1 is lost, then process 0, which coordinates the job: the other one ends by itself."""
    directory = config.with_suffix("")
    for lost, at in ((1, 17), (0, 30)):
        processes = jobs.start_together(config, "--distributed.heartbeat-seconds", "10", step_seconds=0.1)
        assert wait_for(lambda at=at: last_step(directory) >= at, processes[0])
        processes[lost].kill()
        assert processes[1 - lost].wait(timeout=120) != 0
