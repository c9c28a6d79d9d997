"""Reading compiled programs: loops, matmuls written as convolutions, collectives in all spellings, HBM traffic."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import raises

from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.inference.hlo import Module, arrays, parse
from lora_gen_jax.inference.matmuls import _meetings, matmul_flops
from lora_gen_jax.lab.tpu.collectives import by_kind, find_collectives, replica_groups
from lora_gen_jax.lab.tpu.traffic import hbm_bytes, kernel_flops


def mesh_of(data: int, fsdp: int, slices: int = 1):
    """A mesh's names and devices; slice s has an equal share of `data`."""
    count = data * fsdp
    devices = [SimpleNamespace(slice_index=i * slices // count) for i in range(count)]
    grid = np.array(devices, object).reshape(data, fsdp, 1)
    names = ("data", "fsdp", "model")
    return SimpleNamespace(devices=grid, axis_names=names, shape=dict(zip(names, grid.shape, strict=True)))


# Lines as the TPU compiler prints them, cut to what matters.
LOOP = """HloModule jit_f, is_scheduled=true

%fused_dot (p0: bf16[64,32], p1: bf16[32,128]) -> bf16[64,128] {
  %p0 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[64,128]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[64,32], bf16[4,32,128])) -> (s32[], bf16[64,32], bf16[4,32,128]) {
  %state = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, bf16[4,32,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %w = bf16[4,32,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %zero = s32[] constant(0)
  %slice = bf16[1,32,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,32,128}
  %one_w = bf16[32,128]{1,0:T(8,128)(2,1)} bitcast(%slice)
  %y = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%x, %one_w), kind=kOutput, calls=%fused_dot
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[64,32]{1,0}, bf16[4,32,128]{2,1,0}) tuple(%next, %x, %w)
}

%condition (state.1: (s32[], bf16[64,32], bf16[4,32,128])) -> pred[] {
  %end = s32[]{:T(128)} constant(4)
  %state.1 = (s32[]{:T(128)}, bf16[64,32]{1,0:S(1)}, bf16[4,32,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (a: bf16[64,32], b: bf16[4,32,128]) -> bf16[64,32] {
  %a = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,32,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[] constant(0)
  %copy = s32[]{:T(128)} copy(%start)
  %copy-start.1 = (bf16[64,32]{1,0:S(1)}, bf16[64,32]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %tuple = (s32[]{:T(128)}, bf16[64,32]{1,0}, /*index=2*/bf16[4,32,128]{2,1,0}) tuple(%copy, %copy-done.1, %b)
  %while.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}, bf16[4,32,128]{2,1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %result = bf16[64,32]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_a_loops_body_counts_as_often_as_it_runs():
    module = parse(LOOP)
    assert module.runs["body"] == module.runs["fused_dot"] == 4
    assert matmul_flops(module) == 4 * 2 * 64 * 32 * 128


def test_traffic_counts_what_lies_in_hbm():
    """Entry: a is fetched, the counter's start copied. Each iteration: a slice of the weights is copied and read, y
    written, the counter raised and compared; x is on the core."""
    weights, y, a = 32 * 128 * 2, 64 * 128 * 2, 64 * 32 * 2
    raised, compared = 3 * 4, 2 * 4 + 1
    assert hbm_bytes(parse(LOOP)) == a + 2 * 4 + 4 * (3 * weights + y + raised + compared)


def test_a_loop_whose_end_is_data_counts_once():
    module = parse(LOOP.replace("%end = s32[]{:T(128)} constant(4)", "%end = s32[]{:T(128)} custom-call()"))
    assert module.runs["body"] == 1


def test_text_that_is_no_program_is_an_error():
    with raises(LoraGenError, "program", code="no entry"):
        parse("HloModule nothing")


def test_shapes_are_read_with_their_memory_space():
    first, second = arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[8])")
    assert (first.dims, first.bytes, first.hbm_bytes) == ((2, 3), 12, 0)
    assert (second.bytes, second.hbm_bytes) == (8, 8)


@pytest.mark.parametrize("settings", [{}, {"stride": 3}, {"lhs_dilate": 4, "stride": 3}, {"rhs_dilate": 2}])
@pytest.mark.parametrize(("inputs", "kernel", "pad"), [(4, 4, 0), (5, 3, 2), (1, 16, 15)])
def test_window_places_that_meet_an_element(settings, inputs, kernel, pad):
    stride, left, right = (settings.get(name, 1) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    extent = (inputs - 1) * left + 1
    outputs = max(1, (extent + 2 * pad - ((kernel - 1) * right + 1)) // stride + 1)
    met = 0
    for o in range(outputs):
        for k in range(kernel):
            place = o * stride + k * right - pad
            met += 0 <= place < extent and place % left == 0
    texts = {name: str(value) for name, value in settings.items()} | {"pad": f"{pad}_{pad}"}
    assert _meetings(inputs, kernel, outputs, texts) == met


def program(lines: str, before: str = "") -> Module:
    return parse(f"HloModule m\n\n{before}\nENTRY %main (a: f32[2]) -> f32[2] {{\n{lines}\n}}\n")


BATCHED = """  %p0 = bf16[4,2,4096,64]{3,2,1,0} parameter(0)
  %p1 = bf16[4,2,64,1024]{3,2,1,0} parameter(1)
  ROOT %c = f32[4,2,4096,1024]{3,2,1,0} convolution(%p0, %p1), window={size=4x2 stride=3x1 lhs_dilate=4x2},\
 dim_labels=01bf_01io->01bf"""
RAGGED = """  %p0 = bf16[2048,1024,16]{2,1,0} parameter(0)
  %p1 = bf16[1,16,2048]{2,1,0} parameter(1)
  ROOT %c = bf16[16,1024,16]{2,1,0} convolution(%p0, %p1), window={size=1 pad=0_0 rhs_reversal=1},\
 dim_labels=fb0_0oi->0fb"""
DOT = """  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = f32[16,4]{1,0} parameter(1)
  ROOT %c = f32[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}"""


def test_matmuls_are_counted_however_they_are_written():
    assert matmul_flops(program(BATCHED)) == 2 * 4 * 2 * 4096 * 64 * 1024
    assert matmul_flops(program(RAGGED)) == 2 * 1024 * 16 * 2048 * 16
    assert matmul_flops(program(DOT)) == 2 * 8 * 16 * 4


GROUPS = {
    "replica_groups={{0,1},{2,3}}, use": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[4], x": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[2,2]T(1,0), x": [[0, 2], [1, 3]],
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=mesh['a'=8] {'a':(2)2}, x": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "replica_groups=mesh['a'=4], device_ids=(3,1,2,0) {'a'}, x": [[3, 1, 2, 0]],
    "replica_groups={}, x": [],
}


@pytest.mark.parametrize("text", GROUPS)
def test_replica_groups(text):
    assert replica_groups(text) == GROUPS[text]


ALONG_FSDP = "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}"
CHAIN = 'frontend_attributes={chain_id="1"}'
KINDS_BEFORE = f"""%add (x: bf16[], y: bf16[]) -> bf16[] {{
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}}

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {{
  %input = bf16[64,8]{{1,0}} parameter(0)
  %all-reduce.9 = bf16[64,8]{{1,0}} all-reduce(%input), {ALONG_FSDP}, to_apply=%add
  %id = u32[] constant(0)
  ROOT %cut = bf16[16,8]{{1,0}} dynamic-slice(%all-reduce.9, %id, %id), dynamic_slice_sizes={{16,8}}
}}

%async_collective_fusion.1 (q0: bf16[16,8]) -> bf16[64,8] {{
  %q0 = bf16[16,8]{{1,0}} parameter(0)
  ROOT %all-gather.7 = bf16[64,8]{{1,0}} all-gather(%q0), channel_id=3, {ALONG_FSDP}, {CHAIN}
}}

%async_collective_fusion.2 (q1: bf16[16,8]) -> bf16[64,8] {{
  %q1 = bf16[16,8]{{1,0}} parameter(0)
  ROOT %all-gather.8 = bf16[64,8]{{1,0}} all-gather(%q1), channel_id=3, {ALONG_FSDP}, {CHAIN}
}}
"""
KINDS_ENTRY = f"""  %a = bf16[64,8]{{1,0}} parameter(0)
  %s = bf16[16,8]{{1,0}} parameter(1)
  %scatter = bf16[16,8]{{1,0}} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1, metadata={{op_name="step/q"}}
  %f1 = bf16[64,8]{{1,0}} fusion(%s), kind=kCustom, calls=%async_collective_fusion.1
  %f2 = bf16[64,8]{{1,0}} fusion(%s), kind=kOutput, calls=%async_collective_fusion.2
  %gs = (bf16[16,8]{{1,0}}, bf16[64,8]{{1,0}}, u32[]{{:S(2)}}) all-gather-start(%s), {ALONG_FSDP}, dimensions={{0}}
  %gd = bf16[64,8]{{1,0}} all-gather-done(%gs)
  %r = bf16[64,8]{{1,0}} all-reduce(%a), replica_groups={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}, to_apply=%add
  %alone = bf16[64,8]{{1,0}} all-reduce(%a), replica_groups=[8,1]<=[8], to_apply=%add
  %t = bf16[64,8]{{1,0}} all-to-all(%a), replica_groups=[2,4]<=[8], dimensions={{0}}
  %ps = (bf16[64,8]{{1,0}}, bf16[64,8]{{1,0}}, u32[]{{:S(2)}}) collective-permute-start(%a),\
 source_target_pairs={{{{0,1}},{{1,2}},{{2,3}},{{3,0}}}}
  ROOT %pd = bf16[64,8]{{1,0}} collective-permute-done(%ps)"""


def test_collectives_of_every_spelling_count_once():
    size = 64 * 8 * 2
    found = find_collectives(program(KINDS_ENTRY, KINDS_BEFORE), mesh_of(2, 4))
    assert by_kind(found) == {
        "all-gather": 2 * size * 3 / 4,  # the chain, and the asynchronous pair
        "reduce-scatter": size * 3 / 4,
        "all-reduce": 2 * size / 2,
        "all-to-all": size * 3 / 4,
        "collective-permute": size,
    }
    axes = {c.kind: c.axis for c in found}
    assert axes["all-reduce"] == "data"
    assert {axis for kind, axis in axes.items() if kind != "all-reduce"} == {"fsdp"}
    assert next(c for c in found if c.kind == "reduce-scatter").op_name == "step/q"


def test_bytes_between_slices():
    """Of an all-reduce over 2 slices of 4 chips, each chip sends a quarter of the array across and gets as much."""
    size = 64 * 8 * 2
    text = "  %a = bf16[64,8]{1,0} parameter(0)\n  ROOT %r = bf16[64,8]{1,0} all-reduce(%a), replica_groups={}"
    (one,) = find_collectives(program(text), mesh_of(8, 1, slices=2))
    assert one.bytes == pytest.approx(2 * size * 7 / 8)
    assert one.dcn_bytes == pytest.approx(2 * (size / 4) / 2)


def test_flash_kernels_count_the_blocks_below_the_diagonal():
    """Two blocks of 512 each way: three of four are computed. dkv has four matmuls."""
    entry = """  %t0 = s8[1,2,2]{2,1,0} parameter(0)
  %q = bf16[2,16,1024,128]{3,2,1,0} parameter(1)
  %k = bf16[2,4,1024,128]{3,2,1,0} parameter(2)
  %s = s32[2,1024,128]{2,1,0} parameter(3)
  %o = bf16[2,4,1024,128]{3,2,1,0} parameter(4)
  %splash_mha_dkv_segmented_no_residuals.1 = (bf16[2,4,1024,128]{3,2,1,0}, bf16[2,4,1024,128]{3,2,1,0})\
 custom-call(%t0, %t0, %q, %k, %k, %s, %s, %s, %q, %s), custom_call_target="tpu_custom_call"
  ROOT %other.1 = bf16[2]{0} custom-call(%q), custom_call_target="tpu_custom_call\""""
    flops, unknown = kernel_flops(program(entry))
    assert flops == 2 * 4 * 2 * 16 * (3 * 512 * 512) * 128
    assert unknown == ["other.1"]


def test_of_an_operand_that_is_sliced_within_nested_fusions_the_slice_is_read():
    before = """%inner (n0: bf16[22,64,32], n1: s32[]) -> bf16[64,32] {
  %n0 = bf16[22,64,32]{2,1,0} parameter(0)
  %n1 = s32[] parameter(1)
  %n2 = s32[] constant(0)
  %cut = bf16[1,64,32]{2,1,0} dynamic-slice(%n0, %n1, %n2, %n2), dynamic_slice_sizes={1,64,32}
  ROOT %same = bf16[64,32]{1,0} bitcast(%cut)
}

%outer (o0: bf16[22,64,32], o1: s32[], o2: bf16[8,64]) -> bf16[8,32] {
  %o0 = bf16[22,64,32]{2,1,0} parameter(0)
  %o1 = s32[] parameter(1)
  %o2 = bf16[8,64]{1,0} parameter(2)
  %w = bf16[64,32]{1,0} fusion(%o0, %o1), kind=kLoop, calls=%inner
  ROOT %c = bf16[8,32]{1,0} convolution(%o2, %w), dim_labels=bf_io->bf
}
"""
    entry = """  %w = bf16[22,64,32]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %x = bf16[8,64]{1,0:S(1)} parameter(2)
  ROOT %y = bf16[8,32]{1,0} fusion(%w, %i, %x), kind=kOutput, calls=%outer"""
    module = program(entry, before)
    assert hbm_bytes(module) == 64 * 32 * 2 + 8 * 32 * 2
    assert matmul_flops(module) == 2 * 8 * 64 * 32
