"""Keeps forked processes from touching what their parent has open; imported by whoever opens remote files.

An event loop and its copy in a forked process share one epoll object. When fsspec forgets, in the child, the loop and
the file systems of the parent, they are closed, which takes the parent's sockets out of that object: the parent
waits for ever. So the child keeps them, unused, for as long as it lives.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_held: list[Any] = []


def _hold() -> None:
    if "fsspec.asyn" not in sys.modules:
        return
    from fsspec import AbstractFileSystem, asyn

    kinds: list[type] = [AbstractFileSystem]
    for kind in kinds:
        kinds += kind.__subclasses__()
        _held.append(list(vars(kind).get("_cache", {}).values()))
    _held.extend([asyn.loop[0], asyn.iothread[0]])


os.register_at_fork(before=_hold, after_in_parent=_held.clear)
