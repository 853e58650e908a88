"""Prints a plan as tables."""

import collections
import dataclasses

from biomamba_jax.hardware import GIB
from biomamba_jax.model.flops import matrix_parameters
from biomamba_jax.planning.plan import Answer, Plan
from biomamba_jax.planning.schedule import one_call
from biomamba_jax.planning.search import CHANGES_RESULTS, changed, describe
from biomamba_jax.planning.times import Times
from biomamba_jax.tables import summary_table


def show(answer: Answer) -> None:
    """Print a plan, and the settings to change if it does not fit."""
    plan = answer.plan
    print(f"{heading(plan)}\nestimates by the compiler and from datasheets; nothing here is measured\n")
    if answer.ranking:
        _show_ranking(answer)
    elif plan.compiled.fits:
        _show_plan(plan)
    else:
        _show_memory(plan)
        print(does_not_fit(plan))
        if answer.nearest is None:
            print("no setting tried fits: use more chips or a shorter data.sequence_length")
        else:
            print(f"the nearest setting tried that fits: {describe(answer.nearest.config, plan.config)}\n")
            _show_plan(answer.nearest)


def heading(plan: Plan) -> str:
    """Return a line that names model, batch and machine."""
    model, data, topology = plan.config.model, plan.config.data, plan.topology
    mesh = " x ".join(f"{name} {size}" for name, size in plan.compiled.mesh.items() if size > 1) or "one device"
    parts = f" in {plan.config.train.accumulation} accumulation steps" if plan.config.train.accumulation > 1 else ""
    return (
        f"{model.kind}, {model.n_layers} x {model.d_model} ({matrix_parameters(model) / 1e6:,.0f} M parameters), "
        f"remat {model.remat}, batch {data.batch_size:,} x {data.sequence_length:,}{parts} on {topology} "
        f"({topology.chips:,} chips; {mesh})"
    )


def does_not_fit(plan: Plan) -> str:
    """Return a line that says why or by how much a plan does not fit."""
    compiled, available = plan.compiled, plan.topology.chip.memory_bytes
    if compiled.refused:
        return f"refused: {compiled.refused}"
    needs = f"{compiled.needed / GIB:.2f} GiB" if compiled.needed else "more memory"
    return f"DOES NOT FIT: a device needs {needs} and has {available / GIB:.2f} GiB"


def _show_memory(plan: Plan) -> None:
    memory, available = plan.compiled.memory, plan.topology.chip.memory_bytes
    parts = ("parameters", "optimizer", "saved activations", "temporary, gradients included", "batch and other")
    rows = [*zip(parts, dataclasses.astuple(memory), strict=True)]
    rows += [("total", memory.total if plan.compiled.fits else plan.compiled.needed or 0), ("available", available)]
    if not plan.compiled.fits:  # the compiler stopped before it reported the rest
        rows = [row for row in rows if row[1]]
    figures = [(name, f"{size / GIB:.3f}", f"{size / available:.1%}") for name, size in rows]
    summary_table("Memory of one device", ("", "GiB", "share"), figures)


def _show_plan(plan: Plan) -> None:
    _show_memory(plan)
    times, compiled = plan.times, plan.compiled
    assert times is not None
    if compiled.collectives:
        rows = [
            (c.kind, c.calls, c.group, c.route.axes, f"{c.bytes / 1e6:,.3f}", f"{c.calls * c.sent / 1e6:,.1f}")
            + (f"{times.exposed.get(one_call(c), 0.0) * 1e3:,.2f}",)
            for c in sorted(compiled.collectives, key=lambda c: -c.calls * c.sent)
        ]
        columns = ("collective", "calls", "devices", "along", "MB per call", "MB sent per step", "exposed, ms")
        summary_table("Collectives of one device in a step", columns, rows)
    times_rows = [
        ("lower bound: matrix products", times.compute, f"{compiled.costs.flops / 1e12:,.2f} TFLOP"),
        ("lower bound: memory traffic", times.memory, None),
        ("lower bound: links of the slice", times.links, None),
        ("lower bound: network between slices", times.network, None),
        ("kernels", times.kernels, f"{sum(k.calls for k in compiled.costs.kernels):,} calls"),
        ("waits for collectives", sum(times.exposed.values()), exposed(times)),
        ("step", times.step, f"lower bound {times.floor / times.step:.0%} of it, set by {times.bound}"),
    ]
    if plan.topology.slices == 1:
        del times_rows[3]
    figures = [(name, f"{seconds * 1e3:,.2f}", note) for name, seconds, note in times_rows]
    summary_table("Time of a step", ("", "ms", ""), figures)
    if times.unprofiled:
        print(f"only a lower bound, without a static profile: the time of {', '.join(times.unprofiled)}")
    print(summary(plan))


def exposed(times: Times) -> str | None:
    """Return the milliseconds of a step that wait for each kind of collective, the longest first."""
    by_kind = collections.defaultdict[str, float](float)
    for collective, seconds in times.exposed.items():
        by_kind[f"{collective.kind} along {collective.route.axes}"] += seconds
    longest = sorted(by_kind.items(), key=lambda pair: -pair[1])[:4]
    return ", ".join(f"{name} {seconds * 1e3:,.1f}" for name, seconds in longest) or None


def summary(plan: Plan) -> str:
    """Return speed and duration in one line."""
    assert plan.tokens_per_second is not None and plan.share_of_peak is not None
    line = f"about {plan.tokens_per_second:,.0f} tokens/s, {plan.share_of_peak:.0%} of peak; "
    if plan.days is None or plan.run_tokens is None or plan.chip_hours is None:
        return line + "pass --tokens or --train.steps for days and chip-hours"
    return line + f"{plan.run_tokens / 1e9:,.2f} B tokens: {plan.days:,.2f} days, {plan.chip_hours:,.0f} chip-hours"


def _show_ranking(answer: Answer) -> None:
    rows = []
    for plan in answer.ranking:
        memory = "does not fit" if plan.compiled.refused is None else "refused"
        step = waits = tokens = share = None
        if plan.times is not None:
            memory = f"{plan.compiled.memory.total / GIB:.2f}"
            step, waits = (f"{t * 1e3:,.1f}" for t in (plan.times.step, sum(plan.times.exposed.values())))
            tokens, share = f"{plan.tokens_per_second:,.0f}", f"{plan.share_of_peak:.0%}"
        flags = describe(plan.config, answer.plan.config) or "as configured"
        results = "differ" if changed(plan.config, answer.plan.config, CHANGES_RESULTS) else "same"
        rows.append((flags, memory, step, waits, tokens, share, results))
    columns = ("setting", "GiB", "step, ms", "waits, ms", "tokens/s", "of peak", "results")
    summary_table(f"{len(rows)} settings compiled, fastest first", columns, rows)
    best = answer.ranking[0]
    if not best.compiled.fits:
        print("no setting fits: raise --tries or use more chips")
        return
    print(summary(best))
    if flags := describe(best.config, answer.plan.config):
        print(f"the fastest: {flags}")
