"""Small reference models whose weights are large enough that every convention shows in the logits."""

from collections.abc import Callable, Iterator

import pytest
import torch

from fixmin_cpp.reference.configuration_fixmin import FixMinConfig
from fixmin_cpp.reference.modeling_fixmin import FixMinForCausalLM


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(seed: int = 0, **options) -> FixMinForCausalLM:
    """A two-layer model with random weights everywhere, biases and norms included; `options` are FixMinConfig's."""
    shape = {
        "vocab_size": 300,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(seed)
    model = FixMinForCausalLM(FixMinConfig(**{**shape, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model


@pytest.fixture
def make_model() -> Callable[..., FixMinForCausalLM]:
    return build
