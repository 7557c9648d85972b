"""Reading documents: what is kept, what is skipped and why, in which order, with how much memory."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic.corpus.files import STDLIB, Corpus, SkipReason, Tally, describe_files, find_files
from tests.unit.corpus.reading import read_documents

MIB = 1 << 20
LIMIT = 100


def read(path: Path, document_format: str = "text", **settings: object) -> tuple[list[str], Tally]:
    tally = Tally()
    corpus = Corpus([str(path)], document_format, **settings)  # type: ignore[arg-type]
    return [document.text for document in read_documents(corpus, tally)], tally


def counts(tally: Tally) -> dict[SkipReason, int]:
    return {reason: record.count for reason, record in tally.skipped.items()}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", SkipReason.EMPTY),
        (b" \n\t\r\n", SkipReason.EMPTY),
        (b"\xef\xbb\xbf", SkipReason.EMPTY),
        (b"ELF\x00\x01", SkipReason.BINARY),
        ("wide".encode("utf-16"), SkipReason.UTF16),
        (b"caf\xe9 in latin-1", SkipReason.INVALID_UTF8),
        (b"cut in a character \xe2\x82", SkipReason.INVALID_UTF8),
        (b"x" * (LIMIT + 1), SkipReason.TOO_LARGE),
    ],
)
def test_unusable_file_is_counted_by_reason(tmp_path: Path, content: bytes, reason: SkipReason) -> None:
    (tmp_path / "bad.py").write_bytes(content)
    (tmp_path / "good.py").write_bytes(b"x" * LIMIT)
    texts, tally = read(tmp_path, max_document_bytes=LIMIT)
    assert texts == ["x" * LIMIT]
    assert counts(tally) == {reason: 1}
    assert (tally.kept, tally.kept_bytes) == (1, LIMIT)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", SkipReason.EMPTY),
        (b'{"text": " "}', SkipReason.EMPTY),
        (b'{"text": "a\\u0000b"}', SkipReason.BINARY),
        (b'{"text": "\xe9"}', SkipReason.INVALID_UTF8),
        (b'{"text": "half a pair \\ud83d"}', SkipReason.INVALID_UTF8),
        (b'{"text": "unfinished', SkipReason.INVALID_JSON),
        (b"plain words", SkipReason.INVALID_JSON),
        (b"[" * 90, SkipReason.INVALID_JSON),
        (b'["text"]', SkipReason.NOT_AN_OBJECT),
        (b'"text"', SkipReason.NOT_AN_OBJECT),
        (b'{"content": "other field"}', SkipReason.MISSING_FIELD),
        (b'{"text": null}', SkipReason.NOT_TEXT),
        (b'{"text": ["a"]}', SkipReason.NOT_TEXT),
        (b'{"text": [{"role": "user", "content": "a"}]}', SkipReason.MESSAGES),
        (b'{"messages": [{"role": "user", "content": "a"}]}', SkipReason.MESSAGES),
        (b'{"text": "first"}', SkipReason.DUPLICATE),
        (b'{"text": "' + b"x" * LIMIT + b'"}', SkipReason.TOO_LARGE),
    ],
)
def test_unusable_line_of_jsonl_is_counted_and_reading_goes_on(tmp_path: Path, line: bytes, reason: SkipReason) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"id": 1, "text": "last", "more": {"a": [1]}}')
    texts, tally = read(path, "jsonl", max_document_bytes=LIMIT)
    assert texts == ["first", "last"]
    assert counts(tally) == {reason: 1}


def test_json_nested_beyond_the_recursion_limit_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_bytes(b"[" * 200_000 + b'\n{"text": "kept"}\n')
    texts, tally = read(path, "jsonl")
    assert (texts, counts(tally)) == (["kept"], {SkipReason.INVALID_JSON: 1})


def test_same_id_with_other_text_is_another_document_and_another_field_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    records = [{"id": 7, "body": "one"}, {"id": 7, "body": "two"}, {"id": 8, "body": "one"}]
    path.write_text("\n".join(json.dumps(record) for record in records))
    assert read(path, "jsonl", text_field="body")[0] == ["one", "two"]
    assert read(path, "jsonl", text_field="body", skip_duplicates=False)[0] == ["one", "two", "one"]


def test_lines_keep_their_content_and_lose_only_the_line_end(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeff  indented\r\n\nlast café".encode())
    texts, tally = read(path, "lines")
    assert texts == ["  indented", "last café"]
    assert counts(tally) == {SkipReason.EMPTY: 1}


@pytest.mark.parametrize("document_format", ["text", "lines", "jsonl"])
def test_document_of_50_mb_is_skipped_in_little_memory(tmp_path: Path, document_format: str) -> None:
    with (tmp_path / "a.py").open("wb") as stream:
        stream.truncate(50 * MIB)  # a hole: takes no disk
        stream.seek(50 * MIB)
        stream.write(b'\n{"text": "after it"}\n')
    (tmp_path / "b.py").write_text('{"text": "next file"}')
    tracemalloc.start()
    texts, tally = read(tmp_path, document_format, max_document_bytes=MIB, suffixes=[".py"])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts(tally) == {SkipReason.TOO_LARGE: 1}
    assert len(texts) == (1 if document_format == "text" else 2)
    assert peak_bytes < 8 * MIB


def test_many_empty_documents_are_counted_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(b"\n" * 20_000 + b"the only one")
    tracemalloc.start()
    texts, tally = read(path, "lines")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["the only one"]
    assert counts(tally) == {SkipReason.EMPTY: 20_000}
    assert peak_bytes < MIB


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.py").write_text(f"{number}" * MIB)
    tracemalloc.start()
    for _ in read_documents(Corpus([str(tmp_path)]), Tally()):
        pass
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 12 * MIB  # a few copies of one document of 2 MiB, not 50 of them


def test_max_bytes_ends_the_corpus_before_the_document_that_exceeds_it(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(name * 10)
    texts, tally = read(tmp_path, max_bytes=29)
    assert texts == ["a" * 10, "b" * 10]
    assert tally.stopped_at_max_bytes
    texts, tally = read(tmp_path, max_bytes=30)
    assert len(texts) == 3
    assert not tally.stopped_at_max_bytes


def test_folder_is_walked_in_name_order_without_excluded_and_hidden_folders(tmp_path: Path) -> None:
    for name in ["b.py", "a/z.py", "c/a.py", "a.py", "test/t.py", "c/test/t.py", ".git/x.py", "notes.txt", "B.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    texts, tally = read(tmp_path, exclude_folders=["test"], suffixes=[".py"])
    assert texts == ["B.py", "a/z.py", "a.py", "b.py", "c/a.py"]
    passed_over = {SkipReason.EXCLUDED_FOLDER: 2, SkipReason.HIDDEN: 1, SkipReason.OTHER_SUFFIX: 1}
    assert counts(tally) == passed_over
    assert read(tmp_path / "notes.txt", suffixes=[".py"])[0] == ["notes.txt"]  # named itself: its suffix is no matter


def test_every_file_of_an_own_folder_is_read_or_counted(tmp_path: Path) -> None:
    names = ["a.txt", "b", "test/t.py", "tests/u.md", "site-packages/v.rst", "c.jsonl", ".d", ".e/f", "g.PY"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    texts, tally = read(tmp_path)
    assert texts == ["a.txt", "b", "g.PY", "site-packages/v.rst", "test/t.py", "tests/u.md"]
    assert counts(tally) == {SkipReason.JSON_LINES: 1, SkipReason.HIDDEN: 2}
    assert len(texts) + sum(counts(tally).values()) == len(names)


def test_a_folder_of_json_lines_is_read_without_naming_their_endings(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.ndjson", "c.json"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("not JSON")
    texts, tally = read(tmp_path, "jsonl")
    assert (texts, counts(tally)) == (["a.jsonl", "b.ndjson", "c.json"], {SkipReason.OTHER_SUFFIX: 1})


def to_itself(folder: Path) -> None:
    (folder / "inner.py").symlink_to(folder / "inner.py")


def to_parent(folder: Path) -> None:
    (folder / "loop").symlink_to(folder, target_is_directory=True)


def between_two(folder: Path) -> None:
    for name in ("x", "y"):
        (folder / name).mkdir()
    (folder / "x" / "to_y").symlink_to(folder / "y")
    (folder / "y" / "to_x").symlink_to(folder / "x")


def broken_link(folder: Path) -> None:
    (folder / "gone.py").symlink_to(folder / "nowhere.py")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.py")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "skipped"),
    [
        (to_itself, {SkipReason.UNREADABLE: 1}),
        (to_parent, {SkipReason.FOLDER_SEEN: 1}),
        (between_two, {SkipReason.FOLDER_SEEN: 2}),
        (broken_link, {SkipReason.UNREADABLE: 1}),
        (pipe, {SkipReason.NOT_A_FILE: 1}),
    ],
)
def test_links_that_loop_and_things_that_are_no_files_are_counted(
    tmp_path: Path, make: Callable[[Path], None], skipped: dict[SkipReason, int]
) -> None:
    (tmp_path / "good.py").write_text("good")
    make(tmp_path)
    texts, tally = read(tmp_path)
    assert texts == ["good"]
    assert counts(tally) == skipped


def test_linked_folder_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.py").write_text("a")
    (tmp_path / "also").symlink_to(tmp_path / "real")
    texts, tally = read(tmp_path, skip_duplicates=False)
    assert (texts, counts(tally)) == (["a"], {SkipReason.FOLDER_SEEN: 1})


def test_description_follows_names_sizes_and_times_but_not_the_place(tmp_path: Path) -> None:
    def described(folder: str) -> dict[str, object]:
        description = describe_files(Corpus([str(tmp_path / folder)]))
        del description["paths"]
        return description

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("a")
        os.utime(tmp_path / folder / "a.py", ns=(10**18, 10**18))
    first = described("one")
    assert first == described("two")
    assert (first["num_files"], first["total_bytes"]) == (1, 1)
    os.utime(tmp_path / "two" / "a.py", ns=(10**18, 10**18 + 1))
    assert described("two") != first
    (tmp_path / "one" / "a.py").rename(tmp_path / "one" / "b.py")
    assert described("one") != first


def test_standard_library_is_a_corpus_of_its_own_without_tests() -> None:
    files = list(find_files(Corpus([STDLIB]), Tally()))
    names = [os.fsdecode(file.name) for file in files]
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert not any(name.startswith(("test/", "site-packages/")) or "/tests/" in name for name in names)
    assert sum(file.size_bytes for file in files) > 5 * MIB
