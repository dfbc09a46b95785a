# SPDX-License-Identifier: Apache-2.0
"""How much one visitor may take, and how much all may take together: every number of this Space that bounds something.

Each can be set by an environment variable of its name (on a Space: Settings, Variables), those of a lane by the lane's
name before it, such as EVERYTHING_PER_ADDRESS.
"""

import os
from dataclasses import dataclass, replace


def setting(name: str, usual: int) -> int:
    """The environment variable of this name, or what is usual; ValueError unless it is a whole number from 1."""
    text = os.environ.get(name, "").strip()
    if not text:
        return usual
    if not (text.isascii() and text.isdigit() and 1 <= len(text.lstrip("0")) <= 15):
        raise ValueError(f"the setting {name} must be a whole number from 1, got {text[:60]!r}")
    return int(text)


@dataclass(frozen=True)
class Lane:
    """Requests that wait for each other and for no others.

    `at_once` are computed at a time; of those that wait or are computed, `in_all` are taken, and of one address or one
    session so many. `seconds` one takes, until some have been timed. What is `costly` is not begun before somebody
    listens for the answer; with others nobody has to wait for that.
    """

    name: str
    at_once: int
    in_all: int
    per_address: int
    per_session: int
    seconds: int
    costly: bool = True

    def with_settings(self) -> "Lane":
        """This lane as the environment wants it."""
        names = ("in_all", "per_address", "per_session", "seconds")
        return replace(self, **{name: setting(f"{self.name}_{name}".upper(), getattr(self, name)) for name in names})


# One address can be a whole office: what bounds a single visitor is the session, which costs nothing to make anew, and
# therefore the address.
CLICKS = Lane("clicks", 1, in_all=400, per_address=100, per_session=20, seconds=1, costly=False).with_settings()
PICTURES = Lane("pictures", 1, in_all=100, per_address=40, per_session=3, seconds=1).with_settings()
CALLS = Lane("calls", 1, in_all=64, per_address=16, per_session=8, seconds=1).with_settings()
EVERYTHING = Lane("everything", 1, in_all=16, per_address=4, per_session=2, seconds=10).with_settings()
LANES = {lane.name: lane for lane in (CLICKS, PICTURES, CALLS, EVERYTHING)}

# One picture
MAX_PIXELS = setting("MAX_PIXELS", 25_000_000)  # what phones take; seen in the header, before anything is decoded
MAX_BYTES = setting("MAX_BYTES", 30_000_000)

# What visitors leave here
SESSIONS_BYTES = setting("SESSIONS_BYTES", 1_000_000_000)  # of memory, for pictures and what was made of them
FILES_BYTES = setting("FILES_BYTES", 2_000_000_000)  # on disk, uploaded or made here
FILES_SECONDS = setting("FILES_SECONDS", 3600)  # that they stay at most
FILES_SECONDS_SAFE = setting("FILES_SECONDS_SAFE", 60)  # that they stay at least: a picture may wait for its turn
SESSION_SECONDS = setting("SESSION_SECONDS", 1800)  # that a picture stays after its visitor's last action
CLOSED_SECONDS = setting("CLOSED_SECONDS", 600)  # and after its tab was closed: a phone that sleeps closes it too
VISITORS = setting("VISITORS", 500)  # whose page gradio remembers

# Requests
REQUEST_BYTES = setting("REQUEST_BYTES", 100_000)  # of anything but a picture
CONNECTIONS_PER_ADDRESS = setting("CONNECTIONS_PER_ADDRESS", 300)  # open at once; a page has two or three
UPLOADS_PER_ADDRESS = setting("UPLOADS_PER_ADDRESS", 32)  # going on at once
LISTEN_SECONDS = setting("LISTEN_SECONDS", 10)  # after which a request whose answer nobody waits for is dropped
