"""What is said of a download: the same as a slow and simple count says, in bounded memory, whatever strangers sent."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from made_up_download import HOSTILE, write_download
from PIL import Image
from test_report import Page

from tinyvlm import images, schema
from tinyvlm.data import download_report, sites, tallies
from tinyvlm.data.download_report import shortened, shown_link, statistics
from tinyvlm.data.tallies import Groups, Quantiles, Timeline
from tinyvlm.folders import scan
from tinyvlm.report import stage_report

NUM_ROWS = 6500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_download(tmp_path_factory.mktemp("download"), NUM_ROWS, num_hosts=300)


@pytest.fixture(scope="module")
def rows(folder: Path) -> pa.Table:
    return pa.concat_tables(scan(folder, schema.DOWNLOADED.names))


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """As stats.json gives it back."""
    content: dict[str, Any] = json.loads(json.dumps(statistics(folder), allow_nan=False))
    return content


def whole(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The statistics as a finished stage has them."""
    counts = Counter(status for table in scan(folder, ["status"]) for status in table["status"].to_pylist())
    return {"stage": "download", "rows_in": counts.total(), "rows_out": counts.total(), "statuses": counts, **found}


def simple_host(url: str | None) -> str:
    if url == HOSTILE:  # urlsplit and the expression differ in what a host may not contain
        return "<script>alert(1)<"
    return urlsplit(url or "").hostname or sites.NO_HOST


def test_numbers_are_those_of_a_simple_count(rows: pa.Table, found: dict[str, Any]) -> None:
    num_ok = rows["status"].to_pylist().count("ok")
    assert (found["downloaded"], found["failed"]) == (num_ok, NUM_ROWS - num_ok)
    codes = Counter("no answer" if code is None else str(code) for code in rows["http_status"].to_pylist())
    assert found["http_statuses"] == codes
    assert found["sent_bytes"] == pc.sum(rows["bytes"]).as_py()
    assert found["mean_sent_bytes"] == round(pc.mean(rows["bytes"]).as_py())
    assert found["answered_by_another_row"] == pc.count(rows["duplicate_of"]).as_py() > 0
    assert found["image_bytes"] > 0
    megapixels = found["charts"][1]
    assert sum(megapixels["counts"]) == num_ok, "sizes are known of what decodes"
    sizes = pc.multiply(rows["width"].cast("int64"), rows["height"]).drop_null().to_numpy() / 1e6
    assert megapixels["counts"] == np.histogram(sizes, megapixels["edges"])[0].tolist()


def test_hosts_are_those_of_a_simple_count(rows: pa.Table, found: dict[str, Any]) -> None:
    names = [simple_host(url).replace("::1", "[::1]") for url in rows["url"].to_pylist()]
    counted: dict[str, Counter[str]] = {}
    for name, status in zip(names, rows["status"].to_pylist(), strict=True):
        family = status.split(".")[0]
        outcome = family if family in ("ok", "throttled", "blocked", "dead") else "failed otherwise"
        counted.setdefault(name, Counter())[outcome] += 1
    section = found["sections"]["by_host"]
    totals = {name: counts.total() for name, counts in counted.items()}
    assert [row["rows"] for row in section["largest"]] == sorted(totals.values(), reverse=True)[:15]
    for row in (*section["largest"], *section["lowest_success"]):
        expected = counted[row["name"]]
        assert {outcome: row[outcome] for outcome in expected} == expected
        assert row["rows"] == expected.total()
        assert row["ok_share"] == pytest.approx(expected["ok"] / row["rows"], abs=1e-4)
    judged = {
        n: counts["ok"] / totals[n] for n, counts in counted.items() if totals[n] >= download_report.MIN_ROWS_TO_JUDGE
    }
    assert [row["ok_share"] for row in section["lowest_success"]] == pytest.approx(
        sorted(judged.values())[:15], abs=1e-4
    )
    assert f"{len(counted)} hosts, every one counted exactly" in section["note"]


def test_every_row_is_in_every_count(folder: Path, found: dict[str, Any]) -> None:
    sections = found["sections"]
    domains = sections["by_top_level_domain"]["largest"]
    assert len(domains) <= download_report.NUM_LISTED, "all of them are listed"
    assert sum(row["rows"] for row in domains) == NUM_ROWS
    spent = sections["time_on_the_network"]
    assert sum(spent["charts"][0]["counts"]) == sum(spent["rows_by_attempts"].values()) == NUM_ROWS
    all_rows, *families = spent["milliseconds"]
    assert (all_rows["family"], all_rows["rows"]) == ("all", NUM_ROWS)
    assert sum(row["rows"] for row in families) == NUM_ROWS
    tally = download_report._Tally()
    for table in scan(folder, download_report._COLUMNS):
        tally.add(table)
    for groups in (tally.hosts, tally.sites, tally.domains):
        assert groups.counts.sum() == NUM_ROWS
    assert tally.timeline.curve().counts.sum() == NUM_ROWS
    assert json.loads(json.dumps(tally.content()["sections"])) == sections, "batches or parts, it is the same"


def test_quantiles_are_those_of_all_numbers(rows: pa.Table, found: dict[str, Any]) -> None:
    spent = rows["milliseconds"].to_numpy()
    families = np.array([status.split(".")[0] for status in rows["status"].to_pylist()])
    for row in found["sections"]["time_on_the_network"]["milliseconds"]:
        mine = spent if row["family"] == "all" else spent[families == row["family"]]
        for share in (10, 50, 90, 99):
            exact = np.quantile(mine, share / 100, method="lower")
            assert row[f"p{share}_ms"] == pytest.approx(exact, rel=tallies.ACCURACY + 1e-3, abs=0.1)
        assert row["max_ms"] == pytest.approx(mine.max(), abs=0.06)


def test_two_runs_differ_only_in_what_is_marked_as_measured(
    folder: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    other = statistics(write_download(tmp_path / "again", NUM_ROWS, num_hosts=300, clock=1))
    other = json.loads(json.dumps(other))
    assert other["sections"]["success_over_time"] != found["sections"]["success_over_time"]
    assert other["sections"]["time_on_the_network"] != found["sections"]["time_on_the_network"]

    def lasting(content: dict[str, Any]) -> dict[str, Any]:
        sections = {name: item for name, item in content["sections"].items() if not item.get("measured")}
        return {**content, "sections": sections}

    assert lasting(other) == lasting(found)


def test_what_strangers_named_does_no_harm(folder: Path, found: dict[str, Any]) -> None:
    text = stage_report(whole(folder, found))
    page = Page(text)
    assert "script" not in page.tags
    assert all(target.startswith("data:image/jpeg;base64,") for target in page.loaded)
    assert "<script>alert(1)<" in page.words, "as a host, and as text"
    assert "<b>& more</b>" in page.words, "a detail"
    assert "✓ 6,500 rows in = " in page.words


def test_examples_are_the_first_of_each_status(rows: pa.Table, found: dict[str, Any]) -> None:
    examples = found["sections"]["examples_of_failures"]["a_few_of_each_status"]
    statuses = Counter(rows["status"].to_pylist())
    assert {row["status"] for row in examples} == set(statuses) - {"ok"}
    for status in set(statuses) - {"ok"}:
        mine = rows.filter(pc.equal(rows["status"], status)).slice(0, 3)
        assert [row["key"] for row in examples if row["status"] == status] == mine["key"].to_pylist()
    order = [statuses[row["status"]] for row in examples]
    assert order == sorted(order, reverse=True)


def test_links_and_details_are_cut_to_one_printable_line() -> None:
    assert shortened(None) == ""
    assert shortened("a" * 100) == "a" * 100
    long = shortened("https://x/" + "a" * 500 + "END")
    assert len(long) <= 100
    assert long.startswith("https://x/")
    assert long.endswith("END")
    assert shown_link("https://me:secret@x.test/a@b?c=http://d:e@f") == "https://…@x.test/a@b?c=http://…@f"
    assert shortened("a\nb\u202etxt.exe\x00") == "a·b·txt.exe·", "no letter that turns the line around"


def test_pictures_come_from_all_parts_and_are_shrunk(folder: Path, found: dict[str, Any]) -> None:
    items = found["pictures"]["items"]
    assert len(items) == download_report.NUM_PICTURES
    firsts = [int(item["caption"].split("photo-")[1].split(".")[0]) // 1000 for item in items]
    assert set(firsts) == set(range(7)), "of seven parts"
    for item in items:
        image = Image.open(io.BytesIO(base64.b64decode(item["jpeg_base64"])))
        assert max(image.size) <= download_report.PICTURE_SIDE


def one_part(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "data").mkdir(parents=True)
    empty = dict.fromkeys(schema.DOWNLOADED.names)
    table = pa.Table.from_pylist(
        [{**empty, "key": key, **row} for key, row in enumerate(rows)], schema=schema.DOWNLOADED
    )
    pq.write_table(table, folder / "data" / "part-00000.parquet")
    return folder


def test_large_and_broken_pictures_are_left_out_of_the_sheet(tmp_path: Path) -> None:
    def jpeg(width: int, height: int) -> bytes:
        return images.to_jpeg(Image.new("RGB", (width, height), "red"), 50)

    pictures = [jpeg(40, 20), jpeg(5000, 4000), b"\xff\xd8\xff broken", jpeg(900, 300)]
    rows = [{"status": "ok", "url": "http://x.test/", "image": image, "width": 1, "height": 1} for image in pictures]
    items = statistics(one_part(tmp_path / "d", *rows))["pictures"]["items"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(item["jpeg_base64"]))).size for item in items]
    assert sizes == [(40, 20), (224, 75)]


@pytest.mark.parametrize("statuses", [(), ("dead.dns",), ("ok",), ("bad_url", "ok")])
def test_thin_downloads_have_a_report_too(statuses: tuple[str, ...], tmp_path: Path) -> None:
    folder = one_part(tmp_path / "d", *({"status": status} for status in statuses))
    found = json.loads(json.dumps(statistics(folder), allow_nan=False))
    page = Page(stage_report(whole(folder, found)))
    assert "cannot be drawn" not in page.words
    assert found["downloaded"] == statuses.count("ok")


def test_a_folder_without_parts_has_a_report_too(tmp_path: Path) -> None:
    assert statistics(tmp_path)["downloaded"] == 0


@pytest.mark.parametrize(
    ("url", "host", "site", "domain"),
    [
        ("https://A.B.Example.COM:8443/x?y=http://z/", "a.b.example.com", "example.com", "com"),
        ("http://user:p@ss@img.shop.co.uk/a", "img.shop.co.uk", "shop.co.uk", "uk"),
        ("http://d1.cloudfront.net./a", "d1.cloudfront.net", "cloudfront.net", "net"),
        ("http://[2001:db8::1]:80/", "[2001:db8::1]", "[2001:db8::1]", "(numeric address)"),
        ("http://10.0.0.7/", "10.0.0.7", "10.0.0.7", "(numeric address)"),
        ("http://localhost/", "localhost", "localhost", "localhost"),
        ("http://com/", "com", "com", "com"),
        ("data:image/png;base64,xx", sites.NO_HOST, sites.NO_HOST, sites.NO_HOST),
        ("http:///nothing", sites.NO_HOST, sites.NO_HOST, sites.NO_HOST),
        ("http://good.test\\@evil.test/", "good.test", "good.test", "test"),
        (None, sites.NO_HOST, sites.NO_HOST, sites.NO_HOST),
    ],
)
def test_who_stands_behind_a_link(url: str | None, host: str, site: str, domain: str) -> None:
    assert sites.hosts_of(pa.chunked_array([[url]], pa.string())).to_pylist() == [host]
    assert (sites.site_of(host), sites.top_level_domain_of(host)) == (site, domain)


def test_where_nothing_ends_the_speed_is_zero_and_a_share_unknown(tmp_path: Path) -> None:
    rows = [{"status": "ok", "finished_at": datetime.fromtimestamp(second, UTC)} for second in (100, 100, 102)]
    speed, share = (
        chart["series"]["ok"]["y"]
        for chart in reversed(statistics(one_part(tmp_path / "d", *rows))["sections"]["success_over_time"]["charts"])
    )
    assert (speed, share) == ([2, 0, 1], [100, None, 100])


# --- tallies


def test_more_names_than_there_is_room_for_lose_no_row_and_keep_the_large() -> None:
    rng = np.random.default_rng(1)
    groups, exact = Groups(2, max_names=50), Counter[str]()
    for _ in range(40):
        names = [f"large{n}" for n in rng.integers(10, size=100)] + [f"rare{n}" for n in rng.integers(10**9, size=60)]
        kinds, ones = rng.integers(2, size=160), np.ones(160, np.int64)
        groups.add(names, kinds, ones)
        exact.update(names)
        assert len(groups.names) <= 2 * 50 + 160
    assert groups.undercount > 0
    assert groups.counts.sum() + groups.others.sum() == exact.total()
    counted = dict(zip(groups.names, groups.counts.sum(axis=1).tolist(), strict=True))
    for index in range(10):
        name = f"large{index}"
        assert exact[name] - groups.undercount <= counted[name] <= exact[name]
    largest = sorted(counted, key=lambda name: -counted[name])[:10]
    assert {name.rstrip("0123456789") for name in largest} == {"large"}


def test_a_host_that_comes_late_is_found_among_too_many() -> None:
    groups = Groups(1, max_names=10)
    for batch in range(30):
        names = [f"{batch}-{n}" for n in range(20)]
        groups.add(names, np.zeros(20, np.int64), np.ones(20, np.int64))
    groups.add(["late"], np.array([0]), np.array([500]))
    assert dict(zip(groups.names, groups.counts[:, 0].tolist(), strict=True))["late"] == 500


def test_that_counts_are_not_exact_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_report, "Groups", lambda num_kinds: Groups(num_kinds, max_names=3))
    rows = [{"status": "ok", "url": f"http://host{n if n % 2 else 0}.test/"} for n in range(100)]
    section = statistics(one_part(tmp_path / "d", *rows))["sections"]["by_host"]
    assert section["note"].startswith(
        "There are too many to count each: these may be up to 1 rows too low, and 48 rows"
    )
    assert section["largest"][0]["rows"] == 50


def test_quantiles_of_odd_numbers() -> None:
    quantiles = Quantiles(2)
    assert (quantiles.at(0.5), quantiles.maximum(), quantiles.num_values()) == (0, 0, 0)
    values = np.array([0, math.nan, 1e-9, 5, 1e15], np.float32)
    quantiles.add(np.array([0, 0, 0, 0, 1]), values)
    assert quantiles.num_values(0) == 3
    assert quantiles.at(0, 0) == quantiles.at(0.5, 0) == 0
    assert quantiles.at(1, 0) == pytest.approx(5, rel=tallies.ACCURACY)
    assert quantiles.at(1, 1) == pytest.approx(Quantiles.HIGHEST, rel=2 * tallies.ACCURACY)
    assert quantiles.maximum(1) == np.float32(1e15)


def test_a_long_run_has_few_bins_and_all_rows() -> None:
    timeline = Timeline(2, max_bins=100)
    for hour in range(50):
        seconds = np.arange(3600) + 3600 * hour
        timeline.add(seconds, seconds % 2)
    assert len(timeline._bins) <= 100
    curve = timeline.curve(max_points=30)
    assert len(curve.counts) <= 30
    assert curve.counts.sum() == 50 * 3600
    assert curve.widths_s.sum() == pytest.approx(50 * 3600, abs=timeline.width_s)
    rates = curve.counts.sum(axis=1) / curve.widths_s
    assert rates[:-1] == pytest.approx(np.ones(len(rates) - 1), rel=0.01)


def test_time_in_which_nothing_was_done_is_left_out() -> None:
    timeline = Timeline(1)
    for start in (0, 86_400):
        seconds = np.arange(600) + start
        timeline.add(seconds, np.zeros(600, np.int64))
    curve = timeline.curve()
    assert (curve.num_pauses, curve.seconds) == (1, 1200)
    assert curve.counts.sum() == 1200
    assert (curve.counts[:, 0] / curve.widths_s).tolist() == [1.0] * len(curve.counts)
