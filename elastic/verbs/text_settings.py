"""Where a checkpoint's tokenizer and special tokens come from."""

from dataclasses import replace
from pathlib import Path

from elastic.checkpoint.record import Record
from elastic.data.manifest import read_manifest
from elastic.hf.config import HfSettings
from elastic.hf.export_settings import read_export_settings
from elastic.hf.tokenizer_files import special_tokens

LONGEST = "longest sequence trained, tokens"  # in the provenance of a record


def text_settings(checkpoint: Path, record: Record, data: str | None = None) -> tuple[HfSettings, Path | None]:
    """Return the settings of a checkpoint's exports and the folder of its tokenizer (None: it has none).

    An imported parent's settings stay what they were, but for a longer sequence if it was trained on one. The tokenizer
    is that of prepared data which the user names, else the one an imported parent brought along, else that of the data
    the model was trained on. Raises DataError, UnsafeFileError or ExportSettingsError for damage.
    """
    carried, trained = read_export_settings(checkpoint), int(record.provenance.get(LONGEST, 0))
    data = data or (record.data if carried is None or carried.tokenizer_folder is None else None)
    if carried is not None:
        longest = max(trained, carried.settings.max_position_embeddings)
        settings = replace(carried.settings, max_position_embeddings=longest)
        return settings, carried.tokenizer_folder if data is None else Path(data)
    if data is None:
        return HfSettings(), None
    tokenizer, named = read_manifest(Path(data)).tokenizer, special_tokens(Path(data))
    made_here = HfSettings(
        bos_token_id=next(iter(tokenizer.bos_ids), None) if named["bos"] is None else named["bos"],
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id if named["pad"] is None else named["pad"],
        max_position_embeddings=trained or HfSettings().max_position_embeddings,
        num_tokens=tokenizer.vocab_size,
    )
    return made_here, Path(data)
