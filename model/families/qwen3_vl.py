"""Qwen3-VL of every size but the mixtures of experts: transformers' network; pictures and positions as in Qwen2.5-VL.

What differs from Qwen2.5-VL: patches of 16 pixels; a tower that attends over the whole picture everywhere and whose
learned positions are interpolated to its grid; DeepStack (Meng et al., arXiv 2406.04334): features of some of the tower's
blocks are added to the hidden states behind the first language layers, at the picture's places. They travel beside the
embeddings, as T x D numbers a layer that are zero at text, so a packed row, a padded batch and a checkpointed block treat
them like embeddings; a row of text alone carries none. The three rows of positions take turns in the rotary channels.
The Thinking models' prompts end with "<think>\n" (families/qwen3.py). Videos are not read.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

from data.boxes import Convention
from model.families.qwen2_5_vl import Qwen2_5_VL, WindowAttention


class DeepStack(modeling.Qwen3VLTextModel):
    """The language model on embeddings (B, T, (1 + n) D): what lies behind the first D is added after layers 0 to n - 1."""

    def forward(self, inputs_embeds: torch.Tensor, **kwargs):
        embeddings, *features = inputs_embeds.split(self.config.hidden_size, dim=-1)
        return super().forward(inputs_embeds=embeddings, deepstack_visual_embeds=features, **kwargs)

    def _deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds):
        return hidden_states + visual_embeds.to(hidden_states.dtype)


class Qwen3VL(Qwen2_5_VL):
    """Qwen3-VL-2B, 4B, 8B and 32B, Instruct and Thinking, and fine-tunes of them."""

    name = "qwen3_vl"
    model_types = ("qwen3_vl",)
    prefixes = {}  # the checkpoint's names are transformers' own
    parts = {
        "language": "model.language_model", "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "vision": "model.visual",
    }
    opens_in_transformers = "4.57"
    box_convention = Convention("thousandths")

    @classmethod
    def tiny_files(cls) -> dict[str, dict]:
        files = super().tiny_files()
        flat = files["config.json"]
        top = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id", "tie_word_embeddings")
        other = (*top, "model_type", "vision_token_id", "vision_config", "rope_scaling", "architectures")
        text = {key: value for key, value in flat.items() if key not in other}
        rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
        text |= {"model_type": "qwen3_vl_text", "head_dim": 32, "attention_bias": False, "rope_scaling": rope}
        text |= {"num_hidden_layers": 3}  # one behind the last that DeepStack adds to
        vision = {
            "model_type": "qwen3_vl", "deepstack_visual_indexes": [0, 2], "depth": 4, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32, "in_channels": 3, "intermediate_size": 44, "num_heads": 2, "num_position_embeddings": 64,
            "out_hidden_size": text["hidden_size"], "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        }
        names = {"model_type": cls.name, "architectures": ["Qwen3VLForConditionalGeneration"]}
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        files["config.json"] = names | {key: flat[key] for key in top} | {"text_config": text, "vision_config": vision}
        files["preprocessor_config.json"] |= half | {"patch_size": 16, "min_pixels": 4096, "max_pixels": 1048576}
        return files

    def build(self) -> nn.Module:
        from transformers import Qwen3VLConfig

        net = modeling.Qwen3VLForConditionalGeneration(Qwen3VLConfig(**self.config))
        net.model.language_model.__class__ = DeepStack
        for block in net.model.visual.blocks:
            block.attn.__class__ = WindowAttention  # of one window, the picture
        return net

    def all_layers(self, seen: Any) -> torch.Tensor:
        """(places, (1 + n) D): the features of n DeepStack layers beside."""
        return torch.cat([seen.pooler_output, *seen.deepstack_features], dim=1)
