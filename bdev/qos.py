"""``bdev_set_qos_limit``, and groups of devices that share limits: ``bdev_qos_group_*``."""

import errno
from typing import Any, Unpack

from bdev.kind import Bdev, check_name, provider
from bdev.limits import GroupLimits, LimitParameters, Limits, check_limits
from bdev.registry import BdevRegistry
from reactor.errors import OperationError
from reactor.native import lib
from reactor.operations import operation


class Group:
    """Devices with limits in common."""

    def __init__(self, name: str) -> None:
        self.name = check_name(name)
        self.limits = GroupLimits(name)
        self.members: dict[int, Bdev] = {}  # by number


@provider
class QosOperations:
    """Limits on any device, at any time."""

    def __init__(self, registry: BdevRegistry) -> None:
        self._registry = registry
        self._groups: dict[str, Group] = {}
        registry.on_forgotten(self._forget)
        registry.add_settings(self._settings, last=True)
        registry.add_device_settings(_limits_of)
        registry.at_end(self._close)

    # --- one device

    @operation(aliases=["set_bdev_qos_limit"], touches=True)
    async def bdev_set_qos_limit(
        self,
        name: str,
        **limits: Unpack[LimitParameters],
    ) -> bool:
        """Limit reads and writes a second, and MiB a second; 0 ends a limit, absent ones stay.

        A burst, of requests or MiB, is what may go at once after as much was left unused.
        """
        changes = check_limits(limits)
        bdev = self._registry.find(name)
        if bdev.limits is None:
            bdev.limits = Limits(bdev.name)
        bdev.limits.rates.change(changes)
        self._registry.touch(bdev)
        if not any(bdev.limits.rates.describe().values()):
            await self._registry.unshare(bdev, "limits")
        elif "limits" in bdev.shares:
            await self._registry.share_changed(bdev, "limits")
        else:
            await self._registry.share(bdev, "limits", bdev.limits.fd, 0)
        return True

    # --- groups

    def _find(self, name: str) -> Group:
        if name not in self._groups:
            raise OperationError(-errno.ENODEV, f"No such device: QoS group {name!r:.80}")
        return self._groups[name]

    @operation
    def bdev_qos_group_create(
        self,
        name: str,
        **limits: Unpack[LimitParameters],
    ) -> str:
        """Create a group, whose devices together keep to its limits, and return its name."""
        changes = check_limits(limits)
        if name in self._groups:
            raise OperationError(-errno.EEXIST, f"File exists: QoS group {name!r:.80}")
        group = Group(name)
        group.limits.rates.change(changes)
        self._groups[name] = group
        return name

    @operation
    async def bdev_qos_group_set_limit(
        self,
        name: str,
        **limits: Unpack[LimitParameters],
    ) -> bool:
        """Change limits of a group; 0 ends one, absent ones stay."""
        group = self._find(name)
        group.limits.rates.change(check_limits(limits))
        for bdev in list(group.members.values()):
            await self._registry.share_changed(bdev, "group")
        return True

    @operation
    async def bdev_qos_group_add_bdev(self, name: str, bdev_name: str) -> bool:
        """Put a device into a group; its own limits stay."""
        group, bdev = self._find(name), self._registry.find(bdev_name)
        other = self._group_of(bdev)
        if other is not None:
            text = f"bdev {bdev.name} is in QoS group {other.name}: take it out of that first"
            raise OperationError(-errno.EBUSY, text)
        free = set(range(lib.QOS_MEMBERS)) - set(group.members)
        if not free:
            text = f"QoS group {name} has {lib.QOS_MEMBERS} devices, which is the most"
            raise OperationError(-errno.ENOSPC, text)
        member = min(free)
        group.limits.clear_member(member)
        group.members[member] = bdev
        await self._registry.share(bdev, "group", group.limits.fd, member)
        return True

    @operation
    async def bdev_qos_group_remove_bdev(self, name: str, bdev_name: str) -> bool:
        """Take a device out of a group."""
        group, bdev = self._find(name), self._registry.find(bdev_name)
        if self._group_of(bdev) is not group:
            text = f"No such device: bdev {bdev.name} is not in QoS group {name}"
            raise OperationError(-errno.ENODEV, text)
        self._forget(bdev)
        await self._registry.unshare(bdev, "group")
        return True

    @operation
    def bdev_qos_group_delete(self, name: str) -> bool:
        """Delete a group that has no devices."""
        group = self._find(name)
        if group.members:
            names = ", ".join(bdev.name for bdev in group.members.values())
            text = f"QoS group {name} has devices: {names:.200}; take them out first"
            raise OperationError(-errno.EBUSY, text)
        group.limits.close()
        del self._groups[name]
        return True

    @operation
    def bdev_qos_get_groups(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return all groups, or one: limits and devices."""
        groups = list(self._groups.values()) if name is None else [self._find(name)]
        return [
            {
                "name": group.name,
                **group.limits.rates.describe(),
                "bdevs": [bdev.name for bdev in group.members.values()],
            }
            for group in groups
        ]

    def _group_of(self, bdev: Bdev) -> Group | None:
        return next(
            (group for group in self._groups.values() if bdev in group.members.values()), None
        )

    def _forget(self, bdev: Bdev) -> None:
        group = self._group_of(bdev)
        if group is not None:
            group.members = {n: one for n, one in group.members.items() if one is not bdev}
            self._registry.touch_settings()

    def _settings(self) -> list[dict[str, Any]]:
        calls = []
        for group in self._groups.values():
            params: dict[str, Any] = {"name": group.name, **group.limits.rates.describe()}
            calls.append({"method": "bdev_qos_group_create", "params": params})
            for bdev in group.members.values():
                params = {"name": group.name, "bdev_name": bdev.name}
                calls.append({"method": "bdev_qos_group_add_bdev", "params": params})
        return calls

    def _close(self) -> None:
        for group in self._groups.values():
            group.limits.close()
        self._groups.clear()


def _limits_of(bdev: Bdev) -> list[dict[str, Any]]:
    """Return the calls that limit a device as it is limited."""
    rates = {} if bdev.limits is None else bdev.limits.rates.describe()
    if not any(rates.values()):
        return []
    return [{"method": "bdev_set_qos_limit", "params": {"name": bdev.name, **rates}}]
