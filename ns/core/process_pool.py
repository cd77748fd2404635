"""Calls in processes of their own, of which any may be killed at any instant."""

import contextlib
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from ns.core.process import FORKED_VARIABLES, identify_process, init_helper_process, set_environment


class ProcessPool(ThreadPoolExecutor):
    """An executor with `processes` processes, each started when it is first needed.

    The future of a call whose process was killed raises BrokenProcessPool; the other calls go on, and later ones get a new process.

    concurrent.futures.ProcessPoolExecutor has one pipe and its locks for all: with a process that is killed while it sends a large
    result, it waits for good (CPython 3.11: 7 of 15 kills). Here a thread stands before each process, with a pipe that ends when
    the process does. Call `shutdown`, or use it as a context: it waits for the calls under way, and ends the processes.
    """

    def __init__(self, processes: int, start: Callable[..., object] | None = None, arguments: tuple[Any, ...] = ()) -> None:
        """`start(*arguments)` is called first in each process. `arguments` may hold shared memory."""
        super().__init__(processes, "process-pool")
        self._setup = (identify_process(os.getpid()), start, arguments)
        self._own = threading.local()
        self._starting = threading.Lock()
        self._workers: list[_Worker] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._call, function, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        if wait:
            for worker in self._workers:
                worker.end_process()

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            with self._starting:
                worker = self._own.worker = _Worker(self._setup, function.__module__)
                self._workers.append(worker)
        try:
            return worker.call_function(function, args, kwargs)
        except BrokenProcessPool:
            self._own.worker = None
            raise


class _Worker:
    """A process, and the pipe to it."""

    def __init__(self, setup: tuple[Any, ...], module: str) -> None:
        # Not forked: the caller may have threads.
        context = multiprocessing.get_context("forkserver")
        # The server that forks, once it is started, has loaded what each process would load.
        context.set_forkserver_preload([module])
        self._pipe, far_end = context.Pipe()
        with far_end:
            self._process: ForkServerProcess | None = context.Process(target=_serve_calls, args=(far_end, *setup), daemon=True)
            self._reason = "was killed"
            try:
                with set_environment(FORKED_VARIABLES):
                    self._process.start()
            except (EOFError, OSError) as error:
                # The server that forks was killed, and the next call starts another one; or there is no room for a process.
                self._process, self._reason = None, f"could not be started ({error or 'its server was killed'})"

    def call_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if self._process is None:
                raise EOFError
            self._pipe.send((function, args, kwargs))
            result, error = self._pipe.recv()
        except (EOFError, OSError) as end:
            self.end_process()
            raise BrokenProcessPool(self._reason) from end
        if error is not None:
            raise error
        return result

    def end_process(self) -> None:
        """Ends the process, if it has not ended yet."""
        self._pipe.close()
        if self._process is not None:
            self._process.join()
            self._process = None


def _serve_calls(
    pipe: "Connection[Any, Any]", parent: str, start: Callable[..., object] | None, arguments: tuple[Any, ...]
) -> None:
    init_helper_process(parent)
    if start:
        start(*arguments)
    # The parent may be killed at any instant: then there is nobody to tell anything.
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, args, kwargs = pipe.recv()
            try:
                answer = ForkingPickler.dumps((function(*args, **kwargs), None))
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = ForkingPickler.dumps((None, error))
            pipe.send_bytes(answer)
