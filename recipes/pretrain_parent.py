"""Train a parent from scratch: `python recipes/pretrain_parent.py key=value ...`, conf/pretrain_parent.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("pretrain_parent")
