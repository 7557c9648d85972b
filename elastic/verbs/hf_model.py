"""Load a stock Hugging Face folder into an elastic model, so that the same code runs it."""

from pathlib import Path

import torch

from elastic.hf.folder import open_hf_folder
from elastic.hf.names import from_hf
from elastic.model.initialize import named_global_parameters
from elastic.model.model import ElasticModel, build_model
from elastic.model.sharding import shard_tensor
from elastic.space.space import Space
from elastic.world.groups import Layout


@torch.no_grad()
def load_hf_model(folder: Path, layout: Layout) -> ElasticModel:
    """Build a model of the folder's sizes, with nothing to choose, and read this rank's part tensor by tensor.

    Raises HfFolderError or HfTensorError; no code in the folder is run.
    """
    source = open_hf_folder(folder)
    shape = source.shape
    model = build_model(Space(shape, {}, lanes=1), layout)
    parameters = dict(named_global_parameters(model))
    tp = model.pg_collection.tp
    for name, tensor in from_hf(source.tensors, shape):
        if name in parameters:  # other pipeline stages hold the rest
            parameters[name].copy_(shard_tensor(tensor, name, shape, tp.rank(), tp.size()))
    return model
