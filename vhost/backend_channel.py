"""Requests of the back-end to its front-end, over the socket that came with SET_BACKEND_REQ_FD."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from vhost.messages import VERSION, BackendRequest, Header


def send_request(channel: int, request: BackendRequest) -> None:
    """Send a request without a payload, for which no reply is asked; never waits.

    A front-end that reads so little that the socket is full still has such requests to read, and
    needs no more of them: this one is dropped. Raises OSError when the front-end has closed.
    """
    message = Header(request, VERSION, 0).to_bytes()
    with socket.socket(fileno=os.dup(channel)) as sock, suppress(BlockingIOError):
        sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
