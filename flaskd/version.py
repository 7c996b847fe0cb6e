"""The version of flaskd, a fact that every layer may ask for."""

__version__ = "0.1.0"
