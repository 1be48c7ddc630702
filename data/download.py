"""`python -m data download NAME`: a data set of the recipes, whole or its first rows, into data/raw/NAME.

The hub's `main` is resolved to a commit at the first download, and that commit is the pin: it stands in plan.json until
every file has arrived and been compared with the hub's own checksum, then in manifest.json, which is written last. A
killed download goes on in the middle of a file; another commit is taken only for a --revision. With a limit the first
rows are read out of the remote parquet files page by page, so that a thousand screenshots do not cost a file of 20 GB.
"""

import argparse
import difflib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError

FREE_BYTES = 2**30  # stay free on the disk


@dataclass
class DataSet:
    """What a name stands for: hub repositories, the files of them that training needs (patterns of their paths, with the
    repository's name in front where there are several), the licence, and where a table's pictures have to be fetched."""

    repositories: list[str]
    files: list[str]
    licence: str
    image_column: str | None = None
    image_hosts: tuple[str, ...] = ()


DATA_SETS = {
    "smoltalk": DataSet(["HuggingFaceTB/smol-smoltalk"], ["*.parquet"], "apache-2.0"),
    "ultrafeedback": DataSet(["HuggingFaceH4/ultrafeedback_binarized"], ["data/train_prefs-*", "data/test_prefs-*"],
                             "see its card"),
    "warmstart": DataSet(["Asap7772/cog_behav_all_strategies"], ["*.parquet"], "see its card"),
    "countdown": DataSet(["Jiayi-Pan/Countdown-Tasks-3to4"], ["*.parquet"], "see its card"),
    "burberry": DataSet(["DBQ/Burberry.Product.prices.United.States"], ["*.parquet"],
                        "unknown, says its card; the pictures belong to the shop",
                        "imageurl", ("assets.burberry.com",)),
    "guicourse": DataSet(["yiye2023/GUIEnv", "yiye2023/GUIAct", "yiye2023/GUIChat"],
                         ["GUIEnv/*train_stage2*", "GUIEnv/*test*"],
                         "CC BY 4.0 says the project's page, apache-2.0 its cards"),
    "mind2web": DataSet(["osunlp/Multimodal-Mind2Web"], ["data/train-*", "data/test_task-*"], "openrail"),
}  # fmt: skip


def download(
    name: str, folder: Path, revisions: list[str] | None = None, limit: int | None = None,
    patterns: list[str] | None = None, hosts: list[str] | None = None,
) -> dict:
    """Fetch what is not there yet; returns the manifest. `revisions`: one a repository of the set, branches or commits.

    UserError for what the hub refuses, a full disk, a file that arrives damaged. Nothing that is whole is fetched again.
    """
    dataset = DATA_SETS[name]
    request = {"name": name, "limit": limit, "files": patterns or dataset.files, "hosts": hosts or list(dataset.image_hosts)}
    whole, begun = folder / "manifest.json", folder / "plan.json"
    plan = read_json(begun) or read_json(whole) or {"request": None, "commits": {}, "files": []}
    if plan["request"] != request or revisions:
        old, plan = plan, make_plan(dataset, request, plan["commits"], revisions)
        folder.mkdir(parents=True, exist_ok=True)
        forget(folder, old["files"], plan["files"])
        write_json(begun, plan)  # the pin, before the first byte
        whole.unlink(missing_ok=True)
    elif not begun.exists() and all(is_there(folder, file) for file in plan["files"] + plan["pictures"]):
        print(f"{folder} is whole: {summary(plan)}; nothing to do")
        return plan
    check_space(folder, plan["files"])
    for file in plan["files"]:
        target = folder / file["path"]
        if not is_there(folder, file) or not file["rows"] and checksum_of(target, file) != file["checksum"]:
            target.parent.mkdir(parents=True, exist_ok=True)
            fetch_rows(file, folder) if file["rows"] else fetch_file(file, folder)
        file |= weigh(target)
    plan["pictures"] = []
    if dataset.image_column:
        from data.fetch_images import fetch_images

        tables = [folder / file["path"] for file in plan["files"]]
        made = fetch_images(tables, dataset.image_column, folder, request["hosts"])
        plan["pictures"] = [{"path": path} | weigh(folder / path) for path in made]
    plan["time"] = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(whole, plan)
    begun.unlink(missing_ok=True)
    print(f"{folder} is whole: {summary(plan)}; manifest.json lists it")
    return plan


# ---- what to fetch --------------------------------------------------------------------------------------------------


def make_plan(dataset: DataSet, request: dict, pinned: dict[str, str], revisions: list[str] | None) -> dict:
    """The commits and files of a request, asked from the hub, and what they weigh, printed."""
    from huggingface_hub import HfApi

    names = dataset.repositories
    if revisions and len(revisions) != len(names):
        raise UserError(f"--revision takes {len(names)}, one for each of {', '.join(names)}")
    plan: dict[str, Any] = {"request": request, "licence": dataset.licence, "cards": {}, "commits": {}, "files": [],
                            "pictures": []}  # fmt: skip
    left_out = []
    for repository, revision in zip(names, revisions or [pinned.get(name, "main") for name in names], strict=True):
        info = ask(f"{repository} at {revision}", HfApi().dataset_info, repository, revision=revision, files_metadata=True)
        plan["commits"][repository] = info.sha
        plan["cards"][repository] = getattr(info.card_data, "license", None)  # what the card calls its licence
        prefix = repository.rpartition("/")[2] + "/" if len(names) > 1 else ""
        for sibling in sorted(info.siblings, key=lambda sibling: sibling.rfilename):
            checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            file = {"path": prefix + sibling.rfilename, "bytes": sibling.size, "rows": None, "repository": repository,
                    "commit": info.sha, "name": sibling.rfilename, "hub_bytes": sibling.size, "checksum": checksum}
            if not os.path.normpath(os.path.join("/here", sibling.rfilename)).startswith("/here/"):
                raise UserError(f"{repository} lists {sibling.rfilename}, a file outside the folder; nothing is fetched")
            wanted = any(fnmatch.fnmatch(file["path"], pattern) for pattern in request["files"])
            (plan["files"] if wanted else left_out).append(file)
        is_pin = "pinned by the first download" if pinned.get(repository) == info.sha else f"{revision}, pinned from now on"
        print(f"{repository} at commit {info.sha} ({is_pin}); licence on its card: {plan['cards'][repository]}")
    if not plan["files"]:
        there = ", ".join(file["path"] for file in left_out)
        raise UserError(f"no file matches {' '.join(request['files'])}; there are {there}; name some with --files")
    rest = f"; left out are {weight(left_out)} in {len(left_out)} files, --files names them" if left_out else ""
    print(f"licence: {dataset.licence}\n{weight(plan['files'])} in {len(plan['files'])} files{rest}")
    if request["limit"]:
        plan["files"] = limit_rows(plan["files"], request["limit"])
        print(f"the first {request['limit']} rows of each split: about {weight(plan['files'])}")
    return plan


def limit_rows(files: list[dict], limit: int) -> list[dict]:
    """The files that hold the first `limit` rows of each split (whose shards are NAME-00000-of-00027...). One that is needed
    in part says how many `rows` and about how many bytes; a GUICourse json comes last, with the rows whose pictures came."""
    paths = {file["path"] for file in files}
    left: dict[str, int] = {}
    kept, cut_by_pictures = [], []
    for file in files:
        split = re.sub(r"-\d{5}-of-\d{5}.*", "", file["path"])
        room = left.setdefault(split, limit)
        if images_of(file["path"]) in paths:
            cut_by_pictures.append(file | {"rows": "those whose pictures are there"})
        elif not file["path"].endswith(".parquet"):
            kept.append(file)
        elif room:
            with open_remote(file) as remote:
                num_rows = open_parquet(remote).metadata.num_rows
            left[split] = max(0, room - num_rows)
            part = {"rows": room, "bytes": file["bytes"] * room // num_rows} if room < num_rows else {}
            kept.append(file | part)
    return kept + cut_by_pictures


def images_of(path: str) -> str | None:
    """The parquet file with the pictures of a GUICourse json."""
    return path.removesuffix("_data.json") + "_images.parquet" if path.endswith("_data.json") else None


def weight(files: list[dict]) -> str:
    num_bytes = sum(file["bytes"] for file in files)
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def summary(manifest: dict) -> str:
    files = manifest["files"] + manifest["pictures"]
    commits = ", ".join(f"{repository} at {commit[:12]}" for repository, commit in manifest["commits"].items())
    return f"{len(files)} files, {weight(files)}, {commits}"


def check_space(folder: Path, files: list[dict]) -> None:
    """UserError if what is still to come, and FREE_BYTES, do not fit the disk."""
    missing = [file for file in files if not is_there(folder, file)]
    parts = [part_of(folder / file["path"]) for file in missing]
    needed = sum(file["bytes"] for file in missing) - sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(folder).free
    if needed + FREE_BYTES > free:
        raise UserError(f"{weight(missing)} are to come and {folder} has {free / 2**30:,.1f} GiB free, of which "
                        f"{FREE_BYTES / 2**30:.0f} stays free; make room, take --limit rows, or fewer --files")


# ---- fetching -------------------------------------------------------------------------------------------------------


def ask(what: str, call: Callable, *arguments: Any, **keywords: Any) -> Any:
    """call(...) of the hub's library, whose errors are of many types, as one sentence."""
    try:
        return call(*arguments, **keywords)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{what}: {reason}; the same command goes on from what has arrived") from None


def fetch_file(file: dict, folder: Path) -> None:
    """A whole file, from where its part ends, compared with the hub's checksum."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(file["repository"], file["name"], repo_type="dataset", revision=file["commit"])
    part = part_of(folder / file["path"])
    with open(part, "ab") as stream:  # the library's own download would start a killed file anew
        ask(file["path"], http_get, url, stream, resume_size=stream.tell(), headers=build_hf_headers(),
            expected_size=file["hub_bytes"])  # fmt: skip
        os.fsync(stream.fileno())
    found = checksum_of(part, file)
    if found != file["checksum"]:
        part.unlink()
        raise UserError(f"{file['path']} arrived with the checksum {found[:12]}.. instead of {file['checksum'][:12]}..; "
                        "run the same command again")
    os.replace(part, folder / file["path"])


def fetch_rows(file: dict, folder: Path) -> None:
    """The first rows of a parquet file; of a json with pictures beside it, the rows whose pictures are there."""
    target = folder / file["path"]
    part = target.with_name(target.name + ".rows")
    if file["path"].endswith(".parquet"):
        with open_remote(file) as remote:
            ask(file["path"], copy_rows, remote, file["rows"], part)
    else:
        whole = file | {"path": file["path"] + ".whole"}
        fetch_file(whole, folder)
        kept = image_ids(folder / images_of(file["path"]))
        write_json(part, [row for row in json.loads((folder / whole["path"]).read_bytes()) if row["image_id"] in kept])
        (folder / whole["path"]).unlink()
    os.replace(part, target)


def image_ids(path: Path) -> set[str]:
    """Of the pictures in a GUICourse parquet file; they are the index of the table that it was written from."""
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(path)
    column = next(name for name in table.schema_arrow.names if name in ("image_id", "__index_level_0__"))
    return set(table.read([column])[column].to_pylist())


def open_remote(file: dict) -> Any:
    """A file on the hub that is read in ranges."""
    from huggingface_hub import HfFileSystem

    path = f"datasets/{file['repository']}@{file['commit']}/{file['name']}"
    return ask(file["path"], HfFileSystem().open, path)


def open_parquet(remote: Any) -> Any:
    import pyarrow.parquet as parquet

    # pages when they are asked for, not whole columns; writers put up to a thousand rows into a page
    return ask(remote.path, parquet.ParquetFile, remote, buffer_size=2**20, pre_buffer=False)


def copy_rows(remote: Any, num_rows: int, target: Path) -> None:
    """The first rows of a parquet file into another one, schema and metadata kept."""
    import pyarrow.parquet as parquet

    source = open_parquet(remote)
    groups = range(source.num_row_groups)  # one at a time: a batch over several would fetch them all
    batches = (batch for group in groups for batch in source.iter_batches(batch_size=16, row_groups=[group]))
    with parquet.ParquetWriter(target, source.schema_arrow) as writer:
        while num_rows:
            batch = next(batches).slice(0, num_rows)
            writer.write_batch(batch)
            num_rows -= len(batch)


# ---- what is there --------------------------------------------------------------------------------------------------


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def is_there(folder: Path, file: dict) -> bool:
    """Whether a file has the size of the plan; the size of one that is fetched in part is known once it has come."""
    target = folder / file["path"]
    return target.is_file() and (target.stat().st_size == file["bytes"] or bool(file.get("rows")) and "sha256" not in file)


def forget(folder: Path, old: list[dict], new: list[dict]) -> None:
    """Remove the files of an old plan that the new one does not hold, or holds with other content; and whatever lies where
    rows will be put, for it has no checksum."""
    same = [file for file in new if any(all(file[key] == other[key] for key in ("path", "checksum", "rows")) for other in old)]
    kept = {file["path"] for file in same}
    for path in {file["path"] for file in old + [file for file in new if file["rows"]]} - kept:
        for suffix in ("", ".part", ".rows", ".whole", ".whole.part"):
            (folder / (path + suffix)).unlink(missing_ok=True)


def checksum_of(path: Path, file: dict) -> str:
    """By the kind that the hub gave: large-file storage names a file by its sha256, git by a sha1 with a header."""
    is_large = len(file["checksum"]) == 64
    return digest(path, hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % path.stat().st_size))


def weigh(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": digest(path, hashlib.sha256())}


def digest(path: Path, state: Any) -> str:
    """Hexadecimal digest of a file's bytes, behind what the hash holds already."""
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            state.update(chunk)
    return state.hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".new")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# ---- python -m data download --------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=", ".join(DATA_SETS))
    parser.add_argument("--output_dir", metavar="DIR", help="default: data/raw/NAME")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows of each split, not all of them")
    parser.add_argument("--files", nargs="+", metavar="PATTERN", help="files of the data set, instead of those training needs")
    parser.add_argument("--revision", nargs="+", metavar="COMMIT",
                        help="one for each repository; default: the commit of the first download, which was then the newest")
    parser.add_argument("--image_host", nargs="+", metavar="HOST",
                        help="hosts that a table's pictures may come from, by https; default: the data set's own")  # fmt: skip


def run(flags: argparse.Namespace) -> None:
    """Check the flags and fetch. Raises UserError."""
    if flags.name not in DATA_SETS:
        near = difflib.get_close_matches(flags.name, DATA_SETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(DATA_SETS)}"
        raise UserError(f"no data set is called {flags.name}; {hint}")
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit {flags.limit}: one row at least")
    if flags.image_host and not DATA_SETS[flags.name].image_column:
        raise UserError(f"--image_host has no use: {flags.name} names no pictures to fetch")
    folder = Path(flags.output_dir or Path("data/raw") / flags.name)
    try:
        download(flags.name, folder, flags.revision, flags.limit, flags.files, flags.image_host)
    except KeyboardInterrupt:
        raise UserError(f"stopped; what has arrived is in {folder}, and the same command goes on from there") from None
