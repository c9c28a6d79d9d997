"""LoRA-Gen's training step in torch and transformers: what this project's own step is held against.

In: the two frozen models as transformers has them, an experiment's config, this project's trainable parameters and
its `Batch`es. Out: the loss, the gates and updated parameters, which have to be those of `lora_gen_jax.training.step`.

It is written as one would write it for torch: frozen layers are wrapped where a side path is added, attention is
torch's fused kernel under a boolean mask, low-rank products are added by the matmul that makes them, the optimiser is
the fused AdamW, and nothing is recomputed in the backward pass.
"""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lora_gen_jax.config import Config, GeneratorConfig, TrainConfig
from lora_gen_jax.data.pipeline import Batch
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.transformers_peer import torch_model
from lora_gen_jax.models import Pair

FAMILIES = ("llama", "qwen2")
CLOUD_SITES = ("q", "v")
FFN_SITES = ("gate", "up", "down")
# Where a leaf of this project's tree lies in the torch module; a True marks matrices that are stored transposed.
_SINGLE = {
    ("cloud", "meta_embedding"): ("meta_embedding", False),
    ("router", "f1"): ("f1.weight", True),
    ("router", "f2"): ("f2.weight", True),
    ("router", "norm", "scale"): ("norm.weight", False),
    ("router", "norm", "bias"): ("norm.bias", False),
}


class LoRALinear(nn.Module):
    """A frozen linear layer and a LoRA of its own; `a` [R, inputs] and `b` [outputs, R]."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Parameter(torch.zeros(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, inputs] -> [B, T, outputs]."""
        y_BTF, h_BTR = self.base(x_BTD), F.linear(x_BTD, self.a)
        # One matmul that adds to the layer's output, not a product and two passes over it.
        y = torch.addmm(y_BTF.flatten(0, 1), h_BTR.flatten(0, 1), self.b.t(), alpha=self.scale)
        return y.view_as(y_BTF)


class GatedLinear(nn.Module):
    """A frozen linear layer and, for the prompt of each row, the experts that its gates choose.

    The pool is shared by all layers: `a` [E, R, inputs] and `b` [E, R, outputs], which the owner registers.
    """

    def __init__(self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter):
        super().__init__()
        self.base = base
        # In a tuple, so that the pool is not registered once for each layer.
        self.pool = (a, b)
        self.index_PK, self.weight_PK = torch.empty(0), torch.empty(0)

    def choose(self, index_PK: torch.Tensor, weight_PK: torch.Tensor) -> None:
        """The experts of the coming pass and their gates, times α/r."""
        self.index_PK, self.weight_PK = index_PK, weight_PK

    def forward(self, x_PTD: torch.Tensor) -> torch.Tensor:
        """[P, T, inputs] -> [P, T, outputs]; the chosen experts lie side by side, one pair of matmuls a prompt."""
        (P, K), rank = self.index_PK.shape, self.pool[0].shape[1]
        a_PXD, b_PXF = (x.index_select(0, self.index_PK.flatten()).view(P, K * rank, -1) for x in self.pool)
        weight_PX = self.weight_PK.repeat_interleave(rank, dim=1)
        h_PTX = torch.bmm(x_PTD, a_PXD.mT) * weight_PX[:, None]
        return torch.baddbmm(self.base(x_PTD), h_PTX, b_PXF)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a step's forward pass gives: the objective, its two parts, and the gates [P, L, E]."""

    total: torch.Tensor
    loss: torch.Tensor
    cv: torch.Tensor
    gates_PLE: torch.Tensor


class TorchLoRAGen(nn.Module):
    """Cloud with LoRA and meta embeddings, router, pool, and the edge with its side paths.

    Args:
        cloud, edge: causal language models of transformers, of the Llama or Qwen2 family; they are changed in place.
        settings: of the generator.
    """

    def __init__(self, cloud: Any, edge: Any, settings: GeneratorConfig):
        super().__init__()
        s = self.settings = settings
        width, layers = cloud.config.hidden_size, edge.config.num_hidden_layers
        hidden = s.router_width or width
        for model in (cloud, edge):
            model.requires_grad_(False).set_attn_implementation("sdpa")
        self.cloud, self.edge, self.unembed = cloud.model, edge.model, edge.lm_head
        self.meta_embedding = nn.Parameter(torch.zeros(layers, width))
        self.f1, self.f2 = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, s.num_experts, bias=False)
        # Running statistics cost the same as this project's; theirs are debiased, which no training step reads.
        self.norm = nn.BatchNorm1d(s.num_experts)
        for layer in self.cloud.layers:
            for site in CLOUD_SITES:
                _wrap(layer.self_attn, site, lambda base: LoRALinear(base, s.cloud_rank, s.cloud_alpha / s.cloud_rank))
        self.pool = nn.ParameterDict()
        for site in FFN_SITES:
            linear = getattr(self.edge.layers[0].mlp, f"{site}_proj")
            a = self.pool[f"{site}_a"] = nn.Parameter(torch.zeros(s.num_experts, s.rank, linear.in_features))
            b = self.pool[f"{site}_b"] = nn.Parameter(torch.zeros(s.num_experts, s.rank, linear.out_features))
            for layer in self.edge.layers:
                _wrap(layer.mlp, site, lambda base, a=a, b=b: GatedLinear(base, a, b))

    def forward(self, batch: Batch) -> Result:
        """The objective on a batch whose arrays are tensors (`tensors_of`)."""
        s = self.settings
        gates_PLE, index_PLK, weight_PLK = self.route(self.meta_tokens(batch.prompts))
        for number, layer in enumerate(self.edge.layers):
            for site in FFN_SITES:
                chosen = index_PLK[:, number], weight_PLK[:, number] * (s.alpha / s.rank)
                getattr(layer.mlp, f"{site}_proj").choose(*chosen)
        loss, cv = self.edge_loss(batch), cv_squared(gates_PLE)
        return Result(loss + s.cv_coefficient * cv, loss, cv, gates_PLE)

    def meta_tokens(self, prompts: Any) -> torch.Tensor:
        """The cloud's hidden states at the meta slots, [P, L, C]; no logits."""
        own_BTC = F.embedding(prompts.meta_BT.clamp(min=0), self.meta_embedding)
        x_BTC = torch.where((prompts.meta_BT >= 0)[..., None], own_BTC, self.cloud.embed_tokens(prompts.tokens_BT))
        hidden_BTC = _hidden(self.cloud, x_BTC, prompts.positions_BT, prompts.segments_BT)
        rows = torch.arange(len(x_BTC))[:, None, None]
        return hidden_BTC[rows, prompts.slots_BML].flatten(0, 1)

    def route(self, meta_PLC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gates [P, L, E], the experts they choose [P, L, K] and these experts' gates."""
        logits_PLE = self.f2(F.silu(self.f1(meta_PLC)))
        probabilities = self.norm(logits_PLE.flatten(0, 1)).view_as(logits_PLE).softmax(-1)
        weight, index = probabilities.topk(self.settings.top_k, dim=-1)
        if self.settings.top_k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, index, weight), index, weight

    def edge_loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats; logits of supervised tokens alone, unused slots left out."""
        x_PTD = self.edge.embed_tokens(batch.tokens_PT)
        hidden_PTD = _hidden(self.edge, x_PTD, batch.positions_PT, batch.segments_PT)
        prompt, slot = torch.nonzero(batch.weight_PS, as_tuple=True)
        hidden_ND = hidden_PTD[prompt, batch.source_PS[prompt, slot]]
        return F.cross_entropy(self.unembed(hidden_ND), batch.target_PS[prompt, slot])


def cv_squared(gates_PLE: torch.Tensor) -> torch.Tensor:
    """CV² of the experts' importance: unbiased variance over squared mean."""
    importance_E = gates_PLE.sum((0, 1))
    return importance_E.var() / (importance_E.mean() ** 2 + 1e-10)


def _wrap(module: nn.Module, site: str, wrapper: Any) -> None:
    setattr(module, f"{site}_proj", wrapper(getattr(module, f"{site}_proj")))


def _hidden(model: Any, x_BTD: torch.Tensor, positions_BT: torch.Tensor, segments_BT: torch.Tensor) -> torch.Tensor:
    # Block-diagonal and causal. Padding sees itself: a row without any key is not a number in some kernels.
    mask = (positions_BT[:, None, :] <= positions_BT[:, :, None]) & (positions_BT[:, None, :] >= 0)
    mask &= segments_BT[:, None, :] == segments_BT[:, :, None]
    mask |= torch.eye(mask.shape[-1], dtype=torch.bool)
    positions_BT = positions_BT.clamp(min=0)
    given = {"inputs_embeds": x_BTD, "attention_mask": mask[:, None], "position_ids": positions_BT}
    return model(**given, use_cache=False).last_hidden_state


class TorchTrainer:
    """The model and its optimiser; `step` is one update.

    Args:
        pair: the two models of this project, whose weights are copied.
        config: the experiment.
        params: this project's trainable tree, copied.

    Raises:
        ConfigError: for a variant that is not written here.
    """

    def __init__(self, pair: Pair, config: Config, params: Any):
        _check(pair, config)
        edge = torch_model(config.edge.source, pair.edge)
        if pair.cloud.params is pair.edge.params:
            # Wrappers of their own around the same weights.
            cloud = copy.deepcopy(edge, {id(weight): weight for weight in edge.parameters()})
        else:
            cloud = torch_model(config.cloud.source, pair.cloud)
        self.model, self.config = TorchLoRAGen(cloud, edge, config.generator).train(), config.train
        for path, (tensors, transposed) in self._leaves().items():
            value = np.array(_at(params, path))
            slices = value if len(tensors) > 1 else value.reshape(1, *tensors[0].mT.shape) if transposed else [value]
            for tensor, one in zip(tensors, slices, strict=True):
                tensor.data = torch.from_numpy(np.array(np.swapaxes(one, -1, -2) if transposed else one, order="C"))
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.scheduler = make_optimizer(self.model, config.train)

    def step(self, batch: Batch) -> dict[str, float]:
        """One update on a batch of NumPy arrays; loss, CV² and the norm of the gradient before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        result = self.model(tensors_of(batch))
        result.total.backward()
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = nn.utils.clip_grad_norm_(self.trainable, limit)
        self.optimizer.step()
        self.scheduler.step()
        return {"loss": result.loss.item(), "cv": result.cv.item(), "grad_norm": norm.item()}

    def tree(self, attribute: str) -> dict[tuple[str, ...], np.ndarray]:
        """Parameters ("data") or their gradients ("grad") by path, in the shapes of this project's tree."""
        found = {}
        for path, (tensors, transposed) in self._leaves().items():
            values = [getattr(tensor, attribute).numpy() for tensor in tensors]
            values = [np.swapaxes(value, -1, -2) if transposed else value for value in values]
            found[path] = np.stack(values) if path[1][:2] in ("q_", "v_") else values[0]
        return found

    def _leaves(self) -> dict[tuple[str, ...], tuple[list[nn.Parameter], bool]]:
        """Each leaf of this project's tree: the parameters it is made of, one a layer, and whether they transpose."""
        found = {path: ([self.model.get_parameter(name)], flip) for path, (name, flip) in _SINGLE.items()}
        attention = [layer.self_attn for layer in self.model.cloud.layers]
        for site in CLOUD_SITES:
            linears = [getattr(module, f"{site}_proj") for module in attention]
            found["cloud", f"{site}_a"] = [linear.a for linear in linears], True
            found["cloud", f"{site}_b"] = [linear.b for linear in linears], True
        for name, tensor in self.model.pool.items():
            found["pool", name] = [tensor], name.endswith("_a")
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
        count, warm = updates + 1, config.warmup_steps
        if count < warm:
            return count / warm
        return 0.5 * (1 + math.cos(math.pi * (count - warm) / (config.steps + 1 - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def tensors_of(batch: Batch) -> Batch:
    """The batch with tensors for arrays; indices as 64-bit integers, which torch indexes with."""

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value if value.dtype == np.float32 else value.astype(np.int64))
        return value.replace(**{f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)})

    return convert(batch)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _check(pair: Pair, config: Config) -> None:
    s = config.generator
    families = [model.config.family for model in (pair.cloud, pair.edge)]
    plain = (s.generator, s.routing, s.pool, s.mix) == ("meta_tokens", "keep_top_k", "shared", "products")
    plain = plain and s.batch_norm and not s.shared_meta_token and s.cloud_rank > 0 and s.num_experts > 1
    if not plain or config.method != "lora_gen" or config.data.edge_reads_prompt or set(families) - set(FAMILIES):
        raise ConfigError(
            f"the step in torch covers method lora_gen with the paper's settings and models of {', '.join(FAMILIES)};"
            " undo the config's changes to the generator's variant"
        )
    if s.dropout:
        raise ConfigError("two libraries do not draw the same dropout: set generator.dropout to 0")
