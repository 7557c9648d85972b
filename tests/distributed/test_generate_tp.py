"""Text does not depend on tensor parallelism: every rank of two writes what one process writes."""

from dataclasses import asdict
from typing import Any

import torch
from megatron.core import parallel_state

from elastic.generate.batch import Decoder
from elastic.generate.sampling import Sampling
from elastic.generate.text import Marker, ThinkPlan, generate, generate_batch
from elastic.model.cpu_backend import use_cpu_backend
from elastic.space.shape import Subnet
from elastic.world.groups import Layout
from tests.distributed.harness import run_distributed
from tests.distributed.test_same_heads_any_tp import CHOICES, SPACE
from tests.parity.model_factory import build_lively, relative_error

PROMPT = [5, 60, 33, 2, 2, 41]
UNEVEN = ([7], PROMPT, [11, 3, 58, 20, 9, 9, 9, 14, 0, 27])
NEW_TOKENS = 12
SUBNETS = [Subnet.full(SPACE.parent), *(SPACE.subnet(choice) for choice in CHOICES[:2])]


def _texts(size: int) -> dict[str, Any]:
    """On one rank: greedy and drawn text of each subnet, a phase switch, logits after a split prompt, cache bytes."""
    use_cpu_backend()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    model = build_lively(SPACE, Layout(tensor=size)).eval()
    drawn = Sampling(temperature=1.3, top_k=30, top_p=0.95, seed=4)
    plan = ThinkPlan(SUBNETS[1], SUBNETS[0], Marker("never", (40, 41), lambda tokens: ""), max_think_tokens=4)
    decoder = Decoder(model, SUBNETS[1], 16)
    decoder.feed([PROMPT[:2]])
    phases = generate(model, plan, PROMPT, Sampling(), NEW_TOKENS)
    return {
        "greedy": [generate(model, subnet, PROMPT, Sampling(), NEW_TOKENS).tokens for subnet in SUBNETS],
        "drawn": [generate(model, subnet, PROMPT, drawn, NEW_TOKENS).tokens for subnet in SUBNETS],
        "batch": [
            text.tokens
            for subnet in SUBNETS
            for text in generate_batch(model, subnet, UNEVEN, [drawn, Sampling(), Sampling()], NEW_TOKENS)
        ],
        "phases": (phases.tokens, phases.switch, asdict(phases.parts[1].subnet)),
        "logits": decoder.feed([PROMPT[2:]])[0],
        "cache": sum(
            t.nbytes for of in decoder.cache.layers.values() for t in vars(of).values() if isinstance(t, torch.Tensor)
        ),
    }


def test_two_ranks_write_what_one_process_writes() -> None:
    (alone,), both = run_distributed(_texts, 1, 1), run_distributed(_texts, 2, 2)
    for rank in both:
        for name in ("greedy", "drawn", "batch", "phases"):
            assert rank[name] == alone[name], name
        assert rank["logits"].shape == alone["logits"].shape == (SPACE.parent.vocab,)
        assert relative_error(rank["logits"], alone["logits"]) <= 1e-5
        assert 2 * rank["cache"] == alone["cache"], "each rank remembers its own heads"
    assert torch.equal(both[0]["logits"], both[1]["logits"]), "the same bits, so that the ranks cannot disagree"
    assert alone["batch"][1::3] == alone["greedy"], "whoever else is in the batch"
    assert len(set(alone["greedy"])) > 1 and alone["drawn"] != alone["greedy"]
