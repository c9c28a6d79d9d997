"""What the processor is said to do decides how training computes."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from helpers import EDGE

from lora_gen_jax import models
from lora_gen_jax.config import ModelConfig
from lora_gen_jax.models import make_decoder, precision_of
from lora_gen_jax.processor import multiplies_bfloat16

PLAIN = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\nbugs\t\t: avx512_bf16\n"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    def write(text):
        (tmp_path / "cpuinfo").write_text(text)
        return tmp_path / "cpuinfo"

    return write


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16"])
def test_features_of_the_processor(cpuinfo, feature):
    assert multiplies_bfloat16(cpuinfo(PLAIN.replace("avx512f", f"avx512f {feature}")))


@pytest.mark.parametrize("text", [PLAIN, "Features\t: fp asimd bf16\n", ""])
def test_other_processors(cpuinfo, text):
    assert not multiplies_bfloat16(cpuinfo(text))


def test_without_the_file(tmp_path):
    assert not multiplies_bfloat16(tmp_path / "none")


@pytest.mark.parametrize(
    ("limit", "expected"), [("AVX2", False), ("AVX512", False), ("AVX512_BF16", True), ("AMX_FP16", True)]
)
def test_instructions_that_xla_may_not_use_do_not_count(cpuinfo, monkeypatch, limit, expected):
    path = cpuinfo(PLAIN.replace("avx512f", "avx512f avx512_bf16"))
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 --xla_cpu_max_isa={limit} --xla_b=2")
    assert multiplies_bfloat16(path) == expected


@pytest.mark.parametrize(
    ("dtype", "platform", "training", "bf16", "expected"),
    [
        ("auto", "cpu", True, True, "mixed"),
        ("auto", "cpu", True, False, "float32"),
        ("auto", "cpu", False, True, "float32"),
        ("auto", "tpu", True, True, "bfloat16"),
        ("float32", "cpu", True, True, "float32"),
        ("mixed", "cpu", False, False, "mixed"),
    ],
)
def test_precision(monkeypatch, dtype, platform, training, bf16, expected):
    monkeypatch.setattr(models, "multiplies_bfloat16", lambda: bf16)
    decoder = make_decoder(ModelConfig(dtype=dtype), EDGE, platform, training)
    assert precision_of(SimpleNamespace(decoder=decoder, weights=None)) == expected  # pyright: ignore
    assert decoder.dtype == (jnp.bfloat16 if expected == "bfloat16" else jnp.float32)
