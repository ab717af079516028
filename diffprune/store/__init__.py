"""The one home of results: Parquet parts published by manifest, one writer per run. `Store`, `opened`, `lock`; see `parquet.py`."""

from diffprune.io.attempts import Fenced
from diffprune.io.run_lock import Busy, lock
from diffprune.store.parquet import Store, opened

__all__ = ["Busy", "Fenced", "Store", "lock", "opened"]
