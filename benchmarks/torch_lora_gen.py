"""LoRA-Gen in torch and transformers: the model that this project's training step is held against.

In: the two frozen models as transformers has them, a generator's settings, and a `Batch` of tensors. Out: the
objective, its parts and the gates, which have to be those of `lora_gen_jax.training.step.objective`.

It is written as one would write it for torch: frozen layers are wrapped where a side path is added, attention is
torch's fused kernel, low-rank products are added by the matmul that makes them, unused slots get
no logits, and nothing is recomputed in the backward pass. In bf16 it runs under autocast, with the frozen matrices
stored in bf16, which spares casting them at every use; the router stays in fp32.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_gen_jax.config import GeneratorConfig
from lora_gen_jax.data.pipeline import Batch

CLOUD_SITES = ("q", "v")
FFN_SITES = ("gate", "up", "down")


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
        self.norm = nn.BatchNorm1d(s.num_experts * (layers if s.batch_norm_by_layer else 1))
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

    def store_bfloat16(self) -> None:
        """Stores the frozen matrices of both models in bf16; embeddings and norms stay as they are."""
        stored: dict[int, nn.Parameter] = {}  # by place in memory: the two models may share weights
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                place = module.weight.data_ptr()
                if place not in stored:
                    stored[place] = nn.Parameter(module.weight.data.bfloat16(), requires_grad=False)
                module.weight = stored[place]

    def forward(self, batch: Batch) -> Result:
        """The objective on a batch whose arrays are tensors (`tensors_of`)."""
        s = self.settings
        meta_PLC = self.meta_tokens(batch.prompts)
        with torch.autocast("cpu", enabled=False):
            gates_PLE, index_PLK, weight_PLK = self.route(meta_PLC)
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
        features = logits_PLE.flatten(1) if self.settings.batch_norm_by_layer else logits_PLE.flatten(0, 1)
        probabilities = self.norm(features).view_as(logits_PLE).softmax(-1)
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
    visible_BTT = (positions_BT[:, None, :] <= positions_BT[:, :, None]) & (positions_BT[:, None, :] >= 0)
    visible_BTT &= segments_BT[:, None, :] == segments_BT[:, :, None]
    visible_BTT |= torch.eye(x_BTD.shape[1], dtype=torch.bool)
    # As numbers to add, which is what torch's kernel would make of it again in every layer.
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x_BTD.dtype
    mask = torch.zeros_like(visible_BTT, dtype=dtype).masked_fill_(~visible_BTT, torch.finfo(dtype).min)
    given = {"inputs_embeds": x_BTD, "attention_mask": mask[:, None], "position_ids": positions_BT.clamp(min=0)}
    return model(**given, use_cache=False).last_hidden_state
