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
                                                              meant for me? id made of k?
      <-------- frame(k', c | patience | address seen)        from the last port; c: 32 random bytes
      who knows k is my server. Is that my address?
      frame(K, N | id | MAC(k', c)) ---------------------->   who knows k is the signer, alive now,
                                                              at this address. Monitor: policy, act
      <--------------- frame(k', done | status | text)

K is shared by a server and its clients: it hides the server and names nobody. k is random, for one
knock, and known to who sealed the request and to who could unseal it. k' is made of k and of the
sealed bytes (in the code: `key`, `k`, `reply_key`). A frame is tagged, masked, stamped with its
time, and has a fresh nonce: the same bytes twice are a replay. The client repeats its knock in new
frames until it has the result; the server acts once. Patience is how long a command may run.

Trust boundaries: at the server, until its tag holds, a packet meets `split`, `unframe`, `keyed`.
The listener (gpg, Pillow, scapy) is unprivileged from its first instruction; taken over, it names
any signer and address, and gets what that one `may`. The monitor (root) is standard library only.
"""
import argparse, base64, configparser, ctypes, fcntl, hashlib, hmac, io, ipaddress, json, os, pwd
import queue, re, secrets, select, shlex, signal, socket, struct, subprocess, sys, threading
import time, zlib
from collections import OrderedDict, namedtuple
from contextlib import suppress
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from time import monotonic

# Exit codes: those of sysexits.h. E exits with its command's, which is rarely one of them.
USAGE, BAD_DATA, MISSING, DIED, SYSTEM, NO_ANSWER = 64, 65, 69, 70, 71, 75
RELAYED, REFUSED, CONFIG = 76, 77, 78
EXIT_CODES = """exit codes: 0 done; E: the command's (137: killed at its limit); 64 usage; 65 image,
key or profile unusable; 69 program, package or file missing; 70 the listener died; 71 the system
refused; 75 no answer; 76 a relay, or NAT; 77 refused by policy; 78 config; 130 interrupted"""

class Fault(Exception):
    """What the user can mend: an exit code, and the line they read."""

def explained(error):
    """(exit code, the line) of an exception, where it ends a program or a request."""
    if isinstance(error, Fault):
        return error.args
    if isinstance(error, (ImportError, FileNotFoundError)):
        return MISSING, (f"{error}: Tariq's files come from tariq.py init (server) and keygen "
                         "(client), the rest from apt-get install gnupg python3-scapy python3-pil")
    if isinstance(error, ValueError):
        return USAGE, str(error)
    return SYSTEM, f"{type(error).__name__}: {error}"

def printable(text):
    """Text without what could forge a log line or steer a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)

def log(text):
    """One line on stderr."""
    with suppress(OSError):  # a full disk behind stderr must not keep a door open
        os.write(2, f"{printable(text)}\n".encode())

# ---- config: an INI file in, checked values out --------------------------------------------------
ROOT_CONFIG = "/etc/tariq/tariq.conf"
CLIENT_CONFIG = os.path.expanduser("~/.config/tariq/tariq.conf")

def ports_of(text):
    ports = [int(word) for word in text.split(",")]
    if len(set(ports)) < len(ports) or max(ports) > 65535:
        raise ValueError
    return ports

def command_of(words):
    """The words of a request or of a line of `may`, checked: ['O', '22'] -> ['O', '22/tcp'].
    O opens ports, C closes them, E executes a command. Raises ValueError."""
    if not isinstance(words, list) or len(words) < 2 or words[0] not in ("O", "C", "E") \
            or not all(isinstance(word, str) and word.isprintable() for word in words):
        raise ValueError("needs O PORT[/tcp|/udp]..., C PORT... or E COMMAND [ARG...], printable")
    if words[0] == "E":
        return words
    ports = [re.fullmatch(r"([1-9]\d{0,4})(/tcp|/udp)?", word, re.ASCII) for word in words[1:]]
    if not all(port and int(port[1]) < 65536 for port in ports):
        raise ValueError("needs ports as 22, 22/tcp or 53/udp, from 1 to 65535")
    return [words[0], *dict.fromkeys(port[1] + (port[2] or "/tcp") for port in ports)]  # each once

def patterns_of(text):
    return [command_of(shlex.split(line)) for line in text.splitlines() if line.strip()]

# What a value has to be: a pattern that it matches whole, words for the error, what converts it.
LINE = (".*", "one line", str)
KEY = (r"[0-9A-Fa-f]{40}", "a key's fingerprint, 40 hex digits without spaces", str.upper)
WORDS = (r"(?=.*\{ip\})(?=.*\{dport\}).+", "words with {ip} and {dport} among them", shlex.split)
RULES = (r"-A \S+ " + WORDS[0], "-A CHAIN, then " + WORDS[1], shlex.split)
SYNTAX = {
    "secret_ports": (r"[1-9]\d{0,4}( *, *[1-9]\d{0,4}){4,31}",
                     "5 to 32 different ports, with commas", ports_of),
    "secret": (r"[A-Za-z0-9+/]{43}=", "32 random bytes in base64: head -c 32 /dev/urandom | base64",
               base64.b64decode),
    "key": KEY, "server_key": KEY, "user": LINE, "img_dir": LINE, "client_gpg_dir": LINE,
    "open_tcp_port": RULES, "open_udp_port": RULES, "open_command": WORDS, "close_command": WORDS,
    "open_timeout": (r"\d{1,8}", "a whole number of seconds", int),
    "command_timeout": (r"[1-9]\d{0,2}", "a whole number of seconds, 1 to 999", int),
    "iptables_chain": (r"(?![A-Z]+$)\w[\w-]{0,27}", "a chain of its own, not in capitals", str),
    "may": (r"[^\0]*", "lines of O PORT..., C PORT... or E COMMAND [ARG...]", patterns_of),
    "host": (r"(?!DEFAULT$)[\w.:%-]+", "an ASCII name or address as HOST", str),
    "server_gpg_dir": LINE,
}
IN_ALLOW = "key", "may", "open_timeout"  # the keys of a section [allow NAME]

def parse(key, text):
    """The value of a key. Raises ValueError, which does not quote the text: it may be a secret."""
    pattern, need, convert = SYNTAX[key]
    with suppress(ValueError):
        if re.fullmatch(pattern, text, re.ASCII):
            return convert(text)
    raise ValueError(f"needs {need}")

class Config:
    """One INI file, which may hold a secret. Raises Fault or, without a file, OSError."""

    def __init__(self, path, root=False):
        self.path = path
        self.ini = configparser.ConfigParser(interpolation=None, delimiters="=",
                                             inline_comment_prefixes="#")
        with open(path, encoding="utf-8") as file:
            try:
                self.text = file.read()
                self.ini.read_string(self.text)
            except (ValueError, configparser.Error):  # which quotes the line: perhaps the secret
                raise Fault(CONFIG, f"{path} is not INI: needs [section] or key = value, once each")
            status = os.fstat(file.fileno())
        if status.st_mode & 0o077 or (root and status.st_uid):
            raise Fault(CONFIG, f"{path}: chmod 600 it; if root's commands obey it, chown root it")
        for name, section in self.ini.items():
            known = IN_ALLOW if name.startswith("allow ") else SYNTAX
            if unknown := [key for key in section if key not in known]:  # cut: perhaps a secret
                raise Fault(CONFIG, f"{path}: [{name}] {unknown[0]:.16}: needs another name")

    def get(self, key, sections=("server",), default=None):
        """The first value that one of the sections has for a key, parsed."""
        for section in sections:
            if text := self.ini.get(section, key, fallback="").strip():
                try:
                    return parse(key, text)
                except ValueError as error:
                    raise Fault(CONFIG, f"{self.path}: [{section}] {key}: {error}")
        if default is None:
            raise Fault(CONFIG, f"{self.path}: [{sections[0]}] {key} is missing: written by hand "
                                "or by init, enroll, keygen, join: see tariq.conf.example")
        return default

    def clients(self):
        """{fingerprint: section} of all [allow NAME]. Raises Fault: a key that is bad, or twice."""
        sections = [name for name in self.ini.sections() if name.startswith("allow ")]
        clients = {self.get("key", [name]): name for name in sections}
        if len(clients) < len(sections):
            raise Fault(CONFIG, f"{self.path}: each section [allow NAME] needs a key of its own")
        return clients

# ---- OpenPGP: bytes in, sealed bytes out, and back; as the keyring's owner -----------------------
GPG = ("gpg --batch --no-tty --quiet --no-options --no-auto-check-trustdb --no-random-seed-file "
       "--trust-model always --status-fd 2").split()  # whom to trust, [allow] says
SILENT = "--logger-file", "/dev/null"  # gpg's words on data of others, which may quote them
INPUT_MAX = 65_536  # bytes that are read of standard input
UNSEAL_TIME = 1  # second: 15 ms are usual, and nested compression would take 10 s
PLAIN_MAX = 8192  # bytes that may come out of a seal: twice Tariq's PNG (SIDE, below)
SIGNED_WITHIN = 600  # seconds: gpg stamps the signature before pinentry asks for the passphrase
TROUBLE = re.compile(r"(?m)^\[GNUPG:\] ((?:NO_|NODATA|BAD|ERR|EXP|REV|FAIL)\w*|\w+_FAILED)")

def as_owner(directory):
    """The words by which root runs a program as a directory's owner, without a capability."""
    owner = os.stat(directory)
    if not owner.st_uid:
        raise Fault(CONFIG, f"{directory} needs an unprivileged owner: chown -R tariq: it")
    return (f"setpriv --reuid={owner.st_uid} --regid={owner.st_gid} --clear-groups --no-new-privs "
            "--inh-caps=-all --ambient-caps=-all --bounding-set=-all --pdeathsig KILL").split()

def gpg(home, *arguments, data=b"", seconds=60):
    """Run gpg once -> (output, stderr with status lines). What lies in a keyring's directory may
    command gpg-agent, so root runs gpg as the directory's owner. Raises Fault with gpg's words."""
    home = os.path.expanduser(home)
    change = as_owner(home) if os.stat(home).st_uid and not os.geteuid() else []
    with suppress(OSError):  # where pinentry asks for a passphrase
        os.environ["GPG_TTY"] = os.ttyname(2)
    try:
        done = subprocess.run([*change, *GPG, "--homedir", home, *arguments], input=data,
                              capture_output=True, timeout=seconds,
                              start_new_session=bool(change))  # not root's terminal
    except subprocess.TimeoutExpired:  # this bounds its words too: a second's are a few MB
        raise Fault(BAD_DATA, f"gpg, {home}: not done in {seconds} s")
    words = done.stderr.decode(errors="replace")
    if done.returncode:
        said = re.sub(r"(?m)^\[GNUPG:\].*\n", "", words).strip()[:300]
        said = said and f"{said} (if for a passphrase: it needs a terminal, pinentry-curses)"
        raise Fault(BAD_DATA, f"gpg, {home}: exit status {done.returncode} "
                              f"{' '.join(TROUBLE.findall(words)[:9])} {said}")  # bounded
    return done.stdout, words

def exactly(user):
    """How gpg names a key by this email and no other (gpg(1)); a fingerprint stays as it is."""
    return f"<{user}>" if "@" in user and "<" not in user else user

def seal(home, data, signer, recipient):
    """Sign and encrypt (RFC 4880): binary, recipient hidden, not compressed."""
    return gpg(home, "--compress-algo", "none", "--local-user", exactly(signer), "--sign",
               "--hidden-recipient", recipient, "--encrypt", data=data, seconds=SIGNED_WITHIN)[0]

def unseal(home, sealed, own):
    """Decrypt with the key `own`, verify -> (fingerprint of the signer's primary key, at most
    PLAIN_MAX bytes). Takes only what status lines prove (GnuPG doc/DETAILS). Raises Fault."""
    decrypt = f"--pinentry-mode cancel --max-output {PLAIN_MAX} --try-secret-key {own} --decrypt"
    plain, words = gpg(home, *SILENT, *decrypt.split(), data=sealed, seconds=UNSEAL_TIME)
    said = re.findall(r"(?m)^\[GNUPG:\] (\w+)", words)
    signed = re.search(r"(?m)^\[GNUPG:\] VALIDSIG \w+ \S+ (\d+) .* (\w{40})$", words)
    needed = ("DECRYPTION_OKAY", "PLAINTEXT", "NEWSIG", "GOODSIG", "VALIDSIG")
    if not signed or any(said.count(word) != 1 for word in needed) or TROUBLE.search(words):
        raise Fault(BAD_DATA, "not one encrypted message with one valid signature")
    if abs(time.time() - int(signed[1])) > SIGNED_WITHIN:
        raise Fault(BAD_DATA, f"{signed[2]} signed it over {SIGNED_WITHIN} s from now: set clocks")
    return signed[2], plain

# ---- steganography: data and a cover in, a PNG out, and back; others' once verified --------------
SIDE = 36  # pixels: their low bits carry 486 bytes; the PNG, sealed with RSA-4096, fits 5 packets
ROW, CAPACITY = 3 * SIDE, 3 * SIDE * SIDE // 8  # bytes

def cover(directory):
    """SIDE x SIDE RGB samples: a random PNG of the directory; without one, random. Raises Fault."""
    if not directory:
        return os.urandom(SIDE * ROW)
    from PIL import Image
    path = os.path.expanduser(directory)
    try:
        names = [name for name in os.listdir(path) if name.lower().endswith(".png")]
        path += "/" + secrets.choice(names)
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB").resize((SIDE, SIDE)).tobytes()
    except Exception:  # there is none, or Pillow's many for a bad one
        raise Fault(BAD_DATA, f"{path}: needs PNG images (.png)")

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def hide(samples, data):
    """RGB samples, data -> PNG (ISO 15948), data and spaces in their low bits. Raises Fault."""
    if len(data) > CAPACITY:
        raise Fault(USAGE, f"the request is {len(data) - CAPACITY} bytes too long: shorten it")
    bits = map(int, f"{int.from_bytes(data.ljust(CAPACITY), 'big'):0{8 * CAPACITY}b}")
    samples = bytes(sample & 0xFE | bit for sample, bit in zip(samples, bits))
    rows = b"".join(b"\0" + samples[start:start + ROW] for start in range(0, SIDE * ROW, ROW))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)  # 8 bits a sample, RGB
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 0))
            + chunk(b"IEND", b""))  # not compressed: its size tells nothing of the request's

def reveal(png):
    """PNG -> data and spaces. The size comes first: a bomb stays packed. Raises ValueError, and
    what Pillow has for bad files, which is much."""
    from PIL.PngImagePlugin import PngImageFile
    image = PngImageFile(io.BytesIO(png))
    if image.size != (SIDE, SIDE) or image.mode != "RGB":
        raise ValueError
    bits = "".join(str(sample & 1) for sample in image.tobytes())
    return int(bits, 2).to_bytes(CAPACITY, "big")

# ---- wire: data in, frames that look random out, and back ----------------------------------------
TAG, NONCE, STAMP, ID = 16, 12, 6, 12  # bytes; the stamp counts milliseconds since 1970
HEAD = TAG + NONCE + STAMP  # bytes of a frame before its data
FRAME_MAX = 1200  # bytes: an MTU of 1280, IPv6's least, carries it (in a crafted SYN 1196)
TEXT_MAX = FRAME_MAX - HEAD - 2  # bytes of text in a result
# Bytes of a packet: IPv4 20, UDP 8, HEAD, position 1, ID; IPv4 and TCP at their longest, FRAME_MAX.
LEAST, MOST = 75, 1320

# Addresses as bytes, ports (port: the sender's), TCP header or b"", payload, recvfrom's address.
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
    """Anybody's bytes -> (stamp, data of `least` bytes or more), or None where it is no frame."""
    if not HEAD + least <= len(payload) <= FRAME_MAX \
            or not hmac.compare_digest(keyed(key, label, payload[TAG:], TAG), payload[:TAG]):
        return None
    plain = mask(key, label, payload[TAG:TAG + NONCE], payload[TAG + NONCE:])
    return int.from_bytes(plain[:STAMP], "big"), plain[STAMP:]

def split(packet, link):
    """Anybody's bytes, an IP packet (RFC 791, 8200, 9293) or not -> Packet."""
    packet = packet.ljust(LEAST)  # header reads end within; what links pad is shorter: no frame
    if packet[0] >> 4 == 4:
        at, protocol, addresses = (packet[0] & 15) * 4, packet[9], packet[12:20]
    else:
        at, protocol, addresses = 40, packet[6], packet[8:40]
    half, udp = len(addresses) // 2, protocol == socket.IPPROTO_UDP
    start = at + (8 if udp else (packet[at + 12] >> 4) * 4)
    return Packet(addresses[:half], addresses[half:], *struct.unpack_from(">HH", packet, at),
                  b"" if udp else packet[at:at + 20], packet[start:], link)

def craft(own, to, own_port, port, payload, flags="", seq=0, ack=0):
    """An IP packet's bytes, as Linux makes it where net.ipv4.tcp_timestamps is 0: a datagram or,
    with flags, a SYN, SYN-ACK (these: a random seq) or ACK. Addresses are text."""
    from scapy.layers import inet, inet6  # never scapy.all; 0.1 s, which other transports save
    six, nop = ":" in to, ("NOP", None)
    upper = inet.TCP(flags=flags, seq=seq, ack=ack, window=501) if flags else inet.UDP()
    if "S" in flags:
        upper.seq, upper.window = secrets.randbits(32), 64800 if six else 64240
        upper.options = [("MSS", 1440 if six else 1460), nop, nop, ("SAckOK", b""), nop,
                         ("WScale", 7)]
    if flags == "S":  # with a Fast Open cookie, SYN data looks usual
        upper.options += [("TFO", (secrets.randbits(32), secrets.randbits(32))), nop, nop]
    upper.sport, upper.dport = own_port, port
    if six:
        return bytes(inet6.IPv6(src=own, dst=to, fl=secrets.randbits(20)) / upper / payload)
    ip_id = 0 if flags in ("", "SA") else secrets.randbits(16)  # 0: of no connected socket
    return bytes(inet.IP(src=own, dst=to, flags="DF", id=ip_id) / upper / payload)

def respond(packet, payload):
    """The bytes that answer a Packet: a datagram to a datagram, a SYN-ACK to a SYN, else an ACK."""
    own, to = (str(ipaddress.ip_address(address)) for address in (packet.own, packet.sender))
    where = own, to, packet.own_port, packet.port, payload
    if not packet.tcp:
        return craft(*where)
    seq, own_seq, flags = struct.unpack_from(">4xIIxB", packet.tcp)
    ack = (seq + (flags >> 1 & 1) + len(packet.payload)) % 2**32  # a SYN counts as 1
    return craft(*where, "SA" if (flags & 0x12) == 0x02 else "PA", own_seq, ack)

# ---- client: a request in, one line and an exit code out; as an ordinary user --------------------
WAIT, BACKOFF, LONGEST = 0.3, 1.3, 1.2  # seconds to the first repeat, factor to the next, longest

# A transport sends each frame of a knock to its target, and returns the socket that is answered.
def kernel(family, _own, targets, frames):
    """An ordinary socket's SYN carries it: Linux's TCP Fast Open (RFC 7413) without a cookie."""
    for target, payload in zip(targets, frames):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends by RST
        sock.setsockopt(socket.IPPROTO_TCP, 34, 1)  # TCP_FASTOPEN_NO_COOKIE in linux/tcp.h
        sock.sendto(payload, socket.MSG_FASTOPEN, target)
    return sock  # the last: without a reference, the others are closed; their SYN is out

def udp(family, _own, targets, frames):
    """The frames as datagrams of one ordinary UDP socket: nothing in it is Linux's own."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    for target, payload in zip(targets, frames):
        sock.sendto(payload, target)
    sock.connect(target)  # only the last port answers
    return sock

class Crafted:
    """Every packet made with scapy (CAP_NET_RAW); it has what is used here of a socket. The
    kernel, which knows nothing of the connection, answers the SYN-ACK with RST: that is ignored."""

    def __init__(self, family, own, targets, frames):
        try:
            self.raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))  # all
        except PermissionError:
            raise Fault(SYSTEM, "crafted packets need root or CAP_NET_RAW: sudo, or no --transport")
        self.raw.connect(targets[0])
        self.fileno, own_port = self.wire.fileno, 32768 + secrets.randbelow(28000)
        for target, payload in zip(targets, frames):
            self.raw.send(craft(own, target[0], own_port, target[1], payload, "S"))

    def recv(self, size):
        self.packet = split(self.wire.recv(size), None)
        return self.packet.payload or b"-"  # b"" would say that the connection is over

    def send(self, payload):  # answers what recv returned last
        self.raw.send(respond(self.packet, payload))

TRANSPORTS = {"kernel": kernel, "udp": udp, "crafted": Crafted}

def find_route(host, family, ports):
    """(family, own address, targets) of a host's first address (RFC 6724). Raises Fault."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)[0]
        targets = [(where[0], port, *where[2:]) for port in ports]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(targets[0])  # sends nothing: it looks up the route
            return family, probe.getsockname()[0].partition("%")[0], targets
    except OSError as error:
        raise Fault(NO_ANSWER, f"{host}: {error}: another name, -4 or -6?")

def payloads(sockets, end):
    """Yield (socket, payload) until the end. Of `sockets`, a dict's keys, goes what is over."""
    while (left := end - monotonic()) > 0:
        for sock in select.select(sockets, [], [], left)[0]:
            with suppress(OSError):  # what the network says without the key is not to be believed
                if payload := sock.recv(2048):
                    yield sock, payload
                else:
                    del sockets[sock]

def converse(host, transports, route, key, k, sealed, seconds, step):
    """The client's side, which drives the exchange through losses: it repeats the knock, by each
    transport in turn, until the result is there -> (done, status, text)."""
    knock_id, reply_key = keyed(k, b"id", b"", ID), keyed(k, b"reply", sealed, 32)
    _, own, targets = route
    count = len(targets)
    size = -(-len(sealed) // count)
    public = ipaddress.ip_address(own).is_global  # else NAT may show another
    wait, trouble, challenged, end = WAIT, "", False, monotonic() + seconds
    sockets = {}  # and by which transport each came
    while monotonic() < end:
        transport, *others = transports
        transports = [*others, transport]
        step(f"{count} fragments go by {transport}")
        frames = [frame(key, b"knock", bytes([i]) + knock_id + sealed[i * size:][:size])
                  for i in range(count)]
        try:
            sockets[TRANSPORTS[transport](*route, frames)] = transport
        except (OSError, AttributeError) as error:  # the latter where there is no Fast Open
            trouble = f" ({error})"
        if len(sockets) > 4:  # close the oldest: three SYN time-outs, and Linux stops Fast Open
            del sockets[next(iter(sockets))]
        again = min(end, monotonic() + wait * secrets.SystemRandom().uniform(0.75, 1.25))
        wait = min(wait * BACKOFF, LONGEST)
        for sock, payload in payloads(sockets, again):
            if result := unframe(reply_key, b"result", payload, 2):
                _, (done, status, *text) = result
                return done, status, bytes(text)
            if challenge := unframe(reply_key, b"challenge", payload, 34):
                c, patience = struct.unpack_from(">32sH", challenge[1])
                seen = challenge[1][34:].decode(errors="replace")
                if public and seen != own:
                    raise Fault(RELAYED, f"the server sees {seen}, this machine is {own}: nothing "
                                         "was opened; a relay, or NAT: try -4, -6, another network")
                if not challenged:
                    step(f"the server has unsealed the request, and sees {seen}")
                    challenged, end = True, monotonic() + seconds + min(999, patience)
                transports = [sockets[sock]]  # the way that works
                proof = knock_id + keyed(reply_key, b"answer", c, 32)
                with suppress(OSError):
                    sock.send(frame(key, b"knock", bytes([count]) + proof))
    if challenged:
        raise Fault(NO_ANSWER, f"{host} sent no result, but may have acted: look, then knock again")
    raise Fault(NO_ANSWER, f"no answer from {host} in {seconds} s: wrong ports, secret, clock or "
                           f"key, no server, or a firewall{trouble}: try another --transport")

def cmd_knock(options):
    """Knock at options.host, print what was done. Returns the exit code."""
    sections = options.host, "client"
    step = log if options.verbose else str  # str: to say nothing
    command = command_of([options.action, *options.words])
    config = Config(options.config)
    server, user = config.get("server_key", sections), options.user or config.get("user", sections)
    ports = parse("secret_ports", options.ports) if options.ports \
        else config.get("secret_ports", sections)
    key = shared_key(config.get("secret", sections), ports)
    home = options.gpg_dir or config.get("client_gpg_dir", sections)
    images = options.img_dir or config.get("img_dir", sections, "")
    route = find_route(config.get("host", sections, options.host), options.family, ports)
    k = os.urandom(32)
    request = json.dumps({"to": server, "k": k.hex(), "cmd": command})
    sealed = seal(home, hide(cover(images), request.encode()), user, server)
    if len(sealed) > len(ports) * (FRAME_MAX - HEAD - 1 - ID):
        raise Fault(CONFIG, f"{len(sealed)} bytes do not fit: use more secret_ports, smaller keys")
    step(f"request hidden in a PNG and sealed for {server}: {len(sealed)} bytes")
    done, status, text = converse(options.host, options.transport, route, key, k, sealed,
                                  options.timeout, step)
    if not done:
        raise Fault(status or REFUSED, f"{options.host} says: {text.decode(errors='replace')}")
    if command[0] != "E":  # whose output is passed on as it is, as by ssh
        words = printable(text.decode(errors="replace"))  # opened tcp/22 for ADDRESS until...
        text = words.replace(" for ", f" on {options.host} for ", 1).encode() + b"\n"
    os.write(1, text)
    return status

# ---- listener: packets in, requests out; unprivileged, the only reader of the wire ---------------
CLOCK_SKEW = 60_000  # milliseconds that a client's clock may differ
SEEN_MAX = 65_536  # nonces and ids remembered: a frame is good for two minutes, so 500 a second
KNOCKS_MAX = 256  # incomplete knocks kept (then the oldest goes); and as many complete ones
UNANSWERED_MAX = 16  # knocks of one address (IPv6: /64) that nobody has answered for
ANSWER_TIME, REPEAT_TIME = 30, 10  # seconds from challenge to answer; in which a result is repeated
MESSAGE_MAX = 8192  # bytes of a message between listener and monitor
GPG_SLOTS = threading.Semaphore(4)  # runs of gpg at once

class Knock:
    """From first fragment to last result. packet: to answer; source: its address, till answered."""

    def __init__(self):
        self.pieces, self.packet, self.source = {}, None, None
        self.frames, self.result = queue.Queue(4), queue.Queue()

class Listener:
    """Gate and reassembly in one thread, and a thread a knock for the dialogue. Bounded memory."""

    def __init__(self, sock, channel, settings):
        self.sock, self.channel, self.settings = sock, channel, settings  # Monitor's
        self.key, self.ports = bytes.fromhex(settings["key"]), settings["ports"]
        self.last, self.began = len(self.ports) - 1, time.time() * 1000
        self.seen, self.partial, self.knocks = OrderedDict(), OrderedDict(), {}

    # == bytes that anybody may have sent: in `split`, `unframe`, `keyed`, and from here ==
    def receive(self):
        while True:
            if passed := self.gate(*self.sock.recvfrom(2048)):
                self.collect(*passed)

    def gate(self, data, link):
        """An authentic frame of now, new, at its own port -> (position, id, piece, Packet); else
        None, and nothing is kept. Position: a fragment's, or above last: an answer."""
        packet = split(data, link)
        if not (opened := unframe(self.key, b"knock", packet.payload, 1 + ID)):
            return None
        # == to here. Who sent it has the secret; who it is, gpg will say. ==
        (sent, data), now, nonce = opened, time.time() * 1000, packet.payload[TAG:TAG + NONCE]
        if abs(now - sent) > CLOCK_SKEW or sent <= self.began <= now or nonce in self.seen \
                or packet.own_port != self.ports[min(data[0], self.last)]:
            return None  # sent before it began: perhaps a replay (a clock set back: no telling)
        self.remember(nonce)
        return data[0], data[1:1 + ID], data[1 + ID:], packet

    def remember(self, token):
        self.seen[token] = None
        if len(self.seen) > SEEN_MAX:
            self.seen.popitem(last=False)

    def collect(self, position, knock_id, piece, packet):
        """A frame to its knock, whose address is where its last fragment first came from."""
        if knock := self.knocks.get(knock_id):
            if position >= self.last and packet.sender == knock.packet.sender:
                knock.packet = packet  # a repeat or the answer: replies go to the newest
                with suppress(queue.Full):  # never waits: its client repeats itself
                    knock.frames.put_nowait(piece)
        elif position <= self.last and knock_id not in self.seen:  # nor ended: see `serve`
            knock = self.partial.setdefault(knock_id, Knock())
            if len(self.partial) > KNOCKS_MAX:
                self.partial.popitem(last=False)
            knock.pieces.setdefault(position, piece)
            if position == self.last:
                knock.packet = knock.packet or packet
            if len(knock.pieces) == len(self.ports):
                del self.partial[knock_id]
                knock.source = knock.packet.sender[:8]  # IPv4, or IPv6's /64
                sources = [other.source for other in list(self.knocks.values())]
                # One beyond the limits is dropped: its repeat asks again.
                if len(sources) < KNOCKS_MAX and sources.count(knock.source) < UNANSWERED_MAX:
                    self.knocks[knock_id] = knock
                    threading.Thread(target=self.serve, args=(knock_id, knock), daemon=True).start()

    def serve(self, knock_id, knock):
        address = str(ipaddress.ip_address(knock.packet.sender))
        try:
            self.dialogue(knock_id, knock, address)
        except queue.Empty:
            pass  # its time is over
        except Exception as error:  # whatever becomes of one knock, the next is served
            self.say(f"{address}: knock refused: {explained(error)[1]}")
        self.remember(knock_id)  # before it goes: its repeats shall start no gpg
        del self.knocks[knock_id]

    def dialogue(self, knock_id, knock, address):
        """The server's side of the exchange. Raises Fault, or queue.Empty when its time is over."""
        sealed = b"".join(piece for _, piece in sorted(knock.pieces.items()))
        own = self.settings["own"]
        with GPG_SLOTS:
            signer, png = unseal(self.settings["home"], sealed, own)
        try:
            request = json.loads(reveal(png))
            k, command = bytes.fromhex(request["k"]), command_of(request["cmd"])
            if request["to"] != own or keyed(k, b"id", b"", ID) != knock_id:
                raise ValueError
        except Exception:  # whatever else was signed: Pillow has many for bad files
            raise Fault(BAD_DATA, f"{signer} signed no request, or for another server or knock")
        reply_key, c = keyed(k, b"reply", sealed, 32), os.urandom(32)
        patience = self.settings["patience"]
        challenge = c + patience.to_bytes(2, "big") + address.encode()
        answer, end = keyed(reply_key, b"answer", c, 32), monotonic() + ANSWER_TIME
        piece = b""
        while not hmac.compare_digest(piece, answer):  # the knock, and its repeats
            self.reply(knock.packet, frame(reply_key, b"challenge", challenge))
            piece = knock.frames.get(timeout=max(0, end - monotonic()))
        knock.source = None
        self.say([knock_id.hex(), signer, command, knock.packet.sender.hex()])
        result = knock.result.get(timeout=patience + ANSWER_TIME)  # here a margin
        end = monotonic() + REPEAT_TIME
        while True:
            self.reply(knock.packet, frame(reply_key, b"result", result))
            knock.frames.get(timeout=max(0, end - monotonic()))

    def reply(self, packet, payload):
        """To where a packet came from, by the interface and link address that it came by."""
        with suppress(OSError):  # an interface that is gone: the client repeats itself
            self.sock.sendto(respond(packet, payload), packet.link)

    def say(self, message):  # text for the log, or a request: [knock id, signer, command, sender]
        self.channel.send(json.dumps(message).encode())

    def take_results(self):
        """id | done, status, text from the monitor, each to the thread that waits."""
        while message := self.channel.recv(MESSAGE_MAX):
            if knock := self.knocks.get(message[:ID]):
                knock.result.put(message[ID:])

def check_unprivileged():
    """Raises Fault where root's ids, groups, capabilities are left (proc(5)); drops its keyring."""
    with open("/proc/self/status", encoding="ascii") as file:
        status = file.read()
    if re.search(r"(?m)^([UG]id:.*\b0\b|Groups:.*\d|Cap...:\s*0*[1-9a-f]|NoNewPrivs:\s*0)", status):
        raise Fault(CONFIG, "server_gpg_dir needs an unprivileged owner: chown -R tariq: it")
    ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: a gpg that was taken over cannot look in here
    with suppress(OSError):  # exec leaves a process the keys of root's session: join a new one
        ctypes.CDLL("libkeyutils.so.1").keyctl_join_session_keyring(None)

def cmd_listener(descriptors):
    """What the monitor starts, with its packet socket and its end of the channel."""
    sock, channel = (socket.socket(fileno=int(number)) for number in descriptors)
    listener = Listener(sock, channel, json.loads(channel.recv(MESSAGE_MAX)))
    try:
        check_unprivileged()
        import PIL.PngImagePlugin, scapy.layers.inet6  # now, so that no knock waits for them
        # Is the key there? This also starts gpg-agent.
        gpg(listener.settings["home"], "--list-secret-keys", listener.settings["own"])
        threading.Thread(target=listener.take_results, daemon=True).start()
        listener.say(f"listening for knocks on {len(listener.ports)} ports")
        listener.receive()
    except Exception as error:  # its stderr is /dev/null: the monitor says it
        listener.say(explained(error)[1])  # and sees the channel close

# ---- monitor: requests in, rules and commands out. RUNS AS ROOT, as init and enroll do -----------
# BPF (linux/bpf_common.h, filter.h) in hexadecimal: operation, two jumps, value. It passes what may
# be a frame (LEAST, MOST), to this host's link address (so not sent by it), without a VLAN tag
# (the VLAN's interface delivers it again). A test of each port follows it.
FRAMES_ONLY = f"""\
    20 0 0 fffff004  load the packet's type
    15 0 6 0         PACKET_HOST? else *
    20 0 0 fffff02c  load the VLAN's tag
    54 0 0 fff       its number
    15 0 3 0         none? else *
    80 0 0 0         load the length
    25 1 0 {MOST:x}       over MOST? then *
    35 1 0 {LEAST:x}        LEAST or more? then over *
    06 0 0 0         * nothing of this packet
    30 0 0 0         load the IP header's first byte (no link header: SOCK_DGRAM)
    35 3 0 60        IPv6? then to the last line
    b1 0 0 0         IPv4: the header's length
    48 0 0 2         load the port behind it
    05 0 0 1         over the last line
    28 0 0 2a        IPv6: load the port
"""
RECEIVE_BUFFER = 4 << 20  # bytes of packets that wait; the kernel doubles it: what garbage can pin
COMMANDS_MAX = 16  # at once
DOORS_MAX = 100  # of a client, from all its addresses; a request has fewer
ANY = 255  # as run's `most`: whatever the exit status
OUTPUT_ROOM = 1 << 20  # bytes that a program may print before it has to wait, until it is killed
FOREVER = 2**31 - 1  # the last second iptables' time match takes; as a door's seconds: no end
RULE = ("-A tariq -s {ip} -p {protocol} -m conntrack --ctstate NEW -m {protocol} --dport {dport} "
        "-m time --datestop {until} -j ACCEPT").split()  # below, addresses to try it with
FAMILIES = ("iptables -w 5".split(), "192.0.2.1"), ("ip6tables -w 5".split(), "2001:db8::1")

def launch(words, seconds, before=()):
    """Log and start a program, by `before`; after `seconds` timeout(1) kills it and its group."""
    log("+ " + shlex.join(words))
    process = Popen([*before, *f"timeout -k 1 -s KILL {seconds}".split(), *words], cwd="/",
                    stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True)
    with suppress(OSError):
        fcntl.fcntl(process.stdout, 1031, OUTPUT_ROOM)  # F_SETPIPE_SZ
    os.set_blocking(process.stdout.fileno(), False)  # a daemon it leaves may hold the pipe open
    return process

def finished(process):
    """Wait for a process -> (exit status, its words); a signal's number as in a shell."""
    status = process.wait()
    with process.stdout as pipe:
        return status if status >= 0 else 128 - status, pipe.read(OUTPUT_ROOM) or b""

def run(*words, most=0):
    """Run a program, for 15 s at most -> (exit status up to `most`, its words). Raises Fault."""
    status, output = finished(launch(words, 15))
    text = output.decode(errors="replace")
    if status > most:
        raise Fault(SYSTEM, f"{words[0]}: {text.strip()[:300]} ({status})")
    return status, text

def permitted(patterns, command):
    """Whether patterns of `may` permit a command, both from `command_of`. O, C: it has all ports.
    E: one fits word by word, where * is any word; as the last one any number of them, or none."""
    if command[0] != "E":
        allowed = {port for action, *ports in patterns if action == command[0] for port in ports}
        return allowed.issuperset(command[1:])
    for pattern in patterns:
        if pattern[-1] == "*":
            pattern = pattern[:-1] + ["*"] * (len(command) - len(pattern) + 1)
        if len(pattern) == len(command) \
                and all(want in ("*", word) for want, word in zip(pattern, command)):
            return True
    return False

class Monitor:
    """Policy, doors and commands, and the listener's parent."""

    def __init__(self, config):
        self.path = config.path
        self.doors = {}  # (address, port): its end, the words that close it, whose it is
        self.families, self.words = FAMILIES, {}  # protocol: words that open, words that close
        self.chain = config.get("iptables_chain", default="tariq")
        for protocol in ("tcp", "udp"):
            rule = config.get(f"open_{protocol}_port", default=RULE)[2:]  # without its -A chain
            self.words[protocol] = [["{iptables}", "-w", "5", action, self.chain, *rule]
                                    for action in ("-A", "-D")]  # {iptables}: by `door_words`
        if opening := config.get("open_command", default=[]):
            self.families = ()  # none: no chain and no iptables of ours
            self.words = dict.fromkeys(self.words, [opening, config.get("close_command")])
        ports = config.get("secret_ports")
        self.settings = {"ports": ports, "key": shared_key(config.get("secret"), ports).hex(),
                         "home": config.get("server_gpg_dir"), "own": config.get("server_key"),
                         "patience": config.get("command_timeout", default=30)}

    def link_chain(self, program):
        """Let INPUT lead to the chain: at start, and where a flush or a reload took that away."""
        if run(*program, "-C", "INPUT", "-j", self.chain, most=ANY)[0]:
            run(*program, "-N", self.chain, most=ANY)  # it may be there
            run(*program, "-I", "INPUT", "-j", self.chain)  # first: before what drops

    def door_words(self, ip, port, user="", seconds=0, until=0):
        """The words that open a door, and those that close it."""
        number, protocol = port.split("/")
        until = time.gmtime(min(FOREVER, until))
        fields = {"ip": ip, "dport": number, "protocol": protocol, "user": user,
                  "until": time.strftime("%Y-%m-%dT%H:%M:%S", until),
                  "seconds": str(min(seconds, 99_999_999)),  # nft takes no more
                  "version": "6" if ":" in ip else "4", "iptables": FAMILIES[":" in ip][0][0]}
        return [[re.sub(r"\{(\w+)\}", lambda it: fields.get(it[1], it[0]), word) for word in words]
                for words in self.words[protocol]]

    def prepare(self):
        """Link the chain, try the rules in it, empty it; warn where INPUT does not drop."""
        for program, ip in self.families:
            self.link_chain(program)
            for port in ("9/tcp", "9/udp"):  # twice each: a lock that is held is no refusal
                if all(run(*self.door_words(ip, port)[0], most=ANY)[0] for _ in range(2)):
                    log(f"{program[0]} refuses the rule (no xt_time?): all without -m time")
                    for words in self.words["tcp"] + self.words["udp"]:
                        if words[-6:-2] == RULE[-6:-2]:
                            del words[-6:-2]  # -m time --datestop {until}
                    run(*self.door_words(ip, port)[0])
            run(*program, "-F", self.chain)
            rules = run(*program, "-S", "INPUT")[1].splitlines()
            if "-P INPUT DROP" not in rules and rules[-1] != "-A INPUT -j DROP":
                log(f"{program[0]}: INPUT does not drop: nothing is hidden: see README, step 3")
        if not all(re.search("{(until|seconds)}", str(words[0])) for words in self.words.values()):
            log("this server ends doors, not the kernel: kill -9 leaves them open")

    def close(self, ip, port, user=""):
        """Close a door, known or (by close_command) of an earlier server. On a Fault it stays in
        self.doors. No Fault: the rule is gone (1), or a close_command ran to its end (123 at most:
        timeout(1)) and failed, as nft's does once the element has expired."""
        _, closing, *_ = self.doors.get((ip, port)) or self.door_words(ip, port, user)
        status, text = run(*closing, most=1 if self.families else 123)
        if status:
            log(f"{closing[0]}: {text.strip()[:300]} ({status})")
        self.doors.pop((ip, port), None)

    def stop(self):
        """At the end, whatever it is: no door. By pdeathsig, listener and commands end too."""
        flushing = [(*program, "-F", self.chain) for program, _ in self.families]
        for words in flushing or [closing for _, closing, _ in self.doors.values()]:
            try:
                run(*words)
            except Exception as error:  # whatever it is, the others follow
                log(f"{explained(error)[1]}: doors may be open: {shlex.join(words)}")

    def handle(self, data):
        """One message. The listener's word counts for who signed, where; not for what they may."""
        try:
            message = json.loads(data)
            if isinstance(message, str):
                return log(f"listener: {message[:1000]}")
            knock_id, signer, command, sender = message
            knock_id, ip = bytes.fromhex(knock_id), str(ipaddress.ip_address(bytes.fromhex(sender)))
            user, command = parse("key", signer), command_of(command)  # by fingerprint; named below
        except Exception:  # whatever it is
            return log("a malformed message: the listener may be taken over: stop it, look")
        event = f"{ip} {shlex.join(command)}"
        try:
            config = Config(self.path, root=True)  # afresh: an edit of [allow] holds from now on
            section = config.clients().get(user, "")  # "", no section: may nothing
            user = section.removeprefix("allow ") or user
            if not permitted(config.get("may", [section], []), command):
                raise Fault(REFUSED, f"refused: the server's config does not allow it to {user}")
            if command[0] == "E":
                return self.execute(knock_id, f"{user} {event}", command[1:])
            seconds = config.get("open_timeout", [section, "server"], 3600) or FOREVER
            status, text = 0, self.move_doors(command, ip, user, seconds)
        except Exception as error:  # whatever becomes of one request, doors are watched
            status, text = explained(error)
        self.finish(knock_id, f"{user} {event}: {text}", not status, status, text.encode())

    def move_doors(self, command, ip, user, seconds):
        """O or C -> what was done, in words. Raises Fault."""
        action, *ports = command
        until = time.time() + seconds  # of the wall clock; self.doors has the monotonic one's
        if action == "O" and self.families:
            self.link_chain(FAMILIES[":" in ip][0])
        for port in ports:
            if action == "C" or (ip, port) in self.doors:  # opened again, it has a new end
                self.close(ip, port, user)
            if action == "O":
                his = [door for door, (_, _, owner) in self.doors.items() if owner == user]
                if len(his) >= DOORS_MAX:
                    self.close(*his[0])  # the oldest
                opening, closing = self.door_words(ip, port, user, seconds, until)
                self.doors[ip, port] = monotonic() + seconds, closing, user  # may open, then fail
                run(*opening)
        names = re.sub(r"(\d+)/(\w+)", r"\2/\1", ", ".join(ports))
        if action == "C":
            return f"closed {names} for {ip}"
        stamp = time.strftime("%Y-%m-%d " * (seconds >= 86400) + "%H:%M:%SZ", time.gmtime(until))
        return f"opened {names} for {ip} until {'closed' if seconds == FOREVER else stamp}"

    def execute(self, knock_id, event, words):
        """Start a permitted command, which ends with this server (but in a session of its own)."""
        if threading.active_count() > COMMANDS_MAX:  # one a command, and the main one
            raise Fault(REFUSED, f"refused: {COMMANDS_MAX} commands run: knock again")
        process = launch(words, self.settings["patience"], "setpriv --pdeathsig TERM".split())
        def wait():
            status, output = finished(process)
            self.finish(knock_id, f"{event}: exit status {status}", True, status, output)
        threading.Thread(target=wait, daemon=True).start()

    def finish(self, knock_id, event, done, status, text):
        """Log one event (who, from where, what, verdict), and give the listener the result."""
        log(event)
        with suppress(OSError):  # a listener that does not read must not stop the monitor
            self.channel.send(knock_id + bytes([done, status]) + text[:TEXT_MAX],
                              socket.MSG_DONTWAIT)

    def start_listener(self):
        """The listener: this file on stdin (only root need read it), two sockets, a user's ids."""
        listing = FRAMES_ONLY
        for port in self.settings["ports"]:
            listing += f"15 0 1 {port:x}\n06 0 0 {MOST:x}\n"  # is it this one? All of the packet
        steps = [[int(word, 16) for word in line.split()[:4]]
                 for line in f"{listing}06 0 0 0".splitlines()]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        program = struct.pack("HP", len(steps), ctypes.addressof(code))
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)  # of no protocol yet
        for option, value in ((26, program), (44, 1), (33, RECEIVE_BUFFER)):
            packets.setsockopt(socket.SOL_SOCKET, option, value)  # ATTACH, LOCK_FILTER, RCVBUFFORCE
        every = struct.pack("HHi12x", socket.AF_PACKET, socket.htons(3), 0)  # ETH_P_ALL; 0: all
        ctypes.CDLL(None).bind(packets.fileno(), every, len(every))  # packets come, filtered
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.send(json.dumps(self.settings).encode())  # waits in the channel
        descriptors = packets.fileno(), theirs.fileno()
        with packets, theirs, open(__file__, "rb") as source:
            Popen([*as_owner(self.settings["home"]), sys.executable, "-I", "-", "listener",
                   *map(str, descriptors)], stdin=source, stdout=DEVNULL, stderr=DEVNULL, cwd="/",
                  env={"HOME": "/"}, pass_fds=descriptors, start_new_session=True)

    def serve(self, signals):
        """Until a signal ends it. It sleeps until there is a message, a signal, or a door's end."""
        while True:
            end = min((end for end, *_ in self.doors.values()), default=FOREVER)
            ready = select.select([self.channel, signals], [], [], max(0, end - monotonic()))[0]
            if signals in ready:
                return
            for door, (end, *rest) in list(self.doors.items()):
                try:
                    if end <= monotonic():
                        self.close(*door)
                except Exception as error:
                    log(f"{' '.join(door)} is not closed: {explained(error)[1]}: trying again")
                    self.doors[door] = monotonic() + 1, *rest
            if self.channel in ready:
                message = b""
                with suppress(ConnectionError):
                    message = self.channel.recv(MESSAGE_MAX)
                if not message:
                    raise Fault(DIED, "the listener died, doors closed: its last line says why, "
                                      "else setpriv needs CAP_SETUID, CAP_SETGID, CAP_SETPCAP")
                self.handle(message)

def need_root():
    if os.geteuid():
        raise Fault(SYSTEM, "this needs root: sudo")
    os.environ.clear()  # no program that root starts gets the caller's environment
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

def cmd_server(options):
    """Serve until SIGTERM, SIGINT or SIGHUP; iptables has no door before or after."""
    need_root()
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # its number goes to the pipe that `serve` reads
    monitor = Monitor(Config(options.config, root=True))
    namespace = os.stat("/proc/self/ns/net").st_ino  # a chain belongs to a network namespace
    lock = os.open(f"/run/tariq-{monitor.chain}-{namespace}.lock", os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
    except BlockingIOError:
        raise Fault(SYSTEM, f"a server with chain {monitor.chain} runs already: stop it first")
    try:
        monitor.prepare()
        monitor.start_listener()
        monitor.serve(signals)
    finally:
        monitor.stop()

# ---- set-up: once, by hand; init, enroll as root, keygen, join as the user; gpg as keyrings' owner
PROFILE = "secret_ports", "secret", "server_key"  # of a server's config, which its clients need

def locked_directory(path):
    """Make a config's directory, lock it until this process ends, set the umask, return it."""
    directory = os.path.dirname(path)
    os.makedirs(directory, 0o711, exist_ok=True)  # a keyring's owner passes through
    os.umask(0o077)  # what comes into it is private
    fcntl.flock(os.open(directory, os.O_RDONLY), fcntl.LOCK_EX)
    return directory

def write_private(path, text):
    """Write a config, whole or not at all: the server may read it at any moment."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    log(f"wrote {path}")

def make_key(home, user):
    """Make a key without passphrase, Ed25519 and Curve25519. Returns its fingerprint."""
    _, words = gpg(home, "--yes", "--pinentry-mode", "loopback", "--passphrase", "",
                   "--quick-generate-key", user, "future-default", "default", "never")
    return re.search(r"KEY_CREATED \S+ (\w{40})", words)[1]

def show_key(home, text):
    """(fingerprint, user id) of the one public key in a text; nothing is imported. Raises Fault."""
    listing = b""
    with suppress(Fault):  # gpg's words on what is no key say less
        listing, _ = gpg(home, *SILENT, "--with-colons", "--show-keys", data=text, seconds=9)
    listing = listing.decode(errors="replace")
    keys = re.findall(r"(?m)^(pub|sec):.*\nfpr:+(\w{40})", listing)  # GnuPG doc/DETAILS
    users = re.findall(r"(?m)^uid:(?:[^:]*:){8}([^:]*)", listing)
    if [kind for kind, _ in keys] != ["pub"] or not users:
        raise Fault(BAD_DATA, "needs one public key on stdin, which tariq.py keygen prints")
    return keys[0][1], users[0]

def cmd_init(options):
    """Make a server's user, keyring, key and config. A config that is there stays as it is."""
    need_root()
    home = locked_directory(options.config) + "/.server-gpg"
    if os.path.exists(options.config):
        return log(f"{options.config} is there already: nothing changed")
    if run("id", "tariq", most=ANY)[0]:
        run("useradd", "--system", "--home-dir", home, "--shell", "/usr/sbin/nologin", "tariq")
    owner = pwd.getpwnam("tariq")
    if not 0 < owner.pw_uid < 1000:
        raise Fault(SYSTEM, "the account tariq is a person's: see README, By hand, for another")
    os.makedirs(home, exist_ok=True)
    os.chown(home, owner.pw_uid, owner.pw_gid)
    key = make_key(home, f"tariq@{socket.gethostname()}")
    run(*as_owner(home), "gpgconf", "--homedir", home, "--kill", "all")  # not outside the service
    ports = ",".join(map(str, secrets.SystemRandom().sample(range(1024, 32768), 5)))
    secret = base64.b64encode(os.urandom(32)).decode()
    write_private(options.config,
                  f"[server]\nsecret_ports = {ports}\nsecret = {secret}\n"
                  f"server_gpg_dir = {home}\nserver_key = {key}\n")

def cmd_keygen(options):
    """Make a client's config, keyring and key where missing; print the public key."""
    directory, path = locked_directory(options.config), options.config
    if not os.path.exists(path):
        write_private(path, f"[client]\nuser = {options.user}\nclient_gpg_dir = {directory}/gpg\n")
    home = os.path.expanduser(Config(path).get("client_gpg_dir", ["client"]))
    os.makedirs(home, exist_ok=True)
    try:
        listing, _ = gpg(home, "--with-colons", "--list-secret-keys", exactly(options.user))
        key = re.search(rb"(?m)^fpr:+(\w{40})", listing)[1].decode()
    except Fault:  # there is none, or gpg fails: then again
        key = make_key(home, options.user)
    log(f"the key of {options.user} is {key} (knocks use that of `user` in {path})")
    os.write(1, gpg(home, "--armor", "--export", key)[0])

def cmd_enroll(options):
    """Allow the client whose public key is on stdin; print the profile that `join` reads."""
    need_root()
    allow = "\n".join(" ".join(words) for words in options.allow or [["O 22"]])  # by ssh, words
    lines = [shlex.join(words) for words in patterns_of(allow)]
    if "#" in allow:
        raise Fault(USAGE, "--allow needs words without #: in a config that begins a comment")
    text = sys.stdin.buffer.read(INPUT_MAX)  # before the lock: keygen at its other end may hold it
    locked_directory(options.config)
    config = Config(options.config, root=True)
    home = config.get("server_gpg_dir")
    as_owner(home)  # raises Fault where it is root's
    profile = {item: config.get(item) and config.ini["server"][item] for item in PROFILE}  # as text
    (key, user), clients = show_key(home, text), config.clients()
    name = options.name or re.sub(r".*<(.+)>$", r"\1", user)
    if key in clients:
        log(f"{config.path}: {key} is in [{clients[key]}] already: nothing changed (edit its may)")
    elif not re.fullmatch(r"(?a)\w[\w.@+-]*", name) or config.ini.has_section(f"allow {name}"):
        raise Fault(BAD_DATA, f"{name} is another client's name, or cannot be one: give --name")
    else:
        gpg(home, "--import", data=text)
        may = "".join(f"\n    {line}" for line in lines)
        section = f"[allow {name}]\nkey = {key}\nmay ={may}\n"
        write_private(config.path, f"{config.text.rstrip()}\n\n{section}")
        log(f"{name} ({key}) may {'; '.join(lines)}")
    profile["public_key"] = gpg(home, "--armor", "--export", profile["server_key"])[0].decode()
    os.write(1, json.dumps(profile).encode() + b"\n")

def cmd_join(options):
    """Take the server's profile on stdin into the client's keyring and config."""
    parse("host", options.host)
    try:
        profile = json.loads(sys.stdin.buffer.read(INPUT_MAX))
        key, given = profile["public_key"].encode(), {name: profile[name] for name in PROFILE}
        for name, value in given.items():
            parse(name, value)
    except Exception:  # whatever it is
        raise Fault(BAD_DATA, "no profile on stdin, which tariq.py enroll prints: did that fail?")
    locked_directory(options.config)
    config = Config(options.config)
    home = config.get("client_gpg_dir", ["client"])
    if show_key(home, key)[0] != given["server_key"].upper():
        raise Fault(BAD_DATA, "the profile's key is not its server_key: enroll again")
    if not config.ini.has_section(options.host):
        settings = "".join(f"{name} = {value}\n" for name, value in given.items())
        write_private(config.path, f"{config.text.rstrip()}\n\n[{options.host}]\n{settings}")
    elif not given.items() <= config.ini[options.host].items():
        raise Fault(BAD_DATA, f"{config.path}: [{options.host}] has other values: cut, then join")
    gpg(home, "--import", data=key)
    log(f"{config.path}: [{options.host}] is known by its key {given['server_key']}")

# ---- command line --------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(USAGE, f"{message} (tariq.py --help)")

def command_line():
    """The parser; each subcommand's function is its `function`."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXIT_CODES,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    def command(function, usual, text):
        sub = commands.add_parser(function.__name__[4:], help=text)
        sub.set_defaults(function=function)
        sub.add_argument("-c", "--config", default=usual, type=os.path.realpath,
                         help=f"default: {usual}")
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
    add("--transport", nargs=1, choices=TRANSPORTS, default=["kernel", "udp"], help="only this one")
    add("-v", "--verbose", action="store_true", help="show each step")
    add("host")
    add("action", help="O PORT[/tcp|/udp]..., C PORT..., or E COMMAND [ARG...]")
    add("words", nargs=argparse.REMAINDER)
    add = command(cmd_keygen, CLIENT_CONFIG, "client: make keyring and key, print the public key")
    add("user", help="an email address or the like: me@laptop")
    add = command(cmd_enroll, ROOT_CONFIG, "server: public key on stdin, profile on stdout (root)")
    add("--allow", action="append", nargs="+", help="what it may do, as in `may` (O 22)")
    add("--name", help="what the log calls it (the key's email)")
    command(cmd_join, CLIENT_CONFIG, "client: take the profile on stdin")("host")
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
    except Exception as error:  # never a traceback
        code, text = explained(error)
        log(f"tariq: {text}")
        return code

if __name__ == "__main__":
    sys.exit(main())
