"""Configs: every field out of range is named with its remedy; what is saved comes back; differences are shown."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_gen_jax.config import Config, DataConfig, EvalConfig, GeneratorConfig, ModelConfig, TrainConfig
from lora_gen_jax.config_check import check
from lora_gen_jax.config_file import config_from_args, difference, from_json, read_config, to_json
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.generator.router import Router

BAD = [
    (GeneratorConfig(num_experts=0), r"generator\.num_experts is 0; it must be at least 1"),
    (GeneratorConfig(top_k=0), r"generator\.top_k is 0"),
    (GeneratorConfig(top_k=9), r"generator\.top_k is 9; at most generator\.num_experts = 8"),
    (GeneratorConfig(rank=0), r"generator\.rank is 0"),
    (GeneratorConfig(dropout=1.0), r"generator\.dropout is 1\.0; it must lie in \[0, 1\)"),
    (GeneratorConfig(dropout=-0.1), r"generator\.dropout is -0\.1"),
    (GeneratorConfig(cloud_rank=-1), r"generator\.cloud_rank is -1"),
    (GeneratorConfig(gumbel_temperature=0.0), r"generator\.gumbel_temperature is 0\.0"),
    (GeneratorConfig(router_width=0), r"generator\.router_width is 0"),
    (GeneratorConfig(direct_width=0), r"generator\.direct_width is 0"),
    (GeneratorConfig(alpha=0.0), r"generator\.alpha is 0\.0; it must be positive"),
    (GeneratorConfig(cloud_alpha=-1.0), r"generator\.cloud_alpha is -1\.0; it must be positive"),
    (GeneratorConfig(cv_coefficient=float("inf")), r"generator\.cv_coefficient is inf; it must be a finite number"),
    (GeneratorConfig(routing="topk"), r"generator\.routing is 'topk'; it must be one of 'keep_top_k', 'gumbel_top_k'"),
    (GeneratorConfig(batch_norm="False"), r"generator\.batch_norm is 'False'; it must be True or False"),
    (GeneratorConfig(lora_sites="gate"), r"generator\.lora_sites is 'gate'; it must be a tuple, each entry a text or"),
    (DataConfig(tasks="pocket"), r"data\.tasks is 'pocket'; it must be a tuple, each entry a text"),
    (DataConfig(files=("a.jsonl",)), r"data\.files is \('a\.jsonl',\); it must be a tuple, each entry a Path"),
    (TrainConfig(steps=100.0), r"train\.steps is 100\.0; it must be a whole number"),
    (TrainConfig(steps=True), r"train\.steps is True; it must be a whole number"),
    (TrainConfig(learning_rate="2e-5"), r"train\.learning_rate is '2e-5'; it must be a finite number"),
    (TrainConfig(clip_norm="1"), r"train\.clip_norm is '1'; it must be a finite number or None"),
    (EvalConfig(split="dev"), r"eval\.split is 'dev'; it must be one of 'test', 'validation'"),
    (GeneratorConfig(cv_coefficient=-1.0), r"generator\.cv_coefficient is -1\.0"),
    (DataConfig(prompts_per_step=0), r"data\.prompts_per_step is 0"),
    (DataConfig(prompts_per_step=6, prompts_per_row=4), r"prompts_per_row = 4 must divide data\.prompts_per_step = 6"),
    (DataConfig(min_shots=3, max_shots=2), r"data\.min_shots = 3 must lie between 0 and data\.max_shots = 2"),
    (DataConfig(min_shots=-1), r"data\.min_shots = -1"),
    (DataConfig(query_length=99, edge_length=98), r"data\.query_length = 99 is more than data\.edge_length = 98"),
    (DataConfig(query_length=0), r"data\.query_length is 0"),
    (TrainConfig(steps=0), r"train\.steps is 0"),
    (TrainConfig(learning_rate=0.0), r"train\.learning_rate is 0\.0; it must be positive"),
    (TrainConfig(learning_rate=float("nan")), r"train\.learning_rate is nan"),
    (TrainConfig(warmup_steps=-1), r"train\.warmup_steps is -1; it must be 0 or more"),
    (TrainConfig(clip_norm=0.0), r"train\.clip_norm is 0\.0"),
    (TrainConfig(beta2=1.0), r"train\.beta2 is 1\.0"),
    (TrainConfig(weight_decay=-0.1), r"train\.weight_decay is -0\.1"),
    (TrainConfig(validation_batches=-1), r"train\.validation_batches is -1"),
    (TrainConfig(checkpoint_every=0), r"train\.checkpoint_every is 0"),
    (TrainConfig(keep_checkpoints=0), r"train\.keep_checkpoints is 0"),
    (TrainConfig(seed=-1), r"train\.seed is -1; it must lie between 0 and"),
    (TrainConfig(seed=2**31), r"train\.seed is 2147483648"),
    (EvalConfig(shots=-1), r"eval\.shots is -1"),
    (EvalConfig(limit=0), r"eval\.limit is 0"),
    (EvalConfig(batch_tokens=0), r"eval\.batch_tokens is 0"),
    (EvalConfig(prompt_limit=0), r"eval\.prompt_limit is 0"),
]
SECTION = {GeneratorConfig: "generator", DataConfig: "data", TrainConfig: "train", EvalConfig: "eval"}


def test_the_defaults_are_the_papers_and_pass():
    config = check(Config(name="x"))
    g, t = config.generator, config.train
    assert (g.num_experts, g.top_k, g.rank, g.alpha, g.dropout, g.cv_coefficient) == (8, 2, 16, 16, 0.05, 0.01)
    assert (t.learning_rate, t.beta1, t.beta2, t.weight_decay, t.warmup_steps) == (2e-5, 0.9, 0.999, 0.1, 50)
    assert (config.data.prompts_per_step, config.data.edge_length) == (64, 2048)


@pytest.mark.parametrize(("section", "message"), BAD, ids=[m.split(" ")[0].replace("\\", "") for _, m in BAD])
def test_a_field_out_of_range_is_named(section, message):
    with pytest.raises(ConfigError, match=message):
        check(Config(name="x", **{SECTION[type(section)]: section}))


def test_unroll_below_one_is_named():
    with pytest.raises(ConfigError, match=r"edge\.unroll is 0"):
        check(Config(name="x", edge=ModelConfig(unroll=0)))


@pytest.mark.parametrize(("routing", "active"), [("keep_top_k", 2), ("gumbel_top_k", 2), ("gumbel", 5), ("linear", 5)])
def test_as_many_experts_are_active_as_have_gates(routing, active):
    """What the router gives, counted; a pool reads and a specialisation stores no more."""
    settings, meta = GeneratorConfig(routing=routing, num_experts=5, top_k=2), np.ones((3, 2, 4), np.float32)
    meta += np.random.default_rng(0).standard_normal(meta.shape).astype(np.float32)
    router = Router(settings.num_experts, settings.top_k, width=6, routing=routing)
    gates, _ = router.init_with_output(jax.random.key(0), meta)
    assert settings.active_experts == active
    np.testing.assert_array_equal(np.count_nonzero(gates, axis=-1), np.full((3, 2), active))


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
    with pytest.raises(ConfigError, match=r"saved config has the field generator\.colour"):
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
    with pytest.raises(ConfigError, match="saved config has the field colour"):
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
    ("text", "message"),
    [
        ("x = 1\n", r"needs a function get_config\(\) that returns a lora_gen_jax\.config\.Config"),
        ("def get_config():\n    return 3\n", r"needs a function get_config\(\)"),
        ("import no_such_module\n", "failed: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(:\n", "failed: SyntaxError"),
        (HEAD + "def get_config():\n    return Config(colour=1)\n", "failed: TypeError: .*'colour'"),
        (
            HEAD + "def get_config():\n    return Config(generator=GeneratorConfig(topk=1))\n",
            "failed: TypeError: .*'topk'",
        ),
    ],
)
def test_a_config_file_that_does_not_work_is_named(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"config file .*mine\.py {message}"):
        read_config(path)


def test_a_missing_config_file_and_one_that_is_no_python_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config file no\.py does not exist"):
        read_config(Path("no.py"))
    (tmp_path / "mine.toml").write_text("a = 1\n")
    with pytest.raises(ConfigError, match=r"its name must end in \.py"):
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
    with pytest.raises(ConfigError, match=r"name a config file first: train\.py configs/"):
        config_from_args("train.py", ["--train.steps", "3"])
    with pytest.raises(ConfigError, match="name a config file first"):
        config_from_args("train.py", [])
