"""The decoder as decoding and scoring call it: no gradients, logits for chosen positions only.

In: a decoder, its parameters, hidden states [X, D] of any X positions. Out: logits [X, V].
"""

from typing import Any

import jax

from lora_gen_jax.decoder.model import Decoder


def forward_only(decoder: Decoder) -> Decoder:
    """The decoder without what only training wants; the parameters are the same.

    Rematerialization does nothing here. One layer per iteration decodes fastest: with more, XLA on CPU copies the
    weights of that many layers out of the stack before their matmuls, and they no longer fit the processor's cache.
    """
    return decoder.clone(remat="none", unroll=1)


def logits_at(decoder: Decoder, params: Any, hidden_XD: jax.Array) -> jax.Array:
    """Next-token logits [X, V] in fp32 for X final hidden states of any rows and positions."""
    logits_1XV = decoder.apply({"params": params}, hidden_XD[None], method="logits")
    assert isinstance(logits_1XV, jax.Array)
    return logits_1XV[0]
