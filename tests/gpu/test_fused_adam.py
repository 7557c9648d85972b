"""The fused Adam that a GPU trains with takes the steps of torch's AdamW."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.optim import AdamW

from elastic.config.sections import OptimConfig
from elastic.model.attention import SdpaCoreAttention
from elastic.model.backends import Kernels
from elastic.model.state_space import TorchStateSpace
from elastic.space.space import Space
from elastic.train.optimizer import build_optimizer, set_learning_rate, wrap_for_training
from elastic.world.groups import Layout, World
from tests.parity.model_factory import build_lively, one_process, relative_error, shape_of

pytestmark = pytest.mark.gpu

STEPS, LEARNING_RATE = 4, 1e-2


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    torch.cuda.set_device(0)
    with one_process("nccl"):
        yield


@pytest.mark.parametrize(
    ("dtype", "weight_decay", "tolerance"),
    [(torch.float32, 0.0, 1e-5), (torch.float32, 0.1, 1e-5), (torch.bfloat16, 0.0, 5e-3)],
)
def test_steps_equal_torch(dtype: torch.dtype, weight_decay: float, tolerance: float) -> None:
    """In bf16 the fp32 master weights take the step; what is compared is their bf16 copy in the model."""
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    if USING_PYTORCH_OPTIMIZER:
        pytest.skip("neither Transformer Engine nor apex is installed: training uses torch's AdamW itself")
    layout, optim = Layout(dtype=dtype), OptimConfig(clip_grad=0.0, weight_decay=weight_decay)
    here = World(layout, ProcessGroupCollection.use_mpu_process_groups(), torch.device("cuda", 0))
    model = build_lively(Space(shape_of("M-*"), {}), layout, Kernels(TorchStateSpace(), SdpaCoreAttention))
    wrapped = wrap_for_training(model, optim)
    optimizer = build_optimizer(wrapped, optim, here)
    set_learning_rate(optimizer, LEARNING_RATE)
    parameters = dict(model.named_parameters())
    clones = {name: p.detach().float().clone().requires_grad_() for name, p in parameters.items()}
    settings = dict(lr=LEARNING_RATE, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.eps)
    # In fp32 the optimizer holds the model's own parameters; each is decayed as its group says.
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    groups = [
        {"params": [clones[name]], "weight_decay": decay.get(id(parameter), 0.0)}
        for name, parameter in parameters.items()
    ]
    reference = AdamW(groups, **settings)  # type: ignore[arg-type]
    for _ in range(STEPS):
        for name, parameter in parameters.items():
            gradient = torch.randn_like(clones[name])
            parameter.main_grad.copy_(gradient)
            clones[name].grad = gradient
        assert optimizer.step()[0]
        reference.step()
    for name, clone in clones.items():
        assert relative_error(parameters[name].detach().float(), clone.detach()) <= tolerance, name
