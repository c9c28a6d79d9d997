"""What is measured for the tables, what of it is read again, and what a failure leaves."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.files import write_json
from lora_gen_jax.lab.tables import latency
from lora_gen_jax.lab.tables.command import table_main
from lora_gen_jax.lab.tables.spec import read_tables
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import load_pair


@pytest.mark.parametrize("error", [ConfigError("too long"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too long")])
def test_costs_that_cannot_be_measured_do_not_lose_the_tables(path, started, monkeypatch, capsys, error):
    def fails(tables, rows):
        raise error

    monkeypatch.setattr(latency, "measure_costs", fails)
    with pytest.raises(SystemExit):
        table_main([str(path), "--only", "lora"])
    shown = capsys.readouterr()
    assert f"costs cannot be measured: {error}" in shown.err
    assert "Table 2" in shown.out
    assert (path.parent / "run" / "tables.md").exists()


def test_tables_are_written_before_costs_are_measured_and_replaced_after(path, started, monkeypatch):
    seen = []

    def measure(tables, rows):
        seen.append(json.loads((path.parent / "out" / "tables.json").read_text())["costs"])
        return {"answers": {}, "workload": {}}

    monkeypatch.setattr(latency, "measure_costs", measure)
    table_main([str(path), "--only", "lora", "--out", str(path.parent / "out")])
    assert seen == [{}]
    assert json.loads((path.parent / "out" / "tables.json").read_text())["costs"] == {"answers": {}, "workload": {}}


def test_what_was_measured_before_a_failure_is_shown(path, started, monkeypatch):
    measured = {"answers": {"lora": {"answer_ms": 4.0}}, "workload": {}}

    def fails(tables, rows):
        settings = latency.asked(tables, *latency.timed_configs(tables, rows))
        places = {"machine": latency.machine(), "versions": latency.versions()}
        write_json(tables.directory / latency.FILE, {"settings": settings, **places, **measured})
        raise ConfigError("too long")

    monkeypatch.setattr(latency, "measure_costs", fails)
    with pytest.raises(SystemExit):
        table_main([str(path), "--only", "lora"])
    assert "| LoRA, no prompt | 55.0" in (path.parent / "run" / "tables.md").read_text()
    assert json.loads((path.parent / "run" / "tables.json").read_text())["costs"]["answers"] == measured["answers"]


def test_every_finished_run_of_a_method_is_timed(path):
    tables = read_tables(path)
    runs = {"lora_alone": {"method": "lora"}, "mine": {"method": "mixlora"}, "later": {"method": "lora"}}
    runs |= {"lora_gen": {}, "direct": {"generator": {"generator": "direct"}}}
    tables = dataclasses.replace(tables, runs=runs)
    assert latency.timed_rows(tables, {"base", "lora_alone", "mine", "lora_gen", "direct", "agent"}) == [
        "lora_alone",
        "mine",
        "lora_gen",
    ]


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"machine": {"device": "another"}}, False),
        ({"versions": {"jax": "0"}}, False),
        ({"limit": 3}, False),
        ({"old": True}, True),
    ],
)
def test_costs_of_another_machine_or_work_are_not_read_again(path, change, kept):
    tables = read_tables(path)
    settings = latency.asked(tables, *latency.timed_configs(tables, ["lora"]))
    found = {"settings": settings, "machine": latency.machine(), "versions": latency.versions(), "answers": {}}
    if "limit" in change:
        settings["eval"]["limit"] = change["limit"]
    elif "old" in change:
        # An older version noted neither.
        del settings["eval"]["limit"], settings["rows"]["lora"]["hub"]
    else:
        found |= change
    tables.directory.mkdir()
    write_json(tables.directory / latency.FILE, found)
    assert ("answers" in latency.kept_costs(tables, ["lora"])) == kept
    assert latency.kept_costs(tables, ["lora", "lora_gen"]) == {}


def test_answers_of_methods_that_read_merge_and_compress_are_really_measured(path, monkeypatch):
    monkeypatch.setattr(latency, "REPEATS", 1)
    # Programs that are compiled for their size alone have tests of their own.
    monkeypatch.setattr(latency.efficiency, "answer_cost", lambda *args: {})
    monkeypatch.setattr(latency.efficiency, "specializing_cost", lambda setup: {})
    tables = read_tables(path)
    runs = {
        "lora": {"method": "lora", "data": {"edge_reads_prompt": True, "edge_length": 96}},
        "mixlora": {"method": "mixlora"},
        "autocompressor": {
            "method": "autocompressor",
            "compressor": {"summary_tokens": 3, "segments": 2},
            "data": {"edge_prompt_length": 48},
        },
        "lora_gen": {},
    }
    tables = dataclasses.replace(tables, runs=runs)
    configs, own = latency.timed_configs(tables, list(runs)[:3])
    pair = load_pair(own)
    works = latency.workloads(own, pair, (1,))
    found = latency.answers(own, pair, works, configs)
    work, sizes = works[1], found["answers"]
    assert found["workload"]["instruction_tokens"] == work.kept > 0
    read = {row: (one["context_tokens"], one["kept_tokens"]) for row, one in sizes.items()}
    query, whole = len(work.query), len(work.whole)
    assert read == {
        "base": (query, 0),
        "icl": (whole, 0),
        "icl_kept_prefix": (whole - work.kept, work.kept),
        "lora": (whole, 0),
        "mixlora": (query, 0),
        "autocompressor": (query, 3),
    }
    # MixLoRA's experts and routers stay beside the weights; of the soft tokens their keys and values do.
    module = make_generator(configs["mixlora"], pair)
    trained = sum(np.size(x) for x in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), None, None)))
    edge = pair.edge.config
    assert {row: one["numbers_beside"] for row, one in sizes.items()} == {
        **dict.fromkeys(("base", "icl", "icl_kept_prefix", "lora"), 0),
        "mixlora": trained,
        "autocompressor": 2 * 3 * edge.num_layers * edge.num_kv_heads * edge.head_dim,
    }
    assert all(one["answer_ms"] > 0 for one in sizes.values())
    assert set(sizes["autocompressor"]["once_ms"]) == {"compress"}


def test_costs_are_measured_for_a_real_prompt_and_read_again(path, monkeypatch):
    tables, calls = read_tables(path), []
    monkeypatch.setattr(latency, "answers", lambda *args: calls.append(args) or {"answers": {"icl": {}}})
    monkeypatch.setattr(latency, "training_costs", lambda *args: calls.append(args) or {"lora": {"step_ms": 1.0}})
    tables.directory.mkdir()
    found = latency.measure_costs(tables, ["lora", "lora_gen"])
    (_, _, works, configs), (_, _, instruction, query, _) = calls
    assert list(works) == [1, 2]
    assert len(works[1].whole) < len(works[2].whole)
    assert works[1].query == works[2].query
    assert (instruction, query) == (len(works[2].cloud_prompt), len(works[2].query) + works[2].new_tokens)
    assert {row: config.method for row, config in configs.items()} == {"lora": "lora", "lora_gen": "lora_gen"}
    assert latency.measure_costs(tables, ["lora", "lora_gen"]) == json.loads(json.dumps(found))
    assert len(calls) == 2
    latency.measure_costs(tables, ["lora_gen"])
    assert len(calls) == 4


def test_training_costs_alone_are_measured_after_a_stop(path, monkeypatch):
    tables, calls = read_tables(path), []
    tables.directory.mkdir()

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "answers", lambda *args: calls.append("answers") or {"answers": {"icl": {}}})
    monkeypatch.setattr(latency, "training_costs", stopped)
    with pytest.raises(KeyboardInterrupt):
        latency.measure_costs(tables, ["lora"])
    monkeypatch.setattr(latency, "training_costs", lambda *args: {"lora": {}})
    assert latency.measure_costs(tables, ["lora"])["answers"] == {"icl": {}}
    assert calls == ["answers"]
