"""What is evaluated: a model with everything that is merged into it, and what identifies its answers.

In: weights and how they came about. Out: a `EvaluatedModel`, whose identity finished requests are kept by.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import numpy as np

from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.prefix import soft_positions
from lora_gen_jax.models import Model, precision_of
from lora_gen_jax.training.checkpoint import versions


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """The model that is evaluated.

    Attributes:
        identity: 16 hex digits of everything that its answers depend on.
        edge: the model before anything is merged into it.
        make: what answers, called when a request is not answered yet; None for `edge` as it is.
        end_ids: ids that end a generated text.
        info: what results.json says about it.
        specialize: from a prompt to the subject specialized for it; None where no prompts are to be read.
        soft_tokens: that stand before everything it reads.
    """

    identity: str
    edge: Model
    make: Callable[[], EdgeModel] | None = None
    end_ids: tuple[int, ...] = ()
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    specialize: Callable[[str], "EvaluatedModel"] | None = None
    soft_tokens: int = 0

    @property
    def room(self) -> int:
        """Positions that are left for what it reads after soft tokens."""
        config = self.edge.config
        return config.max_positions - soft_positions(config, self.soft_tokens)

    @cached_property
    def model(self) -> EdgeModel:
        """The model that answers."""
        return self.edge.plain if self.make is None else self.make()


def identity_of(edge: Model, made: dict[str, Any]) -> str:
    """16 hex digits of an edge model and of how it was changed.

    Args:
        edge: the model before anything was merged.
        made: all that the merged weights depend on, as JSON holds it.
    """
    # Another version may tokenize, generate or merge otherwise.
    known = {**made, "edge": edge.fingerprint, "dtype": precision_of(edge), "versions": versions()}
    return digest_of(json.dumps(known | {"tokenizer": edge.encoder.digest}, sort_keys=True))


def digest_of(text: str) -> str:
    """16 hex digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_of(tree: Any) -> str:
    """16 hex digits of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda item: str(item[0])):
        value = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{value.shape}{value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()[:16]
