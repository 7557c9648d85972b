"""Import NeMo's hydra_runner without the noise that its and Megatron-Core's imports make.

Every recipe imports this module first; nothing else does.
"""

import warnings

from elastic.world.agent import end_with_agent
from recipes._quiet import held_back_output

__all__ = ["hydra_runner"]


end_with_agent()  # the imports below take seconds, in which torchrun's agent may die

with held_back_output():
    from nemo.core.config import hydra_runner
    from nemo.utils import logging as nemo_logging

    import elastic.model.model  # noqa: F401 (brings in the rest of Megatron-Core, which warns of each absent package)

# Said in every process of every start, of things that are meant as they are; any other warning still shows.
for message in (
    "full scope is deprecated",  # Megatron-Core of its own default for CUDA graphs
    "MimoModelConfig is experimental",  # a model this project does not have
    "torch.distributed is disabled, unavailable or uninitialized",  # a checkpoint that one process reads, as intended
    "The argument order of load has been changed",  # torch of its own wrapper
):
    warnings.filterwarnings("ignore", message=message)

# NeMo's logger would reformat every Python warning and report it as its own.
nemo_logging.captureWarnings(False)
nemo_logging.setLevel(nemo_logging.ERROR)
