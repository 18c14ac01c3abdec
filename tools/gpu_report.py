"""What the tools of NVIDIA print, read; and the report of tools/gpu.py as Markdown."""

import csv
import json
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

#: What fixmin is to reach on an H100, and by which measure.
AIMS = {"decode": 2000.0, "prefill 512": 100_000.0, "batch": 30_000.0}
LOAD_AIM_S = 1.0


def sanitizer_summary(output: str) -> tuple[int, str]:
    """Errors that compute-sanitizer has counted, and its own words. ValueError if it printed no summary.

    memcheck, initcheck and synccheck end with "========= ERROR SUMMARY: 0 errors", racecheck with
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"; of several processes each has one.
    """
    lines = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard).*)", output)
    if not lines:
        raise ValueError(f"no summary in {output[-1000:]!r}")
    return sum(int(count) for _, count in lines), "; ".join(dict.fromkeys(text for text, _ in lines))


def ncu_rows(output: str) -> list[dict[str, Any]]:
    """{"Kernel Name", "ID", metric: number ...} of each launch, from `ncu --csv --print-units base --metrics ...`.

    The program's own lines and those of ncu ("==PROF== ...") stand before the header, which begins with "ID".
    """
    lines = output.split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"no table in {output[-1000:]!r}")
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        launch = launches.setdefault(row["ID"], {"ID": row["ID"], "Kernel Name": row["Kernel Name"]})
        try:
            launch[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
        except ValueError:
            launch[row["Metric Name"]] = row["Metric Value"]  # "n/a"
    return list(launches.values())


def nanoseconds(launch: dict[str, Any]) -> float:
    time_of_it = launch.get("gpu__time_duration.sum")
    return time_of_it if isinstance(time_of_it, float) else 0.0


def hottest(rows: Iterable[dict[str, Any]], n: int) -> list[tuple[str, float, int]]:
    """Kernels with the most time: name, nanoseconds of all launches, launches."""
    total: dict[str, list[float]] = {}
    for row in rows:
        total.setdefault(row["Kernel Name"].split("(")[0], []).append(nanoseconds(row))
    return sorted(((k, sum(v), len(v)) for k, v in total.items()), key=lambda one: -one[1])[:n]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(shown(cell) for cell in row) + " |" for row in cells] + [""]


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"
    return "-" if value is None else str(value).replace("|", "/").replace("\n", " ")


def speeds(steps: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Tokens per second: {engine: {measure: tok/s}}."""
    found = {}
    for name, step in steps.items():
        if name.startswith("speed ") and isinstance(step.get("found"), dict):
            found[f"fixmin {name.removeprefix('speed ')}"] = step["found"]
    for record in (steps.get("PyTorch", {}).get("found") or {}).get("records", []):
        if "tok_s" in record:
            found.setdefault(f"PyTorch {record['variant']}", {})[record["what"]] = record["tok_s"]
    return found


def speed_tables(steps: dict[str, Any], sizes: dict[str, Any]) -> list[str]:
    found = speeds(steps)
    if not found:
        return []
    measures = ["decode", *(f"prefill {n}" for n in sizes["prefill"]), "batch"]
    lines = ["## Speed", "", "Tokens per second, medians.", ""]
    rows = [[engine, *(of.get(measure) for measure in measures)] for engine, of in found.items()]
    lines += table(["engine", *measures], [*rows, ["aim on an H100", *(AIMS.get(m) for m in measures)]])
    best = {m: max((of[m] for e, of in found.items() if e[0] == "P" and m in of), default=None) for m in measures}
    ratios = [
        [engine, *(of[m] / best[m] if m in of and best[m] else None for m in measures)]
        for engine, of in found.items()
        if engine[0] == "f"
    ]
    lines += ["Times the fastest of PyTorch's:", "", *table(["engine", *measures], ratios)]
    lines += [
        f"decode: {sizes['new']} tokens one by one after {sizes['depth']}; prefill N: a prompt of N tokens to the "
        f"logits of the last; batch: steps of {sizes['sequences']} sequences, contexts of "
        f"{sizes['context'] - sizes['new']} to {sizes['context']}. PyTorch's graphs are "
        'torch.compile(mode="reduce-overhead") with a cache of fixed length, eager is the reference model; random '
        "weights of the same shape. llama.cpp is not among them: it cannot read these models.",
        "",
    ]
    return lines + ceilings(steps)


def ceilings(steps: dict[str, Any]) -> list[str]:
    rows = []
    for name, step in steps.items():
        bench = (
            step["found"].get("bench") if name.startswith("speed ") and isinstance(step.get("found"), dict) else None
        )
        if bench:
            loads = (steps.get(name.replace("speed", "load").split(",")[0], {}).get("found") or {}).items()
            rows.append(
                [
                    name.removeprefix("speed "),
                    bench["read_ceiling_gb_s"],
                    bench["decode_bytes_per_token"] / 1e6,
                    100 * bench["decode_roofline"],
                    bench["int8_peak_tops"],
                    100 * bench["prefill_peak_fraction"],
                    bench["launch_us"],
                    ", ".join(f"{shown(value)} s {key.removesuffix('_s')}" for key, value in loads),
                ]
            )
    header = [
        "file",
        "read GB/s",
        "MB a token",
        "decode: % of it",
        "int8 TOPS",
        "prefill: % of it",
        "launch us",
        "load",
    ]
    return ["What the device can do, measured in the same run:", "", *table(header, rows)] if rows else []


def kernel_tables(steps: dict[str, Any]) -> list[str]:
    found = steps.get("hottest kernels", {}).get("found")
    if not isinstance(found, dict):
        return []
    total = found["total_ns"] or 1.0
    lines = ["## Hottest kernels", "", "A prompt and a few steps under ncu, whose launches do not overlap.", ""]
    lines += table(
        ["kernel", "launches", "µs", "% of all"],
        [[name, n, ns / 1000, 100 * ns / total] for name, ns, n in found["hottest"]],
    )
    if found["details"]:
        metrics = [key for key in found["details"][0] if key not in ("ID", "Kernel Name")]
        rows = [[row["Kernel Name"], *(row.get(metric) for metric in metrics)] for row in found["details"]]
        lines += table(["launch", *metrics], rows)
    return lines


def outcome(step: dict[str, Any]) -> str:
    if "failed" in step:
        return f"**failed**: {step['failed'][:300]}"
    if "skipped" in step:
        return f"skipped: {step['skipped']}"
    found = step["found"]
    if isinstance(found, dict) and "differ" in found:
        counts = ", ".join(f"{value} {key}" for key, value in found.items() if isinstance(value, int))
        return f"{counts}, bits: {'as on the CPU' if not found['differ'] else 'DIFFER'}"
    return found[:300] if isinstance(found, str) else "done"


def markdown(steps: dict[str, Any], sizes: dict[str, Any], trial: bool) -> str:
    lines = ["# What a GPU showed", "", f"Made by `make gpu`, {time.strftime('%d %B %Y')}.", ""]
    if trial:
        lines += ["**A trial on an emulated GPU: only whether the script runs can be seen here.**", ""]
    if isinstance(machine := steps.get("machine", {}).get("found"), dict):
        lines += table(["machine", ""], machine.items())
    lines += speed_tables(steps, sizes)
    lines += ["## Steps", ""]
    lines += table(["step", "seconds", "outcome"], [[n, s.get("seconds"), outcome(s)] for n, s in steps.items()])
    lines += kernel_tables(steps)
    for record in (steps.get("PyTorch", {}).get("found") or {}).get("records", []):
        if "failed" in record:
            lines += [f"PyTorch, {record['variant']}, {record['what']}: {record['failed'][:300]}", ""]
    failed = {name: step["failed"] for name, step in steps.items() if "failed" in step}
    for name, text in failed.items():
        lines += [f"## Failed: {name}", "", "```", text, "```", ""]
    lines += ["Everything that was found, as JSON, is in gpu.json.", ""] if steps else []
    return "\n".join(lines)


def last_json(output: str) -> Any:
    """The last line that is JSON."""
    for line in reversed(output.strip().split("\n")):
        if line.startswith(("{", "[")):
            return json.loads(line)
    raise ValueError(f"no JSON in {output[-1000:]!r}")
