"""What concerns the process as the kernel has it: its first steps, PID 1, forked children, signals, the exit."""
