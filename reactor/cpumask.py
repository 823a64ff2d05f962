"""Sets of CPUs: written as masks or lists, checked against what there is, and claimed.

A mask is hexadecimal with or without ``0x`` and of any width: ``3`` and ``0x3`` are CPUs 0 and 1.
What has a dash, a comma or brackets is a list: ``0-3,7``, ``[0,2]``; ``[3]`` is CPU 3.
"""

import os
import re
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from functools import partial

from reactor.lockfile import LockFile
from reactor.vault import NoVault

KEY = "cpu/"  # with its number: where the vault has the claim on a CPU
LOCK_DIR = "/var/tmp"  # of the machine, writable by every user, as SPDK's own CPU locks
MAX_CPU = 65535  # above any kernel's NR_CPUS; keeps a mistyped range from filling memory

_MASK = re.compile(r"(?:0[xX])?([0-9a-fA-F]+)")
_RANGE = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")


def available() -> list[int]:
    """Return the CPUs that this process may run on: its affinity, which a cpuset bounds."""
    return sorted(os.sched_getaffinity(0))


def parse(text: str, available: Collection[int]) -> list[int]:
    """Return the CPUs that ``text`` names, ascending.

    Raises ValueError that says what is wrong, or which CPUs are not in ``available``.
    """
    stripped = text.strip()
    if not stripped:
        raise ValueError("CPU mask is empty; give a mask such as 0x3 or a list such as 0-3,7")
    cpus = _parse_list(stripped) if re.search(r"[-,\[\]]", stripped) else _parse_mask(stripped)
    if missing := cpus - set(available):
        plural = "s" if len(missing) > 1 else ""
        raise ValueError(
            f"CPU{plural} {format_list(missing)} of {stripped!r} not available to this process; "
            f"available: {format_list(available)}"
        )
    return sorted(cpus)


def format_mask(cpus: Iterable[int]) -> str:
    """Return the mask of ``cpus``: CPUs 0 and 1 are "0x3"."""
    return hex(sum(1 << cpu for cpu in set(cpus)))


def format_list(cpus: Iterable[int]) -> str:
    """Return ``cpus`` as a list with ranges: "0-3,7"; "none" if there are none."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    texts = (f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
    return ",".join(texts) or "none"


def claim(
    cpus: Iterable[int],
    owner: str,
    directory: str | os.PathLike[str] = LOCK_DIR,
    vault: NoVault | None = None,
) -> ExitStack:
    """Claim CPUs for this process and return what releases them when it is closed.

    The claim holds against every process of the machine that sees ``directory``, whatever its user.
    It ends with this process, or with the ``vault`` that has it, too, as reactors do.

    Raises reactor.lockfile.InUse, which names the CPU and the pid that has it; then nothing is
    claimed.
    """
    with ExitStack() as stack:
        for cpu in sorted(set(cpus)):
            path = os.path.join(directory, f"vhost-reactor-cpu-{cpu}.lock")
            kept = None if vault is None else vault.inherit(f"{KEY}{cpu}")
            if kept is not None and kept.data.decode() == path:
                lock = LockFile.inherit(kept.fds.take(0), path, owner)
            else:
                lock = LockFile(path, f"CPU {cpu}", owner, shared_between_users=True)
            stack.enter_context(lock)
            if vault is not None:
                vault.put(f"{KEY}{cpu}", partial(_entry, lock))
        return stack.pop_all()


def _entry(lock: LockFile) -> tuple[bytes, list[int]]:
    return lock.path.encode(), [lock.fileno()]


def _parse_mask(text: str) -> set[int]:
    found = _MASK.fullmatch(text)
    if found is None:
        raise ValueError(f"CPU mask {text!r:.100} is not hexadecimal")
    digits = found[1].lstrip("0")
    if len(digits) * 4 > MAX_CPU:
        raise ValueError(f"CPU mask is too wide: CPUs go up to {MAX_CPU}")
    if not digits:
        raise ValueError(f"CPU mask {text!r:.100} has no CPU in it")
    return {cpu for cpu, bit in enumerate(reversed(bin(int(digits, 16))[2:])) if bit == "1"}


def _parse_list(text: str) -> set[int]:
    if text.startswith("[") != text.endswith("]"):
        raise ValueError(f"CPU list {text!r:.100} has an unmatched bracket")
    inner = text[1:-1] if text.startswith("[") else text
    if not inner.strip():
        raise ValueError(f"CPU list {text!r} has no CPU in it")
    cpus: set[int] = set()
    for part in inner.split(","):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise ValueError(
                f"CPU list {text!r:.100}: {part.strip()!r:.100} is neither a CPU nor a range"
            )
        first, last = _number(found[1]), _number(found[2] or found[1])
        if first > last:
            raise ValueError(f"CPU list {text!r:.100}: range {part.strip()} is reversed")
        cpus.update(range(first, last + 1))
    return cpus


def _number(digits: str) -> int:
    significant = digits.lstrip("0") or "0"
    if len(significant) > len(str(MAX_CPU)) or int(significant) > MAX_CPU:
        raise ValueError(f"CPU {significant:.20} is out of range: CPUs go up to {MAX_CPU}")
    return int(significant)
