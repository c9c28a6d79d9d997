"""Training jobs as a user starts them, in processes of their own, and what they leave: for tests that kill them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import before_jax
import jax
import numpy as np
import orbax.checkpoint as ocp
from helpers import experiment, write_config

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tests" / "training" / "noted_train.py"


class Jobs:
    """Starts jobs on the tiny experiment below `root`."""

    def __init__(self, root: Path):
        self.root, self.running = root, []
        # Where what is compiled is not the question, as quickly as in this process (`before_jax.QUICK`).
        self.environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        self.flags = os.environ["XLA_FLAGS"]
        root.mkdir(parents=True)

    def compile_as_users(self) -> None:
        """From now on."""
        self.environment.clear()
        self.flags = before_jax.GIVEN

    def config(self, name: str, **train: Any) -> Path:
        """A config file of a run in a directory of that name."""
        return write_config(self.root / f"{name}.py", experiment(self.root, self.root / name, **train))

    def start(
        self, config: Path, *flags: str, devices: int = 1, name: str = "job", script: Path = TRAIN, **notes: Any
    ) -> subprocess.Popen:
        """A process that trains; its output goes to a file, which `said` reads. `notes` are noted_train.py's."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_X64": str(int(jax.config.jax_enable_x64)),
            # Of a flag that is given twice the last counts.
            "XLA_FLAGS": f"{self.flags} --xla_force_host_platform_device_count={devices}",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        environment |= self.environment
        environment |= {name.upper(): str(int(value) if value is True else value) for name, value in notes.items()}
        command = [sys.executable, str(script), str(config), *flags]
        with open(self.log(config, name), "w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.running.append(process)
        return process

    def start_together(
        self, config: Path, *flags: str, processes: int = 2, devices: int = 1, **notes: Any
    ) -> list[subprocess.Popen]:
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
            assert process.wait(timeout=240) == 0, self.said(config, f"process{i}")
        return config.with_suffix("")

    def log(self, config: Path, name: str = "job") -> Path:
        return config.with_suffix(f".{name}.log")

    def said(self, config: Path, name: str = "job") -> str:
        return self.log(config, name).read_text()

    def finish(self, config: Path, *flags: str, devices: int = 1, runs: int = 1) -> Path:
        """Trains to the end; the work directory."""
        process = self.start(config, *flags, devices=devices)
        assert process.wait(timeout=240 * runs) == 0, self.said(config)
        return config.with_suffix("")

    def finish_all(self, *runs: tuple[Path, tuple[str, ...]], devices: int = 1) -> list[Path]:
        """Trains (config, flags) one after the other in one process; their work directories. The first has the log."""
        arguments = [arg for config, flags in runs for arg in ("--then", str(config), *flags)]
        self.finish(runs[0][0], *arguments[2:], devices=devices, runs=len(runs))
        return [config.with_suffix("") for config, _ in runs]

    def close(self) -> None:
        """Kills what still runs."""
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition: Any, process: subprocess.Popen, every: float = 0.02) -> bool:
    """Whether the condition came to hold while the process ran; it is asked for every so many seconds."""
    end = time.monotonic() + 120
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
