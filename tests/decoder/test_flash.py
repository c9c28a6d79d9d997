"""The TPU's flash kernel, interpreted on a CPU, gives what plain attention gives; the decoder takes it where it may."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EDGE, raises, random_params, token_rows
from jax.extend.core import jaxprs_in_params

from lora_gen_jax.decoder import layer
from lora_gen_jax.decoder.flash import fits_flash, flash_attention
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.sharding import make_mesh

CONFIG = dataclasses.replace(EDGE, num_heads=4, num_kv_heads=2, head_dim=40, attention_scale=0.2)
LENGTHS = (100, 120)  # two segments; the rest of the 256 slots is padding
USED = sum(LENGTHS)
# The kernel computes in float32. A score is a sum of 40 products, its softmax one of up to 120 and the mean of the
# values another, each rounded by 2^-24 a term; scores and values are of order 1, the values at most 4.
ROUNDING = 4 * (40 + 120 + 120) * 2.0**-24
# Behind three layers of seven sums of at most 120 terms, of which the final norm leaves numbers of order 1.
LAYERS = 3 * 7 * 120 * 2.0**-24


def packed(rows=2):
    segments = np.zeros((rows, 256), np.int32)
    segments[:, : LENGTHS[0]], segments[:, LENGTHS[0] : USED] = 1, 2
    return segments


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((4, 256, n, 40), np.float32)) for n in (4, 2, 2)]


def plain(q, k, v, cap):
    """Attention of each segment by itself, in NumPy's fp64, [B, USED, N, H]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    parts = []
    for start, stop in ((0, LENGTHS[0]), (LENGTHS[0], USED)):
        part = slice(start, stop)
        scores = 0.2 * np.einsum("btnh,bsnh->bnts", q[:, part], k[:, part])
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        scores = np.where(np.tri(stop - start, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        parts.append(np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v[:, part]))
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_it_is_causal_attention_within_segments(qkv, cap):
    config = dataclasses.replace(CONFIG, attention_softcap=cap)
    y = flash_attention(*qkv, jnp.asarray(packed(4)), config, interpret=True)
    np.testing.assert_allclose(y[:, :USED], plain(*qkv, cap), atol=ROUNDING)


@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)])
def test_rows_and_heads_may_lie_on_several_devices(qkv, sizes):
    """Four heads over four devices: the two key heads are repeated."""
    segments = jnp.asarray(packed(4))
    with jax.set_mesh(make_mesh(*sizes)):
        y = jax.jit(lambda *x: flash_attention(*x, segments, CONFIG, interpret=True))(*qkv)
    np.testing.assert_allclose(y[:, :USED], plain(*qkv, None), atol=ROUNDING)


def test_heads_that_do_not_divide_among_the_devices_stay_together(qkv):
    q, k, v = (jnp.concatenate([x, x[:, :, : x.shape[2] // 2]], axis=2) for x in qkv)  # 6 and 3 heads
    with jax.set_mesh(make_mesh(1, 1, 4)):
        y = jax.jit(lambda *x: flash_attention(*x, jnp.asarray(packed(4)), CONFIG, interpret=True))(q, k, v)
    np.testing.assert_allclose(y[:, :USED], plain(q, k, v, None), atol=ROUNDING)


def test_what_the_kernel_cannot_do():
    windowed = dataclasses.replace(CONFIG, sliding_window=200, windowed_layers=(True, False, True))
    assert fits_flash(256, CONFIG)
    assert not fits_flash(250, CONFIG)
    assert not fits_flash(256, windowed)
    assert fits_flash(128, windowed)


@pytest.fixture
def interpreted(monkeypatch):
    """The decoder calls the kernel in its interpreted form; returns the lengths of the rows it was called for."""
    calls = []

    def call(q, k, v, segments, config):
        calls.append(q.shape[1])
        return flash_attention(q, k, v, segments, config, interpret=True)

    monkeypatch.setattr(layer, "flash_attention", call)
    return calls


def positions_of(segments):
    positions = np.full(segments.shape, -1, np.int32)
    positions[:, : LENGTHS[0]], positions[:, LENGTHS[0] : USED] = np.arange(LENGTHS[0]), np.arange(LENGTHS[1])
    return positions


def test_the_decoder_takes_it_for_packed_rows_alone(interpreted):
    params, segments = random_params(EDGE), packed()
    tokens = np.array(token_rows([256, 256], EDGE.vocab_size), np.int32)

    def hidden(decoder, **kwargs):
        args = (tokens, positions_of(segments))
        return decoder.apply({"params": params}, *args, segments_BT=segments, **kwargs)[0][:, :USED]

    splash, want = Decoder(EDGE, attention="splash"), hidden(Decoder(EDGE))
    np.testing.assert_allclose(hidden(splash, packed=True), want, atol=LAYERS)
    assert set(interpreted) == {256}
    interpreted.clear()
    np.testing.assert_allclose(hidden(splash), want, atol=LAYERS)
    np.testing.assert_allclose(hidden(Decoder(EDGE, attention="xla")), want, atol=LAYERS)
    assert not interpreted


def test_gradients_pass_through_it(interpreted):
    params, segments = random_params(EDGE), packed()
    tokens = np.array(token_rows([256, 256], EDGE.vocab_size), np.int32)
    weights = np.random.default_rng(1).standard_normal((2, 256, EDGE.width)).astype(np.float32)
    weights[:, USED:] = 0

    def total(embedded, decoder):
        hidden, _ = decoder.apply(
            {"params": params}, embedded, positions_of(segments), segments_BT=segments, packed=True, method="encode"
        )
        return jnp.sum(hidden * weights)

    embedded = Decoder(EDGE).apply({"params": params}, tokens, method="embed")
    got, want = (jax.grad(total)(embedded, Decoder(EDGE, attention=name)) for name in ("splash", "grouped"))
    assert interpreted
    np.testing.assert_allclose(got[:, :USED], want[:, :USED], atol=2 * LAYERS * float(jnp.max(jnp.abs(want))))


def kernels_in(jaxpr):
    """Flash kernels of a jaxpr, loops counted once; calls without a result are dead code."""
    count = 0
    for equation in jaxpr.eqns:
        if not equation.outvars:
            continue
        inner = [] if equation.primitive.name == "pallas_call" else jaxprs_in_params(equation.params)
        count += (equation.primitive.name == "pallas_call") + sum(map(kernels_in, inner))
    return count


@pytest.mark.parametrize("devices", [1, 2])
def test_what_it_gave_is_kept_by_its_name(interpreted, devices):
    """Forward, and two kernels backward; one more where the output is not kept. The gradient is the same."""
    params, segments = random_params(EDGE), packed()
    embedded = np.random.default_rng(2).standard_normal((2, 256, EDGE.width)).astype(np.float32)

    def gradient(remat):
        def total(embedded):
            hidden, _ = Decoder(EDGE, attention="splash", remat=remat).apply(
                {"params": params}, embedded, positions_of(segments), segments_BT=segments, packed=True, method="encode"
            )
            return jnp.sum(jnp.square(hidden[:, :USED, ::2]))

        return jax.grad(total)

    with jax.set_mesh(make_mesh(devices, 1, 1, devices=jax.devices()[:devices])):
        kept, repeated = gradient(("attention",)), gradient(())
        assert [kernels_in(jax.make_jaxpr(f)(embedded).jaxpr) for f in (kept, repeated)] == [3, 4]
        np.testing.assert_array_equal(jax.jit(kept)(embedded), jax.jit(repeated)(embedded))


def test_an_unknown_kernel_is_refused():
    with raises(ConfigError, "attention", "'falsh'", "auto, grouped"):
        Decoder(EDGE, attention="falsh").init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
