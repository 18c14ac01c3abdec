"""The tape: whatever way a product, a bias or a norm is spelled, the same is recorded."""

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from fixmin_cpp.convert.observed.tape import Tape  # noqa: E402

T, IN, OUT = 5, 6, 8


class Model(nn.Module):
    def __init__(self, call: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(OUT, IN))
        self.b = nn.Parameter(torch.randn(OUT))
        self.g = nn.Parameter(torch.randn(IN))
        self.heads = nn.Parameter(torch.randn(2, IN, 4))
        self.head_bias = nn.Parameter(torch.randn(2, 4))
        self.call = call

    def forward(self, x):
        return self.call(self, x)


def record(call: Callable, grad: bool = False) -> tuple[Tape, Model, torch.Tensor]:
    model = Model(call)
    x = torch.randn(1, T, IN, generator=torch.Generator().manual_seed(1))
    tape = Tape(model)
    with torch.set_grad_enabled(grad), tape:
        model(x)
    return tape, model, x[0]


def with_bias_added(m: Model, x: torch.Tensor) -> torch.Tensor:
    y = x @ m.w.T
    y += m.b
    return y.relu_()  # later changes do not reach the recording


SPELLINGS = {
    "linear": lambda m, x: F.linear(x, m.w, m.b),
    "matmul": lambda m, x: torch.matmul(x, m.w.t()) + m.b,
    "in place": with_bias_added,
    "left": lambda m, x: (m.w @ x[0].T).T + m.b,
    "addmm": lambda m, x: torch.addmm(m.b, x[0], m.w.T),
    "einsum": lambda m, x: torch.einsum("btd,ed->bte", x, m.w) + m.b,
    "convolution": lambda m, x: F.conv1d(x.mT, m.w[:, :, None], m.b).mT,
    "residual": lambda m, x: x.repeat(1, 1, 2)[..., :OUT] + (x @ m.w.T + m.b),
    "reshaped": lambda m, x: (x @ m.w.T).reshape(T, 2, 4).transpose(0, 1).contiguous() + m.b.view(2, 1, 4),
    "double": lambda m, x: torch.baddbmm(m.b[None, None], x, m.w.T[None]),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_products(spelling: str) -> None:
    tape, model, x = record(SPELLINGS[spelling])
    (product,) = tape.products
    torch.testing.assert_close(product.weight.value, model.w.data)
    assert product.weight.names == ("w",)
    torch.testing.assert_close(product.x, x)
    assert product.bias is not None
    torch.testing.assert_close(product.bias.value, model.b.data)
    torch.testing.assert_close(product.y, F.linear(x, model.w, model.b).detach())


def test_inference_mode_and_gradients() -> None:
    def frozen(m: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return F.linear(x.clone(), m.w, m.b)

    for tape, model, _ in (record(frozen), record(SPELLINGS["linear"], grad=True)):
        (product,) = tape.products
        torch.testing.assert_close(product.weight.value, model.w.data)


def test_scripted_code() -> None:
    with torch.jit.optimized_execution(False):
        tape, _, _ = record(SPELLINGS["linear"])
    assert [p.weight.names for p in tape.products] == [("w",)]


def test_one_matrix_per_head() -> None:
    def call(m: Model, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btd,hde->bhte", x, m.heads) + m.head_bias[:, None]

    tape, model, x = record(call)
    (product,) = tape.products
    torch.testing.assert_close(product.weight.value, model.heads.permute(0, 2, 1).reshape(OUT, IN).detach())
    assert product.bias is not None
    torch.testing.assert_close(product.y, x @ product.weight.value.T + model.head_bias.flatten().detach())


def test_what_is_no_product_with_a_weight() -> None:
    tape, _, _ = record(lambda m, x: (x @ x.mT).softmax(-1) @ x * m.g)
    assert tape.products == []
    (scaled,) = tape.elementwise
    assert (scaled.op, scaled.weight.names) == ("mul", ("g",))
    assert tape.used == {"g"}


def test_norms() -> None:
    tape, model, x = record(lambda m, x: F.layer_norm(x, (IN,), m.g, None, 3e-4))
    (norm,) = tape.elementwise
    assert (norm.op, norm.weight.names, norm.bias, norm.eps) == ("layer_norm", ("g",), None, 3e-4)
    torch.testing.assert_close(norm.y, F.layer_norm(x, (IN,), model.g, None, 3e-4).flatten().detach())

    tape, _, _ = record(lambda m, x: F.rms_norm(x, (IN,), m.g, 1e-3))
    assert tape.elementwise[-1].weight.names == ("g",)


def test_derived_weights_keep_their_names() -> None:
    tape, model, _ = record(lambda m, x: x @ (m.w * 2 + m.b[:, None]).T)
    (product,) = tape.products
    assert set(product.weight.names) == {"w", "b"}
    torch.testing.assert_close(product.weight.value, (model.w * 2 + model.b[:, None]).detach())


def test_inputs_only() -> None:
    model = Model(lambda m, x: F.linear(F.linear(x, m.w, m.b)[..., :IN], m.w))
    x = torch.randn(1, T, IN)
    tape = Tape(model, inputs_of=[1])
    with torch.no_grad(), tape:
        model(x)
    assert tape.products == []
    torch.testing.assert_close(tape.inputs, {1: F.linear(x[0], model.w, model.b)[:, :IN].detach()})
