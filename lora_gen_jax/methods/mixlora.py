"""MixLoRA: a router sends every token to K of E experts, each the frozen FFN with a LoRA of its own.

In: nothing but shapes. Out: `Generated` with a `MixLoRAAdapter`, the same for every prompt: a plain LoRA on the linear
layers of attention, and instead of the FFN

    y = Σ_{e of the K likeliest} w_e · FFN_e(x),        w = the K probabilities of softmax(Wg·x), divided by their sum

where FFN_e is the frozen FFN with (α/r)·B·A added to gate, up and down. The experts depend on the token, so there is
no ΔW: the adapter stays beside the model. While training, a balance loss keeps all experts in use.
"""

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from lora_gen_jax.adapters.lora import dropout, factor_a_init
from lora_gen_jax.adapters.protocol import FFN_INPUT, AdapterBase, FrozenFFN
from lora_gen_jax.config import Config, GeneratorConfig
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.product import kept, product
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.generator.trained_module import Generated, TrainedModule
from lora_gen_jax.methods.lora_moe import router_logits, side_by_side, weighed
from lora_gen_jax.methods.method import Method, Traits, fixed
from lora_gen_jax.models import Pair

if TYPE_CHECKING:
    from lora_gen_jax.data.pipeline import Batch

ATTENTION_SITES = ("q", "k", "v", "o")


def top_experts(logits_BTE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The K likeliest experts of every token: weights [B, T, K] that sum to 1, and which they are, 0/1 [B, T, K, E].

    They are chosen by index, so a tie keeps K of them and not more. K = 1 gives weight 1, whatever the router says: it
    then learns only from the balance loss, as in the authors' code.
    """
    weight, index = jax.lax.top_k(jax.nn.softmax(logits_BTE, axis=-1), k)
    return weight / jnp.sum(weight, axis=-1, keepdims=True), jax.nn.one_hot(index, logits_BTE.shape[-1])


class MixLoRAAdapter(AdapterBase):
    """Experts for the FFN, and a plain LoRA for attention.

    Attributes:
        scanned: {"router": [L, D, E], "experts": {site: {"a": [L, inputs, E·R], "b": [L, E·R, outputs]}} of the FFN's
            linear layers, the experts side by side, "attention": {site: {"a": [L, inputs, R], "b": [L, R, outputs]}}}.
        scale: α/r.
        top_k: K.
        dropout_rate: on the input of every LoRA, drawn once for all experts; the router reads the input whole.
        shared: nothing.
    """

    scanned: Any
    scale: float = struct.field(pytree_node=False)
    top_k: int = struct.field(pytree_node=False)
    dropout_rate: float = struct.field(pytree_node=False, default=0.0)
    shared: Any = None

    def delta(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array | None:
        """(α/r)·B·A·dropout(x) at the sites of attention, [B, T, outputs]; the FFN's are part of `ffn`."""
        if site not in self.scanned["attention"]:
            return None
        pair = self.scanned["attention"][site]
        return self._lift(pair, product(dropout(x_BTD, self.dropout_rate, key), pair["a"], self.operands))

    def record(self, site: str, x_BTD: jax.Array) -> jax.Array | None:
        """The router's logits for every token, [B, T, E] in fp32, at the FFN's input."""
        return router_logits(x_BTD, self.scanned["router"]) if site == FFN_INPUT else None

    def ffn(self, x_BTD: jax.Array, frozen: FrozenFFN, key: jax.Array | None) -> jax.Array:
        """Σ_k w_k·FFN_{e_k}(x), [B, T, D].

        What the frozen layers make of x is shared by all experts. `down` is affine and the weights sum to 1, so it is
        applied once, to the weighted sum of its inputs. No factors are gathered for a token: x goes through the A of
        all experts side by side, and what does not belong to the token's choice is zeroed before B.
        """
        K, experts = self.top_k, self.scanned["experts"]
        weight_BTK, chosen_BTKE = top_experts(router_logits(x_BTD, self.scanned["router"]), K)
        into = [site for site in frozen.sites if site != "down"]
        keys = dict.fromkeys(range(len(into) + K)) if key is None else jax.random.split(key, len(into) + K)
        shared = {site: frozen.project(site, x_BTD) for site in into}
        low = {site: self._low(site, x_BTD, keys[K + i]) for i, site in enumerate(into)}

        def hidden(chosen_BTE: jax.Array) -> jax.Array:
            y = {site: shared[site] + self._lift(experts[site], weighed(low[site], chosen_BTE)) for site in into}
            return frozen.activate(y.get("gate"), y["up"])

        h_BTF = [hidden(chosen_BTKE[:, :, k]) for k in range(K)]
        # Each token's experts differ, so that the K zeroed and weighted inputs of B can be added up before it.
        gates_BTKE = chosen_BTKE * weight_BTK[..., None]
        out_BTX = [weighed(self._low("down", h_BTF[k], keys[k]), gates_BTKE[:, :, k]) for k in range(K)]
        # Σ_k w_k·h_k as the first and weighted differences to it: rounded weights, in bf16 above all, do not sum to 1.
        weight_BTK = weight_BTK.astype(h_BTF[0].dtype)
        mixed_BTF = sum((weight_BTK[..., k : k + 1] * (h_BTF[k] - h_BTF[0]) for k in range(1, K)), h_BTF[0])
        return frozen.project("down", mixed_BTF) + self._lift(experts["down"], sum(out_BTX[1:], out_BTX[0]))

    def _low(self, site: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        """A_e·dropout(x) of all experts, [B, T, E·R]."""
        a = self.scanned["experts"][site]["a"]
        return kept(product(dropout(x_BTD, self.dropout_rate, key), a, self.operands))

    def _lift(self, pair: dict[str, jax.Array], h_BTX: jax.Array) -> jax.Array:
        """(α/r)·B·h, [B, T, outputs]."""
        return product(h_BTX, pair["b"], self.operands) * jnp.asarray(self.scale, h_BTX.dtype)


def balance_loss(logits_LBTE: jax.Array, read_BT: jax.Array, k: int) -> jax.Array:
    """E·Σ_e f_e·P_e over the tokens of all layers, a scalar in fp32; K when the experts are in even use.

    f_e is the share of tokens with expert e among their K, P_e the mean of its probability. No token at all gives 0.

    Args:
        logits_LBTE: of the routers of all layers.
        read_BT: which tokens are not padding.
        k: experts a token.
    """
    L, _, _, E = logits_LBTE.shape
    probability_LBTE = jax.nn.softmax(logits_LBTE, axis=-1)
    _, index_LBTK = jax.lax.top_k(probability_LBTE, k)
    chosen_LBTE = jnp.sum(jax.nn.one_hot(index_LBTK, E), axis=-2)
    read_BT = read_BT.astype(float)
    tokens = jnp.maximum(L * jnp.sum(read_BT), 1.0)
    share_E = jnp.einsum("lbte,bt->e", chosen_LBTE, read_BT) / tokens
    mean_E = jnp.einsum("lbte,bt->e", probability_LBTE, read_BT) / tokens
    return E * jnp.sum(share_E * mean_E)


def attention_sites(settings: GeneratorConfig) -> tuple[str, ...]:
    """Sites with a plain LoRA: q, k, v and o, or those of `lora_sites` that are attention's. The FFN has experts."""
    return tuple(site for site in settings.lora_sites or ATTENTION_SITES if site in ATTENTION_SITES)


class MixLoRA(TrainedModule):
    """Routers N(0, 0.02²), A Kaiming-uniform, B zero. Called as `LoRAGen` is.

    Attributes:
        edge: of the model that carries the experts.
        settings: num_experts, top_k, rank, alpha, dropout, lora_sites and
            balance_coefficient.
    """

    edge: DecoderConfig
    settings: GeneratorConfig

    @nn.compact
    def __call__(self, frozen: Any, prompts: PackedPrompts | None, train: bool = False) -> Generated:
        """The adapter; neither weights nor prompts are read."""
        s, c = self.settings, self.edge
        shape = (c.num_layers, c.width, s.num_experts)
        scanned = {
            "router": self.param("router", nn.initializers.normal(0.02), shape),
            "experts": {site: side_by_side(*self._factors(site, (s.num_experts,))) for site in c.ffn_sites},
            "attention": {
                site: dict(zip(("a", "b"), self._factors(site, ()), strict=True)) for site in attention_sites(s)
            },
        }
        return Generated(MixLoRAAdapter(scanned, scale=s.alpha / s.rank, top_k=s.top_k, dropout_rate=s.dropout))

    def _factors(self, site: str, experts: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        inputs, outputs = self.edge.site_shape(site)
        lead, rank = (self.edge.num_layers, *experts), self.settings.rank
        a = self.param(f"{site}_a", factor_a_init, (*lead, inputs, rank))
        return a, self.param(f"{site}_b", nn.initializers.zeros_init(), (*lead, rank, outputs))

    def auxiliary(self, generated: Generated, records: Any, batch: "Batch") -> tuple[Any, dict[str, jax.Array]]:
        """coefficient · `balance_loss` over all layers, and it unweighted as "balance"."""
        if self.settings.balance_coefficient == 0:
            return 0.0, {}
        read_BT = jnp.asarray(batch.positions_PT) >= 0
        balance = balance_loss(records[FFN_INPUT], read_BT, self.settings.top_k)
        return self.settings.balance_coefficient * balance, {"balance": balance}


def _build(config: Config, pair: Pair) -> MixLoRA:
    return MixLoRA(pair.edge.config, config.generator)


def token_macs(edge: DecoderConfig, config: Config) -> int:
    """MACs a token of everything beside the frozen layers, over all layers.

    The router D·E; on the way into the FFN each site's A once for all experts, D·E·R, and B once a choice, K·E·R·F; on
    the way out A once a choice, K·F·E·R, and B once, E·R·D; the plain LoRA (inputs + outputs)·R a site.
    """
    g = config.generator
    E, K, X = g.num_experts, g.top_k, g.num_experts * g.rank
    macs = edge.width * E
    for site in edge.ffn_sites:
        inputs, outputs = edge.site_shape(site)
        macs += (K * inputs + outputs) * X if site == "down" else (inputs + K * outputs) * X
    macs += sum(sum(edge.site_shape(site)) * g.rank for site in attention_sites(g))
    return edge.num_layers * macs


METHOD = Method(
    key="mixlora",
    title="MixLoRA",
    traits=Traits(compresses_context=False, merged=False, training_free=False, transfers=False),
    build=_build,
    specialize=fixed(_build),
    may_read_prompt=True,
    token_macs=token_macs,
    published={
        "generator": {"num_experts": 8, "top_k": 2, "rank": 16, "alpha": 32.0, "balance_coefficient": 0.01},
        "train": {"learning_rate": 2e-4},
    },
)
