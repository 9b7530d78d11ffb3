"""One run on several machines, its nodes: the same command on each; they meet at the address of one, which owns it.

    node 0         the machine whose address hardware.rendezvous is: does all that a run on one machine does
    node 1, 2, …   say what they are, wait until the rows are prepared, and start their own ranks

Each of the others keeps a connection to node 0, over which both say what the other has to know, a line of JSON each;
where it breaks, a node is gone. What the ranks say among themselves is torch's.
"""

import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from smoltrain import runs
from smoltrain.config import ConfigError, leaves, shown
from smoltrain.config.validate import resolved
from smoltrain.lines import some

JOIN = 300  # seconds in which all nodes have to come
WELCOME = 20  # seconds in which node 0 says that it is one
SHARED = 90  # seconds that a file of one node may take to be seen by another
RETRY = 0.5  # seconds between two attempts
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
SIOCGIFADDR = 0x8915  # of netdevice(7): an interface's address


class Gone(ConnectionError):
    """The other node has closed its connection, or was killed."""


class Line:
    """A connection to another node, which is called `name`."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection, self.name, self.read = connection, name, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in KEEPALIVE.items():  # it may have nothing to say for hours
            if hasattr(socket, option) and connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

    def say(self, **facts: Any) -> None:
        """Sends facts. Raises Gone where nobody is there."""
        try:
            self.connection.sendall(json.dumps(facts).encode() + b"\n")
        except OSError as error:
            raise Gone(f"{self.name} is gone") from error

    def heard(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """The next facts that came, or come within so many seconds; else None. Raises Gone where nobody is there."""
        last = time.monotonic() + seconds
        while b"\n" not in self.read:
            if not select.select([self.connection], [], [], max(last - time.monotonic(), 0))[0]:
                return None
            try:
                came = self.connection.recv(1 << 16)
            except OSError as error:
                raise Gone(f"{self.name} is gone") from error
            if not came:
                raise Gone(f"{self.name} is gone")
            self.read += came
        line, self.read = self.read.split(b"\n", 1)
        return json.loads(line)  # type: ignore[no-any-return]


class Meeting:
    """The nodes of a run: which of them this is (`index`), and a connection to each one that it talks to, by index."""

    def __init__(self, address: str, nodes: int, index: int, lines: dict[int, Line]) -> None:
        self.address, self.nodes, self.index, self.lines = address, nodes, index, lines
        self.codes: dict[int, list[int | None]] = {}  # of other nodes' ranks, once they have ended
        self.gone: set[int] = set()  # nodes that are
        self.failed = False  # whether a rank has, on any node
        self.ended: int | None = None  # the exit code with which the run has, as node 0 says
        self.port = 0  # at which the ranks meet, on node 0

    def listen(self) -> None:
        """Takes note of what other nodes have said; of one that is gone, its ranks are."""
        for index, line in self.lines.items():
            if index not in self.codes:
                try:
                    while (facts := line.heard()) is not None:
                        self.codes |= {index: facts["codes"]} if "codes" in facts else {}
                        self.ended = facts.get("ended", self.ended)
                        bad = facts.get("failed") or facts.get("ended") or any(self.codes.get(index, []))
                        self.failed = self.failed or bool(bad)
                except Gone:
                    self.gone.add(index)
                    self.codes.setdefault(index, [])
                    self.failed = True

    def of_node(self, index: int, processes: int) -> list[int | None]:
        """How the ranks of another node have ended: killed where it is gone, None where it has not said it yet."""
        return self.codes.get(index) or [-signal.SIGKILL if index in self.gone else None] * processes

    def tell(self, **facts: Any) -> None:
        """Says something to all other nodes that are there."""
        for line in self.lines.values():
            with suppress(Gone):
                line.say(**facts)

    @property
    def others_run(self) -> bool:
        """Whether node 0 still waits for others' ranks."""
        return self.index == 0 and self.codes.keys() < self.lines.keys()

    def begin(self, directory: Path, nonce: str) -> None:
        """Has the other nodes start their ranks. Raises ConfigError where one does not see the run's directory."""
        self.tell(directory=str(directory.resolve()), nonce=nonce)
        for line in self.lines.values():
            try:
                facts = line.heard(SHARED * 2) or {}
            except Gone as error:
                raise ConfigError(f"{error}, before the run began") from error
            if not facts.get("ready"):
                raise ConfigError(facts.get("refused") or f"{line.name} does not answer")
        self.port = free_port(self.address)
        self.tell(port=self.port)

    def come(self) -> tuple[Path, bool]:
        """Waits, on another node than the first, until its ranks are to start; the run's directory, and whether so."""
        (line,) = self.lines.values()
        try:
            while (facts := line.heard(RETRY)) is None:
                pass
        except Gone as error:
            raise ConfigError(f"{error}, before the run began") from error
        if "ended" in facts:
            self.ended = facts["ended"]
            return Path(), False
        directory, nonce = Path(facts["directory"]), facts["nonce"]
        if not sees(directory, nonce):
            why = (
                f"hydra.run.dir={directory}: {socket.gethostname()} does not see what {line.name} has written there; "
                "all nodes of a run have to share the disk that it is kept on"
            )
            line.say(refused=why)
            raise ConfigError(why)
        line.say(ready=True)
        facts = line.heard(SHARED * 2) or {}
        self.port, self.ended = facts.get("port", 0), facts.get("ended")
        return directory, "port" in facts

    def end(self) -> None:
        """Waits, on another node than the first, until that has said how the run ended, or is gone."""
        self.codes.clear()
        while self.ended is None and not self.gone:
            self.listen()
            time.sleep(RETRY)

    @property
    def code(self) -> int:
        """The exit code of the commands on all nodes: that of the run, 1 where it is not known."""
        return 1 if self.ended is None else self.ended


MET: list[Meeting] = []  # the one that this process takes part in


@contextmanager
def meeting(cfg: DictConfig) -> Iterator[Meeting]:
    """All nodes of a checked config's run, met; within, this one is one of them, and at the end others hear of it.

    Raises ConfigError where not all come, where they are not the same, or where nobody is at their address.
    """
    host, port = address_of(cfg.hardware.rendezvous)
    config, _ = resolved(cfg)
    here = {"host": socket.gethostname(), "versions": runs.versions(), "config": experiment(config)}
    with ExitStack() as opened:
        listener = listening(host, port)
        if listener is None:
            met = joined(cfg, host, port, here, opened)
        else:
            with listener:
                met = gathered(cfg, listener, host, here, opened)
        MET.append(met)
        try:
            yield met
        except BaseException as error:
            met.ended = 2 if isinstance(error, ConfigError) else runs.CODES[runs.status_of(error)]
            raise
        finally:
            MET.remove(met)
            if met.index == 0:
                met.tell(ended=met.code)


def address_of(rendezvous: str) -> tuple[str, int]:
    """The address and the port at which nodes meet. Raises ConfigError where no such host is known."""
    host, _, port = rendezvous.rpartition(":")
    try:
        if not 0 < int(port) < 1 << 16:
            raise ValueError(f"there is no port {port}")
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ConfigError(f"hardware.rendezvous={rendezvous}: {error}; write host:port of one of the nodes") from error
    return str(found[0][4][0]), int(port)


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listening(host: str, port: int) -> socket.socket | None:
    """Where the other nodes come to; None where the address is another machine's, or another process here has it."""
    try:
        with socket.create_server((host, port), family=family(host)):
            pass
        return socket.create_server(("", port), family=family(host))  # others may know it by another address
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            return None
        raise ConfigError(f"hardware.rendezvous={host}:{port}: {error.strerror}") from error


def free_port(host: str) -> int:
    """A port of this machine that nobody uses."""
    with socket.create_server((host, 0), family=family(host)) as free:
        return int(free.getsockname()[1])


def gathered(cfg: DictConfig, listener: socket.socket, host: str, here: dict[str, Any], opened: ExitStack) -> Meeting:
    """Node 0's meeting, once all others have come and are as this one is."""
    met = Meeting(host, cfg.hardware.nodes, 0, {})
    wrong: list[str] = []
    last = time.monotonic() + JOIN
    print(f"node 0 of {met.nodes}: waits for the others at {cfg.hardware.rendezvous}", flush=True)
    while len(met.lines) < met.nodes - 1:
        listener.settimeout(max(last - time.monotonic(), 0.01))
        try:
            connection, peer = listener.accept()
        except TimeoutError:
            wrong.append(
                f"hardware.nodes={met.nodes}: {some(len(met.lines) + 1, 'node')} came within {JOIN} seconds; "
                f"start the same command on the others too, from where they reach {cfg.hardware.rendezvous}"
            )
            break
        line = Line(opened.enter_context(connection), f"a process at {peer[0]}")
        with suppress(Gone, ValueError, AttributeError, LookupError):  # whoever it was, it was no node
            if (there := line.heard(WELCOME)) and there.keys() == here.keys():
                index = len(met.lines) + 1
                line.name = f"node {index} ({there['host']})"
                line.say(node=index)
                met.lines[index] = line
                # By which others reach this machine, whatever its name means here.
                met.address = connection.getsockname()[0]
                wrong += other(there, here, line.name)
    if wrong:
        met.tell(refused=wrong)
        raise ConfigError("\n".join(wrong))
    met.tell(joined=True)
    own = f"node 0 ({here['host']})"
    print(f"all {met.nodes} nodes are here: {', '.join([own, *(li.name for li in met.lines.values())])}")
    return met


def joined(cfg: DictConfig, host: str, port: int, here: dict[str, Any], opened: ExitStack) -> Meeting:
    """Another node's meeting, once node 0 has all that it waits for."""
    named = f"hardware.rendezvous={cfg.hardware.rendezvous}"
    last = time.monotonic() + JOIN
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=WELCOME)
            break
        except OSError as error:
            if time.monotonic() > last:
                raise ConfigError(
                    f"{named}: nobody has answered for {JOIN} seconds ({error.strerror or error}); start the same "
                    "command on the machine that has this address"
                ) from error
            time.sleep(RETRY)
    connection.settimeout(None)
    line = Line(opened.enter_context(connection), f"node 0 ({host})")
    host = connection.getpeername()[0]
    try:
        line.say(**here)
        welcome = line.heard(WELCOME) or {}
        if "node" not in welcome:
            raise ConfigError(f"{named}: what listens there is no node of a run; choose another port")
    except (ValueError, Gone) as error:
        raise ConfigError(f"{named}: what listens there is no node of a run; choose another port") from error
    print(f"node {welcome['node']} of {cfg.hardware.nodes}: waits for node 0", flush=True)
    try:
        facts = line.heard(JOIN + WELCOME) or {}
    except Gone as error:
        raise ConfigError(f"{named}: {error}, before all were there") from error
    if not facts.get("joined"):
        raise ConfigError("\n".join(facts.get("refused", [f"{named}: node 0 says nothing"])))
    return Meeting(host, cfg.hardware.nodes, welcome["node"], {0: line})


def experiment(config: dict[str, Any]) -> dict[str, str]:
    """What the configs of all nodes have to agree on."""
    ignored = tuple(f"{key}." for key in runs.NOT_IDENTITY)
    return {key: shown(value) for key, value in leaves(config) if not f"{key}.".startswith(ignored)}


def other(there: Mapping[str, Any], here: Mapping[str, Any], name: str) -> list[str]:
    """What is not the same on a node as on this one."""
    return [
        f"{key}: {theirs} on {name}, {ours} on node 0 ({here['host']}); {mend}"
        for part, mend in (("versions", "install the same on all nodes"), ("config", "start all by the same command"))
        for key in sorted({**there[part], **here[part]})
        if (theirs := there[part].get(key, "none")) != (ours := here[part].get(key, "none"))
    ]


def sees(directory: Path, nonce: str) -> bool:
    """Whether what node 0 has written into the run's directory is there, or comes."""
    last = time.monotonic() + SHARED
    file = directory / runs.RANKS / runs.GIVEN
    while time.monotonic() < last:
        with suppress(OSError, ValueError):
            if json.loads(file.read_text()).get("nonce") == nonce:
                return True
        time.sleep(RETRY)
    return False


def interface(host: str) -> dict[str, str]:
    """The network interface by which this machine reaches another one, as gloo is told, which looks for none itself.

    Where the environment names one, that one stays; NCCL finds its own.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or sys.platform != "linux" or ":" in host:
        return {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                asked = struct.pack("256s", name.encode())
                if fcntl.ioctl(probe.fileno(), SIOCGIFADDR, asked)[20:24] == own:
                    return {"GLOO_SOCKET_IFNAME": name}
    return {}
