"""Entry point: the plugin daemon runs `python -m main` in the plugin's folder."""

import os

# A long answer of a small machine takes minutes; the daemon's own limit (PLUGIN_MAX_EXECUTION_TIMEOUT) is 600 s. The
# SDK's model classes read it from the environment when they are imported, not from what a Plugin is given.
os.environ.setdefault("MAX_REQUEST_TIMEOUT", "600")

from dify_plugin import DifyPluginEnv, Plugin

plugin = Plugin(DifyPluginEnv())

if __name__ == "__main__":
    plugin.run()
