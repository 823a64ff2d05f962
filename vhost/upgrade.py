"""A planned upgrade: the program that is installed now takes the place of the one that runs.

The control process executes the program anew, under the same pid, with the same arguments. That is
for everything else as if it had died and another had come, with two differences: once reactors have
been taken over they are replaced, one after the other, by processes of the new program that wait
already when their predecessors are told to end; and then so is the keeper.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from reactor import activation
from reactor.control import program_version
from reactor.errors import OperationError
from reactor.operations import operation
from reactor.rpc_client import RpcClient
from reactor.vault import NoVault

KEY = "upgrade"  # in the vault, from its beginning to its end
CHECK_TIMEOUT = 30.0  # seconds for the new program to say its version
ANSWER_TIME = 0.1  # seconds for the answer to leave
_POLL = 0.1  # seconds between attempts to reach the new program

log = logging.getLogger(__name__)


async def _nothing() -> None:
    pass


class Upgrade:
    """``framework_upgrade``; ``prepare`` is awaited before this program ends.

    ``begun`` tells whether the control process before ended for an upgrade, and this is its other
    half.
    """

    def __init__(self, vault: NoVault) -> None:
        self.begun = vault.inherit(KEY) is not None
        self.asked = asyncio.Event()
        self._accepted = False  # from the moment that a call is, so that the next one is refused
        self._done = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self.prepare: Callable[[], Awaitable[None]] = _nothing
        self._vault = vault

    @operation
    async def framework_upgrade(self) -> dict[str, str]:
        """Have the program that is installed now take over, and return both versions.

        Guests see a pause. The new program has taken over when it answers at the same socket, and
        has replaced everything when framework_wait_upgrade returns. OperationError(-EBUSY) while
        the upgrade before is under way.
        """
        if self._accepted or not self._done.is_set():
            text = "an upgrade is under way already: framework_wait_upgrade returns when it is done"
            raise OperationError(-errno.EBUSY, text)
        self._accepted = True
        try:
            version = await installed_version()
            await self._vault.put(KEY, lambda: (b"", ()))
        except BaseException:
            self._accepted = False
            raise
        asyncio.get_running_loop().call_later(ANSWER_TIME, self.asked.set)
        return {"from": program_version(), "to": version}

    @operation
    async def framework_wait_upgrade(self) -> bool:
        """Return once nothing is left of the program before."""
        await self._done.wait()
        return True

    def go_on(self, renew_reactors: Callable[[], Awaitable[None]]) -> None:
        """Begin to replace what was taken over of another program; all is served meanwhile."""

        async def work() -> None:
            await renew_reactors()
            if self.begun:
                await self._vault.renew()
                log.info("nothing is left of the program before")
            self._done.set()

        self._work = asyncio.create_task(work())

    async def stop(self) -> None:
        """Replace nothing any more."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def execute(self) -> None:
        """Become the new program; returns only if that is not possible."""
        command = program()
        log.info("going on as %s", " ".join(command))
        await self.prepare()
        activation.hand_on()
        try:
            os.execv(command[0], command)
        except OSError as error:
            log.error("the program could not be executed: %s", error)
            self._vault.drop(KEY)
            self.asked.clear()
            self._accepted = False


def program() -> list[str]:
    """Return the command that has started this process."""
    return [sys.executable, *sys.orig_argv[1:]]


async def installed_version() -> str:
    """Return what the program says of itself that would be executed; OperationError if it fails."""
    command = program()
    end = command.index("start") if "start" in command else len(command)
    process = await asyncio.create_subprocess_exec(
        *command[:end],
        "--version",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(CHECK_TIMEOUT):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        errors = b"no answer"
    if process.returncode != 0:
        said = errors.decode(errors="replace").strip().splitlines()
        text = f"the program that is installed does not work: {said[-1] if said else 'no output'}"
        raise OperationError(-errno.ENOEXEC, text)
    return output.decode().strip()


def ask_for_upgrade(path: Path, timeout: float) -> str:
    """Have the cluster at a JSON-RPC socket upgraded, wait until it is, and return what it is now.

    Raises OperationError if it is refused or takes longer, OSError if nobody listens there.
    """
    deadline = time.monotonic() + timeout
    with RpcClient(path, timeout=timeout) as client:
        before = _processes(client.call("framework_get_reactors"))
        version = client.call("framework_upgrade")["to"]
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), RpcClient(path, timeout=timeout) as client:
            client.call("framework_wait_init")
            if not before & _processes(client.call("framework_get_reactors")):
                client.call("framework_wait_upgrade")
                return f"upgraded to {version}"
        time.sleep(_POLL)
    text = f"the new program has not taken over within {timeout:g} s: see its log"
    raise OperationError(-errno.ETIMEDOUT, text)


def _processes(described: dict[str, Any]) -> set[int]:
    return {reactor["pid"] for reactor in described["reactors"] if reactor["pid"]}
