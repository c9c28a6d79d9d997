"""The command ``lm_eval``: lm-evaluation-harness's own command line, with this project's models in it.

In: lm-eval's arguments. Out: what lm-eval writes. Heavy imports wait until the command runs.
"""

import json
import sys

from lora_gen_jax.errors import ConfigError

# lm-eval's subcommands but `run`; they take no model.
OTHERS = ("ls", "validate", "-h", "--help")
# This command's own flags, and what the tasks `lora_gen_…` call them.
DATA_FLAGS = {"--data.dir": "data_dir", "--data.tfds-dir": "tfds_dir", "--data.tfds_dir": "tfds_dir"}
FIXED_SHOTS = "--fixed_shots"


def lm_eval_main(arguments: list[str]) -> None:
    """``lm_eval --model_args model=DIR --tasks …``.

    The model is `lora_gen` and the batch size `auto` unless other flags, or a file given with ``--config``, say so;
    all else is lm-eval's, as its ``run --help`` explains. `lora_gen_jax.evaluation.lm_eval_source.Settings` lists what
    ``--model_args`` takes. Known beside lm-eval's own tasks are the eight reasoning tasks, ``lora_gen_arc_easy`` and so
    on or all as ``lora_gen_reasoning``, whose files ``--data.dir DIR`` names. With ``--fixed_shots``, or where the
    model reads prompts from the tasks, the documents of a task are all shown the same shots.

    Raises ConfigError when lm-eval is not installed, or an argument of the model cannot work.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        remedy = "pip install 'lora_gen_jax[eval]'"
        raise ConfigError("lm-eval is not installed", field="lm-eval", remedy=remedy) from error
    # lm-eval looks for no entry points: the model is known by name once this module is imported.
    import lora_gen_jax.evaluation.lm_eval_model  # noqa: F401
    from lora_gen_jax.evaluation.lm_eval_documents import TASKS, use_fixed_shots

    if FIXED_SHOTS in arguments:
        use_fixed_shots()
    before = sys.argv
    sys.argv = ["lm-eval", *with_defaults([a for a in arguments if a != FIXED_SHOTS], str(TASKS))]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def with_defaults(arguments: list[str], tasks: str) -> list[str]:
    """lm-eval's arguments with this project's defaults in front, where later ones override them.

    Args:
        arguments: the user's; data flags become metadata of the tasks.
        tasks: directory of this project's task definitions, unless the user names one.
    """
    if not arguments:
        return arguments
    known = [] if _names(arguments, "--include_path") else ["--include_path", tasks]
    if arguments[0] in OTHERS:
        return arguments + (known if arguments[0] in OTHERS[:2] else [])
    rest, metadata = _data_flags(arguments[1:] if arguments[0] == "run" else arguments)
    if metadata:
        rest += ["--metadata", json.dumps(metadata)]
    # Flags override what a file says, so there are no defaults beside one.
    defaults = ["--model", "lora_gen", "--batch_size", "auto"]
    return ["run", *([] if _names(rest, "--config", "-C") else defaults), *known, *rest]


def _names(arguments: list[str], *flags: str) -> bool:
    return any(argument.split("=", 1)[0] in flags for argument in arguments)


def _data_flags(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    rest, metadata, queue = [], {}, list(arguments)
    while queue:
        argument = queue.pop(0)
        flag, equals, value = argument.partition("=")
        if flag not in DATA_FLAGS:
            rest.append(argument)
            continue
        value = value if equals or not queue else queue.pop(0)
        if not value:
            raise ConfigError(f"{flag} needs a directory", field=flag)
        metadata[DATA_FLAGS[flag]] = value
    return rest, metadata
