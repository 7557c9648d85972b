"""The parent's checkpoint names are Megatron-Core's own: a stock HybridModel reads an elastic checkpoint and back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from elastic.modules.cpu_backend import use_cpu_backend
from elastic.modules.initialize import named_global_parameters
from elastic.modules.model import Layout
from elastic.space.axes import Axis, AxisChoices, Space
from elastic.space.shape import ModelShape
from tests.distributed.harness import run_distributed
from tests.parity.model_factory import (
    build_lively,
    build_stock,
    fill,
    lively_tensor,
    one_process,
    relative_error,
    shape_of,
    tokens_for,
)

PATTERN = "M-M*-M-"


def _space(tied: bool = False) -> Space:
    shape = shape_of(PATTERN, vocab=60, tied_embeddings=tied)
    choices = {Axis.HIDDEN: AxisChoices((24, 12)), Axis.FFN: AxisChoices((16, 8), per_layer=True)}
    return Space(shape, choices, lanes=4)


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


def _save(model: torch.nn.Module, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None)), str(folder))


def _load_strictly(model: torch.nn.Module, folder: Path) -> None:
    """Load so that a missing, unexpected or wrongly sized tensor on either side raises."""
    sharded = model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
    loaded = dist_checkpointing.load(sharded, str(folder), strict="raise_all")
    model.load_state_dict(loaded, strict=True)


def _stock_logits(model: HybridModel, tokens: Tensor) -> Tensor:
    return model(tokens, position_ids=None, attention_mask=None)


def _elastic_logits(space: Space, folder: Path | None = None) -> Tensor:
    model = build_lively(space)
    if folder is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        _load_strictly(model, folder)
    return (model(tokens_for(space.parent)) @ model.head_weight().T).transpose(0, 1)


def _blank_stock(shape: ModelShape) -> HybridModel:
    """Build a stock model whose every weight would spoil the logits unless the checkpoint replaces it."""
    model = build_stock(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_stock_model_reads_an_elastic_checkpoint(tied: bool, tmp_path: Path) -> None:
    space = _space(tied)
    _save(build_lively(space), tmp_path / "elastic")
    stock = _blank_stock(space.parent)
    _load_strictly(stock, tmp_path / "elastic")
    actual = _stock_logits(stock, tokens_for(space.parent))
    assert relative_error(actual, _elastic_logits(space)) <= 1e-5


def test_elastic_model_reads_a_stock_checkpoint(tmp_path: Path) -> None:
    space = _space()
    stock = build_stock(space.parent)
    # Other weights than build_lively's, so that only loading can bring them in.
    fill(
        stock,
        {name: lively_tensor(f"other {name}", space.parent) for name, _ in named_global_parameters(stock)}
        if False
        else {name: 0.9 * lively_tensor(name, space.parent) for name, _ in named_global_parameters(stock)},
        space.parent,
    )
    _save(stock, tmp_path / "stock")
    expected = _stock_logits(stock, tokens_for(space.parent))
    assert relative_error(_elastic_logits(space, tmp_path / "stock"), expected) <= 1e-5
    assert relative_error(_elastic_logits(space), expected) > 0.01


def test_names_and_sizes_are_those_of_the_stock_model() -> None:
    space = _space()
    elastic, stock = build_lively(space), build_stock(space.parent)
    sizes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (elastic, stock)]
    assert sizes[0] == sizes[1]
    keys = [
        {entry.key: entry.global_shape for entry in _tensors(model.sharded_state_dict())} for model in (elastic, stock)
    ]
    assert keys[0] == keys[1] and keys[0]


def _tensors(sharded: dict) -> Iterator[dist_checkpointing.ShardedTensor]:
    for entry in sharded.values():
        built = entry.build() if hasattr(entry, "build") else entry
        entries = built if isinstance(built, list) else [built]
        yield from (one for one in entries if isinstance(one, dist_checkpointing.ShardedTensor))


def _save_elastic_rank(folder: str, tensor: int, pipeline: int, tied: bool) -> None:
    use_cpu_backend()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    _save(build_lively(_space(tied), Layout(tensor=tensor, pipeline=pipeline)), Path(folder))


@pytest.mark.parametrize(("tensor", "pipeline", "tied"), [(2, 1, False), (1, 2, True), (2, 2, False)])
def test_pitfall_22_stock_model_reads_a_checkpoint_of_another_layout(
    tensor: int, pipeline: int, tied: bool, tmp_path: Path
) -> None:
    """Layers keep their global numbers and every block of a sharded row dimension finds its place again."""
    run_distributed(_save_elastic_rank, tensor * pipeline, str(tmp_path / "sharded"), tensor, pipeline, tied)
    space = _space(tied)
    stock = _blank_stock(space.parent)
    _load_strictly(stock, tmp_path / "sharded")
    actual = _stock_logits(stock, tokens_for(space.parent))
    assert relative_error(actual, _elastic_logits(space)) <= 1e-5
