"""Processes of workers for which no pidfd can be opened."""

import errno
import os
from typing import NoReturn

import pytest

from flaskd.errors import CannotCreateError
from flaskd.pool.handle import Handle


def test_no_descriptor_to_watch_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the worker, what is missing, and where to raise the limit; the process has ended."""

    def fail(_: int) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    real, pids = os.posix_spawn, list[int]()
    monkeypatch.setattr(os, "posix_spawn", lambda *args, **more: pids.append(real(*args, **more)) or pids[-1])
    monkeypatch.setattr(os, "pidfd_open", fail)
    with pytest.raises(CannotCreateError, match="cannot start worker 3: more open files .*; raise LimitNOFILE="):
        Handle(3, 1).start(os.environ, lambda: None, made=lambda _: None, heard=lambda *_: None, gone=lambda _: None)
    [pid] = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
