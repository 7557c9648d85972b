"""What a forward pass shows to whoever asks for it: an argument of the call, never a hook or a slot on a module.

Shapes: S sequence, B batch, D hidden, F ffn, H Mamba or query heads, P Mamba head channels, A attention channels; lower
case = this tensor-parallel rank's shard. S is the context-parallel rank's part of the sequence.
"""

from collections.abc import Callable

from torch import Tensor


class LayerObserver:
    """Receives what one layer computes, and looks away unless told otherwise; the tensors belong to the layer and must
    not be changed.
    """

    def stream(self, before: Tensor, after: Tensor) -> None:
        """Receive the residual stream in front of the layer and behind it [S(/tp), B, D]."""

    def normalised(self, x: Tensor) -> None:
        """Receive the layer's normalised input [S(/tp), B, D]; under sequence parallelism this rank's tokens only."""

    def ffn(self, pre_activation: Tensor) -> None:
        """Receive an MLP's first projection before the activation [S, B, f]."""

    def mamba_inner(self, x: Tensor) -> None:
        """Receive the x slice of a Mamba layer's input projection before the convolution [S, B, h, P]."""

    def query(self, query: Tensor) -> None:
        """Receive an attention layer's query projection [S, B, h, A]."""


Observer = Callable[[int], LayerObserver]  # of each layer, by its index in the whole model
