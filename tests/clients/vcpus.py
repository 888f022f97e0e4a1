"""What a Firecracker client gains: GET /vcpus, over the socket that the client knows."""

import http.client
import json
import socket
import time

# A guard against hanging, far above what the slowest machine needs.
PATIENCE_S = 60


def readings(path):
    """The readings of all vCPUs of the microVM that serves its API at `path`."""
    return _request(path, "GET", "/vcpus")


def running(path):
    """Readings of vCPU 0 a while apart: the second is the first in which the guest has exited more often."""
    first = readings(path)[0]
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_S:
        second = readings(path)[0]
        if second["exits"]["total"] > first["exits"]["total"]:
            return [first, second]
        time.sleep(0.02)
    raise TimeoutError(f"the guest does not run: {second}")


def ctrl_alt_del(path):
    """Asks the guest to end."""
    _request(path, "PUT", "/actions", {"action_type": "SendCtrlAltDel"})


def _request(path, method, route, body=None):
    connection = http.client.HTTPConnection("localhost", timeout=PATIENCE_S)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(PATIENCE_S)
    try:
        connection.sock.connect(path)
        connection.request(method, route, body=json.dumps(body) if body else None)
        response = connection.getresponse()
        text = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {route}: {response.status}: {text}")
        return json.loads(text) if text else None
    finally:
        connection.close()
