"""What the soak tests share with the protocol tests."""

from __future__ import annotations

from tests.protocol.conftest import pytest_pyfunc_call

__all__ = ["pytest_pyfunc_call"]
