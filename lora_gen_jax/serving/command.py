"""The command ``serve``: a generator, its models and specializations behind an HTTP interface.

In: flags. Out: a server, until SIGTERM or Ctrl-C. Heavy imports wait until the command runs.
"""

import dataclasses
import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gen_jax.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from lora_gen_jax.serving.registry import Registry
    from lora_gen_jax.serving.scheduler import Scheduler
    from lora_gen_jax.specializer import Specializer

_KEY = "LORA_GEN_API_KEY"
_MOST_CONTEXT = 2048


@dataclasses.dataclass(frozen=True)
class Serve:
    """Answers over HTTP, as OpenAI's interface, with many specializations of one edge model at the same time.

    Without --checkpoint the shipped generator for SmolLM2-135M is served. Example:

    lora-gen serve --specializations special --port 8000
    """

    checkpoint: Path | None = None
    """A run's work directory (its newest checkpoint is taken), one checkpoints/<step> directory, a generator that
    `pack` wrote, or the name of one: on the Hugging Face hub (ORG/NAME, or ORG/NAME@REVISION), or shipped
    (`smollm2_135m`, trained on the reasoning tasks; `quickstart`, for the pocket pair). Left out, the one shipped for
    SmolLM2-135M (`smollm2_tasks`)."""
    cloud: str | None = None
    """Where the cloud model is, if not where it was when the generator was trained."""
    edge: str | None = None
    """Where the edge model is, if not where it was when the generator was trained."""
    specializations: tuple[Path, ...] = ()
    """Specializations that `specialize` wrote, or directories of them; each is served by its directory's name."""
    store: Path | None = None
    """Directory in which specializations that clients make are kept; those in it are served from the start."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's. Beyond loopback a key is needed."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may have as their Host beside localhost and, beyond loopback, this machine's name and any
    address; *.example.com stands for all names below it."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and prints it."""
    rows: int = 16
    """Sequences that are generated at the same time."""
    context: int | None = None
    """Prompt and new tokens of a sequence are at most this many; left out, the edge model's positions, at most 2048."""
    queue: int = 256
    """Sequences that may wait for a row; more are answered with status 429."""
    max_new_tokens: int = 512
    """Longest answer in tokens that a request may ask for."""
    max_body_kb: int = 1024
    """Largest body of a request, in KiB."""
    refined_rank: int = 0
    """Rank of the LoRA that a specialization may have beside its gates, refined with `--refine lora`; every sequence
    then takes room and time for it. At least what the given specializations have."""
    max_specializations: int = 1000
    """Specializations that are held at the same time."""
    timeout: float = 120.0
    """Seconds until a request that has no complete answer is given up with status 504."""
    warm_up: bool = True
    """Compile for prompts of every length before the first request; if not, the first of each kind waits for it."""
    shutdown_timeout: float = 30.0
    """Seconds that accepted requests have to be finished, after SIGTERM or Ctrl-C."""
    api_key: str | None = None
    """Key that requests must bear, or @FILE to read it from a file; left out, that in LORA_GEN_API_KEY, if any."""
    without_key: bool = False
    """Listen beyond loopback without a key: whoever reaches the address may ask."""
    page: bool = True
    """Show a page at / on which specializations are made, asked and corrected in a browser."""

    def __post_init__(self) -> None:
        sizes = ("rows", "queue", "max_new_tokens", "max_body_kb", "max_specializations", "timeout", "shutdown_timeout")
        ranges = dict.fromkeys(sizes, (0, float("inf"), "a number above 0"))
        ranges |= {"refined_rank": (-1, 257, "0 to 256"), "port": (-1, 65536, "1 to 65535, or 0 for a free one")}
        for name, (above, below, words) in ranges.items():
            if not above < getattr(self, name) < below:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} is {getattr(self, name)}", field=flag, remedy=f"give {words}")


def serve_command(flags: Serve) -> None:
    """Checks what costs nothing first, then loads the models, compiles, and serves."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "pip install 'lora_gen_jax[serve]'"
        raise ConfigError(f"serving needs {', '.join(missing)}", field=missing[0], remedy=remedy)
    key = _api_key(flags)

    from lora_gen_jax.inference.work import factor_rank
    from lora_gen_jax.serving.guard import Hosts, is_loopback
    from lora_gen_jax.serving.server import bind, run_server
    from lora_gen_jax.serving.service import Limits, Service

    if flags.checkpoint is None:
        print("no --checkpoint: the shipped generator for SmolLM2-135M is used", file=sys.stderr)
    with bind(flags.host, flags.port) as listener:
        if key is None and not flags.without_key and not is_loopback(listener):
            problem = f"--host {flags.host} can be reached from other machines, and there is no key"
            remedy = "give --api-key @FILE, or --without-key if whoever reaches it may ask"
            raise ConfigError(problem, field="--api-key", code="missing", remedy=remedy)
        hosts = Hosts.of(listener, flags.allowed_hosts)
        specializer = _specializer(flags)
        registry = read_registry(flags, specializer)
        rank = max([flags.refined_rank, *(factor_rank(entry.made.factors) for entry in registry.entries)])
        scheduler = make_scheduler(specializer, flags.rows, flags.context, flags.queue, rank)
        limits = Limits(flags.max_new_tokens, flags.max_body_kb * 1024, flags.timeout, flags.queue)
        service = Service(scheduler, specializer, registry, limits, key)
        if flags.warm_up:  # last: it takes long, and nothing is wrong by now
            print("compiling for prompts of every length (--no-warm-up leaves it out) …", file=sys.stderr)
            scheduler.warm_up()
        # What is there by now stays: looked through again and again, it would hold requests up for seconds.
        gc.collect()
        gc.freeze()

        def ready() -> None:
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            edge = specializer.config.edge.source
            print(f"serving http://{host}:{port}  (edge {edge}, {len(registry)} specializations)", flush=True)

        status = run_server(service, listener, flags.shutdown_timeout, ready, hosts, flags.page)
    if status:
        sys.exit(status)


def _api_key(flags: Serve) -> str | None:
    from lora_gen_jax.files import text_argument

    key = flags.api_key if flags.api_key is not None else os.environ.get(_KEY)
    if key is None:
        return None
    key = text_argument(key, "--api-key").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        problem = "--api-key must be printable ASCII without spaces: it is sent in a header"
        raise ConfigError(problem, field="--api-key", code="characters")
    return key


def _specializer(flags: Serve) -> "Specializer":
    from lora_gen_jax.specializer import Specializer
    from lora_gen_jax.training.checkpoint import load_checkpoint
    from lora_gen_jax.training.portable import DEFAULT

    loaded = load_checkpoint(flags.checkpoint or DEFAULT)
    if loaded.config.method != "lora_gen" or loaded.config.generator.generator == "direct":
        what = "direct generation" if loaded.config.method == "lora_gen" else f"method {loaded.config.method}"
        raise CheckpointError(
            f"{loaded.path} was trained with {what}: the server mixes specializations by their gates, which it has"
            " none of",
            field="--checkpoint",
            code="method",
            remedy="Use `lora-gen export --format merged` and serve the merged model",
        )
    return Specializer.of(loaded, flags.cloud, flags.edge)


def read_registry(flags: Serve, specializer: "Specializer") -> "Registry":
    """The specializations that are served from the start: those given, and those kept, which win over given ones."""
    from lora_gen_jax.serving.registry import Registry, Served
    from lora_gen_jax.serving.stored import read_entries, read_store

    served = Served.of(specializer)
    given = read_entries(flags.specializations, served)
    if len(given) > flags.max_specializations:
        problem = f"{len(given)} specializations are given, --max-specializations is {flags.max_specializations}"
        raise CheckpointError(problem, field="--max-specializations", remedy="raise it")
    registry = Registry(flags.max_specializations, flags.store)
    # Kept ones are clients': they are neither left out nor a reason not to start.
    for entry in (*given, *(read_store(flags.store, served) if flags.store is not None else ())):
        registry.add(entry)
    return registry


def make_scheduler(
    specializer: "Specializer", rows: int, context: int | None, queue: int, rank: int = 0
) -> "Scheduler":
    """The edge model's rows, with the generator's expert pool beside its weights.

    Args:
        specializer: whose models are served.
        rows: sequences at the same time.
        context: of a sequence; the model's positions, at most 2048, when left out.
        queue: sequences that may wait.
        rank: of factors that a specialization may have beside its gates.
    """
    from lora_gen_jax.inference.engine import Engine
    from lora_gen_jax.serving.scheduler import Scheduler

    edge = specializer.pair.edge
    slots = min(edge.config.max_positions, _MOST_CONTEXT) if context is None else context
    engine = Engine(edge.plain.replace(adapter=specializer.pool()), rows=rows, slots=slots, rank=rank)
    return Scheduler(engine, queue)
