"""Initialise parameters from (seed, name) alone, so that every parallel layout starts from the same model."""

import hashlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor, nn

from elastic.model.sharding import shard_tensor, unshard_tensors
from elastic.space.layers import LAYER_PREFIX, DimKind, parameter_dims, split_parameter_name
from elastic.space.nesting import parameter_size
from elastic.space.shape import ModelShape


def initial_tensor(name: str, shape: ModelShape, seed: int, std: float) -> Tensor:
    """Draw the full initial value of one parameter, fp32.

    Projections are normal(0, std), those that write to the stream divided by sqrt(layers) as Megatron-Core does for
    hybrid models; A uniform in [1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1], the convolution uniform in
    +-1/sqrt(taps) (Mamba-2's own initialisation).
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    size = parameter_size(name, shape)
    suffix = name.rpartition(".")[2]
    if suffix == "A_log":
        return torch.empty(size).uniform_(1.0, 16.0, generator=generator).log()
    if suffix == "dt_bias":
        dt = torch.empty(size).uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp().clamp(min=1e-4)
        return dt + torch.log(-torch.expm1(-dt))
    if suffix in ("conv1d_weight", "conv1d_bias"):
        bound = 1.0 / math.sqrt(shape.conv_kernel)
        return torch.empty(size).uniform_(-bound, bound, generator=generator)
    if suffix == "D" or len(size) == 1:
        return torch.ones(size)
    writes_to_stream = parameter_dims(name)[0] is DimKind.HIDDEN
    scale = std / math.sqrt(len(shape.pattern)) if writes_to_stream else std
    return torch.empty(size).normal_(0.0, scale, generator=generator)


@torch.no_grad()
def initialize_parameters(
    model: HybridModel, shape: ModelShape, seed: int, std: float, tp_rank: int, tp_size: int
) -> None:
    """Fill every parameter of an ElasticModel stage; `named_global_parameters` gives names with global layers."""
    for name, parameter in named_global_parameters(model):
        full = initial_tensor(name, shape, seed, std)
        parameter.copy_(shard_tensor(full, name, shape, tp_rank, tp_size))


def named_global_parameters(model: HybridModel) -> list[tuple[str, nn.Parameter]]:
    """List parameters with global layer indices in their names, whatever the pipeline stage (docs/pitfalls.md 22).

    A tied head on a stage without the embedding is a second copy of it, and goes by the embedding's name.
    """
    named = []
    for name, parameter in model.named_parameters():
        local_layer_index, rest = split_parameter_name(name)
        if local_layer_index is not None:
            layer = model.get_submodule(f"{LAYER_PREFIX}{local_layer_index}")
            name = f"{LAYER_PREFIX}{layer.layer_number - 1}.{rest}"
        elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        named.append((name, parameter))
    return named


@torch.no_grad()
def gathered_parameters(model: HybridModel, shape: ModelShape) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Yield this stage's parameters one by one, by their global names: this rank's shard, and the whole.

    The ranks of a tensor-parallel group go through it together.
    """
    tp = model.pg_collection.tp
    for name, parameter in named_global_parameters(model):
        shards = [parameter.detach()]
        if tp.size() > 1:
            shards = [torch.empty_like(parameter) for _ in range(tp.size())]
            dist.all_gather(shards, parameter.detach().contiguous(), group=tp)
        yield name, parameter, unshard_tensors(shards, name, shape)
