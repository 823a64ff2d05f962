"""The conformance suite of libiscsi (``iscsi-test-cu``), at a SCSI disk of a Linux guest.

Every test passes, or is skipped for a reason that docs/scsi.md gives.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import running_cluster
from tests.guest.guest import Guest
from tests.guest.initramfs import find_tool

pytestmark = pytest.mark.guest

BLOCKS = 16 << 11  # 16 MiB
CRASHES = {
    "ALL.Sanitize.Overwrite",
    "ALL.Sanitize.OverwriteReserved",
}  # the suite's own, at /dev/sg
# Reasons to skip that docs/scsi.md explains.
REASONS = (
    "only supported for iSCSI backends",
    "not write-protected",
    "not removable",
    "CRYPTO_ERASE is not implemented",
    "LBPPB < 2",
    "does not support 0-blocks",
    "Non-iSCSI multipath",
    "--allow-sanitize flag is not set",  # where all are run at once
    "Multipath unavailable",
)
_TESTS = re.compile(r"^ *tests +\d+ +(\d+) +(\d+) +(\d+)", re.MULTILINE)
_FAILURE = re.compile(r"Suite \S+, Test \S+(?= had failures)")


def sanitize_tests() -> list[str]:
    """Return the tests that must be allowed by name, each run on its own."""
    program = find_tool("iscsi-test-cu")
    listing = subprocess.run([program, "-l"], capture_output=True, text=True, check=True).stdout
    names = [name for name in listing.split() if name.startswith("ALL.Sanitize.")]
    assert {*names} > CRASHES
    return [name for name in names if name not in CRASHES]


def test_every_test_passes_or_is_skipped_with_a_reason(cpus: list[int], tmp_path: Path) -> None:
    with running_cluster(cpus=cpus[:2]) as cluster:
        cluster.rpc("bdev_malloc_create", name="M0", num_blocks=BLOCKS, block_size=512)
        for name in ("s0", "s1"):
            cluster.rpc("vhost_create_scsi_controller", ctrlr=name)
            lun = {"ctrlr": name, "scsi_target_num": 0, "bdev_name": "M0"}
            cluster.rpc("vhost_scsi_controller_add_target", **lun)
        hosts = [cluster.socket("s0"), cluster.socket("s1")]
        with Guest(tmp_path, hosts=hosts, cpus=1) as guest:
            guest.run("until [ -e /dev/sg1 ]; do usleep 50000; done")
            suite = "iscsi-test-cu --dataloss --normal -t"
            commands = [f"{suite} ALL /dev/sg0"]
            commands += [f"{suite} {name} -S /dev/sg0" for name in sanitize_tests()]
            # The second path is an initiator that hears of earlier changes first.
            commands += ["sg_turs /dev/sg1", f"{suite} ALL.MultipathIO /dev/sg0 /dev/sg1"]
            guest.start("; ".join(commands), "/tmp/suite")
            report = guest.wait("/tmp/suite", 200).output
            guest.shutdown()
    ran, passed, failed = (sum(int(found[i]) for found in _TESTS.findall(report)) for i in range(3))
    print(f"{ran} tests have run, {passed} passed, {failed} failed")
    (tmp_path / "suite.txt").write_text(report)
    skipped = [line.strip() for line in report.splitlines() if "[SKIPPED]" in line]
    assert [line for line in skipped if not any(reason in line for reason in REASONS)] == []
    assert (_FAILURE.findall(report), failed) == ([], 0), report
    assert ran > 230, "a suite has not run to its end"
