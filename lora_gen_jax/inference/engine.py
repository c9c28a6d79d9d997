"""A batch whose rows come and go: sequences of any length, each with its own specialization, by one set of programs.

In: `GenerationRequest`s (prompt ids, gates, how to draw), and a model with its expert pool. Out: `Progress` of each
row after every call. The weights stay as they are: each row's gates choose among the pool's experts beside them, so
that a row follows another specialization by L·E numbers.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lora_gen_jax.buckets import pad_rows, power_of_two
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.inference.continuous import STOPS, Drawn, Joining, Rows, decode, empty_rows, join, release
from lora_gen_jax.inference.decode import Generation
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.sampling import Sampling
from lora_gen_jax.inference.work import (
    FINISH,
    GenerationRequest,
    Progress,
    check_factors,
    check_work,
)
from lora_gen_jax.placement import check_room, mesh_context, mesh_of, padded_rows
from lora_gen_jax.sharding import spec

PREFILL_TOKENS = 2048
"""Prompt tokens that are read together, padding included."""
# Prompts are read 1, 4, 16, … at a time and padded to 16, 32, 64, … tokens: a program for each.
_GROUPS = 4
_SMALLEST_PROMPT = 16


class Engine:
    """A batch of B rows on the device; not safe to call from several threads at once.

    Args:
        model: unmerged; its adapter has the pool (`GatedPool`; its gates do not matter), or is None, which serves only
            the base model.
        rows: B, sequences at the same time; on a mesh, rounded up to what it can share evenly.
        slots: S; prompt and new tokens of a sequence are at most this many.
        rank: X, of the factors that a row has room for beside its gates; every row pays for them in every step.

    Raises:
        ConfigError: for no rows, more slots than the model has positions, or more of both than there is memory for.
    """

    def __init__(self, model: EdgeModel, *, rows: int, slots: int, rank: int = 0):
        decoder, params, pool = model.decoder, model.params, model.adapter
        if rows < 1:
            raise ConfigError(f"rows is {rows}", field="rows", remedy="serve at least one sequence at a time")
        if not 2 <= slots <= decoder.config.max_positions:
            most = decoder.config.max_positions
            raise ConfigError(
                f"context is {slots} tokens",
                field="context",
                remedy=f"give 2 to {most}, which the edge model has positions for",
            )
        self.slots, self.rows = slots, padded_rows(rows, params) if mesh_of(params) else rows
        if pool is not None:
            # Of the pool's own gates one prompt's are kept: they say how many a layer has.
            pool = pool.take(np.array([0])).replace(dropout_rate=0.0)
        self.model = model.replace(adapter=pool).program
        self.rank, shape = 0 if pool is None else rank, (self.rows, slots)
        # Before anything is made of these numbers: they come from flags.
        kept = jax.eval_shape(lambda: empty_rows(decoder.config, shape, decoder.dtype))
        check_room(kept, params, f"{rows} rows of {slots} tokens")
        gates, factors = self._gates(self.rows, []), self._factors(self.rows, [])
        self.state = self._placed(empty_rows(decoder.config, shape, decoder.dtype, gates, factors))
        self.free = list(range(self.rows))[::-1]

    @property
    def busy(self) -> int:
        """Rows that generate."""
        return self.rows - len(self.free)

    def check(self, work: GenerationRequest) -> None:
        """Raises DataError or ConfigError for a work that cannot be done, as `check_work`."""
        check_work(work, self.model, self.slots)
        check_factors(work, self.rank)

    def admit(self, works: Sequence[GenerationRequest]) -> tuple[list[int], list[Progress]]:
        """Reads the prompts of checked works, at most as many as there are free rows.

        Returns:
            the row of each work, and what the rows gained: a first token each.
        """
        rows, progress = [self.free.pop() for _ in works], []
        # Neighbours in length together: a batch is padded to its longest.
        order = sorted(range(len(works)), key=lambda i: len(works[i].ids))
        while order:
            group, length = self._next_group([len(works[i].ids) for i in order])
            indices, order = order[:group], order[group:]
            drawn = self._join([works[i] for i in indices], [rows[i] for i in indices], (group, length))
            progress += self._progress(drawn, [rows[i] for i in indices], range(group))
        return rows, progress

    def step(self, eager: bool = False) -> list[Progress]:
        """Decodes up to `STEPS` tokens for every busy row.

        Args:
            eager: return as soon as a row has ended, because others wait for it.
        """
        busy = sorted(set(range(self.rows)) - set(self.free))
        if not busy:
            return []
        with mesh_context(self.model.params):
            self.state, drawn = decode(self.model, self.state, np.bool_(eager))
        return self._progress(drawn, busy, busy)

    def run(self, works: Sequence[GenerationRequest], done: Callable[[int, Generation], None]) -> None:
        """Generates all of checked works, in whatever order they become ready; no other work may be running.

        Args:
            works: as many as there are.
            done: told the place of each work in `works` and what it became.
        """
        waiting, running = collections.deque(range(len(works))), dict[int, int]()
        ids: list[list[int]] = [[] for _ in works]
        logprobs: list[list[float]] = [[] for _ in works]

        def note(progress: Sequence[Progress]) -> None:
            for row, new, new_logprobs, finish in progress:
                i = running[row]
                ids[i] += new
                logprobs[i] += new_logprobs
                if finish is not None:
                    done(i, Generation(ids[i], finish, logprobs[i]))

        while waiting or self.busy:
            joining = [waiting.popleft() for _ in range(min(len(waiting), len(self.free)))]
            if joining:
                rows, progress = self.admit([works[i] for i in joining])
                running |= dict(zip(rows, joining, strict=True))
                note(progress)
            note(self.step(eager=bool(waiting)))

    def cancel(self, row: int) -> None:
        """Frees a busy row; what it has generated is lost."""
        self.state = release(self.state, np.int32(row))
        self.free.append(row)

    def _progress(self, drawn: Drawn, rows: Sequence[int], places: Sequence[int]) -> list[Progress]:
        id_BN, logprob_BN, emitted_B, finish_B = jax.device_get(
            (drawn.id_BN, drawn.logprob_BN, drawn.emitted_B, drawn.finish_B)
        )
        progress = []
        for row, place in zip(rows, places, strict=True):
            count, finish = int(emitted_B[place]), FINISH[int(finish_B[place])]
            ids, logprobs = id_BN[place, :count].tolist(), logprob_BN[place, :count].tolist()
            progress.append(Progress(row, ids, logprobs, finish))
            if finish is not None:
                self.free.append(row)
        return progress

    def warm_up(self) -> None:
        """Compiles what any work will need, so that none waits for it; nothing is generated."""
        length = _SMALLEST_PROMPT
        while length <= self._prompt_length(self.slots - 1):
            count = 1
            while count <= self.rows and (count == 1 or count * length <= PREFILL_TOKENS):
                self._join([], [], (count, length))
                count *= _GROUPS
            length *= 2
        with mesh_context(self.model.params):
            self.state, _ = decode(self.model, self.state, np.bool_(False))
        self.state = release(self.state, np.int32(0))

    def _join(self, works: Sequence[GenerationRequest], rows: Sequence[int], shape: tuple[int, int]) -> Drawn:
        joining = self._joining(works, rows, shape)
        with mesh_context(self.model.params):
            self.state, drawn = join(self.model, self.state, joining)
        return drawn

    def _next_group(self, lengths: Sequence[int]) -> tuple[int, int]:
        """How many of the shortest prompts are read together, and the length they are padded to; of few kinds."""
        count = 1
        while _GROUPS * count <= len(lengths):
            length = self._prompt_length(lengths[_GROUPS * count - 1])
            if _GROUPS * count * length > PREFILL_TOKENS:
                break
            count *= _GROUPS
        return count, self._prompt_length(lengths[count - 1])

    def _prompt_length(self, longest: int) -> int:
        return max(_SMALLEST_PROMPT, power_of_two(longest))

    def _joining(self, works: Sequence[GenerationRequest], rows: Sequence[int], shape: tuple[int, int]) -> Joining:
        """Works as arrays of R rows and T tokens; without works, all of it is padding."""
        count, padded, length = len(works), padded_rows(shape[0], self.model.params), shape[1]
        tokens_RT, positions_RT = pad_rows([work.ids for work in works], length, padded)

        def column(values: Sequence[Any], fill: Any, dtype: Any) -> np.ndarray:
            return np.array([*values, *[fill] * (padded - count)], dtype)

        stop_RX = np.full((padded, STOPS), -1, np.int32)
        settings = [work.settings for work in works]
        for i, one in enumerate(settings):
            stop_RX[i, : len(one.stop_ids)] = one.stop_ids
        return Joining(
            tokens_RT=tokens_RT,
            positions_RT=positions_RT,
            row_R=column(rows, self.rows, np.int32),
            gates=self._gates(padded, works),
            left_R=column([one.max_new_tokens for one in settings], 0, np.int32),
            stop_RX=stop_RX,
            sampling=Sampling(
                column([one.sampling.temperature for one in settings], 0.0, float),
                column([one.sampling.top_k for one in settings], 0, np.int32),
                column([one.sampling.top_p for one in settings], 1.0, float),
            ),
            seed_R=column([one.seed for one in settings], 0, np.uint32),
            factors=self._factors(padded, works),
        )

    def _gates(self, rows: int, works: Sequence[GenerationRequest]) -> Any:
        """`Gates` [L, rows, K] of works, zeros elsewhere; None without a pool."""
        if self.model.adapter is None:
            return None
        gates = jax.tree.map(lambda x: np.zeros((len(x), rows, x.shape[-1]), x.dtype), self.model.adapter.gates)
        for i, work in enumerate(works):
            if (own := work.gates) is None:
                continue
            if gates.index is None:
                own = Gates.of_all(own.dense())
            for into, values in zip(jax.tree.leaves(gates), jax.tree.leaves(own), strict=True):
                into[:, i, : values.shape[-1]] = values
        return gates

    def _factors(self, rows: int, works: Sequence[GenerationRequest]) -> Any:
        """{site: {"a": [L, rows, inputs, X], "b": …}} of works, zeros elsewhere; None without a rank."""
        if self.rank == 0:
            return None
        layers, filled = self.model.decoder.config.num_layers, {}
        for site, pair in self.model.adapter.pool.items():
            a = np.zeros((layers, rows, pair["a"].shape[-2], self.rank), np.float32)
            b = np.zeros((layers, rows, self.rank, pair["b"].shape[-1]), np.float32)
            for i, work in enumerate(works):
                if (own := work.factors.get(site)) is not None:
                    a[:, i, :, : own["a"].shape[-1]], b[:, i, : own["b"].shape[-2]] = own["a"], own["b"]
            filled[site] = {"a": a, "b": b}
        return filled

    def _placed(self, state: Rows) -> Rows:
        """Rows split over the mesh of the weights, where there is one."""
        if (mesh := mesh_of(self.model.params)) is None:
            # Copies: donating must not free an array that two fields share.
            return jax.tree.map(jnp.copy, state)
        by_layer, by_row, all_of_it = (NamedSharding(mesh, spec(*axes)) for axes in ((None, "batch"), ("batch",), ()))

        def placed(path: Any, x: jax.Array) -> jax.Array:
            layered = getattr(path[-1], "name", "").startswith(("k_L", "v_L")) or path[0].name in ("gates", "factors")
            sharding = by_layer if layered else by_row if x.ndim else all_of_it
            return jax.device_put(x, sharding, may_alias=False)

        return jax.tree_util.tree_map_with_path(placed, state)
