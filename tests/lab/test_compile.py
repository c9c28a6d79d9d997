"""Programs compiled for TPUs that are not there: counts against known sizes and formulas, and the command."""

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
from executed_cost import executed_flops
from helpers import experiment, raises, write_config
from jax.sharding import NamedSharding, PartitionSpec

from lora_gen_jax.cli import compile_main
from lora_gen_jax.config import Config, DataConfig, GeneratorConfig, MeshConfig, ModelConfig
from lora_gen_jax.config_file import flags_and_config
from lora_gen_jax.decoder.pretrained.shapes import KNOWN_SHAPES
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.inference.hlo import parse as parse_hlo
from lora_gen_jax.inference.matmuls import matmul_flops
from lora_gen_jax.lab.tpu.collectives import by_kind, find_collectives
from lora_gen_jax.lab.tpu.command import CompileFlags, compile_program, run
from lora_gen_jax.lab.tpu.formulas import lora_ratios, model_flops
from lora_gen_jax.lab.tpu.programs import Sizes, build, shapes_pair
from lora_gen_jax.lab.tpu.topology import get_topology
from lora_gen_jax.lab.tpu.traffic import hbm_bytes
from lora_gen_jax.sharding import make_mesh


@pytest.fixture(autouse=True, scope="module")
def _no_compilation_cache():
    """JAX writes programs for devices that do not exist to its cache, and then cannot read them back."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which has the TPU compiler, is not installed"
)
# A Llama whose matmuls fill the matrix unit's tiles and that compiles in seconds.
SHAPE = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def _settings_of_a_user():
    """JAX's defaults: what is compiled here is what training compiles, and it is counted, not compared in fp32."""
    with (
        jax.default_matmul_precision("default"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.fixture
def middle(monkeypatch) -> Config:
    monkeypatch.setitem(KNOWN_SHAPES, "middle-edge", SHAPE)
    monkeypatch.setitem(KNOWN_SHAPES, "middle-cloud", SHAPE | {"num_hidden_layers": 5, "intermediate_size": 768})
    return Config(
        cloud=ModelConfig("middle-cloud", dtype="bfloat16", remat="full"),
        edge=ModelConfig("middle-edge", dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1),
        generator=GeneratorConfig(rank=16, dropout=0.0, cloud_rank=16),
        data=DataConfig(prompts_per_step=8, cloud_length=256, edge_length=256, response_slots=64),
    )


@needs_libtpu
def test_an_fsdp_matmul_gathers_its_weights_once_a_layer():
    """Five layers of 512 x 512 in bf16, split over four chips: each chip receives three quarters of each."""
    layers, width, rows = 5, 512, 1024
    mesh = make_mesh(data=1, fsdp=-1, devices=get_topology("v5e:2x2").devices)

    def f(x, w):
        return jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, PartitionSpec())), None), x, w
        )[0]

    def shape(sizes, *axes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    with jax.set_mesh(mesh):
        compiled = jax.jit(f).lower(shape((rows, width), "fsdp"), shape((layers, width, width), None, "fsdp")).compile()
    module = parse_hlo(compiled.as_text())
    found = find_collectives(module, mesh)
    gathered = layers * width * width * 2 * 3 / 4
    assert by_kind(found) == {"all-gather": gathered} | dict.fromkeys(
        ("reduce-scatter", "all-reduce", "all-to-all", "collective-permute"), 0.0
    )
    assert {c.axis for c in found} == {"fsdp"}
    assert matmul_flops(module) == 2 * layers * rows / 4 * width * width


@needs_libtpu
def test_a_training_steps_flops_agree_with_the_formula(middle):
    topology, pair = get_topology("v5e:2x2"), shapes_pair(middle)
    (program,) = build(middle, pair, topology.devices, ("train_step",), Sizes())
    needed = model_flops("train_step", middle, pair, Sizes(), 4) / 4
    cost = compile_program(program, topology, needed)
    assert cost.flops == pytest.approx(executed_flops(middle, pair) / 4, rel=0.03)
    assert needed < cost.flops
    assert cost.uncounted == []
    assert 0 < cost.mfu_no_overlap <= cost.mfu_overlap < 1
    # Every layer's weights are gathered forward and again backward; what is trained is summed.
    weights = sum(x.size * 2 for x in jax.tree.leaves([m.params["layers"] for m in (pair.cloud, pair.edge)]))
    assert cost.collective_bytes["all-gather"] >= 2 * weights * 3 / 4 * 0.9
    assert cost.collective_bytes["all-reduce"] > 0
    assert cost.dcn_bytes == 0
    frozen = sum(x.size * 2 for m in (pair.cloud, pair.edge) for x in jax.tree.leaves(m.params))
    assert frozen / 4 < cost.memory.arguments < frozen


@needs_libtpu
def test_fit_repeats_no_product_where_memory_is_ample_and_says_what_is_kept(middle, capsys):
    def with_remat(remat):
        models = {name: dataclasses.replace(getattr(middle, name), remat=remat) for name in ("cloud", "edge")}
        return dataclasses.replace(middle, **models)

    summary = run(with_remat("fit"), CompileFlags(topology="v5e:2x2", programs="train_step", json=True))
    assert "cloud's layers q, k, v, o, gate, up, attention" in capsys.readouterr().err
    unrepeated = with_remat("none")
    flops = executed_flops(unrepeated, shapes_pair(unrepeated)) / 4
    assert summary["programs"]["train_step"]["hlo_flops"] == pytest.approx(flops, rel=0.03)


@needs_libtpu
def test_quantized_weights_are_gathered_as_codes(middle):
    """And not as the floats that they are multiplied as: half a byte or one for a weight, and the scales.

    One step has both kinds. The last line says that the bound is below what either, gathered as the next larger type,
    would come to.
    """
    cloud, edge = dataclasses.replace(middle.cloud, weights="nf4"), dataclasses.replace(middle.edge, weights="int8")
    quantized = dataclasses.replace(middle, cloud=cloud, edge=edge)
    topology, pair = get_topology("v5e:2x2"), shapes_pair(quantized)
    (program,) = build(quantized, pair, topology.devices, ("train_step",), Sizes())
    cost = compile_program(program, topology, 1.0)
    codes, scales = {}, 0
    for name, size in (("cloud", 0.5), ("edge", 1.0)):
        leaves = jax.tree_util.tree_leaves_with_path(getattr(pair, name).params["layers"])
        codes[name] = sum(x.size * size for path, x in leaves if path[-1].key == "kernel")
        scales += sum(x.size * x.dtype.itemsize for path, x in leaves if path[-1].key == "scales")
    # Twice, forward and backward; beside them the edge's unembedding and what is trained.
    gathered = 2 * (sum(codes.values()) + scales) * 3 / 4
    unembedding = 2048 * 256 * 2 * 3 / 4
    most = 1.1 * (gathered + unembedding)
    assert 0.9 * gathered <= cost.collective_bytes["all-gather"] <= most
    assert all(gathered + 2 * size * 3 / 4 > most for size in codes.values())


@needs_libtpu
def test_the_compilers_own_count_of_an_unrolled_step_is_ours(middle, monkeypatch):
    """Without a loop over layers the compiler's count holds too, which has elementwise work (1 %) in it.

    It is another program, where the compiler merges what is computed again with what was there, so it checks how
    programs are counted, and not what training costs. Two layers of each model are enough, and take half the time.
    """
    for model in (middle.cloud, middle.edge):
        monkeypatch.setitem(KNOWN_SHAPES, model.source, KNOWN_SHAPES[model.source] | {"num_hidden_layers": 2})
    unrolled = dataclasses.replace(
        middle, cloud=dataclasses.replace(middle.cloud, unroll=2), edge=dataclasses.replace(middle.edge, unroll=2)
    )
    pair = shapes_pair(unrolled)
    (program,) = build(unrolled, pair, get_topology("v5e:2x2").devices, ("train_step",), Sizes())
    with jax.set_mesh(program.mesh):
        compiled = program.lower().compile()
    module = parse_hlo(compiled.as_text())
    analysis = compiled.cost_analysis()
    assert matmul_flops(module) == pytest.approx(analysis["flops"], rel=0.03)
    # The compiler counts what stays on the core as well.
    assert 0 < hbm_bytes(module) < analysis["bytes accessed"]


@needs_libtpu
def test_a_gradient_between_slices_crosses_once_in_pieces():
    """Two slices of four chips: summed within a slice in quarters, and each quarter with its fellow across."""
    mesh = make_mesh(data=2, fsdp=4, devices=get_topology("2*v5e:2x2").devices)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    x, w = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=on) for s, on in (((1024, 512), rows), ((512, 512), whole)))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss), out_shardings=whole).lower(w, x).compile()
    found = find_collectives(parse_hlo(compiled.as_text()), mesh)
    size = 512 * 512 * 4
    assert sum(c.dcn_bytes for c in found) == size / 4
    within = {c.kind: c.bytes for c in found if c.axis == "fsdp"}
    assert within == {"reduce-scatter": size * 3 / 4, "all-gather": size * 3 / 4}


@needs_libtpu
def test_the_command_prints_finite_json(tmp_path, capsys):
    config = experiment(tmp_path, tmp_path / "run")
    path = write_config(tmp_path / "tiny.py", config)
    compile_main([str(path), "--topology", "v5e:2x2", "--json", "--programs=prefill,decode", "--rows", "2"])
    out, _ = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["chips"], summary["prompts"], summary["queries_per_prompt"]) == (4, 8, 4)
    assert list(summary["programs"]) == ["prefill", "decode"]
    for values in summary["programs"].values():
        assert values["bound"] in ("compute", "memory", "collective")
        assert values["fits"] is True
        assert values["collective_bytes"] == 0
        numbers = [v for v in values.values() if isinstance(v, (int, float))]
        assert all(math.isfinite(v) and v >= 0 for v in numbers)
        assert values["hbm_bytes"] > 0
        assert values["roofline_mfu_no_overlap"] <= values["roofline_mfu_overlap"]


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "chips", "slices"),
    [
        ("v5p:2x2x2", 8, 1),
        ("v6e:2x2", 4, 1),
        ("v4:2x2x1", 4, 1),
        ("2*v5e:2x2", 8, 2),
        ("v5e:1x1", 1, 1),
        ("v4:1x1x1", 1, 1),
    ],
)
def test_topologies(topology, chips, slices):
    found = get_topology(topology)
    assert (len(found.devices), found.slices) == (chips, slices)


@needs_libtpu
def test_input_that_cannot_work_is_an_error_with_a_remedy(middle, monkeypatch):
    devices, pair = get_topology("v5e:2x2").devices, shapes_pair(middle)

    def built(config):
        return build(config, pair, devices, ("train_step",), Sizes())

    with raises(ConfigError, "mesh", "data=3", "4 devices"):
        built(dataclasses.replace(middle, mesh=MeshConfig(data=3)))
    with raises(ConfigError, "data.prompts_per_step", "multiple of 4"):
        built(dataclasses.replace(middle, data=dataclasses.replace(middle.data, prompts_per_step=6)))
    with raises(ConfigError, "--topology", "'v5e:3x3'", code="no such size"):
        get_topology("v5e:3x3")
    for name in ("v9:2x2", "v5e", "v5e:2x", "0*v5e:2x2"):
        with raises(ConfigError, "--topology", repr(name), code="unknown"):
            get_topology(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises(ConfigError, "libtpu", "pip install 'lora_gen_jax[tpu]'"):
        get_topology("v5e:2x2")


def test_flags_and_config_fields_are_told_apart(tmp_path):
    path = str(write_config(tmp_path / "tiny.py", experiment(tmp_path, tmp_path / "run")))
    arguments = [path, "--mesh.fsdp", "4", "--topology=v5e:4x4", "--cache-slots", "64", "--collectives"]
    flags, config = flags_and_config("lora-gen compile", CompileFlags, arguments)
    assert (config.mesh.fsdp, flags.topology, flags.cache_slots, flags.collectives) == (4, "v5e:4x4", 64, True)
    with raises(ConfigError, "--topology", code="missing"):
        run(config, CompileFlags())


def test_a_step_reads_each_prompt_once_where_lora_reads_it_with_every_query(middle):
    """With both models alike but for the cloud's size, eight queries a prompt make LoRA's reading dearer."""
    ratios = lora_ratios(middle, shapes_pair(middle))
    assert ratios["apart"] < 1 < ratios["packed"]
