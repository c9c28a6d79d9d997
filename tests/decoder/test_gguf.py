"""GGUF files: the tree equals that of the same weights in a Hugging Face directory, the tokenizer round-trips."""

import json
import subprocess
import sys

import gguf
import jax
import numpy as np
import pytest
from helpers import raises
from safetensors.numpy import save_file

from lora_gen_jax.decoder import pretrained
from lora_gen_jax.decoder.pretrained.gguf_tokenizer import gguf_tokenizer
from lora_gen_jax.errors import ModelError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
    },
}
BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]  # GPT-2's alphabet


def hf_directory(directory, family, **more):
    """Random weights as a Hugging Face directory; returns the tensors too."""
    directory.mkdir()
    config = SIZES | FAMILIES[family] | {"model_type": family} | more
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    table = list(pretrained.leaves(pretrained.load_config(directory)))
    tensors = {
        name: rng.normal(size=leaf.stored_shape).astype(np.float32)
        for leaf in table
        for name in leaf.tensor_names(SIZES["num_hidden_layers"])
    }
    save_file(tensors, directory / "model.safetensors")
    return tensors


def to_gguf(path, family, tensors, quantization=None, extra=lambda writer: None):
    """Writes what llama.cpp's converter writes: other names, permuted q and k rows (llama), norms + 1 (gemma)."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_key_length(SIZES["head_dim"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(SIZES["rope_parameters"]["rope_theta"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
        writer.add_sliding_window(32)
    extra(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], SIZES["num_hidden_layers"])
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
    for name, value in tensors.items():
        site = name.split(".")[-2]
        if family == "llama" and site in heads:
            n, rows = heads[site], value.shape[0]
            value = value.reshape(n, 2, rows // n // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1.0)
        found = name if name == "rope_freqs.weight" else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if quantization is not None and value.ndim == 2:
            writer.add_tensor(found, gguf.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(found, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama(tmp_path):
    tensors = hf_directory(tmp_path / "hf", "llama")
    path = tmp_path / "model.gguf"
    to_gguf(path, "llama", tensors)
    return path


BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("family", "more"), [*((family, {}) for family in FAMILIES), ("llama", BIASES)], ids=[*FAMILIES, "llama_biased"]
)
def test_same_model_as_the_hugging_face_directory(tmp_path, family, more):
    tensors = hf_directory(tmp_path / "hf", family, **more)
    to_gguf(tmp_path / "model.gguf", family, tensors)
    assert pretrained.load_config(tmp_path / "model.gguf") == pretrained.load_config(tmp_path / "hf")
    # float32(w + 1) - 1 is not w to the last bit.
    tolerance = 3e-7 if family.startswith("gemma") else 0.0
    actual, wanted = (pretrained.load_params(tmp_path / name) for name in ("model.gguf", "hf"))
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), actual, wanted)


@pytest.mark.parametrize("quantization", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16])
def test_quantized_weights(tmp_path, quantization):
    tensors = hf_directory(tmp_path / "hf", "llama")
    to_gguf(tmp_path / "model.gguf", "llama", tensors, quantization)
    params = pretrained.load_params(tmp_path / "model.gguf")
    for site in ("q", "k", "v"):
        value = tensors[f"model.layers.1.self_attn.{site}_proj.weight"]
        wanted = gguf.dequantize(gguf.quantize(value, quantization), quantization)
        np.testing.assert_array_equal(params["layers"]["attention"][site]["kernel"][1], wanted.T)
    assert pretrained.fingerprint(tmp_path / "model.gguf") != pretrained.fingerprint(tmp_path / "hf")


def test_slices_of_permuted_rows(llama):
    from lora_gen_jax.decoder.pretrained.gguf import GGUFCheckpoint

    checkpoint, name = GGUFCheckpoint(llama), "model.layers.0.self_attn.q_proj.weight"
    whole = checkpoint.read(name, (slice(None), slice(None)))
    np.testing.assert_array_equal(checkpoint.read(name, (slice(5, 30), slice(8, 40))), whole[5:30, 8:40])


def test_llama3_rope_factors(tmp_path):
    modeling_rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    pytest.importorskip("torch")
    from transformers import LlamaConfig

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 20000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(**(SIZES | {"rope_parameters": scaling, "max_position_embeddings": 131072}))
    stretched, _ = modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 20000.0 ** -(np.arange(8) / 8)
    tensors = hf_directory(tmp_path / "hf", "llama")
    factors = {"rope_freqs.weight": (plain / stretched.numpy()).astype(np.float32)}
    to_gguf(tmp_path / "model.gguf", "llama", tensors | factors)
    found = pretrained.load_config(tmp_path / "model.gguf").rope_scaling
    assert found is not None
    assert (found.factor, found.low_frequency_factor, found.high_frequency_factor) == (8.0, 1.0, 4.0)
    assert found.original_max_positions == 8192
    factors["rope_freqs.weight"][3] *= 1.1
    to_gguf(tmp_path / "other.gguf", "llama", tensors | factors)
    with raises(ModelError, "other.gguf:rope_freqs.weight"):
        pretrained.load_config(tmp_path / "other.gguf")


def test_heads_that_are_rotated_in_part_are_refused(tmp_path):
    tensors = hf_directory(tmp_path / "hf", "llama")
    for count, fits in ((SIZES["head_dim"], True), (SIZES["head_dim"] // 2, False)):
        path = tmp_path / f"rotated{count}.gguf"
        to_gguf(path, "llama", tensors, extra=lambda writer, n=count: writer.add_rope_dimension_count(n))
        if fits:
            assert pretrained.load_config(path).head_dim == count
        else:
            with raises(ModelError, f"{path.name}:llama.rope.dimension_count", count, SIZES["head_dim"]):
                pretrained.load_config(path)


def test_other_rope_scaling_is_refused(tmp_path):
    tensors = hf_directory(tmp_path / "hf", "llama")
    scale = gguf.RopeScalingType.YARN
    to_gguf(tmp_path / "model.gguf", "llama", tensors, extra=lambda writer: writer.add_rope_scaling_type(scale))
    with raises(ModelError, "model.gguf:rope.scaling.type", "'yarn'"):
        pretrained.load_config(tmp_path / "model.gguf")


@pytest.mark.parametrize("keep", [0, 3, 24, 300, 2000, -100])
def test_truncated_file(llama, keep):
    llama.write_bytes(llama.read_bytes()[:keep])
    with raises(ModelError, llama.name, llama):
        pretrained.load_params(llama)


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"x" * 5000)
    with raises(ModelError, path.name, path):
        pretrained.load_config(path)
    with raises(ModelError, "model", tmp_path / "absent.gguf"):
        pretrained.load_config(tmp_path / "absent.gguf")


def test_unknown_architecture_and_missing_parts(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with raises(ModelError, "falcon.gguf:general.architecture", "'falcon'", "llama, qwen2, gemma, gemma2"):
        pretrained.load_config(tmp_path / "falcon.gguf")
    tensors = hf_directory(tmp_path / "hf", "llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    to_gguf(tmp_path / "model.gguf", "llama", tensors)
    with raises(ModelError, "model.layers.1.mlp.up_proj.weight", tmp_path / "model.gguf"):
        pretrained.load_params(tmp_path / "model.gguf")


def vocabulary(kind="gpt2", pre="smollm", add_bos=None):
    """A writer callback: GPT-2's byte alphabet, three merges and three added tokens."""
    tokens = ["<|bos|>", "<|im_end|>", "<think>", *BYTES, "Ġt", "he", "Ġthe", "12"]
    types = [3, 3, 4] + [1] * (len(tokens) - 3)

    def extra(writer):
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(["Ġ t", "h e", "Ġt he", "1 2"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(1)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)
        writer.add_chat_template("{% for m in messages %}<|bos|>{{ m['content'] }}<|im_end|>{% endfor %}")

    return extra


TEXTS = [
    "the  quick\tbrown fox\n\n  jumps",
    "1234567 and 3.14 in 2024",
    "naïve café — 東京 🎉 \u200b Ω",
    "def f(x):\n    return x ** 2  # the square\r\n",
    "  leading and trailing  ",
]


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe"])
def test_tokenizer_round_trip(tmp_path, monkeypatch, pre):
    monkeypatch.setenv("LORA_GEN_CACHE", str(tmp_path / "cache"))
    tensors = hf_directory(tmp_path / "hf", "llama")
    to_gguf(tmp_path / "model.gguf", "llama", tensors, extra=vocabulary(pre=pre, add_bos=False))
    tokenizer = pretrained.load_tokenizer(tmp_path / "model.gguf")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(" the<|im_end|><think>"))
    assert pieces == ["Ġthe", "<|im_end|>", "<think>"]
    # Digits one by one, except Llama 3, which keeps up to three together.
    assert len(tokenizer.encode("12")) == (1 if pre == "llama-bpe" else 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|im_end|>", "<|im_end|>")
    assert len(tokenizer) == 3 + 256 + 4
    assert tokenizer.decode(tokenizer.encode("a<|im_end|><think>"), skip_special_tokens=True) == "a<think>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|bos|>hi<|im_end|>"
    assert pretrained.load_tokenizer(tmp_path / "model.gguf").encode("the") == tokenizer.encode("the")


def test_bos_is_added_where_the_file_says_so(tmp_path):
    tensors = hf_directory(tmp_path / "hf", "llama")
    for pre, add_bos, first in (("llama-bpe", None, 0), ("smollm", True, 0), ("smollm", None, 3 + BYTES.index("a"))):
        name = f"{pre}-{add_bos}"
        to_gguf(tmp_path / f"{name}.gguf", "llama", tensors, extra=vocabulary(pre=pre, add_bos=add_bos))
        directory = gguf_tokenizer(tmp_path / f"{name}.gguf", tmp_path / name)
        assert pretrained.load_tokenizer(directory).encode("a")[0] == first


def test_tokenizer_directory_is_complete_or_absent(tmp_path, monkeypatch):
    tensors = hf_directory(tmp_path / "hf", "llama")
    to_gguf(tmp_path / "model.gguf", "llama", tensors, extra=vocabulary())
    out = tmp_path / "out" / "tokenizer"

    full = OSError("disk full")

    def fail(*_):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", fail)
        with pytest.raises(OSError) as raised:  # noqa: PT011 (it is that very one)
            gguf_tokenizer(tmp_path / "model.gguf", out)
    assert raised.value is full
    assert list(out.parent.iterdir()) == []
    assert gguf_tokenizer(tmp_path / "model.gguf", out) == out
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert [path.name for path in out.parent.iterdir()] == ["tokenizer"]


def test_a_tokenizer_that_cannot_be_written_or_lacks_a_part(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_GEN_CACHE", str(tmp_path / "file" / "cache"))
    tensors = hf_directory(tmp_path / "hf", "llama")
    to_gguf(tmp_path / "model.gguf", "llama", tensors, extra=vocabulary())
    with raises(ModelError, "LORA_GEN_CACHE", "model.gguf", tmp_path / "file"):
        pretrained.load_tokenizer(tmp_path / "model.gguf")

    def without_merges(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(BYTES)

    to_gguf(tmp_path / "less.gguf", "llama", tensors, extra=without_merges)
    with raises(ModelError, "less.gguf:tokenizer.ggml.merges"):
        pretrained.load_tokenizer(tmp_path / "less.gguf")


@pytest.mark.parametrize(("kind", "pre"), [("llama", "default"), ("gpt2", "tekken")])
def test_other_tokenizers_are_refused_unless_beside_the_file(tmp_path, monkeypatch, kind, pre):
    monkeypatch.setenv("LORA_GEN_CACHE", str(tmp_path / "cache"))
    tensors = hf_directory(tmp_path / "hf", "llama")
    to_gguf(tmp_path / "model.gguf", "llama", tensors, extra=vocabulary(kind, pre))
    with raises(ModelError, "model.gguf:tokenizer.ggml.pre", kind, pre, "tokenizer.json", "tokenizer_config.json"):
        pretrained.load_tokenizer(tmp_path / "model.gguf")
    to_gguf(tmp_path / "good.gguf", "llama", tensors, extra=vocabulary())
    good = gguf_tokenizer(tmp_path / "good.gguf", tmp_path / "good")
    for path in good.iterdir():
        path.rename(tmp_path / path.name)
    assert pretrained.load_tokenizer(tmp_path / "model.gguf").eos_token == "<|im_end|>"


def test_no_tokenizer_or_a_damaged_one(tmp_path):
    with raises(ModelError, "tokenizer.json", tmp_path):
        pretrained.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with raises(ModelError, "tokenizer.json", tmp_path):
        pretrained.load_tokenizer(tmp_path)


def test_vocabulary_and_merges_without_tokenizer_json(tmp_path):
    """As the first OPT checkpoints have it."""
    tokens = ["<pad>", "</s>", *BYTES, "Ġt", "he", "Ġthe"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    config = special | {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    tokenizer = pretrained.load_tokenizer(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" the")) == ["</s>", "Ġthe"]


BLOCKED = """
import sys
if sys.argv[2] == "absent":
    sys.modules["torch"] = None  # as if it were not installed
from lora_gen_jax.decoder import pretrained
tokenizer = pretrained.load_tokenizer(sys.argv[1])
assert tokenizer.decode(tokenizer.encode("the end")) == "the end"
assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|bos|>x<|im_end|>"
assert sys.modules.get("torch") is None
"""


@pytest.mark.parametrize("torch_is", ["absent", "present"])
def test_tokenizer_is_quiet_and_needs_no_torch(tmp_path, torch_is):
    tensors = hf_directory(tmp_path / "hf", "llama")
    to_gguf(tmp_path / "model.gguf", "llama", tensors, extra=vocabulary())
    directory = gguf_tokenizer(tmp_path / "model.gguf", tmp_path / "tokenizer")
    command = [sys.executable, "-c", BLOCKED, str(directory), torch_is]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def with_metadata(path, **changes):
    """A llama with a tokenizer, whose metadata are replaced: None leaves one out."""
    tensors = hf_directory(path.parent / f"{path.stem}-hf", "llama")

    def extra(writer):
        vocabulary(add_bos=True)(writer)
        for name, value in changes.items():
            fields = writer.kv_data[0]
            key = next(k for k in fields if k.rpartition(".")[2] == name)
            old = fields.pop(key)
            if value is not None:
                kind = gguf.GGUFValueType.get_type(value)
                fields[key] = gguf.GGUFValue(value, gguf.GGUFValueType.UINT64 if type(value) is int else kind)
            del old

    to_gguf(path, "llama", tensors, extra=extra)
    return path


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"block_count": 4294967295}, "llama.block_count"),
        ({"block_count": 0}, "llama.block_count"),
        ({"block_count": "two"}, "llama.block_count"),
        ({"embedding_length": 0}, "llama.embedding_length"),
        ({"head_count": 0}, "llama.attention.head_count"),
        ({"head_count": "four"}, "llama.attention.head_count"),
        ({"layer_norm_rms_epsilon": float("nan")}, "llama.attention.layer_norm_rms_epsilon"),
        ({"freq_base": "x"}, "llama.rope.freq_base"),
    ],
)
def test_sizes_that_the_file_cannot_hold_are_refused_before_anything_is_built(tmp_path, change, field):
    path = with_metadata(tmp_path / "model.gguf", **change)
    with raises(ModelError, f"model.gguf:{field}"):
        pretrained.fingerprint(path)


def test_a_damaged_size_takes_neither_time_nor_memory(tmp_path):
    """41 KB once took all memory of a machine; 2 GB more than the process has would be an error here."""
    path = with_metadata(tmp_path / "model.gguf", block_count=4294967295)
    code = (
        "import resource, sys\nfrom lora_gen_jax.decoder import pretrained\n"
        "from lora_gen_jax.errors import ModelError\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**31, size + 2**31))\n"
        "try:\n    pretrained.fingerprint(sys.argv[1])\nexcept ModelError as error:\n    print(error.field)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300)
    assert done.stdout == "model.gguf:llama.block_count\n", done.stderr


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": 5}, "tokens"),
        ({"tokens": [1, 2]}, "tokens"),
        ({"tokens": ["a", "a"]}, "tokens"),
        ({"merges": "a b"}, "merges"),
        ({"merges": ["a"]}, "merges"),
        ({"merges": ["no such"]}, "merges"),
        ({"token_type": [1]}, "tokens"),
        ({"token_type": ["x"]}, "token_type"),
        ({"bos_token_id": 10**6}, "bos_token_id"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"bos_token_id": None}, "bos_token_id"),
        ({"model": 3}, "model"),
        ({"pre": 3}, "pre"),
        ({"add_bos_token": "x"}, "add_bos_token"),
    ],
)
def test_headers_of_a_tokenizer_that_are_malformed_are_named(tmp_path, monkeypatch, change, field):
    monkeypatch.setenv("LORA_GEN_CACHE", str(tmp_path / "cache"))
    path = with_metadata(tmp_path / "model.gguf", **change)
    with raises(ModelError, f"model.gguf:tokenizer.ggml.{field}"):
        pretrained.load_tokenizer(path)
    assert not (tmp_path / "cache").exists()
