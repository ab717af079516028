"""What arguments that name a place may be: a folder of this machine, or an address of object storage where a verb works there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

MOST_NAME = 255  # bytes of a file's name, on every file system there is


def _impossible(value: Any) -> str:
    """Why no folder can have this name; "" where one can."""
    long = next((part for part in Path(value).parts if len(os.fsencode(part)) > MOST_NAME), "")
    return f"{long[:20]}... is a name of {len(os.fsencode(long))} bytes, and no file's has more than {MOST_NAME}" if long else ""


class Place(click.Path):
    """A folder, or an address that could be one: `--out gs://` would take the run's name for a bucket. Converts to a `Path`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        from diffprune.io.blob_store import open_blobs, remote

        if remote(value):
            try:
                open_blobs(value)
            except ValueError as error:
                self.fail(str(error), param, ctx)
        elif told := _impossible(value):
            self.fail(told, param, ctx)
        return super().convert(value, param, ctx)


class Folder(click.Path):
    """A folder of this machine alone. Converts to a `Path`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        from diffprune.io.blob_store import remote
        from diffprune.io.names import without_secrets

        if remote(value):
            shown = without_secrets(str(value))
            written = param is not None and param.name == "out"
            hint = "name one" if written else f"bring a run here with `diffprune export {shown} FOLDER`"
            self.fail(f"{shown} lies in object storage, and this verb works in a folder of this machine: {hint}", param, ctx)
        if told := _impossible(value):
            self.fail(told, param, ctx)
        return super().convert(value, param, ctx)
