"""Say what this machine has, and show that the elastic model works on it: `python -m elastic.selftest`.

Prints Python, torch, CUDA and each optional kernel package with its version, found or not; then runs a small model
forward and backward as masks and as slices and compares the two, and adds up a gradient in fp32. Leaves with code 1 if
they differ or something that is installed does not work. Needs no data, no network and no other process; a second on a
CPU after the imports.
"""

import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

import torch
from torch import Tensor

from elastic.model.backends import GPU_PARTS, import_module

# package (as pip knows it): the module a run imports, and what stands in where it is missing
OPTIONAL = {part.package: (part.module, f"{part.name} by {part.instead}") for part in GPU_PARTS} | {
    "apex": ("amp_C", "fused Adam by Transformer Engine, else torch's"),
}
NEEDED = ("torch", "megatron-core", "transformers", "nemo-toolkit", "hydra-core")
# Mask and slice add in another order; a GPU's matrix units round fp32 to TF32 on top.
TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}
# A sum in fp32 of bf16 factors; a CPU rounds the product to bf16 before it adds.
SUM_TOLERANCE = {"cpu": 2**-5, "cuda": 1e-4}


def versions() -> Iterator[tuple[str, str]]:
    """Yield what this process runs on, as (name, text) pairs."""
    yield "python", f"{platform.python_version()} ({platform.machine()})"
    for package in NEEDED:
        yield package, metadata.version(package)
    if not torch.cuda.is_available():
        built = f", torch is built for {torch.version.cuda}" if torch.version.cuda else ""
        yield "CUDA", f"no device{built}: runs on the CPU over gloo"
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield "CUDA", f"{torch.version.cuda}, {len(names)} devices: {', '.join(sorted(set(names)))}"
    yield "NCCL", ".".join(map(str, torch.cuda.nccl.version()))


def backends() -> Iterator[tuple[str, str, bool]]:
    """Yield (package, what was found, whether it is broken) for the optional kernels.

    Only an import tells: a kernel built for another torch is installed and does not load. Without a device some refuse
    to be imported, so there the version is all that is asked for.
    """
    for package, (module, instead) in OPTIONAL.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, f"not found: {instead}", False
            continue
        if not torch.cuda.is_available():
            yield package, f"{version}, not tried without a device", False
            continue
        try:
            import_module(module)
        except Exception as error:  # a broken wheel can raise anything
            yield package, f"{version}, BROKEN: {type(error).__name__}: {error}".splitlines()[0], True
        else:
            yield package, version, False


def mask_against_slice() -> dict[str, float]:
    """Run one small subnet both ways; returns the relative differences of logits and of the kept weights' gradients."""
    from elastic.model.model import build_model
    from elastic.space.axes import Axis
    from elastic.space.gates import Gates
    from elastic.space.shape import ModelShape
    from elastic.space.space import AxisChoices, Space
    from elastic.world.groups import Layout, world

    shape = ModelShape.uniform(
        "M-*M-", vocab=128, hidden=64, ffn=128, mamba_heads=8, head_channels=32, mamba_groups=2, mamba_state=32,
        conv_kernel=4, attention_heads=8, kv_heads=2, attention_channels=32,
    )  # fmt: skip
    axes = {
        Axis.HIDDEN: AxisChoices((64, 32)),
        Axis.FFN: AxisChoices((128, 64), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices((8, 4)),
        Axis.MAMBA_CHANNEL: AxisChoices((32, 24)),
        Axis.ATTENTION_HEAD: AxisChoices((8, 4)),
        Axis.DEPTH: AxisChoices((5, 4)),
    }
    space = Space(shape, axes, lanes=8)
    chosen = {axis: (1,) * space.num_slots(axis) for axis in space.elastic_axes()}
    with world(Layout(), timeout_s=60.0) as here:
        model = build_model(space, here.layout, seed=1, init_std=0.3)
        weights = {
            axis: torch.nn.functional.one_hot(torch.tensor(picks), len(axes[axis].choices)).float().to(here.device)
            for axis, picks in chosen.items()
        }
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(shape.vocab, (2, 96), generator=generator).to(here.device)
        outcomes = []
        for gates in (Gates.mask(weights), Gates.slice(space.subnet(chosen))):
            logits = model(tokens, gates) @ model.head_weight(gates).T
            gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()), allow_unused=True)
            outcomes.append((logits.detach(), gradients))
    (mask_logits, mask_gradients), (slice_logits, slice_gradients) = outcomes
    both = zip(mask_gradients, slice_gradients, strict=True)
    kept = [(mask, slice_) for mask, slice_ in both if mask is not None and slice_ is not None]
    return {"logits": largest_difference([(mask_logits, slice_logits)]), "gradients": largest_difference(kept)}


def sums_in_fp32() -> float:
    """Add a product of bf16 matrices to an fp32 gradient as training does; returns the relative difference to fp64."""
    from elastic.kernels.products import add_product

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.linspace(-1, 1, 64 * 96, device=device).view(64, 96).bfloat16().roll(n) for n in (0, 7))
    total = torch.zeros(96, 128, device=device)[:, :96]
    add_product(total, left.t(), right)
    return largest_difference([(total.double(), left.double().t() @ right.double())])


def largest_difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference within pairs of tensors over the largest value; infinite for a NaN or nothing."""
    scale = max((float(right.abs().max()) for _, right in pairs), default=0.0)
    differences = [float((left - right).abs().max()) for left, right in pairs]
    if not differences or not all(map(math.isfinite, differences)) or scale == 0:
        return math.inf
    return max(differences) / scale


def main() -> None:
    """Report and test."""
    if not torch.cuda.is_available():
        # Megatron-Core's fused functions otherwise compile C++ at their first call.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    is_broken = False
    for name, text in versions():
        print(f"{name:20} {text}")
    for name, text, broken in backends():
        print(f"{name:20} {text}")
        is_broken |= broken
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for what, difference in mask_against_slice().items():
        fits = difference <= TOLERANCE[device]
        print(f"{'mask == slice':20} {what} on {device}: {difference:.1e} {'ok' if fits else 'WRONG'}")
        is_broken |= not fits
    difference = sums_in_fp32()
    fits = difference <= SUM_TOLERANCE[device]
    print(f"{'bf16 into fp32':20} {difference:.1e} {'ok' if fits else 'WRONG'}")
    is_broken |= not fits
    print("selftest: " + ("FAILED" if is_broken else "passed"))
    sys.exit(1 if is_broken else 0)


if __name__ == "__main__":
    main()
