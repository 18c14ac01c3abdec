"""The reference model against the equations of docs/design.md, written a second time here, and against itself."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from transformers import DynamicCache, StaticCache

from fixmin_cpp.reference.configuration_fixmin import FixMinConfig
from fixmin_cpp.reference.modeling_fixmin import CACHE_FIELD, TokenCode, lift, rope_tables, rotate

OPTIONS = {
    "as published": {},
    "affine, interleaved lift": {"code_kind": "affine", "code_lift": "interleave"},
    "table, wide code": {"code_kind": "table", "code_width": 12},
    "learned": {"code_kind": "learned"},
    "layernorm eps": {"norm_eps": 1e-2},
    "values": {"code_values": [-1.0, 1.0]},
    "tile that does not divide": {"hidden_size": 60},
    "rmsnorm": {"norm_type": "rmsnorm", "norm_eps": 1e-3},
    "layernorm without bias": {"norm_bias": False},
    "tanh gelu": {"activation": "gelu_tanh"},
    "swiglu": {"activation": "swiglu", "intermediate_size": 50},
    "interleaved rope": {"rope_style": "interleaved"},
    "partial rope": {"rope_dim": 4, "rope_theta": 500.0},
    "no rope": {"rope_dim": 0},
    "grouped queries": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "biases everywhere": {"qkv_bias": True, "attn_out_bias": True},
    "biases nowhere": {"mlp_bias": False, "lm_head_bias": False, "norm_bias": False},
    "attention scale": {"attn_scale": 0.7},
}


def ids_of(length: int, vocab_size: int = 300, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))


def equations(model, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of docs/design.md in float64 NumPy, one token and one head at a time."""
    c, w = model.config, {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    d = c.hidden_size // c.num_attention_heads

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(x, name):
        if c.norm_type == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
        return x * w[name + ".weight"] + w.get(name + ".bias", 0.0)

    def embed(t):
        if c.code_kind == "learned":
            return w["model.token_embd.weight"][t]
        if c.code_kind == "table":
            bits = w["model.code.table"][t].astype(int)
        else:
            bits = [t // 2**j % 2 for j in range(c.code_width)]
        if c.code_kind == "affine":
            matrix, shift = w["model.code.matrix"].astype(int), w["model.code.shift"].astype(int)
            bits = [
                (sum(a * b for a, b in zip(row, bits, strict=True)) + s) % 2
                for row, s in zip(matrix, shift, strict=True)
            ]
        run = c.hidden_size // c.code_width
        return np.array(
            [c.code_values[bits[n % c.code_width if c.code_lift == "tile" else n // run]] for n in range(c.hidden_size)]
        )

    def rope(x, position):
        y, half = x.copy(), c.rope_dim // 2
        for i in range(half):
            p, q = (i, i + half) if c.rope_style == "half" else (2 * i, 2 * i + 1)
            angle = position * c.rope_theta ** (-2 * i / c.rope_dim)
            y[p] = x[p] * math.cos(angle) - x[q] * math.sin(angle)
            y[q] = x[q] * math.cos(angle) + x[p] * math.sin(angle)
        return y

    def activate(u):
        if c.activation == "gelu_tanh":
            return 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        return 0.5 * u * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))

    x = np.stack([embed(int(t)) for t in ids])
    for layer in range(c.num_hidden_layers):
        name = f"model.layers.{layer}."
        h = norm(x, name + "attn_norm")
        q, k, v = (linear(h, name + "attn_" + part).reshape(len(ids), -1, d) for part in "qkv")
        mixed = np.zeros((len(ids), c.num_attention_heads, d))
        for head in range(c.num_attention_heads):
            source = head // (c.num_attention_heads // c.num_key_value_heads)
            for t in range(len(ids)):
                keys = np.stack([rope(k[s, source], s) for s in range(t + 1)])
                scores = keys @ rope(q[t, head], t) * (c.attn_scale or 1 / math.sqrt(d))
                weights = np.exp(scores - scores.max())
                mixed[t, head] = weights @ v[: t + 1, source] / weights.sum()
        x = x + linear(mixed.reshape(len(ids), -1), name + "attn_output")
        h = norm(x, name + "ffn_norm")
        u = linear(h, name + "ffn_up")
        if c.activation == "swiglu":
            gate = linear(h, name + "ffn_gate")
            x = x + linear(gate / (1 + np.exp(-gate)) * u, name + "ffn_down")
        else:
            x = x + linear(activate(u), name + "ffn_down")
    return linear(norm(x, "model.output_norm"), "lm_head")


def fill_code(model) -> None:
    """Give an affine or table model a code that is not the identity."""
    code, rng = getattr(model.model, "code", None), np.random.default_rng(5)
    if model.config.code_kind == "affine":
        width = model.config.code_width
        lower = np.tril(rng.integers(0, 2, (width, width)), -1) + np.eye(width, dtype=int)
        code.matrix.copy_(torch.from_numpy(lower[rng.permutation(width)]))
        code.shift.copy_(torch.from_numpy(rng.integers(0, 2, width)))
    elif model.config.code_kind == "table":
        code.table.copy_(torch.from_numpy(rng.integers(0, 2, code.table.shape)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits_follow_the_equations(make_model, options, attention):
    model = make_model(attn_implementation=attention, **options)
    fill_code(model)
    model = model.double()
    ids = ids_of(7)
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape == (2, 7, 300)
    for row in range(2):
        assert_allclose(logits[row].numpy(), equations(model, ids[row].numpy()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if options])
def test_every_option_changes_the_logits(make_model, name):
    """Otherwise the comparison above would say nothing about the option."""
    options = OPTIONS[name]
    base, model = make_model(), make_model(**options)
    fill_code(model)
    shared = {name: tensor for name, tensor in base.state_dict().items() if name in model.state_dict()}
    shared = {name: tensor for name, tensor in shared.items() if tensor.shape == model.state_dict()[name].shape}
    model.load_state_dict(shared, strict=False)
    with torch.no_grad():
        difference = (base(ids_of(9)).logits - model(ids_of(9)).logits).abs().max()
    assert difference > 1e-4


@pytest.mark.parametrize("width", [1, 2, 9, 12, 16, 20])
def test_fixed_code_is_the_bits_of_the_id(width):
    vocab_size = 2**width - (1 if width > 1 else 0)  # not a power of two where there is a choice
    code = TokenCode(FixMinConfig(vocab_size=vocab_size, code_width=width))
    ids = torch.arange(vocab_size) if width <= 16 else torch.randint(0, vocab_size, (5000,))
    bits = code.codes(ids)
    assert not list(code.buffers())  # computed, not looked up
    assert bits.shape == (len(ids), width)
    assert_array_equal((bits.numpy() << np.arange(width)).sum(-1), ids.numpy())


def test_default_code_width():
    widths = {2: 1, 3: 2, 300: 9, 512: 9, 513: 10, 65536: 16}
    assert {size: FixMinConfig(vocab_size=size).code_width for size in widths} == widths


def test_table_made_from_an_affine_map_gives_the_same_logits(make_model):
    affine = make_model(code_kind="affine")
    fill_code(affine)
    table = make_model(code_kind="table")
    table.load_state_dict({n: t for n, t in affine.state_dict().items() if "code" not in n}, strict=False)
    table.model.code.table.copy_(affine.model.code.codes(torch.arange(300)))
    with torch.no_grad():
        assert torch.equal(affine(ids_of(9)).logits, table(ids_of(9)).logits)


def test_identity_map_is_the_fixed_code():
    config = {"vocab_size": 4096}
    fixed, affine = TokenCode(FixMinConfig(**config)), TokenCode(FixMinConfig(code_kind="affine", **config))
    ids = torch.arange(4096)
    assert torch.equal(fixed.codes(ids), affine.codes(ids))


def test_lift_tile_and_interleave():
    code = torch.tensor([[1, 0, 0], [0, 1, 1]])
    make = {"vocab_size": 8, "num_attention_heads": 1, "rope_dim": 0, "code_values": [-0.5, 2.0]}
    tile = lift(code, FixMinConfig(hidden_size=7, **make), torch.float32)
    interleave = lift(code, FixMinConfig(hidden_size=6, code_lift="interleave", **make), torch.float32)
    on, off = 2.0, -0.5
    assert_array_equal(tile.numpy(), [[on, off, off, on, off, off, on], [off, on, on, off, on, on, off]])
    assert_array_equal(interleave.numpy(), [[on, on, off, off, off, off], [off, off, on, on, on, on]])


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotated_products_depend_on_the_distance_only(style):
    config = FixMinConfig(hidden_size=32, num_attention_heads=2, rope_style=style, rope_dim=12)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def product(a: int, b: int) -> float:
        at = [rope_tables(torch.tensor([[position]]), config) for position in (a, b)]
        return float((rotate(q, *at[0], config) * rotate(k, *at[1], config)).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-9)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 1, "rope_style": "interleaved", "rope_dim": 6}])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("chunks", [[1] * 11, [4, 7], [3, 1, 7]])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cache_gives_the_logits_of_the_whole_sequence(make_model, options, attention, chunks, name):
    """Under both of its names; the last logits without what was before them are others, so none can be ignored."""
    model = make_model(attn_implementation=attention, **options)
    ids = ids_of(11)
    cache, parts, start = None, [], 0
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        for length in chunks:
            out = model(ids[:, start : start + length], **{name: cache}, use_cache=True)
            cache, start = out[CACHE_FIELD], start + length
            parts.append(out.logits)
        alone = model(ids[:, -chunks[-1] :], use_cache=False).logits[:, -1]
    assert CACHE_FIELD not in whole
    assert cache.get_seq_length() == 11
    assert (alone - whole.logits[:, -1]).abs().max() > 1e-2
    assert_allclose(torch.cat(parts, 1).numpy(), whole.logits.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_every_step_with_padding_and_a_cache(make_model, name):
    """Rows of several lengths, padded on the left, token by token and with a rejected draft: as each row alone."""
    model, rows = make_model(), [ids_of(n, rows=1) for n in (9, 7, 4)]
    ids = torch.stack([torch.nn.functional.pad(row[0], (9 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row[0]), (9 - row.shape[1], 0)) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    with torch.no_grad():
        whole = [model(row, use_cache=False).logits[0] for row in rows]
        model(ids[:, :5], mask[:, :5], positions[:, :5], **{name: cache})
        model(ids[:, 1:4], torch.cat((mask[:, :5], mask[:, 1:4]), 1), positions[:, 1:4], **{name: cache})
        cache.crop(-3)
        steps = [
            model(ids[:, t : t + 1], mask[:, : t + 1], positions[:, t : t + 1], **{name: cache}) for t in range(5, 9)
        ]
        got = torch.cat([step.logits for step in steps], 1)
        for i, logits in enumerate(whole):
            assert_allclose(got[i, -4:].numpy(), logits[-4:].numpy(), rtol=0, atol=2e-5)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        order = [2, 0, 1]
        mask = torch.nn.functional.pad(mask[order], (0, 1), value=1)
        again = model(ids[order, -1:], mask, positions[order, -1:] + 1, **{name: cache}).logits[:, -1]
        for i, logits in zip(order, again, strict=True):
            longer = model(torch.cat((rows[i], rows[i][:, -1:]), 1), use_cache=False).logits[0, -1]
            assert_allclose(logits.numpy(), longer.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_static_cache(make_model, name):
    model, ids = make_model(), ids_of(9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        parts = [model(ids[:, a:b], **{name: cache}).logits for a, b in ((0, 4), (4, 5), (5, 9))]
    assert_allclose(torch.cat(parts, 1).numpy(), whole.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, ValueError, "two names of one argument"),
        ({"cache": ((torch.ones(1), torch.ones(1)),)}, TypeError, "cache must be a Cache .* got tuple"),
        ({"past_key_values": [1]}, TypeError, "past_key_values must be a Cache .* got list"),
        ({"cahce": DynamicCache()}, TypeError, "does not take cahce"),
        ({"inputs_embeds": torch.ones(1, 1, 36)}, TypeError, "does not take inputs_embeds"),
        ({"output_attentions": True}, TypeError, "does not take output_attentions"),
        ({"cache_position": torch.tensor([1, 2, 3])}, ValueError, "cache_position must be 0 to 2"),
        ({"attention_mask": torch.ones(2, 2)}, ValueError, r"attention_mask must have the shape \[2, 3\]"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, ValueError, r"\[2, 3\] .* got \[2, 1, 3, 3\]"),
        ({"labels": ids_of(3), "logits_to_keep": 1}, ValueError, "leave out logits_to_keep"),
    ],
)
def test_arguments_that_are_refused(make_model, arguments, error, words):
    with pytest.raises(error, match=words):
        make_model()(ids_of(3), **arguments)


def test_arguments_that_ask_for_nothing(make_model):
    model, ids = make_model(), ids_of(3)
    with torch.no_grad():
        got = model(ids, output_attentions=False, inputs_embeds=None, cache_position=torch.arange(3)).logits
        assert torch.equal(got, model(ids).logits)
        assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 2])).logits, got[:, [0, 2]])


def test_loss_of_a_part_of_a_batch(make_model):
    """As Trainer asks for it when it gathers gradients: the parts' losses add up to that of the whole."""
    model, ids = make_model(), ids_of(8)
    labels = ids.clone()
    labels[0, 2:5] = -100
    n = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        whole = model(ids, labels=labels).loss
        parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=n).loss for i in range(2)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_left_padding_does_not_change_the_sequence(make_model):
    model, ids = make_model(), ids_of(6, rows=1)
    padded = torch.cat((torch.full((1, 3), 7), ids), 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    with torch.no_grad():
        plain = model(ids).logits
        out = model(padded, attention_mask=mask, position_ids=torch.tensor([[0] * 3 + [*range(6)]]))
    assert torch.isfinite(out.logits).all()
    assert_allclose(out.logits[:, 3:].numpy(), plain.numpy(), rtol=0, atol=2e-5)


def test_outputs(make_model):
    model, ids = make_model(), ids_of(8)
    with torch.no_grad():
        out = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
        last = model(ids, logits_to_keep=1).logits
        as_tuple = model(ids, return_dict=False, use_cache=False)
    states = out.hidden_states
    assert len(states) == 3
    assert {state.shape for state in states} == {(2, 8, 36)}
    assert torch.equal(states[0], model.get_input_embeddings()(ids))
    assert not any(torch.equal(a, b) for a, b in pairwise(states))
    assert torch.equal(model.lm_head(states[-1]), out.logits)
    log_p = torch.log_softmax(out.logits[:, :-1], -1).gather(-1, ids[:, 1:, None])
    assert out.loss.item() == pytest.approx(-log_p.mean().item(), rel=1e-5)
    assert_allclose(last.numpy(), out.logits[:, -1:].numpy(), rtol=0, atol=1e-5)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], out.logits)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_type": "batchnorm"},
        {"activation": "relu"},
        {"rope_style": "full"},
        {"code_kind": "none"},
        {"code_lift": "repeat"},
        {"hidden_size": 100, "num_attention_heads": 3},
        {"num_attention_heads": 32, "num_key_value_heads": 5},
        {"rope_dim": 7},
        {"rope_dim": 34},
        {"code_values": [1.0]},
        {"vocab_size": 300, "code_width": 8},
        {"hidden_size": 1000, "num_attention_heads": 10, "code_lift": "interleave"},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(options):
    with pytest.raises(ValueError, match=r"\w+"):
        FixMinConfig(**options)
