"""Start a stage's ranks with torch's elastic agent, as torchrun does, on this node or on several.

`python STAGE.py`, or a run_*.sh, starts one rank for each GPU (launch.processes) on every node; where torchrun, srun or
deepspeed has started the script it is a rank already (rank.py). What lies on disk decides whether a stage is done,
never an exit code.
"""

import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qilin_med.config.experiment import Experiment, LaunchConfig
from qilin_med.errors import UserError, in_one_line

_PORT = 29500  # torchrun's default
# What a shell on another host must know too; DeepSpeed's launcher hands over the same.
_HANDED_OVER = ("NCCL_", "GLOO_", "UCX_", "PYTHON", "MASTER_")
STOPPED = 130  # exit code of ranks that saved a checkpoint because one of them was asked to stop
LAUNCHED_HERE = "QILIN_MED_LAUNCHED"  # set for ranks whose errors this module prints: the id of its process


class LostRank(UserError):
    """A rank's connection to another was lost."""


# ---------------------------------------------------------------------------------------------------------- nodes


@dataclass(frozen=True)
class Cluster:
    """This node's number among `nodes`, and where node 0 listens (port 0: any free one)."""

    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    slots: int | None = None  # ranks on this node, where a hostfile says so
    to_start: tuple[str, ...] = ()  # hosts on which node 0 is to start the same command


def find_cluster() -> Cluster:
    """From HOSTFILE, or from NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT; without them this machine is alone."""
    hosts = read_hostfile(Path(os.environ["HOSTFILE"])) if "HOSTFILE" in os.environ else {}
    nodes = len(hosts) or _number("NODES", 1)
    if nodes <= 1:
        return Cluster(port=_number("MASTER_PORT", 0), slots=next(iter(hosts.values()), None))
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing and not hosts:
        raise UserError(
            f"NODES={nodes} but {' and '.join(missing)} not set: give every node NODES, its own NODE_RANK (0 to"
            f" {nodes - 1}) and MASTER_ADDR, the address of node 0"
        )
    node, names = _number("NODE_RANK", 0), list(hosts)
    if not 0 <= node < nodes:
        raise UserError(f"NODE_RANK={node}: expected 0 to {nodes - 1}, one number for each of {nodes} nodes")
    return Cluster(
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
        if not (text := line.partition("#")[0].strip()):
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(0*[1-9]\d*)", text)
        if not found or found[1] in hosts:
            raise UserError(f"{path}: line {number}: expected `host slots=N`, every host once; found `{line.strip()}`")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise UserError(f"{path}: names no host; expected lines like `worker-1 slots=8`")
    return hosts


@contextmanager
def _other_nodes_started(cluster: Cluster) -> Iterator[None]:
    """Run this process's own command on the hosts that the cluster names, by pdsh over ssh, and wait for it to end."""
    if not cluster.to_start:
        yield
        return
    if not shutil.which("pdsh"):
        raise UserError(
            "HOSTFILE without NODE_RANK starts the other nodes with pdsh, which is not installed; install it, or run"
            " this command on every node with its own NODE_RANK"
        )
    handed = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_OVER)}
    handed["HOSTFILE"] = str(Path(os.environ["HOSTFILE"]).resolve())
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in handed.items())
    here, command = shlex.quote(str(Path.cwd())), shlex.join([sys.executable, *sys.argv])
    processes = {}
    # One pdsh each, so that a host that cannot be reached is known at once.
    for node, host in enumerate(cluster.to_start, 1):
        line = f"cd {here} && {given} NODE_RANK={node} {command}"
        processes[host] = subprocess.Popen(
            ["pdsh", "-S", "-w", host, line.replace("%", "%%")],
            env={"PDSH_RCMD_TYPE": "ssh", **os.environ},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the other nodes' ranks through rank 0
        )
    threading.Thread(target=_watch_the_start, args=(processes,), daemon=True).start()
    try:
        yield
    finally:
        deadline = time.monotonic() + 30
        for process in processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(deadline - time.monotonic(), 0))
            process.kill()


def _watch_the_start(processes: dict[str, subprocess.Popen]) -> None:
    """End this process if a node ends before ranks run here: torch's store would wait for it to the end of the timeout."""
    own = {process.pid for process in processes.values()}
    while {child.pid for child in psutil.Process().children()} <= own:
        for number, (host, process) in enumerate(processes.items(), 1):
            if process.poll():
                print(f"error: node {number} ({host}) ended before it joined (exit code {process.returncode}); its own lines"
                      f" tell why. `ssh {host}` must work without a password, and this folder lie there under the same"
                      " path", file=sys.stderr, flush=True)  # fmt: skip
                for other in processes.values():
                    other.kill()
                os._exit(2)
        time.sleep(0.2)


def count_ranks(launch: LaunchConfig, gpus: int, slots: int | None = None) -> int:
    """Ranks on a node with `gpus`: `slots` where a hostfile says so. UserError where the device asked for is not there."""
    processes = slots or launch.processes
    if launch.device == "cpu":
        return 1 if processes == "auto" else processes
    if gpus == 0:
        raise UserError(
            "launch.device is 'cuda' but no GPU is visible here; run on a GPU machine (nvidia-smi shows its GPUs), or"
            " choose a CPU experiment such as configs/demo.json"
        )
    ranks = gpus if processes == "auto" else processes
    if ranks > gpus:
        raise UserError(f"launch.processes is {ranks} but {gpus} GPUs are visible; lower it or set it to 'auto'")
    return ranks


# ---------------------------------------------------------------------------------------------------------- ranks


def launch_ranks(experiment: Experiment, cluster: Cluster) -> str:
    """Run this process's own command as the ranks of this node, and wait for them; returns who had them stopped ("": no
    one). UserError: the nodes do not meet, or a rank failed."""
    logging.disable(logging.CRITICAL)  # the agent's own lines: what matters of them is told below
    import torch
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.utils.distributed import get_free_port
    from torch.distributed.launcher.api import LaunchConfig as AgentConfig
    from torch.distributed.launcher.api import elastic_launch

    seconds = round(60 * experiment.launch.timeout_minutes)
    port = cluster.port or get_free_port()
    config = AgentConfig(
        min_nodes=cluster.nodes,
        max_nodes=cluster.nodes,
        nproc_per_node=count_ranks(experiment.launch, torch.cuda.device_count(), cluster.slots),
        run_id="qilin-med",
        rdzv_backend="static",  # the user says which node is 0: the one whose disk and terminal matter
        rdzv_endpoint=f"{cluster.address}:{port}",
        rdzv_configs={"rank": cluster.node, "timeout": seconds},
        max_restarts=0,  # a stage continues when its command is run again
        signals_to_handle="SIGTERM",
        shutdown_timeout=seconds,  # ranks that are stopped write a checkpoint first
    )
    os.environ |= {LAUNCHED_HERE: str(os.getpid()), "OMP_NUM_THREADS": str(experiment.launch.threads_per_process)}
    if cluster.nodes > 1:
        print(f"node {cluster.node} of {cluster.nodes}: meeting the others at {cluster.address}:{port}", flush=True)
        if interface := _interface_towards(cluster):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    stop = _listen_for_stops()
    with _other_nodes_started(cluster):
        try:
            elastic_launch(config, sys.executable)(*sys.argv)
        except (SignalException, KeyboardInterrupt):
            return stop[-1] if stop else "SIGTERM"
        except ChildFailedError as error:
            if {failure.exitcode for failure in error.failures.values()} == {STOPPED}:
                return stop[-1] if stop else "another node"
            _raise_failure(error.failures.values())
        except (DistNetworkError, DistStoreError) as error:
            raise UserError(_explain_no_meeting(cluster, port, seconds, error)) from None
    return ""


def _listen_for_stops() -> list[str]:
    """Who asks to stop from here on. Ranks get SIGTERM for Ctrl-C too: a rank whose interpreter is just starting would answer
    SIGINT with a traceback."""
    heard: list[str] = []

    def interrupt(_number: int, _frame: object) -> None:
        heard.append("the user")
        os.kill(os.getpid(), signal.SIGTERM)

    def terminate(_number: int, _frame: object) -> None:  # until the agent puts its own handler in place
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)
    return heard


def _raise_failure(failures: Collection[Any]) -> None:
    """Raise what the ranks of this node ended with: a user's error first, then a kill, then a lost connection, which follows
    from others' errors, last what only a traceback explains."""
    told = [failure.message for failure in failures if isinstance(failure.message, dict)]  # from torch's error files
    errors, lost = (
        sorted({message["message"].removeprefix(mark) for message in told if message["message"].startswith(mark)})
        for mark in ("UserError: ", "LostRank: ")
    )
    was_killed = any(failure.exitcode == -signal.SIGKILL for failure in failures)
    if texts := errors or (not was_killed and lost):
        raise UserError("; ".join(texts))
    for message in told:
        if not message["message"].startswith("LostRank: "):
            print(message["extraInfo"]["py_callstack"], file=sys.stderr)
    exits = ", ".join(
        f"rank {failure.local_rank} of this node {_describe_exit(failure.exitcode)}" for failure in failures
    )
    raise UserError(f"{exits}. The messages above tell more; run the same command to continue")


def _describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (signal 9: by hand, or by the system when memory ran out)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def _explain_no_meeting(cluster: Cluster, port: int, seconds: int, error: Exception) -> str:
    """Why the nodes' agents did not find each other in the store on node 0."""
    where, minutes = f"{cluster.address}:{port}", f"{seconds / 60:g} minutes"
    if "in use" in str(error):
        return f"MASTER_PORT={port} cannot be used on {cluster.address} (already in use); choose another, or unset it"
    if cluster.node:
        return (
            f"node 0 did not listen at {where} within {minutes} ({in_one_line(error)}); run the same command"
            " there with NODE_RANK=0, and see that MASTER_ADDR is its address"
        )
    return (
        f"not all of {cluster.nodes} nodes joined {where} within {minutes}; run the same command on each, with its own"
        " NODE_RANK"
    )


def _interface_towards(cluster: Cluster) -> str:
    """The network interface on the way to node 0; gloo by itself takes the one of the host's name."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((cluster.address, cluster.port))  # sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={cluster.address} is not an address that this machine reaches ({error})"
        ) from None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in {a.address for a in addresses}), "")
