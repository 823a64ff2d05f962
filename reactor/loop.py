"""asyncio on the C poll loop: an event loop whose selector runs pollers until Python has work.

``select(timeout)`` is :c:func:`reactor_poll`: with the GIL released it runs the C pollers, timers
and descriptor watches of this process until a descriptor that Python watches is ready, a notice
from C waits, or the time is over. Everything else is asyncio as it always is.
"""

from __future__ import annotations

import asyncio
import logging
import select
import selectors
from collections.abc import Callable, Mapping
from typing import Any

from reactor.errors import check
from reactor.native import CData, ffi, lib

log = logging.getLogger(__name__)

MODES = {
    "adaptive": lib.REACTOR_ADAPTIVE,
    "always": lib.REACTOR_ALWAYS,
    "never": lib.REACTOR_NEVER,
}
DEFAULT_SPIN_US = 20.0

_MAX_EVENTS = 64

NoticeHandler = Callable[[int, int, str], None]


def _to_epoll(events: int) -> int:
    mask = 0
    if events & selectors.EVENT_READ:
        mask |= select.EPOLLIN
    if events & selectors.EVENT_WRITE:
        mask |= select.EPOLLOUT
    return mask


def _from_epoll(mask: int) -> int:
    """Errors and hang-ups make a descriptor both readable and writable, as epoll selectors do."""
    events = 0
    if mask & ~select.EPOLLIN:
        events |= selectors.EVENT_WRITE
    if mask & ~select.EPOLLOUT:
        events |= selectors.EVENT_READ
    return events


class Poller:
    """A Python function that the loop calls again and again."""

    def __init__(self, loop: ReactorLoop, fn: Callable[[], Any], period_us: float) -> None:
        self.fn = fn
        self.period_us = period_us
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self.active = False
        self.resume()

    def pause(self) -> None:
        """Call the function no more until :meth:`resume`."""
        self.active = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.selector.busy_pollers.pop(self, None)

    unregister = pause

    def resume(self) -> None:
        """Call the function again."""
        if self.active:
            return
        self.active = True
        if self.period_us > 0:
            self._due = self._loop.time() + self.period_us / 1e6
            self._timer = self._loop.call_at(self._due, self._tick)
        else:
            self._loop.selector.busy_pollers[self] = None
            self._loop.wake()

    def run(self) -> bool:
        """Call the function once; a function that raises is paused, with a line in the log."""
        try:
            return bool(self.fn())
        except Exception:
            log.exception("poller %r raised and is paused", self.fn)
            self.pause()
            return False

    def _tick(self) -> None:
        self.run()
        if self.active:
            # Ticks that were missed are skipped, not made up for.
            self._due = max(self._due + self.period_us / 1e6, self._loop.time())
            self._timer = self._loop.call_at(self._due, self._tick)


class PollSelector(selectors.BaseSelector):
    """A selector that services the C pollers of a ``struct reactor`` while it waits.

    ``native`` is that structure. ``area`` (address) and ``slots`` describe the shared statistics
    area, see ``reactor.stats``.
    """

    def __init__(
        self,
        mode: str = "adaptive",
        spin_us: float = DEFAULT_SPIN_US,
        area: CData | None = None,
        slots: int = 0,
    ) -> None:
        native = lib.reactor_create(
            MODES[mode], int(spin_us * 1000), ffi.NULL if area is None else area, slots
        )
        if native == ffi.NULL:
            raise OSError(ffi.errno, "cannot create the poll loop")
        self.native = native
        self.busy_pollers: dict[Poller, None] = {}
        self.notice_handlers: dict[int, NoticeHandler] = {}
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._events: CData = ffi.new("struct reactor_event[]", _MAX_EVENTS)
        self._notice: CData = ffi.new("struct reactor_notice *")

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a descriptor; see ``selectors.BaseSelector``."""
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (fd {fd}) is registered already")
        check(lib.reactor_watch(self.native, fd, _to_epoll(events)), "epoll_ctl(ADD)")
        key = selectors.SelectorKey(fileobj, fd, events, data)
        self._keys[fd] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Watch a descriptor no more; one that was closed meanwhile has left epoll by itself."""
        key = self.get_key(fileobj)
        del self._keys[key.fd]
        lib.reactor_unwatch(self.native, key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Change what a descriptor is watched for."""
        key = self.get_key(fileobj)
        if events != key.events:
            check(lib.reactor_rewatch(self.native, key.fd, _to_epoll(events)), "epoll_ctl(MOD)")
        key = key._replace(events=events, data=data)
        self._keys[key.fd] = key
        return key

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """Return the key of a registered descriptor; KeyError if there is none."""
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        return self._keys[fd]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Return the registered keys by descriptor."""
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Run pollers until a descriptor is ready or ``timeout`` seconds have passed."""
        for poller in list(self.busy_pollers):
            poller.run()
        if self.busy_pollers:
            timeout = 0  # one turn, then back: what a poller did may have made callbacks ready
        count = self._poll(-1 if timeout is None else max(0, int(timeout * 1e9)))
        ready = []
        for event in self._events[0:count]:
            key = self._keys.get(event.fd)
            if key is not None:
                ready.append((key, _from_epoll(event.events) & key.events))
        return ready

    def _poll(self, timeout_ns: int) -> int:
        count = check(
            lib.reactor_poll(self.native, timeout_ns, self._events, _MAX_EVENTS), "reactor_poll"
        )
        while lib.reactor_next_notice(self.native, self._notice):
            self._deliver()
        return count

    def _deliver(self) -> None:
        notice = self._notice
        raw: Any = ffi.string(notice.text)
        text = raw.decode(errors="replace")
        handler = self.notice_handlers.get(notice.source)
        if handler is None:
            log.warning("notice of unknown source %d: %s", notice.source, text)
            return
        try:
            handler(notice.kind, notice.code, text)
        except Exception:
            log.exception("handler of notice %r raised", text)

    def close(self) -> None:
        """Free the poll loop; pollers must have been stopped."""
        self._keys.clear()
        if self.native is not None:
            lib.reactor_destroy(self.native)
            self.native = None


class ReactorLoop(asyncio.SelectorEventLoop):
    """The event loop of a reactor process (and of anything that drives C pollers from Python)."""

    def __init__(self, selector: PollSelector | None = None) -> None:
        self.selector = PollSelector() if selector is None else selector
        super().__init__(self.selector)

    @property
    def native(self) -> CData:
        """The ``struct reactor *``, for C functions that take one."""
        return self.selector.native

    def wake(self) -> None:
        """Make the loop look at its lists again before it sleeps."""
        self.call_soon(lambda: None)

    def register_poller(self, fn: Callable[[], Any], period_us: float = 0) -> Poller:
        """Call ``fn`` every ``period_us`` microseconds, or (0) between turns of the C pollers.

        A busy poller (0) keeps the reactor awake for as long as it is registered and not paused.
        Returns a handle with ``pause()``, ``resume()`` and ``unregister()``.
        """
        return Poller(self, fn, period_us)

    def on_notice(self, source: int, handler: NoticeHandler | None) -> None:
        """Call ``handler(kind, code, text)`` for notices of ``source``; None: no more."""
        if handler is None:
            self.selector.notice_handlers.pop(source, None)
        else:
            self.selector.notice_handlers[source] = handler
