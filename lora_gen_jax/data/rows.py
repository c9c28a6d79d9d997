"""What a reasoning task is, and rows of the eight to examples.

In: a dict in the data set's original schema, or as tensorflow-datasets has it. Out: an `Example`.

Texts are those of lm-evaluation-harness 0.4.13 (`lm_eval/tasks/*`), so that figures compare: a query is `doc_to_text`,
an option is the target delimiter " " and the choice. Only BoolQ leaves room: the harness reads SuperGLUE's copy,
whose passages open with "title -- "; rows of the original release are used as they are, without the title.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lora_gen_jax.data.tasks import Example

Row = dict[str, Any]
_BRACKETS = re.compile(r"\[.*?\]")
_LAST_SENTENCE = re.compile(r"(?s)(.*[.!?][\"')]*)\s+(.*)")


@dataclass(frozen=True)
class Source:
    """A data set of tensorflow-datasets: its name, how a record becomes a row, its train split, what registers it."""

    name: str
    to_row: Callable[[Row], Row]
    train: str = "train"
    module: str = ""


@dataclass(frozen=True)
class Files:
    """Where a task's splits lie: folder names below the data directory, then file names, the first found wins."""

    folders: tuple[str, ...]
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def names(self, split: str) -> tuple[str, ...]:
        """File names of a split: ours, then the original release's; for train also any part of it."""
        own = (f"{split}.jsonl", *getattr(self, split))
        return (*own, "train_*.jsonl") if split == "train" else own


@dataclass(frozen=True)
class ReasoningTask:
    """A task that is read from its original release.

    Attributes:
        name: in configs and results.
        example: from an id and a row to what is asked. Texts are those of lm-evaluation-harness, where it has the task.
        files: where its splits lie.
        descriptions: wordings, one of which is drawn for each training prompt; evaluation uses the first.
        seen: whether training may use it; others are scored by default, too.
        scored_on: the split.
        tfds: the data set of tensorflow-datasets, where there is one.
        sibling: another task, whose scored rows may stand among its training rows.
        usable: whether a row of its files can be used.
    """

    name: str
    example: Callable[[str, Row], Example]
    files: Files
    descriptions: tuple[str, ...]
    seen: bool = False
    scored_on: Literal["test", "validation"] = "validation"
    tfds: Source | None = None
    sibling: str | None = None
    usable: Callable[[Row], bool] = lambda row: True


def multiple_choice(example_id: str, query: str, choices: list[str], gold: int) -> Example:
    """The example of `query` whose continuations are `choices`. Raises ValueError where `gold` is not one of them."""
    _check_gold(gold, choices)
    if not query.strip():
        raise ValueError("the query is empty")
    options = tuple(f" {choice}" for choice in choices)
    lengths = tuple(len(choice) for choice in choices)
    return Example(example_id, query, options[gold], options, gold, option_lengths=lengths)


def arc(example_id: str, row: Row) -> Example:
    """ARC: {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}; labels are letters or digits."""
    choices, gold = labelled(row)
    (stem,) = _texts(row["question"], "stem")
    return multiple_choice(example_id, f"Question: {stem}\nAnswer:", choices, gold)


def openbookqa(example_id: str, row: Row) -> Example:
    """OpenBookQA: the schema of ARC; the query is the bare stem."""
    choices, gold = labelled(row)
    (stem,) = _texts(row["question"], "stem")
    return multiple_choice(example_id, stem, choices, gold)


def boolq(example_id: str, row: Row) -> Example:
    """BoolQ: {"question", "passage", "answer": bool}, or SuperGLUE's {"question", "passage", "label": bool}."""
    answer = row["answer"] if "answer" in row else row["label"]
    if not isinstance(answer, bool | int):
        raise ValueError(f"the answer is {answer!r}, neither true nor false")
    passage, question = _texts(row, "passage", "question")
    return multiple_choice(example_id, f"{passage}\nQuestion: {question}?\nAnswer:", ["no", "yes"], int(answer))


def social_iqa(example_id: str, row: Row) -> Example:
    """Social IQa: {"context", "question", "answerA", "answerB", "answerC", "label": "1" to "3"}."""
    context, question, *choices = _texts(row, "context", "question", "answerA", "answerB", "answerC")
    return multiple_choice(example_id, f"Q: {context} {question}\nA:", choices, int(row["label"]) - 1)


def hellaswag(example_id: str, row: Row) -> Example:
    """HellaSwag: {"activity_label", "ctx_a", "ctx_b", "endings", "label"}, or only "ctx" (see `split_context`)."""
    (label,) = _texts(row, "activity_label")
    if "ctx_a" in row:
        ctx_a, ctx_b = _texts(row, "ctx_a", "ctx_b")
    else:
        ctx_a, ctx_b = split_context(*_texts(row, "ctx", "source_id"))
    # capitalize() also lower-cases the rest: the harness does so.
    query = _unmark(f"{label}: {ctx_a} {ctx_b.capitalize()}")
    return multiple_choice(example_id, query, [_unmark(e) for e in row["endings"]], int(row["label"]))


def winogrande(example_id: str, row: Row) -> Example:
    """WinoGrande by partial evaluation: {"sentence" with one "_", "option1", "option2", "answer": "1" or "2"}.

    The option goes into the context; the rest of the sentence is the continuation scored after either context
    (Trinh and Le, arXiv:1806.02847).
    """
    sentence, *choices = _texts(row, "sentence", "option1", "option2")
    gold, blank = int(row["answer"]) - 1, sentence.index("_")
    contexts = tuple(sentence[:blank] + choice for choice in choices)
    _check_gold(gold, contexts)
    response = " " + sentence[blank + 1 :].strip()
    # The harness divides by the length of the contexts here (its choices); `acc_norm` is not reported for this task.
    lengths = tuple(len(context) for context in contexts)
    return Example(example_id, contexts[gold], response, (response,) * 2, gold, contexts, lengths)


def piqa(example_id: str, row: Row) -> Example:
    """PIQA: {"goal", "sol1", "sol2", "label": 0 or 1}."""
    goal, *choices = _texts(row, "goal", "sol1", "sol2")
    return multiple_choice(example_id, f"Question: {goal}\nAnswer:", choices, int(row["label"]))


def split_context(ctx: str, source_id: str) -> tuple[str, str]:
    """HellaSwag's (ctx_a, ctx_b) from their concatenation, which is all that TFDS keeps.

    Rows from ActivityNet end in the opening words of the sentence to be finished: ctx_b is what follows the last
    full sentence. Rows from WikiHow have no ctx_b.
    """
    found = _LAST_SENTENCE.fullmatch(ctx) if source_id.startswith("activitynet") else None
    return (found[1], found[2]) if found else (ctx, "")


def _texts(row: Row, *names: str) -> list[str]:
    values = [row[name] for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise TypeError(f"{name!r} must be text, found {type(value).__name__}")
    return values


def labelled(row: Row) -> tuple[list[str], int]:
    """(choices, index of the right one) in ARC's schema; ValueError for an answerKey that no choice has."""
    choices = row["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    answer = row["answerKey"].strip()
    if answer not in labels:
        raise ValueError(f"the answerKey {answer!r} is none of the labels {labels}")
    return [choice["text"] for choice in choices], labels.index(answer)


def _unmark(text: str) -> str:
    """Drops WikiHow's "[title]" marks exactly as the harness does: one pass, double spaces halved once."""
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETS.sub("", text).replace("  ", " ")


def _check_gold(gold: int, choices: list[str] | tuple[str, ...]) -> None:
    if not all(isinstance(choice, str) for choice in choices):
        raise TypeError("an option is not text")
    if not 0 <= gold < len(choices):
        raise ValueError(f"the label points at option {gold + 1} of {len(choices)}")


def arc_row(record: Row) -> Row:
    """TFDS stores the labels "A" to "E" as 0 to 4."""
    texts, labels = record["choices"]["text"], record["choices"]["label"]
    choices = [{"text": plain(t), "label": letter(i)} for t, i in zip(texts, labels, strict=True)]
    question = {"stem": plain(record["question"]), "choices": choices}
    return {"id": plain(record["id"]), "question": question, "answerKey": letter(record["answerKey"])}


def openbookqa_row(record: Row) -> Row:
    """TFDS spreads the choices over four fields and keeps no id."""
    question = record["question"]
    choices = [{"text": plain(question[f"choice_{letter}"]), "label": letter} for letter in "ABCD"]
    return {
        "question": {"stem": plain(question["stem"]), "choices": choices},
        "answerKey": letter(record["answerKey"]),
    }


def boolq_row(record: Row) -> Row:
    """The original row."""
    texts = {name: plain(record[name]) for name in ("question", "title", "passage")}
    return {**texts, "answer": bool(record["answer"])}


def social_iqa_row(record: Row) -> Row:
    """Our own builder stores the labels "1" to "3" as 0 to 2."""
    texts = {name: plain(record[name]) for name in ("context", "question", "answerA", "answerB", "answerC")}
    return {**texts, "label": str(int(record["label"]) + 1)}


def hellaswag_row(record: Row) -> Row:
    """TFDS keeps only ctx, not ctx_a and ctx_b."""
    texts = {name: plain(record[name]) for name in ("activity_label", "source_id")}
    endings = [plain(ending) for ending in record["endings"]]
    return {**texts, "ctx": plain(record["context"]), "endings": endings, "label": int(record["label"])}


def winogrande_row(record: Row) -> Row:
    """TFDS stores the answers "1" and "2" as 0 and 1 and keeps no id."""
    texts = {name: plain(record[name]) for name in ("sentence", "option1", "option2")}
    return {**texts, "answer": str(int(record["label"]) + 1)}


def piqa_row(record: Row) -> Row:
    """The original row, its label merged in."""
    return {**{name: plain(record[name]) for name in ("id", "goal", "sol1", "sol2")}, "label": int(record["label"])}


def plain(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def letter(index: Any) -> str:
    return "ABCDE"[int(index)] if int(index) >= 0 else ""
