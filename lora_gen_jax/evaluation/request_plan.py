"""Which requests are computed together: what they begin with is read once, and results come in pieces.

In: token ids of contexts, lengths of rows. Out: groups of contexts with the prefix that all of a group share,
and pieces of a group, each small enough that little is lost when an evaluation is stopped.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_gen_jax.buckets import bucket

# A shorter prefix is not worth programs of its own.
SHORTEST_PREFIX = 16
# Keys and values held at a time, as a multiple of the tokens read at a time: rows that write many tokens hold them.
HELD_PER_READ = 4
# Keys that each token of a full batch may look at: with a longer prefix fewer rows are read at a time, so that the
# scores of attention stay in memory.
SEEN_PER_READ = 1024


class PrefixGroup(NamedTuple):
    """Contexts that begin alike.

    Attributes:
        prefix: ids that all begin with, each going on with at least one of its own; empty where nothing is shared.
        members: indices of the contexts.
    """

    prefix: tuple[int, ...]
    members: list[int]


def shared_prefixes(contexts: Sequence[tuple[int, ...]], least: int) -> list[PrefixGroup]:
    """Divides contexts so that the fewest tokens are read.

    Sorted, contexts that begin alike are neighbors, and their shared prefixes form a tree. Each of its nodes saves
    (contexts − 1) · length tokens; from the leaves up, a node is kept whole where that is more than its parts save.

    Args:
        contexts: at least one id each.
        least: a group must save at least this many tokens, or its contexts are read in full.

    Returns:
        groups that hold every context once; the last has the contexts that share nothing, if there are any.
    """
    if not contexts:
        return []
    order = sorted(range(len(contexts)), key=lambda i: contexts[i])
    groups, alone, unseen = [], [], [_tree([contexts[i] for i in order], least)]
    while unseen:
        node = unseen.pop()
        if node.whole:
            members = order[node.start : node.stop]
            groups.append(PrefixGroup(contexts[members[0]][: node.depth], members))
            continue
        at = node.start
        for part in [*node.parts, _Node(0, node.stop)]:
            alone += order[at : part.start]
            at = part.stop
        unseen += reversed(node.parts)
    return [*groups, PrefixGroup((), sorted(alone))] if alone else groups


@dataclasses.dataclass
class _Node:
    """Neighbours start … stop−1 of the sorted contexts, all of which share `depth` ids.

    Attributes:
        parts: smaller runs of neighbors inside that share more.
        saved: tokens that need not be read, with the best division.
        whole: that division is this node itself.
    """

    depth: int
    start: int
    stop: int = 0
    parts: list["_Node"] = dataclasses.field(default_factory=list)
    saved: int = 0
    whole: bool = False

    def close(self, stop: int, least: int) -> "_Node":
        self.stop = stop
        own = (stop - self.start - 1) * self.depth if self.depth >= SHORTEST_PREFIX else 0
        inside = sum(part.saved for part in self.parts)
        self.whole = own > 0 and own >= max(least, inside)
        self.saved = own if self.whole else inside
        return self


def _tree(contexts: Sequence[tuple[int, ...]], least: int) -> _Node:
    """The tree of shared prefixes of sorted contexts, by one pass with a stack of the nodes still open."""
    stack: list[_Node] = []
    for i in range(1, len(contexts) + 1):
        depth = _overlap(contexts[i - 1], contexts[i]) if i < len(contexts) else -1
        inner, start = [], i - 1
        while stack and stack[-1].depth > depth:
            node = stack.pop()
            node.parts += inner
            inner, start = [node.close(i, least)], node.start
        if stack and stack[-1].depth == depth:
            stack[-1].parts += inner
        else:
            stack.append(_Node(depth, start, parts=inner))
    return stack[0].close(len(contexts), least)


def _overlap(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many ids both begin with; each keeps at least one of its own."""
    length = min(len(one), len(other)) - 1
    if one[:length] == other[:length]:
        return length
    return next(i for i in range(length) if one[i] != other[i])


def pieces(
    lengths: Sequence[int], prefix: int, new: int, batch_tokens: int, batches: int
) -> Iterator[tuple[list[int], int]]:
    """Rows of similar length, longest first, a few batches at a time.

    Args:
        lengths: tokens that each row reads.
        prefix: tokens that all rows begin with, read before.
        new: tokens that each row will write.
        batch_tokens: about how many tokens are read at a time.
        batches: of a piece, at most.

    Returns:
        an iterator over indices of rows, and the tokens to read at a time so that what is held fits as well.
    """
    queue = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while queue:
        longest = bucket(lengths[queue[0]])
        held = HELD_PER_READ * batch_tokens // (longest + new)
        seen = SEEN_PER_READ * batch_tokens // (longest * (prefix + longest))
        fit = max(1, min(batch_tokens // longest, held, seen))
        # A power of two of rows, as batches have, so that pieces end where batches do.
        rows = 1 << (fit.bit_length() - 1)
        taken = queue[: rows * batches]
        # Much shorter rows would be read more at a time, and each holds what it writes.
        taken = [i for i in taken if 2 * bucket(lengths[i]) > longest]
        yield taken, rows * longest
        queue = queue[len(taken) :]
