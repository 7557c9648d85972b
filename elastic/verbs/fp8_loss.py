"""What FP8 costs: the held-out loss of every member as a bf16 export has it, and with products in FP8."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from elastic.blend.foreign import is_prepared
from elastic.config.load import Problem
from elastic.config.sections import DistillConfig, PreparedData
from elastic.data.held_out import HeldOut
from elastic.data.manifest import read_manifest
from elastic.data.tokens import open_split
from elastic.hf.export_settings import DtypeRule
from elastic.hf.fp8 import calibrate, cut_scales, is_quantised, odd_sizes
from elastic.hf.names import hf_names
from elastic.hf.reload import reads_fp8
from elastic.model.initialize import named_global_parameters
from elastic.model.model import ElasticModel, build_model
from elastic.model.quantised import quantise, row_scales
from elastic.rank.slicing import TensorSource, submodel_source
from elastic.space.layers import FP8_MULTIPLE
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import Space
from elastic.train.evaluation import MeanLoss, evaluate_subnets
from elastic.train.pipeline import PipelineRunner
from elastic.verbs.members import OpenCheckpoint
from elastic.verbs.report_file import table
from elastic.verbs.text import tokenizer_problems
from elastic.world.groups import Layout, World, world

_LENGTH, _SEQUENCES = 256, 32  # ours: some 8,000 tokens, seconds for a small family


@dataclass(frozen=True)
class Fp8Loss:
    """The loss in nats of one member over the same held-out tokens: as a bf16 export has it, and in FP8."""

    plain: float
    fp8: float
    num_tokens: int

    @property
    def sentence(self) -> str:
        """Say it for a card."""
        return (
            f"Loss over {self.num_tokens:,} held-out tokens: {self.plain:.4f} before, {self.fp8:.4f} in FP8, "
            f"activations too ({self.fp8 - self.plain:+.4f} nats)."
        )


def fp8_reader_problems() -> Iterator[Problem]:
    """Yield a problem where stock transformers cannot load FP8, and logits of the reloaded folder are asked for."""
    if not reads_fp8():
        rule = "of a folder in FP8 needs the package compressed-tensors, which is not installed"
        remedy = f"{sys.executable} -m pip install 'compressed-tensors>=0.15', or set export.check=values"
        yield Problem("export.check", "logits", rule, remedy)


def card_text(loss: Fp8Loss | None, shape: ModelShape) -> str:
    """Say in a card what is in FP8, who reads it and what it costs."""
    layout = (
        "The matrices inside the layers are E4M3 with a scale per output row (compressed-tensors, `float-quantized`); "
        "embedding, head, norms, convolution, A_log, D and dt_bias are not quantised. The scales are those of the "
        "nested parent's rows. Engines round activations as well, with a scale per token. Stock transformers needs the "
        "package `compressed-tensors`, and rounds no activations with "
        "`quantization_config=CompressedTensorsConfig(dequantize=True)`."
    )
    odd = odd_sizes(shape)
    kernels = (
        f"\n\nFP8 products on GPUs take multiples of {FP8_MULTIPLE}; these are none: {', '.join(odd)}." if odd else ""
    )
    return f"{layout}{kernels}\n\n{'The loss this costs was not measured.' if loss is None else loss.sentence}"


def exported_values(tensor: Tensor, name: str, dtypes: DtypeRule, in_fp8: bool) -> Tensor:
    """Return what an export makes of a parent's parameter: rounded to its number format, or the numbers of its codes.

    Scales are over whole rows of the nested parent, so any part of what is returned is what a submodel's export holds.
    """
    if in_fp8 and is_quantised(name):
        return quantise(tensor, row_scales(tensor)).numbers()
    return tensor.to(dtypes.of(hf_names(name)[0]))


@torch.no_grad()
def load_as_exported(model: ElasticModel, read: Callable[[str], Tensor], dtypes: DtypeRule, in_fp8: bool) -> None:
    """Fill a nested model on one rank with the weights that exports of its subnets have."""
    for name, parameter in named_global_parameters(model):
        parameter.copy_(exported_values(read(name), name, dtypes, in_fp8))


def fp8_losses(
    opened: OpenCheckpoint, dtypes: DtypeRule, calibrated: Mapping[str, Tensor], data: str | None
) -> dict[str, Fp8Loss]:
    """Return the losses by member; none without prepared data that hold something out and are of the tokenizer.

    Every member is cut out and multiplies as engines with FP8 products do: codes of weights and of activations.
    """
    held_out, found = _held_out(data), dict[str, Fp8Loss]()
    # Prepared anew where the checkpoint's data were: its tokens mean others.
    if held_out is None or any(tokenizer_problems("data.path", data, opened.checkpoint, opened.record)):
        return found
    parent, lanes, tensors = opened.space.parent, opened.space.lanes, opened.tensors()
    with world(Layout()) as here:
        for member in opened.members:
            read = submodel_source(tensors, parent, member.subnet, lanes)
            model = _cut_out(member.subnet, parent, read, dtypes)
            plain = _loss(here, model, held_out)
            _quantise(model, read, cut_scales(calibrated, parent, member.subnet, lanes))
            fp8 = _loss(here, model, held_out)
            if plain.cross_entropy is not None and fp8.cross_entropy is not None:
                found[member.name] = Fp8Loss(plain.cross_entropy, fp8.cross_entropy, plain.num_tokens)
    return found


def cut_in_fp8(source: TensorSource, space: Space, subnet: Subnet, dtypes: DtypeRule) -> ElasticModel:
    """Return a subnet of a nested model cut out, on one rank, with products of codes of weights and activations."""
    read = submodel_source(source, space.parent, subnet, space.lanes)
    model = _cut_out(subnet, space.parent, read, dtypes).eval()
    _quantise(model, read, cut_scales(calibrate(source, space.parent), space.parent, subnet, space.lanes))
    return model


@torch.no_grad()
def _cut_out(subnet: Subnet, parent: ModelShape, read: Callable[[str], Tensor], dtypes: DtypeRule) -> ElasticModel:
    model = build_model(Space(subnet.shape(parent), {}, lanes=1), Layout(), seed=None).requires_grad_(False)
    load_as_exported(model, read, dtypes, in_fp8=False)
    return model


@torch.no_grad()
def _quantise(model: ElasticModel, read: Callable[[str], Tensor], scales: Mapping[str, Tensor]) -> None:
    """Give a model its projections as codes, of the numbers that no export has rounded before."""
    for name, parameter in named_global_parameters(model):
        if is_quantised(name):
            parameter.copy_(read(name))
    model.quantise(scales)


def _loss(here: World, model: ElasticModel, held_out: HeldOut) -> MeanLoss:
    runner, count = PipelineRunner(here, model, DistillConfig(kl_weight=0.0)), min(_SEQUENCES, len(held_out))
    return evaluate_subnets(runner, {"whole": None}, held_out, count, micro_batch_size=1)["whole"].mean


def _held_out(data: str | None) -> HeldOut | None:
    if data is None or not is_prepared(Path(data)):
        return None
    split = read_manifest(Path(data)).splits.get("validation")
    if split is None:
        return None
    length = min(_LENGTH, max(1, split.num_tokens - 1))
    held_out = HeldOut(open_split(PreparedData(path=data), "validation"), length)
    return held_out if len(held_out) else None


def loss_table(losses: Mapping[str, Fp8Loss]) -> Table:
    """Render what FP8 costs each member."""
    rows = [(name, f"{one.plain:.4f}", f"{one.fp8:.4f}", f"{one.fp8 - one.plain:+.4f}") for name, one in losses.items()]
    return table("held-out loss in FP8", ("name", "before", "in FP8", "costs"), rows)
