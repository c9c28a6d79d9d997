"""The same evaluations by this project's lm-eval backend and by lm-evaluation-harness's own `hf` backend.

In: the tasks' original files, or tensorflow-datasets. Out: for each task and number of shots both accuracies,
documents on which the two backends choose differently, the largest difference of a log-likelihood, wall-clock and CPU
time of both, and what the time of ours went into; then greedy texts token for token. Both backends run the same task
definitions (`lora_gen_jax/evaluation/lm_eval_tasks`) with the same weights, in fp32, one after the other, and take
turns in going first. What is finished is kept in --out: the same command goes on where it was stopped.

Command:  python benchmarks/lm_eval_parity.py --data.dir DIR --out DIR [--limit 200] [--shots 0,5] [--tasks a,b]
Needs the `test` extra (torch, lm-eval).
"""

import argparse
import json
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lora_gen_jax.data.reasoning import REASONING_TASKS
from lora_gen_jax.evaluation.lm_eval_documents import TASKS
from lora_gen_jax.evaluation.lm_eval_model import LoraGenLM
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.lab.costs.transformers_peer import torch_model

# Differences of log-probability below which two options count as tied.
TIE = 1e-3
# Sequences of one batch of the hf backend; larger ones are no faster on two cores.
HF_BATCH = 8
FOUR_OPTIONS = ("arc_challenge", "arc_easy", "openbookqa", "hellaswag")
NEW_TOKENS = 32


class Stopwatch:
    """Wall-clock and CPU seconds, and seconds that XLA compiled."""

    compiling = 0.0

    @classmethod
    def listen(cls) -> None:
        def add(event: str, seconds: float, **_: Any) -> None:
            if event.endswith("backend_compile_duration"):
                cls.compiling += seconds

        jax.monitoring.register_event_duration_secs_listener(add)

    def __enter__(self) -> "Stopwatch":
        self.began = time.perf_counter(), time.process_time(), Stopwatch.compiling
        return self

    def __exit__(self, *_: object) -> None:
        ended = time.perf_counter(), time.process_time(), Stopwatch.compiling
        self.wall, self.cpu, self.compile = (b - a for a, b in zip(self.began, ended, strict=True))


def run_task(backend: Any, manager: TaskManager, name: str, shots: int, limit: int) -> dict[str, Any]:
    """Accuracy, every document's log-likelihoods, and times of one task by one backend."""
    scoring = Stopwatch()
    score_tokens = type(backend)._loglikelihood_tokens

    def timed(*args: Any, **kwargs: Any) -> Any:
        with scoring:
            return score_tokens(backend, *args, **kwargs)

    backend._loglikelihood_tokens = timed
    with Stopwatch() as whole:
        found = lm_eval.simple_evaluate(
            backend, tasks=[name], num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0
        )
    assert found is not None
    samples = sorted(found["samples"][name], key=lambda s: s["doc_id"])
    return {
        "acc": found["results"][name]["acc,none"],
        "gold": [s["doc"]["gold"] for s in samples],
        "logprobs": [[float(pair[0]) for pair in s["filtered_resps"]] for s in samples],
        "seconds": whole.wall,
        "cpu_seconds": whole.cpu,
        "scoring_seconds": scoring.wall,
        "compile_seconds": scoring.compile,
    }


def compare(mine: list[list[float]], theirs: list[list[float]]) -> dict[str, Any]:
    """Documents whose best option differs, those of them that are ties, and the largest difference."""
    differing = ties = 0
    for ours, reference in zip(mine, theirs, strict=True):
        a, b = (max(range(len(row)), key=row.__getitem__) for row in (ours, reference))
        if a != b:
            differing += 1
            ties += max(reference[b] - reference[a], ours[a] - ours[b]) <= TIE
    largest = max(abs(x - y) for r, s in zip(mine, theirs, strict=True) for x, y in zip(r, s, strict=True))
    return {"differing": differing, "ties": ties, "largest_difference": largest}


def text_parity(ours: LoraGenLM, hf: Any, contexts: list[str]) -> tuple[int, int]:
    """How many greedy continuations equal transformers' token for token, and how many of the backend's texts do."""
    model, tokenizer = ours.subject.model, ours.tokenizer
    ids = [ours.tok_encode(context) for context in contexts]
    ends = list(ours.subject.end_ids)
    made = generate(model.plain, ids, GenerationSettings(max_new_tokens=NEW_TOKENS, stop_ids=ends))
    instance = lm_eval.api.instance.Instance
    asked = [instance("generate_until", {}, (c, {"until": [], "max_gen_toks": NEW_TOKENS}), 0) for c in contexts]
    texts = ours.generate_until(asked, disable_tqdm=True)
    equal_ids = equal_texts = 0
    for prompt, mine, text in zip(ids, made, texts, strict=True):
        with torch.inference_mode():
            out = hf.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
        theirs = [i for i in out[0, len(prompt) :].tolist() if i not in ends]
        equal_ids += theirs == mine.ids
        equal_texts += tokenizer.decode(theirs, skip_special_tokens=True) == text
    return equal_ids, equal_texts


def report(results: list[dict[str, Any]]) -> None:
    """One line a task and number of shots, and one for all tasks and for those of four options together."""
    head = f"{'task':<15}{'shots':>5}{'docs':>6}{'acc':>7}{'acc hf':>8}{'differ':>8}{'ties':>6}{'largest':>10}"
    print(head + f"{'s':>8}{'s hf':>8}{'ratio':>7}{'CPU':>7}{'compile':>9}{'tokenize':>10}")
    for shots in sorted({r["shots"] for r in results}):
        rows = [r for r in results if r["shots"] == shots]
        for name, members in [
            *((r["task"], [r]) for r in rows),
            ("4 options", [r for r in rows if r["task"] in FOUR_OPTIONS]),
            ("all", rows),
        ]:
            if not members:
                continue

            def total(side: str, key: str, members: Any = members) -> float:
                return sum(r[side][key] for r in members)

            docs = sum(len(r["ours"]["gold"]) for r in members)
            acc, acc_hf = (sum(r[s]["acc"] * len(r[s]["gold"]) for r in members) / docs for s in ("ours", "hf"))
            print(
                f"{name:<15}{shots:>5}{docs:>6}{acc:>7.4f}{acc_hf:>8.4f}"
                f"{sum(r['differing'] for r in members):>8}{sum(r['ties'] for r in members):>6}"
                f"{max(r['largest_difference'] for r in members):>10.1e}"
                f"{total('ours', 'seconds'):>8.1f}{total('hf', 'seconds'):>8.1f}"
                f"{total('hf', 'seconds') / total('ours', 'seconds'):>6.1f}x"
                f"{total('hf', 'cpu_seconds') / total('ours', 'cpu_seconds'):>6.1f}x"
                f"{total('ours', 'compile_seconds'):>9.1f}"
                f"{total('ours', 'seconds') - total('ours', 'scoring_seconds'):>10.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.dir", dest="data_dir", help="left out: tensorflow-datasets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(REASONING_TASKS))
    parser.add_argument("--shots", default="0,5")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=50, help="prompts that are answered greedily; 0 for none")
    flags = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    Stopwatch.listen()
    flags.out.mkdir(parents=True, exist_ok=True)
    ours = LoraGenLM(model=flags.model, dtype="float32")
    hf = torch_model(flags.model, ours.subject.model)
    backends = {"ours": ours, "hf": HFLM(pretrained=hf, tokenizer=ours.tokenizer, batch_size=HF_BATCH)}
    metadata = {} if flags.data_dir is None else {"data_dir": flags.data_dir}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    results = []
    units = [(int(shots), name) for shots in flags.shots.split(",") for name in flags.tasks.split(",")]
    for number, (shots, name) in enumerate(units):
        unit: dict[str, Any] = {"task": name, "shots": shots}
        for side in sorted(backends, reverse=bool(number % 2)):
            path = flags.out / f"{name}-{shots}-{flags.limit}-{ours.subject.identity}-{side}.json"
            if not path.exists():
                found = run_task(backends[side], manager, f"lora_gen_{name}", shots, flags.limit)
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(found))
                temporary.rename(path)
            unit[side] = json.loads(path.read_text())
        results.append(unit | compare(unit["ours"]["logprobs"], unit["hf"]["logprobs"]))
        print(f"{name}, {shots} shots: done", flush=True)
    report(results)
    if flags.texts:
        tasks = [manager.load([f"lora_gen_{name}"])["tasks"][f"lora_gen_{name}"] for name in flags.tasks.split(",")]
        # In turns, so that all tasks are among the first; WinoGrande's options stand in its queries and are left out.
        rows = zip_longest(*(task.dataset["test"]["query"] for task in tasks))
        contexts = [query for row in rows for query in row if query][: flags.texts]
        ids, texts = text_parity(ours, hf, contexts)
        print(f"greedy, {NEW_TOKENS} new tokens: {ids} of {len(contexts)} prompts equal transformers' token for token,")
        print(f"{texts} of {len(contexts)} texts of generate_until equal")


if __name__ == "__main__":
    main()
