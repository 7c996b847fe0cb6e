"""Translates settings of gunicorn, waitress-serve and `flask run` into flaskd's configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flaskd.cli.foreign import FOR_SERVE, NOTHING
from flaskd.cli.python_values import CPUS, Filled, Setting, Unread
from flaskd.text import escaped
from flaskd.units import format_duration, parse_duration

_AFTER_THE_DRAIN = 10.0
"""How many seconds a stop has for cleanup, in addition to the time for requests in flight."""


@dataclass
class Translation:
    """The result: `values` by dotted key, the origin of each, and a line for each setting without an equivalent."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set a value of flaskd's configuration."""
        self.values[key] = value
        self.origins[key] = escaped(origin)

    def drop(self, key: str, why: str) -> None:
        """Remove a value that cannot be written, and note why."""
        del self.values[key]
        self.note(self.origins.pop(key), f"it cannot be {key}: {why}")

    def note(self, origin: str, words: str) -> None:
        """Note a setting that has no equivalent, or differs."""
        self.notes.append(escaped(f"{origin}: {words}"))


class Untranslatable(Exception):  # noqa: N818 - becomes a note
    """A value cannot be translated; the text says why."""


def gunicorn(
    settings: Mapping[str, Setting], where: Callable[[str, int], str], hooks: Mapping[str, int]
) -> Translation:
    """Translate gunicorn's settings, by their names in its configuration file; `where` describes a place."""
    done = Translation()
    for name, (line, value, changed) in settings.items():
        origin = where(name, line)
        if name in _GUNICORN or _advice(name):
            _translate(done, name, value, origin)
        if changed and name in _GUNICORN:
            done.note(origin, f"{changed}, too, perhaps to another value")
    for name, line in hooks.items():
        if name in _HOOKS:
            done.note(where(name, line), _HOOKS[name])
    _complete(done, settings)
    return done


_ONE_AT_A_TIME = (
    "gunicorn ran one request at a time in each worker, flaskd runs 4 (server.threads); write 1 if the app is not "
    "safe for threads"
)


def _translate(done: Translation, name: str, value: Any, origin: str) -> None:
    if name not in _GUNICORN:
        if value not in (None, False, "", [], 0):
            done.note(origin, _advice(name))
    elif isinstance(value, Unread):
        key = _GUNICORN[name][0]
        done.note(origin, f"{value}; it would be {key}" if key else f"{value}")
    elif value is not None:
        key, convert = _GUNICORN[name]
        try:
            converted = convert(value)
        except (Untranslatable, ValueError, TypeError) as why:
            done.note(origin, f"{why}")
        else:
            if converted is not None:
                done.put(key, converted, origin)


def _complete(done: Translation, settings: Mapping[str, Setting]) -> None:
    """Set what depends on several settings together."""
    values = done.values
    kind = str(settings["worker_class"].value) if "worker_class" in settings else "sync"
    one_at_a_time = kind in {"sync", "gunicorn.workers.sync.SyncWorker"} and values.get("server.threads", 1) == 1
    if "server.request_timeout" in values and not one_at_a_time:  # gunicorn ends a worker then that shows no life
        done.put("pool.stuck_after", values.pop("server.request_timeout"), done.origins.pop("server.request_timeout"))
    if "server.trusted_proxy" in values:
        done.put(
            "server.trusted_proxy_headers", ["x-forwarded-proto"], "what gunicorn heeds; x-forwarded-for tells clients"
        )
    if "server.workers" not in values:
        said = "workers" in settings and settings["workers"].value is not None
        why = "how many gunicorn had is not known: see below" if said else "gunicorn has one worker where none is said"
        done.put("server.workers", 1, why)
    if "threads" not in settings and any(each in kind for each in ("sync", "thread")):
        done.note("threads", _ONE_AT_A_TIME)
    if isinstance(drain := values.get("shutdown.drain.timeout"), str) and not isinstance(drain, Filled):
        deadline = format_duration(parse_duration(drain) + _AFTER_THE_DRAIN)
        done.put("shutdown.deadline", deadline, "the drain, and time to clean up; TimeoutStopSec= of a unit is longer")


def waitress(options: Mapping[str, Any], where: Callable[[str], str]) -> Translation:
    """Translate options of waitress-serve, by their names without dashes."""
    done = Translation()
    listen = list(options.get("listen", []))
    if "host" in options or "port" in options:
        listen.append(f"{_host(options.get('host', '0.0.0.0'))}:{options.get('port', '8080')}")  # noqa: S104 - its default
    listen = [*listen, *(f"unix:{Path(each).absolute()}" for each in options.get("unix-socket", []))]
    done.put("server.listen", _listed([_address(each, "8080") for each in listen or ["0.0.0.0:8080"]]), "its addresses")
    for name, value in options.items():
        key = "server." + name.replace("-", "_")
        if name in _AS_IN_WAITRESS:
            done.put(key, _plain(value), where(name))
        elif name == "trusted-proxy-headers":
            done.put(key, str(value).replace(",", " ").split(), where(name))
        elif name == "channel-timeout":
            done.put(key, f"{value}s", where(name))
        elif name == "app":
            done.put("app.target", f"{value}()" if "call" in options else value, "the app")
        elif name not in {"listen", "host", "port", "unix-socket", "call"}:
            done.note(where(name), _SAID.get(name) or FOR_SERVE.get(f"--{name}", NOTHING))
    return done


def flask_run(options: Mapping[str, Any], where: Callable[[str], str]) -> Translation:
    """Translate options of ``flask run``, by their names without dashes."""
    done = Translation()
    address = f"{_host(options.get('host', '127.0.0.1'))}:{options.get('port', '5000')}"
    done.put("server.listen", _address(address, "5000"), "its address")
    for name, value in options.items():
        if name == "app":
            done.put("app.target", value, "the app")
        elif name not in {"host", "port"} and not name.startswith("no-"):
            done.note(where(name), _SAID.get(name) or FOR_SERVE.get(f"--{name}", NOTHING))
    return done


_AS_IN_WAITRESS = {
    "threads", "url-scheme", "url-prefix", "ident", "backlog", "connection-limit", "trusted-proxy",
    "trusted-proxy-count", "max-request-body-size", "max-request-header-size", "outbuf-high-watermark",
}  # fmt: skip


def _host(host: Any) -> str:
    return f"[{host}]" if ":" in str(host) and not str(host).startswith("[") else "" if host == "*" else str(host)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value) else value


def _listed(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _addresses(value: Any) -> Any:
    several = value if isinstance(value, list) else [value] if isinstance(value, Filled) else str(value).split(",")
    return _listed([_address(each if isinstance(each, Filled) else str(each).strip(), "8000") for each in several])


def _address(text: str, port: str) -> str:
    """An address in flaskd's form."""
    if text.startswith("fd://"):
        raise Untranslatable("sockets that systemd passes are served by themselves; see docs/systemd.md")
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").replace("//", "/")
        return text if isinstance(text, Filled) else f"unix:{Path(path).absolute()}"
    if isinstance(text, Filled):
        text = Filled(text.removeprefix("*"))
        return text if re.search(r":([0-9]+|\$\{[^}]*\})$|:-[^}]*:[0-9]+\}$", text) else Filled(f"{text}:{port}")
    text = re.sub(r"^(tcp|http)://", "", text)
    if text.startswith("*:"):
        text = text[1:]
    if ":" in text.rpartition("]")[2]:
        host, _, number = text.rpartition(":")
        return f"{_host(host)}:{number}"
    return f"{_host(text)}:{port}"


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise Untranslatable(f"expected a number, got {value!r}")
    return value if isinstance(value, Filled) or value == CPUS else int(value)


def _count(value: Any) -> Any:
    if (number := _number(value)) == CPUS:
        raise Untranslatable("it follows from the number of CPUs; flaskd takes a number")
    return number or None


def _workers(value: Any) -> Any:
    return _number(value) or None


def _seconds(value: Any) -> Any:
    if isinstance(value, Filled):
        return value if value.endswith("s}") else Filled(f"{value}s")
    if value == CPUS:
        raise Untranslatable("it follows from the number of CPUs; flaskd takes a duration")
    return format_duration(float(value)) if float(value) else None


def _level(value: Any) -> Any:
    lower = str(value).lower()
    known = {"critical": "error", "warn": "warning", "trace": "debug"}
    return value if isinstance(value, Filled) else known.get(lower, lower)


def _access(value: Any) -> str:
    if value in {"-", "/dev/stdout"}:
        return "combined"
    raise Untranslatable(
        f"the access log goes where flaskd's output goes, not to {value}; log.access says in which format"
    )


def _error_log(value: Any) -> None:
    if value not in {"-", "/dev/stderr", "/dev/stdout"}:
        raise Untranslatable(FOR_SERVE["--log-file"])


def _worker_class(value: Any) -> None:
    name = str(value).lower()
    if "gevent" in name or "eventlet" in name or "tornado" in name:
        raise Untranslatable(
            f"flaskd runs threads, not {value}: server.threads has to be as many as there are requests that wait at "
            "once; an app that needs greenlets is not for flaskd (docs/limits.md)"
        )
    if "uvicorn" in name or "asgi" in name:
        raise Untranslatable("flaskd serves WSGI apps; an ASGI app is for uvicorn or hypercorn")
    if name not in {"sync", "gthread"} and "sync" not in name and "thread" not in name:
        raise Untranslatable("flaskd's workers run server.threads threads; there are no other classes")


def _proxies(value: Any) -> Any:
    several = [each.strip() for each in value.split(",")] if isinstance(value, str) else list(value)
    if isinstance(value, Filled):
        return value
    return "*" if "*" in several else _listed([each for each in several if each])


def _target(value: Any) -> str:
    return str(value)


def _truth(value: Any) -> bool:
    if isinstance(value, Filled):
        raise Untranslatable("it depends on the environment; write true or false")
    return bool(value)


_GUNICORN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "accesslog": ("log.access", _access),
    "backlog": ("server.backlog", _count),
    "bind": ("server.listen", _addresses),
    "chdir": ("app.chdir", str),
    "errorlog": ("", _error_log),
    "forwarded_allow_ips": ("server.trusted_proxy", _proxies),
    "graceful_timeout": ("shutdown.drain.timeout", _seconds),
    "loglevel": ("log.level", _level),
    "max_requests": ("pool.max_requests", _count),
    "preload_app": ("pool.preload", _truth),
    "root_path": ("server.url_prefix", str),
    "threads": ("server.threads", _count),
    "timeout": ("server.request_timeout", _seconds),
    "worker_class": ("", _worker_class),
    "workers": ("server.workers", _workers),
    "wsgi_app": ("app.target", _target),
}
"""gunicorn's setting → flaskd's key, and the function that converts the value."""

_IN_WORKER = "in each worker, the module of the app is imported, and what it does at import is done then"
_HOOKS = {
    "on_starting": "no hook: ExecStartPre= of a unit, or a command before flaskd",
    "on_reload": "no hook: flaskd reload answers when it is done",
    "when_ready": 'no hook: flaskd tells systemd (READY=1), "flaskd ready" and health.path tell others',
    "pre_fork": f"no hook: {_IN_WORKER}",
    "post_fork": f"no hook: {_IN_WORKER}; with pool.preload, what must not be shared is opened at the first use",
    "post_worker_init": f"no hook: {_IN_WORKER}",
    "worker_int": "no hook: @flaskd.on_stop runs in each worker that stops",
    "worker_abort": "no hook: the log has the stack of a request that is given up",
    "pre_exec": "no hook: a restart is the service manager's",
    "pre_request": "no hook: app.before_request of Flask",
    "post_request": "no hook: app.teardown_request of Flask, or its access log",
    "child_exit": "no hook: flaskd workers, and the log, tell how a worker ended",
    "worker_exit": "no hook: @flaskd.on_stop, or a policy of cleanup.policies, runs in each worker that stops",
    "nworkers_changed": "no hook: flaskd workers tells how many there are",
    "on_exit": "no hook: a policy of cleanup.policies with scope: service runs once, at the end",
    "ssl_context": FOR_SERVE["--certfile"],
}

_STATSD = "no statsd: with admin.listen there is /metrics, for Prometheus"
_CHECK = '"flaskd check" finds faults of a file, "flaskd config" says what is in force in a daemon'
_RELOAD = "while you develop, flaskd serve --reload takes new code at each saved file that the app has imported"
_HEAD = "server.max_request_header_size is for the head of a request as a whole"

_SAID = {
    "keepalive": "an idle connection is kept for server.channel_timeout (120s), and needs no thread",
    "pidfile": FOR_SERVE["--pid"],
    "proc_name": "start it with flaskd serve --name NAME, which is the name for all verbs and of its directories",
    "raw_env": FOR_SERVE["--env"],
    "access_log_format": "log.access has four formats: off, common, combined, json",
    "logconfig": FOR_SERVE["--log-config"], "logconfig_dict": FOR_SERVE["--log-config"],
    "logconfig_json": FOR_SERVE["--log-config"],
    "secure_scheme_headers": "server.trusted_proxy_headers: [x-forwarded-proto] says the scheme of a trusted proxy",
    "reload": _RELOAD, "reload_engine": _RELOAD, "reload_extra_files": _RELOAD,
    "limit_request_line": _HEAD, "limit_request_field_size": _HEAD, "limit_request_fields": _HEAD,
    "tmp_upload_dir": "set TMPDIR in the environment: uploads that are large wait there",
    "syslog": FOR_SERVE["--log-file"], "syslog_addr": FOR_SERVE["--log-file"],
    "sendfile": FOR_SERVE["--no-sendfile"],
    "spew": FOR_SERVE["--spew"],
    "worker_connections": "server.threads says how many requests a worker runs at once; a connection needs no thread",
    "max_requests_jitter": (
        "not needed: workers reach pool.max_requests and pool.max_age at different times, and are replaced one by one"
    ),
    "pythonpath": "app.chdir is a directory to import from; others: set PYTHONPATH in the environment",
    "proxy_protocol": "flaskd reads the headers of proxies (server.trusted_proxy), not the PROXY protocol",
    "statsd_host": _STATSD, "statsd_prefix": _STATSD,
    "paste": "app.target names the app, as MODULE:NAME or MODULE:FACTORY(); there is no paste.ini",
    "check_config": _CHECK, "print_config": _CHECK,
}  # fmt: skip


_OTHERS = {
    "daemon", "user", "group", "umask", "initgroups", "worker_tmp_dir", "logger_class", "capture_output",
    "enable_stdio_inheritance", "certfile", "keyfile", "ca_certs", "ciphers", "cert_reqs", "ssl_version", "reuse_port",
}  # fmt: skip
"""Settings of gunicorn for which the advice is that for the option of the same name."""


def _advice(setting: str) -> str:
    """The advice about a gunicorn setting without a key in flaskd; empty if gunicorn has no such setting."""
    return _SAID.get(setting) or (FOR_SERVE["--" + setting.replace("_", "-")] if setting in _OTHERS else "")
