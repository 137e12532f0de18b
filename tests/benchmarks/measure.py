"""What the benchmarks share: medians of repeats taken in turns, and results as JSON lines and as a table."""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import STNet


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
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def clock(device: torch.device) -> str:
    """CPU where one thread works: its own time, which other jobs on the machine hardly alter; else wall."""
    return "CPU" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def now(device: torch.device) -> float:
    """Seconds on `clock`, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if clock(device) == "CPU" else time.perf_counter()


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until the device has done its work."""
    start = now(device)
    call()
    return now(device) - start


def medians(ways: dict[str, Callable[[], Any]], repeats: int, device: torch.device, warm_up: bool = True
            ) -> dict[str, float]:
    """Median seconds of each way. The ways take turns, so that a change in load hits them all.

    warm_up: call each once before, where the caller has not."""
    for call in ways.values() if warm_up else ():
        call()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            taken[name].append(seconds(call, device))
    return {name: statistics.median(times) for name, times in taken.items()}


def flops(dim: int, side: int) -> int:
    """Of one evaluation of ST-Net on a side x side image: 2 per multiply-add of products and convolutions."""
    net = STNet(dim).to("meta")
    image = torch.empty(1, 1, side, side, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image, torch.empty(1, device="meta"), image)
    return counter.get_total_flops()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the library's product of two large square matrices, the most that a network can hope for."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.rand(n, n, device=device).to(dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(13))  # the first warm up


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """p in time ~ size ** p: the slope of log time on log size, by least squares."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in times]).slope


def report(rows: Sequence[dict[str, Any]], **common: Any) -> None:
    """Prints each row as a line of JSON with what they have in common, then all as a markdown table."""
    for row in rows:
        print(json.dumps(row | common))
    names = list(rows[0])
    print("\n| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(_cell(row.get(name)) for name in names) + " |")
    print(flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
