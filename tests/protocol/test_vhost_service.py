"""Creating, listing and deleting controllers: what is answered, and what a failure leaves."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import pytest

from reactor.errors import OperationError
from tests.support.stack import CPUS, Stack, stack
from vhost.entrance import bind_socket

CREATE = "vhost_create_blk_controller"


async def make_disks(target: Stack) -> None:
    await target.call("bdev_malloc_create", name="M0", num_blocks=2048, block_size=512)
    await target.call("bdev_null_create", name="N0", num_blocks=2048, block_size=4096)


async def refused(target: Stack, op: str, **args: Any) -> tuple[int, str]:
    with pytest.raises(OperationError) as raised:
        await target.call(op, **args)
    return raised.value.code, raised.value.message


async def test_controllers_are_described_as_spdk_does() -> None:
    async with stack() as target:
        await make_disks(target)
        assert await target.call(CREATE, ctrlr="b0", dev_name="M0") is True
        assert await target.call(CREATE, ctrlr="br", dev_name="N0", readonly=True) is True
        first, second = await target.call("vhost_get_controllers")
        assert first == {
            "ctrlr": "b0",
            "cpumask": hex(1 << CPUS[0]),
            "delay_base_us": 0,
            "iops_threshold": 60000,
            "assigned_rate_limits": {
                "rw_ios_per_sec": 0,
                "rw_mbytes_per_sec": 0,
                "r_mbytes_per_sec": 0,
                "w_mbytes_per_sec": 0,
            },
            "socket": target.socket("b0"),
            "sessions": [],
            "backend_specific": {
                "block": {
                    "readonly": False,
                    "bdev": "M0",
                    "transport": "vhost_user_blk",
                    "serial": "M0",
                    "registered_buffers": False,
                }
            },
        }
        assert second["backend_specific"]["block"]["readonly"] is True
        assert await target.call("get_vhost_controllers", name="br") == [second]
        assert json.loads(json.dumps(first)) == first


async def test_the_configuration_builds_the_same_controllers() -> None:
    async with stack() as target:
        await make_disks(target)
        mask = hex(1 << CPUS[0])
        await target.call(CREATE, ctrlr="b0", dev_name="M0", cpumask=mask, serial="S1")
        await target.call("construct_vhost_blk_controller", ctrlr="b1", dev_name="N0")
        before = await target.call("vhost_get_controllers")
        calls = target.vhost.config()
        assert (target.vhost.name, target.vhost.depends_on) == ("vhost_blk", ("bdev",))
        for name in ("b0", "b1"):
            assert await target.call("remove_vhost_controller", ctrlr=name) is True
        assert target.vhost.config() == []
        for call in calls:
            await target.call(call["method"], **call["params"])
        assert await target.call("vhost_get_controllers") == before


async def test_refusals_have_spdk_s_codes_and_leave_nothing_behind() -> None:
    async with stack() as target:
        await make_disks(target)
        await target.call(CREATE, ctrlr="b0", dev_name="M0")
        sockets = set(os.listdir(target.folder))
        cases: list[tuple[dict[str, Any], str]] = [
            ({"ctrlr": "b0", "dev_name": "N0"}, "File exists: controller b0"),
            ({"ctrlr": "b1", "dev_name": "none"}, "No such device: bdev 'none'"),
            ({"ctrlr": "b1", "dev_name": "N0", "cpumask": "zz"}, "Invalid argument: cpumask"),
            ({"ctrlr": "b1", "dev_name": "N0", "cpumask": hex(1 << 900)}, "CPU 900 of"),
            ({"ctrlr": "../b1", "dev_name": "N0"}, "Invalid argument: ctrlr '../b1'"),
            ({"ctrlr": "", "dev_name": "N0"}, "Invalid argument: ctrlr ''"),
            ({"ctrlr": "b1", "dev_name": "N0", "serial": "x" * 21}, "Invalid argument: serial"),
            ({"ctrlr": "b1", "dev_name": "N0", "transport": "x"}, "Invalid argument: transport"),
            ({"ctrlr": "b" * 120, "dev_name": "N0"}, "longer than 107 bytes"),
            ({"ctrlr": "b1"}, "dev_name"),
        ]
        for args, text in cases:
            code, message = await refused(target, CREATE, **args)
            assert (code, text in message) == (-32602, True), message
        code, message = await refused(target, "vhost_delete_controller", ctrlr="none")
        assert (code, message.startswith("No such device")) == (-32602, True)
        code, message = await refused(target, "vhost_get_controllers", name="none")
        assert (code, message.startswith("No such device")) == (-32603, True)
        assert set(os.listdir(target.folder)) == sockets
        assert len(await target.call("vhost_get_controllers")) == 1


async def test_a_claimed_bdev_is_served_only_read_only() -> None:
    async with stack() as target:
        await make_disks(target)
        target.registry.claim(target.registry.find("M0"), "somebody")
        code, message = await refused(target, CREATE, ctrlr="b0", dev_name="M0")
        assert (code, "claimed by somebody" in message) == (-32602, True)
        assert await target.call(CREATE, ctrlr="b0", dev_name="M0", readonly=True) is True


def test_a_stale_socket_is_replaced(tmp_path: Any) -> None:
    path = str(tmp_path / "s")
    bind_socket(path).close()
    assert os.path.exists(path)
    bind_socket(path).close()


def test_a_socket_that_somebody_listens_on_is_left_alone(tmp_path: Any) -> None:
    path = str(tmp_path / "s")
    with bind_socket(path):
        with pytest.raises(OSError, match="another process listens there"):
            bind_socket(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Any) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        bind_socket(str(path))
    assert path.read_text() == "precious"


async def test_deleting_leaves_a_socket_alone_that_took_the_place() -> None:
    async with stack() as target:
        await make_disks(target)
        await target.call(CREATE, ctrlr="b0", dev_name="M0")
        os.unlink(target.socket("b0"))
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(target.socket("b0"))
            await target.call("vhost_delete_controller", ctrlr="b0")
            assert "b0" in os.listdir(target.folder)


async def test_coalescing_is_shown_and_saved() -> None:
    async with stack() as target:
        await make_disks(target)
        await target.call(CREATE, ctrlr="b0", dev_name="M0")
        await target.call(CREATE, ctrlr="b1", dev_name="N0")
        args = {"ctrlr": "b0", "delay_base_us": 10, "iops_threshold": 100000}
        assert await target.call("vhost_controller_set_coalescing", **args) is True
        first, second = await target.call("vhost_get_controllers")
        assert (first["delay_base_us"], first["iops_threshold"]) == (10, 100000)
        assert (second["delay_base_us"], second["iops_threshold"]) == (0, 60000)
        created, set_up, other = target.vhost.config()
        assert set_up == {"method": "vhost_controller_set_coalescing", "params": args}
        assert created["method"] == other["method"] == CREATE


@pytest.mark.parametrize(
    ("ctrlr", "delay", "iops", "text"),
    [
        ("b0", 10, 50, "Invalid argument: iops_threshold 50"),
        ("b0", 0, 1 << 32, "Invalid argument: iops_threshold"),
        ("b0", -1, 1000, "Invalid argument: delay_base_us -1"),
        ("b0", 1 << 40, 1000, "Invalid argument: delay_base_us"),
        ("none", 10, 1000, "No such device"),
    ],
)
async def test_coalescing_is_refused_as_spdk_does(
    ctrlr: str, delay: int, iops: int, text: str
) -> None:
    async with stack() as target:
        await make_disks(target)
        await target.call(CREATE, ctrlr="b0", dev_name="M0")
        args = {"ctrlr": ctrlr, "delay_base_us": delay, "iops_threshold": iops}
        code, message = await refused(target, "vhost_controller_set_coalescing", **args)
        assert (code, message.startswith(text)) == (-32602, True), message
