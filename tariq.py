#!/usr/bin/python3 -I
"""Tariq: port knocking with hidden, signed, encrypted requests. One file, both ends. Read it before you run it.

The server's firewall drops everything and the server listens on no port: it sniffs. The exchange:

    client                                                          server
      request in the low bits of a PNG, sealed with gpg, cut in N
      SYN + frame(fragment i) -----> secret_ports[i] ----------->   authentic? new? whole? sealed by whom?
      <------- SYN-ACK + frame(sealed challenge) ----------------   {knock id, nonce, address seen}
      sealed by my server? for my knock? my address?
      ACK + frame(HMAC-SHA256(nonce, knock id)) ---------------->   this client, alive now, at this address
      <------- segment + frame(sealed result) -------------------   policy, then act, then answer

A frame is nonce(12) | tag(16) | masked data. Each has a fresh nonce, so the same bytes twice are a replay, always;
a client that repeats itself after a loss makes new frames. seal = signed by the sender, encrypted to the receiver.

Trust boundaries:
  - bytes from the wire reach `Listener.gate` and the two functions it calls, and nothing else until the tag holds;
  - the listener process (gpg, Pillow, scapy) is unprivileged: one packet socket, one socketpair, no capabilities;
  - the monitor process (root) trusts no request of the listener: what it does is in [allow] and nowhere else.

Sections, as data flows: config, OpenPGP, steganography, wire, client, listener, monitor (root), set-up, command line.
"""
import argparse, binascii, configparser, fcntl, hashlib, hmac, io, ipaddress, json, os, pwd, re, select, shlex, signal
import socket, struct, subprocess, sys, threading, time
from types import SimpleNamespace

VERSION = "1.0"
# Exit codes as in sysexits.h, away from those of most remote commands (E exits with the command's own).
USAGE, BAD_DATA, MISSING, DIED, SYSTEM, NO_ANSWER, WRONG_SERVER, REFUSED, CONFIG = 64, 65, 69, 70, 71, 75, 76, 77, 78
EXIT_CODES = """exit codes: 0 done; E: the remote command's; 64 usage; 65 unusable image, key or profile; 69 a program or
package is missing; 70 the listener died; 71 the system refused; 75 no answer; 76 not this server's key;
77 refused by the server's policy; 78 config"""
PACKAGES = {"gpg": "gnupg", "ip6tables": "iptables", "useradd": "passwd"}  # Debian's, where the name is another


class Fault(Exception):
    """What the user can mend: an exit code and the line they read. Caught in `main`, and where one knock ends."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


def missing(program):
    return Fault(MISSING, f"{program} is not installed: apt-get install {PACKAGES.get(program, program)}")


def printable(text):
    """Text without what could forge a log line or steer a terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(text))


def log(text, priority=6):
    """One line on stderr; off a terminal with a priority for journald (sd-daemon(3)): 3 error, 4 warning, 6 info."""
    prefix = time.strftime("%H:%M:%S ") if os.isatty(2) else f"<{priority}>"
    try:
        os.write(2, f"{prefix}{printable(text)}\n".encode())
    except OSError:
        pass  # a full disk behind stderr must not keep a door open


# ---- config: an INI file in, checked values out ----------------------------------------------------------------------

def ports_of(text):
    """'10000,7456,...' -> 5 to 32 unique port numbers. The errors do not quote the text: it is a secret."""
    words = [word.strip() for word in text.split(",")]
    if not 5 <= len(set(words)) == len(words) <= 32 or not all(
            re.fullmatch("[1-9][0-9]{0,4}", word) and int(word) < 65536 for word in words):
        raise ValueError("needs 5 to 32 unique port numbers, separated by commas")
    return tuple(map(int, words))


def secret_of(text):
    try:
        secret = binascii.a2b_base64(text)
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise ValueError("needs 32 random bytes in base64: head -c 32 /dev/urandom | base64")
    return secret


def fingerprint_of(text):
    if not re.fullmatch("[0-9A-Fa-f]{40}", text):
        raise ValueError("needs a fingerprint of 40 hex digits without spaces: gpg --with-colons --fingerprint")
    return text.upper()


def seconds_of(text):
    if not re.fullmatch("[0-9]{1,8}", text):
        raise ValueError("needs a whole number of seconds")
    return int(text)


def port_of(text):
    """'22', '22/tcp', '53/udp' -> '22/tcp', '22/tcp', '53/udp'."""
    match = re.fullmatch("([1-9][0-9]{0,4})(/tcp|/udp)?", text)
    if not match or int(match[1]) > 65535:
        raise ValueError(f"{printable(text)!r} is not a port: 1 to 65535, with /tcp or /udp")
    return match[1] + (match[2] or "/tcp")


def command_of(words):
    """The words of a request or of an [allow] line, checked: ['O', '22'] -> ['O', '22/tcp']. Raises ValueError."""
    if len(words) < 2 or words[0] not in ("O", "C", "E"):
        raise ValueError("a request is O PORT[/tcp|/udp]..., C PORT... or E COMMAND [ARG...]")
    if not all(word.isprintable() for word in words):
        raise ValueError("a request has printable characters only")
    return words if words[0] == "E" else [words[0], *(word if word == "*" else port_of(word) for word in words[1:])]


def rule_of(text):
    """A template of one iptables rule -> its words."""
    words = shlex.split(text)
    if words[0] != "-A" or not all(any(field in word for word in words) for field in ("{ip}", "{dport}", "{until}")):
        raise ValueError("must begin with -A and hold {ip}, {dport} and {until}: one address, one port, and an end")
    try:
        [word.format(ip="", dport="", until="") for word in words]
    except (LookupError, ValueError):
        raise ValueError("may hold no braces but {ip}, {dport} and {until}") from None
    return words


class Config:
    """One INI file with a secret in it. Raises Fault for each way it can be unusable, without quoting its text."""

    def __init__(self, path):
        usual = [os.path.expanduser("~/.config/tariq/tariq.conf"), "/etc/tariq/tariq.conf"]
        self.path = os.path.abspath(path or next(filter(os.path.exists, usual), usual[0]))
        self.ini = configparser.ConfigParser(interpolation=None, delimiters=("=",), inline_comment_prefixes=("#",))
        self.ini.optionxform = str  # the users in [allow] keep their case
        try:
            with open(self.path, encoding="utf-8") as file:
                status = os.fstat(file.fileno())
                self.ini.read_file(file)
        except (OSError, UnicodeDecodeError) as error:
            raise Fault(CONFIG, f"{self.path}: {getattr(error, 'strerror', 'not UTF-8 text')}: give a config with -c, or "
                                "make one (server: tariq.py init; client: tariq.py keygen)") from None
        except configparser.Error as error:
            line = getattr(error, "lineno", None) or error.errors[0][0]
            raise Fault(CONFIG, f"{self.path}: line {line}: {type(error).__name__}: see tariq.conf.example") from None
        if status.st_mode & 0o077 or status.st_uid not in (os.geteuid(), 0) and os.geteuid():
            raise Fault(CONFIG, f"{self.path}: others can read its secret or change it: chmod 600 {self.path}")

    def get(self, sections, key, parse=str, default=None):
        """The key's first non-empty value in the sections, parsed."""
        for section in sections:
            text = self.ini.get(section, key, fallback="").strip()
            if text:
                try:
                    return parse(text)
                except ValueError as error:
                    raise Fault(CONFIG, f"{self.path}: [{section}] {key}: {error}") from None
        if default is None:
            raise Fault(CONFIG, f"{self.path}: [{sections[0]}] {key} is missing: see tariq.conf.example")
        return default

    def allowed(self):
        """[allow] as {user: [request pattern, ...]}."""
        users = dict(self.ini.items("allow")) if self.ini.has_section("allow") else {}
        for user, lines in users.items():
            try:
                users[user] = [command_of(shlex.split(line)) for line in lines.splitlines() if line.strip()]
            except ValueError as error:
                raise Fault(CONFIG, f"{self.path}: [allow] {user}: {error}") from None
        return users


# ---- OpenPGP: bytes in, sealed bytes out, and back; as the keyring's owner -------------------------------------------

GPG = ("gpg --batch --no-tty --quiet --no-options --no-auto-check-trustdb --trust-model always "
       "--no-auto-key-locate").split()
GPG_TIME = 10  # seconds; a seal takes 10 ms, 40 ms with RSA-4096
GPG_INPUT, GPG_OUTPUT = 60_000, 1 << 20  # bytes; input stays below a pipe's 64 KiB, so that writing it never waits
PLAIN_MAX = 8192  # bytes that may come out of a seal: twice a PNG of SIDE x SIDE pixels
NO_PINENTRY = {85, 32848}  # libgpg-error: No pinentry; no terminal for it (ENOTTY)
BAD_SIGNATURE = {"BADSIG", "ERRSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "NO_PUBKEY", "DECRYPTION_FAILED"}


class Keyring:
    """A gpg home directory. Root runs gpg as the directory's owner: what is in there may command gpg-agent."""

    def __init__(self, home):
        self.home, self.passphrase, self.run_as = os.path.expanduser(home), None, {}
        self.environment = {**os.environ, "LC_ALL": "C"}
        try:
            self.uid = os.stat(self.home).st_uid
            if os.geteuid() == 0 != self.uid:
                self.run_as = {"user": self.uid, "group": pwd.getpwuid(self.uid).pw_gid, "extra_groups": []}
                self.environment = {"PATH": os.environ["PATH"], "HOME": self.home, "LC_ALL": "C"}
        except (OSError, KeyError) as error:
            raise Fault(CONFIG, f"{self.home}: {getattr(error, 'strerror', 'its owner is no user')}: "
                                "tariq.py init or keygen makes a keyring") from None

    def gpg(self, *arguments, data=b"", limit=GPG_OUTPUT):
        """Run gpg once -> (output, status lines as lists of words). Raises Fault with gpg's words. Bounded: GPG_INPUT
        bytes in, `limit` out, a pipe's capacity of status and words, GPG_TIME seconds."""
        status_end, status = os.pipe()
        passed, options = [status], ["--homedir", self.home, "--status-fd", str(status)]
        if self.passphrase is not None:
            secret, secret_end = os.pipe()
            os.write(secret_end, self.passphrase)
            os.close(secret_end)
            passed.append(secret)
            options += ["--pinentry-mode", "loopback", "--passphrase-fd", str(secret)]
        try:
            process = subprocess.Popen([*GPG, *options, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, pass_fds=passed, env=self.environment, cwd="/", **self.run_as)
        except FileNotFoundError:
            os.close(status_end)
            raise missing("gpg") from None
        finally:
            for descriptor in passed:
                os.close(descriptor)
        timer = threading.Timer(GPG_TIME, process.kill)
        timer.start()
        with process, open(status_end, "rb") as status:
            try:
                process.stdin.write(data[:GPG_INPUT])
                process.stdin.close()
            except BrokenPipeError:
                pass  # gpg ended early; its status says why
            output = process.stdout.read(limit)
            process.stdout.close()
            lines = [line.split()[1:] for line in status.read(GPG_OUTPUT).decode(errors="replace").splitlines()
                     if line.startswith("[GNUPG:] ")]
            words = process.stderr.read(GPG_OUTPUT).decode(errors="replace").strip().splitlines()
        timer.cancel()
        if process.returncode == 0:
            return output, lines
        if process.returncode < 0:
            raise Fault(SYSTEM, f"gpg was killed (signal {-process.returncode}; it has {GPG_TIME} s): is gpg-agent stuck?")
        codes = {int(line[-1]) & 0xFFFF for line in lines if line[0] == "FAILURE" and line[-1].isdigit()}
        if codes & NO_PINENTRY and self.passphrase is None:
            self.passphrase = ask_passphrase()
            return self.gpg(*arguments, data=data, limit=limit)
        raise Fault(BAD_DATA, f"{words[-1] if words else 'gpg failed'} (keyring {self.home})")

    def seal(self, data, signer, recipient):
        """Sign and encrypt (RFC 4880): binary, recipient hidden, not compressed."""
        return self.gpg("--compress-algo", "none", "--no-encrypt-to", "--local-user", signer, "--hidden-recipient",
                        recipient, "--sign", "--encrypt", data=data)[0]

    def unseal(self, sealed, own):
        """Decrypt with the key `own`, verify -> (primary fingerprint of the signature's key, at most PLAIN_MAX bytes).
        Only what gpg's status lines prove (GnuPG doc/DETAILS) is taken: one message, encrypted, one valid signature."""
        plain, lines = self.gpg("--max-output", str(PLAIN_MAX), "--try-secret-key", own, "--decrypt", data=sealed,
                                limit=PLAIN_MAX)
        said = [line[0] for line in lines]
        one = all(said.count(word) == 1 for word in ("DECRYPTION_OKAY", "PLAINTEXT", "NEWSIG", "GOODSIG", "VALIDSIG"))
        if not one or BAD_SIGNATURE.intersection(said):
            raise Fault(BAD_DATA, "not one encrypted message with one valid signature")
        return fingerprint_of(next(line[-1] for line in lines if line[0] == "VALIDSIG")), plain

    def keys(self, *command, data=b""):
        """[[fingerprint, validity, user ids]] of the keys that a gpg command lists (GnuPG doc/DETAILS, colons)."""
        keys = []
        for line in self.gpg("--with-colons", *command, data=data)[0].decode(errors="replace").splitlines():
            field = line.split(":")
            if field[0] in ("pub", "sec"):
                keys.append(["", field[1], []])
            elif field[0] == "fpr" and not keys[-1][0]:  # the first is the primary key's
                keys[-1][0] = field[9]
            elif field[0] == "uid":
                keys[-1][2].append(field[9].replace("\\x3a", ":"))
        return keys


def find_key(keys, user, where):
    """The fingerprint of the one key whose fingerprint, user id or email is exactly this. Raises Fault."""
    found = [key for key in keys if key[0] == user.upper() or any(
        user == uid or uid.endswith(f"<{user}>") for uid in key[2])]
    if len(found) != 1:
        raise Fault(CONFIG, f"{user} matches {len(found)} keys in {where}, not one: "
                            + ("name it by its fingerprint" if found else "import or make its key"))
    if found[0][1] in ("e", "r"):
        log(f"the key of {user} is {'expired' if found[0][1] == 'e' else 'revoked'}: gpg will refuse it", 4)
    return found[0][0]


def ask_passphrase():
    import getpass
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        raise Fault(SYSTEM, "your key needs its passphrase, and there is neither a pinentry nor a terminal to ask on: "
                            "install pinentry, or unlock the key in gpg-agent first") from None
    return getpass.getpass("passphrase of your Tariq key: ").encode() + b"\n"


# ---- steganography: data and a cover image in, a PNG out, and back; of others' bytes only signed ones come here -------

SIDE = 36  # pixels: 36 x 36 x 3 low bits carry 486 bytes, and the PNG of 4 KB, sealed with RSA-4096, fits 5 packets


def pillow():
    try:
        from PIL import Image, PngImagePlugin
    except ImportError:
        raise Fault(MISSING, "Pillow is not installed: apt-get install python3-pil") from None
    return Image, PngImagePlugin


def cover_image(directory):
    """A random SIDE x SIDE crop of a random PNG in the directory, as RGB; without a directory, a generated image."""
    import random
    Image, _ = pillow()
    if not directory:
        return Image.frombytes("RGB", (SIDE, SIDE), os.urandom(SIDE * SIDE * 3))
    chance, path = random.SystemRandom(), os.path.expanduser(directory)
    try:
        path = os.path.join(path, chance.choice([name for name in os.listdir(path) if name.lower().endswith(".png")]))
        with Image.open(path, formats=["PNG"]) as image:
            left, top = (chance.randint(0, size - SIDE) for size in image.size)
            return image.crop((left, top, left + SIDE, top + SIDE)).convert("RGB")
    except (OSError, SyntaxError, ValueError, IndexError, Image.DecompressionBombError):
        raise Fault(BAD_DATA, f"{path}: needs PNG images (.png) of at least {SIDE} x {SIDE} pixels to hide in") from None


def hide(image, data):
    """RGB image, bytes -> PNG with length(2) | data in the lowest bits. Raises Fault where the data is too long."""
    pixels = bytearray(image.tobytes())
    bits = "".join(f"{byte:08b}" for byte in len(data).to_bytes(2, "big") + data)
    if len(bits) > len(pixels):
        raise Fault(USAGE, f"the request is {(len(bits) - len(pixels) + 7) // 8} bytes too long for one knock")
    for place, bit in enumerate(bits):
        pixels[place] = pixels[place] & 0xFE | (bit == "1")
    png = io.BytesIO()
    pillow()[0].frombytes("RGB", image.size, bytes(pixels)).save(png, "PNG")
    return png.getvalue()


def reveal(png):
    """PNG -> the hidden data. The size is checked before a pixel is decoded: a bomb stays packed. Raises Fault."""
    try:
        image = pillow()[1].PngImageFile(io.BytesIO(png))
        if image.size != (SIDE, SIDE) or image.mode != "RGB":
            raise ValueError
        bits = "".join(str(sample & 1) for sample in image.tobytes())
        length = int(bits[:16], 2)
        return int("0" + bits[16:16 + 8 * length], 2).to_bytes(length, "big")
    except Exception:  # Pillow has many for bad files; whichever it is, the answer is no
        raise Fault(BAD_DATA, "not an image that Tariq made") from None


# ---- wire: data in, frames that look random out, and back ------------------------------------------------------------

NONCE, TAG, ID = 12, 16, 12  # bytes
SLOT = 60  # seconds; the slots before and after count too, so clocks may differ by a minute
ANSWER = NONCE + TAG + ID + 32  # bytes of an answer's frame
FRAGMENT_MAX, REPLY_MAX = 1200, 1400  # bytes of payload: a fragment passes an MTU of 1280, RSA-4096 replies one of 1500


def derive_key(secret, ports):
    """The key that a server shares with its clients, 32 bytes."""
    return hashlib.blake2b(struct.pack(f">{len(ports)}H", *ports), key=secret, person=b"tariq 1", digest_size=32).digest()


def fragment_label(position, count):
    return b"knock %d/%d" % (position, count)


def tagger(key, label):
    """Keyed BLAKE2b (RFC 7693), bound to a label of at most 16 bytes: direction, and position in the sequence."""
    return hashlib.blake2b(key=key, person=label, digest_size=TAG)


def slot(now, offset=0):
    return (int(now) // SLOT + offset).to_bytes(8, "big")


def mask(key, label, nonce, data):
    """XOR with a SHAKE-256 keystream (FIPS 202); the same again takes it off."""
    stream = hashlib.shake_256(key + label + nonce).digest(len(data))
    return (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")


def frame(key, label, data):
    nonce, tag = os.urandom(NONCE), tagger(key, label)
    masked = mask(key, label, nonce, data)
    tag.update(nonce + masked + slot(time.time()))
    return nonce + tag.digest() + masked


def authentic(tag, payload):
    """Whether a payload carries this tagger's tag, made in this slot or a neighbour; in constant time."""
    tag = tag.copy()
    tag.update(payload[:NONCE] + payload[NONCE + TAG:])
    for offset in (0, -1, 1):
        timed = tag.copy()
        timed.update(slot(time.time(), offset))
        if hmac.compare_digest(timed.digest(), payload[NONCE:NONCE + TAG]):
            return True
    return False


def unframe(key, label, payload):
    """Payload -> data, or None where it is not an authentic frame with this label."""
    if not authentic(tagger(key, label), payload):
        return None
    return mask(key, label, payload[:NONCE], payload[NONCE + TAG:])


def tcp_span(packet, ip):
    """(TCP header, payload, end): offsets in a packet with its IP header at `ip` (RFC 791, 8200, 9293), or None for
    what is not whole TCP with a payload. These bytes may be anybody's: nothing is taken that does not lie inside."""
    if len(packet) < ip + 40:
        return None
    if packet[ip] >> 4 == 4 and packet[ip + 9] == socket.IPPROTO_TCP:
        tcp, end = ip + (packet[ip] & 15) * 4, ip + int.from_bytes(packet[ip + 2:ip + 4], "big")
    elif packet[ip] >> 4 == 6 and packet[ip + 6] == socket.IPPROTO_TCP:
        tcp, end = ip + 40, ip + 40 + int.from_bytes(packet[ip + 4:ip + 6], "big")
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
            self.own = probe.getsockname()[0]

    def knock(self, frames):
        for port, payload in zip(self.ports, frames):
            sock = socket.socket(self.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self.sockets.append(sock)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave nothing half-open
                sock.setsockopt(socket.IPPROTO_TCP, NO_COOKIE, 1)
                if sock.sendto(payload, socket.MSG_FASTOPEN, (self.address[0], port, *self.address[2:])) < len(payload):
                    self.trouble = "the path's MTU is too small for a fragment"
            except OSError as error:
                self.trouble = error.strerror
                if error.errno in (92, 95):  # ENOPROTOOPT, EOPNOTSUPP
                    raise Fault(SYSTEM, "this kernel sends no TCP Fast Open: sysctl -w net.ipv4.tcp_fastopen=1, or "
                                        "knock as root with --transport crafted") from None
            if port != self.ports[-1]:
                self.drop(sock)  # its SYN is out, and only the last port answers
        for sock in self.sockets[:-4]:
            self.drop(sock)  # before its third time-out, at which Linux may switch Fast Open off

    def receive(self, timeout):
        for sock in select.select(self.sockets, [], [], timeout)[0]:
            try:
                payload = sock.recv(2048)
            except OSError as error:
                self.trouble, payload = error.strerror, b""
            if payload:
                self.sockets.append(self.sockets.pop(self.sockets.index(sock)))  # where `answer` sends
                return payload
            self.drop(sock)
        return None

    def answer(self, payload):
        try:
            self.sockets[-1].send(payload)
        except (OSError, IndexError) as error:
            self.trouble = str(error)

    def drop(self, sock):
        self.sockets.remove(sock)
        sock.close()

    def close(self):
        for sock in list(self.sockets):
            self.drop(sock)


class CraftedTransport(KernelTransport):
    """Every packet made and read with scapy on raw sockets (CAP_NET_RAW). The kernel answers the SYN-ACK, of which it
    knows nothing, with RST: the server ignores it."""

    def __init__(self, family, address, ports):
        super().__init__(family, address, ports)
        self.scapy, self.port = load_scapy(), 32768 + int.from_bytes(os.urandom(2), "big") % 28000
        self.ip = (self.scapy.IP if family == socket.AF_INET else self.scapy.IPv6)(src=self.own, dst=address[0])
        try:
            self.raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            self.sniffer, self.offset = packet_socket(
                self.scapy, self.ip.route()[0], f"tcp and src host {address[0]} and src port {ports[-1]} and dst port {self.port}")
        except PermissionError:
            raise Fault(SYSTEM, "crafted packets need root or CAP_NET_RAW: use sudo, or --transport kernel") from None

    def send(self, port, flags, payload, seq, ack=0, options=()):
        tcp = self.scapy.TCP(sport=self.port, dport=port, flags=flags, seq=seq, ack=ack, window=64240, options=list(options))
        try:
            self.raw.sendto(bytes(self.ip / tcp / payload), (self.address[0], 0, *self.address[2:]))
        except OSError as error:
            self.trouble = error.strerror

    def knock(self, frames):
        for port, payload in zip(self.ports, frames):
            seq, high, low = struct.unpack(">III", os.urandom(12))
            self.send(port, "S", payload, seq, options=[("MSS", 1460), ("SAckOK", b""), ("NOP", None), ("WScale", 7),
                                                        ("TFO", (high, low)), ("NOP", None), ("NOP", None)])

    def receive(self, timeout):
        if not select.select([self.sniffer.ins], [], [], timeout)[0]:
            return None
        packet = self.sniffer.ins.recv(2048)
        span = tcp_span(packet, self.offset)
        if span is None:
            return None
        tcp, start, end = span
        seq, self.seq = struct.unpack_from(">II", packet, tcp + 4)
        self.ack = (seq + (packet[tcp + 13] >> 1 & 1) + end - start) % 2**32
        return packet[start:end]

    def answer(self, payload):
        self.send(self.ports[-1], "PA", payload, self.seq, self.ack)

    def close(self):
        self.sniffer.close()
        self.raw.close()


def open_transport(host, family, kind, ports):
    """A transport to the first address of the host that there is a route to. Raises Fault."""
    with open("/proc/self/status", encoding="ascii") as file:
        net_raw = int(re.search(r"CapEff:\s*(\w+)", file.read())[1], 16) >> 13 & 1  # capabilities(7)
    transport = CraftedTransport if kind == "crafted" or not kind and net_raw else KernelTransport
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, None, family, socket.SOCK_STREAM):
            try:
                return transport(family, address, ports)
            except OSError as error:
                trouble = error
    except (OSError, UnicodeError) as error:
        trouble = error
    raise Fault(NO_ANSWER, f"{printable(host)}: {getattr(trouble, 'strerror', 'not a host name')}")


def converse(send, receive, accept, until):
    """Send, and again at growing intervals until `accept` makes something of a payload or the monotonic clock says
    `until`: the client alone drives the exchange through losses. Returns what was made, or None."""
    wait = WAIT
    while time.monotonic() < until:
        send()
        again = min(until, time.monotonic() + wait * (0.75 + os.urandom(1)[0] / 512))
        wait = min(wait * GROWTH, LONGEST)
        while (left := again - time.monotonic()) > 0:
            payload = receive(left)
            if payload and (accepted := accept(payload)):
                return accepted
    return None


def cmd_knock(options):
    """Knock at options.host, prove who is who, print what was done. Returns the exit code."""
    began = time.monotonic()
    step = (lambda text: log(f"{(time.monotonic() - began) * 1e3:6.0f} ms  {text}")) if options.verbose else (lambda text: None)
    try:
        command = command_of([options.action, *options.words])
    except ValueError as error:
        raise Fault(USAGE, str(error)) from None
    config, own = Config(options.config), (options.host, "client")
    try:
        ports = ports_of(options.ports) if options.ports else config.get(own, "secret_ports", ports_of)
    except ValueError as error:
        raise Fault(USAGE, f"-p {error}") from None
    key, count = derive_key(config.get(own, "secret", secret_of), ports), len(ports)
    server, user = config.get(own, "server_key", fingerprint_of), options.user or config.get(own, "user")
    user = user if re.fullmatch("[0-9A-Fa-f]{40}", user) else f"<{user}>"  # gpg: exactly this email
    ring = Keyring(options.gpg_dir or config.get(own, "client_gpg_dir", default="~/.config/tariq/gpg"))
    images = config.get(own, "img_dir", default="") if options.img_dir is None else options.img_dir
    host = config.get(own, "host", default=options.host)
    transport = open_transport(host, options.family, options.transport, ports)
    address = "" if any(ipaddress.ip_address(transport.own.split("%")[0]) in net for net in TRANSLATED) else transport.own

    request = {"to": server, "cmd": command, "ip": address}
    png = hide(cover_image(images), json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode())
    sealed, knock_id = ring.seal(png, user, server), os.urandom(ID)
    size = -(-len(sealed) // count)
    pieces = [sealed[start:start + size] for start in range(0, size * count, size)]
    step(f"request hidden in a PNG of {len(png)} bytes, sealed for {server}: {len(sealed)} bytes")
    if NONCE + TAG + ID + size > FRAGMENT_MAX:
        raise Fault(CONFIG, f"{len(sealed)} bytes do not fit {count} packets: use more secret_ports, or smaller keys")

    def send_knock():
        transport.knock([frame(key, fragment_label(position, count), knock_id + piece)
                         for position, piece in enumerate(pieces)])
        step(f"{count} fragments sent to {transport.address[0]} by {type(transport).__name__}")

    def send_answer():
        transport.answer(frame(key, b"answer", knock_id + hmac.digest(challenge[:32], knock_id, "sha256")))
        step("answer sent")

    def unseal(label, payload):
        """What this server sealed for this knock, or None. A seal that another key made ends the knock."""
        data = unframe(key, label, payload)
        if data is None:
            return None
        try:
            signer, plain = ring.unseal(data, user)
        except Fault as fault:
            raise Fault(WRONG_SERVER, f"an answer that {server} did not seal: {fault}") from None
        if not hmac.compare_digest(signer, server):
            raise Fault(WRONG_SERVER, f"the answer is signed by {signer}, not by the server_key {server}")
        return plain[ID:] if hmac.compare_digest(plain[:ID], knock_id) else None

    try:
        challenge = converse(send_knock, transport.receive, lambda payload: unseal(b"challenge", payload),
                             time.monotonic() + options.timeout)
        if not challenge:
            raise Fault(NO_ANSWER, f"no answer from {host} in {options.timeout} s: wrong secret_ports or secret, a clock more "
                        "than a minute off, a key the server does not know, no server, or a firewall on the way"
                        + (f" ({transport.trouble})" if transport.trouble else ""))
        seen = challenge[33:].decode(errors="replace")
        step(f"challenge sealed by {server}: it is the server, and sees this client at {printable(seen)}")
        if address and seen != address:
            raise Fault(WRONG_SERVER, f"the server sees {printable(seen)} but this machine is {address}: someone relays the knock")
        result = converse(send_answer, transport.receive, lambda payload: unseal(b"result", payload),
                          time.monotonic() + options.timeout + challenge[32])
        if not result:
            raise Fault(NO_ANSWER, f"{host} gave a challenge but no result in {options.timeout + challenge[32]} s: knock again")
    finally:
        transport.close()
    step("result received")
    status, text = result[1], result[2:]
    if not result[0]:
        raise Fault(status, f"{host}: {printable(text.decode(errors='replace'))}")
    if command[0] != "E":
        text = text.replace(b"{host}", options.host.encode()) + b"\n"
    sys.stdout.buffer.write(text)
    return status


# ---- listener: packets in, requests to the monitor out; unprivileged, and the only reader of the wire -----------------

SEEN_MAX = 65536  # nonces remembered: three minutes of frames at 360 a second; the oldest goes first
KNOCKS_MAX, KNOCKS_EACH = 256, 16  # knocks under way in all, and from one address (IPv6: one /64)
ANSWER_TIME = 30  # seconds from a challenge to its answer
WORKERS = 2  # threads that wait for gpg
RECEIVE_BUFFER = 64 << 20  # bytes: a third of a second of packets at 100,000 a second
MESSAGE_MAX = 8192  # bytes of a message between listener and monitor
RESULT_LEAST = 160  # bytes of text that every result may have


def load_scapy():
    """The parts of scapy in use (never scapy.all), 0.1 s to import. Raises Fault."""
    try:
        import logging
        logging.getLogger("scapy").setLevel(logging.CRITICAL)
        import scapy.arch
        from scapy.arch.common import compile_filter
        from scapy.config import conf
        from scapy.layers.inet import IP, TCP
        from scapy.layers.inet6 import IPv6
        from scapy.layers.l2 import Ether
        compile_filter("tcp", linktype=1)  # scapy 2.5 would only log that it cannot, and go on without a filter
    except ImportError:
        raise Fault(MISSING, "scapy or libpcap is not installed: apt-get install python3-scapy libpcap0.8") from None
    conf.sniff_promisc = False  # promiscuous mode would show
    return SimpleNamespace(conf=conf, IP=IP, TCP=TCP, IPv6=IPv6, Ether=Ether)


def packet_socket(scapy, interface, bpf):
    """(scapy L2 socket behind a kernel filter, length of its packets' link header)."""
    with open(f"/sys/class/net/{interface}/type", encoding="ascii") as file:
        link_header = 14 if file.read().strip() in ("1", "772") else 0  # Ethernet and loopback; tunnels have none
    scapy.conf.ifaces.reload()
    sock = scapy.conf.L2socket(iface=interface, filter=bpf)
    sock.ins.setsockopt(263, 23, 1)  # SOL_PACKET, PACKET_IGNORE_OUTGOING in linux/if_packet.h
    return sock, link_header


class Knock:
    """A knock under way. state: collecting -> working -> challenged -> asked -> done; todo: a worker is wanted."""

    def __init__(self, knock_id, owner):
        self.id, self.owner, self.pieces, self.state, self.todo, self.complaint = knock_id, owner, {}, "collecting", False, ""
        self.segment = self.address = self.nonce = self.signer = self.command = self.plain = self.sealed = None


class Listener:
    """Gate, reassembly and dialogue. The table of knocks is bounded and is the queue of gpg work too, so nothing grows,
    and who floods it (it takes the secret) pushes out only knocks of the own address."""

    def __init__(self, settings, ring, scapy, sock, link_header, channel):
        self.settings, self.ring, self.scapy, self.sock, self.ip, self.channel = settings, ring, scapy, sock, link_header, channel
        self.last = len(settings.ports) - 1
        self.positions = {port.to_bytes(2, "big"): position for position, port in enumerate(settings.ports)}
        self.labels = [fragment_label(position, len(settings.ports)) for position in range(len(settings.ports))] + [b"answer"]
        self.taggers = [tagger(settings.key, label) for label in self.labels]
        self.seen, self.knocks, self.changed = {}, {}, threading.Condition()

    # ==== unauthenticated bytes: from here ====
    def gate(self, packet):
        """An authentic, new frame -> (its label's position, data, offset of the payload); else None, and nothing kept.
        Positions 0 to N-1 are fragments, in SYNs to their port alone; N is an answer, in an ACK to the last port."""
        span = tcp_span(packet, self.ip)
        if span is None:
            return None
        tcp, start, end = span
        position, flags = self.positions.get(packet[tcp + 2:tcp + 4]), packet[tcp + 13] & 0x17  # ACK, RST, SYN, FIN
        if position == self.last and flags == 0x10:
            position, payload = position + 1, packet[max(start, end - ANSWER):end]  # a kernel may join repeated answers
        elif position is not None and flags == 0x02:
            payload = packet[start:end]
        else:
            return None
        if len(payload) < NONCE + TAG + ID or not authentic(self.taggers[position], payload):
            return None
        nonce = payload[:NONCE]
        if nonce in self.seen:
            return None
        self.seen[nonce] = None
        if len(self.seen) > SEEN_MAX:
            del self.seen[next(iter(self.seen))]
        return position, mask(self.settings.key, self.labels[position], nonce, payload[NONCE + TAG:]), start
    # ==== to here. The sender of what passed has the secret; who it is, gpg says. ====

    def run(self):
        for job in [self.results] + [self.worker] * WORKERS:
            threading.Thread(target=job, daemon=True).start()
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
            passed = self.gate(packet)
            if passed:
                down = False
                position, data, start = passed
                first, length = (8, 16) if packet[self.ip] >> 4 == 6 else (12, 4)
                address = packet[self.ip + first:self.ip + first + length]
                with self.changed:
                    handle = self.on_answer if position > self.last else self.on_fragment
                    handle(data[:ID], data[ID:], position, address, (packet[:start], len(data) + NONCE + TAG))

    def on_fragment(self, knock_id, piece, position, address, segment):
        knock = self.knocks.get(knock_id)
        if knock is None:
            mine = [other for other in self.knocks.values() if other.owner == address[:8]]
            crowd = mine if len(mine) >= KNOCKS_EACH else list(self.knocks.values())
            if len(crowd) >= (KNOCKS_EACH if crowd is mine else KNOCKS_MAX):
                del self.knocks[next((other for other in crowd if other.state == "collecting"), crowd[0]).id]
            knock = self.knocks[knock_id] = Knock(knock_id, address[:8])
        if knock.state == "collecting":
            knock.pieces[position] = piece
        if position == self.last and knock.state in ("collecting", "working") or address == knock.address:
            knock.segment, knock.address = segment, address  # the address that counts is the last fragment's
        if knock.state == "challenged" and position == self.last or len(knock.pieces) > self.last:
            self.want(knock)

    def on_answer(self, knock_id, proof, _, address, segment):
        knock = self.knocks.get(knock_id)
        if knock is None or knock.address != address or knock.state not in ("challenged", "asked", "done"):
            return
        if not hmac.compare_digest(proof, hmac.digest(knock.nonce, knock_id, "sha256")):
            return
        knock.segment = segment
        if knock.state == "done":
            self.want(knock)
        elif knock.state == "challenged" and time.monotonic() < knock.deadline:
            knock.state = "asked"
            self.channel.send(json.dumps({"id": knock_id.hex(), "signer": knock.signer, "command": knock.command,
                                          "ip": str(ipaddress.ip_address(address))}).encode())

    def want(self, knock):
        knock.todo = True
        self.changed.notify()

    def next_job(self):
        waiting = [knock for knock in self.knocks.values() if knock.todo]
        return next((knock for knock in waiting if knock.state == "done"), waiting[0] if waiting else None)

    def results(self):
        """Take the monitor's results; when the monitor is gone, so is the listener."""
        while True:
            message = self.channel.recv(MESSAGE_MAX)
            if not message:
                os._exit(0)
            knock_id, plain = message[:ID], message
            with self.changed:
                if knock_id in self.knocks:
                    knock = self.knocks[knock_id]
                    knock.state, knock.plain, knock.sealed = "done", plain, None
                    self.want(knock)

    def worker(self):
        while True:
            with self.changed:
                knock = self.changed.wait_for(self.next_job)
                knock.todo = False
                if knock.state == "collecting":
                    knock.state = "working"
            try:
                if knock.state == "working":
                    self.challenge(knock)
                if knock.state == "done" and knock.sealed is None:
                    room = max(RESULT_LEAST, FRAGMENT_MAX - NONCE - TAG - knock.overhead - ID - 2)
                    plain = knock.plain
                    if len(plain) > ID + 2 + room:
                        plain = plain[:ID + 2 + room - 20] + b"\n[cut to one packet]"
                    knock.sealed = self.ring.seal(plain, self.settings.own, knock.signer)
                self.reply(knock)
            except Exception as error:  # whatever one knock does, the next one is served
                complaint = str(error) if isinstance(error, (Fault, OSError)) else type(error).__name__
                if complaint != knock.complaint:
                    log(f"{ipaddress.ip_address(knock.address)}: knock refused: {complaint}", 4)
                with self.changed:
                    knock.complaint = complaint
                    if knock.state == "working":
                        knock.pieces, knock.state = {}, "collecting"

    def challenge(self, knock):
        """Unseal a whole knock, and seal the challenge for who signed it. Raises Fault."""
        signer, png = self.ring.unseal(b"".join(knock.pieces[position] for position in sorted(knock.pieces)), self.settings.own)
        try:
            request = json.loads(reveal(png))
            to, command, claimed = request["to"], request["cmd"], request["ip"]
            command_of(command)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Fault(BAD_DATA, f"not a request, though {signer} signed it") from None
        if to != self.settings.own:
            raise Fault(BAD_DATA, f"{signer} asked another server for this: {printable(to)[:40]}")
        with self.changed:
            address = knock.address
        seen = str(ipaddress.ip_address(address))
        if claimed and claimed != seen:
            log(f"{seen}: {signer} says its address is {claimed}: relayed by someone, or translated on the way", 4)
        nonce = os.urandom(32)
        plain = knock.id + nonce + bytes([min(255, self.settings.patience if command[0] == "E" else 0)]) + seen.encode()
        sealed = self.ring.seal(plain, self.settings.own, signer)
        with self.changed:
            knock.signer, knock.command, knock.nonce, knock.sealed = signer, command, nonce, sealed
            knock.overhead, knock.deadline, knock.pieces = len(sealed) - len(plain), time.monotonic() + ANSWER_TIME, {}
            knock.state, knock.address = "challenged", address

    def reply(self, knock):
        """One crafted segment to where the knock's last segment came from, out of the same interface and link address."""
        headers, size = knock.segment
        payload = frame(self.settings.key, b"result" if knock.state == "done" else b"challenge", knock.sealed)
        if len(payload) > REPLY_MAX:
            raise Fault(BAD_DATA, "the client's key is too large for a reply of one packet: RSA-4096 at most")
        if self.ip:
            seen = self.scapy.Ether(headers)
            link, ip = self.scapy.Ether(src=seen.dst, dst=seen.src), seen.payload
        else:
            link, ip = None, (self.scapy.IPv6 if headers[0] >> 4 == 6 else self.scapy.IP)(headers)
        tcp = ip[self.scapy.TCP]
        syn = int(tcp.flags) >> 1 & 1
        packet = type(ip)(src=ip.dst, dst=ip.src) / self.scapy.TCP(
            sport=tcp.dport, dport=tcp.sport, flags="SA" if syn else "PA", window=64240,
            seq=int.from_bytes(os.urandom(4), "big") if syn else tcp.ack, ack=(tcp.seq + syn + size) % 2**32,
            options=[("MSS", 1400)] if syn else []) / payload
        self.sock.send(link / packet if link else packet)


def drop_privileges(uid):
    """Become an unprivileged user for good: no groups, no capabilities (capabilities(7)), no way back. Raises OSError."""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    gid = pwd.getpwuid(uid).pw_gid
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; beyond the last one it does nothing
    os.setresuid(uid, uid, uid)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "no_new_privs")
    with open("/proc/self/status", encoding="ascii") as file:
        if re.search("^Cap(Inh|Prm|Eff|Bnd|Amb):.*[^0\\s]$", file.read(), re.M):
            raise OSError(1, "capabilities remain")


# ---- monitor: checked requests in, firewall rules and commands out. ALL OF THIS RUNS AS ROOT -------------------------

OUTPUT_MAX = 4096  # bytes of a command's output that are kept; one packet carries fewer
DOORS_MAX = 1024
FOREVER = 2**31 - 1  # the last second that iptables' time match takes, 2038-01-19
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*words, changes=True):
    """Run a program on the machine -> (exit status, its words). Logged before it runs when it changes something."""
    if changes:
        log("+ " + shlex.join(words), 5)
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=15, check=False)
    except FileNotFoundError:
        raise missing(words[0]) from None
    except subprocess.TimeoutExpired:
        raise Fault(SYSTEM, f"{words[0]} took more than 15 s") from None
    return done.returncode, (done.stderr or done.stdout).decode(errors="replace").strip()


def iptables(ip, *words, changes=True, check=True):
    """iptables or ip6tables, by the address. Raises Fault with its own words."""
    program = "ip6tables" if ":" in ip else "iptables"
    status, words = run(program, "-w", "5", *words, changes=changes)
    if status and check:
        raise Fault(SYSTEM, f"{program}: {words}")
    return status, words


def permitted(patterns, command):
    """Whether [allow] patterns permit a command (both from `command_of`). O, C: each port by itself. E: word by word;
    * stands for any one word, as the last word for any number of them."""
    if command[0] in ("O", "C"):
        return all(any(pattern[0] == command[0] and (port in pattern or "*" in pattern) for pattern in patterns)
                   for port in command[1:])
    for pattern in patterns:
        words = command
        if pattern[-1] == "*":
            pattern, words = pattern[:-1], command[:len(pattern) - 1]
        if len(words) == len(pattern) and all(want in ("*", word) for want, word in zip(pattern, words)):
            return True
    return False


class Monitor:
    """Policy, doors and commands."""

    def __init__(self, path):
        self.path, self.doors, self.running, self.channel = path, {}, set(), None
        self.load()

    def load(self):
        """Read the config anew. Raises Fault, and keeps the old one then."""
        config = Config(self.path)
        server = ("server",)
        ring = Keyring(config.get(server, "server_gpg_dir"))
        chain = config.get(server, "iptables_chain", default="tariq")
        known, where = ring.keys("--list-keys"), f"{ring.home} ({config.path})"
        own = find_key(ring.keys("--list-secret-keys"), config.get(server, "server_user"), where)
        users = {}
        for user, patterns in config.allowed().items():
            fingerprint = find_key(known, user, where)
            users[fingerprint] = (user, users.get(fingerprint, (user, []))[1] + patterns)
        rules = {protocol: config.get(server, f"open_{protocol}_port", rule_of, default=rule_of(
            f"-A {chain} -s {{ip}} -p {protocol} -m conntrack --ctstate NEW -m {protocol} --dport {{dport}} "
            "-m time --datestop {until} -j ACCEPT")) for protocol in ("tcp", "udp")}
        for protocol, rule in rules.items():
            if rule[1] != chain:
                raise Fault(CONFIG, f"{config.path}: [server] open_{protocol}_port: must add to iptables_chain {chain}")
        ports = config.get(server, "secret_ports", ports_of)
        command_timeout = config.get(server, "command_timeout", seconds_of, default=30)
        settings = SimpleNamespace(ports=ports, key=derive_key(config.get(server, "secret", secret_of), ports), own=own,
                                   interface=config.get(server, "interface", default="") or default_interface(),
                                   patience=command_timeout)
        ring.seal(b"", own, own)  # the key works, and gpg-agent is warm
        self.users, self.rules, self.chain, self.command_timeout = users, rules, chain, command_timeout
        self.open_timeout = config.get(server, "open_timeout", seconds_of, default=3600)
        self.settings, self.ring = settings, ring

    def start_firewall(self):
        """An empty chain that INPUT jumps to, in IPv4 and IPv6, and a trial of the rule templates."""
        for ip in ("192.0.2.1", "2001:db8::1"):
            if iptables(ip, "-n", "-L", self.chain, changes=False, check=False)[0]:
                iptables(ip, "-N", self.chain)
            iptables(ip, "-F", self.chain)
            if iptables(ip, "-C", "INPUT", "-j", self.chain, changes=False, check=False)[0]:
                iptables(ip, "-I", "INPUT", "-j", self.chain)
            for protocol in ("tcp", "udp"):
                rule = self.rule(ip, f"9/{protocol}", 1)
                iptables(ip, *rule)
                iptables(ip, "-D", *rule[1:])
            rules = iptables(ip, "-S", "INPUT", changes=False)[1].splitlines()
            if "-P INPUT DROP" not in rules and rules[-1] != "-A INPUT -j DROP":
                log(f"INPUT does not drop ({'IPv6' if ':' in ip else 'IPv4'}): nothing is hidden. See README, Firewall", 4)
            if any("-j REJECT" in rule for rule in rules):
                log("INPUT has a REJECT rule: it answers, and so tells scanners of this host and breaks knocks. Use DROP", 4)

    def rule(self, ip, port, until):
        number, protocol = port.split("/")
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(until))
        return [word.format(ip=ip, dport=number, until=stamp) for word in self.rules[protocol]]

    def open(self, ip, port):
        """One rule for one address and port; a door that is open gets a new deadline. Returns the deadline in words."""
        until = min(FOREVER, int(time.time()) + self.open_timeout) if self.open_timeout else FOREVER
        old = self.doors.get((ip, port))
        if not old and len(self.doors) >= DOORS_MAX:
            raise Fault(SYSTEM, f"{DOORS_MAX} doors are open: no more until one closes")
        rule = self.rule(ip, port, until)
        iptables(ip, *rule)
        self.doors[ip, port] = (rule, until, time.monotonic() + until - time.time())
        if old and old[0] != rule:
            iptables(ip, "-D", *old[0][1:])
        if until == FOREVER:
            return "until closed"
        return time.strftime("until %H:%M:%SZ" if self.open_timeout < 86400 else "until %Y-%m-%d %H:%M:%SZ", time.gmtime(until))

    def close(self, ip, port):
        """Whether a door was open; it is closed now."""
        if (ip, port) not in self.doors:
            return False
        iptables(ip, "-D", *self.doors[ip, port][0][1:])
        del self.doors[ip, port]
        return True

    def close_expired(self):
        """Take out rules past their end by either clock: the kernel has closed them, unless the wall clock jumped back."""
        for (ip, port), (_, until, monotonic) in list(self.doors.items()):
            if time.time() > until or time.monotonic() > monotonic + 1 and until < FOREVER:
                try:
                    self.close(ip, port)
                except Fault as fault:
                    log(f"closing {port} for {ip}: {fault}: tried again each second", 3)

    def close_all(self):
        for ip in ("192.0.2.1", "2001:db8::1"):
            try:
                iptables(ip, "-F", self.chain)
            except Fault as fault:
                log(f"flushing chain {self.chain}: {fault}: every rule still ends at its own time", 3)
        self.doors = {}

    def handle(self, message):
        """A listener's message: believe nothing of it but what [allow] lets any user do from any address."""
        try:
            request = json.loads(message)
            knock_id, ip = bytes.fromhex(request["id"]), str(ipaddress.ip_address(request["ip"]))
            signer, command = request["signer"], command_of(request["command"])
            if len(knock_id) != ID or "%" in ip or not isinstance(signer, str) or len(message) >= MESSAGE_MAX:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            log("a malformed request from the listener: ignored", 3)
            return
        user, patterns = self.users.get(signer, (signer, []))
        event = f"{user} {ip} {shlex.join(command)}"
        if not permitted(patterns, command):
            self.result(knock_id, REFUSED, f"refused by policy: {shlex.join(command)}: {user} may not", event)
        elif command[0] == "E" and signer in self.running:
            self.result(knock_id, REFUSED, "refused: your last command is still running", event)
        elif command[0] == "E":
            self.running.add(signer)
            threading.Thread(target=self.execute, args=(knock_id, signer, command[1:], event), daemon=True).start()
        else:
            try:
                self.result(knock_id, 0, self.act(command[0], ip, command[1:]), event)
            except Fault as fault:
                self.result(knock_id, SYSTEM, str(fault), event)

    def act(self, action, ip, ports):
        names = ", ".join("/".join(reversed(port.split("/"))) for port in ports)
        if action == "O":
            until = [self.open(ip, port) for port in ports][-1]
            return f"opened {names} on {{host}} for {ip} {until}"
        closed = [self.close(ip, port) for port in ports]
        return f"closed {names} on {{host}} for {ip}" + ("" if all(closed) else " (not all were open)" if any(closed) else " (was not open)")

    def execute(self, knock_id, signer, words, event):
        """Run a permitted command, without a shell, for command_timeout seconds and OUTPUT_MAX bytes at most."""
        log("+ " + shlex.join(words), 5)
        output = bytearray()

        def drain():
            while data := os.read(process.stdout.fileno(), 65536):
                output.extend(data[:OUTPUT_MAX - len(output)])

        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/",
                                       start_new_session=True, env={"PATH": SAFE_PATH, "LC_ALL": "C.UTF-8"})
            reader = threading.Thread(target=drain, daemon=True)
            reader.start()
            try:
                status = process.wait(self.command_timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status = process.wait() and 124  # as timeout(1) says it
            reader.join(0.5)  # not for ever: a daemon that the command started may keep the pipe
            status = status if status >= 0 else 128 - status
        except OSError as error:
            status, output = 127, f"{words[0]}: {error.strerror}\n".encode()
        self.running.discard(signer)
        self.result(knock_id, status, bytes(output), event)

    def result(self, knock_id, status, text, event):
        """Tell the listener, and log: who, from where, what, verdict."""
        command = isinstance(text, bytes)
        done = command or status == 0
        log(f"{event}: " + (f"exit status {status}" if command else text.replace(" on {host}", "")), 6 if done else 4)
        try:
            self.channel.send(knock_id + bytes([done, status]) + (text if command else text.encode()), socket.MSG_DONTWAIT)
        except OSError:
            pass  # the listener is gone or does not read: the client asks again

    def start_listener(self):
        """Fork the listener with a packet socket opened for it, and nothing else. Raises OSError, Fault."""
        ports = " or ".join(f"tcp dst port {port}" for port in self.settings.ports)
        sock, link_header = packet_socket(self.scapy, self.settings.interface, f"({ports}) and greater 80 and less 1500")
        sock.ins.setsockopt(socket.SOL_SOCKET, 33, RECEIVE_BUFFER)  # SO_RCVBUFFORCE
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)  # the monitor ends the listener, by closing the channel
                signal.set_wakeup_fd(-1)
                for descriptor in map(int, os.listdir("/proc/self/fd")):
                    if descriptor > 2 and descriptor not in (sock.ins.fileno(), theirs.fileno()):
                        try:
                            os.close(descriptor)
                        except OSError:
                            pass  # the one that listed the directory
                if self.ring.uid:
                    drop_privileges(self.ring.uid)
                    self.ring.run_as = {}
                Listener(self.settings, self.ring, self.scapy, sock, link_header, theirs).run()
            except BaseException as error:
                log(f"listener: {type(error).__name__}: {error}", 3)
            finally:
                os._exit(DIED)
        theirs.close()
        sock.close()

    def stop_listener(self):
        if self.channel:
            self.channel.close()
            os.waitpid(self.pid, 0)
            self.channel = None

    def serve(self):
        """Until SIGTERM or SIGINT: the listener's requests, expired doors, SIGHUP, an interface that comes and goes."""
        wanted, listening, waiting = set(), None, False
        wake, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda signum, _: wanted.add(signum))
        while not wanted & {signal.SIGINT, signal.SIGTERM}:
            if signal.SIGHUP in wanted:
                wanted.discard(signal.SIGHUP)
                try:
                    self.load()
                    log(f"{self.path} read again: {len(self.users)} users")
                except Fault as fault:
                    log(f"not reloaded, the old config stays in force: {fault}", 3)
            try:
                now = (socket.if_nametoindex(self.settings.interface), vars(self.settings))
                if now != listening:
                    self.stop_listener()
                    self.start_listener()
                    listening, waiting = now, False
                    who = f"as uid {self.ring.uid} ({pwd.getpwuid(self.ring.uid).pw_name})"
                    log(f"listening on {self.settings.interface} for {len(self.settings.ports)} knocks, {len(self.users)} users, "
                        f"chain {self.chain}, listener {who}")
            except OSError as error:
                if not waiting:
                    log(f"{self.settings.interface}: {error.strerror}: waiting for the interface", 4)
                waiting, listening = True, None
            sources = [wake, self.channel] if self.channel else [wake]
            for source in select.select(sources, [], [], 1)[0]:
                message = source.recv(MESSAGE_MAX)
                if source is wake:
                    continue
                if not message:
                    raise Fault(DIED, "the listener died: every door is closed")
                self.handle(message)
            self.close_expired()


def default_interface():
    """The interface of the default route, IPv4 before IPv6. Raises Fault."""
    for path, destination, mask_at, name_at in (("/proc/net/route", 1, 7, 0), ("/proc/net/ipv6_route", 0, 1, 9)):
        try:
            with open(path, encoding="ascii") as file:
                routes = [line.split() for line in file]
        except OSError:
            continue
        for route in routes:
            if set(route[destination]) == set("0") == set(route[mask_at].replace("00", "0")) and route[name_at] != "lo":
                return route[name_at]
    raise Fault(CONFIG, "there is no default route: name the interface in [server]")


def pid_file(path):
    return "/run/tariq" + path.replace("/", "-") + ".pid"


def cmd_server(options):
    need_root("server")
    os.environ["PATH"] = SAFE_PATH
    monitor = Monitor(options.config)
    lock = open(pid_file(monitor.path), "a+", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process, however that ends
    except OSError:
        raise Fault(SYSTEM, f"a server with {monitor.path} runs already: {pid_file(monitor.path)}") from None
    lock.truncate(0)
    print(os.getpid(), file=lock, flush=True)
    monitor.scapy = load_scapy()
    pillow()
    if monitor.ring.uid == 0:
        log(f"the listener runs as root: chown -R tariq: {monitor.ring.home} (after useradd --system tariq)", 4)
    monitor.start_firewall()
    try:
        monitor.serve()
    finally:
        monitor.close_all()
        monitor.stop_listener()
    return 0


# ---- set-up: once, by hand; on stderr what was done, file by file ----------------------------------------------------

def need_root(command):
    if os.geteuid():
        raise Fault(SYSTEM, f"{command} needs root: sudo")


def write_private(path, text):
    """Write a file of mode 0600 whole or not at all; a config that people edited keeps its owner."""
    path = os.path.realpath(path)
    temporary = f"{path}.new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, path)
    log(f"wrote {path}")


def make_directory(path, mode):
    if not os.path.isdir(path):
        os.makedirs(path, mode)
        log(f"made {path}")


def make_key(ring, user):
    """The fingerprint of the keyring's key for a user; made (Ed25519, Curve25519) where there is none."""
    keys = [key for key in ring.keys("--list-secret-keys") if user in key[2]]
    if not keys:
        ring.gpg("--pinentry-mode", "loopback", "--passphrase", "", "--quick-generate-key", user, "future-default", "default", "never")
        log(f"made a key for {user} in {ring.home}")
    return find_key(ring.keys("--list-secret-keys"), user, ring.home)


def cmd_init(options):
    """Make a server's config, user, keyring and key; whatever is there already stays."""
    import random
    need_root("init")
    os.environ["PATH"] = SAFE_PATH
    path = os.path.abspath(options.config or os.path.join(options.directory, "tariq.conf"))
    home = os.path.join(os.path.dirname(path), ".server-gpg")
    try:
        owner = pwd.getpwnam("tariq")
    except KeyError:
        run("useradd", "--system", "--home-dir", home, "--no-create-home", "--shell", "/usr/sbin/nologin", "tariq")
        owner = pwd.getpwnam("tariq")
    make_directory(os.path.dirname(path), 0o755)
    make_directory(home, 0o700)
    os.chown(home, owner.pw_uid, owner.pw_gid)
    user = f"tariq@{socket.gethostname()}"
    if not os.path.exists(path):
        ports = ",".join(map(str, random.SystemRandom().sample(range(1024, 32768), 5)))
        write_private(path, f"[server]\nsecret_ports = {ports}\nsecret = {new_secret()}\nserver_gpg_dir = {home}\n"
                            f"server_user = {user}\n\n[allow]\n")
    user = Config(path).get(("server",), "server_user")
    log(f"the server's key: {make_key(Keyring(home), user)}")
    return 0


def new_secret():
    return binascii.b2a_base64(os.urandom(32)).decode().strip()


def cmd_keygen(options):
    """Make a client's keyring and key, print the public key."""
    path = os.path.abspath(options.config or os.path.expanduser("~/.config/tariq/tariq.conf"))
    make_directory(os.path.dirname(path), 0o700)
    if not os.path.exists(path):
        write_private(path, f"[client]\nuser = {options.user}\nclient_gpg_dir = {os.path.dirname(path)}/gpg\n")
    home = Config(path).get(("client",), "client_gpg_dir", default="~/.config/tariq/gpg")
    make_directory(os.path.expanduser(home), 0o700)
    ring = Keyring(home)
    sys.stdout.buffer.write(ring.gpg("--armor", "--export", make_key(ring, options.user))[0])
    return 0


def import_key(ring, text):
    """Import exactly one public key -> [fingerprint, validity, user ids]. Raises Fault."""
    shown = ring.keys("--show-keys", data=text)
    if len(shown) != 1 or b"PRIVATE KEY" in text:
        raise Fault(BAD_DATA, f"needs one public key on stdin, not {len(shown)}: tariq.py keygen, or gpg --armor --export")
    ring.gpg("--import", data=text)
    log(f"imported {shown[0][0]} {' '.join(shown[0][2])} into {ring.home}")
    return shown[0]


def cmd_enroll(options):
    """Allow a client whose public key comes on stdin, print its profile."""
    need_root("enroll")
    config = Config(options.config)
    try:
        patterns = [shlex.join(command_of(shlex.split(line))) for line in options.allow or ["O 22"]]
    except ValueError as error:
        raise Fault(USAGE, f"--allow: {error}") from None
    ring = Keyring(config.get(("server",), "server_gpg_dir"))
    fingerprint, _, uids = import_key(ring, sys.stdin.buffer.read(GPG_INPUT))
    known = [find_key(ring.keys("--list-keys"), user, ring.home) for user in config.allowed()]
    if fingerprint in known:
        log(f"{config.path}: {fingerprint} is in [allow] already: not changed")
    else:
        with open(config.path, encoding="utf-8") as file:
            text = file.read()
        entry = f"{fingerprint} =  # {printable(uids[0]) if uids else ''}\n" + "".join(f"    {line}\n" for line in patterns)
        head, section, tail = text.partition("\n[allow]")
        rest = tail.partition("\n")
        write_private(config.path, head + "\n[allow]" + rest[0] + "\n" + entry + rest[2])
        log(f"{config.path}: {fingerprint} may {'; '.join(patterns)}")
        reload_server(config.path)
    own = find_key(ring.keys("--list-secret-keys"), config.get(("server",), "server_user"), ring.home)
    key = ring.gpg("--armor", "--export", own)[0].decode()
    print(f"# Tariq profile, for tariq.py join. It holds the shared secret: keep it private.\n[profile]\n"
          f"secret_ports = {config.get(('server',), 'secret_ports')}\nsecret = {config.get(('server',), 'secret')}\n"
          f"server_key = {own}\n{key}", end="")
    return 0


def reload_server(path):
    """SIGHUP to the server that runs with this config, if one does."""
    try:
        with open(pid_file(path), encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                os.kill(int(file.read()), signal.SIGHUP)
                log("told the running server to read its config again")
    except FileNotFoundError:
        pass


def cmd_join(options):
    """Take a server's profile from stdin into the client's config and keyring."""
    text = sys.stdin.buffer.read(GPG_INPUT).decode(errors="replace")
    settings, begin, key = text.partition("-----BEGIN PGP PUBLIC KEY BLOCK-----")
    profile = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    try:
        profile.read_string(settings)
        ports, secret, server = (profile.get("profile", name) for name in ("secret_ports", "secret", "server_key"))
        ports_of(ports), secret_of(secret), fingerprint_of(server)
    except (configparser.Error, ValueError):
        raise Fault(BAD_DATA, "no profile on stdin: it is what tariq.py enroll prints (did ssh or enroll fail?)") from None
    config = Config(options.config)
    ring = Keyring(config.get(("client",), "client_gpg_dir", default="~/.config/tariq/gpg"))
    if import_key(ring, (begin + key).encode())[0] != server:
        raise Fault(BAD_DATA, "the profile's key is not its server_key")
    if config.ini.has_section(options.host):
        if config.get((options.host,), "secret") != secret or config.get((options.host,), "server_key") != server:
            raise Fault(BAD_DATA, f"{config.path}: [{options.host}] has other values: take that section out, then join again")
        log(f"{config.path}: [{options.host}] is there already: not changed")
        return 0
    with open(config.path, encoding="utf-8") as file:
        text = file.read()
    write_private(config.path, f"{text.rstrip()}\n\n[{options.host}]\nsecret_ports = {ports}\nsecret = {secret}\nserver_key = {server}\n")
    log(f"{options.host} is known by its key {server}: tariq.py knock {options.host} O 22")
    return 0


# ---- command line ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(USAGE, f"{printable(message)} (tariq.py --help)")


def command_line():
    parser = Parser(prog="tariq.py", description="Port knocking with hidden, signed, encrypted requests.", epilog=EXIT_CODES,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"Tariq {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, function, text):
        sub = commands.add_parser(name, help=text, description=text, epilog=EXIT_CODES, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(function=function)
        sub.add_argument("-c", dest="config", metavar="CONF", help="config (~/.config/tariq/tariq.conf, /etc/tariq/tariq.conf)")
        return sub

    command("server", cmd_server, "listen for knocks (root)")
    knock = command("knock", cmd_knock, "knock at a server: open or close ports, run a command")
    knock.add_argument("-u", dest="user", help="whose key signs")
    knock.add_argument("-p", dest="ports", help="the secret_ports")
    knock.add_argument("-i", dest="img_dir", metavar="IMG_DIR", help="PNG images to hide in")
    knock.add_argument("-g", dest="gpg_dir", metavar="GPG_DIR", help="keyring")
    family = knock.add_mutually_exclusive_group()
    family.add_argument("-4", dest="family", action="store_const", const=socket.AF_INET, default=0, help="IPv4 only")
    family.add_argument("-6", dest="family", action="store_const", const=socket.AF_INET6, help="IPv6 only")
    knock.add_argument("-t", dest="timeout", metavar="SECONDS", type=int, default=10, help="how long to try (10)")
    knock.add_argument("--transport", choices=("kernel", "crafted"), help="default: crafted with CAP_NET_RAW, else kernel")
    knock.add_argument("-v", dest="verbose", action="store_true", help="show each step with its time")
    knock.add_argument("host", metavar="HOST")
    knock.add_argument("action", choices=("O", "C", "E"), help="O PORT[/tcp|/udp]..., C PORT..., E COMMAND [ARG...]")
    knock.add_argument("words", nargs=argparse.REMAINDER, metavar="...")
    init = command("init", cmd_init, "server, once: config, system user, keyring, key (root)")
    init.add_argument("-d", dest="directory", metavar="DIR", default="/etc/tariq", help="where (/etc/tariq)")
    keygen = command("keygen", cmd_keygen, "client: make keyring and key, print the public key")
    keygen.add_argument("user", metavar="USER", help="an email address or the like: me@laptop")
    enroll = command("enroll", cmd_enroll, "server: allow the client whose public key is on stdin, print its profile (root)")
    enroll.add_argument("--allow", action="append", metavar="REQUEST", help="what it may do, as in [allow]: 'O 22' (default)")
    join = command("join", cmd_join, "client: take the profile on stdin")
    join.add_argument("host", metavar="HOST")
    return parser


def main():
    os.umask(0o022)
    try:
        options = command_line().parse_args()
        return options.function(options)
    except Fault as fault:
        print(f"tariq: {fault}", file=sys.stderr)
        return fault.code
    except OSError as error:
        print(f"tariq: {error}", file=sys.stderr)
        return SYSTEM
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
