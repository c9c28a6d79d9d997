"""Mixtures of experts, and a decoder around them, in plain NumPy: float64, one token and one expert at a time.

Written from the equations. Parameters are those of the modules, with their leading axes [L, E]; a sequence is a list of
token ids without padding, and what the routers say comes back as {site: [layers of [tokens, E]]}.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import EDGE, SAME, filled, padded

from lora_gen_jax.config import DataConfig
from lora_gen_jax.data.groups import Group
from lora_gen_jax.data.pipeline import pack_groups
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.training.step import edge_pass

DATA = DataConfig(
    prompts_per_step=4, prompts_per_row=2, cloud_length=32, edge_length=24, response_slots=8, query_length=12
)


def _groups():
    """Four prompts of both kinds of task, with one to three queries each: rows of 20, 6, 13 and 9 tokens of 24."""
    rng, groups = np.random.default_rng(0), []
    shapes = [[(9, 2), (9, 2)], [(4, 3)], [(2, 1), (6, 2), (3, 2)], [(7, 2), (1, 1)]]
    for knowledge, lengths in zip((True, False, False, True), shapes, strict=True):
        queries = [(rng.integers(2, 53, n).tolist(), rng.integers(2, 53, m).tolist()) for n, m in lengths]
        groups.append(Group("", (), rng.integers(2, 53, 5).tolist(), queries, knowledge=knowledge))
    return groups


GROUPS = _groups()
# Compiled without optimizing machine code: most of the time that these tests would take.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KNOWLEDGE = [group.knowledge for group in GROUPS]
BATCH = pack_groups(GROUPS, DATA, 3)


def random_module_params(module: Any, seed: int = 3) -> Any:
    """Parameters of a module in its shapes, B among them away from zero."""
    return filled(jax.eval_shape(module.init, jax.random.key(0), None, None)["params"], seed)


@functools.partial(quick_jit, static_argnums=0)
def logits(decoder: Any, params: Any, tokens_BT: Any, adapter: Any = None) -> Any:
    """Logits [B, T, V] of one forward pass."""
    hidden, _ = decoder.apply({"params": params}, tokens_BT, adapter=adapter)
    return decoder.apply({"params": params}, hidden, method="logits")


def plain(tree: Any) -> Any:
    """Arrays in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class LoRAMoE(NamedTuple):
    """Routers and experts at the linear layers of the FFN: y = Σ_e softmax(Wg·x)_e·scale·B_e·A_e·x."""

    params: Any
    scale: float

    def delta(self, site, layer, x_TD, said):
        if f"{site}_router" not in self.params:
            return 0.0
        router, a, b = (self.params[f"{site}_{name}"][layer] for name in ("router", "a", "b"))
        y_TF, probability_TE = np.zeros((len(x_TD), b.shape[-1])), np.zeros((len(x_TD), len(a)))
        for t, x in enumerate(x_TD):
            probability_TE[t] = softmax(x @ router)
            for e in range(len(a)):
                y_TF[t] += probability_TE[t, e] * self.scale * ((x @ a[e]) @ b[e])
        said.setdefault(site, []).append(probability_TE)
        return y_TF

    def ffn(self, model, layer, x_TD, said):
        return None


class MixLoRA(NamedTuple):
    """A plain LoRA on attention; the K likeliest of E FFNs, each with a LoRA on all of its linear layers."""

    params: Any
    scale: float
    top_k: int

    def delta(self, site, layer, x_TD, said):
        if site not in ("q", "k", "v", "o") or f"{site}_a" not in self.params:
            return 0.0
        return self.scale * (x_TD @ self.params[f"{site}_a"][layer]) @ self.params[f"{site}_b"][layer]

    def expert(self, model, layer, e, x):
        def linear(site, x):
            a, b = (self.params[f"{site}_{name}"][layer, e] for name in ("a", "b"))
            return model.linear("ffn", site, layer, x) + self.scale * ((x @ a) @ b)

        gate = linear("gate", x) if model.config.gated_ffn else None
        return linear("down", model.activate(gate, linear("up", x)))

    def ffn(self, model, layer, x_TD, said):
        y_TD, logits_TE = np.zeros_like(x_TD), x_TD @ self.params["router"][layer]
        for t, x in enumerate(x_TD):
            p = softmax(logits_TE[t])
            best = sorted(range(len(p)), key=lambda e: (-p[e], e))[: self.top_k]
            for e in best:
                y_TD[t] += p[e] / sum(p[best]) * self.expert(model, layer, e, x)
        said.setdefault("ffn", []).append(logits_TE)
        return y_TD


class Model(NamedTuple):
    """A llama or an OPT: what `Decoder` computes, for one sequence."""

    config: Any
    params: Any

    def linear(self, group, site, layer, x):
        leaf = self.params["layers"][group][site]
        return x @ leaf["kernel"][layer] + (leaf["bias"][layer] if "bias" in leaf else 0.0)

    def activate(self, gate, up):
        return np.maximum(up, 0) if gate is None else gate / (1 + np.exp(-gate)) * up

    def norm(self, leaf, x):
        x = x - x.mean(-1, keepdims=True) if self.config.norm == "layer" else x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_eps) * leaf["scale"]
        return x + leaf.get("bias", 0.0)

    def rotate(self, x_TNH):
        c, half = self.config, self.config.head_dim // 2
        if c.rope_theta is None:
            return x_TNH
        angle = np.arange(len(x_TNH))[:, None] / c.rope_theta ** (np.arange(half) / half)
        turned = (x_TNH[..., :half] + 1j * x_TNH[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attention(self, layer, x_TD, adapted):
        c, T = self.config, len(x_TD)
        q, k, v = (adapted("attention", site, layer, x_TD).reshape(T, -1, c.head_dim) for site in ("q", "k", "v"))
        q, k = self.rotate(q), self.rotate(k)
        y_TNH = np.zeros_like(q)
        for n in range(c.num_heads):
            g = n * c.num_kv_heads // c.num_heads
            scores = q[:, n] @ k[:, g].T * c.attention_scale
            y_TNH[:, n] = softmax(np.where(np.tri(T, dtype=bool), scores, -np.inf)) @ v[:, g]
        return adapted("attention", "o", layer, y_TNH.reshape(T, -1))

    def run(self, ids, method):
        """(logits [T, V], what the routers said) of one sequence."""
        c, p, said = self.config, self.params, {}

        def adapted(group, site, layer, x):
            return self.linear(group, site, layer, x) + method.delta(site, layer, x, said)

        x = p["embed"]["embedding"][ids]
        if c.rope_theta is None:
            x = x + p["positions"]["embedding"][np.arange(len(ids)) + c.learned_position_offset]
        for i in range(c.num_layers):
            norms = {name: {k: v[i] for k, v in p["layers"][name].items()} for name in ("attention_norm", "ffn_norm")}
            x = x + self.attention(i, self.norm(norms["attention_norm"], x), adapted)
            h = self.norm(norms["ffn_norm"], x)
            y = method.ffn(self, i, h, said)
            if y is None:
                gate = adapted("ffn", "gate", i, h) if c.gated_ffn else None
                y = adapted("ffn", "down", i, self.activate(gate, adapted("ffn", "up", i, h)))
            x = x + y
        return self.norm(p["final_norm"], x) @ p["embed"]["embedding"].T, said


def said_of_the_batch(model: Model, method: Any) -> list[dict[str, list[np.ndarray]]]:
    """What the routers say in each row of `BATCH`: its queries one by one, their tokens one after the other."""
    rows = []
    for group in GROUPS:
        parts = [model.run(query + response[:-1], method)[1] for query, response in group.queries]
        layers = range(model.config.num_layers)
        rows.append({s: [np.concatenate([part[s][i] for part in parts]) for i in layers] for s in parts[0]})
    return rows


def lora_moe_balance(rows: list[Any], knowledge: list[bool], margin: float) -> float:
    """The mean over sites and layers of Var(Q)/(mean(Q)² + 1e-10)."""
    values = []
    for site in rows[0]:
        for i in range(len(rows[0][site])):
            q = []
            for row, asks in zip(rows, knowledge, strict=True):
                E = row[site][i].shape[1]
                for e in range(E):
                    own = (e < E // 2) == asks
                    share = sum(p[e] for p in row[site][i]) / len(row[site][i])
                    q.append(share * (1 + margin if own else 1 - margin))
            mean = sum(q) / len(q)
            values.append(sum((x - mean) ** 2 for x in q) / (len(q) - 1) / (mean**2 + 1e-10))
    return sum(values) / len(values)


def mixlora_balance(rows: list[Any], top_k: int) -> float:
    """E·Σ_e f_e·P_e over the tokens of all rows and layers."""
    logits_XE = np.concatenate([layer for row in rows for layer in row["ffn"]])
    count_E, sum_E = np.zeros(logits_XE.shape[1]), np.zeros(logits_XE.shape[1])
    for p in map(softmax, logits_XE):
        sum_E += p
        for e in sorted(range(len(p)), key=lambda e: (-p[e], e))[:top_k]:
            count_E[e] += 1
    return len(count_E) * float(sum(count_E / len(logits_XE) * sum_E / len(logits_XE)))


def losses(module: Any, decoder: Any, frozen: Any, params: Any) -> tuple[jax.Array, Any]:
    """(answers' loss, what the method adds to it) on `BATCH`, as a training step computes them without dropout."""
    generated = module.apply({"params": params}, None, BATCH.prompts, True)
    batch = jax.tree.map(jnp.asarray, BATCH)
    loss, records = edge_pass(decoder, frozen, generated, batch, {})
    return loss, module.apply({"params": params}, generated, records, batch, method="auxiliary")[0]


def check_greedy_decoding(frozen, adapter, tokens):
    """Token by token with a cache, from two prompts; then the same tokens in one pass without: the same in float64."""
    decoder, prompts = Decoder(EDGE), [tokens[0, :5].tolist(), tokens[1, :3].tolist()]
    got = generate(EdgeModel(decoder, frozen, adapter=adapter), prompts, GenerationSettings(max_new_tokens=4))
    read, _ = padded([prompt + one.ids for prompt, one in zip(prompts, got, strict=True)], 9)
    full = np.asarray(jax.nn.log_softmax(logits(decoder, frozen, read, adapter)))
    for row, (prompt, one) in enumerate(zip(prompts, got, strict=True)):
        said = full[row, len(prompt) - 1 : len(prompt) + 3]
        assert one.ids == said.argmax(-1).tolist()
        np.testing.assert_allclose(one.logprobs, said.max(-1), **SAME)
