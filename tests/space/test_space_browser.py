"""The Space as a visitor sees it, in a real browser with the embedded model."""

import csv
import json
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.contrast import LOW_CONTRAST
from tests.helpers.space_server import EXAMPLES, ROOT, START_SECONDS, serve

pytestmark = pytest.mark.slow  # a browser takes its time

pytest.importorskip("gradio", reason="gradio is not installed: pip install diffusionad_pipe[demo]")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect
expect.set_options(timeout=1000 * START_SECONDS)

DEFECTIVE, GOOD = EXAMPLES / "hazelnut_defective_1.jpg", EXAMPLES / "hazelnut_good_1.jpg"
TEST_IMAGES = sorted((ROOT / "training" / "data" / "hazelnut_toy" / "hazelnut" / "test").rglob("*.jpg"))
TABS = ("One picture", "Many pictures", "How it works", "Learn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    (folder / "unpacked").mkdir()
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serve(folder, TMPDIR=str(folder / "unpacked")) as address:
        yield address


class Visitor:
    """A visitor's page; what the browser complains of, and what it asks of other servers."""

    def __init__(self, browser: "playwright.Browser", address: str, **options: object) -> None:
        self.complaints: list[str] = []
        self.calls: list[str] = []  # names of the endpoints
        self.page = browser.new_page(**{"viewport": {"width": 1440, "height": 900}} | options)
        self.page.set_default_timeout(1000 * START_SECONDS)
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self.note)
        self.address = address
        self.page.goto(address)
        self.page.get_by_role("button", name="Detect", exact=True).wait_for()
        functions = self.page.evaluate("window.gradio_config.dependencies.map(d => [d.id, d.api_name])")
        self.names: dict[int, str] = dict(functions)

    def note(self, request: "playwright.Request") -> None:
        if not request.url.startswith((self.address, "data:", f"blob:{self.address}")):
            self.complaints.append(f"asked for {request.url}")
        if "/queue/join" in request.url:
            self.calls.append(self.names[json.loads(request.post_data)["fn_index"]])

    def upload(self, path: Path) -> None:
        self.page.locator("input[type=file][accept*=image]").first.set_input_files(path)

    def upload_many(self, paths: list[Path]) -> None:
        self.open("Many pictures")
        self.page.locator("input[type=file][multiple]").set_input_files(paths)
        expect(self.page.locator(".file-preview tr.file")).to_have_count(len(paths))
        self.page.get_by_role("button", name="Examine all").click()

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()

    def type_number(self, label: str, value: str) -> None:
        """As a person would: again, if the fold was still opening and put its own value back."""
        box = self.page.get_by_label(f"number input for {label}")
        for _ in range(20):
            self.page.wait_for_timeout(500)
            if box.input_value() == value:
                return
            box.fill(value)
            box.press("Tab")
        raise AssertionError(f"{label} does not take {value}")

    def expect_verdict(self, verdict: str) -> None:
        expect(self.page.get_by_role("status").get_by_role("heading")).to_have_text(verdict)

    def close(self) -> None:
        self.page.close()
        assert self.complaints == []


@pytest.fixture
def visitor(browser: "playwright.Browser", address: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, address)
    yield visitor
    visitor.close()


def contours(visitor: Visitor) -> str:
    return visitor.page.get_by_role("img", name="Contours of the defects").get_attribute("src")


def test_a_defective_and_a_good_nut_get_the_right_verdicts(visitor: Visitor) -> None:
    visitor.expect_verdict("No result yet")
    visitor.upload(DEFECTIVE)
    visitor.expect_verdict("Defective")
    visitor.page.get_by_role("button", name="Remove Image").click()
    visitor.expect_verdict("No result yet")
    visitor.upload(GOOD)
    visitor.expect_verdict("Looks good")
    visitor.page.get_by_role("button", name="Example 1").click()
    visitor.expect_verdict("Defective")


def test_thresholds_change_verdict_and_mask_without_the_model(visitor: Visitor) -> None:
    visitor.upload(DEFECTIVE)
    visitor.expect_verdict("Defective")
    boxes = visitor.page.locator(".results:visible").get_by_role("gridcell").filter(has_text="×")
    expect(boxes).not_to_have_count(0)
    images = [contours(visitor)]
    visitor.calls.clear()
    visitor.page.get_by_role("button", name="Advanced").click()
    for label, value in (("Decision threshold", "0.99"), ("Mask threshold", "0.05")):
        visitor.type_number(label, value)
    visitor.expect_verdict("Looks good")
    expect(visitor.page.get_by_role("img", name="Contours of the defects")).not_to_have_attribute("src", images[0])
    images.append(contours(visitor))
    boxes.first.click()  # frames the region
    expect(visitor.page.get_by_role("img", name="Contours of the defects")).not_to_have_attribute("src", images[1])
    assert set(visitor.calls) == {"decide", "choose_region"}
    # The handle is moved by keys, and by dragging, too.
    visitor.page.get_by_label("range slider for Decision threshold").focus()
    visitor.page.keyboard.press("Home")
    visitor.expect_verdict("Not decided")
    assert set(visitor.calls) == {"decide", "choose_region"}


def test_the_steps_between_are_five_images(visitor: Visitor) -> None:
    visitor.upload(DEFECTIVE)
    visitor.expect_verdict("Defective")
    visitor.open("How it works")
    images = visitor.page.locator(".image-frame:visible img")
    expect(images).to_have_count(5)
    names = images.evaluate_all("all => all.map(i => i.alt)")
    assert names == ["Small noise", "Large noise", "From small noise", "From large noise", "Guided"]
    assert len(set(images.evaluate_all("all => all.map(i => i.src)"))) == 5


def test_a_batch_of_23_with_a_broken_file(visitor: Visitor, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(TEST_IMAGES[0].read_bytes()[:5000])
    named = [tmp_path / f"{path.parent.name}_{path.name}" for path in TEST_IMAGES[1:]]
    for path, source in zip(named, TEST_IMAGES[1:]):
        shutil.copy(source, path)
    visitor.upload_many([*named[:11], broken, *named[11:]])
    progress = visitor.page.get_by_label("Progress")
    done = re.compile(r"^23 of 23 done: 22 examined, 1\d of them defective, 1 not examined\.$")
    expect(progress).to_have_value(done, timeout=1000 * START_SECONDS)
    expect(visitor.page.get_by_role("gridcell", name="broken.jpg")).to_be_visible()
    expect(visitor.page.get_by_role("gridcell", name="the picture is truncated")).to_be_visible()
    expect(visitor.page.locator(".heatmaps .thumbnail-item")).to_have_count(22)
    visitor.page.get_by_role("button", name="Make a CSV file").click()
    with visitor.page.expect_download() as download:
        visitor.page.locator(".made:visible a[download]").click()
    with open(download.value.path(), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows if not row["error"]} == {path.name for path in named}
    assert [row["name"] for row in rows if row["error"]] == ["broken.jpg"]
    scores = [float(row["score"]) for row in rows if row["score"]]
    caption = visitor.page.locator(".heatmaps .caption-label").first
    expect(caption).to_contain_text(f"Defective, {max(scores):.3f}")


def wrong_files(folder: Path) -> dict[str, Path]:
    """What the page must say -> a file."""
    small = Image.new("RGB", (64, 64))
    contents = {
        "an HTML page": b"<!DOCTYPE html><script>alert(1)</script>",
        "the file is empty": b"",
        "an SVG drawing": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        "a PDF": b"%PDF-1.7",
        "a zip archive": b"PK\3\4" + bytes(60),
        "a HEIC photo": b"\0\0\0\x18ftypheic" + bytes(600),
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "truncated or damaged": DEFECTIVE.read_bytes()[:20_000],
        "plain text": b"no picture at all",
    }
    files = {}
    for number, (cause, content) in enumerate(contents.items()):
        files[cause] = folder / f"{number}.png"
        files[cause].write_bytes(content)
    files["several frames"] = folder / "moving.gif"
    small.save(files["several frames"], save_all=True, append_images=[Image.new("RGB", (64, 64), "red")])
    files["more than 24000000"] = folder / "large.png"
    Image.new("1", (6000, 5000)).save(files["more than 24000000"])
    files["sides of at least 8"] = folder / "tiny.png"
    Image.new("RGB", (64, 4)).save(files["sides of at least 8"])
    return files


def test_a_wrong_file_is_a_sentence_and_the_page_goes_on(visitor: Visitor, folder: Path, tmp_path: Path) -> None:
    for cause, path in wrong_files(tmp_path).items():
        visitor.upload(path)
        toast = visitor.page.get_by_test_id("toast-body")
        expect(toast).to_contain_text(cause)
        assert path.name not in toast.inner_text() and str(folder) not in toast.inner_text()
        visitor.page.get_by_test_id("toast-close").click()
        expect(toast).to_have_count(0)
        visitor.expect_verdict("No result yet")
        visitor.page.get_by_role("button", name="Remove Image").click()
    visitor.upload(GOOD)
    visitor.expect_verdict("Looks good")


def test_two_visitors_at_once(browser: "playwright.Browser", address: str) -> None:
    visitors = Visitor(browser, address), Visitor(browser, address)
    for visitor, image in zip(visitors, (DEFECTIVE, GOOD)):
        visitor.upload(image)
    for visitor, verdict in zip(visitors, ("Defective", "Looks good")):
        visitor.expect_verdict(verdict)
        visitor.close()


def test_a_closed_tab_ends_its_batch(browser: "playwright.Browser", address: str, folder: Path) -> None:
    with zipfile.ZipFile(folder / "parts.zip", "w") as archive:
        for number in range(8):
            for path in TEST_IMAGES:
                archive.write(path, f"{number}/{path.parent.name}/{path.name}")
    leaving = Visitor(browser, address)
    leaving.upload_many([folder / "parts.zip"])
    expect(leaving.page.get_by_label("Progress")).not_to_have_value("Nothing to do yet.")
    end = time.monotonic() + START_SECONDS
    while not list((folder / "unpacked").rglob("picture")):
        assert time.monotonic() < end
        time.sleep(0.1)
    leaving.close()
    while list((folder / "unpacked").rglob("picture")):
        assert time.monotonic() < end, "the batch of a visitor who left goes on"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "width, scheme",
    [
        (390, "dark"),
        pytest.param(390, "light", marks=pytest.mark.slow),
        pytest.param(1440, "dark", marks=pytest.mark.slow),
        pytest.param(1440, "light", marks=pytest.mark.slow),
    ],
)
def test_it_is_readable(browser: "playwright.Browser", address: str, width: int, scheme: str) -> None:
    visitor = Visitor(browser, address, viewport={"width": width, "height": 844}, color_scheme=scheme)
    visitor.upload(DEFECTIVE)
    visitor.expect_verdict("Defective")
    visitor.page.get_by_role("button", name="Advanced").click()
    for tab in TABS:
        visitor.open(tab)
        expect(visitor.page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
        count, low = visitor.page.evaluate(LOW_CONTRAST)
        assert count > 60 and [text for text in low if any(map(str.isalnum, text))] == []  # signs may be pale
        images = visitor.page.locator("img:visible").evaluate_all(
            "all => all.filter(i => !i.alt).map(i => i.outerHTML)"
        )
        assert images == []
    visitor.close()


def test_sliders_between_images_obey_the_arrow_keys(visitor: Visitor) -> None:
    visitor.upload(DEFECTIVE)
    visitor.expect_verdict("Defective")
    handle = visitor.page.get_by_role("slider", name="Boundary between picture and heatmap")
    images = handle.locator("xpath=..").locator("img")
    expect(images).to_have_count(2)
    for image in images.all():  # the boundary finds its place only when both have arrived
        expect(image).to_have_js_property("complete", True)
        expect(image).not_to_have_js_property("naturalWidth", 0)
    expect(handle).to_have_attribute("aria-valuenow", "50")
    handle.press("ArrowRight")
    expect(handle).to_have_attribute("aria-valuenow", "55")
    handle.press("Home")
    expect(handle).to_have_attribute("aria-valuenow", "0")


def test_files_to_keep(visitor: Visitor) -> None:
    visitor.upload(DEFECTIVE)
    visitor.expect_verdict("Defective")
    visitor.page.get_by_role("button", name="Make files to download").click()
    links = visitor.page.locator(".made:visible a[download]")
    expect(links).to_have_count(3)
    with visitor.page.expect_download() as download:
        links.nth(1).click()
    assert np.asarray(Image.open(download.value.path())).dtype == np.uint16
