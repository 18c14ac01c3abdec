"""Imports of the Python files that come with a checkpoint, and how they are forgotten.

They are compiled from their source every time. A `__pycache__` beside them is neither read nor written, and compiled
modules are not found: what runs is what whoever consented to it was shown, and the folder stays as it is.
"""

import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

__all__ = ["PACKAGE", "forget_modules", "import_package"]

PACKAGE = "fixmin_checkpoint_"  # and a number: the name of a checkpoint's package
_counter = itertools.count()
# Of the folders whose modules are not forgotten yet: their hook, what lies below them and is none of theirs, and the
# modules that were there before.
_hooks: dict[Path, tuple[Callable[[str], FileFinder], list[Path], set[str]]] = {}


class _FromSource(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)  # type: ignore[no-any-return]


def import_package(directory: Path) -> str:
    """Makes the directory importable as a package, whose name it returns, and its files by names without a dot too.

    The caller takes it off sys.path again.
    """
    root = directory.resolve()
    # What is on the path before the checkpoint's code runs, an environment in a project's folder, is not its own.
    libraries = [path for entry in sys.path if root in (path := Path(entry).resolve()).parents]
    present = set(sys.modules)
    package = ModuleType(f"{PACKAGE}{next(_counter)}")
    package.__path__ = [str(root)]
    package.__file__ = str(root / "__init__.py")
    sys.modules[package.__name__] = package
    sys.path.append(str(root))
    if root not in _hooks:

        def finder(path: str) -> FileFinder:
            if not _is_of(root, libraries, path):
                raise ImportError(f"{path} belongs to no checkpoint")  # the next hook is asked
            return FileFinder(path, (_FromSource, SOURCE_SUFFIXES))

        _hooks[root] = finder, libraries, present
        sys.path_hooks.insert(0, finder)
    _forget_finders(root, libraries)
    importlib.invalidate_caches()
    return package.__name__


def forget_modules(directory: Path) -> None:
    """What was imported from the directory, its subfolders too, is not there any more."""
    root = directory.resolve()
    if root not in _hooks:
        return
    hook, libraries, present = _hooks.pop(root)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name not in present and isinstance(file, str) and _is_of(root, libraries, file):
            del sys.modules[name]
    sys.path_hooks.remove(hook)
    _forget_finders(root, libraries)


def _is_of(root: Path, libraries: Sequence[Path], path: str) -> bool:
    """Whether a folder or file is the checkpoint's, by whatever spelling."""
    place = Path(path).resolve()
    return place.is_relative_to(root) and not any(place.is_relative_to(library) for library in libraries)


def _forget_finders(root: Path, libraries: Sequence[Path]) -> None:
    for path in [path for path in sys.path_importer_cache if _is_of(root, libraries, path)]:
        del sys.path_importer_cache[path]
