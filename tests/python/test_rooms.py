"""Rooms and the order of what may use what: no circle, no arrow against the rule of docs/design.md.

Includes and imports are read from the sources; an import inside a function counts, and so does one for types only.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Room of csrc -> rooms whose headers it may include besides its own. error.h is everybody's.
CSRC = {
    "quant": (),
    "numerics": (),
    "gguf": (),
    "codes": (),
    "kernels": ("numerics", "quant"),
    "threads": (),
    "model": ("quant", "numerics", "codes", "gguf"),
    "sampling": ("kernels", "numerics"),
    "cpu": ("model", "threads", "kernels", "quant", "gguf"),
    "cuda": ("model", "threads", "quant", "codes", "numerics", "gguf"),
    "engine": ("cpu", "cuda", "model", "sampling", "quant", "gguf"),
    "bindings": ("engine", "cpu", "threads", "model", "sampling", "quant", "codes", "gguf", "numerics"),
}
# The only file outside of cpu and sampling that sees kernels: it shows single ones to the tests.
SHOWS_KERNELS = "bindings/bind_kernels.cpp"
# What kernels of a GPU and products on tiles are compiled with for tests (tests/cuda, tests/kernels).
EMULATORS = {"simt_cpu.h", "emulated_amx.h"}


def first_circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A path that ends where it began, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for following in sorted(graph.get(node, ())):
            if circle := visit(following, [*path, node]):
                return circle
        done.add(node)
        return None

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), None)


def includes() -> dict[str, set[str]]:
    graph = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".inl", ".cu", ".cuh"):
            name = path.relative_to(ROOT / "csrc").as_posix()
            graph[name] = set(re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE)) - EMULATORS
    return graph


def test_csrc():
    graph = includes()
    assert first_circle(graph) is None
    against = []
    for name, included in graph.items():
        room = name.split("/")[0]
        for header in included - {"error.h"}:
            target = header.split("/")[0]
            allowed = target == room or target in CSRC.get(room, ())
            if not allowed and not (name == SHOWS_KERNELS and target == "kernels"):
                against.append(f"{name} includes {header}")
    assert against == []
    assert {name.split("/")[0] for name in graph} - {"error.h"} == set(CSRC)


def modules() -> dict[str, Path]:
    """Names as the installed package has them; its __init__ is the package's own name."""
    found = {}
    for folder, package in (("python/fixmin_cpp", "fixmin_cpp"), ("convert", "fixmin_cpp.convert")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: Iterable[str]) -> set[str]:
    """Modules of `known` that the module imports, anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return (found & set(known)) - {name}


# Floors, lowest first: a module or package imports from its own floor and from those below. What is missing here, the
# package itself and the two ways into the converter, stands above them all.
PYTHON = (
    {"_core", "errors", "progress", "atomic_file", "arguments"},
    {"fields", "json_schema", "tokenizer_growth", "tokenizer", "text", "constrain", "state", "recognise", "hub"},
    {"sampling_fields", "load_options", "serve_options", "generation_options"},
    {"generation", "running", "beam"},
    {"model"},
    {"evaluate", "hf", "lm_eval", "lm_eval_model", "benchmark", "inspect", "logs", "card"},
    {"convert", "quantization", "openai_api"},
    {"export"},
    {"batch_lines", "batch_output", "batch_work", "batch_ray", "batch", "serve", "compare"},
    {"api"},
    {
        "cli",
        "cli_app",
        "cli_compare",
        "cli_export",
        "cli_help",
        "cli_hub",
        "cli_options",
        "cli_output",
        "cli_session",
        "__main__",
    },
)
CONVERT = (
    {"spec", "fold"},
    {"overrides", "streaming", "checkpoint", "gguf_file"},
    {"observed", "stated"},
    {"resolve"},
    {"certify"},
    {"convert", "rewrap"},
    {"command_line"},
)
WAYS_IN = {"fixmin_cpp", "fixmin_cpp.convert", "fixmin_cpp.convert.hf_to_gguf"}


def imports() -> dict[str, set[str]]:
    found = modules()
    known = [*found, "fixmin_cpp._core"]
    return {name: imported(name, path, known) for name, path in found.items()}


def floor_of(name: str, package: str, floors: tuple[set[str], ...]) -> int:
    part = name.removeprefix(package + ".").split(".")[0]
    return next(i for i, floor in enumerate(floors) if part in floor)


def against(graph: dict[str, set[str]], package: str, floors: tuple[set[str], ...]) -> list[str]:
    inside = {name for name in graph if name.startswith(package + ".")} - WAYS_IN
    return [
        f"{name} imports {other}"
        for name in sorted(inside)
        for other in sorted(graph[name] & (inside | WAYS_IN | {"fixmin_cpp._core"}))
        if other in WAYS_IN or floor_of(other, package, floors) > floor_of(name, package, floors)
    ]


def test_python_and_converter():
    graph = imports()
    assert first_circle(graph) is None
    assert against(graph, "fixmin_cpp", PYTHON) == []
    inside = {name: others for name, others in graph.items() if name.startswith("fixmin_cpp.convert")}
    inside = {name: {o for o in others if o.startswith("fixmin_cpp.convert")} for name, others in inside.items()}
    assert against(inside, "fixmin_cpp.convert", CONVERT) == []


def test_no_private_name_of_a_model_is_used_elsewhere():
    """`model._x`, whatever the variable is called in which a Model lies: what model.py defines with an underscore."""
    tree = ast.parse((ROOT / "python/fixmin_cpp/model.py").read_text())
    model = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Model")
    private = {n.name for n in model.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    private |= {n.attr for n in ast.walk(model) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    private = {name for name in private if name.startswith("_") and not name.endswith("__")}
    assert private
    used = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in private and name != "fixmin_cpp.model":
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                if owner not in ("self", "cls") and not owner[:1].isupper():
                    used.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert used == []


def test_a_circle_and_an_arrow_upwards_are_found():
    assert first_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    graph = {"fixmin_cpp.model": {"fixmin_cpp.api"}, "fixmin_cpp.api": {"fixmin_cpp.model"}}
    assert against(graph, "fixmin_cpp", PYTHON) == ["fixmin_cpp.model imports fixmin_cpp.api"]
