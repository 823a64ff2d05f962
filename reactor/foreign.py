"""Settings of SPDK that mean nothing here.

They stand in every configuration that it saves: its memory pools, its sockets, its schedulers, and
the defaults of what was not used. They are accepted, so that such a configuration can be loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from reactor.operations import operation

NAMES = (
    "accel_set_options",
    "bdev_iscsi_set_options",
    "bdev_raid_set_options",
    "framework_set_scheduler",
    "fsdev_set_opts",
    "iobuf_set_options",
    "iscsi_set_options",
    "nvmf_set_config",
    "nvmf_set_crdt",
    "nvmf_set_max_subsystems",
    "scheduler_set_options",
    "sock_impl_set_options",
    "sock_set_default_impl",
)

log = logging.getLogger(__name__)


def _setting(name: str) -> Callable[..., bool]:
    def accept(_self: object, **settings: Any) -> bool:
        """Accept settings of a part that is SPDK's alone, and do nothing."""
        log.debug("%s means nothing here: %s", name, ", ".join(settings))
        return True

    return operation(accept)


# One operation for each name: SPDK's client does not look at aliases.
ForeignSettings = type("ForeignSettings", (), {name: _setting(name) for name in NAMES})
