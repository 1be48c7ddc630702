"""What --data_path names: every format gives the same rows, each from its place; weights make an epoch's multiset."""

import csv
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hub_stand_in import StandIn
from PIL import Image

from data import index, json_array
from data.errors import UserError
from data.images import find_file, open_image
from data.json_array import split_array
from data.records import open_records
from data.sources import Lines
from data.template import Template

ANSWERS = ["4", "", 'a "b" \\ [1, {2}]\n', "h\u00e9 \U0001f600", "x" * 500]


def chat(answer, **more):
    return {"messages": [{"role": "user", "content": "?" + answer}, {"role": "assistant", "content": answer or "-"}], **more}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows, **more):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **more)
    return path


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()] for row in rows)
    return path


# ---- json arrays -----------------------------------------------------------------------------------------------------


def value(rng, depth=0):
    kind = rng.randrange(8 if depth < 4 else 5)
    if kind < 5:
        pieces = ['"', "\\", "[", "]", "{", "}", ",", ":", "a", "\n", "\u00e9", "\U0001f600", "  ", '\\"']
        return rng.choice([None, True, 1, -2.5e3, ""]) if kind == 0 else "".join(rng.choices(pieces, k=rng.randrange(20)))
    items = [value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return items if kind == 5 else {str(item): item for item in items}


@pytest.mark.parametrize("block", [1, 2, 7, 64, 2**20])
def test_array_elements_equal_those_of_the_json_module(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_array, "BLOCK", block)
    rng, path = random.Random(block), tmp_path / "rows.json"
    for _ in range(200):
        rows = [value(rng) for _ in range(rng.randrange(6))]
        whole = (" \n" + json.dumps(rows, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])) + "\n").encode()
        path.write_bytes(whole)
        found = list(split_array(path, 2))
        assert [json.loads(raw) for *_, raw in found] == rows
        assert [number for number, *_ in found] == list(range(1, len(rows) + 1))
        assert all(whole[start : start + size] == raw for _, start, size, raw in found)
        path.write_bytes(whole.rstrip()[: rng.randrange(3, len(whole) - 1)].removesuffix(b"]") + b" ")
        if json_is_broken(path):
            with pytest.raises(UserError, match="rows.json:"):
                list(split_array(path, 2))


def json_is_broken(path):
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return True
    return False


def test_an_element_that_is_too_long_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "BLOCK", 1000)
    for module in ("turns", "sources", "json_array"):
        monkeypatch.setattr(f"data.{module}.MAX_ROW_BYTES", 3000)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([chat("a"), chat('x"\\' * 50_000), chat("b")]))
    assert max(len(raw) for *_, raw in split_array(path, 0)) == 3001
    records = open_records(path, on_bad_row="skip")
    assert [record.where for record in records] == ["rows.json:1", "rows.json:3"]
    assert "row too large" in records.bad[0]["problem"] and records[1].messages == chat("b")["messages"]


# ---- every format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = [chat(answer, id=f"r{n}") for n, answer in enumerate(ANSWERS)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}[suffix](path, rows)
    records = open_records(path)
    assert [(record.id, record.messages) for record in records] == [(row["id"], row["messages"]) for row in rows]
    first = 2 if suffix == "csv" else 1
    assert [record.where for record in records] == [f"rows.{suffix}:{first + n}" for n in range(5)]


def test_types_may_differ_from_row_to_row(tmp_path):
    rows = [chat("a", score=1), chat("b", score="high"), chat("c", score=[1, {"x": None}]), chat("d", extra={})]
    rows += [{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, chat("e")["messages"][1]]}]
    for path in (write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "rows.json"):
        path.write_text(json.dumps(rows)) if path.suffix == ".json" else None
        assert [record.messages[-1]["content"] for record in open_records(path)] == list("abcde")


def test_csv_numbers_lines_and_keeps_text_as_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,completion,id,tools\r\n"two\r\nlines",{"a": 1},007,"[{""name"": ""f""}]"\r\n\r\n'
        b'"a ""b""",[1],,\r\nonly one cell\r\nx,\xff,1,\r\nz,"never ends'
    )
    records = open_records(path, on_bad_row="skip")
    assert [record.where for record in records] == ["rows.csv:2", "rows.csv:5"]
    assert [row["where"] for row in records.bad] == ["rows.csv:6", "rows.csv:7", "rows.csv:8"]
    for row, word in zip(records.bad, ("number of cells", "UTF-8", "CSV"), strict=True):
        assert word in row["problem"]
    assert [turn["content"] for turn in records[0].messages] == ["two\r\nlines", '{"a": 1}']
    assert records[0].id == "007" and records[0].tools == [{"name": "f"}]
    assert [turn["content"] for turn in records[1].messages] == ['a "b"', "[1]"] and records[1].id == "rows.csv:5"


def test_a_carriage_return_in_a_csv_hides_no_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\nq,a\rq2,b\nq3,"c\rd"\n')
    records = open_records(path, on_bad_row="skip")
    assert [row["where"] for row in records.bad] == ["rows.csv:2"] and "a carriage return" in records.bad[0]["problem"]
    assert [record.messages[-1]["content"] for record in records] == ["c\rd"]
    path.write_bytes(b"prompt,completion\rq,a\rq2,b")
    with pytest.raises(UserError, match="names of the columns.*a carriage return without a line feed"):
        open_records(path)


def test_turns_in_a_csv_are_turns_and_other_json_is_text(tmp_path):
    prompt, answer = chat("4")["messages"]
    cells = [([prompt], [answer]), ([prompt], answer), ("?4", [4]), ("?4", {"role": 1}), ("?4", [])]
    write_csv(tmp_path / "rows.csv", [{"prompt": json.dumps(asked) if asked != "?4" else asked, "completion": json.dumps(said)}
                                      for asked, said in cells])  # fmt: skip
    records = open_records(tmp_path / "rows.csv")
    assert [record.messages[0] for record in records] == [prompt] * 5
    assert [record.messages[1]["content"] for record in records] == ["4", "4", "[4]", '{"role": 1}', "[]"]
    write_csv(tmp_path / "pairs.csv", [{"prompt": "?4", "chosen": '{"a": 1}', "rejected": "[2]"}])
    (pair,) = open_records(tmp_path / "pairs.csv")
    assert [side[-1]["content"] for side in pair.conversations] == ['{"a": 1}', "[2]"]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_with_another_separator(tmp_path, mark):
    path = tmp_path / "rows.csv"
    path.write_text(f'instruction{mark}"a, b, c"{mark}output\n"a{mark}, b"{mark}{mark}[1, 2]\n', encoding="utf-8-sig")
    (record,) = open_records(path)
    assert [turn["content"] for turn in record.messages] == [f"a{mark}, b", "[1, 2]"] and record.where == "rows.csv:2"


@pytest.mark.parametrize("content, words", [
    (b"pro\xffmpt,completion\na,b\n", "names of the columns.*UTF-8"), (b'"a"b,c\nd,e\n', "names of the columns.*CSV"),
    (b"prompt,completion,completion\na,b,c\n", "two columns called 'completion'"),
    (b'prompt,completion\na,"b\nc,d\ne,f\n', "rows.csv:2 .* 3 lines"),  # no row is swallowed by another's quote,
    (b'prompt,completion\na,"b\nc,d\ne,"f"\ng,h\n', "rows.csv:2 .* 3 lines"),  # whether or not it is closed later
    (b'prompt,completion\na,"b\nc"\rd,e\n', "rows.csv:2 .*a carriage return without a line feed.* 2 lines"),
])
def test_a_csv_that_does_not_come_apart_into_rows(tmp_path, content, words):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_records(tmp_path / "rows.csv", on_bad_row="skip")


def test_parquet_is_read_by_row_groups(tmp_path, monkeypatch):
    from data import tables

    rows = [chat(f"answer {n} " + "x" * 200, id=n) for n in range(100)]
    path = write_parquet(tmp_path / "rows.parquet", rows, row_group_size=7)
    records, groups = open_records(path), []
    parquet = pytest.importorskip("pyarrow.parquet")
    read = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", lambda self, n, **how: groups.append(n) or read(self, n, **how))
    for limit, again in (2**28, 6), (3 * 7 * 300, 8), (1, 10):  # room for all groups, for three of them, for the one in use
        monkeypatch.setattr(tables, "HELD_BYTES", limit)
        groups.clear()
        tables._held.clear()
        assert [records[n].id for n in (99, 0, 98, 1, 97, 30, 50, 70, 99, 0)] == "99 0 98 1 97 30 50 70 99 0".split()
        assert len(groups) == again, groups
    assert len(tables._held) == 1
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_damaged_parquet_is_one_sentence(tmp_path):
    """Its footer may be whole: then the rows that cannot be read are named. So is a column that stands there twice."""
    rows = [chat(f"answer {n} " + "x" * 200, id=n) for n in range(20)]
    path = write_parquet(tmp_path / "rows.parquet", rows, row_group_size=10, compression="snappy")
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 4 + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(UserError, match="rows.parquet: rows (1 to 10|11 to 20) cannot be read"):
        open_records(path)
    import pyarrow
    from pyarrow import parquet

    columns = [pyarrow.array(["a", "b"])] * 3
    parquet.write_table(pyarrow.table(columns, names=["prompt", "completion", "completion"]), path)
    with pytest.raises(UserError, match="two columns called 'completion'"):
        open_records(path)


def test_a_large_row_group_is_read_through_an_arrow_file(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("data.tables.GROUP_BYTES", 10)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [chat(f"{n}", id=f"r{n}") for n in range(70)]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    records = open_records(path)
    assert [record.id for record in records] == [row["id"] for row in rows] and records[69].where == "rows.parquet:70"
    assert records.parts[0].describe()["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"PAR1" + b"\xff" * 56 + path.read_bytes()[60:])
    with pytest.raises(UserError, match="rows.parquet cannot be read as parquet .*download it again"):
        open_records(path)


def test_null_fields_of_a_table_are_absent(tmp_path):
    call = {"type": "function", "function": {"name": "click", "arguments": {"x": 3, "text": None}}}
    rows = [{"messages": [{"role": "user", "content": "a", "tool_calls": None, "image": None},
                          {"role": "assistant", "content": "b", "tool_calls": [call], "image": None}], "score": float("nan")},
            {"messages": chat("c")["messages"], "score": 1.0},
            {"messages": [*chat("d")["messages"], {"role": "assistant", "content": "e", "tool_calls": [
                call | {"function": {"name": "click", "arguments": {"x": float("nan"), "text": None}}}]}]}]  # fmt: skip
    records = open_records(write_parquet(tmp_path / "rows.parquet", rows), on_bad_row="skip")
    assert [row["where"] for row in records.bad] == ["rows.parquet:3"] and "NaN" in records.bad[0]["problem"]
    record = records[0]
    assert record.messages[0] == {"role": "user", "content": "a"} and record.dialect == "messages"
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 3}


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_pictures_inside_parquet(tmp_path, picture):
    turns = chat("red")["messages"]
    good = [{"image": {"bytes": picture.read_bytes(), "path": None}, "conversations": turns},
            {"image": {"bytes": None, "path": "a.png"}, "conversations": turns}]  # fmt: skip
    cut = {"image": {"bytes": picture.read_bytes()[:20], "path": "a.png"}, "conversations": turns}
    records = open_records(write_parquet(tmp_path / "rows.parquet", [*good, cut]), on_bad_row="skip")
    assert records.image_sizes == [((40, 30),), ((40, 30),)] and [row["where"] for row in records.bad] == ["rows.parquet:3"]
    parts = [record.messages[0]["content"][0] for record in records]
    assert parts[1]["image"] == str(picture)
    assert [open_image(part["image"]).getpixel((0, 0)) for part in parts] == [(255, 0, 0)] * 2
    with pytest.raises(UserError, match="damaged or cut short"):
        open_image(picture.read_bytes()[:60])


# ---- folders, the hub, several ---------------------------------------------------------------------------------------


def test_a_folder_is_its_files_by_name(tmp_path, picture):
    write_jsonl(tmp_path / "b.jsonl", [chat("1"), {"messages": 3}, {"image": "a.png", "messages": chat("2")["messages"]}])
    (tmp_path / "a.json").write_text(json.dumps([chat("0")]))
    write_csv(tmp_path / "c.csv", [{"prompt": "p", "completion": "3"}])
    write_jsonl(tmp_path / ".hidden.jsonl", [chat("no")])
    (tmp_path / "notes.txt").write_text("no")
    records = open_records(tmp_path, on_bad_row="skip")
    assert [record.where for record in records] == ["a.json:1", "b.jsonl:1", "b.jsonl:3", "c.csv:2"]
    assert [record.messages[-1]["content"] for record in records] == list("0123")
    assert [row["where"] for row in records.bad] == ["b.jsonl:2"] and len(records.image_sizes[2]) == 1
    with pytest.raises(UserError, match="b.jsonl:2.*1 of 5|1 of 5 rows: b.jsonl:2"):
        open_records(tmp_path)


def test_a_folder_is_laid_out_as_on_the_hub_and_splits_are_never_mixed(tmp_path, capsys):
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001", "more/latest", "dev/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / f"{name}.parquet", [chat(name)])
    for name in ("manifest.json", ".cache/x.json", "dataset_info.json", "bad_rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"no": "row"}')

    def read(text):
        records = open_records(text)
        return [record.messages[-1]["content"] for record in records], capsys.readouterr().err

    rows, said = read(tmp_path)
    assert rows == ["data/train-00000-of-00002", "data/train-00001-of-00002", "more/latest"]
    assert "is read as 3 files, data/train-00000-of-00002.parquet to more/latest.parquet; passed over 1 of " in said
    assert "1 of test (data/test-00000-of-00001.parquet)" in said and "1 of validation (dev/a.parquet)" in said
    assert read(f"{tmp_path}:test*2")[0] == ["data/test-00000-of-00001"] and read(f"{tmp_path}:val")[0] == ["dev/a"]
    assert read(tmp_path / "dev")[0] == ["dev/a"]  # the folder itself was named
    for path in (tmp_path / "data").glob("train*"):
        path.unlink()
    assert read(tmp_path)[0] == ["more/latest"]
    (tmp_path / "more" / "latest.parquet").unlink()
    with pytest.raises(UserError, match="held-out splits alone, 1 of test, 1 of validation; name one, such as .*:test"):
        read(tmp_path)
    with pytest.raises(UserError, match="no file of train, only 1 of test, 1 of validation"):
        read(f"{tmp_path}:train")
    assert read(tmp_path / "data")[0] == ["data/test-00000-of-00001"]


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "rows.jsonl", [chat(folder)])
    found = open_records(f"{tmp_path}/x/rows.jsonl,{tmp_path}/y")
    assert [record.where for record in found] == [f"{tmp_path}/{folder}/rows.jsonl:1" for folder in "xy"]
    assert open_records(tmp_path / "x")[0].where == "rows.jsonl:1"


def test_one_object_is_one_row_or_the_steps_of_a_run(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    for indent in (None, 2):
        path.write_text(json.dumps(chat("one"), indent=indent))
        assert [record.where for record in open_records(path)] == ["run.json:1"]
    path.write_text(json.dumps(chat("a")) + "\n" + json.dumps(chat("b")))  # lines, in spite of the name
    assert [record.messages[1]["content"] for record in open_records(path)] == ["a", "b"]

    def expand(run):
        return [chat(step) for step in run.get("steps", [])]

    monkeypatch.setitem(sys.modules, "data.dialect_test_runs", SimpleNamespace(expand=expand))
    path.write_text(json.dumps({"steps": ["a", "b", ""]}))
    records = open_records(path)
    assert [record.where for record in records] == ["run.json:1", "run.json:2", "run.json:3"]
    assert records[1].messages == chat("b")["messages"]
    path.write_text(json.dumps(chat("one"), indent=1))
    assert len(open_records(path)) == 1
    path.write_text(json.dumps({"run_id": "r", "solver_history": None}))  # a dialect knows it, and cannot expand it
    assert "a run without messages" in open_records(path, on_bad_row="skip").bad[0]["problem"]
    path.write_text('{"steps": [')
    assert "not valid JSON" in open_records(path, on_bad_row="skip").bad[0]["problem"]


def test_a_data_set_of_the_hub(tmp_path, monkeypatch, picture):
    datasets = pytest.importorskip("datasets")
    image = {"bytes": picture.read_bytes(), "path": "p.png"}
    rows = [{"image": image, "conversations": chat(str(n))["messages"]} for n in range(70)]
    features = datasets.Features({
        "image": datasets.Image(), "conversations": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
    })  # fmt: skip
    asked = []

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        if path == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub")
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # nobody is asked first whether there is a hub
    records = open_records("org/name")
    assert len(records) == 70 and records[69].where == "org/name:70" and records.image_sizes[3] == ((40, 30),)
    assert records[69].messages[0]["content"][1]["text"] == "\n?69"
    assert open_records("org/name:test")[0].where == "org/name:test:1"
    open_records("org/name:part:test")
    assert asked == [("org/name", None, "train"), ("org/name", None, "test"), ("org/name", "part", "test")]
    with pytest.raises(UserError, match="org/none is no file or folder here.*doesn't exist"):
        open_records("org/none")


@pytest.mark.slow
def test_the_datasets_library_reads_a_hub(tmp_path):
    """Its own requests, to a stand-in of the hub on loopback: the address is read where the library is imported."""
    pytest.importorskip("datasets")
    rows = {"train": [chat(str(n)) for n in range(50)], "test": [chat("t")]}
    hub = StandIn()
    for name, some in rows.items():
        write_parquet(tmp_path / name, some)
    files = {f"data/{name}-00000-of-00001.parquet": (tmp_path / name).read_bytes() for name in rows}
    hub.commits["org/name"] = [("a" * 40, files)]
    code = """if True:
        from data.records import open_records
        print([(len(records), records[-1].where, records[-1].messages[1]["content"])
               for records in map(open_records, ("org/name", "org/name:test"))])
        open_records("org/none")
    """
    environment = dict(os.environ, HF_ENDPOINT=f"http://{hub.netloc}", HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    for reason in ("Repository Not Found", "the hub does not answer"):  # then what came before is read from the cache
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=120)
        hub.shutdown()
        hub.server_close()
        assert done.stdout.strip() == "[(50, 'org/name:50', '49'), (1, 'org/name:test:1', 't')]", done.stderr[-2000:]
        said = done.stderr.strip().splitlines()[-1]
        assert "UserError: org/none is no file" in said and reason in said and "set HF_TOKEN" in said
        assert "Retry" not in done.stderr  # six requests, over half a minute


@pytest.mark.parametrize("text, words", [
    ("{}/none.jsonl", "no file"), ("{}/none", "no file or folder"), ("{}/rows.jsonl*0", "weight of 0"),
    ("{}/rows.jsonl,{}/x.json*2", "x.json"), ("{}/rows.jsonl,", "no file"),
    ("{}/none/test", "no file or folder .*/none/test"), ("{}/empty", "no file of rows.*there are sub/x.jsonl.gz"),
])  # fmt: skip
def test_what_is_not_there(tmp_path, text, words):
    write_jsonl(tmp_path / "rows.jsonl", [chat("a")])
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "sub" / "x.jsonl.gz").touch()
    with pytest.raises(UserError, match=words):
        open_records(text.replace("{}", str(tmp_path)))


def test_a_path_may_hold_a_comma_and_a_star(tmp_path):
    path = write_jsonl(tmp_path / "a,b*2.jsonl", [chat("a")])
    assert len(open_records(path)) == 1 and len(open_records(f"{tmp_path}/")) == 1


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weights_make_the_multiset_of_an_epoch(tmp_path):
    from data.rows import weigh

    for name, count in (("a", 5), ("b", 8), ("c", 40)):
        write_jsonl(tmp_path / f"{name}.jsonl", [chat("x", id=f"{name}{n}") for n in range(count)])
    records = open_records(",".join(f"{tmp_path}/{entry}" for entry in ("a.jsonl*2.4", "b.jsonl", "c.jsonl*.25")))
    kept = [n for n in range(len(records)) if n != 3]  # one row of a was refused
    weighed = weigh(records, kept, seed=0)
    assert weighed == weigh(records, kept, seed=0) != weigh(records, kept, seed=1)
    times = Counter(records[n].id for n in weighed)
    assert sorted(times[f"a{n}"] for n in (0, 1, 2, 4)) == [2, 2, 3, 3] and "a3" not in times  # 0.4 of 4 rows: 2
    assert all(times[f"b{n}"] == 1 for n in range(8))
    assert sorted(times[f"c{n}"] for n in range(40)) == [0] * 30 + [1] * 10


# ---- the index of a first pass ---------------------------------------------------------------------------------------


@pytest.fixture
def indexed(tmp_path, monkeypatch, picture):
    """Rows of every kind, good and bad, in a file; every pass is worth an index, and the cache folder is a test's own."""
    monkeypatch.setattr(index, "WORTH_SECONDS", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    picture.rename(tmp_path / "data" / "a.png")
    rows = [chat(answer, id=n) for n, answer in enumerate(ANSWERS)]
    rows += [{"messages": 3}, chat("see", image="a.png#xywh=1,2,3,4"), chat("see", image="later.png")]
    return write_jsonl(tmp_path / "data" / "rows.jsonl", rows)


def found_in(path, **options):
    """All that is known of a source's rows."""
    find_file.cache_clear()  # as in another process
    records = open_records(path, on_bad_row="skip", **options)
    rows = [(record.id, record.where, record.messages, record.image_sizes) for record in records]
    counts = records.notes, records.dialects, records.text_bytes, records.image_sizes, records.bad, records.refusal()
    return rows, *counts, records.parts[0].describe()


def test_the_second_opening_reads_no_good_row(indexed, monkeypatch):
    first = found_in(indexed)
    assert (indexed.parent / ".rows.jsonl.index").exists()
    monkeypatch.setattr(Lines, "pieces", lambda source: pytest.fail("the rows were gone through again"))
    monkeypatch.setattr(Lines, "sha256", lambda source: pytest.fail("the file was read again"))
    assert found_in(indexed) == first and len(first[0]) == 6


def damage_row(indexed):
    indexed.write_bytes(indexed.read_bytes().replace(b"assistant", b"asistant", 1))


def bring_picture(indexed):
    (indexed.parent / "later.png").write_bytes((indexed.parent / "a.png").read_bytes())


def lose_picture(indexed):
    (indexed.parent / "a.png").unlink()


def change_picture(indexed):
    Image.new("RGB", (3, 3)).save(indexed.parent / "a.png")


@pytest.mark.parametrize("change", [damage_row, bring_picture, lose_picture, change_picture])
def test_whatever_changed_is_found(indexed, monkeypatch, change):
    before = found_in(indexed)
    change(indexed)
    after = found_in(indexed)
    assert after != before
    (indexed.parent / ".rows.jsonl.index").unlink()
    assert found_in(indexed) == after


def test_an_index_is_of_one_run_and_one_reading_code(indexed, tmp_path, monkeypatch):
    assert len(found_in(indexed)[0]) == 6 and len(found_in(indexed, takes=["preference"])[0]) == 0
    assert len(found_in(indexed)[0]) == 6 and len(found_in(indexed, template=Template("{id}", "{id}"))[0]) == 5
    assert len(found_in(indexed)[0]) == 6
    (tmp_path / "other").mkdir()
    assert len(found_in(indexed, image_root=tmp_path / "other")[0]) == 5  # a.png lies outside it
    monkeypatch.setattr(index, "code_version", lambda: "another")
    monkeypatch.setattr(Lines, "pieces", lambda source: iter([(1, 0, 9, b"no row")]))
    assert len(found_in(indexed)[0]) == 0


def test_a_damaged_index_is_made_again(indexed):
    expected, path = found_in(indexed), indexed.parent / ".rows.jsonl.index"
    whole, rng = path.read_bytes(), random.Random(0)
    for number in range(60):
        place = rng.randrange(len(whole))
        damaged = whole[:place] + (bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :] if number % 2 else b"")
        path.write_bytes(damaged)
        assert found_in(indexed) == expected
    path.write_bytes(b"[" * 200_000)
    assert found_in(indexed) == expected
    assert path.read_bytes() == whole


def test_where_the_folder_cannot_be_written_the_index_lies_in_the_cache(indexed, tmp_path, monkeypatch):
    expected, replace = found_in(indexed), index.os.replace
    (indexed.parent / ".rows.jsonl.index").unlink()

    def refuse(source, target):
        if target.parent == indexed.parent:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(index.os, "replace", refuse)
    assert found_in(indexed) == expected
    assert [path.name for path in indexed.parent.iterdir() if path.name.startswith(".")] == []
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert found_in(indexed) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Lines, "pieces", lambda source: pytest.fail("the rows were gone through again"))
    assert found_in(indexed) == expected


def test_every_format_is_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "WORTH_SECONDS", -1)
    rows = [chat(answer, id=f"r{n}") for n, answer in enumerate(ANSWERS)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, 3]))
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    (tmp_path / "torn.json").write_text("{\n")
    write_parquet(tmp_path / "rows.parquet", rows)
    write_csv(tmp_path / "rows.csv", rows)
    first = found_in(tmp_path)
    for source in {type(part.source) for part in open_records(tmp_path, on_bad_row="skip").parts}:
        monkeypatch.setattr(source, "pieces", lambda source: pytest.fail("the rows were gone through again"))
    assert found_in(tmp_path) == first and len(first[0]) == 16


def test_a_quick_pass_leaves_no_file(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("a")])
    open_records(path)
    assert list(tmp_path.iterdir()) == [path]
