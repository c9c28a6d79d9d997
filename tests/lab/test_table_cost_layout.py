"""The tables of characteristics and of cost from hand-made results, all tables together, and the foot."""

from table_results import by_seed, cells, costs, generator, results, traits

from lora_gen_jax.evaluation.sheet import to_markdown, to_rich
from lora_gen_jax.lab.tables import layout
from lora_gen_jax.lab.tables.layout import all_tables, foot, table_1, table_13


def test_characteristics_from_traits_and_measurements():
    found = results(
        base=by_seed(0.1), icl=by_seed(0.9, tokens=70.0), lora_moe=by_seed(0.5), lora_gen=by_seed(0.7, tokens=7.0)
    )
    spent = costs(icl=4.0, lora_gen=1.0, lora_moe=2.0)
    spent["answers"]["lora_gen"]["once_ms"] = {"cloud": 20.0, "merge": 5.0}
    spent["answers"]["lora_moe"]["numbers_beside"] = 4321
    known = {"icl": traits(False, True, True, False), "lora_moe": traits(True, False, False, False)}
    sheet = table_1(found, spent, known | {"lora_gen": traits(True, True, True, True)})
    lines = [tuple(row) for row in sheet.texts]
    assert lines == [
        ("in-context learning", "no", "yes", "yes", "no", "1.0×", "0", "0.000"),
        ("LoRAMoE", "yes", "no", "no", "no", "7.0×", "4321", "0.000"),
        ("LoRA-Gen", "yes", "yes", "yes", "yes", "10.0×", "0", "0.025"),
    ]


def test_a_run_of_ones_own_has_a_row_in_every_table_of_methods():
    found = results(
        lora=by_seed(0.1), lora_alone=by_seed(0.2), lora_gen=by_seed(0.3), lora_r64=by_seed(0.4), direct=by_seed(0.5)
    )
    spent = costs(lora=2.0, lora_alone=1.0, lora_gen=1.0, lora_r64=2.0, direct=1.0)
    # In the file's order; a variant of LoRA-Gen is not among them.
    rows = ["LoRA", "LoRA, no prompt", "LoRA-Gen", "LoRA (lora_r64)"]
    known = {"lora": traits(False, True, False, False), "lora_gen": traits(True, True, True, True)}
    for sheet in (layout.table_2(found, spent), table_1(found, spent, known), table_13(found, spent)):
        assert [row[0] for row in sheet.rows] == rows
    assert cells(layout.table_2(found, spent), "LoRA, no prompt")["of LoRA's"] == "0.50×"


def test_cost_table_has_training_steps():
    spent = costs(base=1.0, lora=2.0, lora_gen=1.0)
    spent["answers"]["lora_gen"]["once_ms"] = {"cloud": 20.0, "merge": 5.0}
    spent["training"] = {
        "lora": {"step_ms": 9.0, "macs": 3_000},
        "lora_gen_grouped": {"step_ms": 8.0, "macs": 4_000},
        "lora_gen": {"step_ms": 80.0, "macs": 5_000},
    }
    sheet = table_13(results(base=by_seed(0.1), lora=by_seed(0.1), lora_gen=by_seed(0.1)), spent)
    lines = [tuple(row) for row in sheet.texts]
    assert lines[1] == ("LoRA", "2 M", "2.00", "1.00×", "–", "9.0", "3 k")
    assert lines[2] == ("LoRA-Gen", "2 M", "1.00", "0.50×", "25.0", "8.0", "4 k")
    assert "80.0 ms" in sheet.notes[1]
    assert table_13(results(), {}) is None


def test_all_tables_in_order_with_published_figures_apart():
    runs = {
        run: by_seed(0.5) for run in ("base", "icl", "lora", "autocompressor", "experts_4", "cv_0", "gumbel", "direct")
    }
    found = results(**runs, lora_gen=by_seed(0.7, shots=("1", "5")))
    found["settings"]["agent"] = generator()
    sheets = all_tables(found, costs(lora=1.0), {"lora": traits(True, True, False, False)})
    assert [sheet.number for sheet in sheets] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 13]
    beside = {sheet.number: sheet.published for sheet in sheets if sheet.published is not None}
    assert list(beside) == [2, 3, 4, 13]
    assert all(sheet.title.startswith("published, NVIDIA A100, not measured here") for sheet in beside.values())
    assert ["TinyLlama-1.1B", "MixLoRA", "54.5", "48.6", "100.1"] in beside[2].texts
    assert ["OPT-2.7B", "LoRA-Gen", "61.6", "–", "7.54"] in beside[4].texts
    assert ["LoRA", "471 G", "0.19", "0.85"] in beside[13].texts
    for sheet in sheets:
        assert to_rich(sheet).row_count == len(sheet.rows)
    text = to_markdown(sheets, ["foot"])
    assert text.endswith("\n\nfoot\n")
    assert "| KeepTOP-K | 71.0 |" in text


def test_foot_says_what_was_run_where():
    found = results(lora=by_seed(0.5), lora_gen=by_seed(0.5))
    lines = [
        "mean ± standard error over 3 seeds: 0, 1, 2",
        "7 steps: lora, lora_gen",
        "cpu, 2 CPUs, Linux",
        "jax 1.2",
    ]
    assert foot(found, {}) == lines
    here = {"machine": found["machines"][0]["machine"], "versions": {"jax": "1.2"}}
    assert foot(found, here) == lines


def test_foot_says_over_what_an_error_is_and_which_documents_were_scored():
    found = results(icl=by_seed(0.5), lora=by_seed(0.5))
    found["seeds"], found["settings"]["base"] = ["1"], {"eval": {"limit": 40}}
    found["facts"] = {"base": {"1": {"steps": 0}}, "lora": {"1": {"steps": 7}}}
    found["settings"]["lora"]["eval"]["limit"] = 40
    assert foot(found, {})[:3] == [
        "mean ± standard error over documents, seed 1",
        "the first 40 documents of a task",
        "7 steps: lora",
    ]


def test_foot_names_what_ran_elsewhere():
    found = results(lora=by_seed(0.5), lora_gen=by_seed(0.5))
    other = {"device": "H200", "cpus": 16, "system": "Linux"}
    found["machines"].append({"machine": other, "runs": ["lora_gen", "direct"]})
    assert foot(found, {"machine": other, "versions": {"jax": "1.3"}})[2:] == [
        "cpu, 2 CPUs, Linux: lora, lora_gen",
        "H200, 16 CPUs, Linux: lora_gen, direct, costs",
        "jax 1.2: lora, lora_gen",
        "jax 1.3: costs",
    ]
