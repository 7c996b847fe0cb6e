"""Containerfile and deploy/ with a real podman: built, started, healthy, stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml
from daemon_kit import GATE_APP, Gate, requires
from patience import PATIENCE, until
from podman_kit import BASE, IMAGE, Podman, quadlet, why_no_podman
from systemd_kit import PROJECT, Systemd, or_skipped

ADDED = 40_000_000
"""How many bytes an image may add to its base."""
NOWHERE_TO_WRITE = ("--read-only", "--read-only-tmpfs=false")
NO_PRIVILEGES = ("--cap-drop=all", "--security-opt=no-new-privileges")
SHOP = """
import os
import flask
import tomlkit

def create_app():
    app = flask.Flask(__name__)
    app.add_url_rule("/", "hello", lambda: f"{tomlkit.__name__} of {os.getuid()}")
    return app
"""


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """One podman for all tests; it has the image of Containerfile."""
    requires("podman", why_no_podman())
    with or_skipped("podman"), Systemd(bare=True) as systemd:
        podman = Podman(systemd)
        podman.import_base()
        podman.build(IMAGE)
        yield podman


def gate_app(systemd: Systemd) -> Gate:
    """An app in /srv/gateapp that holds requests until the test lets them go."""
    systemd.write("/srv/gateapp/gateapp.py", GATE_APP)
    gate = Gate(systemd.seen("/srv/gateapp/gate"))
    gate.path.chmod(0o777)
    return gate


def ask_later(systemd: Systemd, url: str) -> subprocess.Popen[str]:
    """GET a URL where the containers run, in the background; its output is the body."""
    return subprocess.Popen(systemd.command("curl", "-sS", url), stdout=subprocess.PIPE, text=True)


def test_the_image_is_small(podman: Podman) -> None:
    """It adds at most 40 MB to its base."""
    added = podman.size(IMAGE) - podman.size(BASE)
    print(f"the image adds {added / 1e6:.1f} MB to its base")
    assert 5_000_000 < added <= ADDED


@pytest.mark.parametrize("tmpfs", [("--tmpfs=/run:rw,mode=1777",), ()], ids=["tmpfs", "nothing"])
def test_a_read_only_root_is_enough(podman: Podman, tmpfs: tuple[str, ...]) -> None:
    """With a read-only root, no /tmp, no privileges and an unknown user it serves; a tmpfs at /run gives it control."""
    podman("run", "-d", "--name=ro", *NOWHERE_TO_WRITE, *NO_PRIVILEGES, *tmpfs, IMAGE)
    try:
        if tmpfs:
            podman.until_healthy("ro")
            assert podman("exec", "ro", "flaskd", "ready") == "ready"
        until(lambda: '"ready: ' in podman.logs("ro"), lambda: podman.logs("ro"))
        assert podman.ask("http://127.0.0.1:8080/") == "Hello from flaskd\n 200"
        assert podman.ask("http://127.0.0.1:8080/up").endswith(" 200")
        assert podman("exec", "ro", "id", "-u") == "65532"
        podman("stop", "ro")
        assert podman("inspect", "-f", "{{.State.ExitCode}}", "ro") == "0"
        lines = [json.loads(line) for line in podman.logs("ro").splitlines()]
        assert ("control is not complete" in str(lines)) is not bool(tmpfs)
    finally:
        podman("rm", "-f", "ro")


def test_a_stop_takes_as_long_as_the_work_in_hand(podman: Podman) -> None:
    """Requests that run at `podman stop` are answered; the record stays in a volume."""
    gate = gate_app(podman.systemd)
    try:
        podman("run", "-d", "--name=slow", "--read-only", "--env=FLASK_APP=gateapp", "--env=GATE=/app/gate",
               "-v=/srv/gateapp:/app:ro", "-v=slow-state:/var/lib/flaskd", IMAGE)  # fmt: skip
        podman.until_healthy("slow")
        held = ask_later(podman.systemd, "http://127.0.0.1:8080/hold")
        gate.entered()
        stop = subprocess.Popen(podman.systemd.command("podman", "stop", "slow"), stdout=subprocess.DEVNULL)
        until(lambda: "stopping (signal: SIGTERM): 1 in flight" in podman.logs("slow"), lambda: podman.logs("slow"))
        gate.open()
        assert held.communicate(timeout=PATIENCE)[0] == "held"
        assert stop.wait(PATIENCE) == 0
        assert podman("inspect", "-f", "{{.State.ExitCode}}", "slow") == "0"
        volume = podman("volume", "inspect", "-f", "{{.Mountpoint}}", "slow-state")
        record = json.loads(podman.systemd.run("cat", f"{volume}/last-stop.json").stdout)
        assert (record["reason"], record["completed"], record["cut"]) == ("signal: SIGTERM", 1, [])
    finally:
        gate.close()
        podman("rm", "-f", "-t0", "slow")


def test_an_app_from_another_directory_has_its_requirements(podman: Podman) -> None:
    """--build-context app= and --build-arg APP= replace the hello app, and install its requirements.txt."""
    podman.systemd.write("/srv/shop/shop.py", SHOP)
    podman.systemd.write("/srv/shop/requirements.txt", "tomlkit\n")
    podman.build("localhost/other", "--build-context", f"app={podman.systemd.seen('/srv/shop')}")
    what = ("--env=FLASK_APP=shop:create_app()", "--env=PORT=8181")
    podman("run", "-d", "--name=other", "--read-only", *what, "localhost/other")
    try:
        podman.until_healthy("other")
        assert podman.ask("http://127.0.0.1:8181/") == "tomlkit of 65532 200"
    finally:
        podman("rm", "-f", "-t5", "other")


def test_the_quadlet_is_a_service(podman: Podman) -> None:
    """`systemctl start` returns when flaskd is ready, `reload` after the reload, and a stop is clean."""
    systemd = podman.systemd
    directory = PROJECT / "deploy/quadlet"
    systemd.run("env", f"QUADLET_UNIT_DIRS={directory}", str(quadlet()), "/run/systemd/system")
    unit = systemd.run("cat", "/run/systemd/system/shop.service").stdout
    assert "--sdnotify=container" in unit
    # Here are neither cgroups nor a bridge; all else is as it was generated.
    unit = unit.replace("--cgroups=split", "--cgroups=disabled --network=host")
    # Debian 12's podman wants the file removed that names the container; newer ones do not need that.
    unit = unit.replace("[Service]\n", "[Service]\nExecStartPre=-/bin/rm -f %t/%N.cid\n")
    systemd.write("/run/systemd/system/shop.service", unit)
    systemd.run("bash", "-c", "printf s3cret | podman secret create shop-secret-key -")
    systemd.ctl("daemon-reload")
    systemd.ctl("start", "shop.service")
    try:
        assert podman.ask("http://127.0.0.1:8080/") == "Hello from flaskd\n 200"
        assert podman("exec", "shop", "printenv", "FLASK_SECRET_KEY") == "s3cret"
        systemd.ctl("reload", "shop.service")
        assert "reloaded /etc/flaskd/flaskd.yaml" in systemd.journal("shop.service")
        podman("healthcheck", "run", "shop")
        systemd.ctl("stop", "shop.service")
        assert systemd.show("shop.service", "Result") == "success"
    finally:
        systemd.ctl("stop", "shop.service", check=False)
    assert "stopped: completed=0 rejected=0 cut=0" in systemd.journal("shop.service")


def test_the_manifests_make_a_pod(podman: Podman) -> None:
    """`podman kube play` runs the pod with the ConfigMap's flaskd.yaml, its Secret, its user and its read-only root."""
    documents = list(yaml.safe_load_all((PROJECT / "deploy/kubernetes.yaml").read_text()))
    (deployment,) = (each for each in documents if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {each["name"]: each["containerPort"] for each in container.pop("ports")}
    probes = {name: container.pop(name)["httpGet"] for name in list(container) if name.endswith("Probe")}
    del container["resources"]
    # Debian 12's podman cannot do these: ports and limits in these namespaces, and a secret in Kubernetes' form.
    deployment["spec"]["replicas"] = 1
    pod["hostNetwork"] = True
    (secret,) = (each for each in documents if each["kind"] == "Secret")
    for name, text in secret["stringData"].items():
        podman.systemd.write(f"/srv/secret/{name}", text)
    (volume,) = (each for each in pod["volumes"] if "secret" in each)
    del volume["secret"]
    volume["hostPath"] = {"path": "/srv/secret"}
    podman.systemd.write("/srv/shop.yaml", yaml.safe_dump_all(each for each in documents if each is not secret))
    podman("kube", "play", "--network=host", "/srv/shop.yaml")
    name = podman("ps", "--format={{.Names}}", "--filter=ancestor=" + IMAGE)
    try:
        for probe in probes.values():
            url = f"http://127.0.0.1:{ports[probe['port']]}{probe['path']}"
            until(lambda url=url: podman.ask(url).endswith(" 200"), lambda: podman.logs(name))
        assert len(probes) == 3
        assert podman.ask(f"http://127.0.0.1:{ports['http']}/") == "Hello from flaskd\n 200"
        assert podman("exec", name, "flaskd", "ready") == "ready"
        assert podman("exec", name, "id", "-u") == "65532"
        assert podman("inspect", "-f", "{{.HostConfig.ReadonlyRootfs}} {{.EffectiveCaps}}", name) == "true []"
        podman("exec", name, "sh", "-c", "echo > /tmp/x && echo > /var/lib/flaskd/x && ! echo > /app/x")
    finally:
        print(podman.logs(name))
        podman("kube", "down", "/srv/shop.yaml")


def test_the_compose_file_makes_a_container(podman: Podman) -> None:
    """podman-compose starts the container, its check succeeds, and it stops within its grace."""
    podman.systemd.write("/srv/host.yaml", "services: {shop: {network_mode: host}}\n")
    files = ("-f", str(PROJECT / "deploy/compose.yaml"), "-f", "/srv/host.yaml")
    compose = (sys.executable, "-m", "podman_compose", *files)
    podman.systemd.run(*compose, "up", "-d", "--no-build")
    name = podman("ps", "--format={{.Names}}", "--filter=ancestor=" + IMAGE)
    try:
        podman.until_healthy(name)
        assert podman.ask("http://127.0.0.1:8080/") == "Hello from flaskd\n 200"
        assert podman("inspect", "-f", "{{.HostConfig.ReadonlyRootfs}} {{.EffectiveCaps}}", name) == "true []"
        podman("exec", name, "test", "-w", "/var/lib/flaskd")
        podman.systemd.run(*compose, "stop")
        assert "at most 25s for everything" in podman.logs(name)
    finally:
        podman.systemd.run(*compose, "down", "-v")
