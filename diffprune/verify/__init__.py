"""`verify`: every number of a report computed again from the store's Parquet files, by SQL and by nothing the report uses."""

from diffprune.verify.verify import Verified, verify

__all__ = ["Verified", "verify"]
