"""The HTML report, in a real browser where there is one."""

import base64
import io
import re
from math import nan
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

from diffusionad_pipe import open_image
from diffusionad_pipe.evaluation.report_page import (
    ALARMING_GOOD,
    BORDERLINE,
    CLEAR_DEFECTS,
    WEAK_DEFECTS,
    CategoryReport,
    GalleryImage,
    choose_gallery,
    write_report,
)
from tests.helpers.contrast import LOW_CONTRAST

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

TOY = Path(__file__).parents[2] / "training" / "data" / "hazelnut_toy" / "hazelnut"
HOSTILE = (
    "<script>document.title = 'taken'</script>\"><img src=x onerror=alert(1)> & a_name_without_a_space" + "_x" * 40
)
SCORES = [0.1, 0.3, 0.6, 0.42, 0.55, 0.7, 0.9, 0.95]
LABELS = [0, 0, 0, 1, 1, 1, 1, 1]
TYPES = ["good"] * 3 + ["stain"] * 2 + [HOSTILE] * 3


def category(name: str, threshold: float | None = 0.5, metrics: dict[str, float] | None = None) -> CategoryReport:
    """Real pictures with made-up scores, and curves of random pixels."""
    random = np.random.RandomState(0)
    pixel_labels = random.rand(200_000) < 0.05
    pixel_scores = random.rand(200_000) + 0.8 * pixel_labels
    fpr, tpr, _ = roc_curve(pixel_labels, pixel_scores, drop_intermediate=False)
    image_precision, image_recall, _ = precision_recall_curve(LABELS, SCORES)
    precision, recall, _ = precision_recall_curve(pixel_labels, pixel_scores)

    good, defective = (sorted((TOY / "test" / kind).iterdir()) for kind in ("good", "colour"))
    paths = good[:3] + defective[:5]
    gallery = []
    for group, indices in choose_gallery(SCORES, LABELS, threshold, count=2).items():
        for index in indices:
            image = open_image(paths[index]).convert("RGB").crop((0, 0, 512, 384))
            mask = Image.new("1", image.size)
            mask.putpixel((100, 200), 1)
            gallery.append(
                GalleryImage(
                    group=group,
                    name=f"{paths[index].parent.name}/{paths[index].name}",
                    defect_type=TYPES[index],
                    label=LABELS[index],
                    score=SCORES[index],
                    image=image,
                    reconstruction=image.reduce(16),
                    heatmap=image.rotate(180),
                    predicted_mask=mask if threshold is not None else None,
                    ground_truth=mask if LABELS[index] else None,
                )
            )
    return CategoryReport(
        name=name,
        metrics=metrics
        or {"image_auroc": 0.8, "image_ap": 0.9, "pixel_auroc": nan, "pixel_ap": 0.25, "au_pro_0.30": nan},
        remarks=["2 of 8 pictures are defective without a usable mask"] if threshold is None else [],
        image_threshold=threshold,
        scores=SCORES,
        labels=LABELS,
        defect_types=TYPES,
        roc={"image": roc_curve(LABELS, SCORES)[:2], "pixel": (fpr, tpr)},
        precision_recall={"image": (image_recall, image_precision), "pixel": (recall, precision)},
        pro=(fpr, tpr),
        gallery=gallery,
    )


CONFIGURATION = {"model": "pretrained/hazelnut", HOSTILE: HOSTILE, "seed": None, "data": {"size": [256, 256]}}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of one category, and one of three with all that may be missing."""
    folder = tmp_path_factory.mktemp("reports")
    whole = {"image_auroc": 0.6, "pixel_auroc": 0.7, "au_pro_0.30": 0.5}
    bare = category("wood", metrics=whole)
    bare.roc, bare.precision_recall, bare.pro = {"image": bare.roc["image"]}, {}, None
    categories = {
        "one": [category("hazelnut", metrics=whole | {"image_ap": 0.9, "pixel_ap": 0.3, "right_decisions": 0.75})],
        "several": [category(HOSTILE), category("without a threshold", threshold=None), bare],
    }
    for name, content in categories.items():
        write_report(folder / f"{name}.html", f"Report of {name} {HOSTILE}", content, CONFIGURATION)
    assert {path.name for path in folder.iterdir()} == {"one.html", "several.html"}
    return {name: folder / f"{name}.html" for name in categories}


@pytest.fixture(params=["one", "several"])
def page(request: pytest.FixtureRequest, browser: "playwright.Browser", reports: dict[str, Path]):
    """An open report; fails if the browser complained or asked for anything but the file."""
    page = browser.new_page(viewport={"width": 1440, "height": 900}, offline=True)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    address = reports[request.param].as_uri()
    page.goto(address)
    yield page
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} == {address}
    page.close()


def test_images_are_embedded_and_described(page) -> None:
    images = page.eval_on_selector_all("img", "all => all.map(i => [i.src, i.alt, i.complete && i.naturalWidth])")
    # Twice 4 groups of each category; without a threshold there is no predicted mask, and good pictures have no truth.
    assert len(images) > 8 * 3
    assert all(source.startswith("data:image/") and alt and width in (32, 256) for source, alt, width in images)
    assert "ground truth of colour/01.jpg" in [alt for _, alt, _ in images]
    masks = [source for source, alt, _ in images if alt.startswith(("predicted mask", "ground truth"))]
    for source in masks:  # one pixel of 512 x 384 is still there
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("L"))
        assert mask.shape == (192, 256) and mask[100, 50] == 255 and (mask > 0).sum() == 1
    drawings = page.eval_on_selector_all("[role=img]", "all => all.map(d => d.getAttribute('aria-label'))")
    assert len(drawings) >= 5 and all(text.strip() for text in drawings)
    assert page.locator("svg").count() == page.locator("[role=img] > svg").count() >= 4


def test_names_are_text_and_nothing_more(page) -> None:
    assert page.title().startswith("Report of") and page.title().endswith(HOSTILE)
    assert page.locator("script").count() == 0 and page.locator("[onerror]").count() == 0
    assert page.locator("h1").inner_text().endswith(HOSTILE)
    assert page.locator("tbody th").get_by_text(HOSTILE, exact=True).count() >= 1
    assert page.locator("dd").get_by_text(HOSTILE, exact=True).count() == 1


def test_structure(page) -> None:
    levels = page.eval_on_selector_all("h1, h2, h3, h4, h5", "all => all.map(h => Number(h.tagName[1]))")
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert page.eval_on_selector_all("th", "all => all.every(th => ['col', 'row'].includes(th.scope))")
    assert page.eval_on_selector_all("table", "all => all.every(t => t.caption.textContent.length > 20)")
    ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    referred = page.eval_on_selector_all(
        "[aria-labelledby], a", "all => all.map(e => e.getAttribute('aria-labelledby') || e.hash.slice(1))"
    )
    assert len(ids) == len(set(ids)) and set(" ".join(referred).split()) <= set(ids)
    assert page.locator("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_window(page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Columns of a table may be, which then scrolls in its box.
    boxes = page.eval_on_selector_all(
        "h1, h2, h4, h5, p, dd, dt, a, caption span, img, svg",
        "all => all.map(e => e.getBoundingClientRect().right)",
    )
    assert max(boxes) <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 23)"
    count, low = page.evaluate(LOW_CONTRAST)
    assert dark == (scheme == "dark") and count > 100 and low == []


def test_keyboard(page) -> None:
    focusable = page.locator("a, summary, [tabindex='0']").count()
    reached = []
    for _ in range(focusable):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                """() => { const e = document.activeElement, box = e.getBoundingClientRect(), s = getComputedStyle(e);
                return [e.tagName, e.className, s.outlineStyle, parseFloat(s.outlineWidth),
                        box.bottom > 0 && box.top < innerHeight && box.width > 0] }"""
            )
        )
    assert reached[0][:2] == ["A", "skip"]
    assert [name for name, *_ in reached].count("A") == page.locator("a").count()
    assert [name for name, *_ in reached].count("SUMMARY") == page.locator("summary").count() > 3
    assert all(style == "solid" and width >= 2 and visible for *_, style, width, visible in reached)

    gallery = page.locator("details").last
    was_open = gallery.evaluate("e => e.open")
    gallery.locator("summary").focus()
    page.keyboard.press("Enter")
    assert gallery.evaluate("e => e.open") != was_open
    page.locator("a.skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


def points(path: str) -> np.ndarray:
    """The points `[N, 2]` of a path of straight lines."""
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path), dtype=float)


@pytest.mark.parametrize("page", ["one"], indirect=True)
def test_curves_tables_and_verdicts(page) -> None:
    lines = page.locator("g[id$=-curve] path").evaluate_all("all => all.map(p => p.getAttribute('d'))")
    assert len(lines) == 5 and all(len(line) < 10_000 for line in lines)
    corners, curve = points(lines[0])[[0, -1]], points(lines[1])  # that of the images goes from (0, 0) to (1, 1)
    x, y = ((curve - corners[0]) / (corners[1] - corners[0])).T
    fpr, tpr = category("").roc["pixel"]
    assert len(fpr) > 200_000
    drawn = np.interp(np.linspace(0.01, 1, 100), x, y)
    np.testing.assert_allclose(drawn, np.interp(np.linspace(0.01, 1, 100), fpr, tpr), atol=0.004)

    rows = page.eval_on_selector_all("tbody tr", "all => all.map(r => [...r.cells].map(c => c.innerText.trim()))")
    stain = roc_auc_score([0, 0, 0, 1, 1], SCORES[:5])
    assert rows == [
        ["good", "3", "0.1000", "0.3333", "0.6000", "33.3 %", "–"],
        ["stain", "2", "0.4200", "0.4850", "0.5500", "50.0 %", f"{stain:.4f}"],
        [HOSTILE, "3", "0.7000", "0.8500", "0.9500", "100.0 %", "1.0000"],
    ]
    assert page.get_by_text("Above the threshold: 4 of 5 defective and 1 of 3 good pictures.").count() == 1
    heights = {}
    for kind, count in (("good", 3), ("defective", 5)):
        y = points(page.locator(f"[id=category-1-scores-{kind}] path").get_attribute("d"))[:, 1]
        bars = y[0] - y
        assert np.isclose(abs(bars), abs(bars).max()).sum() == 2 * count  # corners of as many bars of one picture each
        heights[kind] = max(bars, key=abs)
    assert heights["good"] * 3 == pytest.approx(-heights["defective"] * 5, rel=1e-4)
    verdicts = page.eval_on_selector_all(
        ".sample", "all => all.map(s => s.innerText.split('\\n').slice(0, 5).join(' '))"
    )
    for name, verdict in (
        ("good/04.jpg", "passed"),
        ("good/13.jpg", "false alarm"),
        ("colour/00.jpg", "missed"),
        ("colour/03.jpg", "found"),
    ):
        assert [verdict in text for text in verdicts if name in text] == [True], name


@pytest.mark.parametrize("page", ["several"], indirect=True)
def test_the_mean_leaves_undefined_values_out(page) -> None:
    table = page.locator("#overview table")
    names, mean = table.locator("thead th").all_inner_texts(), table.locator("tfoot th, tfoot td").all_inner_texts()
    assert dict(zip(names, mean)) == {
        "category": "mean",
        "pictures": "",
        "image AUROC": "0.7333",
        "image AP": "0.9000 (2 of 3)",
        "pixel AUROC": "0.7000 (1 of 3)",
        "pixel AP": "0.2500 (2 of 3)",
        "AU-PRO 0.3": "0.5000 (1 of 3)",
    }
    assert "left out of the mean" in table.locator("caption").inner_text()
    assert page.locator(".remarks").all_inner_texts() == ["2 of 8 pictures are defective without a usable mask"]
    table.get_by_role("link", name="wood").click()
    assert page.evaluate("document.querySelector(':target h2').innerText") == "wood"
    assert page.locator("details[open]").count() == 0


def test_the_same_results_give_the_same_file(tmp_path: Path) -> None:
    for name in ("one.html", "other.html"):
        write_report(tmp_path / name, "Report", [category("hazelnut")], CONFIGURATION)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "other.html").read_bytes()


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    strange = category("nut \udcff")
    write_report(tmp_path / "report.html", "Report", [strange], {})
    assert "nut \\udcff" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_gallery_groups() -> None:
    scores = [0.1, 0.2, 0.8, 0.3, 0.49, 0.6, 0.9, 0.99, 0.52]
    labels = [0, 0, 0, 1, 1, 1, 1, 1, 0]
    assert choose_gallery(scores, labels, 0.5, count=2) == {
        WEAK_DEFECTS: [3, 5],
        ALARMING_GOOD: [2, 8],
        BORDERLINE: [4, 1],
        CLEAR_DEFECTS: [7, 6],
    }
    everything = choose_gallery(scores, labels, 0.5, count=20)
    assert sorted(sum(everything.values(), [])) == list(range(9))
    assert choose_gallery([0.5] * 4, [0, 1, 0, 1], 0.5, count=1) == {
        WEAK_DEFECTS: [1],
        ALARMING_GOOD: [0],
        BORDERLINE: [2],
        CLEAR_DEFECTS: [3],
    }


def test_gallery_of_one_kind_of_images() -> None:
    assert choose_gallery([0.1, 0.4], [0, 0], None) == {
        WEAK_DEFECTS: [],
        ALARMING_GOOD: [1, 0],
        BORDERLINE: [],
        CLEAR_DEFECTS: [],
    }
    groups = choose_gallery([0.1, 0.4, 0.9], [1, 1, 1], 0.5)
    assert groups[WEAK_DEFECTS] == [0] and groups[BORDERLINE] == [1] and groups[CLEAR_DEFECTS] == [2]


def test_gallery_without_a_threshold() -> None:
    """The best F1 is in the middle between 0.3 and 0.6; those two are in the groups before."""
    scores, labels = [0.0, 0.1, 0.2, 0.3, 0.6, 0.65, 0.8, 0.9], [0, 0, 0, 0, 1, 1, 1, 1]
    assert choose_gallery(scores, labels, None, count=1)[BORDERLINE] == [5]
    assert choose_gallery(scores, labels, 0.04, count=1)[BORDERLINE] == [0]
