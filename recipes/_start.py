"""Start a verb from the command line: in this process, or in several that a quiet torchrun starts."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

PROCESSES = "--nproc-per-node"
USER_ERROR = 2  # what a worker leaves with when it has said all there is to say (_common.py)


def start(verb: str) -> None:
    """Run a verb of `_verbs.VERBS` with this process's arguments; with --nproc-per-node=N in N processes here.

    That does what `torchrun --standalone --nproc-per-node=N` does, without torchrun's own lines after a user's error.
    """
    processes, arguments = split_processes(sys.argv[1:])
    if processes is not None and "RANK" not in os.environ:
        sys.exit(launched(processes, sys.argv[0], arguments))
    from recipes._nemo import hydra_runner  # isort: skip (first: it holds back what NeMo and Megatron print on import)
    from omegaconf import DictConfig
    from rich.console import Console

    from recipes._common import CONF, leave_on_user_error, load_config, run
    from recipes._verbs import VERBS

    entry = VERBS[verb]

    @hydra_runner(config_path=str(CONF), config_name=entry.run_name or verb)
    def main(cfg: DictConfig) -> None:
        with leave_on_user_error():  # in here: Hydra would print a line of its own before it
            config: Any = load_config(cfg, entry.config)
            entry.body(config, Console())

    run(main)


def split_processes(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take --nproc-per-node=N (or --nproc-per-node N) out of a recipe's arguments."""
    rest, processes, previous = [], None, ""
    for argument in arguments:
        option, _, value = argument.replace("_", "-").partition("=") if argument.startswith("--nproc") else ("", "", "")
        if previous == PROCESSES:
            processes = argument
        elif option == PROCESSES and value:
            processes = value
        elif option != PROCESSES:
            rest.append(argument)
        previous = option if not value else ""
    return processes, rest


def launched(processes: str, script: str, arguments: Sequence[str]) -> int:
    """Run `script` in that many processes and return the code of the first that failed, 0 if none did."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, with a warning
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(["--standalone", f"{PROCESSES}={processes}", script, *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != USER_ERROR:  # nobody has explained it yet
            print(str(error), file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0
