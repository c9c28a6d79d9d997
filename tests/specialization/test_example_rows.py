"""Examples in rows: every token once, where its own example can see it, and held out where it should be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_gen_jax.specialization.rows import ROW_TOKENS, pack_examples, row_length, variants
from lora_gen_jax.specialization.settings import RefineConfig

PAIR = st.tuples(
    st.lists(st.integers(1, 90), min_size=1, max_size=40), st.lists(st.integers(1, 90), min_size=1, max_size=20)
)
PROMPTS = st.lists(st.lists(PAIR, min_size=1, max_size=9), min_size=1, max_size=4)


def unpacked(rows, U, P, u, p):
    """[(ids read, [(predicting place, target)] learned, the same held out)] of one variant's examples."""
    B = len(rows.tokens_BT)
    M, found = B // (P * U), []
    for m in range(M):
        b = (p * U + u) * M + m
        for segment in range(1, rows.segments_BT[b].max() + 1):
            at = np.flatnonzero(rows.segments_BT[b] == segment)
            assert (np.diff(at) == 1).all()
            assert rows.positions_BT[b, at].tolist() == list(range(len(at)))
            supervised = []
            for mask in (rows.train_BS[b], rows.held_BS[b]):
                slots = [s for s in np.flatnonzero(mask) if rows.source_BS[b, s] in at]
                supervised.append([(int(rows.source_BS[b, s] - at[0]), int(rows.target_BS[b, s])) for s in slots])
            found.append((rows.tokens_BT[b, at].tolist(), *supervised))
    return sorted(found)


def plain(examples, out):
    """The same, written from the examples."""
    found = []
    for i, (query, answer) in enumerate(examples):
        places = [(len(query) - 1 + k, token) for k, token in enumerate(answer)]
        found.append(([*query, *answer[:-1]], [] if i in out else places, places if i in out else []))
    return sorted(found)


@given(PROMPTS, st.sampled_from(["fixed", "folds", "held_out"]))
@settings(deadline=None, max_examples=60)
def test_every_example_is_read_once_by_every_variant(examples, stopping):
    config = RefineConfig(stopping=stopping, folds=3)
    P = len(examples) + 1
    rows, U = pack_examples(examples, P, config)
    for p, pairs in enumerate(examples):
        held = variants(len(pairs), config)
        for u, out in enumerate(held):
            assert unpacked(rows, U, P, u, p) == plain(pairs, out)
        for u in range(len(held), U):
            assert not any(learned or out for _, learned, out in unpacked(rows, U, P, u, p))
    last = slice((P - 1) * len(rows.tokens_BT) // P, None)
    assert not rows.train_BS[last].any()
    assert (rows.positions_BT[last] == -1).all()


def test_long_examples_share_no_row_that_grows_with_their_number():
    few = [[([1] * 100, [2] * 20)] * 3]
    many = [[([1] * 100, [2] * 20)] * 30]
    assert row_length(few) == 384
    assert row_length(many) == ROW_TOKENS
    assert row_length([[([1] * 700, [2])]]) == 768
    rows, _ = pack_examples(many, 1, RefineConfig())
    assert rows.tokens_BT.shape == (8, ROW_TOKENS)


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_every_example_is_held_out_once_by_the_folds(count):
    whole, *folds = variants(count, RefineConfig(stopping="folds", folds=4))
    assert whole == set()
    assert len(folds) == min(4, count)
    assert sorted(i for fold in folds for i in fold) == list(range(count))


def test_a_fifth_is_held_out():
    config = RefineConfig(stopping="held_out")
    assert [variants(count, config) for count in (1, 3, 5, 16)] == [[set()], [{2}], [{4}], [{4, 9, 14}]]
