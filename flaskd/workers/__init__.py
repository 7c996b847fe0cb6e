"""What runs inside of a worker, and of a template. `process`: an app in a process of its own, as its owner sees it."""
