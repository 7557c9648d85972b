"""Next-token logits of one sequence under one subnet. Shapes: B batch (one), d kept width, V vocab, v this rank's.

The weights stay where they are: a decoder holds caches only, so decoders of several budgets share one model. A layer
that is cut along its rows copies what it keeps for the length of its own call, one layer at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic.model.cache import empty_cache
from elastic.model.forward import gathered_logits
from elastic.model.model import ElasticModel
from elastic.space.gates import Gates
from elastic.space.shape import Subnet


class Decoder:
    """Reads one sequence piece by piece in slice execution and remembers it in caches.

    The model may be split over tensor-parallel ranks, all of which feed the same tokens and get the same logits;
    pipeline stages, context and sequence parallelism have no place here.
    """

    def __init__(self, model: ElasticModel, subnet: Subnet, capacity_tokens: int) -> None:
        groups, config = model.pg_collection, model.config
        assert groups.pp.size() == groups.cp.size() == 1 and not config.sequence_parallel
        self.subnet = subnet
        self._model, self._gates = model, Gates.slice(subnet)
        self._device = next(model.parameters()).device
        self.cache = empty_cache(
            model.decoder.masks.space.parent,
            subnet,
            capacity_tokens,
            tensor_parallel=groups.tp.size(),
            dtype=config.params_dtype,
            device=self._device,
        )

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append `tokens` to the sequence; returns the logits of the token after them, fp32 [V].

        Any number of tokens may come at any time: a prompt, one token, or what another subnet wrote meanwhile.
        """
        ids = torch.tensor([list(tokens)], device=self._device)
        last = self._model(ids, self._gates, cache=self.cache)[-1]  # [B, d]
        head = self._model.head_weight(self._gates)  # [v, d]
        return gathered_logits(last, head, self._model.pg_collection.tp)[0].float()
