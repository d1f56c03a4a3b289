"""Lets tests import the kit's modules by the names under which Ansible runs them.

`from ansible.module_utils import kit_x` and `from ansible.modules import kit_files` both work.
"""

import tests  # noqa: F401
