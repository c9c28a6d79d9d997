"""What training expects of a method: a Linen module from prompts to an adapter.

In: the frozen weights of the model that reads the prompts, and the prompts. Out: `Generated`.
"""

from typing import Any

import flax.linen as nn
import jax
from flax import struct

from lora_gen_jax.generator.cloud import PackedPrompts


class Generated(struct.PyTreeNode):
    """What a method says about P prompts; LoRA-Gen gives an adapter and gates.

    Attributes:
        adapter: `GatedPool`, or `PromptLoRA` for direct generation; `select(p)` is one prompt's.
        gates: `Gates` [P, L, K]; None for direct generation, and for other methods.
        logits_PLE: what the router made the gates of, those of experts that were not chosen included; None without.
        soft_PND: embeddings of N soft tokens that the edge reads before each query, fp32; None without.
        losses: {name: scalar} of what was computed on the way and is trained too; None without.
    """

    adapter: Any
    gates: Any = None
    logits_PLE: Any = None
    soft_PND: Any = None
    losses: Any = None


class TrainedModule(nn.Module):
    """The base of every trained method: its ``params`` and ``batch_stats`` are what a checkpoint holds.

    Attributes:
        reader: whose frozen weights the module is called with: "cloud", "edge", or None for a method that reads none.
    """

    reader = None

    def __call__(self, frozen: Any, prompts: PackedPrompts, train: bool = False) -> Generated:
        """The adapter of P prompts.

        Args:
            frozen: weights of the model that `reader` names, else None.
            prompts: of the batch.
            train: with dropout, batch statistics and losses; pass ``mutable=["batch_stats"]`` and the rngs "dropout"
                and "gumbel".
        """
        raise NotImplementedError

    def auxiliary(self, generated: Generated, records: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        """What is added to the loss of the answers, already weighted, and metrics to be logged.

        Args:
            generated: what the call gave.
            records: {site: [L, P, T, X]}: what the adapter recorded while the edge read the batch.
            batch: the `Batch`.
        """
        return 0.0, {}
