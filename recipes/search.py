"""Find sizes between a family's budgets: `python recipes/search.py key=value ...`, conf/search.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("search")
