"""The verb import_hf: a stock nemotron_h folder becomes a Megatron-Core checkpoint of an (unordered) parent."""

from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from elastic.compress.export import load_hf_tensors
from elastic.compress.hf_names import from_hf
from elastic.modules.initialize import named_global_parameters
from elastic.modules.model import build_model
from elastic.modules.sharding import shard_tensor
from elastic.space.axes import Space
from elastic.train.checkpoint import Trainable, checkpoint_folder, save_checkpoint
from elastic.train.config import ImportConfig
from elastic.train.parallel import model_layout, world
from elastic.train.record import Record
from elastic.train.run_folder import open_run_folder


def run_import(config: ImportConfig, console: Console) -> Path:
    """Read the folder tensor by tensor into this rank's part of the model and save it; returns the run folder."""
    source = Path(config.source)
    shape, stored = load_hf_tensors(source)
    with world(model_layout(config.parallel, config.trainer)) as here:
        folder, _ = open_run_folder(config.exp_manager, asdict(config), here)
        model = build_model(Space(shape, {}, lanes=1), here.layout)
        parameters = dict(named_global_parameters(model))
        tp = here.groups.tp
        with torch.no_grad():
            for name, tensor in from_hf(stored, shape):
                if name in parameters:
                    parameters[name].copy_(shard_tensor(tensor, name, shape, tp.rank(), tp.size()))
        record = Record("parent", shape, provenance={"imported from": str(source)})
        save_checkpoint(checkpoint_folder(folder, 0), Trainable(model), record, None, here)
        if here.is_main:
            console.print(f"{source} -> {checkpoint_folder(folder, 0)}")
    return folder
