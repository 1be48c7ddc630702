"""Answers that copy a text off a picture: the character error rate, as OCR counts it; 0 is best."""

from eval.metrics import Reply
from eval.tasks import Task


def character_error_rate(reply: Reply) -> dict[str, float]:
    """Insertions, deletions and substitutions that turn the answer into the label, a character of the label."""
    distances = list(range(len(reply.label) + 1))  # from the answer's first n characters to each start of the label
    for n, character in enumerate(reply.response, 1):
        diagonal, distances[0] = distances[0], n
        for m, wanted in enumerate(reply.label, 1):
            changed = diagonal + (character != wanted)
            diagonal, distances[m] = distances[m], min(changed, distances[m] + 1, distances[m - 1] + 1)
    return {"character_error_rate": distances[-1] / max(1, len(reply.label))}


TASK = Task([character_error_rate], max_new_tokens=64)
