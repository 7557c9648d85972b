"""A slow hybrid model in plain PyTorch, written from docs/design.md and docs/method.md alone: judge of the masks.

Shares no code with the elastic modules: masks are built element by element, the state-space recurrence runs token by
token, attention is a softmax over an explicit causal matrix. Tensors are [B, S, ...], weights come in fp64.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from elastic.space.axes import Axis
from elastic.space.space import Space

Weights = Mapping[Axis, Tensor]
Keeps = Callable[[int, int], bool]


def mixed_mask(space: Space, weights: Weights, axis: Axis, slot: int, length: int, keeps: Keeps) -> Tensor:
    """Return sum_k w_k I_k [length] (eq. 51), where `keeps(n, choice)` says whether choice keeps element n."""
    if axis not in weights:
        return torch.ones(length, dtype=torch.float64)
    choices = space.axes[axis].choices
    rows = [[float(keeps(n, choice)) for n in range(length)] for choice in choices]
    return sum(w * torch.tensor(row, dtype=torch.float64) for w, row in zip(weights[axis][slot], rows, strict=True))


def state_space_recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Run S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t one token at a time.

    x [B,L,H,P], dt [B,L,H], a [H], b and c [B,L,G,N], d [H]; head h reads group h // (H / G).
    """
    batch, length, heads, channels = x.shape
    groups, state = b.shape[2:]
    outputs = []
    s = torch.zeros(batch, heads, channels, state, dtype=x.dtype)
    group_of = torch.tensor([h // (heads // groups) for h in range(heads)])
    for t in range(length):
        b_t, c_t = b[:, t][:, group_of], c[:, t][:, group_of]  # [B, H, N]
        decay = torch.exp(dt[:, t] * a)[:, :, None, None]
        s = decay * s + (dt[:, t, :, None] * x[:, t])[..., None] * b_t[:, :, None, :]
        outputs.append((s * c_t[:, :, None, :]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(outputs, dim=1)


def depthwise_causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve x [B, L, I] with weight [I, k] so that tap k - 1 sees the current token; no activation."""
    taps = weight.shape[1]
    rows = []
    for t in range(x.shape[1]):
        seen = [weight[:, taps - 1 - back] * x[:, t - back] for back in range(min(taps, t + 1))]
        rows.append(bias + sum(seen))
    return torch.stack(rows, dim=1)


def rms(x: Tensor, count: Tensor | float, epsilon: float) -> Tensor:
    """Divide by the root of sum(x^2) / count + epsilon."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / count + epsilon)


def _mamba(p: Mapping[str, Tensor], u: Tensor, space: Space, head_mask: Tensor, channel_mask: Tensor) -> Tensor:
    shape, heads = space.parent, len(head_mask)
    groups, state, channels = shape.mamba_groups, shape.mamba_state, shape.head_channels
    inner, gn = heads * channels, groups * state
    z, x, b, c, dt = (u @ p["mixer.in_proj.weight"].T).split([inner, inner, gn, gn, heads], dim=-1)
    conv = depthwise_causal_conv(torch.cat([x, b, c], dim=-1), p["mixer.conv1d_weight"][:, 0], p["mixer.conv1d_bias"])
    x, b, c = (conv * torch.sigmoid(conv)).split([inner, gn, gn], dim=-1)
    dt = torch.log1p(torch.exp(dt + p["mixer.dt_bias"]))
    y = state_space_recurrence(
        x.unflatten(-1, (heads, channels)),
        dt,
        -torch.exp(p["mixer.A_log"]),
        b.unflatten(-1, (groups, state)),
        c.unflatten(-1, (groups, state)),
        p["mixer.D"],
    )
    y = y * (z * torch.sigmoid(z)).unflatten(-1, (heads, channels))
    mask = head_mask[:, None] * channel_mask[None, :]  # [H, P]
    gated = (y * mask).unflatten(2, (groups, heads // groups)).flatten(3)  # [B, S, G, H/G * P]
    active = mask.view(groups, -1).sum(-1, keepdim=True)  # over the active heads and channels of each group
    return (rms(gated, active, shape.norm_epsilon).flatten(2) * p["mixer.norm.weight"]) @ p["mixer.out_proj.weight"].T


def _attention(p: Mapping[str, Tensor], u: Tensor, space: Space, head_mask: Tensor) -> Tensor:
    shape, heads = space.parent, len(head_mask)
    kv, a, length = shape.kv_heads, shape.attention_channels, u.shape[1]
    per_group = heads // kv
    rows = (u @ p["self_attention.linear_qkv.weight"].T).unflatten(-1, (kv, per_group + 2, a))
    causal = torch.tensor([[0.0 if j <= i else float("-inf") for j in range(length)] for i in range(length)])
    contexts = []
    for head in range(heads):
        group, place = divmod(head, per_group)
        q, k, v = rows[:, :, group, place], rows[:, :, group, per_group], rows[:, :, group, per_group + 1]
        probabilities = torch.softmax(q @ k.transpose(1, 2) / a**0.5 + causal, dim=-1)
        contexts.append(head_mask[head] * (probabilities @ v))
    return torch.cat(contexts, dim=-1) @ p["self_attention.linear_proj.weight"].T


def _mlp(p: Mapping[str, Tensor], u: Tensor, neuron_mask: Tensor) -> Tensor:
    h = u @ p["mlp.linear_fc1.weight"].T
    return (neuron_mask * torch.where(h > 0, h, 0.0) ** 2) @ p["mlp.linear_fc2.weight"].T


def _layer(
    p: Mapping[str, Tensor], kind: str, u: Tensor, space: Space, weights: Weights, ordinal: int, width: int
) -> Tensor:
    """Run one layer on its normalised input; inner prefixes are per lane, per SSM group, per KV group."""
    shape = space.parent

    def slot(axis: Axis) -> int:
        return ordinal if space.axes[axis].per_layer else 0

    def within(repeats: int) -> Keeps:  # element n of `width` sits at place n % (width / repeats) of its repeat
        return lambda n, choice: n % (width // repeats) < choice // repeats

    if kind == "M":
        heads = mixed_mask(space, weights, Axis.MAMBA_HEAD, slot(Axis.MAMBA_HEAD), width, within(shape.mamba_groups))
        channels = mixed_mask(space, weights, Axis.MAMBA_CHANNEL, 0, shape.head_channels, lambda n, choice: n < choice)
        return _mamba(p, u, space, heads, channels)
    if kind == "*":
        heads = mixed_mask(
            space, weights, Axis.ATTENTION_HEAD, slot(Axis.ATTENTION_HEAD), width, within(shape.kv_heads)
        )
        return _attention(p, u, space, heads)
    return _mlp(p, u, mixed_mask(space, weights, Axis.FFN, slot(Axis.FFN), width, within(space.lanes)))


_NORM = {"M": "norm.weight", "*": "input_layernorm.weight", "-": "pre_mlp_layernorm.weight"}


def reference_logits(tensors: Mapping[str, Tensor], space: Space, weights: Weights, tokens: Tensor) -> Tensor:
    """Return logits [B, S, V] of the parent under soft or one-hot gate weights."""
    shape = space.parent
    hidden = mixed_mask(space, weights, Axis.HIDDEN, 0, shape.hidden, lambda n, choice: n < choice)
    ranking = list(space.depth_ranking)
    depth = mixed_mask(space, weights, Axis.DEPTH, 0, len(ranking), lambda layer, choice: layer in ranking[:choice])
    x = tensors["embedding.word_embeddings.weight"][tokens] * hidden
    seen = {"M": 0, "*": 0, "-": 0}
    widths = {"M": shape.mamba_heads, "*": shape.attention_heads, "-": shape.ffn}
    for index, kind in enumerate(str(shape.pattern)):
        prefix = f"decoder.layers.{index}."
        p = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        u = rms(x, hidden.sum(), shape.norm_epsilon) * p[_NORM[kind]]
        x = x + depth[index] * hidden * _layer(p, kind, u, space, weights, seen[kind], widths[kind][seen[kind]])
        seen[kind] += 1
    head = tensors["embedding.word_embeddings.weight" if shape.tied_embeddings else "output_layer.weight"]
    return (rms(x, hidden.sum(), shape.norm_epsilon) * tensors["decoder.final_norm.weight"]) @ head.T
