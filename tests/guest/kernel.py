"""The guest's kernel: Debian's cloud kernel, unpacked from its package into a cache.

The package is whatever ``linux-image-cloud-amd64`` depends on when it is first needed; no version
is named here. None of this needs root.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

META_PACKAGE = "linux-image-cloud-amd64"
_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")


class KernelError(RuntimeError):
    """There is no kernel to boot; the message says what to do."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    image: Path  # bzImage
    modules: Path  # lib/modules/VERSION

    def load_order(self, *names: str) -> list[Path]:
        """Return the files of modules ``names`` and of what they need, in the order to load them.

        What is built in is left out. KernelError if a module is neither there nor built in.
        """
        files = {
            _module_name(path): path
            for path in self.modules.rglob("*.ko*")
            if path.name.endswith((".ko", ".ko.xz", ".ko.gz"))
        }
        built_in = {
            _module_name(Path(line))
            for line in (self.modules / "modules.builtin").read_text().splitlines()
        }
        ordered: dict[str, Path] = {}

        def visit(name: str) -> None:
            if name in ordered or name in built_in:
                return
            if name not in files:
                raise KernelError(f"no module {name} in {self.modules}, nor is it built in")
            for needed in depends(read_module(files[name])):
                visit(needed)
            ordered[name] = files[name]

        for name in names:
            visit(name.replace("-", "_"))
        return list(ordered.values())


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """Return a module as insmod takes it, whichever way the distribution compressed it."""
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    return gzip.decompress(content) if path.suffix == ".gz" else content


def depends(module: bytes) -> list[str]:
    """Return the names in the ``depends=`` entry of a module's .modinfo section.

    The package has no modules.dep: that is written when a package is installed.
    """
    found = _DEPENDS.search(module)
    return (
        [name.decode().replace("-", "_") for name in found[1].split(b",") if name] if found else []
    )


def cache_directory() -> Path:
    """Return where kernels are kept: $GUEST_CACHE, or vhost-reactor/guest in the user's cache."""
    chosen = os.environ.get("GUEST_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vhost-reactor" / "guest"


def get() -> Kernel:
    """Return the cached kernel; download and unpack it first if there is none."""
    cache = cache_directory()
    kept = sorted(cache.glob("linux-image-*"))
    if kept:
        return _open(kept[-1])
    cache.mkdir(parents=True, exist_ok=True)
    package = _package_name()
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unpack-") as scratch:
        unpacked = Path(scratch) / "root"
        _run(["apt-get", "download", "-q", package], cwd=scratch)
        (archive,) = Path(scratch).glob("*.deb")
        _run(["dpkg", "-x", str(archive), str(unpacked)])
        try:
            unpacked.rename(cache / package)
        except OSError:
            if not (cache / package).exists():  # else another run was faster
                raise
    return _open(cache / package)


def _open(root: Path) -> Kernel:
    images = list(root.glob("boot/vmlinuz-*"))
    # With merged /usr, from Debian 13 on, the package has its modules in /usr/lib.
    modules = [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]
    if len(images) != 1 or len(modules) != 1:
        raise KernelError(f"{root} does not hold one kernel and its modules; remove it to retry")
    return Kernel(images[0], modules[0])


def _package_name() -> str:
    if shutil.which("apt-get") is None:
        raise KernelError("the guest's kernel is fetched with apt-get, which is not there")
    listing = _run(["apt-cache", "depends", META_PACKAGE])
    names = re.findall(r"Depends: (linux-image-\d\S+)", listing)
    if not names:
        raise KernelError(f"apt knows no {META_PACKAGE}: run apt-get update")
    return str(names[0])


def _run(command: list[str], cwd: str | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip() or done.stdout.strip()
        raise KernelError(f"{' '.join(command)} failed: {why}")
    return done.stdout


if __name__ == "__main__":
    print(get().image)
