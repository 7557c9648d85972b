"""Print what a run of the main job needs of a cluster: memory, work, traffic, time, price; rank layouts.

`python recipes/plan.py cluster.num_gpus=256 key=value ...`, or `--config-name RUN +cluster=h200` for any config of
recipes/train_elastic.py. Reads no data and no weights; plan.dry_run=true also traces the model's own code on tensors
without memory, as one rank of that cluster.
"""

from recipes._start import start

if __name__ == "__main__":
    start("plan")
