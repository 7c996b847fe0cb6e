"""The keys of ``cleanup``: policies, their defaults, and discovery."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from flaskd.config.action_spec import Phase, Scope
from flaskd.config.faults import Faults
from flaskd.config.fields import Duration, OneOrMany, PolicyName, SomeText
from flaskd.config.kind import Around, Schema
from flaskd.config.nodes import Node
from flaskd.config.nodes import Path as NodePath
from flaskd.config.settings import Settings, field, section


def _filled_in(description: str, **more: Any) -> Any:
    """Make a field that may be left out; it is filled in from elsewhere once the whole file is read."""
    return field(None, description=description, told=False, **more)


OnFailure = Literal["continue", "skip_dependents", "abort"]


class PolicyDefaults(Settings):
    """The values of policies that do not set these keys."""

    timeout: Duration = field(5.0, gt=0, description="How long a policy may take.")
    on_failure: OnFailure = field("continue", description="What a failed policy means for the others.")
    retries: int = field(0, ge=0, le=10, description="How often a failed policy is tried again.")


class When(Settings):
    """On which stops a policy runs; a condition that is left out is always met."""

    reason: OneOrMany[Literal["signal", "control", "endpoint", "idle", "failure", "reload", "recycle"]] = field(
        [], description="Only on stops for one of these reasons; a worker is replaced at a reload, or is recycled."
    )
    outcome: Literal["clean", "degraded"] | None = field(None, description="Only after a drain with this outcome.")


class _OfTheAction(Around):
    """The fields of an action; they are read later, because their kinds depend on the action."""

    def read(self, node: Node, path: NodePath, faults: Faults) -> None:  # noqa: ARG002 - see above
        return None

    def write(self, value: Any) -> Any:
        return value.model_dump(mode="json", by_alias=True)

    def schema(self, definitions: dict[str, Schema]) -> Schema:  # noqa: ARG002 - likewise
        return {"type": ["object", "null"]}


class Policy(Settings):
    """When and how one cleanup action runs."""

    use: str = field(description="The action.")
    phase: Phase = _filled_in("The phase it runs in; default: the action's own.")
    with_: Annotated[Any, _OfTheAction] = _filled_in("The action's own fields.", alias="with")
    timeout: Duration = _filled_in("How long it may take; default: cleanup.defaults.timeout.", gt=0)
    retries: int = _filled_in("How often it is tried again; default: cleanup.defaults.retries.", ge=0, le=10)
    on_failure: OnFailure = _filled_in("What its failure means for others; default: as in cleanup.defaults.")
    scope: Scope = _filled_in("With workers: each worker runs it, or the daemon once; default: the action's own.")
    after: OneOrMany[str] = field([], description="Policies that must have ended before; same phase or earlier.")
    when: When = section(When)
    always: bool = field(False, description="Runs even after an abort, and has a share of the reserve of its own.")
    enabled: bool = field(
        True, description="false: as if it were not written; discovery still closes what the policy would end."
    )

    @property
    def hidden(self) -> tuple[str, ...]:
        """The texts that were interpolated into the action's fields; no message may show them."""
        hidden: tuple[str, ...] = self.__dict__.get("hidden", ())
        return hidden

    def hiding(self, texts: Iterable[str]) -> Self:
        """The same policy with these texts as interpolated ones."""
        return self._with(hidden=tuple(texts))


class DiscoveryConfig(Settings):
    """What happens to open objects of the app that no policy names; the mode may stand alone, as one word."""

    alone: ClassVar[str] = "mode"
    mode: Literal["auto", "report", "off"] = field(
        "auto", description="auto: find it and close it; report: find it and say so; off: do not look."
    )
    exclude: OneOrMany[SomeText] = field(
        [], description="Names of what is left alone, as `flaskd plan` shows them; or actions, for all of their kind."
    )


class CleanupConfig(Settings):
    """What is done after the drain."""

    discovery: DiscoveryConfig = section(DiscoveryConfig)
    max_parallel: int = field(8, ge=1, le=64, description="Policies of one phase that run at the same time.")
    defaults: PolicyDefaults = section(PolicyDefaults)
    policies: dict[PolicyName, Policy] = field({}, description="Cleanup policies by name, kept in this order.")
