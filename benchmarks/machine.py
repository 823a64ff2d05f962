"""Facts about the machine and the software, without which figures mean nothing."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = ("pyzmq", "msgpack", "msgspec", "cffi")


def facts() -> dict[str, Any]:
    """Return what may explain a figure: processor, kernel, versions, load."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "virtual": " hypervisor " in f" {_cpuinfo('flags')} ",
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median and extremes of the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
