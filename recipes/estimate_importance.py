"""Score and permute a parent: `python recipes/estimate_importance.py key=value ...`, conf/estimate_importance.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("estimate_importance")
