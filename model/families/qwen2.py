"""Qwen2.5 text models of every size: transformers' Qwen2, the hub's chat template, ChatML turns.

The checkpoint's names are transformers' own. Turns are `<|im_start|>role\n...<|im_end|>\n`; a response piece runs from
after "assistant\n" through <|im_end|>, and the newline after it belongs to the next prompt piece.
"""

import json

from torch import nn

from data.errors import UserError
from data.labels import cut_turns
from model.family import Family, images_of, read_json

HEADER, STOP = "<|im_start|>assistant\n", "<|im_end|>"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


class ChatML(Family):
    """What the ChatML families share: rendering by the folder's template, tools, stop ids."""

    def render(self, messages: list[dict], tools: list | None) -> list[tuple[list[int], bool]]:
        """(ids, trained) pieces. Raises UserError for tools or calls that the template leaves out."""
        self.tokenizer  # noqa: B018 - read at first use
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
        prompt = "".join(piece.text for piece in pieces).replace(mark, "")
        for tool in tools or []:
            name = tool.get("function", tool).get("name", "")
            if name not in prompt:
                raise UserError(f"the chat template does not render the tool {name!r}; pass --tool_template qwen")
        return [(self.pieces.ids(piece.text, mark), piece.trained) for piece in pieces]

    def render_text(self, messages: list[dict], tools: list | None, has_calls: bool) -> str:
        """The conversation by the folder's own template, or by Qwen's tool format where the run asks for it."""
        if self.options.tool_template == "qwen" and (tools or has_calls):
            return render_with_tools([dict(m, content=flat(m["content"])) for m in messages], tools, self.default_system())
        template = self.chat_template()
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
        except (TypeError, ValueError, KeyError, AttributeError, *template_errors()) as error:
            raise UserError(f"the chat template of {self.folder} cannot render this conversation: {error}") from None

    def chat_template(self) -> str:
        """The folder's template: chat_template.jinja, chat_template.json, then the tokenizer's."""
        if (path := self.folder / "chat_template.jinja").exists():
            return path.read_text(encoding="utf-8")
        if (path := self.folder / "chat_template.json").exists():
            return read_json(path)["chat_template"]
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.folder}: has no chat template; copy chat_template.jinja of the Instruct model there")
        return self.tokenizer.chat_template

    def default_system(self) -> str:
        """The system text that the folder's template puts where a conversation has none ("" if it puts none)."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], chat_template=self.chat_template(), tokenize=False
        )
        opening = "<|im_start|>system\n"
        return text[len(opening) : text.index(STOP)] if text.startswith(opening) else ""

    @property
    def stop_ids(self) -> list[int]:
        """<|im_end|>, and <|endoftext|> where the vocabulary has it (base models end with it)."""
        self.tokenizer  # noqa: B018 - read at first use
        return [self.pieces.special[t] for t in (STOP, "<|endoftext|>") if t in self.pieces.special]


class Qwen2(ChatML):
    """Qwen2.5-0.5B and its siblings."""

    name = "qwen2"
    model_types = ("qwen2",)
    parts = {"language": "model"}
    blocks = ("model.layers",)
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def build(self) -> nn.Module:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        return Qwen2ForCausalLM(Qwen2Config(**self.config))

    def decoder(self, net: nn.Module) -> nn.Module:
        return net.model


# ---- tools and pictures in messages ---------------------------------------------------------------------------------------


def without_pictures(messages: list[dict]) -> list[dict]:
    """The messages with None for each picture, so that only text is searched and copied."""
    return [
        dict(m, content=[dict(i, image=None) if i["type"] == "image" else i for i in m["content"]])
        if isinstance(m.get("content"), list)
        else dict(m, content=m.get("content") or "")
        for m in messages
    ]


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
    """UserError unless the response holds every tool call's name and arguments."""
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        values = function.get("arguments") or {}
        wanted = [function["name"], *(json.dumps(v, ensure_ascii=False) for v in values.values())]
        missing = [text for text in wanted if text not in response]
        if missing:
            raise UserError(
                f"assistant turn {number}: the chat template leaves {missing[0]} of its tool call out of the text, so it "
                "would not be trained; pass --tool_template qwen"
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
    turns = [("system", system)] if system else []
    for message in messages[1:] if messages[0]["role"] == "system" else messages:
        role, text = message["role"], message["content"]
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
            if turns and turns[-1][0] == "user" and turns[-1][1].endswith("</tool_response>"):
                text = turns.pop()[1] + "\n" + text
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
