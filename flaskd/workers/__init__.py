"""What runs inside of workers, templates and a `ServerProcess`; `process` is how its owner sees the last one."""
