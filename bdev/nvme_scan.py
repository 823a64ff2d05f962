"""Which namespaces a controller has, and what they are like (Base 5.17)."""

from collections.abc import Awaitable, Callable

from bdev.nvme_admin import identify
from bdev.nvme_identify import Identity, Namespace, changed_namespaces, parse_namespace
from bdev.nvme_transport import PAGE, ControllerError

IDENTIFY_NAMESPACE, IDENTIFY_CONTROLLER, IDENTIFY_ACTIVE = 0x00, 0x01, 0x02  # CNS
_VERSION_1_1 = 0x10100  # the first to list what is active
_WITHOUT_LIST = 1024  # namespaces that are looked for one by one, at most

# Runs a command that fills a page, and returns the page; the text says what it is for.
Fetch = Callable[[str, dict[str, int]], Awaitable[bytes]]


async def scan(fetch: Fetch, identity: Identity) -> tuple[dict[int, Namespace], dict[int, str]]:
    """Return the namespaces that can be served, and why the others cannot, by identifier."""
    found: dict[int, Namespace] = {}
    refused: dict[int, str] = {}
    for nsid in await _active(fetch, identity):
        command = identify(IDENTIFY_NAMESPACE, nsid, 0)
        data = await fetch(f"Identify Namespace {nsid}", command)
        if not any(data):
            continue  # inactive
        try:
            found[nsid] = parse_namespace(nsid, data)
        except ControllerError as error:
            refused[nsid] = error.message
    return found, refused


async def _active(fetch: Fetch, identity: Identity) -> list[int]:
    """Return the identifiers of the active namespaces, ascending."""
    if identity.version < _VERSION_1_1:
        return list(range(1, min(identity.namespaces, _WITHOUT_LIST) + 1))
    active: list[int] = []
    while True:
        after = active[-1] if active else 0
        command = identify(IDENTIFY_ACTIVE, after, 0)
        more = changed_namespaces(await fetch("Identify active namespaces", command))
        if any(b <= a for a, b in zip([after, *more], more, strict=False)):
            raise ControllerError(f"list of namespaces after {after} is not ascending: {more[:8]}")
        active += more
        if len(more) < PAGE // 4:
            return active
