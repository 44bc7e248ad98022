"""Several machines as one: who takes part, what node 0 decides, and how every node learns that another was lost.

Node 0 prepares, decides and publishes, as one machine alone does. The other nodes join it, run their ranks when it says
so, and end with its last word. They meet in a TCP store on node 0, in which every node keeps one JSON record about
itself, renewed several times a second; the ranks meet in the same store. A machine alone is a team of one.
"""

import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qilin_med.artifact import differences
from qilin_med.console.progress import progress
from qilin_med.errors import UserError

SILENCE = 30.0  # seconds without a new record after which a node counts as lost
_PORT = 29500  # torchrun's default
# What a shell on another host must know too; DeepSpeed's launcher hands over the same.
_HANDED_OVER = ("NCCL_", "GLOO_", "UCX_", "PYTHON", "MASTER_")


class NodeLost(UserError):
    """A node that took part was killed or cut off."""


@dataclass(frozen=True)
class Place:
    """This node's number among `nodes`, and where node 0 listens (port 0: any free one)."""

    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    slots: int | None = None  # ranks on this node, where a hostfile says so
    to_start: tuple[str, ...] = ()  # hosts on which node 0 is to start the same command


def find_place() -> Place:
    """From HOSTFILE, or from NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT; without them this machine is alone."""
    hosts = read_hostfile(Path(os.environ["HOSTFILE"])) if "HOSTFILE" in os.environ else {}
    nodes = len(hosts) or _number("NODES", 1)
    if nodes <= 1:
        return Place(port=_number("MASTER_PORT", 0), slots=next(iter(hosts.values()), None))
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing and not hosts:
        raise UserError(
            f"NODES={nodes} but {' and '.join(missing)} not set: give every node NODES, its own NODE_RANK (0 to"
            f" {nodes - 1}) and MASTER_ADDR, the address of node 0"
        )
    node = _number("NODE_RANK", 0)
    if not 0 <= node < nodes:
        raise UserError(f"NODE_RANK={node}: expected 0 to {nodes - 1}, one number for each of {nodes} nodes")
    names = list(hosts)
    return Place(
        node,
        nodes,
        os.environ.get("MASTER_ADDR") or names[0],
        _number("MASTER_PORT", _PORT),
        slots=hosts[names[node]] if hosts else None,
        to_start=tuple(names[1:]) if "NODE_RANK" not in os.environ else (),
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text}: expected a whole number")
    return int(text)


def read_hostfile(path: Path) -> dict[str, int]:
    """{host: slots} of a hostfile as DeepSpeed reads it: `worker-1 slots=8` a line; UserError for anything else."""
    hosts: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"HOSTFILE={path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdecimal() or int(slots) == 0 or words[0] in hosts:
            raise UserError(f"{path}: line {number}: expected `host slots=N`, every host once; found `{line.strip()}`")
        hosts[words[0]] = int(slots)
    if not hosts:
        raise UserError(f"{path}: names no host; expected lines like `worker-1 slots=8`")
    return hosts


@contextmanager
def other_nodes_started(place: Place) -> Iterator[dict[int, subprocess.Popen]]:
    """Run this process's own command on the hosts that the place names, by pdsh over ssh, and wait for it to end.

    Yields {node: its pdsh}, one each, so that a host that cannot be reached is known at once.
    """
    if place.to_start and not shutil.which("pdsh"):
        raise UserError(
            "HOSTFILE without NODE_RANK starts the other nodes with pdsh, which is not installed; install it, or run"
            " this command on every node with its own NODE_RANK"
        )
    environment = {"PDSH_RCMD_TYPE": "ssh", **os.environ}
    processes = {}
    try:
        for node, host in enumerate(place.to_start, 1):
            command = ["pdsh", "-S", "-w", host, _command_for(node).replace("%", "%%")]
            # A session of its own: Ctrl-C reaches the other nodes as node 0's order to stop.
            processes[node] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        yield processes
    finally:
        deadline = time.monotonic() + SILENCE
        for process in processes.values():
            try:
                process.wait(timeout=max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()


def _command_for(node: int) -> str:
    """For a shell on another host."""
    handed = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_OVER)}
    handed |= {"HOSTFILE": str(Path(os.environ["HOSTFILE"]).resolve()), "NODE_RANK": str(node)}
    assignments = [f"{name}={shlex.quote(value)}" for name, value in handed.items()]
    return f"cd {shlex.quote(str(Path.cwd()))} && {' '.join(assignments)} {shlex.join([sys.executable, *sys.argv])}"


class Team:
    """This node among the others: what it says of itself, and what it hears.

    Node 0 hears all others; they hear node 0. Inside `with`, records are read and written in a thread of their own, so
    that an address that no longer answers holds up nothing else.
    """

    def __init__(self, place: Place, patience: float, started: dict[int, subprocess.Popen] | None = None) -> None:
        """Opens node 0's store, or waits `patience` seconds for it; UserError where that fails. `started`: processes that
        live as long as the nodes which they started."""
        self.place, self.patience, self.started = place, patience, started or {}
        self.interface = None
        if place.nodes > 1:
            own = _reach(place, patience) if place.node else _resolve(place)[4][0]
            self.interface = _interface_with(own)
        self.store = _open_store(place)
        self.own: dict[str, Any] = {"host": socket.gethostname()}
        self.sent: dict[str, Any] = {}
        self.records: dict[int, dict[str, Any]] = {}
        self.heard = dict.fromkeys([0] if place.node else range(1, place.nodes), -math.inf)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_in_touch, daemon=True)

    def __enter__(self) -> "Team":
        if self.heard:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A thread that returns from native code while the interpreter shuts down aborts the process.
        self._over.set()
        if self.heard:
            self._thread.join(timeout=5)

    def _keep_in_touch(self) -> None:
        beat = 0
        try:
            while not self._over.wait(0.3):
                beat += 1
                self._exchange(beat)
        except RuntimeError:  # the connection to node 0 is closed
            self.heard = dict.fromkeys(self.heard, -math.inf)

    def _exchange(self, beat: int) -> None:
        record = {**self.own, "beat": beat}
        self.store.set(f"node {self.place.node}", json.dumps(record))
        self.sent = record
        for node in self.heard:
            if self.store.check([f"node {node}"]):
                heard = json.loads(self.store.get(f"node {node}"))
                if heard != self.records.get(node):
                    self.heard[node] = time.monotonic()
                    self.records = {**self.records, node: heard}  # readers keep the dictionary that they look at

    def say(self, **facts: Any) -> None:
        self.own = {**self.own, **facts}

    def wait_for(self, fact: str, patience: float | None = None) -> dict[int, Any]:
        """{node: what it says} under `fact`, once all that this node hears have said it.

        Raises NodeLost, another node's UserError (its fact "error"), or UserError when `patience` seconds have passed.
        """
        deadline = time.monotonic() + patience if patience else None
        while True:
            silent = [node for node in self.heard if fact not in self.records.get(node, {})]
            if not silent:
                return {node: self.records[node][fact] for node in self.heard}
            self._raise_what_others_met()
            if deadline and time.monotonic() > deadline:
                missing = ", ".join(f"node {node}" for node in silent)
                raise UserError(
                    f"{missing} of {self.place.nodes} nodes did not join {self.place.address}:{self.port} within"
                    f" {patience / 60:g} minutes; run the same command there, with its own NODE_RANK"
                )
            time.sleep(0.1)

    def _raise_what_others_met(self) -> None:
        for node in self._lost():
            where = self.records[node]["host"] if node else f"{self.place.address}:{self.place.port}"
            raise NodeLost(
                f"node {node} ({where}) was lost: its connection closed, or it was silent for {SILENCE:.0f} s (killed,"
                " rebooted or cut off); run the same command on all nodes to continue"
            )
        for record in self.records.values():
            if "error" in record:
                raise UserError(record["error"])
        for node, process in self.started.items():
            if process.poll() is not None and node not in self.records:
                host = self.place.to_start[node - 1]
                raise UserError(
                    f"node {node} ({host}) ended before it joined (exit code {process.returncode}); its own lines tell"
                    f" why. `ssh {host}` must work without a password, and this folder lie there under the same path"
                )

    def _lost(self) -> list[int]:
        """Nodes that joined, did not leave, and are silent."""
        late = time.monotonic() - SILENCE
        return [n for n, record in self.records.items() if self.heard[n] < late and "left" not in record]

    def _present(self) -> set[int]:
        return {n for n, record in self.records.items() if "left" not in record} - set(self._lost())

    @property
    def port(self) -> int:
        return self.store.port

    def in_trouble(self) -> bool:
        """Whether a rank failed on a node that this one hears, or the node was lost."""
        return bool(self._lost()) or any(record.get("failing") for record in self.records.values())

    def agree_on_ranks(self, own: int, asked: dict[str, Any]) -> list[int]:
        """Node 0: the ranks of every node, once all have joined, asked for the same as this one (UserError if not)."""
        with progress("waiting for the other nodes") if self.heard else nullcontext():
            joined = self.wait_for("joined", self.patience)
        for node, theirs in joined.items():
            if changed := differences(asked, theirs["asked"]):
                raise UserError(
                    f"node {node} ({self.records[node]['host']}) is not like node 0 ({'; '.join(changed)}); run the same"
                    " command with the same code and libraries on all nodes"
                )
        return [own, *(joined[node]["ranks"] for node in sorted(joined))]

    def environment(self, world: int) -> dict[str, str]:
        """Variables with which torch's ranks find each other in the store."""
        variables = {
            "MASTER_ADDR": self.place.address,
            "MASTER_PORT": str(self.port),
            "WORLD_SIZE": str(world),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        if self.interface and "GLOO_SOCKET_IFNAME" not in os.environ:
            variables["GLOO_SOCKET_IFNAME"] = self.interface
        return variables

    @contextmanager
    def last_word(self) -> Iterator[None]:
        """Node 0: tell the others how the work inside ended, and stay until they know."""
        word: tuple[int, str] = (1, "node 0 failed; its own output tells why")
        try:
            yield
            word = (0, "")
        except UserError as error:
            word = (2, str(error))
            raise
        except (SystemExit, KeyboardInterrupt) as stop:
            word = (getattr(stop, "code", 130), "stopped; run the same command on all nodes to continue")
            raise
        finally:
            self.say(order=self.own.get("order"), last_word=word)
            deadline = time.monotonic() + SILENCE
            while self._present() and time.monotonic() < deadline:
                time.sleep(0.1)

    def hear_last_word(self) -> tuple[int, str]:
        """Any other node: node 0's exit code and message, once it has ended; then this node leaves."""
        code, text = self.wait_for("last_word")[0]
        self.say(left=True)
        deadline = time.monotonic() + 5
        while "left" not in self.sent and time.monotonic() < deadline:
            time.sleep(0.1)
        return code, text


def _resolve(place: Place) -> tuple:
    try:
        return socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"MASTER_ADDR={place.address} is not an address that this machine knows ({error})") from None


def _reach(place: Place, patience: float) -> str:
    """Wait until node 0 listens; returns this machine's own address on the way there."""
    deadline = time.monotonic() + patience
    print(f"node {place.node} of {place.nodes}: joining node 0 at {place.address}:{place.port}", flush=True)
    with progress("waiting for node 0"):
        while True:
            try:
                with socket.create_connection((place.address, place.port), timeout=5) as connection:
                    return connection.getsockname()[0]
            except (OSError, OverflowError) as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"node 0 did not listen at {place.address}:{place.port} within {patience / 60:g} minutes"
                        f" ({error}); run the same command there with NODE_RANK=0, and see that MASTER_ADDR is its"
                        " address"
                    ) from None
            time.sleep(1)


def _interface_with(address: str) -> str | None:
    """Name of the network interface that has an address; gloo by itself takes the one of the host's name."""
    import psutil

    found = [name for name, owned in psutil.net_if_addrs().items() if any(a.address == address for a in owned)]
    return found[0] if found else None


def _open_store(place: Place) -> Any:
    from torch.distributed import TCPStore

    if place.node == 0:
        _check_listening(place)
    store = TCPStore(place.address, place.port, is_master=place.node == 0, wait_for_workers=False)
    if place.node and store.add(f"joined {place.node}", 1) > 1:
        raise UserError(f"NODE_RANK={place.node} is taken: another process has joined with it; give every node its own")
    return store


def _check_listening(place: Place) -> None:
    try:
        family, kind, _, _, address = _resolve(place)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        remedy = "unset it to let a free port be found" if place.nodes == 1 else "node 0 must run on MASTER_ADDR"
        raise UserError(
            f"MASTER_PORT={place.port} cannot be used on {place.address} ({error}); choose another, or {remedy}"
        ) from None
