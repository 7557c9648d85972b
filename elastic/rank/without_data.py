"""Score the widths of the parent without data, for comparison: by the size of its weights, or by chance.

Shapes: D hidden, F ffn, H Mamba heads, P Mamba head channels, q query heads.
"""

import math

import torch
from torch import Tensor

from elastic.model.forward import sum_over_world
from elastic.model.initialize import gathered_parameters
from elastic.model.model import ElasticModel
from elastic.rank.importance import Scores
from elastic.space.axes import INNER_AXIS, Axis, LayerKind
from elastic.space.layers import parameter_dims, split_parameter_name
from elastic.space.nesting import parameter_grids
from elastic.space.shape import ModelShape


@torch.no_grad()
def magnitude_scores(model: ElasticModel, shape: ModelShape) -> Scores:
    """Return the L2 norm of what each part owns: all entries of rows and columns that a cut without it leaves out.

    Of matrices and the convolution's taps; norms, biases, A, D and dt are left out. The same on every rank, which all
    call it: of every parameter one replica's first tensor-parallel rank counts the whole.
    """
    hidden, inner = _zeros(shape, next(model.parameters()).device)
    groups = model.pg_collection
    counts = groups.dp.rank() == groups.tp.rank() == groups.cp.rank() == 0
    for name, _, full in gathered_parameters(model, shape):
        layer_index, _ = split_parameter_name(name)
        is_copy = layer_index is None and name.startswith("embedding") and not model.pre_process  # a tied head
        if not counts or is_copy or full.dim() < 2:
            continue
        for dim, (kind, grid) in enumerate(zip(parameter_dims(name), parameter_grids(name, shape), strict=True)):
            others = [other for other in range(full.dim()) if other != dim]
            wide = torch.promote_types(full.dtype, torch.float32)
            rows = torch.linalg.vector_norm(full, dim=others, dtype=wide).double().square()
            runs = [math.prod(block.full) for block in grid.blocks]
            for run, directions in zip(rows.view(grid.outer, -1).split(runs, 1), kind.blocks.values(), strict=True):
                if directions == (Axis.HIDDEN,):
                    hidden += run.reshape(-1)
                elif layer_index is not None and directions[:1] == (INNER_AXIS[shape.pattern.kinds[layer_index]],):
                    own = inner[layer_index]
                    if len(directions) >= own.dim():  # not dt, a row of the head alone
                        own += run.reshape(*own.shape, -1).sum(-1)
    for total in (hidden, *inner):
        sum_over_world(total)
    return _scores(shape, hidden.sqrt(), [own.sqrt() for own in inner])


def random_scores(shape: ModelShape, seed: int) -> Scores:
    """Return scores drawn by chance, the same on every rank: every order of parts is as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = _zeros(shape, torch.device("cpu"))
    for total in (hidden, *inner):
        total.uniform_(generator=generator)
    return _scores(shape, hidden, inner)


def _zeros(shape: ModelShape, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return fp64 [D] and, of each layer, [F], [H, P] or [q]."""
    inner = []
    for layer_index, kind in enumerate(shape.pattern.kinds):
        channels = (shape.head_channels,) if kind is LayerKind.MAMBA else ()
        inner.append(torch.zeros(shape.width(layer_index), *channels, dtype=torch.float64, device=device))
    return torch.zeros(shape.hidden, dtype=torch.float64, device=device), inner


def _scores(shape: ModelShape, hidden: Tensor, inner: list[Tensor]) -> Scores:
    """Put scores where those of activations stand. A head counts with all of its channels."""
    mlp, mamba, attention = (
        tuple(inner[layer_index].cpu() for layer_index in shape.pattern.layers_of(kind))
        for kind in (LayerKind.MLP, LayerKind.MAMBA, LayerKind.ATTENTION)
    )
    return Scores(hidden.cpu(), mlp, mamba, attention, num_top_channels=shape.head_channels, num_tokens=0)
