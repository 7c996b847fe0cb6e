"""The shutdown endpoint: its rules, its token, its listener, and the class that an app opens it with."""
