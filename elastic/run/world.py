"""From what a config says of ranks, precision and patience to the process groups of a run."""

from contextlib import AbstractContextManager
from dataclasses import asdict

from elastic.config.sections import ComputeConfig, ParallelConfig
from elastic.config.verbs import ComputedConfig
from elastic.world.groups import DTYPES, Layout, World, world


def model_layout(parallel: ParallelConfig, compute: ComputeConfig) -> Layout:
    """Translate the config sections to a Layout."""
    return Layout(**asdict(parallel), dtype=DTYPES[compute.precision])


def run_world(config: ComputedConfig) -> AbstractContextManager[World]:
    """Start the process groups of a verb for the time of a `with` block, as world/groups.py says."""
    return world(model_layout(config.parallel, config.trainer), config.trainer.collective_timeout_s)
