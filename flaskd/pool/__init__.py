"""Worker processes, as the supervisor has them: how they are started, told, watched and replaced."""
