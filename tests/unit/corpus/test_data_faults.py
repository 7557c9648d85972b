"""Broken input really happening: each fault survived, counted by reason with an example, or refused with the remedy."""

import gzip
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic.corpus import blocks as blocks_module
from elastic.corpus import prepare as prepare_module
from elastic.corpus.files import Corpus, Tally
from elastic.corpus.prepare import prepare
from elastic.data.manifest import DataError, SkipRecord
from tests.unit.corpus.reading import read_documents
from tests.unit.data.preparing import config, texts, write_jsonl

OWN_MEMORY = Path("/proc/self/mem")  # a regular file that may be opened and not read, even by root
needs_proc = pytest.mark.skipif(not OWN_MEMORY.exists(), reason="needs Linux's proc file system")

# One line of a mixed jsonl and why it is left out; the first good document stands in line 1.
LINES: tuple[tuple[str, bytes], ...] = (
    ("empty", b""),
    ("empty", b'{"text": ""}'),
    ("empty", b'{"text": " \\n\\t"}\r'),
    ("binary", b'{"text": "nul \\u0000"}'),
    ("binary", b"nul \0"),
    ("invalid_utf8", b'{"text": "\xff"}'),
    ("invalid_utf8", b'{"text": "half a pair \\ud800"}'),
    ("too_large", b'{"text": "' + b"long " * 1000 + b'"}'),
    ("invalid_json", b'{"text": "cut'),
    ("invalid_json", b'{"text": "one"}{"text": "two"}'),
    ("invalid_json", b"text: yaml"),
    ("invalid_json", b"[" * 3000),
    ("invalid_json", b'{"a":' * 600),
    ("invalid_json", b'{"id": ' + b"9" * 4500 + b"}"),
    ("not_an_object", b'["text"]'),
    ("not_an_object", b'"text"'),
    ("not_an_object", b"7"),
    ("not_an_object", b"null"),
    ("missing_field", b'{"Text": "other case"}'),
    ("missing_field", b"{}"),
    ("not_text", b'{"text": 3.5}'),
    ("not_text", b'{"text": NaN}'),
    ("not_text", b'{"text": true}'),
    ("not_text", b'{"text": null}'),
    ("not_text", b'{"text": ["a"]}'),
    ("not_text", b'{"text": {"text": "a"}}'),
    ("duplicate", b'{"id": 2, "text": "a good document, the first"}'),
)


def read(path: Path, document_format: str = "text", **settings: object) -> tuple[list[str], dict[str, SkipRecord]]:
    """Read a corpus: the texts, and what was left out by reason."""
    tally = Tally()
    corpus = Corpus([str(path)], document_format, **settings)  # type: ignore[arg-type]
    found = [document.text for document in read_documents(corpus, tally)]
    return found, {reason.value: record for reason, record in tally.skipped.items()}


def test_every_bad_line_of_a_mixed_jsonl_is_counted_with_its_first_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mixed.jsonl"
    good = [b'{"id": 1, "text": "a good document, the first"}', b'\xef\xbb\xbf{"id": 1, "text": "same id, other text"}']
    path.write_bytes(b"\n".join([good[0], *(line for _, line in LINES), good[1]]))
    manifest = prepare(config(path, tmp_path / "data", max_document_bytes=4600)).manifest
    expected: dict[str, SkipRecord] = {}
    for number, (reason, _) in enumerate(LINES, start=2):
        first = expected.get(reason, SkipRecord(0, f"{path}:{number}"))
        expected[reason] = SkipRecord(first.count + 1, first.example)
    assert manifest.skipped == expected
    assert manifest.num_documents == 2
    in_file = json.loads((tmp_path / "data" / "data.json").read_text())["skipped"]
    assert in_file["not_text"] == {"count": 6, "example": f"{path}:{expected['not_text'].example.rpartition(':')[2]}"}
    # What the recipe prints, one reason a line.
    report = prepare_module.skip_lines(manifest.skipped)
    assert report[0] == f"2 binary (first {path}:5)"
    assert len(report) == len(expected)


def deep_folders(folder: Path) -> None:
    """Nest folders deeper than Python calls go: 1,200 of them."""
    here = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(1200):
            os.mkdir("d", dir_fd=here)
            inner = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
    finally:
        os.close(here)


def path_too_long(folder: Path) -> None:
    """Nest folders until the path of the innermost is longer than the system opens."""
    here = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(20):
            os.mkdir("n" * 250, dir_fd=here)
            inner = os.open("n" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
    finally:
        os.close(here)


def unix_socket(folder: Path) -> None:
    """Bind a socket to a file name; relative, as its address must be short."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("s.py")
    finally:
        os.chdir(before)


def linked_file(folder: Path) -> None:
    """Link a good file twice: the content is there once."""
    for name in ("x.py", "y.py"):
        (folder / name).symlink_to(folder / "good.py")


def gzip_by_mistake(folder: Path) -> None:
    """Write a compressed file under a name that says otherwise."""
    (folder / "z.py").write_bytes(gzip.compress(b"x = 1\n" * 100))


@pytest.fixture
def deep_place(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that is removed whatever its depth, at which pytest's own cleaning up fails."""
    yield tmp_path
    subprocess.run(["rm", "-rf", str(tmp_path)], check=True)


@needs_proc
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "skipped"),
    [
        (deep_folders, {}),
        (path_too_long, {"unreadable": 1}),
        (unix_socket, {"not_a_file": 1}),
        (lambda folder: (folder / "zero.py").symlink_to("/dev/zero"), {"not_a_file": 1}),
        (lambda folder: os.mkfifo(folder / "pipe.py"), {"not_a_file": 1}),
        (lambda folder: (folder / "loop.py").symlink_to("loop.py"), {"unreadable": 1}),
        (lambda folder: (folder / "loop").symlink_to("."), {"folder_seen": 1}),
        (lambda folder: (folder / "gone.py").symlink_to("nowhere"), {"unreadable": 1}),
        (lambda folder: (folder / "memory.py").symlink_to(OWN_MEMORY), {"unreadable": 1}),
        (lambda folder: (folder / "cpu.py").symlink_to("/proc/cpuinfo"), {"changed": 1}),
        (linked_file, {"duplicate": 2}),
        (gzip_by_mistake, {"compressed": 1}),
        (lambda folder: (folder / "u.py").write_bytes("x = 1".encode("utf-16")), {"utf16": 1}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_strange_thing_in_a_folder_is_survived_and_named(
    deep_place: Path, make: Callable[[Path], None], skipped: dict[str, int]
) -> None:
    (deep_place / "good.py").write_text("good")
    make(deep_place)
    found, left_out = read(deep_place)
    assert found == ["good"]
    assert {reason: record.count for reason, record in left_out.items()} == skipped
    assert all(record.example.startswith(f"{deep_place}/") for record in left_out.values())


def test_the_innermost_of_very_deep_folders_is_read(deep_place: Path) -> None:
    deep_folders(deep_place)
    (deep_place / "/".join("d" * 1200) / "deep.py").write_text("deep")
    assert read(deep_place) == (["deep"], {})


@pytest.mark.parametrize("special", ["pipe", "zero"])
@pytest.mark.timeout(60)
def test_special_file_given_itself_is_never_opened(tmp_path: Path, special: str) -> None:
    path = tmp_path / special
    if special == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=rf"no usable document .*skipped: 1 not_a_file \(first {path}\)"):
        prepare(config(path, tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_compressed_or_utf16_jsonl_is_one_file_and_not_a_thousand_bad_lines(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts())
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.jsonl").write_bytes(lines.encode("utf-16"))
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\n')
    found, left_out = read(tmp_path, "jsonl", suffixes=[".jsonl"])
    assert found == ["good"]
    assert left_out == {
        "compressed": SkipRecord(1, str(tmp_path / "a.jsonl")),
        "utf16": SkipRecord(1, str(tmp_path / "b.jsonl")),
    }


def test_name_that_is_no_utf8_is_read_and_shown(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/a\xff.py", "wb") as stream:
        stream.write(b"\0")
    with open(os.fsencode(tmp_path) + b"/b\xff.py", "wb") as stream:
        stream.write(b"good")
    assert read(tmp_path) == (["good"], {"binary": SkipRecord(1, f"{tmp_path}/a\\xff.py")})


def test_file_that_goes_while_others_are_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 1)
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(name)
    tally, found = Tally(), []
    for document in read_documents(Corpus([str(tmp_path)]), tally):
        found.append(document.text)
        (tmp_path / "b.py").unlink(missing_ok=True)
    assert found == ["a", "c"]
    assert tally.skipped == {"unreadable": SkipRecord(1, str(tmp_path / "b.py"))}


def test_file_that_grows_between_the_two_readings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.jsonl"
    write_jsonl(source, texts())

    def train_and_append(*args: object) -> None:
        train_tokenizer(*args)
        with source.open("a") as stream:
            stream.write('{"text": "came later"}\n')

    train_tokenizer = prepare_module.train_tokenizer
    monkeypatch.setattr(prepare_module, "train_tokenizer", train_and_append)
    with pytest.raises(DataError, match="changed while it was read; start again when it is at rest"):
        prepare(config(source, tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("document_format", ["text", "lines", "jsonl"])
@pytest.mark.parametrize("excess_bytes", [0, 1])
def test_document_at_the_border_of_the_largest_is_kept_and_one_byte_beyond_is_not(
    tmp_path: Path, document_format: str, excess_bytes: int
) -> None:
    content = b'{"text": "' + b"long " * 20_000 + b'"}'
    path = tmp_path / "one.py"
    path.write_bytes(content)
    limit = len(content) - excess_bytes
    found, left_out = read(path, document_format, max_document_bytes=limit)
    assert len(found) == 1 - excess_bytes
    where = str(path) if document_format == "text" else f"{path}:1"
    assert left_out == ({"too_large": SkipRecord(1, where)} if excess_bytes else {})
