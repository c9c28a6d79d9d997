"""Grouped training batches: P prompts, each read once by the cloud, with up to Q queries for the edge.

In: a sampler of groups. Out: an iterator of `Batch`es of NumPy arrays of fixed shapes. Batch number i is a pure
function of (seed, i): the order is the same on every machine, in any number of processes and after every resume.

Both sides are packed. Prompts share rows (`prompts_per_row`), long with short. The queries of a prompt share one
row of the edge's batch, each a segment of its own: short queries cost no padding, and gates stay one per row. With
`edge_reads_prompt` the row begins with the prompt as segment 0, which all queries of the row see.
"""

import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import struct

from lora_gen_jax.config import DataConfig
from lora_gen_jax.data.groups import Group, GroupSampler
from lora_gen_jax.errors import CheckpointError, DataError
from lora_gen_jax.generator.cloud import PackedPrompts, pack_prompts

if TYPE_CHECKING:
    import grain


class EdgeRows(struct.PyTreeNode):
    """P rows of the edge model, one a prompt: queries with their answers, each a segment of its own.

    Attributes:
        tokens_PT, positions_PT, segments_PT: positions start anew in each segment, behind the prompt where the edge
            reads it, and are -1 at padding.
        source_PS: where in the row the token stands whose successor is supervised.
        target_PS: that successor.
        weight_PS: 1 for a supervised token, 0 for an unused slot.
    """

    tokens_PT: Any
    positions_PT: Any
    segments_PT: Any
    source_PS: Any
    target_PS: Any
    weight_PS: Any


class Batch(EdgeRows):
    """One step's input: the rows of P prompts.

    Attributes:
        prompts: P prompts in P/M rows.
        shots: their own shots, laid out as queries; None without `data.shot_length`.
    """

    prompts: PackedPrompts
    shots: EdgeRows | None = None


_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pack_groups(groups: Sequence[Group], config: DataConfig, num_meta: int) -> Batch:
    """Arrays of a list of groups; consecutive prompts share a row of the cloud's batch."""
    rows = len(groups) // config.prompts_per_row
    prompts = pack_prompts([g.prompt for g in groups], num_meta, rows, config.cloud_length).replace(
        tasks_P=np.array([g.task for g in groups], np.int32),
        knowledge_P=np.array([g.knowledge for g in groups]),
        edge_PX=edge_prompts([g.edge_prompt for g in groups], config.edge_prompt_length),
    )
    queries = _edge_rows([(g.prefix, g.queries) for g in groups], config.edge_length, config.response_slots)
    shots = None
    if config.shot_length:
        own = [([], g.shot_queries) for g in groups]
        shots = EdgeRows(*_edge_rows(own, config.shot_length, config.response_slots))
    return Batch(*queries, prompts, shots)


def _edge_rows(rows: Sequence[tuple[list[int], Sequence[Any]]], length: int, slots: int) -> _Arrays:
    """The arrays of `EdgeRows`; a row is (its prefix, pairs of a query and its response)."""
    P = len(rows)
    tokens, positions = np.zeros((P, length), np.int32), np.full((P, length), -1, np.int32)
    segments, source = np.zeros((P, length), np.int32), np.zeros((P, slots), np.int32)
    target, weight = np.zeros((P, slots), np.int32), np.zeros((P, slots), np.float32)
    for p, (prefix, queries) in enumerate(rows):
        first = start = len(prefix)
        tokens[p, :start], positions[p, :start], slot = prefix, np.arange(start), 0
        for segment, (query, response) in enumerate(queries, start=1):
            # The last token of a response is predicted and never read.
            ids = query + response[:-1]
            end, count = start + len(ids), len(response)
            tokens[p, start:end], positions[p, start:end] = ids, first + np.arange(len(ids))
            segments[p, start:end] = segment
            source[p, slot : slot + count] = np.arange(count) + start + len(query) - 1
            target[p, slot : slot + count] = response
            weight[p, slot : slot + count] = 1.0
            start, slot = end, slot + count
    return tokens, positions, segments, source, target, weight


def edge_prompts(prompts: Sequence[Sequence[int]], length: int) -> np.ndarray | None:
    """Prompts in the edge model's ids [P, length], -1 for padding; None for a length of 0."""
    if length == 0:
        return None
    ids = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids


@dataclasses.dataclass(frozen=True)
class Shard:
    """This process's part of every batch: these rows of the cloud's batch, with their prompts; None is all of them."""

    rows: tuple[int, ...] | None = None


def build_batch(sampler: GroupSampler, seed: tuple[int, ...], shard: Shard) -> Batch:
    """This process's part of the batch that belongs to `seed`.

    Rows are packed in blocks, and every block that has a row of the part is drawn whole: what a row holds does not
    depend on who builds it. Parts that are whole blocks draw no prompt in vain.
    """
    c, total = sampler.config, sampler.config.prompts_per_step // sampler.config.prompts_per_row
    size, M = math.gcd(total, c.rows_per_block), c.prompts_per_row
    wanted, groups = range(total) if shard.rows is None else shard.rows, []
    for block in sorted({row // size for row in wanted}):
        prompts = range(block * size * M, (block + 1) * size * M)
        packed = sampler.block(seed, prompts)
        for row in wanted:
            if row // size == block:
                groups += packed[(row % size) * M : (row % size + 1) * M]
    return pack_groups(groups, c, sampler.num_meta)


_READER = 2**30
"""Batches from this number on are for the stage before the first step."""


class TrainingBatches:
    """Batches 0 to steps-1 in order, built ahead; an iterator that can be set to any place.

    Args:
        sampler: of the training split.
        seed: of the run.
        steps: batches there are.
        shard: this process's part of each.
    """

    def __init__(self, sampler: GroupSampler, seed: int, steps: int, shard: Shard):
        self.build = functools.partial(_numbered_batch, sampler, seed, shard)
        self.prompts_per_step = sampler.config.prompts_per_step
        self.workers, self.steps, self.next = sampler.config.workers, steps, 0
        self.ahead: grain.DatasetIterator | None = None
        self.pool: ProcessPoolExecutor | None = None

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> Batch:
        if self.ahead is None:
            self.ahead = iter(self._dataset())
        try:
            batch = next(self.ahead)
        except BrokenProcessPool as error:
            problem = "a process that builds batches has ended, killed or out of memory"
            remedy = "lower data.workers, and give the same command again"
            raise DataError(problem, field="data.workers", remedy=remedy) from error
        self.next += 1
        return batch

    def reader_batches(self, prompts: int) -> Iterator[Batch]:
        """Batches with at least this many prompts together, none of which a step gets."""
        for number in range(-(-prompts // self.prompts_per_step)):
            yield self.build(_READER + number)

    def get_state(self) -> dict[str, int]:
        """The place, as a checkpoint keeps it: the same whatever builds the batches."""
        return {"next_batch": self.next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on from a place that `get_state` gave, or Grain itself in checkpoints of earlier versions.

        Raises CheckpointError for a state that is neither.
        """
        place = state.get("next_batch", state.get("next_index"))
        if not isinstance(place, int):
            raise CheckpointError(
                f"the checkpoint's place in the data is {dict(state)}, which this version cannot read", field="state"
            )
        self.close()
        self.next = place

    def close(self) -> None:
        """Ends the threads and processes that build batches."""
        if self.ahead is not None:
            self.ahead.close()
            self.ahead = None
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None

    def _dataset(self) -> "grain.IterDataset":
        import grain

        build, threads = self.build, 1
        if self.workers:
            # Grain's threads each wait for a process. (Grain's own processes hand over arrays in shared memory, which
            # containers have little of, and take 25 s to end where they do not.)
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, spawn, initializer=_start_worker, initargs=(self.build,))
            build, threads = functools.partial(_build_elsewhere, self.pool), self.workers + 1
        batches = grain.MapDataset.range(self.next, self.steps).map(build)
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads + 2))


def _numbered_batch(sampler: GroupSampler, seed: int, shard: Shard, number: int) -> Batch:
    return build_batch(sampler, (seed, int(number)), shard)


def _build_elsewhere(pool: ProcessPoolExecutor, number: int) -> Batch:
    return pool.submit(_build_here, int(number)).result()


# In a worker: what it builds batches with, sent once.
_build: Callable[[int], Batch]


def _build_here(number: int) -> Batch:
    return _build(number)


def _start_worker(build: Callable[[int], Batch]) -> None:
    global _build
    _build = build
    # Devices belong to the training process: should a worker ever ask JAX for one, it gets the CPU.
    jax.config.update("jax_platforms", "cpu")
    # Ctrl-C, and what a scheduler sends to all processes, are for the training process, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A pipe that the kernel closes however the parent ends.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def validation_batches(sampler: GroupSampler, count: int, shard: Shard) -> list[Batch]:
    """The fixed batches of held-out queries; no end token is scored, so that the loss is only of the answers."""
    return [build_batch(sampler, (2**31, i), shard) for i in range(count)]
