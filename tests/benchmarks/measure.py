"""What the benchmarks share: medians of repeats taken in turns, and results as JSON lines and as a table."""

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """What a number depends on besides the code. load: processes that want a core, last minute's mean."""
    on_gpu = device.type == "cuda"
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if on_gpu else {}
    return {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1), "clock": clock(device), **gpu,
            "python": platform.python_version(), "torch": str(torch.__version__)}


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


def clock(device: torch.device) -> str:
    """CPU where one thread works: its own time, which other jobs on the machine hardly alter; else wall."""
    return "CPU" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def now(device: torch.device) -> float:
    """Seconds on `clock`, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if clock(device) == "CPU" else time.perf_counter()


def medians(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device, warm_up: bool = True
            ) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that a change in load hits them all.

    warm_up: call each once before, where the caller has not."""
    for call in calls.values() if warm_up else ():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before = now(device)
            call()
            seconds[name].append(now(device) - before)
    return {name: statistics.median(times) for name, times in seconds.items()}


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """p in time ~ size ** p: the slope of log time on log size, by least squares."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in times]).slope


def report(rows: Sequence[dict[str, Any]], **common: Any) -> None:
    """Prints each row as a line of JSON with what they have in common, then all as a markdown table."""
    for row in rows:
        print(json.dumps(row | common))
    names = dict.fromkeys(name for row in rows for name in row)
    print("\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(_cell(row.get(name)) for name in names) + " |")
    print(flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
