"""Where a router begins: for each budget at the even cut, one width for all layers of an axis, that loses least (ours).

A router that begins with every choice about as likely is moved by the budgets first, along all axes at once, and has
decided before the distillation loss can tell it which axis bears most (docs/results.md, the router's question).
"""

import math
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

import torch
from rich.console import Console

from elastic.data.held_out import HeldOut
from elastic.router.decide import RouterError
from elastic.router.start import start_at
from elastic.space.gates import Gates
from elastic.space.reach import even_cuts
from elastic.train.evaluation import evaluate_subnets
from elastic.train.trainer import Callback, Trainer

MOST_CUTS, MOST_SEQUENCES = 32, 32  # of a budget, and held out for each cut; ours


@dataclass
class StartAtEvenCuts(Callback):
    """Before the first step, tries even cuts of every budget but `begun`, and moves the router to the best.

    A budget that no even cut meets, or none that the router can hold, begins as it would without. Costs at most
    MOST_CUTS forward passes over MOST_SEQUENCES held-out sequences for each budget, in slice execution.
    """

    held_out: HeldOut
    num_sequences: int
    begun: Collection[str]
    console: Console

    def on_start(self, trainer: Trainer) -> None:
        """Try the cuts and start the router; a run that has trained goes on with its router as it is."""
        chooser = trainer.chooser
        if chooser is None or trainer.step:
            return
        count, size = min(self.num_sequences, MOST_SEQUENCES), trainer.data.micro_batch_size
        for index, budget in enumerate(chooser.budgets):
            cuts = even_cuts(chooser.space, budget, chooser.deployment, MOST_CUTS)
            if budget.name in self.begun or not cuts:
                continue
            subnets, losses = [chooser.space.subnet(cut) for cut in cuts], list[float]()
            for number, subnet in enumerate(subnets, start=1):
                trainer.progress.enter(trainer.step, f"even cut {number} of {len(cuts)} for {budget.name}")
                gates = {budget.name: Gates.slice(subnet)}
                found = evaluate_subnets(trainer.runner, gates, self.held_out, count, size)  # the same on every rank
                losses.append(found[budget.name].mean.cross_entropy or math.inf)
            said = (
                f"begins evenly: hidden_width = {chooser.router.hidden_width} holds none of its {len(cuts)} even cuts"
            )
            for place, best in enumerate(sorted(range(len(cuts)), key=losses.__getitem__), start=1):
                with suppress(RouterError):  # where the router is too narrow for a cut, the next best
                    start_at(chooser.router, index, cuts[best])
                    which = f"{'the best' if place == 1 else f'number {place}'} of {len(cuts)} even cuts"
                    said = f"starts at {which}, held-out {losses[best]:.4f}: {subnets[best]}"
                    break
            if trainer.world.is_main:
                self.console.print(f"router: {budget.name} {said}", markup=False, highlight=False)
        for parameter in chooser.router.parameters():
            torch.distributed.broadcast(parameter.data, src=0)
