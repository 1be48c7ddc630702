"""Qwen2.5 text models of every size: transformers' Qwen2, the hub's chat template, ChatML turns.

The checkpoint's names are transformers' own. Turns are `<|im_start|>role\n...<|im_end|>\n`; a response piece runs from
after "assistant\n" through <|im_end|>, and the newline after it belongs to the next prompt piece. What a template puts
behind "assistant\n" when it asks for an answer ("<think>\n" of the models that always think, QwQ among them) belongs to
the prompt piece in training too.
"""

import json
import re
from functools import cached_property
from itertools import groupby, pairwise

from torch import nn

from data.errors import UserError
from data.labels import cut_turns
from model.family import Family, images_of
from model.files import read_json

HEADER, STOP = "<|im_start|>assistant\n", "<|im_end|>"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
TINY_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for item in m.content %}{% if item.type == 'image' %}" + PICTURE + "{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatML(Family):
    """What the ChatML families share: rendering by the folder's template, tools, stop ids."""

    opens_in_transformers = "4.52"
    tiny_tokens = ("<|endoftext|>", "<|im_start|>", STOP)
    tiny_template = TINY_TEMPLATE

    @classmethod
    def tiny_files(cls) -> dict[str, dict]:
        return {
            "config.json": {
                "model_type": cls.name, "bos_token_id": "<|endoftext|>", "eos_token_id": STOP, "hidden_act": "silu",
                "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 160, "num_attention_heads": 4,
                "max_position_embeddings": 32768, "num_hidden_layers": 2, "num_key_value_heads": 2,
                "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
                "use_sliding_window": False,
            }
        }

    def render(self, messages: list[dict], tools: list | None) -> list[tuple[list[int], bool]]:
        """(ids, trained) pieces. Raises UserError for tools, calls or thoughts that the template leaves out."""
        has_calls = any(m.get("tool_calls") for m in messages)
        (marked, marked_tools), mark = self.pieces.mark([without_pictures(messages), tools])
        text = self.render_text(restore_pictures(marked, messages), marked_tools, has_calls)
        pieces = cut_turns(text, HEADER, STOP)
        answers = [m for m in messages if m["role"] == "assistant"]
        responses = [piece for piece in pieces if piece.trained]
        if len(answers) != len(responses):
            raise UserError(
                f"the chat template renders {len(responses)} assistant turns of {len(answers)}; "
                "it merges or drops turns, so their loss cannot be told apart"
            )
        for number, (message, piece) in enumerate(zip(answers, responses, strict=True), 1):
            piece.trained = message.get("train", True)
            check_calls(message, piece.text.replace(mark, ""), number)
            if piece.trained:
                check_thoughts(message, piece.text, self.opening, number)
        for before, piece in pairwise(pieces):
            if piece.trained:
                before.text, piece.text = before.text + self.opening, piece.text.removeprefix(self.opening)
        if tools:
            self.check_tools(tools, marked_tools, mark)
        if self.options.labels == "official":  # the makers' recipe has a loss on the newline after the stop token too
            for piece, after in pairwise(pieces):
                if piece.trained and after.text.startswith("\n"):
                    piece.text, after.text = piece.text + "\n", after.text[1:]
        return [(self.pieces.ids(piece.text, mark), piece.trained) for piece in pieces]

    def render_text(self, messages: list[dict], tools: list | None, has_calls: bool) -> str:
        """The conversation by the folder's own template, or by Qwen's tool format where the run asks for it."""
        if self.options.tool_template == "qwen" and (tools or has_calls):
            return render_with_tools([dict(m, content=flat(m["content"])) for m in messages], tools, self.default_system())
        return self.apply_template(messages, tools)

    def apply_template(self, messages: list[dict], tools: list | None = None, ask: bool = False) -> str:
        """The text of the folder's template; with ask, up to where it wants an answer. UserError if it cannot render."""
        template = self.chat_template()
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=ask
            )
        except (TypeError, ValueError, KeyError, AttributeError, *template_errors()) as error:
            raise UserError(f"the chat template of {self.folder} cannot render this conversation: {error}") from None

    def check_tools(self, tools: list, marked_tools: list, mark: str) -> None:
        """UserError unless a conversation that says nothing else shows every tool's name."""
        shown = self.render_text([{"role": "user", "content": ""}], marked_tools, False).replace(mark, "")
        for name in (tool.get("function", tool).get("name", "") for tool in tools):
            if name not in shown:
                raise UserError(f"the chat template does not render the tool {name!r}; pass --tool_template qwen")

    def chat_template(self) -> str:
        """The folder's template: chat_template.jinja, chat_template.json, then the tokenizer's."""
        template = self.template_file or self.tokenizer.chat_template
        if not template:
            raise UserError(f"{self.folder}: has no chat template; copy chat_template.jinja of the Instruct model there")
        return template

    @cached_property
    def template_file(self) -> str | None:
        """The template that lies in a file of its own, read once."""
        if (path := self.folder / "chat_template.jinja").exists():
            return path.read_text(encoding="utf-8")
        if (path := self.folder / "chat_template.json").exists():
            template = read_json(path).get("chat_template")
            if not isinstance(template, str):
                raise UserError(f"{path}: holds no chat_template; download the file again")
            return template
        return None

    def default_system(self) -> str:
        """The system text that the folder's template puts where a conversation has none ("" if it puts none)."""
        text, header = self.apply_template([{"role": "user", "content": ""}]), "<|im_start|>system\n"
        return text[len(header) : text.index(STOP)] if text.startswith(header) else ""

    @cached_property
    def opening(self) -> str:
        """What the folder's template begins every answer with when it asks for one ("" for most, "<think>\\n")."""
        return self.apply_template([{"role": "user", "content": ""}], ask=True).partition(HEADER)[2]

    def answer_text(self, text: str) -> str:
        """With what the prompt began, once thoughts have ended; without empty ones, which the template puts in itself."""
        return re.sub(r"\A<think>\s*</think>\s*", "", self.opening + text) if "</think>" in text else text

    @property
    def stop_ids(self) -> list[int]:
        """<|im_end|>, and <|endoftext|> where the vocabulary has it (base models end with it)."""
        return [self.pieces.special[t] for t in (STOP, "<|endoftext|>") if t in self.pieces.special]


class Qwen2(ChatML):
    """Qwen2.5-0.5B and its siblings."""

    name = "qwen2"
    model_types = ("qwen2",)
    parts = {"language": "model"}
    blocks = ("model.layers",)
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    @classmethod
    def tiny_files(cls) -> dict[str, dict]:
        files = super().tiny_files()
        files["config.json"] |= {"architectures": ["Qwen2ForCausalLM"]}
        return files

    def build(self) -> nn.Module:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        return Qwen2ForCausalLM(Qwen2Config(**self.config))

    def decoder(self, net: nn.Module) -> nn.Module:
        return net.model


# ---- tools and pictures in messages ---------------------------------------------------------------------------------------


def without_pictures(messages: list[dict]) -> list[dict]:
    """The messages with None for each picture, so that only text is searched and copied.

    Neighbouring texts are joined (two halves of a special token must not meet later), and content without pictures
    becomes one string: text templates know no lists.
    """
    return [dict(m, content=joined(m.get("content") or "")) for m in messages]


def joined(content: str | list[dict]) -> str | list[dict]:
    """Content with neighbouring texts as one; a string if there is no picture in it."""
    if isinstance(content, str):
        return content
    items: list[dict] = []
    for kind, run in groupby(content, key=lambda item: item["type"]):
        if kind == "image":
            items += [{"type": "image", "image": None} for _ in run]
        else:
            items.append({"type": "text", "text": "".join(item["text"] for item in run)})
    return items if any(item["type"] == "image" for item in items) else flat(items)


def restore_pictures(marked: list[dict], messages: list[dict]) -> list[dict]:
    """Put a stand-in for each picture back where without_pictures left None (templates look for the key)."""
    for message in marked:
        for item in message["content"] if isinstance(message["content"], list) else []:
            if item["type"] == "image":
                item["image"] = "picture"
    assert len(images_of(marked)) == len(images_of(messages))
    return marked


def flat(content: str | list[dict]) -> str:
    """Typed content as one string, pictures as Qwen's placeholder."""
    if isinstance(content, str):
        return content
    return "".join(PICTURE if item["type"] == "image" else item["text"] for item in content)


def check_calls(message: dict, response: str, number: int) -> None:
    """UserError unless the response holds, beside the turn's own words, every tool call's name and arguments."""
    rest = response.replace(flat(joined(message.get("content") or "")), "", 1)
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        name, values = function["name"], function.get("arguments") or {}
        if not isinstance(values, dict):
            raise UserError(f"assistant turn {number}: the arguments of {name} are no object: {values!r:.60}")
        _, found, rest = rest.partition(name)  # calls stand in their order; the next one is searched behind this
        wanted = [json.dumps(part, ensure_ascii=False) for pair in values.items() for part in pair]
        missing = ([] if found else [name]) + [text for text in wanted if text not in rest]
        if missing:
            raise UserError(
                f"assistant turn {number}: the chat template leaves {missing[0]} of its tool call out of the text, so "
                "it would not be trained; pass --tool_template qwen"
            )


def check_thoughts(message: dict, response: str, opening: str, number: int) -> None:
    """UserError for a turn whose thoughts the template drops: Qwen3's keeps those behind the last question alone."""
    lost = "</think>" in flat(joined(message.get("content") or "")) and "</think>" not in response
    if lost or not response.startswith(opening):
        raise UserError(
            f"assistant turn {number}: the chat template renders it without <think>, as it does all turns before the last "
            'question, so it would be trained as the model is never asked; give it "train": false, or a row that ends with it'
        )


def render_with_tools(messages: list[dict], tools: list | None, default_system: str) -> str:
    """Qwen2.5's tool format, for templates that know no tools (Qwen2.5-VL's): the text that Qwen's models saw.

    Tools stand in the system turn one JSON a line; a call is {"name", "arguments"} between <tool_call> tags; results of
    tools are user turns, a run of them shares one turn.
    """
    dump = lambda value: json.dumps(value, ensure_ascii=False)  # noqa: E731
    system = messages[0]["content"] if messages[0]["role"] == "system" else default_system
    if tools:
        system += (
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
            + "".join("\n" + dump(tool) for tool in tools)
            + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
            "</tool_call>"
        )
    has_system = messages[0]["role"] == "system"
    turns = [("system", system)] if has_system or system else []
    previous = None
    for message in messages[has_system:]:
        role, text = message["role"], message["content"]
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
            if previous == "tool":
                text = turns.pop()[1] + "\n" + text
        previous = message["role"]
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            call_text = f'{{"name": {dump(function["name"])}, "arguments": {dump(function["arguments"])}}}'
            text += ("\n" if text else "") + f"<tool_call>\n{call_text}\n</tool_call>"
        turns.append((role, text))
    return "".join(f"<|im_start|>{role}\n{text}{STOP}\n" for role, text in turns)


def template_errors() -> tuple[type[Exception], ...]:
    """jinja's own errors; jinja comes with transformers' templates."""
    from jinja2 import TemplateError

    return (TemplateError,)
