"""Sessions of a control process that died, taken over by the next one (docs/recovery.md)."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING

import msgspec

from reactor.errors import OperationError
from reactor.vault import Inherited, NoVault
from vhost.journal import KEY, unpack
from vhost.record import Migration

if TYPE_CHECKING:
    from vhost.service import VhostService
    from vhost.session import Session

log = logging.getLogger(__name__)


async def resume_sessions(vhost: VhostService, vault: NoVault) -> int:
    """Go on with all that is in the vault; return how many, when their queues are served again."""
    keys = sorted(vault.keys(KEY), key=lambda key: int(key.removeprefix(KEY)))
    sessions = [_resume(vhost, key, kept) for key in keys if (kept := vault.inherit(key))]
    resumed = [session for session in sessions if session is not None]
    await asyncio.gather(*(session.resumed.wait() for session in resumed))
    return len(resumed)


def _resume(vhost: VhostService, key: str, kept: Inherited) -> Session | None:
    """Begin to go on with one; None if there is no such controller any more."""
    sock = socket.socket(fileno=kept.fds.take(0))
    del kept.fds[0]
    try:
        with kept.fds:
            record, applied = unpack(kept.data, kept.fds)
        if record.migration is not Migration.NONE:
            record.close()
            raise ValueError("its memory was still to come, to a process that is no more")
        controller = vhost.find(record.controller)
    except (ValueError, OperationError, msgspec.DecodeError) as error:
        log.error("%s cannot be taken over, and is disconnected: %s", key, error)
        sock.close()
        vhost.host.vault.drop(key)
        return None
    return controller.resume(sock, record, applied=applied)
