"""Crypto: a device on another one that sees nothing but ciphertext."""

from typing import Any

from bdev.crypto_key import CryptoKey, CryptoKeys
from bdev.kind import EINVAL, Bdev, OpenContext, opener, provider
from bdev.registry import BdevRegistry
from bdev.stacked import LayerBdev
from reactor.errors import OperationError
from reactor.native import CData, lib
from reactor.operations import operation


class CryptoBdev(LayerBdev):
    """Plain text whose ciphertext is on the base."""

    kind = "crypto"
    product_name = "crypto"

    def __init__(self, name: str, base: Bdev, key: CryptoKey, *, uuid: str) -> None:
        super().__init__(name, base, uuid=uuid)
        self.key = key

    def open_fds(self) -> list[int]:
        """Lend the key."""
        return [self.key.fd]

    def close(self) -> None:
        """Be a user of the key no more."""
        self.key.users.discard(self.name)

    @property
    def has_history(self) -> bool:
        """Return whether the base may hold ciphertext."""
        return self.bases[0].has_history

    def driver_specific(self) -> dict[str, Any]:
        """Return base and key, by their names."""
        return {
            "crypto": {
                "base_bdev_name": self.bases[0].name,
                "name": self.name,
                "key_name": self.key.name,
            }
        }

    def config(self) -> dict[str, Any]:
        """Return the call that would create this device; its key is created before."""
        return {
            "method": "bdev_crypto_create",
            "params": {
                "base_bdev_name": self.bases[0].name,
                "name": self.name,
                "key_name": self.key.name,
                "uuid": self.uuid,
            },
        }


@provider
class CryptoOperations(CryptoKeys):
    """``bdev_crypto_*``, and keys."""

    def __init__(self, registry: BdevRegistry) -> None:
        super().__init__(registry)
        self._registry = registry

    @operation
    async def bdev_crypto_create(
        self,
        base_bdev_name: str,
        name: str,
        key_name: str | None = None,
        uuid: str | None = None,
        crypto_pmd: str | None = None,
        key: str | None = None,
        cipher: str | None = None,
        key2: str | None = None,
    ) -> str:
        """Create a device that stores what ``key_name`` encrypts on ``base_bdev_name``."""
        given = {"crypto_pmd": crypto_pmd, "key": key, "cipher": cipher, "key2": key2}
        for parameter, value in given.items():
            if value is not None:
                raise OperationError(
                    EINVAL,
                    f"{parameter}: not supported; create a key with accel_crypto_key_create, and "
                    "give key_name",
                )
        if key_name is None:
            raise OperationError(EINVAL, "key_name: is missing")
        found = self.find(key_name)
        base = self._registry.find(base_bdev_name)
        bdev = CryptoBdev(name, base, found, uuid=uuid or "")
        self._registry.check_unused(name, bdev.uuid)
        found.users.add(name)  # close() takes it away, whatever goes wrong
        await self._registry.register(bdev)
        return name

    @operation
    async def bdev_crypto_delete(self, name: str) -> bool:
        """Delete a crypto device; base and key stay."""
        await self._registry.remove(name, kind="crypto")
        return True


@opener("crypto")
def open_crypto(context: OpenContext) -> CData:
    """Open a crypto device in a reactor."""
    return lib.crypto_bdev_open(
        context.id,
        context.slot,
        context.args["num_blocks"],
        context.bases[0],
        context.fds[0],
    )
