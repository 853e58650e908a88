"""Which other settings are tried, in which order; the compiler is played by a formula."""

import dataclasses
from unittest.mock import Mock

import pytest

from biomamba_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.model.flops import matrix_parameters
from biomamba_jax.planning import search
from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.search import describe, nearest_fit, search_settings, smaller_settings
from biomamba_jax.planning.topology import parse_topology

V5E = parse_topology("v5e-16")
CONFIG = PlanConfig(
    model=ModelConfig(d_model=2560, n_layers=64, vocab_size=50277, remat="dots"),
    data=DataConfig(batch_size=64, sequence_length=2048),
    topology="v5e-16",
)


def unless(too_large):
    return Compiled(needed=1 if too_large else None)


def flags(settings):
    return [describe(setting, CONFIG) for setting in settings]


def test_the_nearest_settings_keep_batch_and_mesh_then_weights_are_shared_and_only_then_the_batch_shrinks():
    tried = flags(smaller_settings(CONFIG, V5E))
    full, two, four = "--model.remat full", "--train.accumulation 2", "--train.accumulation 4"
    assert tried[:4] == [full, two, f"{full} {two}", four]
    first_shared = next(i for i, text in enumerate(tried) if "mesh.fsdp 2" in text)
    first_smaller = next(i for i, text in enumerate(tried) if "data.batch_size" in text)
    assert first_shared < tried.index(f"{full} {four} --mesh.data 1 --mesh.fsdp 16") < first_smaller
    assert "--data.batch_size 16" in tried[-1]
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize("name", ["v5e-16", "v5p:4x4x12"])
@pytest.mark.parametrize("slices", [1, 2])
def test_every_setting_divides_over_the_mesh_and_weights_are_never_shared_between_slices(name, slices):
    topology = parse_topology(name, slices)
    config = dataclasses.replace(CONFIG, data=DataConfig(batch_size=4 * topology.devices, sequence_length=2048))
    settings = smaller_settings(config, topology)
    meshes = [search.resolved_mesh(setting, topology.devices) for setting in settings]
    assert {mesh.data * mesh.fsdp for mesh in meshes} == {topology.devices}
    assert all(mesh.data % slices == 0 for mesh in meshes)
    assert all(s.data.batch_size % (s.train.accumulation * topology.devices) == 0 for s in settings)
    assert max(mesh.fsdp for mesh in meshes) >= 16
    compiler = Mock(side_effect=lambda s: unless(search.resolved_mesh(s, topology.devices).fsdp < 16))
    setting, _ = nearest_fit(config, topology, compiler, tries=8)
    assert setting.mesh.fsdp == 16


@pytest.mark.parametrize("wanted", ["--mesh.data 4 --mesh.fsdp 4", "--model.remat full --mesh.data 2 --mesh.fsdp 8"])
def test_the_nearest_fit_is_found_in_a_few_compilations(monkeypatch, wanted):
    monkeypatch.setattr(search, "guessed_memory", lambda config, topology: 0)
    order = flags(smaller_settings(CONFIG, V5E))
    compiler = Mock(side_effect=lambda s: unless(order.index(describe(s, CONFIG)) < order.index(wanted)))
    setting, _ = nearest_fit(CONFIG, V5E, compiler, tries=8)
    assert describe(setting, CONFIG) == wanted
    assert compiler.call_count <= 8


def test_the_averaged_weights_count_and_hopeless_settings_are_not_compiled():
    plain = search.guessed_memory(CONFIG, V5E)
    averaged = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, ema=0.999))
    assert search.guessed_memory(averaged, V5E) - plain == pytest.approx(4 * matrix_parameters(CONFIG.model))
    compiler = Mock(side_effect=lambda _: Compiled())
    nearest_fit(CONFIG, V5E, compiler, tries=8)
    memory = [search.guessed_memory(*call.args, V5E) for call in compiler.call_args_list]
    assert memory and max(memory) < V5E.chip.memory_bytes


def test_where_nothing_fits_one_compilation_says_so():
    compiler = Mock(side_effect=lambda _: unless(True))
    assert nearest_fit(CONFIG, V5E, compiler, tries=8) is None
    assert compiler.call_count == 1


@pytest.mark.parametrize("refused", ["--mesh.fsdp 16", "--mesh.fsdp 4", "--data.batch_size"])
def test_a_refused_setting_is_passed_over(monkeypatch, refused):
    monkeypatch.setattr(search, "guessed_memory", lambda config, topology: 0)
    compiler = Mock(
        side_effect=lambda s: (
            Compiled(refused="sizes do not go together")
            if refused in describe(s, CONFIG)
            else unless(search.resolved_mesh(s, 16).fsdp < 2)
        )
    )
    setting, compiled = nearest_fit(CONFIG, V5E, compiler, tries=30)
    assert compiled.fits
    assert describe(setting, CONFIG) == "--mesh.data 8 --mesh.fsdp 2"


def test_a_search_covers_meshes_and_policies_that_divide():
    found = search_settings(CONFIG, V5E)
    meshes = {setting.mesh for setting in found}
    assert all(mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence == 16 for mesh in meshes)
    assert MeshConfig(1, 16, 1, 1) in meshes
    assert any(mesh.tensor > 1 for mesh in meshes)
    assert any(mesh.sequence > 1 for mesh in meshes)
    assert MeshConfig(16, 1, 1, 1) not in meshes  # 2.7 billion weights and their moments on a chip of 16 GB
    larger = search_settings(CONFIG, parse_topology("v5p:2x2x4"))
    assert {setting.model.remat for setting in larger} == {"none", "dots", "full"}


def test_a_small_batch_needs_devices_that_share_rows():
    config = dataclasses.replace(CONFIG, data=DataConfig(batch_size=4, sequence_length=2048), train=TrainConfig())
    assert all(s.mesh.data * s.mesh.fsdp <= 4 for s in search_settings(config, V5E))


def test_collectives_are_offloaded_where_a_chip_has_sparse_cores_and_weights_are_gathered():
    assert not any(s.train.offload_collectives for s in search_settings(CONFIG, V5E))
    settings = search_settings(CONFIG, parse_topology("v5p-32"))
    assert all(s.train.offload_collectives == (s.mesh.fsdp > 1) for s in settings)
    assert {s.mesh.fsdp > 1 for s in settings} == {True, False}


def test_a_search_covers_every_accumulation_that_divides_the_batch_and_a_larger_batch_only_where_it_may():
    found = {(s.mesh.data * s.mesh.fsdp, s.train.accumulation) for s in search_settings(CONFIG, V5E)}
    assert {parts for across, parts in found if across == 16} == {1, 2, 4}
    varied = dataclasses.replace(CONFIG, vary=["data.batch_size", "train.reduce_dtype"])
    settings = search_settings(varied, V5E)
    assert {s.data.batch_size for s in settings} == {64, 128, 256, 512}
    rounded = {s.mesh.data * s.mesh.fsdp * s.mesh.sequence for s in settings if s.train.reduce_dtype == "bfloat16"}
    assert rounded and 1 not in rounded  # one replica sums no gradients over devices


# --- The rough formula, by hand -------------------------------------------------------------------------------------

POD = parse_topology("v5e-256")
WIDE = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, d_model=4096, remat="none"),  # 16 rows for each of 256 devices
    data=DataConfig(batch_size=256, sequence_length=2048),
)


def seconds(config, data, fsdp, topology=POD, **train):
    setting = dataclasses.replace(config, mesh=MeshConfig(data, fsdp), train=dataclasses.replace(config.train, **train))
    return search.guessed_seconds(setting, topology)


def saved_by_bfloat16(config, data, fsdp, topology=POD, **train):
    """Seconds of half of the float32 gradients."""
    rounded = seconds(config, data, fsdp, topology, reduce_dtype="bfloat16", **train)
    return seconds(config, data, fsdp, topology, **train) - rounded


def test_gradients_take_half_as_long_over_both_axes_of_a_pod_as_over_one():
    half = 2 * matrix_parameters(WIDE.model)
    # Reduce-scattered over fsdp, then all-reduced over data: twice the bytes of a device's shard.
    assert saved_by_bfloat16(WIDE, 16, 16) == pytest.approx(half / 100e9 + 2 * half / 16 / 100e9)  # two links
    assert saved_by_bfloat16(WIDE, 1, 256) == pytest.approx(half / 200e9)
    assert saved_by_bfloat16(WIDE, 4, 64) == pytest.approx(half / 150e9 + 2 * half / 64 / 50e9)  # an axis and a quarter
    assert saved_by_bfloat16(WIDE, 256, 1) == pytest.approx(2 * half / 200e9)


def test_a_shard_that_is_no_whole_tile_is_all_reduced():
    half = 2 * matrix_parameters(CONFIG.model)  # 2,560 rows over 256 devices: 10, and a tile has 8
    config = dataclasses.replace(CONFIG, data=WIDE.data)
    assert saved_by_bfloat16(config, 1, 256) == pytest.approx(2 * half / 200e9)
    assert saved_by_bfloat16(config, 16, 16) == pytest.approx(half / 100e9 + 2 * half / 16 / 100e9)


def test_what_sparse_cores_run_counts_only_as_far_as_it_takes_longer_than_the_rest():
    v6e = parse_topology("v6e-256")
    few = dataclasses.replace(WIDE, data=DataConfig(batch_size=256, sequence_length=8))
    half = 2 * matrix_parameters(WIDE.model) / 200e9
    all_reduce = 2 * half / 16
    assert saved_by_bfloat16(WIDE, 16, 16, v6e) == pytest.approx(half + all_reduce)
    assert saved_by_bfloat16(few, 16, 16, v6e, offload_collectives=True) == pytest.approx(half + all_reduce)
    many = dataclasses.replace(WIDE, data=DataConfig(batch_size=256, sequence_length=16384))
    assert saved_by_bfloat16(many, 16, 16, v6e, offload_collectives=True) == pytest.approx(all_reduce)


@pytest.mark.parametrize(
    ("d_model", "n_layers", "remat", "topology", "mesh", "compiled"),
    [
        (2560, 64, "full", "v5e-256", (16, 16), 457e-3),
        (2560, 64, "none", "v5e-256", (4, 64), 368e-3),
        (2560, 64, "none", "v5e-256", (1, 256), 411e-3),
        (2560, 64, "full", "v6e-256", (16, 16), 222e-3),
        (768, 24, "dots", "v5e-256", (256, 1), 26.7e-3),
    ],
)
def test_the_formula_is_near_what_was_read_from_compiled_steps(d_model, n_layers, remat, topology, mesh, compiled):
    model = ModelConfig(d_model=d_model, n_layers=n_layers, vocab_size=50277, remat=remat)
    config = dataclasses.replace(CONFIG, model=model, data=WIDE.data)
    assert seconds(config, *mesh, parse_topology(topology)) == pytest.approx(compiled, rel=0.15)
