"""The smallest app that shows that the image works; to serve another one, see Containerfile."""

import flask

app = flask.Flask(__name__)


@app.get("/")
def hello() -> str:
    """Say hello."""
    return "Hello from flaskd\n"
