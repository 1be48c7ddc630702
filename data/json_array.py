"""The elements of a json array, found in blocks of bytes: the file never lies in memory, whatever its size.

Only strings and brackets are looked at: two regular expressions jump over everything between one bracket and the next,
strings and escapes included. What stands inside an element is judged later, when it is read as JSON, so that one bad
element does not hide the others. Costs about 5 ns a byte and one element of memory, at most MAX_ROW_BYTES of it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError
from data.turns import MAX_ROW_BYTES

BLOCK = 2**20
BLANK = re.compile(rb"[ \t\r\n]*")
SCALAR = re.compile(rb"[^,\]]*")
# For text without escapes. It cannot fail, so it never goes back; the bound keeps the matcher's own memory small.
TO_BRACKET = re.compile(rb'[^"\[\]{}]*(?:"[^"]*"[^"\[\]{}]*){0,500}')


def split_array(path: Path, begin: int) -> Iterator[tuple[int, int, int, bytes]]:
    """(element number from 1, byte offset, size, element) of the array whose `[` is the byte at `begin`; an element that
    is too long comes cut to MAX_ROW_BYTES + 1. UserError with the line for an array that is no array."""
    with open(path, "rb") as file:
        window, number = _Window(file, begin + 1), 0
        while (first := window.next_byte()) not in (b"]", b""):
            number += 1
            if first == b"," or not window.take_element(first):
                problem = "an element is missing" if first == b"," else "this element never ends"
                raise _broken(path, number, window.element_start, problem)
            yield number, window.element_start, window.offset - window.element_start, window.element()
            after = window.next_byte()
            if after == b",":
                window.take(1)
            elif after not in (b"]", b""):
                raise _broken(path, number, window.offset, "a comma is missing")
        if not first:
            raise _broken(path, number, window.offset, "the array is cut short")
        window.take(1)
        if window.next_byte():
            raise _broken(path, number, window.offset, "more follows the end of the array")


def _broken(path: Path, number: int, offset: int, problem: str) -> UserError:
    with open(path, "rb") as file:
        line = 1 + sum(file.read(min(BLOCK, offset - start)).count(b"\n") for start in range(0, offset, BLOCK))
    return UserError(
        f"{path.name}:{number} is not valid JSON ({problem}; line {line} of the file); correct it, or save "
        "one row a line as .jsonl, where one bad row does not hide the rest"
    )


class _Window:
    """What of a file is in memory: the bytes from the start of an element on, and a place in them."""

    def __init__(self, file, begin: int):
        file.seek(begin)
        self.file = file
        self.buffer, self.start, self.place = b"", begin, 0  # start: the offset in the file of buffer[0]
        self.masked = b""  # the buffer with other bytes for escaped quotes: one find() or jump reaches the end of a string
        self.element_start = begin
        self.dropped = b""  # the beginning of an element that is too long to be kept

    @property
    def offset(self) -> int:
        return self.start + self.place

    def more(self) -> bool:
        """Read a block; what lies before the element, or belongs to one that is too long, is forgotten."""
        block = self.file.read(BLOCK)
        while block.endswith(b"\\") and (rest := self.file.read(1)):  # an escape is not cut in two
            block += rest
        keep = self.element_start - self.start
        if not self.dropped and self.place - keep > MAX_ROW_BYTES:
            self.dropped = self.buffer[keep : keep + MAX_ROW_BYTES + 1]
        forget = self.place if self.dropped else min(keep, self.place)
        self.buffer = self.buffer[forget:] + block
        self.masked = self.masked[forget:] + block.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self.start, self.place = self.start + forget, self.place - forget
        return bool(block)

    def next_byte(self) -> bytes:
        """The next byte that is not blank, not taken; b"" at the end of the file."""
        self.element_start, self.dropped = self.offset, b""
        while True:
            self.element_start = self.start + BLANK.match(self.buffer, self.place).end()
            self.place = self.element_start - self.start
            if self.place < len(self.buffer) or not self.more():
                return self.buffer[self.place : self.place + 1]

    def take(self, count: int) -> None:
        self.place += count

    def take_element(self, first: bytes) -> bool:
        """Go to the end of the element that begins here, with `first`; False if the file ends before it."""
        if first == b'"':
            self.take(1)
            return self.end_string()
        if first not in (b"[", b"{"):
            self.place = SCALAR.match(self.buffer, self.place).end()
            while self.place == len(self.buffer) and self.more():
                self.place = SCALAR.match(self.buffer, self.place).end()
            return True
        depth = 0
        while True:
            place = TO_BRACKET.match(self.masked, self.place).end()
            found = self.masked[place : place + 1]
            if found == b'"' and place > self.place:  # 500 strings, or one whose end is not in memory: look again
                self.place = place
            elif found == b'"':
                self.take(1)
                if not self.end_string():
                    return False
            elif found:
                self.place = place + 1
                depth += 1 if found in b"[{" else -1
                if depth == 0:
                    return True
            else:
                self.place = place
                if not self.more():
                    return False

    def end_string(self) -> bool:
        """Go behind the quote that ends the string whose inside this is."""
        while (end := self.masked.find(b'"', self.place)) < 0:
            self.place = len(self.masked)
            if not self.more():
                return False
        self.place = end + 1
        return True

    def element(self) -> bytes:
        """The element between element_start and here."""
        return self.dropped or self.buffer[self.element_start - self.start : self.place][: MAX_ROW_BYTES + 1]
