"""Serving the app, from its launch to its drain and stop, in the daemon and embedded in a program."""
