"""Models whose weights are not in memory compute what they would compute otherwise."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from fixmin_cpp.convert.checkpoint.source import Source  # noqa: E402
from fixmin_cpp.convert.observed.memory import InitialValuesUsed, Unwritten, give_back, map_weights  # noqa: E402
from fixmin_cpp.convert.observed.probe import load_own_model  # noqa: E402

LARGE = 1024  # a square matrix of this width is just large enough to be left unwritten

# A model of BLOCKS matrices; what it computes from the ids depends on a table that the constructor draws after them.
MODELING = """
import torch
from torch import nn

class Config:
    @classmethod
    def from_dict(cls, fields):
        config = cls()
        vars(config).update(fields)
        return config

class Model(nn.Module):
    config_class = Config

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(7)
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width, bias=False) for _ in range(config.blocks))
        self.last = nn.Linear(config.width, 32)
        {extra}
        self.register_buffer("table", torch.randn(32, config.width), persistent=False)

    def forward(self, ids):
        x = self.table[ids]
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(x)
"""


def checkpoint(folder: Path, blocks: int, extra: str = "pass") -> dict[str, torch.Tensor]:
    config = {"architectures": ["Model"], "width": LARGE, "blocks": blocks, "vocab_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(MODELING.replace("{extra}", extra))
    generator = torch.Generator().manual_seed(1)
    state = {f"blocks.{i}.weight": torch.randn(LARGE, LARGE, generator=generator) / 32 for i in range(blocks)}
    state |= {"last.weight": torch.randn(32, LARGE, generator=generator), "last.bias": torch.zeros(32)}
    save_file(state, folder / "model.safetensors")
    return state


def expected_logits(state: dict[str, torch.Tensor], blocks: int, ids: np.ndarray) -> torch.Tensor:
    """The same model written out here, with the constructor's random numbers drawn in the ordinary way."""
    torch.manual_seed(7)
    for _ in range(blocks):
        nn.Linear(LARGE, LARGE, bias=False)
    nn.Linear(LARGE, 32)
    x = torch.randn(32, LARGE)[torch.from_numpy(ids)]
    for i in range(blocks):
        x = torch.tanh(x @ state[f"blocks.{i}.weight"].T)
    return x @ state["last.weight"].T + state["last.bias"]


def resident_mb(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) // 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_stays_small(tmp_path: Path) -> None:
    blocks = 64  # 256 MB
    state = checkpoint(tmp_path, blocks)
    ids = np.array([0, 31, 7])
    expected = expected_logits(state, blocks, ids)
    del state
    with Source(tmp_path) as source:
        give_back()
        before = resident_mb("RssAnon"), resident_mb("RssFile")
        own = load_own_model(source, print)
        logits = own.logits(ids)
        grown = resident_mb("RssAnon") - before[0], resident_mb("RssFile") - before[1]
        assert torch.allclose(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
        assert max(grown) < 160, grown  # scratch memory and libraries, but not the weights
        own.close()


# Initial values that reach what the model computes must be the real ones.
DEPENDENT = {
    "kept copy": "self.register_buffer('copied', self.blocks[0].weight.detach().clone(), persistent=False)",
    "truncated": "nn.init.trunc_normal_(self.blocks[0].weight)",
    "number": "self.scale = self.blocks[0].weight.abs().max().item()",
    "own table": "self.hidden = [torch.empty(1024, 1024).normal_(generator=torch.Generator().manual_seed(3))]",
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_constructors_that_use_initial_values(tmp_path: Path, name: str) -> None:
    state = checkpoint(tmp_path, 2, DEPENDENT[name])
    torch.manual_seed(7)
    first = nn.Linear(LARGE, LARGE, bias=False).weight.detach()
    with Source(tmp_path) as source:
        own = load_own_model(source, print)
        model = own.model
        if name == "kept copy":
            assert torch.equal(model.copied, first)
        elif name == "number":
            assert model.scale == first.abs().max().item()
        elif name == "own table":
            drawn = torch.empty(LARGE, LARGE).normal_(generator=torch.Generator().manual_seed(3))
            assert torch.equal(model.hidden[0], drawn)
        assert torch.equal(model.blocks[0].weight, state["blocks.0.weight"])
        own.close()


def normal_rows(tensor: torch.Tensor) -> None:
    tensor.normal_()
    tensor[3].zero_()
    tensor.mul_(0.5).clamp_(-1, 1)


INITIALISERS: dict[str, Callable[[torch.Tensor], object]] = {
    "normal": nn.init.normal_,
    "uniform": nn.init.kaiming_uniform_,
    "rows": normal_rows,
    "twice": lambda t: nn.init.xavier_uniform_(nn.init.normal_(t)),
}


@pytest.mark.parametrize("name", INITIALISERS)
def test_random_numbers_after_unwritten_tensors(name: str) -> None:
    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        weight = nn.Parameter(torch.empty(LARGE, LARGE))
        with torch.no_grad():
            INITIALISERS[name](weight)
        return weight, torch.rand(9)

    _, expected = draw()
    with Unwritten() as mode:
        weight, drawn = draw()
    assert torch.equal(drawn, expected)
    assert mode.alive() == {weight.untyped_storage().data_ptr()}


READERS: dict[str, Callable[[torch.Tensor], object]] = {
    "truncated": nn.init.trunc_normal_,  # draws again what lies outside
    "clone": lambda t: t.clone(),
    "item": lambda t: t[0, 0].item(),
    "norm": lambda t: t.norm(),
    "to": lambda t: t.to(torch.bfloat16),
    "source": lambda t: torch.zeros(LARGE, LARGE).copy_(t),
    "view": lambda t: t.T[:3].sum(),
    "out": lambda t: torch.mul(t, 2, out=torch.empty(LARGE, LARGE)),
}


@pytest.mark.parametrize("name", READERS)
def test_reading_unwritten_tensors(name: str) -> None:
    with Unwritten(), torch.no_grad():
        weight = nn.init.normal_(torch.empty(LARGE, LARGE))
        with pytest.raises(InitialValuesUsed):
            READERS[name](weight)


def test_small_and_partial_tensors_are_written() -> None:
    with Unwritten() as mode:
        small = nn.init.normal_(torch.empty(LARGE - 1, LARGE))
        whole = torch.zeros(2 * LARGE, LARGE)
        whole[:LARGE].normal_()
    assert small.std() > 0.9
    assert whole[:LARGE].std() > 0.9
    assert not mode.alive()


def test_forgotten_tensors_are_not_alive() -> None:
    with Unwritten() as mode:
        nn.Linear(LARGE, LARGE, bias=False)
    assert not mode.alive()


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(LARGE, LARGE))
        self.b = nn.Parameter(torch.zeros(LARGE, LARGE))
        self.tied = self.a
        self.views = [self.b.detach().T]  # seen by nothing that looks for tensors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a + x @ self.tied + x @ self.views[0]


def test_mapping(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    state = {n: torch.randn(LARGE, LARGE, generator=generator) for n in ("a", "b")}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    model = Aliased().requires_grad_(False)
    with Source(tmp_path) as source:
        mapped = map_weights(model, source, {"a": "a", "tied": "a", "b": "b"})
        assert mapped == {"a", "tied"}  # the memory of b has another user, for whom it must be filled in place
        model.b.copy_(state["b"])
        x = torch.randn(2, LARGE, generator=generator)
        for _ in range(2):  # the second time its pages have been dropped
            assert torch.allclose(model(x), x @ (2 * state["a"] + state["b"].T), rtol=1e-4, atol=1e-3)
        # What the code writes to its weights stays, and does not reach the file.
        model.a.mul_(2)
        model(x)
        assert torch.equal(model.a, 2 * state["a"])
        assert np.array_equal(source.read_raw("a"), state["a"].numpy())
