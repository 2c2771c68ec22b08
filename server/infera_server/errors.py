"""What a request can be answered with instead of a result.

::

    RequestError
    ├── BadRequest       400  the client's mistake
    │   └── Taken        400  the name of something that is there already
    ├── Unauthorized     401  no API key, or one that is not known
    ├── Forbidden        403  the key is not for this
    ├── NotFound         404  no such model or version
    ├── TooSlow          408  the body did not arrive in time
    ├── TooLarge         413  the body is over the limit
    ├── UnknownCoding    415  a content coding that is not spoken here
    ├── HeadTooLarge     431  the URL and headers are over the limit
    ├── Overloaded       429  it would wait too long; `reason` says for what, `retry_after` when to come back
    ├── InternalError    500  the server's mistake
    ├── Unavailable      503  not loaded, or draining before exit
    ├── Expired          504  the deadline passed before the request had run
    ├── Unsupported      501  a part of the protocol that is not served
    ├── UnknownTransfer  501  a transfer coding that is not spoken here
    └── UnknownVersion   505  an HTTP version that is not spoken here

The message goes to the client as it is: it names the thing, what was expected and what came.
"""

from __future__ import annotations

import logging
import math
from typing import ClassVar

from infera_gpu.errors import DeviceLostError, InputError, OutOfMemoryError, PlanError

log = logging.getLogger(__name__)


class RequestError(Exception):
    """Base of all answers that are not a result."""

    status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    """The name of gRPC's status code."""

    reason: str = ""
    """Why the server refused what was no mistake, for its metrics; empty where it was one."""

    retry_after: float | None = None
    """Seconds after which the same request may succeed; None: no estimate."""

    trace: bool = False
    """Whether the request, as far as it was read, asks where its time went: then this is explained too."""


class BadRequest(RequestError):
    """The client's mistake."""

    status = 400
    grpc_code = "INVALID_ARGUMENT"


class Taken(BadRequest):
    """The name of something that is there already."""

    grpc_code = "ALREADY_EXISTS"


class Unauthorized(RequestError):
    """No API key, or one that is not known."""

    status = 401
    grpc_code = "UNAUTHENTICATED"


class Forbidden(RequestError):
    """The key is not for this."""

    status = 403
    grpc_code = "PERMISSION_DENIED"


class NotFound(RequestError):
    """No such model or version."""

    status = 404
    grpc_code = "NOT_FOUND"


class TooSlow(RequestError):
    """The body did not arrive in time."""

    status = 408
    grpc_code = "DEADLINE_EXCEEDED"


class TooLarge(RequestError):
    """The body is over the limit."""

    status = 413
    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "too_large"


class UnknownCoding(RequestError):
    """A content coding that is not spoken here."""

    status = 415
    grpc_code = "UNIMPLEMENTED"


class HeadTooLarge(RequestError):
    """The URL and headers are over the limit."""

    status = 431
    grpc_code = "RESOURCE_EXHAUSTED"


QUEUE_FULL = "queue_full"
"""The reason of a refusal for the length of a queue."""


class Overloaded(RequestError):
    """It would wait too long: the queue is full, or a deadline or the goal would be missed.

    After `retry_after` seconds it probably would not.
    """

    status = 429
    grpc_code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after: float, reason: str = QUEUE_FULL) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class InternalError(RequestError):
    """The server's mistake."""

    status = 500
    grpc_code = "INTERNAL"


class Unavailable(RequestError):
    """Not loaded, or draining before exit."""

    status = 503
    grpc_code = "UNAVAILABLE"
    reason = "unavailable"


class Unsupported(RequestError):
    """A part of the protocol that is not served."""

    status = 501
    grpc_code = "UNIMPLEMENTED"


class UnknownTransfer(RequestError):
    """A transfer coding that is not spoken here."""

    status = 501
    grpc_code = "UNIMPLEMENTED"


class UnknownVersion(RequestError):
    """An HTTP version that is not spoken here."""

    status = 505
    grpc_code = "UNIMPLEMENTED"


class Expired(RequestError):
    """The deadline passed before the request had run."""

    status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    reason = "deadline"


def retry_after(error: RequestError) -> int | None:
    """The seconds of a Retry-After field, where there is an estimate."""
    return None if error.retry_after is None else max(1, math.ceil(error.retry_after))


def renamed(error: RequestError, message: str) -> RequestError:
    """The same refusal in other words."""
    other = type(error).__new__(type(error))
    other.__dict__.update(error.__dict__)
    other.args = (message,)
    return other


def request_error(error: Exception, model: str) -> RequestError:
    """The answer to an exception that a request raised; `model` is "" where it is for none.

    What the runtime says of the fed shapes and values (InputError, PlanError) is the client's to mend. What nobody
    expected is the server's mistake: the log has it, the client is told its type.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InputError | PlanError):
        return BadRequest(f"model '{model}': {error}")
    if isinstance(error, OutOfMemoryError | DeviceLostError):
        return Unavailable(f"model '{model}': {error}")
    failed = f"model '{model}' failed" if model else "the server failed"
    log.error("%s", failed, exc_info=error)
    return InternalError(f"{failed}: {type(error).__name__}; the server's log says more")


def read_error(error: Exception, model: str, trace: bool) -> RequestError:
    """The same of what was raised while a request was read that asks, or does not, where its time went."""
    found = request_error(error, model)
    found.trace = trace
    return found


def run_error(error: Exception, model: str) -> RequestError:
    """The answer to an exception that a run of `model` raised.

    What a kernel says of values that it cannot use (IndexError, ValueError: an index past the table, a negative size)
    is the client's to mend as well.
    """
    if isinstance(error, IndexError | ValueError) and not isinstance(error, InputError):
        return BadRequest(f"model '{model}' cannot run on this input: {error}")
    return request_error(error, model)
