"""Entry point: the plugin daemon runs `python -m main` in the plugin's folder."""

from dify_plugin import DifyPluginEnv, Plugin

# A long answer of a small machine takes minutes; the daemon's own limit (PLUGIN_MAX_EXECUTION_TIMEOUT) is 600 s.
plugin = Plugin(DifyPluginEnv(MAX_REQUEST_TIMEOUT=600))

if __name__ == "__main__":
    plugin.run()
