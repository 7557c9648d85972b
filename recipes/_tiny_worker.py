"""One worker of a tiny run: `torchrun ... -m recipes._tiny_worker VALUES.json`."""

import json
import sys
from pathlib import Path

from recipes._tiny_family import train_tiny_family

if __name__ == "__main__":
    train_tiny_family(json.loads(Path(sys.argv[1]).read_text()))
