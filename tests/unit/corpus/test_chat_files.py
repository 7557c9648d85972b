"""Files of chats: formats, templates of their own, and what is passed over with its reason."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from elastic.corpus.chat import TemplateRefusal
from elastic.corpus.files import SkipReason
from elastic.corpus.prepare import prepare
from elastic.data.manifest import DataError, SkipRecord
from tests.unit.data.chatting import (
    ANSWER,
    CHATML,
    USER,
    chat_config,
    conversations,
    opened,
    parsed,
    unmarked,
    write_chats,
    write_tokenizer,
)  # fmt: skip


def test_a_template_from_a_file_goes_along_with_the_tokenizer(tmp_path: Path) -> None:
    bare = write_tokenizer(tmp_path / "bare", None)
    source = write_chats(tmp_path / "chats.jsonl", conversations("chatml", 20))
    with pytest.raises(DataError, match=rf"^tokenizer {bare}: has no chat template; .* chat_template=FILE\.jinja"):
        prepare(chat_config(tmp_path, source, bare))
    file = tmp_path / "mine.jinja"
    file.write_text(unmarked(CHATML))
    prepared = prepare(chat_config(tmp_path, source, bare, chat_template=str(file)))
    assert (prepared.folder / "chat_template.jinja").read_bytes() == file.read_bytes()
    file.write_text("{%- for message in messages %}{{- message.content }")
    with pytest.raises(DataError, match="chat_template: line 1: "):
        prepare(chat_config(tmp_path, source, bare, chat_template=str(file), output_dir=str(tmp_path / "other")))
    file.write_text(unmarked(CHATML).replace("<|im_end|>", "<|end|>"))
    with pytest.raises(DataError, match=r"writes <\|end\|>, letters to it; take the tokenizer the template was writ"):
        prepare(chat_config(tmp_path, source, bare, chat_template=str(file), output_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


BAD = {
    '{"messages": [{"role": "user", ': SkipReason.INVALID_JSON,
    "[1]": SkipReason.NOT_AN_OBJECT,
    '{"text": "no chat"}': SkipReason.MISSING_FIELD,
    '{"messages": []}': SkipReason.EMPTY,
    '{"messages": "hello"}': SkipReason.BAD_MESSAGE,
    '{"messages": ["hello"]}': SkipReason.BAD_MESSAGE,
    json.dumps({"messages": [USER, ANSWER], "tools": "add"}): SkipReason.BAD_MESSAGE,
    json.dumps({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}): SkipReason.BAD_MESSAGE,
    json.dumps({"messages": [USER, {"role": "assistant", "tool_calls": "add"}]}): SkipReason.BAD_MESSAGE,
    json.dumps({"messages": [{"content": "who?"}, ANSWER]}): SkipReason.MISSING_ROLE,
    json.dumps({"messages": [{**USER, "role": None}, ANSWER]}): SkipReason.MISSING_ROLE,
    json.dumps({"messages": [{**USER, "weight": 0}, ANSWER]}): SkipReason.UNKNOWN_FIELD,
    json.dumps({"messages": [USER]}): SkipReason.NO_RESPONSE,
    json.dumps({"messages": [{"role": "system", "content": "be kind"}]}): SkipReason.NO_RESPONSE,
    json.dumps({"messages": [USER, {"role": "assistant", "content": " \n"}]}): SkipReason.EMPTY_ANSWER,
    json.dumps({"messages": [USER, {"role": "assistant", "reasoning_content": "hm"}]}): SkipReason.EMPTY_ANSWER,
    json.dumps({"messages": [USER, {"role": "critic", "content": "no"}, ANSWER]}): SkipReason.REFUSED,
    json.dumps({"messages": [{**USER, "content": "\ud800"}, ANSWER]}): SkipReason.INVALID_UTF8,
    json.dumps({"messages": [{**USER, "content": "a\0b"}, ANSWER]}): SkipReason.BINARY,
}


def test_what_is_no_usable_conversation_is_counted_by_reason_and_leaves_no_trace(
    tmp_path: Path, chat_folders: dict[str, Path]
) -> None:
    good = [json.dumps(record) for record in conversations("llama3", 30)]
    source = tmp_path / "chats.jsonl"
    source.write_text("\n".join([*good, *BAD, good[0]]) + "\n")
    prepared = prepare(chat_config(tmp_path, source, chat_folders["llama3"]))
    expected: dict[str, SkipRecord] = {"duplicate": SkipRecord(1, f"{source}:{31 + len(BAD)}")}
    for line, reason in enumerate(BAD.values(), start=31):
        detail = ": no such role" if reason is SkipReason.REFUSED else ""
        expected.setdefault(reason, SkipRecord(0, f"{source}:{line}{detail}")).count += 1
    assert prepared.manifest.skipped == expected and prepared.manifest.num_documents == 30
    source.write_text("\n".join(BAD) + "\n")
    advice = r'a message may have the fields content.*; a line of chats is {"messages"'
    with pytest.raises(DataError, match=rf"no usable document .*no_response .*{advice}"):
        prepare(chat_config(tmp_path, source, chat_folders["llama3"], output_dir=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
    with pytest.raises(TemplateRefusal, match="no such role"):
        opened(chat_folders["llama3"]).render(parsed({"messages": [{**USER, "role": "critic"}, ANSWER]}))


def test_settings_that_do_not_fit_chats_are_named(tmp_path: Path, chat_folders: dict[str, Path]) -> None:
    source = write_chats(tmp_path / "chats.jsonl", conversations("chatml", 5))
    for changes, message in (
        ({"tokenizer_path": None}, "tokenizer_path = null: chats need a tokenizer"),
        ({"add_bos": True}, "add_bos = true: a chat begins as its template writes it"),
        ({"chat_template": "none.jinja"}, 'chat_template = "none.jinja": must be a file'),
        ({"document_format": "jsonl", "loss_on": "response"}, 'loss_on = "response": is for chats'),
    ):
        with pytest.raises(DataError, match=message):
            prepare(chat_config(tmp_path, source, chat_folders["chatml"], **changes))


def test_message_of_10_mb_is_counted_where_it_is_too_large(tmp_path: Path, chat_folders: dict[str, Path]) -> None:
    record = {"messages": [USER, {"role": "assistant", "content": "word in a line\n" * 700_000}]}
    source = write_chats(tmp_path / "chats.jsonl", [record, *conversations("chatml", 5)])
    prepared = prepare(chat_config(tmp_path, source, chat_folders["chatml"], max_document_bytes=1 << 20))
    assert prepared.manifest.skipped == {"too_large": SkipRecord(1, f"{source}:1")}


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
def test_packed_files_give_the_same_conversations(tmp_path: Path, chat_folders: dict[str, Path], kind: str) -> None:
    records = [{"messages": record["messages"]} for record in conversations("qwen", 30)]
    plain = write_chats(tmp_path / "chats.jsonl", records)
    (tmp_path / "packed").mkdir()
    packed = tmp_path / "packed" / ("chats.parquet" if kind == "parquet" else f"chats.jsonl.{kind}")
    if kind == "gz":
        packed.write_bytes(gzip.compress(plain.read_bytes()))
    elif kind == "zst":
        packed.write_bytes(pytest.importorskip("zstandard").compress(plain.read_bytes()))
    else:
        pytest.importorskip("pyarrow.parquet").write_table(sys.modules["pyarrow"].Table.from_pylist(records), packed)
    first = prepare(chat_config(tmp_path, plain, chat_folders["qwen"])).manifest
    second = prepare(
        chat_config(tmp_path, packed.parent, chat_folders["qwen"], output_dir=str(tmp_path / "again"))
    ).manifest
    assert {name: split.files for name, split in first.splits.items()} == {
        name: split.files for name, split in second.splits.items()
    }
    packed.write_bytes(packed.read_bytes()[:-20])  # cut off: what came before counts, and the file is named
    with pytest.raises(DataError, match="overwrite=true"):
        prepare(chat_config(tmp_path, packed, chat_folders["qwen"], output_dir=str(tmp_path / "again")))
    both = {"output_dir": str(tmp_path / "both"), "paths": [str(plain), str(packed)]}
    cut = prepare(chat_config(tmp_path, plain, chat_folders["qwen"], **both)).manifest
    assert cut.skipped["unreadable"] == SkipRecord(1, str(packed)) and cut.num_documents == first.num_documents


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, chat_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    for module in ("zstandard", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{name}: needs the package {package}, .*: pip install {package}$"):
        prepare(chat_config(tmp_path, tmp_path / name, chat_folders["chatml"]))
    assert not (tmp_path / "data").exists()
