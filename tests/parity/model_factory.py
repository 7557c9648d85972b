"""Tiny elastic spaces and the models built from them, for every test that compares executions."""

import contextlib
import math
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from elastic.checkpoint.state import Trainable, load_checkpoint
from elastic.model.attention import SdpaCoreAttention
from elastic.model.backends import Kernels
from elastic.model.initialize import named_global_parameters
from elastic.model.model import ElasticModel, build_model, transformer_config
from elastic.model.sharding import pipeline_pattern, shard_tensor
from elastic.model.specs import plain_stack_spec
from elastic.model.state_space import TorchStateSpace
from elastic.space.axes import Axis
from elastic.space.gates import Gates
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape
from elastic.space.space import AxisChoices, Space
from elastic.world.groups import Layout, join_world
from tests.shapes import random_choice

Choice = Mapping[Axis, tuple[int, ...]]
A, C = Axis, AxisChoices

_SIZES = dict(vocab=61, hidden=24, head_channels=6, mamba_state=8, conv_kernel=4, attention_channels=4)


def shape_of(pattern: str, **sizes: object) -> ModelShape:
    """Build a tiny shape: 24 hidden, 16 FFN neurons, 4 Mamba heads in 2 groups, 4 query heads on 2 KV heads."""
    widths = dict(ffn=16, mamba_heads=4, mamba_groups=2, attention_heads=4, kv_heads=2)
    return ModelShape.uniform(pattern, **(_SIZES | widths | sizes))  # type: ignore[arg-type]


def _spaces() -> dict[str, Space]:
    return {
        "two groups, depth 7": Space(
            shape_of("M-M*-M-"),
            {
                A.HIDDEN: C((24, 17, 10)),
                A.FFN: C((16, 8), per_layer=True),
                A.MAMBA_HEAD: C((4, 2)),
                A.MAMBA_CHANNEL: C((6, 5, 3)),
                A.ATTENTION_HEAD: C((4, 2)),
                A.DEPTH: C((7, 5, 4)),
            },
            lanes=4,
            depth_ranking=(0, 3, 1, 2, 4, 6, 5),
        ),
        "one group, tied head, depth 3": Space(
            shape_of("M*-", mamba_groups=1, mamba_heads=3, kv_heads=1, head_channels=5, tied_embeddings=True),
            {
                A.HIDDEN: C((24, 13)),
                A.FFN: C((16, 9, 5)),
                A.MAMBA_HEAD: C((3, 2, 1)),
                A.MAMBA_CHANNEL: C((5, 3)),
                A.ATTENTION_HEAD: C((4, 3, 1)),
                A.DEPTH: C((3, 2)),
            },
            lanes=1,
            depth_ranking=(2, 0, 1),
        ),
        "four groups, five queries per KV head, depth 10": Space(
            shape_of(
                "MM-*M-*M--", mamba_groups=4, mamba_heads=24, ffn=32, attention_heads=10, kv_heads=2, conv_kernel=3
            ),
            {
                A.HIDDEN: C((24, 19, 11)),
                A.FFN: C((32, 24, 8), per_layer=True),
                A.MAMBA_HEAD: C((24, 16, 8)),
                A.MAMBA_CHANNEL: C((6, 4, 3)),
                A.ATTENTION_HEAD: C((10, 6, 2), per_layer=True),
                A.DEPTH: C((10, 8, 5)),
            },
            depth_ranking=(3, 0, 9, 4, 7, 1, 2, 6, 5, 8),
        ),
        "no attention": Space(
            shape_of("M-MM-"),
            {A.HIDDEN: C((24, 12)), A.FFN: C((16, 8), per_layer=True), A.MAMBA_HEAD: C((4, 2)), A.DEPTH: C((5, 3))},
            depth_ranking=(4, 0, 2, 1, 3),
        ),
        "no FFN": Space(
            shape_of("M*MM*M"),
            {A.HIDDEN: C((24, 15)), A.MAMBA_HEAD: C((4, 2)), A.ATTENTION_HEAD: C((4, 2)), A.DEPTH: C((6, 3))},
        ),
        "no Mamba": Space(
            shape_of("*-*-"),
            {A.HIDDEN: C((24, 7)), A.FFN: C((16, 8), per_layer=True), A.ATTENTION_HEAD: C((4, 2)), A.DEPTH: C((4, 2))},
        ),
        # Stock transformers cannot hold Mamba heads that differ between layers; everything else can.
        "Mamba heads per layer": Space(
            shape_of("M-M*M", mamba_heads=6, head_channels=5),
            {
                A.HIDDEN: C((24, 16)),
                A.FFN: C((16, 8)),
                A.MAMBA_HEAD: C((6, 4, 2), per_layer=True),
                A.MAMBA_CHANNEL: C((5, 4, 3)),
                A.ATTENTION_HEAD: C((4, 2)),
                A.DEPTH: C((5, 4)),
            },
        ),
    }


SPACES = _spaces()
EVERY_AXIS = SPACES["Mamba heads per layer"]


@contextlib.contextmanager
def one_process(backend: str = "gloo") -> Iterator[None]:
    """Provide Megatron-Core's process groups on a single process, this interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def lively_tensor(name: str, shape: ModelShape) -> Tensor:
    """Draw the full value of a parameter so that every part of the model matters, fp32, from its name alone.

    Larger than a training initialisation, and norm weights, D and biases are not constant, so that a missing
    weight or a wrong divisor shows in the logits.
    """
    size = parameter_size(name, shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.empty(size).normal_(generator=generator)
    match name.rpartition(".")[2]:
        case "A_log":
            return 0.5 * noise
        case "dt_bias":
            return noise - 1.0
        case "conv1d_weight" | "conv1d_bias":
            return 0.5 * noise
        case "D":
            return 1.0 + 0.5 * noise
        case _:
            return 1.0 + 0.3 * noise if len(size) == 1 else noise / math.sqrt(size[-1])


@torch.no_grad()
def fill(model: HybridModel, tensors: Mapping[str, Tensor], shape: ModelShape) -> None:
    """Copy full tensors, by their global names, into this rank's parameters."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in named_global_parameters(model):
        parameter.copy_(shard_tensor(tensors[name], name, shape, rank, size))


def small_chunks() -> Kernels:
    """Return the CPU kernels with a scan chunk of 4 tokens, so that short test sequences cross chunk borders."""
    return Kernels(TorchStateSpace(chunk_tokens=4), SdpaCoreAttention)


def build_lively(space: Space, layout: Layout | None = None, kernels: Kernels | None = None) -> ElasticModel:
    """Build this rank's part of a parent with `lively_tensor` weights."""
    model = build_model(space, layout or Layout(), kernels=kernels or small_chunks())
    names = [name for name, _ in named_global_parameters(model)]
    fill(model, {name: lively_tensor(name, space.parent) for name in names}, space.parent)
    return model


def submodel_space(shape: ModelShape) -> Space:
    """Return a space with nothing to choose: a standalone model of `shape`."""
    return Space(shape, {}, lanes=1)


def build_stock(shape: ModelShape, layout: Layout | None = None, kernels: Kernels | None = None) -> HybridModel:
    """Build Megatron-Core's own HybridModel with stock layers throughout; uninitialised."""
    layout, groups = layout or Layout(), ProcessGroupCollection.use_mpu_process_groups()
    return HybridModel(
        transformer_config(shape, layout),
        plain_stack_spec(kernels or small_chunks(), shape.conv_kernel),
        vocab_size=shape.vocab,
        max_sequence_length=1,
        hybrid_layer_pattern=pipeline_pattern(shape, layout.pipeline),
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="none",
        pg_collection=groups,
    )


@torch.no_grad()
def loaded_logits(parents: list[tuple[Path, ModelShape]], tokens: Tensor, tensor_parallel: int) -> list[Tensor]:
    """Load each checkpoint on this rank and return its rows of the logits [B, S, v]."""
    layout, found = Layout(tensor=tensor_parallel), []
    join_world(layout, torch.device("cpu"))
    for checkpoint, shape in parents:
        model = build_model(submodel_space(shape), layout).eval()
        load_checkpoint(checkpoint, Trainable(model))
        found.append((model(tokens) @ model.head_weight().T).transpose(0, 1))
    return found


def smallest_choice(space: Space) -> dict[Axis, tuple[int, ...]]:
    """Choose the narrowest width on every axis and slot: all axes reduced at once."""
    return {axis: (len(space.axes[axis].choices) - 1,) * space.num_slots(axis) for axis in Axis}


def choices_to_test(space: Space, count: int = 3, seed: int = 0) -> list[dict[Axis, tuple[int, ...]]]:
    """Return the narrowest choice and `count` random ones."""
    generator = torch.Generator().manual_seed(seed)
    return [smallest_choice(space), *(random_choice(space, generator) for _ in range(count))]


def one_hot_weights(space: Space, choice: Choice, dtype: torch.dtype = torch.float32) -> dict[Axis, Tensor]:
    """Return gate weights that are exactly 1 on the chosen widths, as leaves that want gradients."""
    return {
        axis: F.one_hot(torch.tensor(choice[axis]), len(space.axes[axis].choices)).to(dtype).requires_grad_()
        for axis in space.elastic_axes()
        if space.num_slots(axis)
    }


def soft_weights(space: Space, seed: int, dtype: torch.dtype = torch.float32) -> dict[Axis, Tensor]:
    """Return random probabilities over the choices of every elastic axis and slot, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return {
        axis: draw(space.num_slots(axis), len(space.axes[axis].choices)).softmax(-1).to(dtype).requires_grad_()
        for axis in space.elastic_axes()
    }


def tokens_for(shape: ModelShape, batch: int = 2, length: int = 11) -> Tensor:
    """Return random tokens [B, S]; 11 is no multiple of the test chunk of 4."""
    return torch.randint(0, shape.vocab, (batch, length), generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Outcome:
    """What one execution computed: logits [B, S, V] and gradients by full parameter name (absent: zero)."""

    logits: Tensor
    gradients: Mapping[str, Tensor]


def cotangent(logits: Tensor) -> Tensor:
    """Return fixed weights of the logits, so that every logit matters differently to the loss."""
    weights = torch.empty(logits.shape, dtype=torch.float64)
    return weights.normal_(generator=torch.Generator().manual_seed(3)).to(logits)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`."""
    difference, scale = (actual - expected).double().norm().item(), expected.double().norm().item()
    return difference / scale if scale > 0 else difference


def logits_of(model: ElasticModel, tokens: Tensor, gates: Gates | None) -> Tensor:
    """Return logits [B, S, V] of a whole model on one process."""
    return (model(tokens, gates) @ model.head_weight(gates).T).transpose(0, 1)


def outcome_of(logits: Tensor, leaves: Mapping[str, Tensor]) -> Outcome:
    """Push the fixed cotangent back; a leaf that is not reached has gradient None, recorded as zeros."""
    gradients = torch.autograd.grad(logits, list(leaves.values()), cotangent(logits), allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), gradients, strict=True)]
    return Outcome(logits.detach(), dict(zip(leaves, filled, strict=True)))
