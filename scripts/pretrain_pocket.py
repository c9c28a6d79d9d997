"""Pretrains the pocket pair: a tokenizer, an edge model of 1.1M and a cloud model of 2.2M parameters.

Command:  python scripts/pretrain_pocket.py --out DIR
Time:     28 minutes for both at the same time, a process each, on two busy CPU cores (docs/pocket.md).
Result:   DIR/edge and DIR/cloud, Hugging Face directories, and DIR/log.jsonl.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from pocket_text import POSITIONS, VOCABULARY, Rows, ahead, mixture, pretraining_tasks, train_tokenizer

from lora_gen_jax.data.pocket.agent import agent_tasks
from lora_gen_jax.data.pocket.suite import GROUPS
from lora_gen_jax.data.prompts import evaluation_shots, few_shot_context, separator
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained.save import save_pretrained
from lora_gen_jax.training.prepare import keep_freed_memory

STEPS = {"edge": 2000, "cloud": 1600}
WARMUP, CLIP_NORM, WEIGHT_DECAY = 100, 1.0, 0.1
LOG_EVERY, MEASURE_EVERY = 50, 500
# Kinds of prompts that accuracy is measured with: (title, shots, described).
WORDS_KINDS = (
    ("description and shots", 4, True),
    ("description", 0, True),
    ("shots", 4, False),
    ("nothing", 0, False),
)
TOOLS_KINDS = (("description", 0, True), ("nothing", 0, False))
SIZES = {
    "edge": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "cloud": {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 6, "num_attention_heads": 5},
}


def hf_config(name: str) -> dict[str, Any]:
    """config.json of one of the two models."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        **SIZES[name],
        "num_key_value_heads": SIZES[name]["num_attention_heads"],
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "attention_bias": False,
        "mlp_bias": False,
    }


def accuracy(decoder: Decoder, params: Any, tokenizer: Any, shots: int, described: bool, group: str) -> float:
    """Share of a group's test queries that are answered exactly, greedily, after a prompt of this kind."""
    rows, end = [], tokenizer.eos_token_id
    agent = [task for task in agent_tasks() if task.seen == (group == "agent_seen")]
    for task in GROUPS[group]() if group in GROUPS else agent:
        given = evaluation_shots(task, shots, 0)
        for example in task.test:
            context = few_shot_context(task.descriptions[0] if described else "", given, example.query)
            text = context + separator(example.query, example.response) + example.response
            ids, count = tokenizer(text)["input_ids"], len(tokenizer(context)["input_ids"])
            rows.append((ids, count))
    tokens = np.full((len(rows), max(len(ids) for ids, _ in rows)), end, np.int32)
    answer = np.zeros(tokens.shape, bool)
    for i, (ids, count) in enumerate(rows):
        tokens[i, : len(ids)], answer[i, count : len(ids)] = ids, True

    @jax.jit
    def correct(params: Any, tokens: Any, answer: Any) -> Any:
        hidden, _ = decoder.apply({"params": params}, tokens)
        logits: Any = decoder.apply({"params": params}, hidden, method="logits")
        hit = jnp.argmax(logits, -1)[:, :-1] == tokens[:, 1:]
        return jnp.mean(jnp.all(hit | ~answer[:, 1:], axis=1))

    return float(correct(params, tokens, answer))


def measure(decoder: Decoder, params: Any, tokenizer: Any) -> dict[str, float]:
    """Accuracy on test queries of all groups, by kind of prompt."""
    groups = {"pocket_seen": WORDS_KINDS, "pocket_unseen": WORDS_KINDS}
    groups |= {"agent_seen": TOOLS_KINDS, "agent_unseen": TOOLS_KINDS}
    return {
        f"{group} {title}": round(accuracy(decoder, params, tokenizer, shots, described, group), 3)
        for group, kinds in groups.items()
        for title, shots, described in kinds
    }


def make_step(decoder: Decoder, tx: optax.GradientTransformation) -> Any:
    """Jitted ``f(params, state, rows) -> (params, state, loss)``."""

    def loss_fn(params: Any, rows: Rows) -> jax.Array:
        hidden, _ = decoder.apply({"params": params}, rows.tokens, rows.positions, segments_BT=rows.segments)
        logits: Any = decoder.apply({"params": params}, hidden, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
        return jnp.sum(losses * rows.weights) / jnp.sum(rows.weights)

    def step_fn(params: Any, state: Any, rows: Rows) -> Any:
        loss, gradients = jax.value_and_grad(loss_fn)(params, rows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step_fn, donate_argnums=(0, 1))


def pretrain(name: str, tasks: list[Task], tokenizer: Any, args: argparse.Namespace, log: Any) -> Any:
    """Trains one model and returns its parameters."""

    def say(line: dict[str, Any]) -> None:
        print(json.dumps({"model": name} | line), file=log, flush=True)
        print(json.dumps({"model": name} | line), file=sys.stderr, flush=True)

    decoder, steps = Decoder(DecoderConfig.from_hf(hf_config(name)), remat="dots"), args.steps or STEPS[name]
    params = nn.unbox(decoder.init(jax.random.key(args.seed), jnp.zeros((1, 2), jnp.int32))["params"])
    count = sum(x.size for x in jax.tree.leaves(params))
    curve = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, min(WARMUP, steps // 2), steps)
    # Layers are stacked: matrices have three axes, norms two, and the embedding is not decayed.
    mask = jax.tree.map(lambda x: x.ndim > 2, params)
    adamw = optax.adamw(curve, 0.9, 0.98, weight_decay=WEIGHT_DECAY, mask=mask)
    tx = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw)
    step_fn, state, began = make_step(decoder, tx), jax.jit(tx.init)(params), time.monotonic()
    batches = ahead(mixture(tasks, tokenizer, args.seed))
    for step in range(1, steps + 1):
        params, state, loss = step_fn(params, state, next(batches))
        if step % LOG_EVERY == 0 or step == 1:
            seconds = round(time.monotonic() - began, 1)
            say({"parameters": count, "step": step, "loss": round(float(loss), 4), "seconds": seconds})
        if step % MEASURE_EVERY == 0 or step == steps:
            say({"step": step} | measure(decoder, params, tokenizer))
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["edge", "cloud"], choices=list(SIZES))
    parser.add_argument("--steps", type=int, help="of each model; left out, what the shipped pair was trained for")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_freed_memory()
    tasks = pretraining_tasks()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(tasks)
    with (args.out / "log.jsonl").open("a", encoding="utf-8") as log:
        for name in args.models:
            params = pretrain(name, tasks, tokenizer, args, log)
            directory = args.out / name
            directory.mkdir(exist_ok=True)
            save_pretrained(directory, hf_config(name), params, tokenizer, ml_dtypes.bfloat16)


if __name__ == "__main__":
    main()
