"""The process from the kernel's point of view: its first steps, PID 1, forked children, signals, the exit."""
