"""Answers in flight: buffers that are written in place, and the step that adds a token to each, replayed on a card.

Prompts are padded on the left, so that all answers write the same column of the KV cache. It is allocated once a batch, and
attention is shown its first rows and columns: a block of columns more when those are full (an answer that ends early never
reads the room of a long one), fewer rows when answers have ended; nothing is copied but rows into gaps. On a card a step is
hundreds of launches, at small batches little else; there it is recorded once for each number of rows and columns as a CUDA
graph, which is one launch, and rows are halved instead of leaving one by one. A recording reads and writes the same
addresses for ever: what changes from step to step is in a buffer of Decoding. On the CPU the same function is called plainly.
"""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import Cache

from data.batches import pack_row
from data.labels import Example
from model.family import Model
from model.head import CHUNK_BYTES
from training.guards import is_out_of_memory

BLOCK = {"cpu": 16, "cuda": 128}  # columns that are shown at once; on a card each number of them is a recording of its own
Pick = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class KVCache(Cache):
    """Keys and values of B rows and S columns in the computing dtype (under autocast rotary tables would leave fp32 keys
    beside bf16 values). The first num_rows and num_columns are shown; `places` (T,) are the columns to write next, `column`
    the last of them, which is known without asking the card."""

    is_compileable = True  # so transformers makes its masks without looking into them, which would wait for the card

    def __init__(self, num_rows: int, num_columns: int, embeddings: torch.Tensor):
        super().__init__(layers=[])
        self.size, self.device = (num_rows, num_columns), embeddings.device
        kind = self.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else embeddings.dtype
        self.buffers: list[list[torch.Tensor]] = []  # of each layer keys and values, (B, Hkv, S, K) each

    def set_places(self, num_rows: int, start: int, end: int) -> None:
        """Write columns start .. end - 1 of the first num_rows next, which are shown up to there."""
        self.num_rows, self.num_columns, self.column = num_rows, end, end - 1
        self.places = torch.arange(start, end, device=self.device)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write (num_rows, Hkv, T, K) into the places; returns all that is shown."""
        new = [x.to(self.dtype) for x in (key_states, value_states)]
        if layer_idx == len(self.buffers):
            rows, columns = self.size
            self.buffers.append([x.new_empty(rows, x.shape[1], columns, x.shape[3]) for x in new])
        shown = [x[: self.num_rows, :, : self.num_columns] for x in self.buffers[layer_idx]]
        for buffer, states in zip(shown, new, strict=True):
            buffer.index_copy_(2, self.places, states)
        return shown

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return self.places[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.num_columns, 0

    def advance(self) -> None:
        """Write one column further next. Where it is not shown yet a block more is, of zeros: what a mask hides must still be
        a number."""
        self.places += 1
        self.column += 1
        if self.column == self.num_columns:
            block = BLOCK[self.device.type]
            self.num_columns = min((self.column // block + 1) * block, self.size[1])
            for buffer in (x for layer in self.buffers for x in layer):
                buffer[: self.num_rows, :, self.column : self.num_columns] = 0

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """What is shown of rows source (n,) into rows target (n,); takes the room of n rows of one layer."""
        for buffer in (x for layer in self.buffers for x in layer):
            shown = buffer[:, :, : self.num_columns]
            shown.index_copy_(0, target, shown.index_select(0, source))


class Decoding:
    """B answers in flight, each in a slot: a row of every buffer. Slots from cache.num_rows on are no longer in use. Columns
    of the cache are the prefix's, then the prompts', which end at `start`, then one for each token that is fed."""

    def __init__(self, model: Model, prompts: list[Example], uniform: torch.Tensor, pick: Pick):
        """Run the prompts and choose the first tokens. uniform is (B, max_new_tokens), pick as eval/generate.py's choose;
        the samples of a prompt stand side by side and share its run."""
        self.model, self.decoder, self.uniform, self.pick = model, model.family.decoder(model.net), uniform, pick
        self.num_prefix = 0 if model.prefix is None else model.prefix.num_virtual_tokens  # columns
        embeddings, positions, real = self._pad(prompts)
        self.start = self.num_prefix + real.shape[1]  # the column of the first token that is chosen
        self.cache = KVCache(len(uniform), self.start + uniform.shape[1], embeddings)
        self._write_prefix(len(prompts))
        hidden = self._run_prompts(embeddings, positions, real)  # (n, D)
        self._choose(self._spread(hidden, positions))

    def _pad(self, prompts: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings (n, L, D) and positions (n, L) or (3, n, L), padded on the left, and where they are real (n, L).
        Pictures are embedded on one packed row, which is then spread."""
        packed = pack_row(prompts).to(self.model.device)
        embeddings = self.model.family.embed(self.model.net, packed)  # (T, D)
        lengths = torch.tensor(packed.lengths, device=self.model.device)
        longest = max(packed.lengths)
        real = torch.arange(longest, device=self.model.device) >= longest - lengths[:, None]
        batch = embeddings.new_zeros(*real.shape, embeddings.shape[-1])
        batch[real] = embeddings
        positions = packed.positions.new_zeros(*packed.positions.shape[:-1], *real.shape)
        positions[..., real] = packed.positions
        return batch, positions + self.num_prefix, real

    def _write_prefix(self, num_prompts: int) -> None:
        """Keys and values of prefix tuning in front of every row, also of its padding."""
        self.cache.set_places(num_prompts, 0, self.num_prefix)
        for layer in range(self.model.prefix.num_layers if self.num_prefix else 0):
            self.cache.update(*(x.expand(num_prompts, -1, -1, -1) for x in self.model.prefix(layer)), layer)

    def _run_prompts(self, embeddings: torch.Tensor, positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Each once, in the first n rows: (n, D) behind the last token of each. seen: the columns that a row may look at."""
        self.cache.set_places(len(real), self.num_prefix, self.start)
        self.seen = F.pad(F.pad(real, (self.num_prefix, 0), value=True), (0, self.uniform.shape[1]))  # (n, S)
        return self._hidden(embeddings, positions)

    def _spread(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A row for each answer, (n, D) -> (B, D). The buffers that steps read and write are made here, once for all."""
        num_rows, num_prompts = len(self.uniform), len(hidden)
        slots = torch.arange(num_rows, device=hidden.device)
        prompt_of = slots // (num_rows // num_prompts)  # (B,)
        if num_rows > num_prompts:
            self.cache.copy_rows(prompt_of, slots)
        self.cache.set_places(num_rows, self.start - 1, self.start)
        self.seen = self.seen[prompt_of]  # (B, S)
        # pictures' rows of positions stand apart, an answer's go on together from the furthest
        self.last = positions.amax(-1).view(-1, num_prompts).amax(0)[prompt_of]  # (B,)
        self.tokens, self.chosen = torch.zeros_like(slots), torch.zeros_like(slots)
        self.logprobs = torch.zeros_like(slots, dtype=torch.float32)
        self.head = self.model.head_weight.to(hidden.dtype)
        return hidden[prompt_of]

    def _hidden(self, embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(num_rows, D) behind the last of the tokens that the shown rows get."""
        out = self.decoder(
            inputs_embeds=embeddings, attention_mask=self.seen[: self.cache.num_rows, : self.cache.num_columns],
            position_ids=positions, past_key_values=self.cache, use_cache=True,
        )
        return out.last_hidden_state[:, -1]

    def _choose(self, hidden: torch.Tensor) -> None:
        """The next token of the shown rows and its log-probability, by the numbers that are drawn for it."""
        drawn = self.uniform.index_select(1, self.cache.places - (self.start - 1))[:, 0]  # (B,)
        num_rows = max(1, CHUNK_BYTES // (4 * len(self.head)))
        for place in range(0, len(hidden), num_rows):
            rows = slice(place, min(place + num_rows, len(hidden)))
            logits = F.linear(hidden[rows], self.head).float()  # (n, V)
            self.chosen[rows], self.logprobs[rows] = self.pick(logits, drawn[rows])

    def feed(self) -> None:
        """Run `tokens` at the current column and choose what follows. It changes nothing that it reads, so it may run again."""
        rows = slice(self.cache.num_rows)
        self.seen.index_fill_(1, self.cache.places, True)
        embeddings = self.model.net.get_input_embeddings()(self.tokens[rows, None])  # (B, 1, D)
        self._choose(self._hidden(embeddings, self.last[rows, None]))

    def advance(self) -> None:
        """Move to the next column with the chosen tokens."""
        self.tokens.copy_(self.chosen)
        self.last += 1
        self.cache.advance()

    def keep(self, slots: list[int], num_rows: int) -> list[int]:
        """Keep `slots`, all within the first num_rows: those beyond move into gaps. Returns where each of `slots` is now."""
        behind = [slot for slot in slots if slot >= num_rows]
        gaps = sorted(set(range(num_rows)) - set(slots))[: len(behind)]
        self.cache.num_rows = num_rows
        if behind:
            source, target = (torch.tensor(places, device=self.tokens.device) for places in (behind, gaps))
            self.cache.copy_rows(source, target)
            for buffer in (self.seen, self.uniform, self.last, self.chosen):
                buffer.index_copy_(0, target, buffer.index_select(0, source))
        moved = dict(zip(behind, gaps, strict=True))
        return [moved.get(slot, slot) for slot in slots]


def decode(decoding: Decoding, stops: list[int]) -> tuple[list[list[int]], list[list[float]]]:
    """(ids, log-probabilities) of each row, until a stop id or for the max_new_tokens that `uniform` has numbers for."""
    step = Replay(decoding.feed, graphs_of(decoding.model.device))
    num_rows, max_new_tokens = decoding.uniform.shape
    ids: list[list[int]] = [[] for _ in range(num_rows)]
    logprobs: list[list[float]] = [[] for _ in range(num_rows)]
    running = {slot: slot for slot in range(num_rows)}  # slot -> answer
    for count in range(1, max_new_tokens + 1):
        tokens, values = decoding.chosen.tolist(), decoding.logprobs.tolist()
        for slot, row in running.items():
            ids[row].append(tokens[slot])
            logprobs[row].append(values[slot])
        running = {slot: row for slot, row in running.items() if tokens[slot] not in stops}
        if not running or count == max_new_tokens:
            break
        num_rows = step.rows_for(len(running), num_rows)
        if num_rows < decoding.cache.num_rows:
            running = dict(zip(decoding.keep(list(running), num_rows), running.values(), strict=True))
        decoding.advance()
        step((decoding.cache.num_rows, decoding.cache.num_columns))
    return ids, logprobs


# ---- recorded and replayed --------------------------------------------------------------------------------------------


class Replay:
    """A function of fixed buffers, without arguments or a result, that runs plainly or, with graphs, is recorded at the
    second call with a shape and replayed from then on. Running it twice must have the effect of once. Rows only leave and
    columns only come, so a shape never returns: its recording is dropped, beside which the next one might not fit."""

    def __init__(self, function: Callable[[], None], graphs: "Graphs | None"):
        self.function, self.graphs = function, graphs
        self.shape: tuple[int, int] | None = None
        self.recording: Callable[[], None] | None = None  # of that shape

    def rows_for(self, count: int, num_rows: int) -> int:
        """Rows to go on with when `count` are left of num_rows: as many; with graphs num_rows, halved while they fit."""
        if self.graphs is None:
            return count
        while count <= (half := (num_rows + 1) // 2) < num_rows:
            num_rows = half
        return num_rows

    def __call__(self, shape: tuple[int, int]) -> None:
        if self.graphs is None:
            return self.function()
        try:
            if shape != self.shape:
                self.shape, self.recording = shape, None
                self.graphs.try_out(self.function)
                return
            if self.recording is None:
                self.recording = self.graphs.record(self.function)
            self.recording()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            Graphs.usable = False
            self.graphs = None
            reason = str(error).splitlines()[0]
            print(f"note: this model's decoding step cannot be recorded as a CUDA graph ({reason}); answers take longer")
            self.function()


class Graphs:
    """CUDA graphs, recorded on one stream."""

    usable = True  # False once a step could not be recorded: it is not tried again in this process

    def __init__(self, device: torch.device):
        self.stream = recording_stream(device)

    def try_out(self, function: Callable[[], None]) -> None:
        """Run it plainly on the stream that records, so that kernels and workspaces are there. RuntimeError where it
        waits for the card, which no graph can."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # it misses some waits; those fail in record()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self.stream):
                function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            here.wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What launches all of it at once. Recording runs nothing."""
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self.stream), recording:  # a recording that fails leaves its stream on, the outer one ends it
            function()
        return graph.replay


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process: libraries keep a workspace for every stream they have met."""
    return torch.cuda.Stream(device)


def graphs_of(device: torch.device) -> Graphs | None:
    return Graphs(device) if device.type == "cuda" and Graphs.usable else None
