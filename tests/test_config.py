"""Configs: every field out of range is named with its remedy; what is saved comes back; differences are shown."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import raises

from lora_gen_jax.config import Config, DataConfig, EvalConfig, GeneratorConfig, ModelConfig, TrainConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.config_file import config_from_args, difference, from_json, read_config, to_json
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.router import Router
from lora_gen_jax.specialization.settings import RefineConfig

BAD = [
    (GeneratorConfig(num_experts=0), "generator.num_experts", "range", ("0",)),
    (GeneratorConfig(top_k=0), "generator.top_k", "range", ("0",)),
    (GeneratorConfig(top_k=9), "generator.top_k", "range", ("9", "generator.num_experts = 8")),
    (GeneratorConfig(rank=0), "generator.rank", "range", ("0",)),
    (GeneratorConfig(dropout=1.0), "generator.dropout", "range", ("1.0", "[0, 1)")),
    (GeneratorConfig(dropout=-0.1), "generator.dropout", "range", ("-0.1",)),
    (GeneratorConfig(cloud_rank=-1), "generator.cloud_rank", "range", ("-1",)),
    (GeneratorConfig(gumbel_temperature=0.0), "generator.gumbel_temperature", "range", ("0.0",)),
    (GeneratorConfig(router_width=0), "generator.router_width", "range", ("0",)),
    (GeneratorConfig(direct_width=0), "generator.direct_width", "range", ("0",)),
    (GeneratorConfig(alpha=0.0), "generator.alpha", "range", ("0.0",)),
    (GeneratorConfig(cloud_alpha=-1.0), "generator.cloud_alpha", "range", ("-1.0",)),
    (GeneratorConfig(cv_coefficient=float("inf")), "generator.cv_coefficient", "type", ("inf",)),
    (GeneratorConfig(routing="topk"), "generator.routing", "type", ("'topk'", "'keep_top_k', 'gumbel_top_k'")),
    (GeneratorConfig(batch_norm="False"), "generator.batch_norm", "type", ("'False'", "True or False")),
    (GeneratorConfig(lora_sites="gate"), "generator.lora_sites", "type", ("'gate'",)),
    (DataConfig(tasks="pocket"), "data.tasks", "type", ("'pocket'",)),
    (DataConfig(files=("a.jsonl",)), "data.files", "type", ("('a.jsonl',)",)),
    (TrainConfig(steps=100.0), "train.steps", "type", ("100.0",)),
    (TrainConfig(steps=True), "train.steps", "type", ("True",)),
    (TrainConfig(learning_rate="2e-5"), "train.learning_rate", "type", ("'2e-5'",)),
    (TrainConfig(clip_norm="1"), "train.clip_norm", "type", ("'1'",)),
    (EvalConfig(split="dev"), "eval.split", "type", ("'dev'", "'test', 'validation'")),
    (GeneratorConfig(cv_coefficient=-1.0), "generator.cv_coefficient", "range", ("-1.0",)),
    (DataConfig(prompts_per_step=0), "data.prompts_per_step", "range", ("0",)),
    (
        DataConfig(prompts_per_step=6, prompts_per_row=4),
        "data.prompts_per_row",
        "range",
        ("4", "data.prompts_per_step = 6"),
    ),
    (DataConfig(min_shots=3, max_shots=2), "data.min_shots", "range", ("3", "data.max_shots = 2")),
    (DataConfig(min_shots=-1), "data.min_shots", "range", ("-1",)),
    (DataConfig(query_length=99, edge_length=98), "data.query_length", "range", ("99", "data.edge_length = 98")),
    (DataConfig(query_length=0), "data.query_length", "range", ("0",)),
    (TrainConfig(steps=0), "train.steps", "range", ("0",)),
    (TrainConfig(learning_rate=0.0), "train.learning_rate", "range", ("0.0",)),
    (TrainConfig(learning_rate=float("nan")), "train.learning_rate", "type", ("nan",)),
    (TrainConfig(warmup_steps=-1), "train.warmup_steps", "range", ("-1",)),
    (TrainConfig(clip_norm=0.0), "train.clip_norm", "range", ("0.0",)),
    (TrainConfig(beta2=1.0), "train.beta2", "range", ("1.0",)),
    (TrainConfig(weight_decay=-0.1), "train.weight_decay", "range", ("-0.1",)),
    (TrainConfig(validation_batches=-1), "train.validation_batches", "range", ("-1",)),
    (TrainConfig(checkpoint_every=0), "train.checkpoint_every", "range", ("0",)),
    (TrainConfig(keep_checkpoints=0), "train.keep_checkpoints", "range", ("0",)),
    (TrainConfig(seed=-1), "train.seed", "range", ("-1",)),
    (TrainConfig(seed=2**31), "train.seed", "range", ("2147483648",)),
    (EvalConfig(shots=-1), "eval.shots", "range", ("-1",)),
    (EvalConfig(limit=0), "eval.limit", "range", ("0",)),
    (EvalConfig(batch_tokens=0), "eval.batch_tokens", "range", ("0",)),
    (EvalConfig(vector_layer=1.5), "eval.vector_layer", "range", ("1.5",)),
    (EvalConfig(lora_steps=0), "eval.lora_steps", "range", ("0",)),
    (EvalConfig(lora_rate=0.0), "eval.lora_rate", "range", ("0.0",)),
    (EvalConfig(refine=RefineConfig("lora")), "eval.refine.kind", "range", ("'lora'",)),
    (EvalConfig(prompt_limit=0), "eval.prompt_limit", "range", ("0",)),
]
SECTION = {GeneratorConfig: "generator", DataConfig: "data", TrainConfig: "train", EvalConfig: "eval"}


def test_the_defaults_are_the_papers_and_pass():
    config = check(Config(name="x"))
    g, t = config.generator, config.train
    assert (g.num_experts, g.top_k, g.rank, g.alpha, g.dropout, g.cv_coefficient) == (8, 2, 16, 16, 0.05, 0.01)
    assert (t.learning_rate, t.beta1, t.beta2, t.weight_decay, t.warmup_steps) == (2e-5, 0.9, 0.999, 0.1, 50)
    assert (config.data.prompts_per_step, config.data.edge_length) == (64, 2048)


@pytest.mark.parametrize(("section", "field", "code", "facts"), BAD, ids=[field for _, field, _, _ in BAD])
def test_a_field_out_of_range_is_named(section, field, code, facts):
    with raises(ConfigError, field, field, *facts, code=code):
        check(Config(name="x", **{SECTION[type(section)]: section}))


def test_unroll_below_one_is_named():
    with raises(ConfigError, "edge.unroll", "edge.unroll", 0):
        check(Config(name="x", edge=ModelConfig(unroll=0)))


@pytest.mark.parametrize(("routing", "active"), [("keep_top_k", 2), ("gumbel_top_k", 2), ("gumbel", 5), ("linear", 5)])
def test_as_many_experts_are_active_as_have_gates(routing, active):
    """What the router gives, counted; a pool reads and a specialization stores no more."""
    settings, meta = GeneratorConfig(routing=routing, num_experts=5, top_k=2), np.ones((3, 2, 4), np.float32)
    meta += np.random.default_rng(0).standard_normal(meta.shape).astype(np.float32)
    router = Router(settings.num_experts, settings.top_k, width=6, routing=routing)
    gates, _ = router.init_with_output(jax.random.key(0), meta)
    assert settings.active_experts == active
    np.testing.assert_array_equal(np.count_nonzero(gates.dense(), axis=-1), np.full((3, 2), active))
    assert gates.active == active


def test_a_config_comes_back_from_its_json():
    config = Config(
        name="x",
        cloud=ModelConfig("a", "bfloat16", "dots", 2),
        generator=GeneratorConfig(router_width=7, pool="per_layer"),
        data=DataConfig(dir=Path("d"), files=(Path("f"), Path("g")), tasks=("t",), source_weights=("f=2",)),
        train=TrainConfig(clip_norm=1.0),
        eval=EvalConfig(tasks=("t",), limit=3),
        workdir=Path("w"),
    )
    assert from_json(to_json(config)) == config


def test_a_saved_field_that_this_version_does_not_know_is_named_and_a_missing_one_takes_its_default():
    saved = to_json(Config(name="x"))
    del saved["generator"]["mix"]
    assert from_json(saved).generator.mix == "products"
    saved["generator"]["colour"] = 1
    with raises(ConfigError, "generator.colour", "generator.colour", code="unknown"):
        from_json(saved)


def test_a_config_saved_before_the_variance_was_an_option_means_the_biased_one():
    saved = to_json(Config(name="x"))
    assert from_json(saved).generator.batch_norm_variance == "unbiased"
    del saved["generator"]["batch_norm_variance"]
    assert from_json(saved).generator.batch_norm_variance == "biased"
    assert difference(to_json(from_json(saved)), to_json(Config(name="x"))) == [
        "generator.batch_norm_variance: 'biased' -> 'unbiased'"
    ]


def test_an_unknown_top_level_field_of_a_saved_config_is_named():
    with raises(ConfigError, "colour", "colour", code="unknown"):
        from_json({**to_json(Config(name="x")), "colour": 1})


def test_differences_leave_locations_out():
    one = Config(name="x", workdir=Path("a"), data=DataConfig(dir=Path("b")))
    other = Config(name="x", workdir=Path("c"), data=DataConfig(tfds_dir=Path("d")), train=TrainConfig(seed=3))
    assert difference(to_json(one), to_json(other)) == ["train.seed: 0 -> 3"]
    assert difference(to_json(one), to_json(dataclasses.replace(one, workdir=None))) == []


def test_the_directory_is_named_after_the_config():
    assert Config(name="x").directory == Path("runs/x")
    assert Config(name="x", workdir=Path("w")).directory == Path("w")


HEAD = "from lora_gen_jax.config import Config, GeneratorConfig\n"


@pytest.mark.parametrize(
    ("text", "code", "facts"),
    [
        ("x = 1\n", "no function", ("get_config()", "lora_gen_jax.config.Config")),
        ("def get_config():\n    return 3\n", "no function", ("get_config()",)),
        ("import no_such_module\n", "failed", ("ModuleNotFoundError", "'no_such_module'")),
        ("def get_config(:\n", "failed", ("SyntaxError",)),
        (HEAD + "def get_config():\n    return Config(colour=1)\n", "failed", ("TypeError", "'colour'")),
        (
            HEAD + "def get_config():\n    return Config(generator=GeneratorConfig(topk=1))\n",
            "failed",
            ("TypeError", "'topk'"),
        ),
    ],
)
def test_a_config_file_that_does_not_work_is_named(tmp_path, text, code, facts):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with raises(ConfigError, "config", path, *facts, code=code):
        read_config(path)


def test_a_missing_config_file_and_one_that_is_no_python_are_named(tmp_path):
    with raises(ConfigError, "config", "no.py", code="missing"):
        read_config(Path("no.py"))
    (tmp_path / "mine.toml").write_text("a = 1\n")
    with raises(ConfigError, "config", tmp_path / "mine.toml", code="suffix"):
        read_config(tmp_path / "mine.toml")


def test_flags_override_the_files_values(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + "def get_config():\n    return Config(generator=GeneratorConfig(num_experts=5))\n")
    args = [str(path), "--generator.top-k", "3", "--workdir", "w", "--data.files", "a", "b", "--train.clip_norm", "0.5"]
    config = config_from_args("train.py", args)
    assert config.name == "mine"
    assert (config.generator.num_experts, config.generator.top_k, config.train.clip_norm) == (5, 3, 0.5)
    assert (config.workdir, config.data.files) == (Path("w"), (Path("a"), Path("b")))
    assert config_from_args("train.py", [str(path), "--data.tasks"]).data.tasks == ()


def test_no_config_file_is_an_error_that_shows_the_usage():
    with raises(ConfigError, "config", "train.py configs/smollm2_135m.py", code="none"):
        config_from_args("train.py", ["--train.steps", "3"])
    with raises(ConfigError, "config", code="none"):
        config_from_args("train.py", [])
