"""Several hosts on this machine: network namespaces with their own addresses on one bridge, each with a name and sshd.

    host1 10.77.0.1 ──┐
    host2 10.77.0.2 ──┼── bridge, in a namespace of its own
    host3 10.77.0.3 ──┘

Each host has its own network, host name and process numbers; they share the disk. Needs root, iproute2, sshd and pdsh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare")
SSHD = """
Port 22
HostKey {base}/key
AuthorizedKeysFile {base}/key.pub
PidFile none
StrictModes no
PasswordAuthentication no
UsePAM no
"""
SSH = """
Host *
IdentityFile {base}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ServerAliveInterval 2
ServerAliveCountMax 3
"""


def reason_to_skip() -> str:
    """Why hosts cannot be made here; empty if they can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install openssh-server pdsh iproute2)"
    if os.geteuid() != 0:
        return "needs root"
    probe = subprocess.run(
        ["ip", "netns", "add", f"t4v{os.getpid()}-probe"], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        return f"no network namespaces here: {probe.stderr.strip()}"
    _ip("netns", "delete", f"t4v{os.getpid()}-probe")
    return ""


class Hosts:
    """Context manager. `names` are the hosts' names, "host1" first."""

    def __init__(self, base: Path, num_hosts: int) -> None:
        self.base, self.names = base, [f"host{number}" for number in range(1, num_hosts + 1)]
        self._tag = f"t4v{os.getpid()}"
        self._sshd: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        base = self.base
        base.mkdir(parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / "key"], check=True)
        (base / "sshd_config").write_text(SSHD.format(base=base))
        (base / "ssh_config").write_text(SSH.format(base=base))
        wrapper = base / "bin" / "ssh"  # what `deepspeed` and `pdsh` find first; the user's own ~/.ssh stays untouched
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {base}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        _ip("netns", "add", f"{self._tag}-switch")
        self._switch("link", "add", "bridge0", "type", "bridge")
        self._switch("link", "set", "bridge0", "up")
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(self.names, start=1)}
        for name, address in addresses.items():
            self._add(name, address, addresses)
        deadline = time.monotonic() + 30
        for name in self.names:
            while self.start(["ssh", name, "true"]).wait():
                assert time.monotonic() < deadline, "sshd did not start"
                time.sleep(0.2)
        return self

    def _add(self, name: str, address: str, addresses: dict[str, str]) -> None:
        space = f"{self._tag}-{name}"
        etc = Path("/etc/netns") / space  # `ip netns exec` lays these over /etc
        etc.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        _ip("netns", "add", space)
        self._switch("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
        self._switch("link", "set", name, "master", "bridge0", "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")
        serve = f"hostname {name}; exec {shutil.which('sshd', path=_path())} -D -f {self.base}/sshd_config"
        unshare = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", serve]
        self._sshd.append(subprocess.Popen(["ip", "netns", "exec", space, *unshare]))

    def start(self, command: list[object], **options) -> subprocess.Popen:
        """Starts a process on host1, as a user who has logged in there would."""
        environment = os.environ | {"PATH": f"{self.base}/bin:{_path()}"}
        space = f"{self._tag}-{self.names[0]}"
        words = ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", 'hostname host1; exec "$@"', "sh"]
        return subprocess.Popen([*words, *map(str, command)], env=environment, text=True, **options)

    def cut_off(self, name: str) -> None:
        """Cuts the host's network silently: from now on no packet reaches it or leaves it."""
        self._switch("link", "set", name, "down")

    def _switch(self, *words: str) -> None:
        _ip("-n", f"{self._tag}-switch", *words)

    def __exit__(self, *_: object) -> None:
        for server in self._sshd:
            server.kill()  # `--kill-child`: all of the host's processes go with it
            server.wait()
        for name in (*self.names, "switch"):
            subprocess.run(["ip", "netns", "delete", f"{self._tag}-{name}"], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / f"{self._tag}-{name}", ignore_errors=True)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
