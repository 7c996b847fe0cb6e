"""What runs between the last answer and the exit: actions, the plan, the runner, the record."""

from flaskd.cleanup.actions import ACTIONS, action_specs
from flaskd.cleanup.actions.schedulers import pause_all, resume_all
from flaskd.cleanup.attempt import Spare
from flaskd.cleanup.callbacks import on_stop, with_callbacks
from flaskd.cleanup.calls import call_in_thread
from flaskd.cleanup.context import StepContext, StepFailedError, StepTimedOutError, Times, divided, for_steps
from flaskd.cleanup.discovery import DiscoveryRun, discover
from flaskd.cleanup.found import Found
from flaskd.cleanup.model import Action, Fate, Reason, Step, StepResult, names, results_as_json
from flaskd.cleanup.plan import AFTER_THE_DRAIN, BEFORE_THE_DRAIN, BESIDE_THE_DRAIN, Plan, build_plan, with_found
from flaskd.cleanup.preview import Frame, overview, with_service
from flaskd.cleanup.runner import Runner

__all__ = [
    "ACTIONS",
    "AFTER_THE_DRAIN",
    "BEFORE_THE_DRAIN",
    "BESIDE_THE_DRAIN",
    "Action",
    "DiscoveryRun",
    "Fate",
    "Found",
    "Frame",
    "Plan",
    "Reason",
    "Runner",
    "Spare",
    "Step",
    "StepContext",
    "StepFailedError",
    "StepResult",
    "StepTimedOutError",
    "Times",
    "action_specs",
    "build_plan",
    "call_in_thread",
    "discover",
    "divided",
    "for_steps",
    "names",
    "on_stop",
    "overview",
    "pause_all",
    "results_as_json",
    "resume_all",
    "with_callbacks",
    "with_found",
    "with_service",
]
