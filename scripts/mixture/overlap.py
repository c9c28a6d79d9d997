"""Whether a task that is trained on equals, or nearly equals, one that is to be evaluated.

Names cannot tell. Answers can: those of both tasks on inputs that both know. A generated task is asked for its answer
to every input of the other one that it understands, so that inputs need not coincide.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from .base import Base, Pair
from .files import TaskFile

CHANCE = 3
"""So many equal answers may be chance."""
AGREEMENT = 0.7
"""Of Cohen's kappa: 0 where answers agree as often as unrelated ones would, 1 where all of them do."""
_ASKED = 80
"""Inputs of an evaluated task that a generated one is asked for."""


def twin(task: Base, unseen: Sequence[TaskFile]) -> str | None:
    """How much the task agrees with the first unseen task that it nearly equals, None where there is none."""
    known = dict(task.pairs)
    for other in unseen:
        pairs = (*other.train, *other.test)
        if task.answer is None:
            shared = [(known[text], answer) for text, answer in pairs if text in known]
        else:
            asked = pairs[:: max(1, len(pairs) // _ASKED)]
            shared = [(ours, answer) for text, answer in asked if (ours := answered(task.answer, text)) is not None]
        equal = sum(ours == theirs for ours, theirs in shared)
        if equal > CHANCE and kappa(shared) >= AGREEMENT:
            return f"{other.name} does ({equal} of {len(shared)} inputs that both know)"
    return None


def answered(function: Callable[[str], str | None], text: str) -> str | None:
    """The function's answer to a text, None where it has none."""
    try:
        return function(text)
    except (ValueError, IndexError, ArithmeticError):
        return None


def kappa(answers: Sequence[Pair]) -> float:
    """Cohen's kappa of pairs of answers: agreement beyond what the frequencies of the answers make likely."""
    n = len(answers)
    agreed = sum(a == b for a, b in answers) / n
    ours, theirs = (Counter(side) for side in zip(*answers, strict=True))
    chance = sum(ours[answer] * theirs[answer] for answer in ours) / n**2
    return (agreed - chance) / (1 - chance) if chance < 1 else 0.0
