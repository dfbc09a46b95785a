# SPDX-License-Identifier: Apache-2.0
"""Whatever is sent to the Space, its checks let through what is documented, or say in a short text what is wrong."""

import io
import json
import math
import sys
from ipaddress import IPv6Address
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from property_testing import bounded
from space_server import SPACE


pytest.importorskip("gradio")
sys.path.append(str(SPACE))

import actions
import endpoints
import limits
import pictures
import segmenting
import waiting


pytestmark = pytest.mark.property

LONGEST_MESSAGE = 300
SIZE = (30, 40)
numbers = st.one_of(
    st.floats(), st.integers(), st.integers(-5, 45), st.floats(-5, 45), st.sampled_from([10**400, -0.0, 1e308, True])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=500)),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=20,
)
points = st.one_of(values, st.lists(st.lists(numbers, min_size=2, max_size=2), max_size=40))
labels = st.one_of(values, st.lists(st.sampled_from([0, 1, 1.0, 2]), max_size=40))
boxes = st.one_of(values, st.lists(numbers, min_size=4, max_size=4))


def refused(call: Any, *arguments: Any) -> bool:
    """Whether it raises InputError, whose text is short."""
    try:
        call(*arguments)
    except pictures.InputError as error:
        assert 0 < len(str(error)) <= LONGEST_MESSAGE
        return True
    return False


@given(points, labels, boxes, st.booleans())
@bounded
def test_prompts_are_inside_the_picture_or_refused(points: Any, labels: Any, box: Any, as_text: bool) -> None:
    def read(value: Any, name: str) -> Any:
        return endpoints.parse(json.dumps(value) if as_text else value, name)

    if refused(
        lambda: segmenting.check_prompts(read(points, "points"), read(labels, "labels"), read(box, "box"), SIZE)
    ):
        return
    if as_text:
        points, labels, box = (json.loads(json.dumps(value)) for value in (points, labels, box))
    height, width = SIZE
    assert len(points) == len(labels) <= segmenting.MAX_POINTS and set(labels) <= {0, 1}
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert box is not None or 1 in labels
    if box is not None:
        assert box[0] < box[2] and box[1] < box[3] and all(map(math.isfinite, box))


@given(values)
@bounded
def test_single_values_are_read_or_refused(value: Any) -> None:
    if not refused(endpoints.check_threshold, value):
        assert 0 <= value <= 1
    if not refused(segmenting.check_grid, value, [8, 16]):
        assert value in (8, 16)
    if not refused(endpoints.check_whole, value):
        assert value in (None, True, False)
    if not refused(actions.check_place, actions.index_of(SimpleNamespace(_data={"index": value}))):
        assert len(value) == 2 and all(map(math.isfinite, value))
    if not refused(actions.parse_coordinates, value):
        assert len(actions.parse_coordinates(value)) in (2, 4)
    refused(actions.check_place, actions.index_of(SimpleNamespace(_data=value)))
    assert len(pictures.picture_name(str(value))) <= 80


@given(
    st.one_of(st.text(max_size=200), st.ip_addresses(v=4).map(str)), st.ip_addresses(v=6), st.integers(0, 2**64 - 1)
)
@bounded
def test_every_client_has_an_address(host: str, network: IPv6Address, other: int) -> None:
    assert len(waiting.network_of(host)) <= 64
    same = IPv6Address(int(network) >> 64 << 64 | other)
    if network.ipv4_mapped is None and same.ipv4_mapped is None:
        assert waiting.network_of(str(network)) == waiting.network_of(str(same))


@given(st.text(alphabet="0123456789 -+_.ex", max_size=30))
@bounded
def test_settings_are_whole_numbers_or_refused(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAX_PIXELS", text)
        try:
            number = limits.setting("MAX_PIXELS", 7)
        except ValueError as error:
            assert str(error).startswith("the setting MAX_PIXELS must be a whole number from 1")
        else:
            assert number == (int(text) if text.strip() else 7) >= 1


def picture_files() -> list[bytes]:
    """A small picture in each format that is read."""
    files = []
    for kind in pictures.FORMATS:
        buffer = io.BytesIO()
        Image.effect_noise((40, 30), 90).convert("RGB").save(buffer, kind)
        files.append(buffer.getvalue())
    return files


FILES = picture_files()


@given(st.sampled_from(FILES), st.data())
@bounded
def test_damaged_pictures_are_read_or_refused(content: bytes, data: st.DataObject) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 5))):
        # Headers say most, so most damage is there.
        place = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(changed) - 1)))
        changed[min(place, len(changed) - 1)] = data.draw(st.integers(0, 255))
    cut = bytes(changed[: data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))])
    if not refused(pictures.decode, cut):
        image = pictures.decode(cut)
        assert image.mode == "RGB" and image.width * image.height <= limits.MAX_PIXELS
