"""Prompts in, specialisations out; and back from a specialisation to the generator that made it.

In: a checkpoint of method lora_gen, and texts. Out: `Specialization`s, or the checkpoint that holds the pool of one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.adapters.specialization import Specialization, load_specialization, sparse_tensors
from lora_gen_jax.adapters.specialization_fit import Fit, fitted_adapter, pool_fingerprint, pool_of
from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.data.record_rows import check_text
from lora_gen_jax.decoder.pretrained import fingerprint, load_config, resolve
from lora_gen_jax.errors import CheckpointError, ConfigError, DataError
from lora_gen_jax.files import is_directory
from lora_gen_jax.generator.lora_gen import gated_adapter
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.inference.buckets import bucket, power_of_two
from lora_gen_jax.inference.placement import mesh_of
from lora_gen_jax.models import Pair, load_pair, make_generator
from lora_gen_jax.sharding import evaluation_mesh
from lora_gen_jax.training.bucket import absolute, is_bucket
from lora_gen_jax.training.checkpoint import Loaded, check_models, load_checkpoint, versions
from lora_gen_jax.training.portable import DEFAULT, SHIPPED


class Specializer:
    """A generator with its two models: prompts in, specialisations out. Several threads may use it.

    Args:
        loaded: a checkpoint of method lora_gen.
        pair: the two models it was trained on; rows of a batch are split over the mesh that the cloud's weights lie on.

    Attributes:
        loaded: the checkpoint.
        config: of the run.
        pair: the models.
        limit: longest prompt in tokens of the cloud model.
        fit: what its specialisations are like.

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
        mesh = mesh_of(pair.cloud.params)
        # Once: a checkpoint's variables may be on the host.
        self._variables = jax.device_put(
            loaded.variables, None if mesh is None else NamedSharding(mesh, PartitionSpec())
        )
        self.fit = Fit.of(loaded.variables, self.config.generator, self.layers)
        self._fingerprints = {**loaded.fingerprints, "pool": self.fit.pool}
        place = absolute(loaded.path)
        self._checkpoint = None if place in [path.absolute() for path in SHIPPED.values()] else str(place)
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
            edge_weights: read the edge model's weights, too; specialising needs none of them.

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
        ids = self.pair.cloud.encoder.prompt(prompt)
        if len(ids) > self.limit:
            raise DataError(
                f"the prompt has {len(ids)} tokens, the limit is {self.limit}",
                field="prompt",
                code="too long",
                remedy="shorten it, or give fewer shots",
            )
        return ids

    def specialize(
        self, prompts: Sequence[str], progress: Callable[[int, int], None] | None = None, batch: int = 32
    ) -> list[Specialization]:
        """Reads every prompt once. Prompts of about the same length go together; each such group compiles once.

        Args:
            prompts: texts.
            progress: called with the number of prompts done and their total, after every batch.
            batch: prompts at a time, at most; fewer where they have more than `eval.batch_tokens` tokens together.

        Returns:
            a specialisation for each prompt, in their order.

        Raises:
            DataError: for a text in the place of the list, or as `ids`, before anything is computed; with several
                prompts it says which.
        """
        if isinstance(prompts, str):
            raise DataError(
                "prompts is one text, of which every letter would be a prompt",
                field="prompts",
                remedy="give a list of texts",
            )
        rows = [self._numbered_ids(prompts, i) for i in range(len(prompts))]
        made: dict[int, Specialization] = {}
        for chunk, size in self._chunks([len(row) for row in rows], batch):
            # As many as the group's other batches have; what fills up is dropped again.
            filled = [rows[i] for i in chunk] + [rows[chunk[0]]] * (size - len(chunk))
            generated = specialize(self._generator, self._variables, self.pair.cloud.params, filled, self.limit)
            for row, i in enumerate(chunk):
                made[i] = Specialization(
                    tensors=sparse_tensors(generated, self.config.generator, row),
                    fingerprints=self._fingerprints,
                    prompt=prompts[i],
                    checkpoint=self._checkpoint,
                    versions=self._versions,
                )
            if progress is not None:
                progress(len(made), len(prompts))
        return [made[i] for i in range(len(prompts))]

    def adapter(self, specialization: Specialization) -> Any:
        """The adapter of one prompt, for `merge`, `generate` and `score`.

        Raises:
            CheckpointError: for a specialisation of another generator.
        """
        self.fit.check(specialization)
        return fitted_adapter(specialization, self._variables, self.config.generator)

    def pool(self) -> GatedPool:
        """The expert pool as an adapter whose gates are zero, for an `Engine`; not of direct generation."""
        settings = self.config.generator
        zeros_PLE = jnp.zeros((1, self.layers, settings.num_experts))
        return gated_adapter(zeros_PLE, pool_of(self._variables), settings)

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
    directory: Path, checkpoint: Path | None, edge: str | None
) -> tuple[Specialization, Loaded, Config]:
    """As `read_specializations`, of one directory."""
    found, loaded, config = read_specializations([directory], checkpoint, edge)
    return found[directory], loaded, config


def read_specializations(
    directories: Sequence[Path], checkpoint: Path | None, edge: str | None
) -> tuple[dict[Path, Specialization], Loaded, Config]:
    """Specialisations of one generator, that generator, and its config with the edge model relocated.

    All that can be wrong is noticed here, before the edge model's weights are read.

    Args:
        directories: at least one, that `specialize` wrote.
        checkpoint: where the generator is; None for where it was, or the shipped one (`find_generator`).
        edge: where the edge model is, if not where it was when the generator was trained.

    Raises:
        CheckpointError: naming the directory that is damaged, does not fit the generator or is of another edge model;
            when no generator is found.
    """
    found = {directory: load_specialization(directory) for directory in dict.fromkeys(directories)}
    loaded = find_generator(next(iter(found.values())), checkpoint)
    config = relocate(loaded.config, None, edge)
    source = resolve(config.edge.source)
    fit, weights = Fit.of(loaded.variables, config.generator, load_config(source).num_layers), fingerprint(source)
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


def find_generator(specialization: Specialization, named: Path | None) -> Loaded:
    """The checkpoint with a specialisation's pool: the one named, else the one recorded when it was made, else the
    shipped generator that has this pool.

    Raises:
        CheckpointError: when none of them is there.
    """
    if named is not None:
        return load_checkpoint(named)
    recorded, reason = specialization.checkpoint, "none was recorded when it was made"
    if recorded is not None:
        reason = f"the one recorded when it was made ({recorded[:200]}) is gone"
        if is_bucket(recorded) or is_directory(Path(recorded)):
            try:
                return load_checkpoint(recorded)
            except (CheckpointError, ConfigError) as error:
                reason = f"the one recorded when it was made cannot be used ({error})"
    for path in SHIPPED.values():
        loaded = load_checkpoint(path)
        if pool_fingerprint(loaded.variables) == specialization.fingerprints["pool"]:
            return loaded
    raise CheckpointError(
        f"the expert pool of this specialization was not found: no --checkpoint was given, {reason}, and no shipped"
        " generator has that pool",
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
