"""Several processes as one training job: how they find each other, wait for each other and end together.

In: a `DistributedConfig`. Out: a JAX that sees the devices of all processes. On TPU pods, SLURM, Open MPI and indexed
Kubernetes jobs processes find each other by what the system says; elsewhere flags name them. A single process starts
nothing and waits for nothing.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from lora_gen_jax.config import DistributedConfig
from lora_gen_jax.data.tasks import stable_hash
from lora_gen_jax.errors import LoraGenError, Stopped
from lora_gen_jax.training.peers import Peers

log = logging.getLogger(__name__)
# How long a process waits for the others to start, and at the end, where they have just met at a barrier.
START_SECONDS, END_SECONDS = 300, 10

_peers: Peers | None = None


def start(config: DistributedConfig) -> None:
    """Joins the other processes, where there are any; before JAX is used for anything else.

    Raises:
        LoraGenError: when the others do not come.
    """
    global _peers
    by_hand = config.coordinator is not None
    if jax.distributed.is_initialized() or config.processes == 1 or not (by_hand or detected_processes() > 1):
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
            " distributed.processes, and let them reach each other's ports",
        ) from error
    _peers = _connect(config.heartbeat_seconds)


@contextmanager
def job(config: DistributedConfig) -> Iterator[None]:
    """A block that all processes do together: joined before it, left after it, as `start` and `stop`.

    Raises:
        LoraGenError: as `start`.
    """
    try:
        start(config)
        yield
        stop()
    except Stopped:
        stop()
        raise
    except BaseException:
        stop(failed=True)
        raise


def _connect(seconds: int) -> Peers | None:
    state = jax_distributed.global_state
    host = str(state.coordinator_address).rsplit(":", 1)[0].strip("[]")
    try:
        return Peers(state.client, host, state.process_id, state.num_processes, seconds)
    except (RuntimeError, OSError) as error:
        log.warning("no connection to process 0 (%s): JAX alone will notice a lost process, in %d s", error, seconds)
        return None


def detected_processes() -> int:
    """How many processes the system (a TPU pod, SLURM, Open MPI, an indexed Kubernetes job) says there are; else 1."""
    for env in ClusterEnv._cluster_types:
        # Inside Kubernetes, JAX warns or asks its server, which only an indexed job is prepared for.
        plain_pod = env.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ
        if not env.opt_in_only_method and not plain_pod and env.is_env_present():
            return env.get_process_count()
    return 1


def barrier(name: str) -> None:
    """Waits for all processes."""
    multihost_utils.sync_global_devices(name)


def differing(text: str) -> list[int]:
    """The processes whose `text` is not process 0's; each learns the same."""
    if jax.process_count() == 1:
        return []
    digest = np.array([stable_hash(text)], np.uint64).view(np.uint32)  # JAX has no 64 bits by default
    all_PX = np.asarray(multihost_utils.process_allgather(digest))
    return np.flatnonzero((all_PX != all_PX[:1]).any(axis=1)).tolist()


def say(text: str) -> None:
    """A line on standard error, from process 0 alone."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def note(step: int, checkpoints: Path) -> None:
    """How far training is, and where its checkpoints lie: for the message when a process is lost."""
    if _peers is not None:
        _peers.at(step, checkpoints)


def await_verdict() -> None:
    """After an error of the runtime: where a lost process is the cause, this one ends here, with that message."""
    if _peers is not None:
        time.sleep(5)


def stop(failed: bool = False) -> None:
    """Leaves the job: together with all others, or at once where this process has failed."""
    global _peers
    if not jax.distributed.is_initialized():
        return
    if _peers is not None and failed:
        _peers.cut()
    elif not failed:
        barrier("end")
        if _peers is not None:
            _peers.end()
        barrier("told")
        jax.distributed.shutdown()
    _peers = None
