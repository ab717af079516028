"""Where processes listen."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psutil


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which a process or one below it listens."""
    found: set[Any] = set()
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # one of the short-lived ones
            found |= {
                (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
                for c in one.net_connections("tcp")
                if c.status == psutil.CONN_LISTEN
            }
    return found
