"""AutoCompressors (Chevalier et al., 2023): the edge model itself compresses a prompt into soft tokens.

In: the edge model's frozen weights, and prompts in its own ids. Out: `Generated`: a LoRA for the edge model and κ soft
tokens for each of a prompt's M segments, which stand in the edge's context where the prompt would.

Segment i is read as [soft tokens so far; the segment; κ summary tokens]; the final hidden states at the summary tokens
are the soft tokens it adds. The queries are the last segment. Positions follow the model's family, as published: with
rotations they go on over soft tokens, segment and summary tokens; learned ones (OPT) number a segment's own tokens from
0, and soft and summary tokens have none. Gradients flow within a substep of a few segments and
stop at its end. What is trained is the LoRA and the embeddings of the summary tokens, with two losses of equal weight:
the mean cross-entropy of the prompts' own tokens, and that of the answers.

Segments have fixed shapes, padded with -1 at the end, and cover every token of a prompt exactly once.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_gen_jax.adapters.lora import LoRA, trained_factors
from lora_gen_jax.config import CompressorConfig, Config, GeneratorConfig
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.flash import BLOCK
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.timing import timed
from lora_gen_jax.generator.cloud import PackedPrompts
from lora_gen_jax.generator.trained_module import Generated, TrainedModule
from lora_gen_jax.inference.edge_model import EdgeModel, Prefix
from lora_gen_jax.inference.prefix import compress, encode_soft, soft_positions
from lora_gen_jax.methods.answering import Ready, Setup, untrained
from lora_gen_jax.methods.lora import PUBLISHED, lora_sites
from lora_gen_jax.methods.method import Method, Prompt, Specialize, Traits, fixed, merge_if_possible
from lora_gen_jax.models import Pair
from lora_gen_jax.sharding import constrain
from lora_gen_jax.training.losses import mean_cross_entropy

if TYPE_CHECKING:
    from lora_gen_jax.training.checkpoint import Loaded


# A segment has this many tokens before any has more.
FEWEST = 2
# In training a segment's share of the rest is drawn between these, in 64ths: 0.5 to 1.5 of the average.
SMALLEST, LARGEST = 32, 96


class Segment(NamedTuple):
    """The same segment of P prompts, S slots each.

    Attributes:
        tokens_PS: ids; any behind the segment's end.
        length_P: how many of them are of the segment.
        next_PS: the token that follows each in the prompt.
        weight_PS: 1 where a token of the segment has such a successor, else 0.
    """

    tokens_PS: jax.Array
    length_P: jax.Array
    next_PS: jax.Array
    weight_PS: jax.Array


def random_shares(key: jax.Array, prompts: int, segments: int) -> jax.Array:
    """Shares of M segments for `segment_lengths`, [P, M]."""
    return jax.random.randint(key, (prompts, segments), SMALLEST, LARGEST + 1, jnp.int32)


def segment_lengths(tokens_P: jax.Array, shares_PM: jax.Array) -> jax.Array:
    """How P prompts of so many tokens are cut into M segments, [P, M] int32, each row summing to its tokens.

    Every segment has two tokens where the prompt has enough, earlier segments first where it has not; what is left is
    divided in proportion to `shares_PM` (positive integers, so that the sums are exact).
    """
    M = shares_PM.shape[1]
    least_PM = jnp.clip(tokens_P[:, None] - FEWEST * jnp.arange(M, dtype=jnp.int32)[None], 0, FEWEST)
    rest_P = jnp.maximum(tokens_P - FEWEST * M, 0)
    ends_PM = rest_P[:, None] * jnp.cumsum(shares_PM, axis=1) // jnp.sum(shares_PM, axis=1, keepdims=True)
    return least_PM + jnp.diff(ends_PM, axis=1, prepend=0)


def longest_segment(tokens: int, segments: int, even: bool) -> int:
    """The most tokens that `segment_lengths` can give one segment.

    Args:
        tokens: at most so many has the prompt.
        segments: M.
        even: all shares are the same; else they are random ones.
    """
    smallest, largest = (1, 1) if even else (SMALLEST, LARGEST)
    rest = max(tokens - FEWEST * segments, 0)
    return min(tokens, FEWEST) - (-rest * largest // (largest + smallest * (segments - 1)))


def take_segment(edge_PX: jax.Array, start_P: jax.Array, length_P: jax.Array, slots: int) -> Segment:
    """The tokens from `start_P` on, `length_P` of them, in S = `slots` slots."""
    offset_1S = jnp.arange(slots, dtype=jnp.int32)[None]
    at_PS = start_P[:, None] + offset_1S
    padded_PX = jnp.pad(edge_PX, ((0, 0), (0, 1)), constant_values=-1)

    def ids(at_PS: jax.Array) -> jax.Array:
        return jnp.take_along_axis(padded_PX, jnp.minimum(at_PS, edge_PX.shape[1]), axis=1)

    next_PS = ids(at_PS + 1)
    weight_PS = (offset_1S < length_P[:, None]) & (next_PS >= 0)
    return Segment(jnp.maximum(ids(at_PS), 0), length_P, jnp.maximum(next_PS, 0), weight_PS.astype(float))


def join(
    soft_PND: jax.Array, segment_PSD: jax.Array, length_P: jax.Array, summary_KD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[soft tokens; segment; summary tokens]: embeddings in the type of `segment_PSD`, positions, learned positions.

    A short segment's unused slots are padding, at position -1; its summary tokens follow its last token. Learned
    positions begin anew with each segment, and -1 says that soft and summary tokens have none.
    """
    (P, N, _), S, K = soft_PND.shape, segment_PSD.shape[1], summary_KD.shape[0]
    summary_PKD = jnp.broadcast_to(summary_KD[None], (P, *summary_KD.shape))
    parts = [soft_PND.astype(segment_PSD.dtype), segment_PSD, summary_PKD.astype(segment_PSD.dtype)]
    before_PN = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32)[None], (P, N))
    offset_1S = jnp.arange(S, dtype=jnp.int32)[None]
    own_PS = jnp.where(offset_1S < length_P[:, None], N + offset_1S, -1)
    behind_PK = N + length_P[:, None] + jnp.arange(K, dtype=jnp.int32)[None]
    positions_PT = jnp.concatenate([before_PN, own_PS, behind_PK], axis=1)
    bare_PN, bare_PK = jnp.full_like(before_PN, -1), jnp.full_like(behind_PK, -1)
    learned_PT = jnp.concatenate([bare_PN, jnp.maximum(own_PS - N, -1), bare_PK], axis=1)
    return jnp.concatenate(parts, axis=1), positions_PT, learned_PT


SITES = ("q", "k", "v", "o")


class AutoCompressor(TrainedModule):
    """The LoRA and the summary tokens' embeddings; called as `LoRAGen` is, with the edge model's frozen weights.

    Attributes:
        decoder: the model that compresses and answers.
        settings: rank, alpha, dropout and lora_sites.
        compressor: of the config.
        end_id: token whose embedding the summary tokens start from; small random ones without it.
    """

    decoder: Decoder
    settings: GeneratorConfig
    compressor: CompressorConfig
    end_id: int | None = None

    reader = "edge"

    @property
    def edge(self) -> DecoderConfig:
        return self.decoder.config

    @nn.compact
    def __call__(self, frozen: Any, prompts: PackedPrompts | None, train: bool = False) -> Generated:
        """The LoRA, soft tokens [P, κ·M, D] in fp32 and, with `train`, the loss "segments" in nats.

        Without prompts only the LoRA, for which no weights are needed. With `train` it needs the rng "dropout".

        Raises:
            ConfigError: when the prompts are not in the edge model's ids.
        """
        lora, summary_KD = self._lora(), self._summary(frozen)
        if prompts is None:
            return Generated(lora)
        if (edge_PX := prompts.edge_PX) is None:
            raise ConfigError(
                "data.edge_prompt_length is 0: the edge model has no prompt to compress; set it",
                field="data.edge_prompt_length",
            )
        # The learned embeddings are of the size of the model's own inputs, whatever those are scaled by.
        summary_KD = summary_KD * jnp.asarray(self.edge.embedding_scale, float)
        lengths_PM = self.lengths(edge_PX, train)
        (P, M), (K, D), read = lengths_PM.shape, summary_KD.shape, []
        starts_PM, soft_PND = jnp.cumsum(lengths_PM, axis=1) - lengths_PM, jnp.zeros((P, 0, D), float)
        for i in range(M):
            slots = self._slots(edge_PX.shape[1], i * K, train)
            segment = take_segment(edge_PX, starts_PM[:, i], lengths_PM[:, i], slots)
            embedded: Any = self._decoder().apply({"params": frozen}, segment.tokens_PS, method="embed")
            soft_PND = self._detached(soft_PND, i)
            row = join(soft_PND, embedded, segment.length_P, summary_KD)
            hidden_PTD = self._read(frozen, lora, row, train)
            read.append((hidden_PTD[:, i * K : i * K + slots], segment))
            soft_PND = jnp.concatenate([soft_PND, hidden_PTD[:, i * K + slots :].astype(float)], axis=1)
        losses = {"segments": self._loss(frozen, read)} if train else None
        return Generated(lora, soft_PND=self._detached(soft_PND, M), losses=losses)

    def auxiliary(self, generated: Generated, records: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        """The loss of the prompts' own tokens, with the weight of the answers'."""
        if generated.losses is None:
            return 0.0, {}
        loss = generated.losses["segments"]
        return loss, {"segment_loss": loss}

    def lengths(self, edge_PX: jax.Array, train: bool) -> jax.Array:
        """Tokens [P, M] of each prompt's segments: with `train` they are random (rng "dropout"), else even."""
        prompts, segments = edge_PX.shape[0], self.compressor.segments - 1
        shares_PM = jnp.ones((prompts, segments), jnp.int32)
        if train:
            shares_PM = random_shares(self.make_rng("dropout"), prompts, segments)
        return segment_lengths(jnp.sum(edge_PX >= 0, axis=1, dtype=jnp.int32), shares_PM)

    def positions(self, tokens: int, train: bool = False) -> int:
        """Positions that the edge model needs to compress a prompt of so many tokens."""
        segments = self.compressor.segments - 1
        soft = soft_positions(self.edge, self.compressor.summary_tokens * segments)
        return soft + longest_segment(tokens, segments, even=not train)

    def _slots(self, tokens: int, soft: int, train: bool) -> int:
        slots = longest_segment(tokens, self.compressor.segments - 1, even=not train)
        if self.decoder.attention != "splash":
            return slots
        # The TPU's flash kernel wants whole blocks.
        return slots + -(soft + slots + self.compressor.summary_tokens) % BLOCK

    def _detached(self, soft_PND: jax.Array, segment: int) -> jax.Array:
        """The soft tokens as segment number 0, 1, … reads them: without a gradient where it begins a substep."""
        return jax.lax.stop_gradient(soft_PND) if segment % self.compressor.substep == 0 else soft_PND

    def _read(self, frozen: Any, lora: LoRA, row: tuple[jax.Array, jax.Array, jax.Array], train: bool) -> jax.Array:
        """Final hidden states [P, T, D] of what `join` gave, in the compute type."""
        x_PTD, positions_PT, learned_PT = row
        hidden_PTD, _ = self._decoder().apply(
            {"params": frozen},
            x_PTD,
            positions_PT,
            segments_BT=(positions_PT >= 0).astype(jnp.int32),
            packed=True,
            adapter=lora,
            learned_BT=learned_PT,
            rngs={"dropout": self.make_rng("dropout")} if train and self.settings.dropout > 0 else {},
            method="encode",
        )
        return constrain(hidden_PTD, "batch", None, None)

    def _loss(self, frozen: Any, read: list[tuple[jax.Array, Segment]]) -> jax.Array:
        """Mean cross-entropy over all tokens of the prompts but their first ones.

        A segment's first token is predicted by the last one of the segment before.
        """
        hidden_PSD = jnp.concatenate([hidden for hidden, _ in read], axis=1)
        next_PS = jnp.concatenate([segment.next_PS for _, segment in read], axis=1)
        weight_PS = jnp.concatenate([segment.weight_PS for _, segment in read], axis=1)
        return mean_cross_entropy(self._decoder(), frozen, hidden_PSD, next_PS, weight_PS)

    def _decoder(self) -> Decoder:
        return self.decoder.clone(parent=None, name=None)

    def _summary(self, frozen: Any) -> jax.Array:
        def init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            if frozen is None or self.end_id is None:
                return nn.initializers.normal(0.02)(key, shape)
            row_D = frozen["embed"]["embedding"][self.end_id]
            return jnp.broadcast_to(row_D.astype(float)[None], shape)

        return self.param("summary_embedding", init, (self.compressor.summary_tokens, self.edge.width))

    def _lora(self) -> LoRA:
        s, sites = self.settings, lora_sites(self.edge, self.settings, SITES)
        return LoRA(trained_factors(self, self.edge, sites, s.rank), s.alpha / s.rank, s.dropout)


def soft_tokens(config: Config) -> int:
    """Soft tokens of a prompt."""
    return config.compressor.summary_tokens * (config.compressor.segments - 1)


def build(config: Config, pair: Pair) -> AutoCompressor:
    """The module of a config.

    Raises:
        ConfigError: when the longest prompt, or the longest query behind the soft tokens, exceeds the edge's positions.
    """
    edge, encoder = pair.edge.decoder, pair.edge.encoder
    end = None if encoder is None else encoder.end
    module = AutoCompressor(edge, config.generator, config.compressor, end)
    soft = soft_tokens(config)
    needed = {
        "data.edge_prompt_length": module.positions(config.data.edge_prompt_length, train=True),
        "data.query_length": soft_positions(edge.config, soft) + config.data.query_length,
    }
    for field, positions in needed.items():
        if positions > edge.config.max_positions:
            raise ConfigError(
                f"{field} with {soft} soft tokens needs {positions} positions, the edge model has"
                f" {edge.config.max_positions}",
                field=field,
                remedy=f"lower {field}" + " or compressor.summary_tokens" * (not edge.config.learned_positions),
            )
    return module


def specialize(config: Config, pair: Pair, loaded: "Loaded | None") -> Specialize:
    """From a prompt to the edge model with the LoRA merged and the prompt's soft tokens; without one, only the LoRA."""
    assert loaded is not None, "an AutoCompressor is trained"
    module, edge, plain = build(loaded.config, pair), pair.edge, fixed(build)(config, pair, loaded)

    def specialized(prompt: Prompt | None) -> EdgeModel:
        merged = plain(None)
        if prompt is None:
            return merged
        soft_ND = compress(module, loaded.variables, edge.params, edge.encoder.prompt(prompt.text))
        return merged.replace(prefix=encode_soft(merged, soft_ND))

    return specialized


def ready(setup: Setup) -> Ready:
    """The edge model compresses the instruction once; soft tokens stand before every query.

    Where the config is of another method, the instruction is one segment: it is shorter than those that the method's
    authors compress.
    """
    config = setup.config
    if config.method != METHOD.key:
        config = dataclasses.replace(config, compressor=dataclasses.replace(config.compressor, segments=2))
    module: Any = build(config, setup.pair)
    variables, edge, prompt = untrained(module, setup.pair), setup.pair.edge, setup.work.whole[: setup.work.kept]
    model = merge_if_possible(edge.plain, module.apply(variables, None, None).adapter)

    def read() -> Prefix:
        soft_ND = compress(module, variables, edge.params, prompt)
        return encode_soft(model, soft_ND)

    answering = model.replace(prefix=read())
    return setup.ready(setup.work.query, answering, once=lambda: {"compress": timed(lambda: read().cache)[1]})


METHOD = Method(
    key="autocompressor",
    title="AutoCompressors",
    traits=Traits(compresses_context=True, merged=False, training_free=True, transfers=False),
    build=build,
    specialize=specialize,
    depends_on_prompt=True,
    soft_tokens=soft_tokens,
    edge_prompts=True,
    ready=ready,
    published={
        "generator": PUBLISHED,
        "compressor": {"summary_tokens": 50},
        "data": {"edge_prompt_length": 1536},
    },
)
