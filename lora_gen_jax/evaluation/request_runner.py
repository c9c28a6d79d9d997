"""Requests to results, a piece at a time: what is finished is kept, what many contexts begin with is read once.

In: pairs or prompts as token ids. Out: log-likelihoods or texts, in order. The plan of batches is made from all
requests, those that are finished too: a run that goes on where another stopped batches as one that never stopped.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from lora_gen_jax.buckets import bucket, power_of_two
from lora_gen_jax.evaluation.lm_eval_generation import GenerationArgs, texts
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.request_plan import pieces, shared_prefixes
from lora_gen_jax.evaluation.subject import EvaluatedModel
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.prefix import encode_prefix
from lora_gen_jax.inference.rows import Request
from lora_gen_jax.inference.scoring import score

Ids = tuple[int, ...]
# Batches that are scored between two writes of the cache: what a stopped evaluation computes again.
BATCHES_PER_WRITE = 8
# Rows of a batch of answers, at most: a token of one row costs nearly what a token of all does.
ANSWERS = 64


class Runner:
    """A model, what it has answered already, and about how many tokens it reads at a time.

    Args:
        subject, cache, batch_tokens: these.
        progress: called with the number of finished requests and their total, instead of a bar on the screen.
    """

    def __init__(
        self,
        subject: EvaluatedModel,
        cache: RequestCache,
        batch_tokens: int,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.subject, self.cache, self.batch_tokens, self.progress = subject, cache, batch_tokens, progress

    def key(self, *content: Any) -> str:
        """As `RequestCache.key`, for this model."""
        return self.cache.key(self.subject.identity, *content)

    def logprobs(self, pairs: Sequence[tuple[Ids, Ids]], quiet: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of every (context, continuation); equal pairs are scored once."""
        keys = {pair: self.key("loglikelihood", *pair) for pair in dict.fromkeys(pairs)}
        by_context: dict[Ids, list[Ids]] = {}
        for context, continuation in keys:
            by_context.setdefault(context, []).append(continuation)
        requests = [Request(context, continuations) for context, continuations in by_context.items()]
        with self._bar(list(keys.values()), quiet, "log-likelihoods") as bar:
            for prefix, members in self._groups([request.context for request in requests]):
                lengths = [
                    min(self.batch_tokens, len(context) - len(prefix) + sum(len(c) - 1 for c in continuations))
                    for context, continuations in (requests[i] for i in members)
                ]
                begun = _SharedPrefix(self.subject, prefix)
                for piece, at_once in pieces(lengths, len(prefix), 0, self.batch_tokens, BATCHES_PER_WRITE):
                    self._score([requests[members[i]] for i in piece], keys, begun, at_once, bar)
        results = (self.cache[keys[pair]] for pair in pairs)
        return [(float(logprob), bool(greedy)) for logprob, greedy in results]

    def _score(
        self, requests: list[Request], keys: dict[Any, str], begun: "_SharedPrefix", batch_tokens: int, bar: Any
    ) -> None:
        """Scores what the cache lacks of a piece."""
        missing = [
            Request(context, left)
            for context, continuations in requests
            if (left := [c for c in continuations if keys[context, c] not in self.cache])
        ]
        if not missing:
            return
        start = bar.n
        found = score(
            begun.model(),
            [Request(context[len(begun.ids) :], left) for context, left in missing],
            batch_tokens=batch_tokens,
            progress=lambda done, _: bar.update(start + done - bar.n),
        )
        self.cache.add(
            {
                keys[context, continuation]: [logprob, greedy]
                for (context, left), one in zip(missing, found, strict=True)
                for continuation, logprob, greedy in zip(left, one.logprobs, one.is_greedy, strict=True)
            }
        )

    def texts(self, prompts: Sequence[tuple[Ids, GenerationArgs]], seed: int = 0, quiet: bool = False) -> list[str]:
        """A text for every (context, how to generate).

        A prompt that is repeated gives the same text again, unless it samples: then each draws its own.
        """
        by_wanted: dict[GenerationArgs, dict[tuple[Ids, int], str]] = {}
        keys = []
        for ids, wanted in prompts:
            group, repeat = by_wanted.setdefault(wanted, {}), 0
            while wanted.temperature and (ids, repeat) in group:
                repeat += 1
            drawn = (self.subject.end_ids, repeat, seed) if wanted.temperature else (self.subject.end_ids,)
            keys.append(group.setdefault((ids, repeat), self.key("generate", ids, wanted, *drawn)))
        with self._bar(keys, quiet, "texts") as bar:
            for wanted, group in by_wanted.items():
                self._generate(wanted, group, bar)
        return [self.cache[key] for key in keys]

    def _generate(self, wanted: GenerationArgs, keys: dict[tuple[Ids, int], str], bar: Any) -> None:
        """Generates what the cache lacks, a batch at a time.

        A batch of which anything is missing runs whole: what a row draws depends on its place in the batch.
        """
        prompts = list(keys)
        for prefix, members in self._groups([ids for ids, _ in prompts]):
            lengths = [len(prompts[i][0]) - len(prefix) for i in members]
            begun = _SharedPrefix(self.subject, prefix)
            for piece, _ in pieces(lengths, len(prefix), wanted.tokens, self.batch_tokens, 1):
                rows = [prompts[members[i]] for i in piece]
                if not (missing := sum(keys[row] not in self.cache for row in rows)):
                    continue
                seed = int(hashlib.sha256("".join(keys[row] for row in rows).encode()).hexdigest()[:7], 16)
                rest = [ids[len(begun.ids) :] for ids, _ in rows]
                made = texts(self.subject, rest, wanted, begun.model(), seed)
                self.cache.add({keys[row]: text for row, text in zip(rows, made, strict=True)})
                bar.update(missing)

    def tokens(self, contexts: Sequence[Ids], limit: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """At most `limit` greedy new ids for every context, without the id that stopped it."""
        keys = {ids: self.key("tokens", ids, limit, sorted(stop_ids)) for ids in contexts}
        asked = list(keys)
        with self._bar(list(keys.values()), False, "answers") as bar:
            for prefix, members in self._groups(asked):
                lengths = [len(asked[i]) - len(prefix) for i in members]
                begun = _SharedPrefix(self.subject, prefix)
                for piece, at_once in pieces(lengths, len(prefix), limit, self.batch_tokens, 1):
                    rows = min(ANSWERS, at_once // bucket(lengths[piece[0]]), power_of_two(len(piece)))
                    for start in range(0, len(piece), rows):
                        batch = [asked[members[i]] for i in piece[start : start + rows]]
                        if missing := sum(keys[ids] not in self.cache for ids in batch):
                            made = self._answers(batch, rows, begun, (limit, stop_ids))
                            self.cache.add({keys[ids]: one for ids, one in zip(batch, made, strict=True)})
                            bar.update(missing)
        return [self.cache[keys[ids]] for ids in contexts]

    def _answers(
        self, batch: list[Ids], rows: int, begun: "_SharedPrefix", until: tuple[int, Sequence[int]]
    ) -> list[list[int]]:
        # Smaller batches are filled up, so that few programs are compiled.
        rest = [ids[len(begun.ids) :] for ids in batch + [batch[0]] * (rows - len(batch))]
        made = generate(begun.model(), rest, GenerationSettings(*until))
        return [one.ids for one in made[: len(batch)]]

    def _groups(self, contexts: Sequence[Any]) -> Iterator[tuple[Ids, list[int]]]:
        # A prefix must save at least one batch: it costs a pass of its own, and programs for its size. It must also
        # fit the model; contexts that are longer than that lose their beginning when they are scored.
        if self.subject.soft_tokens:
            # Nothing is read ahead behind soft tokens, which stand before everything.
            yield (), list(range(len(contexts)))
            return
        most = self.subject.edge.config.max_positions - 1
        yield from shared_prefixes([context[:most] for context in contexts], self.batch_tokens)

    def _bar(self, keys: Sequence[str], quiet: bool, what: str) -> Any:
        distinct = dict.fromkeys(keys)
        done = sum(key in self.cache for key in distinct)
        if self.progress is not None:
            return _Reported(self.progress, done, len(distinct))
        return tqdm(total=len(distinct), initial=done, disable=quiet, desc=what)


class _Reported:
    """Counts as a progress bar does, and tells a function."""

    def __init__(self, progress: Callable[[int, int], None], n: int, total: int):
        self.progress, self.n, self.total = progress, n, total

    def __enter__(self) -> "_Reported":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, more: int) -> None:
        self.n += more
        self.progress(self.n, self.total)


class _SharedPrefix:
    """The model behind what a group's contexts begin with, which is read when it is first needed."""

    def __init__(self, subject: EvaluatedModel, ids: Ids):
        self.subject, self.ids = subject, ids
        self._made: EdgeModel | None = None

    def model(self) -> EdgeModel:
        if self._made is None:
            model = self.subject.model
            self._made = model.replace(prefix=encode_prefix(model, self.ids)) if self.ids else model
        return self._made
