"""Worker processes as the supervisor sees them: how it starts, directs, watches and replaces them."""
