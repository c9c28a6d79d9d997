"""How a task is put: layouts of its queries and formats of its answers.

In: a base task, pairs of input and answer with a few wordings. Out: rows for data.files.

In every layout the query ends without whitespace and the answer begins with some. So nothing is put between the two
(`separator` in lora_gen_jax/data/prompts.py), and a query that a user types, whose trailing whitespace is dropped, has
the tokens that training had (`Encoder.pair`).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from .base import Base, Pair


class Layout(NamedTuple):
    query: str
    answer: str


class Format(NamedTuple):
    """What is done to an answer, how that is asked for, and what an answer may not hold for it to be clear."""

    wrap: Callable[[str], str]
    requests: tuple[str, ...]
    marks: str = ""


LAYOUTS = {
    "qa": Layout("Q: {}\nA:", " {}"),
    "io": Layout("Input: {}\nOutput:", " {}"),
    "question": Layout("Question: {}\nAnswer:", " {}"),
    "line": Layout("{}", "\n{}"),
    "text": Layout("Text: {}\nResult:", " {}"),
    "user": Layout("User: {}\nAssistant:", " {}"),
    "chat": Layout("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant", "\n{}"),
    "tag": Layout("<input>\n{}\n</input>\n<output>", "\n{}\n</output>"),
    # These look odd behind long inputs and are left to short ones.
    "arrow": Layout("{} ->", " {}"),
    "colon": Layout("{}:", " {}"),
    "equals": Layout("{} =", " {}"),
    "xy": Layout("x: {}\ny:", " {}"),
}
HELD_OUT = Layout("Problem: {}\nSolution:", " {}")
"""In no training row: with it a layout is measured that training has not."""
_FOR_SHORT = ("arrow", "colon", "equals", "xy")
_SHORT_INPUT, _SHORT_ANSWER, _LONGEST_ANSWER = 60, 25, 48

FORMATS = {
    "upper": Format(str.upper, ("Answer in capital letters.", "Use only capitals.", "Your answer is all upper case.")),
    "quotes": Format('"{}"'.format, ("Put the answer in double quotes.", "Quote the answer."), '"'),
    "brackets": Format(
        "[{}]".format, ("Put the answer in square brackets.", "Write the answer between [ and ]."), "[]"
    ),
    "parentheses": Format(
        "({})".format, ("Put the answer in parentheses.", "Write the answer in round brackets."), "()"
    ),
    "stars": Format(
        "*{}*".format, ("Put a star before and after the answer.", "Emphasize the answer with stars."), "*"
    ),
    "period": Format("{}.".format, ("End with a period.", "Finish the answer with a full stop."), ".!?"),
    "sentence": Format(
        "The answer is {}.".format, ('Say "The answer is" and the answer.', "Answer as: The answer is X."), ".!?"
    ),
    "json": Format(
        lambda text: json.dumps({"answer": text}, ensure_ascii=False),
        ('Answer as JSON with the key "answer".', 'Reply with a JSON object: {"answer": ...}'),
        '"{',
    ),
    "angles": Format("<{}>".format, ("Put the answer in angle brackets.", "Write the answer between < and >."), "<>"),
}


def suitable_formats(base: Base) -> list[str]:
    """The formats in which the answers of `base` are still clear; none where answers are long."""
    answers = [answer for _, answer in base.pairs]
    if max(map(len, answers)) > _LONGEST_ANSWER or sum(map(len, answers)) > _SHORT_ANSWER * len(answers):
        return []
    fitting = [name for name, form in FORMATS.items() if not any(set(form.marks) & set(a) for a in answers)]
    changed = sum(answer.upper() != answer for answer in answers)
    return [name for name in fitting if name != "upper" or changed > len(answers) // 2]


def suitable_layouts(base: Base) -> list[Layout]:
    """All layouts but the held-out one; without those for short inputs where an input is long or has a line break."""
    short = all(len(text) <= _SHORT_INPUT and "\n" not in text for text, _ in base.pairs)
    return [layout for name, layout in LAYOUTS.items() if short or name not in _FOR_SHORT]


def row(task: str, system: str, layout: Layout, pair: Pair) -> dict[str, str]:
    return {
        "task": task,
        "system": system,
        "input": layout.query.format(pair[0]),
        "output": layout.answer.format(pair[1]),
    }


def training_rows(base: Base, rng: Random, count: int) -> Iterator[dict[str, str]]:
    """Up to `count` rows of the base task, and half as many in each of two answer formats."""
    formats = suitable_formats(base)
    yield from _version(base.name, base.wordings, base.pairs[:count], suitable_layouts(base), rng)
    for name in rng.sample(formats, min(2, len(formats))):
        form = FORMATS[name]
        wordings = [f"{wording}{gap(wording)}{request}" for request in form.requests for wording in base.wordings]
        pairs = [(text, form.wrap(answer)) for text, answer in rng.sample(base.pairs, min(count // 2, len(base.pairs)))]
        yield from _version(f"{base.name}+{name}", wordings, pairs, suitable_layouts(base), rng)


def gap(wording: str) -> str:
    """What stands between a description and the format that is asked for: a line break unless it is a sentence."""
    return " " if wording[-1] in ".?!" and "\n" not in wording else "\n"


def _version(
    task: str, wordings: Sequence[str], pairs: Sequence[Pair], layouts: Sequence[Layout], rng: Random
) -> Iterator[dict[str, str]]:
    """One task: the wordings in turns; one layout for all rows, or one drawn for each, by a toss."""
    only = rng.choice(layouts) if rng.random() < 0.5 else None
    for i, pair in enumerate(pairs):
        yield row(task, wordings[i % len(wordings)], only or rng.choice(layouts), pair)
