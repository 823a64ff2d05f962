"""What is said of the process as a whole; the counters come from real shared statistics."""

import asyncio
import os
import re
import signal
from dataclasses import dataclass

import pytest

from reactor.control import Framework, cpu_times, numa_node, program_version
from reactor.errors import OperationError
from reactor.native import ffi, lib
from reactor.operations import Operations
from reactor.stats import StatsArea


@dataclass
class OneReactor:
    cpu: int
    name: str
    pid: int
    stats: StatsArea
    state: str = "running"
    restarts: int = 2


@dataclass
class Reactors:
    reactors: list[OneReactor]


@dataclass
class Section:
    name: str
    depends_on: tuple[str, ...] = ()

    def config(self):
        return [{"method": f"{self.name}_create", "params": {}}]


@pytest.fixture
def stats():
    area = StatsArea.create(1)
    yield area
    area.close()


@pytest.fixture
def framework(stats):
    operations = Operations()
    framework = Framework(operations, Reactors([OneReactor(0, "reactor-0", 4711, stats)]))
    operations.add(framework)
    return framework


def test_version_fields_agree_with_the_text(framework):
    said = framework.spdk_get_version()
    assert said["version"] == f"vhost-reactor v{program_version()}"
    fields = said["fields"]
    text = "{major}.{minor}.{patch}{suffix}".format(**fields)
    assert program_version() == text


def test_methods_with_and_without_their_old_names(framework):
    names = framework.rpc_get_methods()
    assert "rpc_get_methods" in names
    assert "get_rpc_methods" not in names
    assert "get_rpc_methods" in framework.rpc_get_methods(include_aliases=True)


def test_start_init_is_not_current_once_initialised(framework):
    assert "framework_start_init" in framework.rpc_get_methods(current=True)
    framework.initialised()
    current = framework.rpc_get_methods(current=True, include_aliases=True)
    assert not {"framework_start_init", "start_subsystem_init"} & set(current)
    assert "framework_start_init" in framework.rpc_get_methods()


def test_wait_init_waits_for_the_configuration(framework):
    async def main():
        waiting = asyncio.create_task(framework.framework_wait_init())
        await asyncio.sleep(0)
        assert not waiting.done()
        framework.initialised()
        return await waiting

    assert asyncio.run(main()) is True


def test_subsystems_are_listed_after_what_they_depend_on(framework):
    framework.add_subsystem(Section("bdev"))
    framework.add_subsystem(Section("vhost_blk", ("bdev",)))
    assert framework.framework_get_subsystems() == [
        {"subsystem": "bdev", "depends_on": []},
        {"subsystem": "vhost_blk", "depends_on": ["bdev"]},
    ]


def test_a_subsystem_cannot_come_before_what_it_depends_on(framework):
    with pytest.raises(ValueError, match="vhost_blk depends on bdev"):
        framework.add_subsystem(Section("vhost_blk", ("bdev",)))
    framework.add_subsystem(Section("bdev"))
    with pytest.raises(ValueError, match="bdev is added twice"):
        framework.add_subsystem(Section("bdev"))


def test_the_configuration_of_a_subsystem_is_its_own(framework):
    framework.add_subsystem(Section("bdev"))
    expected = [{"method": "bdev_create", "params": {}}]
    assert framework.framework_get_config("bdev") == expected
    assert framework.framework_get_config("bdev", with_batches=True) == expected
    with pytest.raises(
        OperationError, match="Subsystem 'none' not found; there are: bdev"
    ) as error:
        framework.framework_get_config("none")
    assert error.value.code == -32602


def test_reactors_are_shown_with_their_counters(framework, stats):
    counters = ffi.cast("struct reactor_counters *", stats.address)
    counters.tick_rate = lib.reactor_tick_rate()
    counters.busy_ticks, counters.idle_ticks, counters.sleep_ticks = 5, 7, 11
    counters.hot = 2
    shown = framework.framework_get_reactors()
    assert shown["tick_rate"] == lib.reactor_tick_rate() > 0
    assert shown["pid"] == os.getpid()
    (reactor,) = shown["reactors"]
    assert (
        reactor.items()
        >= {
            "lcore": 0,
            "pid": 4711,
            "tid": 4711,
            "state": "running",
            "restarts": 2,
            "busy": 5,
            "idle": 18,
            "in_interrupt": False,
            "numa_id": numa_node(0),
            "lw_threads": [{"name": "reactor-0", "id": 1, "cpumask": "1", "elapsed": 23}],
        }.items()
    )
    counters.hot = 0
    assert framework.framework_get_reactors()["reactors"][0]["in_interrupt"] is True


def test_threads_are_shown_with_their_counters(framework, stats):
    counters = ffi.cast("struct reactor_counters *", stats.address)
    counters.busy_ticks, counters.sleep_ticks, counters.hot = 5, 11, 3
    (thread,) = framework.thread_get_stats()["threads"]
    assert (thread["name"], thread["cpumask"]) == ("reactor-0", "1")
    assert (thread["busy"], thread["idle"], thread["active_pollers_count"]) == (5, 11, 3)


def test_without_reactors_there_is_nothing_to_show():
    framework = Framework(Operations(), Reactors([]))
    assert framework.framework_get_reactors()["reactors"] == []
    assert framework.thread_get_stats() == {"tick_rate": 0, "threads": []}


def test_cpu_times_are_those_the_kernel_shows(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  9 9 9 9 9 9 9\ncpu0 1 2 3 4 5 6 7 0\ncpu12 10 2 30 4 5 60 7 0\nintr 5\n")
    assert cpu_times(str(stat)) == {
        0: {"usr": 1, "sys": 3, "irq": 6},
        12: {"usr": 10, "sys": 30, "irq": 60},
    }
    assert set(os.sched_getaffinity(0)) <= cpu_times().keys()


@pytest.mark.parametrize("name", ["SIGUSR1", "USR1"])
def test_a_signal_reaches_this_process(framework, name):
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        assert framework.spdk_kill_instance(name) is True
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]


@pytest.mark.parametrize("name", ["SIGSTOP", "15", "", "SIG"])
def test_a_signal_that_is_not_offered_is_refused(framework, name):
    with pytest.raises(OperationError, match=re.escape(repr(name))) as error:
        framework.spdk_kill_instance(name)
    assert error.value.code == -22
