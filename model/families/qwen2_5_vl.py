"""Qwen2.5-VL of every size (Proxy-Lite-3B is one): transformers' network, our pictures, positions and window attention.

A picture is resized to multiples of patch x merge, cut into patches in merge groups of 2 x 2, and takes one position a
merged group. Positions count in three rows (time, height, width): text advances all three, a picture spreads over height
and width and advances the text by its longer side. The vision tower's blocks attend inside windows, four of them inside
the whole picture; transformers loops over windows in Python without a flash kernel, segment_attention batches them.
"""

from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

from data.boxes import Box, Convention
from data.errors import UserError
from data.images import cells, image_size, open_resized, patchify, smart_resize
from model.attention import segment_attention
from model.families.qwen2 import ChatML
from model.files import read_json


class WindowAttention(modeling.Qwen2_5_VLVisionAttention):
    """The tower's attention: fused qkv, 2-D rotary, each window (or picture) by itself. hidden is (P, D)."""

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # (P, H, K)
        q, k = modeling.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        if not hasattr(cu_seqlens, "lengths"):  # all blocks get the same two tensors: one wait for the card, not one a block
            cu_seqlens.lengths = [n for n in cu_seqlens.diff().tolist() if n]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v.to(q.dtype)))  # (H, P, K)
        out = segment_attention(q, k, v, cu_seqlens.lengths, causal=False, scale=self.scaling)  # (P, H, K)
        return self.proj(out.flatten(1).to(hidden_states.dtype))


class Qwen2_5_VL(ChatML):  # noqa: N801 - the model's name
    """Qwen2.5-VL-3B, 7B, 72B, and fine-tunes of them."""

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    prefixes = {"visual.": "model.visual.", "model.": "model.language_model."}
    parts = {"language": "model.language_model", "projector": "model.visual.merger", "vision": "model.visual"}
    box_convention = Convention("pixels")
    blocks = ("model.language_model.layers", "model.visual.blocks")
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_token_id = self.config.get("image_token_id", 151655)
        self._processor = None

    tiny_tokens = (
        *ChatML.tiny_tokens, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"
    )

    @classmethod
    def tiny_files(cls) -> dict[str, dict]:
        files = super().tiny_files()
        files["config.json"] |= {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
            "vision_token_id": "<|vision_pad|>", "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_config": {
                "depth": 4, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 44, "num_heads": 2,
                "in_chans": 3, "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2,
                "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1, 3],
                "tokens_per_second": 2, "temporal_patch_size": 2,
            },
        }
        files["preprocessor_config.json"] = {
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "temporal_patch_size": 2,
            "merge_size": 2, "min_pixels": 3136, "max_pixels": 1003520,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
        return files

    def build(self) -> nn.Module:
        from transformers import Qwen2_5_VLConfig

        net = modeling.Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**self.config))
        for block in net.model.visual.blocks:
            block.attn.__class__ = WindowAttention
        return net

    def decoder(self, net: nn.Module) -> nn.Module:
        return net.model.language_model

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def features(self, net: nn.Module, pictures: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        tower, joined = net.model.visual, self.join_pixels(pictures)  # one call for all
        seen = tower(joined["pixel_values"].to(tower.dtype), grid_thw=joined["image_grid_thw"])
        return list(self.all_layers(seen).split([sum(self.count_positions(p)) for p in pictures]))

    def all_layers(self, seen: Any) -> torch.Tensor:
        """(places, D) of what the tower gives."""
        return seen.pooler_output

    @property
    def processor(self) -> dict:
        """Patch, merge, limits and normalisation from preprocessor_config.json (older and newer spellings)."""
        if self._processor is None:
            names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
            raw = read_json(self.folder / "preprocessor_config.json", names)
            size = raw.get("size") or {}
            limits = {
                "min_pixels": raw.get("min_pixels") or size.get("shortest_edge") or 3136,
                "max_pixels": raw.get("max_pixels") or size.get("longest_edge") or 12845056,
            }
            self._processor = {name: raw[name] for name in names} | limits
        limit = self.options.max_pixels
        if limit is not None and limit < self._processor["min_pixels"]:
            least = self._processor["min_pixels"]
            raise UserError(f"--max_pixels {limit}: this model sees no picture in fewer than {least} pixels; give {least}")
        return self._processor if limit is None else self._processor | {"max_pixels": min(limit, self._processor["max_pixels"])}

    def picture(self, image: Any) -> tuple[dict[str, torch.Tensor], int]:
        rule = self.processor
        size = self.seen_size(*image_size(image))
        (resized,) = open_resized(image, [size], Image.Resampling.BICUBIC, cache=self.options.image_cache)
        patches, grid = patchify(
            resized, patch_size=rule["patch_size"], merge_size=rule["merge_size"],
            temporal_patch_size=rule["temporal_patch_size"], mean=rule["image_mean"], std=rule["image_std"],
        )
        tensors = {"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}
        return tensors, self.count_positions(tensors)[0]

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        rule = self.processor
        factor = rule["patch_size"] * rule["merge_size"]
        return smart_resize(height, width, factor, rule["min_pixels"], rule["max_pixels"])[::-1]

    def regions(self, width: int, height: int) -> list[Box | None]:
        factor = self.processor["patch_size"] * self.processor["merge_size"]
        return cells((width, height), *(side // factor for side in self.seen_size(width, height)))

    def picture_positions(self, width: int, height: int) -> int:
        width, height = self.seen_size(width, height)
        return width * height // self.pixels_per_position

    @property
    def pixels_per_position(self) -> int:
        return (self.processor["patch_size"] * self.processor["merge_size"]) ** 2

    def count_positions(self, pixels: dict[str, torch.Tensor]) -> list[int]:
        grids = pixels.get("image_grid_thw")
        return [] if grids is None else (grids.prod(1) // self.merge_size**2).tolist()

    @property
    def merge_size(self) -> int:
        return self.config.get("vision_config", {}).get("spatial_merge_size", 2)

    def positions(self, input_ids: torch.Tensor, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
        """(3, T): facts of the rule in the module's docstring; a picture's grid is counted in merged groups."""
        grids = pixels.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long)).tolist()
        is_picture = (input_ids == self.image_token_id).tolist()
        columns, place, offset = [], 0, 0
        for _, height, width in grids:
            height, width = height // self.merge_size, width // self.merge_size
            start = is_picture.index(True, place)
            text = torch.arange(start - place).expand(3, -1) + offset
            offset += start - place
            rows = torch.arange(height).repeat_interleave(width)
            cols = torch.arange(width).repeat(height)
            columns += [text, torch.stack([torch.zeros_like(rows), rows, cols]) + offset]  # (3, height * width)
            offset += max(height, width)
            place = start + height * width
        columns.append(torch.arange(len(input_ids) - place).expand(3, -1) + offset)
        return torch.cat(columns, dim=1)
