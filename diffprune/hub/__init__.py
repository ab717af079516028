"""Published data and weights at a known revision: downloaded once, verified, then read from a local folder without a network.

A folder is the only thing anything is read from. `download.fetch` fills it from the hub and leaves a manifest beside the files
(`manifest.py`); `rows.read` reads Parquet and TSV in the hub's schema, columns pruned, pictures left in the files.
"""

from diffprune.hub.download import data_folder, fetch, files
from diffprune.hub.manifest import MANIFEST, Manifest
from diffprune.hub.rows import Rows, Table, missing, read, write_parquet
from diffprune.hub.splits import split_files

__all__ = [
    "MANIFEST",
    "Manifest",
    "Rows",
    "Table",
    "data_folder",
    "fetch",
    "files",
    "missing",
    "read",
    "split_files",
    "write_parquet",
]
