"""Qwen3 text models of every size: transformers' Qwen3 (queries and keys normalised head by head) and turns with <think>.

The folder's template puts a <think> block in front of the answer to the last question, an empty one where a row has no
thoughts, and drops the thoughts of earlier turns. A prompt of generation ends with "assistant\n"; so does every prompt
piece in training, and the block, empty or not, is part of the answer and trained: the model learns from the rows whether
to think, and the answer stands behind the very ids that a server with enable_thinking=False puts there. Earlier answers
are trained as later prompts show them, without a block; one that has thoughts is refused (families/qwen2.py), not trained
without them. Instruct-2507 has no block, Thinking-2507 a "<think>\n" that belongs to the prompt: both by their templates.
"""

from torch import nn

from model.families.qwen2 import Qwen2

TINY_TEMPLATE = (
    "{% set ns = namespace(question=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.question = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set halves = m.content.split('</think>') %}"
    "{% set thoughts = halves[0].split('<think>')[-1].strip('\n') if halves | length > 1 else '' %}"
    "{% if loop.index0 > ns.question and (loop.last or thoughts) %}<think>\n{{ thoughts }}\n</think>\n\n{% endif %}"
    "{{ halves[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


class Qwen3(Qwen2):
    """Qwen3-0.6B to 32B, Instruct-2507 and Thinking-2507 of them; not the mixtures of experts."""

    name = "qwen3"
    model_types = ("qwen3",)
    tiny_template = TINY_TEMPLATE

    @classmethod
    def tiny_files(cls) -> dict[str, dict]:
        files = super().tiny_files()
        files["config.json"] |= {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 32}
        return files

    def build(self) -> nn.Module:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        return Qwen3ForCausalLM(Qwen3Config(**self.config))
