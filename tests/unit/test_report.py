"""What a report promises: it stands alone, it shows everything, nothing from outside becomes a part of it."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from evaluation_metrics import MetricComputer
from tagger.errors import DivergedError, InputError
from tagger.metrics.hierarchy import HierarchyMetrics
from tagger.metrics.summary import ENOUGH_POSITIVES
from tagger.ontology import Ontology, relate
from tagger.report.collect import ReportCollector
from tagger.report.content import Report, gather_report
from tagger.report.drawing import Plot
from tagger.report.mistakes import MAX_TAGS, THUMBNAIL_SIDE, ConfidentMistakes, Mistake, thumbnail
from tagger.report.page import write_report
from tagger.report.plots import draw_plots, write_plots
from tests.evaluated import make_batch, make_case

ODD_NAMES = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "$x^2$ & 日本",
    "_hidden\x0c\udcff",
    "\"quoted\" 'tag'",
)
PLOTS = ("ap-by-frequency", "precision-recall", "calibration", "thresholds", "tags-per-image", "ap-distribution")
VOID = {"meta", "img", "br", "link", "input", "wbr"}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]

    def tag_rows(self) -> list[list]:
        return json.loads(self.scripts[0])["tags"]


def report_of(num_images: int, names: Sequence[str], **changes: object) -> Report:
    logits, tag_lists = make_case(num_images, len(names), share=float(changes.pop("share", 0.5)))
    logits += float(changes.pop("shift", 0.0))
    computer = MetricComputer(len(names))
    batch = make_batch(tag_lists)
    computer.update(logits, batch.tag_indices, batch.tag_offsets)
    counts = np.bincount(batch.tag_indices.numpy(), minlength=len(names)) * 4
    mistakes = ConfidentMistakes(6, counts / (4 * num_images), 0.0)
    mistakes.add(batch, logits)
    content = {
        "title": "Evaluation of <b>this</b>",
        "facts": {"weights": "runs/demo/model <new>", "images": f"{num_images}"},
        "extra": mistakes.strongest("extra"),
        "missed": mistakes.strongest("missed"),
        **changes,
    }
    return gather_report(computer, names, ["general"] * len(names), counts, **content)


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    return page


class Odd(NamedTuple):
    report: Report
    path: Path
    plots: list[Plot]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Odd:
    """A report whose names mean harm, with a hierarchy."""
    names = [*ODD_NAMES, *(f"tag {i}" for i in range(25))]
    ontology = Ontology(implications={names[0]: (names[1],)}, exclusive=((names[2], names[3]),))
    hierarchy = HierarchyMetrics(relate(ontology, names), len(names), 0.0)
    logits, tag_lists = make_case(60, len(names), share=0.5)
    hierarchy.add(make_batch(tag_lists), logits)
    ratings = ("general", None, "sensitive")
    report = report_of(
        60,
        names,
        hierarchy=hierarchy.compute(),
        describe_image=lambda row: (f"/images/<i>{row}</i>.png", ratings[row % 3]),
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    plots = draw_plots(report)
    write_report(report, path, plots)
    return Odd(report, path, plots)


def test_the_page_stands_alone_and_shows_every_plot(odd: Odd, tmp_path: Path) -> None:
    report, path, plots = odd
    page = read(path)
    assert tuple(plot.name for plot in plots) == PLOTS
    drawings = [each for each in page.of("img") if (each["src"] or "").startswith("data:image/svg+xml;base64,")]
    assert len(drawings) == len(PLOTS)
    for drawing in drawings:
        root = ElementTree.fromstring(base64.b64decode((drawing["src"] or "").partition(",")[2]))
        assert root.tag.endswith("svg") and drawing["alt"]
    for _, attributes in page.found:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", path.read_text(encoding="utf-8"))
    assert len({each["id"] for _, each in page.found if "id" in each}) == sum("id" in each for _, each in page.found)
    again = tmp_path / "again.html"
    write_report(report, again, plots)
    assert again.read_bytes() == path.read_bytes()


def test_names_and_paths_are_escaped(odd: Odd) -> None:
    report, path, _ = odd
    page = read(path)
    assert len(page.scripts) == 2 and not page.of("b") and not page.of("i")[3:]
    assert all((each["src"] or "").startswith("data:") for each in page.of("img"))
    names = {row[0] for row in page.tag_rows()}
    assert names == {tag.name for tag in report.tags} and names >= {*ODD_NAMES[:3], "_hidden\x0c\\udcff"}
    (policy,) = (each["content"] or "" for each in page.of("meta") if "http-equiv" in each)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_images_of_other_ratings_are_named_and_not_shown(odd: Odd) -> None:
    report, path, _ = odd
    shown = [*report.extra, *report.missed]
    withheld = [each for each in shown if each.mistake.row % 3 == 2]
    assert withheld and {each.withheld for each in withheld} == {"sensitive"}
    pictures = [each for each in read(path).of("img") if (each["src"] or "").startswith("data:image/jpeg")]
    assert len(pictures) == len(shown) - len(withheld)


def test_the_table_says_what_the_counts_say(odd: Odd) -> None:
    report, path, _ = odd
    page = read(path)
    rows = {row[0]: row for row in page.tag_rows()}
    assert len(rows) == len(report.tags)
    logits, tag_lists = make_case(60, len(report.tags), share=0.5)
    truth = np.zeros(logits.shape, bool)
    for row, tags in enumerate(tag_lists):
        truth[row, tags] = True
    told = logits.half().numpy() >= 0
    for index, tag in enumerate(report.tags):
        hits = (truth & told)[:, index].sum()
        assert tag.positives == truth[:, index].sum()
        assert tag.precision == (hits / told[:, index].sum() if told[:, index].any() else None)
        assert tag.recall == (hits / tag.positives if tag.positives else None)
        expected = [tag.training_images, tag.positives, 0.5]
        assert rows[tag.name][2:5] == expected
    best, worst = report.best, report.worst
    assert not {tag.name for tag in best} & {tag.name for tag in worst}
    assert all(tag.positives >= ENOUGH_POSITIVES for tag in [*best, *worst])
    assert min(tag.average_precision or 0 for tag in best) >= max(tag.average_precision or 0 for tag in worst)


def test_a_curve_s_steps_have_the_area_of_its_ap(odd: Odd) -> None:
    report = odd.report
    assert report.curves[0].name == "all decisions"
    for line in report.curves:
        assert np.isclose((np.diff(line.recall, prepend=0) * line.precision).sum(), line.average_precision, atol=1e-12)


@pytest.mark.parametrize(
    ("num_images", "num_tags", "share", "shift"),
    [(1, 1, 0.5, 0.0), (5, 1, 0.0, 0.0), (5, 3, 0.0, -50.0), (4, 2, 5.0, 50.0), (40, 1, 0.5, 0.0)],
)
def test_the_smallest_evaluations_have_a_page(
    tmp_path: Path, num_images: int, num_tags: int, share: float, shift: float
) -> None:
    report = report_of(num_images, [f"t{i}" for i in range(num_tags)], share=share, shift=shift)
    path = tmp_path / "report.html"
    plots = draw_plots(report)
    write_report(report, path, plots)
    text = path.read_text(encoding="utf-8")
    page = read(path)
    assert len(page.tag_rows()) == num_tags
    has_positives = any(tag.positives for tag in report.tags)
    assert ("there is no average precision" in text) == (not has_positives)
    names = {plot.name for plot in plots}
    assert ({"ap-by-frequency", "precision-recall", "ap-distribution", "thresholds"} <= names) == has_positives
    assert (text.count("<p>None.</p>") == 2) == (not report.extra and not report.missed)


@pytest.mark.slow
def test_a_page_of_20000_tags_stays_small_and_says_what_is_left_out(tmp_path: Path) -> None:
    names = [f"{i} {'a long name of a tag ' * 8}" for i in range(20_000)]
    report = report_of(8, names, share=0.02)
    path = tmp_path / "report.html"
    write_report(report, path)
    assert path.stat().st_size < 5_000_000
    rows = read(path).tag_rows()
    left_out = len(names) - len(rows)
    assert f"{left_out:,} tags with the fewest positives are left out" in path.read_text(encoding="utf-8")
    assert sum(tag.positives for tag in report.tags) == sum(row[3] for row in rows)
    assert left_out > 0
    small = dataclasses.replace(report, tags=report.tags[:2000], extra=(), missed=())
    write_report(small, path, ())
    assert len(read(path).tag_rows()) == 2000 and "are left out" not in path.read_text(encoding="utf-8")


def test_plots_become_files(odd: Odd, tmp_path: Path) -> None:
    drawn_anew = draw_plots(odd.report)
    assert drawn_anew == odd.plots
    paths = write_plots(drawn_anew, tmp_path / "new")
    assert [path.name for path in paths] == [f"{name}.svg" for name in PLOTS]
    assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in paths)


def brute_force(logits: torch.Tensor, tag_lists: list[list[int]], shares: np.ndarray, limit: int) -> dict:
    rounded = logits.half().double().numpy()
    odds = np.log(shares) - np.log1p(-shares)
    found: dict[str, list[tuple[float, int, int]]] = {"extra": [], "missed": []}
    for row, tags in enumerate(tag_lists):
        extra = [(-rounded[row, t], row, t) for t in range(logits.shape[1]) if t not in tags and rounded[row, t] >= 0]
        missed = [(rounded[row, t] - odds[t], row, t) for t in tags if rounded[row, t] < 0]
        for kind, candidates in (("extra", extra), ("missed", missed)):
            if candidates:
                found[kind].append(min(candidates, key=lambda each: (each[0], each[2])))
    return {kind: [(row, tag) for _, row, tag in sorted(each)[:limit]] for kind, each in found.items()}


def collected(logits: torch.Tensor, tag_lists: list[list[int]], order: Sequence[int], size: int) -> ConfidentMistakes:
    mistakes = ConfidentMistakes(5, np.full(logits.shape[1], 0.1), 0.0)
    for start in range(0, len(order), size):
        places = list(order[start : start + size])
        whole = make_batch(tag_lists)
        batch = make_batch([tag_lists[i] for i in places])
        mistakes.add(
            dataclasses.replace(batch, images=whole.images[places], row_ids=whole.row_ids[places]), logits[places]
        )
    return mistakes


def as_values(mistake: Mistake) -> tuple:
    return (*dataclasses.astuple(mistake)[:-1], mistake.image.tobytes())


@pytest.mark.parametrize("seed", range(4))
def test_the_most_confident_mistakes_are_found_whatever_the_order(seed: int) -> None:
    logits, tag_lists = make_case(50, 13, seed, share=0.6)
    logits = (logits * 4).round() / 4  # ties
    expected = brute_force(logits, tag_lists, np.full(13, 0.1), 5)
    generator = np.random.default_rng(seed)
    results = [collected(logits, tag_lists, range(50), 50)]
    results += [collected(logits, tag_lists, generator.permutation(50).tolist(), size) for size in (1, 7)]
    halves = [collected(logits, tag_lists, part, 8) for part in (range(30, 50), range(30))]
    halves[0].merge(halves[1])
    for mistakes in (*results, halves[0]):
        for kind in ("extra", "missed"):
            found = mistakes.strongest(kind)
            assert [(each.row, each.tag) for each in found] == expected[kind]
            assert [as_values(each) for each in found] == [as_values(each) for each in results[0].strongest(kind)]
            for each in found:
                listed = [tag for tag, *_ in each.scores]
                assert each.tag in listed and len(listed) <= MAX_TAGS
                for tag, logit, there, told in each.scores:
                    assert there == (tag in tag_lists[each.row]) and told == (logit >= 0)


def test_a_mistake_keeps_its_tag_where_many_are_there() -> None:
    mistakes = ConfidentMistakes(1, np.full(40, 0.5), 0.0)
    logits = torch.linspace(-1, 5, 40)[None]
    mistakes.add(make_batch([list(range(40))]), logits)
    (missed,) = mistakes.strongest("missed")
    assert missed.tag == 0 and missed.scores[-1][0] == 0 and missed.num_more == 40 - MAX_TAGS
    assert mistakes.strongest("extra") == []


def test_thresholds_of_each_tag_say_what_is_a_mistake() -> None:
    mistakes = ConfidentMistakes(3, [0.5, 0.5, 0.5], [np.inf, -np.inf, 1.0])
    mistakes.add(make_batch([[0]]), torch.tensor([[9.0, -9.0, 0.99]]))
    assert [(each.kind, each.tag) for kind in ("extra", "missed") for each in mistakes.strongest(kind)] == [
        ("extra", 1),
        ("missed", 0),
    ]


def test_a_thumbnail_is_the_content_without_its_bars() -> None:
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    image[:, 100:300] = 200
    small = thumbnail(image, 200, 400)
    assert small.shape == (THUMBNAIL_SIDE // 2, THUMBNAIL_SIDE, 3) and (small == 200).all()
    assert thumbnail(image[:, :5, :9], 5, 9).shape == (5, 9, 3)


def test_mistakes_refuse_what_they_cannot_judge() -> None:
    mistakes = ConfidentMistakes(2, [0.5, 0.5], 0.0)
    with pytest.raises(DivergedError):
        mistakes.add(make_batch([[0]]), torch.tensor([[float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="mirroring"):
        mistakes.add(make_batch([[0]], mirrored=True), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="expected"):
        mistakes.add(make_batch([[0]]), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="limit=0"):
        ConfidentMistakes(0, [0.5], 0.0)


def test_without_the_extra_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"--report.*pip install matplotlib jinja2"):
        ReportCollector(
            Path("report.html"),
            None,
            names=["a"],
            categories=["general"],
            training_counts=np.array([1]),
            num_training_images=1,
            logit_thresholds=0.0,
        )


PROBE = """<script>addEventListener("load", () => {
  document.body.dataset.drawn = [...document.images].map(image => image.naturalWidth > 0).join();
  document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
});</script>"""


def opened_in_a_browser(page: Path, folder: Path, width: int = 1280) -> tuple[str, list[str]]:
    """The page's content once its script has run, and what the browser's console said."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("NO BROWSER: the report is not opened in one; install chromium to have it looked at")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    flags += [f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000"]
    done = subprocess.run(
        [program, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_a_browser_draws_everything_and_has_no_complaint(odd: Odd, tmp_path: Path) -> None:
    content, complaints = opened_in_a_browser(odd.path, tmp_path)
    assert not complaints
    number = len(odd.report.tags)
    assert f"{number} of {number} tags" in content  # the script ran under the page's own policy
    text = odd.path.read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(re.sub("&#39;sha256-[^&]*&#39;", "'unsafe-inline'", text).replace("</body>", f"{PROBE}</body>"))
    for width in (1280, 500):
        content, complaints = opened_in_a_browser(probed, tmp_path, width)
        (body,) = (each for tag, each in Page(content).found if tag == "body")
        assert (body["data-drawn"] or "").split(",") == ["true"] * text.count("<img ")
        assert body["data-wide"] == "false" and not complaints
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("</body>", "<script>alert(1)</script></body>"))
    assert opened_in_a_browser(broken, tmp_path)[1]  # what is not the page's own is refused, and would be seen here
