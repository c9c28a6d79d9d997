"""Prompts to adapters, at inference: what a specialisation is made with.

In: a generator's variables, the cloud model's weights and prompts as token ids. Out: `Generated`, one entry a
prompt. The length is bucketed, so that a new prompt does not recompile.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from lora_gen_jax.errors import DataError
from lora_gen_jax.generator.cloud import pack_prompts
from lora_gen_jax.generator.lora_gen import Generated, LoRAGen
from lora_gen_jax.inference.buckets import bucket, power_of_two


@partial(jax.jit, static_argnums=0)
def _generate(generator: LoRAGen, variables: Any, frozen_cloud: Any, prompts: Any) -> Generated:
    return generator.apply(variables, frozen_cloud, prompts)


def specialize(
    generator: LoRAGen, variables: Any, frozen_cloud: Any, prompts: Sequence[Sequence[int]], limit: int | None = None
) -> Generated:
    """Reads every prompt once and generates its adapter.

    Args:
        generator: the module.
        variables: its params and batch statistics, from a checkpoint.
        frozen_cloud: the cloud model's weights.
        prompts: token ids of each prompt.
        limit: longest prompt in tokens; the cloud model's positions less the meta tokens when left out.

    Returns:
        an adapter of P prompts; ``adapter.select(p)`` is one prompt's, ready for `merge`.

    Raises:
        DataError: for an empty prompt, or one longer than the limit.
    """
    layers = generator.edge.num_layers
    room = generator.cloud.max_positions - layers
    limit = room if limit is None else min(limit, room)
    for i, prompt in enumerate(prompts):
        if len(prompt) > limit:
            raise DataError(
                f"prompt {i} has {len(prompt)} tokens, the limit is {limit} ({layers} meta tokens follow it):"
                " shorten it, or give fewer shots"
            )
    rows, length = power_of_two(len(prompts)), bucket(max(map(len, prompts), default=0) + layers)
    # Rows that only fill the bucket repeat the first prompt and are cut off again.
    padded = [list(p) for p in prompts] + [list(prompts[0])] * (rows - len(prompts))
    packed = pack_prompts(padded, layers, rows, length)
    generated = _generate(generator, variables, frozen_cloud, jax.tree.map(np.asarray, packed))
    if rows == len(prompts):
        return generated
    gates = generated.gates_PLE
    return Generated(
        adapter=_first(generated.adapter, len(prompts)), gates_PLE=None if gates is None else gates[: len(prompts)]
    )


def _first(adapter: Any, count: int) -> Any:
    if "gates" in adapter.scanned:
        return adapter.replace(scanned={**adapter.scanned, "gates": adapter.scanned["gates"][:, :count]})
    return adapter.replace(scanned=jax.tree.map(lambda x: x[:, :count], adapter.scanned))
