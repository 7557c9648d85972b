"""What the layers remember of sequences while they are decoded: an argument of the call, never a slot on a module.

The sequences of a batch need not be equally long, nor go on by equally many tokens: a call's tokens are filled up to
its longest row, and what fills up leaves no trace in a cache.

Shapes: B batch, S new tokens, T tokens so far, KV key/value heads, A channels of a head, H Mamba heads, P head
channels, N state, k convolution taps; lower case = this tensor-parallel rank's shard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from elastic.space.axes import LayerKind
from elastic.space.layers import DimKind
from elastic.space.nesting import Cut
from elastic.space.shape import ModelShape, Subnet


@dataclass(frozen=True)
class NextTokens:
    """The tokens [B, S] of one call: row b holds `counts[b]` next ones of a sequence of `before[b]`, then fillers."""

    before: tuple[int, ...]
    counts: tuple[int, ...]
    length: int
    device: torch.device

    @property
    def ends(self) -> tuple[int, ...]:
        """Return how long each sequence is with them."""
        return tuple(before + count for before, count in zip(self.before, self.counts, strict=True))

    @property
    def are_even(self) -> bool:
        """Tell whether all rows begin at the same place and are full, so that no token needs a place of its own."""
        return len(set(self.before)) == 1 and set(self.counts) == {self.length}

    @property
    def have_fillers(self) -> bool:
        """Tell whether some row is not full."""
        return any(count < self.length for count in self.counts)

    @cached_property
    def fillers(self) -> Tensor:
        """Return which tokens only fill up a row, [B, S]."""
        return self._steps >= torch.tensor(self.counts, device=self.device)[:, None]

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return of every token that is none the row, the place in the row, and the place in its sequence."""
        rows, columns = (~self.fillers).nonzero(as_tuple=True)
        return rows, columns, torch.tensor(self.before, device=self.device)[rows] + columns

    @cached_property
    def seen(self) -> Tensor | None:
        """Return which keys a query sees, [B, 1, S, T], alike for all heads; None: those in front of it, as is.

        That is enough where rows begin together: fillers come last, so no token sees them.
        """
        if len(set(self.before)) == 1:
            return None
        ends = torch.tensor(self.before, device=self.device)[:, None] + self._steps + 1  # [B, S]
        return (torch.arange(max(self.ends), device=self.device) < ends.unsqueeze(-1)).unsqueeze(1)

    @cached_property
    def _steps(self) -> Tensor:
        return torch.arange(self.length, device=self.device).expand(len(self.counts), -1)


@dataclass
class AttentionCache:
    """Keys and values [B, kv, capacity, A], of which as many are filled as a sequence has tokens."""

    keys: Tensor
    values: Tensor

    def append(self, key: Tensor, value: Tensor, tokens: NextTokens) -> tuple[Tensor, Tensor]:
        """Keep the next tokens' key and value [S, B, kv, A]; returns those so far, [B, kv, T, A] each, as views.

        T is the longest sequence's; what follows a shorter one there is nobody's to see. Fillers are not kept.
        """
        end = max(tokens.ends)
        assert end <= self.keys.shape[2], f"{end} tokens in a cache for {self.keys.shape[2]}"
        for kept, new in ((self.keys, key), (self.values, value)):
            if tokens.are_even:
                kept[:, :, tokens.before[0] : end] = new.permute(1, 2, 0, 3)
            else:
                rows, columns, places = tokens.places
                kept[rows, :, places] = new[columns, rows]
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class MambaCache:
    """The last inputs of the convolution [B, k-1, x B C] and the state [B, h, P, N], at least fp32."""

    conv_inputs: Tensor
    state: Tensor

    def inputs_after(self, conv_in: Tensor, tokens: NextTokens) -> Tensor:
        """Return each row's last k-1 inputs, none a filler's, [B, k-1, x B C] with `conv_in` [B, S, x B C]."""
        together = torch.cat([self.conv_inputs, conv_in], dim=1)
        taps = torch.arange(self.conv_inputs.shape[1], device=conv_in.device)
        last = torch.tensor(tokens.counts, device=conv_in.device)[:, None] + taps  # [B, k-1]
        return together.gather(1, last.unsqueeze(-1).expand(-1, -1, together.shape[2]))


LayerCache = AttentionCache | MambaCache


@dataclass(frozen=True)
class LayerMemory[C: LayerCache]:
    """What one layer gets in a call: its cache, and which tokens are the next ones."""

    cache: C
    tokens: NextTokens


@dataclass
class ModelCache:
    """The caches of the layers a subnet keeps, by global index (an MLP remembers nothing), and the tokens so far."""

    layers: dict[int, LayerCache]
    lengths: tuple[int, ...]

    def next_tokens(self, tokens: Tensor, counts: Sequence[int] | None) -> NextTokens:
        """Describe `tokens` [B, S] as the next ones; `counts` None: all of them are."""
        batch, length = tokens.shape
        taken = (length,) * batch if counts is None else tuple(counts)
        assert len(self.lengths) == batch == len(taken) and max(taken) == length and min(taken) >= 0
        return NextTokens(self.lengths, taken, length, tokens.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all sequences but those, one layer after another."""
        for index, layer in self.layers.items():
            kept = {name: tensor[list(rows)] for name, tensor in vars(layer).items()}
            self.layers[index] = replace(layer, **kept)
        self.lengths = tuple(self.lengths[row] for row in rows)


@dataclass(frozen=True)
class CallMemory:
    """A model's caches during one call."""

    layers: Mapping[int, LayerCache]
    tokens: NextTokens

    def of(self, layer_index: int) -> LayerMemory | None:
        """Return a layer's own; None where it remembers nothing."""
        cache = self.layers.get(layer_index)
        return None if cache is None else LayerMemory(cache, self.tokens)


def empty_cache(
    parent: ModelShape,
    subnet: Subnet,
    capacity_tokens: int,
    *,
    batch: int = 1,
    tensor_parallel: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> ModelCache:
    """Make room for `capacity_tokens` tokens of `batch` sequences in the layers, heads and channels `subnet` keeps."""
    layers: dict[int, LayerCache] = {}
    for layer_index in subnet.kept_layers:
        kind = parent.pattern.kinds[layer_index]
        if kind is LayerKind.ATTENTION:
            size = (batch, parent.kv_heads // tensor_parallel, capacity_tokens, parent.attention_channels)
            keys, values = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
            layers[layer_index] = AttentionCache(keys, values)
        elif kind is LayerKind.MAMBA:
            widths = subnet.layer_widths(parent, layer_index)
            cut = Cut.of_layer(parent, layer_index, widths, tensor_parallel=tensor_parallel)
            conv_channels, heads = (cut.grid(dim).kept_size for dim in (DimKind.CONV, DimKind.MAMBA_HEAD))
            wide = torch.promote_types(dtype, torch.float32)  # the state sums over the whole sequence
            layers[layer_index] = MambaCache(
                torch.zeros(batch, parent.conv_kernel - 1, conv_channels, dtype=dtype, device=device),
                torch.zeros(batch, heads, subnet.head_channels, parent.mamba_state, dtype=wide, device=device),
            )
    return ModelCache(layers, (0,) * batch)
