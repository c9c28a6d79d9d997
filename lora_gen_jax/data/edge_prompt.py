"""Prompts in the edge model's own context: for methods that do not specialise by the prompt.

In: the ids of a prompt and of queries with their answers. Out: the queries as they go on behind the prompt, as many as
a row holds.
"""

from collections.abc import Sequence

from lora_gen_jax.data.encode import Encoder


def beside(
    edge: Encoder, prefix: list[int], queries: Sequence[tuple[list[int], list[int]]], room: int
) -> list[tuple[list[int], list[int]]]:
    """The first (query, response) pairs that fit a row of `room` tokens which begins with the prompt `prefix`.

    A response's last token is predicted and never read, so it takes no room.
    """
    kept, used = [], len(prefix)
    for query, response in queries:
        rest = continued(edge, prefix, query)
        used += len(rest) + len(response) - 1
        if used > room:
            break
        kept.append((rest, response))
    return kept


def continued(edge: Encoder, prefix: Sequence[int], query: list[int]) -> list[int]:
    """A query's ids as they go on behind a prompt: without a BOS of their own."""
    bos = edge.tokenizer.bos_token_id
    return query[1:] if bos is not None and query[:1] == [bos] == list(prefix[:1]) else query
