"""Family, the interface of a model family, and Model, the one network class that training, evaluation and merging use.

A family is one file in model/families/ with one subclass of Family. The rest of the project uses only what is defined
here, so a new model is one new file. Inside, everything runs packed: one row of T tokens holds several examples end to
end, the boundaries are explicit, and there is no padding anywhere.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from data.batches import Packed, pack_row
from data.boxes import Box, Convention
from data.errors import UserError
from data.labels import NO_LOSS, Example, PieceTokenizer, mask
from model.files import check_ids, read_json, read_tokenizer


@dataclass
class Options:
    """What a run may set about a family's encoding; None leaves the checkpoint's own value."""

    max_pixels: int | None = None
    tool_template: str = "none"
    labels: str = "ours"
    image_cache: str | None = None
    box_format: str = "keep"


class Family:
    """One model family: its network, names, templates and pictures. Subclasses fill in what is marked 'to define'.

    A family is made for one checkpoint folder: self.config is its config.json as a dict. The tokenizer is read at first
    use, so that weights alone (a merge, a reference) need none.
    """

    name = ""  # to define: the name that logs and `python -m model tiny` use
    model_types: tuple[str, ...] = ()  # to define: values of config.json's model_type that this family answers for
    prefixes: dict[str, str] = {}  # hub tensor name prefix -> module name prefix, longest first; {} = the same names
    parts: dict[str, str | tuple[str, ...]] = {}  # to define: "language" | "projector" | "vision" -> module name prefixes
    blocks: tuple[str, ...] = ()  # to define: module lists whose members are checkpointed
    quantized_parts: tuple[str, ...] = ("language",)  # parts whose linear layers --use_8bit and --use_4bit quantise
    lora_targets: tuple[str, ...] = ()  # to define: default target module names
    lora_parts: tuple[str, ...] = ("language",)  # parts that LoRA reaches by default
    tiny_tokens: tuple[str, ...] = ()  # to define: special tokens of the tokenizer that `python -m model tiny` makes
    tiny_template = ""  # to define: its chat template
    opens_in_transformers = ""  # the first release of transformers that has it under the module names used here, if any
    reference_learning_rate = 2e-4  # LoRA's usual rate at hidden size 2048; see learning_rate()

    def __init__(self, folder: str | Path, options: Options | None = None):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self.options = options or Options()

    @classmethod
    def tiny_files(cls) -> dict[str, dict]:
        """To define: the JSON files of a tiny checkpoint in the hub's original form, config.json with it. Its keys
        ..._token_id (those of text_config too) hold the token's text; model/tiny.py puts the ids there, and vocab_size."""
        raise NotImplementedError

    # ---- network ----------------------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """To define: the network with transformers' module names; called on the meta device."""
        raise NotImplementedError

    def decoder(self, net: nn.Module) -> nn.Module:
        """To define: the language model without its head (takes inputs_embeds, position_ids, lengths)."""
        raise NotImplementedError

    def embed(self, net: nn.Module, packed: Packed) -> torch.Tensor:
        """Input embeddings of a packed row, pictures in their places: (T, D), or wider by what the decoder itself splits
        off (features of a picture that join in later layers). Pictures that examples share, such as the two answers of a
        pair or the samples of a prompt, go through the vision tower once."""
        embeddings = net.get_input_embeddings()(packed.input_ids)  # (T, D)
        pictures = {id(pixels): pixels for pixels in packed.pixels if pixels}
        if not pictures:
            return embeddings
        seen = dict(zip(pictures, self.features(net, list(pictures.values())), strict=True))
        features = torch.cat([seen[id(pixels)] for pixels in packed.pixels if pixels])  # (places, D)
        embeddings = F.pad(embeddings, (0, features.shape[1] - embeddings.shape[1]))  # 0 more, but for those later layers
        return embeddings.index_copy(0, self.picture_places(packed), features.to(embeddings.dtype))

    def decoder_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Position ids in the form that the decoder takes them: (T,) -> (1, T), (3, T) -> (3, 1, T)."""
        return positions.unsqueeze(-2)

    def module_name(self, tensor_name: str) -> str:
        """The module parameter that a tensor of the checkpoint fills."""
        return rename(tensor_name, self.prefixes.items())

    def tensor_name(self, module_name: str) -> str:
        """The checkpoint's name of a module parameter: the inverse of module_name."""
        longest_first = sorted(((new, old) for old, new in self.prefixes.items()), key=lambda pair: -len(pair[0]))
        return rename(module_name, longest_first)

    def part_of(self, module_name: str) -> str:
        """The part ("language", "projector", "vision") that a module or parameter belongs to: longest prefix wins."""
        prefixes = [(p, part) for part, some in self.parts.items() for p in ([some] if isinstance(some, str) else some)]
        matching = [(len(p), part) for p, part in prefixes if f"{module_name}.".startswith(f"{p}.")]
        return max(matching)[1] if matching else "language"

    def learning_rate(self, full: bool) -> float:
        """Default rate. Adam's step does not grow with a layer's width but its effect does, so the rate goes with
        1 / hidden size (arXiv 2203.03466); full fine-tuning takes a tenth of LoRA's."""
        rate = self.reference_learning_rate * 2048 / self.hidden_size
        return rate / 10 if full else rate

    @property
    def text_config(self) -> dict:
        """The language model's part of config.json (nested in newer files, flat in older ones)."""
        return self.config.get("text_config", self.config)

    @property
    def hidden_size(self) -> int:
        return self.text_config["hidden_size"]

    # ---- text -------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self):
        """transformers' tokenizer of the checkpoint folder."""
        return self.load_tokenizer()

    @cached_property
    def pieces(self) -> PieceTokenizer:
        """What render tokenizes its pieces with."""
        return PieceTokenizer(self.tokenizer.backend_tokenizer)

    def load_tokenizer(self):
        """Read tokenizer.json as it stands, or build from vocab.json + merges.txt. Raises UserError for neither."""
        return read_tokenizer(self.folder)

    def render(self, messages: list[dict], tools: list | None) -> list[tuple[list[int], bool]]:
        """To define: (ids, trained) pieces of a conversation, one placeholder id for each picture."""
        raise NotImplementedError

    @property
    def stop_ids(self) -> list[int]:
        """To define: ids that end an answer."""
        raise NotImplementedError

    # ---- pictures ---------------------------------------------------------------------------------------------------

    image_token_id: int | None = None  # the placeholder id; None for a text family
    box_convention: Convention | None = None  # how the model was taught to write boxes, if it was

    def picture(self, image: Any) -> tuple[dict[str, torch.Tensor], int]:
        """To define for vision: one picture (path or PIL image) -> (its tensors, number of positions it takes)."""
        raise UserError(f"this model ({self.name}) takes no pictures, but the row has one; use a vision-language model")

    def seen_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) at which the model sees a picture of this size: what boxes in pixels count in."""
        return width, height

    def regions(self, width: int, height: int) -> list[Box | None]:
        """To define where positions are parts of a picture: for each, the part that it stands for, None for a separator."""
        return [(0, 0, width, height)] * self.picture_positions(width, height)

    def picture_positions(self, width: int, height: int) -> int:
        """To define for vision: positions that a picture of this size takes, without opening it."""
        raise UserError(f"this model ({self.name}) takes no pictures, but the row has one; use a vision-language model")

    def features(self, net: nn.Module, pictures: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """To define for vision: what the language model sees of each example's pictures, (places, D) an example."""
        raise NotImplementedError

    def picture_places(self, packed: Packed) -> torch.Tensor:
        """(places,) of a packed row that features go to, in order."""
        return torch.cat([torch.arange(*span) for span in packed.image_spans]).to(packed.input_ids.device)

    def join_pixels(self, pictures: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of all pictures of one example as one dict."""
        return {name: torch.cat([p[name] for p in pictures]) for name in pictures[0]} if pictures else {}

    def count_positions(self, pixels: dict[str, torch.Tensor]) -> list[int]:
        """To define for vision: how many positions each picture of an example takes."""
        return []

    def picture_ids(self, pixels: dict[str, torch.Tensor]) -> list[list[int]]:
        """The ids that take the place of each picture's placeholder: as many placeholders as the picture has positions."""
        return [[self.image_token_id] * count for count in self.count_positions(pixels)]

    def positions(self, input_ids: torch.Tensor, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Position ids of one example: (T,), or (3, T) where pictures count in two dimensions."""
        return torch.arange(len(input_ids))

    @property
    def pixels_per_position(self) -> int | None:
        """Pixels of a picture that one position stands for; None where more pixels need not mean more positions."""
        return None

    def count(self, messages: list[dict], tools: list | None, image_sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """(text, picture) positions of a conversation; pictures are (width, height) and are not opened."""
        text = sum(len(ids) for ids, _ in self.render(messages, tools)) - len(image_sizes)
        return text, sum(self.picture_positions(width, height) for width, height in image_sizes)

    def outline(self, messages: list[dict], tools: list | None, image_sizes: list[tuple[int, int]]) -> tuple[int, int, int]:
        """(text, picture, supervised) positions of a conversation, pictures not opened. Raises the UserErrors of encode()
        that do not depend on pixels."""
        num_pictures = sum(self.picture_positions(width, height) for width, height in image_sizes)
        pieces = expand_pictures(self.render(messages, tools), self.image_token_id, [[]] * len(image_sizes))
        check_ids(max((max(ids, default=0) for ids, _ in pieces), default=0), self.text_config["vocab_size"], self.folder)
        return sum(len(ids) for ids, _ in pieces), num_pictures, sum(len(ids) for ids, trained in pieces if trained)

    # ---- examples ---------------------------------------------------------------------------------------------------

    def encode(
        self, messages: list[dict], tools: list | None = None, max_length: int | None = None, *, id: str = "", where: str = ""
    ) -> Example:
        """A conversation as ids, labels, pixels and positions.

        Raises UserError, with the row's place in front, for a conversation that the template cannot render, for marks
        and pictures that do not agree, and for a row longer than max_length positions (rows are never cut).
        """
        try:
            example = self._encode(messages, tools)
            if max_length is not None and len(example) > max_length:
                text = len(example) - sum(end - start for start, end in example.image_spans)
                raise UserError(
                    f"the row takes {len(example)} positions ({text} of text, {len(example) - text} of pictures), more than "
                    f"--max_length {max_length}; raise --max_length or lower --max_pixels (a row is never cut)"
                )
        except UserError as error:
            raise (UserError(f"{where}: {error}") if where else error) from None
        example.id, example.where = id, where
        return example

    def _encode(self, messages: list[dict], tools: list | None) -> Example:
        pixels = self.join_pixels([self.picture(image)[0] for image in images_of(messages)])
        pieces = expand_pictures(self.render(messages, tools), self.image_token_id, self.picture_ids(pixels))
        return self.example(*mask(pieces), pixels)

    def example(
        self, input_ids: Iterable[int], labels: Iterable[int], pixels: dict[str, torch.Tensor] | None = None
    ) -> Example:
        """An Example from finished ids: adds the picture spans and the positions."""
        ids, pixels = torch.as_tensor(input_ids, dtype=torch.long), pixels or {}
        check_ids(int(ids.max()) if len(ids) else 0, self.text_config["vocab_size"], self.folder)
        spans, place = [], 0
        for count in self.count_positions(pixels):
            start = place + int((ids[place:] == self.image_token_id).nonzero()[0])
            place = start + count
            spans.append((start, place))
        return Example(
            input_ids=ids, labels=torch.as_tensor(labels, dtype=torch.long), pixels=pixels, image_spans=spans,
            positions=self.positions(ids, pixels),
        )

    def original_logits(self, model: "Model", examples: list[Example]) -> list[torch.Tensor]:
        """What Model.logits answers as_original_batch: each example alone, in a family whose rows are independent."""
        return [model.logits([example])[0] for example in examples]

    def answer_text(self, text: str) -> str:
        """The message's content in a generated text: all of it, unless the template itself writes an answer's first words."""
        return text

    def answer_start(self, example: Example) -> int:
        """Where the last trained answer begins (the end, where there is none): the number of ids that generation feeds."""
        trained = (example.labels != NO_LOSS).int()  # (T,)
        starts = (trained.diff(prepend=trained.new_zeros(1)) == 1).nonzero()
        return int(starts[-1]) if len(starts) else len(trained)

    def prompt_of(self, example: Example) -> Example:
        """An example up to its last trained answer, pictures included."""
        end = self.answer_start(example)
        prompt = self.example(example.input_ids[:end], [NO_LOSS] * end, example.pixels)
        return replace(prompt, id=example.id, where=example.where)

    def encode_prompt(self, messages: list[dict], tools: list | None = None, *, id: str = "", where: str = "") -> Example:
        """What generation feeds: the ids that encode puts before the last answer (a last assistant turn is left out). Made by
        rendering an answer and cutting before it, so training and generation cannot disagree."""
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        asked = [message | {"train": False} for message in messages]
        return self.prompt_of(self.encode([*asked, {"role": "assistant", "content": "x"}], tools, id=id, where=where))


class Model(nn.Module):
    """A network and its family. `net` is the transformers module, with its own names; this class adds the packed row."""

    def __init__(self, net: nn.Module, family: Family):
        super().__init__()
        self.net = net
        self.family = family
        self.prefix: nn.Module | None = None  # prefix tuning: layer number -> (keys, values) that every segment sees first

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """The output head's weight: (V, D)."""
        return self.net.get_output_embeddings().weight

    def hidden(self, packed: Packed) -> torch.Tensor:
        """Hidden states of a packed row after the last norm: (T, D)."""
        positions = packed.positions
        if self.prefix is not None:
            positions = positions + self.prefix.num_virtual_tokens
        out = self.family.decoder(self.net)(
            inputs_embeds=self.family.embed(self.net, packed)[None],  # (1, T, D)
            position_ids=self.family.decoder_positions(positions),
            use_cache=False,
            lengths=packed.lengths,
            prefix=self.prefix,  # the module: each block cuts its own part out of the leaf
        )
        return out.last_hidden_state[0]

    @torch.no_grad()
    def logits(self, examples: list[Example], as_original_batch: bool = False) -> list[torch.Tensor]:
        """(T_i, V) float32 logits of each example, through one packed row, as in training.

        as_original_batch reproduces what the original code does where rows of a batch influence each other; in a family
        whose rows are independent it is each example alone.
        """
        if as_original_batch:
            return self.family.original_logits(self, examples)
        packed = pack_row(examples).to(self.device)
        logits = torch.nn.functional.linear(self.hidden(packed), self.head_weight).float()  # (T, V)
        return list(logits.split(packed.lengths))


# ---- finding a family -----------------------------------------------------------------------------------------------------


def families() -> list[type[Family]]:
    """Every family, found by listing model/families/."""
    import model.families as package

    modules = [importlib.import_module(f"model.families.{info.name}") for info in pkgutil.iter_modules(package.__path__)]
    found = [c for m in modules for c in vars(m).values() if isinstance(c, type) and issubclass(c, Family)]
    return [c for c in dict.fromkeys(found) if c.name]  # a base class shared by families has no name


def find_family(folder: str | Path, options: Options | None = None) -> Family:
    """The family that a checkpoint folder's config.json belongs to. Raises UserError for an unknown model."""
    config = read_json(Path(folder) / "config.json")
    if "auto_map" in config:
        print(f"note: {folder}/config.json asks for code from its repository (auto_map); it is not run")
    for family in families():
        if config.get("model_type") in family.model_types:
            return family(folder, options)
    known = ", ".join(f"{c.name} ({'/'.join(c.model_types)})" for c in families())
    raise UserError(
        f"{folder}/config.json: model_type {config.get('model_type')!r} is none that this project knows ({known}); "
        "a new family is one file in model/families/"
    )


def rename(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """Replace the first prefix that name starts with."""
    return next((new + name[len(old) :] for old, new in prefixes if name.startswith(old)), name)


def images_of(messages: list[dict]) -> list:
    """The pictures of a conversation in reading order."""
    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    return [item["image"] for content in contents for item in content if item["type"] == "image"]


def expand_pictures(
    pieces: list[tuple[list[int], bool]], token: int | None, pictures: list[list[int]]
) -> list[tuple[list[int], bool]]:
    """Put each picture's ids in the place of its one placeholder, `token`."""
    marks = sum(ids.count(token) for ids, _ in pieces) if token is not None else 0
    if marks != len(pictures):
        raise UserError(f"the rendered conversation has {marks} picture marks for {len(pictures)} pictures; they must agree")
    if not pictures:
        return pieces
    left = iter(pictures)
    return [([i for t in ids for i in (next(left) if t == token else [t])], trained) for ids, trained in pieces]
