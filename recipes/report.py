"""One page about a run, `report.html` in its folder: `python recipes/report.py RUN`, conf/report.yaml."""

import sys

from recipes._start import start

if __name__ == "__main__":
    sys.argv[1:] = [one if "=" in one or one.startswith("-") else f"run={one}" for one in sys.argv[1:]]
    start("report")
