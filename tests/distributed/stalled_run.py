"""A tiny run whose rank 1 is killed or stopped inside its third step: `torchrun stalled_run.py VALUES.json SIGNAL`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from elastic.train.callbacks import NoCallback
from elastic.train.config import ElasticConfig
from elastic.train.config_load import load
from elastic.train.pipeline import PipelineRunner
from elastic.train.run_training import run_elastic


class RunnerThatEnds(PipelineRunner):
    """Sends its own process a signal in the middle of the third step's forward and backward."""

    def __init__(self, trainer, number):
        healthy = trainer.runner
        super().__init__(healthy.world, healthy.student, healthy.loss, healthy.teacher)
        self.trainer, self.number = trainer, number

    def forward_backward(self, micro_batches):
        if self.trainer.step == 2:
            super().forward_backward(micro_batches[:1])
            time.sleep(1.0)  # a few signs of life from where it ends
            os.kill(os.getpid(), self.number)
        return super().forward_backward(micro_batches)


class EndRankOne(NoCallback):
    """Gives rank 1 that runner."""

    def __init__(self, number):
        self.number = number

    def on_start(self, trainer):
        if torch.distributed.get_rank() == 1:
            trainer.runner = RunnerThatEnds(trainer, self.number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    values = json.loads(Path(sys.argv[1]).read_text())
    run_elastic(load(ElasticConfig, values), Console(quiet=True), [EndRankOne(signal.Signals[sys.argv[2]])])
