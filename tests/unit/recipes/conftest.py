"""A question of a study, made up."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Two arms that share a parent; the second of them takes half the rate."""
    base = {
        "chain": ["pretrain_parent", "train_elastic", "evaluate"],
        "rates": [0.1, 0.2],
        "corpora": {"text": {}},
        "verbs": {
            "pretrain_parent": {"seed": 1},
            "train_elastic": {"lr": "{rate}", "seed": "{seed}", "parent": "{pretrain_parent}"},
            "evaluate": {"init_from.checkpoint": "{train_elastic}"},
        },
    }
    own = {
        "question": "Which?", "compare_with": "one", "answer": "This one.", "limits": "Much.", "corpora": ["text"],
        "token_ratio": "one",
        "arms": {"one": {}, "two": {"train_elastic": {"lr": "{rate*0.5}"}}},
    }  # fmt: skip
    folder = tmp_path / "conf"
    folder.mkdir()
    for name, content in (("base", base), ("which", own)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder
