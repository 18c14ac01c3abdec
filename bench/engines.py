"""What bench/compare.py compares: one `Engine` per line of the report, and how peers and their files are made.

Paths of models are relative to the folder of bench data (out/bench). An engine with an `environment` runs in the
virtual environment peers/<environment> there, the others in the project's own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Engine:
    name: str
    label: str
    kind: str  # a key of KINDS in bench/peers/worker.py
    model: str
    against: str  # the fixmin engine of the same bits per weight: what it is a ratio of
    product: str = "int8_vector_ops"  # the ceiling of its prefill
    environment: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # for the worker
    variables: dict[str, str] = field(default_factory=dict)  # of its environment
    most_decoded: int = 1 << 30  # tokens in a turn, for what would take minutes

    def files(self, data: Path) -> list[Path]:
        """What it reads from the disk."""
        path = data / self.model
        return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _fixmin(form: str, isa: str = "", **more: Any) -> Engine:
    name = f"fixmin-{form}-{isa}" if isa else f"fixmin-{form}"
    label = f"fixmin {form} ({isa})" if isa else f"fixmin {form}"
    variables = {"FIXMIN_ISA": isa} if isa else {}
    return Engine(name, label, "fixmin", f"full-{form}.gguf", name, variables=variables, **more)


def _llama(form: str, environment: str = "llama", **more: Any) -> Engine:
    isa = environment.partition("-")[2]
    against = f"fixmin-{form}-{isa}" if isa else f"fixmin-{form}"
    label = f"llama.cpp {form} ({isa} build)" if isa else f"llama.cpp {form}"
    return Engine(
        f"{environment}-{form}", label, "llama", f"neox/{form}.gguf", against, environment=environment, **more
    )


def _torch(name: str, label: str, against: str, product: str, most_decoded: int = 1 << 30, **options: Any) -> Engine:
    return Engine(name, label, "torch", "full", against, product, options=options, most_decoded=most_decoded)


_F16, _F32 = {"product": "bfloat16_product_ops"}, {"product": "float32_product_ops"}
_AVX512 = {"CT2_FORCE_CPU_ISA": "AVX512"}  # it takes AVX2 where it is not told

ENGINES: tuple[Engine, ...] = (
    _fixmin("q8_0"),
    _fixmin("w8a8"),
    _fixmin("q4_0"),
    _fixmin("q4_k_m"),
    _fixmin("f16", **_F16),
    _fixmin("f32", **_F32),
    _fixmin("q8_0", "avx2"),
    _fixmin("w8a8", "avx2"),
    _fixmin("q4_0", "avx2"),
    _llama("q8_0"),
    _llama("q4_0"),
    _llama("q4_k_m"),
    _llama("f16", **_F16),
    _llama("q8_0", "llama-avx2"),
    _llama("q4_0", "llama-avx2"),
    Engine("ik-q8_0", "ik_llama.cpp q8_0", "ik", "neox/q8_0.gguf", "fixmin-q8_0", environment="ik"),
    Engine("ik-q4_0", "ik_llama.cpp q4_0", "ik", "neox/q4_0.gguf", "fixmin-q4_0", environment="ik"),
    Engine("openvino-int8", "OpenVINO int8", "openvino", "neox/openvino-int8", "fixmin-q8_0", environment="openvino"),
    Engine("openvino-int4", "OpenVINO int4", "openvino", "neox/openvino-int4", "fixmin-q4_0", environment="openvino"),
    Engine(
        "ctranslate2-int8",
        "CTranslate2 int8",
        "ctranslate2",
        "neox/ctranslate2-int8",
        "fixmin-q8_0",
        environment="ctranslate2",
        options={"compute": "int8"},
        variables=_AVX512,
    ),
    _torch("torch-int8", "PyTorch int8 dynamic", "fixmin-q8_0", "int8_vector_ops", dtype="float32", int8=True),
    _torch("torch-bfloat16", "PyTorch bfloat16", "fixmin-f16", "bfloat16_product_ops", 24, dtype="bfloat16"),
    _torch("torch-float32", "PyTorch float32", "fixmin-f32", "float32_product_ops", 24, dtype="float32"),
    _torch(
        "torch-published", "PyTorch float32, no KV cache", "fixmin-f32", "float32_product_ops", 8,
        dtype="float32", cache=False,
    ),
)  # fmt: skip

# One of each family that is fast, at 8 bits where it can: sweeps over all of them would take an hour.
SWEPT = ("fixmin-q8_0", "llama-q8_0", "openvino-int8", "torch-bfloat16")

# The peers' environments: name of bench/peers/NAME.txt -> whether PyTorch is needed to make their files.
ENVIRONMENTS = {"llama": False, "llama-avx2": False, "ik": False, "openvino": True, "ctranslate2": True}


@dataclass(frozen=True)
class Step:
    """Makes `target` by a command; "{data}" stands for the data folder, "{bench}" for this one."""

    target: str
    needs: tuple[str, ...]
    command: tuple[str, ...]  # after the Python of the environment
    environment: str = ""


def _export(form: str, target: str) -> Step:
    return Step(
        target, ("full",), ("{bench}/export_gptneox.py", "{data}/full", f"{{data}}/{target}", "--outtype", form)
    )


def _convert(environment: str, source: str, target: str, form: str) -> Step:
    script, peer = "{bench}/peers/convert.py", environment
    return Step(target, (source,), (script, peer, f"{{data}}/{source}", f"{{data}}/{target}", form), environment)


def _own(form: str) -> Step:
    target = f"full-{form}.gguf"
    # Files of the reference model say everything: its code need not run.
    command = ("-m", "fixmin_cpp.cli", "convert", "{data}/full", "-o", f"{{data}}/{target}", "--outtype", form)
    return Step(target, ("full",), command)


# In the order of their needs. The first ones are all that `make bench` needs to compare with PyTorch.
OWN_STEPS = (
    Step("full", (), ("{bench}/make_checkpoint.py", "{data}/full", "--variant", "affine")),
    *(_own(form) for form in ("f32", "f16", "q8_0", "w8a8", "q4_0")),
    Step(
        "full-q4_k_m.gguf",
        ("full-f32.gguf",),
        ("-m", "fixmin_cpp.cli", "quantize", "{data}/full-f32.gguf", "{data}/full-q4_k_m.gguf", "q4_k_m"),
    ),
)
PEER_STEPS = (
    *(_export(form, f"neox/{form}.gguf") for form in ("f16", "q8_0", "q4_0")),
    _export("hf", "neox/hf"),
    _convert("llama", "neox/f16.gguf", "neox/q4_k_m.gguf", "q4_k_m"),
    _convert("openvino", "neox/hf", "neox/openvino-int8", "int8"),
    _convert("openvino", "neox/hf", "neox/openvino-int4", "int4"),
    _convert("ctranslate2", "neox/hf", "neox/ctranslate2-int8", "int8"),
)
