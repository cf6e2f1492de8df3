"""The service in a network of its own with nothing in it: not even libraries of C find a way out."""

import os
import subprocess
import sys

from tests.http_client import ROOT

LONELY = """
import fcntl, socket, struct, sys
with socket.socket() as any:  # where the machine is not ours alone, it is up already
    try:
        fcntl.ioctl(any, 0x8914, struct.pack("16sh", b"lo", 1))
    except OSError:
        pass
from tests.test_service_process import drive
from tests.http_client import Visitor, running
with running() as app, Visitor(app.address) as visitor:
    drive(visitor)
"""


def test_it_works_where_there_is_no_network_at_all(tmp_path):
    """The network is a new one where one may be made, elsewhere the machine's."""
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        may = subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:  # macOS, Windows
        may = False
    command = [*(alone if may else []), sys.executable, "-c", LONELY]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "GRADIO_TEMP_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
