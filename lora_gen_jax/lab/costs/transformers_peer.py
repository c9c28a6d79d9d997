"""The same model in transformers (torch): what this project's figures are held against.

In: a model of this project and the source it was read from. Out: a transformers model with the same weights, and
greedy decoding with it: the whole prompt, or after a prefix whose keys and values are kept. torch is imported when
it is asked for; the package does not depend on it.
"""

import copy
import importlib.util
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_gen_jax.decoder.pretrained import Source, leaves, load_hf_config
from lora_gen_jax.errors import ConfigError, ModelError
from lora_gen_jax.evaluation.timing import timed
from lora_gen_jax.methods.answering import Workload
from lora_gen_jax.models import Model


def torch_missing() -> str | None:
    """Why the torch side cannot run, in one line; None when it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch (or 'lora_gen_jax[test]') for the comparison with it"
    return None


def torch_model(source: str | Source, model: Model) -> Any:
    """The same weights as a transformers model, in fp32 and ready for inference.

    Args:
        source: where `model` was read from; its config.json says which class transformers builds.
        model: of this project.

    Returns:
        a `transformers.PreTrainedModel`, in `eval` mode, on the CPU.
    """
    if (reason := torch_missing()) is not None:
        raise ConfigError(reason, field="torch")
    import torch
    import transformers

    tensors = {}
    for leaf in leaves(model.config):
        value: Any = model.params
        for key in leaf.path:
            value = value[key]
        stack = np.asarray(value, np.float32)
        slices = list(stack) if leaf.stacked else [stack]
        for name, one in zip(leaf.tensor_names(model.config.num_layers), slices, strict=True):
            # A copy: torch warns about memory it must not write to, and JAX's arrays are such.
            tensors[name] = torch.from_numpy(np.array(one.T if leaf.transpose else one, order="C"))
    config = transformers.AutoConfig.for_model(**load_hf_config(source))
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = hf.load_state_dict(tensors, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ModelError(
            f"the weights of {source} do not fit transformers' {type(hf).__name__}: missing {missing}, unexpected"
            f" {unexpected}",
            field="config.json",
            remedy="use a source whose config.json describes its weights",
        )
    hf.tie_weights()
    return hf.float().eval()


class TorchAnswer(NamedTuple):
    """New token ids of each row, and seconds to the first and to the last of them."""

    ids: list[list[int]]
    first: float
    total: float


class TorchPrefix:
    """Keys and values of a prefix, read once and copied for every answer that follows it."""

    def __init__(self, hf: Any, ids: Sequence[int]):
        import torch

        with torch.inference_mode():
            read = hf(input_ids=torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
        self._cache = read.cache

    def cache(self, rows: int = 1) -> Any:
        """A cache of `rows` rows that an answer may write to."""
        import torch

        with torch.inference_mode():
            cache = copy.deepcopy(self._cache)
            if rows > 1:
                cache.batch_repeat_interleave(rows)
        return cache


def torch_answer(hf: Any, rows: Sequence[Sequence[int]], new_tokens: int, cache: Any = None) -> TorchAnswer:
    """Decodes greedily, always `new_tokens`; a loop by hand is quicker than transformers' `generate`.

    Args:
        hf: from `torch_model`.
        rows: ids that the model reads, those after the prefix where there is one; all rows of one length.
        new_tokens: at least 1.
        cache: of `TorchPrefix`; it is written to. None without a prefix.
    """
    import torch

    began, first, made = time.perf_counter(), 0.0, []
    with torch.inference_mode():
        newest = torch.tensor([list(row) for row in rows])
        for number in range(new_tokens):
            step = hf(input_ids=newest, cache=cache, use_cache=True, logits_to_keep=1)
            newest, cache = step.logits[:, -1].argmax(-1, keepdim=True), step.cache
            made.append(newest[:, 0].tolist())
            first = time.perf_counter() - began if number == 0 else first
    return TorchAnswer([list(ids) for ids in zip(*made, strict=True)], first, time.perf_counter() - began)


class TorchSystem:
    """The base model in transformers; `kept` ids of the front are read once, their cache is copied for every answer.

    The copy is timed apart, not as part of the answer: a server may cut its cache back instead.
    """

    def __init__(self, hf: Any, ids: Sequence[int], new_tokens: int, kept: int = 0):
        self.hf, self.ids, self.new_tokens, self.kept = hf, list(ids), new_tokens, kept
        self.prefix = TorchPrefix(hf, self.ids[:kept]) if kept else None

    def once(self) -> dict[str, float]:
        if self.prefix is None:
            return {}
        return {"prefix": timed(lambda: TorchPrefix(self.hf, self.ids[: self.kept]))[1]}

    def copy(self) -> float | None:
        """Seconds of one copy of the prefix's cache."""
        return None if self.prefix is None else min(timed(self.prefix.cache)[1] for _ in range(3))

    def answer(self) -> tuple[float, float, list[int]]:
        made = self._decode(1)
        return made.first, made.total, made.ids[0]

    def batch(self, rows: int) -> float:
        return self._decode(rows).total

    def _decode(self, rows: int) -> TorchAnswer:
        cache = None if self.prefix is None else self.prefix.cache(rows)
        return torch_answer(self.hf, [self.ids[self.kept :]] * rows, self.new_tokens, cache)


def torch_systems(hf: Any, work: Workload) -> dict[str, TorchSystem]:
    """The three ways in which transformers' base model can do the same work."""
    return {
        "transformers_no_prompt": TorchSystem(hf, work.query, work.new_tokens),
        "transformers_full_prompt": TorchSystem(hf, work.whole, work.new_tokens),
        "transformers_kept_prefix": TorchSystem(hf, work.whole, work.new_tokens, work.kept),
    }


def use_quickest_threads(hf: Any, ids: Sequence[int]) -> int:
    """Sets torch's number of threads to one or to its own choice, whichever reads and decodes quicker, and returns it.

    Its threads wait for each other after every operation: on a small model, or a machine that does other work, one
    thread is often quicker, and the comparison should be with the best that torch can do.
    """
    import torch

    own = torch.get_num_threads()
    seconds = {}
    for threads in {own, 1}:
        torch.set_num_threads(threads)
        seconds[threads] = min(torch_answer(hf, [ids], 4).total for _ in range(3))
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best
