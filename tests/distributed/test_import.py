"""The verb import_hf against stock folders: the logits of stock transformers, at TP 1 and 2."""

from pathlib import Path

import torch

from elastic.checkpoint.find import resolve_checkpoint
from elastic.space.shape import ModelShape
from tests.distributed.harness import run_distributed
from tests.parity.hf_models import SHAPES, logits, relative_error
from tests.parity.import_extract import SPLITTABLE, TOKENS, imported, stock_folder
from tests.parity.model_factory import loaded_logits


def test_the_imported_parents_answer_like_stock_transformers(tmp_path: Path) -> None:
    parents: list[tuple[Path, ModelShape]] = []
    expected = []
    for number, name in enumerate(SPLITTABLE):
        folder = tmp_path / str(number)
        expected.append(logits(stock_folder(folder / "stock", SHAPES[name], "fp32"), TOKENS))
        parents.append((resolve_checkpoint(imported(folder, folder / "stock")), SHAPES[name]))
    for tensor_parallel in (1, 2):
        ranks = run_distributed(loaded_logits, tensor_parallel, parents, TOKENS, tensor_parallel)
        for name, right, *rows in zip(SPLITTABLE, expected, *ranks, strict=True):
            assert relative_error(torch.cat(rows, dim=-1), right) < 1e-5, (name, tensor_parallel)
