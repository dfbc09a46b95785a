# SPDX-License-Identifier: Apache-2.0
"""The Space for a crowd: what one visitor may take, who is next, what is dropped, and bounds on memory and files."""

import asyncio
import http.client
import io
import json
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from space_server import SPACE, Refused, SpaceServer, Visitor, answer_of, call, post, save_model_with_code

from efficientsam_hf import default_checkpoint


pytest.importorskip("gradio")
sys.path.append(str(SPACE))

import app
import intake
import limits
import pictures
import segmenting
import sessions
import waiting
from actions import Actions
from fastapi import HTTPException
from stored_files import FileStore
from test_space import status, to_bytes


COFFEE = (SPACE / "examples" / "coffee.jpg").read_bytes()
CAT = (SPACE / "examples" / "cat.jpg").read_bytes()
OFFICE, HOME, PHONE = "203.0.113.1", "203.0.113.2", "198.51.100.3"
# pycocotools' compiled part still speaks the array protocol of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# Numbers


@pytest.mark.parametrize("text", ["many", "0", "-3", "1.5", "1e6", "nan", "٣", "9" * 40])
def test_a_setting_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MAX_PIXELS", text)
    with pytest.raises(ValueError, match="setting MAX_PIXELS must be a whole number from 1, got '"):
        limits.setting("MAX_PIXELS", 7)


def test_settings_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_PIXELS", " 12 ")
    monkeypatch.setenv("CALLS_PER_ADDRESS", "3")
    assert limits.setting("MAX_PIXELS", 7) == 12 and limits.setting("MAX_BYTES", 7) == 7
    lane = limits.Lane("calls", 1, 9, 8, 7, 6).with_settings()
    assert lane == limits.Lane("calls", 1, 9, 3, 7, 6)


# Whose request it is


@pytest.mark.parametrize(
    "host, address",
    [
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::ffff", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("unknown", "unknown"),
        ("x" * 500, "x" * 64),
    ],
)
def test_of_ipv6_the_network_counts(host: str, address: str) -> None:
    assert waiting.address_of(SimpleNamespace(client=SimpleNamespace(host=host))) == address


@pytest.mark.parametrize(
    "forwarded, host",
    [
        ("203.0.113.9", "203.0.113.9"),
        ("1.2.3.4, 203.0.113.9", "203.0.113.9"),  # what a client says of itself comes first
        ("1.2.3.4, 203.0.113.9, 10.7.0.1", "203.0.113.9"),
        ("10.0.0.9, 203.0.113.9, 192.168.1.1, 100.64.0.2", "203.0.113.9"),
    ],
)
def test_on_a_space_the_last_address_that_is_no_proxys_counts(monkeypatch, forwarded: str, host: str) -> None:
    from uvicorn import Config
    from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

    monkeypatch.setenv("SPACE_ID", "a/b")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # would believe everything
    app.trust_proxy()
    seen: list[str] = []

    async def remember(scope, receive, send) -> None:
        seen.append(scope["client"][0])

    proxied = ProxyHeadersMiddleware(remember, Config(remember).forwarded_allow_ips)
    headers = [(b"x-forwarded-for", forwarded.encode())]
    for peer in ("10.20.0.3", "198.51.100.7"):  # a proxy of the Space, and somebody who got past it
        asyncio.run(proxied({"type": "http", "headers": headers, "client": (peer, 1)}, None, None))
    assert seen == [host, "198.51.100.7"]


def test_elsewhere_proxies_are_named_by_who_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    app.trust_proxy()
    assert "FORWARDED_ALLOW_IPS" not in os.environ
    monkeypatch.setenv("SPACE_ID", "a/b")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.1.1.1")
    app.trust_proxy()
    assert os.environ["FORWARDED_ALLOW_IPS"] == "10.1.1.1"


# The queue


class Function:
    """As much of an event's function as the queue looks at."""

    validator, batch, connection, fn = None, False, "sse", None

    def __init__(self, lane: limits.Lane):
        self.concurrency_id, self.concurrency_limit, self.api_name = lane.name, lane.at_once, lane.name
        self.inputs = ["picture"]


class Crowd:
    """A queue without a server: requests are put into it and taken out by hand."""

    def __init__(self):
        functions = [Function(lane) for lane in limits.LANES.values()]
        self.number = {function.concurrency_id: index for index, function in enumerate(functions)}
        config = SimpleNamespace(fns=dict(enumerate(functions)))
        state = defaultdict(lambda: SimpleNamespace(blocks_config=config))
        self.listeners: Counter = Counter()
        blocks = SimpleNamespace(max_threads=10, fns=config.fns, state_holder=state)
        self.queue = waiting.FairQueue(blocks, self.listeners)
        self.queue.active_jobs = [None] * 10

    async def send(self, lane: str, address: str, session: str | None = None, listens: bool = True) -> str:
        """Ask for something, and listen for the answer; -> the request's id."""
        request = SimpleNamespace(client=SimpleNamespace(host=address))
        body = SimpleNamespace(fn_index=self.number[lane], session_hash=session, data=[None], request=request)
        taken, event, _ = await self.queue.push(body, request, None)
        assert taken
        self.listeners[event] += listens
        return event

    def begin(self) -> Any:
        """Compute the next request, as gradio does; -> it, None where all have to wait."""
        found = self.queue.get_events()
        if found is None:
            return None
        (event,), _, lane = found
        self.queue.active_jobs[self.queue.active_jobs.index(None)] = [event]
        self.queue.event_queue_per_concurrency_id[lane].current_concurrency += 1
        return event

    def end(self, event: Any) -> None:
        """It is computed."""
        self.queue.active_jobs[self.queue.active_jobs.index([event])] = None
        self.queue.event_queue_per_concurrency_id[event.concurrency_id].current_concurrency -= 1


def in_crowd(test: Callable[[Crowd], Awaitable[None]]) -> None:
    """Run a test in an event loop of its own."""

    async def run() -> None:
        await test(Crowd())

    asyncio.run(run())


async def refusal(request: Awaitable[str]) -> HTTPException:
    with pytest.raises(HTTPException) as refused:
        await request
    assert refused.value.status_code == 429
    assert refused.value.headers == {"Retry-After": refused.value.detail.split()[-2]}
    return refused.value


@pytest.mark.parametrize("lane", limits.LANES.values(), ids=lambda lane: lane.name)
def test_requests_of_one_session_one_address_and_in_all_are_bounded(lane: limits.Lane) -> None:
    async def test(crowd: Crowd) -> None:
        for _ in range(lane.per_session):
            await crowd.send(lane.name, OFFICE, "session")
        refused = await refusal(crowd.send(lane.name, OFFICE, "session"))
        assert refused.detail.startswith(f"{lane.per_session} of your requests are waiting already. Try again in ")
        for number in range(lane.per_address - lane.per_session):
            await crowd.send(lane.name, OFFICE, f"other {number}")
        refused = await refusal(crowd.send(lane.name, OFFICE))
        assert f"{lane.per_address} requests from your network" in refused.detail
        for number in range(lane.in_all - lane.per_address):
            await crowd.send(lane.name, f"192.0.{number // 250}.{number % 250}")
        refused = await refusal(crowd.send(lane.name, HOME))
        assert refused.detail.startswith(f"{lane.in_all} requests are waiting already.")
        for other in set(limits.LANES) - {lane.name}:  # no lane is full because another one is
            await crowd.send(other, OFFICE, "session")

    in_crowd(test)


def test_what_is_computed_counts_until_it_is_done() -> None:
    async def test(crowd: Crowd) -> None:
        lane = limits.EVERYTHING
        for _ in range(lane.per_session):
            await crowd.send("everything", OFFICE, "session")
        event = crowd.begin()
        await refusal(crowd.send("everything", OFFICE, "session"))
        crowd.end(event)
        await crowd.send("everything", OFFICE, "session")

    in_crowd(test)


def test_the_time_to_wait_is_that_of_requests_before() -> None:
    async def test(crowd: Crowd) -> None:
        lane = limits.EVERYTHING
        for number in range(lane.per_address):
            await crowd.send("everything", OFFICE, f"session {number}")
        before = await refusal(crowd.send("everything", OFFICE))
        function = crowd.queue.blocks.fns[crowd.number["everything"]]
        crowd.queue.process_time_per_fn[function].add(2.0)
        crowd.queue.process_time_per_fn[function].add(4.0)
        after = await refusal(crowd.send("everything", OFFICE))
        assert before.headers["Retry-After"] == str(lane.seconds * lane.per_address)
        assert after.headers["Retry-After"] == str(3 * lane.per_address)

    in_crowd(test)


def test_addresses_take_turns() -> None:
    async def test(crowd: Crowd) -> None:
        for number in range(3):
            await crowd.send("pictures", OFFICE, f"office {number}")
        await crowd.send("pictures", HOME, "home")
        await crowd.send("pictures", PHONE, "phone")
        order = []
        while (event := crowd.begin()) is not None:
            order.append(event.session_hash)
            crowd.end(event)
        assert order == ["office 0", "home", "phone", "office 1", "office 2"]

    in_crowd(test)


def test_clicks_pass_while_everything_waits() -> None:
    async def test(crowd: Crowd) -> None:
        for number in range(limits.EVERYTHING.per_address):
            await crowd.send("everything", OFFICE, f"session {number}")
        assert crowd.begin().concurrency_id == "everything" and crowd.begin() is None
        await crowd.send("clicks", OFFICE, "session 0")
        await crowd.send("pictures", HOME, "home")
        assert {crowd.begin().concurrency_id, crowd.begin().concurrency_id} == {"clicks", "pictures"}

    in_crowd(test)


def test_clicks_of_one_visitor_stay_in_order() -> None:
    async def test(crowd: Crowd) -> None:
        crowd.queue.blocks.fns[crowd.number["clicks"]].concurrency_limit = 2
        first, second = [await crowd.send("clicks", OFFICE, "session") for _ in range(2)]
        await crowd.send("clicks", OFFICE, "other")
        event = crowd.begin()
        assert event._id == first and crowd.begin().session_hash == "other" and crowd.begin() is None
        crowd.end(event)
        assert crowd.begin()._id == second

    in_crowd(test)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The queue's time, in an item that tests set."""
    now = [1000.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    return now


def test_requests_that_nobody_waits_for_are_dropped(clock: list[float]) -> None:
    async def test(crowd: Crowd) -> None:
        for _ in range(limits.EVERYTHING.per_session):
            await crowd.send("everything", OFFICE, "gone", listens=False)
        kept = [await crowd.send("everything", OFFICE, "there", listens=False), await crowd.send("everything", HOME)]
        crowd.listeners["there"] += 1  # by the session, as the page does; programs listen by the event
        clock[0] += limits.LISTEN_SECONDS - 0.1
        await refusal(crowd.send("everything", OFFICE, "gone"))
        clock[0] += 0.2
        kept.append(await crowd.send("everything", OFFICE, "gone"))  # it has come back
        begun = []
        while (event := crowd.begin()) is not None:
            begun.append(event._id)
            crowd.end(event)
        assert set(begun) == set(kept) == set(crowd.queue.event_ids_to_events)

    in_crowd(test)


@pytest.mark.parametrize("lane", limits.LANES.values(), ids=lambda lane: lane.name)
def test_what_is_costly_begins_when_somebody_listens(lane: limits.Lane) -> None:
    async def test(crowd: Crowd) -> None:
        first = await crowd.send(lane.name, OFFICE, listens=False)
        second = await crowd.send(lane.name, HOME)
        assert crowd.begin()._id == (second if lane.costly else first)
        assert lane.costly == (lane is not limits.CLICKS)

    in_crowd(test)


def test_a_client_that_gradio_saw_leave_is_not_computed() -> None:
    async def test(crowd: Crowd) -> None:
        event = await crowd.send("everything", OFFICE, "gone")
        crowd.queue.event_ids_to_events[event].alive = False
        assert crowd.begin() is None and "gone" not in crowd.queue.pending_messages_per_session

    in_crowd(test)


def test_what_is_computed_ends_when_nobody_waits_for_it(clock: list[float], monkeypatch) -> None:
    from gradio.context import LocalContext
    from gradio.exceptions import Error

    async def test(crowd: Crowd) -> None:
        event = await crowd.send("everything", OFFICE, listens=False)
        LocalContext.blocks.set(SimpleNamespace(_queue=crowd.queue))
        LocalContext.event_id.set(event)
        waiting.stop_if_unwanted()
        clock[0] += limits.LISTEN_SECONDS
        crowd.listeners[event] += 1
        waiting.stop_if_unwanted()
        crowd.listeners[event] -= 1
        with pytest.raises(Error, match="Nobody waits"):
            waiting.stop_if_unwanted()

    in_crowd(test)


@pytest.mark.parametrize("number, values, code", [(99, 1, 404), (-1, 1, 404), (None, 1, 404), (0, 0, 400)])
def test_requests_for_what_is_not_there_are_refused(number, values: int, code: int) -> None:
    async def test(crowd: Crowd) -> None:
        body = SimpleNamespace(fn_index=number, session_hash="a", data=[None] * values)
        with pytest.raises(HTTPException) as refused:
            await crowd.queue.push(body, SimpleNamespace(client=None), None)
        assert refused.value.status_code == code and refused.value.detail

    in_crowd(test)


# Before gradio reads a request


def ask(
    door: intake.Intake, body: list[bytes], *, path: str = "/gradio_api/queue/join", cut: bool = False, **headers: Any
) -> tuple[int, str]:
    """Send a request of some parts to the middleware; -> status and text of the answer."""
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    if cut:
        parts.append({"type": "http.disconnect"})
    else:
        parts[-1]["more_body"] = False
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return parts.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    named = [(name.replace("_", "-").encode(), str(value).encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": named, "client": (OFFICE, 1)}
    asyncio.run(door({**scope, "query_string": b""}, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


async def read_all(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
    """An app that reads a request and says how long it was."""
    length, more = 0, True
    while more:
        message = await receive()
        length += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


@pytest.fixture
def door(tmp_path: Path) -> intake.Intake:
    return intake.Intake(read_all, Counter(), store(tmp_path, {}))


def test_requests_of_many_bytes_are_refused(door: intake.Intake) -> None:
    assert ask(door, [b"x" * 60_000, b"y" * 40_000]) == (200, "100000")
    with pytest.raises(intake.HTTPException, match="at most 100,000 bytes"):
        ask(door, [b"x" * 60_000, b"y" * 40_001])


def test_uploads_say_how_long_they_are(door: intake.Intake) -> None:
    upload = {"path": "/gradio_api/upload"}
    assert ask(door, [b"xy"], **upload, content_length=2) == (200, "2")
    assert ask(door, [b"xy"], **upload)[0] == 411
    status_code, text = ask(door, [b"xy"], **upload, content_length=limits.MAX_BYTES + 20_000)
    assert status_code == 413 and "maximum allowed size, 30,000,000 bytes" in text
    with pytest.raises(intake.MultiPartException) as refused:
        ask(door, [b"xyz"], **upload, content_length=2)
    assert "maximum allowed size, 2 bytes" in refused.value.message
    with pytest.raises(intake.MultiPartException) as refused:
        ask(door, [b"x"], **upload, content_length=2, cut=True)
    assert "cut short" in refused.value.message
    assert not door.uploads and not door.connections and not door.files.coming


def test_connections_and_uploads_of_an_address_are_bounded(door: intake.Intake) -> None:
    door.uploads[OFFICE] = limits.UPLOADS_PER_ADDRESS
    status_code, text = ask(door, [b"xy"], path="/gradio_api/upload", content_length=2)
    assert status_code == 429 and "Too many uploads from your network" in text and "try again in a minute" in text
    door.connections[OFFICE] = limits.CONNECTIONS_PER_ADDRESS
    status_code, text = ask(door, [b"xy"])
    assert status_code == 429 and "Too many connections" in json.loads(text)["detail"]


@pytest.mark.parametrize(
    "path, query, key",
    [
        ("/gradio_api/queue/data", b"session_hash=abc&x=1", "abc"),
        ("/gradio_api/queue/data", b"", None),
        ("/gradio_api/call/segment_box/ev1", b"", "ev1"),
        ("/gradio_api/call/v2/segment_box/ev2/", b"", "ev2"),
        ("/gradio_api/heartbeat/abc", b"", None),
        ("/", b"", None),
    ],
)
def test_open_streams_are_known_by_session_or_event(path: str, query: bytes, key: str | None) -> None:
    assert intake.awaited({"method": "GET", "path": path, "query_string": query}) == key
    assert intake.awaited({"method": "POST", "path": path, "query_string": query}) is None


# Files


def store(folder: Path, ages: dict[str, float], most: int = 350, keep: tuple[str, ...] = ()) -> FileStore:
    """Files of 100 bytes that were written so many seconds ago, listed as gradio lists them, and one that is gone."""
    import os

    import gradio as gr

    for name, age in ages.items():
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (time.time() - age,) * 2)
    paths = [str(folder / name) for name in ages]
    component = gr.Textbox(render=False)
    component.keep_in_cache = {str(folder / name) for name in keep}
    sets = [set(paths[:2]), set(paths[1:]), {str(folder / "gone")}]
    return FileStore(SimpleNamespace(temp_file_sets=sets, blocks={1: component}), most)


def test_the_oldest_files_go_first_and_new_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "somebody else's").write_bytes(bytes(1000))
    ages = {"icon": 9000, "old": 900, "older": 1800, "new": 1, "newer": 0, "last": 300}
    files = store(tmp_path, ages, keep=("icon",))
    assert files.make_room()  # five of 100 bytes count, 350 may stay
    assert {path.name for path in tmp_path.iterdir()} == {"somebody else's", "icon", "last", "new", "newer"}
    assert {Path(path).name for path in set.union(*files.blocks.temp_file_sets)} == {"icon", "last", "new", "newer"}
    with files.reserve(200):
        assert not files.make_room()  # what was just written stays
        assert {"new", "newer"} <= {path.name for path in tmp_path.iterdir()} and not (tmp_path / "last").exists()
    assert files.make_room()


def test_an_upload_for_which_there_is_no_room_is_refused(tmp_path: Path) -> None:
    door = intake.Intake(read_all, Counter(), store(tmp_path, {"a": 0, "b": 0, "c": 0}))
    upload = {"path": "/gradio_api/upload"}
    assert ask(door, [bytes(50)], **upload, content_length=50)[0] == 200
    status_code, text = ask(door, [bytes(51)], **upload, content_length=51)
    assert status_code == 429 and "no room for more pictures" in text and "Try again in a minute" in text


# Memory


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[..., sessions.Session]:
    """Sessions of a megabyte, of which a third can be made again; those that were held first are away longest."""
    monkeypatch.setattr(sessions.SessionsWithPictures, "_watch", lambda self: None)
    image = Image.new("RGB", (30, 20))
    picture = pictures.Picture(bytes(600_000), "a.png", image.size)
    embedding = segmenting.Embedding(torch.zeros(100_000), (20, 30), 1.0)
    now = [1000.0]

    def hold(held: sessions.SessionsWithPictures, tab: str, address: str = OFFICE) -> sessions.Session:
        now[0] += 1
        session = sessions.Session()
        held.hold(tab, session, address)
        with session.in_use():
            session.take(sessions.Prepared.of(picture, image, embedding))
            session.view = session.small = image
        session.deadline = now[0]
        return session

    return hold


def test_what_can_be_made_again_goes_first_and_then_whole_sessions(held) -> None:
    many = sessions.SessionsWithPictures(most=2_500_000)
    first, second, third = (held(many, tab) for tab in "abc")
    assert first.nbytes == 600_000 + 400_000 + 2 * 1800
    many.fit()
    assert [session.spares for session in (first, second, third)] == [False, False, True]
    assert all(session.picture for session in (first, second, third))
    with first.in_use():
        held(many, "d"), held(many, "e")
        many.fit()
        assert first.picture and second.picture is None
    assert sum(session.nbytes for session in many.by_tab.values()) <= many.most


def test_memory_is_taken_from_the_address_that_holds_the_most(held) -> None:
    many = sessions.SessionsWithPictures(most=3_500_000)
    visitor = held(many, "visitor", HOME)  # away longest
    abusers = [held(many, f"abuser {number}", OFFICE) for number in range(6)]
    many.fit()
    assert visitor.picture and visitor.spares
    assert sum(session.picture is None for session in abusers) >= 1


def test_sessions_in_use_keep_what_they_hold(held) -> None:
    many = sessions.SessionsWithPictures(most=1)
    session = held(many, "a")
    with session.in_use():
        many.fit()
        assert session.spares
    many.fit()
    assert session.picture is None


@pytest.fixture(scope="module")
def segmenter() -> segmenting.Segmenter:
    return segmenting.Segmenter(default_checkpoint(), trust_remote_code=False)


def test_an_embedding_that_was_forgotten_is_made_again_to_the_same_masks(segmenter, tmp_path: Path) -> None:
    (tmp_path / "coffee.jpg").write_bytes(COFFEE)
    actions = Actions(segmenter, None)
    picture, image = pictures.read_picture(tmp_path / "coffee.jpg")
    (tmp_path / "coffee.jpg").unlink()  # the upload is not needed any more
    session = sessions.Session()
    session.take(sessions.Prepared.of(picture, image, segmenter.embed(image)))
    prompts = sessions.Prompts([sessions.Click(290, 180, 1)])
    answers = []
    for _ in range(2):
        actions._decode(session, prompts)
        answers.append(session.candidates)
        session.forget_spares()
    assert session.embedding is None
    assert torch.equal(answers[0].logits, answers[1].logits) and answers[0].scores == answers[1].scores


def test_what_masks_cover_of_the_view_is_made_again() -> None:
    image = Image.new("RGB", (40, 30))
    session = sessions.Session()
    picture = pictures.Picture(to_bytes(image, "PNG"), "a.png", image.size)
    session.take(sessions.Prepared.of(picture, image, segmenting.Embedding(torch.zeros(1), (30, 40), 1.0)))
    mask = np.zeros((30, 40), bool)
    mask[5:20, 10:30] = True
    from rle import encode_mask

    values = np.ones(1)
    session.keep_everything(segmenting.Everything([encode_mask(mask)], values, values, values, (30, 40), 8, 1.0))
    (window, corner) = session.windows[0]
    taken = session.nbytes
    session.forget_spares()
    assert session.nbytes < taken - window.size
    again, same = session.windows[0]
    assert (again == window).all() and same == corner


def test_an_example_is_encoded_once(segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    embed = segmenter.embed
    monkeypatch.setattr(segmenter, "embed", lambda image: encoded.append(image) or embed(image))
    actions = Actions(segmenter, None)
    assert actions._example("Cat") is actions._example("Cat") and len(encoded) == 1


# The server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceServer]:
    """With limits that two visitors reach."""
    folder = tmp_path_factory.mktemp("space")
    small = {"EVERYTHING_PER_ADDRESS": 2, "EVERYTHING_IN_ALL": 3, "LISTEN_SECONDS": 3, "VISITORS": 3}
    with SpaceServer(
        folder, save_model_with_code(folder / "model"), threads=1, SESSIONS_BYTES=11_200_000, **small
    ) as running:
        yield running


def everything_of(visitor: Visitor) -> str:
    """The inputs of a call that takes a while."""
    return json.dumps({"data": [visitor.upload(COFFEE, "coffee.jpg"), 32, None, None]})


def wait_until_idle(server: SpaceServer) -> None:
    """Until no request waits any more, and none that was begun holds up the next."""
    visitor = Visitor(server.url)
    data = json.dumps({"data": [visitor.upload(CAT, "cat.jpg"), 8, None, None]})
    for _ in range(600):
        if json.loads(visitor._get("/gradio_api/queue/status"))["queue_size"] == 0:
            call(server.url, "segment_everything", data, "192.0.2.77")
            return
        time.sleep(0.1)
    raise TimeoutError("the Space is still busy")


def test_one_client_shuts_nobody_out(server: SpaceServer) -> None:
    visitor = Visitor(server.url, HOME)
    visitor.load(COFFEE, "coffee.jpg")
    answer = status(visitor.click(580, 360))
    data, refused, events = everything_of(visitor), [], []
    for number in range(64):  # what a client says of itself does not make it another one
        try:
            events.append(post(server.url, "segment_everything", data, f"192.0.2.{number}, {OFFICE}"))
        except Refused as error:
            refused.append(json.loads(str(error))["detail"])
    assert len(events) == 2 and len(refused) == 62
    assert set(refused) == {refused[0]} and refused[0].startswith("2 requests from your network are waiting already.")
    visitor.send("undo")
    assert answer.partition("Decoded")[0] == status(visitor.click(580, 360)).partition("Decoded")[0]
    assert "encoded once" in status(visitor.send("load_example", "Cat"))
    post(server.url, "segment_everything", data, HOME)
    with pytest.raises(Refused, match="3 requests are waiting already"):
        post(server.url, "segment_everything", data, PHONE)
    quick = json.dumps({"data": [json.loads(data)["data"][0], [[290, 180]], [1], None]})
    coco, _ = call(server.url, "segment_points", quick)
    assert len(coco["annotations"]) == 3
    wait_until_idle(server)  # nobody waited for the answers: they were dropped
    for event in events:
        with pytest.raises((Refused, OSError, http.client.HTTPException)):
            answer_of(server.url, "segment_everything", event)


def test_a_page_that_is_refused_says_when_to_try_again(server: SpaceServer) -> None:
    visitor = Visitor(server.url, OFFICE)
    visitor.load(CAT)
    visitor.look["mode"] = "Everything"
    for _ in range(2):
        visitor.post("find_everything", 32)
    with pytest.raises(Refused, match=r"2 of your requests are waiting already. Try again in \d+ seconds?\."):
        visitor.send("find_everything", 8)
    wait_until_idle(server)
    assert "masks shown" in status(visitor.send("find_everything", 8))


def test_an_embedding_that_had_to_go_changes_no_answer(server: SpaceServer) -> None:
    visitors = [Visitor(server.url, address) for address in (OFFICE, HOME)]
    answers = []
    for visitor in visitors:
        visitor.load(COFFEE, "coffee.jpg")
        visitor.click(580, 360)
        answers.append(visitor.mask_files()["mask.png"])
    # Three do not fit with all that was made of their pictures, and with their pictures they do.
    visitors.append(Visitor(server.url, PHONE))
    visitors[2].load(CAT)
    for visitor, answer in zip(visitors, answers):
        visitor.send("reset")
        visitor.click(580, 360)
        assert visitor.mask_files()["mask.png"] == answer


def test_a_visitor_whom_gradio_forgot_goes_on(server: SpaceServer) -> None:
    visitor = Visitor(server.url, HOME)
    visitor.load(COFFEE)
    before = status(visitor.click(580, 360))
    for _ in range(5):  # more than gradio remembers
        Visitor(server.url, OFFICE).send("redraw")
    visitor.send("undo")
    assert status(visitor.click(580, 360)).partition("Decoded")[0] == before.partition("Decoded")[0]


def test_uploads_that_are_cut_short_leave_nothing(server: SpaceServer) -> None:
    def files() -> set[Path]:
        return {path for path in server.cache.rglob("*") if path.is_file()}

    before = files()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000000\r\n\r\n"
        part = '--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + "x" * 200_000
        connection.sendall(f"POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\n{head}{part}".encode())
        for _ in range(100):
            if files() != before:
                break
            time.sleep(0.05)
        assert files() != before
    for _ in range(100):
        if files() == before:
            break
        time.sleep(0.05)
    assert files() == before


def test_nothing_gets_past_the_queue(server: SpaceServer) -> None:
    visitor = Visitor(server.url)
    body = everything_of(visitor).encode()
    for path in ("/gradio_api/run/segment_everything", "/gradio_api/api/segment_everything"):
        with pytest.raises(Refused, match="join the queue"):
            visitor._post(path, body, "application/json")


HOSTILE_INDICES = [None, "x", {"a": 1}, [1, 2, 3], [10**400, 1], [True, 2], [[1, 2]], -1, float("nan")]
HOSTILE_EVENTS = [None, {}, [], "x", *({"index": index} for index in HOSTILE_INDICES)]


def test_hostile_posts_are_answered_and_the_visitor_goes_on(server: SpaceServer) -> None:
    visitor = Visitor(server.url)
    visitor.load(COFFEE)
    for event in HOSTILE_EVENTS:
        with pytest.raises(Refused, match="A click must be at two numbers"):
            visitor.send("click", event=event)
        visitor.send("choose", event=event)
    for name in (["Cat"], {}, None, 7, "../cat.jpg"):
        with pytest.raises(Refused, match="There is no such example"):
            visitor.send("load_example", name)
    for look in ({"mode": None}, {"kind": None}):
        other = Visitor(server.url)
        other.session = visitor.session
        other.look |= look
        with pytest.raises(Refused, match="Choose a mode"):
            other.send("redraw")
    for look in ({"transparency": 1e308}, {"predicted_iou": -5}, {"stability": 10**30}, {"mode": "x"}, {"kind": [1]}):
        other.look = {**visitor.look, **look}
        with pytest.raises(Refused):
            other.send("redraw")
    image = json.dumps(visitor.upload(COFFEE, "a.jpg"))
    many = json.dumps([[1, 1]] * 1_000_000)
    with pytest.raises(Refused, match="at most 100,000 bytes"):
        call(server.url, "segment_points", f'{{"data": [{image}, {many}, null, null]}}')
    with pytest.raises(Refused, match="at most 100,000 bytes"):
        visitor.send("add", "9" * 200_000)
    with pytest.raises(Refused, match="4 values are needed here, got 1"):
        call(server.url, "segment_points", f'{{"data": [{image}]}}')
    assert "Decoded in" in status(visitor.click(580, 360))


def test_sessions_of_others_are_of_no_use(server: SpaceServer) -> None:
    visitor, stranger = Visitor(server.url, HOME), Visitor(server.url, OFFICE)
    visitor.load(COFFEE)
    shown = visitor.click(580, 360)
    stranger.load(CAT)
    for given in (visitor.session, {"session": visitor.session}, shown["canvas"]):  # in place of the state
        handler = stranger.events["click"]
        body = {
            "data": [given, *stranger.look.values()],
            "event_data": {"index": [3, 3], "value": None},
            "fn_index": handler["id"],
            "session_hash": stranger.session,
        }
        stranger._post("/gradio_api/queue/join", json.dumps(body).encode(), "application/json")
        assert any(message["msg"] == "process_completed" for message in stranger._messages())
    with Image.open(io.BytesIO(stranger.mask_files()["mask.png"])) as mask:
        assert mask.size == (451, 300)
