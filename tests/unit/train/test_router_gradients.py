"""What reaches the router is the gradient of a mean over the tokens that count, not over all that were read."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from elastic.space.axes import Axis
from elastic.train.trainer import Trainer
from elastic.world.groups import Layout, world


@pytest.mark.parametrize(("is_masked", "counted", "divisor"), [(False, 5, 12), (True, 5, 5), (True, 0, 1)])
def test_gate_gradients_are_divided_by_the_tokens_that_count(is_masked: bool, counted: int, divisor: int) -> None:
    pushed: list[Tensor] = []
    draw = SimpleNamespace(
        flat_gradients=lambda: torch.tensor([30.0, 60.0]),
        entries=lambda: [(Axis.FFN, 2)],
        push=lambda flat, router_loss_scale: pushed.append(flat),
    )
    phase = SimpleNamespace(tokens_per_step=12)
    moment = SimpleNamespace(elastic=SimpleNamespace(router_frozen=False), phase=phase)
    batches = [
        SimpleNamespace(num_counted=lambda: counted - counted // 2),
        SimpleNamespace(num_counted=lambda: counted // 2),
    ]
    router = nn.Linear(1, 1)
    for parameter in router.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with world(Layout()) as here:
        trainer = SimpleNamespace(
            data=SimpleNamespace(is_masked=is_masked),
            chooser=SimpleNamespace(router=router),
            router_optimizer=SimpleNamespace(zero_grad=lambda set_to_none: None),
            world=here,
        )
        Trainer._router_gradients(cast(Any, trainer), cast(Any, moment), cast(Any, draw), cast(Any, batches))
    assert pushed[0].tolist() == [30.0 / divisor, 60.0 / divisor]
