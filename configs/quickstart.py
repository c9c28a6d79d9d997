"""The two-minute proof: the pocket pair becomes a specialist for tasks that no training has seen.

Command:  python train.py configs/quickstart.py
Time:     TBD
Result:   TBD
"""

from lora_gen_jax.config import Config, DataConfig, EvalConfig, GeneratorConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        cloud=ModelConfig("pocket-cloud", remat="dots"),
        edge=ModelConfig("pocket-edge", remat="dots"),
        generator=GeneratorConfig(num_experts=16, top_k=4, rank=8, alpha=8.0, dropout=0.0),
        data=DataConfig(
            tasks=("pocket",),
            prompts_per_step=32,
            prompts_per_row=1,
            cloud_length=128,
            edge_length=64,
            queries_per_prompt=6,
            response_slots=48,
            min_shots=0,
            max_shots=5,
            query_length=32,
        ),
        train=TrainConfig(
            steps=400,
            learning_rate=5e-3,
            warmup_steps=20,
            clip_norm=1.0,
            validation_batches=2,
            validate_every=100,
            checkpoint_every=200,
        ),
        eval=EvalConfig(tasks=("pocket_seen", "pocket_unseen"), shots=5, prompt_limit=256),
        compare=("base", "icl", "lora", "lora_gen"),
    )
