"""launch/tpu_queued_resource.sh and tpu_vm.sh: exact commands, their order, failures, preemption and resume."""

import dataclasses
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

QUEUE = "tpu_queued_resource.sh"
WHERE = ["--zone=us-west4-a", "--project=my-project"]
LIST = "queued-resources list"
STATUS = "cat train.status"
FOLLOW = "tail --lines"
FRESH = (LIST, [(0, ""), (0, "ACTIVE\n")])  # there is none, then it is ready
FINISHED = (STATUS, [(0, "0\n")])
UP = ["list", "create pubmed", "list", "scp", "ssh install", "ssh start"]


def steps(stage):
    """The calls in short."""
    names = []
    for call in stage.calls:
        name, *words = call[4:]  # after "gcloud compute tpus queued-resources"
        command = next((word for word in words if word.startswith("--command=")), "")
        if name in ("create", "delete"):
            name += f" {words[0]}"
        for mark, meaning in {"pip install": "install", "nohup": "start", FOLLOW: "follow", STATUS: "status"}.items():
            if mark in command:
                name += f" {meaning}"
        names.append(name)
    return names


def test_run_makes_installs_trains_follows_and_deletes(stage):
    stage.answer(FRESH, FINISHED)
    done = stage.run(QUEUE, "run")
    assert done.returncode == 0, done.stderr
    assert "training has finished" in done.stderr
    assert steps(stage) == [*UP, "ssh follow", "ssh status", "delete pubmed"]


def test_the_commands_are_exactly_these(stage):
    stage.answer(FRESH, FINISHED)
    stage.run(QUEUE, "run")
    prefix = ["gcloud", "compute", "tpus", "queued-resources"]
    look, create, _, copy, install, start, follow, status, delete = stage.calls
    assert look == [*prefix, "list", *WHERE, "--filter=name~/pubmed$", "--format=value(state.state)"]
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=pubmed", "--spot"]
    assert create == [*prefix, "create", "pubmed", *WHERE, *kind]
    assert copy[:5] == [*prefix, "scp"]
    assert copy[5].endswith("/biomamba_jax.tar.gz")
    assert copy[6:] == ["pubmed:biomamba_jax.tar.gz", *WHERE, "--node=all", "--worker=all"]
    for call, workers in ((install, "all"), (start, "all"), (follow, "0"), (status, "0")):
        assert call[:-1] == [*prefix, "ssh", "pubmed", *WHERE, f"--node={workers}", f"--worker={workers}"]
    assert delete == [*prefix, "delete", "pubmed", *WHERE, "--force", "--quiet"]


def test_several_slices_are_one_queued_resource(stage):
    stage.settings("SLICES=2 CAPACITY=reserved CREATE_FLAGS=(--network='my net')")
    stage.answer(FRESH)
    assert stage.run(QUEUE, "create").returncode == 0
    assert stage.calls[1][-4:] == ["--node-count=2", "--node-prefix=pubmed", "--reserved", "--network=my net"]


@pytest.mark.parametrize(
    ("accelerator", "image"),
    [("v4-8", "tpu-ubuntu2204-base"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-256", "v2-alpha-tpuv6e")],
)
def test_each_accelerator_gets_its_image(stage, accelerator, image):
    stage.settings(f"ACCELERATOR={accelerator}")
    stage.answer(FRESH)
    stage.run(QUEUE, "create")
    assert f"--runtime-version={image}" in stage.calls[1]


def test_dry_run_prints_every_command_and_calls_nothing(stage):
    done = stage.run(QUEUE, "--dry-run", "run")
    assert done.returncode == 0, done.stderr
    assert stage.calls == []
    words = [shlex.split(line) for line in done.stdout.splitlines()]
    verbs = [line[0] if line[0] == "git" else line[4] for line in words]
    assert verbs == ["create", "list", "git", "scp", "ssh", "ssh", "ssh", "ssh", "delete"]


def test_it_waits_until_the_resource_is_there(stage):
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    stage.answer((LIST, [(0, f"{state}\n") for state in states]))
    assert stage.run(QUEUE, "wait").returncode == 0
    assert len(stage.calls) == 3


def test_a_look_that_fails_is_repeated(stage):
    stage.answer((LIST, [(1, ""), (0, "PROVISIONING\n"), (1, ""), (1, ""), (0, "ACTIVE\n")]))
    assert stage.run(QUEUE, "wait").returncode == 0
    assert len(stage.calls) == 5


def states(*names):
    return LIST, [(0, f"{name}\n" if name else "") for name in names]


def test_machines_lost_before_they_are_ready_are_made_anew(stage):
    stage.answer(states("", "WAITING_FOR_RESOURCES", "FAILED", "FAILED", "", "ACTIVE"), FINISHED)
    done = stage.run(QUEUE, "run")
    assert done.returncode == 0, done.stderr
    assert "error: pubmed will not become ready: it is lost" in done.stderr
    assert "its machines are lost; restart 1 of at most 50" in done.stderr
    lost = ["list", "create pubmed", "list", "list", "list", "delete pubmed"]
    assert steps(stage) == [*lost, *UP, "ssh follow", "ssh status", "delete pubmed"]


@pytest.mark.parametrize("step", ["pip install", "nohup"])
def test_machines_lost_while_they_are_set_up_are_made_anew(stage, step):
    fails = [(255, "")] * 3  # all tries
    stage.answer(states("", "ACTIVE", "SUSPENDING", "", "ACTIVE"), FINISHED, (step, [*fails, (0, "")]))
    done = stage.run(QUEUE, "run")
    assert done.returncode == 0, done.stderr
    assert steps(stage).count("create pubmed") == 2


def test_machines_lost_before_training_are_counted_and_the_last_deleted(stage):
    stage.settings("MAX_RESTARTS=1")
    stage.answer(states("", "FAILED", "FAILED", "", "FAILED"))
    done = stage.run(QUEUE, "run")
    assert done.returncode == 1
    assert "MAX_RESTARTS=1 is reached" in done.stderr
    assert steps(stage).count("create pubmed") == 2
    assert steps(stage)[-1] == "delete pubmed"


def test_an_installation_that_keeps_failing_is_tried_again_and_its_machines_deleted(stage):
    stage.answer(FRESH, ("pip install", [(255, "")]))
    done = stage.run(QUEUE, "run")
    assert done.returncode == 1
    assert "could not be installed on every worker" in done.stderr
    assert steps(stage) == [*UP[:-1], "ssh install", "ssh install", "list", "delete pubmed"]


def test_an_installation_that_fails_once_goes_on(stage):
    stage.answer(FRESH, FINISHED, ("pip install", [(255, ""), (0, "")]))
    assert stage.run(QUEUE, "run").returncode == 0
    assert steps(stage).count("ssh install") == 2


def test_what_existed_before_is_never_deleted(stage):
    stage.answer((LIST, [(0, "ACTIVE\n")]))
    done = stage.run(QUEUE, "run")
    assert done.returncode == 1
    assert "pubmed exists already (ready)" in done.stderr
    assert steps(stage) == ["list"]


def test_a_request_that_failed_on_its_way_back_is_not_made_twice(stage):
    stage.answer((LIST, [(0, ""), (0, "WAITING_FOR_RESOURCES\n"), (0, "ACTIVE\n")]), (" create ", [(1, "")]), FINISHED)
    assert stage.run(QUEUE, "run").returncode == 0
    assert steps(stage).count("create pubmed") == 1


def test_a_request_that_is_refused_is_tried_again_and_leaves_nothing_to_delete(stage):
    stage.answer((" create ", [(1, "")]))
    done = stage.run(QUEUE, "run")
    assert done.returncode == 1
    assert "could not be created in 3 tries" in done.stderr
    assert steps(stage).count("create pubmed") == 3
    assert "delete pubmed" not in steps(stage)


def test_a_preempted_run_gets_new_machines_and_goes_on(stage):
    states = ["", "ACTIVE", "SUSPENDED", "", "ACTIVE"]
    stage.answer(
        (LIST, [(0, f"{state}\n" if state else "") for state in states]),
        (FOLLOW, [(255, ""), (0, "")]),
        (STATUS, [(255, ""), (0, "0\n")]),
    )
    done = stage.run(QUEUE, "run")
    assert done.returncode == 0, done.stderr
    assert "its machines are lost; restart 1 of at most 50" in done.stderr
    look = ["ssh follow", "ssh status"]
    preempted = ["list", "delete pubmed"]
    assert steps(stage) == [*UP, *look, *preempted, *UP, *look, "delete pubmed"]
    starts = [call[-1] for call in stage.calls if "nohup" in call[-1]]
    assert starts[0] == starts[1]  # the same command: training finds its checkpoint itself


def test_training_that_stopped_because_of_a_preemption_is_not_taken_for_finished(stage):
    states = ["ACTIVE", "SUSPENDING", "", "ACTIVE"]
    stage.answer(
        (LIST, [(0, f"{state}\n" if state else "") for state in states[1:]]), (STATUS, [(0, "stopped\n"), (0, "0\n")])
    )
    done = stage.run(QUEUE, "follow")
    assert done.returncode == 0, done.stderr
    assert "create pubmed" in steps(stage)


def test_preemptions_are_counted(stage):
    stage.settings("MAX_RESTARTS=1")
    states = ["SUSPENDED", "", "ACTIVE", "SUSPENDED"]
    stage.answer((LIST, [(0, f"{state}\n" if state else "") for state in states]), (STATUS, [(255, "")]))
    done = stage.run(QUEUE, "follow")
    assert done.returncode == 1
    assert "MAX_RESTARTS=1 is reached" in done.stderr


@pytest.mark.parametrize("status", ["gone", "interrupted"])
def test_machines_that_were_restarted_train_on_without_being_made_anew(stage, status):
    stage.answer((LIST, [(0, "ACTIVE\n")]), (STATUS, [(0, f"{status}\n"), (0, "0\n")]))
    done = stage.run(QUEUE, "follow")
    assert done.returncode == 0, done.stderr
    assert "ssh start" in steps(stage)
    assert "create pubmed" not in steps(stage)


def test_training_that_was_stopped_on_purpose_is_not_started_again(stage):
    stage.answer((LIST, [(0, "ACTIVE\n")]), (STATUS, [(0, "stopped\n")]))
    done = stage.run(QUEUE, "follow")
    assert done.returncode == 0, done.stderr
    assert "training was stopped after a checkpoint" in done.stderr
    assert steps(stage) == ["ssh follow", "ssh status", "list"]


def test_a_dropped_connection_is_taken_up_again(stage):
    stage.answer((FOLLOW, [(255, ""), (0, "")]), (STATUS, [(0, "running\n"), (0, "0\n")]))
    done = stage.run(QUEUE, "follow")
    assert done.returncode == 0
    assert steps(stage) == ["ssh follow", "ssh status"] * 2


def test_a_failed_training_gives_its_status_and_ends_the_bill(stage):
    stage.answer(FRESH, (STATUS, [(0, "3\n")]))
    done = stage.run(QUEUE, "run")
    assert done.returncode == 3
    assert "training ended with status 3" in done.stderr
    assert steps(stage)[-1] == "delete pubmed"


def test_machines_can_be_kept(stage):
    stage.settings("DELETE_WHEN_DONE=no")
    stage.answer(FRESH, FINISHED)
    done = stage.run(QUEUE, "run")
    assert done.returncode == 0
    assert "pubmed keeps running and costs money" in done.stderr
    assert "delete pubmed" not in steps(stage)


# --- What workers do with the commands that reach them -------------------------------------------------------------


@dataclasses.dataclass
class Worker:
    """A home as a worker has it, with a python that is a shell script."""

    stage: Any
    home: Path

    def __post_init__(self) -> None:
        self.folder = self.home / "biomamba_jax"
        (self.folder / ".venv" / "bin").mkdir(parents=True)

    def python(self, script: str) -> None:
        path = self.folder / ".venv" / "bin" / "python"
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def does(self, mark: str, then: str = "") -> subprocess.CompletedProcess[str]:
        """Runs the command with this mark in it, the last one that a launcher sent, and more."""
        sent = [call[-1].removeprefix("--command=") for call in self.stage.calls if mark in call[-1]]
        environment = self.stage.environment() | {"HOME": str(self.home)}
        words = ["bash", "-c", f"cd; {sent[-1]}{then}"]
        return subprocess.run(words, env=environment, timeout=20, capture_output=True, text=True)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def pid(self) -> int:
        return int(self.read("train.pid"))


START, STOP, ENDED = "nohup", "kill -TERM", "; until [ -s train.status ]; do sleep 0.05; done"
READY = "; until grep -q ready train.log; do sleep 0.05; done"
SAVES = "trap 'echo saved; exit 0' TERM\necho ready\nwhile :; do sleep 0.05; done"


@pytest.fixture
def worker(stage, tmp_path):
    """A worker, and a launcher that has sent every command once."""

    def make(settings: str = "TRAIN=(python train)") -> Worker:
        stage.settings(settings)
        stage.answer(FRESH, FINISHED)
        stage.run(QUEUE, "run")
        stage.run(QUEUE, "stop")
        return Worker(stage, tmp_path / "a home")

    return make


def test_words_with_spaces_and_quotes_reach_the_trainer_unchanged(worker):
    words = ["python", "-m", "biomamba_jax.pretrain", "--run_dir", '/mnt/it\'s my "run" $HOME', "--wandb_project=a b"]
    worker = worker(f"TRAIN=({shlex.join(words)})")
    worker.python('printf "%s\\n" "$@"\nexit 7')
    worker.does(START, ENDED)
    assert worker.read("train.log").splitlines() == words[1:]
    assert worker.read("train.status") == "7\n"
    assert worker.does(STATUS).stdout == "7\n"


def test_training_that_stop_ended_is_told_from_training_that_a_shutdown_ended(worker):
    worker = worker()
    worker.python(SAVES)  # and leaves with status 0
    for asked, meaning in ((False, "interrupted"), (True, "stopped"), (False, "interrupted")):
        worker.does(START, READY)
        if asked:
            worker.does("touch")
        worker.does(STOP, ENDED)
        assert worker.read("train.log").splitlines()[-1] == "saved"
        assert worker.does(STATUS).stdout == f"{meaning}\n"


def test_one_of_several_processes_that_another_ones_signal_stopped_counts_as_stopped(worker):
    worker = worker()
    worker.python("exit 143")
    worker.does(START, ENDED)
    assert worker.does(STATUS).stdout == "interrupted\n"


def test_stop_leaves_its_mark_before_anything_stops(stage):
    assert stage.run(QUEUE, "stop").returncode == 0
    mark, stop = stage.calls
    assert mark[-3:] == ["--node=0", "--worker=0", "--command=touch ~/biomamba_jax/train.asked"]
    assert stop[-3:-1] == ["--node=all", "--worker=all"]


def test_training_that_runs_is_not_started_twice(worker):
    worker = worker("TRAIN=(python train) SETUP='echo mounted >>setup'")
    worker.python(SAVES)
    worker.does(START, READY)
    first = worker.pid()
    assert worker.does(START).returncode == 0
    assert worker.does(STATUS).stdout == "running\n"
    worker.does(STOP, ENDED)
    assert worker.pid() == first
    assert worker.read("setup") == "mounted\n"


def test_every_start_sets_the_worker_up_and_trains_only_if_that_went_well(worker):
    worker = worker("TRAIN=(python train) SETUP='[ -e share ]; echo mounted >>setup'")
    worker.python("cat setup; exit 7")
    assert worker.does(START).returncode == 1
    assert not (worker.folder / "train.pid").exists()
    (worker.folder / "share").touch()
    for count in (1, 2):
        worker.does(START, ENDED)
        assert worker.read("train.log") == "mounted\n" * count


def test_a_pid_that_another_program_has_after_a_restart_is_not_training(worker):
    worker = worker()
    worker.python("echo trained")
    (worker.folder / "train.log").write_text("before\n")
    (worker.folder / "train.pid").write_text(f"{os.getpid()}\n")  # runs, and is not training
    assert worker.does(STATUS).stdout == "gone\n"
    assert worker.does(FOLLOW).stdout == "before\n"
    assert worker.does(STOP).returncode == 1
    worker.does(START, ENDED)
    assert worker.read("train.log") == "trained\n"


def test_a_tpu_vm_is_driven_the_same_way(stage):
    stage.answer(("tpu-vm list", [(0, ""), (0, "CREATING\n"), (0, "READY\n")]), FINISHED)
    done = stage.run("tpu_vm.sh", "run")
    assert done.returncode == 0, done.stderr
    look = ["ssh follow", "ssh status", "delete pubmed"]
    assert steps(stage) == [*UP[:2], "list", *UP[2:], *look]
    create = stage.calls[1]
    kind = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
    assert create == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pubmed", *WHERE, *kind]


@pytest.mark.parametrize(
    ("script", "words", "settings", "message"),
    [
        (QUEUE, ("run",), "NAME='my run'", "NAME=my run: must be lower case letters"),
        (QUEUE, ("run",), "ACCELERATOR=h100-8", "ACCELERATOR=h100-8: unknown; set RUNTIME"),
        (QUEUE, ("run",), "TRAIN=()", "TRAIN is empty"),
        (QUEUE, ("rnu",), "", "rnu: unknown command; give one of: create"),
        (QUEUE, (), "", "give one of: create"),
        ("tpu_vm.sh", ("run",), "SLICES=2", "for several use launch/tpu_queued_resource.sh"),
    ],
)
def test_a_mistake_is_refused_in_one_line_before_anything_is_made(stage, script, words, settings, message):
    stage.settings(settings)
    done = stage.run(script, *words)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not any("create" in call for call in stage.calls)
