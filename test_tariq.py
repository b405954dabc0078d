#!/usr/bin/python3
"""Tests, demo and benchmarks of Tariq, on real parts: network namespaces, iptables, gpg keys, sshd and nmap.

    sudo ./test_tariq.py                 the tests (pytest); without root the end-to-end ones are skipped
    sudo ./test_tariq.py demo            two throwaway hosts, a closed door and a knock: about 15 seconds
    sudo ./test_tariq.py bench latency   time to an open port, against fwknop and knockd where installed
    sudo ./test_tariq.py bench flood     knocks under a flood of garbage

Everything runs in namespaces named tq-PID-..., on documentation addresses, and is removed at the end, also on failure.
"""
import ast, atexit, base64, bz2, calendar, collections, concurrent.futures, contextlib, ctypes, fcntl, hashlib
import importlib.util, inspect, io, itertools, json, os, pty, pwd, random, re, select, shlex, shutil, signal, socket
import statistics, struct, subprocess, sys, tempfile, termios, threading, time, zlib
from pathlib import Path
from subprocess import DEVNULL, PIPE
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
TARIQ = HERE / "tariq.py"
NOBODY = 65534


def load_tariq():
    spec = importlib.util.spec_from_file_location("tariq", TARIQ)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tariq = load_tariq()


# ---- the lab: hosts in namespaces on one switch ----------------------------------------------------------------------

def sh(*argv, check=True, **options):
    """Run a command to its end and return it; its words are in the error when it fails."""
    if "input" not in options:
        options.setdefault("stdin", DEVNULL)
    done = subprocess.run([str(word) for word in argv], stdout=PIPE, stderr=PIPE, text=options.pop("text", True),
                          timeout=options.pop("timeout", 60), **options)
    if check and done.returncode:
        raise AssertionError(f"{argv}: exit {done.returncode}: {done.stdout}{done.stderr}")
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
        # What a kernel says of itself now and then would count as a packet sent.
        self.run("sysctl", "-qw", "net.ipv4.conf.all.forwarding=0", "net.ipv6.conf.all.forwarding=0",
                 "net.ipv6.conf.all.router_solicitations=0", "net.ipv6.conf.default.router_solicitations=0")

    def command(self, argv, user=None):
        return ["ip", "netns", "exec", self.netns, *(as_user(user) if user is not None else []), *map(str, argv)]

    def run(self, *argv, user=None, **options):
        return sh(*self.command(argv, user), **options)

    def popen(self, *argv, user=None, **options):
        return subprocess.Popen(self.command(argv, user), text=options.pop("text", True), **options)

    def python(self, script, *arguments, **options):
        """Run a script here to its end."""
        return self.run(sys.executable, "-c", script, *arguments, **options)

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
        return self.python(code, address, port, timeout, check=False).returncode == 0

    def rules(self, ip6=False, chain="tariq"):
        return [line for line in self.run("ip6tables" if ip6 else "iptables", "-S", chain).stdout.splitlines()
                if line.startswith("-A")]

    def sshd(self, key=None):
        """A real sshd on port 22, with the system's configuration or, with a new key at that path, with none."""
        Path("/run/sshd").mkdir(exist_ok=True)
        options = []
        if key:
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
            options = ["-f", "/dev/null", "-h", key, "-o", "PidFile=none", "-o", "UsePAM=no"]
        # OpenSSH 9.8 and later shuts out addresses that connect and do not log in, as the tests do.
        version = tuple(map(int, re.search(r"OpenSSH_(\d+)\.(\d+)", sh("ssh", "-V").stderr).groups()))
        options += ["-o", "PerSourcePenalties=no"] if version >= (9, 8) else []
        self.popen("/usr/sbin/sshd", "-D", *options, stdout=DEVNULL, stderr=DEVNULL)
        wait_for(lambda: self.connects("127.0.0.1"), "sshd does not come up")


# Waits until the tests close its stdin, or are gone, however they went; then removes a lab and all that runs in it.
JANITOR = """
read -r line
for space in $(ip netns list | grep -o "^$1-[^ ]*"); do
    while pids=$(ip netns pids $space) && [ "$pids" ]; do kill -9 $pids; sleep 0.02; done
    rm -f /run/tariq-*-$(stat -c %i /run/netns/$space).lock
    ip netns del $space
done
rm -rf --one-file-system "$2"
[ -z "$3" ] || userdel -f tariq
"""


class Lab:
    """Namespaces on a bridge in one more namespace, a private directory, and the removal of all that."""

    count = itertools.count()

    def __init__(self):
        if os.geteuid():
            pytest.skip("makes network namespaces: run as root")
        self.prefix, self.hosts = f"tq-{os.getpid()}-{next(self.count)}", {}
        self.dir, self.switch = Path(tempfile.mkdtemp(prefix="tariq-test-")), f"{self.prefix}-switch"
        self.dir.chmod(0o755)
        words = [self.prefix, self.dir, "" if user_exists("tariq") else "and the user that `init` makes"]
        self.janitor = subprocess.Popen(["sh", "-c", JANITOR, "sh", *words], stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL,
                                        start_new_session=True)
        self.program("tariq.py", lambda text: text)
        shutil.copy(HERE / "tariq.conf.example", self.dir)
        sh("ip", "netns", "add", self.switch)
        sh("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        sh("ip", "-n", self.switch, "link", "set", "br0", "up")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.janitor.stdin.close()
        self.janitor.wait(60)

    def new(self, name):
        """A path of the lab's own that nothing has yet."""
        return self.dir / f"{next(self.count)}-{name}"

    def program(self, name, change):
        """A copy of tariq.py, its text changed, that this very Python runs; returns its path."""
        path = self.dir / name
        path.write_text(change(TARIQ.read_text().replace("#!/usr/bin/python3", f"#!{sys.executable}", 1)))
        path.chmod(0o755)
        return path

    def host(self, name, number):
        host = self.hosts[name] = Host(self, name, number)
        self.plug(host, "eth0", f"{host.ip}/24", f"{host.ip6}/64")
        return host

    def plug(self, host, interface, *addresses):
        """A cable from the host to the switch."""
        port = f"{host.name[:8]}{len(sh('ip', '-n', self.switch, 'link').stdout.splitlines())}"
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


def set_up_link(host, interface, *addresses):
    for address in addresses:
        sh("ip", "-n", host.netns, "addr", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))
    sh("ip", "-n", host.netns, "link", "set", interface, "up")


def user_exists(name):
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


def make_server(lab, host, directory="server", **settings):
    """A server set up by `init`, with settings changed; returns the config's path."""
    path = lab.dir / directory / "tariq.conf"
    lab.tariq(host, "init", "-c", path)
    return write_private(path, with_settings(path, settings))


def with_settings(path, settings):
    """The text of a server's config with other settings."""
    text = path.read_text()
    for key, value in settings.items():
        text = re.sub(rf"(?m)^{key} = .*\n", "", text, count=1).replace("[server]\n", f"[server]\n{key} = {value}\n")
    return text


def write_private(path, text, user=0, mode=0o600):
    """A config that belongs to a user."""
    path.write_text(text)
    path.chmod(mode)
    os.chown(path, user, user)
    return path


def make_client(lab, client, server, server_conf, user="me@laptop", allow=("O 22", "C 22"), directory="client",
                host="box"):
    """A client of its own uid, enrolled by the commands of the README; [box] is the server's IPv4 address, [box6] its
    IPv6 one. Returns its config's path."""
    path = lab.dir / directory / "tariq.conf"
    sh("install", "-d", "-m", "700", "-o", NOBODY, "-g", NOBODY, path.parent)
    public = lab.tariq(client, "keygen", "-c", path, user, user=NOBODY).stdout
    flags = [word for pattern in allow for word in ("--allow", pattern)]
    profile = lab.tariq(server, "enroll", "-c", server_conf, *flags, input=public).stdout
    lab.tariq(client, "join", "-c", path, host, user=NOBODY, input=profile)
    text = path.read_text().replace(f"[{host}]\n", f"[{host}]\nhost = {server.ip}\n")
    section = text[text.index(f"[{host}]"):]
    six = section.replace(f"[{host}]", f"[{host}6]").replace(server.ip, server.ip6)
    return write_private(path, f"{text}\n{six}", NOBODY)


def config_values(path, section):
    return dict(tariq.Config(path).ini[section])


class Server:
    """A running `tariq.py server`, with its log, in hostile surroundings: far from UTC, with root's groups and secrets,
    a poisoned PATH and Python, and a file as stdin."""

    def __init__(self, lab, host, conf, program="tariq.py", prefix=(), command=None):
        self.lab, self.host, self.conf, self.path, self.poison = lab, host, conf, lab.new("log"), lab.new("poison")
        self.poison.mkdir()
        for name in ("iptables", "ip6tables", "iptables-restore", "gpg", "setpriv", "timeout", "json.py", "hmac.py"):
            mark = f"open('{self.poison}/mark', 'w')" if ".py" in name else f"#!/bin/sh\ntouch {self.poison}/mark"
            (self.poison / name).write_text(f"{mark}\n")
            (self.poison / name).chmod(0o755)
        path = f"PATH={self.poison}:{os.environ['PATH']}"
        surroundings = ["setpriv", "--groups", "4,24", "env", "TZ=XXX-13:37", path, f"PYTHONPATH={self.poison}",
                        f"GNUPGHOME={self.poison}", "SECRET_OF_ROOT=hunter2", "XTABLES_LIBDIR=/nonexistent",
                        "LC_ALL=tr_TR.UTF-8"]
        with open(self.path, "w") as log, open(__file__) as stdin:
            self.process = host.popen(*prefix, *surroundings, *(command or [lab.dir / program]), "server", "-c", conf,
                                      stdin=stdin, stdout=log, stderr=log)

    @property
    def log(self):
        return self.path.read_text()

    def wait_log(self, text, count=1, timeout=15):
        wait_for(lambda: self.log.count(text) >= count, f"{text!r} is not {count} times in {self.path}", timeout)
        return self

    def stop(self, number=signal.SIGTERM):
        """End it -> its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(15)
        assert "Traceback" not in self.log and not (self.poison / "mark").exists(), self.log
        return code

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def listener(self):
        """The listener's pid."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if b"listener" in Path(f"/proc/{pid}/cmdline").read_bytes())


# ---- tools -----------------------------------------------------------------------------------------------------------

def eventually(condition, timeout=5):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def wait_for(condition, complaint, seconds=10):
    assert eventually(condition, seconds), complaint


@contextlib.contextmanager
def captured(host, *words):
    """What tcpdump sees on a host's eth0 meanwhile, by a filter: a list of (time, frame), complete at the end."""
    packets, path = [], host.lab.new("pcap")
    process = host.popen("tcpdump", "-i", "eth0", "-n", "-U", "--immediate-mode", "-B", "65536", "-Z", "root",
                         "-w", path, *words, stderr=PIPE)
    assert "listening on" in process.stderr.readline()
    try:
        yield packets
        time.sleep(0.2)  # the last packets are on their way
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
    data, at = path.read_bytes(), 24
    while at < len(data):
        seconds, micros, size, _ = struct.unpack_from("<IIII", data, at)
        packets.append((seconds + micros / 1e6, data[at + 16:at + 16 + size]))
        at += 16 + size


Segment = collections.namedtuple("Segment", "frame source port flags payload")


def segments(packets):
    """The TCP segments and UDP datagrams (flags 0) among captured packets: frame, both ports, TCP flags, payload."""
    found = []
    for _, frame in packets:
        ip, six = frame[14:], frame[14] >> 4 == 6
        protocol, at = (ip[6], 40) if six else (ip[9], (ip[0] & 15) * 4)
        end = int.from_bytes(ip[4:6], "big") + 40 if six else int.from_bytes(ip[2:4], "big")
        if frame[12:14] in (b"\x08\0", b"\x86\xdd") and protocol in (6, 17):
            source, port = struct.unpack_from(">HH", ip, at)
            start, flags = (at + (ip[at + 12] >> 4) * 4, ip[at + 13]) if protocol == 6 else (at + 8, 0)
            found.append(Segment(frame, source, port, flags, ip[start:end]))
    return found


INJECT = """
import socket, sys
frames = [bytes.fromhex(line) for line in sys.stdin]
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sock.bind(("eth0", 0))
for number in range(int(sys.argv[1])):
    sock.send(frames[number % len(frames)])
"""


def inject(host, frames, times=1):
    """Send frames from a host's eth0, in their order, all of them so many times."""
    frames = list(frames)
    host.python(INJECT, times * len(frames), input="".join(f"{frame.hex()}\n" for frame in frames))


def from_address(frame, ip):
    """An IPv4 frame as if it came from another address, checksums made right by scapy."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    packet = Ether(frame)
    packet[IP].src = ip
    del packet[IP].chksum, packet[TCP].chksum
    return bytes(packet)


def gpg(home, *arguments):
    """The words of one gpg call without questions."""
    return ["gpg", "--homedir", str(home), "--batch", "--yes", "--quiet", "--trust-model", "always",
            "--pinentry-mode", "loopback", "--passphrase", "", *map(str, arguments)]


def generate(home, user, algorithm="future-default", *options, run=sh):
    """A key of a user, with an encryption subkey, in a keyring that is there -> its fingerprint."""
    run(*gpg(home, *options, "--quick-generate-key", user, algorithm, "default", "never"))
    key = fingerprint(home, user, run)
    if algorithm.startswith("rsa"):
        run(*gpg(home, "--quick-add-key", key, algorithm, "encr"))
    return key


def fingerprint(home, user, run=sh):
    listing = run(*gpg(home, "--with-colons", "--list-keys", user)).stdout
    return re.search(r"(?m)^fpr:+(\w+)", listing)[1]


def at_time(seconds):
    """gpg's option for a clock that is so many seconds from now."""
    return "--faked-system-time", time.strftime("%Y%m%dT%H%M%S", time.gmtime(time.time() + seconds))


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


def rss(pid):
    """Resident memory in MB: proc(5)."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def link_state(host):
    """What `ip` knows of the host's interface."""
    return json.loads(host.run("ip", "-s", "-j", "link", "show", "dev", "eth0").stdout)[0]


def socket_in(host, *arguments):
    """A socket inside a host, made by a thread that goes there."""
    def make():
        with open(f"/run/netns/{host.netns}", "rb") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
                raise OSError(ctypes.get_errno(), "setns")
        return socket.socket(*arguments)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


# ---- pytest: the world, and knocks in it -----------------------------------------------------------------------------

try:
    import pytest
except ImportError:  # the demo and the benchmarks do without: what marks a test then marks nothing
    class pytest:
        fixture = staticmethod(lambda function=None, **_: function or (lambda made: made))
        mark = SimpleNamespace(skipif=lambda *_, **__: lambda made: made, parametrize=lambda *_: lambda made: made)

ALLOW = ("O 22", "C 22", "O 53/udp", "C 53/udp", "O 8022", "C 8022", "E id -u", "E echo *", "E sleep 60", "E false",
         "E head -c 100000 /dev/zero", "E yes", "E sh -c *", "E nonexistent-program")
NO_ANSWER, SYSTEM, DIED, REFUSED = 75, 71, 70, 77  # tariq.py --help


@pytest.fixture(scope="session")
def world():
    """A server with a closed firewall and an sshd, a client, somebody else, one enrolled user."""
    with Lab() as lab:
        world = SimpleNamespace(lab=lab, tariq=None, **{name: lab.host(name, number) for name, number in
                                                        (("server", 10), ("client", 20), ("other", 30))})
        world.server.drop_policy()
        world.server.sshd(lab.dir / "sshd-key")
        world.conf = make_server(lab, world.server, command_timeout=2)
        world.me = make_client(lab, world.client, world.server, world.conf, allow=ALLOW)
        world.ring = world.conf.parent / ".server-gpg"
        world.ports = [int(port) for port in config_values(world.me, "box")["secret_ports"].split(",")]
        yield world


@pytest.fixture
def idle(world):
    """The world while no server runs; its configs stay as they were."""
    if world.tariq:
        assert world.tariq.stop() == 0
        world.tariq = None
    texts = {path: path.read_text() for path in (world.conf, world.me)}
    yield world
    for path, text in texts.items():
        path.write_text(text)


@pytest.fixture
def box(world):
    """The world with a running server and every door closed, before and after; its configs stay as they were."""
    def closed():
        for program in ("iptables", "ip6tables"):
            world.server.run(program, "-F", "tariq")
    if not world.tariq or world.tariq.process.poll() is not None:
        world.tariq = Server(world.lab, world.server, world.conf).wait_log("listening for")
    closed()
    texts = {path: path.read_text() for path in (world.conf, world.me)}
    yield world
    for path, text in texts.items():
        path.write_text(text)
    assert world.tariq.process.poll() is None, world.tariq.log
    closed()


def variant(world, **settings):
    """The server's config with other settings, where the client may open and close every port; returns its path."""
    text = with_settings(world.conf, settings).replace("    O 22/tcp\n    C 22/tcp\n", "    O *\n    C *\n")
    path = world.conf.with_name(f"tariq-{next(world.lab.count)}.conf")
    path.touch(0o600)
    return write_private(path, text)


@contextlib.contextmanager
def serving(world, prefix=(), ready="listening for", program="tariq.py", **settings):
    """A server meanwhile. However the test treated it: no traceback, and a clean end where it still runs."""
    server = Server(world.lab, world.server, variant(world, **settings), program=program, prefix=prefix)
    try:
        yield server.wait_log(ready)
        if server.process.poll() is None:
            assert server.stop() == 0
            assert world.server.rules() == world.server.rules(ip6=True) == []
        assert "Traceback" not in server.log
    except BaseException:
        print(server.log, file=sys.stderr)
        raise
    finally:
        server.kill()


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


def knock_words(world, *words, conf=None, where="box", timeout=None, transport=None, options=(), change=None,
                program="tariq.py"):
    start = [world.lab.dir / program]
    if change:
        start = [sys.executable, "-I", "-c", CHANGED, world.lab.dir / program, change]
    options = [*(("-t", timeout) if timeout else ()), *(("--transport", transport) if transport else ()), *options]
    return [*start, "knock", "-c", conf or world.me, *options, where, *words]


def knock(world, *words, user=NOBODY, host=None, **how):
    """Run a client to its end; by default the enrolled one, unprivileged (but crafted), and whatever transport."""
    user = None if how.get("transport") == "crafted" else user
    return (host or world.client).run(*knock_words(world, *words, **how), user=user, check=False)


def opens(world, *words, **how):
    """Knock, by default to open port 22, insist that it worked, return what was printed."""
    done = knock(world, *(words or ("O", "22")), **how)
    assert done.returncode == 0, f"{words}: exit {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def knocking(world, *words, host=None, **how):
    """A client in the background."""
    process = (host or world.client).popen(*knock_words(world, *words, **how), user=NOBODY, stdout=PIPE, stderr=PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def server_gpg(world, *arguments, **options):
    return sh(*as_user(pwd.getpwnam("tariq").pw_uid), *gpg(world.ring, *arguments), cwd="/", **options)


def second_client(world, name, allow=("O 22",), user=None):
    """One more user with a keyring of their own; returns the config's path."""
    return make_client(world.lab, world.client, world.server, world.conf, user or f"{name}@example.com", allow, name)


def deadline_of(printed):
    """'opened ... until 08:24:33Z' -> seconds since the epoch."""
    today = time.strftime("%Y-%m-%d", time.gmtime())
    stamp = time.strptime(f"{today} {re.search(r'until ([0-9:]+)Z', printed)[1]} UTC", "%Y-%m-%d %H:%M:%S %Z")
    return calendar.timegm(stamp)


# ---- a peer written from the README's table of bytes, not from tariq.py ----------------------------------------------

def keyed(key, label, data, size):
    return hashlib.blake2b(data, key=key, person=label, digest_size=size).digest()


def masked(key, label, nonce, data):
    return bytes(a ^ b for a, b in zip(data, hashlib.shake_256(key + label + nonce).digest(len(data))))


def make_frame(key, label, data, age=0.0):
    """A frame; `age` seconds old."""
    nonce = os.urandom(12)
    body = nonce + masked(key, label, nonce, int((time.time() - age) * 1000).to_bytes(6, "big") + data)
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
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data))
            + chunk(b"IEND", b""))


def make_png(data):
    """A PNG with length(2) | data in its lowest bits."""
    bits = [byte >> 7 - place & 1 for byte in len(data).to_bytes(2, "big") + data for place in range(8)]
    samples = bytearray(os.urandom(36 * 108))
    for place, bit in enumerate(bits):
        samples[place] = samples[place] & 254 | bit
    return png_of(36, 36, 8, 2, b"".join(b"\0" + samples[row:row + 108] for row in range(0, len(samples), 108)))


class Peer:
    """One knock of an enrolled client over UDP, each step by itself."""

    def __init__(self, world, *cmd, host=None, conf=None, **request):
        conf = conf or world.me
        values, self.user = config_values(conf, "box"), config_values(conf, "client")["user"]
        self.ports = [int(port) for port in values["secret_ports"].split(",")]
        ports = struct.pack(f">{len(self.ports)}H", *self.ports)
        self.K = keyed(base64.b64decode(values["secret"]), b"ports", ports, 32)
        self.host, self.server, self.to, self.home = (host or world.client, world.server, values["server_key"],
                                                      conf.parent / "gpg")
        self.k, self.sealed = os.urandom(32), b""
        self.id = keyed(self.k, b"id", b"", 12)
        self.request = {"to": self.to, "k": self.k.hex(), "cmd": list(cmd) or ["O", "22/tcp"], **request}
        self.socket = socket_in(self.host, socket.AF_INET, socket.SOCK_DGRAM)

    def seal(self, plain=None, *options):
        """Sign and encrypt the request's PNG, or other bytes."""
        plain = make_png(json.dumps(self.request).encode()) if plain is None else plain
        words = gpg(self.home, "--hidden-recipient", self.to, *(options or ("-u", f"<{self.user}>", "-s", "-e")))
        self.sealed = self.host.run(*words, user=NOBODY, input=plain, text=False).stdout
        return self

    def frames(self, age=0.0, knock_id=None):
        """[(port, fragment's frame)]"""
        size = -(-len(self.sealed) // len(self.ports))
        return [(port, make_frame(self.K, b"knock", bytes([place]) + (knock_id or self.id)
                                  + self.sealed[place * size:][:size], age)) for place, port in enumerate(self.ports)]

    def send(self, frames, sock=None):
        for port, payload in frames:
            (sock or self.socket).sendto(payload, (self.server.ip, port))

    @property
    def reply_key(self):
        return keyed(self.k, b"reply", self.sealed, 32)

    def hear(self, label, timeout=5.0, sock=None):
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


# ---- the pure parts --------------------------------------------------------------------------------------------------

KEY = bytes(range(32))


def test_frames_are_those_of_the_readme_in_both_directions():
    for data in (b"", b"x", os.urandom(1166)):
        stamp, opened = tariq.unframe(KEY, b"knock", make_frame(KEY, b"knock", data), len(data))
        assert opened == data and abs(stamp - time.time() * 1000) < 5000
        assert open_frame(KEY, b"challenge", tariq.frame(KEY, b"challenge", data)) == data
        assert tariq.unframe(KEY, b"result", make_frame(KEY, b"knock", data), 0) is None, "another label"
        assert tariq.unframe(bytes(32), b"knock", make_frame(KEY, b"knock", data), 0) is None, "another key"
        assert tariq.unframe(KEY, b"knock", make_frame(KEY, b"knock", data), len(data) + 1) is None, "too short"
    assert tariq.unframe(KEY, b"knock", make_frame(KEY, b"knock", bytes(1167)), 0) is None, "over 1,200 bytes"
    assert tariq.shared_key(KEY, [1, 2]) == keyed(KEY, b"ports", b"\0\1\0\2", 32)


def test_a_frame_with_any_bit_changed_or_any_byte_missing_is_refused():
    framed = tariq.frame(KEY, b"knock", b"some data")
    for bit in range(len(framed) * 8):
        changed = bytearray(framed)
        changed[bit // 8] ^= 1 << bit % 8
        assert tariq.unframe(KEY, b"knock", bytes(changed), 0) is None
    for size in range(len(framed)):
        assert tariq.unframe(KEY, b"knock", framed[:size], 0) is None


def test_hidden_data_comes_back_from_empty_to_exact_capacity():
    for size in (0, 1, 2, 100, 483, 484):  # 36 * 36 * 3 / 8 = 486, less 2 of length
        data = os.urandom(size)
        assert tariq.reveal(tariq.hide(tariq.cover(""), data)) == data == tariq.reveal(make_png(data))
    with pytest.raises(tariq.Fault, match="1 bytes too long"):
        tariq.hide(tariq.cover(""), bytes(485))


def test_a_cover_may_be_any_png_that_is_large_enough_and_only_its_lowest_bits_change(tmp_path):
    from PIL import Image
    path = tmp_path / "cover.png"
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        for size in ((36, 36), (37, 80), (640, 480)):
            Image.new(mode, size, int(mode == "P")).save(path, **({"transparency": 0} if mode == "P" else {}))
            samples = tariq.cover(str(tmp_path))
            png = tariq.hide(samples, b"request")
            after = Image.open(io.BytesIO(png))
            assert (after.mode, after.size) == ("RGB", (36, 36)) and tariq.reveal(png) == b"request"
            assert all(a >> 1 == b >> 1 for a, b in zip(samples, after.tobytes())) and samples != after.tobytes()


def test_a_cover_that_cannot_serve_is_a_clear_error(tmp_path):
    from PIL import Image
    path = tmp_path / "cover.png"
    Image.new("RGB", (90, 90)).save(path)
    truncated = path.read_bytes()[:80]
    path.unlink()
    for directory in (tmp_path / "missing", tmp_path):
        with pytest.raises(tariq.Fault, match="needs PNG images"):
            tariq.cover(str(directory))
    for write in (lambda: Image.new("RGB", (35, 36)).save(path), lambda: path.write_bytes(b"no PNG"),
                  lambda: path.write_bytes(b""), lambda: Image.new("RGB", (50, 50)).save(path, "JPEG"),
                  lambda: path.write_bytes(truncated)):
        write()
        with pytest.raises(tariq.Fault, match="cover.png: needs PNG images"):
            tariq.cover(str(tmp_path))


def test_requests_are_checked_word_by_word():
    good = {("O", "22"): ["O", "22/tcp"], ("C", "22/tcp", "53/udp"): ["C", "22/tcp", "53/udp"],
            ("O", "65535"): ["O", "65535/tcp"], ("E", "ls", "-l", "--", "ä b"): ["E", "ls", "-l", "--", "ä b"]}
    for words, result in good.items():
        assert tariq.command_of(list(words)) == result
    bad = [["O"], ["X", "22"], ["O", "0"], ["O", "-1"], ["O", "65536"], ["O", "022"], ["O", "22/sctp"],
           ["O", "22/tcp/tcp"], ["O", "٢٢"], ["O", "２２"], ["O", " 22"], ["O", "22\n"], ["O", ""], ["O", "1" * 5000],
           ["O", "--help"], ["E"], ["E", "a\nb"], ["E", "a\x1b[2J"], ["E", "\ud800"], ["E", "a\0b"], ["E", "\u202e"],
           [""], "O22", ("O", "22"), None]
    for words in bad:
        with pytest.raises(ValueError):
            tariq.command_of(words)


@pytest.mark.parametrize("may, good, bad", [
    ("O 22", ("O 22",), ("C 22", "O 22/udp", "O 22 23", "E 22", "O *")), ("O 22/tcp", ("O 22",), ()),
    ("O 22 80", ("O 80", "O 80 22"), ("O 8",)), ("O 22\nO 53/udp", ("O 22 53/udp",), ("O 53",)),
    ("O *", ("O 22 53/udp", "O 1"), ("C 22", "O *", "E id")), ("", (), ("O 22", "E id")),
    ("E service httpd restart", ("E service httpd restart",),
     ("E service httpd", "E service httpd stop", "E service httpd restart now", "E 'service httpd restart'")),
    ("E echo *", ("E echo", "E echo a b"), ("E echoes", "E /bin/echo a", "O 22")),
    ("E cp * /backup", ("E cp x /backup",), ("E cp x y /backup", "E cp /backup")),
    ("E cat /var/log/*", (), ("E cat /var/log/../../etc/shadow",)),
    ("E false\nE id *", ("E id -u", "E false"), ("E true",))])
def test_policy_permits_what_a_pattern_says_and_nothing_else(may, good, bad):
    for request in (*good, *bad):
        command = tariq.command_of(shlex.split(request))
        assert tariq.permitted(tariq.parse("may", may), command) is (request in good), request


CONFIG = """[server]
secret_ports = 10000,7456,22022,12121,10001
secret = {secret}
[allow me@laptop]
key = {key}
may =
    O 22  # comment
    E echo *
"""
SECRET, PRINT = "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0ICEhISE=", "0123456789abcdef0123456789ABCDEF01234567"


def write_config(path, text=CONFIG, user=os.geteuid(), mode=0o600):
    return write_private(path, text.replace("{secret}", SECRET).replace("{key}", PRINT), user, mode)


def test_a_config_gives_checked_values(tmp_path):
    config = tariq.Config(write_config(tmp_path / "tariq.conf"))
    assert config.get("secret_ports") == [10000, 7456, 22022, 12121, 10001] and len(config.get("secret")) == 32
    assert config.clients() == {PRINT.upper(): "allow me@laptop"}
    assert config.get("may", ["allow me@laptop"]) == [["O", "22/tcp"], ["E", "echo", "*"]]
    assert config.get("open_timeout", ["allow me@laptop", "server"], 3600) == 3600


def test_the_example_config_is_a_config_with_every_key(tmp_path):
    text = (HERE / "tariq.conf.example").read_text()
    config = tariq.Config(write_config(tmp_path / "tariq.conf", text.replace("secret =", f"secret = {SECRET}")))
    keys = {key for section in config.ini.sections() for key in config.ini[section]}
    for section in config.ini.sections():
        for key in config.ini[section]:
            config.get(key, [section], "")
    assert len(config.clients()) == 1
    used = set(re.findall(r'\.get\(f?"([a-z_{}]+)"', (HERE / "tariq.py").read_text()))
    assert keys == used - {"open_{protocol}_port"} | {"open_tcp_port", "open_udp_port", "key"}


PORTS_LINE = "secret_ports = 10000,7456,22022,12121,10001"


@pytest.mark.parametrize("old, new, words", [
    (PORTS_LINE, "secret_ports = 1,2,3,4", "[server] secret_ports: needs"),
    (PORTS_LINE, "secret_ports = 1,2,3,4,4", "needs 5"), (PORTS_LINE, "secret_ports = 1,2,3,4,65536", "needs 5"),
    (PORTS_LINE, "secret_ports = 1,2,3,4,x", "needs 5"), (PORTS_LINE, "", "[server] secret_ports is missing"),
    ("{secret}", "c2VjcmV0", "[server] secret: needs 32"), ("{secret}", "!" * 44, "[server] secret: needs 32"),
    ("{secret}", "", "[server] secret is missing"), ("    O 22", "    O 99999", "[allow me@laptop] may: needs"),
    ("    O 22", "    X 22", "may: needs"), ("    O 22", '    E "unbalanced', "may: needs"),
    ("{key}", "0123", "[allow me@laptop] key: needs a key's fingerprint"),
    ("may =", "open_timeout = soon\nmay =", "[allow me@laptop] open_timeout: needs a whole number"),
    ("[allow", "open_tcp_port = -A tariq -s {ip} -j ACCEPT\n[allow", "open_tcp_port: needs words with {ip} and"),
    ("[allow", "open_tcp_port = -A tariq --dport {dport}\n[allow", "open_tcp_port: needs words with {ip} and"),
    ("[allow", "open_tcp_port = -A tariq {ip} {dport} 'x\n[allow", "open_tcp_port: needs words with {ip} and"),
    ("[allow", "command_timeout = 0\n[allow", "1 to 999"), ("[allow", "command_timeout = 1000\n[allow", "1 to 999"),
    ("[allow", "iptables_chain = INPUT\n[allow", "a chain's name, its own")])
def test_each_fault_of_a_config_names_file_section_and_key_and_no_secret(tmp_path, old, new, words):
    config = tariq.Config(write_config(tmp_path / "tariq.conf", CONFIG.replace(old, new)))
    with pytest.raises(tariq.Fault) as caught:
        for key in ("secret_ports", "secret"):
            config.get(key)
        for key in ("open_tcp_port", "command_timeout", "iptables_chain"):
            config.get(key, default=1)
        for key in ("may", "key", "open_timeout"):
            config.get(key, ["allow me@laptop"], 1)
    assert words in str(caught.value) and str(tmp_path / "tariq.conf") in str(caught.value) and caught.value.code == 78
    assert SECRET not in str(caught.value) and "1,2,3,4" not in str(caught.value)


def test_a_file_that_is_no_ini_or_names_a_key_twice_is_refused_without_a_word_of_it(tmp_path):
    for text in ("no section", "[server]\nline without a key\n" + SECRET, "[a]\nx = 1\nx = 2\n", "[a]\n[a]\n"):
        with pytest.raises(tariq.Fault, match="is not INI") as caught:
            tariq.Config(write_config(tmp_path / "tariq.conf", text))
        assert SECRET not in str(caught.value)
    (tmp_path / "tariq.conf").write_bytes(b"\xff\xfe")
    with pytest.raises(tariq.Fault, match="is not INI"):
        tariq.Config(tmp_path / "tariq.conf")
    with pytest.raises(tariq.Fault, match="a key of its own"):
        tariq.Config(write_config(tmp_path / "twins", f"{CONFIG}[allow twin]\nkey = {PRINT.lower()}\n")).clients()


@pytest.mark.skipif(os.geteuid() != 0, reason="changes a file's owner")
def test_a_config_that_others_can_read_or_write_is_refused_and_root_obeys_only_its_own(tmp_path):
    for mode in (0o640, 0o604, 0o620, 0o666):
        with pytest.raises(tariq.Fault, match="chmod 600"):
            tariq.Config(write_config(tmp_path / "tariq.conf", mode=mode))
    path = write_config(tmp_path / "tariq.conf", user=NOBODY)
    assert tariq.Config(path), "a client that root runs takes its user's config"
    with pytest.raises(tariq.Fault, match="let root own"):
        tariq.Config(path, root=True)


def test_log_lines_cannot_be_forged(capfd):
    tariq.log("a\n<3>b\x1b[2J\ud800\u202e")
    assert capfd.readouterr().err == "a\\x0a<3>b\\x1b[2J\\xd800\\x202e\n"


def test_every_message_says_its_own_mend():
    """The words of each Fault in the program, as far as they are written there."""
    mends = (r"needs?\b|chmod|see |another name|try another|give |shorten|use more|stop it|enroll again|then join|"
             r"knock again|sudo|nothing was opened|not allowed to|still runs|did that fail|signed (it|no)|an image|"
             r"not one encrypted|has to belong|^gpg, keyring")
    tree, found = ast.parse(TARIQ.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Fault":
            words = "".join(part.value for part in ast.walk(node.args[1])
                            if isinstance(part, ast.Constant) and isinstance(part.value, str))
            if len(re.findall("[a-z]{2,}", words)) > 3:  # the rest are a program's own words
                found.append(words)
    assert len(found) > 25
    assert [words for words in found if not re.search(mends, words)] == []


# ---- promise 2: authenticate before you parse. Fuzzing ---------------------------------------------------------------

CASES = int(os.environ.get("TARIQ_FUZZ_CASES", 200_000))
PORTS = [1000, 2000, 3000, 4000, 5000]
LINK = ("eth0", 0x0800, 0, 1, bytes(6))


def bare_listener():
    listener = tariq.Listener(None, None, {"ports": PORTS, "key": KEY.hex()})
    listener.began = 0  # frames of this very second are good
    return listener


def packet_of(port, payload, version=4, udp=False, options=b"", flags=2):
    """An IP packet made by hand: what a fuzzer mutates."""
    ports, protocol = b"\x10\x00" + port.to_bytes(2, "big"), b"\x11" if udp else b"\x06"
    if udp:
        upper = ports + (8 + len(payload)).to_bytes(2, "big") + bytes(2) + payload
    else:
        upper = ports + bytes(8) + bytes([(5 + len(options) // 4) << 4, flags]) + bytes(6) + options + payload
    if version == 6:
        return b"\x60\0\0\0" + len(upper).to_bytes(2, "big") + protocol + b"\x40" + bytes(32) + upper
    return b"\x45\0" + (20 + len(upper)).to_bytes(2, "big") + bytes(5) + protocol + bytes(10) + upper


def test_the_gate_passes_a_frame_once_and_at_its_own_port_only():
    listener = bare_listener()
    for version, udp, position in itertools.product((4, 6), (False, True), range(6)):
        data, own = bytes([position]) + b"i" * 12 + b"piece", PORTS[min(position, 4)]
        for port in PORTS:
            if port != own:
                assert listener.gate(packet_of(port, make_frame(KEY, b"knock", data), version, udp), LINK) is None
        packet = packet_of(own, make_frame(KEY, b"knock", data), version, udp, options=b"\x02\x04\x05\xb4")
        assert listener.gate(packet, LINK)[:3] == (position, b"i" * 12, b"piece")
        assert listener.gate(packet, LINK) is None, "the same bytes twice are a replay"
    packet = packet_of(PORTS[4], make_frame(KEY, b"knock", bytes([6]) + b"i" * 13))
    assert listener.gate(packet, LINK) is None, "no such position"


def test_frames_from_before_the_listener_began_or_of_another_minute_are_refused(monkeypatch):
    listener, now = bare_listener(), time.time()

    def passes(age):
        return bool(listener.gate(packet_of(1000, make_frame(KEY, b"knock", b"\0" + b"i" * 13, age)), LINK))
    for age, good in ((58, True), (-58, True), (62, False), (-62, False), (3600, False)):
        assert passes(age) is good, age
    listener.began = now * 1000
    for age, good in ((0.01, False), (30, False), (-5, True)):
        assert passes(time.time() - now + age) is good, age
    monkeypatch.setattr(tariq.time, "time", lambda: now - 3600)  # the clock was put back: knocks go on working
    assert passes(0)


def test_the_replay_memory_is_bounded_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(tariq, "SEEN_MAX", 5)
    listener = bare_listener()
    packets = [packet_of(1000, make_frame(KEY, b"knock", b"\0" + b"i" * 13)) for _ in range(8)]
    assert all(listener.gate(packet, LINK) for packet in packets) and len(listener.seen) == 5
    assert [bool(listener.gate(packet, LINK)) for packet in packets[:2:-1]] == [False] * 5, "the newest are known"


def test_garbage_never_passes_the_gate_nor_leaves_anything_there():
    """Random, truncated and mutated packets before the tag."""
    chance, listener = random.Random(1), bare_listener()
    good = [packet_of(PORTS[place], make_frame(KEY, b"knock", bytes([place]) + bytes(12 + size)), version, udp)
            for place in range(5) for size in (1, 40, 900) for version in (4, 6) for udp in (False, True)]
    for case in range(CASES):
        kind = case % 4
        if kind == 0:
            packet = chance.randbytes(chance.randrange(0, 200))
        elif kind == 1:
            packet = packet_of(chance.choice(PORTS), chance.randbytes(chance.randrange(0, 300)), chance.choice((4, 6)),
                               chance.random() < 0.5, flags=chance.choice((2, 0x10, 0x18, 0x12)))
        else:
            packet = bytearray(chance.choice(good))
            if kind == 2:
                del packet[chance.randrange(len(packet)):]
                for _ in range(chance.randrange(3) if packet else 0):
                    packet[chance.randrange(len(packet))] = chance.randrange(256)
            else:  # at least one bit of what the tag covers
                size = 40 if packet[0] >> 4 == 6 else 20
                start = size + (8 if packet[6 if size == 40 else 9] == 17 else 20)
                packet[chance.randrange(start, len(packet))] ^= 1 << chance.randrange(8)
            packet = bytes(packet)
        assert listener.gate(packet, LINK) is None, packet.hex()
    assert not listener.seen and not listener.knocks and not listener.partial


def test_what_holders_of_the_secret_send_raises_nothing_and_is_bounded(monkeypatch):
    """After the tag: frames of every length with random contents, through gate and reassembly; no gpg is run."""
    chance, listener, served = random.Random(2), bare_listener(), []
    monkeypatch.setattr(tariq, "SEEN_MAX", 1000)
    monkeypatch.setattr(listener, "serve", lambda knock_id, knock: served.append(knock_id))
    for case in range(CASES // 10):
        data = chance.randbytes(chance.choice((0, 1, 12, 13, 14, 45, 900, 1166)))
        if data:
            data = bytes([chance.randrange(7)]) + data[1:]
        if case % 2 and len(data) > 13:
            data = data[:1] + b"constant id%d" % (case % 50 // 10) + data[13:]
        frame = make_frame(KEY, b"knock", data)
        packet = packet_of(chance.choice(PORTS), frame, chance.choice((4, 6)), chance.random() < 0.5)
        if passed := listener.gate(packet, LINK):
            listener.collect(*passed)
        assert len(listener.knocks) <= 256 and len(listener.partial) <= 256 and len(listener.seen) <= 1000
    assert served, "some were whole"


def whole_knocks(listener, addresses):
    """A whole knock from each address -> how many were given a thread."""
    before = len(listener.knocks)
    for address in addresses:
        knock_id = os.urandom(12)
        for place in range(5):
            packet = tariq.Packet(address, b"", 1, PORTS[place], b"", b"", LINK)
            listener.collect(place, knock_id, b"junk", packet)
    return len(listener.knocks) - before


def test_knocks_are_bounded_in_all_and_by_address_and_answered_ones_do_not_count(monkeypatch):
    listener = bare_listener()
    monkeypatch.setattr(listener, "serve", lambda *_: None)
    assert whole_knocks(listener, [b"\xc0\0\2\1"] * 40) == 16
    assert whole_knocks(listener, [bytes(8) + os.urandom(8) for _ in range(40)]) == 16, "one IPv6 /64"
    for knock in listener.knocks.values():
        knock.answered = True
    assert whole_knocks(listener, [b"\xc0\0\2\1"] * 40) == 16, "an office behind one NAT"
    assert whole_knocks(listener, [number.to_bytes(4, "big") for number in range(500)]) == 256 - 48
    for number in range(1000):  # fragments only: the oldest goes
        packet = tariq.Packet(b"new1", b"", 1, 1000, b"", b"", LINK)
        listener.collect(0, number.to_bytes(12, "big"), b"", packet)
    assert len(listener.partial) == 256 and (999).to_bytes(12, "big") in listener.partial


def test_hostile_images_are_refused():
    """Random, truncated, mutated and hostile PNGs: one error type, and no pixel of a bomb is decoded."""
    from PIL import Image
    chance, good, rows = random.Random(3), make_png(b"{}" * 100), bytes(36 * 109)
    text_bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))
    bombs = [png_of(60000, 60000, 8, 2, bytes(1000)), png_of(36, 36, 16, 2, bytes(36 * (1 + 36 * 6))),
             png_of(36, 36, 8, 3, bytes(36 * 37)), png_of(36, 36, 8, 2, b""), png_of(36, 36, 8, 2, bytes(10)),
             png_of(36, 36, 8, 6, bytes(36 * 145)), png_of(0, 0, 8, 2, b""), png_of(36, 36, 8, 2, rows, text_bomb),
             png_of(36, 36, 8, 2, b"\xff" * len(rows)), png_of(2**31 - 1, 1, 8, 2, b""),
             png_of(36, 36, 8, 2, rows, interlace=1)]
    for bomb in bombs:
        with contextlib.suppress(tariq.Fault):
            assert len(tariq.reveal(bomb)) <= 484
    for mode, size in (("RGB", (35, 36)), ("RGB", (400, 400)), ("P", (36, 36)), ("RGBA", (36, 36)), ("L", (36, 36))):
        Image.new(mode, size).save(output := io.BytesIO(), "PNG")
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


def test_hostile_openpgp_is_refused_within_bounds(world):
    """Mutated, truncated, unsigned, doubly signed, compressed bombs, symmetric, signed-only: each one a Fault, never a
    plaintext."""
    home = world.lab.dir / "hostile"
    home.mkdir(0o700)
    yesterday = "future-default", *at_time(-86400)
    one, two = (generate(home, user, *yesterday) for user in ("one@example.com", "two@example.com"))
    sealed = tariq.seal(str(home), b"plain" * 100, one, two)
    assert tariq.unseal(str(home), sealed, two) == (one, b"plain" * 100)

    def made(data, *arguments):
        return sh(*gpg(home, *arguments), input=data, text=False).stdout

    signed = "-u", one, "-r", two, "-s", "-e"
    bomb = made(bytes(8_000_000), *signed, "--compress-algo", "bzip2")
    assert len(bomb) < 2000, "a bomb that fits a knock"
    hostile = [made(b"x", "-r", two, "-e"), made(b"x", "-u", one, "-s"), made(b"x", "--store"), b"", bomb,
               made(b"x", "--clearsign"), made(b"x", "-u", two, *signed), sealed + sealed, made(b"x" * 8193, *signed),
               made(b"x", "--passphrase", "x", "--symmetric"), made(b"x", *at_time(-700), *signed)]
    for message in hostile:
        with pytest.raises(tariq.Fault):
            tariq.unseal(str(home), message, two)
    late = made(b"x", *at_time(-500), *signed)
    assert tariq.unseal(str(home), late, two) == (one, b"x"), "pinentry may take nine minutes"
    made(b"", "--quick-add-key", one, "ed25519", "sign")
    assert tariq.unseal(str(home), made(b"x", *signed), two) == (one, b"x"), "a subkey's primary key signs"
    packets = sh(*gpg(home, "--list-packets"), input=sealed, text=False, check=False).stdout
    assert b"keyid 0000000000000000" in packets and one[-16:].encode() not in packets.split(b":encrypted")[0], "hidden"
    chance = random.Random(4)
    for case in range(60):
        data = bytearray(sealed)
        if case % 3 == 0:
            del data[chance.randrange(len(data)):]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        with pytest.raises(tariq.Fault):
            tariq.unseal(str(home), bytes(data), two)
    sh("gpgconf", "--homedir", home, "--kill", "gpg-agent")


# ---- the exchange, spoken by a peer of its own -----------------------------------------------------------------------

def test_the_exchange_is_what_the_readme_says(box):
    result = Peer(box, "O", "22/tcp").knock()
    assert result[:2] == b"\x01\x00"
    assert result[2:].decode().startswith(f"opened tcp/22 for {box.client.ip} until ")
    assert len(box.server.rules()) == 1
    assert Peer(box, "E", "echo", "hi").knock() == b"\x01\x00hi\n"
    assert Peer(box, "O", "23/tcp").knock()[:2] == b"\x00\x4d"


def test_signed_but_hostile_requests_are_refused_and_the_server_goes_on(box):
    good = Peer(box).request
    changes = [{"to": good["to"].lower()}, {"to": None}, {"to": "0" * 40}, {"k": "00" * 32}, {"k": None},
               {"k": "00" * 65}, {"cmd": None}, {"cmd": []}, {"cmd": "Eid"}, {"cmd": ["O", 22]}, {"cmd": ["O", ["22"]]},
               {"cmd": ["E", "a\nb"]}]
    hostile = [b"", b"null", b"[]", b"{}", b"1", b"\xff\xfe", b"[" * 484, b'{"a":' * 90, b"9" * 484, b"NaN",
               b'{"to":"\\ud800"}', *(json.dumps({**good, **change}).encode() for change in changes)]
    for text in random.Random(5).sample(hostile, 12):
        peer = Peer(box).seal(make_png(text))
        before = box.tariq.log.count("knock refused")
        peer.send(peer.frames())
        wait_for(lambda: box.tariq.log.count("knock refused") > before, text)
        assert peer.hear(b"challenge", 0.1) is None
    assert Peer(box).knock()[:1] == b"\x01"


def test_a_wrong_answer_opens_nothing_and_the_right_one_still_does(box):
    peer = Peer(box).seal()
    peer.send(peer.frames())
    nonce = peer.hear(b"challenge")[:32]
    for wrong in (bytes(32), nonce[:31]):
        peer.answer(wrong)
    peer.send([(peer.ports[-1], make_frame(peer.K, b"knock", bytes([5]) + peer.id))])
    assert peer.hear(b"result", 0.3) is None and box.server.rules() == []
    peer.answer(nonce, socket_in(box.other, socket.AF_INET, socket.SOCK_DGRAM))  # right, but from another address
    assert peer.hear(b"result", 0.3) is None and box.server.rules() == []
    peer.answer(nonce)
    assert peer.hear(b"result")[:1] == b"\x01" and len(box.server.rules()) == 1
    again = box.tariq.log.count(": opened")
    peer.answer(nonce)
    assert peer.hear(b"result")[:1] == b"\x01" and box.tariq.log.count(": opened") == again, "said, not done again"


def test_the_first_last_fragment_says_whose_knock_it_is(box):
    """Somebody with the secret who can sniff sends the last fragment again, from his address, while the knock is
    collected."""
    peer, thief = Peer(box).seal(), Peer(box, host=box.other)
    *first, last = peer.frames()
    peer.send([last])
    time.sleep(0.1)
    thief.send([peer.frames()[-1]])  # a frame of its own
    time.sleep(0.1)
    peer.send(first)
    assert peer.hear(b"challenge")[34:].decode() == box.client.ip
    assert peer.hear(b"challenge", 0.3, thief.socket) is None


def test_the_secret_cannot_pass_a_challenge_off_as_a_result(box):
    """Replies are under a key that only who unsealed the request has: nothing under K or with another label is one."""
    peer = Peer(box).seal()
    peer.send(peer.frames())
    payload = peer.socket.recv(2048)
    assert open_frame(peer.reply_key, b"challenge", payload) is not None
    for key in (peer.K, peer.reply_key):
        assert open_frame(key, b"result", payload) is None
    assert open_frame(peer.K, b"challenge", payload) is None


def test_an_old_request_in_new_frames_and_one_of_another_knock_or_server_are_refused(box):
    conf = box.lab.dir / "aged" / "tariq.conf"
    for path in (conf.parent, conf.parent / "gpg"):
        sh("install", "-d", "-m", "700", "-o", NOBODY, "-g", NOBODY, path)
    run = lambda *words: box.client.run(*words, user=NOBODY)  # noqa: E731
    generate(conf.parent / "gpg", "aged@example.com", "future-default", *at_time(-86400), run=run)
    second_client(box, "aged")
    old = Peer(box, conf=conf)
    early = *at_time(-660), "--ignore-time-conflict", "--ignore-valid-from"
    old.seal(None, *early, "-u", f"<{old.user}>", "-s", "-e").send(old.frames())
    box.tariq.wait_log("signed it more than 600 s from now")
    other, elsewhere = Peer(box).seal(), Peer(box, to="0" * 40).seal()
    other.send(other.frames(knock_id=os.urandom(12)))
    elsewhere.send(elsewhere.frames())
    box.tariq.wait_log("for another server or knock", 2)
    for age in (62, -62):
        late = Peer(box).seal()
        late.send(late.frames(age))
        assert late.hear(b"challenge", 0.2) is None
    assert [peer.hear(b"challenge", 0.1) for peer in (old, other, elsewhere)] == [None] * 3


def test_a_refused_knock_that_is_repeated_starts_no_gpg(box):
    peer = Peer(box).seal(b"x" * 4000)
    before = box.tariq.log.count("knock refused")
    for _ in range(6):
        peer.send(peer.frames())
        time.sleep(0.1)
    assert box.tariq.log.count("knock refused") == before + 1


def test_a_bomb_of_nested_compression_is_worth_a_second_and_keeps_nobody_out(box):
    """Unsigned, from a holder of the secret: encrypted to the server with its public key, which each client has."""
    literal = b"\xafb\0" + bytes(4) + bytes(1 << 28)  # all lengths are indeterminate (RFC 4880, 4.2.1)
    bomb = b"\xa3\x03" + bz2.compress(b"\xa3\x03" + bz2.compress(literal))
    attackers = [Peer(box, host=box.other) for _ in range(12)]
    sealed = attackers[0].seal(bomb, "--no-literal", "--compress-algo", "none", "-e").sealed
    assert len(sealed) < 5000
    for attacker in attackers:
        attacker.sealed = sealed
        attacker.send(attacker.frames())
    opens(box)
    refused = f"{box.other.ip}: knock refused: gpg"
    wait_for(lambda: box.tariq.log.count(refused) >= 12, "the bombs are not over", 12 * 1.5 + 5)
    ended = re.findall(f"{refused}.*exit status -9", box.tariq.log)
    assert len(ended) >= 12 and box.tariq.process.poll() is None, "each was ended at its time"


# ---- a knock opens a port on a real host, and nothing else does ------------------------------------------------------

def test_an_unprivileged_knock_opens_the_port_for_its_address_alone_and_nmap_sees_nothing(box):
    def scan():
        """Every port of the server, as nmap on a third host sees it."""
        report = box.other.run("nmap", "-n", "-Pn", "-sS", "-p-", "--min-rate", "30000", "--max-retries", "0",
                               "-oG", "-", box.server.ip, timeout=120).stdout
        assert "Ports:" not in report or "/open/" not in report and "/closed/" not in report, report
    scan()
    assert not box.client.connects(box.server.ip)
    done = knock(box, "O", "22")
    assert done.returncode == 0 and done.stderr == ""
    assert re.fullmatch(rf"opened tcp/22 on box for {box.client.ip} until \d\d:\d\d:\d\dZ\n", done.stdout)
    assert box.client.connects(box.server.ip) and not box.other.connects(box.server.ip)
    scan()
    assert opens(box, "C", "22") == f"closed tcp/22 on box for {box.client.ip}\n"
    assert not box.client.connects(box.server.ip)


@pytest.mark.parametrize("where", ["box", "box6"])
@pytest.mark.parametrize("transport", ["kernel", "udp", "crafted"])
def test_all_transports_knock_over_both_families(box, transport, where):
    address, own = (box.server.ip, box.client.ip) if where == "box" else (box.server.ip6, box.client.ip6)
    done = knock(box, "O", "22", where=where, transport=transport, options=["-v"])
    assert f"opened tcp/22 on {where} for {own} until" in done.stdout, done.stderr + box.tariq.log
    assert f"{transport.capitalize()}Transport" in done.stderr
    assert box.client.connects(address) and not box.other.connects(address)
    opens(box, "C", "22", where=where, transport=transport)
    assert not box.client.connects(address)


def test_without_transport_a_client_takes_turns_kernel_first_also_as_root(box):
    for user in (None, NOBODY):
        done = knock(box, "C", "22", user=user, options=["-v"])
        assert "go by KernelTransport" in done.stderr and "UdpTransport" not in done.stderr and done.returncode == 0
    box.me.write_text(box.me.read_text().replace(box.server.ip, "198.51.100.99"))
    done = knock(box, "C", "22", timeout=3, options=["-v"])
    assert "".join(re.findall("go by (.)", done.stderr)).startswith("KUKU")


def test_hosts_are_names_aliases_or_literal_addresses(box):
    netns, text = Path("/etc/netns") / box.client.netns, box.me.read_text().replace(f"host = {box.server.ip}\n", "")
    existed = netns.parent.exists()
    netns.mkdir(parents=True)
    try:
        names = "".join(f"{ip} box.example.com\n" for ip in (box.server.ip6, box.server.ip))
        (netns / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        for name, options, own in (("box.example.com", ["-4"], box.client.ip), (box.server.ip, [], box.client.ip),
                                   ("box.example.com", ["-6"], box.client.ip6), (box.server.ip6, [], box.client.ip6)):
            box.me.write_text(text.replace("[box]", f"[{name}]"))
            assert f"on {name} for {own}" in opens(box, "O", "22", where=name, options=options)
        done = knock(box, "O", "22", where=box.server.ip6, options=["-4"])
        assert done.returncode == NO_ANSWER and box.server.ip6 in done.stderr
    finally:
        shutil.rmtree(netns if existed else netns.parent)


def test_several_ports_tcp_and_udp_open_and_close_without_duplicate_rules(box):
    assert "opened tcp/22, tcp/8022, udp/53 on box" in opens(box, "O", "22", "8022", "53/udp")
    rules = box.server.rules()
    assert len(rules) == 3 and all(f"-s {box.client.ip}/32" in rule and "--datestop" in rule for rule in rules)
    assert sum("-p udp" in rule and "--dport 53 " in rule for rule in rules) == 1
    time.sleep(1.1)
    opens(box, "O", "22", "53/udp")
    renewed = box.server.rules()
    assert len(renewed) == 3 and renewed != rules, "the deadline is renewed, the rule is not doubled"
    opens(box, "C", "22", "53/udp", "8022")
    assert box.server.rules() == []
    opens(box, "C", "22")  # what is closed already


def test_commands_run_as_root_without_a_shell_and_their_status_comes_back(box):
    assert opens(box, "E", "id", "-u") == "0\n"
    words = "$(id) `id`; id | cat > /tmp/x && * 'quoted' -n --".split()
    assert opens(box, "E", "echo", *words) == " ".join(words) + "\n"
    assert knock(box, "E", "false").returncode == 1
    done = knock(box, "E", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, "out\nerr\n")
    assert knock(box, "E", "sh", "-c", "kill -9 $$").returncode == 137
    done = knock(box, "E", "nonexistent-program")
    assert done.returncode == 127 and "No such file" in done.stdout
    environment = opens(box, "E", "sh", "-c", "env; pwd; readlink /proc/self/fd/0; echo $TZ")
    assert environment.count("\n") <= 9 and "hunter2" not in environment and environment.endswith("/\n/dev/null\n\n")


def test_a_command_has_a_time_limit_that_its_children_share_and_bounded_output(box):
    assert knock(box, "E", "yes").returncode == 137
    began = time.monotonic()
    done = knock(box, "E", "sh", "-c", "trap '' TERM; sleep 4242 & sleep 4242; true")
    assert done.returncode == 137 and time.monotonic() - began < 15
    assert eventually(lambda: box.server.run("pgrep", "-f", "^sleep 4242$", check=False).stdout == "", 3)
    assert opens(box, "E", "head", "-c", "100000", "/dev/zero") == "\0" * 1164
    assert opens(box, "E", "sh", "-c", "sleep 30 & echo started") == "started\n", "what it leaves behind holds the pipe"


def test_one_users_running_command_stops_neither_doors_nor_other_knocks(box):
    with knocking(box, "E", "sleep", "60") as slow:
        box.tariq.wait_log("+ sleep 60")
        opens(box)
        done = knock(box, "E", "echo", "hi")
        assert done.returncode == REFUSED and "still runs" in done.stderr
        assert slow.wait(20) == 137


def test_what_is_not_allowed_is_refused_with_a_signed_answer_and_logged(box):
    for words in (("O", "23"), ("O", "22", "23"), ("O", "22/udp"), ("C", "25"), ("E", "reboot"), ("E", "id"),
                  ("E", "sleep", "61")):
        done = knock(box, *words)
        assert done.returncode == REFUSED and "refused" in done.stderr and done.stdout == ""
        assert words[-1].split("/")[0] in done.stderr
    assert box.server.rules() == []
    assert f"me@laptop {box.client.ip} O 22/tcp 23/tcp: refused" in box.tariq.log


# ---- mutual authentication that holds --------------------------------------------------------------------------------

def test_unknown_expired_and_revoked_keys_get_silence(box):
    unknown, late, gone = (second_client(box, name) for name in ("deleted", "expired", "revoked"))
    assert [knock(box, "O", "22", conf=path).returncode for path in (unknown, late, gone)] == [0, 0, 0]
    run = lambda *words: box.client.run(*words, user=NOBODY)  # noqa: E731
    ids = {path: fingerprint(path.parent / "gpg", f"{path.parent.name}@example.com", run)
           for path in (unknown, late, gone)}
    server_gpg(box, "--delete-keys", ids[unknown])  # though still in [allow]
    run(*gpg(late.parent / "gpg", "--quick-set-expire", ids[late], "seconds=1"))
    server_gpg(box, "--import", input=run(*gpg(late.parent / "gpg", "--armor", "--export", ids[late])).stdout)
    time.sleep(1)  # the client's own copy is good again, by a later signature: else its gpg would refuse to sign
    run(*gpg(late.parent / "gpg", "--quick-set-expire", ids[late], "0"))
    certificate = (gone.parent / "gpg" / "openpgp-revocs.d" / f"{ids[gone]}.rev").read_text()  # gpg makes one for each
    server_gpg(box, "--import", input=certificate.replace(":-----BEGIN", "-----BEGIN"))
    time.sleep(1.5)
    opens(box, "C", "22")
    for path, words in ((unknown, "ERRSIG NO_PUBKEY"), (late, ""), (gone, "")):
        seen = box.tariq.log.count("knock refused")
        with captured(box.server, "-Q", "out", "tcp or udp") as packets:
            done = knock(box, "O", "22", conf=path, timeout=2)
            assert done.returncode == NO_ANSWER and "no answer from box" in done.stderr
        assert not [1 for segment in segments(packets) if segment.payload], "not a byte in answer"
        assert box.tariq.log.count("knock refused") == seen + 1 and words in box.tariq.log
    assert box.server.rules() == []


def test_policy_is_read_afresh_and_a_removed_section_is_a_removed_client(box):
    conf = second_client(box, "stranger")
    assert knock(box, "C", "22", conf=conf).returncode == REFUSED
    text = box.conf.read_text()
    for broken, words in ((text.replace("[allow stranger@example.com]", "[allow stranger"), "is not INI"),
                          (f"{text}\n[allow twin]\nkey = {'0' * 40}\n[allow other]\nkey = {'0' * 40}\n", "of its own")):
        box.conf.write_text(broken)
        done = knock(box, "O", "22", conf=conf)
        assert done.returncode == 78 and words in done.stderr and words in box.tariq.log, "refused; the log says why"
    for owner, mode in ((0, 0o644), (NOBODY, 0o600)):
        write_private(box.conf, text, owner, mode)
        done = knock(box, "O", "22", conf=conf)
        write_private(box.conf, text)
        assert done.returncode == 78 and "chmod 600" in done.stderr, "root obeys its own file only"
    opens(box, "O", "22", conf=conf)  # and the server goes on
    opens(box, "C", "22")
    box.conf.write_text(re.sub(r"(?ms)^\[allow stranger.*?(?=^\[|\Z)", "", text))
    done = knock(box, "O", "22", conf=conf)
    assert done.returncode == REFUSED and "not allowed" in done.stderr and box.server.rules() == []


def test_a_relayed_knock_is_noticed_by_a_client_that_knows_its_address(box):
    """A man in the middle sends the client's fragments from its own address and passes the challenge back: the client
    sees another address in it than its own, if that is public, and does not answer."""
    change = "openers = tariq.open_transports\ntariq.open_transports = lambda *a: (openers(*a)[0], {0!r})"
    done = knock(box, "O", "22", change=change.format("64:ff9b::cb00:714d"))
    assert done.returncode == 76 and "relays the knock" in done.stderr and box.client.ip in done.stderr
    assert box.server.rules() == []
    for own in ("192.168.7.7", "100.64.0.7", "fe80::7", "fd00::7"):
        opens(box, "O", "22", change=change.format(own))  # behind NAT nobody can know


def rsa_client(box, algorithm, directory):
    """A client's keyring with an RSA key of its own -> the path its config will have, its user."""
    conf, user = box.lab.dir / directory / "tariq.conf", f"{directory}@example.com"
    for path in (conf.parent, conf.parent / "gpg"):
        sh("install", "-d", "-m", "700", "-o", NOBODY, "-g", NOBODY, path)
    generate(conf.parent / "gpg", user, algorithm, run=lambda *words: box.client.run(*words, user=NOBODY))
    return conf, user


@pytest.mark.parametrize("algorithm", ["rsa2048", "rsa3072"])
def test_rsa_keys_fit_their_packets(box, algorithm):
    conf, user = rsa_client(box, algorithm, f"{algorithm}-client")
    second_client(box, conf.parent.name, ("O 22", "E head *"))
    with captured(box.server) as packets:
        assert "opened tcp/22" in opens(box, "O", "22", conf=conf)
        assert len(opens(box, "E", "head", "-c", "3000", "/dev/zero", conf=conf)) == 1164
    assert 1200 < max(len(frame) for _, frame in packets) <= 1280 + 14, "what IPv6's least MTU takes"


def test_an_rsa_4096_server_with_an_rsa_4096_client(idle):
    ring, user = idle.lab.dir / "rsa-ring", pwd.getpwnam("tariq").pw_uid
    sh("install", "-d", "-m", "700", "-o", "tariq", "-g", "tariq", ring)
    key = generate(ring, "server@example.com", "rsa4096", run=lambda *words: sh(*as_user(user), *words, cwd="/"))
    conf = make_server(idle.lab, idle.server, "rsa-server", server_gpg_dir=ring, server_key=key)
    client, user = rsa_client(idle, "rsa4096", "rsa-other")
    client = make_client(idle.lab, idle.client, idle.server, conf, user, directory="rsa-other")
    server = Server(idle.lab, idle.server, conf).wait_log("listening for")
    for where in ("box", "box6"):
        assert "opened tcp/22" in opens(idle, "O", "22", conf=client, where=where)
    assert server.stop() == 0


# ---- promise 4: silence ----------------------------------------------------------------------------------------------

def test_random_data_on_the_right_ports_draws_nothing_not_even_icmp(box):
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    macs = [link_state(host)["address"] for host in (box.client, box.server)]
    start, noise = Ether(src=macs[0], dst=macs[1]), socket_in(box.client, socket.AF_INET, socket.SOCK_DGRAM)
    before = box.tariq.log
    with captured(box.server, "ip") as packets:
        for size in (1, 40, 46, 900, 898, 1160):
            inject(box.client, [bytes(start / IP(src=box.client.ip, dst=box.server.ip)
                                      / TCP(sport=40000, dport=port, flags="S") / os.urandom(size))
                                for port in box.ports], times=20)
            for number in range(200):
                noise.sendto(os.urandom(size), (box.server.ip, box.ports[number % 5]))
    assert len(segments(packets)) >= 6 * 300, "they arrived"
    assert all(frame[26:30] == socket.inet_aton(box.client.ip) for _, frame in packets), "no answer"
    assert box.tariq.log == before, "nor a line in the log"


def test_payloads_of_fifty_exchanges_look_random_and_carry_no_markers(box):
    with captured(box.server) as packets:
        for turn in range(50):
            opens(box, "O" if turn % 2 else "C", "22", transport=("kernel", "udp")[turn % 2])
    payloads = [each.payload for each in segments(packets)
                if each.payload and {each.source, each.port} & set(box.ports)]
    assert len(payloads) >= 50 * 8 and len(set(payloads)) == len(payloads), "no two are alike"
    everything = b"".join(payloads)
    for marker in (b"\x89PNG", b"IHDR", b"IDAT", b"IEND", b"-----BEGIN", b"OpenPGP", b"example", b"laptop"):
        assert marker not in everything

    # Byte frequencies: chi-square, 255 degrees of freedom: mean 255, standard deviation 22.6; 6 of those are 1 in 1e8.
    def chi_square(data):
        expected = len(data) / 256
        return sum((data.count(bytes([value])) - expected) ** 2 / expected for value in range(256))
    assert chi_square(everything) < 255 + 6 * 22.6
    # Position by position too: a fixed header, key id or length anywhere would show in the first or last bytes.
    for column in [[payload[place] for payload in payloads] for place in (*range(40), *range(-8, 0))]:
        assert max(column.count(value) for value in set(column)) < 18, "400 random bytes have hardly ever 18 of a kind"


def test_repeats_are_new_frames(box):
    with captured(box.server, "tcp") as packets:
        opens(box, "O", "22", change="tariq.WAIT = 0.01", transport="kernel")
    payloads = [each.payload for each in segments(packets) if each.payload and each.flags == 2]
    assert len(payloads) >= 10 and len(set(payloads)) == len(payloads)


def test_replies_look_like_linuxs_own(box):
    """DF and a zero id in SYN-ACK and UDP, a random id in the connection; Linux's options, windows, flow label."""
    for where, six in (("box", False), ("box6", True)):
        for transport in ("kernel", "udp"):
            with captured(box.server, "-Q", "out", "ip or ip6") as packets:
                opens(box, "C", "22", where=where, transport=transport)
            replies = [frame[14:] for _, frame in packets if frame[20 if six else 23] in (6, 17) and len(frame) > 90]
            assert len(replies) == 2, "a challenge and a result"
            for number, ip in enumerate(replies):
                if six:
                    assert ip[7] == 64 and int.from_bytes(ip[:4], "big") & 0xFFFFF, "hop limit, flow label"
                else:
                    assert ip[8] == 64 and ip[6:8] == b"\x40\0" and ip[1] == 0, "TTL, DF, TOS"
                    assert (ip[4:6] == b"\0\0") is (transport == "udp" or number == 0)
                if transport == "kernel":
                    tcp = ip[40 if six else 20:]
                    options, window = tcp[20:(tcp[12] >> 4) * 4], int.from_bytes(tcp[14:16], "big")
                    if number == 0:
                        mss = (1440 if six else 1460).to_bytes(2, "big")
                        assert options == b"\2\4" + mss + b"\1\1\4\2\1\3\3\7" and tcp[13] == 0x12
                        assert window == (64800 if six else 64240)
                    else:
                        assert options == b"" and tcp[13] == 0x18 and window == 501


def test_the_secret_alone_gets_no_answer_and_starves_nobody_else(box):
    """Somebody with the shared secret and no key: knocks that are whole and authentic and carry junk."""
    before, stop, insider = rss(box.tariq.listener), threading.Event(), Peer(box, host=box.other)

    def flood():
        for turn in itertools.count():
            insider.sealed, knock_id = os.urandom(4250), os.urandom(12)
            frames = insider.frames(knock_id=knock_id)
            if turn % 2:  # at the wrong ports
                frames = [(port, frame) for (port, _), (_, frame) in zip(frames, frames[1:] + frames[:1])]
            insider.send(frames)
            time.sleep(0.002)
            if stop.is_set():
                return turn
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sender = pool.submit(flood)
        try:
            time.sleep(1)
            for _ in range(8):
                opens(box)
        finally:
            stop.set()
        assert sender.result() > 300
    assert not select.select([insider.socket], [], [], 0)[0], "no packet came to the insider"
    assert f"{box.other.ip}: knock refused" in box.tariq.log and box.server.rules()[0].count(box.client.ip) == 1
    assert rss(box.tariq.listener) - before < 20, "MB"


# ---- disorder, duplication, several at once --------------------------------------------------------------------------

@pytest.mark.parametrize("order", ["reversed", "doubled", "shuffled", "halves"])
def test_fragments_may_arrive_in_any_order_and_more_than_once(box, order):
    peer = Peer(box).seal()
    frames = peer.frames()
    sent = {"reversed": frames[::-1], "doubled": sorted(frames + peer.frames()), "shuffled": random.sample(frames, 5),
            "halves": frames[3:] + frames[:3]}[order]
    for part in (sent[:3], sent[3:]):
        peer.send(part)
        time.sleep(0.1 if order == "halves" else 0)
    peer.answer(peer.hear(b"challenge")[:32])
    assert peer.hear(b"result")[:1] == b"\x01" and len(box.server.rules()) == 1


def test_a_wrong_sequence_of_ports_never_assembles(box):
    ports = ",".join(map(str, [box.ports[1], box.ports[0], *box.ports[2:]]))
    done = knock(box, "O", "22", timeout=1, options=["-p", ports])
    assert done.returncode == NO_ANSWER and "wrong secret_ports" in done.stderr and box.server.rules() == []


@pytest.fixture(scope="module")
def nat(world):
    """A home: two hosts behind a router that masquerades and forwards nothing but what its own hosts began."""
    lab, router = world.lab, Host(world.lab, "router", 40)
    lab.plug(router, "eth0", f"{router.ip}/24")
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    inside = [Host(lab, f"home{number}", 10, prefix=f"192.168.{number}") for number in (1, 2)]
    for number, host in enumerate(inside, 1):
        lab.cable(host, "eth0", router, f"in{number}", [f"{host.ip}/24"], [f"192.168.{number}.1/24"])
        host.run("ip", "route", "add", "default", "via", f"192.168.{number}.1")
    for rule in ("-t nat -A POSTROUTING -o eth0 -j MASQUERADE", "-P FORWARD DROP",
                 "-A FORWARD -m conntrack --ctstate INVALID -j DROP", "-A FORWARD ! -i eth0 -o eth0 -j ACCEPT",
                 "-A FORWARD -i eth0 -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"):
        router.run("iptables", *rule.split())
    return SimpleNamespace(router=router, inside=inside)


@pytest.mark.parametrize("transport", ["kernel", "udp", "crafted"])
def test_the_exchange_passes_a_stateful_nat_router(box, nat, transport):
    assert f"for {nat.router.ip} until" in opens(box, "O", "22", host=nat.inside[0], transport=transport)
    assert nat.inside[0].connects(box.server.ip) and not box.other.connects(box.server.ip)


def test_two_clients_behind_one_nat_knock_at_once(box, nat):
    second = second_client(box, "neighbour", allow=("O 8022",))
    for _ in range(3):
        with knocking(box, "O", "22", host=nat.inside[0]) as one, \
                knocking(box, "O", "8022", host=nat.inside[1], conf=second) as two:
            assert one.wait(20) == 0 and two.wait(20) == 0, one.stderr.read() + two.stderr.read() + box.tariq.log
        rules = box.server.rules()
        assert len(rules) == 2 and all(f"-s {nat.router.ip}/32" in rule for rule in rules)


def test_twelve_clients_at_once_all_get_in(box):
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(knocking(box, "O", "22")) for _ in range(12)]
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


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="no tun devices here")
def test_knocks_arrive_through_a_tunnel_that_has_no_link_header(box):
    """As on a VPN's or a PPP interface: IPv4 and IPv6, all transports, the least MTU of IPv6."""
    box.server.run("iptables", "-A", "INPUT", "-i", "eth0", "-p", "udp", "--dport", "5555", "-j", "ACCEPT")
    ends = ((box.server, box.client, "203.0.113.1", "2001:db8:9::1"),
            (box.client, box.server, "203.0.113.2", "2001:db8:9::2"))
    try:
        for host, other, ip, ip6 in ends:
            end = host.popen(sys.executable, "-c", TUNNEL, host.ip, other.ip, stdout=PIPE)
            assert end.stdout.readline() == "ready\n"
            set_up_link(host, "tun0", f"{ip}/30", f"{ip6}/64")
            host.run("ip", "link", "set", "tun0", "mtu", "1280")
        box.me.write_text(box.me.read_text().replace(box.server.ip6, ends[0][3]).replace(box.server.ip, ends[0][2]))
        for where, own in (("box", ends[1][2]), ("box6", ends[1][3])):
            for transport in ("kernel", "udp", "crafted"):
                assert f"for {own} until" in opens(box, "O", "22", where=where, transport=transport)
    finally:
        box.server.run("iptables", "-D", "INPUT", "-i", "eth0", "-p", "udp", "--dport", "5555", "-j", "ACCEPT")
        for host, *_ in ends:
            host.run("ip", "link", "del", "tun0", check=False)


# ---- the monitor believes nothing ------------------------------------------------------------------------------------

MONITOR = r"""
# A real monitor with its real config in a host, and a hostile listener at the other end of the channel.
import importlib.util, json, os, socket, sys
spec = importlib.util.spec_from_file_location("tariq", sys.argv[1])
tariq = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tariq)
tariq.need_root()
config = tariq.Config(sys.argv[2], root=True)
monitor = tariq.Monitor(config, None)
monitor.prepare()
key = next(iter(config.clients()))
def message(knock_id="00" * 12, signer=key, command=["O", "22"], ip="c0000207"):
    return json.dumps([knock_id, signer, command, ip]).encode()
hostile = [b"", b"{}", b"[]", b"7", b"null", b"\xff", b"[" * 8000, b'{"a":' * 1500, message("x"), message(3),
           message()[:-1], *(message(signer=it) for it in ("x" * 40, None, [key], "0" * 40)),
           *(message(command=it) for it in ("O 22", [], ["O"], ["O", 22], ["O", None], ["O", "*"], ["O", "22", "-j"],
             ["O", "23"], ["E", "reboot"], ["E"], ["E", "echo\nx"], [["O", "22"]], {"O": "22"}, "Eid", ["O", "٢٢"])),
           *(message(ip=it) for it in ("192.0.2.7", "00", "c00002", "-j ACCEPT", 5, None, ["c0000207"], "00" * 17)),
           json.dumps("a log line\n<3>forged " + "x" * 3000).encode()]
monitor.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
for case in hostile:
    monitor.handle(case[:tariq.MESSAGE_MAX])
theirs.setblocking(False)
def answers():
    try:
        while True:
            yield theirs.recv(9000)
    except BlockingIOError:
        return
print("answers that say done:", sum(answer[tariq.ID] for answer in answers()), "doors:", len(monitor.doors))
for number in range(2000):  # more answers than the channel holds, and nobody reads them
    monitor.handle(message(command=["O", "23"]))
list(answers())
monitor.handle(message())
print("doors after a good request:", len(monitor.doors))
monitor.stop()
"""


def test_a_listener_that_was_taken_over_gets_refusals_only_and_cannot_stop_the_monitor(idle):
    done = idle.server.python(MONITOR, idle.lab.dir / "tariq.py", idle.conf)
    assert "answers that say done: 0 doors: 0\n" in done.stdout and "doors after a good request: 1" in done.stdout
    assert "Traceback" not in done.stderr and done.stderr.count("malformed message") > 15
    assert "\n<3>forged" not in done.stderr and max(map(len, done.stderr.splitlines())) < 1100
    assert idle.server.rules() == [], "stop() flushes"


# ---- errors ----------------------------------------------------------------------------------------------------------

def test_every_error_of_the_client_is_one_line_with_its_own_code(box):
    loose = write_private(box.lab.new("loose"), box.me.read_text(), NOBODY, 0o644)
    unreadable = write_private(box.lab.new("unreadable"), box.me.read_text())
    (covers := box.lab.new("covers")).mkdir()
    cases = [((), {}, 64, "required"), (("X", "22"), {}, 64, "invalid choice"), (("O",), {}, 64, "needs O PORT"),
             (("O", "0"), {}, 64, "needs ports"), (("O", "99999"), {}, 64, "needs ports"), (("E",), {}, 64, "needs O"),
             (("O", "ssh"), {}, 64, "needs ports"), (("E", "a\nb"), {}, 64, "printable"),
             (("E", "echo", "x" * 900), {}, 64, "bytes too long"), (("O", "23"), {}, 77, "not allowed to"),
             (("O", "22"), dict(options=["-p", "1,2,3"]), 64, "needs 5 to 32"),
             (("O", "22"), dict(options=["-t", "x"]), 64, "invalid int value"),
             (("O", "22"), dict(options=["-i", covers]), 65, "needs PNG images"),
             (("O", "22"), dict(options=["-u", "who@example.com"]), 65, "gpg, keyring"),
             (("O", "22"), dict(options=["-g", "/nonexistent"]), 69, "No such file or directory: '/nonexistent"),
             (("O", "22"), dict(options=["--transport", "pigeon"]), 64, "invalid choice"),
             (("O", "22"), dict(conf=box.me.parent / "none.conf"), 69, "none.conf': apt-get install"),
             (("O", "22"), dict(conf=loose), 78, "chmod 600"),
             (("O", "22"), dict(conf=unreadable), 71, "Permission denied"),
             (("O", "22"), dict(where="unknown.example.com"), 78, "[unknown.example.com] server_key is missing"),
             (("O", "22"), dict(options=["--transport", "crafted"]), 71, "CAP_NET_RAW")]
    for words, how, code, text in cases:
        done = knock(box, *words, **how)
        assert done.returncode == code and text in done.stderr, (words, how, done)
        assert done.stderr.startswith("tariq: ") and done.stderr.count("\n") == 1 and done.stdout == "", done
    said = box.lab.tariq(box.client, "--help").stdout
    assert all(f"{code} " in said for code in (0, 64, 65, 69, 70, 71, 75, 76, 77, 78))


def test_a_missing_program_or_package_is_named_with_what_to_install(box):
    for module, options, user in (("PIL", ["-i", "/tmp"], NOBODY), ("scapy", ["--transport", "crafted"], None)):
        done = knock(box, "O", "22", user=user, options=options, change=f"sys.modules['{module}'] = None")
        assert done.returncode == 69 and "apt-get install" in done.stderr and module in done.stderr
        assert done.stderr.count("\n") == 1
    program = box.lab.dir / "tariq.py"
    for hidden, host, argv, user, words in (
            ("/usr/bin/gpg", box.client, ("knock", "-c", box.me, "box", "O", "22"), NOBODY, "gpg"),
            ("/usr/sbin/xtables-nft-multi", box.other, ("server", "-c", box.conf), None, "iptables"),
            ("/usr/bin/gpg", box.other, ("server", "-c", box.conf), None, "gpg")):
        cover = f"mount --bind /dev/null {os.path.realpath(hidden)} && exec \"$@\""  # in a mount namespace of its own
        inner = as_user(user) if user else []
        done = host.run("sh", "-c", cover, "sh", *inner, program, *argv, check=False)
        assert done.returncode in (69, 70, 71) and words in done.stderr and "Traceback" not in done.stderr, done


def test_a_request_that_its_packets_cannot_carry_is_refused_before_it_is_sent(box):
    with captured(box.server) as packets:
        done = knock(box, "O", "22", change="tariq.FRAME_MAX = 600")
        assert done.returncode == 78 and "bytes do not fit 5 packets: use more secret_ports" in done.stderr
    assert not [1 for segment in segments(packets) if segment.port in box.ports]


def test_every_error_of_the_server_is_one_line_with_its_own_code(box):
    text, key = box.conf.read_text(), config_values(box.conf, "server")["server_key"]
    cases = [(f"server_key = {key}", "server_key = me", 78, "server_key: needs a key's fingerprint"),
             (f"server_key = {key}", "", 78, "server_key is missing"),
             (f"server_key = {key}", f"server_key = {key[::-1]}", 65, "the listener died"),
             ("server_gpg_dir = ", "server_gpg_dir = /nonexistent", 69, "/nonexistent"),
             ("[server]", "[server]\nopen_tcp_port = -A tariq {ip} {dport} {until} --nonsense", 71, "iptables"),
             ("[server]", "[server]\nopen_tcp_port = -A other {ip} {dport} {until}", 78, "iptables_chain"),
             ("[server]", "[server]\nopen_command = true {ip} {dport}", 78, "close_command is missing"),
             ("[server]", "[sever]", 78, "[server]"), ("[server]", "[server]", 78, "chmod 600")]
    for old, new, code, words in cases:
        path = write_private(box.lab.new("variant"), text.replace(old, new), mode=0o600 if old != new else 0o644)
        done = box.lab.tariq(box.other, "server", "-c", path, check=False)
        lines = [line for line in done.stderr.splitlines() if line.startswith("tariq: ")]
        assert done.returncode == code and len(lines) == 1 and words in lines[0], (new, done)
    done = box.lab.tariq(box.other, "server", "-c", box.conf, user=NOBODY, check=False)
    assert done.returncode == 71 and "root" in done.stderr


def test_a_second_server_with_the_same_chain_does_not_start(box):
    done = box.lab.tariq(box.server, "server", "-c", box.conf, check=False)
    assert done.returncode == 71 and "runs already" in done.stderr and "+ iptables" not in done.stderr
    opens(box)


def test_a_hostile_server_draws_no_traceback_and_steers_no_terminal(box):
    """Its replies are right but for their contents: changed where the client has opened them."""
    wrap = ("unframe = tariq.unframe\n"
            "def hostile(key, label, payload, least):\n"
            "    opened = unframe(key, label, payload, 0)\n"
            "    data = opened and label == b'result' and ({}) or opened and opened[1]\n"
            "    return (opened[0], data) if opened and len(data) >= least else None\n"
            "tariq.unframe = hostile")
    for data in ("opened[1][:1]", r"b'\1\0'", r"b'\1\0\xff\xfe'"):
        done = knock(box, "O", "22", timeout=1, change=wrap.format(data))
        assert done.returncode in (0, NO_ANSWER) and "Traceback" not in done.stderr, done
    done = knock(box, "O", "22", change=wrap.format(r"opened[1].replace(b'opened', b'\x1b[2Jopened')"))
    assert done.returncode == 0 and done.stdout.startswith("\\x1b[2Jopened")
    done = knock(box, "O", "23", change=wrap.format("opened[1][:1] + bytes([0]) + opened[1][2:]"))
    assert done.returncode == REFUSED, "a refusal is one, whatever status it claims"
    public = "openers = tariq.open_transports\ntariq.open_transports = lambda *a: (openers(*a)[0], '64:ff9b::1')\n"
    challenge = public + wrap.replace("b'result'", "b'challenge'")
    done = knock(box, "O", "22", change=challenge.format(r"opened[1][:34] + b'\x1b[2J\xff'"))
    assert done.returncode == 76 and "\x1b" not in done.stderr and "Traceback" not in done.stderr


# ---- set-up's commands -----------------------------------------------------------------------------------------------

def enroll(box, key, *options, check=True):
    return box.lab.tariq(box.server, "enroll", "-c", box.conf, *options, input=key, check=check)


def test_enrolment_takes_no_taken_name_no_secret_key_and_not_two_keys(box):
    ring = box.lab.new("impostor")
    ring.mkdir(0o700)
    for user in ("Mallory <me@laptop>", "mallory@example.com"):
        generate(ring, user)

    def keys():
        return re.findall("(?m)^pub.*", server_gpg(box, "--with-colons", "--list-keys").stdout)

    def exported(*words):
        return sh(*gpg(ring, "--armor", *words)).stdout
    text, before, key = box.conf.read_text(), keys(), exported("--export", "<me@laptop>")
    for given, words in ((key, "me@laptop is another client's name"), (exported("--export"), "needs one public key"),
                         (exported("--export", "nobody"), "needs one"),
                         (exported("--export-secret-keys", "Mallory"), "needs one"),
                         (exported("--export", "mallory@example.com") + key, "needs one")):
        done = enroll(box, given, check=False)
        assert done.returncode == 65 and words in done.stderr and done.stdout == "", done
    for name in ("me@laptop", "two\nlines", "a]b", "-x"):
        assert enroll(box, key, f"--name={name}", check=False).returncode == 65, name
    assert enroll(box, key, "--name", "other", "--allow", "E echo 'a #b'", check=False).returncode == 64
    assert keys() == before and box.conf.read_text() == text, "nothing is imported or written"
    done = enroll(box, key, "--name", "other one")
    assert "[allow other one]" in box.conf.read_text() and "profile" in done.stdout
    again = enroll(box, key)
    assert "already: nothing changed" in again.stderr and again.stdout == done.stdout


def test_join_takes_no_other_key_no_other_values_and_no_scrap(box):
    text, mine = box.me.read_text(), config_values(box.me, "box")["server_key"]
    key = box.client.run(*gpg(box.me.parent / "gpg", "--armor", "--export", "<me@laptop>"), user=NOBODY).stdout
    profile = enroll(box, key).stdout

    def join(given):
        return box.lab.tariq(box.client, "join", "-c", box.me, "box", user=NOBODY, input=given, check=False)
    for given, words in ((profile.replace(mine, mine[::-1]), "not its server_key"), ("", "no profile on stdin"),
                         (re.sub("secret = .*", f"secret = {SECRET}", profile), "has other values"),
                         (profile[:100], "no profile"),
                         (profile.replace("secret_ports = ", "secret_ports = 1,"), "has other values")):
        done = join(given)
        assert done.returncode == 65 and words in done.stderr and box.me.read_text() == text, (words, done)
    assert join(profile).returncode == 0 and box.me.read_text() == text


def test_init_refuses_a_persons_account_and_leaves_an_existing_set_up_alone(box):
    assert "is there already: nothing changed" in box.lab.tariq(box.server, "init", "-c", box.conf).stderr
    own = ("mount -t tmpfs tmpfs /run && sed 's/^tariq:x:[0-9]*/tariq:x:1000/' /etc/passwd > /run/p"
           " && mount --bind /run/p /etc/passwd")
    conf = box.lab.dir / "person" / "tariq.conf"
    done = box.server.run("unshare", "-m", "sh", "-c", f"{own}; exec \"$@\"", "sh", box.lab.dir / "tariq.py", "init",
                          "-c", conf, check=False)
    assert done.returncode == 71 and "is a person's" in done.stderr and os.listdir(conf.parent) == []


def test_four_enrolments_at_once_lose_nothing(box):
    keys = [box.lab.tariq(box.client, "keygen", "-c", box.lab.dir / f"many-{number}" / "tariq.conf",
                          f"Many {number} <many{number}@example.com>").stdout for number in range(4)]
    text = box.conf.read_text()
    box.conf.write_text(text[:text.index("[allow")] + "# mine")  # an editor that leaves out the last newline
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda key: enroll(box, key), keys))
    assert len(tariq.Config(box.conf).clients()) == 4 and "# mine" in box.conf.read_text()
    assert "[allow many3@example.com]" in box.conf.read_text(), "the email is the name"
    conf = box.lab.dir / "many-0" / "tariq.conf"
    profile = enroll(box, keys[0]).stdout
    box.lab.tariq(box.client, "join", "-c", conf, box.server.ip, input=profile)
    opens(box, "O", "22", conf=conf, user=None, where=box.server.ip)
    assert "\nmany0@example.com " in box.tariq.log


def test_one_config_may_serve_both_roles_and_be_enrolled_in_itself(idle):
    conf = make_server(idle.lab, idle.server, "both-roles")
    conf.write_text(conf.read_text() + f"[client]\nuser = me@itself\nclient_gpg_dir = {conf.parent}/client-gpg\n")
    line = " | ".join(f"{idle.lab.dir}/tariq.py {words}" for words in (
        f"keygen -c {conf} me@itself", f"enroll -c {conf} --allow O 22", f"join -c {conf} itself"))
    idle.server.run("sh", "-c", line)
    config = tariq.Config(conf)
    assert config.ini.has_section("itself") and config.get("may", ["allow me@itself"]) == [["O", "22/tcp"]]


# ---- the service's life ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names", ["TERM", "INT", "HUP", "INT TERM"])
def test_the_server_stops_cleanly_on_signals_and_leaves_an_empty_chain(idle, names):
    with serving(idle) as server:
        listener = server.listener
        opens(idle), opens(idle, where="box6")
        *first, last = (signal.Signals[f"SIG{name}"] for name in names.split())
        for number in first:  # two at once
            server.process.send_signal(number)
        assert server.stop(last) == 0
        assert idle.server.rules() == idle.server.rules(ip6=True) == [] and not alive(listener)


def test_a_listener_that_hangs_or_misses_the_monitors_death_does_not_stay(idle):
    with serving(idle) as server:
        os.kill(server.listener, signal.SIGSTOP)
        assert server.stop() == 0, "a listener that reads nothing any more cannot hold up the stop"
    with serving(idle) as server:
        listener = server.listener
        server.process.send_signal(signal.SIGSTOP)  # so that a request waits unread when the monitor dies
        assert knock(idle, "O", "22", timeout=1).returncode == NO_ANSWER
        server.kill()
        wait_for(lambda: not alive(listener), "the listener outlives its monitor")


def test_a_command_ends_with_the_server_and_a_daemon_that_it_left_holds_nothing_of_it(idle):
    with serving(idle) as server:
        pid = server.process.pid

        def held():
            return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
        before = held()
        for _ in range(4):
            assert opens(idle, "E", "sh", "-c", "sleep 20 & echo started") == "started\n"
        wait_for(lambda: held() == before, "they leave descriptors or threads")
        with knocking(idle, "E", "sh", "-c", "sleep 7777; true"):
            server.wait_log("sleep 7777")
            time.sleep(0.2)
            assert server.stop() == 0
        assert idle.server.run("pgrep", "-f", "^sleep 7777", check=False).stdout == ""


def test_every_change_to_the_machine_is_logged_before_it_runs(box):
    opens(box), opens(box, "E", "echo", "a b")
    lines = box.tariq.log.splitlines()
    rule = max(index for index, line in enumerate(lines)
               if line.startswith("+ iptables -w 5 -A tariq ") and f" -s {box.client.ip} " in line)
    assert any(f"{box.client.ip} O 22/tcp: opened tcp/22" in line for line in lines[rule:])
    assert "+ echo 'a b'" in lines


def test_the_server_warns_where_nothing_is_hidden(idle):
    conf = make_server(idle.lab, idle.other, "warned")
    for rules, warnings in (([], 2), (["iptables -A INPUT -j DROP", "ip6tables -P INPUT DROP"], 0)):
        for rule in rules:
            idle.other.run(*rule.split())
        server = Server(idle.lab, idle.other, conf).wait_log("listening for")
        assert server.log.count("INPUT does not drop") == warnings and server.stop() == 0
    idle.other.run("iptables", "-F", "INPUT"), idle.other.run("ip6tables", "-P", "INPUT", "ACCEPT")


# ---- the network never talks to root (DESIGN 1.1, 1.3) ---------------------------------------------------------------

def test_the_listener_holds_no_privilege_nothing_of_roots_and_one_packet_socket(idle):
    with serving(idle) as server:
        opens(idle, "E", "echo", "warm")  # what a knock leaves behind counts too
        owner, pid = pwd.getpwnam("tariq"), server.listener
        assert eventually(lambda: not Path(f"/proc/{pid}/task/{pid}/children").read_text())
        for thread in Path(f"/proc/{pid}/task").iterdir():  # credentials are each thread's own
            text = (thread / "status").read_text()
            status = dict(line.split(":\t") for line in text.splitlines() if ":\t" in line)
            assert status["Uid"].split() == [str(owner.pw_uid)] * 4 and owner.pw_uid != 0
            assert status["Gid"].split() == [str(owner.pw_gid)] * 4 and owner.pw_gid != 0
            assert status["Groups"].split() == []
            assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
            assert status["NoNewPrivs"] == "1"
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        assert (words[3], words[4]) == (str(pid), "0"), "a session of its own, and no terminal"
        assert os.readlink(f"/proc/{pid}/cwd") == "/" and Path(f"/proc/{pid}/environ").read_bytes() == b""
        links = descriptors(pid)
        assert links[0].endswith("tariq.py") and links[1] == links[2] == "/dev/null"
        extra = sorted(link for number, link in links.items() if number > 2)
        assert len(extra) == 2 and all(link.startswith("socket:") for link in extra), links
        assert len(rmem(pid)) == 1, "one of them is a packet socket"
        unix = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()]
        ours = [row for row in unix if f"socket:[{row[6]}]" in extra]
        assert len(ours) == 1 and len(ours[0]) == 7, "the other is a nameless end of a socketpair"


@pytest.mark.skipif(not shutil.which("keyctl"), reason="no keyutils here")
def test_a_session_keyring_of_roots_stays_with_root(idle):
    fakes = Fakes(idle.lab)
    with serving(idle, ("keyctl", "session", "roots-own", *fakes.prefix)):
        fakes.fault("gpg-shows")  # what gpg, a child of the listener's, sees of it
        opens(idle)
        assert "Session Keyring" in fakes.shown.read_text() and "roots-own" not in fakes.shown.read_text()
        fakes.fault("iptables-shows")
        opens(idle)
        assert "roots-own" in fakes.shown.read_text(), "the test's own test"


def test_the_listeners_user_reaches_nothing_of_roots(idle):
    with serving(idle) as server:
        opens(idle)
        user, monitor = pwd.getpwnam("tariq").pw_uid, server.process.pid
        for argv in (["cat", server.conf], ["cat", "/etc/shadow"], ["touch", server.conf.with_name("new")],
                     ["touch", "-c", idle.lab.dir / "tariq.py"], ["iptables", "-n", "-L", "tariq"],
                     ["iptables", "-A", "tariq", "-j", "ACCEPT"], ["nft", "list", "ruleset"], ["kill", "-0", monitor],
                     ["cat", f"/proc/{monitor}/environ"], ["ls", f"/proc/{monitor}/fd"],
                     ["ls", f"/proc/{server.listener}/fd"], ["ip", "link", "set", "eth0", "promisc", "on"]):
            locked_up = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", *argv]
            assert idle.server.run(*locked_up, user=user, check=False).returncode != 0, argv
        assert idle.server.run("cat", server.conf).stdout and len(idle.server.rules()) == 1  # the test's own test


def test_no_socket_listens_and_the_interface_is_not_promiscuous(idle):
    def listening():
        return sorted(re.sub(r"\s+", " ", line) for line in idle.server.run("ss", "-H", "-lntu").stdout.splitlines())

    before = listening()
    assert len(before) == 2, "sshd, IPv4 and IPv6"
    with serving(idle) as server:
        opens(idle)
        assert listening() == before
        ours = [f"pid={pid}," for pid in (server.process.pid, server.listener)]
        lines = idle.server.run("ss", "-H", "-l", "-n", "-p").stdout.splitlines()
        kinds = {line.split()[0] for line in lines if any(pid in line for pid in ours)}
        assert kinds <= {"p_raw", "p_dgr"}, kinds
        link = idle.server.run("ip", "-d", "link", "show", "eth0").stdout
        assert "PROMISC" not in link and "promiscuity 0" in link


def test_the_listener_refuses_to_run_with_a_privilege_left(idle):
    """A setpriv that leaves something: the listener looks at itself before it takes a packet."""
    for leave in ("--bounding-set=-all", "--no-new-privs", "--clear-groups"):
        (fake := idle.lab.new("setpriv")).mkdir()
        instead = "words+=(--groups=4)" if leave == "--clear-groups" else "true"
        (fake / "setpriv").write_text(f"#!/bin/bash\nwords=()\nfor word; do case $word in {leave}) {instead};; "
                                      f'*) words+=("$word");; esac; done\nexec {fake}/real "${{words[@]}}"\n')
        (fake / "setpriv").chmod(0o755)
        shutil.copy("/usr/bin/setpriv", fake / "real")
        covered = "sh", "-c", 'mount --bind "$0/setpriv" /usr/bin/setpriv && exec "$@"', fake
        done = idle.server.run(*covered, idle.lab.dir / "tariq.py", "server", "-c", variant(idle), check=False)
        assert done.returncode == 78 and "has to belong to an unprivileged user" in done.stderr, (leave, done)


FILTER = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
pidfd = os.pidfd_open(int(sys.argv[1]))
for number in range(3, 64):
    fd = libc.syscall(438, pidfd, number, 0)  # pidfd_getfd
    if fd >= 0 and (sock := socket.socket(fileno=fd)).family == socket.AF_PACKET: break
print("locked", sock.getsockopt(socket.SOL_SOCKET, 44), "size", sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
try:
    sock.setsockopt(socket.SOL_SOCKET, 27, 0)
    print("detached")
except OSError as error:
    print(error.strerror)
"""


def test_the_kernel_filter_passes_frames_only_is_locked_and_takes_no_outgoing_packet(idle):
    with serving(idle) as server:
        inodes = {link[8:-1] for link in descriptors(server.listener).values() if link.startswith("socket:")}
        rows = [line.split() for line in Path(f"/proc/{server.listener}/net/packet").read_text().splitlines()[1:]]
        row, = [row for row in rows if row[8] in inodes]
        assert row[3] == "0003" and row[4] == "0", "all protocols, all interfaces"
        said = idle.server.python(FILTER, server.listener).stdout
        assert said == f"locked 1 size {8 << 20}\nOperation not permitted\n"
        os.kill(server.listener, signal.SIGSTOP)  # so that what passes the filter stays to be counted
        try:
            ports = idle.ports
            out, into = (socket_in(host, socket.AF_INET, socket.SOCK_DGRAM) for host in (idle.server, idle.client))
            for port in (ports[0], ports[4]):
                out.sendto(bytes(900), (idle.client.ip, port))  # the server's own
            for port, size in [(ports[0] ^ 1, 900), (ports[0], 20), (ports[0], 1300)]:
                into.sendto(bytes(size), (idle.server.ip, port))  # other ports and sizes
            link = [bytes.fromhex(link_state(host)["address"].replace(":", "")) for host in (idle.server, idle.client)]
            inner = packet_of(ports[2], bytes(900), udp=True)
            inject(idle.client, [b"\x02" + link[0][1:5] + b"\x99" + link[1] + b"\x08\0" + inner])  # another host's
            time.sleep(0.2)
            assert rmem(server.listener) == [0]
            for vlan in (7, 0):  # of a VLAN, for its own interface; and with a priority alone, for this one
                inject(idle.client, [link[0] + link[1] + b"\x81\0" + vlan.to_bytes(2, "big") + b"\x08\0" + inner])
                time.sleep(0.2)
                assert (rmem(server.listener)[0] > 900) is (vlan == 0)
        finally:
            os.kill(server.listener, signal.SIGCONT)


def test_nothing_of_scapy_pillow_libpcap_or_gpg_runs_or_is_mapped_as_root(idle):
    trace = idle.lab.new("trace")
    calls = "trace=execve,openat,setresuid,clone,clone3,fork,vfork"
    with serving(idle, prefix=("strace", "-f", "-qq", "-y", "-e", calls, "-o", trace)) as server:
        opens(idle), opens(idle, "E", "echo", "x"), opens(idle, "C", "22")
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        monitor = int(children[0])
        maps, memory = Path(f"/proc/{monitor}/maps").read_text(), rss(monitor)
        os.kill(monitor, signal.SIGTERM)
        server.process.wait(15)
    assert not re.search("scapy|PIL|libpcap|libgcrypt", maps) and memory <= 24
    text = trace.read_text(errors="replace")
    forks = re.findall(r"(?m)^(\d+) +(?:<\.\.\. )?(?:clone3?|v?fork)\b.* = (\d+)$", text)
    parents = {child: parent for parent, child in forks}
    changed = set(re.findall(r"(?m)^(\d+) +setresuid\([1-9]", text))
    foreign = {pid for pid, call in re.findall(r"(?m)^(\d+) +(.*)", text)
               if re.search(r"scapy|/PIL/|libpcap|/gpg", call) and " = -1 " not in call}

    def unprivileged(pid):
        return pid in changed or pid in parents and unprivileged(parents[pid])
    assert len(foreign) >= 3, "the listener, and a gpg for each knock"
    assert [pid for pid in foreign if not unprivileged(pid)] == [] and not unprivileged(str(monitor))


def test_the_monitor_sleeps_while_nothing_happens(idle):
    trace = idle.lab.new("trace")
    with serving(idle) as server:
        opens(idle)
        time.sleep(11)  # the result's repeats are over
        strace = subprocess.Popen(["strace", "-f", "-qq", "-o", trace,
                                   "-p", str(server.process.pid), "-p", str(server.listener)])
        time.sleep(60)
        strace.send_signal(signal.SIGINT)
        strace.wait(10)
        calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
        waits = r"(p?select6?|recvfrom|recvmsg|futex|restart_syscall|<\.\.\.|strace: )"
        assert all(re.match(waits, call) for call in calls), calls
        assert len(calls) <= 6, "each thread waits in one call"


def test_a_killed_listener_closes_every_door_and_ends_the_server(idle):
    with serving(idle) as server:
        opens(idle), opens(idle, where="box6")
        assert idle.server.rules() and idle.server.rules(ip6=True)
        os.kill(server.listener, signal.SIGKILL)
        assert server.process.wait(5) == DIED and "listener died" in server.log
        assert idle.server.rules() == idle.server.rules(ip6=True) == []
        assert not idle.client.connects(idle.server.ip)


# ---- nothing stays open by accident (DESIGN 1.5) ---------------------------------------------------------------------

CONNECTIONS = """
# Try an SSH connection each 50 ms until a time, and print when and with what success.
import socket, sys, time
while time.time() < float(sys.argv[2]):
    start = time.time()
    try:
        with socket.create_connection((sys.argv[1], 22), 0.2) as sock:
            good = sock.recv(4) == b'SSH-'
    except OSError:
        good = False
    print(start, time.time(), int(good), flush=True)
    time.sleep(0.05)
"""
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
def held_connection(world):
    """A connection made now; at the end, data goes both ways over it."""
    process = world.client.popen(sys.executable, "-c", HOLD, world.server.ip, stdin=PIPE, stdout=PIPE)
    assert "SSH-" in process.stdout.readline()
    yield
    assert not world.client.connects(world.server.ip), "the door is still open: the connection outlives nothing"
    process.stdin.write("\n")
    process.stdin.flush()
    assert int(process.stdout.readline()) > 100


@pytest.mark.parametrize("killed", ["monitor", "both processes"])
def test_doors_close_at_their_deadline_to_the_second_when_killed(idle, killed):
    with serving(idle, open_timeout=3) as server:
        listener = server.listener
        with concurrent.futures.ThreadPoolExecutor() as pool:
            printed = list(pool.map(lambda where: opens(idle, where=where), ["box", "box6"]))
        if killed != "monitor":
            os.kill(listener, signal.SIGSTOP)  # so that it cannot mend anything between the two signals
        server.kill()
        if killed != "monitor":
            os.kill(listener, signal.SIGKILL)
        assert eventually(lambda: not alive(listener), 1), "the listener outlives the monitor"
        deadlines = [deadline_of(text) for text in printed]
        with held_connection(idle):
            probes = [idle.client.popen(sys.executable, "-c", CONNECTIONS, address, deadline + 1.9, stdout=PIPE)
                      for address, deadline in zip((idle.server.ip, idle.server.ip6), deadlines)]
            outputs = [probe.communicate(timeout=20)[0] for probe in probes]
        for output, deadline in zip(outputs, deadlines):
            tries = [tuple(map(float, line.split())) for line in output.splitlines()]
            before = [good for _, end, good in tries if end < deadline + 0.95]  # a rule holds to the end of its second
            after = [good for start, _, good in tries if start > deadline + 1.05]
            assert before and all(before) and after and not any(after), (deadline, tries)
        assert idle.server.rules() and idle.server.rules(ip6=True), "it was the kernel that closed"
    with serving(idle):
        assert idle.server.rules() == idle.server.rules(ip6=True) == [], "a start begins with an empty chain"


def test_without_open_timeout_a_door_stays_until_closed_and_its_connections_outlive_it(idle):
    with serving(idle, open_timeout=0):
        for _ in range(2):  # both rules are the same, word by word
            assert opens(idle) == f"opened tcp/22 on box for {idle.client.ip} until closed\n"
        rule, = idle.server.rules()
        assert "--datestop 2038-01-19T03:14:07" in rule
        with held_connection(idle):
            assert "closed tcp/22" in opens(idle, "C", "22") and idle.server.rules() == []


def test_open_timeout_in_a_clients_section_overrides_the_servers(idle):
    with serving(idle, open_timeout=90000) as server:
        assert re.search(r"until \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ$", opens(idle)), "a day or more shows its date"
        server.conf.write_text(server.conf.read_text().replace("may =", "open_timeout = 2\nmay ="))
        deadline = deadline_of(opens(idle))
        assert 0 < deadline - time.time() < 3 and eventually(lambda: not idle.server.rules(), 5)


# ---- loss ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def far(world):
    """Three clients behind a router that can lose packets: (clients, router)."""
    lab, router = world.lab, world.lab.host("faraway", 1)
    clients = [Host(lab, f"far{number}", 2, prefix=f"10.9.{number}") for number in range(3)]
    for number, client in enumerate(clients):
        lab.cable(client, "eth0", router, f"eth{number + 1}", [f"{client.ip}/24"], [f"10.9.{number}.1/24"])
        client.run("ip", "route", "add", "default", "via", f"10.9.{number}.1")
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    return clients, router


@pytest.fixture
def route_to_far(idle, far):
    idle.server.run("ip", "route", "replace", "10.9.0.0/16", "via", far[1].ip)
    yield
    far[1].run("iptables", "-F", "FORWARD")
    idle.server.run("ip", "route", "del", "10.9.0.0/16")


@pytest.mark.parametrize("transport", ["kernel", "crafted"])
def test_knocks_get_through_where_a_fifth_of_all_packets_is_lost_each_way(idle, far, route_to_far, transport):
    clients, router = far
    for side in "-i", "-o":
        router.run("iptables", "-A", "FORWARD", side, "eth0", "-m", "statistic", "--mode", "random",
                   "--probability", "0.2", "-j", "DROP")

    def one(port):
        start = time.monotonic()
        done = knock(idle, "O", port, transport=transport, host=clients[port % len(clients)])
        return port, done.returncode, time.monotonic() - start, done.stderr

    ports = range(2000, 2050)  # a port for each knock: its rule tells whose it is
    with serving(idle) as server, concurrent.futures.ThreadPoolExecutor(12) as pool:
        results = list(pool.map(one, ports))
        counters = router.run("iptables", "-nvxL", "FORWARD").stdout
        drops = [int(line.split()[0]) for line in counters.splitlines() if "DROP" in line]
        assert len(drops) == 2 and min(drops) > 8, f"the network lost too little to prove anything: {drops}"
        good = {port for port, status, _, _ in results if status == 0}
        assert len(good) >= 48, [result for result in results if result[0] not in good]
        rules = [(int(re.search(r"--dport (\d+)", rule)[1]), re.search(r"-s (\S+)/32 ", rule)[1])
                 for rule in idle.server.rules()]
        opened = {port for port, _ in rules}
        assert len(rules) == len(opened), "a door has two rules"
        assert all(address == clients[port % len(clients)].ip for port, address in rules)
        assert good <= opened <= set(ports)  # a knock whose client gave up may have opened its door: nothing else may
        for port in ports:
            assert server.log.count(f"O {port}/tcp: opened") == (port in opened), "a repeated answer opened twice"


@pytest.mark.parametrize("lost", ["first fragment", "last fragment", "challenge", "answer", "result"])
def test_a_knock_survives_the_loss_of_any_one_packet(idle, far, route_to_far, lost):
    clients, router = far

    def one(client, transport):
        away, back = ["-s", client.ip, "-p", "tcp"], ["-d", client.ip, "-p", "tcp"]
        rule = {"first fragment": [*away, "--syn", "--dport", idle.ports[0]],
                "last fragment": [*away, "--syn", "--dport", idle.ports[-1]],
                "challenge": [*back, "--tcp-flags", "SYN,ACK", "SYN,ACK"],
                "result": [*back, "--tcp-flags", "SYN", "NONE"],
                "answer": [*away, "--tcp-flags", "SYN,RST,ACK", "ACK", "-m", "length", "--length", "100:"]}[lost]
        rule += ["-m", "statistic", "--mode", "nth", "--every", "100000", "--packet", "0", "-j", "DROP"]
        router.run("iptables", "-w", "-I", "FORWARD", *rule)
        return opens(idle, "O", "22", transport=transport, host=client)

    with serving(idle) as server:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(one, clients, ("kernel", "crafted")))
        counters = router.run("iptables", "-w", "-nvxL", "FORWARD").stdout
        assert [line.split()[0] for line in counters.splitlines() if "100000" in line] == ["1", "1"], counters
        assert server.log.count(": opened") == len(idle.server.rules()) == 2, "something happened twice"


def test_repeats_come_at_growing_intervals_that_no_two_knocks_share(idle):
    """Four knocks at an address where nobody is: the clients' repeats are all that drives them."""
    silent = idle.lab.host("silent", 77)
    for program in "iptables", "ip6tables":
        silent.run(program, "-A", "INPUT", "-p", "tcp", "-j", "DROP")
    idle.me.write_text(idle.me.read_text().replace(idle.server.ip6, silent.ip6).replace(idle.server.ip, silent.ip))
    with captured(silent, "tcp", "dst", "port", idle.ports[0]) as packets, \
            concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(knock, idle, "O", "22", where=where, transport=transport, timeout=4, host=host)
                for host in (idle.client, idle.other) for where, transport in (("box", "kernel"), ("box6", "crafted"))]
        assert [run.result().returncode for run in runs] == [NO_ANSWER] * 4
    starts = collections.defaultdict(list)
    for stamp, frame in packets:
        starts[frame[26:30] if frame[12:14] == b"\x08\x00" else frame[22:38]].append(stamp)
    intervals = [[later - earlier for earlier, later in zip(times, times[1:])] for times in starts.values()]
    assert len(intervals) == 4
    for waits in intervals:
        assert 5 <= len(waits) <= 20, waits
        assert sum(waits[-2:]) > 1.2 * sum(waits[:2]), f"the waits do not grow: {waits}"
    for turn in range(3):  # without jitter, they differ by what the scheduler does: a few milliseconds
        waits = [waits[turn] for waits in intervals]
        assert max(waits) - min(waits) > 0.015, f"the waits are not jittered: {waits}"


# ---- replays ---------------------------------------------------------------------------------------------------------

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
    """A clock for servers that run `program`, both processes: the machine's, and some seconds more."""

    def __init__(self, lab):
        self.path = lab.new("clock")
        shifted = SHIFTED.format(path=str(self.path))
        self.program = lab.program(f"{self.path.name}.py", lambda text: text.replace(
            "\nclass Fault", f"{shifted}\nclass Fault", 1)).name
        self.set(0)

    def set(self, seconds):
        new = self.path.with_suffix(".new")
        new.write_text(str(seconds))
        new.chmod(0o644)
        new.replace(self.path)  # at once: a reader sees the old or the new


def replay(host, server, frames, times):
    """Send a list of frames again and again from a host, no faster than the listener takes them."""
    left = times
    while left > 0:
        inject(host, frames, -(-min(left, 20_000) // len(frames)))
        assert eventually(lambda: rmem(server.listener) == [0], 30), "the listener does not keep up"
        left -= 20_000


def real_exchange(world):
    """Frames of one knock, as recorded on the path: [fragments], [answer and what else the client sent]."""
    with captured(world.server, "-Q", "in", "ip and tcp and not port 22") as packets:
        opens(world, transport="kernel")
    found = segments(packets)
    fragments, rest = ([each.frame for each in found if (each.flags & 2 > 0) is syn] for syn in (True, False))
    assert len(fragments) >= 5 and any(each.payload and not each.flags & 2 for each in found)
    return fragments, rest


@contextlib.contextmanager
def nothing_happens(world, server, program="tariq.py"):
    """Asserts: meanwhile the server starts no program, sends no packet, changes no rule, writes no line; then a knock
    works."""
    trace = world.lab.new("trace")
    pids = server.process.pid, server.listener
    strace = subprocess.Popen(["strace", "-f", "-qq", "-e", "trace=execve", "-e", "signal=none", "-o", trace,
                               *(word for pid in pids for word in ("-p", str(pid)))], stderr=DEVNULL)
    try:
        for pid in pids:
            attached = lambda: "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text()  # noqa: B023, E731
            assert eventually(attached), "strace did not attach"
        before = world.server.rules(), world.server.rules(ip6=True), server.log
        with captured(world.server, "-Q", "out", "ip or (ip6 and (tcp or udp))") as packets:
            yield
            time.sleep(0.5)  # gpg takes 10 ms
        assert trace.read_text() == "" and packets == []
        assert (world.server.rules(), world.server.rules(ip6=True), server.log) == before
        opens(world, "E", "echo", "still there", program=program)  # and the measuring measures
        assert trace.read_text().count("gpg") >= 1 and trace.read_text().count("execve(") >= 2
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(10)


def replayed_in_every_way(world, server, recorded, times):
    """Whole, in its order and reversed, from the same address and from another; then so many fragments from each."""
    fragments, rest = recorded
    stolen = [from_address(frame, world.other.ip) for frame in fragments + rest]
    replay(world.client, server, fragments + rest, 1)
    replay(world.client, server, (fragments + rest)[::-1], 1)
    replay(world.other, server, stolen, 1)
    replay(world.client, server, fragments, times)
    replay(world.other, server, stolen[:len(fragments)], times)


def test_100000_replayed_packets_inside_the_window_start_no_gpg_and_get_no_packet(idle):
    with serving(idle) as server:
        recorded = real_exchange(idle)
        with nothing_happens(idle, server):
            replayed_in_every_way(idle, server, recorded, 50_000)


def test_a_knock_recorded_before_its_exchange_ended_is_worth_nothing(idle):
    """The fragments alone, replayed by another: the door of a proof not given stays shut."""
    change = "tariq.KernelTransport.answer = lambda *_: None"
    with serving(idle) as server:
        with captured(idle.server, "-Q", "in", "tcp") as packets:
            assert knock(idle, "O", "22", timeout=1, transport="kernel", change=change).returncode == NO_ANSWER
        fragments = [each.frame for each in segments(packets) if each.payload]
        with nothing_happens(idle, server):
            inject(idle.other, [from_address(frame, idle.other.ip) for frame in fragments])


def test_a_restart_makes_no_recorded_knock_new(idle):
    with serving(idle):
        recorded = real_exchange(idle)
    with serving(idle) as server, nothing_happens(idle, server):  # inside the window still
        replayed_in_every_way(idle, server, recorded, 1)


def test_100000_replayed_packets_after_the_window_start_no_gpg_and_get_no_packet(idle):
    with serving(idle):
        recorded = real_exchange(idle)
    shift = Shift(idle.lab)
    shift.set(4 * 60)  # another server, four minutes later: nothing but the frames' own age tells it that they are old
    with serving(idle, program=shift.program) as server:
        shown = knock(idle, "O", "22", timeout=2)
        assert shown.returncode == NO_ANSWER, "the server's clock is not where it should be"
        with nothing_happens(idle, server, shift.program):
            replayed_in_every_way(idle, server, recorded, 50_000)


# ---- faults ----------------------------------------------------------------------------------------------------------

class Fakes:
    """gpg, iptables and ip6tables of the server alone, in a mount namespace of its own: as they are, until told to
    fail."""

    SCRIPT = r"""#!/bin/sh
case $(cat "{flag}") in
{name}-hangs) exec sleep 60;;
{name}-shows) keyctl show > "{flag}.shown";;
{name}-dies) kill -KILL $$;;
{name}-junk) head -c 3000 /dev/urandom | tee /dev/stderr; exit 0;;
{name}-lies) printf '[GNUPG:] \n[GNUPG:] VALIDSIG\n[GNUPG:] NEWSIG \377\n' >&2; exit 0;;
{name}-fails) echo "{name}: a fault made by the tests" >&2; exit 4;;
esac
exec {real} "$@"
"""

    def __init__(self, lab, **programs):
        usual = {"gpg": "/usr/bin/gpg", "iptables": "/usr/sbin/iptables", "ip6tables": "/usr/sbin/ip6tables"}
        self.dir = lab.new("fakes")
        self.dir.mkdir()
        self.flag = self.dir / "flag"
        self.fault("none")
        self.shown = self.dir / "flag.shown"
        write_private(self.shown, "", mode=0o666)
        for name, real in (programs or usual).items():
            if name == "gpg":
                real = shutil.copy(real, self.dir / "gpg.real")
            (self.dir / name).write_text(self.SCRIPT.format(name=name, real=real, flag=self.flag))
            (self.dir / name).chmod(0o755)
        # iptables: the first place where the monitor looks for programs; gpg: where the listener finds it
        covers = 'mount --bind "$0" /usr/local/sbin && if test -e "$0/gpg"; then mount --bind "$0/gpg" /usr/bin/gpg; fi'
        self.prefix = ("sh", "-c", f'{covers} && exec "$@"', self.dir)

    def fault(self, name):
        self.flag.write_text(name)


def agent_of(world):
    """The pid of the gpg-agent of the server's keyring."""
    home = str(world.ring).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"gpg-agent") and home in path.read_bytes() and alive(path.parent.name):
                return int(path.parent.name)
    return None


@pytest.mark.parametrize("fault, words", [("dies", "exit status -9"), ("junk", "not one encrypted message"),
                                          ("lies", "not one encrypted message"), ("hangs", "exit status -9"),
                                          ("fails", "gpg: a fault made by the tests")])
def test_a_knock_fails_when_gpg_fails_and_the_next_one_works(idle, fault, words):
    fakes = Fakes(idle.lab)
    with serving(idle, fakes.prefix) as server:
        fakes.fault(f"gpg-{fault}")
        assert knock(idle, "O", "22", timeout=1).returncode == NO_ANSWER
        fakes.fault("none")
        opens(idle, "O", "23", timeout=4)
        server.wait_log("knock refused: ")
        assert words in server.log and len(idle.server.rules()) == 1


def test_a_gpg_agent_killed_in_mid_exchange_spoils_no_later_knock(idle):
    with serving(idle) as server:
        opens(idle, "O", "23")
        agent = agent_of(idle)
        os.kill(agent, signal.SIGSTOP)  # gpg waits for it now, so that it dies in the middle for sure
        with knocking(idle, "O", "24") as waiting:
            children = "ps", "-o", "args=", "--ppid", server.listener
            assert eventually(lambda: "gpg" in sh(*children, check=False).stdout)
            os.kill(agent, signal.SIGKILL)
            printed, errors = waiting.communicate(timeout=30)
        assert waiting.returncode == 0 and "opened tcp/24" in printed, errors
        assert agent_of(idle) not in (None, agent)

        def kill_agent():
            with contextlib.suppress(ProcessLookupError, TypeError):  # there is none at this moment
                os.kill(agent_of(idle), signal.SIGKILL)

        statuses = set()
        for delay in range(30, 130, 10):  # milliseconds: at every point of an exchange
            timer = threading.Timer(delay / 1000, kill_agent)
            timer.start()
            statuses.add(knock(idle, "C", "23", timeout=2).returncode)
            timer.join()
        assert statuses <= {0, NO_ANSWER}
        opens(idle)
        assert {re.search(r"--dport (\d+)", rule)[1] for rule in idle.server.rules()} - {"23"} == {"24", "22"}


def test_when_iptables_fails_the_client_is_told_why_and_doors_close_all_the_same(idle):
    fakes = Fakes(idle.lab)
    with serving(idle, fakes.prefix, open_timeout=2) as server:
        fakes.fault("iptables-fails")
        refused = knock(idle, "O", "22")
        assert refused.returncode == SYSTEM and "a fault made by the tests" in refused.stderr
        assert idle.server.rules() == []
        fakes.fault("none")
        deadline = deadline_of(opens(idle))
        fakes.fault("iptables-fails")
        assert eventually(lambda: re.search("22/tcp is not closed: .*a fault made by the tests", server.log), 8)
        assert knock(idle, "C", "22").returncode == SYSTEM
        assert idle.server.rules(), "the fault is no fault"
        time.sleep(max(0, deadline + 1.05 - time.time()))
        assert not idle.client.connects(idle.server.ip), "the kernel did not close the door"
        fakes.fault("none")
        assert eventually(lambda: idle.server.rules() == [], 8)
        for _ in range(2):
            opens(idle)
            time.sleep(1)  # so that the next rule is another one
        assert len(idle.server.rules()) <= 1, "opened again, a door has two rules"


def test_a_held_iptables_lock_delays_a_knock_or_fails_it_and_passes(idle):
    """iptables-legacy: the one with a lock. The real one, held by flock(1)."""
    fakes = Fakes(idle.lab, iptables="/usr/sbin/iptables-legacy", ip6tables="/usr/sbin/ip6tables-legacy")

    def rules():
        lines = idle.server.run("iptables-legacy", "-S", "tariq").stdout.splitlines()
        return [re.search(r"--dport (\d+)", line)[1] for line in lines if line.startswith("-A")]

    def hold_lock():
        holder = idle.server.popen("flock", "/run/xtables.lock", "sh", "-c", "echo held; read line", stdin=PIPE,
                                   stdout=PIPE)
        assert holder.stdout.readline() == "held\n"
        return holder

    try:
        with serving(idle, fakes.prefix), concurrent.futures.ThreadPoolExecutor() as pool:
            holder = hold_lock()
            waiting = pool.submit(opens, idle)
            time.sleep(1.5)
            assert not waiting.done()
            holder.communicate("\n")
            waiting.result()
            holder = hold_lock()
            failed = knock(idle, "O", "23", timeout=30)
            holder.communicate("\n")
            assert failed.returncode == SYSTEM and "lock" in failed.stderr
            opens(idle, "O", "24")
            assert sorted(rules()) == ["22", "24"]
        assert rules() == []
    finally:
        for program in "iptables-legacy", "ip6tables-legacy":
            idle.server.run(program, "-F"), idle.server.run(program, "-X")


def test_a_full_disk_below_the_keyring_fails_no_later_knock(idle):
    (disk := idle.lab.new("disk")).mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=200,mode=755", "tmpfs", disk)
    home = disk / "gpg"
    try:
        sh("cp", "-a", idle.ring, home)
        for stale in home.glob("S.*"):
            stale.unlink()
        with serving(idle, server_gpg_dir=home) as server:
            with contextlib.suppress(OSError), open(disk / "fill", "wb", 0) as file:
                while True:
                    file.write(bytes(4096))
            assert os.statvfs(disk).f_bavail == 0
            if knock(idle, "O", "22", timeout=3).returncode:
                assert "knock refused: gpg" in server.log, "no line says what is wrong"
            (disk / "fill").unlink()
            opens(idle, "O", "23")
    finally:
        sh("gpgconf", "--homedir", home, "--kill", "gpg-agent", check=False)
        sh("umount", "-l", disk)


def test_a_full_disk_behind_the_log_keeps_no_door_from_opening_or_closing(idle):
    with serving(idle, ("sh", "-c", 'exec "$@" 2>/dev/full', "sh"), ready="", open_timeout=2) as server:
        deadline = deadline_of(opens(idle))
        assert eventually(lambda: not idle.server.rules(), 5) and time.time() >= deadline
        opens(idle), opens(idle, "C", "22")
        assert server.log == ""


def test_the_interface_may_appear_after_the_start_go_down_and_be_made_anew(idle):
    def unplug():
        idle.server.run("ip", "link", "del", "eth0")

    def plug():
        idle.lab.plug(idle.server, "eth0", f"{idle.server.ip}/24", f"{idle.server.ip6}/64")
        for host in idle.client, idle.other:  # it has a new link address
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
        assert eventually(lambda: not idle.server.rules(), 6) and deadline - 0.5 < time.time() < deadline + 3
        for jump in (-7200, 7200):
            shift.set(jump)
            assert knock(idle, "O", "22", timeout=1).returncode == NO_ANSWER
            shift.set(0)
            opens(idle)
        assert "knock refused" not in server.log


# ---- in from anywhere ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def site_with_router():
    """A client behind a NAT router, IPv4 and IPv6, and a server."""
    with Lab() as lab:
        server, router = lab.host("server", 10), lab.host("router", 40)
        client = Host(lab, "inner", 2, prefix="192.0.2", prefix6="2001:db8:2:")
        lab.cable(client, "eth0", router, "in0", ["192.0.2.2/24", "2001:db8:2::2/64"],
                  ["192.0.2.1/24", "2001:db8:2::1/64"])
        for family, gateway in (("-4", "192.0.2.1"), ("-6", "2001:db8:2::1")):
            client.run("ip", family, "route", "add", "default", "via", gateway)
        router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for program in "iptables", "ip6tables":
            router.run(program, "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
        server.drop_policy()
        conf = make_server(lab, server)
        me = make_client(lab, client, server, conf)
        Server(lab, server, conf).wait_log("listening for")
        yield SimpleNamespace(lab=lab, client=client, router=router, me=me)


@pytest.mark.parametrize("lost", ["SYNs with data", "UDP"])
@pytest.mark.parametrize("where", ["box", "box6"])
def test_a_plain_knock_gets_in_through_a_router_that_drops_one_transport(site_with_router, lost, where):
    router, program = site_with_router.router, "iptables" if where == "box" else "ip6tables"
    rule = ["-p", "udp"] if lost == "UDP" else ["-p", "tcp", "--syn", "-m", "length", "--length", "200:"]
    router.run(program, "-I", "FORWARD", *rule, "-j", "DROP")
    try:
        began = time.monotonic()
        opens(site_with_router, where=where)
        print(f"in after {time.monotonic() - began:.2f} s; wanted: 2 s")
        only = "udp" if lost == "UDP" else "kernel"
        alone = knock(site_with_router, "C", "22", where=where, timeout=1, transport=only)
    finally:
        counted = router.run(program, "-nvxL", "FORWARD").stdout
        router.run(program, "-D", "FORWARD", *rule, "-j", "DROP")
    assert alone.returncode == NO_ANSWER and int(counted.splitlines()[2].split()[0]) >= 5, "the router drops nothing"


def test_a_kernel_without_fast_open_knocks_by_udp(box):
    box.client.run("sysctl", "-qw", "net.ipv4.tcp_fastopen=0")
    try:
        opens(box)
    finally:
        box.client.run("sysctl", "-qw", "net.ipv4.tcp_fastopen=1")


def test_udp_needs_nothing_that_is_linuxs_own_and_no_package(box):
    """Away with: scapy, Pillow, AF_PACKET, MSG_FASTOPEN, numbers for setsockopt, /proc. As on macOS, BSD, Termux."""
    change = ("import builtins, socket, sys\n"
              "for name in ('AF_PACKET', 'MSG_FASTOPEN', 'SOCK_NONBLOCK', 'SOCK_CLOEXEC', 'AF_NETLINK'):\n"
              "    delattr(socket, name)\n"
              "def refuse(self, *a): raise AssertionError('setsockopt')\n"
              "socket.socket.setsockopt = refuse\n"
              "real = builtins.open\n"
              "def guarded(path, *a, **k):\n"
              "    assert not str(path).startswith('/proc'), path\n"
              "    return real(path, *a, **k)\n"
              "builtins.open = guarded\n"
              "for name in ('scapy', 'PIL', 'ctypes.util'): sys.modules[name] = None\n")
    done = knock(box, "O", "22", change=change, options=["-v"])
    assert done.returncode == 0 and "UdpTransport" in done.stderr and "KernelTransport" not in done.stderr, done.stderr
    no_package = "import sys\nfor name in ('scapy', 'PIL'): sys.modules[name] = None\n"
    opens(box, "C", "22", change=no_package, transport="kernel")


@pytest.mark.parametrize("kind", ["vlan", "bridge", "vlan on a bridge"])
def test_knocks_arrive_on_a_vlan_and_through_a_bridges_member_and_count_once(kind):
    with Lab() as lab:
        server, client, under = lab.host("server", 10), lab.host("client", 20), "eth0"
        if "vlan" in kind and "Unknown device type" in server.run(
                "ip", "link", "add", "link", "eth0", "name", "try", "type", "vlan", "id", "9", check=False).stderr:
            pytest.skip("this kernel has no VLAN devices; the filter's test sends tagged frames")
        server.drop_policy()
        conf = make_server(lab, server)
        site = SimpleNamespace(lab=lab, client=client, me=make_client(lab, client, server, conf))
        running = Server(lab, server, conf).wait_log("listening for")
        if "bridge" in kind:
            for words in ("link add br0 type bridge forward_delay 0", "link set eth0 master br0", "addr flush eth0"):
                server.run("ip", *words.split())
            set_up_link(server, "br0", f"{server.ip}/24")
            under = "br0"
        if "vlan" in kind:
            for host, link, address in ((server, under, "203.0.113.1"), (client, "eth0", "203.0.113.2")):
                host.run("ip", "link", "add", "link", link, "name", "lan7", "type", "vlan", "id", "7")
                set_up_link(host, "lan7", f"{address}/24")
            site.me.write_text(site.me.read_text().replace(server.ip, "203.0.113.1"))
        time.sleep(0.5)
        for transport in ("kernel", "udp", "crafted"):
            opens(site, transport=transport, timeout=3)
        assert running.log.count(": opened") == 3 and "refused" not in running.log
        assert running.stop() == 0


# ---- other firewalls -------------------------------------------------------------------------------------------------

def test_a_door_is_said_to_be_open_only_if_input_leads_to_it(idle):
    """As a firewall reload, iptables-restore or the README's way back may do."""
    with serving(idle) as server:
        for words in ("nft flush ruleset", "iptables -D INPUT -j tariq", "iptables -F tariq"):
            opens(idle)
            idle.server.run(*words.split())
            if "nft" in words:
                idle.server.drop_policy()
            assert not idle.client.connects(idle.server.ip)
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
    with serving(idle, prefix, open_timeout=2) as server:
        assert "this kernel has no time match" in server.log and "this server ends doors" in server.log
        deadline = deadline_of(opens(idle))
        assert "--datestop" not in idle.server.rules()[0] and idle.client.connects(idle.server.ip)
        assert eventually(lambda: not idle.server.rules(), 5) and abs(time.time() - deadline) < 2.5
        opens(idle)
    assert idle.server.rules() == [], "flushed at stop"
    mission = "-A tariq -s {ip} -p tcp -m state --state NEW -m tcp --dport {dport} -j ACCEPT"
    with serving(idle, open_tcp_port=mission, open_timeout=2) as server:
        assert "this server ends doors" in server.log
        opens(idle)
        assert idle.client.connects(idle.server.ip) and eventually(lambda: not idle.server.rules(), 5)


def test_an_nft_table_of_its_own_hides_and_opens_without_any_iptables_rule():
    """The README's recipe as it stands."""
    table, (commands, *_) = blocks("Other firewalls", "nft")[0], blocks("Other firewalls", "ini")
    settings = dict(line.split(" = ", 1) for line in commands.strip().splitlines())
    with Lab() as lab:
        server, client, other = lab.host("server", 10), lab.host("client", 20), lab.host("other", 30)
        server.sshd(lab.dir / "sshd-key")
        server.run("nft", "-f", "-", input=table)
        conf = make_server(lab, server, open_timeout=3, **settings)
        site = SimpleNamespace(lab=lab, client=client, me=make_client(lab, client, server, conf))
        running = Server(lab, server, conf).wait_log("listening for")
        for where, address in (("box", server.ip), ("box6", server.ip6)):
            assert not client.connects(address)
            opens(site, where=where)
            assert client.connects(address) and not other.connects(address)
            assert eventually(lambda: not client.connects(address), 6), "the set's element ends"  # noqa: B023
            opens(site, where=where), opens(site, "C", "22", where=where)
            assert not client.connects(address)
        opens(site)
        running.kill()
        assert eventually(lambda: not client.connects(server.ip), 6), "kill -9 leaves nothing open past its end"
        running = Server(lab, server, conf).wait_log("listening for")
        opens(site)
        server.run("nft", "delete", "table", "inet", "tariq")
        failed = knock(site, "O", "22")
        assert failed.returncode == SYSTEM and "No such file or directory" in failed.stderr, failed
        server.run("nft", "-f", "-", input=table)
        opens(site)
        assert running.stop() == 0 and not client.connects(server.ip), "closed at stop"
        assert "-A" not in server.run("iptables-save").stdout


# ---- what README.md says, done: its own commands, as written, on throwaway machines ----------------------------------

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
        self.run("ip", "route", "add", "default", "via", "198.51.100.1")
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
        holder = self.popen("unshare", "--uts", "bash", "-c", script, stdout=PIPE, stderr=subprocess.STDOUT)
        said = holder.stdout.readline()
        assert said == "ready\n", said + holder.stdout.read()
        self.pid = holder.pid

    def command(self, argv, user=None):
        if self.pid is None:
            return super().command(argv)
        start = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--"]
        if user is not None:
            start += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "env", f"HOME=/home/{user}",
                      f"USER={user}"]
        return [*start, *(str(word) for word in argv)]

    def shell(self, script, user="me", **options):
        """Run a script as its user would type it, in the home directory, up to the first command that fails."""
        return self.run("bash", "-c", f"set -eo pipefail; cd ~; {script}", user=user, **options)

    def serve(self, *prefix, drop=True):
        """The server in the background, as the unit starts it, behind a closed firewall."""
        if drop and "-P INPUT DROP" not in self.run("iptables", "-S", "INPUT").stdout:
            self.drop_policy()
        server = Server(self.lab, self, "/etc/tariq/tariq.conf", prefix=prefix, command=["/usr/local/bin/tariq.py"])
        return server.wait_log("listening for")

    def open_to(self, client, user="root"):
        """Let a client's `me` log in here with a key."""
        client.shell("mkdir -p -m 700 ~/.ssh; cd ~/.ssh; test -e id_ed25519 ||"
                     "ssh-keygen -q -t ed25519 -N '' -f id_ed25519;"
                     "printf 'StrictHostKeyChecking accept-new\\nConnectTimeout 1\\nLogLevel ERROR\\n' > config")
        keys = "mkdir -p -m 700 ~/.ssh; cat >> ~/.ssh/authorized_keys; chmod 600 ~/.ssh/authorized_keys"
        self.shell(keys, user=None if user == "root" else user, input=client.shell("cat ~/.ssh/id_ed25519.pub").stdout,
                   env={**os.environ, "HOME": "/root"})


@pytest.fixture
def site():
    with Lab() as site:
        yield site


@pytest.fixture
def remote(site):
    """A server, set up by the README's commands."""
    return set_up(Machine(site, "box"))


@pytest.fixture
def laptop(site):
    """A client with tariq.py in place; not enrolled."""
    return set_up(Machine(site, "laptop"))


def set_up(machine):
    """Step 1 of the README on a server; of it, only the installation on a client. Packages are there already."""
    apt, install, init, *_ = blocks("1. The server")[0].splitlines()
    assert apt.startswith("sudo apt-get install")
    machine.shell(f"{install}\n{init if machine.name == 'box' else ''}")
    return machine


def type_enroll(remote, laptop, user="me@laptop"):
    """Step 2 of the README: the line that enrols a client, through a real ssh."""
    if not remote.connects("127.0.0.1"):
        remote.run("ssh-keygen", "-A")
        remote.sshd()
    remote.open_to(laptop)
    return laptop.shell(blocks("2. A client")[0].replace("me@laptop", user))


def type_knock(client, *words, timeout=4, check=True, **options):
    return client.run("tariq.py", "knock", "-t", timeout, "box.example.com", *words, user="me", check=check, **options)


def ssh(client):
    """Whether a log-in by ssh works."""
    return client.shell("ssh me@box.example.com true", check=False).returncode == 0


def test_the_three_steps_of_set_up_lead_to_a_hidden_ssh(site, remote, laptop):
    """Set-up, enrolment over a real ssh, first knock, firewall: as typed. The firewall's commands are typed into an ssh
    session, which must outlive each of them."""
    done = type_enroll(remote, laptop)
    server = remote.serve(drop=False)
    assert "iptables: INPUT does not drop" in server.log and "ip6tables: INPUT does not drop" in server.log
    remote.open_to(laptop, user="me")
    fingerprint = remote.shell("sudo sed -n 's/^key = //p' /etc/tariq/tariq.conf").stdout.strip()
    assert fingerprint in done.stderr  # enroll shows whom it trusts, and join too
    assert laptop.shell("grep server_key ~/.config/tariq/tariq.conf").stdout.split()[-1] in done.stderr
    assert "closed" in type_knock(laptop, "C", "22").stdout, "a firewall that is open yet keeps no knock out"
    keep, way_back, close, first_knock, last = blocks("3. The firewall, and the first knock")
    call_off, *persist = last.splitlines(keepends=True)
    assert len(persist) == 2 and "netfilter-persistent save" in persist[1]  # what needs the network
    session = laptop.popen("ssh", "me@box.example.com", "bash", user="me", stdin=PIPE, stdout=PIPE,
                           stderr=subprocess.STDOUT)

    def type_in(script):
        for line in script.splitlines():
            session.stdin.write(f"{line}; echo done $?\n")
            session.stdin.flush()
            assert select.select([session.stdout], [], [], 5)[0], f"{line}: the session is cut"
            assert session.stdout.readline() == "done 0\n", line

    type_in(keep)
    type_in(way_back.replace("sleep 120", "sleep 2") + close)
    assert not ssh(laptop)
    time.sleep(2)
    assert ssh(laptop), "the way back does not open"
    type_in(way_back.replace("sleep 120", "sleep 4") + close + call_off)
    assert not ssh(laptop)
    said = r"opened tcp/22 on box.example.com for 198.51.100.20 until \d\d:\d\d:\d\dZ$"
    assert re.match(said, laptop.shell(first_knock).stdout) and ssh(laptop)
    other = Machine(site, "other")
    assert not other.connects(remote.ip) and not other.connects(remote.ip6)
    time.sleep(2.5)
    assert "-P INPUT DROP" in remote.run("iptables", "-S", "INPUT").stdout, "the way back was called off"
    laptop.run("ip", "-6", "neigh", "flush", "all")  # neighbours must still find each other
    laptop.shell(f"echo 'host = {remote.ip6}' >> ~/.config/tariq/tariq.conf")
    assert "for 2001:db8:1::20 until" in type_knock(laptop, "O", "22").stdout
    assert laptop.connects(remote.ip6) and not other.connects(remote.ip6)
    type_in("true")
    assert server.stop() == 0
    assert "INPUT does not drop" not in remote.serve().log


def test_set_up_commands_run_twice_do_no_harm_and_keep_what_people_wrote(site, remote, laptop):
    first = type_enroll(remote, laptop)
    for machine, path in (remote, "/etc/tariq/tariq.conf"), (laptop, "/home/me/.config/tariq/tariq.conf"):
        machine.shell(f"sudo sed -i '1i # mine: 1\\n; mine: 2' {path}; echo '# mine: 3' | sudo tee -a {path}")

    def state():
        mine = laptop.shell("cat .config/tariq/tariq.conf; tariq.py keygen me@laptop").stdout
        return remote.shell("sudo cat /etc/tariq/tariq.conf").stdout, mine
    before = state()
    remote.shell("sudo tariq.py init")
    again = type_enroll(remote, laptop)
    assert "in [allow me@laptop] already: nothing changed" in again.stderr
    assert again.stderr.count("wrote") == 0 < first.stderr.count("wrote") and state() == before
    other = set_up(Machine(site, "other"))  # one more client: what is there stays, word by word
    type_enroll(remote, other, "you@other")
    after = state()[0]
    lines = iter(after.splitlines())
    assert all(line in lines for line in before[0].splitlines()) and "you@other" in after
    assert remote.shell("sudo stat -c %a:%U /etc/tariq/tariq.conf").stdout == "600:root\n"
    remote.serve()
    type_knock(laptop, "O", "22"), type_knock(other, "C", "22")


def test_nothing_secret_is_in_an_argument_or_the_environment_of_the_enrolment(remote, laptop):
    """Sampled from /proc while the line runs, on both machines."""
    remote.run("ssh-keygen", "-A")
    remote.sshd()
    remote.open_to(laptop)
    secrets = remote.shell("sudo sed -n 's/^secret.* = //p' /etc/tariq/tariq.conf").stdout.encode().split()
    line = laptop.popen("bash", "-c", f"cd ~; {blocks('2. A client')[0]}", user="me", stdout=DEVNULL, stderr=DEVNULL)
    seen = b""
    while line.poll() is None:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            for name in "cmdline", "environ":
                with contextlib.suppress(OSError):
                    seen += Path(f"/proc/{pid}/{name}").read_bytes()
    assert line.returncode == 0 and b"enroll" in seen
    assert len(secrets) == 2 and not any(word in seen for word in secrets)


def test_the_set_up_by_hand_for_another_user_works(site, laptop):
    remote, home = Machine(site, "box"), "/etc/tariq/.server-gpg"
    remote.shell(blocks("1. The server")[0].splitlines()[1])
    remote.shell(f"""sudo useradd --system --home-dir /nonexistent --no-create-home knocker
sudo install -d -m 711 /etc/tariq; sudo install -d -m 700 -o knocker -g knocker {home}
sudo -u knocker gpg --homedir {home} --batch --passphrase '' --quick-generate-key tariq@box future-default default never
key=$(sudo -u knocker gpg --homedir {home} --with-colons --fingerprint tariq@box | grep -om1 '[0-9A-F]\\{{40\\}}')
sudo sh -c 'umask 077; cat > /etc/tariq/tariq.conf' <<END
[server]
secret_ports = 10000,7456,22022,12121,10001
secret = $(head -c 32 /dev/urandom | base64)
server_gpg_dir = {home}
server_key = $key
END""")
    type_enroll(remote, laptop)
    server = remote.serve()
    owner = remote.run("stat", "-c", "%u", home).stdout.split()
    assert Path(f"/proc/{server.listener}/status").read_text().split("Uid:")[1].split()[:1] == owner != ["0"]
    assert "opened tcp/22" in type_knock(laptop, "O", "22").stdout
    assert type_knock(laptop, "O", "23", check=False).returncode == REFUSED
    assert server.stop() == 0
    remote.shell(f"sudo chown -R root: {home}")
    done = remote.run("tariq.py", "server", check=False)
    assert done.returncode == 78 and "chown -R tariq" in done.stderr


# ---- everyday use ----------------------------------------------------------------------------------------------------

def test_a_removed_client_is_refused_without_a_restart_and_others_stay(site, remote, laptop):
    other = set_up(Machine(site, "other"))
    type_enroll(remote, laptop), type_enroll(remote, other, "you@other")
    server = remote.serve()
    assert "opened" in type_knock(laptop, "O", "22").stdout
    key = fingerprint("/home/me/.config/tariq/gpg", "<me@laptop>", lambda *words: laptop.run(*words, user="me"))
    edit, delete = blocks("Removing a client")[0].splitlines()
    remote.shell("""printf '#!/bin/sh\nsed -i "/^.allow me@laptop/,/C 22/d" "$1"\n' > editor; chmod +x editor""")
    remote.shell(f"SUDO_EDITOR=~/editor {edit}")
    refused = type_knock(laptop, "O", "22", check=False)
    assert refused.returncode == REFUSED and "refused: O 22/tcp: not allowed to" in refused.stderr
    remote.shell(delete.replace("FINGERPRINT", key))
    assert type_knock(laptop, "O", "22", timeout=2, check=False).returncode == NO_ANSWER  # unknown: not even answered
    server.wait_log("198.51.100.20: knock refused: ")
    assert "opened" in type_knock(other, "O", "22").stdout


def test_ssh_knocks_by_itself_with_the_recipe(site, remote, laptop):
    type_enroll(remote, laptop)
    remote.open_to(laptop, user="me")
    server = remote.serve()
    assert not ssh(laptop)
    laptop.shell(f"cat >> ~/.ssh/config <<'END'\n{blocks('ssh knocks by itself', 'ssh-config')[0]}END")
    assert laptop.shell("ssh me@box.example.com id -un").stdout == "me\n"  # and nothing of the knock's
    assert "opened tcp/22" in server.log and len(remote.rules()) == 1
    assert laptop.shell("echo hello | ssh me@box.example.com cat").stdout == "hello\n"
    assert not Machine(site, "other").connects(remote.ip)


def test_a_gateway_lets_a_knock_through_to_a_host_inside(site, remote, laptop):
    type_enroll(remote, laptop)
    inside, other = Machine(site, "inside"), Machine(site, "other")
    inside.run("ip", "link", "set", "eth0", "down")
    site.cable(remote, "eth1", inside, "eth1", ["192.0.2.1/24"], ["192.0.2.5/24"])
    inside.run("ip", "route", "replace", "default", "via", "192.0.2.1")
    inside.run("ssh-keygen", "-A")
    inside.sshd()
    static, = blocks("A gateway")
    template, = blocks("A gateway", "ini")
    remote.shell(f"sudo sed -i '/^.server.$/a {template.strip()}' /etc/tariq/tariq.conf;"
                 "sudo sed -i 's/^    O 22/    O 2222/' /etc/tariq/tariq.conf")
    server = remote.serve()
    remote.shell(static)
    assert not laptop.connects(remote.ip, 2222)
    type_knock(laptop, "O", "2222")
    assert laptop.connects(remote.ip, 2222)
    assert not laptop.connects(remote.ip, 22) and not other.connects(remote.ip, 2222)
    assert server.stop() == 0 and not laptop.connects(remote.ip, 2222)


def test_every_anchor_in_the_readme_leads_somewhere():
    headings = {re.sub("[^a-z0-9 -]", "", line.strip("# ").lower()).replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= headings


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
AGENT_CONF = "~/.config/tariq/gpg/gpg-agent.conf; gpgconf --homedir ~/.config/tariq/gpg --kill gpg-agent"


@pytest.fixture(scope="module")
def locked_laptop():
    """An enrolled client whose key got a passphrase by the README's command."""
    with Lab() as site:
        remote, laptop = set_up(Machine(site, "box")), set_up(Machine(site, "laptop"))
        type_enroll(remote, laptop)
        remote.serve()
        laptop.shell("cat > pinentry; chmod +x pinentry", input=PINENTRY)
        laptop.shell(f"echo pinentry-program /home/me/pinentry > {AGENT_CONF}")
        laptop.shell(blocks("A key with a passphrase")[0])
        yield laptop


@pytest.fixture
def locked(locked_laptop):
    """The same, with a pinentry, and an agent that knows nothing yet."""
    locked_laptop.shell(f"rm -f asked; echo pinentry-program /home/me/pinentry > {AGENT_CONF}")
    return locked_laptop


def test_a_passphrase_is_asked_by_pinentry_once_and_then_remembered(locked):
    for words in (("O", "22"), ("C", "22")):
        type_knock(locked, *words)
        assert locked.shell("cat asked").stdout == "asked\n"


def knock_on_a_terminal(client, types, redirect=""):
    """Knock on a pseudo-terminal where somebody types into pinentry-curses -> (exit code, all that it showed)."""
    client.shell(f"rm {AGENT_CONF}")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chown(os.ttyname(0), int(client.run("id", "-u", "me").stdout), -1)
        words = ["bash", "-c", f"tariq.py knock -t 4 box.example.com O 22 {redirect}"]
        argv = [*client.command(["env", "TERM=xterm"], "me"), *words]
        os.execvp(argv[0], argv)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    said, typed = b"", 0
    with contextlib.suppress(OSError):  # the terminal's last user is gone
        while select.select([terminal], [], [], 30)[0] and (data := os.read(terminal, 4096)):
            said += data
            if said.count(b"[?1049h") > typed:  # one more dialog
                typed += 1
                time.sleep(0.5)
                os.write(terminal, types)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


@pytest.mark.parametrize("redirect", ["", "</dev/null >/dev/null"])
def test_pinentry_curses_asks_on_the_terminal_also_where_ssh_runs_the_knock(locked, redirect):
    """`Match exec` gives the command /dev/null as input and output; its stderr is the terminal."""
    code, said = knock_on_a_terminal(locked, b"correct-horse-7\r", redirect)
    assert code == 0 and b"correct-horse" not in said and (redirect or b"opened tcp/22" in said), said


def test_a_wrong_passphrase_or_none_for_want_of_a_terminal_is_a_clear_error(locked):
    code, said = knock_on_a_terminal(locked, b"wrong\r")
    assert code == 65 and b"gpg, keyring" in said, said
    done = type_knock(locked, "O", "22", check=False, start_new_session=True)
    assert done.returncode == 65 and "to be asked for a passphrase: a terminal, and pinentry-curses" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- the service -----------------------------------------------------------------------------------------------------

UNIT = blocks("1. The server")[0].partition("<<'END'\n")[2].partition("\nEND\n")[0]


def unit(key):
    return re.search(f"^{key}=(.*)$", UNIT, re.M)[1].split()


def systemd_analyze(remote, *words):
    remote.shell("sudo tee /etc/systemd/system/tariq.service >/dev/null", input=UNIT)
    return remote.run("systemd-analyze", *words)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_the_unit_is_valid_and_little_exposed(remote):
    done = systemd_analyze(remote, "verify", "/etc/systemd/system/tariq.service")
    assert "tariq" not in done.stdout + done.stderr
    # 0 to 100; an unhardened service of root has 96. What is left is root itself, six capabilities and the network.
    systemd_analyze(remote, "security", "--offline=yes", "--threshold=35", "/etc/systemd/system/tariq.service")


def test_server_and_knock_work_in_the_units_sandbox(remote, laptop):
    """What systemd does, done with the kernel's own means: the exact bounding set, no new privileges, a read-only
    system but for ReadWritePaths, no homes, a private /tmp."""
    type_enroll(remote, laptop)
    remote.shell("sudo sed -i 's/^    C 22.*/    C 22\\n    E sh */' /etc/tariq/tariq.conf")
    writable = unit("ReadWritePaths")
    script = f"""set -e
        for path in {' '.join(writable)}; do mount --rbind $path $path; done
        while read -r _ path _; do
            case $path in /proc*|/sys*|/dev*|/tmp|{'|'.join(f'{path}|{path}/*' for path in writable)}) ;;
                *) mount -o remount,bind,ro "$path";; esac
        done < /proc/self/mounts
        for path in /tmp /home /root; do mount -t tmpfs -o mode=1777 tmpfs $path; done
        exec "$@" """
    names = [name.removeprefix("CAP_").lower() for name in unit("CapabilityBoundingSet")]
    server = remote.serve("unshare", "--mount", "bash", "-c", script, "bash", "setpriv", "--no-new-privs",
                          f"--bounding-set={','.join(['-all', *(f'+{name}' for name in names)])}")
    assert "opened" in type_knock(laptop, "O", "22").stdout and laptop.connects(remote.ip)
    look = "grep -E 'CapBnd|NoNewPrivs' /proc/self/status; touch /etc/x /root/y; id -u"
    inside = type_knock(laptop, "E", "sh", "-c", look, check=False).stdout
    assert "CapBnd:\t00000000000031e0\nNoNewPrivs:\t1\n" in inside, inside
    assert "/etc/x': Read-only file system" in inside and inside.endswith("0\n")
    assert "closed" in type_knock(laptop, "C", "22").stdout
    assert server.stop() == 0


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
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

    trace = site.new("trace")
    server = remote.serve("strace", "-f", "-o", trace)
    type_knock(laptop, "O", "22"), type_knock(laptop, "C", "22")
    monitor = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()[0]
    os.kill(int(monitor), signal.SIGTERM)
    server.process.wait(15)
    text = trace.read_text(errors="replace")
    calls = set(re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed)", text, re.M))
    assert len(calls) > 40 and calls <= members("@system-service") | members("@default"), calls
    assert set(re.findall(r"socket(?:pair)?\((\w+)", text)) <= set(unit("RestrictAddressFamilies"))


# ---- the demo --------------------------------------------------------------------------------------------------------

def run_demo(tmp_path, interrupt_after=None):
    """The demo in a process group of its own, with Ctrl-C or without -> (exit code, output). It leaves no namespace."""
    if os.geteuid():
        pytest.skip("makes network namespaces: run as root")
    with open(tmp_path / "demo", "w+") as file:
        process = subprocess.Popen([sys.executable, HERE / "test_tariq.py", "demo"], stdin=DEVNULL, stdout=file,
                                   stderr=file, start_new_session=True)
        if interrupt_after:
            assert eventually(lambda: interrupt_after in (tmp_path / "demo").read_text(), 30)
            os.killpg(process.pid, signal.SIGINT)
        code = process.wait(90)
        assert not [name for name in sh("ip", "netns").stdout.split() if name.startswith(f"tq-{process.pid}-")]
        file.seek(0)
        return code, file.read()


def test_the_demo_shows_what_the_readme_says(tmp_path):
    code, said = run_demo(tmp_path)
    assert code == 0, said
    steps = ["ignored states", "exit status 124", "opened tcp/22 on box for 198.51.100.20", "SSH-2.0", "--datestop",
             "ignored states", "up ", "refused: ", "UdpTransport", "closed tcp/22", "0 came back", "exit status 124"]
    assert all(step in said for step in steps) and said.count("65535 scanned ports") == 2
    at = [said.index(step) for step in steps[2:5] + steps[7:9] + steps[10:11]]
    assert at == sorted(at)


@pytest.mark.parametrize("moment", ["Three hosts", "opened tcp/22"])
def test_ctrl_c_in_the_demo_leaves_nothing(tmp_path, moment):
    code, said = run_demo(tmp_path, moment)
    assert code == 130 and "Traceback" not in said and said.endswith("interrupted: all of it is removed\n"), said


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
    """Three throwaway hosts, a closed door and a knock. What stands after a $ is run as it stands; the demo fails where
    the output is not what the words before it say."""
    def say(text):
        print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)

    def show(host, *argv, expect="", without="\0", user=None):
        print(f"{'nobody@' if user else ''}{host.name}$ {shlex.join(map(str, argv))}", flush=True)
        done = host.run(*argv, user=user, check=False, cwd=lab.dir)
        said = (done.stdout + done.stderr).strip()
        lines = "\n".join(f"  {line}" for line in said.splitlines() if line)
        print(lines or f"  (nothing; exit status {done.returncode})", flush=True)
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
        with Lab() as lab, contextlib.ExitStack() as stack:
            say("Three hosts in network namespaces: a server, a client and a scanner. Your own network and firewall "
                "are not "
                "touched.")
            server, client, scanner = (lab.host(*host) for host in (("server", 10), ("client", 20), ("scanner", 30)))
            server.sshd(lab.dir / "host_key")
            server.drop_policy()
            conf = make_server(lab, server)
            make_client(lab, client, server, conf, allow=("O 22", "C 22", "E uptime *"))
            tariq_server = Server(lab, server, conf).wait_log("listening for")
            stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)  # runs first: nothing interrupts the removal
            recorder = client.popen(sys.executable, "-c", RECORDER, server.ip, stdin=PIPE, stdout=PIPE)
            recorder.stdout.readline()

            say("The server runs sshd and Tariq. Only sshd has a socket; Tariq listens on nothing:")
            show(server, "ss", "-Hlntup", expect=":22", without="python")
            say("The firewall drops all that is new. The scanner tries every port (nmap calls any host up that shares "
                "its switch):")
            scan()
            say("The client, an ordinary user, has no luck either:")
            banner(client, without="SSH")
            say("It knocks. The server proves itself, the client proves itself, and port 22 opens for this client's "
                "address:")
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
            say("A firewall on the way now drops SYNs that carry data, as some do. The client closes the door all the "
                "same: its "
                "second try goes by UDP:")
            client.run("iptables", "-A", "OUTPUT", "-p", "tcp", "--syn", "-m", "length",
                       "--length", "200:", "-j", "DROP")
            show(client, "./tariq.py", "knock", "-v", "-c", "client/tariq.conf",
                 "box", "C", "22", expect="closed tcp/22",
                 user=NOBODY)
            client.run("iptables", "-F", "OUTPUT")
            banner(client, without="SSH")
            say("Somebody has recorded the knock that opened it, and sends it again, packet by packet, from the same "
                "address:")
            replayed = recorder.communicate("replay\n", timeout=10)[0].strip()
            print(f"  {replayed}")
            assert replayed.endswith(" 0 came back") and not replayed.startswith("0 "), replayed
            banner(client, without="SSH")
            say("What the server has logged of all that:")
            print("\n".join(f"  {line}" for line in tariq_server.log.splitlines()
                            if f" {client.ip} " in line and "iptables" not in line))
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
    running = Server(lab, server, conf).wait_log("listening for")
    return running, [str(lab.dir / "tariq.py"), "knock", "-c", str(client_conf)]


def part(host, name, *arguments):
    """A part of a benchmark (a function of this file) as a process of its own in the host's namespace."""
    return host.popen(sys.executable, HERE / "test_tariq.py", name, *arguments, stdin=PIPE, stdout=PIPE)


# ---- bench latency -----------------------------------------------------------------------------------------------

RATIOS = {"tariq, kernel": 0.55, "tariq, udp": 0.5, "tariq, crafted": 1.2}  # wanted, to fwknop with GPG in the same run
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
        command = subprocess.Popen(json.loads(line), stdin=DEVNULL, stdout=PIPE, stderr=subprocess.STDOUT)
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
    return generate(home, f"{home.name}@bench", "rsa2048", run=lambda *words: host.run(*words, user=user))


def trust_each_other(rings):
    """rings: two of (host, home, user, fingerprint). Each gets the other's public key and trusts it."""
    for mine, other in (rings, rings[::-1]):
        host, home, user, _ = mine
        key = other[0].run(*gpg(other[1], "--armor", "--export", other[3]), user=other[2]).stdout
        host.run(*gpg(home, "--import"), user=user, input=key)
        host.run(*gpg(home, "--import-ownertrust"), user=user, input=f"{other[3]}:6:\n")


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
                     stderr=file, stdin=DEVNULL)
    command = ["fwknop", "--rc-file", str(directory / "fwknoprc"), "--no-save-args", "-n", "box"]
    return command, lambda: server.run("iptables", "-F", chain)


def start_knockd(lab, server):
    """knockd with the example its package brings, on a chain of its own -> (command, close)."""
    path = lab.dir / "knockd.conf"
    server.run("iptables", "-N", "KNOCKD")
    server.run("iptables", "-A", "INPUT", "-j", "KNOCKD")
    path.write_text("[options]\n  logfile = /dev/null\n[open]\n  sequence = 7000,8000,9000\n  seq_timeout = 5\n"
                    "  tcpflags = syn\n  command = /sbin/iptables -A KNOCKD -s %IP% -p tcp --dport 22 -j ACCEPT\n")
    server.popen("knockd", "-i", "eth0", "-c", path, "-p", lab.dir / "knockd.pid", stdin=DEVNULL,
                 stdout=DEVNULL, stderr=DEVNULL)
    return ["knock", server.ip, "7000", "8000", "9000"], lambda: server.run("iptables", "-F", "KNOCKD")


def latency_tools(lab, server, client):
    """{tool: (its command, the function that shuts its door)}, or (None, None) where it is not installed."""
    _, tariq_knock = start_tariq(lab, server, client)
    # Every command is started by setpriv, so that its millisecond is in all the figures. Only crafted needs root.

    def close_tariq():  # by a knock: a flush of the chain would leave the server with doors it believes open
        client.run(*tariq_knock, "--transport", "kernel", "box", "C", "22", user=NOBODY)

    tools = {f"tariq, {kind}": (start + tariq_knock + ["--transport", kind, "box", "O", "22"], close_tariq)
             for kind, start in (("kernel", as_user(NOBODY)), ("udp", as_user(NOBODY)), ("crafted", as_user(0)))}
    starters = {"fwknop, GPG + HMAC": ("fwknopd", lambda: start_fwknop(lab, server, client, "gpg", 62201)),
                "fwknop, Rijndael + HMAC": ("fwknopd", lambda: start_fwknop(lab, server, client, "rijndael", 62202)),
                "knockd, no cryptography": ("knockd", lambda: start_knockd(lab, server))}
    for tool, (program, start) in starters.items():
        tools[tool] = (None, None)
        if shutil.which(program):
            command, close = start()
            tools[tool] = (as_user(NOBODY) + command, close)
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
        server.sshd(lab.dir / "sshd-key")
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
        bench_parts(lab, server, client)

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


def bench_parts(lab, server, client, rounds=15):
    """What the time of client and server consists of, each part by itself."""
    def median(function):
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            function()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)

    def program(host, *argv, **options):
        return median(lambda: host.run(*argv, **options)) - median(lambda: host.run("true", user=options.get("user")))

    text, conf = TARIQ.read_text(), lab.dir / "client" / "tariq.conf"
    imports = "\n".join(re.findall(r"(?m)^(?:import|from) .*", text))
    peer = Peer(SimpleNamespace(client=client, server=server, me=conf)).seal()
    png, home, own = make_png(b"x" * 100), conf.parent / "gpg", peer.to
    python, sealed, ring = (sys.executable, "-I", "-c"), lab.dir / "sealed", lab.dir / "server" / ".server-gpg"
    start = program(client, *python, "pass")
    sealed.write_bytes(peer.sealed)
    unseal = gpg(ring, "-o", "/dev/null", "--try-secret-key", own, "--decrypt", sealed)
    seal = gpg(home, "-o", "/dev/null", "-r", own, "-u", f"<{peer.user}>", "-s", "-e", conf)
    packet = tariq.split(packet_of(1000, bytes(900)), None)
    rule = ["iptables", "-w", "5", "-A", "tariq", "-s", "192.0.2.9", "-j", "ACCEPT"]
    rows = [("client: interpreter", start), ("client: imports", program(client, *python, imports) - start),
            ("client: compile tariq.py", median(lambda: compile(text, "tariq.py", "exec"))),
            ("client: cover and PNG", median(lambda: tariq.hide(tariq.cover(""), b"x" * 100))),
            ("client: gpg, seal", program(client, *seal, user=NOBODY)),
            ("server: gpg, unseal", program(server, "timeout", "1", *unseal, user=pwd.getpwnam("tariq").pw_uid)),
            ("server: PNG, by Pillow", median(lambda: tariq.reveal(png))),
            ("server: one reply, by scapy", median(lambda: tariq.respond(packet, bytes(100)))),
            ("server: firewall, check", program(server, "iptables", "-w", "5", "-C", "INPUT", "-j", "tariq")),
            ("server: firewall, rule", program(server, *rule))]
    server.run("iptables", "-F", "tariq")
    print("\nwhat that consists of, medians in ms:")
    for name, took in rows:
        print(f"  {name:28} {took:6.1f}")


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
        due, sent = min(int(now * rate) - sent, rate), int(now * rate)  # at most a second that it missed is made up for
        while due > 0:  # to the end of the pool at most; a frame that the wire does not take is skipped
            done = max(1, sendmmsg(sock.fileno(), ctypes.byref(headers, 64 * place), min(due, POOL - place), 0))
            place, due = (place + done) % POOL, due - done
        time.sleep(max(0, began + now + BATCH - time.monotonic()))


def dropped(host):
    """Packets that a full receive buffer of the host's packet sockets has cost so far: ss(8), skmem."""
    return sum(map(int, re.findall(r"skmem:\([^)]*,d(\d+)\)", host.run("ss", "-0nm").stdout)))


def cpu_seconds(pid):
    """utime + stime so far: proc(5). gpg and iptables are processes of their own and do not count."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


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
        server.sshd(lab.dir / "sshd-key")
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


# ---- command line ----------------------------------------------------------------------------------------------------

if hasattr(pytest, "main"):  # where pytest-xdist runs several tests at once, these hosts are made once
    for test in [value for name, value in list(globals().items()) if name.startswith("test_")]:
        for name in {"nat", "far", "site_with_router", "locked"} & {*inspect.signature(test).parameters}:
            pytest.mark.xdist_group(name)(test)

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
