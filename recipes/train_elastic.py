"""Train the family from a permuted parent: `python recipes/train_elastic.py key=value ...`, conf/train_elastic.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("train_elastic")
