"""GUIAct of GUICourse, steps on web pages and phones: step_success, type_match and click_accuracy (eval/actions.py)."""

from eval.actions import step_success
from eval.tasks import Task

TASK = Task([step_success], max_new_tokens=256)
