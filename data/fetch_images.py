"""Pictures that a table names by URL, fetched once, so that training never opens a URL.

A URL of a table is a stranger's: https alone, from named hosts alone (redirects too), with bounds on bytes, seconds,
redirects and pixels, and the bytes must decode as a picture. A picture is stored under its content's hash. Every success
is one line of images.jsonl at once, so a killed run asks for what is missing; every failure is one line of
bad_images.jsonl with its reason, and its row is left out of rows.jsonl and counted.
"""

import hashlib
import http.client
import io
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from data.errors import UserError, printable
from data.images import FORMATS, open_image

LOOPBACK = ("127.0.0.1", "localhost")
HEADERS = {"User-Agent": "data-download/1.0", "Accept": "image/jpeg, image/png, image/webp"}
NUM_THREADS = 4


@dataclass
class Limits:
    """Of one picture. seconds: for each try altogether, from the first word of the server to the last."""

    bytes: int = 16 * 2**20
    seconds: float = 30
    redirects: int = 3
    tries: int = 3
    pause: float = 2  # seconds before the second try, twice as many before the third


class Transient(Exception):
    """A failure that another try may not meet; wait: the seconds that the server asks for before it."""

    def __init__(self, message: str, wait: float = 0):
        super().__init__(message)
        self.wait = wait


def fetch_images(
    tables: list[Path], column: str, folder: Path, hosts: list[str], limits: Limits | None = None
) -> list[str]:
    """Fetch the picture of every row of parquet tables and write rows.jsonl: the row and its `image`, a path below `folder`.

    Returns the paths below `folder` of all files made. `hosts` are names (https), or a loopback name:port (http).
    """
    import pyarrow.parquet as parquet
    from tqdm import tqdm

    rows = [(f"{table.name}:{number}", row) for table in tables
            for number, row in enumerate(parquet.read_table(table).to_pylist(), 1)]  # fmt: skip
    (folder / "images").mkdir(exist_ok=True)
    journal = folder / "images.jsonl"
    images = read_journal(journal, folder)
    missing = dict.fromkeys(str(row[column]) for _, row in rows if row[column] not in images)
    problems: dict[str, str] = {}
    limits, pool = limits or Limits(), ThreadPoolExecutor(NUM_THREADS)
    try:
        waiting = {pool.submit(fetch_image, url, folder / "images", hosts, limits): url for url in missing}
        with open(journal, "a", encoding="utf-8") as lines:
            lines.write("\n")  # behind a line that a kill has torn
            for future in tqdm(as_completed(waiting), desc="pictures", total=len(waiting), disable=not waiting):
                url = waiting[future]
                try:
                    images[url] = f"images/{future.result()}"
                except UserError as error:
                    problems[url] = str(error)
                else:
                    lines.write(json.dumps({"url": url, "image": images[url]}) + "\n")
                    lines.flush()
    finally:
        pool.shutdown(cancel_futures=True)
    return write_rows(rows, column, images, problems, folder)


def write_rows(
    rows: list[tuple[str, dict]], column: str, images: dict[str, str], problems: dict[str, str], folder: Path
) -> list[str]:
    """Write rows.jsonl and bad_images.jsonl and say how many are in each; returns the paths of all files."""
    with (
        open(folder / "rows.jsonl", "w", encoding="utf-8") as good,
        open(folder / "bad_images.jsonl", "w", encoding="utf-8") as bad,
    ):
        for where, row in rows:
            url = str(row[column])
            if url in images:
                good.write(json.dumps(row | {"image": images[url]}, default=str) + "\n")
            else:
                bad.write(json.dumps({"where": where, "url": url, "problem": problems[url]}) + "\n")
    failed = [problems[str(row[column])] for _, row in rows if str(row[column]) not in images]
    print(f"{len(rows) - len(failed)} of {len(rows)} rows have their picture, in {folder / 'rows.jsonl'}")
    if failed:
        kinds = ", ".join(f"{count} x {problem}" for problem, count in Counter(failed).most_common(3))
        print(f"{len(failed)} rows have none and are left out: {kinds}; all are in {folder / 'bad_images.jsonl'}; "
              "to try these again, remove that file and run the same command")
    return ["rows.jsonl", "bad_images.jsonl", "images.jsonl", *sorted(set(images.values()))]


def read_journal(journal: Path, folder: Path) -> dict[str, str]:
    """url -> path of the pictures that are there already; a line that a kill has torn is nobody's."""
    images = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if (folder / entry["image"]).is_file():
            images[entry["url"]] = entry["image"]
    return images


# ---- one picture ----------------------------------------------------------------------------------------------------


def fetch_image(url: str, folder: Path, hosts: list[str], limits: Limits) -> str:
    """Fetch, check and store one picture; returns its file name. UserError with the reason after limits.tries."""
    wait = 0.0
    for attempt in range(limits.tries):
        time.sleep(max(limits.pause * attempt, wait))
        try:
            return store(read_url(url, hosts, limits), folder)
        except Transient as error:
            problem, wait = str(error), error.wait
    raise UserError(f"{problem}, {limits.tries} times")


def check_url(url: str, hosts: list[str]) -> None:
    """UserError unless the URL is https of one of the hosts, or http of a loopback address that was named with its port."""
    try:
        parts = urlsplit(url)
        secure = parts.scheme == "https" and parts.port in (None, 443) and parts.hostname in hosts
    except ValueError:
        parts = urlsplit("")
    if not parts.hostname:
        raise UserError("not a URL")
    here = parts.scheme == "http" and parts.hostname in LOOPBACK and parts.netloc in hosts
    if not (secure or here):
        raise UserError(f"{parts.scheme}://{parts.netloc} is not https of {', '.join(hosts)}; --image_host names others")


class Until(io.RawIOBase):
    """The bytes of a connection up to a moment. TimeoutError after it, for a server that always has one byte more."""

    def __init__(self, connection: Any, end: float):
        self.connection, self.end, self.stream = connection, end, connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.connection.settimeout(left)
        return self.stream.readinto(buffer)

    def close(self) -> None:
        self.stream.close()
        super().close()


def opener(hosts: list[str], limits: Limits) -> urllib.request.OpenerDirector:
    """Opens URLs; follows a few redirects, each to an allowed host, and has limits.seconds from now on for all of it."""
    end = time.monotonic() + limits.seconds

    def answer(connection: Any, **more: Any) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(connection, **more)
        response.fp.close()
        response.fp = io.BufferedReader(Until(connection, end))
        return response

    class Limited:
        def do_open(self, connect: Any, request: Any, **more: Any) -> Any:
            def connected(*place: Any, **how: Any) -> Any:
                connection = connect(*place, **how)
                connection.response_class = answer
                return connection

            return super().do_open(connected, request, **more)

    class Http(Limited, urllib.request.HTTPHandler):
        pass

    class Https(Limited, urllib.request.HTTPSHandler):
        pass

    class Redirects(urllib.request.HTTPRedirectHandler):
        max_redirections = limits.redirects

        def redirect_request(self, request, answer, code, message, headers, url):
            check_url(url, hosts)
            return super().redirect_request(request, answer, code, message, headers, url)

    return urllib.request.build_opener(Redirects, Http, Https)


def read_url(url: str, hosts: list[str], limits: Limits) -> bytes:
    """The body of a picture's URL. UserError for what will not change, Transient for what may."""
    url = quote(url, safe="%!#$&'()*+,/:;=?@[]~")  # a blank or an umlaut, which browsers quote too
    check_url(url, hosts)
    try:
        with opener(hosts, limits).open(urllib.request.Request(url, headers=HEADERS), timeout=limits.seconds) as answer:
            kind, length = answer.headers.get_content_type(), answer.headers.get("Content-Length")
            if not kind.startswith("image/"):
                raise UserError(f"the server sent {kind}, not a picture")
            content = bytearray()
            while chunk := answer.read1(2**16):
                content += chunk
                if len(content) > limits.bytes:
                    raise UserError(f"more than {limits.bytes:,} bytes")
            if length is not None and len(content) != int(length):
                raise Transient("the body is cut short")
            return bytes(content)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (301, 302, 303, 307, 308):
            raise UserError("too many redirects, or one to no web address") from None
        refusal, after = f"the server answered {error.code}", error.headers.get("Retry-After", "")
        wait = min(int(after), limits.seconds) if re.fullmatch(r"\d{1,6}", after) else 0
        raise Transient(refusal, wait) if error.code == 429 or error.code >= 500 else UserError(refusal) from None
    except TimeoutError:
        raise Transient(f"not there after {limits.seconds:g} seconds") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # no name, no connection, a time-out, torn headers
        reason = getattr(error, "reason", error)
        raise Transient(f"no answer ({printable(str(reason)) or type(error).__name__})") from None


def store(content: bytes, folder: Path) -> str:
    """Write a picture under its hash once it has decoded; returns its file name. UserError if it is none."""
    from PIL import Image

    part = folder / f".{threading.get_ident()}.part"
    part.write_bytes(content)
    try:
        open_image(part)  # every pixel, within this project's bounds
        with Image.open(part, formats=FORMATS) as image:
            name = f"{hashlib.sha256(content).hexdigest()[:32]}.{image.format.lower()}"
    except UserError as error:
        part.unlink()
        raise UserError(str(error).replace(f"picture {part}", "what came")) from None
    os.replace(part, folder / name)
    return name
