"""What flaskd has in the place of an option of another server, of `flask run`, or of a verb that has none of that name.

It is imported when an option is unknown, and by nothing before.
"""

from __future__ import annotations

from flaskd.text import did_you_mean

_LISTEN = "write --listen HOST:PORT, or server.listen in flaskd.yaml"
_TLS = "TLS ends at a proxy in front of flaskd (docs/proxy.md)"
_UNIT = 'the service manager does that: see User=, Group= and UMask= in the units that "flaskd units" prints'
_LOG = "flaskd's log goes to standard error, or to the journal; redirect it"
_ASGI = "flaskd serves WSGI apps; it has one event loop and one parser of its own"
_TRUSTED = "write server.trusted_proxy in flaskd.yaml, the addresses of the proxies"
_HEAD = "write server.max_request_header_size in flaskd.yaml"
_ENVIRONMENT = "set the environment before: NAME=VALUE flaskd serve, or Environment= and EnvironmentFile= of the unit"
_APP = "name the app as the argument: flaskd serve MODULE:NAME, or 'MODULE:FACTORY()'"

_ADVICE: dict[str, str] = {
    "--bind -b --host --port -p": _LISTEN,
    "--uds --unix-socket": "write --listen unix:/path, or server.listen in flaskd.yaml",
    "--unix-socket-perms": "a Unix socket has mode 0660; another one with SocketMode= of a socket unit",
    "--fd --sockets": "sockets that systemd passes are served by themselves; see server.listen and docs/systemd.md",
    "--reload-dir --reload-include --reload-exclude --reload-extra-file --reload-engine": (
        "while you develop, --reload takes new code at each saved file that the app has imported"
    ),
    "--debug --debugger": '--reload takes new code while you develop; "flask run --debug" has a debugger',
    "--timeout": "write server.request_timeout in flaskd.yaml: it ends a request; pool.stuck_after ends a worker",
    "--worker-class -k --worker-connections": "workers run threads: write --threads N (server.threads)",
    "--preload --preload-app": "write pool.preload: true in flaskd.yaml",
    "--graceful-timeout --timeout-graceful-shutdown --workers-kill-timeout": (
        "write shutdown.drain.timeout in flaskd.yaml; the whole stop has shutdown.deadline"
    ),
    "--max-requests --limit-max-requests --max-requests-jitter --workers-lifetime": (
        "write pool.max_requests or pool.max_age in flaskd.yaml; workers are not all replaced at once"
    ),
    "--access-logfile --access-log --no-access-log --access-logformat --access-log-format --accesslog": (
        "write log.access in flaskd.yaml: off, common, combined or json"
    ),
    "--error-logfile --log-file --log --errorlog --log-syslog --log-syslog-to": _LOG,
    "--log-level": "write log.level in flaskd.yaml; of a daemon that runs: flaskd log-level LEVEL",
    "--log-config --logger-class --log-config-dict --log-config-json": "the app's own set-up of logging is left alone",
    "--capture-output -R --enable-stdio-inheritance": "what the app prints goes where flaskd's own output goes",
    "--pid --pidfile": '"flaskd list" and "flaskd status --json" tell the pid; to stop it needs none: flaskd stop',
    "--daemon -D --daemonize": 'run it as a service: "flaskd units" prints the units',
    "--chdir --app-dir --pythonpath": "write app.chdir in flaskd.yaml, the directory to import from; or set PYTHONPATH",
    "--certfile --keyfile --cert --key --ca-certs --ciphers --ssl-version --cert-reqs": _TLS,
    "--ssl-certfile --ssl-keyfile --ssl-keyfile-password --ssl-ca-certs": _TLS,
    "--user -u --group -g --umask -m --initgroups": _UNIT,
    "--env -e --env-file": _ENVIRONMENT,
    "--forwarded-allow-ips --proxy-headers --no-proxy-headers --trusted-proxy --proxy-allow-from": _TRUSTED,
    "--proxy-protocol": f"flaskd reads the headers of proxies, not the PROXY protocol: {_TRUSTED}",
    "--trusted-proxy-count": "write server.trusted_proxy_count in flaskd.yaml",
    "--trusted-proxy-headers": "write server.trusted_proxy_headers in flaskd.yaml",
    "--url-prefix --root-path --script-name --mount": "write server.url_prefix in flaskd.yaml",
    "--url-scheme": "write server.url_scheme in flaskd.yaml",
    "--backlog": "write server.backlog in flaskd.yaml",
    "--ident --server-header --no-server-header": "write server.ident in flaskd.yaml; empty: no such header",
    "--keep-alive --timeout-keep-alive --channel-timeout": "write server.channel_timeout in flaskd.yaml",
    "--connection-limit --limit-concurrency": "write server.connection_limit in flaskd.yaml, or server.max_queue",
    "--max-request-body-size": "write server.max_request_body_size in flaskd.yaml",
    "--limit-request-line --limit-request-fields --limit-request-field_size --max-request-header-size": _HEAD,
    "--app -A --call --factory --paste --module": _APP,
    "--loop --http --ws --lifespan --interface": _ASGI,
    "--statsd-host --statsd-prefix": "write admin.listen in flaskd.yaml: /metrics is there",
    "--reuse-port": "workers share one listener by themselves; a restart without a gap: docs/systemd.md",
    "--check-config --print-config": 'write "flaskd check", and "flaskd config" of a daemon that runs',
    "--worker-tmp-dir": "not needed: flaskd's workers write no file to tell that they live",
}  # fmt: skip
"""Options of gunicorn, uvicorn, waitress-serve, uWSGI and `flask run` → what to write for `flaskd serve` instead."""

FOR_SERVE = {option: advice for options, advice in _ADVICE.items() for option in options.split()}

_SAME = {
    "--force": "--now", "-f": "--now", "--kill": "--now", "-9": "--now", "--immediate": "--now",
    "--stack": "--stacks", "--host": "--socket", "--pid": "--name", "-n": "--name",
}  # fmt: skip
"""Options that a client verb has not → what it has for them."""


def advice(verb: str, option: str, known: list[str]) -> str:
    """One line for an option that a verb has not: what to write instead, or how to see what it has."""
    said = f'{verb} has no option "{option}"'
    if verb.endswith((" serve", " daemon")) and (found := FOR_SERVE.get(option)):
        return f"{said}; {found}"
    instead = _SAME.get(option, "")
    if instead in known:
        return f'{said}; did you mean "{instead}"?'
    return said + (did_you_mean(option, known, strict=True) or f'; see "{verb} --help"')
