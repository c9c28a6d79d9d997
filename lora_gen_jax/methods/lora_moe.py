"""LoRAMoE: every linear layer of the FFN has a router of its own, which mixes E low-rank experts for each token.

In: nothing but shapes. Out: `Generated` with a `LoRAMoEAdapter`, the same for every prompt:

    y = W0·x + Σ_e softmax(Wg·x)_e · (α/r)·B_e·A_e·dropout(x)        all E experts, no top-k

The weights of the experts depend on the token, so there is no ΔW: the adapter stays beside the model. While training,
a balance loss keeps all experts in use, and sends tasks that ask for knowledge to the first half of them.
"""

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from lora_gen_jax.adapters.lora import dropout, factor_a_init
from lora_gen_jax.adapters.protocol import AdapterBase
from lora_gen_jax.config import Config, GeneratorConfig
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.product import kept, product
from lora_gen_jax.errors import DataError
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.generator.trained_module import Generated, TrainedModule
from lora_gen_jax.methods.method import Method, Traits, fixed
from lora_gen_jax.models import Pair

if TYPE_CHECKING:
    from lora_gen_jax.data.pipeline import Batch


def router_logits(x_BTD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """What a bias-free router says about every token, [B, T, E]; in fp32 whatever the type of x."""
    return product(x_BTD.astype(float), router_DE)


def weighed(h_BTX: jax.Array, weight_BTE: jax.Array) -> jax.Array:
    """The E blocks of R numbers in h [B, T, E·R], each times its expert's weight."""
    blocks_BTER = h_BTX.reshape(*weight_BTE.shape, -1) * weight_BTE[..., None].astype(h_BTX.dtype)
    return blocks_BTER.reshape(h_BTX.shape)


def side_by_side(a_LEDR: jax.Array, b_LERF: jax.Array) -> dict[str, jax.Array]:
    """The experts' factors as one pair of matrices a layer: {"a": [L, inputs, E·R], "b": [L, E·R, outputs]}."""
    L, E, D, R = a_LEDR.shape
    return {"a": a_LEDR.transpose(0, 2, 1, 3).reshape(L, D, E * R), "b": b_LERF.reshape(L, E * R, -1)}


class LoRAMoEAdapter(AdapterBase):
    """Softly routed experts at the linear layers of the FFN.

    Attributes:
        scanned: {site: {"router": [L, inputs, E], "a": [L, inputs, E·R], "b": [L, E·R, outputs]}}; the experts side by
            side, so that they are two matmuls.
        scale: α/r.
        dropout_rate: on the experts' input, drawn once for all of them; the router reads the input whole.
        shared: nothing.
    """

    scanned: Any
    scale: float = struct.field(pytree_node=False)
    dropout_rate: float = struct.field(pytree_node=False, default=0.0)
    shared: Any = None

    def delta(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """Σ_e softmax(Wg·x)_e·(α/r)·B_e·A_e·dropout(x), [B, T, outputs]."""
        probability_BTE = self.record(site, x_BTD)
        if probability_BTE is None:
            return None
        a, b = self.scanned[site]["a"], self.scanned[site]["b"]
        h_BTX = kept(product(dropout(x_BTD, self.dropout_rate, key), a, self.operands))
        y_BTF = product(weighed(h_BTX, probability_BTE), b, self.operands)
        return y_BTF * jnp.asarray(self.scale, x_BTD.dtype)

    def record(self, site: str, x_BTD: jax.Array) -> jax.Array | None:
        """The probabilities of the site's experts for every token, [B, T, E] in fp32."""
        if site not in self.scanned:
            return None
        return jax.nn.softmax(router_logits(x_BTD, self.scanned[site]["router"]), axis=-1)


def balance_loss(probability_LBTE: jax.Array, read_BT: jax.Array, knowledge_B: jax.Array, margin: float) -> jax.Array:
    """Var(Q)/(mean(Q)² + 1e-10) of each layer, [L] in fp32.

    Q[b, e] is the mean of expert e's probabilities over the tokens of row b, times 1 + margin where the expert is of
    the kind of the row's task, else times 1 - margin. It is a mean because rows differ in length: by sums a uniform
    router would be out of balance. (The authors' sums are over rows that are padded to one length.) The first ⌊E/2⌋
    experts are of the knowledge kind. The variance is unbiased and goes over rows and experts together; a single
    number has none: 0.

    Args:
        probability_LBTE: at one site.
        read_BT: which tokens are not padding.
        knowledge_B: whether the task of each row asks for knowledge.
        margin: δ.
    """
    L, B, _, E = probability_LBTE.shape
    if B * E == 1:
        return jnp.zeros(L)
    read_BT = read_BT.astype(float)
    share_BT = read_BT / jnp.maximum(jnp.sum(read_BT, axis=1, keepdims=True), 1)
    mean_LBE = jnp.einsum("lbte,bt->lbe", probability_LBTE, share_BT)
    own_BE = knowledge_B[:, None] == (jnp.arange(E) < E // 2)[None]
    q_LX = (mean_LBE * jnp.where(own_BE, 1 + margin, 1 - margin).astype(float)[None]).reshape(L, B * E)
    return jnp.var(q_LX, axis=1, ddof=1) / (jnp.mean(q_LX, axis=1) ** 2 + 1e-10)


class LoRAMoE(TrainedModule):
    """Routers and A Kaiming-uniform, B zero, for the FFN's linear layers. Called as `LoRAGen` is.

    Attributes:
        edge: of the model that carries the experts.
        settings: num_experts, rank, alpha, dropout and balance_coefficient.
        margin: δ of the balance loss.
    """

    edge: DecoderConfig
    settings: GeneratorConfig
    margin: float = 0.1

    @nn.compact
    def __call__(self, frozen: Any, prompts: PackedPrompts | None, train: bool = False) -> Generated:
        """The adapter; neither weights nor prompts are read."""
        s, layers, sites = self.settings, self.edge.num_layers, {}
        for site in self.edge.ffn_sites:
            inputs, outputs = self.edge.site_shape(site)
            router = self.param(f"{site}_router", factor_a_init, (layers, inputs, s.num_experts))
            a = self.param(f"{site}_a", factor_a_init, (layers, s.num_experts, inputs, s.rank))
            zeros = nn.initializers.zeros_init()
            b = self.param(f"{site}_b", zeros, (layers, s.num_experts, s.rank, outputs))
            sites[site] = {"router": router, **side_by_side(a, b)}
        return Generated(LoRAMoEAdapter(sites, scale=s.alpha / s.rank, dropout_rate=s.dropout))

    def auxiliary(self, generated: Generated, records: Any, batch: "Batch") -> tuple[Any, dict[str, jax.Array]]:
        """The balance loss: coefficient · mean of `balance_loss` over layers and sites, and it unweighted as "balance".

        A row of the batch is one prompt with its queries: it has the kind of the prompt's task, and its Q is over the
        tokens of all its queries. The authors' code counts padding as tokens, and adds layers and sites up; a mean
        leaves the coefficient its meaning in deeper models. Their coefficient is ours divided by layers · sites.

        Raises:
            DataError: when the batch does not say which tasks ask for knowledge.
        """
        coefficient = self.settings.balance_coefficient
        if coefficient == 0:
            return 0.0, {}
        knowledge_B = batch.prompts.knowledge_P
        if knowledge_B is None:
            raise DataError(
                "the batch's prompts have no knowledge_P, which the balance loss of lora_moe needs",
                field="prompts.knowledge_P",
                remedy="pack them with it, or set generator.balance_coefficient to 0",
            )
        read_BT = jnp.asarray(batch.positions_PT) >= 0
        losses = [balance_loss(p, read_BT, jnp.asarray(knowledge_B), self.margin) for p in records.values()]
        balance = jnp.mean(jnp.stack(losses))
        return coefficient * balance, {"balance": balance}


def _build(config: Config, pair: Pair) -> LoRAMoE:
    # Where no task is said to ask for knowledge, no half of the experts is preferred.
    margin = config.lora_moe.margin if config.data.knowledge_tasks else 0.0
    return LoRAMoE(pair.edge.config, config.generator, margin)


def token_macs(edge: DecoderConfig, config: Config) -> int:
    """MACs a token of all routers and experts: inputs·E + (inputs + outputs)·E·R for each site and layer."""
    E, R = config.generator.num_experts, config.generator.rank
    shapes = [edge.site_shape(site) for site in edge.ffn_sites]
    return edge.num_layers * sum(inputs * E + (inputs + outputs) * E * R for inputs, outputs in shapes)


# What its authors count as questions about the world; the others are about something in the query.
KNOWLEDGE = ("arc_challenge", "arc_easy", "openbookqa")
METHOD = Method(
    key="lora_moe",
    title="LoRAMoE",
    traits=Traits(compresses_context=False, merged=False, training_free=False, transfers=False),
    build=_build,
    specialize=fixed(_build),
    may_read_prompt=True,
    token_macs=token_macs,
    # As in the repository's script, without a balance loss.
    published={
        "generator": {"num_experts": 8, "rank": 4, "alpha": 32.0, "balance_coefficient": 0.0},
        "data": {"knowledge_tasks": KNOWLEDGE},
        "train": {"learning_rate": 2e-4},
    },
)
