"""Say what pip must add to a container's base image, which brings some packages in versions of its own.

`image_requirements.py FOLDER` reads pyproject.toml and constraints.txt there and writes image-requirements.txt and
image-constraints.txt beside them: torch of the base and what is compiled against it keep their versions, everything
else gets the tested one. `image_requirements.py --kernels auto REQUIREMENT ...` prints the requirements that the base
does not have; with `--kernels none`, which a base without a GPU's compiler needs, nothing. Needs pip and nothing else.
"""

import argparse
import re
import tomllib
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

# Compiled against each other: where the base has one of them it stays, ours would pull in a second CUDA.
BELONGS_TO_TORCH = re.compile(
    r"(torch|torchvision|triton|numpy|nvidia-.*|cuda-.*|transformer-engine.*|flash-attn|apex|mamba-ssm|causal-conv1d)$"
)


def installed() -> dict[str, str]:
    """Return the version of every installed package by its normalised name."""
    return {normalised(dist.metadata["Name"]): dist.version for dist in metadata.distributions()}


def normalised(name: str) -> str:
    """Write a package name as the constraints do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def write_requirements(folder: Path) -> None:
    """Write image-requirements.txt and image-constraints.txt for the image this runs in."""
    content = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    base = installed()
    constraints = {}
    for line in (folder / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if version and not ("torch" in base and BELONGS_TO_TORCH.match(name)):
            constraints[name] = version
    for name, version in base.items():
        if BELONGS_TO_TORCH.match(name):
            constraints[name] = version
    texts = [*content["project"]["dependencies"], *content["build-system"]["requires"]]
    (folder / "image-requirements.txt").write_text("\n".join(texts) + "\n")
    pins = [f"{name}=={version}" for name, version in sorted(constraints.items())]
    (folder / "image-constraints.txt").write_text("\n".join(pins) + "\n")


def missing_kernels(wanted: list[str]) -> list[str]:
    """Return the requirements whose package is not there."""
    base = installed()
    return [line for line in wanted if normalised(Requirement(line).name) not in base]


def main() -> None:
    """Parse the command line and do one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", choices=("auto", "none"), help="print the missing ones of these requirements")
    parser.add_argument("arguments", nargs="+", metavar="FOLDER | REQUIREMENT")
    options = parser.parse_args()
    if options.kernels is None:
        write_requirements(Path(options.arguments[0]))
    elif options.kernels == "auto":
        for line in missing_kernels(options.arguments):
            print(line)


if __name__ == "__main__":
    main()
