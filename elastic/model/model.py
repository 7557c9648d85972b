"""The elastic model: embedding, elastic stack, head. Shapes: S sequence, B batch, D hidden, V vocab, d kept width."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from elastic.model.backends import Kernels
from elastic.model.cache import CallMemory, ModelCache
from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.documents import Documents
from elastic.model.initialize import initialize_parameters
from elastic.model.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from elastic.model.observe import Observer
from elastic.model.sharding import pipeline_pattern
from elastic.model.specs import elastic_stack_spec
from elastic.space.gates import Gates
from elastic.space.shape import ModelShape
from elastic.space.space import Space
from elastic.world.groups import Layout


class ElasticModel(HybridModel):
    """HybridModel whose layers obey Gates; parameter names are Megatron-Core's own."""

    def forward(
        self,
        tokens: Tensor | None,
        gates: Gates | None = None,
        observer: Observer | None = None,
        cache: ModelCache | None = None,
        positions: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Map tokens [B, S] to final hidden states [S(/tp), B, d] on the last stage, to the stream before it.

        `gates` None runs the whole parent. `positions`, int32 on the CPU, is each token's place in its own document, of
        the whole sequences on every context-parallel rank: documents do not see each other (None: a sequence is one).
        `observer` sees what the layers compute. With a `cache` the tokens are the next ones of its sequences, which are
        one document each (without gradients, on one pipeline stage): of row b the first `counts[b]` (None: all), and
        what the others give is nothing.
        """
        assert positions is None or cache is None, "a decoded sequence is one document"
        assert counts is None or cache is not None, "rows of whole sequences are equally long"
        embedded = self.embedding(input_ids=tokens, position_ids=None) if self.pre_process else None
        cp, device = self.pg_collection.cp, next(self.parameters()).device
        documents = Documents.of(positions, device, cp.rank(), cp.size())
        if cache is None:
            return self.decoder(embedded, gates, observer, None, documents)
        assert tokens is not None, "a cache wants the tokens, on the one stage there is"
        memory = CallMemory(cache.layers, cache.next_tokens(tokens, counts))
        hidden = self.decoder(embedded, gates, observer, memory)
        cache.lengths = memory.tokens.ends
        return hidden

    def head_weight(self, gates: Gates | None = None) -> Tensor:
        """Return this rank's rows of the head, cut to the stream's width: [v, d]; uncut, the parameter."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        width = weight.shape[1] if gates is None or gates.subnet is None else gates.subnet.hidden
        return weight if width == weight.shape[1] else weight[:, :width]

    def quantise(self, scales: Mapping[str, Tensor] | None = None) -> None:
        """Put FP8 codes in the place of this frozen model's projections: of every layer, in and out.

        `scales` are those of their rows, by parameter, where they are not taken here; one rank only. Embedding, head,
        convolution and norms stay. From then on it runs whole, and has no checkpoint. Raises QuantisationError where
        its GPU has no products for them.
        """
        for name, module in self.named_modules():
            if isinstance(module, ElasticColumnParallelLinear | ElasticRowParallelLinear):
                module.quantise(name, None if scales is None else scales[f"{name}.weight"])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Shard like HybridModel, parameters only.

        Megatron-Core's linears add `_extra_state` objects for FP8 scales, which do not exist here; stored, they
        would be pickles in every checkpoint.
        """
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: entry for name, entry in sharded.items() if not name.endswith("_extra_state")}


def transformer_config(shape: ModelShape, layout: Layout) -> TransformerConfig:
    """Translate sizes and layout to Megatron-Core's configuration; per-layer widths are set by the stack."""
    return TransformerConfig(
        num_layers=len(shape.pattern),
        hidden_size=shape.hidden,
        ffn_hidden_size=max(shape.ffn, default=shape.hidden),
        num_attention_heads=max(shape.attention_heads, default=shape.kv_heads),
        num_query_groups=shape.kv_heads,
        kv_channels=shape.attention_channels,
        mamba_num_heads=max(shape.mamba_heads, default=shape.mamba_groups),
        mamba_head_dim=shape.head_channels,
        mamba_num_groups=shape.mamba_groups,
        mamba_state_dim=shape.mamba_state,
        activation_func=squared_relu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        is_hybrid_model=True,
        # Parameters are filled by `initialize_parameters`, alike in every layout.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=layout.dtype,
        pipeline_dtype=layout.dtype,
        bf16=layout.dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
        recompute_granularity=None if layout.recompute == "none" else layout.recompute,
        recompute_modules=[],  # elastic/model/recompute.py says what `selective` is
        recompute_method="uniform" if layout.recompute == "full" else None,
        recompute_num_layers=1 if layout.recompute == "full" else None,
        calculate_per_token_loss=True,
        # Megatron-Core's own needs apex and whole weights; elastic/model/linear.py accumulates the same way without.
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
        batch_p2p_sync=False,  # else the host waits for the device after every exchange between stages
    )


def build_model(
    space: Space, layout: Layout, *, seed: int | None = 0, init_std: float = 0.02, kernels: Kernels | None = None
) -> ElasticModel:
    """Build this rank's part of the parent and initialise it from `seed`; process groups must exist.

    None leaves in the parameters whatever their memory held, for a caller that fills all of them.
    """
    use_cpu_backend()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Dropout is 0, so nothing random happens in a forward pass: Megatron-Core's tensor-parallel random states, which
    # its embedding asks for under sequence parallelism, are told to stay out of the way.
    initialize_rng_tracker(inference_rng_tracker=True)
    shape = space.parent
    model = ElasticModel(
        transformer_config(shape, layout),
        elastic_stack_spec(space, kernels or Kernels.choose()),
        vocab_size=shape.vocab,
        max_sequence_length=1,  # no position embedding: nothing is sized by it
        hybrid_layer_pattern=pipeline_pattern(shape, layout.pipeline),
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="none",
        pg_collection=groups,
    )
    if seed is not None:
        initialize_parameters(model, shape, seed, init_std, groups.tp.rank(), groups.tp.size())
    return model
