"""Exports do what any stock folder does with nothing but default arguments: load, build, run, learn, generate, pad."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from elastic.hf.config import ExportError
from elastic.hf.export import ExportReport, export_folder
from elastic.hf.export_settings import DtypeRule, ExportSettings
from elastic.hf.names import from_hf
from elastic.hf.reload import logit_check, stock_logits
from elastic.space.shape import ModelShape, Subnet
from tests.nested import submodel_tensors
from tests.parity.hf_models import card_of, logits, stock_model, stock_model_of, tiny

LANES, FP32 = 2, ExportSettings(DtypeRule(torch.float32))
# Without special tokens, and beyond two of the scan's chunks of 128: there transformers 5.6 to 5.13 go wrong.
TOKENS = torch.randint(3, 40, (2, 260), generator=torch.Generator().manual_seed(0))


def random_family(seed: int) -> tuple[ModelShape, list[Subnet]]:
    """Draw a parent with three members: itself, one narrower on every axis, and one without its attention layers."""
    draw = random.Random(seed)
    pattern = "".join(draw.choices("M-*", (4, 3, 2), k=draw.randint(3, 8))) + draw.choice(("M", "M-", "-M*"))
    groups, kv_heads = draw.choice((1, 2, 4)), draw.choice((1, 2))
    parent = tiny(
        "".join(pattern),
        hidden=draw.choice((16, 32, 40)),
        ffn=draw.choice((16, 48)),
        mamba_groups=groups,
        mamba_heads=groups * draw.randint(2, 3),
        head_channels=draw.randint(3, 8),
        mamba_state=draw.choice((4, 8, 16)),
        conv_kernel=draw.choice((2, 3, 4)),
        kv_heads=kv_heads,
        attention_heads=kv_heads * draw.randint(2, 3),
        tied_embeddings=draw.random() < 0.3,
    )
    full = Subnet.full(parent)
    narrow = Subnet(
        hidden=parent.hidden * 3 // 4,
        ffn=tuple(draw.choice((width, width // 2)) for width in parent.ffn),
        mamba_heads=tuple(width - groups for width in parent.mamba_heads),
        head_channels=parent.head_channels - 1,
        attention_heads=tuple(width - draw.choice((0, kv_heads)) for width in parent.attention_heads),
        kept_layers=tuple(layer for layer in full.kept_layers if layer != 1),
    )
    without = tuple(layer for layer in full.kept_layers if parent.pattern.kinds[layer] != "*")
    return parent, [full, narrow, Subnet(**(vars(narrow) | {"kept_layers": without}))]


def exported(parent: ModelShape, subnet: Subnet, folder: Path) -> ExportReport:
    """Export one member of a random parent, checked by the logits of a stock model made without a folder."""
    tensors = dict(from_hf(stock_model(parent).state_dict(), parent))
    cut, shape = submodel_tensors(tensors, parent, subnet, LANES), subnet.shape(parent)
    reference = stock_model_of(cut, shape)
    check = logit_check(lambda tokens: logits(reference, tokens), tolerance=1e-5)
    return export_folder(cut, shape, folder, card_of(shape), FP32, check)


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# Between them 1, 2 and 4 groups, 2 to 4 taps, all sizes of the state, a tied head, no MLP, and Mamba layers alone.
@pytest.mark.parametrize("seed", [2, 3, 5, 6, 8])
def test_every_member_of_a_random_family_does_what_a_stock_folder_does(seed: int, tmp_path: Path) -> None:
    parent, members = random_family(seed)
    for number, subnet in enumerate(members):
        folder = exported(parent, subnet, tmp_path / str(number)).folder
        model = loaded(folder)
        from_config = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        assert {key: value.shape for key, value in from_config.state_dict().items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }
        assert all(parameter.isfinite().all() for parameter in from_config.parameters())
        answer = model(TOKENS, labels=TOKENS)
        answer.loss.backward()
        expected = torch.nn.functional.cross_entropy(answer.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        assert torch.allclose(answer.loss, expected, atol=1e-5)
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert_generates_greedily(model)
        assert_padding_changes_nothing(model)
        is_said = "keeps no attention layer" in (folder / "README.md").read_text()
        assert is_said == ("*" not in str(subnet.shape(parent).pattern))


def assert_generates_greedily(model: PreTrainedModel) -> None:
    """Compare cached steps, where the folder has a cache, with whole passes: the score of each chosen token."""
    answer = model.generate(
        TOKENS[:, :140], max_new_tokens=4, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        whole = model(answer.sequences).logits[:, 139:-1]
    assert torch.allclose(torch.stack(answer.logits, dim=1), whole, atol=1e-4)


def assert_padding_changes_nothing(model: PreTrainedModel) -> None:
    """Left-padded beside a longer text, a text has the logits it has alone."""
    short, long = TOKENS[:1, :150], TOKENS[1:, :170]
    padding = torch.zeros(1, 20, dtype=torch.int64)
    tokens = torch.cat([torch.cat([padding, short], dim=1), long])
    mask = torch.cat([torch.cat([padding, torch.ones_like(short)], dim=1), torch.ones_like(long)])
    with torch.no_grad():
        together = model(tokens, attention_mask=mask).logits
        assert torch.allclose(together[:1, 20:], model(short).logits, atol=1e-4)
        assert torch.allclose(together[1:], model(long).logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_smallest_time_step_clamps_nothing_and_has_a_logarithm(dtype: torch.dtype, tmp_path: Path) -> None:
    shape = tiny("MM*-")
    parent = stock_model(shape)
    with torch.no_grad():
        parent.model.layers[0].mixer.dt_bias.fill_(-40.0)  # steps of some 1e-18
    tensors = dict(from_hf(parent.state_dict(), shape))
    check = logit_check(lambda tokens: logits(parent, tokens), tolerance=1e-5)
    folder = export_folder(tensors, shape, tmp_path / "model", card_of(shape), FP32, check).folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    clamped = logits(model, TOKENS)
    for layer in model.model.layers[:2]:
        assert layer.mixer.time_step_limit == (1e-20, float("inf"))
        layer.mixer.time_step_limit = (0.0, float("inf"))
    assert torch.equal(clamped, logits(model, TOKENS))
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize(
    ("file", "wrong", "message"),
    [
        ("config.json", {"use_cache": True}, "get_seq_length"),
        ("generation_config.json", {"use_cache": True}, "get_seq_length"),
    ],
)
def test_a_folder_that_does_not_run_by_default_is_not_called_checked(
    file: str, wrong: dict, message: str, tmp_path: Path
) -> None:
    """What exports said before: the check that passed use_cache=False saw nothing of it."""
    folder = exported(tiny("MM"), Subnet.full(tiny("MM")), tmp_path / "model").folder
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | wrong))
    with pytest.raises(ExportError, match=f"does not run it by default: .*{message}"):
        stock_logits(folder, TOKENS)
