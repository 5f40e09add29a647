import base64
import json
import re
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from scripts.inspect_dataset import main
from scripts.make_demo_dataset import make_demo_dataset
from tagger.data.index import open_index
from tagger.data.parallel import map_blocks
from tagger.data.survey import survey
from tagger.report.drawing import short_bytes, short_number
from tests.pictures import encode, scene, worn_copy

NUM_DEMO = 12
ODD_TAG = "<script>alert(1)</script> & 日本"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo set, smaller, with every sort of fault added."""
    root = tmp_path_factory.mktemp("inspect") / "demo"
    make_demo_dataset(root, count=NUM_DEMO, seed=3)
    extra = root / "extra"
    extra.mkdir()

    def add(stem: str, content: bytes, suffix: str, sidecar: object = None) -> None:
        (extra / f"{stem}.{suffix}").write_bytes(content)
        sidecar = {"tags": ["scene"], "rating": "general"} if sidecar is None else sidecar
        (extra / f"{stem}.json").write_text(sidecar if isinstance(sidecar, str) else json.dumps(sidecar))

    add("original", encode(scene(1), "PNG"), "png")
    add("worn copy", worn_copy(scene(1)), "jpg")
    add("another copy", encode(scene(1), "WEBP"), "webp", {"tags": ["scene", ODD_TAG], "rating": "explicit"})
    add("no image", b"something else", "png")
    jpeg = encode(scene(2), "JPEG")
    add("cut", jpeg[: len(jpeg) // 2], "jpg")
    add("named wrongly", encode(scene(3), "PNG"), "jpg")
    add("bad sidecar", encode(scene(4), "PNG"), "png", "{")
    add("odd rating", encode(scene(5), "PNG"), "png", {"tags": ["scene"], "rating": "splendid"})
    (extra / "alone.png").write_bytes(encode(scene(6), "PNG"))
    (extra / "orphan.json").write_text('{"tags": ["scene"]}')
    return root


def inspect(root: Path, tmp_path: Path, *more: str) -> int:
    return main([str(root), "--index-dir", str(root.parent / "index" if root.exists() else tmp_path), *more])


def test_a_set_with_faults_is_told_in_full(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "pages" / "page.html"
    assert inspect(demo, tmp_path, "--json", "--output", str(page)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format_version"] == 1 and found["num_images"] == NUM_DEMO + 7
    pictures = [path for path in demo.rglob("*.*") if path.suffix not in (".json", "")]
    kept = {path for path in pictures if path.stem not in ("no image", "bad sidecar", "alone")}
    kinds = [Image.open(path).format for path in kept]
    assert {name.upper(): count for name, count in found["formats"].items()} == {k: kinds.count(k) for k in set(kinds)}
    assert found["total_bytes"] == sum(path.stat().st_size for path in kept)
    widths = [Image.open(path).width for path in kept]
    assert found["widths"]["median"] == np.median(widths) and found["widths"]["most"] == max(widths)
    assert sum(found["widths"]["counts"]) == len(kept)
    problems = {problem["kind"]: problem["count"] for problem in found["problems"]}
    assert problems == {
        "sidecar rejected: invalid JSON": 1,
        "image without sidecar": 1,
        "sidecar without image": 1,
        "rating not understood": 1,
        "suffix of another format (read by content)": 1,
        "image refused: not an image": 1,
        "image refused: truncated": 1,
    }
    (copies,) = (group for group in found["duplicates"]["largest"] if group["size"] == 3)
    names = [Path(name).name for name, _ in copies["images"]]
    assert names == ["another copy.webp", "original.png", "worn copy.jpg"]
    tags = dict(found["tag_counts"])
    assert tags["scene"] == 7 and tags[ODD_TAG] == 1
    assert found["rare_tags"]["2"] == sum(count < 2 for count in tags.values())
    assert found["ratings"]["explicit"] == 1 and sum(found["ratings"].values()) == NUM_DEMO + 7


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.sources += [source] if (source := given.get("src")) else []
        self.links += [link] if (link := given.get("href")) else []
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_what_others_wrote(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert inspect(demo, tmp_path, "--output", str(path)) == 0
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and not page.links and "script" not in page.tags
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"url\(|@import|https?://", text)
    drawings = [source for source in page.sources if source.startswith("data:image/svg+xml;base64,")]
    assert len(drawings) == 5
    for drawing in drawings:
        assert ElementTree.fromstring(base64.b64decode(drawing.partition(",")[2])).tag.endswith("svg")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; 日本" in text
    assert "rated explicit" in text
    again = tmp_path / "again.html"
    assert inspect(demo, tmp_path, "--output", str(again)) == 0
    assert again.read_text(encoding="utf-8") == text


def test_the_terminal_says_the_same_without_the_page(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert inspect(demo, tmp_path, "--no-page") == 0
    told = capsys.readouterr().out
    for words in ("images with tags", "JPEG", "scene", "invalid JSON", "image refused: truncated", "near-duplicates"):
        assert words in told
    assert not list(tmp_path.glob("*.html"))


def test_without_the_extra_the_terminal_still_works(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    assert inspect(demo, tmp_path, "--no-duplicates") == 0
    printed = capsys.readouterr()
    assert "images with tags" in printed.out and "near-duplicates" not in printed.out
    expected = "no page: the page needs matplotlib and Jinja2: pip install matplotlib jinja2 (the extra 'report')\n"
    assert expected in printed.err  # what other tests left logging to the console may stand beside it
    assert inspect(demo, tmp_path, "--output", "page.html") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], demo: Path) -> None:
    assert inspect(tmp_path / "nowhere", tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for wrong in (["--bits", "9"], ["--no-page", "--output", "x"], ["--output", str(demo)]):
        with pytest.raises(SystemExit) as stopped:
            inspect(demo, tmp_path, *wrong)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_is_seldom_together_is_counted_as_by_hand(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    rows = [["a", "b"], ["a", "b", "c"], ["a", "c"], ["b"], ["d"]]
    for number, tags in enumerate(rows):
        Image.new("RGB", (8 + number, 8)).save(root / f"{number}.png")
        (root / f"{number}.json").write_text(json.dumps({"tags": tags}))
    found = survey(open_index([root], tmp_path / "index"), bits=None, max_pixels=100)
    pairs = {(pair.first, pair.second): (pair.count, round(pair.share, 3)) for pair in found.co_occurring}
    assert pairs == {("a", "b"): (2, 0.667), ("a", "c"): (2, 1.0), ("b", "c"): (1, 0.5)}
    assert found.tag_counts == (("a", 3), ("b", 3), ("c", 2), ("d", 1))
    assert found.duplicates is None and not found.problems


def test_blocks_come_in_order_and_an_early_end_leaves_no_thread() -> None:
    before = threading.active_count()
    blocks = map_blocks(lambda items: sum(items), 100, block=7, num_threads=3)
    assert next(blocks) == (range(0, 7), 21)
    blocks.close()
    assert threading.active_count() == before
    whole = list(map_blocks(lambda items: list(items), 20, block=6, num_threads=2))
    assert [number for _, numbers in whole for number in numbers] == list(range(20))
    with pytest.raises(ZeroDivisionError):
        list(map_blocks(lambda items: 1 // (items.start - 6), 20, block=6, num_threads=2))


def test_figures_are_short() -> None:
    assert [short_number(value) for value in (1234.4, 0.45678, 12, 0.00774)] == ["1,234", "0.457", "12", "0.00774"]
    assert [short_bytes(value) for value in (12, 1234567, 5.2e12)] == ["12 bytes", "1.23 MB", "5.2 TB"]
