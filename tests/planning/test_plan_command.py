"""`python -m biomamba_jax.plan`, with results of the compiler that are written by hand and with the real compiler."""

import collections
import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import time
from pathlib import Path

import pytest

from biomamba_jax import plan as command
from biomamba_jax.command_line import parse
from biomamba_jax.config import ModelConfig
from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.errors import UserError
from biomamba_jax.hardware import GIB
from biomamba_jax.model.flops import training_flops_per_token
from biomamba_jax.planning import compile as compiling
from biomamba_jax.planning import plan
from biomamba_jax.planning.ahead_of_time import run_in_child
from biomamba_jax.planning.compile import Compiled, Memory
from biomamba_jax.planning.costs import Costs, Operation
from biomamba_jax.planning.links import Route
from biomamba_jax.planning.schedule import Collective
from biomamba_jax.planning.search import guessed_memory
from biomamba_jax.planning.topology import parse_topology
from tests.compilers import needs_libtpu

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = "--model.d_model 256 --model.n_layers 2 --model.vocab_size 512 --data.sequence_length 512".split()
SMALL += "--data.batch_size 8 --topology v5e-4 --train.steps 1000".split()
FOUND = Compiled(
    mesh={"data": 4, "fsdp": 1, "tensor": 1, "sequence": 1},
    memory=Memory(1 * GIB, 2 * GIB, 3 * GIB, 4 * GIB, 0),
    costs=Costs(flops=197e12 / 10),
    schedule=(
        Operation("product", 1, 197e12 / 10, 0.0),
        Collective("all-reduce", 1, 10**9, 4, Route("x y", 2, 2), False),
    ),
    seconds=12.0,
)


@pytest.fixture
def compiler(monkeypatch):
    """Results of the compiler, one per program; the last one repeats."""
    results = [FOUND]
    monkeypatch.setattr(plan, "require_compiler", lambda tpu: None)
    monkeypatch.setattr(plan, "compile_step", lambda config: results.pop(0) if len(results) > 1 else results[0])
    monkeypatch.setattr(plan, "kernel_rates", lambda *arguments: {})
    return results


@pytest.fixture
def printed(capsys):
    """What the command prints; a dict if it prints JSON."""

    def run(*words):
        command.main([*SMALL, *words])
        text = capsys.readouterr().out
        return json.loads(text) if "--json" in words else text

    return run


def test_a_plan_shows_memory_collectives_time_and_speed(compiler, printed):
    text = printed()
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 2}
    assert "10.000" in lines["total"] and "63.5%" in lines["total"]
    assert "1,500.0" in lines["all-reduce"]  # 1 GB among four: each sends 3/4 of it twice
    assert "115.00" in lines["step"]  # 100 ms of products, 15 ms of two links
    for words in ("nothing here is measured", "about 35,616 tokens/s", "0.00 B tokens: 0.00 days"):
        assert words in text


def test_json_has_the_figures_exactly(compiler, printed):
    found = printed("--json", "--tokens", "1e9")
    assert found["model"] == {"kind": "mamba2", "d_model": 256, "n_layers": 2}
    assert (found["fits"], found["memory"]["total"]) == (True, 10 * GIB)
    assert found["seconds"]["step"] == pytest.approx(0.115004)
    speed = found["tokens_per_second"]
    assert speed == pytest.approx(8 * 512 / 0.115004)
    assert found["chip_hours"] == pytest.approx(4 * 1e9 / speed / 3600)
    flops = training_flops_per_token(parse(PlanConfig, SMALL).model)
    assert found["share_of_peak"] == pytest.approx(flops * speed / (4 * 197e12))
    assert "not measured" in found["estimate"]
    found = printed("--topology", "tpu7x-8", "--json")
    assert (found["chips"], found["devices"]) == (4, 8)
    assert found["chip_hours"] == pytest.approx(found["days"] * 24 * 4)  # of chips, not of their devices


def test_a_plan_names_the_kernels_whose_time_is_only_a_lower_bound(compiler, printed):
    kernels = [Operation("ssd_forward", 24, 0.0, 1e6), Operation("conv", 24, 0.0, 1e6)]
    compiler[:] = [dataclasses.replace(FOUND, costs=Costs(flops=197e12 / 10, kernels=kernels))]
    assert "only a lower bound, without a static profile: the time of conv, ssd_forward" in printed()
    assert printed("--json")["unprofiled_kernels"] == ["conv", "ssd_forward"]


def test_a_config_that_does_not_fit_gets_the_nearest_that_does(compiler, printed):
    compiler[:] = [Compiled(mesh=FOUND.mesh, needed=20 * GIB), FOUND]
    text = printed("--model.remat", "dots")
    assert "DOES NOT FIT: a device needs 20.00 GiB and has 15.75 GiB" in text
    assert "the nearest setting tried that fits: --model.remat full" in text
    assert "tokens/s" in text
    compiler[:] = [Compiled(mesh=FOUND.mesh, needed=20 * GIB)]
    assert "no setting tried fits" in printed()


def test_auto_remat_takes_the_least_recomputation_that_fits(compiler, printed, monkeypatch):
    tried = []

    def compile_step(config):
        tried.append(config.model.remat)
        return compiler.pop(0)

    monkeypatch.setattr(plan, "compile_step", compile_step)
    compiler[:] = [Compiled(mesh=FOUND.mesh, needed=20 * GIB), FOUND]
    assert printed("--auto_remat", "--model.remat", "full", "--json")["remat"] == "dots"
    assert tried == ["none", "dots"]
    tried.clear()
    large = "--model.d_model 2560 --model.n_layers 64 --mesh.data 1 --mesh.fsdp 4 --data.sequence_length 8192".split()
    compiler[:] = [Compiled(mesh=FOUND.mesh, needed=20 * GIB), Compiled(mesh=FOUND.mesh, needed=20 * GIB)]
    monkeypatch.setattr(plan, "nearest_fit", lambda *arguments: None)
    assert "DOES NOT FIT" in printed("--auto_remat", *large)
    assert tried == ["full"]  # the others are too large by the formula


def test_a_search_ranks_what_it_compiled_and_names_the_fastest_by_its_flags(compiler, printed):
    slow = dataclasses.replace(FOUND, costs=Costs(flops=197e12))
    compiler[:] = [slow, slow, FOUND, Compiled(mesh=FOUND.mesh, needed=1)]
    ranking = printed("--search", "--tries", "3", "--json")["ranking"]
    assert [entry["fits"] for entry in ranking] == [True, True, True, False]
    steps = [entry["seconds"]["step"] for entry in ranking[:3]]
    assert steps == sorted(steps) and steps[0] < steps[1]
    compiler[:] = [slow, FOUND, slow]
    text = printed(*"--search --tries 2 --mesh.data 1 --mesh.fsdp 4 --model.remat full".split())
    assert "3 settings compiled, fastest first" in text
    fastest = next(line for line in text.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in fastest.split("│")[1:5]] == ["--model.remat none", "10.00", "115.0", "15.0"]
    assert text.splitlines()[-1] == "the fastest: --model.remat none"


def test_a_search_leaves_out_what_needs_more_memory_than_a_setting_of_its_mesh_that_did_not_fit(
    compiler, printed, monkeypatch
):
    tried = []

    def compile_step(config):
        tried.append(config)
        return Compiled(mesh=FOUND.mesh, needed=1)

    monkeypatch.setattr(plan, "compile_step", compile_step)
    text = printed("--search", "--tries", "30", "--data.batch_size", "4")
    assert "no setting fits" in text
    memory = collections.defaultdict(list)
    for config in tried[1:]:
        memory[config.mesh].append(guessed_memory(config, parse_topology("v5e-4")))
    assert max(map(len, memory.values())) > 1
    assert all(a > b for sizes in memory.values() for a, b in itertools.pairwise(sizes))


def test_a_search_changes_the_results_of_training_only_where_asked_and_marks_it(compiler, printed):
    words = "--search --tries 40 --mesh.data 1 --mesh.fsdp 4".split()
    plain = printed(*words, "--json")["ranking"]
    assert {(entry["reduce_dtype"], entry["batch_size"]) for entry in plain} == {("float32", 8)}
    varied = printed(*words, "--json", "--vary", "train.reduce_dtype", "data.batch_size")["ranking"]
    assert {entry["reduce_dtype"] for entry in varied} == {"float32", "bfloat16"}
    assert {entry["batch_size"] for entry in varied} > {8, 64}
    lines = printed(*words, "--vary", "train.reduce_dtype").splitlines()
    marks = [("bfloat16" in line, line.split("│")[-2].strip()) for line in lines if "│" in line]
    assert set(marks) == {(True, "differ"), (False, "same")}


def test_a_batch_that_does_not_divide_is_refused(compiler):
    compiler[:] = [Compiled(refused="data.batch_size = 8: must be a multiple")]
    with pytest.raises(UserError, match=r"v5e-4: data\.batch_size = 8: must be a multiple"):
        command.main(SMALL)


def test_without_the_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"for TPU needs libtpu: pip install 'biomamba-jax\[tpu-compiler\]'"):
        command.main(SMALL)
    with pytest.raises(UserError, match=r"for GPU needs jax_cuda12_plugin: pip install 'biomamba-jax\[gpu\]'"):
        command.main([*SMALL, "--topology", "h100-8"])


def test_released_weights_have_their_sizes_and_their_padded_embeddings(compiler, printed):
    text = printed("--init_from", "state-spaces/mamba2-2.7b", "--model.vocab_size", "null")
    assert "mamba2, 64 x 2560 (2,700 M parameters)" in text
    with pytest.raises(UserError, match="sizes are known for mamba-130m"):
        command.main([*SMALL, "--init_from", "someone/else"])
    for name, rows in (("state-spaces/mamba-130m-hf", 50280), ("state-spaces/mamba2-130m", 50288)):
        assert plan.released_sizes(ModelConfig(), name).padded_vocab == rows


HBM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.05G of 15.75G hbm. Exceeded by 4.3G."
HBM_LISTED = (
    "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO temporaries (20.05G) "
    "exceeds available HBM (15.75G). HLO module: jit_train_step."
)
VMEM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.46M of 16.00M vmem."
VMEM_STACK = (
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem while allocating on "
    "stack for %selective_scan_backward.1 = (bf16[1,512,2560]{2,1,0}). Scoped allocation with size 17.46M and limit "
    "16.00M exceeded scoped vmem limit by 1.46M."
)


@pytest.mark.parametrize("message", [HBM, HBM_LISTED])
def test_the_compilers_refusal_tells_how_much_memory_it_needed(message):
    assert compiling._needed(message) == int(20.05 * GIB)
    assert compiling._on_chip_shortage(message) is None
    assert compiling._needed("RESOURCE_EXHAUSTED: no figures") == 0


@pytest.mark.parametrize(("message", "operation"), [(VMEM_STACK, "selective_scan_backward.1"), (VMEM, "an operation")])
def test_an_operation_too_large_for_on_chip_memory_is_refused_and_not_a_shortage_of_hbm(message, operation):
    reason = compiling._on_chip_shortage(message)
    assert reason.startswith(f"{operation} needs more on-chip memory (vmem) than there is; mesh.tensor divides")


def test_results_come_back_from_the_compilers_process_and_its_failures_are_one_line():
    options = {"subject": "compiling for v5e-4", "environment": os.environ}
    assert run_in_child(copy.copy, FOUND, timeout=60, **options) == FOUND
    with pytest.raises(UserError, match=r"^compiling for v5e-4: the compiler's process ended: ValueError: math domain"):
        run_in_child(math.log, -1.0, timeout=60, **options)
    with pytest.raises(UserError, match=r"^compiling for v5e-4: not done after 0 s"):
        run_in_child(time.sleep, 60, timeout=0.1, **options)


# --- The real compiler ---------------------------------------------------------------------------------------------


@pytest.mark.ahead_of_time
@needs_libtpu
@pytest.mark.parametrize(
    ("config", "topology", "mesh", "must", "may"),
    [
        ("mamba2_130m", "v5e-4", "--mesh.data 1 --mesh.fsdp 4", {"all-gather"}, {"reduce-scatter", "all-reduce"}),
        ("mamba1_370m", "v5p-8", "", {"all-reduce"}, set()),
        ("mamba2_1.3b", "v6e-4", "--mesh.tensor 2", {"all-reduce"}, set()),
        ("mamba3_mimo_187m", "v5e-4", "--mesh.data 2 --mesh.tensor 2", {"all-reduce"}, set()),
    ],
)
def test_published_sizes_of_few_layers_are_planned_by_the_real_compiler(config, topology, mesh, must, may, capsys):
    words = ["--config", str(CONFIGS / f"{config}.yaml"), "--topology", topology, *mesh.split(), "--json"]
    command.main([*words, *"--model.n_layers 2 --data.sequence_length 512 --data.batch_size 8".split()])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    kinds = {c["kind"] for c in found["collectives"]}
    assert must <= kinds <= must | may
    assert 0 < found["memory"]["parameters"] < found["memory"]["optimizer"] < found["memory"]["total"] < 16 * GIB
    seconds = found["seconds"]
    assert 0 < seconds["floor"] <= seconds["step"]
    assert 0 < seconds["kernels"] < seconds["step"]
    assert 0 < found["share_of_peak"] < 1


@pytest.mark.ahead_of_time
@needs_libtpu
def test_the_real_compiler_refuses_what_is_too_large(printed):
    words = "--model.d_model 2560 --model.n_layers 64 --topology v5e-1 --data.batch_size 1 --model.remat full".split()
    found = printed(*words, "--json")
    assert found["fits"] is False
    assert found["needed_bytes"] > found["available_bytes"]
    assert found["nearest"] is None


@pytest.mark.ahead_of_time
@needs_libtpu
def test_the_trace_and_the_compiled_program_agree_on_the_arithmetic():
    config = parse(PlanConfig, [*SMALL, "--model.kind", "mamba1"])
    compiled = compiling.compile_step(config)
    in_program = sum(work.calls * work.flops for work in compiled.work)
    assert in_program == pytest.approx(compiled.costs.flops, rel=0.05)  # Mamba-1's kernels have no products


@pytest.mark.ahead_of_time
@needs_libtpu
def test_collectives_offloaded_to_sparse_cores_overlap_with_the_products():
    words = "--topology v6e-8 --model.d_model 1024 --mesh.data 1 --mesh.fsdp 8 --train.offload_collectives".split()
    config = parse(PlanConfig, [*SMALL, *words])
    kernel = 1024 * 2048  # elements of the smallest of a layer's large matrices
    collectives = [c for c in compiling.compile_step(config).collectives if c.bytes >= 2 * kernel]
    assert {c.kind for c in collectives} >= {"all-gather", "reduce-scatter"}
    assert all(c.overlaps for c in collectives if c.kind in ("all-gather", "reduce-scatter"))
