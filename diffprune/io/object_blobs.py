"""Blobs in Google Cloud Storage and in Azure Blob Storage, by obstore: their puts take a condition, too.

Credentials and endpoint are obstore's own, from the environment. Google: `GOOGLE_APPLICATION_CREDENTIALS`, the login of gcloud, or
the machine's service account. Azure: `AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY`, `AZURE_STORAGE_SAS_TOKEN`, a
client secret, a workload's or the machine's identity. None of them is ever part of an address, a message, or what travels to a
worker.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from diffprune.io.names import checked_key, is_key, without_secrets
from diffprune.io.outage import Outage, patient

ADDRESS = {
    "gs": re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*?))?/?\Z", re.DOTALL),
    "az": re.compile(r"az://([a-z0-9](?:-?[a-z0-9]){2,62})(?:/(.*?))?/?\Z", re.DOTALL),
}
NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|bucket does not exist|container does not exist", re.IGNORECASE)
DENIED = re.compile(r"status code: 40[13]\b")
RETRIES, CONNECT_S = 2, 10.0  # `outage` is who has patience
REQUEST_S = 30.0  # for a request and its answer, bodies apart
SLOWEST = 2**19  # bytes a second of a body, below which a connection is given up: obstore has one limit for both
LARGE = 2**22  # bytes, from which on a body counts
THIS_MACHINE = re.compile(r"http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?(/|\Z)")
SILENT = re.compile(r"error sending request|connect|dns|timed? ?out|builder error", re.IGNORECASE)
UNCONNECTED = re.compile(r"connect error|dns error|builder error", re.IGNORECASE)
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
NOBODY = re.compile(r"token request|metadata|identity|imds", re.IGNORECASE)


class Kind(NamedTuple):
    """One of the two: obstore's class, what an address names, of which form, and the variables for an endpoint and a login."""

    store: str
    what: str
    form: str
    endpoint: str
    login: str


STORES = {
    "gs": Kind(
        "GCSStore",
        "bucket",
        "3 to 222 of a-z 0-9 . _ -",
        "GOOGLE_BASE_URL",
        "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    ),
    "az": Kind(
        "AzureStore",
        "container",
        "3 to 63 of a-z 0-9 and single -",
        "AZURE_STORAGE_ENDPOINT",
        "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    ),
}


class ObjectBlobs:
    """Blobs as objects `<folder>/<key>` of a bucket or container, which must be there already. See `Blobs`.

    address: `gs://bucket/folder` or `az://container/folder`; the folder may be left out.

    Raises:
        ValueError: no such address, obstore is not installed, or its settings in the environment are none.
    """

    def __init__(self, address: str) -> None:
        self.scheme = address[:2] if address[:2] in STORES else "gs"
        self.kind = STORES[self.scheme]
        found = ADDRESS[self.scheme].match(address)
        if not found or "?" in address or (found[2] and not is_key(found[2])):
            form = f"{self.scheme}://{self.kind.what}/folder is needed, a {self.kind.what} being {self.kind.form}"
            raise ValueError(f"{without_secrets(address)!r:.100} is no place: {form}; credentials come from the environment")
        self.bucket, self.folder = found[1], found[2] or ""
        self._stores: dict[float, Any] = {}

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.folder}".rstrip("/")

    def __reduce__(self) -> tuple[type[ObjectBlobs], tuple[str]]:
        """By its address: a worker has credentials of its own."""
        return ObjectBlobs, (str(self),)

    @property
    def store(self) -> Any:
        """For requests without a body to speak of, see `sized`."""
        return self.sized(0)

    def sized(self, size: int) -> Any:
        """A store of obstore, which may serve many threads, for requests whose bodies have at most so many bytes.

        Raises:
            ValueError: see the class.
        """
        limit = seconds(size)
        if limit not in self._stores:
            self._stores[limit] = self._made(limit)
        return self._stores[limit]

    def _made(self, limit: float) -> Any:
        try:
            from obstore import store
            from obstore.exceptions import BaseError
        except ImportError:
            raise ValueError(f"{self} needs obstore: pip install 'diffprune[objects]'") from None
        endpoint = os.environ.get(self.kind.endpoint, "")
        clear = bool(THIS_MACHINE.match(endpoint))  # credentials leave no machine unencrypted
        if endpoint and not clear and not (endpoint.startswith("https://") and urlsplit(endpoint).hostname):
            raise ValueError(f"{self}: {self.kind.endpoint} must be an address that begins with https://")
        patience = timedelta(seconds=limit)
        options = {"connect_timeout": timedelta(seconds=CONNECT_S), "timeout": patience, "allow_http": clear}
        retries = {"max_retries": RETRIES, "retry_timeout": patience}
        try:
            return getattr(store, self.kind.store)(self.bucket, client_options=options, retry_config=retries)
        except (BaseError, ValueError) as error:  # of which the text may hold what stands in the environment
            hint = "AZURE_STORAGE_ACCOUNT_NAME must be set" if "Account must be specified" in str(error) else "it cannot be read"
            raise ValueError(f"{self} has no usable login in the environment ({self.kind.login}): {hint}") from None

    @patient
    def create(self, key: str, data: bytes | memoryview) -> None:
        """See `Blobs`. Among the writers of one key the store itself says who was first."""
        with self._named(key, memoryview(data).nbytes):
            self._put(key, data, "create")

    @patient
    def replace(self, key: str, data: bytes | memoryview) -> None:
        """See `Blobs`."""
        with self._named(key, memoryview(data).nbytes):
            self._put(key, data, "overwrite")

    def _put(self, key: str, data: bytes | memoryview, mode: Any) -> None:
        try:
            store = self.sized(memoryview(data).nbytes)
            store.put(self._path(key), bytes(data), mode=mode, use_multipart=False)  # one request, or no condition
        except FileNotFoundError:
            raise self._no_bucket(key) from None

    @patient
    def read(self, key: str) -> bytes:
        """See `Blobs`."""
        with self._named(key):
            found = self.store.get(self._path(key))
            if (size := found.meta["size"]) < LARGE:
                return bytes(found.bytes())
        del found  # ends a request that has too little time for what it would bring
        with self._named(key, size):
            return bytes(self.sized(size).get(self._path(key)).bytes())

    @patient
    def version(self, key: str) -> str | None:
        """See `Blobs`: the store's own tag."""
        try:
            with self._named(key):
                return _bare(self.store.head(self._path(key))["e_tag"])
        except FileNotFoundError:
            return None

    @patient
    def list(self, prefix: str = "") -> dict[str, str]:
        """See `Blobs`."""
        start, below = self._path(prefix) if prefix else self.folder, len(f"{self.folder}/".lstrip("/"))
        with self._named(prefix):
            pages = [*self.store.list(start or None, chunk_size=1000)]
        found = {one["path"][below:]: _bare(one["e_tag"]) for page in pages for one in page}
        return {key: found[key] for key in sorted(found) if is_key(key)}

    @patient
    def delete(self, key: str) -> None:
        """See `Blobs`."""
        try:
            with self._named(key):
                self.store.delete(self._path(key))
        except FileNotFoundError:
            return

    def _path(self, key: str) -> str:
        return f"{self.folder}/{checked_key(key)}".lstrip("/")

    def _name(self, key: str) -> str:
        return f"{self}/{key}".rstrip("/")

    def _no_bucket(self, key: str) -> OSError:
        return OSError(errno.EIO, f"there is no {self.kind.what} {self.bucket}: make it first", self._name(key))

    def _denied(self, key: str) -> OSError:
        return OSError(errno.EACCES, "the object store refuses these credentials", self._name(key))

    def _told(self, key: str, text: str, size: int) -> OSError:
        """Which of a few things a fault is that obstore has no exception for. size: of the body that was on its way."""
        late = TIMED_OUT.search(text) and not UNCONNECTED.search(text)  # the second stands in details alone
        text = text.partition("Debug source")[0]
        if NOBODY.search(text):
            return OSError(errno.EACCES, f"no credentials were found: set {self.kind.login}", self._name(key))
        if DENIED.search(text):
            return self._denied(key)
        if size >= LARGE and late:
            slow = f"{size / 2**20:.0f} MiB did not pass in {seconds(size):.0f} s: the connection is too slow, or broke off"
            return OSError(errno.ETIMEDOUT, slow, self._name(key))
        silent = "did not answer" if SILENT.search(text) else "failed"
        return Outage(errno.EIO, f"the object store {silent}", self._name(key))

    @contextmanager
    def _named(self, key: str, size: int = 0) -> Iterator[None]:
        """Faults of obstore as those of a file, which name the blob; their text holds addresses, which may hold a signature, so it
        is left out. size: of the body that is on its way."""
        self.store  # noqa: B018  # says by itself what is missing
        from obstore import exceptions

        try:
            yield
        except exceptions.AlreadyExistsError:
            raise FileExistsError(errno.EEXIST, "is there already", self._name(key)) from None
        except FileNotFoundError as error:
            if NO_BUCKET.search(str(error)):
                raise self._no_bucket(key) from None
            raise FileNotFoundError(errno.ENOENT, "no such blob", self._name(key)) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
            raise self._denied(key) from None
        except exceptions.BaseError as error:
            if NO_BUCKET.search(str(error)):
                raise self._no_bucket(key) from None
            raise self._told(key, str(error), size) from None


def seconds(size: int) -> float:
    """How long a request with a body of so many bytes may take; of few values, each with connections of its own."""
    return REQUEST_S + (2 ** (size - 1).bit_length() / SLOWEST if size >= LARGE else 0.0)


def _bare(tag: str | None) -> str:
    """Without quotes, in which Azure puts the tag of one object and not those of a listing."""
    return str(tag).strip('"')
