"""Llama-3-8B-Instruct as cloud model, OPT-2.7B as edge model, with the hyper-parameters of the paper's Table 10.

Command:  python train.py configs/opt_2_7b.py --data.dir DIR
Needs:    accelerators, and access to both models on the hub (or --cloud.source and --edge.source as directories).
          What a step takes and where it fits: python -m lora_gen_jax compile configs/opt_2_7b.py --topology v5e:4x4

Batches of 64 queries and four epochs of the five seen tasks (51,164 training rows), as in that table, are 3198 steps.
Every row is read as often as any other (mixture="size"): with sources drawn alike, ARC-Challenge would be read 37 times
and Social IQa 1.2 times. Where the paper reads a prompt for each query, 16 prompts with 4 queries each are a batch
here: as many updates, with a quarter of the cloud model's work. More than 16 chips can share a batch of the paper's own
shape: --data.prompts-per-step 64 --data.queries-per-prompt 1.
"""

from lora_gen_jax.config import Config, DataConfig, GeneratorConfig, MeshConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        cloud=ModelConfig("meta-llama/Meta-Llama-3-8B-Instruct", dtype="bfloat16", remat="full"),
        edge=ModelConfig("facebook/opt-2.7b", dtype="bfloat16", remat="full"),
        # Sixteen chips hold a copy of the frozen weights; what they gather then does not grow with the job.
        mesh=MeshConfig(data=-1, fsdp=16),
        generator=GeneratorConfig(num_experts=8, top_k=2, rank=16, alpha=16, dropout=0.05, cv_coefficient=0.01),
        data=DataConfig(
            mixture="size",
            prompts_per_step=16,
            queries_per_prompt=4,
            cloud_length=2048,
            edge_length=1024,
            response_slots=128,
            workers=2,
        ),
        train=TrainConfig(steps=0, epochs=4, learning_rate=2e-5, warmup_steps=50, weight_decay=0.1),
    )
