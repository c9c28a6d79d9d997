"""Free-form answers: generated greedily and compared with the gold answer, character by character.

In: an edge model, documents with their contexts. Out: the answers, which are exact where they match after surrounding
whitespace is removed; the ROUGE-L of long ones; the latency of one answer.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np

from lora_gen_jax.buckets import power_of_two
from lora_gen_jax.data.prompts import prompt_text
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.evaluation.request_runner import Runner
from lora_gen_jax.evaluation.timing import best_of
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.models import Model

# Answers that are timed, one at a time, and how often; the best time of each counts, then the median.
LATENCY_DOCUMENTS, LATENCY_REPEATS = 2, 5
# Mean characters of gold answers above which hardly any answer is exact.
LONG = 40


def contexts(edge: Model, documents: Sequence[Example], description: str, shots: Sequence[Example]) -> list[list[int]]:
    """What the edge model reads for every document, as ids."""
    prompt = prompt_text(description, shots)
    return [edge.encoder.query(document, False, prompt)[0] for document in documents]


def answered(runner: Runner, documents: Sequence[Example], contexts: Sequence[Sequence[int]]) -> list[str]:
    """What each document is answered with.

    Generation ends with the end token, or with a blank line, where a model that reads shots would write the next one.
    """
    edge, end = runner.subject.edge, break_of(documents)
    made = runner.tokens([tuple(c) for c in contexts], answer_limit(edge, documents), stops(edge, documents))
    return [trimmed(edge.encoder.decode(ids), end) for ids in made]


def long(documents: Sequence[Example]) -> bool:
    """Whether there are no options and gold answers are so long that ROUGE-L is the better measure."""
    lengths = [len(document.response.strip()) for document in documents if not document.options]
    return bool(lengths) and float(np.mean(lengths)) > LONG


def rouge_l(text: str, gold: str) -> float:
    """F1 of the longest common subsequence of words, in any case, without stemming (Lin 2004)."""
    words, wanted = (re.findall(r"[^\W_]+", one.lower()) for one in (text, gold))
    row = [0] * (len(wanted) + 1)
    for word in words:
        above = row
        row = [0]
        for i, other in enumerate(wanted):
            row.append(above[i] + 1 if word == other else max(above[i + 1], row[i]))
    return 2 * row[-1] / (len(words) + len(wanted)) if row[-1] else 0.0


def answer_limit(edge: Model, documents: Sequence[Example]) -> int:
    """Most new tokens: those of the longest gold answer, what ends it, and one more."""
    return max(len(answer_ids(edge, document)) for document in documents) + 2


def answer_ids(edge: Model, document: Example) -> list[int]:
    """Ids of a document's answer."""
    return edge.encoder.query(document, False)[1]


def break_of(documents: Sequence[Example]) -> str | None:
    """What ends an answer beside the end token: the shortest run of line breaks that no gold answer holds."""
    gold = [document.response.strip() for document in documents]
    return next((end for end in ("\n", "\n\n") if not any(end in answer for answer in gold)), None)


def trimmed(text: str, end: str | None) -> str:
    """The text up to the first `end`, without surrounding whitespace."""
    text = text.strip()
    return text if end is None else text.split(end)[0].strip()


def stops(edge: Model, documents: Sequence[Example]) -> list[int]:
    """Ids that end an answer: the end token, and the line break where no answer has one."""
    ids = [] if edge.encoder.end is None else [edge.encoder.end]
    if all(d.response[:1].isspace() and "\n" not in d.response for d in documents):
        breaks = [edge.encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", "\n\n")]
        ids += [found[0] for found in breaks if len(found) == 1]
    return ids


def answer_latency(edge: Model, model: EdgeModel, documents: Sequence[Example], contexts: list[list[int]]) -> float:
    """Milliseconds from a document's context to its whole answer; nothing is shared with other documents."""
    times = []
    for document, context in zip(documents[:LATENCY_DOCUMENTS], contexts, strict=False):
        room = edge.config.max_positions - model.before - len(context)
        limit = min(power_of_two(len(answer_ids(edge, document)) + 2), room)
        run = functools.partial(generate, model, [context], GenerationSettings(limit, stops(edge, [document])))
        times.append(best_of(run, LATENCY_REPEATS)[1])
    return float(np.median(times) * 1000)
