"""The examples run and do what they say."""

import runpy
from pathlib import Path

import jax

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_pieces_specialise_a_model_that_knows_nothing_of_them(capsys):
    # As a user runs it: optax itself needs JAX's ordinary promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        base, specialised = runpy.run_path(str(EXAMPLES / "own_model.py"))["main"](["--steps", "250"])
    assert 2 < base < 4  # the average wave is zero: what is left is the waves' own variance
    assert specialised < 0.2 * base
    assert f"{specialised:.3f} specialised" in capsys.readouterr().out
