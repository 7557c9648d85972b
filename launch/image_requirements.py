"""Say what pip must add to a container's base image, which brings some packages in versions of its own.

`image_requirements.py FOLDER` reads pyproject.toml and constraints.txt there and writes image-requirements.txt and
image-constraints.txt beside them: a package of the base that satisfies the project keeps its version, everything else
gets the tested one. `image_requirements.py --kernels auto REQUIREMENT ...` prints the requirements that the base does
not have; with `--kernels none`, which a base without a GPU's compiler needs, nothing. Needs pip and nothing else.
"""

import argparse
import re
import tomllib
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

# Built with torch and for it: where torch comes from the base, ours would pull in a second CUDA.
COMES_WITH_TORCH = re.compile(r"nvidia-|cuda-|triton$|torch$")


def installed() -> dict[str, str]:
    """Return the version of every installed package by its normalised name."""
    return {normalised(dist.metadata["Name"]): dist.version for dist in metadata.distributions()}


def normalised(name: str) -> str:
    """Write a package name as the constraints do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def write_requirements(folder: Path) -> None:
    """Write image-requirements.txt and image-constraints.txt for the image this runs in."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = {normalised(Requirement(line).name): Requirement(line) for line in project["dependencies"]}
    base = installed()
    lines = (folder / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = {}
    for line in lines:
        name, _, version = line.partition("==")
        if not version:
            continue
        if "torch" in base and COMES_WITH_TORCH.match(name):
            continue
        keeps = name in base and (
            name not in requirements or requirements[name].specifier.contains(base[name], prereleases=True)
        )
        constraints[name] = base[name] if keeps else version
    if "torch" in base:
        constraints["torch"] = base["torch"]
    # setuptools is what builds the project itself; a base's old one cannot.
    constraints.pop("setuptools", None)
    texts = [str(requirement) for requirement in requirements.values()] + ["setuptools>=77"]
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
