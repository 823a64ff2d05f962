"""The yardsticks of the benchmarks do the work that they are said to do."""

from __future__ import annotations

import os

from benchmarks import bare
from vhost.workload import Workload

CPUS = sorted(os.sched_getaffinity(0))


def test_the_bare_ring_stores_and_returns_data() -> None:
    work = Workload(
        size=1 << 20, mode="randrw", depth=8, runtime=60, requests=2000, verify=True, seed=1
    )
    results = bare.ring(work, driver_cpu=CPUS[0], device_cpu=CPUS[-1], store=True)
    assert results.total.ops == 2000
    assert results.good
    assert results.verified >= results.write.ops > 0


def test_the_bare_ring_without_data_only_answers() -> None:
    work = Workload(size=1 << 20, depth=32, block_size=512, runtime=60, requests=5000)
    results = bare.ring(work, driver_cpu=CPUS[0], device_cpu=CPUS[-1], store=False)
    assert (results.read.ops, results.errors) == (5000, 0)
    assert results.kicks == 0


def test_copies_are_counted_and_the_affinity_is_put_back() -> None:
    before = os.sched_getaffinity(0)
    for write in (False, True):
        assert bare.memcpy(4096, 4, write=write, cpu=CPUS[-1], seconds=0.01) > 0
    assert os.sched_getaffinity(0) == before
