#!/usr/bin/python3
"""Tests, demo and benchmarks of Tariq, on real parts: network namespaces, iptables, gpg keys, sshd and nmap.

    sudo ./test_tariq.py                 the tests (pytest); without root the end-to-end ones are skipped
    sudo ./test_tariq.py demo            two throwaway hosts, a closed door and a knock: about 15 seconds
    sudo ./test_tariq.py bench latency   time to an open port, against fwknop and knockd where installed
    sudo ./test_tariq.py bench flood     knocks under a flood of garbage

Everything runs in namespaces named tq-PID-..., on documentation addresses, and is removed at the end, also on failure.
"""
import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARIQ = HERE / "tariq.py"
PYTHON = [sys.executable, "-I"]
NOBODY = 65534


def load_tariq():
    spec = importlib.util.spec_from_file_location("tariq", TARIQ)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tariq = load_tariq()


# ---- the lab: hosts in namespaces on one switch ------------------------------------------------------------------

def sh(*argv, check=True, **options):
    """Run a command to its end and return it; its words are in the error when it fails."""
    options.setdefault("stdin", subprocess.DEVNULL)
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=options.pop("timeout", 60), **options)
    if check and done.returncode:
        raise AssertionError(f"{argv}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done


class Host:
    """A namespace with one interface on the lab's switch."""

    def __init__(self, lab, name, number, prefix="198.51.100", prefix6="2001:db8:1:"):
        self.lab, self.name, self.netns = lab, name, f"{lab.prefix}-{name}"
        self.ip, self.ip6 = f"{prefix}.{number}", f"{prefix6}:{number}"
        sh("ip", "netns", "add", self.netns)
        lab.undo.callback(self.delete)
        sh("ip", "-n", self.netns, "link", "set", "lo", "up")
        for family in "4", "6":  # a real host's neighbours are known: no test waits for them
            sh("ip", "netns", "exec", self.netns, "sysctl", "-qw", f"net.ipv{family}.conf.all.forwarding=0")
        self.processes = []

    def delete(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()
        for pid in sh("ip", "netns", "pids", self.netns, check=False).stdout.split():  # theirs: gpg-agent, sshd's children
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        sh("ip", "netns", "del", self.netns, check=False)

    def command(self, argv, user=None):
        start = ["ip", "netns", "exec", self.netns]
        if user is not None:
            start += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        return [*start, *(str(word) for word in argv)]

    def run(self, *argv, user=None, **options):
        return sh(*self.command(argv, user), **options)

    def popen(self, *argv, user=None, **options):
        process = subprocess.Popen(self.command(argv, user), text=options.pop("text", True), **options)
        self.processes.append(process)
        return process

    def drop_policy(self):
        """The firewall of the README: nothing gets in but what belongs to a connection."""
        for program in ("iptables", "ip6tables"):
            self.run(program, "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
            self.run(program, "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
        self.run("ip6tables", "-A", "INPUT", "-p", "ipv6-icmp", "-j", "ACCEPT")
        for program in ("iptables", "ip6tables"):
            self.run(program, "-P", "INPUT", "DROP")

    def connects(self, address, port=22, timeout=0.4):
        """Whether a TCP connection to address:port opens, and says SSH."""
        code = ("import socket,sys\ns=socket.create_connection((sys.argv[1],int(sys.argv[2])),float(sys.argv[3]))\n"
                "sys.exit(not s.recv(4)==b'SSH-')")
        return self.run(sys.executable, "-c", code, address, port, timeout, check=False).returncode == 0

    def rules(self, ip6=False):
        return [line for line in self.run("ip6tables" if ip6 else "iptables", "-S", "tariq").stdout.splitlines()
                if line.startswith("-A")]


class Lab:
    """Namespaces on a bridge in one more namespace, a private directory, and the undoing of all that."""

    count = itertools.count()

    def __init__(self):
        self.prefix = f"tq-{os.getpid()}-{next(self.count)}"
        self.undo = contextlib.ExitStack()
        self.dir = Path(tempfile.mkdtemp(prefix="tariq-test-"))
        self.dir.chmod(0o755)
        self.undo.callback(shutil.rmtree, self.dir, ignore_errors=True)
        self.switch, self.hosts = f"{self.prefix}-switch", {}
        shutil.copy(TARIQ, self.dir / "tariq.py")
        (self.dir / "tariq.py").chmod(0o755)
        try:
            sh("ip", "netns", "add", self.switch)
            self.undo.callback(sh, "ip", "netns", "del", self.switch, check=False)
            sh("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
            sh("ip", "-n", self.switch, "link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.undo.close()

    def host(self, name, number):
        host = self.hosts[name] = Host(self, name, number)
        self.plug(host, "eth0", f"{host.ip}/24", f"{host.ip6}/64")
        return host

    def plug(self, host, interface, *addresses):
        """A cable from the host to the switch."""
        port = f"{host.name[:8]}{len(sh('ip', '-n', self.switch, 'link').stdout.splitlines())}"
        sh("ip", "link", "add", interface, "netns", host.netns, "type", "veth", "peer", "name", port, "netns", self.switch)
        sh("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        for address in addresses:
            sh("ip", "-n", host.netns, "addr", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))
        sh("ip", "-n", host.netns, "link", "set", interface, "up")

    def tariq(self, host, *argv, user=None, **options):
        return host.run(*PYTHON, self.dir / "tariq.py", *argv, user=user, **options)


def make_server(lab, host, directory="server", **settings):
    """A server set up by `init`, with settings changed; returns the config's path."""
    made = not user_exists("tariq")
    path = lab.dir / directory / "tariq.conf"
    lab.tariq(host, "init", "-d", path.parent)
    if made:
        lab.undo.callback(sh, "userdel", "tariq", check=False)
    settings.setdefault("interface", "eth0")
    text = path.read_text()
    path.write_text(text.replace("[server]\n", "[server]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())))
    return path


def user_exists(name):
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


def make_client(lab, client, server, server_conf, user="me@laptop", allow=("O 22", "C 22"), directory="client", host="box"):
    """A client of its own uid, enrolled by the commands of the README; returns its config's path."""
    path = lab.dir / directory / "tariq.conf"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    os.chown(path.parent, NOBODY, NOBODY)
    public = lab.tariq(client, "keygen", "-c", path, user, user=NOBODY).stdout
    flags = [word for pattern in allow for word in ("--allow", pattern)]
    profile = lab.tariq(server, "enroll", "-c", server_conf, *flags, input=public, stdin=None).stdout
    lab.tariq(client, "join", "-c", path, host, user=NOBODY, input=profile, stdin=None)
    text = path.read_text().replace(f"[{host}]\n", f"[{host}]\nhost = {server.ip}\n")
    path.write_text(text)
    return path


class Server:
    """A running `tariq.py server`, with its log."""

    def __init__(self, lab, host, conf, prefix=()):
        self.lab, self.host, self.conf = lab, host, conf
        self.path = lab.dir / f"server-{next(lab.count)}.log"
        with open(self.path, "w") as file:
            self.process = host.popen(*prefix, *PYTHON, lab.dir / "tariq.py", "server", "-c", conf, stdin=subprocess.DEVNULL,
                                      stdout=file, stderr=file)
        lab.undo.callback(self.kill)

    @property
    def log(self):
        return self.path.read_text()

    def wait_log(self, text, count=1, timeout=15):
        end = time.monotonic() + timeout
        while self.log.count(text) < count:
            if time.monotonic() > end:
                raise AssertionError(f"{text!r} ({count}) is not in the log:\n{self.log}")
            time.sleep(0.02)
        return self

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(15)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def listener(self):
        """The listener's pid."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if b"tariq.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
