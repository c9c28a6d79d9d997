"""Pretrains the pocket pair: a tokenizer, an edge model of 1.1M and a cloud model of 3M parameters.

Command:  python scripts/pretrain_pocket.py --out DIR
Time:     see docs/pocket.md; about 45 minutes on two CPU cores.
Result:   DIR/edge and DIR/cloud, Hugging Face directories, and DIR/log.jsonl.

The text is the embedded suite's own: prompts with solved queries of seen tasks (training splits only), and tool-use
rows of seen toolsets. Held-out pairs of attribute and format, held-out wordings and test queries never occur.
"""

import argparse
import itertools
import json
import queue
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import struct

from lora_gen_jax.data.pocket.agent import SOURCE as AGENT
from lora_gen_jax.data.pocket.agent import agent_tasks
from lora_gen_jax.data.pocket.suite import GROUPS
from lora_gen_jax.data.prompts import evaluation_shots, few_shot_context, separator, shot_text
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained.save import save_pretrained
from lora_gen_jax.training.prepare import keep_freed_memory

END = "<|endoftext|>"
VOCABULARY, POSITIONS = 2048, 512
# Rows and tokens of a batch: prompts of words are short, tool lists are long. Every fifth batch is of tool use.
WORDS_SHAPE, TOOLS_SHAPE, TOOLS_EVERY = (32, 128), (12, 320), 5
# A description is read, an answer learned: the answers' tokens carry most of the loss.
PROMPT_WEIGHT = 0.1
SHOTS_ALONE, MAX_SHOTS = 0.3, 8
KINDS = (("description and shots", 4, True), ("description", 0, True), ("shots", 4, False), ("nothing", 0, False))
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


Piece = tuple[str, bool]


def document(tasks: list[Task], rng: random.Random) -> list[Piece]:
    """One document as pieces of text: what is read (False) and what is answered (True)."""
    task = rng.choice(tasks)
    tools = task.source == AGENT
    count = rng.randint(1, 2) if tools else rng.randint(2, MAX_SHOTS)
    examples = rng.sample(task.train, min(len(task.train), count))
    wordings = [text for text in task.descriptions if text]
    pieces: list[Piece] = []
    if tools or rng.random() >= SHOTS_ALONE:
        pieces.append((rng.choice(wordings) + "\n\n", False))
    for i, example in enumerate(examples):
        pieces += [("\n\n" * (i > 0) + example.query, False), (shot_text(example)[len(example.query) :], True)]
    return pieces


def train_tokenizer(tasks: list[Task]) -> Any:
    """A byte-level BPE tokenizer over sampled documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    texts = ("".join(text for text, _ in document(tasks, rng)) for _ in range(30_000))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


class Rows(struct.PyTreeNode):
    """Packed documents [B, T]; target and weight are those of the next token."""

    tokens: Any
    positions: Any
    segments: Any
    targets: Any
    weights: Any


def pack(documents: Iterator[tuple[list[int], list[float]]], shape: tuple[int, int]) -> Rows:
    """Fills a batch [B, T] with documents, each a segment of its own."""
    rows, length = shape
    out = Rows(*(np.zeros(shape, dtype) for dtype in (np.int32,) * 4 + (np.float32,)))
    out.positions[:] = -1
    spare: list[tuple[list[int], list[float]]] = []
    for row in range(rows):
        place, segment, misses = 0, 1, 0
        while misses < 3:
            ids, weights = spare.pop() if spare and misses == 0 else next(documents)
            count = len(ids) - 1
            if place + count > length:
                spare.append((ids, weights))
                misses += 1
                continue
            span = slice(place, place + count)
            out.tokens[row, span], out.positions[row, span] = ids[:-1], np.arange(count)
            out.segments[row, span], out.targets[row, span] = segment, ids[1:]
            out.weights[row, span] = weights[1:]
            place, segment = place + count, segment + 1
    return out


def encoded(
    tasks: list[Task], tokenizer: Any, rng: random.Random, length: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Documents of at most `length` tokens, as ids with a weight for each."""
    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    while True:
        batch = [document(tasks, rng) for _ in range(64)]
        flat = backend.encode_batch([text for pieces in batch for text, _ in pieces])
        encodings = iter(flat)
        for pieces in batch:
            ids: list[int] = []
            weights: list[float] = []
            for _, answer in pieces:
                own = next(encodings).ids
                ids, weights = ids + own, weights + [1.0 if answer else PROMPT_WEIGHT] * len(own)
            if len(ids) < length:
                yield [*ids, end], [*weights, 1.0]


def mixture(tasks: list[Task], tokenizer: Any, seed: int) -> Iterator[Rows]:
    """Batches of words, and every few of them one of tool use."""
    parts = [[task for task in tasks if (task.source == AGENT) == tools] for tools in (False, True)]
    shapes = (WORDS_SHAPE, TOOLS_SHAPE)
    streams = [
        encoded(part, tokenizer, random.Random(seed + 1), shape[1]) for part, shape in zip(parts, shapes, strict=True)
    ]
    for step in itertools.count(1):
        kind = int(step % TOOLS_EVERY == 0)
        yield pack(streams[kind], shapes[kind])


def ahead(batches: Iterator[Any], depth: int = 4) -> Iterator[Any]:
    """The same, made in a thread, a few batches ahead."""
    waiting: queue.Queue = queue.Queue(depth)

    def work() -> None:
        for batch in batches:
            waiting.put(batch)

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield waiting.get()


def accuracy(decoder: Decoder, params: Any, tokenizer: Any, shots: int, described: bool, group: str) -> float:
    """Share of a group's test queries that are answered exactly, greedily, after a prompt of this kind."""
    rows, end = [], tokenizer.eos_token_id
    for task in GROUPS[group]() if group in GROUPS else [t for t in agent_tasks() if t.seen == (group == "agent_seen")]:
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


def pretrain(name: str, tasks: list[Task], tokenizer: Any, args: argparse.Namespace, log: Any) -> Any:
    """Trains one model and returns its parameters."""
    decoder = Decoder(DecoderConfig.from_hf(hf_config(name)), remat="dots")
    import flax.linen as nn

    params = nn.unbox(decoder.init(jax.random.key(args.seed), jnp.zeros((1, 2), jnp.int32))["params"])
    count = sum(x.size for x in jax.tree.leaves(params))
    curve = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, 100, args.steps)
    mask = lambda p: jax.tree.map(lambda x: x.ndim > 2, p)  # noqa: E731
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(curve, 0.9, 0.98, weight_decay=0.1, mask=mask))

    def loss_fn(params: Any, rows: Rows) -> jax.Array:
        hidden, _ = decoder.apply({"params": params}, rows.tokens, rows.positions, segments_BT=rows.segments)
        logits: Any = decoder.apply({"params": params}, hidden, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
        return jnp.sum(losses * rows.weights) / jnp.sum(rows.weights)

    @jax.jit(donate_argnums=(0, 1))
    def step_fn(params: Any, state: Any, rows: Rows) -> Any:
        loss, gradients = jax.value_and_grad(loss_fn)(params, rows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, began = jax.jit(tx.init)(params), time.monotonic()
    batches = ahead(mixture(tasks, tokenizer, args.seed))
    for step in range(1, args.steps + 1):
        params, state, loss = step_fn(params, state, next(batches))
        if step % 50 == 0 or step == 1:
            line = {"model": name, "parameters": count, "step": step, "loss": round(float(loss), 4)}
            line["seconds"] = round(time.monotonic() - began, 1)
            print(json.dumps(line), file=log, flush=True)
            print(line, file=sys.stderr, flush=True)
        if step % 500 == 0 or step == args.steps:
            line = {"model": name, "step": step}
            for group in ("pocket_seen", "pocket_unseen"):
                for title, shots, described in KINDS:
                    line[f"{group} {title}"] = round(accuracy(decoder, params, tokenizer, shots, described, group), 3)
            for group in ("agent_seen", "agent_unseen"):
                for title, shots, described in (("description", 0, True), ("nothing", 0, False)):
                    line[f"{group} {title}"] = round(accuracy(decoder, params, tokenizer, shots, described, group), 3)
            print(json.dumps(line), file=log, flush=True)
            print(line, file=sys.stderr, flush=True)
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["edge", "cloud"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_freed_memory()
    tasks = GROUPS["pocket"]() + [task for task in agent_tasks() if task.seen]
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
