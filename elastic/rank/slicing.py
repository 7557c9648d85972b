"""Cut a submodel's tensors out of its parent, one tensor at a time, by the nested layout (docs/design.md 2)."""

from collections.abc import Callable, Mapping

from torch import Tensor

from elastic.space.axes import AXES, LANES
from elastic.space.layers import LAYER_PREFIX, parameter_dims, split_parameter_name
from elastic.space.nesting import Cut, take
from elastic.space.shape import ModelShape, Subnet, SubnetError

# Where full tensors come from: a dict, or a function that reads one tensor by name from disk.
TensorSource = Mapping[str, Tensor] | Callable[[str], Tensor]


def reader(source: TensorSource) -> Callable[[str], Tensor]:
    """Return the function that fetches one tensor by name, whichever form `source` has."""
    return source.__getitem__ if isinstance(source, Mapping) else source


def cut_parameter(tensor: Tensor, name: str, cut: Cut) -> Tensor:
    """Keep the nested part of one parameter along all its dimensions; a view where the layout allows it.

    Raises ValueError if `tensor` does not have the parent's size.
    """
    kinds = parameter_dims(name)
    if tensor.dim() != len(kinds):
        raise ValueError(f"{name} has {tensor.dim()} dimensions, expected {len(kinds)}")
    for dim, kind in enumerate(kinds):
        try:
            tensor = take(tensor, dim, cut.grid(kind))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return tensor


def parent_parameter(name: str, subnet: Subnet) -> str:
    """Return the parent's name of a submodel's parameter: layers of a submodel are numbered anew, without gaps."""
    local_index, rest = split_parameter_name(name)
    return name if local_index is None else f"{LAYER_PREFIX}{subnet.kept_layers[local_index]}.{rest}"


def submodel_source(source: TensorSource, parent: ModelShape, subnet: Subnet, lanes: int) -> Callable[[str], Tensor]:
    """Return a function that gives one tensor of the submodel by its own name, cut from the parent when asked.

    Each tensor has storage of its own and is differentiable back to the parent. Their sizes add up to
    `subnet_cost(parent, subnet).params`. Raises SubnetError or ShapeError if the subnet does not fit in the parent, or
    an FFN width, the parent's or the chosen one, cannot be dealt into `lanes`.
    """
    subnet.shape(parent)
    for layer_index in subnet.kept_layers:
        full, kept = parent.layer_widths(layer_index), subnet.layer_widths(parent, layer_index)
        for axis, width in (*full.items(), *kept.items()):
            if AXES[axis].parts == LANES and width % lanes:
                raise SubnetError(
                    f"subnet: {AXES[axis].size} = {width} of layer {layer_index} must be a multiple of "
                    f"lanes = {lanes}; nearest legal is {max(lanes, round(width / lanes) * lanes)}"
                )
    read = reader(source)

    def tensor_of(name: str) -> Tensor:
        parent_name = parent_parameter(name, subnet)
        layer_index, _ = split_parameter_name(parent_name)
        cut = Cut.of_layer(parent, layer_index, subnet.layer_widths(parent, layer_index), lanes=lanes)
        # Without the copy a cut view would keep the whole parent tensor in memory.
        return cut_parameter(read(parent_name), name, cut).clone()

    return tensor_of
