#!/usr/bin/python3 -IS
"""Tariq: port knocking with hidden, signed, encrypted requests. One file, both ends. Read it before
you run it. A server's firewall drops everything (`hide`), and it listens on no port: it sniffs.

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
knock, and known only to the client that made it and to the server that can decrypt it. k' is made
of k and of the sealed bytes (in the code: `shared`, `k`, `reply_key`). A frame is tagged, masked,
stamped with its time, and has a fresh nonce: the same bytes twice are a replay. The client repeats
its knock in new frames until it has the result; the server acts once. Patience is how long a
command may run.

Where secrets are. `secret`: in configs, 0600, in the profile that enroll prints, and in the memory
of each command that reads one of these. K: in server, client, listener, and the socket by which the
server hands it to the listener. k: in client, listener, gpg, and the pipes between them. Private
keys: in keyrings, which gpg and gpg-agent read. A passphrase, where a key's owner set one (a
server's key has none): pinentry asks for it, gpg-agent keeps it for a while, Tariq never sees it.
None of these is in an argument, an environment, a log or an error. (Of a config an error names a
section, and 16 characters of what stands in a key's place.) No other user's process can look in.
Server and listener leave no core dump, as they are not dumpable; the other commands' dumps are as
your ulimit has it.

The parts, in the order of the file, and who reads what before trusting it with a machine:

    part                   runs as                is fed by               to be read by
    words, config          both ends              your own files          everybody
    OpenPGP, image, wire   both ends              the network, once the   everybody
                                                  frame's tag holds; what
                                                  is before that is marked
    client                 you                    the server's replies    who knocks
    listener               an unprivileged user   anybody's packets       who runs a server
    programs, doors,       root                   the listener, policy    who runs a server
    monitor                                       and your config
    set-up, command line   root; client: you      stdin, your arguments   everybody
"""
# The first line: -I takes nothing of the caller's environment and directory; -S runs no package's
# code at the start (see find_packages).
import gc, sys
KNOCKS = sys.argv[1:2] == ["knock"]  # the command that has to be quick
if KNOCKS:
    gc.disable()  # it is over before there is garbage worth a search: 3 ms less
import argparse, binascii, configparser, fcntl, hashlib, hmac, io, ipaddress, itertools, json, os
import re, select, shlex, signal, socket, struct, subprocess, threading, time, zlib
from collections import OrderedDict, namedtuple
from contextlib import contextmanager, suppress
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from time import monotonic
if not KNOCKS:
    import ctypes, queue
    LIBC = ctypes.CDLL(None, use_errno=True)
# To be quick, too, scapy, Pillow and `secrets` are imported where they are used.

VERSION = "3.0"

# ---- words and log: what people read -------------------------------------------------------------
# Exit codes: those of sysexits.h. E exits with its command's, which is rarely one of them.
USAGE = 64  # the command line is not one
BAD_DATA = 65  # an image, key or profile is unusable
MISSING = 69  # a program, package or file is not there
DIED = 70  # the listener ended by itself
SYSTEM = 71  # the system refused
NO_ANSWER = 75
RELAYED = 76  # the server sees another address than it should
REFUSED = 77  # by the server's policy
CONFIG = 78
EXIT_CODES = """exit codes: 0 done; E: the command's own (137: killed at its limit); 64 usage;
65 an image, key or profile is unusable; 69 a program, package or file is missing; 70 the listener
died; 71 the system refused; 75 no answer; 76 the server sees another address; 77 refused by
policy; 78 config; 130 interrupted"""

# Where Debian and Ubuntu have what a minimal machine of theirs may lack.
PACKAGES = {"gpg": "gnupg", "iptables": "iptables", "ip6tables": "iptables", "ss": "iproute2",
            "setpriv": "util-linux", "scapy": "python3-scapy", "PIL": "python3-pil"}
MODULES = ("scapy", "PIL")  # of Python's; the others are programs

NOT_FOUND = 127  # exit status of setpriv(1) and timeout(1) where there is no such program

class Fault(Exception):
    """What the user can mend: an exit code, the line they read, and what a program said to it,
    which goes to the log and to -v only."""

    def __init__(self, code, line, detail=""):
        super().__init__(line)
        self.code, self.detail = code, detail

def missing(name):
    """The Fault of a program, or of a module of Python's."""
    mend = "" if "/" in name else f": apt-get install {PACKAGES.get(name, name)}"
    return Fault(MISSING, f"{name} is missing on this machine{mend}")

def find_packages():
    """Let scapy and Pillow be found: no code of any package runs where it is not asked for, and as
    root only if you knock as root."""
    import site
    site.main()

def as_fault(error):
    """Any exception as a Fault: this is where the rest of them get their words."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, ModuleNotFoundError):
        return missing(str(error.name).partition(".")[0])
    if isinstance(error, (FileNotFoundError, PermissionError)) \
            and "/" not in str(error.filename or "/"):
        return missing(str(error.filename))  # a program, which was looked for in PATH
    if isinstance(error, ValueError):
        return Fault(USAGE, str(error))
    if isinstance(error, OSError) and error.strerror:
        return Fault(SYSTEM, f"{error.filename or 'The system says'}: {error.strerror}.")
    return Fault(SYSTEM, f"{type(error).__name__}: {error}")

def printable(text):
    """Text as one line, without what could forge a log line or steer a terminal."""
    lines = "; ".join(line for line in text.splitlines() if line.strip())
    return "".join(char if char.isprintable() else "?" for char in lines)

def log(text):
    """One line on stderr."""
    with suppress(OSError):  # a full disk behind stderr must not keep a door open
        os.write(2, f"{printable(text)}\n".encode())

# ---- config: an INI file in, checked values out --------------------------------------------------
ROOT_CONFIG = "/etc/tariq/tariq.conf"
CLIENT_CONFIG = os.path.expanduser("~/.config/tariq/tariq.conf")

def port_of(word):
    """'22' -> '22/tcp'. Raises ValueError."""
    port = re.fullmatch(r"([1-9]\d{0,4})(/tcp|/udp)?", word, re.ASCII)
    if not port or int(port[1]) > 65535:
        raise ValueError(f"{word[:20]} is no port: write 22, 22/tcp or 53/udp, from 1 to 65535.")
    return port[1] + (port[2] or "/tcp")

def command_of(words, pattern=False):
    """The words of a request, checked: ['O', '22'] -> ['O', '22/tcp']; of a line of `may`, if
    `pattern`, which may say * for any port. O opens ports, C closes them, E executes a command.
    Raises ValueError."""
    if not isinstance(words, list) or len(words) < 2 or words[0] not in ("O", "C", "E") \
            or not all(isinstance(word, str) and word.isprintable() for word in words):
        raise ValueError("a request is O PORT[/tcp|/udp]..., C PORT... or E COMMAND [ARG...], in "
                         "printable characters.")
    if words[0] == "E" or (pattern and words[1:] == ["*"]):
        return words
    return [words[0], *dict.fromkeys(port_of(word) for word in words[1:])]  # each port once

def secret_ports_of(text):
    ports = [int(word) for word in text.split(",")]
    if len(set(ports)) < len(ports) or max(ports) > 65535:
        raise ValueError
    return ports

def public_ports_of(text):
    return [] if text == "none" else [port_of(word) for word in re.split("[ ,]+", text)]

def patterns_of(text):
    return [command_of(shlex.split(line), True) for line in text.splitlines() if line.strip()]

def template_of(text):
    shlex.split(text)  # raises ValueError: a quote that is not closed
    source, with_mask = r"\{(ip|net)\}", r"\{(ip|net)\}/"
    if "{dport}" not in text or not re.search(source, text) or re.search(with_mask, text):
        raise ValueError
    return text

def rule_of(text):
    """A rule for one source, {ip} or {net}: it opens for nobody else."""
    words = shlex.split(text)
    places = [number for number, word in enumerate(words) if word in ("-s", "--source", "--src")]
    if len(places) != 1:
        raise ValueError
    place = places[0]
    if words[0] != "-A" or words[place - 1] == "!" or "{dport}" not in words \
            or words[place + 1:place + 2] not in (["{ip}"], ["{net}"]):
        raise ValueError
    if "{seconds}" in text:  # they count down: the rule to be deleted would be another one
        raise ValueError
    return text

def ip_text(address):
    """An IP address, as text or bytes -> its usual text. Raises ValueError."""
    return str(ipaddress.ip_address(address))

def address_of(text):
    return text if text == "any" else ip_text(text)

# What a value has to be: a pattern that it matches whole, words for the error, what converts it.
FOLDER = (".*", "one line", os.path.expanduser)
KEY = ("[0-9A-Fa-f]{40}", "a key's fingerprint: 40 hexadecimal digits without spaces", str.upper)
RULE = (".+", "a rule of iptables: -A CHAIN, -s {ip} or -s {net} (which is right for both "
        "families), and {dport}; its end, if any, is {until}", rule_of)
COMMAND = (".+", "a command with {dport}, and with {ip} or {net} (not {ip}/24: {net} is the "
           "network around the address, in both families)", template_of)
SYNTAX = {
    "secret_ports": (r"[1-9]\d{0,4}( *, *[1-9]\d{0,4}){4,31}",
                     "5 to 32 different ports with commas between them", secret_ports_of),
    "secret": ("[A-Za-z0-9+/]{43}=", "32 random bytes in base64, which this prints: "
               "head -c 32 /dev/urandom | base64", binascii.a2b_base64),
    "key": KEY, "server_key": KEY, "user": (r"[^#\n]+", "one line without #", str),
    "img_dir": FOLDER, "client_gpg_dir": FOLDER, "server_gpg_dir": FOLDER,
    "open_tcp_port": RULE, "open_udp_port": RULE,
    "open_command": COMMAND, "close_command": COMMAND,
    "open_timeout": (r"\d{1,8}", "a whole number of seconds (0: no end)", int),
    "command_timeout": (r"[1-9]\d{0,2}", "a whole number of seconds, 1 to 999", int),
    "iptables_chain": (r"(?![A-Z]+$)\w[\w-]{0,22}", "a chain of its own, not in capitals", str),
    "public_ports": (".+", "ports as 80/tcp, 443/tcp, or none", public_ports_of),
    "may": (r"[^\0]*", "lines of O PORT..., C PORT... or E COMMAND [ARG...]", patterns_of),
    "host": (r"(?!(server|client|allow|DEFAULT)$)[\w.:%-]+", "an ASCII name or address", str),
    "address": (".+", "an IP address, or any", address_of),
}
CLIENT = r"(?a:\w[\w.@+-]*)"  # the NAME of a section [allow NAME]
IN_ALLOW = ("key", "may", "open_timeout")  # the keys of such a section
ELSEWHERE = set(SYNTAX) - {"key", "may"}
REQUIRED = object()  # as a default: there is none
NEEDED = {"server": ("secret_ports", "secret", "server_gpg_dir", "server_key"), "allow": ("key",)}

def parse(key, text):
    """The value of a key. Raises ValueError, which does not quote the text: it may be a secret."""
    pattern, need, convert = SYNTAX[key]
    with suppress(ValueError):
        if re.fullmatch(pattern, text, re.ASCII):
            return convert(text)
    raise ValueError(f"{key} has to be {need}.")

AS_BYTES = "surrogateescape"  # what is not UTF-8 in a config, as in a comment, stays as it is

def stamp_of(status):
    """What of a file's os.stat_result changes when the file does."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

class Config:
    """One INI file, which may hold a secret, read whole. A fault in a section is kept, and raised
    to who needs that section (`require`). A file that is unreadable, open to others or no INI file
    raises Fault at once to a client. To root it is one with a fault in [server]: `hide --undo` goes
    on with it.

    What a bad edit of a server's config does:
    - a fault in one [allow NAME]: that client is refused, and nobody else is (but two sections with
      one key have both a fault);
    - a fault in [server], while the server runs: the last whole config holds, with the clients it
      had, and the log says so. (One exception: if the file has no public_ports any more, a flush of
      what hides is not repaired. See Monitor.policy.)
    - the same at a boot: exit 78, and nothing is hidden, so that whoever mends it gets in;
    - the same at a restart: exit 78, what is hidden stays so, and there is no door. `check` says it
      before."""

    def __init__(self, path, root=False):
        self.path = path
        self.ini = configparser.ConfigParser(interpolation=None, delimiters="=",
                                             inline_comment_prefixes="#", default_section="\0")
        if not os.path.exists(path):
            raise Fault(CONFIG, f"There is no config {path} yet: tariq.py keygen YOU@LAPTOP makes "
                                "a client's, and sudo tariq.py init a server's.")
        self.text, self.stamp, wrong = "", None, ""
        try:
            with open(path, encoding="utf-8-sig", errors=AS_BYTES) as file:
                status = os.fstat(file.fileno())
                self.stamp = stamp_of(status)
                self.text = file.read()
            self.ini.read_string(self.text)
            if status.st_mode & 0o077 or (root and status.st_uid):
                wrong = ("is open to others: chmod 600 it (and, if root's commands read it, chown "
                         "root it).")
        except OSError as error:
            wrong = f"cannot be read: {error.strerror}."
        except (ValueError, configparser.Error):  # which quotes the line: perhaps the secret
            wrong = ("is no INI file: it needs [section] or key = value in each line, and every "
                     "section and key once.")
        self.values = {"server": {}} if root else {}  # section: {key: value}
        self.faults = {}  # section: [line, ...]
        if wrong:
            if not root:
                raise Fault(CONFIG, f"{path} {wrong}")
            self.ini.clear()
            self.faults["server"] = [f"{path} {wrong}"]
        elif root and not self.ini.has_section("server"):
            self.ini.add_section("server")  # in which all is missing
        for name in self.ini.sections():
            self.parse_section(name)
        self.clients = {}  # fingerprint: section [allow NAME]
        for name, values in self.values.items():
            if name.startswith("allow ") and "key" in values:
                other = self.clients.setdefault(values["key"], name)
                if other != name:
                    self.add_fault(name, f"key is that of [{other}], too.")
                    self.add_fault(other, f"key is that of [{name}], too.")

    def add_fault(self, section, words):
        self.faults.setdefault(section, []).append(f"{self.path}: [{section}] {words}")

    def parse_section(self, name):
        kind = name.partition(" ")[0]  # server, allow; or client, or a host's name
        if kind == "allow" and not re.fullmatch(f"allow {CLIENT}", name):
            self.add_fault(name, "names no client: write [allow NAME], a word of letters and "
                                 "digits, with . _ @ + - in it.")
        values = self.values[name] = {}
        for key, text in self.ini[name].items():
            if key not in (IN_ALLOW if kind == "allow" else ELSEWHERE):
                # Cut: it may be a secret in the wrong place.
                self.add_fault(name, f"{key[:16]} is no key that can stand here.")
            elif text.strip() or key == "public_ports":  # nothing: hidden, or not? It has to say
                try:
                    values[key] = parse(key, text.strip())
                except ValueError as error:
                    self.add_fault(name, str(error))
        for key in NEEDED.get(kind, ()):
            if not self.ini[name].get(key, "").strip():
                self.add_fault(name, f"{key} is missing.")

    def all_faults(self):
        return [line for lines in self.faults.values() for line in lines]

    def require(self, *sections):
        """Raises Fault where one of the sections has one."""
        for name in sections:
            if name in self.faults:
                raise Fault(CONFIG, self.faults[name][0])

    def get(self, key, sections=("server",), default=REQUIRED):
        """The first value that one of the sections has for a key, or the default. Raises Fault."""
        for name in sections:
            if key in self.values.get(name, {}):
                return self.values[name][key]
        if default is REQUIRED:
            raise Fault(CONFIG, f"{self.path}: [{sections[0]}] {key} is missing.")
        return default

# ---- OpenPGP: bytes in, sealed bytes out, and back; as the keyring's owner -----------------------
GPG = ["gpg", "--batch", "--no-tty", "--quiet", "--no-options", "--status-fd", "2",
       "--no-auto-check-trustdb", "--no-random-seed-file",
       "--trust-model", "always",  # whom to trust, [allow] says
       # gpg would refuse a key or signature from a clock that is a few seconds ahead. Tariq looks
       # at these times itself: SIGNED_WITHIN, CLOCK_SKEW.
       "--ignore-time-conflict", "--ignore-valid-from"]
NO_LOCKS = "--lock-never"  # for what only reads a keyring: a full disk does not matter to it
CLOCK_SKEW = 60  # seconds that a client's clock may differ from the server's
INPUT_MAX = 65_536  # bytes that are read of standard input
UNSEAL_TIME = 2  # seconds: 15 ms are usual; nested compression would take 10 s
PLAIN_MAX = 8192  # bytes that may come out of a seal: twice Tariq's PNG (SIDE, below)
SIGNED_WITHIN = 600  # seconds: gpg stamps the signature before pinentry asks for the passphrase
WORDS_MAX = 65_536  # bytes that are read of gpg's words
HOME_MAX = 86  # bytes of a keyring's path: gpg-agent's longest socket in it has 106

TOO_LONG = ("The keyring's path {home} is too long for gpg-agent: move it to one of at most "
            f"{HOME_MAX} bytes.")
# What gpg says on stderr, and what its user reads instead.
GPG_FAULTS = (
    ("No space left", SYSTEM, "The disk that holds {home} is full: make room there."),
    ("ioctl|[Nn]o pinentry|ENOTTY|Not a tty", BAD_DATA,
     "The key in {home} has a passphrase, and there is no terminal to ask for it: knock from a "
     "terminal, with pinentry-curses installed."),
    ("Bad passphrase|cancell?ed|Timeout", BAD_DATA,
     "The passphrase of the key in {home} was wrong, or was not given."),
)

def owner_of(directory):
    """A keyring's owner: user id, group id. Raises Fault."""
    if not os.path.isdir(directory):
        raise Fault(MISSING, f"There is no keyring {directory}: tariq.py init makes a server's, "
                             "tariq.py keygen a client's.")
    status = os.stat(directory)
    return status.st_uid, status.st_gid

def as_owner(directory):
    """The words by which root runs a program as a keyring's owner, without a capability."""
    user, group = owner_of(directory)
    if not user or not group:
        raise Fault(CONFIG, f"{directory} is root's, and has to be another user's, who can do "
                            f"nothing else: chown -R tariq: {directory}")
    return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups",
            "--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all",
            "--pdeathsig", "KILL"]

def gpg(home, *arguments, data=b"", seconds=60, any_status=False):
    """Run gpg once -> (output, status lines, its words). The words may quote what others sent:
    status lines are never among them. What lies in a keyring's directory may command gpg-agent, so
    root runs gpg as the directory's owner. Raises Fault."""
    change = as_owner(home) if owner_of(home)[0] and not os.geteuid() else []
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}  # so that GPG_FAULTS fits its words
    with suppress(OSError):
        environment["GPG_TTY"] = os.ttyname(2)  # where pinentry asks for a passphrase
    with open(os.memfd_create("gpg's words"), "rb") as memory:
        words = [*GPG, "--logger-fd", str(memory.fileno()), "--homedir", home, *arguments]
        try:
            done = subprocess.run([*change, *words], input=data, capture_output=True,
                                  timeout=seconds, env=environment, pass_fds=[memory.fileno()],
                                  start_new_session=bool(change))  # not root's terminal
        except subprocess.TimeoutExpired:  # this bounds its words, too: a second's are a few MB
            raise Fault(SYSTEM, f"gpg was not done in {seconds} s with the keyring {home}.")
        memory.seek(0)
        said = memory.read(WORDS_MAX).decode(errors="replace")
    if done.returncode in (126, NOT_FOUND):  # setpriv's; gpg's own are 0 to 2
        raise missing("gpg")
    if done.returncode and not any_status:
        raise gpg_fault(home, said)
    # Only ASCII: gpg escapes what would end a line or word in that, but not U+2028 and its like.
    return done.stdout, done.stderr.decode("ascii", "replace"), said

def gpg_fault(home, said):
    """What gpg said -> a Fault in the user's words; gpg's own are its detail."""
    detail = said[-300:]
    if "agent" in said and len(home.encode()) > HOME_MAX:
        return Fault(CONFIG, TOO_LONG.format(home=home), detail)
    for pattern, code, words in GPG_FAULTS:
        if re.search(pattern, said):
            return Fault(code, words.format(home=home), detail)
    return Fault(BAD_DATA, f"gpg failed with the keyring {home}: -v or the log has its words.",
                 detail)

# Fields of a key listing (GnuPG doc/DETAILS, which counts from 1).
VALIDITY, CREATED, EXPIRES, NAME, CAN = 1, 5, 6, 9, 11

def list_keys(home, *arguments, data=b""):
    """Keys, each a dict: all of the keyring (--list-...), or one of these by its name; or those in
    `data` (--show-keys). A name that is not there lists none. Raises Fault."""
    try:
        listing, _, _ = gpg(home, NO_LOCKS, "--with-colons", "--with-keygrip", *arguments,
                            data=data)
    except Fault as fault:
        no_key = "--show-keys" in arguments or re.search("No (secret|public) key", fault.detail)
        if fault.code != BAD_DATA or not no_key:
            raise
        listing = b""
    keys = []
    for line in listing.decode(errors="replace").split("\n"):
        fields = line.split(":")
        kind = fields[0]
        if kind in ("pub", "sec"):
            end = fields[EXPIRES]
            key = {"kind": kind, "validity": fields[VALIDITY], "created": int(fields[CREATED]),
                   "expires": time.strftime("%F", time.gmtime(int(end))) if end else "never",
                   "can": fields[CAN],  # in capitals: what it is good for now
                   "grips": []}  # of it and its subkeys: gpg-agent's names for them
            keys.append(key)
        elif keys and kind == "grp":
            key["grips"].append(fields[NAME])
        elif keys and kind == "uid":
            key.setdefault("uid", fields[NAME])  # the first
        elif keys and kind == "fpr" and re.fullmatch(KEY[0], fields[NAME]):
            key.setdefault("fpr", fields[NAME])  # the first: the primary key's, of 40 digits
    return keys

def trouble_with(key, use, home):
    """Why a key of a keyring (None: it is not there) cannot be used to sign ("S") or to be
    encrypted to ("E"), in words, or ''."""
    if not key:
        return f"is not in the keyring {home}"
    if key["validity"] == "e":
        return f"expired on {key['expires']}"
    if key["validity"] == "r":
        return "is revoked"
    return "" if use in key["can"] else "has a subkey that expired or is revoked"

def find_key(home, option, name):
    keys = list_keys(home, option, name)
    return keys[0] if keys else None

def exactly(user):
    """How gpg names a key by this email and no other (gpg(1)); a fingerprint stays as it is."""
    return f"<{user}>" if "@" in user and "<" not in user else user

def seal(home, data, signer, recipient):
    """Sign and encrypt (RFC 4880): binary, recipient hidden, not compressed. Raises Fault."""
    return gpg(home, NO_LOCKS, "--compress-algo", "none", "--local-user", exactly(signer),
               "--sign", "--hidden-recipient", recipient, "--encrypt", data=data,
               seconds=SIGNED_WITHIN)[0]

# A seal counts if gpg's status lines (GnuPG doc/DETAILS) have each of these once. PLAINTEXT: one
# message; DECRYPTION_OKAY: whole, also by its check of integrity; NEWSIG: one signature; GOODSIG:
# a correct one, by a key that is neither expired nor revoked; VALIDSIG: by whom, and when.
# By whom: any primary key of the keyring; policy says what that key may do.
# When: within SIGNED_WITHIN of now.
# For whom: only `own` is tried as a hidden recipient's key. And the signed request has to name it
# in "to" (Listener.dialogue), as whoever can decrypt a seal can encrypt it to somebody else.
PROOFS = ("PLAINTEXT", "DECRYPTION_OKAY", "NEWSIG", "GOODSIG", "VALIDSIG")
# It does not count if any keyword matches this, as BADSIG, ERRSIG, EXPKEYSIG, NO_PUBKEY, FAILURE.
TROUBLE = "(NO_|NODATA|BAD|ERR|EXP|REV|FAIL).*|.*_FAILED"

def unseal(home, sealed, own):
    """Decrypt with the key `own`, verify -> (fingerprint of the signer's primary key, at most
    PLAIN_MAX bytes). Takes only what status lines prove, and not gpg's exit status, which is 2
    where it tried an older subkey first. Raises Fault."""
    plain, lines, said = gpg(home, NO_LOCKS, "--pinentry-mode", "cancel",
                             "--max-output", str(PLAIN_MAX), "--try-secret-key", own, "--decrypt",
                             data=sealed, seconds=UNSEAL_TIME, any_status=True)
    status = [line.split(" ")[1:] for line in lines.split("\n") if line.startswith("[GNUPG:] ")]
    status = [words for words in status if words[:2] != ["FAILURE", "gpg-exit"]]  # status 2, in 2.4
    keywords = [words[0] for words in status]
    if any(keywords.count(proof) != 1 for proof in PROOFS) \
            or any(re.fullmatch(TROUBLE, keyword) for keyword in keywords):
        raise Fault(BAD_DATA, why_refused(status), said[-300:])
    # VALIDSIG fingerprint date TIMESTAMP expiry version reserved algorithm hash class PRIMARY
    valid = status[keywords.index("VALIDSIG")]
    timestamp, signer = int(valid[3]), valid[10]
    if abs(time.time() - timestamp) > SIGNED_WITHIN:
        raise Fault(BAD_DATA, f"{signer} signed it {time.time() - timestamp:.0f} s ago, and "
                              f"{SIGNED_WITHIN} is the most: set the clocks.")
    return signer, plain

REFUSALS = {"EXPKEYSIG": "is expired: renew it, then enroll it again", "REVKEYSIG": "is revoked",
            "ERRSIG": "or a new subkey of it is not in the server's keyring: enroll it",
            "BADSIG": "has not made this signature"}

def why_refused(status):
    """Status lines of a seal that does not count -> why, for the log."""
    for keyword, *words in status:
        if keyword in REFUSALS:  # key id, then a user id, or for ERRSIG numbers
            name = words[0] if keyword == "ERRSIG" else " ".join(words[1:])
            return f"the signer's key, {name}, {REFUSALS[keyword]}."
    return "not one encrypted message with one valid signature."

# ---- image: data and a cover in, a PNG out, and back (steganography); others' once verified ------
SIDE = 36  # pixels: their low bits carry 486 bytes; the PNG, sealed with RSA-4096, fits 5 packets
ROW = 3 * SIDE  # bytes: one a sample; red, green and blue a pixel
CAPACITY = SIDE * ROW // 8  # bytes: a bit a sample

def cover_image(path):
    """SIDE x SIDE RGB samples: a random PNG of the folder; without one, random. Raises Fault."""
    if not path:
        return os.urandom(SIDE * ROW)
    find_packages()
    import secrets
    from PIL import Image
    try:
        names = [name for name in os.listdir(path) if name.lower().endswith(".png")]
        if names:
            path += "/" + secrets.choice(names)
            with Image.open(path, formats=["PNG"]) as image:
                return image.convert("RGB").resize((SIDE, SIDE)).tobytes()
    except Exception:  # Pillow has many for a bad image
        raise Fault(BAD_DATA, f"{path} cannot be read as a PNG image: choose another img_dir.")
    raise Fault(BAD_DATA, f"There is no PNG image (.png) in the folder {path}.")

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def embed(samples, data):
    """RGB samples, data -> PNG (ISO 15948), data and spaces in their low bits. Raises Fault."""
    if len(data) > CAPACITY:
        raise Fault(USAGE, f"The request is {len(data) - CAPACITY} bytes too long: shorten it.")
    number = int.from_bytes(data.ljust(CAPACITY), "big")
    bits = f"{number:0{8 * CAPACITY}b}"
    samples = bytes(sample & 0xFE | int(bit) for sample, bit in zip(samples, bits))
    # Before each row a zero: it is not filtered.
    rows = b"".join(b"\0" + samples[start:start + ROW] for start in range(0, SIDE * ROW, ROW))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)  # 8 bits a sample, RGB
    image = zlib.compress(rows, 0)  # not compressed: its size tells nothing of the request's
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", image)
            + chunk(b"IEND", b""))

def extract(png):
    """PNG -> data and spaces. The size is looked at before the pixels are unpacked, so a bomb stays
    packed. Raises ValueError, and what Pillow has for bad files, which is much."""
    from PIL.PngImagePlugin import PngImageFile
    image = PngImageFile(io.BytesIO(png))
    if image.size != (SIDE, SIDE) or image.mode != "RGB":
        raise ValueError("another image")
    bits = "".join(str(sample & 1) for sample in image.tobytes())
    return int(bits, 2).to_bytes(CAPACITY, "big")

# ---- wire: data in, frames that look random out, and back ----------------------------------------
TAG, NONCE, STAMP, ID = 16, 12, 6, 12  # bytes; the stamp counts milliseconds since 1970
HEAD = TAG + NONCE + STAMP  # bytes of a frame before its data
FRAME_MAX = 1200  # bytes: as a datagram they fit IPv6's least MTU, 1280; a SYN has room for 1180
TEXT_MAX = FRAME_MAX - HEAD - 2  # bytes of text in a result
PIECE_MAX = FRAME_MAX - HEAD - 1 - ID  # bytes of a seal in a fragment
# Bytes of a packet that may hold a frame. Least: headers of IPv4, 20, and UDP, 8; HEAD, a position,
# 1, and ID. Most: headers of IPv4 and TCP at their longest, 60 each, and FRAME_MAX.
LEAST, MOST = 75, 1320

def keyed(key, label, data, size):
    """Keyed BLAKE2b (RFC 7693) of data, `size` bytes; the label (at most 16) is what it is for."""
    return hashlib.blake2b(data, key=key, person=label, digest_size=size).digest()

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
    if not HEAD + least <= len(payload) <= FRAME_MAX:
        return None
    if not hmac.compare_digest(keyed(key, label, payload[TAG:], TAG), payload[:TAG]):
        return None
    plain = mask(key, label, payload[TAG:TAG + NONCE], payload[TAG + NONCE:])
    return int.from_bytes(plain[:STAMP], "big"), plain[STAMP:]

# The messages of an exchange (README, The exchange): what makes and what reads each, side by side.
# (Of a result the monitor makes what is in it, and the listener, which has k', the frame.)
Challenge = namedtuple("Challenge", "nonce patience seen")
Result = namedtuple("Result", "done status text")

def shared_key(secret, ports):
    """K: the 32 bytes that a server shares with its clients."""
    return keyed(secret, b"ports", struct.pack(f">{len(ports)}H", *ports), 32)

def knock_id_of(k):
    return keyed(k, b"id", b"", ID)

def reply_key_of(k, sealed):
    return keyed(k, b"reply", sealed, 32)

def proof_of(reply_key, nonce):
    return keyed(reply_key, b"answer", nonce, 32)

def fragments_of(shared, knock_id, sealed, count):
    size = -(-len(sealed) // count)  # rounded up
    return [frame(shared, b"knock", bytes([i]) + knock_id + sealed[i * size:(i + 1) * size])
            for i in range(count)]

def answer_of(shared, knock_id, proof, count):
    """It looks like one more fragment: its position is the number of fragments."""
    return frame(shared, b"knock", bytes([count]) + knock_id + proof)

def read_knock(shared, payload):
    """A fragment or an answer -> (stamp, position, knock id, piece or proof), or None."""
    opened = unframe(shared, b"knock", payload, 1 + ID)
    if not opened:
        return None
    stamp, data = opened
    return stamp, data[0], data[1:1 + ID], data[1 + ID:]

def challenge_of(reply_key, nonce, patience, seen):
    return frame(reply_key, b"challenge", nonce + patience.to_bytes(2, "big") + seen.encode())

def read_challenge(reply_key, payload):
    opened = unframe(reply_key, b"challenge", payload, 32 + 2)
    if not opened:
        return None
    _, data = opened
    with suppress(ValueError):  # no address: not one of Tariq's
        seen = ip_text(data[34:].decode("ascii"))
        return Challenge(data[:32], int.from_bytes(data[32:34], "big"), seen)

def result_of(done, status, text):
    return bytes([done, status]) + text[:TEXT_MAX]

def read_result(reply_key, payload):
    opened = unframe(reply_key, b"result", payload, 2)
    if not opened:
        return None
    _, data = opened
    return Result(data[0], data[1], data[2:])

# Addresses as bytes, ports (port: the sender's), TCP header or b"", payload, recvfrom's address.
Packet = namedtuple("Packet", "sender own port own_port tcp payload link")

def split(packet, link):
    """Anybody's bytes, an IP packet (RFC 791, 8200, 9293) or not -> Packet. Padded to LEAST, so
    that no index below can fail: the highest is 72, in TCP's header behind 60 bytes of IPv4's. What
    is not UDP is taken for TCP, whatever it is: it is no frame then, as its tag does not fit."""
    packet = packet.ljust(LEAST)
    if packet[0] >> 4 == 4:
        at, protocol, sender, own = (packet[0] & 15) * 4, packet[9], packet[12:16], packet[16:20]
    else:
        at, protocol, sender, own = 40, packet[6], packet[8:24], packet[24:40]
    port, own_port = struct.unpack_from(">HH", packet, at)
    if protocol == socket.IPPROTO_UDP:
        tcp, start = b"", at + 8
    else:
        tcp, start = packet[at:at + 20], at + (packet[at + 12] >> 4) * 4
    return Packet(sender, own, port, own_port, tcp, packet[start:], link)

def ip_layers():
    """scapy's modules for IPv4 and IPv6; never scapy.all. They would load `cryptography`, which is
    not used here: 36 ms, 6 MB, and more code in the listener."""
    sys.modules.setdefault("cryptography", None)  # None: an import of it fails, which scapy expects
    from scapy.layers import inet, inet6
    return inet, inet6

def craft(own, to, own_port, port, payload, flags="", seq=0, ack=0):
    """An IP packet's bytes, as Linux makes it where net.ipv4.tcp_timestamps is 0: a datagram or,
    with flags, a SYN, SYN-ACK (these: a random seq) or ACK. Addresses are text."""
    import secrets
    inet, inet6 = ip_layers()  # 0.1 s, which other transports save
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
        ip = inet6.IPv6(fl=secrets.randbits(20))
    else:  # Linux has the id 0 where no socket is connected
        ip = inet.IP(flags="DF", id=0 if flags in ("", "SA") else secrets.randbits(16))
    ip.src, ip.dst = own, to
    return bytes(ip / upper / payload)

def respond(packet, payload):
    """The bytes that answer a Packet: a datagram to a datagram, a SYN-ACK to a SYN, else an ACK."""
    own, to = ip_text(packet.own), ip_text(packet.sender)
    where = own, to, packet.own_port, packet.port, payload
    if not packet.tcp:
        return craft(*where)
    seq, own_seq, flags = struct.unpack_from(">4xIIxB", packet.tcp)
    syn, acknowledges = flags & 0x02, flags & 0x10
    ack = (seq + (1 if syn else 0) + len(packet.payload)) % 2**32  # a SYN counts as 1
    return craft(*where, "SA" if syn and not acknowledges else "PA", own_seq, ack)

# ---- client: a request in, one line and an exit code out; as an ordinary user --------------------
# Seconds until the knock is repeated, by how much each wait grows, the longest.
FIRST_WAIT, BACKOFF, LONGEST_WAIT = 0.3, 1.3, 1.2
ADDRESSES_MAX = 4  # of a name, that are tried
TCP_FASTOPEN_NO_COOKIE = 34  # linux/tcp.h; Python has no name for it
ETH_P_ALL = 3  # linux/if_ether.h

# A transport sends each frame of a knock to its target, and returns the socket that is answered.
def kernel(route, frames):
    """An ordinary socket's SYN carries it: Linux's TCP Fast Open (RFC 7413) without a cookie."""
    for target, payload in zip(route.targets, frames):
        sock = socket.socket(route.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends by RST
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
        sock.sendto(payload, socket.MSG_FASTOPEN, target)
    return sock  # the last: without a reference, the others are closed; their SYN is out

def udp(route, frames):
    """The frames as datagrams of one ordinary UDP socket: nothing in it is Linux's own."""
    sock = socket.socket(route.family, socket.SOCK_DGRAM)
    for target, payload in zip(route.targets, frames):
        sock.sendto(payload, target)
    sock.connect(target)  # only the last port answers
    return sock

class Crafted:
    """Every packet made with scapy (CAP_NET_RAW); it has what is used here of a socket. The
    kernel, which knows nothing of the connection, answers the SYN-ACK with RST: that is ignored."""

    def __init__(self, route, frames):
        find_packages()
        import secrets
        try:
            self.raw = socket.socket(route.family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        except PermissionError:
            raise Fault(SYSTEM, "Crafted packets need root: use sudo, or leave --transport out.")
        self.raw.connect(route.targets[0])
        self.fileno, own_port = self.wire.fileno, 32768 + secrets.randbelow(28000)
        for (address, port, *_), payload in zip(route.targets, frames):
            self.raw.send(craft(route.own, address, own_port, port, payload, "S"))

    def recv(self, size):
        self.packet = split(self.wire.recv(size), None)
        return self.packet.payload or b"-"  # b"" would say that the connection is over

    def send(self, payload):  # answers what recv returned last
        self.raw.send(respond(self.packet, payload))

TRANSPORTS = {"kernel": kernel, "udp": udp, "crafted": Crafted}

# A way to the server. own: this machine's address on it; targets: an address for each port.
Route = namedtuple("Route", "address own family targets")

def find_routes(host, family, ports):
    """[Route] to a host's addresses (RFC 6724 order), as far as there is one. Raises Fault."""
    try:
        # As bytes: text would load tables for names beyond ASCII (1.5 ms), and this one is ASCII.
        found = socket.getaddrinfo(host.encode(), None, family, socket.SOCK_STREAM)
    except OSError as error:
        raise Fault(NO_ANSWER, f"{host} has no address that can be found here: is it written "
                               f"right? ({error.strerror})")
    routes = []
    for family, _, _, _, (address, _, *scope) in found:
        targets = [(address, port, *scope) for port in ports]
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(targets[0])  # sends nothing: it looks up the route
            own = probe.getsockname()[0].partition("%")[0]
            routes.append(Route(address, own, family, targets))
    if not routes:
        raise Fault(NO_ANSWER, f"There is no route to {host} ({found[0][4][0]}): is the network "
                               "up here?")
    for route in routes:  # both families soon: the first of the other one becomes the second
        if route.family != routes[0].family:
            routes.remove(route)
            routes.insert(1, route)
            break
    return routes[:ADDRESSES_MAX]

# Not private by name, but no address either that a server would see (RFC 6890, 7335, 3056, 3879):
# what `ipaddress` says of these depends on its version.
BEHIND_NAT = [ipaddress.ip_network(net) for net in ("192.0.0.0/24", "2002::/16", "fec0::/10")]

def is_public(address):
    ip = ipaddress.ip_address(address)
    return ip.is_global and not any(ip in network for network in BEHIND_NAT)

def same_family(address, other):
    return (":" in address) == (":" in other)

class Exchange:
    """One knock by one route: what it sends, and what it believes. Before a challenge it believes
    nobody; and never anything but frames with k' as their key. By the challenge: that the server is
    its own, and saw the knock come from `seen`. By a result (without a challenge, too, as nobody
    else could make one): that the server did what it says. That somebody relays the knock shows
    only where this machine's own address is public, or `address` was given for this route's family:
    behind NAT without that, any `seen` is taken. Only the first challenge is answered: another one
    says that the server was restarted, and has forgotten the first; it may have acted already."""

    def __init__(self, client, route):
        self.client, self.route = client, route
        self.sealed = None  # until it is needed

    def seal(self):
        """Make the request, with a new k. It may ask for a passphrase. Raises Fault."""
        k = os.urandom(32)
        self.sealed = self.client.seal_request(k)
        self.knock_id, self.reply_key = knock_id_of(k), reply_key_of(k, self.sealed)

    def frames(self):
        """All fragments, in new frames. Raises Fault."""
        if not self.sealed:
            self.seal()
        return fragments_of(self.client.shared, self.knock_id, self.sealed,
                            len(self.route.targets))

    def answer(self, challenge, sock):
        """Prove that we have k, unless the server sees somebody between us. Raises Fault."""
        own, seen, wanted = self.route.own, challenge.seen, self.client.address
        if wanted == "any":
            expected = seen
        # `address` counts if it is of the family that either end sees (by NAT64 they differ).
        elif wanted and (same_family(wanted, own) or same_family(wanted, seen)):
            expected = wanted
        else:  # of a private address NAT shows another
            expected = own if is_public(own) else seen
        if seen != expected:
            raise Fault(RELAYED, f"The server sees {seen}, and this machine is {expected}: "
                                 "nothing was opened. If that is your NAT, knock with --address "
                                 f"{seen}; if it is not, somebody relays your knock.")
        proof = proof_of(self.reply_key, challenge.nonce)
        with suppress(OSError):
            sock.send(answer_of(self.client.shared, self.knock_id, proof, len(self.route.targets)))

class Client:
    """Who knocks, with which key, at which server."""

    def __init__(self, options):
        self.command = command_of([options.action, *options.words])
        config = Config(options.config)
        if options.host not in config.values:
            known = [name for name in config.values if name != "client"]
            raise Fault(CONFIG, f"{options.host} is not in {options.config}, which has "
                                f"{', '.join(known) or 'no server yet'}: enroll there, and "
                                f"tariq.py join {options.host} (README, The first hour).")
        sections = options.host, "client"
        config.require(*sections)
        def setting(key, option="", default=REQUIRED):  # an option goes before the config
            return parse(key, option) if option else config.get(key, sections, default)
        self.host, self.verbose = options.host, options.verbose
        self.user = setting("user", options.user)
        self.server_key = setting("server_key")
        self.home = setting("client_gpg_dir", options.gpg_dir)
        self.images = setting("img_dir", options.img_dir, default="")
        self.address = setting("address", options.address, default="")
        self.ports = setting("secret_ports", options.ports)
        self.shared = shared_key(setting("secret"), self.ports)
        self.target = setting("host", default=options.host)  # what is knocked at

    def step(self, text):
        if self.verbose:
            log(text)

    def seal_request(self, k):
        """The request with a new k in a PNG, sealed. Raises Fault."""
        request = json.dumps({"to": self.server_key, "k": k.hex(), "cmd": self.command})
        image = embed(cover_image(self.images), request.encode())
        try:
            sealed = seal(self.home, image, self.user, self.server_key)
        except Fault as fault:
            self.look_at_keys(fault)
            raise
        if len(sealed) > len(self.ports) * PIECE_MAX:
            raise Fault(CONFIG, f"The sealed request has {len(sealed)} bytes, and {len(self.ports)}"
                                f" packets carry {len(self.ports) * PIECE_MAX}: use more "
                                "secret_ports, or smaller keys.")
        self.step(f"The request is hidden in a PNG and sealed: {len(sealed)} bytes.")
        return sealed

    def look_at_keys(self, fault):
        """gpg did not seal. Raises Fault where a key is not there, or no longer good."""
        own = find_key(self.home, "--list-secret-keys", exactly(self.user))
        server = find_key(self.home, "--list-keys", self.server_key)
        if trouble := trouble_with(own, "S", self.home):
            raise Fault(BAD_DATA, f"Your key, {self.user}, {trouble}: renew it, or make one with "
                                  "tariq.py keygen; then enroll it.", fault.detail)
        if trouble := trouble_with(server, "E", self.home):
            raise Fault(BAD_DATA, f"The key of {self.host} {trouble}: enroll and join again.",
                        fault.detail)

    def knock(self, routes, transports, seconds):
        """Knock by each route and transport in turn; once one is challenged, by that one only, and
        the time begins anew; until there is a result -> (Exchange, transport, Result). Raises
        Fault."""
        exchanges = [Exchange(self, route) for route in routes]
        ways = [(exchange, transport) for transport in transports for exchange in exchanges]
        turns = itertools.cycle(ways)
        sockets = {}  # socket: the way that it is of
        challenged = None  # the exchange that was challenged first, and its challenge's nonce
        trouble = ""
        exchanges[0].seal()  # before the time runs
        began, wait = monotonic(), FIRST_WAIT
        end = began + seconds
        while monotonic() < end:
            exchange, transport = next(turns)
            frames = exchange.frames()
            self.step(f"{len(frames)} fragments go to {exchange.route.address} by {transport}.")
            try:
                sockets[TRANSPORTS[transport](exchange.route, frames)] = exchange, transport
            except (OSError, AttributeError) as error:  # the latter where there is no Fast Open
                trouble = f" ({transport}: {as_fault(error)})"
            if len(sockets) > 4:  # three SYN time-outs, and Linux stops Fast Open: close in time
                del sockets[next(iter(sockets))]
            chance = 0.75 + os.urandom(1)[0] / 510  # to 1.25: no rhythm gives repeats away
            again = min(end, monotonic() + wait * chance)
            wait = min(wait * BACKOFF, LONGEST_WAIT)
            for sock, payload in payloads(sockets, again):
                via, by = sockets[sock]
                if result := read_result(via.reply_key, payload):
                    self.took = monotonic() - began
                    return via, by, result
                challenge = read_challenge(via.reply_key, payload)
                if challenge and not challenged:
                    self.step(f"The server has unsealed it, and sees {challenge.seen}.")
                    end = monotonic() + seconds + min(999, challenge.patience)
                    challenged = via, challenge.nonce
                    turns = itertools.repeat((via, by))
                if challenge and challenged == (via, challenge.nonce):
                    via.answer(challenge, sock)
        if challenged:
            raise Fault(NO_ANSWER, f"{self.host} unsealed the knock, but sent no result. It may "
                                   "have acted: look, then knock again.")
        raise self.silence(routes, transports, seconds, trouble)

    def silence(self, routes, transports, seconds, trouble):
        """The Fault of a knock that nobody has answered: what was tried, and what time it is."""
        addresses = " and ".join(route.address for route in routes)
        return Fault(NO_ANSWER, f"No answer from {self.host} in {seconds:g} s, at {addresses} by "
                                f"{' and '.join(transports)}{trouble}. The server's log may say "
                                "why (journalctl -u tariq); it is "
                                f"{time.strftime('%T', time.gmtime())} UTC by this clock, and a "
                                "minute is too far off.")

def payloads(sockets, end):
    """Yield (socket, payload) until the end. Of `sockets`, a dict's keys, goes what is over."""
    while (left := end - monotonic()) > 0:
        for sock in select.select(sockets, [], [], left)[0]:
            with suppress(OSError):  # what the network says without the key is not to be believed
                if payload := sock.recv(2048):
                    yield sock, payload
                else:
                    del sockets[sock]

def report(client, result):
    """Print what was done. -> exit code. Raises Fault where it was refused. "opened" means: the
    server, as nobody else knows k, says that its firewall took the rule, and that it sees no reason
    why the door may be shut all the same (Iptables.doubts; it would be named); where the server has
    an open_command, only that this ended with 0. Nobody has tried whether a service answers."""
    text = result.text
    if not result.done:
        raise Fault(result.status or REFUSED,
                    f"{client.host} says: {text.decode(errors='replace')}")
    if client.command[0] != "E":  # whose output is passed on as it is, as by ssh
        words = printable(text.decode(errors="replace"))  # opened tcp/22 for ADDRESS until...
        text = words.replace(" for ", f" on {client.host} for ").encode() + b"\n"
    os.write(1, text)
    return result.status

def cmd_knock(options):
    """Knock at a server: open ports (O), close them (C), or execute a command (E). It prints what
    the server did, and needs no root. Examples:

        tariq.py knock box.example.com O 22
        tariq.py knock box.example.com E service httpd restart"""
    client = Client(options)
    routes = find_routes(client.target, options.family, client.ports)
    exchange, transport, result = client.knock(routes, options.transport, options.timeout)
    fault = None
    try:
        status = report(client, result)
    except Fault as error:
        if error.code not in (SYSTEM, MISSING):
            raise
        fault = error  # the server's ip6tables, say: perhaps the other family's works
    # ssh may take either family: open the other one's door, too. Never run a command twice.
    others = [route for route in routes if route.family != exchange.route.family]
    if others and options.action != "E":
        try:
            _, _, result = client.knock(others, [transport], 3 * client.took)
            status = report(client, result)
            if fault and options.action == "O":  # by one family one gets in
                log(f"tariq: not opened for {exchange.route.address}: {fault}")
                fault = None
        except Fault as error:  # no matter, but for a relay, and for what may still be open
            if options.action == "C" or error.code == RELAYED:
                done = "closed" if options.action == "C" else "opened"
                log(f"tariq: not {done} for {others[0].address}: {error}")
    if fault:
        raise fault
    return status

# ---- listener: packets in, requests out; unprivileged, the only reader of the wire ---------------
# Who is bounded by what                                      and what happens beyond
#   anybody: a buffer of 2 KiB, one hash of time              no frame: dropped, nothing is kept
#            RECEIVE_BUFFER in the kernel (twice)             the kernel drops
#   who has the secret, but no key:
#            SEEN_MAX nonces: two minutes of 500 frames/s     the oldest is forgotten
#            KNOCKS_MAX incomplete knocks, 38 KiB each        the oldest is dropped
#            KNOCKS_MAX complete ones, a thread each          a new one waits for its repeat
#            UNANSWERED_MAX of these from one address (/64)   the same
#            GPG_SLOTS of gpg, UNSEAL_TIME each               it waits GPG_WAIT, then is refused
#            ANSWER_TIME of a challenge                       the knock ends
#            log lines: one a knock that gpg refuses          4 slots, 15 ms: some 300 a second
#   an enrolled client, too:
#            REPEAT_TIME of a result                          the knock ends
#            one request at a time, of all clients together;  the others wait; no result is sent
#            it has some 50 ports at most, each of which may    after patience + ANSWER_TIME
#            take a few programs of 15 s
#            log lines: one a request, and one a rule         (no bound)
#            DOORS_MAX doors of its own                       the oldest is closed
#            COMMANDS_MAX commands of all clients             refused
#            command_timeout of each                          killed
#   all that Tariq runs, in the service: MemoryMax and TasksMax of UNIT. Nothing else bounds what a
#   permitted command does. Four slow seals, again and again, keep all other knocks waiting.
#
# Replays                                                     fail at (its challenge: it draws one,
#                                                             which takes k to be answered)
#   the same packet again                                     `gate`: its nonce is in self.seen
#   the same packet, when floods made self.seen forget it     `gate`, CLOCK_SKEW after its stamp;
#                                                             until then its challenge
#   the same packet after a restart                           `gate`: it is from before self.began
#   the same packet in the minute after a restart, of a       its challenge
#     client whose clock is ahead; or when the server's
#     clock was set back to before the start
#   the same request in new frames, by who has the secret     `collect`, while its id is known; then
#                                                             `unseal`, after SIGNED_WITHIN; else
#                                                             its challenge
#   the same request at another server                        `dialogue`: "to" is another key
#   a client's own repeats after a restart                    that client: Exchange
#
# Whoever sees a client's packets can make its knocks fail, by copies that come first, from another
# address, and with the secret by fragments of his own. Whoever is on the way can drop them. None of
# that lets anybody in. Who relays whole knocks of a client behind NAT may get in (Exchange).
#
# A listener that was taken over (a hole in gpg, Pillow, scapy) can:
# - ask the monitor what Monitor.handle says;
# - copy K; copy, change and replace what is in the server's keyring, also for the next start;
# - change what gpg says to the next init, check or enroll, where it runs as the same user. (So
#   compare the fingerprints that keygen and enroll print.)
# - send any packet by its packet socket, on any interface; receive by it what its filter passes;
# - do what any unprivileged user can, with the network, too.
# It cannot be root, or itself change the config, a rule or another user's file.
SEEN_MAX = 65_536  # nonces and ids of ended knocks that are remembered
KNOCKS_MAX = 512  # with 10 s of repeats each: 51 a second
UNANSWERED_MAX = 16
GPG_SLOTS, GPG_WAIT = 4, 10  # runs of gpg at once; seconds for which a knock waits for one
ANSWER_TIME = 30  # seconds from the challenge to its answer
REPEAT_TIME = 10  # seconds in which a result is repeated
COMPLAINT_TIME = 60  # seconds between two log lines of one kind
MESSAGE_MAX = 8192  # bytes of a message between listener and monitor
RECEIVE_BUFFER = 4 << 20  # bytes of packets that wait; the kernel doubles it: what garbage can pin
ENDED = b"ended "  # what tells an ended knock's id from a nonce in `seen`
PR_SET_DUMPABLE = 4  # linux/prctl.h

def succeed(result):
    """Of a function of the C library's. Raises OSError where it has failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

def in_thread(function, *arguments):
    """Start it in a thread, which ends with this process."""
    threading.Thread(target=function, args=arguments, daemon=True).start()

class Knock:
    """From its first fragment to the last repeat of its result."""

    def __init__(self):
        self.pieces = {}  # position: fragment
        self.packet = None  # the newest of its client's: where replies go
        self.source = None  # its address, until somebody has answered for it
        self.frames = queue.Queue(4)  # its repeats and answers, for the thread that serves it
        self.result = queue.Queue()  # the monitor's

class Listener:
    """Gate and reassembly in one thread, and a thread a knock for the dialogue. Bounded memory."""

    def __init__(self, sock, channel, settings):
        self.sock = sock  # the packet socket
        self.channel = channel  # to the monitor
        self.home, self.own_key = settings["home"], settings["own_key"]
        self.patience = settings["patience"]
        self.shared, self.ports = bytes.fromhex(settings["shared"]), settings["ports"]
        self.last = len(self.ports) - 1  # the last fragment's position
        self.gpg_slots = threading.Semaphore(GPG_SLOTS)
        self.began = time.time()
        self.partial = OrderedDict()  # knock id: Knock of which fragments are missing
        self.lock = threading.Lock()  # of these two, which threads share
        self.seen = OrderedDict()  # nonces of frames and ids of ended knocks, the oldest first
        self.knocks = {}  # knock id: Knock that a thread serves
        self.complained = {}  # kind: when

    # == Bytes that anybody may have sent: from here, through `split`, `read_knock`, `unframe` and
    # `keyed`. They take a buffer and a hash; they keep, log, send and start nothing. At a client
    # `payloads`, `Crafted.recv`, `read_result` and `read_challenge` do as little.
    # Exception: a recorded frame has a right tag. If it comes second, `gate` drops it: in silence,
    # or, if it is old, with a log line a minute at most. If it overtakes the original, it is taken
    # for that: gpg runs, and the challenge goes to who sent the copy, and cannot answer it; that is
    # a log line, too. ==
    def receive(self):
        while True:
            if passed := self.gate(*self.sock.recvfrom(2048)):
                self.collect(*passed)

    def gate(self, data, link):
        """An authentic frame of now, new, at its own port -> (position, id, piece, Packet); else
        None, and nothing is kept of it. Position: a fragment's, or above last: an answer."""
        packet = split(data, link)
        opened = read_knock(self.shared, packet.payload)
        if not opened:
            return None
        # == to here. Who made it has the secret; who it is, gpg will say. ==
        stamp, position, knock_id, piece = opened
        sent, now, nonce = stamp / 1000, time.time(), packet.payload[TAG:TAG + NONCE]
        # What is from before the start is refused, as its nonces are unknown. If the clock was set
        # back to before the start, that would refuse everything until it is there again.
        clock_went_back = now < self.began
        old = sent <= self.began and not clock_went_back
        if old or abs(now - sent) > CLOCK_SKEW:
            self.complain("clock", f"{ip_text(packet.sender)} sent an authentic frame of "
                                   f"{abs(now - sent):.0f} s {'ago' if sent < now else 'from now'}"
                                   f"{', before this start' if old else ''}: its clock or this one "
                                   "is wrong, or it is a recording.")
            return None
        if packet.own_port != self.ports[min(position, self.last)] or not self.remember(nonce):
            return None
        return position, knock_id, piece, packet

    def remember(self, token):
        """-> whether it is new."""
        with self.lock:
            if token in self.seen:
                return False
            self.seen[token] = None
            if len(self.seen) > SEEN_MAX:
                self.seen.popitem(last=False)
        return True

    def collect(self, position, knock_id, piece, packet):
        """A frame to its knock, whose address is where its last fragment first came from."""
        with self.lock:
            knock, ended = self.knocks.get(knock_id), ENDED + knock_id in self.seen
        if knock:  # a thread serves it: a last fragment again, or an answer, is for that thread
            if position >= self.last and packet.sender == knock.packet.sender:
                knock.packet = packet  # replies go to the newest
                with suppress(queue.Full):  # never waits: its client repeats itself
                    knock.frames.put_nowait(piece)
        elif position <= self.last and not ended:
            knock = self.partial.setdefault(knock_id, Knock())
            if len(self.partial) > KNOCKS_MAX:
                self.partial.popitem(last=False)
            knock.pieces.setdefault(position, piece)
            if position == self.last and not knock.packet:
                knock.packet = packet
            if len(knock.pieces) == len(self.ports):
                del self.partial[knock_id]
                self.begin(knock_id, knock)

    def begin(self, knock_id, knock):
        """A thread for a whole knock. One beyond the limits is dropped: its repeat asks again."""
        knock.source = knock.packet.sender[:8]  # IPv4, or IPv6's /64
        with self.lock:
            sources = [other.source for other in self.knocks.values()]
            if len(sources) < KNOCKS_MAX and sources.count(knock.source) < UNANSWERED_MAX:
                with suppress(RuntimeError):  # the system has no more
                    in_thread(self.serve, knock_id, knock)
                    self.knocks[knock_id] = knock  # who looks for it waits for the lock

    def serve(self, knock_id, knock):
        address, refusal = ip_text(knock.packet.sender), None
        try:
            self.dialogue(knock_id, knock, address)
        except Exception as error:  # whatever becomes of one knock, the next is served
            refusal = as_fault(error)
            self.log(f"{address}: knock refused: {refusal} {refusal.detail}")
        if not refusal or refusal.code != SYSTEM:  # where gpg had no time, a repeat tries again
            self.remember(ENDED + knock_id)  # before it goes: its repeats shall start no gpg
        with self.lock:
            del self.knocks[knock_id]

    def dialogue(self, knock_id, knock, address):
        """The server's side of the exchange. Raises Fault."""
        sealed = b"".join(piece for _, piece in sorted(knock.pieces.items()))
        if not self.gpg_slots.acquire(timeout=GPG_WAIT):
            raise Fault(SYSTEM, "too many knocks at once.")
        try:
            signer, png = unseal(self.home, sealed, self.own_key)
        finally:
            self.gpg_slots.release()
        try:
            request = json.loads(extract(png))
            k, command = bytes.fromhex(request["k"]), command_of(request["cmd"])
            if request["to"] != self.own_key or knock_id_of(k) != knock_id:
                raise ValueError
        except Exception:  # whatever else was signed: Pillow has many for bad files
            raise Fault(BAD_DATA, f"{signer} signed no request, or one for another server or "
                                  "knock.")
        # Nothing was sent so far, and a Fault above sends nothing: `serve` logs it. Any signer of
        # the keyring draws a challenge; what he may, the monitor decides. From here on replies (the
        # challenge, and to who answers it the result) go to the address that the knock's last
        # fragment first came from, and to no other (`collect`).
        reply_key, nonce = reply_key_of(k, sealed), os.urandom(32)
        expected, end = proof_of(reply_key, nonce), monotonic() + ANSWER_TIME
        while True:
            self.reply(knock, challenge_of(reply_key, nonce, self.patience, address))
            piece = self.next_frame(knock, end)
            if piece is None:
                return self.log(f"{address}: {signer} got a challenge, and did not answer it: lost "
                                "on the way, or the client got in by another, or somebody relays "
                                "its knocks.")
            if hmac.compare_digest(piece, expected):
                break  # else it is the knock again: its client still waits for the challenge
        knock.source = None
        self.tell(request=[knock_id.hex(), signer, command, knock.packet.sender.hex()])
        with suppress(queue.Empty):  # the monitor is busy for longer than this
            result = knock.result.get(timeout=self.patience + ANSWER_TIME)
            end = monotonic() + REPEAT_TIME
            while piece is not None:  # the answer; then each repeat
                self.reply(knock, frame(reply_key, b"result", result))
                piece = self.next_frame(knock, end)

    def next_frame(self, knock, end):
        """What the client sends again, or its answer; None when the time is over."""
        left = end - monotonic()
        with suppress(queue.Empty):
            if left > 0:
                return knock.frames.get(timeout=left)
        return None

    def reply(self, knock, payload):
        """To where the knock came from, by the interface and link address that it came by."""
        packet = knock.packet
        name, protocol, kind, hardware, address = packet.link
        data = respond(packet, payload)
        try:
            # struct sockaddr_ll (packet(7)) by hand: a tunnel over IPv6 wants 28 bytes or more of
            # it, and Python gives 20.
            where = struct.pack("HHiHBB32s", socket.AF_PACKET, socket.htons(protocol),
                                socket.if_nametoindex(name), hardware, kind, len(address), address)
            succeed(LIBC.sendto(self.sock.fileno(), data, len(data), 0, where, len(where)))
        except OSError as error:  # the client repeats itself
            self.complain("reply", f"{ip_text(packet.sender)}: a reply cannot be sent by {name}: "
                                   f"{error.strerror}.")

    def complain(self, kind, text):
        """Log it, unless there was one of this kind just now."""
        if monotonic() - self.complained.get(kind, -COMPLAINT_TIME) >= COMPLAINT_TIME:
            self.complained[kind] = monotonic()
            self.log(text)

    def log(self, text):
        self.tell(log=text[:600])  # as JSON 12 bytes a character at most: fits MESSAGE_MAX

    def tell(self, **message):
        """For Monitor.handle: log=text, ready=True, request=[knock id, signer, command, address];
        and once, by cmd_listener: fault=[exit code, text]."""
        self.channel.send(json.dumps(message).encode())

    def take_results(self):
        """id | done, status, text from the monitor, each to the thread that waits."""
        while message := self.channel.recv(MESSAGE_MAX):
            with self.lock:
                knock = self.knocks.get(message[:ID])
            if knock:
                knock.result.put(message[ID:])

def process_status():
    """{name: value} of this process (proc(5), /proc/pid/status)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return dict(line.split(":", 1) for line in file)

def check_unprivileged():
    """Raises Fault where any id, group or capability of root's is left."""
    status = process_status()
    root = "0" in status["Uid"].split() + status["Gid"].split()
    capable = any(int(status[name], 16) for name in status if name.startswith("Cap"))
    if root or capable or status["Groups"].split() or status["NoNewPrivs"].strip() != "1":
        raise Fault(DIED, "The listener still has a privilege of root's: chown -R tariq: the "
                          "server_gpg_dir.")

def keep_to_itself():
    """No other process of this user reads this one's memory, which has K, nor does a core dump
    (prctl(2)). And it leaves root's session keyring (keyrings(7)), so that nothing here reads its
    keys. Raises OSError."""
    succeed(LIBC.prctl(PR_SET_DUMPABLE, 0))
    with suppress(OSError):  # without that library there are rarely such keys
        ctypes.CDLL("libkeyutils.so.1").keyctl_join_session_keyring(None)

def cmd_listener(descriptors):
    """What the monitor starts: two descriptors, its packet socket and its end of the channel."""
    sock, channel = (socket.socket(fileno=int(number)) for number in descriptors)
    try:
        check_unprivileged()
        keep_to_itself()  # before there is a secret in it
        listener = Listener(sock, channel, json.loads(channel.recv(MESSAGE_MAX)))
        ip_layers()  # now, so that no knock waits for it, nor for Pillow:
        import PIL.PngImagePlugin
        key = find_key(listener.home, "--list-secret-keys", listener.own_key)  # starts gpg-agent
        if trouble := trouble_with(key, "E", listener.home):
            raise Fault(CONFIG, f"The server's key {trouble}: tariq.py check")
        in_thread(listener.take_results)
        listener.tell(ready=True)
        listener.receive()
    except Exception as error:  # its stderr is /dev/null: the monitor says it
        fault = as_fault(error)
        words = f"{fault} {fault.detail}".strip()
        with suppress(OSError):  # a close with something unread would throw away what is sent below
            channel.recv(MESSAGE_MAX, socket.MSG_DONTWAIT)
        channel.send(json.dumps({"fault": [fault.code, words[:600]]}).encode())

# ---- programs: every one that root starts. AS ROOT, like all that follows ------------------------
# No shell. Environment: PATH alone (of the listener HOME=/ alone; of gpg LC_ALL and GPG_TTY, too).
# Started by timeout(1) (t) or setpriv(1) (s) or both, which read no option behind the program's
# name. In the service: in the unit's sandbox.
#   program                                    by               as               time      output
#   iptables, ip6tables, -restore, -legacy  t  Iptables         root             15 s      1 MiB
#   open_command, close_command             t  Commands         root             15 s      1 MiB
#   a client's permitted command (E)       st  Monitor.execute  root             patience  1 MiB
#   ss, firewall-cmd, id, timedatectl       t  hide, check ...  root             15 s      1 MiB
#   useradd, systemctl                      t  init             root             15-120 s  1 MiB
#   gpg (for a knock the listener does it)  s  init, check ...  keyring's owner  60 s      no bound
#   gpgconf                                st  make_server      keyring's owner  15 s      1 MiB
#   this file, as the listener              s  start_listener   keyring's owner  no limit  /dev/null
# Arguments: literal words in the call; the config's, which are the admin's; and, from others, only
# ports (digits), addresses (as ipaddress prints them), fingerprints, {user} (a client's name, as
# CLIENT has it): none of these begins with -. And E's, which can, if `forbidden` lets them.
# No word is split or joined: {fields} are filled in after the splitting. (knock, keygen and join
# are yours: their gpg has your environment.)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAM_TIME = 15  # seconds
OUTPUT_ROOM = 1 << 20  # bytes that a program may print before it has to wait, until it is killed
F_SETPIPE_SZ = 1031  # linux/fcntl.h

def need_root():
    if os.geteuid():
        raise Fault(SYSTEM, f"This needs root: sudo {sys.argv[0]} {sys.argv[1]}")
    os.environ.clear()  # no program that root starts gets the caller's environment
    os.environ["PATH"] = PATH

def launch(words, seconds, before=(), data=b""):
    """Start a program, by `before`; after `seconds` timeout(1) kills it and its group. `data`, of
    less than a pipe's 64 KiB, is its stdin."""
    # -k is for E: when this server dies, timeout gets TERM (by the setpriv --pdeathsig of
    # `execute`), passes it on, and kills 1 s later.
    process = Popen([*before, "timeout", "-k", "1", "-s", "KILL", str(seconds), *words], cwd="/",
                    stdin=PIPE, stdout=PIPE, stderr=STDOUT, start_new_session=True)
    with suppress(OSError), process.stdin as pipe:
        pipe.write(data)
    with suppress(OSError):
        fcntl.fcntl(process.stdout, F_SETPIPE_SZ, OUTPUT_ROOM)
    os.set_blocking(process.stdout.fileno(), False)  # a daemon it leaves may hold the pipe open
    return process

def finished(process):
    """Wait for a process -> (exit status, its output); a signal's number as in a shell."""
    status = process.wait()
    with process.stdout as pipe:
        output = pipe.read(OUTPUT_ROOM) or b""
    return status if status >= 0 else 128 - status, output

def query(*words, seconds=PROGRAM_TIME, data=b""):
    """Run a program -> (exit status, its output). Not logged: it changes nothing. Raises Fault
    where it is missing."""
    status, output = finished(launch(words, seconds, data=data))
    if status == NOT_FOUND:
        raise missing(words[0])
    return status, output.decode(errors="replace")

def run(*words, accept=0, seconds=PROGRAM_TIME, data=b"", shown=""):
    """Log and run a program that changes something -> (exit status up to `accept`, its output).
    `shown` is what the log says of data. Raises Fault."""
    log(f"+ {shlex.join(words)}{shown}")
    status, output = query(*words, seconds=seconds, data=data)
    if status > accept:
        raise Fault(SYSTEM, f"{words[0]} failed: {output.strip()[:300] or f'status {status}'}")
    return status, output

# ---- doors: what opens and closes ports, and what hides all others -------------------------------
# A door ends open_timeout after it was opened. The kernel ends it, whoever is dead, where the rule
# says {until} (xt_time; made of Door.until, by the wall clock) or the command {seconds} (nft's
# timeout; what is left until Door.deadline, by a clock that nobody sets). `close_ended` ends it,
# too, at Door.deadline, while the server runs. Without {until} and {seconds} nobody else does; and
# where the kernel has no xt_time the server takes {until} out of the default's rule, and says so.
# Two clients behind one address share its doors: the later end holds, and only the client who has
# that closes the door. They share UNANSWERED_MAX, too.
# Two servers on one machine need two chains (take_lock refuses a second one with the same chain, or
# a second one with an open_command), no public_ports (what one of them hides, the other's doors
# would not open), and two users (else a listener that is taken over has both keyrings). On two
# machines they share nothing: a request names its server.
TIME_LIMIT = " -m time --datestop {until}"  # of a rule: the kernel itself ends it (xt_time)
RULE_OF_A_DOOR = ("-A tariq -s {ip} -p {protocol} -m conntrack --ctstate NEW -m {protocol} "
                  "--dport {dport}" + TIME_LIMIT + " -j ACCEPT")
LAST_SECOND = 2**31 - 1  # that xt_time takes: the end of a door that has none
NFT_SECONDS_MAX = 99_999_999  # that nft takes as a timeout

class Door:
    """One address, or the network around it, may make new connections to one port until its end.
    Connections that are there when it ends go on."""

    def __init__(self, ip, port, user, seconds, templates):
        self.ip, self.port, self.user, self.seconds = ip, port, user, seconds
        self.family = 6 if ":" in ip else 4
        self.number, self.protocol = port.split("/")
        self.net = str(ipaddress.ip_network(f"{ip}/{24 if self.family == 4 else 64}", strict=False))
        self.source = self.net if "{net}" in templates[self.protocol] else ip  # who may come in
        self.key = self.source, port
        self.deadline = monotonic() + seconds if seconds else None  # for `close_ended`
        self.until = time.time() + seconds if seconds else LAST_SECOND  # for the kernel and people

    def __str__(self):
        return f"{self.protocol}/{self.number}"

    def end(self):
        if not self.seconds:
            return "closed"
        return time.strftime("%F %TZ" if self.seconds >= 86400 else "%TZ", time.gmtime(self.until))

    def fill(self, template):
        """The words of a template, with its {fields}. Other braces stay as they are."""
        left = max(1, round(self.deadline - monotonic())) if self.deadline else NFT_SECONDS_MAX
        fields = {
            "ip": self.ip, "net": self.net, "version": str(self.family), "user": self.user,
            "dport": self.number, "protocol": self.protocol,
            "seconds": str(left),
            "until": time.strftime("%FT%T", time.gmtime(min(self.until, LAST_SECOND))),
        }
        def value(match):
            return fields.get(match[1], match[0])
        return [re.sub(r"\{(\w+)\}", value, word) for word in shlex.split(template)]

@contextmanager
def closing_on():
    """At the end: whatever becomes of one door or family, the others are closed."""
    try:
        yield
    except Exception as error:
        log(f"{as_fault(error)} Doors may be open.")

IPTABLES = {4: "iptables", 6: "ip6tables"}
WAIT = ("-w", "5")  # seconds for the lock that iptables' programs share
EXAMPLES = {4: "192.0.2.1", 6: "2001:db8::1"}  # documentation addresses, to try a rule with
ESTABLISHED = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
# What goes on where all else is dropped: answers and errors; of IPv6 (RFC 4890, 4.4) errors 1-4,
# neighbour discovery 133-136, multicast listener discovery 130-132 and 143; DHCP's answers.
KEPT = {
    4: [ESTABLISHED, "-i lo -j ACCEPT",
        "-d 255.255.255.255/32 -p udp -m udp --sport 67 --dport 68 -j ACCEPT"],  # draws no ICMP
    6: [ESTABLISHED, "-i lo -j ACCEPT", "-s fe80::/10 -p udp -m udp --dport 546 -j ACCEPT",
        *(f"-p ipv6-icmp -m icmp6 --icmpv6-type {number} -j ACCEPT"
          for number in (1, 2, 3, 4, 130, 131, 132, 133, 134, 135, 136, 143))],
}

class Iptables:
    """Doors are rules in a chain of ours; another one hides what is not public, where the config
    has public_ports. A stop empties the first, and leaves the rest.

        INPUT                   tariq                       tariq-hide
          -j tariq                ACCEPT what is established  ACCEPT what KEPT says
          -j tariq-hide           ACCEPT a door's address     RETURN public ports
          others' rules, policy   ...                         DROP"""

    def __init__(self, config):
        self.chain = config.get("iptables_chain", default="tariq")
        self.hiding_chain = f"{self.chain}-hide"
        self.templates = {protocol: config.get(f"open_{protocol}_port", default=RULE_OF_A_DOOR)
                          for protocol in ("tcp", "udp")}
        self.public_ports = config.get("public_ports", default=None)  # None: INPUT is not ours
        self.last_port = config.get("secret_ports", default=[0])[-1]
        self.families = set(IPTABLES)  # in which there may be doors, of an earlier server, too

    def rules(self, family, chain="INPUT", *options):
        """The lines of a chain, as -S prints them. Raises Fault."""
        status, output = query(IPTABLES[family], *WAIT, *options, "-S", chain)
        if status:
            raise Fault(SYSTEM, f"{IPTABLES[family]} does not work here: {output.strip()[:200]}")
        return output.splitlines()

    def transact(self, family, lines):
        """Change the filter table in one step or not at all (iptables-restore(8)). Raises Fault."""
        shown = [line for line in lines if not line.startswith(f"-A {self.hiding_chain}")]
        hiding = f"; and {self.hiding_chain}'s rules" if len(shown) < len(lines) else ""
        text = "\n".join(lines)
        run(f"{IPTABLES[family]}-restore", *WAIT, "--noflush",
            data=f"*filter\n{text}\nCOMMIT\n".encode(), shown=f": {'; '.join(shown)}{hiding}")

    def put_back(self, family, anew=False):
        """If INPUT lacks a jump of ours, or `anew` (at the start): make chains and jumps again; all
        doors are lost. Else change nothing. -> INPUT's rules. Raises Fault."""
        rules = self.rules(family)
        if not anew:
            if self.jumps() <= set(rules):
                return rules
            log(f"{IPTABLES[family]}: what Tariq needs in INPUT was not there (a flush, a reload "
                "of the firewall, a new public_ports?): it is put back, without doors.")
        self.transact(family, [*self.empty_chain(family, rules),
                               *self.linking_lines(family, rules)])
        return self.rules(family)

    def empty_chain(self, family, rules):
        """The lines that make our chain, or empty it. Its first rule accepts what is established,
        and makes the kernel begin to track connections, so that a later `hide` does not cut them.
        Where INPUT has no other rules (a flush), and its policy drops all, KEPT is added, without
        which the machine would lose its neighbours and DHCP."""
        ours = self.ours(rules)
        others = [rule for rule in rules if rule.startswith("-A") and rule not in ours]
        flushed_and_shut = not others and "-P INPUT DROP" in rules
        kept = KEPT[family] if flushed_and_shut else [ESTABLISHED]
        return [f":{self.chain} - [0:0]", *(f"-A {self.chain} {rule}" for rule in kept)]

    def ours(self, rules):
        """Which rules of INPUT lead to a chain of ours."""
        return [rule for rule in rules
                if rule.endswith((f"-j {self.chain}", f"-j {self.hiding_chain}"))]

    def jumps(self):
        """The rules of INPUT that are ours."""
        jumps = {f"-A INPUT -j {self.chain}"}
        if self.public_ports is not None:
            jumps.add(f"-A INPUT -j {self.hiding_chain}")
        return jumps

    def linking_lines(self, family, rules, limit=""):
        """The lines that put our jumps first in INPUT, in place of those that are there. limit: the
        words by which the kernel ends the second, during a trial. (-I puts in front: the last line
        becomes the first rule.)"""
        lines = [rule.replace("-A", "-D", 1) for rule in self.ours(rules)]
        if self.public_ports is not None:
            public = ["-p {1} -m {1} --dport {0} -j RETURN".format(*port.split("/"))
                      for port in self.public_ports]  # RETURN: other rules of INPUT still hold
            # During the trial, connections that are older than the kernel's tracking go on: all TCP
            # but a first SYN passes. Not at the knock's last port: the kernel would answer the
            # client there by RST, and end the knock. So these two, in this order:
            untracked = [
                f"-p tcp -m tcp --dport {self.last_port} -j DROP",
                "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN"] if limit else []
            lines += [f":{self.hiding_chain} - [0:0]",
                      *(f"-A {self.hiding_chain} {rule}"
                        for rule in [*KEPT[family], *public, *untracked, "-j DROP"]),
                      f"-I INPUT {limit}-j {self.hiding_chain}"]
        return [*lines, f"-I INPUT -j {self.chain}"]

    def drops(self, rules):
        """Whether INPUT drops what nothing accepts, as far as iptables can tell."""
        now = time.strftime("%FT%T", time.gmtime())
        for rule in rules:
            trial = re.search(rf"--datestop (\S+) -j {self.hiding_chain}$", rule)  # of `hide`
            if rule == f"-A INPUT -j {self.hiding_chain}" or (trial and now < trial[1]):
                return True
        return "-P INPUT DROP" in rules \
            or re.match("-A INPUT -j (DROP|REJECT)( |$)", rules[-1]) is not None

    def prepare(self):
        """At the start: close every door, and link the chains. Raises Fault, before anything is
        hidden, where no door could be made for IPv4. IPv6 is hidden without doors, too."""
        self.try_rules(4)
        for family, program in IPTABLES.items():
            linked = False
            try:
                rules = self.put_back(family, anew=True)
                linked = True
                if family == 6:
                    self.try_rules(6)
                if doubts := self.doubts(family, rules):
                    log(f"{program}: {doubts} (README, When it does not work).")
            except Fault as fault:
                if family == 4:
                    raise
                self.families.discard(family)
                if linked or self.public_ports is None:
                    log(f"No doors for IPv6: {fault}")
                else:
                    log(f"No doors for IPv6, and nothing of it is hidden: {fault}")
        if not all("{until}" in template for template in self.templates.values()):
            log("This server ends doors, not the kernel: kill -9 leaves them open.")

    def example_doors(self, family):
        """A door of each protocol, to try the rules with."""
        return [Door(EXAMPLES[family], port, "", 1, self.templates) for port in ("9/tcp", "9/udp")]

    def check_rules(self, family):
        """Raises Fault where a rule is none. Changes nothing."""
        for door in self.example_doors(family):
            # Without the default's time limit: what a kernel says to that, `try_rules` sees.
            status, output = query(*self.words("-C", door, limit=""))
            if status == 2:  # it is no rule; 1: it is not there
                raise Fault(CONFIG, f"open_{door.protocol}_port is no rule of {IPTABLES[family]}: "
                                    f"{output.strip()[:200]}")

    def takes(self, door):
        """Add a door's rule -> False where it is refused. True also where another program has the
        lock. (By its words: the exit status for that is also the one for a kernel's refusal.)"""
        status, output = query(*self.words("-A", door))
        return status == 0 or "xtables lock" in output

    def try_rules(self, family):
        """Add rules that open doors, and delete them. Raises Fault where iptables or this kernel
        refuses one."""
        query(IPTABLES[family], *WAIT, "-N", self.chain)  # where it is not there yet
        self.check_rules(family)
        for door in self.example_doors(family):
            # Twice, as the kernel may be short of memory once; then without the time limit, if that
            # is the default's; and what is refused then is a Fault.
            if not self.takes(door) and not self.takes(door):
                if family == 4 and TIME_LIMIT in self.templates[door.protocol]:
                    log("iptables refuses a rule with a time limit: no xt_time here?")
                    for protocol, template in self.templates.items():
                        self.templates[protocol] = template.replace(TIME_LIMIT, "")
                run(*self.words("-A", door))  # adds it, or raises Fault
            query(*self.words("-D", door))

    def words(self, action, door, limit=TIME_LIMIT):
        """The command line that adds (-A), deletes (-D) or looks for (-C) a door's rule."""
        template = self.templates[door.protocol].replace(TIME_LIMIT, limit)
        rule = door.fill(template)[2:]  # without its -A CHAIN
        return [IPTABLES[door.family], *WAIT, action, self.chain, *rule]

    def open(self, door):
        """Open a door -> why it may be shut all the same, or hides nothing: words, or ''."""
        self.families.add(door.family)
        add = self.words("-A", door)
        log(f"+ {shlex.join(add)}")
        adding = launch(add, PROGRAM_TIME)
        rules = self.rules(door.family)  # beside it, as a client waits for both
        status, _ = finished(adding)
        if status or not self.jumps() <= set(rules):
            rules = self.put_back(door.family)
            run(*add)  # once more: the chain is there now, and no lock in the way
        return self.doubts(door.family, rules)

    def doubts(self, family, rules):
        """What rules of INPUT are not as doors need them, in words, or ''."""
        found, doors = [], f"-A INPUT -j {self.chain}"
        if doors not in rules:
            found.append("INPUT does not lead to the doors (does the server run?)")
        elif not all(rule.endswith("-j ACCEPT") for rule in rules[:rules.index(doors)]
                     if rule.startswith("-A")):
            found.append("another rule stands before Tariq's in INPUT, and may refuse you")
        if rules[0].startswith("#"):  # a warning: the older kind of iptables has rules, too
            older = f"{IPTABLES[family]}-legacy"
            with suppress(Fault):  # it is missing
                if re.search("DROP|REJECT", query(older, "-S", "INPUT")[1]):
                    found.append(f"the rules of {older} may refuse you")
        if not self.drops(rules):
            found.append("INPUT drops nothing: no port is hidden")
        return "; ".join(found)

    def close(self, door):
        """-> whether it was open."""
        return run(*self.words("-D", door), accept=1)[0] == 0

    def stop(self, _doors):  # it needs no list: it empties its chain
        for family in self.families:
            with closing_on():
                rules = self.rules(family)
                if self.ours(rules):
                    self.transact(family, self.empty_chain(family, rules))

class Commands:
    """Doors are whatever open_command and close_command make them."""

    def __init__(self, config):
        self.chain = "commands"  # in the name of the server's lock
        self.opening, self.closing = config.get("open_command"), config.get("close_command")
        if ("{net}" in self.opening) != ("{net}" in self.closing):
            raise Fault(CONFIG, "open_command and close_command need the same of {ip} and {net}.")
        if config.get("public_ports", default=None) is not None:
            raise Fault(CONFIG, "public_ports hides by iptables, and this config has an "
                                "open_command: hide by its firewall, without public_ports.")
        self.templates = {"tcp": self.opening, "udp": self.opening}
        self.public_ports = None
        self.firewall_ends_doors = "{until}" in self.opening or "{seconds}" in self.opening

    def prepare(self):
        if not self.firewall_ends_doors:
            log("This server ends doors, not the firewall: kill -9 leaves them open.")

    def put_back(self, family):
        pass  # open_command's business

    def open(self, door):
        run(*door.fill(self.opening))
        return ""

    def close(self, door):
        # Where the firewall ends doors, this one may be gone already: then close_command fails, as
        # nft does, and that is no fault. From 124 on it was timeout(1) that could not start it, or
        # killed it, and that is one.
        accept = 123 if self.firewall_ends_doors else 0
        status, output = run(*door.fill(self.closing), accept=accept)
        if status:
            log(f"close_command: {output.strip()[:300] or status}")
        return status == 0

    def stop(self, doors):
        for door in doors:
            with closing_on():
                self.close(door)

def firewall_of(config):
    """What makes the doors of a config. Raises Fault."""
    return Commands(config) if "open_command" in config.values["server"] else Iptables(config)

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what ends `hide` and `server`
TRIAL = 120  # seconds for which `hide` hides, unless a connection comes in through a door

def cmd_hide(options):
    """Hide all ports of this server but those named, as root. After two minutes the kernel opens
    them again, unless somebody has come in by a knock until then. Examples:

        sudo tariq.py hide 80 443/tcp 443/udp
        sudo tariq.py hide --undo"""
    need_root()
    ports = [port_of(word) for word in options.ports]
    if ports and options.undo:
        raise Fault(USAGE, "--undo takes no ports: it hides nothing any more.")
    config = Config(options.config, root=True)
    firewall = Iptables(config)
    if take_lock(firewall.hiding_chain) is None:
        raise Fault(SYSTEM, "hide runs already, in another terminal: end it there (Ctrl-C).")
    if options.undo:
        return unhide(config, firewall)
    config.require("server")
    if "open_command" in config.values["server"]:
        raise Fault(CONFIG, "hide works with iptables, and this config has an open_command.")
    firewalld = "/usr/bin/firewall-cmd"
    if os.path.exists(firewalld) and query(firewalld, "--state")[0] == 0:
        raise Fault(CONFIG, "firewalld runs here, and would flush what hide makes: hide by its "
                            "means (README, Firewalls of your own).")
    if firewall.public_ports is not None:
        raise Fault(USAGE, "This machine is hidden already. To change what stays public, edit "
                           f"public_ports in {config.path}, and restart the server.")
    if take_lock(firewall.chain) is not None:
        raise Fault(SYSTEM, "No server runs that could let you in: sudo systemctl start tariq")
    if not try_hiding(config, firewall, ports):
        raise Fault(NO_ANSWER, "Nobody came in through a door: all is as it was before. "
                               "sudo tariq.py check says what is wrong.")
    log("A connection came in through a door: hidden for good, also after a reboot. "
        "sudo tariq.py hide --undo ends it.")

def try_hiding(config, firewall, ports):
    """Hide for a trial; for good if a connection comes in through a door -> whether one did.
    What changes, in INPUT alone (what Docker forwards is not hidden): its first rule leads to the
    doors, and its second to a chain that lets by what KEPT says and the public ports (and, during
    the trial, TCP but first SYNs: linking_lines), and drops the rest. The second bears its own end:
    after TRIAL seconds, by the wall clock, the kernel passes it by, whatever became of this
    program, the session or the network. Only after a door has let the first packet of a connection
    in: that rule without an end, and the line public_ports in the config. (That packet shows the
    way in, not that a service answered.) `hide --undo` takes rule, chain and line out."""
    for family in IPTABLES:
        with suppress(Fault):  # the call of hide() below raises it
            firewall.put_back(family)
    firewall.public_ports = ports
    for number in ENDING:  # they undo it, also where a background job's shell has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    kept = False
    before = packets_in(firewall)
    try:
        hide(firewall, time.strftime("-m time --datestop %FT%T ", time.gmtime(time.time() + TRIAL)))
        hidden = [port for port in listening_ports() if port not in ports]
        log(f"Hidden for {TRIAL} seconds, whatever happens: {' '.join(hidden) or 'nothing listens'}"
            f". Public as before: {' '.join(ports) or 'none'}. All else is dropped.")
        log("Now, in another terminal, on a client: knock (O 22), then connect (ssh).")
        end = monotonic() + TRIAL
        while monotonic() < end and not kept:
            time.sleep(1)
            now = packets_in(firewall)
            if any(count > before.get(rule, 0) for rule, count in now.items()):  # one came in
                hide(firewall)
                set_public_ports(config.path, ports)
                kept = True
            before = now
    finally:
        if not kept:
            unhide(config, firewall)
    return kept

def hide(firewall, limit=""):
    for family, program in IPTABLES.items():
        try:
            rules = firewall.rules(family)
            firewall.transact(family, firewall.linking_lines(family, rules, limit))
        except Fault as fault:
            if family == 4 or os.path.exists("/proc/net/if_inet6"):
                raise Fault(SYSTEM, f"Nothing is hidden. {program}-restore refuses it. Without a "
                                    "rule that ends by itself (xt_time in the kernel) there is no "
                                    "way back.", str(fault))
            log(f"This kernel has no IPv6: {program} has nothing to hide.")

def unhide(config, firewall):
    """Take public_ports, jumps and chains out. That nothing is there is no fault, but where the
    config is faulty: its chain may be another one than looked for."""
    found = False
    try:  # the config first: else the server that runs might put the jumps back
        set_public_ports(config.path, None)
    finally:
        for family in IPTABLES:
            try:
                rules = firewall.rules(family)
            except Fault:
                if family == 4:
                    raise
                continue  # without ip6tables nothing was hidden by it
            jumps = [rule.replace("-A", "-D", 1) for rule in rules
                     if rule.endswith(f"-j {firewall.hiding_chain}")]
            found = found or bool(jumps)
            # The chain is made, or emptied, so that it is there to be deleted.
            firewall.transact(family, [*jumps, f":{firewall.hiding_chain} - [0:0]",
                                       f"-X {firewall.hiding_chain}"])
    if not found:
        Config(config.path, root=True).require("server")

def listening_ports():
    """['22/tcp', ...] on which something listens, but not on loopback alone (ss(8))."""
    _, output = query("ss", "-Hlntu")  # protocol, state, two queues, ADDRESS:PORT, the peer's
    found = re.findall(r"(?m)^(\w+) +\w+ +\d+ +\d+ +(\S+):(\d+) ", output)
    ports = {f"{port}/{protocol}": int(port) for protocol, address, port in found
             if not address.startswith(("127.", "[::1]"))}
    return sorted(ports, key=ports.get)

def packets_in(firewall):
    """{rule of a door: how many packets that begin a connection have come in by it}"""
    packets = {}
    for family in IPTABLES:
        with suppress(Fault):  # there is no ip6tables
            for rule in firewall.rules(family, firewall.chain, "-v"):
                # A door's rule, and no other but that for DHCP (KEPT), has a source.
                if counters := re.search(r" -s (?!fe80::/10 ).*( -c (\d+) \d+)", rule):
                    packets[rule.replace(counters[1], "")] = int(counters[2])
    return packets

def take_lock(name):
    """Hold a lock of this network namespace, as each has its own chains, until this process ends,
    however it does, or closes it -> its descriptor; None where another one has it."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    lock = os.open(f"/run/tariq-{name}-{namespace}.lock", os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return lock

# ---- monitor: requests in, policy, doors and commands --------------------------------------------
# What happens              to doors                   to commands, listener    to what is hidden
#   SIGTERM, INT, HUP       closed: `stop` empties     killed (--pdeathsig)     stays
#                           the chain, which stays
#   SIGKILL of this         by the kernel (below)      killed (--pdeathsig)     stays
#   the listener's death    closed: `stop`; exit 70,   killed (--pdeathsig)     stays
#                           at a start also 69, 78
#   a reboot                gone                       gone                     again, if it starts
#   a full disk             stay (a knock writes no    stay (log lines may      stays
#                           file)                      be lost)
# After a SIGKILL a door with {until} in its rule, or {until} or {seconds} in its command, ends at
# its time (xt_time goes by the wall clock: later where that is set back). A rule without {until}
# stays until the next start that finds the config whole, which empties the chain of doors. What a
# command without either has opened stays until somebody closes it by hand.
# systemd starts a server again, in 5 s, whatever ended it, but for systemctl stop, 69 and 78; and
# ends by SIGKILL what does not end by SIGTERM in 90 s, as with doors whose programs hang.
# Connections always go on. A client that is taken out of the config is refused from its next
# request on; its doors stay to their end. A flush of the firewall opens what is hidden until the
# next request. gpg-agent ends with the service; where the server was started by hand, when its
# keyring is removed.
COMMANDS_MAX = 16  # at once
CLOSE_AGAIN = 5  # seconds after which a door is tried to be closed again
DOORS_MAX = 100  # of a client, from all its addresses
REQUEST_MAX = 100  # words of a request: an image has room for fewer

def forbidden(patterns, command):
    """The part of a command that no pattern of `may` permits, or ''.
    O, C: each port by itself; * is any port. A port is opened for all who share the address, or, if
    the rule says {net}, its network.
    E: one pattern fits word by word, and the command is run by root. * is any one word, also an
    option like -x or a path like /etc/passwd; a * at the end is any number of words, or none.
    Quotes do not change that."""
    action, *words = command
    allowed = [pattern[1:] for pattern in patterns if pattern[0] == action]
    if action != "E":
        ports = {port for pattern in allowed for port in pattern}
        return next((f"{action} {port}" for port in words if not ports & {port, "*"}), "")
    for pattern in allowed:
        if pattern[-1] == "*":
            pattern = pattern[:-1] + ["*"] * (len(words) - len(pattern) + 1)
        if len(pattern) == len(words) \
                and all(want in ("*", word) for want, word in zip(pattern, words)):
            return ""
    return shlex.join(command)

class Monitor:
    """Policy, doors and commands, and the listener's parent."""

    def __init__(self, config, notify_socket):
        self.config = config  # the last whole one; read afresh by `policy`
        self.config_stamp = config.stamp
        self.notify_socket = notify_socket  # systemd's, or ""
        self.is_ready = False
        self.doors = {}  # Door.key: Door
        self.command_slots = threading.Semaphore(COMMANDS_MAX)
        self.firewall = firewall_of(config)
        ports = config.get("secret_ports")
        self.settings = {  # the listener's, too; like the doors' rules they last until a restart
            "ports": ports, "shared": shared_key(config.get("secret"), ports).hex(),
            "home": config.get("server_gpg_dir"), "own_key": config.get("server_key"),
            "patience": config.get("command_timeout", default=30)}

    def policy(self):
        """The config as it is now, parsed once a change of its file. Where one is broken, or has a
        fault in [server], the last whole one holds, and the log says so once."""
        stamp = None
        with suppress(OSError):
            stamp = stamp_of(os.stat(self.config.path))
        if stamp != self.config_stamp:
            self.config_stamp = stamp
            try:
                config = Config(self.config.path, root=True)
                # `hide --undo` takes it out: never hide again then, whatever else is faulty. (A
                # file that is empty is just being written, and says nothing.)
                if config.text and not re.search(r"(?mi)^\s*public_ports\s*=", config.text):
                    if self.firewall.public_ports is not None:
                        log("public_ports is gone: what hides is not put back after a flush.")
                    self.firewall.public_ports = None
                config.require("server")
                self.config = config
                self.firewall.public_ports = config.get("public_ports", default=None)
                for line in config.all_faults():
                    log(line)
            except Exception as error:  # whatever it is
                log(f"{as_fault(error)} The config from before this change holds.")
        return self.config

    def handle(self, data):
        """One message. The listener's word counts for who signed, and where; not for what they may.
        One that was taken over can ask for log lines (cut, and printable; any number), for one
        "ready", for this server's end ("fault"), and in any client's name and for any address for
        what that client's `may` permits (more than DOORS_MAX doors push out that client's oldest).
        To the rest says no: this function, to what is no such message; `forbidden`, to what is not
        permitted; COMMANDS_MAX, to more commands. Raises Fault: the server ends."""
        try:
            [(kind, content)] = json.loads(data).items()
            if kind == "ready":
                if self.is_ready:
                    raise ValueError  # a second one
            elif kind == "request":
                if not self.is_ready:
                    raise ValueError
                knock_id, signer, command, sender = content
                knock_id, signer = bytes.fromhex(knock_id), parse("key", signer)
                ip, command = ip_text(bytes.fromhex(sender)), command_of(command)
                if len(command) > REQUEST_MAX:
                    raise ValueError
            elif kind == "log":
                words = self.named(content[:1000])
            elif kind == "fault":
                code, words = content
                words = printable(words[:1000])
            else:
                raise ValueError
        except Exception:  # whatever it is
            log("a malformed message: the listener may be taken over: stop it, look")
            return
        if kind == "request":
            self.decide(knock_id, signer, command, ip)
        elif kind == "log":
            log(f"listener: {words}")
        elif kind == "fault":
            mendable = code in (MISSING, CONFIG) and not self.is_ready  # systemd leaves it at that
            raise Fault(int(code) if mendable else DIED, f"The listener says: {words}")
        else:
            self.ready()

    def decide(self, knock_id, signer, command, ip):
        """A request, by policy; its result goes to the listener."""
        config = self.policy()
        section = config.clients.get(signer, "")
        user = section.removeprefix("allow ") or signer
        event = f"{user} {ip} {shlex.join(command)}"
        try:
            if section in config.faults:
                raise Fault(CONFIG, "the server's config is faulty where it is about you: its log "
                                    "says where.")
            if part := forbidden(config.get("may", [section], []), command):
                raise Fault(REFUSED, f"refused: you may not {part} here.")
            if command[0] == "E":
                self.execute(knock_id, event, command[1:])
            else:
                seconds = config.get("open_timeout", [section, "server"], 3600)
                text = self.move_doors(command, ip, user, seconds)
                self.finish(knock_id, f"{event}: {text}", result_of(True, 0, text.encode()))
        except Exception as error:  # whatever becomes of one request, doors are watched
            fault = as_fault(error)
            self.finish(knock_id, f"{event}: {fault}",
                        result_of(False, fault.code, str(fault).encode()))
        self.look_after_firewall()

    def named(self, text):
        """Text with clients' names in the place of their fingerprints."""
        def name(match):
            return self.policy().clients.get(match[0], match[0]).removeprefix("allow ")
        return re.sub(r"\b[0-9A-F]{40}\b", name, text)

    def ready(self):
        """The listener has all that it needs. Only now is anything hidden: where it could not
        start, nobody could get in to mend that. Raises Fault."""
        self.is_ready = True
        self.policy()  # `hide --undo` may have been meanwhile
        self.firewall.prepare()
        log(f"listening for knocks on {len(self.settings['ports'])} ports")
        if self.notify_socket:  # sd_notify(3); @: an abstract address
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
                sock.sendto(b"READY=1", re.sub("^@", "\0", self.notify_socket))

    def move_doors(self, command, ip, user, seconds):
        """O or C, port by port -> what is so then, in words. Raises Fault, which has these words,
        too, where one could not be moved: the others were, all the same."""
        action, *ports = command
        move = self.open if action == "O" else self.close_for
        done, faults = [], []
        for port in ports:
            try:
                done.append(move(Door(ip, port, user, seconds, self.firewall.templates)))
            except Exception as error:
                faults.append(as_fault(error))
        if faults:
            lines = dict.fromkeys(str(fault) for fault in faults)  # the same only once
            raise Fault(faults[0].code, "; ".join([*done, " ".join(lines)]))
        return "; ".join(done)

    def open(self, door):
        """O, for one port -> what is so then. Raises Fault."""
        self.policy()  # `hide --undo` may have been meanwhile: what it took out stays out
        if known := self.doors.get(door.key):
            if known.user != door.user and known.until > door.until:
                door = known  # who shares an address shares its doors: the later end holds
            try:
                self.close(known)  # and is opened anew: its rule may have been flushed
            except Fault as fault:
                if isinstance(self.firewall, Iptables):
                    raise
                log(f"{fault} It is opened all the same.")  # a reload has closed it already?
        owned = [other for other in self.doors.values() if other.user == door.user]
        if len(owned) >= DOORS_MAX:
            self.close(owned[0])  # the oldest
        self.doors[door.key] = door  # first: it may open, then fail
        doubts = self.firewall.open(door)
        words = f"opened {door} for {door.source} until {door.end()}"
        return f"{words}, but {doubts}" if doubts else words

    def close_for(self, door):
        """C, for one port -> what is so then. Raises Fault where a door of its client's stays."""
        known = self.doors.get(door.key)
        if known and known.user != door.user:
            raise Fault(REFUSED, f"{known} is open for {known.source} until {known.end()}, by "
                                 "another client, who alone closes it.")
        if self.close(known or door):
            return f"closed {door} for {door.source}"
        for other in self.doors.values():
            # Of the same family: for the other one its client knocks once more.
            if (other.user, other.port, other.family) == (door.user, door.port, door.family):
                raise Fault(REFUSED, f"{door} is open for {other.source} until {other.end()}, and "
                                     f"you came from {door.ip}.")
        return f"{door} was shut already for {door.source}"

    def close(self, door):
        """Close a door, known or of an earlier server. On a Fault it stays in self.doors."""
        was_open = self.firewall.close(door)
        self.doors.pop(door.key, None)
        return was_open

    def close_ended(self):
        for door in list(self.doors.values()):
            if not door.deadline or door.deadline > monotonic():
                continue
            try:
                self.close(door)
            except Exception as error:
                log(f"{door} for {door.source} is not closed: {as_fault(error)} Trying again.")
                door.deadline = monotonic() + CLOSE_AGAIN

    def look_after_firewall(self):
        """Put back what a flush took of jumps and of what is kept (not doors: their clients knock
        again), in both families, once nobody waits."""
        if select.select([self.channel], [], [], 0)[0]:
            return
        self.policy()  # `hide --undo` may have been meanwhile
        for family in IPTABLES:
            with suppress(Exception):  # the next door says it
                self.firewall.put_back(family)

    def execute(self, knock_id, event, words):
        """Start a permitted command. It ends with this server. What it starts in a session of its
        own goes on; not in the service, where systemd ends it."""
        if not self.command_slots.acquire(blocking=False):
            raise Fault(REFUSED, f"refused: {COMMANDS_MAX} commands run now: knock again.")
        log(f"+ {shlex.join(words)}")
        process = None
        try:
            process = launch(words, self.settings["patience"], ["setpriv", "--pdeathsig", "TERM"])
            in_thread(self.await_command, process, knock_id, event)
        except Exception:
            self.command_slots.release()
            if process:
                process.terminate()  # nobody would wait for it
            raise

    def await_command(self, process, knock_id, event):
        try:
            status, output = finished(process)
        finally:
            self.command_slots.release()
        self.finish(knock_id, f"{event}: exit status {status}", result_of(True, status, output))

    def finish(self, knock_id, event, result):
        """Log one event (who, from where, what, verdict), and give the listener the result."""
        log(event)
        with suppress(OSError):  # a listener that does not read must not stop the monitor
            self.channel.send(knock_id + result, socket.MSG_DONTWAIT)

    def start_listener(self):
        """The listener. At its first instruction it has: the ids of the keyring's owner, no group,
        no capability, no way to get one (setpriv: as_owner); HOME=/; this file as stdin, which only
        root need read; stdout and stderr /dev/null; two sockets, and no other descriptor (Popen
        closes them). K waits in the second. No keyring of root's session: this process has left
        that (where there is libkeyutils). Behind its imports the first that it does is
        check_unprivileged, which ends it where an id, a group or a capability is left, or
        no_new_privs is not set. (-I and not -S: unlike this process it needs packages.)"""
        packets = packet_socket(self.settings["ports"])
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
            ends = [door.deadline for door in self.doors.values() if door.deadline]
            wait = max(0, min(ends) - monotonic()) if ends else None
            ready = select.select([self.channel, signals], [], [], wait)[0]
            if signals in ready:
                return
            self.close_ended()
            if self.channel in ready:
                message = b""
                with suppress(ConnectionError):
                    message = self.channel.recv(MESSAGE_MAX)
                if not message:
                    raise Fault(DIED, "The listener died without a word: it was killed, or could "
                                      "not be started. The doors are closed.")
                self.handle(message)

# The kernel's filter on the packet socket (classic BPF, linux/filter.h): it spares the listener
# the machine's other traffic; `gate` trusts nothing of it. Each line: an operation, its number, and
# how many lines a comparison skips if it holds, and if not.
LOAD_WORD, LOAD_HALF_AT_X, LOAD_BYTE, LOAD_LENGTH = 0x20, 0x48, 0x30, 0x80
SET_X, SET_X_TO_IPV4_LENGTH, AND, RETURN = 0x01, 0xB1, 0x54, 0x06
EQUAL, GREATER, AT_LEAST = 0x15, 0x25, 0x35
PACKET_TYPE, VLAN_TAG = 0xFFFFF004, 0xFFFFF02C  # offsets: not in the packet, of it
PACKET_HOST = 0  # sent to this machine's link address, so not by it
DROP = (RETURN, 0, 0, 0)
PASS = (RETURN, MOST, 0, 0)

def when(comparison, number, line):
    return [(comparison, number, 0, 1), line]

def unless(comparison, number, line):
    return [(comparison, number, 1, 0), line]

def filter_lines(ports):
    """What may be a frame passes, whole."""
    lines = [
        (LOAD_WORD, PACKET_TYPE, 0, 0), *unless(EQUAL, PACKET_HOST, DROP),
        (LOAD_WORD, VLAN_TAG, 0, 0), (AND, 0xFFF, 0, 0),
        *unless(EQUAL, 0, DROP),  # the VLAN's own interface delivers it again
        (LOAD_LENGTH, 0, 0, 0), *unless(AT_LEAST, LEAST, DROP), *when(GREATER, MOST, DROP),
        # X, the length of the IP header: 40, IPv6's; if the first byte is below 0x60, IPv4's.
        (SET_X, 40, 0, 0),
        (LOAD_BYTE, 0, 0, 0), *unless(AT_LEAST, 0x60, (SET_X_TO_IPV4_LENGTH, 0, 0, 0)),
        (LOAD_HALF_AT_X, 2, 0, 0),  # the destination port
    ]
    for port in ports:
        lines += when(EQUAL, port, PASS)
    return [*lines, DROP]

SO_ATTACH_FILTER, SO_RCVBUFFORCE, SO_LOCK_FILTER = 26, 33, 44  # asm-generic/socket.h
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23  # linux/if_packet.h, since Linux 4.20

def packet_socket(ports):
    """A socket that gets what may be a frame, of all interfaces; root's filter on it is locked."""
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)  # gets none until it is bound
    lines = filter_lines(ports)
    code = b"".join(struct.pack("HBBI", operation, holds, fails, number)
                    for operation, number, holds, fails in lines)
    memory = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(lines), ctypes.addressof(memory))
    packets.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    packets.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
    with suppress(OSError):  # an older kernel: the filter drops what goes out, later
        packets.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    try:
        packets.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except PermissionError:  # in a container
        packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        log("The receive buffer is as small as this container has it: a flood may drown knocks.")
    # socket.bind cannot: it wants an interface, and 0 is all of them. struct sockaddr_ll(packet(7))
    address = struct.pack("HHi12x", socket.AF_PACKET, socket.htons(ETH_P_ALL), 0)
    succeed(LIBC.bind(packets.fileno(), address, len(address)))
    return packets

# linux/capability.h: what the server's parts need; a container may have less.
CAPABILITIES = {"CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_NET_ADMIN": 12,
                "CAP_NET_RAW": 13}

def need_capabilities():
    effective = int(process_status()["CapEff"], 16)
    if lacking := [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]:
        raise Fault(SYSTEM, f"This container or service lacks {', '.join(lacking)}, which a server "
                            "needs.")

def cmd_server(options):
    """Listen for knocks, as root: this is what the service runs. SIGTERM ends it and closes every
    door. Example:

        sudo tariq.py server"""
    notify_socket = os.environ.get("NOTIFY_SOCKET", "")
    need_root()
    need_capabilities()
    keep_to_itself()
    signals, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in ENDING:
        signal.signal(number, lambda *_: None)  # its number goes to the pipe that `serve` reads
    config = Config(options.config, root=True)
    for line in config.all_faults():
        log(line)
    if "server" in config.faults:
        raise Fault(CONFIG, f"No server: [server] in {config.path} has a fault, as said above.")
    monitor = Monitor(config, notify_socket)
    if take_lock(monitor.firewall.chain) is None:
        raise Fault(SYSTEM, "A server with this chain runs already: sudo systemctl stop tariq")
    try:
        monitor.start_listener()
        monitor.serve(signals)
    finally:  # whatever ended it: no door. By pdeathsig, listener and commands end, too
        monitor.firewall.stop(monitor.doors.values())

# ---- set-up: once, by hand; init, check, enroll as root, keygen, join as the user ----------------
# Files, all written by write_file, whole or not at all, but those marked *:
#   /etc/tariq/tariq.conf         root's, 0600      init, enroll, hide
#   /etc/tariq/.server-gpg        tariq's, 0700 *   gpg, gpg-agent: in init, enroll, the listener
#   PROGRAM, UNIT_PATH            root's, 755, 644  init
#   /run/tariq-CHAIN-*.lock       root's, 0600 *    server, hide, check: empty, never removed
#   what is in ~/.config/tariq    yours, 0600       keygen, join (* gpg, its keyring in there)
# (write_file, if killed, may leave FILE.new, of the same mode.)
# enroll and join believe the pipe they read from: who writes to it is enrolled, or is the server;
# so it goes by ssh. They take one public key, which is not dated in the future; join, only that of
# the profile's server_key.
PROFILE = ("secret_ports", "secret", "server_key")  # of a server's config, which its clients need
PROGRAM = "/usr/local/bin/tariq.py"
UNIT_PATH = "/etc/systemd/system/tariq.service"
# CAP_NET_RAW: the packet socket. NET_ADMIN: iptables, the receive buffer. SETUID, SETGID, SETPCAP:
# for setpriv to become the keyring's owner. KILL: to end what a permitted command runs as another
# user.
# The machine is hidden before the network is up, but after the firewalls that flush at their start.
# No default dependencies, as firewalls have none: sysinit.target comes after the network on some
# clouds' machines. No PrivateDevices: systemd 252 wants room on the disk for it, and on a full one
# nobody would get in.
UNIT = f"""\
[Unit]
Description=Tariq, hidden services behind a knock
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup.service
After=netfilter-persistent.service nftables.service ufw.service firewalld.service
Wants=network-pre.target
Before=network-pre.target shutdown.target
Conflicts=shutdown.target
[Service]
Type=notify
ExecStart={PROGRAM} server
Restart=always
RestartSec=5
RestartPreventExitStatus=69 78
KillMode=mixed
TasksMax=1024
OOMScoreAdjust=-900
LimitCORE=0
MemoryMax=1G
CapabilityBoundingSet=CAP_NET_RAW CAP_NET_ADMIN CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_KILL
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=-/etc/tariq/.server-gpg /run
ProtectHome=yes
PrivateTmp=yes
DevicePolicy=closed
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RestrictAddressFamilies=AF_PACKET AF_NETLINK AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@resources
[Install]
WantedBy=multi-user.target
"""

def locked_directory(path):
    """Make a config's directory, set the umask -> the directory's lock: a descriptor, which this
    process holds until it closes it, or ends."""
    directory = os.path.dirname(path)
    os.makedirs(directory, 0o711, exist_ok=True)  # a keyring's owner passes through
    os.umask(0o077)  # what comes into it is private
    lock = os.open(directory, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock

def write_file(path, text, mode=0o600):
    """Write a file, whole or not at all: the server may read it at any moment. Raises Fault."""
    try:
        with open(f"{path}.new", "w", encoding="utf-8", errors=AS_BYTES) as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(f"{path}.new")
        raise Fault(SYSTEM, f"{path} cannot be written: {error.strerror}. It is as it was.")
    log(f"wrote {path}")

def set_public_ports(path, ports):
    """Set public_ports in [server], or take it out (None); all else stays as it is."""
    lock = locked_directory(path)
    try:
        config = Config(path, root=True)
        if ports is not None:
            config.require("server")
        text = config.text.rstrip() + "\n"
        header = re.search(r"(?m)^[ \t]*\[server\].*\n", text)
        if not header:
            raise Fault(CONFIG, f"{path} has no [server].")
        start = header.end()
        following = re.search(r"(?m)^[ \t]*\[", text[start:])  # the next section
        end = start + following.start() if following else len(text)
        # With the lines in which its value goes on, if any: they are indented more.
        section = re.sub(r"(?mi)^([ \t]*)public_ports\s*=.*\n(\s*\1[ \t]+\S.*\n)*", "",
                         text[start:end])
        if ports is not None:
            indent = re.search(r"(?m)^([ \t]*)[^\s#;]", section)[1]  # of the first key
            section = f"{indent}public_ports = {', '.join(ports) or 'none'}\n{section}"
        if section != text[start:end]:
            write_file(path, text[:start] + section + text[end:])
    finally:
        os.close(lock)  # `hide` may come here twice, also where the config is broken meanwhile

def make_key(home, user):
    """Make a key without passphrase, Ed25519 and Curve25519. Returns its fingerprint."""
    _, status, _ = gpg(home, "--yes", "--pinentry-mode", "loopback", "--passphrase", "",
                       "--quick-generate-key", user, "future-default", "default", "never")
    return re.search(r"KEY_CREATED \S+ (\w{40})", status)[1]

def install():
    """Write this program and its service, where they are not there as they should be -> whether
    systemd runs here."""
    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    systemd = os.path.isdir("/run/systemd/system")
    files = [(PROGRAM, source, 0o755)]
    if systemd:
        files.append((UNIT_PATH, UNIT, 0o644))
    for path, text, mode in files:
        with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if (file.read(), status.st_uid, status.st_mode & 0o777) == (text, 0, mode):
                continue
        write_file(path, text, mode)
    return systemd

def make_server(path, home, owner, name):
    """The keyring of a new server, its key if none is there, and its config."""
    os.makedirs(home, exist_ok=True)
    os.chown(home, owner.pw_uid, owner.pw_gid)
    known = list_keys(home, "--list-secret-keys")
    key = known[0]["fpr"] if known else make_key(home, f"tariq@{name}")
    # No gpg-agent of it stays outside the service: it would have root's session keyring.
    query(*as_owner(home), "gpgconf", "--homedir", home, "--kill", "all")
    import secrets
    ports = ",".join(map(str, secrets.SystemRandom().sample(range(1024, 32768), 5)))
    secret = binascii.b2a_base64(os.urandom(32), newline=False).decode()
    write_file(path, f"[server]\nsecret_ports = {ports}\nsecret = {secret}\n"
                     f"server_gpg_dir = {home}\nserver_key = {key}\n")

def need_packages(names):
    """Raises Fault where a program or module of these is missing. Runs nothing of them."""
    import importlib.machinery, shutil, site
    find_spec, places = importlib.machinery.PathFinder.find_spec, site.getsitepackages()
    needed = {PACKAGES[name] for name in names
              if not (find_spec(name, places) if name in MODULES else shutil.which(name))}
    if needed:
        raise Fault(MISSING, "First install what Tariq needs: apt-get install -y "
                             f"--no-install-recommends {' '.join(sorted(needed))}")

def cmd_init(options):
    """Set up a server, as root: user, keyring, key, config and service. Run again with a newer
    tariq.py it is the upgrade; keys and config stay. Example:

        sudo ./tariq.py init"""
    need_root()
    import pwd
    need_packages(PACKAGES)
    locked_directory(options.config)
    name = socket.gethostname()
    home = os.path.dirname(options.config) + "/.server-gpg"
    if query("id", "tariq")[0]:
        run("useradd", "--system", "--home-dir", home, "--shell", "/usr/sbin/nologin", "tariq")
    owner = pwd.getpwnam("tariq")
    if not 0 < owner.pw_uid < 1000:
        raise Fault(SYSTEM, "The account tariq is a person's: see README, By hand, for another.")
    if not os.path.exists(options.config):
        make_server(options.config, home, owner, name)
    if options.config != ROOT_CONFIG:
        return log(f"Run: tariq.py server -c {options.config}")  # the service has ROOT_CONFIG
    config = Config(options.config, root=True)
    config.require("server")
    if not install():
        log(f"There is no systemd here: let {PROGRAM} server run as root, also after a reboot.")
    else:
        run("systemctl", "daemon-reload", seconds=60)
        run("systemctl", "enable", "tariq", seconds=60)
        run("systemctl", "restart", "tariq", seconds=120)
        log(f"The server runs, by tariq.py {VERSION}.")
    if not config.clients:
        log("Nothing is hidden yet. Next, on a client: tariq.py keygen YOU@LAPTOP | "
            f'ssh root@{name} tariq.py enroll --allow "O 22" | tariq.py join {name}')

SAVED_RULES = ("/etc/iptables/rules.v4", "/etc/iptables/rules.v6", "/etc/nftables.conf")

def check_iptables(firewall, faults):
    """Say what INPUT does, and what listens and is public. Adds to faults. Raises Fault."""
    for family, program in IPTABLES.items():
        try:
            firewall.check_rules(family)
            doubts = firewall.doubts(family, firewall.rules(family))
            log(f"{program}: {doubts or 'INPUT leads to the doors, and drops the rest'}.")
        except Fault as fault:
            say = faults.append if family == 4 else log
            say(str(fault))
    listening, public = listening_ports(), firewall.public_ports
    if public is None:
        log(f"INPUT's own rules say who reaches what listens: {' '.join(listening) or 'nothing'}.")
    else:
        reached = [port for port in listening if port in public]
        log(f"Reached without a knock: {' '.join(reached) or 'no port that listens'}.")
    for path in SAVED_RULES:
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            if firewall.hiding_chain in file.read():
                log(f"{path} has {firewall.hiding_chain}: after a reboot that hides this machine "
                    "also where the server cannot start. Take it out there.")
    _, rules = query("iptables", "-t", "nat", "-S", "DOCKER")
    if published := re.findall(r"--dport (\d+) .*-j DNAT", rules):
        log(f"Docker publishes ports past INPUT, hidden or not: {' '.join(published)}.")

def cmd_check(options):
    """Say what is wrong with a server's config, keys and firewall, as root. It changes nothing:
    run it before a restart. Example:

        sudo tariq.py check"""
    need_root()
    config = Config(options.config, root=True)
    faults = config.all_faults()
    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:
            faults.append(str(as_fault(error)))
    attempt(need_packages, MODULES)
    if home := config.get("server_gpg_dir", default=None):
        attempt(as_owner, home)
        if len(home.encode()) > HOME_MAX:
            faults.append(TOO_LONG.format(home=home))
        keys = {key.get("fpr"): key for key in attempt(list_keys, home, "--list-keys") or []}
        wanted = {config.get("server_key", default=""): "server", **config.clients}
        for fingerprint, section in wanted.items():
            key = keys.get(fingerprint)
            if section == "server" and key:
                # To ask gpg for the secret key would start gpg-agent outside the service.
                files = [f"{home}/private-keys-v1.d/{grip}.key" for grip in key["grips"]]
                if not any(map(os.path.exists, files)):
                    key = None
            if trouble := trouble_with(key, "E" if section == "server" else "S", home):
                faults.append(f"The key of [{section}] {trouble}.")
            else:
                log(f"The key of [{section}] is good, and expires: {key['expires']}.")
    if firewall := attempt(firewall_of, config):
        if (lock := take_lock(firewall.chain)) is not None:
            os.close(lock)
            log("No server runs by this config: sudo systemctl status tariq")
        if isinstance(firewall, Iptables):
            attempt(check_iptables, firewall, faults)
    with suppress(Fault):  # no systemd here knows
        if query("timedatectl", "show", "--value", "-p", "NTPSynchronized")[1] == "no\n":
            log("The clock is not synchronised: when it is a minute off, no knock is answered.")
    for line in faults:
        log(f"FAULT: {line}")
    return CONFIG if faults else 0

def show_key(home, text):
    """The key in a text, which is to hold one public key; nothing is imported. Raises Fault."""
    keys = list_keys(home, "--show-keys", data=text)
    if [key["kind"] for key in keys] != ["pub"] or not {"uid", "fpr"} <= set(keys[0]):
        raise Fault(BAD_DATA, "One public key has to come on standard input, which tariq.py keygen "
                              "prints. Did keygen fail?")
    if (ahead := keys[0]["created"] - time.time()) > CLOCK_SKEW:
        raise Fault(BAD_DATA, f"The key is of {ahead:.0f} s from now: set the clocks of both "
                              "machines, and make it anew.")
    return keys[0]

def cmd_keygen(options):
    """Make a client's keyring and key, where there is none. It prints the public key, which enroll
    on the server reads. Example:

        tariq.py keygen me@laptop > me.key"""
    parse("user", options.user)
    path = options.config
    locked_directory(path)
    if not os.path.exists(path):
        home = os.path.dirname(path) + "/gpg"
        write_file(path, f"[client]\nuser = {options.user}\nclient_gpg_dir = {home}\n")
    home = Config(path).get("client_gpg_dir", ["client"])
    os.makedirs(home, exist_ok=True)
    known = find_key(home, "--list-secret-keys", exactly(options.user))
    key = known["fpr"] if known else make_key(home, options.user)
    trouble = trouble_with(known, "S", home) if known else ""
    log(f"The key of {options.user} {trouble or f'is {key}'}. Knocks are signed by that of `user` "
        f"in {path}.")
    os.write(1, gpg(home, "--armor", "--export", key)[0])

def cmd_enroll(options):
    """Allow a client on this server, as root: its public key comes on standard input. It prints
    the profile that join on the client reads. Example:

        tariq.py keygen me@laptop | ssh root@box.example.com tariq.py enroll \\
            --allow "O 22" --allow "C 22" | tariq.py join box.example.com"""
    need_root()
    allow = "\n".join(" ".join(words) for words in options.allow or [["O 22"]])  # by ssh, words
    lines = [shlex.join(words) for words in patterns_of(allow)]
    if "#" in allow:
        raise Fault(USAGE, "--allow cannot have a #, which begins a comment in the config.")
    text = sys.stdin.buffer.read(INPUT_MAX)  # before the lock: keygen at its other end may hold it
    locked_directory(options.config)
    config = Config(options.config, root=True)
    config.require("server")
    home = config.get("server_gpg_dir")
    as_owner(home)  # raises Fault where it is root's
    profile = {item: config.ini["server"][item] for item in PROFILE}  # as text
    key = show_key(home, text)
    name = options.name or re.sub(r".*<(.+)>$", r"\1", key["uid"])
    section = config.clients.get(key["fpr"])
    if not section:
        if trouble := trouble_with(key, "S", home):
            raise Fault(BAD_DATA, f"The key of {name} {trouble}: renew it, or make another one.")
        if f"allow {name}" in config.values or not re.fullmatch(CLIENT, name):
            raise Fault(BAD_DATA, f"{name} is another client's name, or cannot be one: choose one "
                                  "with --name.")
    _, status, _ = gpg(home, "--import", data=text)
    if section:
        updated = re.search("IMPORT_OK [1-9]", status)  # 0: gpg had it all
        key = find_key(home, "--list-keys", key["fpr"])  # as it is now: more may have been known
        state = trouble_with(key, "S", home) or f"is good, and expires: {key['expires']}"
        log(f"[{section}] is there already, and its key is {'updated' if updated else 'the same'}: "
            f"it {state}. What it may do stays as it is.")
    else:
        may = "".join(f"\n    {line}" for line in lines)
        section = f"[allow {name}]\nkey = {key['fpr']}\nmay ={may}\n"
        write_file(config.path, f"{config.text.rstrip()}\n\n{section}")
        log(f"{name} ({key['fpr']}) may {'; '.join(lines)}")
    profile["public_key"] = gpg(home, "--armor", "--export", profile["server_key"])[0].decode()
    os.write(1, json.dumps(profile).encode() + b"\n")

def cmd_join(options):
    """Take a server's profile from standard input, which enroll there has printed. From then on
    this client can knock there. Example:

        tariq.py join box.example.com < me.profile"""
    parse("host", options.host)
    try:
        profile = json.loads(sys.stdin.buffer.read(INPUT_MAX))
        key, given = profile["public_key"].encode(), {name: profile[name] for name in PROFILE}
        for name, value in given.items():
            parse(name, value)
    except Exception:  # whatever it is
        raise Fault(BAD_DATA, "No profile came on standard input, which tariq.py enroll prints. "
                              "Did enroll fail?")
    locked_directory(options.config)
    config = Config(options.config)
    home = config.get("client_gpg_dir", ["client"])
    if show_key(home, key)["fpr"] != given["server_key"].upper():
        raise Fault(BAD_DATA, "The profile's key is not its server_key: enroll again.")
    if options.host not in config.values:
        settings = "".join(f"{name} = {value}\n" for name, value in given.items())
        write_file(config.path, f"{config.text.rstrip()}\n\n[{options.host}]\n{settings}")
    elif not given.items() <= config.ini[options.host].items():
        raise Fault(BAD_DATA, f"{config.path} has other values in [{options.host}]: take that "
                              "section out, then join again.")
    gpg(home, "--import", data=key)
    log(f"{options.host} is known by its key {given['server_key']}. Next: tariq.py knock "
        f"{options.host} O 22")

# ---- command line --------------------------------------------------------------------------------
SUBCOMMANDS = {  # name: its function, whose docstring is its help
    "init": cmd_init, "check": cmd_check, "hide": cmd_hide, "server": cmd_server,
    "keygen": cmd_keygen, "enroll": cmd_enroll, "join": cmd_join, "knock": cmd_knock}

def overview():
    """What tariq.py --help prints."""
    what = __doc__.split("\n\n")[0]
    commands = ""
    for name, function in SUBCOMMANDS.items():
        first_sentence = " ".join(function.__doc__.partition(". ")[0].split())
        commands += f"    {name:8}{first_sentence}\n"
    return f"""{what}

usage: tariq.py COMMAND ..., where COMMAND is
{commands}
tariq.py COMMAND --help says how it is used; tariq.py --version, which version this is, with the
SHA-256 of this very file.

{EXIT_CODES}"""

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(USAGE, f"{message}. {self.prog} --help says how.")

def help_format(prog):
    """Of a width of its own: to find the terminal's, argparse takes 3 ms, at each knock, too."""
    return argparse.RawDescriptionHelpFormatter(prog, width=80)

def parser_of(name):
    """The parser of a subcommand; to make all of them takes 2 ms."""
    text = SUBCOMMANDS[name].__doc__.replace("\n    ", "\n")
    parser = Parser(prog=f"tariq.py {name}", description=text, formatter_class=help_format)
    config = CLIENT_CONFIG if name in ("keygen", "join", "knock") else ROOT_CONFIG
    add = parser.add_argument
    add("-c", "--config", default=config, type=os.path.realpath,
        help=f"use this config, not {config}")
    add("-v", "--verbose", action="store_true", help="say more, as what gpg said")
    if name == "hide":
        add("ports", nargs="*", metavar="PORT", help="stays public: 80, 443/tcp, 53/udp")
        add("--undo", action="store_true", help="hide nothing any more")
    elif name == "keygen":
        add("user", help="your email address, or a name like it: me@laptop")
    elif name == "enroll":
        add("--allow", action="append", nargs="+", metavar="WORD",
            help='what the client may do, as a request: "O 22" (the default), "E date"')
        add("--name", help="what the log calls the client, if not by its key's email")
    elif name == "join":
        add("host", help="the server's name or address, as you will knock at it")
    elif name == "knock":
        add_knock_arguments(add)
    return parser

def seconds(text):
    """What -t takes: a number of seconds above 0. Raises ValueError, from which argparse makes
    "invalid seconds value": it takes this function's name."""
    if not 0 < float(text) < 1e6:
        raise ValueError
    return float(text)

def add_knock_arguments(add):
    add("-u", "--user", help="sign with the key of this user")
    add("-p", "--ports", help="knock at these secret_ports")
    add("-i", "--img-dir", help="hide the request in a PNG image of this folder")
    add("-g", "--gpg-dir", help="use this keyring")
    for flag, family in (("-4", socket.AF_INET), ("-6", socket.AF_INET6)):
        add(flag, dest="family", action="store_const", const=family, default=0,
            help=f"knock by IPv{flag[1]} only")
    add("-t", "--timeout", type=seconds, default=10, help="give up after so many seconds (10)")
    add("--address", help="the address that the server should see (behind NAT), or any")
    add("--transport", nargs=1, choices=TRANSPORTS, default=["kernel", "udp"],
        help="send by this only; kernel and udp take turns otherwise")
    add("host", help="a server of the config")
    add("action", choices=("O", "C", "E"), help="open ports, close them, or execute a command")
    add("words", nargs=argparse.REMAINDER, metavar="...",
        help="PORT[/tcp|/udp]... or COMMAND [ARG...]")

def main():
    os.umask(0o022)
    verbose = False
    try:
        name, words = "".join(sys.argv[1:2]), sys.argv[2:]
        if name == "listener":  # not for people: `start_listener` runs it
            return cmd_listener(words)
        if name == "--version":
            with open(__file__, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            return print(f"tariq.py {VERSION}, SHA-256 {digest}")
        if name in ("-h", "--help"):
            return print(overview())
        if name not in SUBCOMMANDS:
            raise Fault(USAGE, f"The first word has to be one of {', '.join(SUBCOMMANDS)}: "
                               "tariq.py --help says what each does.")
        options = parser_of(name).parse_args(words)
        verbose = options.verbose
        return SUBCOMMANDS[name](options)  # an exit code; None is 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # never a traceback
        fault = as_fault(error)
        log(f"tariq: {fault}")
        if verbose and fault.detail:
            log(fault.detail)
        return fault.code

if __name__ == "__main__":
    status = main()
    if KNOCKS:  # without taking down each module: 5 ms less. The kernel closes what is open
        os._exit(status or 0)
    sys.exit(status)
