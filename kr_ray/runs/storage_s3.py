"""Arrow's S3 filesystem, patient also after a journey to another process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem

S3_ATTEMPTS = 10
"""Of one request, with exponential backoff of at most 20 s."""
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")


class PatientS3FileSystem(S3FileSystem):
    """Asks again for up to a minute when the store fails.

    Ray sends filesystems to its workers; Arrow's own forgets its retry strategy on the way. Here every
    process makes its own, from its own environment: so no credentials travel, and the endpoint (which Arrow
    reads from the environment only for URIs) is each node's.
    """

    def __init__(self, bucket: str) -> None:
        endpoint = _first_set(ENDPOINT_VARIABLES)
        region = _first_set(REGION_VARIABLES)
        if not region:  # a bucket of Amazon's knows its own; other servers take any
            region = "us-east-1" if endpoint else FileSystem.from_uri(f"s3://{bucket}")[0].region
        super().__init__(
            endpoint_override=endpoint,
            region=region,
            allow_delayed_open=True,  # small objects are one request, not three
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        )
        self.bucket = bucket

    def __reduce__(self) -> tuple[Any, ...]:
        return PatientS3FileSystem, (self.bucket,)


def _first_set(variables: Sequence[str]) -> str | None:
    return next((os.environ[name] for name in variables if os.environ.get(name)), None)
