"""Compiled programs are read from their text: small ones here, written by hand in the compilers' notation."""

from pathlib import Path

import pytest

from biomamba_jax.planning import program
from biomamba_jax.planning.links import Places
from biomamba_jax.planning.program import replica_groups, shape_bytes
from biomamba_jax.planning.schedule import Collective, Loop, Wait, collectives, operations

STEP = Path(__file__).with_name("step.hlo").read_text()
COLLECTIVES = Path(__file__).with_name("collectives.hlo").read_text()  # as libtpu writes them
STATED = STEP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"64"}}')
UNCLEAR = STEP.replace("constant(65)", "constant(64)").replace("add(%i, %one)", "multiply(%i, %one)")


class Program(program.Program):
    """A program of GPUs, in `slices` nodes."""

    def __init__(self, text, devices=8, slices=1):
        super().__init__(text, Places([k * slices // devices for k in range(devices)], [()] * devices))
        self.work, self.collectives = operations(self.schedule), collectives(self.schedule)


@pytest.mark.parametrize("text", [STATED, STEP, UNCLEAR], ids=["stated", "counted", "the bound in its condition"])
def test_a_loops_body_counts_as_often_as_it_runs(text):
    (product,) = [work for work in Program(text).work if work.flops]
    assert (product.calls, product.flops) == (64, 2 * 256 * 512 * 128)
    (inner,) = [work for work in Program(text).work if work.name == "b.next"]
    assert inner.calls == 64 * 3


def test_slices_and_updates_of_stacked_arrays_count_as_such_and_buffers_in_on_chip_memory_cause_no_traffic():
    moved = {work.name: work.bytes for work in Program(STEP).work}
    assert moved["y"] == 2 * (256 * 512 + 512 * 128 + 256 * 128) + 4  # x, one layer's weights, y, and the counter
    assert moved["y2"] == 2 * (256 * 128 + 256 * 128) + 4  # read and written
    assert moved["here"] == 4 * 32 * 1024  # read from HBM; written to VMEM
    assert "scan.3" not in moved  # a kernel, whose costs are in the jaxpr


PRODUCT = """HloModule m
ENTRY %main (x: bf16[{x}], w: bf16[{w}]) -> bf16[{y}] {{
  %x = bf16[{x}]{{2,1,0}} parameter(0)
  %w = bf16[{w}]{{2,1,0}} parameter(1)
  ROOT %y = bf16[{y}]{{2,1,0}} convolution(%x, %w), window={{{window}}}, dim_labels=0bf_0io->0bf
}}
"""


@pytest.mark.parametrize(
    ("x", "w", "y", "window", "products"),
    [
        ("1,256,512", "64,512,128", "64,256,128", "size=64 pad=63_63 rhs_reversal=1", 64),  # each head reads x once
        ("64,256,512", "64,512,128", "1,256,128", "size=64", 64),
        ("10,256,512", "4,512,128", "10,256,128", "size=4 pad=3_0", 1 + 2 + 3 + 4 * 7),  # a causal convolution
        ("5,256,512", "3,512,128", "9,256,128", "size=3 pad=1_1 lhs_dilate=2", 5 + 2 * 4),
        ("9,256,512", "3,512,128", "3,256,128", "size=3 stride=2 rhs_dilate=2", 9),
    ],
)
def test_a_convolution_multiplies_where_its_window_lies_in_the_array(x, w, y, window, products):
    (work,) = Program(PRODUCT.format(x=x, w=w, y=y, window=window)).work
    assert work.flops == 2 * 256 * 512 * 128 * products


def test_collectives_are_counted_with_their_groups_and_bytes():
    gather, reduce = sorted(Program(STEP).collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.calls, gather.group, gather.overlaps) == ("all-gather", 1, 8, True)
    assert gather.bytes == 4 * 32 * 1024
    assert gather.sent == gather.bytes * 7 / 8
    assert (reduce.kind, reduce.calls, reduce.group, reduce.overlaps) == ("all-reduce", 64, 2, False)
    assert (reduce.bytes, reduce.sent) == (2 * 256 * 128, 2 * reduce.bytes / 2)  # reduced, then gathered: half each


def test_groups_that_span_slices_are_distinguished():
    gather, reduce = sorted(Program(STEP, devices=8, slices=2).collectives, key=lambda c: c.kind)
    assert (gather.route.axes, reduce.route.axes) == ("network", "switch")


def test_what_hosts_send_between_slices_is_a_collective_of_slices():
    send = "%send = (f32[8,128]{1,0}, u32[], token[]) send(%here, %token), channel_id=2, is_host_transfer=true, "
    send += 'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.9_0"}'
    text = STEP.replace("  %b = ", f"  {send}\n  %b = ").replace("%here = f32[1024,1024]", "%here = f32[8,128]")
    (sent,) = [c for c in Program(text, devices=8, slices=2).collectives if c.bytes == 4 * 1024]
    assert (sent.kind, sent.group, sent.route.axes, sent.overlaps) == ("all-reduce", 2, "network", True)
    assert sent.sent == 4 * 1024


def test_collectives_that_overlap_count_once_and_all_reduces_that_are_sliced_are_reduce_scatters():
    fused, on_sparse_core, scatter = sorted(Program(COLLECTIVES, devices=4).collectives, key=lambda c: c.bytes)
    assert (fused.kind, fused.calls, fused.bytes, fused.overlaps) == ("all-gather", 1, 4 * 256 * 128, True)
    assert (on_sparse_core.kind, on_sparse_core.bytes, on_sparse_core.overlaps) == ("all-gather", 2 * 2560 * 512, True)
    # With rows of padding where its parts would not be whole tiles.
    assert (scatter.kind, scatter.calls, scatter.bytes) == ("reduce-scatter", 1, 4 * 2688 * 512)
    assert scatter.sent == scatter.bytes * 3 / 4


def test_the_schedule_has_what_runs_between_the_start_of_a_collective_and_its_end():
    schedule = Program(COLLECTIVES, devices=4).schedule
    names = [getattr(item, "name", None) for item in schedule]
    assert names[:3] == ["async-collective-start", "fusion.9", "async-collective-start"]
    assert [type(item) for item in schedule[2:5]] == [Wait, Collective, Wait]
    assert schedule[3].name == schedule[4].name == "start"  # on SparseCores
    loop = next(item for item in Program(STEP).schedule if isinstance(item, Loop))
    assert loop.calls == 64 and any(getattr(item, "is_kernel", False) for item in loop.body)


@pytest.mark.parametrize(
    "product",
    [
        "dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        'custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
    ],
    ids=["dot", "library"],
)
def test_products_on_gpus_are_read_too(product):
    lines = ["%x = bf16[256,512]{1,0} parameter(0)", "%w = bf16[512,128]{1,0} parameter(1)"]
    lines.append(f"ROOT %y = bf16[256,128]{{1,0}} {product}")
    text = "ENTRY %main (x: bf16[256,512]) -> bf16[256,128] {\n  " + "\n  ".join(lines) + "\n}\n"
    (work,) = Program(text).work
    assert (work.flops, work.bytes) == (2 * 256 * 512 * 128, 2 * (256 * 512 + 512 * 128 + 256 * 128))


def test_groups_that_are_not_listed_are_all_devices():
    text = STEP.replace("replica_groups={{0,1,2,3,4,5,6,7}}", "replica_groups={}")
    assert max(c.group for c in Program(text, devices=16).collectives) == 16


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups={}, x", []),
    ],
)
def test_all_notations_of_groups_are_read(text, groups):
    assert replica_groups(text) == groups


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bf16[2,1024,512]{2,1,0:T(8,128)(2,1)}", 2 * 2 * 1024 * 512),
        ("(f32[4]{0}, s32[]{:T(128)}, /*index=2*/pred[3]{0})", 16 + 4 + 3),
        ("f32[4]{0:T(128)}", 4 * 128),
        ("f32[2,10,300]{2,1,0:T(8,128)}", 4 * 2 * 16 * 384),  # whole tiles of 8 rows and 128 columns
        ("f32[2,10,300]{1,2,0:T(8,128)}", 4 * 2 * 128 * 304),  # columns are rows here
        ("bf16[1,2560,5120]{2,0,1:T(2,128)(2,1)}", 2 * 2 * 2560 * 5120),  # a tile of two rows, of which one is empty
        ("f32[4]{0:T(128)S(1)}", 0),
        ("f8e4m3fn[16]{0}", 16),
        ("u4[16]{0}", 8),
    ],
)
def test_types_have_sizes(text, size):
    assert shape_bytes(text) == size
