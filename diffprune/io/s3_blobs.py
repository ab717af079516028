"""Blobs in a bucket of an object store that speaks S3: AWS, MinIO, Ceph and others that know the conditional PUT (`If-None-Match`).

Credentials, region and endpoint are boto3's own: environment, profile, instance role (`AWS_ENDPOINT_URL_S3` for a store other than
AWS). None of them is ever part of an address, a message, or what travels to a worker.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from diffprune.io.names import checked_key, is_key, without_secrets
from diffprune.io.outage import Outage, patient

SCHEME = "s3://"
ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*?))?/?\Z", re.DOTALL)
MOST_CONFLICTS = 8  # answers "try again" in a row, each after another writer's turn
REFUSED = {"PreconditionFailed": "412", "ConditionalRequestConflict": "409"}
MISSING = ("NoSuchKey", "404", "NotFound")
DENIED = ("AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")


class S3Blobs:
    """Blobs as objects `<folder>/<key>` of a bucket, which must be there already. See `Blobs`; a blob has at most 5 GB.

    address: `s3://bucket` or `s3://bucket/folder`.

    Raises:
        ValueError: no such address, or boto3 is not installed.
    """

    def __init__(self, address: str) -> None:
        found = ADDRESS.match(address)
        if not found or "?" in address or (found[2] and not is_key(found[2])):
            needed = "s3://bucket/folder is needed; credentials come from the environment"
            raise ValueError(f"{without_secrets(address)!r:.100} is no place: {needed}")
        self.bucket, self.folder = found[1], found[2] or ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.folder}".rstrip("/")

    def __reduce__(self) -> tuple[type[S3Blobs], tuple[str]]:
        """By its address: a worker has credentials of its own."""
        return S3Blobs, (str(self),)

    @cached_property
    def client(self) -> Any:
        """A client of boto3, which may serve many threads."""
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise ValueError(f"{self} needs boto3: pip install 'diffprune[s3]'") from None
        # Checksums beyond what S3 has always asked for are unknown to other stores; ours stand in manifests and names.
        plain: dict[str, Any] = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        retries = {"mode": "standard", "total_max_attempts": 2}  # `outage` is who has patience
        own = boto3.session.Session()  # not the process's shared one, which several threads may not use to make clients
        return own.client("s3", config=Config(connect_timeout=10, read_timeout=30, retries=retries, **plain))

    @patient
    def create(self, key: str, data: bytes | memoryview) -> None:
        """See `Blobs`. Among the writers of one key the store itself says who was first."""
        for _ in range(MOST_CONFLICTS):
            with self._named(key):
                refused = self._put(key, data, IfNoneMatch="*")
            if refused is None:
                return
            if refused == "412":
                raise FileExistsError(errno.EEXIST, "is there already", self._name(key))
        raise OSError(errno.EAGAIN, "could not write (others keep writing it)", self._name(key))

    @patient
    def replace(self, key: str, data: bytes | memoryview) -> None:
        """See `Blobs`."""
        with self._named(key):
            self._put(key, data)

    def _put(self, key: str, data: bytes | memoryview, **condition: str) -> str | None:
        """None when it was written, else the status by which the condition was refused."""
        from botocore.exceptions import ClientError

        try:
            self.client.put_object(Bucket=self.bucket, Key=self._path(key), Body=bytes(data), **condition)
        except ClientError as error:
            status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
            refused = REFUSED.get(_code(error.response), status)
            if condition and refused in REFUSED.values():
                return refused
            raise
        return None

    @patient
    def read(self, key: str) -> bytes:
        """See `Blobs`."""
        with self._named(key):
            return bytes(self.client.get_object(Bucket=self.bucket, Key=self._path(key))["Body"].read())

    @patient
    def version(self, key: str) -> str | None:
        """See `Blobs`: the store's own tag, which is that of the content."""
        try:
            with self._named(key):
                return str(self.client.head_object(Bucket=self.bucket, Key=self._path(key))["ETag"])
        except FileNotFoundError:
            return None

    @patient
    def list(self, prefix: str = "") -> dict[str, str]:
        """See `Blobs`."""
        start = f"{self._path(prefix)}/" if prefix else f"{self.folder}/".lstrip("/")
        below = f"{self.folder}/".lstrip("/")
        with self._named(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            found = {one["Key"][len(below) :]: str(one["ETag"]) for page in pages for one in page.get("Contents", ())}
        return {key: found[key] for key in sorted(found) if is_key(key)}

    @patient
    def delete(self, key: str) -> None:
        """See `Blobs`."""
        with self._named(key):
            self.client.delete_object(Bucket=self.bucket, Key=self._path(key))

    def _path(self, key: str) -> str:
        return f"{self.folder}/{checked_key(key)}".lstrip("/")

    def _name(self, key: str) -> str:
        return f"{self}/{key}".rstrip("/")

    @contextmanager
    def _named(self, key: str) -> Iterator[None]:
        """Faults of boto3 as those of a file, which name the blob; what they say beyond a code may hold an access key, so it is
        left out."""
        from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

        try:
            yield
        except ClientError as error:
            raise self._fault(key, error.response) from None
        except BotoCoreError as error:
            hint = "no credentials: set them as for any program that uses boto3" if "Credentials" in type(error).__name__ else ""
            kind = Outage if isinstance(error, ConnectionError | HTTPClientError) else OSError
            raise kind(errno.EIO, f"the object store did not answer ({hint or type(error).__name__})", self._name(key)) from None

    def _fault(self, key: str, response: Mapping[str, Any]) -> OSError:
        code = _code(response)
        if code in MISSING:
            return FileNotFoundError(errno.ENOENT, "no such blob", self._name(key))
        if code == "NoSuchBucket":
            return OSError(errno.EIO, f"there is no bucket {self.bucket}: make it first", self._name(key))
        if code in DENIED:
            return OSError(errno.EACCES, f"the object store refuses these credentials ({code})", self._name(key))
        own = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
        return (Outage if own else OSError)(errno.EIO, f"the object store failed ({code})", self._name(key))


def _code(response: Mapping[str, Any]) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", str(response.get("Error", {}).get("Code", "")))[:40] or "no code"
