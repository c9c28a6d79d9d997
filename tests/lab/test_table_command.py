"""The command from flags to tables.md: what it starts, what it keeps, what it says."""

import json

import pytest
from helpers import raises

from lora_gen_jax.errors import CheckpointError, ConfigError, OutputError
from lora_gen_jax.lab.tables import command
from lora_gen_jax.lab.tables.command import TableFlags, parsed, table_main


def test_every_job_is_started_once_and_the_tables_are_written(path, started, capsys):
    arguments = [str(path), "--seeds", "0,2", "--train.learning-rate", "0.5", "--agent.train.steps", "9"]
    table_main(arguments)
    names = [arguments[arguments.index("--job") + 1] for arguments in started["commands"]]
    assert sorted(names) == sorted(f"{run}/{seed}" for run in ("base", "lora", "lora_gen", "agent") for seed in (0, 2))
    assert started["commands"][0][: 4 + len(arguments)] == [*command.COMMAND, *arguments]
    saved = json.loads((path.parent / "run" / "tables.json").read_text())
    (two,) = [one for one in saved["tables"] if one["table"] == 2]
    (lora,) = [row for row in two["rows"] if row["method"] == "LoRA, no prompt"]
    assert lora["AVE"]["n"] == 2
    assert lora["AVE"]["mean"] == pytest.approx(60)
    assert lora["AVE"]["stderr"] == pytest.approx(10)
    assert saved["costs"]["rows"] == ["lora", "lora_gen"]
    text = (path.parent / "run" / "tables.md").read_text()
    assert "| LoRA, no prompt | 60.0 ± 10.0 |" in text
    assert "60.0 ± 10.0" in capsys.readouterr().out
    result = json.loads((path.parent / "run" / "agent" / "seed-2" / "result.json").read_text())
    assert (result["settings"]["train"]["steps"], result["settings"]["train"]["learning_rate"]) == (9, 0.01)
    result = json.loads((path.parent / "run" / "lora" / "seed-2" / "result.json").read_text())
    assert (result["settings"]["train"]["steps"], result["settings"]["train"]["learning_rate"]) == (2, 0.5)


def test_the_same_command_goes_on_and_a_changed_one_does_not(path, started, capsys):
    table_main([str(path), "--only", "lora,base", "--seeds", "0"])
    assert len(started["commands"]) == 2
    table_main([str(path), "--only", "lora", "--seeds", "0,1"])
    assert [line[line.index("--job") + 1] for line in started["commands"][2:]] == ["lora/1"]
    table_main([str(path), "--only", "lora", "--seeds", "0,1"])
    assert len(started["commands"]) == 3
    assert "everything is trained and scored" in capsys.readouterr().err
    with raises(CheckpointError, "--workdir", "train.steps: 2 -> 3", code="another config"):
        table_main([str(path), "--only", "lora", "--seeds", "0", "--train.steps", "3"])


def test_a_run_of_other_settings_is_refused_before_anything_starts_though_it_is_not_chosen(path, started):
    table_main([str(path), "--only", "lora", "--seeds", "0"])
    with raises(CheckpointError, "--workdir", "lora/seed-0", "train.steps: 2 -> 3", code="another config"):
        table_main([str(path), "--only", "lora_gen", "--seeds", "0", "--train.steps", "3"])
    assert len(started["commands"]) == 1


def test_other_settings_of_scoring_replace_the_result(path, started, capsys):
    table_main([str(path), "--only", "lora,base", "--seeds", "0"])
    table_main([str(path), "--only", "lora", "--seeds", "0", "--eval.limit", "1"])
    assert [line[line.index("--job") + 1] for line in started["commands"][2:]] == ["lora/0"]
    assert "scored again, with other settings or data: base/0\n" in capsys.readouterr().err
    result = json.loads((path.parent / "run" / "lora" / "seed-0" / "result.json").read_text())
    assert result["settings"]["eval"]["limit"] == 1
    assert "| base, no prompt | – |" in (path.parent / "run" / "tables.md").read_text()


def test_a_failing_job_gives_status_1_and_dashes(path, started, capsys):
    started["broken"] = {"lora_gen/0", "lora_gen/1"}
    with pytest.raises(SystemExit) as raised:
        table_main([str(path)])
    assert raised.value.code == 1
    assert len(started["commands"]) == 8
    assert "failed: lora_gen/0, lora_gen/1; the same command tries again" in capsys.readouterr().err
    text = (path.parent / "run" / "tables.md").read_text()
    assert "| LoRA-Gen | – | – |" in text
    started["broken"] = set()
    table_main([str(path)])
    assert len(started["commands"]) == 10


def test_out_takes_the_tables(path, started, tmp_path):
    table_main([str(path), "--only", "lora", "--out", str(tmp_path / "there")])
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["tables.json", "tables.md"]
    assert not (tmp_path / "run" / "tables.md").exists()
    with raises(OutputError, "--out", tmp_path / "there", code="exists"):
        table_main([str(path), "--out", str(tmp_path / "there")])


@pytest.mark.parametrize(
    ("flags", "field", "fact"),
    [
        (["--seeds", "a"], "--seeds", "'a'"),
        (["--only", "loar"], "--only", "lora"),
        (["--train.steps", "0"], "train.steps", 0),
        (["--agent.train.beta2", "1"], "train.beta2", "1.0"),
    ],
)
def test_wrong_flags_are_errors_before_anything_starts(path, started, flags, field, fact):
    with raises(ConfigError, field, fact):
        table_main([str(path), *flags])
    assert started["commands"] == []


def test_a_misspelt_flag_and_no_file(path):
    with pytest.raises(SystemExit) as raised:
        table_main([str(path), "--train.stepz", "3"])
    assert raised.value.code == 2
    with raises(ConfigError, "config", code="none"):
        table_main(["--seeds", "0"])


def test_agent_flags_without_an_agent_table(path):
    path.write_text(path.read_text().replace("{}}, agent,", "{}},"))
    assert parsed([str(path)])[0] == TableFlags()
    with raises(ConfigError, "--agent.train.steps", "--agent.train.steps"):
        parsed([str(path), "--agent.train.steps", "3"])


def test_one_job_is_done_in_this_process(path, monkeypatch):
    done = []
    monkeypatch.setattr(command, "do", done.append)
    monkeypatch.setattr(command, "end_with_parent", lambda: None)
    table_main([str(path), "--train.steps", "5", "--job", "lora_gen/1"])
    assert [job.name for job in done] == ["lora_gen/1"]
    assert done[0].config.train.steps == 5
    with raises(ConfigError, "--job", "'lroa/1'", "lora/1"):
        table_main([str(path), "--job", "lroa/1"])
