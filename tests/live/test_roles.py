"""Roles, with real client processes of other users."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from daemon_kit import Flaskd
from patience import PATIENCE

NOBODY, DAEMON = 65534, 1

AS_NOBODY = f"""
import glob, grp, os, pwd, sys, tempfile
import flaskd.cli, flaskd.cli.asking, flaskd.cli.top  # the place where Python is may be closed to others
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
sys.exit(flaskd.cli.main())
"""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("curl"), reason="needs root, to become other users, and curl"
)


def serve(flaskd: Flaskd, control: str, mode: str = "0666") -> None:
    """A daemon in a public directory, whose socket every user may open unless its mode forbids it."""
    flaskd.directory.chmod(0o755)
    flaskd.runtime.mkdir()
    flaskd.runtime.chmod(0o755)
    flaskd.write("flaskd.yaml", f"control: {{mode: {mode}, {control}}}\n")
    flaskd.start()


def post(flaskd: Flaskd, verb: str, user: int, group: int = NOBODY, groups: tuple[int, ...] = ()) -> tuple[int, str]:
    """A user's answer to a verb: the status, and the result or the refusal."""
    done = subprocess.run(
        ["curl", "-s", "-X", "POST", "-w", "\n%{http_code}", "--unix-socket", str(flaskd.socket_path), f"http://x/{verb}"],
        user=user, group=group, extra_groups=groups, cwd="/", capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    answer = json.loads(body)
    return int(status), answer["result"] if answer["ok"] else answer["error"]["message"]


def test_users_have_the_roles_of_the_configuration(flaskd: Flaskd) -> None:
    """A viewer looks, an operator drains, an admin stops; each refusal names the needed role and is logged."""
    serve(flaskd, "roles: {viewer: [nobody], operator: ['@daemon'], admin: [daemon]}")
    assert post(flaskd, "status", NOBODY) == (200, "ready")
    assert post(flaskd, "drain", NOBODY) == (
        403, f"drain needs the role operator; uid {NOBODY} has the role viewer (control.roles)",
    )  # fmt: skip
    assert post(flaskd, "drain?wait", NOBODY, groups=(DAEMON,)) == (200, "drained")
    assert post(flaskd, "resume", NOBODY, group=DAEMON) == (200, "ready")
    assert post(flaskd, "stop", NOBODY, group=DAEMON)[0] == 403
    assert post(flaskd, "status", 4242) == (403, "status needs the role viewer; uid 4242 has no role (control.roles)")
    assert post(flaskd, "help", 4242) == (200, "help")
    assert flaskd.status()["state"] == "ready"
    assert post(flaskd, "stop", DAEMON) == (200, "stopping")
    assert flaskd.wait() == 0
    assert f"control: refused drain from uid={NOBODY}" in flaskd.log
    assert f"control: drain wait from uid={NOBODY}" in flaskd.log
    assert "command=curl" in flaskd.log
    assert flaskd.record()["reason"].startswith("control: uid=1 pid=")


def test_roles_change_with_a_reload(flaskd: Flaskd) -> None:
    """A user without a role may stop flaskd after a reload that makes the user admin."""
    serve(flaskd, "roles: {admin: [root]}")
    assert post(flaskd, "stop", NOBODY)[0] == 403
    flaskd.write("flaskd.yaml", "control: {mode: 0666, roles: {admin: [nobody]}}\n")
    assert flaskd.client("reload")[0] == 0
    assert post(flaskd, "stop", NOBODY) == (200, "stopping")
    assert flaskd.wait() == 0


def test_who_may_not_open_the_socket_has_no_role_to_ask_for(flaskd: Flaskd) -> None:
    """A user who may not open the socket is refused by its mode, whatever the roles are."""
    serve(flaskd, "roles: {admin: [nobody]}", mode="0600")
    with pytest.raises(subprocess.CalledProcessError):
        post(flaskd, "status", NOBODY)
    assert flaskd.stop() == 0


def test_the_command_says_who_may_and_exits_with_77(flaskd: Flaskd) -> None:
    """If socket or directory cannot be opened, the client names the users who may, exits with 77, without a traceback."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", AS_NOBODY, *args]
        return subprocess.run(
            argv, cwd="/", env=flaskd.env, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    serve(flaskd, "roles: {}", mode="0660")
    place = flaskd.socket_path
    for mode, fault in (
        (0o755, f"cannot talk to the daemon at {place}"),
        (0o750, f"cannot look for a daemon in {flaskd.runtime}"),
    ):
        flaskd.runtime.chmod(mode)
        for verb in ("status", "drain", "top", "last-stop"):
            done = run(verb)
            assert done.returncode == 77, done.stderr
            assert done.stderr.startswith(f"flaskd: {fault}: Permission denied; it is for the user root and the group ")
        named = run("status", "--socket", str(place))
        assert named.returncode == 77, named.stderr
        assert "Traceback" not in named.stderr
        listed = run("list")
        assert ("not told" in listed.stdout) is (mode == 0o755), (
            listed.stderr
        )  # if it may read the directory, it sees a socket
        assert "Traceback" not in listed.stderr
    assert flaskd.stop() == 0


def test_the_fifo_takes_what_it_was_told_to_take(flaskd: Flaskd) -> None:
    """With roles the FIFO accepts only the verbs of `control.fifo`, and refusals are logged."""
    serve(flaskd, "roles: {admin: [root]}, fifo: [drain, resume]")
    subprocess.run(["sh", "-c", f"echo stop > {flaskd.fifo_path}"], check=True, timeout=PATIENCE)
    flaskd.until(lambda: "stop is not for the FIFO, which takes drain, resume" in flaskd.log)
    subprocess.run(["sh", "-c", f"echo drain > {flaskd.fifo_path}"], check=True, timeout=PATIENCE)
    flaskd.wait_message("drained")
    assert flaskd.stop() == 0


def test_with_roles_alone_there_is_no_fifo(flaskd: Flaskd) -> None:
    """With roles and without `control.fifo` there is no FIFO, because its writer is not known."""
    serve(flaskd, "roles: {admin: [root]}")
    assert not flaskd.fifo_path.exists()
    assert flaskd.stop() == 0


def test_a_directory_made_for_this_run_lets_the_group_in(flaskd: Flaskd) -> None:
    """Members of `control.group` reach the socket, also in a directory that was made again."""
    flaskd.directory.chmod(0o755)
    flaskd.write("flaskd.yaml", "control: {group: daemon}\n")
    flaskd.start()
    assert post(flaskd, "drain?wait", NOBODY, group=DAEMON) == (200, "drained")
    for path in (flaskd.socket_path, flaskd.fifo_path):
        path.unlink()
    flaskd.runtime.rmdir()
    flaskd.until(flaskd.socket_path.exists)
    assert post(flaskd, "resume", NOBODY, groups=(DAEMON,)) == (200, "ready")
    assert flaskd.stop() == 0
