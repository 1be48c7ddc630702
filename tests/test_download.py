"""`python -m data download`: pinned, resumable, compared with checksums; against a stand-in of the hub, with faults."""

import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import numpy
import pyarrow
import pyarrow.parquet as parquet
import pytest
from conftest import ROOT
from hub_stand_in import StandIn, picture_bytes
from PIL import Image

from data import download as downloads
from data.download import DATA_SETS, download
from data.errors import UserError
from data.images import open_image

pytestmark = pytest.mark.slow

OLD, NEW = "a" * 40, "b" * 40
MIND2WEB, SMOLTALK = "osunlp/Multimodal-Mind2Web", "HuggingFaceTB/smol-smoltalk"


@pytest.fixture
def hub(monkeypatch):
    stand_in = StandIn()
    endpoint = f"http://{stand_in.netloc}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN_PATH", os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield stand_in
    stand_in.release.set()
    stand_in.shutdown()
    stand_in.server_close()


def table(rows: list[dict], row_group_size: int = 4) -> bytes:
    """A parquet file with a row a page."""
    sink, settings = pyarrow.BufferOutputStream(), dict(use_dictionary=False, write_batch_size=1, data_page_size=1)
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=row_group_size, **settings)
    return sink.getvalue().to_pybytes()


def numbered(first: int, last: int, num_bytes: int = 10) -> list[dict]:
    noise = numpy.random.default_rng(first)
    return [{"number": number, "screenshot": noise.bytes(num_bytes)} for number in range(first, last)]


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_names_of_the_recipes():
    assert list(DATA_SETS) == ["smoltalk", "ultrafeedback", "warmstart", "countdown", "burberry", "guicourse", "mind2web"]
    assert all(dataset.licence and dataset.files for dataset in DATA_SETS.values())


def test_files_manifest_and_second_call(hub, tmp_path, capsys):
    content = {"data/train-00000-of-00001.parquet": table(numbered(0, 9)), "README.md": b"about"}
    hub.commits[SMOLTALK] = [(OLD, content)]
    manifest = download("smoltalk", tmp_path / "raw")
    said = capsys.readouterr().out
    assert OLD in said and "apache-2.0" in said and "openrail" in said and "MiB in 1 files" in said
    assert files_below(tmp_path / "raw") == ["data/train-00000-of-00001.parquet", "manifest.json"]
    path = tmp_path / "raw" / "data/train-00000-of-00001.parquet"
    assert path.read_bytes() == content["data/train-00000-of-00001.parquet"]
    stored = json.loads((tmp_path / "raw" / "manifest.json").read_text())
    assert stored == manifest and stored["commits"] == {SMOLTALK: OLD} and stored["time"]
    assert stored["licence"] == "apache-2.0" and stored["cards"] == {SMOLTALK: "openrail"}
    (file,) = stored["files"]
    assert file["bytes"] == path.stat().st_size and file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    hub.requests.clear()
    download("smoltalk", tmp_path / "raw")
    assert hub.requests == [] and "nothing to do" in capsys.readouterr().out


def test_a_file_of_the_wrong_size_is_fetched_again_alone(hub, tmp_path):
    hub.commits[SMOLTALK] = [(OLD, {"a.parquet": table(numbered(0, 9)), "b.parquet": table(numbered(9, 30))})]
    before = download("smoltalk", tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"short")
    hub.commits[SMOLTALK].append((NEW, {}))  # and the pin holds
    after = download("smoltalk", tmp_path)
    assert after["files"] == before["files"] and not hub.ranges("a.parquet")[1:] and len(hub.ranges("b.parquet")) == 2


def test_the_first_commit_is_the_pin(hub, tmp_path, capsys):
    first, second = table(numbered(0, 9)), table(numbered(0, 12))
    hub.commits[SMOLTALK] = [(OLD, {"a.parquet": first, "gone.parquet": first})]
    download("smoltalk", tmp_path)
    hub.commits[SMOLTALK].append((NEW, {"a.parquet": second}))
    kept = download("smoltalk", tmp_path, patterns=["a.*"])
    assert kept["commits"] == {SMOLTALK: OLD} and (tmp_path / "a.parquet").read_bytes() == first
    assert "pinned by the first download" in capsys.readouterr().out
    assert not (tmp_path / "gone.parquet").exists()
    moved = download("smoltalk", tmp_path, ["main"])
    assert moved["commits"] == {SMOLTALK: NEW} and (tmp_path / "a.parquet").read_bytes() == second
    with pytest.raises(UserError, match="Revision Not Found|404"):
        download("smoltalk", tmp_path, ["nothing"])
    assert json.loads((tmp_path / "manifest.json").read_text()) == moved


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, tmp_path):
    content = table(numbered(0, 30, 2**20), 1)
    hub.commits[SMOLTALK] = [(OLD, {"a.parquet": content})]
    hub.cuts["a.parquet"], hub.cut_at = 1, 25 * 2**20
    download("smoltalk", tmp_path)
    assert (tmp_path / "a.parquet").read_bytes() == content
    first, second = hub.ranges("a.parquet")
    assert first is None and int(second.removeprefix("bytes=").rstrip("-")) >= 10_000_000


def test_a_connection_that_breaks_always_is_one_sentence(hub, tmp_path):
    hub.commits[SMOLTALK] = [(OLD, {"a.parquet": table(numbered(0, 30, 1000))})]
    hub.cuts["a.parquet"], hub.cut_at = 100, 50
    with pytest.raises(UserError, match="a.parquet: .*the same command goes on"):
        download("smoltalk", tmp_path)
    assert not (tmp_path / "manifest.json").exists() and (tmp_path / "plan.json").exists()
    hub.cuts.clear()
    download("smoltalk", tmp_path)
    assert files_below(tmp_path) == ["a.parquet", "manifest.json"]


def test_a_killed_download_goes_on(hub, tmp_path):
    """SIGKILL in the middle of the second file: the first is not asked for again, the second from where it stopped."""
    first, second = table(numbered(0, 9)), table(numbered(0, 30, 2**20), 1)
    hub.commits[SMOLTALK] = [(OLD, {"a.parquet": first, "b.parquet": second})]
    hub.cuts["b.parquet"], hub.cut_at = 1, 25 * 2**20
    hub.stalls.add("b.parquet")
    environment = dict(os.environ, HF_ENDPOINT=f"http://{hub.netloc}", NO_PROXY="127.0.0.1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    command = [sys.executable, "-m", "data", "download", "smoltalk", "--output_dir", str(tmp_path / "raw")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    part = tmp_path / "raw" / "b.parquet.part"
    gone = os.pidfd_open(process.pid)
    while not part.exists() or part.stat().st_size < 20_000_000:
        assert not select.select([gone], [], [], 0.002)[0], "it ended by itself"
    os.close(gone)
    process.kill()
    process.wait()
    assert files_below(tmp_path / "raw") == ["a.parquet", "b.parquet.part", "plan.json"]
    num_bytes = part.stat().st_size
    hub.commits[SMOLTALK].append((NEW, {"a.parquet": second}))  # main moves on meanwhile
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert files_below(tmp_path / "raw") == ["a.parquet", "b.parquet", "manifest.json"]
    assert (tmp_path / "raw" / "b.parquet").read_bytes() == second
    assert hub.ranges("a.parquet") == [None] and hub.ranges("b.parquet") == [None, f"bytes={num_bytes}-"]


@pytest.mark.parametrize("name", ["a.parquet", "b.json"])  # by sha256, and by git's name of a small file
def test_other_content_of_the_same_size_is_refused(hub, tmp_path, name):
    content = table(numbered(0, 9))
    hub.commits[SMOLTALK] = [(OLD, {name: content})]
    (tmp_path / f"{name}.part").write_bytes(b"another file" * 3)
    with pytest.raises(UserError, match="checksum"):
        download("smoltalk", tmp_path, patterns=["*"])
    assert files_below(tmp_path) == ["plan.json"]
    download("smoltalk", tmp_path, patterns=["*"])
    assert (tmp_path / name).read_bytes() == content


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(hub, tmp_path, monkeypatch):
    hub.commits[SMOLTALK] = [(OLD, {"a.parquet": table(numbered(0, 30, 2**20))})]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage._replace(free=downloads.FREE_BYTES + 2**20))
    with pytest.raises(UserError, match=r"30\.\d MiB are to come .* 1\.0 GiB free.*--limit"):
        download("smoltalk", tmp_path)
    assert hub.ranges("a.parquet") == []


def test_no_file_matches(hub, tmp_path):
    hub.commits[SMOLTALK] = [(OLD, {"rows.csv": b"1,2"})]
    with pytest.raises(UserError, match="rows.csv.*--files"):
        download("smoltalk", tmp_path)


@pytest.mark.parametrize("name", ["../../a.parquet", "/a.parquet", "x/../../a.parquet"])
def test_a_listing_that_leaves_the_folder_is_refused(hub, tmp_path, name):
    hub.commits[SMOLTALK] = [(OLD, {name: b"1"})]
    with pytest.raises(UserError, match="outside the folder"):
        download("smoltalk", tmp_path / "raw")
    assert files_below(tmp_path) == []


def test_no_hub(hub, tmp_path):
    with pytest.raises(UserError, match=SMOLTALK):  # the stand-in has no such set
        download("smoltalk", tmp_path)


# ---- the first rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_group_size", [2, 100])
def test_the_first_rows_of_each_split(hub, tmp_path, capsys, row_group_size):
    numbers = [(0, 10), (10, 40), (40, 50)]
    shards = {f"data/train-0000{i}-of-00003-{i}ab.parquet": table(numbered(*numbers[i], 2**20), row_group_size)
              for i in range(3)}  # fmt: skip
    shards["data/test_task-00000-of-00001-c.parquet"] = table(numbered(100, 105))
    shards["data/test_domain-00000-of-00001-c.parquet"] = table(numbered(200, 230))
    hub.commits[MIND2WEB] = [(OLD, shards)]
    download("mind2web", tmp_path, limit=13)
    said = capsys.readouterr().out
    assert "50.0 MiB in 4 files; left out are" in said and "the first 13 rows of each split: about 13.0 MiB" in said
    assert files_below(tmp_path) == ["data/test_task-00000-of-00001-c.parquet", "data/train-00000-of-00003-0ab.parquet",
                                     "data/train-00001-of-00003-1ab.parquet", "manifest.json"]  # fmt: skip
    train = [parquet.read_table(path).to_pylist() for path in sorted(tmp_path.glob("data/train-*"))]
    assert train == [numbered(0, 10, 2**20), numbered(10, 40, 2**20)[:3]]
    ranges = [range_ for range_ in hub.ranges("data/train-00001-of-00003-1ab.parquet") if range_]
    fetched = sum(int(last) - int(first) + 1 for first, last in (r.removeprefix("bytes=").split("-") for r in ranges))
    assert fetched < 20 * 2**20  # of 30: three rows, what is read ahead, and the footer with what lies before it

    hub.requests.clear()
    download("mind2web", tmp_path, limit=13)
    assert hub.requests == []
    download("mind2web", tmp_path, limit=30)
    assert len(parquet.read_table(tmp_path / "data/train-00001-of-00003-1ab.parquet")) == 20
    assert hub.ranges("data/train-00000-of-00003-0ab.parquet") != [None]  # footers alone: it was whole
    assert None not in hub.ranges("data/train-00000-of-00003-0ab.parquet")


def test_rows_of_a_json_whose_pictures_are_there(hub, tmp_path):
    import pandas

    rows = [{"uid": f"u{i}", "image_id": f"image-{i % 6}"} for i in range(20)]
    pictures = pandas.DataFrame({"base64": [f"{i}" * 50 for i in range(6)]}, index=[f"image-{i}" for i in range(6)])
    pictures.index.name = "image_id"
    pictures.to_parquet(tmp_path / "source")
    environment = {"ocr_grounding_test_data.json": json.dumps(rows).encode(),
                   "ocr_grounding_test_images.parquet": (tmp_path / "source").read_bytes(),
                   "ocr_grounding_train_stage1_data.json": b"[]"}  # fmt: skip
    for name in DATA_SETS["guicourse"].repositories:
        hub.commits[name] = [(OLD, environment)]
    folder = tmp_path / "raw"
    download("guicourse", folder, limit=2)
    assert files_below(folder) == ["GUIEnv/ocr_grounding_test_data.json", "GUIEnv/ocr_grounding_test_images.parquet",
                                   "manifest.json"]  # fmt: skip
    kept = json.loads((folder / "GUIEnv/ocr_grounding_test_data.json").read_text())
    assert kept == [row for row in rows if row["image_id"] in ("image-0", "image-1")]
    (folder / "GUIEnv/ocr_grounding_test_data.json").unlink()
    download("guicourse", folder, limit=2)
    assert json.loads((folder / "GUIEnv/ocr_grounding_test_data.json").read_text()) == kept
    with pytest.raises(UserError, match="takes 3, one for each"):
        download("guicourse", folder, ["main"])


def test_a_folder_without_its_manifest_is_checked(hub, tmp_path):
    """Whole files by their checksum, and rows, which have none, are fetched again."""
    hub.commits[SMOLTALK] = [(OLD, {"a.parquet": table(numbered(0, 9)), "b.parquet": table(numbered(0, 2))})]
    download("smoltalk", tmp_path, limit=4)
    for name in ("a", "b"):
        content = bytearray((tmp_path / f"{name}.parquet").read_bytes())
        content[10] ^= 1
        (tmp_path / f"{name}.parquet").write_bytes(content)
    (tmp_path / "manifest.json").unlink()
    download("smoltalk", tmp_path, limit=5)
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == numbered(0, 5)
    assert parquet.read_table(tmp_path / "b.parquet").to_pylist() == numbered(0, 2)


# ---- pictures of a table ----------------------------------------------------------------------------------------------

BURBERRY = DATA_SETS["burberry"].repositories[0]


@pytest.fixture
def shop(hub, monkeypatch):
    """Serves pictures by name; the limits are small."""
    from data import fetch_images

    limits = fetch_images.Limits(bytes=100_000, seconds=0.5, redirects=2, tries=2, pause=0)
    original = fetch_images.fetch_images
    monkeypatch.setattr(fetch_images, "fetch_images", lambda *arguments: original(*arguments, limits))

    def image(content, kind="image/png", **keywords):
        return lambda handler: handler.send(200, content, {"Content-Type": kind}, **keywords)

    def stall(handler):
        handler.send(200, b"", {"Content-Type": "image/png"}, length=1000)
        hub.release.wait(60)

    def drip(handler):  # a byte now and then keeps every single wait short
        handler.send(200, b"", {"Content-Type": "image/png"}, length=10**9)
        while not hub.release.wait(0.05):
            handler.wfile.write(b"x")

    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not hub.release.wait(0.05):
            handler.wfile.write(b"x")

    def busy(handler):
        hub.pictures["busy"] = image(red)
        handler.send(429, headers={"Retry-After": "7"})

    def truncate(handler):
        handler.send(200, red[:40], {"Content-Type": "image/png"}, length=len(red))
        handler.close_connection = True

    def flaky(handler):
        hub.pictures["flaky"] = image(picture_bytes("blue", "JPEG"), "image/jpeg")
        handler.send(503)

    def move(to):
        return lambda handler: handler.send(302, headers={"Location": to})

    red = picture_bytes("red")
    bomb = bytearray(picture_bytes("red", "BMP"))
    bomb[18:26] = (8_000).to_bytes(4, "little") * 2  # width and height in the header
    hub.pictures = {
        "red": image(red), "again": image(red), "flaky": flaky, "moved": move("/pictures/red"),
        "gone": lambda handler: handler.send(404), "page": image(b"<html>", "text/html"), "cut": truncate,
        "torn": image(red[:40]), "text": image(b"hello"), "large": image(bytes(200_000)),
        "slow": stall, "drip": drip, "endless": endless,
        "busy": busy, "a b": image(red), "nowhere": move("file:///etc/hostname"), "junk": lambda h: h.wfile.write(b"\x1b[2J\n"),
        "bomb": image(bytes(bomb)), "loop": move("/pictures/loop"), "away": move("http://localhost:1/x"),
        "tiff": image(picture_bytes("red", "TIFF")), "broken": lambda handler: handler.send(500),
    }  # fmt: skip
    return hub


def sell(hub, urls: list[str]) -> None:
    rows = [{"title": f"coat {i}", "imageurl": url, "full_price": 10.5 * i} for i, url in enumerate(urls)]
    hub.commits[BURBERRY] = [(OLD, {"data/train-00000-of-00001-b0.parquet": table(rows)})]


BAD = {
    "gone": "answered 404", "page": "text/html, not a picture", "cut": "cut short", "torn": "damaged", "text": "damaged",
    "large": "more than 100,000 bytes", "bomb": "8000 x 8000",
    "slow": "not there after 0.5 seconds", "drip": "not there after 0.5 seconds", "endless": "not there after 0.5 seconds",
    "nowhere": "no web address", "junk": "no answer (?[2J)",
    "loop": "too many redirects", "away": "localhost:1 is not https of", "tiff": "is not one of", "broken": "500, 2 times",
}  # fmt: skip


def test_pictures_of_a_table(shop, tmp_path, capsys):
    good = ["red", "again", "flaky", "moved", "a b"]
    urls = [f"http://{shop.netloc}/pictures/{name}" for name in [*good, *BAD]]
    others = {"N.A.": "not a URL", "file:///etc/hostname": "not a URL",
              f"https://{shop.netloc}/pictures/red": "is not https of",
              "http://user@localhost/x": "is not https of"}  # fmt: skip
    sell(shop, urls + list(others))
    manifest = download("burberry", tmp_path, hosts=[shop.netloc])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["title"] for row in rows] == [f"coat {i}" for i in range(5)] and rows[1]["full_price"] == 10.5
    assert [open_image(tmp_path / row["image"]).size for row in rows] == [(40, 30)] * 5
    assert len({row["image"] for row in rows}) == 2 and rows[0]["image"] == rows[3]["image"]  # stored by content
    assert rows[2]["image"].endswith(".jpeg") and Image.open(tmp_path / rows[2]["image"]).format == "JPEG"

    bad = [json.loads(line) for line in (tmp_path / "bad_images.jsonl").read_text().splitlines()]
    assert [row["where"].rpartition(":")[2] for row in bad] == [str(number) for number in range(6, 6 + len(BAD) + len(others))]
    expected = [*BAD.values(), *others.values()]
    assert [(row["problem"], want) for row, want in zip(bad, expected, strict=True) if want not in row["problem"]] == []
    said = capsys.readouterr().out
    assert f"5 of {len(urls) + 4} rows have their picture" in said and f"{len(bad)} rows have none" in said
    listed = {file["path"] for file in manifest["pictures"]}
    assert listed == set(files_below(tmp_path)) - {"manifest.json", "data/train-00000-of-00001-b0.parquet"}


def test_pictures_are_fetched_once_and_failures_when_asked(shop, tmp_path):
    sell(shop, [f"http://{shop.netloc}/pictures/{name}" for name in ("red", "gone")])
    download("burberry", tmp_path, hosts=[shop.netloc])
    shop.pictures["gone"] = shop.pictures["again"]
    shop.requests.clear()
    download("burberry", tmp_path, hosts=[shop.netloc])
    assert shop.requests == []
    (tmp_path / "bad_images.jsonl").unlink()
    with open(tmp_path / "images.jsonl", "a") as journal:
        journal.write('{"url": "torn by a ki')
    download("burberry", tmp_path, hosts=[shop.netloc])
    assert [path for _, path, _ in shop.requests] == ["/pictures/gone"]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "bad_images.jsonl").read_text() == ""


def test_a_server_that_asks_for_time_is_given_it(shop, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("data.fetch_images.time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic))
    sell(shop, [f"http://{shop.netloc}/pictures/busy"])
    download("burberry", tmp_path, hosts=[shop.netloc])
    assert waits == [0, 0.5] and (tmp_path / "bad_images.jsonl").read_text() == ""  # 7 seconds, but no more than the limit


def test_a_second_kill_costs_no_picture(shop, tmp_path, monkeypatch):
    sell(shop, [f"http://{shop.netloc}/pictures/red"])
    download("burberry", tmp_path, hosts=[shop.netloc])
    (tmp_path / "bad_images.jsonl").unlink()
    journal, at_work = tmp_path / "images.jsonl", []
    before = journal.read_text()
    monkeypatch.setattr("data.fetch_images.as_completed", lambda waiting: at_work.append(journal.read_text()) or [])
    download("burberry", tmp_path, hosts=[shop.netloc])
    assert at_work[0].startswith(before)  # what a kill at this moment would leave


def test_pictures_come_from_the_shop_alone(shop, tmp_path):
    sell(shop, [f"http://{shop.netloc}/pictures/red"])
    download("burberry", tmp_path)
    assert "is not https of assets.burberry.com" in (tmp_path / "bad_images.jsonl").read_text()
    assert [path for _, path, _ in shop.requests if "pictures" in path] == []


@pytest.mark.parametrize("arguments, sentence", [
    (["smoltak"], "did you mean smoltalk?"), (["x"], "there are smoltalk, "), (["smoltalk", "--limit", "0"], "--limit 0"),
    (["smoltalk", "--image_host", "a.b"], "--image_host has no use"),
])  # fmt: skip
def test_wrong_flags(arguments, sentence, tmp_path):
    done = subprocess.run([sys.executable, "-m", "data", "download", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and sentence in done.stderr
    assert done.stderr.count("\n") == 1
