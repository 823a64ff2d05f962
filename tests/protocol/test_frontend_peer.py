"""The front-end against another implementation: qemu-storage-daemon's vhost-user-blk export."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.descriptors import open_fds
from tests.support.storage_daemon import DAEMON, SIZE
from tests.support.storage_daemon import StorageDaemon as Peer
from tests.support.waiting import PATIENCE, wait_until
from vhost.frontend import WANTED_FEATURES, BlkFrontend, RequestError
from vhost.frontend_device import WANTED_PROTOCOL
from vhost.frontend_link import FrontendError
from vhost.io import io_command, run_workload
from vhost.messages import Feature, ProtocolFeature, Request
from vhost.results import Results
from vhost.virtio_blk import BlkFeature
from vhost.workload import Workload

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(DAEMON is None, reason="qemu-storage-daemon is not installed"),
]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    running = Peer(tmp_path_factory.mktemp("peer"))
    yield running
    running.stop()


@pytest.fixture
def disk(peer: Peer) -> Iterator[BlkFrontend]:
    with BlkFrontend.connect(peer.socket) as connected:
        yield connected


def test_config_says_what_the_file_is(disk: BlkFrontend) -> None:
    assert disk.size == SIZE
    assert disk.block_size == 512
    assert disk.config.num_queues == 2
    assert not disk.read_only


def test_what_is_written_is_in_the_file_and_reads_back(peer: Peer, disk: BlkFrontend) -> None:
    data = os.urandom(8192)
    disk.write(4096, data)
    assert disk.read(4096, 8192) == data
    with peer.file.open("rb") as file:
        file.seek(4096)
        assert file.read(8192) == data


def test_transfers_larger_than_a_request_are_split(disk: BlkFrontend) -> None:
    data = os.urandom((3 << 20) + 512)
    disk.write(512, data)
    assert disk.read(512, len(data)) == data


def test_flush_and_get_id(disk: BlkFrontend) -> None:
    disk.flush()
    assert disk.get_id() == "vhost_user_blk"


def test_write_zeroes_leaves_the_neighbours_alone(disk: BlkFrontend) -> None:
    disk.write(0, b"x" * 4096)
    disk.write_zeroes([(512, 1024)])
    assert disk.read(0, 4096) == b"x" * 512 + bytes(1024) + b"x" * 2560


def test_discard_frees_space_in_the_file(peer: Peer, disk: BlkFrontend) -> None:
    disk.write(8 << 20, b"x" * (1 << 20))
    disk.flush()
    before = peer.file.stat().st_blocks
    disk.discard([(8 << 20, 1 << 20)])
    assert peer.file.stat().st_blocks < before


def test_an_error_carries_the_status(disk: BlkFrontend) -> None:
    with pytest.raises(RequestError, match=r"DISCARD.*UNSUPP") as caught:
        disk.discard([(0, 4096)], unmap=True)
    assert caught.value.status == 2
    with pytest.raises(RequestError, match="IOERR"):
        disk.read(SIZE, 512)


def test_each_queue_works(peer: Peer) -> None:
    with BlkFrontend.connect(peer.socket, queues=2) as disk:
        disk.write(0, b"0" * 512, queue=0)
        disk.write(512, b"1" * 512, queue=1)
        assert disk.read(0, 1024, queue=1) == b"0" * 512 + b"1" * 512
        assert disk.queues[0].used_idx == 1
        assert disk.queues[1].used_idx == 2


def test_more_queues_than_the_device_has_are_refused(peer: Peer) -> None:
    with pytest.raises(FrontendError, match="3 queues asked for, the device has 2"):
        BlkFrontend.connect(peer.socket, queues=3)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("spin", [0.0, 0.01])
def test_ring_features(peer: Peer, event_idx: bool, indirect: bool, spin: float) -> None:
    features = WANTED_FEATURES if event_idx else WANTED_FEATURES & ~Feature.EVENT_IDX
    with BlkFrontend.connect(peer.socket, features=features, queue_size=8) as disk:
        assert bool(disk.features & Feature.EVENT_IDX) == event_idx
        disk.spin = spin
        for round_ in range(20):  # more than once round the ring
            data = bytes([round_]) * 1024
            assert disk.submit(1, 0, data, indirect=indirect).wait().status == 0
            assert disk.submit(0, 0, length=1024, indirect=indirect).wait().data == data


def test_many_requests_in_flight_each_get_their_own_answer(disk: BlkFrontend) -> None:
    blocks = [os.urandom(512) for _ in range(64)]
    writes = [
        disk.submit(1, place, block, publish=False, indirect=False)
        for place, block in enumerate(blocks)
    ]
    disk.queues[0].publish()
    assert [write.wait().status for write in writes] == [0] * 64
    reads = [disk.submit(0, place, length=512) for place in range(64)]
    assert [read.wait().data for read in reads] == blocks


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([1, 15, 512], [1]), ([16 + 512], [1]), ([8, 8 + 100, 412], [1])],
)
def test_framing_of_a_write_is_free(
    disk: BlkFrontend, readable: list[int], writable: list[int]
) -> None:
    data = os.urandom(512)
    request = disk.submit(1, 7, data, readable=readable, writable=writable)
    assert request.wait().status == 0
    assert disk.read(7 * 512, 512) == data


def test_data_and_status_can_share_a_buffer(disk: BlkFrontend) -> None:
    disk.write(0, b"y" * 512)
    request = disk.submit(0, 0, length=512, writable=[513]).wait()
    assert (request.status, request.data) == (0, b"y" * 512)


def test_a_buffer_may_cross_from_one_region_into_the_next(peer: Peer) -> None:
    with BlkFrontend.connect(peer.socket, memory=4 << 20, regions=4, hole=0) as disk:
        border = disk.memory.regions[1].guest
        data = os.urandom(1024)
        disk.memory.write(border - 512, data)
        header = disk.memory.allocate(64)
        disk.memory.write(header, (1).to_bytes(8, "little") + bytes(8) + b"\xff")
        queue = disk.queues[0]
        queue.add([(header, 16, False), (border - 512, 1024, False), (header + 16, 1, True)])
        queue.publish()
        assert queue.wait(PATIENCE)
        assert disk.memory.read(header + 16, 1) == b"\0"
        assert disk.read(0, 1024) == data


def test_packed_rings_that_are_not_offered_are_refused(peer: Peer) -> None:
    with pytest.raises(FrontendError, match="does not offer packed rings"):
        BlkFrontend.connect(peer.socket, packed=True)


@pytest.mark.parametrize("absent", [ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.REPLY_ACK])
def test_protocol_features_can_be_left_out(peer: Peer, absent: ProtocolFeature) -> None:
    wanted = WANTED_PROTOCOL & ~absent
    with BlkFrontend.connect(peer.socket, protocol_features=wanted, regions=3) as disk:
        assert not disk.protocol & absent
        assert disk.read(0, 512)


def test_stop_says_where_and_start_goes_on(disk: BlkFrontend) -> None:
    disk.read(0, 512)
    disk.read(0, 512)
    assert disk.stop() == [2]
    request = disk.submit(0, 0, length=512)
    assert not disk.queues[0].wait(0.05)
    disk.start()
    assert request.wait().status == 0


def test_a_disk_can_be_connected_to_again(peer: Peer) -> None:
    with BlkFrontend.connect(peer.socket) as disk:
        disk.write(0, b"z" * 512)
        disk.reconnect()
        assert disk.read(0, 512) == b"z" * 512


def test_nothing_is_left_open(peer: Peer) -> None:
    before = open_fds()
    for _ in range(3):
        with BlkFrontend.connect(peer.socket, queues=2, regions=2) as disk:
            disk.read(0, 512)
    with pytest.raises(FrontendError):
        BlkFrontend.connect(peer.socket, queues=9)
    assert open_fds() == before


def test_a_timeout_says_which_queue(disk: BlkFrontend) -> None:
    disk.stop()
    request = disk.submit(0, 0, length=512)
    with pytest.raises(FrontendError, match=r"no answer on queue 0 within 0\.05 s"):
        request.wait(0.05)


def test_raw_messages_go_out_as_they_are(peer: Peer) -> None:
    with BlkFrontend.connect(peer.socket) as disk:
        disk.raw.send(Request.GET_FEATURES)
        reply = disk.raw.receive()
        assert reply.header.request == Request.GET_FEATURES
        assert int.from_bytes(reply.data, "little") & Feature.VERSION_1


def test_a_lost_back_end_is_noticed(tmp_path: Path) -> None:
    peer = Peer(tmp_path)
    with BlkFrontend.connect(peer.socket) as disk:
        disk.read(0, 512)
        peer.process.kill()
        peer.process.wait()
        with pytest.raises(FrontendError, match="closed the connection"):
            disk.read(0, 512)


def test_a_read_only_device_says_so(tmp_path: Path) -> None:
    peer = Peer(tmp_path, writable=False)
    try:
        with BlkFrontend.connect(peer.socket) as disk:
            assert disk.features & BlkFeature.RO
            with pytest.raises(RequestError):
                disk.write(0, bytes(512))
        with (
            BlkFrontend(peer.socket) as disk,
            pytest.raises(FrontendError, match="read-only: use --rw read"),
        ):
            run_workload(disk, Workload(size=0, mode="rw"))
    finally:
        peer.stop()


def load(peer: Peer, **options: object) -> Results:
    queues = int(options.pop("queues", 1))  # type: ignore[call-overload]
    work = Workload(size=0, **{"runtime": 0.2, **options})  # type: ignore[arg-type]
    with BlkFrontend(peer.socket) as disk:
        return run_workload(disk, work, queues=queues)


@pytest.mark.parametrize("mode", ["read", "write", "randread", "randwrite", "rw", "randrw"])
def test_load_of_each_mode(peer: Peer, mode: str) -> None:
    results = load(peer, mode=mode, depth=8)
    assert results.good
    assert (results.read.ops > 0) == (mode not in ("write", "randwrite"))
    assert (results.write.ops > 0) == (mode not in ("read", "randread"))
    assert results.total.latency_min <= results.total.percentile(50) <= results.total.latency_max


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 512, "depth": 32},
        {"block_size": 4096, "depth": 32, "queues": 2},
        {"block_size": 65536, "depth": 4, "indirect": True},
        {"block_size": 65536, "depth": 4, "segment_size": 4096},
        {"block_size": 4096, "depth": 8, "interrupt": True},
        {"block_size": 4096, "depth": 8, "rate": 2000},
    ],
)
def test_verified_writes(peer: Peer, options: dict[str, object]) -> None:
    results = load(peer, mode="randwrite", verify=True, **options)
    assert results.good
    assert results.verified == results.write.ops > 0


def test_reads_verify_what_an_earlier_run_wrote(peer: Peer) -> None:
    load(peer, mode="write", verify=True, block_size=4096, depth=4, requests=64)
    work = Workload(size=64 * 4096, mode="read", verify=True, depth=4, requests=64)
    with BlkFrontend(peer.socket) as disk:
        results = run_workload(disk, work)
    assert (results.verified, results.unwritten, results.mismatches) == (64, 0, 0)


def test_wrong_data_is_found_and_located(peer: Peer) -> None:
    load(peer, mode="write", verify=True, block_size=4096, depth=4, requests=64)
    with BlkFrontend.connect(peer.socket) as disk:
        sector = bytearray(disk.read(5 * 4096 + 512, 512))
        sector[107] ^= 0x10
        disk.write(5 * 4096 + 512, bytes(sector))
        expected = bytes(sector[104:107]) + bytes([sector[107] ^ 0x10]) + bytes(sector[108:112])
    work = Workload(size=64 * 4096, mode="read", verify=True, depth=4, requests=64)
    with BlkFrontend(peer.socket) as disk:
        results = run_workload(disk, work)
    assert results.mismatches == 1
    assert results.verified == 63
    (found,) = results.mismatch
    assert found.offset == 5 * 4096 + 512 + 104
    assert found.expected == expected
    assert found.got == bytes(sector[104:112])


def test_data_in_the_wrong_place_is_found(peer: Peer) -> None:
    load(peer, mode="write", verify=True, block_size=512, depth=4, requests=64)
    with BlkFrontend.connect(peer.socket) as disk:
        disk.write(3 * 512, disk.read(2 * 512, 512))
    work = Workload(size=64 * 512, mode="read", block_size=512, verify=True, requests=64)
    with BlkFrontend(peer.socket) as disk:
        results = run_workload(disk, work)
    assert [found.offset for found in results.mismatch] == [3 * 512 + 8]


def test_a_number_of_requests_ends_a_load(peer: Peer) -> None:
    results = load(peer, mode="randread", depth=4, requests=100)
    assert results.read.ops == 100


def test_an_open_loop_is_never_ahead_of_its_rate(peer: Peer) -> None:
    results = load(peer, mode="randread", depth=16, rate=1000, requests=100, runtime=20)
    assert results.read.ops == 100
    assert results.seconds >= 0.0989  # the first is due at once; a tick's rate is not exact


def test_an_open_loop_counts_latency_from_when_a_request_was_due(peer: Peer) -> None:
    results = load(peer, mode="randread", depth=1, rate=1e7, requests=500, runtime=20)
    # No such device takes so many: the last was due after 50 µs, and came back at the end.
    assert results.read.ops == 500
    assert results.total.latency_max >= results.seconds - 1e-4


def test_the_command_prints_json_and_fails_on_wrong_data(peer: Peer) -> None:
    options = ["--bs", "4k", "--size", "256k", "--number-ios", "64", "--verify", "--json"]
    run = CliRunner().invoke(io_command, [peer.socket, "--rw", "write", *options])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["verified_blocks"] == 64
    with BlkFrontend.connect(peer.socket) as disk:
        disk.write(4096, b"?" + disk.read(4096, 512)[1:])
        disk.write(8192, disk.read(8192, 511 + 1)[:511] + b"?")
    run = CliRunner().invoke(io_command, [peer.socket, "--rw", "read", *options])
    assert run.exit_code == 1
    assert "wrong data at byte 8696" in run.output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--bs 1000", "--bs 1000 is not a multiple of the device's block size 512"),
        ("--offset 100", "--offset 100 is not a multiple of the device's block size 512"),
        ("--size 1g", "which has 16777216 bytes"),
        ("--offset 16m", "do not fit on the device"),
        ("--bs 32m", "do not fit on the device"),
        ("--queues 3", "3 queues asked for, the device has 2"),
        ("--queues 2 --size 4k", "--size 4096 has 1 blocks for 2 queues"),
        (
            "--iodepth 100 --queue-size 128",
            "--iodepth 100 needs 300 descriptors, the queue has 128",
        ),
        ("--verify --iodepth 4 --size 16k", "--verify needs more blocks than are in flight"),
    ],
)
def test_the_command_says_what_the_device_cannot_do(peer: Peer, options: str, reason: str) -> None:
    run = CliRunner().invoke(io_command, [peer.socket, *options.split()])
    assert run.exit_code == 1
    assert reason in run.output


def test_the_command_says_that_a_server_is_not_vhost_user(tmp_path: Path) -> None:
    path = str(tmp_path / "other")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(100)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        run = CliRunner().invoke(io_command, [path])
        thread.join()
    assert run.exit_code == 1
    assert "not a vhost-user back-end" in run.output


def start_load(peer: Peer, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vhost.io", peer.socket, "--rw", "write", "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_ends_early_with_results(tmp_path: Path) -> None:
    peer = Peer(tmp_path)
    try:
        running = start_load(peer, "--runtime", "100", "--verify")
        wait_until(lambda: any(peer.file.read_bytes()[:4096]))
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=PATIENCE)
    finally:
        peer.stop()
    assert running.returncode == 0, errors
    results = json.loads(output)
    assert results["seconds"] < 50
    assert results["verified_blocks"] == results["write"]["ops"] > 0


@pytest.mark.parametrize("how", ["--interrupt", "--indirect"])
def test_a_back_end_that_dies_ends_the_load(tmp_path: Path, how: str) -> None:
    peer = Peer(tmp_path)
    running = start_load(peer, "--runtime", "100", how)
    wait_until(lambda: any(peer.file.read_bytes()[:4096]))
    peer.process.kill()
    peer.process.wait()
    _, errors = running.communicate(timeout=PATIENCE)
    assert running.returncode == 1
    assert "the back-end closed the connection" in errors
