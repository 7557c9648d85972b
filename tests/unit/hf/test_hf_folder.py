"""A sound stock folder opens with everything that it says: sizes, number formats, tokenizer, settings, links."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic.hf.config import hf_config
from elastic.hf.export_settings import (
    SETTINGS_FILE,
    DtypeRule,
    ExportSettingsError,
    HfSettings,
    HfSettingsError,
    read_export_settings,
    write_export_settings,
)
from elastic.hf.folder import HfFolder, HfFolderError, open_hf_folder
from elastic.hf.names import hf_sizes
from elastic.hf.tensor_files import plan_shards, planned
from elastic.hf.tensor_index import INDEX_FILE, scan_tensors
from elastic.world.files import DiskSpaceError, check_free_space
from tests.shapes import NANO_12B
from tests.unit.hf.hf_folders import (
    GENERATION,
    PUBLISHED,
    SHAPE,
    SHARD,
    change_config,
    change_index,
    change_tensors,
    good_folder,
    load,
    put,
    truncate,
    write,
)


def num_bytes(opened: HfFolder) -> int:
    return sum(tensor.num_bytes for tensor in scan_tensors(opened.path).tensors.values())


def test_a_sound_folder_says_everything(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")
    opened = open_hf_folder(folder)
    assert (opened.shape, opened.exports.settings.generation, opened.warnings) == (SHAPE, GENERATION, ())
    assert [path.name for path in opened.exports.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]
    assert opened.tensors.keys() == hf_sizes(SHAPE).keys()
    for path in folder.glob("*.safetensors"):
        for name, tensor in load(path):
            assert torch.equal(opened.tensors[name], tensor) and opened.exports.dtypes.of(name) == tensor.dtype
    index = json.loads((folder / INDEX_FILE).read_text())
    assert num_bytes(opened) == index["metadata"]["total_size"] > 0


def test_the_published_12b_opens_without_a_look_at_its_25_gigabytes(tmp_path: Path) -> None:
    """Shards of the real sizes, headers at their beginning and holes behind them."""
    plan = {name: planned(size, torch.bfloat16) for name, size in hf_sizes(NANO_12B).items()}
    weight_map = {}
    for number, shard in enumerate(plan_shards(plan, 5_000_000_000)):
        path, begin = tmp_path / f"{number}.safetensors", 0
        header: dict[str, Any] = {}
        for name, tensor in shard.items():
            offsets = [begin, begin + tensor.nbytes]
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
            begin, weight_map[name] = offsets[1], path.name
        text = json.dumps(header).encode()
        put(path, struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + begin)
    write(tmp_path / INDEX_FILE, {"weight_map": weight_map})
    write(tmp_path / "config.json", hf_config(NANO_12B, HfSettings(), torch.bfloat16) | PUBLISHED)
    opened = open_hf_folder(tmp_path)
    assert (opened.shape, num_bytes(opened)) == (NANO_12B, 2 * 12_310_001_152)
    assert len(set(weight_map.values())) > 4


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")
    change_config(use_bias=True)(folder)
    change_index(lambda index: index["weight_map"].update(evil="../evil.safetensors"))(folder)
    (folder / SHARD).unlink()
    truncate(SHARD.replace("2", "1", 1), -1)(folder)
    write(folder / "tokenizer.json", {"added_tokens": [{"id": "x"}]})
    with pytest.raises(HfFolderError) as caught:
        open_hf_folder(folder)
    for part in ("use_bias", "../evil", "00002-of-00003.safetensors is missing", "is truncated", "not a tokenizer's"):
        assert any(part in problem for problem in caught.value.problems)
    assert len(caught.value.problems) == 5


def test_a_published_config_opens_and_its_code_stays_where_it_is(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model", **PUBLISHED)
    assert "Infinity" in (folder / "config.json").read_text()
    for name in ("modeling_nemotron_h.py", "configuration_nemotron_h.py", "tokenization.py"):
        (folder / name).write_text("raise SystemExit('run')")
    write(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}})
    opened = open_hf_folder(folder)
    assert opened.shape == SHAPE
    assert opened.exports.settings.carried == {"time_step_rank": 256, "use_mamba_kernels": True}
    warnings = " ".join(opened.warnings)
    for part in ("auto_map is ignored", "code is never run or copied: configuration_nemotron_h.py", "time_step_min"):
        assert part in warnings
    carried = write_export_settings(opened.exports, tmp_path / "checkpoint")
    assert sorted(path.name for path in carried.iterdir()) == [SETTINGS_FILE, "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((carried / "tokenizer_config.json").read_text()) == {}


def test_links_as_in_the_hub_cache_work(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    opened = open_hf_folder(snapshot)
    assert opened.warnings == ()
    assert all(torch.isfinite(tensor).all() for tensor in opened.tensors.values())
    copied = write_export_settings(opened.exports, tmp_path / "checkpoint")
    assert not any(path.is_symlink() for path in copied.iterdir())


def test_a_link_to_a_file_of_another_place_is_told(tmp_path: Path) -> None:
    """A folder that came in an archive could name any file of this machine as its template."""
    folder = good_folder(tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    (folder / "chat_template.jinja").symlink_to("../secret")
    (folder / "merges.txt").symlink_to("tokenizer.json")
    (warning,) = open_hf_folder(folder).warnings
    assert "links to files outside the folder: chat_template.jinja; what" in warning


def test_what_can_be_ignored_is_only_warned_of(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model", torch_dtype="float32", my_key=1)
    change_index(lambda index: index["metadata"].update(total_size=1))(folder)
    put(folder / "consolidated.safetensors", b"")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    warnings = " ".join(open_hf_folder(folder).warnings)
    for part in (
        "total_size = 1, the shards hold",
        "not read, because no index names it: consolidated.safetensors",
        "torch_dtype = float32, but the tensors are bfloat16",
        "no tokenizer files",
        "not kept: my_key",
    ):
        assert part in warnings


def test_names_of_a_loaded_model_are_accepted(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("backbone.", "model.")] = tensors.pop(name)

    change_tensors(rename)(folder)
    assert open_hf_folder(folder).tensors["backbone.norm_f.weight"].shape == (8,)


RULES = {
    "all bf16": DtypeRule(torch.bfloat16),
    "all fp32": DtypeRule(torch.float32),
    "as trained": DtypeRule.trained(torch.bfloat16),
    "all vectors of a Mamba layer": DtypeRule(
        torch.bfloat16,
        dict.fromkeys(("mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.norm.weight", "norm.weight"), torch.float32),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_number_format_of_every_tensor_is_kept(name: str, tmp_path: Path) -> None:
    opened = open_hf_folder(good_folder(tmp_path / "model", RULES[name]))
    assert opened.exports.dtypes == RULES[name]
    assert DtypeRule.from_json(json.loads(json.dumps(opened.exports.dtypes.to_json()))) == RULES[name]
    assert all(opened.tensors[name].dtype == opened.exports.dtypes.of(name) for name in opened.tensors)


def test_other_number_formats_have_no_rule() -> None:
    with pytest.raises(HfSettingsError, match=r"torch\.float16 is not supported; use float32 or bfloat16"):
        DtypeRule.trained(torch.float16)
    for broken in ({}, {"main": "float16", "exceptions": {}}, {"main": "float32", "exceptions": []}):
        with pytest.raises(HfSettingsError):
            DtypeRule.from_json(broken)


def test_what_an_interrupted_write_left_is_not_carried(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_export_settings(open_hf_folder(folder).exports, tmp_path / "checkpoint")
    (folder / "chat_template.jinja").unlink()
    write_export_settings(open_hf_folder(folder).exports, tmp_path / "checkpoint")
    carried = read_export_settings(tmp_path / "checkpoint")
    assert carried is not None and "chat_template.jinja" not in {path.name for path in carried.tokenizer_files}


@pytest.mark.parametrize(
    ("eos", "generation", "ends"),
    [
        (12, {"eos_token_id": [2, 11, 12]}, {2, 11, 12}),
        (12, {"eos_token_id": 11}, {11}),
        ((3, 4), {"eos_token_id": None}, {3, 4}),
        (12, {}, {12}),
        (12, None, {12}),
        (None, None, set()),
    ],
)
def test_a_text_ends_where_the_generation_config_says(eos: Any, generation: Any, ends: set[int]) -> None:
    """Stock `generate` reads it first, and a published folder may list more ends there than in config.json."""
    assert HfSettings(eos_token_id=eos, generation=generation).end_tokens() == ends


def test_what_is_carried_comes_back(tmp_path: Path) -> None:
    opened = open_hf_folder(good_folder(tmp_path / "model", max_position_embeddings=99, **PUBLISHED))
    write_export_settings(opened.exports, tmp_path / "parent")
    parent = read_export_settings(tmp_path / "parent")
    assert parent is not None and (parent.settings, parent.dtypes) == (opened.exports.settings, opened.exports.dtypes)
    write_export_settings(parent, tmp_path / "permuted")  # from one checkpoint to the next
    carried = read_export_settings(tmp_path / "permuted")
    assert carried is not None and carried.settings == opened.exports.settings
    assert carried.tokenizer_folder == tmp_path / "permuted" / "hugging_face"
    for path in opened.exports.tokenizer_files:
        assert (carried.tokenizer_folder / path.name).read_bytes() == path.read_bytes()
    assert read_export_settings(tmp_path) is None
    (carried.tokenizer_folder / "tokenizer.json").unlink()
    with pytest.raises(ExportSettingsError, match=r"missing or left over: tokenizer\.json"):
        read_export_settings(tmp_path / "permuted")
    (carried.tokenizer_folder / SETTINGS_FILE).write_text('{"version": 2}')
    with pytest.raises(ExportSettingsError, match="is of version 2, this release reads 1"):
        read_export_settings(tmp_path / "permuted")
    (carried.tokenizer_folder / SETTINGS_FILE).unlink()
    with pytest.raises(ExportSettingsError, match=r"settings\.json is missing"):
        read_export_settings(tmp_path / "permuted")


def test_space_is_asked_for_where_it_will_be_needed(tmp_path: Path) -> None:
    target = tmp_path / "not" / "there" / "yet"
    check_free_space(target, 1, "a test")
    with pytest.raises(DiskSpaceError, match=r"not enough disk for a test in .*1,000,000,000\.00 GB needed, .*GB free"):
        check_free_space(target, 10**18, "a test")
    assert not (tmp_path / "not").exists()
