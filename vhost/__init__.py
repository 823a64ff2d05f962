"""The vhost-user protocol, guest memory, virtqueues, devices, and the application.

The functions of vhost.api, docs/api.md, are here too, imported when one is first asked for:
reactors have no use for them.
"""

from typing import Any

_API = frozenset(
    {
        "VhostDevice",
        "blk_construct",
        "blk_get_dev",
        "call_external_event",
        "call_external_event_foreach",
        "config_json",
        "dev_get_cpumask",
        "dev_get_name",
        "dev_remove",
        "external_event",
        "fini",
        "get_coalescing",
        "init",
        "invoke",
        "scsi_dev_add_tgt",
        "scsi_dev_construct",
        "scsi_dev_get_tgt",
        "scsi_dev_remove_tgt",
        "set_coalescing",
        "set_socket_path",
        "shutdown_cb",
    }
)


def __getattr__(name: str) -> Any:
    if name in _API:
        import importlib

        return getattr(importlib.import_module("vhost.api"), name)
    raise AttributeError(f"module 'vhost' has no attribute {name!r}")
