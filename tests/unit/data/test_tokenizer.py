"""The tokenizer: deterministic, lossless, the same in transformers, and not to be forged by a document."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from elastic.config.sections import ModelConfig
from elastic.data import tokenizer as tokenizer_module
from elastic.data.manifest import DataError
from elastic.data.tokenizer import (
    END_OF_TEXT,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

CORPUS = [f"def function_{number}(value: int) -> int:\n    return value + {number}\n" for number in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CORPUS, 400, folder)
    return folder


def strange_texts() -> list[str]:
    generator = random.Random(0)
    anything = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    texts = [
        "",
        " ",
        "\r\n\t\r",
        "\0\x01\x7f\x80\xff",
        "e\u0301 é",
        "👩‍👩‍👧 🇳🇴",
        "\ufeffmark",
        "\u2028\u0085",
        "  two  ",
        "'s 'll",
    ]
    return texts + ["".join(generator.choices(anything, k=200)) for _ in range(50)]


def test_any_text_survives_encoding_and_decoding(folder: Path) -> None:
    loaded = load_tokenizer(folder)
    for text in strange_texts() + CORPUS[:3]:
        (ids,) = loaded.encode_documents([text])
        assert ids[-1] == loaded.eos_id
        assert loaded.tokenizer.decode(ids[:-1].tolist()) == text


def test_training_the_same_texts_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(CORPUS), 400, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(folder)


@pytest.mark.parametrize("auto_class", [AutoTokenizer, PreTrainedTokenizerFast])
def test_transformers_loads_the_folder_and_gives_the_same_ids(folder: Path, auto_class: type) -> None:
    theirs = auto_class.from_pretrained(folder)  # type: ignore[attr-defined]
    ours = load_tokenizer(folder)
    assert (theirs.eos_token, theirs.pad_token, theirs.eos_token_id) == (END_OF_TEXT, END_OF_TEXT, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    for text in strange_texts() + CORPUS[:3]:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode_documents([text])[0][:-1].tolist()
        assert theirs.decode(ids) == text


def test_vocabulary_is_what_was_asked_for_or_what_the_corpus_gives(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(folder).vocab_size == 400
    train_tokenizer(["aa aa"], 400, tmp_path)
    assert 257 < load_tokenizer(tmp_path).vocab_size < 270
    with pytest.raises(DataError, match=r"vocab_size = 256: must be at least 257"):
        train_tokenizer(CORPUS, 256, tmp_path)


def test_vocabulary_counts_the_largest_id_when_ids_have_holes(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "<end>": 9}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.eos_id) == (10, 9)


@pytest.mark.parametrize(("vocab_size", "multiple", "padded"), [(2048, 128, 2048), (2049, 128, 2176), (257, 1, 257)])
def test_padded_vocabulary_is_the_next_multiple(vocab_size: int, multiple: int, padded: int) -> None:
    assert ModelConfig(vocab_multiple=multiple).padded_vocab(vocab_size) == padded


def test_document_cannot_forge_its_end_unless_special_tokens_are_asked_for(folder: Path) -> None:
    text = f"before {END_OF_TEXT} after"
    loaded = load_tokenizer(folder)
    (ids,) = loaded.encode_documents([text])
    assert ids.tolist().count(loaded.eos_id) == 1
    assert loaded.tokenizer.decode(ids[:-1].tolist()) == text
    (parsed,) = load_tokenizer(folder, parse_special_tokens=True).encode_documents([text])
    assert parsed.tolist().count(loaded.eos_id) == 2


def test_truncation_and_padding_saved_in_a_given_tokenizer_are_switched_off(folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(folder, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["x", CORPUS[0]]
    expected = load_tokenizer(folder).encode_documents(texts)
    found = load_tokenizer(tmp_path).encode_documents(texts)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


@pytest.mark.timeout(60)
def test_one_endless_word_does_not_stop_training(tmp_path: Path) -> None:
    # Without the guard this takes hours: every merge walks through the whole word.
    generator = random.Random(0)
    word = "".join(generator.choices("abcdefghij", k=1 << 20))
    train_tokenizer([word, " " * (1 << 20), *CORPUS], 2000, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.tokenizer.decode(loaded.encode_documents([word])[0][:-1].tolist()) == word


def test_copy_takes_no_code_and_no_pointer_to_code(folder: Path, tmp_path: Path) -> None:
    given, copied = tmp_path / "given", tmp_path / "copied"
    copy_tokenizer(folder, given)
    config = json.loads((given / "tokenizer_config.json").read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.T", None]}
    }
    (given / "tokenizer_config.json").write_text(json.dumps(config))
    (given / "evil.py").write_text("raise SystemExit")
    (given / "chat_template.jinja").write_text("{{ messages }}")
    copy_tokenizer(given, copied)
    assert sorted(path.name for path in copied.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "auto_map" not in json.loads((copied / "tokenizer_config.json").read_text())
    assert tokenizer_fingerprint(copied) != tokenizer_fingerprint(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "cannot be read"),
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "Unheard"}}', "is not a tokenizer"),
        ("tokenizer_config.json", None, "no eos_token"),
        ("tokenizer_config.json", '{"eos_token": null}', "no eos_token"),
        ("tokenizer_config.json", '{"eos_token": "<other>"}', "'<other>' is not in the vocabulary"),
        ("tokenizer_config.json", "[1]", "does not hold a JSON object"),
        ("tokenizer_config.json", "{", "cannot be read"),
    ],
)
def test_broken_tokenizer_folder_is_refused(
    folder: Path, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    copy_tokenizer(folder, tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_long_text_in_pieces_gives_the_ids_of_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    spaces = ["\n", "\n\n", "\n  ", " ", "  ", "\t", "\r\n", ""]
    words = ["def", "value", "+", "_", "12345", "é", "雨雨", "'s", "\n"]
    texts = ["".join(generator.choice(words) + generator.choice(spaces) for _ in range(300)) for _ in range(20)]
    texts += ["word " * 300, "x\n" * 300, "short", ""]
    loaded = load_tokenizer(folder)
    whole = [ids.tolist() for ids in loaded.encode_documents(texts)]
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 40)
    assert max(len(text) for text in texts) > 10 * 40
    assert [ids.tolist() for ids in loaded.encode_documents(texts)] == whole


@pytest.mark.parametrize("text", ["x" * 500, " " * 500, "\n" * 500, "雨" * 500, "\n " * 250])
def test_long_text_without_a_place_to_cut_is_still_lossless(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 40)
    loaded = load_tokenizer(folder)
    (ids,) = loaded.encode_documents([text])
    assert (loaded.tokenizer.decode(ids[:-1].tolist()), ids[-1]) == (text, loaded.eos_id)


def with_begin_of_text(folder: Path, copy: Path, *, template: bool, config: dict[str, object]) -> Path:
    """Copy a tokenizer, give it `<s>`, in its post-processor with `template`, and more fields in its config."""
    copy_tokenizer(folder, copy)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    if template:
        special = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    tokenizer.save(str(copy / "tokenizer.json"))
    settings = json.loads((copy / "tokenizer_config.json").read_text()) | {"bos_token": "<s>"} | config
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return copy


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
def test_documents_and_prompts_begin_as_stock_transformers_begins_them(
    folder: Path, tmp_path: Path, template: bool, config: dict[str, object]
) -> None:
    copy = with_begin_of_text(folder, tmp_path, template=template, config=config)
    stock, loaded = AutoTokenizer.from_pretrained(copy), load_tokenizer(copy)
    for text in CORPUS[:3]:
        expected = stock(text)["input_ids"]
        assert loaded.encode_prompt(text) == expected
        assert loaded.encode_documents([text])[0].tolist() == [*expected, loaded.eos_id]


def test_begin_of_text_can_be_asked_for_and_left_out(folder: Path, tmp_path: Path) -> None:
    copy = with_begin_of_text(folder, tmp_path, template=True, config={})
    begin = Tokenizer.from_file(str(copy / "tokenizer.json")).token_to_id("<s>")
    assert [load_tokenizer(copy, add_bos=add).bos_ids for add in ("auto", True, False)] == [(begin,), (begin,), ()]
    with pytest.raises(DataError, match=r"add_bos = true, but its bos_token = None .* set add_bos=false"):
        load_tokenizer(folder, add_bos=True)
    parsed = load_tokenizer(copy, parse_special_tokens=True)
    assert parsed.encode_prompt("<s>once") == parsed.encode_prompt("once")  # a template that spells it itself


def test_long_document_begins_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tokenizer(with_begin_of_text(folder, tmp_path, template=True, config={}))
    whole = loaded.encode_documents(["word " * 300])[0].tolist()
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 40)
    assert loaded.encode_documents(["word " * 300])[0].tolist() == whole
    assert whole.count(loaded.bos_ids[0]) == 1
