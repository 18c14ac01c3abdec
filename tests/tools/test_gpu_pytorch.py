"""PyTorch as tools/gpu_pytorch.py runs it computes the reference model."""

import pytest
import torch
from gpu_pytorch import StaticStep, compiled, make_model, plans

pytestmark = pytest.mark.slow  # tracing takes seconds

SHAPES = {
    "multi-head": {"code_kind": "affine"},
    "grouped, swiglu, rmsnorm, part of a head rotated": {
        "num_key_value_heads": 1,
        "activation": "swiglu",
        "norm_type": "rmsnorm",
        "rope_dim": 8,
        "rope_style": "interleaved",
    },
}


def fields(**more):
    return {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **more}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_static_step_is_the_model(shape):
    torch.manual_seed(2)
    model = make_model(fields(**SHAPES[shape]), torch.float32, "cpu")
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3)
    step = compiled(StaticStep(model, 3, 20), "cpu")  # fails where it is not one graph
    ids = torch.randint(60, (3, 1))
    text = ids
    for position in range(12):
        ids = step(ids, torch.tensor([position]))
        text = torch.cat((text, ids), dim=1)
    expected = model(text[:, :-1]).logits.argmax(-1)
    assert text[:, 1:].tolist() == expected.tolist()
    assert len({tuple(row) for row in text[:, 1:].tolist()}) == 3  # not the same token for all


@torch.no_grad()
def test_everything_planned_runs():
    sizes = {"model": fields(), "depth": 8, "new": 4, "prefill": [8, 16], "sequences": 2, "context": 16, "repeat": 1}
    names = set()
    for variant, what, n_tokens, make in plans(sizes, "cpu"):
        run = make()
        run()
        run()  # a cache that grew in the first run would be too long now
        names.add((variant, what))
        assert n_tokens > 0
    assert len(names) == 2 * 2 * (1 + 1 + 2)
