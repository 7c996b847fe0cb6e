"""Advice about options of other servers and of `flask run`, and about options that a client verb does not have.

It is imported only when an option is unknown.
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
_HTTP = "flaskd speaks HTTP/1.1; HTTP/2 and TLS end at a proxy in front of it (docs/proxy.md)"
_STRICT = "flaskd reads requests strictly (RFC 9112), and that cannot be loosened"
_FILES = "the app or a proxy in front serves static files (docs/proxy.md)"
_FROM_FILE = (
    'flaskd reads flaskd.yaml: "flaskd init --from gunicorn.conf.py" translates, docs/migrating.md says the rest'
)
_OTHER_JOBS = "flaskd serves the app alone: give it another service, a systemd timer, or a library of the app"
NOTHING = "flaskd has no such setting"

_ADVICE: tuple[tuple[str, str], ...] = (
    (_LISTEN, "--bind -b --host --port -p --insecure-bind --http-socket"),
    ("write --listen unix:/path, or server.listen in flaskd.yaml", "--uds --unix-socket --socket -s"),
    (
        "a Unix socket has mode 0660; another one with SocketMode= of a socket unit",
        "--unix-socket-perms --chmod-socket --chown-socket --uds-permissions",
    ),
    ("sockets that systemd passes are served by themselves; see server.listen and docs/systemd.md", "--fd --sockets"),
    (
        "while you develop, --reload takes new code at each saved file that the app has imported",
        (
            "--reload-dir --reload-include --reload-exclude --reload-extra-file --reload-engine --reload-delay "
            "--reload-paths --reload-tick --reload-ignore-dirs --reload-ignore-paths --reload-ignore-patterns "
            "--reload-ignore-worker-failure --no-reload-ignore-worker-failure --py-autoreload --touch-reload "
            "--extra-files --exclude-patterns"
        ),
    ),
    (
        "leave it out: it is off where it is not asked for",
        "--no-reload --no-debug --no-debugger --no-log --no-ws --no-factory --no-metrics --disable-logging",
    ),
    ('--reload takes new code while you develop; "flask run --debug" has a debugger', "--debug --debugger"),
    (
        "write server.request_timeout in flaskd.yaml: it ends a request; pool.stuck_after ends a worker",
        "--timeout --harakiri --socket-timeout --http-timeout",
    ),
    (
        "workers run threads: write --threads N (server.threads)",
        (
            "--worker-class -k --worker-connections --enable-threads --with-threads --blocking-threads "
            "--runtime-blocking-threads"
        ),
    ),
    ("write --workers N, or auto (server.workers)", "--processes --master -M --cheaper"),
    ("write --threads 1 (server.threads)", "--without-threads"),
    ("an app that needs greenlets is not for flaskd; its workers run threads (docs/limits.md)", "--gevent --async"),
    (
        "leave it out: flaskd does so by itself",
        (
            "--lazy --lazy-apps --single-interpreter --need-app --die-on-term --vacuum --thunder-lock "
            "--py-call-osafterfork"
        ),
    ),
    ("write pool.preload: true in flaskd.yaml", "--preload --preload-app"),
    (
        "write shutdown.drain.timeout in flaskd.yaml; the whole stop has shutdown.deadline",
        "--graceful-timeout --timeout-graceful-shutdown --workers-kill-timeout --worker-reload-mercy --reload-mercy",
    ),
    (
        "write pool.max_requests or pool.max_age in flaskd.yaml; workers are not all replaced at once",
        (
            "--max-requests --limit-max-requests --max-requests-jitter --limit-max-requests-jitter "
            "--workers-lifetime --max-worker-lifetime"
        ),
    ),
    (
        "write pool.max_memory in flaskd.yaml",
        "--reload-on-rss --reload-on-as --evil-reload-on-rss --workers-max-rss --rss-samples --rss-sample-interval",
    ),
    ("write pool.stuck_after in flaskd.yaml", "--timeout-worker-healthcheck"),
    (
        "a worker that dies is replaced by itself, at once and then with pauses that grow to 30 s",
        "--respawn-failed-workers --no-respawn-failed-workers --respawn-interval",
    ),
    (
        "write log.access in flaskd.yaml: off, common, combined or json",
        (
            "--access-logfile --access-log --no-access-log --access-logformat --access-log-format "
            "--access-log-fmt --accesslog --log-format --disable-redirect-access-to-syslog"
        ),
    ),
    (
        _LOG,
        (
            "--error-logfile --error-log --log-file --log --errorlog --log-syslog --log-syslog-to "
            "--log-syslog-facility --log-syslog-prefix --logto --logto2 --log-master"
        ),
    ),
    (
        "flaskd's log has no colours; what flaskd's other commands show has none with NO_COLOR",
        "--use-colors --no-use-colors",
    ),
    ("write log.level in flaskd.yaml; of a daemon that runs: flaskd log-level LEVEL", "--log-level"),
    (
        "the app's own set-up of logging is left alone",
        "--log-config --logger-class --log-config-dict --log-config-json",
    ),
    ("what the app prints goes where flaskd's own output goes", "--capture-output -R --enable-stdio-inheritance"),
    (
        "write --name NAME: the name for all verbs and of its directories",
        "--proc-name -n --process-name --procname --procname-prefix --auto-procname",
    ),
    (
        '"flaskd list" and "flaskd status --json" tell the pid; to stop it needs none: flaskd stop',
        "--pid --pidfile --pid-file --safe-pidfile",
    ),
    ('run it as a service: "flaskd units" prints the units', "--daemon -D --daemonize -d --emperor"),
    ("start the flaskd of that environment: ENVIRONMENT/bin/flaskd serve", "--virtualenv --venv --home -H"),
    (
        "write app.chdir in flaskd.yaml, the directory to import from; or set PYTHONPATH",
        "--chdir --app-dir --pythonpath --pp --working-dir",
    ),
    (
        _TLS,
        (
            "--certfile --keyfile --cert --key --ca-certs --ciphers --ssl-version --cert-reqs "
            "--do-handshake-on-connect --ssl-certfile --ssl-keyfile --ssl-keyfile-password --ssl-ca-certs "
            "--ssl-cert-reqs --ssl-ciphers --ssl-ca --ssl-certificate --ssl-client-verify --no-ssl-client-verify "
            "--ssl-crl --ssl-protocol-min --verify-mode --https --keyfile-password --suppress-ragged-eofs"
        ),
    ),
    (_UNIT, "--user -u --group -g --umask -m --initgroups --uid --gid"),
    (_ENVIRONMENT, "--env -e --env-file --env-files"),
    (_FROM_FILE, "--ini --yaml --xml --json"),
    (
        _OTHER_JOBS,
        "--spooler --cron --dirty-app --dirty-workers --dirty-threads --dirty-timeout --dirty-graceful-timeout",
    ),
    (
        _TRUSTED,
        (
            "--forwarded-allow-ips --proxy-headers --no-proxy-headers --trusted-proxy --proxy-allow-from "
            "--forwarder-headers --clear-untrusted-proxy-headers --no-clear-untrusted-proxy-headers"
        ),
    ),
    (f"flaskd reads the headers of proxies, not the PROXY protocol: {_TRUSTED}", "--proxy-protocol"),
    ("write server.trusted_proxy_count in flaskd.yaml", "--trusted-proxy-count"),
    ("write server.trusted_proxy_headers in flaskd.yaml", "--trusted-proxy-headers"),
    (
        "write server.url_prefix in flaskd.yaml",
        "--url-prefix --root-path --script-name --mount --manage-script-name --url-path-prefix",
    ),
    ("write server.url_scheme in flaskd.yaml", "--url-scheme"),
    ("write server.backlog in flaskd.yaml", "--backlog"),
    ("let the app or a proxy in front set headers; Date is always sent", "--header --date-header --no-date-header"),
    (_FILES, "--static-map --static-path-route --static-path-mount --static-path-expires --static-path-dir-to-file"),
    ("write server.ident in flaskd.yaml; empty: no such header", "--ident --server-header --no-server-header"),
    (
        "write server.channel_timeout in flaskd.yaml",
        "--keep-alive --timeout-keep-alive --channel-timeout --http1-keep-alive --no-http1-keep-alive --so-keepalive",
    ),
    (
        "write server.head_timeout, or server.channel_timeout, in flaskd.yaml",
        "--read-timeout --http1-header-read-timeout",
    ),
    (
        "write server.connection_limit in flaskd.yaml, or server.max_queue",
        "--connection-limit --limit-concurrency --backpressure",
    ),
    ("write server.max_request_body_size in flaskd.yaml", "--max-request-body-size --limit-post"),
    (
        _HEAD,
        (
            "--limit-request-line --limit-request-fields --limit-request-field_size --max-request-header-size "
            "--buffer-size --h11-max-incomplete-event-size"
        ),
    ),
    (_APP, "--app -A --call --factory --paste --paster --paste-global --module --wsgi-file --callable"),
    (
        _ASGI,
        (
            "--loop --http --ws --lifespan --interface --asgi-loop --asgi-lifespan --asgi-disconnect-grace-period "
            "--ws-max-queue --ws-max-size --ws-per-message-deflate --ws-ping-interval --ws-ping-timeout "
            "--websocket-ping-interval --websocket-max-message-size --runtime-mode --runtime-threads --task-impl "
            "--reset-contextvars --http-parser"
        ),
    ),
    (
        _HTTP,
        (
            "--http2 --http-protocols --http2-cleartext --http2-initial-window-size "
            "--http2-max-concurrent-streams --http2-max-frame-size --http2-max-header-list-size "
            "--http2-adaptive-window --no-http2-adaptive-window --http2-initial-connection-window-size "
            "--http2-initial-stream-window-size --http2-keep-alive-interval --http2-keep-alive-timeout "
            "--http2-max-headers-size --http2-max-send-buffer-size --quic-bind --protocol --uwsgi-allow-from"
        ),
    ),
    (
        _STRICT,
        (
            "--casefold-http-method --header-map --permit-obsolete-folding --permit-unconventional-http-method "
            "--permit-unconventional-http-version --strip-header-spaces"
        ),
    ),
    (
        "write admin.listen in flaskd.yaml: /metrics is there",
        (
            "--metrics --metrics-address --metrics-port --metrics-scrape-interval --stats --enable-backlog-metric "
            "--dogstatsd-tags --statsd-host --statsd-prefix"
        ),
    ),
    ("workers share one listener by themselves; a restart without a gap: docs/systemd.md", "--reuse-port"),
    ('write "flaskd check", and "flaskd config" of a daemon that runs', "--check-config --print-config"),
    (
        "flaskd's control socket is in its runtime directory; write control.mode and control.group in flaskd.yaml",
        "--control-socket --control-socket-mode --no-control-socket",
    ),
    ("flaskd requests --stacks shows where each request is", "--spew"),
    ("flaskd decides by itself how a file is sent", "--no-sendfile"),
    ("write server.outbuf_high_watermark in flaskd.yaml", "--outbuf-high-watermark"),
    (
        NOTHING,
        (
            "--asyncore-loop-timeout --asyncore-use-poll --no-asyncore-use-poll --channel-request-lookahead "
            "--cleanup-interval --expose-tracebacks --no-expose-tracebacks --inbuf-overflow --outbuf-overflow "
            "--log-socket-errors --no-log-socket-errors --log-untrusted-proxy-headers "
            "--no-log-untrusted-proxy-headers --ipv4 --ipv6 --no-ipv4 --no-ipv6 --recv-bytes --send-bytes "
            "--server-name --http1-buffer-size --http1-pipeline-flush --no-http1-pipeline-flush "
            "--blocking-threads-idle-timeout --post-buffering --plugin --plugins --skip-atexit"
        ),
    ),
    ("not needed: flaskd's workers write no file to tell that they live", "--worker-tmp-dir"),
)
"""What to write for `flaskd serve`, with the options of gunicorn, uWSGI, waitress-serve, uvicorn, granian, hypercorn
and `flask run` that it replaces."""

FOR_SERVE = {option: advice for advice, options in _ADVICE for option in options.split()}

_SAME = {
    "--force": "--now", "-f": "--now", "--kill": "--now", "-9": "--now", "--immediate": "--now",
    "--stack": "--stacks", "--host": "--socket", "--pid": "--name", "-n": "--name",
}  # fmt: skip
"""Options that client verbs do not have, with what to write instead."""


def advice(verb: str, option: str, known: list[str]) -> str:
    """One line about an option that a verb does not have: what to write instead, or how to see its options."""
    said = f'{verb} has no option "{option}"'
    if verb.endswith((" serve", " daemon")) and (found := FOR_SERVE.get(option)):
        return f"{said}; {found}"
    instead = _SAME.get(option, "")
    if instead in known:
        return f'{said}; did you mean "{instead}"?'
    return said + (did_you_mean(option, known, strict=True) or f'; see "{verb} --help"')
