"""Every table from hand-made results, cell by cell: means, standard errors, rows that are missing, JSON, Markdown."""

import math
from types import SimpleNamespace

import pytest

from lora_gen_jax.methods import METHODS
from lora_gen_jax.tables import layout
from lora_gen_jax.tables.cost_layout import all_tables, foot, table_1, table_13
from lora_gen_jax.tables.sheet import Figure, Sheet, over_seeds, shown, to_json, to_markdown, to_rich

SEEN = {"a": True, "b": True, "c": False}
ACCURACY = (0.5, 0.6, 0.8)
# Of (0.5, 0.6, 0.8): mean 0.6333, standard deviation 0.15275 with n - 1, over √3.
SPREAD = "63.3 ± 8.8"


def scored(accuracy, tokens=10.0, seen_tokens=None):
    tasks = {
        t: {"acc": accuracy, "n": 4, "context_tokens": tokens if t == "c" else seen_tokens or tokens} for t in SEEN
    }
    groups = {"seen": {"accuracy": accuracy + 0.01}, "unseen": {"accuracy": accuracy - 0.1}}
    return {
        "tasks": tasks,
        "groups": groups,
        "ave": accuracy,
        "har": accuracy - 0.02,
        "ave_seen": accuracy + 0.02,
        "ave_unseen": accuracy - 0.2,
    }


def by_seed(*accuracies, shots=("5",), **more):
    return {str(i): {n: scored(a, **more) for n in shots} for i, a in enumerate(accuracies)}


def generator(run="lora_gen", **changes):
    """What is read of a run's settings."""
    method = run if run in METHODS else "lora_gen"
    reads = run in ("lora", "lora_moe", "mixlora")
    settings = {"num_experts": 16, "cv_coefficient": 0.01, **changes}
    return {"method": method, "data": {"edge_reads_prompt": reads}, "generator": settings}


def results(**runs):
    """The methods' runs, with the ablations' settings for all that are named so."""
    settings = {run: generator(run) for run in runs if run != "icl"}
    for run in runs:
        if run.startswith("experts_"):
            settings[run] = generator(num_experts=int(run.removeprefix("experts_")))
        if run.startswith("cv_"):
            settings[run] = generator(cv_coefficient=float(run.removeprefix("cv_")))
    return {
        "settings": settings,
        "runs": runs,
        "seen": SEEN,
        "facts": {run: {s: {"steps": 7, "trained_parameters": 1234} for s in seeds} for run, seeds in runs.items()},
        "agent": {},
        "machine": {"device": "cpu", "cpus": 2, "system": "Linux"},
        "versions": {"jax": "1.2"},
        "shots": "5",
        "seeds": ["0", "1", "2"],
    }


def costs(**ms):
    def one(value):
        macs = {"prefill": 1, "answer": 2_000_000}
        return {"answer_ms": value, "macs": macs, "once_ms": {}, "kept_tokens": 0, "adapter_parameters": 0}

    found = {row: one(value) for row, value in ms.items()}
    return {"answers": found, "workload": {"new_tokens": 6, "input_tokens": 2, "instruction_tokens": 68}}


def cells(sheet, row):
    (found,) = [line for line in sheet.rows if line[0] == row]
    return dict(zip(sheet.columns, map(shown, found), strict=True))


def test_mean_and_standard_error_over_seeds():
    figure = over_seeds([1.0, 2.0, 4.0, None], digits=2)
    assert figure.n == 3
    assert figure.mean == pytest.approx(7 / 3)
    assert figure.error == pytest.approx(math.sqrt(sum((x - 7 / 3) ** 2 for x in (1, 2, 4)) / 2 / 3))
    assert str(figure) == "2.33 ± 0.88"


def test_one_seed_has_no_error_and_none_is_missing():
    assert str(over_seeds([0.5], 100)) == "50.0"
    assert over_seeds([None, float("nan")]) is None


def test_main_table_has_a_column_for_each_of_few_tasks():
    found = results(
        base=by_seed(0.1), icl=by_seed(0.9, tokens=70.0), lora=by_seed(*ACCURACY), lora_gen=by_seed(0.7, 0.7)
    )
    sheet = layout.table_2(found, costs(base=1.0, icl=4.0, lora=2.0, lora_gen=1.0))
    assert [row[0] for row in sheet.rows] == [
        "base, no prompt",
        "in-context learning",
        "LoRA",
        "LoRA-Gen",
    ]
    lora = cells(sheet, "LoRA")
    assert lora["a\nseen"] == lora["c\nunseen"] == lora["AVE"] == SPREAD
    assert lora["HAR"] == "61.3 ± 8.8"
    assert lora["seen"] == "64.3 ± 8.8"
    assert lora["unseen"] == "53.3 ± 8.8"
    assert lora["AVE seen\nof 2"] == "65.3 ± 8.8"
    assert lora["AVE unseen\nof 1"] == "43.3 ± 8.8"
    assert cells(sheet, "LoRA-Gen")["AVE"] == "70.0 ± 0.0"
    icl = cells(sheet, "in-context learning")
    assert (icl["context\ntokens"], icl["latency\nms"], icl["of LoRA's"]) == ("70.0", "4.00", "2.00×")
    assert list(sheet.columns[1:4]) == ["a\nseen", "b\nseen", "c\nunseen"]


def test_main_table_of_many_tasks_has_the_means_alone(monkeypatch):
    monkeypatch.setattr(layout, "WIDEST", 2)
    sheet = layout.table_2(results(lora=by_seed(0.5)), {})
    assert sheet.columns[:4] == ("method", "seen", "unseen", "AVE seen\nof 2")


def test_a_run_without_results_is_a_row_of_dashes():
    sheet = layout.table_2(results(lora=by_seed(0.5), lora_moe={}, lora_gen={}), {})
    row = cells(sheet, "LoRAMoE")
    assert set(row.values()) == {"LoRAMoE", "–"}
    assert cells(sheet, "LoRA")["latency\nms"] == "–"


def test_ablations_take_the_default_where_it_belongs():
    runs = {run: by_seed(0.5) for run in ("lora_gen", "experts_4", "experts_12", "cv_0.1", "cv_0", "gumbel", "direct")}
    runs["lora_gen"] = by_seed(*ACCURACY)
    found = results(**runs)
    assert [row[0] for row in layout.table_5(found).rows] == ["4", "12", "16"]
    assert cells(layout.table_5(found), "16")["AVE"] == SPREAD
    assert [row[0] for row in layout.table_6(found).rows] == ["0", "0.01", "0.1"]
    assert cells(layout.table_6(found), "0.01")["AVE"] == SPREAD
    assert [row[0] for row in layout.table_7(found).rows] == ["KeepTOP-K", "Gumbel-softmax"]
    direct = cells(layout.table_9(found), "direct generation of the LoRA")
    assert (direct["AVE"], direct["trained parameters"]) == ("50.0", "1234")


def test_ablations_that_were_not_asked_for_have_no_table():
    found = results(lora_gen=by_seed(0.5))
    assert [layout.table_5(found), layout.table_6(found), layout.table_7(found), layout.table_9(found)] == [None] * 4
    assert layout.table_3(found) is None
    assert layout.table_4(found, {}) is None


def test_shots_with_the_latency_of_each_number():
    found = results(
        base=by_seed(0.1),
        icl={"0": {"1": scored(0.2, 20.0), "3": scored(0.4, 40.0), "5": scored(0.6, 60.0)}},
        lora_gen=by_seed(0.5, 0.7, shots=("1", "3", "5")),
    )
    sheet = layout.table_8(found, costs(icl=4.0, icl_1=2.0, icl_3=3.0, lora_gen=1.0))
    lines = [tuple(map(shown, row)) for row in sheet.rows]
    assert [line[1] for line in lines] == ["1", "3", "5"] * 2
    assert [line[-2:] for line in lines[:3]] == [("20.0", "2.00"), ("40.0", "3.00"), ("60.0", "4.00")]
    assert [line[-1] for line in lines[3:]] == ["1.00"] * 3
    assert lines[1][4] == "40.0"
    assert lines[3][4] == "60.0 ± 10.0"


def test_autocompressors_on_unseen_tasks():
    found = results(
        base=by_seed(0.1),
        icl=by_seed(0.9, tokens=70.0, seen_tokens=50.0),
        autocompressor=by_seed(*ACCURACY, tokens=14.0),
        lora_gen=by_seed(0.7, tokens=2.0),
    )
    spent = costs(icl=4.0, autocompressor=3.0, lora_gen=1.0)
    sheet = layout.table_4(found, spent)
    row = cells(sheet, "AutoCompressors")
    assert (row["unseen"], row["AVE unseen"]) == ("53.3 ± 8.8", "43.3 ± 8.8")
    assert (row["context\ntokens"], row["latency\nms"]) == ("14.0", "3.00")
    assert cells(sheet, "in-context learning")["context\ntokens"] == "70.0"


def agent_row(value):
    metrics = dict.fromkeys(("sr_t", "sr_act", "sr_args", "sr", "iou", "average"), value)
    return {"seen": metrics | {"context_tokens": 9.0, "compression": 10.0}}


def test_agent_table_has_seen_and_unseen_tools():
    found = results(lora_gen={})
    found["settings"]["agent"] = {}
    found["agent"] = {"0": {"lora": agent_row(0.5), "lora_gen": agent_row(0.6)}, "1": {"lora": agent_row(0.7)}}
    sheet = layout.table_3(found)
    lines = [tuple(map(shown, row)) for row in sheet.rows]
    assert lines[0] == ("LoRA, no tools in context", "seen", *["60.0 ± 10.0"] * 6, "9.0", "10.0×")
    assert lines[1][:3] == ("LoRA-Gen, trained on tools", "seen", "60.0")
    assert lines[2] == ("LoRA, no tools in context", "unseen", *["–"] * 8)


def traits(*values):
    return SimpleNamespace(
        **dict(zip(("compresses_context", "merged", "training_free", "transfers"), values, strict=True))
    )


def test_characteristics_from_traits_and_measurements():
    found = results(
        base=by_seed(0.1), icl=by_seed(0.9, tokens=70.0), lora_moe=by_seed(0.5), lora_gen=by_seed(0.7, tokens=7.0)
    )
    spent = costs(icl=4.0, lora_gen=1.0, lora_moe=2.0)
    spent["answers"]["lora_gen"]["once_ms"] = {"cloud": 20.0, "merge": 5.0}
    spent["answers"]["lora_moe"]["adapter_parameters"] = 4321
    known = {"icl": traits(False, True, True, False), "lora_moe": traits(True, False, False, False)}
    sheet = table_1(found, spent, known | {"lora_gen": traits(True, True, True, True)})
    lines = [tuple(map(shown, row)) for row in sheet.rows]
    assert lines == [
        ("in-context learning", "no", "yes", "yes", "no", "1.0×", "0", "0.000"),
        ("LoRAMoE", "yes", "no", "no", "no", "7.0×", "4321", "0.000"),
        ("LoRA-Gen", "yes", "yes", "yes", "yes", "10.0×", "0", "0.025"),
    ]


def test_cost_table_has_training_steps():
    spent = costs(base=1.0, lora=2.0, lora_gen=1.0)
    spent["answers"]["lora_gen"]["once_ms"] = {"cloud": 20.0, "merge": 5.0}
    spent["training"] = {
        "lora": {"step_ms": 9.0, "macs": 3_000},
        "lora_gen_grouped": {"step_ms": 8.0, "macs": 4_000},
        "lora_gen": {"step_ms": 80.0, "macs": 5_000},
    }
    sheet = table_13(results(base=by_seed(0.1), lora=by_seed(0.1), lora_gen=by_seed(0.1)), spent)
    lines = [tuple(map(shown, row)) for row in sheet.rows]
    assert lines[1] == ("LoRA", "2 M", "2.00", "1.00×", "–", "9.0", "3 k")
    assert lines[2] == ("LoRA-Gen", "2 M", "1.00", "0.50×", "25.0", "8.0", "4 k")
    assert "80.0 ms" in sheet.notes[1]
    published = [tuple(map(shown, row)) for row in sheet.published.rows]
    assert published[0] == ("Qwen2-1.5B, LoRA", "471 G", "0.19", "0.85")
    assert table_13(results(), {}) is None


def test_all_tables_in_order_with_published_figures_apart():
    runs = {
        run: by_seed(0.5) for run in ("base", "icl", "lora", "autocompressor", "experts_4", "cv_0", "gumbel", "direct")
    }
    found = results(**runs, lora_gen=by_seed(0.7, shots=("1", "5")))
    found["settings"]["agent"] = {}
    sheets = all_tables(found, costs(lora=1.0), {"lora": traits(True, True, False, False)})
    assert [sheet.number for sheet in sheets] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 13]
    beside = {sheet.number: sheet.published for sheet in sheets if sheet.published is not None}
    assert list(beside) == [2, 3, 4, 13]
    assert all(sheet.title.startswith("published, not measured here") for sheet in beside.values())
    assert ("TinyLlama-1.1B, MixLoRA", "54.5", "48.6", "100.1") in [tuple(map(shown, r)) for r in beside[2].rows]
    assert ("OPT-2.7B, LoRA-Gen", "61.6", "–", "7.54") in [tuple(map(shown, r)) for r in beside[4].rows]
    for sheet in sheets:
        assert to_rich(sheet).row_count == len(sheet.rows)
    text = to_markdown(sheets, ["foot"])
    assert text.endswith("\n\nfoot\n")
    assert "| KeepTOP-K | 71.0 |" in text


def test_foot_says_what_was_run_where():
    assert foot(results(lora=by_seed(0.5), lora_gen=by_seed(0.5))) == [
        "mean ± standard error over 3 seeds: 0, 1, 2",
        "7 steps: lora, lora_gen",
        "cpu, 2 CPUs, Linux",
        "jax 1.2",
    ]


def test_values_and_text_of_a_sheet():
    sheet = Sheet(5, "t", ("x", "a\nb"), (("r|s", Figure(1.5, 0.25, 3)), ("u", None)), ("note",))
    assert to_json(sheet)["rows"] == [
        {"x": "r|s", "a\nb": {"mean": 1.5, "stderr": 0.25, "n": 3}},
        {"x": "u", "a\nb": None},
    ]
    assert to_markdown([sheet]).splitlines() == [
        "**Table 5: t**",
        "",
        "| x | a b |",
        "| --- | ---: |",
        "| r\\|s | 1.5 ± 0.2 |",
        "| u | – |",
        "",
        "note",
    ]
