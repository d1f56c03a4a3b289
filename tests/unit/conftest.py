"""Lets tests import the kit's modules by the names under which Ansible runs them.

`from ansible.module_utils import kit_x` and `from ansible.modules import kit_files` both work.
"""

from pathlib import Path

import ansible.module_utils
import ansible.modules

PLUGINS = Path(__file__).resolve().parents[2] / "deploy" / "plugins"

ansible.module_utils.__path__.append(str(PLUGINS / "module_utils"))
ansible.modules.__path__.append(str(PLUGINS / "modules"))
