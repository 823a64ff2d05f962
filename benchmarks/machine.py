"""Facts about the machine and the software, without which figures mean nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = ("pyzmq", "msgpack", "msgspec", "cffi")
PROGRAMS = ("gcc", "qemu-storage-daemon", "fio", "valgrind")


def facts() -> dict[str, Any]:
    """Return what may explain a figure: processor, kernel, versions, load."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "virtual": " hypervisor " in f" {_cpuinfo('flags')} ",
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "none",
        "mitigations": _mitigations(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        **{name: metadata.version(name) for name in LIBRARIES},
        **{name: _version(name) for name in PROGRAMS},
    }


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _read(path: str) -> str:
    """Return a line of sysfs; nothing if this system has no such file."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _mitigations() -> dict[str, str]:
    """Return what the kernel does against faults of the processor."""
    folder = Path("/sys/devices/system/cpu/vulnerabilities")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: _read(str(path)) for path in found}


def _version(program: str) -> str:
    """Return the first line of what a program says of its version; nothing if it is not there."""
    path = shutil.which(program)
    if path is None:
        return ""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return next(iter(done.stdout.splitlines()), "")
