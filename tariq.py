#!/usr/bin/python3 -I
"""Tariq: port knocking with hidden, signed, encrypted requests. One file, both ends. Read it before you run it.

The server's firewall drops everything, and the server listens on no port: it sniffs. The exchange:

    client                                                          server
      request in the low bits of a PNG, sealed with gpg, cut in N
      SYN + frame(fragment i) -----> secret_ports[i] ----------->   authentic? new? whole? sealed by whom?
      <------- SYN-ACK + frame(sealed challenge) ----------------   {knock id, nonce, address seen}
      sealed by my server? for my knock? my address?
      ACK + frame(HMAC-SHA256(nonce, knock id)) ---------------->   this client, alive now, at this address
      <------- segment + frame(sealed result) -------------------   policy, then act, then answer

A frame is nonce(12) | tag(16) | masked time and data. Each has a fresh nonce, so the same bytes twice are a replay, always;
a client that repeats itself after a loss makes new frames. To seal is to sign as the sender and encrypt to the receiver.

Trust boundaries:
  - bytes from the wire reach `Listener.gate` and the two functions it calls, and nothing else until the tag holds;
  - the listener process (gpg, Pillow, scapy) has no privileges: one packet socket, one socketpair, no capability;
  - the monitor process (root) trusts no message of the listener: what it does stands in [allow] and nowhere else.

Sections, as data flows: config, OpenPGP, steganography, wire, client, listener, monitor (root), set-up, command line.
"""
import argparse, binascii, configparser, errno, fcntl, hashlib, hmac, io, ipaddress, json, os, pwd, re, select, shlex
import signal, socket, struct, subprocess, sys, threading, time
from collections import OrderedDict
from contextlib import suppress
from types import SimpleNamespace

VERSION = "1.0"
# Exit codes after sysexits.h, away from those of most remote commands: E exits with the command's own.
USAGE, BAD_DATA, MISSING, DIED, SYSTEM, NO_ANSWER, WRONG_SERVER, REFUSED, CONFIG = 64, 65, 69, 70, 71, 75, 76, 77, 78
EXIT_CODES = """exit codes: 0 done; E: the remote command's; 64 usage; 65 unusable image, key or profile; 69 a program or
package is missing; 70 the listener died; 71 the system refused; 75 no answer; 76 not this server's key;
77 refused by the server's policy; 78 config"""


class Fault(Exception):
    """What the user can mend: an exit code and the line they read. Caught in `main`, and where one knock ends."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


def printable(text):
    """Text without what could forge a log line or steer a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(text))


def log(text, priority=6):
    """One line on stderr; off a terminal with a priority for journald (sd-daemon(3)): 3 error, 4 warning, 6 info."""
    prefix = time.strftime("%H:%M:%S ") if os.isatty(2) else f"<{priority}>"
    with suppress(OSError):  # a full disk behind stderr must not keep a door open
        os.write(2, f"{prefix}{printable(text)}\n".encode())


# ---- config: an INI file in, checked values out ----------------------------------------------------------------------

def ports_of(text):
    ports = tuple(int(word) for word in text.split(","))
    if len(set(ports)) < len(ports) or max(ports) > 65535:
        raise ValueError
    return ports


def rule_of(text):
    filled = text.format(ip="<ip>", dport="<dport>", until="<until>")  # LookupError for a field that there is not
    if not all(field in filled for field in ("<ip>", "<dport>", "<until>")):
        raise ValueError
    return shlex.split(text)


def command_of(words):
    """The words of a request or of a line of [allow], checked: ['O', '22'] -> ['O', '22/tcp']. Raises ValueError."""
    if not isinstance(words, list) or len(words) < 2 or words[0] not in ("O", "C", "E") \
            or not all(isinstance(word, str) and word.isprintable() for word in words):
        raise ValueError("needs O PORT[/tcp|/udp]..., C PORT... or E COMMAND [ARG...], in printable characters")
    if words[0] == "E":
        return words
    ports = [re.fullmatch(r"([1-9]\d{0,4})(/tcp|/udp)?|\*", word, re.ASCII) for word in words[1:]]
    if len(ports) > PORTS_MAX or not all(port and int(port[1] or 1) < 65536 for port in ports):
        raise ValueError(f"needs ports as 22, 22/tcp or 53/udp, from 1 to 65535, {PORTS_MAX} at most")
    return [words[0], *dict.fromkeys(port[1] + (port[2] or "/tcp") if port[1] else "*" for port in ports)]


PORTS_MAX = 16  # in one request: each is one call of iptables, and others wait meanwhile
RULE = (r"-A \S+ .+", "-A CHAIN first, and {ip}, {dport} and {until}: one address, one port, an end", rule_of)
# What a value has to be: a pattern that it matches whole, words for the error, and what makes a Python value of it.
SYNTAX = {
    "secret_ports": (r"[1-9]\d{0,4}( *, *[1-9]\d{0,4}){4,31}", "5 to 32 unique ports, 1 to 65535, with commas", ports_of),
    "secret": (r"[A-Za-z0-9+/]{43}=", "32 random bytes in base64: head -c 32 /dev/urandom | base64", binascii.a2b_base64),
    "server_key": (r"[0-9A-Fa-f]{40}", "the server key's fingerprint, 40 hex digits without spaces", str.upper),
    "iptables_chain": (r"(?!(INPUT|FORWARD|OUTPUT)$)[A-Za-z0-9_][A-Za-z0-9_-]{0,27}", "the name of a chain of its own", str),
    "open_timeout": (r"\d{1,8}", "a whole number of seconds", int),
    "command_timeout": (r"[1-9]\d{0,2}", "a whole number of seconds, 1 to 999", int),
    "open_tcp_port": RULE, "open_udp_port": RULE,
    "[allow]": (r"[^\0]*", "lines of O PORT[/tcp|/udp]..., C PORT... or E COMMAND [ARG...]",
                lambda text: [command_of(shlex.split(line)) for line in text.splitlines() if line.strip()]),
}


def parse(key, text):
    """The value of a key. Raises ValueError, which does not quote the text: it may be a secret."""
    pattern, need, convert = SYNTAX.get(key, (".*", "one line", str))
    with suppress(ValueError, LookupError, AttributeError):
        if re.fullmatch(pattern, text, re.ASCII):
            return convert(text)
    raise ValueError(f"needs {need}")


CLIENT_CONFIG, CLIENT_RING = "~/.config/tariq/tariq.conf", "~/.config/tariq/gpg"


class Config:
    """One INI file with a secret in it. Raises Fault for each way in which it is unusable."""

    def __init__(self, path, server=False):
        usual = [os.path.expanduser(CLIENT_CONFIG), "/etc/tariq/tariq.conf"]
        self.path = os.path.abspath(path or next(filter(os.path.exists, usual), usual[0]))
        self.ini = configparser.ConfigParser(interpolation=None, delimiters="=", inline_comment_prefixes="#")
        self.ini.optionxform = str  # the users in [allow] keep their case
        try:
            with open(self.path, encoding="utf-8") as file:
                status = os.fstat(file.fileno())
                self.text = file.read()
            self.ini.read_string(self.text)
        except (OSError, ValueError, configparser.Error) as error:  # only the line's number: its text may be a secret
            numbers = [number for number, _ in getattr(error, "errors", [])] or [getattr(error, "lineno", "?")]
            trouble = getattr(error, "strerror", None) or f"line {numbers[0]} is not INI"
            raise Fault(CONFIG, f"{self.path}: {trouble}: give a config with -c, or make one "
                                "(server: tariq.py init; client: tariq.py keygen)") from None
        foreign = status.st_uid not in (0, os.geteuid()) and (server or os.geteuid() != 0)  # what root obeys is root's
        if status.st_mode & 0o077 or foreign:
            raise Fault(CONFIG, f"{self.path}: others can read its secret or change it: chmod 600 {self.path}, and own it")

    def get(self, key, *sections, default=None, syntax=None):
        """The first value that one of the sections has for a key, parsed."""
        for section in sections:
            text = self.ini.get(section, key, fallback="").strip()
            if text:
                try:
                    return parse(syntax or key, text)
                except ValueError as error:
                    raise Fault(CONFIG, f"{self.path}: [{section}] {key}: {error}") from None
        if default is None:
            raise Fault(CONFIG, f"{self.path}: [{sections[0]}] {key} is missing: see tariq.conf.example")
        return default

    def allowed(self):
        """{user: [pattern, ...]}, of which nothing is allowed that is not there."""
        users = self.ini["allow"] if self.ini.has_section("allow") else ()
        return {user: self.get(user, "allow", default=[], syntax="[allow]") for user in users}


# ---- OpenPGP: bytes in, sealed bytes out, and back; as the keyring's owner -------------------------------------------

GPG = "gpg --batch --no-tty --quiet --no-options --no-auto-check-trustdb --no-random-seed-file --trust-model always".split()
GPG_TIME = 10  # seconds; a seal takes 10 ms, 40 ms with RSA-4096
GPG_INPUT, GPG_OUTPUT = 60_000, 1 << 20  # bytes; input stays below a pipe's 64 KiB, so that writing it never waits
PLAIN_MAX = 8192  # bytes that may come out of a seal: twice a PNG of SIDE x SIDE pixels
NO_PINENTRY = {"85", "32848"}  # libgpg-error: no pinentry; no terminal for it (ENOTTY)


class Keyring:
    """A gpg home directory. Root runs gpg as the directory's owner: what is in there may command gpg-agent."""

    def __init__(self, home):
        self.home, self.passphrase, self.run_as, self.time = os.path.expanduser(home), b"", {}, GPG_TIME
        self.environment = {**os.environ, "LC_ALL": "C"}
        try:
            self.owner = pwd.getpwuid(os.stat(self.home).st_uid)
        except (OSError, KeyError):
            raise Fault(CONFIG, f"{self.home}: no keyring directory of a user: tariq.py init or keygen makes one") from None
        if os.geteuid() == 0 and self.owner.pw_uid != 0:
            self.run_as = {"preexec_fn": lambda: drop_privileges(self.owner), "start_new_session": True}
            self.environment = {"PATH": SAFE_PATH, "HOME": self.home, "LC_ALL": "C"}

    def gpg(self, *arguments, data=b""):
        """Run gpg once -> (output, status lines as lists of words). `data` is bytes, or makes them while gpg starts. Raises
        Fault with gpg's words. Bounded: GPG_INPUT bytes in, GPG_OUTPUT out, a pipe's capacity of status, `time` seconds."""
        status_end, status = os.pipe()
        options = ["--homedir", self.home, "--status-fd", str(status)]
        if self.passphrase:  # its line goes before the data, so that it is in no argument, variable or file
            options += ["--pinentry-mode", "loopback", "--passphrase-fd", "0"]
        output, end = b"", time.monotonic() + self.time
        with open(status_end, "rb") as status_file:
            try:
                process = subprocess.Popen([*GPG, *options, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, pass_fds=[status], env=self.environment, cwd="/", **self.run_as)
            except subprocess.SubprocessError:  # from drop_privileges
                raise Fault(SYSTEM, "root cannot become the keyring's owner: that takes CAP_SETUID, SETGID and SETPCAP") from None
            finally:
                os.close(status)
            with process:
                with suppress(BrokenPipeError):  # gpg ended early; its status says why
                    process.stdin.write(self.passphrase + (data() if callable(data) else data)[:GPG_INPUT])
                    process.stdin.close()
                while select.select([process.stdout], [], [], max(0, end - time.monotonic()))[0]:
                    chunk = os.read(process.stdout.fileno(), 65536)
                    output += chunk
                    if not chunk or len(output) > GPG_OUTPUT:
                        break
                else:
                    process.kill()
                process.stdout.close()
                lines = status_file.read(GPG_OUTPUT).decode(errors="replace").split("\n")
                words = process.stderr.read(GPG_OUTPUT).decode(errors="replace").strip().splitlines()
        lines = [line.split()[1:] for line in lines if re.match(r"\[GNUPG:\] \S", line)]
        if process.returncode == 0:
            return output, lines
        if not self.passphrase and any(line[0] == "FAILURE" and str(int(line[2]) & 0xFFFF) in NO_PINENTRY for line in lines):
            self.passphrase = ask_passphrase()
            return self.gpg(*arguments, data=data)
        if process.returncode < 0:
            words = [f"gpg was killed by signal {-process.returncode}; it has {self.time} s: is gpg-agent stuck?"]
        raise Fault(BAD_DATA, f"{'; '.join(words)[:300] or 'gpg failed'} (keyring {self.home})")

    def seal(self, data, signer, recipient):
        """Sign and encrypt (RFC 4880): binary, recipient hidden, not compressed."""
        return self.gpg("--compress-algo", "none", "--no-encrypt-to", "--local-user", signer, "--hidden-recipient",
                        recipient, "--sign", "--encrypt", data=data)[0]

    def unseal(self, sealed, own):
        """Decrypt with the key `own`, verify -> (primary fingerprint of the signature's key, at most PLAIN_MAX bytes).
        Takes only what gpg's status lines prove (GnuPG doc/DETAILS): one encrypted message, one signature, and that good."""
        plain, lines = self.gpg("--max-output", str(PLAIN_MAX), "--try-secret-key", own, "--decrypt", data=sealed)
        said = [line[0] for line in lines]
        once = all(said.count(word) == 1 for word in ("DECRYPTION_OKAY", "PLAINTEXT", "NEWSIG", "GOODSIG", "VALIDSIG"))
        if not once or {"BADSIG", "ERRSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "DECRYPTION_FAILED"}.intersection(said):
            raise Fault(BAD_DATA, "not one encrypted message with one valid signature")
        return parse("server_key", lines[said.index("VALIDSIG")][-1]), plain

    def keys(self, kind, command, data=b""):
        """[(fingerprint, user ids)] of the keys of a kind, pub or sec, that a gpg command lists (GnuPG doc/DETAILS)."""
        keys = []
        for line in self.gpg("--with-colons", command, data=data)[0].decode(errors="replace").split("\n"):
            field = line.split(":")
            if field[0] in ("pub", "sec"):
                keys.append((field[0], [], []))
            elif field[0] == "fpr":  # the first after pub or sec is the primary key's
                keys[-1][1].append(field[9])
            elif field[0] == "uid":
                keys[-1][2].append(field[9].replace("\\x3a", ":"))
        return [(fingerprints[0], names) for found, fingerprints, names in keys if found == kind]

    def find(self, user, keys):
        """The fingerprint of the one key whose fingerprint, user id or email is exactly this. Raises Fault."""
        found = [key for key, names in keys if named(user, key, names)]
        if len(found) != 1:
            raise Fault(CONFIG, f"{user} matches {len(found)} keys in {self.home}, not one: "
                                + ("name one by its fingerprint" if found else "import or make its key"))
        return found[0]


def named(user, key, names):
    return user.upper() == key or user in names or any(name.endswith(f"<{user}>") for name in names)


def ask_passphrase():
    import getpass
    with suppress(OSError), open("/dev/tty", "rb"):
        return getpass.getpass("passphrase of your Tariq key: ").encode() + b"\n"
    raise Fault(SYSTEM, "your key needs its passphrase, and there is neither a pinentry nor a terminal to ask on: "
                        "install pinentry-curses, or unlock the key in gpg-agent first")


# ---- steganography: data and a cover image in, a PNG out, and back; of others' images, only signed ones come here -----

SIDE = 36  # pixels: 36 x 36 x 3 low bits carry 486 bytes, and the PNG of 4 KB, sealed with RSA-4096, fits 5 packets


def cover_image(directory):
    """A random SIDE x SIDE crop of a random PNG of the directory, as RGB; without a directory, a generated image."""
    from PIL import Image
    if not directory:
        return Image.frombytes("RGB", (SIDE, SIDE), os.urandom(SIDE * SIDE * 3))
    import random
    chance, path = random.SystemRandom(), os.path.expanduser(directory)
    try:
        path = os.path.join(path, chance.choice([name for name in os.listdir(path) if name.lower().endswith(".png")]))
        with Image.open(path, formats=["PNG"]) as image:
            left, top = (chance.randint(0, size - SIDE) for size in image.size)  # ValueError where it is too small
            return image.crop((left, top, left + SIDE, top + SIDE)).convert("RGB")
    except (OSError, SyntaxError, ValueError, IndexError, Image.DecompressionBombError):
        raise Fault(BAD_DATA, f"{path}: needs PNG images (.png) of at least {SIDE} x {SIDE} pixels to hide in") from None


def hide(image, data):
    """RGB image, bytes -> PNG with length(2) | data in its lowest bits. Raises Fault where the data is too long."""
    pixels = bytearray(image.tobytes())
    bits = "".join(f"{byte:08b}" for byte in len(data).to_bytes(2, "big") + data)
    if len(bits) > len(pixels):
        raise Fault(USAGE, f"the request is {(len(bits) - len(pixels) + 7) // 8} bytes too long for one knock")
    for place, bit in enumerate(bits):
        pixels[place] = pixels[place] & 0xFE | (bit == "1")
    image.frombytes(bytes(pixels))
    image.save(png := io.BytesIO(), "PNG")
    return png.getvalue()


def reveal(png):
    """PNG -> the hidden data. The size is checked before a pixel is decoded: a bomb stays packed. Raises Fault."""
    from PIL.PngImagePlugin import PngImageFile
    try:
        image = PngImageFile(io.BytesIO(png))
        if image.size != (SIDE, SIDE) or image.mode != "RGB":
            raise ValueError
        bits = "".join(str(sample & 1) for sample in image.tobytes())
        end = 16 + 8 * int(bits[:16], 2)
        if end > len(bits):
            raise ValueError
        return int("0" + bits[16:end], 2).to_bytes((end - 16) // 8, "big")
    except Exception:  # Pillow has many for bad files; whichever it is, the answer is no
        raise Fault(BAD_DATA, "not an image that Tariq made") from None


# ---- wire: data in, frames that look random out, and back ------------------------------------------------------------

NONCE, TAG, STAMP, ID = 12, 16, 6, 12  # bytes; the stamp counts milliseconds since 1970
HEAD = NONCE + TAG + STAMP  # bytes of a frame before its data
SLOT = 60  # seconds; the slots before and after count too, so clocks may differ by a minute
FRAGMENT_MAX, REPLY_MAX = 1200, 1400  # bytes of payload: a fragment passes an MTU of 1280, RSA-4096 replies one of 1500


def derive_key(secret, ports):
    """The 32-byte key that a server shares with its clients."""
    return hashlib.blake2b(struct.pack(f">{len(ports)}H", *ports), key=secret, person=b"tariq 1", digest_size=32).digest()


def fragment_label(position, count):
    return b"knock %d/%d" % (position, count)


def tagger(key, label):
    """Keyed BLAKE2b (RFC 7693) for one label of at most 16 bytes: the direction, and the position in the sequence."""
    return hashlib.blake2b(key=key, person=label, digest_size=TAG)


def mask(key, label, nonce, data):
    """XOR with a SHAKE-256 keystream (FIPS 202); the same again takes it off."""
    stream = hashlib.shake_256(key + label + nonce).digest(len(data))
    return (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")


def frame(key, label, data):
    nonce, tag, now = os.urandom(NONCE), tagger(key, label), time.time()
    masked = mask(key, label, nonce, int(now * 1000).to_bytes(STAMP, "big") + data)
    tag.update(nonce + masked + int(now // SLOT).to_bytes(8, "big"))
    return nonce + tag.digest() + masked


def authentic(tag, payload):
    """Whether a payload carries this tagger's tag, made in this time slot or a neighbour; in constant time."""
    tag, given, slot = tag.copy(), payload[NONCE:NONCE + TAG], int(time.time() // SLOT)
    tag.update(payload[:NONCE] + payload[NONCE + TAG:])
    for number in (slot, slot - 1, slot + 1):
        timed = tag.copy()
        timed.update(number.to_bytes(8, "big"))
        if hmac.compare_digest(timed.digest(), given):
            return True
    return False


def unframe(key, label, payload):
    """Payload -> data, or None where it is no authentic frame with this label."""
    if len(payload) >= HEAD and authentic(tagger(key, label), payload):
        return mask(key, label, payload[:NONCE], payload[NONCE + TAG:])[STAMP:]
    return None


def tcp_span(packet, ip):
    """(TCP header, payload, end): offsets in a packet whose IP header is at `ip` (RFC 791, 8200, 9293), or None for what
    is not whole TCP with a payload. These bytes may be anybody's: nothing is taken that does not lie inside."""
    if len(packet) < ip + 40:
        return None
    if packet[ip] >> 4 == 4 and packet[ip + 9] == socket.IPPROTO_TCP:
        tcp, end = ip + (packet[ip] & 15) * 4, ip + (packet[ip + 2] << 8 | packet[ip + 3])
    elif packet[ip] >> 4 == 6 and packet[ip + 6] == socket.IPPROTO_TCP:
        tcp, end = ip + 40, ip + 40 + (packet[ip + 4] << 8 | packet[ip + 5])
    else:
        return None
    if not tcp + 20 < end <= len(packet):
        return None
    payload = tcp + (packet[tcp + 12] >> 4) * 4
    return (tcp, payload, end) if tcp + 20 <= payload < end else None


# ---- client: a request in, one line and an exit code out; as an ordinary user ----------------------------------------

NO_COOKIE = 34  # TCP_FASTOPEN_NO_COOKIE in linux/tcp.h
WAIT, GROWTH, LONGEST = 0.3, 1.3, 1.2  # seconds to the first repeat, factor to the next (jittered), longest
TRANSLATED = [ipaddress.ip_network(net) for net in (  # who has such an address may be seen with another
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16", "192.0.0.0/29", "fc00::/7", "fe80::/10")]


class KernelTransport:
    """An ordinary socket's SYN carries the fragment: TCP Fast Open (RFC 7413) without a cookie. Needs no privilege."""

    def __init__(self, family, address, ports):
        self.family, self.address, self.ports, self.sockets, self.trouble = family, address, ports, [], ""
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting UDP sends nothing: it looks up the route
            probe.connect((address[0], 9, *address[2:]))
            self.own = probe.getsockname()[0].partition("%")[0]

    def knock(self, frames):
        for port, payload in zip(self.ports, frames):
            sock = socket.socket(self.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self.sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave nothing half-open
            try:
                sock.setsockopt(socket.IPPROTO_TCP, NO_COOKIE, 1)
                if sock.sendto(payload, socket.MSG_FASTOPEN, (self.address[0], port, *self.address[2:])) < len(payload):
                    self.trouble = "the path's MTU is too small for a fragment"
            except OSError as error:
                self.trouble = error.strerror
                if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
                    raise Fault(SYSTEM, "this kernel sends no TCP Fast Open: sysctl -w net.ipv4.tcp_fastopen=1, or "
                                        "knock as root with --transport crafted") from None
            if port != self.ports[-1]:
                self.sockets.pop().close()  # its SYN is out, and only the last port answers
        while len(self.sockets) > 4:
            self.sockets.pop(0).close()  # before its third time-out, at which Linux may switch Fast Open off

    def receive(self, timeout):
        for sock in select.select(self.sockets, [], [], timeout)[0]:
            self.sockets.remove(sock)
            try:
                if payload := sock.recv(2048):
                    self.sockets.append(sock)  # the last one is where `answer` sends
                    return payload
            except OSError as error:
                self.trouble = error.strerror
            sock.close()
        return None

    def answer(self, payload):
        with suppress(OSError):  # a connection that was reset: the time runs out, and says so
            self.sockets[-1].send(payload)

    def close(self):
        for sock in self.sockets:
            sock.close()


class CraftedTransport(KernelTransport):
    """Every packet made and read with scapy on raw sockets (CAP_NET_RAW). The kernel answers the SYN-ACK, of which it
    knows nothing, with RST: the server ignores it."""

    def __init__(self, family, address, ports):
        super().__init__(family, address, ports)
        self.scapy, self.port = load_scapy(), 32768 + int.from_bytes(os.urandom(2), "big") % 28000
        self.ip = (self.scapy.IP if family == socket.AF_INET else self.scapy.IPv6)(src=self.own, dst=address[0])
        try:
            self.raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            self.sniffer, self.offset = packet_socket(self.scapy, self.ip.route()[0],
                                                      f"tcp and src host {address[0]} and src port {ports[-1]} and "
                                                      f"dst portrange {self.port}-{self.port + 4000}")
        except PermissionError:
            raise Fault(SYSTEM, "crafted packets need root or CAP_NET_RAW: use sudo, or --transport kernel") from None
        self.sockets += [self.raw, self.sniffer]

    def send(self, payload, **fields):
        packet = self.ip / self.scapy.TCP(window=64240, **fields) / payload
        try:
            self.raw.sendto(bytes(packet), (self.address[0], 0, *self.address[2:]))
        except OSError as error:
            self.trouble = error.strerror

    def knock(self, frames):
        self.port += 1  # a new connection in the eyes of the firewalls on the way
        for port, payload in zip(self.ports, frames):
            seq, *cookie = struct.unpack(">III", os.urandom(12))  # the cookie makes data in a SYN look usual
            self.send(payload, sport=self.port, dport=port, flags="S", seq=seq, options=[
                ("MSS", 1460), ("SAckOK", b""), ("NOP", None), ("WScale", 7), ("TFO", tuple(cookie)), ("NOP", None), ("NOP", None)])

    def receive(self, timeout):
        span = None
        if select.select([self.sniffer.ins], [], [], timeout)[0]:
            packet = self.sniffer.ins.recv(2048)
            span = tcp_span(packet, self.offset)
        if span is None:
            return None
        tcp, start, end = span
        server, own_port, seq, ack = struct.unpack_from(">HHII", packet, tcp)
        after = (seq + (packet[tcp + 13] >> 1 & 1) + end - start) % 2**32  # a SYN counts as one byte
        self.back = {"sport": own_port, "dport": server, "flags": "PA", "seq": ack, "ack": after}
        return packet[start:end]

    def answer(self, payload):
        self.send(payload, **self.back)


def open_transport(host, family, kind, ports):
    """A transport to the first address of the host that there is a route to. Raises Fault."""
    with open("/proc/self/status", encoding="ascii") as file:
        net_raw = int(re.search(r"CapEff:\s*(\w+)", file.read())[1], 16) >> 13 & 1  # capabilities(7)
    transport, trouble = CraftedTransport if kind == "crafted" or not kind and net_raw else KernelTransport, None
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, None, family, socket.SOCK_STREAM):
            try:
                return transport(family, address, ports)
            except OSError as error:
                trouble = error
    except (OSError, UnicodeError) as error:
        trouble = error
    raise Fault(NO_ANSWER, f"{printable(host)}: {getattr(trouble, 'strerror', 'no host name')}")


def cmd_knock(options):
    """Knock at options.host, prove who is who, print what was done. Returns the exit code."""
    began = time.monotonic()

    def step(text):
        if options.verbose:
            log(f"{(time.monotonic() - began) * 1000:6.0f} ms  {text}")

    try:
        command = command_of([options.action, *options.words])
        ports = options.ports and parse("secret_ports", options.ports)
        timeout = parse("command_timeout", options.timeout)
    except ValueError as error:
        raise Fault(USAGE, str(error)) from None
    config, sections = Config(options.config), (options.host, "client")
    ports, secret = ports or config.get("secret_ports", *sections), config.get("secret", *sections)
    key, count, server = derive_key(secret, ports), len(ports), config.get("server_key", *sections)
    user = options.user or config.get("user", *sections)
    user = f"<{user}>" if "@" in user and "<" not in user else user  # gpg: exactly this email; else a fingerprint
    ring = Keyring(options.gpg_dir or config.get("client_gpg_dir", *sections, default=CLIENT_RING))
    ring.time = 120  # pinentry waits for a person
    covers = config.get("img_dir", *sections, default="") if options.img_dir is None else options.img_dir
    transport = open_transport(config.get("host", *sections, default=options.host), options.family, options.transport, ports)
    address = "" if any(ipaddress.ip_address(transport.own) in network for network in TRANSLATED) else transport.own

    knock_id = os.urandom(ID)
    request = json.dumps({"to": server, "id": knock_id.hex(), "cmd": command, "ip": address}, ensure_ascii=False, separators=(",", ":"))
    sealed = ring.seal(lambda: hide(cover_image(covers), request.encode()), user, server)
    size = -(-len(sealed) // count)
    if HEAD + ID + size > FRAGMENT_MAX:
        raise Fault(CONFIG, f"{len(sealed)} bytes do not fit {count} packets: use more secret_ports, or smaller keys")
    step(f"request hidden in a PNG and sealed for {server}: {len(sealed)} bytes")

    def unseal(data, least):
        """What the server, and nobody else, sealed for this knock, `least` bytes at least; None for another."""
        try:
            signer, plain = ring.unseal(data, user)
        except Fault as fault:
            if "decryption failed" in str(fault):
                return None  # sealed for somebody else, and sent to us by whoever saw it
            raise Fault(WRONG_SERVER, f"an answer that server_key {server} did not seal: {fault}") from None
        if not hmac.compare_digest(signer, server):
            raise Fault(WRONG_SERVER, f"the answer is signed by {signer}, not by server_key {server}")
        return plain[ID:] if hmac.compare_digest(plain[:ID], knock_id) and len(plain) >= ID + least else None

    # The client alone drives the exchange through losses: it repeats its knock until the result is there. The server answers
    # with the challenge, or with the result as soon as it has one, and acts once.
    challenge, result, wait, until = None, None, WAIT, time.monotonic() + timeout
    try:
        while not result and time.monotonic() < until:
            transport.knock([frame(key, fragment_label(position, count), knock_id + sealed[position * size:(position + 1) * size])
                             for position in range(count)])
            step(f"{count} fragments sent to {transport.address[0]} by {type(transport).__name__}")
            again = min(until, time.monotonic() + wait * (0.75 + os.urandom(1)[0] / 512))
            wait = min(wait * GROWTH, LONGEST)
            while not result and (left := again - time.monotonic()) > 0:
                payload = transport.receive(left) or b""
                if data := unframe(key, b"result", payload):
                    result = unseal(data, 2)
                elif data := unframe(key, b"challenge", payload):
                    if not challenge:
                        challenge = unseal(data, 34)
                        if not challenge:
                            continue
                        patience, seen = min(999, int.from_bytes(challenge[32:34], "big")), printable(challenge[34:].decode(errors="replace"))
                        step(f"challenge sealed by {server}: it is the server, and it sees this client at {seen}")
                        if address and seen != address:
                            raise Fault(WRONG_SERVER, f"the server sees {seen}, but this machine is {address}: someone relays the knock")
                        until = time.monotonic() + timeout + patience
                    transport.answer(frame(key, b"answer", knock_id + hmac.digest(challenge[:32], knock_id, "sha256")))
                    step("answer sent")
    finally:
        transport.close()
    if not challenge:
        raise Fault(NO_ANSWER, f"no answer from {options.host} in {timeout} s: wrong secret_ports or secret, a clock "
                    "more than a minute off, a key that the server does not know, no server, or a firewall on the way"
                    + (f" ({transport.trouble})" if transport.trouble else ""))
    if not result:
        raise Fault(NO_ANSWER, f"{options.host} sent a challenge but no result in {timeout + patience} s: knock again")
    step("result received")
    done, status, text = result[0], result[1], result[2:]
    if not done or command[0] != "E":
        text = printable(text.decode(errors="replace")).replace("{host}", options.host)
    if not done:
        raise Fault(status or REFUSED, f"{options.host}: {text}")
    os.write(1, text if command[0] == "E" else f"{text}\n".encode())
    return status


# ---- listener: packets in, requests to the monitor out; unprivileged, and the only reader of the wire -----------------

SEEN_MAX = 65536  # nonces remembered: three minutes of frames at 360 a second; the oldest goes first
KNOCKS_MAX, KNOCKS_EACH = 256, 16  # knocks under way in all, and from one address (IPv6: one /64)
ANSWER_TIME = 30  # seconds from a challenge to its answer
EVICTED = ("refused", "done", "collecting", "working", "challenged", "asked")  # when there are too many: these first, oldest first
WORKERS, WORKERS_EACH = 4, 2  # threads that wait for gpg, in all and for new knocks from one address
RECEIVE_BUFFER = 64 << 20  # bytes: a third of a second of packets at 100,000 a second
MESSAGE_MAX = 8192  # bytes of a message between listener and monitor
RESULT_LEAST = 160  # bytes that every result may have, also where RSA-4096 leaves little of a packet


def load_scapy():
    """The parts of scapy in use (never scapy.all): 0.1 s to import, so the kernel transport does without."""
    import logging
    logging.getLogger("scapy").setLevel(logging.CRITICAL)
    import scapy.arch
    from scapy.arch.common import compile_filter
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether
    from scapy.error import Scapy_Exception
    compile_filter("tcp", linktype=1)  # raises where libpcap is missing; scapy 2.5's sockets would go on without a filter
    scapy.config.conf.sniff_promisc = False  # promiscuous mode would show
    return SimpleNamespace(conf=scapy.config.conf, IP=IP, TCP=TCP, IPv6=IPv6, Ether=Ether, Exception=Scapy_Exception)


def packet_socket(scapy, interface, bpf):
    """(scapy L2 socket behind a kernel filter, length of its packets' link header)."""
    with open(f"/sys/class/net/{interface}/type", encoding="ascii") as file:
        link_header = 14 if file.read().strip() in ("1", "772") else 0  # Ethernet and loopback; tunnels have none
    scapy.conf.ifaces.reload()
    try:
        sock = scapy.conf.L2socket(iface=interface, filter=bpf)
    except scapy.Exception as error:
        raise OSError(errno.ENODEV, str(error)) from None
    sock.ins.setsockopt(263, 23, 1)  # SOL_PACKET, PACKET_IGNORE_OUTGOING in linux/if_packet.h
    return sock, link_header


class Knock:
    """A knock under way. Each change of its state is made by one thread alone, which has all else in place before:

    collecting -> working      the loop, with the last fragment      a worker's turn: `challenge`
    working -> challenged      a worker, or -> refused               the challenge is sent, now and at each repeated knock
    challenged -> asked        the loop, with the right answer       the monitor has the request
    asked -> done              the reader of the monitor's results   the result is sent, now and at each repeated knock
    """

    def __init__(self, knock_id, owner):
        self.id, self.owner, self.pieces, self.state, self.queued, self.deadline = knock_id, owner, {}, "collecting", False, 0
        self.segment = self.address = self.nonce = self.signer = self.command = self.challenge = self.plain = self.result = None


class Listener:
    """Gate, reassembly and dialogue. All its memory is bounded, and so is one address's share of it and of the workers: who
    has the secret and floods from one address, stands in that address's way only."""

    def __init__(self, settings, ring, scapy, sock, link_header, channel):
        self.settings, self.ring, self.scapy, self.sock, self.ip, self.channel = settings, ring, scapy, sock, link_header, channel
        count = len(settings.ports)
        self.last, self.labels = count - 1, [fragment_label(position, count) for position in range(count)] + [b"answer"]
        self.positions = {port.to_bytes(2, "big"): position for position, port in enumerate(settings.ports)}
        self.taggers = [tagger(settings.key, label) for label in self.labels]
        import queue  # the client does without
        self.seen, self.knocks, self.jobs, self.began = OrderedDict(), {}, queue.SimpleQueue(), time.time() * 1000

    # ==== unauthenticated bytes: from here ====
    def gate(self, packet):
        """An authentic frame not seen before -> (position, data, payload's offset, its end). Else None, and nothing is kept.
        Positions 0 to N-1 are fragments, in a SYN to their port alone; N is an answer, in an ACK to the last port."""
        span = tcp_span(packet, self.ip)
        if span is None:
            return None
        tcp, start, end = span
        position, flags = self.positions.get(packet[tcp + 2:tcp + 4]), packet[tcp + 13] & 0x17  # ACK, RST, SYN, FIN
        if position == self.last and flags == 0x10:
            position += 1
        elif position is None or flags != 0x02:
            return None
        payload = packet[start:end]
        nonce = payload[:NONCE]
        if len(payload) < HEAD + ID or not authentic(self.taggers[position], payload) or nonce in self.seen:
            return None
        self.seen[nonce] = None
        if len(self.seen) > SEEN_MAX:
            self.seen.popitem(last=False)
        data = mask(self.settings.key, self.labels[position], nonce, payload[NONCE + TAG:])
        if int.from_bytes(data[:STAMP], "big") <= self.began <= time.time() * 1000:
            return None  # from before this process, which does not know what was seen then
        return position, data[STAMP:], start, end
    # ==== to here. The sender of what passed has the secret; who it is, gpg says. ====

    def run(self):
        for target in [self.take_results] + [self.work] * WORKERS:
            threading.Thread(target=target, daemon=True).start()
        down = False
        while True:
            try:
                packet = self.sock.ins.recv(2048)
            except OSError as error:
                if not down:
                    log(f"{self.settings.interface}: {error.strerror}: no knock is heard until it is up again", 4)
                down = True
                time.sleep(0.1)
                continue
            if passed := self.gate(packet):
                down = False
                position, data, start, end = passed
                first, length = (8, 16) if packet[self.ip] >> 4 == 6 else (12, 4)
                address = packet[self.ip + first:self.ip + first + length]
                handle = self.on_answer if position > self.last else self.on_fragment
                handle(data[:ID], data[ID:], position, address, (packet[:start], end - start))

    def on_fragment(self, knock_id, piece, position, address, segment):
        knock = self.knocks.get(knock_id) or self.new_knock(knock_id, address[:8])
        if position == self.last and (knock.state == "collecting" or address == knock.address):
            knock.segment, knock.address = segment, address  # the address that counts is the last fragment's
        if knock.state == "collecting":
            knock.pieces[position] = piece
            at_work = [other.owner for other in self.knocks.values() if other.state == "working"]
            if len(knock.pieces) > self.last and len(at_work) < 2 * WORKERS and at_work.count(knock.owner) < WORKERS_EACH:
                knock.state = "working"  # where too many are, its next fragment asks again
                self.enqueue(knock)
        elif position == self.last and address == knock.address and knock.state in ("challenged", "done"):
            self.enqueue(knock)

    def new_knock(self, knock_id, owner):
        """A knock in the table; where that is full, or the owner's share of it, in place of the one that is missed least."""
        crowd = [other for other in self.knocks.values() if other.owner == owner]
        if len(crowd) < KNOCKS_EACH:
            crowd = list(self.knocks.values()) if len(self.knocks) >= KNOCKS_MAX else []
        if crowd:
            late = [other for other in crowd if other.state == "challenged" and other.deadline < time.monotonic()]
            del self.knocks[min(late or crowd, key=lambda other: EVICTED.index(other.state)).id]
        knock = self.knocks[knock_id] = Knock(knock_id, owner)
        return knock

    def on_answer(self, knock_id, proof, _, address, segment):
        knock = self.knocks.get(knock_id)
        if knock is None or knock.address != address or knock.state not in ("challenged", "asked", "done") \
                or not hmac.compare_digest(proof, hmac.digest(knock.nonce, knock_id, "sha256")):
            return
        knock.segment = segment
        if knock.state == "done":
            self.enqueue(knock)
        elif knock.state == "challenged" and time.monotonic() < knock.deadline:
            knock.state = "asked"
            request = {"id": knock_id.hex(), "signer": knock.signer, "command": knock.command, "ip": str(ipaddress.ip_address(address))}
            try:
                self.channel.send(json.dumps(request).encode(), socket.MSG_DONTWAIT)
            except OSError:
                knock.state = "challenged"  # the monitor is busy: the client's next answer asks again

    def take_results(self):
        """From the monitor; when that is gone, the listener goes too."""
        with suppress(OSError):
            while message := self.channel.recv(MESSAGE_MAX):
                if knock := self.knocks.get(message[:ID]):
                    knock.plain, knock.state = message, "done"
                    self.enqueue(knock)
        os._exit(0)

    def enqueue(self, knock):
        if not knock.queued:  # once each, and few are working: the queue is bounded too
            knock.queued = True
            self.jobs.put(knock)

    def work(self):
        """One of the threads that wait for gpg."""
        while True:
            knock = self.jobs.get()
            knock.queued = False
            if self.knocks.get(knock.id) is not knock:
                continue  # evicted
            try:
                if knock.state == "working":
                    self.challenge(knock)
                elif knock.state == "done" and knock.result is None:
                    self.seal_result(knock)
                self.reply(knock)
            except Exception as error:  # whatever becomes of one knock, the next is served
                reason = error if isinstance(error, (Fault, OSError)) else type(error).__name__
                log(f"{ipaddress.ip_address(knock.address)}: knock refused: {reason}", 4)
                knock.state = "refused" if knock.state == "working" else knock.state

    def challenge(self, knock):
        """Unseal a whole knock, and seal the challenge for who signed it. Raises Fault."""
        own, seen = self.settings.own, str(ipaddress.ip_address(knock.address))
        signer, png = self.ring.unseal(b"".join(piece for _, piece in sorted(knock.pieces.items())), own)
        try:
            request = json.loads(reveal(png))
            to, knock_id, command, claimed = request["to"], request["id"], command_of(request["cmd"]), request["ip"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Fault(BAD_DATA, f"{signer} signed what is not a request") from None
        if to != own or knock_id != knock.id.hex():
            raise Fault(BAD_DATA, f"{signer} asked another server for this, or in another knock: {str(to)[:40]}")
        if claimed and claimed != seen:
            log(f"{seen}: {signer} has the address {str(claimed)[:40]}: its knock is relayed, or translated on the way", 4)
        patience = self.settings.patience if command[0] == "E" else 0
        knock.signer, knock.command, knock.nonce, knock.pieces = signer, command, os.urandom(32), {}
        plain = knock.id + knock.nonce + patience.to_bytes(2, "big") + seen.encode()
        knock.challenge = self.ring.seal(plain, own, signer)
        knock.room = max(RESULT_LEAST, FRAGMENT_MAX - HEAD - len(knock.challenge) + len(plain))
        knock.deadline, knock.state = time.monotonic() + ANSWER_TIME, "challenged"

    def seal_result(self, knock):
        """Seal what the monitor said, cut to what one packet takes."""
        cut = b"\n[cut to one packet]\n"
        plain = knock.plain if len(knock.plain) <= knock.room else knock.plain[:knock.room - len(cut)] + cut
        knock.result = self.ring.seal(plain, self.settings.own, knock.signer)

    def reply(self, knock):
        """One crafted segment to where the knock's last segment came from, by the same interface and link address."""
        headers, size = knock.segment
        payload = frame(self.settings.key, b"result" if knock.result else b"challenge", knock.result or knock.challenge)
        if len(payload) > REPLY_MAX:
            raise Fault(BAD_DATA, "the client's key is too large for a reply of one packet: RSA-4096 at most")
        IP, TCP = self.scapy.IPv6 if headers[self.ip] >> 4 == 6 else self.scapy.IP, self.scapy.TCP
        ip = IP(headers[self.ip:])
        tcp, syn = ip[TCP], bool(ip[TCP].flags & 2)
        seq, ack = int.from_bytes(os.urandom(4), "big") if syn else tcp.ack, (tcp.seq + syn + size) % 2**32
        packet = IP(src=ip.dst, dst=ip.src) / TCP(sport=tcp.dport, dport=tcp.sport, flags="SA" if syn else "PA", seq=seq, ack=ack,
                                                  window=64240, options=[("MSS", 1400)] if syn else []) / payload
        if self.ip:
            link = self.scapy.Ether(headers)
            packet = self.scapy.Ether(src=link.dst, dst=link.src) / packet
        self.sock.send(packet)


def drop_privileges(user):
    """Become a user for good: no groups, no capabilities (capabilities(7)), no way back. Raises OSError."""
    import ctypes
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    for capability in range(64):
        prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; fails harmlessly beyond the last one there is
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    with open("/proc/self/status", encoding="ascii") as file:
        status = file.read()
    if re.search(r"^Cap...:\s*0*[1-9a-f]", status, re.M) or not re.search(r"^NoNewPrivs:\s*1", status, re.M):
        raise OSError(1, "privileges remain")


# ---- monitor: checked requests in, firewall rules and commands out. ALL THAT FOLLOWS RUNS AS ROOT --------------------

OUTPUT_MAX = 4096  # bytes of a command's output that are kept; a packet carries fewer
DOORS_EACH = 64  # open at a time for one user
FOREVER = 2**31 - 1  # seconds since 1970: the last that iptables' time match takes
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FAMILIES = {"iptables": "192.0.2.1", "ip6tables": "2001:db8::1"}  # program: an address of documentation for trials


def run(*words, changes=True, check=True):
    """Run a program -> (exit status, its words). Logged before it runs when it changes the machine. Raises Fault."""
    if changes:
        log("+ " + shlex.join(words), 5)
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=15, text=True, errors="replace", check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Fault(SYSTEM, f"{words[0]}: {getattr(error, 'strerror', 'took more than 15 s: who holds its lock?')}") from None
    if check and done.returncode:
        raise Fault(SYSTEM, f"{words[0]}: {(done.stderr or done.stdout).strip()}")
    return done.returncode, done.stdout


def iptables(ip, *rule, **options):
    return run("ip6tables" if ":" in ip else "iptables", "-w", "5", *rule, **options)


def permitted(patterns, command):
    """Whether [allow] patterns permit a command; both are from `command_of`. Ports: each by itself. E: word by word; * is
    any one word, at the end any number of them."""
    if command[0] != "E":
        allowed = {port for pattern in patterns if pattern[0] == command[0] for port in pattern[1:]}
        return "*" not in command and ("*" in allowed or allowed.issuperset(command[1:]))
    for pattern in patterns:
        rest = pattern[-1] == "*"
        words = command[:len(pattern) - 1] if rest else command
        pattern = pattern[:-1] if rest else pattern
        if len(words) == len(pattern) and all(want in ("*", word) for want, word in zip(pattern, words)):
            return True
    return False


class Monitor:
    """Policy, doors and commands, and the listener's parent."""

    def __init__(self, path, scapy):
        self.path, self.scapy, self.doors, self.running, self.channel, self.chain = path, scapy, {}, {}, None, None
        self.load()
        self.read_at = os.stat(self.path).st_mtime_ns  # None after SIGHUP

    def load(self):
        """Read and check the config. Raises Fault, and changes nothing then."""
        config = Config(self.path, server=True)
        chain = config.get("iptables_chain", "server", default="tariq")
        if chain != (self.chain or chain):
            raise Fault(CONFIG, f"{config.path}: [server] iptables_chain: a new one takes a restart")
        rules = {protocol: config.get(f"open_{protocol}_port", "server", default=shlex.split(
            f"-A {chain} -s {{ip}} -p {protocol} -m conntrack --ctstate NEW -m {protocol} --dport {{dport}} "
            "-m time --datestop {until} -j ACCEPT")) for protocol in ("tcp", "udp")}
        if {rule[1] for rule in rules.values()} != {chain}:
            raise Fault(CONFIG, f"{config.path}: [server] open_tcp_port and open_udp_port need -A {chain}: the iptables_chain")
        ring, ports = Keyring(config.get("server_gpg_dir", "server")), config.get("secret_ports", "server")
        own = ring.find(config.get("server_user", "server"), ring.keys("sec", "--list-secret-keys"))
        keys, users = ring.keys("pub", "--list-keys"), {}
        for user, patterns in config.allowed().items():
            key = ring.find(user, keys)
            users.setdefault(key, (" ".join(dict(keys)[key]) or key, []))[1].extend(patterns)
        timeout = config.get("command_timeout", "server", default=30)
        routes = self.scapy.conf.route.route("0.0.0.0")[0], self.scapy.conf.route6.route("2001:db8::")[0]
        interface = config.get("interface", "server", default=next((name for name in routes if name not in ("lo", None)), None))
        settings = SimpleNamespace(own=own, ports=ports, key=derive_key(config.get("secret", "server"), ports),
                                   interface=interface, patience=timeout, home=ring.home)
        ring.seal(b"", own, own)  # the key signs, and gpg-agent is up before the first knock
        self.open_timeout, self.command_timeout = config.get("open_timeout", "server", default=3600), timeout
        self.path, self.chain, self.rules, self.users, self.ring, self.settings = config.path, chain, rules, users, ring, settings

    def prepare_firewall(self):
        """An empty chain that INPUT jumps to, the rule templates tried, and warnings where INPUT hides nothing."""
        for program, ip in FAMILIES.items():
            if iptables(ip, "-n", "-L", self.chain, changes=False, check=False)[0]:
                iptables(ip, "-N", self.chain)
            iptables(ip, "-F", self.chain)
            if iptables(ip, "-C", "INPUT", "-j", self.chain, changes=False, check=False)[0]:
                iptables(ip, "-I", "INPUT", "-j", self.chain)
            for port in ("9/tcp", "9/udp"):
                rule = self.rule(ip, port, 0)
                iptables(ip, *rule)
                iptables(ip, "-D", *rule[1:])
            rules = iptables(ip, "-S", "INPUT", changes=False)[1].splitlines()
            if rules[0] != "-P INPUT DROP" and rules[-1] != "-A INPUT -j DROP":
                log(f"{program}: INPUT does not drop: nothing is hidden. See README, Firewall", 4)
            if any("-j REJECT" in rule for rule in rules):
                log(f"{program}: INPUT has a REJECT rule: it shows this host to scanners and breaks knocks. Use DROP", 4)

    def rule(self, ip, port, until):
        number, protocol = port.split("/")
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(until))
        return [word.format(ip=ip, dport=number, until=stamp) for word in self.rules[protocol]]

    def open(self, ip, port, signer):
        """One rule for one address and port, with its end; opened again, a new end. Returns the end (seconds since 1970)."""
        self.close(ip, port)
        if sum(owner == signer for _, _, owner in self.doors.values()) >= DOORS_EACH:
            raise Fault(SYSTEM, f"{DOORS_EACH} doors are open for this user: no more until one closes")
        until = min(FOREVER, int(time.time()) + self.open_timeout) if self.open_timeout else FOREVER
        rule = self.rule(ip, port, until)
        iptables(ip, *rule)
        self.doors[ip, port] = rule, time.monotonic() + self.open_timeout if until < FOREVER else float("inf"), signer
        return until

    def close(self, ip, port):
        """Whether the door was open; it is closed now. Raises Fault, and keeps the door in mind then."""
        if (ip, port) not in self.doors:
            return False
        try:
            iptables(ip, "-D", *self.doors[ip, port][0][1:])
        except Fault as fault:
            if "does a matching rule exist" not in str(fault):  # if it does not, somebody flushed the chain: closed is closed
                raise
        del self.doors[ip, port]
        return True

    def close_expired(self):
        """Take out rules that the kernel has closed already, unless the wall clock was put back: monotonic time decides."""
        for (ip, port), (_, end, _) in list(self.doors.items()):
            if time.monotonic() > end + 1:
                try:
                    self.close(ip, port)
                except Fault as fault:
                    log(f"{ip} {port}: not closed: {fault}: trying again every second", 3)

    def close_all(self):
        """At the end, whatever it is: no door, and no command."""
        for ip in FAMILIES.values():
            try:
                iptables(ip, "-F", self.chain)
            except Fault as fault:
                log(f"chain {self.chain} is not flushed: {fault}: its doors close at their own time", 3)
        for process in filter(None, list(self.running.values())):  # nobody would keep its time any more
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)

    def handle(self, message):
        """One message of the listener, of which nothing is believed: who may do what is looked up here."""
        try:
            request = json.loads(message)
            knock_id, ip = bytes.fromhex(request["id"]), str(ipaddress.ip_address(str(request["ip"])))
            signer, command = parse("server_key", request["signer"]), command_of(request["command"])
            if len(knock_id) != ID or "%" in ip:
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return log("a malformed message from the listener: is it still itself?", 3)
        if signer not in self.users:
            self.reload()  # somebody may have been enrolled
        user, patterns = self.users.get(signer, (signer, []))
        event = f"{user} {ip} {shlex.join(command)}"
        if not permitted(patterns, command):
            self.finish(knock_id, event, False, REFUSED, f"refused: {shlex.join(command)}: not allowed to {user}")
        elif command[0] == "E" and signer in self.running:
            self.finish(knock_id, event, False, REFUSED, "refused: the last command is still running")
        elif command[0] == "E":
            self.running[signer] = None
            threading.Thread(target=self.execute, args=(knock_id, event, signer, command[1:]), daemon=True).start()
        else:
            try:
                self.finish(knock_id, event, True, 0, self.move_doors(command[0], ip, command[1:], signer))
            except Fault as fault:
                self.finish(knock_id, event, False, SYSTEM, str(fault))

    def move_doors(self, action, ip, ports, signer):
        names = ", ".join(f"{protocol}/{number}" for number, protocol in (port.split("/") for port in ports))
        if action == "C":
            closed = [port for port in ports if self.close(ip, port)]
            return f"closed {names} on {{host}} for {ip}" + ("" if len(closed) == len(ports) else
                                                            f" ({', '.join(sorted(set(ports) - set(closed)))} was not open)")
        until = max(self.open(ip, port, signer) for port in ports)
        end = time.strftime("%H:%M:%SZ" if self.open_timeout < 86400 else "%Y-%m-%d %H:%M:%SZ", time.gmtime(until))
        return f"opened {names} on {{host}} for {ip} until " + ("closed" if until == FOREVER else end)

    def execute(self, knock_id, event, signer, words):
        """Run a permitted command without a shell, for command_timeout seconds, keeping OUTPUT_MAX bytes of its output."""
        log("+ " + shlex.join(words), 5)
        output, end = bytearray(), time.monotonic() + self.command_timeout
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/",
                                       start_new_session=True, env={"PATH": SAFE_PATH, "LC_ALL": "C.UTF-8"})
            self.running[signer] = process
            while process.poll() is None and time.monotonic() < end:
                if select.select([process.stdout], [], [], 0.02)[0]:
                    data = os.read(process.stdout.fileno(), 65536)
                    output += data[:OUTPUT_MAX - len(output)]
                    time.sleep(0 if data else 0.02)
            if (status := process.returncode) is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = 124  # as timeout(1) has it
            # The rest, without waiting: a daemon that the command started may hold the pipe.
            while len(output) < OUTPUT_MAX and select.select([process.stdout], [], [], 0)[0] and (
                    data := os.read(process.stdout.fileno(), OUTPUT_MAX - len(output))):
                output += data
            process.stdout.close()
        except (OSError, ValueError) as error:
            status, output = 127, f"{words[0]}: {getattr(error, 'strerror', error)}\n".encode()
        del self.running[signer]
        status = status if status >= 0 else 128 - status  # a signal's number, as a shell has it
        self.finish(knock_id, event, True, status, f"exit status {status}", bytes(output))

    def finish(self, knock_id, event, done, status, verdict, output=None):
        """Log one event - who, from where, what, verdict - and give the listener the result: id, done, status, text."""
        log(f"{event}: {verdict.replace(' on {host}', '')}", 6 if done else 4)
        text = verdict.encode() if output is None else output
        with suppress(OSError, AttributeError):  # a listener that is gone or does not read: its client will hear nothing
            self.channel.send(knock_id + bytes([done, status]) + text, socket.MSG_DONTWAIT)

    def start_listener(self):
        """Fork the listener, with the packet socket opened for it and nothing else of root's. Raises OSError."""
        ports = " or ".join(f"tcp dst port {port}" for port in self.settings.ports)
        sock, link_header = packet_socket(self.scapy, self.settings.interface, f"({ports}) and greater 80 and less 1500")
        sock.ins.setsockopt(socket.SOL_SOCKET, 33, RECEIVE_BUFFER)  # SO_RCVBUFFORCE
        sock.ins.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER: whoever takes the listener over sees no more than it
        ours, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        said, words = os.pipe()  # its stderr: it has neither the monitor's log nor its terminal in hand
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                os.dup2(os.open("/dev/null", os.O_RDWR), 0)
                os.dup2(0, 1)
                os.dup2(words, 2)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)  # the monitor ends it
                for descriptor in map(int, os.listdir("/proc/self/fd")):
                    if descriptor > 2 and descriptor not in (sock.ins.fileno(), channel.fileno()):
                        with suppress(OSError):  # the one that listed the directory is closed already
                            os.close(descriptor)
                if self.ring.run_as:
                    drop_privileges(self.ring.owner)
                    self.ring.run_as = {}
                Listener(self.settings, self.ring, self.scapy, sock, link_header, channel).run()
            except BaseException as error:
                log(f"{type(error).__name__}: {error}", 3)
            finally:
                os._exit(DIED)
        channel.close()
        sock.close()
        os.close(words)
        os.set_blocking(said, False)
        self.channel, self.words, self.pid = ours, said, pid

    def stop_listener(self):
        if self.channel:
            self.channel.close()
            os.kill(self.pid, signal.SIGKILL)  # it may be beyond reading that the channel is closed
            os.waitpid(self.pid, 0)
            self.relay_words()
            os.close(self.words)
            self.channel = None

    def relay_words(self):
        """Log what the listener said, as its own words: <priority>line. False when it has closed its end."""
        words = b"\n"
        with suppress(BlockingIOError):
            words = os.read(self.words, 65536)
        for line in filter(None, words.decode(errors="replace").split("\n")):
            priority, text = (int(line[1]), line[3:]) if re.match("<[3-6]>", line) else (3, line)
            log(f"listener: {text}", priority)
        return bool(words)

    def reload(self):
        """Read the config again if it has changed, or if SIGHUP asks for it."""
        try:
            changed_at = os.stat(self.path).st_mtime_ns
            if self.read_at != changed_at:
                self.read_at = changed_at
                self.load()
                log(f"{self.path}: read again, {len(self.users)} users")
        except (Fault, OSError) as fault:
            log(f"{fault}: the old config stays in force", 3)

    def serve(self):
        """Until a signal ends it: the listener's messages, expired doors, and an interface that comes and goes."""
        listening = complaint = None
        while True:
            try:
                wanted = socket.if_nametoindex(self.settings.interface), vars(self.settings)
                if wanted != listening:
                    self.stop_listener()
                    self.start_listener()
                    listening, complaint = wanted, None
                    log(f"listening on {self.settings.interface} for knocks on {len(self.settings.ports)} ports, {len(self.users)} "
                        f"users, chain {self.chain}, listener runs as {self.ring.owner.pw_name}")
            except PermissionError:
                raise Fault(SYSTEM, "packet sockets need CAP_NET_RAW and CAP_NET_ADMIN") from None
            except OSError as error:
                if str(error) != complaint:
                    log(f"{self.settings.interface}: {error.strerror or error}: waiting for the interface", 4)
                listening, complaint = None, str(error)
            if self.channel is None:
                time.sleep(1)
            else:
                ready, message = select.select([self.channel, self.words], [], [], 1)[0], b""
                alive = self.words not in ready or self.relay_words()
                with suppress(ConnectionError):
                    message = self.channel.recv(MESSAGE_MAX) if self.channel in ready else None
                if not alive or message == b"":
                    raise Fault(DIED, "the listener died: every door is closed")
                if message:
                    self.handle(message)
            if self.read_at is None:
                self.reload()
            self.close_expired()


def need_root():
    if os.geteuid():
        raise Fault(SYSTEM, "this needs root: sudo")
    os.environ["PATH"] = SAFE_PATH


def cmd_server(options):
    """Serve until SIGTERM or SIGINT; the chain is empty before and after. SIGHUP reads the config again."""
    need_root()
    signal.signal(signal.SIGHUP, lambda *_: None)  # one that comes before the server is ready must not end it
    import PIL.PngImagePlugin  # before the fork: no knock waits for it
    monitor = Monitor(options.config, load_scapy())
    if not monitor.ring.run_as:
        log(f"the listener will run as root; to change that: useradd --system tariq; chown -R tariq: {monitor.ring.home}; "
            f"gpgconf --homedir {monitor.ring.home} --kill all", 4)
    path = f"/run/tariq-{monitor.chain}-{os.stat('/proc/self/ns/net').st_ino}.lock"  # a chain is one of a network namespace
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)  # held until this process ends, however it does
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Fault(SYSTEM, f"a server with the chain {monitor.chain} runs already: {path} is locked") from None
    stopping = []

    def stop(*_):  # raises once: a second signal must not break off the flush
        stopping.append(True)
        if len(stopping) == 1:
            sys.exit(0)

    signal.signal(signal.SIGHUP, lambda *_: setattr(monitor, "read_at", None))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        monitor.prepare_firewall()
        monitor.serve()
    finally:
        stopping.append(True)
        monitor.close_all()
        monitor.stop_listener()


# ---- set-up: once, by hand; says on stderr what it did, file by file -------------------------------------------------

def write_private(path, text):
    """Write a file of mode 0600, whole or not at all."""
    path = os.path.realpath(path)
    with suppress(FileNotFoundError):
        os.unlink(path + ".new")
    with open(os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)
    log(f"wrote {path}")


def make_directory(path, mode):
    if not os.path.isdir(path):
        os.makedirs(path, mode)
        log(f"made {path}")


def make_key(ring, user):
    """The fingerprint of the user's key, made (Ed25519 and Curve25519, no passphrase) where there is none."""
    if not any(named(user, key, names) for key, names in ring.keys("sec", "--list-secret-keys")):
        ring.gpg("--pinentry-mode", "loopback", "--passphrase", "", "--quick-generate-key", user, "future-default", "default", "never")
        log(f"made a key for {user} in {ring.home}")
    return ring.find(user, ring.keys("sec", "--list-secret-keys"))


def show_key(ring, text):
    """(fingerprint, user ids) of the one public key in a text; nothing is imported. Raises Fault."""
    shown = ring.keys("pub", "--show-keys", data=text)
    if len(shown) != 1 or ring.keys("sec", "--show-keys", data=text):
        raise Fault(BAD_DATA, "needs one public key on stdin: tariq.py keygen, or gpg --armor --export, prints it")
    return shown[0]


def import_key(ring, text, key, names):
    ring.gpg("--import", data=text)
    log(f"imported {key} {' '.join(names)} into {ring.home}")


def lock_directory(path):
    """One set-up command at a time on the config of this path, until the process ends: two would lose one's changes."""
    fcntl.flock(os.open(os.path.dirname(path), os.O_RDONLY), fcntl.LOCK_EX)


def cmd_init(options):
    """Make a server's config, user, keyring and key; what is there already stays as it is."""
    need_root()
    import random
    path = os.path.abspath(options.config or os.path.join(options.directory, "tariq.conf"))
    home = os.path.join(os.path.dirname(path), ".server-gpg")
    try:
        owner = pwd.getpwnam("tariq")
    except KeyError:
        run("useradd", "--system", "--home-dir", home, "--no-create-home", "--shell", "/usr/sbin/nologin", "tariq")
        owner = pwd.getpwnam("tariq")
    make_directory(os.path.dirname(path), 0o711)  # to be passed through, not to be listed or locked by others
    lock_directory(path)
    if not os.path.exists(path):
        ports = ",".join(str(port) for port in random.SystemRandom().sample(range(1024, 32768), 5))
        secret = binascii.b2a_base64(os.urandom(32)).decode()
        write_private(path, f"[server]\nsecret_ports = {ports}\nsecret = {secret}server_gpg_dir = {home}\n"
                            f"server_user = tariq@{socket.gethostname()}\n\n[allow]\n")
    config = Config(path, server=True)
    home = config.get("server_gpg_dir", "server")
    if not os.path.isdir(home):
        make_directory(home, 0o700)
        os.chown(home, owner.pw_uid, owner.pw_gid)
    log(f"the server's key is {make_key(Keyring(home), config.get('server_user', 'server'))}; settings are in {path}")


def cmd_keygen(options):
    """Make a client's config, keyring and key where missing; print the public key."""
    path = os.path.abspath(options.config or os.path.expanduser(CLIENT_CONFIG))
    make_directory(os.path.dirname(path), 0o700)
    lock_directory(path)
    if not os.path.exists(path):
        write_private(path, f"[client]\nuser = {options.user}\nclient_gpg_dir = {os.path.dirname(path)}/gpg\n")
    config = Config(path)
    if config.get("user", "client", default=options.user) != options.user:
        log(f"{path}: [client] user is another one: change it, or knock with -u {options.user}", 4)
    home = os.path.expanduser(config.get("client_gpg_dir", "client", default=CLIENT_RING))
    make_directory(home, 0o700)
    ring = Keyring(home)
    os.write(1, ring.gpg("--armor", "--export", make_key(ring, options.user))[0])


def cmd_enroll(options):
    """Allow the client whose public key is on stdin; print the profile that `join` reads."""
    need_root()
    try:
        lines = [shlex.join(command_of(shlex.split(line))) for line in map(" ".join, options.allow or [["O 22"]])]
        if any(re.search(r"\s#", line) for line in lines):
            raise ValueError("may hold no word that begins with #: in a config that is a comment")
    except ValueError as error:
        raise Fault(USAGE, f"--allow {error}") from None
    path, text = Config(options.config, server=True).path, sys.stdin.buffer.read(GPG_INPUT)
    lock_directory(path)  # after stdin, which may come from a keygen that waits for the same lock
    config = Config(path, server=True)
    ports, secret = config.get("secret_ports", "server"), binascii.b2a_base64(config.get("secret", "server")).decode().strip()
    ring = Keyring(config.get("server_gpg_dir", "server"))
    own = ring.find(config.get("server_user", "server"), ring.keys("sec", "--list-secret-keys"))
    key, names = show_key(ring, text)
    before = dict(ring.keys("pub", "--list-keys")).get(key, [])
    claimed = [user for user in [*config.allowed(), config.get("server_user", "server")] if named(user, key, names)]
    if any(key != user.upper() and not named(user, "", before) for user in claimed):
        raise Fault(BAD_DATA, f"{key} {' '.join(names)} has the name of another user in {config.path}: it needs one of its own")
    import_key(ring, text, key, names)
    if claimed:
        log(f"{config.path}: {key} is in [allow] already: nothing changed")
    else:
        text = config.text if config.ini.has_section("allow") else config.text + "\n[allow]"
        end = re.search(r"^\[allow\].*", text, re.MULTILINE).end()
        entry = f"\n{key} =  # {printable(' '.join(names))}" + "".join(f"\n    {line}" for line in lines)
        write_private(config.path, text[:end] + entry + (text[end:] or "\n"))
        log(f"{config.path}: {key} may {'; '.join(lines)}")
    profile = (f"# A profile for tariq.py join. It holds the shared secret: keep it private.\n[profile]\n"
               f"secret_ports = {','.join(map(str, ports))}\nsecret = {secret}\nserver_key = {own}\n")
    os.write(1, profile.encode() + ring.gpg("--armor", "--export", own)[0])


def cmd_join(options):
    """Take the server's profile on stdin into the client's keyring and config."""
    text, begin, key = sys.stdin.buffer.read(GPG_INPUT).decode(errors="replace").partition("-----BEGIN PGP PUBLIC KEY BLOCK-----")
    profile = configparser.ConfigParser(interpolation=None, delimiters="=")
    try:
        profile.read_string(text)
        given = dict(profile["profile"])
        _, _, server = (parse(name, given[name]) for name in ("secret_ports", "secret", "server_key"))
    except (configparser.Error, KeyError, ValueError):
        raise Fault(BAD_DATA, "no profile on stdin: tariq.py enroll prints it; did ssh or enroll fail?") from None
    lock_directory(Config(options.config).path)
    config = Config(options.config)
    ring = Keyring(config.get("client_gpg_dir", "client", default=CLIENT_RING))
    found, names = show_key(ring, (begin + key).encode())
    if found != server:
        raise Fault(BAD_DATA, "the profile's key is not its server_key")
    import_key(ring, (begin + key).encode(), found, names)
    settings = "".join(f"{name} = {given[name]}\n" for name in ("secret_ports", "secret", "server_key"))
    if not config.ini.has_section(options.host):
        write_private(config.path, f"{config.text.rstrip()}\n\n[{options.host}]\n{settings}")
    elif any(config.ini[options.host].get(name) != given[name] for name in given):
        raise Fault(BAD_DATA, f"{config.path}: [{options.host}] has other values: take it out first, then join again")
    log(f"{config.path}: [{options.host}] is known by its key {server}")


# ---- command line ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(USAGE, f"{printable(message)} (tariq.py --help)")


def command_line():
    """The parser; each subcommand's function is its `function`."""
    style = {"epilog": EXIT_CODES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(prog="tariq.py", description="Port knocking with hidden, signed, encrypted requests.", **style)
    parser.add_argument("--version", action="version", version=f"Tariq {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, function, text):
        sub = commands.add_parser(name, help=text, description=text, **style)
        sub.set_defaults(function=function)
        sub.add_argument("-c", dest="config", metavar="CONF", help="config (~/.config/tariq/tariq.conf, /etc/tariq/tariq.conf)")
        return sub

    command("server", cmd_server, "listen for knocks (root)")
    knock = command("knock", cmd_knock, "knock at a server: open or close ports, run a command")
    for flags, name, text in (("-u", "user", "whose key signs"), ("-p", "ports", "the secret_ports"),
                              ("-i", "img_dir", "PNG images to hide in"), ("-g", "gpg_dir", "keyring")):
        knock.add_argument(flags, dest=name, metavar=name.upper(), help=text)
    family = knock.add_mutually_exclusive_group()
    family.add_argument("-4", dest="family", action="store_const", const=socket.AF_INET, default=0, help="IPv4 only")
    family.add_argument("-6", dest="family", action="store_const", const=socket.AF_INET6, help="IPv6 only")
    knock.add_argument("-t", dest="timeout", metavar="SECONDS", default="10", help="how long to try (10)")
    knock.add_argument("--transport", choices=("kernel", "crafted"), help="default: crafted with CAP_NET_RAW, else kernel")
    knock.add_argument("-v", dest="verbose", action="store_true", help="show each step and its time")
    knock.add_argument("host", metavar="HOST")
    knock.add_argument("action", choices="OCE", help="O PORT[/tcp|/udp]..., C PORT..., or E COMMAND [ARG...]")
    knock.add_argument("words", nargs=argparse.REMAINDER, metavar="...")
    init = command("init", cmd_init, "server, once: config, system user, keyring, key (root)")
    init.add_argument("-d", dest="directory", metavar="DIR", default="/etc/tariq", help="where (/etc/tariq)")
    keygen = command("keygen", cmd_keygen, "client: make keyring and key, print the public key")
    keygen.add_argument("user", metavar="USER", help="an email address or the like: me@laptop")
    enroll = command("enroll", cmd_enroll, "server: allow the client whose public key is on stdin, print its profile (root)")
    enroll.add_argument("--allow", action="append", nargs="+", metavar="WORD", help="what it may do, as in [allow] ('O 22')")
    command("join", cmd_join, "client: take the profile on stdin").add_argument("host", metavar="HOST")
    return parser


def main():
    os.umask(0o022)
    try:
        options = command_line().parse_args()
        return options.function(options)  # an exit code; None is 0
    except Fault as fault:
        code, text = fault.code, str(fault)
    except ImportError as error:
        code, text = MISSING, f"{error}: apt-get install python3-scapy python3-pil libpcap0.8"
    except FileNotFoundError as error:
        code, text = MISSING, f"{error.filename} is not there: apt-get install gnupg iptables"
    except OSError as error:
        code, text = SYSTEM, f"{error.filename or 'the system'}: {error.strerror}"
    except UnicodeError:
        code, text = USAGE, "arguments and input must be UTF-8 text"
    except KeyboardInterrupt:
        code, text = 130, "interrupted"
    print(f"tariq: {printable(text)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
