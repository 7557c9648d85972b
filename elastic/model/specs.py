"""Which module stands where: the elastic specs, and the plain ones of a stock HybridModel with the same kernels."""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from elastic.model.attention import ElasticAttentionLayer, ElasticSelfAttention
from elastic.model.backends import Kernels
from elastic.model.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from elastic.model.mamba import ElasticMambaLayer, ElasticMambaMixer, PortableMambaMixer
from elastic.model.masks import ElasticLayer
from elastic.model.mlp import ElasticMLP, ElasticMLPLayer, ElasticMLPSubmodules
from elastic.model.norm import ElasticRMSNorm
from elastic.model.stack import ElasticStack
from elastic.space.layers import DimKind
from elastic.space.space import Space


def elastic_stack_spec(space: Space, kernels: Kernels) -> ModuleSpec:
    """Assemble the elastic stack: every module subclasses the Megatron-Core module of the same place."""

    def column(inner: DimKind) -> ModuleSpec:
        return ModuleSpec(ElasticColumnParallelLinear, params={"inner": inner})

    def row(inner: DimKind) -> ModuleSpec:
        return ModuleSpec(ElasticRowParallelLinear, params={"inner": inner})

    return _stack_spec(
        ModuleSpec(ElasticStack, params={"space": space, "elementwise": kernels.elementwise}),
        kernels,
        space.parent.conv_kernel,
        layers=(ElasticMambaLayer, ElasticAttentionLayer, ElasticMLPLayer),
        functions=(ElasticMambaMixer, ElasticSelfAttention, ElasticMLP),
        linears=(column, row),
    )


def plain_stack_spec(kernels: Kernels, conv_kernel: int = 4) -> ModuleSpec:
    """Assemble a stock HybridStack with the same kernels: what checkpoints must load into, and what speed is held to.

    Build it with `post_layer_norm` False on a CPU; HybridStack's own final norm is Transformer Engine's.
    """
    return _stack_spec(
        ModuleSpec(_PlainStack, params={"elementwise": kernels.elementwise}),
        kernels,
        conv_kernel,
        layers=(MambaLayer, TransformerLayer, MLPLayer),
        functions=(PortableMambaMixer, SelfAttention, MLP),
        linears=(lambda inner: ColumnParallelLinear, lambda inner: RowParallelLinear),
    )


class _PlainStack(HybridStack):
    """HybridStack with a final norm that runs without Transformer Engine."""

    def __init__(self, config: Any, submodules: Any, post_process: bool = True, **kwargs: Any) -> None:
        elementwise = kwargs.pop("elementwise")
        super().__init__(config, submodules, post_layer_norm=False, post_process=post_process, **kwargs)
        if post_process:
            eps = config.layernorm_epsilon
            self.final_norm = ElasticRMSNorm(config, config.hidden_size, eps, elementwise=elementwise)
            self.post_layer_norm = True


def _stack_spec(
    stack: ModuleSpec,
    kernels: Kernels,
    conv_kernel: int,
    *,
    layers: tuple[type, type, type],
    functions: tuple[type, type, Any],
    linears: tuple[Callable[[DimKind], Any], Callable[[DimKind], Any]],
) -> ModuleSpec:
    """Fill in the Mamba, attention and MLP layers; `linears` give those from and to the stream by inner dimension."""
    (mamba_layer, attention_layer, mlp_layer), (mamba, attention, mlp), (column, row) = layers, functions, linears
    own = {"elementwise": kernels.elementwise}
    mixer = ModuleSpec(
        mamba,
        {"state_space": kernels.state_space, "d_conv": conv_kernel, **own},
        MambaMixerSubmodules(in_proj=column(DimKind.IN_PROJ), out_proj=row(DimKind.INNER)),
    )
    self_attention = ModuleSpec(
        attention,
        {"attn_mask_type": AttnMaskType.causal},
        SelfAttentionSubmodules(column(DimKind.QKV), kernels.core_attention, row(DimKind.CONTEXT)),
    )
    neurons = ElasticMLPSubmodules(linear_fc1=column(DimKind.FFN), linear_fc2=row(DimKind.FFN), **own)
    built_mlp, norm = partial(mlp.as_mlp_submodule, submodules=neurons), ModuleSpec(ElasticRMSNorm, own)
    add, layer = get_bias_dropout_add, own if issubclass(mlp_layer, ElasticLayer) else {}
    attention_parts = TransformerLayerSubmodules(input_layernorm=norm, self_attention=self_attention, self_attn_bda=add)
    mlp_parts = TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=built_mlp, mlp_bda=add)
    stack.submodules = HybridStackSubmodules(
        mamba_layer=ModuleSpec(mamba_layer, layer, MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=add)),
        attention_layer=ModuleSpec(attention_layer, layer, attention_parts),
        mlp_layer=ModuleSpec(mlp_layer, layer, mlp_parts),
    )
    return stack
