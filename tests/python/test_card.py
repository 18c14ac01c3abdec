"""The README of a hub repository: what the files say, and nothing that they do not."""

import re
from pathlib import Path

import gguf
import pytest
from fixmin_cli import fixmin
from gguf_factory import make_model

from fixmin_cpp import ArgumentError, GGUFError
from fixmin_cpp.card import card

FIGURES = {
    "passed": True,
    "against": "the checkpoint's own code",
    "code_ids": 300,
    "code_mismatches": 0,
    "tokens": 241,
    "logit_error": 0.0154,
    "kl_divergence": 0.000216,
    "top1_agreement": 0.996,
    "engine_error": 3.2e-7,
}


def certified(path: Path, model: Path, **more: object) -> Path:
    """A file of a model with a certificate, as the converter writes it."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, "fixmin")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub)
    for name, value in {**{f"fixmin.convert.certificate.{k}": v for k, v in FIGURES.items()}, **more}.items():
        add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return certified(tmp_path / "m-F32.gguf", make_model(tmp_path / "plain.gguf"))


def header(text: str) -> dict[str, str]:
    """The simple lines of the YAML."""
    yaml = re.match(r"---\n(.*?)\n---\n", text, re.S)
    return dict(line.split(": ", 1) for line in yaml[1].splitlines() if ": " in line)


def test_what_it_says(path):
    text = card([path], repository="o/m-GGUF", base_model="o/m", license="apache-2.0")
    assert header(text) == {
        "pipeline_tag": "text-generation",
        "library_name": "fixmin-cpp",
        "license": "apache-2.0",
        "base_model": "o/m",
        "base_model_relation": "quantized",
    }
    row = next(line for line in text.split("## Certificate")[1].splitlines() if "m-F32" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["0.0154", "0.000216", "0.996", "3.2e-07", "241"]
    assert "no input embedding table" in text
    assert "all 300 token ids (0 mismatches)" in text
    assert f"{path.stat().st_size / 1e6:,.1f} MB" in text
    assert "fixmin run o/m-GGUF:f32" in text
    assert "base_model" not in card([path])
    assert "license" not in card([path])


def test_what_has_no_certificate_of_its_own(path, tmp_path):
    bare = make_model(tmp_path / "bare.gguf")
    later = certified(tmp_path / "m-Q4_0.gguf", bare, **{"fixmin.quantize.source_type": "F32"})
    text = card([path, bare, later]).split("## Certificate")[1].split("## Use")[0]
    assert "`bare.gguf` has no certificate that it passed." in text
    assert "`m-Q4_0.gguf` was quantised afterwards" in text
    assert text.count("0.0154") == 1


def test_a_file_cannot_write_what_it_likes(tmp_path):
    evil = "x](http://evil) <script>|\n---\nlicense: mit"
    path = certified(tmp_path / "m.gguf", make_model(tmp_path / "p.gguf"), **{"general.license": evil})
    text = card([path])
    assert "<script>" not in text
    assert "](http://evil)" not in text
    assert len(re.findall(r"^---$", text, re.M)) == 2


def test_refused(path, tmp_path):
    other = make_model(tmp_path / "other.gguf", block_count=3)
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    foreign = tmp_path / "foreign.gguf"
    writer = gguf.GGUFWriter(foreign, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for files, options, error, message in (
        ([], {}, ArgumentError, "none of the files"),
        ([foreign], {}, ArgumentError, "none of the files"),
        ([path, foreign], {}, ArgumentError, "its architecture is mamba"),
        ([path, other], {}, ArgumentError, "is another model: its fixmin.block_count differs"),
        ([path], {"repository": "me"}, ArgumentError, "repository must be OWNER/NAME"),
        ([path], {"base_model": "hf.co/a/b"}, ArgumentError, "base_model must be OWNER/NAME"),
        ([path], {"license": "a: b"}, ArgumentError, "license must be a name"),
        ([tmp_path / "no.gguf"], {}, GGUFError, "no.gguf"),
    ):
        with pytest.raises(error, match=message):
            card(files, **options)


def test_command(path, tmp_path):
    out = tmp_path / "README.md"
    done = fixmin("card", path, "-o", out, "--license", "apache-2.0")
    assert (done.returncode, done.stdout) == (0, b"")
    assert (
        out.read_text()
        == card([path], license="apache-2.0")
        == fixmin("card", path, "--license", "apache-2.0").stdout.decode()
    )
    again = fixmin("card", path, "-o", out)
    assert (again.returncode, b"exists: name another file" in again.stderr) == (1, True)
    assert fixmin("card", path, "-o", path).returncode == 1
    assert path.read_bytes()[:4] == b"GGUF"
