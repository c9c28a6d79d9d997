"""The report: figures against values computed by hand, a page that needs nothing but itself, and refusals."""

import base64
import io
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import raises
from matplotlib import image

from lora_gen_jax.cli import main
from lora_gen_jax.config import Config
from lora_gen_jax.errors import DataError, OutputError
from lora_gen_jax.evaluation import published
from lora_gen_jax.lab.report import curves, gates
from lora_gen_jax.lab.report.command import write_report
from lora_gen_jax.lab.report.found import find, gather, mean_point
from lora_gen_jax.lab.report.tables import score_sheet

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects addresses, captions, and the text of each section."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.images, self.captions = [], [], [], []
        self.sections, self.rows, self.tags = {}, {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    @property
    def section(self):
        return next((name for tag, name in reversed(self.open) if tag == "section"), None)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.addresses += [attrs[name] for name in ("src", "href", "srcset", "data") if name in attrs]
        if tag == "img":
            assert attrs["alt"]
            self.images.append(attrs["src"])
        if tag == "figcaption":
            self.captions.append("")
        if tag == "tr":
            self.rows[self.section] = self.rows.get(self.section, 0) + 1
        if tag not in VOID:
            self.open.append((tag, attrs.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.sections[self.section] = self.sections.get(self.section, "") + data
        if any(tag == "figcaption" for tag, _ in self.open):
            self.captions[-1] += data


def result(acc, latency, tasks=("boolq", "piqa"), context=20.0):
    """A method's results; the second task is 0.1 better than the first."""
    scored = {
        task: {"acc": acc + 0.1 * i, "acc_norm": acc, "stderr": 0.03, "n": 50, "context_tokens": context}
        | {"latency_ms": latency}
        for i, task in enumerate(tasks)
    }
    return {"tasks": scored, "ave": acc + 0.05, "har": acc, "ave_seen": acc, "ave_unseen": acc + 0.1, "har_unseen": acc}


def results(shots, methods, **extra):
    config = {"name": "x", "edge": {"source": "edge"}, "eval": {"shots": shots, "limit": None}}
    machine = {"platform": "cpu", "cpus": 2, "system": "Linux x86_64"}
    return {"config": config, "versions": {"jax": "0.10.2"}, "machine": machine, "methods": methods} | extra


def random_gates(tasks, layers=4, experts=8, kept=2):
    rng, made = np.random.default_rng(0), {}
    for task in tasks:
        gates_LE = np.zeros((layers, experts))
        for row in gates_LE:
            row[rng.permutation(experts)[:kept]] = rng.dirichlet(np.ones(kept))
        made[task] = gates_LE.round(6).tolist()
    return {"tasks": made}


def write(directory, **files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return directory


def write_metrics(directory, steps=80, more=""):
    directory.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 0, "validation_loss": 3.0}]
    lines += [
        {"step": s, "loss": 3 / s, "cv": 0.1, "gate_entropy": 2.0, "learning_rate": 1e-3} for s in range(1, steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + more)
    return directory


METHODS = {"base": result(0.3, 10.0), "icl": result(0.6, 40.0, context=200.0), "lora_gen": result(0.55, 11.0)}
SHOTS = {s: {**METHODS, "icl": result(0.5 + 0.02 * int(s), 30 + 2.0 * int(s))} for s in ("0", "1", "3", "5")}
GROUP = {"sr_t": 0.9, "sr_act": 0.8, "sr_args": 0.7, "sr": 0.6, "iou": 0.5, "average": 0.7, "stderr": 0.05, "n": 40}
CURVE = {"curve": {"queries": [1, 10, 100], "ms": {"icl": [40, 400, 4000], "lora_gen": [211, 310, 1300]}}}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(directory with every kind of file, its page)."""
    run = tmp_path_factory.mktemp("all") / "run"
    row = {"accuracy": 0.97, "stderr": 0.01, "context_tokens": 72.2, "latency_ms": 3.9}
    report = {group: {"icl": row, "lora_gen": {**row, "context_tokens": 2.0}} for group in ("seen", "unseen")}
    write(run, results=results(5, METHODS, by_shots=SHOTS), report=report)
    write(run, efficiency=CURVE, gates=random_gates(("boolq", "piqa")))
    write(run, agent={"methods": {"lora_gen": {"seen": GROUP, "unseen": GROUP}}})
    write_metrics(run)
    write_metrics(run / "lora", steps=30)
    write_report([run])
    return run, (run / "report.html").read_text()


def test_the_page_is_well_formed_and_needs_nothing_but_itself(everything):
    _, text = everything
    page = Page(text)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    # Every link of the contents leads somewhere.
    assert {a[1:] for a in page.addresses if a.startswith("#")} == set(page.sections) - {None}


def test_every_figure_is_on_the_page_and_beside_it_and_says_where_it_comes_from(everything):
    run, text = everything
    page = Page(text)
    names = {path.name for path in run.glob("*.png")}
    expected = "accuracy_latency accuracy_latency_by_task gates expert_usage training break_even"
    assert names == {f"{name}.png" for name in expected.split()}
    embedded = {base64.b64decode(source.split(",", 1)[1]) for source in page.images}
    for name in names:
        data = (run / name).read_bytes()
        assert data in embedded
        pixels = image.imread(io.BytesIO(data))[..., :3]
        assert min(pixels.shape[:2]) > 200
        assert 0.005 < np.mean(np.any(pixels < 0.9, axis=-1)) < 0.9
        (caption,) = [c for c in page.captions if name in c]
        assert "run/" in caption
        assert "written by" in caption


def test_the_tables_show_what_the_files_hold(everything):
    page = Page(everything[1])
    accuracy, comparison = page.sections["accuracy"], page.sections["comparison"]
    # icl with 5 shots: the mean of 0.6 and 0.7; two errors of 0.03 make sqrt(2)·0.03/2.
    assert "65.0 ± 2.1" in accuracy
    assert "40.00" in accuracy
    assert "97.0 ± 1.0" in comparison
    assert "36.1×" in comparison
    assert "60.0 ± 5.0" in page.sections["agent"]
    assert "missing" not in page.sections


def test_published_figures_stand_apart_from_ours(everything):
    page = Page(everything[1])
    ours = "".join(text for name, text in page.sections.items() if name != "published")
    theirs = page.sections["published"]
    assert theirs.count("published, NVIDIA A100") >= 3
    for row in (*published.REASONING, *published.UNSEEN):
        assert str(row.ave) in theirs
        assert row.model in theirs
        assert row.model not in ours
    rows = (*published.REASONING, *published.UNSEEN, *published.AGENT, *published.COST)
    assert page.rows["published"] == len(rows) + 4


def test_what_is_not_there_is_named_with_the_command_that_makes_it(tmp_path):
    write(tmp_path / "out", results=results(5, METHODS))
    page = Page(write_report([tmp_path / "out"]).read_text())
    missing = page.sections["missing"]
    for name in ("gates.json", "metrics.jsonl", "efficiency.json", "lora-gen efficiency", "train.py"):
        assert name in missing
    assert "results.json" not in missing
    assert "gates" not in page.sections


def test_a_hundred_and_seventy_eight_tasks(tmp_path):
    tasks = [f"pocket/sound/format-{i}" for i in range(177)] + ["<b>&amp;"]
    write(tmp_path, results=results(5, {"lora_gen": result(0.5, 3.0, tasks)}), gates=random_gates(tasks))
    page = Page(write_report([tmp_path]).read_text())
    # One row a task and the heading, beside the table of methods.
    assert page.rows["accuracy"] == 178 + 1 + 2
    # One small map a task and the scale, beside the figure of some and that of the usage, and Figure 1.
    assert len(page.images) == 178 + 1 + 2 + 1
    assert len(set(page.images)) > 178
    assert "b" not in page.tags
    assert "<b>&amp;" in page.sections["accuracy"]
    assert not (tmp_path / "accuracy_latency_by_task.png").exists()
    (tmp_path / "gates.json").unlink()
    write_report([tmp_path], tasks=tasks[3:5])
    assert (tmp_path / "accuracy_latency_by_task.png").exists()


def test_files_with_other_numbers_of_shots_complete_one_another(tmp_path):
    for shots in (1, 5):
        write(tmp_path / f"eval-{shots}", results=results(shots, METHODS))
    (scores,) = gather(find([tmp_path]).files["results.json"])
    assert {method: sorted(of) for method, of in scores.methods.items()} == {
        "base": [0],
        "icl": [1, 5],
        "lora_gen": [1, 5],
    }
    # The same again, other tasks, and another model are figures of their own.
    write(tmp_path / "again", results=results(5, METHODS))
    write(tmp_path / "other", results=results(3, {"icl": result(0.5, 3.0, ("arc_easy",))}))
    model = results(3, METHODS)
    model["config"]["edge"]["source"] = "larger"
    write(tmp_path / "model", results=model)
    assert sorted(len(scores.files) for scores in gather(find([tmp_path]).files["results.json"])) == [1, 1, 1, 2]


def test_whether_a_method_read_the_prompt_is_what_the_file_says(tmp_path):
    read, alone = (result(0.5, 3.0) | {"prompted": prompted} for prompted in (True, False))
    for shots in (1, 5):
        methods = {"icl": result(0.6, 4.0), "lora": read, "mixlora": alone}
        write(tmp_path / f"eval-{shots}", results=results(shots, methods))
    (scores,) = gather(find([tmp_path]).files["results.json"])
    assert {method: sorted(of) for method, of in scores.methods.items()} == {
        "icl": [1, 5],
        "lora": [1, 5],
        "mixlora": [0],
    }
    sheet = score_sheet(scores)
    rows = {(row[0], row[1]): dict(zip(sheet.columns, row, strict=True)) for row in sheet.texts}
    assert rows["LoRA", "5"]["compression"] == "1.0×"
    assert rows["LoRA", "5"]["HAR of unseen tasks, %"] == "50.0"
    assert rows["MixLoRA, no prompt", "0"]["compression"] == "–"


def test_by_shots_makes_a_line(tmp_path):
    write(tmp_path, results=results(5, METHODS, by_shots=SHOTS))
    (scores,) = gather(find([tmp_path]).files["results.json"])
    points = [mean_point(r, scores.tasks, s) for s, r in sorted(scores.methods["icl"].items())]
    assert [p.shots for p in points] == [0, 1, 3, 5]
    np.testing.assert_allclose([p.accuracy for p in points], [0.55, 0.57, 0.61, 0.65])
    np.testing.assert_allclose([p.latency_ms for p in points], [30, 32, 36, 40])
    assert points[0].stderr == pytest.approx(math.sqrt(2) * 0.03 / 2)


def test_validation_and_test_rows_stand_in_tables_of_their_own(tmp_path):
    for split in ("validation", "test"):
        found = results(5, METHODS)
        found["config"]["eval"]["split"] = split
        write(tmp_path / split, results=found)
    assert [len(scores.files) for scores in gather(find([tmp_path]).files["results.json"])] == [1, 1]


def test_a_mean_has_no_error_where_a_task_has_none(tmp_path):
    found = result(0.35, 10.0)
    found["tasks"]["piqa"]["stderr"] = None
    assert mean_point(found, ["boolq", "piqa"], 0).stderr is None
    write(tmp_path, results=results(5, {"base": found, "icl": METHODS["icl"]}))
    text = write_report([tmp_path]).read_text()
    assert "35.0 ± 3.0" in text
    assert "45.0 ±" not in text
    assert "40.0 ±" not in text


def test_effective_number_of_experts():
    even, single = np.full((3, 4), 0.25), np.eye(4)[[2, 2, 2]]
    assert gates.effective(gates.share_of([even])) == pytest.approx(4)
    assert gates.effective(gates.share_of([single])) == pytest.approx(1)
    share = gates.share_of([even, single])
    np.testing.assert_allclose(share, [0.125, 0.125, 0.625, 0.125])
    entropy = -(0.625 * math.log(0.625) + 3 * 0.125 * math.log(0.125))
    assert gates.effective(share) == pytest.approx(math.exp(entropy))


def test_tasks_are_grouped_by_what_training_may_use():
    from lora_gen_jax.data.pocket.suite import GROUPS

    seen, unseen = GROUPS["pocket_seen"]()[0].name, GROUPS["pocket_unseen"]()[0].name
    names = [unseen, "piqa", "mine", "boolq", seen, "agent/unseen-03"]
    assert gates.grouped(names) == {
        "seen tasks": ["boolq", seen],
        "unseen tasks": [unseen, "piqa", "agent/unseen-03"],
        "tasks": ["mine"],
    }


def test_a_tile_has_a_pixel_a_gate_and_is_white_where_no_expert_is_used():
    gates_LE = np.array([[0.0, 0.3, 0.7], [1.0, 0.0, 0.0]])
    pixels = image.imread(io.BytesIO(gates.tile(gates_LE, 1.0)))
    assert pixels.shape[:2] == (2, 3)
    np.testing.assert_array_equal(np.all(pixels[..., :3] == 1, axis=-1), gates_LE == 0)
    brightness = pixels[..., :3].sum(-1)
    assert brightness[0, 1] > brightness[0, 2] > brightness[1, 0]


def test_break_even_by_hand():
    queries = [1.0, 10.0, 100.0]
    lines = {
        "lora_gen": [2 + 0.1 * q for q in queries],
        "icl": [0.5 * q for q in queries],
        "base": [0.05 * q for q in queries],
        "lora": [3 + 0.1 * q for q in queries],
    }
    # 2 + 0.1 n = 0.5 n at n = 5; the base stays ahead, and a method behind from the start has no crossing.
    assert curves.crossings(queries, lines) == {"icl": (pytest.approx(5), pytest.approx(2.5))}


@pytest.mark.parametrize("layout", ["curve", "break_even"])
def test_both_layouts_of_a_break_even_curve(tmp_path, layout):
    seconds = {"icl": [0.04, 0.4, 4.0], "lora_gen": [0.211, 0.31, 1.3]}
    write(tmp_path, efficiency=CURVE if layout == "curve" else {layout: {"queries": [1, 10, 100], **seconds}})
    found = curves.break_even_of(find([tmp_path]).files["efficiency.json"][0])
    assert found is not None
    assert found[0] == [1, 10, 100]
    for method, expected in seconds.items():
        np.testing.assert_allclose(found[1][method], expected)


def test_an_efficiency_file_without_a_curve_is_said_to_have_none(tmp_path):
    write(tmp_path, efficiency={"break_even": {"icl": {"queries": 3}}, "machine": "mine"})
    page = Page(write_report([tmp_path]).read_text())
    assert "has no curve over queries" in page.sections["efficiency"]


def test_running_mean():
    np.testing.assert_allclose(curves.running_mean(np.array([4.0, 2, 0, 6]), 2), [4, 3, 1, 3])


def test_runs_inside_a_run_are_found_and_told_apart(tmp_path):
    for name in ("a/run", "b/run"):
        write_metrics(tmp_path / name, 3, more='{"step": 4, "loss": NaN}\n{"step": 5, "lo')
    write_metrics(tmp_path / "a/run/lora", 2)
    runs = find([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "a/run"]).runs
    assert [run.label for run in runs] == ["a/run", "run/lora", "b/run"]
    assert runs[0].curves["loss"] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert runs[0].curves["validation_loss"] == [(0, 3.0)]


def test_a_second_report_replaces_the_first_and_leaves_nothing_behind(tmp_path, capsys):
    write(tmp_path / "eval", results=results(5, METHODS))
    main(["report", str(tmp_path / "eval"), "--out", str(tmp_path / "new" / "out")])
    assert str(tmp_path / "new" / "out" / "report.html") in capsys.readouterr().err
    first = (tmp_path / "new" / "out" / "report.html").read_text()
    write(tmp_path / "eval", results=results(5, {**METHODS, "icl": result(0.8, 55.0)}))
    main(["report", str(tmp_path / "eval"), "--out", str(tmp_path / "new" / "out")])
    assert (tmp_path / "new" / "out" / "report.html").read_text() != first
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert names == {"report.html", "accuracy_latency.png", "accuracy_latency_by_task.png"}
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"results.json"}


@pytest.mark.parametrize(
    ("files", "field", "code", "facts"),
    [
        ({"results.json": "{"}, "results.json", "json", ("eval.py",)),
        ({"results.json": "[]"}, "results.json", "type", ("eval.py",)),
        ({"results.json": '{"methods": {}}'}, "results.json", "layout", ("eval.py",)),
        ({"gates.json": '{"tasks": {"a": [[0.5, 2.0]]}}'}, "gates.json:tasks.a", None, ("task a", "0 to 1")),
        ({"gates.json": '{"tasks": {"a": [[0.5]], "b": [[0.5, 0.5]]}}'}, "gates.json:tasks.b", None, ("task b",)),
        ({"gates.json": '{"tasks": {"a": [[null]]}}'}, "gates.json:tasks.a", None, ("task a",)),
        ({"gates.json": "{}"}, "gates.json:tasks", None, ("eval.py",)),
        ({"report.json": '{"seen": {}}'}, "report.json", "layout", ("report.json",)),
        (
            {"efficiency.json": '{"break_even": {"queries": [1, 2], "icl": [3]}}'},
            "efficiency.json:break_even.icl",
            None,
            (2, 1),
        ),
        ({"notes.txt": "x"}, "directories", "empty", ("results.json",)),
    ],
)
def test_damaged_files_are_refused_with_a_remedy(tmp_path, files, field, code, facts):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with raises(DataError, field, *facts, code=code) as error:
        write_report([tmp_path])
    assert error.value.remedy
    assert not (tmp_path / "report.html").exists()


def test_bad_flags_are_refused(tmp_path):
    write(tmp_path / "eval", results=results(5, METHODS))
    with raises(DataError, "--tasks", "'piqa'", code="unknown"):
        write_report([tmp_path / "eval"], tasks=["piqaa"])
    with raises(DataError, "--tasks", 9, code="too many"):
        write_report([tmp_path / "eval"], tasks=["piqa"] * 9)
    with raises(DataError, "directories", tmp_path / "nothing", code="no directory"):
        write_report([tmp_path / "nothing"])
    with raises(DataError, "directories", code="none"):
        write_report([])
    (tmp_path / "file").write_text("")
    with raises(OutputError, "--out", tmp_path / "file", code="unwritable"):
        write_report([tmp_path / "eval"], tmp_path / "file")


def test_a_comparison_ends_with_a_report(tmp_path, monkeypatch):
    """What is scored is made up here; the quickstart's test scores models."""
    from lora_gen_jax.data.pocket.suite import GROUPS
    from lora_gen_jax.lab import comparison

    tasks = [GROUPS["pocket_seen"]()[0], GROUPS["pocket_unseen"]()[0]]
    names = [task.name for task in tasks]
    scored = results(5, {"base": result(0.3, 10.0, names), "icl": result(0.6, 40.0, names)})
    made = {name: np.array(rows) for name, rows in random_gates(names)["tasks"].items()}
    for name, value in (
        ("evaluated_tasks", tasks),
        ("load_checkpoints", {"lora_gen": None}),
        ("load_pair", None),
        ("make_systems", {}),
        ("score_systems", scored),
        ("gates_of", made),
        ("describe", {"step": 3}),
    ):
        monkeypatch.setattr(comparison, name, lambda *args, value=value, **named: value)
    config = Config(workdir=write_metrics(tmp_path / "run"), compare=("base", "icl"))
    comparison.compare(config)
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert {"comparison", "accuracy", "gates", "training", "published", "missing"} < set(page.sections)
    assert json.loads((tmp_path / "run" / "gates.json").read_text()) == random_gates(names)
    written = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert {"report.png", "gates.png", "expert_usage.png", "training.png", "accuracy_latency.png"} <= written
