"""The documentation is true where a program can tell: its commands, links, examples and quoted errors."""

import ast
import dataclasses
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import lora_gen_jax
from lora_gen_jax.cli import COMMANDS, EvalFlags
from lora_gen_jax.config import Config
from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.evaluation.lm_eval_command import DATA_FLAGS, FIXED_SHOTS
from lora_gen_jax.lab.agent.command import AgentFlags
from lora_gen_jax.lab.costs.command import EfficiencyFlags
from lora_gen_jax.lab.tables.command import TableFlags
from lora_gen_jax.lab.tpu.command import CompileFlags

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOOKS = runpy.run_path(str(ROOT / "mkdocs_hooks.py"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A program of this project, up to the end of the command: its name or path, the command's name, the rest.
PROGRAM = re.compile(
    r"(?:lora-gen |python -m lora_gen_jax |python (?=(?:benchmarks|scripts|examples)/)|python (?=train\.py|eval\.py))"
    r"(?P<name>[\w./]+)(?P<rest>[^|;`]*?)(?= && |[|;`]|$)"
)
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w.-]*")


def fences(path, *languages):
    return [text for language, text in FENCE.findall(path.read_text(encoding="utf-8")) if language in languages]


def commands(path):
    """(name, what follows it) of every command line in code blocks and in code inside sentences."""
    text = path.read_text(encoding="utf-8")
    blocks = [text for language, text in FENCE.findall(text) if language in ("", "bash", "sh", "console")]
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
    for line in lines + [re.sub(r"\s+", " ", span) for span in inline]:
        for found in PROGRAM.finditer(re.sub(r"\s#\s.*", "", line)):
            yield found["name"], found["rest"]


def names(flags_class, prefix="--"):
    """The flags that tyro makes of a dataclass."""
    for field in dataclasses.fields(flags_class):
        name = f"{prefix}{field.name}"
        yield name
        if field.type is bool:
            yield f"--no-{name.removeprefix('--')}"
        if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory):
            yield from names(field.default_factory, f"{name}.")


def lm_eval_flags():
    from lm_eval._cli.harness import HarnessCLI

    parsers = HarnessCLI()._subparsers.choices.values()
    return {option for parser in parsers for option in parser._option_string_actions} | {*DATA_FLAGS, FIXED_SHOTS}


def known_flags(name):
    """What may follow a program, as `plain` writes it; None for a name that is no program."""
    config = set(names(Config))
    own = {
        "train.py": set(),
        "eval.py": set(names(EvalFlags)),
        "train": set(),
        "eval": set(names(EvalFlags)),
        "bench": set(),
        "agent": set(names(AgentFlags)),
        "compile": set(names(CompileFlags)),
        "efficiency": set(names(EfficiencyFlags)),
        "table": set(names(TableFlags)) | set(names(Config, "--agent.")),
    }
    if name in own:
        known = own[name] | config
    elif name == "lm_eval":
        known = lm_eval_flags()
    elif name in COMMANDS:
        known = set(names(COMMANDS[name].load()[1]))
    elif "/" in name and (ROOT / name).is_file():
        known = set(FLAG.findall((ROOT / name).read_text(encoding="utf-8")))
    else:
        return None
    return {plain(flag) for flag in known | {"--help"}}


def plain(flag):
    return flag.removeprefix("--").replace("-", "_")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_programs_configs_and_flags_that_exist(path):
    wrong = []
    for name, rest in commands(path):
        known = known_flags(name)
        if known is None:
            wrong.append(f"no such command: {name}{rest}")
            continue
        wrong += [f"{name} has no {flag}" for flag in FLAG.findall(rest) if plain(flag) not in known]
        wrong += [f"no file {file}" for file in re.findall(r"configs/[\w/]+\.py", rest) if not (ROOT / file).is_file()]
    assert not wrong


def test_the_readmes_commands_are_found_at_all():
    found = [name for name, _ in commands(ROOT / "README.md")]
    assert {"train.py", "specialize", "generate", "serve", "lm_eval"} <= set(found)
    assert len(found) > 12
    assert "benchmarks/torch_step.py" in [name for name, _ in commands(ROOT / "docs/scaling.md")]
    serve = known_flags("serve")
    assert serve is not None
    assert {"no_warm_up", "port"} <= serve
    assert "no_port" not in serve
    assert known_flags("specialist") is None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    wrong = []
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", without_code(path)):
        linked = (path.parent / target).resolve() if target else path
        if not linked.exists():
            wrong.append(target)
        elif anchor and anchor not in anchors(linked):
            wrong.append(f"{target}#{anchor}")
    assert not wrong


def without_code(path):
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path):
    return {HOOKS["anchor_of"](heading) for heading in re.findall(r"^#+ (.+)$", without_code(path), re.MULTILINE)}


def test_the_tutorials_python_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = fences(ROOT / "docs/tutorial.md", "python")
    assert len(blocks) >= 3
    namespace = {}
    # As a user runs it: with JAX's ordinary promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, "tutorial.md", "exec"), namespace)
    said = re.findall(r"^ *print\(.*\)  # (.+)$", "\n".join(blocks), re.MULTILINE)
    assert len(said) >= 3
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_the_documentation_compiles_and_imports_what_there_is(path):
    for block in fences(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_gen_jax"):
                module = __import__(str(node.module), fromlist=["*"])
                assert all(hasattr(module, name.name) for name in node.names)


def test_quoted_errors_are_the_programs_own():
    """`…` in a quotation stands for a value; each quotation is a part of one message in the source."""
    messages = {text for file in (ROOT / "lora_gen_jax").rglob("*.py") for text in messages_of(file)}
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\*\*`(.+)`\*\*$", page, re.MULTILINE)
    assert len(quoted) >= 20
    unknown = [text for text in quoted if not any(pattern_of(text).search(message) for message in messages)]
    assert not unknown


def messages_of(file):
    """Every text of a module on one line, with … for what is filled in; texts that are added, and a problem and its
    remedy, are one, also where they were given names just before."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    named = [
        (node.lineno, target.id, value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for targets, values in [
            (getattr(node.targets[0], "elts", node.targets), getattr(node.value, "elts", [node.value]))
        ]
        for target, value in zip(targets, values, strict=False)
        if isinstance(target, ast.Name)
    ]

    def meant(node):
        known = [one for one in named if isinstance(node, ast.Name) and one[1] == node.id and one[0] < node.lineno]
        return max(known, key=lambda one: one[0])[2] if known else node

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and (problem := text_of(meant(node.args[0]))):
            for remedy in (keyword.value for keyword in node.keywords if keyword.arg == "remedy"):
                yield " ".join(str(LoraGenError(problem, remedy=text_of(meant(remedy)) or "…")).split())
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp) and (text := text_of(node)) is not None:
            yield " ".join(text.split())


def text_of(node):
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and (left := text_of(node.left)) is not None:
        return left + (text_of(node.right) or "…")
    return None


def pattern_of(quoted):
    return re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("…")))


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs/reference/index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\[`(\w+)`\]\[", page)) == set(lora_gen_jax.__all__)


def test_changelog_and_citation_are_of_this_version():
    import yaml

    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version


def test_included_sections_end_where_the_next_one_begins():
    text = "# A\n\n## B c\n\nb\n\n```\n# no heading\n```\n\n### D\n\nd\n\n## E\n\ne\n"
    assert HOOKS["section"](text, "b-c") == "b\n\n```\n# no heading\n```\n\n### D\n\nd"
    assert HOOKS["section"](text, "e") == "e"
    assert HOOKS["section"](text, "no-heading") is None


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extending = (tmp_path / "site/extending/index.html").read_text(encoding="utf-8")
    assert "class TrainedScales" in re.sub(r"<[^>]+>", "", extending)  # from CONTRIBUTING.md
    assert (tmp_path / "site/repository/examples/own_model.py").is_file()
    router = (tmp_path / "site/reference/generator/index.html").read_text(encoding="utf-8")
    assert 'id="lora_gen_jax.generator.router.keep_top_k"' in router
