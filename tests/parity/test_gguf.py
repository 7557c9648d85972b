"""GGUF files: what extract writes for llama.cpp is the subnet's, unpadded, and what it cannot say is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.read import StoredTensors
from elastic.hf.config import ExportError
from elastic.hf.gguf import gguf_bytes, gguf_check, gguf_plan
from elastic.hf.gguf_tokenizer import split_name
from elastic.space.shape import Subnet
from elastic.verbs.extract import EXTRACTION_FILE
from tests.parity.hf_models import SHAPES
from tests.parity.import_extract import extracted, imported, stock_folder

KINDS = ["f32", "f16", "bf16", "q8_0"]


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def test_a_subnet_leaves_as_gguf_without_padding(tmp_path: Path) -> None:
    shape = SHAPES["groups 8, twelve layers"]
    model = stock_folder(tmp_path / "stock", shape, "fp32")
    with torch.no_grad():  # rows down to where f16 has no step for Q8_0's blocks; these have 32 columns, once cut
        for weight in (value for name, value in model.named_parameters() if name.endswith("out_proj.weight")):
            weight.mul_(10.0 ** -(torch.arange(len(weight)).unsqueeze(1) % 9))
    model.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    without_tokenizer(tmp_path / "stock")
    run = imported(tmp_path, tmp_path / "stock")
    widths = [shape.ffn[0] // 2, *[shape.ffn[0]] * (len(shape.ffn) - 1)]
    by_hand = {"name": "small", "hidden": 24, "ffn": widths, "mamba_heads": [8]}
    export = {"hugging_face": False, "format": "gguf", "gguf_types": KINDS}
    folder = extracted(tmp_path, run, "cut", subnets=[by_hand], budget_names=[], export=export)
    row = json.loads((folder / EXTRACTION_FILE).read_text())["members"][0]
    files = {kind: Path(row["gguf"]) / f"small-{kind.upper()}.gguf" for kind in KINDS}
    assert sorted(path.name for path in Path(row["gguf"]).iterdir()) == sorted(
        ["README.md", *(path.name for path in files.values())]
    )
    assert any(tensor.tensor_type.name == "Q8_0" for tensor in GGUFReader(files["q8_0"]).tensors)
    read = GGUFReader(files["f32"])
    assert sum(tensor.n_elements for tensor in read.tensors) == row["params"]
    said = read.fields["nemotron_h.feed_forward_length"].contents()
    assert [width for width in said if width] == widths  # and llama.cpp takes them layer by layer
    sizes = [path.stat().st_size for path in files.values()]
    assert sizes[0] > sizes[1] == sizes[2] >= sizes[3]
    card = (Path(row["gguf"]) / "README.md").read_text()
    assert "all " in card and "stored_params" not in card
    for kind, path in files.items():
        taken = sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors) / 2**20
        assert f"| weights as stored ({kind}, {path.name}) | {taken:.2f} MiB |" in card

    # A value of another place, and a tensor too many, do not pass the check that ended the export.
    kept = row["subnet"]
    subnet = Subnet(**{key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()})
    stored = StoredTensors(resolve_checkpoint(run), shape)
    for kind, path in files.items():
        assert gguf_check(path, stored, shape, subnet, 1, subnet.shape(shape)).num_values == row["params"], kind
    tensor = next(tensor for tensor in read.tensors if tensor.name == "blk.0.attn_norm.weight")
    content = bytearray(files["f32"].read_bytes())
    content[tensor.data_offset : tensor.data_offset + 4] = np.float32(7.5).tobytes()
    files["f32"].write_bytes(content)
    with pytest.raises(ExportError, match=r"blk\.0\.attn_norm\.weight is not decoder\.layers\.0"):
        gguf_check(files["f32"], stored, shape, subnet, 1, subnet.shape(shape))


def test_a_tied_head_is_stored_once_and_rows_without_blocks_stay_f16() -> None:
    shape = SHAPES["groups 2, tied head"]
    assert "lm_head.weight" not in gguf_plan(shape, "q8_0")
    forms = {name: tensor.form.name for name, tensor in gguf_plan(shape, "q8_0").items()}
    assert forms["backbone.norm_f.weight"] == "F32"
    assert {forms[name] for name in forms if name.endswith("_proj.weight")} <= {"Q8_0", "F16"}
    assert gguf_bytes(shape, ["f16", "f32"]) < 2 * gguf_bytes(shape, ["f32"])


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused() -> None:
    byte_level = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
    assert split_name({"model": {"type": "BPE"}, "pre_tokenizer": byte_level}) == "gpt-2"
    llama = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    steps = [{"type": "Split", "pattern": {"Regex": llama}}, {"type": "ByteLevel", "use_regex": False}]
    sequence = {"type": "Sequence", "pretokenizers": steps}
    assert split_name({"model": {"type": "BPE"}, "pre_tokenizer": sequence}) == "llama-bpe"
    for wrong, message in (
        ({"model": {"type": "Unigram"}}, "no byte-level BPE"),
        ({"model": {"type": "BPE"}, "pre_tokenizer": byte_level | {"add_prefix_space": True}}, "has no name for"),
    ):
        with pytest.raises(ExportError, match=message):
            split_name(wrong)


def test_values_that_f16_cannot_hold_are_refused(tmp_path: Path) -> None:
    shape = SHAPES["groups 2, tied head"]
    model = stock_folder(tmp_path / "stock", shape, "fp32")
    without_tokenizer(tmp_path / "stock")
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = 1e6
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    run = imported(tmp_path, tmp_path / "stock")
    with pytest.raises(ExportError, match=r"token_embd\.weight has values beyond f16's largest, 65504"):
        extracted(tmp_path, run, export={"hugging_face": False, "format": "gguf"})
