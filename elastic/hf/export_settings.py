"""What travels with the weights from a source's folder through checkpoints to the exports: settings and tokenizer.

A subfolder of a checkpoint holds it: `settings.json` and the tokenizer files, nothing that runs.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from elastic.hf.safe_files import UnsafeFileError, listed, read_json, shown
from elastic.hf.tokenizer_files import copy_tokenizer_files, find_tokenizer
from elastic.space.layers import FP32_PARAMETERS
from elastic.world.files import written_aside

EXPORT_SETTINGS_FOLDER = "hugging_face"
SETTINGS_FILE = "settings.json"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_VERSION = 1
_MAX_BYTES = 4_000_000


class HfSettingsError(ValueError):
    """Settings or number formats that this project does not read or write."""


class ExportSettingsError(ValueError):
    """A folder of carried files that is damaged, incomplete, or of another version."""


@dataclass(frozen=True)
class HfSettings:
    """What a folder says beside the sizes.

    `carried` holds what a source's config says of the keys of CARRIED, CARRIED_IF_GIVEN and of widths no layer has,
    where that is not the default. Other keys are not kept: nobody can tell whether they stay true of a submodel.
    `generation` is the source's generation_config.json as it is; None: written from the special tokens. `license` holds
    the license fields of the source's card. `num_tokens` is the vocabulary before an import filled it up (None: it did
    not); an export leaves the rows behind it out again.
    """

    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    max_position_embeddings: int = 4096
    chunk_size: int = 128
    carried: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    num_tokens: int | None = None

    def token_ids(self) -> dict[str, int | list[int] | None]:
        """Return the special tokens in JSON form. None is said, for stock code has other defaults than none."""
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        return {"bos_token_id": self.bos_token_id, "eos_token_id": eos, "pad_token_id": self.pad_token_id}

    def end_tokens(self) -> frozenset[int]:
        """Return the tokens that end a text: the generation config's, as in stock `generate`, else the config's."""
        stated = None if self.generation is None else self.generation.get("eos_token_id")
        ends = self.eos_token_id if stated is None else stated
        return frozenset(() if ends is None else (ends,) if isinstance(ends, int) else ends)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "HfSettings":
        """Undo `asdict` and JSON; raises HfSettingsError for another set of keys. Older files lack the last two."""
        known = {known.name for known in fields(cls)}
        if content.keys() - known or known - content.keys() - {"license", "num_tokens"}:
            raise HfSettingsError(f"Hugging Face settings have other keys than expected: {shown(sorted(content))}")
        eos = content["eos_token_id"]
        return cls(**{**content, "eos_token_id": tuple(eos) if isinstance(eos, list) else eos})


@dataclass(frozen=True)
class DtypeRule:
    """The format of every tensor of a folder: `main`, except for vectors named by what follows `layers.i.`.

    Only fp32 and bf16 are known, the formats of this project's checkpoints. Raises HfSettingsError for others.
    """

    main: torch.dtype
    exceptions: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for dtype in (self.main, *self.exceptions.values()):
            if dtype not in DTYPE_NAMES:
                raise HfSettingsError(f"number format {dtype} is not supported; use float32 or bfloat16")

    @classmethod
    def trained(cls, main: torch.dtype) -> "DtypeRule":
        """Return the rule of exports without a source: A_log and D in fp32.

        Training holds them in fp32 and inference engines compute with fp32; rounding them would only lose accuracy.
        """
        return cls(main, {} if main == torch.float32 else dict.fromkeys(FP32_PARAMETERS, torch.float32))

    def of(self, name: str) -> torch.dtype:
        """Return the format of a tensor given by its name in the file."""
        return self.exceptions.get(kind_of_tensor(name), self.main)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which `from_json` makes an equal value."""
        exceptions = {kind: DTYPE_NAMES[dtype] for kind, dtype in self.exceptions.items()}
        return {"main": DTYPE_NAMES[self.main], "exceptions": exceptions}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "DtypeRule":
        """Undo `to_json`; raises HfSettingsError for another form or format."""
        try:
            exceptions = {str(kind): _BY_NAME[name] for kind, name in content["exceptions"].items()}
            return cls(_BY_NAME[content["main"]], exceptions)
        except (KeyError, TypeError, AttributeError) as error:
            raise HfSettingsError(f"number formats cannot be read: {shown(content)}") from error


def kind_of_tensor(name: str) -> str:
    """Return what a tensor is in its layer, `mixer.A_log` for `backbone.layers.3.mixer.A_log`."""
    return re.sub(r"^backbone\.layers\.\d+\.", "", name)


@dataclass(frozen=True)
class ExportSettings:
    """The number format of each tensor, settings for the config, and the tokenizer files where they lie now."""

    dtypes: DtypeRule
    settings: HfSettings = field(default_factory=HfSettings)
    tokenizer_files: tuple[Path, ...] = ()

    @property
    def tokenizer_folder(self) -> Path | None:
        """Return the folder of the tokenizer, None without one."""
        return self.tokenizer_files[0].parent if self.tokenizer_files else None


def write_export_settings(exports: ExportSettings, checkpoint: Path) -> Path:
    """Write into a subfolder of `checkpoint` and return it; settings last, so that they mean whole.

    Raises UnsafeFileError if a tokenizer file has gone since it was checked.
    """
    folder = checkpoint / EXPORT_SETTINGS_FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted write left may be of files that have gone since
    folder.mkdir(parents=True)
    copy_tokenizer_files(exports.tokenizer_files, folder)
    content = {
        "version": _VERSION,
        "settings": asdict(exports.settings),
        "dtypes": exports.dtypes.to_json(),
        "tokenizer_files": [path.name for path in exports.tokenizer_files],
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
        rule, settings = DtypeRule.from_json(content["dtypes"]), HfSettings.from_json(content["settings"])
        exports, named = ExportSettings(rule, settings, find_tokenizer(folder)), set(content["tokenizer_files"])
    except (UnsafeFileError, HfSettingsError) as error:
        raise ExportSettingsError(f"{folder}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportSettingsError(f"{folder / SETTINGS_FILE} is damaged: {error!r}") from error
    if odd := named ^ {path.name for path in exports.tokenizer_files}:
        raise ExportSettingsError(f"{folder}: tokenizer files missing or left over: {listed(odd)}")
    return exports
