"""virtio-scsi on sockets: real front-ends, real reactor processes, and what goes wrong."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from reactor.errors import OperationError
from tests.support.scsi_stack import (
    BLOCKS,
    INQUIRY,
    READY,
    close,
    code,
    connect,
    controller,
    preempt,
    read_10,
    register,
    reserve,
    write_10,
)
from tests.support.stack import CPUS, Stack, stack
from vhost.frontend_link import FrontendError
from vhost.frontend_scsi import Answer, ScsiFrontend
from vhost.virtio_scsi import (
    COMMAND,
    EVENT_QUEUE,
    EVENTS_MISSED,
    RESPONSE,
    SENSE_SIZE,
    Event,
    Function,
    Response,
    address,
)


async def test_what_is_written_is_read_back() -> None:
    async with controller() as target:
        front = await connect(target)

        def work() -> None:
            data = os.urandom(256 << 10)
            assert front.command(0, 0, write_10(64, 512), data).status == 0
            answer = front.command(0, 0, read_10(64, 512), into=len(data))
            assert (answer.response, answer.residual, answer.data) == (0, 0, data)
            inquiry = front.command(0, 0, INQUIRY, into=255)
            assert inquiry.data[8:32] == b"VHOST   Malloc disk     "
            assert inquiry.residual == 255 - len(inquiry.data)

        await target.in_thread(work)
        await close(target, front)


async def test_targets_and_units_that_are_not_there() -> None:
    async with controller() as target:
        front = await connect(target)

        def work() -> None:
            assert front.command(1, 0, INQUIRY, into=255).response == Response.BAD_TARGET
            missing = front.command(0, 3, READY)
            assert (missing.response, code(missing)) == (0, (5, 0x2500))
            assert front.command(0, 3, INQUIRY, into=255).data[0] == 0x7F
            for lun in (b"\0" * 8, b"\1\0\x80\0\0\0\0\0", b"\1\0\x40\0\0\0\0\1"):
                header = COMMAND.pack(lun, 9, 0, 0, 0, READY)
                sent = front.send(2, header, RESPONSE.size + SENSE_SIZE)
                assert front.answer(sent).response == Response.BAD_TARGET
            well_known = COMMAND.pack(b"\1\0\xc1\1\0\0\0\0", 9, 0, 0, 0, INQUIRY)
            sent = front.send(2, well_known, RESPONSE.size + SENSE_SIZE + 96)
            assert front.answer(sent).data[0] == 0x1E

        await target.in_thread(work)
        await close(target, front)


async def test_residuals_and_overruns() -> None:
    async with controller() as target:
        front = await connect(target)

        def work() -> None:
            answer = front.command(0, 0, read_10(0, 1), into=2000)
            assert (answer.response, answer.residual, len(answer.data)) == (0, 1488, 512)
            answer = front.command(0, 0, write_10(0, 1), bytes(1024))
            assert (answer.response, answer.residual) == (0, 512)
            assert front.command(0, 0, read_10(0, 4), into=512).response == Response.OVERRUN
            assert front.command(0, 0, write_10(0, 4), bytes(512)).response == Response.OVERRUN
            failed = front.command(0, 0, read_10(BLOCKS, 1), into=512)
            assert (code(failed), failed.residual) == ((5, 0x2100), 512)

        await target.in_thread(work)
        await close(target, front)


async def test_requests_of_any_form_are_answered() -> None:
    async with controller() as target:
        front = await connect(target)
        whole = RESPONSE.size + SENSE_SIZE

        def work() -> None:
            header = COMMAND.pack(address(0, 0), 1, 0, 0, 0, read_10(0, 1))
            pieces = {"cut_out": [1, 30, 20], "cut_in": [3, 100, 200, whole + 512 - 303]}
            answer = front.answer(front.send(2, header, whole + 512, **pieces))
            assert (answer.response, answer.status, len(answer.data)) == (0, 0, 512)
            short = front.answer(front.send(2, header[:-1], whole))
            assert short.response == Response.FAILURE
            assert front.wait(front.send(2, header, whole - 1)).written == 0
            assert front.wait(front.send(2, header, 0)).written == 0
            assert front.command(0, 0, READY).status == 0
            for junk in (b"", b"x", os.urandom(24), b"\1" + bytes(14), bytes(100)):
                assert front.wait(front.send(0, junk, 1)).written == 1
            assert front.wait(front.send(0, bytes(24), 0)).written == 0

        await target.in_thread(work)
        await close(target, front)


async def test_task_management() -> None:
    async with controller() as target:
        front = await connect(target)

        def work() -> None:
            for function in Function:
                assert front.manage(function, 0, 0, tag=5) == 0
                assert front.manage(function, 7, 0) == Response.BAD_TARGET
            assert front.manage(Function.ABORT_TASK, 0, 9) == Response.INCORRECT_LUN
            assert front.manage(Function(0), 0, 0) == 0
            ask = struct.pack("<II8sQ", 0, 99, address(0, 0), 0)
            assert front.wait(front.send(0, ask, 1)).raw[0] == Response.FUNCTION_REJECTED
            assert front.notifications(1, 0, 0, 0xFFFF) == (0, 0)
            assert front.notifications(2, 0, 0, 0xFFFF) == (0, 0)
            # NEXUS LOSS of I_T NEXUS RESET, then the reset, which is the end of what was before.
            assert code(front.command(0, 0, READY)) == (6, 0x2903)
            assert front.command(0, 0, READY).status == 0

        await target.in_thread(work)
        await close(target, front)


async def test_targets_come_and_go_and_the_guest_hears_of_it() -> None:
    async with controller() as target:
        await target.call("bdev_null_create", name="N0", num_blocks=100, block_size=4096)
        front = await connect(target)
        await target.in_thread(lambda: front.post_events(2))
        add = {"ctrlr": "s0", "bdev_name": "N0"}
        number = await target.call("vhost_scsi_controller_add_target", scsi_target_num=-1, **add)
        assert number == 1
        lun = {"scsi_target_num": 0, "lun": 5}
        assert await target.call("vhost_scsi_controller_add_target", **lun, **add) == 0

        def arrived() -> None:
            assert front.event() == (Event.TRANSPORT_RESET, b"\1\1" + bytes(6), 1)
            assert front.event() == (Event.TRANSPORT_RESET, b"\1\0\0\5" + bytes(4), 1)
            assert code(front.command(1, 0, READY)) == (6, 0x2900)
            capacity = front.command(1, 0, b"\x25" + bytes(9), into=8).data
            assert capacity == struct.pack(">II", 99, 4096)
            assert code(front.command(0, 0, READY)) == (6, 0x3F0E)
            luns = front.command(0, 0, struct.pack(">B5xIxx", 0xA0, 64), into=64).data
            assert luns == struct.pack(">I4x", 16) + bytes(8) + b"\0\5" + bytes(6)
            front.post_events(2)

        await target.in_thread(arrived)
        remove = {"ctrlr": "s0", "scsi_target_num": 1}
        assert await target.call("vhost_scsi_controller_remove_target", **remove) is True
        assert await target.call("bdev_null_delete", name="N0") is True

        def gone() -> None:
            assert front.event() == (Event.TRANSPORT_RESET, b"\1\1" + bytes(6), 2)
            assert front.event() == (Event.TRANSPORT_RESET, b"\1\0\0\5" + bytes(4), 2)
            assert front.command(1, 0, INQUIRY, into=96).response == Response.BAD_TARGET
            assert front.command(0, 5, INQUIRY, into=96).data[0] == 0x7F

        await target.in_thread(gone)
        await close(target, front)


async def test_events_that_find_no_buffer_are_kept_and_then_missed() -> None:
    async with controller() as target:
        front = await connect(target)
        add = {"ctrlr": "s0", "bdev_name": "M0", "scsi_target_num": 0}
        for lun in range(1, 40):
            await target.call("vhost_scsi_controller_add_target", lun=lun, **add)
        remove = {"ctrlr": "s0", "scsi_target_num": 0}
        for lun in range(1, 40):
            await target.call("vhost_scsi_controller_remove_target", lun=lun, **remove)

        def work() -> None:
            front.post_events(64)
            events = [front.event() for _ in range(64)]
            assert events[0][0] == Event.TRANSPORT_RESET | EVENTS_MISSED
            assert {event for event, _, _ in events[1:]} == {Event.TRANSPORT_RESET}
            assert [lun[3] for _, lun, _ in events] == [*range(1, 40), *range(1, 26)]

        await target.in_thread(work)
        await close(target, front)


async def test_event_goes_to_the_first_buffer_that_has_room_for_it() -> None:
    """What else a driver puts into the event queue is given back, and costs no event."""
    async with controller() as target:
        front = await connect(target)
        useless = [(b"", 15), (b"junk" * 30, 0), (b"x", 3)]
        sent = await target.in_thread(
            lambda: [front.send(EVENT_QUEUE, readable, room) for readable, room in useless]
        )
        await target.in_thread(lambda: front.post_events(1))
        lun = {"ctrlr": "s0", "scsi_target_num": 9, "bdev_name": "M0"}
        await target.call("vhost_scsi_controller_add_target", **lun)

        def work() -> None:
            assert front.event() == (Event.TRANSPORT_RESET, b"\1\x09" + bytes(6), 1)
            assert [front.wait(one).written for one in sent] == [0, 0, 0]

        await target.in_thread(work)
        await close(target, front)


async def test_removing_the_disk_under_load_removes_the_unit() -> None:
    async with controller() as target:
        front = await connect(target)
        await target.in_thread(lambda: front.post_events(1))

        def load() -> Answer:
            while True:
                sent = [front.submit(0, 0, write_10(i, 8), bytes(4096)) for i in range(16)]
                for one in sent:
                    answer = front.answer(one)
                    if answer.response or answer.status:
                        return answer

        running = asyncio.create_task(target.in_thread(load))
        assert await target.call("bdev_malloc_delete", name="M0") is True
        last = await running
        assert last.response == Response.BAD_TARGET or code(last) == (5, 0x2500)
        event, lun, reason = await target.in_thread(front.event)
        assert (event, lun[:4], reason) == (Event.TRANSPORT_RESET, b"\1\0\0\0", 2)
        (described,) = await target.call("vhost_get_controllers", name="s0")
        assert described["backend_specific"] == {"scsi": []}
        await close(target, front)


@pytest.mark.parametrize("names", [("s0",), ("s0", "s1")], ids=["one-controller", "two"])
async def test_guests_fence_each_other_and_a_killed_reactor_changes_nothing(
    names: tuple[str, ...],
) -> None:
    async with controller(*names, cpus=CPUS[:2]) as target:
        first, second = [await connect(target, name) for name in (names * 2)[:2]]

        def fence() -> None:
            assert first.command(0, 0, *register(1)).status == 0
            assert second.command(0, 0, *register(2)).status == 0
            assert first.command(0, 0, *reserve(1, 5)).status == 0
            assert second.command(0, 0, write_10(0, 1), bytes(512)).status == 0
            assert first.command(0, 0, *preempt(1, 2, 5)).status == 0
            assert code(second.command(0, 0, write_10(0, 1), bytes(512))) == (6, 0x2A05)
            assert second.command(0, 0, write_10(0, 1), b"x" * 512).status == 0x18
            assert second.command(0, 0, read_10(0, 1), into=512).status == 0

        def still() -> None:
            assert second.command(0, 0, write_10(0, 1), b"x" * 512).status == 0x18
            assert first.command(0, 0, write_10(0, 1), b"y" * 512).status == 0
            assert second.command(0, 0, read_10(0, 1), into=512).data == b"y" * 512

        await target.in_thread(fence)
        for reactor in target.cluster.reactors:
            assert reactor.pid is not None
            os.kill(reactor.pid, signal.SIGKILL)
        await target.in_thread(still)
        await close(target, second, first)


DISK_UUID = "6f1d2a5c-0000-4000-8000-000000000001"


@asynccontextmanager
async def kept(state_dir: Path) -> AsyncIterator[Stack]:
    """Serve a disk whose reservations stand in a directory, with a disk for each of two guests."""
    async with stack(CPUS[:2], state_dir) as made:
        disk = {"name": "M0", "num_blocks": BLOCKS, "block_size": 512, "uuid": DISK_UUID}
        await made.call("bdev_malloc_create", **disk)
        for name in ("s0", "s1"):
            await made.call("vhost_create_scsi_controller", ctrlr=name)
            lun = {"ctrlr": name, "scsi_target_num": 0, "bdev_name": "M0"}
            await made.call("vhost_scsi_controller_add_target", **lun)
        yield made


def register_for_good(key: int) -> tuple[bytes, bytes]:
    cdb, data = register(key)
    return cdb, data[:20] + b"\1" + data[21:]


async def test_reservation_survives_a_restart(tmp_path: Path) -> None:
    async with kept(tmp_path) as target:
        first, second = await connect(target), await connect(target, "s1")

        def fence() -> None:
            assert first.command(0, 0, *register_for_good(1)).status == 0
            assert second.command(0, 0, *register_for_good(2)).status == 0
            assert first.command(0, 0, *reserve(1, 5)).status == 0
            assert first.command(0, 0, *preempt(1, 2, 5)).status == 0

        await target.in_thread(fence)
        # Nothing of what follows the answer is needed: as if all had been killed here.
        shutil.copytree(tmp_path, tmp_path / "copy")
        await close(target, first, second)
    async with kept(tmp_path / "copy") as target:
        second, first = await connect(target, "s1"), await connect(target)

        def still() -> None:
            assert second.command(0, 0, write_10(0, 1), b"x" * 512).status == 0x18
            assert first.command(0, 0, write_10(0, 1), b"y" * 512).status == 0
            cdb, data = bytes([0x5F, 3, 0, 0, 0, 0, 0, 0, 24, 0]), struct.pack(">QQ8x", 1, 0)
            assert first.command(0, 0, cdb, data).status == 0
            assert second.command(0, 0, write_10(0, 1), b"x" * 512).status == 0

        await target.in_thread(still)
        assert list((tmp_path / "copy" / "reservations").iterdir()) == []
        await close(target, first, second)


async def test_damaged_reservations_keep_the_unit_away(tmp_path: Path) -> None:
    path = tmp_path / "reservations" / f"{DISK_UUID}.json"
    path.parent.mkdir()
    path.write_text("{}")
    async with stack(state_dir=tmp_path) as target:
        disk = {"num_blocks": BLOCKS, "block_size": 512}
        await target.call("bdev_malloc_create", name="M0", uuid=DISK_UUID, **disk)
        await target.call("bdev_malloc_create", name="M1", **disk)
        await target.call("vhost_create_scsi_controller", ctrlr="s0")
        lun = {"ctrlr": "s0", "scsi_target_num": 0}
        with pytest.raises(OSError, match="reservations are damaged") as error:
            await target.call("vhost_scsi_controller_add_target", bdev_name="M0", **lun)
        assert (error.value.errno, error.value.filename) == (errno.EBADMSG, str(path))
        assert await target.call("scsi_get_devices") == []
        assert await target.call("vhost_scsi_controller_add_target", bdev_name="M1", **lun) == 0
        path.unlink()
        lun["scsi_target_num"] = 1
        assert await target.call("vhost_scsi_controller_add_target", bdev_name="M0", **lun) == 1


async def test_reservation_that_cannot_be_written_is_not_promised(tmp_path: Path) -> None:
    async with kept(tmp_path) as target:
        (tmp_path / "reservations").write_text("in the way")
        front = await connect(target)
        answer = await target.in_thread(lambda: front.command(0, 0, *register_for_good(1)))
        assert code(answer) == (4, 0x4400)
        assert (await target.in_thread(lambda: front.command(0, 0, READY))).status == 0
        await close(target, front)


async def test_a_killed_reactor_costs_no_command() -> None:
    async with controller(targets=2) as target:
        front = await connect(target, request_queues=2)
        (reactor,) = target.cluster.reactors

        def load() -> int:
            count = 0
            for turn in range(60):
                data = struct.pack("<I", turn) * 1024
                sent = [
                    front.submit(0, 0, write_10(i * 8, 8), data, queue=i % 2) for i in range(32)
                ]
                for one in sent:
                    answer = front.answer(one, 20)
                    assert (answer.response, answer.status) == (0, 0)
                    count += 1
                assert front.command(0, 0, read_10(turn % 32 * 8, 8), into=4096).data == data
            return count

        running = asyncio.create_task(target.in_thread(load))
        for _ in range(3):
            pid = reactor.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await target.until(lambda before=pid: reactor.alive and reactor.pid != before)
        assert await running == 60 * 32
        await close(target, front)


async def test_resize_is_an_event_and_a_unit_attention(tmp_path: object) -> None:
    async with stack() as target:
        path = os.path.join(str(tmp_path), "disk")
        with open(path, "wb") as file:  # noqa: ASYNC230
            file.truncate(1 << 20)
        await target.call("bdev_aio_create", name="F0", filename=path, block_size=512)
        await target.call("vhost_create_scsi_controller", ctrlr="s0")
        add = {"ctrlr": "s0", "bdev_name": "F0", "scsi_target_num": 3}
        await target.call("vhost_scsi_controller_add_target", **add)
        front = await target.in_thread(lambda: ScsiFrontend.connect(target.socket("s0")))
        await target.in_thread(lambda: front.command(3, 0, READY))
        await target.in_thread(lambda: front.post_events(1))
        os.truncate(path, 2 << 20)
        await target.call("bdev_aio_rescan", name="F0")

        def work() -> None:
            assert front.event() == (Event.PARAM_CHANGE, b"\1\3" + bytes(6), 0x092A)
            assert code(front.command(3, 0, READY)) == (6, 0x2A09)
            capacity = front.command(3, 0, b"\x25" + bytes(9), into=8).data
            assert capacity == struct.pack(">II", 4095, 512)

        await target.in_thread(work)
        await close(target, front)


# --- operations -----------------------------------------------------------------------------------


async def refused(target: Stack, op: str, **args: object) -> tuple[int, str]:
    with pytest.raises(OperationError) as error:
        await target.call(op, **args)
    return error.value.code, error.value.message


async def test_controllers_are_described_as_spdk_does() -> None:
    async with controller() as target:
        (described,) = await target.call("vhost_get_controllers", name="s0")
        assert described["backend_specific"] == {
            "scsi": [
                {
                    "scsi_dev_num": 0,
                    "id": 0,
                    "target_name": "Target 0",
                    "luns": [{"id": 0, "bdev_name": "M0"}],
                }
            ]
        }
        (device,) = await target.call("scsi_get_devices")
        assert (device["id"], device["device_name"]) == (0, "Target 0")


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        ("add_target", {"ctrlr": "no", "scsi_target_num": 0, "bdev_name": "M0"}, "No such device"),
        ("add_target", {"ctrlr": "s0", "scsi_target_num": 0, "bdev_name": "M0"}, "File exists"),
        ("add_target", {"ctrlr": "s0", "scsi_target_num": 256, "bdev_name": "M0"}, "Invalid arg"),
        ("add_target", {"ctrlr": "s0", "scsi_target_num": 1, "bdev_name": "no"}, "No such device"),
        (
            "add_target",
            {"ctrlr": "s0", "scsi_target_num": 1, "bdev_name": "M0", "lun": 256},
            "Invalid argument",
        ),
        (
            "add_target",
            {"ctrlr": "s0", "scsi_target_num": 1, "bdev_name": "M0", "vendor": "too long a name"},
            "Invalid argument",
        ),
        ("remove_target", {"ctrlr": "s0", "scsi_target_num": 3}, "Device or resource busy"),
    ],
)
async def test_what_cannot_be_is_refused_and_nothing_changes(
    op: str, args: dict[str, object], message: str
) -> None:
    async with controller() as target:
        before = await target.call("vhost_get_controllers")
        code, text = await refused(target, f"vhost_scsi_controller_{op}", **args)
        assert (code, text[: len(message)]) == (-32602, message)
        assert await target.call("vhost_get_controllers") == before


async def test_a_delayed_controller_listens_when_it_is_started() -> None:
    async with stack() as target:
        await target.call("vhost_create_scsi_controller", ctrlr="s0", delay=True)
        with pytest.raises(FrontendError):
            await target.in_thread(lambda: ScsiFrontend.connect(target.socket("s0")))
        assert await target.call("vhost_start_scsi_controller", ctrlr="s0") is True
        assert (await refused(target, "vhost_start_scsi_controller", ctrlr="s0"))[0] == -32602
        front = await target.in_thread(lambda: ScsiFrontend.connect(target.socket("s0")))
        answer = await target.in_thread(lambda: front.command(0, 0, INQUIRY, into=96))
        assert answer.response == Response.BAD_TARGET
        await close(target, front)
        assert await target.call("vhost_delete_controller", ctrlr="s0") is True


async def test_saved_configuration_creates_the_same_again() -> None:
    async with controller() as target:
        lun = {"ctrlr": "s0", "bdev_name": "M0", "scsi_target_num": 7, "lun": 9, "serial": "S9"}
        await target.call("vhost_scsi_controller_add_target", **lun, readonly=True)
        saved = target.scsi.config()
        before = await target.call("vhost_get_controllers")
        assert await target.call("vhost_delete_controller", ctrlr="s0") is True
        assert target.scsi.config() == []
        for call in saved:
            await target.call(call["method"], **call["params"])
        assert await target.call("vhost_get_controllers") == before
        assert target.scsi.config() == saved


async def test_a_deleted_controller_has_no_more_to_do_with_its_disk(tmp_path: object) -> None:
    async with stack() as target:
        path = os.path.join(str(tmp_path), "disk")
        with open(path, "wb") as file:  # noqa: ASYNC230
            file.truncate(1 << 20)
        await target.call("bdev_aio_create", name="F0", filename=path, block_size=512)
        await target.call("vhost_create_scsi_controller", ctrlr="s0")
        add = {"ctrlr": "s0", "bdev_name": "F0", "scsi_target_num": 0}
        await target.call("vhost_scsi_controller_add_target", **add)
        assert await target.call("vhost_delete_controller", ctrlr="s0") is True
        os.truncate(path, 2 << 20)
        await target.call("bdev_aio_rescan", name="F0")
        assert await target.call("bdev_aio_delete", name="F0") is True


async def test_garbage_on_any_queue_is_answered_and_harms_nobody() -> None:
    """Random chains, the same in every run; a second guest goes on as if nothing happened."""
    random = Random(7)
    async with controller("s0", "s1") as target:
        front, other = await connect(target), await connect(target, "s1")
        whole = RESPONSE.size + SENSE_SIZE

        def cuts(size: int) -> list[int]:
            edges = sorted(
                {0, size, *(random.randint(0, size) for _ in range(random.randint(0, 3)))}
            )
            return [end - start for start, end in itertools.pairwise(edges)]

        def work() -> None:
            front.post_events(4)
            for _ in range(600):
                readable = random.randbytes(random.choice([0, 1, 24, 50, 51, 52, 75, 600, 5000]))
                if len(readable) > 51 and random.random() < 0.8:
                    cdb = bytes(
                        [random.choice(b"\x12\x28\x2a\x55\x5f\x89\x93\x42\xa3\x9e"), 0, 0, 0]
                    )
                    readable = address(random.randint(0, 1), random.randint(0, 1)) + readable[8:19]
                    readable += cdb + bytes(28) + random.randbytes(random.choice([0, 24, 512]))
                room = random.choice([0, 1, 5, whole - 1, whole, whole + 4, whole + 4096])
                if not readable and not room:
                    continue
                queue = random.choice([0, 2, 2, 2])
                sent = front.send(queue, readable, room, cut_out=cuts(len(readable)),
                                  cut_in=cuts(room))  # fmt: skip
                assert front.wait(sent).written <= room
            data = random.randbytes(4096)
            assert other.command(0, 0, bytes(6)).response == 0
            while other.command(0, 0, bytes(6)).status == 2:
                pass
            assert other.command(0, 0, write_10(500, 8), data).status in (0, 0x18)

        await target.in_thread(work)
        for pid in {reactor.pid for reactor in target.cluster.reactors}:
            assert pid is not None
            os.kill(pid, 0)
        assert all(reactor.restarts == 0 for reactor in target.cluster.reactors)
        await close(target, front, other)
