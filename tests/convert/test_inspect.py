"""`fixmin inspect`: what it shows, in a pipe and on a terminal, and that a file cannot make it show anything else."""

import io
import json
import re

import numpy as np
import pytest
from gguf import GGUFValueType
from gguf_factory import make_model, random_invertible
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, models

from fixmin_cpp import _core
from fixmin_cpp.errors import ArgumentError, GGUFError
from fixmin_cpp.inspect import describe, printable, render

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def shown(path, tokens=(), terminal=False, width=120, **options) -> str:
    """What `render` prints: without a terminal as into a pipe."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    console = Console(file=stream, force_terminal=terminal, width=width if terminal else None, highlight=False)
    render(path, tokens, console=console, **options)
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8")


def tokenizer_json() -> str:
    vocab = {"a": 0, "b": 1, " ": 2, "[red]": 3, "\x1b[31m": 4, "ab": 5, "1": 6}
    return Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")])).to_str()


def test_pipe_output_is_ascii_and_complete(tmp_path):
    path = make_model(tmp_path / "m.gguf", weight_type="Q8_0")
    text = shown(path, all_tensors=True)
    assert text.isascii()
    assert "\x1b" not in text
    for name, value in {
        "fixmin.vocab_size": "100",
        "fixmin.attention.scale": "0.25",
        "fixmin.rope.style": "half",
        "kind": "affine",
        "lift": "tile",
        "ggml.model": "none",
    }.items():
        assert re.search(rf"^ +{re.escape(name)} +{re.escape(value)}$", text, re.MULTILINE), name
    for tensor in _core.GgufFile(str(path)).tensors:
        shape = " x ".join(map(str, tensor.shape))
        assert re.search(rf"{re.escape(tensor.name)} +\| {shape} +\| {tensor.type} +\| +{tensor.n_bytes:,}", text)
    assert "none: nobody has compared this file with a checkpoint" in text


def test_matrix_is_drawn_row_by_row(tmp_path):
    matrix, shift = random_invertible(7, np.random.default_rng(5)), np.array([1, 0, 0, 1, 0, 1, 1])
    path = make_model(tmp_path / "m.gguf", matrix=matrix, shift=shift)
    for terminal, one, zero, bar in ((False, "##", "..", "|"), (True, "██", "··", "│")):
        rows = re.findall(
            rf"^ +(\d+)  ((?:{one}|{zero})+) [{bar}] ({one}|{zero})\r?$", plain(shown(path, terminal=terminal)), re.M
        )
        assert [int(i) for i, _, _ in rows] == list(range(7))
        drawn = [[int(row[2 * j : 2 * j + 2] == one) for j in range(7)] for _, row, _ in rows]
        assert np.array_equal(drawn, matrix)
        assert [int(bit == one) for _, _, bit in rows] == shift.tolist()


def plain(text: str) -> str:
    """Without the colours that the terminal output is meant to have."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize(
    ("matrix", "shift", "words"),
    [
        (np.eye(7), np.zeros(7), "identity"),
        (np.eye(7)[::-1], np.zeros(7), "reversal"),
        (np.eye(7)[[1, 0, 2, 3, 4, 5, 6]], np.ones(7), "permutation of the bits, 7 bits inverted"),
        (np.tri(7), np.zeros(7), "28 ones, rank 7 of 7"),
        (np.ones((7, 7)), np.zeros(7), "49 ones, rank 1 of 7: NOT invertible"),
    ],
)
def test_map_in_words(tmp_path, matrix, shift, words):
    path = make_model(tmp_path / "m.gguf", matrix=matrix.astype(np.uint8), shift=shift)
    assert words in describe(path)["code"]["map"]


@given(width=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_rank_agrees_with_the_code_map(width, seed):
    """A random matrix has full rank exactly if the native CodeMap accepts it."""
    from fixmin_cpp.inspect import gf2_rank

    a = np.random.default_rng(seed).integers(0, 2, (width, width)).astype(np.uint8)
    try:
        _core.CodeMap.affine(2**width, a, np.zeros(width, np.uint8))
        invertible = True
    except _core.FixminError:
        invertible = False
    assert (gf2_rank(a) == width) == invertible


@pytest.mark.parametrize("code_kind", ["affine", "table"])
def test_codes_of_tokens_are_the_engines(tmp_path, code_kind):
    path = make_model(tmp_path / "m.gguf", code_kind=code_kind)
    tokens = describe(path, ["0,1, 99", "42"])["tokens"]
    assert [t["id"] for t in tokens] == [0, 1, 99, 42]
    engine = _core.Engine(str(path))
    assert [t["code"] for t in tokens] == engine.codes(np.array([0, 1, 99, 42], np.uint32)).tolist()
    assert all(t["text"] is None for t in tokens)
    assert "".join(map(str, tokens[2]["code"])) in shown(path, ["99"])


def test_text_is_split_by_the_tokenizer_in_the_file(tmp_path):
    path = make_model(tmp_path / "m.gguf", tokenizer_json=tokenizer_json())
    tokens = describe(path, ["0,abb", '"b, a"'.replace(", ", " ")])["tokens"]
    assert [t["id"] for t in tokens] == [0, 5, 1, 1, 2, 0]
    assert [t["text"] for t in tokens][:3] == ["a", "ab", "b"]


def test_learned_embedding_has_no_codes(tmp_path):
    path = make_model(tmp_path / "m.gguf", code_kind="learned")
    assert describe(path, ["3"])["tokens"] == [{"id": 3, "text": None, "bytes": None, "code": None}]
    assert "(learned)" in shown(path, ["3"])


@pytest.mark.parametrize("tokens", ["100", "4294967296", "99999999999999999999", "hello"])
def test_bad_tokens(tmp_path, tokens):
    path = make_model(tmp_path / "m.gguf")
    with pytest.raises(ArgumentError):
        describe(path, [tokens])


def test_json_is_one_object_with_everything(tmp_path):
    path = make_model(tmp_path / "m.gguf", weight_type="Q4_0", embedding_length=64, feed_forward_length=96)
    text = shown(path, ["7"], as_json=True)
    parsed = json.loads(text)
    assert parsed == describe(path, ["7"])
    assert parsed["metadata"]["fixmin.vocab_size"] == 100
    assert len(parsed["code"]["matrix"]) == 7
    assert sum(t["bytes"] for t in parsed["tensors"]) == sum(e["bytes"] for e in parsed["file"]["types"].values())
    matrices = [t for t in parsed["tensors"] if len(t["shape"]) == 2]
    bits = 8 * sum(t["bytes"] for t in matrices) / sum(np.prod(t["shape"]) for t in matrices)
    assert parsed["file"]["bits_per_weight"] == pytest.approx(bits)


def test_numbers_that_json_lacks(tmp_path):
    path = make_model(tmp_path / "m.gguf", edit=lambda w: w.add_float32("fixmin.x", float("nan")))
    assert json.loads(shown(path, as_json=True))["metadata"]["fixmin.x"] == "nan"


def test_another_architecture_is_described_too(tmp_path):
    def rename(writer):
        for key in [k for k in writer.kv_data[0] if k.startswith("fixmin")]:
            del writer.kv_data[0][key]
        writer.kv_data[0]["general.architecture"].value = "llama"

    path = make_model(tmp_path / "m.gguf", edit=rename)
    text = shown(path)
    assert "llama" in text
    assert "blk.*.attn_q.weight" in text
    with pytest.raises(GGUFError, match="the file has no codes"):
        describe(path, ["0"])


def test_malformed_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(GGUFError):
        shown(tmp_path / "m.gguf")


# --- hostile files ----------------------------------------------------------------------------------------------

EVIL = (
    "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b31m\rover\x08\x7f\n  passed  True\u2028\u202egnp.exe\u200b"
    "[bold red]markup[/bold red] [link=http://x]click[/link] :skull:"
)


def spoil(writer):
    """Control characters and markup in strings, markup in names (the reader takes no control characters there)."""
    data = writer.kv_data[0]
    data["general.name"] = type(data["general.architecture"])(EVIL, GGUFValueType.STRING)
    writer.add_string("fixmin.convert.source", EVIL)
    writer.add_string("fixmin.convert.certificate.against", EVIL)
    writer.add_array("fixmin.convert.conventions", [EVIL, EVIL])
    writer.add_string("general.[red]x[/red]", "x")
    data["fixmin.code.lift"].value = EVIL
    data["tokenizer.ggml.model"].value = EVIL
    writer.add_tensor("[red]x[/red]", np.zeros(3, np.float32))


@pytest.mark.parametrize("terminal", [False, True])
def test_hostile_strings_stay_text(tmp_path, terminal):
    path = make_model(tmp_path / "m.gguf", edit=spoil)
    clean = make_model(tmp_path / "clean.gguf", edit=None)
    text = shown(path, terminal=terminal, width=1000)
    # Colours of our own are allowed on a terminal: exactly those that a harmless file gets too.
    own = set(re.findall(r"\x1b\[[0-9;]*m", shown(clean, terminal=terminal))) | {"\x1b[1;31m"}
    assert set(re.findall(r"\x1b[^m]*m?", text)) <= own
    assert not CONTROL.search(plain(text))
    assert not re.search(r"^ +passed +True", text, re.MULTILINE), "a faked line"
    assert "[bold red]markup[/bold red]" in text
    assert ":skull:" in text
    assert "\\x1b[2J" in text


def test_hostile_tokens(tmp_path):
    path = make_model(tmp_path / "m.gguf", tokenizer_json=tokenizer_json())
    text = shown(path, ["3", "4"])
    assert "[red]" in text
    assert "\x1b" not in text


@given(st.text())
def test_printable_is_harmless_and_reversible(text):
    safe = printable(text)
    assert not CONTROL.search(safe)
    assert "\n" not in safe
    assert safe.encode("utf-8").decode("utf-8") == safe  # no lone surrogates left
    if "\\" not in text:
        assert re.sub(r"\\(x..|u....|U.{8}|[nrt])", lambda m: m[0].encode().decode("unicode_escape"), safe) == text


def test_printable_cuts_long_text():
    assert printable("a" * 300, 200) == "a" * 200 + "... (300 characters)"
    assert printable("Grüße 😀 日本") == "Grüße 😀 日本"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("affine_matrix", [1, 0, 1]),
        ("affine_matrix", [2] * 49),
        ("affine_shift", [True] * 6),
        ("affine_shift", ["a"] * 7),
    ],
)
def test_defective_code_is_reported_not_drawn(tmp_path, key, value):
    def edit(writer):
        del writer.kv_data[0][f"fixmin.code.{key}"]
        writer.add_array(f"fixmin.code.{key}", value)

    path = make_model(tmp_path / "m.gguf", edit=edit)
    assert f"fixmin.code.{key} is not an array of" in describe(path)["code"]["defect"]
    assert "##" not in shown(path)
    with pytest.raises(GGUFError):
        describe(path, ["0"])


@pytest.mark.parametrize("width", [0, 2**31, 5000])
def test_absurd_width(tmp_path, width):
    def edit(writer):
        writer.kv_data[0]["fixmin.code.width"].value = width

    path = make_model(tmp_path / "m.gguf", edit=edit)
    assert "defect" in describe(path)["code"]
    with pytest.raises(GGUFError):
        describe(path, ["0"])


def test_scales_of_rows_are_no_weights(tmp_path):
    plain, scaled = (make_model(tmp_path / f"{kind}.gguf", weight_type=kind) for kind in ("F32", "W8A8"))
    found = [describe(path)["file"] for path in (plain, scaled)]
    assert found[0]["weights"] == found[1]["weights"]
    assert found[1]["bits_per_weight"] > 8
