"""How requests are divided, against hand-made cases and what any division must keep."""

import numpy as np
import pytest

from lora_gen_jax.buckets import bucket
from lora_gen_jax.evaluation.request_plan import SHORTEST_PREFIX, pieces, shared_prefixes


def test_contexts_are_divided_where_most_is_saved():
    def grown(prefix, count):
        return [(*prefix, 100 + i, 2, 3) for i in range(count)]

    header = tuple(range(200, 220))
    blocks = [header + tuple(range(start, start + 40)) for start in (300, 400)]
    contexts = [*grown(blocks[0], 6), (1, 2), *grown(blocks[1], 4), (1,), header]
    groups = shared_prefixes(contexts, least=60)
    assert [(g.prefix, sorted(g.members)) for g in groups] == [
        (blocks[0], [0, 1, 2, 3, 4, 5]),
        (blocks[1], [7, 8, 9, 10]),
        ((), [6, 11, 12]),
    ]
    # Where the blocks hardly differ, one prefix for all saves more than one for each.
    near = [*grown(header, 5), *grown((*header, 7), 2)]
    assert [(g.prefix, len(g.members)) for g in shared_prefixes(near, 60)] == [(header, 7)]
    # Too little saved, or too short to be worth it.
    assert [g.prefix for g in shared_prefixes(contexts, least=1000)] == [()]
    assert [g.prefix for g in shared_prefixes(grown(header[: SHORTEST_PREFIX - 1], 50), 10)] == [()]
    assert shared_prefixes([], 10) == []


def test_every_context_is_in_one_group_and_goes_on_after_its_prefix():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        contexts = [tuple(rng.integers(0, 2, rng.integers(1, 60)).tolist()) for _ in range(20)]
        contexts += [(*contexts[int(rng.integers(0, 20))], *rng.integers(0, 2, 30).tolist()) for _ in range(20)]
        contexts += [(0,) * n for n in range(1, 40)]
        groups = shared_prefixes(contexts, least=20)
        assert sorted(i for group in groups for i in group.members) == list(range(len(contexts)))
        for prefix, members in groups:
            assert all(contexts[i][: len(prefix)] == prefix and len(contexts[i]) > len(prefix) for i in members)


@pytest.mark.parametrize(("prefix", "new"), [(1000, 0), (0, 1000), (0, 0), (5000, 20)])
def test_pieces_hold_every_row_once_and_bound_what_is_held(prefix, new):
    lengths = np.random.default_rng(1).integers(1, 300, 200).tolist()
    seen, most = [], 0
    for piece, tokens in pieces(lengths, prefix, new, batch_tokens=512, batches=2):
        seen += piece
        longest = bucket(max(lengths[i] for i in piece))
        rows = tokens // longest
        most = max(most, rows)
        assert len(piece) <= 2 * rows
        assert rows == 1 or rows * longest <= 512
        assert rows == 1 or rows * (new + longest) <= 4 * 512
        assert rows == 1 or rows * longest * (prefix + longest) <= 1024 * 512
    assert sorted(seen) == list(range(200))
    assert seen == sorted(seen, key=lambda i: -lengths[i])
    # Short rows are read many at a time unless they write much or follow a very long prefix.
    assert most == {(1000, 0): 32, (0, 1000): 2, (0, 0): 32, (5000, 20): 4}[prefix, new]
