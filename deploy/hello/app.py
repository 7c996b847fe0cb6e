"""The smallest app that shows that the image works: another directory takes its place (see Containerfile)."""

import flask

app = flask.Flask(__name__)


@app.get("/")
def hello() -> str:
    """Say hello."""
    return "Hello from flaskd\n"
