"""What all recipes share: from the command line to a checked config dataclass, and errors a user can read."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml  # type: ignore[import-untyped]
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from elastic.config.rules import Cluster
from elastic.config.sections import ComputeConfig
from elastic.config.verbs import ComputedConfig
from elastic.model.backends import missing_parts
from elastic.model.quantised import multiplies_fp8
from elastic.verbs.inputs import load_run
from recipes._arguments import check_arguments, own_folder, with_quotes

RECIPES = Path(__file__).resolve().parent
CONF = next(
    folder for folder in (RECIPES / "conf", RECIPES.parent / "conf") if folder.is_dir()
)  # installed, or a clone
EXIT_USER_ERROR = 2
WAIT_FOR_RANK_0_S = 30.0


def run(main: Callable[[], Any]) -> None:
    """Start a recipe's `hydra_runner` entry; call it under `if __name__ == "__main__"`.

    An error meant for the user (a ValueError subclass of this project, a wrong override) is printed without its
    traceback, and the process leaves with code 2. Anything else is our bug and keeps its traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra hands exceptions on instead of printing them
    try:
        with leave_on_user_error():
            sys.argv[1:] = with_quotes(sys.argv[1:])
            check_arguments(sys.argv[1:], CONF)
            sys.argv[1:] = hydra_arguments(sys.argv[1:])
            main()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        cause = str(error.__cause__ or "").partition("\n")[0]  # a list where a mapping stands, and the like
        leave(f"{error}: {cause}; write the value as the YAML file has it" if "merging" in str(error) else str(error))
    except RecursionError as error:
        keys = re.findall(r"full_key: (\w[\w.]*)", str(error))  # what OmegaConf was filling in, the outermost last
        if not keys:
            raise
        leave(f"{keys[-1]}: the YAML file gives it an alias of itself, which has no end; write the value out")


@contextmanager
def leave_on_user_error() -> Iterator[None]:
    """Turn an error meant for the user into a message and the process's end."""
    try:
        yield
    except ValueError as error:
        if not is_user_error(error):
            raise
        leave(str(error))


def hydra_arguments(arguments: Sequence[str], conf: Path = CONF) -> list[str]:
    """Rewrite `key=value` as Hydra's `++key=value`, unless the key is a config group such as `model`.

    A plain override of an unknown key ends in Hydra at once; this way it reaches the config dataclasses, which
    name the nearest known key together with every other problem. Options move to the front, where Hydra's parser
    wants them, and the working directory stays where it is.
    """
    own = own_folder(arguments)
    folders = [conf] if own is None or not own.is_dir() else [conf, own]
    groups = {group.name for folder in folders for group in folder.iterdir() if group.is_dir()}
    options, overrides = [], []
    for argument in arguments:
        key = re.match(r"([A-Za-z_][\w.]*)=", argument)
        if key is not None and key[1] not in groups and not key[1].startswith("hydra."):
            overrides.append(f"++{argument}")
        elif argument[0] == "-" or ("=" not in argument and argument[0] != "~"):
            options.append(argument)
        else:
            overrides.append(argument)
    return [*options, *overrides, "hydra.job.chdir=false"]


def load_config[T](cfg: DictConfig, kind: type[T]) -> T:
    """Turn Hydra's config into `kind`, checked against this cluster and the files it names, and set up the process.

    Every rank reads and judges for itself, before any process group starts. A wrong config prints every problem on
    rank 0 and leaves with code 2.
    """
    with leave_on_user_error():
        config = read_config(cfg, kind)
    # Megatron-Core reports every parameter bucket and the whole optimizer config at INFO.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
    if isinstance(config, ComputedConfig):
        set_up_process(config.trainer)
    return config


def read_config[T](cfg: DictConfig, kind: type[T]) -> T:
    """Turn Hydra's config into `kind`, checked; raises ConfigError with every problem."""
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(plain, dict), "a whole-run YAML file is a mapping"
    values = {str(key): value for key, value in plain.items()}
    return load_run(kind, values, cluster(), is_main=rank() == 0)


def cluster() -> Cluster:
    """Return what this run was started on: torchrun says how many processes, one without it."""
    return Cluster(int(os.environ.get("WORLD_SIZE", "1")), *kernels(torch.cuda.is_available()))


def kernels(has_gpu: bool) -> tuple[bool, dict[str, tuple[str, str]], bool]:
    """Return whether there are GPUs, the parts of a run whose packages are missing there, and if FP8 is multiplied."""
    parts = [part for part, _ in missing_parts()] if has_gpu else []
    return has_gpu, {part.name: (part.package, part.instead) for part in parts}, multiplies_fp8()


def rank() -> int:
    """Return this process's global rank, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def set_up_process(compute: ComputeConfig) -> None:
    """Apply what holds for the whole process: number of threads, deterministic kernels."""
    if compute.num_threads is not None:
        torch.set_num_threads(compute.num_threads)
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is only deterministic with it
    torch.use_deterministic_algorithms(compute.deterministic)
    # A debugging aid that would cost time on every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_user_error(error: ValueError) -> bool:
    """Tell whether the error is one of this project's own classes, all of which explain themselves."""
    return type(error).__module__.partition(".")[0] in ("elastic", "recipes")


def leave(message: str) -> NoReturn:
    """Print a message for the user and leave with code 2; under torchrun, rank 0 first."""
    if rank() > 0:
        # torchrun ends all ranks as soon as one leaves. Where all of them fail alike, rank 0 speaks for them.
        time.sleep(WAIT_FOR_RANK_0_S)
    heading, *lines = message.splitlines() or [""]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text(heading, style="bold red"))
    for line in lines:
        console.print(Text(line))
    sys.exit(EXIT_USER_ERROR)
