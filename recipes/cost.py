"""Print what a run of the main job can reach and costs: `python recipes/cost.py --config-name RUN key=value ...`.

Any config of recipes/train_elastic.py. Reads no data and no weights, and starts no process group.
"""

from recipes._start import start

if __name__ == "__main__":
    start("cost")
