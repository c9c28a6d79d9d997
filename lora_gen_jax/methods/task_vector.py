"""A task vector: the prompted edge model's state before it answers, put into the unprompted one; nothing is trained.

In: a task's prompt and further training queries. The edge model reads each query behind the prompt; the mean of its
hidden states at the queries' last tokens, after a given layer, is the vector. Out: the edge model, whose state after
that layer is the vector at the last token of every query. The tokens before it and those of the answer are unchanged.
(Hendel et al. 2023, arXiv:2310.15916, who call the states of other queries' answers so.)
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lora_gen_jax.adapters.protocol import AdapterBase
from lora_gen_jax.buckets import bucket, pad_rows
from lora_gen_jax.config import Config
from lora_gen_jax.data.encode import shared_row
from lora_gen_jax.decoder.layers import POOLED, RECORDS, records_of
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import DataError
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.prefix import encode_prefix, past_prefix
from lora_gen_jax.methods.method import Method, Prompt, Specialize, Traits
from lora_gen_jax.models import Model, Pair
from lora_gen_jax.placement import padded_rows, place_rows

if TYPE_CHECKING:
    from lora_gen_jax.training.checkpoint import Loaded


class TaskVector(AdapterBase):
    """A state that stands in the place of a query's last one.

    Attributes:
        scanned: {"vector": [L, D], "here": [L], whether the layer is the one}.
        shared: nothing.
    """

    scanned: Any
    shared: Any = None

    def stream(self, x_BTD: jax.Array, last_BT: jax.Array) -> jax.Array:
        """The vector at the context's last token, only after its layer."""
        here_BT1 = (last_BT & self.scanned["here"])[:, :, None]
        return jnp.where(here_BT1, self.scanned["vector"].astype(x_BTD.dtype)[None, None], x_BTD)

    @property
    def elsewhere(self) -> None:
        """Nothing: an answer's tokens follow the edge model as it is."""
        return None


def task_vector(edge: Model, prompt: Prompt, depth: float) -> TaskVector:
    """Asks the prompted model and keeps what it thinks.

    Args:
        edge: the model.
        prompt: with at least one further query.
        depth: after which share of the layers; at least after the first.

    Raises:
        DataError: without queries, or as `encode_prefix`.
    """
    if not prompt.queries:
        raise DataError(
            "method task_vector asks training rows beside the shots, and the task has none",
            field="eval.shots",
            remedy="lower eval.shots, or leave the method out",
        )
    # Every row keeps a token of its own.
    shared, pairs = shared_row(edge.encoder.query(one, False, prompt.text) for one in prompt.queries)
    model = edge.plain.replace(prefix=encode_prefix(edge.plain, shared) if shared else None)
    rest = [query for query, _ in pairs]
    tokens_BT, positions_BT = pad_rows(rest, bucket(max(map(len, rest))), padded_rows(len(rest), edge.params))
    batch = place_rows((tokens_BT, past_prefix(positions_BT, model.before)), edge.params)
    states_LBD = _last_states(model.program, batch)
    L = edge.config.num_layers
    vector_LD = jnp.mean(states_LBD[:, : len(rest)], axis=1)
    return TaskVector({"vector": vector_LD, "here": jnp.arange(1, L + 1) == max(round(depth * L), 1)})


@jax.jit
def _last_states(model: EdgeModel, batch: tuple[Any, Any]) -> jax.Array:
    """What every layer gives at each row's last token, [L, B, D] in fp32."""
    tokens_BT, positions_BT = batch
    pool_BMT = jax.nn.one_hot(jnp.argmax(positions_BT, axis=1), tokens_BT.shape[1])[:, None]
    prefix = None if model.prefix is None else model.prefix.cache

    def states(module: Decoder) -> Any:
        return module.encode(module.embed(tokens_BT), positions_BT, prefix=prefix, pool_BMT=pool_BMT)

    _, recorded = model.decoder.apply({"params": model.params}, method=states, mutable=[RECORDS])
    return records_of(recorded)[POOLED][:, :, 0]


def specialize(config: Config, pair: Pair, loaded: "Loaded | None") -> Specialize:
    """The edge model with the prompt's vector; without a prompt the base."""

    def specialized(prompt: Prompt | None) -> EdgeModel:
        adapter = None if prompt is None else task_vector(pair.edge, prompt, config.eval.vector_layer)
        return pair.edge.plain.replace(adapter=adapter)

    return specialized


METHOD = Method(
    key="task_vector",
    title="task vector",
    traits=Traits(compresses_context=True, merged=False, training_free=True, transfers=False),
    build=None,
    specialize=specialize,
    depends_on_prompt=True,
    needs_shots=True,
    settings=lambda config: config.eval.vector_layer,
)
