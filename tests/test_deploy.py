"""Containerfile and deploy/: each file is valid for the program that reads it, and its times fit flaskd's.

Tests that need podman are in tests/live/test_image.py.
"""

from __future__ import annotations

import configparser
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flaskd.cleanup import action_specs
from flaskd.config import Config, load
from flaskd.units import parse_duration

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
CONTAINERFILE = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
KUBERNETES: dict[str, dict[str, Any]] = {
    each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
}
POD: dict[str, Any] = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["shop"]
FLASKD = {
    "image": (DEPLOY / "image.yaml").read_text(),
    "haproxy": (DEPLOY / "haproxy/flaskd.yaml").read_text(),
    "nginx": (DEPLOY / "nginx/flaskd.yaml").read_text(),
    "kubernetes": KUBERNETES["ConfigMap"]["data"]["flaskd.yaml"],
}
"""The flaskd configurations in these files."""


def written(name: str, directory: Path) -> Path:
    """One of them as a file of its own, with its secret in the directory and without its app's directory."""
    secret = directory / "webhook"
    secret.write_text("https://hooks.example.com/x\n")
    path = directory / "flaskd.yaml"
    text = FLASKD[name].replace("/etc/shop/webhook", str(secret))
    path.write_text(text.replace("chdir: /app", f"chdir: {directory}"))
    return path


def config(name: str, directory: Path) -> Config:
    """One of them as flaskd's values."""
    return load(written(name, directory), actions=action_specs()).values


def quadlet() -> configparser.ConfigParser:
    """The quadlet as a mapping; it has each of its keys once."""
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "quadlet/shop.container")
    return parser


def instruction(name: str) -> str:
    """The last such instruction of the Containerfile, without its name; it applies to the final image."""
    return re.findall(rf"^{name}\s+(.*)$", CONTAINERFILE, re.MULTILINE)[-1]


@pytest.mark.parametrize("name", FLASKD)
def test_flaskd_takes_each_configuration_without_a_doubt(name: str, tmp_path: Path) -> None:
    """`flaskd check` finds neither faults nor doubts in each configuration."""
    done = subprocess.run(
        [sys.executable, "-m", "flaskd", "check", str(written(name, tmp_path))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, f"{tmp_path / 'flaskd.yaml'}: OK\n")


# --- Containerfile ---


def test_the_image_needs_no_shell_and_no_root() -> None:
    """The image's commands are lists, its user is a number, and flaskd understands its check and its stop signal."""
    flaskd = "/opt/flaskd/bin/flaskd"
    assert (json.loads(instruction("ENTRYPOINT")), json.loads(instruction("CMD"))) == ([flaskd], ["serve"])
    assert json.loads(instruction("HEALTHCHECK").split(" CMD ")[1]) == [flaskd, "ready"]
    assert instruction("STOPSIGNAL") == "SIGTERM"
    assert re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", instruction("USER"))
    last = CONTAINERFILE[CONTAINERFILE.rindex("\nFROM ") :]
    assert "\nRUN " not in last


def test_the_image_listens_where_port_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The image listens on all addresses, on port 8080 unless PORT is set."""
    monkeypatch.delenv("PORT", raising=False)
    assert [str(each) for each in config("image", tmp_path).server.listen] == ["0.0.0.0:8080"]
    monkeypatch.setenv("PORT", "5000")
    assert [str(each) for each in config("image", tmp_path).server.listen] == ["0.0.0.0:5000"]


def test_podman_keeps_the_health_check() -> None:
    """Each command that builds the image asks for Docker's format, because the other one has no HEALTHCHECK."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "Containerfile", "docs/fleet.md")]
    commands = [line for text in texts for line in text.splitlines() if "podman build" in line]
    assert len(commands) >= 4
    assert [line for line in commands if "podman build --format=docker -t" not in line] == []


# --- times ---


def test_no_engine_kills_before_the_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each engine waits longer after SIGTERM than flaskd may take; podman and docker wait 10 s by default."""
    monkeypatch.delenv("DEADLINE", raising=False)
    assert config("image", tmp_path).shutdown.deadline < 10
    monkeypatch.setenv("DEADLINE", COMPOSE["environment"]["DEADLINE"])
    assert config("image", tmp_path).shutdown.deadline < parse_duration(COMPOSE["stop_grace_period"])

    container, service = quadlet()["Container"], quadlet()["Service"]
    monkeypatch.setenv(*container["Environment"].split("="))
    deadline = config("image", tmp_path).shutdown.deadline
    assert deadline == 25
    assert deadline < int(container["StopTimeout"]) < int(service["TimeoutStopSec"])

    stop = config("kubernetes", tmp_path).shutdown
    assert stop.announce >= 5
    assert stop.announce + stop.deadline < POD["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", ["httpchk", "agent"])
def test_haproxy_notices_within_the_announce(name: str, tmp_path: Path) -> None:
    """The announce is longer than HAProxy's check interval plus check timeout."""
    text = (DEPLOY / f"haproxy/{name}.cfg").read_text()
    (line,) = re.findall(r"^ *default-server (.*)$", text, re.MULTILINE)
    (patience,) = re.findall(r"^ *timeout check (\S+)", text, re.MULTILINE)
    options = dict(itertools.pairwise(line.split()))
    assert (options["fall"], options["rise"]) == ("1", "1")
    for interval in ("inter", "agent-inter") if name == "agent" else ("inter",):
        noticed = parse_duration(options[interval]) + parse_duration(patience)
        assert noticed < config("haproxy", tmp_path).shutdown.announce


# --- what refers to each other ---


def test_haproxy_asks_where_flaskd_answers(tmp_path: Path) -> None:
    """Httpchk requests health.path, and the servers' port is that of server.listen, in nginx's file, too."""
    path = config("haproxy", tmp_path).health.path
    assert f"option httpchk GET {path}\n" in (DEPLOY / "haproxy/httpchk.cfg").read_text()
    for path in ("haproxy/httpchk.cfg", "haproxy/agent.cfg", "nginx/nginx.conf"):
        (listen,) = config(path.partition("/")[0], tmp_path).server.listen
        ports = re.findall(r"^\s*server .*192\.0\.2\.1[12]:(\d+)", (DEPLOY / path).read_text(), re.MULTILINE)
        assert ports == [str(listen).rpartition(":")[2]] * 2


def test_the_pods_parts_fit_together(tmp_path: Path) -> None:
    """Names in one Kubernetes document match those in the others, and the probes ask flaskd's admin listener."""
    names = {each["metadata"]["name"] for each in KUBERNETES.values()}
    assert set(KUBERNETES) == {"ConfigMap", "Secret", "Deployment", "Service", "PodDisruptionBudget"}
    assert names == {"shop"}
    labels = KUBERNETES["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert KUBERNETES["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert KUBERNETES["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert KUBERNETES["Service"]["spec"]["selector"] == labels
    flaskd = config("kubernetes", tmp_path)
    ports = {each["name"]: each["containerPort"] for each in CONTAINER["ports"]}
    assert [f"0.0.0.0:{ports['http']}"] == [str(each) for each in flaskd.server.listen]
    assert [f"0.0.0.0:{ports['admin']}"] == [str(each) for each in flaskd.admin.listen]
    assert [each["targetPort"] for each in KUBERNETES["Service"]["spec"]["ports"]] == ["http"]
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert probes == {
        "startup": {"path": "/readyz", "port": "admin"},
        "readiness": {"path": "/readyz", "port": "admin"},
        "liveness": {"path": "/livez", "port": "admin"},
    }


def test_the_pod_may_write_where_it_has_to_and_nowhere_else() -> None:
    """The pod has a read-only root and no root user; the ConfigMap is mounted as a directory, so that edits arrive."""
    assert POD["securityContext"]["runAsNonRoot"] is True
    user, group = map(int, instruction("USER").split(":"))
    assert (POD["securityContext"]["runAsUser"], POD["securityContext"]["runAsGroup"]) == (user, group)
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes = {each["name"]: each for each in POD["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in CONTAINER["volumeMounts"]}
    assert len(mounts) == len(volumes)
    assert not any("subPath" in each for each in CONTAINER["volumeMounts"])
    environment = dict(each.split("=", 1) for each in instruction("ENV").split())
    configuration = Path(environment["FLASKD_CONFIG"])
    assert mounts[str(configuration.parent)]["configMap"] == {"name": "shop"}
    assert configuration.name in KUBERNETES["ConfigMap"]["data"]
    for place in (str(Path(environment["RUNTIME_DIRECTORY"]).parent), environment["STATE_DIRECTORY"], "/tmp"):
        assert "emptyDir" in mounts[place]
    (secret,) = (path for path, each in mounts.items() if "secret" in each)
    assert f"${{file:{secret}/webhook}}" in FLASKD["kubernetes"]
    assert set(KUBERNETES["Secret"]["stringData"]) == {"webhook"}


def test_the_other_containers_are_as_closed() -> None:
    """Compose and the quadlet have a read-only root, no capabilities, no new privileges, and a check without a shell."""
    assert COMPOSE["read_only"] is True
    assert COMPOSE["cap_drop"] == ["ALL"]
    assert COMPOSE["security_opt"] == ["no-new-privileges:true"]
    assert "/run:mode=1777" in COMPOSE["tmpfs"]
    assert COMPOSE["healthcheck"]["test"] == ["CMD", "/opt/flaskd/bin/flaskd", "ready"]
    container = quadlet()["Container"]
    assert {container[key] for key in ("ReadOnly", "NoNewPrivileges", "Notify")} == {"true"}
    assert container["DropCapability"] == "all"
    assert json.loads(container["HealthCmd"]) == ["/opt/flaskd/bin/flaskd", "health"]
    assert container["HealthOnFailure"] == "kill"


# --- what reads them ---


def test_haproxy_and_nginx_take_their_files(tmp_path: Path) -> None:
    """`haproxy -c` and `nginx -t` find no fault."""
    for name in ("httpchk", "agent"):
        run("haproxy", "-c", "-f", str(DEPLOY / f"haproxy/{name}.cfg"))
    text = (DEPLOY / "nginx/nginx.conf").read_text()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{each}_temp_path {tmp_path}/{each};" for each in kinds)
    assert text.count("http {\n") == text.count("listen 192.0.2.1:80;") == 1
    text = text.replace("http {\n", f"http {{ access_log off; {places}\n")
    (tmp_path / "nginx.conf").write_text(text.replace("listen 192.0.2.1:80;", f"listen unix:{tmp_path}/socket;"))
    run("nginx", "-t", "-g", f"pid {tmp_path}/pid; error_log stderr;", "-c", str(tmp_path / "nginx.conf"))


def run(*command: str) -> None:
    """Run a command that must succeed; without the program skip, or fail if $FLASKD_REQUIRE names it."""
    program = shutil.which(command[0], path="/usr/sbin:/usr/bin:/sbin:/bin")
    if program is None:
        required = command[0] in os.environ.get("FLASKD_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(f"no {command[0]} here")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_takes_the_manifests() -> None:
    """Each document is valid by the API's schema, without unknown keys; .ci/run installs kubernetes-validate."""
    if importlib.util.find_spec("kubernetes_validate") is None:
        required = "kubernetes-validate" in os.environ.get("FLASKD_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)("needs kubernetes-validate")
    import kubernetes_validate

    for document in KUBERNETES.values():
        kubernetes_validate.validate(document, "1.32", strict=True)


# --- docs/fleet.md ---


def recipe(language: str, first: str) -> str:
    """The block of that language in docs/fleet.md that has this line."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/fleet.md").read_text(), re.DOTALL)
    (block,) = (each for each in blocks if first in each)
    return block


def test_the_recipes_have_times_that_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Swarm and Nomad wait longer than flaskd takes, kamal as long as docker; kamal asks flaskd's health path."""
    swarm = yaml.safe_load(recipe("yaml", "# swarm.yaml"))["services"]["shop"]
    environment = COMPOSE["environment"] | swarm["environment"]
    for name in ("DEADLINE", "ANNOUNCE"):
        monkeypatch.setenv(name, environment[name])
    stop = config("image", tmp_path).shutdown
    assert 5 <= stop.announce < stop.deadline < parse_duration(COMPOSE["stop_grace_period"])
    assert swarm["deploy"]["update_config"]["order"] == "start-first"

    nomad = dict(re.findall(r'(\w+) *= "([^"]*)"', recipe("hcl", 'job "shop"')))
    assert parse_duration(nomad["DEADLINE"]) < parse_duration(nomad["kill_timeout"]) <= 30
    assert parse_duration(nomad["shutdown_delay"]) >= 5
    assert nomad["path"] == "/up"

    kamal = yaml.safe_load(recipe("yaml", "# config/deploy.yml"))
    assert kamal["proxy"]["app_port"] == 8080
    assert config("image", tmp_path).health.path == "/up"
    (play,) = yaml.safe_load(recipe("yaml", "- hosts: shop"))
    assert play["serial"] == 1


def test_the_tables_defaults_are_those_of_the_image() -> None:
    """The documentation has each variable of deploy/image.yaml, with its default."""
    found = dict(re.findall(r"\$\{env:(\w+):-([^}]*)\}", FLASKD["image"]))
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "docs/fleet.md").read_text(), re.MULTILINE)
    assert {name: default for name, default in rows if name != "FLASK_APP"} == found
