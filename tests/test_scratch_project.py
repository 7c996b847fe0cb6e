"""A user's project: flaskd is installed from its wheel, and used in the project's tests, in two processes."""

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROJECT = {
    "shop.py": """
        import threading
        from flask import Flask

        entered, released = threading.Event(), threading.Event()

        def create_app():
            app = Flask("shop")
            app.add_url_rule("/", "hello", lambda: "hello")

            @app.get("/slow")
            def slow():
                entered.set()
                released.wait(30)
                return "slow"

            return app
        """,
    "conftest.py": """
        import pytest, shop

        @pytest.fixture(scope="session")
        def app():
            return shop.create_app()
        """,
    "test_fixture.py": """
        from urllib.request import urlopen

        import flaskd, pytest

        @pytest.mark.parametrize("number", range(4))
        def test_the_fixture(flaskd_server, number):
            assert isinstance(flaskd_server, flaskd.ServerThread)
            with urlopen(flaskd_server.url, timeout=20) as answer:
                assert answer.read() == b"hello"
        """,
    "test_thread.py": """
        import threading
        from urllib.request import urlopen

        import flaskd, pytest, shop

        @pytest.mark.parametrize("kind", ["waitress", "werkzeug"])
        def test_what_is_in_flight_at_the_stop_is_answered(app, kind):
            shop.entered.clear(), shop.released.clear()
            said = []
            def ask():
                with urlopen(server.url + "slow", timeout=20) as answer:
                    said.append(answer.read())
            with flaskd.ServerThread(app, server=kind) as server:
                client = threading.Thread(target=ask)
                client.start()
                assert shop.entered.wait(20)
                threading.Timer(0.2, shop.released.set).start()
            client.join()
            assert said == [b"slow"]
            assert server.report.clean
        """,
    "test_process.py": """
        from urllib.request import urlopen

        import flaskd

        def test_a_process():
            with flaskd.ServerProcess("shop:create_app()") as server:
                with urlopen(server.url, timeout=20) as answer:
                    assert answer.read() == b"hello"
            assert server.exitcode == 0
        """,
    "test_installed.py": """
        import sys
        from importlib.metadata import distribution
        from pathlib import Path

        import flaskd

        def test_it_is_the_installed_one():
            assert Path(flaskd.__file__).is_relative_to(sys.prefix)
            assert {each.group for each in distribution("flaskd").entry_points} >= {"pytest11", "flask.commands"}
        """,
    "pytest.ini": """
        [pytest]
        addopts = -p no:cacheprovider
        filterwarnings = error
        """,
}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A virtual environment in which flaskd is installed, from a wheel and without any network."""
    place = tmp_path_factory.mktemp("scratch") / "venv"
    venv.create(place)
    python = place / "bin" / "python"
    # What flaskd and the tests need is taken from where these tests run; a plain path, so that an editable flaskd
    # there is not seen here.
    site = sysconfig.get_path("purelib", vars={"base": str(place)})
    (Path(site) / "from-the-tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps",
            "--no-build-isolation", "--force-reinstall", "--disable-pip-version-check", str(ROOT),
        ],
        check=True,
    )  # fmt: skip
    return python


@pytest.fixture
def project(tmp_path):
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    return tmp_path


def run(python, project, *words):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "FLASK", "PYTHON"))}
    done = subprocess.run(
        [python, *words], cwd=project, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    print(done.stdout, done.stderr)
    return done


def test_a_package_index_shows_the_readme_with_links_that_lead_somewhere(python):
    """Links to files of the project are absolute there, below the address of the source; so is each of the addresses."""
    (metadata,) = python.parent.parent.rglob("flaskd-*.dist-info/METADATA")
    head, _, page = metadata.read_text().partition("\n\n")
    urls = dict(re.findall(r"^Project-URL: (\w+), (.*)$", head, re.MULTILINE))
    source = urls["Source"]
    here = [link for link in re.findall(r"\]\(([^)#]+)", page) if link.startswith(source)]
    assert len(here) == len(re.findall(r"\]\((?!https?:|#)", (ROOT / "README.md").read_text())) > 20
    assert not re.search(r"\]\((?!https?://|#)|<(?:img|a) ", page)
    assert {"Documentation", "Changelog"} < set(urls)
    places = [url.removeprefix(source) for url in (*here, *urls.values())]
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_man_and_the_shells_find_their_files(python):
    """Man and the shells find their files below the prefix, if its bin is in PATH; so is the annotated configuration."""
    prefix = python.parent.parent
    shared = ("man/man1/flaskd.1", "man/man5/flaskd.yaml.5", "bash-completion/completions/flaskd",
              "zsh/site-functions/_flaskd", "fish/vendor_completions.d/flaskd.fish")  # fmt: skip
    assert [
        each for each in shared if (prefix / "share" / each).read_text() != (ROOT / "share" / each).read_text()
    ] == []
    (annotated,) = prefix.rglob("flaskd/config/flaskd.yaml")
    assert annotated.read_text() == (ROOT / "config" / "flaskd.yaml").read_text()
    assert not (prefix / "share" / "make.py").exists()


@pytest.mark.parametrize("how", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_its_tests_pass(python, project, how):
    """The fixture, ServerThread and ServerProcess, with warnings as errors."""
    done = run(python, project, "-m", "pytest", "-q", *how)
    assert done.returncode == 0
    assert "8 passed" in done.stdout


def test_its_flask_has_the_command(python, project):
    """``flask --help`` lists it, and its own help has the options of ``flaskd serve``."""
    assert (
        "  daemon  Serve the app in production" in run(python, project, "-m", "flask", "--app", "shop", "--help").stdout
    )
    assert "--listen" in run(python, project, "-m", "flask", "--app", "shop", "daemon", "--help").stdout


def test_the_annotated_configuration_comes_with_it(python, project):
    """The installed package has config/flaskd.yaml, to be read without a clone."""
    printed = "import pathlib, flaskd; print(pathlib.Path(flaskd.__file__).with_name('config') / 'flaskd.yaml')"
    installed = Path(run(python, project, "-c", printed).stdout.strip())
    assert not installed.is_relative_to(ROOT)
    assert installed.read_text() == (ROOT / "config" / "flaskd.yaml").read_text()
