"""The command ``lm_eval``: lm-evaluation-harness's own command line, with this project's models in it.

In: lm-eval's arguments. Out: what lm-eval writes. Heavy imports wait until the command runs.
"""

import sys

from lora_gen_jax.errors import ConfigError

# lm-eval's subcommands but `run`; they take no model.
OTHERS = ("ls", "validate", "-h", "--help")


def lm_eval_main(arguments: list[str]) -> None:
    """``lm_eval --model_args model=DIR --tasks …``.

    The model is `lora_gen` and the batch size `auto` unless other flags, or a file given with ``--config``, say so;
    all else is lm-eval's, as its ``run --help`` explains. `lora_gen_jax.evaluation.lm_eval_source.Settings` lists what
    ``--model_args`` takes.

    Raises:
        ConfigError: when lm-eval is not installed, or an argument of the model cannot work.
        LoraGenError: as loading and scoring do.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ConfigError("lm-eval is not installed: pip install 'lora_gen_jax[eval]'") from error
    # lm-eval looks for no entry points: the model is known by name once this module is imported.
    import lora_gen_jax.evaluation.lm_eval_model  # noqa: F401

    before = sys.argv
    sys.argv = ["lm-eval", *with_defaults(arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def with_defaults(arguments: list[str]) -> list[str]:
    """lm-eval's arguments with this project's defaults in front, where later ones override them."""
    if not arguments or arguments[0] in OTHERS:
        return arguments
    rest = arguments[1:] if arguments[0] == "run" else arguments
    # Flags override what a file says, so there are no defaults beside one.
    named = any(argument.split("=", 1)[0] in ("--config", "-C") for argument in rest)
    return ["run", *([] if named else ["--model", "lora_gen", "--batch_size", "auto"]), *rest]
