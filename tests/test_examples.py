"""The examples run and do what they say."""

import json
import runpy
from pathlib import Path

import jax
from matplotlib import pyplot

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_pieces_specialize_a_model_that_knows_nothing_of_them(capsys):
    # As a user runs it: optax itself needs JAX's ordinary promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        base, specialized = runpy.run_path(str(EXAMPLES / "own_model.py"))["main"](["--steps", "250"])
    assert 2 < base < 4  # the average wave is zero: what is left is the waves' own variance
    assert specialized < 0.2 * base
    assert f"{specialized:.3f} specialized" in capsys.readouterr().out


def test_the_tour_runs_and_shows_what_it_says(monkeypatch, capsys):
    """The notebook's cells, one after the other, as Jupyter runs them but for the kernel."""
    pyplot.switch_backend("agg")
    figures = []
    monkeypatch.setattr(pyplot, "show", lambda: figures.append(pyplot.gcf()))
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for cell in code:
            exec(compile(cell, "tour.ipynb", "exec"), found)
    told = capsys.readouterr().out
    assert "specialized: [' [owlet]', ' [calf]']" in told
    assert "young: owl: [owlet]" in told
    assert 'sound: owl: "hoot"' in told
    (figure,) = figures
    for axis, gates_LE in zip(figure.axes, found["gates"].values(), strict=True):
        assert (axis.images[0].get_array() == gates_LE).all()
    pyplot.close(figure)
    assert found["learned"]["loss_after"] < 0.3 * found["learned"]["loss_before"]
    assert "before: [' grass', ' horses', ' rabbits']" in told
    assert "after: [' [calf]', ' [foal]', ' [kit]']" in told
    # What is kept in the notebook is what it prints.
    kept = [output for cell in cells for output in cell.get("outputs", ()) if output["output_type"] == "stream"]
    answers = ["".join(output["text"]).splitlines() for output in kept]
    assert {line for lines in answers for line in lines if "loss" not in line} <= set(told.splitlines())
    assert any(answers)
