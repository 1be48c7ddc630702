"""Rows as Stanford's Alpaca has them: instruction, perhaps an input that it is about, output."""

from data.dialects import dialect, has


@dialect("Alpaca", has("instruction", "output"))
def read_alpaca(row: dict) -> list:
    """The input follows the instruction after a blank line; the chat template takes the place of Alpaca's frame."""
    question = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
