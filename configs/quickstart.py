"""The proof in a few minutes: the pocket pair becomes a specialist for tasks that no training has seen.

Command:  python train.py configs/quickstart.py
Time:     three minutes on two CPU cores: training 75 s, the LoRA it is compared with 40 s, scoring 28 s.
Result:   unseen tasks without the prompt as well as in-context learning with it; base and multi-task LoRA near 0 %.
"""

from lora_gen_jax.config import Config, DataConfig, EvalConfig, GeneratorConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        cloud=ModelConfig("pocket-cloud", remat="dots"),
        edge=ModelConfig("pocket-edge", remat="dots"),
        generator=GeneratorConfig(num_experts=16, top_k=4, rank=8, alpha=128.0, dropout=0.0),
        data=DataConfig(
            tasks=("pocket",),
            prompts_per_step=32,
            prompts_per_row=4,
            cloud_length=240,
            edge_length=48,
            queries_per_prompt=6,
            response_slots=40,
            min_shots=0,
            max_shots=5,
            query_length=32,
        ),
        train=TrainConfig(
            steps=300,
            learning_rate=4e-3,
            warmup_steps=10,
            beta2=0.98,
            clip_norm=1.0,
            validation_batches=2,
            validate_every=100,
            checkpoint_every=150,
        ),
        eval=EvalConfig(tasks=("pocket_seen", "pocket_unseen"), shots=5, prompt_limit=256),
        compare=("base", "icl", "lora", "lora_gen"),
    )
