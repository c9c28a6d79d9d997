"""What an experiment is: frozen dataclasses. The paper's values (its Table 10) are the defaults."""

import dataclasses
from pathlib import Path
from typing import Literal

from lora_gen_jax.specialization.settings import Kind, RefineConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A frozen language model.

    Attributes:
        source: a known name (pocket-edge, pocket-cloud, smollm2-135m), a directory, a .gguf file or a hub id
            (org/name, or org/name@revision).
        dtype: float32 or bfloat16, of weights and activations; or mixed: weights are stored in bfloat16 and large
            products round their operands to it, while their sums and everything else stay in float32. "auto" is
            bfloat16 on an accelerator and float32 on a CPU, but mixed for training on a CPU that multiplies bfloat16
            in hardware (AVX512-BF16, AMX).
        remat: what the backward pass keeps of each layer: none (everything), dots (matmul results), full (nothing), or
            fit: those matmul results that save most within the memory of a device (on a CPU everything).
        unroll: layers per iteration of the scan over layers; more compile longer.
        attention: kernel of the training pass: grouped (ours, fastest on a CPU), xla (`jax.nn.dot_product_attention`),
            cudnn (the same through the GPU's flash kernel), splash (the TPU's flash kernel); auto is splash on a TPU,
            grouped on a CPU, xla elsewhere. Calls that a flash kernel cannot do take xla, or grouped with a soft-cap.
        weights: how the layers' matrices are stored: auto, as dtype says; bfloat16; or quantized, int8 (half of
            bfloat16's memory) or nf4 (a quarter and a bit). Embeddings, norms and all that is trained are never
            quantized. Nothing is merged into a quantized edge model: updates are computed beside it.
    """

    source: str = "smollm2-135m"
    dtype: Literal["auto", "float32", "bfloat16", "mixed"] = "auto"
    remat: Literal["none", "dots", "full", "fit"] = "none"
    unroll: int = 1
    attention: Literal["auto", "grouped", "xla", "cudnn", "splash"] = "auto"
    weights: Literal["auto", "bfloat16", "int8", "nf4"] = "auto"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a training job's devices are arranged; one size may be -1, which takes what the others leave.

    Rows of a batch are split over data and fsdp. Several TPU slices lie along data, which must be a multiple of them.

    Attributes:
        data: copies of the frozen weights.
        fsdp: devices that a copy's weights are spread over; each layer's are gathered where they are used.
        model: devices that share the heads and FFN columns of a row, for jobs with fewer prompts than devices.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a training job find each other, where no TPU pod, SLURM, Open MPI or Kubernetes tells them.

    Attributes:
        coordinator: HOST:PORT of process 0, the same for all; the port must be free there.
        processes: how many there are. With 1, and no other flag, a process runs on its own, whatever the system says.
        process: this one's number, from 0.
        heartbeat_seconds: how long a silent process counts as alive.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    heartbeat_seconds: int = 30


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """The trainable part: cloud LoRA, meta tokens, router and expert pool.

    Attributes:
        generator: meta_tokens (gates over a pool), or direct: the cloud emits the LoRA factors themselves.
        routing: keep_top_k; gumbel_top_k (the paper's ablation: Gumbel noise in training, then the K largest); gumbel
            (soft mixture of all experts under that noise); or linear (signed gates of all experts, no softmax).
        pool: one pool shared by all edge layers, or one per layer.
        mix: products sums G·A·B over the experts; factors multiplies the sums of G·A and of G·B.
        num_experts: E.
        top_k: K experts a layer uses; ignored by gumbel and linear routing, which use all.
        rank: R of every expert.
        alpha: LoRA's α; the product is scaled by alpha / rank.
        dropout: on the LoRA inputs, cloud and edge.
        cv_coefficient: weight of the balance loss CV².
        balance_coefficient: weight of the balance loss of methods lora_moe and mixlora.
        router_width: hidden width of the router; left out, the cloud model's width.
        batch_norm: BatchNorm over the router's logits; off only for ablation.
        batch_norm_by_layer: each layer's logits have statistics of their own, only over prompts, instead of one for
            all layers: gates then differ between prompts in every layer, however much the layers differ.
        batch_norm_variance: what the running variance collects from each batch: unbiased, as PyTorch does, or biased,
            to go on with a run that began before this was an option.
        meta_init: what meta embeddings start as: small noise, or that around the embedding of a line break, where a
            language model gathers what its text asks for.
        router_input: what the router reads: meta tokens, the prompt's mean states after pooled_layers, or both.
        pooled_layers: of the cloud model, from 1 on.
        router_heads: f2 gives the logits of any layer, or a point from which a linear head of each layer makes them.
        router_point: width of that point.
        router_dropout: on what the router reads.
        standardize: what the router reads is standardized, by layer and feature, with statistics of
            train.reader_prompts prompts, and points are scaled to one length.
        train_reader: off, f1 and f2 stay as they were taught before the first step (train.reader_steps).
        train_cloud: off, meta embeddings and cloud stay as they start, and no gradient goes through the cloud's pass.
        shared_meta_token: one meta embedding for all layers instead of one each.
        cloud_rank: rank of the LoRA on the cloud model's q and v; 0 leaves the cloud model as it is.
        cloud_alpha: α of that LoRA.
        lora_sites: the linear layers of the edge model that carry a plain LoRA; left out, the method's own: q, v and
            the FFN for lora and lorahub, q, k, v and o for mixlora and autocompressor.
        direct_width: hidden width of the head of direct generation.
        gumbel_temperature: of gumbel_top_k and gumbel routing.
    """

    generator: Literal["meta_tokens", "direct"] = "meta_tokens"
    routing: Literal["keep_top_k", "gumbel_top_k", "gumbel", "linear"] = "keep_top_k"
    pool: Literal["shared", "per_layer"] = "shared"
    mix: Literal["products", "factors"] = "products"
    num_experts: int = 8
    top_k: int = 2
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05
    cv_coefficient: float = 0.01
    balance_coefficient: float = 0.01
    router_width: int | None = None
    batch_norm: bool = True
    batch_norm_by_layer: bool = False
    batch_norm_variance: Literal["unbiased", "biased"] = "unbiased"
    meta_init: Literal["normal", "newline"] = "normal"
    router_input: Literal["meta", "pooled", "both"] = "meta"
    pooled_layers: tuple[int, ...] = ()
    router_heads: Literal["shared", "per_layer"] = "shared"
    router_point: int = 64
    router_dropout: float = 0.0
    standardize: bool = False
    train_reader: bool = True
    train_cloud: bool = True
    shared_meta_token: bool = False
    cloud_rank: int = 16
    cloud_alpha: float = 16.0
    lora_sites: tuple[str, ...] | None = None
    direct_width: int = 128
    gumbel_temperature: float = 1.0

    @property
    def active_experts(self) -> int:
        """Gates of a row that may differ from zero."""
        return self.top_k if self.routing in ("keep_top_k", "gumbel_top_k") else self.num_experts

    @property
    def temperature(self) -> float:
        """What the softmax divides logits by."""
        return self.gumbel_temperature if self.routing in ("gumbel_top_k", "gumbel") else 1.0


@dataclasses.dataclass(frozen=True)
class LoRAMoEConfig:
    """Of method lora_moe.

    Attributes:
        margin: δ of its balance loss: an expert of the task's own kind counts 1 + δ times, others 1 - δ times. Of no
            effect where data.knowledge_tasks names none.
    """

    margin: float = 0.1


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """Of method lorahub: modules that are trained, and the search that weighs them for a new task.

    `train.seed` draws the modules' tasks, `eval.seed` the shots; the search itself draws nothing.

    Attributes:
        modules: LoRAs, one a task, of tasks drawn from those that data.tasks names.
        budget: candidates that the search scores.
        bound: weights lie between -bound and bound.
        penalty: weight of the mean of their absolute values beside the loss of the shots over their number.
    """

    modules: int = 20
    budget: int = 40
    bound: float = 1.5
    penalty: float = 0.05


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """Of method autocompressor.

    Attributes:
        summary_tokens: soft tokens that a segment of the prompt is compressed to.
        segments: parts of a sequence: those of the prompt, and the queries as the last.
        substep: segments after which gradients stop.
    """

    summary_tokens: int = 50
    segments: int = 4
    substep: int = 2


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Tasks and the shape of a batch: P prompts, each read once by the cloud and answered for by several queries.

    Attributes:
        dir: directory with the tasks' original files, one subdirectory a task; left out, tensorflow-datasets.
        tfds_dir: where tensorflow-datasets keeps its prepared data; left out, its own default.
        files: your own JSONL files, or directories of them, trained on beside the named tasks.
        tasks: names of tasks, or of groups of them, to train on: the reasoning tasks, and "pocket", the embedded suite.
        mixture: even draws a prompt from each task source alike, size from each in proportion to its rows, so that
            every row is read as often as any other.
        source_weights: what a source's chance is multiplied with, as name=weight; unnamed sources weigh 1.
        prompts_per_step: P, over all processes.
        prompts_per_row: prompts packed into one row of the cloud's batch; divides P.
        cloud_length: tokens of a cloud row, meta tokens included.
        edge_length: tokens of an edge row: the queries and answers of one prompt, packed.
        queries_per_prompt: at most this many queries share a prompt.
        response_slots: answer tokens of an edge row that are learned from.
        min_shots, max_shots: shots in a training prompt, drawn evenly, both included.
        query_length: longest query with its answer; longer ones are left out of training.
        rows_per_block: rows of the cloud's batch that are packed together, so that long prompts meet short ones. What a
            row holds depends on this number and never on the number of processes, each of which takes whole blocks.
        workers: processes that build batches ahead; 0 builds them in a thread.
        edge_reads_prompt: a row of the edge begins with the prompt, which all its queries read, in training and when
            the method is scored; for methods lora, lora_moe and mixlora.
        edge_prompt_length: longest prompt in the edge model's tokens, for method autocompressor, whose edge model
            compresses it; prompts lose shots to fit. 0 for the other methods.
        shot_length: tokens of the row in which a prompt's own shots are laid out for train.inner_steps; 0 for none.
        knowledge_tasks: tasks, by name or source, that ask for knowledge of the world: method lora_moe's balance loss
            prefers the first half of the experts for them.
    """

    dir: Path | None = None
    tfds_dir: Path | None = None
    files: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ("arc_challenge", "arc_easy", "openbookqa", "boolq", "social_iqa")
    mixture: Literal["even", "size"] = "even"
    source_weights: tuple[str, ...] = ()
    prompts_per_step: int = 64
    prompts_per_row: int = 1
    cloud_length: int = 2048
    edge_length: int = 2048
    queries_per_prompt: int = 8
    response_slots: int = 256
    min_shots: int = 1
    max_shots: int = 5
    query_length: int = 1024
    rows_per_block: int = 8
    workers: int = 0
    edge_reads_prompt: bool = False
    edge_prompt_length: int = 0
    knowledge_tasks: tuple[str, ...] = ()
    shot_length: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimization, and what a run writes when.

    Attributes:
        steps: optimizer steps; 0 beside epochs.
        epochs: in the place of steps, how often the training rows are read: as many steps as that takes, with
            data.prompts_per_step · data.queries_per_prompt queries each.
        learning_rate: peak of warm-up and cosine decay to zero.
        warmup_steps: linear from zero; in a run that is no longer than that, `warmup`.
        beta1, beta2, weight_decay: AdamW's; decay spares norms, embeddings and BatchNorm.
        clip_norm: clip the gradient to this global norm; left out, no clipping.
        router_learning_rate: peak for the router, where it is another one.
        start_from: a generator that the run begins with, in the place of fresh parameters: as --checkpoint of eval.py
            names one (a directory, a shipped generator, org/name). No reader is taught then.
        reader_prompts: prompts that are read before the first step, for what the router's input is standardized with
            and for its first layer to learn to tell their tasks apart; 0 for none.
        reader_steps: of that learning; with 0 only the statistics are taken.
        seed: of parameters, dropout and data order.
        validation_batches: fixed batches of held-out queries whose loss is logged; 0 logs none.
        validate_every, checkpoint_every: in steps.
        keep_checkpoints: newest checkpoints that are kept, beside the best.
        profile: write a profiler trace of steps 5 to 8 to the work directory.
        inner_steps: steps on the gates that a prompt's own shots are given before its queries are answered, so that
            pool and router are trained for refining (`training/inner.py`); 0 for none.
        inner_rate: how far one such step moves a logit at most.
        inner_swapped: share of the prompts that begin them with another prompt's gates.
        inner_after: steps of the run before the first that has inner steps.
    """

    steps: int = 1000
    epochs: float | None = None
    learning_rate: float = 2e-5
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.1
    clip_norm: float | None = None
    router_learning_rate: float | None = None
    start_from: str | None = None
    reader_prompts: int = 0
    reader_steps: int = 300
    seed: int = 0
    validation_batches: int = 2
    validate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    profile: bool = False
    inner_steps: int = 0
    inner_rate: float = 0.6
    inner_swapped: float = 0.35
    inner_after: int = 0

    @property
    def warmup(self) -> int:
        """The steps of the warm-up: `warmup_steps` where the run is longer, else half of the run."""
        return self.warmup_steps if self.warmup_steps < self.steps else self.steps // 2


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Scoring.

    Attributes:
        tasks: what eval.py scores, and train.py with compare; left out, all eight reasoning tasks. eval.py takes
            lm_eval/NAME for a task of lm-evaluation-harness.
        methods: base, icl, task_vector, lora, lora_moe, mixlora, lorahub, autocompressor, lora_gen; steps on the
            prompt's own shots: refined, refined_lora, refined_both, equal_refined, shots_lora; and LoRA-Gen under
            another prompt: paraphrase, description, shots, shuffled (another task's), gibberish, empty.
        shots: shots in the system prompt: read by the cloud, and by the edge for icl.
        split: documents that are scored: test, or validation (held out of training too) for choosing settings.
        limit: documents a task, the first ones; left out, all.
        seed: of the choice of shots.
        batch_tokens: tokens of one scoring batch.
        prompt_limit: longest system prompt, in cloud tokens; a longer one is an error.
        latency: measure the time of an answer, too; of no use while other work shares the machine.
        vector_layer: after which share of the edge model's layers task_vector reads and puts its vector.
        refine: steps of methods refined, refined_both and equal_refined, on gates.
        refine_lora: steps of method refined_lora, on factors beside the generated update.
        lora_steps, lora_rate: steps and Adam's learning rate of method shots_lora.
    """

    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("base", "icl", "lora_gen")
    shots: int = 5
    split: Literal["test", "validation"] = "test"
    limit: int | None = None
    seed: int = 0
    batch_tokens: int = 8192
    prompt_limit: int = 2048
    latency: bool = True
    vector_layer: float = 2 / 3
    refine: RefineConfig = dataclasses.field(default_factory=lambda: RefineConfig("gates"))
    refine_lora: RefineConfig = dataclasses.field(default_factory=lambda: RefineConfig("lora"))
    lora_steps: int = 10
    lora_rate: float = 1e-3

    def refining(self, kind: Kind) -> RefineConfig:
        """How the kind learns; both as `refine` says, with factors of the rank that `refine_lora` has."""
        if kind == "both":
            return dataclasses.replace(self.refine, kind=kind, rank=self.refine_lora.rank)
        return self.refine if kind == "gates" else self.refine_lora


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment.

    Attributes:
        name: of the run's directory; the config file's name when left empty.
        method: which system is trained: lora, lora_moe, mixlora, lorahub, autocompressor or lora_gen.
        compare: methods that train.py scores after the last step, on eval.tasks, with report.json and report.png; those
            that learn are trained alike, each in a directory of its own inside the work directory.
        cloud: reads the prompt.
        edge: is specialized.
        mesh: the devices' arrangement; a run may go on with another one.
        distributed: the processes of one job; a run may go on with another number of them.
        workdir: everything a run writes; left out, runs/<name>.
        bucket: gs://NAME/DIR, where checkpoints go instead, for machines that share no file system: workdir is then a
            directory of each machine's own. A run goes on from there on machines that never saw its workdir.
    """

    name: str = ""
    method: str = "lora_gen"
    compare: tuple[str, ...] = ()
    cloud: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    edge: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    generator: GeneratorConfig = dataclasses.field(default_factory=GeneratorConfig)
    lora_moe: LoRAMoEConfig = dataclasses.field(default_factory=LoRAMoEConfig)
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)
    compressor: CompressorConfig = dataclasses.field(default_factory=CompressorConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    workdir: Path | None = None
    bucket: str | None = None

    @property
    def directory(self) -> Path:
        """Everything the run writes, but for checkpoints in a bucket."""
        return self.workdir if self.workdir is not None else Path("runs") / self.name

    @property
    def saved(self) -> str | Path:
        """Where the directory of checkpoints is: in the bucket, or in the work directory."""
        return self.bucket or self.directory

    def inside(self, name: str) -> "Config":
        """The config with places of its own inside this one's."""
        bucket = self.bucket and f"{self.bucket.rstrip('/')}/{name}"
        return dataclasses.replace(self, workdir=self.directory / name, bucket=bucket)
