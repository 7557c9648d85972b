"""Preparing data in several processes: the same bytes whatever their number, and nothing left behind by a death."""

import io
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from elastic.corpus import blocks as blocks_module
from elastic.corpus.chosen import Chosen
from elastic.corpus.config import PrepareConfig
from elastic.corpus.prepare import prepare
from elastic.corpus.workers import SERVE, Scanned
from elastic.data.manifest import DataError
from elastic.verbs.prepare_data import run_prepare
from tests.unit.data.chatting import TEMPLATES, USER, chat_config, conversations, write_chats, write_tokenizer
from tests.unit.data.preparing import config, contents, texts, write_jsonl

pytestmark = pytest.mark.timeout(300)


def workers_of(parent: int) -> list[int]:
    """Return the worker processes that a process has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (entry / "cmdline").read_bytes(), (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if SERVE.encode() in command and int(status[1]) == parent:
            found.append(int(entry.name))
    return found


@pytest.fixture(params=["text", "chats"])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """Return the preparation of a corpus of some hundred blocks, with copies and with what is left out."""
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 500)
    source = tmp_path / "source"
    source.mkdir()
    if request.param == "text":
        write_jsonl(source / "a.jsonl", [*texts(), *texts()[:9], " "])
        (source / "b.jsonl").write_text("no JSON\n")
        return config(source, tmp_path / "data", max_bytes=30_000)
    records = [*conversations("qwen", 30), {"messages": [USER]}, *conversations("qwen", 3)]
    write_chats(source / "a.jsonl", records)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", TEMPLATES["qwen"])
    return chat_config(tmp_path, source, tokenizer)


def test_the_same_bytes_with_any_number_of_processes(settings: PrepareConfig, tmp_path: Path) -> None:
    counts = "12" if settings.is_chat else "123"  # for chats each process imports transformers
    folders = [prepare(replace(settings, workers=count, output_dir=str(tmp_path / count))).folder for count in counts]
    one, *others = map(contents, folders)
    assert all(other == one for other in others) and one["train.bin"]
    assert workers_of(os.getpid()) == []
    assert prepare(replace(settings, workers="2", output_dir=str(tmp_path / "1"))).already_prepared


@pytest.mark.parametrize("settings", ["text"], indirect=True)
def test_a_killed_process_or_an_interrupt_ends_the_preparation_and_leaves_nothing(
    settings: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_one(chosen: Chosen, found: Scanned) -> None:
        monkeypatch.setattr(Chosen, "add", add)
        os.kill(workers_of(os.getpid())[0], signal.SIGKILL)
        add(chosen, found)

    def interrupt(chosen: Chosen, found: Scanned) -> None:
        raise KeyboardInterrupt

    def end(chosen: Chosen, found: Scanned) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # as Slurm does when a job's time is up

    add, before = Chosen.add, sorted(tmp_path.iterdir())
    monkeypatch.setattr(Chosen, "add", kill_one)
    with pytest.raises(DataError, match=r"a worker process was ended by signal 9, and nothing is written; .*workers=N"):
        prepare(replace(settings, workers="2"))
    monkeypatch.setattr(Chosen, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(settings, workers="2"))
    monkeypatch.setattr(Chosen, "add", end)
    with pytest.raises(SystemExit, match="143"):
        run_prepare(settings, Console(file=io.StringIO()))
    assert sorted(tmp_path.iterdir()) == before and workers_of(os.getpid()) == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # the child forks only to be killed
@pytest.mark.parametrize("settings", ["text"], indirect=True)
def test_processes_end_when_their_parent_is_killed(
    settings: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(chosen: Chosen, found: Scanned) -> None:
        (tmp_path / "workers").write_text(" ".join(map(str, workers_of(os.getpid()))))
        os.kill(os.getpid(), signal.SIGKILL)

    parent = os.fork()
    if parent == 0:
        monkeypatch.setattr(Chosen, "add", die)
        try:
            prepare(replace(settings, workers="2"))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
    started = [Path("/proc") / number for number in (tmp_path / "workers").read_text().split()]
    deadline = time.monotonic() + 60
    while any(entry.exists() and b"serve" in (entry / "cmdline").read_bytes() for entry in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(started) == 2 and not (tmp_path / "data").exists()


@pytest.mark.parametrize("settings", ["text"], indirect=True)
def test_what_a_process_finds_wrong_is_said_here(settings: PrepareConfig, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "{%- for message in messages %}{{- message.content }")
    chats = write_chats(tmp_path / "chats.jsonl", conversations("qwen", 5))
    with pytest.raises(DataError, match="chat_template: line 1: "):
        prepare(replace(chat_config(tmp_path, chats, tokenizer), workers="2"))
    for wrong in ("0", "2000", "many"):
        with pytest.raises(DataError, match=rf'workers = "{wrong}": must be auto, or a number of processes'):
            prepare(replace(settings, workers=wrong))
