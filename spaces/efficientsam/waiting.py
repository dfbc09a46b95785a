# SPDX-License-Identifier: Apache-2.0
"""Who is computed next, who has to come back later, and who is not waited for any more.

gradio's queue takes requests until it is full, whoever sends them, and computes those whose answer nobody waits for.
"""

import asyncio
import ipaddress
import math
import time
from collections import Counter
from functools import lru_cache
from typing import Any

import gradio as gr
from fastapi import HTTPException
from gradio.context import LocalContext
from gradio.queueing import Event, Queue
from limits import CLICKS, LANES, LISTEN_SECONDS, Lane


REMEMBERED = 10_000  # addresses whose last turn is known
SECONDS_BETWEEN_LOOKS = 0.005  # gradio looks for what can begin a thousand times a second
UNWANTED = "Nobody waits for this answer any more."


class FairQueue(Queue):
    """A queue of lanes in which addresses take turns, with at most so many requests of each address and session.

    Of a session one request is computed at a time in each lane, in the order in which they came.
    """

    def __init__(self, blocks: gr.Blocks, listeners: Counter):
        super().__init__(
            live_updates=True,
            concurrency_count=blocks.max_threads,
            update_intervals=1,
            max_size=None,
            blocks=blocks,
            default_concurrency_limit=1,
        )
        self.sleep_when_free = SECONDS_BETWEEN_LOOKS
        self.listeners = listeners  # how many streams of answers are open, by session and by event
        self.turn = 0
        self.last_turn: dict[str, int] = {}

    async def push(self, body: Any, request: Any, username: str | None) -> Any:
        """Take a request, or raise HTTPException with the reason and the seconds to wait, before it costs anything."""
        fn = self.blocks.fns.get(body.fn_index)
        if fn is None:
            raise HTTPException(404, "There is no such event here. Load the page again.")
        if len(body.data) < len(fn.inputs):
            raise HTTPException(400, f"{len(fn.inputs)} values are needed here, got {len(body.data)}.")
        async with self.delete_lock:
            self._drop_unwanted(self.event_queue_per_concurrency_id.values())
        self._check_room(fn.concurrency_id, address_of(request), body.session_hash)
        return await super().push(body, request, username)

    def get_events(self) -> tuple[list[Event], bool, str] | None:
        """The next request to compute, with its lane; none where all wait for others of their lane."""
        for name, lane in self.event_queue_per_concurrency_id.items():
            if not lane.queue or lane.current_concurrency >= (lane.concurrency_limit or math.inf):
                continue
            self._drop_unwanted([lane])
            busy = {event.session_hash for event in self._computed(name)}
            free = [event for event in lane.queue if event.session_hash not in busy and self._may_begin(event)]
            if free:
                event = min(free, key=lambda event: self.last_turn.get(address_of(event.request), 0))
                lane.queue.remove(event)
                self._note_turn(address_of(event.request))
                return [event], False, name
        return None

    async def process_events(self, events: list[Event], *values: Any) -> None:
        """Compute a request; an answer that nobody comes for is not kept."""
        await super().process_events(events, *values)
        for event in events:
            asyncio.get_running_loop().call_later(LISTEN_SECONDS, self._forget_if_unwanted, event)

    def is_wanted(self, event_id: str | None) -> bool:
        """Whether somebody waits for the answer to a request, or may still be about to."""
        event = self.event_ids_to_events.get(event_id)
        return event is None or self._is_wanted(event)

    def _is_wanted(self, event: Event) -> bool:
        if not event.alive:  # gradio saw its client leave
            return False
        return self._has_listener(event) or time.monotonic() - event.enqueue_time < LISTEN_SECONDS

    def _may_begin(self, event: Event) -> bool:
        return self._has_listener(event) or not LANES.get(event.concurrency_id, CLICKS).costly

    def _has_listener(self, event: Event) -> bool:
        return self.listeners[event.session_hash] + self.listeners[event._id] > 0

    def _drop_unwanted(self, lanes: Any) -> None:
        for lane in lanes:
            for event in [event for event in lane.queue if not self._is_wanted(event)]:
                lane.queue.remove(event)
                self._forget(event)

    def _forget_if_unwanted(self, event: Event) -> None:
        if not self._is_wanted(event):
            self._forget(event)

    def _forget(self, event: Event) -> None:
        """Drop what gradio keeps for a request, and for its session where that has no other."""
        self.event_ids_to_events.pop(event._id, None)
        pending = self.pending_event_ids_session.get(event.session_hash, set())
        pending.discard(event._id)
        if not pending and not self.listeners[event.session_hash]:
            self.pending_event_ids_session.pop(event.session_hash, None)
            self.pending_messages_per_session.pop(event.session_hash, None)

    def _computed(self, name: str) -> list[Event]:
        """Requests of a lane that are being computed."""
        return [event for job in self.active_jobs for event in job or () if event.concurrency_id == name]

    def _check_room(self, name: str, address: str, session: str | None) -> None:
        lane = LANES.get(name, CLICKS)
        queue = self.event_queue_per_concurrency_id.get(name)
        taken = [*(queue.queue if queue else []), *self._computed(name)]
        of_session = sum(event.session_hash == session for event in taken)
        of_address = sum(address_of(event.request) == address for event in taken)
        if of_session >= lane.per_session:
            refuse(f"{of_session} of your requests are waiting already", self._seconds(lane, of_session))
        if of_address >= lane.per_address:
            refuse(f"{of_address} requests from your network are waiting already", self._seconds(lane, of_address))
        if len(taken) >= lane.in_all:
            refuse(f"{len(taken)} requests are waiting already", self._seconds(lane, len(taken)))

    def _seconds(self, lane: Lane, count: int) -> int:
        """About how long it takes until one of `count` requests is done, if they take as long as those before."""
        before = [taken for fn, taken in self.process_time_per_fn.items() if fn.concurrency_id == lane.name]
        done = sum(taken.count for taken in before)
        each = sum(taken.process_time for taken in before) / done if done else lane.seconds
        return max(1, math.ceil(each * count / lane.at_once))

    def _note_turn(self, address: str) -> None:
        if len(self.last_turn) >= REMEMBERED:
            self.last_turn.clear()
        self.turn += 1
        self.last_turn[address] = self.turn


def refuse(reason: str, seconds: int) -> None:
    """Raise HTTPException that says why a request is not taken, and when to try again."""
    message = f"{reason}. Try again in {seconds} second{'s' * (seconds != 1)}."
    raise HTTPException(429, message, headers={"Retry-After": str(seconds)})


def stop_if_unwanted() -> None:
    """Inside an event's handler: raise gr.Error if nobody waits for its answer any more."""
    blocks = LocalContext.blocks.get(None)
    if blocks is not None and not blocks._queue.is_wanted(LocalContext.event_id.get(None)):
        raise gr.Error(UNWANTED, print_exception=False)


def address_of(request: Any) -> str:
    """Whom a request comes from: an address, or of IPv6, where everybody has many, the network.

    Behind a proxy uvicorn has put the client there, as the last proxy that is trusted saw it: see `app.trust_proxy`.
    """
    return network_of(request.client.host if request.client else "")


@lru_cache(10_000)
def network_of(host: str) -> str:
    """An IPv4 address as it is, of an IPv6 address the first 64 bits."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host[:64]
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address), 64), strict=False))
