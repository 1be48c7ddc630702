"""Phi-3-vision-128k-instruct and its siblings: transformers' Phi3 and CLIP layers; pictures, turns and rotary by us.

A picture is scaled, small ones up, to a canvas of at most num_crops tiles of 336 x 336 pixels. The tower sees each tile
and the whole canvas in one tile; 2 x 2 patches become one position, a learned vector closes every row of the stitched
map and of the small one, another stands between the two. So a picture costs 1,321 to 2,653 positions whatever its size.
LongRoPE has two sets of factors, for examples of up to original_max_position_embeddings positions and for longer ones.
The original takes the set of its batch's longest row for all; here each example of a packed row has its own.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate, linear
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, Phi3Config, Phi3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPVisionEmbeddings
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from data.batches import Packed, pack_row
from data.boxes import Box
from data.errors import UserError
from data.images import cells, image_size, open_resized
from data.labels import Example, Piece, cut_turns
from model.families.qwen2 import ChatML, without_pictures
from model.family import Family, Model
from model.files import read_json, read_tokenizer

BEGIN, HEADER, STOP, END = "<s>", "<|assistant|>\n", "<|end|>", "<|endoftext|>"
# the tower is CLIP ViT-L/14 at 336 pixels; config.json does not say so, the original's code does
CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}
# what config.json's embd_layer says of every known checkpoint, and all that is written here
EMBEDDING = {
    "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp", "use_hd_transform": True,
    "with_learnable_separator": True,
}


# ---- network --------------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """CLIP's vision transformer up to the layer that is looked at: crops (N, 3, S, S) -> patch features (N, P, C).

    The layers behind it and the last norm lie in the checkpoint and have no effect. No PreTrainedModel: its attention
    stays SDPA over the batch of crops when the language model's is switched.
    """

    def __init__(self, config: CLIPVisionConfig, layer: int):
        """layer counts the hidden states as transformers does: 0 is the embeddings, -1 behind the last layer."""
        super().__init__()
        config._attn_implementation = "sdpa"
        self.num_layers = layer if layer >= 0 else config.num_hidden_layers + 1 + layer
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the checkpoint's spelling
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))  # (N, 1 + P, C)
        for layer in self.encoder.layers[: self.num_layers]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]  # without the class token


class PictureEmbedding(nn.Module):
    """Pictures -> their positions' embeddings."""

    def __init__(self, config: CLIPVisionConfig, layer: int, hidden_size: int):
        super().__init__()
        width = 4 * config.hidden_size
        self.img_processor = nn.ModuleDict({"vision_model": Tower(config, layer)})
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.img_projection = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """(positions of all pictures, D). pixel_values (N, 3, S, S) holds each picture's whole view, then its tiles row
        by row; grids are (rows, columns) of tiles."""
        features = self.img_processor["vision_model"](pixel_values)  # (N, P, C)
        side = math.isqrt(features.shape[1]) // 2
        quads = features.unflatten(1, (side, 2, side, 2)).transpose(2, 3).flatten(3)  # (N, side, side, 4 C)
        maps = []
        for (rows, columns), crops in zip(grids, quads.split([1 + rows * columns for rows, columns in grids]), strict=True):
            maps += [self.with_row_ends(crops[1:], rows, columns), self.glb_GN[0], self.with_row_ends(crops[:1], 1, 1)]
        return self.img_projection(torch.cat(maps))

    def with_row_ends(self, crops: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Tiles (rows * columns, side, side, 4 C) stitched to one map, sub_GN behind each of its rows: (positions, 4 C)."""
        stitched = crops.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return torch.cat([stitched, self.sub_GN[0].expand(len(stitched), 1, -1)], dim=1).flatten(0, 1)


class LongRotary(Phi3RotaryEmbedding):
    """LongRoPE (Ding et al. 2024), its factors chosen by each example's own length.

    An example is a run of growing position ids. In a padded batch whose padding counts on, as the original's does, every
    row is so long as the longest, and the choice is the original's.
    """

    def __init__(self, config: Phi3Config):
        super().__init__(config)
        self.limit = config.original_max_position_embeddings
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=self.limit + 1)
        self.register_buffer("long_inv_freq", frequencies, persistent=False)  # (K / 2,); inv_freq is the short one

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (B, T, K), for position_ids (B, T)."""
        run = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) <= 0).cumsum(1)  # (B, T) number in the row
        last = torch.zeros_like(position_ids).scatter_reduce(1, run, position_ids, "amax").gather(1, run)
        frequencies = torch.where((last >= self.limit)[..., None], self.long_inv_freq, self.inv_freq)
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)  # (B, T, K)
        return tuple((self.attention_scaling * table).to(x.dtype) for table in (angles.cos(), angles.sin()))


# ---- family ---------------------------------------------------------------------------------------------------------


class Phi3Vision(Family):
    """Phi-3-vision-128k-instruct, Phi-3.5-vision-instruct, and fine-tunes of them."""

    name = "phi3_vision"
    model_types = ("phi3_v",)
    parts = {
        "language": "model", "projector": "model.vision_embed_tokens", "vision": "model.vision_embed_tokens.img_processor"
    }
    blocks = ("model.layers", "model.vision_embed_tokens.img_processor.vision_model.encoder.layers")
    lora_targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    image_token_id = -1  # the original's; pictures are no words of the vocabulary

    tiny_tokens = ("<unk>", BEGIN, "</s>", END, "<|assistant|>", "<|system|>", STOP, "<|user|>")
    tiny_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )

    @classmethod
    def tiny_files(cls) -> dict[str, dict]:
        config = {
            "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "attention_dropout": 0.0,
            "bos_token_id": BEGIN, "eos_token_id": "</s>", "pad_token_id": END, "hidden_act": "silu", "hidden_size": 64,
            "initializer_range": 0.02, "intermediate_size": 112, "max_position_embeddings": 131072,
            "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4,
            "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "rope_scaling": {"type": "su", "short_factor": [1.05, 2.0] * 4, "long_factor": [1.03, 64.8] * 4},
            "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "float32", "embd_layer": EMBEDDING,
            "img_processor": {"image_dim_out": 32, "name": "clip_vision_model", "num_img_tokens": 4},
        }
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
        config["img_processor"]["clip_config_override"] = tower | {"image_size": 56}
        processor = {
            "num_crops": 4, "num_img_tokens": 4, "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        return {"config.json": config, "preprocessor_config.json": processor}

    # ---- network ----------------------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        odd = {name: value for name, value in self.config["embd_layer"].items() if EMBEDDING.get(name, value) != value}
        if odd:
            raise UserError(f"{self.folder}/config.json: embd_layer has {odd}; only {EMBEDDING} is written here")
        net = Phi3ForCausalLM(self.language_config())
        net.model.rotary_emb = LongRotary(net.config)
        layer = self.config["img_processor"].get("layer_idx", -2)
        tower = CLIPVisionConfig(**self.tower_settings, hidden_act="quick_gelu", layer_norm_eps=1e-5)
        net.model.vision_embed_tokens = PictureEmbedding(tower, layer, net.config.hidden_size)
        return net

    def language_config(self) -> Phi3Config:
        """config.json's language part as transformers takes it ("su" is the old name of LongRoPE)."""
        config = self.config
        elsewhere = ("auto_map", "model_type", "embd_layer", "img_processor", "rope_scaling", "rope_theta", "sliding_window")
        kept = {name: value for name, value in config.items() if name not in elsewhere and not name.startswith("_")}
        longest, limit = config["max_position_embeddings"], config["original_max_position_embeddings"]
        rope = {name: config["rope_scaling"][name] for name in ("short_factor", "long_factor")} | {
            "rope_type": "longrope", "rope_theta": config["rope_theta"], "factor": longest / limit,
            "original_max_position_embeddings": limit,
        }
        window = config.get("sliding_window")
        if window is not None and window >= longest:
            window = None  # it hides nothing, but keeps the fast kernels away
        return Phi3Config(**kept, rope_parameters=rope, sliding_window=window)

    @property
    def tower_settings(self) -> dict:
        """Sizes of the vision tower; the override is that of tiny models."""
        return CLIP_L | self.config["img_processor"].get("clip_config_override", {})

    def decoder(self, net: nn.Module) -> nn.Module:
        return net.model

    def embed(self, net: nn.Module, packed: Packed) -> torch.Tensor:
        return super().embed(net, replace(packed, input_ids=packed.input_ids.clamp(min=0)))  # pictures' ids are negative

    def features(self, net: nn.Module, pictures: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        tower = net.model.vision_embed_tokens  # called once an example, which so does not depend on its neighbours
        return [tower(p["pixel_values"], self.grids(p)) for p in pictures]

    def original_logits(self, model: Model, examples: list[Example]) -> list[torch.Tensor]:
        """The official collator's batch: padded rows count on, so the longest chooses the rotary factors of all, and an
        <|endoftext|> between turns is hidden like the padding, because it is the padding's id."""
        decoder, padding = model.net.model, model.net.config.pad_token_id
        packed = pack_row(examples).to(model.device)
        hidden = pad_sequence(self.embed(model.net, packed).split(packed.lengths), batch_first=True)  # (B, T, D)
        ids = pad_sequence(packed.input_ids.split(packed.lengths), batch_first=True, padding_value=padding)  # (B, T)
        mask = (ids != padding).long()
        mask[range(len(mask)), [n - 1 for n in packed.lengths]] = 1  # what ends a row is hidden from nothing but itself
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        attention = decoder.config._attn_implementation
        decoder.set_attn_implementation("sdpa")
        try:
            hidden = decoder(inputs_embeds=hidden, attention_mask=mask, position_ids=places, use_cache=False)[0]
        finally:
            decoder.set_attn_implementation(attention)
        return [linear(row[:n], model.head_weight).float() for row, n in zip(hidden, packed.lengths, strict=True)]

    # ---- text -------------------------------------------------------------------------------------------------------

    chat_template, template_file = ChatML.chat_template, ChatML.template_file  # the folder's, wherever it lies

    def load_tokenizer(self):
        """</s> is the one added token without the special flag; with it, a text that spells </s> stays text."""
        tokenizer = read_tokenizer(self.folder)
        backend = tokenizer.backend_tokenizer
        backend.add_special_tokens(list(backend.get_added_tokens_decoder().values()))
        return tokenizer

    @cached_property
    def swallowing(self) -> re.Pattern:
        """Tokens that take the white space behind them along, by the tokenizer's own flags, and that white space."""
        added = self.tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        return re.compile(rf"({'|'.join(re.escape(t.content) for t in added if t.rstrip) or '(?!)'})\s+")

    def render(self, messages: list[dict], tools: list | None) -> list[tuple[list[int], bool]]:
        """(ids, trained) pieces by the folder's template; an answer's loss reaches <|end|>.

        The official recipe sets every pair of prompt and answer apart: <s> in front, <|endoftext|> behind, all of
        "<|end|>\\n<|endoftext|>" with a loss. Raises UserError for tools and roles that the template does not know.
        """
        if tools or any(m.get("tool_calls") for m in messages):
            raise UserError(f"this model ({self.name}) has no form for tools or tool calls; write them as text, or drop them")
        if strange := [m["role"] for m in messages if f"<|{m['role']}|>" not in self.pieces.special]:
            raise UserError(f"this model ({self.name}) has no turns of the role {strange[0]!r}")
        marked, mark = self.pieces.mark(without_pictures(messages))
        conversation = [{"role": m["role"], "content": with_marks(m["content"], 2 * mark)} for m in marked]
        text = self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template(), tokenize=False)
        pieces = cut_turns(text, HEADER, STOP)
        trained = [message.get("train", True) for message in messages if message["role"] == "assistant"]
        responses = [piece for piece in pieces if piece.trained]
        if len(trained) != len(responses):
            raise UserError(
                f"the chat template of {self.folder} renders {len(responses)} assistant turns of {len(trained)}; its turns "
                f"must be {HEADER!r}, the answer, {STOP!r}"
            )
        is_official = self.options.labels == "official"
        pieces = set_apart(pieces) if is_official else pieces
        begins = [place == 0 or (is_official and not piece.trained) for place, piece in enumerate(pieces)]
        for piece, is_trained in zip(responses, trained, strict=True):
            piece.trained = is_trained
        return [(self.piece_ids(p.text, mark, begin), p.trained) for p, begin in zip(pieces, begins, strict=True)]

    def piece_ids(self, text: str, mark: str, begins: bool) -> list[int]:
        """Token ids of a piece. What lies between pictures is a text of its own to the original: it begins with <s>."""
        begin = self.pieces.special[BEGIN]
        first, *rest = [self.pieces.ids(self.swallowing.sub(r"\1", part), mark) for part in text.split(2 * mark)]
        return [begin] * begins + first + [i for ids in rest for i in (self.image_token_id, begin, *ids)]

    @property
    def stop_ids(self) -> list[int]:
        """<|end|> and <|endoftext|>; config.json's eos_token_id is never produced."""
        return [self.pieces.special[STOP], self.pieces.special[END]]

    def example(
        self, input_ids: Iterable[int], labels: Iterable[int], pixels: dict[str, torch.Tensor] | None = None
    ) -> Example:
        """As everywhere; the places of a row's pictures come out as the original numbers them, -1, -2, ... Nothing
        depends on the number, the order of appearance says which picture it is."""
        ids = torch.as_tensor(input_ids, dtype=torch.long).clamp(min=self.image_token_id)
        example = super().example(ids, labels, pixels)
        for number, (start, end) in enumerate(example.image_spans, 1):
            example.input_ids[start:end] = -number
        return example

    # ---- pictures ---------------------------------------------------------------------------------------------------

    @cached_property
    def processor(self) -> dict:
        """num_crops, image_mean and image_std of preprocessor_config.json; --max_pixels allows fewer crops."""
        names = ("num_crops", "image_mean", "image_std")
        raw = read_json(self.folder / "preprocessor_config.json", names)
        limit, least = self.options.max_pixels, self.tower_settings["image_size"] ** 2
        if limit is None:
            return {name: raw[name] for name in names}
        if limit < least:
            raise UserError(f"--max_pixels {limit}: this model sees a picture in {least} pixels at least; give that or more")
        return {name: raw[name] for name in names} | {"num_crops": min(raw["num_crops"], limit // least)}

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a picture at least as wide as high is scaled to: the widest whole number of tiles whose
        canvas has at most num_crops of them. Floats and truncation as in the original."""
        tile, ratio, columns = self.tower_settings["image_size"], width / height, 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= self.processor["num_crops"]:
            columns += 1
        new_height = int(columns * tile / ratio)
        if new_height == 0:
            raise UserError(f"a picture of {width} x {height} pixels is so long that nothing is left of its shorter side")
        return columns * tile, new_height

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of the canvas of a picture. A tall one has the canvas of its transpose, transposed."""
        tile = self.tower_settings["image_size"]
        long, short = self.scaled_size(max(width, height), min(width, height))
        sides = math.ceil(short / tile), long // tile
        return sides if width >= height else sides[::-1]

    def picture(self, image: Any) -> tuple[dict[str, torch.Tensor], int]:
        """The whole view and the tiles as pixel_values (1 + rows * columns, 3, S, S), and the canvas (height, width)."""
        import numpy

        tile = self.tower_settings["image_size"]
        width, height = image_size(image)
        rows, columns = self.grid(width, height)
        tall = width < height
        size = self.scaled_size(max(width, height), min(width, height))
        (image,) = open_resized(image, [size], Image.Resampling.BILINEAR, over_white=False, transpose=tall,
                                cache=self.options.image_cache)  # fmt: skip
        canvas = Image.new("RGB", (image.width, math.ceil(image.height / tile) * tile), "white")
        canvas.paste(image, (0, (canvas.height - image.height) // 2))
        if tall:
            canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
        pixels = torch.from_numpy(numpy.array(canvas)).permute(2, 0, 1).float().contiguous() / 255  # (3, H, W)
        mean, std = (torch.tensor(self.processor[name])[:, None, None] for name in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
        whole = interpolate(pixels[None], (tile, tile), mode="bicubic")  # of the canvas, not smoothed: as in training
        tiles = pixels.unflatten(2, (columns, tile)).unflatten(1, (rows, tile)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        tensors = {"pixel_values": torch.cat([whole, tiles]), "image_sizes": torch.tensor([pixels.shape[1:]])}
        return tensors, self.grid_positions(rows, columns)

    def grid_positions(self, rows: int, columns: int) -> int:
        """Positions of a picture of so many tiles: both maps, a row end for each of their rows, one separator."""
        side = self.tower_settings["image_size"] // self.tower_settings["patch_size"] // 2
        return (rows * columns + 1) * side**2 + (rows + 1) * side + 1

    def regions(self, width: int, height: int) -> list[Box | None]:
        """Of the tiles, then of the whole view; row ends, the separator, and white beside the picture are no part of it."""
        (rows, columns), found = self.grid(width, height), []
        side = self.tower_settings["image_size"] // self.tower_settings["patch_size"] // 2
        scale = max(width, height) / (columns if width >= height else rows)  # picture pixels a tile
        for across, down in ((columns * side, rows * side), (side, side)):
            parts = cells((width, height), across, down, (columns * scale, rows * scale))
            found += [part for start in range(0, len(parts), across) for part in (*parts[start : start + across], None)]
        return found[: -side * (side + 1)] + [None] + found[-side * (side + 1) :]

    def picture_positions(self, width: int, height: int) -> int:
        return self.grid_positions(*self.grid(width, height))

    @property
    def pixels_per_position(self) -> int:
        """No number of tiles takes more positions a pixel than a single one, with its whole view and row ends."""
        return self.tower_settings["image_size"] ** 2 // self.grid_positions(1, 1)

    def grids(self, pixels: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
        """(rows, columns) of tiles of each picture of an example."""
        sizes = pixels.get("image_sizes", torch.empty(0, 2, dtype=torch.long))
        return [tuple(size) for size in (sizes // self.tower_settings["image_size"]).tolist()]

    def count_positions(self, pixels: dict[str, torch.Tensor]) -> list[int]:
        return [self.grid_positions(rows, columns) for rows, columns in self.grids(pixels)]


def with_marks(content: str | list[dict], picture: str) -> str:
    """Typed content as one string with a mark for each picture, and the line break that the model knows behind them."""
    if isinstance(content, list):
        content = "".join(picture if item["type"] == "image" else item["text"] for item in content)
    return re.sub(rf"({picture})(?=[^\n{picture[0]}])", r"\1\n", content)


def set_apart(pieces: list[Piece]) -> list[Piece]:
    """The official recipe's pieces: the line break after an answer's stop token and <|endoftext|> belong to the answer."""
    for piece, after in pairwise(pieces):
        if piece.trained:
            after.text = after.text.removeprefix("\n")
    for piece in pieces:
        if piece.trained:
            piece.text += f"\n{END}"
    return [piece for piece in pieces if piece.text]
