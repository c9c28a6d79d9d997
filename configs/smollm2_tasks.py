"""SmolLM2-135M-Instruct as cloud and as edge model, on several hundred short tasks whose queries do not name them.

Command:  python scripts/task_mixture.py --tasks TASKS --out mixture     (docs/mixture.md)
          python train.py configs/smollm2_tasks.py --data.files mixture --data.dir DIR
Time:     not measured to its end; the shipped weights took 80 minutes on two CPU cores with bf16 matrix instructions.
Result:   docs/generator.md
"""

from lora_gen_jax.config import Config, DataConfig, EvalConfig, GeneratorConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        cloud=ModelConfig("smollm2-135m"),
        edge=ModelConfig("smollm2-135m"),
        # The cloud stays as it is: its states tell tasks apart, and training it changed nothing (docs/generator.md).
        generator=GeneratorConfig(
            num_experts=32,
            top_k=4,
            rank=8,
            alpha=64.0,
            dropout=0.0,
            router_width=256,
            router_input="pooled",
            pooled_layers=(6, 12, 18, 24),
            router_heads="per_layer",
            standardize=True,
            train_reader=False,
            batch_norm_by_layer=True,
            meta_init="newline",
            train_cloud=False,
            cloud_rank=0,
        ),
        data=DataConfig(
            tasks=("arc_challenge", "arc_easy", "openbookqa", "boolq", "social_iqa"),
            prompts_per_step=16,
            prompts_per_row=4,
            cloud_length=900,
            edge_length=112,
            queries_per_prompt=6,
            response_slots=48,
            query_length=112,
            min_shots=0,
            shot_length=96,
        ),
        train=TrainConfig(
            steps=425,
            learning_rate=3e-3,
            warmup_steps=10,
            weight_decay=0.0,
            clip_norm=1.0,
            reader_prompts=4400,
            reader_steps=1500,
            validation_batches=4,
            validate_every=50,
            checkpoint_every=50,
            # The last third of the run trains for refining (docs/generator.md).
            inner_steps=2,
            inner_after=285,
        ),
        eval=EvalConfig(prompt_limit=4096, batch_tokens=2048),
    )
