"""Prepare text for training: `python recipes/prepare_data.py key=value ...`, conf/prepare_data.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("prepare_data")
