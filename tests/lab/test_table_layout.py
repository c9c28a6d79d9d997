"""Tables of accuracy from hand-made results, cell by cell: means, standard errors, missing rows, JSON, Markdown."""

import math

import pytest
from table_results import by_seed, cells, costs, generator, results, scored

from lora_gen_jax.evaluation.sheet import Figure, Sheet, to_json, to_markdown
from lora_gen_jax.lab.tables import layout, output
from lora_gen_jax.lab.tables.layout import over_seeds

ACCURACY = (0.5, 0.6, 0.8)
# Of (0.5, 0.6, 0.8): mean 0.6333, standard deviation 0.15275 with n - 1, over √3.
SPREAD = "63.3 ± 8.8"


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
    assert lora["HAR unseen\nof 1"] == "33.3 ± 8.8"
    assert cells(sheet, "LoRA-Gen")["AVE"] == "70.0 ± 0.0"
    icl = cells(sheet, "in-context learning")
    assert (icl["context\ntokens"], icl["latency\nms"], icl["of LoRA's"]) == ("70.0", "4.00", "2.00×")
    assert list(sheet.columns[1:4]) == ["a\nseen", "b\nseen", "c\nunseen"]


def test_a_single_seed_has_the_error_over_its_documents():
    found = results(lora=by_seed(0.5))
    one = found["runs"]["lora"]["0"]["5"]
    for (task, error), accuracy in zip({"a": 0.03, "b": 0.04, "c": 0.12}.items(), (0.2, 0.4, 0.5), strict=True):
        one["tasks"][task] |= {"acc": accuracy, "stderr": error}
    one["groups"]["seen"]["stderr"] = 0.025
    # 1 / HAR is (5 + 2.5 + 2) / 3; its error is that of the inverses, s / a².
    one |= {"har": 3 / 9.5, "har_unseen": 0.5}
    lora = cells(layout.table_2(found, {}), "LoRA")
    assert (lora["a\nseen"], lora["c\nunseen"]) == ("20.0 ± 3.0", "50.0 ± 12.0")
    assert lora["seen"] == "51.0 ± 2.5"
    assert lora["unseen"] == "40.0"
    assert lora["AVE"] == "50.0 ± 4.3"  # √(3² + 4² + 12²) / 3
    assert lora["AVE seen\nof 2"] == "52.0 ± 2.5"
    inverses = [0.03 / 0.2**2, 0.04 / 0.4**2, 0.12 / 0.5**2]
    expected = math.sqrt(sum(x**2 for x in inverses)) / 3 * (3 / 9.5) ** 2
    assert lora["HAR"] == f"31.6 ± {100 * expected:.1f}"
    assert lora["HAR unseen\nof 1"] == "50.0 ± 12.0"  # of one task, its own
    one["tasks"]["b"]["acc"] = 0.0
    assert cells(layout.table_2(found, {}), "LoRA")["HAR"] == "31.6"


def test_figures_have_the_methods_whose_latency_is_known(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(output, "draw_means", lambda scores, path: drawn.update({path.name: scores}))
    monkeypatch.setattr(output, "draw_tasks", lambda scores, tasks, path: drawn.update({path.name: scores}))
    found = results(
        base=by_seed(0.1), icl=by_seed(*ACCURACY), lora=by_seed(0.5), lora_gen=by_seed(0.7), cv_0=by_seed(1)
    )
    output.draw(tmp_path, found, costs(base=1.0, icl=4.0, lora_gen=1.5))
    assert list(drawn) == ["accuracy.png", "accuracy_tasks.png"]
    methods = drawn["accuracy.png"].methods
    assert list(methods) == ["base", "icl", "lora_gen"]
    assert [list(of) for of in methods.values()] == [[0], [5], [5]]
    assert methods["icl"][5]["tasks"]["a"] == pytest.approx({"acc": 19 / 30, "stderr": 0.0881917, "latency_ms": 4.0})
    monkeypatch.undo()
    assert output.draw(tmp_path, found, {}) == []
    assert [path.name for path in output.draw(tmp_path, found, costs(icl=4.0))] == [
        "accuracy.png",
        "accuracy_tasks.png",
    ]
    monkeypatch.setattr(output, "MOST_TASKS", 2)
    assert [path.name for path in output.draw(tmp_path, found, costs(icl=4.0))] == ["accuracy.png"]


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
    names = ("lora_gen", "experts_4", "experts_12", "cv_0.1", "cv_0", "gumbel", "gumbel_top_k", "direct")
    runs = {run: by_seed(0.5) for run in names}
    runs["lora_gen"] = by_seed(*ACCURACY)
    found = results(**runs)
    experts, balance, routing, emitted = layout.ablations(found)
    assert [row[0] for row in experts.rows] == ["4", "12", "16"]
    assert cells(experts, "16")["AVE"] == SPREAD
    assert [row[0] for row in balance.rows] == ["0", "0.01", "0.1"]
    assert cells(balance, "0.01")["AVE"] == SPREAD
    # The paper's ablation, which changes one thing, before the variant that also uses all experts.
    assert [row[0] for row in routing.rows] == [
        "KeepTOP-K",
        "Gumbel-softmax, then KeepTOP-K (the paper's ablation)",
        "Gumbel-softmax of all experts (ours)",
    ]
    direct = cells(emitted, "direct generation of the LoRA")
    assert (direct["AVE"], direct["trained parameters"]) == ("50.0", "1234")


def test_ablations_that_were_not_asked_for_have_no_table():
    found = results(lora_gen=by_seed(0.5))
    assert layout.ablations(found) == [None] * 4
    assert layout.table_3(found) is None
    assert layout.table_4(found, {}) is None


def test_shots_with_the_latency_of_each_number():
    found = results(
        base=by_seed(0.1),
        icl={"0": {"1": scored(0.2, 20.0), "3": scored(0.4, 40.0), "5": scored(0.6, 60.0)}},
        lora_gen=by_seed(0.5, 0.7, shots=("1", "3", "5")),
    )
    sheet = layout.table_8(found, costs(icl=4.0, icl_1=2.0, icl_3=3.0, lora_gen=1.0))
    lines = [tuple(row) for row in sheet.texts]
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
    found["settings"]["agent"] = generator()
    found["agent"] = {"0": {"lora": agent_row(0.5), "lora_gen": agent_row(0.6)}, "1": {"lora": agent_row(0.7)}}
    sheet = layout.table_3(found)
    lines = [tuple(row) for row in sheet.texts]
    assert lines[0] == ("LoRA, no tools in context", "seen", *["60.0 ± 10.0"] * 6, "9.0", "10.0×")
    assert lines[1][:3] == ("LoRA-Gen, trained on tools", "seen", "60.0")
    assert lines[2] == ("LoRA, no tools in context", "unseen", *["–"] * 8)


def test_values_and_text_of_a_sheet():
    sheet = Sheet("t", ("x", "a\nb"), (("r|s", Figure(1.5, 0.25, 3)), ("u", None)), ("note",), 5)
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
