"""How a plan is shown."""

from rich.table import Table

from biomamba_jax.hardware import GIB
from biomamba_jax.planning.plan import Answer, Plan, flags
from biomamba_jax.planning.search import parameter_count
from biomamba_jax.tables import print_tables, summary_table


def show(answer: Answer) -> None:
    """Prints what a plan says, and what to change."""
    plan = answer.plan
    print(f"{heading(plan)}\nestimates by the compiler and from datasheets; nothing of this is measured\n")
    if answer.ranking:
        _show_ranking(answer)
        return
    _show_memory(plan)
    if plan.compiled.fits:
        _show_plan(plan)
        return
    print(does_not_fit(plan))
    if answer.nearest is None:
        print("nothing near it fits either: take more chips, or shorter rows")
        return
    print(f"the nearest setting tried that does: {flags(answer.nearest, plan)}\n")
    _show_memory(answer.nearest)
    _show_plan(answer.nearest)


def heading(plan: Plan) -> str:
    """One line that names model, batch and machine."""
    model, data, topology = plan.config.model, plan.config.data, plan.topology
    mesh = " x ".join(f"{name} {size}" for name, size in plan.compiled.mesh.items() if size > 1) or "one device"
    parts = f" in {plan.config.train.accumulation} parts" if plan.config.train.accumulation > 1 else ""
    return (
        f"{model.kind}, {model.n_layers} x {model.d_model} ({parameter_count(model) / 1e6:,.0f} M parameters), "
        f"remat {model.remat}, batch {data.batch_size:,} x {data.sequence_length:,}{parts} on {topology} "
        f"({topology.chips:,} chips; {mesh})"
    )


def does_not_fit(plan: Plan) -> str:
    """One line that says by how much."""
    compiled, available = plan.compiled, plan.topology.chip.memory_bytes
    if compiled.refused:
        return f"does not go together: {compiled.refused}"
    needs = f"{compiled.needed / GIB:.2f} GiB" if compiled.needed else "more memory"
    return f"DOES NOT FIT: a device would need {needs}, and has {available / GIB:.2f} GiB"


def _show_memory(plan: Plan) -> None:
    memory, available = plan.compiled.memory, plan.topology.chip.memory_bytes
    rows = [
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("activations kept", memory.kept),
        ("temporary, with gradients", memory.temporary),
        ("batch and the rest", memory.rest),
        ("together", memory.total if plan.compiled.fits else plan.compiled.needed or 0),
        ("available", available),
    ]
    if not plan.compiled.fits:  # the compiler gave up before it told the rest
        rows = [row for row in rows if row[1]]
    figures = [(name, f"{size / GIB:.3f}", f"{size / available:.1%}") for name, size in rows]
    summary_table("Memory of a device", ("", "GiB", "share"), figures)


def _show_plan(plan: Plan) -> None:
    times, compiled = plan.times, plan.compiled
    assert times is not None
    if compiled.collectives:
        exchanges = []
        for c in sorted(compiled.collectives, key=lambda c: -c.calls * c.sent):
            where = "between slices" if c.between_slices else "inside"
            hidden = "beside other work" if c.overlaps else "waited for"
            sizes = (f"{c.calls:,}", f"{c.group:,}", f"{c.bytes / 1e6:,.3f}", f"{c.calls * c.sent / 1e6:,.1f}")
            exchanges.append((c.kind, *sizes, where, hidden))
        columns = ("exchange", "calls", "devices", "MB each", "MB sent a step", "where", "how")
        summary_table("What a device exchanges in a step", columns, exchanges)
    rows = [
        ("floor: matrix products", times.compute, f"{compiled.costs.flops / 1e12:,.2f} TFLOP"),
        ("floor: memory traffic", times.memory, None),
        ("floor: links of the slice", times.links, None),
        ("floor: network between slices", times.network, None),
        ("kernels", times.kernels, f"{sum(k.calls for k in compiled.costs.kernels):,} calls"),
        ("step", times.step, f"floor {times.floor / times.step:.0%} of it, by {times.bound}"),
    ]
    if plan.topology.slices == 1:
        del rows[3]
    summary_table("Time of a step", ("", "ms", ""), [(n, f"{seconds * 1e3:,.2f}", note) for n, seconds, note in rows])
    if times.unprofiled:
        print(f"a floor, for want of the compiler's profile: the time of {', '.join(times.unprofiled)}")
    print(summary(plan))


def summary(plan: Plan) -> str:
    """Speed and price in one line."""
    assert plan.tokens_per_second is not None and plan.share_of_peak is not None
    line = f"about {plan.tokens_per_second:,.0f} tokens/s, {plan.share_of_peak:.0%} of peak; "
    if plan.days is None or plan.run_tokens is None or plan.chip_hours is None:
        return line + "give --tokens (or --train.steps) for days and chip-hours"
    return line + f"{plan.run_tokens / 1e9:,.2f} B tokens: {plan.days:,.2f} days, {plan.chip_hours:,.0f} chip-hours"


def _show_ranking(answer: Answer) -> None:
    table = Table(title=f"{len(answer.ranking)} settings compiled, fastest first", title_justify="left")
    left = ("setting", "remat")
    for column in (*left, "data x fsdp x tensor x sequence", "GiB", "step, ms", "tokens/s", "of peak"):
        table.add_column(column, justify="left" if column in left else "right")
    for plan in answer.ranking:
        changed = flags(plan, answer.plan) or "as it is"
        mesh = " x ".join(str(size) for size in plan.compiled.mesh.values()) or "–"
        if plan.times is None:
            verdict = ("does not fit", "", "") if plan.compiled.refused is None else ("refused", "", "")
            table.add_row(changed, plan.config.model.remat, mesh, *verdict, "")
            continue
        memory = f"{plan.compiled.memory.total / GIB:.2f}"
        speed = (f"{plan.times.step * 1e3:,.1f}", f"{plan.tokens_per_second:,.0f}", f"{plan.share_of_peak:.0%}")
        table.add_row(changed, plan.config.model.remat, mesh, memory, *speed)
    print_tables([table])
    best = answer.ranking[0]
    print(summary(best) if best.compiled.fits else "none of them fits: raise --tries, or take more chips")
