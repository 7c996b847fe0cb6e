"""Directories and the files in them: the runtime directory, the state directory, the record of the last stop."""
