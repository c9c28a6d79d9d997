"""The optimizer's side of LoRA-Gen in torch: one update, and parameters copied from this project and back.

In: a pair of models, a config and the trainable tree of this project; then its `Batch`es of NumPy arrays. Out: the
step's figures, and parameters or gradients in the shapes of this project's tree. AdamW is torch's fused one. With
"bfloat16" the pass runs under autocast; parameters, gradients and the optimizer's state stay in fp32.
"""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch_lora_gen import CLOUD_SITES, TorchLoRAGen

from lora_gen_jax.config import Config, TrainConfig
from lora_gen_jax.data.pipeline import Batch
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.lab.costs.transformers_peer import torch_model
from lora_gen_jax.models import Pair

FAMILIES = ("llama", "qwen2")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where a leaf of this project's tree lies in the torch model.

    Attributes:
        tensors: one, or one a layer.
        stacked: the leaf has a leading layer axis.
        transposed: torch keeps [outputs, inputs], or [.., R, inputs], for this project's [inputs, outputs].
    """

    tensors: list[nn.Parameter]
    stacked: bool = False
    transposed: bool = False

    def write(self, value: np.ndarray) -> None:
        """Copies the leaf into the tensors."""
        for tensor, one in zip(self.tensors, value if self.stacked else [value], strict=True):
            turned = np.swapaxes(one, -1, -2) if self.transposed else one
            tensor.data.copy_(torch.from_numpy(np.array(turned, order="C")))

    def read(self, attribute: str) -> np.ndarray:
        """The leaf's "data" or "grad"."""
        values = [getattr(tensor, attribute).numpy() for tensor in self.tensors]
        values = [np.swapaxes(value, -1, -2) if self.transposed else value for value in values]
        return np.stack(values) if self.stacked else values[0]


class TorchTrainer:
    """The model and its optimizer; `step` is one update.

    Args:
        pair: the two models of this project, whose weights are copied.
        config: the experiment.
        params: this project's trainable tree, copied.
        dtype: "float32" or "bfloat16", of large products.

    Raises:
        ConfigError: for a variant that is not written here.
    """

    def __init__(self, pair: Pair, config: Config, params: Any, dtype: str = "float32"):
        _check(pair, config)
        edge = torch_model(config.edge.source, pair.edge)
        if pair.cloud.params is pair.edge.params:
            # Layers of its own around the same weights.
            cloud = copy.deepcopy(edge, {id(weight): weight for weight in edge.parameters()})
        else:
            cloud = torch_model(config.cloud.source, pair.cloud)
        self.model, self.config = TorchLoRAGen(cloud, edge, config.generator), config.train
        self.leaves = leaves_of(self.model)
        for path, leaf in self.leaves.items():
            value = params
            for key in path:
                value = value[key]
            leaf.write(np.asarray(value))
        self.mixed = dtype == "bfloat16"
        if self.mixed:
            self.model.store_bfloat16()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.scheduler = make_optimizer(self.model, config.train)

    def step(self, batch: Batch) -> dict[str, float]:
        """One update on a batch of NumPy arrays; loss, CV² and the norm of the gradient before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            result = self.model(tensors_of(batch))
        result.total.backward()
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = nn.utils.clip_grad_norm_(self.trainable, limit)
        self.optimizer.step()
        self.scheduler.step()
        return {"loss": result.loss.item(), "cv": result.cv.item(), "grad_norm": norm.item()}


def leaves_of(model: TorchLoRAGen) -> dict[tuple[str, ...], Leaf]:
    """Every trainable leaf of this project's tree, by its path."""
    found = {
        ("cloud", "meta_embedding"): Leaf([model.meta_embedding]),
        ("router", "f1"): Leaf([model.f1.weight], transposed=True),
        ("router", "f2"): Leaf([model.f2.weight], transposed=True),
        ("router", "norm", "scale"): Leaf([model.norm.weight]),
        ("router", "norm", "bias"): Leaf([model.norm.bias]),
    }
    for site in CLOUD_SITES:
        linears = [getattr(layer.self_attn, f"{site}_proj") for layer in model.cloud.layers]
        for name in ("a", "b"):
            tensors = [getattr(linear, name) for linear in linears]
            found["cloud", f"{site}_{name}"] = Leaf(tensors, stacked=True, transposed=True)
    for name, tensor in model.pool.items():
        found["pool", name] = Leaf([tensor], transposed=name.endswith("_a"))
    return found


def make_optimizer(model: TorchLoRAGen, config: TrainConfig) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW with decay on matrices alone, and warm-up and cosine decay as a scheduler of single updates."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or "embedding" in name]
    decayed = [p for name, p in named if p.ndim >= 2 and "embedding" not in name]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)

    def share(updates: int) -> float:
        count, warm = updates + 1, config.warmup
        if count < warm:
            return count / warm
        return 0.5 * (1 + math.cos(math.pi * (count - warm) / (config.steps + 1 - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def tensors_of(batch: Batch) -> Batch:
    """The batch with tensors for arrays; integers as 64-bit ones, which torch indexes with."""

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value if value.dtype == np.float32 else value.astype(np.int64))
        if value is None:
            return None
        return value.replace(**{f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)})

    return convert(batch)


def _check(pair: Pair, config: Config) -> None:
    s = config.generator
    families = {model.config.family for model in (pair.cloud, pair.edge)}
    plain = (s.generator, s.routing, s.pool, s.mix) == ("meta_tokens", "keep_top_k", "shared", "products")
    plain = plain and s.batch_norm and not s.shared_meta_token and s.cloud_rank > 0 and s.num_experts > 1
    if not plain or config.method != "lora_gen" or config.data.edge_reads_prompt or families - set(FAMILIES):
        raise ConfigError(
            f"the step in torch covers method lora_gen with the paper's settings and models of {', '.join(FAMILIES)}",
            field="generator",
            remedy="undo the config's changes to the generator's variant",
        )
    if s.dropout:
        raise ConfigError(
            "two libraries do not draw the same dropout", field="generator.dropout", remedy="set generator.dropout to 0"
        )
