"""The elastic Mamba-2 mixer and its layer.

Shapes: S sequence, B batch, D hidden, G groups, H heads, P head channels, N state, I = H*P; lower case = this rank.
The input projection packs its rows as [z, x, B, C, dt]; the convolution runs over [x, B, C].
"""

from functools import partial
from typing import Any

import torch
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from elastic.model.cache import LayerMemory, MambaCache
from elastic.model.documents import Documents
from elastic.model.elementwise import TorchElementwise
from elastic.model.masks import ElasticLayer, LayerGates
from elastic.model.norm import GatedGroupNorm, parameter_device
from elastic.model.observe import LayerObserver
from elastic.model.recompute import between_products
from elastic.model.state_space import TorchStateSpace
from elastic.space.axes import Axis
from elastic.space.layers import FP32_PARAMETERS, DimKind
from elastic.space.nesting import Cut, take, take_each


class PortableMambaMixer(MambaMixer):
    """Megatron-Core's mixer with an exchangeable state-space backend.

    Only construction and the state-space part are replaced: the original constructor needs mamba-ssm and a GPU. The
    stock forward pass, context parallelism and sharded checkpoint are inherited, so a stock HybridModel can use it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        state_space: TorchStateSpace,
        elementwise: TorchElementwise,
        d_conv: int = 4,
        layer_number: int | None = None,
        pg_collection: Any = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        MegatronModule.__init__(self, config)
        self.state_space, self.elementwise = state_space, elementwise
        self.d_model, self.d_conv = d_model, d_conv
        self.layer_number, self.pp_layer_offset = layer_number, pp_layer_offset
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate, self.use_mem_eff_path = False, True, False, True
        self.d_state, self.headdim = config.mamba_state_dim, config.mamba_head_dim
        self.nheads, self.ngroups = config.mamba_num_heads, config.mamba_num_groups
        tp = self.tp_group.size()
        self.d_inner = self.nheads * self.headdim
        self.nheads_local_tp, self.ngroups_local_tp = self.nheads // tp, self.ngroups // tp
        self.d_inner_local_tp = self.d_inner // tp
        state = self.ngroups_local_tp * self.d_state
        common = dict(config=config, bias=False, tp_group=self.tp_group)
        packed = 2 * self.d_inner + 2 * self.ngroups * self.d_state + self.nheads
        self.in_proj = build_module(submodules.in_proj, d_model, packed, init_method=config.init_method, **common)
        common |= dict(init_method=config.output_layer_init_method, input_is_parallel=True, skip_bias_add=True)
        self.out_proj = build_module(submodules.out_proj, self.d_inner, d_model, **common)
        inner, heads = self.d_inner_local_tp, self.nheads_local_tp
        self.in_proj.weight.partition_sizes = [inner, inner, state, state, heads]

        def sharded(*shape: int, dtype: torch.dtype = config.params_dtype) -> nn.Parameter:
            parameter = nn.Parameter(torch.zeros(*shape, dtype=dtype, device=parameter_device(config)))
            parameter.tensor_model_parallel, parameter.partition_dim = True, 0  # type: ignore[attr-defined]
            return parameter

        self.conv1d_weight, self.conv1d_bias = sharded(inner + 2 * state, 1, d_conv), sharded(inner + 2 * state)
        for parameter in (self.conv1d_weight, self.conv1d_bias):
            parameter.partition_sizes = [inner, state, state]  # type: ignore[attr-defined]
        wide = torch.promote_types(config.params_dtype, torch.float32)
        for name in ("dt_bias", "A_log", "D"):
            dtype = wide if f"mixer.{name}" in FP32_PARAMETERS else config.params_dtype
            self.register_parameter(name, sharded(heads, dtype=dtype))
        self.norm = GatedGroupNorm(inner, config, self.tp_group, config.layernorm_epsilon, elementwise)
        self.cp = self._context_parallel(None)

    def _context_parallel(self, cut: Cut | None) -> MambaContextParallel:
        """Bundle the (cut) convolution and per-head parameters with Megatron-Core's context-parallel exchange."""

        dt_bias, a_log, d = self.dt_bias, self.A_log, self.D
        convolution: tuple[Tensor, ...] = (self.conv1d_weight, self.conv1d_bias)
        if cut is not None:
            convolution = take_each(convolution, 0, cut.grid(DimKind.CONV))
            if not (heads := cut.grid(DimKind.MAMBA_HEAD)).is_whole:
                # One copy for the three, in the precision that the scan takes them in anyway.
                dt_bias, a_log, d = take(torch.stack((dt_bias, a_log, d)), 1, heads).unbind()
        return MambaContextParallel(
            cp_group=self.pg_collection.cp,
            d_inner_local_tp=self.d_inner_local_tp if cut is None else cut.grid(DimKind.INNER).kept_size,
            nheads_local_tp=len(dt_bias),
            ngroups_local_tp=self.ngroups_local_tp,
            d_state=self.d_state,
            conv1d_weight_cp1=convolution[0],
            conv1d_bias_cp1=convolution[1],
            conv1d_padding=self.d_conv - 1,
            dt_bias_cp1=dt_bias,
            A_log_cp1=a_log,
            D_cp1=d,
            D_has_hdim=False,
        )

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: Any = None) -> Tensor:
        """Run the stock call: state space, then the gated norm over all channels."""
        if packed_seq_params is not None:
            raise ValueError("packed sequences are not supported: the state would leak from document to document")
        y, z = self._state_space(zxBCdt, self.cp)
        if self.cp.cp_size > 1:
            y, z = (self.cp.post_conv_ssm(t.contiguous()) for t in (y, z))
        return self.norm(y, z, self.ngroups_local_tp, self.d_inner // self.ngroups)

    def _state_space(
        self,
        zxBCdt: Tensor,
        cp: MambaContextParallel,
        memory: LayerMemory[MambaCache] | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve and scan whole sequences [S, B, z x B C dt], from where a memory ends; returns y and z [S, B, i].

        Both begin anew at the start of each document. A filler takes no time, so that the state stays what it was.
        """
        state = cp.ngroups_local_tpcp * cp.d_state
        inner, heads = cp.d_inner_local_tpcp, cp.nheads_local_tpcp
        z, conv_in, dt = zxBCdt.transpose(0, 1).split([inner, inner + 2 * state, heads], dim=-1)
        before, last_state, inputs_after = None, None, None
        if memory is not None:
            before, last_state = memory.cache.conv_inputs, memory.cache.state
            if memory.tokens.have_fillers:
                inputs_after = memory.cache.inputs_after(conv_in, memory.tokens)
                dt = dt.masked_fill(memory.tokens.fillers.unsqueeze(-1), float("-inf"))  # its softplus is 0
        positions, numbers = (None, None) if documents is None else (documents.positions, documents.numbers)
        conv_weight, conv_bias = cp.get_conv1d_weight().squeeze(1), cp.get_conv1d_bias()
        a_log = cp.get_A_log()

        def scan(xbc: Tensor) -> Tensor:
            x, b, c = xbc.split([inner, state, state], dim=-1)
            return self.state_space.scan(
                x.unflatten(-1, (heads, -1)),
                dt,
                cp.get_dt_bias(),
                -torch.exp(a_log.to(torch.promote_types(a_log.dtype, torch.float32))),
                b.unflatten(-1, (cp.ngroups_local_tpcp, -1)),
                c.unflatten(-1, (cp.ngroups_local_tpcp, -1)),
                cp.get_D(),
                last_state,
                numbers,
            )

        xbc = partial(self.elementwise.causal_conv, conv_in, conv_weight, conv_bias, before, positions)
        y = between_products(self.config, xbc, scan)
        if before is not None and inputs_after is not None:
            before.copy_(inputs_after)
        return y.flatten(-2).transpose(0, 1), z.transpose(0, 1)


class ElasticMambaMixer(PortableMambaMixer):
    """Heads are elastic inside each SSM group, channels inside each head; B, C and the state stay."""

    def forward_gated(
        self,
        x: Tensor,
        gates: LayerGates,
        observer: LayerObserver | None = None,
        memory: LayerMemory[MambaCache] | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Map [S, B, D] to [S, B, D] under the layer's head and channel gates; x goes on where the memory ends."""
        cut = gates.cut
        inner = cut.grid(DimKind.INNER)
        cp = self.cp if cut.grid(DimKind.IN_PROJ).is_whole else self._context_parallel(cut)
        zxbcdt = self.in_proj.forward_cut(x, cut)
        if observer is not None:
            x_rows = zxbcdt.narrow(-1, inner.kept_size, inner.kept_size)
            observer.mamba_inner(x_rows.unflatten(-1, (cp.nheads_local_tp, -1)))
        y, z = self._state_space(cp.pre_conv_ssm(zxbcdt), cp, memory, documents)
        if cp.cp_size > 1:  # back to this rank's tokens, whose own z never left
            y, z = cp.post_conv_ssm(y.contiguous()), zxbcdt[..., : inner.kept_size]
        heads, channels = gates[Axis.MAMBA_HEAD], gates[Axis.MAMBA_CHANNEL]
        gate, active = _outer(heads.vector, channels.vector, cp.nheads_local_tp, self.headdim), None
        if gate is None:
            active = heads.active * channels.active / self.ngroups  # of one group
        weight = take(self.norm.weight, 0, inner)
        normalised = partial(self.norm, y, z, self.ngroups_local_tp, active, gate, weight)
        return between_products(self.config, normalised, partial(self.out_proj.forward_cut, cut=cut))


def _outer(heads: Tensor | None, channels: Tensor | None, num_heads: int, num_channels: int) -> Tensor | None:
    """Return the gate of every channel of every head [i] from those of heads and of channels; None: all ones."""
    if heads is None or channels is None:
        alone = channels if heads is None else heads.unsqueeze(-1)
        return None if alone is None else alone.expand(num_heads, num_channels).flatten()
    return (heads.unsqueeze(-1) * channels).flatten()


class ElasticMambaLayer(ElasticLayer, MambaLayer):
    """x + g_depth g_hidden Mamba(norm(x))."""

    norm_and_function = ("norm", "mixer")
