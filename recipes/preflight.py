"""Check one node and one run before its first training process starts, and print every problem.

`python recipes/preflight.py VERB [--gpus=N --processes=N ...] --config-name=RUN key=value ...`, the verb and the
overrides as the recipe gets them; the launchers run it on every node. Leaves with code 2 and one line for each problem.
VERB `smoke` checks the node alone: the chain has no data yet.
"""

import argparse
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from elastic.config.load import Problem
from elastic.preflight.node import (
    KERNEL_MODULES,
    Node,
    node_number,
    node_problems,
    package_problems,
    probe,
    probe_packages,
)
from recipes._quiet import held_back_output

ROOT = Path(__file__).resolve().parent.parent
EXIT_PROBLEMS = 2
CHECKED = ("train_elastic", "pretrain_parent", "estimate_importance", "evaluate", "smoke")


def requirements(with_gpus: bool) -> list[str]:
    """Return the project's own requirements, kernels included for a run on GPUs."""
    file = ROOT / "pyproject.toml"
    if not file.is_file():  # installed, not a clone
        lines = metadata.requires("elastic") or []
        return [line.partition(";")[0] for line in lines if "extra" not in line or (with_gpus and '"gpu"' in line)]
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(project["optional-dependencies"]["gpu"] if with_gpus else ())]


def compose_run(arguments: Sequence[str]) -> Any:
    """Compose the config that a recipe would get from these arguments, without the folder Hydra makes for a job."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    from recipes._arguments import check_arguments
    from recipes._common import CONF, hydra_arguments

    parser = argparse.ArgumentParser(prog="preflight", allow_abbrev=False)
    parser.add_argument("--config-name", "-cn", required=True)
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("overrides", nargs="*")
    check_arguments(arguments, CONF)
    given = parser.parse_args(hydra_arguments(arguments))
    overrides = [word for word in given.overrides if not word.startswith("hydra.") or "hydra.searchpath" in word]
    with initialize_config_dir(config_dir=str(CONF), version_base=None):
        if given.config_dir is not None:  # as Hydra's command line does; its compose API has no word for it
            search_path = create_config_search_path(str(CONF))
            search_path.prepend("command-line", f"file://{given.config_dir.resolve()}")
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("preflight", search_path)
        return compose(given.config_name.removesuffix(".yaml"), overrides)


def check_run(options: argparse.Namespace, node: Node) -> list[Problem]:
    """Judge the run that the overrides describe; writes its plan beside the logs."""
    with held_back_output():  # of other packages' notes on what they miss
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from elastic.config.load import ConfigError
        from elastic.config.rules_layout import Cluster
        from elastic.preflight.run import phase_problems, plan_run, run_problems
        from elastic.verbs.inputs import load_run
        from recipes._common import kernels
        from recipes._verbs import VERBS

    # What the node that asks has: on a login node, which has no GPU, nothing is missed.
    _, missing, fp8 = kernels(bool(node.gpus))
    cluster = Cluster(num_processes=options.processes, has_gpu=options.gpus > 0, missing=missing, multiplies_fp8=fp8)
    try:
        cfg = compose_run(options.arguments)
        if options.show:
            print(OmegaConf.to_yaml(cfg, resolve=True))
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
        is_main = node_number() == 0
        config: Any = load_run(VERBS[options.verb].config, values, cluster, is_main=is_main)  # type: ignore[arg-type]
    except (HydraException, OmegaConfBaseException) as error:
        rule = str(error).splitlines()[0]
        return [Problem("override", " ".join(options.arguments), rule, "see conf/ for groups and their files")]
    except ConfigError as error:
        return list(error.problems)
    if options.plan is not None:  # one name=value a line, for a shell to read
        lines = (f"{name}={value}\n" for name, value in plan_run(config, options.phase).items())
        options.plan.with_name(f"{options.plan.name}_{node_number()}").write_text("".join(lines))
    return [*phase_problems(config, options.phase), *run_problems(config, cluster, node.gpus)]


def main() -> None:
    """Parse the command line, check, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each node must have (default 0: runs on CPUs)")
    parser.add_argument("--processes", type=int, default=1, help="ranks of the job (default 1)")
    parser.add_argument("--port", type=int, help="port that the ranks will meet at, on the first node")
    parser.add_argument("--phase", help="last phase of the curriculum to train")
    parser.add_argument("--plan", type=Path, help="write what a launcher needs to know of the run to PLAN_<node>")
    parser.add_argument("--show", action="store_true", help="print the resolved config; does not judge the node")
    parser.add_argument("verb", choices=CHECKED)
    options, rest = parser.parse_known_args()
    options.arguments = rest
    wanted = requirements(options.gpus > 0)
    versions = probe_packages(wanted)
    # A kernel package that is not there is the run's to miss (trainer.kernels); one of a wrong version is a problem.
    absent = {name for name in KERNEL_MODULES if versions.get(name) is None}
    judged = [requirement for requirement in wanted if Requirement(requirement).name not in absent]
    problems = list(package_problems(sys.version_info[:2], versions, judged))
    if options.show:
        problems = []  # asked for on a login node, whose packages and GPUs are not the job's
    if all(versions[name] is not None for name in versions if name not in KERNEL_MODULES):  # else the imports end here
        port = options.port if node_number() == 0 else None
        node = probe(versions, with_gpus=options.gpus > 0, port=port)
        if not options.show:
            problems += node_problems(node, options.gpus)
        if options.verb != "smoke":
            problems += check_run(options, node)
    if problems:
        print(f"{len(problems)} problems:" if len(problems) > 1 else "1 problem:")
        print("\n".join(f"  {problem}" for problem in problems))
        sys.exit(EXIT_PROBLEMS)


if __name__ == "__main__":
    main()
