"""What other programs are told about an exported file: a Modelfile, and the lines that people type."""

import shlex
from pathlib import Path


def modelfile(gguf: Path, folder: Path, context: int) -> str:
    """Ollama's Modelfile for a file. folder: where the Modelfile is, from which a relative path counts."""
    name = f"./{gguf.name}" if gguf.parent.resolve() == folder.resolve() else str(gguf.resolve())
    return "\n".join(
        [
            f"FROM {name}",
            "# The prompt as it is: the model knows no roles.",
            'TEMPLATE "{{ .Prompt }}"',
            "# What the model was trained with; Ollama's own default may be more.",
            f"PARAMETER num_ctx {context}",
            "PARAMETER temperature 0",
            "",
        ]
    )


def lines(gguf: Path, context: int, modelfile_path: Path | None) -> dict[str, str]:
    """Program -> the command that runs, or imports, an exported file."""
    path, name = shlex.quote(str(gguf)), shlex.quote(gguf.stem.lower())
    whole = shlex.quote(str(gguf.resolve()))
    found = {
        "llama.cpp": f"llama-server -m {path} -c {context}",
        "LM Studio": f"lms import {path}    # or into a folder PUBLISHER/MODEL of its models",
        "Docker Model Runner": f"docker model package --gguf {whole} --context-size {context} {name}",
    }
    if modelfile_path is not None:
        found["Ollama"] = f"ollama create {name} -f {shlex.quote(str(modelfile_path))}"
    return found
