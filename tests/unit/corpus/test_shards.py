"""A corpus dealt over shards: together the documents of the whole, in its order; opened as one folder, or refused."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.corpus.config import PrepareConfig
from elastic.corpus.prepare import Prepared, prepare
from elastic.data.manifest import DataError, checked_manifest, read_manifest
from elastic.data.shards import Shard
from elastic.data.tokenizer import train_tokenizer
from elastic.data.tokens import TokenStream
from tests.unit.data.chatting import chat_config, conversations, write_chats
from tests.unit.data.preparing import config, texts, write_jsonl


@pytest.fixture
def settings(tmp_path: Path) -> PrepareConfig:
    """Return the preparation of one large file of lines and two small ones, of two sources."""
    train_tokenizer(texts(), 300, tmp_path / "tokenizer")
    (tmp_path / "source").mkdir()
    write_jsonl(tmp_path / "source" / "a.jsonl", texts()[:3])
    write_jsonl(tmp_path / "source" / "b.jsonl", texts()[3:190])
    write_jsonl(tmp_path / "z.jsonl", texts()[190:])
    with (tmp_path / "z.jsonl").open("a") as stream:
        stream.write(
            f'no JSON\n{{"text": "a line that is {"very " * 200} long"}}\n{{"text": "the last, without a line end"}}'
        )
    sources = [str(tmp_path / "source"), str(tmp_path / "z.jsonl")]
    return replace(config(tmp_path, tmp_path / "data"), paths=sources, tokenizer_path=str(tmp_path / "tokenizer"))


def prepare_shards(settings: PrepareConfig, of: int) -> list[Prepared]:
    """Prepare all shards, the last one first."""
    return [prepare(replace(settings, shard=f"{number}/{of}")) for number in range(of, 0, -1)]


def everything(folder: Path, split: str) -> tuple[list[int], list[bool], list[int]]:
    """Return a split's tokens, which count, and where its documents begin."""
    stream = TokenStream(folder / split)
    whole = (0, stream.num_tokens)
    return stream.read(*whole).tolist(), stream.counted(*whole).tolist(), stream.bounds().tolist()


def same_as_unsharded(settings: PrepareConfig, tmp_path: Path, of: int) -> None:
    whole = prepare(replace(settings, output_dir=str(tmp_path / "whole"))).manifest
    *others, last = prepare_shards(settings, of)
    assert [prepared.joined for prepared in others] == [None] * (of - 1)
    joined = read_manifest(tmp_path / "data")
    assert last.joined == joined == checked_manifest(tmp_path / "data", verify="full")
    assert (joined.num_documents, joined.tokenizer) == (whole.num_documents, whole.tokenizer)
    assert {reason: record.count for reason, record in joined.skipped.items()} == {
        reason: record.count for reason, record in whole.skipped.items()
    }
    for name, split in whole.splits.items():
        assert replace(joined.splits[name], files={}) == replace(split, files={})
        assert everything(tmp_path / "data", name) == everything(tmp_path / "whole", name)
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (tmp_path / "whole" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("of", [2, 7])
def test_shards_of_lines_are_together_what_one_folder_is(settings: PrepareConfig, tmp_path: Path, of: int) -> None:
    same_as_unsharded(settings, tmp_path, of)


def test_shards_of_files_that_cannot_be_cut_are_together_what_one_folder_is(
    tmp_path: Path, chat_folders: dict[str, Path]
) -> None:
    (tmp_path / "chats").mkdir()
    records = conversations("llama3", 60)
    for number in range(4):
        write_chats(tmp_path / "chats" / f"{number}.jsonl", records[15 * number : 15 * number + 15])
    for number in (0, 2):
        plain = tmp_path / "chats" / f"{number}.jsonl"
        plain.with_suffix(".jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    (tmp_path / "chats" / "README").write_text("no chat, counted once")
    same_as_unsharded(chat_config(tmp_path, tmp_path / "chats", chat_folders["llama3"]), tmp_path, 3)


def test_every_byte_belongs_to_one_shard() -> None:
    sizes = [5, 0, 17, 1, 0, 30, 2, 0]
    for of in (1, 2, 3, 10, 55):
        for is_cut in (True, False):
            first, dealt = 0, []
            for size in sizes:
                shares = [
                    Shard(number, of).share(first, size, sum(sizes), is_cut=is_cut) for number in range(1, of + 1)
                ]
                dealt.append([share for share in shares if share is not None])
                first += size
            for size, shares in zip(sizes, dealt, strict=True):
                assert shares[0][0] == 0 and shares[-1][1] == size
                assert [end for _, end in shares[:-1]] == [start for start, _ in shares[1:]]


def test_shards_that_do_not_belong_together_are_refused(settings: PrepareConfig, tmp_path: Path) -> None:
    for number in (1, 3, 4):
        prepare(replace(settings, shard=f"{number}/4"))
    with pytest.raises(DataError, match=r"data: lacks shard 2 of 4; prepare it with shard=2/4"):
        TokenStream(tmp_path / "data" / "train")
    with pytest.raises(DataError, match=r"holds what is no shard of 3 \(shard_00001_of_00004"):
        prepare(replace(settings, shard="1/3"))
    train_tokenizer(texts()[:9], 290, tmp_path / "other")
    with pytest.raises(DataError, match=r"shard_00002_of_00004: was prepared with other settings than shard_00001"):
        prepare(replace(settings, shard="2/4", tokenizer_path=str(tmp_path / "other")))
    with pytest.raises(DataError, match=r"data: holds all shards, not joined; prepare one of them again"):
        TokenStream(tmp_path / "data" / "train")
    (tmp_path / "data" / "chat_template.jinja").write_text("of the tokenizer before")
    assert prepare(replace(settings, shard="2/4", overwrite=True)).joined is not None
    assert not (tmp_path / "data" / "chat_template.jinja").exists()
    TokenStream(tmp_path / "data" / "train")
    again = prepare(replace(settings, shard="3/4"))
    assert again.already_prepared and again.joined == read_manifest(tmp_path / "data")
    shutil.move(tmp_path / "data" / "shard_00001_of_00004", tmp_path / "moved")
    with pytest.raises(DataError, match=r"data: shard_00001_of_00004/train.bin is missing"):
        TokenStream(tmp_path / "data" / "train")


def test_what_a_shard_holds_is_looked_at_when_it_is_read_or_as_told(settings: PrepareConfig, tmp_path: Path) -> None:
    prepare_shards(settings, 3)
    sound = TokenStream(tmp_path / "data" / "train").read(0, 50)
    damaged = tmp_path / "data" / "shard_00003_of_00003" / "train.bin"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    stream = TokenStream(tmp_path / "data" / "train")
    assert stream.read(0, 50).tolist() == sound.tolist()
    with pytest.raises(DataError, match=r"shard_00003_of_00003/train.bin has the right size and another content"):
        stream.read(stream.num_tokens - 9, 9)
    trusting = TokenStream(tmp_path / "data" / "train", verify="sizes")
    assert not trusting.read(stream.num_tokens - 9, 9).any()
    with pytest.raises(DataError, match=r"shard_00003_of_00003/train.bin has the right size and another content"):
        TokenStream(tmp_path / "data" / "train", verify="full")


def test_a_shard_without_a_usable_document_says_that_it_is_one_of_many(tmp_path: Path) -> None:
    train_tokenizer(texts(), 300, tmp_path / "tokenizer")
    (tmp_path / "source.jsonl").write_text('{"text": ""}\n' * 99 + '{"text": "%s"}\n' % ("a " * 999))
    given = config(tmp_path / "source.jsonl", tmp_path / "data", tokenizer_path=str(tmp_path / "tokenizer"))
    with pytest.raises(DataError, match=r"in shard 1/9 of .*source.jsonl; skipped: .* empty .*; .* take fewer shards"):
        prepare(replace(given, shard="1/9"))


def test_a_shard_without_held_out_documents_is_one(settings: PrepareConfig, tmp_path: Path) -> None:
    """Few documents are held out, by the same hash everywhere, and not one in each shard."""
    prepare_shards(replace(settings, validation_ratio=0.01, test_ratio=0.02), 7)
    for split in ("validation", "test"):
        counts = [
            json.loads((folder / "data.json").read_text())["splits"][split]["num_documents"]
            for folder in sorted((tmp_path / "data").glob("shard_*"))
        ]
        assert 0 in counts and sum(counts) >= 1
        assert len(TokenStream(tmp_path / "data" / split).bounds()) == sum(counts) + 1
        np.testing.assert_array_less(0, np.diff(TokenStream(tmp_path / "data" / split).bounds()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": "0/4"}, 'shard = "0/4": must be a number, from 1, of how many: 3/64'),
        ({"shard": "5/4"}, 'shard = "5/4": must be a number'),
        ({"shard": "third"}, 'shard = "third": must be a number'),
        ({"shard": "1/2", "tokenizer_path": None}, "tokenizer_path = null: shards are encoded with one tokenizer"),
        ({"shard": "1/2", "max_bytes": 99}, "max_bytes = 99: a shard does not know"),
        ({"shard": "1/5", "document_format": "text"}, "4 of 5 shards would hold nothing, the first is 2; only plain"),
    ],
)
def test_shards_that_cannot_be_are_refused(
    settings: PrepareConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(replace(settings, **changes))
    assert not (tmp_path / "data").exists()
