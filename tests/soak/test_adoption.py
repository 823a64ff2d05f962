"""Parts of a cluster are killed again and again: SOAK_KILLS times for each kind of disk.

SOAK_SEED chooses what dies, and when.
"""

from __future__ import annotations

import os
import random

import psutil
import pytest

from tests.support.adoption import DISKS, Disk, Load, cluster, load, messages, saved, serve
from tests.support.cluster import Cluster
from vhost.messages import Request

KILLS = int(os.environ.get("SOAK_KILLS", "100"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
MAX_OPS = 3000  # requests between two kills

pytestmark = pytest.mark.timeout(120 + 10 * KILLS)


def kill_reactor(target: Cluster, chance: random.Random) -> None:
    psutil.Process(chance.choice(list(target.reactors().values()))).kill()


def kill_something(target: Cluster, running: Load, chance: random.Random) -> None:
    """Kill the control process, or more or less than that; or replace everything in order."""
    what = chance.choice(["control", "control", "both", "keeper", "reactor", "upgrade"])
    if what in ("both", "reactor"):
        kill_reactor(target, chance)
    if what == "keeper":
        target.process("reactor-keeper").kill()
        # Answered by the next one, which has everything by then: without either all ends.
        running.front.raw.number(Request.GET_QUEUE_NUM)
    if what == "upgrade":
        target.upgrade()
    if what in ("control", "both"):
        target.kill_control()
        running.progress(chance.randrange(1, MAX_OPS) if what == "control" else 0)
        target.restart()


@pytest.mark.parametrize("disk", DISKS, ids=str)
def test_whatever_dies_no_request_fails_and_no_byte_is_lost(disk: Disk) -> None:
    chance = random.Random(SEED)
    with cluster("0x3") as target:
        serve(target, disk)
        before = saved(target)
        with load(target, disk, queues=4, seed=SEED) as running:
            for _ in range(KILLS):
                running.progress(chance.randrange(1, MAX_OPS))
                kill_something(target, running, chance)
                target.rpc("framework_wait_init")
        assert saved(target) == before
        target.stop()


@pytest.mark.parametrize("disk", DISKS, ids=str)
def test_messages_are_answered_once_wherever_the_control_process_dies(disk: Disk) -> None:
    chance = random.Random(SEED)
    with cluster() as target:
        serve(target, disk)
        with load(target, disk, seed=SEED) as running, messages(running.front):
            for _ in range(KILLS):
                running.progress(chance.randrange(1, 100))
                target.kill_control()
                running.progress(0)
                target.restart()
        target.stop()
