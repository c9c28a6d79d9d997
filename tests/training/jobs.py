"""Training jobs as a user starts them, in processes of their own, and what they leave: for tests that kill them."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import before_jax
import jax
import numpy as np
import orbax.checkpoint as ocp
from helpers import experiment, write_config

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tests" / "training" / "noted_train.py"
PR_SET_CHILD_SUBREAPER = 36


class Job:
    """A process of this one's that `subprocess` did not start, with what its `Popen` offers."""

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class JobServer:
    """`job_server.py`, which makes processes of this one's."""

    def __init__(self) -> None:
        # What a process leaves behind when it ends, this one adopts.
        assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("job_server.py"))],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> Job:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"command": command, "environment": environment, "log": str(log)}), file=self.process.stdin)
        self.process.stdin.flush()
        return Job(int(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


class Jobs:
    """Starts jobs on the tiny experiment below `root`."""

    def __init__(self, server: JobServer, root: Path):
        self.server, self.root, self.running = server, root, []
        # Where what is compiled is not the question.
        self.environment = before_jax.COMPILE_QUICKLY
        root.mkdir(parents=True)

    @contextlib.contextmanager
    def compiled_as_users(self) -> Iterator[None]:
        """What is started meanwhile."""
        self.environment = {"XLA_FLAGS": before_jax.GIVEN}
        yield
        self.environment = before_jax.COMPILE_QUICKLY

    def config(self, name: str, **train: Any) -> Path:
        """A config file of a run in a directory of that name."""
        return write_config(self.root / f"{name}.py", experiment(self.root, self.root / name, **train))

    def start(
        self, config: Path, *flags: str, devices: int = 1, name: str = "job", script: Path = TRAIN, **notes: Any
    ) -> Job:
        """A process that trains; its output goes to a file, which `said` reads. `notes` are noted_train.py's."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": str(int(jax.config.jax_enable_x64)),
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "PYTHONPATH": str(ROOT),
        }
        environment |= self.environment
        environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
        environment |= {name.upper(): str(int(value) if value is True else value) for name, value in notes.items()}
        process = self.server.start([str(script), str(config), *flags], environment, self.log(config, name))
        self.running.append(process)
        return process

    def start_together(
        self, config: Path, *flags: str, processes: int = 2, devices: int = 1, **notes: Any
    ) -> list[Job]:
        """The processes of one job, which meet on a free port of this machine."""
        coordinator = f"127.0.0.1:{free_port()}"
        shared = ("--distributed.coordinator", coordinator, "--distributed.processes", str(processes), *flags)
        return [
            self.start(
                config,
                *(*shared, "--distributed.process", str(i)),
                devices=devices,
                name=f"process{i}",
                **notes,
            )
            for i in range(processes)
        ]

    def finish_together(self, config: Path, *flags: str, devices: int = 1) -> Path:
        """Two processes train to the end; the work directory."""
        for i, process in enumerate(self.start_together(config, *flags, devices=devices)):
            assert process.wait(timeout=600) == 0, self.said(config, f"process{i}")
        return config.with_suffix("")

    def log(self, config: Path, name: str = "job") -> Path:
        return config.with_suffix(f".{name}.log")

    def said(self, config: Path, name: str = "job") -> str:
        return self.log(config, name).read_text()

    def finish(self, config: Path, *flags: str, devices: int = 1, runs: int = 1) -> Path:
        """Trains to the end; the work directory."""
        process = self.start(config, *flags, devices=devices)
        assert process.wait(timeout=600 * runs) == 0, self.said(config)
        return config.with_suffix("")

    def finish_all(self, *runs: tuple[Path, tuple[str, ...]], devices: int = 1) -> list[Path]:
        """Trains (config, flags) one after the other in one process; their work directories. The first has the log."""
        arguments = [arg for config, flags in runs for arg in ("--then", str(config), *flags)]
        self.finish(runs[0][0], *arguments[2:], devices=devices, runs=len(runs))
        return [config.with_suffix("") for config, _ in runs]

    def close(self) -> None:
        """Kills what still runs."""
        for process in self.running:
            process.kill()
            process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition: Any, process: Job, every: float = 0.02) -> bool:
    """Whether the condition came to hold while the process ran; it is asked for every so many seconds."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(every)
    raise TimeoutError("the condition never came to hold")


def metrics(directory: Path, name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of every line of metrics.jsonl that has it, in the order of the file; a torn line is left out."""
    found = []
    path = directory / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if name in line:
                found.append((line["step"], line[name]))
    return found


def saved_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(p.name) for p in (directory / "checkpoints").glob("*") if p.name.isdigit())


def saved(directory: Path) -> dict[str, Any]:
    """Everything that the newest checkpoint holds, as NumPy arrays."""
    step = directory.absolute() / "checkpoints" / str(saved_steps(directory)[-1])
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    items = ocp.args.Composite(
        generator=ocp.args.StandardRestore(None, fallback_sharding=one),
        optimizer=ocp.args.StandardRestore(None, fallback_sharding=one),
        data=ocp.args.JsonRestore(),
    )
    found = ocp.Checkpointer(ocp.CompositeCheckpointHandler()).restore(step, args=items)
    return jax.tree.map(np.asarray, {"generator": found.generator, "optimizer": found.optimizer, "data": found.data})


def largest_difference(one: Any, other: Any) -> float:
    """Between two trees of the same structure."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    gaps = jax.tree.map(lambda x, y: np.max(np.abs(np.float64(x) - np.float64(y)), initial=0.0), one, other)
    return float(max(jax.tree.leaves(gaps)))


def batches(config: Path) -> dict[str, set[str]]:
    """The hashes of the batches that each step was made on, over all attempts."""
    found: dict[str, set[str]] = {}
    for line in Path(f"{config}.batches").read_text().splitlines():
        step, digest = line.split()
        found.setdefault(step, set()).add(digest)
    return found
