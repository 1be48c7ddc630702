"""Checkpoints that run without code, because only numbers of config.json differ from a family's own: README's table.

Each is built at its real size on the meta device; parameter totals are those of the published indexes (a tied head counted
once). What nobody could compare yet stands in the table with a star and is not built here.
"""

import json
import math

import pytest
from conftest import ROOT
from test_load import QWEN_05B, QWEN_VL_3B, VISION

from data.errors import UserError
from model.family import find_family
from model.load import build_on_meta, expected_tensors


def text(layers, hidden, intermediate, heads, keys, tied=False, vocabulary=152064, **more):
    """A Qwen text config in the numbers in which its sizes differ."""
    return QWEN_05B | dict(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=keys, tie_word_embeddings=tied, vocab_size=vocabulary, max_window_layers=layers, **more,
    )  # fmt: skip


def qwen3(*numbers, tied=False):
    more = dict(model_type="qwen3", head_dim=128, attention_bias=False, sliding_window=None)
    return text(*numbers, tied, 151936) | more | {"architectures": ["Qwen3ForCausalLM"]}


def qwen2_5_vl(*numbers, **vision):
    config = {key: value for key, value in text(*numbers).items() if key not in ("architectures", "model_type")}
    return QWEN_VL_3B | config | {"vision_config": VISION | {"out_hidden_size": config["hidden_size"]} | vision}


def qwen3_vl(*numbers, tied=False, large=True):
    config = qwen3(*numbers, tied=tied) | {"model_type": "qwen3_vl_text", "rope_theta": 5e6}
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    sizes = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
    if large:
        sizes = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
    vision = sizes | dict(
        model_type="qwen3_vl", hidden_act="gelu_pytorch_tanh", in_channels=3, num_heads=16, num_position_embeddings=2304,
        out_hidden_size=config["hidden_size"], patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
    )  # fmt: skip
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
        "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "tie_word_embeddings": tied, "text_config": config | {"rope_scaling": rope}, "vision_config": vision,
    }  # fmt: skip


MINICPM = {
    "model_type": "minicpmv", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": False, "query_num": 96,
    "drop_vision_last_layer": False, "vision_config": {
        "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14, "model_type": "idefics2",
    },
}  # fmt: skip
COGAGENT = {
    "model_type": "chatglm", "add_bias_linear": False, "add_qkv_bias": True, "ffn_hidden_size": 13696,
    "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1.5625e-07, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 40, "original_rope": False,
    "padded_vocab_size": 151552, "tie_word_embeddings": False, "pad_token_id": 151329, "vision_config": {
        "hidden_act": "gelu", "in_channels": 3, "num_hidden_layers": 63, "hidden_size": 1792, "patch_size": 14,
        "num_heads": 16, "intermediate_size": 15360, "layer_norm_eps": 1e-06, "num_positions": 6401,
        "image_size": 1120, "scaling_factor": 8,
    },
}  # fmt: skip
PHI = {
    "model_type": "phi3_v", "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 131072,
    "tie_word_embeddings": False, "vocab_size": 32064, "embd_layer": {"embedding_cls": "image"},
    "img_processor": {"image_dim_out": 1024, "name": "clip_vision_model", "num_img_tokens": 144},
    "rope_scaling": {"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.03] * 48},
}  # fmt: skip

# family: {checkpoint: (config, parameters, tensors where somebody has counted them)}
VERIFIED = {
    "qwen2": {
        "Qwen2.5-0.5B": (QWEN_05B, 494_032_768, 290),
        "1.5B": (text(28, 1536, 8960, 12, 2, True, 151936), 1_543_714_304, None),
        "3B": (text(36, 2048, 11008, 16, 2, True, 151936), 3_085_938_688, None),
        "7B": (text(28, 3584, 18944, 28, 4), 7_615_616_512, None),
        "14B": (text(48, 5120, 13824, 40, 8), 14_770_033_664, 579),
        "32B": (text(64, 5120, 27648, 40, 8), 32_763_876_352, 771),
        "72B": (text(80, 8192, 29568, 64, 8), 72_706_203_648, None),
    },
    "qwen2_5_vl": {
        "Qwen2.5-VL-3B (Proxy-Lite-3B)": (QWEN_VL_3B, 3_754_622_976, 824),
        "7B": (qwen2_5_vl(28, 3584, 18944, 28, 4), 8_292_166_656, None),
        "32B": (qwen2_5_vl(64, 5120, 27648, 40, 8, intermediate_size=3456), 33_452_718_336, None),
    },
    "qwen3": {
        "Qwen3-0.6B": (qwen3(28, 1024, 3072, 16, 8, tied=True), 596_049_920, None),
        "1.7B": (qwen3(28, 2048, 6144, 16, 8, tied=True), 1_720_574_976, 310),
        "4B": (qwen3(36, 2560, 9728, 32, 8, tied=True), 4_022_468_096, None),
        "8B": (qwen3(36, 4096, 12288, 32, 8), 8_190_735_360, 399),
        "14B": (qwen3(40, 5120, 17408, 40, 8), 14_768_307_200, None),
        "32B": (qwen3(64, 5120, 25600, 64, 8), 32_762_123_264, None),
    },
    "qwen3_vl": {
        "Qwen3-VL-2B": (qwen3_vl(28, 2048, 6144, 16, 8, tied=True, large=False), 2_127_532_032, None),
        "4B": (qwen3_vl(36, 2560, 9728, 32, 8, tied=True, large=False), 4_437_815_808, 713),
        "8B": (qwen3_vl(36, 4096, 12288, 32, 8), 8_767_123_696, None),
        "32B": (qwen3_vl(64, 5120, 25600, 64, 8), 33_357_390_064, 1058),
    },
    "minicpm_v": {"MiniCPM-Llama3-V 2.5": (MINICPM, 8_537_092_336, 741)},
    "cogagent": {
        "CogAgent-9B-20241220": (COGAGENT, 13_906_320_896, 1054),
        "GLM-4V-9B": (COGAGENT | {"original_rope": True}, 13_906_320_896, 1054),
    },
    "phi3_vision": {
        "Phi-3-vision-128k": (PHI, 4_146_621_440, 592),
        "Phi-3.5-vision": (PHI | {"sliding_window": 262144}, 4_146_621_440, None),
    },
}
# by their makers' word of the same architecture: nothing compared, so a star in the table
UNVERIFIED = {
    "qwen2": ["Qwen2", "Qwen2.5-Coder", "QwQ-32B"],
    "qwen2_5_vl": ["72B", "UI-TARS-1.5-7B"],
    "qwen3": ["4B-Instruct-2507", "4B-Thinking-2507"],
    "qwen3_vl": ["their Thinking forms"],
}


@pytest.mark.parametrize(
    "family, name", [(family, name) for family, found in VERIFIED.items() for name in found], ids=lambda text: text[:14]
)
def test_a_sibling_at_its_real_size(tmp_path, family, name):
    config, num_parameters, num_tensors = VERIFIED[family][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = find_family(tmp_path)
    net = build_on_meta(found)
    shapes = expected_tensors(found, net)
    assert found.name == family
    assert all(found.tensor_name(found.module_name(tensor)) == tensor for tensor in shapes)
    weights = [shape for tensor, shape in shapes.items() if not tensor.endswith("inv_freq")]  # ChatGLM stores that buffer
    assert sum(math.prod(shape) for shape in weights) == num_parameters
    assert num_tensors in (None, len(shapes))


def test_another_architecture_is_refused(tmp_path):
    """The first UI-TARS are Qwen2-VL, which no file here knows; Qwen3's mixtures of experts neither."""
    for kind in ("qwen2_vl", "qwen3_moe", "qwen3_vl_moe"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match=f"'{kind}' is none that this project knows"):
            find_family(tmp_path)


def test_readme_lists_the_siblings_and_the_lines():
    """README's table: every file of model/families, its lines, and what runs by it."""
    names = {path.stem for path in (ROOT / "model" / "families").glob("*.py")} - {"__init__"}
    assert names == set(VERIFIED)
    table = ["| file of model/families/ | lines | runs |", "|---|---|---|"]
    for name, found in VERIFIED.items():
        path = f"model/families/{name}.py"
        starred = [f"{sibling}\\*" for sibling in UNVERIFIED.get(name, [])]
        lines = len((ROOT / path).read_text().splitlines())
        table.append(f"| [{name}.py]({path}) | {lines} | {', '.join([*found, *starred])} |")
    expected = "\n".join(table)
    _, _, rest = (ROOT / "README.md").read_text().partition("<!-- families -->\n")
    assert rest.partition("\n<!-- /families -->")[0] == expected, f"README.md between its marks should be:\n{expected}"
