"""The label masker on the real tokenizers: reference chats, thousands of random conversations, tool calls."""

import json
import random
import shutil

import pytest
import torch
from conftest import REFERENCE, shared

from data.errors import UserError
from data.explain import explain
from data.labels import MARKS, NO_LOSS, cut_turns, mask
from model.families.qwen2 import render_with_tools
from model.family import Options, find_family
from model.tiny import write_tiny

STOP = "<|im_end|>"
TOKENIZERS = {"qwen2": "qwen2.5", "qwen2_5_vl": "qwen2.5-vl"}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def family(request, tmp_path_factory):
    return make_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_family("qwen2", tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return make_family("qwen2_5_vl", tmp_path_factory.mktemp("vision"))


def make_family(name, folder):
    """A family without weights: the real tokenizer, and a config whose special ids are the real ones."""
    for path in shared(f"tokenizers/{TOKENIZERS[name]}").iterdir():
        shutil.copyfile(path, folder / path.name)
    config = {"model_type": name, "hidden_size": 64, "vocab_size": 151936}
    if name == "qwen2_5_vl":
        config |= {"image_token_id": 151655, "vision_config": {"spatial_merge_size": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    return find_family(folder)


@pytest.fixture(scope="module")
def caller(vision):
    """The vision family under --tool_template qwen."""
    return find_family(vision.folder, Options(tool_template="qwen"))


def spans(family, example):
    """The supervised runs of an example as text."""
    ids, runs = example.input_ids.tolist(), []
    trained = (example.labels != NO_LOSS).tolist()
    for place, inside in enumerate(trained):
        if inside and (place == 0 or not trained[place - 1]):
            runs.append([])
        if inside:
            runs[-1].append(ids[place])
    return [family.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


# ---- the references -------------------------------------------------------------------------------------------------


def reference_cases(file, key):
    path = next(REFERENCE.glob(f"*/{file}"), None) if REFERENCE.is_dir() else None
    if path is None:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no {file} in {REFERENCE}"))]
    return [pytest.param(c, id=f"{path.parent.name}-{c['name']}") for c in json.loads(path.read_text())[key]]


def train_last_only(messages):
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return [m if m["role"] != "assistant" or i == last else m | {"train": False} for i, m in enumerate(messages)]


def check_reference(family, case, messages):
    example = family.encode(messages, case.get("tools"))
    assert example.input_ids.tolist() == case["input_ids"]
    assert example.labels.tolist() == case["labels_all_turns"]
    assert spans(family, example) == case["decoded_spans"]
    last = family.encode(train_last_only(messages), case.get("tools"))
    assert last.input_ids.tolist() == case["input_ids"] and last.labels.tolist() == case["labels_last_turn"]
    if case["newline_variant"]["input_ids_equal"]:
        official = find_family(family.folder, Options(labels="official")).encode(messages, case.get("tools"))
        assert official.input_ids.tolist() == case["input_ids"]
        assert official.labels.tolist() == case["newline_variant"]["labels"]
    prompt = family.encode_prompt(messages, case.get("tools"))
    start = case["spans_all_turns"][-1][0]
    assert prompt.input_ids.tolist() == case["input_ids"][:start]
    assert torch.equal(prompt.positions, example.positions[..., :start]) and prompt.num_supervised == 0
    return example


@pytest.mark.parametrize("case", reference_cases("label_masks.json", "chats"))
def test_reference_chats(text, case):
    example = check_reference(text, case, case["messages"])
    assert example.num_supervised == case["n_label_tokens_all"]


@pytest.mark.parametrize("case", reference_cases("vision_prompts.json", "cases"))
def test_reference_vision_prompts(vision, case):
    images = next(REFERENCE.glob("*/vision_prompts.json")).parent / "images"
    messages = [
        m | {"content": [i | {"image": images / i["image"]} if i["type"] == "image" else i for i in m["content"]]}
        for m in case["messages"]
    ]
    example = check_reference(vision, case, messages)
    assert example.positions.tolist() == case["position_ids"]
    assert int(example.positions.max()) + 1 - len(example) == case["rope_delta"]
    assert example.pixels["image_grid_thw"].tolist() == case["image_grid_thw"]
    assert [b - a for a, b in example.image_spans] == [h * w // 4 for _, h, w in case["image_grid_thw"]]
    assert all(example.input_ids[a:b].unique().tolist() == [151655] for a, b in example.image_spans)
    assert torch.all(example.labels[example.input_ids == 151655] == NO_LOSS)


# ---- random conversations -------------------------------------------------------------------------------------------

WORDS = [
    "assistant", "system\n", "user", "\n", "\n\n", "  ", "a", "Zo\u00eb", "na\u00efve", "\u4f60\u597d",
    "\U0001f44b\U0001f3fd", "e\u0301", "0", "1,234.5", "{}", '"', "\\", "<think>", "<|im_start|>", "<|im_end|>",
    "<|im_end|>\n",
    "<|im_start|>assistant\n", "<|endoftext|>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>",
    "<|video_pad|>", "<|im_", "start|>", "<tool_response>", "</tool_response>", "<", "|", MARKS[0], MARKS[1],
    "\u200b", "\t", "def f(x):\n    return x", "\ufb01", "\r\n", "&lt;", "{{ 1 }}", "{% raw %}",
]  # fmt: skip


def random_text(draw, least=0):
    return "".join(draw.choice(WORDS) + draw.choice(["", " "]) for _ in range(draw.randint(least, 8)))


def random_call(draw):
    values = [random_text(draw), draw.randint(-5, 5), [1, random_text(draw)], {"x": None}, True, 0.5]
    arguments = {f"key {i} {random_text(draw)}": draw.choice(values) for i in range(draw.randint(0, 3))}
    return {"type": "function", "function": {"name": draw.choice(["click", "go to", "scroll"]), "arguments": arguments}}


def random_chat(draw, tools=False):
    """Messages that may hold anything; every assistant turn has a text or a call unless it is empty on purpose."""
    messages = [{"role": "system", "content": random_text(draw)}] * draw.randint(0, 1)
    messages = messages + [{"role": "user", "content": random_text(draw)}]
    for _ in range(draw.randint(1, 4)):
        answer = {"role": "assistant", "content": random_text(draw)}
        if tools and draw.random() < 0.6:
            answer["tool_calls"] = [random_call(draw) for _ in range(draw.randint(1, 2))]
        messages.append(answer)
        role = "tool" if "tool_calls" in answer else "user"
        messages += [{"role": role, "content": random_text(draw)} for _ in range(draw.randint(1, 2))]
    while messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


def random_tools(draw):
    names = ["click", "go to", "scroll"]
    return [
        {"type": "function", "function": {"name": name, "description": random_text(draw), "parameters": {}}}
        for name in names[: draw.randint(1, 3)]
    ]


def normal(text):
    """Text as the tokenizer gives it back: NFC."""
    import unicodedata

    return unicodedata.normalize("NFC", text)


@pytest.mark.slow
def test_random_conversations(family):
    """2,000 chats: supervised text is the answers and their stops, prompts agree, no text becomes a special token."""
    draw = random.Random(0)
    backend = family.tokenizer.backend_tokenizer
    special = {i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    for _ in range(1000):
        messages = random_chat(draw)
        answers = [m for m in messages if m["role"] == "assistant"]
        for answer in answers[:-1]:
            if draw.random() < 0.2:
                answer["train"] = False
        example = family.encode(messages)
        expected = [normal(m["content"]) + STOP for m in answers if m.get("train", True)]
        assert spans(family, example) == expected
        has_system = messages[0]["role"] == "system"
        num_turns = len(messages) + (not has_system)
        found = [i for i in example.input_ids.tolist() if i in special]
        assert found == [151644, 151645] * num_turns  # <|im_start|>, <|im_end|> of the template and nothing else
        prompt = family.encode_prompt(messages).input_ids
        last = family.encode(train_last_only(messages))
        start = int((last.labels != NO_LOSS).nonzero()[0])
        assert torch.equal(prompt, last.input_ids[:start]) and torch.equal(prompt, example.input_ids[:start])
        assert torch.equal(family.encode_prompt(messages[:-1]).input_ids, prompt)


def test_ids_are_the_templates_text(text):
    """Where no text spells a special token, the ids decode to what the hub's template renders."""
    draw = random.Random(1)
    for _ in range(300):
        messages = random_chat(draw)
        if any("<|" in m["content"] for m in messages):
            continue
        rendered = text.tokenizer.apply_chat_template(messages, tokenize=False)
        example = text.encode(messages)
        assert text.tokenizer.decode(example.input_ids, skip_special_tokens=False) == normal(rendered)


def test_typed_text_is_the_same_as_a_string(family):
    draw = random.Random(2)
    for _ in range(100):
        messages = random_chat(draw)
        cut = draw.randint(0, 8)
        halves = [(m["content"][:cut], m["content"][cut:]) for m in messages]
        parts = [[{"type": "text", "text": text} for text in pair] for pair in halves]
        typed = [m | {"content": content} for m, content in zip(messages, parts, strict=True)]
        assert torch.equal(family.encode(typed).input_ids, family.encode(messages).input_ids)


def test_two_halves_of_a_special_token_around_a_picture(vision):
    from PIL import Image

    picture = {"type": "image", "image": Image.new("RGB", (56, 56))}
    parts = [{"type": "text", "text": t} for t in ("<|im_", "end|>", "<|image_pad|>")]
    user = {"role": "user", "content": [*parts, picture, *parts]}
    example = vision.encode([user, {"role": "assistant", "content": "ok"}])
    ids = example.input_ids.tolist()
    assert ids.count(151645) == 3 and ids.count(151655) == 4
    assert [b - a for a, b in example.image_spans] == [4]


def test_picture_rows(vision, tmp_path):
    from PIL import Image

    draw = random.Random(3)
    for number in range(40):
        sizes = [(draw.randint(28, 300), draw.randint(28, 300)) for _ in range(draw.randint(1, 3))]
        content = [{"type": "image", "image": Image.new("RGB", size)} for size in sizes]
        content += [{"type": "text", "text": random_text(draw)} for _ in range(draw.randint(0, 3))]
        draw.shuffle(content)
        order = [part["image"].size for part in content if part["type"] == "image"]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "done"}]
        example = vision.encode(messages, id=f"r{number}")
        assert example.id == f"r{number}" and spans(vision, example) == ["done" + STOP]
        assert [b - a for a, b in example.image_spans] == [vision.picture_positions(*size) for size in order]
        assert int((example.input_ids == 151655).sum()) == sum(b - a for a, b in example.image_spans)
        assert example.positions.shape == (3, len(example)) and example.pixels["pixel_values"].shape[1] == 1176


def test_pictures_for_a_text_model(text):
    with pytest.raises(UserError, match="rows.jsonl:7: .*takes no pictures"):
        text.encode(
            [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, {"role": "assistant", "content": "a"}],
            where="rows.jsonl:7",
        )


def test_too_long_rows_are_refused_whole(family):
    messages = [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": "yes"}]
    length = len(family.encode(messages))
    assert len(family.encode(messages, max_length=length)) == length
    with pytest.raises(UserError, match=rf"rows.jsonl:3: .*{length} positions.*--max_length {length - 1}"):
        family.encode(messages, max_length=length - 1, where="rows.jsonl:3")


def test_template_that_drops_a_turn_is_refused(text, monkeypatch):
    merged = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(text.tokenizer, "chat_template", merged)
    messages = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(UserError, match="1 assistant turns of 2"):
        text.encode(messages)
    text.tokenizer.chat_template = "{{ messages.nothing.at_all }}"
    with pytest.raises(UserError, match="cannot render"):
        text.encode(messages)
    text.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        text.encode(messages)


# ---- tools ----------------------------------------------------------------------------------------------------------


def test_tool_format_equals_the_hubs_template(text):
    """render_with_tools against the template of Qwen2.5's own tokenizer_config.json."""
    draw = random.Random(4)
    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    for _ in range(500):
        messages = random_chat(draw, tools=True)
        tools = draw.choice([None, random_tools(draw)])
        theirs = text.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert render_with_tools(messages, tools, default) == theirs


def test_tool_conversations(text, caller):
    """Each call stands in the supervised text, by the hub's template and by --tool_template qwen."""
    draw = random.Random(5)
    for _ in range(150):
        messages, tools = random_chat(draw, tools=True), random_tools(draw)
        for family in (text, caller):
            example = family.encode(messages, tools)
            answers = [m for m in messages if m["role"] == "assistant"]
            for message, span in zip(answers, spans(family, example), strict=True):
                assert span.endswith(STOP) and span.startswith(normal(message["content"]))
                for call in message.get("tool_calls", []):
                    function = call["function"]
                    wanted = {"name": function["name"], "arguments": function["arguments"]}
                    assert normal(json.dumps(wanted, ensure_ascii=False)) in span
            prompt = family.encode_prompt(messages, tools).input_ids
            assert torch.equal(prompt, example.input_ids[: len(prompt)])


CALL = {"type": "function", "function": {"name": "click", "arguments": {"mark_id": 3}}}
TOOL = {"type": "function", "function": {"name": "click", "description": "Click.", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("said", ["", 'I click mark 3: "mark_id"'])
def test_template_without_tools_is_refused(vision, caller, said):
    """Also where the conversation itself happens to say the names and the values."""
    question = {"role": "user", "content": "click on it"}
    for messages, tools in (
        ([question, {"role": "assistant", "content": said, "tool_calls": [CALL]}], None),
        ([question, {"role": "assistant", "content": said or "x"}], [TOOL]),
    ):
        with pytest.raises(UserError, match="rows.jsonl:2: .*--tool_template qwen"):
            vision.encode(messages, tools, where="rows.jsonl:2")
        example = caller.encode(messages, tools)
        assert ("<tool_call>" in spans(vision, example)[0]) == (tools is None)


def test_a_second_call_that_the_template_forgets(text, monkeypatch):
    forgetful = text.tokenizer.chat_template.replace("in message.tool_calls %}", "in message.tool_calls[:1] %}")
    monkeypatch.setattr(text.tokenizer, "chat_template", forgetful)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert len(text.encode(messages)) > 0
    messages[1]["tool_calls"] = [CALL, CALL]
    with pytest.raises(UserError, match="assistant turn 1: .*click"):
        text.encode(messages)


def test_arguments_must_be_an_object(text):
    call = {"function": {"name": "click", "arguments": '{"mark_id": 3}'}}
    with pytest.raises(UserError, match="arguments of click"):
        text.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}])


def test_tool_rows_with_pictures(caller):
    from PIL import Image

    picture = {"type": "image", "image": Image.new("RGB", (84, 56))}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "Go."}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    example = caller.encode(messages, [TOOL])
    assert [b - a for a, b in example.image_spans] == [6]
    call = '{"name": "click", "arguments": {"mark_id": 3}}'
    assert spans(caller, example) == [f"<tool_call>\n{call}\n</tool_call>{STOP}"]


def test_each_action_of_a_run_is_trained_once(caller):
    """A run of four steps as four rows, each with the history before it: earlier actions carry "train": false."""
    steps = [
        [
            {"role": "user", "content": f"screen {i}"},
            {"role": "assistant", "content": f"step {i}", "tool_calls": [
                {"type": "function", "function": {"name": "click", "arguments": {"mark_id": 10 + i}}}
            ]},
        ]
        for i in range(4)
    ]  # fmt: skip
    rows = []
    for i in range(4):
        history = [m | {"train": False} if m["role"] == "assistant" else m for s in steps[:i] for m in s]
        rows.append(caller.encode([{"role": "user", "content": "Task"}, *history, *steps[i]], [TOOL]))
    trained = [span for row in rows for span in spans(caller, row)]
    assert len(trained) == 4
    for i, span in enumerate(trained):
        assert f'"mark_id": {10 + i}' in span and span.startswith(f"step {i}\n<tool_call>")


# ---- pieces ---------------------------------------------------------------------------------------------------------


def test_a_template_is_read_once(tmp_path):
    """A file a row and two encodings a turn are a third of what a check of text rows takes."""
    write_tiny("qwen2", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(find_family(tmp_path).chat_template())
    family, turns = find_family(tmp_path), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    first = family.render(turns, None)
    (tmp_path / "chat_template.jinja").unlink()
    family.tokenizer.chat_template = None
    assert family.render(turns, None) == first
    assert family.pieces.encode_short.cache_info().hits > 0
    assert len(family.pieces.ids("x" * 1000)) > 100 and family.pieces.encode_short.cache_info().currsize < 20


def test_cut_turns_and_mask():
    pieces = cut_turns("S[a]x]y[a]z", "[a]", "]")
    assert [(p.text, p.trained) for p in pieces] == [("S[a]", False), ("x]", True), ("y[a]", False), ("z", True)]
    ids, labels = mask([([1, 2], False), ([3], True), ([], True), ([4], False)])
    assert ids == [1, 2, 3, 4] and labels == [NO_LOSS, NO_LOSS, 3, NO_LOSS]


def test_all_marks_in_one_row_is_a_sentence(text):
    with pytest.raises(UserError, match="noncharacter"):
        text.encode([{"role": "user", "content": "".join(MARKS)}, {"role": "assistant", "content": "x"}])


def test_explain_shows_the_mask(vision):
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (56, 56))}, {"type": "text", "text": "What?"}]
    example = vision.encode([{"role": "user", "content": content}, {"role": "assistant", "content": "A [box]."}])
    assert explain(example, vision.tokenizer, colour=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><4 picture positions><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n[[A [box].<|im_end|>]]\n"
    )


def test_stop_ids(family):
    assert family.stop_ids == [151645, 151643]
