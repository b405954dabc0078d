#!/usr/bin/python3 -I
"""Tariq: port knocking with hidden, signed, encrypted requests. One file, both ends. Read it before
you run it. The server's firewall drops everything, and the server listens on no port: it sniffs.

    client                                                    server
      request {to, k, cmd} in the low bits of a PNG,
      signed by the client, encrypted to the server (gpg),
      cut in N = len(secret_ports) fragments
      SYN or datagram + frame(K, i | id | fragment i) ---->   at secret_ports[i]: authentic? of now?
                                                              new? whole? Then gpg: decrypted, one
                                                              valid signature, of these 10 minutes?
                                                              meant for me (to)? this very knock
                                                              (id is made of k)?
      <---------- frame(k', nonce, patience, address seen)    from the last port
      who knows k is my server. Is that my address?
      frame(K, N | id | MAC(k', nonce)) ------------------>   who knows k is the signer, alive now,
                                                              at this address. Monitor: policy, act
      <------------------- frame(k', done, status, text)

K is shared by a server and its clients: it hides the server and names nobody. k is random, for one
knock, and known to who sealed the request and to who could unseal it. k' is made of k and of the
sealed bytes. A frame has a fresh nonce: the same bytes twice are a replay, always. The client
repeats its knock in new frames until it has the result; the server acts once.

Trust boundaries:
  - bytes from the wire reach `Listener.gate`, `split`, `unframe`, and no more until the tag holds;
  - the listener (gpg, Pillow, scapy) is unprivileged from its first instruction: `start_listener`;
  - the monitor (root, standard library only) believes no message of the listener: who may do what
    stands in its config.

Sections, as data flows: config, OpenPGP, steganography, wire, client, listener, monitor (root),
set-up, command line.
"""
import argparse, base64, configparser, ctypes, fcntl, hashlib, hmac, io, ipaddress, json, os, pwd
import queue, re, secrets, select, shlex, signal, socket, struct, subprocess, sys, threading, time
import zlib
from collections import Counter, OrderedDict, namedtuple
from contextlib import suppress
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from time import monotonic

# Exit codes after sysexits.h, away from those of most remote commands: E exits with the command's.
USAGE, BAD_DATA, MISSING, DIED, SYSTEM, NO_ANSWER = 64, 65, 69, 70, 71, 75
RELAYED, REFUSED, CONFIG = 76, 77, 78
EXIT_CODES = """exit codes: 0 done; E: the remote command's (137: killed at its time limit);
64 usage; 65 unusable image, key or profile; 69 a program, package or file is missing; 70 the
listener died; 71 the system refused; 75 no answer; 76 somebody relays the knock; 77 refused by
policy; 78 config"""


class Fault(Exception):
    """What the user can mend: an exit code and the line they read. Caught where a program, or the
    server's side of one knock, ends."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


def explained(error):
    """(exit code, the line) of an exception, where it ends a program or a request."""
    if isinstance(error, Fault):
        return error.code, str(error)
    if isinstance(error, (ImportError, FileNotFoundError)):
        return MISSING, (f"{error}: apt-get install gnupg python3-scapy python3-pil libpcap0.8; "
                         "Tariq's files come from tariq.py init (server) and keygen (client)")
    if isinstance(error, ValueError):
        return USAGE, str(error)
    return SYSTEM, str(error)


def printable(text):
    """Text without what could forge a log line or steer a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(text))


def log(text):
    """One line on stderr."""
    with suppress(OSError):  # a full disk behind stderr must not keep a door open
        os.write(2, f"{printable(text)}\n".encode())


# ---- config: an INI file in, checked values out --------------------------------------------------

ROOT_CONFIG = "/etc/tariq/tariq.conf"
CLIENT_CONFIG = "~/.config/tariq/tariq.conf"


def ports_of(text):
    ports = [int(word) for word in text.split(",")]
    if len(set(ports)) < len(ports) or max(ports) > 65535:
        raise ValueError
    return ports


def command_of(words):
    """The words of a request or of a line of `may`, checked: ['O', '22'] -> ['O', '22/tcp'].
    Raises ValueError."""
    if not isinstance(words, list) or len(words) < 2 or words[0] not in ("O", "C", "E") \
            or not all(isinstance(word, str) and word.isprintable() for word in words):
        raise ValueError("needs O PORT[/tcp|/udp]..., C PORT... or E COMMAND [ARG...], printable")
    if words[0] == "E":
        return words
    ports = [re.fullmatch(r"([1-9]\d{0,4})(/tcp|/udp)?|\*", word, re.ASCII) for word in words[1:]]
    if not all(port and int(port[1] or 1) < 65536 for port in ports):
        raise ValueError("needs ports as 22, 22/tcp or 53/udp, from 1 to 65535")
    return [words[0], *(port[1] + (port[2] or "/tcp") if port[1] else "*" for port in ports)]


def patterns_of(text):
    return [command_of(shlex.split(line)) for line in text.splitlines() if line.strip()]


KEY = (r"[0-9A-Fa-f]{40}", "a key's fingerprint, 40 hex digits without spaces", str.upper)
WORDS = (r"(?=.*\{ip\})(?=.*\{dport\}).+", "words with {ip} and {dport} among them", shlex.split)
SECONDS = (r"\d{1,8}", "a whole number of seconds", int)
# What a value has to be: a pattern that it matches whole, words for the error, what converts it.
SYNTAX = {
    "secret_ports": (r"[1-9]\d{0,4}( *, *[1-9]\d{0,4}){4,31}",
                     "5 to 32 different ports, with commas", ports_of),
    "secret": (r"[A-Za-z0-9+/]{43}=", "32 random bytes in base64: head -c 32 /dev/urandom | base64",
               base64.b64decode),
    "key": KEY, "server_key": KEY, "open_tcp_port": WORDS, "open_udp_port": WORDS,
    "open_command": WORDS, "close_command": WORDS, "open_timeout": SECONDS,
    "command_timeout": (r"[1-9]\d{0,2}", "a whole number of seconds, 1 to 999", int),
    "iptables_chain": (r"(?!(INPUT|FORWARD|OUTPUT)$)\w[\w-]{0,27}", "a chain's name, its own", str),
    "may": (r"[^\0]*", "lines of O PORT[/tcp|/udp]..., C PORT... or E COMMAND [ARG...]",
            patterns_of),
}


def parse(key, text):
    """The value of a key. Raises ValueError, which does not quote the text: it may be a secret."""
    pattern, need, convert = SYNTAX.get(key, (".*", "one line", str))
    with suppress(ValueError):
        if re.fullmatch(pattern, text, re.ASCII):
            return convert(text)
    raise ValueError(f"needs {need}")


class Config:
    """One INI file with a secret in it. Raises Fault for each way in which it is unusable."""

    def __init__(self, path, root=False):
        self.path = path
        self.ini = configparser.ConfigParser(interpolation=None, delimiters="=",
                                             inline_comment_prefixes="#")
        with open(path, encoding="utf-8") as file:
            try:
                self.text = file.read()
                self.ini.read_string(self.text)
            except (ValueError, configparser.Error):  # its words would quote a line: a secret?
                raise Fault(CONFIG, f"{path} is not INI: each line needs to be [section], "
                                    "key = value, # comment, or indented to go on")
            status = os.fstat(file.fileno())
        if status.st_mode & 0o077 or root and status.st_uid:  # what root's commands obey is root's
            raise Fault(CONFIG, f"{path}: others can read its secret or change it: chmod 600 it, "
                                "and let root own what root's commands obey")

    def get(self, key, sections=("server",), default=None):
        """The first value that one of the sections has for a key, parsed."""
        for section in sections:
            text = self.ini.get(section, key, fallback="").strip()
            if text:
                try:
                    return parse(key, text)
                except ValueError as error:
                    raise Fault(CONFIG, f"{self.path}: [{section}] {key}: {error}")
        if default is None:
            raise Fault(CONFIG, f"{self.path}: [{sections[0]}] {key} is missing: see "
                                "tariq.conf.example")
        return default

    def clients(self):
        """{fingerprint: section} of the sections [allow NAME]. Raises Fault where a key has two."""
        sections = [name for name in self.ini.sections() if name.startswith("allow ")]
        clients = {self.ini.get(name, "key", fallback="").upper(): name for name in sections}
        if len(clients) < len(sections):
            raise Fault(CONFIG, f"{self.path}: each section [allow NAME] needs a key of its own")
        return clients


# ---- OpenPGP: bytes in, sealed bytes out, and back; as the keyring's owner -----------------------

GPG = ("gpg --batch --no-tty --quiet --no-options --no-auto-check-trustdb --no-random-seed-file "
       "--trust-model always --status-fd 2").split()
GPG_MAX = 65_536  # bytes that are read of what gpg says
UNSEAL_TIME = ("timeout", "-s", "KILL", "1")  # seconds; 15 ms do, but for nested compression
PLAIN_MAX = 8192  # bytes that may come out of a seal: twice a PNG of SIDE x SIDE pixels
SIGNED_WITHIN = 600  # seconds: gpg stamps the signature before pinentry asks for the passphrase
TROUBLE = re.compile(r"(?m)^\[GNUPG:\] ((?:NO_|NODATA|BAD|ERR|EXP|REV|FAIL)\w*|\w+_FAILED)")


def gpg(home, *arguments, data=b"", within=()):
    """Run gpg once -> (output, stderr with status lines). What lies in a keyring's directory may
    command gpg-agent, so root runs gpg as the directory's owner. Raises Fault with gpg's words."""
    home = os.path.abspath(os.path.expanduser(home))
    owner, options = os.stat(home), {"env": {**os.environ, "LC_ALL": "C"}, "cwd": "/"}
    with suppress(OSError):  # where pinentry asks for a passphrase
        options["env"]["GPG_TTY"] = os.ttyname(2)
    if os.geteuid() == 0 != owner.st_uid:
        options.update(user=owner.st_uid, group=owner.st_gid, extra_groups=[],
                       start_new_session=True)
    with Popen([*within, *GPG, "--homedir", home, *arguments], stdin=PIPE, stdout=PIPE, stderr=PIPE,
               **options) as process:
        with suppress(BrokenPipeError):  # gpg ended early; its status says why
            process.stdin.write(data)
            process.stdin.close()
        output = process.stdout.read(GPG_MAX)
        words = process.stderr.read(GPG_MAX).decode(errors="replace")
    if process.returncode:
        said = re.sub(r"(?m)^\[GNUPG:\].*\n", "", words).strip()[:300]
        hint = f"{said} (to be asked for a passphrase: a terminal, and pinentry-curses)"
        raise Fault(BAD_DATA, f"gpg, keyring {home}: exit status {process.returncode} "
                              f"{' '.join(TROUBLE.findall(words))} {hint if said else ''}")
    return output, words


def exactly(user):
    """How gpg names a key by this email and no other (gpg(1)); a fingerprint stays as it is."""
    return f"<{user}>" if "@" in user and "<" not in user else user


def seal(home, data, signer, recipient):
    """Sign and encrypt (RFC 4880): binary, recipient hidden, not compressed."""
    return gpg(home, "--compress-algo", "none", "--no-encrypt-to", "--local-user", exactly(signer),
               "--hidden-recipient", recipient, "--sign", "--encrypt", data=data)[0]


def unseal(home, sealed, own):
    """Decrypt with the key `own`, verify -> (fingerprint of the signer's primary key, at most
    PLAIN_MAX bytes). Takes only what status lines prove (GnuPG doc/DETAILS); gpg's other words,
    which may quote the sender, go elsewhere. Raises Fault."""
    options = f"--logger-file /dev/null --pinentry-mode cancel --max-output {PLAIN_MAX}".split()
    plain, words = gpg(home, *options, "--try-secret-key", own, "--decrypt", data=sealed,
                       within=UNSEAL_TIME)
    said = Counter(re.findall(r"(?m)^\[GNUPG:\] (\w+)", words))
    signed = re.search(r"(?m)^\[GNUPG:\] VALIDSIG \w+ \S+ (\d+) .* (\w{40})$", words)
    needed = ("DECRYPTION_OKAY", "PLAINTEXT", "NEWSIG", "GOODSIG", "VALIDSIG")
    if not signed or any(said[word] != 1 for word in needed) or TROUBLE.search(words):
        raise Fault(BAD_DATA, "not one encrypted message with one valid signature")
    if abs(time.time() - int(signed[1])) > SIGNED_WITHIN:
        raise Fault(BAD_DATA, f"{signed[2]} signed it more than {SIGNED_WITHIN} s from now")
    return signed[2], plain


# ---- steganography: data and a cover in, a PNG out, and back; of others' only signed ones --------

SIDE = 36  # pixels: their low bits carry 486 bytes; the PNG, sealed with RSA-4096, fits 5 packets
ROW, CAPACITY = 3 * SIDE, 3 * SIDE * SIDE // 8  # bytes


def cover(directory):
    """The RGB samples of a random SIDE x SIDE crop of a random PNG of the directory; without a
    directory, random ones. Raises Fault."""
    if not directory:
        return os.urandom(SIDE * ROW)
    from PIL import Image
    path = os.path.expanduser(directory)
    try:
        names = [name for name in os.listdir(path) if name.lower().endswith(".png")]
        path = os.path.join(path, secrets.choice(names))
        with Image.open(path, formats=["PNG"]) as image:
            left, top = (secrets.randbelow(size - SIDE + 1) for size in image.size)
            return image.crop((left, top, left + SIDE, top + SIDE)).convert("RGB").tobytes()
    except Exception:  # there is none, or Pillow's many for a bad one
        raise Fault(BAD_DATA, f"{path}: needs PNG images (.png) of {SIDE} x {SIDE} pixels at least")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def hide(samples, data):
    """RGB samples, bytes -> PNG (ISO 15948), length(2) | data in the lowest bits. Raises Fault."""
    room = CAPACITY - 2 - len(data)
    if room < 0:
        raise Fault(USAGE, f"the request is {-room} bytes too long for one knock: shorten it")
    hidden = int.from_bytes(len(data).to_bytes(2, "big") + data + os.urandom(room), "big")
    bits = map(int, f"{hidden:0{8 * CAPACITY}b}")
    samples = bytes(sample & 0xFE | bit for sample, bit in zip(samples, bits))
    rows = b"".join(b"\0" + samples[start:start + ROW] for start in range(0, SIDE * ROW, ROW))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)  # 8 bits a sample, RGB
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def reveal(png):
    """PNG -> the hidden data. The size is checked before a pixel is decoded: a bomb stays packed.
    Raises Fault."""
    from PIL.PngImagePlugin import PngImageFile
    try:
        image = PngImageFile(io.BytesIO(png))
        if image.size != (SIDE, SIDE) or image.mode != "RGB":
            raise ValueError
        bits = "".join(str(sample & 1) for sample in image.tobytes())
        data = int(bits, 2).to_bytes(CAPACITY, "big")
    except Exception:  # Pillow has many for bad files; whichever it is, the answer is no
        raise Fault(BAD_DATA, "not an image that Tariq made")
    return data[2:2 + int.from_bytes(data[:2], "big")]


# ---- wire: data in, frames that look random out, and back ----------------------------------------

TAG, NONCE, STAMP, ID = 16, 12, 6, 12  # bytes; the stamp counts milliseconds since 1970
HEAD = TAG + NONCE + STAMP  # bytes of a frame before its data
FRAME_MAX = 1200  # bytes: an MTU of 1280, IPv6's least, carries it with all headers
TEXT_MAX = FRAME_MAX - HEAD - 2  # bytes of text in a result
LEAST, MOST = 75, 1320  # bytes of a packet: IPv4, UDP, a frame with an id; IPv4, TCP, FRAME_MAX

# Both addresses as bytes, both ports, the TCP header (of UDP: none), the payload, the link address.
Packet = namedtuple("Packet", "sender own port own_port tcp payload link")


def keyed(key, label, data, size):
    """Keyed BLAKE2b (RFC 7693) of data, `size` bytes; the label (at most 16) is what it is for."""
    return hashlib.blake2b(data, key=key, person=label, digest_size=size).digest()


def shared_key(secret, ports):
    """K: the 32 bytes that a server shares with its clients."""
    return keyed(secret, b"ports", struct.pack(f">{len(ports)}H", *ports), 32)


def mask(key, label, nonce, data):
    """XOR with a SHAKE-256 keystream (FIPS 202); the same again takes it off."""
    stream = hashlib.shake_256(key + label + nonce).digest(len(data))
    return (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")


def frame(key, label, data):
    """tag | nonce | masked(stamp | data): at most FRAME_MAX bytes, all of which look random."""
    nonce, stamp = os.urandom(NONCE), int(time.time() * 1000).to_bytes(STAMP, "big")
    masked = nonce + mask(key, label, nonce, stamp + data)
    return keyed(key, label, masked, TAG) + masked


def unframe(key, label, payload, least):
    """Payload -> (stamp, data), or None where it is no frame under this key and label with `least`
    bytes of data or more. Called with anybody's bytes."""
    if not HEAD + least <= len(payload) <= FRAME_MAX \
            or not hmac.compare_digest(keyed(key, label, payload[TAG:], TAG), payload[:TAG]):
        return None
    plain = mask(key, label, payload[TAG:TAG + NONCE], payload[TAG + NONCE:])
    return int.from_bytes(plain[:STAMP], "big"), plain[STAMP:]


def split(packet, link):
    """An IP packet (RFC 791, 8200, 9293) -> Packet. Called with anybody's bytes: LEAST of them at
    least, beyond which nothing is indexed, and so without the padding of short frames."""
    if packet[0] >> 4 == 4:
        at, protocol, addresses = (packet[0] & 15) * 4, packet[9], packet[12:20]
    else:
        at, protocol, addresses = 40, packet[6], packet[8:40]
    half, udp = len(addresses) // 2, protocol == socket.IPPROTO_UDP
    start = at + (8 if udp else (packet[at + 12] >> 4) * 4)
    return Packet(addresses[:half], addresses[half:], *struct.unpack_from(">HH", packet, at),
                  b"" if udp else packet[at:start], packet[start:], link)


def scapy_layers():
    """scapy.layers.inet and inet6, never scapy.all: 0.1 s, which the other transports save."""
    import logging
    logging.getLogger("scapy").setLevel(logging.CRITICAL)
    from scapy.layers import inet, inet6
    return inet, inet6


def crafted(own, to, upper, payload, number=0):
    """An IP packet between two addresses, with the header that Linux would give it."""
    inet, inet6 = scapy_layers()
    if ":" in to:
        return bytes(inet6.IPv6(src=own, dst=to, fl=secrets.randbits(20)) / upper / payload)
    return bytes(inet.IP(src=own, dst=to, flags="DF", id=number) / upper / payload)


def respond(packet, payload):
    """The bytes that answer a Packet: a datagram, a SYN-ACK or an ACK, with numbers and options as
    Linux has them where net.ipv4.tcp_timestamps is 0."""
    inet, fields, number = scapy_layers()[0], {}, 0
    if packet.tcp:
        seq, own_seq, flags = struct.unpack_from(">4xIIxB", packet.tcp)
        fields["ack"] = (seq + (flags >> 1 & 1) + len(packet.payload)) % 2**32  # a SYN counts as 1
        if flags & 0x12 == 0x02:  # SYN without ACK
            six, nop = len(packet.own) > 4, ("NOP", None)
            options = [("MSS", 1440 if six else 1460), nop, nop, ("SAckOK", b""), nop,
                       ("WScale", 7)]
            fields.update(seq=secrets.randbits(32), flags="SA", options=options,
                          window=64800 if six else 64240)
        else:
            fields.update(seq=own_seq, flags="PA", window=501)
            number = secrets.randbits(16)
    kind = inet.TCP if packet.tcp else inet.UDP
    upper = kind(sport=packet.own_port, dport=packet.port, **fields)
    own, to = (str(ipaddress.ip_address(address)) for address in (packet.own, packet.sender))
    return crafted(own, to, upper, payload, number)


# ---- client: a request in, one line and an exit code out; as an ordinary user --------------------

WAIT, GROWTH, LONGEST = 0.3, 1.3, 1.2  # seconds to the first repeat, factor to the next, longest


class UdpTransport:
    """The frames as datagrams of one ordinary UDP socket: nothing in it is Linux's own."""

    def __init__(self, family, own, targets):
        self.family, self.own, self.targets, self.sockets = family, own, targets, []

    def knock(self, frames):
        self.sockets = self.sockets or [socket.socket(self.family, socket.SOCK_DGRAM)]
        for target, payload in zip(self.targets, frames):
            self.sockets[0].sendto(payload, target)

    def read(self, sock):
        return sock.recv(2048)

    def answer(self, sock, payload):
        sock.sendto(payload, self.targets[-1])


class KernelTransport(UdpTransport):
    """An ordinary socket's SYN carries the fragment: TCP Fast Open (RFC 7413) without a cookie,
    which Linux alone gives to everybody."""

    def knock(self, frames):
        for target, payload in zip(self.targets, frames):
            sock = socket.socket(self.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
            sock.setsockopt(socket.IPPROTO_TCP, 34, 1)  # TCP_FASTOPEN_NO_COOKIE in linux/tcp.h
            sock.sendto(payload, socket.MSG_FASTOPEN, target)
        self.sockets.append(sock)  # only the last port answers; of the others the SYN is out
        del self.sockets[:-4]  # before their third time-out, when Linux may turn Fast Open off

    def read(self, sock):
        self.sockets.remove(sock)
        payload = sock.recv(2048)  # OSError or b"" where the connection is over: it is forgotten
        if payload:
            self.sockets.append(sock)
        return payload

    def answer(self, sock, payload):
        sock.send(payload)


class CraftedTransport(UdpTransport):
    """Every packet made with scapy, as in 2010 (CAP_NET_RAW). The kernel, which knows nothing of
    the connection, answers the SYN-ACK with RST: the server ignores that."""

    def __init__(self, family, own, targets):
        super().__init__(family, own, targets)
        self.port = 32768 + secrets.randbelow(28000)
        try:
            self.raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            protocol = socket.htons(0x86DD if family == socket.AF_INET6 else 0x0800)
            self.sockets = [socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, protocol)]
        except PermissionError:
            raise Fault(SYSTEM, "crafted packets need root or CAP_NET_RAW: sudo, or no --transport")

    def knock(self, frames):
        self.port += 1  # a new connection in the eyes of the firewalls on the way
        for target, payload in zip(self.targets, frames):
            cookie = secrets.randbits(32), secrets.randbits(32)  # with it, SYN data looks usual
            options = [("MSS", 1460), ("SAckOK", b""), ("NOP", None), ("WScale", 7),
                       ("TFO", cookie), ("NOP", None), ("NOP", None)]
            upper = scapy_layers()[0].TCP(sport=self.port, dport=target[1], flags="S",
                                          seq=secrets.randbits(32), window=64240, options=options)
            self.send(crafted(self.own, target[0], upper, payload))

    def send(self, packet):
        self.raw.sendto(packet, (self.targets[0][0], 0, *self.targets[0][2:]))

    def read(self, sock):
        self.packet = split(sock.recv(2048).ljust(LEAST), None)
        return self.packet.payload

    def answer(self, _, payload):
        self.send(respond(self.packet, payload))


TRANSPORTS = {"kernel": KernelTransport, "udp": UdpTransport, "crafted": CraftedTransport}


def open_transports(host, family, kind, ports):
    """(transports to take turns with, own address) to a host, whose addresses the resolver sorts by
    whether there is a route (RFC 6724). Raises Fault."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)[0]
        targets = [(where[0], port, *where[2:]) for port in ports]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(targets[0])  # sends nothing: it looks up the route
            own = probe.getsockname()[0].partition("%")[0]
    except OSError as error:
        raise Fault(NO_ANSWER, f"{host}: {error}: another name, -4 or -6?")
    kinds = [kind] if kind else ["kernel", "udp"][not hasattr(socket, "MSG_FASTOPEN"):]
    return [TRANSPORTS[kind](family, own, targets) for kind in kinds], own


def converse(host, transports, own, key, count, k, sealed, seconds, step):
    """The client's side of the exchange, and the side that drives it through losses: the knock is
    repeated, by each transport in turn, until the result is there. -> (done, status, text)"""
    knock_id, reply_key = keyed(k, b"id", b"", ID), keyed(k, b"reply", sealed, 32)
    size, pieces = -(-len(sealed) // count), range(count)
    mine = own if ipaddress.ip_address(own).is_global else ""  # else NAT may show another
    turn, wait, trouble, challenged, end = 0, WAIT, "", False, monotonic() + seconds
    while monotonic() < end:
        transport, turn = transports[turn % len(transports)], turn + 1
        step(f"{count} fragments go by {type(transport).__name__}")
        try:
            transport.knock([frame(key, b"knock", bytes([i]) + knock_id + sealed[i * size:][:size])
                             for i in pieces])
        except OSError as error:
            trouble = f" ({error})"
        again = min(end, monotonic() + wait * (0.75 + secrets.randbelow(512) / 1024))
        wait = min(wait * GROWTH, LONGEST)
        while (left := again - monotonic()) > 0:
            owners = {sock: transport for transport in transports for sock in transport.sockets}
            for sock in select.select(owners, [], [], left)[0]:
                try:
                    payload = owners[sock].read(sock)
                    if result := unframe(reply_key, b"result", payload, 2):
                        return result[1][0], result[1][1], result[1][2:]
                    if challenge := unframe(reply_key, b"challenge", payload, 34):
                        nonce, patience = struct.unpack_from(">32sH", challenge[1])
                        seen = challenge[1][34:].decode(errors="replace")
                        if mine and seen != mine:
                            raise Fault(RELAYED, f"the server sees {seen}, this machine is {mine}: "
                                                 "somebody relays the knock or translates its "
                                                 "address; nothing was opened")
                        if not challenged:
                            step(f"the server has unsealed the request, and sees {seen}")
                            challenged, end = True, monotonic() + seconds + min(999, patience)
                        transports = [owners[sock]]  # the way that works
                        proof = knock_id + keyed(reply_key, b"answer", nonce, 32)
                        transports[0].answer(sock, frame(key, b"knock", bytes([count]) + proof))
                except OSError as error:
                    trouble = f" ({error})"
    if challenged:
        raise Fault(NO_ANSWER, f"{host} sent a challenge but no result: knock again")
    raise Fault(NO_ANSWER, f"no answer from {host} in {seconds} s: wrong secret_ports or secret, a "
                           "clock more than a minute off, a key that the server does not know, no "
                           f"server, or a firewall on the way{trouble}: try another --transport")


def cmd_knock(options):
    """Knock at options.host, print what was done. Returns the exit code."""
    sections = options.host, "client"
    step = log if options.verbose else str
    command = command_of([options.action, *options.words])
    ports = options.ports and parse("secret_ports", options.ports)
    config = Config(options.config)
    server, user = config.get("server_key", sections), options.user or config.get("user", sections)
    ports = ports or config.get("secret_ports", sections)
    key = shared_key(config.get("secret", sections), ports)
    home = options.gpg_dir or config.get("client_gpg_dir", sections)
    images = options.img_dir or config.get("img_dir", sections, "")
    target = config.get("host", sections, options.host)
    transports, own = open_transports(target, options.family, options.transport, ports)

    k = os.urandom(32)
    request = json.dumps({"to": server, "k": k.hex(), "cmd": command}, ensure_ascii=False)
    sealed = seal(home, hide(cover(images), request.encode()), user, server)
    if len(sealed) > len(ports) * (FRAME_MAX - HEAD - 1 - ID):
        raise Fault(CONFIG, f"{len(sealed)} bytes do not fit {len(ports)} packets: use more "
                            "secret_ports, or smaller keys")
    step(f"request hidden in a PNG and sealed for {server}: {len(sealed)} bytes")
    done, status, text = converse(options.host, transports, own, key, len(ports), k, sealed,
                                  options.timeout, step)
    if not done:
        raise Fault(status or REFUSED, f"{options.host}: {text.decode(errors='replace')}")
    if command[0] != "E":
        words = printable(text.decode(errors="replace"))
        text = words.replace(" for ", f" on {options.host} for ", 1).encode() + b"\n"
    os.write(1, text)
    return status


# ---- listener: packets in, requests out; unprivileged, the only reader of the wire ---------------

CLOCKS = 60_000  # milliseconds that a client's clock may differ
SEEN_MAX = 65_536  # nonces and ids remembered: a frame is good for two minutes, so 500 a second
PARTIAL_MAX, KNOCKS_MAX, UNANSWERED_MAX = 256, 256, 16  # knocks; the last: an address (IPv6: /64)
ANSWER_TIME, REPEAT_TIME = 30, 10  # seconds from challenge to answer; in which a result is repeated
MESSAGE_MAX = 8192  # bytes of a message between listener and monitor
# BPF (linux/filter.h) before libpcap's: to this host only, neither sent by it nor to others; and
# without a VLAN tag, since the VLAN's own interface delivers that packet again.
TO_THIS_HOST = ((0x20, 0, 0, 0xFFFFF004), (0x15, 0, 3, 0),  # SKF_AD_PKTTYPE: PACKET_HOST
                (0x20, 0, 0, 0xFFFFF02C), (0x54, 0, 0, 0xFFF),  # SKF_AD_VLAN_TAG: its id
                (0x15, 1, 0, 0), (0x06, 0, 0, 0))
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "armv7l": 311}  # the number of keyctl(2)


class Knock:
    """A knock from its first fragment to its last result."""

    def __init__(self):
        self.pieces, self.packet, self.answered = {}, None, False
        self.frames, self.result = queue.Queue(4), queue.Queue()


class Listener:
    """Gate and reassembly in one thread, and a thread a knock for the dialogue. Bounded memory."""

    def __init__(self, sock, channel, settings):
        self.sock, self.channel, self.settings = sock, channel, settings
        self.key, self.ports = bytes.fromhex(settings["key"]), settings["ports"]
        self.last, self.began = len(self.ports) - 1, time.time() * 1000
        self.seen, self.partial, self.knocks = OrderedDict(), OrderedDict(), {}
        self.gpg_slots = threading.Semaphore(4)

    def attach_filter(self):
        """The kernel passes what may be a frame, and nothing else: the filter is locked."""
        from scapy.arch.common import compile_filter
        ports = " or ".join(f"dst port {port}" for port in self.ports)
        text = f"(tcp or udp) and ({ports}) and greater {LEAST} and less {MOST}"
        program = compile_filter(text, linktype=12)  # raw IP
        rest = [(step.code, step.jt, step.jf, step.k) for step in program.bf_insns[:program.bf_len]]
        code = b"".join(struct.pack("HBBI", *step) for step in (*TO_THIS_HOST, *rest))
        where = ctypes.create_string_buffer(code)
        value = struct.pack("HP", len(code) // 8, ctypes.addressof(where))
        self.sock.setsockopt(socket.SOL_SOCKET, 26, value)  # SO_ATTACH_FILTER
        self.sock.setsockopt(socket.SOL_SOCKET, 44, 1)  # SO_LOCK_FILTER

    # ==== bytes that anybody may have sent: from here ====
    def receive(self):
        while True:
            if passed := self.gate(*self.sock.recvfrom(2048)):
                self.collect(*passed)

    def gate(self, data, link):
        """An authentic frame of now, not seen before, at its own port -> (position, id, piece,
        Packet). Else None, and nothing is kept."""
        if len(data) < LEAST:
            return None
        packet = split(data, link)
        opened = unframe(self.key, b"knock", packet.payload, 1 + ID)
        # ==== to here. Who sent what opened has the secret; who it is, gpg will say. ====
        if opened is None:
            return None
        (sent, data), now, nonce = opened, time.time() * 1000, packet.payload[TAG:TAG + NONCE]
        if abs(now - sent) > CLOCKS or sent <= self.began <= now or nonce in self.seen:
            return None  # what was seen before it began, this process cannot know
        self.remember(nonce)
        if data[0] > self.last + 1 or packet.own_port != self.ports[min(data[0], self.last)]:
            return None
        return data[0], data[1:1 + ID], data[1 + ID:], packet

    def remember(self, token):
        self.seen[token] = None
        if len(self.seen) > SEEN_MAX:
            self.seen.popitem(last=False)

    def collect(self, position, knock_id, piece, packet):
        """A frame to its knock. The address that counts is that of the first last fragment."""
        if knock := self.knocks.get(knock_id):
            if position >= self.last and packet.sender == knock.packet.sender:
                knock.packet = packet
                with suppress(queue.Full):  # never waits: its client repeats itself
                    knock.frames.put_nowait((position, piece))
        elif position <= self.last and knock_id not in self.seen:
            knock = self.partial.setdefault(knock_id, Knock())
            if len(self.partial) > PARTIAL_MAX:
                self.partial.popitem(last=False)
            knock.pieces.setdefault(position, piece)
            if position == self.last:
                knock.packet = knock.packet or packet
            if len(knock.pieces) > self.last:
                del self.partial[knock_id]
                others, owner = list(self.knocks.values()), knock.packet.sender[:8]
                crowd = [other for other in others
                         if other.packet.sender[:8] == owner and not other.answered]
                # One beyond the limits is dropped: its repeat asks again.
                if len(others) < KNOCKS_MAX and len(crowd) < UNANSWERED_MAX:
                    self.knocks[knock_id] = knock
                    threading.Thread(target=self.serve, args=(knock_id, knock), daemon=True).start()

    def serve(self, knock_id, knock):
        address = str(ipaddress.ip_address(knock.packet.sender))
        try:
            self.dialogue(knock_id, knock, address)
        except queue.Empty:
            pass  # its time is over
        except Exception as error:  # whatever becomes of one knock, the next is served
            reason = error if isinstance(error, Fault) else type(error).__name__
            self.say(f"{address}: knock refused: {reason}")
        self.remember(knock_id)  # before it goes: its repeats shall start no gpg
        del self.knocks[knock_id]

    def dialogue(self, knock_id, knock, address):
        """The server's side of the exchange. Raises Fault, or queue.Empty when its time is over."""
        sealed = b"".join(piece for _, piece in sorted(knock.pieces.items()))
        own = self.settings["own"]
        with self.gpg_slots:
            signer, png = unseal(self.settings["home"], sealed, own)
        try:
            request = json.loads(reveal(png))
            k, command = bytes.fromhex(request["k"]), command_of(request["cmd"])
            if request["to"] != own or keyed(k, b"id", b"", ID) != knock_id:
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise Fault(BAD_DATA, f"{signer} signed no request, or for another server or knock")

        reply_key, nonce = keyed(k, b"reply", sealed, 32), os.urandom(32)
        patience = self.settings["patience"] if command[0] == "E" else 0
        challenge = nonce + patience.to_bytes(2, "big") + address.encode()
        answer, end = keyed(reply_key, b"answer", nonce, 32), monotonic() + ANSWER_TIME
        position, piece = self.last, b""
        while not hmac.compare_digest(piece, answer):
            if position == self.last:  # the knock, and its repeats
                self.reply(knock.packet, frame(reply_key, b"challenge", challenge))
            position, piece = knock.frames.get(timeout=max(0, end - monotonic()))
        knock.answered = True

        self.say([knock_id.hex(), signer, command, knock.packet.sender.hex()])
        result = knock.result.get(timeout=patience + ANSWER_TIME)
        end = monotonic() + REPEAT_TIME
        while True:
            self.reply(knock.packet, frame(reply_key, b"result", result))
            knock.frames.get(timeout=max(0, end - monotonic()))

    def reply(self, packet, payload):
        """To where a packet came from, by the interface and link address that it came by."""
        with suppress(OSError):  # an interface that is gone: the client repeats itself
            self.sock.sendto(respond(packet, payload), packet.link)

    def say(self, message):
        self.channel.send(json.dumps(message).encode())

    def take_results(self):
        """From the monitor, each to the thread that waits; when it is gone, this process goes."""
        with suppress(OSError):
            while message := self.channel.recv(MESSAGE_MAX):
                if knock := self.knocks.get(message[:ID]):
                    knock.result.put(message[ID:])
        os._exit(DIED)


def check_unprivileged():
    """Raises Fault where `start_listener` left this process more than its two sockets (proc(5))."""
    with open("/proc/self/status", encoding="ascii") as file:
        status = file.read()
    if re.search(r"(?m)^([UG]id:.*\b0\b|Groups:.*\d|Cap...:\s*0*[1-9a-f]|NoNewPrivs:\s*0)", status):
        raise Fault(CONFIG, "server_gpg_dir has to belong to an unprivileged user and its group, "
                            "which the listener becomes: chown -R tariq: it")
    libc = ctypes.CDLL(None)
    libc.prctl(4, 0)  # PR_SET_DUMPABLE: a gpg that was taken over cannot look in here
    if number := KEYCTL.get(os.uname().machine):  # exec leaves a process the keys of root's session
        libc.syscall(number, 1, None)  # KEYCTL_JOIN_SESSION_KEYRING: a new one


def cmd_listener(descriptors):
    """What the monitor starts, with its packet socket and its end of the channel."""
    sock, channel = (socket.socket(fileno=int(number)) for number in descriptors)
    listener = Listener(sock, channel, json.loads(channel.recv(MESSAGE_MAX)))
    try:
        check_unprivileged()
        import PIL.PngImagePlugin  # now, as scapy's layers, so that no knock waits for it
        scapy_layers()
        home, own = listener.settings["home"], listener.settings["own"]
        gpg(home, "--list-secret-keys", own)  # is it there? This also starts gpg-agent
        listener.attach_filter()
        threading.Thread(target=listener.take_results, daemon=True).start()
        listener.say(f"listening for knocks on {len(listener.ports)} ports")
        listener.receive()
    except Exception as error:  # its stderr is /dev/null: the monitor says it
        code, text = explained(error)
        listener.say(text)
        os._exit(code)  # the channel closes with this process: the monitor sees the code


# ---- monitor: checked requests in, rules and commands out. ALL THAT FOLLOWS RUNS AS ROOT ---------

RECEIVE_BUFFER = 4 << 20  # bytes of packets that wait; the kernel doubles it: what garbage can pin
OUTPUT_ROOM = 1 << 20  # bytes that a command may print before it has to wait, until it is killed
NO_END = 10**9  # seconds: no end
FOREVER = 2**31 - 1  # seconds since 1970: the last that iptables' time match takes
SETPRIV = ("setpriv --clear-groups --inh-caps=-all --ambient-caps=-all --bounding-set=-all "
           "--no-new-privs").split()
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TIME_MATCH = "-m time --datestop {until}".split()
RULE = "-s {ip} -p {protocol} -m conntrack --ctstate NEW -m {protocol} --dport {dport}".split()
FAMILIES = (("iptables", "-w", "5"), "192.0.2.1"), (("ip6tables", "-w", "5"), "2001:db8::1")
FIELD = re.compile(r"\{(ip|dport|protocol|until|seconds|user|version)\}")  # other braces are nft's


def run(*words, changes=True, check=True):
    """Run a program, 15 seconds at most -> (exit status, its words). Logged before it runs where it
    changes the machine. Raises Fault."""
    if changes:
        log("+ " + shlex.join(words))
    done = subprocess.run(("timeout", "15", *words), stdin=DEVNULL, stdout=PIPE, stderr=STDOUT,
                          cwd="/", text=True, errors="replace")
    if check and done.returncode:
        raise Fault(SYSTEM, f"{words[0]}: {done.stdout.strip()[:300]} ({done.returncode})")
    return done.returncode, done.stdout


def permitted(patterns, command):
    """Whether patterns of `may` permit a command; both are from `command_of`. Ports: each by
    itself. E: word by word; * is any one word, at the end any number of them."""
    if command[0] != "E":
        allowed = {port for action, *ports in patterns if action == command[0] for port in ports}
        return "*" not in command and ("*" in allowed or allowed.issuperset(command[1:]))
    for pattern in patterns:
        words = command
        if pattern[-1] == "*":
            pattern, words = pattern[:-1], command[:len(pattern) - 1]
        fits = all(want in ("*", word) for want, word in zip(pattern, words))
        if fits and len(words) == len(pattern):
            return True
    return False


class Monitor:
    """Policy, doors and commands, and the listener's parent."""

    def __init__(self, config, signals):
        self.path, self.signals, self.commands, self.listener = config.path, signals, {}, None
        self.doors = {}  # (address, port): the words that close it, its end
        self.chain = config.get("iptables_chain", default="tariq")
        self.opening = config.get("open_command", default=[])
        self.closing = config.get("close_command", default=None if self.opening else [])
        self.families = () if self.opening else FAMILIES
        usual = ["-A", self.chain, *RULE, *TIME_MATCH, "-j", "ACCEPT"]
        self.rules = {protocol: config.get(f"open_{protocol}_port", default=usual)
                      for protocol in ("tcp", "udp")}
        if any(rule[:2] != usual[:2] for rule in self.rules.values()):
            raise Fault(CONFIG, f"{self.path}: open_tcp_port, open_udp_port: need -A {self.chain}, "
                                "the iptables_chain, first")
        ports = config.get("secret_ports")
        self.settings = {"ports": ports, "key": shared_key(config.get("secret"), ports).hex(),
                         "home": config.get("server_gpg_dir"), "own": config.get("server_key"),
                         "patience": config.get("command_timeout", default=30)}

    def link_chain(self, program):
        """Let INPUT lead to the chain: at start, and where a flush or a reload took that away."""
        if run(*program, "-C", "INPUT", "-j", self.chain, changes=False, check=False)[0]:
            run(*program, "-N", self.chain, check=False)  # it may be there
            run(*program, "-I", "INPUT", "-j", self.chain)

    def prepare(self):
        """Empty the chain, try the rules, warn where nothing is hidden."""
        for program, ip in self.families:
            self.link_chain(program)
            if run(*program, "-A", self.chain, *TIME_MATCH[:-1], "2038-01-19", check=False)[0]:
                log(f"{program[0]}: this kernel has no time match (xt_time)")
                self.rules = {name: rule[:-6] + rule[-2:] if rule[-6:-2] == TIME_MATCH else rule
                              for name, rule in self.rules.items()}
            for port in ("9/tcp", "9/udp"):
                run(*self.door_words(ip, port, "", 0)[0])
            run(*program, "-F", self.chain)
            rules = run(*program, "-S", "INPUT", changes=False)[1].splitlines()
            if "-P INPUT DROP" not in rules and rules[-1] != "-A INPUT -j DROP":
                log(f"{program[0]}: INPUT does not drop: nothing is hidden: see README, step 3")
        timed = self.families and all("{until}" in rule for rule in self.rules.values())
        log(f"{'the kernel' if timed else 'this server'} ends doors")

    def door_words(self, ip, port, user, seconds):
        """The words that open a door, and those that close it."""
        (number, protocol), six = port.split("/"), ":" in ip
        until = time.gmtime(min(FOREVER, time.time() + seconds))
        fields = {"ip": ip, "dport": number, "protocol": protocol, "user": user,
                  "until": time.strftime("%Y-%m-%dT%H:%M:%S", until), "seconds": str(seconds),
                  "version": "6" if six else "4"}
        both, program, rule = (self.opening, self.closing), FAMILIES[six][0], self.rules[protocol]
        if self.families:
            both = [*program, *rule], [*program, "-D", *rule[1:]]
        return [[FIELD.sub(lambda field: fields[field[1]], word) for word in words]
                for words in both]

    def open(self, ip, port, user, seconds):
        """One door for an address and port; opened again, a new end. Raises Fault."""
        self.close(ip, port)
        if self.families:
            self.link_chain(FAMILIES[":" in ip][0])
        opening, closing = self.door_words(ip, port, user, seconds)
        self.doors[ip, port] = closing, monotonic() + seconds  # first: it may open, and then fail
        run(*opening)

    def close(self, ip, port):
        """Raises Fault, and keeps the door in mind, where its rule may be there still. Not so with
        a close_command: it runs once, since a set's element may have ended by itself."""
        closing, _ = self.doors.get((ip, port), ([], 0))
        if closing and run(*closing, check=False)[0] and self.families:
            rule = ["-C" if word == "-D" else word for word in closing]
            status, words = run(*rule, changes=False, check=False)
            if status != 1:  # 1: there is no such rule, somebody else took it out
                raise Fault(SYSTEM, f"{ip} {port} is not closed: {words.strip()[:300]} ({status})")
        self.doors.pop((ip, port), None)

    def close_expired(self):
        for door in [door for door, (_, end) in self.doors.items() if end <= monotonic()]:
            try:
                self.close(*door)
            except Fault as fault:
                log(f"{fault}: trying again")
                time.sleep(1)

    def stop(self):
        """At the end, whatever it is: no listener, no command, no door."""
        for process in [self.listener, *(process for process, _, _ in self.commands.values())]:
            with suppress(OSError, AttributeError):  # each has a session of its own
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        closing = [words for words, _ in self.doors.values()]
        if self.families:
            closing = [[*program, "-F", self.chain] for program, _ in self.families]
        for words in closing:
            status, said = run(*words, check=False)
            if status:
                log(f"{said.strip()} ({status}): doors may be open until their time")

    def handle(self, data):
        """A message of the listener, of which nothing is believed: who may do what is looked up."""
        try:
            message = json.loads(data)
            if isinstance(message, str):
                return log(f"listener: {message[:1000]}")
            knock_id, signer, command, sender = message
            knock_id, ip = bytes.fromhex(knock_id), str(ipaddress.ip_address(bytes.fromhex(sender)))
            user, command = parse("key", signer), command_of(command)
        except (ValueError, TypeError, RecursionError):
            return log("a malformed message from the listener: is it still itself?")
        done, status, event = False, 0, f"{ip} {shlex.join(command)}"
        try:
            config = Config(self.path, root=True)  # afresh: an edit holds from the next knock on
            section = config.clients().get(user, "")
            user = section[len("allow "):] or user
            if not permitted(config.get("may", [section], []), command):
                raise Fault(REFUSED, f"refused: {shlex.join(command)}: not allowed to {user}")
            if command[0] == "E":
                return self.execute(knock_id, event, user, command[1:])
            seconds = config.get("open_timeout", [section, "server"], 3600) or NO_END
            done, text = True, self.move_doors(command, ip, user, seconds)
        except (Fault, OSError) as error:
            status, text = explained(error)
        self.finish(knock_id, f"{user} {event}: {text}", done, status, text.encode())

    def move_doors(self, command, ip, user, seconds):
        """O or C -> what was done, in words. Raises Fault."""
        action, *ports = command
        for port in ports:
            if action == "O":
                self.open(ip, port, user, seconds)
            else:
                self.close(ip, port)
        names = ", ".join("/".join(port.split("/")[::-1]) for port in ports)
        if action == "C":
            return f"closed {names} for {ip}"
        end = time.gmtime(time.time() + seconds)
        stamp = time.strftime("%Y-%m-%d " * (seconds >= 86400) + "%H:%M:%SZ", end)
        return f"opened {names} for {ip} until {'closed' if seconds == NO_END else stamp}"

    def execute(self, knock_id, event, user, words):
        """Start a permitted command without a shell. At its time limit timeout(1) kills it and its
        children, also when this server is gone; what made a session of its own may stay."""
        if user in self.commands:
            raise Fault(REFUSED, "refused: your last command still runs")
        log("+ " + shlex.join(words))
        limit = "timeout", "-s", "KILL", str(self.settings["patience"])
        process = Popen([*limit, *words], stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, cwd="/",
                        start_new_session=True)
        fcntl.fcntl(process.stdout, 1031, OUTPUT_ROOM)  # F_SETPIPE_SZ: it is read at the end only
        os.set_blocking(process.stdout.fileno(), False)  # a daemon it leaves may hold the pipe open
        self.commands[user] = process, knock_id, event

    def finish_commands(self):
        for user, (process, knock_id, event) in list(self.commands.items()):
            if (status := process.poll()) is not None:
                del self.commands[user]
                with process.stdout as pipe:
                    output = pipe.read(TEXT_MAX) or b""
                status = status if status >= 0 else 128 - status  # a signal's number, as in a shell
                self.finish(knock_id, f"{user} {event}: exit status {status}", True, status, output)

    def finish(self, knock_id, event, done, status, text):
        """Log one event (who, from where, what, verdict), and give the listener the result."""
        log(event)
        with suppress(OSError):  # a listener that does not read must not stop the monitor
            self.channel.send(knock_id + bytes([done, status]) + text[:TEXT_MAX],
                              socket.MSG_DONTWAIT)

    def start_listener(self):
        """The listener: this file on stdin, two sockets, a user's ids, and nothing of root's."""
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # ETH_P_ALL
        packets.setsockopt(socket.SOL_SOCKET, 33, RECEIVE_BUFFER)  # SO_RCVBUFFORCE
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        owner, descriptors = os.stat(self.settings["home"]), (packets.fileno(), theirs.fileno())
        with packets, theirs, open(__file__, "rb") as code:
            self.listener = Popen(
                [*SETPRIV, f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", sys.executable,
                 "-I", "-", "listener", *map(str, descriptors)],
                stdin=code, stdout=DEVNULL, stderr=DEVNULL, pass_fds=descriptors, env={}, cwd="/",
                start_new_session=True)
        self.channel.send(json.dumps(self.settings).encode())

    def serve(self):
        """Until a signal ends it. It sleeps until there is a message, a signal, or a door's end."""
        while True:
            ends = [end for _, end in self.doors.values()]
            wait = max(0, min(ends) - monotonic()) if ends else None
            ready = select.select([self.channel, self.signals], [], [], wait)[0]
            if self.signals in ready and set(os.read(self.signals, 4096)) != {signal.SIGCHLD}:
                return
            self.finish_commands()
            self.close_expired()
            if self.channel in ready:
                message = b""
                with suppress(ConnectionError):
                    message = self.channel.recv(MESSAGE_MAX)
                if not message:
                    self.listener.kill()  # it may have closed its end only
                    code = self.listener.wait()
                    raise Fault(code if code in (BAD_DATA, MISSING, CONFIG) else DIED,
                                "the listener died: every door is closed (at its start: setpriv "
                                "needs CAP_SETUID, CAP_SETGID and CAP_SETPCAP, and the keyring's "
                                f"owner has to reach {sys.executable})")
                self.handle(message)


def need_root():
    if os.geteuid():
        raise Fault(SYSTEM, "this needs root: sudo")
    os.environ.clear()  # no program that root starts gets the caller's environment
    os.environ.update(PATH=SAFE_PATH, LC_ALL="C.UTF-8")


def cmd_server(options):
    """Serve until SIGTERM, SIGINT or SIGHUP; the chain is empty before and after."""
    need_root()
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # its number goes to the pipe that `serve` reads
    monitor = Monitor(Config(options.config, root=True), signals)
    namespace = os.stat("/proc/self/ns/net").st_ino  # a chain belongs to a network namespace
    lock = open(f"/run/tariq-{monitor.chain}-{namespace}.lock", "wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
    except BlockingIOError:
        raise Fault(SYSTEM, f"a server with the chain {monitor.chain} runs already: stop it, or "
                            "give this one another iptables_chain")
    try:
        monitor.prepare()
        monitor.start_listener()
        monitor.serve()
    finally:
        monitor.stop()


# ---- set-up: once, by hand; says on stderr what it did, file by file -----------------------------

PROFILE = "secret_ports", "secret", "server_key"  # of a server's config, which its clients need


def locked_directory(path):
    """Make a config's directory, which others may pass through, and lock it until this process
    ends. Returns it."""
    directory = os.path.dirname(path)
    os.makedirs(directory, 0o711, exist_ok=True)
    fcntl.flock(os.open(directory, os.O_RDONLY), fcntl.LOCK_EX)
    return directory


def write_private(path, text):
    """Write a file of mode 0600, whole or not at all: the server may read it at any moment."""
    import tempfile
    directory = os.path.dirname(path)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=directory, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    log(f"wrote {path}")


def make_key(home, user):
    """Make a key without passphrase, Ed25519 and Curve25519. Returns its fingerprint."""
    _, words = gpg(home, "--pinentry-mode", "loopback", "--passphrase", "", "--quick-generate-key",
                   user, "future-default", "default", "never")
    log(f"made a key for {user} in {home}")
    return re.search(r"KEY_CREATED \S+ (\w{40})", words)[1]


def show_key(home, text):
    """(fingerprint, user id) of the one public key in a text; nothing is imported. Raises Fault."""
    listing = b""
    with suppress(Fault):  # gpg's words on what is no key say less
        listing, _ = gpg(home, "--with-colons", "--show-keys", data=text)
    listing = listing.decode(errors="replace")
    keys = re.findall(r"(?m)^(pub|sec):.*\nfpr:+(\w{40})", listing)  # GnuPG doc/DETAILS
    users = re.findall(r"(?m)^uid:(?:[^:]*:){8}([^:]*)", listing)
    if [kind for kind, _ in keys] != ["pub"] or not users:
        raise Fault(BAD_DATA, "needs one public key on stdin, which tariq.py keygen prints")
    return keys[0][1], users[0]


def cmd_init(options):
    """Make a server's user, keyring, key and config. A config that is there stays as it is."""
    need_root()
    home = os.path.join(locked_directory(options.config), ".server-gpg")
    if os.path.exists(options.config):
        return log(f"{options.config} is there already: nothing changed")
    if run("id", "tariq", changes=False, check=False)[0]:
        run("useradd", "--system", "--home-dir", home, "--shell", "/usr/sbin/nologin", "tariq")
    owner = pwd.getpwnam("tariq")
    if not 0 < owner.pw_uid < 1000:
        raise Fault(SYSTEM, "the account tariq is a person's: it must not own the server's key: "
                            "see README, By hand")
    os.makedirs(home, 0o700, exist_ok=True)
    os.chown(home, owner.pw_uid, owner.pw_gid)
    key = make_key(home, f"tariq@{socket.gethostname()}")
    ports = ",".join(map(str, secrets.SystemRandom().sample(range(1024, 32768), 5)))
    secret = base64.b64encode(os.urandom(32)).decode()
    write_private(options.config,
                  f"[server]\nsecret_ports = {ports}\nsecret = {secret}\n"
                  f"server_gpg_dir = {home}\nserver_key = {key}\n")


def cmd_keygen(options):
    """Make a client's config, keyring and key where missing; print the public key."""
    home, path = os.path.join(locked_directory(options.config), "gpg"), options.config
    if not os.path.exists(path):
        write_private(path, f"[client]\nuser = {options.user}\nclient_gpg_dir = {home}\n")
    home = os.path.expanduser(Config(path).get("client_gpg_dir", ["client"]))
    os.makedirs(home, 0o700, exist_ok=True)
    export = ("--armor", "--export", exactly(options.user))
    if not gpg(home, *export)[0]:
        make_key(home, options.user)
    os.write(1, gpg(home, *export)[0])


def cmd_enroll(options):
    """Allow the client whose public key is on stdin; print the profile that `join` reads."""
    need_root()
    allow = [" ".join(words) for words in options.allow or [["O 22"]]]
    lines = [shlex.join(command_of(shlex.split(line))) for line in allow]
    if "#" in "".join(lines):
        raise Fault(USAGE, "--allow needs words without #: in a config that begins a comment")
    text = sys.stdin.buffer.read(GPG_MAX)  # before the lock: keygen at its other end may hold it
    locked_directory(options.config)
    config = Config(options.config, root=True)
    home, own = config.get("server_gpg_dir"), config.get("server_key")
    (key, user), clients = show_key(home, text), config.clients()
    name = options.name or re.sub(r".*<(.+)>$", r"\1", user)
    if key in clients:
        log(f"{config.path}: {key} is in [{clients[key]}] already: nothing changed")
    elif not re.fullmatch(r"\w[\w.@+ -]*", name) or config.ini.has_section(f"allow {name}"):
        raise Fault(BAD_DATA, f"{name} is another client's name, or cannot be one: give --name")
    else:
        gpg(home, "--import", data=text)
        may = "".join(f"\n    {line}" for line in lines)
        section = f"[allow {name}]\nkey = {key}\nmay ={may}\n"
        write_private(config.path, f"{config.text.rstrip()}\n\n{section}")
        log(f"{name} ({key}) may {'; '.join(lines)}")
    profile = "# For tariq.py join. It holds the shared secret: keep it private.\n[profile]\n"
    for item in PROFILE:
        config.get(item)  # that it is sound
        profile += f"{item} = {config.ini['server'][item]}\n"
    os.write(1, profile.encode() + gpg(home, "--armor", "--export", own)[0])


def cmd_join(options):
    """Take the server's profile on stdin into the client's keyring and config."""
    text, begin, key = sys.stdin.buffer.read(GPG_MAX).partition(b"-----BEGIN PGP PUBLIC")
    profile = configparser.ConfigParser(interpolation=None, delimiters="=")
    try:
        profile.read_string(text.decode())
        given = {name: profile["profile"][name] for name in PROFILE}
        for name, value in given.items():
            parse(name, value)
    except (configparser.Error, KeyError, ValueError):
        raise Fault(BAD_DATA, "no profile on stdin, which tariq.py enroll prints: did that fail?")
    locked_directory(options.config)
    config, path = Config(options.config), options.config
    home = config.get("client_gpg_dir", ["client"])
    if show_key(home, begin + key)[0] != given["server_key"]:
        raise Fault(BAD_DATA, "the profile's key is not its server_key: enroll again")
    if not config.ini.has_section(options.host):
        settings = "".join(f"{name} = {value}\n" for name, value in given.items())
        write_private(path, f"{config.text.rstrip()}\n\n[{options.host}]\n{settings}")
    elif not given.items() <= dict(config.ini[options.host]).items():
        raise Fault(BAD_DATA, f"{path}: [{options.host}] has other values: take it out, then join")
    gpg(home, "--import", data=begin + key)
    log(f"{path}: [{options.host}] is known by its key {given['server_key']}")


# ---- command line --------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(USAGE, f"{message} (tariq.py --help)")


def command_line():
    """The parser; each subcommand's function is its `function`."""
    parser = Parser(prog="tariq.py", description=__doc__.split("\n\n")[0], epilog=EXIT_CODES,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(function, usual, text):
        sub = commands.add_parser(function.__name__[4:], help=text, description=text)
        sub.set_defaults(function=function)
        sub.add_argument("-c", "--config", default=usual, help=f"default: {usual}",
                         type=lambda path: os.path.realpath(os.path.expanduser(path)))
        return sub.add_argument

    command(cmd_server, ROOT_CONFIG, "listen for knocks (root)")
    command(cmd_init, ROOT_CONFIG, "server, once: config, system user, keyring, key (root)")
    add = command(cmd_knock, CLIENT_CONFIG, "knock at a server: open or close ports, run a command")
    add("-u", "--user", help="whose key signs")
    add("-p", "--ports", help="the secret_ports")
    add("-i", "--img-dir", help="PNG images to hide requests in")
    add("-g", "--gpg-dir", help="keyring")
    for flag, family in (("-4", socket.AF_INET), ("-6", socket.AF_INET6)):
        add(flag, dest="family", action="store_const", const=family, default=0, help="no other IP")
    add("-t", "--timeout", type=int, default=10, help="seconds to try (10)")
    add("--transport", choices=TRANSPORTS, help="default: kernel and udp in turn")
    add("-v", "--verbose", action="store_true", help="show each step and its time")
    add("host")
    add("action", choices="OCE", help="O PORT[/tcp|/udp]..., C PORT..., or E COMMAND [ARG...]")
    add("words", nargs=argparse.REMAINDER)
    add = command(cmd_keygen, CLIENT_CONFIG, "client: make keyring and key, print the public key")
    add("user", help="an email address or the like: me@laptop")
    add = command(cmd_enroll, ROOT_CONFIG, "server: public key on stdin, profile on stdout (root)")
    add("--allow", action="append", nargs="+", help="what it may do, as in `may` (O 22)")
    add("--name", help="what the log calls it (the key's email)")
    add = command(cmd_join, CLIENT_CONFIG, "client: take the profile on stdin")
    add("host")
    return parser


def main():
    os.umask(0o022)
    try:
        if sys.argv[1:2] == ["listener"]:  # not for people: `start_listener` runs it
            return cmd_listener(sys.argv[2:])
        options = command_line().parse_args()
        return options.function(options)  # an exit code; None is 0
    except KeyboardInterrupt:
        return 130
    except (Fault, ImportError, OSError, ValueError) as error:
        code, text = explained(error)
        log(f"tariq: {text}")
        return code


if __name__ == "__main__":
    sys.exit(main())
