"""What agents of the new type need: their backend, and where it is allowed, commands behind a jail."""

import pytest

from tests.hosts.kit_host import KitHost


@pytest.mark.deep  # a deploy has just waited for this answer
@pytest.mark.service("agent-backend")
def test_the_agent_backend_answers(kit: KitHost) -> None:
    answer = kit.probe("agent_backend", port=kit.ports["agent-backend"])
    assert answer["status"] == 200, f"it said {answer['status']}. Read `make logs SERVICE=agent-backend`."
    assert answer["title"] == "Dify Agent Run Server", f"port {kit.ports['agent-backend']} belongs to {answer['title']}"
    assert "/runs" in answer["paths"], f"agents can't be started, only {answer['paths']} is there"


@pytest.mark.deep
@pytest.mark.service("agent-runtime")
def test_agents_commands_see_nothing_of_the_kit(kit: KitHost) -> None:
    private = ["etc/env/api.env", "etc/supervisord.conf", "var/run/supervisor.sock", "var/storage", "var/postgres"]
    looks = [f'[ -e {kit.home}/{path} ] && echo "sees {path}"' for path in private]
    looks += [
        # -s: a process may end between the shell's list and grep's look.
        'grep -azqs super[v]isord /proc/[0-9]*/cmdline && echo "sees the kit\'s processes"',
        f'[ "$(id -u)" = {kit.run("id", "-u").strip()} ] || echo "is uid $(id -u)"',
        "touch /usr/kit-check 2>/dev/null && echo 'writes to /usr'",
        "for tool in sh tmux python3 node uv dify-agent; do command -v $tool >/dev/null || echo lacks $tool; done",
        "echo looked",
    ]
    # Once as a command is run, behind Landlock; and once as one that got around it: upstream's tmux, whose socket a
    # command reaches, starts programs that are not. Neither may leave the kit's own jail.
    tmux = 'tmux -S "$XDG_DATA_HOME/shellctl/runtime/tmux.sock" new-session -d'
    script = [
        *["cd $HOME && rm -f found && cat > looks <<'END'", *looks, "END"],
        f'{tmux} "cd $HOME && sh looks > part && mv part found"',
        "for _ in $(seq 100); do [ -e found ] && break; sleep 0.1; done",
        "cat found; sh looks; env | grep -E 'TOKEN|SECRET|PASSWORD' | sed 's/=.*/ is told/'",
    ]
    answer = kit.probe("agent_command", port=kit.ports["agent-runtime"], script="\n".join(script))
    assert answer["stranger"] == 401, f"without its token it said {answer['stranger']} instead of 401"
    assert answer["status"] == 200, f"{answer['output']}. Read `make logs SERVICE=agent-runtime`."
    assert answer["output"].split() == ["looked", "looked"], f"a command {answer['output']}. Run `make deploy`."
