"""`python -m data convert guicourse`: GUICourse's published files as rows and picture files.

    python -m data convert guicourse --input_dir data/raw/guicourse --output_dir guicourse

Every NAME_data.json below the input folder is read row by row with the pictures of NAME_images.parquet beside it, and
becomes NAME.jsonl and images/NAME/. Of a parquet file a page is in memory, whatever its row groups hold (pandas puts
1,024 pictures on a page); a picture keeps its bytes. Started again, it goes on: pictures that are there are not written
twice. A row that cannot be converted stands in bad_rows.jsonl with its file and number, and the others go on.
"""

import argparse
import base64
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from data.dialects import read_row
from data.errors import UserError
from data.guicourse import convert_row
from data.images import picture_format
from data.json_array import split_array
from data.turns import MISSHAPEN, Problem, decode, short

BATCH_PICTURES = 16  # made into Python objects at once
FILE_NAME = re.compile(r"[\w.+-]+")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=["guicourse"])
    parser.add_argument("--input_dir", required=True, metavar="DIR", help="*_data.json and *_images.parquet lie below it")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="NAME.jsonl and images/NAME/ go here")


def run(flags: argparse.Namespace) -> None:
    convert_guicourse(Path(flags.input_dir), Path(flags.output_dir))


def convert_guicourse(input_dir: Path, output_dir: Path) -> None:
    """Convert every pair of files below input_dir. UserError where there is none, or one of a pair is missing."""
    paths = sorted(input_dir.rglob("*_data.json"))
    if not paths:
        raise UserError(f"--input_dir {input_dir} has no *_data.json below it; python -m data download guicourse fetches them")
    tables = [path.with_name(path.name.replace("_data.json", "_images.parquet")) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if not table.is_file():
            raise UserError(f"{path} has no {table.name} beside it, where its pictures are; download it too")
    output_dir.mkdir(parents=True, exist_ok=True)
    bad = []
    for path, table in zip(paths, tables, strict=True):
        name = path.name.removesuffix("_data.json")
        pictures = write_pictures(table, output_dir / "images" / name, wanted_pictures(path))
        refused = []
        count = write_rows(path, pictures, output_dir / f"{name}.jsonl", refused)
        print(f"{name}: {count} rows and {len(pictures)} pictures; {len(refused)} rows refused")
        bad += refused
    (output_dir / "bad_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad), encoding="utf-8")
    if bad:
        print(f"{len(bad)} rows are in {output_dir / 'bad_rows.jsonl'}; the first is {bad[0]['where']}: {bad[0]['problem']}")


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """("file.json:17", the row or its Problem) of a json array."""
    with open(path, "rb") as file:
        begin = file.read(4096).find(b"[")
    if begin < 0:
        raise UserError(f"{path} is not a json array of rows; download it again")
    for number, _, _, raw in split_array(path, begin):
        where = f"{path.name}:{number}"
        try:
            row = decode(raw)
            yield where, row if isinstance(row, dict) else Problem("a row is not an object", short(row))
        except Problem as problem:
            yield where, problem


def converted(row: object) -> tuple[dict, list[str]]:
    """convert_row with every way in which a row can be of another shape as a Problem."""
    if isinstance(row, Problem):
        raise row
    try:
        made, ids = convert_row(row)
    except MISSHAPEN as error:
        raise Problem("not a row of GUIEnv, GUIAct or GUIChat", f"{type(error).__name__} {error}") from None
    if not all(isinstance(image_id, str) for image_id in ids):
        raise Problem("a picture's id is no text", short(ids))
    return made, ids


def wanted_pictures(path: Path) -> set[str]:
    """The ids of the pictures that the rows of a file name."""
    ids: set[str] = set()
    for _, row in read_rows(path):
        try:
            ids.update(converted(row)[1])
        except Problem:
            continue  # written down when the rows are
    return ids


def write_pictures(table: Path, folder: Path, wanted: set[str]) -> dict[str, Path]:
    """Write the wanted pictures of a parquet file as they are; picture id -> its file."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {path.stem: path for path in folder.glob("*") if not path.name.endswith(".tmp")}
    written = {image_id: path for image_id, path in written.items() if image_id in wanted}
    with tqdm(total=len(wanted), initial=len(written), desc=table.name, leave=False, disable=None) as bar:
        for image_id, content in read_pictures(table) if len(written) < len(wanted) else ():
            if image_id not in wanted or image_id in written or not FILE_NAME.fullmatch(image_id):
                continue
            try:
                raw = content if isinstance(content, bytes) else base64.b64decode(content, validate=True)
                path = folder / f"{image_id}.{picture_format(raw).lower()}"
            except (UserError, ValueError, TypeError):
                continue  # its rows are refused for having no picture
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(raw)
            os.replace(temporary, path)
            written[image_id] = path
            bar.update()
    return written


def read_pictures(table: Path) -> Iterator[tuple[str, object]]:
    """(id, picture as base64 text or bytes) of a parquet file. UserError for one without such columns."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(table, pre_buffer=False, buffer_size=2**20) as file:  # else a whole row group is read ahead
            names = file.schema_arrow.names
            index = (file.schema_arrow.pandas_metadata or {}).get("index_columns", [])
            keys = [key for key in [*index, "image_id", "id", "__index_level_0__"] if isinstance(key, str) and key in names]
            if not keys or "base64" not in names:
                raise UserError(f"{table} has no column base64 with an index of picture ids, only {', '.join(names)}")
            for batch in file.iter_batches(BATCH_PICTURES, columns=[keys[0], "base64"], use_threads=False):
                yield from zip(map(str, batch.column(keys[0]).to_pylist()), batch.column("base64").to_pylist(), strict=True)
    except (ArrowException, OSError) as error:
        raise UserError(f"{table} cannot be read as parquet: {error}; download it again") from None


def write_rows(path: Path, pictures: dict[str, Path], target: Path, refused: list[dict]) -> int:
    """Write a file's rows with the paths of their pictures; what is refused is added to `refused`. Returns their number."""
    count, temporary = 0, target.with_name(target.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for where, raw in tqdm(read_rows(path), desc=path.name, leave=False, disable=None):
            try:
                row, ids = converted(raw)
                missing = [image_id for image_id in ids if image_id not in pictures]
                if missing:
                    raise Problem("no such picture in the parquet file", short(missing[0]))
                places = {image_id: str(pictures[image_id].relative_to(target.parent)) for image_id in ids}
                image = row["image"]
                row["image"] = {mark: places[key] for mark, key in image.items()} if isinstance(image, dict) else places[image]
                read_row(row, Counter())  # what is written can be trained on
            except Problem as problem:
                row_id = str(raw.get("uid", where)) if isinstance(raw, dict) else where
                refused.append({"where": where, "id": row_id, "problem": str(problem)})
                continue
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    os.replace(temporary, target)
    return count
