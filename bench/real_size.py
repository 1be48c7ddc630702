"""Every family at its real size with random weights: the numbers of config.json, the folder, shards that lie on no disk.

A checkpoint of 28 GB is neither at hand nor worth writing for a measurement: RandomShards answers like model.shards.Shards,
and what it streams is cut out of one block of random numbers. So the product's own loading, quantising and training run
unchanged. A tokenizer of 256 bytes stands in for the real one (a letter is a position); the vocabulary keeps its real size.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
    "bos_token_id": 151643, "eos_token_id": 151643,
}
QWEN_VL_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 128000, "max_window_layers": 70,
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
        "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}
PHI3_VISION = {
    "model_type": "phi3_v", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
    "rope_scaling": {"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.03] * 48}, "sliding_window": 131072,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "_attn_implementation": "flash_attention_2",
    "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
                   "use_hd_transform": True, "with_learnable_separator": True},
    "img_processor": {"image_dim_out": 1024, "model_name": "openai/clip-vit-large-patch14-336",
                      "name": "clip_vision_model", "num_img_tokens": 144},
}  # fmt: skip
MINICPM_SLICES = {"max_slice_nums": 9, "scale_resolution": 448, "patch_size": 14}
MINICPM_V = {
    "model_type": "minicpmv", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "rope_scaling": None, "max_position_embeddings": 8192, "query_num": 96,
    "tie_word_embeddings": False, "drop_vision_last_layer": False, "slice_config": MINICPM_SLICES,
    "vision_config": {
        "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14, "model_type": "idefics2",
    },
}
COGAGENT = {
    "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "ffn_hidden_size": 13696, "hidden_size": 4096,
    "kv_channels": 128, "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 32, "num_layers": 40, "original_rope": False, "vocab_size": 151552,
    "tie_word_embeddings": False, "vision_config": {
        "hidden_act": "gelu", "in_channels": 3, "num_hidden_layers": 63, "hidden_size": 1792, "patch_size": 14,
        "num_heads": 16, "intermediate_size": 15360, "layer_norm_eps": 1e-06, "num_positions": 6401, "image_size": 1120,
        "scaling_factor": 8,
    },
}


@dataclass(frozen=True)
class Real:
    """A family's published model: its config, what its preprocessor_config.json says, and a screenshot as users have them.

    picture is (width, height); picture_row is how many positions a row with it has, text included.
    """

    config: dict[str, Any]
    preprocessor: dict[str, Any] = field(default_factory=dict)
    picture: tuple[int, int] | None = None
    picture_row: int = 0


REAL = {
    "qwen2": Real(QWEN_05B),
    "qwen2_5_vl": Real(QWEN_VL_3B, {"max_pixels": 12845056}, (1330, 1970), 6144),  # 3,360 positions are the picture's
    "phi3_vision": Real(PHI3_VISION, {"num_crops": 16, "num_img_tokens": 144}, (1024, 1024), 2700),  # 2,509
    "minicpm_v": Real(MINICPM_V, MINICPM_SLICES | {"image_feature_size": 96}, (1920, 1080), 2048),  # 885
    "cogagent": Real(COGAGENT, {}, (1920, 1080), 2688),  # 1,600
}
TINY_PICTURE, TINY_ROW = (120, 90), 200


def write_folder(name: str, folder: Path, tiny: bool) -> None:
    """A model folder without weights: config, processor, byte tokenizer; of the real size, or of the family's tiny one."""
    from model.family import families, find_family
    from model.tiny import set_vocabulary, write_byte_tokenizer, write_json

    family_class = next(c for c in families() if c.name == name)
    folder.mkdir(parents=True)
    write_byte_tokenizer(family_class, folder)
    files = family_class.tiny_files()
    if not tiny:
        numbers = {key: value for key, value in REAL[name].config.items() if not key.endswith("_token_id")}
        files["config.json"] |= numbers
        if "preprocessor_config.json" in files:
            files["preprocessor_config.json"] |= REAL[name].preprocessor
    for file, content in files.items():
        write_json(folder / file, content)
    set_vocabulary(find_family(folder), None if tiny else files["config.json"]["vocab_size"])


def write_rows(folder: Path, path: Path, tokens: int, picture: tuple[int, int] | None, num_rows: int) -> None:
    """num_rows conversations of exactly `tokens` positions each, a quarter of the text supervised; each about a picture of
    its own if a size (width, height) is given."""
    from PIL import Image

    from model.family import find_family

    def messages(question: int, answer: int) -> list[dict]:
        content: list[dict] = [{"type": "text", "text": "q" * question}]
        if picture:
            content.insert(0, {"type": "image", "image": f"{path.stem}.png"})
        return [{"role": "user", "content": content}, {"role": "assistant", "content": "a" * answer}]

    sizes = [picture] if picture else []
    room = tokens + 2 - sum(find_family(folder).count(messages(1, 1), None, sizes))
    answer = max(1, room // 4)
    if picture:
        Image.radial_gradient("L").resize(picture).convert("RGB").save(path.with_suffix(".png"))
    row = json.dumps({"messages": messages(room - answer, answer)})
    path.write_text(f"{row}\n" * num_rows, encoding="utf-8")


class RandomShards:
    """Stands in for model.shards.Shards: every tensor that a folder's config asks for, in bf16, from one random block.

    Norm weights are ones, everything else is normal with deviation 0.02, the same at every reading.
    """

    BLOCK = 2**26  # numbers; larger tensors repeat them

    def __init__(self, folder: str | Path):
        from model.family import find_family
        from model.load import build_on_meta, expected_tensors

        self.folder = Path(folder)
        family = find_family(folder)
        self.sizes = expected_tensors(family, build_on_meta(family))

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (tuple(shape), "BF16") for name, shape in self.sizes.items()}

    def stream(self, only: set[str]) -> Iterator[tuple[str, Any]]:
        """(name, tensor) of each, on the processor, as from a file."""
        import torch

        most = min(self.BLOCK, max(shape.numel() for shape in self.sizes.values()))
        block = torch.randn(most, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
        place = 0
        for name in sorted(only):
            shape = self.sizes[name]
            if len(shape) == 1 and name.endswith("weight"):
                yield name, torch.ones(shape, dtype=torch.bfloat16)
                continue
            place = (place + 4099) % most  # another beginning for every tensor
            end = place + shape.numel()
            yield name, (block if end <= most else block.repeat(math.ceil(end / most)))[place:end].view(shape)
