"""What one node is, and what is wrong with it, before a training process starts.

`probe` looks, `node_problems` judges what it saw. Nothing heavy is imported above the functions, so that a node on
which torch is missing can still say so.
"""

import importlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from elastic.config.load import Problem

LEGAL_PYTHON = ((3, 12), (3, 13))
# Modules that a GPU run imports first in the middle of a step, by the package they come with. They are compiled against
# one torch: a wheel for another one is there, has the right version, and does not import.
KERNEL_MODULES = {
    "transformer-engine": "transformer_engine.pytorch",
    "mamba-ssm": "mamba_ssm.ops.triton.ssd_combined",
}
MIN_FREE_SHARE = 0.9  # of a GPU's memory: below, another process holds some


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Node:
    """What preflight needs to know of a node. A package that is not installed has no version."""

    versions: Mapping[str, str | None]
    import_errors: Mapping[str, str]
    gpus: Sequence[Gpu]
    torch_cuda: str | None
    has_nccl: bool
    busy_port: int | None = None


def probe_packages(requirements: Sequence[str]) -> dict[str, str | None]:
    """Look up the installed version of every requirement."""
    versions: dict[str, str | None] = {}
    for name in (Requirement(one).name for one in requirements):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def probe(versions: Mapping[str, str | None], *, with_gpus: bool, port: int | None) -> Node:
    """Look at this node. `port` is given on the node that the ranks will meet at."""
    import torch

    gpus, errors = [], {}
    if with_gpus and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    for package in KERNEL_MODULES if gpus else ():
        if versions.get(package) is not None:
            try:
                importlib.import_module(KERNEL_MODULES[package])
            except Exception as error:  # a broken wheel can raise anything
                errors[package] = f"{type(error).__name__}: {error}".splitlines()[0]
    return Node(
        versions=versions,
        import_errors=errors,
        gpus=gpus,
        torch_cuda=torch.version.cuda,
        has_nccl=torch.distributed.is_nccl_available(),
        busy_port=port if port is not None and not port_is_free(port) else None,
    )


def port_is_free(port: int) -> bool:
    """Tell whether this node can listen on a TCP port."""
    try:
        socket.create_server(("", port)).close()  # with SO_REUSEADDR
    except OSError:
        return False
    return True


def node_number() -> int:
    """Return this node's number in the job: Slurm's, or NODE_RANK where torchrun is started by hand."""
    return int(os.environ.get("SLURM_NODEID") or os.environ.get("NODE_RANK") or 0)


def package_problems(
    python: tuple[int, int], versions: Mapping[str, str | None], requirements: Sequence[str]
) -> Iterator[Problem]:
    """Judge the interpreter and the installed packages by the project's own requirements."""
    if not LEGAL_PYTHON[0] <= python <= LEGAL_PYTHON[-1]:
        legal = " or ".join(f"{major}.{minor}" for major, minor in LEGAL_PYTHON)
        yield Problem("python", ".".join(map(str, python)), f"must be {legal}", "run `make setup`, or set PY=FILE")
    for requirement in map(Requirement, requirements):
        version, wanted = versions.get(requirement.name), str(requirement.specifier)
        field, remedy = f"package {requirement.name}", "install it, or take the image of the Dockerfile"
        if version is None:
            yield Problem(field, None, f"is not installed{wanted and f', needs {wanted}'}", remedy)
        elif not requirement.specifier.contains(version, prereleases=True):  # NVIDIA's images carry 2.9.0a0+...
            yield Problem(field, version, f"must be {wanted}", remedy)


def node_problems(node: Node, gpus_per_node: int) -> Iterator[Problem]:
    """Judge GPUs, CUDA, kernels and the port; `gpus_per_node` 0 is a run on CPUs."""
    if node.busy_port is not None:
        rule = "is taken by another process on the first node"
        yield Problem("MASTER_PORT", node.busy_port, rule, "export another MASTER_PORT before sbatch")
    if not gpus_per_node:
        return
    if node.torch_cuda is None:
        rule = "this torch was built without CUDA"
        yield Problem("torch.version.cuda", None, rule, "install the CUDA build, or run on CPUs with GPUS_PER_NODE=0")
    elif not node.has_nccl:
        yield Problem("NCCL", None, "this torch was built without NCCL", "install the official CUDA build for Linux")
    if len(node.gpus) != gpus_per_node:
        rule = f"must be the {gpus_per_node} that the job asked for"
        if node.torch_cuda is not None and not node.gpus:
            rule += f", and CUDA {node.torch_cuda} sees none (is the driver older than that?)"
        remedy = "leave the node out with sbatch --exclude, or ask for fewer with --gpus-per-node"
        yield Problem("number of GPUs", len(node.gpus), rule, remedy)
    for index, gpu in enumerate(node.gpus):
        if gpu.free_bytes < MIN_FREE_SHARE * gpu.total_bytes:
            rule = f"of the {gib(gpu.total_bytes)} of {gpu.name} is free, another process holds the rest"
            yield Problem(f"GPU {index} memory", gib(gpu.free_bytes), rule, "end it, or leave the node out")
    for package, error in node.import_errors.items():
        remedy = "build it against this torch: pip install --no-build-isolation --no-binary :all: --force-reinstall"
        yield Problem(f"package {package}", node.versions[package], f"does not import ({error})", f"{remedy} {package}")


def gib(num_bytes: float) -> str:
    """Write bytes as GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB"
