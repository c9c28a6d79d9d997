"""The command line: train.py, eval.py and ``python -m lora_gen_jax specialize|generate|pack|lm_eval|bench|compile|…``.

In: arguments. Out: files, text on standard output, messages on standard error. Bad input ends with one line that
says what to do, and status 2.
"""

import dataclasses
import difflib
import errno
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from lora_gen_jax.errors import ConfigError, LoraGenError, Stopped

if TYPE_CHECKING:
    from lora_gen_jax.config import Config


@dataclasses.dataclass(frozen=True)
class EvalFlags:
    """Flags of eval.py beside those of the config."""

    checkpoint: Path | None = None
    """A work directory or a checkpoint; left out, the config's own work directory, else the one shipped for it."""
    out: Path | None = None
    """Directory for results.json; left out, eval-<n> in the work directory."""
    tasks: str | None = None
    """Names of tasks, separated by commas."""
    methods: str | None = None
    """base, icl, lora_gen, shuffled, lora, … (as eval.methods), separated by commas."""
    limit: int | None = None
    """Score the first N documents of each task."""
    shots: str | None = None
    """Shots in the system prompt; several numbers separated by commas score each."""


_OF_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""What a user can do something about: full and read-only disks, missing rights, names that are too long."""


def guarded(run: Callable[[], Any]) -> Any:
    """Runs, and turns an error that the user can act on into one line and status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lora_gen_jax").setLevel(logging.INFO)
    try:
        made = run()
        sys.stdout.flush()
        return made
    except LoraGenError as error:
        _fail(str(error))
    except Stopped as stopped:
        from lora_gen_jax.training.distributed import say

        say(str(stopped))
        sys.exit(128 + stopped.signal)
    except BrokenPipeError:
        # Whoever read the output (… | head) has enough; Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in _OF_FILES:
            raise
        _fail(f"{str(error.filename or 'a file')[:200]}: {error.strerror}")


def arguments_of(args: Sequence[str] | None) -> list[str]:
    """The given arguments, else the command line's, which must be text: its bytes become prompts, inputs and names."""
    arguments = list(sys.argv[1:] if args is None else args)
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            from lora_gen_jax.untrusted import shown

            _fail(f"the argument {shown(argument)} is not UTF-8 text")
    return arguments


def _fail(message: str) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its end, and complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def train_main(args: Sequence[str] | None = None) -> None:
    """train.py."""
    arguments = arguments_of(args)

    def run() -> None:
        from lora_gen_jax.config_file import config_from_args

        config = config_from_args("train.py", arguments)
        from lora_gen_jax.training import distributed

        with distributed.job(config.distributed):
            trained_and_compared(config)
        distributed.say(f"done: {config.directory}")

    guarded(run)


def trained_and_compared(config: "Config") -> None:
    """Trains, then scores what `compare` names; of several processes each scores everything, process 0 writes.

    Raises LoraGenError, Stopped as training.
    """
    from lora_gen_jax.training.loop import train

    if config.compare:
        from lora_gen_jax.lab.comparison import check_comparison

        check_comparison(config)
    train(config)
    if config.compare:
        from lora_gen_jax.lab.comparison import compare

        compare(config)


def eval_main(args: Sequence[str] | None = None) -> None:
    """eval.py."""
    arguments = arguments_of(args)

    def run() -> None:
        config, flags, shots = eval_config(arguments)
        from lora_gen_jax.evaluation.run import evaluate
        from lora_gen_jax.training import distributed

        with distributed.job(config.distributed):
            out = flags.out or next_directory(config.directory, "eval")
            evaluate(config, flags.checkpoint, out, shots)
        distributed.say(f"results: {out / 'results.json'}")

    guarded(run)


def eval_config(arguments: list[str]) -> tuple["Config", EvalFlags, list[int]]:
    """A config whose eval fields eval.py's short flags override, the flags, and the numbers of shots.

    Raises ConfigError as `config_from_args`, and for shots that are not numbers.
    """
    from lora_gen_jax.config_file import flags_and_config
    from lora_gen_jax.files import listed

    flags, config = flags_and_config("eval.py", EvalFlags, arguments)
    updates: dict[str, Any] = {} if flags.limit is None else {"limit": flags.limit}
    for name in ("tasks", "methods"):
        if (text := getattr(flags, name)) is not None:
            updates[name] = tuple(listed(text))
            if not updates[name]:
                remedy = "give names separated by commas, or leave it out"
                raise ConfigError(f"eval.{name} is {text!r}", field=f"eval.{name}", remedy=remedy)
    shots = [config.eval.shots]
    if flags.shots is not None:
        parts = [part.strip() for part in flags.shots.split(",")]
        if not all(part.isdecimal() for part in parts):
            remedy = "give a number, or several separated by commas, as 1,3,5"
            raise ConfigError(f"eval.shots is {flags.shots}", field="eval.shots", remedy=remedy)
        shots = [int(part) for part in parts]
        updates["shots"] = max(shots)
    from lora_gen_jax.config_check import check

    return check(dataclasses.replace(config, eval=dataclasses.replace(config.eval, **updates))), flags, shots


def next_directory(parent: Path, name: str) -> Path:
    """The first of ``name-1``, ``name-2``, … that does not exist."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def bench_main(arguments: list[str]) -> None:
    """``bench CONFIG.py``: one training step against this machine's matmul rate."""
    from lora_gen_jax.config_file import config_from_args
    from lora_gen_jax.training.bench import bench

    bench(config_from_args("lora-gen bench", arguments))


def efficiency_main(arguments: list[str]) -> None:
    """``efficiency CONFIG.py``: time, memory and multiply-adds of an answer, by method."""
    from lora_gen_jax.config_file import flags_and_config
    from lora_gen_jax.lab.costs.command import EfficiencyFlags, run

    flags, config = flags_and_config("lora-gen efficiency", EfficiencyFlags, arguments)
    out = flags.out or next_directory(config.directory, "efficiency")
    run(config, flags, out)
    print(f"figures: {out / 'efficiency.json'}", file=sys.stderr)


def compile_main(arguments: list[str]) -> None:
    """``compile CONFIG.py --topology v5e:4x4``: memory, flops and bytes of an experiment's programs on TPUs."""
    from lora_gen_jax.config_file import flags_and_config
    from lora_gen_jax.lab.tpu.command import CompileFlags, run

    flags, config = flags_and_config("lora-gen compile", CompileFlags, arguments)
    run(config, flags)


class Command(NamedTuple):
    """A command, whose module is imported when it is called: ``--help`` and mistakes answer at once.

    Attributes:
        run: MODULE:FUNCTION, below this package; it takes a dataclass of flags, or the arguments as they are.
        summary: a line about it.
    """

    run: str
    summary: str

    def load(self) -> tuple[Callable[[Any], Any], Any]:
        """The function and its flags' class, or None."""
        name, function = self.run.split(":")
        run = getattr(importlib.import_module(f"lora_gen_jax.{name}"), function)
        (kind,) = (parameter.annotation for parameter in inspect.signature(run).parameters.values())
        return run, kind if dataclasses.is_dataclass(kind) else None


COMMANDS = {
    "train": Command("cli:train_main", "train.py: train a generator, or another method, from a config file"),
    "eval": Command("cli:eval_main", "eval.py: score methods on tasks"),
    "specialize": Command("commands:specialize_command", "turn a system prompt into a specialization"),
    "refine": Command("specialization.command:refine_command", "learn from solved examples, from a specialization on"),
    "generate": Command("generate_command:generate_command", "answer an input with a specialized model"),
    "serve": Command("serving.command:serve_command", "answer over HTTP, as OpenAI, for many specializations at once"),
    "export": Command("export.command:export_command", "write a specialization for peft, transformers or llama.cpp"),
    "pack": Command("pack_command:pack_command", "write a trained generator as two small files, or publish it"),
    "lm_eval": Command("evaluation.lm_eval_command:lm_eval_main", "evaluate with lm-evaluation-harness"),
    "agent": Command("lab.agent.command:agent_main", "train and score on tool calls, as the paper's agent table"),
    "table": Command(
        "lab.tables.command:table_main", "train and score all methods and ablations, as the paper's tables"
    ),
    "bench": Command("cli:bench_main", "time a config's training step against the machine's matmul rate"),
    "compile": Command("cli:compile_main", "memory, flops and bytes of an experiment's programs on TPUs"),
    "efficiency": Command("cli:efficiency_main", "time, memory and multiply-adds of an answer, by method"),
    "side_by_side": Command(
        "lab.side_by_side:side_by_side_command", "the base with the prompt beside the specialized model without"
    ),
    "report": Command("lab.report.command:report_command", "write report.html from what runs and evaluations left"),
}


def main(args: Sequence[str] | None = None) -> None:
    """``python -m lora_gen_jax COMMAND …``."""
    arguments = arguments_of(args)
    listing = "\n".join(f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items())
    usage = f"usage: lora-gen COMMAND [flags]\n\n{listing}\n\nlora-gen COMMAND --help explains its flags."
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        _fail(f"unknown command {name!r}" + (f"; did you mean {near[0]}?" if near else f"\n\n{usage}"))

    def run() -> None:
        command, flags_class = COMMANDS[name].load()
        if flags_class is None:
            command(rest)
            return
        import tyro

        command(tyro.cli(flags_class, prog=f"lora-gen {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,)))

    guarded(run)
