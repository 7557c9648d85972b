"""A whole model with the Triton kernels (interpreted on a CPU): the same numbers, few operations, few bytes."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.kernels import causal_conv, gated, gated_norm
from elastic.model.attention import SdpaCoreAttention
from elastic.model.backends import Kernels
from elastic.model.elementwise import TritonElementwise
from elastic.model.model import Layout
from elastic.model.state_space import TorchStateSpace
from elastic.plan.live import LiveBytes, MovedBytes
from elastic.plan.stand_ins import StandInStateSpace
from elastic.space.axes import Axis, LayerKind
from elastic.space.gates import Gates
from elastic.space.space import AxisChoices, Space
from tests.parity.model_factory import (
    SPACES,
    Outcome,
    build_lively,
    build_stock,
    choices_to_test,
    one_process,
    outcome_of,
    relative_error,
    shape_of,
    soft_weights,
    tokens_for,
)


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


def outcome(space: Space, gates: str, dtype: torch.dtype, kernels: Kernels | None = None) -> Outcome:
    """Run a space's parent under soft masks, or cut, and return logits and the gradients of weights and gates.

    "documents" runs packed ones under a slice.
    """
    model = build_lively(space, Layout(dtype=dtype), kernels)
    weights = soft_weights(space, seed=3, dtype=dtype) if gates == "soft" else {}
    chosen = Gates.mask(weights) if weights else Gates.slice(space.subnet(choices_to_test(space)[0]))
    leaves = dict(model.named_parameters()) | {f"gate {axis}": weight for axis, weight in weights.items()}
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in (1, 4, 6)]).expand(2, -1)
    hidden = model(tokens_for(space.parent), chosen, positions=positions if gates == "documents" else None)
    return outcome_of((hidden @ model.head_weight(chosen).T).transpose(0, 1), leaves)


# Each kernel at widths that end inside and behind a tile, in as few layers as hold every kind; one space skips some.
WIDE = SPACES["four groups, five queries per KV head, depth 10"].axes
FOUR_GROUPS = Space(
    shape_of("M-*", mamba_groups=4, mamba_heads=24, ffn=32, attention_heads=10, kv_heads=2, conv_kernel=3),
    {axis: choices for axis, choices in WIDE.items() if axis is not Axis.DEPTH},
)


@pytest.mark.parametrize("space", [SPACES["one group, tied head, depth 3"], FOUR_GROUPS], ids=["one", "four"])
@pytest.mark.parametrize("gates", ["soft", "slice", "documents"])
def test_the_kernels_give_what_plain_pytorch_gives(space: Space, gates: str) -> None:
    """Within what plain PyTorch itself loses in fp32 against fp64."""
    exact, plain = (outcome(space, gates, dtype) for dtype in (torch.float64, torch.float32))
    found = outcome(space, gates, torch.float32, Kernels(TorchStateSpace(4), SdpaCoreAttention, TritonElementwise()))
    bound = 8 * relative_error(plain.logits, exact.logits)
    assert 0 < relative_error(found.logits, exact.logits) <= bound
    for leaf, expected in exact.gradients.items():
        own = relative_error(plain.gradients[leaf], expected)
        assert relative_error(found.gradients[leaf], expected) <= 8 * max(own, 1e-6), leaf


class Counted:
    """Stands for a Triton kernel: a launch counts as one operation and computes nothing."""

    def __init__(self, name: str, seen: Counter[str]) -> None:
        self.name, self.seen = name, seen

    def __getitem__(self, grid: object) -> Any:
        return lambda *_arguments, **_constants: self.seen.update([self.name])


NOT_COUNTED = ("empty", "new_empty", "detach", "_unsafe_view", "promote_types")


class Operations(TorchDispatchMode):
    """Counts operations that are no views and do more than allocate."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(NOT_COUNTED):
            self.seen.update([name])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return what is counted while every kernel is a stand-in; mamba-ssm's scan counts as nothing here."""
    counted: Counter[str] = Counter()
    for module in (causal_conv, gated, gated_norm):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(name, counted))
    return counted


SPACE = Space(
    shape_of("M*-", ffn=96, mamba_heads=8),  # as in the 12B: neurons four times the stream, inner channels twice
    {
        Axis.HIDDEN: AxisChoices((24, 20, 16)),
        Axis.FFN: AxisChoices((96, 64, 32)),
        Axis.MAMBA_HEAD: AxisChoices((8, 4, 2)),
        Axis.MAMBA_CHANNEL: AxisChoices((6, 5, 4)),
        Axis.ATTENTION_HEAD: AxisChoices((4, 2)),
        Axis.DEPTH: AxisChoices((3, 2)),
    },
    lanes=2,
    depth_ranking=(0, 1, 2),
)
KERNELS = Kernels(StandInStateSpace(MovedBytes()), SdpaCoreAttention, TritonElementwise())
# Forward and backward, the scan left out; a stock layer on Transformer Engine has some 12 / 25, 7 / 14 and 5 / 8. What
# a slice has beyond that are copies of the weights it keeps.
MOST = {
    ("mask", LayerKind.MAMBA): (10, 27),
    ("mask", LayerKind.ATTENTION): (10, 18),
    ("mask", LayerKind.MLP): (5, 14),
    ("slice", LayerKind.MAMBA): (15, 32),
    ("slice", LayerKind.ATTENTION): (7, 15),
    ("slice", LayerKind.MLP): (7, 14),
}


def layers_of(gates: Gates, recompute: Any = "none") -> list[tuple[LayerKind, nn.Module, Any]]:
    model = build_lively(SPACE, Layout(dtype=torch.bfloat16, recompute=recompute), KERNELS)
    resolved = model.decoder.masks.layers(gates)
    return list(zip(SPACE.parent.pattern.kinds, model.decoder.layers, resolved, strict=True))


@pytest.mark.parametrize("execution", ["mask", "slice"])
def test_layers_run_few_operations(execution: str, seen: Counter[str]) -> None:
    weights = soft_weights(SPACE, seed=1)
    cut = Gates.slice(SPACE.subnet(choices_to_test(SPACE)[0]))
    layers = layers_of(Gates.mask(weights) if execution == "mask" else cut)
    for kind, layer, gates in layers:
        width = gates.cut.kept(Axis.HIDDEN)
        x = torch.randn(8, 1, width, dtype=torch.bfloat16, requires_grad=True)
        layer(x, gates)  # the first time, the numbers of the kept rows are put on the device: once
        seen.clear()
        with Operations(seen):
            y = layer(x, gates)
        forward = Counter(seen)
        inputs, incoming = [x, *layer.parameters(), *_tensors(gates)], torch.ones_like(y)
        seen.clear()
        with Operations(seen):
            torch.autograd.grad(y, inputs, incoming, allow_unused=True)
        assert forward.total() <= MOST[execution, kind][0], forward
        assert seen.total() <= MOST[execution, kind][1], seen


def _tensors(gates: Any) -> list[Tensor]:
    """Return what a layer is handed; of depth and hidden an attention layer gets what is made once for all of them."""
    own = {axis: width for axis, width in gates.widths.items() if axis is not Axis.HIDDEN or gates.output is None}
    widths = [gates.hidden.active, *(tensor for width in own.values() for tensor in (width.active, width.vector))]
    output = gates.depth if gates.output is None else gates.output
    return [t for t in (*widths, output) if isinstance(t, Tensor) and t.requires_grad]


# Of what a plain layer keeps without recompute; what an attention layer keeps is mostly what its core needs.
MOST_SELECTIVE = {LayerKind.MAMBA: 0.67, LayerKind.ATTENTION: 0.81, LayerKind.MLP: 0.6}


def saved_bytes(layer: nn.Module, gates: Any) -> int:
    """Return the bytes a layer keeps alive for its backward pass: its input and what it makes, its own output aside."""
    with LiveBytes() as live:
        aside = [parameter.detach() for parameter in layer.parameters()]
        before = live.bytes
        x = torch.randn(256, 1, SPACE.parent.hidden, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x, gates)
        graph = (y if isinstance(y, Tensor) else y[0]).grad_fn
        del y
        assert graph is not None and aside
        return live.bytes - before


def test_masks_keep_little_more_than_plain_layers_and_selective_recompute_much_less(seen: Counter[str]) -> None:
    """Each kind of layer by itself."""
    gates = Gates.mask(soft_weights(SPACE, seed=1))
    plain = build_stock(SPACE.parent, Layout(dtype=torch.bfloat16), KERNELS)
    for (kind, layer, own), (_, again, _), stock in zip(
        layers_of(gates), layers_of(gates, "selective"), plain.decoder.layers, strict=True
    ):
        expected = saved_bytes(stock, None)
        assert saved_bytes(layer, own) <= 1.1 * expected, kind
        assert saved_bytes(again, own) <= MOST_SELECTIVE[kind] * expected, kind
