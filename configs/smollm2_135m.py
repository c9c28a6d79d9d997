"""SmolLM2-135M-Instruct as cloud and as edge model, on the five seen tasks, tool calls and small generated tasks.

Command:  python train.py configs/smollm2_135m.py --data.dir DIR
Time:     about 40 minutes on two CPU cores with nothing else running; --train.steps 50 shows it working in ten minutes.
Result:   docs/results.md
"""

from lora_gen_jax.config import Config, DataConfig, EvalConfig, GeneratorConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        cloud=ModelConfig("smollm2-135m", remat="dots"),
        edge=ModelConfig("smollm2-135m", remat="dots"),
        # Prompts tell tasks apart in every layer from the first step on (docs/decisions.md).
        generator=GeneratorConfig(
            num_experts=8,
            top_k=2,
            alpha=64.0,
            cloud_alpha=64.0,
            batch_norm_by_layer=True,
            meta_init="newline",
        ),
        data=DataConfig(
            tasks=("arc_challenge", "arc_easy", "openbookqa", "boolq", "social_iqa", "pocket", "pocket_agent"),
            # Queries of the reasoning tasks show which task they are of; those of the pocket suite do not.
            source_weights=(
                "arc_easy=1.5",
                "openbookqa=1.5",
                "boolq=1.5",
                "social_iqa=2",
                "pocket=2.5",
                "pocket_agent=0.5",
            ),
            prompts_per_step=16,
            prompts_per_row=4,
            cloud_length=560,
            edge_length=160,
            queries_per_prompt=8,
            response_slots=64,
            query_length=160,
        ),
        # Hundreds of steps want a higher rate and a shorter warm-up than the paper's four epochs.
        train=TrainConfig(
            steps=200,
            learning_rate=2e-3,
            warmup_steps=10,
            clip_norm=1.0,
            validation_batches=4,
            validate_every=50,
            checkpoint_every=25,
        ),
        # Shots of the longest task are more than the default limit of a prompt; small batches stay in a CPU's cache.
        eval=EvalConfig(prompt_limit=4096, batch_tokens=2048),
    )
