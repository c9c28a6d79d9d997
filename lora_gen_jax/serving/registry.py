"""The specializations that a server answers with: by name, at most so many, on disk if a store is named.

In: `Specialization`s, made here or read from directories (`stored.py`). Out: `Entry`s, whose gates go into the
scheduler's rows. Not locked: only the event loop calls a `Registry`.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_gen_jax.adapters.specialization import Specialization
from lora_gen_jax.adapters.specialization_fit import Fit
from lora_gen_jax.data.encode import Encoder
from lora_gen_jax.data.prompt_sources import check_name
from lora_gen_jax.errors import CheckpointError, DataError
from lora_gen_jax.generator.router import Gates
from lora_gen_jax.inference.work import factor_rank
from lora_gen_jax.serving.errors import ApiError, invalid
from lora_gen_jax.specializer import Specializer

BASE, AUTO = "base", "auto"
AUTOMATIC = "auto-"
"""What names of specializations begin with that were made of a conversation's system message."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One specialization.

    Attributes:
        name: what requests call it.
        made: with its prompt, how it learned from examples, and factors beside the gates' update where a LoRA did.
        gates: [L, K], fp32.
        prompt_tokens: what the cloud model read.
        created: seconds since 1970.
        automatic: made of a system message; the first to go where there are too many.
    """

    name: str
    made: Specialization
    gates: Gates
    prompt_tokens: int
    automatic: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def body(self) -> dict[str, Any]:
        """As the interface lists it."""
        return {
            "id": self.name,
            "object": "specialization",
            "created": self.created,
            "prompt_tokens": self.prompt_tokens,
            "gates": self.made.active,
            "layers": len(self.gates.weight),
            "automatic": self.automatic,
            "refined": self.made.refined,
        }

    @property
    def details(self) -> dict[str, Any]:
        """As the interface shows a single one: with its gates, and the prompt if a client named it.

        What is made of a conversation keeps its prompt to itself: another client's system message is in it.
        """
        weights = [[round(float(gate), 6) for gate in layer] for layer in self.gates.dense()]
        return self.body | {"gate_weights": weights, "prompt": None if self.automatic else self.made.prompt}


class Registry:
    """Named specializations.

    Args:
        limit: at most this many, those under way counted; only `add` may exceed it, with what a store holds already.
        store: directory that named ones are kept in, below their names; None: they end with the server.
    """

    def __init__(self, limit: int, store: Path | None = None):
        self.limit, self.store = limit, store
        # By name in small letters, the one used last at the end: some file systems do not tell the cases apart.
        self._entries: dict[str, Entry] = {}
        self._reserved: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[Entry]:
        """By name."""
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def get(self, name: str) -> Entry | None:
        """The specialization of this very name; it counts as used."""
        entry = self._entries.get(name.lower())
        if entry is None or entry.name != name:
            return None
        self._entries[name.lower()] = self._entries.pop(name.lower())
        return entry

    def reserve(self, name: str, automatic: bool = False) -> None:
        """Takes a name and a place, before what will have them is made."""
        if not automatic:
            check_new_name(name)
        if name.lower() in self._entries or name.lower() in self._reserved:
            message = f"there is already a specialization {name!r}: choose another name, or delete it"
            raise ApiError(409, message, "name", "name_taken")
        while len(self._entries) + len(self._reserved) >= self.limit:
            oldest = next((key for key, entry in self._entries.items() if entry.automatic), None)
            if oldest is None:
                message = f"there are already {self.limit} specializations, the limit: delete one"
                raise ApiError(429, message, None, "too_many_specializations")
            del self._entries[oldest]
        self._reserved.add(name.lower())

    def release(self, name: str) -> None:
        """Gives a reserved name back: nothing came of it."""
        self._reserved.discard(name.lower())

    def add(self, entry: Entry) -> None:
        """An entry whose name was reserved; or one read at the start, in the place of any other of its name."""
        self._reserved.discard(entry.name.lower())
        self._entries[entry.name.lower()] = entry

    def remove(self, name: str) -> Entry | None:
        """Forgets a specialization; rows that answer with it go on. None where there is none of this name."""
        entry = self.get(name)
        return None if entry is None else self._entries.pop(name.lower())

    def directory(self, name: str) -> Path | None:
        """Where a specialization of this name is kept; None without a store. The name was checked."""
        return None if self.store is None else self.store / name


def check_new_name(name: str) -> None:
    """A name that a client or a directory gives."""
    try:
        check_name(name)
    except DataError as error:
        raise invalid(str(error), "name", "invalid_name") from error
    if name.lower() in (BASE, AUTO) or name.lower().startswith(AUTOMATIC):
        message = f"the name {name!r} is reserved: choose one that is not base, auto or auto-…"
        raise invalid(message, "name", "invalid_name")


@dataclass(frozen=True, eq=False)
class Served:
    """What a specialization must be like to be served.

    Attributes:
        fit: what it is like as one of the generator's.
        edge: the edge model's fingerprint.
        encoder: of the cloud model, to count a prompt's tokens.
        rank: of the factors that the server has room for; None for any.
    """

    fit: Fit
    edge: str
    encoder: Encoder
    rank: int | None = None

    @classmethod
    def of(cls, specializer: Specializer) -> "Served":
        """What a generator's own specializations are like."""
        pair = specializer.pair
        return cls(specializer.fit, pair.edge.fingerprint, pair.cloud.encoder)

    def entry(self, name: str, specialization: Specialization, automatic: bool = False) -> Entry:
        """A specialization to serve."""
        s = specialization
        if s.direct:
            problem, remedy = "it has factors instead of gates (direct generation)", "`lora-gen export --format merged`"
            raise CheckpointError(problem, field="specialization", code="direct", remedy=remedy)
        if (made_for := s.fingerprints["edge"]) != self.edge:
            problem = f"it was made for another edge model (fingerprint {made_for}, this server's is {self.edge})"
            remedy = "give the --checkpoint and --edge that it was made with"
            raise CheckpointError(problem, field="--edge", remedy=remedy)
        self.fit.check(s)
        tokens = len(self.encoder.prompt(s.prompt))
        if self.rank is not None and (rank := factor_rank(s.factors)) > self.rank:
            problem = f"a LoRA of rank {rank} stands beside its gates, and this server has room for rank {self.rank}"
            remedy = f"start it with --refined-rank {rank}, or refine the gates instead"
            raise CheckpointError(problem, field="--refined-rank", remedy=remedy)
        return Entry(name, s, s.gates(self.fit.experts), tokens, automatic)
