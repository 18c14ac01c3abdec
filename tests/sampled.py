"""Many cases like one another: `make test` takes some of them, `make test-all` the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], step: int) -> list[Any]:
    """Cases for parametrize, with all but every `step`-th marked slow."""
    return [case if i % step == 0 else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]
