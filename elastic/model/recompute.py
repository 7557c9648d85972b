"""Selective recompute: what stands between products is not kept, but made again when the backward pass asks for it."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def between_products(config: TransformerConfig, make: Callable[[], Tensor], use: Callable[[Tensor], Tensor]) -> Tensor:
    """Return use(make()); under selective recompute without keeping what `make` makes, its result included.

    The first thing that the backward pass wants of it calls `make` again, once. What `make` starts from stays, and so
    does what `use` keeps of its own: a product its result where the next step needs it, a scan its output. Gradients
    take the way they always take, so `use` may add them to a weight's buffer; `make` must give the same twice.
    """
    if config.recompute_granularity != "selective" or not torch.is_grad_enabled():
        return use(make())
    again = _Again(make)
    with saved_tensors_hooks(again.inside, again.find):
        made = make()
    again.storage = made.untyped_storage()
    with saved_tensors_hooks(again.outside, again.find):
        used = use(made)
    again.storage = None  # the graph holds on to `again`
    return used


class _Again:
    """The tensors that one `make` would have kept, by number; those that are views of its result below zero."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make
        self.storage: torch.UntypedStorage | None = None
        self.num_inside = 0
        self.views: list[tuple[torch.Size, tuple[int, ...], int]] = []
        self.made: dict[int, Tensor] = {}

    def inside(self, _tensor: Tensor) -> int:
        """Number a tensor that `make` keeps for its backward pass."""
        self.num_inside += 1
        return self.num_inside - 1

    def outside(self, tensor: Tensor) -> Tensor | int:
        """Number a view of what `make` made, and leave alone what is none."""
        if tensor.untyped_storage() is not self.storage:
            return tensor.detach()  # else an operation that keeps its own result would keep itself
        self.views.append((tensor.shape, tensor.stride(), int(tensor.storage_offset())))
        return -len(self.views)

    def find(self, kept: Any) -> Tensor:
        """Return a tensor for the backward pass, and forget it: the last reader's memory is free at once."""
        if isinstance(kept, Tensor):
            return kept
        if kept not in self.made:
            self._make_again()
        return self.made.pop(kept)

    def _make_again(self) -> None:
        inside: list[Tensor] = []
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: inside.append(tensor.detach()), _never):
            result = self.make().detach()
        assert len(inside) == self.num_inside, "what is made again must be made in the same way"
        self.made = dict(enumerate(inside))
        self.made |= {-1 - number: result.as_strided(*view) for number, view in enumerate(self.views)}


def _never(_nothing: None) -> Tensor:
    raise AssertionError("the graph of what is made again has no backward pass of its own")
