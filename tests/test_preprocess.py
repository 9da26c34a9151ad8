"""Downloaded pictures become square ones; what was finished already passes through."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tinyvlm import images, schema
from tinyvlm.data.download import Download, DownloadConfig
from tinyvlm.data.fetch import Answer, Fetcher
from tinyvlm.data.links import LinksConfig, open_links
from tinyvlm.data.preprocess import RATIO_EDGES, Preprocess, PreprocessConfig
from tinyvlm.errors import ConfigError
from tinyvlm.folders import scan
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local

PICTURE = PictureConfig(size=32, tower_size=24)
LIMITS = LimitConfig()
SIZES = [(40, 40), (100, 60), (100, 59), (30, 90), (9, 200), (64, 64)]


def png(width: int, height: int) -> bytes:
    rng = np.random.default_rng(width * 1000 + height)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers "http://host/40x30" with a picture of that size, and everything else with 404."""

    async def fetch(self: Fetcher, url: str) -> Answer:
        width, cross, height = url.rsplit("/", 1)[1].partition("x")
        if not cross:
            return Answer("dead.http404", "HTTP 404", None, 404, url, 1)
        return Answer(body=png(int(width), int(height)), http_status=200, final_url=url, attempts=1)

    monkeypatch.setattr(Fetcher, "fetch", fetch)


def downloaded(root: Path, store: Any, picture: PictureConfig = PICTURE) -> None:
    """A finished download folder with one dead link among pictures of all `SIZES`."""
    root.mkdir(exist_ok=True)
    names = [f"{width}x{height}" for width, height in SIZES] + ["dead"]
    (root / "links.csv").write_text("u,c\n" + "".join(f"http://host/{name},{name}\n" for name in names))
    config = LinksConfig(url_column="u", caption_column="c", rows_per_part=3)
    stage = Download(DownloadConfig(store=store), picture, LIMITS)
    run_local(StageRun(stage, open_links(root / "links.csv", config, root), root))


def preprocessed(root: Path, picture: PictureConfig = PICTURE) -> StageRun:
    stage = Preprocess(PreprocessConfig(picture=picture, limits=LIMITS))
    run = StageRun(stage, open_input(stage, [root]), root)
    run_local(run)
    return run


def rows_of(run: StageRun) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        pa.concat_tables(scan(run.folder, schema.PREPROCESSED.names)).sort_by("key").to_pylist()
    )
    return rows


def test_originals_become_square(web: None, tmp_path: Path) -> None:
    downloaded(tmp_path, "original")
    rows = rows_of(preprocessed(tmp_path))
    assert [(row["original_width"], row["original_height"]) for row in rows] == SIZES
    assert [row["fit"] for row in rows] == ["crop", "crop", "pad", "pad", "pad", "crop"]
    for row, (width, height) in zip(rows, SIZES, strict=True):
        assert row["image"] == images.finish(png(width, height), PICTURE, LIMITS).jpeg
        assert (row["status"], row["caption"]) == ("ok", f"{width}x{height}")


def test_both_roads_give_the_same_pictures(web: None, tmp_path: Path) -> None:
    for store in ("original", "finished"):
        downloaded(tmp_path / store, store)
    assert rows_of(preprocessed(tmp_path / "original")) == rows_of(preprocessed(tmp_path / "finished"))


def test_finished_pictures_of_another_size_are_refused(web: None, tmp_path: Path) -> None:
    downloaded(tmp_path, "finished")
    with pytest.raises(ConfigError, match=r"size=64.*32.*download\.store=original"):
        preprocessed(tmp_path, PictureConfig(size=64))
    assert not list(tmp_path.glob("preprocess-*"))
    preprocessed(tmp_path, PictureConfig(size=32, tower_size=32))


def test_a_damaged_picture_is_a_row(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "key": [1, 2, 3],
            "status": ["ok"] * 3,
            "image": [png(40, 40), png(40, 40)[:60], b"<html>"],
            "width": [40, 40, None],
            "height": [40, 40, None],
            **{name: [None] * 3 for name in schema.DOWNLOADED.names if name not in _GIVEN},
        }
    )
    rows = rows.select(schema.DOWNLOADED.names).cast(schema.DOWNLOADED)
    out = Preprocess(PreprocessConfig(picture=PICTURE, limits=LIMITS))(rows).to_pylist()
    assert [(row["key"], row["status"]) for row in out] == [(1, "ok"), (2, "corrupt"), (3, "not_image")]
    assert [row["image"] is None for row in out] == [False, True, True]


_GIVEN = ("key", "status", "image", "width", "height")


def test_statistics(web: None, tmp_path: Path) -> None:
    downloaded(tmp_path, "original")
    run = preprocessed(tmp_path)
    statistics = json.loads((run.folder / "stats.json").read_text())
    assert (statistics["cropped"], statistics["padded"]) == (3, 3)
    histogram = statistics["charts"][1]
    assert histogram["edges"] == RATIO_EDGES
    assert len(histogram["counts"]) == 19
    by_edge = dict(zip(RATIO_EDGES, histogram["counts"], strict=False))
    assert (by_edge[0.6], by_edge[0.55], by_edge[0.3], by_edge[0.05], by_edge[0.95]) == (1, 1, 1, 1, 2)
    assert histogram["mark"]["x"] == PICTURE.crop_ratio
    assert len(statistics["pictures"]["items"]) == 6
    fits = [item["caption"].split()[-1] for item in statistics["pictures"]["items"]]
    assert sorted(fits) == ["crop"] * 3 + ["pad"] * 3
    assert fits[:2] == ["crop", "pad"], "in turn within each part"
    for item in statistics["pictures"]["items"]:
        assert images.decode(base64.b64decode(item["jpeg_base64"]), LIMITS).size == (32, 32)
