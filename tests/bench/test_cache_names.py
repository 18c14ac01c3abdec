"""Benchmarks with PyTorch keep the cache under whichever name code and transformers have for it."""

import numpy as np
import pytest
import torch
from against_pytorch import greedy_pytorch
from peers.worker import PyTorch

from fixmin_cpp.reference.configuration_fixmin import FixMinConfig
from fixmin_cpp.reference.modeling_fixmin import CACHE_FIELD, FixMinForCausalLM

IDS = np.array([3, 1, 4, 1, 5])


@pytest.fixture(scope="module")
def model() -> FixMinForCausalLM:
    torch.manual_seed(1)
    config = FixMinConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    made = FixMinForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return made


class Watched(torch.nn.Module):
    """Notes how many tokens each call reads, and whether it is given a cache."""

    def __init__(self, model: FixMinForCausalLM) -> None:
        super().__init__()
        self.model, self.calls = model, []

    def call(self, ids, cache, **others):
        self.calls.append((ids.shape[1], cache is not None))
        return self.model(ids, **{CACHE_FIELD: cache}, **others)


class Old(Watched):
    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        return self.call(input_ids, past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep)


class New(Watched):
    def forward(self, input_ids, cache=None, use_cache=None, logits_to_keep=0):
        return self.call(input_ids, cache, use_cache=use_cache, logits_to_keep=logits_to_keep)


class Both(Watched):
    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0, cache=None):
        cache = past_key_values if cache is None else cache
        return self.call(input_ids, cache, use_cache=use_cache, logits_to_keep=logits_to_keep)


kinds = pytest.mark.parametrize("kind", [Old, New, Both])


@kinds
@torch.inference_mode()
def test_greedy_tokens(model, kind):
    expected = IDS.tolist()
    for _ in range(6):
        expected.append(int(model(torch.tensor([expected]), use_cache=False).logits[0, -1].argmax()))
    network = kind(model)
    assert greedy_pytorch(network, IDS, 6) == expected[len(IDS) :]
    assert network.calls == [(5, False)] + 6 * [(1, True)]


@kinds
@pytest.mark.parametrize("cache", [True, False])
@torch.inference_mode()
def test_worker(model, kind, cache):
    engine = PyTorch({"model": "", "cache": cache})
    engine.network = kind(model)
    assert engine.decode(IDS, 4) > 0
    expected = [(5, False), *4 * [(1, True)]] if cache else [(n, False) for n in (5, 6, 7, 8)]
    assert engine.network.calls == expected
