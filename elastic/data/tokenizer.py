"""Train, load and copy byte-level BPE tokenizers as folders that stock transformers opens."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from elastic.data.manifest import DataError
from elastic.world.files import sha256_of

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # every byte and the end-of-text token
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
AddBos = Literal["auto", True, False]
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (TOKENIZER_JSON, TOKENIZER_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE)
LONGEST_RUN = 256
PIECE_CHARACTERS = 1 << 20  # the library takes about 200 bytes of memory for each one it encodes at a time
_LONG_RUN = re.compile(rf"(\S{{{LONGEST_RUN}}})\S+|(\s{{{LONGEST_RUN}}})\s+")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with its end-of-text token; `vocab_size` is the largest id + 1.

    `bos_ids` stand in front of every document and every prompt.
    """

    tokenizer: Tokenizer
    eos_token: str
    eos_id: int
    vocab_size: int
    bos_ids: tuple[int, ...]

    def encode_prompt(self, text: str) -> list[int]:
        """Encode the beginning of a document, as stock transformers would."""
        return self._begun(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _begun(self, ids: list[int]) -> list[int]:
        """Put the begin-of-text ids in front, once: a text whose special tokens are parsed may spell them itself."""
        begun = ids[: len(self.bos_ids)] == list(self.bos_ids)
        return ids if begun else [*self.bos_ids, *ids]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts on all cores; returns one array of int32 ids per text: bos_ids, the text's, end of text.

        A text beyond PIECE_CHARACTERS is encoded piece by piece, cut at line ends, so that its size costs no memory.
        Byte-level BPE gives the same ids either way; another tokenizer may give other tokens right at a cut.
        """
        short = [text for text in texts if len(text) <= PIECE_CHARACTERS]
        encoded = iter(self.tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [
            np.array([*self._begun(next(encoded).ids), self.eos_id], dtype=np.int32)
            if len(text) <= PIECE_CHARACTERS
            else self._encode_in_pieces(text)
            for text in texts
        ]

    def _encode_in_pieces(self, text: str) -> np.ndarray:
        pieces: list[np.ndarray] = []
        for piece in cut_pieces(text):
            ids = self.tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids
            pieces.append(np.array(ids if pieces else self._begun(ids), dtype=np.int32))
        return np.concatenate([*pieces, np.array([self.eos_id], dtype=np.int32)])


def cut_pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _cut(text, start, start + PIECE_CHARACTERS)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int, end: int) -> int:
    """Return where to cut text[start:end], a point where every usual pre-tokenizer cuts too if there is one.

    That is after a line end with no white space behind it, else before a single space, else at `end`.
    """
    for separator, offset in (("\n", 1), (" ", 0)):
        cut = text.rfind(separator, start + 1, end)
        while cut != -1:
            alone = offset or not text[cut - 1].isspace()
            if alone and not text[cut + 1].isspace():
                return cut + offset
            cut = text.rfind(separator, start + 1, cut)
    return end


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE of at most `vocab_size` tokens on `texts` and write it into `folder`.

    Id 0 is `<|endoftext|>`, which serves as end of document and as padding. The result is the same, byte for byte,
    whenever the texts and the library are. A small corpus may give fewer tokens than asked for.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(f"vocab_size = {vocab_size}: must be at least {SMALLEST_VOCAB}; nearest legal {SMALLEST_VOCAB}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Runs without (or of) white space are cut to 256 characters: training is quadratic in the length of a word.
    tokenizer.train_from_iterator((_LONG_RUN.sub(r"\1\2", text) for text in texts), trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Not `tokenizer.save`, whose error on a full disk is no OSError.
    (folder / TOKENIZER_JSON).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path, *, parse_special_tokens: bool = False, add_bos: AddBos = "auto") -> LoadedTokenizer:
    """Load the tokenizer of `folder`; raises DataError when it has none or names no end-of-text token.

    `add_bos`: put its begin-of-text token in front of texts; `auto` does what stock transformers does with the folder.

    Without `parse_special_tokens` a document that contains the letters of a special token is encoded as those
    letters, so no text can forge the end of a document; with it, chat templates and the like become their ids.
    """
    try:
        tokenizer = Tokenizer.from_buffer((folder / TOKENIZER_JSON).read_bytes())
    except OSError as error:
        raise DataError(f"tokenizer {folder}: {TOKENIZER_JSON} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"tokenizer {folder}: {TOKENIZER_JSON} is not a tokenizer ({error})") from error
    # A tokenizer.json may carry the truncation and padding of whoever saved it; both would corrupt documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse_special_tokens
    eos_token = _special_token(folder, "eos_token")
    if eos_token is None:
        raise DataError(
            f"tokenizer {folder}: no eos_token in {TOKENIZER_CONFIG}; name the token that ends a document there"
        )
    eos_id = tokenizer.token_to_id(eos_token)
    if eos_id is None:
        raise DataError(f"tokenizer {folder}: its end-of-text token {eos_token!r} is not in the vocabulary")
    # Ids may have holes, so the number of tokens is not the number of rows an embedding needs.
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return LoadedTokenizer(tokenizer, eos_token, eos_id, vocab_size, _bos_ids(tokenizer, folder, add_bos))


def _bos_ids(tokenizer: Tokenizer, folder: Path, add_bos: AddBos) -> tuple[int, ...]:
    if add_bos == "auto":  # stock transformers ignores the config's add_bos_token beside a tokenizer.json, as here
        plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
        return tuple(whole[: starts[0]]) if starts else ()
    if not add_bos:
        return ()
    token = _special_token(folder, "bos_token")
    bos_id = None if token is None else tokenizer.token_to_id(token)
    if bos_id is None:
        raise DataError(
            f"tokenizer {folder}: add_bos = true, but its bos_token = {token!r} is not in the vocabulary; "
            f"name it in {TOKENIZER_CONFIG} or set add_bos=false"
        )
    return (bos_id,)


def _special_token(folder: Path, role: str) -> str | None:
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        token = _read_json(folder / name).get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return content


def tokenizer_files(folder: Path) -> dict[str, str]:
    """Return the names of the tokenizer files that are in `folder`, and the sha256 of each."""
    return {name: sha256_of(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}


def same_tokenizer(one: Path, other: Path) -> bool:
    """Tell whether two folders hold the same tokens under the same ids; of a folder without a tokenizer, no."""
    files = one / TOKENIZER_JSON, other / TOKENIZER_JSON
    if all(path.is_file() for path in files) and sha256_of(files[0]) == sha256_of(files[1]):
        return True
    try:
        first, second = (Tokenizer.from_buffer(path.read_bytes()) for path in files)
    except (OSError, ValueError):  # absent or damaged: that is reported where it is opened
        return False
    return bool(first.get_vocab(with_added_tokens=True) == second.get_vocab(with_added_tokens=True))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of `source` into `folder`, never code and no pointer to code (`auto_map`)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in tokenizer_files(source):
        content = (source / name).read_bytes()
        if name == TOKENIZER_CONFIG:
            config = {key: value for key, value in _read_json(source / name).items() if key != "auto_map"}
            content = json.dumps(config, indent=2).encode() + b"\n"
        (folder / name).write_bytes(content)


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the sha256 over the names and contents of all tokenizer files of `folder`."""
    parts = [name.encode() + b"\0" + bytes.fromhex(sha256) for name, sha256 in tokenizer_files(folder).items()]
    return hashlib.sha256(b"".join(parts)).hexdigest()
