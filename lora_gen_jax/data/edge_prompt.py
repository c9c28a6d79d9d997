"""Prompts in the edge model's own context: for methods that do not specialize by the prompt.

In: ids of contexts, each a prompt with a query read as one text (`Encoder.query`), and of answers. Out: a row of the
edge's batch: what its contexts begin with once, then for each query what is left of its context.
"""

import math
from collections.abc import Iterable, Sequence

Ids = list[int]


def shared_row(
    pairs: Iterable[tuple[Ids, Ids]], room: float = math.inf, slots: float = math.inf
) -> tuple[Ids, list[tuple[Ids, Ids]]]:
    """The first (context, response) pairs that fit a row together, cut into what they share and (query, response)s.

    A context is its row's shared beginning and its query, token for token: what stands on both sides of the seam may be
    one token, so the seam is where contexts first differ, and not where the prompt's text ends. Every query keeps a
    token, which predicts its answer's first.

    Args:
        pairs: no more of them are asked for than fit, and one.
        room: tokens of a row; any number, where it is left out. A response's last token is predicted and never read, so
            it takes none.
        slots: answer tokens of a row.
    """
    kept: list[tuple[Ids, Ids]] = []
    shared: Ids = []
    for context, response in pairs:
        begin = _common(shared, context[:-1]) if kept else context[:-1]
        more = [*kept, (context, response)]
        used = len(begin) + sum(len(c) - len(begin) + len(r) - 1 for c, r in more)
        if used > room or sum(len(r) for _, r in more) > slots:
            break
        kept, shared = more, begin
    return shared, [(context[len(shared) :], response) for context, response in kept]


def _common(one: Sequence[int], other: Sequence[int]) -> Ids:
    same = (a == b for a, b in zip(one, other, strict=False))
    length = next((i for i, equal in enumerate(same) if not equal), min(len(one), len(other)))
    return list(one[:length])
