"""Prompts in, specializations out; and back from a specialization to the generator that made it.

In: a checkpoint of method lora_gen, and texts. Out: `Specialization`s, or the checkpoint that holds the pool of one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.specialization import Specialization, load_specialization, sparse_tensors
from lora_gen_jax.adapters.specialization_fit import Fit, check_pool, fitted_adapter, pool_fingerprint, pool_of
from lora_gen_jax.buckets import bucket, power_of_two
from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.data.record_rows import check_text
from lora_gen_jax.data.tasks import Example
from lora_gen_jax.decoder.pretrained import fingerprint, load_config, resolve
from lora_gen_jax.errors import CheckpointError, ConfigError, DataError
from lora_gen_jax.files import is_directory
from lora_gen_jax.generator.lora_gen import gated_adapter
from lora_gen_jax.generator.router import gates_of
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.hub import HUB_ID, name_of
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import Model, Pair, check_variables, load_pair
from lora_gen_jax.placement import mesh_of
from lora_gen_jax.sharding import evaluation_mesh
from lora_gen_jax.specialization.apply import Before, check_refinable, learning_model, logits_of, refine_all
from lora_gen_jax.specialization.prompt import Prompt, pairs_of, solved
from lora_gen_jax.specialization.rows import ExampleIds
from lora_gen_jax.specialization.settings import Kind, RefineConfig
from lora_gen_jax.training.bucket import absolute, is_bucket
from lora_gen_jax.training.checkpoint import Loaded, check_models, load_checkpoint, versions
from lora_gen_jax.training.portable import DEFAULT, SHIPPED
from lora_gen_jax.training.published import cached_generator
from lora_gen_jax.untrusted import check_tensors


class Specializer:
    """A generator with its two models: prompts in, specializations out. Several threads may use it.

    Args:
        loaded: a checkpoint of method lora_gen.
        pair: the two models it was trained on; rows of a batch are split over the mesh that the cloud's weights lie on.

    Attributes:
        loaded: the checkpoint.
        config: of the run.
        pair: the models.
        limit: longest prompt in tokens of the cloud model.
        fit: what its specializations are like.

    Raises:
        CheckpointError: for a checkpoint of another method, or of other models.
    """

    def __init__(self, loaded: Loaded, pair: Pair):
        _check_makes_gates(loaded)
        check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
        self.loaded, self.config, self.pair = loaded, loaded.config, pair
        self.layers = pair.edge.config.num_layers
        self.limit = pair.prompt_room(self.config.eval.prompt_limit)
        self._generator = make_generator(self.config, pair)
        check_variables(loaded, self._generator, pair)
        mesh = mesh_of(pair.cloud.params)
        # Once: a checkpoint's variables may be on the host.
        self._variables = jax.device_put(
            loaded.variables, None if mesh is None else NamedSharding(mesh, PartitionSpec())
        )
        self.fit = Fit.of(loaded.variables, self.config.generator, self.layers)
        self._fingerprints = {**loaded.fingerprints, "pool": self.fit.pool}
        place = absolute(loaded.path)
        shipped = place in [path.absolute() for path in SHIPPED.values()]
        self._checkpoint = None if shipped else name_of(place) or str(place)
        self._versions = versions()

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | None = None,
        cloud: str | None = None,
        edge: str | None = None,
        mesh: Mesh | None = None,
        edge_weights: bool = True,
    ) -> "Specializer":
        """Reads a checkpoint (the shipped generator, if none is named) and its two models.

        Args:
            checkpoint: what `load_checkpoint` takes, or None.
            cloud, edge: where the models are, if not where they were when the generator was trained.
            mesh: that the models' weights are put on; left out, this process's accelerators, spread over as many of
                them as in training (one device on a CPU).
            edge_weights: read the edge model's weights, too; specializing needs none of them.

        Raises:
            CheckpointError: when there is no checkpoint, or it is damaged, of another method or of other models.
            ModelError: when a model cannot be read.
        """
        return cls.of(load_checkpoint(checkpoint or DEFAULT), cloud, edge, mesh, edge_weights)

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        cloud: str | None = None,
        edge: str | None = None,
        mesh: Mesh | None = None,
        edge_weights: bool = True,
    ) -> "Specializer":
        """As `load`, of a checkpoint that was read already."""
        _check_makes_gates(loaded)  # before any model is read
        loaded = dataclasses.replace(loaded, config=relocate(loaded.config, cloud, edge))
        mesh = evaluation_mesh(loaded.config.mesh.fsdp) if mesh is None else mesh
        return cls(loaded, load_pair(loaded.config, mesh, edge_weights))

    def ids(self, prompt: str) -> list[int]:
        """The cloud model's ids of a prompt.

        Raises:
            DataError: when it is empty or longer than `limit`.
        """
        check_text(prompt, "prompt")
        if not prompt.strip():
            raise DataError(
                "the prompt is empty", field="prompt", code="empty", remedy="give a description, examples, or both"
            )
        encoder = self.pair.cloud.encoder
        if encoder.exceeds(len(prompt), self.limit):
            raise DataError(
                f"the prompt has {len(prompt)} characters, more than {self.limit} tokens can have",
                field="prompt",
                code="too long",
                remedy="shorten it, or give fewer shots",
            )
        ids = encoder.prompt(prompt)
        if len(ids) > self.limit:
            raise DataError(
                f"the prompt has {len(ids)} tokens, the limit is {self.limit}",
                field="prompt",
                code="too long",
                remedy="shorten it, or give fewer shots",
            )
        return ids

    def specialize(
        self,
        prompts: Sequence[str | Prompt],
        progress: Callable[[int, int], None] | None = None,
        batch: int = 32,
        refine: RefineConfig | None = None,
    ) -> list[Specialization]:
        """Reads every prompt once. Prompts of about the same length go together; each such group compiles once.

        Args:
            prompts: texts, or `Prompt`s, whose examples are read as shots. Where not all of a prompt's examples fit the
                limit, the first that do are read.
            progress: called with the number of prompts done and their total, after every batch.
            batch: prompts at a time, at most; fewer where they have more than `eval.batch_tokens` tokens together.
            refine: after reading, steps on the examples of those prompts that have some.

        Returns:
            a specialization for each prompt, in their order.

        Raises:
            DataError: for a text in the place of the list, or as `ids`, before anything is computed; with several
                prompts it says which. With `refine`, as `check_examples`.
            ConfigError: with `refine`, for a generator without gates, or without the edge model's weights.
        """
        if isinstance(prompts, str):
            raise DataError(
                "prompts is one text, of which every letter would be a prompt",
                field="prompts",
                remedy="give a list of texts",
            )
        texts = [prompt if isinstance(prompt, str) else prompt.text(self.fits) for prompt in prompts]
        rows = [self._numbered_ids(texts, i) for i in range(len(texts))]
        pairs = [] if refine is None else [self._pairs(prompt) for prompt in prompts]
        learning = [i for i, own in enumerate(pairs) if own]
        if refine is not None and learning:
            check_refinable(self.pair.edge, self.config.generator, [pairs[i] for i in learning])
        made: dict[int, Specialization] = {}
        logits: dict[int, np.ndarray] = {}
        for chunk, size in self._chunks([len(row) for row in rows], batch):
            # As many as the group's other batches have; what fills up is dropped again.
            filled = [rows[i] for i in chunk] + [rows[chunk[0]]] * (size - len(chunk))
            generated = specialize(self._generator, self._variables, self.pair.cloud.params, filled, self.limit)
            for row, i in enumerate(chunk):
                made[i] = self._made(texts[i], sparse_tensors(generated, self.config.generator, row))
                if i in learning:
                    logits[i] = np.asarray(generated.logits_PLE[row])
            if progress is not None and not learning:
                progress(len(made), len(prompts))
        if refine is not None and learning:
            before = [Before(made[i], logits[i], pairs[i]) for i in learning]
            done = refine_all(self._learner, self.pool(), self.config.generator, before, refine, progress)
            made |= dict(zip(learning, done, strict=True))
        return [made[i] for i in range(len(prompts))]

    def refine(
        self,
        specialization: Specialization,
        examples: Sequence[tuple[str, str] | Example],
        refine: RefineConfig | None = None,
        chat: bool = False,
    ) -> Specialization:
        """Steps on examples, from a specialization of this generator on.

        For gates of which few are chosen, the cloud reads its prompt again: the file does not tell how near the other
        experts were.

        Args:
            specialization: read, or refined before.
            examples: (input, output) pairs.
            refine: how; as `refinement` says where left out.
            chat: the edge model will be asked in its chat template.

        Raises:
            CheckpointError: for a specialization of another generator.
            DataError, ConfigError: as `specialize` with `refine`.
        """
        self.fit.check(specialization)
        config, settings = refine or self.refinement(), self.config.generator
        pairs = pairs_of(self.pair.edge.encoder, solved(examples), chat)
        check_refinable(self.pair.edge, settings, [pairs])
        logits_LE = None
        if config.trains_gates:
            read_LE = None
            if settings.active_experts < settings.num_experts:
                ids, cloud = [self.ids(specialization.prompt)], self.pair.cloud.params
                generated = specialize(self._generator, self._variables, cloud, ids, self.limit)
                read_LE = np.asarray(generated.logits_PLE[0])
            logits_LE = logits_of(specialization.gates(settings.num_experts).dense(), read_LE, settings)
        before = Before(specialization, logits_LE, pairs)
        return refine_all(self._learner, self.pool(), settings, [before], config)[0]

    def refinement(self, kind: Kind | None = None, steps: int | None = None) -> RefineConfig:
        """How this generator's specializations learn: as its config has it, `eval.refine` or `eval.refine_lora`.

        Args:
            kind: gates, lora or both; gates where left out.
            steps: at most so many; as the config says where left out.

        Raises:
            ConfigError: for a number of steps that cannot be.
        """
        config = self.config.eval.refining(kind or "gates")
        return config if steps is None else dataclasses.replace(config, steps=steps)

    def fits(self, text: str) -> bool:
        """Whether a prompt is within the limit."""
        encoder = self.pair.cloud.encoder
        return not encoder.exceeds(len(text), self.limit) and len(encoder.prompt(text)) <= self.limit

    @cached_property
    def _learner(self) -> Model:
        return learning_model(self.pair.edge, self.config.edge)

    def _pairs(self, prompt: str | Prompt) -> list[ExampleIds]:
        return [] if isinstance(prompt, str) else pairs_of(self.pair.edge.encoder, prompt.shots, prompt.chat)

    def _made(self, text: str, tensors: dict[str, np.ndarray]) -> Specialization:
        check_tensors(tensors, None, "the specialization that was made")
        return Specialization(tensors, self._fingerprints, text, self._checkpoint, self._versions)

    def adapter(self, specialization: Specialization) -> Any:
        """The adapter of one prompt, for `merge`, `generate` and `score`.

        Raises:
            CheckpointError: for a specialization of another generator.
        """
        self.fit.check(specialization)
        return fitted_adapter(specialization, self._variables, self.config.generator)

    def pool(self) -> GatedPool:
        """The expert pool as an adapter whose gates do not matter, for an `Engine`; not of direct generation."""
        settings = self.config.generator
        even_PLE = jnp.zeros((1, self.layers, settings.num_experts))
        gates = gates_of(even_PLE, settings.routing, settings.top_k, settings.temperature)
        return gated_adapter(gates, pool_of(self._variables), settings)

    def _numbered_ids(self, prompts: Sequence[str], i: int) -> list[int]:
        try:
            return self.ids(prompts[i])
        except DataError as error:
            if len(prompts) == 1:
                raise
            raise error.within(f"prompt {i + 1} of {len(prompts)}") from error

    def _chunks(self, lengths: list[int], batch: int) -> list[tuple[list[int], int]]:
        """(prompts of one batch, the number of rows they are filled up to); of one padded length, of similar ones."""
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            groups.setdefault(bucket(length + self.layers), []).append(i)
        chunks = []
        for padded, group in sorted(groups.items()):
            most = max(1, min(batch, self.config.eval.batch_tokens // padded))
            # A power of two, as `specialize` pads to: downwards, so that neither limit is passed.
            size = min(power_of_two(len(group)), power_of_two(most + 1) // 2)
            chunks += [(group[start : start + size], size) for start in range(0, len(group), size)]
        return chunks


def read_specialization(
    directory: Path, checkpoint: Path | None, edge: str | None, follow_remote: bool = False
) -> tuple[Specialization, Loaded, Config]:
    """As `read_specializations`, of one directory."""
    found, loaded, config = read_specializations([directory], checkpoint, edge, follow_remote)
    return found[directory], loaded, config


def read_specializations(
    directories: Sequence[Path], checkpoint: Path | None, edge: str | None, follow_remote: bool = False
) -> tuple[dict[Path, Specialization], Loaded, Config]:
    """Specializations of one generator, that generator, and its config with the edge model relocated.

    All that can be wrong is noticed here, before the edge model's weights are read.

    Args:
        directories: at least one, that `specialize` wrote.
        checkpoint: where the generator is; None for the shipped one, or where it was (`find_generator`).
        edge: where the edge model is, if not where it was when the generator was trained.
        follow_remote: as of `find_generator`.

    Raises:
        CheckpointError: naming the directory that is damaged, does not fit the generator or is of another edge model;
            when no generator is found.
    """
    found = {directory: load_specialization(directory) for directory in dict.fromkeys(directories)}
    loaded = find_generator(next(iter(found.values())), checkpoint, follow_remote)
    config = relocate(loaded.config, None, edge)
    source = resolve(config.edge.source)
    edge_config = load_config(source)
    check_pool(loaded.variables, config.generator, edge_config, str(loaded.path))
    fit, weights = Fit.of(loaded.variables, config.generator, edge_config.num_layers), fingerprint(source)
    for directory, specialization in found.items():
        try:
            fit.check(specialization)
        except CheckpointError as error:
            raise error.within(f"{directory}, with the generator {loaded.path}") from error
        if specialization.fingerprints["edge"] != weights:
            raise CheckpointError(
                f"{directory} was made for another edge model (fingerprint {specialization.fingerprints['edge']})"
                f" than {config.edge.source} ({weights})",
                field="--edge",
                remedy="give the one that it was made for (--edge)",
            )
    return found, loaded, config


def find_generator(specialization: Specialization, named: Path | None, follow_remote: bool = False) -> Loaded:
    """The checkpoint with a specialization's pool: the one named, else the shipped generator that has this pool, else
    the one recorded when it was made.

    Args:
        specialization: whose author may be anyone: the address it records is opened only on this machine, in the
            cache of the Hugging Face hub, too.
        named: by the user.
        follow_remote: open a recorded address in a bucket or on the hub, too, with the user's own credentials.

    Raises:
        CheckpointError: when none of them is there, or has the pool.
    """
    if named is not None:
        return load_checkpoint(named)
    pool = specialization.fingerprints["pool"]
    for path in SHIPPED.values():
        loaded = load_checkpoint(path)
        if pool_fingerprint(loaded.variables) == pool:
            return loaded
    recorded, reason = specialization.checkpoint, "none was recorded when it was made"
    if recorded is not None:
        at = recorded[:200]
        reason = f"the one recorded when it was made ({at}) is gone"
        remote = "://" in recorded or is_bucket(recorded)
        on_hub = not remote and HUB_ID.fullmatch(recorded) is not None and not is_directory(Path(recorded))
        place: str | Path | None = recorded
        if (remote or on_hub) and not follow_remote:
            # What is in the hub's cache is on this machine already.
            place = cached_generator(recorded) if on_hub else None
        if place is None:
            reason = f"the address recorded when it was made ({at}) is not opened without --trust-recorded"
        elif remote or on_hub or is_directory(Path(recorded)):
            try:
                loaded = load_checkpoint(place)
                if (found := pool_fingerprint(loaded.variables)) == pool:
                    return loaded
                reason = f"the one recorded when it was made ({at}) has another pool (fingerprint {found}, not {pool})"
            except (CheckpointError, ConfigError) as error:
                reason = f"the one recorded when it was made cannot be used ({error})"
    raise CheckpointError(
        f"the expert pool of this specialization was not found: no --checkpoint was given, no shipped generator has"
        f" that pool, and {reason}",
        field="--checkpoint",
        remedy="Give --checkpoint DIR",
    )


def relocate(config: Config, cloud: str | None, edge: str | None) -> Config:
    """The config with its models read from elsewhere."""

    def at(model: ModelConfig, source: str | None) -> ModelConfig:
        return model if source is None else dataclasses.replace(model, source=source)

    return dataclasses.replace(config, cloud=at(config.cloud, cloud), edge=at(config.edge, edge))


def _check_makes_gates(loaded: Loaded) -> None:
    if loaded.config.method != "lora_gen":
        raise CheckpointError(
            f"{loaded.path} was trained with method {loaded.config.method}, which makes no gates of a prompt",
            field="method",
            remedy="give a checkpoint of method lora_gen",
        )
