"""Two answers to one prompt: UltraFeedback binarized, TRL's forms of it, and Countdown pairs as their sampler wrote them."""

from data.dialects import Preference, dialect, has
from data.turns import Problem, answer_of, role_of, short, turns_of


@dialect("chosen/rejected", has("chosen", "rejected"))
def _read_preference(row: dict) -> Preference:
    """Both sides hold the prompt (UltraFeedback binarized, whose `prompt` says its user turn once more), or neither does."""
    prompt, sides = row.get("prompt"), []
    for side in map(answer_of, (row["chosen"], row["rejected"])):
        has_prompt = any(role_of(turn) in ("system", "user", "tool") for turn in side)
        if has_prompt and isinstance(prompt, str) and prompt not in (turn.get("content", turn.get("value")) for turn in side):
            raise Problem("prompt is not in the chosen or rejected conversation", short(prompt))
        if not has_prompt and prompt is None:
            raise Problem("chosen and rejected are answers without a prompt", f"the row has {short(sorted(row))}; name what "
                          "they answer \"prompt\", text or turns")
        sides.append(side if has_prompt else turns_of(prompt) + side)
    return Preference(*sides)


@dialect("query + response_ws/response_ls", has("query", "response_ws", "response_ls"))
def _read_pair(row: dict) -> Preference:
    """The response with the higher score (ws) and the one with the lower (ls)."""
    prompt = turns_of(row["query"])
    return Preference(*([*prompt, {"role": "assistant", "content": row[key]}] for key in ("response_ws", "response_ls")))
