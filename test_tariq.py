#!/usr/bin/python3
"""Tests, demo and benchmarks of Tariq, on real parts: network namespaces, iptables, gpg keys, sshd
and nmap. As root:

    ./test_tariq.py                 the tests (pytest); not as root, those that need no namespace
    ./test_tariq.py demo            three throwaway hosts, a closed door and a knock: 15 seconds
    ./test_tariq.py machine         the README's first hour, typed on a fresh Debian 13 in qemu
    ./test_tariq.py machine bookworm    the same on a Debian 12
    ./test_tariq.py bench latency   time to an open port, beside other tools, and its parts
    ./test_tariq.py bench clients   a knock where 1, 100, 1,000 and 10,000 clients are enrolled
    ./test_tariq.py bench load      authentic knocks a second that the server finishes
    ./test_tariq.py bench flood     knocks under a flood of garbage
    ./test_tariq.py bench timing    what a stranger can measure, with and without a server
    ./test_tariq.py bench observer  a knock's packets, as somebody on the path sees them

Everything runs in namespaces named tq-PID-..., on documentation addresses, and is removed at the
end, also on failure. What is where, in the order of the file:

  What the tests are made of
    the lab      Host: a namespace. Lab: hosts on a switch. Server: a `tariq.py server` and its log
    tools        packets, gpg, /proc
    the world    a server, its enrolled client and somebody else; `knock`, `opens`, `fails`
    a peer       a client of its own, written from the README's table of bytes, not from tariq.py
  What the README promises, and what keeps it
    frames, images, requests, configs                  the parts by themselves, without a network
    nothing of a stranger's gets past one hash         fuzzing of all that reads bytes
    both sides prove who they are                      the exchange step by step, and its times
    a knock opens one port for one address             knocks, commands, permissions, keys
    nothing to find                                    silence; what an observer sees
    disorder, duplicates, NAT, tunnels                 whatever the network makes of a knock
    every error is one line and a code                 and a hostile server
    init, keygen, enroll, join                         the set-up's commands one by one
    the service's life                                 start, stop, kill, doors and commands
    little runs as root                                what each process is, holds and reaches
    the kernel closes the doors                        ends of doors; loss of packets
    a recorded knock is worthless                      replays
    what breaks                                        gpg, iptables, memory, disks, links, clocks
    in from anywhere, other firewalls                  networks, kernels, tables as people have them
    nobody is locked out by an ordinary mistake        faulty configs, full disks, flushed firewalls
    hide                                               its trial, its end, what goes on meanwhile
  What people type and read
    what README.md says, done                          its own commands, on throwaway machines
    keys with a passphrase, words, the service         pinentry; each line whole; the unit; the demo
  The benchmarks
"""
import ast, base64, bisect, bz2, calendar, collections, copy, ctypes, fcntl, hashlib, importlib.util
import io, itertools, json, math, os, pty, random, re, select, shlex, shutil, signal, socket
import statistics, struct, subprocess, sys, tempfile
import termios, threading, time, zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE
from types import SimpleNamespace

LONG = 60  # seconds that what will happen may take on the slowest machine: else it takes no time
HERE = Path(__file__).resolve().parent
TARIQ = HERE / "tariq.py"
NOBODY = 65534
ROOT_CONF = "/etc/tariq/tariq.conf"
sys.path.insert(0, str(HERE))
import tariq  # noqa: E402

# ---- the lab: hosts in namespaces on one switch --------------------------------------------------

def sh(*argv, check=True, text=True, timeout=600, **options):
    """Run a command to its end and return it; its words are in the error when it fails."""
    options = options if "input" in options else {"stdin": DEVNULL, **options}
    done = subprocess.run([*map(str, argv)], stdout=PIPE, stderr=PIPE, text=text,
                          timeout=timeout, **options)
    assert done.returncode == 0 or not check, \
        f"{argv}: exit {done.returncode}: {done.stdout}{done.stderr}"
    return done

def as_user(user):
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]

class Host:
    """A namespace with one interface on the lab's switch."""

    def __init__(self, lab, name, number, prefix="198.51.100", prefix6="2001:db8:1:"):
        self.lab, self.name, self.netns = lab, name, f"{lab.prefix}-{name}"
        self.ip, self.ip6 = f"{prefix}.{number}", f"{prefix6}:{number}"
        sh("ip", "netns", "add", self.netns)
        sh("ip", "-n", self.netns, "link", "set", "lo", "up")
        # What a kernel says of itself now and then would count as a packet sent. The rest is
        # inherited.
        self.run("sysctl", "-qw", "net.ipv4.conf.all.forwarding=0",
                 "net.ipv6.conf.all.forwarding=0",
                 "net.ipv6.conf.all.disable_ipv6=0", "net.ipv6.conf.default.disable_ipv6=0",
                 "net.ipv6.conf.all.router_solicitations=0",
                 "net.ipv6.conf.default.router_solicitations=0")

    def command(self, argv, user=None):
        return ["ip", "netns", "exec", self.netns,
                *(as_user(user) if user is not None else []), *map(str, argv)]

    def run(self, *argv, user=None, **options):
        return sh(*self.command(argv, user), **options)

    def popen(self, *argv, user=None, text=True, **options):
        return subprocess.Popen(self.command(argv, user), text=text, **options)

    def inside(self, function, *arguments):
        """Call a function of ours, which makes a socket, in a thread that goes to this host's
        namespace."""
        def call():
            with open(f"/run/netns/{self.netns}", "rb") as namespace:
                # CLONE_NEWNET
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000):
                    raise OSError(ctypes.get_errno(), "setns")
            return function(*arguments)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()

    def drop_policy(self):
        """The firewall of the README: nothing gets in but what belongs to a connection."""
        for program in ("iptables", "ip6tables"):
            for rule in ("-A INPUT -i lo -j ACCEPT",
                         "-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
                         "-A INPUT -p ipv6-icmp -j ACCEPT", "-P INPUT DROP"):
                self.run(program, *rule.split())

    def connects(self, address, port=22, timeout=None):
        """Whether a TCP connection to address:port opens, and says SSH. It does not where the SYN
        had no answer when the kernel sent it again, after a second (or after the timeout): only
        kernels have a part in that answer. What sshd says takes as long as it takes."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.inside(socket.socket, family, socket.SOCK_STREAM) as sock, suppress(OSError):
            sock.setblocking(False)
            sock.connect_ex((address, port))
            end = time.monotonic() + (timeout or 60)
            while not select.select([], [sock], [], 0.02)[1]:
                sent_again = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[2]
                if sent_again if timeout is None else time.monotonic() > end:
                    return False
            sock.settimeout(60)
            return sock.recv(4) == b"SSH-"
        return False

    def rules(self, ip6=False):
        """The rules of the doors; one more keeps what is established."""
        rules = re.findall("(?m)^-A.*", self.run("ip6tables" if ip6 else "iptables", "-S",
            "tariq").stdout)
        return [rule for rule in rules if "ESTABLISHED" not in rule]

    def sshd(self, system=False):
        """A real sshd on port 22, with a key of its own and no configuration, or with the
        system's."""
        options = ["-f", "/dev/null", "-h", self.lab.new("sshd-key"), "-o", "PidFile=none",
                   "-o", "UsePAM=no"]
        if system:
            self.run("ssh-keygen", "-A")
            options = []
        else:
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", options[3])
        # OpenSSH 9.8 and later shuts out addresses that connect and do not log in, as the tests do.
        version = tuple(map(int, re.search(r"OpenSSH_(\d+)\.(\d+)",
                                           sh("ssh", "-V").stderr).groups()))
        options += ["-o", "PerSourcePenalties=no"] if version >= (9, 8) else []
        # else it refuses some while it is slow to see others go
        options += ["-o", "MaxStartups=500"]
        own = '[ -d /run/sshd ] || { mount -t tmpfs x /run && mkdir -m 755 /run/sshd; }; exec "$@"'
        self.popen("sh", "-c", own, "sh", "/usr/sbin/sshd", "-D", *options, stdout=DEVNULL,
            stderr=DEVNULL)
        wait_for(lambda: self.connects("127.0.0.1"), "sshd does not come up")

# Waits until the tests close its stdin, or are gone, however they went; then removes a lab and all
# that runs in it.
JANITOR = """
read -r line
for space in $(ip netns list | grep -o "^$1-[^ ]*"); do
    while pids=$(ip netns pids $space) && [ "$pids" ]; do kill -9 $pids; sleep 0.02; done
    rm -f /run/tariq-*-$(stat -c %i /run/netns/$space).lock
    ip netns del $space
done
pkill -KILL -f "^gpg-agent --homedir $2/"  # by themselves they may take minutes, if many run
rm -rf --one-file-system "$2"
"""

class Lab:
    """Namespaces on a bridge in one more namespace, a private directory, and the removal of all
    that."""

    count = itertools.count()

    def __init__(self):
        if os.geteuid():
            pytest.skip("makes network namespaces: run as root")
        self.prefix, self.hosts = f"tq-{os.getpid()}-{next(self.count)}", {}
        # Not in $TMPDIR: it may be root's alone, or too long for gpg-agent; nor with root's umask.
        self.dir, self.switch = Path(tempfile.mkdtemp(prefix="tariq-test-",
            dir="/tmp")), f"{self.prefix}-switch"
        os.umask(0o022)
        self.dir.chmod(0o755)
        words = [self.prefix, self.dir]
        self.janitor = subprocess.Popen(["sh", "-c", JANITOR, "sh", *words], stdin=PIPE,
                                        stdout=DEVNULL, stderr=DEVNULL,
                                        start_new_session=True)
        self.program(path=self.dir / "tariq.py")
        shutil.copy(HERE / "tariq.conf.example", self.dir)
        sh("ip", "netns", "add", self.switch)
        sh("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        sh("ip", "-n", self.switch, "link", "set", "br0", "up")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.janitor.stdin.close()
        self.janitor.wait(600)
        wait_for(lambda: not sh("pgrep", "-f", self.dir, check=False).stdout,
                 f"something that was started with {self.dir} still runs")

    def new(self, name):
        """A path of the lab's own that nothing has yet."""
        return self.dir / f"{next(self.count)}-{name}"

    def program(self, change="", path=None):
        """A copy of tariq.py for this very Python, which runs a change of `tariq`, the program,
        first; its path."""
        text = TARIQ.read_text().replace("#!/usr/bin/python3", f"#!{sys.executable}", 1)
        # A second for gpg is too little at half speed, and a knock that was refused for it is lost.
        change = f"tariq.UNSEAL_TIME = {LONG // 2}\n{change}"
        change = f"exec({change!r}, {{**globals(), 'tariq': sys.modules[__name__]}})\n"
        return write(path or self.new("tariq.py"),
                     text.replace("\nif __name__", f"\n{change}if __name__"), mode=0o755)

    def host(self, name, number):
        host = self.hosts[name] = Host(self, name, number)
        self.plug(host, "eth0", f"{host.ip}/24", f"{host.ip6}/64")
        return host

    def plug(self, host, interface, *addresses):
        """A cable from the host to the switch."""
        port = f"port{next(self.count)}"
        sh("ip", "link", "add", interface, "netns", host.netns, "type", "veth",
           "peer", "name", port, "netns", self.switch)
        sh("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        set_up_link(host, interface, *addresses)

    def cable(self, one, interface, other, other_interface, addresses, other_addresses):
        """A cable between two hosts."""
        sh("ip", "link", "add", interface, "netns", one.netns, "type", "veth",
           "peer", "name", other_interface, "netns", other.netns)
        set_up_link(one, interface, *addresses)
        set_up_link(other, other_interface, *other_addresses)

    def tariq(self, host, *argv, user=None, **options):
        return host.run(self.dir / "tariq.py", *argv, user=user, **options)

# Runs a command where /etc has the lab's passwd and group: with a user `tariq`, as `make_users`
# says.
OWN_USERS = ('for name in passwd group; do mount --bind "$0/$name" /etc/$name || exit; done; '
             'exec "$@"')

def make_users(directory, uid=None):
    """The machine's users, and `tariq`, by default with a uid and a gid that nobody has."""
    passwd, group = (re.sub("(?m)^tariq:.*\n", "", Path("/etc", name).read_text())
                     for name in ("passwd", "group"))
    taken = set(map(int, re.findall(r"(?m)^[^:\n]*:[^:\n]*:(\d+):", passwd + group)))
    uid = uid or next(number for number in range(998, 0, -1) if number not in taken)
    directory.mkdir(exist_ok=True)
    passwd += f"tariq:x:{uid}:{uid}::/nonexistent:/usr/sbin/nologin\n"
    write(directory / "passwd", passwd, mode=0o644)
    write(directory / "group", f"{group}tariq:x:{uid}:\n", mode=0o644)
    return directory

def set_up_link(host, interface, *addresses):
    for address in addresses:
        sh("ip", "-n", host.netns, "addr", "add", address, "dev", interface,
           *(["nodad"] if ":" in address else []))
    sh("ip", "-n", host.netns, "link", "set", interface, "up")

def run_init(lab, host, path, uid=None, **options):
    """`init` of a server with this config, by the lab's users: none comes to this machine's."""
    users = make_users(lab.dir / f"users{uid or ''}", uid)
    return host.run("sh", "-c", OWN_USERS, users, lab.dir / "tariq.py", "init", "-c", path,
                    **options)

def make_server(lab, host, directory="server", **settings):
    """A server set up by `init`, with settings changed; returns the config's path."""
    path = lab.dir / directory / "tariq.conf"
    run_init(lab, host, path)
    return write(path, with_settings(path.read_text(), settings))

def with_settings(text, settings):
    """A server's config with other settings."""
    for key, value in settings.items():
        text = re.sub(rf"(?m)^{key} = .*\n", "", text, count=1).replace("[server]\n",
            f"[server]\n{key} = {value}\n")
    return text

def write(path, text, user=0, mode=0o600):
    """Write a file, by default a config, that belongs to a user; returns its path."""
    path.write_text(text)
    path.chmod(mode)
    os.chown(path, user, user)
    return path

def edit(path, *changes):
    """Replace words of a file: (old, new)."""
    text = path.read_text()
    for old, new in changes:
        text = text.replace(old, new)
    path.write_text(text)

def config_values(path, section):
    return dict(tariq.Config(path).ini[section])

class Server:
    """A running `tariq.py server`, with its log, in hostile surroundings: far from UTC, with root's
    groups and secrets, a poisoned PATH and Python, and a file as stdin."""

    def __init__(self, lab, host, conf, program=None, prefix=()):
        self.conf, self.path, self.poison = conf, lab.new("log"), lab.new("poison")
        self.poison.mkdir()
        for name in ("iptables", "ip6tables", "iptables-restore", "gpg", "setpriv", "timeout",
                     "json.py", "hmac.py"):
            mark = f"#!/bin/sh\ntouch {self.poison}/mark"
            if ".py" in name:
                mark = f"open('{self.poison}/mark', 'w')"
            write(self.poison / name, f"{mark}\n", mode=0o755)
        path = f"PATH={self.poison}:{os.environ['PATH']}"
        surroundings = ["setpriv", "--groups", "4,24", "env", "TZ=XXX-13:37", path,
                        f"PYTHONPATH={self.poison}",
                        f"GNUPGHOME={self.poison}", "SECRET_OF_ROOT=hunter2",
                        "XTABLES_LIBDIR=/nonexistent",
                        "LC_ALL=tr_TR.UTF-8"]
        with open(self.path, "w") as log, open(__file__) as stdin:
            self.process = host.popen(*prefix, *surroundings, program or lab.dir / "tariq.py",
                                      "server", "-c", conf,
                                      stdin=stdin, stdout=log, stderr=log)

    @property
    def log(self):
        return self.path.read_text()

    def wait_log(self, text, count=1, timeout=LONG):
        try:
            wait_for(lambda: self.log.count(text) >= count, f"{text!r} is not {count} times in the "
                f"log", timeout)
        except AssertionError:
            print(self.log, file=sys.stderr)
            raise
        return self

    def stop(self, number=signal.SIGTERM):
        """End it -> its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(LONG)
        assert "Traceback" not in self.log and not (self.poison / "mark").exists(), self.log
        return code

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def listener(self):
        """The listener's pid."""
        for pid in children(self.process.pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # another child, which has ended
                if "listener" in proc(pid, "cmdline"):
                    return pid
        raise AssertionError(f"no listener: {self.log}")

# ---- tools ---------------------------------------------------------------------------------------

def wait_for(condition, complaint="it did not come true", seconds=LONG):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.02)

Packet = collections.namedtuple("Packet", "time outgoing frame source port flags payload")

@contextmanager
def captured(host, outgoing=False):
    """The packets that pass a host's eth0 meanwhile, or those that it sends: a list, complete at
    the end."""
    packets = []
    with host.inside(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        sock.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS
        # linux/filter.h: load the packet's type; PACKET_OUTGOING: all of it; else: nothing
        if outgoing:
            steps = ((0x20, 0, 0, 0xFFFFF004), (0x15, 0, 1, 4),
                     (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0))
            code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI",
                                                                    *step) for step in steps))
            sock.setsockopt(socket.SOL_SOCKET, 26,
                            struct.pack("HP", len(steps), ctypes.addressof(code)))
        sock.bind(("eth0", 3))  # ETH_P_ALL
        yield packets
        time.sleep(0.2)  # the last packets are on their way
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                frame, ((_, _, stamp),), _, (_, _, direction, *_) = sock.recvmsg(1 << 16, 64)
                seconds, nanoseconds = struct.unpack("qq", stamp)
                packets.append(Packet(seconds + nanoseconds / 1e9, direction == 4,
                                      frame, *parts(frame)))

def parts(frame):
    """Both ports, TCP flags (of UDP: 0) and payload of a frame; None, None, None, b"" where it has
    none."""
    ip, six = frame[14:], frame[14] >> 4 == 6
    protocol, at = (ip[6], 40) if six else (ip[9], (ip[0] & 15) * 4)
    if frame[12:14] not in (b"\x08\0", b"\x86\xdd") or protocol not in (6, 17):
        return None, None, None, b""
    end = int.from_bytes(ip[4:6], "big") + 40 if six else int.from_bytes(ip[2:4], "big")
    start, flags = (at + (ip[at + 12] >> 4) * 4, ip[at + 13]) if protocol == 6 else (at + 8, 0)
    return *struct.unpack_from(">HH", ip, at), flags, ip[start:end]

def inject(host, frames, times=1):
    """Send frames from a host's eth0, in their order, all of them so many times."""
    with host.inside(socket.socket, socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        for frame in [*frames] * times:
            sock.send(frame)

def from_address(frame, ip):
    """An IPv4 frame as if it came from another address, checksums made right by scapy."""
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.l2 import Ether
    packet = Ether(frame)
    packet[IP].src = ip
    for layer in (IP, TCP, UDP):
        if layer in packet:
            del packet[layer].chksum
    return bytes(packet)

def gpg(home, *arguments, **options):
    """Run gpg without questions, as the keyring's owner."""
    words = ["--homedir", home, "--batch", "--yes", "--quiet", "--trust-model", "always",
             "--pinentry-mode", "loopback"]
    return sh(*as_user(os.stat(home).st_uid), "gpg", *words, "--passphrase", "", *arguments,
              cwd="/", **options)

def generate(home, user, algorithm="future-default", *options):
    """A key of a user, with an encryption subkey, in a keyring that is there -> its fingerprint."""
    gpg(home, *options, "--quick-generate-key", user, algorithm, "default", "never")
    key = fingerprint(home, user)
    if algorithm.startswith("rsa"):
        gpg(home, "--quick-add-key", key, algorithm, "encr")
    return key

def fingerprint(home, user):
    return re.search(r"(?m)^fpr:+(\w+)", gpg(home, "--with-colons", "--list-keys", user).stdout)[1]

def at_time(seconds):
    """gpg's option for a clock that is so many seconds from now."""
    return "--faked-system-time", time.strftime("%Y%m%dT%H%M%S", time.gmtime(time.time() + seconds))

def proc(pid, name):
    """The text of a file of proc(5)."""
    return Path(f"/proc/{pid}/{name}").read_text(errors="replace")

def children(pid):
    """The pids of the children of all of a process's threads."""
    words = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            words += proc(pid, f"task/{task}/children").split()
    return [int(word) for word in words]

def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return proc(pid, "stat").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

def descriptors(pid):
    """{number: what it is} of a process's open files."""
    links = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            links[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
    return links

def packet_sockets(pid):
    """The packet sockets of a process, each the words of its line in proc(5); the seventh: bytes
    that wait in it."""
    inodes = {link[8:-1] for link in descriptors(pid).values() if link.startswith("socket:")}
    rows = [line.split() for line in proc(pid, "net/packet").splitlines()]
    return [row for row in rows if row[8] in inodes]

def waiting(pid):
    """Bytes that wait in the packet socket of a process."""
    row, = packet_sockets(pid)
    return int(row[6])

def rss(pid):
    """Resident memory in MB."""
    return int(re.search(r"VmRSS:\s*(\d+)", proc(pid, "status"))[1]) / 1024

def link_state(host):
    """What `ip` knows of the host's interface."""
    return json.loads(host.run("ip", "-s", "-j", "link", "show", "dev", "eth0").stdout)[0]

# ---- pytest: the world, and knocks in it ---------------------------------------------------------

try:
    import pytest
except ImportError:  # the demo and the benchmarks do without: what marks a test then marks nothing
    class pytest:
        fixture = staticmethod(lambda function=None, **_: function or (lambda made: made))
        mark = SimpleNamespace(skipif=lambda *_, **__: lambda made: made,
                               parametrize=lambda *_: lambda made: made)

ALLOW = ("O 22", "C 22", "O 53/udp", "C 53/udp", "O 8022", "C 8022", "E id -u", "E echo *",
         "E sleep 60", "E false",
         "E head -c 100000 /dev/zero", "E yes", "E sh -c *", "E nonexistent-program")
NO_ANSWER, SYSTEM, DIED, REFUSED, MISSING = 75, 71, 70, 77, 69  # tariq.py --help
UDP = socket.AF_INET, socket.SOCK_DGRAM
SOON = 6  # seconds that a door is open where a test looks through it, then waits for its end

@pytest.fixture(scope="session")
def world():
    """A server with a closed firewall and an sshd, a client, somebody else, one enrolled user."""
    with Lab() as lab:
        yield new_world(lab, command_timeout=5)

def new_world(lab, drop=True, other="other", allow=ALLOW, **settings):
    """Three hosts and an enrolled user; the server does not run."""
    server, client, other = (lab.host(*host) for host in (("server", 10),
                                                          ("client", 20), (other, 30)))
    if drop:
        server.drop_policy()
    server.sshd()
    conf = make_server(lab, server, **settings)
    world = SimpleNamespace(lab=lab, server=server, client=client, other=other,
                            conf=conf, tariq=None,
                            ring=conf.parent / ".server-gpg")
    world.me = second_client(world, "client", allow, user="me@laptop")
    world.ports = [int(port) for port in config_values(world.me, "box")["secret_ports"].split(",")]
    return world

def started(world):
    """Start the world's server -> it."""
    world.tariq = Server(world.lab, world.server, world.conf).wait_log("listening for")
    return world.tariq

@pytest.fixture
def restored(world):
    """The world, whose configs stay as they were."""
    texts = {path: path.read_text() for path in (world.conf, world.me)}
    yield world
    for path, text in texts.items():
        write(path, text, path.parent.stat().st_uid)

@pytest.fixture
def idle(restored):
    """The world while no server runs."""
    if restored.tariq:
        assert restored.tariq.stop() == 0
        restored.tariq = None
    return restored

@pytest.fixture
def live(restored):
    """The world with a running server and every door closed, before and after."""
    if not restored.tariq or restored.tariq.process.poll() is not None:
        started(restored)
    for program, ip6 in (("iptables", False), ("ip6tables", True)):
        for rule in restored.server.rules(ip6):  # the chain's other rules are the server's own
            restored.server.run(program, *shlex.split(rule.replace("-A", "-D", 1)))
    before = len(restored.tariq.log)
    yield restored
    assert restored.tariq.process.poll() is None, restored.tariq.log
    if ": opened " in restored.tariq.log[before:]:  # what it remembers is no other test's
        assert restored.tariq.stop() == 0
        restored.tariq = None

SOME_PORTS = " ".join(map(str, [*range(20, 60), *range(2000, 2060), 8022]))

def variant(world, **settings):
    """The server's config with other settings, where the client may open and close many ports;
    returns its path."""
    many = f"    O {SOME_PORTS}\n    C {SOME_PORTS}\n"
    text = with_settings(world.conf.read_text(),
                         settings).replace("    O 22/tcp\n    C 22/tcp\n", many)
    return write(world.conf.with_name(f"tariq-{next(world.lab.count)}.conf"), text)

@contextmanager
def serving(world, prefix=(), ready="listening for", program=None, **settings):
    """A server meanwhile. However the test treated it: no traceback, and a clean end where it still
    runs."""
    server = Server(world.lab, world.server, variant(world, **settings), program, prefix)
    try:
        yield server.wait_log(ready)
        if server.process.poll() is None:
            assert server.stop() == 0
            if "open_command" not in settings:  # else what iptables has is an earlier test's
                assert world.server.rules() == world.server.rules(ip6=True) == []
        assert "Traceback" not in server.log
    except BaseException:
        print(server.log, file=sys.stderr)
        raise
    finally:
        server.kill()

def knock_words(world, *words, conf=None, where="box", timeout=LONG, transport=None, options=(),
    change=None,
                program=None):
    program = world.lab.program(change) if change else program or world.lab.dir / "tariq.py"
    options = ["-t", timeout, *(("--transport", transport) if transport else ()), *options]
    return [program, "knock", "-c", conf or world.me, *options, where, *(words or ("O", "22"))]

def knock(world, *words, user=NOBODY, host=None, **how):
    """Run a client to its end; by default to open port 22, the enrolled one, and unprivileged (but
    crafted)."""
    user = None if how.get("transport") == "crafted" else user
    return (host or world.client).run(*knock_words(world, *words, **how), user=user, check=False)

def opens(world, *words, **how):
    """Knock, insist that it worked, return what was printed."""
    done = knock(world, *words, **how)
    assert done.returncode == 0, f"{words}: exit {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout

def fails(world, code, said, *words, **how):
    """Knock, insist that it failed with this exit code, and that one line with these words is all
    it said."""
    done = knock(world, *words, **how)
    assert done.returncode == code and said in done.stderr and done.stdout == "", (words, how, done)
    assert re.fullmatch(r"tariq: [ -~]+\n", done.stderr), done
    assert not re.search(r"Errno|\\x|Traceback", done.stderr), done

@contextmanager
def knocking(world, *words, host=None, **how):
    """A client in the background."""
    process = (host or world.client).popen(*knock_words(world, *words, **how), user=NOBODY,
                                           stdout=PIPE, stderr=PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()

def second_client(world, name, allow=("O 22",), algorithm=None, options=(), conf=None, user=None):
    """A client of its own uid, perhaps with a certain kind of key, enrolled by the commands of the
    README; [box] is the server's IPv4 address, [box6] its IPv6 one. Returns its config's path."""
    path, user = world.lab.dir / name / "tariq.conf", user or f"{name}@example.com"
    server, run = world.server, world.lab.tariq
    if path.exists():  # of another test; its gpg-agent may take its sockets away meanwhile
        sh("rm", "-rf", path.parent)
    for directory in (path.parent, path.parent / "gpg"):
        sh("install", "-d", "-m", "700", "-o", NOBODY, "-g", NOBODY, directory)
    if algorithm:
        generate(path.parent / "gpg", user, algorithm, *options)
    public = run(world.client, "keygen", "-c", path, user, user=NOBODY).stdout
    flags = [word for pattern in allow for word in ("--allow", pattern)]
    profile = run(server, "enroll", "-c", conf or world.conf, *flags, input=public).stdout
    run(world.client, "join", "-c", path, "box", user=NOBODY, input=profile)
    start, _, section = path.read_text().partition("[box]\n")
    return write(path, f"{start}[box]\nhost = {server.ip}\n{section}\n[box6]\nhost = "
                       f"{server.ip6}\n{section}", NOBODY)

def deadline_of(printed):
    """'opened ... until 08:24:33Z' -> seconds since the epoch, at most half a day from now."""
    hours, minutes, seconds = map(int, re.search(r"until (\d+):(\d+):(\d+)Z", printed).groups())
    now = int(time.time())
    return now + (hours * 3600 + minutes * 60 + seconds - now + 43_200) % 86_400 - 43_200

# ---- a peer written from the README's table of bytes, not from tariq.py --------------------------

def keyed(key, label, data, size):
    return hashlib.blake2b(data, key=key, person=label, digest_size=size).digest()

def masked(key, label, nonce, data):
    return bytes(a ^ b for a,
                 b in zip(data, hashlib.shake_256(key + label + nonce).digest(len(data))))

def make_frame(key, label, data, age=0.0):
    """A frame; `age` seconds old."""
    nonce = os.urandom(12)
    body = nonce + masked(key, label, nonce,
                          int((time.time() - age) * 1000).to_bytes(6, "big") + data)
    return keyed(key, label, body, 16) + body

def open_frame(key, label, payload):
    """The data of a frame with this key and label, else None."""
    if len(payload) < 34 or keyed(key, label, payload[16:], 16) != payload[:16]:
        return None
    return masked(key, label, payload[16:28], payload[28:])[6:]

def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

def png_of(width, height, depth, color, data, extra=b"", interlace=0):
    """A PNG of raw rows, whatever is wrong with them."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT",
                                                                          zlib.compress(data))
            + chunk(b"IEND", b""))

def make_png(data):
    """A PNG with data and spaces in its lowest bits."""
    bits = [byte >> 7 - place & 1 for byte in data.ljust(486) for place in range(8)]
    samples = bytearray(os.urandom(36 * 108))
    for place, bit in enumerate(bits):
        samples[place] = samples[place] & 254 | bit
    return png_of(36, 36, 8, 2,
                  b"".join(b"\0" + samples[row:row + 108] for row in range(0, len(samples), 108)))

class Peer:
    """One knock of an enrolled client over UDP, each step by itself."""

    def __init__(self, world, *cmd, host=None, conf=None, **request):
        conf = conf or world.me
        values, self.user = config_values(conf, "box"), config_values(conf, "client")["user"]
        self.ports = [int(port) for port in values["secret_ports"].split(",")]
        ports = struct.pack(f">{len(self.ports)}H", *self.ports)
        self.K = keyed(base64.b64decode(values["secret"]), b"ports", ports, 32)
        self.host, self.server, self.to = host or world.client, world.server, values["server_key"]
        self.home, self.k, self.sealed = conf.parent / "gpg", os.urandom(32), b""
        self.id = keyed(self.k, b"id", b"", 12)
        self.request = {"to": self.to, "k": self.k.hex(), "cmd": list(cmd)
                        or ["O", "22/tcp"], **request}
        self.socket = self.host.inside(socket.socket, *UDP)
        self.socket.settimeout(LONG)

    def seal(self, plain=None, *options):
        """Sign and encrypt the request's PNG, or other bytes."""
        plain = make_png(json.dumps(self.request).encode()) if plain is None else plain
        options = options or ("-u", f"<{self.user}>", "-s", "-e")
        self.sealed = gpg(self.home, "--hidden-recipient", self.to, *options, input=plain,
                          text=False).stdout
        return self

    def frames(self, age=0.0, knock_id=None):
        """[(port, fragment's frame)]"""
        size = -(-len(self.sealed) // len(self.ports))
        return [(port, make_frame(self.K, b"knock", bytes([place]) + (knock_id or self.id)
                                  + self.sealed[place * size:][:size], age)) for place,
                port in enumerate(self.ports)]

    def send(self, frames, sock=None):
        for port, payload in frames:
            (sock or self.socket).sendto(payload, (self.server.ip, port))

    @property
    def reply_key(self):
        return keyed(self.k, b"reply", self.sealed, 32)

    def hear(self, label, timeout=LONG, sock=None):
        """The data of the next frame with this label, or None after the time."""
        sock, end = sock or self.socket, time.monotonic() + timeout
        while select.select([sock], [], [], max(0, end - time.monotonic()))[0]:
            payload, (_, port) = sock.recvfrom(2048)
            data = open_frame(self.reply_key, label, payload)
            if data is not None:
                assert port == self.ports[-1]
                return data
        return None

    def answer(self, nonce, sock=None):
        proof = keyed(self.reply_key, b"answer", nonce, 32)
        frame = make_frame(self.K, b"knock", bytes([len(self.ports)]) + self.id + proof)
        self.send([(self.ports[-1], frame)], sock)

    def knock(self):
        """The whole exchange -> the result."""
        self.seal()
        self.send(self.frames())
        challenge = self.hear(b"challenge")
        assert challenge is not None and challenge[34:].decode() == self.host.ip
        self.answer(challenge[:32])
        return self.hear(b"result")

def all_is_handled(world, server=None, ahead=0):
    """Wait until the listener has handled every packet that came before: last comes a knock of
    junk, which it refuses in silence, with one line in the log. ahead: seconds of the server's
    clock."""
    junk, server = Peer(world, host=world.other), server or world.tariq
    junk.sealed, words = os.urandom(4000), f"{world.other.ip}: knock refused: "
    before = server.log.count(words)
    junk.send(junk.frames(-ahead))
    server.wait_log(words, before + 1)
    assert not select.select([junk.socket], [], [], 0)[0], "an answer to junk"

# ---- frames, images, requests, configs: the parts by themselves ----------------------------------

KEY = bytes(range(32))

def test_frames_are_those_of_the_readme_in_both_directions_and_any_change_is_refused():
    for data in (b"", b"x", os.urandom(1166)):
        before = int(time.time() * 1000)
        stamp, opened = tariq.unframe(KEY, b"knock", make_frame(KEY, b"knock", data), len(data))
        assert opened == data and before <= stamp <= time.time() * 1000
        assert open_frame(KEY, b"challenge", tariq.frame(KEY, b"challenge", data)) == data
        assert tariq.unframe(KEY, b"result", make_frame(KEY, b"knock", data),
                             0) is None, "another label"
        assert tariq.unframe(bytes(32), b"knock", make_frame(KEY, b"knock", data),
                             0) is None, "another key"
        assert tariq.unframe(KEY, b"knock", make_frame(KEY, b"knock", data),
                             len(data) + 1) is None, "too short"
    assert tariq.unframe(KEY, b"knock", make_frame(KEY, b"knock", bytes(1167)), 0) is None, \
        "over 1,200 bytes"
    assert tariq.shared_key(KEY, [1, 2]) == keyed(KEY, b"ports", b"\0\1\0\2", 32)
    framed = tariq.frame(KEY, b"knock", b"some data")
    size, number = len(framed), int.from_bytes(framed, "big")
    for bit in range(size * 8):
        assert tariq.unframe(KEY, b"knock", (number ^ 1 << bit).to_bytes(size, "big"), 0) is None
        assert tariq.unframe(KEY, b"knock", framed[:bit // 8], 0) is None

def test_hidden_data_comes_back_from_empty_to_exact_capacity():
    for size in (0, 1, 2, 100, 485, 486):  # 36 * 36 * 3 / 8
        data = os.urandom(size)
        padded = data + b" " * (486 - size)
        assert tariq.extract(tariq.embed(tariq.cover_image(""),
                                         data)) == padded == tariq.extract(make_png(data))
    with pytest.raises(tariq.Fault, match="1 bytes too long"):
        tariq.embed(tariq.cover_image(""), bytes(487))
    assert len({len(tariq.embed(tariq.cover_image(""),
                                bytes(size))) for size in range(487)}) == 1, "it tells the size"

def test_a_cover_is_any_png_of_which_only_the_lowest_bits_change_else_a_clear_error(tmp_path):
    from PIL import Image
    path, files = tmp_path / "cover.png", [b"no PNG", b""]
    for directory in (tmp_path / "missing", tmp_path):
        with pytest.raises(tariq.Fault, match=f"{directory}.*PNG|PNG.*{directory}"):
            tariq.cover_image(str(directory))
    for mode, size in itertools.product(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
                                        ((1, 2), (36, 36), (640, 480))):
        Image.new(mode, size, int(mode == "P")).save(path,
                                                     **({"transparency": 0} if mode == "P" else {}))
        samples = tariq.cover_image(str(tmp_path))
        png = tariq.embed(samples, b"request")
        after = Image.open(io.BytesIO(png))
        assert (after.mode, after.size) == ("RGB", (36, 36)) \
            and tariq.extract(png).rstrip() == b"request"
        assert all(a >> 1 == b >> 1 for a, b in zip(samples, after.tobytes())) \
            and samples != after.tobytes()
    for kind, size in (("JPEG", (50, 50)), ("PNG", (90, 90))):
        Image.new("RGB", size).save(made := io.BytesIO(), kind)
        files.append(made.getvalue())
    for data in (*files[:-1], files[-1][:80]):
        path.write_bytes(data)
        with pytest.raises(tariq.Fault, match="cover.png cannot be read"):
            tariq.cover_image(str(tmp_path))

def test_requests_are_checked_word_by_word():
    good = {("O", "22"): ["O", "22/tcp"], ("C", "22/tcp", "53/udp"): ["C", "22/tcp", "53/udp"],
            ("O", "65535"): ["O", "65535/tcp"],
            ("E", "ls", "-l", "--", "ä b"): ["E", "ls", "-l", "--", "ä b"]}
    for words, result in good.items():
        assert tariq.command_of(list(words)) == result
    bad = [["O"], ["X", "22"], ["O", "0"], ["O", "-1"], ["O", "65536"],
           ["O", "022"], ["O", "22/sctp"],
           ["O", "22/tcp/tcp"], ["O", "٢٢"], ["O", "２２"], ["O", " 22"], ["O", "22\n"],
           ["O", ""],
           ["O", "1" * 5000],
           ["O", "--help"], ["E"], ["E", "a\nb"], ["E", "a\x1b[2J"], ["E", "\ud800"],
           ["E", "a\0b"], ["E", "\u202e"],
           [""], "O22", ("O", "22"), None]
    for words in bad:
        with pytest.raises(ValueError):
            tariq.command_of(words)

@pytest.mark.parametrize("may, good, bad", [
    ("O 22", ("O 22",), ("C 22", "O 22/udp", "O 22 23", "E 22")), ("O 22/tcp", ("O 22",), ()),
    ("O 22 80", ("O 80", "O 80 22"), ("O 8",)), ("O 22\nO 53/udp", ("O 22 53/udp",), ("O 53",)),
    ("", (), ("O 22", "E id")),
    ("E service httpd restart", ("E service httpd restart",),
     ("E service httpd", "E service httpd stop", "E service httpd restart now",
      "E 'service httpd restart'")),
    ("E echo *", ("E echo", "E echo a b"), ("E echoes", "E /bin/echo a", "O 22")),
    ("E cp * /backup", ("E cp x /backup",), ("E cp x y /backup", "E cp /backup")),
    ("E cat /var/log/*", (), ("E cat /var/log/../../etc/shadow",)),
    ("E false\nE id *", ("E id -u", "E false"), ("E true",))])
def test_policy_permits_what_a_pattern_says_and_nothing_else(may, good, bad):
    for request in (*good, *bad):
        command = tariq.command_of(shlex.split(request))
        assert (tariq.forbidden(tariq.parse("may", may),
                                command) == "") is (request in good), request

CONFIG = """[server]
secret_ports = 10000,7456,22022,12121,10001
secret = {secret}
server_gpg_dir = /ring
server_key = {key}
[allow me@laptop]
key = {key}
may =
    O 22  # comment
    E echo *
"""
PORTS_LINE = "secret_ports = 10000,7456,22022,12121,10001"
SECRET, PRINT = "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0ICEhISE=", \
    "0123456789abcdef0123456789ABCDEF01234567"

def write_config(path, text=CONFIG):
    return write(path, text.replace("{secret}", SECRET).replace("{key}", PRINT), os.geteuid())

def test_a_config_gives_checked_values_and_the_example_is_one_with_every_key(tmp_path):
    config = tariq.Config(write_config(tmp_path / "tariq.conf"))
    assert config.get("secret_ports") == [10000, 7456, 22022, 12121, 10001] \
        and len(config.get("secret")) == 32
    assert config.clients == {PRINT.upper(): "allow me@laptop"}
    assert config.get("may", ["allow me@laptop"]) == [["O", "22/tcp"], ["E", "echo", "*"]]
    assert config.get("open_timeout", ["allow me@laptop", "server"], 3600) == 3600
    marked = "\ufeff" + (tmp_path / "tariq.conf").read_text()  # as some editors begin a file
    assert tariq.Config(write_config(tmp_path / "tariq.conf", marked)).values == config.values
    text = (HERE / "tariq.conf.example").read_text().replace("secret =", f"secret = {SECRET}")
    config = tariq.Config(write_config(tmp_path / "tariq.conf", text))
    found = [(key, section) for section in config.ini.sections() for key in config.ini[section]]
    assert config.faults == {} and len(config.clients) == 1
    assert {key for key, _ in found} == set(tariq.SYNTAX)
    code = TARIQ.read_text().replace("open_{protocol}_port", 'open_tcp_port" "open_udp_port')
    assert [key for key in tariq.SYNTAX if len(re.findall(rf"\b{key}\"",
        code)) < 2] == [], "nothing reads it"

@pytest.mark.parametrize("old, new, section, words", [
    (PORTS_LINE, "secret_ports = 1,2,3,4", "server", "secret_ports has to be 5 to 32"),
    (PORTS_LINE, "secret_ports = 1,2,3,4,4", "server", "different ports"),
    (PORTS_LINE, "secret_ports = 1,2,3,4,65536", "server", "secret_ports"),
    (PORTS_LINE, "secret_ports = 1,2,3,4,x", "server", "secret_ports"),
    (PORTS_LINE, "", "server", "secret_ports is missing"), ("{secret}", "", "server",
    "secret is missing"),
    ("{secret}", "c2VjcmV0", "server", "secret has to be 32"), ("{secret}", "!" * 44, "server",
    "secret has to be 32"),
    ("server_key = {key}", "", "server", "server_key is missing"),
    ("server_gpg_dir = /ring", "", "server", "server_gpg_dir is missing"),
    ("[allow", "open_tcp_port = -A tariq -s {ip} -j ACCEPT\n[allow", "server", "open_tcp_port has "
    "to be a rule"),
    ("[allow", "open_tcp_port = -s {ip} -p tcp --dport {dport} -j ACCEPT\n[allow", "server",
    "-A CHAIN"),
    ("[allow", "open_udp_port = -A tariq --dport {dport}\n[allow", "server", "open_udp_port has to "
    "be a rule"),
    ("[allow", "open_tcp_port = -A tariq {ip} {dport} 'x\n[allow", "server", "open_tcp_port has to "
    "be a rule"),
    ("[allow", "command_timeout = 0\n[allow", "server", "1 to 999"),
    ("[allow", "command_timeout = 1000\n[allow", "server", "1 to 999"),
    ("[allow", "iptables_chain = INPUT\n[allow", "server", "a chain of its own"),
    ("[allow", "iptables_chain = ACCEPT\n[allow", "server", "a chain of its own"),
    # a target: it would open all
    ("[allow", "open_timout = 1\n[allow", "server", "open_timout is no key"),
    ("secret = {secret}", "secret =\n{secret}", "server", "c2vjcmv0ihnly3jl is no key"),
    # 16 of its 44 at most
    ("    O 22", "    O 99999", "allow me@laptop", "may has to be lines of O PORT"),
    ("    O 22", "    X 22", "allow me@laptop", "may"), ("    O 22", '    E "unbalanced',
    "allow me@laptop", "may"),
    ("[allow me@laptop]\nkey = {key}", "[allow me@laptop]\nkey = 0123", "allow me@laptop",
    "a key's fingerprint"),
    ("[allow me@laptop]\nkey = {key}", "[allow me@laptop]", "allow me@laptop", "key is missing"),
    ("may =", "open_timeout = soon\nmay =", "allow me@laptop", "open_timeout has to be a whole "
    "number"),
    ("may =", "open_timout = 1\nmay =", "allow me@laptop", "open_timout is no key"),
    ("may =", "open_command = x {ip} {dport}\nmay =", "allow me@laptop", "open_command is no key")])
def test_each_fault_of_a_config_names_file_section_and_key_and_no_secret(tmp_path, old, new,
    section, words):
    assert CONFIG.count(old) == 1
    path = write_config(tmp_path / "tariq.conf", CONFIG.replace(old, new))
    config = tariq.Config(path)
    assert list(config.faults) == [section], "the others hold"
    config.require(*({"server", "allow me@laptop"} - {section}))
    with pytest.raises(tariq.Fault) as caught:
        config.require(section)
    assert caught.value.code == 78 and str(caught.value) == config.faults[section][0]
    said = "\n".join(config.faults[section])
    assert f"{path}: [{section}] " in said and words in said
    assert SECRET not in said and "1,2,3,4" not in said

@pytest.mark.parametrize("section", ["allow", "allow -x", "allow two words", "allow .", "allow é"])
def test_a_section_allow_without_a_name_is_a_fault_and_allows_nobody(tmp_path, section):
    """Names reach the command lines of an open_command: none may look like an option there."""
    text = CONFIG.replace("[allow me@laptop]", f"[{section}]")
    config = tariq.Config(write_config(tmp_path / "tariq.conf", text))
    assert config.all_faults() == [
        f"{config.path}: [{section}] names no client: write [allow NAME], a word of letters and "
        "digits, with . _ @ + - in it."]
    assert set(config.clients.values()) <= {section}, "which has a fault: it is refused"

def test_a_section_default_is_no_other_sections_default(tmp_path):
    text = CONFIG.replace("[server]", "[DEFAULT]\nopen_timeout = 1\n[server]")
    config = tariq.Config(write_config(tmp_path / "tariq.conf", text))
    assert config.get("open_timeout", ["allow me@laptop", "server"],
        3600) == 3600 and not config.faults

def test_every_fault_of_a_config_is_found_at_once(tmp_path):
    faulty = CONFIG.replace("{secret}", "x").replace(PORTS_LINE, "").replace("    O 22",
        "    O 99999")
    config = tariq.Config(write_config(tmp_path / "tariq.conf", f"{faulty}[allow two]\nkey = "
        f"0123\nmay = X\n"))
    assert {section: len(lines) for section, lines in config.faults.items()} == {
        "server": 2, "allow me@laptop": 1, "allow two": 2}

def test_a_file_that_is_no_ini_or_names_a_key_twice_is_refused_without_a_word_of_it(tmp_path):
    path = tmp_path / "tariq.conf"
    for text in ("no section", f"[server]\nno value\n{SECRET}", "[a]\nx = 1\nx = 2\n",
                 "[a]\n[a]\n", "\xff\xfe"):
        write(path, "", os.geteuid()).write_bytes(text.encode("latin-1"))
        with pytest.raises(tariq.Fault, match="is no INI file") as caught:
            tariq.Config(path)
        assert SECRET not in str(caught.value) and caught.value.code == 78

def test_two_sections_with_one_key_are_both_faulty(tmp_path):
    """Who is it? Neither, then: what the two may do differs."""
    text = f"{CONFIG}[allow twin]\nkey = {PRINT.lower()}\n[allow third]\nkey = {'0' * 40}\n"
    config = tariq.Config(write_config(tmp_path / "tariq.conf", text))
    assert set(config.faults) == {"allow me@laptop", "allow twin"}
    assert "that of [allow twin]" in config.faults["allow me@laptop"][0]
    assert config.clients[PRINT.upper()] in config.faults \
        and config.clients["0" * 40] == "allow third"

# ---- nothing of a stranger's gets past one hash: fuzzing -----------------------------------------

CASES = int(os.environ.get("TARIQ_FUZZ_CASES", 200_000))
PORTS = [1000, 2000, 3000, 4000, 5000]
LINK = ("eth0", 0x0800, 0, 1, bytes(6))

def bare_listener():
    """A Listener without sockets; what it tells the monitor is in its `told`."""
    settings = {"ports": PORTS, "shared": KEY.hex(), "home": "/", "own_key": "0" * 40,
                "patience": 30}
    listener = tariq.Listener(None, None, settings)
    listener.began = 0  # frames of this very second are good
    listener.told = []
    listener.tell = lambda **message: listener.told.append(message)
    return listener

def packet_of(port, payload, version=4, udp=False, options=b"", flags=2):
    """An IP packet made by hand: what a fuzzer mutates."""
    ports, protocol = b"\x10\x00" + port.to_bytes(2, "big"), b"\x11" if udp else b"\x06"
    if udp:
        upper = ports + (8 + len(payload)).to_bytes(2, "big") + bytes(2) + payload
    else:
        upper = ports + bytes(8) + bytes([(5 + len(options) // 4) << 4,
                                          flags]) + bytes(6) + options + payload
    if version == 6:
        return b"\x60\0\0\0" + len(upper).to_bytes(2,
                                                   "big") + protocol + b"\x40" + bytes(32) + upper
    return b"\x45\0" + (20 + len(upper)).to_bytes(2,
                                                  "big") + bytes(5) + protocol + bytes(10) + upper

def test_the_gate_passes_a_frame_once_and_at_its_own_port_only(monkeypatch):
    listener = bare_listener()
    for version, udp, position in itertools.product((4, 6), (False, True), range(6)):
        data, own = bytes([position]) + b"i" * 12 + b"piece", PORTS[min(position, 4)]
        for port in PORTS:
            if port != own:
                assert listener.gate(packet_of(port, make_frame(KEY, b"knock", data), version,
                                               udp), LINK) is None
        packet = packet_of(own, make_frame(KEY, b"knock", data), version, udp,
                           options=b"\x02\x04\x05\xb4")
        assert listener.gate(packet, LINK)[:3] == (position, b"i" * 12, b"piece")
        assert listener.gate(packet, LINK) is None, "the same bytes twice are a replay"

def test_frames_from_before_the_listener_began_or_of_another_minute_are_refused(monkeypatch):
    listener, now = bare_listener(), time.time()
    monkeypatch.setattr(tariq.time, "time", lambda: now)  # it stands still, also for make_frame
    def passes(age):
        return bool(listener.gate(packet_of(1000,
                                            make_frame(KEY, b"knock",
                                                       b"\0" + b"i" * 13, age)), LINK))
    for age, good in ((58, True), (-58, True), (62, False), (-62, False), (3600, False)):
        assert passes(age) is good, age
    listener.began = now
    for age, good in ((0.01, False), (30, False), (-5, True)):
        assert passes(age) is good, age
    # the clock was put back: knocks go on working
    monkeypatch.setattr(tariq.time, "time", lambda: now - 3600)
    assert passes(0)

def test_the_replay_memory_is_bounded_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(tariq, "SEEN_MAX", 5)
    listener = bare_listener()
    packets = [packet_of(1000, make_frame(KEY, b"knock", b"\0" + b"i" * 13)) for _ in range(8)]
    assert all(listener.gate(packet, LINK) for packet in packets) and len(listener.seen) == 5
    assert [bool(listener.gate(packet, LINK)) for packet in packets[:2:-1]] == [False] * 5, \
        "the newest are known"

def test_a_nonce_that_is_another_knocks_id_does_not_end_that_knock(monkeypatch):
    """Both have twelve bytes; who has the secret chooses his nonces."""
    listener, knock_id = bare_listener(), os.urandom(12)
    monkeypatch.setattr(listener, "serve", lambda *_: None)
    assert listener.remember(knock_id)
    for place in range(5):
        packet = tariq.Packet(b"new1", b"", 1, PORTS[place], b"", b"", LINK)
        listener.collect(place, knock_id, b"piece", packet)
    assert list(listener.knocks) == [knock_id]

def test_a_result_that_comes_when_its_knock_has_ended_keeps_no_later_one_from_its_own():
    listener, (listener.channel, monitor) = bare_listener(), socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET)
    knock = listener.knocks[b"a knock's id"] = tariq.Knock()
    with listener.channel, monitor:
        monitor.send(b"that of none" + b"late")
        monitor.send(b"a knock's id" + b"in time")
        monitor.shutdown(socket.SHUT_WR)
        listener.take_results()
    assert knock.result.get_nowait() == b"in time" and knock.result.empty()

def test_garbage_never_passes_the_gate_nor_leaves_anything_there():
    """Random, truncated and mutated packets before the tag."""
    chance, listener = random.Random(1), bare_listener()
    good = [packet_of(PORTS[place],
                      make_frame(KEY, b"knock", bytes([place]) + bytes(12 + size)), version, udp)
            for place in range(5) for size in (1, 40, 900) for version in (4,
                    6) for udp in (False, True)]
    for case in range(CASES):
        packet = bytearray(chance.choice(good))
        if case % 4 == 0:
            packet = chance.randbytes(chance.randrange(0, 200))
        elif case % 4 == 1:
            packet = packet_of(chance.choice(PORTS), chance.randbytes(chance.randrange(0, 300)),
                               chance.choice((4, 6)),
                               chance.random() < 0.5, flags=chance.choice((2, 0x10, 0x18, 0x12)))
        elif case % 4 == 2:
            packet = packet[:chance.randrange(len(packet))]
            for _ in range(chance.randrange(3) if packet else 0):
                packet[chance.randrange(len(packet))] = chance.randrange(256)
        else:  # at least one bit of what the tag covers
            at, protocol = (40, packet[6]) if packet[0] >> 4 == 6 else (20, packet[9])
            packet[chance.randrange(at + (8 if protocol == 17 else 20),
                                    len(packet))] ^= 1 << chance.randrange(8)
        assert listener.gate(bytes(packet), LINK) is None, packet.hex()
    assert not listener.seen and not listener.knocks and not listener.partial and not listener.told

def test_whatever_length_a_header_claims_an_authentic_packet_is_answered():
    payload = make_frame(KEY, b"knock", bytes([4]) + bytes(40))
    for length, flags in itertools.product(range(16), (2, 0x10)):
        packet = bytearray(packet_of(PORTS[4], payload, flags=flags))
        packet[32] = length << 4
        assert tariq.respond(tariq.split(bytes(packet), LINK), b"reply").endswith(b"reply")

def test_what_holders_of_the_secret_send_raises_nothing_and_is_bounded(monkeypatch):
    """After the tag: frames of every length with random contents, through gate and reassembly; no
    gpg is run."""
    chance, listener, served = random.Random(2), bare_listener(), []
    monkeypatch.setattr(tariq, "SEEN_MAX", 1000)
    monkeypatch.setattr(listener, "serve", lambda knock_id, knock: served.append(knock_id))
    for case in range(CASES // 10):
        data = chance.randbytes(chance.choice((0, 1, 12, 13, 14, 45, 900, 1166)))
        data = bytes([chance.randrange(7)])[:len(data)] + data[1:]
        if case % 2 and len(data) > 13:
            data = data[:1] + b"constant id%d" % (case % 50 // 10) + data[13:]
        frame = make_frame(KEY, b"knock", data)
        packet = packet_of(chance.choice(PORTS), frame, chance.choice((4, 6)),
                           chance.random() < 0.5)
        if passed := listener.gate(packet, LINK):
            listener.collect(*passed)
        assert len(listener.knocks) <= 512 and len(listener.partial) <= 512 \
            and len(listener.seen) <= 1000
    assert served, "some were whole"

def test_knocks_are_bounded_in_all_and_by_address_and_answered_ones_do_not_count(monkeypatch):
    listener = bare_listener()
    monkeypatch.setattr(listener, "serve", lambda *_: None)
    def taken(addresses):
        """A whole knock from each address -> how many were given a thread."""
        before = len(listener.knocks)
        for address in addresses:
            knock_id = os.urandom(12)
            for place in range(5):
                packet = tariq.Packet(address, b"", 1, PORTS[place], b"", b"", LINK)
                listener.collect(place, knock_id, b"junk", packet)
        return len(listener.knocks) - before
    assert taken([b"\xc0\0\2\1"] * 40) == 16
    assert taken([bytes(8) + os.urandom(8) for _ in range(40)]) == 16, "one IPv6 /64"
    for knock in listener.knocks.values():
        knock.source = None
    assert taken([b"\xc0\0\2\1"] * 40) == 16, "an office behind one NAT"
    assert taken([number.to_bytes(4, "big") for number in range(1000)]) == 512 - 48
    for number in range(1000):  # fragments only: the oldest goes
        packet = tariq.Packet(b"new1", b"", 1, 1000, b"", b"", LINK)
        listener.collect(0, number.to_bytes(12, "big"), b"", packet)
    assert len(listener.partial) == 512 and (999).to_bytes(12, "big") in listener.partial

def test_hostile_images_are_refused():
    """Random, truncated, mutated and hostile PNGs: no pixel of a bomb is decoded."""
    from PIL import Image
    chance, good, rows = random.Random(3), make_png(b"{}" * 100), bytes(36 * 109)
    text_bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))
    images = [png_of(60000, 60000, 8, 2, bytes(1000)),
              png_of(36, 36, 16, 2, bytes(36 * (1 + 36 * 6))),
              png_of(36, 36, 8, 3, bytes(36 * 37)), png_of(36, 36, 8, 2, b""),
              png_of(36, 36, 8, 2, bytes(10)),
              png_of(36, 36, 8, 6, bytes(36 * 145)), png_of(0, 0, 8, 2, b""),
              png_of(36, 36, 8, 2, rows, text_bomb),
              png_of(36, 36, 8, 2, b"\xff" * len(rows)), png_of(2**31 - 1, 1, 8, 2, b""),
              png_of(36, 36, 8, 2, rows, interlace=1)]
    for case in range(CASES // 20):
        data = bytearray(good[:chance.randrange(len(good))] if case % 3 == 0 else good)
        for _ in range(chance.randrange(1, 8) if data else 0):
            data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
        images.append(bytes(data) if case % 2 else chance.randbytes(case % 300))
    sizes = set()
    for image in images:
        with suppress(Exception):
            sizes.add(len(tariq.extract(image)))
    assert sizes <= {486}
    for mode, size in (("RGB", (35, 36)), ("RGB", (400, 400)), ("P", (36, 36)),
                       ("RGBA", (36, 36)), ("L", (36, 36))):
        Image.new(mode, size).save(output := io.BytesIO(), "PNG")
        with pytest.raises(ValueError):
            tariq.extract(output.getvalue())

def test_hostile_openpgp_is_refused_within_bounds(world, monkeypatch):
    """Mutated, truncated, unsigned, doubly signed, bombs, symmetric, signed only: each a Fault,
    never a plaintext."""
    def made(data, *arguments, **options):
        return gpg(home, *arguments, input=data, text=False, **options).stdout
    monkeypatch.setattr(tariq, "UNSEAL_TIME", LONG)  # so that none is refused for a slow machine
    home, chance, yesterday = world.lab.dir / "hostile", random.Random(4), at_time(-86400)
    home.mkdir(0o700)
    one, two = (generate(home, user, "future-default", *yesterday) for user in ("one@example.com",
                                                                                "two@example.com"))
    signed = "-u", one, "-r", two, "-s", "-e"
    sealed = tariq.seal(str(home), b"plain" * 100, one, two)
    bomb = made(bytes(8_000_000), *signed, "--compress-algo", "bzip2")
    assert len(bomb) < 2000, "a bomb that fits a knock"
    flips = [(number, 1 << chance.randrange(8)) for number in chance.sample(range(len(sealed)), 40)]
    hostile = [made(b"x", "-r", two, "-e"), made(b"x", "-u", one, "-s"),
               made(b"x", "--store"), b"", bomb,
               made(b"x", "--clearsign"), made(b"x", "-u", two, *signed), sealed + sealed,
               made(b"x" * 8193, *signed),
               made(b"x", "--passphrase", "x", "--symmetric"), made(b"x", *at_time(-700), *signed),
               *(sealed[:size] for size in chance.sample(range(len(sealed)), 20)),
               *(sealed[:place] + bytes([sealed[place] ^ bit]) + sealed[place + 1:]
                 for place, bit in flips)]
    for message in hostile:
        with pytest.raises(tariq.Fault):
            tariq.unseal(str(home), message, two)
    late = made(b"x", *at_time(-500), *signed)  # pinentry may take nine minutes
    made(b"", "--quick-add-key", one, "ed25519", "sign")
    by_subkey = made(b"x", *signed)  # its primary key counts
    for message, plain in ((sealed, b"plain" * 100), (late, b"x"), (by_subkey, b"x")):
        assert tariq.unseal(str(home), message, two) == (one, plain)
    packets = made(sealed, "--list-packets", check=False)
    assert b"keyid 0000000000000000" in packets \
        and one[-16:].encode() not in packets.split(b":encrypted")[0], "hidden"
    sh("gpgconf", "--homedir", home, "--kill", "gpg-agent")

@pytest.mark.parametrize("prefix", ["x", "[GNUPG:]"])
def test_a_file_name_that_looks_like_gpgs_status_lines_proves_nothing(world, prefix):
    """gpg escapes ASCII in the name of a message's file; U+2028 and U+00A0 it passes on."""
    home = world.lab.new("forger")
    home.mkdir(0o700)
    victim, server = (generate(home, user) for user in ("victim@example.com", "server@example.com"))
    valid = ["VALIDSIG", "1", "1", str(int(time.time())), *"1111111"[:6], victim]
    lines = [["NEWSIG"], ["GOODSIG"], valid]
    name = "a" + "".join(f"\u2028{prefix}\u00a0" + "\u00a0".join(line) for line in lines)
    unsigned = gpg(home, "--set-filename", name, "-r", server, "-e", input=b"x", text=False).stdout
    with pytest.raises(tariq.Fault, match="not one encrypted message with one valid signature"):
        tariq.unseal(str(home), unsigned, server)
    sh("gpgconf", "--homedir", home, "--kill", "gpg-agent")


# ---- both sides prove who they are: the exchange, spoken by the peer -----------------------------

def test_the_exchange_is_the_readmes_and_the_secret_alone_passes_no_challenge_off_as_a_result(live):
    """Replies are under a key that only who unsealed the request has: nothing under K or with
    another label is one."""
    peer = Peer(live, "O", "22/tcp").seal()
    peer.send(peer.frames())
    payload = peer.socket.recv(2048)
    challenge = open_frame(peer.reply_key, b"challenge", payload)
    assert challenge[34:].decode() == live.client.ip \
        and open_frame(peer.K, b"challenge", payload) is None
    assert open_frame(peer.K, b"result", payload) is open_frame(peer.reply_key,
                                                                b"result", payload) is None
    peer.answer(challenge[:32])
    result = peer.hear(b"result")
    assert result[:2] == b"\x01\x00" \
        and result[2:].decode().startswith(f"opened tcp/22 for {live.client.ip} until ")
    assert len(live.server.rules()) == 1
    assert Peer(live, "E", "echo", "hi").knock() == b"\x01\x00hi\n"
    assert Peer(live, "O", "23/tcp").knock()[:2] == b"\x00\x4d"

def test_signed_but_hostile_requests_are_refused_and_the_server_goes_on_and_repeats_start_no_gpg(
        live):
    good = Peer(live).request
    changes = [{"to": good["to"].lower()}, {"to": None}, {"to": "0" * 40},
               {"k": "00" * 32}, {"k": None},
               {"k": "00" * 65}, {"cmd": None}, {"cmd": []}, {"cmd": "Eid"}, {"cmd": ["O", 22]},
               {"cmd": ["O", ["22"]]},
               {"cmd": ["E", "a\nb"]}]
    hostile = [b"", b"null", b"[]", b"{}", b"1", b"\xff\xfe", b"[" * 484, b'{"a":' * 90,
               b"9" * 484, b"NaN",
               b'{"to":"\\ud800"}', *(json.dumps({**good,
                                                  **change}).encode() for change in changes)]
    for png in (*map(make_png, random.Random(5).sample(hostile, 12)), b"x" * 4000):
        peer, before = Peer(live).seal(png), live.tariq.log.count("knock refused")
        peer.send(peer.frames())
        wait_for(lambda: live.tariq.log.count("knock refused") > before, png)  # noqa: B023
        assert peer.hear(b"challenge", 0) is None
    for _ in range(5):
        peer.send(peer.frames())
    assert Peer(live).knock()[:1] == b"\x01"  # those five came before it
    assert live.tariq.log.count("knock refused") == before + 1

def test_a_wrong_answer_opens_nothing_and_the_right_one_still_does(live):
    peer = Peer(live).seal()
    peer.send(peer.frames())
    nonce = peer.hear(b"challenge")[:32]
    def the_challenge_comes_again():
        return open_frame(peer.reply_key, b"challenge", peer.socket.recv(2048))[:32] == nonce
    for wrong in (bytes(32), nonce[:31]):
        peer.answer(wrong)
        assert the_challenge_comes_again()
    for _ in range(2):
        peer.send([(peer.ports[-1], make_frame(peer.K, b"knock", bytes([5]) + peer.id))])
        assert the_challenge_comes_again() and live.server.rules() == []
        peer.answer(nonce, live.other.inside(socket.socket,
            *UDP))  # right, but from another address
    peer.answer(nonce)
    assert peer.hear(b"result")[:1] == b"\x01" and len(live.server.rules()) == 1
    again = live.tariq.log.count(": opened")
    peer.answer(nonce)
    assert peer.hear(b"result")[:1] == b"\x01" and live.tariq.log.count(": opened") == again, \
        "said, not done again"

def test_the_first_last_fragment_says_whose_knock_it_is(live):
    """A sniffer who has the secret sends the last fragment again, from his address, while the knock
    is collected."""
    peer, thief = Peer(live).seal(), Peer(live, host=live.other)
    *first, last = peer.frames()
    for sender, frames in ((peer, [last]), (thief, [peer.frames()[-1]]), (peer, first)):
        sender.send(frames)
        wait_for(lambda: waiting(live.tariq.listener) == 0, "the listener reads nothing")
    assert peer.hear(b"challenge")[34:].decode() == live.client.ip
    all_is_handled(live)
    assert peer.hear(b"challenge", 0, thief.socket) is None

def test_an_old_request_in_new_frames_and_one_of_another_knock_or_server_are_refused(live):
    old = Peer(live, conf=second_client(live, "aged", algorithm="future-default",
                                        options=at_time(-86400)))
    then = *at_time(-660), "--ignore-time-conflict", "--ignore-valid-from"
    old.seal(None, *then, "-u", f"<{old.user}>", "-s", "-e").send(old.frames())
    wait_for(lambda: re.search("signed it 6[6-9]. s ago", live.tariq.log), "it is not refused")
    other, elsewhere = Peer(live).seal(), Peer(live, to="0" * 40).seal()
    other.send(other.frames(knock_id=os.urandom(12)))
    elsewhere.send(elsewhere.frames())
    live.tariq.wait_log("for another server or knock", 2)
    late, early = Peer(live).seal(), Peer(live).seal()
    late.send(late.frames(62))
    early.send(early.frames(-120))  # a minute for a slow machine
    all_is_handled(live)
    assert Peer(live).knock()[:1] == b"\x01"
    assert [peer.hear(b"challenge", 0) for peer in (old, other, elsewhere, late,
        early)] == [None] * 5

def test_an_answer_has_thirty_seconds_and_none_after_them_counts(idle):
    assert tariq.ANSWER_TIME == 30 and in_the_readme("It waits 30 seconds for the answer")
    with serving(idle, program=idle.lab.program("tariq.ANSWER_TIME = 2")) as server:
        peer, began = Peer(idle).seal(), time.monotonic()
        peer.send(peer.frames())
        nonce = peer.hear(b"challenge")[:32]
        server.wait_log("did not answer it")
        assert time.monotonic() - began >= 2
        peer.answer(nonce)
        all_is_handled(idle, server)
        assert peer.hear(b"result", 0) is None and idle.server.rules() == []

def test_a_result_is_repeated_for_ten_seconds_to_whoever_asks_again_and_not_afterwards(idle):
    assert tariq.REPEAT_TIME == 10 and in_the_readme("repeats a result for 10 seconds")
    for seconds in (LONG, 0):
        with serving(idle, program=idle.lab.program(f"tariq.REPEAT_TIME = {seconds}")) as server:
            peer = Peer(idle)
            assert peer.knock()[:1] == b"\x01"
            for _ in range(3):
                peer.send(peer.frames()[-1:])
                assert not seconds or peer.hear(b"result")[:1] == b"\x01"
            all_is_handled(idle, server)
            assert seconds or peer.hear(b"result", 0) is None
            assert server.log.count(": opened") == 1, "it acts once"

@pytest.fixture
def strict(restored):
    """The world with a running server of its own, whose gpg has no more time than Tariq gives
    it."""
    world = SimpleNamespace(**vars(restored))
    if restored.tariq:
        assert restored.tariq.stop() == 0
        restored.tariq = None
    program = restored.lab.program(f"tariq.UNSEAL_TIME = {tariq.UNSEAL_TIME}")
    with serving(restored, program=program) as world.tariq:
        yield world

def test_a_bomb_of_nested_compression_is_worth_a_second_and_keeps_nobody_out(strict):
    """Unsigned, from a holder of the secret: encrypted to the server with its public key, which
    each client has."""
    # of indeterminate length (RFC 4880, 4.2.1)
    literal = bz2.compress(b"\xafb\0" + bytes(100_000_000))
    # Its second block, 46 MB of zeros, 3,000 times: minutes of gpg on any machine.
    bits, block = f"{int.from_bytes(literal, 'big'):0{8 * len(literal)}b}", f"{0x314159265359:048b}"
    head, first, second, *_ = bits.split(block)
    bits = block.join([head, first, *[second] * 3000])
    literal = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    bomb = b"\xa3\x03" + bz2.compress(b"\xa3\x03" + literal)
    attackers = [Peer(strict, host=strict.other) for _ in range(12)]
    sealed = attackers[0].seal(bomb, "--no-literal", "--compress-algo", "none", "-e").sealed
    assert len(sealed) < 5000
    for attacker in attackers:
        attacker.sealed = sealed
        attacker.send(attacker.frames())
    # A second may be too little beside four of them; then somebody who knows what he wants knocks
    # again.
    wait_for(lambda: knock(strict, timeout=10).returncode == 0, "nobody gets in")
    refused = f"{strict.other.ip}: knock refused: "
    wait_for(lambda: strict.tariq.log.count(refused) >= 12, "the bombs are not over")
    ended = re.findall(f"{refused}.*not done in {tariq.UNSEAL_TIME} s", strict.tariq.log)
    assert len(ended) >= 12 and strict.tariq.process.poll() is None, "each was ended at its time"
    before, noisy = strict.tariq.log.count(refused), Peer(strict, host=strict.other)
    signature = b"\x88\x1d" + bytes.fromhex(
        "040001080006 050200000001 000a 0910 0123456789abcdef 0000 0008 80")
    noisy.sealed = b"\xa3\x02" + zlib.compress(signature * 700)  # each has a line in gpg's words
    noisy.send(noisy.frames())
    wait_for(lambda: strict.tariq.log.count(refused) > before, "the refusal is not logged")
    assert "malformed" not in strict.tariq.log

# ---- a knock opens one port for one address, and runs what it may --------------------------------

def test_an_unprivileged_knock_opens_the_port_for_its_address_alone_and_nmap_sees_nothing(live):
    def scan():
        """Every port of the server, as nmap on a third host sees it."""
        report = live.other.run("nmap", "-n", "-Pn", "-sS", "-p-", "--min-rate", "30000",
                                "--max-retries", "0",
                               "-oG", "-", live.server.ip).stdout
        assert "Ports:" not in report or "/open/" not in report and "/closed/" not in report, report
    scan()
    assert not live.client.connects(live.server.ip)
    done = knock(live)
    assert done.returncode == 0 and done.stderr == ""
    assert re.fullmatch(rf"opened tcp/22 on box for {live.client.ip} until \d\d:\d\d:\d\dZ\n",
                        done.stdout)
    assert live.client.connects(live.server.ip) and not live.other.connects(live.server.ip)
    scan()
    assert opens(live, "C", "22") == f"closed tcp/22 on box for {live.client.ip}\n"
    assert not live.client.connects(live.server.ip)

@pytest.mark.parametrize("where", ["box", "box6"])
@pytest.mark.parametrize("transport", ["kernel", "udp", "crafted"])
def test_all_transports_knock_over_both_families(live, transport, where):
    address, own = (live.server.ip,
                    live.client.ip) if where == "box" else (live.server.ip6, live.client.ip6)
    done = knock(live, where=where, transport=transport, options=["-v"])
    assert f"opened tcp/22 on {where} for {own} until" in done.stdout, done.stderr + live.tariq.log
    assert f"by {transport}" in done.stderr
    assert live.client.connects(address) and not live.other.connects(address)
    opens(live, "C", "22", where=where, transport=transport)
    assert not live.client.connects(address)

def test_without_transport_a_client_takes_turns_kernel_first_also_as_root(live):
    for user in (None, NOBODY):
        done = knock(live, "C", "22", user=user, options=["-v"])
        assert done.returncode == 0 and re.findall("by (kernel|udp)", done.stderr)[0] == "kernel"
    edit(live.me, (live.server.ip, "198.51.100.99"))
    with knocking(live, "C", "22", options=["-v"]) as turns:
        said = itertools.islice(filter(re.compile("by (kernel|udp)").search, turns.stderr), 4)
        assert re.findall("by (kernel|udp)", "".join(said)) == ["kernel", "udp"] * 2

def test_hosts_are_names_aliases_or_literal_addresses(live):
    text = live.me.read_text().replace(f"host = {live.server.ip}\n", "")
    names = "".join(f"{ip} box.example.com\n" for ip in (live.server.ip6, live.server.ip))
    hosts = write(live.lab.new("hosts"), f"127.0.0.1 localhost\n{names}", mode=0o644)
    covered = "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', hosts, *as_user(NOBODY)
    for name, options, own in (("box.example.com", ["-4"], live.client.ip), (live.server.ip, [],
        live.client.ip),
                               ("box.example.com", ["-6"], live.client.ip6), (live.server.ip6, [],
                               live.client.ip6)):
        live.me.write_text(text.replace("[box]", f"[{name}]"))
        done = live.client.run(*covered, *knock_words(live, where=name, options=options))
        assert f"on {name} for {own}" in done.stdout
    fails(live, NO_ANSWER, live.server.ip6, where=live.server.ip6, options=["-4"])

def test_several_ports_tcp_and_udp_open_and_close_without_duplicate_rules(live):
    said = opens(live, "O", "22", "8022", "53/udp")
    assert re.findall(r"opened (\S+) on box for \S+ until", said) \
        == ["tcp/22", "tcp/8022", "udp/53"]
    rules = live.server.rules()
    assert len(rules) == 3 \
        and all(f"-s {live.client.ip}/32" in rule and "--datestop" in rule for rule in rules)
    assert sum("-p udp" in rule and "--dport 53 " in rule for rule in rules) == 1
    time.sleep(1.1)
    opens(live, "O", "22", "53/udp")
    renewed = live.server.rules()
    assert len(renewed) == 3 and renewed != rules, \
        "the deadline is renewed, the rule is not doubled"
    opens(live, "C", "22", "53/udp", "8022")
    assert live.server.rules() == []
    assert "tcp/22 was shut already" in opens(live, "C", "22")
    before = live.tariq.log.count("+ iptables -w 5 -A")
    assert "opened tcp/22 on box" in opens(live, "O", "22", "22/tcp", "22")
    assert live.tariq.log.count("+ iptables -w 5 -A") == before + 1, \
        "a port that is named twice is one door"

def test_commands_run_as_root_without_a_shell_and_their_status_comes_back(live):
    assert opens(live, "E", "id", "-u") == "0\n"
    words = "$(id) `id`; id | cat > /tmp/x && * 'quoted' -n --".split()
    assert opens(live, "E", "echo", *words) == " ".join(words) + "\n"
    for words, status, said in ((["false"], 1, ""),
                                (["sh", "-c", "echo out; echo err >&2; exit 7"], 7, "out\nerr\n"),
                                (["sh", "-c", "kill -9 $$"], 137, ""),
                                (["nonexistent-program"], 127, "No such file")):
        done = knock(live, "E", *words)
        assert done.returncode == status and said in done.stdout, done
    environment = opens(live, "E", "sh", "-c", "env; pwd; cat; echo $TZ")  # with an empty stdin
    assert environment.count("\n") <= 9 and "hunter2" not in environment \
        and environment.endswith("/\n\n")

def nap_of_our_own():
    """A `sleep` of an hour that no other test's looks like, nor one beside this run: pgrep sees
    all."""
    return f"sleep {3600 + next(Lab.count)}.{os.getpid()}"

def napping(world, nap):
    """The pids of those who sleep it."""
    return world.server.run("pgrep", "-f", f"^{nap}$", check=False).stdout.split()

def test_a_command_has_limits_of_time_and_output_and_stops_neither_doors_nor_other_knocks(live):
    with knocking(live, "E", "sleep", "60") as slow:
        live.tariq.wait_log("+ sleep 60")
        opens(live), opens(live, "E", "echo", "hi")
        assert slow.wait(LONG) == 137
    assert knock(live, "E", "yes").returncode == 137
    nap = nap_of_our_own()
    assert knock(live, "E", "sh", "-c", f"trap '' TERM; {nap} & {nap}; true").returncode == 137
    wait_for(lambda: not napping(live, nap), "its children stay")
    assert opens(live, "E", "head", "-c", "100000", "/dev/zero") == "\0" * 1164
    assert opens(live, "E", "sh", "-c", "sleep 30 & echo started") == "started\n", \
        "what it leaves behind holds the pipe"

def test_sixteen_commands_run_at_once_and_doors_open_meanwhile(idle):
    os.mkfifo(gate := idle.lab.new("gate"))  # who opens it to read waits for somebody who writes
    words = "E", "sh", "-c", f"read x < {gate}; exit 37"
    with serving(idle, command_timeout=999) as server, ExitStack() as stack:
        slow = [stack.enter_context(knocking(idle, *words)) for _ in range(16)]
        server.wait_log("+ sh -c 'read x", 16)
        fails(idle, REFUSED, "16 commands run", "E", "echo", "hi")
        opens(idle)
        assert all(each.poll() is None for each in slow)
        def let_go():
            with suppress(OSError):  # nobody has come to it yet
                os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
            return all(each.poll() is not None for each in slow)
        wait_for(let_go, "the commands do not end")
        assert [each.wait() for each in slow] == [37] * 16
        opens(idle, "E", "echo", "hi")

def test_what_is_not_allowed_is_refused_with_a_signed_answer_and_logged(live):
    for words, part in (("O 23/tcp", "O 23/tcp"), ("O 22/tcp 23/tcp", "O 23/tcp"), ("O 22/udp",
        "O 22/udp"),
                        ("C 25/tcp", "C 25/tcp"), ("E reboot", "E reboot"), ("E id", "E id"),
                        ("E sleep 61", "E sleep 61")):
        fails(live, REFUSED, f"may not {part} here", *words.split())
        assert f"me@laptop {live.client.ip} {words}: refused" in live.tariq.log
    assert live.server.rules() == []

def test_unknown_expired_and_revoked_keys_get_silence(live):
    unknown, late, gone = (second_client(live, name, ("O 22", "C 22")) for name in ("deleted",
        "expired", "revoked"))
    for path in (unknown, late, gone):
        opens(live, conf=path), opens(live, "C", "22", conf=path)
    ids = {path: fingerprint(path.parent / "gpg",
                             f"{path.parent.name}@example.com") for path in (unknown, late, gone)}
    gpg(live.ring, "--delete-keys", ids[unknown])  # though still in [allow]
    gpg(late.parent / "gpg", "--quick-set-expire", ids[late], "seconds=1")
    gpg(live.ring, "--import",
        input=gpg(late.parent / "gpg", "--armor", "--export", ids[late]).stdout)
    # the client's own copy is good again, by a later signature: else its gpg would refuse to sign
    time.sleep(1)
    gpg(late.parent / "gpg", "--quick-set-expire", ids[late], "0")
    # gpg makes one for each
    certificate = (gone.parent / "gpg" / "openpgp-revocs.d" / f"{ids[gone]}.rev").read_text()
    gpg(live.ring, "--import", input=certificate.replace(":-----BEGIN", "-----BEGIN"))
    time.sleep(1.5)
    not_there = f"{ids[unknown][-16:]}, or a new subkey of it is not in the server's keyring"
    for path, words in ((unknown, not_there), (late, "expired@example.com, is expired"),
                        (gone, "revoked@example.com, is revoked")):
        seen = live.tariq.log.count("knock refused")
        with captured(live.server, outgoing=True) as packets:
            fails(live, NO_ANSWER, "No answer from box", conf=path, timeout=2)
            live.tariq.wait_log("knock refused", seen + 1)
        assert not any(packet.payload for packet in packets), "not a byte in answer"
        assert live.tariq.log.count("knock refused") == seen + 1 and words in live.tariq.log
    assert live.server.rules() == []

def test_policy_is_read_afresh_and_a_removed_section_is_a_removed_client(live):
    conf, words = second_client(live, "stranger", ("O 8022", "C 8022")), ("O", "8022")
    fails(live, REFUSED, "may not C 22/tcp", "C", "22", conf=conf)
    text, log = live.conf.read_text(), live.tariq.log
    live.conf.write_text(text.replace("[allow stranger@example.com]", "[allow stranger"))
    opens(live, *words, conf=conf)  # the last whole config holds
    assert live.tariq.log.removeprefix(log).count("is no INI file") == 1, "the log says why"
    live.conf.write_text(f"{text}\n[allow twin]\nkey = {'0' * 40}\n[allow other]\nkey = "
        f"{'0' * 40}\n")
    opens(live, *words, conf=conf)  # which of the two is whose is their fault alone
    assert all(f"[{name}] key is that of" in live.tariq.log for name in ("allow twin",
        "allow other"))
    for owner, mode in (*((0, mode) for mode in (0o644, 0o640, 0o604, 0o620,
                                                 0o666)), (NOBODY, 0o600)):
        log = live.tariq.log
        write(live.conf, text.replace("O 8022", "O 1"), owner,
            mode)  # root obeys a file that is its own alone
        opens(live, *words, conf=conf)
        assert live.tariq.log.removeprefix(log).count("is open to others: chmod 600") == 1
        write(live.conf, text)
    opens(live, *words, conf=conf), opens(live, "C", "8022", conf=conf)
    live.conf.write_text(re.sub(r"(?ms)^\[allow stranger.*?(?=^\[|\Z)", "", text))
    fails(live, REFUSED, "may not O 8022/tcp", *words, conf=conf)
    assert live.server.rules() == []

# what the client's kernel says of its address
OWN = "socket.socket.getsockname = lambda _: ({!r},)\n"

def test_a_relayed_knock_is_noticed_by_a_client_that_knows_its_address(live):
    """By a man in the middle, from his own address, which the challenge names. Behind NAT nobody
    can know."""
    fails(live, 76, f"The server sees {live.client.ip}, ", change=OWN.format("64:ff9b::cb00:714d"))
    fails(live, 76, f"--address {live.client.ip}", change=OWN.format("64:ff9b::cb00:714d"))
    assert live.server.rules() == []
    for own in ("192.168.7.7", "100.64.0.7", "fe80::7", "fd00::7"):
        opens(live, change=OWN.format(own))

@pytest.mark.parametrize("own, address, seen, answered", [
    ("192.168.1.5", "203.0.113.7", "203.0.113.7", True),
    ("192.168.1.5", "203.0.113.7", "203.0.113.8", False),
    ("192.168.1.5", "203.0.113.7", "2001:db8::666", False),  # a relay, by the other family
    ("192.168.1.5", "203.0.113.7", "192.168.1.5", False),  # a relay, in the server's own network
    ("fd00::5", "203.0.113.7", "2001:db8::5", True),  # which says nothing of a knock by IPv6
    ("fd00::5", "203.0.113.7", "203.0.113.7", True),  # NAT64
    ("fd00::5", "203.0.113.7", "203.0.113.8", False),
    ("64:ff9b::5", "203.0.113.7", "2001:db8::5", False),
    ("192.168.1.5", "any", "2001:db8::666", True),
    ("192.168.1.5", "", "203.0.113.8", True),
    ("64:ff9b::5", "", "203.0.113.8", False)])
def test_who_the_server_sees_is_compared_with_the_address_given(own, address, seen, answered):
    client = SimpleNamespace(address=address, shared=bytes(32))
    exchange = tariq.Exchange(client, tariq.Route("", own, None, [1, 2, 3, 4, 5]))
    exchange.knock_id, exchange.reply_key, sent = bytes(12), bytes(32), []
    try:
        exchange.answer(tariq.Challenge(bytes(32), 30, seen), SimpleNamespace(send=sent.append))
    except tariq.Fault as fault:
        assert fault.code == 76 and seen in str(fault)
    assert len(sent) == answered

@pytest.mark.parametrize("algorithm", ["rsa2048", "rsa3072"])
def test_rsa_keys_fit_their_packets(live, algorithm):
    conf = second_client(live, algorithm, ("O 22", "E head *"), algorithm)
    with captured(live.server) as packets:
        assert "opened tcp/22" in opens(live, conf=conf)
        assert len(opens(live, "E", "head", "-c", "3000", "/dev/zero", conf=conf)) == 1164
    assert 1200 < max(len(packet.frame) for packet in packets) <= 1280 + 14, \
        "what IPv6's least MTU takes"

def test_an_rsa_4096_server_with_an_rsa_4096_client(idle):
    ring = idle.lab.dir / "rsa-ring"
    owner = os.stat(idle.ring)
    sh("install", "-d", "-m", "700", "-o", owner.st_uid, "-g", owner.st_gid, ring)
    key = generate(ring, "server@example.com", "rsa4096")
    conf = make_server(idle.lab, idle.server, "rsa-server", server_gpg_dir=ring, server_key=key)
    client = second_client(idle, "rsa4096", ("O 22",), "rsa4096", conf=conf)
    server = Server(idle.lab, idle.server, conf).wait_log("listening for")
    for where in ("box", "box6"):
        assert "opened tcp/22" in opens(idle, conf=client, where=where)
    assert server.stop() == 0

# ---- nothing to find: strangers get no answer, and what passes looks random ----------------------

def test_random_data_on_the_right_ports_draws_nothing_not_even_icmp(live):
    opens(live, "C", "22")  # neighbours know each other now: few packets may wait for that
    noise, before = live.client.inside(socket.socket, *UDP), live.tariq.log
    link = link_header(live.client, live.server)
    with captured(live.server) as packets:
        for size in (1, 40, 46, 900, 898, 1160):
            inject(live.client, [garbage_syn(link, live.client.ip, live.server.ip, port,
                                             size) for port in live.ports], 20)
            for number in range(200):
                noise.sendto(os.urandom(size), (live.server.ip, live.ports[number % 5]))
            wait_for(lambda: waiting(live.tariq.listener) == 0, "the listener reads nothing")
        all_is_handled(live)
    packets = [packet for packet in packets if packet.frame[12:14] == b"\x08\0"]
    assert len([packet for packet in packets if packet.payload]) >= 6 * 300, "they arrived"
    assert not any(packet.outgoing for packet in packets), "no answer"
    said = live.tariq.log.removeprefix(before)
    assert re.fullmatch(rf"listener: {live.other.ip}: knock refused: .*\n",
        said), "nor a line in the log"

def test_payloads_of_fifty_exchanges_look_random_and_carry_no_markers(live):
    with captured(live.server) as packets:
        for turn in range(50):
            opens(live, "O" if turn % 2 else "C", "22", transport=("kernel", "udp")[turn % 2])
    # A kernel that has to wait sends its segment again, at the same place of the same connection:
    # that counts once.
    payloads = [payload for _,
                payload in {(each.frame[34:42] if each.frame[23] == 6 else each.time, each.payload)
                for each in packets if each.payload and {each.source, each.port} & set(live.ports)}]
    assert len(payloads) >= 50 * 8 and len(set(payloads)) == len(payloads), "no two are alike"
    everything = b"".join(payloads)
    for marker in (b"\x89PNG", b"IHDR", b"IDAT", b"IEND", b"-----BEGIN", b"OpenPGP",
                   b"example", b"laptop"):
        assert marker not in everything

    # Byte frequencies: chi-square, 255 degrees of freedom: mean 255, standard deviation 22.6; 6 of
    # those are 1 in 1e8.
    expected = len(everything) / 256
    chi_square = sum((everything.count(bytes([value])) - expected) ** 2 / expected
                     for value in range(256))
    assert chi_square < 255 + 6 * 22.6
    # Position by position too: a fixed header, key id or length anywhere would show in the first or
    # last bytes.
    for place in (*range(40), *range(-8, 0)):
        column = [payload[place] for payload in payloads]
        assert max(column.count(value) for value in set(column)) < 18, \
            "400 random bytes have hardly ever 18 of a kind"

@pytest.mark.parametrize("where", ["box", "box6"])
@pytest.mark.parametrize("transport", ["kernel", "udp"])
def test_replies_look_like_linuxs_own(live, where, transport):
    """DF and a zero id in SYN-ACK and UDP, a random id in the connection; Linux's options, windows,
    flow label."""
    six = where == "box6"
    with captured(live.server, outgoing=True) as packets:
        once = f"tariq.WAIT = {LONG}"  # no repeats
        opens(live, "C", "22", where=where, transport=transport, change=once)
    replies = [packet.frame[14:] for packet in packets if packet.payload]
    assert len(replies) == 2, "a challenge and a result"
    for number, ip in enumerate(replies):
        if six:
            assert ip[7] == 64 and int.from_bytes(ip[:4], "big") & 0xFFFFF, "hop limit, flow label"
        else:
            assert ip[8] == 64 and ip[6:8] == b"\x40\0" and ip[1] == 0, "TTL, DF, TOS"
            assert (ip[4:6] == b"\0\0") is (transport == "udp" or number == 0)
        tcp = ip[40 if six else 20:]
        options, window = tcp[20:(tcp[12] >> 4) * 4], int.from_bytes(tcp[14:16], "big")
        if transport == "kernel" and number == 0:
            mss = (1440 if six else 1460).to_bytes(2, "big")
            assert options == b"\2\4" + mss + b"\1\1\4\2\1\3\3\7" and tcp[13] == 0x12
            assert window == (64800 if six else 64240)
        elif transport == "kernel":
            assert options == b"" and tcp[13] == 0x18 and window == 501

@pytest.mark.parametrize("where", ["box", "box6"])
def test_a_crafted_syn_looks_like_linuxs_with_a_fast_open_cookie(live, where):
    six, syns = where == "box6", {}
    for transport in ("kernel", "crafted"):
        with captured(live.client, outgoing=True) as packets:
            opens(live, "C", "22", where=where, transport=transport)
        syns[transport] = [packet.frame[14:] for packet in packets if packet.payload
                           and packet.flags == 2]
        ids = {syn[4:6] for syn in syns[transport]}
        assert six or len(ids - {b"\0\0"}) >= 4, \
            f"{transport}: a connection's packets have a random id"
    tcps = [syn[40 if six else 20:] for syn in syns["crafted"]]
    mss = (1440 if six else 1460).to_bytes(2, "big")
    for tcp in tcps:
        options = tcp[20:(tcp[12] >> 4) * 4]
        assert options[:14] == b"\2\4" + mss + b"\1\1\4\2\1\3\3\7\x22\x0a" \
            and options[22:] == b"\1\1"
    assert len({tcp[34:42] for tcp in tcps}) == len(tcps) >= 5, \
        "RFC 7413: a cookie is of 8 bytes here, no two alike"

def test_the_secret_alone_gets_no_answer_and_starves_nobody_else(live):
    """Somebody with the shared secret and no key: knocks that are whole and authentic and carry
    junk."""
    before, stop, sent = rss(live.tariq.listener), threading.Event(), []
    insider = Peer(live, host=live.other)
    def flood():
        while not stop.wait(0.002):
            insider.sealed, knock_id = os.urandom(4250), os.urandom(12)
            frames = insider.frames(knock_id=knock_id)
            if len(sent) % 2:  # at the wrong ports
                frames = [(port, frame) for (port, _),
                          (_, frame) in zip(frames, frames[1:] + frames[:1])]
            insider.send(frames)
            sent.append(knock_id)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(flood)
        try:
            live.tariq.wait_log(f"{live.other.ip}: knock refused")
            for _ in range(8):
                opens(live)
            wait_for(lambda: len(sent) > 300, "the insider is too slow")
        finally:
            stop.set()
    assert not select.select([insider.socket], [], [], 0)[0], "no packet came to the insider"
    # Its memory of 65,536 frames is 15 MB, as full as time lets it become.
    assert live.server.rules()[0].count(live.client.ip) == 1 \
        and rss(live.tariq.listener) - before < 20 + 15, "MB"

# ---- disorder, duplicates, NAT, tunnels, several at once -----------------------------------------

@pytest.mark.parametrize("order", ["reversed", "doubled", "shuffled", "halves"])
def test_fragments_may_arrive_in_any_order_and_more_than_once(live, order):
    peer = Peer(live).seal()
    frames = peer.frames()
    sent = {"reversed": frames[::-1], "doubled": sorted(frames + peer.frames()),
            "shuffled": random.sample(frames, 5),
            "halves": frames[3:] + frames[:3]}[order]
    for part in (sent[:3], sent[3:]):
        peer.send(part)
        time.sleep(0.1 if order == "halves" else 0)
    peer.answer(peer.hear(b"challenge")[:32])
    assert peer.hear(b"result")[:1] == b"\x01" and len(live.server.rules()) == 1

def test_a_wrong_sequence_of_ports_never_assembles(live):
    ports = ",".join(map(str, [live.ports[1], live.ports[0], *live.ports[2:]]))
    fails(live, NO_ANSWER, "No answer from box", timeout=1, options=["-p", ports])
    all_is_handled(live)
    assert live.server.rules() == []

@pytest.fixture(scope="module")
def router(world):
    """A router with hosts behind it: two homes, which it masquerades and where only answers get in,
    and three that are far away. What its chain `loss` drops is lost."""
    lab, router = world.lab, world.lab.host("router", 40)
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    hosts = [Host(lab, f"inner{number}", 10, f"192.168.{number}",
                  f"2001:db8:{number}:") for number in range(2, 7)]
    for number, host in enumerate(hosts, 2):
        gateways = f"192.168.{number}.1", f"2001:db8:{number}::1"
        lab.cable(host, "eth0", router, f"eth{number}", [f"{host.ip}/24", f"{host.ip6}/64"],
                  [f"{gateways[0]}/24", f"{gateways[1]}/64"])
        for gateway, family in zip(gateways, ("-4", "-6")):
            host.run("ip", family, "route", "add", "default", "via", gateway)
    router.homes, router.far = hosts[:2], hosts[2:]
    for rule in ("iptables -t nat -A POSTROUTING -o eth0 -s 192.168.2.0/23 -j MASQUERADE",
                 "ip6tables -t nat -A POSTROUTING -o eth0 -j MASQUERADE",
                 "iptables -N loss", "iptables -A FORWARD -j loss", "ip6tables -N loss",
                 "ip6tables -A FORWARD -j loss",
                 "iptables -A FORWARD -s 192.168.4.0/22 -j ACCEPT",
                 "iptables -A FORWARD -d 192.168.4.0/22 -j ACCEPT",
                 "iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP",
                 "iptables -A FORWARD ! -i eth0 -o eth0 -j ACCEPT", "iptables -P FORWARD DROP",
                 "iptables -A FORWARD -i eth0 -m conntrack --ctstate ESTABLISHED,RELATED -j "
                 "ACCEPT"):
        router.run(*rule.split())
    return router

@pytest.mark.parametrize("transport", ["kernel", "udp", "crafted"])
def test_the_exchange_passes_a_stateful_nat_router(live, router, transport):
    assert f"for {router.ip} until" in opens(live, host=router.homes[0], transport=transport)
    assert router.homes[0].connects(live.server.ip) and not live.other.connects(live.server.ip)

def test_two_clients_behind_one_nat_and_twelve_from_one_address_knock_at_once(live, router):
    second = second_client(live, "neighbour", allow=("O 8022",))
    for _ in range(3):
        with knocking(live, host=router.homes[0]) as one, \
                knocking(live, "O", "8022", host=router.homes[1], conf=second) as two:
            codes = one.wait(2 * LONG), two.wait(2 * LONG)
            assert codes == (0, 0), one.stderr.read() + two.stderr.read() + live.tariq.log
        rules = live.server.rules()
        assert len(rules) == 2 and all(f"-s {router.ip}/32" in rule for rule in rules)
    with ExitStack() as stack:
        many = [stack.enter_context(knocking(live)) for _ in range(12)]
        assert [process.wait(2 * LONG) for process in many] == [0] * 12
    assert len(live.server.rules()) == 3

def can_open(path):
    with suppress(OSError):
        os.close(os.open(path, os.O_RDWR))
        return True
    return False

@pytest.mark.skipif(not can_open("/dev/net/tun"), reason="no tun devices here")
def test_knocks_arrive_through_a_tunnel_that_has_no_link_header(live):
    """As on a VPN's or a PPP interface: IPv4 and IPv6, all transports, the least MTU of IPv6."""
    def tunnel_end():
        end = os.open("/dev/net/tun", os.O_RDWR)
        # TUNSETIFF: IFF_TUN | IFF_NO_PI
        fcntl.ioctl(end, 0x400454CA, struct.pack("16sH", b"tun0", 0x1001))
        return end
    def carry():
        while not over.is_set():
            for source in select.select(ends, [], [], 0.1)[0]:
                os.write(ends[source == ends[0]], os.read(source, 2000))
    ends, over = [host.inside(tunnel_end) for host in (live.server, live.client)], threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            for host, number in ((live.server, 1), (live.client, 2)):
                host.run("ip", "link", "set", "tun0", "mtu", "1280")
                set_up_link(host, "tun0", f"203.0.113.{number}/30", f"2001:db8:9::{number}/64")
            pool.submit(carry)
            edit(live.me, (live.server.ip6, "2001:db8:9::1"), (live.server.ip, "203.0.113.1"))
            for transport, (where, own) in itertools.product(("kernel", "udp", "crafted"), (
                    ("box", "203.0.113.2"), ("box6", "2001:db8:9::2"))):
                assert f"for {own} until" in opens(live, where=where, transport=transport)
        finally:
            over.set()
    for end in ends:
        os.close(end)

HOSTILE = r"""
if sys.argv[1:2] == ["listener"]:  # one that was taken over
    channel = socket.socket(fileno=int(sys.argv[-1]))
    channel.recv(9000)
    def message(knock_id="00" * 12, signer="KEY", command=["O", "22"], ip="c0000207"):
        return json.dumps({"request": [knock_id, signer, command, ip]}).encode()
    hostile = [b"{}", b"[]", b"7", b"null", b"\xff", b'"log"', b"[" * 8000, b'{"a":' * 1500,
               message("x"), message(3), message()[:-1], b'{"request": 7}', b'{"request": []}',
               b'{"log": 7}', b'{"log": ["x"]}', b'{"fault": 7}', b'{"fault": [69]}',
               b'{"fault": [69, 7]}', b'{"ready": true, "log": "x"}', b'{"end": 1}',
               b'{"ready": true}',
               *(message(signer=it) for it in ("x" * 40, None, ["KEY"], "0" * 40)),
               *(message(command=it) for it in (
                   "O 22", [], ["O"], ["O", 22], ["O", None], ["O", "*"], ["O", "23"],
                   ["O", "22", "-j"], ["E", "reboot"], ["E"], ["E", "echo\nx"], [["O", "22"]],
                   {"O": "22"}, "Eid", ["O", "\u0662\u0662"])),
               *(message(ip=it) for it in ("192.0.2.7", "00", "c00002", "-j ACCEPT", 5, None,
                                           ["c0000207"], "00" * 17)),
               json.dumps({"log": "a\n<3>b\x1b[2J\ud800\u202e" + "x" * 3000}).encode()]
    channel.send(message())  # before it is ready
    channel.send(b'{"ready": true}')  # the second one, above, is one too many
    # More answers than the channel holds.
    for case in hostile + [message(command=["O", "23"])] * 2000:
        channel.send(case)
    answers, last, good = [], b"\x22" * 12, b""
    while not answers or answers[-1][:12] != last:  # the answer to it comes after all others
        channel.send(message("22" * 12, command=["O", "23"]))
        while select.select([channel], [], [], 1)[0]:  # else: there was no room for it
            answers.append(channel.recv(9000))
            if answers[-1][:12] == last:
                break
    channel.send(message("11" * 12))
    while good[:12] != b"\x11" * 12:
        good = channel.recv(9000)
    words = f"{sum(it[12] for it in answers)} of {len(answers)} done; then {good[:14].hex()}"
    channel.send(json.dumps({"log": words}).encode())
    channel.recv(9000)
    os._exit(0)
"""

def test_a_message_with_more_words_than_a_client_can_send_is_none(idle, monkeypatch, capfd):
    """Else one message could keep root busy with a thousand rules."""
    monitor, decided = tariq.Monitor(tariq.Config(str(idle.conf)), ""), []
    monitor.is_ready = True
    monkeypatch.setattr(monitor, "decide", lambda *request: decided.append(request[2]))
    for count in (98, 99, 100, 1000):
        command = ["E", *map(str, range(count))]
        monitor.handle(json.dumps({"request": ["00" * 12, "0" * 40, command, "c0000207"]}).encode())
    assert [len(command) for command in decided] == [99, 100]
    assert capfd.readouterr().err.count("malformed message") == 2
    request = json.dumps({"to": "0" * 40, "k": "0" * 64, "cmd": ["E", *"0" * 99]}).encode()
    with pytest.raises(tariq.Fault, match="bytes too long"):
        tariq.embed(bytes(tariq.SIDE * tariq.ROW), request)

def test_a_listener_that_was_taken_over_gets_refusals_only_and_cannot_stop_the_monitor(idle):
    program = idle.lab.program(HOSTILE.replace("KEY",
                                               config_values(idle.conf, "allow me@laptop")["key"]))
    server = Server(idle.lab, idle.server, idle.conf, program)
    try:
        server.wait_log(" done; then ", timeout=300)
        assert re.search(r"listener: 0 of \d{2,} done; then (11){12}0100\n", server.log)
        assert server.log.count(": opened") == 1 and server.log.count("malformed message") > 20
        assert "listener: a; <3>b?[2J??xxx" in server.log, "log lines cannot be forged"
        assert max(map(len, server.log.splitlines())) < 1100 and len(idle.server.rules()) == 1
        assert server.stop() == 0 and idle.server.rules() == []
    finally:
        server.kill()

# ---- every error is one line and a code ----------------------------------------------------------

def test_every_error_of_the_client_is_one_line_with_its_own_code(live):
    loose = write(live.lab.new("loose"), live.me.read_text(), NOBODY, 0o644)
    unreadable = write(live.lab.new("unreadable"), live.me.read_text())
    (covers := live.lab.new("covers")).mkdir()
    for words, code, text in (
            (("X", "22"), 64, "X"), (("O",), 64, "a request is O PORT"), (("E",), 64,
            "a request is O PORT"),
            (("O", "0"), 64, "0 is no port"), (("O", "99999"), 64, "99999 is no port"),
            (("O", "ssh"), 64, "ssh is no port"), (("E", "a\nb"), 64, "printable"),
            (("E", "echo", "x" * 900), 64, "bytes too long"), (("O", "23"), 77,
            "may not O 23/tcp")):
        fails(live, code, text, *words)
    for how, code, text in (
            (dict(options=["-p", "1,2,3"]), 64, "5 to 32"),
            *((dict(options=["-t", wrong]), 64, "-t/--timeout: invalid seconds value")
              for wrong in ("x", "nan", "0", "inf")),
            (dict(options=["--address", "x"]), 64, "an IP address"),
            (dict(options=["-i", covers]), 65, f"no PNG image (.png) in the folder {covers}"),
            (dict(options=["-u", "who@example.com"]), 65, "Your key, who@example.com, is not in "
            "the keyring"),
            (dict(options=["-g", "/nonexistent"]), 69, "no keyring /nonexistent"),
            (dict(options=["--transport", "pigeon"]), 64, "pigeon"),
            (dict(conf=live.me.parent / "none.conf"), 78, "none.conf"),
            (dict(conf=loose), 78, "chmod 600"),
            (dict(conf=unreadable), 78, "cannot be read: Permission denied"),
            (dict(where="unknown.example.com"), 78, "unknown.example.com is not in"),
            (dict(options=["--transport", "crafted"]), 71, "root")):
        fails(live, code, text, **how)
    done = live.lab.tariq(live.client, "knock", "-c", live.me, "box", user=NOBODY, check=False)
    assert done.returncode == 64 and "required" in done.stderr \
        and done.stderr.count("\n") == 1, done
    said = live.lab.tariq(live.client, "--help").stdout
    assert all(f"{code} " in said for code in (0, 64, 65, 69, 70, 71, 75, 76, 77, 78))

def test_a_missing_program_or_package_is_named_with_what_to_install(live):
    for module, how in (("PIL", dict(options=["-i", "/tmp"])),
                        ("scapy", dict(transport="crafted"))):
        done = knock(live, change=f"sys.modules['{module}'] = None", **how)
        assert done.returncode == 69 and "apt-get install" in done.stderr and module in done.stderr
        assert done.stderr.count("\n") == 1
    client, server = knock_words(live), [live.lab.dir / "tariq.py", "server", "-c", live.conf]
    for hidden, host, argv, words in (
            ("/usr/bin/gpg", live.client, [*as_user(NOBODY), *client], "gpg"),
            ("/usr/sbin/iptables", live.other, server, "iptables"), ("/usr/bin/gpg", live.other,
            server, "gpg")):
        # in a mount namespace of its own
        cover = f"mount --bind /dev/null {os.path.realpath(hidden)} && exec \"$@\""
        done = host.run("sh", "-c", cover, "sh", *argv, check=False)
        assert done.returncode in (69, 70, 71) and words in done.stderr \
            and "Traceback" not in done.stderr, done

def test_a_request_that_its_packets_cannot_carry_is_refused_before_it_is_sent(live):
    with captured(live.server) as packets:
        fails(live, 78, "use more secret_ports", change="tariq.PIECE_MAX = 600")
    assert not [packet for packet in packets if packet.port in live.ports]

def test_every_error_of_the_server_is_one_line_with_its_own_code(live):
    text, key = live.conf.read_text(), config_values(live.conf, "server")["server_key"]
    cases = [(f"server_key = {key}", "server_key = me", 78, "server_key has to be a key's "
        "fingerprint"),
             (f"server_key = {key}", "", 78, "server_key is missing"),
             (f"server_key = {key}", f"server_key = {key[::-1]}", 78,
                     "The server's key is not in the keyring"),
             ("server_gpg_dir = ", "server_gpg_dir = /nonexistent", 69, "/nonexistent"),
             ("[server]", "[server]\nopen_tcp_port = -A tariq -s {ip} --dport {dport} --nonsense",
             78, "open_tcp_port is no rule of iptables"),
             ("[server]", "[server]\nopen_command = true {ip} {dport}", 78,
              "close_command is missing"),
             ("[server]", "[sever]", 78, "[server]"), ("[server]", "[server]", 78, "chmod 600")]
    for old, new, code, words in cases:
        path = write(live.lab.new("variant"), text.replace(old, new),
                     mode=0o600 if old != new else 0o644)
        done = live.lab.tariq(live.other, "server", "-c", path, check=False)
        lines = [line for line in done.stderr.splitlines() if line.startswith("tariq: ")]
        assert done.returncode == code and len(lines) == 1 and words in done.stderr, (new, done)
    for command in ("server", "init", "enroll"):
        done = live.lab.tariq(live.other, command, "-c", live.conf, user=NOBODY, check=False)
        assert done.returncode == 71 and "needs root: sudo" in done.stderr \
            and done.stderr.count("\n") == 1

def test_a_second_server_with_the_same_chain_does_not_start(live):
    done = live.lab.tariq(live.server, "server", "-c", live.conf, check=False)
    assert done.returncode == 71 and "runs already" in done.stderr \
        and "+ iptables" not in done.stderr
    opens(live)

def test_a_client_answers_one_challenge_only(live):
    """A server that has forgotten its own was started anew, and would run the command once more."""
    first = "0" * 64
    forgets = ("challenge, first = tariq.read_challenge, []\n"
               "def another(key, payload):\n"
               "    found = challenge(key, payload)\n"
               "    if found and not first:\n"
               "        first.append(found)\n"
               f"        return found._replace(nonce=bytes.fromhex('{first}'))\n"
               "    return found\n"
               "tariq.read_challenge = another")
    done = knock(live, "E", "echo", "once", timeout=3, change=forgets)
    assert done.returncode == NO_ANSWER and "may have acted" in done.stderr, done
    assert "echo once: exit" not in live.tariq.log

def test_a_hostile_server_draws_no_traceback_and_steers_no_terminal(live):
    """Its replies are right but for their contents: changed where the client has opened them."""
    wrap = ("unframe = tariq.unframe\n"
            "def hostile(key, label, payload, least):\n"
            "    opened = unframe(key, label, payload, 0)\n"
            "    data = opened and label == b'result' and ({}) or opened and opened[1]\n"
            "    return (opened[0], data) if opened and len(data) >= least else None\n"
            "tariq.unframe = hostile")
    for data in ("opened[1][:1]", r"b'\1\0'", r"b'\1\0\xff\xfe'"):
        done = knock(live, timeout=3, change=wrap.format(data))
        assert done.returncode in (0, NO_ANSWER) and "Traceback" not in done.stderr, done
    escape = wrap.format(r"opened[1].replace(b'opened', b'\x1b[2Jopened')")
    assert opens(live, change=escape).startswith("?[2Jopened")
    refused = wrap.format("opened[1][:1] + bytes([0]) + opened[1][2:]")
    # a refusal is one, whatever status it claims
    fails(live, REFUSED, "", "O", "23", change=refused)
    challenge = OWN.format("64:ff9b::1") + wrap.replace("b'result'", "b'challenge'")
    no_address = challenge.format(r"opened[1][:34] + b'\x1b[2J\xff'")
    fails(live, NO_ANSWER, "No answer from box", change=no_address, timeout=3)

# ---- init, keygen, enroll, join ------------------------------------------------------------------

def enroll(live, key, *options, check=True):
    return live.lab.tariq(live.server, "enroll", "-c", live.conf, *options, input=key, check=check)

def key_with_a_hidden_one(ring, public, hidden):
    """An armored public key whose names gpg lists in more than 64 KiB, and behind them the secret
    key of another."""
    key = fingerprint(ring, public)
    for number in range(16):
        gpg(ring, "--quick-add-uid", key, str(number) + ":" * 1100)
    blob = gpg(ring, "--export", public, text=False).stdout
    blob += gpg(ring, "--export-secret-keys", hidden, text=False).stdout
    text = base64.encodebytes(blob).decode()
    return f"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n{text}-----END PGP PUBLIC KEY BLOCK-----\n"

def test_enrolment_takes_no_taken_name_no_secret_key_and_not_two_keys(live):
    ring = live.lab.new("impostor")
    ring.mkdir(0o700)
    for user in ("Mallory <me@laptop>", "mallory@example.com"):
        generate(ring, user)
    def keys():
        return re.findall("(?m)^pub.*", gpg(live.ring, "--with-colons", "--list-keys").stdout)
    def exported(*words):
        return gpg(ring, "--armor", *words).stdout
    text, before, key = live.conf.read_text(), keys(), exported("--export", "<me@laptop>")
    for given, words in ((key, "me@laptop is another client's name"), (exported("--export"),
        "One public key"),
                         (exported("--export", "nobody"), "One public key"),
                         (exported("--export-secret-keys", "Mallory"), "One public key"),
                         (exported("--export", "mallory@example.com") + key, "One public key")):
        done = enroll(live, given, check=False)
        assert done.returncode == 65 and words in done.stderr and done.stdout == "", done
    for name in ("me@laptop", "two\nlines", "a]b", "-x", "a log line"):
        assert enroll(live, key, f"--name={name}", check=False).returncode == 65, name
    assert enroll(live, key, "--name", "other", "--allow", "E echo 'a #b'",
                  check=False).returncode == 64
    noise = live.lab.tariq(live.server, "enroll", "-c", live.conf, input=b"\x99\0\1\t" * 16000,
                           text=False, check=False)
    assert noise.returncode == 65 and b"One public key" in noise.stderr, \
        "gpg has more to say than a pipe holds"
    for user in ("long@example.com", "later@example.com"):
        generate(ring, user)
    long = key_with_a_hidden_one(ring, "long@example.com", "later@example.com")
    done = enroll(live, long, "--name", "long", check=False)
    assert done.returncode == 65 and "One public key" in done.stderr, \
        "a secret key behind a long listing"
    assert keys() == before and live.conf.read_text() == text, "nothing is imported or written"
    done = enroll(live, key, "--name", "other.one")
    assert "[allow other.one]" in live.conf.read_text() and "secret_ports" in done.stdout
    again = enroll(live, key)
    assert "there already" in again.stderr and again.stdout == done.stdout

def test_join_takes_no_other_key_no_other_values_and_no_scrap(live):
    text, mine = live.me.read_text(), config_values(live.me, "box")["server_key"]
    profile = enroll(live, gpg(live.me.parent / "gpg", "--armor", "--export",
                               "<me@laptop>").stdout).stdout
    def join(given, host="box"):
        return live.lab.tariq(live.client, "join", "-c", live.me, host, user=NOBODY,
                              input=given, check=False)
    for given, words in ((profile.replace(mine, mine[::-1]), "not its server_key"), ("",
        "No profile"),
                         (re.sub('"secret": "[^"]*', f'"secret": "{SECRET}', profile),
                          "has other values"),
                         (profile[:100], "No profile"),
                         (profile.replace('"secret_ports": "', '"secret_ports": "1,'),
                          "has other values")):
        done = join(given)
        assert done.returncode == 65 and words in done.stderr \
            and live.me.read_text() == text, (words, done)
    for host in ("", "a b", "x]", "two\nlines", "DEFAULT", "#"):
        done = join(profile, host)
        assert done.returncode == 64 and "an ASCII name or address" in done.stderr, host
    assert join(profile).returncode == 0 and live.me.read_text() == text

def test_a_server_cannot_put_a_key_of_its_own_in_the_place_of_a_later_one_of_the_client(live):
    (ring := live.lab.new("hostile")).mkdir(0o700)
    key = generate(ring, "server@example.com")
    for name in ("planted@example.com", "later@example.com"):
        gpg(ring, "--quick-add-uid", key, name)
    conf = second_client(live, "planted")
    profile = {**config_values(conf, "box"), "server_key": key.lower(),
               "public_key": gpg(ring, "--armor", "--export", key).stdout}
    def join(profile):
        words = json.dumps(profile)
        return live.lab.tariq(live.client, "join", "-c", conf, "hostile", user=NOBODY,
                              input=words, check=False)
    generate(ring, "secretly@example.com")
    hidden = key_with_a_hidden_one(ring, "server@example.com", "secretly@example.com")
    done = join({**profile, "public_key": hidden})
    assert done.returncode == 65 and "One public key" in done.stderr, \
        "a secret key behind a long listing"
    assert join(profile).returncode == 0
    for user in ("planted@example.com", "later@example.com", "secretly@example.com"):
        done = live.lab.tariq(live.client, "keygen", "-c", conf, user, user=NOBODY)
        shown = gpg(ring, "--with-colons", "--show-keys", input=done.stdout).stdout
        assert shown.count("\npub:") + shown.startswith("pub:") == 1 and key not in shown
        assert re.search("(?m)^fpr:+(.*):$", shown)[1] in done.stderr, "its fingerprint is said"
    opens(live, conf=conf)

def test_init_leaves_no_agent_outside_the_service_and_nobody_else_can_hold_the_servers_lock(live):
    home = make_server(live.lab, live.other, "clean").parent / ".server-gpg"
    wait_for(lambda: not live.server.run("pgrep", "-f", str(home), check=False).stdout,
             "gpg-agent stays")
    number = live.server.run("stat", "-Lc", "%i", "/proc/self/ns/net").stdout.strip()
    path = Path(f"/run/tariq-tariq-{number}.lock")
    assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_uid == 0

def test_init_refuses_a_persons_account_and_leaves_an_existing_set_up_alone(live):
    text, keys = live.conf.read_text(), gpg(live.ring, "--list-secret-keys").stdout
    assert "wrote" not in run_init(live.lab, live.server, live.conf).stderr
    assert live.conf.read_text() == text and gpg(live.ring, "--list-secret-keys").stdout == keys
    conf = live.lab.dir / "person" / "tariq.conf"
    done = run_init(live.lab, live.server, conf, uid=1000, check=False)
    assert done.returncode == 71 and "is a person's" in done.stderr \
        and os.listdir(conf.parent) == []

def test_four_enrolments_at_once_lose_nothing(live):
    confs = [live.lab.dir / f"many-{number}" / "tariq.conf" for number in range(4)]
    keys = [live.lab.tariq(live.client, "keygen", "-c", conf,
                           f"Many {number} <many{number}@example.com>").stdout
            for number, conf in enumerate(confs)]
    text = live.conf.read_text()
    # an editor that leaves out the last newline
    live.conf.write_text(text[:text.index("[allow")] + "# mine")
    with ThreadPoolExecutor() as pool:
        profile, *_ = pool.map(lambda key: enroll(live, key).stdout, keys)
    assert len(tariq.Config(live.conf).clients) == 4 and "# mine" in live.conf.read_text()
    assert "[allow many3@example.com]" in live.conf.read_text(), "the email is the name"
    live.lab.tariq(live.client, "join", "-c", confs[0], live.server.ip, input=profile)
    opens(live, conf=confs[0], user=None, where=live.server.ip)
    assert "\nmany0@example.com " in live.tariq.log

def test_one_config_may_serve_both_roles_and_be_enrolled_in_itself(idle):
    conf = make_server(idle.lab, idle.server, "both-roles")
    conf.write_text(conf.read_text()
                    + f"[client]\nuser = me@itself\nclient_gpg_dir = {conf.parent}/client-gpg\n")
    line = " | ".join(f"{idle.lab.dir}/tariq.py {words}" for words in (
        f"keygen -c {conf} me@itself", f"enroll -c {conf} --allow O 22", f"join -c {conf} itself"))
    idle.server.run("sh", "-c", line)
    config = tariq.Config(conf)
    assert config.ini.has_section("itself") \
        and config.get("may", ["allow me@itself"]) == [["O", "22/tcp"]]

# ---- the service's life --------------------------------------------------------------------------

@pytest.mark.parametrize("names", ["TERM", "INT", "HUP", "INT TERM"])
def test_the_server_stops_cleanly_on_signals_and_leaves_an_empty_chain(idle, names):
    with serving(idle) as server:
        listener = server.listener
        opens(idle), opens(idle, where="box6")
        *first, last = (signal.Signals[f"SIG{name}"] for name in names.split())
        for number in first:  # two at once
            server.process.send_signal(number)
        assert server.stop(last) == 0
        # the kernel's signal is on its way
        wait_for(lambda: not alive(listener), "the listener outlives its monitor")
        assert idle.server.rules() == idle.server.rules(ip6=True) == []

def test_a_listener_that_hangs_does_not_outlive_the_monitor_and_its_death_closes_every_door(idle):
    with serving(idle) as server:
        # what reads nothing any more cannot hold up the stop
        os.kill(server.listener, signal.SIGSTOP)
    with serving(idle, command_timeout=1) as server:
        listener = server.listener
        # so that a request waits unread when the monitor dies
        server.process.send_signal(signal.SIGSTOP)
        fails(idle, NO_ANSWER, "sent no result", timeout=10)
        server.kill()
        wait_for(lambda: not alive(listener), "the listener outlives its monitor")
    with serving(idle) as server:
        opens(idle), opens(idle, where="box6")
        assert idle.server.rules() and idle.server.rules(ip6=True)
        os.kill(server.listener, signal.SIGKILL)
        assert server.process.wait(LONG) == DIED and "listener died" in server.log
        assert idle.server.rules() == idle.server.rules(ip6=True) == [] \
            and not idle.client.connects(idle.server.ip)

def test_a_command_ends_with_the_server_and_a_daemon_that_it_left_holds_nothing_of_it(idle):
    nap = nap_of_our_own()
    with serving(idle, command_timeout=999) as server:
        pid = server.process.pid
        def held():
            return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
        before = held()
        for _ in range(4):
            assert opens(idle, "E", "sh", "-c", f"{nap} & echo started") == "started\n"
        wait_for(lambda: held() == before, "they leave descriptors or threads")
        daemons = napping(idle, nap)
        assert len(daemons) == 4, "they run on"
        for daemon in daemons:
            os.kill(int(daemon), signal.SIGKILL)
        wait_for(lambda: not napping(idle, nap))
        with knocking(idle, "E", "sh", "-c", f"{nap}; true"):
            wait_for(lambda: napping(idle, nap), "it does not run")
            assert server.stop() == 0
        wait_for(lambda: not napping(idle, nap),
            "it outlives the server")  # the kernel's signal is on its way
    with serving(idle, command_timeout=999) as server, \
            knocking(idle, "E", "sh", "-c", f"trap '' TERM; {nap}; {nap}"):
        wait_for(lambda: napping(idle, nap), "it does not run")
        server.kill()
        wait_for(lambda: not napping(idle, nap), "it outlives a killed server")

def test_an_open_command_that_leaves_a_daemon_holds_nobody_up(idle):
    nap = nap_of_our_own()
    words = f"sh -c '{nap} & echo $0 $1' {{ip}} {{dport}}"
    with serving(idle, open_command=words, close_command="true {ip} {dport}") as server:
        opens(idle), opens(idle, "C", "22")
        assert server.stop() == 0
        left = napping(idle, nap)
        for pid in left:
            os.kill(int(pid), signal.SIGKILL)
        assert left

def test_a_close_command_that_does_not_run_to_its_end_is_no_closed_door(idle):
    closing = write(idle.lab.new("closing"),
                    "#!/bin/sh\necho no such element; exit 1\n", mode=0o755)
    with serving(idle, open_command="true {ip} {dport} {seconds}",
                 close_command=f"{closing} {{ip}} {{dport}}",
                 open_timeout=SOON) as server:
        assert "server ends doors" not in server.log, "{seconds} are the firewall's"
        opens(idle), opens(idle, "C", "22")
        assert "no such element" in server.log and "is not closed" not in server.log
        opens(idle)
        closing.rename(closing.with_name("gone"))
        fails(idle, MISSING, str(closing), "C", "22")
        server.wait_log(f"tcp/22 for {idle.client.ip} is not closed: ", 2)
        closing.with_name("gone").rename(closing)
        server.wait_log("no such element", 2)
        assert server.stop() == 0
    with serving(idle, open_command="true {ip} {dport}",
                 close_command=f"{closing} {{ip}} {{dport}}",
                 open_timeout=1) as server:
        closing.rename(closing.with_name("gone"))
        for first in (20, 2000):
            opens(idle, "O", *map(str, range(first, first + 28)))
        server.wait_log(f"tcp/20 for {idle.client.ip} is not closed", 2)
        # which does not wait a second for each of its 56 doors
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(50) == 0 and server.log.count("Doors may be open") == 56

def test_a_close_command_that_fails_is_no_closed_door_where_only_this_server_ends_it(idle):
    """As a provider's that does not answer: the door is known until it is closed."""
    closing = write(idle.lab.new("closing"), "#!/bin/sh\necho no answer; exit 1\n", mode=0o755)
    with serving(idle, open_command="true {ip} {dport}", open_timeout=SOON,
                 close_command=f"{closing} {{ip}} {{dport}}") as server:
        opens(idle)
        fails(idle, SYSTEM, f"{closing} failed: no answer", "C", "22")
        server.wait_log(f"tcp/22 for {idle.client.ip} is not closed: ", 2)
        write(closing, "#!/bin/sh\n", mode=0o755)
        assert "closed tcp/22" in opens(idle, "C", "22") and server.stop() == 0

def test_a_door_that_a_reload_has_closed_is_opened_again_though_close_command_fails(idle):
    """It says that there is no such door, and only this server ends doors."""
    door = idle.lab.new("door")
    with serving(idle, open_command=f"mkdir {door}-{{dport}}-{{ip}}",
                 close_command=f"rmdir {door}-{{dport}}-{{ip}}") as server:
        opens(idle)
        shut = f"{door}-22-{idle.client.ip}"
        os.rmdir(shut)
        opens(idle)
        assert os.path.isdir(shut) and "It is opened all the same." in server.log
        assert server.stop() == 0 and not os.path.exists(shut)

def test_a_server_with_an_open_command_heeds_edits_of_its_config(idle):
    commands = dict(open_command="true {ip} {dport}", close_command="true {ip} {dport}")
    with serving(idle, **commands) as server:
        opens(idle)
        edit(server.conf, (f"    O {SOME_PORTS}\n", "    O 23\n"))
        fails(idle, REFUSED, "you may not O 22/tcp", "O", "22")
        opens(idle, "O", "23")
        edit(server.conf, ("[server]", "[server"))
        opens(idle, "O", "23")
        server.wait_log("The config from before this change holds.")

def test_public_ports_with_an_open_command_is_a_fault_as_nothing_would_be_hidden(idle):
    log = refused_start(idle, open_command="true {ip} {dport}", public_ports="none",
                        close_command="true {ip} {dport}")
    assert "public_ports hides by iptables" in log

def test_a_client_has_a_number_of_doors_then_its_oldest_ends_and_nobody_elses(idle):
    other = second_client(idle, "thrifty", allow=("O 44",))
    with serving(idle, program=idle.lab.program("tariq.DOORS_MAX = 3")):
        opens(idle, "O", "44", conf=other)
        opens(idle, "O", "22", "23", "24"), opens(idle, "O", "22"), opens(idle, "O", "25")
        assert sorted(re.findall(r"--dport (\d+)",
                                 " ".join(idle.server.rules()))) == ["22", "24", "25", "44"]

def test_every_change_to_the_machine_is_logged_before_it_runs(live):
    opens(live), opens(live, "E", "echo", "a b")
    lines, rule = live.tariq.log.splitlines(), f"+ iptables -w 5 -A tariq -s {live.client.ip} "
    last = max(number for number, line in enumerate(lines) if line.startswith(rule))
    assert any(f"{live.client.ip} O 22/tcp: opened tcp/22" in line for line in lines[last:]) \
        and "+ echo 'a b'" in lines

def test_the_server_warns_where_nothing_is_hidden(idle):
    conf = make_server(idle.lab, idle.other, "warned")
    for rules, warnings in (([], 2), (["iptables -A INPUT -j DROP", "ip6tables -P INPUT DROP"], 0)):
        for rule in rules:
            idle.other.run(*rule.split())
        server = Server(idle.lab, idle.other, conf).wait_log("listening for")
        assert server.log.count("INPUT drops nothing") == warnings and server.stop() == 0
    idle.other.run("iptables", "-F", "INPUT"), idle.other.run("ip6tables", "-P", "INPUT", "ACCEPT")

# ---- little runs as root -------------------------------------------------------------------------

def test_the_listener_holds_no_privilege_nothing_of_roots_and_one_packet_socket(live):
    opens(live, "E", "echo", "warm")  # what a knock leaves behind counts too
    owner, pid = os.stat(live.ring), live.tariq.listener
    wait_for(lambda: not children(pid), "gpg stays")
    for thread in os.listdir(f"/proc/{pid}/task"):  # credentials are each thread's own
        try:
            lines = proc(pid, f"task/{thread}/status").splitlines()
        except (FileNotFoundError, ProcessLookupError):  # a knock's thread, which has ended
            assert int(thread) != pid
            continue
        status = dict(line.split(":\t") for line in lines if ":\t" in line)
        assert status["Uid"].split() == [str(owner.st_uid)] * 4 and owner.st_uid != 0
        assert status["Gid"].split() == [str(owner.st_gid)] * 4 and owner.st_gid != 0
        assert status["Groups"].split() == []
        assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff",
                                                           "Bnd", "Amb")} == {0}
        assert status["NoNewPrivs"] == "1"
    words = proc(pid, "stat").rpartition(")")[2].split()
    assert (words[3], words[4]) == (str(pid), "0"), "a session of its own, and no terminal"
    assert os.readlink(f"/proc/{pid}/cwd") == "/" and proc(pid, "environ") == "HOME=/\0"
    links = descriptors(pid)
    assert links[0].endswith("tariq.py") and links[1] == links[2] == "/dev/null"
    extra = sorted(link for number, link in links.items() if number > 2)
    assert len(extra) == 2 and all(link.startswith("socket:") for link in extra), links
    assert len(packet_sockets(pid)) == 1, "one of them is a packet socket"
    unix = [line.split() for line in proc(pid, "net/unix").splitlines()]
    ours = [row for row in unix if f"socket:[{row[6]}]" in extra]
    assert len(ours) == 1 and len(ours[0]) == 7, "the other is a nameless end of a socketpair"

@pytest.mark.skipif(not shutil.which("keyctl"), reason="no keyutils here")
def test_a_session_keyring_of_roots_stays_with_root(idle):
    """Neither the listener nor what the server starts as root sees it."""
    session = "keyctl", "session", "roots-own"
    assert "roots-own" in idle.server.run(*session, "keyctl", "show").stdout, "the test's own test"
    fakes = Fakes(idle.lab)
    with serving(idle, (*session, *fakes.prefix)):
        for program in "gpg", "iptables":
            fakes.shown.write_text("")
            fakes.fault(f"{program}-shows")
            opens(idle)
            wait_for(lambda: "Session Keyring" in fakes.shown.read_text(), f"{program} has none")
            assert "roots-own" not in fakes.shown.read_text(), program
    fakes.fault("gpg-session")  # root's set-up: what commands gpg has no hold on root's terminal
    idle.server.run(*fakes.prefix, idle.lab.dir / "tariq.py", "enroll", "-c", idle.conf,
                    input=gpg(idle.me.parent / "gpg", "--armor", "--export", "<me@laptop>").stdout)
    pid, session = fakes.shown.read_text().split()
    assert pid == session

def test_the_server_that_has_the_secret_too_leaves_no_core_dump(idle):
    """What its kernel says of it when it is ready (PR_GET_DUMPABLE)."""
    change = """
ready = tariq.Monitor.ready
def ready_and_told(monitor):
    ready(monitor)
    tariq.log(f"dumpable: {tariq.LIBC.prctl(3)}")
tariq.Monitor.ready = ready_and_told
"""
    with serving(idle, program=idle.lab.program(change)) as server:
        server.wait_log("dumpable: 0")

def test_the_listeners_user_reaches_nothing_of_roots(live):
    opens(live)
    user, monitor, conf = os.stat(live.ring).st_uid, live.tariq.process.pid, live.tariq.conf
    for words in (f"cat {conf}", "cat /etc/shadow", f"touch {conf}.new",
                  f"touch -c {live.lab.dir}/tariq.py",
                  "iptables -n -L tariq", "iptables -A tariq -j ACCEPT", "nft list ruleset",
                  f"kill -0 {monitor}",
                  f"cat /proc/{monitor}/environ", f"ls /proc/{monitor}/fd",
                  f"ls /proc/{live.tariq.listener}/fd",
                  "ip link set eth0 promisc on"):
        locked_up = "setpriv", "--no-new-privs", "--bounding-set=-all", \
            "--inh-caps=-all", *words.split()
        assert live.server.run(*locked_up, user=user, check=False).returncode != 0, words
    # the test's own test
    assert live.server.run("cat", conf).stdout and len(live.server.rules()) == 1

def test_no_socket_listens_and_the_interface_is_not_promiscuous(live):
    opens(live)
    listening = live.server.run("ss", "-H", "-lntup").stdout.splitlines()
    assert len(listening) == 2 and all('"sshd"' in line for line in listening), "IPv4 and IPv6"
    ours = [f"pid={pid}," for pid in (live.tariq.process.pid, live.tariq.listener)]
    lines = live.server.run("ss", "-H", "-l", "-n", "-p").stdout.splitlines()
    kinds = {line.split()[0] for line in lines if any(pid in line for pid in ours)}
    assert kinds <= {"p_raw", "p_dgr"}, kinds
    link = live.server.run("ip", "-d", "link", "show", "eth0").stdout
    assert "PROMISC" not in link and "promiscuity 0" in link

def test_the_listener_refuses_to_run_with_a_privilege_left(idle):
    """A setpriv that leaves something: the listener looks at itself before it takes a packet."""
    for leave in ("--bounding-set=-all", "--no-new-privs", "--clear-groups"):
        (fake := idle.lab.new("setpriv")).mkdir()
        instead = "words+=(--groups=4)" if leave == "--clear-groups" else "true"
        write(fake / "setpriv", f"#!/bin/bash\nwords=()\nfor word; do case $word in {leave}) "
                                f"{instead};; "
              f'*) words+=("$word");; esac; done\nexec {fake}/real "${{words[@]}}"\n', mode=0o755)
        shutil.copy("/usr/bin/setpriv", fake / "real")
        covered = "sh", "-c", 'mount --bind "$0/setpriv" /usr/bin/setpriv && exec "$@"', fake
        done = idle.server.run(*covered, idle.lab.dir / "tariq.py", "server", "-c",
                               variant(idle), check=False)
        assert done.returncode == DIED and "still has a privilege" in done.stderr, (leave, done)

def test_the_kernel_filter_passes_frames_only_is_locked_and_takes_no_outgoing_packet(idle):
    with serving(idle) as server:
        row, = packet_sockets(server.listener)
        assert row[3] == "0003" and row[4] == "0", "all protocols, all interfaces"
        number, = [number for number,
                   link in descriptors(server.listener).items() if row[8] in link]
        pidfd_getfd = ctypes.CDLL(None).syscall(438, os.pidfd_open(server.listener), number, 0)
        with socket.socket(fileno=pidfd_getfd) as sock:
            size, is_locked = (sock.getsockopt(socket.SOL_SOCKET,
                                               option) for option in (socket.SO_RCVBUF, 44))
            assert size == 8 << 20 and is_locked == 1
            with pytest.raises(PermissionError):
                sock.setsockopt(socket.SOL_SOCKET, 27, 0)  # SO_DETACH_FILTER
        # so that what passes the filter stays to be counted
        os.kill(server.listener, signal.SIGSTOP)
        try:
            ports = idle.ports
            link, inner = link_header(idle.client, idle.server), \
                packet_of(ports[2], bytes(900), udp=True)
            # Of no VLAN, but with a priority: for this interface. It comes before and behind the
            # rest.
            good, before = [link[:12] + b"\x81\0\0\0" + link[12:] + inner], waiting(server.listener)
            inject(idle.client, good)
            wait_for(lambda: waiting(server.listener) > before + 900, "it does not arrive")
            one = waiting(server.listener)
            out, into = (host.inside(socket.socket, *UDP) for host in (idle.server, idle.client))
            for port in (ports[0], ports[4]):
                out.sendto(bytes(900), (idle.client.ip, port))  # the server's own
            for port, size in [(ports[0] ^ 1, 900), (ports[0], 46), (ports[0], 1293)]:
                into.sendto(bytes(size), (idle.server.ip, port))  # other ports and sizes
            # another host's
            inject(idle.client, [b"\x02" + link[1:5] + b"\x99" + link[6:] + inner])
            inject(idle.client, [link[:12] + b"\x81\0\0\7" + link[12:] + inner])  # of a VLAN
            inject(idle.client, good)
            wait_for(lambda: waiting(server.listener) > one, "it does not arrive")
            time.sleep(0.2)
            assert before == 0 and waiting(server.listener) == 2 * one, "more than the two"
        finally:
            os.kill(server.listener, signal.SIGCONT)

def test_nothing_of_scapy_pillow_libpcap_or_gpg_runs_or_is_mapped_as_root(idle):
    trace = idle.lab.new("trace")
    calls = "trace=execve,openat,setresuid,clone,clone3,fork,vfork,socket,setsockopt,bind"
    with serving(idle, ("strace", "-D", "-f", "-q", "-y", "-e", calls, "-o", trace)) as server:
        opens(idle), opens(idle, "E", "echo", "x"), opens(idle, "C", "22")
        monitor = server.process.pid
        assert not re.search("scapy|PIL|libpcap|libgcrypt", proc(monitor, "maps")) \
            and rss(monitor) <= 32
    text = traced(trace, monitor)
    opened, *_ = re.findall(rf"(?ms)^{monitor} +(socket\(AF_PACKET.*)", text)
    assert opened.startswith("socket(AF_PACKET, SOCK_DGRAM|SOCK_CLOEXEC, htons(0 ")
    assert re.search("SO_ATTACH_FILTER.*SO_LOCK_FILTER.*?bind[^\n]*sll_protocol=htons\\(ETH_P_ALL",
                     opened, re.S), \
        "no packet comes before the filter is locked"
    forks = re.findall(r"(?m)^(\d+) +(?:<\.\.\. )?(?:clone3?|v?fork)\b.* = (\d+)$", text)
    parents = {child: parent for parent, child in forks}
    changed = set(re.findall(r"(?m)^(\d+) +setresuid\([1-9]", text))
    foreign = {pid for pid, call in re.findall(r"(?m)^(\d+) +(.*)", text)
               if re.search(r"scapy|/PIL/|libpcap|/gpg", call) and " = -1 " not in call}
    def unprivileged(pid):
        return pid in changed or pid in parents and unprivileged(parents[pid])
    assert len(foreign) >= 3, "the listener, and a gpg for each knock"
    assert [pid for pid in foreign if not unprivileged(pid)] == [] \
        and not unprivileged(str(monitor))

def traced(trace, pid):
    """The text of a trace by strace -D, once it has seen the end of a process."""
    wait_for(lambda: re.search(rf"(?m)^{pid} +\+\+\+ ", trace.read_text(errors="replace")),
             "strace has not ended")
    return trace.read_text(errors="replace")

@contextmanager
def watched(trace, *pids, options=()):
    """Meanwhile strace watches processes, and writes to a file."""
    pids_words = [word for pid in pids for word in ("-p", str(pid))]
    strace = subprocess.Popen(["strace", "-f", "-qq", *options, "-o", trace,
                               *pids_words], stderr=DEVNULL)
    try:
        wait_for(lambda: all("TracerPid:\t0" not in proc(pid, "status") for pid in pids),
                 "strace did not attach")
        yield
    finally:
        strace.kill()  # the kernel lets go of each thread; strace itself may wait for one for ever
        strace.wait(LONG)

def test_the_monitor_sleeps_while_nothing_happens(idle):
    trace = idle.lab.new("trace")
    with serving(idle) as server:
        threads = len(os.listdir(f"/proc/{server.listener}/task"))
        opens(idle)
        wait_for(lambda: len(os.listdir(f"/proc/{server.listener}/task")) == threads,
            "repeats go on")
        with watched(trace, server.process.pid, server.listener):
            time.sleep(60)
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    waits = r"(p?select6?|recvfrom|recvmsg|futex|restart_syscall|<\.\.\.|strace: )"
    assert all(re.match(waits, call) for call in calls), calls
    assert len(calls) <= 6, "each thread waits in one call"

# ---- the kernel closes the doors -----------------------------------------------------------------

@contextmanager
def held_connection(world):
    """A connection made now; at the end, data goes both ways over it."""
    with world.client.inside(socket.socket, socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(LONG)
        sock.connect((world.server.ip, 22))
        assert b"SSH-" in sock.recv(100)
        yield
        assert not world.client.connects(world.server.ip), \
            "the door is still open: the connection outlives nothing"
        sock.sendall(b"SSH-2.0-held\r\n")
        assert len(sock.recv(4096)) > 100, "the key exchange's first message"

@pytest.mark.parametrize("killed", ["monitor", "both processes"])
def test_doors_close_at_their_deadline_to_the_second_when_killed(idle, killed):
    def tries(address, deadline):
        """Connections until after a door's end: (begun, whether it opened, over)."""
        found = []
        while not found or found[-1][0] < deadline + 1.9:
            found.append((time.time(), idle.client.connects(address), time.time()))
            time.sleep(0.05)
        return found
    def looked_through(seconds):
        """Whether there was time to look through both doors before their end."""
        listener = server.listener
        deadlines = list(pool.map(lambda where: deadline_of(opens(idle,
                                                                  where=where)), ["box", "box6"]))
        if killed != "monitor":
            # so that it cannot mend anything between the two signals
            os.kill(listener, signal.SIGSTOP)
        server.kill()
        if killed != "monitor":
            os.kill(listener, signal.SIGKILL)
        wait_for(lambda: not alive(listener), "the listener outlives the monitor")
        if time.time() > min(deadlines) - seconds / 2:
            return False
        with held_connection(idle):
            outcomes = list(pool.map(tries, (idle.server.ip, idle.server.ip6), deadlines))
        looked = True
        for outcome, deadline in zip(outcomes, deadlines):
            # a rule holds to its second's end
            before = [good for _, good, end in outcome if end < deadline + 0.95]
            after = [good for begun, good, _ in outcome if begun > deadline + 1.05]
            assert all(before) and after and not any(after), (deadline, outcome)
            looked = looked and before
        assert idle.server.rules() and idle.server.rules(ip6=True), "it was the kernel that closed"
        return looked
    for seconds in (3, 12, 48):  # a slow machine needs longer
        with serving(idle, open_timeout=seconds) as server, ThreadPoolExecutor() as pool:
            if looked_through(seconds):
                break
    else:
        raise AssertionError("nobody looked through the doors while they were open")
    with serving(idle):
        assert idle.server.rules() == idle.server.rules(ip6=True) == [], \
            "a start begins with an empty chain"

def test_a_door_without_open_timeout_stays_until_closed_and_a_clients_section_overrides_the_servers(
        idle):
    with serving(idle, open_timeout=0):
        for _ in range(2):  # both rules are the same, word by word
            assert opens(idle) == f"opened tcp/22 on box for {idle.client.ip} until closed\n"
        rule, = idle.server.rules()
        assert "--datestop 2038-01-19T03:14:07" in rule
        with held_connection(idle):
            assert "closed tcp/22" in opens(idle, "C", "22") and idle.server.rules() == []
    with serving(idle, open_timeout=90000) as server:
        assert re.search(r"until \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ$", opens(idle)), \
            "a day or more shows its date"
        edit(server.conf, ("may =", "open_timeout = 2\nmay ="))
        before = int(time.time())
        assert before + 2 <= deadline_of(opens(idle)) <= time.time() + 2
        wait_for(lambda: not idle.server.rules(), "the door stays")

@pytest.fixture
def lossy(world, router):
    """The router, which loses nothing afterwards; the server has a way to those far away."""
    world.server.run("ip", "route", "replace", "192.168.4.0/22", "via", router.ip)
    yield router
    for program in "iptables", "ip6tables":
        router.run(program, "-F", "loss")
    world.server.run("ip", "route", "del", "192.168.4.0/22")

TRIES = 12  # of a client in its usual ten seconds

@pytest.mark.parametrize("transport", ["kernel", "crafted"])
def test_knocks_get_through_where_a_fifth_of_all_packets_is_lost_each_way(idle, lossy, transport):
    for side in "-i", "-o":
        lossy.run("iptables", "-A", "loss", side, "eth0", "-m", "statistic", "--mode", "random",
                  "--probability", "0.2", "-j", "DROP")
    def client(port):
        return lossy.far[port % len(lossy.far)]
    ports = range(2000, 2050)  # a port for each knock: its rule tells whose it is
    # each has its share of the machine
    with serving(idle) as server, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda port: knock(idle, "O", port, transport=transport,
                                                   host=client(port), options=["-v"], timeout=40),
                                                   ports))
        counters = lossy.run("iptables", "-nvxL", "loss").stdout
        drops = [int(line.split()[0]) for line in counters.splitlines() if "DROP" in line]
        assert len(drops) == 2 and min(drops) > 8, \
            f"the network lost too little to prove anything: {drops}"
        good = {port for port, done in zip(ports, results)
                if done.returncode == 0 and done.stderr.count("go by") <= TRIES}
        assert len(good) >= 48, [done for done in results if done.returncode]
        rules = [(int(re.search(r"--dport (\d+)", rule)[1]), re.search(r"-s (\S+)/32 ", rule)[1])
                 for rule in idle.server.rules()]
        opened = {port for port, _ in rules}
        assert len(rules) == len(opened), "a door has two rules"
        assert all(address == client(port).ip for port, address in rules)
        # a knock whose client gave up may have opened its door: nothing else may
        assert good <= opened <= set(ports)
        for port in ports:
            assert server.log.count(f"O {port}/tcp: opened") == (port in opened), \
                "a repeated answer opened twice"

@pytest.mark.parametrize("lost",
                         ["first fragment", "last fragment", "challenge", "answer", "result"])
def test_a_knock_survives_the_loss_of_any_one_packet(idle, lossy, lost):
    def one(client, transport):
        away, back = ["-s", client.ip, "-p", "tcp"], ["-d", client.ip, "-p", "tcp"]
        rule = {"first fragment": [*away, "--syn", "--dport", idle.ports[0]],
                "last fragment": [*away, "--syn", "--dport", idle.ports[-1]],
                "challenge": [*back, "--tcp-flags", "SYN,ACK", "SYN,ACK"],
                "result": [*back, "--tcp-flags", "SYN", "NONE"],
                "answer": [*away, "--tcp-flags", "SYN,RST,ACK", "ACK", "-m", "length",
                           "--length", "100:"]}[lost]
        rule += ["-m", "statistic", "--mode", "nth", "--every", "100000", "--packet",
                 "0", "-j", "DROP"]
        lossy.run("iptables", "-w", "-I", "loss", *rule)
        # A result that answers a repeat is a SYN-ACK, and passes: no repeat comes before it.
        slow = "tariq.WAIT = 5" if lost == "result" else None
        return opens(idle, transport=transport, host=client, change=slow)
    with serving(idle) as server:
        with ThreadPoolExecutor() as pool:
            list(pool.map(one, lossy.far, ("kernel", "crafted")))
        counters = lossy.run("iptables", "-w", "-nvxL", "loss").stdout
        assert [line.split()[0] for line in counters.splitlines()
                if "100000" in line] == ["1", "1"], counters
        assert server.log.count(": opened") == len(idle.server.rules()) == 2, \
            "something happened twice"

def test_repeats_are_new_frames_at_growing_intervals_that_no_two_knocks_share(idle):
    """Four knocks at an address where nobody is: the clients' repeats are all that drives them."""
    silent = idle.lab.host("silent", 77)
    for program in "iptables", "ip6tables":
        silent.run(program, "-A", "INPUT", "-p", "tcp", "-j", "DROP")
    edit(idle.me, (idle.server.ip6, silent.ip6), (idle.server.ip, silent.ip))
    with captured(silent) as packets, ThreadPoolExecutor() as pool:
        runs = [pool.submit(knock, idle, where=where, transport=transport, timeout=6, host=host)
                for host in (idle.client, idle.other) for where,
                transport in (("box", "kernel"), ("box6", "crafted"))]
        assert [run.result().returncode for run in runs] == [NO_ANSWER] * 4
    payloads, starts = [packet.payload for packet in packets if packet.payload], \
        collections.defaultdict(list)
    assert len(payloads) >= 4 * 6 * 5 and len(set(payloads)) == len(payloads), "no two are alike"
    for packet in packets:
        if packet.port == idle.ports[0]:
            starts[packet.frame[6:14]].append(packet.time)  # by its sender and family
    intervals = [[later - earlier for earlier,
                  later in zip(times, times[1:])] for times in starts.values()]
    assert len(intervals) == 4
    assert all(5 <= len(waits) <= 20 for waits in intervals), intervals
    # None is shorter than its client chose it; what a slow machine adds, it does not add to all.
    first, *_, fifth = (min(waits) for waits in list(zip(*intervals))[:5])
    assert fifth > 1.2 * first, f"the waits do not grow: {intervals}"
    # The four first waits (or second, or third) would differ by what the scheduler does, a few
    # milliseconds.
    turns = list(zip(*intervals))[:3]
    assert any(max(waits) - min(waits) > 0.015 for waits in turns), \
        f"the waits are not jittered: {turns}"

# ---- a recorded knock is worthless ---------------------------------------------------------------

SHIFTED = """
read_at, shift, clock = 0, 0, time.time
def time_now():
    global read_at, shift
    if time.monotonic() > read_at + 0.05:
        with open({path!r}) as file:
            read_at, shift = time.monotonic(), float(file.read())
    return clock() + shift
time.time = time_now
"""

class Shift:
    """A clock for servers that run `program`, both processes: the machine's, and some seconds
    more."""

    def __init__(self, lab):
        self.path = lab.new("clock")
        self.program = lab.program(SHIFTED.format(path=str(self.path)))
        self.set(0)

    def set(self, seconds):
        # at once, for readers
        write(self.path.with_suffix(".new"), str(seconds), mode=0o644).replace(self.path)
        time.sleep(0.06)  # whoever asks from now on reads it

def replay(host, server, frames, times):
    """Send a list of frames again and again from a host, no faster than the listener takes them."""
    left = times
    while left > 0:
        inject(host, frames, -(-min(left, 1000) // len(frames)))  # the buffer holds them all
        wait_for(lambda: waiting(server.listener) == 0, "the listener does not keep up")
        left -= 1000

@contextmanager
def nothing_happens(world, server, program=None, ahead=0):
    """Meanwhile the server runs nothing, sends nothing, changes no rule and logs nothing (but a gpg
    and a line for the junk that comes last); then a knock works. ahead: seconds of its clock."""
    def state():
        return world.server.rules(), world.server.rules(ip6=True)
    trace, options = world.lab.new("trace"), ("-e", "trace=execve", "-e", "signal=none")
    with watched(trace, server.process.pid, server.listener, options=options):
        before, log = state(), server.log
        with captured(world.server, outgoing=True) as packets:
            yield
            wait_for(lambda: waiting(server.listener) == 0, "the listener does not keep up")
            all_is_handled(world, server, ahead)
        sent = [each for each in packets if each.frame[12:14] == b"\x08\0"
                or each.flags is not None]
        assert sent == [] and state() == before
        said = server.log.removeprefix(log)  # once a minute it says that old frames come
        assert re.fullmatch(r"(listener: \S+ sent an authentic frame of .*\n)?"
                            r"listener: .* knock refused: .*\n", said), said
        assert len(set(re.findall(r"(?m)^\d+", trace.read_text()))) == 1, "more than the junk's gpg"
        assert trace.read_text().count("gpg") >= 1
        opens(world, "E", "echo", "still there", program=program)  # and the measuring measures
        assert trace.read_text().count("gpg") >= 2 and trace.read_text().count("execve(") >= 3

@pytest.mark.parametrize("when", ["inside the window", "after a restart", "four minutes later"])
def test_100000_replayed_packets_start_no_gpg_and_get_no_packet(idle, when):
    shift, program = Shift(idle.lab), None
    with ExitStack() as first, ExitStack() as second:
        server = first.enter_context(serving(idle, program=shift.program))
        with captured(idle.server) as packets:
            opens(idle, transport="kernel")
        # all that the client sent
        packets = [packet for packet in packets if packet.port in idle.ports]
        fragments, rest = ([each.frame for each in packets if (each.flags & 2 > 0) is syn]
                           for syn in (True, False))
        assert len(fragments) >= 5 \
            and any(packet.payload and not packet.flags & 2 for packet in packets)
        if when != "inside the window":
            first.close()
            server = second.enter_context(serving(idle, program=shift.program))
        # nothing but the frames' own age tells that server that they are old
        if when == "four minutes later":
            shift.set(240)
            fails(idle, NO_ANSWER, "", timeout=2)  # its clock is where it should be
            program = shift.program
        with nothing_happens(idle, server, program, ahead=240 if program else 0):
            for host, ip in ((idle.client, idle.client.ip), (idle.other, idle.other.ip)):
                frames = [from_address(frame, ip) for frame in fragments + rest]
                for sent, times in ((frames, 1), (frames[::-1], 1),
                                    (frames[:len(fragments)], 50_000)):
                    replay(host, server, sent, times if when != "after a restart" else 1)

def test_a_knock_recorded_before_its_exchange_ended_is_worth_nothing(idle):
    """The fragments alone, replayed by another: the door of a proof not given stays shut."""
    with serving(idle) as server:
        peer = Peer(idle).seal()
        with captured(idle.server) as packets:
            peer.send(peer.frames())
            assert peer.hear(b"challenge")
        fragments = [each.frame for each in packets if each.payload and not each.outgoing]
        with nothing_happens(idle, server):
            inject(idle.other, [from_address(frame, idle.other.ip) for frame in fragments])

# ---- what breaks: gpg, iptables, memory, disks, links, clocks ------------------------------------

class Fakes:
    """gpg and iptables' programs of a server, in a mount namespace of its own: as they are, until
    told to fail."""

    SCRIPT = r"""#!/bin/sh
words=/dev/stderr  # where it says what is wrong
for word; do [ "$before" = --logger-fd ] && words=/proc/self/fd/$word; before=$word; done
case $(cat "{flag}") in
{name}-hangs) exec sleep 60;;
{name}-shows) keyctl show > "{flag}.shown";;
{name}-session) ps -o pid=,sid= -p $$ > "{flag}.shown";;
{name}-dies) kill -KILL $$;;
{name}-junk) head -c 3000 /dev/urandom | tee /dev/stderr; exit 0;;
{name}-lies) printf '[GNUPG:] \n[GNUPG:] VALIDSIG\n[GNUPG:] NEWSIG \377\n' >&2; exit 0;;
{name}-slow) sleep 1.2;;
{name}-fails) echo "{name}: a fault made by the tests" >> $words; exit 4;;
{name}-refuses-rules) case "$*" in *" -A tariq "*) exit 4;; esac;;
{name}-is-busy-once) case "$*" in *--datestop*) echo none > "{flag}"; exit 4;; esac;;
esac
XTABLES_LOCKFILE="{flag}.lock" exec {real} "$@"
"""
    # iptables: the first place where the monitor looks for programs; gpg: where the listener finds
    # it
    COVER = 'mount --bind "$0" /usr/local/sbin && mount --bind "$0/gpg" /usr/bin/gpg && exec "$@"'

    def __init__(self, lab, legacy=""):
        (place := lab.new("fakes")).mkdir()
        self.flag, self.prefix = write(place / "flag", "none", mode=0o644), \
            ("sh", "-c", self.COVER, place)
        self.shown = write(place / "flag.shown", "", mode=0o666)
        shutil.copy("/usr/bin/gpg", place / "gpg.real")
        write(place / "gpg", self.SCRIPT.format(name="gpg", real=place / "gpg.real",
            flag=self.flag), mode=0o755)
        for name, what in itertools.product(("iptables", "ip6tables"), ("", "-restore")):
            script = self.SCRIPT.format(name=name, real=f"/usr/sbin/{name}{legacy}{what}",
                flag=self.flag)
            write(place / f"{name}{what}", script, mode=0o755)

    def fault(self, name):
        self.flag.write_text(name)

def agent_of(ring):
    """The pid of a keyring's gpg-agent."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            words = proc(pid, "cmdline").split("\0")
            if words[0].endswith("gpg-agent") and str(ring) in words and alive(pid):
                return int(pid)
    raise ProcessLookupError(f"no gpg-agent of {ring}")

@pytest.mark.parametrize("fault, words", [("dies", "not one encrypted message"), ("junk",
    "not one encrypted message"),
                                          ("lies", "not one encrypted message"),
                                          ("hangs", f"not done in {tariq.UNSEAL_TIME} s"),
                                          ("fails", "gpg: a fault made by the tests")])
def test_a_knock_fails_when_gpg_fails_and_the_next_one_works(idle, fault, words):
    fakes, program = Fakes(idle.lab), None
    if fault == "hangs":
        program = idle.lab.program(f"tariq.UNSEAL_TIME = {tariq.UNSEAL_TIME}")
    with serving(idle, fakes.prefix, program=program) as server:
        fakes.fault(f"gpg-{fault}")
        fails(idle, NO_ANSWER, "", timeout=1)
        server.wait_log("knock refused: ")
        fakes.fault("none")
        opens(idle, "O", "23")
        assert words in server.log and len(idle.server.rules()) == 1

def test_a_gpg_agent_killed_in_mid_exchange_spoils_no_later_knock(idle):
    def kill_agent():
        with suppress(ProcessLookupError):  # there is none at this moment
            os.kill(agent_of(idle.ring), signal.SIGKILL)
    with serving(idle, program=idle.lab.program("tariq.UNSEAL_TIME = 10")) as server:
        opens(idle, "O", "23")
        agent = agent_of(idle.ring)
        # gpg waits for it now, so that it dies in the middle for sure
        os.kill(agent, signal.SIGSTOP)
        try:
            with knocking(idle, "O", "24") as waits:
                wait_for(lambda: children(server.listener), "no gpg")
                kill_agent()
                assert "opened tcp/24" in waits.communicate(timeout=2 * LONG)[0] \
                    and waits.returncode == 0
        finally:
            with suppress(ProcessLookupError):
                os.kill(agent, signal.SIGKILL)
        assert agent_of(idle.ring) != agent
        statuses, began = set(), time.monotonic()
        opens(idle, "C", "23")
        usual = time.monotonic() - began
        for tenths in range(3, 13):  # at every point of an exchange
            timer = threading.Timer(usual * tenths / 10, kill_agent)
            timer.start()
            statuses.add(knock(idle, "C", "23", timeout=3).returncode)
            timer.join()
        assert statuses <= {0, NO_ANSWER}
        opens(idle)
        assert {re.search(r"--dport (\d+)",
                          rule)[1] for rule in idle.server.rules()} - {"23"} == {"24", "22"}

def test_when_iptables_fails_the_client_is_told_why_and_doors_close_all_the_same(idle):
    fakes = Fakes(idle.lab)
    with serving(idle, fakes.prefix, open_timeout=SOON) as server:
        fakes.fault("iptables-fails")
        fails(idle, SYSTEM, "a fault made by the tests")
        assert idle.server.rules() == []
        fakes.fault("none")
        deadline = deadline_of(opens(idle))
        fakes.fault("iptables-fails")
        wait_for(lambda: re.search("tcp/22 for .* is not closed: .*a fault made by the tests",
            server.log), "closed")
        fails(idle, SYSTEM, "", "C", "22")
        assert idle.server.rules(), "the fault is no fault"
        time.sleep(max(0, deadline + 1.05 - time.time()))
        assert not idle.client.connects(idle.server.ip), "the kernel did not close the door"
        assert server.log.count("is not closed") < time.time() - deadline + 3, "a try a second"
        fakes.fault("none")
        wait_for(lambda: idle.server.rules() == [], "the door stays")
        for _ in range(2):
            opens(idle)
            time.sleep(1)  # so that the next rule is another one
        assert len(idle.server.rules()) <= 1, "opened again, a door has two rules"

def test_a_start_while_iptables_is_busy_keeps_the_kernels_time_limit(idle):
    fakes = Fakes(idle.lab)
    fakes.fault("iptables-is-busy-once")
    with serving(idle, fakes.prefix) as server:
        opens(idle)
        assert "--datestop" in idle.server.rules()[0] and "refuses" not in server.log
        assert fakes.flag.read_text() == "none\n", "it was not busy"

def test_the_end_that_a_client_is_told_is_the_rules_own(idle):
    fakes = Fakes(idle.lab)
    with serving(idle, fakes.prefix):
        fakes.fault("iptables-slow")
        said = opens(idle)
        assert f"{re.search(r'--datestop [0-9-]+T([0-9:]+)', idle.server.rules()[0])[1]}Z" in said

def test_a_server_that_cannot_start_programs_goes_on_and_closes_doors_when_it_can_again(idle):
    """Every process that it starts fails while a file is there: out of memory or tasks."""
    flag = idle.lab.new("no-fork")
    change = ("import os\nlaunch = tariq.launch\n"
              "def failing(*words, **more):\n"
              f"    if os.path.exists('{flag}'): raise {{}}('a fault made by the tests')\n"
              "    return launch(*words, **more)\n"
              "tariq.launch = failing\n")
    for error in ("BlockingIOError", "RuntimeError"):
        program = idle.lab.program(change.format(error))
        with serving(idle, program=program, open_timeout=SOON) as server:
            opens(idle)
            flag.touch()
            fails(idle, SYSTEM, f"{error}: a fault", "O", "23")
            server.wait_log(f"tcp/22 for {idle.client.ip} is not closed: ")
            assert idle.server.rules()
            flag.unlink()
            wait_for(lambda: not idle.server.rules(), "the door is forgotten")
            opens(idle)
        with serving(idle, program=program) as server:
            flag.touch()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(LONG) == 0 \
                and server.log.count("Doors may be open") == 2, "it tries both"
            flag.unlink()

def test_a_held_iptables_lock_delays_a_knock_or_fails_it_and_passes(idle):
    """iptables-legacy: the one with a lock."""
    def ports():
        return sorted(re.findall(r"(?m)^-A.* --dport (\d+)",
                                 idle.server.run("iptables-legacy", "-S", "tariq").stdout))
    if idle.server.run("iptables-legacy", "-S", check=False).returncode:
        pytest.skip("this kernel has no iptables-legacy")
    try:
        fakes = Fakes(idle.lab, "-legacy")
        with serving(idle, fakes.prefix) as server, open(f"{fakes.flag}.lock", "a") as lock, \
                ThreadPoolExecutor() as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waits = pool.submit(opens, idle)
            wait_for(lambda: any("iptables" in proc(pid,
                "cmdline") for pid in children(server.process.pid)))
            time.sleep(1)  # of the five seconds that iptables waits
            assert not waits.done()
            fcntl.flock(lock, fcntl.LOCK_UN)
            waits.result()
            fcntl.flock(lock, fcntl.LOCK_EX)
            fails(idle, SYSTEM, "lock", "O", "23")
            fcntl.flock(lock, fcntl.LOCK_UN)
            opens(idle, "O", "24")
            assert ports() == ["22", "24"]
        assert ports() == []
    finally:
        for program in "iptables-legacy", "ip6tables-legacy":
            idle.server.run(program, "-F"), idle.server.run(program, "-X")

def test_a_full_disk_behind_the_log_keeps_no_door_from_opening_or_closing(idle):
    with serving(idle, ("sh", "-c", 'exec "$@" 2>/dev/full', "sh"), ready="",
                 open_timeout=2) as server:
        deadline = deadline_of(opens(idle))
        wait_for(lambda: not idle.server.rules(), "the door stays")
        assert time.time() >= deadline
        opens(idle), opens(idle, "C", "22")
        assert server.log == ""

def test_a_full_disk_below_the_keyring_fails_no_later_knock(idle):
    (disk := idle.lab.new("disk")).mkdir()
    # for the server alone
    own_disk = (f"mount -t tmpfs -o size=1m,nr_inodes=200,mode=755 tmpfs {disk}"
                f" && cp -a {idle.ring} {disk}/gpg && rm -f {disk}/gpg/S.* && exec \"$@\"")
    with serving(idle, ("sh", "-c", own_disk, "sh"), server_gpg_dir=disk / "gpg") as server:
        seen = Path(f"/proc/{server.process.pid}/root/{disk}")
        sh("dd", "if=/dev/zero", f"of={seen}/fill", "bs=4096", check=False)
        assert os.statvfs(seen).f_bavail == 0
        opens(idle)
        (seen / "fill").unlink()
        opens(idle, "O", "23")

def test_the_interface_may_appear_after_the_start_go_down_and_be_made_anew(idle):
    def unplug():
        idle.server.run("ip", "link", "del", "eth0")
    def plug():
        idle.lab.plug(idle.server, "eth0", f"{idle.server.ip}/24", f"{idle.server.ip6}/64")
        for host in idle.lab.hosts.values():  # it has a new link address
            host.run("ip", "neigh", "flush", "all")
    unplug()
    try:
        with serving(idle) as server:
            for _ in range(2):
                plug()
                opens(idle), opens(idle, where="box6")
                unplug()
                time.sleep(0.3)
                assert server.process.poll() is None
            plug()
            idle.server.run("ip", "link", "set", "eth0", "down")
            set_up_link(idle.server, "eth0", f"{idle.server.ip6}/64")
            opens(idle), opens(idle, where="box6")
            assert len(idle.server.rules()) == 1
    finally:
        if "eth0" not in idle.server.run("ip", "link").stdout:
            plug()

def test_doors_close_and_knocks_work_again_though_the_clock_jumps(idle):
    shift = Shift(idle.lab)
    with serving(idle, program=shift.program, open_timeout=3) as server:
        deadline = deadline_of(opens(idle))
        shift.set(-7200)  # the wall clock says that there are two hours and three seconds left
        wait_for(lambda: not idle.server.rules(), "the door stays")
        assert time.time() > deadline - 0.5, "it is ended too early"
        for jump in (-7200, 7200):
            shift.set(jump)
            fails(idle, NO_ANSWER, "", timeout=1)
            shift.set(0)
            opens(idle)
        assert "knock refused" not in server.log

# ---- in from anywhere ----------------------------------------------------------------------------

@pytest.mark.parametrize("lost", ["SYNs with data", "UDP"])
@pytest.mark.parametrize("where", ["box", "box6"])
def test_a_plain_knock_gets_in_through_a_router_that_drops_one_transport(live, lossy, lost, where):
    program = "iptables" if where == "box" else "ip6tables"
    rule = ["-p", "udp"] if lost == "UDP" else ["-p", "tcp", "--syn", "-m", "length",
                                                "--length", "200:"]
    lossy.run(program, "-A", "loss", *rule, "-j", "DROP")
    opens(live, host=lossy.homes[0], where=where)
    only = "udp" if lost == "UDP" else "kernel"
    fails(live, NO_ANSWER, "", "C", "22", host=lossy.homes[0], where=where,
          timeout=1, transport=only)
    counted = lossy.run(program, "-nvxL", "loss").stdout
    assert int(counted.splitlines()[2].split()[0]) >= 5, "the router drops nothing"

def test_a_client_needs_no_package_and_udp_nothing_that_is_linuxs_own_nor_a_kernel_with_fast_open(
        live):
    """Away with: scapy, Pillow, AF_PACKET, MSG_FASTOPEN, numbers for setsockopt, /proc. As on
    macOS, BSD, Termux."""
    no_package = ("import sys\n"
                  "for name in ('scapy', 'PIL', 'ctypes.util'): sys.modules[name] = None\n")
    change = r"""
import builtins, socket
for name in ('AF_PACKET', 'MSG_FASTOPEN', 'SOCK_NONBLOCK', 'SOCK_CLOEXEC', 'AF_NETLINK'):
    delattr(socket, name)
socket.socket.setsockopt = None
real = builtins.open
builtins.open = lambda path, *a, **k: None if str(path).startswith('/proc') else real(path, *a, **k)
"""
    done = knock(live, change=no_package + change, options=["-v"])
    assert done.returncode == 0 and "by udp" in done.stderr, done.stderr
    opens(live, "C", "22", change=no_package, transport="kernel")
    live.client.run("sysctl", "-qw", "net.ipv4.tcp_fastopen=0")
    try:
        opens(live)
    finally:
        live.client.run("sysctl", "-qw", "net.ipv4.tcp_fastopen=1")

@pytest.mark.parametrize("kind", ["vlan", "bridge", "vlan on a bridge"])
def test_knocks_arrive_on_a_vlan_and_through_a_bridges_member_and_count_once(kind):
    with Lab() as lab:
        world, under = new_world(lab), "eth0"
        server = world.server
        if "vlan" in kind and "Unknown device type" in server.run(
                "ip", "link", "add", "link", "eth0", "name", "try", "type", "vlan", "id", "9",
                check=False).stderr:
            pytest.skip("this kernel has no VLAN devices; the filter's test sends tagged frames")
        running = started(world)
        if "bridge" in kind:
            for words in ("link add br0 type bridge forward_delay 0", "link set eth0 master br0",
                          "addr flush eth0"):
                server.run("ip", *words.split())
            set_up_link(server, "br0", f"{server.ip}/24")
            under = "br0"
        if "vlan" in kind:
            for host, link, address in ((server, under, "203.0.113.1"),
                                        (world.client, "eth0", "203.0.113.2")):
                host.run("ip", "link", "add", "link", link, "name", "lan7", "type",
                         "vlan", "id", "7")
                set_up_link(host, "lan7", f"{address}/24")
            edit(world.me, (server.ip, "203.0.113.1"))
        for transport in ("kernel", "udp", "crafted"):
            opens(world, transport=transport)
        assert running.log.count(": opened") == 3 and "refused" not in running.log
        assert running.stop() == 0

# ---- in from where people are --------------------------------------------------------------------

def but(world, **changes):
    """The world with other parts."""
    return SimpleNamespace(**{**vars(world), **changes})

def private_directory(path, user=NOBODY):
    sh("install", "-d", "-m", "700", "-o", user, "-g", user, path)
    return path

class Elsewhere(Host):
    """A host for programs that see another file in the place of one of its own."""

    def __init__(self, host, place, text):
        vars(self).update(vars(host))
        self.place, self.file = place, write(host.lab.new("file"), text, mode=0o644)

    def command(self, argv, user=None):
        # In the mount namespace that `ip netns exec` has made.
        cover = 'mount --bind "$0" "$1" && shift && exec "$@"'
        words = super().command(["sh", "-c", cover, self.file, self.place])
        return [*words, *(as_user(user) if user is not None else []), *map(str, argv)]

# 1. Addresses of a name

NAME = "box.example.com"
NOBODYS = "2001:db8:1::dead", "198.51.100.99"  # addresses on the lab's switch that no host has

def named(host, *addresses):
    """The host, where NAME has these addresses."""
    lines = "".join(f"{address} {NAME}\n" for address in addresses)
    return Elsewhere(host, "/etc/hosts", f"127.0.0.1 localhost\n{lines}")

@pytest.fixture
def by_name(live):
    """The world, whose client knocks at a name."""
    edit(live.me, (f"host = {live.server.ip}\n", f"host = {NAME}\n"))
    return live

@pytest.mark.parametrize("fate", ["DROP", "REJECT"])
def test_where_ipv6_is_filtered_the_second_try_goes_to_the_ipv4_address(by_name, lossy, fate):
    """0.3 s after the first, not after ten."""
    lossy.run("ip6tables", "-A", "loss", "-j", fate)
    client = named(lossy.homes[0], by_name.server.ip6, by_name.server.ip)
    done = knock(by_name, host=client, options=["-v"])
    assert done.returncode == 0 and done.stdout.count("opened tcp/22") == 1, done
    tries = re.findall(r"fragments go to (\S+) by (\w+)", done.stderr)
    assert tries[:2] == [(by_name.server.ip6, "kernel"), (by_name.server.ip, "kernel")]

def test_where_ipv4_is_filtered_a_name_with_both_is_reached_by_ipv6(by_name, lossy):
    lossy.run("iptables", "-I", "loss", "-j", "DROP")
    client = named(lossy.homes[0], by_name.server.ip, by_name.server.ip6)
    assert opens(by_name, host=client).count("opened tcp/22") == 1
    assert len(by_name.server.rules(ip6=True)) == 1 and by_name.server.rules() == []

def test_both_families_doors_open_so_that_ssh_gets_in_by_whichever_it_takes(by_name):
    client = named(by_name.client, by_name.server.ip6, by_name.server.ip)
    lines = opens(by_name, host=client).splitlines()
    assert [re.search(r"for (\S+) until", line)[1] for line in lines] == [client.ip6, client.ip]
    assert client.connects(by_name.server.ip) and client.connects(by_name.server.ip6)
    assert opens(by_name, "C", "22", host=client).count("closed tcp/22") == 2
    assert by_name.server.rules() == by_name.server.rules(ip6=True) == []

def test_a_door_of_the_second_family_alone_is_closed_by_the_name(by_name):
    """As where the first family's knock had been lost when it was opened."""
    client = named(by_name.client, by_name.server.ip6, by_name.server.ip)
    opens(by_name, host=client, options=["-4"])
    said = opens(by_name, "C", "22", host=client)
    assert f"tcp/22 was shut already on box for {client.ip6}" in said
    assert f"closed tcp/22 on box for {client.ip}" in said and not doors(by_name)

def test_a_door_that_may_be_open_in_the_other_family_is_named_when_closing(by_name, lossy):
    """Nor is an extra door that could not be opened a reason for a line."""
    lossy.run("ip6tables", "-A", "loss", "-j", "DROP")
    client = named(lossy.homes[0], by_name.server.ip6, by_name.server.ip)
    opened, closed = (knock(by_name, *words, host=client) for words in (["O", "22"], ["C", "22"]))
    assert opened.returncode == closed.returncode == 0 and opened.stderr == ""
    assert closed.stdout.count("closed tcp/22") == 1
    assert closed.stderr.startswith(f"tariq: not closed for {by_name.server.ip6}: No answer from ")

def test_a_relay_in_the_other_family_is_named_when_opening_too(by_name):
    """The address that this client is to have by IPv4 is not the one that the server sees."""
    client = named(by_name.client, by_name.server.ip6, by_name.server.ip)
    opened = knock(by_name, host=client, options=["--address", "203.0.113.99"])
    assert opened.returncode == 0 and opened.stdout.count("opened tcp/22") == 1
    assert opened.stderr.startswith(f"tariq: not opened for {by_name.server.ip}: The server sees "
                                    f"{client.ip}, and this machine is 203.0.113.99: ")
    assert by_name.server.rules() == [] and len(by_name.server.rules(ip6=True)) == 1

@pytest.mark.parametrize("option, ip6", [("-4", False), ("-6", True)])
def test_an_option_for_one_family_opens_that_familys_door_alone(by_name, option, ip6):
    client = named(by_name.client, by_name.server.ip6, by_name.server.ip)
    assert opens(by_name, host=client, options=[option]).count("\n") == 1
    assert len(by_name.server.rules(ip6)) == 1 and by_name.server.rules(not ip6) == []

def test_a_command_runs_once_though_the_name_has_addresses_of_both_families(by_name):
    client = named(by_name.client, by_name.server.ip6, by_name.server.ip)
    before = by_name.tariq.log
    assert opens(by_name, "E", "echo", "once", host=client) == "once\n"
    assert by_name.tariq.log.removeprefix(before).count("+ echo once") == 1

def test_two_dead_addresses_of_three_keep_nobody_out(by_name):
    client = named(by_name.client, *NOBODYS, by_name.server.ip)
    assert opens(by_name, host=client).count("opened tcp/22") == 1

def test_four_dead_addresses_of_ipv6_do_not_hide_the_one_of_ipv4(by_name):
    dead = [f"2001:db8:1::dea{number}" for number in range(4)]
    opens(by_name, host=named(by_name.client, *dead, by_name.server.ip))

def test_a_name_with_ipv6_alone_opens_ipv6_and_has_no_address_for_4(by_name):
    client = named(by_name.client, by_name.server.ip6)
    assert f"for {client.ip6} until" in opens(by_name, host=client)
    fails(by_name, NO_ANSWER, "has no address", host=client, options=["-4"])

def test_a_client_without_ipv6_takes_the_ipv4_address_of_a_name_with_both(by_name):
    client = named(by_name.client, by_name.server.ip6, by_name.server.ip)
    client.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    try:
        assert f"for {client.ip} until" in opens(by_name, host=client)
    finally:
        client.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0")
        client.run("ip", "addr", "replace", f"{client.ip6}/64", "dev", "eth0", "nodad")

def test_no_answer_names_all_addresses_and_transports_that_were_tried(by_name):
    done = knock(by_name, host=named(by_name.client, *NOBODYS), timeout=3)
    assert done.returncode == NO_ANSWER and "--transport" not in done.stderr
    assert all(word in done.stderr for word in (*NOBODYS, "kernel", "udp"))

# 2. The address that the server sees

@pytest.fixture(scope="module")
def carrier(world):
    """A router that translates its subscriber's addresses, which a program takes to be anybody's on
    the Internet (as it takes none of those for documentation): it squats on 30.0.0.0/8."""
    lab, router = world.lab, world.lab.host("carrier", 50)
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    router.subscriber = host = Host(lab, "subscriber", 2, "30.78.1", "2600:db8:")
    lab.cable(host, "eth0", router, "inner", [f"{host.ip}/24", f"{host.ip6}/64"],
              ["30.78.1.1/24", "2600:db8::1/64"])
    for family, gateway in ("-4", "30.78.1.1"), ("-6", "2600:db8::1"):
        host.run("ip", family, "route", "add", "default", "via", gateway)
    for program in "iptables", "ip6tables":
        for rule in "-N relay", "-A POSTROUTING -j relay", "-A POSTROUTING -o eth0 -j MASQUERADE":
            router.run(program, "-t", "nat", *rule.split())
    return router

@pytest.fixture
def nat64(carrier):
    """The carrier's tayga, and no IPv4 at its subscriber -> the prefix of IPv4 addresses."""
    if not shutil.which("tayga") or not os.path.exists("/dev/net/tun"):
        pytest.skip("no tayga, or no tun devices here")
    prefix, pool = "2001:db8:64::", "192.0.2.128/25"
    conf = write(carrier.lab.new("tayga.conf"), f"""tun-device nat64
        ipv4-addr 192.0.2.129
        ipv6-addr 2001:db8:65::1
        prefix {prefix}/96
        dynamic-pool {pool}
        data-dir {carrier.lab.dir}
        """)
    carrier.run("tayga", "--config", conf, "--mktun")
    carrier.run("ip", "link", "set", "nat64", "up")
    carrier.run("ip", "route", "add", pool, "dev", "nat64")
    carrier.run("ip", "-6", "route", "add", f"{prefix}/96", "dev", "nat64")
    tayga = carrier.popen("tayga", "--config", conf, "--nodetach", stdout=DEVNULL, stderr=DEVNULL)
    carrier.subscriber.run("ip", "-4", "route", "del", "default")
    yield prefix
    carrier.subscriber.run("ip", "-4", "route", "add", "default", "via", "30.78.1.1")
    tayga.kill()
    tayga.wait()
    carrier.run("tayga", "--config", conf, "--rmtun")

@pytest.fixture
def ula(live, carrier):
    """The subscriber knocks from fd00::2, which NPTv6 (RFC 6296) translates -> to this address."""
    host, prefix = carrier.subscriber, "2001:db8:77::/64"
    set_up_link(host, "eth0", "fd00::2/64")
    set_up_link(carrier, "inner", "fd00::1/64")
    rule = "-A relay -s fd00::/64 -j NETMAP --to"
    carrier.run("ip6tables", "-t", "nat", *rule.split(), prefix)
    live.server.run("ip", "-6", "route", "add", prefix, "via", carrier.ip6)
    host.run("ip", "-6", "route", "replace", "default", "via", "fd00::1", "src", "fd00::2")
    yield "2001:db8:77::2"
    host.run("ip", "-6", "route", "replace", "default", "via", "2600:db8::1")
    host.run("ip", "addr", "del", "fd00::2/64", "dev", "eth0")
    carrier.run("ip", "addr", "del", "fd00::1/64", "dev", "inner")
    carrier.run("ip6tables", "-t", "nat", "-F", "relay")
    live.server.run("ip", "-6", "route", "del", prefix)

@pytest.mark.parametrize("where", ["box", "box6"])
def test_a_public_address_behind_nat_is_told_what_the_server_sees_and_the_option_for_it(
        live, carrier, where):
    seen = carrier.ip if where == "box" else carrier.ip6
    done = knock(live, host=carrier.subscriber, where=where)
    assert done.returncode == 76 and f"sees {seen}" in done.stderr, done
    assert f"--address {seen}" in done.stderr
    assert live.server.rules() == live.server.rules(ip6=True) == []
    option = ["--address", seen]
    assert f"for {seen} until" in opens(live, host=carrier.subscriber, where=where, options=option)

def test_an_address_that_is_written_otherwise_is_the_same(live, carrier):
    option = ["--address", "2001:0DB8:1:0:0:0:0:50"]
    opens(live, host=carrier.subscriber, where="box6", options=option)

@pytest.mark.parametrize("section", ["client", "box"])
def test_the_address_may_stand_in_the_config(live, carrier, section):
    edit(live.me, (f"[{section}]\n", f"[{section}]\naddress = {carrier.ip}\n"))
    assert f"for {carrier.ip} until" in opens(live, host=carrier.subscriber)

def test_address_any_compares_nothing(live, carrier):
    for where in "box", "box6":
        opens(live, host=carrier.subscriber, where=where, options=["--address", "any"])

@pytest.mark.parametrize("address", ["home.example.com", "192.0.2.0/24"])
def test_an_address_that_is_none_is_a_fault_of_the_command_line_with_words(live, address):
    fails(live, 64, "address has to be an IP address", options=["--address", address])

def test_an_address_that_is_none_is_a_fault_of_the_config_with_words(live):
    edit(live.me, ("[client]\n", "[client]\naddress = home.example.com\n"))
    fails(live, 78, "address has to be an IP address")

@pytest.mark.parametrize("where", ["box", "box6"])
def test_behind_nat_with_its_address_given_a_relay_that_knocks_from_its_own_is_noticed(
        live, carrier, where):
    """The relay is one more translation: the server sees it in the client's place."""
    program, relay, nat = ("iptables", "198.51.100.51", carrier.ip)
    if where == "box6":
        program, relay, nat = ("ip6tables", "2001:db8:1::51", carrier.ip6)
    set_up_link(carrier, "eth0", f"{relay}/{24 if where == 'box' else 64}")
    rule = f"-A relay -o eth0 -j SNAT --to-source {relay}"
    carrier.run(program, "-t", "nat", *rule.split())
    try:
        how = dict(host=carrier.subscriber, where=where, options=["--address", nat])
        fails(live, 76, f"sees {relay}", **how)
        assert live.server.rules() == live.server.rules(ip6=True) == []
    finally:
        carrier.run(program, "-t", "nat", "-F", "relay")

def test_an_ipv6_only_client_gets_in_at_an_ipv4_server_over_nat64(live, carrier, nat64):
    edit(live.me, (f"host = {live.server.ip}\n", f"host = {nat64}{live.server.ip}\n"))  # RFC 6052
    fails(live, 76, f"--address {carrier.ip}", host=carrier.subscriber)
    for transport in "kernel", "udp":
        said = opens(live, host=carrier.subscriber, transport=transport,
                     options=["--address", carrier.ip])
        assert f"for {carrier.ip} until" in said

def test_a_unique_local_client_gets_in_through_a_prefix_translation_without_an_option(
        live, carrier, ula):
    assert f"for {ula} until" in opens(live, host=carrier.subscriber, where="box6")

def test_a_unique_local_client_that_gives_its_address_notices_another(live, carrier, ula):
    how = dict(host=carrier.subscriber, where="box6")
    opens(live, options=["--address", ula], **how)
    fails(live, 76, f"sees {ula}", options=["--address", "2001:db8:77::3"], **how)

def test_an_ipv4_address_that_is_given_says_nothing_of_a_knock_by_ipv6(live, carrier, ula):
    """`address =` is that of a home whose IPv4 is translated to it, and its IPv6 by prefix."""
    edit(live.me, ("[client]\n", "[client]\naddress = 203.0.113.9\n"))
    assert f"for {ula} until" in opens(live, host=carrier.subscriber, where="box6")

@pytest.mark.parametrize("own", ["100.64.0.7", "192.168.7.7", "192.0.0.8"])
def test_an_address_that_is_nobodys_on_the_internet_needs_no_option_behind_nat(live, carrier, own):
    """RFC 6598's, RFC 1918's, and one of which versions of Python think differently."""
    host = carrier.subscriber
    set_up_link(host, "eth0", f"{own}/32")
    carrier.run("ip", "route", "add", own, "dev", "inner")
    host.run("ip", "route", "replace", "default", "via", "30.78.1.1", "src", own)
    try:
        assert f"for {carrier.ip} until" in opens(live, host=host)
    finally:
        host.run("ip", "route", "replace", "default", "via", "30.78.1.1")
        carrier.run("ip", "route", "del", own)
        host.run("ip", "addr", "del", f"{own}/32", "dev", "eth0")

# 3. A client's key lives

DAYS = 86400

def subkeys(home, key):
    """The fingerprints of a key's subkeys, in the order in which they were made."""
    listing = gpg(home, "--with-colons", "--list-keys", key).stdout
    return re.findall(r"(?m)^sub:.*\n^fpr:+(\w+)", listing)

def revoke(home, key, subkey=0):
    """Revoke a key, or its so-many-eth subkey: by gpg's dialogue, as by hand."""
    choice = [f"key {subkey}"] if subkey else []
    answers = [*choice, "revkey", "y", "0", "", "y", "save", ""]
    gpg(home, "--command-fd", "0", "--edit-key", key, input="\n".join(answers))

def let_expire(home, key, *subkey):
    gpg(home, "--quick-set-expire", key, "seconds=1", *subkey)
    time.sleep(2.1)  # times in OpenPGP are whole seconds

def signing_with(world, name):
    """An enrolled client whose primary key only certifies; a subkey signs."""
    home = private_directory(private_directory(world.lab.dir / name) / "gpg")
    gpg(home, "--quick-generate-key", f"{name}@example.com", "ed25519", "cert", "never")
    gpg(home, "--quick-add-key", fingerprint(home, name), "ed25519", "sign", "never")
    return second_client(world, name)

def copy_of(conf, name):
    """A thief's copy of a client's directory -> its config."""
    thief = conf.parent.with_name(name)
    sh("sh", "-c", 'cp -a "$0" "$1" && rm -f "$1"/gpg/S.*', conf.parent, thief)
    edit(thief / "tariq.conf", (f"{conf.parent}/", f"{thief}/"))
    return thief / "tariq.conf"

def enroll_again(world, conf):
    """The README's pipe once more, from keygen to join -> what enroll said."""
    user, run = config_values(conf, "client")["user"], world.lab.tariq
    public = run(world.client, "keygen", "-c", conf, user, user=NOBODY).stdout
    done = run(world.server, "enroll", "-c", world.conf, "--allow", "O 22", input=public)
    run(world.client, "join", "-c", conf, "box", user=NOBODY, input=done.stdout)
    return done.stderr

def refused_in_log(world, conf, *words):
    """A knock that gets no answer, and of which the log has a line with these words."""
    before = world.tariq.log
    fails(world, NO_ANSWER, "", conf=conf, timeout=1)
    world.tariq.wait_log("knock refused: ", before.count("knock refused: ") + 1)
    lines = world.tariq.log.removeprefix(before).splitlines()
    line = next(line for line in lines if "knock refused: " in line)
    assert all(word in line for word in (world.client.ip, *words)), line

def test_a_key_that_expired_and_was_renewed_opens_once_it_is_enrolled_again(live):
    conf = second_client(live, "renewed")
    home = conf.parent / "gpg"
    key = fingerprint(home, "renewed")
    let_expire(home, key)
    said = enroll_again(live, conf)
    assert "updated" in said and "expired" in said, said
    fails(live, 65, "expired", conf=conf)
    gpg(home, "--quick-set-expire", key, "1y")
    refused_in_log(live, conf, "renewed@example.com", "expired")
    year = time.strftime("%Y", time.gmtime(time.time() + 365 * DAYS))
    said = enroll_again(live, conf)
    assert "updated" in said and f" {year}-" in said, said
    assert "opened tcp/22" in opens(live, conf=conf)

def test_a_key_enrolled_again_that_is_as_it_was_is_said_to_be_the_same(live):
    assert "the same" in enroll_again(live, live.me)

def test_a_revoked_key_enrolled_again_is_refused_and_its_copy_opens_nothing(live):
    conf = second_client(live, "revoked")
    home, thief = conf.parent / "gpg", copy_of(conf, "thief")
    opens(live, conf=thief)
    revoke(home, fingerprint(home, "revoked"))
    said = enroll_again(live, conf)
    assert "updated" in said and "revoked" in said, said
    refused_in_log(live, thief, "revoked@example.com", "is revoked")
    fails(live, 65, "is revoked", conf=conf)

def test_an_older_copy_enrolled_again_takes_no_revocation_back_and_enroll_says_so(live):
    conf = second_client(live, "older")
    home, thief = conf.parent / "gpg", copy_of(conf, "older-thief")
    revoke(home, fingerprint(home, "older"))
    enroll_again(live, conf)
    assert "revoked" in enroll_again(live, thief)
    refused_in_log(live, thief, "older@example.com", "is revoked")

def test_a_signing_subkey_that_expired_and_was_renewed_opens_once_it_is_enrolled_again(live):
    conf = signing_with(live, "subkey")
    home = conf.parent / "gpg"
    key = fingerprint(home, "subkey")
    let_expire(home, key, *subkeys(home, key))
    fails(live, 65, "expired", conf=conf)
    enroll_again(live, conf)
    gpg(home, "--quick-set-expire", key, "1y", *subkeys(home, key))
    refused_in_log(live, conf, "subkey@example.com", "expired")
    assert "updated" in enroll_again(live, conf)
    opens(live, conf=conf)

def test_a_revoked_signing_subkey_opens_nothing_and_the_log_says_so(live):
    conf = signing_with(live, "signing")
    home, thief = conf.parent / "gpg", copy_of(conf, "signing-thief")
    opens(live, conf=thief)
    revoke(home, fingerprint(home, "signing"), 1)
    assert "updated" in enroll_again(live, conf)
    refused_in_log(live, thief, "signing@example.com", "is revoked")

def test_a_signing_subkey_added_later_is_named_in_the_log_until_it_is_enrolled(live):
    conf = second_client(live, "grown")
    home = conf.parent / "gpg"
    key = fingerprint(home, "grown")
    gpg(home, "--quick-add-key", key, "ed25519", "sign")
    refused_in_log(live, conf, subkeys(home, key)[-1][-16:], "is not in the server's keyring")
    assert "updated" in enroll_again(live, conf)
    opens(live, conf=conf)

def test_what_a_client_may_do_stays_as_it_is_when_its_key_is_updated(live):
    conf = second_client(live, "narrow", ("O 8022",))
    home, before = conf.parent / "gpg", live.conf.read_text()
    gpg(home, "--quick-set-expire", fingerprint(home, "narrow"), "1y")
    assert "updated" in enroll_again(live, conf)
    assert live.conf.read_text() == before

@pytest.mark.parametrize("trouble", ["is revoked", "expired on"])
def test_a_new_client_whose_key_is_no_longer_good_is_told_so_by_enroll(live, trouble):
    home = private_directory(live.lab.new("bad-key"))
    options, end = (at_time(-3 * DAYS), "2d") if trouble == "expired on" else ((), "never")
    gpg(home, *options, "--quick-generate-key", "bad@example.com", "ed25519", "cert,sign", end)
    if trouble == "is revoked":
        revoke(home, fingerprint(home, "bad"))
    public = gpg(home, "--armor", "--export", "bad").stdout
    done = live.lab.tariq(live.server, "enroll", "-c", live.conf, input=public, check=False)
    assert done.returncode == 65 and trouble in done.stderr, done
    assert "bad@example.com" not in live.conf.read_text()

# 4. The server's key lives

def server_with(world, name, *encrypting):
    """A server whose key has these encryption subkeys: days ago, algorithm, end -> its config, its
    keyring, its key."""
    ring = private_directory(world.lab.dir / f"ring-{name}", os.stat(world.ring).st_uid)
    gpg(ring, *at_time(-9 * DAYS), "--quick-generate-key", f"{name}@example.com", "ed25519",
        "cert,sign", "never")
    key = fingerprint(ring, name)
    for days, algorithm, end in encrypting:
        options = at_time(-days * DAYS) if days else ()
        gpg(ring, *options, "--quick-add-key", key, algorithm, "encr", end)
    conf = make_server(world.lab, world.server, f"server-{name}", server_gpg_dir=ring,
                       server_key=key)
    return conf, ring, key

@contextmanager
def running(world, conf, program=None):
    """A server of another config meanwhile -> the world with it."""
    server = Server(world.lab, world.server, conf, program).wait_log("listening for")
    yield but(world, conf=conf, tariq=server)
    assert server.stop() == 0

VALID, LAPSED, NEW = (4, "cv25519", "never"), (3, "cv25519", "2d"), (0, "cv25519", "1y")

@pytest.mark.parametrize("name, encrypting", [
    ("valid", [VALID, NEW]), ("lapsed", [LAPSED, NEW]), ("many", [VALID, LAPSED, LAPSED, NEW, NEW]),
    ("rsa-first", [(4, "rsa2048", "never"), NEW]), ("rsa-last", [VALID, (0, "rsa2048", "1y")])])
def test_a_server_key_with_more_than_one_encryption_subkey_opens(idle, name, encrypting):
    """gpg tries an old one first for the hidden recipient, fails, finds the right one, exits 2."""
    conf, _, _ = server_with(idle, name, *encrypting)
    client = second_client(idle, f"of-{name}", conf=conf)
    with running(idle, conf) as world:
        assert "opened tcp/22" in opens(world, conf=client)

def test_a_new_encryption_subkey_and_a_revoked_old_one_keep_nobody_out(idle):
    conf, ring, key = server_with(idle, "grown", VALID)
    early, late = (second_client(idle, name, conf=conf) for name in ("early", "late"))
    with running(idle, conf) as world:
        gpg(ring, "--quick-add-key", key, "cv25519", "encr", "1y")
        enroll_again(world, late)
        for client in early, late:  # one knows the old subkey alone
            opens(world, conf=client)
        revoke(ring, key, 1)
        enroll_again(world, late)
        for client in early, late:
            opens(world, conf=client)

def test_a_server_whose_only_encryption_subkey_expired_is_a_fault_with_words(idle):
    """At the client's knock, and at the server's check."""
    conf, _, _ = server_with(idle, "over", LAPSED)
    client = second_client(idle, "of-over", conf=conf)
    fails(idle, 65, "expired", conf=client)
    done = idle.lab.tariq(idle.server, "check", "-c", conf, check=False)
    assert done.returncode == 78 and "expired" in done.stderr, done

def test_a_server_key_that_was_renewed_is_taken_by_who_joins_again(idle):
    conf, ring, key = server_with(idle, "anew", NEW)
    client = second_client(idle, "of-anew", conf=conf)
    with running(idle, conf) as world:
        let_expire(ring, key)
        enroll_again(world, client)
        fails(world, 65, "expired", conf=client)
        gpg(ring, "--quick-set-expire", key, "1y")
        enroll_again(world, client)
        opens(world, conf=client)

# 5. Clocks a few seconds apart

def shifted(seconds):
    """A change of the program: its clock, and that of its gpg, is so many seconds from now."""
    return f"""
import time
clock, broken_down, options = time.time, time.gmtime, tariq.GPG[1:]
time.time = lambda: clock() + {seconds}
time.gmtime = lambda seconds=None: broken_down(time.time() if seconds is None else seconds)
now = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
tariq.GPG[1:] = ["--faked-system-time", now, *options]
"""

def set_up(world, conf, name, seconds):
    """keygen | enroll | join, the client's clock so many seconds from the server's -> what became
    of each, as far as the pipe came."""
    lab, program = world.lab, world.lab.program(shifted(seconds))
    how = dict(user=NOBODY, check=False)
    private_directory(conf.parent)
    steps = [world.client.run(program, "keygen", "-c", conf, f"{name}@example.com", **how)]
    steps.append(lab.tariq(world.server, "enroll", "-c", world.conf, input=steps[0].stdout,
                           check=False))
    if not steps[1].returncode:
        steps.append(world.client.run(program, "join", "-c", conf, "box", input=steps[1].stdout,
                                      **how))
        edit(conf, ("[box]\n", f"[box]\nhost = {world.server.ip}\n"))
    return steps

@pytest.fixture
def young(idle):
    """A world whose server's key is as young as a client's; the server takes itself to run for a
    minute already: it takes no frame from before its start."""
    shift, name = Shift(idle.lab), f"young-{next(idle.lab.count)}"
    shift.set(-60)
    with running(idle, make_server(idle.lab, idle.server, name), shift.program) as world:
        shift.set(0)
        yield world

@pytest.mark.parametrize("seconds", [-40, -1, 1, 40])
def test_clocks_less_than_a_minute_apart_spoil_neither_set_up_nor_a_knock(young, seconds):
    conf = young.lab.dir / f"clock{seconds}" / "tariq.conf"
    steps = set_up(young, conf, f"clock{seconds}", seconds)
    assert [step.returncode for step in steps] == [0, 0, 0], steps
    opens(young, conf=conf, change=shifted(seconds))

def test_a_key_of_two_hours_from_now_is_refused_with_words_about_clocks(young):
    *_, enroll = set_up(young, young.lab.dir / "ahead" / "tariq.conf", "ahead", 7200)
    assert enroll.returncode == 65 and re.search(r"7\d\d\d s .*clock", enroll.stderr), enroll
    assert "ahead@example.com" not in young.conf.read_text()

def test_a_client_two_hours_behind_is_told_of_clocks_by_join(young):
    *_, join = set_up(young, young.lab.dir / "behind" / "tariq.conf", "behind", -7200)
    assert join.returncode == 65 and re.search(r"7\d\d\d s .*clock", join.stderr), join

@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_a_knock_two_hours_off_gets_no_answer_and_the_client_says_its_own_time(live, seconds):
    began = int(time.time()) + seconds
    done = knock(live, timeout=1, change=shifted(seconds))
    said = re.search(r"it is (\d\d):(\d\d):(\d\d) UTC by this clock", done.stderr)
    assert done.returncode == NO_ANSWER and said, done
    hours, minutes, rest = map(int, said.groups())
    later = (hours * 3600 + minutes * 60 + rest - began) % DAYS
    assert later <= time.time() + seconds - began

# 6. Unprivileged containers

class Container(Host):
    """A host in a user namespace, which its network namespace belongs to: root there is user 100000
    here, as with LXC, Incus and rootless podman. /run is its own."""

    FIRST = 100_000

    def __init__(self, lab, name, number):
        self.lab, self.name, self.netns = lab, name, f"{lab.prefix}-{name}"
        self.ip, self.ip6 = f"198.51.100.{number}", f"2001:db8:1::{number}"
        words = ["unshare", "--user", "--net", "sh", "-c", "echo; exec sleep infinity"]
        self.outer = subprocess.Popen(words, stdout=PIPE)
        self.outer.stdout.readline()
        for kind in "uid", "gid":
            Path(f"/proc/{self.outer.pid}/{kind}_map").write_text(f"0 {self.FIRST} 65536\n")
        sh("ip", "netns", "attach", self.netns, self.outer.pid)
        lab.plug(self, "eth0", f"{self.ip}/24", f"{self.ip6}/64")
        script = ("mount -t tmpfs -o mode=755 tmpfs /run && ip link set lo up && echo ready "
                  "&& exec sleep infinity")
        words = [*self.enter(self.outer), "unshare", "--mount", "sh", "-c", script]
        self.init = subprocess.Popen(words, stdout=PIPE)
        assert self.init.stdout.readline() == b"ready\n"

    def enter(self, process, *more):
        return ["nsenter", f"--target={process.pid}", "--user", "--net", *more, "--setuid=0",
                "--setgid=0", "--"]

    def command(self, argv, user=None):
        start = self.enter(self.init, "--mount")
        return [*start, *(as_user(user) if user is not None else []), *map(str, argv)]

    def sshd(self):
        key = self.lab.new("sshd-key")
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        self.adopt(key)
        self.run("mkdir", "-p", "/run/sshd")
        self.popen("/usr/sbin/sshd", "-D", "-f", "/dev/null", "-h", key, "-o", "PidFile=none",
                   "-o", "UsePAM=no", stdout=DEVNULL, stderr=DEVNULL)
        wait_for(lambda: self.connects("127.0.0.1"), "sshd does not come up")

    def adopt(self, path):
        """Give the container what is below a path."""
        for each in (path, *path.rglob("*")):
            status = each.lstat()
            os.chown(each, self.FIRST + status.st_uid, self.FIRST + status.st_gid,
                     follow_symlinks=False)

    def remove(self):
        self.run("ip", "link", "del", "eth0")  # else it may answer who gets its address
        for pid in sh("ip", "netns", "pids", self.netns).stdout.split():  # sshd is one of them
            os.kill(int(pid), signal.SIGKILL)
        for process in self.init, self.outer:
            process.wait()
        wait_for(lambda: not sh("ip", "netns", "pids", self.netns).stdout, "something stays")
        sh("ip", "netns", "del", self.netns)

@pytest.fixture
def container(idle):
    """A container on the lab's switch -> a world in which it is the server, which does not run."""
    host = Container(idle.lab, f"container{next(idle.lab.count)}", 60)
    conf = make_server(idle.lab, idle.server, host.name)
    me = second_client(but(idle, conf=conf), f"of-{host.name}", ALLOW)
    edit(me, (idle.server.ip6, host.ip6), (idle.server.ip, host.ip))
    sh("gpgconf", "--homedir", conf.parent / ".server-gpg", "--kill", "all")
    host.adopt(conf.parent)
    host.drop_policy()
    host.sshd()
    for other in idle.client, idle.other:  # the one before had another link address
        other.run("ip", "neigh", "flush", "all")
    yield but(idle, conf=conf, server=host, me=me)
    host.remove()

@pytest.fixture
def boxed(container):
    """The container with a running server."""
    with running(container, container.conf) as world:
        yield world

def test_a_server_in_an_unprivileged_container_opens_and_says_what_it_lacks(boxed):
    for where, address in ("box", boxed.server.ip), ("box6", boxed.server.ip6):
        opens(boxed, where=where)
        assert boxed.client.connects(address) and not boxed.other.connects(address)
    assert boxed.tariq.log.count("receive buffer") == 1

def test_enroll_works_inside_an_unprivileged_container(boxed):
    opens(boxed, conf=second_client(boxed, f"new-{boxed.server.name}"))

def test_check_says_in_an_unprivileged_container_what_it_says_elsewhere(boxed):
    said = boxed.lab.tariq(boxed.server, "check", "-c", boxed.conf).stderr
    assert said.count("good") == 2 and said.count("INPUT leads to the doors") == 2, said

def test_a_machine_in_an_unprivileged_container_hides_with_a_way_back(boxed):
    for program in "iptables", "ip6tables":
        boxed.server.run(program, "-P", "INPUT", "ACCEPT")
    program = boxed.lab.program("tariq.TRIAL = 20")
    hide = boxed.server.popen(program, "hide", "-c", boxed.conf, stdout=PIPE,
                              stderr=subprocess.STDOUT)
    wait_for(lambda: not boxed.client.connects(boxed.server.ip), "it does not hide")
    opens(boxed)
    assert boxed.client.connects(boxed.server.ip)
    assert "hidden for good" in hide.communicate(timeout=30)[0]
    for address in boxed.server.ip, boxed.server.ip6:
        assert not boxed.other.connects(address)

def test_a_container_without_ipv6_opens_ipv4(container):
    container.server.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    with running(container, container.conf) as world:
        opens(world)
        assert world.client.connects(world.server.ip)

@pytest.mark.parametrize("capability", ["net_raw", "net_admin", "setpcap", "setuid"])
def test_a_server_that_lacks_a_capability_names_it(idle, capability):
    """As in containers that have some of root's; Docker's have no net_admin."""
    prefix = "setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}"
    server = Server(idle.lab, idle.server, idle.conf, prefix=prefix)
    try:
        assert server.process.wait(15) == SYSTEM
    finally:
        server.kill()
    assert f"CAP_{capability.upper()}" in server.log

# 7. No IPv6 in the kernel, or ip6tables that fails

def programs_but(lab, name):
    """A directory with all programs that root's PATH finds, but those whose name begins so."""
    (place := lab.new("programs")).mkdir()
    for directory in reversed(tariq.PATH.split(":")):
        for path in Path(directory).glob("*"):
            if not path.name.startswith(name):
                (place / path.name).unlink(missing_ok=True)
                (place / path.name).symlink_to(path)
    return place

@pytest.fixture(params=["fails", "is missing", "has nothing to do"])
def ipv4_only(idle, request):
    """A world where the server's ip6tables fails, is missing, or IPv6 is switched off. `words`
    start its program."""
    prefix, change = (), ""
    if request.param == "fails":
        fakes = Fakes(idle.lab)
        fakes.fault("ip6tables-fails")
        prefix = fakes.prefix
    elif request.param == "is missing":
        change = f"tariq.PATH = '{programs_but(idle.lab, 'ip6tables')}'"
    else:
        idle.server.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    program = idle.lab.program(change)
    server = Server(idle.lab, idle.server, idle.conf, program, prefix).wait_log("listening for")
    yield but(idle, words=(*prefix, program), tariq=server,
              warnings=0 if request.param == "has nothing to do" else 1)
    server.kill()
    idle.server.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0")
    idle.server.run("ip", "addr", "replace", f"{idle.server.ip6}/64", "dev", "eth0", "nodad")

def test_where_ip6tables_is_of_no_use_ipv4_is_served_with_one_warning(ipv4_only):
    opens(ipv4_only), opens(ipv4_only, "C", "22"), opens(ipv4_only)
    assert ipv4_only.client.connects(ipv4_only.server.ip)
    assert ipv4_only.tariq.stop() == 0 and ipv4_only.server.rules() == []
    said = [line for line in ipv4_only.tariq.log.splitlines() if not line.startswith("+ ")]
    assert sum("ip6tables" in line for line in said) == ipv4_only.warnings, said

def test_where_ip6tables_refuses_rules_doors_of_ipv4_keep_their_end_in_the_kernel(idle):
    fakes = Fakes(idle.lab)
    fakes.fault("ip6tables-refuses-rules")
    server = Server(idle.lab, idle.server, idle.conf, prefix=fakes.prefix)
    server.wait_log("listening for")
    assert "No doors for IPv6: ip6tables failed" in server.log and "time limit" not in server.log
    opens(idle)
    assert "--datestop" in idle.server.rules()[0]
    assert server.stop() == 0

def test_where_ip6tables_is_of_no_use_check_says_so_and_every_fault(ipv4_only):
    edit(ipv4_only.conf, ("may =", "nonsense = 1\nmay ="))
    done = ipv4_only.server.run(*ipv4_only.words, "check", "-c", ipv4_only.conf, check=False)
    assert done.returncode == 78 and "nonsense" in done.stderr and "ip6tables" in done.stderr, done

def test_where_ip6tables_is_of_no_use_a_name_of_both_families_gets_in_by_ipv4(ipv4_only):
    edit(ipv4_only.me, (f"host = {ipv4_only.server.ip}\n", f"host = {NAME}\n"))
    client = named(ipv4_only.client, ipv4_only.server.ip6, ipv4_only.server.ip)
    assert f"for {client.ip} until" in opens(ipv4_only, host=client)

# 8. Replies that cannot be sent, or get lost

TUNNEL6, IP6GRE = 769, 823  # linux/if_arp.h: ip6tnl's and ip6gre's; their link addresses: 16 bytes

@contextmanager
def tunnel_between(server, client, link_type):
    """A tunnel between two hosts, 203.0.113.1 and .2: tun devices, the server's of a link type."""
    def tunnel_end(kind=None):
        end = os.open("/dev/net/tun", os.O_RDWR)
        # TUNSETIFF: IFF_TUN | IFF_NO_PI; TUNSETLINK, which also sets how long link addresses are
        fcntl.ioctl(end, 0x400454CA, struct.pack("16sH", b"tun7", 0x1001))
        if kind:
            fcntl.ioctl(end, 0x400454CD, kind)
        return end
    def carry():
        while not over.is_set():
            for source in select.select(ends, [], [], 0.1)[0]:
                with suppress(OSError):  # an end that is not up yet
                    os.write(ends[source == ends[0]], os.read(source, 2000))
    ends = [server.inside(tunnel_end, link_type), client.inside(tunnel_end)]
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            for host, number in ((server, 1), (client, 2)):
                host.run("ip", "link", "set", "tun7", "mtu", "1280")
                set_up_link(host, "tun7", f"203.0.113.{number}/30", f"2001:db8:9::{number}/64")
            pool.submit(carry)
            yield
        finally:
            over.set()
            pool.shutdown()
            for end in ends:
                os.close(end)

@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="no tun devices here")
@pytest.mark.parametrize("kind", [TUNNEL6, IP6GRE])
@pytest.mark.parametrize("where", ["box", "box6"])
def test_knocks_by_a_tunnel_whose_link_addresses_have_16_bytes_are_answered(live, kind, where):
    with tunnel_between(live.server, live.client, kind):
        link, = json.loads(live.server.run("ip", "-j", "link", "show", "tun7").stdout)
        if link["link_type"] not in ("tunnel6", "gre6"):
            pytest.skip("this kernel's tun devices have no such type")
        edit(live.me, (live.server.ip6, "2001:db8:9::1"), (live.server.ip, "203.0.113.1"))
        for transport in "kernel", "udp":
            opens(live, where=where, transport=transport)

def test_a_gateway_that_forwards_inwards_only_leaves_a_line_that_nobody_answered(idle, lossy):
    lossy.run("iptables", "-A", "loss", "-i", "eth0", "-j", "DROP")
    with serving(idle, program=idle.lab.program("tariq.ANSWER_TIME = 1")) as server:
        fails(idle, NO_ANSWER, "No answer", host=lossy.far[0], timeout=1)
        server.wait_log("did not answer")
        assert re.search(rf"{lossy.far[0].ip}.*me@laptop.*did not answer", server.log)

def test_a_challenge_that_nobody_answers_leaves_a_line_with_who_and_from_where(idle):
    with serving(idle, program=idle.lab.program("tariq.ANSWER_TIME = 1")) as server:
        peer = Peer(idle).seal()
        peer.send(peer.frames())
        assert peer.hear(b"challenge")
        server.wait_log("did not answer")
        assert re.search(rf"{idle.client.ip}.*me@laptop.*did not answer", server.log)
        assert idle.server.rules() == []

@pytest.mark.parametrize("how", ["down", "gone"])
def test_an_interface_that_is_gone_when_the_reply_is_due_is_named_and_a_repeat_gets_in(idle, how):
    server, fakes = idle.server, Fakes(idle.lab)
    with serving(idle, fakes.prefix) as tariq_server:
        fakes.fault("gpg-slow")
        with knocking(idle, timeout=20) as waits:
            wait_for(lambda: children(tariq_server.listener), "no gpg")
            command = "ip link set eth0 down" if how == "down" else "ip link del eth0"
            server.run(*command.split())
            try:
                tariq_server.wait_log("a reply cannot be sent by eth0")
            finally:
                if how == "down":
                    set_up_link(server, "eth0", f"{server.ip6}/64")
                else:
                    idle.lab.plug(server, "eth0", f"{server.ip}/24", f"{server.ip6}/64")
                    for host in idle.lab.hosts.values():  # it has a new link address
                        host.run("ip", "neigh", "flush", "all")
            fakes.fault("none")
            assert "opened tcp/22" in waits.communicate(timeout=30)[0]

# 9. One rule text for both families

def rule_with(source):
    return (f"-A tariq {source} -p tcp -m conntrack --ctstate NEW -m tcp --dport {{dport}} "
            "-m time --datestop {until} -j ACCEPT")

def test_a_door_for_a_network_opens_a_24_of_ipv4_and_a_64_of_ipv6_and_says_so(idle, lossy):
    with serving(idle, open_tcp_port=rule_with("-s {net}")):
        assert "for 198.51.100.0/24 until" in opens(idle)
        assert "for 2001:db8:1::/64 until" in opens(idle, where="box6")
        for address in idle.server.ip, idle.server.ip6:
            assert idle.client.connects(address) and idle.other.connects(address)
        assert not lossy.far[0].connects(idle.server.ip)
        assert "-s 2001:db8:1::/64" in idle.server.rules(ip6=True)[0]

def test_a_door_for_a_network_is_one_for_all_addresses_in_it(idle):
    """From whichever of them it is opened again or closed."""
    with serving(idle, open_tcp_port=rule_with("-s {net}")):
        opens(idle), opens(idle, host=idle.other)
        assert len(idle.server.rules()) == 1
        assert "closed tcp/22" in opens(idle, "C", "22", host=idle.other)
        assert idle.server.rules() == []

NETS = """
table inet tariq {
    set nets4 { type ipv4_addr . inet_service; flags interval,timeout; }
    set nets6 { type ipv6_addr . inet_service; flags interval,timeout; }
    chain input {
        type filter hook input priority -10; policy drop;
        ct state established,related accept
        iif lo accept
        meta l4proto ipv6-icmp accept
        ip saddr . tcp dport @nets4 accept
        ip6 saddr . tcp dport @nets6 accept
    }
}
"""

def test_a_network_may_stand_in_open_command_and_close_command(idle, lossy):
    words, element = "element inet tariq nets{version}", "{ {net} . {dport}"
    commands = dict(open_command=f"nft add {words} {element} timeout {{seconds}}s }}",
                    close_command=f"nft delete {words} {element} }}")
    for program in "iptables", "ip6tables":
        idle.server.run(program, "-P", "INPUT", "ACCEPT")
    idle.server.run("nft", "-f", "-", input=NETS)
    try:
        with serving(idle, **commands):
            for where, address in ("box", idle.server.ip), ("box6", idle.server.ip6):
                assert not idle.other.connects(address)
                opens(idle, where=where)
                assert idle.other.connects(address)
            assert not lossy.far[0].connects(idle.server.ip)
            opens(idle, "C", "22", host=idle.other)
            assert not idle.client.connects(idle.server.ip)
    finally:
        idle.server.run("nft", "delete", "table", "inet", "tariq")
        idle.server.drop_policy()

def refused_start(world, **settings):
    """A server that ends by itself, at fault in its config -> its log."""
    server = Server(world.lab, world.server, variant(world, **settings))
    try:
        assert server.process.wait(15) == 78
    finally:
        server.kill()
    return server.log

@pytest.mark.parametrize("source", [
    "-s {ip}/24", "-s {ip}/64", "-s {ip}/255.255.255.0", "-s {net}/8", "--source={ip}/0", "",
    "-s 0.0.0.0/0", "-m comment --comment {ip}", "-s {ip}0", "-s {ip},192.0.2.0/24", "! -s {ip}"])
def test_a_rule_that_would_open_more_than_it_should_is_refused_with_words(idle, source):
    log = refused_start(idle, open_tcp_port=rule_with(source))
    assert "open_tcp_port" in log and "{net}" in log

def test_a_rule_with_seconds_is_refused_as_later_it_would_be_another_and_not_be_found(idle):
    rule = "-A tariq -s {ip} -p tcp --dport {dport} -m comment --comment {seconds} -j ACCEPT"
    log = refused_start(idle, open_tcp_port=rule)
    assert "open_tcp_port" in log and "its end, if any, is {until}" in log

def test_a_command_that_would_open_more_than_it_should_is_refused_with_words(idle):
    command = "nft add element inet tariq doors {ip}/24 {dport}"
    log = refused_start(idle, open_command=command, close_command="true {ip} {dport}")
    assert "open_command" in log and "{net}" in log

def test_commands_that_open_a_network_and_close_an_address_are_refused(idle):
    log = refused_start(idle, open_command="true {net} {dport}", close_command="true {ip} {dport}")
    assert "close_command" in log and "{net}" in log

# 10. Clocks, secrets, ports: what the log says

def clock_lines(server):
    return [line for line in server.log.splitlines() if "clock" in line]

@pytest.mark.parametrize("age, words", [(120, "ago"), (-120, "from now")])
def test_a_frame_from_a_clock_that_is_off_is_logged_with_how_far_and_from_where(idle, age, words):
    with serving(idle) as server:
        peer = Peer(idle).seal()
        peer.send(peer.frames(age))
        opens(idle)  # after it all of that has been read
        line, = clock_lines(server)
        assert re.search(rf"{idle.client.ip} .*\b1[12]\d s {words}", line)

def test_such_a_line_comes_once_a_minute_whoever_sends_such_frames(idle):
    with serving(idle) as server:
        for host in idle.client, idle.other:
            peer = Peer(idle, host=host).seal()
            for age in 90, 120, -120, 7200:
                peer.send(peer.frames(age))
        opens(idle)
        assert len(clock_lines(server)) == 1

def test_after_that_minute_it_comes_again(idle):
    assert tariq.COMPLAINT_TIME == 60
    with serving(idle, program=idle.lab.program("tariq.COMPLAINT_TIME = 1")) as server:
        peer = Peer(idle).seal()
        for count in 1, 2:
            peer.send(peer.frames(120))
            wait_for(lambda: len(clock_lines(server)) >= count)
            time.sleep(1)

def test_a_clock_that_is_behind_just_after_the_start_is_said_in_the_log(idle):
    """Its frames are from before the start, as a replay's would be: they get no answer yet."""
    with serving(idle) as server:
        fails(idle, NO_ANSWER, "UTC by this clock", timeout=1, change=shifted(-40))
        server.wait_log(f"{idle.client.ip} ")
        line, = (line for line in server.log.splitlines() if idle.client.ip in line)
        assert "start" in line

@pytest.mark.parametrize("wrong", ["secret", "ports"])
def test_a_wrong_secret_or_wrong_ports_leave_no_line(idle, wrong):
    secret = base64.b64encode(os.urandom(32)).decode()
    with serving(idle) as server:
        before = server.log
        if wrong == "secret":
            edit(idle.me, (config_values(idle.me, "box")["secret"], secret))
        options = ["-p", "1,2,3,4,5"] if wrong == "ports" else []
        fails(idle, NO_ANSWER, "No answer", timeout=1, options=options)
        assert server.log == before

# 11. A keyring whose path is too long for gpg-agent

LONGEST = 86  # bytes: of gpg-agent's sockets in it, S.gpg-agent.browser's path may have 106
TOO_LONG = pytest.mark.parametrize("size", [LONGEST + 1, 120])

def long_path(lab, size):
    """A path of so many bytes, which nothing has."""
    start = f"{lab.new('long')}-"
    return Path(start + "x" * (size - len(start)))

def copied(ring, to):
    sh("sh", "-c", 'cp -a "$0" "$1" && rm -f "$1"/S.*', ring, to)
    return to

def keygen_in(world, size):
    """keygen where the keyring's path has so many bytes."""
    conf = private_directory(long_path(world.lab, size - len("/gpg"))) / "tariq.conf"
    return world.lab.tariq(world.client, "keygen", "-c", conf, "me@laptop", user=NOBODY,
                           check=False)

@TOO_LONG
def test_keygen_with_a_path_that_is_too_long_has_words_for_it(idle, size):
    done = keygen_in(idle, size)
    assert done.returncode == 78 and "too long" in done.stderr and str(LONGEST) in done.stderr, done

def test_the_longest_path_that_gpg_agent_takes_works(idle):
    assert "BEGIN PGP" in keygen_in(idle, LONGEST).stdout

@TOO_LONG
def test_init_with_a_path_that_is_too_long_has_words_for_it(idle, size):
    conf = long_path(idle.lab, size - len("/.server-gpg")) / "tariq.conf"
    done = run_init(idle.lab, idle.server, conf, check=False)
    assert done.returncode == 78 and "too long" in done.stderr and not conf.exists(), done

@TOO_LONG
def test_check_and_the_start_with_a_keyring_that_was_moved_too_deep_have_words_for_it(idle, size):
    conf = variant(idle, server_gpg_dir=copied(idle.ring, long_path(idle.lab, size)))
    done = idle.lab.tariq(idle.server, "check", "-c", conf, check=False)
    assert done.returncode == 78 and "too long" in done.stderr, done
    server = Server(idle.lab, idle.server, conf)
    try:
        assert server.process.wait(15) != 0 and "too long" in server.log
    finally:
        server.kill()

@TOO_LONG
def test_a_knock_with_a_keyring_that_was_moved_too_deep_has_words_for_it(live, size):
    path = copied(live.me.parent / "gpg", long_path(live.lab, size))
    fails(live, 78, "too long", options=["-g", path])

# ---- other firewalls -----------------------------------------------------------------------------

def test_a_door_is_said_to_be_open_only_if_input_leads_to_it(idle):
    """As a firewall reload, iptables-restore or the README's way back may do."""
    with serving(idle) as server:
        for words in ("nft flush ruleset", "iptables -D INPUT -j tariq", "iptables -F tariq"):
            opens(idle)
            def shut():
                idle.server.run(*words.split(), check=False)  # noqa: B023
                if "nft" in words:  # noqa: B023
                    idle.server.drop_policy()
                return not idle.client.connects(idle.server.ip)
            wait_for(shut)  # once more: the server still looks after what the last request may need
            opens(idle)
            assert idle.client.connects(idle.server.ip) and len(idle.server.rules()) == 1, words
        idle.server.run("iptables", "-F", "tariq")
        opens(idle, "C", "22")
        assert "not closed" not in server.log, "what somebody else took out is closed"
        opens(idle, where="box6")

def test_where_the_kernel_knows_no_time_the_server_ends_doors_itself(idle):
    """An iptables without its time match: the real one, whose extension is covered."""
    extension = sh("sh", "-c", "ls /usr/lib/*/xtables/libxt_time.so").stdout.strip()
    prefix = ("sh", "-c", f'mount --bind /dev/null {extension} && exec "$@"', "sh")
    with serving(idle, prefix, open_timeout=SOON) as server:
        assert "refuses a rule with a time limit" in server.log \
            and "server ends doors" in server.log
        deadline = deadline_of(opens(idle))
        assert "--datestop" not in idle.server.rules()[0] and idle.client.connects(idle.server.ip)
        wait_for(lambda: not idle.server.rules(), "the door stays")
        assert time.time() > deadline - 0.5, "it is ended too early"
        opens(idle)
    assert idle.server.rules() == [], "flushed at stop"
    mission = "-A tariq -s {ip} -p tcp -m state --state NEW -m tcp --dport {dport} -j ACCEPT"
    with serving(idle, open_tcp_port=mission, open_timeout=SOON) as server:
        assert "server ends doors" in server.log
        opens(idle)
        assert idle.client.connects(idle.server.ip)
        wait_for(lambda: not idle.server.rules(), "the door stays")

def test_an_nft_table_of_its_own_hides_and_opens_without_any_iptables_rule():
    """The README's block as it stands."""
    with Lab() as lab:
        world = new_world(lab, drop=False, open_timeout=3)
        server, client, home = world.server, world.client, str(world.conf.parent)
        script = blocks("nft")[0].replace("sudo sh", "sh").replace("/etc/tariq", home)
        server.run("sh", "-ec", without_systemd(script))
        table = Path(home, "hide.nft").read_text()
        running = started(world)
        for where, address in (("box", server.ip), ("box6", server.ip6)):
            assert not client.connects(address)
            opens(world, where=where)
            assert client.connects(address) and not world.other.connects(address)
            wait_for(lambda: not client.connects(address),
                "the set's element does not end")  # noqa: B023
            opens(world, where=where), opens(world, "C", "22", where=where)
            assert not client.connects(address)
        opens(world)
        running.kill()
        wait_for(lambda: not client.connects(server.ip), "kill -9 leaves the door open past its "
            "end")
        running = started(world)
        opens(world)
        running.kill()
        running = started(world)
        opens(world, "C", "22")
        assert not client.connects(server.ip), "closed, though this server did not open it"
        opens(world)
        server.run("nft", "delete", "table", "inet", "tariq")
        fails(world, SYSTEM, "No such file or directory")
        server.run("nft", "-f", "-", input=table)
        opens(world)
        assert running.stop() == 0 and not client.connects(server.ip), "closed at stop"
        assert "-A" not in server.run("iptables-save").stdout

# ---- nobody is locked out by an ordinary mistake -------------------------------------------------

IPTABLES = ("iptables", "ip6tables")
CONFIG_FAULT = 78  # tariq.py --help

@contextmanager
def own_mounts(script):
    """A mount namespace in which a script has run: the words that start a program in it. A script
    that exits with 3 says that this machine cannot do it."""
    words = ["unshare", "--mount", "sh", "-ec", f"{script}\necho ready\nexec cat"]
    holder = subprocess.Popen(words, stdin=PIPE, stdout=PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = holder.stdout.readline()
        if said != "ready\n":
            said += holder.stdout.read()
            assert holder.wait() == 3, said
            pytest.skip(said)
        yield ["nsenter", f"--target={holder.pid}", "--mount", "--"]
    finally:
        holder.stdin.close()
        holder.wait()

def firewall(host):
    """All rules of a host, without counters and dates."""
    saved = "".join(host.run(f"{program}-save").stdout for program in IPTABLES)
    return re.sub(r"(?m)^#.*\n|\[\d+:\d+\]", "", saved)

def server_address(world, where):
    return world.server.ip6 if where == "box6" else world.server.ip

def gets_in(world, where="box", host=None):
    """Whether ssh gets in from a host, sooner or later."""
    address = server_address(world, where)
    wait_for(lambda: (host or world.client).connects(address), "ssh does not get in")
    return True

@pytest.fixture(scope="module")
def bob(world):
    """One more client of the world's server, from the same address as the first."""
    return second_client(world, "bob", ("O 22", "C 22"))

@pytest.mark.parametrize("old, new, key, code", [
    ("may =", "may = X 22", "may", CONFIG_FAULT),
    ("may =", "open_timeout = soon\nmay =", "open_timeout", CONFIG_FAULT),
    ("may =", "open_timout = 60\nmay =", "open_timout", CONFIG_FAULT),
    ("key = ", "key = xyz", "key", REFUSED)])  # then it is nobody's
def test_a_faulty_allow_section_refuses_its_client_alone_and_the_log_names_section_and_key(
        bob, live, old, new, key, code):
    start, head, section = live.conf.read_text().partition("[allow bob@example.com]\n")
    write(live.conf, start + head + section.replace(old, new, 1))
    log = len(live.tariq.log)
    for _ in range(2):
        fails(live, code, "box says: ", conf=bob)
        opens(live)
    assert gets_in(live)
    news = live.tariq.log[log:].splitlines()
    faults = [line for line in news if "[allow bob@example.com]" in line]
    assert len(faults) == 1 and f" {key} " in faults[0], "once a change of the file"
    write(live.conf, start + head + section)
    assert "opened" in opens(live, conf=bob)

def test_a_server_starts_with_a_faulty_allow_section_and_says_it(bob, idle):
    edit(idle.conf, ("[allow bob@example.com]\n", "[allow bob@example.com]\nopen_timout = 60\n"))
    server = started(idle)
    assert "[allow bob@example.com] open_timout " in server.log
    fails(idle, CONFIG_FAULT, "box says: ", conf=bob)
    opens(idle)

def test_two_sections_with_the_same_key_are_the_fault_of_both_and_of_nobody_else(bob, live):
    text = live.conf.read_text()
    write(live.conf, text + text[text.index("[allow bob@"):].replace("[allow bob@", "[allow rob@"))
    fails(live, CONFIG_FAULT, "box says: ", conf=bob)
    opens(live)
    live.tariq.wait_log("[allow rob@example.com] key "), live.tariq.wait_log("bob@example.com] key "
        "")

BROKEN = {
    "no INI": lambda path, text: write(path, f"{text}\nO 22\n"),
    "bytes": lambda path, text: path.write_bytes(b"\xff\xfe" + text.encode()),
    "empty": lambda path, text: write(path, ""),
    "without [server]": lambda path, text: write(path, text.replace("[server]", "[sever]")),
    "half a file": lambda path, text: write(path, text[:text.index("server_key")]),
    "a wrong value in [server]": lambda path, text: write(path, with_settings(
        text, {"open_timeout": "soon"})),
    "an unknown key in [server]": lambda path, text: write(path, with_settings(
        text, {"open_timout": "60"})),
    "gone": lambda path, text: path.unlink(),
    "a directory": lambda path, text: (path.unlink(), path.mkdir()),
    "open to others": lambda path, text: path.chmod(0o644),
}

@pytest.mark.parametrize("how", BROKEN)
def test_a_config_that_is_broken_changes_nothing_and_the_log_says_so_once(live, how):
    text, log = live.conf.read_text(), len(live.tariq.log)
    try:
        BROKEN[how](live.conf, text)
        for _ in range(2):
            opens(live)
        fails(live, REFUSED, "", "O", "99")
        assert gets_in(live)
        news = [line for line in live.tariq.log[log:].splitlines() if f"{live.conf}" in line]
        assert len(news) == 1 and config_values(live.me, "box")["secret"] not in news[0], news
    finally:
        if live.conf.is_dir():
            live.conf.rmdir()
        write(live.conf, text)
    opens(live)

def test_a_broken_config_that_is_mended_holds_at_the_next_knock(live):
    text = live.conf.read_text()
    write(live.conf, "")
    opens(live)
    write(live.conf, text.replace("    O 22/tcp\n", "    O 23/tcp\n"))
    fails(live, REFUSED, "", "O", "22")
    opens(live, "O", "23")

def test_a_section_that_is_taken_out_of_a_whole_file_is_gone_at_the_next_knock(bob, live):
    opens(live, conf=bob)
    write(live.conf, live.conf.read_text().partition("[allow bob@")[0])
    fails(live, REFUSED, "", conf=bob)
    opens(live)

def test_the_config_is_parsed_once_a_change_of_its_file(idle):
    program = idle.lab.program("real = tariq.Config.__init__\n"
                               "def counted(self, *words, **options):\n"
                               "    tariq.log('parsing')\n"
                               "    real(self, *words, **options)\n"
                               "tariq.Config.__init__ = counted\n")
    with serving(idle, program=program) as server:
        def parsed():
            return server.log.count("parsing")
        for _ in range(3):
            opens(idle)
        assert parsed() == 1
        write(server.conf, f"{server.conf.read_text()}\n")
        for _ in range(3):
            opens(idle)
        assert parsed() == 2
        write(server.conf, "")
        for _ in range(3):
            opens(idle)
        assert parsed() == 3, "also a broken one"

def check(world, path=None):
    return world.lab.tariq(world.server, "check", "-c", path or world.conf, check=False)

def test_check_says_every_fault_at_once_and_changes_nothing(bob, live):
    text = with_settings(live.conf.read_text(), {"open_timout": 60, "command_timeout": "long"})
    nobody = "[allow nobody]\nkey = " + "0" * 40 + "\nmay = O 22\n"
    write(live.conf, text.replace("may =", "mai =", 1) + nobody)
    def files():
        every = live.conf.parent.rglob("*")
        return {path: path.stat().st_mtime_ns for path in every if path.is_file()}
    before, rules, log = files(), firewall(live.server), live.tariq.log
    done = check(live)
    assert done.returncode == CONFIG_FAULT and "Traceback" not in done.stderr
    for words in ("[server] open_timout ", "[server] command_timeout ", "[allow me@laptop] mai ",
                  "[allow nobody]"):
        assert len([line for line in done.stderr.splitlines()
                    if words in line and "FAULT" in line]) == 1, (words, done.stderr)
    assert firewall(live.server) == rules and live.tariq.log == log
    assert files() == before

@pytest.mark.parametrize("settings", [
    {}, {"open_command": "true {ip} {dport}", "close_command": "true {ip} {dport}"}])
def test_check_leaves_no_agent_where_no_server_runs(live, settings):
    conf = make_server(live.lab, live.other, f"checked{len(settings)}")
    write(conf, with_settings(conf.read_text(), settings))
    done = live.lab.tariq(live.other, "check", "-c", conf, check=False)
    assert "No server runs" in done.stderr and "The key of [server] is good" in done.stderr, done
    home = str(conf.parent / ".server-gpg")
    wait_for(lambda: not live.other.run("pgrep", "-f", home, check=False).stdout, "it stays")

def test_check_of_a_good_server_exits_with_0(live):
    done = check(live)
    assert done.returncode == 0 and "FAULT" not in done.stderr and "Traceback" not in done.stderr
    assert "[server]" in done.stderr and "[allow me@laptop]" in done.stderr

def test_check_says_what_is_reached_without_a_knock(live):
    """What listens and is public; what a Docker has made, here by its rule, passes INPUT by."""
    assert "who reaches what listens: 22/tcp." in check(live).stderr \
        and "Docker" not in check(live).stderr
    public = write(live.lab.new("conf"),
                   with_settings(live.conf.read_text(), {"public_ports": "22, 80"}))
    none = write(live.lab.new("conf"),
                 with_settings(live.conf.read_text(), {"public_ports": "none"}))
    assert "Reached without a knock: 22/tcp.\n" in check(live, public).stderr
    assert "Reached without a knock: no port that listens.\n" in check(live, none).stderr
    nat = ("iptables", "-w", "-t", "nat")
    live.server.run(*nat, "-N", "DOCKER")
    try:
        live.server.run(*nat, "-A", "DOCKER", "!", "-i", "docker0", "-p", "tcp", "--dport", "8080",
                        "-j", "DNAT", "--to-destination", "172.17.0.2:80")
        assert "Docker publishes ports past INPUT, hidden or not: 8080.\n" in check(live).stderr
    finally:
        live.server.run(*nat, "-F", "DOCKER")
        live.server.run(*nat, "-X", "DOCKER")

def test_check_names_a_file_of_saved_rules_that_would_hide_without_a_server(live):
    rules = "*filter\n:tariq-hide - [0:0]\n-A INPUT -j tariq-hide\nCOMMIT\n"
    saved = write(live.lab.new("saved"), rules)
    words = f"{saved} has tariq-hide: after a reboot that hides this machine"
    for found in (True, False):
        program = live.lab.program(f"tariq.SAVED_RULES = ('{saved}',)\n")
        done = live.server.run(program, "check", "-c", live.conf, check=False)
        assert done.returncode == 0 and (words in done.stderr) == found, done
        saved.write_text("*filter\nCOMMIT\n")

@pytest.mark.parametrize("module", ["scapy", "PIL"])
def test_check_finds_a_module_missing_without_which_no_server_starts(live, module):
    program = live.lab.program(
        "import importlib.machinery\n"
        "finder = importlib.machinery.PathFinder\n"
        "find = finder.find_spec\n"
        "finder.find_spec = lambda name, *more: (\n"
        f"    None if name == '{module}' else find(name, *more))\n")
    done = live.server.run(program, "check", "-c", live.conf, check=False)
    assert done.returncode == CONFIG_FAULT and len(re.findall(
        f"FAULT: First install .*{tariq.PACKAGES[module]}$", done.stderr, re.M)) == 1, done

STOPS = {
    "an unknown key": {"open_timout": 60},
    "a key that is wrong": {"open_timeout": "soon"},
    "no close_command": {"open_command": "true {ip} {dport}"},
    "no such keyring": {"server_gpg_dir": "/nonexistent"},
    "root's keyring": {"server_gpg_dir": "ROOTS"},
    "no such key": {"server_key": "0" * 40},
    "no secret key": {"server_gpg_dir": "PUBLIC"},
    "no rule": {"open_tcp_port": "-A tariq {ip} {dport} --nonsense"},
    "{ip}/24": {"open_tcp_port": "-A tariq -s {ip}/24 -p tcp --dport {dport} -j ACCEPT"},
}

def public_keyring(world):
    """The server's, without its secret keys."""
    (home := world.lab.new("keyring")).mkdir(0o700)
    server = config_values(world.conf, "server")
    sh("cp", server["server_gpg_dir"] + "/pubring.kbx", home)
    sh("chown", "-R", "--reference", server["server_gpg_dir"], home)
    return home

@pytest.mark.parametrize("fault", STOPS)
def test_check_finds_what_stops_a_start_and_the_service_is_not_ready_then(live, fault):
    """NOTIFY_SOCKET, as systemd with Type=notify has it: without READY=1 a restart fails aloud."""
    (roots := live.lab.new("keyring")).mkdir(0o700)
    places = {"ROOTS": roots, "PUBLIC": public_keyring(live)}
    settings = {key: places.get(value, value) for key, value in STOPS[fault].items()}
    path = write(live.lab.new("conf"), with_settings(live.conf.read_text(), settings))
    done = check(live, path)
    assert done.returncode == CONFIG_FAULT and "FAULT: " in done.stderr, done
    assert "Traceback" not in done.stderr
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(live.lab.new("notify")))
        prefix = ("env", f"NOTIFY_SOCKET={notified.getsockname()}")
        server = Server(live.lab, live.other, path, prefix=prefix)
        code = server.process.wait(LONG)
        assert code in (CONFIG_FAULT, DIED, SYSTEM, 69), server.log
        assert code == CONFIG_FAULT or fault in ("no such key", "no rule", "no such keyring")
        assert not select.select([notified], [], [], 0)[0], "it said that it is ready"
        assert "tariq: " in server.log and "Traceback" not in server.log

@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_is_ready_when_it_listens(idle, abstract):
    path = f"\0{idle.lab.prefix}" if abstract else str(idle.lab.new("notify"))
    with idle.server.inside(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(path)
        notified.settimeout(LONG)
        prefix = ("env", f"NOTIFY_SOCKET={path}".replace("\0", "@"))
        with serving(idle, prefix, ready="") as server:
            assert notified.recv(100) == b"READY=1" and packet_sockets(server.listener)
            opens(idle)
            assert not select.select([notified], [], [], 0)[0], "once"

def test_a_service_whose_listener_does_not_come_up_is_never_ready(idle):
    fakes = Fakes(idle.lab)
    fakes.fault("gpg-dies")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(idle.lab.new("notify")))
        prefix = ("env", f"NOTIFY_SOCKET={notified.getsockname()}", *fakes.prefix)
        server = Server(idle.lab, idle.server, idle.conf, prefix=prefix)
        assert server.process.wait(LONG) == DIED, "systemd starts it again: gpg may be well then"
        assert not select.select([notified], [], [], 0)[0] and "listening for" not in server.log

def key_of(world):
    """The public key of somebody who is not enrolled."""
    path = world.lab.new("new") / "tariq.conf"
    return world.lab.tariq(world.client, "keygen", "-c", path, "new@key").stdout

DISKS = {
    "tmpfs": "mount -t tmpfs -o size=1m,mode=755 tmpfs {disk}",
    "ext4": "truncate -s 8M {disk}.image; "
            "{{ mkfs.ext4 -q {disk}.image && mount -o loop {disk}.image {disk}; }} || exit 3",
}

@pytest.mark.parametrize("kind", DISKS)
def test_a_full_disk_below_the_keyring_stops_no_knock_also_after_a_restart_and_enroll_says_it(
        idle, kind):
    lab, disk = idle.lab, idle.lab.new("disk")
    disk.mkdir()
    script = DISKS[kind].format(disk=disk)
    script += f"\ncp -a {idle.ring} {disk}/gpg; rm -f {disk}/gpg/S.*"
    path = variant(idle, server_gpg_dir=disk / "gpg")
    new_key = key_of(idle)
    with own_mounts(script) as inside:
        try:
            for size in ("64k", "1"):  # to the last byte
                words = ["dd", "if=/dev/zero", f"of={disk}/fill-{size}", f"bs={size}"]
                full = sh(*inside, *words, check=False)
                assert "No space left" in full.stderr
            for _ in range(2):  # the second: a restart, with an agent that is to start anew
                server = Server(lab, idle.server, path, prefix=inside).wait_log("listening for")
                opens(idle), opens(idle, "C", "22")
                assert server.stop() == 0
                sh(*inside, "gpgconf", "--homedir", disk / "gpg", "--kill", "all", check=False)
            before = path.read_text()
            done = idle.server.run(*inside, lab.dir / "tariq.py", "enroll", "-c", path,
                                   input=new_key, check=False)
            assert done.returncode == SYSTEM and done.stdout == "" and path.read_text() == before
            assert "full" in done.stderr and f"{disk}" in done.stderr
            assert done.stderr.count("\n") == 1
        finally:
            sh(*inside, "gpgconf", "--homedir", disk / "gpg", "--kill", "all", check=False)

def test_a_full_disk_below_the_config_leaves_it_whole_and_enroll_says_it(idle):
    lab, disk = idle.lab, idle.lab.new("disk")
    disk.mkdir()
    path, text = disk / "tariq.conf", idle.conf.read_text()
    script = f"mount -t tmpfs -o size=64k,mode=755 tmpfs {disk}; cp -p {idle.conf} {path}"
    new_key = key_of(idle)
    with own_mounts(script) as inside:
        sh(*inside, "dd", "if=/dev/zero", f"of={disk}/fill", "bs=4k", check=False)
        done = idle.server.run(*inside, lab.dir / "tariq.py", "enroll", "-c", path, input=new_key,
                               check=False)
        assert done.returncode == SYSTEM and "No space left" in done.stderr and done.stdout == ""
        assert f"{disk}" in done.stderr and done.stderr.count("tariq: ") == 1
        assert sh(*inside, "cat", path).stdout == text
        assert sh(*inside, "ls", disk).stdout.split() == ["fill", "tariq.conf"]

# What a firewall has to be for a door to be what the client reads of it.

@pytest.fixture
def reset(idle):
    """The world while no server runs; its firewall is as it was afterwards."""
    yield idle
    if idle.tariq:
        idle.tariq.kill()
        idle.tariq = None
    for program in ("iptables-legacy", "ip6tables-legacy"):
        idle.server.run(program, "-F"), idle.server.run(program, "-X")
    idle.server.run("nft", "flush", "ruleset")
    idle.server.drop_policy()

def flush(host, *command):
    for program in IPTABLES:
        host.run(program, *command)

@pytest.mark.parametrize("where", ["box", "box6"])
@pytest.mark.parametrize("when", ["a server runs", "before a start", "before a restart"])
def test_after_a_flush_under_drop_ssh_really_gets_in(reset, where, when):
    if when != "before a start":
        started(reset)
    flush(reset.server, "-F")
    if when == "before a restart":  # what was put back must come through that
        opens(reset)
    if when != "a server runs":
        assert not reset.tariq or reset.tariq.stop() == 0
        started(reset)
    opens(reset)  # by IPv4: until then IPv6's neighbours may not even find each other
    wait_for(lambda: "ipv6-icmp" in reset.server.run("ip6tables", "-S", "tariq").stdout)
    for host in (reset.server, reset.client):
        host.run("ip", "-6", "neigh", "flush", "all")
    said = opens(reset, where=where)
    assert said.startswith("opened tcp/22 ") and "but" not in said
    assert gets_in(reset, where) and not reset.other.connects(server_address(reset, where))

def test_a_flush_under_drop_is_logged_once_in_each_family(reset):
    server = started(reset)
    flush(reset.server, "-F")
    for _ in range(3):
        opens(reset), opens(reset, where="box6")
    assert len(re.findall(r"(?m)^ip6?tables: .*put back", server.log)) == 2
    assert len(re.findall(r"(?m)^iptables: .*put back", server.log)) == 1

@pytest.mark.parametrize("where", ["box", "box6"])
def test_where_nothing_drops_the_client_reads_that_no_port_is_hidden(reset, where):
    started(reset)
    reset.server.run("nft", "flush", "ruleset")
    for _ in range(2):
        said = opens(reset, where=where)
        assert said.startswith("opened tcp/22 ") and "but INPUT drops nothing" in said
    assert said.count("but") == 1
    reset.server.drop_policy()
    assert "but" not in opens(reset, where=where) and gets_in(reset, where)

BEFORE = {"a chain": ("-N guard", "-A guard -p tcp --dport 22 -j DROP", "-I INPUT -j guard"),
          "a DROP": ("-I INPUT -p tcp --dport 22 -j DROP",),
          "a REJECT": ("-I INPUT -p tcp --dport 22 -j REJECT",)}

@pytest.mark.parametrize("where, program", [("box", "iptables"), ("box6", "ip6tables")])
@pytest.mark.parametrize("what", BEFORE)
def test_what_stands_before_tariqs_chain_in_input_is_in_the_clients_line(
        reset, where, program, what):
    started(reset)
    for rule in BEFORE[what]:
        reset.server.run(program, *rule.split())
    said = opens(reset, where=where)
    assert said.startswith("opened tcp/22 ") and "but another rule stands before" in said
    assert not reset.client.connects(server_address(reset, where))

def test_a_rule_before_tariqs_chain_that_accepts_is_no_doubt(reset):
    started(reset)
    reset.server.run("iptables", "-I", "INPUT", "-p", "tcp", "--dport", "443", "-j", "ACCEPT")
    assert "but" not in opens(reset) and gets_in(reset)

@pytest.mark.parametrize("where, program",
                         [("box", "iptables-legacy"), ("box6", "ip6tables-legacy")])
def test_a_drop_in_the_legacy_tables_is_in_the_clients_line_and_nothing_else_is(
        reset, where, program):
    started(reset)
    reset.server.run(program, "-I", "INPUT", "-p", "tcp", "--dport", "22", "-j", "DROP")
    said = opens(reset, where=where)
    assert f"but the rules of {program} may refuse you" in said and "another rule" not in said
    assert not reset.client.connects(server_address(reset, where))
    reset.server.run(program, "-F")
    assert "but" not in opens(reset, where=where) and gets_in(reset, where)

def test_of_several_ports_the_clients_line_has_the_doubt_of_all(bob, reset):
    """Also of a door that it shares with another client of its address, which ends later."""
    edit(reset.conf, ("[allow bob@example.com]\n", "[allow bob@example.com]\nopen_timeout = 60\n"))
    started(reset)
    reset.server.run("nft", "flush", "ruleset")
    for how in ({}, {"conf": bob}):
        assert "but INPUT drops nothing" in opens(reset, **how)
    assert "but INPUT drops nothing" in opens(reset, "O", "53/udp", "8022", "22")

def test_a_door_of_another_address_of_the_same_client_stays_and_c_says_so(live):
    opens(live)
    rules = live.server.rules()
    fails(live, REFUSED, f"tcp/22 is open for {live.client.ip} until ", "C", "22", host=live.other)
    assert live.server.rules() == rules and gets_in(live)
    assert "closed tcp/22" in opens(live, "C", "22")
    assert doors(live) == []

def doors(world, ip6=False):
    """The rules of open doors."""
    return [rule for rule in world.server.rules(ip6) if " NEW " in rule]

def test_a_door_of_another_client_of_the_same_address_stays_and_c_says_so(bob, live):
    opens(live)
    rules = live.server.rules()
    fails(live, REFUSED, f"tcp/22 is open for {live.client.ip} until ", "C", "22", conf=bob)
    assert live.server.rules() == rules and gets_in(live)

def test_c_where_no_door_is_says_that_it_was_shut(live):
    assert "tcp/22 was shut already" in opens(live, "C", "22")
    opens(live)
    live.server.run("iptables", "-F", "tariq")
    assert "tcp/22 was shut already" in opens(live, "C", "22"), "somebody else took it out"

def test_a_shared_door_whose_rule_was_flushed_is_opened_again_for_who_knocks(bob, live):
    edit(live.conf, ("[allow bob@example.com]\n", "[allow bob@example.com]\nopen_timeout = 60\n"))
    end = opens(live)
    live.server.run("iptables", "-F", "tariq")
    assert opens(live, conf=bob) == end, "the later end holds"
    assert gets_in(live) and len(doors(live)) == 1

def test_what_can_be_closed_is_closed_where_another_port_of_the_request_cannot(live):
    opens(live, "O", "22", "8022")
    other = second_client(live, "neighbour", ("O 23", "C *"))
    opens(live, "O", "23", conf=other)
    fails(live, REFUSED, "closed tcp/23 for", "C", "22", "23", "8022", conf=other)
    assert len(doors(live)) == 2, "its own is shut, and those of the other client are open"

def test_each_port_is_told_its_own_end_where_a_door_is_shared(live):
    """The neighbour's door for 22 ends later, and stays."""
    later = re.search("until (.*)", opens(live))[1]
    other = second_client(live, "neighbour", ("O 22 23",))
    edit(live.conf, ("[allow neighbour@example.com]\n",
                     "[allow neighbour@example.com]\nopen_timeout = 60\n"))
    ends = re.findall(r"opened (\S+) .*? until ([^;\n]+)", opens(live, "O", "22", "23", conf=other))
    assert ends[0] == ("tcp/22", later) and ends[1][0] == "tcp/23" and ends[1][1] < later

def test_any_port_may_be_permitted_by_a_star(idle):
    may = second_client(idle, "star", ("O *", "C *"))
    started(idle)
    assert opens(idle, "O", "8022", "53/udp", "1", conf=may).count("opened ") == 3
    assert "closed tcp/8022" in opens(idle, "C", "8022", conf=may) and len(doors(idle)) == 2
    fails(idle, REFUSED, "E id", "E", "id", conf=may)
    fails(idle, 64, "", "O", "*", conf=may)  # no port to open

@pytest.mark.parametrize("request_, part", [
    ("O 22 23 53/udp", "O 23/tcp"), ("O 22 53", "O 53/tcp"), ("C 22 99/udp", "C 99/udp"),
    ("E false now", "E false now")])
def test_a_request_of_which_a_part_is_not_permitted_names_that_part_and_does_nothing(
        live, request_, part):
    fails(live, REFUSED, f"you may not {part} here", *request_.split())
    assert doors(live) == []

@pytest.mark.parametrize("where, net", [("box", "198.51.100.0/24"), ("box6", "2001:db8:1::/64")])
def test_net_opens_for_the_network_around_an_address_by_one_text_for_both_families(
        idle, where, net):
    rule = ("-A tariq -s {net} -p tcp -m conntrack --ctstate NEW -m tcp --dport {dport} "
            "-m time --datestop {until} -j ACCEPT")
    with serving(idle, open_tcp_port=rule):
        assert f"for {net} until" in opens(idle, where=where)
        assert gets_in(idle, where) and gets_in(idle, where, idle.other)
        assert len(doors(idle, where == "box6")) == 1
        said = opens(idle, "C", "22", where=where, host=idle.other)
        assert f"closed tcp/22 on {where} for {net}" in said and doors(idle, where == "box6") == []

# The set-up, on machines of its own.

@pytest.fixture
def fresh(site):
    """A machine on which Tariq is not installed; `me` has a clone in the home directory."""
    machine = Machine(site, "box")
    machine.run("rm", "/usr/local/bin/tariq.py")
    return machine

def test_init_without_systemd_installs_program_config_and_key_and_says_how_to_run_it(fresh):
    done = fresh.shell("sudo ./tariq.py init")
    assert "/usr/local/bin/tariq.py server" in done.stderr
    assert "keygen" in done.stderr.splitlines()[-1], "the next command to type"
    modes = "stat -c '%a %U' /usr/local/bin/tariq.py /etc/tariq/tariq.conf /etc/tariq/.server-gpg"
    assert fresh.run("sh", "-c", modes).stdout.splitlines() == ["755 root", "600 root", "700 tariq"]
    fresh.run("cmp", "/home/me/tariq.py", "/usr/local/bin/tariq.py")
    assert "listening for" in fresh.serve().log

def test_init_again_keeps_config_and_key_and_brings_a_newer_program(fresh):
    def restored():
        words = "cat /etc/tariq/tariq.conf; ls -l /etc/tariq/.server-gpg"
        return fresh.run("sh", "-c", words).stdout
    fresh.shell("sudo ./tariq.py init")
    before = restored()
    fresh.shell("echo '# newer' >> tariq.py; sudo ./tariq.py init")
    assert restored() == before
    assert fresh.run("tail", "-n1", "/usr/local/bin/tariq.py").stdout == "# newer\n"
    assert "wrote" not in fresh.shell("sudo tariq.py init").stderr, "nothing is new"

@pytest.mark.parametrize("spoilt", ["chmod 644", "chown me", "ln -sf /home/me/tariq.py"])
def test_init_makes_the_program_roots_and_executable_whatever_was_there(fresh, spoilt):
    """As from `cp`, or `install -o me`: the service runs it as root."""
    fresh.run("install", "-m", "755", "/home/me/tariq.py", "/usr/local/bin/tariq.py")
    fresh.run(*spoilt.split(), "/usr/local/bin/tariq.py")
    fresh.shell("sudo ./tariq.py init")
    found = fresh.run("stat", "-c", "%a %U %F", "/usr/local/bin/tariq.py").stdout
    assert found == "755 root regular file\n"

MISSING_PACKAGES = {
    # And a module of Python's that is named like the program (Debian's python3-gpg).
    "gnupg": "rm /usr/bin/gpg; mkdir -p /usr/lib/python3/dist-packages/gpg; "
             "touch /usr/lib/python3/dist-packages/gpg/__init__.py",
    "iptables": "rm /usr/sbin/iptables /usr/sbin/ip6tables",
    "iproute2": "rm /usr/bin/ss",
    "python3-scapy": "rm -rf /usr/bin/scapy /usr/lib/python3/dist-packages/scapy",
    "python3-pil": "rm -r /usr/lib/python3/dist-packages/PIL"}

@pytest.mark.parametrize("packages", [*((name,) for name in MISSING_PACKAGES),
                                      tuple(sorted(MISSING_PACKAGES))])
def test_init_names_missing_packages_as_one_line_before_it_touches_anything(fresh, packages):
    """Away with them in a mount namespace: an overlay over /usr, from which they are removed."""
    cover = ["set -e", "mount -t tmpfs tmpfs /mnt", "mkdir /mnt/up /mnt/work /mnt/local",
             "mount --bind /usr/local/bin /mnt/local",
             "mount -t overlay overlay -o lowerdir=/usr,upperdir=/mnt/up,workdir=/mnt/work /usr",
             "mount --bind /mnt/local /usr/local/bin",
             *(MISSING_PACKAGES[name] for name in packages), 'exec "$@"']
    def state():
        return fresh.run("sh", "-c", "ls -lR /etc /usr/local/bin; cat /etc/passwd").stdout
    before = state()
    done = fresh.run("unshare", "--mount", "sh", "-c", "\n".join(cover), "sh",
                     "/home/me/tariq.py", "init", check=False)
    line = done.stderr.strip()
    assert done.returncode == 69 and "\n" not in line and "apt-get install -y" in line, done
    named = line.split("apt-get install", 1)[1].split()
    assert tuple(sorted(word for word in named if not word.startswith("-"))) == packages
    assert state() == before

@pytest.mark.skipif(not shutil.which("sudo"), reason="sudo is not installed")
def test_enroll_takes_key_and_profile_as_files_where_sudo_asks_for_a_password(fresh, site):
    """No pipe: nothing competes with sudo's question for the terminal's input."""
    laptop = Machine(site, "laptop")
    fresh.shell("sudo ./tariq.py init")
    fresh.run("sh", "-c", "echo me:secret | chpasswd; echo 'me ALL=(ALL) ALL' > /etc/sudoers.d/me")
    fresh.sshd(system=True)
    laptop.shell("tariq.py keygen me@laptop > me.key; scp -q me.key me@box.example.com:")
    assert fresh.shell("sudo -n true", check=False).returncode, "sudo asks for no password"
    typed = 'sudo tariq.py enroll --allow "O 22" < me.key > me.profile'
    master, terminal = pty.openpty()
    start = ["setsid", "--ctty", "--wait", "bash", "-c", f"cd; {typed}"]
    process = fresh.popen(*start, user="me", stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    said = ""
    try:
        while "assword" not in said:
            said += os.read(master, 1000).decode(errors="replace")
        os.write(master, b"secret\n")
        assert process.wait(LONG) == 0
    finally:
        process.kill()
        os.close(master)
    laptop.shell("scp -q me@box.example.com:me.profile .")
    laptop.shell("tariq.py join box.example.com < me.profile")
    fresh.serve()
    assert laptop.knock("O", "22").stdout.startswith("opened tcp/22 ") and laptop.ssh()

# ---- hide ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting, value, code", [
    ("server_key", "0" * 40, 78), ("server_gpg_dir", "/nonexistent", 69),
    ("server_gpg_dir", "/", 78)])
def test_a_server_that_could_let_nobody_in_hides_nothing_at_its_start(idle, setting, value, code):
    conf = variant(idle, public_ports="none", **{setting: value})
    server = Server(idle.lab, idle.server, conf)
    assert server.process.wait(LONG) == code, server.log
    for program in ("iptables", "ip6tables"):
        assert "tariq-hide" not in idle.server.run(program, "-S").stdout

ECHO = """
import socket, threading
def carry(connection):
    while data := connection.recv(65536):
        connection.sendall(data)
def tcp():
    with socket.create_server(("", 7000), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        while True:
            threading.Thread(target=carry, args=(listener.accept()[0],), daemon=True).start()
def udp(family, any_address):
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((any_address, 7000))
        while True:
            data, where = sock.recvfrom(2048)
            sock.sendto(data, where)
for where in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "2001:db8:1::10")):
    threading.Thread(target=udp, args=where, daemon=True).start()
tcp()
"""
HIDDEN = [["-A INPUT -j tariq-hide"]] * 2  # in both families, without an end

@pytest.fixture(scope="module")
def open_world():
    """As `world`, but its server has no firewall, and echoes at port 7000, TCP and UDP."""
    with Lab() as lab:
        world = new_world(lab, drop=False)
        world.server.popen(sys.executable, "-c", ECHO)
        wait_for(lambda: world.server.run("ss", "-Hlntu").stdout.count(":7000") >= 3)
        yield world

@pytest.fixture
def bare(open_world):
    """The open world with a running server; what was hidden is open again afterwards."""
    text, world = open_world.conf.read_text(), open_world
    world.server.run("nft", "flush", "ruleset")
    world.hides = []
    started(world)
    yield world
    for process in [*world.hides, world.tariq.process]:
        if process.poll() is None:
            process.kill()
        process.wait()
    assert "Traceback" not in world.tariq.log
    write(world.conf, text)

def hide(world, *words, program=None, prefix=()):
    """Run `hide` to its end."""
    words = [*prefix, program or world.lab.dir / "tariq.py", "hide", "-c", world.conf, *words]
    return world.server.run(*words, check=False)

def start_hide(world, *words, program=None):
    """`hide` in the background, from when both families are hidden (or it has ended)."""
    words = [program or world.lab.dir / "tariq.py", "hide", "-c", world.conf, *words]
    process = world.server.popen(*words, stdout=PIPE, stderr=subprocess.STDOUT)
    world.hides.append(process)
    wait_for(lambda: process.poll() is not None or all(jumps(world)), "hide does not hide")
    return process

def jumps(world):
    """INPUT's jumps to what hides, in each family."""
    listed = [world.server.run(program, "-S", "INPUT").stdout for program in IPTABLES]
    return [re.findall("(?m)^-A INPUT .*tariq-hide$", rules) for rules in listed]

def kernels_end(world):
    """When the kernel ends what hides, in seconds since the epoch; 0: it hides nothing."""
    ends = [re.search(r"--datestop (\S+) ", rule) for found in jumps(world) for rule in found]
    return min((calendar.timegm(time.strptime(end[1], "%Y-%m-%dT%H:%M:%S")) for end in ends),
               default=0)

def on_trial(world, look):
    """`hide`, and what `look` does while it is on trial -> the process, the trial's end. Where the
    machine is so slow that the end came before, it is done again with a longer trial."""
    for seconds in (6, 24, 96, 384):
        trial = start_hide(world, program=world.lab.program(f"tariq.TRIAL = {seconds}"))
        end = kernels_end(world)
        look(trial)
        if time.time() < end:
            return trial, end
        trial.kill()
        trial.wait()
        hide(world, "--undo")
    raise AssertionError("six minutes are too short for this machine")

def hidden_for_good(world, *ports):
    """`hide`, a knock and a connection -> what `hide` said. The door is shut again."""
    process = start_hide(world, *ports)
    opens(world), gets_in(world)
    said = process.communicate(timeout=LONG)[0]
    assert process.returncode == 0, said
    opens(world, "C", "22")
    return said

def session(world, where="box"):
    """A connection to the echo service."""
    connection = world.client.inside(socket.create_connection, (server_address(world, where), 7000))
    connection.settimeout(LONG)
    assert lives(connection)
    return connection

def lives(connection):
    """Whether a session carries data, which the client sends first."""
    data = os.urandom(9)
    connection.sendall(data)
    return connection.recv(9) == data

def is_shut(world, where, port, host=None):
    """Whether a SYN to a port draws nothing at all: no SYN-ACK, no RST, no ICMP."""
    address = server_address(world, where)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (host or world.client).inside(socket.socket, family, socket.SOCK_STREAM) as sock:
        sock.settimeout(0.5)
        try:
            sock.connect((address, port))
        except TimeoutError:
            return True
        except OSError:
            pass
        return False

def udp_echoes(world, where):
    """Whether datagrams to the echo service come back."""
    address = server_address(world, where)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with world.client.inside(socket.socket, family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        sock.sendto(b"x", (address, 7000))
        with suppress(TimeoutError):
            return sock.recv(9) == b"x"
    return False

@pytest.mark.parametrize("where", ["box", "box6"])
def test_hide_hides_all_ports_but_those_named(bare, where):
    said = hidden_for_good(bare, "7000")
    assert re.search(r"(?m)^Hidden .*: 22/tcp 7000/udp\. Public as before: 7000/tcp\.", said), said
    assert is_shut(bare, where, 22) and not udp_echoes(bare, where)
    assert is_shut(bare, where, 4444), "where nothing listens no RST says so"
    assert lives(session(bare, where))

@pytest.mark.parametrize("where", ["box", "box6"])
def test_hide_keeps_a_udp_port_open_where_its_argument_says_udp(bare, where):
    hidden_for_good(bare, "7000/udp")
    wait_for(lambda: udp_echoes(bare, where))
    assert is_shut(bare, where, 7000)

def test_who_comes_in_by_a_rule_without_a_connections_state_keeps_it(bare):
    bare.tariq.stop()
    rule = "-A tariq -s {net} -p tcp --dport {dport} -j ACCEPT"
    write(bare.conf, with_settings(bare.conf.read_text(), {"open_tcp_port": rule}))
    started(bare)
    assert "hidden for good" in hidden_for_good(bare) and all(jumps(bare))

def test_hide_without_arguments_hides_all(bare):
    hidden_for_good(bare)
    assert config_values(bare.conf, "server")["public_ports"] == "none"
    for where in ("box", "box6"):
        assert is_shut(bare, where, 22) and is_shut(bare, where, 7000)
        assert not udp_echoes(bare, where)

def test_a_hide_that_was_killed_opens_again_by_itself_when_its_time_is_over(bare):
    text = bare.conf.read_text()
    def kill(trial):
        assert is_shut(bare, "box", 22) and is_shut(bare, "box6", 22)
        trial.kill()
        trial.wait()
        assert is_shut(bare, "box", 22) and is_shut(bare, "box6", 22)
    _, end = on_trial(bare, kill)
    time.sleep(max(0, end - time.time()))
    assert gets_in(bare) and gets_in(bare, "box6")
    assert bare.conf.read_text() == text and all(jumps(bare)), "it was the kernel that opened"
    assert "but INPUT drops nothing" in opens(bare), "the client reads what is so"
    assert hide(bare, "--undo").returncode == 0 and not any(jumps(bare))

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_hide_that_a_signal_ends_leaves_all_as_it_was(bare, number):
    before = firewall(bare.server), bare.conf.read_text()
    trial = start_hide(bare)
    trial.send_signal(number)
    assert trial.wait(LONG) != 0
    assert (firewall(bare.server), bare.conf.read_text()) == before

def test_a_hide_where_nobody_knocks_opens_again_and_writes_nothing(bare):
    before = firewall(bare.server), bare.conf.read_text()
    def look(_):
        assert is_shut(bare, "box", 22) and is_shut(bare, "box6", 22)
    trial, _ = on_trial(bare, look)
    assert "Nobody came in" in trial.communicate(timeout=600)[0] and trial.returncode == NO_ANSWER
    assert (firewall(bare.server), bare.conf.read_text()) == before
    assert gets_in(bare) and gets_in(bare, "box6")

def test_a_knock_alone_does_not_keep_it(bare):
    text = bare.conf.read_text()
    trial, _ = on_trial(bare, lambda _: opens(bare))
    assert trial.wait(600) == NO_ANSWER
    assert bare.conf.read_text() == text and not any(jumps(bare))

def test_who_came_in_before_hide_does_not_keep_it(bare):
    """The door's counter is not at 0; and the session that came in by it goes on meanwhile."""
    text = bare.conf.read_text()
    edit(bare.conf, ("    O 22/tcp\n", "    O 22/tcp\n    O 7000/tcp\n"))
    opens(bare, "O", "22", "7000")
    assert gets_in(bare)
    with session(bare) as connection:
        trial, _ = on_trial(bare, lambda _: lives(connection))
        assert trial.wait(600) == NO_ANSWER and not any(jumps(bare))
    write(bare.conf, text)

def test_what_was_put_back_after_a_flush_under_drop_does_not_keep_it(bare):
    """The doors' chain accepts the machine's own traffic then; that counts as nobody."""
    flush(bare.server, "-P", "INPUT", "DROP"), flush(bare.server, "-F")
    opens(bare)
    trial, _ = on_trial(bare, lambda _: bare.server.connects("127.0.0.1"))
    assert trial.wait(600) == NO_ANSWER and not any(jumps(bare))

@pytest.mark.parametrize("where", ["box", "box6"])
def test_a_knock_and_a_connection_keep_it(bare, where):
    process = start_hide(bare, "7000")
    opens(bare, where=where)
    assert gets_in(bare, where)
    said = process.communicate(timeout=LONG)[0]
    assert process.returncode == 0 and "hidden for good" in said and jumps(bare) == HIDDEN
    assert config_values(bare.conf, "server")["public_ports"] == "7000/tcp"

@pytest.mark.parametrize("header", ["[server] # mine", "[server] "])
def test_public_ports_are_written_whatever_stands_behind_the_sections_name(bare, header):
    edit(bare.conf, ("[server]\n", f"{header}\n"))
    hidden_for_good(bare)
    assert config_values(bare.conf, "server")["public_ports"] == "none"
    assert hide(bare, "--undo").returncode == 0
    assert "public_ports" not in bare.conf.read_text()

def test_a_client_that_is_enrolled_meanwhile_stays_enrolled(bare):
    process = start_hide(bare)
    late = second_client(bare, "late")
    opens(bare, conf=late), gets_in(bare)
    assert process.wait(LONG) == 0
    assert "opened" in opens(bare, conf=late)
    values = config_values(bare.conf, "server")
    assert values["public_ports"] == "none"

def test_a_hide_that_cannot_write_its_config_leaves_all_as_it_was(bare):
    """The disk that holds the config is full when somebody has come in."""
    (disk := bare.lab.new("disk")).mkdir()
    path, own = disk / "tariq.conf", bare.conf
    script = f"mount -t tmpfs -o size=64k,mode=755 tmpfs {disk}; cp -p {own} {path}"
    assert bare.tariq.stop() == 0
    with own_mounts(script) as inside:
        bare.tariq = Server(bare.lab, bare.server, path, prefix=inside).wait_log("listening for")
        before = firewall(bare.server)
        words = [*inside, bare.lab.dir / "tariq.py", "hide", "-c", path]
        process = bare.server.popen(*words, stdout=PIPE, stderr=subprocess.STDOUT)
        bare.hides.append(process)
        wait_for(lambda: all(jumps(bare)))
        sh(*inside, "dd", "if=/dev/zero", f"of={disk}/fill", "bs=4k", check=False)
        opens(bare), gets_in(bare)
        said = process.communicate(timeout=LONG)[0]
        assert process.returncode == SYSTEM and "No space left" in said, said
        assert "for good" not in said and not any(jumps(bare))
        opens(bare, "C", "22")
        assert firewall(bare.server) == before
        assert bare.tariq.stop() == 0

def hide_at_start(world, ports="none"):
    """The world's server anew, with public_ports in its config."""
    world.tariq.stop()
    write(world.conf, with_settings(world.conf.read_text(), {"public_ports": ports}))
    return started(world)

def test_public_ports_are_hidden_at_each_start_before_it_says_that_it_is_ready(bare):
    """As after a reboot: no rule is there. By the unit the network waits for that word."""
    write(bare.conf, with_settings(bare.conf.read_text(), {"public_ports": "7000/tcp"}))
    assert bare.tariq.stop() == 0
    bare.server.run("nft", "flush", "ruleset")
    path = bare.lab.new("notify")
    # It goes on once somebody has looked.
    program = bare.lab.program("send = tariq.socket.socket.sendto\n"
                               "def sent(sock, *words):\n"
                               "    send(sock, *words)\n"
                               "    tariq.time.sleep(600)\n"
                               "tariq.socket.socket.sendto = sent\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(path))
        notified.settimeout(LONG)
        server = Server(bare.lab, bare.server, bare.conf, program,
                        ("env", f"NOTIFY_SOCKET={path}"))
        try:
            assert notified.recv(100) == b"READY=1" and jumps(bare) == HIDDEN
            for where in ("box", "box6"):
                assert is_shut(bare, where, 22) and lives(session(bare, where))
        finally:
            server.kill()

def test_other_public_ports_hold_from_the_next_start(bare):
    hide_at_start(bare, "22/tcp")
    assert gets_in(bare) and is_shut(bare, "box6", 7000)
    hide_at_start(bare, "7000/tcp")
    assert is_shut(bare, "box", 22) and lives(session(bare, "box6"))

@pytest.mark.parametrize("edited", [
    ("public_ports = none", "public_ports = 80, 443,"), ("[server]", "[sever]")])
def test_what_is_hidden_stays_so_whatever_is_written_there_until_a_restart_and_after_it(bare,
                                                                                        edited):
    """A request makes the server read it, and put back what a flush has taken meanwhile."""
    hide_at_start(bare)
    edit(bare.conf, edited)
    opens(bare, "C", "22")
    wait_for(lambda: "from before this change holds" in bare.tariq.log)
    bare.server.run("nft", "flush", "ruleset")
    opens(bare, "C", "22")
    wait_for(lambda: jumps(bare) == HIDDEN, "it is not put back")
    assert bare.tariq.stop() == 0 and jumps(bare) == HIDDEN
    assert Server(bare.lab, bare.server, bare.conf).process.wait(LONG) == CONFIG_FAULT
    assert jumps(bare) == HIDDEN and is_shut(bare, "box", 22)

@pytest.mark.parametrize("fault, code, words", [
    ("a rule that is none", 78, "open_tcp_port is no rule of iptables"),
    ("a rule that the kernel refuses", 71, "iptables failed"),
    ("a package that is gone", 69, "PIL is missing on this machine: apt-get install python3-pil"),
    ("a secret key that is gone", 78, "The server's key is not in the keyring"),
    ("an empty value", 78, "public_ports has to be ports")])
def test_a_start_that_ends_without_a_door_hides_nothing(bare, fault, code, words):
    """As after a reboot: else nobody could get in to mend it."""
    assert bare.tariq.stop() == 0
    bare.server.run("nft", "flush", "ruleset")
    rule = "-A tariq -s {ip} -p tcp --dport {dport} -j ACEPT"
    changes = {"public_ports": "" if fault == "an empty value" else "none"}
    if fault == "a rule that is none":
        changes["open_tcp_port"] = rule
    if fault == "a rule that the kernel refuses":  # this match it takes in other tables only
        changes["open_tcp_port"] = ("-A tariq -s {ip} -p tcp -m rpfilter --dport {dport} "
                                    "-j ACCEPT")
    if fault == "a secret key that is gone":
        changes["server_gpg_dir"] = public_keyring(bare)
    conf = write(bare.lab.new("conf"), with_settings(bare.conf.read_text(), changes))
    program, prefix = None, ()
    if fault == "a package that is gone":  # covered, as far as this server and its children see
        import PIL
        place = Path(PIL.__file__).parent
        prefix = ("sh", "-c", f'mount -t tmpfs tmpfs {place} && exec "$@"', "sh")
    server = Server(bare.lab, bare.server, conf, program, prefix)
    assert server.process.wait(LONG) == code and words in server.log, server.log
    assert not any(jumps(bare)) and gets_in(bare) and gets_in(bare, "box6")

NO_PILLOW = """
class Half:  # a package that is there, and cannot be loaded
    def find_spec(self, name, path=None, target=None):
        if name.startswith("PIL"):
            raise ImportError("libtiff.so.6: cannot open shared object file")
sys.meta_path.insert(0, Half())
"""

def test_a_start_that_fails_closes_the_doors_that_an_earlier_server_left(bare):
    """Which was killed, while a door without an end was open."""
    write(bare.conf, with_settings(bare.conf.read_text(), {"open_timeout": 0}))
    opens(bare)
    bare.tariq.process.kill()
    bare.tariq.process.wait(LONG)
    assert len(bare.server.rules()) == 1
    server = Server(bare.lab, bare.server, bare.conf, bare.lab.program(NO_PILLOW))
    assert server.process.wait(LONG) == DIED and bare.server.rules() == [], server.log
    said = "tariq: The listener says: ImportError: libtiff.so.6: cannot open shared object file"
    assert said in server.log.splitlines(), "not that a package is to be installed"

def test_an_undo_while_a_server_starts_is_not_undone_by_it(bare):
    hide_at_start(bare)
    assert bare.tariq.stop() == 0
    flag, go = bare.lab.new("starting"), bare.lab.new("go")
    program = bare.lab.program("ready = tariq.Monitor.ready\n"
                               "def wait(monitor):\n"
                               f"    open('{flag}', 'w').close()\n"
                               f"    while not os.path.exists('{go}'):\n"
                               "        tariq.time.sleep(0.01)\n"
                               "    ready(monitor)\n"
                               "tariq.Monitor.ready = wait\n")
    server = Server(bare.lab, bare.server, bare.conf, program)
    try:
        wait_for(flag.exists)
        assert hide(bare, "--undo").returncode == 0 and not any(jumps(bare))
        go.touch()
        server.wait_log("listening for")
        assert not any(jumps(bare)) and gets_in(bare) and server.stop() == 0
    finally:
        server.kill()

@pytest.mark.parametrize("before, fault, code", [
    ("", "[69, 'apt-get install a']", 69), ("", "[78.0, 'b']", 78), ("", "[0, 'c']", DIED),
    ("ready", "[69, 'd']", DIED)])
def test_the_last_word_of_a_listener_is_marked_as_its_own_and_decides_the_exit_code_at_a_start(
        idle, before, fault, code):
    """By 69 and 78 systemd does not start it again: one that was taken over later cannot ask for
    that."""
    program = idle.lab.program(
        "if sys.argv[1:2] == ['listener']:\n"
        "    channel = socket.socket(fileno=int(sys.argv[-1]))\n"
        "    channel.recv(9000)\n"
        f"    for kind in {before.split()}:\n"
        "        channel.send(json.dumps({kind: True}).encode())\n"
        f"    channel.send(json.dumps({{'fault': {fault}}}).encode())\n"
        "    os._exit(0)\n")
    done = idle.server.run(program, "server", "-c", variant(idle), check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == code, done
    assert re.fullmatch("tariq: The listener says: (apt-get install )?[abcd]", last), done

def test_a_stop_changes_nothing_in_input(bare):
    """Whoever flushed it on purpose, from the console, is not locked out by the stop that
    follows."""
    hide_at_start(bare)
    for program in IPTABLES:
        bare.server.run(program, "-P", "INPUT", "ACCEPT")
        bare.server.run(program, "-F")
    assert bare.tariq.stop() == 0
    assert not any(jumps(bare)) and gets_in(bare) and gets_in(bare, "box6")

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_was_stopped_or_killed_leaves_it_hidden(bare, number):
    hide_at_start(bare, "7000/tcp")
    bare.tariq.process.send_signal(number)
    bare.tariq.process.wait(LONG)
    assert jumps(bare) == HIDDEN
    for where in ("box", "box6"):
        assert is_shut(bare, where, 22) and lives(session(bare, where))

FLUSHES = {"iptables -F": ("iptables -F", "ip6tables -F"), "nft": ("nft flush ruleset",),
           "INPUT alone": ("iptables -F INPUT", "ip6tables -F INPUT"),
           "the jump alone": [f"{name} -D INPUT -j tariq-hide" for name in IPTABLES],
           "one family": ("ip6tables -F",)}

@pytest.mark.parametrize("flushed, request_", [
    *((flushed, "O 22") for flushed in FLUSHES),
    ("nft", "C 22"), ("nft", "E id -u"), ("nft", "O 99")])
def test_the_next_request_puts_back_all_that_a_flush_took_in_both_families_and_logs_it_once(
        bare, flushed, request_):
    hide_at_start(bare, "7000/tcp")
    before = firewall(bare.server)
    for command in FLUSHES[flushed]:
        bare.server.run(*command.split())
    assert firewall(bare.server) != before
    done = knock(bare, *request_.split())
    assert done.returncode == (REFUSED if request_ == "O 99" else 0), done
    wait_for(lambda: jumps(bare) == HIDDEN, "it is not put back")
    if request_ == "O 22":
        assert "but" not in done.stdout and gets_in(bare)
        opens(bare, "C", "22")
    wait_for(lambda: firewall(bare.server) == before, "not all of it")
    for where in ("box", "box6"):
        assert is_shut(bare, where, 22) and lives(session(bare, where))
    opens(bare), opens(bare, "C", "22")
    lines = re.findall(r"(?m)^(ip6?tables): .*put back", bare.tariq.log)
    assert sorted(lines) == (["ip6tables"] if flushed == "one family" else sorted(IPTABLES))

def test_undo_takes_jump_chain_and_key_out_and_nothing_else(bare):
    before = firewall(bare.server), bare.conf.read_text()
    hidden_for_good(bare, "7000")
    for _ in range(2):  # the second finds nothing, which is no fault
        assert hide(bare, "--undo").returncode == 0
        assert (firewall(bare.server), bare.conf.read_text()) == before
    for where in ("box", "box6"):
        assert gets_in(bare, where)

def test_undo_opens_also_where_the_config_cannot_be_written(bare):
    hide_at_start(bare)
    cover = f'mount -o bind,ro {bare.conf.parent} {bare.conf.parent} && exec "$@"'
    done = hide(bare, "--undo", prefix=("sh", "-c", cover, "sh"))
    assert done.returncode == SYSTEM and "cannot be written" in done.stderr, done
    assert not any(jumps(bare)) and gets_in(bare) and gets_in(bare, "box6")

def test_undo_needs_no_standard_input(bare):
    assert hide(bare, "--undo", prefix=("sh", "-c", 'exec "$@" <&-', "sh")).returncode == 0

@pytest.mark.parametrize("request_", ["O 22", "O 99", "E id -u"])
def test_what_was_undone_stays_undone_whatever_is_requested_next(bare, request_):
    hide_at_start(bare)
    opens(bare, "C", "22")
    assert hide(bare, "--undo").returncode == 0
    knock(bare, *request_.split())
    opens(bare, "C", "22")  # handled after that one's last step
    assert not any(jumps(bare)) and gets_in(bare, "box6")
    started_again(bare)
    assert not any(jumps(bare))

def started_again(world):
    assert world.tariq.stop() == 0
    started(world)

@pytest.mark.parametrize("broken", ["an unknown key", "no INI file", "open to others"])
@pytest.mark.parametrize("runs", [True, False])
def test_undo_opens_for_good_whatever_became_of_the_config(bare, broken, runs):
    """Also while a server runs, which puts back what a flush has taken."""
    hide_at_start(bare)
    opens(bare, "C", "22")
    if not runs:
        assert bare.tariq.stop() == 0
    edit(bare.conf, ("[server]\n", {"an unknown key": "[server]\nopen_timout = 60\n",
                                    "no INI file": "nonsense\n[server]\nand more\n",
                                    "open to others": "[server]\n"}[broken]))
    bare.conf.chmod(0o644 if broken == "open to others" else 0o600)
    done = hide(bare, "--undo")
    assert done.returncode == 0 and "public_ports" not in bare.conf.read_text(), done
    if runs:
        opens(bare), opens(bare, "C", "22")
        opens(bare, "C", "22")  # handled after that one's last step
    assert not any(jumps(bare)) and gets_in(bare) and gets_in(bare, "box6")

def test_undo_that_finds_nothing_says_so_where_the_config_may_hide_another_chain(bare):
    edit(bare.conf, ("[server]\n", "[server]\niptables_chain = INPUT\n"))
    done = hide(bare, "--undo")
    line = f"tariq: {bare.conf}: [server] iptables_chain has to be a chain of its own"
    assert done.returncode == 78 and done.stderr.splitlines()[-1].startswith(line), done

def test_undo_opens_also_where_the_config_has_no_server(bare):
    hide_at_start(bare)
    bare.tariq.stop()
    edit(bare.conf, ("[server]\n", "[srever]\n"))
    done = hide(bare, "--undo")
    line = f"tariq: {bare.conf} has no [server].\n"
    assert done.returncode == 78 and done.stderr.endswith(line), done
    assert not any(jumps(bare)) and gets_in(bare) and gets_in(bare, "box6")

@pytest.mark.parametrize("written", [
    "Public_Ports = 22/tcp\n", "public_ports = 22/tcp,\n    80/tcp\n", "public_ports=none # all\n",
    "public_ports\t= 22/tcp\n", "  public_ports = none\n",
    "public_ports = 22/tcp,\n\n    80/tcp\n    # and\n\n  443/tcp\n"])
def test_undo_takes_the_key_out_however_it_is_written(bare, written):
    text = bare.conf.read_text()
    write(bare.conf, text.replace("[server]\n", f"[server]\n{written}"))
    assert hide(bare, "--undo").returncode == 0
    assert bare.conf.read_text() == text
    opens(bare), opens(bare, "C", "22")
    assert not any(jumps(bare))

@pytest.fixture
def kept_umask():
    """For a test that calls what sets it: the tests behind it in this process have their own."""
    umask = os.umask(0o022)
    yield
    os.umask(umask)

@pytest.mark.parametrize("header", ["[server]", "  [server]  # this machine"])
def test_keys_that_are_indented_stay_as_they_are_when_public_ports_come_and_go(tmp_path, kept_umask,
                                                                               header):
    text = re.sub(r"(?m)^(?=\w+ =)", "  ", CONFIG)
    text = text.replace("[server]\n", f"{header}\n; mine\n\n").replace("[allow", "  [allow")
    path = write_config(tmp_path / "tariq.conf", text)
    text, before = path.read_text(), tariq.Config(path).values["server"]
    for ports in (["80/tcp"], ["443/tcp", "53/udp"], []):
        tariq.set_public_ports(path, ports)
        config = tariq.Config(path)
        assert config.faults == {} and config.values["server"] == {**before, "public_ports": ports}
    tariq.set_public_ports(path, None)
    assert path.read_text().rstrip() == text.rstrip()

def test_a_comment_that_is_not_utf8_stays_as_it_is_and_is_no_fault(tmp_path, kept_umask):
    """As from an editor of another encoding: `hide --undo` has to go on with that, too."""
    path = write_config(tmp_path / "tariq.conf", CONFIG)
    before = path.read_bytes() + "; caf\xe9\n".encode("latin-1")
    path.write_bytes(before)
    tariq.set_public_ports(path, ["80/tcp"])
    config = tariq.Config(path)
    assert not config.faults and config.get("public_ports") == ["80/tcp"]
    tariq.set_public_ports(path, None)
    assert path.read_bytes() == before

def test_a_new_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    """Else a power cut could leave an empty one."""
    fsync, replace, done = os.fsync, os.replace, []
    def recorded_fsync(number):
        fsync(number)
        done.append(("on the disk", Path(f"/proc/self/fd/{number}").read_text()))
    def recorded_replace(source, target):
        done.append(("in its place", Path(target).read_text()))
        replace(source, target)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    path = write(tmp_path / "file", "old", os.geteuid())
    tariq.write_file(path, "new")
    assert done == [("on the disk", "new"), ("in its place", "old")] and path.read_text() == "new"

def test_a_config_that_is_broken_meanwhile_keeps_no_lock(tmp_path, kept_umask):
    """`hide` tries to change it once more when it takes everything back."""
    path = write_config(tmp_path / "tariq.conf", "no INI file\n")
    with pytest.raises(tariq.Fault, match="is no INI file"):
        tariq.set_public_ports(path, [])
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(directory)

def test_undo_during_a_trial_is_refused_or_ends_it(bare):
    """What it must not do: say 0, and then it is hidden for good."""
    trial = start_hide(bare)
    undone = hide(bare, "--undo")
    if undone.returncode == 0:
        opens(bare), gets_in(bare)
        assert trial.wait(300) != 0 and not any(jumps(bare))
    else:
        assert undone.stderr.count("\n") == 1 and trial.poll() is None

@pytest.mark.parametrize("where", ["box", "box6"])
def test_a_session_that_is_there_outlives_all_of_it(bare, where):
    """It began when nothing tracked connections; each time the client is the one to speak first."""
    assert bare.tariq.stop() == 0
    bare.server.run("nft", "flush", "ruleset")
    with session(bare, where) as connection:
        started(bare)
        assert lives(connection)
        process = start_hide(bare)
        assert is_shut(bare, where, 7000) and lives(connection), "on trial"
        opens(bare, where=where), gets_in(bare, where)
        assert process.wait(LONG) == 0 and lives(connection), "for good"
        for command in ("iptables -F", "ip6tables -F", "nft flush ruleset"):
            bare.server.run(*command.split())
            opens(bare)
            wait_for(lambda: jumps(bare) == HIDDEN)
            assert lives(connection), command
        started_again(bare)
        assert is_shut(bare, where, 7000) and lives(connection), "restarted"
        bare.tariq.kill()
        assert lives(connection), "killed"
        assert hide(bare, "--undo").returncode == 0 and lives(connection), "undone"

@pytest.mark.parametrize("where", ["box", "box6"])
def test_a_session_that_was_idle_since_before_the_start_is_taken_up_during_the_trial(bare, where):
    assert bare.tariq.stop() == 0
    bare.server.run("nft", "flush", "ruleset")
    with session(bare, where) as connection:
        started(bare)
        process = start_hide(bare)
        assert lives(connection), "on trial"
        opens(bare, where=where), gets_in(bare, where)
        assert process.wait(LONG) == 0 and lives(connection), "for good"

@pytest.mark.parametrize("where", ["box", "box6"])
def test_a_session_that_says_nothing_all_through_the_trial_goes_on(bare, where):
    """It is known since the server's start, after which it said something."""
    assert bare.tariq.stop() == 0
    bare.server.run("nft", "flush", "ruleset")
    with session(bare, where) as connection:
        started(bare)
        assert lives(connection)
        hidden_for_good(bare)
        assert lives(connection)

def test_hide_after_a_flush_puts_the_doors_back_first(bare):
    flush(bare.server, "-F")
    assert "22/tcp" in hidden_for_good(bare)
    assert jumps(bare) == HIDDEN

@pytest.mark.parametrize("words", ["x", "0", "65536", "22/sctp", "-1", "22,23", "22 x", "80 /tcp"])
def test_a_port_that_is_none_is_one_line_and_changes_nothing(bare, words):
    before = firewall(bare.server), bare.conf.read_text()
    done = hide(bare, *words.split())
    assert done.returncode == 64 and re.fullmatch("tariq: [^\n]+\n", done.stderr), done
    assert (firewall(bare.server), bare.conf.read_text()) == before

def test_twice_at_once_is_refused_and_the_first_goes_on(bare):
    trial = start_hide(bare)
    before = firewall(bare.server)
    again = hide(bare)
    assert again.returncode == SYSTEM
    assert re.fullmatch("tariq: hide runs already[^\n]+\n", again.stderr)
    assert trial.poll() is None and firewall(bare.server) == before

def test_hidden_already_is_refused(bare):
    hidden_for_good(bare)
    before = firewall(bare.server), bare.conf.read_text()
    done = hide(bare, "7000")
    assert done.returncode == 64 and re.fullmatch("tariq: [^\n]+public_ports[^\n]+\n", done.stderr)
    assert (firewall(bare.server), bare.conf.read_text()) == before

def test_without_a_server_that_could_let_anybody_in_hide_refuses(bare):
    assert bare.tariq.stop() == 0
    before = firewall(bare.server), bare.conf.read_text()
    done = hide(bare)
    assert done.returncode == SYSTEM and re.fullmatch("tariq: No server runs[^\n]+\n", done.stderr)
    assert (firewall(bare.server), bare.conf.read_text()) == before

def test_where_the_kernel_knows_no_time_hide_refuses_with_words_and_changes_nothing(bare):
    """An iptables without its time match: the real one, whose extension is covered."""
    extension = sh("sh", "-c", "ls /usr/lib/*/xtables/libxt_time.so").stdout.strip()
    prefix = ("sh", "-c", f'mount --bind /dev/null {extension} && exec "$@"', "sh")
    before = firewall(bare.server), bare.conf.read_text()
    done = hide(bare, prefix=prefix)
    assert done.returncode == SYSTEM
    assert "Nothing is hidden" in done.stderr and "xt_time" in done.stderr
    assert "libxt_time.so" not in done.stderr and "Hidden " not in done.stderr
    assert (firewall(bare.server), bare.conf.read_text()) == before

def test_with_commands_of_its_own_in_the_config_hide_refuses(bare):
    settings = {"open_command": "true {ip} {dport}", "close_command": "true {ip} {dport}"}
    write(bare.conf, with_settings(bare.conf.read_text(), settings))
    before = firewall(bare.server)
    done = hide(bare)
    assert done.returncode == CONFIG_FAULT and "open_command" in done.stderr
    assert firewall(bare.server) == before

@pytest.mark.skipif(not shutil.which("ufw"), reason="ufw is not installed")
def test_beside_ufw_that_is_enabled(bare):
    """With an /etc of its own. Public is what both let in; doors are before both."""
    script = ("mount -t tmpfs tmpfs /mnt; mkdir /mnt/up /mnt/work; mount -t tmpfs tmpfs /run\n"
              "mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/up,workdir=/mnt/work /etc\n"
              "sed -i 's/^IPV6=.*/IPV6=yes/; s/^IPT_SYSCTL=.*/IPT_SYSCTL=/; s/^IPT_MODULES=.*//' "
              "/etc/default/ufw")
    with own_mounts(script) as inside:
        def ufw(*words):
            bare.server.run(*inside, "ufw", *words)
        for words in ("--force enable", "allow 22/tcp", "allow 7000/tcp"):
            ufw(*words.split())
        hidden_for_good(bare, "7000")
        for where in ("box", "box6"):
            assert is_shut(bare, where, 22), "ufw allows it"
            assert lives(session(bare, where)) and not udp_echoes(bare, where)
        ufw("delete", "allow", "22/tcp")
        for words in ("reload", "disable", "--force enable"):
            ufw(*words.split())
            for where in ("box", "box6"):
                said = opens(bare, where=where)
                assert "but" not in said and gets_in(bare, where), words
                assert is_shut(bare, where, 22, bare.other) and lives(session(bare, where)), words
                opens(bare, "C", "22", where=where)
        ufw("delete", "allow", "7000/tcp")
        assert is_shut(bare, "box", 7000), "what ufw drops stays dropped"
        ufw("--force", "reset")

def test_beside_an_nft_table_that_drops(bare):
    """A drop anywhere drops: public is what both let in."""
    table = """table inet mine {
        chain input {
            type filter hook input priority 10; policy drop;
            ct state established,related accept
            iif lo accept
            meta l4proto ipv6-icmp accept
            tcp dport { 22, 7000 } accept
        }
    }"""
    bare.server.run("nft", "-f", "-", input=table)
    hidden_for_good(bare, "7000", "7000/udp")
    listed = bare.server.run("nft", "list", "table", "inet", "mine").stdout
    for where in ("box", "box6"):
        assert is_shut(bare, where, 22), "the table accepts it"
        assert lives(session(bare, where)) and not udp_echoes(bare, where)
        opens(bare, where=where)
        assert gets_in(bare, where) and is_shut(bare, where, 22, bare.other)
    assert hide(bare, "--undo").returncode == 0
    assert bare.server.run("nft", "list", "table", "inet", "mine").stdout == listed

# What a network needs, and no door is for: real packets, while all is hidden.

@pytest.fixture
def hidden(bare):
    hide_at_start(bare, "7000/tcp")
    return bare

def link_addresses(host):
    """The link address and the IPv6 link-local address of a host's eth0."""
    found, = json.loads(host.run("ip", "-j", "-6", "addr", "show", "dev", "eth0").stdout)
    link, = json.loads(host.run("ip", "-j", "link", "show", "dev", "eth0").stdout)
    local, = (one["local"] for one in found["addr_info"] if one["scope"] == "link")
    return link["address"], local

def test_neighbours_find_each_other(hidden):
    for first, second in ((hidden.client, hidden.server), (hidden.server, hidden.client)):
        for host in (first, second):
            host.run("ip", "neigh", "flush", "all"), host.run("ip", "-6", "neigh", "flush", "all")
        # who asks is the client in one round, in the other the server
        if first is hidden.server:
            first.run(sys.executable, "-c", "import socket, sys\n"
                      "with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:\n"
                      "    sock.sendto(b'x', (sys.argv[1], 9))", hidden.client.ip6)
            wait_for(lambda: "lladdr" in hidden.server.run(
                "ip", "-6", "neigh", "show", hidden.client.ip6).stdout)
        assert lives(session(hidden, "box6"))

def test_router_advertisements_arrive(hidden):
    from scapy.layers.inet6 import ICMPv6ND_RA, ICMPv6NDOptPrefixInfo, IPv6
    from scapy.layers.l2 import Ether
    server, router = hidden.server, hidden.other
    server.run("sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=2", "net.ipv6.conf.eth0.autoconf=1")
    link, local = link_addresses(router)
    packet = (Ether(src=link, dst="33:33:00:00:00:01") / IPv6(src=local, dst="ff02::1", hlim=255)
              / ICMPv6ND_RA(routerlifetime=0)
              / ICMPv6NDOptPrefixInfo(prefix="2001:db8:77::", prefixlen=64, L=1, A=1))
    def has_address():
        inject(router, [bytes(packet)])
        return "2001:db8:77:" in server.run("ip", "-6", "addr", "show", "dev", "eth0").stdout
    try:
        wait_for(has_address, "no address of the advertised prefix")
    finally:
        server.run("sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=0")
        server.run("ip", "-6", "addr", "flush", "dev", "eth0", "to", "2001:db8:77::/64")

def test_multicast_listener_discovery_goes_on(hidden):
    """A switch that asks who listens gets the report without which it stops delivering."""
    from scapy.layers.inet6 import (ICMPv6MLQuery2, IPv6, IPv6ExtHdrHopByHop, PadN, RouterAlert)
    from scapy.layers.l2 import Ether
    link, local = link_addresses(hidden.other)
    query = (Ether(src=link, dst="33:33:00:00:00:01") / IPv6(src=local, dst="ff02::1", hlim=1)
             / IPv6ExtHdrHopByHop(options=[RouterAlert(otype=5), PadN(otype=1)])
             / ICMPv6MLQuery2(type=130, mladdr="::", mrd=1))
    own_link = bytes.fromhex(link_addresses(hidden.server)[0].replace(":", ""))
    def reported():
        with captured(hidden.other) as packets:
            inject(hidden.other, [bytes(query)])
        # MLDv2 reports are of type 143, behind a hop-by-hop header of 8 bytes
        return any(packet.frame[6:12] == own_link and packet.frame[12:14] == b"\x86\xdd"
                   and packet.frame[20] == 0 and packet.frame[62] == 143 for packet in packets)
    wait_for(reported, "no report")

@pytest.mark.parametrize("family, own, port, from_port", [
    (socket.AF_INET, "0.0.0.0", 68, 67), (socket.AF_INET6, "::", 546, 547)])
def test_dhcps_answers_arrive(hidden, family, own, port, from_port):
    """They belong to no connection: the question went to a broadcast or multicast address. In IPv4
    the answer that needs a rule is a broadcast, too."""
    server, other = hidden.server, hidden.other
    link, = json.loads(other.run("ip", "-j", "link", "show", "dev", "eth0").stdout)
    to = ("255.255.255.255", port) if family == socket.AF_INET else \
        (link_addresses(server)[1], port, 0, link["ifindex"])
    with server.inside(socket.socket, family, socket.SOCK_DGRAM) as client, \
            other.inside(socket.socket, family, socket.SOCK_DGRAM) as dhcp:
        dhcp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        dhcp.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        client.bind((own, port)), dhcp.bind((own, from_port))
        client.settimeout(0.5)
        def arrives():
            dhcp.sendto(b"lease", to)
            with suppress(TimeoutError):
                return client.recv(9) == b"lease"
            return False
        wait_for(arrives, "no lease")

@pytest.fixture(scope="module")
def far(open_world):
    """A host behind `other`, which routes to it by a link with an MTU of 1280."""
    lab, router, server = open_world.lab, open_world.other, open_world.server
    host = Host(lab, "far", 2, "203.0.113", "2001:db8:7:")
    lab.cable(router, "eth1", host, "eth0", ["203.0.113.1/24", "2001:db8:7::1/64"],
              [f"{host.ip}/24", f"{host.ip6}/64"])
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    router.run("ip", "link", "set", "eth1", "mtu", "1280")
    for family, gateway in (("-4", "203.0.113.1"), ("-6", "2001:db8:7::1")):  # it says 1,500 itself
        host.run("ip", family, "route", "add", "default", "via", gateway, "mtu", "1280",
                 "advmss", "1440")
    server.run("ip", "route", "add", "203.0.113.0/24", "via", router.ip)
    server.run("ip", "-6", "route", "add", "2001:db8:7::/64", "via", router.ip6)
    yield host
    server.run("ip", "route", "del", "203.0.113.0/24")
    server.run("ip", "-6", "route", "del", "2001:db8:7::/64")

@pytest.mark.parametrize("where", ["box", "box6"])
def test_path_mtu_errors_arrive(hidden, far, where):
    """What the server sends is too big for a link on the way, and comes through all the same."""
    data = os.urandom(100_000)
    with far.inside(socket.create_connection, (server_address(hidden, where), 7000)) as connection:
        connection.settimeout(LONG)
        with ThreadPoolExecutor(1) as pool:
            sent, got = pool.submit(connection.sendall, data), b""
            while len(got) < len(data):
                got += connection.recv(65536)
            sent.result()
    to = far.ip6 if where == "box6" else far.ip
    assert got == data and " mtu 1280" in hidden.server.run("ip", "route", "get", to).stdout

# ---- what README.md says, done: its own commands, as written, on throwaway machines --------------

README = (HERE / "README.md").read_text()
NAMES = {"box": 10, "laptop": 20, "other": 30, "inside": 40}

STEP_1, STEP_2 = "1. On the server: init", "2. On the client: keygen, enroll, join"
STEP_3, STEP_4 = "3. On the server: hide", "4. On the client: the first knock"

def blocks(heading, language="sh"):
    """The code blocks of one language under a heading of the README, in order."""
    section = re.split(rf"(?m)^#+ {re.escape(heading)}$", README)[1]
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", re.split(r"\n\n#+ ", section)[0])

def without_systemd(script):
    """A script of the README on a machine where the test itself starts and stops the server."""
    return re.sub(r"(?m)^ *(systemctl|systemd-run) .*\n", "", script)

def in_the_readme(line):
    """Whether the README shows this line, wherever it breaks it."""
    return " ".join(line.split()) in " ".join(README.split())

SUDO = """#!/bin/bash
# Where the machine has none: sudo [-u USER] [NAME=VALUE...] COMMAND..., or sudoedit FILE.
user=root
[ "$1" != -u ] || { user=$2; shift 2; }
[ "${0##*/}" != sudoedit ] || set -- "$SUDO_EDITOR" "$@"
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec setpriv-root --reuid=$user --regid=$user --init-groups env -i HOME=/root PATH=$path "$@"
"""

def overlaid(own, *paths):
    """Shell commands: what is changed in these directories from now on lies in a new one, `own`."""
    return f"""mkdir {own}; mount -t tmpfs tmpfs {own}
        for path in {' '.join(paths)}; do
            mkdir -p {own}/upper$path {own}/work$path
            dirs=lowerdir=$path,upperdir={own}/upper$path,workdir={own}/work$path
            mount -t overlay overlay -o $dirs $path
        done"""

class Machine(Host):
    """A host with /etc, /usr/local/bin, homes and /run of its own. Its ordinary user is `me`, who
    may sudo."""

    def __init__(self, site, name, server=False):
        """A server has step 1 of the README's first hour done, any other one can do step 2:
        tariq.py is in its place. Packages are there already; systemd is not."""
        self.pid = None
        super().__init__(site, name, NAMES[name])
        site.plug(self, "eth0", f"{self.ip}/24", f"{self.ip6}/64")
        self.run("ip", "route", "add", "default", "via", "198.51.100.1")
        own, key = site.dir / name, site.dir / "id_ed25519"
        sudo = write(site.dir / "sudo", SUDO, mode=0o755)
        if not key.exists():
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        names = "".join(f"198.51.100.{number} {host} {host}.example.com\\n" for host,
                        number in NAMES.items())
        script = f"""set -e
            {overlaid(own, "/etc", "/usr/local/bin")}
            for path in /home /root /run; do mount -t tmpfs -o mode=755 tmpfs $path; done
            mkdir /run/sshd; rm -rf /etc/tariq; hostname {name}
            printf '127.0.0.1 localhost\\n{names}' > /etc/hosts
            sed -Ei '/^(tariq|me):/d' /etc/passwd /etc/shadow /etc/group /etc/gshadow
            useradd --create-home --shell /bin/bash me
            if command -v sudo; then echo 'me ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/me; else
                install -m 4755 $(command -v setpriv) /usr/local/bin/setpriv-root
                install {sudo} /usr/local/bin/sudo; ln -s sudo /usr/local/bin/sudoedit
            fi >/dev/null
            cp {shutil.copy(TARIQ, f"{own}.py")} /home/me/tariq.py
            cp {site.dir}/tariq.conf.example /home/me/
            for home in /root /home/me; do  # each may log in everywhere
                mkdir -m 700 $home/.ssh
                cp {key} $home/.ssh/id_ed25519; cp {key}.pub $home/.ssh/authorized_keys
                printf '%s\\n' 'StrictHostKeyChecking accept-new' 'ConnectTimeout {LONG}' \\
                    'LogLevel ERROR' > $home/.ssh/config
            done
            chown -R me: /home/me
            echo ready; exec sleep infinity"""
        holder = self.popen("unshare", "--uts", "bash", "-c", script, stdout=PIPE,
                            stderr=subprocess.STDOUT)
        said = holder.stdout.readline()
        assert said == "ready\n", said + holder.stdout.read()
        self.pid = holder.pid
        self.shell(blocks(STEP_1)[0] if server else blocks(STEP_2)[0])

    def command(self, argv, user=None):
        if self.pid is None:
            return super().command(argv)
        start = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--"]
        if user is not None:
            start += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "env",
                      f"HOME=/home/{user}",
                      f"USER={user}"]
        return [*start, *(str(word) for word in argv)]

    def shell(self, script, user="me", **options):
        """Run a script as its user would type it, in the home directory, up to the first command
        that fails."""
        return self.run("bash", "-c", f"set -eo pipefail; cd ~; {script}", user=user, **options)

    def serve(self, *prefix, drop=True):
        """The server in the background, as the unit starts it, behind a closed firewall."""
        if drop and "-P INPUT DROP" not in self.run("iptables", "-S", "INPUT").stdout:
            self.drop_policy()
        return Server(self.lab, self, ROOT_CONF, "/usr/local/bin/tariq.py",
                      prefix).wait_log("listening for")

    def knock(self, *words, timeout=LONG, check=True, options=(), **more):
        words = "tariq.py", "knock", "-t", timeout, *options, "box.example.com", *words
        return self.run(*words, user="me", check=check, **more)

    def ssh(self):
        """Whether a log-in on the server works."""
        return self.connects(f"198.51.100.{NAMES['box']}") \
            and self.shell("ssh me@box.example.com true", check=False).returncode == 0

@pytest.fixture
def site():
    """A lab for throwaway machines."""
    with Lab() as site:
        yield site

@pytest.fixture
def remote(site):
    """A server, set up by the README's commands."""
    return Machine(site, "box", server=True)

@pytest.fixture
def laptop(site):
    """A client with tariq.py in place; not enrolled."""
    return Machine(site, "laptop")

def type_enroll(remote, laptop, user="me@laptop", run=Machine.shell):
    """Step 2 of the README: the line that enrols a client, through a real ssh."""
    if not remote.connects("127.0.0.1"):
        remote.sshd(system=True)
    return run(laptop, blocks(STEP_2)[1].replace("me@laptop", user))

def test_the_four_commands_of_the_first_hour_lead_to_a_hidden_ssh(site, remote, laptop):
    """As typed, through real ssh: `hide` itself runs in an ssh session, which must outlive it."""
    other, server = Machine(site, "other"), remote.serve(drop=False)
    done = type_enroll(remote, laptop)
    client_key = remote.shell("sudo sed -n 's/^key = //p' /etc/tariq/tariq.conf").stdout.strip()
    server_key = laptop.shell("grep server_key ~/.config/tariq/tariq.conf").stdout.split()[-1]
    assert client_key in done.stderr and server_key in done.stderr, "each sees whom it trusts"
    assert laptop.ssh() and other.connects(remote.ip)
    hide = laptop.popen("ssh", "me@box.example.com", f"{blocks(STEP_3)[0].strip()} 2>&1; echo exit "
        f"status $?; cat",
                        user="me", stdin=PIPE, stdout=PIPE)
    said = []
    def read_until(word):
        while not said or word not in said[-1]:
            assert not said or said[-1] and "exit status" not in said[-1], said
            said.append(hide.stdout.readline())
    read_until("in another terminal")
    assert not laptop.connects(remote.ip) and not laptop.connects(remote.ip6)
    line = laptop.shell(blocks(STEP_4)[0]).stdout
    assert re.fullmatch(r"opened tcp/22 on box.example.com for 198.51.100.20 until "
        r"\d\d:\d\d:\d\dZ\n", line)
    assert laptop.ssh() and not other.connects(remote.ip)
    read_until("exit status")
    assert said[-1] == "exit status 0\n" and "hidden for good" in said[-2], said
    assert all(in_the_readme(line) for line in said[:-1] if line[0] not in "+"), said
    hide.stdin.write("still here\n"), hide.stdin.close()
    assert hide.stdout.read() == "still here\n" and hide.wait() == 0, "the session is cut"
    assert "\npublic_ports = none\n" in remote.shell("sudo cat /etc/tariq/tariq.conf").stdout
    laptop.run("ip", "-6", "neigh", "flush", "all")  # neighbours must still find each other
    laptop.shell(f"echo 'host = {remote.ip6}' >> ~/.config/tariq/tariq.conf")
    assert not laptop.connects(remote.ip6) and "for 2001:db8:1::20 until" in laptop.knock("O",
        "22").stdout
    assert laptop.connects(remote.ip6) and not other.connects(remote.ip6)
    assert server.stop() == 0 and not laptop.connects(remote.ip) and not laptop.connects(remote.ip6)

def test_where_sudo_asks_for_a_password_key_and_profile_go_as_files(remote, laptop):
    remote.sshd(system=True)
    script = blocks(STEP_2)[2].replace("ssh -t ", "ssh ")  # no terminal here, and no password
    laptop.shell(script)
    left = remote.shell("ls me.key me.profile", check=False)
    assert left.stdout == "", "a profile has the secret"
    remote.serve()
    assert "opened" in laptop.knock("O", "22").stdout

def test_set_up_commands_run_twice_do_no_harm_and_keep_what_people_wrote(site, remote, laptop):
    first = type_enroll(remote, laptop)
    for machine, path in (remote, "/etc/tariq/tariq.conf"), \
        (laptop, "/home/me/.config/tariq/tariq.conf"):
        machine.shell(f"sudo sed -i '1i # mine: 1\\n; mine: 2' {path}; echo '# mine: 3' | sudo "
                      f"tee -a {path}")
    def state():
        mine = laptop.shell("cat .config/tariq/tariq.conf; tariq.py keygen me@laptop").stdout
        return remote.shell("sudo cat /etc/tariq/tariq.conf").stdout, mine
    before = state()
    remote.shell("sudo tariq.py init")
    again = type_enroll(remote, laptop)
    assert "[allow me@laptop] is there already" in again.stderr
    assert again.stderr.count("wrote") == 0 < first.stderr.count("wrote") and state() == before
    other = Machine(site, "other")  # one more client: what is there stays, word by word
    type_enroll(remote, other, "you@other")
    after = state()[0]
    lines = iter(after.splitlines())
    assert all(line in lines for line in before[0].splitlines()) and "you@other" in after
    assert remote.shell("sudo stat -c %a:%U /etc/tariq/tariq.conf").stdout == "600:root\n"
    remote.serve()
    laptop.knock("O", "22"), other.knock("C", "22")

def test_nothing_secret_is_in_an_argument_or_the_environment_of_the_enrolment(remote, laptop):
    """Sampled from /proc while the line runs, on both machines."""
    secrets, seen = remote.shell(
        "sudo sed -n 's/^secret.* = //p' /etc/tariq/tariq.conf").stdout.split(), ""
    with ThreadPoolExecutor(1) as pool:
        line = pool.submit(type_enroll, remote, laptop)
        while not line.done():
            for pid in filter(str.isdigit, os.listdir("/proc")):
                for name in "cmdline", "environ":
                    with suppress(OSError):
                        seen += proc(pid, name)
    assert line.result() and "enroll" in seen
    assert len(secrets) == 2 and not any(word in seen for word in secrets)

def test_the_set_up_by_hand_for_another_user_works(site, laptop):
    remote, home = Machine(site, "box"), "/etc/tariq/.server-gpg"
    remote.shell(without_systemd(blocks("By hand")[0]))
    unit = remote.run("cat", "/etc/systemd/system/tariq.service").stdout
    assert unit.strip() == tariq.UNIT.strip()
    type_enroll(remote, laptop)
    server = remote.serve()
    owner = remote.run("stat", "-c", "%u", home).stdout.split()
    assert proc(server.listener, "status").split("Uid:")[1].split()[:1] == owner != ["0"]
    assert "opened tcp/22" in laptop.knock("O", "22").stdout
    assert laptop.knock("O", "23", check=False).returncode == REFUSED
    assert server.stop() == 0
    remote.shell(f"sudo chown -R root: {home}")
    key = laptop.shell("tariq.py keygen me@laptop").stdout
    for command in ("server", "enroll"):  # nothing in it commands root's gpg
        done = remote.run("tariq.py", command, check=False, input=key)
        assert done.returncode == 78 and f"chown -R tariq: {home}" in done.stderr

def test_a_removed_client_is_refused_without_a_restart_and_others_stay(site, remote, laptop):
    other = Machine(site, "other")
    type_enroll(remote, laptop)
    key = remote.shell(f"sudo sed -n 's/^key = //p' {ROOT_CONF}").stdout.strip()
    type_enroll(remote, other, "you@other")
    server = remote.serve()
    assert "opened" in laptop.knock("O", "22").stdout
    edit_line, delete = blocks("A client that leaves")[0].splitlines()
    remote.shell("""printf '#!/bin/sh\nsed -i "/^.allow me@laptop/,/C 22/d" "$1"\n' > editor
                    chmod +x editor""")
    remote.shell(f"SUDO_EDITOR=~/editor {edit_line}")
    refused = laptop.knock("O", "22", check=False)
    assert refused.returncode == REFUSED and "may not O 22" in refused.stderr
    remote.shell(delete.replace("FINGERPRINT", key))
    # unknown: not even answered
    assert laptop.knock("O", "22", timeout=2, check=False).returncode == NO_ANSWER
    server.wait_log("198.51.100.20: knock refused: ")
    assert "opened" in other.knock("O", "22").stdout

def test_a_new_secret_for_everybody_shuts_out_who_has_the_old_one(remote, laptop):
    type_enroll(remote, laptop)
    server = remote.serve()
    _, new_secret = blocks("A client that leaves")
    remote.shell(new_secret)
    laptop.knock("O", "22")  # until the restart the old one holds
    laptop.shell("cp -r ~/.config/tariq old; sed -i '/^.box.example.com/,$d' "
        "~/.config/tariq/tariq.conf")
    type_enroll(remote, laptop)
    assert server.stop() == 0
    server = remote.serve()
    laptop.knock("O", "22")
    old = laptop.knock("O", "22", options=["-c", "/home/me/old/tariq.conf"], timeout=2, check=False)
    assert old.returncode == NO_ANSWER and server.log.count(": opened") == 1

def test_a_key_is_renewed_and_revoked_by_the_line_that_enrols_it(remote, laptop):
    type_enroll(remote, laptop)
    remote.serve()
    renew, revoke = blocks("A key that ends, is renewed, or is revoked")
    knock = f"tariq.py knock -t {LONG} box.example.com O 22\n"
    done = laptop.shell(f"{knock}{renew}{knock}cp -a $GNUPGHOME ~/stolen; {revoke}")
    assert done.stdout.count("opened tcp/22") == 2
    updated, revoked = re.findall(r"\[allow me@laptop\] is there already, and (.*)", done.stderr)
    assert "its key is updated" in updated and "revoked" not in updated and "is revoked" in revoked
    mine = laptop.knock("O", "22", check=False)
    assert mine.returncode == 65 and "Your key, me@laptop, is revoked" in mine.stderr
    stolen = laptop.knock("O", "22", options=["-g", "/home/me/stolen"], timeout=2, check=False)
    assert stolen.returncode == NO_ANSWER

def test_ssh_knocks_by_itself_with_the_recipe(site, remote, laptop):
    type_enroll(remote, laptop)
    server = remote.serve()
    assert not laptop.ssh()
    laptop.shell(f"cat >> ~/.ssh/config "
        f"<<'END'\n{blocks('ssh that knocks by itself', 'ssh-config')[0]}END")
    # and nothing of the knock's
    assert laptop.shell("ssh me@box.example.com id -un").stdout == "me\n"
    assert "opened tcp/22" in server.log and len(remote.rules()) == 1
    assert laptop.shell("echo hello | ssh me@box.example.com cat").stdout == "hello\n"
    assert not Machine(site, "other").connects(remote.ip)

def test_a_gateway_lets_a_knock_through_to_a_host_inside(site, remote, laptop):
    type_enroll(remote, laptop)
    inside, other = Machine(site, "inside"), Machine(site, "other")
    inside.run("ip", "link", "set", "eth0", "down")
    site.cable(remote, "eth1", inside, "eth1", ["192.0.2.1/24"], ["192.0.2.5/24"])
    inside.run("ip", "route", "replace", "default", "via", "192.0.2.1")
    inside.sshd(system=True)
    remote.shell(without_systemd(blocks("A gateway")[0]))
    remote.shell(f"sudo sed -i 's/^    O 22/    O 2222/' {ROOT_CONF}")
    server = remote.serve()
    after_start = remote.run("cat", "/etc/systemd/system/tariq.service.d/gateway.conf").stdout
    remote.shell("sudo " + re.search("(?m)^ExecStartPost=-(.*)", after_start)[1])
    assert not laptop.connects(remote.ip, 2222)
    laptop.knock("O", "2222")
    assert laptop.connects(remote.ip, 2222)
    assert not laptop.connects(remote.ip, 22) and not other.connects(remote.ip, 2222)
    assert server.stop() == 0 and not laptop.connects(remote.ip, 2222)

def test_every_anchor_in_the_readme_leads_somewhere():
    headings = {re.sub("[^a-z0-9 _-]", "", line.strip("# ").lower()).replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= headings

# ---- keys with a passphrase ----------------------------------------------------------------------

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
AGENT_CONF = ("~/.config/tariq/gpg/gpg-agent.conf; "
              "gpgconf --homedir ~/.config/tariq/gpg --kill gpg-agent")

@pytest.fixture(scope="module")
def with_passphrase():
    """An enrolled client whose key got a passphrase by the README's command, and a pinentry that
    types it."""
    with Lab() as site:
        remote, laptop = Machine(site, "box", server=True), Machine(site, "laptop")
        type_enroll(remote, laptop)
        remote.serve()
        laptop.shell("cat > pinentry; chmod +x pinentry", input=PINENTRY)
        laptop.shell(f"echo pinentry-program /home/me/pinentry > {AGENT_CONF}")
        laptop.shell(blocks("A passphrase")[0])
        yield laptop

def test_a_passphrase_is_asked_by_pinentry_once_and_then_remembered(with_passphrase):
    # it knows nothing yet
    with_passphrase.shell(f"rm -f asked; echo pinentry-program /home/me/pinentry > {AGENT_CONF}")
    for words in (("O", "22"), ("C", "22")):
        with_passphrase.knock(*words)
        assert with_passphrase.shell("cat asked").stdout == "asked\n"

def knock_on_a_terminal(client, types, redirect=""):
    """Knock on a pseudo-terminal where somebody types into pinentry-curses -> (exit code, all that
    it showed)."""
    client.shell(f"rm -f {AGENT_CONF}")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chown(os.ttyname(0), int(client.run("id", "-u", "me").stdout), -1)
        words = ["bash", "-c", f"tariq.py knock -t {LONG} box.example.com O 22 {redirect}"]
        argv = [*client.command(["env", "TERM=xterm"], "me"), *words]
        os.execvp(argv[0], argv)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    said, typed, again, end = b"", 0, 0.0, time.monotonic() + 2 * LONG
    with suppress(OSError):  # the terminal's last user is gone
        while time.monotonic() < end:
            if select.select([terminal], [], [], 0.7)[0]:
                said += os.read(terminal, 4096)
                continue
            opened, now = said.count(b"[?1049h"), time.monotonic()
            # One more dialog is drawn; or it is there yet, and has thrown away what came too early.
            if opened > typed or opened > said.count(b"[?1049l") and now > again:
                typed, again = opened, now + 20
                os.write(terminal, types)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said

@pytest.mark.parametrize("redirect", ["", "</dev/null >/dev/null"])
def test_pinentry_curses_asks_on_the_terminal_also_where_ssh_runs_the_knock(with_passphrase,
    redirect):
    """`Match exec` gives the command /dev/null as input and output; its stderr is the terminal."""
    code, said = knock_on_a_terminal(with_passphrase, b"correct-horse-7\r", redirect)
    assert code == 0 and b"correct-horse" not in said \
        and (redirect or b"opened tcp/22" in said), said

def test_a_wrong_passphrase_or_none_for_want_of_a_terminal_is_a_clear_error(with_passphrase):
    code, said = knock_on_a_terminal(with_passphrase, b"wrong\r")
    words = (b"tariq: The passphrase of the key in /home/me/.config/tariq/gpg was wrong, or was "
             b"not given.\r\n")
    assert code == 65 and said.endswith(words), said
    done = with_passphrase.knock("O", "22", check=False, start_new_session=True)
    assert done.returncode == 65 and "there is no terminal" in done.stderr
    assert done.stderr.count("\n") == 1

# ---- words: each line as its reader sees it ------------------------------------------------------

def reads(done, code, line):
    """Insist that a program ended with this code and that this was all it said, one line, which its
    reader can act on. A * in the line is a word that differs from run to run, as a time does; **
    are any words."""
    pattern = re.escape(f"tariq: {line}\n").replace(r"\*\*", ".+").replace(r"\*", r"\S+")
    assert done.returncode == code and re.fullmatch(pattern,
        done.stderr) and done.stdout == "", (line, done)
    for raw in ("Errno", r"\\x", "Traceback", "[0-9A-F]{40}", "(^| )gpg: ", "Error"):
        assert not re.search(raw, done.stderr), (raw, done)

def client_with(world, ring=None, **settings):
    """A copy of the client's config with other values in [box]; a value None takes the key out."""
    text = world.me.read_text()
    for key, value in settings.items():
        text = re.sub(rf"(?m)^{key} = .*\n", "", text)
        text = text.replace("[box]\n", f"[box]\n{key} = {value}\n") if value is not None else text
    if ring:
        text = re.sub("(?m)^client_gpg_dir = .*", f"client_gpg_dir = {ring}", text)
    return write(world.lab.new("tariq.conf"), text, NOBODY)

@pytest.mark.parametrize("words, code, line", [
    ("O", 64, "a request is O PORT[/tcp|/udp]..., C PORT... or E COMMAND [ARG...], in printable "
    "characters."),
    ("O ssh", 64, "ssh is no port: write 22, 22/tcp or 53/udp, from 1 to 65535."),
    ("O 22/sctp", 64, "22/sctp is no port: write 22, 22/tcp or 53/udp, from 1 to 65535."),
    (f"E echo {'x' * 900}", 64, "The request is * bytes too long: shorten it."),
    ("O 22 23/udp", 77, "box says: refused: you may not O 23/udp here."),
    ("E reboot now", 77, "box says: refused: you may not E reboot now here.")])
def test_the_words_for_a_request(live, words, code, line):
    reads(knock(live, *words.split()), code, line)

def test_the_words_for_a_config_that_lacks_something(live):
    none, host = live.lab.dir / "none.conf", "new.example.com"
    reads(knock(live, conf=none), 78, f"There is no config {none} yet: tariq.py keygen YOU@LAPTOP "
        f"makes a client's, and "
          "sudo tariq.py init a server's.")
    reads(knock(live, where=host), 78, f"{host} is not in {live.me}, which has box, box6: enroll "
        f"there, and tariq.py join "
          f"{host} (README, The first hour).")
    fresh = write(live.lab.new("fresh.conf"), "[client]\nuser = me@laptop\nclient_gpg_dir = "
        "/nowhere\n", NOBODY)
    reads(knock(live, conf=fresh, where=host), 78, f"{host} is not in {fresh}, which has no server "
        f"yet: enroll there, "
          f"and tariq.py join {host} (README, The first hour).")
    for settings, line in (({"secret": None}, "secret is missing."),
                           ({"secret": "c2VjcmV0"}, "secret has to be 32 random bytes in base64, "
                           "which this prints: "
                            "head -c 32 /dev/urandom | base64."),
                           ({"secret_port": 1}, "secret_port is no key that can stand here."),
                           ({"address": "here"}, "address has to be an IP address, or any.")):
        conf = client_with(live, **settings)
        reads(knock(live, conf=conf), 78, f"{conf}: [box] {line}")
    loose = client_with(live)
    loose.chmod(0o644)
    reads(knock(live, conf=loose), 78, f"{loose} is open to others: chmod 600 it (and, if root's "
        f"commands read it, "
          "chown root it).")
    broken = write(live.lab.new("broken.conf"), "secret = x\n", NOBODY)
    reads(knock(live, conf=broken), 78, f"{broken} is no INI file: it needs [section] or key = "
        f"value in each line, and "
          "every section and key once.")

def test_the_words_for_options(live):
    for options, line in ((["-p", "1,2,3"], "secret_ports has to be 5 to 32 different ports with "
        "commas between them."),
                          (["--address", "home"], "address has to be an IP address, or any.")):
        reads(knock(live, options=options), 64, line)
    reads(knock(live, options=["--transport", "crafted"]), 71,
          "Crafted packets need root: use sudo, or leave --transport out.")

def test_the_words_for_keys(live):
    ring = live.me.parent / "gpg"
    reads(knock(live, options=["-u", "who@example.com"]), 65, "Your key, who@example.com, is not "
        "in "
        "the keyring "
          f"{ring}: renew it, or make one with tariq.py keygen; then enroll it.")
    reads(knock(live, conf=client_with(live, server_key="0" * 40)), 65,
          f"The key of box is not in the keyring {ring}: enroll and join again.")
    reads(knock(live, options=["-g", "/nowhere"]), 69, "There is no keyring /nowhere: tariq.py "
        "init "
        "makes a server's, "
          "tariq.py keygen a client's.")
    (own := live.lab.new("ring")).mkdir(0o700)
    os.chown(own, NOBODY, NOBODY)
    gpg(own, "--import", input=gpg(ring, "--export", config_values(live.me, "box")["server_key"],
        text=False).stdout,
        text=False)
    for user in ("late@example.com", "gone@example.com"):
        generate(own, user, "future-default", *at_time(-86400))
    gpg(own, *at_time(-86400), "--quick-set-expire", fingerprint(own, "late@example.com"),
        "seconds=1")
    key = fingerprint(own, "gone@example.com")
    revocation = (own / "openpgp-revocs.d" / f"{key}.rev").read_text()
    gpg(own, "--import", input=revocation.replace(":-----BEGIN", "-----BEGIN"))
    conf = client_with(live, ring=own)
    for user, why in (("late@example.com", "expired on *"), ("gone@example.com", "is revoked")):
        reads(knock(live, conf=conf, options=["-u", user]), 65, f"Your key, {user}, {why}: renew "
            f"it, or make one with "
              "tariq.py keygen; then enroll it.")

def test_the_words_for_a_keyring_whose_path_is_too_long(live):
    home = live.lab.new("ring") / ("long" * 20)
    home.mkdir(parents=True)
    os.chown(home, NOBODY, NOBODY)
    conf = write(live.lab.new("tariq.conf"), f"[client]\nuser = me@laptop\nclient_gpg_dir = "
        f"{home}\n", NOBODY)
    os.chown(conf.parent, NOBODY, NOBODY)
    done = live.lab.tariq(live.client, "keygen", "-c", conf, "me@laptop", user=NOBODY, check=False)
    os.chown(conf.parent, 0, 0)
    reads(done, 78, f"The keyring's path {home} is too long for gpg-agent: move it to one of at "
        f"most 86 bytes.")

def test_the_words_for_images(live):
    (covers := live.lab.new("covers")).mkdir()
    reads(knock(live, options=["-i", covers]), 65, f"There is no PNG image (.png) in the folder "
        f"{covers}.")
    (covers / "photo.png").write_text("no PNG")
    reads(knock(live, options=["-i", covers]), 65,
          f"{covers}/photo.png cannot be read as a PNG image: choose another img_dir.")

def test_the_words_for_the_way_to_the_server(live):
    reads(knock(live, conf=client_with(live, host="nowhere.invalid")), 75, "nowhere.invalid has no "
        "address that can be "
          "found here: is it written right? (**)")
    reads(knock(live, conf=client_with(live, host="203.0.113.1")), 75, "There is no route to "
        "203.0.113.1 (203.0.113.1): "
          "is the network up here?")
    silent, clock = client_with(live,
        host="198.51.100.99"), "The server's log may say why (journalctl -u tariq); it is * " \
        "UTC by this clock, and a minute is too far off."
    reads(knock(live, conf=silent, timeout=1), 75, f"No answer from box in 1 s, at 198.51.100.99 "
        f"by "
        f"kernel and udp. {clock}")
    reads(knock(live, conf=silent, timeout=1, transport="udp"), 75,
          f"No answer from box in 1 s, at 198.51.100.99 by udp. {clock}")
    reads(knock(live, change=OWN.format("64:ff9b::cb00:714d")), 76, f"The server sees "
        f"{live.client.ip}, and this machine "
          f"is 64:ff9b::cb00:714d: nothing was opened. If that is your NAT, knock with --address "
          f"{live.client.ip}; if it "
          "is not, somebody relays your knock.")

def test_the_words_for_doors(live):
    other, at = second_client(live, "neighbour", ("O 22", "C 22 23")), r"\d\d:\d\d:\d\dZ"
    mine = rf"on box for {live.client.ip}"
    assert re.fullmatch(rf"opened tcp/22 {mine} until {at}; opened udp/53 {mine} until {at}\n",
                        opens(live, "O", "22", "53/udp"))
    reads(knock(live, "C", "22", conf=other), 77, f"box says: tcp/22 is open for {live.client.ip} "
        f"until *Z, by another "
          "client, who alone closes it.")
    reads(knock(live, "C", "22", host=live.other), 77, f"box says: tcp/22 is open for "
        f"{live.client.ip} until *Z, and you "
          f"came from {live.other.ip}.")
    reads(knock(live, "C", "22", "23", conf=other), 77, f"box says: tcp/23 was shut already for "
          f"{live.client.ip}; tcp/22 is open for {live.client.ip} until *Z, by another client, who "
          "alone closes it.")
    assert opens(live, "C", "22", "53/udp") \
        == f"closed tcp/22 {mine}; closed udp/53 {mine}\n"
    assert opens(live, "C", "22") == f"tcp/22 was shut already on box for {live.client.ip}\n"

def test_the_words_for_what_is_missing_on_a_machine(live):
    for module, package, how in (("PIL", "python3-pil", dict(options=["-i", "/tmp"])),
                                 ("scapy", "python3-scapy", dict(transport="crafted"))):
        reads(knock(live, change=f"sys.modules['{module}'] = None", **how), 69,
              f"{module} is missing on this machine: apt-get install {package}")
    user = "env", f"PATH={tariq.PATH}", *as_user(NOBODY)  # of this machine's may not be for nobody
    reads(live.client.run(*without(live, "gpg"), *user, *knock_words(live), check=False), 69,
          "gpg is missing on this machine: apt-get install gnupg")

def without(world, program):
    """The words that run a command where a program of /usr/bin or /usr/sbin is not installed."""
    own = world.lab.new("usr")
    script = f"""set -e
        {overlaid(own, "/usr/bin", "/usr/sbin")}
        rm -f /usr/bin/$0 /usr/sbin/$0
        exec "$@" """
    return "sh", "-c", script, program

def test_the_words_for_what_is_missing_on_a_servers_machine(idle):
    for program, package in (("iptables", "iptables"), ("setpriv", "util-linux")):
        done = idle.other.run(*without(idle, program), idle.lab.dir / "tariq.py", "server", "-c",
            idle.conf, check=False)
        last = done.stderr.splitlines()[-1]
        assert (done.returncode, last) == (69, f"tariq: {program} is missing on this machine: "
            f"apt-get install {package}")
    done = idle.other.run(*without(idle, "gpg"), idle.lab.dir / "tariq.py", "server", "-c",
        idle.conf, check=False)
    assert done.returncode == 69, done
    last = done.stderr.splitlines()[-1]
    assert last == ("tariq: The listener says: gpg is missing on this machine: apt-get install "
                    "gnupg")

def test_the_words_of_roots_commands(live):
    program = live.lab.dir / "tariq.py"
    for command in ("init", "check", "hide", "server", "enroll"):
        done = live.lab.tariq(live.other, command, "-c", live.conf, user=NOBODY, check=False)
        reads(done, 71, f"This needs root: sudo {program} {command}")
    none = live.lab.dir / "none.conf"
    for command in ("check", "hide", "server"):
        reads(live.lab.tariq(live.other, command, "-c", none, check=False), 78, f"There is no "
            f"config "
            f"{none} yet: tariq.py "
              "keygen YOU@LAPTOP makes a client's, and sudo tariq.py init a server's.")
    reads(live.lab.tariq(live.server, "server", "-c", live.conf, check=False), 71,
          "A server with this chain runs already: sudo systemctl stop tariq")

def test_the_words_for_a_passphrase_without_a_terminal(with_passphrase):
    with_passphrase.shell(f"rm -f {AGENT_CONF}")
    done = with_passphrase.knock("O", "22", check=False, start_new_session=True)
    reads(done, 65, "The key in /home/me/.config/tariq/gpg has a passphrase, and there is no "
        "terminal to ask for it: "
          "knock from a terminal, with pinentry-curses installed.")

def test_the_words_of_an_enrolment(remote, laptop):
    done, config = type_enroll(remote, laptop), "/home/me/.config/tariq/tariq.conf"
    key = remote.shell("sudo sed -n 's/^key = //p' /etc/tariq/tariq.conf").stdout.strip()
    server_key = laptop.shell(f"sed -n 's/^server_key = //p' {config}").stdout.strip()
    assert sorted(done.stderr.splitlines()) == sorted([  # three commands at once
        f"wrote {config}", f"wrote {config}", "wrote /etc/tariq/tariq.conf",
        f"The key of me@laptop is {key}. Knocks are signed by that of `user` in {config}.",
        f"me@laptop ({key}) may O 22/tcp; C 22/tcp",
        f"box.example.com is known by its key {server_key}. Next: tariq.py knock box.example.com O "
        f"22"])

def test_the_words_for_a_full_disk(live):
    key = live.lab.tariq(live.client, "keygen", "-c", second_client(live, "late"),
        "late@example.com").stdout
    (disk := live.lab.new("disk")).mkdir()
    script = (f"mount -t tmpfs -o size=1m,mode=755 tmpfs {disk} && cp -a {live.conf.parent}/. "
        f"{disk}"
              f" && sed -i s,{live.conf.parent},{disk}, {disk}/tariq.conf && rm -f "
              f"{disk}/.server-gpg/S.*"
              f" && {{ dd if=/dev/zero of={disk}/fill 2>/dev/null; sync; exec \"$@\"; }}")
    done = live.server.run("sh", "-c", script, "sh", live.lab.dir / "tariq.py", "enroll", "-c",
        disk / "tariq.conf",
                          input=key, check=False)
    reads(done, 71, f"The disk that holds {disk}/.server-gpg is full: make room there.")

def test_a_good_start_logs_four_lines_at_most_and_a_knock_what_it_changes_and_one_more(idle):
    with serving(idle) as server:
        assert server.log.count("\n") <= 4 and "README" not in server.log, server.log
        for words, lines in (("O 22", (r"\+ iptables -w 5 -A .*", rf"me@laptop \S+ O 22/tcp: "
            rf"opened tcp/22 for \S+ until \S+")),
                             ("C 22", (r"\+ iptables -w 5 -D .*", r"me@laptop \S+ C 22/tcp: closed "
                             r"tcp/22 for \S+")),
                             ("E echo hi", (r"\+ echo hi", r"me@laptop \S+ E echo hi: exit status "
                             r"0"))):
            before = server.log
            opens(idle, *words.split())
            said = server.log.removeprefix(before).splitlines()
            assert len(said) == len(lines) and all(map(re.fullmatch, lines, said)), said
        before = server.log
        fails(idle, REFUSED, "", "O", "99")
        assert server.log.removeprefix(before).splitlines() \
            == [f"me@laptop {idle.client.ip} O 99/tcp: refused: you may not O 99/tcp here."]

def test_the_words_of_the_log_for_a_knock_that_gets_no_answer(idle):
    """Each is explained in the README, where people look who got none."""
    def logged(line, shown, *sent):
        """What is sent draws this line and no other one; the README shows so much of it."""
        before, count = server.log, server.log.count("\n")
        for peer, frames in sent:
            peer.send(frames)
        wait_for(lambda: server.log.count("\n") > count, f"nothing is logged, but should: {line}")
        said = server.log.removeprefix(before)
        assert re.fullmatch(re.escape(f"listener: {idle.client.ip}{line}\n").replace(r"\*", ".*"),
            said), said
        assert in_the_readme(shown)
    refused = ": knock refused: the signer's key, "
    for name in ("unknown", "revoked", "expired"):
        second_client(idle, name)
    rings = {name: (idle.lab.dir / name / "gpg", f"{name}@example.com") for name in ("unknown",
        "revoked", "expired")}
    keys = {name: fingerprint(*of) for name, of in rings.items()}
    revocation = (rings["revoked"][0] / "openpgp-revocs.d" / f"{keys['revoked']}.rev").read_text()
    gpg(idle.ring, "--delete-keys", keys["unknown"])
    gpg(idle.ring, "--import", input=revocation.replace(":-----BEGIN", "-----BEGIN"))
    gpg(idle.ring, *at_time(86400), "--quick-set-expire", keys["expired"], "seconds=1", check=False)
    with serving(idle, program=idle.lab.program("tariq.ANSWER_TIME = 1")) as server:
        late = Peer(idle).seal()
        logged(" sent an authentic frame of * s from now: its clock or this one is wrong, or it is "
            "a recording.",
               "sent an authentic frame of 300 s", (late, late.frames(-300)[:1]))
        old = Peer(idle)
        old.seal(None, *at_time(-700), "--ignore-time-conflict", "--ignore-valid-from", "-u",
            f"<{old.user}>", "-s", "-e")
        logged(": knock refused: me@laptop signed it * s ago, and 600 is the most: set the clocks. "
            "",
               "s ago, and 600 is the most: set the clocks.", (old, old.frames()))
        junk = Peer(idle).seal(b"x", "-e")
        logged(": knock refused: not one encrypted message with one valid signature. *",
               "knock refused: not one encrypted message with one valid signature.", (junk,
               junk.frames()))
        deaf = Peer(idle).seal()
        logged(": me@laptop got a challenge, and did not answer it: lost on the way, or the "
               "client got in by another, or somebody relays its knocks.",
               "me@laptop got a challenge, and did not answer it: ...", (deaf,
               deaf.frames()))
        for name, line, shown in (
                ("unknown", f"{keys['unknown'][-16:]}, or a new subkey of it is not in the "
                f"server's keyring: enroll it. *",
                 "is not in the server's keyring"), ("revoked", "revoked@example.com, is revoked. "
                 "*", "is revoked")):
            peer = Peer(idle, conf=idle.lab.dir / name / "tariq.conf").seal()
            logged(f"{refused}{line}", shown, (peer, peer.frames()))

def test_the_words_of_the_log_for_a_config_that_was_changed(live):
    text, opened = live.conf.read_text(), rf"me@laptop {live.client.ip} O 22/tcp: opened .*\n"
    for change, line in (("[", f"{live.conf} is no INI file: it needs [section] or key = value in "
        f"each line, and every "
                          "section and key once. The config from before this change holds."),
                         ("[server", f"{live.conf} is no INI file: it needs [section] or key = "
                         f"value in each line, and "
                          "every section and key once. The config from before this change holds."),
                         ("[allow bob]\nkey = 1\n", f"{live.conf}: [allow bob] key has to be a "
                         f"key's fingerprint: 40 "
                          "hexadecimal digits without spaces.")):
        before = live.tariq.log
        live.conf.write_text(f"{text}\n{change}")
        opens(live), opens(live)
        assert live.tariq.log.removeprefix(before).splitlines()[0] == line
        assert live.tariq.log.removeprefix(before).count(line) == 1, "once a change"

def test_the_words_of_init_and_check(site, remote, laptop):
    again = remote.shell("sudo tariq.py init 2>&1").stdout.splitlines()
    assert again == ["There is no systemd here: let /usr/local/bin/tariq.py server run as root, "
        "also after a reboot.",
                     "Nothing is hidden yet. Next, on a client: tariq.py keygen YOU@LAPTOP | ssh "
                     "root@box tariq.py enroll "
                     '--allow "O 22" | tariq.py join box']
    type_enroll(remote, laptop)
    assert len(remote.shell("sudo tariq.py init 2>&1").stdout.splitlines()) == 1, \
        "a client is there: no next step"
    remote.serve()
    well = ["The key of [server] is good, and expires: never.", "The key of [allow me@laptop] is "
        "good, and expires: never.",
            "iptables: INPUT leads to the doors, and drops the rest.",
            "ip6tables: INPUT leads to the doors, and drops the rest.",
            "INPUT's own rules say who reaches what listens: 22/tcp."]
    assert remote.shell("sudo tariq.py check 2>&1").stdout.splitlines() == well
    remote.shell("sudo sed -i 's/^key = .*/key = 1/; s/^may =/mai =/' /etc/tariq/tariq.conf")
    done = remote.shell("sudo tariq.py check 2>&1", check=False)
    start = "FAULT: /etc/tariq/tariq.conf: [allow me@laptop] "
    assert done.returncode == 78 and done.stdout.splitlines() == [
        well[0], *well[2:], f"{start}key has to be a key's fingerprint: 40 hexadecimal digits "
        f"without spaces.",
        f"{start}mai is no key that can stand here."]

def test_each_line_that_the_readme_shows_or_explains_is_one_of_the_programs():
    """But for what differs from time to time: names, addresses, numbers, what is left out."""
    strings = []
    for node in ast.walk(ast.parse(TARIQ.read_text())):
        if isinstance(node, ast.JoinedStr):
            strings += [part.value for part in node.values if isinstance(part, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
    known = " ".join("\0".join(strings).split())
    varies = (r"\.\.\.|[:;()]|\S*[\d@/]\S*|\S*iptables\S*|box\S*|\[allow \w+\](?: key)?|"
              r"kernel and udp|it (?=is good)|\b(?:ago|but|none|O|gnupg|updated)\b")
    shown = [line for language, block in re.findall(r"(?ms)^```(\S*)\n(.*?)^```$", README)
             for line in block.splitlines() if not language]
    shown += re.findall(r"(?m)^- `([^`]*)`", README)
    parts = [" ".join(part.split()).strip(" ,.") for line in shown
             for part in re.split(varies, line)
             if not line.startswith(("$", "+", "ssh: "))]
    parts = [part for part in parts if len(part.split()) >= 3]
    assert len(parts) > 30 and [part for part in parts if part not in known] == []

COMMANDS = ("init", "check", "hide", "server", "keygen", "enroll", "join", "knock")

def test_help_has_two_sentences_an_example_that_can_be_typed_and_words_for_each_option():
    said = sh(sys.executable, TARIQ, "--help").stdout
    assert all(re.search(rf"(?m)^    {command} +[A-Z].*", said) for command in COMMANDS)
    for command in COMMANDS:
        said = sh(sys.executable, TARIQ, command, "--help").stdout
        sentences, examples = re.search(r"(?s)\n\n(.*?) Examples?:\n\n(.*?)\n\n", said).groups()
        assert len(re.split(r"(?<=\.)\s+", sentences)) == 2, sentences
        commands = [re.sub(" [<>] .*", "",
                           re.sub(r"^ *(ssh \S+ )?(sudo )?", "", part)).split(None, 1)
                    for part in re.split(r"[|\n]", re.sub(r"\\\n *", "", examples))]
        assert any(words.split()[0] == command for _, words in commands), examples
        for program, words in commands:
            assert program in ("tariq.py", "./tariq.py"), examples
            name, *rest = shlex.split(words)
            tariq.parser_of(name).parse_args(rest)  # raises Fault
        options = re.split(r"(?m)^\w.*:\n", said.split("\n\n", 2)[2])[1:]
        for entry in re.findall(r"(?m)^  (\S.*(?:\n {10,}.*)*)", "".join(options)):
            assert re.search(r"\S\s{2,}\S", entry), f"no words: {entry!r}"

def test_version_says_which_file_this_is():
    digest = sh("sha256sum", TARIQ).stdout.split()[0]
    assert sh(sys.executable, TARIQ, "--version").stdout == f"tariq.py 3.0, SHA-256 {digest}\n"

# ---- the service ---------------------------------------------------------------------------------

def unit(key):
    """The words of a setting of the unit that `init` writes."""
    return " ".join(re.findall(f"(?m)^{key}=(.*)$", tariq.UNIT)).split()

def test_server_and_knock_work_in_the_units_sandbox(remote, laptop):
    """What systemd does, done with the kernel's own means: the exact bounding set, no new
    privileges, a read-only system but for ReadWritePaths, no homes, a private /tmp."""
    type_enroll(remote, laptop)
    remote.shell("sudo sed -i 's/^    C 22.*/    C 22\\n    E sh */' /etc/tariq/tariq.conf")
    writable = [path.removeprefix("-") for path in unit("ReadWritePaths")]  # -: it may be missing
    stay = [pattern for path in writable for pattern in (path, f"{path}/*")]
    script = f"""set -e
        for path in {' '.join(writable)}; do mount --rbind $path $path; done
        while read -r _ path _; do
            case $path in /proc*|/sys*|/dev*|/tmp|{'|'.join(stay)}) ;;
                # That it fails (gone, or covered) is no fault: what counts is looked at.
                *) mount -o remount,bind,ro "$path" || true;; esac
        done < /proc/self/mounts
        for path in /tmp /home /root; do mount -t tmpfs -o mode=1777 tmpfs $path; done
        exec "$@" """
    names = [name.removeprefix("CAP_").lower() for name in unit("CapabilityBoundingSet")]
    server = remote.serve("unshare", "--mount", "bash", "-c", script, "bash",
                          "setpriv", "--no-new-privs",
                          f"--bounding-set={','.join(['-all', *(f'+{name}' for name in names)])}")
    assert "opened" in laptop.knock("O", "22").stdout and laptop.connects(remote.ip)
    look = ("grep -E 'CapBnd|NoNewPrivs' /proc/self/status; touch /x /etc/x /usr/x /var/x /root/y; "
            "id -u")
    inside = laptop.knock("E", "sh", "-c", look, check=False).stdout
    assert "CapBnd:\t00000000000031e0\nNoNewPrivs:\t1\n" in inside, inside
    read_only = set(re.findall("'(.*)': Read-only file system", inside))
    assert read_only == {"/x", "/etc/x", "/usr/x", "/var/x"} and inside.endswith("0\n"), inside
    assert "closed" in laptop.knock("C", "22").stdout
    assert server.stop() == 0

@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_the_unit_is_valid_little_exposed_and_lets_through_all_that_the_server_does(remote, laptop):
    """Traced: every system call is in the SystemCallFilter, every socket's family in
    RestrictAddressFamilies."""
    def analyze(*words):
        return remote.run("systemd-analyze", *words)
    def members(name):
        return set().union(*(members(word)
                             for word in groups[name])) if name.startswith("@") else {name}
    path, trace = "/etc/systemd/system/tariq.service", remote.lab.new("trace")
    remote.shell(f"sudo tee {path} >/dev/null", input=tariq.UNIT)
    done = analyze("verify", path)
    assert "tariq" not in done.stdout + done.stderr
    # 0 to 100; an unhardened service of root has 96. What is left is root itself, six capabilities
    # and the network.
    analyze("security", "--offline=yes", "--threshold=35", path)
    type_enroll(remote, laptop)
    groups = {name: re.findall(r"(?m)^    +([^# ]\S*)", text) for name, text in re.findall(
        r"(?ms)^(@\S+)\n(.*?)(?=^@|\Z)", analyze("syscall-filter").stdout)}
    server = remote.serve("strace", "-D", "-f", "-q", "-o", trace)
    laptop.knock("O", "22"), laptop.knock("C", "22")
    assert server.stop() == 0
    text = traced(trace, server.process.pid)
    calls = set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed)", text, re.M))
    assert unit("SystemCallFilter") == ["@system-service", "~@resources"]
    allowed = members("@system-service") - members("@resources") | members("@default")
    assert len(calls) > 40 and calls <= allowed, calls - allowed
    families = set(re.findall(r"(?m)^\d+ +socket(?:pair)?\((\w+)", text))
    assert "AF_PACKET" in families and families <= set(unit("RestrictAddressFamilies"))

@pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: run as root")
@pytest.mark.parametrize("interrupted_at", [None, "Three hosts", "opened tcp/22"])
def test_the_demo_shows_what_the_readme_says_and_leaves_nothing_also_after_ctrl_c(tmp_path,
                                                                                  interrupted_at):
    path = tmp_path / "demo"
    with open(path, "w") as file:
        process = subprocess.Popen([sys.executable, HERE / "test_tariq.py", "demo"],
                                   stdin=DEVNULL, stdout=file,
                                   stderr=file, start_new_session=True)
    if interrupted_at:
        wait_for(lambda: interrupted_at in path.read_text(), "it does not come so far")
        os.killpg(process.pid, signal.SIGINT)
    code, said = process.wait(600), path.read_text()
    assert f"tq-{process.pid}-" not in sh("ip", "netns").stdout
    if interrupted_at:
        assert code == 130 and "Traceback" not in said \
            and said.endswith("interrupted: all of it is removed\n"), said
        return
    assert code == 0, said
    steps = ["ignored states", "exit status 124", "opened tcp/22 on box for 198.51.100.20",
             "SSH-2.0", "--datestop",
             "ignored states", "up ", "refused: ", "by udp", "closed tcp/22", "0 came back",
             "exit status 124"]
    assert all(step in said for step in steps) and said.count("65535 scanned ports") == 2
    at = [said.index(step) for step in steps[2:5] + steps[7:9] + steps[10:11]]
    assert at == sorted(at)

def demo():
    """Three throwaway hosts, a closed door and a knock. What stands after a $ is run as it stands;
    the demo fails where the output is not what the words before it say."""
    def say(text):
        print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)
    def show(host, *argv, expect="", without="\0", user=None):
        print(f"{'nobody@' if user else ''}{host.name}$ {shlex.join(map(str, argv))}", flush=True)
        done = host.run(*argv, user=user, check=False, cwd=lab.dir)
        said = (done.stdout + done.stderr).strip()
        lines = "\n".join(f"  {line}" for line in said.splitlines() if line)
        print(lines or f"  (nothing; exit status {done.returncode})", flush=True)
        assert expect in said and without not in said, f"not as announced: {expect or without!r}"
    def knock(expect, *words):
        show(client, "./tariq.py", "knock", "-c", "client/tariq.conf", *words,
             expect=expect, user=NOBODY)
    def banner(**options):
        seconds = 30 if "expect" in options else 1
        show(client, "timeout", seconds, "bash", "-c", f"head -1 < /dev/tcp/{server.ip}/22",
            **options)
    def scan():
        show(world.other, "nmap", "-n", "-Pn", "-p-", "--min-rate", "30000",
             "--max-retries", "0", server.ip,
             expect="All 65535 scanned ports", without="/tcp open")
    if os.geteuid():
        sys.exit("the demo builds network namespaces: sudo ./test_tariq.py demo")
    missing = [program for program in ("ip", "iptables", "nmap", "gpg",
                                       "/usr/sbin/sshd") if not shutil.which(program)]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}. See the README's first command")
    # both leave through the `with` below, which removes everything
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with Lab() as lab, ExitStack() as stack:
            # runs first: nothing interrupts the removal
            stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)
            say("Three hosts in network namespaces: a server, a client and a scanner. Yours are "
                "not touched.")
            world = new_world(lab, other="scanner", allow=("O 22", "C 22", "E uptime *"))
            server, client, running = world.server, world.client, started(world)
            say("The server runs sshd and Tariq. Only sshd has a socket; Tariq listens on nothing:")
            show(server, "ss", "-Hlntup", expect=":22", without="python")
            say("The firewall drops all that is new. The scanner tries every port (any host on "
                "its switch is \"up\"):")
            scan()
            say("The client, an ordinary user, has no luck either:")
            banner(without="SSH")
            say("It knocks. Server and client prove themselves, and port 22 opens for this "
                "client's address:")
            with captured(client, outgoing=True) as recorded:
                knock("opened tcp/22", "box", "O", "22")
            banner(expect="SSH-2.0")
            say("The door is one rule. The kernel itself ends it, at the time it names:")
            show(server, "iptables", "-S", "tariq", expect=f"-s {client.ip}/32")
            say("From elsewhere still nothing is to be seen:")
            scan()
            say("A command that the server allows, without a log-in; and one that it does not:")
            knock("up ", "box", "E", "uptime", "--pretty")
            knock("refused: ", "box", "E", "cat", "/etc/shadow")
            say("A firewall on the way now drops SYNs with data, as some do. The second try goes "
                "by UDP, and closes:")
            client.run("iptables", "-A", "OUTPUT",
                       *"-p tcp --syn -m length --length 200: -j DROP".split())
            knock("closed tcp/22", "-v", "box", "C", "22")
            client.run("iptables", "-F", "OUTPUT")
            banner(without="SSH")
            say("Somebody has recorded the knock that opened it, and sends it again from the "
                "same address:")
            sent = [packet.frame for packet in recorded if packet.flags]
            with captured(client) as heard:
                inject(client, sent)
                time.sleep(1)
            back = [packet for packet in heard if packet.flags and not packet.outgoing]
            print(f"  {len(sent)} packets sent again, {len(back)} came back")
            assert sent and not back
            banner(without="SSH")
            say("What the server has logged of all that:")
            print("\n".join(f"  {line}" for line in running.log.splitlines()
                            if f" {client.ip} " in line and "iptables" not in line))
            say("Now all of it is removed. For real machines: see the README, Set-up.")
    except KeyboardInterrupt:
        print("\ninterrupted: all of it is removed")
        return 130
    return 0

# ---- a real machine: the README's first hour, typed on a fresh Debian in qemu --------------------

IMAGES = Path(os.environ.get("TARIQ_MACHINE_CACHE", "/var/cache/tariq-test-machine"))
PATIENCE = 900  # seconds: where the processor is emulated and shared, a boot may take minutes

RELEASES = {"trixie": "Debian 13", "bookworm": "Debian 12"}
# What an installation of Debian or a provider's image brings.
DEBIAN = ("linux-image-cloud-amd64,initramfs-tools,lz4,systemd,systemd-sysv,udev,dbus,"
          "openssh-server,openssh-client,iproute2,sudo,procps,kmod,python3")
# What `init` asks for. It lies in apt's cache, since the machine has no way out.
PACKAGES = "python3-scapy python3-pil gnupg iptables"

# $1: where it is made, $2: Debian's mirror, $3: DEBIAN, $4: PACKAGES, $5: the release
MAKE_IMAGE = r"""set -eu
tree=$1/tree
debootstrap --variant=minbase --include="$3" "$5" "$tree" "$2"
inside() { chroot "$tree" env DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 "$@"; }
mount -t proc proc "$tree/proc"
cp /etc/resolv.conf "$tree/etc/resolv.conf"
inside apt-get update -q
inside apt-get install -q -y --no-install-recommends --download-only $4
rm "$tree/etc/resolv.conf"
echo box > "$tree/etc/hostname"
printf '127.0.0.1 localhost box\n::1 localhost box\n' > "$tree/etc/hosts"
echo '/dev/vda / ext4 rw 0 0' > "$tree/etc/fstab"
cat > "$tree/etc/systemd/network/eth0.network" <<'END'
[Match]
Name=eth0
[Network]
Address=198.51.100.10/24
Address=2001:db8:1::10/64
Gateway=198.51.100.1
IPv6AcceptRA=no
END
# The journal comes out of the serial line, too: it is what there is to see when nobody gets in.
mkdir "$tree/etc/systemd/journald.conf.d"
cat > "$tree/etc/systemd/journald.conf.d/serial.conf" <<'END'
[Journal]
ForwardToConsole=yes
TTYPath=/dev/ttyS0
END
inside systemctl -q enable systemd-networkd
# What costs time here and says nothing of Tariq.
inside systemctl -q mask systemd-networkd-wait-online.service systemd-pstore.service \
    e2scrub_reap.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer fstrim.timer
touch "$tree/etc/.updated" "$tree/var/.updated"
printf 'MODULES=list\nCOMPRESS=lz4\n' > "$tree/etc/initramfs-tools/conf.d/small"
printf 'virtio_pci\nvirtio_blk\next4\n' > "$tree/etc/initramfs-tools/modules"
inside update-initramfs -u
umount "$tree/proc"
cp "$tree"/boot/vmlinuz-* "$1/kernel"
cp "$tree"/boot/initrd.img-* "$1/initrd"
truncate -s 3G "$1/disk"
mkfs.ext4 -q -m 0 -d "$tree" "$1/disk"
rm -rf "$tree"
"""

def image(packages, release):
    """The directory of a fresh machine's disk, kernel and initrd; made where the cache has none of
    this very recipe."""
    recipe = hashlib.sha256("\0".join((MAKE_IMAGE, DEBIAN, packages,
                                       release)).encode()).hexdigest()[:16]
    made, making = IMAGES / recipe, IMAGES / "making"
    IMAGES.mkdir(parents=True, exist_ok=True)
    with open(IMAGES / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once need one image
        if not made.exists():
            print(f"making a {RELEASES[release]} in {made}", flush=True)
            shutil.rmtree(making, ignore_errors=True)  # of a run that was ended
            making.mkdir()
            targets = sh("apt-get", "indextargets", "--format", "$(REPO_URI)",
                         "Created-By: Packages").stdout.splitlines()
            mirror = next(line for line in targets if "security" not in line)
            # Namespaces of its own: what is mounted or runs in there goes when it ends.
            sh("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private",
               "sh", "-c", MAKE_IMAGE, "sh", making, mirror, DEBIAN, packages,
               release, timeout=3600)
            making.rename(made)
    return made

class Guest:
    """Debian in qemu, as box.example.com on a lab's switch. What it writes to its disk goes when
    it ends."""

    def __init__(self, lab, image, key):
        self.console = write(lab.dir / "console", "")
        sh("ip", "-n", lab.switch, "tuntap", "add", "tap0", "mode", "tap")
        sh("ip", "-n", lab.switch, "link", "set", "tap0", "master", "br0", "up")
        self.start = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-m", "1024", "-smp",
                      "2", "-kernel", image / "kernel", "-initrd", image / "initrd"]
        kind = ["tcg,thread=multi", "-cpu", "qemu64"]
        if self.kvm_works():
            kind = ["kvm", "-cpu", "host"]
        # As a provider does it: root's ssh key comes from outside, by systemd's name for that.
        words = ("root=/dev/vda rw quiet console=ttyS0 net.ifnames=0 mitigations=off "
                 f"systemd.default_timeout_start_sec={PATIENCE} "  # nothing fails by slowness
                 f"systemd.default_device_timeout_sec={PATIENCE} "
                 f'"systemd.set_credential=ssh.authorized_keys.root:{key.read_text().strip()}"')
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", lab.switch, *map(str, self.start), "-accel", *kind,
             "-drive", f"file={image}/disk,format=raw,if=virtio,snapshot=on,cache=unsafe",
             "-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no",
             "-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci",
             "-serial", f"file:{self.console}", "-append", words], stdin=DEVNULL)

    def kvm_works(self):
        """Whether a guest gets as far as its first process: /dev/kvm may be there, and fail."""
        if not os.access("/dev/kvm", os.W_OK):
            return False
        words = "console=ttyS0 panic=-1 rdinit=/bin/true"  # when that ends, the kernel ends, too
        try:
            done = sh(*self.start, "-accel", "kvm", "-cpu", "host", "-no-reboot", "-serial",
                      "stdio", "-append", words, check=False, timeout=30)
        except subprocess.TimeoutExpired:
            return False
        return "Attempted to kill init! exitcode=0x00000000" in done.stdout

    def booted(self, times=1):
        """Wait until it has come up so many times."""
        def up():
            assert self.process.poll() is None, "qemu has ended"
            return self.console.read_bytes().count(b"Startup finished") >= times
        wait_for(up, "the machine does not come up", PATIENCE)

    def last_words(self, lines=80):
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-lines:])

def readme(heading, number=0):
    """What the README has there to be typed."""
    return blocks(heading)[number].strip()

class FirstHour:
    """A laptop, a stranger and a machine. Each line is printed, typed by whom it says, and its
    outcome looked at."""

    addresses = "198.51.100.10", "2001:db8:1::10"

    def __init__(self, lab, release):
        key = lab.dir / "id_ed25519"
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        self.began, self.lab, self.typed = time.monotonic(), lab, 0
        self.release = RELEASES[release]
        self.guest = Guest(lab, image(PACKAGES, release), Path(f"{key}.pub"))
        self.laptop, self.stranger = Machine(lab, "laptop"), lab.host("other", 30)
        # `session` is one log-in that stays, as an admin's does: all of its commands go through one
        # connection, which no step may cut.
        self.laptop.run("tee", "-a", "/etc/hosts", input=f"{self.addresses[1]} box.example.com\n")
        self.laptop.shell("cat >.ssh/config", input=(
            "Host session\n  HostName box.example.com\n  ControlMaster auto\n  ControlPersist yes\n"
            "  ControlPath ~/.ssh/session-%r\nHost *\n  StrictHostKeyChecking accept-new\n"
            f"  LogLevel ERROR\n  ConnectTimeout {PATIENCE}\n"))

    def boots(self, times=1):
        """Wait until it has booted so many times, and is on the network. A hidden machine says so
        on the link only."""
        self.guest.booted(times)
        self.stranger.run("ip", "neigh", "flush", "all")
        def answers():
            for address in self.addresses:
                self.stranger.connects(address, timeout=0.1)
            return self.stranger.run("ip", "neigh").stdout.count("lladdr") >= len(self.addresses)
        wait_for(answers, "the machine's network does not come up", PATIENCE)

    def say(self, text):
        print(f"\n[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def on_laptop(self, line, code=(0,), said="", quiet=False):
        """What `me` types on the laptop -> what it prints."""
        done = self.laptop.shell(line, check=False, timeout=PATIENCE)
        return self.look("me@laptop", line, done, code, said, quiet)

    def on_box(self, line, code=(0,), said="", user="me", quiet=False):
        """What is typed on the machine, through the session that stays -> what it prints."""
        words = "ssh", f"{user}@session", line
        done = self.laptop.run(*words, user="me", check=False, timeout=PATIENCE)
        return self.look(f"{user}@box", line, done, code, said, quiet)

    def look(self, where, line, done, code, said, quiet):
        text = done.stdout + done.stderr
        if not quiet:
            self.typed += 1
            lines = text.splitlines()
            most = f"... {len(lines) - 20} lines ..."
            shown = lines if len(lines) <= 40 else [*lines[:10], most, *lines[-10:]]
            print(f"{where}$ {line}", *(f"  {line}" for line in shown), sep="\n", flush=True)
        fault = f"{line!r}: exit status {done.returncode}, not {code}, or without {said!r}:\n{text}"
        assert done.returncode in code and said in text, fault
        return text

    def knock(self, *words, said="opened tcp/22"):
        """Knock until there is an answer, as people do: a slow machine may not be up yet, or give
        its gpg more time than the server allows."""
        words = "tariq.py", "knock", "box.example.com", *(words or ("O", "22"))
        def answered():
            return said in self.on_laptop(shlex.join(words), code=(0, 75))
        wait_for(answered, "no knock is answered", PATIENCE)

    def close(self):
        """Close the laptop's doors; of two families one knock may have reached one."""
        for family in "-4", "-6":
            self.knock(family, "C", "22", said="tcp/22")

    def log_in(self):
        """A connection of its own, which has to come through a door where the machine hides."""
        self.on_laptop("ssh me@box.example.com hostname", said="box")

    def hidden(self):
        """Neither a stranger nor the laptop, whose door is shut, gets an answer."""
        def gets_in(host, address):
            return host.connects(address, timeout=3)
        with ThreadPoolExecutor() as pool:  # each waits
            ways = itertools.product((self.stranger, self.laptop), self.addresses)
            assert not any(pool.map(gets_in, *zip(*ways))), "somebody gets in without a knock"
        assert self.session() == self.kept, "the log-in that was there is cut"
        print("(hidden: neither a stranger nor the laptop gets an answer from port 22)", flush=True)

    def service(self):
        """What systemd says of the service: {name: value}."""
        text = self.on_box("systemctl show -p ActiveState -p MainPID tariq", quiet=True)
        return dict(line.split("=") for line in text.splitlines())

    def recovers(self, pid):
        """Wait until another process than this one is the monitor, and ready."""
        def ready():
            now = self.service()
            return now["ActiveState"] == "active" and now["MainPID"] not in ("0", pid)
        wait_for(ready, "systemd does not bring the service back", PATIENCE)

    def set_up(self):
        self.say(f"A fresh {self.release}, which its provider gave to root and to `me`, who may "
                 "sudo.")
        self.boots()
        self.on_box("useradd --create-home --shell /bin/bash me; cp -r .ssh ~me/; chown -R me: ~me;"
                    "echo 'me ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/me", user="root", quiet=True)
        self.clone("tariq")
        self.on_box("true", quiet=True)  # begins it
        self.kept = self.session()

    def clone(self, name, change=""):
        """A copied clone on the machine."""
        copy = self.lab.dir / name
        copy.mkdir(mode=0o755)
        for path in TARIQ, HERE / "tariq.conf.example", HERE / "README.md":
            shutil.copy(path, copy)
        with open(copy / TARIQ.name, "a") as file:
            file.write(change)
        self.on_laptop(f"scp -qr {copy} me@box.example.com:", quiet=True)

    def init(self):
        self.say("init names what is missing, touches nothing, and then does all of it.")
        line = f"cd tariq && {readme('1. On the server: init')}"
        said = self.on_box(line, code=(69,), said="apt-get install")
        self.gone()
        self.on_box("sudo apt-get update")
        self.on_box("sudo " + re.search(r"apt-get install [^\n'`\"]*", said)[0])
        self.on_box(line, said="enroll")
        assert self.service()["ActiveState"] == "active"
        assert "python" not in self.on_box("sudo ss -Hlntup", quiet=True), "Tariq listens"

    def gone(self):
        """Nothing of Tariq is there, or not yet."""
        for pattern in "/etc/tariq", "/usr/local/bin/tariq*", "/etc/systemd/system/*tariq*":
            self.on_box(f"ls -d {pattern}", code=(2,), quiet=True)
        self.on_box("id tariq", code=(1,), quiet=True)

    def enroll(self):
        self.say("A client: key, enrolment and profile in one line.")
        self.on_laptop(readme("2. On the client: keygen, enroll, join", 1))

    def hide(self):
        self.say("hide: nothing changes for good until somebody has come in through a door.")
        assert self.stranger.connects(self.addresses[0], timeout=PATIENCE)
        said = ""
        while "hidden for good" not in said:  # a slow machine may need more than its two minutes
            said = self.try_to_hide()
        self.say(f"That was the first hour: {self.typed} lines typed.")
        said = self.on_box("sudo tariq.py check",
                           said="Reached without a knock: no port that listens.")
        assert "The clock is not synchronised" in said, "it has no way out to set it by"
        assert not self.stranger.connects(self.addresses[0], timeout=3)
        self.close()
        self.hidden()
        self.on_box("systemd-analyze security --no-pager tariq | tail -n 1")

    def try_to_hide(self):
        path, line = self.lab.new("hide"), readme("3. On the server: hide")
        with open(path, "w") as file:
            words = "ssh", "-tt", "me@session", line
            process = self.laptop.popen(*words, user="me", stdin=PIPE, stdout=file, stderr=file)
        def hides():
            return "another terminal" in path.read_text() or process.poll() is not None
        wait_for(hides, "hide says nothing", PATIENCE)
        assert not self.stranger.connects(self.addresses[0], timeout=3)
        self.on_laptop(readme("4. On the client: the first knock"), code=(0, 75))
        self.log_in()
        code = process.wait(PATIENCE)
        done = SimpleNamespace(stdout=path.read_text(), stderr="", returncode=code)
        return self.look("me@box", line, done, (0, 75), "", False)

    def reboot(self):
        self.say("A reboot with a door open: the machine comes up hidden, the door shut.")
        self.knock()
        self.log_in()
        self.on_box("sudo systemctl reboot", quiet=True, code=(0, 255))
        self.session("exit")  # it would wait for the machine that is gone
        self.boots(2)
        self.kept = self.session()  # none
        self.hidden()
        self.knock()
        self.log_in()
        self.on_box("true", quiet=True)  # begins it
        self.kept = self.session()
        self.on_box("sudo iptables -S INPUT; sudo ip6tables -S INPUT", said="-j tariq-hide")

    def session(self, command="check"):
        """What ssh says of the log-in that stays, with its process's number."""
        words = "ssh", "-O", command, "me@session"
        return self.laptop.run(*words, user="me", check=False).stderr

    def broken_config(self):
        self.say("A typo in the config: a restart fails aloud, check says why, all stays hidden.")
        self.on_box(r"sudo sed -i 's/^\[server\]/&\nopen_timout = 60/' /etc/tariq/tariq.conf")
        self.on_box("sudo tariq.py check", code=(78,), said="open_timout")
        self.on_box("sudo systemctl restart tariq", code=(1,))
        self.on_box("sudo journalctl --no-pager -o cat -n 20 -u tariq", said="open_timout")
        assert not self.stranger.connects(self.addresses[0], timeout=3)
        self.on_box("sudo sed -i /open_timout/d /etc/tariq/tariq.conf")
        self.on_box("sudo systemctl restart tariq")
        self.hidden()
        self.knock()
        self.log_in()

    def full_disk(self):
        self.say("A full disk, under the keyring, too: knocks and a restart go on.")
        most = "$(($(df --output=avail -B1M / | tail -n 1) - 64))M"
        for line in (f"sudo fallocate -l {most} /full; sudo dd if=/dev/zero of=/rest bs=4k",
                     "echo | sudo -u tariq tee /etc/tariq/.server-gpg/more"):
            self.on_box(line, code=(1,), said="No space left")
        self.close()
        self.hidden()
        self.knock()
        self.log_in()
        self.on_box("sudo systemctl restart tariq")
        self.hidden()
        self.knock()
        self.log_in()
        self.on_box("sudo rm /full /rest /etc/tariq/.server-gpg/more")

    def killed(self):
        for which in "monitor", "listener":
            self.say(f"kill -9 of the {which}: systemd brings all of it back, hidden.")
            pid = self.service()["MainPID"]
            target = pid if which == "monitor" else f"$(pgrep -u tariq -f -- '- listener')"
            self.on_box(f"sudo kill -9 {target}")
            self.recovers(pid)
            self.hidden()
            self.knock()
            self.log_in()

    def upgrade(self):
        self.say("init again, from a newer clone, is the upgrade: config and keys stay.")
        before = self.on_box("sudo sha256sum /etc/tariq/tariq.conf", quiet=True)
        pid = self.service()["MainPID"]
        self.clone("newer", "# a newer version\n")
        self.on_box(f"cd newer && {readme('An upgrade').partition('&& ')[2]}")  # not its git pull
        self.recovers(pid)
        assert before == self.on_box("sudo sha256sum /etc/tariq/tariq.conf", quiet=True)
        newer = (self.lab.dir / "newer/tariq.py").read_bytes()
        self.on_box("tariq.py --version", said=hashlib.sha256(newer).hexdigest())
        self.hidden()
        self.knock()
        self.log_in()

    def uninstall(self):
        self.say("Uninstalled: nothing of it stays, and the machine can be reached as before.")
        for line in readme("Uninstalling").splitlines():
            self.on_box(line)
        for program in "iptables", "ip6tables":
            assert "tariq" not in self.on_box(f"sudo {program} -S", quiet=True)
        self.gone()
        assert self.stranger.connects(self.addresses[0], timeout=PATIENCE)

def machine(release="trixie"):
    """The README's first hour on a fresh Debian, and what goes wrong later, typed over ssh."""
    if release not in RELEASES:
        sys.exit(f"the machine is one of {', '.join(RELEASES)}")
    if os.geteuid():
        sys.exit("the machine hangs on network namespaces: sudo ./test_tariq.py machine")
    needs = {"qemu-system-x86_64": "qemu-system-x86", "debootstrap": "debootstrap",
             "mkfs.ext4": "e2fsprogs"}
    missing = [package for program, package in needs.items() if not shutil.which(program)]
    if missing:
        sys.exit(f"not installed: apt-get install --no-install-recommends {' '.join(missing)}")
    with Lab() as lab:
        hour = FirstHour(lab, release)
        try:
            for step in (hour.set_up, hour.init, hour.enroll, hour.hide, hour.reboot,
                         hour.broken_config, hour.full_disk, hour.killed, hour.upgrade,
                         hour.uninstall):
                step()
            hour.say("All of it went as it should. The machine is removed.")
        except Exception:
            print(f"\nthe machine's console:\n{hour.guest.last_words()}", flush=True)
            raise

# ---- the benchmarks ------------------------------------------------------------------------------

SECOND = "476c5ac"  # the second design's last commit: `bench latency` measures it, too
RATIOS = {"kernel": 0.55, "udp": 0.5, "crafted": 1.2}  # wanted, to fwknop with GPG in the same run
GIVE_UP = 5  # seconds without an open port
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

def quantile(values, part):
    """The value below which so many hundredths lie."""
    return statistics.quantiles([*values] * 2, n=100, method="inclusive")[part - 1]  # it needs two

def milliseconds(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    return (time.perf_counter() - began) * 1e3

def cost_of(host, *argv, user=NOBODY):
    """A program's time in ms, less that of a program that does nothing."""
    def run(*words):
        return milliseconds(lambda: host.run(*words, user=user))
    return run(*argv) - run("true")

def server_beside(world, name, program=None):
    """Another server on the world's host, by another tariq.py if need be, with a directory, a
    chain, ports, keyring and client of its own -> a world to knock in. It does not run yet."""
    lab = copy.copy(world.lab)
    lab.dir = world.lab.dir / name
    lab.dir.mkdir(mode=0o755)
    if program:
        program = program.replace("#!/usr/bin/python3", f"#!{sys.executable}", 1)
        write(lab.dir / "tariq.py", program, mode=0o755)
    else:
        lab.program(path=lab.dir / "tariq.py")
    another = SimpleNamespace(**{**vars(world), "lab": lab, "tariq": None})
    another.conf = make_server(lab, world.server, iptables_chain=name)
    another.ring = another.conf.parent / ".server-gpg"
    another.me = second_client(another, "client", ALLOW, user="me@laptop")
    ports = config_values(another.me, "box")["secret_ports"]
    another.ports = [int(port) for port in ports.split(",")]
    return another

def print_row(names, cells):
    """A table's row: each cell at least as wide as its column's name."""
    cells = zip(names, cells)
    print(*(f"{cell:>{max(len(name), 8)}}" for name, cell in cells), flush=True)

def second_design():
    """The text of the second design's tariq.py, or None where the repository is not there."""
    words = "git", "-c", f"safe.directory={HERE}", "-C", HERE, "show", f"{SECOND}:tariq.py"
    done = sh(*words, check=False) if shutil.which("git") else None
    return done.stdout if done and not done.returncode else None

# == latency: from the command's start to the open port, beside other tools ==

def start_fwknop(world, kind, port):
    """fwknop as its manual sets it up, defaults where there are any (it looks for packets each 0.1
    s); kind: gpg or rijndael -> (command, close). Each kind has its own daemon, so that neither
    tries the other's keys."""
    directory, chain = world.lab.dir / f"fwknop-{kind}", f"FWKNOP_{kind.upper()}"
    directory.mkdir(mode=0o711)
    hmac_key, key = (base64.b64encode(os.urandom(size)).decode() for size in (64, 32))
    # Rules that expire in the run would have the daemon list them while others are measured.
    access = (f"SOURCE ANY\nREQUIRE_SOURCE_ADDRESS Y\nHMAC_KEY_BASE64 {hmac_key}\n"
              "MAX_FW_TIMEOUT 3600\nFW_ACCESS_TIMEOUT 3600\n")
    profile = (f"[box]\nACCESS tcp/22\nALLOW_IP {world.client.ip}\nSPA_SERVER {world.server.ip}\n"
               f"SPA_SERVER_PORT {port}\nUSE_HMAC Y\nHMAC_KEY_BASE64 {hmac_key}\n")
    if kind == "gpg":
        homes = directory / "server", directory / "client"
        for home, owner in zip(homes, (0, NOBODY)):
            sh("install", "-d", "-m", "700", "-o", owner, "-g", owner, home)
        # it takes no newer kind
        own, user = (generate(home, f"{home.name}@bench", "rsa2048") for home in homes)
        for home, other, other_key in (*homes, user), (*homes[::-1], own):
            gpg(home, "--import", input=gpg(other, "--armor", "--export", other_key).stdout)
            gpg(home, "--import-ownertrust", input=f"{other_key}:6:\n")
        access += (f"GPG_HOME_DIR {homes[0]}\nGPG_DECRYPT_ID {own[-8:]}\nGPG_ALLOW_NO_PW "
                   f"Y\nGPG_REQUIRE_SIG Y\n"
                   f"GPG_REMOTE_ID {user[-8:]}\n")
        profile += (f"USE_GPG Y\nGPG_HOMEDIR {homes[1]}\nGPG_RECIPIENT {own[-8:]}\nGPG_SIGNER "
                    f"{user[-8:]}\n"
                    "GPG_NO_SIGNING_PW Y\n")
    else:
        access, profile = f"{access}KEY_BASE64 {key}\n", f"{profile}KEY_BASE64 {key}\n"
    settings = (f"PCAP_INTF eth0;\nENABLE_PCAP_PROMISC N;\nPCAP_FILTER udp port "
                f"{port};\nFWKNOP_RUN_DIR {directory};\n"
                f"IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, {chain}, 1;\n")
    words = write(directory / "fwknopd.conf", settings), "-a", \
        write(directory / "access.conf", access)
    world.server.popen("fwknopd", "-f", "-c", *words, stdout=DEVNULL, stderr=DEVNULL, stdin=DEVNULL)
    command = ["fwknop", "--rc-file", write(directory / "fwknoprc", profile, NOBODY),
               "--no-save-args", "-n", "box"]
    return command, lambda: world.server.run("iptables", "-F", chain)

def start_knockd(world):
    """knockd with the example its package brings, on a chain of its own -> (command, close)."""
    server = world.server
    path = write(world.lab.dir / "knockd.conf",
                 "[options]\n  logfile = /dev/null\n[open]\n  sequence = 7000,8000,9000\n  "
                 "seq_timeout = 5\n"
                 "  tcpflags = syn\n  command = /sbin/iptables -A KNOCKD -s %IP% -p tcp --dport "
                 "22 -j ACCEPT\n")
    for words in "-N KNOCKD", "-A INPUT -j KNOCKD":
        server.run("iptables", *words.split())
    words = "knockd", "-i", "eth0", "-c", path, "-p", world.lab.dir / "knockd.pid"
    server.popen(*words, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    return ["knock", server.ip, "7000", "8000", "9000"], \
        lambda: server.run("iptables", "-F", "KNOCKD")

def knock_tools(world, name):
    """{name of the tool: (its command, what shuts its door)} of a Tariq, each transport."""
    def close():  # by a knock: a flush would leave the server with doors it believes open
        opens(world, "C", "22", transport="kernel")
    return {f"{name}, {kind}": (knock_words(world, transport=kind), close) for kind in RATIOS}

def measure_tools(world, tools, rounds):
    """{name: [ms from the command's start to the first TCP connect]}, every tool in each round."""
    times = {tool: [] for tool in tools}
    for number in range(rounds + 1):  # the first warms up: gpg-agents start, files are cached
        for tool, (command, shut) in tools.items():
            # setpriv's millisecond is in all the figures. Only crafted needs root.
            user = as_user(0 if "crafted" in tool else NOBODY)
            took = world.client.inside(probe, world.server.ip, [*user, *map(str, command)])
            shut()
            times[tool] += [took] if number else []
            time.sleep(0.05 + random.random() / 10)  # no tool meets a server's polling in one phase
    return times

def bench_latency(rounds=20):
    """Time from command start to the first TCP connect, every tool in each round, doors shut in
    between."""
    with Lab() as lab:
        world = new_world(lab)
        started(world)
        worlds, tools = {"tariq": world}, knock_tools(world, "tariq")
        if old := second_design():
            worlds["second design"] = server_beside(world, "second", old)
            started(worlds["second design"])
            tools |= knock_tools(worlds["second design"], "second design")
        else:
            print(f"the second design: left out: no git repository with {SECOND} around this file")
        for tool, program, start, \
            *how in (("fwknop, GPG + HMAC", "fwknopd", start_fwknop, "gpg", 62201),
                                           ("fwknop, Rijndael + HMAC", "fwknopd", start_fwknop,
                                            "rijndael", 62202),
                                           ("knockd, no cryptography", "knockd", start_knockd)):
            if shutil.which(program):
                tools[tool] = start(world, *how)
            else:
                print(f"{tool}: not installed")
        time.sleep(1)  # the daemons start
        times = measure_tools(world, tools, rounds)
        parts = measure_parts(worlds)
    show_latencies(times, rounds)
    print("\nwhat a knock by kernel consists of, medians in ms; each part set in is by itself")
    print(" " * 36 + "".join(f"{name:>15}" for name in worlds))
    for part, *figures in parts:
        print(f"  {part:34}" + "".join(f"{figure:15.1f}" for figure in figures))

def show_latencies(times, rounds):
    medians = {tool: statistics.median(took) for tool, took in times.items()}
    names = "median", "min", "p90", "to fwknop GPG", "wanted", "to the second design"
    print(f"\nms from command start to the first TCP connect, {rounds} rounds; beside each command "
          "a prober sends SYNs")
    print(f"{'tool':24}", end="")
    print_row(names, names)
    for tool, took in times.items():
        name, _, kind = tool.partition(", ")
        ratios = [f"{medians[tool] / medians[base]:.2f}" if base in medians else ""
                  for base in ("fwknop, GPG + HMAC", f"second design, {kind}")]
        figures = [f"{value:.1f}" for value in (medians[tool], min(took), quantile(took, 90))]
        wanted = RATIOS[kind] if name == "tariq" else ""
        print(f"{tool:24}", end="")
        print_row(names, [*figures, ratios[0], wanted, ratios[1] if name == "tariq" else ""])

STEPS = ("client: until its first packet", "server: until its challenge",
         "client: until its answer", "server: until its result", "client: until its exit")

def measure_parts(worlds, rounds=15):
    """[(part, median in ms in each of the worlds)]: a knock's steps, by its packets as the client's
    interface sees them, and what they consist of, each part by itself; all of it in each round."""
    functions = [knock_parts(world) for world in worlds.values()]
    times = collections.defaultdict(list)
    for _ in range(rounds):
        for place, world in enumerate(worlds.values()):
            for step, took in zip(STEPS, steps_of_a_knock(world)):
                times[place, step].append(took)
                for part, function in functions[place].get(step, {}).items():
                    times[place, f"    {part}"].append(function())
    rows = []
    for step in STEPS:
        names = [step, *(f"    {part}" for part in functions[0].get(step, {}))]
        rows += [(name, *(statistics.median(times[place, name]) for place in range(len(worlds))))
                 for name in names]
    return rows

def knock_parts(world):
    """{step: {part of it: what measures that part in ms}}"""
    peer, host, program = Peer(world).seal(), world.server, world.lab.dir / "tariq.py"
    sealed, text, png = world.lab.dir / "sealed", program.read_text(), make_png(b"x")
    sealed.write_bytes(peer.sealed)
    seal = [*"gpg -qo /dev/null --batch --yes --trust-model always --compress-algo none".split(),
            "--homedir", peer.home, "-R", peer.to, "-u", f"<{peer.user}>", "-se", sealed]
    iptables, rule = ("iptables", "-w", "5"), "-s 192.0.2.9 -p tcp --dport 22 -j ACCEPT".split()
    return {
        STEPS[0]: {
            "interpreter": lambda: cost_of(host, sys.executable, "-I", "-c", "pass"),
            "imports": lambda: import_time(world),
            "compiling tariq.py": lambda: milliseconds(compile, text, "tariq.py", "exec"),
            "gpg, seal": lambda: cost_of(host, *seal)},
        STEPS[1]: {
            "gpg, unseal": lambda: unseal_cost(world, sealed),
            "PNG, by Pillow": lambda: milliseconds(read_png, png),
            "a reply, by scapy": lambda: milliseconds(scapy_reply)},
        STEPS[3]: {
            "iptables, a look": lambda: cost_of(host, *iptables, "-S", "INPUT", user=0),
            "iptables, a rule": lambda: cost_of(host, *iptables, "-A", "tariq", *rule, user=0)}}

def steps_of_a_knock(world):
    """ms from the client's start to its first fragment, to the challenge, to its answer, to the
    result, to its exit: what it says by then is on its way to the user."""
    command = world.client.command(knock_words(world, transport="kernel"), NOBODY)
    with captured(world.client) as packets:
        began = time.time()
        done = sh(*command)
        ended = time.time()
    opens(world, "C", "22", transport="kernel")
    assert done.stdout.startswith("opened")
    times, outgoing = [began], True
    for packet in packets:  # the first of each kind; fragments go out together
        ports = packet.source, packet.port
        if packet.payload and packet.outgoing == outgoing and {*ports} & {*world.ports} \
                and (len(times) == 1 or world.ports[-1] in ports):
            if len(times) == 3 and packet.flags & 2:
                continue  # a repeat of the knock is no answer
            times.append(packet.time)
            outgoing = not outgoing
    assert len(times) >= 5, "a packet of the exchange was not captured"
    times = [*times[:5], ended]
    return [(then - now) * 1e3 for now, then in zip(times, times[1:])]

def import_time(world):
    """ms of a knock's imports, by -X importtime: all behind `site`, the interpreter's own."""
    program, *words = knock_words(world, "C", "22", transport="kernel")
    command = sys.executable, "-I", "-X", "importtime", program, *words
    said = world.client.run(*command, user=NOBODY).stderr
    rows = re.findall(r"(?m)^import time: +(\d+) \|.*\| +(\S+)$", said)
    own = [name for _, name in rows].index("site")
    return sum(int(microseconds) for microseconds, _ in rows[own + 1:]) / 1e3

def unseal_cost(world, sealed):
    """ms that the server's gpg takes for a message, as its owner."""
    key = config_values(world.conf, "server")["server_key"]
    owner = os.stat(world.ring).st_uid
    words = "gpg --batch --no-tty --quiet --no-options --no-auto-check-trustdb --trust-model always"
    return cost_of(world.server, *words.split(), "--homedir", world.ring, "-o", "/dev/null",
                   "--yes", "--try-secret-key", key, "--decrypt", sealed, user=owner)

def read_png(png):
    from PIL import Image
    return Image.open(io.BytesIO(png)).tobytes()

def scapy_reply():
    from scapy.layers.inet import IP, TCP
    return bytes(IP(src="192.0.2.1", dst="192.0.2.2") / TCP(flags="SA") / bytes(100))

def probe(address, command):
    """In the client's namespace: ms from a command's start to the first connect, started here, so
    that `ip netns exec` is not measured. A knock that fails ends the benchmark: its figure would
    mean nothing."""
    def is_open():
        """Try to connect for 1 ms, with a new socket: a SYN that meets a shut door is dropped in
        silence, and the kernel's own repetition of it would come a second later. The door needs no
        more than 0.1 ms in the lab."""
        with socket.socket() as sock:
            # leave nothing behind
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.setblocking(False)
            sock.connect_ex((address, 22))
            return select.select([], [sock], [], 0.001)[1] \
                and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    assert not is_open(), "the door is open before the knock"
    began, opened = time.perf_counter(), False
    process = subprocess.Popen(command, stdin=DEVNULL, stdout=PIPE,
                               stderr=subprocess.STDOUT, text=True)
    while not opened and time.perf_counter() < began + GIVE_UP:
        opened = is_open()
    took, said = (time.perf_counter() - began) * 1e3, process.communicate()[0]
    assert opened and process.returncode == 0, \
        f"{command}: exit {process.returncode}, {took:.0f} ms: {said}"
    return took

# == clients: a knock beside so many others who are enrolled ==

def bench_clients(*counts, rounds=20):
    """A knock's time where so many clients are enrolled: a server each, on one host, each in each
    round. The client that knocks is the last in the keyring: gpg finds it last."""
    if not importlib.util.find_spec("cryptography"):
        sys.exit("makes the clients' keys with cryptography: apt-get install python3-cryptography")
    counts = counts or (1, 100, 1_000, 10_000)
    with Lab() as lab:
        world = new_world(lab)
        print(f"making {max(counts) - 1} keys", flush=True)
        keys = forged_keys(lab, max(counts) - 1)
        worlds = {count: server_beside(world, f"clients-{count}") for count in counts}
        for count, crowded in worlds.items():
            crowd(crowded, keys[:count - 1])
            started(crowded)
        tools = {count: knock_tools(crowded, "")[", kernel"] for count, crowded in worlds.items()}
        times = measure_tools(world, {str(count): tool for count, tool in tools.items()}, rounds)
        names = ("clients", "median", "min", "p90", "to the first", "gpg, unseal", "after an edit",
                 "enrol one", "start", "monitor, MB")
        print(f"\n{rounds} rounds, by kernel; ms from command start to the first TCP connect")
        print_row(names, names)
        base = statistics.median(times[str(counts[0])])
        for count, crowded in worlds.items():
            took = times[str(count)]
            median, memory = statistics.median(took), rss(crowded.tariq.process.pid)
            figures = (median, min(took), quantile(took, 90), crowded_unseal(crowded),
                       after_an_edit(crowded), enrolling(crowded), restart(crowded), memory)
            cells = [f"{figure:.1f}" for figure in figures]
            print_row(names, [count, *cells[:3], f"{median / base:.2f}", *cells[3:]])
        print("to the first: 1.3 at most is wanted; gpg, unseal: the server's gpg, by itself;\n"
              "after an edit: by how much the first knock is longer, as the policy is read anew;\n"
              "enrol one: `enroll` of a new key; start: from the server's start to its listening")

def crowded_unseal(world, rounds=15):
    """The median of gpg's time for a knock in ms."""
    sealed = world.lab.dir / "sealed"
    sealed.write_bytes(Peer(world).seal().sealed)
    return statistics.median(unseal_cost(world, sealed) for _ in range(rounds))

def after_an_edit(world, rounds=5):
    """By how many ms a knock is longer that is the first after an edit of the config."""
    took = [], []
    for number in range(2 * rounds):
        if number % 2:
            edit(world.conf, ("[server]", f"# edit {number}\n[server]"))
        took[number % 2].append(milliseconds(lambda: opens(world, "O", "22", transport="kernel")))
    return statistics.median(took[1]) - statistics.median(took[0])

def enrolling(world, rounds=3):
    """The median time of `enroll` in ms."""
    keys = [public_key(f"late{number}@example.com")[1] for number in range(rounds)]
    took = [milliseconds(lambda key=key: world.lab.tariq(world.server, "enroll", "-c", world.conf,
                                                         input=key, text=False)) for key in keys]
    return statistics.median(took)

def restart(world):
    """ms from a server's start to its listening."""
    world.tariq.stop()
    return milliseconds(started, world)

def crowd(world, keys):
    """Put more clients, (fingerprint, keybox blob) each, into a server's keyring and config: in the
    keyring between the server's key, which init made first, and the client that knocks."""
    keybox = world.ring / "pubring.kbx"
    head, own, *clients = blobs_of(keybox.read_bytes())
    keybox.write_bytes(b"".join([head, own, *(blob for _, blob in keys), *clients]))
    with open(world.conf, "a") as config:
        for number, (key, _) in enumerate(keys):
            config.write(f"\n[allow client{number}@example.com]\nkey = {key}\n"
                         "may =\n    O 22/tcp\n    C 22/tcp\n")
    listing = gpg(world.ring, "--with-colons", "--list-keys").stdout
    assert len(re.findall("(?m)^pub:", listing)) == len(keys) + 2  # the server's, the client's

def blobs_of(keybox):
    """The blobs of a keybox file (GnuPG kbx/keybox-blob.c): a header, then one a key. Each begins
    with its length."""
    blobs = []
    while keybox:
        size = int.from_bytes(keybox[:4], "big")
        blobs.append(keybox[:size])
        keybox = keybox[size:]
    return blobs

IMPORT_AT_ONCE = 100  # keys: for each that it imports, gpg copies the keyring first

def forged_keys(lab, count):
    """[(fingerprint, the keybox blob that gpg itself made of it)] of so many clients' keys."""
    made = [public_key(f"client{number}@example.com") for number in range(count)]
    def imported(start):
        home = lab.new("import")
        home.mkdir(mode=0o700)
        keys = b"".join(key for _, key in made[start:start + IMPORT_AT_ONCE])
        gpg(home, "--no-autostart", "--no-auto-check-trustdb", "--import", input=keys, text=False)
        return blobs_of((home / "pubring.kbx").read_bytes())[1:]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blobs = [*itertools.chain(*pool.map(imported, range(0, count, IMPORT_AT_ONCE)))]
    assert len(blobs) == count
    return [(key, blob) for (key, _), blob in zip(made, blobs)]

def public_key(user):
    """A transferable public key (RFC 4880, 6637; the curves as GnuPG writes them): Ed25519 to sign,
    Curve25519 to encrypt, one user id, both signatures right -> (fingerprint, bytes). gpg itself
    would take 100 times as long to make one."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    def number(value):  # a multiprecision integer
        value = value.lstrip(b"\0")
        return struct.pack(">H", len(value) * 8 - 8 + value[0].bit_length()) + value
    def packet(tag, body):
        size = len(body)  # up to 8383 bytes
        length = bytes([size]) if size < 192 else struct.pack(">H", size - 192 + (192 << 8))
        return bytes([0xC0 | tag]) + length + body
    def sub(kind, value):
        return bytes([len(value) + 1, kind]) + value
    def to_hash(body):
        return b"\x99" + struct.pack(">H", len(body)) + body
    def signature(kind, flags, signed, more=b""):
        hashed = sub(2, made) + sub(33, b"\4" + key) + sub(27, flags) + more
        head = bytes([4, kind, 22, 8]) + struct.pack(">H", len(hashed)) + hashed  # EdDSA, SHA-256
        digest = hashlib.sha256(signed + head + b"\4\xff" + struct.pack(">I", len(head))).digest()
        r_and_s, issuer = private.sign(digest), sub(16, key[-8:])
        return packet(2, head + struct.pack(">H", len(issuer)) + issuer + digest[:2]
                      + number(r_and_s[:32]) + number(r_and_s[32:]))
    private, made = Ed25519PrivateKey.generate(), struct.pack(">I", int(time.time()) - 60)
    point = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    # Version 4; algorithm and the curve's object identifier; a point, compressed.
    own = b"\4" + made + bytes.fromhex("16092b06010401da470f01") + number(b"\x40" + point)
    other = (b"\4" + made + bytes.fromhex("120a2b060104019755010501")
             + number(b"\x40" + os.urandom(32)) + b"\3\1\x08\7")  # any 32 bytes; how to derive keys
    key, name = hashlib.sha1(to_hash(own)).digest(), user.encode()
    preferred = sub(11, b"\x09\x08\x07") + sub(21, b"\x0a\x09\x08") + sub(30, b"\1")
    certified = to_hash(own) + b"\xb4" + struct.pack(">I", len(name)) + name
    return key.hex().upper(), b"".join((
        packet(6, own), packet(13, name), signature(0x13, b"\3", certified, preferred),
        packet(14, other), signature(0x18, b"\x0c", to_hash(own) + to_hash(other))))

# == load: knocks that are sealed beforehand, as many as the server finishes ==

ADDRESSES = [f"198.51.100.{number}" for number in range(40, 240)]  # from which they come
DOOR_PORTS = 22, 53, 8022, 9022  # doors an address may have: each knock is to open one of its own
UNDER_WAY = 12  # knocks at once: the server takes up to 16 unanswered ones of an address
REPEAT = 1.0  # seconds after which a knock is sent again

class Prepared(Peer):
    """A knock that is sealed beforehand, from one of the client's addresses, whose socket waits
    for nothing."""

    def __init__(self, world, conf, address, port):
        super().__init__(world, "O", f"{port}/tcp", conf=conf)
        self.socket.bind((address, 0))
        self.socket.setblocking(False)
        self.began = self.sent = self.ended = None
        self.result, self.repeats = None, -1

    def begin(self, now):
        self.began, self.sent, self.repeats = self.began or now, now, self.repeats + 1
        self.send(self.frames())

    def go_on(self):
        """Take what has come."""
        with suppress(BlockingIOError):
            payload = self.socket.recv(2048)
            result = open_frame(self.reply_key, b"result", payload)
            challenge = open_frame(self.reply_key, b"challenge", payload)
            if challenge:
                self.answer(challenge[:32])
            elif result and not self.ended:
                self.result, self.ended = result, time.monotonic()

def prepare(world, clients, count):
    """So many knocks, sealed, of all the clients in turn, each for a door of its own."""
    doors = itertools.islice(itertools.product(DOOR_PORTS, ADDRESSES), count)
    knocks = [Prepared(world, conf, address, port)
              for conf, (port, address) in zip(itertools.cycle(clients), doors)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [*pool.map(Prepared.seal, knocks)]

def knocks_world(lab, clients=8):
    """A world whose client host has many addresses, with so many enrolled clients -> (world, their
    configs)."""
    world = new_world(lab)
    for address in ADDRESSES:
        world.client.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    allow = "O " + " ".join(map(str, DOOR_PORTS)),
    return world, [second_client(world, f"client{number}", allow) for number in range(clients)]

def send_knocks(knocks, rate=None, patience=10.0, repeats=True):
    """Send knocks, at a rate or as they are finished, UNDER_WAY at once; returns when all are, or
    after patience seconds without a result."""
    waiting, under_way, poll = collections.deque(knocks), {}, select.poll()
    began = last = time.monotonic()
    while (waiting or under_way) and (now := time.monotonic()) - last < patience:
        if rate:
            due = int((now - began) * rate) + 1 - (len(knocks) - len(waiting))
        else:
            due = UNDER_WAY - len(under_way)
        for _ in range(min(due, len(waiting))):
            knock = waiting.popleft()
            under_way[knock.socket.fileno()] = knock
            poll.register(knock.socket, select.POLLIN)
            knock.begin(now)
            last = now
        for number, _ in poll.poll(2 if rate else 100):  # ms
            knock = under_way[number]
            knock.go_on()
            if knock.ended:
                last = knock.ended
                poll.unregister(number)
                del under_way[number]
        for knock in under_way.values():
            if repeats and now - knock.sent > REPEAT:
                knock.begin(now)

def cpu_seconds(world):
    """Seconds of CPU since the start of each: the server's parts, this process; and what the
    machine had left."""
    def spent(pid):  # its own, and that of its children that have ended
        ticks = [*map(int, proc(pid, "stat").rpartition(")")[2].split()[11:15])]
        return sum(ticks[:2]) / CLOCK_TICKS, sum(ticks[2:]) / CLOCK_TICKS
    monitor, firewall = spent(world.tariq.process.pid)
    listener, unseal = spent(world.tariq.listener)
    agent, _ = spent(agent_of(world.ring))
    all_of_it = [*map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])]
    return collections.Counter({
        "gpg": unseal, "gpg-agent": agent, "listener": listener, "monitor": monitor,
        "firewall": firewall, "sender": time.process_time(),
        "left": (all_of_it[3] + all_of_it[4]) / CLOCK_TICKS,  # idle, and waiting for a disk
        "machine": sum(all_of_it) / CLOCK_TICKS, "time": time.monotonic()})

def bench_load(count=800, clients=8):
    """Authentic knocks a second that the server alone finishes: clients' gpg ran beforehand."""
    with Lab() as lab:
        world, configs = knocks_world(lab, clients)
        started(world)
        Prepared(world, configs[0], world.client.ip, DOOR_PORTS[0]).knock()  # the warm-up
        knocks = prepare(world, configs, count)
        pids = world.tariq.listener, world.tariq.process.pid
        before, memory = cpu_seconds(world), [rss(pid) for pid in pids]
        send_knocks(knocks)
        spent = cpu_seconds(world)
        spent.subtract(before)
        after = [rss(pid) for pid in pids]
    print(f"\n{count} knocks of {clients} clients, sealed beforehand, each for a door of its own, "
          f"{UNDER_WAY} at once")
    done = show_load(knocks)
    show_cpu(spent, done)
    print("  memory, MB: " + ", ".join(
        f"{name} {start:.1f} -> {end:.1f}"
        for name, start, end in zip(("listener", "monitor"), memory, after)))

def show_load(knocks):
    """Print how many were finished, and how fast; returns how many."""
    done = [knock for knock in knocks if knock.ended]
    refused = sum(not knock.result[0] for knock in done)
    took = [(knock.ended - knock.began) * 1e3 for knock in done] or [0]
    first = knocks[0].began
    lasted = max((knock.ended - first for knock in done), default=1)
    print(f"{len(done)} finished in {lasted:.1f} s: {len(done) / lasted:.1f} a second (wanted: 40);"
          f" {refused} refused; {sum(knock.repeats for knock in knocks)} sent again")
    print(f"  a knock: {statistics.median(took):.0f} ms (median), {max(took):.0f} ms (longest)")
    fifths = collections.Counter(int((knock.ended - first) * 5 / lasted) for knock in done)
    rates = [f"{fifths[part] * 5 / lasted:.1f}" for part in range(5)]  # the last one falls out
    print(f"  a second, in each fifth of the time: {', '.join(rates)}")
    return max(1, len(done))

def show_cpu(spent, done):
    """Print the CPU of each part of the server, per knock, and what that limits it to."""
    parts = "gpg", "gpg-agent", "listener", "monitor", "firewall"
    total, cores = sum(spent[part] for part in parts), os.cpu_count()
    print(f"  {'':10} {'ms of CPU a knock':>18} {'of a core':>10}")
    for part in (*parts, "sender"):
        print(f"  {part:10} {spent[part] / done * 1e3:18.2f} {spent[part] / spent['time']:10.1%}")
    others = spent["machine"] - spent["left"] - total - spent["sender"]
    print(f"  of the machine's time {spent['left'] / spent['machine']:.0%} was left, and "
          f"{others / spent['machine']:.0%} went to the kernel, for packets, and other programs")
    limits = {f"{cores} cores": total / cores, "the listener, a core": spent["listener"],
              "monitor and firewall, in turn": spent["monitor"] + spent["firewall"]}
    for name, seconds in limits.items():
        if seconds:
            print(f"  by the CPU of {name}: {done / seconds:.0f} a second at most")

# == flood: knocks while garbage comes in at the right ports ==

GARBAGE = 900  # bytes of payload, as a real fragment has
POOL = 4096  # different frames, made beforehand: making them costs more than sending them
FLOOD_LONGEST = 240  # seconds; a sender ends by itself even when nobody stops it
BATCH = 0.001  # seconds between bursts: a sleep for each packet would cost more than the packet
OFFERED, OFFERED_FOR = 30, 3  # authentic knocks a second, as OpenSPA's author has them; seconds
IN_TIME = 1.0  # seconds in which one of them has to be answered

def garbage_syn(link, source, destination, port, size=GARBAGE):
    """A SYN with random payload and right checksums: a wrong one would spare the server work."""
    from scapy.layers.inet import IP, TCP
    syn = TCP(sport=random.randint(1024, 65535), dport=port, flags="S",
              seq=random.getrandbits(32), window=64240)
    return link + bytes(IP(src=source, dst=destination, flags="DF") / syn / os.urandom(size))

def link_header(source, destination):
    """The Ethernet header of IPv4 from one host to another."""
    macs = "".join(link_state(host)["address"] for host in (destination, source))
    return bytes.fromhex(macs.replace(":", "") + "0800")

def part_flood(link, source, destination, ports, rate):
    """In the attacker's namespace: send garbage at a rate, until stdin ends or FLOOD_LONGEST.
    source: an address, or 'many' for a different one in each frame. sendmmsg(2) leaves a sixth more
    of the core to the others than send(2)."""
    link, rate, ports = bytes.fromhex(link), int(rate), [int(port) for port in ports.split(",")]
    sources = [source] * POOL
    if source == "many":  # of RFC 2544's addresses, which are for benchmarks
        sources = [f"198.18.{random.getrandbits(8)}.{random.randint(1, 254)}" for _ in range(POOL)]
    frames = [garbage_syn(link, source, destination, port) for source,
              port in zip(sources, itertools.cycle(ports))]
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(263, 20, 1)  # SOL_PACKET, PACKET_QDISC_BYPASS: straight to the driver
    sock.bind(("eth0", 0))
    # struct iovec and struct mmsghdr (64 bytes) on a 64-bit Linux, one of each for a frame; all
    # frames have one size.
    data, size = ctypes.create_string_buffer(b"".join(frames)), len(frames[0])
    vectors = ctypes.create_string_buffer(b"".join(
        struct.pack("QQ", ctypes.addressof(data) + size * number, size) for number in range(POOL)))
    headers = ctypes.create_string_buffer(b"".join(
        struct.pack("8Q", 0, 0, ctypes.addressof(vectors) + 16 * number, 1, 0, 0, 0,
                    0) for number in range(POOL)))
    sendmmsg, place, sent = ctypes.CDLL(None).sendmmsg, 0, 0
    print("ready", flush=True)
    began = time.monotonic()
    while (now := time.monotonic() - began) < FLOOD_LONGEST \
        and not select.select([sys.stdin], [], [], 0)[0]:
        # at most a second that it missed is made up for
        due, sent = min(int(now * rate) - sent, rate), int(now * rate)
        # to the end of the pool at most; a frame that the wire does not take is skipped
        while due > 0:
            done = max(1, sendmmsg(sock.fileno(), ctypes.byref(headers, 64 * place),
                                   min(due, POOL - place), 0))
            place, due = (place + done) % POOL, due - done
        time.sleep(max(0, began + now + BATCH - time.monotonic()))

@contextmanager
def flood(world, source, rate):
    """Garbage from the other host meanwhile. Yields a Counter, which has afterwards: packets by the
    interfaces, seconds, CPU."""
    server, attacker = world.server, world.other
    ports = ",".join(map(str, world.ports))
    words = link_header(attacker, server).hex(), source, server.ip, ports, rate
    sender = attacker.popen(sys.executable, HERE / "test_tariq.py", "flood-sender", *words,
                            stdin=PIPE, stdout=PIPE)
    sender.stdout.readline()  # its frames are made
    def counters():
        sent, got = (link_state(host)["stats64"] for host in (attacker, server))
        return collections.Counter(sent=sent["tx"]["packets"], got=got["rx"]["packets"],
                                   **cpu_seconds(world))
    before, counted = counters(), collections.Counter()
    try:
        yield counted
        counted.update(counters())
        counted.subtract(before)
        if sender.poll() is not None:
            print(f"the flood ended before the knocks, by a fault or after {FLOOD_LONGEST} s: "
                  "the next row is too good")
    finally:
        sender.communicate()

def knock_once(world):
    """A door that is shut, opened and gone through -> the time of the opening in ms, or None where
    it failed."""
    def is_open():
        return any(f"-s {world.client.ip}/32" in rule for rule in world.server.rules())
    for _ in range(3):
        if is_open():
            knock(world, "C", "22", transport="kernel")
    began, shut = time.perf_counter(), not is_open()
    done = knock(world, transport="kernel")
    took = (time.perf_counter() - began) * 1e3
    return took if shut and done.returncode == 0 \
        and world.client.connects(world.server.ip, timeout=3) else None

FLOOD_COLUMNS = ("asked/s", "sent/s", "got/s", f"of {OFFERED}", "median", "longest", "CPU", "left",
                 "opened", "median", "longest", "CPU", "listener", "monitor")

def bench_flood(*rates, knocks=20):
    """Authentic knocks while garbage comes in at each rate, half of the time from one address, half
    from many: OFFERED a second, sealed beforehand and sent once, then a few of an ordinary user,
    whose client repeats what is lost."""
    with Lab() as lab:
        world, configs = knocks_world(lab, 4)
        started(world)
        knock_once(world)  # the warm-up
        print(f"\nof {OFFERED}: knocks offered each second, for {OFFERED_FOR} s with garbage from "
              f"one\naddress and as long from {POOL}, sealed beforehand, sent once: those that had "
              f"their\nresult within {IN_TIME:.0f} s; opened: by an ordinary client, of {knocks}; "
              "times in ms;\nCPU: the listener's, of a core; left: of the machine, which sends the "
              "garbage, too;\nmemory in MB")
        print_row(FLOOD_COLUMNS, FLOOD_COLUMNS)
        for rate in rates or (0, 1_000, 2_000, 100_000, 200_000, 300_000):
            print_row(FLOOD_COLUMNS, flood_row(world, configs, rate, knocks))

def flood_row(world, configs, rate, knocks):
    """One rate's cells."""
    offered, opened, memory = [], [], []
    alone, beside = collections.Counter(), collections.Counter()
    for source in world.other.ip, "many":
        world.tariq.stop()  # a server that has no door open yet: else each knock closes one first
        started(world)
        prepared = prepare(world, configs, OFFERED * OFFERED_FOR)
        with flood(world, source, rate) as counted:
            send_knocks(prepared, OFFERED, patience=2 * IN_TIME, repeats=False)
        offered, alone = offered + prepared, alone + counted
        with flood(world, source, rate) as counted:
            opened += [knock_once(world) for _ in range(knocks // 2)]
        beside += counted
        memory.append([rss(pid) for pid in (world.tariq.listener, world.tariq.process.pid)])
    times = [(knock.ended - knock.began) * 1e3 for knock in offered if knock.ended]
    answered = sum(took <= IN_TIME * 1e3 for took in times) * OFFERED / len(offered)
    took = [took for took in opened if took]
    def longest(times):
        return [f"{statistics.median(times):.0f}", f"{max(times):.0f}"] if times else ["-", "-"]
    return [rate, *(f"{alone[name] / alone['time']:.0f}" for name in ("sent", "got")),
            f"{answered:.1f}", *longest(times), f"{alone['listener'] / alone['time']:.0%}",
            f"{alone['left'] / alone['machine']:.0%}", f"{len(took)}/{len(opened)}", *longest(took),
            f"{beside['listener'] / beside['time']:.0%}",
            *(f"{most:.1f}" for most in map(max, zip(*memory)))]

# == timing: what a stranger can measure, with and without a Tariq that runs ==

BLOCKS = 25  # times that the server is started and stopped: what drifts meanwhile is in both alike
PUBLIC = 443  # a port that everybody may reach
ANSWERER = f"""
import socket
with socket.create_server(("", {PUBLIC}), backlog=64) as listening:
    while True:
        listening.accept()[0].close()
"""

def bench_timing(samples=5_000):
    """Round trips that a stranger measures at a host that answers ping and has a public port, while
    a server runs there and while none does, in turn; and how many answers closed ports give. The
    stranger has a core of his own: else a listener that wakes up would take his time, as none does
    on a machine of its own."""
    with Lab() as lab:
        world = new_world(lab)
        server, stranger = world.server, world.other
        for match in f"tcp --dport {PUBLIC}", "icmp --icmp-type echo-request":
            server.run("iptables", "-A", "INPUT", "-p", *match.split(), "-j", "ACCEPT")
        core, *_, servers_core = sorted(os.sched_getaffinity(0)) * 2
        pin(server.popen(sys.executable, "-I", "-c", ANSWERER).pid, servers_core)
        wait_for(lambda: server.run("ss", "-Hltn", f"sport = :{PUBLIC}").stdout, "no public port")
        link = link_header(stranger, server)
        other = next(port for port in range(20_000, 30_000) if port not in world.ports)
        ports = world.ports[0], other
        garbage = [[garbage_syn(link, stranger.ip, server.ip, port) for _ in range(256)]
                   for port in ports]
        measured = {running: [[] for _ in range(4)] for running in (True, False)}
        answers, block = collections.Counter(), -(-samples // BLOCKS)
        for number in range(2 * BLOCKS):
            running = number % 4 in (0, 3)  # with, without, without, with: each is first as often
            if running:
                for pid in started(world).listener, world.tariq.process.pid:
                    pin(pid, servers_core)
            time.sleep(0.3)  # what starts and stops is done
            stranger.inside(round_trips, server.ip, garbage, 20, core)  # a warm-up
            took = stranger.inside(round_trips, server.ip, garbage, block, core)
            for blocks, times in zip(measured[running], took):
                blocks.append(times)
            answers[running] += silence(world, ports, link, block)
            if running:
                assert world.tariq.stop() == 0
    count = block * BLOCKS
    print(f"\n{count} samples each, in {BLOCKS} blocks with a server and as many without; "
          "medians in µs")
    print(f"{'a stranger measures':38}", end="")
    print_row(KS_COLUMNS, KS_COLUMNS)
    for place, name in enumerate(("ping", f"connect to port {PUBLIC}",
                                  "ping behind garbage at a knock's port",
                                  "ping behind garbage at another port")):
        show_ks(name, measured[True][place], measured[False][place])
    show_ks("garbage: a knock's port, another one", measured[True][2], measured[True][3])
    print("KS: the two-sample Kolmogorov-Smirnov statistic, critical at 1 % "
          f"{critical(count, count):.4f}.\nIn the last two columns, of every other block of one, "
          f"{critical(count // 2, count // 2):.4f}:\nthey say how far this machine differs by "
          "itself. In the last row, without is the other port,\nwhile the server runs.")
    print(f"answers to {4 * count} packets at ports without a service, UDP and TCP, a knock's and "
          f"others: {answers[True]} with, {answers[False]} without")

def pin(pid, core):
    """Let all threads of a process run on one core only."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})

def round_trips(address, garbage, count, core):
    """In the stranger's namespace: µs of a ping, of a connect, of a ping right behind each kind of
    garbage."""
    os.sched_setaffinity(0, {core})  # of this thread
    times = [[] for _ in range(4)]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp, \
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        icmp.connect((address, 0))
        icmp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 5, 0))
        wire.bind(("eth0", 0))
        for number in range(count):
            times[0].append(ping(icmp, number))
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                began = time.perf_counter_ns()
                sock.connect((address, PUBLIC))
                times[1].append((time.perf_counter_ns() - began) / 1e3)
            for place in (2, 3) if number % 2 else (3, 2):
                frame = garbage[place - 2][number % len(garbage[0])]
                times[place].append(ping(icmp, number, lambda frame=frame: wire.send(frame)))
    return times

def ping(icmp, number, before=None):
    """µs from an echo request, and what is sent before it, to its reply."""
    ident, number = 0x5441, number & 0x7FFF  # so small that the checksum's sum has no carry
    request = struct.pack(">4H", 0x0800, 0xFFFF - (0x0800 + ident + number), ident, number)
    began = time.perf_counter_ns()
    if before:
        before()
    icmp.send(request)
    while (reply := icmp.recv(256)[20:])[:1] != b"\0" or reply[4:8] != request[4:8]:
        pass  # another's
    return (time.perf_counter_ns() - began) / 1e3

def silence(world, ports, link, count):
    """How many packets the server sends when so many SYNs and datagrams come to each port."""
    from scapy.layers.inet import IP, UDP as Datagram
    frames = []
    for port in ports:
        ip = IP(src=world.other.ip, dst=world.server.ip)
        datagram = ip / Datagram(sport=4000, dport=port) / os.urandom(GARBAGE)
        syn = garbage_syn(link, world.other.ip, world.server.ip, port)
        frames += [syn, link + bytes(datagram)]
    with captured(world.server, outgoing=True) as sent:
        inject(world.other, frames, count)
    return sum(packet.frame[12:14] == b"\x08\0" for packet in sent)  # IPv4: not ARP's

def ks_statistic(one, other):
    """Kolmogorov's and Smirnov's: the largest distance of two empirical distributions."""
    one, other = sorted(one), sorted(other)
    def share(samples, value):
        return bisect.bisect_right(samples, value) / len(samples)
    return max(abs(share(one, value) - share(other, value)) for value in (*one, *other))

def critical(one, other):
    """What the statistic exceeds once in 100 times by chance, of so many independent samples."""
    return math.sqrt(-math.log(0.01 / 2) / 2) * math.sqrt((one + other) / (one * other))

KS_COLUMNS = "with", "without", "KS", "with/with", "without/without"

def show_ks(name, one, other):
    """A row: medians and statistic of two kinds of blocks, and the statistic within each kind."""
    def flat(blocks):
        return [*itertools.chain(*blocks)]
    within = [ks_statistic(flat(blocks[::2]), flat(blocks[1::2])) for blocks in (one, other)]
    medians = [f"{statistics.median(flat(blocks)):.1f}" for blocks in (one, other)]
    statistic = ks_statistic(flat(one), flat(other))
    print(f"{name:38}", end="")
    print_row(KS_COLUMNS, [*medians, *(f"{value:.4f}" for value in (statistic, *within))])

# == observer: what somebody on the path sees of a knock ==

def bench_observer(knocks=10):
    """The packets of a knock as they pass the client's interface, by each transport and family."""
    with Lab() as lab:
        world = new_world(lab)
        started(world)
        for transport, where in itertools.product(RATIOS, ("box", "box6")):
            recorded = []
            for _ in range(knocks):
                with captured(world.client) as packets:
                    opens(world, "O", "22", transport=transport, where=where)
                ports = {*world.ports}
                recorded.append([packet for packet in packets
                                 if ports & {packet.source, packet.port}])
            family = "IPv6" if where == "box6" else "IPv4"
            show_observed(world, f"{transport}, {family}", recorded)

def show_observed(world, title, recorded):
    """Print the first of some knocks packet by packet, and what differs among them."""
    def show(packet):
        flags = "".join(name for bit, name in enumerate("FSRPAU") if packet.flags >> bit & 1)
        port = world.ports.index(packet.port if packet.outgoing else packet.source) + 1
        way = "->" if packet.outgoing else "<-"
        return (f"{way} port {port} {flags or 'UDP':3} {len(packet.frame) - 14:5} "
                f"{len(packet.payload):5}")
    first = recorded[0]
    print(f"\n{title}: {len(first)} packets\n     ms  way         IP bytes, of payload")
    for packet in first:
        print(f"{(packet.time - first[0].time) * 1e3:7.2f}  {show(packet)}")
    shapes = collections.Counter(tuple(map(show, packets)) for packets in recorded)
    payloads = {len(packet.payload) for packets in recorded for packet in packets} - {0}
    lasted = [(packets[-1].time - packets[0].time) * 1e3 for packets in recorded]
    sizes = ", ".join(map(str, sorted(payloads)))
    print(f"  of {len(recorded)} knocks {shapes.most_common(1)[0][1]} looked like the commonest; "
          f"payloads of {sizes} bytes;\n  from the first packet to the last {min(lasted):.0f} to "
          f"{max(lasted):.0f} ms")

# ---- command line --------------------------------------------------------------------------------

def main():
    name, *arguments = sys.argv[1:] or ["test"]
    benches = {"latency": bench_latency, "clients": bench_clients, "load": bench_load,
               "flood": bench_flood, "timing": bench_timing, "observer": bench_observer}
    if name == "flood-sender":
        return part_flood(*arguments)
    if name == "demo":
        return demo()
    if name == "machine":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves nothing behind
        return machine(*arguments)
    if name == "bench":
        # `timeout` too shall leave no namespace behind
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if arguments and arguments[0] in benches:
            return benches[arguments[0]](*map(int, arguments[1:]))
        sys.exit(__doc__)
    side_by_side = ["-n", "3"] if importlib.util.find_spec("xdist") else []  # they wait a lot
    return pytest.main(["-q", "-p", "no:cacheprovider", *side_by_side,
                        str(HERE / "test_tariq.py"), *sys.argv[1:]])

if __name__ == "__main__":
    sys.exit(main())
