"""Requests for lm-eval's models, and how their answers are compared."""

import numpy as np
from helpers import WORDS
from lm_eval.api.instance import Instance


def instances(kind, arguments):
    return [Instance(kind, {}, tuple(one), i) for i, one in enumerate(arguments)]


def words(rng, count):
    return " ".join(rng.choice(WORDS, count))


def loglikelihood_arguments():
    """Pairs of every kind: two few-shot blocks, options of one question, spaces, no context, more than fits."""
    rng = np.random.default_rng(5)
    blocks = [words(rng, 40), words(rng, 60)]
    pairs = []
    for i in range(12):
        context = f"{blocks[i % 2]} . {words(rng, int(rng.integers(1, 9)))}"
        pairs += [(context, " " + words(rng, int(rng.integers(1, 5)))) for _ in range(3)]
    pairs += [(words(rng, int(rng.integers(1, 20))), " " + words(rng, 2)) for _ in range(4)]
    question = words(rng, 6)
    pairs += [(question + "  ", "red"), (question, "  red"), (question + "\n", "blue sun"), (question, " red")]
    pairs += [("", words(rng, 3)), ("", "<s> red blue"), ("<s> red", " cat")]
    pairs += [(words(rng, 200), " " + words(rng, 3)), (words(rng, 159), " red blue"), (words(rng, 5), words(rng, 160))]
    return pairs


def agree(got, expected):
    """Both in float32, which rounds at 2^-24, and independently of each other.

    A token's log-probability of about 4 lies behind some hundred sums: off by √100 · 4 · 2^-24. Of up to 160 tokens the
    sum is off by √160 times as much, 3e-5.
    """
    np.testing.assert_allclose([g[0] for g in got], [e[0] for e in expected], atol=1e-4, rtol=0)
    assert [g[1] for g in got] == [e[1] for e in expected]
