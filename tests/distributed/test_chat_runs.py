"""A run on chats, packed and isolated: a parent, its family, validation; alike at one replica and at two, resumed."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from elastic.checkpoint.find import list_checkpoints
from elastic.checkpoint.record import Record
from elastic.config.sections import DistillConfig
from elastic.corpus.config import PrepareConfig
from elastic.corpus.prepare import prepare
from elastic.data.held_out import HeldOut
from elastic.data.tokens import TokenStream
from elastic.model.model import build_model
from elastic.train.evaluation import evaluate_subnets
from elastic.train.pipeline import PipelineRunner
from elastic.world.groups import Layout, join_world
from tests.distributed.harness import run_distributed
from tests.distributed.training import CURRICULUM, rows, split_values, tiny_run_space, train, train_start
from tests.unit.data.chatting import QWEN, conversations, unmarked, write_chats, write_tokenizer


def prepare_chats(folder: Path) -> None:
    """Prepare chats of which only the last answers count, so that sequences without any are met; train the start."""
    tokenizer = write_tokenizer(folder / "tokenizer", unmarked(QWEN), vocab_size=300)
    source = write_chats(folder / "chats.jsonl", conversations("qwen", 120))
    data = dict(output_dir=str(folder / "data"), paths=[str(source)], validation_ratio=0.2)
    prepare(PrepareConfig(**data, document_format="chat", tokenizer_path=str(tokenizer), loss_on="last_response"))
    train_start(folder)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    run_distributed(prepare_chats, 1, folder)
    return folder


def packed_and_alone(folder: Path) -> tuple[float | None, int, float, int]:
    """Return mean loss and number of labels of the held-out split, as validation reads it, and document by document."""
    layout = Layout(dtype=torch.float64)
    here, space = join_world(layout, torch.device("cpu")), tiny_run_space()
    model = build_model(space, layout, seed=1, init_std=0.3).eval()
    runner = PipelineRunner(here, model, DistillConfig(kl_weight=0.0))
    stream = TokenStream(folder / "data" / "validation")
    held_out = HeldOut(stream, 64)
    packed = evaluate_subnets(runner, {"parent": None}, held_out, len(held_out), 3)["parent"].mean
    total, count = 0.0, 0
    for first, end in pairwise(stream.bounds().tolist()):
        for start in range(first, end - 1, 64):
            length = min(64, end - 1 - start)
            read, counted = stream.read(start, length + 1), stream.counted(start + 1, length)
            with torch.no_grad():
                logits = (model(read[None, :-1]) @ model.head_weight().t())[:, 0]
            losses = torch.nn.functional.cross_entropy(logits, read[1:], reduction="none")
            total, count = total + float(losses[counted].sum()), count + int(counted.sum())
    return packed.cross_entropy, packed.num_tokens, total / count, count


def test_the_loss_of_packed_chats_is_that_of_each_chat_alone(chats: Path) -> None:
    ((packed, num_packed, alone, count),) = run_distributed(packed_and_alone, 1, chats)
    assert num_packed == count > 0 and packed == pytest.approx(alone, rel=1e-6)


def test_chats_train_a_family_alike_at_one_replica_and_at_two_and_over_an_interruption(chats: Path) -> None:
    short = [dict(CURRICULUM[0], steps=3)]
    trainer = dict(log_every_n_steps=1, val_check_interval=3, checkpoint_every_n_steps=100)
    for name, replicas, steps in (("one", 1, 3), ("two", 2, 2), ("two", 1, 3)):  # the second stops and is gone on with
        told = dict(trainer, max_steps=steps)
        data = dict(validation_sequences=16)
        run_distributed(train, replicas, split_values(chats, name, curriculum=short, trainer=told, data=data))
    one, two = rows(chats, "one"), rows(chats, "two")
    assert one.keys() == two.keys() == {1, 2, 3}
    for step in one:
        assert 0 < one[step]["counted_tokens"] < 8 * 32 and 0.9 < one[step]["fill"] <= 1
        assert one[step]["counted_tokens"] == two[step]["counted_tokens"]
        for key, value in one[step].items():  # the router's losses, too: its gradients are divided by what counts
            if isinstance(value, float):
                assert two[step][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, key)
    assert 0 < one[3]["validation/counted_tokens"] < 16 * 32
    record = Record.read(list_checkpoints(chats / "run" / "two")[-1])
    assert record.provenance["packing"] == "isolated, longer documents cut"
    assert re.fullmatch(
        r"short: \d+ documents in \d+ sequences of 32 tokens, 9\d\.\d+% full, \d+ longer ones cut",
        record.provenance["sequences"],
    )
