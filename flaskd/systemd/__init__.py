"""What flaskd tells its service manager, the listeners that the manager keeps for it, and the unit files."""
