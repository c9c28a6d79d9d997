"""The model `lora_gen` of lm-evaluation-harness: the edge model, specialized or as it is.

In: lm-eval's requests. Out: log-likelihoods and texts, equal to those of lm-eval's `hf` backend with the same
weights. Texts become ids as in that backend; a context is read once for all its continuations, and what many contexts
begin with (a few-shot block) once for all of them. Importing this module makes the model known to lm-eval by name.
"""

import copy
import dataclasses
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import lm_eval.models  # noqa: F401  (lm-eval's own models are known by name once this is imported)
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lora_gen_jax.errors import ConfigError, DataError, ModelError
from lora_gen_jax.evaluation.lm_eval_documents import split_contexts, use_fixed_shots
from lora_gen_jax.evaluation.lm_eval_generation import GenerationArgs, parse_generation_args
from lora_gen_jax.evaluation.lm_eval_source import Settings, load_subject, parse_settings
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.request_runner import Ids, Runner
from lora_gen_jax.evaluation.subject import EvaluatedModel

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """A request without the prompt that its model was specialized by."""

    args: tuple[Any, ...]


@register_model("lora_gen")
class LoraGenLM(TemplateLM):
    """lm-eval's view of an edge model.

    Args:
        arguments: as `lora_gen_jax.evaluation.lm_eval_source.Settings`.

    Raises:
        ConfigError: for arguments that cannot work.
        LoraGenError: when the model, the generator or the cache cannot be loaded.
    """

    def __init__(self, **arguments: Any):
        settings = parse_settings(arguments)
        if settings.prompt_from_task:
            # One prompt for a task: lm-eval builds its tasks after the model.
            use_fixed_shots()
        self._set_up(settings, load_subject(settings), None)

    @classmethod
    def of(
        cls, subject: EvaluatedModel, journal: RequestCache, batch_tokens: int, unprompted: Collection[str] = ()
    ) -> "LoraGenLM":
        """A model that a program has loaded already.

        Args:
            subject, batch_tokens: these.
            journal: where finished requests are kept.
            unprompted: names of tasks without description and shots, which the subject answers as it is.
        """
        made = cls.__new__(cls)
        made._set_up(Settings(batch_tokens=batch_tokens), subject, journal)
        made.unprompted = frozenset(unprompted)
        return made

    def _set_up(self, settings: Settings, subject: EvaluatedModel, journal: RequestCache | None) -> None:
        super().__init__()
        self.settings, self.subject, self.journal = settings, subject, journal
        self.contexts: set[tuple[int, Ids]] = set()
        self.unprompted = frozenset[str]()
        self.tokenizer: Any = self.subject.edge.encoder.tokenizer
        if (self.settings.max_length or 0) > (most := self.subject.edge.config.max_positions):
            problem = f"max_length={self.settings.max_length} exceeds the model's {most} positions"
            raise ConfigError(problem, field="max_length", remedy="lower it")
        self.runner = self._runner(self.subject)

    def _runner(self, subject: EvaluatedModel) -> Runner:
        directory = None if self.settings.cache is None else Path(self.settings.cache)
        cache = RequestCache(directory, subject.identity) if self.journal is None else self.journal
        return Runner(subject, cache, self.settings.tokens_at_once)

    def context_tokens(self) -> float:
        """Mean tokens, soft ones too, of the different contexts that the edge model was given since the last call."""
        lengths = [soft + len(ids) for soft, ids in self.contexts]
        # Models specialized on the way note their contexts in the same set.
        self.contexts.clear()
        return sum(lengths) / max(1, len(lengths))

    @property
    def max_length(self) -> int:
        """Tokens that the model reads, at most; soft ones take their place, unless the model numbers none of them."""
        return min(self.settings.max_length or self.subject.room, self.subject.room)

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task names no number; lm-eval's own default."""
        return 256

    @property
    def eot_token_id(self) -> Any:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is read as: the begin token, or the end token where there is none."""
        for found in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if found is not None:
                return found
        problem = "the tokenizer has no begin and no end token: nothing can stand for an empty context"
        raise ModelError(problem, field="tokenizer")

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What results.json says about the model: fingerprints, method, versions."""
        return self.subject.info

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with the tokenizer's own special tokens unless it begins with one or the caller says so."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the tokenizer's template; without its system turns if the template has none.

        Raises:
            ModelError: when the tokenizer has no chat template.
            ConfigError: where prompts are to come from the tasks, which cannot be told in a conversation.
        """
        if self.subject.specialize is not None:
            problem = "prompt_from_task=true cannot cut conversations"
            raise ConfigError(problem, field="prompt_from_task", code="chat", remedy="leave --apply_chat_template out")
        if not self.tokenizer.chat_template:
            remedy = "leave --apply_chat_template out"
            raise ModelError("the model's tokenizer has no chat template", field="chat_template", remedy=remedy)
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)
        except jinja2.TemplateError:
            log.warning("the chat template refuses this conversation: its system turns are left out")
            rest = [turn for turn in chat_history if turn["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, tokenize=False, **options)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of every request; `Instance.args` is (context, continuation)."""
        return self._by_prompt(requests, "loglikelihood", disable_tqdm)

    def _by_prompt(self, requests: Sequence[Any], kind: str, disable_tqdm: bool) -> list[Any]:
        """Answers requests of one kind; where prompts come from the tasks, by the model specialized for each."""
        if self.subject.specialize is None:
            answer = super().loglikelihood if kind == "loglikelihood" else self._generate
            return answer(requests, disable_tqdm)  # pyright: ignore
        tasks: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            tasks.setdefault(str(request.task_name), []).append(i)
        prompts: dict[str, list[tuple[int, Asked]]] = {}
        for task, members in tasks.items():
            contexts = [requests[i].args[0] for i in members]
            parts = split_contexts(contexts)
            if parts is None and task not in self.unprompted:
                raise DataError(
                    f"the contexts of task {task} do not begin with a prompt that can be cut off",
                    field=task,
                    remedy="give it a description or shots (--num_fewshot K) with a blank line after each, and"
                    " more than one document (--limit)",
                )
            for i, context in zip(members, contexts, strict=True):
                prompt, query = ("", context) if parts is None else parts[context]
                prompts.setdefault(prompt, []).append((i, Asked((query, *requests[i].args[1:]))))
        results: list[Any] = [None] * len(requests)
        for prompt, asked in prompts.items():
            special = copy.copy(self)
            # What has no prompt (a bare continuation, asked for by a metric) is the unspecialized model's.
            plain = dataclasses.replace(self.subject, specialize=None)
            special.subject = self.subject.specialize(prompt) if prompt else plain
            special.runner = self._runner(special.subject)
            found = getattr(special, kind)([one for _, one in asked], disable_tqdm)
            for (i, _), result in zip(asked, found, strict=True):
                results[i] = result
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that predict every token once; `Instance.args` is (text,)."""
        if self.subject.specialize is not None:
            problem = "prompt_from_task=true needs tasks with contexts; whole texts have none"
            raise ConfigError(problem, field="prompt_from_task", code="whole texts", remedy="give prompt=TEXT")
        windows = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in rolling])
        scored = iter(self._loglikelihood_tokens([w for one in windows for w in one], disable_tqdm))
        return [sum(next(scored)[0] for _ in one) for one in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of (anything, context ids, continuation ids), in order."""
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        if cut := sum(len(p[0]) < len(r[1]) for p, r in zip(pairs, requests, strict=True)):
            log.warning("%d of %d contexts were cut from the left to %d tokens", cut, len(pairs), self.max_length)
        self.contexts |= {(self.subject.soft_tokens, context) for context, _ in pairs}
        return self.runner.logprobs(pairs, disable_tqdm)

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[Ids, Ids]:
        """A pair that the model can read: the context keeps its last tokens."""
        if not context or not continuation:
            which = "continuation" if context else "context"
            remedy = "change the task's texts, or the space between them"
            raise DataError(f"a request's {which} has no tokens", field=which, code="empty", remedy=remedy)
        if len(continuation) > self.max_length:
            problem = f"a continuation has {len(continuation)} tokens, the model reads {self.max_length}"
            raise DataError(problem, field="continuation", code="too long")
        return tuple(context[-(self.max_length + 1 - len(continuation)) :]), tuple(continuation)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string; `Instance.args` is (context, generation arguments)."""
        return self._by_prompt(requests, "generate_until", disable_tqdm)

    def _generate(self, requests: Sequence[Any], disable_tqdm: bool) -> list[str]:
        end = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        prompts = []
        for context, arguments in (request.args for request in requests):
            wanted = parse_generation_args(arguments, self.max_gen_toks, end)
            prompts.append((self._prompt(context, wanted), wanted))
        self.contexts |= {(self.subject.soft_tokens, ids) for ids, _ in prompts}
        return self.runner.texts(prompts, self.settings.seed, disable_tqdm)

    def _prompt(self, context: str, wanted: GenerationArgs) -> Ids:
        """A context's last tokens, as many as leave room for the new ones."""
        room = self.max_length - wanted.tokens
        if room < 1:
            problem = f"{wanted.tokens} new tokens leave no room for a context in the model's {self.max_length}"
            raise DataError(problem, field="max_gen_toks", remedy="lower max_gen_toks with --gen_kwargs")
        ids = self.tok_encode(context)[-room:]
        return tuple(ids) if ids else (self.prefix_token_id,)
