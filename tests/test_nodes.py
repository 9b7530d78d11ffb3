"""Several nodes: an experiment comes to the same in one process and on two hosts, and what is wrong is said at once."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from lives import COMMAND, Life

from smoltrain import nodes, runs
from smoltrain.__main__ import main
from smoltrain.config import ConfigError
from smoltrain.runs import read, read_metrics

FEW = ("data.train_rows=400", "data.test_rows=8", "evaluation.max_rows=0", "tracking=none", "hardware=ddp")
FEW += ("global_batch_size=8", "trainer.args.max_steps=50", "trainer.args.logging_steps=1")
FEW += ("trainer.args.learning_rate=5e-5", "trainer.args.save_steps=1000")
ADDRESS = "10.231.7.1"  # of the first of two hosts, on a link that only they have
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def ip(*words: str) -> None:
    subprocess.run([str(IP), *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two network namespaces with a link between them, each as a host of its own; their names."""
    if IP is None or os.getuid():
        pytest.skip("only root can make network namespaces, by iproute2's ip")
    names = [f"smol{os.getpid()}{end}" for end in "ab"]
    links = [f"v{os.getpid()}{end}" for end in "ab"]
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
        for name, link, address in zip(names, links, (ADDRESS, "10.231.7.2"), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for device in (link, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


# Enters the network of a host before the command begins.
ENTER = "import ctypes, os; assert not ctypes.CDLL(None).setns(os.open('/run/netns/{}', os.O_RDONLY), 0x40000000); "
OWN = (*FEW, "hardware.nodes=2", "hardware.processes=1", f"hardware.rendezvous={ADDRESS}:29400")


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(directory) if "loss" in line]


@pytest.fixture
def on_hosts(hosts, forked):
    """Starts a command on both hosts."""

    def start(*overrides: str) -> list[Life]:
        return [forked(*OWN, *overrides, code=ENTER.format(host) + COMMAND) for host in hosts]

    return start


def ended(started: list[Life]) -> list[int]:
    return [one.wait() for one in started]


def said(*started: Life) -> str:
    return "".join(one.stdout + one.stderr for one in started)


def test_on_two_hosts_a_run_takes_the_fifty_steps_of_one_process(on_hosts, folder, smoltrain):
    first, other = on_hosts()
    assert ended([first, other]) == [0, 0], said(first, other)
    (directory,) = (folder / "multirun").glob("*/*")
    together = read(directory)
    assert together["status"] == "completed" and "all 2 nodes are here" in said(first)
    assert "rows to learn from" in (directory / "ranks" / "1.log").read_text() and str(directory) in said(other)
    (alone,) = smoltrain(*FEW, "hardware.processes=1", "name=alone", quick=())
    assert len(losses(directory)) == 50
    assert losses(directory) == pytest.approx(losses(alone["directory"]), abs=1e-5)
    assert together["metrics"]["eval_loss"] == pytest.approx(alone["metrics"]["eval_loss"], abs=1e-5)
    assert ended(on_hosts()) == [0, 0]  # it has completed already, and all nodes hear of it


def test_a_signal_to_one_host_stops_both_saved_and_one_process_goes_on(on_hosts, folder, smoltrain):
    first, other = on_hosts("trainer.args.max_steps=20")
    first.until("step 8/")
    other.kill(signal.SIGTERM)
    assert ended([first, other]) == [143, 143], said(first, other)
    (directory,) = (folder / "multirun").glob("*/*")
    record = read(directory)
    assert record["status"] == "preempted" and "saved at step" in record["error"]
    own = (*FEW, "hardware.processes=1", "trainer.args.max_steps=20")
    assert smoltrain(*own, quick=()) == []
    (alone,) = smoltrain(*own, "name=alone", quick=())
    again = read(directory)
    assert again["status"] == "completed" and again["resumed"][0]["step"] >= 8
    assert losses(directory) == pytest.approx(losses(alone["directory"]), abs=1e-5)


def test_a_host_that_is_gone_is_named_on_the_other_and_neither_says_it_succeeded(on_hosts, folder):
    first, other = on_hosts()
    first.until("step 3/")
    other.kill()
    assert first.wait() == 1 and "is gone" in said(first) and "node 1 (" in said(first), said(first)
    assert "Traceback" not in said(first)
    (directory,) = (folder / "multirun").glob("*/*")
    assert read(directory)["status"] == "failed" and "node 1" in read(directory)["error"]
    first, other = on_hosts()
    first.until("step 3/")
    first.kill()
    assert other.wait() == 1 and "node 0 (" in said(other), said(other)
    assert "is gone; the same command on all nodes" in said(other)
    assert read(directory)["status"] == "interrupted"


# ---------------------------------------------------------------- what is wrong, in one process


def free() -> int:
    return nodes.free_port("127.0.0.1")


def config(port: int, *overrides: str):
    from conftest import resolvable

    own = ("hardware.nodes=2", f"hardware.rendezvous=127.0.0.1:{port}", *overrides)
    return resolvable(("hardware=ddp", "global_batch_size=8", *own))


def meet(cfg, said: list) -> None:
    try:
        with nodes.meeting(cfg) as met:
            said.append(met.index)
    except ConfigError as error:
        said.append(str(error))


def both(one, other) -> tuple[list, list]:
    """What two nodes come to that meet with these configs."""
    said: tuple[list, list] = ([], [])
    first = threading.Thread(target=meet, args=(one, said[0]))
    first.start()
    time.sleep(0.3)
    meet(other, said[1])
    first.join(20)
    return said


def test_the_first_at_the_address_owns_the_run_and_all_have_to_be_started_by_the_same_command():
    port = free()
    assert both(config(port), config(port)) == ([0], [1])
    one, other = both(config(port), config(port, "trainer.args.learning_rate=3e-3"))
    assert one == other and "trainer.args.learning_rate: 0.003 on node 1" in one[0]
    assert "0.001 on" in one[0] and "start all by the same command" in one[0]


def test_another_version_on_another_node_is_refused(monkeypatch):
    port, versions = free(), runs.versions()
    listener = threading.Thread(target=meet, args=(config(port), said := []))
    listener.start()
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        line = nodes.Line(connection, "node 0")
        here = {"host": "b", "versions": versions | {"torch": "1.0"}, "config": {}}
        line.say(**(here | {"config": nodes.experiment(nodes.resolved(config(port))[0])}))
        assert line.heard(5) == {"node": 1}
        assert line.heard(5)["refused"] == [
            f"torch: 1.0 on node 1 (b), {versions['torch']} on node 0 ({socket.gethostname()}); "
            "install the same on all nodes"
        ]
    listener.join(20)
    assert "torch: 1.0" in said[0]


def test_a_node_that_never_comes_is_missed_after_a_stated_time(monkeypatch, folder, capsys):
    monkeypatch.setattr(nodes, "JOIN", 1)
    own = (f"hardware.rendezvous=127.0.0.1:{free()}", "hardware.nodes=2", "trainer.args.use_cpu=true")
    assert main([*FEW, "hardware.processes=1", *own]) == 2
    said = capsys.readouterr().err
    assert "hardware.nodes=2: 1 node came within 1 seconds; start the same command on the others too" in said
    assert not (folder / "multirun").exists()


def test_nobody_at_the_address_and_a_port_that_another_program_has_are_said(monkeypatch, capsys):
    monkeypatch.setattr(nodes, "JOIN", 1)
    monkeypatch.setattr(nodes, "WELCOME", 1)
    monkeypatch.setattr(nodes, "listening", lambda host, port: None)  # as on another machine
    port = free()
    meet(config(port), said := [])
    assert "nobody has answered for 1 seconds (Connection refused)" in said[0]
    with socket.create_server(("127.0.0.1", port)):
        meet(config(port), said := [])
        assert "what listens there is no node of a run; choose another port" in said[0]


def test_a_directory_that_another_node_does_not_see_is_refused(monkeypatch, folder):
    monkeypatch.setattr(nodes, "SHARED", 1)
    here, there = socket.socketpair()
    first = nodes.Meeting("127.0.0.1", 2, 0, {1: nodes.Line(here, "node 1 (b)")})
    other = nodes.Meeting("127.0.0.1", 2, 1, {0: nodes.Line(there, "node 0 (a)")})
    (folder / "ranks").mkdir()
    (folder / "ranks" / "given.json").write_text(json.dumps({"nonce": "of another disk"}))
    said: list[str] = []

    def come() -> None:
        with pytest.raises(ConfigError) as error:
            other.come()
        said.append(str(error.value))

    helper = threading.Thread(target=come)
    helper.start()
    with pytest.raises(ConfigError, match="does not see what node 0"):
        first.begin(folder, "this run's")
    helper.join(20)
    assert "all nodes of a run have to share the disk" in said[0]
    here.close()
    with pytest.raises(ConfigError, match=r"node 0 \(a\) is gone, before the run began"):
        other.come()
    other.end()
    assert other.code == 1
    there.close()


def test_how_other_nodes_end_is_heard_and_who_has_not_said_it_is_not_taken_for_killed():
    here, there = socket.socketpair()
    met = nodes.Meeting("127.0.0.1", 2, 0, {1: nodes.Line(here, "node 1 (b)")})
    other = nodes.Line(there, "node 0 (a)")
    met.listen()
    assert met.of_node(1, 2) == [None, None] and met.others_run and not met.failed
    other.say(codes=[143, None])
    met.listen()
    assert met.of_node(1, 2) == [143, None] and not met.others_run and met.failed
    helper = nodes.Meeting("127.0.0.1", 2, 1, {0: other})
    met.tell(ended=3)
    here.close()
    helper.end()
    assert helper.code == 3
    there.close()
    here, there = socket.socketpair()
    gone = nodes.Meeting("127.0.0.1", 2, 0, {1: nodes.Line(here, "node 1 (b)")})
    there.close()
    gone.listen()
    assert gone.of_node(1, 2) == [-signal.SIGKILL] * 2 and gone.failed
    here.close()


def test_what_is_no_address_is_refused_and_a_sweep_runs_its_trials_on_one_machine(folder, capsys, forked):
    for given, said in (
        ("null", "say where the nodes meet"),
        ("node-1", "host:port"),
        ("no.such.host:1", "write host"),
    ):
        assert main(["hardware=ddp", "hardware.nodes=2", f"hardware.rendezvous={given}", "global_batch_size=16"]) == 2
        assert said in capsys.readouterr().err
    own = ("hardware.nodes=2", f"hardware.rendezvous=127.0.0.1:{free()}", "hardware.processes=1", "seed=1,2")
    assert forked("-m", *FEW, *own).wait() == 1
    (trial, *_) = (folder / "multirun").glob("*/*/*/log.txt")
    assert "a trial of a sweep runs on one machine" in trial.read_text()
