"""The stack: gates resolved once per micro-batch, layers in order, skipped layers not run, recompute on request.

Shapes: S sequence, B batch, D hidden, d kept hidden width.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic.model.cache import CallMemory
from elastic.model.documents import Documents
from elastic.model.elementwise import TorchElementwise
from elastic.model.masks import LayerGates, Masks
from elastic.model.norm import ElasticRMSNorm, parameter_device
from elastic.model.observe import Observer
from elastic.space.axes import Axis, LayerKind
from elastic.space.gates import Gates
from elastic.space.space import Space

# Megatron-Core's names: the config's field of the inner width, which a submodel's layers may differ in, the spec, and
# the offsets its constructor takes.
_KINDS = {
    LayerKind.MAMBA: ("mamba_num_heads", "mamba_layer", ("pp_layer_offset",)),
    LayerKind.MLP: ("ffn_hidden_size", "mlp_layer", ("add_layer_offset",)),
    LayerKind.ATTENTION: ("num_attention_heads", "attention_layer", ("add_layer_offset", "pp_layer_offset")),
}


class ElasticStack(HybridStack):
    """The layers of one pipeline stage. Checkpoint names and sharding are inherited from HybridStack."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        space: Space,
        elementwise: TorchElementwise,
        pre_process: bool = True,
        layer_type_list: list[str] | None = None,
        pp_layer_offset: int = 0,
        post_process: bool = True,
        pg_collection: Any = None,
        **_kwargs: Any,
    ) -> None:
        MegatronModule.__init__(self, config)
        assert layer_type_list is not None and pg_collection is not None
        self.pre_process, self.post_process, self.post_layer_norm = pre_process, post_process, True
        self.pg_collection, self.pp_group, self.tp_group = pg_collection, pg_collection.pp, pg_collection.tp
        self.input_tensor: Tensor | None = None
        self.layer_type_list, self.num_layers_per_pipeline_rank = layer_type_list, len(layer_type_list)
        self.layers = nn.ModuleList()
        layer_indices = tuple(range(pp_layer_offset, pp_layer_offset + len(layer_type_list)))
        for layer_index in layer_indices:
            width_field, spec, takes = _KINDS[space.parent.pattern.kinds[layer_index]]
            own, offsets = copy.copy(config), {"add_layer_offset": False, "pp_layer_offset": pp_layer_offset}
            setattr(own, width_field, space.parent.width(layer_index))
            common = dict(config=own, layer_number=layer_index + 1, pg_collection=pg_collection)
            taken = {name: offsets[name] for name in takes}
            self.layers.append(build_module(getattr(submodules, spec), **common, **taken))
        self.masks = Masks(space, layer_indices, self.tp_group.size(), parameter_device(config))
        if post_process:
            eps = config.layernorm_epsilon
            self.final_norm = ElasticRMSNorm(config, config.hidden_size, eps, elementwise=elementwise)

    def forward(
        self,
        x: Tensor | None,
        gates: Gates | None,
        observer: Observer | None = None,
        memory: CallMemory | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Run this stage's layers under `gates` (None: the whole parent).

        Takes the embeddings [S, B, D] on the first stage, else what `set_input_tensor` was given. Returns the
        normalised [S, B, d] on the last stage; between stages the stream is padded to D, the size the pipeline
        schedule exchanges. `observer` sees what the layers compute. With a `memory`, made for the subnet that `gates`
        run, the S tokens are the next ones of its sequences, and its caches are moved on. `documents` do not see each
        other.
        """
        layers = self.masks.layers(gates)
        hidden, width = layers[0].hidden, layers[0].cut.kept(Axis.HIDDEN)
        x = x if self.pre_process else self.input_tensor
        assert x is not None
        x = x[..., :width]
        if self.pre_process:
            x = hidden.apply(x)
        x = self._run_layers(x, layers, observer, memory, documents)
        if self.post_process:
            return self.final_norm(x, hidden)
        return F.pad(x, (0, self.config.hidden_size - width))

    def _run_layers(
        self,
        x: Tensor,
        gates: tuple[LayerGates, ...],
        observer: Observer | None,
        memory: CallMemory | None,
        documents: Documents | None,
    ) -> Tensor:
        recompute = self.config.recompute_granularity == "full" and self.training and x.requires_grad
        assert observer is None or not recompute, "a recomputed layer would be observed twice"
        assert memory is None or not torch.is_grad_enabled(), "a cache is moved on in place and has no gradients"
        for layer, own, layer_index in zip(self.layers, gates, self.masks.layer_indices, strict=True):
            if own.skipped:
                continue
            seen_by = None if observer is None else observer(layer_index)
            if memory is not None:
                x = layer(x, own, seen_by, memory.of(layer_index))
            elif recompute:
                # The gates travel inside the call, so the recomputed forward sees its own micro-batch's choice.
                arguments = (x, own, None, None, documents)
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            elif seen_by is not None:
                before, x = x, layer(x, own, seen_by, None, documents)
                seen_by.stream(before, x)
            else:
                x = layer(x, own, None, None, documents)
        return x
