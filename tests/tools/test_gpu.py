"""The script for machines with a GPU: what it reads of NVIDIA's tools, and a trial of all of it on the emulator."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu import SMALL, Machine, Report
from gpu_report import hottest, last_json, markdown, ncu_rows, sanitizer_summary

ROOT = Path(__file__).resolve().parents[2]

NCU = """==PROF== Connected to process 411 (/usr/bin/python3.12)
==PROF== Profiling "few_q8_0": 0%....50%....100% - 1 pass
{}
==PROF== Disconnected from process 411
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","411","python3.12","127.0.0.1","few_q8_0","1","13","(128, 1, 1)","(64, 1, 1)","0","9.0","Command line profiler \
metrics","gpu__time_duration.sum","ns","5,120"
"0","411","python3.12","127.0.0.1","few_q8_0","1","13","(128, 1, 1)","(64, 1, 1)","0","9.0","Command line profiler \
metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","41.5"
"1","411","python3.12","127.0.0.1","norm","1","13","(256, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler metrics",\
"gpu__time_duration.sum","ns","2048"
"2","411","python3.12","127.0.0.1","norm","1","13","(256, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler metrics",\
"gpu__time_duration.sum","ns","n/a"
"""


def test_summaries_of_the_sanitizers():
    clean = "========= COMPUTE-SANITIZER\n{}\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer_summary(clean) == (0, "ERROR SUMMARY: 0 errors")
    assert sanitizer_summary("=========\n========= ERROR SUMMARY: 12 errors\n")[0] == 12
    assert sanitizer_summary("========= ERROR SUMMARY: 1 error\n========= ERROR SUMMARY: 0 errors\n")[0] == 1
    race = "========= RACECHECK SUMMARY: {} displayed ({} errors, 0 warnings)\n"
    assert sanitizer_summary(race.format("0 hazards", 0))[0] == 0
    assert sanitizer_summary(race.format("1 hazard", 1))[0] == 1
    with pytest.raises(ValueError, match="no summary"):
        sanitizer_summary("========= Error: Device not supported\n")


def test_tables_of_the_profiler():
    rows = ncu_rows(NCU)
    assert [row["Kernel Name"] for row in rows] == ["few_q8_0", "norm", "norm"]
    assert rows[0]["gpu__time_duration.sum"] == 5120
    assert rows[0]["dram__throughput.avg.pct_of_peak_sustained_elapsed"] == 41.5
    assert rows[2]["gpu__time_duration.sum"] == "n/a"
    assert hottest(rows, 1) == [("few_q8_0", 5120, 1)]
    assert hottest(rows, 3)[1] == ("norm", 2048, 2)
    with pytest.raises(ValueError, match="no table"):
        ncu_rows("==ERROR== ERR_NVGPUCTRPERM")


def test_a_process_that_takes_too_long_is_stopped(tmp_path):
    machine = Machine(Report(tmp_path, SMALL, False), tmp_path, "cuda")
    with pytest.raises(RuntimeError, match="stopped after 1 s"):
        machine.python("-c", "import time; time.sleep(600)", limit_s=1)
    assert machine.running == set()


def test_what_a_process_started_is_stopped_with_it(tmp_path):
    machine = Machine(Report(tmp_path, SMALL, False), tmp_path, "cuda")
    pid, done = tmp_path / "pid", tmp_path / "done"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); os.rename({str(pid)!r}, {str(done)!r})"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child + '; time.sleep(600)'!r}])"
    machine.start(sys.executable, "-c", parent)
    while not done.exists():
        time.sleep(0.05)
    machine.stop_all()
    stat = Path(f"/proc/{done.read_text()}/stat")
    while stat.exists() and ") Z " not in stat.read_text():  # a zombie, where nobody waits for it
        time.sleep(0.05)
    assert machine.running == set()


def test_a_step_that_fails_and_one_without_time_are_reported(tmp_path):
    report = Report(tmp_path, SMALL, False)
    assert report.step("first", lambda: 1 / 0) is None
    report.step("bits", lambda: {"cases": 3, "differ": ["Q8_0"]})
    report.begin -= 600
    assert report.step("late", lambda: pytest.fail("it ran")) is None
    said = (tmp_path / "gpu.md").read_text()
    assert "ZeroDivisionError" in said
    assert "bits differ from the CPU's: ['Q8_0']" in said
    assert "skipped" in markdown(report.steps, report.sizes, False)
    assert last_json('warning\n{"a": 1}\n{"a": 2}\n') == {"a": 2}


CHECKER = """#!/bin/sh
# Runs the program as compute-sanitizer does, and ends as it does.
while [ "$1" != PYTHON ]; do shift; done
"$@" || exit
echo "========= ERROR SUMMARY: 0 errors"
"""

PROFILER = """#!/bin/sh
while [ "$1" != PYTHON ]; do shift; done
"$@" || exit
cat "$(dirname "$0")/table"
"""


@pytest.mark.external
@pytest.mark.slow
def test_everything_on_the_emulator(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "table").write_text(NCU.replace('"n/a"', '"1024"'))
    for name, text in (("compute-sanitizer", CHECKER), ("ncu", PROFILER)):
        (tools / name).write_text(text.replace("PYTHON", sys.executable))
        (tools / name).chmod(0o755)
    work = ROOT / "build" / "tests" / "gpu"  # stays: a second run compiles only what has changed
    done = subprocess.run(
        [sys.executable, "tools/gpu.py", "--emulated", "--work", work, tmp_path / "out"],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]
    assert {name: step for name, step in steps.items() if "found" not in step} == {}
    assert steps["same bits q8_0"]["found"]["runs"] > 60
    assert len([r for r in steps["PyTorch"]["found"]["records"] if "tok_s" in r]) == 2 * 2 * 4
    said = (tmp_path / "out" / "gpu.md").read_text()
    assert "A trial on an emulated GPU" in said
    for shown in (
        "| fixmin q8_0 |",
        "| fixmin q8_0, persistent |",
        "| PyTorch bfloat16, CUDA graph |",
        "ERROR SUMMARY: 0 errors",
        "| few_q8_0 |",
    ):
        assert shown in said
