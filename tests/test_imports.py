"""Who imports whom: the core nothing above it, the library never the lab, nobody in a circle, and no more than needed.

The rules are checked on the syntax trees of all modules. Imports inside functions count like any other; those under
`if TYPE_CHECKING` do not, since they never run.
"""

import ast
import graphlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lora_gen_jax
from lora_gen_jax import cli

ROOT = Path(lora_gen_jax.__file__).parent
CORE = ("decoder", "adapters", "generator")
# What the core may use beside itself: no model, no method and no command is in these.
FOUNDATION = ("errors", "files", "untrusted", "hub", "sharding", "buckets", "placement")
# Everything that reproduces the paper's comparisons; commands import it when they are called.
LAB = ("lab",)
COMMAND_LINE = ("cli", "__main__")
HEAVY = (
    "orbax",
    "grain",
    "gguf",
    "tokenizers",
    "rich",
    "transformers",
    "optax",
    "tyro",
    "safetensors",
    "huggingface_hub",
)


@cache
def graph():
    """{module: modules of ours that it imports}, names without the package's."""
    files = {name_of(path): path for path in ROOT.rglob("*.py")}
    return {name: imported(path, files) - {name} for name, path in files.items()}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imported(path, files):
    found, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    ours = {name.removeprefix("lora_gen_jax").lstrip(".") for name in found if name.startswith("lora_gen_jax")}
    return {next(name for name in parents(one) if name in files) for one in ours}


def parents(name):
    """The name itself, then what it lies in: of an imported function, its module."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def within(name, parts):
    """Whether a module is one of `parts`, lies in one, or has a name that begins with one and an underscore."""
    return any(name == part or name.startswith((f"{part}.", f"{part}_")) for part in parts)


def test_the_core_imports_nothing_above_it():
    upward = {
        (name, other)
        for name, others in graph().items()
        if within(name, (*CORE, *FOUNDATION))
        for other in others
        if not within(other, FOUNDATION if within(name, FOUNDATION) else (*CORE, *FOUNDATION))
    }
    assert not upward


def test_the_library_never_imports_the_lab():
    library = {name: others for name, others in graph().items() if not within(name, (*LAB, *COMMAND_LINE))}
    assert len(library) > 100
    assert not {(name, other) for name, others in library.items() for other in others if within(other, LAB)}


# Modules whose subject is one method, and words that mean something else there.
NAMED = {
    "lab.agent.table": {"lora", "lora_gen"},  # rows of the paper's Table 3, as agent.json names them
    "specializer": {"lora_gen", "lora"},  # what the package offers: prompts that become gates; factors to refine
    "serving.command": {"lora_gen"},  # the server mixes gates
    "training.portable": {"lora_gen"},  # a generator's file
    "training.published": {"lora_gen", "lora"},  # its card, with the hub's tags
    "config_check": {"lora"},
    "config": {"base", "icl", "lora_gen", "lora"},  # defaults; and factors to refine
    "evaluation.lm_eval_model": {"lora_gen"},  # lm-eval's name of this package
    "evaluation.lm_eval_command": {"lora_gen"},
    "evaluation.lm_eval_source": {"lora_gen"},
    "evaluation.published": {"base"},  # the paper's figures
    "lab.tables.latency": {"lora_moe"},  # a part of the config
}
# gates|lora, what steps are taken on; "refined", a field of specializations; a table of tensor names; a GGUF's type.
OTHERWISE = ("specialization", "adapters", "serving", "decoder", "export", "commands")


def test_no_method_is_named_outside_the_methods():
    """A method is one file and its line in the registry: others ask the registry, and so know new ones, too."""
    from lora_gen_jax.methods.registry import METHODS

    found = {}
    for path in ROOT.rglob("*.py"):
        if within(name := name_of(path), ("methods", *OTHERWISE)) and name not in NAMED:
            continue
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        if named := texts & set(METHODS) - NAMED.get(name, set()):
            found[name] = named
    assert not found


def test_no_module_imports_itself_by_way_of_others():
    # Names of packages are left out: theirs is what every module in them would import first.
    try:
        tuple(graphlib.TopologicalSorter(graph()).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_every_name_that_the_package_exports_is_the_one_that_type_checkers_see():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in checked.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == lora_gen_jax._MODULE_OF_NAME
    assert sorted(seen) == sorted(lora_gen_jax.__all__)
    for name, module in seen.items():
        assert getattr(lora_gen_jax, name) is getattr(sys.modules[module], name)
    assert set(seen) <= set(dir(lora_gen_jax))
    with pytest.raises(AttributeError, match="no attribute 'Rooter'"):
        lora_gen_jax.Rooter  # noqa: B018


def loaded(code, before=""):
    """The modules of ours, and the packages of others, that a new process loads for `code`, having run `before`."""
    program = (
        f"import json, sys\n{before}\nold = set(sys.modules)\n{code}\nprint(json.dumps([*set(sys.modules) - old]))"
    )
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    names = json.loads(printed.splitlines()[-1])
    ours = {name for name in names if name.split(".")[0] == "lora_gen_jax"}
    return ours, {name.split(".")[0] for name in names} - {"lora_gen_jax"}


def test_the_router_comes_without_the_rest_of_the_house():
    # Flax itself imports rich.
    ours, others = loaded("from lora_gen_jax.generator.router import Router", before="import flax.linen")
    assert len(ours) <= 5, ours
    assert not others & set(HEAVY)


def test_a_specializer_comes_without_what_only_training_and_other_formats_need():
    _, others = loaded("import lora_gen_jax.specializer", before="import flax.linen")
    assert not others & {"orbax", "grain", "gguf", "tokenizers", "transformers", "tyro", "matplotlib", "rich"}


def test_the_list_of_commands_is_printed_without_jax():
    ours, others = loaded("from lora_gen_jax.cli import main; main(['--help'])")
    assert len(ours) <= 6, ours
    assert not others & {*HEAVY, "jax", "flax", "numpy"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_can_be_loaded(name):
    function, flags = cli.COMMANDS[name].load()
    assert callable(function)
    own = {"train", "eval", "lm_eval", "agent", "table", "bench", "compile", "efficiency"}
    assert (flags is None) == (name in own)
