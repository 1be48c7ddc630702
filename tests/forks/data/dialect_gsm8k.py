"""Rows as GSM8K has them: a question, and an answer that ends in `#### 72`."""

from data.dialects import dialect, has


@dialect("GSM8K", has("question", "answer"))
def read_gsm8k(row: dict) -> list:
    """The number that the answer ends in goes between tags, where the rewards look for it."""
    thoughts, _, number = row["answer"].rpartition("\n#### ")
    answer = f"{thoughts}\n<answer>{number}</answer>"
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}]
