"""What travels with the weights from a source's folder through checkpoints to the exports: settings and tokenizer.

A subfolder of a checkpoint holds it: `settings.json` and the tokenizer files, nothing that runs.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from elastic.hf.config import HfConfigError, HfSettings
from elastic.hf.dtypes import DtypeError, DtypeRule
from elastic.hf.folder import HfFolder
from elastic.hf.safe_files import UnsafeFileError, listed, read_json
from elastic.hf.tokenizer_files import copy_tokenizer_files, find_tokenizer
from elastic.world.files import written_aside

EXPORT_SETTINGS_FOLDER = "hugging_face"
SETTINGS_FILE = "settings.json"
_VERSION = 1
_MAX_BYTES = 4_000_000


class ExportSettingsError(ValueError):
    """A folder of carried files that is damaged, incomplete, or of another version."""


@dataclass(frozen=True)
class ExportSettings:
    """Settings for the exported config, the source's number formats, and the tokenizer files where they lie now."""

    settings: HfSettings
    dtypes: DtypeRule
    tokenizer_files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, source: HfFolder) -> "ExportSettings":
        """Return what an opened source gives to its exports."""
        return cls(source.settings, source.dtype_rule, source.tokenizer_files)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Return the folder to copy the tokenizer from, None without one."""
        return self.tokenizer_files[0].parent if self.tokenizer_files else None


def write_export_settings(carried: ExportSettings, checkpoint: Path) -> Path:
    """Write into a subfolder of `checkpoint` and return it; settings last, so that they mean whole.

    Raises UnsafeFileError if a tokenizer file has gone since it was checked.
    """
    folder = checkpoint / EXPORT_SETTINGS_FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted write left may be of files that have gone since
    folder.mkdir(parents=True)
    copy_tokenizer_files(carried.tokenizer_files, folder)
    content = {
        "version": _VERSION,
        "settings": carried.settings.to_json(),
        "dtypes": carried.dtypes.to_json(),
        "tokenizer_files": [path.name for path in carried.tokenizer_files],
    }
    with written_aside(folder / SETTINGS_FILE) as aside:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return folder


def read_export_settings(checkpoint: Path) -> ExportSettings | None:
    """Read back what was written; None if the checkpoint carries nothing (its weights were made here).

    Raises ExportSettingsError if it is damaged or a tokenizer file is missing.
    """
    folder = checkpoint / EXPORT_SETTINGS_FOLDER
    if not folder.exists():
        return None
    try:
        content = read_json(folder / SETTINGS_FILE, _MAX_BYTES)
        if content["version"] != _VERSION:
            raise ExportSettingsError(f"{folder} is of version {content['version']}, this release reads {_VERSION}")
        carried = ExportSettings(
            HfSettings.from_json(content["settings"]), DtypeRule.from_json(content["dtypes"]), find_tokenizer(folder)
        )
        named = set(content["tokenizer_files"])
    except (UnsafeFileError, HfConfigError, DtypeError) as error:
        raise ExportSettingsError(f"{folder}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportSettingsError(f"{folder / SETTINGS_FILE} is damaged: {error!r}") from error
    if odd := named ^ {path.name for path in carried.tokenizer_files}:
        raise ExportSettingsError(f"{folder}: tokenizer files missing or left over: {listed(odd)}")
    return carried
