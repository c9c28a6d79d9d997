"""The base model on ARC-Easy, scored twice: by this project and by lm-evaluation-harness's own `hf` backend.

In: a directory with the task's original file, a number of documents. Out: both accuracies, and the largest
difference of a log-likelihood. Both read the same weights, in fp32. Needs the `test` extra (torch, lm-eval).

Command:  python benchmarks/arc_easy_parity.py --data.dir DIR [--limit 200]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from lora_gen_jax.config import EvalConfig, ModelConfig
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.decoder.pretrained import leaves, load_hf_config
from lora_gen_jax.evaluation.choices import build_requests, metrics, regroup, run
from lora_gen_jax.models import Model, load_model


def torch_model(source: str, model: Model) -> Any:
    """The same weights as a transformers model."""
    tensors = {}
    for leaf in leaves(model.config):
        value: Any = model.params
        for key in leaf.path:
            value = value[key]
        stack = np.asarray(value, np.float32)
        slices = list(stack) if leaf.stacked else [stack]
        for name, one in zip(leaf.tensor_names(model.config.num_layers), slices, strict=True):
            tensors[name] = torch.from_numpy(np.ascontiguousarray(one.T if leaf.transpose else one))
    config = load_hf_config(source)
    hf = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    missing, unexpected = hf.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"weights do not fit transformers' model: missing {missing}, unexpected {unexpected}")
    hf.tie_weights()
    return hf.eval()


def ours(model: Model, task: Task) -> tuple[dict, list[list[float]]]:
    """Metrics and log-likelihoods by this project."""
    settings = EvalConfig(shots=0)
    requests = build_requests(model, task.test, "", ())
    logprobs = regroup(task.test, run(model, model.params, requests, settings, share_prefix=False))
    return metrics(task.test, logprobs), logprobs


def theirs(model: Model, hf: Any, task: Task, folder: Path) -> tuple[dict, list[list[float]]]:
    """Metrics and log-likelihoods by lm-eval's `hf` backend, from a task of the same documents."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    rows = [{"query": e.query, "choices": [o.strip() for o in e.options], "gold": e.gold} for e in task.test]
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    definition = {
        "task": "arc_easy_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    backend = HFLM(pretrained=hf, tokenizer=model.encoder.tokenizer, batch_size=16)
    found = lm_eval.simple_evaluate(backend, tasks=[definition], bootstrap_iters=0)
    assert found is not None
    scores = found["results"]["arc_easy_local"]
    samples = sorted(found["samples"]["arc_easy_local"], key=lambda s: s["doc_id"])
    logprobs = [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples]
    return {"acc": scores["acc,none"], "acc_norm": scores["acc_norm,none"]}, logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.dir", dest="directory", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--model", default="smollm2-135m")
    flags = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    task = load_tasks(["arc_easy"], flags.directory)["arc_easy"]
    task = Task(task.name, task.descriptions, task.train, task.test[: flags.limit], source=task.source)
    model = load_model(ModelConfig(flags.model, dtype="float32"))
    mine, my_logprobs = ours(model, task)
    with tempfile.TemporaryDirectory() as folder:
        reference, reference_logprobs = theirs(model, torch_model(flags.model, model), task, Path(folder))
    largest = max(
        abs(a - b) for r, s in zip(my_logprobs, reference_logprobs, strict=True) for a, b in zip(r, s, strict=True)
    )
    n = mine["n"]
    print(f"documents        {n}")
    print(f"lora_gen_jax     acc {mine['acc']:.4f} ({round(mine['acc'] * n)})  acc_norm {mine['acc_norm']:.4f}")
    print(
        f"lm-eval hf       acc {reference['acc']:.4f} ({round(reference['acc'] * n)})"
        f"  acc_norm {reference['acc_norm']:.4f}"
    )
    print(f"largest difference of a log-likelihood: {largest:.1e} nats")


if __name__ == "__main__":
    main()
