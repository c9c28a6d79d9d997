"""What answers: an edge model with everything that a method adds to it.

In: a decoder and its weights, an adapter beside them, and what stands before every query. Out: an `EdgeModel`, which
`generate`, `stream` and `score` take, and the form in which their compiled programs read it.
"""

from typing import Any

import jax
import numpy as np
from flax import struct

from lora_gen_jax.decoder.attention import KVCache
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import DataError


class Prefix(struct.PyTreeNode):
    """What the rows of a batch begin with.

    Attributes:
        cache: keys and values of one row; slots at position -1 are padding.
        length: tokens.
        ids: the token ids; empty for a soft prompt, which has none.
        positions: that the tokens take, so that the sequences go on at this one; left out, one a token.
    """

    cache: KVCache
    length: int = struct.field(pytree_node=False)
    ids: tuple[int, ...] = struct.field(pytree_node=False, default=())
    positions: int | None = struct.field(pytree_node=False, default=None)


class EdgeModel(struct.PyTreeNode):
    """A model that answers; a method makes one of a task's prompt.

    Attributes:
        decoder: the module.
        params: its weights, with everything merged that can be.
        adapter: beside them, where a method cannot be merged: of one prompt, or of several whose rows are grouped.
        prefix: read before every query; None without.
    """

    decoder: Decoder = struct.field(pytree_node=False)
    params: Any
    adapter: Any = None
    prefix: Prefix | None = None

    @property
    def before(self) -> int:
        """Positions that the prefix takes; 0 without one."""
        if self.prefix is None:
            return 0
        return self.prefix.length if self.prefix.positions is None else self.prefix.positions

    @property
    def elsewhere(self) -> "EdgeModel":
        """The same for tokens with which no context ends: those that are read ahead, and those that are written."""
        return self if self.adapter is None else self.replace(adapter=self.adapter.elsewhere)

    @property
    def program(self) -> "EdgeModel":
        """As compiled programs take it: of a prefix only keys and values, so that another one compiles nothing."""
        prefix = None if self.prefix is None else Prefix(self.prefix.cache, 0)
        return self.replace(decoder=forward_only(self.decoder), prefix=prefix)

    def read(self, tokens_BT: Any, positions_BT: Any, **options: Any) -> Any:
        """Hidden states [B, T, D] and the cache, as `Decoder.__call__` gives them."""
        prefix = None if self.prefix is None else self.prefix.cache
        variables, options = {"params": self.params}, {"adapter": self.adapter, "prefix": prefix, **options}
        return self.decoder.apply(variables, tokens_BT, positions_BT, **options)

    def logits(self, hidden_XD: jax.Array) -> jax.Array:
        """Next-token logits [X, V], as `logits_at`."""
        return logits_at(self.decoder, self.params, hidden_XD)


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


def per_row(adapter: Any, rows: int, padded: int) -> Any:
    """An adapter with one prompt per row, so that a batch is one program whatever the mixture of prompts.

    Args:
        adapter: of P prompts; row i of the batch follows prompt i // (rows / P). None and adapters of a single
            prompt return unchanged.
        rows: real rows.
        padded: B, the rows of the array; those added follow prompt 0.

    Raises:
        DataError: when the rows do not divide among the prompts.
    """
    prompts = getattr(adapter, "prompts", 1)
    if prompts == 1:
        return adapter
    if rows % prompts:
        raise DataError(
            f"{rows} rows cannot be shared evenly by the adapter's {prompts} prompts",
            field="rows",
            remedy="pass as many each",
        )
    prompt_B = np.concatenate([np.arange(rows) // (rows // prompts), np.zeros(padded - rows, np.int64)])
    return adapter.take(prompt_B)


def require_single_prompt(adapter: Any) -> None:
    """For work that is shared by all rows.

    Raises:
        DataError: when the adapter holds several prompts.
    """
    if (prompts := getattr(adapter, "prompts", 1)) != 1:
        raise DataError(
            f"the adapter holds {prompts} prompts where one is needed", field="adapter", remedy="pass adapter.select(i)"
        )
