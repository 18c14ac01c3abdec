"""The package with an emulated GPU."""

import subprocess
from collections.abc import Callable

import pytest
from emulation import EMULATED_GPU, package


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs Python with a fixmin_cpp whose GPU is emulated."""
    return package(tmp_path_factory.mktemp("site"), "emulated", *EMULATED_GPU)
