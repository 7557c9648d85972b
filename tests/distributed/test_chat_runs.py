"""A run on chats, packed and isolated: a parent, its family, validation; alike at one replica and at two, resumed."""

import re
from pathlib import Path

import pytest

from elastic.checkpoint.find import list_checkpoints
from elastic.checkpoint.record import Record
from elastic.data.prepare import prepare
from elastic.data.prepare_config import PrepareConfig
from tests.distributed.harness import run_distributed
from tests.distributed.training import CURRICULUM, rows, split_values, train, train_start
from tests.unit.data.chatting import QWEN, conversations, unmarked, write_chats, write_tokenizer


def prepare_chats(folder: Path) -> None:
    """Prepare chats of which only the last answers count, so that sequences without any are met; train the start."""
    tokenizer = write_tokenizer(folder / "tokenizer", unmarked(QWEN), vocab_size=300)
    source = write_chats(folder / "chats.jsonl", conversations("qwen", 120))
    data = dict(output_dir=str(folder / "data"), paths=[str(source)], validation_ratio=0.2)
    prepare(PrepareConfig(**data, document_format="chat", tokenizer_path=str(tokenizer), loss_on="last_response"))
    train_start(folder)


def test_chats_train_a_family_alike_at_one_replica_and_at_two_and_over_an_interruption(tmp_path: Path) -> None:
    run_distributed(prepare_chats, 1, tmp_path)
    short = [dict(CURRICULUM[0], steps=3)]
    trainer = dict(log_every_n_steps=1, val_check_interval=3, checkpoint_every_n_steps=100)
    for name, replicas, steps in (("one", 1, 3), ("two", 2, 2), ("two", 1, 3)):  # the second stops and is gone on with
        told = dict(trainer, max_steps=steps)
        data = dict(validation_sequences=16)
        run_distributed(train, replicas, split_values(tmp_path, name, curriculum=short, trainer=told, data=data))
    one, two = rows(tmp_path, "one"), rows(tmp_path, "two")
    assert one.keys() == two.keys() == {1, 2, 3}
    for step in one:
        assert 0 < one[step]["counted_tokens"] < 8 * 32
        assert one[step]["counted_tokens"] == two[step]["counted_tokens"]
        for key, value in one[step].items():  # the router's losses, too: its gradients are divided by what counts
            if isinstance(value, float):
                assert two[step][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, key)
    assert 0 < one[3]["validation/counted_tokens"] < 16 * 32
    record = Record.read(list_checkpoints(tmp_path / "run" / "two")[-1])
    assert record.provenance["packing"] == "isolated, longer documents cut"
    assert re.fullmatch(
        r"short: \d+ documents in \d+ sequences of 32 tokens, 9\d\.\d+% full, \d+ longer ones cut",
        record.provenance["sequences"],
    )
