"""Several processes as one training job: how they find each other, stop together and end together.

In: a `DistributedConfig`. Out: a JAX that sees the devices of all processes. On TPU pods, SLURM, Open MPI and indexed
Kubernetes jobs JAX finds the processes by what the system says; elsewhere flags name them. JAX's coordination service
ends every process once one of them has been silent for `heartbeat_seconds`, and agrees on the step after which all stop
when one of them is told to. A single process starts nothing and waits for nothing.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_gen_jax.config import DistributedConfig
from lora_gen_jax.data.tasks import stable_hash
from lora_gen_jax.errors import LoraGenError, Stopped

# How long a process waits for the others to start, and at the end, where they have just met at a barrier.
START_SECONDS, END_SECONDS = 300, 10
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_points = 0


def start(config: DistributedConfig) -> None:
    """Joins the other processes, where there are any; before JAX is used for anything else.

    Raises LoraGenError when the others do not come.
    """
    by_hand = config.coordinator is not None
    if jax.distributed.is_initialized() or config.processes == 1 or not (by_hand or found_by_the_system()):
        return
    # The collectives of CPUs; nothing to an accelerator.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            # By hand, a process takes all devices of its host.
            cluster_detection_method="deactivate" if by_hand else None,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise LoraGenError(
            f"the processes of this job did not come together: {error}",
            field="distributed.coordinator",
            remedy=f"Start all of them within {START_SECONDS} s with the same distributed.coordinator and"
            " distributed.processes, and let them reach each other's ports; for a single process set"
            " distributed.processes to 1",
        ) from error


def found_by_the_system() -> bool:
    """Whether a TPU VM, SLURM, Open MPI or an indexed Kubernetes job runs this process, so that JAX finds the others.

    JAX itself would warn in any Kubernetes pod, or ask its server, which only an indexed job is prepared for.
    """
    told = os.environ
    tasks = told.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in told else "1"
    several = max(int(tasks), int(told.get("OMPI_COMM_WORLD_SIZE", "1"))) > 1
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= told.keys()
    return several or indexed or told.get("TPU_ML_PLATFORM") == "JAX"  # JAX sets this one where it finds TPU chips


@contextmanager
def job(config: DistributedConfig) -> Iterator[None]:
    """A block that all processes do together: joined before it, left together after it.

    A process that fails leaves at once; the others end when they miss it.

    Raises LoraGenError as `start`.
    """
    start(config)
    try:
        yield
    except Stopped:
        _stop()
        raise
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:
            error.add_note("If another process was lost, start all of them again: the run goes on from its checkpoint.")
        raise
    _stop()


def _stop() -> None:
    if jax.distributed.is_initialized():
        barrier()
        jax.distributed.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler outlives its service


class StopSignals:
    """While it is entered, SIGTERM, which preempted machines get, and Ctrl-C are noted; a second one acts as before.

    In several processes JAX watches for SIGTERM and tells all of them; Ctrl-C in one is passed on as SIGTERM.

    Attributes:
        received: number of the signal that this process noted itself.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.together = jax.process_count() > 1
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for number in _SIGNALS[1:] if self.together else _SIGNALS:
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
        if self.together:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self) -> int | None:
        """The signal that ends the run here; every process asks before the first step and after each."""
        global _points
        if not self.together:
            return self.received
        # JAX has the processes stop at the number behind the largest that one of them asked for. Over all trainings
        # of a process these numbers grow, so that a signal between two of them stops the second.
        _points += 1
        if multihost_utils.reached_preemption_sync_point(_points):
            return self.received or signal.SIGTERM
        return None


def barrier() -> None:
    """Waits for all processes, until none of this one's devices exchanges anything with theirs any longer.

    JAX's own barrier (`sync_global_devices`) waits for one device a process. The others then still listen to processes
    that may be gone, and this one could not end.
    """
    if jax.process_count() == 1:
        return
    mesh = Mesh(np.array(jax.devices()), "all")
    one_each = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, PartitionSpec("all")), lambda index: np.ones(1, np.int32)
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(one_each))


def differing(text: str) -> list[int]:
    """The processes whose `text` is not process 0's; each learns the same."""
    if jax.process_count() == 1:
        return []
    digest = np.array([stable_hash(text)], np.uint64).view(np.uint32)  # JAX has no 64 bits by default
    all_PX = np.asarray(multihost_utils.process_allgather(digest))
    return np.flatnonzero((all_PX != all_PX[:1]).any(axis=1)).tolist()


def say(text: str) -> None:
    """A line on standard error, from process 0 only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
