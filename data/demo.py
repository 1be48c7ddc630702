"""The built-in task: drawn screenshots, questions about them, and the small tokenizer of the model that learns them.

A screen is a window with labelled buttons and text fields on a wallpaper, drawn with Pillow alone, and a pure
function of (task, split, seed, number): nothing is downloaded, and the held-out screens are never drawn for training.
A row is one screen with several questions, in the `messages` dialect; boxes are absolute pixels of the picture,
`<box>x1 y1 x2 y2</box>`. About 4 ms a row; 200 rows take 1 MB.
"""

import json
import random
import shutil
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.boxes import parse_boxes

SIDE = 224  # pixels of a screen, both ways
CELL = 56  # pixels; one merged vision token of the built-in base is CELL x CELL
BUTTON_WIDTH, BUTTON_HEIGHT = 52, 24
FONT_SIZE = 13
BUTTON_WORDS = tuple(("Save Open Close Print Copy Paste Undo Redo Send Reply Search Help Next Back Start Stop Login "
                      "Share Edit View").split())
FIELD_WORDS = tuple(("Buy Cart Play Pause Zoom Sort Map Mail Call Photo Music Games Anna Berlin Friday report empty "
                     "draft hello 2026").split())
TITLES = tuple("Files Editor Shop Player Settings Inbox".split())
COLOURS = "#b22222 #226e32 #1e46aa #78288c #965a14 #146e78 #3c3c46 #aa2864".split()

Box = tuple[int, int, int, int]
Corner = tuple[int, int]


@dataclass(frozen=True)
class Task:
    """One kind of screen, and what is asked about it."""

    words: tuple[str, ...]
    corners: tuple[Corner, ...]  # where the cell of a button may start
    num_buttons: tuple[int, int]  # from, to
    num_fields: tuple[int, int] = (0, 1)
    field_words: tuple[str, ...] = FIELD_WORDS
    field_corners: tuple[Corner, ...] = ()  # besides `corners`
    read_corners: tuple[Corner, ...] = ()  # of more buttons, whose text alone is asked for
    asked_corners: tuple[Corner, ...] = ()  # of the button that a held-out question is about; none: any
    side: int = SIDE  # pixels; the pictures of lessons are pieces of a screen, without a window
    num_questions: int = 2  # at most so many a screen
    reading: float = 0.3  # share of the buttons whose text is asked for instead of their place


@dataclass(frozen=True)
class Screen:
    """A picture, and what stands where on it: (text, box) of every button and of every text field."""

    picture: Image.Image
    buttons: list[tuple[str, Box]]
    fields: list[tuple[str, Box]]


COARSE = tuple((x, y) for y in range(CELL, SIDE, CELL) for x in range(0, SIDE, CELL))
BETWEEN = tuple((x, y + CELL // 2) for y in range(0, SIDE, CELL) for x in range(0, SIDE, CELL))
TOOLBAR = tuple((x, CELL // 2) for x in range(0, SIDE, CELL))
LESSON = Task(BUTTON_WORDS, COARSE, num_buttons=(2, 5))
TASKS = {
    # the lessons of the base, in order: one cell to read, four cells, a screen; then with text fields in any row, and with
    # buttons in any row, which it learns to read there but not to find
    "cell": replace(LESSON, corners=((0, 0),), num_buttons=(1, 1), num_fields=(0, 0), side=CELL, reading=1.0),
    "piece": replace(LESSON, corners=((0, 0), (CELL, 0), (0, CELL), (CELL, CELL)), num_buttons=(2, 3), side=2 * CELL,
                     num_questions=1),
    "screen": LESSON,
    "base": replace(LESSON, num_fields=(1, 2), field_words=BUTTON_WORDS + FIELD_WORDS,
                    field_corners=BETWEEN, num_questions=3),
}
TASKS |= {
    "read": replace(TASKS["base"], read_corners=BETWEEN),
    # what the base cannot do: find buttons of a toolbar above its grid, where it has only read them; half of them are there
    "new": Task(BUTTON_WORDS, COARSE + 3 * TOOLBAR, num_buttons=(3, 5), num_questions=5, reading=0.0, asked_corners=TOOLBAR),
}


def draw_screen(task: Task, source: random.Random) -> Screen:
    """Draw one screen; every choice comes from `source`."""
    picture = draw_wallpaper(task.side, source)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(FONT_SIZE)
    if task.side == SIDE:
        bar = source.choice(COLOURS)
        draw.rectangle((3, 4, SIDE - 4, SIDE - 3), outline=bar)
        draw.rectangle((3, 4, SIDE - 4, 22), fill=bar)
        draw.text((10, 13), source.choice(TITLES), fill="white", font=font, anchor="lm")
    num_buttons, num_fields = source.randint(*task.num_buttons), source.randint(*task.num_fields)
    taken = choose_corners(task.corners + task.read_corners, num_buttons, [], source)
    buttons, fields = [], []
    for text, corner in zip(source.sample(task.words, num_buttons), taken, strict=True):
        box = box_at(corner)
        draw.rounded_rectangle(box, radius=4, fill=source.choice(COLOURS))
        draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, fill="white", font=font, anchor="mm")
        buttons.append((text, box))
    unused = [word for word in task.field_words if word not in dict(buttons)]
    free = choose_corners(task.corners + task.field_corners, num_fields, taken, source)
    for text, corner in zip(source.sample(unused, num_fields), free, strict=True):
        box = box_at(corner)
        draw.rectangle(box, fill="white", outline=(90, 90, 90))
        draw.text((box[0] + 4, (box[1] + box[3]) / 2), text, fill="black", font=font, anchor="lm")
        fields.append((text, box))
    return Screen(picture, buttons, fields)


def draw_wallpaper(side: int, source: random.Random) -> Image.Image:
    """A colour gradient: red grows to the right, blue grows downwards, from a tint drawn at random."""
    ramp = Image.linear_gradient("L").resize((side, side))
    low = [source.randint(90, 130) for _ in range(3)]
    down = ramp.point(lambda level: low[2] + level * 100 // 255)
    right = ramp.rotate(90).point(lambda level: low[0] + level * 100 // 255)
    return Image.merge("RGB", (right, Image.new("L", (side, side), low[1] + 40), down))


def choose_corners(corners: tuple[Corner, ...], count: int, taken: list[Corner], source: random.Random) -> list[Corner]:
    """`count` corners in random order whose cells overlap neither each other nor those that are taken."""
    chosen: list[Corner] = []
    for x, y in source.sample(corners, len(corners)):
        if len(chosen) < count and all(abs(x - a) >= CELL or abs(y - b) >= CELL // 2 for a, b in taken + chosen):
            chosen.append((x, y))
    return chosen


def box_at(corner: tuple[int, int]) -> Box:
    """The box of a button or field in the cell at `corner`; all have one size, so that no box gives its text away."""
    return corner[0] + 2, corner[1] + 2, corner[0] + 2 + BUTTON_WIDTH, corner[1] + 2 + BUTTON_HEIGHT


def corner_of(box: Box) -> Corner:
    return box[0] - 2, box[1] - 2


def box_text(box: Box) -> str:
    return "<box>{} {} {} {}</box>".format(*box)


def ask_where(word: str) -> str:
    return f'where is "{word}"?'


def ask_text(box: Box) -> str:
    return f"what is written at {box_text(box)}?"


def answer_where(word: str, box: Box) -> str:
    """The answer names the button before its box: the box then follows the word that is to be found on the screen, and
    with that a small model learns to look for the word (without it, it was still guessing after 950 updates)."""
    return word + box_text(box)


def questions(screen: Screen, task: Task, source: random.Random) -> list[tuple[str, str]]:
    """(question, answer) pairs in random order. Each button is either asked for by its name or has its text asked for,
    never both, so that no answer gives another one away. So is a text field where a button might stand; of a field
    anywhere else the text is asked for."""
    asked = []
    for text, box in screen.buttons + screen.fields:
        is_placed = corner_of(box) in task.corners
        where = is_placed and source.random() >= task.reading
        asked.append((ask_where(text), answer_where(text, box)) if where else (ask_text(box), text))
    return source.sample(asked, min(task.num_questions, len(asked)))


def make_rows(folder: str | Path, task: str, count: int, seed: int = 0, split: str = "train", name: str = "rows") -> Path:
    """Draw `count` screens of a task into `folder`/images, append their rows to `folder`/`name`.jsonl and return its path.

    The split "train" has several questions of a screen in one row; "held_out" has other screens, with the one question
    where a button is, as a user would ask it.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        for number in range(1, count + 1):
            source = random.Random(f"{task} {split} {seed} {number}")
            screen, asked = draw_screen(TASKS[task], source), []
            if split == "train":
                asked = questions(screen, TASKS[task], source)
            while not asked:
                allowed = TASKS[task].asked_corners or TASKS[task].corners
                found = [(word, box) for word, box in screen.buttons if corner_of(box) in allowed]
                asked = [(ask_where(word), answer_where(word, box)) for word, box in found[:1]]
                screen = screen if asked else draw_screen(TASKS[task], source)
            identity = f"{task}-{split}-{seed}-{number:05d}"
            image = f"images/{identity}.png"
            screen.picture.save(folder / image)
            file.write(json.dumps({"id": identity, "messages": messages_of(image, asked)}) + "\n")
    return path


def messages_of(image: str, asked: list[tuple[str, str]]) -> list[dict]:
    """Turns of one row; the picture stands before the first question."""
    messages = []
    for question, answer in asked:
        content = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image", "image": image})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def parse_box(text: str) -> Box | None:
    """The first box in a text, or None where there is none."""
    return next(iter(parse_boxes(text)), None)


def hits(response: str, label: str) -> bool:
    """Whether the centre of the box in `response` lies in the box in `label`; a response without a box misses."""
    answer, truth = parse_box(response), parse_box(label)
    if not (answer and truth):
        return False
    x, y = (answer[0] + answer[2]) / 2, (answer[1] + answer[3]) / 2
    return truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3]


# --- what the built-in base needs beside its weights ---

SPECIAL_TOKENS = ("<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> "
                  "<|video_pad|>").split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_base_files(folder: str | Path) -> None:
    """Write all of the built-in base but its weights, in the hub's layout: the tokenizer, and a config.json whose
    1.6 M parameters take 3.2 MB in bf16. One picture is 8 x 8 patches of 28 pixels, merged to 16 positions of text."""
    folder = Path(folder)
    make_tokenizer(folder)
    vocabulary = {token["content"]: token["id"] for token in
                  json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]}
    end_of_text, end_of_turn = vocabulary["<|endoftext|>"], vocabulary["<|im_end|>"]
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 384, "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_dropout": 0.0,
        "initializer_range": 0.06, "vocab_size": 416, "tie_word_embeddings": True, "use_cache": True,
        "max_position_embeddings": 32768, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 4,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "bos_token_id": end_of_text, "eos_token_id": end_of_turn, "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"], "vision_token_id": vocabulary["<|vision_pad|>"],
        "image_token_id": vocabulary["<|image_pad|>"], "video_token_id": vocabulary["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 3, "hidden_size": 96, "num_heads": 3, "intermediate_size": 256,
            "hidden_act": "silu", "in_chans": 3, "out_hidden_size": 128, "patch_size": 28, "spatial_patch_size": 28,
            "temporal_patch_size": 1, "spatial_merge_size": 2, "window_size": 224, "fullatt_block_indexes": [0, 1, 2],
            "tokens_per_second": 2}}
    pictures = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 28, "temporal_patch_size": 1,
                "merge_size": 2, "min_pixels": CELL * CELL, "max_pixels": 4 * SIDE * SIDE,
                "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    generation = {"bos_token_id": end_of_text, "eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text,
                  "do_sample": False}
    for name, content in (("config", config), ("preprocessor_config", pictures), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_tokenizer(folder: str | Path, num_entries: int = 448) -> None:
    """Train a byte-level BPE tokenizer on the task's own sentences; write tokenizer.json and tokenizer_config.json. Every
    digit and every word of the task but 2026 is one token; any other text still has a spelling in bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words_and_digits = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words_and_digits, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=num_entries - len(SPECIAL_TOKENS) - 2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(tokenizer_text(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<box>", "</box>")])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "additional_special_tokens": SPECIAL_TOKENS[1:], "clean_up_tokenization_spaces": False,
                "model_max_length": 32768, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def tokenizer_text() -> list[str]:
    """Sentences from which the tokenizer learns its merges: roles, questions, and every word several times."""
    lines = ["user\nassistant\nsystem\n", ask_text((0, 0, 0, 0))] * 50
    for word in BUTTON_WORDS + FIELD_WORDS:
        lines += [ask_where(word), word] * 20
    return lines


# ---- the demo as a run ----------------------------------------------------------------------------------------------------

NUM_ROWS = 600  # of the new task
SETTINGS = {  # of `python train.py` without arguments; how it learns, but not for how long, is left to Config's defaults
    "base_model": str(Path(__file__).parent / "demo_base"), "output_dir": "checkpoints/demo", "use_lora": True,
    "max_steps": 120, "gradient_checkpointing": False, "eval_every": "no", "save_every": "no", "predict_with_generate": True,
    "eval_task": "demo", "max_new_tokens": 24}


def unused(folder: str) -> str:
    """The folder, or folder-2, folder-3, .. where it is taken: the demo can be run as often as one likes."""
    names = chain([folder], (f"{folder}-{number}" for number in count(2)))
    return next(name for name in names if not Path(name).exists())


def make_demo(folder: str | Path, num_rows: int, seed: int) -> tuple[Path, Path, Path]:
    """Draw the demo's rows into a folder that is emptied first: `num_rows` of the new task to train on, and 200 unseen screens
    to answer before and after of the new task (demo.jsonl) and of the old one (old.jsonl)."""
    shutil.rmtree(folder, ignore_errors=True)
    return (make_rows(folder, "new", num_rows, seed, name="train"), make_rows(folder, "new", 200, seed, "held_out", "demo"),
            make_rows(folder, "base", 200, seed, "held_out", "old"))


def prepare(config) -> None:
    """Write the rows of the demo below its output folder and name them in the settings."""
    train, *held_out = make_demo(Path(config.output_dir) / "rows", NUM_ROWS, config.seed)
    config.data_path, config.eval_path = str(train), ",".join(map(str, held_out))
