"""Several machines, as two network namespaces of this one: joined by ssh or Slurm, killed, preempted, continued."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forked import free_port
from transformers import LlamaConfig, LlamaForCausalLM

from qilin_med.artifact import verify_folder
from qilin_med.errors import UserError
from qilin_med.launch.agent import Cluster, find_cluster, read_hostfile
from qilin_med.launch.rank import is_rank
from qilin_med.train.checkpoints import COMPLETE
from qilin_med.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.77.31.1", "10.77.31.2")
STEPS = 60


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces that reach each other at ADDRESSES."""
    names = tuple(f"qm{os.getpid()}-{node}" for node in range(2))
    try:
        for name in names:
            ip(f"netns add {name}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs `ip` and the right to make network namespaces")
    try:
        ip(f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip(f"-n {name} addr add {address}/24 dev eth0")
            for link in ("lo", "eth0"):
                ip(f"-n {name} link set {link} up")
        yield names
    finally:
        for name in names:
            kill_machine(name)
            ip(f"netns del {name}")


def kill_machine(name: str) -> None:
    for pid in subprocess.check_output(["ip", "netns", "pids", name], text=True).split():
        os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_tokenizer) -> Path:
    """A folder with a tiny base model, text and an experiment file."""
    folder, source = tmp_path_factory.mktemp("nodes"), random.Random(0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(small_tokenizer), **sizes)).save_pretrained(folder / "base")
    small_tokenizer.save_pretrained(folder / "base")
    lines = ("".join(source.choices(["发热", "头痛", "饮食", "休息", "药"], k=20)) for _ in range(100))
    (folder / "cpt.txt").write_text("\n".join(lines), encoding="utf-8")
    experiment = {
        "name": "nodes", "seed": 5, "output_dir": str(folder / "run"),
        "model": {"path": str(folder / "base"), "template": "qilin", "dtype": "float32"},
        "launch": {"device": "cpu", "processes": 1},
        "pretraining": {
            "data": [str(folder / "cpt.txt")], "block_size": 32, "epochs": 1, "max_steps": STEPS,
            "batch_size_per_device": 4, "learning_rate": 1e-2, "warmup_ratio": 0.1, "weight_decay": 0.01,
            "checkpoint_every": 10, "deepspeed": "configs/deepspeed/zero2.json", "report_to": [],
        },
    }  # fmt: skip
    (folder / "c.json").write_text(json.dumps(experiment), encoding="utf-8")
    return folder


def write_commands(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def command(world: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "pretraining.py"), "--config", str(world / "c.json"), *arguments]


def start(command: list[str], **environment: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "pretraining" / "metrics.jsonl")]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def test_two_machines_train_like_one_killed_and_preempted(machines, world, tmp_path):
    """Node 1 is killed, then Slurm preempts: the losses are those of two ranks on one machine, bit for bit.

    ssh and Slurm are played by scripts; pdsh, the namespaces and the training are real.
    """
    folder = world / "run" / "pretraining"
    lost = start_over_ssh(machines, world, tmp_path)
    wait_until((folder / "checkpoints" / "checkpoint-10" / COMPLETE).exists, lost)
    kill_machine(machines[1])
    one_machine = start(command(world, f"output_dir={tmp_path}/one", "launch.processes=2"))
    said, _ = lost.communicate(timeout=300)
    assert lost.returncode == 2, said
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("error: pretraining did not finish: rank 0 lost its connection to another rank")
    assert "run the same command on all nodes" in last and "checkpoint-" in last
    assert 10 <= len(losses(world / "run")) < STEPS
    said, _ = one_machine.communicate(timeout=300)
    assert one_machine.returncode == 0, said

    slurm = play_slurm(machines, tmp_path)
    job = submit(world, slurm)
    preempted, steps = job(), len(losses(world / "run"))
    wait_until(lambda: len(losses(world / "run")) > steps + 2, preempted)
    preempted.send_signal(signal.SIGUSR1)
    said, _ = preempted.communicate(timeout=300)
    assert preempted.returncode == 130 and "continuing from checkpoint-" in said, said
    assert (slurm / "scontrol.log").read_text().splitlines()[-1] == "requeue 1"
    assert not (folder / "merged").exists()
    continued = job()
    said, _ = continued.communicate(timeout=300)
    assert continued.returncode == 0 and "continuing from checkpoint-" in said, said
    verify_folder(folder / "merged")
    assert losses(world / "run") == losses(tmp_path / "one")
    assert len(losses(world / "run")) == STEPS


def start_over_ssh(machines: tuple[str, str], world: Path, folder: Path) -> subprocess.Popen:
    """The stage on both machines: one command on the first, and a hostfile."""
    if not shutil.which("pdsh"):
        pytest.skip("needs pdsh")
    ssh = f'''while [ "${{1#-}}" != "$1" ]; do shift; done
[ "$1" = {ADDRESSES[1]} ] && shift && exec ip netns exec {machines[1]} bash -c "$*"'''
    path = f"{write_commands(folder / 'ssh', ssh=ssh)}:{os.environ['PATH']}"
    (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    return start(["ip", "netns", "exec", machines[0], *command(world)], PATH=path, HOSTFILE=str(folder / "hostfile"))


def play_slurm(machines: tuple[str, str], folder: Path) -> Path:
    """Slurm's commands, each with a log of its calls; srun runs one task in each namespace."""
    folder = folder / "slurm"
    log = f'echo "$*" >>{folder}/$(basename $0).log'
    return write_commands(
        folder,
        sbatch=f"{log}; wc -l <{folder}/sbatch.log",
        scontrol=f'{log}; [ "$1" = requeue ] || printf "%s\\n" {" ".join(ADDRESSES)}',
        scancel=f"{log}; kill -TERM $(cat {folder}/tasks)",
        srun=f"""while [ "${{1#-}}" != "$1" ]; do shift; done
SLURM_NODEID=0 ip netns exec {machines[0]} "$@" & first=$!
SLURM_NODEID=1 ip netns exec {machines[1]} "$@" & second=$!
echo $first $second >{folder}/tasks
wait $second; wait $first""",
    )


def submit(world: Path, slurm: Path) -> Callable[[], subprocess.Popen]:
    """Hand in the three stages as a user does; returns what starts the first job, as Slurm does."""
    environment = {"PATH": f"{slurm}:{os.environ['PATH']}", "CONFIG": str(world / "c.json"), "NODES": "2"}
    submitted = start(["bash", str(ROOT / "scripts" / "slurm" / "submit.sh")], **environment)
    said, _ = submitted.communicate(timeout=60)
    assert submitted.returncode == 0, said
    calls = (slurm / "sbatch.log").read_text().splitlines()
    assert ["--dependency=afterok:1 " in calls[1], "--dependency=afterok:2 " in calls[2]] == [True, True]
    assert "--dependency" not in calls[0] and "--nodes=2" in calls[0]
    job = ["bash", *calls[0].split()[-2:]]
    assert job[1:] == ["scripts/slurm/stage.sbatch", "run_pt.sh"]
    names = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "any",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    del environment["NODES"]
    return lambda: start(job, **environment, **names)


def on_both(machines: tuple[str, str], world: Path, *arguments: str, code: Path = ROOT) -> list[subprocess.Popen]:
    """The same command on both machines, by hand; node 1 runs the code of another folder if `code` says so."""
    started = []
    for node, (machine, root) in enumerate(zip(machines, (ROOT, code), strict=True)):
        script = [sys.executable, str(root / "pretraining.py"), *command(world, *arguments)[2:]]
        variables = {"NODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": ADDRESSES[0], "PYTHONPATH": str(root)}
        started.append(start(["ip", "netns", "exec", machine, *script], **variables))
    return started


def said_by(processes: list[subprocess.Popen]) -> list[str]:
    """What each says last; none may hang, or end well."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert not any("Traceback" in output for output in outputs), outputs
    return [output.splitlines()[-1] for output in outputs]


def test_a_cut_link_ends_both_sides_within_the_timeout_and_the_run_continues(machines, world, tmp_path):
    """At the first checkpoint the link goes down. gloo notices nothing then but its own time limit."""
    arguments = [f"output_dir={tmp_path}/run", "launch.timeout_minutes=0.6", "pretraining.max_steps=4000"]
    folder = tmp_path / "run" / "pretraining"
    both = on_both(machines, world, *arguments)
    wait_until((folder / "checkpoints" / "checkpoint-10" / COMPLETE).exists, both[0])
    ip(f"-n {machines[1]} link set eth0 down")
    cut = time.monotonic()
    try:
        lines = said_by(both)
    finally:
        ip(f"-n {machines[1]} link set eth0 up")
    assert time.monotonic() - cut < 90
    for rank, line in enumerate(lines):
        assert line.startswith(f"error: pretraining did not finish: rank {rank} lost its connection to another rank")
        assert "run the same command on all nodes" in line and "checkpoint-" in line
    steps = len(losses(tmp_path / "run"))
    both = on_both(machines, world, *arguments)
    wait_until(lambda: len(losses(tmp_path / "run")) > steps + 2, both[0])
    both[1].send_signal(signal.SIGINT)  # Ctrl-C on any node stops all, with a checkpoint
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [130, 130], outputs
    assert "continuing from checkpoint-" in outputs[0] and "stopped by another node at step" in outputs[0]


def test_another_version_of_the_code_on_one_node_is_named_on_both(machines, world, tmp_path):
    for part in ("qilin_med", "configs"):
        shutil.copytree(ROOT / part, tmp_path / "older" / part)
    shutil.copy(ROOT / "pretraining.py", tmp_path / "older")
    with (tmp_path / "older/qilin_med/model/losses.py").open("a") as file:
        file.write("# of last week\n")
    both = on_both(machines, world, f"output_dir={tmp_path}/run", code=tmp_path / "older")
    for line in said_by(both):
        assert re.match(r"error: rank 1 \(.*\) is not like rank 0 \(code: \w+ -> \w+\); run the same command", line)
    assert not (tmp_path / "run").exists()


def test_a_host_that_cannot_be_reached_is_named_at_once(world, tmp_path):
    if not shutil.which("pdsh"):
        pytest.skip("needs pdsh")
    path = f"{write_commands(tmp_path / 'ssh', ssh='echo no such host >&2; exit 255')}:{os.environ['PATH']}"
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=1\nelsewhere slots=1\n")
    arguments = [f"output_dir={tmp_path}/run", "launch.timeout_minutes=10"]
    variables = {"PATH": path, "HOSTFILE": str(tmp_path / "hostfile"), "MASTER_PORT": str(free_port())}
    process = start(command(world, *arguments), **variables)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 2 and "Traceback" not in said
    assert "elsewhere: no such host" in said
    assert "error: node 1 (elsewhere) ended before it joined" in said.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------- who takes part


@pytest.fixture
def variables(monkeypatch) -> pytest.MonkeyPatch:
    for name in ("NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_cluster_follows_from_the_environment(variables, tmp_path):
    assert find_cluster() == Cluster()
    for name, value in {"NODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}.items():
        variables.setenv(name, value)
    assert find_cluster() == Cluster(node=2, nodes=3, address="head", port=1234)
    (tmp_path / "hostfile").write_text("# ours\nworker-1 slots=8\n\nworker-2 slots=4  # smaller\n")
    for name in ("NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        variables.delenv(name)
    variables.setenv("HOSTFILE", str(tmp_path / "hostfile"))
    assert find_cluster() == Cluster(0, 2, "worker-1", 29500, slots=8, to_start=("worker-2",))
    variables.setenv("NODE_RANK", "1")
    assert find_cluster() == Cluster(1, 2, "worker-1", 29500, slots=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"NODES": "2"}, "NODE_RANK and MASTER_ADDR not set"),
        ({"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "expected 0 to 1"),
        ({"NODES": "two"}, "NODES=two: expected a whole number"),
        ({"HOSTFILE": "nowhere"}, "nowhere cannot be read"),
    ],
)
def test_what_is_missing_or_wrong_is_named(variables, settings, words):
    for name, value in settings.items():
        variables.setenv(name, value)
    with pytest.raises(UserError, match=words):
        find_cluster()


@pytest.mark.parametrize(
    "line", ["worker-1", "worker-1 slots=0", "worker-1 gpus=2", "worker-1 slots=1 more", "a slots=1"]
)
def test_a_line_that_is_no_host_is_named(tmp_path, line):
    (tmp_path / "hostfile").write_text(f"a slots=2\n{line}\n")
    with pytest.raises(UserError, match="line 2"):
        read_hostfile(tmp_path / "hostfile")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[01-04]", "node01"), ("node1,node[2-3]", "node1"), ("rack-1[7,9]", "rack-17"), ("one", "one")],
)
def test_a_task_of_srun_is_a_rank_and_a_batch_script_is_none(monkeypatch, nodes, first):
    job = {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": nodes}
    monkeypatch.setattr(os, "environ", job.copy())
    assert not is_rank()
    monkeypatch.setattr(os, "environ", job | step)
    assert is_rank()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["9", "1", "16", "8", first, "20123"]
    monkeypatch.setattr(os, "environ", job | step | {"NODES": "2"})  # each task is a node
    assert not is_rank()
