"""The value check of an export agrees with the slicing code on random subnets, and notices every kind of slip."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from elastic.hf.config import ExportError
from elastic.hf.export_settings import DtypeRule, ExportSettings
from elastic.hf.folder import HfFolder
from elastic.hf.names import to_hf
from elastic.hf.nested_values import value_check
from elastic.rank.slicing import submodel_source
from elastic.space.layers import parameter_names
from elastic.space.nesting import parameter_size
from elastic.space.shape import Subnet
from elastic.space.space import Space
from tests.parity.model_factory import SPACES, choices_to_test

DISTINCT = torch.Generator().manual_seed(11)


def parent_tensors(space: Space) -> dict[str, Tensor]:
    """Return parameters in which every value is different, so that each slip shows."""
    return {
        name: torch.randn(parameter_size(name, space.parent), generator=DISTINCT)
        for name in parameter_names(space.parent)
    }


def exported(space: Space, subnet: Subnet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(to_hf(submodel_source(tensors, space.parent, subnet, space.lanes), subnet.shape(space.parent)))


def check(space: Space, subnet: Subnet, tensors: dict[str, Tensor], stored: dict[str, Tensor]) -> int:
    shape, exports = subnet.shape(space.parent), ExportSettings(DtypeRule(torch.float32))
    written = HfFolder(Path("nowhere"), shape, exports, stored, ())  # as if these were its values
    return value_check(tensors, space.parent, subnet, space.lanes)(written, shape).num_values


@pytest.mark.parametrize("name", SPACES)
def test_every_value_of_random_subnets_is_found_in_the_parent(name: str) -> None:
    space = SPACES[name]
    tensors, checked = parent_tensors(space), 0
    for choice in choices_to_test(space, count=6):
        subnet = space.subnet(choice)
        try:
            stored = exported(space, subnet, tensors)
        except ExportError:
            continue  # Mamba widths that differ between layers have no stock form
        assert check(space, subnet, tensors, stored) == sum(tensor.numel() for tensor in stored.values())
        halved = {key: tensor.bfloat16() for key, tensor in stored.items()}
        check(space, subnet, tensors, halved)
        checked += 1
    assert checked


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_covered_and_a_changed_value_is_named(tied: bool) -> None:
    space = SPACES["one group, tied head, depth 3" if tied else "four groups, five queries per KV head, depth 10"]
    subnet = space.subnet(choices_to_test(space)[1])
    tensors = parent_tensors(space)
    stored = exported(space, subnet, tensors)
    for name in stored:
        wrong = stored[name].clone()
        wrong[-1] += 1
        with pytest.raises(ExportError, match=name.replace(".", r"\.")):
            check(space, subnet, tensors, stored | {name: wrong})


def test_lanes_dealt_wrongly_are_noticed() -> None:
    space = SPACES["two groups, depth 7"]
    subnet = space.subnet(choices_to_test(space)[0])
    tensors = parent_tensors(space)
    dealt_wrongly = dict(to_hf(submodel_source(tensors, space.parent, subnet, 1), subnet.shape(space.parent)))
    with pytest.raises(ExportError, match="up_proj"):
        check(space, subnet, tensors, dealt_wrongly)
