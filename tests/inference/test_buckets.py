"""Buckets are few and waste little; padding and id checks."""

import numpy as np
import pytest
from helpers import raises

from lora_gen_jax.buckets import bucket, check_tokens, pad_rows, power_of_two
from lora_gen_jax.errors import DataError


def test_few_buckets_and_little_waste():
    sizes = np.arange(1, 2049)
    buckets = np.array([bucket(int(n)) for n in sizes])
    assert (buckets >= sizes).all()
    assert (np.diff(buckets) >= 0).all()
    assert len(set(buckets)) == 24
    assert (buckets % 16 == 0).all()
    waste = buckets / sizes - 1
    assert waste[sizes > 64].max() < 0.25
    assert waste[sizes > 64].mean() < 0.11


def test_a_bucket_holds_exactly_its_own_size():
    assert [bucket(n) for n in (1, 16, 17, 128, 129, 160, 161, 256, 257)] == [
        16,
        16,
        32,
        128,
        160,
        160,
        192,
        256,
        320,
    ]
    assert [bucket(n, minimum=4) for n in (1, 5, 9, 33)] == [4, 8, 12, 40]
    assert [power_of_two(n) for n in (0, 1, 2, 3, 5, 8, 9)] == [1, 1, 2, 4, 8, 8, 16]


def test_rows_are_padded_to_the_right():
    tokens_BT, positions_BT = pad_rows([[5, 6, 7], [8]], 4, 3)
    np.testing.assert_array_equal(tokens_BT, [[5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(positions_BT, [[0, 1, 2, -1], [0, -1, -1, -1], [-1, -1, -1, -1]])
    assert tokens_BT.dtype == positions_BT.dtype == np.int32


@pytest.mark.parametrize("ids", [[3, 10], [3, -1]])
def test_ids_outside_the_embedding_are_named(ids):
    with raises(DataError, "prompts.4", ids[1], "0 to 9", code="unknown id"):
        check_tokens(ids, 10, "prompts.4")


def test_ids_inside_the_embedding_pass():
    check_tokens([0, 9], 10, "prompts.0")
    check_tokens([], 10, "prompts.0")


@pytest.mark.parametrize("ids", [[1.5], [True], ["a"], np.array([0.0])])
def test_ids_that_are_no_whole_numbers_are_refused(ids):
    with raises(DataError, "prompts.0", code="type"):
        check_tokens(ids, 10, "prompts.0")


def test_ids_may_be_an_array():
    check_tokens(np.array([0, 9]), 10, "prompts.0")
    with raises(DataError, "prompts.0", 10, code="unknown id"):
        check_tokens(np.array([0, 10]), 10, "prompts.0")


def test_an_id_of_more_than_64_bits_is_beyond_the_embedding():
    with raises(DataError, "prompts.0", 10**21, code="unknown id"):
        check_tokens([0, 10**21], 10, "prompts.0")
