"""Scores of agent outputs. In: outputs in GPT4Tools' form, made and gold. Out: the five metrics of GPT4Tools.

For a gold output that calls tools, thoughts, actions and arguments are three lists of flags in [0, 1], each as long as
the longer of the two outputs. SR_t, SR_act and SR_args are their means; SR = 1 where SR_t = SR_act = 1 and
SR_args >= 0.5. With gt = 1 where gold has an entry, IoU = sum(flag * gt) / sum(max(flag, gt)) over all three.
A gold output without a call is met by "No" and an `AI:` line; else SR_t, SR_act, SR_args and SR are all 0.

Where these rules leave something open we do as the published scorer does, except where marked with *:

- A field starts its line*; its case counts, whitespace around it does not*. A reply may have several lines.
- Outputs are compared step by step*; a field that is missing in the middle of an output moves no later one.
- A missing `Action Input` is an empty one, and fits only a gold call without inputs*.
- The flag of a call's arguments is their mean, and 0 where one of them should be a `.png` and is not.
- A text with `.png` anywhere in it is a `.png`. Commas always split, also within a text or in brackets.
- BLEU-1 takes words at whitespace and minds case. The published scorer's divisions have small numbers in them that make
  it 1 - 2e-9/n for n equal words, so that a right text beside a wrong one is less than a half, and fails. It is 1 for
  two empty texts*.
- One "No" after as many thoughts as there are actions is forgiven where gold calls a tool, with or without `AI:`;
  gold's own last "No" is not asked for. Where gold calls no tool, a second thought fails its row: all four are 0*.
- Calls beyond gold's lower the means, but not the IoU, as neither of its sums sees them.
- The IoU of a gold "No" is that of its thought: 1 where "No" comes first, even where the `AI:` line is missing.
- The `AI:` line may be empty*, and belongs to the first step*. An action beside a "No" is not looked at.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation.means import standard_error

_Entry = TypeVar("_Entry")
_FIELD = re.compile(
    r"^[ \t]*(?P<name>Thought:[ \t]*Do I need to use a tool\?|Action Input:|Action:|Observation:|AI:)(?P<line>.*)$",
    re.MULTILINE,
)
_ENOUGH_ARGUMENTS = 0.5
# What the published scorer (pycocoevalcap) adds to numerators and to denominators of BLEU.
_TINY, _SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class Call:
    """One step of an output; None where it lacks the field.

    Attributes:
        thought: the answer to whether a tool is needed, as written: "Yes" or "No", or whatever stands there.
        action: the tool's name.
        arguments: the inputs between commas, stripped; none where `Action Input` is empty or missing.
        reply: what follows `AI:`.
    """

    thought: str | None
    action: str | None
    arguments: tuple[str, ...]
    reply: str | None


@dataclass(frozen=True)
class AgentScore:
    """The scores of one row, in [0, 1]; `success` is 0 or 1."""

    thought: float
    action: float
    arguments: float
    success: float
    iou: float


def parse(text: str) -> list[Call]:
    """The steps of an output; other lines are skipped, and a text without any field has no steps.

    A step begins with its thought, or, where that is missing, with a field that the step before already has.
    """
    found = list(_FIELD.finditer(text))
    ends = [*(field.start() for field in found), len(text)][1:]
    steps: list[dict[str, str]] = []
    for field, end in zip(found, ends, strict=True):
        name = field["name"].partition(":")[0]
        if name == "Observation":
            # It only ends what stands before it: the tool writes the rest.
            continue
        if not steps or name == "Thought" or name in steps[-1]:
            steps.append({})
        value = text[field.start("line") : end] if name == "AI" else field["line"]
        steps[-1][name] = value.strip()
    return [
        Call(step.get("Thought"), step.get("Action"), _split(step.get("Action Input", "")), step.get("AI"))
        for step in steps
    ]


def compare(predicted_text: str, gold_text: str) -> AgentScore:
    """Scores an output against the gold one, by the rules at the head of this file.

    Raises DataError where the gold output neither calls a tool after a "Yes" nor says "No" with an `AI:` line.
    """
    predicted, gold = parse(predicted_text), parse(gold_text)
    calls = [step for step in gold if step.action is not None]
    # A gold output without any step passes the first test and fails the second.
    if any(call.thought != "Yes" for call in calls) or not (calls or _declines(gold)):
        raise DataError(
            f"gold output {gold_text!r} cannot be scored",
            field="gold_text",
            remedy="give every Action a Thought that ends in Yes, or write one Thought that ends in No, and a line"
            " that starts with AI:",
        )
    return _score_calls(predicted, calls) if calls else _score_answer(predicted)


def summarize(scores: Sequence[AgentScore]) -> dict[str, float]:
    """Means over rows: sr_t, sr_act, sr_args, sr, iou, and average, the mean of these five; stderr of sr, and n.

    The standard error is lm-eval's: that of the sample, and 0 for a single row.
    """
    if not scores:
        raise DataError("there are no agent rows to summarize", field="scores", remedy="score at least one")
    successes = [score.success for score in scores]
    means = {
        "sr_t": statistics.fmean(score.thought for score in scores),
        "sr_act": statistics.fmean(score.action for score in scores),
        "sr_args": statistics.fmean(score.arguments for score in scores),
        "sr": statistics.fmean(successes),
        "iou": statistics.fmean(score.iou for score in scores),
    }
    average, error = statistics.fmean(means.values()), standard_error(successes)
    return means | {"average": average, "stderr": error, "n": len(scores)}


def _split(inputs: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in inputs.split(",")) if inputs else ()


def _declines(steps: Sequence[Call]) -> bool:
    """Whether the only thought is a "No", and the step that it begins has a reply."""
    return _thoughts(steps) == ["No"] and steps[0].reply is not None


def _score_answer(predicted: Sequence[Call]) -> AgentScore:
    """The scores where gold calls no tool."""
    right = float(_declines(predicted))
    return AgentScore(right, right, right, right, iou=float(_thoughts(predicted)[:1] == ["No"]))


def _score_calls(predicted: Sequence[Call], gold: Sequence[Call]) -> AgentScore:
    """The scores where gold makes the calls `gold`."""
    thoughts, actions = _thoughts(predicted), _entries([step.action for step in predicted])
    if thoughts[-1:] == ["No"] and len(thoughts) == len(actions) + 1:
        # The round after the last call: no tool is needed any more.
        thoughts.pop()
    arguments = [None if step.action is None and not step.arguments else step.arguments for step in predicted]
    flags = (
        _flags(thoughts, [call.thought for call in gold], _same),
        _flags(actions, [call.action for call in gold], _same),
        _flags(_entries(arguments), [call.arguments for call in gold], _compare_arguments),
    )
    thought, action, argument = map(statistics.fmean, flags)
    success = thought == 1 and action == 1 and argument >= _ENOUGH_ARGUMENTS
    # Flags are 0 beyond gold's entries and at most 1 at them: the sum of maxima is the number of gold's entries.
    iou = sum(map(sum, flags)) / (3 * len(gold))
    return AgentScore(thought, action, argument, float(success), iou)


def _thoughts(steps: Sequence[Call]) -> list[str | None]:
    return _entries([step.thought for step in steps])


def _entries(column: Sequence[_Entry | None]) -> list[_Entry | None]:
    """A field of every step up to the last step that has it."""
    length = max((i + 1 for i, entry in enumerate(column) if entry is not None), default=0)
    return list(column[:length])


def _flags(
    predicted: Sequence[_Entry | None], gold: Sequence[_Entry], score: Callable[[_Entry, _Entry], float]
) -> list[float]:
    """The score of every pair, and 0 for what only one side has."""
    pairs = zip(predicted, gold, strict=False)
    flags = [0.0 if made is None else score(made, wanted) for made, wanted in pairs]
    return flags + [0.0] * (max(len(predicted), len(gold)) - len(flags))


def _same(made: str | None, wanted: str | None) -> float:
    return float(made == wanted)


def _compare_arguments(made: tuple[str, ...], wanted: tuple[str, ...]) -> float:
    """The mean over the arguments of one call; 0 for a wrong count, or where another thing than a `.png` is given."""
    if len(made) != len(wanted):
        return 0.0
    scores = []
    for argument, right in zip(made, wanted, strict=True):
        if ".png" in right and ".png" not in argument:
            return 0.0
        scores.append(1.0 if ".png" in right else _bleu_1(argument, right))
    return statistics.fmean(scores) if scores else 1.0


def _bleu_1(made: str, wanted: str) -> float:
    """Unigram precision times brevity penalty, in [0, 1], as the published scorer computes them."""
    if made == wanted == "":
        return 1.0
    words, right = made.split(), wanted.split()
    common = (Counter(words) & Counter(right)).total()
    precision, ratio = (common + _TINY) / (len(words) + _SMALL), (len(words) + _TINY) / (len(right) + _SMALL)
    return precision * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)
