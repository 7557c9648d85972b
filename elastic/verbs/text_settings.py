"""Where a checkpoint's tokenizer and special tokens come from."""

from pathlib import Path

from elastic.checkpoint.record import Record
from elastic.data.manifest import read_manifest
from elastic.hf.carried import read_carried
from elastic.hf.config import HfSettings


def text_settings(checkpoint: Path, record: Record, data: str | None = None) -> tuple[HfSettings, Path | None]:
    """Return the settings of a checkpoint's exports and the folder of its tokenizer (None: it has none).

    An imported parent's settings stay what they were. The tokenizer is that of prepared data which the user names,
    else the one an imported parent brought along, else that of the data the model was trained on. Raises DataError or
    CarriedError for files that are missing or damaged.
    """
    carried = read_carried(checkpoint)
    if carried is not None and data is None and carried.tokenizer_folder is not None:
        return carried.settings, carried.tokenizer_folder
    data = data or record.data
    if data is None:
        return (HfSettings() if carried is None else carried.settings), None
    end_of_text = read_manifest(Path(data)).tokenizer.eos_id
    made_here = HfSettings(bos_token_id=None, eos_token_id=end_of_text, pad_token_id=end_of_text)
    return (made_here if carried is None else carried.settings), Path(data)
