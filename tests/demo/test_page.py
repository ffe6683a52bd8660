"""The page in a real Chromium, served by ``python -m mmsnnet.demo`` on loopback."""

import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.conftest import CHROMIUM
from tests.demo.published_model import publish
from tests.ports import free_port
from tests.python_processes import PythonProcess

pytestmark = pytest.mark.browser
START = "import runpy; runpy.run_module('mmsnnet.demo', run_name='__main__', alter_sys=True)"
WAIT = 120_000  # milliseconds, on a busy machine


def noise(path: Path, height: int, width: int, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a page for a published model, with an example image."""
    folder, output, images, uploads = (
        tmp_path_factory.mktemp(name) for name in ("published", "output", "images", "uploads")
    )
    publish(folder, timed=True)
    noise(images / "example.png", 64, 64)
    port = free_port()
    arguments = ("--points", folder / "points.json", "--examples", images, "--device", "cpu", "--max-upload-mb", 1)
    process = PythonProcess(
        "-c", START, folder / "model", *arguments, "--port", port, folder=folder, output=output, TMPDIR=uploads
    )
    end = time.monotonic() + 300
    printed = output / "stdout.txt"
    while not (printed.exists() and "http" in printed.read_text()):
        assert process.process.exitcode is None and time.monotonic() < end, process.stderr
        time.sleep(0.1)
    assert printed.read_text() == f"model: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    yield f"http://127.0.0.1:{port}/"
    assert len(os.listdir(uploads)) == 1
    process.process.terminate()
    process.process.join()
    assert process.process.exitcode == 0 and "Traceback" not in process.stderr
    assert os.listdir(uploads) == []  # nobody's pictures stay


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("CI needs Chromium: apt-get install chromium")
    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=WAIT
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def record() -> dict[str, list[str]]:
    """The URLs that the page requests, and the errors of its scripts."""
    return dict(requests=[], mistakes=[])


@pytest.fixture(scope="module")
def page(chromium: Browser, server: str, record: dict[str, list[str]]) -> Iterator[Page]:
    """The page in a desktop's window; every test starts at the costliest stitch of the example."""
    page = chromium.new_page(viewport=dict(width=1280, height=900))
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: record["requests"].append(request.url))
    page.on("pageerror", lambda error: record["mistakes"].append(str(error)))
    page.goto(server)
    shown(page, "L9-S5")
    yield page
    page.close()


def shown(page: Page, *stitches: str) -> None:
    """Wait until the table and the rings of the plot are those of these stitches."""
    names = [f"shown: {stitches[0]}"] if len(stitches) == 1 else [f"left: {stitches[0]}", f"right: {stitches[1]}"]
    for name in names:
        page.locator("#chart .legendtext", has_text=name).wait_for()
    expect(page.locator("#figures tr", has_text="stitch").locator("td")).to_have_text(list(stitches))


def picture(page: Page, place: str = "#result img") -> str:
    """Where the shown picture is served from: a path with a digest of its content."""
    return page.locator(place).first.get_attribute("src")


def upload(page: Page, path: Path) -> None:
    if page.get_by_label("Remove Image").count():
        page.get_by_label("Remove Image").click()
    page.locator("#image input[type=file]").set_input_files(path)


def budget(page: Page) -> Locator:
    return page.get_by_label("range slider for Budget in MFLOPs")


def test_the_page_loads_from_this_machine_alone(page: Page, server: str, record: dict[str, list[str]]) -> None:
    assert page.title() == "model"
    expect(page.locator("#result img")).to_be_visible()
    expect(page.locator("#message")).to_be_hidden()
    foreign = [url for url in record["requests"] if not url.startswith((server, "data:", "blob:"))]
    assert foreign == [] and record["mistakes"] == []


def test_the_slider_changes_the_picture_and_the_marked_point(page: Page) -> None:
    before = picture(page)
    budget(page).fill("36")
    shown(page, "S1-L4-S3")
    page.wait_for_function("before => document.querySelector('#result img').src != before", arg=before)
    assert picture(page) != before


def test_the_keyboard_reaches_every_control(page: Page) -> None:
    """Tab goes from the image over the slider to the comparison; the slider's keys choose the stitch."""
    budget(page).focus()
    page.keyboard.press("End")
    shown(page, "L9-S5")
    page.keyboard.press("Home")
    shown(page, "S")
    reached = []
    page.locator("#image button").first.focus()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.name"))
    assert "range slider for Budget in MFLOPs" in reached and "Upload file" in reached, reached
    page.get_by_label("Compare two stitches").focus()
    page.keyboard.press("Space")
    shown(page, "S", "S")
    page.keyboard.press("Space")
    shown(page, "S")


def test_an_upload_is_predicted(page: Page, tmp_path: Path) -> None:
    before = picture(page)
    upload(page, noise(tmp_path / "mine.png", 48, 96, seed=1))
    page.wait_for_function(
        "() => { const i = document.querySelector('#result img'); return i && i.complete && i.naturalWidth == 768 }"
    )
    assert picture(page) != before
    expect(page.locator("#message")).to_be_hidden()
    expect(page.locator("#figures")).to_have_text(re.compile(r"time for this image\s*[\d.]+ ms"))


def test_what_is_no_image_is_said_and_shows_no_picture(page: Page, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    upload(page, tmp_path / "text.png")
    alert = page.get_by_role("alert").filter(has_text="text.png cannot be decoded")
    alert.wait_for()
    expect(page.locator("#result img")).to_have_count(0)
    upload(page, noise(tmp_path / "again.png", 64, 64, seed=2))
    expect(page.locator("#result img")).to_be_visible()
    expect(alert).to_have_count(0)


def test_a_large_file_is_refused(page: Page, tmp_path: Path) -> None:
    upload(page, noise(tmp_path / "large.png", 700, 700))
    page.get_by_text("maximum allowed size of 1").wait_for()
    page.get_by_label("Close").first.click()


def test_a_budget_below_the_cheapest_stitch_is_said(page: Page) -> None:
    number = page.get_by_label("number input for Budget in MFLOPs")
    number.fill("1")
    number.press("Enter")
    page.get_by_role("alert").filter(has_text="a budget of 0.001 GFLOPs is below the cheapest stitch, 0 (S)").wait_for()
    budget(page).fill("144")
    shown(page, "L9-S5")


def test_times_are_a_budget_too(page: Page) -> None:
    page.get_by_label("ms", exact=True).check()
    page.get_by_label("range slider for Budget in ms").wait_for()
    page.get_by_label("range slider for Budget in ms").fill("4")
    shown(page, "S1-L4-S3")
    page.get_by_label("MFLOPs", exact=True).check()
    budget(page).wait_for()
    shown(page, "L9-S5")
    page.get_by_label("ms", exact=True).check()
    shown(page, "S1-L4-S3")
    page.get_by_label("MFLOPs", exact=True).check()
    shown(page, "L9-S5")


def test_a_wipe_compares_two_stitches(page: Page, tmp_path: Path) -> None:
    upload(page, noise(tmp_path / "mine.png", 64, 64, seed=3))
    expect(page.locator("#result img")).to_be_visible()
    page.get_by_label("Compare two stitches").check()
    shown(page, "L9-S5", "S")
    page.locator("#wipe img").nth(1).wait_for()
    left, right = (image.get_attribute("src") for image in page.locator("#wipe img").all()[:2])
    assert left != right
    expect(page.locator("#route .route")).to_have_count(2)
    line = page.locator("#wipe img").nth(1)
    before = line.evaluate("image => image.style.clipPath")
    page.get_by_label("range slider for Place of the wipe").fill("10")
    page.wait_for_function("before => document.querySelectorAll('#wipe img')[1].style.clipPath != before", arg=before)
    page.get_by_label("Compare two stitches").uncheck()
    shown(page, "L9-S5")
    expect(page.locator("#result img")).to_be_visible()


def test_a_small_screen_shows_all(chromium: Browser, server: str) -> None:
    page = chromium.new_page(viewport=dict(width=360, height=740), has_touch=True)
    page.set_default_timeout(WAIT)
    page.goto(server)
    shown(page, "L9-S5")
    expect(page.locator("#result img")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for place in ("#image", "#result img", ".budget input[type=range]", "#compare", "#figures", "#chart", "#route"):
        box = page.locator(place).first.bounding_box()
        assert box["width"] > 40 and box["x"] >= 0 and box["x"] + box["width"] <= 360, place
    page.close()


def test_the_server_gives_no_other_files(server: str, page: Page) -> None:
    """No file outside the folder of uploads, no public link, no telemetry, no description of the API."""
    for path in ("/etc/passwd", str(Path(__file__)), os.path.expanduser("~/.bashrc")):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(f"{server}gradio_api/file={path}")
    config = page.evaluate("window.gradio_config")
    assert config["analytics_enabled"] is False and config["run_history"] is False
    assert {dependency["api_visibility"] for dependency in config["dependencies"]} == {"private"}
    with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
        urllib.request.urlopen(f"{server}openapi.json")
