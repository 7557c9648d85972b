"""Say a tokenizer in a GGUF file: tokens, merges, special tokens, and the name llama.cpp knows its pre-tokenizer by."""

from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from elastic.hf.config import ExportError
from elastic.hf.export_settings import ExportSettings
from elastic.hf.safe_files import read_json, shown
from elastic.hf.tokenizer_files import MAX_BYTES, TOKENIZER_JSON

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEGIN, _END = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
# How a text is split before it is merged, and llama.cpp's name of it. Tokenizers trained here split as GPT-2 does.
GPT2_SPLIT = "gpt-2"
_SPLITS = {
    rf"{_CONTRACTIONS}|{_BEGIN}|\p{{N}}{{1,3}}{_END}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_BEGIN}|\p{{N}}{_END}": "qwen2",
    rf"{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
_REMEDY = "set export.format=hf, or convert the Hugging Face folder with llama.cpp's own script"


def add_tokenizer(writer: GGUFWriter, exports: ExportSettings, vocab: int) -> None:
    """Add the tokenizer of `exports` for a model of `vocab` rows; without one the file takes token numbers alone.

    Raises ExportError for a tokenizer that is no byte-level BPE, or whose splitting of texts llama.cpp has no name for:
    it would read texts otherwise than the model was trained to.
    """
    folder = exports.tokenizer_folder
    if folder is None:
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = read_json(folder / TOKENIZER_JSON, MAX_BYTES)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(tokenizer))
    tokens = {number: (text, TokenType.NORMAL) for text, number in tokenizer["model"]["vocab"].items()}
    for token in tokenizer.get("added_tokens") or []:
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        tokens[token["id"]] = (token["content"], kind)
    # Rows that only fill the vocabulary up.
    listed = [tokens.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(vocab)]
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([int(kind) for _, kind in listed])
    special = SpecialVocab(folder, load_merges=True, n_vocab=vocab)
    special.special_token_ids |= _special_ids(exports)
    special.add_special_token = {"bos": False, "eos": False, **special.add_special_token}
    special.add_to_gguf(writer, quiet=True)


def check_tokenizer(exports: ExportSettings) -> None:
    """Raise ExportError for a tokenizer whose way to split texts `add_tokenizer` would refuse."""
    if exports.tokenizer_folder is not None:
        split_name(read_json(exports.tokenizer_folder / TOKENIZER_JSON, MAX_BYTES))


def split_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level BPE's way to split texts; raises ExportError where it has none."""
    kind, before = (tokenizer.get("model") or {}).get("type"), tokenizer.get("pre_tokenizer") or {}
    if kind != "BPE" or (tokenizer.get("normalizer") or {}).get("type") not in (None, "NFC"):
        raise ExportError(f"the tokenizer is no byte-level BPE ({shown(kind)}), which GGUF is written for; {_REMEDY}")
    steps = before.get("pretokenizers", [before])
    match steps:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return GPT2_SPLIT
        case [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "use_regex": False}]:
            if pattern in _SPLITS:
                return _SPLITS[pattern]
    raise ExportError(f"llama.cpp has no name for how the tokenizer splits texts ({shown(before)}); {_REMEDY}")


def _special_ids(exports: ExportSettings) -> dict[str, int]:
    """Return the special tokens that the exports name; the second of several that end a text ends a turn."""
    given = exports.settings.token_ids()
    ends = given["eos_token_id"]
    several = {"eos": ends[0], "eot": ends[1]} if isinstance(ends, list) and len(ends) > 1 else {}
    single = {name: given[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    single |= {"eos": ends[0]} if isinstance(ends, list) else {}
    return {name: value for name, value in {**single, **several}.items() if isinstance(value, int)}
