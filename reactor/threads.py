"""Worker threads: blocking Python work, answered over inproc:// with the same events.

A thread is one more peer. What it is asked travels as an event (``job_run``); the function and what
it returns stay in this process's memory and are found by the job's number, so they need not be
expressible in msgpack.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import zmq

from reactor.envelope import MalformedError, decode_request, encode
from reactor.errors import to_operation_error
from reactor.operations import Operations, operation
from reactor.peers import Peers
from reactor.sockets import Context, Socket, make_socket

MAX_THREADS = 4
STOP_TIMEOUT = 1.0  # seconds that stop() waits for threads in the middle of a job

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Job:
    """A function and, once a thread has run it, its outcome."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run the function, in a worker thread."""
        try:
            self._result = self._function()
        except BaseException as error:  # whatever it is, it is the caller's
            self._error = error

    def outcome(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._result


class JobOperations:
    """The one operation of a worker thread."""

    def __init__(self, jobs: dict[int, Job]) -> None:
        self._jobs = jobs

    @operation(internal=True)
    def job_run(self, job: int) -> None:
        """Run a job, unless nobody waits for it any more."""
        entry = self._jobs.get(job)
        if entry is not None:
            entry.run()


class WorkerThread:
    """A thread that answers events at ``inproc://<name>``, one after the other."""

    def __init__(
        self, context: Context, name: str, operations: Operations, affinity: set[int]
    ) -> None:
        self.name = name
        self.endpoint = f"inproc://{name}"
        self._operations = operations
        self._affinity = affinity
        self._stopping = False
        router = make_socket(context, zmq.ROUTER)
        router.bind(self.endpoint)
        # The socket belongs to the thread from here on; starting it is the memory barrier that
        # ZeroMQ asks for when a socket changes hands.
        self._thread = threading.Thread(target=self._serve, args=(router,), name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the job that runs; an empty message must follow to wake an idle thread."""
        self._stopping = True

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end; return whether it did."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _serve(self, router: Socket) -> None:
        # A thread inherits the affinity of the one that made it, which may be a reactor's CPU.
        os.sched_setaffinity(0, self._affinity)
        with router:
            while not self._stopping:
                identity, payload = router.recv_multipart()
                if not payload:
                    continue
                answer = self._answer(payload)
                if answer is not None:
                    router.send_multipart([identity, answer])

    def _answer(self, payload: bytes) -> bytes | None:
        event_id = None
        try:
            event_id, op, args, _ = decode_request(payload)
            entry = self._operations.find(op)
            answer = {"id": event_id, "result": entry.method(**entry.bind(args, None))}
        except Exception as error:
            if isinstance(error, MalformedError):
                event_id = error.event_id
            answer = {"id": event_id, "error": to_operation_error(error).to_wire()}
        return None if event_id is None else encode(answer)


class ThreadPool:
    """Up to MAX_THREADS worker threads, started when they are first needed."""

    def __init__(self, context: Context, peers: Peers) -> None:
        self._context = context
        self._peers = peers
        self._affinity = os.sched_getaffinity(0)
        self._threads: list[WorkerThread] = []
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        self._operations = Operations()
        self._operations.add(JobOperations(self._jobs))

    async def run(self, function: Callable[[], Result]) -> Result:
        """Run ``function`` in the least busy thread; return its result or raise what it raises.

        If the caller is cancelled, a function that is running already runs to its end unheard.
        """
        number = next(self._numbers)
        job = self._jobs[number] = Job(function)
        try:
            peer = self._peers.get(self._pick())
            await peer.call("job_run", {"job": number}, timeout=None)
        finally:
            del self._jobs[number]
        result: Result = job.outcome()
        return result

    def _pick(self) -> str:
        """Return the name of an idle thread, a new one, or the one with the fewest jobs."""
        waiting = {thread.name: self._peers.get(thread.name).waiting for thread in self._threads}
        name = min(waiting, key=waiting.__getitem__, default="")
        if name and (not waiting[name] or len(self._threads) == MAX_THREADS):
            return name
        # No process can have this name: see envelope.socket_path().
        thread = WorkerThread(
            self._context, f"@thread-{len(self._threads)}", self._operations, self._affinity
        )
        self._threads.append(thread)
        self._peers.add_local(thread.name, thread.endpoint)
        return thread.name

    def stop(self) -> bool:
        """Stop the threads; return whether all ended, so that the context can be terminated."""
        for thread in self._threads:
            thread.stop()
            with contextlib.suppress(BlockingIOError):  # a full queue wakes it as well
                self._peers.get(thread.name).send_payload(b"")
        ended = [thread.join(STOP_TIMEOUT) for thread in self._threads]
        if not all(ended):
            log.warning("%d worker threads are stuck in a job and were left", ended.count(False))
        return all(ended)
