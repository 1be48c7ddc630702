"""Saved runs of Proxy-Lite (local_trajectories/*.json): a run of n steps becomes n rows, one for each action.

The agent keeps its whole history but sees the newest screen alone, so a row is what it saw at one step: system, task,
its earlier actions one after the other, the screen of this step, and the action, which alone has a loss; each action is
trained exactly once. The system turn is the run's own. A run does not hold its tools: TOOLS has their names and arguments
in words of ours, and a list `tools` put into the run file wins, such as the one that the agent will be served with.
"""

from data.dialects import dialect, has
from data.turns import Problem, short


def _tool(name: str, description: str, **arguments: object) -> dict:
    """A tool in OpenAI's form; all of its arguments are required."""
    parameters = {"type": "object", "properties": arguments, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
ENTRIES = {"type": "array", "items": {"type": "object", "required": ["mark_id", "content"],
                                      "properties": {"mark_id": NUMBER, "content": TEXT}}}
TOOLS = [
    _tool("goto", "Open a web address.", url=TEXT),
    _tool("google_search", "Search the web, with a plan of what to look for.", query_plan=TEXT, query=TEXT),
    _tool("click", "Click the element with this mark.", mark_id=NUMBER),
    _tool("type", "Write text into the elements with these marks, and submit the form or not.", entries=ENTRIES,
          submit={"type": "boolean"}),
    _tool("scroll", "Scroll the element with this mark, or the page with -1.",
          direction={"type": "string", "enum": ["up", "down", "left", "right"]}, mark_id=NUMBER),
    _tool("back", "Go back to the page before."),
    _tool("wait", "Wait a few seconds."),
    _tool("reload", "Load the page again."),
    _tool("do_nothing_tool", "Do nothing."),
    _tool("return_value", "End the task with its result.", value=TEXT),
]


def expand(run: object) -> list[dict] | None:
    """The rows of a run, one a step; None for a file that is no run. Raises Problem for a run without messages or actions."""
    if not isinstance(run, dict) or not run.keys() >= {"run_id", "solver_history"}:
        return None
    history = run["solver_history"]
    messages = history.get("messages") if isinstance(history, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Problem("a run without messages", f"solver_history is {short(history)}")
    rows, screen = [], None
    for place, message in enumerate(messages):
        if message.get("role") != "assistant":
            screen = message if _is_screen(message) else screen
            continue
        before = [turn | {"train": False} if turn.get("role") == "assistant" else turn for turn in messages[:place]
                  if turn is screen or not _is_screen(turn)]
        rows.append({"id": f"{run['run_id']}-{len(rows) + 1}", "run_id": run["run_id"], "step": len(rows) + 1,
                     "messages": [_without_label(turn) for turn in [*before, message]], "tools": run.get("tools") or TOOLS})
    if not rows:
        raise Problem("a run without actions", f"{len(messages)} messages and none is the assistant's")
    return rows


def _is_screen(message: dict) -> bool:
    """The agent labels the turn of a screenshot; copies of a run may have lost the label, not the picture."""
    if message.get("role") == "assistant":
        return False
    if message.get("label"):
        return message["label"] == "screenshot"
    content = message.get("content")
    return isinstance(content, list) and any(isinstance(part, dict) and part.get("type") != "text" for part in content)


def _without_label(message: dict) -> dict:
    """The turn without the agent's bookkeeping."""
    return {key: value for key, value in message.items() if key != "label"}


@dialect("Proxy-Lite run", has("run_id", "step", "messages"))
def _read_step(row: dict) -> list:
    return row["messages"]


@dialect("whole Proxy-Lite run", has("run_id", "solver_history"))
def _read_run(row: dict) -> list:
    raise Problem("a whole run in one row", "give the run's own .json file: each of its steps is read as a row")
