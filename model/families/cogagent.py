"""CogAgent-9B-20241220 and GLM-4V-9B: a ChatGLM decoder behind an EVA2-CLIP tower; transformers has neither.

Module names are the checkpoint's own, fused query_key_value included. Every picture becomes one square (1120 x 1120)
and 1,600 positions between two learned vectors, which replace the tokens of begin and end; the 1,600 share one position
number, so a picture advances the text by three. The makers allow one picture a conversation, in front of its turn's
text; several work here in the same way. The 63 blocks of the tower are 4.3 of 13.9 billion parameters and are quantised
too; the 6,401 patches of a picture keep 23 MB a block for the backward pass.
"""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's usual name
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data.batches import Packed
from data.boxes import Box, Convention
from data.errors import UserError
from data.images import cells, open_resized
from data.labels import Example
from model.attention import segment_attention
from model.family import Family
from model.glm_tokenizer import ASSISTANT, END, FILE, PICTURE, STOPS, TOKENS, read_glm_tokenizer, render_chat

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's; in no file of the hub
MERGE = 2  # patches a side that become one position


class ChatGLMConfig(PretrainedConfig):
    """config.json as it stands; transformers' names of its numbers beside the original ones."""

    model_type = "chatglm"
    attribute_map = {
        "num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size", "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num", "rms_norm_eps": "layernorm_epsilon",
    }


# ---- the tower: N pictures -> (N, P + 2, D) -------------------------------------------------------------------------------


class PatchEmbedding(nn.Module):
    """(N, 3, S, S) -> (N, 1 + P, C): patches row by row behind a class vector, learned positions added."""

    def __init__(self, vision: SimpleNamespace):
        super().__init__()
        size, width = vision.patch_size, vision.hidden_size
        self.proj = nn.Conv2d(vision.in_channels, width, size, stride=size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, width))
        self.position_embedding = nn.Embedding(vision.num_positions, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)  # (N, P, C)
        first = self.cls_embedding.expand(len(images), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Every patch of a picture sees every other: rows of query_key_value are q, k, v, their heads inside."""

    def __init__(self, vision: SimpleNamespace):
        super().__init__()
        self.num_heads = vision.num_heads
        self.query_key_value = nn.Linear(vision.hidden_size, 3 * vision.hidden_size)
        self.dense = nn.Linear(vision.hidden_size, vision.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        count, length, _ = hidden.shape
        qkv = self.query_key_value(hidden).unflatten(-1, (3, self.num_heads, -1)).flatten(0, 1)  # (N * P, 3, H, K)
        q, k, v = (x.transpose(0, 1) for x in qkv.unbind(1))  # (H, N * P, K)
        out = segment_attention(q, k, v, [length] * count, causal=False, scale=q.shape[-1] ** -0.5)  # (N * P, H, K)
        return self.dense(out.flatten(1).unflatten(0, (count, length)))


class VisionBlock(nn.Module):
    """Normalised AFTER attention and MLP, inside the residual branch, whatever the names of the norms say."""

    def __init__(self, vision: SimpleNamespace):
        super().__init__()
        width, inner = vision.hidden_size, vision.intermediate_size
        self.attention = VisionAttention(vision)
        self.input_layernorm = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        layers = [("fc1", nn.Linear(width, inner)), ("gelu", ACT2FN[vision.hidden_act]), ("fc2", nn.Linear(inner, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.post_attention_layernorm = nn.LayerNorm(width, eps=vision.layer_norm_eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.input_layernorm(self.attention(hidden))
        return hidden + self.post_attention_layernorm(self.mlp(hidden))


class VisionTower(nn.Module):
    """The blocks, and nothing before or after them."""

    def __init__(self, vision: SimpleNamespace):
        super().__init__()
        self.layers = nn.ModuleList([VisionBlock(vision) for _ in range(vision.num_hidden_layers)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Projector(nn.Module):
    """Linear, norm, GELU, then a gated MLP; (..., D) all along. norm1's eps is torch's default, 1e-5."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.linear_proj = nn.Linear(width, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.dense_h_to_4h = nn.Linear(width, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.norm1(self.linear_proj(hidden)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(hidden)) * self.dense_h_to_4h(hidden))


class Vision(nn.Module):
    """(N, 3, S, S) -> (N, P / 4 + 2, D): every 2 x 2 patches are one position, between two learned vectors."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        vision = config.vision_config
        self.patch_embedding = PatchEmbedding(vision)
        self.transformer = VisionTower(vision)
        self.conv = nn.Conv2d(vision.hidden_size, config.hidden_size, kernel_size=MERGE, stride=MERGE)
        self.linear_proj = Projector(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.scale = vision.scaling_factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.transformer(self.patch_embedding(images))[:, 1:]  # (N, P, C): the class vector is dropped
        side = round(hidden.shape[1] ** 0.5)
        grid = hidden.transpose(1, 2).unflatten(-1, (side, side))  # (N, C, side, side)
        features = self.linear_proj(self.conv(grid).flatten(2).transpose(1, 2))  # (N, P / 4, D)
        first, last = (edge.expand(len(images), -1, -1) for edge in (self.boi, self.eoi))
        return torch.cat([first, features, last], dim=1) / self.scale


# ---- the language model: (B, T, D) -> (B, T, D) ---------------------------------------------------------------------------


class RotaryTable(nn.Module):
    """Angles for half of each head's channels. The checkpoint's inv_freq is kept, not used: it knows no rope_ratio."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.frequencies(10000.0))

    def frequencies(self, base: float, device: torch.device | None = None) -> torch.Tensor:
        """base^(-2 i / R) of R / 2 pairs (Su et al., arXiv 2104.09864), R half the head's size: (R / 2,) fp32."""
        size = self.config.kv_channels // 2
        return 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float, device=device) / size)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) -> cosines and sines, (B, 1, T, R / 2) fp32 each."""
        base = 10000.0 * getattr(self.config, "rope_ratio", 1)
        angles = positions[:, None, :, None] * self.frequencies(base, positions.device)
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """Rotate the first R channels of x (B, H, T, K) in fp32: pairs are (2i, 2i + 1), or (i, i + R / 2)."""
    size = 2 * cosine.shape[-1]
    shape, dim = ((-1, 2), -1) if neighbours else ((2, -1), -2)
    a, b = x[..., :size].float().unflatten(-1, shape).unbind(dim)  # (B, H, T, R / 2)
    turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., size:]], dim=-1)


class SelfAttention(nn.Module):
    """Causal, grouped heads: rows of query_key_value are all queries, then keys, then values."""

    is_causal = True

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        query, key = config.num_attention_heads * config.kv_channels, config.multi_query_group_num * config.kv_channels
        self.sizes = (query, key, key)
        self.num_key_value_groups = query // key
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.sizes), bias=qkv_bias)
        self.dense = nn.Linear(query, config.hidden_size, bias=config.add_bias_linear)
        self.neighbours = getattr(config, "original_rope", True)

    def forward(self, hidden, rotary, attention_mask=None, past_key_values=None, **kwargs) -> torch.Tensor:
        parts = self.query_key_value(hidden).split(self.sizes, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.config.kv_channels)).transpose(1, 2) for x in parts)  # (B, H, T, K)
        q, k = rotate(q, *rotary, self.neighbours), rotate(k, *rotary, self.neighbours)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, _ = attend(self, q, k, v, attention_mask, scaling=self.config.kv_channels**-0.5, **kwargs)  # (B, T, H, K)
        return self.dense(out.flatten(2))


class MLP(nn.Module):
    """The first half of dense_h_to_4h is the gate."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(hidden).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block(nn.Module):
    """Normalised before attention and MLP. torch's RMSNorm multiplies by its weight in fp32 and then casts, as here."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), *args, **kwargs)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class ChatGLMForConditionalGeneration(PreTrainedModel):
    """All tensors under their original names; forward is the language model without its head, pictures embedded before."""

    config_class = ChatGLMConfig
    _supports_sdpa = True

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        layers = nn.ModuleList([Block(config, layer_idx) for layer_idx in range(config.num_layers)])
        norm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.transformer = nn.ModuleDict({
            "embedding": nn.ModuleDict({"word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size)}),
            "rotary_pos_emb": RotaryTable(config),
            "encoder": nn.ModuleDict({"layers": layers, "final_layernorm": norm}),
            "output_layer": nn.Linear(config.hidden_size, config.vocab_size, bias=False),
            "vision": Vision(config),
        })

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.embedding.word_embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def forward(self, inputs_embeds, position_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        """(B, T, D), (B, T) -> last_hidden_state (B, T, D). attention_mask (B, S) is 0 at padding, S cached places
        included; without one the row is packed, and `lengths` in kwargs says how."""
        if attention_mask is not None:
            keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            places = keys[-inputs_embeds.shape[1] :, None]
            attention_mask = (keys <= places) & attention_mask[:, None, None].bool()  # (B, 1, T, S)
        hidden, rotary = inputs_embeds, self.transformer.rotary_pos_emb(position_ids)
        for layer in self.transformer.encoder.layers:
            hidden = layer(hidden, rotary, attention_mask, past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.transformer.encoder.final_layernorm(hidden))


# ---- the family -----------------------------------------------------------------------------------------------------------


class CogAgent(Family):
    """CogAgent-9B-20241220, and GLM-4V-9B, which differs in the layout of its rotary pairs (original_rope)."""

    name = "cogagent"
    model_types = ("chatglm",)
    parts = {"language": "transformer", "projector": "transformer.vision.linear_proj", "vision": "transformer.vision"}
    box_convention = Convention("thousandths", "box=[[{},{},{},{}]]", "box=[[{},{},{},{}]]", most=999)
    blocks = ("transformer.encoder.layers", "transformer.vision.transformer.layers")
    quantized_parts = ("language", "projector", "vision")
    lora_targets = ("query_key_value",)
    tiny_tokens = TOKENS

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_token_id = self.config.get("pad_token_id")  # <|endoftext|>, also the placeholder of pictures
        if not isinstance(self.config.get("vision_config"), dict):
            raise UserError(f"{self.folder}/config.json: has no vision_config; of ChatGLM, GLM-4V and CogAgent run here")
        if self.options.max_pixels is not None:
            raise UserError(f"--max_pixels {self.options.max_pixels}: this model sees every picture in one size; drop it")

    @classmethod
    def tiny_files(cls) -> dict[str, dict]:
        return {
            "config.json": {
                "model_type": "chatglm", "architectures": ["ChatGLMForConditionalGeneration"], "add_bias_linear": False,
                "add_qkv_bias": True, "ffn_hidden_size": 128, "hidden_size": 64, "kv_channels": 16,
                "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True, "multi_query_group_num": 2,
                "num_attention_heads": 4, "num_layers": 2, "original_rope": False, "torch_dtype": "float32",
                "tie_word_embeddings": False, "bos_token_id": END, "eos_token_id": END, "pad_token_id": END,
                "boi_token_id": PICTURE[0], "eoi_token_id": PICTURE[2],
                "vision_config": {
                    "hidden_act": "gelu", "hidden_size": 64, "image_size": 84, "in_channels": 3,
                    "intermediate_size": 128, "layer_norm_eps": 1e-06, "num_heads": 4, "num_hidden_layers": 2,
                    "num_positions": 37, "patch_size": 14, "scaling_factor": 8,
                },
            }
        }

    # ---- network ----------------------------------------------------------------------------------------------------

    @property
    def text_config(self) -> dict:
        """config.json with the two numbers that ChatGLM's own code settles by others."""
        config = self.config
        groups = config["multi_query_group_num" if config.get("multi_query_attention") else "num_attention_heads"]
        vocab_size = config.get("padded_vocab_size", config.get("vocab_size"))
        return config | {"vocab_size": vocab_size, "multi_query_group_num": groups}

    def build(self) -> nn.Module:
        vision = SimpleNamespace(**self.config["vision_config"], spatial_merge_size=MERGE)  # the plan of memory reads it
        return ChatGLMForConditionalGeneration(ChatGLMConfig(**self.text_config | {"vision_config": vision}))

    def decoder(self, net: nn.Module) -> nn.Module:
        return net

    # ---- text -------------------------------------------------------------------------------------------------------

    def load_tokenizer(self):
        return read_glm_tokenizer(self.folder) if (self.folder / FILE).exists() else super().load_tokenizer()

    @property
    def stop_ids(self) -> list[int]:
        return [self.pieces.special[token] for token in STOPS]

    def render(self, messages: list[dict], tools: list | None) -> list[tuple[list[int], bool]]:
        return render_chat(messages, tools, self.pieces, official=self.options.labels == "official")

    def answer_start(self, example: Example) -> int:
        """Behind <|assistant|>, after which the model itself writes the line end, whichever tokens are trained."""
        start = super().answer_start(example)
        return start + int(self.pieces.special[ASSISTANT] in example.input_ids[start : start + 1])

    def answer_text(self, text: str) -> str:
        """Without the line end of the (empty) line that follows <|assistant|>: encoded again, it would stand there twice."""
        return text.removeprefix("\n")

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def features(self, net: nn.Module, pictures: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        vision = net.transformer.vision
        return [vision(p["images"].to(vision.boi.dtype)).flatten(0, 1) for p in pictures]

    def picture_places(self, packed: Packed) -> torch.Tensor:
        spans = [torch.arange(start - 1, end + 1) for start, end in packed.image_spans]  # begin and end are features too
        return torch.cat(spans).to(packed.input_ids.device)

    def picture(self, image: Any) -> tuple[dict[str, torch.Tensor], int]:
        size = self.seen_size(0, 0)  # the same for all
        cache = self.options.image_cache
        (resized,) = open_resized(image, [size], Image.Resampling.BICUBIC, over_white=False, cache=cache)
        pixels = numpy.asarray(resized)  # (S, S, 3) bytes
        levels = numpy.arange(256, dtype=numpy.float32) / 255  # a byte has 256 values: normalised once, looked up
        tables = [(levels - numpy.float32(mean)) / numpy.float32(std) for mean, std in zip(MEAN, STD, strict=True)]
        images = numpy.stack([table[pixels[..., channel]] for channel, table in enumerate(tables)])  # (3, S, S)
        return {"images": torch.from_numpy(images)[None]}, self.picture_positions(*size)

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        return (self.config["vision_config"]["image_size"],) * 2

    def regions(self, width: int, height: int) -> list[Box | None]:
        side = self.seen_size(width, height)[0] // self.config["vision_config"]["patch_size"] // MERGE
        return cells((width, height), side, side)

    def picture_positions(self, width: int, height: int) -> int:
        return (self.seen_size(width, height)[0] // self.config["vision_config"]["patch_size"] // MERGE) ** 2

    def count_positions(self, pixels: dict[str, torch.Tensor]) -> list[int]:
        return [self.picture_positions(0, 0)] * len(pixels.get("images", ()))

    def positions(self, input_ids: torch.Tensor, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
        """(T,): a picture's places share one number."""
        advances, place = torch.ones(len(input_ids), dtype=torch.long), 0
        for count in self.count_positions(pixels):
            start = place + int((input_ids[place:] == self.image_token_id).nonzero()[0])
            place = start + count
            advances[start + 1 : place] = 0
        return advances.cumsum(0) - 1
