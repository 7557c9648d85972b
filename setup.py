"""What pyproject.toml cannot say: conf/ is installed as recipes/conf, where a recipe that is no clone's finds it."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

groups = sorted(folder.name for folder in Path("conf").iterdir() if folder.is_dir())
setup(
    packages=[
        *find_namespace_packages(include=["elastic*", "recipes*"]),
        *("recipes.conf", *(f"recipes.conf.{group}" for group in groups)),
    ],
    package_dir={"recipes.conf": "conf"},
    package_data={"": ["*.yaml"]},
)
