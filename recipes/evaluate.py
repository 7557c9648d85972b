"""Report deterministic loss and cost per budget: `python recipes/evaluate.py key=value ...`, conf/evaluate.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("evaluate")
