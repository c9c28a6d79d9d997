"""What an accelerator does with this package's programs, in one run: how fast they are, and how exact.

In: a config; its models get random weights, made on the devices, so nothing is downloaded. Out: accelerator.json and
accelerator.md in a directory, written anew after every measurement. What fails, for want of memory for instance, is
noted there with its error, and the next measurement begins.

    train_step       the config's training step, for each of --weights
    specialise       one prompt of data.cloud_length tokens to merged weights; to an adapter where the edge is quantized
    prefill, decode  of the specialized edge model
    decode mixed     the same step where every row has its own specialization, unmerged
    attention        each kernel that the platform has, forward and backward; its error against float32
    product          of bf16, int8 and nf4 weights; its error against float32
    logits           of the edge model in its compute type against float32, the same weights in both

MFU is model flops (no recomputation) over the published dense bf16 rate; "of matmul" is over the rate that a large
square product reaches here. One fsdp axis over all devices takes the place of the config's mesh.

Command:  python benchmarks/accelerator.py configs/tinyllama_1b.py --out OUT [--any.field VALUE]
On a CPU: python benchmarks/accelerator.py configs/quickstart.py --out OUT --input-tokens 32 --cache-slots 64
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.adapters.gated_pool import GatedPool
from lora_gen_jax.config import Config, MeshConfig
from lora_gen_jax.config_file import flags_and_config
from lora_gen_jax.data.groups import Group
from lora_gen_jax.data.pipeline import Batch, pack_groups
from lora_gen_jax.decoder.attention import KVCache, attend, visible
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.flash import fits_flash, flash_attention
from lora_gen_jax.decoder.quantized import FORMATS, dequantize, quantize, quantized_product
from lora_gen_jax.errors import ConfigError, LoraGenError
from lora_gen_jax.evaluation.sheet import Sheet, to_markdown
from lora_gen_jax.evaluation.timing import timed
from lora_gen_jax.files import check_output
from lora_gen_jax.generator.cloud import pack_prompts
from lora_gen_jax.generator.lora_gen import ExpertPool, gated_adapter
from lora_gen_jax.generator.router import gates_of
from lora_gen_jax.inference.edge_model import forward_only
from lora_gen_jax.lab.tpu import programs
from lora_gen_jax.lab.tpu.formulas import model_flops
from lora_gen_jax.lab.tpu.topology import CHIPS
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import Pair
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.bench import matmul_rate
from lora_gen_jax.training.fit import fitted
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.step import init_state

KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
# NVIDIA's data sheets: dense bf16 flops a second of the SXM form (half of the figure "with sparsity").
GPUS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
KERNELS = {"cpu": ("grouped", "xla"), "gpu": ("grouped", "xla", "cudnn"), "tpu": ("xla", "splash")}
Measure = Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class AcceleratorFlags:
    """Measures this machine's accelerator."""

    out: Path | None = None
    """Directory for accelerator.json and accelerator.md."""
    weights: str = "bfloat16,int8"
    """How the frozen weights are stored, separated by commas: bfloat16, int8, nf4."""
    only: str = ""
    """Measure only what begins with one of these names, separated by commas."""
    devices: int | None = None
    """Of this machine, the first so many; left out, all."""
    repeats: int = 5
    """Timed calls of each program, after one that compiles; the median counts."""
    rows: int = 8
    """Sequences a device in prefill and decode."""
    mixed_rows: int = 64
    """Sequences a device in the mixed batch, each with its own specialization."""
    input_tokens: int = 512
    """Tokens of a sequence that prefill reads."""
    cache_slots: int = 1024
    """Slots of the cache that decode reads, all of them filled."""


def peak_flops(kind: str) -> float | None:
    """Published bf16 flops a second of a device; None where they are not known."""
    if kind in KINDS:
        return CHIPS[KINDS[kind]].flops
    return next((flops for name, flops in GPUS.items() if name in kind), None)


def filled(shapes: Any) -> Any:
    """Arrays for shapes with shardings, made where they will lie: small normal floats, and any codes."""

    def leaf(number: int, x: jax.ShapeDtypeStruct) -> jax.Array:
        return _drawing(x.shape, x.dtype, x.sharding)(jax.random.key(number))

    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [leaf(i, x) for i, x in enumerate(leaves)])


@functools.lru_cache(maxsize=64)
def _drawing(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    def draw(key: jax.Array) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.integer):
            return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)
        least, most = (0, 16) if dtype == jnp.uint4 else (-127, 128)
        return jax.random.randint(key, shape, least, most, jnp.int8).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def placed(values: Any, shapes: Any) -> Any:
    """Host arrays where the shapes say."""
    return jax.tree.map(lambda x, s: jax.device_put(np.asarray(x, s.dtype), s.sharding), values, shapes)


def full_batch(config: Config, pair: Pair) -> Batch:
    """A training batch of random tokens with next to no padding."""
    data, cloud, edge = config.data, pair.cloud.config, pair.edge.config
    rng, Q = np.random.default_rng(1), data.queries_per_prompt

    def ids(vocab: int, count: int) -> list[int]:
        return rng.integers(0, vocab, count).tolist()

    def queries(length: int) -> list[tuple[list[int], list[int]]]:
        """Q queries that share a row of this many tokens; a response's last token is not among them."""
        answer = max(1, min(data.response_slots, length) // Q)
        return [(ids(edge.vocab_size, length // Q - answer + 1), ids(edge.vocab_size, answer)) for _ in range(Q)]

    prompt = data.cloud_length // data.prompts_per_row - edge.num_layers
    groups = [
        Group(
            "",
            (),
            ids(cloud.vocab_size, prompt),
            queries(data.edge_length),
            task=number,
            edge_prompt=ids(edge.vocab_size, data.edge_prompt_length),
            shot_queries=queries(data.shot_length) if data.shot_length else [],
        )
        for number in range(data.prompts_per_step)
    ]
    return pack_groups(groups, data, edge.num_layers)


def times_of(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, after a first one."""
    return [timed(call)[1] for _ in range(repeats + 1)][1:]


class Runner:
    """Measures one config on all devices of this process."""

    def __init__(self, config: Config, flags: AcceleratorFlags):
        self.config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1))
        self.flags, self.devices = flags, jax.devices()[: flags.devices]
        self.sizes = programs.Sizes(flags.rows, flags.input_tokens, flags.cache_slots)
        self.peak = peak_flops(self.devices[0].device_kind)
        self.rate = 2.0 * matmul_rate(
            size=2048 if jax.default_backend() == "cpu" else 8192,
            dtype=self._pair("bfloat16").edge.decoder.dtype,
        )

    def _pair(self, weights: str) -> Pair:
        stored = weights if weights in FORMATS else "auto"
        models = {name: dataclasses.replace(getattr(self.config, name), weights=stored) for name in ("cloud", "edge")}
        return programs.shapes_pair(dataclasses.replace(self.config, **models), jax.default_backend())

    def measurements(self) -> dict[str, Measure]:
        """By name, in the order in which they run."""
        found: dict[str, Measure] = {}
        for weights in self.flags.weights.split(","):
            for name in programs.NAMES:
                found[f"{name} {weights}"] = functools.partial(self.program, name, weights)
        found["decode as many rows as mixed"] = functools.partial(self.mixed, False)
        found["decode mixed"] = functools.partial(self.mixed, True)
        for kernel in KERNELS[jax.default_backend()]:
            found[f"attention {kernel}"] = functools.partial(self.attention, kernel)
        for weights in ("bfloat16", *FORMATS):
            found[f"product {weights}"] = functools.partial(self.product, weights)
        found["logits"] = self.logits
        return found

    def program(self, name: str, weights: str) -> dict[str, Any]:
        """One of `programs.NAMES`."""
        config, pair = self.config, self._pair(weights)
        mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=self.devices)
        kept, layers = None, pair.edge.config.num_layers
        if name == "train_step":
            pair, kept = fitted(config, pair, mesh, programs.batch_shapes(config, layers))
        (program,) = programs.build(config, pair, self.devices, (name,), self.sizes)
        tokens = {
            "train_step": config.data.prompts_per_step * (config.data.cloud_length + config.data.edge_length),
            "specialise": config.data.cloud_length,
            "prefill": self.sizes.rows * self.sizes.tokens * len(self.devices),
            "decode": self.sizes.rows * len(self.devices),
        }[name]
        flops = model_flops(name, config, pair, self.sizes, len(self.devices))
        with jax.set_mesh(program.mesh):
            found = self._run(program, self._arguments(name, pair, program.arguments))
        return found | self._rates(found["seconds"], flops, tokens) | ({} if kept is None else {"kept": kept})

    def mixed(self, apart: bool) -> dict[str, Any]:
        """Decoding where every row has its own specialization, or with as many rows of one."""
        pair = self._pair("bfloat16")
        sizes = dataclasses.replace(self.sizes, rows=self.flags.mixed_rows)
        mesh, rows = make_mesh(devices=self.devices), self.flags.mixed_rows * len(self.devices)
        adapter = jax.jit(self._adapter, static_argnums=(0, 1))(pair.edge.config, rows) if apart else None
        program = programs.decode(pair, mesh, sizes, jax.eval_shape(lambda: adapter))
        with jax.set_mesh(mesh):
            *arguments, _ = self._arguments("decode", pair, program.arguments)
            found = self._run(program, (*arguments, placed(adapter, program.arguments[4])))
        flops = model_flops("decode", self.config, pair, sizes, len(self.devices))
        return found | self._rates(found["seconds"], flops, rows)

    def _adapter(self, edge: DecoderConfig, rows: int) -> GatedPool:
        """Of as many prompts as rows, each with experts of its own choice."""
        s = self.config.generator
        layers = edge.num_layers if s.pool == "per_layer" else None
        experts = ExpertPool(edge.ffn_shapes, s.num_experts, s.rank, layers)
        pool_key, gates_key = jax.random.split(jax.random.key(0))
        logits_PLE = jax.random.normal(gates_key, (rows, edge.num_layers, s.num_experts))
        gates = gates_of(logits_PLE, s.routing, s.top_k, s.temperature)
        return gated_adapter(gates, experts.apply(experts.init(pool_key)), s)

    def attention(self, kernel: str) -> dict[str, Any]:
        """One layer's attention over the cloud's rows, two queries' worth of segments each."""
        model = self._pair("bfloat16").cloud
        c, dtype, T = model.config, model.decoder.dtype, self.config.data.cloud_length
        if kernel == "splash" and not fits_flash(T, c):
            raise ConfigError(f"rows of {T} slots are not whole blocks", field="data.cloud_length")
        keys = jax.random.split(jax.random.key(0), 4)
        heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads, c.num_heads)
        q, k, v, w = (jax.random.normal(key, (2, T, n, c.head_dim)) for key, n in zip(keys, heads, strict=True))
        half = jnp.arange(T, dtype=jnp.int32) // ((T + 1) // 2)
        segments = jnp.broadcast_to(half + 1, (2, T))
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) - half * ((T + 1) // 2), (2, T))
        mask = visible(positions, positions, (segments, segments))

        def run(kernel: str, q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array) -> Any:
            def weighed(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
                if kernel == "splash":
                    y = flash_attention(q, k, v, segments, c)
                else:
                    y = attend(q, [(k, v)], mask, c, kernel)
                return jnp.sum(y.astype(jnp.float32) * w.astype(jnp.float32)), y

            gradients, y = jax.grad(weighed, argnums=(0, 1, 2), has_aux=True)(q, k, v)
            return y, gradients

        both = jax.jit(run, static_argnums=0)
        rounded = tuple(x.astype(dtype) for x in (q, k, v, w))
        y, gradients = both(kernel, *rounded)
        with jax.default_matmul_precision("highest"):
            y32, gradients32 = both("grouped", *(x.astype(jnp.float32) for x in rounded))
        seconds = statistics.median(times_of(lambda: both(kernel, *rounded), self.flags.repeats))
        return {
            "seconds": seconds,
            "error": relative(y, y32),
            "gradient_error": max(relative(a, b) for a, b in zip(gradients, gradients32, strict=True)),
        }

    def product(self, weights: str) -> dict[str, Any]:
        """A row of the cloud times its largest matrix; the error includes that of the codes."""
        model = self._pair("bfloat16").cloud
        dtype, (inputs, outputs) = model.decoder.dtype, model.config.site_shape("down")
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (self.config.data.cloud_length, inputs), dtype)
        w = jax.random.normal(keys[1], (inputs, outputs)) * inputs**-0.5
        with jax.default_matmul_precision("highest"):
            exact = x.astype(jnp.float32) @ w
            stored: tuple[jax.Array, ...] = (w.astype(dtype),)
            held = stored[0].astype(jnp.float32)
            if weights in FORMATS:
                codes = quantize(w, weights)
                stored, held = (codes["kernel"], codes["scales"]), dequantize(codes["kernel"], codes["scales"])
            of_codes = x.astype(jnp.float32) @ held
        multiply = jax.jit(quantized_product if weights in FORMATS else jnp.matmul)
        y = multiply(x, *stored)
        seconds = statistics.median(times_of(lambda: multiply(x, *stored), self.flags.repeats))
        flops = 2.0 * len(x) * inputs * outputs
        rates = self._rates(seconds, flops, len(x), devices=1)
        return {"seconds": seconds, "error": relative(y, exact), "kernel_error": relative(y, of_codes), **rates}

    def logits(self) -> dict[str, Any]:
        """The edge model's logits in its compute type against float32, the same weights in both."""
        pair = self._pair("bfloat16")
        decoder, mesh = forward_only(pair.edge.decoder), make_mesh(devices=self.devices)
        exact = decoder.clone(dtype=jnp.float32, attention="grouped", operands=None)
        with jax.set_mesh(mesh):
            params = filled(programs.on(mesh, pair.edge.params))
            tokens = jax.random.randint(
                jax.random.key(1), (len(self.devices), self.sizes.tokens), 0, decoder.config.vocab_size, jnp.int32
            )

            def of(decoder: Any, params: Any) -> jax.Array:
                hidden, _ = decoder.apply({"params": params}, tokens)
                return decoder.apply({"params": params}, hidden, method="logits").astype(jnp.float32)

            got = jax.jit(of, static_argnums=0)(decoder, params)
            with jax.default_matmul_precision("highest"):
                wanted = jax.jit(of, static_argnums=0)(exact, jax.tree.map(lambda x: x.astype(jnp.float32), params))
            same = jnp.mean(jnp.argmax(got, -1) == jnp.argmax(wanted, -1))
        return {"error": relative(got, wanted), "same_argmax": float(same)}

    def _arguments(self, name: str, pair: Pair, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
        """The program's arguments, filled: random weights, tokens without padding, a full cache."""
        config, cloud, edge = self.config, pair.cloud.config, pair.edge.config
        if name == "train_step":
            _, frozen_shapes, batch_shapes = shapes
            frozen, batch = filled(frozen_shapes), placed(full_batch(config, pair), batch_shapes)
            generator, optimizer = make_generator(config, pair), make_optimizer(config.train)
            return init_state(generator, optimizer, frozen, batch, 0), frozen, batch
        if name == "specialise":
            ids = np.random.default_rng(2).integers(0, cloud.vocab_size, config.data.cloud_length - edge.num_layers)
            prompts = pack_prompts([ids.tolist()], edge.num_layers, 1, config.data.cloud_length)
            return (*filled(shapes[:2]), placed(prompts, shapes[2]), *filled(shapes[3:]))
        params, tokens = filled(shapes[0]), shapes[1]
        ids = placed(np.random.default_rng(3).integers(0, edge.vocab_size, tokens.shape), tokens)
        if name == "prefill":
            return params, ids, placed(np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), tokens)
        cache: KVCache = shapes[3]
        slots = cache.position_BS.shape[1]
        read = np.broadcast_to(np.where(np.arange(slots) < slots - 1, np.arange(slots), -1), cache.position_BS.shape)
        full = KVCache(
            filled(cache.k_LBSGH),
            filled(cache.v_LBSGH),
            placed(read, cache.position_BS),
            placed(np.asarray(slots - 1), cache.used),
        )
        return params, ids, placed(np.full(tokens.shape, slots - 1), tokens), full, None

    def _run(self, program: programs.Program, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Compiles and times; what a program writes over is passed on to its next call."""
        began = time.perf_counter()
        compiled = program.function.lower(*arguments).compile()
        compile_s, held = time.perf_counter() - began, list(arguments)

        def call() -> Any:
            out = compiled(*held)
            if program.name == "train_step":
                held[0] = out[0]
            elif program.name == "decode":
                held[3] = out[1]  # full: what follows is written over the last slot
            return out

        times = times_of(call, self.flags.repeats)
        found: dict[str, Any] = {
            "seconds": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "compile_seconds": compile_s,
        }
        memory = compiled.memory_analysis()
        if memory is not None:
            kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            found["memory_gb"] = (kept + memory.temp_size_in_bytes) / 1e9
        peak = (self.devices[0].memory_stats() or {}).get("peak_bytes_in_use")
        if peak is not None:
            found["peak_of_process_gb"] = peak / 1e9
        return found

    def _rates(self, seconds: float, flops: float, tokens: float, devices: int | None = None) -> dict[str, Any]:
        devices = len(self.devices) if devices is None else devices
        # The devices of a CPU are the same cores.
        cores = 1 if jax.default_backend() == "cpu" else devices
        found: dict[str, Any] = {
            "tokens_per_second": tokens / seconds,
            "model_tflop": flops / 1e12,
            "share_of_matmul": flops / seconds / self.rate / cores,
        }
        return found if self.peak is None else found | {"mfu": flops / seconds / self.peak / devices}


def relative(x: jax.Array, exact: jax.Array) -> float:
    """‖x - exact‖ / ‖exact‖."""
    difference = jnp.linalg.norm((x.astype(jnp.float32) - exact).reshape(-1))
    return float(difference / jnp.linalg.norm(exact.reshape(-1)))


def as_sheet(record: dict[str, Any]) -> Sheet:
    """The results as a table."""

    def cell(found: dict[str, Any], key: str, scale: float, digits: int) -> str | None:
        value = found.get(key)
        return None if value is None else f"{value * scale:,.{digits}f}"

    rows = []
    for name, found in record["results"].items():
        errors = [f"{found[key]:.1e}" for key in ("error", "gradient_error") if isinstance(found.get(key), float)]
        said = str(found["failed"])[:60] if "failed" in found else ", ".join(errors) or None
        rows.append(
            (
                name,
                cell(found, "seconds", 1e3, 2),
                cell(found, "tokens_per_second", 1, 0),
                cell(found, "mfu", 100, 1),
                cell(found, "share_of_matmul", 100, 1),
                cell(found, "memory_gb", 1, 2),
                said,
            )
        )
    columns = ("measurement", "ms", "tokens/s", "MFU, %", "of matmul, %", "memory, GB", "error")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    device = f"{record['devices']} × {record['device']}"
    return Sheet(f"{record['config']}: {device}", columns, rows, notes=[versions])


def main(arguments: list[str]) -> None:
    flags, config = flags_and_config("benchmarks/accelerator.py", AcceleratorFlags, arguments)
    if flags.out is None:
        raise ConfigError("name a directory: --out DIR", field="--out", code="missing")
    unknown = set(flags.weights.split(",")) - {"bfloat16", *FORMATS}
    if unknown:
        raise ConfigError(
            f"--weights has {', '.join(sorted(unknown))}",
            field="--weights",
            remedy=f"name some of bfloat16, {', '.join(FORMATS)}",
        )
    check_output(flags.out)
    flags.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(config, flags)
    record: dict[str, Any] = {
        "config": config.name,
        "device": jax.devices()[0].device_kind,
        "devices": len(runner.devices),
        "published_flops": runner.peak,
        "matmul_flops": runner.rate,
        "versions": {name: version(name) for name in ("lora_gen_jax", "jax", "jaxlib", "flax")},
        "results": {},
    }
    wanted = tuple(name.strip() for name in flags.only.split(",") if name.strip())
    for name, measure in runner.measurements().items():
        if wanted and not name.startswith(wanted):
            continue
        print(f"{name} …", end=" ", flush=True, file=sys.stderr)
        try:
            found: dict[str, Any] = measure()
        except Exception as error:  # whatever it is, the other measurements are worth having
            found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        said = found.get("failed") or (f"{found['seconds'] * 1e3:.2f} ms" if "seconds" in found else "done")
        print(said, file=sys.stderr)
        record["results"][name] = found
        (flags.out / "accelerator.json").write_text(json.dumps(record, indent=2) + "\n")
        (flags.out / "accelerator.md").write_text(to_markdown([as_sheet(record)]))
    print((flags.out / "accelerator.md").read_text())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LoraGenError as error:
        sys.exit(f"error: {error}")
