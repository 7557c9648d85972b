"""Write text from any budget of a family: `python recipes/generate.py key=value ...`, conf/generate.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("generate")
