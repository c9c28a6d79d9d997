"""Prompts to adapters, at inference: what a specialization is made with.

In: a generator's variables, the cloud model's weights and prompts as token ids. Out: `Generated`, one entry a
prompt. The length is bucketed, so that a new prompt does not recompile; rows are split over the devices that the cloud
model's weights lie on.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from lora_gen_jax.buckets import bucket, check_tokens
from lora_gen_jax.errors import DataError
from lora_gen_jax.generator.cloud import pack_prompts
from lora_gen_jax.generator.lora_gen import Generated, LoRAGen
from lora_gen_jax.placement import mesh_context, padded_rows, place_rows


@partial(jax.jit, static_argnums=0)
def _generate(generator: LoRAGen, variables: Any, frozen_cloud: Any, prompts: Any) -> Any:
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
        DataError: for no prompt, an empty one, one longer than the limit, or a token id that the cloud model lacks.
    """
    if len(prompts) == 0:
        raise DataError("there is no prompt to specialize for", field="prompts", remedy="give at least one")
    layers = generator.edge.num_layers
    cloud = generator.decoder.config
    room = cloud.max_positions - layers
    limit = room if limit is None else min(limit, room)
    for i, prompt in enumerate(prompts):
        if len(prompt) > limit:
            raise DataError(
                f"prompt {i} has {len(prompt)} tokens, the limit is {limit} ({layers} meta tokens follow it)",
                field=f"prompts.{i}",
                code="too long",
                remedy="shorten it, or give fewer shots",
            )
        check_tokens(prompt, cloud.vocab_size, f"prompts.{i}")
    rows, length = padded_rows(len(prompts), frozen_cloud), bucket(max(map(len, prompts)) + layers)
    # Rows that only fill the bucket repeat the first prompt and are cut off again.
    padded = [list(p) for p in prompts] + [list(prompts[0])] * (rows - len(prompts))
    packed = place_rows(pack_prompts(padded, layers, rows, length), frozen_cloud)
    with mesh_context(frozen_cloud):
        generated = _generate(generator, variables, frozen_cloud, packed)
    if rows == len(prompts):
        return generated
    wanted = np.arange(len(prompts))
    gates, logits_PLE = jax.tree.map(lambda x: x[wanted], (generated.gates, generated.logits_PLE))
    return Generated(generated.adapter.take(wanted), gates, logits_PLE)
