"""Learned judges of answers: a reward model in a local folder, or a model behind an OpenAI-compatible server.

A local reward model is a sequence classifier with one output, opened by transformers without any code of its folder; each
answer runs alone, so that its score depends on no neighbour and no padding. A server (NVIDIA's Nemotron reward, vLLM, ..)
is asked with the standard library: a request is repeated while the server is busy, requests are spaced, and every reply
is kept in reward_cache.jsonl, so that an evaluation that was cut off or is repeated pays for nothing twice.
"""

import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.errors import UserError
from eval.metrics import Reply
from training.journal import PatientFile

KEY = "REWARD_API_KEY"  # environment variable with the server's key
BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
NUM_TRIES, TIMEOUT_SECONDS, LONGEST_PAUSE, REQUESTS_AT_ONCE = 6, 120, 3600, 8
QUESTION = (
    "Compare two answers to the same conversation. Judge whether they do what was asked, are true and are no longer than "
    "they should be; the order in which they stand means nothing.\n\n[Conversation]\n{prompt}\n\n[Answer A]\n{first}\n\n"
    "[Answer B]\n{second}\n\nWhich is better? Reply with one letter: A, B, or C if neither is."
)


def conversation_of(reply: Reply) -> list[dict[str, str]]:
    """The turns before the answer and the answer, as texts. Raises UserError for a picture."""
    turns = []
    for message in reply.messages or [{"role": "user", "content": reply.prompt}]:
        content = message["content"]
        if not isinstance(content, str):
            if any(part["type"] == "image" for part in content):
                raise UserError("the row has a picture, which a reward model of texts cannot judge")
            content = "".join(part["text"] for part in content)
        turns.append({"role": message["role"], "content": content})
    return [*turns, {"role": "assistant", "content": reply.response}]


class RewardModel:
    """A sequence classifier with one output, in its own chat template: the output is the score."""

    def __init__(self, folder: str, device: str = "auto"):
        """Raises UserError for a folder that holds no such model in safetensors, or not all of its weights."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        from training.memory import check_device

        logging.set_verbosity_error()  # a page on each weight that is missing: said below in one sentence
        logging.disable_progress_bar()
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            self.net, found = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype="auto", use_safetensors=True, output_loading_info=True, **local
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--reward {folder}: transformers opens no sequence classifier from it ({error})") from None
        if self.net.config.num_labels != 1 or not self.tokenizer.chat_template:
            template = "a" if self.tokenizer.chat_template else "no"
            raise UserError(
                f"--reward {folder}: has {self.net.config.num_labels} outputs and {template} chat template; a reward model "
                "has one of each"
            )
        if found["missing_keys"]:
            names = ", ".join(sorted(found["missing_keys"])[:3])
            raise UserError(f"--reward {folder}: its files hold no {names}, so its scores would be random; take a reward model")
        self.net = self.net.to(check_device(device)).eval()
        self.num_bytes = sum(parameter.nbytes for parameter in self.net.parameters())

    def __call__(self, replies: list[Reply]) -> list[dict[str, float]]:
        return [{"score": self.score(conversation_of(reply))} for reply in replies]

    def score(self, messages: list[dict[str, str]]) -> float:
        """The model's output for a conversation, in the model's own precision whatever the caller's."""
        import torch

        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(self.net.device)  # (1, T)
        with torch.no_grad(), torch.autocast(self.net.device.type, enabled=False):
            return self.net(input_ids=ids).logits.float().item()


class Server:
    """MODEL@URL: the chat model MODEL of an OpenAI-compatible server whose routes begin with URL."""

    def __init__(self, name: str, folder: Path | None = None, requests_per_minute: float = 0, pause_seconds: float = 2.0):
        """Replies are kept in reward_cache.jsonl in `folder`; 0 requests a minute means as many as the server takes."""
        self.model, _, rest = name.partition("@")
        self.url = rest.rstrip("/") + "/chat/completions"
        self.spacing = 60 / requests_per_minute if requests_per_minute else 0.0
        self.pause_seconds, self.lock, self.next_start = pause_seconds, threading.Lock(), 0.0
        self.is_away = False  # it did not answer when last asked: it is tried once, not waited for at every answer anew
        self.file: PatientFile | None = None
        self.known: dict[str, str] = {}
        if folder:
            self.keep_in(folder)

    def keep_in(self, folder: Path) -> None:
        """Keep every reply in reward_cache.jsonl of this folder, those until now too; those that lie there are known."""
        path, until_now = folder / "reward_cache.jsonl", self.known
        self.file, self.known = PatientFile(path), {}
        if path.exists():
            lines = path.read_bytes()
            whole = lines.rfind(b"\n") + 1
            os.truncate(path, whole)  # what a kill left half written is asked again
            self.known = {line["key"]: line["reply"] for line in map(json.loads, lines[:whole].splitlines())}
        for key, reply in until_now.items():
            self.keep(key, reply)

    def ask(self, messages: list[dict[str, str]], **settings: Any) -> str:
        """The model's reply to a conversation. Raises UserError where the server refuses or stays away."""
        body = json.dumps({"model": self.model, "messages": messages, **settings}, sort_keys=True)
        key = hashlib.sha256(f"{self.url}\n{body}".encode()).hexdigest()
        if key not in self.known:
            reply = self.request(body.encode())
            with self.lock:
                self.keep(key, reply)
        return self.known[key]

    def keep(self, key: str, reply: str) -> None:
        """The first reply counts: for all who asked the same at once, and after a resume."""
        if key not in self.known:
            self.known[key] = reply
            if self.file:
                self.file.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n")

    def request(self, body: bytes) -> str:
        """One request, repeated while the server is busy: after the time that it asks for, else after twice the pause."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        if os.environ.get(KEY):
            request.add_unredirected_header("Authorization", f"Bearer {os.environ[KEY]}")  # for this host alone
        problem, num_tries = "", 1 if self.is_away else NUM_TRIES
        for number in range(num_tries):
            self.wait_for_turn()
            pause = self.pause_seconds * 2**number
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                    reply = json.load(response)
                self.is_away = False
                return self.text_of(reply)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                with suppress(OSError, http.client.HTTPException):  # its words may break off, too
                    problem += f" {error.read(300).decode(errors='replace').strip()}"
                if error.code not in BUSY:
                    hint = f"; give the key in the environment variable {KEY}" if error.code in (401, 403) else ""
                    raise UserError(f"{self.url} refuses {self.model}: {problem}{hint}") from None
                wanted = error.headers.get("Retry-After", "")
                pause = min(float(wanted), LONGEST_PAUSE) if wanted.isdecimal() else pause
            except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, or one that broke off
                problem = str(getattr(error, "reason", error))
            if number + 1 < num_tries:
                time.sleep(pause)
        self.is_away = True
        raise UserError(f"{self.url}: no answer, tried {num_tries} times ({problem}); its replies are kept, try again later")

    def wait_for_turn(self) -> None:
        """Sleep until the next request may start."""
        with self.lock:
            start = max(time.monotonic(), self.next_start)
            self.next_start = start + self.spacing
        time.sleep(max(0.0, start - time.monotonic()))

    def text_of(self, reply: Any) -> str:
        """The text of a reply. Raises UserError for one in another form."""
        try:
            message = reply["choices"][0]["message"]
            text = (message[0] if isinstance(message, list) else message)["content"]
        except (LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"{self.url} answers in another form than chat completions: {str(reply)[:200]}")
        return text


class ServedReward:
    """A reward model behind a server: its reply is a number, or names such as `reward:-4.1` or `helpfulness:1.6,..`."""

    def __init__(self, server: Server):
        self.server = server

    def __call__(self, replies: list[Reply]) -> list[dict[str, float]]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(self.score, replies))

    def score(self, reply: Reply) -> dict[str, float]:
        """The number named reward, else the one named helpfulness, else the only one. Raises UserError for none."""
        text = self.server.ask(conversation_of(reply))
        number = r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
        named = dict(re.findall(rf"([a-z]+)\s*[:=]\s*{number}", text.lower()))
        plain = re.fullmatch(number, text.strip().lower())
        found = named.get("reward", named.get("helpfulness", plain and plain[1]))
        if found is None:
            raise UserError(f"{self.server.url}: {self.server.model} answers no reward but {text[:80]!r}; pairwise:MODEL@URL "
                            "asks a chat model which of two answers is better")  # fmt: skip
        return {"score": float(found)}


class Comparison:
    """A chat model behind a server that says which of two answers is better."""

    def __init__(self, server: Server):
        self.server = server

    def __call__(self, first: Reply, second: Reply) -> float:
        """1 where the first is better, 0 where the second is, 0.5 for neither. Raises UserError for another reply."""
        turns = conversation_of(first)[:-1]
        prompt = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        question = QUESTION.format(prompt=prompt, first=first.response, second=second.response)
        text = self.server.ask([{"role": "user", "content": question}], temperature=0, max_tokens=8)
        found = re.fullmatch(r"\W*(?:[Aa]nswer\W+)?([ABC])\W*", text)
        if found is None:
            raise UserError(f"{self.server.url}: {self.server.model} answers neither A, B nor C but {text[:80]!r}")
        return {"A": 1.0, "B": 0.0, "C": 0.5}[found[1]]
