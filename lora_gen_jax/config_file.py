"""How a config file, flags and saved JSON become a `Config`.

In: a Python file with ``get_config()`` and command-line flags that override any field (``--train.steps 10``), or a
run's saved config. Out: a checked `Config`, or the difference between two.
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from lora_gen_jax.config import Config, DistributedConfig, MeshConfig
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.untrusted import fits, shown, wanted

_Made = TypeVar("_Made")


def read_config(path: Path) -> Config:
    """Runs a config file's ``get_config()``; the file's name becomes the config's where it gives none.

    Raises ConfigError when the file is missing, fails, or has no ``get_config()`` that returns a `Config`.
    """
    config = made_by(path, "get_config", Config)
    return config if config.name else dataclasses.replace(config, name=path.stem)


def made_by(path: Path, function: str, kind: type[_Made]) -> _Made:
    """What a function of a Python file returns.

    Raises ConfigError when the file is missing, fails, or has no such function that returns a `kind`.
    """
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist", field="config", code="missing")
    spec = importlib.util.spec_from_file_location(f"lora_gen_{function}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"config file {path} is not a Python file (its name must end in .py)", field="config", code="suffix"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, function, None)
        made = found() if callable(found) else None
    except Exception as error:
        raise ConfigError(
            f"config file {path} failed: {type(error).__name__}: {error}", field="config", code="failed"
        ) from error
    if not isinstance(made, kind):
        where = f"{kind.__module__}.{kind.__name__}"
        problem = f"config file {path} needs a function {function}() that returns a {where}"
        raise ConfigError(problem, field="config", code="no function")
    return made


def config_from_args(program: str, args: Sequence[str]) -> Config:
    """``CONFIG.py [--any.field VALUE …]`` as a checked `Config`; flags override the file's values.

    A misspelled flag prints the nearest ones and exits with status 2; ``--help`` lists all with their defaults.

    Raises ConfigError as `read_config` and `check`.
    """
    return flags_and_config(program, None, args)[1]


def flags_and_config(program: str, flags_class: Any, args: Sequence[str]) -> tuple[Any, Config]:
    """``CONFIG.py [flags of a command] [--any.field VALUE …]`` as the command's flags and a checked `Config`.

    Args:
        program: its name.
        flags_class: a dataclass; None for a command without flags of its own.
        args: of the command line.

    Raises:
        ConfigError: as `config_from_args`.
    """
    if args and not args[0].startswith("-"):
        return _parsed(read_config(Path(args[0])), f"{program} {args[0]}", flags_class, args[1:])
    if args and args[0] in ("-h", "--help"):
        print(f"usage: {program} CONFIG.py [--any.field VALUE …]\n\n{program} CONFIG.py --help lists the fields.")
        sys.exit(0)
    problem = f"name a config file first: {program} configs/smollm2_135m.py [--any.field VALUE …]"
    raise ConfigError(problem, field="config", code="none")


def _parsed(given: Config, program: str, flags_class: Any, args: Sequence[str]) -> tuple[Any, Config]:
    import tyro
    from tyro.conf import AvoidSubcommands, FlagConversionOff, arg

    if not program.startswith(("train.py", "eval.py")) and any(flag.startswith("--distributed.") for flag in args):
        remedy = "leave the distributed flags to train.py and eval.py"
        raise ConfigError(f"{program} runs in one process", field="distributed", remedy=remedy)

    kind: Any = flags_class or type(None)

    class Arguments(NamedTuple):
        flags: Annotated[kind, arg(name="")] = flags_class and flags_class()  # pyright: ignore[reportInvalidTypeForm]
        config: Annotated[Config, FlagConversionOff, AvoidSubcommands, arg(name="")] = given

    about = str((flags_class or Config).__doc__).split("\n\n")[0]
    made = tyro.cli(Arguments, prog=program, description=about, args=list(args))
    from lora_gen_jax.config_check import check  # it loads every method, which --help does not need

    return made.flags, check(made.config)


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


# What a config without the field meant, where that is not today's default.
FORMER = {"generator.batch_norm_variance": "biased"}


def from_json(values: Any) -> Config:
    """A `Config` from `to_json`'s values; fields that a newer version added take their defaults, or `FORMER`.

    Raises ConfigError for a field that this version does not know, a value of another type, a method that is none,
    or sizes that cannot be.
    """

    def build(cls: Any, fields: Any, prefix: str) -> Any:
        if not isinstance(fields, dict):
            name = prefix.rstrip(".") or "config"
            raise ConfigError(f"saved {name} is {shown(fields)}; it must be an object", field=name, code="type")
        hints = get_type_hints(cls)
        for name in fields:
            if name not in hints:
                problem = f"saved config has the field {prefix}{name}, which this version does not know"
                raise ConfigError(problem, field=f"{prefix}{name}", code="unknown")
        former = {name: FORMER[prefix + name] for name in hints if prefix + name in FORMER}
        made = {
            name: build(hints[name], value, f"{prefix}{name}.")
            if dataclasses.is_dataclass(hints[name])
            else _from_json_value(f"{prefix}{name}", value, hints[name])
            for name, value in (former | fields).items()
        }
        return cls(**made)

    from lora_gen_jax.config_check import check_saved

    return check_saved(build(Config, values, ""))


def _from_json_value(field: str, value: Any, hint: Any) -> Any:
    name = field.rpartition(".")[2]
    if name in ("dir", "tfds_dir", "workdir") and isinstance(value, str):
        value = Path(value)
    if isinstance(value, list):
        value = tuple(Path(v) if name == "files" and isinstance(v, str) else v for v in value)
    if not fits(value, hint):
        raise ConfigError(f"saved {field} is {shown(value)}; it must be {wanted(hint)}", field=field, code="type")
    return value


# Where things lie and how devices are arranged may differ between two machines that continue the same run.
PLACE_FIELDS = {"workdir", "bucket", "data.dir", "data.tfds_dir", "data.workers"}
PLACE_FIELDS |= {f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)}
PLACE_FIELDS |= {f"distributed.{field.name}" for field in dataclasses.fields(DistributedConfig)}
# What is scored afterwards does not change what is trained.
SCORING_FIELDS = ("compare", "eval.")


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines 'field: old -> new' for two configs as `to_json` gives them, places and scoring left out."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    fields = sorted((flat_old.keys() | flat_new.keys()) - PLACE_FIELDS)
    fields = [field for field in fields if not field.startswith(SCORING_FIELDS)]
    if flat_old.get("train.epochs") is not None and "train.steps" in fields:
        # What follows from epochs stands in a run's config, and not in the one that it was given.
        fields.remove("train.steps")
    return [f"{f}: {flat_old.get(f)!r} -> {flat_new.get(f)!r}" for f in fields if flat_old.get(f) != flat_new.get(f)]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
