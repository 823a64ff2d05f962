"""Keys of encrypted disks: ``accel_crypto_key_*``, as SPDK calls them.

A key comes from a file, is kept in memory that Python does not look at (bdev/crypto_key.h), and is
saved as the path that it came from.
"""

import errno
import os
import stat
from typing import Any

from bdev.kind import EINVAL
from bdev.parameters import check_name
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.native import lib
from reactor.operations import operation

CIPHER, TWEAK_MODE = "AES_XTS", "SIMPLE_LBA"

_WRONG = {
    errno.EBADMSG: "has something that is no hexadecimal digit",
    errno.EMSGSIZE: "must have 64 hexadecimal digits (AES-128) or 128 (AES-256): both keys of XTS",
    errno.EKEYREJECTED: "both halves are the same; make another one with openssl rand -hex 64",
}


class CryptoKey:
    """A key in a memfd, which is lent to reactors; ``users`` are names of devices."""

    def __init__(self, name: str, path: str) -> None:
        self.name = check_name(name)
        self.path = path
        self.users: set[str] = set()
        self.fd = os.memfd_create("crypto-key", os.MFD_CLOEXEC)
        try:
            self.bits = _read(path, self.fd) * 4  # half of the bytes are the tweak's key
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Wipe it, in reactors that have not read it yet, too."""
        lib.crypto_key_wipe(self.fd)
        os.close(self.fd)


def _read(path: str, to: int) -> int:
    """Store the key in a file; return its length in bytes. OperationError if it is not one."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise OperationError(-(error.errno or errno.EIO), f"{path}: {error.strerror}") from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode) and mode & 0o077:
            raise OperationError(
                -errno.EPERM,
                f"{path}: has mode {stat.S_IMODE(mode):04o}, so that others can read or change "
                "the key: chmod 600",
            )
        length = lib.crypto_key_read(fd, to)
    finally:
        os.close(fd)
    if length < 0:
        raise OperationError(EINVAL, f"{path}: {_WRONG.get(-length, os.strerror(-length))}")
    return length


class CryptoKeys:
    """The keys that there are, and ``accel_crypto_key_*``."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._keys: dict[str, CryptoKey] = {}
        registry.add_settings(self._settings)
        registry.at_end(self._close_all)

    def find(self, name: str) -> CryptoKey:
        """Return a key; OperationError(-2) if there is none of that name."""
        if name not in self._keys:
            raise OperationError(-errno.ENOENT, f"crypto key {name!r:.80}: there is none")
        return self._keys[name]

    @operation
    def accel_crypto_key_create(
        self,
        name: str,
        key_file: str | None = None,
        cipher: str = CIPHER,
        tweak_mode: str = TWEAK_MODE,
        key: str | None = None,
        key2: str | None = None,
    ) -> bool:
        """Read a key from ``key_file``: both halves for AES-XTS, in hexadecimal digits."""
        if key is not None or key2 is not None:
            raise OperationError(
                EINVAL,
                "key, key2: a key on the wire can be seen by others, and would be saved with the "
                "configuration; put it into a file and give key_file",
            )
        if key_file is None:
            raise OperationError(EINVAL, "key_file: is missing")
        if cipher.upper() != CIPHER:
            raise OperationError(EINVAL, f"cipher {cipher!r:.20}: must be {CIPHER}")
        if tweak_mode != TWEAK_MODE:
            raise OperationError(EINVAL, f"tweak_mode {tweak_mode!r:.40}: must be {TWEAK_MODE}")
        if name in self._keys:
            raise OperationError(-errno.EEXIST, f"File exists: crypto key {name!r:.80}")
        self._keys[name] = CryptoKey(name, key_file)
        return True

    @operation
    def accel_crypto_key_destroy(self, key_name: str) -> bool:
        """Wipe a key that no device uses."""
        key = self.find(key_name)
        if key.users:
            names = ", ".join(sorted(key.users)[:5])
            raise OperationError(-errno.EBUSY, f"crypto key {key_name}: is used by {names}")
        del self._keys[key_name]
        key.close()
        return True

    @operation
    def accel_crypto_keys_get(self, key_name: str | None = None) -> list[dict[str, Any]]:
        """Return what is known of all keys, or of one, but for the keys themselves."""
        keys = list(self._keys.values()) if key_name is None else [self.find(key_name)]
        return [
            {
                "name": key.name,
                "cipher": CIPHER,
                "tweak_mode": TWEAK_MODE,
                "key_file": key.path,
                "bits": key.bits,
                "users": sorted(key.users),
            }
            for key in keys
        ]

    def _settings(self) -> list[dict[str, Any]]:
        return [
            {
                "method": "accel_crypto_key_create",
                "params": {"name": key.name, "key_file": key.path},
            }
            for key in self._keys.values()
        ]

    def _close_all(self) -> None:
        for key in self._keys.values():
            key.close()
        self._keys.clear()
