"""Tokenizers for chats, trained once."""

from pathlib import Path

import pytest

from tests.unit.data.chatting import TEMPLATES, write_tokenizer


@pytest.fixture(scope="session")
def chat_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a tokenizer's folder for every style; all are trained alike."""
    return {style: write_tokenizer(tmp_path_factory.mktemp(style), text) for style, text in TEMPLATES.items()}
