# SPDX-License-Identifier: Apache-2.0
"""What a test can make go wrong, for which requests, and how often."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CutUpload:
    """Close the connection once `after` bytes of the request's body are in; the request is never answered.

    With `after` beyond the body's end all of it is read, and still nothing is done with it. With `reset` the client
    surely sees its connection reset; otherwise that it ends without an answer, or a reset while it is still sending.
    """

    after: int = 0
    reset: bool = False


@dataclass(frozen=True)
class CutDownload:
    """Do what was asked, then close the connection after `after` bytes of the answer's body.

    With `reset` the client sees its connection reset and not a stream that ends too early.
    """

    after: int = 0
    reset: bool = False


@dataclass(frozen=True)
class Refuse:
    """Answer with this status instead of doing what was asked."""

    status: int
    message: str = "Refused on purpose"
    retry_after: int | None = None
    code: str | None = None


@dataclass(frozen=True)
class CommitFirst:
    """Someone else commits this file to the revision right before the commit of the request is looked at."""

    path: str = "someone_elses.txt"
    content: bytes = b"committed by someone else\n"


Action = CutUpload | CutDownload | Refuse | CommitFirst


@dataclass
class Fault:
    """An action for the next `times` requests of `method` whose path contains the regular expression `path`.

    The first `skip` matching requests pass. `hits` counts the requests that met the fault.
    """

    action: Action
    path: str = ""
    method: str | None = None
    times: int = 1
    skip: int = 0
    hits: int = field(default=0, init=False)
    passed: int = field(default=0, init=False)

    def take(self, method: str, path: str) -> bool:
        """Whether this request meets the fault; counts it."""
        if self.method not in (None, method) or not re.search(self.path, path) or self.hits >= self.times:
            return False
        if self.passed < self.skip:
            self.passed += 1
            return False
        self.hits += 1
        return True
