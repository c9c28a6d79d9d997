"""The command line on a tiny trained pair: specialize and generate; bad input ends with one line and status 2."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import color_rows, experiment, refused, trained, write_config, write_model, write_rows

from lora_gen_jax.cli import eval_main, main, next_directory, train_main

PROMPT = "say the color of the sun\n\nwhat kind is the star ?\nred"
QUESTION = "what kind is the moon ?\n"


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """A specialization of the trained pair."""
    out = tmp_path_factory.mktemp("special") / "warm"
    main(["specialize", "--checkpoint", str(trained().directory), "--prompt", PROMPT, "--out", str(out)])
    return out


@pytest.fixture
def config_file(tmp_path):
    """(config, its file) of a run that has not started; the model is a copy that a test may damage."""
    source = trained().directory.parent
    shutil.copytree(source / "model", tmp_path / "in" / "model")
    shutil.copy(source / "rows.jsonl", tmp_path / "in" / "rows.jsonl")
    config = experiment(tmp_path / "in", tmp_path / "run")
    return config, write_config(tmp_path / "tiny.py", config)


def test_specialize_then_generate_answers_as_the_task_asks(special, capsys):
    assert {p.name for p in special.iterdir()} == {"specialization.safetensors", "prompt.txt", "specialization.json"}
    assert (special / "prompt.txt").read_text() == PROMPT
    readable = json.loads((special / "specialization.json").read_text())
    assert len(readable["gates"]) == 2
    assert readable["checkpoint"] == str(trained().directory / "checkpoints" / "24")
    capsys.readouterr()
    main(["generate", "--specialization", str(special), "--input", QUESTION, "--max-new-tokens", "4"])
    assert capsys.readouterr().out.split() == ["red"]
    main(["generate", "--specialization", str(special), "--input", QUESTION, "--max-new-tokens", "4", "--base"])
    assert capsys.readouterr().out.split()[:1] != ["red"]


def test_another_prompt_specializes_for_another_task(capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("say one two three\n\nwhat kind is the star ?\ntwo")
    out = tmp_path / "count"
    prompt = f"@{tmp_path / 'prompt.txt'}"
    main(["specialize", "--checkpoint", str(trained().directory), "--prompt", prompt, "--out", str(out)])
    assert "bytes" in capsys.readouterr().err
    (tmp_path / "question.txt").write_text(QUESTION)
    question = f"@{tmp_path / 'question.txt'}"
    main(["generate", "--specialization", str(out), "--input", question, "--max-new-tokens", "4"])
    assert capsys.readouterr().out.split() == ["two"]


def test_texts_are_read_without_what_editors_put_around_them(capsys, tmp_path):
    """A byte-order mark before a prompt, a line break behind an input: the small model goes astray with either."""
    prompt, question = "Give the sound of this animal.\n\nowl:\nhoot", "cow:"
    found = []
    for name, before, after in (("plain", b"", b""), ("edited", b"\xef\xbb\xbf", b" \r\n")):
        (tmp_path / f"{name}.txt").write_bytes(before + prompt.encode())
        (tmp_path / f"{name}.in").write_bytes(question.encode() + after)
        out = str(tmp_path / name)
        main(["specialize", "--checkpoint", "quickstart", "--prompt", f"@{out}.txt", "--out", out])
        capsys.readouterr()
        main(["generate", "--specialization", out, "--input", f"@{out}.in", "--max-new-tokens", "8"])
        found.append((json.loads((Path(out) / "specialization.json").read_text())["gates"], capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0][1].strip()


def test_generate_streams_as_many_tokens_as_asked_and_draws_by_its_seed(special, capsys):
    def answer(*flags):
        main(["generate", "--specialization", str(special), "--input", "cold tree", "--max-new-tokens", "6", *flags])
        return capsys.readouterr().out

    hot = ("--base", "--temperature", "3.0", "--seed")
    assert answer(*hot, "1") == answer(*hot, "1")
    assert len({answer(*hot, str(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--prompt", " "], ["--prompt", "@FILE"]),
        (["--prompt", "@no/such.txt"], ["--prompt", "no/such.txt"]),
        (["--prompt", "red " * 200], ["prompt", "200 tokens", 128]),
        (["--checkpoint", "no/such"], ["checkpoint", "no/such"]),
        (["--cloud", "no/such/model"], ["no/such/model"]),
        (["--promt", "x"], ["--promt", "--prompt"]),
    ],
    ids=["empty", "file", "long", "checkpoint", "model", "misspelled"],
)
def test_specialize_refuses_bad_input_and_writes_nothing(capsys, tmp_path, flags, facts):
    defaults = {"--checkpoint": str(trained().directory), "--prompt": PROMPT, "--out": str(tmp_path / "out")}
    defaults |= dict(zip(flags[::2], flags[1::2], strict=True))
    refused(capsys, main, ["specialize", *(x for pair in defaults.items() for x in pair)], *facts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--prompt", "--checkpoint", "--out", "--cloud"])
def test_half_a_surrogate_on_the_command_line_is_refused(capsys, tmp_path, flag):
    """What bytes that are no UTF-8 become: no file and no text of this package has such a name."""
    args = {"--checkpoint": str(trained().directory), "--prompt": PROMPT, "--out": str(tmp_path / "out")}
    args |= {flag: "x\udcff"}
    refused(capsys, main, ["specialize", *(x for pair in args.items() for x in pair)], "UTF-8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--checkpoint", "--out", "--cloud", "--shots", "--chat", "--prompts", "--examples"])
def test_a_path_of_five_thousand_characters_is_refused(capsys, tmp_path, flag):
    args = {"--checkpoint": str(trained().directory), "--out": str(tmp_path / "out")} | {flag: "x" * 5000}
    if flag in ("--checkpoint", "--out", "--cloud"):
        args["--prompt"] = PROMPT
    refused(capsys, main, ["specialize", *(x for pair in args.items() for x in pair)])
    for command, name in (("generate", "--specialization"), ("export", "--specialization"), ("pack", "--checkpoint")):
        given = {"generate": ["--input", "x"], "export": ["--out", "y", "--format", "peft"], "pack": ["--out", "y"]}
        refused(capsys, main, [command, name, "x" * 5000, *given[command]])
    refused(capsys, train_main, ["x" * 5000 + ".py"])
    assert list(tmp_path.iterdir()) == []


CHAT = [
    {"role": "system", "content": "say the color of the sun"},
    {"role": "user", "content": "what kind is the star ?"},
    {"role": "assistant", "content": "red"},
]
SHOT = {"input": "what kind is the star ?", "output": "red"}


def same_gates(one, other):
    from lora_gen_jax.adapters.specialization import load_specialization

    return np.abs(load_specialization(one).gates(4).dense() - load_specialization(other).gates(4).dense()).max() < 1e-6


def test_a_conversation_and_shots_specialize_as_their_text_does(special, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps(CHAT, indent=2))
    shots = write_rows(tmp_path / "shots.jsonl", [SHOT])
    base = ["specialize", "--checkpoint", str(trained().directory)]
    main([*base, "--chat", str(tmp_path / "chat.json"), "--out", str(tmp_path / "chat")])
    main([*base, "--shots", str(shots), "--prompt", CHAT[0]["content"], "--out", str(tmp_path / "shots")])
    main([*base, "--shots", str(shots), "--out", str(tmp_path / "bare")])
    assert same_gates(special, tmp_path / "chat")
    assert same_gates(special, tmp_path / "shots")
    assert (tmp_path / "bare" / "prompt.txt").read_text() == "what kind is the star ?\nred"


def test_many_prompts_make_a_directory_each_and_one_line_says_what_they_took(special, capsys, tmp_path):
    rows = [
        {"prompt": "say one two three"},
        {"name": "warm", "messages": CHAT},
        {"shots": [SHOT], "description": CHAT[0]["content"]},
        *({"prompt": f"say the {word}"} for word in ("moon", "star", "tree", "dog", "cat", "fish", "bird")),
    ]
    path, out = write_rows(tmp_path / "many.jsonl", rows), tmp_path / "specials"
    capsys.readouterr()
    main(["specialize", "--checkpoint", str(trained().directory), "--prompts", str(path), "--out", str(out)])
    said, err = capsys.readouterr()
    assert said == ""
    assert re.fullmatch(
        rf"{out}: 10 specializations in \d+\.\d s, \d+\.\d prompts/s, {10 * 2 * 2 * 5} bytes of gates", err.strip()
    )
    assert sorted(p.name for p in out.iterdir()) == ["01", *(f"{n:02d}" for n in range(3, 11)), "warm"]
    assert same_gates(special, out / "warm")
    assert same_gates(special, out / "03")
    assert (out / "04" / "prompt.txt").read_text() == "say the moon"
    main(["generate", "--specialization", str(out / "warm"), "--input", QUESTION, "--max-new-tokens", "4"])
    assert capsys.readouterr().out.split() == ["red"]


def test_a_bad_prompt_among_many_is_named_and_nothing_is_written(capsys, tmp_path):
    base = ["specialize", "--checkpoint", trained().directory, "--out", tmp_path / "out", "--prompts"]
    path = write_rows(tmp_path / "many.jsonl", [{"prompt": "red"}, {"prompt": "red " * 200}])
    refused(capsys, main, [*base, path], f"{path}: 2", "prompt", "200 tokens", 128)
    write_rows(path, [{"prompt": "red"}, {"prompt": "red", "name": "../up"}])
    refused(capsys, main, [*base, path], f"{path}:2", '"name"', "'../up'")
    assert [p.name for p in tmp_path.iterdir()] == ["many.jsonl"]


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        ([], "--prompt, --chat, --shots, --examples and --prompts"),
        (["--prompt", "x", "--chat", "c.json"], "found --prompt and --chat"),
        (["--shots", "s.jsonl", "--chat", "c.json"], "found --chat and --shots"),
        (["--prompt", "x", "--prompts", "p.jsonl"], "found --prompt and --prompts"),
        (["--chat", "no/such.json"], "no/such.json"),
        (["--shots", "no/such.jsonl"], "no/such.jsonl"),
        (["--prompts", "no/such.jsonl"], "no/such.jsonl"),
    ],
)
def test_specialize_takes_one_source_of_prompts_and_checks_it_before_any_model_is_read(capsys, tmp_path, flags, fact):
    args = ["specialize", "--checkpoint", "no/such", "--out", tmp_path / "out", *flags]
    refused(capsys, main, args, fact)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_file_that_is_no_text_is_refused(capsys, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    args = ["--checkpoint", trained().directory, "--prompt", f"@{tmp_path / 'p.txt'}", "--out", tmp_path / "out"]
    refused(capsys, main, ["specialize", *args], "--prompt", tmp_path / "p.txt", "UTF-8")


def test_an_existing_output_is_refused_before_any_model_is_read(capsys, tmp_path):
    (tmp_path / "mine").write_text("x")
    args = ["--checkpoint", "no/such", "--prompt", PROMPT, "--out", tmp_path]
    refused(capsys, main, ["specialize", *args], "--out", tmp_path)


def test_a_checkpoint_of_another_base_model_is_refused(capsys, tmp_path):
    write_model(tmp_path / "other", seed=5)
    args = ["--checkpoint", trained().directory, "--prompt", PROMPT, "--out", tmp_path / "out"]
    refused(capsys, main, ["specialize", *args, "--cloud", tmp_path / "other"], "cloud.source")
    assert not (tmp_path / "out").exists()


def test_a_specialization_refuses_another_edge_model_another_pool_and_a_lost_checkpoint(capsys, special, tmp_path):
    write_model(tmp_path / "other", seed=5)
    args = ["generate", "--specialization", special, "--input", QUESTION]
    refused(capsys, main, [*args, "--edge", tmp_path / "other"], "--edge")
    earlier = trained().directory / "checkpoints" / "12"
    refused(capsys, main, [*args, "--checkpoint", earlier], "--checkpoint", earlier, "pool")
    lost = Path(shutil.copytree(special, tmp_path / "lost"))
    readable = json.loads((lost / "specialization.json").read_text()) | {"checkpoint": "gone/24"}
    (lost / "specialization.json").write_text(json.dumps(readable))
    refused(capsys, main, ["generate", "--specialization", lost, "--input", QUESTION], "--checkpoint DIR", "gone/24")


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--input", ""], ["--input"]),
        (["--temperature", "-1"], ["temperature=-1.0"]),
        (["--top-p", "0"], ["top_p=0.0"]),
        (["--max-new-tokens", "0"], ["max_new_tokens=0"]),
        (["--max-new-tokens", "500"], ["max_new_tokens", "160 positions"]),
        (["--specialization", "no/such"], ["no/such", "specialization.safetensors"]),
        (["--chat", ""], ["chat template"]),
    ],
)
def test_generate_refuses_bad_input(capsys, special, flags, facts):
    defaults = {"--specialization": str(special), "--input": QUESTION} | dict(zip(flags[::2], flags[1::2], strict=True))
    args = [x for pair in defaults.items() for x in pair if x or pair[0] == "--input"]
    refused(capsys, main, ["generate", *args], *facts)


def test_unknown_commands_name_the_nearest(capsys):
    refused(capsys, main, ["specialise"], "'specialise'", "specialize?")
    refused(capsys, main, ["xyz"], "lora-gen COMMAND")
    main([])
    assert "lora-gen COMMAND --help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--generator.top_kk", "3"], ["--generator.top-k"]),
        (["--generator.top-k", "9"], ["generator.top_k", 9, "generator.num_experts = 4"]),
        (["--generator.top-k", "two"], ["--generator.top-k", "two"]),
        (["--generator.routing", "softmax"], ["keep_top_k", "gumbel_top_k"]),
        (["--data.tasks", "arc_easy", "--data.dir", "no/such"], ["no/such", "--data.dir"]),
        (["--data.tasks", "wam"], ["'wam'", "'warm'"]),
        (["--edge.source", "nowhere"], ["'nowhere'", "smollm2-135m"]),
    ],
)
def test_training_refuses_bad_flags_and_leaves_no_directory(capsys, config_file, flags, facts):
    config, path = config_file
    refused(capsys, train_main, [path, *flags], *facts)
    assert not config.directory.exists()


def test_training_refuses_damaged_inputs_and_leaves_no_directory(capsys, config_file):
    config, path = config_file
    root = path.parent / "in"
    write_rows(root / "rows.jsonl", [*color_rows(), {"system": "x", "input": 3, "output": "y"}])
    refused(capsys, train_main, [path], f"{root / 'rows.jsonl'}:21", '"input"')
    write_rows(root / "rows.jsonl", color_rows())
    weights = root / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(capsys, train_main, [path], weights)
    weights.write_bytes(whole)
    settings = json.loads((root / "model" / "config.json").read_text())
    (root / "model" / "config.json").write_text(json.dumps({**settings, "model_type": "mamba"}))
    refused(capsys, train_main, [path], "config.json", "model_type 'mamba'")
    assert not config.directory.exists()


def test_commands_of_one_process_take_no_flags_for_several(capsys, tmp_path):
    path = write_config(tmp_path / "tiny.py", trained())
    for command in ("bench", "efficiency", "compile", "agent"):
        args = [command, path, "--distributed.coordinator", "10.0.0.1:8476"]
        refused(capsys, main, args, f"lora-gen {command} {path}", "distributed", "train.py", "eval.py")


def test_training_needs_a_config_file(capsys):
    refused(capsys, train_main, [], "config", "train.py configs/smollm2_135m.py")
    refused(capsys, train_main, ["no.py"], "config", "no.py")


def test_another_config_in_a_finished_runs_directory_is_refused_by_the_command(capsys, tmp_path):
    path = write_config(tmp_path / "tiny.py", trained())
    refused(capsys, train_main, [path, "--train.seed", "4"], trained().directory, "--workdir", "train.seed: 0 -> 4")


def test_eval_writes_results_and_its_flags_override_the_config(capsys, tmp_path):
    path = write_config(tmp_path / "tiny.py", trained())
    flags = ["--tasks", "warm", "--methods", "base,lora_gen", "--limit=2", "--shots", "1", "--out", tmp_path / "out"]
    eval_main([str(x) for x in [path, *flags, "--eval.batch-tokens", "64"]])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["methods"]) == ["base", "lora_gen"]
    assert list(results["methods"]["base"]["tasks"]) == ["warm"]
    assert results["methods"]["base"]["tasks"]["warm"]["n"] == 2
    assert (results["config"]["eval"]["shots"], results["config"]["eval"]["batch_tokens"]) == (1, 64)
    out, err = capsys.readouterr()
    assert "acc %" in out
    assert str(tmp_path / "out" / "results.json") in err


def test_a_comparison_needs_latencies_and_a_later_evaluation_does_not(capsys, tmp_path):
    path = write_config(tmp_path / "tiny.py", dataclasses.replace(trained(), compare=("base", "lora_gen")))
    flags = [str(path), "--eval.latency", "False"]
    refused(capsys, train_main, flags, "eval.latency", "compare")
    eval_main([*flags, "--methods", "base", "--limit", "1", "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["methods"]["base"]["tasks"]["warm"]["latency_ms"] is None


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (
            ["--methods", "base,mixlor"],
            [
                *("eval.methods", "'mixlor'"),
                "base, icl, task_vector, lora, lora_moe, mixlora, lorahub, autocompressor, lora_gen, refined,",
                "equal_refined, shots_lora, paraphrase, description, shots, shuffled, gibberish, empty",
            ],
        ),
        (["--methods", ""], ["eval.methods"]),
        (["--tasks", " ,"], ["eval.tasks", "' ,'"]),
        (["--tasks", "wam"], ["'wam'", "'warm'"]),
        (["--limit", "0"], ["eval.limit", 0]),
        (["--shots", "-1"], ["eval.shots", -1]),
        (["--limit", "many"], ["many"]),
        (["--checkpoint", "no/such"], ["checkpoint", "no/such"]),
        (["--eval.shotz", "2"], ["--eval.shots"]),
    ],
)
def test_eval_refuses_bad_flags_and_writes_nothing(capsys, tmp_path, flags, facts):
    config = dataclasses.replace(trained(), workdir=tmp_path / "run")
    path = write_config(tmp_path / "tiny.py", config)
    args = [path, "--checkpoint", trained().directory, "--out", tmp_path / "out", *flags]
    refused(capsys, eval_main, args, *facts)
    assert {p.name for p in tmp_path.iterdir()} == {"tiny.py"}


def test_the_next_directory_is_the_first_that_does_not_exist(tmp_path):
    assert next_directory(tmp_path, "eval").name == "eval-1"
    for n in (1, 2, 4):
        (tmp_path / f"eval-{n}").mkdir()
    assert next_directory(tmp_path, "eval").name == "eval-3"


def test_the_trained_gates_differ_between_the_tasks(special, tmp_path):
    """The router has not collapsed to one answer for every prompt."""
    from lora_gen_jax.adapters.specialization import load_specialization

    out = tmp_path / "count"
    main(["specialize", "--checkpoint", str(trained().directory), "--prompt", "say one two three", "--out", str(out)])
    one, other = (load_specialization(path).tensors for path in (special, out))
    assert any(np.any(one[k] != other[k]) for k in one)


def test_a_reader_that_stops_early_gets_no_traceback():
    code = "import sys; from lora_gen_jax.cli import guarded; guarded(lambda: [print('x' * 999) for _ in range(9999)])"
    command = f'"{sys.executable}" -c "{code}" | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "x" * 999 + "\n"
    assert done.stderr == ""
