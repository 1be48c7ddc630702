"""What is learnt from a row, for every dialect and every family: the answers' own text, their calls and stops, no other byte;
and generation is fed the very ids that training puts before an answer.

Random conversations (unicode, empty turns, tool turns, text that spells any family's special tokens) are written as a row of
every dialect that can hold them, read back and encoded. RANDOM_CONVERSATIONS=10000 in the environment asks for more of them.
"""

import json
import os
import random
import shutil
from collections import Counter

import pytest
import torch
from conftest import SHARED
from PIL import Image
from test_labels import WORDS, normal, random_call, spans

from data.dialect_proxy_lite import TOOLS, expand
from data.dialects import DIALECTS, read_row
from data.labels import NO_LOSS
from data.template import make_template
from data.turns import ROLES
from model.family import Options, families, find_family
from model.tiny import set_vocabulary, write_byte_tokenizer, write_json

pytestmark = pytest.mark.slow

NUM_CONVERSATIONS = int(os.environ.get("RANDOM_CONVERSATIONS", 60))
TOKENIZERS = {"qwen2": "qwen2.5", "qwen2_5_vl": "qwen2.5-vl", "minicpm_v": "minicpm_llama3", "cogagent": "cogagent",
              "phi3_vision": "phi3-vision"}  # fmt: skip
SPECIAL = ["<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|end|>", "<|end|>\n", "<|assistant|>\n", "</s>",
           "<|user|>", "<|observation|>", "[gMASK]", "<sop>", "<|image_1|>", "<unk>", "<|begin_of_image|>", "<slice>", "<s>"]
PICTURE_WORDS = ["<image>", "<image_00>", "<image>\n"]  # text where a row has no pictures


def make_family(name, tokenizer, folder):
    """A family without weights, over its real tokenizer's files or 256 bytes."""
    family_class = next(entry for entry in families() if entry.name == name)
    if tokenizer == "bytes":
        write_byte_tokenizer(family_class, folder)
    else:
        source = SHARED / "tokenizers" / TOKENIZERS[name]
        if not source.is_dir():
            pytest.skip("the real tokenizers are not on this machine")
        for path in source.iterdir():
            shutil.copyfile(path, folder / path.name)
    for file, content in family_class.tiny_files().items():
        if file == "config.json" or not (folder / file).exists():
            write_json(folder / file, content)
    set_vocabulary(find_family(folder), None)
    return find_family(folder, Options(tool_template="qwen"))


# ---- what the answers of a family should be --------------------------------------------------------------------------

def supervised(family, turn, after):
    """The text that has a loss for an assistant turn; `after` is the role of the next turn that is not empty, or None."""
    words = turn["content"]
    calls = [(call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False))
             for call in turn.get("tool_calls", [])]
    if family.name == "minicpm_v":
        return words.strip() + "<|eot_id|>"
    if family.name == "phi3_vision":
        return words + "<|end|>"
    if family.name == "cogagent":  # each call is a turn of its own
        parts = ["\n" + words] * bool(words) + [f"{name}\n{values}" for name, values in calls]
        stops = {"tool": "<|observation|>", "assistant": ""}  # an empty user turn is left out, and what follows ends none
        return "<|assistant|>".join(parts) + stops.get(after, "<|user|>")
    shown = [f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {values}}}\n</tool_call>' for name, values in calls]
    text = "\n".join([words] * bool(words) + shown) + "<|im_end|>"
    return text if family.tokenizer.backend_tokenizer.normalizer is None else normal(text)


def neutral(turn):
    """The turn in words that spell no special token; what is empty stays so."""
    if isinstance(turn["content"], str):
        return turn | {"content": turn["content"] and "word"}
    return turn | {"content": [part | ({"text": "word"} if part["type"] == "text" else {}) for part in turn["content"]]}


def check(family, messages, tools, answers):
    """answers: the texts of the trained turns with their calls, as the row's maker knows them."""
    example = family.encode(messages, tools)
    place = -1
    expected = []
    for answer in answers:  # in their places among the turns
        place = next(n for n in range(place + 1, len(messages)) if is_trained(messages[n]))
        after = (turn["role"] for turn in messages[place + 1 :] if turn["content"] or "tool_calls" in turn)
        expected.append(supervised(family, answer, next(after, None)))
    assert spans(family, example) == expected
    special = {i for token, i in family.pieces.special.items() if token.strip("</>") not in ("box", "ref", "quad", "point")}
    counts = [Counter(i for i in made.input_ids.tolist() if i in special)
              for made in (example, family.encode(list(map(neutral, messages)), tools))]
    assert counts[0] == counts[1]  # what a text spells did not become a special token
    trained = (example.labels != NO_LOSS).tolist()
    starts = [n for n, inside in enumerate(trained) if inside and not trained[n - 1]]
    ends = [n for n, turn in enumerate(messages) if is_trained(turn)]
    for start, end in zip(starts, ends, strict=True):
        prompt = family.encode_prompt(messages[:end], tools)
        assert torch.equal(prompt.input_ids, example.input_ids[:start]) and prompt.num_supervised == 0


def is_trained(turn):
    return turn["role"] == "assistant" and turn.get("train", True)


# ---- random conversations -------------------------------------------------------------------------------------------

class Draw(random.Random):
    """Random parts of rows."""

    def __init__(self, seed, family, pictures):
        super().__init__(seed)
        self.family, self.pictures = family, pictures
        self.has_tools = family.name in ("qwen2", "qwen2_5_vl", "cogagent")

    def text(self, least=0, banned=()):
        words = [word for word in WORDS + SPECIAL if not any(ban in word for ban in banned)]
        return "".join(self.choice(words) + self.choice(["", " "]) for _ in range(self.randint(least, 8)))

    def answer(self, **options):
        return {"role": "assistant", "content": self.text(least=1, **options)}

    def chat(self, system=True, **options):
        """Turns that end with an answer; some earlier answers have no loss, and may be empty."""
        turns = [{"role": "system", "content": self.text(**options)}] * (system and self.randint(0, 1))
        for number in reversed(range(self.randint(1, 4))):
            turns.append({"role": "user", "content": self.text(**options)})
            turns.append(self.answer(**options))
            if number and self.random() < 0.3:
                turns[-1] = {"role": "assistant", "content": self.text(**options), "train": False}
        return turns

    def call(self):
        return random_call(self)

    def picture(self):
        return str(self.pictures / self.choice(["a.png", "b.png"]))


def trained_of(turns):
    return [turn for turn in turns if is_trained(turn)]


def write_messages(draw):
    turns = draw.chat()
    if draw.random() < 0.3:
        turns[0]["content"] += draw.choice(PICTURE_WORDS)
    cut = draw.randint(0, 9)
    typed = [turn | {"content": [{"type": "text", "text": text} for text in (turn["content"][:cut], turn["content"][cut:])]}
             for turn in turns]
    return {"messages": draw.choice([turns, typed])}, trained_of(turns)


def write_tool_turns(draw):
    if not draw.has_tools:
        return None
    turns = [{"role": "user", "content": draw.text()}]
    for _ in range(draw.randint(1, 3)):
        turns += [{"role": "assistant", "content": draw.text(), "tool_calls": [draw.call() for _ in range(draw.randint(1, 2))]},
                  {"role": "tool", "content": draw.text(least=1)}]
    turns.append(draw.answer())
    return {"messages": turns}, trained_of(turns)


def write_guicourse(draw):
    """Whatever spells a mark is one in this dialect."""
    turns = draw.chat(banned=["<image"])
    names = draw.choice([("role", "content", {}), ("from", "value", {"user": "human", "assistant": "gpt"})])
    row = {"conversations": [{names[0]: names[2].get(turn["role"], turn["role"]), names[1]: turn["content"],
                              "train": turn.get("train")} for turn in turns]}
    if draw.family.image_token_id is not None:
        pictures = [draw.picture() for _ in range(draw.randint(1, 2))]
        user = next(item for item, turn in zip(row["conversations"], turns, strict=True) if turn["role"] == "user")
        if draw.random() < 0.5:
            user[names[1]] += "".join(f"<image_{number:02}> " for number in range(len(pictures)))
            pictures = {f"<image_{number:02}>": path for number, path in enumerate(pictures)}
        row["image"] = pictures[0] if len(pictures) == 1 and isinstance(pictures, list) else pictures
    return row, trained_of(turns)


def write_cogagent(draw):
    if draw.family.image_token_id is None:
        return None
    turns = draw.chat(banned=["<image"])
    row = {"messages": [dict(turn) for turn in turns]}
    (row if draw.random() < 0.5 else row["messages"][-2])["image"] = draw.picture()
    return row, trained_of(turns)


def write_prompt_completion(draw, key="prompt"):
    *prompt, answer = draw.chat()
    return {key: prompt, "completion": answer["content"]}, [answer]


def write_query_completion(draw):
    query = draw.text()
    while query.startswith("<|im_start|>"):  # at the very start it is a rendered chat
        query = query.removeprefix("<|im_start|>")
    answer = draw.answer()
    return {"query": query, "completion": answer["content"]}, [answer]


def write_alpaca(draw):
    row, [answer] = write_query_completion(draw)
    return {"instruction": row["query"], "input": draw.text(), "output": answer["content"]}, [answer]


def write_dolly(draw):
    row, [answer] = write_query_completion(draw)
    return {"instruction": row["query"], "context": "", "response": answer["content"], "category": "open"}, [answer]


def write_chat_text(draw):
    if draw.family.image_token_id is None:
        return None
    turns = draw.chat(banned=["<|im_", "start|>", "end|>", "<image", "_pad|>"])
    for turn in turns:
        turn.pop("train", None)
        turn["content"] = turn["content"] or "x"
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return {"text": text, "screenshot": draw.picture()}, trained_of(turns)


def write_cookbook(draw):
    turns = draw.chat(system=False, banned=["<image", "<|image_"])
    items = [{"user": user["content"], "assistant": answer["content"] or "x"}
             for user, answer in zip(turns[::2], turns[1::2], strict=True)]
    if draw.family.image_token_id is not None:
        items[0]["images"] = [draw.picture() for _ in range(draw.randint(1, 2))]
    return {"conversations": items}, [{"role": "assistant", "content": item["assistant"]} for item in items]


def write_preference(draw):
    *prompt, chosen = draw.chat()
    rejected = draw.answer()
    return {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]}, [chosen], [rejected]


def write_pair(draw):
    (row, [chosen]), rejected = write_query_completion(draw), draw.answer()
    return {"query": row["query"], "response_ws": chosen["content"], "response_ls": rejected["content"]}, [chosen], [rejected]


def write_countdown(draw):
    return {"target": draw.randint(1, 99), "nums": [draw.randint(1, 99) for _ in range(4)]}, None


def write_ground_truth(draw):
    return {"prompt": [turn for turn in draw.chat() if turn["role"] == "user"][:1], "ground_truth": draw.text()}, None


def write_webvoyager(draw):
    return {"web_name": "Allrecipes", "id": "Allrecipes--0", "ques": draw.text(), "web": "https://www.allrecipes.com/"}, None


def write_mind2web(draw):
    if draw.family.image_token_id is None:
        return None
    value = draw.text(least=1)
    box = json.dumps({"bounding_box_rect": "100,10,50,20"})
    row = {"screenshot": str(draw.pictures / "a.png"), "operation": {"op": "TYPE", "value": value},
           "confirmed_task": draw.text(), "pos_candidates": [{"attributes": box}], "action_reprs": [draw.text()],
           "target_action_index": "1"}
    return row, [{"role": "assistant", "content": f"TYPE {value} <box>(500,100),(750,300)</box>"}]  # of 200 x 100 pixels


def write_run_step(draw):
    if draw.family.name not in ("qwen2_5_vl",):
        return None
    answers, messages = [], [{"role": "system", "content": draw.text()}, {"role": "user", "content": draw.text()}]
    for _ in range(draw.randint(1, 4)):
        answers.append({"role": "assistant", "content": draw.text(), "tool_calls": [draw.call()]})
        parts = [{"type": "text", "text": draw.text()}, {"type": "image_url", "image_url": {"url": draw.picture()}}]
        messages += [{"role": "user", "label": "screenshot", "content": parts}, answers[-1]]
    rows = expand({"run_id": "r", "solver_history": {"messages": messages}, "tools": draw.sample(TOOLS, 3)})
    place = draw.randrange(len(rows))
    return rows[place], [answers[place]]


def write_table(draw):
    question, answer = draw.text(least=1), draw.answer()
    return {"q": question, "a": answer["content"]}, [answer]


WRITERS = {
    "messages": write_messages, "messages with tools": write_tool_turns, "GUICourse": write_guicourse,
    "CogAgent": write_cogagent, "prompt/completion": write_prompt_completion, "query/completion": write_query_completion,
    "instruction/output": write_alpaca, "instruction/response": write_dolly,
    "text + screenshot": write_chat_text, "Phi-3 cookbook": write_cookbook, "chosen/rejected": write_preference,
    "query + response_ws/response_ls": write_pair, "target/nums": write_countdown,
    "prompt/ground_truth": write_ground_truth, "WebVoyager": write_webvoyager, "Mind2Web": write_mind2web,
    "Proxy-Lite run": write_run_step, "table": write_table,
}  # fmt: skip


def test_every_dialect_is_written_here():
    """A dialect added to the project needs a writer too; three only say what to do instead."""
    known = {entry.name for entry in DIALECTS} | {"table", "messages with tools"}
    assert known - {"raw GUICourse", "raw Mind2Web", "whole Proxy-Lite run"} == set(WRITERS)
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool"}


@pytest.mark.parametrize("tokenizer", ["bytes", "real"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_labels_and_prompts_of_random_rows(tmp_path, name, tokenizer):
    """The whole of it, for one family: see the head of this file."""
    family = make_family(name, tokenizer, tmp_path)
    for letter, size in (("a", (200, 100)), ("b", (64, 90))):
        Image.effect_noise(size, 50).save(tmp_path / f"{letter}.png")
    draw = Draw(f"{name} {tokenizer}", family, tmp_path)
    template = make_template("{q}", "{a}", None)
    seen = Counter()
    while seen.total() < NUM_CONVERSATIONS:
        dialect = draw.choice(list(WRITERS))
        made = WRITERS[dialect](draw)
        if made is None:  # this family takes no pictures, or no tools
            continue
        row, answers, *rejected = made
        row = json.loads(json.dumps(row))
        reading = read_row(row, Counter(), template if dialect == "table" else None, lambda path: (200, 100))
        assert reading.dialect == dialect.removesuffix(" with tools")
        if answers is None:  # a problem: what is generated on is what training would put before any answer
            answers = [draw.answer()]
            assert torch.equal(family.encode_prompt(reading.messages).input_ids,
                               family.encode_prompt([*reading.messages, *answers]).input_ids)
            check(family, [*reading.messages, *answers], None, answers)
        else:
            check(family, reading.messages, row.get("tools"), answers)
        if rejected:
            check(family, reading.rejected, None, rejected[0])
            first, second = (family.encode_prompt(side).input_ids for side in (reading.messages, reading.rejected))
            assert torch.equal(first, second)
        seen[dialect] += 1
    assert NUM_CONVERSATIONS < 1000 or len(seen) >= len(WRITERS) - 5
