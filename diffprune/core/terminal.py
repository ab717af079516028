"""Standard streams on a terminal that may be closed while the process goes on: what is printed then is no error."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, cast

_streams: list[int] = []  # those that lie on a terminal


class _Terminal(io.FileIO):
    """A terminal, until it is closed; from then on nothing that is written is seen."""

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:  # as after `disown`, or in the moment between a terminal's end and its signal
            if error.errno != errno.EIO:
                raise
            gone()
            return len(data)


def outlive() -> None:
    """Let what is printed from now on go nowhere once the terminal that it goes to is closed."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if number not in _streams and isinstance(before, io.TextIOWrapper) and os.isatty(number):
            _streams.append(number)
            before.flush()
            raw = _Terminal(number, "w", closefd=False)
            unbuffered = before.write_through  # as by PYTHONUNBUFFERED
            binary: Any = raw if unbuffered else io.BufferedWriter(cast(io.RawIOBase, raw))
            setattr(sys, name, io.TextIOWrapper(binary, before.encoding, before.errors, None, True, unbuffered))


def gone() -> None:
    """The terminal was closed: what is printed from here on would be an error."""
    for stream in _streams:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream)
        os.close(nowhere)
