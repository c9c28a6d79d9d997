"""The decoder says what transformers says, token by token, however rows are padded, packed, cached or recomputed."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EDGE, SAME, logits, padded, raises, random_params, token_rows

from lora_gen_jax.adapters.lora import LoRA
from lora_gen_jax.decoder import attention
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import load_config, load_params
from lora_gen_jax.errors import ConfigError, ModelError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.float64
# transformers computes norms and angles in float32 whatever its weights are. Its logits are of order 1 and lie behind
# at most four layers of seven sums of at most 48 products, each of which it rounds by 2^-24.
PARITY = 4 * 7 * 48 * 2.0**-24
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OPT_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GEMMA2 = {
    "num_hidden_layers": 4,
    "sliding_window": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 12,
}
MODELS = {
    "llama": ("Llama", SIZES),
    "llama3_rope": ("Llama", SIZES | {"rope_parameters": LLAMA3_ROPE}),
    "llama_biases": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", SIZES),
    "qwen2_window": ("Qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "gemma": ("Gemma", SIZES),
    "gemma2": ("Gemma2", SIZES | GEMMA2),
    "opt": ("OPT", OPT_SIZES),
    "opt_gelu": ("OPT", OPT_SIZES | {"activation_function": "gelu", "enable_bias": False}),
}
LENGTHS = [12, 7, 1, 10]
ROWS = token_rows(LENGTHS, 61)


def _torch_model(name):
    family, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim == 2:
                # Sharp queries and keys: soft-caps then bite, and a wrong key in sight is seen in the logits.
                weight.copy_(noise * (0.35 if "q_proj" in key or "k_proj" in key else 0.18))
            else:
                weight.add_(0.2 * noise)
    return model


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """(torch model, decoder, params) of each model, loaded through its saved directory; made once."""
    made = {}

    def get(name):
        if name not in made:
            reference = _torch_model(name)
            directory = tmp_path_factory.mktemp(name)
            reference.save_pretrained(directory)
            made[name] = reference, Decoder(load_config(directory)), load_params(directory)
        return made[name]

    return get


def _reference_logits(model, tokens, positions):
    mask = torch.tensor(positions >= 0).long()
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": mask}
    if model.config.model_type != "opt":  # OPT counts positions from the mask itself
        inputs["position_ids"] = torch.tensor(np.maximum(positions, 0)).long()
    with torch.no_grad():
        return model(**inputs).logits.float().numpy()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_are_those_of_transformers_at_every_real_position(model_of, name, side):
    reference, decoder, params = model_of(name)
    tokens, positions = padded(ROWS, 14, side)
    ours = np.asarray(logits(decoder, params, tokens, positions))
    theirs, real = _reference_logits(reference, tokens, positions), positions >= 0
    assert np.all(np.isfinite(ours)), "padding must stay finite"
    assert 0.3 < np.std(theirs[real]) < 5
    assert np.max(np.abs(ours - theirs)[real]) <= PARITY


def test_all_three_bands_of_llama3_scaling_occur_in_the_test_model(model_of):
    config = model_of("llama3_rope")[1].config
    wavelength = 2 * np.pi * config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    s = config.rope_scaling
    low = s.original_max_positions / s.low_frequency_factor
    high = s.original_max_positions / s.high_frequency_factor
    counts = np.sum(wavelength < high), np.sum((wavelength >= high) & (wavelength <= low)), np.sum(wavelength > low)
    assert min(counts) >= 1


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"windowed_layers": (False,) * 4}),
        ("gemma2", {"windowed_layers": (False, True, False, True)}),
        ("gemma2", {"post_norms": False}),
        ("gemma2", {"attention_scale": 0.25}),
        ("gemma", {"embedding_scale": 1.0}),
        ("gemma", {"norm_offset": 0.0}),
        ("qwen2_window", {"windowed_layers": (True, False, False)}),
        ("llama3_rope", {"rope_scaling": None}),
        ("opt", {"learned_position_offset": 0, "max_positions": 66}),
        ("opt", {"activation": "gelu"}),
    ],
)
def test_each_peculiarity_of_a_family_matters_in_the_test_model(model_of, name, without):
    """Otherwise the comparison above would hold without it."""
    _, decoder, params = model_of(name)
    tokens, positions = padded(ROWS, 14)
    changed = Decoder(dataclasses.replace(decoder.config, **without))
    difference = np.asarray(logits(changed, params, tokens, positions)) - logits(decoder, params, tokens, positions)
    assert np.max(np.abs(difference[positions >= 0])) > 100 * PARITY


def test_gemma_config_that_says_gelu_means_the_tanh_approximation():
    hf = transformers.GemmaConfig(**SIZES).to_dict() | {"hidden_act": "gelu", "hidden_activation": None}
    assert DecoderConfig.from_hf(hf).activation == "gelu_tanh"


FAMILIES = ["llama", "qwen2_window", "gemma", "gemma2", "opt"]


@jax.jit(static_argnums=0)
def _step(decoder, params, batch, cache):
    hidden, cache = decoder.apply({"params": params}, *batch, cache=cache)
    return decoder.apply({"params": params}, hidden, method="logits"), cache


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_decode_gives_the_logits_of_a_full_forward_pass(model_of, name, side):
    """Rows of different length are read together, then go on token by token and at last by three tokens at once."""
    _, decoder, params = model_of(name)
    ids = np.asarray(token_rows([16] * 3, 61, seed=3))
    full = np.asarray(logits(decoder, params, ids))
    first = [7, 4, 1]

    tokens, positions = padded([row[:n].tolist() for row, n in zip(ids, first, strict=True)], 8, side)
    cache = attention.KVCache.empty(decoder.config, 3, 8 + 1 + 1 + 3 + 2, float)
    got, cache = _step(decoder, params, (tokens, positions), cache)
    for b in range(3):
        np.testing.assert_allclose(got[b][positions[b] >= 0], full[b, : first[b]], **SAME)
    read = np.array(first)
    for count in (1, 1, 3):
        at = read[:, None] + np.arange(count)[None]
        tokens = np.take_along_axis(ids, at, axis=1)
        got, cache = _step(decoder, params, (tokens.astype(np.int32), at.astype(np.int32)), cache)
        expected = np.take_along_axis(full, at[..., None], axis=1)
        np.testing.assert_allclose(got, expected, **SAME)
        read += count
    assert int(cache.used) == 8 + 5


@pytest.mark.parametrize("name", FAMILIES)
def test_sequences_packed_into_a_row_do_not_see_each_other(model_of, name):
    _, decoder, params = model_of(name)
    alone = [np.asarray(logits(decoder, params, np.asarray([row], np.int32)))[0] for row in ROWS[:3]]
    packed = np.concatenate([*ROWS[:3], [0, 0]]).astype(np.int32)[None]
    positions = np.concatenate([*(np.arange(n) for n in LENGTHS[:3]), [-1, -1]]).astype(np.int32)[None]
    segments = np.repeat([1, 2, 3, 0], [*LENGTHS[:3], 2]).astype(np.int32)[None]
    together = np.asarray(logits(decoder, params, packed, positions, segments_BT=segments))[0]
    np.testing.assert_allclose(together[: sum(LENGTHS[:3])], np.concatenate(alone), **SAME)


def test_segment_zero_is_a_prefix_that_every_segment_sees(model_of):
    _, decoder, params = model_of("llama")
    prefix, a, b = ROWS[1], ROWS[0][:4], ROWS[3][:3]
    alone = [np.asarray(logits(decoder, params, np.asarray([prefix + x], np.int32)))[0, -len(x) :] for x in (a, b)]
    positions = np.concatenate([np.arange(7), 7 + np.arange(4), 7 + np.arange(3)]).astype(np.int32)[None]
    segments = np.repeat([0, 1, 2], [7, 4, 3]).astype(np.int32)[None]
    row = np.asarray([prefix + a + b], np.int32)
    together = np.asarray(logits(decoder, params, row, positions, segments_BT=segments))[0, 7:]
    np.testing.assert_allclose(together, np.concatenate(alone), **SAME)


def _loss(decoder, params, factors):
    adapter = LoRA(factors, scale=2.0, dropout_rate=0.25)
    tokens = np.asarray(token_rows([9, 9], EDGE.vocab_size), np.int32)
    # The same dropout must be drawn again in the backward pass.
    hidden, _ = decoder.apply({"params": params}, tokens, adapter=adapter, rngs={"dropout": jax.random.key(0)})
    return jnp.mean(jnp.square(decoder.apply({"params": params}, hidden, method="logits")))


def test_recomputation_and_unrolling_change_no_value_and_no_gradient():
    params, rng, factors = random_params(EDGE), np.random.default_rng(5), {}
    for site in ("q", "v", "up", "down"):
        inputs, outputs = EDGE.site_shape(site)
        shapes = {"a": (EDGE.num_layers, inputs, 2), "b": (EDGE.num_layers, 2, outputs)}
        factors[site] = {k: jnp.asarray(0.3 * rng.standard_normal(s)) for k, s in shapes.items()}

    def values(**variant):
        return jax.jit(jax.value_and_grad(partial(_loss, Decoder(EDGE, **variant), params)))(factors)

    plain = values()
    for variant in ({"remat": "dots"}, {"remat": "full"}, {"unroll": 2}):
        for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(values(**variant)), strict=True):
            assert np.max(np.abs(one)) > 1e-3
            np.testing.assert_allclose(one, other, **SAME)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_rows_are_attended_to_in_blocks_that_see_no_later_slot(monkeypatch, window):
    """Fewer products, the same hidden states and gradients; padding at the end of a row, and windows, included."""
    windowed = tuple(i % 2 == 0 for i in range(EDGE.num_layers))
    config = EDGE if window is None else dataclasses.replace(EDGE, sliding_window=window, windowed_layers=windowed)
    params, decoder, segments = random_params(config), Decoder(config), np.repeat([1, 2, 3, 0], [6, 5, 4, 2])[None]
    positions = np.concatenate([np.arange(6), np.arange(5), np.arange(4), [-1, -1]]).astype(np.int32)[None]
    x = np.random.default_rng(0).standard_normal((1, 17, config.width))
    read = jnp.asarray(positions >= 0, float)[..., None]

    def total(x, packed):
        hidden, _ = decoder.apply(
            {"params": params}, x, positions, segments_BT=segments, packed=packed, method="encode"
        )
        return jnp.sum(jnp.square(hidden[..., ::2]) * read), hidden * read

    monkeypatch.setattr(attention, "LEAST_BLOCK", 4)
    sizes = []
    grouped = attention._grouped_attention

    def noted(q, parts, *rest):
        sizes.append((q.shape[1], parts[0][0].shape[1]))
        return grouped(q, parts, *rest)

    monkeypatch.setattr(attention, "_grouped_attention", noted)
    (blocks, of_blocks), (whole, of_whole) = (
        (hidden, gradient)
        for (_, hidden), gradient in (jax.value_and_grad(total, has_aux=True)(x, packed) for packed in (True, False))
    )
    assert {(4, 4), (4, 8), (4, 12), (5, 17), (17, 17)} == set(sizes)
    np.testing.assert_allclose(blocks, whole, **SAME)
    np.testing.assert_allclose(of_blocks, of_whole, **SAME)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_the_cpus_attention_is_the_accelerators(heads):
    N, G = heads
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 9, n, 8))) for n in (N, G, G))
    positions = padded([[1] * 9, [1] * 5, [1] * 7], 9)[1]
    mask = attention.visible(positions, positions)
    config = dataclasses.replace(EDGE, attention_scale=0.7)
    ours = attention.attend(q, [(k, v)], mask, config)
    theirs = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=0.7)
    real = positions >= 0
    # The library's softmax is in float32 whatever its operands are: scores of 8 products, sums over 9 keys, of values
    # below 4, each rounded by 2^-24 a term.
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=4 * (8 + 9 + 9) * 2.0**-24)
    assert np.all(np.isfinite(ours))


def test_attention_is_a_plain_loop_over_visible_keys():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 5, n, 4)) for n in (4, 2, 2))
    positions = np.array([[0, 1, 2, 3, 4]], np.int32)
    mask = attention.visible(positions, positions) & attention.within_window(positions, positions, 2)
    config = dataclasses.replace(EDGE, attention_scale=0.9, attention_softcap=1.5)
    ours = np.asarray(attention.attend(jnp.asarray(q), [(jnp.asarray(k), jnp.asarray(v))], mask, config))
    for t in range(5):
        for n in range(4):
            keys = [s for s in range(5) if t - 2 < s <= t]
            score = np.array([1.5 * np.tanh(0.9 * float(q[0, t, n] @ k[0, s, n // 2]) / 1.5) for s in keys])
            weight = np.exp(score) / np.exp(score).sum()
            expected = sum(w * v[0, s, n // 2] for w, s in zip(weight, keys, strict=True))
            np.testing.assert_allclose(ours[0, t, n], expected, **SAME)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_keys_that_rows_share_are_as_if_each_row_had_them(cap):
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 5, n, 4))) for n in (4, 2, 2))
    shared = [jnp.asarray(rng.standard_normal((1, 6, 2, 4))) for _ in range(2)]
    mask = jnp.asarray(rng.random((3, 5, 11)) < 0.6).at[:, :, 0].set(True)
    config = dataclasses.replace(EDGE, attention_scale=0.9, attention_softcap=cap)
    repeated = [
        jnp.concatenate([jnp.broadcast_to(a, (3, 6, 2, 4)), b], axis=1) for a, b in zip(shared, (k, v), strict=True)
    ]
    whole = attention.attend(q, [tuple(repeated)], mask, config)
    parts = attention.attend(q, [tuple(shared), (k, v)], mask, config)
    np.testing.assert_allclose(parts, whole, **SAME)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_bf16_models_are_not_rounded_to_bf16(tied):
    config = dataclasses.replace(EDGE, tied_embeddings=tied)
    with jax.enable_x64(False):
        decoder, params = Decoder(config, dtype=jnp.bfloat16), random_params(config)
        hidden_BTD = jax.random.normal(jax.random.key(1), (2, 8, EDGE.width), jnp.bfloat16)
        found = np.asarray(decoder.apply({"params": params}, hidden_BTD, method="logits"))
    table = params["embed"]["embedding"].T if tied else params["unembed"]["kernel"]
    hidden, table = (np.asarray(x.astype(jnp.bfloat16)).astype(np.float64) for x in (hidden_BTD, table))
    assert found.dtype == np.float32
    # Products of two bf16 numbers are exact in fp32, and their sums are rounded by 2^-24 sixteen times.
    assert np.all(np.abs(found - hidden @ table) <= EDGE.width * 2.0**-24 * (np.abs(hidden) @ np.abs(table)))


def test_an_unknown_recomputation_policy_is_named():
    with raises(ConfigError, "remat", "'some'", "none, dots, full"):
        logits(Decoder(EDGE, remat="some"), {}, np.zeros((1, 2), np.int32))


@pytest.mark.parametrize(
    ("change", "field", "facts"),
    [
        ({"model_type": "mamba"}, "model_type", ("'mamba'", "llama, qwen2")),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type", ("'yarn'", "'llama3'")),
        ({"hidden_act": "relu6"}, "hidden_act", ("'relu6'", "silu")),
        # Where transformers 4 wrote it, and where 5 does.
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", (0.5,)),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor", (0.25,)),
        ({"rope_parameters": None, "rope_scaling": {"partial_rotary_factor": 0.75}}, "partial_rotary_factor", (0.75,)),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention", ()),
    ],
)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma", "Gemma2"])
def test_a_config_that_cannot_be_run_is_refused_by_name(family, change, field, facts):
    hf = getattr(transformers, f"{family}Config")(**SIZES).to_dict()
    if field == "hidden_act":
        hf.pop("hidden_activation", None)
    with raises(ModelError, f"config.json:{field}", *facts):
        DecoderConfig.from_hf(hf | change)


def test_what_says_the_default_of_such_a_field_is_no_reason_to_refuse():
    hf = transformers.GemmaConfig(**SIZES).to_dict()
    said = {"partial_rotary_factor": 1.0, "use_bidirectional_attention": False}
    assert DecoderConfig.from_hf(hf | said) == DecoderConfig.from_hf(hf)
    assert DecoderConfig.from_hf(hf | dict.fromkeys(said)) == DecoderConfig.from_hf(hf)


@pytest.mark.parametrize("family", ["Gemma", "Gemma2"])
def test_a_gemma_config_without_a_head_size_has_that_of_transformers(family):
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    theirs = getattr(transformers, f"{family}Config")(**sizes)
    hf = theirs.to_dict()
    del hf["head_dim"]
    assert DecoderConfig.from_hf(hf).head_dim == theirs.head_dim == 256
    assert DecoderConfig.from_hf(hf) == DecoderConfig.from_hf(theirs.to_dict())
    assert DecoderConfig.from_hf(hf | {"head_dim": None}).head_dim == 256


def test_a_config_without_a_needed_field_names_it():
    hf = transformers.LlamaConfig(**SIZES).to_dict()
    del hf["intermediate_size"]
    with raises(ModelError, "config.json:intermediate_size", "'intermediate_size'"):
        DecoderConfig.from_hf(hf)
