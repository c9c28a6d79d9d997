"""Tool calls: the five rows of the paper's agent table with the pocket pair, on seen and unseen sets of tools.

Command:  lora-gen agent configs/pocket_agent.py
Time:     14 minutes of CPU time, so seven to ten minutes on two idle cores: three trainings, 750 requests.
Result:   seen tools: success rate 50 % for the base model that reads the tools, 72 % for LoRA-Gen without them; unseen
          tools: no method calls a single one (docs/agent.md says why).
"""

from lora_gen_jax.config import Config, DataConfig, EvalConfig, GeneratorConfig, ModelConfig, TrainConfig


def get_config() -> Config:
    return Config(
        cloud=ModelConfig("pocket-cloud", remat="dots"),
        edge=ModelConfig("pocket-edge", remat="dots"),
        generator=GeneratorConfig(num_experts=16, top_k=4, rank=16, alpha=256.0, dropout=0.0),
        # No shots, as in the paper: a prompt is the list of tools and how to call one.
        data=DataConfig(
            tasks=("pocket_agent",),
            prompts_per_step=8,
            prompts_per_row=2,
            cloud_length=400,
            edge_length=400,
            queries_per_prompt=8,
            response_slots=256,
            min_shots=0,
            max_shots=0,
            query_length=110,
        ),
        train=TrainConfig(
            steps=250,
            learning_rate=4e-3,
            warmup_steps=10,
            beta2=0.98,
            clip_norm=1.0,
            validation_batches=2,
            validate_every=125,
            checkpoint_every=50,
        ),
        eval=EvalConfig(tasks=("pocket_agent", "pocket_agent_unseen"), shots=0, prompt_limit=256),
    )
