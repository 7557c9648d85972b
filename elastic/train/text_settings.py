"""Where a checkpoint's tokenizer and special tokens come from."""

from pathlib import Path

from elastic.compress.hf_carried import read_carried
from elastic.compress.hf_config import HfSettings
from elastic.train.manifest import read_manifest
from elastic.train.record import Record


def text_settings(checkpoint: Path, record: Record, data: str | None = None) -> tuple[HfSettings, Path | None]:
    """Return the settings of a checkpoint's exports and the folder of its tokenizer (None: it has none).

    Prepared data that the user names comes first, then what an imported parent brought along, then the data the model
    was trained on. Raises DataError or CarriedError for files that are missing or damaged.
    """
    carried = read_carried(checkpoint)
    if carried is not None and data is None:
        return carried.settings, carried.tokenizer_folder
    data = data or record.data
    if data is None:
        return HfSettings(), None
    end_of_text = read_manifest(Path(data)).tokenizer.eos_id
    return HfSettings(bos_token_id=None, eos_token_id=end_of_text, pad_token_id=end_of_text), Path(data)
