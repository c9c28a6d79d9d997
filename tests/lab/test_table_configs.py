"""Every file in configs/tables gives runs that pass all checks, and what a wrong file says."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import raises

from lora_gen_jax.data.pocket.suite import GROUPS
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.lab.tables.jobs import make_jobs
from lora_gen_jax.lab.tables.spec import config_of, read_tables, reads_prompt
from lora_gen_jax.training.prepare import check_shapes

FILES = sorted((Path(__file__).parents[2] / "configs" / "tables").glob("*.py"))
METHODS = {"lora", "lora_moe", "mixlora", "lorahub", "lora_gen"}
BEHIND_PROMPT = ("lora", "lora_moe", "mixlora")
# (cloud, edge) as the models' own files have them.
POSITIONS = {
    "gemma2_2b": (8192, 8192),
    "opt_2_7b": (8192, 2048),
    "pocket": (512, 512),
    "qwen2_1_5b": (8192, 131072),
    "smollm2": (8192, 8192),
    "tinyllama_1b": (8192, 2048),
}
ABLATIONS = {"cv_0", "cv_0.005", "cv_0.1", "gumbel_top_k", "gumbel", "direct", "experts_4", "experts_12"}


def test_all_are_here():
    assert [path.stem for path in FILES] == [
        "gemma2_2b",
        "opt_2_7b",
        "pocket",
        "qwen2_1_5b",
        "smollm2",
        "tinyllama_1b",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_passes_the_checks(path):
    tables = read_tables(path)
    assert tables.base.name == f"tables_{path.stem}"
    assert len(tables.seeds) >= 3
    assert set(tables.runs) >= METHODS | ABLATIONS
    jobs = make_jobs(tables)
    assert len({job.config.directory for job in jobs}) == len(jobs) == len(tables.names) * len(tables.seeds)
    for job in jobs:
        if job.run in METHODS:
            assert job.config.method == job.run
        if job.run in ABLATIONS:
            # One thing differs from the default.
            assert job.config.method == "lora_gen"
            ((part, fields),) = tables.runs[job.run].items()
            assert (part, len(fields)) == ("generator", 1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_edge_reads_the_prompt_where_it_was_published_so(path):
    tables = read_tables(path)
    cloud, edge = POSITIONS[path.stem]
    pair = SimpleNamespace(
        cloud=SimpleNamespace(config=SimpleNamespace(max_positions=cloud)),
        edge=SimpleNamespace(config=SimpleNamespace(max_positions=edge, num_layers=4)),
    )
    for run in tables.runs:
        config = config_of(tables, run, 0)
        assert config.data.edge_reads_prompt == (run in BEHIND_PROMPT)
        check_shapes(config, pair)
        if run in BEHIND_PROMPT:
            # Beside a query of any length there is room for a prompt, unless the model has no more positions.
            room = config.data.edge_length - config.data.query_length
            assert room >= tables.base.data.cloud_length // tables.base.data.prompts_per_row or (
                config.data.edge_length == edge
            )
    alone = config_of(tables, "lora_alone", 0)
    assert (alone.method, alone.data) == ("lora", tables.base.data)


def test_a_row_holds_prompt_and_queries_within_the_models_positions():
    assert reads_prompt(96, 48, 512) == {"edge_reads_prompt": True, "edge_length": 144}
    assert reads_prompt(2048, 2048, 2048)["edge_length"] == 2048


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_lorahub_has_a_task_for_every_module(path):
    config = config_of(read_tables(path), "lorahub", 0)
    tasks = [task for name in config.data.tasks for task in GROUPS.get(name, lambda name=name: [name])()]
    assert 2 <= config.hub.modules <= len(tasks)


def test_ablations_are_named_after_their_values():
    for path in FILES:
        for name, change in read_tables(path).runs.items():
            if name.startswith("experts_"):
                assert change["generator"]["num_experts"] == int(name.removeprefix("experts_"))
            if name.startswith("cv_"):
                assert change["generator"]["cv_coefficient"] == float(name.removeprefix("cv_"))


def test_published_hyper_parameters_at_the_papers_scale():
    tables = read_tables(FILES[1])
    configs = {job.run: job.config for job in make_jobs(tables) if job.seed == 0}
    moe, mix, compressor = configs["lora_moe"], configs["mixlora"], configs["autocompressor"]
    assert (moe.generator.num_experts, moe.generator.rank, moe.generator.alpha) == (8, 4, 32.0)
    assert (moe.generator.balance_coefficient, moe.train.learning_rate) == (0.0, 2e-4)
    assert (mix.generator.num_experts, mix.generator.top_k, mix.generator.rank, mix.generator.alpha) == (8, 2, 16, 32.0)
    assert (mix.generator.balance_coefficient, mix.train.learning_rate) == (0.01, 2e-4)
    assert (compressor.compressor.summary_tokens, compressor.generator.rank, compressor.generator.alpha) == (
        50,
        16,
        16.0,
    )
    assert (configs["lora"].generator.rank, configs["lora"].generator.alpha) == (16, 16.0)


@pytest.mark.parametrize(
    ("text", "code", "fact"),
    [("get_tables = 3\n", "no function", "get_tables()"), ("1 / 0\n", "failed", "ZeroDivisionError")],
)
def test_a_wrong_file_says_why(tmp_path, text, code, fact):
    (tmp_path / "wrong.py").write_text(text)
    with raises(ConfigError, "config", fact, code=code):
        read_tables(tmp_path / "wrong.py")
    with raises(ConfigError, "config", tmp_path / "missing.py", code="missing"):
        read_tables(tmp_path / "missing.py")
