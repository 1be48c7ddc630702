"""GLM-4's text: tokenizer.model as a fast tokenizer, without tiktoken or the checkpoint's code, and the chat format.

The file has one line a token: its bytes in base64 and its rank. Merging by rank is byte-level BPE whose merges are all
ways to split a token into two other tokens, ordered by the rank of the whole; a piece of text that is a token itself
is taken as it is (ignore_merges). The 318,088 merges of the real file take about three seconds, once a process.
Special tokens keep the ids that tokenizer_config.json gives them, and text that spells one stays text.
"""

import base64
import json
from pathlib import Path

from data.errors import UserError
from data.labels import PieceTokenizer
from model.files import read_json

FILE = "tokenizer.model"
END, USER, ASSISTANT, TOOL = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>"
ROLES = {"system": "<|system|>", "user": USER, "assistant": ASSISTANT, "tool": TOOL, "observation": TOOL}
STOPS = (END, USER, TOOL)
PICTURE = ("<|begin_of_image|>", END, "<|end_of_image|>")
TOKENS = (
    END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", USER, ASSISTANT, TOOL, PICTURE[0], PICTURE[2],
    "<|begin_of_video|>", "<|end_of_video|>",
)
PATTERN = (  # contractions; words; numbers of up to three digits; punctuation; line ends; other blanks
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_glm_tokenizer(folder: Path):
    """transformers' tokenizer from tokenizer.model and tokenizer_config.json. UserError where one is damaged."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path, ranks, letters = folder / "tokenizer_config.json", read_ranks(folder / FILE), byte_letters()
    settings = read_json(path)
    if "auto_map" in settings:
        print(f"note: {path} asks for code from its repository (auto_map); it is not run")
    try:
        special = {entry["content"]: int(number) for number, entry in settings["added_tokens_decoder"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: added_tokens_decoder is no list of special tokens; download it again") from None
    clash, missing = set(special.values()) & set(ranks.values()), [token for token in TOKENS if token not in special]
    if clash or missing:
        problem = f"lacks {missing[0]}" if missing else f"gives {min(clash)} to a special token, which {FILE} has as text"
        raise UserError(f"{path}: {problem}; take both files from one model")
    words = {word: "".join(map(letters.__getitem__, word)) for word in ranks}
    merges = [(words[left], words[right]) for left, right in merges_of(ranks)]
    vocabulary = {words[word]: rank for word, rank in ranks.items()} | special
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), into_bytes])
    backend.decoder = decoders.ByteLevel()
    in_order = sorted(special, key=special.__getitem__)
    backend.add_special_tokens([AddedToken(content, normalized=False) for content in in_order])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=settings.get("eos_token"), pad_token=settings.get("pad_token"),
        additional_special_tokens=in_order, clean_up_tokenization_spaces=False, split_special_tokens=True,
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, which is its id. Raises UserError naming the line."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: not readable ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except ValueError:
            shown = line[:40].decode("latin-1")
            raise UserError(f"{path}:{number}: {shown!r} is no token in base64 and its rank; download it again") from None
    if len(set(ranks.values())) < len(lines) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: has tokens or ranks twice, or lacks one of the 256 bytes; download it again")
    return ranks


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every split of a token into two tokens, ordered by the ranks of the whole, the left and the right."""
    found = []
    for word, rank in ranks.items():
        for cut in range(1, len(word)):
            left, right = ranks.get(word[:cut]), ranks.get(word[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right))
    words = {rank: word for word, rank in ranks.items()}
    return [(words[left], words[right]) for _, left, right in sorted(found)]


def byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte: itself, or one from U+0100 on (GPT-2's table)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


# ---- the chat format ------------------------------------------------------------------------------------------------


def render_chat(
    messages: list[dict], tools: list | None, pieces: PieceTokenizer, official: bool
) -> list[tuple[list[int], bool]]:
    """(ids, trained) pieces: a role token, its line, the content, each tokenized by itself; no token at the end.

    A response is the line end after <|assistant|> (the model is asked with the role token alone), the content, and what
    ends the turn: the next role token, or the <|user|> that closes the conversation. The makers' recipe (official)
    trains the role token too and never what ends the turn. Raises UserError for an unknown role, and for tools.
    """
    if tools:
        raise UserError("this model's chat format has no place for a list of tools; describe them in the system turn")
    stops = [pieces.special[token] for token in STOPS]
    found, ends = [([pieces.special["[gMASK]"], pieces.special["<sop>"]], False)], False
    for message in messages:
        trained = message["role"] == "assistant" and message.get("train", True)
        for number, (role, body) in enumerate(turns_of(message, pieces)):
            chosen = trained and (official or number > 0)  # a tool call after words: the model itself opens its turn
            found += [([role], chosen or (ends and role in stops)), (body, trained)]
            ends = trained and not official
    return [*found, ([pieces.special[USER]], ends)]


def turns_of(message: dict, pieces: PieceTokenizer) -> list[tuple[int, list[int]]]:
    """(role id, ids after it) of a message's words and of each of its tool calls; an empty message has no turn.

    Pictures stand in front of the words. A tool call is a turn whose line names the function and whose content is its
    arguments; what the tool answers is an observation.
    """
    if message["role"] not in ROLES:
        raise UserError(f"role {message['role']!r}: this model knows {', '.join(ROLES)}")

    def plain(text: str) -> list[int]:
        return pieces.backend.encode(text, add_special_tokens=False).ids  # text that spells a special token stays text

    role, content = pieces.special[ROLES[message["role"]]], message.get("content") or []
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    pictures = [pieces.special[token] for item in items if item["type"] == "image" for token in PICTURE]
    words = "".join(item["text"] for item in items if item["type"] == "text")
    line = message.get("metadata", "") + "\n"
    turns = [(role, plain(line) + pictures + plain(words))] if words or pictures else []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        values = function.get("arguments") or {}
        values = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
        turns.append((role, plain(function["name"] + "\n") + plain(values)))
    return turns
