"""What flaskd says to its service manager, what that keeps for it, and the unit files."""
