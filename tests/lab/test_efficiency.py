"""The command that prints what an answer costs: its arithmetic by hand, and the whole of it on a tiny pair."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import experiment, raises, token_rows, write_config

from lora_gen_jax.cli import main
from lora_gen_jax.config import ModelConfig
from lora_gen_jax.config_file import flags_and_config, read_config
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.inference.cost import Counted, linear_macs
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.prefix import encode_prefix
from lora_gen_jax.lab.costs import command as efficiency_command
from lora_gen_jax.lab.costs import training as efficiency_training
from lora_gen_jax.lab.costs import transformers_peer
from lora_gen_jax.lab.costs.command import (
    EfficiencyFlags,
    made_ready,
    make_peers,
    make_workload,
    run,
    sizes_of,
)
from lora_gen_jax.lab.costs.measure import Timings, compared, figures, measure
from lora_gen_jax.lab.costs.methods import answering
from lora_gen_jax.lab.costs.report import break_even, derived, disagreements, print_report
from lora_gen_jax.lab.costs.training import CASES, make_batch
from lora_gen_jax.methods.lora import lora_macs
from lora_gen_jax.models import load_model, load_pair
from lora_gen_jax.training.cost import edge_cost, step_cost

SMALL = ["--instruction-tokens", "12", "--input-tokens", "8", "--new-tokens", "3", "--batch-sizes", "1"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("efficiency")
    return write_config(root / "tiny.py", experiment(root, root / "run"))


@pytest.fixture(scope="module")
def results(config_file: Path) -> dict[str, Any]:
    """What the command wrote, one of the ways to train left in."""
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficiency_training, "CASES", {"lora": CASES["lora"]})
        main(["efficiency", str(config_file), *SMALL, "--repeats", "1"])
    return json.loads((config_file.parent / "run" / "efficiency-1" / "efficiency.json").read_text())


@pytest.mark.parametrize(
    ("own", "other", "queries"),
    [
        ((30, 10), (0, 25), 2),  # 30 + 2·10 = 50 = 2·25
        ((31, 10), (0, 25), 3),  # 31 + 20 > 50, 31 + 30 ≤ 75
        ((30, 10), (28, 25), 1),
        ((100, 9.9), (0, 10), 1000),
        ((0, 10), (0, 10), 1),
        ((10, 10), (0, 10), None),
        ((10, 12), (5, 10), None),
    ],
)
def test_break_even_by_hand(own: tuple[float, float], other: tuple[float, float], queries: int | None):
    found = break_even(own, other)
    assert found["queries"] == queries
    assert ("reason" in found) == (queries is None)


def test_break_even_ends_with_the_last_query_that_is_no_dearer_in_floating_point_too():
    assert break_even((0.1, 0.2), (0.3, 0.1))["until"] == 2


def test_break_even_is_the_smallest_number():
    rng = np.random.default_rng(0)
    for once, each, other_once, other_each in rng.integers(1, 30, (200, 4)).tolist():
        paying = [n for n in range(1, 1000) if once + n * each <= other_once + n * other_each]
        found = break_even((once, each), (other_once, other_each))
        assert found["queries"] == (paying[0] if paying else None)
        if "until" in found:
            assert found["until"] == paying[-1]
        else:
            assert not paying or paying[-1] == 999


def test_all_methods_are_measured(results: dict[str, Any]):
    assert list(results["methods"]) == list(answering())
    read = {name: (method["context_tokens"], method["kept_tokens"]) for name, method in results["methods"].items()}
    same = dict.fromkeys(("base", "lora", "lora_moe", "mixlora", "lorahub", "lora_gen"), (8, 0))
    assert read == same | {"icl": (20, 0), "icl_kept_prefix": (8, 12), "autocompressor": (8, 50)}
    for method in (*results["methods"].values(), *results["transformers"]["systems"].values()):
        assert 0 < method["first_token_ms"]
        assert 0 < method["answer_ms"] <= method["first_answer_ms"]
        assert list(method["tokens_per_s"]) == ["1"]
        assert method["tokens_per_s"]["1"] > 0
        assert len(method["ids"]) == 3
    assert set(results["methods"]["lora_gen"]["once_ms"]) == {"cloud", "merge"}
    assert set(results["methods"]["icl_kept_prefix"]["once_ms"]) == {"prefix"}
    assert set(results["methods"]["autocompressor"]["once_ms"]) == {"compress"}
    assert set(results["methods"]["lorahub"]["once_ms"]) == {"search", "merge"}
    macs = {name: method["macs"]["answer"] for name, method in results["methods"].items()}
    assert macs["base"] == macs["lora"] == macs["lora_gen"] < min(macs["lora_moe"], macs["mixlora"])
    memory = {name: method["peak_bytes"] for name, method in results["methods"].items()}
    assert memory["lora_gen"] == memory["base"] < memory["icl"]
    assert memory["base"] > results["kept_prefix"]["weight_bytes"]


def test_multiply_adds_agree(results: dict[str, Any]):
    assert disagreements(results) == []
    macs = {name: method["macs"] for name, method in results["methods"].items()}
    assert macs["lora_gen"] == macs["base"] == macs["lora"]
    assert macs["base"]["answer"] < macs["icl_kept_prefix"]["answer"] < macs["icl"]["answer"]
    assert set(results["specializing"]) == {"cloud", "merge"}


def test_two_per_cent_is_the_limit():
    for counted, agrees in ((1000, True), (1019, True), (981, True), (1021, False), (979, False)):
        found = compared(1000, Counted(counted, 1100.0))
        assert (found["agrees"], found["compiler"], found["elementwise_share"]) == (agrees, counted, 0.1)


def test_disagreement_is_said_and_fails(
    results: dict[str, Any],
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    wrong = json.loads(json.dumps(results))
    wrong["methods"]["icl"]["macs"]["executed_token"] = compared(1000, Counted(1030, None))
    monkeypatch.setattr(efficiency_command, "measured", lambda setup, flags, batch_sizes: wrong)
    monkeypatch.setattr(efficiency_command, "make_setup", lambda *_: (None, "untrained"))
    flags = ["--no-training", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["efficiency", str(config_file), *SMALL, *flags])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "DISAGREEMENT of formula and compiler: icl executed_token: +3.0%" in printed.out
    assert "disagree" in printed.err
    assert json.loads((tmp_path / "out" / "efficiency.json").read_text())["training"] == {}


def test_transformers_writes_the_same(results: dict[str, Any]):
    assert len(results["same_answer"]) == 3
    assert all(same == count == 3 for same, count in results["same_answer"].values())


def test_derived_figures(results: dict[str, Any]):
    methods = results["methods"]
    ratio = next(r for r in results["ratios"] if (r["of"], r["to"]) == ("lora_gen", "icl"))
    assert ratio["answer"] == pytest.approx(methods["lora_gen"]["answer_ms"] / methods["icl"]["answer_ms"], abs=1e-4)
    once = sum(methods["lora_gen"]["once_ms"].values())
    at = results["curve"]["queries"].index(10)
    assert results["curve"]["ms"]["lora_gen"][at] == pytest.approx(once + 10 * methods["lora_gen"]["answer_ms"])
    costs = [(once, methods["lora_gen"]["answer_ms"]), (0.0, methods["icl"]["answer_ms"])]
    assert results["break_even"]["icl"] == break_even(*costs)
    assert {key: results[key] for key in ("ratios", "break_even", "curve", "same_answer")} == json.loads(
        json.dumps(derived(results))
    )


def test_training_batches(config_file: Path):
    config = read_config(config_file)
    pair = load_pair(config)
    batches = {name: make_batch(config, pair, case, (12, 8)) for name, case in CASES.items()}
    found = {
        name: (int(np.sum(b.prompts.positions_BT >= 0)), int(np.sum(b.positions_PT >= 0)), int(np.sum(b.weight_PS)))
        for name, b in batches.items()
    }
    # Two layers give two meta tokens a prompt; of the eight tokens of each of eight queries two are learned from.
    assert found == {"lora_gen": (8 * 14, 64, 16), "lora_gen_grouped": (14, 64, 16), "lora": (8 * 14, 8 * 20, 16)}
    # Each grouped query has positions and a segment of its own.
    grouped = batches["lora_gen_grouped"]
    np.testing.assert_array_equal(grouped.positions_PT[0], np.tile(np.arange(8), 8))
    np.testing.assert_array_equal(grouped.segments_PT[0], np.repeat(np.arange(1, 9), 8))
    cloud, edge, settings = pair.cloud.config, pair.edge.config, config.generator
    once, each = (step_cost(cloud, edge, settings, batches[name]) for name in ("lora_gen_grouped", "lora_gen"))
    assert each.cloud == 8 * once.cloud == 8 * 2 * 14 * linear_macs(pair.cloud.config)
    assert each.edge == once.edge == 2 * 64 * linear_macs(edge)
    lora = edge_cost(edge, lora_macs(edge, settings), batches["lora"])
    side = sum(sum(edge.site_shape(site)) for site in ("q", "v", "gate", "up", "down")) * 4 * 2
    assert (lora.cloud, lora.edge, lora.adapters) == (0, 2 * 160 * linear_macs(edge), 3 * 160 * side)


def test_training_step_is_measured(results: dict[str, Any]):
    (step,) = results["training"].values()
    low, high = step["step_ms_range"]
    assert 0 < low <= step["step_ms"] <= high
    assert step["peak_bytes"] > results["kept_prefix"]["weight_bytes"]
    assert (step["cloud_tokens"], step["edge_tokens"]) == (0, 8 * 20)


def test_figures_by_hand():
    times = Timings(
        once=[{"a": 1.0, "b": 0.5}, {"a": 3.0, "b": 0.5}, {"a": 2.0, "b": 0.5}],
        first=[0.1, 0.2, 0.3],
        total=[0.4, 0.8, 0.6],
        batches={8: [2.0, 1.0, 4.0]},
    )
    assert figures(times, 4) == {
        "once_ms": {"a": 2000.0, "b": 500.0},
        "first_token_ms": 200.0,
        "per_token_ms": 100.0,
        "answer_ms": 600.0,
        "answer_ms_range": [400.0, 800.0],
        "first_answer_ms": 3100.0,
        "tokens_per_s": {"8": 16.0},
    }


def test_systems_take_turns_and_the_first_turn_is_dropped():
    calls = []

    class Fake:
        def __init__(self, name: str):
            self.name = name

        def once(self) -> dict[str, float]:
            return {}

        def answer(self) -> tuple[float, float, list[int]]:
            return 1.0, self.batch(1), [7]

        def batch(self, rows: int) -> float:
            calls.append((self.name, rows))
            return float(len(calls))

    found = measure({"a": Fake("a"), "b": Fake("b")}, [1, 2], 2)
    assert calls == [("a", 1), ("b", 1)] * 3 + [("a", 2), ("b", 2)] * 3
    assert (found["a"].total, found["b"].total) == ([3.0, 5.0], [4.0, 6.0])
    assert found["b"].batches == {1: [4.0, 6.0], 2: [10.0, 12.0]}


def test_report_fits_the_screen(results: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    print_report(results)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert "…" not in text
    assert "Specializing pays against icl_kept_prefix: " in text
    assert "Published" in text
    assert all(name in text for name in answering())


@pytest.mark.parametrize("name", ["autocompressor", "icl"])
def test_a_method_that_does_not_fit_is_left_out_and_named(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
):
    def fails(setup: Any) -> Any:
        raise ConfigError("it needs 162 positions", field="--instruction-tokens")

    made = {key: (lambda setup, key=key: key) for key in answering()}
    monkeypatch.setattr(efficiency_command, "answering", lambda: made | {name: fails})
    setup: Any = None  # is not looked at
    if name == "icl":  # what the ratios are about
        with raises(ConfigError, "--instruction-tokens", 162):
            made_ready(setup)
        return
    ready, left_out = made_ready(setup)
    assert list(ready) == [key for key in answering() if key != name]
    assert left_out == {name: "it needs 162 positions"}
    kept = {key: figures for key, figures in results["methods"].items() if key != name}
    few = {**results, "methods": kept, "left_out": left_out}
    print_report(few | derived(few))
    text = capsys.readouterr().out
    assert "Without autocompressor: it needs 162 positions" in text


def test_without_torch_a_line_says_so(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    setup: Any = None  # is not looked at
    peers, skipped = make_peers(setup, EfficiencyFlags())
    assert (peers, "pip install torch" in str(skipped)) == ({}, True)
    assert make_peers(setup, EfficiencyFlags(torch=False)) == ({}, "left out by --no-torch")
    alone = {**results, "transformers": {"skipped": skipped}}
    print_report(alone | derived(alone))
    text = capsys.readouterr().out
    assert "pip install torch" in text
    assert "transformers_full_prompt" not in text
    assert "specialized / kept prefix" in text


def test_prompt_and_query_from_texts(config_file: Path):
    pair = load_pair(read_config(config_file))
    flags = EfficiencyFlags(prompt="say the color", input="the sun ?", new_tokens=4)
    work, tokens = make_workload(pair, flags), pair.edge.encoder
    assert work.whole[: work.kept] == tokens.prompt("say the color")
    assert work.whole[work.kept :] == work.query == tokens.text("the sun ?")


def test_bad_input_names_the_flag(config_file: Path, tmp_path: Path):
    for arguments, named in (
        (["--batch-sizes", "1,x"], "--batch-sizes"),
        (["--repeats", "0"], "--repeats"),
        (["--prompt", "say"], "--input"),
        (["--instruction-tokens", "150"], "--instruction-tokens"),
        (["--new-tokens", "1"], "--new-tokens"),
    ):
        flags, config = flags_and_config("efficiency", EfficiencyFlags, [str(config_file), *arguments])
        with raises(ConfigError, named, named):
            run(config, flags, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sizes_of("1, 8") == [1, 8]


def test_flags_stand_between_fields_of_the_config(config_file: Path):
    flags, config = flags_and_config(
        "efficiency",
        EfficiencyFlags,
        [str(config_file), "--train.steps", "7", "--no-torch", "--new-tokens=5", "--workdir", "elsewhere"],
    )
    assert (config.train.steps, config.workdir, flags.torch, flags.new_tokens) == (7, Path("elsewhere"), False, 5)


def test_torch_model_behind_a_kept_prefix(config_file: Path):
    pytest.importorskip("torch")
    source = config_file.parent / "model"
    model = load_model(ModelConfig(str(source), dtype="float32"))
    hf = transformers_peer.torch_model(str(source), model)
    (ids,) = token_rows([20], 72)
    prefix = transformers_peer.TorchPrefix(hf, ids[:12])
    expected = generate(model.plain, [ids], GenerationSettings(max_new_tokens=6))[0].ids
    kept = model.plain.replace(prefix=encode_prefix(model.plain, ids[:12]))
    ours = generate(kept, [ids[12:]], GenerationSettings(max_new_tokens=6))
    assert ours[0].ids == expected
    assert transformers_peer.torch_answer(hf, [ids], 6).ids == [expected]
    # Each copy is as good as the first, and serves several rows.
    for rows in (1, 2):
        assert transformers_peer.torch_answer(hf, [ids[12:]] * rows, 6, prefix.cache(rows)).ids == [expected] * rows


def test_torch_model_needs_torch(monkeypatch: pytest.MonkeyPatch, config_file: Path):
    source = config_file.parent / "model"
    model = load_model(ModelConfig(str(source), dtype="float32"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises(ConfigError, "torch", "pip install torch"):
        transformers_peer.torch_model(str(source), model)
