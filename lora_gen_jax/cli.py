def train_main():
    import sys
    from lora_gen_jax.config import config_from_args
    from lora_gen_jax.training.loop import train
    train(config_from_args("python train.py", sys.argv[1:]))
