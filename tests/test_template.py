"""Tables as conversations, by the words of --prompt_template and --response_template."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from data.errors import UserError
from data.records import open_records
from data.template import make_template

pytestmark = pytest.mark.slow

# A row with the columns of DBQ/Burberry.Product.prices (schema of its cards); the picture's URL became a file's name.
BURBERRY = {
    "website_name": "Burberry", "competence_date": "2023-11-17", "country_code": "USA", "currency_code": "USD",
    "brand": "BURBERRY", "category1_code": "WOMAN", "category2_code": "OUTERWEAR", "category3_code": "QUILTED JACKETS",
    "product_code": 80740821, "title": "Cropped Nylon Quilted Jacket", "itemurl": "https://us.burberry.com/x-p80740821",
    "imageurl": "images/80740821.jpg", "full_price": 2290.0, "price": 2290.0, "full_price_eur": 1565.27,
    "price_eur": 1565.27, "flg_discount": 0,
}
PROMPT, RESPONSE = "What is shown in this image?", "Product: {title}, Category: {category3_code}, Full Price: {full_price}"
ANSWER = "Product: Cropped Nylon Quilted Jacket, Category: QUILTED JACKETS, Full Price: 2290.0"


@pytest.fixture
def table(tmp_path):
    """table(*rows) -> a file of them, beside images/80740821.jpg."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (48, 64), "tan").save(tmp_path / "images" / "80740821.jpg")

    def write(*rows):
        path = tmp_path / "table.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    return write


def test_a_table_of_products(table, tmp_path):
    record = open_records(table(BURBERRY), template=make_template(PROMPT, RESPONSE, "imageurl"))[0]
    picture = {"type": "image", "image": str(tmp_path / "images" / "80740821.jpg")}
    assert record.messages == [{"role": "user", "content": [picture, {"type": "text", "text": PROMPT}]},
                               {"role": "assistant", "content": ANSWER}]
    assert record.image_sizes == [(48, 64)] and record.dialect == "table" and record.kind == "conversation"


@pytest.mark.parametrize("prompt, parts", [
    ("Look: <image> Name it.", ["Look: ", None, " Name it."]), ("<image>\n{brand}", [None, "\nBURBERRY"]),
    ("{{{brand}}}", [None, "{BURBERRY}"]), ("{full_price:,.2f} {competence_date:.4}", [None, "2,290.00 2023"]),
    ("{nums}", [None, "44, 19, 35"]), ("{odd}", [None, "an <image> and {brand}"]),
])
def test_where_words_and_pictures_stand(table, tmp_path, prompt, parts):
    row = BURBERRY | {"nums": [44, 19, 35], "odd": "an <image> and {brand}", "screenshot": "other.png"}
    record = open_records(table(row), template=make_template(prompt, RESPONSE, "imageurl"))[0]
    assert [part.get("text") for part in record.messages[0]["content"]] == parts


def test_a_table_without_pictures(table):
    record = open_records(table(BURBERRY), template=make_template("Price of {title}?", "{price}", None))[0]
    assert [turn["content"] for turn in record.messages] == ["Price of Cropped Nylon Quilted Jacket?", "2290.0"]


def test_an_object_is_written_as_json_and_a_column_may_be_called_tools(table):
    row = {"tools": "hammer", "sizes": [{"w": 1.5, "new": True, "note": None}, "h\u00e9"], "seen": ["x", 2]}
    template = make_template("Name the {tools}.", "{label} {sizes} {seen}", None)
    (record,) = open_records(table(row | {"label": {"name": "\u00e9", "of": ["it's"]}}), template=template)
    assert record.messages[0]["content"] == "Name the hammer." and record.tools is None
    assert record.messages[1]["content"] == \
        '{"name": "\u00e9", "of": ["it\'s"]} [{"w": 1.5, "new": true, "note": null}, "h\u00e9"] x, 2'


@pytest.mark.parametrize("change, expected", [
    ({"title": None}, "column title is empty"), ({"imageurl": ""}, "column imageurl is empty"),
    ({"imageurl": "http://host/a.jpg"}, "is a URL; nothing is fetched while training"),
    ({"imageurl": "n.a."}, "missing or unreadable"), ({"full_price": "N.A."}, "column full_price does not fit"),
    ({"full_price": 10**400}, "column full_price does not fit"),
])
def test_bad_rows_of_a_table(table, change, expected):
    with pytest.raises(UserError, match=f"table.jsonl:2 .*{expected}"):
        open_records(table(BURBERRY, BURBERRY | change), template=make_template(PROMPT, "{title} {full_price:.2f}", "imageurl"))


def test_a_column_that_is_not_there_names_those_that_are(table):
    with pytest.raises(UserError, match="column name is missing: the row has .*'brand'"):
        open_records(table(BURBERRY), template=make_template("{name}", "x", None))


@pytest.mark.parametrize("settings, expected", [
    ((None, "x", None), "response_template is given without --prompt_template"),
    ((None, None, "x"), "image_column is given without --prompt_template"),
    (("x", None, "x"), "image_column is given without --response_template"),
    (("<image><image>", "x", "x"), "2 <image> marks"), (("{", "x", None), "cannot be read.*{{ for a brace"),
    (("{}", "x", None), "without the name of a column"), (("x", "}", None), "response_template"),
])
def test_settings_that_cannot_work(settings, expected):
    with pytest.raises(UserError, match=expected):
        make_template(*settings)


def test_columns_are_not_programs(table):
    """A template reaches a row's values and nothing behind them."""
    with pytest.raises(UserError, match="column title.__class__ is missing"):
        open_records(table(BURBERRY), template=make_template("{title.__class__}", "x", None))


def test_a_prompt_template_alone_rewords_problems(table):
    template = make_template("Make {target} of {nums}.", None, None)
    record = open_records(table({"target": 98, "nums": [44, 19, 35]}), template=template)[0]
    assert record.messages == [{"role": "user", "content": "Make 98 of 44, 19, 35."}]
    assert record.truth == {"numbers": [44, 19, 35], "target": 98} and record.kind == "problem"
    with pytest.raises(UserError, match="alone is for problems: this is messages; add --response_template"):
        open_records(table({"messages": []}), template=template)


def test_the_burberry_recipe_trains_on_its_table(tmp_path, capsys):
    """configs/phi3-vision-burberry-lora.yaml as it stands, on a tiny Phi-3-vision: a table of links, its pictures fetched from
    a server on loopback, the rows that come of it."""
    pyarrow = pytest.importorskip("pyarrow")
    from hub_stand_in import StandIn, picture_bytes
    from pyarrow.parquet import write_table

    from data.fetch_images import fetch_images
    from model.tiny import write_tiny

    shop = StandIn()
    shop.pictures["coat"] = lambda handler: handler.send(200, picture_bytes("tan"), {"Content-Type": "image/png"})
    rows = [BURBERRY | {"title": f"Coat {number}", "imageurl": f"http://{shop.netloc}/pictures/coat"} for number in range(8)]
    write_table(pyarrow.Table.from_pylist([*rows, BURBERRY | {"imageurl": "n.a."}]), tmp_path / "table.parquet")
    fetch_images([tmp_path / "table.parquet"], "imageurl", tmp_path, [shop.netloc])
    shop.shutdown()
    assert "8 of 9 rows have their picture" in capsys.readouterr().out

    write_tiny("phi3_vision", tmp_path / "base")
    recipe = ROOT / "configs" / "phi3-vision-burberry-lora.yaml"
    more = ["--base_model", tmp_path / "base", "--data_path", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out",
            "--max_steps", 2, "--eval_split", 1, "--device", "cpu", "--num_workers", 0, "--optim", "adamw"]
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--config", str(recipe), *map(str, more)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7 rows to train on (8 table)" in done.stdout and "Product: Coat" in done.stdout
    assert (tmp_path / "out" / "adapter").is_dir()
