"""The store in an S3 bucket, by s3fs: the object calls of S3 and no more, because stores differ in the rest."""

import asyncio
import base64
import contextlib
import hashlib
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from backcast import settings
from backcast.store.objects import CHUNK, PAGE, Missing, Object

_LINK_LASTS = 300
"""Seconds in which a link can be followed; a download that has begun by then may go on."""


class Bucket:
    def __init__(self, settings: settings.Store, bucket: str, prefix: str) -> None:
        from aiohttp import ClientError  # half a second of imports that a folder does not need
        from botocore.exceptions import BotoCoreError
        from s3fs import S3FileSystem

        self.failures: tuple[type[Exception], ...] = (OSError, BotoCoreError, ClientError)
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._region = settings.region
        host = urlsplit(settings.endpoint).netloc.rpartition("@")[2] if settings.endpoint else "AWS"
        self.address = f"{bucket} at {host}"
        seconds = settings.timeout.total_seconds()
        open_s3: Any = partial(
            S3FileSystem,
            asynchronous=True,
            skip_instance_cache=True,
            use_listings_cache=False,
            key=settings.access_key and settings.access_key.get_secret_value(),
            secret=settings.secret_key and settings.secret_key.get_secret_value(),
            client_kwargs={"region_name": settings.region, "verify": settings.ca_bundle and str(settings.ca_bundle)},
            config_kwargs={
                "connect_timeout": seconds,
                "read_timeout": seconds,
                "max_pool_connections": 50,
                "retries": {"total_max_attempts": 2, "mode": "standard"},
                "s3": {"addressing_style": "path" if settings.path_style else "virtual"},
                "request_checksum_calculation": "when_required",  # stores other than AWS trip over the newer ones
                "response_checksum_validation": "when_required",
                "signature_version": "s3v4",  # of links too
            },
        )
        self._s3: Any = open_s3(endpoint_url=settings.endpoint)
        self._s3.retries = 1  # botocore's are enough
        public = settings.public_endpoint
        self._public: Any = open_s3(endpoint_url=public) if public else None  # signs only, and sends no request

    def __str__(self) -> str:
        return "The bucket of the store"

    def explain(self, error: Exception) -> str:
        match _code(error):
            case "NoSuchBucket" | "404":
                return "does not exist: create it, or correct BACKCAST_STORE__URL"
            case "":
                kind = type(error).__name__
                look = "the access key" if "Credentials" in kind else "BACKCAST_STORE__ENDPOINT and the network"
                return f"can't be reached ({kind}): look at {look}"
            case code if isinstance(error, PermissionError):
                return f"refuses us ({code}): look at the access key, and at its rights to read, write, delete and list"
            case code:
                return f"answered with the error {code}"

    async def read(self, key: str, start: int) -> tuple[bytes, int]:
        try:
            answer = await self._of(key, "get_object", Range=f"bytes={start}-{start + CHUNK - 1}")
        except OSError as error:
            if _code(error) == "InvalidRange":  # nothing from there on
                return b"", start
            raise
        async with answer["Body"] as body:
            chunk: bytes = await body.read()
        return chunk, int(answer.get("ContentRange", f"/{len(chunk)}").rpartition("/")[2])

    async def link(self, key: str) -> str | None:
        if self._public is None:
            return None
        await self._of(key, "head_object")
        where = f"{self._bucket}/{self._prefix}{key}"
        return await self._public._url(where, expires=_LINK_LASTS, ResponseContentType="application/json")

    async def write(self, key: str, body: bytes, is_copied: bool) -> None:  # noqa: ARG002  # always durable
        # The digest: a store may take a request that ends after its headers for an empty object.
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        await self._call("put_object", Key=self._prefix + key, Body=body, ContentMD5=digest)

    async def create(self, key: str, body: bytes) -> bool:
        try:
            await self._call("put_object", Key=self._prefix + key, Body=body, IfNoneMatch="*")
        except OSError as error:
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict"):
                return False
            raise
        return True

    async def remove(self, keys: list[str]) -> None:
        # One by one: not every store has the call that deletes many.
        await asyncio.gather(*(self._call("delete_object", Key=self._prefix + key) for key in keys))

    async def pages(self, kind: str) -> AsyncGenerator[list[Object]]:
        more: dict[str, str] = {}
        while True:
            answer = await self._call("list_objects_v2", Prefix=f"{self._prefix}{kind}/", MaxKeys=PAGE, **more)
            yield [
                Object(each["Key"].removeprefix(self._prefix), each["LastModified"])
                for each in answer.get("Contents", [])
            ]
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    async def check(self) -> None:
        await self._call("head_bucket")

    async def ensure(self) -> None:
        try:
            await self.check()
        except FileNotFoundError:
            elsewhere = self._region and self._region != "us-east-1"
            where = {"CreateBucketConfiguration": {"LocationConstraint": self._region}} if elsewhere else {}
            with contextlib.suppress(FileExistsError):
                await self._call("create_bucket", **where)

    async def aclose(self) -> None:
        for opened in (self._s3, self._public):
            if opened is not None and opened._s3 is not None:
                await opened._s3.close()

    async def _of(self, key: str, operation: str, **arguments: Any) -> Any:
        """Ask about one object. Raises `Missing`."""
        try:
            return await self._call(operation, Key=self._prefix + key, **arguments)
        except FileNotFoundError:
            await self.check()  # stores answer differently when the bucket is missing
            raise Missing(key) from None

    async def _call(self, operation: str, **arguments: Any) -> Any:
        return await self._s3._call_s3(operation, Bucket=self._bucket, **arguments)


def _code(error: Exception) -> str:
    """The store's own code for the error; s3fs keeps it in the cause. Empty when the store did not answer."""
    response: Any = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
