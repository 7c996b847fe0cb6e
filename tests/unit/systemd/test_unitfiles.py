"""The unit files: how systemd's own tools judge them, how they are filled in, and how they are compared."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flaskd.errors import ConfigError, UsageError
from flaskd.systemd.unitfiles import compare, hidden_by, install, unit_files

SHIPPED = Path(__file__).parents[3] / "systemd"
VENV = Path(sys.prefix)

analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze") or not os.access("/tmp", os.W_OK),
    reason="systemd-analyze is not installed, or has no /tmp to work in",
)
FORMS = [(instance, activated) for instance in (None, "shop") for activated in (False, True)]


def put(tmp_path, instance, activated):
    """Install the units of one form below a directory; gives the paths of the service and socket units."""
    files = unit_files(venv=VENV, instance=instance, socket_activated=activated)
    return [path for path in install(files, tmp_path) if path.suffix in {".service", ".socket"}]


@analyze
@pytest.mark.parametrize(("instance", "activated"), FORMS)
def test_systemd_verifies_the_units_in_silence(tmp_path, instance, activated):
    """`systemd-analyze verify` prints nothing, also on standard error."""
    units = put(tmp_path, instance, activated)
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@analyze
@pytest.mark.parametrize(("instance", "activated"), FORMS)
def test_exposure_stays_low(tmp_path, instance, activated):
    """`systemd-analyze security` finds at most 1.4 as shipped, and at most 0.4 in the hardened form."""
    service = put(tmp_path, instance, activated)[0]
    most = "4" if activated else "14"
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={most}", service]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@analyze
def test_the_exposure_test_can_fail(tmp_path):
    """A unit without its sandbox does not pass."""
    bare = tmp_path / "bare.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=14", bare]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize(("instance", "activated"), FORMS)
def test_a_worker_without_memory_does_not_stop_the_service(instance, activated):
    """All forms have OOMPolicy=continue, because systemd by default stops a service of which a process is killed."""
    files = unit_files(venv=VENV, instance=instance, socket_activated=activated)
    (service,) = (text for path, text in files.items() if path.suffix == ".service")
    assert "\nOOMPolicy=continue\n" in service


def test_units_are_filled_in():
    """The path of the virtual environment and the name of the instance are filled in where they belong."""
    files = unit_files(venv=Path("/srv/venv"), instance="shop", socket_activated=True)
    assert {str(place) for place in files} == {
        "/etc/systemd/system/flaskd@shop.service",
        "/etc/systemd/system/flaskd@shop.socket",
        "/etc/systemd/system/flaskd@shop.service.d/hardened.conf",
        "/etc/sysusers.d/flaskd.conf",
        "/etc/tmpfiles.d/flaskd.conf",
    }
    service = files[Path("/etc/systemd/system/flaskd@shop.service")]
    assert "ExecStart=/srv/venv/bin/flaskd serve --name flaskd-shop -c /etc/flaskd/shop.yaml\n" in service
    assert "RuntimeDirectory=flaskd-shop\n" in service
    assert "StateDirectory=flaskd-shop\n" in service
    assert "%i" not in "".join(files.values())
    assert "/opt/flaskd" not in "".join(files.values())


def test_both_services_differ_only_in_their_names():
    """The template is the plain unit with `%i`, so both must be changed together."""
    plain = (SHIPPED / "flaskd.service").read_text().partition("[Unit]")[2]
    template = (SHIPPED / "flaskd@.service").read_text().partition("[Unit]")[2]
    for named, name in [
        ("flaskd %i:", "flaskd:"),
        (" --name flaskd-%i", ""),
        ("/etc/flaskd/%i.yaml", "/etc/flaskd/flaskd.yaml"),
        ("flaskd-%i", "flaskd"),
    ]:
        assert named in template
        template = template.replace(named, name)
    assert template == plain


@pytest.mark.parametrize("name", ["", "a/b", "-x", "a b", "ü", "a:b"])
def test_a_name_that_no_unit_could_have_is_refused(name):
    """A name that systemd would escape is refused."""
    with pytest.raises(UsageError, match="cannot name a unit"):
        unit_files(venv=VENV, instance=name)


def test_a_path_that_a_unit_would_misread_is_refused():
    """A path with characters that mean something in a unit is refused."""
    with pytest.raises(UsageError, match="expected a path without spaces"):
        unit_files(venv=Path("/srv/my venv"))


@pytest.mark.parametrize(("venv", "hidden"), [("/opt/flaskd", None), ("/home/me/venv", "/home"), ("/root/v", "/root")])
def test_a_hidden_environment_is_noticed(venv, hidden):
    """A virtual environment that ProtectHome= hides from the service is reported."""
    assert hidden_by(Path(venv)) == hidden


@pytest.mark.parametrize(
    ("text", "deadline", "says"),
    [
        ("TimeoutStopSec=35", 25.0, None),
        ("TimeoutStopSec=1min 30s", 60.0, None),
        ("TimeoutStopSec=infinity", 9999.0, None),
        ("TimeoutStopSec=0", 9999.0, None),
        ("", 25.0, None),
        ("TimeoutStopSec=35\nTimeoutStopSec=2min", 60.0, None),
        ("TimeoutStopSec=\\\n  2min", 60.0, None),
        ("TimeoutStopSec=1month", 2_000_000.0, None),
        ("TimeoutStopSec=1M", 2_000_000.0, None),
        ("TimeoutStopSec=1y", 31_000_000.0, None),
        ("TimeoutStopSec=1year", 31_000_000.0, None),
        ("TimeoutSec=20\nTimeoutStopSec=90", 25.0, None),
        ("TimeoutStopSec=90\nTimeoutSec=20", 25.0, "unit.service:3: TimeoutStopSec=20s ends a stop"),
        ("TimeoutSec=20\nTimeoutStopSec=90\nTimeoutSec=20", 25.0, "unit.service:4: TimeoutStopSec=20s ends a stop"),
        ("TimeoutStopSec=25", 25.0, "unit.service:2: TimeoutStopSec=25s ends a stop before shutdown.deadline (25s)"),
        ("TimeoutSec=20", 25.0, "set TimeoutStopSec=35, or a shutdown.deadline of at most 19s"),
        ("", 100.0, "TimeoutStopSec=1m30s ends a stop before"),
    ],
)
def test_the_deadline_is_compared_with_the_unit(tmp_path, text, deadline, says):
    """If TimeoutStopSec is not above the deadline, the message names the place and what to change."""
    unit = tmp_path / "unit.service"
    unit.write_text(f"[Service]\n{text}\n[Install]\nTimeoutStopSec=1\n")
    faults = compare(unit, deadline=deadline, fdstore=False)
    assert [says in fault for fault in faults] == ([True] if says else []), faults


def test_drop_ins_beside_the_unit_count(tmp_path):
    """A drop-in beside the unit overrides it."""
    unit = tmp_path / "unit.service"
    unit.write_text("[Service]\nTimeoutStopSec=90\n")
    (tmp_path / "unit.service.d").mkdir()
    (tmp_path / "unit.service.d/short.conf").write_text("[Service]\nTimeoutStopSec=3\n")
    (fault,) = compare(unit, deadline=25.0, fdstore=False)
    assert "short.conf:2: TimeoutStopSec=3s" in fault


TIMEOUTS = {
    "etc/systemd/system/flaskd@.service": 90,
    "etc/systemd/system/service.d/a.conf": 1,
    "usr/lib/systemd/system/flaskd@.service.d/a.conf": 2,
    "usr/lib/systemd/system/flaskd@shop.service.d/a.conf": 3,
    "run/systemd/system/flaskd@shop.service.d/a.conf": 4,
    "etc/systemd/system/flaskd@shop.service.d/a.conf": 5,
    "usr/lib/systemd/system/service.d/b.conf": 6,
    "etc/systemd/system/flaskd@other.service.d/z.conf": 90,
    "etc/systemd/system/flaskd.service.d/z.conf": 90,
}


def test_drop_ins_count_wherever_systemd_looks_for_them(tmp_path):
    """Drop-ins override each other as in systemd.unit(5): the instance's, then /etc, then by name."""
    unit = tmp_path / "etc/systemd/system/flaskd@shop.service"
    for place, seconds in TIMEOUTS.items():
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"[Service]\nTimeoutStopSec={seconds}\n")
        faults = compare(unit, deadline=25.0, fdstore=False)
        wins = seconds if seconds < 90 else 6
        if place.endswith("@.service"):
            assert faults == []
        else:
            assert f"TimeoutStopSec={wins}s ends a stop" in faults[0]


def test_drop_ins_of_the_beginnings_of_a_name_count(tmp_path):
    """`shop-web.service` has the drop-ins of `shop-.service.d/`, too, unless its own have the same name."""
    unit = tmp_path / "shop-web.service"
    for place, seconds in (("shop-web.service", 90), ("shop-.service.d/a.conf", 1), ("shop-web.service.d/a.conf", 2)):
        file = tmp_path / place
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"[Service]\nTimeoutStopSec={seconds}\n")
        says = [fault.partition(" ends")[0] for fault in compare(unit, deadline=25.0, fdstore=False)]
        assert says == ([f"{file}:2: TimeoutStopSec={seconds}s"] if seconds < 90 else [])


def test_a_store_that_keeps_nothing_is_named(tmp_path):
    """With `systemd.fdstore` a missing FileDescriptorStoreMax= is reported."""
    unit = tmp_path / "unit.service"
    unit.write_text("[Service]\n")
    (fault,) = compare(unit, deadline=25.0, fdstore=True)
    assert "set FileDescriptorStoreMax=16" in fault
    assert compare(SHIPPED / "flaskd.service", deadline=25.0, fdstore=True) == []


@pytest.mark.parametrize(("line", "found"), [("", True), ("OOMPolicy=stop", True), ("OOMPolicy=kill", False)])
def test_a_unit_that_stops_for_one_worker_is_found(tmp_path, line, found):
    """With workers a missing OOMPolicy= in the unit is reported; without workers it is not."""
    unit = tmp_path / "a.service"
    unit.write_text(f"[Service]\n{line}\nTimeoutStopSec=35\n")
    faults = compare(unit, deadline=25.0, fdstore=False, workers=True)
    assert [each.endswith("set OOMPolicy=continue") for each in faults] == [True] * found
    assert compare(unit, deadline=25.0, fdstore=False) == []
    assert compare(SHIPPED / "flaskd@.service", deadline=25.0, fdstore=False, workers=True) == []


@pytest.mark.parametrize("text", ["soon", "35 parsecs", "1..2", "5s soon"])
def test_a_time_span_that_is_none_is_named(tmp_path, text):
    """A time span that systemd could not read is a fault with its place."""
    unit = tmp_path / "unit.service"
    unit.write_text(f"[Service]\nTimeoutStopSec={text}\n")
    with pytest.raises(ConfigError, match=f'unit.service:2: TimeoutStopSec: expected a time span .* got "{text}"'):
        compare(unit, deadline=1.0, fdstore=False)


def flaskd(*args):
    """Run the command; gives its exit code and both outputs."""
    done = subprocess.run([sys.executable, "-m", "flaskd", *args], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_command_prints_what_is_installed(tmp_path):
    """`flaskd units` prints the files under their paths; `--install` writes the same."""
    code, out, _ = flaskd("units", "--venv", "/opt/flaskd", "--socket-activated")
    assert code == 0
    assert f"# /etc/systemd/system/flaskd.service\n{(SHIPPED / 'flaskd.service').read_text()}" in out
    code, written, _ = flaskd("units", "--venv", "/opt/flaskd", "--socket-activated", "--install", str(tmp_path))
    assert code == 0
    assert [path for path in written.splitlines() if not out.count(Path(path).read_text())] == []


def test_a_link_is_not_followed(tmp_path):
    """If `systemctl mask` has made a link to /dev/null, nothing is written."""
    place = tmp_path / "etc/systemd/system/flaskd.socket"
    place.parent.mkdir(parents=True)
    (tmp_path / "null").touch(0o666)
    (tmp_path / "null").chmod(0o666)
    place.symlink_to(tmp_path / "null")
    code, out, err = flaskd("units", "--socket-activated", "--install", str(tmp_path))
    assert (code, out) == (73, "")
    assert f"cannot write {place}: it is a link to {tmp_path}/null; remove it first" in err
    assert ((tmp_path / "null").stat().st_mode & 0o777, (tmp_path / "null").read_text()) == (0o666, "")
    assert list(place.parent.iterdir()) == [place]


def test_what_is_left_of_the_other_form_is_named(tmp_path):
    """If the plain form is installed over the hardened one, the remaining drop-in and socket are reported."""
    assert "left from" not in flaskd("units", "--install", str(tmp_path))[2]
    assert "left from" not in flaskd("units", "--socket-activated", "--install", str(tmp_path))[2]
    for options, unit in ([], "flaskd"), (["--instance", "shop"], "flaskd@shop"):
        flaskd("units", *options, "--socket-activated", "--install", str(tmp_path))
        code, _, err = flaskd("units", *options, "--install", str(tmp_path))
        place = tmp_path / "etc/systemd/system"
        assert code == 0
        assert f"still in force: {place}/{unit}.socket, {place}/{unit}.service.d/hardened.conf; stop the socket" in err


def test_an_environment_without_flaskd_is_noticed(tmp_path):
    """`flaskd units` warns on standard error if the units would not find flaskd, and writes the files all the same."""
    code, out, err = flaskd("units", "--venv", str(tmp_path))
    assert (code, f"{tmp_path}/bin/flaskd serve" in out) == (0, True)
    assert f"there is no {tmp_path}/bin/flaskd" in err
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/flaskd").touch()
    assert "there is no" not in flaskd("units", "--venv", str(tmp_path))[2]


def test_check_compares_with_a_unit(tmp_path):
    """`flaskd check --unit` exits with 78 if the unit would cut a stop short."""
    config = tmp_path / "flaskd.yaml"
    config.write_text("shutdown: {deadline: 1m}\n")
    code, _, err = flaskd("check", "--unit", str(SHIPPED / "flaskd.service"), str(config))
    assert (code, "set TimeoutStopSec=70, or a shutdown.deadline of at most 34s" in err) == (78, True)
    assert flaskd("check", "--unit", str(SHIPPED / "nothing.service"), str(config))[0] == 78
