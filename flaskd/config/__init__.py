"""The configuration: YAML with places, interpolation, a typed model, and all faults at once in plain words.

What the others need::

    configuration = load(path, actions=actions, overrides={"server.threads": 8})
    configuration.values.shutdown.deadline      # seconds
    configuration.restart_keys(newer)           # what a reload cannot change
"""

from flaskd.config.configuration import Configuration
from flaskd.config.faults import Fault, InvalidConfigError
from flaskd.config.fields import Duration, OneOrMany, Size, write_duration, write_size
from flaskd.config.loading import load, load_again, load_mapping
from flaskd.config.model import (
    ActionSpec,
    AdminConfig,
    AppConfig,
    CleanupConfig,
    Config,
    ControlConfig,
    DiscoveryConfig,
    DrainConfig,
    EndpointConfig,
    ExitCodes,
    HealthConfig,
    IdleConfig,
    LogConfig,
    Phase,
    Policy,
    PolicyDefaults,
    RolesConfig,
    Section,
    ServerConfig,
    ShutdownConfig,
    When,
)
from flaskd.config.schema import schema
from flaskd.config.state_paths import KEY_FILE, MARK_FILE
from flaskd.config.watch import FileWatch

__all__ = [
    "KEY_FILE", "MARK_FILE",
    "ActionSpec", "AdminConfig", "AppConfig", "CleanupConfig", "Config", "Configuration", "ControlConfig",
    "DiscoveryConfig", "DrainConfig", "Duration", "EndpointConfig", "ExitCodes", "Fault", "FileWatch", "HealthConfig",
    "IdleConfig", "InvalidConfigError", "LogConfig", "OneOrMany", "Phase", "Policy", "PolicyDefaults", "RolesConfig",
    "Section", "ServerConfig", "ShutdownConfig", "Size", "When", "load", "load_again", "load_mapping", "schema",
    "write_duration", "write_size",
]  # fmt: skip
