"""SPDK's own command, at a running cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.cluster import Cluster

SPDK_RPC = Path(sys.executable).parent / "spdk-rpc"


def spdk(cluster: Cluster, *words: str) -> Any:
    """Run a command, which must succeed, and return what it prints."""
    command = [str(SPDK_RPC), "-s", str(cluster.rpc_socket), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout.strip().startswith(("[", "{")) else done.stdout
