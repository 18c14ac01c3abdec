"""Tests of this folder run with teams of exactly n_threads, so that threads meet however small the model is."""

import pytest


@pytest.fixture(autouse=True)
def fixed_team(monkeypatch):
    monkeypatch.setenv("FIXMIN_TEAM", "fixed")
