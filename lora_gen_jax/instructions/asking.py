"""Rows to outcomes. In: rows, a template and an endpoint. Out: an outcome for each row, handed on as it is there.

Several requests are under way at a time, but for the first, which goes alone: it shows what the endpoint takes.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_gen_jax.instructions.endpoint import Closed, Endpoint, RequestRefused
from lora_gen_jax.instructions.prompt import correction, first_messages
from lora_gen_jax.instructions.replies import read_reply
from lora_gen_jax.instructions.rows import Outcome, Source

_KEPT_REPLY = 2000  # characters of a reply that did not serve
_Done = Callable[[Mapping[int, Outcome]], None]


@dataclass(frozen=True)
class Asker:
    """How rows are asked for.

    Attributes:
        endpoint: which answers.
        template: of the prompt.
        attempts: replies to a row until it is set aside.
    """

    endpoint: Endpoint
    template: str
    attempts: int

    def ask(self, batch: Sequence[tuple[int, Source]], done: _Done) -> None:
        """Asks for the rows in one conversation, and hands their outcomes to `done`, by the rows' numbers.

        Raises:
            EndpointError, Closed: as `Endpoint.ask`.
        """
        many = len(batch) > 1
        sources = dict(enumerate((source for _, source in batch), start=1))
        messages = first_messages(self.template, list(sources.values()))
        reply, problems = "", dict.fromkeys(sources, "")
        for _ in range(self.attempts):
            try:
                reply = self.endpoint.ask(messages, max_tokens([sources[n] for n in problems]))
            except RequestRefused as error:
                self._refused([batch[n - 1] for n in problems], str(error), done, split=many)
                return
            outcomes, problems = read_reply(reply, {n: sources[n] for n in problems}, many)
            if outcomes:
                done({batch[n - 1][0]: outcome for n, outcome in outcomes.items()})
            if not problems:
                return
            messages = [*messages, *correction(reply, problems, many)]
        rejected = {n: Outcome(rejected=problem, reply=reply[:_KEPT_REPLY]) for n, problem in problems.items()}
        done({batch[n - 1][0]: outcome for n, outcome in rejected.items()})

    def _refused(self, batch: Sequence[tuple[int, Source]], reason: str, done: _Done, split: bool) -> None:
        """One row may be what the endpoint refuses, so that each is asked for alone; a row alone is set aside."""
        for number, source in batch:
            if split:
                self.ask([(number, source)], done)
            else:
                done({number: Outcome(rejected=reason)})


def max_tokens(sources: Sequence[Source]) -> int:
    """Room for a reply: a query may be as long as its row, and a token is seldom shorter than a character."""
    return sum(512 + len(source.instruction) + len(source.input) for source in sources)


def ask_all(asker: Asker, batches: Sequence[Sequence[tuple[int, Source]]], concurrency: int, done: _Done) -> None:
    """Asks for all batches, `concurrency` at a time; `done` is called from several threads.

    When one fails, or Ctrl-C comes, no more are sent and what has not been answered is given up.

    Raises:
        LoraGenError: the first that `ask` or `done` raised.
    """
    if not batches:
        return
    asker.ask(batches[0], done)
    waiting: queue.SimpleQueue[Sequence[tuple[int, Source]]] = queue.SimpleQueue()
    for batch in batches[1:]:
        waiting.put(batch)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            while not asker.endpoint.closed.is_set():
                asker.ask(waiting.get_nowait(), done)
        except (queue.Empty, Closed):
            ended.put(None)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    # Daemons: the end of the program does not wait for replies.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(concurrency, len(batches) - 1))]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            if (error := ended.get()) is not None:
                raise error
    finally:
        asker.endpoint.close()
