"""flaskd's directories and their files: the runtime directory, the state directory, the record of the last stop."""
