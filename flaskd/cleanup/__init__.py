"""What runs between the last answer and the exit: actions, the plan, the runner, the record."""

from flaskd.cleanup.actions import ACTIONS, Action, action_specs
from flaskd.cleanup.attempt import Fate, StepResult
from flaskd.cleanup.callbacks import on_stop, with_callbacks
from flaskd.cleanup.context import StepContext, StepFailedError, StepTimedOutError
from flaskd.cleanup.outlet import aside
from flaskd.cleanup.plan import Plan, Reason, Step, build_plan
from flaskd.cleanup.record import read_record, results_as_json, write_record
from flaskd.cleanup.runner import Runner

__all__ = [
    "ACTIONS",
    "Action",
    "Fate",
    "Plan",
    "Reason",
    "Runner",
    "Step",
    "StepContext",
    "StepFailedError",
    "StepResult",
    "StepTimedOutError",
    "action_specs",
    "aside",
    "build_plan",
    "on_stop",
    "read_record",
    "results_as_json",
    "with_callbacks",
    "write_record",
]
