"""Which module stands where: the elastic specs, and the plain ones of a stock HybridModel with the same kernels."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from elastic.model.attention import ElasticAttentionLayer, ElasticSelfAttention, SdpaCoreAttention
from elastic.model.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from elastic.model.mamba import ElasticMambaLayer, ElasticMambaMixer, PortableMambaMixer
from elastic.model.mlp import ElasticMLP, ElasticMLPLayer
from elastic.model.norm import ElasticRMSNorm
from elastic.model.stack import ElasticStack
from elastic.model.state_space import MambaSsmStateSpace, StateSpaceBackend, TorchStateSpace
from elastic.space.layers import DimKind
from elastic.space.space import Space


@dataclass(frozen=True)
class Kernels:
    """The parts that differ between a GPU and a CPU, chosen here and nowhere else."""

    state_space: StateSpaceBackend
    core_attention: type

    @classmethod
    def choose(cls, device: torch.device | None = None) -> "Kernels":
        """Pick mamba-ssm and Transformer Engine on CUDA, PyTorch otherwise."""
        if (device or torch.device("cuda" if torch.cuda.is_available() else "cpu")).type == "cuda":
            from megatron.core.extensions.transformer_engine import TEDotProductAttention

            return cls(MambaSsmStateSpace(), TEDotProductAttention)
        return cls(TorchStateSpace(), SdpaCoreAttention)


def elastic_stack_spec(space: Space, kernels: Kernels) -> ModuleSpec:
    """Assemble the elastic stack: every module subclasses the Megatron-Core module of the same place."""

    def column(rows: DimKind) -> Any:
        return partial(ElasticColumnParallelLinear, rows=rows, columns=DimKind.HIDDEN)

    def row(columns: DimKind) -> Any:
        return partial(ElasticRowParallelLinear, rows=DimKind.HIDDEN, columns=columns)

    def as_spec(builder: Any) -> ModuleSpec:  # the mixer builds its linears from specs, the other layers by calling
        return ModuleSpec(module=builder.func, params=builder.keywords)

    mixer = ModuleSpec(
        module=ElasticMambaMixer,
        params={"state_space": kernels.state_space, "d_conv": space.parent.conv_kernel},
        submodules=MambaMixerSubmodules(in_proj=as_spec(column(DimKind.IN_PROJ)), out_proj=as_spec(row(DimKind.INNER))),
    )
    attention = SelfAttentionSubmodules(
        linear_qkv=column(DimKind.QKV), core_attention=kernels.core_attention, linear_proj=row(DimKind.CONTEXT)
    )
    mlp = MLPSubmodules(linear_fc1=column(DimKind.FFN), linear_fc2=row(DimKind.FFN))
    return _stack_spec(
        ModuleSpec(module=ElasticStack, params={"space": space}),
        layers=(ElasticMambaLayer, ElasticAttentionLayer, ElasticMLPLayer),
        norm=ElasticRMSNorm,
        mixer=mixer,
        attention=ModuleSpec(
            module=ElasticSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        mlp=partial(ElasticMLP.as_mlp_submodule, submodules=mlp),
    )


def plain_stack_spec(kernels: Kernels, conv_kernel: int = 4) -> ModuleSpec:
    """Assemble a stock HybridStack with the same kernels: what checkpoints must load into, and what speed is held to.

    Build it with `post_layer_norm` False on a CPU; HybridStack's own final norm is Transformer Engine's.
    """
    mixer = ModuleSpec(
        module=PortableMambaMixer,
        params={"state_space": kernels.state_space, "d_conv": conv_kernel},
        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=kernels.core_attention, linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return _stack_spec(
        ModuleSpec(module=_PlainStack),
        layers=(MambaLayer, TransformerLayer, MLPLayer),
        norm=ElasticRMSNorm,
        mixer=mixer,
        attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
    )


class _PlainStack(HybridStack):
    """HybridStack with a final norm that runs without Transformer Engine."""

    def __init__(self, config: Any, submodules: Any, post_process: bool = True, **kwargs: Any) -> None:
        super().__init__(config, submodules, post_layer_norm=False, post_process=post_process, **kwargs)
        if post_process:
            self.final_norm = ElasticRMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
            self.post_layer_norm = True


def _stack_spec(stack: ModuleSpec, *, layers: tuple, norm: type, mixer: Any, attention: Any, mlp: Any) -> ModuleSpec:
    mamba_layer, attention_layer, mlp_layer = layers
    stack.submodules = HybridStackSubmodules(
        mamba_layer=ModuleSpec(
            module=mamba_layer,
            submodules=MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
        ),
        attention_layer=ModuleSpec(
            module=attention_layer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
            ),
        ),
        mlp_layer=ModuleSpec(
            module=mlp_layer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=mlp, mlp_bda=get_bias_dropout_add),
        ),
    )
    return stack
