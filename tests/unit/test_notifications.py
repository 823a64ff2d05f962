"""Notifications: the log, and what subscribers get."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from reactor.notifications import KEPT, TYPES, Notifications, subscribe
from reactor.operations import Operations
from vhost.watch import line


@pytest.fixture
def notifications() -> Notifications:
    return Notifications()


@pytest.fixture
def published(notifications: Notifications, run_dir: Path) -> Iterator[Notifications]:
    publisher = notifications.publish(run_dir)
    yield notifications
    publisher.close()


def test_the_log_answers_from_an_id_on_and_at_most_so_many(notifications: Notifications) -> None:
    operations = Operations()
    operations.add(notifications)
    for name in ("a", "b", "c"):
        notifications.emit("bdev_register", name, kind="null")
    get = operations.find("notify_get_notifications").method
    assert [(one["id"], one["ctx"]) for one in get()] == [(0, "a"), (1, "b"), (2, "c")]
    assert [one["ctx"] for one in get(id=1)] == ["b", "c"]
    assert [one["ctx"] for one in get(id=1, max=1)] == ["b"]
    assert get(id=3) == get(max=0) == get(max=-1) == []
    assert get()[0]["details"] == {"kind": "null"}


def test_the_last_ones_are_kept(notifications: Notifications) -> None:
    for number in range(KEPT + 10):
        notifications.emit("bdev_resize", f"n{number}")
    kept = notifications.notify_get_notifications()
    assert (len(kept), kept[0]["id"], kept[-1]["ctx"]) == (KEPT, 10, f"n{KEPT + 9}")


def test_types_are_those_that_may_be_told(notifications: Notifications) -> None:
    assert {"bdev_register", "bdev_unregister", "bdev_resize"} <= set(TYPES)
    assert notifications.notify_get_types() == list(TYPES)
    with pytest.raises(AssertionError):
        notifications.emit("no_such_type", "x")


def first(published: Notifications, run_dir: Path, *kinds: str) -> dict[str, object]:
    """Emit until the subscription, which takes its time, has been made."""
    source = subscribe(run_dir, kinds, idle=0.02)
    for number in itertools.count():
        assert number < 500
        published.emit("vhost_connect", "b0", session=number)
        published.emit("vhost_disconnect", "b0", session=number)
        entry = next(source)
        if entry is not None:
            source.close()  # type: ignore[attr-defined]
            return entry
    raise AssertionError


def test_a_subscriber_gets_what_the_log_has(published: Notifications, run_dir: Path) -> None:
    entry = first(published, run_dir)
    assert entry in published.notify_get_notifications()


def test_a_subscriber_may_choose_types(published: Notifications, run_dir: Path) -> None:
    assert first(published, run_dir, "vhost_disconnect")["type"] == "vhost_disconnect"


def test_the_socket_is_private_and_goes(notifications: Notifications, run_dir: Path) -> None:
    publisher = notifications.publish(run_dir)
    assert (run_dir / "notifications").stat().st_mode & 0o777 == 0o600
    publisher.close()
    assert not (run_dir / "notifications").exists()
    with pytest.raises(FileNotFoundError):
        next(subscribe(run_dir))


def test_a_line_says_what_when_and_where() -> None:
    entry = {"id": 7, "type": "vhost_connect", "ctx": "b0", "time": 1.5, "details": {"session": 3}}
    assert line(entry).endswith(".500     7 vhost_connect b0 session=3")
