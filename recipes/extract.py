"""Cut budgets out as Hugging Face folders: `python recipes/extract.py key=value ...`, conf/extract.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("extract")
