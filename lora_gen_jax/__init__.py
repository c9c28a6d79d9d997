"""LoRA-Gen in JAX/Flax: a cloud language model reads a prompt once and specializes a small edge model.

Shape letters, used as suffixes of array names everywhere:

    B batch rows        P prompts           Q queries of a prompt   T tokens of a row   S cache or loss slots
    L edge layers       C cloud width       D edge width            F edge FFN width    H router width, head size
    E experts           R rank              K top-k                 V vocabulary        N heads, G kv heads

What must not be rounded to bfloat16 has the type `float`, JAX's own: float32, or float64 under JAX_ENABLE_X64, in which
the tests compare programs that should be the same function.

The pieces, each usable alone:

    Decoder, DecoderConfig          the language model (`lora_gen_jax.decoder`)
    load_params, load_tokenizer     pretrained weights from Hugging Face, GGUF or a known name
    LoRAGen, Router, ExpertPool     the generator's modules, and its equations as plain functions:
    keep_top_k, cv_squared          equations 6 and 7, and the balance loss
    gated_product                   equation 8
    specialize                      prompts -> adapters
    merge, unmerge                  adapters in and out of weights
    Prompt, RefineConfig            a prompt with examples, and how a specialization learns from them
    EdgeModel                       a model that answers: weights, and what a method adds to them
    generate, stream, score         what it answers, and how likely it finds an answer
    METHODS                         what the paper compares with, by key (`lora_gen_jax.methods.registry`)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_gen_jax.adapters.gated_pool import GatedPool, gated_product
    from lora_gen_jax.adapters.lora import LoRA, PromptLoRA
    from lora_gen_jax.adapters.merge import merge, merge_donated, merge_over, unmerge, unmerge_donated
    from lora_gen_jax.config import Config, DataConfig, EvalConfig, GeneratorConfig, ModelConfig, TrainConfig
    from lora_gen_jax.decoder.config import DecoderConfig
    from lora_gen_jax.decoder.model import Decoder
    from lora_gen_jax.decoder.pretrained import load_config, load_params, load_tokenizer
    from lora_gen_jax.errors import LoraGenError
    from lora_gen_jax.generator.cloud import CloudEncoder, PackedPrompts, pack_prompts
    from lora_gen_jax.generator.lora_gen import ExpertPool, LoRAGen
    from lora_gen_jax.generator.router import BatchNorm, Gates, Router, cv_squared, keep_top_k
    from lora_gen_jax.generator.specialize import specialize
    from lora_gen_jax.generator.trained_module import Generated
    from lora_gen_jax.inference.decode import Generation, GenerationSettings, generate, stream
    from lora_gen_jax.inference.edge_model import EdgeModel
    from lora_gen_jax.inference.sampling import Sampling
    from lora_gen_jax.inference.scoring import Request, Score, score
    from lora_gen_jax.methods.registry import METHODS
    from lora_gen_jax.specialization.prompt import Prompt
    from lora_gen_jax.specialization.settings import RefineConfig

__all__ = [
    "METHODS",
    "BatchNorm",
    "CloudEncoder",
    "Config",
    "DataConfig",
    "Decoder",
    "DecoderConfig",
    "EdgeModel",
    "EvalConfig",
    "ExpertPool",
    "GatedPool",
    "Gates",
    "Generated",
    "Generation",
    "GenerationSettings",
    "GeneratorConfig",
    "LoRA",
    "LoRAGen",
    "LoraGenError",
    "ModelConfig",
    "PackedPrompts",
    "Prompt",
    "PromptLoRA",
    "RefineConfig",
    "Request",
    "Router",
    "Sampling",
    "Score",
    "TrainConfig",
    "cv_squared",
    "gated_product",
    "generate",
    "keep_top_k",
    "load_config",
    "load_params",
    "load_tokenizer",
    "merge",
    "merge_donated",
    "merge_over",
    "pack_prompts",
    "score",
    "specialize",
    "stream",
    "unmerge",
    "unmerge_donated",
]

# A name's module is imported when the name is first asked for (PEP 562): reading one module must not load the others.
_NAMES_OF_MODULE = {
    "lora_gen_jax.adapters.gated_pool": "GatedPool gated_product",
    "lora_gen_jax.adapters.lora": "LoRA PromptLoRA",
    "lora_gen_jax.adapters.merge": "merge merge_donated merge_over unmerge unmerge_donated",
    "lora_gen_jax.config": "Config DataConfig EvalConfig GeneratorConfig ModelConfig TrainConfig",
    "lora_gen_jax.decoder.config": "DecoderConfig",
    "lora_gen_jax.decoder.model": "Decoder",
    "lora_gen_jax.decoder.pretrained": "load_config load_params load_tokenizer",
    "lora_gen_jax.errors": "LoraGenError",
    "lora_gen_jax.generator.cloud": "CloudEncoder PackedPrompts pack_prompts",
    "lora_gen_jax.generator.lora_gen": "ExpertPool LoRAGen",
    "lora_gen_jax.generator.router": "BatchNorm Gates Router cv_squared keep_top_k",
    "lora_gen_jax.generator.specialize": "specialize",
    "lora_gen_jax.generator.trained_module": "Generated",
    "lora_gen_jax.inference.decode": "Generation GenerationSettings generate stream",
    "lora_gen_jax.inference.edge_model": "EdgeModel",
    "lora_gen_jax.inference.sampling": "Sampling",
    "lora_gen_jax.inference.scoring": "Request Score score",
    "lora_gen_jax.methods.registry": "METHODS",
    "lora_gen_jax.specialization.prompt": "Prompt",
    "lora_gen_jax.specialization.settings": "RefineConfig",
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
