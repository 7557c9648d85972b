"""All tensors of a permuted parent, or of a submodel, at once; the verbs make them one by one."""

from torch import Tensor

from elastic.rank.permutation import Ranking, permute_parameter
from elastic.rank.slicing import TensorSource, reader, submodel_source
from elastic.space.layers import parameter_names
from elastic.space.shape import ModelShape, Subnet


def permuted_tensors(source: TensorSource, parent: ModelShape, ranking: Ranking, lanes: int) -> dict[str, Tensor]:
    read = reader(source)
    return {name: permute_parameter(read(name), name, parent, ranking, lanes) for name in parameter_names(parent)}


def submodel_tensors(source: TensorSource, parent: ModelShape, subnet: Subnet, lanes: int) -> dict[str, Tensor]:
    read = submodel_source(source, parent, subnet, lanes)
    return {name: read(name) for name in parameter_names(subnet.shape(parent))}
