"""The elastic squared-ReLU MLP and its layer. Shapes: S sequence, B batch, D hidden, F ffn; lower case = this rank."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from elastic.model.documents import Documents
from elastic.model.elementwise import TorchElementwise
from elastic.model.masks import ElasticLayer, LayerGates
from elastic.model.observe import LayerObserver
from elastic.model.recompute import between_products
from elastic.space.axes import Axis


@dataclass
class ElasticMLPSubmodules(MLPSubmodules):
    """What an MLP is built of, its activation included."""

    elementwise: TorchElementwise = field(default_factory=TorchElementwise)


class ElasticMLP(MLP):
    """W2 (g_ffn * relu(W1 x)^2)."""

    def __init__(self, config: TransformerConfig, submodules: ElasticMLPSubmodules, **kwargs: Any) -> None:
        super().__init__(config, submodules, **kwargs)
        self.elementwise = submodules.elementwise

    def forward_gated(
        self,
        x: Tensor,
        gates: LayerGates,
        observer: LayerObserver | None = None,
        cache: None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Map [S, B, D] to [S, B, D] under the layer's ffn gates; a token sees itself, whatever its document."""
        pre_activation = self.linear_fc1.forward_cut(x, gates.cut)  # [S, B, f]
        if observer is not None:
            observer.ffn(pre_activation)
        neurons = partial(self.elementwise.squared_relu, pre_activation, gates[Axis.FFN].vector)
        return between_products(self.config, neurons, partial(self.linear_fc2.forward_cut, cut=gates.cut))


class ElasticMLPLayer(ElasticLayer, MLPLayer):
    """x + g_depth g_hidden MLP(norm(x))."""

    norm_and_function = ("pre_mlp_layernorm", "mlp")
