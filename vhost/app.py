"""The application: puts cluster, block devices and controllers together, and takes them apart.

Everything that start-up takes hold of goes on one stack, in the order in which it is needed;
failure and shutdown both unwind it, so that there is one way down and nothing is left behind.
"""

import asyncio
import errno
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from reactor import activation, cpumask
from reactor.config import load_config, read_config
from reactor.control import PROGRAM, Framework, program_version
from reactor.errors import OperationError, to_operation_error
from reactor.lockfile import InUse
from reactor.operations import Operations
from reactor.presence import Presence
from reactor.rpc import RpcServer
from reactor.rundir import RunDir, default_run_dir, default_state_dir
from reactor.saved import Configured, SavedConfig, read_saved
from reactor.vault import ORPHAN_TIMEOUT, NoVault, Vault
from reactor.watchdog import PATIENCE, Watchdog
from vhost.notify import notify
from vhost.upgrade import Upgrade

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
STARTUP_ERRORS = (OSError, ValueError, OperationError, InUse)
REACTOR_MODULES = ("bdev.worker", "vhost.worker", "vhost.external")

RPC_SOCKET = "rpc.sock"  # in the run directory; FileDescriptorName of one of the service manager's

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ``vhost-reactor start`` was asked for; None is the default of each."""

    cpumask: str | None = None
    socket_dir: Path | None = None
    rpc_socket: Path | None = None
    config: Path | None = None
    run_dir: Path | None = None
    state_dir: Path | None = None
    poll: str = "adaptive"
    log_level: str = "info"
    lock_dir: Path | None = None
    load: tuple[str, ...] = ()
    orphan_timeout: float = ORPHAN_TIMEOUT
    watchdog: float = PATIENCE


async def run(options: Options) -> int:
    """Serve until a signal ends it, and return the exit status."""
    set_up_logging(options.log_level)
    raise_file_limit()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) means it
            loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        try:
            application = await unless(stop, start(options, stack))
        except STARTUP_ERRORS as error:
            print(f"{PROGRAM}: cannot start: {reason(error)}", file=sys.stderr)
            return 1
        if application is not None:
            print(application.ready_line(), flush=True)
            notify("READY=1")
            while await unless(stop, application.upgrade.asked.wait()):
                await application.upgrade.execute()
        notify("STOPPING=1")
        if application is not None:
            await application.rpc.close()  # first: nobody asks for anything while the rest ends
            application.saved.close()
    return 0


@dataclass(frozen=True, kw_only=True)
class Application:
    """What runs once start-up is done."""

    rpc: RpcServer
    saved: SavedConfig
    upgrade: Upgrade
    cpus: list[int]
    socket_dir: Path

    def ready_line(self) -> str:
        """Return the one line that says where everything is."""
        plural = "s" if len(self.cpus) > 1 else ""
        return (
            f"{PROGRAM} {program_version()} is ready: reactor{plural} on CPU{plural} "
            f"{cpumask.format_list(self.cpus)}, RPC at {self.rpc.path}, disks in {self.socket_dir}"
        )


async def start(options: Options, stack: AsyncExitStack) -> Application:
    """Start everything, each part on ``stack``; what is cheap to refuse is refused first."""
    cpus = choose_cpus(options.cpumask)
    if names := activation.take():
        log.info("sockets of the service manager: %s", ", ".join(names))
    document = read_config(options.config) if options.config else None
    run_dir = stack.enter_context(RunDir(options.run_dir or default_run_dir()))
    socket_dir = existing_directory(options.socket_dir or run_dir.path)
    lock_dir = existing_directory(options.lock_dir or Path(cpumask.LOCK_DIR))
    operations = Operations()
    vault = Vault(run_dir.path, options.orphan_timeout)
    usual = run_dir.path / RPC_SOCKET
    if usual.is_symlink():  # of a control process that died
        usual.unlink()
    rpc = make_rpc_server(options.rpc_socket or usual, operations)
    rpc.bind()
    stack.push_async_callback(rpc.close)
    stack.enter_context(found_at(usual, Path(rpc.path)))

    await vault.open()
    stack.push_async_callback(vault.close)
    try:
        owner = f"{PROGRAM} in {run_dir.path}"
        stack.enter_context(cpumask.claim(cpus, owner, lock_dir, vault))
        services = await start_services(
            options, stack, operations, vault, run_dir.path, cpus, socket_dir
        )
        saved = SavedConfig(run_dir.path, services.subsystems)
        await restore(services, saved, options, document)
    except STARTUP_ERRORS as error:
        if vault.adopted:
            leave_running(error)
        raise
    operations.saved = saved
    services.management.save = saved.store
    services.framework.initialised()
    await rpc.start()
    services.upgrade.go_on(services.cluster.renew)
    stack.push_async_callback(services.upgrade.stop)
    watchdog = Watchdog(services.cluster, options.watchdog)
    watchdog.start()
    stack.push_async_callback(watchdog.stop)
    return Application(
        rpc=rpc, cpus=cpus, socket_dir=socket_dir, saved=saved, upgrade=services.upgrade
    )


@dataclass(frozen=True, kw_only=True)
class Services:
    """The parts that start-up has to do with."""

    operations: Operations
    framework: Framework
    subsystems: list[Configured]
    vault: NoVault
    cluster: Any  # reactor.cluster.Cluster, which is imported late
    upgrade: Upgrade
    vhost: Any  # vhost.service.VhostService, which is imported late
    management: Any  # vhost.management.VhostManagement


@contextmanager
def found_at(usual: Path, path: Path) -> Iterator[None]:
    """Have a socket that is elsewhere found where those look who know the run directory only."""
    elsewhere = path != usual and path.exists()
    if elsewhere:
        usual.symlink_to(path.absolute())
    yield
    if elsewhere:
        usual.unlink(missing_ok=True)


def make_rpc_server(path: Path, operations: Operations) -> RpcServer:
    """Return the server at ``path``, or on the socket that the service manager calls so."""
    given = activation.find(RPC_SOCKET)
    return RpcServer(path if given is None else given.getsockname(), operations, given=given)


async def start_services(
    options: Options,
    stack: AsyncExitStack,
    operations: Operations,
    vault: NoVault,
    run_dir: Path,
    cpus: list[int],
    socket_dir: Path,
) -> Services:
    """Start the reactors, then block devices, then controllers; the stack ends them in reverse."""
    from bdev import fence
    from bdev.kind import make_providers
    from bdev.options import BdevOptions
    from bdev.registry import BdevRegistry
    from reactor.cluster import Cluster
    from reactor.events import Node
    from reactor.foreign import ForeignSettings
    from reactor.notifications import Notifications
    from reactor.stats import SlotAllocator
    from vhost.external import ExternalEvents
    from vhost.management import VhostManagement
    from vhost.scsi_service import ScsiSubsystem, VhostScsiService
    from vhost.service import VhostService

    # Before any reactor is: the threads of ZeroMQ keep the affinity that this process has now.
    node = Node(run_dir, "control", operations)
    stack.callback(node.close)

    planned = Upgrade(vault)
    presence = await Presence.take(run_dir, vault)
    stack.callback(presence.close)
    slots = SlotAllocator()
    cluster = Cluster(
        run_dir,
        cpus,
        options.poll,
        load=[*REACTOR_MODULES, *options.load],
        vault=vault,
        program=program_version(),
        presence=presence.fd,
        renew=planned.begun,
    )
    fence.inherit(vault, cluster.reactors)
    bdevs = BdevRegistry(cluster, slots)

    notifications = Notifications()
    stack.callback(notifications.publish(run_dir).close)

    cluster.on_lost(notifications_of_reactors(notifications.emit, "reactor_lost"))
    cluster.on_lost(fence.drained)  # also what a reactor had begun for the control process before
    cluster.on_lost(bdevs.reactor_lost)  # before the controllers hear of it
    vhost = VhostService(os.fspath(socket_dir), cluster, bdevs, slots)
    # After the controllers: what it served is served again.
    cluster.on_started(notifications_of_reactors(notifications.emit, "reactor_recovered"))
    bdevs.notify = vhost.notify = notifications.emit
    vhost_scsi = VhostScsiService(vhost, cluster, bdevs, options.state_dir or default_state_dir())
    framework = Framework(operations, cluster)
    management = VhostManagement(vhost)
    operations.add(framework, notifications, vhost, management, vhost_scsi, BdevOptions())
    operations.add(ForeignSettings(), ExternalEvents(vhost, cluster), *make_providers(bdevs))
    subsystems: list[Configured] = [bdevs, vhost, ScsiSubsystem(), vhost_scsi]
    for subsystem in subsystems:
        framework.add_subsystem(subsystem)

    node.start()
    stack.callback(bdevs.close_all)
    await cluster.start()
    stack.push_async_callback(cluster.stop)
    stack.push_async_callback(vhost.stop)
    planned.prepare = cluster.end_standby
    operations.add(planned)
    return Services(
        operations=operations,
        framework=framework,
        subsystems=subsystems,
        vault=vault,
        cluster=cluster,
        upgrade=planned,
        vhost=vhost,
        management=management,
    )


async def restore(services: Services, saved: SavedConfig, options: Options, document: Any) -> None:
    """Build what the control process before had, or what ``--config`` says, and go on with it.

    A cluster that is taken over is as it was, whatever it was once started with.
    """
    if document is not None and not services.vault.adopted:
        count = await load_config(services.operations, document)
        log.info("%s: %d calls carried out", options.config, count)
    elif saved.path.exists():
        # A disk that has gone meanwhile must not keep the others from being served.
        document = read_saved(saved.path)
        count = await load_config(
            services.operations, document, lambda error: log.error("%s", error)
        )
        log.info("%s: %d calls carried out", saved.path, count)
    saved.start()
    count = await services.vhost.resume()
    if count:
        log.info("%d sessions go on", count)
    services.vault.drop_inherited()


def leave_running(error: Exception) -> NoReturn:
    """End this process, and nothing of a cluster that it could not take over."""
    print(f"{PROGRAM}: cannot take the cluster over: {reason(error)}", file=sys.stderr, flush=True)
    os._exit(1)


def notifications_of_reactors(notify: Any, kind: str) -> Callable[[Any], Awaitable[None]]:
    """Return what tells of a reactor that has died, or is back; its first start is no news."""

    async def tell(reactor: Any) -> None:
        if kind == "reactor_lost" or reactor.restarts:
            notify(kind, reactor.name, cpu=reactor.cpu, pid=reactor.pid, restarts=reactor.restarts)

    return tell


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Return what ``work`` returns; if ``stop`` is set first, cancel it and return None."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        working.cancel()  # changes nothing if it is done
    await asyncio.wait({working})
    return None if working.cancelled() else working.result()


def choose_cpus(mask: str | None) -> list[int]:
    """Return the CPUs of a mask or list; by default the first there is, as SPDK's 0x1."""
    available = cpumask.available()
    return available[:1] if mask is None else cpumask.parse(mask, available)


def raise_file_limit() -> None:
    """Let this process, and reactors after it, open as many files as they ever may.

    A queue has three eventfds in each; the usual limit of 1024 is for programs that use select(2).
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def existing_directory(path: Path) -> Path:
    """Return ``path``, absolute; OSError if it is not a directory that we can write."""
    if not path.is_dir():
        code = errno.ENOTDIR if path.exists() else errno.ENOENT
        raise OSError(code, os.strerror(code), os.fspath(path))
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    return path.absolute()


def reason(error: Exception) -> str:
    """Return one line that says why."""
    if isinstance(error, OSError):
        return to_operation_error(error).message
    return " ".join(str(error).split())


def set_up_logging(level: str) -> None:
    """Log to standard error."""
    form = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, stream=sys.stderr)
