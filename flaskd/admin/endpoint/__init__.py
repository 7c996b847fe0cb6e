"""The shutdown endpoint: its rules, its token, its listener, and the one that an app opens in its own code."""
