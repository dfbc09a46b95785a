# SPDX-License-Identifier: Apache-2.0
"""The Space in a real browser: `make test-browser`. Skips without Chromium; screenshots go to outputs/space."""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from space_server import SPACE, Refused, SpaceServer, Visitor, post, save_model_with_code

from efficientsam_hf import EfficientSamModel, EfficientSamPredictor, EfficientSamProcessor, default_checkpoint


pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-ui-for-media-stream --use-fake-device-for-media-stream"
)
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
WAIT = 60_000  # milliseconds; the machine may be busy
expect.set_options(timeout=WAIT)
COFFEE = SPACE / "examples" / "coffee.jpg"
CAT = SPACE / "examples" / "cat.jpg"
SIZE = (600, 400)
# Pixels of the coffee: on the cup, and a second one that the first one's mask holds too.
SAUCER, CUP = (450, 230), (290, 260)
BOX = ((172, 17), (410, 305))
SAME = 1e-3  # part of the pixels; threads of the server may differ from ours


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceServer]:
    folder = tmp_path_factory.mktemp("space")
    with SpaceServer(folder, save_model_with_code(folder / "model"), threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield running
        running.close()


@pytest.fixture(scope="module")
def predictor() -> EfficientSamPredictor:
    """The model's own answers on the coffee."""
    model = EfficientSamModel.from_pretrained(default_checkpoint()).eval()
    predictor = EfficientSamPredictor(model, EfficientSamProcessor.from_pretrained(default_checkpoint()))
    predictor.set_image(Image.open(COFFEE))
    return predictor


@pytest.fixture(scope="module")
def screenshots(root: Path) -> Path:
    folder = root / "outputs" / "space"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Tab:
    """One visitor's tab. Errors of the page are collected."""

    def __init__(self, browser: Any, url: str, **options: Any):
        self.context = browser.new_context(**{**DESKTOP, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(re.sub(r"^(\w+://[^/]*).*", r"\1", request.url)))
        self.page.goto(url)
        self.page.wait_for_selector("#upload")

    def upload(self, path: Path) -> None:
        """Choose a file, and wait until it is on the canvas."""
        self.page.locator("#upload input[type=file]").first.set_input_files(path)
        self.page.wait_for_selector("#canvas img")
        self.wait_for_status("encoded once")

    def click(self, point: tuple[float, float], expect: str, size: tuple[int, int] = SIZE) -> tuple[float, float]:
        """Click on a pixel of a picture of `size`; -> the pixel that the browser's whole coordinates stand for."""
        image = self.page.locator("#canvas img")
        image.scroll_into_view_if_needed()
        box = image.bounding_box()
        self.page.evaluate(REMEMBER_CLICK)
        x, y = (value / side * box[length] for value, side, length in zip(point, size, ("width", "height")))
        image.click(position={"x": x, "y": y})
        self.wait_for_status(expect)
        *view, side = self.page.evaluate("window.clicked")
        return tuple(round((value + 0.5) * max(size) / side - 0.5, 1) for value in view)

    def mode(self, name: str) -> None:
        """Pick a mode."""
        self.page.locator("#mode").get_by_text(name, exact=True).click()
        self.page.wait_for_function(
            "name => document.querySelector('#hint').innerText.includes(name)", arg=HINT_OF[name]
        )

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def status(self) -> str:
        return self.page.locator("#status").inner_text()

    def wait_for_status(self, text: str) -> None:
        self.page.wait_for_function("text => document.querySelector('#status')?.innerText.includes(text)", arg=text)

    def canvas_address(self) -> str:
        """Changes with what the canvas shows, and only then: files are named by their content."""
        return self.page.locator("#canvas img").get_attribute("src")

    def wait_for_canvas(self, accepts: Callable[[str], bool]) -> str:
        """Wait until the canvas shows another picture."""
        for _ in range(WAIT // 100):
            address = self.canvas_address()
            if accepts(address):
                return address
            self.page.wait_for_timeout(100)
        raise TimeoutError(f"the canvas still shows {address}")

    def files(self) -> dict[str, bytes]:
        """Make the files, and download each by its link."""
        self.page.wait_for_function("!document.querySelector('#make_files').disabled")
        self.press("Make files to download")
        self.page.wait_for_selector("#files a")
        contents = {}
        for link in self.page.locator("#files a").all():
            with self.page.expect_download() as download:
                link.click()
            contents[download.value.suggested_filename] = Path(download.value.path()).read_bytes()
        return contents

    def mask(self) -> np.ndarray:
        with Image.open(io.BytesIO(self.files()["mask.png"])) as image:
            return np.asarray(image) > 127

    def close(self) -> None:
        self.context.close()


# The browser's own arithmetic from the place of a click to a pixel of the view.
REMEMBER_CLICK = """() => {
    const image = document.querySelector("#canvas img")
    image.addEventListener("click", event => {
        const frame = image.getBoundingClientRect()
        const scale = frame.width / image.naturalWidth
        window.clicked = [
            Math.round((event.clientX - frame.left) / scale), Math.round((event.clientY - frame.top) / scale),
            Math.max(image.naturalWidth, image.naturalHeight)
        ]
    }, {once: true, capture: true})
}"""
HINT_OF = {"Click": "Click on the object", "Box": "one corner", "Everything": "Press the button"}


@pytest.fixture
def open_tab(browser: Any, server: SpaceServer) -> Iterator[Callable[..., Tab]]:
    tabs: list[Tab] = []

    def open_one(**options: Any) -> Tab:
        tabs.append(Tab(browser, server.url, **options))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        tab.close()
        assert not tab.errors


@pytest.fixture
def tab(open_tab: Callable[..., Tab]) -> Tab:
    return open_tab()


def best(predictor: EfficientSamPredictor, **prompts: Any) -> np.ndarray:
    masks, scores, _ = predictor.predict(**prompts)
    return masks[scores.argmax()]


def differ(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float((first != second).mean())


def test_upload_click_and_download(tab: Tab, predictor: EfficientSamPredictor) -> None:
    tab.upload(COFFEE)
    plain = tab.canvas_address()
    point = tab.click(SAUCER, "Decoded in")
    assert np.abs(np.subtract(point, SAUCER)).max() <= 1
    tab.wait_for_canvas(lambda address: address != plain)
    assert re.search(r"Predicted IoU 0\.\d\d, .* Decoded in [\d,]+ ms, the picture encoded once in", tab.status())
    expect(tab.page.locator("#gallery button img")).to_have_count(3)
    files = tab.files()
    own = best(predictor, point_coords=[point])
    assert set(files) == {"cutout.png", "mask.png", "overlay.jpg", "masks.json"}
    mask = np.asarray(Image.open(io.BytesIO(files["mask.png"]))) > 127
    assert differ(mask, own) < SAME
    cutout = np.asarray(Image.open(io.BytesIO(files["cutout.png"])))
    assert cutout.shape[2] == 4 and (cutout[..., 3] > 0).sum() == mask.sum()
    assert Image.open(io.BytesIO(files["overlay.jpg"])).size == SIZE
    assert json.loads(files["masks.json"])["annotations"][0]["area"] == mask.sum()


@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_pictures_that_a_camera_took_upright(open_tab, predictor, tmp_path: Path, device: dict) -> None:
    with Image.open(COFFEE) as coffee:
        upright = coffee.transpose(Image.Transpose.ROTATE_270)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "upright.jpg", exif=exif, quality=95)
    tab = open_tab(**device)
    tab.upload(tmp_path / "upright.jpg")
    frame = tab.page.locator("#canvas img").bounding_box()
    assert frame["height"] > 1.4 * frame["width"] and frame["height"] < device["viewport"]["height"]
    point = tab.click((150, 450), "Decoded in", (400, 600))
    assert np.abs(np.subtract(point, (150, 450))).max() <= 2
    own = EfficientSamPredictor(predictor.model, predictor.processor)
    own.set_image(tmp_path / "upright.jpg")  # the processor turns files the same way
    assert differ(tab.mask(), best(own, point_coords=[point])) < SAME


def test_background_click_takes_area_away(tab: Tab, predictor: EfficientSamPredictor) -> None:
    tab.upload(COFFEE)
    first = tab.click(SAUCER, "Decoded in")
    before = tab.mask()
    tab.page.locator("#kind").get_by_text("Background").click()
    drawn = tab.canvas_address()
    second = tab.click(CUP, "Decoded in")
    tab.wait_for_canvas(lambda address: address != drawn)
    after = tab.mask()
    assert differ(after, best(predictor, point_coords=[first, second], point_labels=[1, 0])) < SAME
    assert after.sum() < 0.5 * before.sum()
    assert before[CUP[1], CUP[0]] and not after[CUP[1], CUP[0]]


def test_box_shows_its_first_corner_and_then_the_mask(tab: Tab, predictor: EfficientSamPredictor) -> None:
    tab.upload(COFFEE)
    tab.mode("Box")
    expect(tab.page.locator("#kind")).to_be_hidden()
    plain = tab.canvas_address()
    first = tab.click(BOX[1], "opposite corner")
    corner = tab.wait_for_canvas(lambda address: address != plain)
    second = tab.click(BOX[0], "Decoded in")
    tab.wait_for_canvas(lambda address: address != corner)
    assert differ(tab.mask(), best(predictor, box=[*second, *first])) < SAME


def test_undo_and_reset(tab: Tab) -> None:
    tab.upload(COFFEE)
    plain = tab.canvas_address()
    tab.click(SAUCER, "Decoded in")
    once = tab.wait_for_canvas(lambda address: address != plain)
    tab.click(CUP, "Decoded in")
    tab.wait_for_canvas(lambda address: address not in (plain, once))
    tab.press("Undo")
    assert tab.wait_for_canvas(lambda address: address == once)
    tab.press("Reset")
    assert tab.wait_for_canvas(lambda address: address == plain)
    tab.wait_for_status("600 x 400 pixels")
    expect(tab.page.locator("#gallery")).to_be_hidden()
    expect(tab.page.locator("#make_files")).to_be_disabled()


def test_another_of_the_three_masks(tab: Tab, predictor: EfficientSamPredictor) -> None:
    tab.upload(COFFEE)
    point = tab.click(SAUCER, "Decoded in")
    drawn = tab.canvas_address()
    tab.page.locator("#gallery button").nth(1).click()
    tab.wait_for_canvas(lambda address: address != drawn)
    masks, scores, _ = predictor.predict([point])
    assert differ(tab.mask(), masks[np.argsort(-scores)[1]]) < SAME
    expect(tab.page.locator("#gallery button.selected img")).to_have_attribute("alt", f"IoU {np.sort(scores)[1]:.2f}")


def test_whole_masks_are_a_switch(tab: Tab, predictor: EfficientSamPredictor) -> None:
    tab.upload(COFFEE)
    expect(tab.page.locator("#whole")).to_be_hidden()
    point = tab.click(SAUCER, "Decoded in")
    low = torch.from_numpy(predictor.predict([point])[2])[None, None]
    prompts = predictor.processor(original_sizes=[SIZE[::-1]], input_points=[[[point]]], return_tensors="pt")
    best_first = low[:, :, np.argsort(-predictor.predict([point])[1]).tolist()]
    switch, took = tab.page.get_by_role("checkbox", name="Whole masks"), tab.status().partition("Decoded in")[2]
    tab.files()
    for whole in (not switch.is_checked(), switch.is_checked()):  # each begins with files of the other state
        switch.set_checked(whole)
        expect(tab.page.locator("#files a")).to_have_count(0)
        cleaning = {"largest_part": whole, "fill_holes": 10.0 * whole, "within_box": whole}
        own = predictor.processor.post_process_masks(best_first, [SIZE[::-1]], prompts=prompts, **cleaning)[0][0, 0]
        assert differ(tab.mask(), own.numpy()) < SAME
        assert tab.status().partition("Decoded in")[2] == took
    tab.press("Reset")
    expect(tab.page.locator("#whole")).to_be_hidden()


def test_transparency_is_drawn_anew(tab: Tab) -> None:
    tab.upload(COFFEE)
    tab.click(SAUCER, "Decoded in")
    drawn = tab.canvas_address()
    slider = tab.page.get_by_role("slider", name="Transparency")
    slider.focus()
    slider.press("End")
    assert tab.wait_for_canvas(lambda address: address != drawn)


def test_everything(tab: Tab) -> None:
    tab.upload(COFFEE)
    tab.mode("Everything")
    tab.page.locator("#grid").get_by_text("8 x 8").click()
    tab.press("Find everything")
    tab.wait_for_status("masks shown")
    shown, found, took = re.search(
        r"(\d+) of (\d+) masks shown. (Searched in .* with a grid of 8 x 8 points)\.", tab.status()
    ).groups()
    assert 0 < int(shown) < int(found)
    expect(tab.page.locator("#table tbody tr")).to_have_count(int(shown))
    for name in ("Predicted IoU at least", "Stability at least"):
        slider = tab.page.get_by_role("slider", name=name)
        slider.focus()
        slider.press("Home")
    tab.wait_for_status(f"{found} of {found} masks shown. {took}")
    expect(tab.page.locator("#table tbody tr")).to_have_count(int(found))
    files = tab.files()
    assert set(files) == {"labels.png", "overlay.jpg", "masks.json"}
    assert len(json.loads(files["masks.json"])["annotations"]) == int(found)
    tab.click((5, 5), "ask ")  # "Mask 3: ..." or "There is no mask here."


def test_a_limit_is_explained_and_the_page_goes_on(tab: Tab, server: SpaceServer) -> None:
    tab.upload(COFFEE)
    image = Visitor(server.url).upload(CAT.read_bytes(), "cat.jpg")
    call = json.dumps({"data": [image, 8, None, None]})
    with pytest.raises(Refused):
        for _ in range(100):  # nobody listens to these, so that they wait until they are dropped
            post(server.url, "segment_everything", call)
    tab.mode("Everything")
    tab.page.locator("#grid").get_by_text("8 x 8").click()
    tab.press("Find everything")
    tab.page.get_by_text(
        re.compile(r"requests from your network are waiting already\. Try again in \d+ second")
    ).wait_for()
    tab.mode("Click")
    tab.click(SAUCER, "Decoded in")
    tab.mode("Everything")
    tab.page.wait_for_timeout(11_000)
    tab.press("Find everything")
    tab.wait_for_status("masks shown")


def test_visitors_do_not_see_each_other(open_tab: Callable[..., Tab], predictor: EfficientSamPredictor) -> None:
    first, second = open_tab(), open_tab()
    first.upload(COFFEE)
    second.upload(CAT)
    point = first.click(SAUCER, "Decoded in")
    expect(second.page.locator("#gallery")).to_be_hidden()
    assert "451 x 300" in second.status()
    box = second.page.locator("#canvas img").bounding_box()
    second.page.locator("#canvas img").click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    second.wait_for_status("Decoded in")
    assert second.mask().shape == (300, 451)
    assert differ(first.mask(), best(predictor, point_coords=[point])) < SAME
    pictures = [{"src": image.get_attribute("src")} for image in second.page.locator("img").all()]
    assert first.canvas_address() not in [image["src"] for image in pictures]


def test_bad_files_are_explained_and_the_page_goes_on(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    tab.page.locator("#upload input[type=file]").first.set_input_files(tmp_path / "text.png")
    toast = tab.page.get_by_text("This is not a picture that can be read here")
    toast.wait_for()
    tab.page.wait_for_timeout(2000)  # the page puts another input in the place of this one, which nothing shows
    tab.page.wait_for_selector("#upload input[type=file]", state="attached")
    tab.upload(COFFEE)
    tab.click(SAUCER, "Decoded in")
    assert "Predicted IoU" in tab.status() and tab.mask().any()


def test_camera(tab: Tab) -> None:
    tab.page.get_by_role("button", name="Capture from camera").click()
    tab.page.get_by_role("button", name="Click to Access Webcam").click()
    tab.page.wait_for_function("document.querySelector('#upload video')?.videoWidth > 0")
    tab.page.wait_for_timeout(500)  # the first frame
    tab.page.get_by_role("button", name="capture photo").click()
    tab.wait_for_status("encoded once")
    expect(tab.page.locator("#canvas img")).to_be_visible()
    video = [int(side) for side in re.match(r"(\d+) x (\d+) pixels", tab.status().replace(",", "")).groups()]
    shown = tab.page.locator("#canvas img").bounding_box()
    assert abs(shown["width"] / shown["height"] - video[0] / video[1]) < 0.02


def test_paste(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(permissions=["clipboard-read", "clipboard-write"])
    tab.page.evaluate(COPY_PICTURE)
    tab.page.get_by_role("button", name="Paste from clipboard").click()
    tab.wait_for_status("300 x 200 pixels, encoded once")
    expect(tab.page.locator("#canvas img")).to_be_visible()
    shown = tab.page.locator("#canvas img").bounding_box()
    assert abs(shown["width"] / shown["height"] - 300 / 200) < 0.02


COPY_PICTURE = """async () => {
    const canvas = document.createElement("canvas")
    canvas.width = 300; canvas.height = 200
    canvas.getContext("2d").fillRect(80, 50, 100, 100)
    const blob = await new Promise(resolve => canvas.toBlob(resolve, "image/png"))
    await navigator.clipboard.write([new ClipboardItem({"image/png": blob})])
}"""


def test_keyboard_alone(tab: Tab, predictor: EfficientSamPredictor) -> None:
    keyboard = tab.page.keyboard

    def go_to(accepts: str) -> None:
        """Tab until the focus is on an element that a JavaScript expression of `e` accepts."""
        for _ in range(60):
            keyboard.press("Tab")
            if tab.page.evaluate(f"(e => !!({accepts}))(document.activeElement)"):
                return
        raise AssertionError(f"no way by Tab to {accepts}")

    go_to("e.innerText?.includes('Coffee')")
    keyboard.press("Enter")
    tab.wait_for_status("encoded once")
    go_to("e.innerText?.includes('Without a mouse')")
    keyboard.press("Enter")
    go_to("e.closest('#coordinates')")
    keyboard.type("172, 17, 410, 305")
    keyboard.press("Enter")
    tab.wait_for_status("Decoded in")
    assert differ(tab.mask(), best(predictor, box=[172, 17, 410, 305])) < SAME


# What has no name for a screen reader: pictures, buttons and fields that are shown.
NAMELESS = """() => [...document.querySelectorAll("img, button, input, textarea, a")].filter(e => {
    if (!e.checkVisibility()) return false
    const labels = [...(e.labels ?? [])].map(l => l.innerText).join("")
    const inner = [...e.querySelectorAll("img")].map(i => i.alt).join("")
    const by = (e.getAttribute("aria-labelledby") ?? "").split(" ").map(i => document.getElementById(i)?.innerText)
    return ![e.alt, e.getAttribute("aria-label"), e.title, e.innerText, labels, inner, ...by].some(t => t?.trim())
}).map(e => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_looks(open_tab: Callable[..., Tab], screenshots: Path, device: str, scheme: str) -> None:
    tab = open_tab(**(PHONE if device == "phone" else DESKTOP), color_scheme=scheme)

    def look(name: str) -> None:
        tab.page.wait_for_timeout(800)  # fades of the page
        tab.page.screenshot(path=screenshots / f"{device}-{scheme}-{name}.png", full_page=True)
        assert tab.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert tab.page.evaluate(NAMELESS) == []

    look("0-start")
    brightness = tab.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")
    assert (sum(map(int, brightness)) > 3 * 128) == (scheme == "light")
    tab.upload(COFFEE)
    look("1-picture")
    tab.click(SAUCER, "Decoded in")
    tab.page.locator("#kind").get_by_text("Background").click()
    tab.click(CUP, "Decoded in")
    tab.files()
    switch = tab.page.get_by_role("checkbox", name="Whole masks")
    if not switch.is_checked():
        switch.check()
        expect(tab.page.locator("#files a")).to_have_count(0)  # those before are out of date
        tab.files()
    look("2-click")
    tab.press("Reset")
    tab.mode("Box")
    tab.click(BOX[0], "opposite corner")
    look("3-corner")
    tab.click(BOX[1], "Decoded in")
    look("4-box")
    tab.mode("Everything")
    tab.page.locator("#grid").get_by_text("16 x 16").click()
    tab.press("Find everything")
    tab.page.locator("#canvas").get_by_text("Searching").wait_for()
    look("5-searching")
    tab.wait_for_status("masks shown")
    look("6-everything")


def test_page_asks_nobody_else(tab: Tab, server: SpaceServer) -> None:
    tab.upload(COFFEE)
    assert {host for host in tab.hosts if host.startswith("http")} == {server.url}
