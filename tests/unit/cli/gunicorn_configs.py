"""gunicorn configuration files of the kinds that people publish, and the translation of each."""

MINIMAL = 'bind = "0.0.0.0:8000"\nworkers = 3\n'

CPUS = """
import multiprocessing

bind = "127.0.0.1:8000"
workers = multiprocessing.cpu_count() * 2 + 1
"""

ENVIRONMENT = """
import os

workers = int(os.environ.get('GUNICORN_PROCESSES', '2'))
threads = int(os.environ.get('GUNICORN_THREADS', '4'))
timeout = int(os.environ.get('GUNICORN_TIMEOUT', '120'))
bind = os.environ.get('GUNICORN_BIND', '0.0.0.0:8080')
forwarded_allow_ips = '*'
secure_scheme_headers = { 'X-Forwarded-Proto': 'https' }
"""

PORT = """
import os
bind = f"0.0.0.0:{os.getenv('PORT', 5000)}"
workers = os.getenv("WEB_CONCURRENCY") or 2
"""

PORT_WITHOUT_DEFAULT = 'import os\nbind = "0.0.0.0:" + os.environ["A_PORT_THAT_IS_NOT_SET"]\nworkers = 2\n'

PERCENT = 'host = "0.0.0.0"\nport = 9000\nbind = "%s:%s" % (host, port)\n'

FORMAT_METHOD = 'bind = "{}:{}".format("0.0.0.0", 8000)\nworkers = 2\n'

UNIX_SOCKET = """
bind = "unix:/run/shop/gunicorn.sock"
umask = 0o007
workers = 2
user = "www-data"
group = "www-data"
"""

SEVERAL = 'bind = ["127.0.0.1:8000", "[::1]:8000", "unix:/run/shop.sock"]\n'

COMMAS = 'bind = "127.0.0.1:8000,[::1]:8000"\nworkers = 1\nthreads = 8\nworker_class = "gthread"\ntimeout = 60\n'

WITHOUT_PORT = 'bind = "0.0.0.0"\nworkers = 0\n'

GEVENT = (
    'bind = ":5000"\nworker_class = "gevent"\nworker_connections = 1000\nworkers = 4\ntimeout = 30\nkeepalive = 2\n'
)

UVICORN = 'worker_class = "uvicorn.workers.UvicornWorker"\nworkers = 4\nbind = "0.0.0.0:80"\n'

LOGS = """
accesslog = "/var/log/shop/access.log"
errorlog = "/var/log/shop/error.log"
loglevel = "WARN"
access_log_format = '%(h)s %(l)s %(u)s %(t)s "%(r)s" %(s)s %(b)s'
capture_output = True
enable_stdio_inheritance = True
"""

STDOUT = 'accesslog = "-"\nerrorlog = "-"\nloglevel = "debug"\n'

TLS = 'bind = "0.0.0.0:443"\ncertfile = "/etc/ssl/shop.pem"\nkeyfile = "/etc/ssl/shop.key"\n'

RECYCLE = """
preload_app = True
max_requests = 1000
max_requests_jitter = 50
graceful_timeout = 30
timeout = 30
workers = 4
"""

DAEMON = """
daemon = True
pidfile = "/var/run/shop.pid"
chdir = "."
proc_name = "shop"
raw_env = ["DJANGO_SETTINGS_MODULE=shop.settings", "SECRET=$ecret${x}"]
worker_tmp_dir = "/dev/shm"
reload = True
wsgi_app = "shop.wsgi:application"
"""

HOOKS = """
from prometheus_client import multiprocess

def on_starting(server):
    raise SystemExit("this is never run")

def post_fork(server, worker):
    server.log.info("Worker spawned (pid: %s)", worker.pid)

def child_exit(server, worker):
    multiprocess.mark_process_dead(worker.pid)

def helper():
    pass

workers: int = 2
"""

CONDITION = """
import os
debug = os.environ.get("DEBUG") == "1"
workers = 2
if debug:
    reload = True
    workers = 1
try:
    import local_settings
except ImportError:
    bind = "127.0.0.1:8001"
"""

WORKED_OUT = """
import json, os
from pathlib import Path
BASE = Path(__file__).parent
use_max_workers = None
cores = os.cpu_count()
web_concurrency = max(int(1 * cores), 2)
workers = web_concurrency
chdir = str(BASE / "src")
bind = json.loads(os.environ.get("BIND", '"x"'))
log_config = {"level": "info"}
port = 7
"""

SENTRY_STYLE = """
bind, workers = "0.0.0.0:8000", 2
backlog = 2048
limit_request_line = 8190
limit_request_fields = 100
statsd_host = "localhost:8125"
logger_class = "shop.logs.Logger"
forwarded_allow_ips = "10.0.0.0/8,127.0.0.1"
proxy_protocol = False
spew = False
check_config = False
print_config = False
threads = 2 * 2
"""

AWKWARD = r"""
import os
bind = [f"[::]:{os.getenv('PORT', 8000)}", f"*:{os.getenv('PORT', 8000)}"]
chdir = os.getenv("BASE", ".") + "/a: b #c\n"
"""

CONFIGS = {
    "awkward text": (
        AWKWARD,
        {
            "server.listen": ["[::]:${env:PORT:-8000}", ":${env:PORT:-8000}"],
            "app.chdir": "${env:BASE:-.}/a: b #c\n",
            "server.workers": 1,
        },
        [],
    ),
    "minimal": (MINIMAL, {"server.listen": "0.0.0.0:8000", "server.workers": 3}, ["threads"]),
    "cpus": (CPUS, {"server.listen": "127.0.0.1:8000", "server.workers": "auto"}, []),
    "environment": (
        ENVIRONMENT,
        {
            "server.listen": "${env:GUNICORN_BIND:-0.0.0.0:8080}",
            "server.workers": "${env:GUNICORN_PROCESSES:-2}",
            "server.threads": "${env:GUNICORN_THREADS:-4}",
            "pool.stuck_after": "${env:GUNICORN_TIMEOUT:-120}s",
            "server.trusted_proxy": "*",
            "server.trusted_proxy_headers": ["x-forwarded-proto"],
        },
        ["secure_scheme_headers"],
    ),
    "port": (PORT, {"server.listen": "0.0.0.0:${env:PORT:-5000}", "server.workers": "${env:WEB_CONCURRENCY:-2}"}, []),
    "a port without default": (PORT_WITHOUT_DEFAULT, {"server.workers": 2}, ["${env:A_PORT_THAT_IS_NOT_SET}"]),
    "percent": (PERCENT, {"server.listen": "0.0.0.0:9000", "server.workers": 1}, []),
    "the format method": (FORMAT_METHOD, {"server.listen": "0.0.0.0:8000", "server.workers": 2}, []),
    "a Unix socket": (
        UNIX_SOCKET,
        {"server.listen": "unix:/run/shop/gunicorn.sock", "server.workers": 2},
        ["umask", "user", "group"],
    ),
    "several addresses": (
        SEVERAL,
        {"server.listen": ["127.0.0.1:8000", "[::1]:8000", "unix:/run/shop.sock"], "server.workers": 1},
        [],
    ),
    "commas": (
        COMMAS,
        {
            "server.listen": ["127.0.0.1:8000", "[::1]:8000"],
            "server.workers": 1,
            "server.threads": 8,
            "pool.stuck_after": "1m",
        },
        [],
    ),
    "without a port": (WITHOUT_PORT, {"server.listen": "0.0.0.0:8000", "server.workers": 1}, []),
    "gevent": (
        GEVENT,
        {"server.listen": ":5000", "server.workers": 4, "pool.stuck_after": "30s"},
        ["worker_class", "worker_connections", "keepalive"],
    ),
    "uvicorn": (UVICORN, {"server.listen": "0.0.0.0:80", "server.workers": 4}, ["ASGI"]),
    "log files": (
        LOGS,
        {"log.level": "warning", "server.workers": 1},
        ["accesslog", "errorlog", "access_log_format", "capture_output", "enable_stdio_inheritance"],
    ),
    "standard output": (STDOUT, {"log.access": "combined", "log.level": "debug", "server.workers": 1}, []),
    "TLS": (TLS, {"server.listen": "0.0.0.0:443", "server.workers": 1}, ["certfile", "keyfile"]),
    "recycling": (
        RECYCLE,
        {
            "pool.preload": True,
            "pool.max_requests": 1000,
            "server.request_timeout": "30s",
            "server.workers": 4,
            "shutdown.drain.timeout": "30s",
            "shutdown.deadline": "40s",
        },
        ["max_requests_jitter"],
    ),
    "a daemon": (
        DAEMON,
        {"app.chdir": ".", "app.target": "shop.wsgi:application", "server.workers": 1},
        ["daemon", "pidfile", "proc_name", "raw_env", "worker_tmp_dir", "reload"],
    ),
    "hooks": (HOOKS, {"server.workers": 2}, ["on_starting", "post_fork", "child_exit"]),
    "conditions": (CONDITION, {"server.workers": 2}, ["workers", "reload", "bind", 'under "if"', 'under "try"']),
    "worked out": (WORKED_OUT, {"server.workers": "auto"}, ["chdir", "bind", "json.loads"]),
    "much": (
        SENTRY_STYLE,
        {
            "server.listen": "0.0.0.0:8000",
            "server.workers": 2,
            "server.threads": 4,
            "server.backlog": 2048,
            "server.trusted_proxy": ["10.0.0.0/8", "127.0.0.1"],
            "server.trusted_proxy_headers": ["x-forwarded-proto"],
        },
        ["limit_request_line", "limit_request_fields", "statsd_host", "logger_class"],
    ),
}
"""By what is special about them: the file, the values that are written, and words of the notes."""
