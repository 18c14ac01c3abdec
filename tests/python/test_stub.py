"""_core.pyi says what the native module has: the same names, and for every function the same parameters."""

import ast
import builtins
import re
from pathlib import Path

import pytest

from fixmin_cpp import _core

STUB = Path(_core.__file__).with_name("_core.pyi")
if not STUB.exists():  # an editable install keeps the native module elsewhere
    STUB = Path(__file__).parents[2] / "python" / "fixmin_cpp" / "_core.pyi"
TREE = ast.parse(STUB.read_text())
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}


def stub_names(body: list[ast.stmt]) -> set[str]:
    """Functions, classes and annotated names of a module or class body."""
    names = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return names | {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def native_names(item: object) -> set[str]:
    """Names that a class or module defines itself, without Python's own machinery."""
    own = {name for name in vars(item) if not name.startswith("_")}
    # A class that Python cannot construct has an __init__ too, but not one with a signature.
    constructor = vars(item).get("__init__") if isinstance(item, type) else None
    return own | ({"__init__"} if (getattr(constructor, "__doc__", None) or "").startswith("__init__(") else set())


def split_top_level(text: str) -> list[str]:
    """Splits at commas that no bracket encloses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def native_parameters(docstring: str) -> list[tuple[str, bool]]:
    """(name, has a default) of the parameters in the signature that pybind11 writes, "*" included, self left out."""
    match = re.match(r"\w+\((.*)\)(?: -> .*)?$", docstring.splitlines()[0])
    assert match, docstring
    parameters = []
    for part in split_top_level(match[1]):
        name = part.split(":")[0].strip()
        if name != "self":
            parameters.append((name, " = " in part))
    return parameters


def stub_parameters(function: ast.FunctionDef) -> list[tuple[str, bool]]:
    arguments = function.args
    first_default = len(arguments.args) - len(arguments.defaults)
    parameters = [(a.arg, i >= first_default) for i, a in enumerate(arguments.args) if a.arg != "self"]
    if arguments.kwonlyargs:
        parameters.append(("*", False))
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        parameters += [(a.arg, default is not None) for a, default in pairs]
    if arguments.kwarg:
        parameters.append((f"**{arguments.kwarg.arg}", False))
    return parameters


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every function and method of the stub, with its dotted name; properties are not called."""
    found = [(n.name, n) for n in TREE.body if isinstance(n, ast.FunctionDef)]
    for name, node in CLASSES.items():
        for member in node.body:
            is_property = isinstance(member, ast.FunctionDef) and any(
                isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list
            )
            if isinstance(member, ast.FunctionDef) and not is_property:
                found.append((f"{name}.{member.name}", member))
    return found


def test_module_has_what_the_stub_says_and_nothing_else():
    assert stub_names(TREE.body) - {"__version__"} == native_names(_core)
    assert isinstance(_core.__version__, str)


@pytest.mark.parametrize("name", CLASSES)
def test_class_has_what_the_stub_says_and_nothing_else(name):
    native = getattr(_core, name)
    if issubclass(native, Exception):
        bases = [getattr(_core, base.id, None) or getattr(builtins, base.id) for base in CLASSES[name].bases]
        assert native.__bases__ == tuple(bases)
    else:
        assert stub_names(CLASSES[name].body) == native_names(native)


@pytest.mark.parametrize(("name", "function"), functions(), ids=lambda value: value if isinstance(value, str) else "")
def test_parameters_are_those_of_the_stub(name, function):
    item = _core
    for part in name.split("."):
        item = getattr(item, part)
    assert native_parameters(item.__doc__) == stub_parameters(function)
