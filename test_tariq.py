#!/usr/bin/python3
"""Tests, demo and benchmarks of Tariq, on real parts: network namespaces, iptables, gpg keys, sshd and nmap.

    sudo ./test_tariq.py                 the tests (pytest); without root the end-to-end ones are skipped
    sudo ./test_tariq.py demo            two throwaway hosts, a closed door and a knock: about 15 seconds
    sudo ./test_tariq.py bench latency   time to an open port, against fwknop and knockd where installed
    sudo ./test_tariq.py bench flood     knocks under a flood of garbage

Everything runs in namespaces named tq-PID-..., on documentation addresses, and is removed at the end, also on failure.
"""
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import importlib.util
import inspect
import itertools
import json
import os
import pty
import pwd
import random
import re
import select
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

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
        self.lab, self.name, self.netns, self.processes = lab, name, f"{lab.prefix}-{name}", []
        self.ip, self.ip6 = f"{prefix}.{number}", f"{prefix6}:{number}"
        lab.undo.callback(self.delete)  # first: Ctrl-C may come between any two lines
        sh("ip", "netns", "add", self.netns)
        sh("ip", "-n", self.netns, "link", "set", "lo", "up")
        for family in "4", "6":
            sh("ip", "netns", "exec", self.netns, "sysctl", "-qw", f"net.ipv{family}.conf.all.forwarding=0")

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
        with contextlib.suppress(OSError):
            for lock in Path("/run").glob(f"tariq-*-{os.stat(f'/run/netns/{self.netns}').st_ino}.lock"):
                lock.unlink()
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
        shutil.copy(HERE / "tariq.conf.example", self.dir)
        (self.dir / "tariq.py").chmod(0o755)
        try:
            if not user_exists("tariq"):  # which `init` makes; deleted when the hosts, and all that runs there, are gone
                self.undo.callback(sh, "userdel", "-f", "tariq", check=False)
            self.undo.callback(sh, "ip", "netns", "del", self.switch, check=False)
            sh("ip", "netns", "add", self.switch)
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
    path = lab.dir / directory / "tariq.conf"
    lab.tariq(host, "init", "-d", path.parent)
    settings.setdefault("interface", "eth0")
    path.write_text(with_settings(path, settings))
    return path


def with_settings(path, settings):
    """The text of a server's config with other settings."""
    text = path.read_text()
    for key, value in settings.items():
        text = re.sub(rf"(?m)^{key} = .*\n", "", text).replace("[server]\n", f"[server]\n{key} = {value}\n")
    return text


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

    def __init__(self, lab, host, conf, program="tariq.py", prefix=(), command=None):
        self.lab, self.host, self.conf = lab, host, conf
        self.path = lab.dir / f"server-{next(lab.count)}.log"
        with open(self.path, "w") as file:
            self.process = host.popen(*prefix, *(command or [*PYTHON, lab.dir / program]), "server", "-c", conf,
                                      stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        lab.undo.callback(self.kill)

    @property
    def log(self):
        return self.path.read_text()

    def wait_log(self, text, count=1, timeout=15):
        wait_for(lambda: self.log.count(text) >= count, f"{text!r} is not {count} times in the log {self.path}", timeout)
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
        return next(int(pid) for pid in children if b"server" in Path(f"/proc/{pid}/cmdline").read_bytes())


# ---- tools that run inside a host ----------------------------------------------------------------------------------

SNIFF = r"""
# Record every TCP frame of an interface: 2 bytes of length, the frame.
import socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3 << 8)
sock.bind((sys.argv[1], 3))
sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: a capture that misses packets proves nothing
with open(sys.argv[2], "wb", buffering=0) as file:
    print("ready", flush=True)
    while True:
        frame = sock.recv(65535)
        tcp = frame[12:14] == b"\x08\x00" and frame[23] == 6 or frame[12:14] == b"\x86\xdd" and frame[20] == 6
        if tcp:
            file.write(len(frame).to_bytes(2, "big") + frame)
"""

INJECT = r"""
# Send the frames of a recording, as often as asked.
import socket, sys
data, frames = open(sys.argv[2], "rb").read(), []
while data:
    size = int.from_bytes(data[:2], "big")
    frames.append(data[2:2 + size])
    data = data[2 + size:]
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sock.bind((sys.argv[1], 0))
for _ in range(int(sys.argv[3])):
    for frame in frames:
        sock.send(frame)
"""

# Runs a changed client: argv[1] is tariq.py, argv[2] Python that changes its module `tariq`, the rest its command line.
CHANGED = r"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tariq", sys.argv[1])
tariq = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tariq)
exec(sys.argv[2])
sys.argv = sys.argv[:1] + sys.argv[3:]
sys.exit(tariq.main())
"""


class Capture:
    """What passes an interface of a host, from now on, as raw frames."""

    def __init__(self, host, interface="eth0"):
        self.path = host.lab.dir / f"capture-{next(host.lab.count)}"
        self.process = host.popen(sys.executable, "-c", SNIFF, interface, self.path, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def frames(self):
        time.sleep(0.1)  # the last packets are on their way through the veth pair
        data, frames, place = self.path.read_bytes(), [], 0
        while place < len(data):
            size = int.from_bytes(data[place:place + 2], "big")
            frames.append(data[place + 2:place + 2 + size])
            place += 2 + size
        return frames

    def segments(self):
        """(frame, source port, destination port, flags, payload) of each."""
        result = []
        for frame in self.frames():
            ip = 14
            tcp = ip + (frame[ip] & 15) * 4 if frame[ip] >> 4 == 4 else ip + 40
            end = ip + int.from_bytes(frame[ip + 2:ip + 4], "big") if frame[ip] >> 4 == 4 else tcp + int.from_bytes(frame[18:20], "big")
            ports = int.from_bytes(frame[tcp:tcp + 2], "big"), int.from_bytes(frame[tcp + 2:tcp + 4], "big")
            result.append((frame, *ports, frame[tcp + 13], frame[tcp + (frame[tcp + 12] >> 4) * 4:end]))
        return result


def inject(host, frames, times=1, interface="eth0"):
    path = host.lab.dir / f"inject-{next(host.lab.count)}"
    path.write_bytes(b"".join(len(frame).to_bytes(2, "big") + frame for frame in frames))
    host.run(sys.executable, "-c", INJECT, interface, path, times)


def from_address(frame, ip):
    """An IPv4 frame as if it came from another address, checksums made right by scapy."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    packet = Ether(frame)
    packet[IP].src = ip
    del packet[IP].chksum, packet[TCP].chksum
    return bytes(packet)


def start_sshd(lab, host):
    """A real sshd on port 22 of the host."""
    Path("/run/sshd").mkdir(exist_ok=True)
    key = lab.dir / f"{host.name}-sshd-key"
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    host.popen("/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", key, "-o", "PidFile=none", "-o", "UsePAM=no",
               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: host.connects("127.0.0.1"), "sshd does not come up")


def eventually(condition, timeout=5):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def wait_for(condition, complaint, seconds=10):
    assert eventually(condition, seconds), complaint


def config_values(path, section):
    ini = tariq.Config(path).ini
    return dict(ini[section])


# ---- pytest: fixtures ----------------------------------------------------------------------------------------------

try:
    import pytest
except ImportError:  # the demo and the benchmarks do without: what marks a test then marks nothing
    class pytest:
        fixture = staticmethod(lambda function=None, **_: function or (lambda made: made))
        mark = SimpleNamespace(skipif=lambda *_, **__: lambda made: made, parametrize=lambda *_: lambda made: made)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: run as root")
ALLOW = ("O 22", "C 22", "O 53/udp", "C 53/udp", "O 8022", "C 8022", "E id -u", "E echo *", "E sleep 60", "E false",
         "E head -c 100000 /dev/zero", "E yes", "E sh -c *", "E nonexistent-program")

@pytest.fixture(scope="session")
def world():
    """A server with a closed firewall and an sshd, a client, somebody else, one enrolled user, a running Tariq."""
    with Lab() as lab:
        world = SimpleNamespace(lab=lab, server=lab.host("server", 10), client=lab.host("client", 20), other=lab.host("other", 30))
        world.server.drop_policy()
        start_sshd(lab, world.server)
        world.conf = make_server(lab, world.server, command_timeout=2)
        world.me = make_client(lab, world.client, world.server, world.conf, allow=ALLOW)
        world.tariq = Server(lab, world.server, world.conf).wait_log("listening on")
        world.key = tariq.derive_key(tariq.parse("secret", config_values(world.me, "box")["secret"]),
                                     tariq.parse("secret_ports", config_values(world.me, "box")["secret_ports"]))
        world.ports = tariq.parse("secret_ports", config_values(world.me, "box")["secret_ports"])
        yield world

@pytest.fixture
def box(world):
    """The world with every door closed, before and after a test."""
    def closed():
        for program in ("iptables", "ip6tables"):
            world.server.run(program, "-F", "tariq")
    closed()
    assert world.tariq.process.poll() is None, world.tariq.log
    yield world
    closed()

def knock(world, *words, conf=None, user=NOBODY, host=None, options=(), where="box", timeout=None, change=None):
    """Run a client; by default the enrolled one, unprivileged, with the kernel transport."""
    seconds = ("-t", timeout) if timeout else ()
    start = [*PYTHON, "-c", CHANGED, world.lab.dir / "tariq.py", change] if change else [*PYTHON, world.lab.dir / "tariq.py"]
    return (host or world.client).run(*start, "knock", "-c", conf or world.me, *seconds, *options, where, *words, user=user,
                                      check=False)

def with_host(world, address, name):
    """A copy of the client's config whose box is at another address."""
    path = world.me.parent / f"{name}.conf"
    path.write_text(world.me.read_text().replace(f"host = {world.server.ip}\n", f"host = {address}\n"))
    path.chmod(0o600)
    os.chown(path, NOBODY, NOBODY)
    return path


# ---- the pure parts ------------------------------------------------------------------------------------------------

KEY = bytes(range(32))


def test_a_frame_opens_with_its_own_key_and_label_only():
    for data in (b"", b"x", os.urandom(1160)):
        framed = tariq.frame(KEY, b"knock 0/5", data)
        assert len(framed) == 34 + len(data)
        assert tariq.unframe(KEY, b"knock 0/5", framed) == data
        assert tariq.unframe(KEY, b"knock 1/5", framed) is None
        assert tariq.unframe(bytes(32), b"knock 0/5", framed) is None


def test_a_frame_with_any_bit_changed_or_any_byte_missing_is_refused():
    framed = tariq.frame(KEY, b"answer", b"some data")
    for bit in range(len(framed) * 8):
        changed = bytearray(framed)
        changed[bit // 8] ^= 1 << bit % 8
        assert tariq.unframe(KEY, b"answer", bytes(changed)) is None
    for size in range(len(framed)):
        assert tariq.unframe(KEY, b"answer", framed[:size]) is None


def test_a_frame_is_good_in_its_minute_and_the_ones_beside_it(monkeypatch):
    now = 1_800_000_000
    monkeypatch.setattr(tariq.time, "time", lambda: now)
    framed = tariq.frame(KEY, b"answer", b"data")
    for offset, good in ((-120, False), (-60, True), (0, True), (60, True), (120, False)):
        monkeypatch.setattr(tariq.time, "time", lambda: now + offset)
        assert (tariq.unframe(KEY, b"answer", framed) == b"data") is good


def test_two_frames_of_the_same_data_have_nothing_in_common():
    one, two = (tariq.frame(KEY, b"answer", bytes(1000)) for _ in range(2))
    same = sum(a == b for a, b in zip(one, two))
    assert same < 30  # 4 of 1028 bytes agree by chance


def test_hidden_data_comes_back_from_empty_to_exact_capacity():
    for size in (0, 1, 2, 100, 483, 484):  # 36 * 36 * 3 / 8 = 486, less 2 of length
        data = os.urandom(size)
        assert tariq.reveal(tariq.hide(tariq.cover_image(""), data)) == data
    with pytest.raises(tariq.Fault, match="1 bytes too long"):
        tariq.hide(tariq.cover_image(""), bytes(485))


def test_hiding_changes_the_lowest_bits_only():
    from PIL import Image
    cover = tariq.cover_image("")
    before = cover.tobytes()
    import io
    after = Image.open(io.BytesIO(tariq.hide(cover, os.urandom(484)))).tobytes()
    assert all(a >> 1 == b >> 1 for a, b in zip(before, after)) and before != after


def test_a_cover_may_be_any_png_that_is_large_enough(tmp_path):
    from PIL import Image
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        for size in ((36, 36), (37, 80), (640, 480)):
            for old in tmp_path.iterdir():
                old.unlink()
            Image.new(mode, size, 1).save(tmp_path / "cover.png", transparency=0) if mode == "P" else \
                Image.new(mode, size).save(tmp_path / "cover.png")
            cover = tariq.cover_image(str(tmp_path))
            assert (cover.mode, cover.size) == ("RGB", (36, 36)), (mode, size)
            assert tariq.reveal(tariq.hide(cover, b"request")) == b"request"


def test_a_cover_that_cannot_serve_is_a_clear_error(tmp_path):
    from PIL import Image
    with pytest.raises(tariq.Fault, match="needs PNG images"):
        tariq.cover_image(str(tmp_path / "missing"))
    with pytest.raises(tariq.Fault, match="needs PNG images"):
        tariq.cover_image(str(tmp_path))
    for write in (lambda path: Image.new("RGB", (35, 36)).save(path), lambda path: path.write_bytes(b"no PNG"),
                  lambda path: path.write_bytes(b""), lambda path: Image.new("RGB", (50, 50)).save(path, "JPEG")):
        write(tmp_path / "cover.png")
        with pytest.raises(tariq.Fault, match="cover.png: needs PNG images"):
            tariq.cover_image(str(tmp_path))
    Image.new("RGB", (90, 90)).save(tmp_path / "cover.png")
    (tmp_path / "cover.png").write_bytes((tmp_path / "cover.png").read_bytes()[:80])
    with pytest.raises(tariq.Fault, match="needs PNG images"):
        tariq.cover_image(str(tmp_path))


def test_requests_are_checked_word_by_word():
    good = {("O", "22"): ["O", "22/tcp"], ("C", "22/tcp", "53/udp"): ["C", "22/tcp", "53/udp"], ("O", "65535"): ["O", "65535/tcp"],
            ("E", "ls", "-l", "--", "ä b"): ["E", "ls", "-l", "--", "ä b"]}
    for words, result in good.items():
        assert tariq.command_of(list(words)) == result
    bad = [["O"], ["X", "22"], ["O", "0"], ["O", "-1"], ["O", "65536"], ["O", "022"], ["O", "22/sctp"], ["O", "22/tcp/tcp"],
           ["O", "٢٢"], ["O", "２２"], ["O", " 22"], ["O", "22\n"], ["O", ""], ["O", "1" * 5000], ["O", "--help"], ["E"],
           ["E", "a\nb"], ["E", "a\x1b[2J"], ["E", "\ud800"], ["E", "a\0b"], ["E", "\u202e"], [""]]
    for words in bad:
        with pytest.raises(ValueError):
            tariq.command_of(words)


def test_policy_permits_what_a_pattern_says_and_nothing_else():
    def permitted(patterns, *words):
        return tariq.permitted([tariq.command_of(pattern.split()) for pattern in patterns], tariq.command_of(list(words)))
    assert permitted(["O 22"], "O", "22") and permitted(["O 22/tcp"], "O", "22") and permitted(["O 22 80"], "O", "80")
    assert permitted(["O 22", "O 53/udp"], "O", "22", "53/udp")
    assert not permitted(["O 22"], "C", "22") and not permitted(["O 22"], "O", "22/udp") and not permitted(["O 22"], "O", "22", "23")
    assert permitted(["O *"], "O", "22", "53/udp") and not permitted(["O *"], "C", "22") and not permitted(["O *"], "O", "*")
    assert not permitted([], "O", "22") and not permitted(["O 22"], "E", "22")
    assert permitted(["E service httpd restart"], "E", "service", "httpd", "restart")
    for words in (("service", "httpd"), ("service", "httpd", "stop"), ("service", "httpd", "restart", "now"), ("service httpd restart",)):
        assert not permitted(["E service httpd restart"], "E", *words)
    assert permitted(["E echo *"], "E", "echo") and permitted(["E echo *"], "E", "echo", "a", "b")
    assert not permitted(["E echo *"], "E", "echoes") and not permitted(["E echo *"], "E", "/bin/echo", "a")
    assert permitted(["E cp * /backup"], "E", "cp", "x", "/backup") and not permitted(["E cp * /backup"], "E", "cp", "x", "y", "/backup")
    assert not permitted(["E cat /var/log/*"], "E", "cat", "/var/log/../../etc/shadow"), "only a * by itself is special"


CONFIG = """[server]
secret_ports = 10000,7456,22022,12121,10001
secret = {secret}
server_gpg_dir = /nonexistent
server_user = tariq@box.example.com
[allow]
me@laptop.example.com =
    O 22
    E echo *
"""
SECRET = "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0ICEhISE="


def write_config(path, text=CONFIG, mode=0o600):
    path.write_text(text.replace("{secret}", SECRET))
    path.chmod(mode)
    return path


def test_a_config_gives_checked_values(tmp_path):
    config = tariq.Config(write_config(tmp_path / "tariq.conf"))
    assert config.get("secret_ports", "server") == (10000, 7456, 22022, 12121, 10001)
    assert len(config.get("secret", "server")) == 32
    assert config.allowed() == {"me@laptop.example.com": [["O", "22/tcp"], ["E", "echo", "*"]]}
    assert config.get("open_timeout", "server", default=3600) == 3600


def test_the_example_config_is_a_config(tmp_path):
    text = (HERE / "tariq.conf.example").read_text()
    path = write_config(tmp_path / "tariq.conf", text.replace("secret =", f"secret = {SECRET}"))
    config = tariq.Config(path)
    for section in ("server", "client", "box.example.com"):
        for key in config.ini[section]:
            config.get(key, section, default="")
    assert len(config.allowed()) == 1


def test_each_fault_of_a_config_names_file_section_and_key_and_no_secret(tmp_path):
    cases = [("secret_ports = 10000,7456,22022,12121,10001", "secret_ports = 1,2,3,4", "[server] secret_ports: needs"),
             ("secret_ports = 10000,7456,22022,12121,10001", "secret_ports = 1,2,3,4,4", "[server] secret_ports: needs"),
             ("secret_ports = 10000,7456,22022,12121,10001", "secret_ports = 1,2,3,4,65536", "[server] secret_ports: needs"),
             ("secret_ports = 10000,7456,22022,12121,10001", "secret_ports = 1,2,3,4,x", "[server] secret_ports: needs"),
             ("secret_ports = 10000,7456,22022,12121,10001", "", "[server] secret_ports is missing"),
             ("{secret}", "c2VjcmV0", "[server] secret: needs 32"), ("{secret}", "!" * 44, "[server] secret: needs 32"),
             ("{secret}", "", "[server] secret is missing"), ("    O 22", "    O 99999", "[allow] me@laptop.example.com: needs"),
             ("    O 22", "    X 22", "[allow] me@laptop.example.com: needs"),
             ("    O 22", '    E "unbalanced', "[allow] me@laptop.example.com: needs")]
    for old, new, words in cases:
        path = write_config(tmp_path / "tariq.conf", CONFIG.replace(old, new))
        config = tariq.Config(path)
        with pytest.raises(tariq.Fault) as caught:
            config.get("secret_ports", "server"), config.get("secret", "server"), config.allowed()
        assert words in str(caught.value) and str(path) in str(caught.value) and caught.value.code == 78
        assert SECRET not in str(caught.value) and "1,2,3,4" not in str(caught.value)
    for text in ("no section", "[server]\nline without a key\n" + SECRET, "[a]\nx = 1\nx = 2\n", "[a]\n[a]\n"):
        with pytest.raises(tariq.Fault, match="is not INI") as caught:
            tariq.Config(write_config(tmp_path / "tariq.conf", text))
        assert SECRET not in str(caught.value)
    (tmp_path / "tariq.conf").write_bytes(b"\xff\xfe")
    with pytest.raises(tariq.Fault, match="is not INI"):
        tariq.Config(tmp_path / "tariq.conf")


def test_a_config_that_others_can_read_is_refused(tmp_path):
    for mode in (0o640, 0o604, 0o620, 0o666):
        with pytest.raises(tariq.Fault, match="chmod 600"):
            tariq.Config(write_config(tmp_path / "tariq.conf", mode=mode))


def test_a_rule_template_must_hold_address_port_and_end(tmp_path):
    for rule in ("-A tariq -s {ip} --dport {dport} -j ACCEPT", "-A tariq -s {ip} --datestop {until}", "-A tariq {ip} {dport} {until} {x}",
                 "-I tariq {ip} {dport} {until}", "-A tariq {ip {dport} {until}", "-A tariq {ip} {dport} {until} 'x"):
        config = tariq.Config(write_config(tmp_path / "tariq.conf", CONFIG.replace("[allow]", f"open_tcp_port = {rule}\n[allow]")))
        with pytest.raises(tariq.Fault, match="open_tcp_port: needs"):
            config.get("open_tcp_port", "server")


def test_log_lines_cannot_be_forged():
    assert tariq.printable("a\n<3>b\x1b[2J\ud800\u202e") == "a\\x0a<3>b\\x1b[2J\\xd800\\x202e"


# ---- promise 2: authenticate before you parse. Fuzzing ---------------------------------------------------------------

CASES = int(os.environ.get("TARIQ_FUZZ_CASES", 200_000))


def bare_listener(ports=(1000, 2000, 3000, 4000, 5000)):
    settings = SimpleNamespace(ports=ports, key=KEY, interface="none")
    listener = tariq.Listener(settings, None, None, None, 14, None)
    listener.began = 0  # frames of this very second are good
    return listener


def syn(ports, position, payload, flags=2, version=4, options=b""):
    """An Ethernet frame with a TCP segment, made by hand: what a fuzzer mutates."""
    tcp = (b"\x10\x00" + ports[position].to_bytes(2, "big") + bytes(8) + bytes([(5 + len(options) // 4) << 4, flags]) + bytes(6)
           + options + payload)
    if version == 6:
        return bytes(12) + b"\x86\xdd" + b"\x60\0\0\0" + len(tcp).to_bytes(2, "big") + b"\x06\x40" + bytes(32) + tcp
    return bytes(12) + b"\x08\x00" + b"\x45\0" + (20 + len(tcp)).to_bytes(2, "big") + bytes(5) + b"\x06" + bytes(10) + tcp


def test_the_gate_passes_a_fragment_once_and_at_its_own_port_only():
    listener = bare_listener()
    for version in (4, 6):
        for position in range(5):
            framed = tariq.frame(KEY, tariq.fragment_label(position, 5), b"i" * 12 + b"piece")
            for other in range(5):
                if other != position:
                    assert listener.gate(syn(listener.settings.ports, other, framed, version=version)) is None
            for flags in (0x10, 0x12, 0x04, 0x01, 0x03):  # not a bare SYN
                assert listener.gate(syn(listener.settings.ports, position, framed, flags, version)) is None
            packet = syn(listener.settings.ports, position, framed, version=version, options=b"\x02\x04\x05\xb4")
            assert listener.gate(packet)[:2] == (position, b"i" * 12 + b"piece")
            assert listener.gate(packet) is None, "the same bytes twice are a replay"


def test_answers_pass_the_gate_at_the_last_port_only():
    listener = bare_listener()
    framed = tariq.frame(KEY, b"answer", b"i" * 12 + bytes(32))
    for position in range(4):
        assert listener.gate(syn(listener.settings.ports, position, framed, flags=0x18)) is None
    assert listener.gate(syn(listener.settings.ports, 4, framed, flags=0x18))[:2] == (5, b"i" * 12 + bytes(32))


def test_frames_from_before_the_listener_began_are_refused(monkeypatch):
    """Its memory of what was seen began with it: a recording could pass for new."""
    listener, now = bare_listener(), tariq.time.time()
    listener.began = now * 1000
    for age, good in ((0.01, False), (30, False), (-0.01, True)):
        monkeypatch.setattr(tariq.time, "time", lambda: now - age)
        packet = syn(listener.settings.ports, 0, tariq.frame(KEY, b"knock 0/5", b"i" * 12))
        monkeypatch.setattr(tariq.time, "time", lambda: now + 2)
        assert bool(listener.gate(packet)) is good
    monkeypatch.setattr(tariq.time, "time", lambda: now - 3600)  # the clock was put back: knocks go on working
    assert listener.gate(syn(listener.settings.ports, 0, tariq.frame(KEY, b"knock 0/5", b"i" * 12)))


def test_garbage_never_passes_the_gate_nor_leaves_anything_there():
    """Random, truncated and mutated packets before the tag."""
    chance, listener = random.Random(1), bare_listener()
    good = [syn(listener.settings.ports, position, tariq.frame(KEY, b"knock %d/5" % position, bytes(12 + size)), version=version)
            for position in range(5) for size in (1, 40, 900) for version in (4, 6)]
    for case in range(CASES):
        kind = case % 4
        if kind == 0:
            packet = chance.randbytes(chance.randrange(0, 120))
        elif kind == 1:
            packet = syn(listener.settings.ports, chance.randrange(5), chance.randbytes(chance.randrange(0, 300)),
                         chance.choice((2, 0x10, 0x18, 0x12)), chance.choice((4, 6)))
        else:
            packet = bytearray(chance.choice(good))
            if kind == 2:
                del packet[chance.randrange(len(packet)):]
            else:  # at least one bit of what the tag covers
                start = tariq.tcp_span(packet, 14)[1]
                packet[chance.randrange(start, len(packet))] ^= 1 << chance.randrange(8)
            for _ in range(chance.randrange(3) if kind == 2 else 0):
                if packet:
                    packet[chance.randrange(len(packet))] = chance.randrange(256)
            packet = bytes(packet)
        assert listener.gate(packet) is None, packet.hex()
    assert not listener.seen and not listener.knocks and listener.jobs.empty()


def test_what_holders_of_the_secret_send_raises_nothing_and_is_bounded(monkeypatch):
    """After the tag: random and mutated contents, through reassembly and answers."""
    chance, listener = random.Random(2), bare_listener()
    monkeypatch.setattr(tariq, "SEEN_MAX", 1000)
    segment = (bytes(54), 100)
    for case in range(CASES // 4):
        address = chance.choice((bytes([10, 0, 0, chance.randrange(30)]), chance.randbytes(16), bytes([192, 0, 2, 1])))
        knock_id = chance.choice((chance.randbytes(12), b"constant id!"))
        position = chance.randrange(6)
        handle = listener.on_answer if position == 5 else listener.on_fragment
        handle(knock_id, chance.randbytes(chance.choice((0, 32, 900))), position, address, segment)
        framed = tariq.frame(KEY, b"answer", chance.randbytes(44))
        if case % 10 == 0:
            assert listener.gate(syn(listener.settings.ports, 4, framed, flags=0x18))
        assert len(listener.knocks) <= tariq.KNOCKS_MAX
        crowd = [knock for knock in listener.knocks.values() if knock.owner == address[:8]]
        assert len(crowd) <= tariq.KNOCKS_EACH
        assert len(listener.seen) <= 1000
    working = [knock for knock in listener.knocks.values() if knock.state == "working" and knock.owner == bytes([192, 0, 2, 1])]
    assert len(working) <= tariq.WORKERS_EACH


def test_spoofed_knocks_of_an_insider_fill_neither_the_queue_nor_the_workers():
    listener = bare_listener()
    for number in range(5000):
        for position in range(5):
            listener.on_fragment(number.to_bytes(12, "big"), b"junk", position, number.to_bytes(4, "big"), (bytes(54), 100))
    assert listener.jobs.qsize() <= 2 * tariq.WORKERS and len(listener.knocks) == tariq.KNOCKS_MAX


def test_challenges_that_nobody_answered_in_time_make_room_first():
    listener = bare_listener()
    for number in range(tariq.KNOCKS_MAX):
        knock = listener.new_knock(number.to_bytes(12, "big"), number.to_bytes(4, "big"))
        knock.state, knock.deadline = "challenged", time.monotonic() + (30 if number else -1)
    listener.new_knock(b"a new knock!", b"new1")
    assert bytes(12) not in listener.knocks and len(listener.knocks) == tariq.KNOCKS_MAX
    listener.on_fragment(b"another one!", b"", 0, b"new2", (bytes(54), 100))
    assert b"a new knock!" not in listener.knocks, "where all challenges are young, what has just begun makes room"


def test_hostile_images_are_refused():
    """Random, truncated, mutated and hostile PNGs: one error type, and no pixel of a bomb is decoded."""
    import io
    import zlib
    from PIL import Image
    chance, good = random.Random(3), tariq.hide(tariq.cover_image(""), b"{}" * 100)

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    def png(width, height, depth, color, data, extra=b"", interlace=0):
        header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, color, 0, 0, interlace])
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")

    bombs = [png(60000, 60000, 8, 2, bytes(1000)), png(36, 36, 16, 2, bytes(36 * (1 + 36 * 6))), png(36, 36, 8, 3, bytes(36 * 37)),
             png(36, 36, 8, 2, b""), png(36, 36, 8, 2, bytes(10)), png(36, 36, 8, 6, bytes(36 * 145)), png(0, 0, 8, 2, b""),
             png(36, 36, 8, 2, bytes(36 * 109), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))),
             png(36, 36, 8, 2, b"\xff" * (36 * 109)), png(2**31 - 1, 1, 8, 2, b"")]
    for bomb in bombs:
        with contextlib.suppress(tariq.Fault):
            assert len(tariq.reveal(bomb)) <= 484
    for length in (485, 486, 8000, 65535):  # a length that the image cannot hold
        image = Image.frombytes("RGB", (36, 36), bytes(length >> 15 - place & 1 if place < 16 else 1 for place in range(3888)))
        image.save(output := io.BytesIO(), "PNG")
        with pytest.raises(tariq.Fault, match="not an image that Tariq made"):
            tariq.reveal(output.getvalue())
    for mode, size in (("RGB", (35, 36)), ("RGB", (400, 400)), ("P", (36, 36)), ("RGBA", (36, 36)), ("L", (36, 36))):
        output = io.BytesIO()
        Image.new(mode, size).save(output, "PNG")
        with pytest.raises(tariq.Fault, match="not an image that Tariq made"):
            tariq.reveal(output.getvalue())
    for case in range(CASES // 20):
        data = bytearray(good)
        if case % 3 == 0:
            del data[chance.randrange(len(data)):]
        for _ in range(chance.randrange(1, 8)):
            if data:
                data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
        with contextlib.suppress(tariq.Fault):
            assert len(tariq.reveal(bytes(data) if case % 2 else chance.randbytes(case % 300))) <= 484


def test_hostile_requests_are_refused_though_they_are_signed():
    """What an enrolled client may sign: each is one Fault, and nothing else. (The keyring is a stand-in: gpg has its own test.)"""
    listener, knock = bare_listener(), tariq.Knock(b"i" * 12, b"\xc0\0\2\1")
    own, mine = "F" * 40, (b"i" * 12).hex()
    listener.settings.own, listener.settings.patience, knock.address = own, 30, b"\xc0\0\2\1"
    good = {"to": own, "id": mine, "cmd": ["O", "22"], "ip": ""}
    said = {}
    listener.ring = SimpleNamespace(unseal=lambda *_: ("A" * 40, tariq.hide(tariq.cover_image(""), said["text"])), seal=lambda *_: b"sealed")

    def refused(text):
        said["text"] = text if isinstance(text, bytes) else json.dumps(text).encode()
        knock.pieces, knock.state = {0: b""}, "working"
        try:
            listener.challenge(knock)
        except tariq.Fault:
            return knock.state == "working"
        return False

    assert not refused(good) and knock.state == "challenged" and knock.command == ["O", "22/tcp"]
    hostile = [b"", b"null", b"[]", b"{}", b"1", b'"x"', b"\xff\xfe", b"[" * 484, b'{"a":' * 90, b"9" * 484, b"NaN", b'{"to":"\\ud800"}',
               {**good, "to": own.lower()}, {**good, "to": None}, {**good, "to": [own]}, {**good, "id": "00" * 12}, {**good, "id": None},
               {**good, "cmd": None}, {**good, "cmd": {}}, {**good, "cmd": "Eid"}, {**good, "cmd": []}, {**good, "cmd": ["O", 22]},
               {**good, "cmd": ["O", ["22"]]}, {**good, "cmd": ["E", "\ud800"]}, {**good, "cmd": ["E", "a\nb"]}, {**good, "cmd": [["E"], "id"]},
               {**good, "cmd": ["O"] + ["1"] * 80}, {key: good[key] for key in ("to", "id", "cmd")}]
    for text in hostile:
        assert refused(text), text
    for claimed in (None, 7, ["x"], {"a": 1}, "203.0.113.1\n<3>forged", "\ud800"):  # only logged, escaped and cut
        assert not refused({**good, "ip": claimed})
    chance = random.Random(5)
    for _ in range(CASES // 200):
        text = bytearray(json.dumps(good).encode())
        for _ in range(chance.randrange(1, 6)):
            text[chance.randrange(len(text))] = chance.randrange(256)
        refused(bytes(text))  # raises nothing but Fault


def test_interlaced_images_carry_requests_too_or_are_refused():
    # Adam7 keeps size and mode; Pillow decodes it in whole: the same bound holds.
    import io
    from PIL import Image
    output = io.BytesIO()
    Image.new("RGB", (36, 36)).save(output, "PNG", interlace=1)
    with contextlib.suppress(tariq.Fault):
        assert len(tariq.reveal(output.getvalue())) <= 484


@needs_root
def test_hostile_openpgp_is_refused_within_bounds(world):
    """Mutated, truncated, unsigned, doubly signed, compressed bombs, signed-only: each one Fault, never a plaintext."""
    ring_dir = world.lab.dir / "hostile"
    sh("install", "-d", "-m", "700", ring_dir)
    gpg = ["gpg", "--homedir", ring_dir, "--batch", "--quiet", "--trust-model", "always", "--pinentry-mode", "loopback",
           "--passphrase", ""]
    for user in ("one@example.com", "two@example.com"):
        sh(*gpg, "--quick-generate-key", user, "future-default", "default", "never")
    ring = tariq.Keyring(str(ring_dir))
    one, two = (ring.find(user, ring.keys("pub", "--list-keys")) for user in ("one@example.com", "two@example.com"))
    sealed = ring.seal(b"plain" * 100, one, two)
    assert ring.unseal(sealed, two) == (one, b"plain" * 100)

    def made(data, *arguments):
        return subprocess.run([*map(str, gpg), "-o", "-", *arguments], input=data, capture_output=True, check=True).stdout

    hostile = [made(b"x", "-r", two, "-e"), made(b"x", "-u", one, "-s"), made(b"x", "--store"), made(b"x", "--clearsign"), b"",
               made(b"x", "-u", one, "-u", two, "-r", two, "-s", "-e"), sealed + sealed, made(bytes(100_000_000), "-u", one, "-r", two,
               "-s", "-e", "--compress-algo", "zlib", "-z", "9"), made(b"x" * 8193, "-u", one, "-r", two, "-s", "-e"),
               made(b"x", "--passphrase", "x", "--symmetric")]
    assert len(hostile[7]) > 100_000  # the pipe's bound cuts it
    hostile.append(made(bytes(8_000_000), "-u", one, "-r", two, "-s", "-e", "--compress-algo", "bzip2"))
    assert len(hostile[-1]) < 2000  # a bomb that fits a knock
    for message in hostile:
        with pytest.raises(tariq.Fault):
            ring.unseal(message[:6000], two)
    chance = random.Random(4)
    for case in range(60):
        data = bytearray(sealed)
        if case % 3 == 0:
            del data[chance.randrange(len(data)):]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        with pytest.raises(tariq.Fault):
            ring.unseal(bytes(data), two)
    sh("gpgconf", "--homedir", ring_dir, "--kill", "gpg-agent")


# ---- a knock opens a port on a real host, and nothing else does ----------------------------------------------------

@needs_root
def test_an_unprivileged_knock_opens_the_port_for_its_address_alone_and_nmap_sees_nothing(box):
    def scan():
        """Every port of the server, as nmap on a third host sees it."""
        report = box.other.run("nmap", "-n", "-Pn", "-sS", "-p-", "--min-rate", "30000", "--max-retries", "0", "-oG", "-",
                               box.server.ip, timeout=120).stdout
        assert "Ports:" not in report or "/open/" not in report and "/closed/" not in report, report
        return report
    scan()
    assert not box.client.connects(box.server.ip)
    done = knock(box, "O", "22")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"opened tcp/22 on box for {box.client.ip} until \d\d:\d\d:\d\dZ\n", done.stdout) and done.stderr == ""
    assert box.client.connects(box.server.ip) and not box.other.connects(box.server.ip)
    scan()
    done = knock(box, "C", "22")
    assert done.stdout == f"closed tcp/22 on box for {box.client.ip}\n"
    assert not box.client.connects(box.server.ip)
    scan()


@needs_root
@pytest.mark.parametrize("family", ["ip", "ip6"])
@pytest.mark.parametrize("transport", ["kernel", "crafted"])
def test_both_transports_knock_over_both_families(box, transport, family):
    address, own = getattr(box.server, family), getattr(box.client, family)
    conf = with_host(box, address, f"{transport}-{family}")
    user = NOBODY if transport == "kernel" else None
    done = knock(box, "O", "22", conf=conf, user=user, options=("--transport", transport, "-v"))
    assert done.returncode == 0 and f"opened tcp/22 on box for {own} until" in done.stdout, done.stderr + box.tariq.log
    assert f"{transport.capitalize()}Transport" in done.stderr
    assert box.client.connects(address) and not box.other.connects(address)
    done = knock(box, "C", "22", conf=conf, user=user, options=("--transport", transport))
    assert done.returncode == 0 and not box.client.connects(address)


@needs_root
def test_the_default_transport_is_crafted_for_root_and_kernel_for_others(box):
    assert "by CraftedTransport" in knock(box, "C", "22", user=None, options=("-v",)).stderr
    assert "by KernelTransport" in knock(box, "C", "22", options=("-v",)).stderr


@needs_root
def test_hosts_are_names_aliases_or_literal_addresses(box):
    netns = Path("/etc/netns") / box.client.netns
    existed = netns.parent.exists()
    netns.mkdir(parents=True)
    try:
        (netns / "hosts").write_text(f"127.0.0.1 localhost\n{box.server.ip6} box.example.com\n{box.server.ip} box.example.com\n")
        base = box.me.read_text().replace(f"host = {box.server.ip}\n", "")
        for name, options, own in (("box.example.com", ("-4",), box.client.ip), ("box.example.com", ("-6",), box.client.ip6),
                                   (box.server.ip, (), box.client.ip), (box.server.ip6, (), box.client.ip6)):
            conf = box.me.parent / "named.conf"
            conf.write_text(base.replace("[box]", f"[{name}]"))
            conf.chmod(0o600)
            os.chown(conf, NOBODY, NOBODY)
            done = knock(box, "O", "22", conf=conf, where=name, options=options)
            assert done.returncode == 0 and f"on {name} for {own}" in done.stdout, done.stderr
        done = knock(box, "O", "22", conf=conf, where=box.server.ip6, options=("-4",))
        assert done.returncode == 75 and box.server.ip6 in done.stderr
    finally:
        shutil.rmtree(netns if existed else netns.parent)


@needs_root
def test_several_ports_tcp_and_udp_open_and_close_without_duplicate_rules(box):
    done = knock(box, "O", "22", "8022", "53/udp")
    assert done.returncode == 0 and "opened tcp/22, tcp/8022, udp/53 on box" in done.stdout
    rules = box.server.rules()
    assert len(rules) == 3 and all(f"-s {box.client.ip}/32" in rule and "--datestop" in rule for rule in rules)
    assert sum("-p udp" in rule and "--dport 53 " in rule for rule in rules) == 1
    time.sleep(1.1)
    assert knock(box, "O", "22", "53/udp").returncode == 0
    renewed = box.server.rules()
    assert len(renewed) == 3 and renewed != rules, "the deadline is renewed, the rule is not doubled"
    done = knock(box, "C", "22", "53/udp", "8022")
    assert done.returncode == 0 and box.server.rules() == []
    assert "(22/tcp, 53/udp was not open)" in knock(box, "C", "22", "53/udp").stdout


@needs_root
def test_commands_run_as_root_without_a_shell_and_their_status_comes_back(box):
    done = knock(box, "E", "id", "-u")
    assert (done.returncode, done.stdout) == (0, "0\n")
    words = "$(id) `id`; id | cat > /tmp/x && * 'quoted' -n --".split()
    assert knock(box, "E", "echo", *words).stdout == " ".join(words) + "\n"
    assert knock(box, "E", "false").returncode == 1
    done = knock(box, "E", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, "out\nerr\n")
    assert knock(box, "E", "sh", "-c", "kill -9 $$").returncode == 137
    done = knock(box, "E", "nonexistent-program")
    assert done.returncode == 127 and "No such file" in done.stdout
    assert knock(box, "E", "sh", "-c", "env").stdout.count("\n") <= 6, "no environment but PATH and locale"


@needs_root
def test_a_command_has_a_time_limit_and_bounded_output(box):
    began = time.monotonic()
    assert knock(box, "E", "sleep", "60").returncode == 124
    assert knock(box, "E", "yes").returncode == 124
    assert time.monotonic() - began < 30
    done = knock(box, "E", "head", "-c", "100000", "/dev/zero")
    assert done.returncode == 0 and 300 < len(done.stdout) < 1300 and "[cut to one packet]" in done.stdout
    began = time.monotonic()
    done = knock(box, "E", "sh", "-c", "sleep 30 & echo started")  # what it leaves behind holds the pipe
    assert (done.returncode, done.stdout) == (0, "started\n")
    box.server.run("pkill", "-f", "^sleep 30$", check=False)


@needs_root
def test_one_users_running_command_stops_neither_doors_nor_other_knocks(box):
    with running(box, "E", "sleep", "60") as slow:
        time.sleep(0.6)
        began = time.monotonic()
        assert knock(box, "O", "22").returncode == 0
        done = knock(box, "E", "echo", "hi")
        assert done.returncode == 77 and "still running" in done.stderr
        assert slow.poll() is None or time.monotonic() - began > 1.4
        assert slow.wait(20) == 124


@contextlib.contextmanager
def running(world, *words, host=None, conf=None, options=()):
    """A client in the background."""
    process = (host or world.client).popen(*PYTHON, world.lab.dir / "tariq.py", "knock", "-c", conf or world.me, *options, "box", *words,
                                           user=NOBODY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@needs_root
def test_what_is_not_allowed_is_refused_with_a_signed_answer_and_logged(box):
    for words in (("O", "23"), ("O", "22", "23"), ("O", "22/udp"), ("C", "25"), ("E", "reboot"), ("E", "id"), ("E", "sleep", "61")):
        done = knock(box, *words)
        assert done.returncode == 77 and "refused" in done.stderr and words[-1].split("/")[0] in done.stderr and done.stdout == ""
    assert box.server.rules() == []
    assert f"{box.client.ip} O 22/tcp 23/tcp: refused" in box.tariq.log


# ---- mutual authentication that holds ------------------------------------------------------------------------------

def second_client(world, name, allow=("O 22",)):
    """One more user with a keyring of their own; returns the config's path."""
    return make_client(world.lab, world.client, world.server, world.conf, f"{name}@example.com", allow, directory=name)


def server_gpg(world, *arguments, **options):
    home = world.conf.parent / ".server-gpg"
    owner = pwd.getpwnam("tariq")
    return sh("setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups", "gpg", "--homedir", home, "--batch",
              "--yes", "--quiet", "--pinentry-mode", "loopback", "--passphrase", "", *arguments, cwd="/", **options)


def fingerprint(world, user):
    return next(line.split(":")[9] for line in server_gpg(world, "--with-colons", "--list-keys", user).stdout.splitlines()
                if line.startswith("fpr"))


@needs_root
def test_unknown_expired_and_revoked_keys_get_silence(box):
    conf, late, gone = (second_client(box, name) for name in ("deleted", "expired", "revoked"))
    assert [knock(box, "O", "22", conf=path).returncode for path in (conf, late, gone)] == [0, 0, 0]
    # unknown: deleted from the server's keyring, though still in [allow]
    server_gpg(box, "--delete-keys", fingerprint(box, "deleted@example.com"))
    # expired: the server has a copy that ended
    gpg = ["gpg", "--homedir", late.parent / "gpg", "--batch", "--yes", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    mine = fingerprint(box, "expired@example.com")
    box.client.run(*gpg, "--quick-set-expire", mine, "seconds=1", user=NOBODY)
    server_gpg(box, "--import", input=box.client.run(*gpg, "--armor", "--export", mine, user=NOBODY).stdout, stdin=None)
    time.sleep(1)  # the client's own copy is good again, by a later signature: else its gpg would refuse to sign
    box.client.run(*gpg, "--quick-set-expire", mine, "0", user=NOBODY)
    # revoked: with the certificate that gpg makes beside each key
    other = fingerprint(box, "revoked@example.com")
    certificate = (gone.parent / "gpg" / "openpgp-revocs.d" / f"{other}.rev").read_text().replace(":-----BEGIN", "-----BEGIN")
    server_gpg(box, "--import", input=certificate, stdin=None)
    time.sleep(1.5)
    box.server.run("iptables", "-F", "tariq")
    for path, words in ((conf, "No public key"), (late, ""), (gone, "")):
        seen = box.tariq.log.count("knock refused")
        with Capture(box.server) as capture:
            done = knock(box, "O", "22", conf=path, timeout=2)
            assert done.returncode == 75 and "no answer from box" in done.stderr, done.stderr
            assert not [1 for _, source, _, _, payload in capture.segments() if source in box.ports and payload], "not a byte in answer"
        assert box.tariq.log.count("knock refused") == seen + 1 and words in box.tariq.log
    assert box.server.rules() == []
    for user in ("deleted", "expired", "revoked"):  # for the tests to come: a config that can be loaded
        forget(box, f"{user}@example.com")
    reload(box)


def forget(world, user):
    """Take a user out of [allow]: the lines from its entry to the next."""
    lines, kept, skip = world.conf.read_text().splitlines(keepends=True), [], False
    for line in lines:
        if not line.startswith("    "):
            skip = user in line
        if not skip:
            kept.append(line)
    world.conf.write_text("".join(kept))


@needs_root
def test_a_key_that_is_known_but_not_in_allow_is_refused(box):
    conf = second_client(box, "stranger")
    forget(box, "stranger@example.com")
    reload(box)
    done = knock(box, "O", "22", conf=conf)
    assert done.returncode == 77 and "not allowed" in done.stderr and box.server.rules() == []


def reload(world):
    count = world.tariq.log.count("read again")
    world.tariq.process.send_signal(signal.SIGHUP)
    world.tariq.wait_log("read again", count + 1)


@needs_root
def test_a_request_for_another_server_is_refused(box):
    """An insider with the same secret cannot pass one server's request on to another: the server reads its name in it."""
    change = "hide = tariq.hide\ntariq.hide = lambda image, data: hide(image, data.replace(data[7:47], b'0' * 40))"
    done = knock(box, "O", "22", timeout=1, change=change)
    assert done.returncode == 75
    box.tariq.wait_log("asked another server")
    assert box.server.rules() == []


@needs_root
def test_the_client_refuses_a_server_that_signs_with_another_key(box):
    """An insider who has the secret answers in the server's place: with a key of their own, which the client even knows."""
    conf = box.me.parent / "wrong.conf"
    other = box.client.run("gpg", "--homedir", box.me.parent / "gpg", "--batch", "--with-colons", "--list-secret-keys", user=NOBODY).stdout
    other = next(line.split(":")[9] for line in other.splitlines() if line.startswith("fpr"))
    # The server's true answer meets a client that expects it from another key: the same check, from the other side.
    conf.write_text(box.me.read_text())
    conf.chmod(0o600)
    os.chown(conf, NOBODY, NOBODY)
    change = f"seal = tariq.Keyring.unseal\ntariq.Keyring.unseal = lambda *a: ('{other}', seal(*a)[1])"
    done = knock(box, "O", "22", conf=conf, change=change)
    assert done.returncode == 76 and f"signed by {other}" in done.stderr and box.server.rules() == []


@needs_root
def test_an_answer_that_is_late_wrong_or_from_elsewhere_opens_nothing(box):
    wrong = "digest = tariq.hmac.digest\ntariq.hmac.digest = lambda *a: bytes(32)"
    assert knock(box, "O", "22", timeout=1, change=wrong).returncode == 75
    # late: the server's patience is shortened in a second server's file, on the same host, with another chain
    conf = second_server(box, "late")
    client = make_client(box.lab, box.client, box.server, conf, "late@example.com", directory="late-client")
    text = (box.lab.dir / "tariq.py").read_text().replace("ANSWER_TIME = 30 ", "ANSWER_TIME = 0.2 ")
    assert "ANSWER_TIME = 0.2" in text
    (box.lab.dir / "late.py").write_text(text)
    server = Server(box.lab, box.server, conf, program="late.py").wait_log("listening on")
    sleepy = "answer = tariq.KernelTransport.answer\ntariq.KernelTransport.answer = lambda *a: (tariq.time.sleep(0.5), answer(*a))"
    assert knock(box, "O", "22", conf=client, timeout=2, change=sleepy).returncode == 75
    assert knock(box, "O", "22", conf=client).returncode == 0
    assert server.stop() == 0
    # from elsewhere: the answer leaves with another host's address, right in every other respect
    elsewhere = (f"answer = tariq.CraftedTransport.answer\n"
                 f"def send(self, payload):\n    self.ip.src = '{box.other.ip}'\n    answer(self, payload)\n"
                 f"tariq.CraftedTransport.answer = send")
    assert knock(box, "O", "22", timeout=2, user=None, change=elsewhere).returncode == 75
    assert box.server.rules() == []


def second_server(world, name):
    """A further server's config on the same host; its chain is named after it."""
    return make_server(world.lab, world.server, name, iptables_chain=name)


@needs_root
def test_a_relayed_knock_is_noticed_by_a_client_that_knows_its_address(box):
    """A man in the middle sends the client's fragments from its own address and passes the challenge back: the client sees
    another address in it than its own, and does not answer."""
    change = ("tariq.KernelTransport.__init__ = (lambda init: lambda self, *a: (init(self, *a), setattr(self, 'own', '203.0.113.77'))[0])"
              "(tariq.KernelTransport.__init__)")
    done = knock(box, "O", "22", change=change)
    assert done.returncode == 76 and "relays the knock" in done.stderr and box.client.ip in done.stderr
    assert box.server.rules() == [] and "has the address 203.0.113.77" in box.tariq.log


def rsa_client(box, algorithm, directory):
    """A client's keyring with an RSA key of its own, made by hand -> the path its config will have, its user."""
    conf, user = box.lab.dir / directory / "tariq.conf", f"{directory}@example.com"
    for path in (conf.parent, conf.parent / "gpg"):
        sh("install", "-d", "-m", "700", "-o", NOBODY, "-g", NOBODY, path)
    gpg = ["gpg", "--homedir", conf.parent / "gpg", "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    box.client.run(*gpg, "--quick-generate-key", user, algorithm, "default", "never", user=NOBODY)
    mine = next(line.split(":")[9] for line in box.client.run(*gpg, "--with-colons", "--list-keys", user=NOBODY).stdout.splitlines()
                if line.startswith("fpr"))
    box.client.run(*gpg, "--quick-add-key", mine, algorithm, "encr", user=NOBODY)
    return conf, user


@needs_root
@pytest.mark.parametrize("algorithm", ["rsa2048", "rsa3072", "rsa4096"])
def test_rsa_keys_fit_their_packets(box, algorithm):
    conf, user = rsa_client(box, algorithm, f"{algorithm}-client")
    make_client(box.lab, box.client, box.server, box.conf, user, ("O 22", "E head *"), directory=conf.parent.name)
    with Capture(box.server) as capture:
        done = knock(box, "O", "22", conf=conf)
        assert done.returncode == 0 and "opened tcp/22" in done.stdout, done.stderr + box.tariq.log
        done = knock(box, "E", "head", "-c", "3000", "/dev/zero", conf=conf)
        assert done.returncode == 0 and "[cut to one packet]" in done.stdout
        assert max(len(frame) for frame, *_ in capture.segments()) <= 1514


@needs_root
def test_an_rsa_4096_server_with_an_rsa_4096_client(box):
    conf = box.lab.dir / "rsa-server" / "tariq.conf"
    sh("install", "-d", "-m", "700", "-o", "tariq", "-g", "tariq", "-D", box.lab.dir / "rsa-ring")
    owner = pwd.getpwnam("tariq")
    gpg = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups", "gpg", "--homedir", box.lab.dir / "rsa-ring",
           "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    sh(*gpg, "--quick-generate-key", "server@example.com", "rsa4096", "default", "never", cwd="/")
    mine = next(line.split(":")[9] for line in sh(*gpg, "--with-colons", "--list-keys", cwd="/").stdout.splitlines() if line.startswith("fpr"))
    sh(*gpg, "--quick-add-key", mine, "rsa4096", "encr", cwd="/")
    make_server(box.lab, box.server, "rsa-server", iptables_chain="rsa", server_gpg_dir=box.lab.dir / "rsa-ring", server_user=mine)
    client, user = rsa_client(box, "rsa4096", "rsa-other")
    public = box.lab.tariq(box.client, "keygen", "-c", client, user, user=NOBODY).stdout
    profile = box.lab.tariq(box.server, "enroll", "-c", conf, input=public, stdin=None).stdout
    box.lab.tariq(box.client, "join", "-c", client, "rsa", user=NOBODY, input=profile, stdin=None)
    client.write_text(client.read_text().replace("[rsa]\n", f"[rsa]\nhost = {box.server.ip}\n"))
    server = Server(box.lab, box.server, conf).wait_log("listening on")
    done = knock(box, "O", "22", conf=client, where="rsa")
    assert done.returncode == 0 and "opened tcp/22 on rsa" in done.stdout, done.stderr + server.log
    assert server.stop() == 0


# ---- promise 4: silence --------------------------------------------------------------------------------------------

@needs_root
def test_no_tariq_socket_is_listening(box):
    assert "tariq" not in box.server.run("ss", "-lntup").stdout and "python" not in box.server.run("ss", "-lntup").stdout
    assert "users:((\"sshd\"" in box.server.run("ss", "-lntup").stdout, "ss would have shown it"


@needs_root
def test_random_data_on_the_right_ports_in_the_right_order_gets_no_packet(box):
    before = box.tariq.log
    with Capture(box.server) as capture:
        for size in (1, 40, 900, 898, 1160):
            frames = [syn_for(box, position, os.urandom(size)) for position in range(5)]
            inject(box.client, frames, times=20)
        segments = capture.segments()
        assert len([1 for _, _, port, flags, _ in segments if port in box.ports and flags == 2]) >= 500, "they arrived"
        assert not [1 for _, port, *_ in segments if port in box.ports], "no answer"
    assert box.tariq.log == before, "nor a line in the log"


def syn_for(world, position, payload, source=None):
    """A SYN of the client's to a secret port, made with scapy."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    macs = [host.run("cat", "/sys/class/net/eth0/address").stdout.strip() for host in (world.client, world.server)]
    return bytes(Ether(src=macs[0], dst=macs[1]) / IP(src=source or world.client.ip, dst=world.server.ip)
                 / TCP(sport=40000, dport=world.ports[position], flags="S") / payload)


@needs_root
def test_replayed_exchanges_get_no_packet_whole_or_in_parts_from_the_same_address_or_another(box):
    with Capture(box.server) as capture:
        assert knock(box, "O", "22").returncode == 0
        recorded = [frame for frame, _, port, _, payload in capture.segments() if port in box.ports and payload]
    assert len(recorded) >= 6, "five fragments and an answer"
    box.server.run("iptables", "-F", "tariq")
    before = box.tariq.log
    with Capture(box.server) as capture:
        inject(box.client, recorded)  # whole
        inject(box.client, recorded, times=3)
        for frame in recorded:  # packet by packet
            inject(box.client, [frame])
        inject(box.client, reversed(recorded))
        stolen = [from_address(frame, box.other.ip) for frame in recorded]
        inject(box.other, stolen, times=2)
        time.sleep(0.5)
        assert not [1 for _, port, _, flags, _ in capture.segments() if port in box.ports and not flags & 4], "not one packet"
    assert box.server.rules() == [] and box.tariq.log == before


@needs_root
def test_a_knock_recorded_before_its_exchange_ended_is_worth_nothing(box):
    """The fragments alone, held back from the server and replayed later by another: the door of a proof not given stays shut."""
    change = "tariq.KernelTransport.answer = lambda self, payload: None"
    with Capture(box.server) as capture:
        assert knock(box, "O", "22", timeout=1, change=change).returncode == 75
        fragments = [frame for frame, _, port, flags, payload in capture.segments() if port in box.ports and payload]
    inject(box.other, [from_address(frame, box.other.ip) for frame in fragments])
    time.sleep(0.3)
    assert box.server.rules() == []


@needs_root
def test_payloads_of_fifty_exchanges_look_random_and_carry_no_markers(box):
    with Capture(box.server) as capture:
        for turn in range(50):
            assert knock(box, "O" if turn % 2 else "C", "22").returncode == 0
        payloads = [payload for _, source, port, _, payload in capture.segments() if payload and (source in box.ports or port in box.ports)]
    assert len(payloads) >= 50 * 8
    everything = b"".join(payloads)
    for marker in (b"\x89PNG", b"IHDR", b"IDAT", b"IEND", b"-----BEGIN", b"OpenPGP", b"example", b"laptop", b"\xff\xd8\xff"):
        assert marker not in everything
    # Byte frequencies: chi-square with 255 degrees of freedom has mean 255 and standard deviation 22.6; 6 of those is 1 in 1e8.
    def chi_square(data):
        expected = len(data) / 256
        return sum((data.count(bytes([value])) - expected) ** 2 / expected for value in range(256))
    assert chi_square(everything) < 255 + 6 * 22.6
    # Position by position too: a fixed header, key id or length anywhere would show in the first or last bytes.
    for column in [[payload[place] for payload in payloads] for place in (*range(40), *range(-8, 0))]:
        assert max(column.count(value) for value in set(column)) < 18, "400 random bytes have hardly ever 18 of a kind"


@needs_root
def test_no_two_payloads_are_alike_and_repeats_are_new_frames(box):
    change = "tariq.WAIT = 0.01"
    with Capture(box.server) as capture:
        assert knock(box, "O", "22", change=change).returncode == 0
        payloads = [payload for _, _, port, flags, payload in capture.segments() if payload and port in box.ports and flags == 2]
    assert len(payloads) >= 10 and len(set(payloads)) == len(payloads)


INSIDER = r"""
# Somebody with the shared secret and no key: knocks that are whole and authentic and carry junk, as fast as they go.
import importlib.util, os, socket, sys, time
spec = importlib.util.spec_from_file_location("tariq", sys.argv[1])
tariq = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tariq)
key, address, ports = bytes.fromhex(sys.argv[2]), sys.argv[3], tuple(map(int, sys.argv[4].split(",")))
transport, end, whole = tariq.KernelTransport(socket.AF_INET, (address, 0), ports), time.monotonic() + float(sys.argv[5]), 0
while time.monotonic() < end:
    knock_id, whole = os.urandom(12), whole + 1
    frames = [tariq.frame(key, tariq.fragment_label(place, 5), knock_id + os.urandom(850)) for place in range(5)]
    transport.knock(frames if whole % 2 else frames[1:] + frames[:1])  # every other one at the wrong ports
    if transport.receive(0):
        sys.exit("an answer")
print(whole)
"""


@needs_root
def test_the_secret_alone_gets_no_answer_and_starves_nobody_else(box):
    before = box.server.run("cat", f"/proc/{box.tariq.listener}/status").stdout
    flood = box.other.popen(sys.executable, "-c", INSIDER, box.lab.dir / "tariq.py", box.key.hex(), box.server.ip,
                            ",".join(map(str, box.ports)), 6, stdout=subprocess.PIPE)
    time.sleep(1)
    with Capture(box.other) as capture:
        assert [knock(box, "O", "22").returncode for _ in range(8)] == [0] * 8
        assert flood.wait(20) == 0 and int(flood.stdout.read()) > 300
        assert not [1 for _, source, *_ in capture.segments() if source in box.ports], "no packet came to the insider"
    assert f"{box.other.ip}: knock refused" in box.tariq.log and box.server.rules()[0].count(box.client.ip) == 1
    memory = [int(re.search(r"VmRSS:\s*(\d+)", text)[1]) for text in (before, box.server.run("cat", f"/proc/{box.tariq.listener}/status").stdout)]
    assert memory[1] - memory[0] < 20_000, f"kB before and after: {memory}"


# ---- disorder, duplication, several at once ------------------------------------------------------------------------

@needs_root
@pytest.mark.parametrize("order", ["reversed", "doubled", "shuffled", "halves"])
def test_fragments_may_arrive_in_any_order_and_more_than_once(box, order):
    change = f"""
base = tariq.KernelTransport
class Disordered(base):
    turn = 0
    def knock(self, frames):
        pairs, ports, self.turn = list(zip(self.ports, frames)), self.ports, self.turn + 1
        pairs = dict(reversed=pairs[::-1], doubled=sorted(pairs * 2), shuffled=__import__("random").sample(pairs, 5),
                     halves=pairs[:3] if self.turn % 2 else pairs[3:])[{order!r}]
        for port, payload in pairs:
            self.ports = (port,)
            base.knock(self, [payload])
            self.ports = ports
            if port != ports[-1]:
                self.sockets.pop().close()
tariq.KernelTransport = Disordered
"""
    for turn in range(3):
        done = knock(box, "O", "22", change=change)
        assert done.returncode == 0, done.stderr
    assert len(box.server.rules()) == 1


@needs_root
def test_a_wrong_sequence_of_ports_never_assembles(box):
    ports = list(box.ports)
    ports[0], ports[1] = ports[1], ports[0]
    done = knock(box, "O", "22", timeout=1, options=("-p", ",".join(map(str, ports))))
    assert done.returncode == 75 and "wrong secret_ports" in done.stderr and box.server.rules() == []


@pytest.fixture(scope="module")
def nat(world):
    """A home: two hosts behind a router that masquerades and forwards nothing but what its own hosts began."""
    lab = world.lab
    router = Host(lab, "router", 40)
    lab.plug(router, "eth0", f"{router.ip}/24")
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    inside = []
    for number in (1, 2):
        host = Host(lab, f"home{number}", 10 + number, prefix=f"192.168.{number}")
        sh("ip", "link", "add", "eth0", "netns", host.netns, "type", "veth", "peer", "name", f"in{number}", "netns", router.netns)
        for where, interface, address in ((host, "eth0", f"{host.ip}/24"), (router, f"in{number}", f"192.168.{number}.1/24")):
            where.run("ip", "addr", "add", address, "dev", interface)
            where.run("ip", "link", "set", interface, "up")
        host.run("ip", "route", "add", "default", "via", f"192.168.{number}.1")
        inside.append(host)
    for rule in ("-t nat -A POSTROUTING -o eth0 -j MASQUERADE", "-P FORWARD DROP",
                 "-A FORWARD -m conntrack --ctstate INVALID -j DROP", "-A FORWARD ! -i eth0 -o eth0 -j ACCEPT",
                 "-A FORWARD -i eth0 -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"):
        router.run("iptables", *rule.split())
    yield SimpleNamespace(router=router, inside=inside)


@needs_root
@pytest.mark.parametrize("transport", ["kernel", "crafted"])
def test_the_exchange_passes_a_stateful_nat_router(box, nat, transport):
    user = NOBODY if transport == "kernel" else None
    done = knock(box, "O", "22", host=nat.inside[0], user=user, options=("--transport", transport))
    assert done.returncode == 0 and f"for {nat.router.ip} until" in done.stdout, done.stderr + box.tariq.log
    assert nat.inside[0].connects(box.server.ip) and not box.other.connects(box.server.ip)


@needs_root
def test_two_clients_behind_one_nat_knock_at_once(box, nat):
    other = second_client(box, "neighbour", allow=("O 8022",))
    for _ in range(3):
        with running(box, "O", "22", host=nat.inside[0]) as one, running(box, "O", "8022", host=nat.inside[1], conf=other) as two:
            assert one.wait(20) == 0 and two.wait(20) == 0, one.stderr.read() + two.stderr.read() + box.tariq.log
        rules = box.server.rules()
        assert len(rules) == 2 and all(f"-s {nat.router.ip}/32" in rule for rule in rules)


@needs_root
def test_twelve_clients_at_once_all_get_in(box):
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(running(box, "O", "22")) for _ in range(12)]
        assert [process.wait(30) for process in many] == [0] * 12
    assert len(box.server.rules()) == 1


TUNNEL = r"""
# One end of a tunnel: packets without a link header, carried over UDP.
import fcntl, os, select, socket, struct, sys
tun = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH", b"tun0", 0x1001))  # TUNSETIFF: IFF_TUN | IFF_NO_PI
wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
wire.bind((sys.argv[1], 5555))
print("ready", flush=True)
while True:
    for source in select.select([tun, wire], [], [])[0]:
        if source is wire: os.write(tun, wire.recv(2000))
        else: wire.sendto(os.read(tun, 2000), (sys.argv[2], 5555))
"""


@needs_root
@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="no tun devices here")
def test_knocks_arrive_through_a_tunnel_that_has_no_link_header():
    """As on a VPN's or a PPP interface: IPv4 and IPv6, both transports, an MTU below Ethernet's."""
    with Lab() as lab:
        server, client = lab.host("server", 10), lab.host("client", 20)
        server.drop_policy()
        server.run("iptables", "-A", "INPUT", "-i", "eth0", "-p", "udp", "--dport", "5555", "-j", "ACCEPT")
        for host, other, ip, ip6 in ((server, client, "203.0.113.1", "2001:db8:9::1"), (client, server, "203.0.113.2", "2001:db8:9::2")):
            end = host.popen(sys.executable, "-c", TUNNEL, host.ip, other.ip, stdout=subprocess.PIPE)
            assert end.stdout.readline() == "ready\n"
            host.run("ip", "addr", "add", f"{ip}/30", "dev", "tun0")
            host.run("ip", "addr", "add", f"{ip6}/64", "dev", "tun0", "nodad")
            host.run("ip", "link", "set", "tun0", "up", "mtu", "1280")
        conf = make_server(lab, server, interface="tun0")
        mine = make_client(lab, client, server, conf)
        text, running = mine.read_text(), Server(lab, server, conf).wait_log("listening on tun0")
        for address, own in (("203.0.113.1", "203.0.113.2"), ("2001:db8:9::1", "2001:db8:9::2")):
            mine.write_text(text.replace(f"host = {server.ip}", f"host = {address}"))
            for transport, user in (("kernel", NOBODY), ("crafted", None)):
                done = lab.tariq(client, "knock", "-c", mine, "--transport", transport, "box", "O", "22", user=user)
                assert f"for {own} until" in done.stdout
        assert running.stop() == 0


# ---- the monitor believes nothing ------------------------------------------------------------------------------------

MONITOR = r"""
# A real monitor with its real config in a host, and a hostile listener at the other end of the channel.
import importlib.util, json, os, socket, sys
spec = importlib.util.spec_from_file_location("tariq", sys.argv[1])
tariq = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tariq)
tariq.need_root()
monitor = tariq.Monitor(sys.argv[2], tariq.load_scapy())
monitor.prepare_firewall()
signer = next(iter(monitor.users))
def message(**change):
    fields = {"id": "00" * 12, "signer": signer, "command": ["O", "22"], "ip": "192.0.2.7"}
    return json.dumps({**fields, **change}).encode()
hostile = [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 8000, b'{"a":' * 1500, message(id="00"), message(id=3), message(signer="x" * 40),
           message(signer=None), message(signer=[signer]), message(signer="0" * 40), message(command="O 22"), message(command=[]),
           message(command=["O"]), message(command=["O", 22]), message(command=["O", None]), message(command=["O", "*"]),
           message(command=["O", "22", "-j"]), message(command=["O", "23"]), message(command=["E", "reboot"]), message(command=["E"]),
           message(command=["E", "echo\nx"]), message(command=[["O", "22"]]), message(command={"O": "22"}), message(ip="192.0.2.7/0"),
           message(ip="0/0"), message(ip="-j ACCEPT"), message(ip=5), message(ip=None), message(ip=["192.0.2.7"]), message(ip="fe80::1%eth0"),
           message(command=["O", "22"] + ["22"] * 9000), message(command="Eid"), message(command="O22"), message(command=["O", "٢٢"]), message(ip="192.0.2.7\n")]
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
monitor.channel = ours
for case in hostile:
    try:
        monitor.handle(case[:tariq.MESSAGE_MAX])
    except tariq.Fault as fault:
        sys.exit(f"Fault: {case[:200]} {fault}")
theirs.setblocking(False)
answers = []
try:
    while True:
        answers.append(theirs.recv(9000))
except BlockingIOError:
    pass
print("answers that say done:", sum(answer[tariq.ID] for answer in answers), "doors:", len(monitor.doors))
for number in range(tariq.DOORS_EACH + 3 if len(sys.argv) > 3 else 0):  # too many: never read by the listener, too
    monitor.handle(message(ip=str(tariq.ipaddress.ip_address(3221225984 + number))))
print("doors at the most:", len(monitor.doors))
for door in list(monitor.doors):
    monitor.close(*door)
monitor.handle(message())
print("doors after a good request:", len(monitor.doors))
monitor.close_all()
"""


@needs_root
def test_a_listener_that_was_taken_over_gets_refusals_only(box):
    conf = second_server(box, "monitor")
    make_client(box.lab, box.client, box.server, conf, "monitor@example.com", ("O 22",), directory="monitor-client")
    done = box.server.run(sys.executable, "-c", MONITOR, box.lab.dir / "tariq.py", conf, "many")
    assert "doors at the most: 64\n" in done.stdout
    assert "answers that say done: 0 doors: 0\n" in done.stdout and "doors after a good request: 1" in done.stdout, done.stdout
    assert "Traceback" not in done.stderr and done.stderr.count("malformed message") > 15


# ---- bad input: one clear line, an exit code of its own, never a traceback ----------------------------------------------

@needs_root
def test_every_error_of_the_client_is_one_line_with_its_own_code(box, tmp_path):
    loose = box.me.parent / "loose.conf"
    loose.write_text(box.me.read_text())
    loose.chmod(0o644)
    nobody_reads = box.me.parent / "unreadable.conf"
    nobody_reads.write_text(box.me.read_text())
    nobody_reads.chmod(0o600)
    covers = box.lab.dir / "no-covers"
    covers.mkdir(exist_ok=True)
    cases = [
        ((), dict(where="box"), 64, "required"), (("X", "22"), {}, 64, "invalid choice"), (("O",), {}, 64, "needs O PORT"),
        (("O", "0"), {}, 64, "needs ports"), (("O", "99999"), {}, 64, "needs ports"), (("O", "ssh"), {}, 64, "needs ports"),
        (("E",), {}, 64, "needs O PORT"), (("E", "a\nb"), {}, 64, "printable"), (("E", "echo", "x" * 900), {}, 64, "bytes too long"),
        (("O", "22"), dict(options=("-p", "1,2,3")), 64, "needs 5 to 32"), (("O", "22"), dict(options=("-t", "x")), 64, "whole number of seconds"),
        (("O", "22"), dict(options=("-t", "0")), 64, "1 to 999"),
        (("O", "22"), dict(options=("--transport", "pigeon")), 64, "invalid choice"), (("O", "22"), dict(options=("-4", "-6")), 64, "not allowed"),
        (("O", "22"), dict(options=("-i", covers)), 65, "needs PNG images"), (("O", "22"), dict(options=("-u", "who@example.com")), 65, "gpg: "),
        (("O", "22"), dict(conf=box.me.parent / "none.conf"), 78, "none.conf: No such file"), (("O", "22"), dict(conf=loose), 78, "chmod 600"),
        (("O", "22"), dict(conf=nobody_reads), 78, "Permission denied"), (("O", "22"), dict(options=("-g", "/nonexistent")), 78, "keyring"),
        (("O", "22"), dict(where="unknown.example.com"), 78, "[unknown.example.com] secret_ports is missing"),
        (("O", "22"), dict(options=("--transport", "crafted")), 71, "CAP_NET_RAW"),
        (("O", "23"), {}, 77, "not allowed to"),
    ]
    for words, how, code, text in cases:
        done = knock(box, *words, **how)
        assert done.returncode == code and text in done.stderr, (words, how, done)
        assert done.stderr.startswith("tariq: ") and done.stderr.count("\n") == 1 and done.stdout == "", done
    assert all(f"{code} " in box.lab.tariq(box.client, "knock", "--help").stdout for code in (0, 64, 65, 69, 70, 71, 75, 76, 77, 78))


@needs_root
def test_a_missing_program_or_package_is_named_with_what_to_install(box):
    script = "import sys; sys.modules['{0}'] = None; sys.argv = {1!r}; import runpy; runpy.run_path({2!r}, run_name='__main__')"
    program = str(box.lab.dir / "tariq.py")
    for module, argv, user in (("PIL", ["t", "knock", "-c", str(box.me), "box", "O", "22"], NOBODY),
                               ("scapy", ["t", "knock", "-c", str(box.me), "--transport", "crafted", "box", "O", "22"], None),
                               ("scapy", ["t", "server", "-c", str(box.conf)], None), ("PIL", ["t", "server", "-c", str(box.conf)], None)):
        done = box.client.run(sys.executable, "-c", script.format(module, argv, program), user=user, check=False)
        assert done.returncode == 69 and "apt-get install" in done.stderr and module in done.stderr, done
        assert done.stderr.count("\n") == 1
    for hidden, host, argv, user in (("/usr/bin/gpg", box.client, ("knock", "-c", box.me, "box", "O", "22"), NOBODY),
                                     ("/usr/sbin/xtables-nft-multi", box.other, ("server", "-c", box.conf), None),
                                     ("/usr/bin/gpg", box.server, ("server", "-c", box.conf), None)):
        # An empty directory's worth of PATH in a private mount namespace: the program is not there.
        real = os.path.realpath(hidden)
        cover = f"mount --bind /dev/null {real} && exec \"$@\""
        inner = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        done = host.run("sh", "-c", cover, "sh", *inner, *PYTHON, program, *argv, check=False)
        assert done.returncode in (69, 71) and "Traceback" not in done.stderr, done


@needs_root
def test_a_kernel_without_fast_open_is_named_with_what_to_do(box):
    box.client.run("sysctl", "-qw", "net.ipv4.tcp_fastopen=0")
    try:
        done = knock(box, "O", "22")
    finally:
        box.client.run("sysctl", "-qw", "net.ipv4.tcp_fastopen=1")
    assert done.returncode == 71 and "net.ipv4.tcp_fastopen=1" in done.stderr and done.stderr.count("\n") == 1


@needs_root
def test_every_error_of_the_server_is_one_line_with_its_own_code(box):
    text = box.conf.read_text()

    def variant(old, new, mode=0o600):
        path = box.lab.dir / "variant" / "variant.conf"
        path.parent.mkdir(exist_ok=True)
        assert old in text
        path.write_text(text.replace(old, new))
        path.chmod(mode)
        return path
    user = config_values(box.conf, "server")["server_user"]
    cases = [(variant, ("[allow]", "[allow]\nnobody@example.com =\n    O 22\n"), 78, "nobody@example.com matches 0 keys"),
             (variant, (f"server_user = {user}", "server_user = nobody@example.com"), 78, "matches 0 keys"),
             (variant, (f"server_user = {user}", ""), 78, "server_user is missing"),
             (variant, ("server_gpg_dir = ", "server_gpg_dir = /nonexistent"), 78, "keyring"),
             (variant, ("[server]", "[server]\nopen_timeout = soon"), 78, "[server] open_timeout: needs"),
             (variant, ("[server]", "[server]\nopen_tcp_port = -A tariq {ip} {dport} {until} --nonsense"), 71, "iptables"),
             (variant, ("[server]", "[server]\nopen_tcp_port = -A other {ip} {dport} {until}"), 78, "iptables_chain"),
             (variant, ("[allow]", "[allow]\nx = E"), 78, "[allow] x: needs"), (variant, ("[server]", "[sever]"), 78, "[server]"),
             (variant, ("[server]", "[server]", 0o644), 78, "chmod 600")]
    for make, arguments, code, words in cases:
        path = make(*arguments)
        done = box.other.run(*PYTHON, box.lab.dir / "tariq.py", "server", "-c", path, check=False)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("<")]
        assert done.returncode == code and len(lines) == 1 and words in lines[0], (arguments, done)
    # two keys for one email: ambiguous
    server_gpg(box, "--quick-generate-key", "Twin <twin@example.com>", "future-default", "default", "never")
    server_gpg(box, "--quick-generate-key", "Other <twin@example.com>", "future-default", "default", "never")
    path = variant("[allow]", "[allow]\ntwin@example.com =\n    O 22\n")
    done = box.other.run(*PYTHON, box.lab.dir / "tariq.py", "server", "-c", path, check=False)
    assert done.returncode == 78 and "matches 2 keys" in done.stderr and "fingerprint" in done.stderr
    done = box.other.run(*PYTHON, box.lab.dir / "tariq.py", "server", "-c", box.conf, user=NOBODY, check=False)
    assert done.returncode == 71 and "root" in done.stderr


@needs_root
def test_the_server_stops_cleanly_on_both_signals_and_leaves_an_empty_chain(box):
    conf = second_server(box, "stopping")
    client = make_client(box.lab, box.client, box.server, conf, "stop@example.com", directory="stopping-client")
    for number in (signal.SIGTERM, signal.SIGINT):
        server = Server(box.lab, box.server, conf).wait_log("listening on")
        listener = server.listener
        assert knock(box, "O", "22", conf=client).returncode == 0
        assert "-A stopping" in box.server.run("iptables", "-S", "stopping").stdout
        assert server.stop(number) == 0
        assert "-A stopping" not in box.server.run("iptables", "-S", "stopping").stdout
        assert not Path(f"/proc/{listener}").exists() and "Traceback" not in server.log


@needs_root
def test_two_stop_signals_at_once_still_flush_the_chain(box):
    conf = second_server(box, "twice")
    client = make_client(box.lab, box.client, box.server, conf, "twice@example.com", directory="twice-client")
    for _ in range(3):
        server = Server(box.lab, box.server, conf).wait_log("listening on")
        assert knock(box, "O", "22", conf=client).returncode == 0
        server.process.send_signal(signal.SIGINT)
        assert server.stop(signal.SIGTERM) == 0
        assert "-A twice" not in box.server.run("iptables", "-S", "twice").stdout


@needs_root
def test_a_listener_that_hangs_or_misses_the_monitors_death_does_not_stay(box):
    conf = second_server(box, "hanging")
    client = make_client(box.lab, box.client, box.server, conf, "hang@example.com", directory="hanging-client")
    server = Server(box.lab, box.server, conf).wait_log("listening on")
    os.kill(server.listener, signal.SIGSTOP)
    assert server.stop() == 0, "a listener that reads nothing any more cannot hold up the stop"
    server = Server(box.lab, box.server, conf).wait_log("listening on")
    listener = server.listener
    server.process.send_signal(signal.SIGSTOP)  # so that a request waits unread when the monitor dies
    assert knock(box, "O", "22", conf=client, timeout=1).returncode == 75
    server.kill()
    wait_for(lambda: not alive(listener), "the listener outlives its monitor")


@needs_root
def test_the_listener_has_neither_the_monitors_terminal_nor_its_log(box):
    pid = box.tariq.listener
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert (words[3], words[4]) == (str(pid), "0"), "a session of its own, and no terminal"
    links = {number: os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)}
    assert links[0] == links[1] == "/dev/null" and links[2].startswith("pipe:")


@needs_root
def test_a_second_server_with_the_same_chain_does_not_start(box):
    done = box.server.run(*PYTHON, box.lab.dir / "tariq.py", "server", "-c", box.conf, check=False)
    assert done.returncode == 71 and "runs already" in done.stderr and "iptables" not in done.stderr
    assert knock(box, "O", "22").returncode == 0


@needs_root
def test_a_new_chain_at_reload_is_refused_so_that_no_door_is_forgotten(box):
    text = box.conf.read_text()
    box.conf.write_text(text.replace("[server]\n", "[server]\niptables_chain = other\n"))
    try:
        box.tariq.process.send_signal(signal.SIGHUP)
        box.tariq.wait_log("a new one takes a restart")
    finally:
        box.conf.write_text(text)
    assert knock(box, "O", "22").returncode == 0 and len(box.server.rules()) == 1


@needs_root
def test_enrolment_takes_no_impostor_no_secret_key_and_not_two_keys(box):
    ring = box.lab.dir / "impostor"
    sh("install", "-d", "-m", "700", ring)
    gpg = ["gpg", "--homedir", ring, "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    mine, server = fingerprint(box, "me@laptop"), config_values(box.conf, "server")["server_user"]
    named = box.conf.read_text()
    box.conf.write_text(named.replace(f"{mine} =", "me@laptop ="))  # as one sets up by hand
    try:
        for user, words in (("Mallory <me@laptop>", "the name of another user"), (f"Mallory <{server}>", "the name of another user"),
                            ("mallory@example.com", "needs one public key")):
            sh(*gpg, "--quick-generate-key", user, "future-default", "default", "never")
            export = "--export-secret-keys" if "@example.com" in user else "--export"
            key = subprocess.run([*map(str, gpg), export, user], capture_output=True, check=True).stdout
            before = server_gpg(box, "--with-colons", "--list-keys").stdout
            done = subprocess.run(box.server.command([*PYTHON, box.lab.dir / "tariq.py", "enroll", "-c", box.conf]), input=key,
                                  capture_output=True, check=False)
            assert done.returncode == 65 and words.encode() in done.stderr and done.stdout == b"", done
            assert server_gpg(box, "--with-colons", "--list-keys").stdout == before, "nothing is imported"
        both = subprocess.run([*map(str, gpg), "--export"], capture_output=True, check=True).stdout
        done = subprocess.run(box.server.command([*PYTHON, box.lab.dir / "tariq.py", "enroll", "-c", box.conf]), input=both,
                              capture_output=True, check=False)
        assert done.returncode == 65
    finally:
        box.conf.write_text(named)


@needs_root
def test_a_known_client_cannot_take_a_further_name_that_is_somebody_elses(box):
    conf = second_client(box, "climber")
    mine, text = fingerprint(box, "climber@example.com"), box.conf.read_text()
    gpg = ["gpg", "--homedir", conf.parent / "gpg", "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    box.client.run(*gpg, "--quick-add-uid", mine, "Boss <boss@example.com>", user=NOBODY)
    box.conf.write_text(text + "boss@example.com =\n    O 22\n")
    try:
        key = box.client.run(*gpg, "--armor", "--export", mine, user=NOBODY).stdout
        done = box.lab.tariq(box.server, "enroll", "-c", box.conf, input=key, stdin=None, check=False)
        assert done.returncode == 65 and "the name of another user" in done.stderr
        assert "boss@" not in server_gpg(box, "--with-colons", "--list-keys").stdout
    finally:
        box.conf.write_text(text)


@needs_root
def test_what_enroll_writes_can_always_be_read_again(box):
    keys = [subprocess.run(box.client.command([*PYTHON, box.lab.dir / "tariq.py", "keygen", "-c", box.lab.dir / f"many-{number}" / "tariq.conf",
                                               f"Many {number} <many{number}@example.com>"]), capture_output=True, check=True).stdout
            for number in range(4)]
    enroll = box.server.command([*PYTHON, box.lab.dir / "tariq.py", "enroll", "-c", box.conf])
    text = box.conf.read_text()
    try:
        done = subprocess.run([*enroll, "--allow", "E echo 'a #b'"], input=keys[0], capture_output=True, check=False)
        assert done.returncode == 64 and b"is a comment" in done.stderr, done
        assert box.conf.read_text() == text
        box.conf.write_text(text[:text.index("[allow]")] + "[allow]")  # an editor that leaves out the last newline
        together = [subprocess.Popen(enroll, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in keys]
        for process, key in zip(together, keys):  # all at once: none may lose another's entry
            process.stdin.write(key)
            process.stdin.close()
        assert [process.wait(30) for process in together] == [0] * 4
        for process in together:
            process.stdout.close()
            process.stderr.close()
        assert len(tariq.Config(box.conf).allowed()) == 4 and "many3@example.com" in box.conf.read_text()
    finally:
        box.conf.write_text(text)


@needs_root
def test_one_config_may_serve_both_roles_and_be_enrolled_in_itself(box):
    conf = second_server(box, "both-roles")
    line = " | ".join(f"{sys.executable} -I {box.lab.dir}/tariq.py {words}" for words in
                      (f"keygen -c {conf} me@itself", f"enroll -c {conf} --allow O 22", f"join -c {conf} itself"))
    conf.write_text(conf.read_text() + f"[client]\nuser = me@itself\nclient_gpg_dir = {conf.parent}/client-gpg\n")
    box.server.run("sh", "-c", line, timeout=30)
    config = tariq.Config(conf)
    assert config.ini.has_section("itself") and list(config.allowed().values()) == [[["O", "22/tcp"]]]


@needs_root
def test_init_keeps_the_key_of_a_server_that_was_made_by_hand(box):
    conf = second_server(box, "handmade")
    ring = box.lab.dir / "handmade-ring"
    owner = pwd.getpwnam("tariq")
    sh("install", "-d", "-m", "700", "-o", "tariq", "-g", str(owner.pw_gid), ring)
    gpg = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups", "gpg", "--homedir", ring, "--batch",
           "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    sh(*gpg, "--quick-generate-key", "Tariq <tariq@handmade.example.com>", "future-default", "default", "never", cwd="/")
    text = re.sub("(?m)^server_gpg_dir = .*", f"server_gpg_dir = {ring}", conf.read_text())
    conf.write_text(re.sub("(?m)^server_user = .*", "server_user = tariq@handmade.example.com", text))
    for _ in range(2):
        box.lab.tariq(box.server, "init", "-c", conf)
    assert sh(*gpg, "--with-colons", "--list-keys", cwd="/").stdout.count("pub:") == 1


@needs_root
def test_daemons_that_commands_leave_behind_hold_nothing_of_the_monitors(box):
    pid = box.tariq.process.pid
    before = len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
    for _ in range(4):
        assert knock(box, "E", "sh", "-c", "sleep 20 & echo started").stdout == "started\n"
    wait_for(lambda: (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))) == before, "they leave descriptors or threads")
    box.server.run("pkill", "-f", "^sleep 20$", check=False)


def test_the_monitor_notices_a_listener_that_closes_its_end():
    monitor = object.__new__(tariq.Monitor)
    monitor.words, words = os.pipe()
    os.set_blocking(monitor.words, False)
    assert monitor.relay_words(), "nothing said is no end"
    os.close(words)
    assert not monitor.relay_words()
    os.close(monitor.words)


@needs_root
def test_a_user_id_with_a_name_before_the_email_works_throughout(box):
    conf = make_client(box.lab, box.client, box.server, box.conf, "Full Name <full@example.com>", directory="full-name")
    assert knock(box, "O", "22", conf=conf).returncode == 0
    assert "Full Name <full@example.com> " in box.tariq.log


@needs_root
def test_a_hostile_server_draws_no_traceback_and_steers_no_terminal(box):
    wrap = "unseal = tariq.Keyring.unseal\ntariq.Keyring.unseal = lambda *a: (lambda signer, plain: (signer, {}))(*unseal(*a))"
    for plain in ("b''", "plain[:12]", "plain[:13]", "plain[:20]"):
        done = knock(box, "O", "22", timeout=1, change=wrap.format(plain))
        assert done.returncode == 75 and "Traceback" not in done.stderr, done
    done = knock(box, "O", "22", change=wrap.format(r"plain.replace(b'opened', b'\x1b[2Jopened')"))
    assert done.returncode == 0 and done.stdout.startswith("\\x1b[2Jopened")
    done = knock(box, "O", "23", change=wrap.format("plain.replace(bytes([77]) + b'refused', bytes([0]) + b'refused')"))
    assert done.returncode == 77, "a refusal is one, whatever status it claims"


@needs_root
def test_a_command_ends_with_the_server(box):
    conf = second_server(box, "ending")
    client = make_client(box.lab, box.client, box.server, conf, "end@example.com", ("E sleep *",), directory="ending-client")
    server = Server(box.lab, box.server, conf).wait_log("listening on")
    with running(box, "E", "sleep", "7777", conf=client):
        server.wait_log("+ sleep 7777")
        time.sleep(0.2)
        assert server.stop() == 0
    assert box.server.run("pgrep", "-f", "^sleep 7777", check=False).stdout == ""


@needs_root
def test_every_change_to_the_machine_is_logged_before_it_runs(box):
    assert knock(box, "O", "22").returncode == 0 and knock(box, "E", "echo", "a b").returncode == 0
    lines = box.tariq.log.splitlines()
    rule = max(index for index, line in enumerate(lines) if line.startswith(f"<5>+ iptables -w 5 -A tariq -s {box.client.ip} "))
    assert any(f"{box.client.ip} O 22/tcp: opened tcp/22" in line for line in lines[rule:])
    assert "<5>+ echo 'a b'" in lines


@needs_root
def test_the_server_warns_where_nothing_is_hidden(box):
    conf = make_server(box.lab, box.other, "warned")
    server = Server(box.lab, box.other, conf).wait_log("listening on")
    assert server.log.count("INPUT does not drop") == 2
    assert server.stop() == 0
    box.other.run("iptables", "-A", "INPUT", "-p", "tcp", "-j", "REJECT")
    server = Server(box.lab, box.other, conf).wait_log("listening on")
    assert "iptables: INPUT has a REJECT rule" in server.log and server.stop() == 0
    box.other.run("iptables", "-F", "INPUT")


# ---- nothing an attacker sends matters, nor what breaks: privileges, deadlines, loss, replays at scale, faults ------------

NO_ANSWER, SYSTEM, DIED = 75, 71, 70  # tariq.py --help
HARMLESS = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}


@pytest.fixture(scope="module")
def place():
    """A server with sshd behind a closed firewall, an enrolled client, and a third host; no Tariq server runs yet."""
    with Lab() as lab:
        server, client, other = lab.host("server", 10), lab.host("client", 20), lab.host("other", 30)
        for host in server, client, other:  # what a kernel says of itself now and then would count as a packet sent
            host.run("sysctl", "-qw", "net.ipv6.conf.all.router_solicitations=0", "net.ipv6.conf.eth0.router_solicitations=0")
        server.drop_policy()
        start_sshd(lab, server)
        conf = make_server(lab, server)
        client_conf = make_client(lab, client, server, conf, allow=("O *", "C *", "E echo *"))
        text = client_conf.read_text()
        section = text[text.index("[box]"):]
        client_conf.write_text(f"{text}\n{section.replace('[box]', '[box6]').replace(server.ip, server.ip6)}")
        yield SimpleNamespace(lab=lab, server=server, client=client, other=other, conf=conf, client_conf=client_conf)


def variant(place, **settings):
    """The server's config with other settings; returns its path."""
    path = place.conf.with_name(f"tariq-{next(place.lab.count)}.conf")
    path.touch(0o600)
    path.write_text(with_settings(place.conf, settings))
    return path


@contextlib.contextmanager
def serving(place, prefix=(), ready="listening on", **settings):
    """A server meanwhile. However the test treated it: no traceback, and a clean end where it still runs."""
    server = Server(place.lab, place.server, variant(place, **settings), prefix=prefix)
    try:
        yield server.wait_log(ready)
        if server.process.poll() is None:
            assert server.stop() == 0
            assert place.server.rules() == place.server.rules(ip6=True) == []
        assert "Traceback" not in server.log
    except BaseException:
        print(server.log, file=sys.stderr)
        raise
    finally:
        server.kill()


def attempt(place, *words, transport="kernel", host="box", timeout=10, prefix=(), by=None):
    """Knock: kernel transport as nobody, crafted as root. Returns the finished process."""
    return (by or place.client).run(*prefix, *PYTHON, place.lab.dir / "tariq.py", "knock", "-c", place.client_conf, "-t", timeout,
                                   "--transport", transport, host, *words, check=False, env=HARMLESS,
                                   user=NOBODY if transport == "kernel" else None)


def opens(place, *words, **options):
    """Knock, insist that it worked, return what was printed."""
    words = words or ("O", "22")
    done = attempt(place, *words, **options)
    assert done.returncode == 0, f"{words}: exit {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descriptors(pid):
    """{number: what it is} of a process's open files."""
    links = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
    return links


def rmem(pid):
    """Bytes that wait in the packet sockets of a process, one number a socket."""
    inodes = {link[8:-1] for link in descriptors(pid).values() if link.startswith("socket:")}
    rows = [line.split() for line in Path(f"/proc/{pid}/net/packet").read_text().splitlines()[1:]]
    return [int(row[6]) for row in rows if row[8] in inodes]


@contextlib.contextmanager
def captured(host, *words):
    """What tcpdump sees on a host's eth0 meanwhile: a list of (time, frame), complete at the end."""
    packets, path = [], host.lab.dir / f"capture-{next(host.lab.count)}.pcap"
    process = host.popen("tcpdump", "-i", "eth0", "-n", "-U", "--immediate-mode", "-B", "65536", "-Z", "root", "-w", path, *words,
                         stderr=subprocess.PIPE)
    assert "listening on" in process.stderr.readline()
    try:
        yield packets
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
    data, at = path.read_bytes(), 24
    while at < len(data):
        seconds, micros, size, _ = struct.unpack_from("<IIII", data, at)
        packets.append((seconds + micros / 1e6, data[at + 16:at + 16 + size]))
        at += 16 + size


def connection_times(address):
    """A program that tries an SSH connection each 50 ms until argv[1], and prints when and with what success."""
    return ("import socket, sys, time\n"
            "while time.time() < float(sys.argv[1]):\n"
            "    start = time.time()\n"
            "    try:\n"
            f"        with socket.create_connection(({address!r}, 22), 0.2) as sock:\n"
            "            good = sock.recv(4) == b'SSH-'\n"
            "    except OSError:\n"
            "        good = False\n"
            "    print(start, time.time(), int(good), flush=True)\n"
            "    time.sleep(0.05)\n")


HOLD = """
import socket, sys
sock = socket.create_connection((sys.argv[1], 22), 2)
print(sock.recv(100), flush=True)
sys.stdin.readline()
sock.settimeout(5)
sock.sendall(b"SSH-2.0-held\\r\\n")
print(len(sock.recv(4096)), flush=True)  # the key exchange's first message
"""


@contextlib.contextmanager
def held_connection(place):
    """A connection made now; at the end, data goes both ways over it."""
    process = place.client.popen(sys.executable, "-c", HOLD, place.server.ip, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert "SSH-" in process.stdout.readline()
    yield
    assert not place.client.connects(place.server.ip), "the door is still open: the connection outlives nothing"
    process.stdin.write("\n")
    process.stdin.flush()
    assert int(process.stdout.readline()) > 100


def deadline_of(printed):
    """'opened ... until 08:24:33Z' -> seconds since the epoch."""
    today = time.strftime("%Y-%m-%d", time.gmtime())
    stamp = time.strptime(f"{today} {re.search(r'until ([0-9:]+)Z', printed)[1]} UTC", "%Y-%m-%d %H:%M:%S %Z")
    import calendar
    return calendar.timegm(stamp)


# ---- the network never talks to root (DESIGN 1.3) --------------------------------------------------------------------

@needs_root
def test_the_listener_holds_no_privilege_and_one_packet_socket(place):
    with serving(place) as server:
        opens(place, "E", "echo", "warm")  # what a knock leaves behind counts too
        owner, pid = pwd.getpwnam("tariq"), server.listener
        assert eventually(lambda: not Path(f"/proc/{pid}/task/{pid}/children").read_text())
        for thread in Path(f"/proc/{pid}/task").iterdir():  # credentials are each thread's own
            status = dict(line.split(":\t") for line in (thread / "status").read_text().splitlines() if ":\t" in line)
            assert status["Uid"].split() == [str(owner.pw_uid)] * 4 and owner.pw_uid != 0
            assert status["Gid"].split() == [str(owner.pw_gid)] * 4 and owner.pw_gid != 0
            assert status["Groups"].split() == []
            assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
            assert status["NoNewPrivs"] == "1"
        links = descriptors(pid)
        extra = sorted(link for fd, link in links.items() if fd > 2)
        assert len(extra) == 2 and all(link.startswith("socket:") for link in extra), links
        assert len(rmem(pid)) == 1, "one of them is a packet socket"
        unix = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()]
        ours = [row for row in unix if f"socket:[{row[6]}]" in extra]
        assert len(ours) == 1 and len(ours[0]) == 7, "the other is a nameless end of a socketpair"


@needs_root
def test_the_listeners_user_reaches_nothing_of_roots(place):
    with serving(place) as server:
        opens(place)
        user, monitor = pwd.getpwnam("tariq").pw_uid, server.process.pid
        for argv in (["cat", server.conf], ["cat", "/etc/shadow"], ["touch", server.conf.with_name("new")],
                     ["touch", "-c", place.lab.dir / "tariq.py"], ["iptables", "-n", "-L", "tariq"],
                     ["iptables", "-A", "tariq", "-j", "ACCEPT"], ["nft", "list", "ruleset"], ["kill", "-0", monitor],
                     ["cat", f"/proc/{monitor}/environ"], ["ls", f"/proc/{monitor}/fd"], ["ls", f"/proc/{server.listener}/fd"],
                     ["ip", "link", "set", "eth0", "promisc", "on"]):
            locked_up = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", *argv]
            assert place.server.run(*locked_up, user=user, check=False).returncode != 0, argv
        assert place.server.run("cat", server.conf).stdout and len(place.server.rules()) == 1  # the tests' own test


@needs_root
def test_no_socket_listens_and_the_interface_is_not_promiscuous(place):
    def listening():
        return sorted(re.sub(r"\s+", " ", line) for line in place.server.run("ss", "-H", "-lntu").stdout.splitlines())

    before = listening()
    assert len(before) == 2, "sshd, IPv4 and IPv6"
    with serving(place) as server:
        opens(place)
        assert listening() == before
        ours = [f"pid={pid}," for pid in (server.process.pid, server.listener)]
        lines = place.server.run("ss", "-H", "-l", "-n", "-p").stdout.splitlines()
        kinds = {line.split()[0] for line in lines if any(pid in line for pid in ours)}
        assert kinds <= {"p_raw", "p_dgr"}, kinds
        link = place.server.run("ip", "-d", "link", "show", "eth0").stdout
        assert "PROMISC" not in link and "promiscuity 0" in link


@needs_root
def test_a_killed_listener_closes_every_door_and_ends_the_server(place):
    with serving(place) as server:
        opens(place), opens(place, host="box6")
        assert place.server.rules() and place.server.rules(ip6=True)
        os.kill(server.listener, signal.SIGKILL)
        assert server.process.wait(5) == DIED
        assert place.server.rules() == place.server.rules(ip6=True) == []
        assert "listener died" in server.log
        assert not place.client.connects(place.server.ip)


# ---- nothing stays open by accident (DESIGN 1.5) ---------------------------------------------------------------------

@needs_root
@pytest.mark.parametrize("killed", ["monitor", "both processes"])
def test_doors_close_at_their_deadline_to_the_second_when_killed(place, killed):
    with serving(place, open_timeout=3) as server:
        listener = server.listener
        with concurrent.futures.ThreadPoolExecutor() as pool:
            printed = list(pool.map(lambda host: opens(place, host=host), ["box", "box6"]))
            if killed != "monitor":
                os.kill(listener, signal.SIGSTOP)  # so that it cannot mend anything between the two signals
            server.process.kill()
            server.process.wait()
            if killed != "monitor":
                os.kill(listener, signal.SIGKILL)
            assert eventually(lambda: not alive(listener), 1), "the listener outlives the monitor"
            deadlines = [deadline_of(text) for text in printed]
            with held_connection(place):
                probes = [place.client.popen(sys.executable, "-c", connection_times(address), deadline + 1.9, stdout=subprocess.PIPE)
                          for address, deadline in zip((place.server.ip, place.server.ip6), deadlines)]
                outputs = [probe.communicate(timeout=20)[0] for probe in probes]
        for output, deadline in zip(outputs, deadlines):
            tries = [tuple(map(float, line.split())) for line in output.splitlines()]
            before = [good for _, end, good in tries if end < deadline + 0.95]  # a rule holds to the end of its last second
            after = [good for start, _, good in tries if start > deadline + 1.05]
            assert len(before) > 10 and all(before), (deadline, tries)
            assert len(after) >= 2 and not any(after), (deadline, tries)
        assert place.server.rules() and place.server.rules(ip6=True), "the rules are there still: it was the kernel that closed"


@needs_root
def test_a_restart_begins_with_an_empty_chain(place):
    with serving(place, open_timeout=3600) as server:
        opens(place), opens(place, host="box6")
        os.kill(server.listener, signal.SIGSTOP)
        listener = server.listener
        server.process.kill()
        server.process.wait()
        os.kill(listener, signal.SIGKILL)
        assert place.client.connects(place.server.ip) and place.client.connects(place.server.ip6)
    with serving(place):
        assert place.server.rules() == place.server.rules(ip6=True) == []
        assert not place.client.connects(place.server.ip) and not place.client.connects(place.server.ip6)


@needs_root
def test_without_open_timeout_a_door_stays_until_closed_and_its_connections_outlive_it(place):
    with serving(place, open_timeout=0):
        assert "until closed" in opens(place)
        assert "--datestop 2038-01-19T03:14:07" in place.server.rules()[0]
        time.sleep(2)  # the monitor looks for expired doors each second
        with held_connection(place):
            assert "closed tcp/22" in opens(place, "C", "22")
            assert place.server.rules() == []


# ---- loss and disorder -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def far(place):
    """Three clients behind a router that drops every fifth packet, each way."""
    lab, router = place.lab, place.lab.host("router", 1)
    clients = [Host(lab, f"far{number}", 2, prefix=f"10.9.{number}") for number in range(3)]
    for number, client in enumerate(clients):
        port = f"eth{number + 1}"
        sh("ip", "link", "add", port, "netns", router.netns, "type", "veth", "peer", "name", "eth0", "netns", client.netns)
        for host, interface, address in (router, port, f"10.9.{number}.1/24"), (client, "eth0", f"{client.ip}/24"):
            sh("ip", "-n", host.netns, "addr", "add", address, "dev", interface)
            sh("ip", "-n", host.netns, "link", "set", interface, "up")
        sh("ip", "-n", client.netns, "route", "add", "default", "via", f"10.9.{number}.1")
    sh("ip", "-n", place.server.netns, "route", "add", "10.9.0.0/16", "via", router.ip)
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    for side in "-i", "-o":
        router.run("iptables", "-A", "FORWARD", side, "eth0", "-m", "statistic", "--mode", "random", "--probability", "0.2", "-j", "DROP")
    yield clients, router
    sh("ip", "-n", place.server.netns, "route", "del", "10.9.0.0/16", check=False)  # an interface that went took it along


@needs_root
@pytest.mark.parametrize("transport, first", [("kernel", 2000), ("crafted", 3000)])
def test_knocks_get_through_where_a_fifth_of_all_packets_is_lost_each_way(place, far, transport, first):
    clients, router = far
    router.run("iptables", "-Z", "FORWARD")

    def one(port):
        start = time.monotonic()
        done = attempt(place, "O", port, transport=transport, by=clients[port % len(clients)])
        return port, done.returncode, time.monotonic() - start, done.stderr

    ports = range(first, first + 50)  # a port for each knock: its rule tells whose it is
    with serving(place) as server, concurrent.futures.ThreadPoolExecutor(12) as pool:
        results = list(pool.map(one, ports))
        drops = [int(line.split()[0]) for line in router.run("iptables", "-nvxL", "FORWARD").stdout.splitlines() if "DROP" in line]
        assert len(drops) == 2 and min(drops) > 8, f"the network lost too little to prove anything: {drops}"
        good = {port for port, status, seconds, _ in results if status == 0 and seconds < 10}
        assert len(good) >= 48, [result for result in results if result[0] not in good]
        rules = [(int(re.search(r"--dport (\d+)", rule)[1]), re.search(r"-s (\S+)/32 ", rule)[1]) for rule in place.server.rules()]
        opened = {port for port, _ in rules}
        assert len(rules) == len(opened), "a door has two rules"
        assert all(address == clients[port % len(clients)].ip for port, address in rules)
        assert good <= opened <= set(ports)  # a knock whose client gave up may have opened its door: nothing else may
        for port in ports:
            assert server.log.count(f"O {port}/tcp: opened") == (port in opened), "a repeated answer opened twice"


@needs_root
@pytest.mark.parametrize("lost", ["first fragment", "last fragment", "challenge", "answer", "result"])
def test_a_knock_survives_the_loss_of_any_one_packet(place, far, lost):
    clients, router = far
    ports = re.search(r"(?m)^secret_ports = (.*)", place.conf.read_text())[1].replace(" ", "").split(",")

    def one(client, transport):
        away, back = ["-s", client.ip, "-p", "tcp"], ["-d", client.ip, "-p", "tcp"]
        rule = {"first fragment": [*away, "--syn", "--dport", ports[0]], "last fragment": [*away, "--syn", "--dport", ports[-1]],
                "challenge": [*back, "--tcp-flags", "SYN,ACK", "SYN,ACK"], "result": [*back, "--tcp-flags", "SYN", "NONE"],
                "answer": [*away, "--tcp-flags", "SYN,RST,ACK", "ACK", "-m", "length", "--length", "100:"]}[lost]
        rule += ["-m", "statistic", "--mode", "nth", "--every", "100000", "--packet", "0", "-j", "DROP"]
        router.run("iptables", "-w", "-I", "FORWARD", *rule)
        try:
            return transport, attempt(place, "O", "22", transport=transport, by=client)
        finally:
            counters = router.run("iptables", "-w", "-nvxL", "FORWARD").stdout
            router.run("iptables", "-w", "-D", "FORWARD", *rule)
            assert [line.split()[0] for line in counters.splitlines() if client.ip in line and "100000" in line] == ["1"], counters

    with serving(place) as server:
        for side in "-i", "-o":  # no other losses
            router.run("iptables", "-I", "FORWARD", side, "eth0", "-j", "ACCEPT")
        try:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                for transport, done in pool.map(one, clients, ("kernel", "crafted")):
                    assert done.returncode == 0, f"{transport}: {done.stderr}"
        finally:
            for side in "-i", "-o":
                router.run("iptables", "-D", "FORWARD", side, "eth0", "-j", "ACCEPT")
        assert server.log.count(": opened") == len(place.server.rules()) == 2, "something happened twice"


@needs_root
def test_repeats_come_at_growing_intervals_that_no_two_knocks_share(place):
    """Four knocks at an address where nobody is: the clients' repeats are all that drives them."""
    silent = place.lab.host("silent", 77)
    for program in "iptables", "ip6tables":
        silent.run(program, "-A", "INPUT", "-p", "tcp", "-j", "DROP")
    text = place.client_conf.read_text()
    section = text[text.index("[box]"):text.index("[box6]")]
    if "[silent]" not in text:
        place.client_conf.write_text(text + "\n".join(
            f"\n{section.replace('[box]', f'[{name}]').replace(place.server.ip, address)}"
            for name, address in (("silent", silent.ip), ("silent6", silent.ip6))))
    first = int(re.search(r"secret_ports = (\d+)", section)[1])
    with captured(silent, "tcp", "dst", "port", first) as packets, concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(attempt, place, "O", "22", host=host, transport=transport, timeout=4, by=by)
                for by in (place.client, place.other) for host, transport in (("silent", "kernel"), ("silent6", "crafted"))]
        assert [run.result().returncode for run in runs] == [NO_ANSWER] * 4
    starts = {}
    for stamp, frame in packets:
        source = frame[26:30] if frame[12:14] == b"\x08\x00" else frame[22:38]
        starts.setdefault(source, []).append(stamp)
    assert len(starts) == 4
    intervals = [[later - earlier for earlier, later in zip(times, times[1:])] for times in starts.values()]
    for waits in intervals:
        assert 5 <= len(waits) <= 20, waits
        assert sum(waits[-2:]) > 1.2 * sum(waits[:2]), f"the waits do not grow: {waits}"
    for turn in range(3):  # without jitter, they differ by what the scheduler does: a few milliseconds
        waits = [waits[turn] for waits in intervals]
        assert max(waits) - min(waits) > 0.015, f"the waits are not jittered: {waits}"


# ---- replays -----------------------------------------------------------------------------------------------------------

REPLAY = """
import socket, sys
frames = [bytes.fromhex(line) for line in sys.stdin]
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sock.bind(("eth0", 0))
for number in range(int(sys.argv[1])):
    sock.send(frames[number % len(frames)])
"""
SHIFTED = """
import os, runpy, sys, time
clock, path, sys.argv, read_at, shift = time.time, sys.argv[1], sys.argv[4:], 0, 0
def time_now():
    global read_at, shift
    if time.monotonic() > read_at + 0.05:
        with open(path) as file:
            read_at, shift = time.monotonic(), float(file.read())
    return clock() + shift
time.time = time_now
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Shift:
    """A clock for processes started with `prefix`: the machine's, and some seconds more."""

    def __init__(self, lab):
        self.path = lab.dir / f"clock-{next(lab.count)}"
        self.set(0)
        self.prefix = (sys.executable, "-I", "-c", SHIFTED, self.path)

    def set(self, seconds):
        new = self.path.with_suffix(".new")
        new.write_text(str(seconds))
        new.chmod(0o644)
        new.replace(self.path)  # at once: a reader sees the old or the new


def replay(host, server, frames, times):
    """Send a list of frames again and again from a host, no faster than the listener takes them."""
    data, left = "".join(frame.hex() + "\n" for frame in frames), times
    while left > 0:
        host.run(sys.executable, "-c", REPLAY, min(left, 20_000), input=data, stdin=None)
        assert eventually(lambda: rmem(server.listener) == [0], 30), "the listener does not keep up"
        left -= 20_000


def real_exchange(place):
    """Frames of one knock, as somebody on the path records them: [fragments], [answer and what else the client sent]."""
    with captured(place.server, "-Q", "in", "ip", "and", "tcp", "and", "not", "port", "22") as packets:
        opens(place)
    loud = [frame for _, frame in packets if len(frame) > 14 + 20 + 40]
    fragments = [frame for frame in loud if frame[14 + 20 + 13] & 2]
    rest = [frame for _, frame in packets if not frame[14 + 20 + 13] & 2]
    assert len(fragments) >= 5 and any(frame in loud for frame in rest)
    return fragments, rest


@contextlib.contextmanager
def nothing_happens(place, server, prefix=()):
    """Asserts: meanwhile the server starts no program, sends no packet, changes no rule, writes no line; then a knock works."""
    trace = place.lab.dir / f"trace-{next(place.lab.count)}"
    strace = subprocess.Popen(["strace", "-f", "-qq", "-e", "trace=execve", "-e", "signal=none", "-o", trace,
                               "-p", str(server.process.pid), "-p", str(server.listener)], stderr=subprocess.PIPE)
    try:
        for pid in server.process.pid, server.listener:
            assert eventually(lambda: "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text()), "strace did not attach"
        rules, log = (place.server.rules(), place.server.rules(ip6=True)), server.log
        with captured(place.server, "-Q", "out", "ip", "or", "(ip6 and not icmp6)") as packets:
            yield
            time.sleep(0.5)  # gpg takes 10 ms
        assert trace.read_text() == "" and packets == []
        assert (place.server.rules(), place.server.rules(ip6=True)) == rules
        assert server.log == log
        opens(place, "E", "echo", "still there", prefix=prefix)  # and the measuring measures
        assert trace.read_text().count("gpg") >= 3 and trace.read_text().count("execve(") >= 4
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(10)
        strace.stderr.close()


@needs_root
def test_100000_replayed_packets_inside_the_window_start_no_gpg_and_get_no_packet(place):
    with serving(place) as server:
        fragments, rest = real_exchange(place)
        from_another = [from_address(frame, place.other.ip) for frame in fragments + rest]
        with nothing_happens(place, server):
            replay(place.client, server, fragments + rest, len(fragments + rest))  # the whole exchange, in its order, once
            replay(place.other, server, from_another, len(from_another))
            replay(place.client, server, fragments, 50_000)
            replay(place.other, server, from_another[:len(fragments)], 50_000)


@needs_root
def test_a_restart_makes_no_recorded_knock_new(place):
    with serving(place):
        fragments, rest = real_exchange(place)
    with serving(place) as server, nothing_happens(place, server):  # inside the window still
        replay(place.client, server, fragments + rest, len(fragments + rest))


@needs_root
def test_100000_replayed_packets_after_the_window_start_no_gpg_and_get_no_packet(place):
    with serving(place):
        fragments, rest = real_exchange(place)
    shift = Shift(place.lab)
    shift.set(4 * 60)  # another server, four minutes later: nothing but the frames' own age can tell it that they are old
    with serving(place, prefix=shift.prefix) as server:
        from_another = [from_address(frame, place.other.ip) for frame in fragments + rest]
        shown = attempt(place, "O", "22", timeout=2)
        assert shown.returncode == NO_ANSWER, "the server's clock is not where it should be"
        with nothing_happens(place, server, shift.prefix):
            replay(place.client, server, fragments + rest, len(fragments + rest))
            replay(place.other, server, from_another, len(from_another))
            replay(place.client, server, fragments, 50_000)
            replay(place.other, server, from_another[:len(fragments)], 50_000)


# ---- faults ------------------------------------------------------------------------------------------------------------

class Fakes:
    """gpg, iptables and ip6tables of the server alone, in a mount namespace of its own: as they are, until told to fail."""

    SCRIPT = r"""#!/bin/sh
case $(cat "{flag}") in
{name}-hangs) exec sleep 60;;
{name}-dies) kill -KILL $$;;
{name}-junk) head -c 3000 /dev/urandom | tee /dev/stderr; exit 0;;
{name}-lies) status=$(echo "$*" | sed 's/.*--status-fd \([0-9]*\).*/\1/')
    printf '[GNUPG:] \n[GNUPG:] VALIDSIG\n[GNUPG:] NEWSIG \377\n' >/dev/fd/$status; exit 0;;
{name}-fails) echo "{name}: a fault made by the tests" >&2; exit 4;;
esac
exec {real} "$@"
"""

    def __init__(self, lab, **programs):
        self.dir = lab.dir / f"fakes-{next(lab.count)}"
        self.dir.mkdir()
        self.flag = self.dir / "flag"
        self.works()
        for name, real in (programs or {"gpg": "/usr/bin/gpg", "iptables": "/usr/sbin/iptables", "ip6tables": "/usr/sbin/ip6tables"}).items():
            (self.dir / name).write_text(self.SCRIPT.format(name=name, real=real, flag=self.flag))
            (self.dir / name).chmod(0o755)
        # the first place where the server looks for programs
        self.prefix = ("sh", "-c", 'mount --bind "$0" /usr/local/sbin && exec "$@"', self.dir)

    def fault(self, name):
        self.flag.write_text(name)

    def works(self):
        self.fault("none")


def agent_of(place):
    """The pid of the gpg-agent of the server's keyring."""
    home = str(place.conf.parent / ".server-gpg").encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"gpg-agent") and home in path.read_bytes() and alive(path.parent.name):
                return int(path.parent.name)
    return None


@needs_root
@pytest.mark.parametrize("fault, words", [("gpg-dies", "gpg was killed"), ("gpg-junk", "knock refused: not one encrypted message"),
                                          ("gpg-lies", "knock refused: not one encrypted message"),
                                          ("gpg-fails", "gpg: a fault made by the tests")])
def test_a_knock_fails_when_gpg_fails_and_the_next_one_works(place, fault, words):
    fakes = Fakes(place.lab)
    with serving(place, fakes.prefix) as server:
        fakes.fault(fault)
        assert attempt(place, "O", "22", timeout=1).returncode == NO_ANSWER
        assert words in server.log
        assert place.server.rules() == []
        fakes.works()
        opens(place)


@needs_root
def test_a_gpg_that_hangs_stops_neither_the_next_knock_nor_the_server(place):
    fakes = Fakes(place.lab)
    with serving(place, fakes.prefix) as server:
        fakes.fault("gpg-hangs")
        assert attempt(place, "O", "22", timeout=1).returncode == NO_ANSWER
        fakes.works()
        opens(place, "O", "23", timeout=3)
        server.wait_log("gpg was killed", timeout=15)
        opens(place)
        assert len(place.server.rules()) == 2


@needs_root
def test_a_gpg_agent_killed_in_mid_exchange_spoils_no_later_knock(place):
    with serving(place) as server:
        opens(place, "O", "23")
        agent = agent_of(place)
        os.kill(agent, signal.SIGSTOP)  # gpg waits for it now, so that it dies in the middle for sure
        knocking = place.client.popen(*PYTHON, place.lab.dir / "tariq.py", "knock", "-c", place.client_conf, "box", "O", "24",
                                     user=NOBODY, env=HARMLESS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert eventually(lambda: "gpg" in sh("ps", "-o", "args=", "--ppid", server.listener, check=False).stdout)
        time.sleep(0.1)
        os.kill(agent, signal.SIGKILL)
        printed, errors = knocking.communicate(timeout=30)
        assert knocking.returncode == 0 and "opened tcp/24" in printed, errors
        assert agent_of(place) not in (None, agent)

        def kill_agent():
            with contextlib.suppress(ProcessLookupError, TypeError):  # there is none at this moment
                os.kill(agent_of(place), signal.SIGKILL)

        statuses = set()
        for delay in range(30, 130, 10):  # milliseconds: at every point of an exchange
            timer = threading.Timer(delay / 1000, kill_agent)
            timer.start()
            statuses.add(attempt(place, "C", "23", timeout=2).returncode)
            timer.join()
        assert statuses <= {0, NO_ANSWER}
        if NO_ANSWER in statuses:
            assert eventually(lambda: re.search("^<4>.*knock refused: .*gpg", server.log, re.M), 12), "no line says what failed"
        opens(place)
        assert {re.search(r"--dport (\d+)", rule)[1] for rule in place.server.rules()} - {"23"} == {"24", "22"}


@needs_root
def test_when_iptables_fails_the_client_is_told_why_and_doors_close_all_the_same(place):
    fakes = Fakes(place.lab)
    with serving(place, fakes.prefix, open_timeout=2) as server:
        fakes.fault("iptables-fails")
        refused = attempt(place, "O", "22")
        assert refused.returncode == SYSTEM and "a fault made by the tests" in refused.stderr
        assert place.server.rules() == []
        fakes.works()
        deadline = deadline_of(opens(place))
        fakes.fault("iptables-fails")
        assert eventually(lambda: re.search("^<3>.*22/tcp.*a fault made by the tests", server.log, re.M), 8)
        assert attempt(place, "C", "22").returncode == SYSTEM
        assert place.server.rules(), "the fault is no fault"
        time.sleep(max(0, deadline + 1.05 - time.time()))
        assert not place.client.connects(place.server.ip), "the kernel did not close the door"
        fakes.works()
        assert eventually(lambda: place.server.rules() == [])
        opens(place)
        time.sleep(1)  # so that the next rule is another one
        opens(place)
        assert len(place.server.rules()) == 1, "opened again, a door has two rules"


@needs_root
def test_a_held_iptables_lock_delays_a_knock_or_fails_it_and_passes(place):
    """iptables-legacy: the one with a lock. The real one, held by flock(1)."""
    fakes = Fakes(place.lab, iptables="/usr/sbin/iptables-legacy", ip6tables="/usr/sbin/ip6tables-legacy")

    def rules():
        return [line for line in place.server.run("iptables-legacy", "-S", "tariq").stdout.splitlines() if line.startswith("-A")]

    def hold_lock():
        holder = place.server.popen("flock", "/run/xtables.lock", "sh", "-c", "echo held; read line", stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE)
        assert holder.stdout.readline() == "held\n"
        return holder

    with serving(place, fakes.prefix) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        holder = hold_lock()
        waiting = pool.submit(opens, place)
        server.wait_log("--dport 22")
        time.sleep(1)
        assert not waiting.done()
        holder.communicate("\n")
        waiting.result()
        holder = hold_lock()
        failed = attempt(place, "O", "23")
        holder.communicate("\n")
        assert failed.returncode == SYSTEM and "lock" in failed.stderr
        opens(place, "O", "24")
        assert sorted(re.search(r"--dport (\d+)", rule)[1] for rule in rules()) == ["22", "24"]
    assert rules() == []
    for program in "iptables-legacy", "ip6tables-legacy":
        place.server.run(program, "-F"), place.server.run(program, "-X")


@needs_root
def test_a_full_disk_below_the_keyring_fails_no_later_knock(place):
    disk = place.lab.dir / f"disk-{next(place.lab.count)}"
    disk.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=200,mode=755", "tmpfs", disk)
    try:
        home = disk / "gpg"
        sh("cp", "-a", place.conf.parent / ".server-gpg", home)
        for stale in home.glob("S.*"):
            stale.unlink()
        with serving(place, server_gpg_dir=home) as server:
            with contextlib.suppress(OSError):
                with open(disk / "fill", "wb", 0) as file:
                    while True:
                        file.write(bytes(4096))
            assert os.statvfs(disk).f_bavail == 0
            full = attempt(place, "O", "22", timeout=3)
            assert full.returncode in (0, NO_ANSWER)
            if full.returncode:
                assert re.search("^<[34]>.*No space left on device", server.log, re.M), "no line says what is wrong"
            (disk / "fill").unlink()
            opens(place, "O", "23")
    finally:
        sh("gpgconf", "--homedir", home, "--kill", "gpg-agent", check=False)
        sh("umount", "-l", disk)


@needs_root
def test_a_full_disk_behind_the_log_keeps_no_door_from_opening_or_closing(place):
    prefix = ("sh", "-c", 'exec "$@" 2>/dev/full', "sh")
    with serving(place, prefix, ready="", open_timeout=2) as server:
        deadline = deadline_of(opens(place))
        assert eventually(lambda: not place.server.rules(), 5) and time.time() >= deadline
        opens(place), opens(place, "C", "22")
        assert server.log == ""


@needs_root
def test_the_interface_may_go_down_and_come_back(place):
    with serving(place) as server:
        opens(place, "O", "23")
        sh("ip", "-n", place.server.netns, "link", "set", "eth0", "down")
        server.wait_log("until it is up again")
        sh("ip", "-n", place.server.netns, "link", "set", "eth0", "up")
        sh("ip", "-n", place.server.netns, "addr", "add", f"{place.server.ip6}/64", "dev", "eth0", "nodad")
        opens(place), opens(place, host="box6")


@needs_root
def test_the_interface_may_appear_after_the_start_and_be_made_anew(place):
    def unplug():
        sh("ip", "-n", place.server.netns, "link", "del", "eth0")

    def plug():
        place.lab.plug(place.server, "eth0", f"{place.server.ip}/24", f"{place.server.ip6}/64")
        for host in place.client, place.other:  # it has a new link address
            sh("ip", "-n", host.netns, "neigh", "flush", "all")

    unplug()
    try:
        with serving(place, ready="waiting for the interface") as server:
            assert "listening on" not in server.log
            plug()
            server.wait_log("listening on")
            opens(place, "O", "23")
            unplug()
            server.wait_log("waiting for the interface", 2)
            time.sleep(1)
            assert server.process.poll() is None
            plug()
            server.wait_log("listening on", 2)
            opens(place), opens(place, host="box6")
            assert len(place.server.rules()) == 2
    finally:
        if "eth0" not in place.server.run("ip", "link").stdout:
            plug()


@needs_root
def test_doors_close_and_knocks_work_again_though_the_clock_jumps(place):
    shift = Shift(place.lab)
    with serving(place, shift.prefix, open_timeout=3) as server:
        deadline = deadline_of(opens(place))
        shift.set(-7200)  # the wall clock says that there are two hours and three seconds left
        assert eventually(lambda: not place.server.rules(), 6) and deadline - 0.5 < time.time() < deadline + 3
        assert attempt(place, "O", "22", timeout=1).returncode == NO_ANSWER
        shift.set(0)
        opens(place)
        shift.set(7200)
        assert attempt(place, "O", "22", timeout=1).returncode == NO_ANSWER
        shift.set(0)
        opens(place)
        assert "knock refused" not in server.log


# ---- what README.md says, done: its own commands, taken from the file and run as written on throwaway machines ----------

README = (HERE / "README.md").read_text()
NAMES = {"box": 10, "laptop": 20, "other": 30, "inside": 40}


def blocks(heading, language="sh"):
    """The code blocks of one language under a heading of the README, in order."""
    found, here, fence = [], False, None
    for line in README.splitlines(keepends=True):
        if line.startswith("```"):
            fence = line.strip("`\n") if fence is None else None
            if here and fence == language:
                found.append("")
        elif fence is None and line.startswith("#"):
            here = line.strip("# \n") == heading
        elif here and fence == language:
            found[-1] += line
    return found


class Machine(Host):
    """A host with file systems of its own: /etc and /usr/local/bin as copies on write, the homes and /run empty. Its
    ordinary user is `me`, who may sudo."""

    def __init__(self, site, name):
        self.pid = None
        super().__init__(site, name, NAMES[name])
        site.hosts[name] = self
        site.plug(self, "eth0", f"{self.ip}/24", f"{self.ip6}/64")
        sh("ip", "-n", self.netns, "route", "add", "default", "via", "198.51.100.1")
        own = site.dir / name
        names = "".join(f"198.51.100.{number} {host} {host}.example.com\\n" for host, number in NAMES.items())
        script = f"""set -e
            mkdir {own}; mount -t tmpfs tmpfs {own}
            for path in /etc /usr/local/bin; do
                mkdir -p {own}/upper$path {own}/work$path
                mount -t overlay overlay -o lowerdir=$path,upperdir={own}/upper$path,workdir={own}/work$path $path
            done
            for path in /home /root /run; do mount -t tmpfs -o mode=755 tmpfs $path; done
            mkdir /run/sshd; rm -rf /etc/tariq; hostname {name}; printf '127.0.0.1 localhost\\n{names}' > /etc/hosts
            sed -i '/^tariq:/d' /etc/passwd /etc/shadow /etc/group /etc/gshadow
            useradd --create-home --shell /bin/bash me; echo 'me ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/me
            cp {site.dir}/tariq.py {site.dir}/tariq.conf.example /home/me/
            echo ready; exec sleep infinity"""
        holder = self.popen("unshare", "--uts", "bash", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = holder.stdout.readline()
        assert said == "ready\n", said + holder.stdout.read()
        self.pid = holder.pid

    def command(self, argv, user=None):
        if self.pid is None:
            return super().command(argv)
        start = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--"]
        if user is not None:
            start += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "env", f"HOME=/home/{user}", f"USER={user}"]
        return [*start, *(str(word) for word in argv)]

    def shell(self, script, user="me", **options):
        """Run a script as its user would type it, in the home directory, up to the first command that fails."""
        return self.run("bash", "-c", f"set -eo pipefail; cd ~; {script}", user=user, **options)

    def serve(self, *prefix, drop=True):
        """The server in the background, as the unit starts it, behind a closed firewall."""
        if drop and "-P INPUT DROP" not in self.run("iptables", "-S", "INPUT").stdout:
            self.drop_policy()
        return Server(self.lab, self, "/etc/tariq/tariq.conf", prefix=prefix, command=["tariq.py"]).wait_log("listening on")

    def sshd(self):
        """A real sshd, with the system's configuration."""
        self.run("ssh-keygen", "-A")
        self.popen("/usr/sbin/sshd", "-D", stderr=subprocess.DEVNULL)
        wait_for(lambda: self.connects("127.0.0.1"), "sshd does not come up")

    def open_to(self, client, user="root"):
        """Let a client's `me` log in here with a key."""
        client.shell("mkdir -p -m 700 ~/.ssh; test -e ~/.ssh/id_ed25519 || ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519;"
                     "printf 'StrictHostKeyChecking accept-new\\nConnectTimeout 1\\nLogLevel ERROR\\n' > ~/.ssh/config")
        key = client.shell("cat ~/.ssh/id_ed25519.pub").stdout
        self.shell("mkdir -p -m 700 ~/.ssh; cat >> ~/.ssh/authorized_keys; chmod 600 ~/.ssh/authorized_keys", user=None if user == "root"
                   else user, input=key, stdin=None, env={**os.environ, "HOME": "/root"})


@pytest.fixture
def site():
    with Lab() as site:
        yield site


@pytest.fixture
def remote(site):
    """A server, set up by the README's commands."""
    remote = Machine(site, "box")
    set_up(remote)
    return remote


@pytest.fixture
def laptop(site):
    """A client with tariq.py in place; not enrolled."""
    laptop = Machine(site, "laptop")
    set_up(laptop)
    return laptop


def set_up(machine):
    """Step 1 of the README on a server; of it, only the installation on a client. Packages are there already."""
    apt, install, init = blocks("1. The server")[0].splitlines()
    assert apt.startswith("sudo apt-get install")
    machine.shell(f"{install}\n{init if machine.name == 'box' else ''}")


def type_enroll(remote, laptop):
    """Step 2 of the README: the line that enrols a client, through a real ssh."""
    remote.sshd()
    remote.open_to(laptop)
    return laptop.shell(blocks("2. A client")[0])


def type_knock(client, *words, check=True, **options):
    options_of_knock, words = (words[:2], words[2:]) if words[0] == "-t" else (("-t", "4"), words)
    return client.run("tariq.py", "knock", *options_of_knock, "box.example.com", *words, user="me", check=check, **options)


def ssh(client, *words, to="me@box.example.com"):
    """Whether a log-in by ssh works."""
    return client.shell(f"ssh {to} {' '.join(words) or 'true'}", check=False).returncode == 0


def reload_line(server):
    """How the README reloads a server without systemd."""
    return re.search("`(sudo kill -HUP PID)`", README)[1].replace("PID", str(server.process.pid))


# ---- set-up ----------------------------------------------------------------------------------------------------------

@needs_root
def test_the_three_steps_of_set_up_lead_to_a_hidden_ssh(site, remote, laptop):
    """Set-up, enrolment over a real ssh, first knock, firewall: as typed. The firewall's commands are typed into an ssh
    session, which must outlive each of them."""
    done = type_enroll(remote, laptop)
    server = remote.serve(drop=False)
    assert "iptables: INPUT does not drop" in server.log and "ip6tables: INPUT does not drop" in server.log
    remote.open_to(laptop, user="me")
    fingerprint = remote.shell("gpg --version >/dev/null; sudo grep -o '^[0-9A-F]\\{40\\}' /etc/tariq/tariq.conf").stdout.strip()
    assert fingerprint in done.stderr  # enroll shows whom it trusts, and join too
    assert laptop.shell("grep server_key ~/.config/tariq/tariq.conf").stdout.split()[-1] in done.stderr
    assert "Connection refused" in type_knock(laptop, "-t", "1", "O", "22", check=False).stderr  # as the README warns
    keep, way_back, close, first_knock, call_off, persist = blocks("Firewall")
    assert "netfilter-persistent save" in persist  # the one block that needs the network
    session = laptop.popen("ssh", "me@box.example.com", "bash", user="me", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)

    def type_in(script):
        for line in script.splitlines():
            session.stdin.write(f"{line}; echo done $?\n")
            session.stdin.flush()
            assert select.select([session.stdout], [], [], 5)[0], f"{line}: the session is cut"
            assert session.stdout.readline() == "done 0\n", line

    type_in(keep)
    type_in(way_back.replace("sleep 120", "sleep 2"))
    type_in(close)
    assert not ssh(laptop)
    time.sleep(2)
    assert ssh(laptop), "the way back does not open"
    type_in(way_back.replace("sleep 120", "sleep 4") + close + call_off)
    assert not ssh(laptop)
    assert re.match(r"opened tcp/22 on box.example.com for 198.51.100.20 until \d\d:\d\d:\d\dZ$", laptop.shell(first_knock).stdout)
    assert ssh(laptop)
    other = Machine(site, "other")
    assert not other.connects(remote.ip) and not other.connects(remote.ip6)
    time.sleep(2.5)
    assert "-P INPUT DROP" in remote.run("iptables", "-S", "INPUT").stdout, "the way back was called off"
    laptop.run("ip", "-6", "neigh", "flush", "all")  # neighbours must still find each other
    laptop.shell(f"echo 'host = {remote.ip6}' >> ~/.config/tariq/tariq.conf")
    assert "on box.example.com for 2001:db8:1::20 until" in laptop.run("tariq.py", "knock", "-6", "box.example.com", "O", "22", user="me").stdout
    assert laptop.connects(remote.ip6) and not other.connects(remote.ip6)
    type_in("true")
    assert server.stop() == 0
    assert "INPUT does not drop" not in remote.serve().log


@needs_root
def test_set_up_commands_run_twice_do_no_harm_and_keep_what_people_wrote(site, remote, laptop):
    first = type_enroll(remote, laptop)
    for machine, path in (remote, "/etc/tariq/tariq.conf"), (laptop, "/home/me/.config/tariq/tariq.conf"):
        machine.shell(f"sudo sed -i '1i # mine: first\\n; mine: second' {path}; echo '# mine: last' | sudo tee -a {path}")
    before = remote.shell("sudo cat /etc/tariq/tariq.conf").stdout, laptop.shell("cat ~/.config/tariq/tariq.conf").stdout
    key = laptop.run("tariq.py", "keygen", "me@laptop", user="me").stdout
    remote.shell("sudo tariq.py init")
    again = laptop.shell(blocks("2. A client")[0])
    assert "in [allow] already: nothing changed" in again.stderr and again.stderr.count("wrote") == 0 < first.stderr.count("wrote")
    assert key == laptop.run("tariq.py", "keygen", "me@laptop", user="me").stdout
    assert before == (remote.shell("sudo cat /etc/tariq/tariq.conf").stdout, laptop.shell("cat ~/.config/tariq/tariq.conf").stdout)
    other = Machine(site, "other")  # one more client: what is there stays, word by word
    set_up(other)
    remote.open_to(other)
    other.shell(blocks("2. A client")[0].replace("me@laptop", "you@other"))
    after = remote.shell("sudo cat /etc/tariq/tariq.conf").stdout
    lines = iter(after.splitlines())
    assert all(line in lines for line in before[0].splitlines()) and "you@other" in after
    assert remote.shell("sudo stat -c %a:%U /etc/tariq/tariq.conf").stdout == "600:root\n"
    server = remote.serve()
    assert "2 users" in server.log
    type_knock(laptop, "O", "22")
    type_knock(other, "C", "22")


@needs_root
def test_nothing_secret_is_in_an_argument_or_the_environment_of_the_enrolment(site, remote, laptop):
    """Sampled from /proc while the line runs, on both machines."""
    remote.sshd()
    remote.open_to(laptop)
    secret = remote.shell("sudo grep ^secret /etc/tariq/tariq.conf").stdout
    words = [line.split(" = ")[1].encode() for line in secret.splitlines()]
    line = laptop.popen("bash", "-c", f"cd ~; {blocks('2. A client')[0]}", user="me", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = b""
    while line.poll() is None:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            for name in "cmdline", "environ":
                try:
                    seen += Path(f"/proc/{pid}/{name}").read_bytes()
                except OSError:
                    pass
    assert line.returncode == 0 and b"enroll" in seen
    assert not any(word in seen for word in words)


@needs_root
def test_the_set_up_by_hand_with_gpg_works(site, laptop):
    remote = Machine(site, "box")
    remote.shell(blocks("1. The server")[0].splitlines()[1])
    on_server, on_client, import_client, client_config = blocks("Set-up by hand")
    remote.shell(on_server)
    laptop.shell(on_client)
    remote.shell("cat > me.asc", input=laptop.shell("cat me.asc").stdout, stdin=None)
    laptop.shell("cat > server.asc", input=remote.shell("cat server.asc").stdout, stdin=None)
    remote.shell(import_client)
    ports, secret = (remote.shell(f"sudo sed -n 's/^{key} = //p' /etc/tariq/tariq.conf").stdout.strip() for key in ("secret_ports", "secret"))
    laptop.shell(client_config.replace("PORTS", ports).replace("SECRET", secret))
    server = remote.serve()
    assert "1 users" in server.log and "listener runs as tariq" in server.log and "as root" not in server.log
    assert "opened tcp/22" in type_knock(laptop, "O", "22").stdout
    assert "closed tcp/22" in type_knock(laptop, "C", "22").stdout
    assert type_knock(laptop, "O", "23", check=False).returncode == 77


@needs_root
def test_a_keyring_made_as_root_is_mended_by_the_chown_that_the_server_names(remote):
    remote.shell("sudo gpgconf --homedir /etc/tariq/.server-gpg --kill all; sudo chown -R root: /etc/tariq/.server-gpg")
    server = remote.serve()
    assert "the listener will run as root; to change that: useradd --system tariq; chown -R tariq: /etc/tariq/.server-gpg" in server.log
    server.stop()
    remote.shell(re.search("`(sudo gpgconf .*?; sudo chown -R tariq: /etc.*?)`", README)[1])
    assert "listener runs as tariq" in remote.serve().log


# ---- everyday use ----------------------------------------------------------------------------------------------------

@needs_root
def test_a_removed_client_is_refused_without_a_restart_and_others_stay(site, remote, laptop):
    type_enroll(remote, laptop)
    other = Machine(site, "other")
    set_up(other)
    remote.open_to(other)
    other.shell(blocks("2. A client")[0].replace("me@laptop", "you@other"))
    server = remote.serve()
    assert "opened" in type_knock(laptop, "O", "22").stdout
    fingerprint = laptop.shell("gpg --homedir ~/.config/tariq/gpg --with-colons --fingerprint | grep -m1 ^fpr").stdout.split(":")[9]
    edit, reload, delete = blocks("Removing a client")[0].splitlines()
    assert reload == "sudo systemctl reload tariq"
    remote.shell(f"""printf '#!/bin/sh\nsed -i "/^{fingerprint} =/,/C 22/d" "$1"\n' > editor; chmod +x editor""")
    remote.shell(f"SUDO_EDITOR=~/editor {edit}\n{reload_line(server)}")
    server.wait_log("read again, 1 users")
    refused = type_knock(laptop, "O", "22", check=False)
    assert refused.returncode == 77 and "refused: O 22/tcp: not allowed to" in refused.stderr
    remote.shell(delete.replace("FINGERPRINT", fingerprint))
    assert type_knock(laptop, "-t", "2", "O", "22", check=False).returncode == 75  # unknown now: not even answered
    server.wait_log("198.51.100.20: knock refused: ")
    assert "opened" in type_knock(other, "O", "22").stdout
    assert server.process.poll() is None


@needs_root
def test_a_broken_config_at_reload_keeps_the_old_one_in_force(remote, laptop):
    type_enroll(remote, laptop)
    server = remote.serve()
    for count, breakage in enumerate(("[allow", "someone@else.example.com =\\n    O 22", "[server]\\nsecret = short"), 1):
        remote.shell(f"sudo cp -p /etc/tariq/tariq.conf good; printf '{breakage}\\n' | sudo tee -a /etc/tariq/tariq.conf; {reload_line(server)}")
        server.wait_log("the old config stays in force", count)
        assert "opened" in type_knock(laptop, "O", "22").stdout
        remote.shell("sudo cp -p good /etc/tariq/tariq.conf")
    assert "someone@else.example.com matches 0 keys" in server.log
    remote.shell(reload_line(server))
    server.wait_log("read again, 1 users")
    assert "closed" in type_knock(laptop, "C", "22").stdout


@needs_root
def test_ssh_knocks_by_itself_with_the_recipe(site, remote, laptop):
    type_enroll(remote, laptop)
    remote.open_to(laptop, user="me")
    server = remote.serve()
    assert not ssh(laptop)
    laptop.shell(f"cat >> ~/.ssh/config <<'END'\n{blocks('ssh knocks by itself', 'ssh-config')[0]}END")
    done = laptop.shell("ssh me@box.example.com id -un")
    assert done.stdout == "me\n"  # and nothing of the knock's
    assert "opened tcp/22" in server.log
    assert laptop.shell("echo hello | ssh me@box.example.com cat").stdout == "hello\n"
    assert len(remote.rules()) == 1
    assert not Machine(site, "other").connects(remote.ip)


@needs_root
def test_a_door_opened_again_is_one_rule_and_one_close_closes_it(remote, laptop):
    """Also where both rules are the same, word by word: with open_timeout = 0, or within one second."""
    type_enroll(remote, laptop)
    remote.shell("sudo sed -i '/^.server.$/a open_timeout = 0' /etc/tariq/tariq.conf")
    remote.serve()
    for _ in range(2):
        assert type_knock(laptop, "O", "22").stdout == "opened tcp/22 on box.example.com for 198.51.100.20 until closed\n"
        assert len(remote.rules()) == 1
    assert type_knock(laptop, "C", "22").stdout == "closed tcp/22 on box.example.com for 198.51.100.20\n"
    assert remote.rules() == []


@needs_root
def test_a_door_whose_rule_somebody_else_removed_is_closed_and_opens_again(remote, laptop):
    """As a firewall reload, iptables-restore or the README's way back may do."""
    type_enroll(remote, laptop)
    server = remote.serve()
    for action in "O", "C":
        type_knock(laptop, "O", "22")
        remote.run("iptables", "-F", "tariq")
        assert type_knock(laptop, action, "22", check=False).returncode == 0
    assert remote.rules() == [] and "not closed" not in server.log


@needs_root
def test_an_alias_and_several_servers_in_one_config(remote, laptop):
    type_enroll(remote, laptop)
    remote.serve()
    section = laptop.shell("sed -n '/^.box/,$p' ~/.config/tariq/tariq.conf").stdout.splitlines()
    home = blocks("Several servers", "ini")[0].splitlines()
    assert [line.split(" = ")[0] for line in home if "host" not in line][1:] == [line.split(" = ")[0] for line in section][1:]
    alias = "\n".join([home[0], f"host = {remote.ip6}", *section[1:]])
    laptop.shell("cat >> ~/.config/tariq/tariq.conf", input=f"\n{alias}\n", stdin=None)
    done = laptop.run("tariq.py", "knock", "home", "O", "22", user="me").stdout
    assert done.startswith("opened tcp/22 on home for 2001:db8:1:")
    assert "on box.example.com for 198.51.100.20" in type_knock(laptop, "O", "22").stdout


# ---- keys with a passphrase ------------------------------------------------------------------------------------------

PINENTRY = """#!/bin/bash
# Types the passphrase, and counts how often it was asked to.
echo "OK hello"
while read -r word rest; do
    case $word in
        GETPIN) echo asked >> /home/me/asked; echo "D correct-horse-7"; echo OK;;
        BYE) echo OK; exit;;
        *) echo OK;;
    esac
done
"""


@pytest.fixture(scope="module")
def locked_laptop():
    """An enrolled client whose key got a passphrase by the README's command."""
    with Lab() as site:
        remote, laptop = Machine(site, "box"), Machine(site, "laptop")
        set_up(remote)
        set_up(laptop)
        type_enroll(remote, laptop)
        remote.serve()
        laptop.shell("cat > pinentry; chmod +x pinentry; echo pinentry-program /home/me/pinentry > ~/.config/tariq/gpg/gpg-agent.conf;"
                     "gpgconf --homedir ~/.config/tariq/gpg --kill gpg-agent", input=PINENTRY, stdin=None)
        laptop.shell(blocks("A key with a passphrase")[0])
        yield laptop


@pytest.fixture
def locked(locked_laptop):
    """The same, with a pinentry, and an agent that knows nothing yet."""
    locked_laptop.shell("echo pinentry-program /home/me/pinentry > ~/.config/tariq/gpg/gpg-agent.conf; rm -f asked;"
                        "gpgconf --homedir ~/.config/tariq/gpg --kill gpg-agent")
    return locked_laptop


def without_pinentry(client):
    client.shell("echo pinentry-program /nonexistent > ~/.config/tariq/gpg/gpg-agent.conf; gpgconf --homedir ~/.config/tariq/gpg --kill gpg-agent")


@needs_root
def test_a_passphrase_is_asked_by_pinentry_once_and_then_remembered(locked):
    assert "opened" in type_knock(locked, "O", "22").stdout
    assert locked.shell("cat asked").stdout == "asked\n"
    assert "closed" in type_knock(locked, "C", "22").stdout
    assert locked.shell("cat asked").stdout == "asked\n"


def knock_on_a_terminal(client, types):
    """Knock on a pseudo-terminal where somebody types at the passphrase prompt -> (exit code, all that it showed)."""
    pid, terminal = pty.fork()
    if pid == 0:
        argv = client.command(["tariq.py", "knock", "-t", "4", "box.example.com", "O", "22"], "me")
        os.execvp(argv[0], argv)
    said = b""
    with contextlib.suppress(OSError):  # the terminal's last user is gone
        while data := os.read(terminal, 4096):
            said += data
            if b"passphrase of your" in data:
                os.write(terminal, types)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


@needs_root
def test_a_passphrase_is_asked_once_on_a_terminal_without_pinentry(locked):
    without_pinentry(locked)
    code, said = knock_on_a_terminal(locked, b"correct-horse-7\n")
    assert code == 0 and said.count(b"passphrase of your") == 1 and b"opened tcp/22" in said and b"correct-horse" not in said, said


@needs_root
def test_a_wrong_passphrase_is_one_clear_error(locked):
    without_pinentry(locked)
    code, said = knock_on_a_terminal(locked, b"wrong\n")
    assert code == 65 and b"Bad passphrase" in said and said.count(b"passphrase of your") == 1, said


@needs_root
def test_a_passphrase_without_terminal_or_pinentry_is_a_clear_error(locked):
    without_pinentry(locked)
    done = type_knock(locked, "O", "22", check=False, start_new_session=True)
    assert done.returncode == 71 and "there is neither a pinentry nor a terminal" in done.stderr


# ---- the service -----------------------------------------------------------------------------------------------------

UNIT = blocks("As a service", "ini")[0]


def unit(key):
    return re.search(f"^{key}=(.*)$", UNIT, re.M)[1].split()


def systemd_analyze(remote, *words, check=True):
    remote.shell("sudo tee /etc/systemd/system/tariq.service >/dev/null", input=UNIT, stdin=None)
    try:
        return remote.run("systemd-analyze", *words, check=check)
    except FileNotFoundError:
        pytest.skip("no systemd here")


@needs_root
def test_the_unit_is_valid_and_little_exposed(remote):
    done = systemd_analyze(remote, "verify", "/etc/systemd/system/tariq.service")
    assert "tariq" not in done.stdout + done.stderr
    # 0 to 100; an unhardened service of root has 96. What is left is root itself, its six capabilities and the network.
    systemd_analyze(remote, "security", "--offline=yes", "--threshold=35", "/etc/systemd/system/tariq.service")


@needs_root
def test_server_and_knock_work_in_the_units_sandbox(remote, laptop):
    """What systemd does, done with the kernel's own means: the exact bounding set, no new privileges, a read-only
    system but for ReadWritePaths, no homes, a private /tmp."""
    type_enroll(remote, laptop)
    remote.shell("sudo sed -i 's/^    C 22.*/    C 22\\n    E sh */' /etc/tariq/tariq.conf")
    writable = unit("ReadWritePaths")
    script = f"""set -e
        for path in {' '.join(writable)}; do mount --rbind $path $path; done
        while read -r _ path _; do
            case $path in /proc*|/sys*|/dev*|/tmp|{'|'.join(path + '|' + path + '/*' for path in writable)}) ;;
                *) mount -o remount,bind,ro "$path";; esac
        done < /proc/self/mounts
        for path in /tmp /home /root; do mount -t tmpfs -o mode=1777 tmpfs $path; done
        exec "$@" """
    capabilities = "-all" + "".join(f",+{name.removeprefix('CAP_').lower()}" for name in unit("CapabilityBoundingSet"))
    server = remote.serve("unshare", "--mount", "bash", "-c", script, "bash", "setpriv", "--no-new-privs", f"--bounding-set={capabilities}")
    assert "opened" in type_knock(laptop, "O", "22").stdout and laptop.connects(remote.ip)
    inside = type_knock(laptop, "E", "sh", "-c", "grep -E 'CapBnd|NoNewPrivs' /proc/self/status; touch /etc/x /root/y; id -u", check=False)
    assert "CapBnd:\t00000000000031e0\nNoNewPrivs:\t1\n" in inside.stdout, inside.stdout
    assert "/etc/x': Read-only file system" in inside.stdout and inside.stdout.endswith("0\n")
    server.process.send_signal(1)  # ExecReload
    server.wait_log("read again, 1 users")
    assert "closed" in type_knock(laptop, "C", "22").stdout
    assert server.stop() == 0


@needs_root
def test_the_units_filters_let_through_all_that_the_server_does(site, remote, laptop):
    """Traced: every system call is in the SystemCallFilter, every socket's family in RestrictAddressFamilies."""
    assert unit("SystemCallFilter") == ["@system-service"]
    type_enroll(remote, laptop)
    groups, group = {}, None
    for line in systemd_analyze(remote, "syscall-filter").stdout.splitlines():
        if line.startswith("@"):
            group = groups[line.strip()] = set()
        elif group is not None and line.startswith("    ") and not line.strip().startswith("#"):
            group.add(line.strip())

    def members(name):
        return set().union(*(members(word) for word in groups[name])) if name.startswith("@") else {name}

    trace = site.dir / "trace"
    server = remote.serve("strace", "-f", "-o", trace)
    type_knock(laptop, "O", "22")
    pid = int(Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()[0])  # strace's child
    os.kill(pid, 1)
    server.wait_log("read again")
    type_knock(laptop, "C", "22")
    os.kill(pid, 15)
    server.process.wait(15)
    text = trace.read_text(errors="replace")
    calls = set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed)", text, re.M))
    assert len(calls) > 40 and calls <= members("@system-service") | members("@default"), calls
    assert set(re.findall(r"socket(?:pair)?\((\w+)", text)) <= set(unit("RestrictAddressFamilies"))


# ---- the demo --------------------------------------------------------------------------------------------------------

def run_demo(tmp_path, interrupt_after=None):
    """The demo in a process group of its own, with Ctrl-C or without -> (exit code, output, its process id)."""
    with open(tmp_path / "demo", "w+") as file:
        process = subprocess.Popen([sys.executable, HERE / "test_tariq.py", "demo"], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                   start_new_session=True)
        if interrupt_after:
            end = time.monotonic() + 20
            while interrupt_after not in (tmp_path / "demo").read_text() and time.monotonic() < end:
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
        file.seek(0)
        return code, file.read(), process.pid


def left_over(pid):
    return [name for name in sh("ip", "netns").stdout.split() if name.startswith(f"tq-{pid}-")]


@needs_root
def test_the_demo_shows_what_the_readme_says_in_about_15_seconds(tmp_path):
    began = time.monotonic()
    code, said, pid = run_demo(tmp_path)
    assert code == 0 and time.monotonic() - began < 60, said
    steps = ["ignored states", "exit status 124", "opened tcp/22 on box for 198.51.100.20", "SSH-2.0", "--datestop", "ignored states", "up ",
             "refused: ", "closed tcp/22", "0 came back", "exit status 124"]
    assert all(step in said for step in steps) and said.count("65535 scanned ports") == 2
    at = [said.index(step) for step in steps[2:5] + steps[7:10]]
    assert at == sorted(at)
    assert left_over(pid) == []


@needs_root
@pytest.mark.parametrize("moment", ["Three hosts", "opened tcp/22"])
def test_ctrl_c_in_the_demo_leaves_nothing(tmp_path, moment):
    code, said, pid = run_demo(tmp_path, moment)
    assert code == 130 and "Traceback" not in said and said.endswith("interrupted: all of it is removed\n"), said
    assert left_over(pid) == []


# ---- a gateway -------------------------------------------------------------------------------------------------------

@needs_root
def test_a_gateway_lets_a_knock_through_to_a_host_inside(site, remote, laptop):
    type_enroll(remote, laptop)
    inside, other = Machine(site, "inside"), Machine(site, "other")
    sh("ip", "-n", inside.netns, "link", "set", "eth0", "down")
    sh("ip", "link", "add", "eth1", "netns", remote.netns, "type", "veth", "peer", "name", "eth1", "netns", inside.netns)
    for machine, address in (remote, "192.0.2.1/24"), (inside, "192.0.2.5/24"):
        sh("ip", "-n", machine.netns, "addr", "add", address, "dev", "eth1")
        sh("ip", "-n", machine.netns, "link", "set", "eth1", "up")
    sh("ip", "-n", inside.netns, "route", "add", "default", "via", "192.0.2.1")
    inside.sshd()
    static, = blocks("A gateway")
    template, = blocks("A gateway", "ini")
    remote.shell(f"sudo sed -i '/^.server.$/a {template.strip()}' /etc/tariq/tariq.conf;"
              "sudo sed -i 's/^    O 22/    O 2222/' /etc/tariq/tariq.conf")
    server = remote.serve()
    remote.shell(static)
    assert not laptop.connects(remote.ip, 2222)
    type_knock(laptop, "O", "2222")
    assert laptop.connects(remote.ip, 2222) and not laptop.connects(remote.ip, 22) and not other.connects(remote.ip, 2222)
    assert server.stop() == 0
    assert not laptop.connects(remote.ip, 2222)


# ---- the page itself -------------------------------------------------------------------------------------------------

def test_the_table_of_keys_is_that_of_the_example_config():
    table = README.partition("## Configuration")[2].partition("\n\nA pattern")[0]
    named = set(re.findall("`([a-z_]+)`", "".join(line.split("|")[2] for line in table.splitlines() if line.startswith("| "))))
    keys = set(re.findall(r"^([a-z_]+) =", (HERE / "tariq.conf.example").read_text(), re.M))
    assert named == keys


def test_every_message_in_troubleshooting_is_one_that_tariq_says():
    source = re.sub(r'"\s*\n?\s*\+?\s*f?"', "", (HERE / "tariq.py").read_text())  # joined strings
    table = README.partition("## Troubleshooting")[2].partition("Exit codes:")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    own = [text for cell in cells for text in re.findall("`(.*?)`", cell)
           if not re.search("Connection refused|Name or service|Network is|No public key|No module|gpg: ", text)]  # the system's words
    assert len(own) > 50
    for text in own:
        for words in re.split(r"\b[A-Z]+\b|\.\.\.|[A-Z]:|`|\(IPv[46]\)|\b\d+\b", text):
            words = words.strip(" :[]()-,;")
            assert len(words) < 6 or words in source or words in re.sub(r"\{[^{}]*\}", "", source), f"{words!r} of {text!r}"


def test_every_test_that_the_threat_model_names_is_one():
    named = set(re.findall("`(test_[a-z0-9_]+)`", README))
    assert len(named) > 12 and named <= set(globals())


def test_every_anchor_in_the_readme_leads_somewhere():
    headings = {re.sub("[^a-z0-9 -]", "", line.strip("# ").lower()).replace(" ", "-") for line in README.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= headings


# ---- the demo ----------------------------------------------------------------------------------------------------

RECORDER = """
import select, signal, socket, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the demo's business
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind(("eth0", 0))
server, sent, back = socket.inet_aton(sys.argv[1]), [], 0
print("ready", flush=True)
while wire in select.select([wire, sys.stdin], [], [])[0]:  # until the first line on stdin
    frame, (_, _, direction, *_) = wire.recvfrom(2048)
    if direction == socket.PACKET_OUTGOING and frame[23] == socket.IPPROTO_TCP and frame[30:34] == server:
        sent.append(frame)
sys.stdin.readline(), sys.stdin.readline()
wire.close()
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind(("eth0", 0))
for frame in sent:
    wire.send(frame)
end = time.monotonic() + 1
while select.select([wire], [], [], max(0, end - time.monotonic()))[0]:
    frame, (_, _, direction, *_) = wire.recvfrom(2048)
    back += direction == socket.PACKET_HOST and frame[26:30] == server and frame[23] == socket.IPPROTO_TCP
print(len(sent), "packets sent again,", back, "came back")
"""


def demo():
    """Three throwaway hosts, a closed door and a knock. What stands after a $ is run as it stands; the demo fails where the
    output is not what the words before it say."""
    def say(text):
        print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)

    def show(host, *argv, expect="", without="\0", user=None):
        print(f"{'nobody@' if user else ''}{host.name}$ {shlex.join(map(str, argv))}", flush=True)
        done = host.run(*argv, user=user, check=False, cwd=lab.dir)
        said = (done.stdout + done.stderr).strip()
        print("\n".join(f"  {line}" for line in said.splitlines() if line) or f"  (nothing; exit status {done.returncode})", flush=True)
        assert expect in said and without not in said, f"not as announced: {expect or without!r}"

    def knock(*words, expect=""):
        show(client, "./tariq.py", "knock", "-c", "client/tariq.conf", "box", *words, expect=expect, user=NOBODY)

    def banner(host, **options):
        show(host, "timeout", "1", "bash", "-c", f"head -1 < /dev/tcp/{server.ip}/22", **options)

    def scan():
        show(scanner, "nmap", "-n", "-Pn", "-p-", "--min-rate", "30000", "--max-retries", "0", server.ip,
             expect="All 65535 scanned ports", without="/tcp open")

    if os.geteuid():
        sys.exit("the demo builds network namespaces: sudo ./test_tariq.py demo")
    missing = [program for program in ("ip", "iptables", "nmap", "gpg", "/usr/sbin/sshd") if not shutil.which(program)]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}. See the README's first command")
    for number in (signal.SIGINT, signal.SIGTERM):  # both leave through the `with` below, which removes everything
        signal.signal(number, signal.default_int_handler)
    try:
        with Lab() as lab:
            say("Three hosts in network namespaces: a server, a client and a scanner. Your network and firewall are not touched.")
            server, client, scanner = (lab.host(name, number) for name, number in (("server", 10), ("client", 20), ("scanner", 30)))
            Path("/run/sshd").mkdir(exist_ok=True)
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", lab.dir / "host_key")
            server.popen("/usr/sbin/sshd", "-D", "-f", "/dev/null", "-h", lab.dir / "host_key", "-o", "PidFile=none", stderr=subprocess.DEVNULL)
            server.drop_policy()
            conf = make_server(lab, server)
            make_client(lab, client, server, conf, allow=("O 22", "C 22", "E uptime *"))
            tariq_server = Server(lab, server, conf).wait_log("listening on")
            lab.undo.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)  # runs first: nothing interrupts that
            recorder = client.popen(*PYTHON, "-c", RECORDER, server.ip, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            recorder.stdout.readline()

            say("The server runs sshd and Tariq. Only sshd has a socket; Tariq listens on nothing:")
            show(server, "ss", "-Hlntup", expect=":22", without="python")
            say("The firewall drops all that is new. The scanner tries every port (nmap calls any host up that shares its switch):")
            scan()
            say("The client, an ordinary user, has no luck either:")
            banner(client, without="SSH")
            say("It knocks. The server proves itself, the client proves itself, and port 22 opens for this client's address:")
            knock("O", "22", expect="opened tcp/22")
            recorder.stdin.write("stop\n")
            recorder.stdin.flush()
            banner(client, expect="SSH-2.0")
            say("The door is one rule. The kernel itself ends it, at the time it names:")
            show(server, "iptables", "-S", "tariq", expect=f"-s {client.ip}/32")
            say("From elsewhere still nothing is to be seen:")
            scan()
            say("A command that the server allows, without a log-in; and one that it does not:")
            knock("E", "uptime", "--pretty", expect="up ")
            knock("E", "cat", "/etc/shadow", expect="refused: ")
            say("The client closes the door:")
            knock("C", "22", expect="closed tcp/22")
            banner(client, without="SSH")
            say("Somebody has recorded the knock that opened it, and sends it again, packet by packet, from the same address:")
            replayed = recorder.communicate("replay\n", timeout=10)[0].strip()
            print(f"  {replayed}")
            assert replayed.endswith(" 0 came back") and not replayed.startswith("0 "), replayed
            banner(client, without="SSH")
            say("What the server has logged of all that:")
            print("\n".join(f"  {line}" for line in tariq_server.log.splitlines() if f" {client.ip} " in line and "iptables" not in line))
            say("Now all of it is removed. For real machines: see the README, Set-up.")
    except KeyboardInterrupt:
        print("\ninterrupted: all of it is removed")
        return 130
    return 0


# ---- parts of both benchmarks ------------------------------------------------------------------------------------

def start_tariq(lab, server, client, **settings):
    """A server and a client who may open and close -> (Server, words of the client's command up to the host)."""
    conf = make_server(lab, server, **settings)
    client_conf = make_client(lab, client, server, conf, allow=("O 22", "C 22"))
    running = Server(lab, server, conf).wait_log("listening on")
    return running, [*PYTHON, str(lab.dir / "tariq.py"), "knock", "-c", str(client_conf)]


def part(host, name, *arguments):
    """A part of a benchmark (a function of this file) as a process of its own in the host's namespace."""
    return host.popen(sys.executable, HERE / "test_tariq.py", name, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


# ---- bench latency -----------------------------------------------------------------------------------------------

RATIOS = {"tariq, kernel": 0.75, "tariq, crafted": 1.6}  # wanted, to fwknop with GPG in the same run
GIVE_UP = 5  # seconds without an open port


def probe_once(address):
    """Try to connect to port 22 for 1 ms, with a new socket: a SYN that meets a shut door is dropped in silence, and
    the kernel's own repetition of it would come a second later. The door needs no more than 0.1 ms in the lab."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave nothing behind
        sock.setblocking(False)
        sock.connect_ex((address, 22))
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        if not poll.poll(1):
            return False
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
        return True


def part_prober(address):
    """In the client's namespace: for each command on stdin, the time from its start to the first connect. The prober
    starts the command itself, so that neither its own start nor `ip netns exec` is measured."""
    for line in sys.stdin:
        if probe_once(address):
            raise SystemExit("the door is open before the knock")
        attempts, cpu, began = 0, time.process_time(), time.perf_counter()
        command = subprocess.Popen(json.loads(line), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        is_open = False
        while not is_open and time.perf_counter() < began + GIVE_UP:
            is_open, attempts = probe_once(address), attempts + 1
        took = time.perf_counter() - began
        cpu = time.process_time() - cpu
        words = command.communicate()[0].decode(errors="replace")
        print(json.dumps({"ms": took * 1e3 if is_open else None, "attempts": attempts / took, "cpu": cpu / took * 100,
                          "words": words, "exit": command.returncode}), flush=True)


def rsa_keyring(host, home, user):
    """A gpg home of the user's, with an RSA-2048 key (fwknop takes no newer kind) and no passphrase -> fingerprint."""
    home.mkdir(mode=0o700)
    os.chown(home, user, user)
    text = ("Key-Type: RSA\nKey-Length: 2048\nKey-Usage: sign\nSubkey-Type: RSA\nSubkey-Length: 2048\n"
            f"Subkey-Usage: encrypt\nName-Email: {home.name}@bench\n%no-protection\n%commit\n")
    gpg = ["gpg", "--batch", "--quiet", "--homedir", home]
    host.run(*gpg, "--gen-key", user=user, input=text, stdin=None)
    return re.search("fpr:+(\\w+)", host.run(*gpg, "--with-colons", "--list-keys", user=user).stdout)[1]


def trust_each_other(rings):
    """rings: two of (host, home, user, fingerprint). Each gets the other's public key and trusts it."""
    for mine, other in (rings, rings[::-1]):
        host, home, user, _ = mine
        key = other[0].run("gpg", "--homedir", other[1], "--armor", "--export", other[3], user=other[2]).stdout
        host.run("gpg", "--batch", "--quiet", "--homedir", home, "--import", user=user, input=key, stdin=None)
        host.run("gpg", "--batch", "--quiet", "--homedir", home, "--import-ownertrust", user=user, stdin=None,
                 input=f"{other[3]}:6:\n")


def start_fwknop(lab, server, client, kind, port):
    """fwknop as its manual sets it up, defaults where there are any (it looks for packets each 0.1 s); kind: gpg or
    rijndael -> (command, close). Each kind has its own daemon, so that neither tries the other's keys."""
    directory, chain = lab.dir / f"fwknop-{kind}", f"FWKNOP_{kind.upper()}"
    directory.mkdir(mode=0o711)
    hmac_key, key = (base64.b64encode(os.urandom(size)).decode() for size in (64, 32))
    # Rules that expire in the run would have the daemon list them while others are measured.
    access = (f"SOURCE ANY\nREQUIRE_SOURCE_ADDRESS Y\nHMAC_KEY_BASE64 {hmac_key}\n"
              "MAX_FW_TIMEOUT 3600\nFW_ACCESS_TIMEOUT 3600\n")
    profile = (f"[box]\nACCESS tcp/22\nALLOW_IP {client.ip}\nSPA_SERVER {server.ip}\nSPA_SERVER_PORT {port}\n"
               f"USE_HMAC Y\nHMAC_KEY_BASE64 {hmac_key}\n")
    if kind == "gpg":
        homes = directory / "server", directory / "client"
        own, user = rsa_keyring(server, homes[0], 0), rsa_keyring(client, homes[1], NOBODY)
        trust_each_other([(server, homes[0], 0, own), (client, homes[1], NOBODY, user)])
        access += (f"GPG_HOME_DIR {homes[0]}\nGPG_DECRYPT_ID {own[-8:]}\nGPG_ALLOW_NO_PW Y\nGPG_REQUIRE_SIG Y\n"
                   f"GPG_REMOTE_ID {user[-8:]}\n")
        profile += (f"USE_GPG Y\nGPG_HOMEDIR {homes[1]}\nGPG_RECIPIENT {own[-8:]}\nGPG_SIGNER {user[-8:]}\n"
                    "GPG_NO_SIGNING_PW Y\n")
    else:
        access += f"KEY_BASE64 {key}\n"
        profile += f"KEY_BASE64 {key}\n"
    settings = (f"PCAP_INTF eth0;\nENABLE_PCAP_PROMISC N;\nPCAP_FILTER udp port {port};\nFWKNOP_RUN_DIR {directory};\n"
                f"IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, {chain}, 1;\n")
    for name, text, owner in (("fwknopd.conf", settings, 0), ("access.conf", access, 0), ("fwknoprc", profile, NOBODY)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o600)
        os.chown(directory / name, owner, owner)
    with open(directory / "log", "w") as file:
        server.popen("fwknopd", "-f", "-c", directory / "fwknopd.conf", "-a", directory / "access.conf", stdout=file,
                     stderr=file, stdin=subprocess.DEVNULL)
    command = ["fwknop", "--rc-file", str(directory / "fwknoprc"), "--no-save-args", "-n", "box"]
    return command, lambda: server.run("iptables", "-F", chain)


def start_knockd(lab, server):
    """knockd with the example its package brings, on a chain of its own -> (command, close)."""
    path = lab.dir / "knockd.conf"
    server.run("iptables", "-N", "KNOCKD")
    server.run("iptables", "-A", "INPUT", "-j", "KNOCKD")
    path.write_text("[options]\n  logfile = /dev/null\n[open]\n  sequence = 7000,8000,9000\n  seq_timeout = 5\n"
                    "  tcpflags = syn\n  command = /sbin/iptables -A KNOCKD -s %IP% -p tcp --dport 22 -j ACCEPT\n")
    server.popen("knockd", "-i", "eth0", "-c", path, "-p", lab.dir / "knockd.pid", stdin=subprocess.DEVNULL,
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return ["knock", server.ip, "7000", "8000", "9000"], lambda: server.run("iptables", "-F", "KNOCKD")


def latency_tools(lab, server, client):
    """{tool: (its command, the function that shuts its door)}, or (None, None) where it is not installed."""
    _, tariq_knock = start_tariq(lab, server, client)
    # Every command is started by setpriv, so that its millisecond is in all the figures. Only crafted needs root.
    as_user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    as_root = ["setpriv", "--reuid=0", "--regid=0", "--clear-groups"]

    def close_tariq():  # by a knock: a flush of the chain would leave the server with doors it believes open
        client.run(*tariq_knock, "--transport", "kernel", "box", "C", "22", user=NOBODY)

    tools = {f"tariq, {kind}": (start + tariq_knock + ["--transport", kind, "box", "O", "22"], close_tariq)
             for kind, start in (("kernel", as_user), ("crafted", as_root))}
    starters = {"fwknop, GPG + HMAC": ("fwknopd", lambda: start_fwknop(lab, server, client, "gpg", 62201)),
                "fwknop, Rijndael + HMAC": ("fwknopd", lambda: start_fwknop(lab, server, client, "rijndael", 62202)),
                "knockd, no cryptography": ("knockd", lambda: start_knockd(lab, server))}
    for tool, (program, start) in starters.items():
        tools[tool] = (None, None)
        if shutil.which(program):
            command, close = start()
            tools[tool] = (as_user + command, close)
    return tools


def measure_knock(prober, command):
    """One knock, timed by the prober. A knock that fails ends the benchmark: its figure would mean nothing."""
    print(json.dumps(command), file=prober.stdin, flush=True)
    answer = prober.stdout.readline()
    if not answer:
        raise AssertionError("the prober ended: the door was open before the knock, or its words are above")
    result = json.loads(answer)
    if result["ms"] is None or result["exit"]:
        raise AssertionError(f"{command}: exit {result['exit']}, no open port in {GIVE_UP} s: {result['words']}")
    return result


def bench_latency(rounds=20):
    """Time from command start to the first TCP connect, every tool in each round, doors shut in between."""
    with Lab() as lab:
        server, client = lab.host("server", 10), lab.host("client", 20)
        server.drop_policy()
        start_sshd(lab, server)
        tools = latency_tools(lab, server, client)
        prober = part(client, "prober", server.ip)
        time.sleep(1)  # the daemons start
        results = {tool: [] for tool, (command, _) in tools.items() if command}
        for number in range(rounds + 1):  # the first is the warm-up: gpg-agents start, files come into the page cache
            for tool in results:
                command, close = tools[tool]
                result = measure_knock(prober, command)
                close()
                if number:
                    results[tool].append(result)
                time.sleep(0.05 + random.random() / 10)  # no tool meets its server's polling always in one phase

    medians = {tool: statistics.median(result["ms"] for result in results[tool]) for tool in results}
    base = medians.get("fwknop, GPG + HMAC")
    print(f"\nfrom command start to the first TCP connect, {rounds} rounds; beside each command a prober sends SYNs")
    print(f"{'tool':24} {'median':>9} {'min':>9} {'p90':>9} {'to fwknop GPG':>13} {'wanted':>6} "
          f"{'SYN/s':>6} {'their CPU':>9}")
    for tool, (command, _) in tools.items():
        if not command:
            print(f"{tool:24} not installed")
            continue
        times, median = [result["ms"] for result in results[tool]], medians[tool]
        p90 = statistics.quantiles(times * 2, n=10, method="inclusive")[8]  # * 2: it needs two at least
        rate, cpu = (statistics.mean(result[name] for result in results[tool]) for name in ("attempts", "cpu"))
        ratio, wanted = f"{median / base:.2f}" if base else "-", f"{RATIOS[tool]}" if tool in RATIOS else ""
        print(f"{tool:24} {median:6.1f} ms {min(times):6.1f} ms {p90:6.1f} ms {ratio:>13} {wanted:>6} "
              f"{rate:6.0f} {cpu:7.1f} %")


# ---- bench flood -------------------------------------------------------------------------------------------------

GARBAGE = 900  # bytes of payload, as a real fragment has
POOL = 4096  # different frames, made beforehand: making them costs more than sending them
FLOOD_LONGEST = 240  # seconds; a sender ends by itself even when nobody stops it
BATCH = 0.001  # seconds between bursts: a sleep for each packet would cost more than the packet


def checksum(data):
    """RFC 1071, of an even number of bytes."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def garbage_syn(link, source, destination, port):
    """A SYN with random payload, right checksums (a wrong one would spare the server work): RFC 791, 9293."""
    addresses, payload = socket.inet_aton(source) + socket.inet_aton(destination), os.urandom(GARBAGE)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 40 + GARBAGE, random.getrandbits(16), 0x4000, 64, socket.IPPROTO_TCP, 0)
    ip += addresses
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", random.randint(1024, 65535), port, random.getrandbits(32), 0, 0x50, 2, 64240, 0, 0)
    total = checksum(addresses + struct.pack(">HH", socket.IPPROTO_TCP, len(tcp) + GARBAGE) + tcp + payload)
    return link + ip + tcp[:16] + struct.pack(">H", total) + tcp[18:] + payload


def part_flood(link, source, destination, ports, rate):
    """In the attacker's namespace: send garbage at a rate, until stdin ends or FLOOD_LONGEST. source: an address, or
    'many' for a different one in each frame. sendmmsg(2) leaves a sixth more of the core to the others than send(2)."""
    link, rate, ports = bytes.fromhex(link), int(rate), [int(port) for port in ports.split(",")]
    sources = [source] * POOL
    if source == "many":  # of RFC 2544's addresses, which are for benchmarks
        sources = [f"198.18.{random.getrandbits(8)}.{random.randint(1, 254)}" for _ in range(POOL)]
    frames = [garbage_syn(link, source, destination, port) for source, port in zip(sources, itertools.cycle(ports))]
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(263, 20, 1)  # SOL_PACKET, PACKET_QDISC_BYPASS: straight to the driver
    sock.bind(("eth0", 0))
    # struct iovec and struct mmsghdr (64 bytes) on a 64-bit Linux, one of each for a frame; all frames have one size.
    data, size = ctypes.create_string_buffer(b"".join(frames)), len(frames[0])
    vectors = ctypes.create_string_buffer(b"".join(
        struct.pack("QQ", ctypes.addressof(data) + size * number, size) for number in range(POOL)))
    headers = ctypes.create_string_buffer(b"".join(
        struct.pack("8Q", 0, 0, ctypes.addressof(vectors) + 16 * number, 1, 0, 0, 0, 0) for number in range(POOL)))
    sendmmsg, place, sent = ctypes.CDLL(None).sendmmsg, 0, 0
    print("ready", flush=True)
    began = time.monotonic()
    while (now := time.monotonic() - began) < FLOOD_LONGEST and not select.select([sys.stdin], [], [], 0)[0]:
        due, sent = min(int(now * rate) - sent, rate), int(now * rate)  # a second that a busy machine missed is made up for, no more
        while due > 0:  # to the end of the pool at most; a frame that the wire does not take is skipped
            done = max(1, sendmmsg(sock.fileno(), ctypes.byref(headers, 64 * place), min(due, POOL - place), 0))
            place, due = (place + done) % POOL, due - done
        time.sleep(max(0, began + now + BATCH - time.monotonic()))


def link_state(host):
    """What `ip` knows of the host's interface."""
    return json.loads(host.run("ip", "-s", "-j", "link", "show", "dev", "eth0").stdout)[0]


def dropped(host):
    """Packets that a full receive buffer of the host's packet sockets has cost so far: ss(8), skmem."""
    return sum(map(int, re.findall(r"skmem:\([^)]*,d(\d+)\)", host.run("ss", "-0nm").stdout)))


def cpu_seconds(pid):
    """utime + stime so far: proc(5). gpg and iptables are processes of their own and do not count."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid):
    """Resident memory in MB: proc(5)."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def knock_once(client, server, knock):
    """Open, look, close -> the time of the opening in ms, or None where it failed: a door must have been shut before,
    the command succeed, and sshd be reached by a real connection."""
    for _ in range(3):
        if server.rules():
            client.run(*knock, "C", "22", user=NOBODY, check=False)
    if server.rules():
        return None
    began = time.perf_counter()
    done = client.run(*knock, "O", "22", user=NOBODY, check=False)
    took = (time.perf_counter() - began) * 1e3
    return took if done.returncode == 0 and client.connects(server.ip, timeout=3) else None


def flooded(attacker, client, server, pid, knock, source, ports, rate, knocks):
    """Knocks during a flood -> ([ms or None], what was counted meanwhile: packets by the interfaces, seconds)."""
    link = (link_state(server)["address"] + link_state(attacker)["address"] + "0800").replace(":", "")
    sender = part(attacker, "flood-sender", link, source, server.ip, ports, rate)
    sender.stdout.readline()  # its frames are made

    def counters():
        return collections.Counter(
            sent=link_state(attacker)["stats64"]["tx"]["packets"], got=link_state(server)["stats64"]["rx"]["packets"],
            dropped=dropped(server), listener=cpu_seconds(pid), sender=cpu_seconds(sender.pid),
            seconds=time.monotonic())

    before = counters()
    times = [knock_once(client, server, knock) for _ in range(knocks)]
    counted = counters() - before
    if sender.poll() is not None:
        print(f"the flood ended before the knocks, by a fault or after {FLOOD_LONGEST} s: the next row is too good")
    sender.stdin.close()
    sender.wait(10)
    return times, counted


def bench_flood(rates=(1_000, 10_000, 50_000, 100_000), knocks=20):
    """Knocks of an ordinary user while garbage comes in at each rate, half from one address, half from many."""
    with Lab() as lab:
        server, client, attacker = (lab.host(*host) for host in (("server", 10), ("client", 20), ("attacker", 30)))
        server.drop_policy()
        start_sshd(lab, server)
        running, knock = start_tariq(lab, server, client)
        knock += ["--transport", "kernel", "box"]
        ports = re.search(r"secret_ports\s*=\s*([\d,]+)", running.conf.read_text())[1]
        knock_once(client, server, knock)  # the warm-up
        print(f"\n{knocks} knocks a row; opened: with garbage from one address + from {POOL}; time: start to exit;")
        print("dropped: by the server's packet socket when its buffer was full; CPU in % of one core; memory: resident")
        print(f"{'wanted/s':>8} {'sent/s':>8} {'got/s':>8} {'dropped':>8} {'opened':>14} {'median':>8} {'max':>8} "
              f"{'listener':>8} {'sender':>6} {'listener, MB':>14} {'monitor, MB':>14}", flush=True)
        for rate in rates:
            pids = running.listener, running.process.pid
            before = [rss(pid) for pid in pids]
            (one, counted), (many, more) = (
                flooded(attacker, client, server, pids[0], knock, source, ports, rate, knocks // 2)
                for source in (attacker.ip, "many"))
            memory = [f"{start:.1f} -> {rss(pid):.1f}" for start, pid in zip(before, pids)]
            total = counted + more
            sent, got, listener, sender = (
                total[name] / total["seconds"] for name in ("sent", "got", "listener", "sender"))
            times = [took for took in one + many if took] or [float("nan")]
            opened = " + ".join(f"{len(half) - half.count(None)}/{len(half)}" for half in (one, many))
            print(f"{rate:8} {sent:8.0f} {got:8.0f} {total['dropped']:8} {opened:>14} "
                  f"{statistics.median(times):5.0f} ms {max(times):5.0f} ms {listener:8.1%} {sender:6.1%} "
                  f"{memory[0]:>14} {memory[1]:>14}", flush=True)


# ---- command line --------------------------------------------------------------------------------------------------------

if hasattr(pytest, "main"):  # tests that share a fixture's hosts run one after the other, where pytest-xdist runs several at once
    for test in [value for name, value in list(globals().items()) if name.startswith("test_")]:
        hosts = {"box": "world", "world": "world", "place": "place", "remote": "readme", "laptop": "readme", "locked": "locked"}
        group = next((hosts[name] for name in inspect.signature(test).parameters if name in hosts), None)
        if group:
            pytest.mark.xdist_group(group)(test)

PARTS = {"prober": part_prober, "flood-sender": part_flood}


def main():
    name, *arguments = sys.argv[1:] or ["test"]
    if name in PARTS:
        return PARTS[name](*arguments)
    if name == "demo":
        return demo()
    if name == "bench":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` too shall leave no namespace behind
        if arguments[:1] == ["latency"]:
            return bench_latency(*map(int, arguments[1:2]))
        if arguments[:1] == ["flood"]:
            return bench_flood(*[tuple(map(int, arguments[1:]))] if arguments[1:] else [])
        sys.exit(__doc__)
    if os.geteuid() == 0 and not user_exists("tariq"):  # for all of the run: no lab deletes it under another's feet
        sh("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "tariq")
        atexit.register(sh, "userdel", "-f", "tariq", check=False)
    side_by_side = ["-n", "3", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []  # they wait a lot
    return pytest.main(["-q", "-p", "no:cacheprovider", *side_by_side, str(HERE / "test_tariq.py"), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
