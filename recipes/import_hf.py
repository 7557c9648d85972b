"""A stock nemotron_h folder to a checkpoint: `python recipes/import_hf.py source=FOLDER`, conf/import_hf.yaml."""

from recipes._start import start

if __name__ == "__main__":
    start("import_hf")
