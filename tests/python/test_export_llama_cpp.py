"""Exported files in llama.cpp itself."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_peer
import numpy as np
import oracle
import pytest
from export_cases import CASES
from gguf_factory import make_model
from tokenizers import Tokenizer
from toy_models import byte_level, concatenating, write_model

from fixmin_cpp.convert.gguf_file.readback import read_gguf
from fixmin_cpp.export.bpe import from_tokenizer_json
from fixmin_cpp.export.certificate import tokens_as_text
from fixmin_cpp.export.corpus import corpus
from fixmin_cpp.export.llama_cpp import export
from fixmin_cpp.tokenizer import TextTokenizer

pytestmark = pytest.mark.external

ROOT = Path(__file__).parents[2]
#: Of the published checkpoints, where it is at hand: no part of this repository.
PUBLISHED = Path(
    os.environ.get("FIXMIN_TOKENIZER", ROOT.parent / "shared" / "tokenizers" / "bvv241-2-3" / "tokenizer.json")
)
QUESTIONS = {
    "Question: What is the capital of France?\nAnswer:": " Paris",
    "Question: What is the capital of UK?\nAnswer:": " London",
}


# --- logits and tokens, by the package llama_cpp ------------------------------------------------------------------


@llama_peer.needs_python
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_model_does(case: str, tmp_path: Path) -> None:
    architecture, options = CASES[case]
    source = make_model(tmp_path / "in.gguf", **options)
    report = export(source, tmp_path / "out.gguf")
    assert report.architecture == architecture
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, options.get("vocab_size", 100), n) for n in (1, 5, 40)]
    for ours, ids in zip(llama_peer.logits(report.path, prompts), prompts, strict=True):
        true = oracle.forward(source, ids)
        # llama.cpp reads GELU from a table in F16, and its formula is that with tanh.
        limit = {"gelu": 2e-3, "gelu_tanh": 1e-3, "swiglu": 1e-5}[options["activation"]]
        assert np.linalg.norm(ours - true) < limit * np.linalg.norm(true)


@llama_peer.needs_python
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q5_1", "q6_k", "q4_k_m", "iq4_xs"])
def test_llama_cpp_reads_every_type(kind: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf", embedding_length=256, feed_forward_length=512, activation="gelu_tanh")
    report = export(source, tmp_path / "out.gguf", outtype=kind)
    ids = np.arange(30)
    (ours,) = llama_peer.logits(report.path, [ids])
    true = oracle.forward(source, ids)
    error = np.linalg.norm(ours - true) / np.linalg.norm(true)
    # llama.cpp rounds activations too, which the certificate does not.
    assert error < 2 * report.certificate.logit_error + 2e-2


def published() -> Tokenizer:
    if not PUBLISHED.exists():
        pytest.skip("the published tokenizer is not at hand (FIXMIN_TOKENIZER)")
    return Tokenizer.from_file(str(PUBLISHED))


def demo() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "examples" / "demo" / "affine" / "tokenizer.json"))


@llama_peer.needs_python
@pytest.mark.parametrize("make", [byte_level, concatenating, demo, published])
def test_llama_cpp_splits_as_the_certificate_says(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = make()
    size = tokenizer.get_vocab_size()
    text = tokenizer.to_str()
    source = make_model(tmp_path / "in.gguf", vocab_size=size, embedding_length=32, head_count=2, tokenizer_json=text)
    report = export(source, tmp_path / "out.gguf", allow_token_differences=True)
    own = TextTokenizer.from_metadata(read_gguf(source).metadata)
    assert own is not None
    names = set(own.control_tokens.values())
    vocab = {i: own.token_bytes(i) for i in range(size) if i not in names}
    texts = [text for sample in corpus(tokens_as_text(vocab), list(own.control_tokens)) for text in sample.texts]
    emulated = from_tokenizer_json(json.loads(text), size)
    assert llama_peer.token_ids(report.path, texts) == [emulated.encode(text) for text in texts]


# --- answers, by llama.cpp's programs -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fixed", "affine"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fixmin_cpp.convert.convert import convert

    folder = tmp_path_factory.mktemp("exported")
    source = folder / "demo.gguf"
    convert(ROOT / "examples" / "demo" / request.param, source, "f32", trust_remote_code=True)
    return export(source, folder / "llama.gguf", outtype="q8_0").path


def test_llama_cli_answers(exported: Path) -> None:
    """Not llama-completion, which ends without its last words where the machine is busy."""
    program = llama_peer.program("llama-cli")
    for question, answer in QUESTIONS.items():
        done = subprocess.run(
            [program, "-m", exported, "-p", question, "-n", "3", "--temp", "0", "-st", "-t", "1"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert answer in done.stdout.partition("Answer:")[2]


@contextlib.contextmanager
def server(model: Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """llama-server with a model: a function that posts a body to a path and returns the answer."""
    program = llama_peer.program("llama-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    log = open(model.with_suffix(".log"), "wb")  # noqa: SIM115
    process = subprocess.Popen(
        [program, "-m", model, "--port", str(port), "-t", "1", "-np", "1"], stdout=log, stderr=log
    )

    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(base + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    try:
        for _ in range(600):
            assert process.poll() is None, model.with_suffix(".log").read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(base + "/health", timeout=5):
                break
            time.sleep(0.1)
        yield post
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def test_llama_server_answers(exported: Path) -> None:
    with server(exported) as post:
        for question, answer in QUESTIONS.items():
            plain = {"prompt": question, "max_tokens": 3, "temperature": 0}
            assert post("/v1/completions", plain)["choices"][0]["text"].startswith(answer)
            chat = {"messages": [{"role": "user", "content": question}], "max_tokens": 3, "temperature": 0}
            message = post("/v1/chat/completions", chat)["choices"][0]["message"]
            assert message["content"].strip().startswith(answer.strip())


def test_server_and_model_split_text_in_the_same_way(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", byte_level())
    own = TextTokenizer.from_metadata(read_gguf(source).metadata)
    assert own is not None
    with server(export(source, tmp_path / "out.gguf").path) as post:
        for text in ("The quick brown fox, 12345!", "日本 é\n\n", "a</s>b"):
            assert post("/tokenize", {"content": text, "parse_special": True})["tokens"] == own.encode(text)
