"""The kit's modules are found under the names by which Ansible runs them, whichever folder's tests import them."""

import signal
from pathlib import Path

import ansible.module_utils
import ansible.modules

for package in (ansible.module_utils, ansible.modules):
    folder = Path(__file__).parents[1] / "deploy/plugins" / package.__name__.rpartition(".")[2]
    package.__path__.append(str(folder))

# A shell starts its background jobs with SIGINT ignored, and so would be these tests and whatever they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
