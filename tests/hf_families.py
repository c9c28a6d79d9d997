"""Small random models of every family, as transformers makes them."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
OPT_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("Llama", SIZES),
    "llama_biased": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", SIZES),
    "gemma": ("Gemma", SIZES),
    "gemma2": ("Gemma2", SIZES),
    "opt": ("OPT", OPT_SIZES),
}


def build(family):
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # biases and norms start at 0 or 1, which would hide a mix-up
        torch.nn.init.normal_(parameter)
    return model
