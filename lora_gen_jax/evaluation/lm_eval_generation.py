"""Texts for lm-eval's generation tasks: what a task asks for, and answers that stop where lm-eval would cut them.

In: a task's generation arguments, prompts as token ids. Out: texts up to the first stop string, as the `hf` backend
returns them. Only what the task names changes how a token is drawn: defaults of a model's generation_config.json
(a top_k of 50, a repetition penalty) do not.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.subject import EvaluatedModel
from lora_gen_jax.inference.decode import GenerationSettings, stream
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.sampling import Sampling

# New tokens between two looks at whether all texts hold a stop string.
CHECK_EVERY = 8
# Arguments that change nothing with these values.
NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "repetition_penalty": 1.0,
    "early_stopping": False,
}


class GenerationArgs(NamedTuple):
    """How a task wants texts to be generated.

    Attributes:
        until: texts are cut before the first of these strings.
        tokens: new tokens, at most.
        temperature, top_k, top_p: as `Sampling`; temperature 0 is greedy.
    """

    until: tuple[str, ...]
    tokens: int
    temperature: float
    top_k: int
    top_p: float


def parse_generation_args(arguments: dict[str, Any], default_tokens: int, end: str | None) -> GenerationArgs:
    """A task's generation arguments.

    Args:
        arguments: as the task gives them.
        default_tokens: new tokens where it names no number.
        end: text of the end token, which is always a stop string.

    Raises:
        ConfigError: for arguments that this model does not have.
    """
    # lm-eval is no dependency of what scores answers otherwise.
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    given: dict[str, Any] = dict(normalize_gen_kwargs(arguments, default_tokens))
    until = tuple(handle_stop_sequences(given.pop("until"), eos=end))
    tokens, do_sample = int(given.pop("max_gen_toks")), bool(given.pop("do_sample", False))
    temperature = float(given.pop("temperature", 0.0) or 0.0)
    top_k, top_p = given.pop("top_k", None) or 0, given.pop("top_p", None) or 1.0
    unknown = {name: value for name, value in given.items() if value is not None and NEUTRAL.get(name) != value}
    if unknown:
        remedy = "override them with --gen_kwargs"
        raise ConfigError(f"generation arguments {unknown} are not supported", field="generation_kwargs", remedy=remedy)
    if do_sample and temperature == 0.0:
        remedy = "set it with --gen_kwargs, or do_sample=false"
        raise ConfigError("do_sample=true needs a temperature above 0", field="temperature", remedy=remedy)
    if tokens < 1:
        raise ConfigError(f"max_gen_toks={tokens} generates nothing", field="max_gen_toks", remedy="use at least 1")
    return (
        GenerationArgs(until, tokens, temperature, int(top_k), float(top_p))
        if do_sample
        else GenerationArgs(until, tokens, 0.0, 0, 1.0)
    )


def texts(
    subject: EvaluatedModel,
    prompts: Sequence[Sequence[int]],
    wanted: GenerationArgs,
    model: EdgeModel,
    seed: int,
) -> list[str]:
    """One text per prompt, cut before the first stop string.

    Decoding ends when every row has an end token or a stop string, or has all its tokens.
    """
    from lm_eval.models.utils import postprocess_generated_text

    tokenizer = subject.edge.encoder.tokenizer
    sampling = Sampling(wanted.temperature, wanted.top_k, wanted.top_p)
    # Stop strings that are tokens of their own, such as the end of a turn: the decoded text leaves them out.
    own = [i for i, token in tokenizer.added_tokens_decoder.items() if str(token) in wanted.until]
    stop_ids = [*subject.end_ids, *own]
    steps = stream(model, prompts, GenerationSettings(wanted.tokens, stop_ids, sampling, seed))
    rows: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step, tokens in enumerate(steps, start=1):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
        going = {i for i in going if tokens[i] is not None}
        if step % CHECK_EVERY == 0:
            going = {i for i in going if not any(stop in tokenizer.decode(rows[i]) for stop in wanted.until if stop)}
        if not going:
            break
    return [
        postprocess_generated_text(tokenizer.decode(row, skip_special_tokens=True), list(wanted.until), None)
        for row in rows
    ]
