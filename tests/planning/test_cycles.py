"""Cycles are read from the text of an optimised module: a small one here, by hand in the TPU compiler's notation."""

from biomamba_jax.planning.cycles import kernel_cycles, other_cycles

STATE = "(s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)})"
MODULE = f"""\
HloModule jit_run, is_scheduled=true

%inner_body (state.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %three = s32[]{{:T(128)}} constant(3)
  %state.1 = {STATE} parameter(0)
  %k = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  %k.copy = s32[]{{:T(128)}} copy(%k)
  %k.next = s32[]{{:T(128)}} add(%three, %k.copy)
  %b = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%state.1), index=1
  %b.next = f32[8,128]{{1,0:T(8,128)}} fusion(%b), kind=kLoop, calls=%add, backend_config={{"estimated_cycles":"10"}}
  ROOT %state.2 = {STATE} tuple(%k.next, %b.next)
}}

%inner_condition (state.3: (s32[], f32[8,128])) -> pred[] {{
  %ten = s32[]{{:T(128)}} constant(10)
  %state.3 = {STATE} parameter(0)
  %k.3 = s32[]{{:T(128)}} get-tuple-element(%state.3), index=0
  ROOT %less.3 = pred[]{{:T(512)}} compare(%k.3, %ten), direction=LT
}}

%body (state.4: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %one = s32[]{{:T(128)}} constant(1)
  %state.4 = {STATE} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state.4), index=0
  %i.next = s32[]{{:T(128)}} add(%i, %one)
  %a = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%state.4), index=1
  %a.next = f32[8,128]{{1,0:T(8,128)}} copy(%a), backend_config={{"estimated_cycles":"100"}}
  %state.5 = {STATE} tuple(%one, %a.next)
  %loop.1 = {STATE} while(%state.5), condition=%inner_condition, body=%inner_body
  %b.5 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%loop.1), index=1
  ROOT %state.6 = {STATE} tuple(%i.next, %b.5)
}}

%condition (state.7: (s32[], f32[8,128])) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant(8)
  %state.7 = {STATE} parameter(0)
  %i.7 = s32[]{{:T(128)}} get-tuple-element(%state.7), index=0
  ROOT %less.7 = pred[]{{:T(512)}} compare(%i.7, %bound), direction=LT
}}

%cheap (x.1: f32[8,128]) -> f32[8,128] {{
  %x.1 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %x.2 = f32[8,128]{{1,0:T(8,128)}} copy(%x.1), backend_config={{"estimated_cycles":"1000"}}
}}

%costly (x.3: f32[8,128]) -> f32[8,128] {{
  %x.3 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %x.4 = f32[8,128]{{1,0:T(8,128)}} copy(%x.3), backend_config={{"estimated_cycles":"2000"}}
}}

ENTRY %main (x: f32[8,128], p: pred[]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %p = pred[]{{:T(512)}} parameter(1)
  %zero = s32[]{{:T(128)}} constant(0)
  %zero.copy = s32[]{{:T(128)}} copy(%zero)
  %kernel.1 = f32[8,128]{{1,0:T(8,128)}} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={{"estimated_cycles":"70000"}}
  %state.8 = {STATE} tuple(%zero.copy, %kernel.1)
  %loop.2 = {STATE} while(%state.8), condition=%condition, body=%body
  %y = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%loop.2), index=1
  ROOT %z = f32[8,128]{{1,0:T(8,128)}} conditional(%p, %y, %y), true_computation=%cheap, false_computation=%costly
}}
"""


def test_loops_count_as_often_as_their_conditions_let_them_run():
    assert other_cycles(MODULE) == 8 * (100 + 3 * 10) + 2000  # the inner one from 1 by 3 to 10; the costlier branch


def test_a_stated_number_of_turns_comes_first():
    stated = MODULE.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert other_cycles(stated) == 5 * (100 + 3 * 10) + 2000


def test_an_unknown_number_of_turns_is_not_guessed():
    for bound in ("get-tuple-element(%state.7), index=0", "constant({...})"):
        assert other_cycles(MODULE.replace("constant(8)", bound)) is None
    assert other_cycles(MODULE.replace("direction=LT", "direction=NE")) is None
    assert other_cycles(MODULE.replace("add(%i, %one)", "multiply(%i, %one)")) is None
    assert other_cycles(MODULE.replace("tuple(%zero.copy, ", "tuple(%p, ")) is None


def test_a_loop_without_cycles_may_run_any_number_of_times():
    free = MODULE.replace('"estimated_cycles":"10"', "").replace('"estimated_cycles":"100"', "")
    assert other_cycles(free.replace("constant(8)", "get-tuple-element(%state.7), index=0")) == 2000


def test_kernels_are_counted_apart():
    assert kernel_cycles(MODULE) == {"kernel.1": 70000}
