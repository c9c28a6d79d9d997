"""The README's commands, as a new user types them: one after the other, in a clone of this checkout.

The clone has an environment of its own, in which `pip install -e .` puts the package and the `lora-gen` command. Other
packages are those that run the tests: nothing is downloaded but SmolLM2-135M, where it is not cached yet. Every code
block is run, unless a comment right before it says why not; a comment can also add flags to a block's last command.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from before_jax import COMPILE_QUICKLY

from lora_gen_jax.config_file import config_from_args
from lora_gen_jax.decoder import pretrained
from lora_gen_jax.errors import ModelError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- tests/test_readme\.py (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The diagram is no program.
BLOCKS = [match.groups() for match in BLOCK.finditer(README) if match[2] != "text"]
RUN = ("&& cd lora-gen-jax", "--out baby", "--out opposite", "import EdgeModel", "--method mixlora")
"""What tells the blocks that are run, in their order."""
NOT_RUN, ADDS = "does not run this: ", "adds: "


def block(part):
    """The only block that holds a text."""
    (found,) = [one for one in BLOCKS if part in one[2]]
    return found


def said(pattern):
    """What the README says, by a pattern with one group."""
    (found,) = re.findall(pattern, README)
    return found


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A function that runs a block in the clone and returns (standard output, standard error)."""
    home = tmp_path_factory.mktemp("user")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # not what is deleted and not committed yet
            (home / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, home / "repository" / name)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as it is here"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *command], cwd=home / "repository", check=True)
    environment = _environment(home / "environment")

    def run(kind, text, **variables):
        clone = home / "lora-gen-jax"
        command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else ["python", "-c", text]
        done = subprocess.run(
            command,
            cwd=clone if clone.exists() else home,
            env=environment | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr

    run.home = home
    return run


def _environment(directory):
    """A new environment, activated, that finds the packages of this one behind its own."""
    venv.create(directory, symlinks=True)
    (own,) = directory.glob("lib/python*/site-packages")
    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (own / "packages.pth").write_text("\n".join(packages))
    pip = directory / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{directory}/bin/python" -m pip "$@"\n')
    pip.chmod(0o755)
    hidden = ("PYTHONPATH", "XLA_FLAGS", "JAX_ENABLE_X64")  # of the tests
    return {
        **{name: value for name, value in os.environ.items() if name not in hidden},
        "PATH": f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(directory),
        # What `pip install -e .` would fetch is there.
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def test_every_block_is_run_or_says_why_not():
    assert len(README.splitlines()) <= 150
    assert [kind for _, kind, _ in BLOCKS if kind not in ("bash", "python")] == []
    notes = [note for note, *_ in BLOCKS if note]
    assert all(note.startswith((NOT_RUN, ADDS)) for note in notes)
    assert len(re.findall("<!--", README)) == len(notes)  # each stands right before its block
    run = [text for note, _, text in BLOCKS if note is None or note.startswith(ADDS)]
    assert run == [block(part)[2] for part in RUN]


def test_the_quickstart_installs_trains_and_compares(walk):
    note, kind, text = block("&& cd lora-gen-jax")
    assert text.rstrip().endswith("train.py configs/quickstart.py")
    shorter = text.rstrip().replace("REPOSITORY", str(walk.home / "repository")) + " " + note.removeprefix(ADDS)
    out, err = walk(kind, shorter, **COMPILE_QUICKLY)
    assert "LoRA-Gen, no prompt" in out + err
    run = walk.home / "lora-gen-jax" / "runs" / "quickstart"
    assert {path.name for path in run.iterdir()} >= {"report.html", "results.json", "metrics.jsonl", "checkpoints"}
    where, _ = walk("bash", "command -v lora-gen; python -c 'import lora_gen_jax; print(lora_gen_jax.__file__)'")
    assert all(str(walk.home) in line for line in where.splitlines())  # nothing of the checkout that is tested


def test_the_shipped_generator_makes_a_specialization_that_answers(walk):
    _, kind, text = block("--out baby")
    out, err = walk(kind, text)
    assert said(r"writes (\d+) bytes of gates") + " bytes" in err
    assert out.strip() == said(r"merges them and prints `(.+?)`")


@pytest.mark.network
def test_the_real_model_learns_from_the_examples(walk):
    try:
        pretrained.resolve("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"smollm2-135m cannot be fetched: {error}")
    _, kind, text = block("--out opposite")
    out, err = walk(kind, text)
    assert said(r"The result is ([\d,]+) bytes").replace(",", "") + " bytes" in err
    assert f"rich → {out.strip()}," in said(r"(\| opposite .+)")


def test_the_python_prints_what_it_says(walk):
    _, kind, text = block("import EdgeModel")
    expected = re.findall(r"^print\(.*\)  # (.+)$", text, re.MULTILINE)
    assert expected
    assert [line.strip() for line in walk(kind, text)[0].splitlines()] == expected


def test_another_method_trains_and_is_compared(walk):
    note, kind, text = block("--method mixlora")
    out, err = walk(kind, text.rstrip() + " " + note.removeprefix(ADDS), **COMPILE_QUICKLY)
    assert "MixLoRA" in out + err
    assert (walk.home / "lora-gen-jax" / "runs" / "mixlora" / "report.html").stat().st_size


def test_what_is_not_run_has_a_config_and_flags_that_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (text,) = [text for note, _, text in BLOCKS if note and note.startswith(NOT_RUN)]
    (args,) = re.findall(r"python train\.py (.+)'", text)
    config = config_from_args("train.py", args.replace(" DIR", f" {tmp_path}").split())
    assert (config.name, config.bucket) == ("tinyllama_1b", "gs://BUCKET/first")
