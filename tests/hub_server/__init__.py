# SPDX-License-Identifier: Apache-2.0
"""A Hub for tests: an HTTP server on loopback that huggingface_hub's own client can work with."""

from .client import ConnectionFailed, close_session, point_client_at, record_waits
from .faults import CommitFirst, CutDownload, CutUpload, Fault, Refuse
from .messages import Account, HubError, RequestRecord
from .server import HubServer
from .storage import Commit, File, Repository


__all__ = [
    "Account",
    "Commit",
    "CommitFirst",
    "ConnectionFailed",
    "CutDownload",
    "CutUpload",
    "Fault",
    "File",
    "HubError",
    "HubServer",
    "Refuse",
    "Repository",
    "RequestRecord",
    "close_session",
    "point_client_at",
    "record_waits",
]
