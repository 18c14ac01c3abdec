"""Ten thousand short requests that are cancelled, timed out or left at random: none stays, no memory is kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.slow
def test_ten_thousand_requests(model_path):
    run = subprocess.run([sys.executable, SOAK, model_path, "10000"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    result = json.loads(run.stdout)
    stats, resident = result["stats"], result["resident_kib"][1:]  # the first tenth also starts threads and caches
    assert stats["n_running"] == stats["n_waiting"] == 0
    assert stats["n_free_blocks"] + stats["n_cached_blocks"] == stats["n_blocks"]
    assert stats["n_evictable_blocks"] == stats["n_cached_blocks"]
    assert stats["n_finished"] > 8000  # streams of which nothing was read never began
    assert max(resident) <= 1.02 * min(resident)
