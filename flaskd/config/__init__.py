"""The configuration: YAML with places, interpolation, a typed model, and all faults at once in plain words.

Other packages use::

    configuration = load(path, actions=actions, overrides={"server.threads": 8})
    configuration.values.shutdown.deadline      # seconds
    configuration.restart_keys(newer)           # keys that a reload cannot change
    configuration.renewal_keys(newer)           # keys that only new workers can have
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flaskd.config.action_spec import REPLACEMENTS, ActionSpec, Fields, Phase, Scope
from flaskd.config.cleanup_model import CleanupConfig, DiscoveryConfig, Policy, PolicyDefaults, When
from flaskd.config.configuration import Configuration
from flaskd.config.faults import Fault, InvalidConfigError
from flaskd.config.fields import Duration, OneOrMany, Size, write_duration, write_size
from flaskd.config.loading import load, load_again, load_mapping
from flaskd.config.model import (
    AdminConfig,
    AppConfig,
    Config,
    ControlConfig,
    DrainConfig,
    EndpointConfig,
    ExitCodes,
    HealthConfig,
    IdleConfig,
    LogConfig,
    PoolConfig,
    RolesConfig,
    ServerConfig,
    ShutdownConfig,
)
from flaskd.config.schema import schema
from flaskd.config.settings import Settings
from flaskd.config.state_paths import KEY_FILE, MARK_FILE, WORKER
from flaskd.config.watch import FileWatch

if TYPE_CHECKING:
    from flaskd.config.pydantic_fields import Section

__all__ = [
    "KEY_FILE", "MARK_FILE", "REPLACEMENTS", "WORKER",
    "ActionSpec", "AdminConfig", "AppConfig", "CleanupConfig", "Config", "Configuration", "ControlConfig",
    "DiscoveryConfig", "DrainConfig", "Duration", "EndpointConfig", "ExitCodes", "Fault", "Fields", "FileWatch",
    "HealthConfig", "IdleConfig", "InvalidConfigError", "LogConfig", "OneOrMany", "Phase", "Policy",
    "PolicyDefaults", "PoolConfig", "RolesConfig", "Scope", "Section", "ServerConfig", "Settings", "ShutdownConfig",
    "Size", "When", "load", "load_again", "load_mapping", "schema", "write_duration", "write_size",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import pydantic when `Section` is asked for, as actions of other packages do."""
    if name != "Section":
        raise AttributeError(f"module 'flaskd.config' has no attribute {name!r}")
    return import_module("flaskd.config.pydantic_fields").Section
