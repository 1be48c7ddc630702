"""MiniCPM-Llama3-V 2.5 and checkpoints of its layout: transformers' Llama 3 and Idefics2 tower, our resampler and slices.

A picture is seen as a small overview and, if it is large, as up to 9 slices of about 448 x 448 pixels. The tower takes a
slice as ONE ROW of patches with positions in one dimension, the rows of a call padded to the longest, and the padding is
attended to (the original's mask misses it): features depend on the longest slice of their call. Here a call is one
example, so that no example depends on its neighbours. The resampler makes query_num features of each slice (96, whatever
its size); they replace the <unk> between <image> and </image>. A full screenshot takes 885 positions.
"""

import math
import re
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Idefics2VisionConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings, Idefics2VisionTransformer

from data.batches import Packed
from data.boxes import Box, Convention
from data.errors import UserError
from data.images import cells, image_size, open_resized
from data.labels import Example
from model.families.qwen2 import joined
from model.family import Family, Model
from model.files import read_json

BEGIN, END, STOP = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
HEADER, HEADER_END = "<|start_header_id|>", "<|end_header_id|>\n\n"
IMAGE, IMAGE_END, SLOT, SLICES, SLICES_END = "<image>", "</image>", "<unk>", "<slice>", "</slice>"
GROUNDING = tuple(f"<{end}{name}>" for name in ("ref", "box", "quad", "point") for end in ("", "/"))  # part of honest text
MAX_SLICE_PATCHES = 8192  # about 1,024 are usual; a picture one pixel wide has many more
HEAD_SIZE = 128  # of the resampler's attention, whatever the model's width


# ---- network --------------------------------------------------------------------------------------------------------


class MiniCPMV(nn.Module):
    """The three parts under the original's names; the family puts the features between the embeddings."""

    def __init__(self, config: LlamaConfig, vision: Idefics2VisionConfig, num_queries: int):
        super().__init__()
        self.config = config
        self.llm = LlamaForCausalLM(config)
        self.vpm = StripTower(vision)
        self.resampler = Resampler(num_queries, vision.hidden_size, config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_attn_implementation(self, name: str) -> None:
        """Of the language model: the tower's slices are a padded batch without a mask and stay on SDPA."""
        self.llm.set_attn_implementation(name)


class StripTower(Idefics2VisionTransformer):
    """Every patch of every slice: (N, P, C * patch^2), padded with zeros -> (N, P, D)."""

    def __init__(self, config: Idefics2VisionConfig):
        super().__init__(config)
        self.embeddings.__class__ = StripEmbeddings

    def forward(self, strips: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(strips.to(self.dtype))
        return self.post_layernorm(self.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state)


class StripEmbeddings(Idefics2VisionEmbeddings):
    """Patch and position embedding of strips. The stride of the convolution is its size, so it is one matrix product."""

    def forward(self, strips: torch.Tensor) -> torch.Tensor:
        patches = F.linear(strips, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)  # (N, P, D)
        buckets = position_buckets(strips.shape[1], self.num_patches_per_side)
        return patches + self.position_embedding(buckets.to(strips.device))


@lru_cache(maxsize=256)
def position_buckets(num_patches: int, num_buckets: int) -> torch.Tensor:
    """(P,) the bucket of each place of a strip, as transformers 4.40 has it; 5.x puts some patches one further.

    The fractions are torch.arange's on the processor, with a step rounded to fp32: at a bucket's edge rounding decides.
    """
    with torch.device("cpu"):
        boundaries = torch.arange(1 / num_buckets, 1.0, 1 / num_buckets)
        fractions = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(num_patches))
        return torch.bucketize(fractions, boundaries, right=True)


class Resampler(nn.Module):
    """num_queries learned queries look at the patches of a slice: (N, P, Dv) -> (N, num_queries, D)."""

    def __init__(self, num_queries: int, vision_size: int, hidden_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_queries, hidden_size) * 0.02)
        same = vision_size == hidden_size
        self.kv_proj = nn.Identity() if same else nn.Linear(vision_size, hidden_size, bias=False)
        self.attn = CrossAttention(hidden_size)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(hidden_size, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.randn(hidden_size, hidden_size) * hidden_size**-0.5)

    def forward(self, patches: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """sizes are (rows, columns) of patches; what lies behind rows * columns is padding, which is masked here.
        Keys carry the place in the slice, values and queries do not."""
        values = self.ln_kv(self.kv_proj(patches))  # (N, P, D)
        waves = sine_waves(max(map(max, sizes)), values.shape[-1]).to(values)
        places = pad_sequence([place_codes(*size, waves) for size in sizes], batch_first=True)
        places = F.pad(places, (0, 0, 0, patches.shape[1] - places.shape[1]))  # (N, P, D)
        lengths = torch.tensor([rows * columns for rows, columns in sizes], device=values.device)
        seen = torch.arange(patches.shape[1], device=values.device) < lengths[:, None]  # (N, P)
        return self.ln_post(self.attn(self.ln_q(self.query), values + places, values, seen)) @ self.proj


class CrossAttention(nn.Module):
    """Multi-head attention of queries (Q, D) on keys and values (N, P, D) -> (N, Q, D).

    out_proj is a plain weight, no nn.Linear: the original multiplies with it behind any adapter's back, so LoRA on it
    would train here and be lost there.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.num_heads = hidden_size // HEAD_SIZE
        self.in_proj_weight = nn.Parameter(torch.randn(3 * hidden_size, hidden_size) * hidden_size**-0.5)  # q, k, v
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj_weight = nn.Parameter(torch.randn(hidden_size, hidden_size) * hidden_size**-0.5)
        self.out_proj_bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        projections = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)  # (N, H, Q or P, K)
            for x, (weight, bias) in zip((queries, keys, values), projections, strict=True)
        )
        out = F.scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v, attn_mask=seen[:, None, None])
        return F.linear(out.transpose(1, 2).flatten(2), self.out_proj_weight, self.out_proj_bias)


def place_codes(rows: int, columns: int, waves: torch.Tensor) -> torch.Tensor:
    """(rows * columns, D): the first half of D says a patch's column, the second its row."""
    across = waves[:columns].expand(rows, -1, -1)
    down = waves[:rows, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=2).flatten(0, 1)


@lru_cache(maxsize=64)
def sine_waves(num_places: int, width: int) -> torch.Tensor:
    """(num_places, D / 2) fp32: the sines and then the cosines of place * 10000^-(k / (D / 4)), k below D / 4. As long as
    a thin picture needs."""
    quarter = width // 4
    with torch.device("cpu"):
        angles = torch.arange(num_places)[:, None] * (1 / 10000 ** (torch.arange(quarter) / quarter))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


# ---- pictures -------------------------------------------------------------------------------------------------------


def best_size(width: float, height: float, scale: int, patch: int, enlarge: bool) -> tuple[int, int]:
    """(width, height) of about scale^2 pixels at nearly the same aspect ratio, in whole patches; a smaller picture keeps
    its size unless enlarge. The height is cut to an integer before the width is made from it; halves round to even."""
    if width * height > scale * scale or enlarge:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)
    return max(round(width / patch) * patch, patch), max(round(height / patch) * patch, patch)


def choose_grid(width: int, height: int, scale: int, most: int) -> tuple[int, int] | None:
    """(columns, rows) of the slices, None for a picture that is seen whole.

    As many slices as the area holds, one less or one more, whichever grid comes nearest to the picture's aspect ratio
    (the first of equals, fewer slices and then fewer columns first).
    """
    ideal = min(math.ceil(width * height / (scale * scale)), most)
    if ideal <= 1:
        return None
    counts = [count for count in (ideal - 1, ideal, ideal + 1) if 1 < count <= most]
    grids = [(columns, count // columns) for count in counts for columns in range(1, count + 1) if count % columns == 0]
    wanted = math.log(width / height)
    return min(grids, key=lambda grid: abs(wanted - math.log(grid[0] / grid[1])))


@lru_cache(maxsize=1024)
def layout(columns: int, rows: int, num_queries: int) -> tuple[str, ...]:
    """The tokens that stand for a picture: the overview's, then a line for each row of slices; (0, 0) is no slices."""
    one = (IMAGE, *[SLOT] * num_queries, IMAGE_END)
    line = one * columns
    return (*one, SLICES, *line, *("\n", *line) * (rows - 1), SLICES_END) if rows else one


# ---- family ---------------------------------------------------------------------------------------------------------


class MiniCPMLlama3V(Family):
    """MiniCPM-Llama3-V 2.5, and fine-tunes of it."""

    name = "minicpm_v"
    model_types = ("minicpmv",)
    prefixes = {"resampler.attn.out_proj.": "resampler.attn.out_proj_"}
    parts = {"language": "llm", "projector": "resampler", "vision": "vpm"}
    box_convention = Convention("thousandths", "<box>{} {} {} {}</box>", "<point>{} {}</point>")
    blocks = ("llm.model.layers", "vpm.encoder.layers")
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tiny_tokens = (BEGIN, END, SLOT, HEADER, HEADER_END.strip(), STOP, IMAGE, IMAGE_END, *GROUNDING, SLICES, SLICES_END)
    tiny_template = (
        "{{ bos_token }}{% for m in messages %}" + HEADER + "{{ m.role }}" + HEADER_END + "{{ m.content | trim }}" + STOP
        + "{% endfor %}{% if add_generation_prompt %}" + HEADER + "assistant" + HEADER_END + "{% endif %}"
    )

    @property
    def num_queries(self) -> int:
        return self.config.get("query_num", 64)

    @classmethod
    def tiny_files(cls) -> dict[str, dict]:
        pictures = {"max_slice_nums": 9, "scale_resolution": 56, "patch_size": 14}
        config = {
            "model_type": "minicpmv", "version": "2.5", "architectures": ["MiniCPMV"], "bos_token_id": BEGIN,
            "eos_token_id": END, "hidden_act": "silu", "hidden_size": 128, "initializer_range": 0.02,
            "intermediate_size": 160, "max_position_embeddings": 8192, "num_attention_heads": 4, "num_hidden_layers": 2,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
            "torch_dtype": "float32", "batch_vision_input": True, "drop_vision_last_layer": False, "query_num": 4,
            "patch_size": 14, "slice_mode": True, "slice_config": pictures | {"model_type": "minicpmv"},
            "vision_config": {
                "hidden_size": 32, "image_size": 112, "intermediate_size": 44, "model_type": "idefics2",
                "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 14,
            },
        }
        processor = pictures | {"norm_mean": [0.5, 0.5, 0.5], "norm_std": [0.5, 0.5, 0.5], "image_feature_size": 4}
        return {"config.json": config, "preprocessor_config.json": processor}

    def build(self) -> nn.Module:
        known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
        config = LlamaConfig(**{key: value for key, value in self.config.items() if key in known - {"model_type"}})
        vision = Idefics2VisionConfig(**{k: v for k, v in self.config["vision_config"].items() if k != "model_type"})
        vision.num_hidden_layers -= self.config.get("drop_vision_last_layer", True)
        config.vision_config = vision  # the memory plan reads it there
        return MiniCPMV(config, vision, self.num_queries)

    def decoder(self, net: nn.Module) -> nn.Module:
        return net.llm.model

    def features(self, net: nn.Module, pictures: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [self.slice_features(net, pixels).flatten(0, 1) for pixels in pictures]  # (N * query_num, D) each

    def picture_places(self, packed: Packed) -> torch.Tensor:
        places = super().picture_places(packed)
        return places[packed.input_ids[places] == self.pieces.ids(SLOT)[0]]

    def slice_features(self, net: nn.Module, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the language model sees of an example's N slices: (N, query_num, D). All go through the tower in one
        call, or each in its own where config.json says batch_vision_input false."""
        sizes = [tuple(size) for size in pixels["sizes"].tolist()]
        slices = pixels["pixel_values"].split([rows * columns for rows, columns in sizes])
        calls = [slice(None)] if self.config.get("batch_vision_input", True) else [slice(i, i + 1) for i in range(len(sizes))]
        found = []
        for call in calls:
            strips = pad_sequence(slices[call], batch_first=True)  # (N, P, C * patch^2); 0 is mid grey
            if "strip_length" in pixels:
                strips = F.pad(strips, (0, 0, 0, int(pixels["strip_length"]) - strips.shape[1]))
            found.append(net.resampler(net.vpm(strips), sizes[call]))
        return torch.cat(found)

    def original_logits(self, model: Model, examples: list[Example]) -> list[torch.Tensor]:
        """The original sends the slices of the whole batch through the tower at once, so that all are padded to the
        batch's longest. The language model's rows are independent there too."""
        lengths = [e.pixels["sizes"].prod(1).max() for e in examples if e.pixels]
        if lengths and self.config.get("batch_vision_input", True):
            longest = {"strip_length": torch.stack(lengths).max()}
            examples = [replace(e, pixels=e.pixels | longest) if e.pixels else e for e in examples]
        return model.logits(examples)

    # ---- text -------------------------------------------------------------------------------------------------------

    def render(self, messages: list[dict], tools: list | None) -> list[tuple[list[int], bool]]:
        """The makers' training template (the folder's own opens an answer behind every conversation, and they do not train
        with it). Pictures in front of all text stand on lines of their own, others where the row has them."""
        if tools or any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
            raise UserError("MiniCPM-V 2.5 has no template for tools; write them into the text of the turns")
        pieces = [([self.pieces.special[BEGIN]], False)]
        for message in messages:
            content, mark = self.pieces.mark(joined(message.get("content") or ""))
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = "".join(IMAGE if part["type"] == "image" else part["text"] for part in parts)
            for token in GROUNDING:
                text = text.replace(token[0] + mark + token[1:], token)
            front = re.match(f"(?:{IMAGE})*", text).end()
            if front:
                text = text[:front].replace(IMAGE, IMAGE + "\n") + text[front:].removeprefix("\n")
            prompt, text = f"{HEADER}{message['role']}{HEADER_END}", text.strip() + STOP
            if message["role"] == "assistant":
                pieces += [(self.pieces.ids(prompt), False), (self.pieces.ids(text, mark), message.get("train", True))]
            else:
                pieces.append((self.pieces.ids(prompt + text, mark), False))
        return pieces

    def _encode(self, messages: list[dict], tools: list | None) -> Example:
        """With --labels official the token behind an answer's stop is to be the stop once more, if a turn follows."""
        example = super()._encode(messages, tools)
        if self.options.labels == "official":
            stop = self.pieces.special[STOP]
            is_behind = example.labels[:-1] == stop  # (T - 1,)
            example.labels[1:][is_behind] = stop
        return example

    @property
    def stop_ids(self) -> list[int]:
        return [self.pieces.special[STOP], self.pieces.special[END]]

    @property
    def image_token_id(self) -> int:
        return self.pieces.special[IMAGE]

    # ---- pictures ---------------------------------------------------------------------------------------------------

    @cached_property
    def rule(self) -> dict:
        """How pictures are sliced and normalised; slicing goes by config.json's slice_config where it says anything."""
        raw = read_json(self.folder / "preprocessor_config.json", ("norm_mean", "norm_std"))
        rule = {"scale_resolution": 448, "max_slice_nums": 1} | raw | (self.config.get("slice_config") or {})
        rule["patch_size"] = self.config["vision_config"]["patch_size"]
        limit, area = self.options.max_pixels, rule["scale_resolution"] ** 2
        if limit is not None and limit < area:
            raise UserError(f"--max_pixels {limit}: this model sees every picture in about {area} pixels; give {area} or more")
        if limit is not None:
            rule["max_slice_nums"] = min(limit // area, rule["max_slice_nums"])
        return rule

    def plan(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """((columns, rows) of the slices, (width, height) of the overview, of a slice); (0, 0) for no slices."""
        rule = self.rule
        scale, patch = rule["scale_resolution"], rule["patch_size"]
        grid = choose_grid(width, height, scale, rule["max_slice_nums"])
        overview = best_size(width, height, scale, patch, enlarge=grid is None)
        cell = (0, 0)
        if grid is not None:  # the picture's sides are first rounded to multiples of the grid's
            sides = zip((width, height), grid, strict=True)
            cell = best_size(*(max(round(side / n), 1) for side, n in sides), scale, patch, enlarge=True)
        if max(math.prod(overview), math.prod(cell)) > MAX_SLICE_PATCHES * patch * patch:
            raise UserError(f"a picture of {width} x {height} pixels is too thin for this model; cut it into several")
        return grid or (0, 0), overview, cell

    def picture(self, image: Any) -> tuple[dict[str, torch.Tensor], int]:
        grid, overview, (width, height) = self.plan(*image_size(image))
        sizes = [overview] if grid == (0, 0) else [overview, (grid[0] * width, grid[1] * height)]
        slices = open_resized(image, sizes, Image.Resampling.BICUBIC, over_white=False, cache=self.options.image_cache)
        if grid != (0, 0):
            whole = slices.pop()
            corners = [(x * width, y * height) for y in range(grid[1]) for x in range(grid[0])]
            slices += [whole.crop((x, y, x + width, y + height)) for x, y in corners]
        patch = self.rule["patch_size"]
        tensors = {
            "pixel_values": torch.cat([self.patchify(part) for part in slices]),  # (P, C * patch^2) of all slices
            "sizes": torch.tensor([(part.height // patch, part.width // patch) for part in slices]),  # (N, 2)
            "grids": torch.tensor([grid]),  # (1, 2) columns, rows
        }
        return tensors, len(layout(*grid, self.num_queries))

    def patchify(self, image: Image.Image) -> torch.Tensor:
        """(P, C * patch^2) fp32: the patches of an RGB picture of whole patches, row by row, / 255, minus mean, / std."""
        rule, patch = self.rule, self.rule["patch_size"]
        pixels = torch.from_numpy(numpy.array(image)).unflatten(1, (-1, patch)).unflatten(0, (-1, patch))
        pixels = pixels.permute(0, 2, 4, 1, 3).flatten(0, 1) / 255  # (P, C, patch, patch)
        mean, std = (torch.tensor(rule[name])[:, None, None] for name in ("norm_mean", "norm_std"))
        return ((pixels - mean) / std).flatten(1)

    def regions(self, width: int, height: int) -> list[Box | None]:
        grid = self.plan(width, height)[0]
        slices = [(0, 0, width, height)] + (cells((width, height), *grid) if grid[0] else [])
        slots = (part for part in slices for _ in range(self.num_queries))
        return [next(slots) if token == SLOT else None for token in layout(*grid, self.num_queries)]

    def picture_positions(self, width: int, height: int) -> int:
        return len(layout(*self.plan(width, height)[0], self.num_queries))

    def count_positions(self, pixels: dict[str, torch.Tensor]) -> list[int]:
        return [len(layout(*grid, self.num_queries)) for grid in pixels["grids"].tolist()] if pixels else []

    def picture_ids(self, pixels: dict[str, torch.Tensor]) -> list[list[int]]:
        id_of = {token: self.pieces.ids(token)[0] for token in (IMAGE, IMAGE_END, SLOT, SLICES, SLICES_END, "\n")}
        grids = pixels["grids"].tolist() if pixels else []
        return [[id_of[token] for token in layout(*grid, self.num_queries)] for grid in grids]
