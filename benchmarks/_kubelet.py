"""A double of the kubelet, written from Kubernetes' "Pod Lifecycle" ("Termination of Pods") and its issue #106476.

https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-termination: the kubelet sends SIGTERM to the
container's first process; "at the same time" the control plane removes the pod from the endpoints, and each node's
kube-proxy learns that some time later. When the grace period is over, SIGKILL ends what is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable


def end_pod(process: subprocess.Popen[bytes], leave: Callable[[], None], *, delay: float, grace: float) -> bool:
    """End a server that leads its process group; `delay` seconds later, `leave` removes it from the balancer.

    Returns when both are done: whether the server had to be killed after `grace` seconds.
    """
    process.send_signal(signal.SIGTERM)
    leaving = threading.Timer(delay, leave)
    leaving.start()
    killed = False
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        leaving.join()
    return killed
