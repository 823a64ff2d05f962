"""The configuration of block devices: what makes each, what is set of it, and what is for all."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from bdev.handles import Entry
from bdev.kind import Bdev
from reactor.saved import Calls, Configured, PartKey

FIRST, LAST = PartKey(0, ""), PartKey(2, "")  # settings, before those of devices and after


def _part_of(bdev: Bdev) -> PartKey:
    """Return which part makes a device: never that of another one, of the same name perhaps."""
    return PartKey(1, str(bdev.id))


class BdevSettings(Configured):
    """The subsystem ``bdev`` of a saved configuration, with the devices in ``entries``."""

    name = "bdev"
    depends_on: Sequence[str] = ()

    def __init__(self, entries: Mapping[int, Entry]) -> None:
        self._by_id = entries
        self._settings: dict[PartKey, list[Callable[[], Calls]]] = {FIRST: [], LAST: []}
        self._device_settings: list[Callable[[Bdev], Calls]] = []

    def add_settings(self, settings: Callable[[], Calls], *, last: bool = False) -> None:
        """Have the calls that ``settings`` returns stand before those of devices, or after all."""
        self._settings[LAST if last else FIRST].append(settings)

    def add_device_settings(self, settings: Callable[[Bdev], Calls]) -> None:
        """Have the calls that ``settings`` returns of a device stand behind what makes it."""
        self._device_settings.append(settings)

    def touch(self, bdev: Bdev) -> None:
        """Take note that what makes a device as it is has changed."""
        self.touched(_part_of(bdev))

    def touch_settings(self) -> None:
        """Take note that those have changed that stand after all devices."""
        self.touched(LAST)

    def parts(self) -> Iterator[tuple[PartKey, Calls]]:
        """See Configured: every device, bases before those on them, among settings."""
        yield FIRST, self.part(FIRST)
        for entry in self._by_id.values():
            yield _part_of(entry.bdev), self._calls(entry)
        yield LAST, self.part(LAST)

    def part(self, key: PartKey) -> Calls:
        """See Configured."""
        if key in self._settings:
            return [call for settings in self._settings[key] for call in settings()]
        entry = self._by_id.get(int(key.name))
        return [] if entry is None else self._calls(entry)

    def _calls(self, entry: Entry) -> Calls:
        if entry.doomed:
            return []
        create = entry.bdev.config()
        settings = [call for settings in self._device_settings for call in settings(entry.bdev)]
        return [create, *settings] if create else settings
