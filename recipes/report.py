"""Write one page about a run, `report.html` in its folder, at any time: `python recipes/report.py RUN`."""

import argparse
from pathlib import Path


def main() -> None:
    """Parse the command line, write, say where; a folder that is no run's leaves with code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a run of train_elastic or pretrain_parent")
    arguments = parser.parse_args()

    from rich.console import Console

    from recipes._quiet import held_back_output

    with held_back_output():  # Megatron-Core warns of each absent package
        from elastic.verbs.report import write_report
        from recipes._common import leave_on_user_error

    with leave_on_user_error():
        path = write_report(arguments.run)
    Console().print(f"written to {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
