"""The work that every variant does: a random model in the hub's layout, and rows of random ids with labels.

Random because speed and memory depend on shapes alone, and because the losses must agree whatever the rows say. Ids are
drawn from a skewed distribution, so that the loss falls and a wrong update shows in the next step's loss. Rows are made
before the clock starts: reading, tokenizing and resizing are left out of the comparison for everybody alike. Every
variant takes the same rows in the same order, ROWS_PER_STEP a step.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.labels import Example
    from model.family import Family

ROWS_PER_STEP, MICRO_BATCHES = 8, 2
LORA_RANK, LORA_ALPHA = 16, 32
LEARNING_RATE = 1e-3
NUM_WORDLIKE = 300  # ids below are left to the tokenizer's bytes and special tokens


@dataclass(frozen=True)
class Size:
    """A model and the rows it gets; the numbers of the text model's config.json, and of the pictures' tower."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    median_length: int
    longest: int
    vision_hidden: int
    vision_layers: int
    longest_side: int  # pixels


FULL = Size(32000, 384, 1152, 8, 6, 2, median_length=200, longest=1024, vision_hidden=256, vision_layers=8, longest_side=784)
QUICK = Size(512, 64, 128, 2, 4, 2, median_length=32, longest=96, vision_hidden=32, vision_layers=2, longest_side=112)
QWEN_05B = Size(151936, 896, 4864, 24, 14, 2, median_length=400, longest=2048, vision_hidden=0, vision_layers=0, longest_side=0)
SIZES = {"full": FULL, "quick": QUICK, "qwen2.5-0.5b": QWEN_05B}


def write_model(folder: Path, size: Size, pictures: bool) -> None:
    """Write a random model (bf16 values, so that every way of loading it starts from the same weights)."""
    import torch

    from model.families.qwen2 import Qwen2
    from model.families.qwen2_5_vl import Qwen2_5_VL
    from model.family import find_family
    from model.load import write_weights
    from model.tiny import set_vocabulary, write_byte_tokenizer, write_json

    family_class = Qwen2_5_VL if pictures else Qwen2
    folder.mkdir(parents=True)
    write_byte_tokenizer(family_class, folder)
    files = family_class.tiny_files()
    config = files["config.json"]
    config |= {
        "hidden_size": size.hidden, "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.key_value_heads,
    }
    if pictures:
        eighth = size.hidden // size.heads // 16  # of the rotary pairs: two for time, three each for height and width
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [2 * eighth, 3 * eighth, 3 * eighth]}
        config["vision_config"] |= {
            "hidden_size": size.vision_hidden, "intermediate_size": 2 * size.vision_hidden, "depth": size.vision_layers,
            "num_heads": size.vision_hidden // 32, "out_hidden_size": size.hidden,
            "fullatt_block_indexes": list(range(size.vision_layers // 2 - 1, size.vision_layers, size.vision_layers // 2)),
        }
    for name, content in files.items():
        write_json(folder / name, content)
    set_vocabulary(find_family(folder), size.vocabulary)
    torch.manual_seed(0)
    family = find_family(folder)
    write_weights(family.build().to(torch.bfloat16), family, folder)


def make_rows(family: "Family", size: Size, num_rows: int, pictures: bool, seed: int = 0) -> "list[Example]":
    """Ragged chats of log-normal length, about half of their tokens answers; with pictures: one or two in each."""
    chance = random.Random(seed)
    return [(picture_row if pictures else chat_row)(family, size, chance) for _ in range(num_rows)]


def chat_row(family: "Family", size: Size, chance: random.Random) -> "Example":
    """A chat of one to three turns, question and answer alike in length on average."""
    from data.labels import mask

    length = min(size.longest, max(16, round(size.median_length * math.exp(chance.gauss(0, 0.85)))))
    num_pieces = 2 * chance.choice([1, 2, 3])
    cuts = sorted(chance.sample(range(1, length), num_pieces - 1))
    lengths = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    return family.example(*mask((words(size, n, chance), i % 2 == 1) for i, n in enumerate(lengths)))


def picture_row(family: "Family", size: Size, chance: random.Random) -> "Example":
    """One or two pictures of any shape sides log-uniform, a question and an answer about them."""
    from data.labels import mask
    from model.family import expand_pictures

    def side() -> int:
        return round(size.longest_side * 7 ** -chance.random())

    pictures = [family.picture(noise(side(), side(), chance)) for _ in range(chance.choice([1, 1, 2]))]
    config = family.config
    mark = [config["vision_start_token_id"], config["image_token_id"], config["vision_end_token_id"]]
    question, answer = (chance.randint(10, size.median_length // 2) for _ in range(2))
    pieces = [(mark * len(pictures) + words(size, question, chance), False), (words(size, answer, chance), True)]
    pixels = family.join_pixels([tensors for tensors, _ in pictures])
    return family.example(*mask(expand_pictures(pieces, family.image_token_id, family.picture_ids(pixels))), pixels)


def words(size: Size, number: int, chance: random.Random) -> list[int]:
    """Ids of which the low ones are frequent, as in text."""
    return [NUM_WORDLIKE + int((size.vocabulary - NUM_WORDLIKE) * chance.random() ** 4) for _ in range(number)]


def noise(width: int, height: int, chance: random.Random):
    """A picture of random dots."""
    from PIL import Image

    return Image.frombytes("RGB", (width, height), chance.randbytes(3 * width * height))
