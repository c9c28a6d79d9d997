"""Hand-made results and costs, as finished jobs and latency.json would have them."""

from types import SimpleNamespace

from lora_gen_jax.methods.registry import METHODS

SEEN = {"a": True, "b": True, "c": False}


def scored(accuracy, tokens=10.0, seen_tokens=None):
    tasks = {
        t: {"acc": accuracy, "n": 4, "context_tokens": tokens if t == "c" else seen_tokens or tokens} for t in SEEN
    }
    groups = {"seen": {"accuracy": accuracy + 0.01}, "unseen": {"accuracy": accuracy - 0.1}}
    return {
        "tasks": tasks,
        "groups": groups,
        "ave": accuracy,
        "har": accuracy - 0.02,
        "ave_seen": accuracy + 0.02,
        "ave_unseen": accuracy - 0.2,
        "har_unseen": accuracy - 0.3,
    }


def by_seed(*accuracies, shots=("5",), **more):
    return {str(i): {n: scored(a, **more) for n in shots} for i, a in enumerate(accuracies)}


def generator(run="lora_gen", **changes):
    """What is read of a run's settings."""
    method = run if run in METHODS else "lora" if run.startswith("lora_r") or run == "lora_alone" else "lora_gen"
    reads = run in ("lora", "lora_moe", "mixlora") or run.startswith("lora_r")
    settings = {"num_experts": 16, "cv_coefficient": 0.01, **changes}
    return {"method": method, "data": {"edge_reads_prompt": reads}, "generator": settings, "eval": {"limit": None}}


def results(**runs):
    """The methods' runs, with the ablations' settings for all that are named so."""
    settings = {run: generator(run) for run in runs if run != "icl"}
    for run in runs:
        if run.startswith("experts_"):
            settings[run] = generator(num_experts=int(run.removeprefix("experts_")))
        if run.startswith("cv_"):
            settings[run] = generator(cv_coefficient=float(run.removeprefix("cv_")))
    return {
        "settings": settings,
        "runs": runs,
        "seen": SEEN,
        "facts": {run: {s: {"steps": 7, "trained_parameters": 1234} for s in seeds} for run, seeds in runs.items()},
        "agent": {},
        "machines": [{"machine": {"device": "cpu", "cpus": 2, "system": "Linux"}, "runs": list(runs)}],
        "versions": [{"versions": {"jax": "1.2"}, "runs": list(runs)}],
        "shots": "5",
        "seeds": ["0", "1", "2"],
    }


def costs(**ms):
    def one(value):
        macs = {"prefill": 1, "answer": 2_000_000}
        return {"answer_ms": value, "macs": macs, "once_ms": {}, "kept_tokens": 0, "numbers_beside": 0}

    found = {row: one(value) for row, value in ms.items()}
    return {"answers": found, "workload": {"new_tokens": 6, "input_tokens": 2, "instruction_tokens": 68}}


def cells(sheet, row):
    (found,) = [line for line in sheet.texts if line[0] == row]
    return dict(zip(sheet.columns, found, strict=True))


def traits(*values):
    return SimpleNamespace(
        **dict(zip(("compresses_context", "merged", "training_free", "transfers"), values, strict=True))
    )
