"""The built-in task: the centre of the answered box lies in the named button; text has to be the same."""

from data.demo import hits, parse_box
from eval.metrics import Reply
from eval.tasks import Task


def correct(reply: Reply) -> dict[str, float]:
    """Where the label is a box, whether the centre hits it; else whether the text is the label."""
    if parse_box(reply.label):
        return {"correct": float(hits(reply.response, reply.label))}
    return {"correct": float(reply.response.strip() == reply.label.strip())}


TASK = Task([correct], max_new_tokens=32)
