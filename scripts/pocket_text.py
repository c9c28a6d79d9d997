"""The text that the pocket pair is pretrained on, and its tokenizer.

In: the embedded tasks. Out: documents (prompts with solved queries) as packed rows of token ids. Held-out pairs of
attribute and format, held-out wordings, unseen tools and test queries never occur.
"""

import itertools
import queue
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import struct

from lora_gen_jax.data.pocket.agent import SOURCE as AGENT
from lora_gen_jax.data.pocket.agent import agent_tasks
from lora_gen_jax.data.pocket.suite import GROUPS
from lora_gen_jax.data.prompts import shot_text
from lora_gen_jax.data.tasks import Task

END = "<|endoftext|>"
# A conversation as the pair reads prompts: the system text, then queries with their answers, blank lines between them.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{{- ' ' + message.content | trim -}}"
    "{%- else -%}{{- ('' if loop.first else '\n\n') + message.content | trim -}}{%- endif -%}{%- endfor -%}"
)
VOCABULARY, POSITIONS = 2048, 512
# Rows and tokens of a batch: prompts of words are short, tool lists are long. Every fifth batch is of tool use.
WORDS_SHAPE, TOOLS_SHAPE, TOOLS_EVERY = (32, 128), (12, 320), 5
# A description is read, an answer learned: the answers' tokens carry most of the loss.
PROMPT_WEIGHT = 0.1
SHOTS_ALONE, MAX_SHOTS = 0.3, 8
Piece = tuple[str, bool]


def pretraining_tasks() -> list[Task]:
    """What may be read: all seen tasks."""
    return GROUPS["pocket"]() + [task for task in agent_tasks() if task.seen]


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
        chat_template=CHAT_TEMPLATE,
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
