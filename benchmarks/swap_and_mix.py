"""What changing the specialization of a running model costs, and what many at once are worth.

In: nothing (a random pool and random gates beside the real weights). Out: milliseconds of a swap, by gates alone and
merged, beside streaming the FFN's weights once; then answers a second for 64 queries of 1 to 64 different
specializations, in one batch beside the unmerged weights, and merged one after another (the best of three); by turns.

Command:  python benchmarks/swap_and_mix.py [--model smollm2-135m] [--query-tokens 24] [--new-tokens 8]
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax import GeneratorConfig, load_config, load_params, merge, merge_over
from lora_gen_jax.adapters.merge import changed_sites, kernels_of, with_kernels
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.generator.lora_gen import ExpertPool, gated_adapter
from lora_gen_jax.generator.router import keep_top_k
from lora_gen_jax.inference.decode import GenerationSettings
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.inference.mixture import answer_all
from lora_gen_jax.inference.work import GenerationRequest

QUERIES, REPEATS = 64, 3


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, sorted, by turns; a first one, which compiles, is left out."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - began)
    return {name: sorted(values[1:]) for name, values in times.items()}


@functools.partial(jax.jit, donate_argnums=0)
def copied(targets: Any, kernels: Any) -> Any:
    """The kernels, layer by layer, into memory that is there: each weight is read and written once."""

    def body(layer: jax.Array, held: Any) -> Any:
        return {name: x.at[layer].set(kernels[name][layer] + 1) for name, x in held.items()}

    return jax.lax.fori_loop(0, len(next(iter(kernels.values()))), body, targets)


@functools.partial(jax.jit, donate_argnums=0)
def counted_up(kernels: Any) -> Any:
    """The same where reading and writing are the same memory."""
    return jax.tree.map(lambda x: x + 1, kernels)


def swaps(params: Any, adapter: Any) -> None:
    """Prints what a swap takes."""
    gates, turn = jax.tree.map(np.asarray, adapter.gates), itertools.count()
    sites = changed_sites(params, adapter.select(0))
    ffn, held = kernels_of(params, sites), merge(params, adapter.select(0))

    def by_gates() -> Any:
        prompt = next(turn) % QUERIES
        return adapter.with_gates(jax.tree.map(lambda x: jnp.asarray(x[:, [prompt]]), gates))

    # All of them write over the same memory: where it lies matters as much as what is done.
    def merged() -> Any:
        nonlocal held
        held = merge_over(held, params, by_gates())
        return held

    def streamed(stream: Callable[..., Any], *read: Any) -> Any:
        nonlocal held
        held = with_kernels(held, stream(kernels_of(held, sites), *read))
        return held

    runs = {
        "gates alone": by_gates,
        "merged": merged,
        "stream: read base, write": lambda: streamed(copied, ffn),
        "stream in place": lambda: streamed(counted_up),
    }
    runs["merge, keeping the base"] = lambda: merge(params, adapter.select(0))
    times = timed(runs, 21)
    print(f"FFN {sum(x.nbytes for x in ffn.values()) / 1e6:.0f} MB")
    print(f"{'ms':<28}{'best':>10}{'median':>10}")
    found = {name: np.array([values[0], values[len(values) // 2]]) * 1000 for name, values in times.items()}
    for name, (least, median) in found.items():
        print(f"{name:<28}{least:10.2f}{median:10.2f}")
    least, median = found["merged"] / found["stream: read base, write"]
    print(f"{'merged / stream':<28}{least:10.2f}{median:10.2f}", flush=True)


def mixtures(decoder: Decoder, params: Any, adapter: Any, args: argparse.Namespace) -> None:
    """Prints queries a second by number of specializations, as `generate --requests` answers them."""
    rng, gates = np.random.default_rng(0), [jax.tree.map(np.asarray, adapter.select(i).gates) for i in range(QUERIES)]
    gates = [jax.tree.map(lambda x: x[:, 0], one) for one in gates]
    queries = rng.integers(2, decoder.config.vocab_size, (QUERIES, args.query_tokens)).tolist()
    print(f"{QUERIES} queries of {args.query_tokens} tokens, {args.new_tokens} new tokens each; queries/s")
    print(f"{'specializations':>16}{'mixed':>10}{'merged':>10}{'ratio':>8}")
    for count in (1, 2, 4, 8, 16, 32, 64):
        works = [
            GenerationRequest(ids, GenerationSettings(args.new_tokens), gates[i % count])
            for i, ids in enumerate(queries)
        ]
        runs = {
            how: functools.partial(answer_all, EdgeModel(decoder, params, adapter), works, rows=QUERIES, how=how)
            for how in ("mixed", "merged")
        }
        rates = {name: QUERIES / values[0] for name, values in timed(runs, REPEATS).items()}
        ratio = rates["mixed"] / rates["merged"]
        print(f"{count:>16}{rates['mixed']:>10.1f}{rates['merged']:>10.1f}{ratio:>8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--query-tokens", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--swaps-only", action="store_true")
    args = parser.parse_args()
    config, settings, params = load_config(args.model), GeneratorConfig(), load_params(args.model)
    experts = ExpertPool(config.ffn_shapes, settings.num_experts, settings.rank)
    pool = experts.apply(experts.init(jax.random.key(0)))
    # Trained experts are small beside the weights; that B is not zero keeps anything from being left out.
    pool = jax.tree.map(lambda x: x + 0.001, pool)
    rng = np.random.default_rng(0)
    drawn_PLE = rng.random((QUERIES, config.num_layers, settings.num_experts), np.float32)
    adapter = gated_adapter(keep_top_k(jnp.asarray(drawn_PLE), settings.top_k), pool, settings)
    print(f"{args.model}, {jax.devices()[0].device_kind}, {len(jax.devices())} device(s), jax {jax.__version__}")
    swaps(params, adapter)
    if not args.swaps_only:
        mixtures(Decoder(config), params, adapter, args)


if __name__ == "__main__":
    main()
