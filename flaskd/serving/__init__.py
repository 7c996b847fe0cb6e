"""What serves the app, and how it comes to its end: launch, drain, stop; in the daemon and embedded in a program."""
