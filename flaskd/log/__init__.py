"""What flaskd writes: its own log and the access log, as text, JSON or journal entries."""
