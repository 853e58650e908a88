"""Compiled programs are read from their text: small ones here, written by hand in the compilers' notation."""

import pytest

from biomamba_jax.planning.hlo import parse
from biomamba_jax.planning.program import read_program, replica_groups, shape_bytes

TILED = "{1,0:T(8,128)(2,1)}"
LOOP = f"""\
HloModule jit_step, is_scheduled=true

%product (p.0: bf16[256,512], p.1: bf16[64,512,128], p.2: s32[]) -> bf16[256,128] {{
  %p.1 = bf16[64,512,128]{{2,1,0:T(8,128)(2,1)}} parameter(1)
  %p.2 = s32[]{{:T(128)}} parameter(2)
  %zero = s32[]{{:T(128)}} constant(0)
  %layer = bf16[1,512,128]{{2,1,0}} dynamic-slice(%p.1, %p.2, %zero, %zero), dynamic_slice_sizes={{1,512,128}}
  %flat = bf16[512,128]{TILED} bitcast(%layer)
  %p.0 = bf16[256,512]{TILED} parameter(0)
  ROOT %convolution.1 = bf16[256,128]{TILED} convolution(%p.0, %flat), dim_labels=bf_io->bf
}}

%keep (p.0: bf16[64,256,128], p.1: bf16[256,128], p.2: s32[]) -> bf16[64,256,128] {{
  %p.0 = bf16[64,256,128]{{2,1,0}} parameter(0)
  %p.1 = bf16[256,128]{TILED} parameter(1)
  %row = bf16[1,256,128]{{2,1,0}} bitcast(%p.1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %updated = bf16[64,256,128]{{2,1,0}} dynamic-update-slice(%p.0, %row, %p.2, %zero, %zero)
}}

%body (state: (s32[], bf16[256,512], bf16[64,512,128], bf16[64,256,128])) -> (s32[]) {{
  %state = (s32[], bf16[256,512]{TILED}, bf16[64,512,128]{{2,1,0}}, /*index=3*/bf16[64,256,128]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[256,512]{TILED} get-tuple-element(%state), index=1
  %weights = bf16[64,512,128]{{2,1,0}} get-tuple-element(%state), index=2
  %kept = bf16[64,256,128]{{2,1,0}} get-tuple-element(%state), index=3
  %y = bf16[256,128]{TILED} fusion(%x, %weights, %i), kind=kOutput, calls=%product
  %y2 = bf16[64,256,128]{{2,1,0}} fusion(%kept, %y, %i), kind=kLoop, calls=%keep
  %scan.3 = bf16[256,128]{TILED} custom-call(%y), custom_call_target="tpu_custom_call"
  %sum = bf16[256,128]{TILED} all-reduce(%scan.3), replica_groups=[4,2]<=[8], to_apply=%add
  %one = s32[] constant(1)
  %i.next = s32[] add(%i, %one)
  ROOT %next = (s32[]) tuple(%i.next)
}}

%condition (state: (s32[])) -> pred[] {{
  %state = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %bound = s32[] constant(65)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}}

ENTRY %main (a: s32[]) -> f32[] {{
  %first = s32[] constant(1)
  %a = (s32[], bf16[256,512]) tuple(%first)
  %loop = (s32[]) while(%a), condition=%condition, body=%body, BACKEND
  %start = (f32[4,1024]{{1,0}}, f32[32,1024]{{1,0}}) all-gather-start(%b), replica_groups={{{{0,1,2,3,4,5,6,7}}}}
  %done = f32[32,1024]{{1,0}} all-gather-done(%start)
  %here = f32[1024,1024]{{1,0:T(8,128)S(1)}} copy(%done)
  %b = f32[4,1024]{{1,0}} copy(%c)
  ROOT %c = f32[4,1024]{{1,0}} constant(0)
}}
"""
WITH_COUNT = LOOP.replace("BACKEND", 'backend_config={"known_trip_count":{"n":"64"}}')
WITHOUT_COUNT = LOOP.replace(", BACKEND", "")
UNCLEAR = WITHOUT_COUNT.replace("constant(65)", "constant(64)").replace("add(%i, %one)", "multiply(%i, %one)")


@pytest.mark.parametrize(
    "text", [WITH_COUNT, WITHOUT_COUNT, UNCLEAR], ids=["stated", "counted", "the bound in its condition"]
)
def test_a_loops_body_counts_as_often_as_it_runs(text):
    (product,) = [work for work in read_program(text).work if work.flops]
    assert (product.calls, product.flops) == (64, 2 * 256 * 512 * 128)


def test_a_slice_of_stacked_weights_counts_as_the_slice():
    (product,) = [work for work in read_program(WITH_COUNT).work if work.flops]
    assert product.bytes == 2 * (256 * 512 + 512 * 128 + 256 * 128) + 4  # x, one layer's weights, y, and the counter


def test_an_update_of_a_stacked_array_counts_as_the_update():
    (update,) = [work for work in read_program(WITH_COUNT).work if work.name == "y2"]
    assert update.bytes == 2 * (256 * 128 + 256 * 128) + 4  # read and written


def test_buffers_in_on_chip_memory_cause_no_traffic():
    (copy,) = [work for work in read_program(WITH_COUNT).work if work.name == "here"]
    assert copy.bytes == 4 * 32 * 1024  # read from HBM; written to VMEM


def test_kernels_are_not_counted_here():
    assert not [work for work in read_program(WITH_COUNT).work if work.name == "scan.3"]


def test_collectives_are_counted_with_their_groups_and_bytes():
    gather, reduce = sorted(read_program(WITH_COUNT).collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.calls, gather.group, gather.overlaps) == ("all-gather", 1, 8, True)
    assert gather.bytes == 4 * 32 * 1024
    assert gather.sent == gather.bytes * 7 / 8
    assert (reduce.kind, reduce.calls, reduce.group, reduce.overlaps) == ("all-reduce", 64, 2, False)
    assert reduce.sent == 2 * (2 * 256 * 128) / 2


def test_groups_that_span_slices_are_distinguished():
    gather, reduce = sorted(read_program(WITH_COUNT, devices=8, slices=2).collectives, key=lambda c: c.kind)
    assert gather.between_slices
    assert not reduce.between_slices


def test_what_hosts_send_between_slices_is_a_collective_of_slices():
    send = "%send = (f32[512]{0}, u32[], token[]) send(%here, %token), channel_id=2, is_host_transfer=true, "
    send += 'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.9_0"}'
    text = WITH_COUNT.replace("  %b = ", f"  {send}\n  %b = ").replace("%here = f32[1024,1024]", "%here = f32[512,1]")
    (sent,) = [c for c in read_program(text, devices=8, slices=2).collectives if c.bytes == 4 * 512]
    assert (sent.kind, sent.group, sent.between_slices, sent.overlaps) == ("all-reduce", 2, True, True)
    assert sent.sent == 4 * 512


def test_an_overlapped_collective_counts_once_however_many_fusions_name_it():
    fused = """\
%FUSED (p.0: f32[64,128]) -> f32[256,128] {
  %p.0 = f32[64,128]{1,0} parameter(0)
  ROOT %all-gather.NUMBER = f32[256,128]{1,0} all-gather(%p.0), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
    names = {
        "started": "async-collective-start.1",
        "async_collective_fusion.2": "fusion.9",
        "x": "async-collective-done",
    }
    text = "".join(fused.replace("FUSED", name).replace("NUMBER", name) for name in names)
    lines = [f"  %{i} = f32[256,128]{{1,0}} fusion(%w), kind=kCustom, calls=%{f}" for f, i in names.items()]
    text += (
        "ENTRY %main (w: f32[64,128]) -> f32[] {\n  %w = f32[64,128]{1,0} parameter(0)\n" + "\n".join(lines) + "\n}\n"
    )
    (gather,) = read_program(text, devices=4).collectives
    assert (gather.calls, gather.bytes, gather.overlaps) == (1, 4 * 256 * 128, True)


def test_a_collective_on_a_sparse_core_overlaps():
    text = """\
%called (p: bf16[160,512]) -> bf16[2560,512] {
  %p = bf16[160,512]{1,0} parameter(0)
  ROOT %all-gather.67 = bf16[2560,512]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"
%async (q: bf16[160,512]) -> bf16[2560,512] {
  %q = bf16[160,512]{1,0} parameter(0)
  ROOT %custom-call.19 = bf16[2560,512]{1,0} custom-call(%q), custom_call_target="x", called_computations={%called}
}, execution_thread="sparsecore"
ENTRY %main (w: bf16[160,512]) -> bf16[2560,512] {
  %w = bf16[160,512]{1,0} parameter(0)
  %start = ((bf16[160,512]), bf16[2560,512], u32[]) async-start(%w), async_execution_thread="sparsecore", calls=%async
  ROOT %done = bf16[2560,512]{1,0} async-done(%start)
}
"""
    (gather,) = read_program(text, devices=4).collectives
    assert (gather.kind, gather.bytes, gather.overlaps) == ("all-gather", 2 * 2560 * 512, True)


def test_an_all_reduce_sliced_in_the_same_fusion_is_a_reduce_scatter():
    # As libtpu writes it, with rows of padding where its parts would not be whole tiles.
    text = """\
%all-reduce-scatter.1 (input: f32[2560,512]) -> f32[168,512] {
  %input = f32[2560,512]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[2688,512]{1,0} pad(%input, %zero), padding=0_128x0_0
  %all-reduce.40 = f32[2688,512]{1,0} all-reduce(%pad), replica_groups={{0,1,2,3}}, to_apply=%add
  %id = u32[] partition-id()
  %first = u32[] constant(0)
  ROOT %dynamic-slice.44 = f32[168,512]{1,0} dynamic-slice(%all-reduce.40, %id, %first), dynamic_slice_sizes={168,512}
}
ENTRY %main (g: f32[2560,512]) -> f32[168,512] {
  %g = f32[2560,512]{1,0} parameter(0)
  ROOT %fusion.359 = f32[168,512]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (scatter,) = read_program(text, devices=4).collectives
    assert (scatter.kind, scatter.calls, scatter.bytes) == ("reduce-scatter", 1, 4 * 2688 * 512)
    assert scatter.sent == scatter.bytes * 3 / 4


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
    (work,) = read_program(text).work
    assert (work.flops, work.bytes) == (2 * 256 * 512 * 128, 2 * (256 * 512 + 512 * 128 + 256 * 128))


def test_groups_that_are_not_listed_are_all_devices():
    text = WITH_COUNT.replace("replica_groups={{0,1,2,3,4,5,6,7}}", "replica_groups={}")
    assert max(c.group for c in read_program(text, devices=16).collectives) == 16


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
        ("(f32[4]{0:T(128)}, s32[]{:T(128)}, /*index=2*/pred[3]{0})", 16 + 4 + 3),
        ("f32[4]{0:T(128)S(1)}", 0),
        ("f8e4m3fn[16]{0}", 16),
        ("u4[16]{0}", 8),
    ],
)
def test_types_have_sizes(text, size):
    assert shape_bytes(text) == size


def test_the_entry_is_found():
    computations, entry = parse(WITH_COUNT)
    assert entry == "main"
    assert set(computations) == {"product", "keep", "body", "condition", "main"}
