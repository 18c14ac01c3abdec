"""The package as Atheris can watch it, and the run of a fuzzer in Python."""

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def _plain(folder: Path) -> None:
    """Makes the package importable from a folder: what an editable installation's loader loads Atheris does not see."""
    import fixmin_cpp
    import fixmin_cpp.convert
    import fixmin_cpp.reference
    from fixmin_cpp import _core

    package = folder / "fixmin_cpp"
    package.mkdir()
    rooms = [Path(room.__file__).parent for room in (fixmin_cpp.convert, fixmin_cpp.reference)]
    for source in {*Path(fixmin_cpp.__file__).parent.iterdir(), *rooms, Path(_core.__file__)}:
        (package / source.name).symlink_to(source)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fixmin_cpp" and name != _core.__name__]:
        del sys.modules[name]  # the native part is loaded once
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__.lower()]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirect" not in type(finder).__name__]
    sys.path.insert(0, str(folder))


def fuzz(make: Callable[[], Callable[[bytes], None]], *modules: str) -> None:
    """Fuzzes what `make` makes, with sys.argv's options; `modules` are imported, and with all they import watched."""
    import atheris

    with tempfile.TemporaryDirectory(prefix="fixmin-plain-") as folder:
        _plain(Path(folder))
        with atheris.instrument_imports(include=["fixmin_cpp"]):
            for module in modules:
                importlib.import_module(module)
        atheris.Setup(sys.argv, make())
        atheris.Fuzz()
