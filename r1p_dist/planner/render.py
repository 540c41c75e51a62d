"""A plan as tables and as a picture."""

from matplotlib.figure import Figure

from r1p_dist.figures import png_of
from r1p_dist.planner.memory import checkpoint_bytes
from r1p_dist.planner.plan import Plan, Setting, communication_rows, parameters
from r1p_dist.tables import table

_MEMORY = ("weights", "gathered", "gradients", "optimizer", "activations", "buffers")
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999", "#D55E00")


def as_text(plan: Plan) -> str:
    """Returns the plan as Markdown tables."""
    return "\n\n".join([_head(plan), _settings_table(plan), _communication_table(plan), _best(plan)])


def _head(plan: Plan) -> str:
    question, shape = plan.question, plan.shapes[False]
    counts, saved = parameters(shape), checkpoint_bytes(shape)
    batch = question.batch
    flops = [
        (plan.shapes[key].trace.forward_flops + plan.shapes[key].trace.backward_flops) / batch.samples / 1e12
        for key in (False, True)
    ]
    lines = [
        f"{question.model}, {question.precision}, {question.accelerator.name}, {question.network.name}; per GPU "
        f"and micro step {batch}; {question.micro_steps} micro steps",
        f"parameters: {_millions(counts['frozen'])} frozen, {_millions(counts['routers'])} in fixed routers, "
        f"{_millions(counts['trained'])} trained, {_millions(counts['merged'])} merged per task",
        f"operations per {batch.sample}: {flops[0]:.2f} TFLOP, {flops[1]:.2f} with activation checkpointing",
        f"saved: {saved['step'] / 1e6:.0f} MB per checkpoint, {saved['task'] / 1e6:.0f} MB per finished task",
    ]
    if _scans(plan):
        batches = shape.boundary.batches
        count = "an epoch's, which 'between tasks' leaves out" if batches is None else f"{batches}"
        model, moments = (flops / batch.samples / 1e12 for flops in (shape.scan_flops, shape.moment_flops))
        lines.append(
            f"global batches scanned after a task: {count}; {model:.2f} TFLOP per {batch.sample}, and {moments:.2f} in "
            "fp32 for second moments"
        )
    return "\n".join(lines)


def _scans(plan: Plan) -> bool:
    """Whether the method scans a task's data at its end."""
    return plan.shapes[False].boundary.needs is not None


def _millions(numel: int) -> str:
    return f"{numel / 1e6:,.1f} M"


def _kinds(plan: Plan) -> tuple[str, ...]:
    """Returns the kinds of memory; what a method knows of past tasks where it keeps any of it in memory."""
    return (*_MEMORY, "method") if plan.settings[0].memory.method else _MEMORY


def _settings_table(plan: Plan) -> str:
    kinds = _kinds(plan)
    head = ["GPUs", "ZeRO", "checkpointing", *kinds, "total GB", "fits", "pristine"]
    head += ["step ms*", "samples/s*", "efficiency*", "between tasks s*"]
    head += ["scanning GB", "scanned batch ms*"] if _scans(plan) else []
    rows = []
    for setting in plan.settings:
        memory = [f"{getattr(setting.memory, kind) / 1e9:.2f}" for kind in kinds]
        is_best = plan.best.get(setting.ranks) is setting
        rows.append(
            [
                str(setting.ranks),
                str(setting.stage),
                "yes" if setting.checkpointing else "no",
                *memory,
                f"{setting.memory.total / 1e9:.2f}",
                ("best" if is_best else "yes") if setting.fits else "no",
                f"{setting.memory.pristine / 1e9:.2f}",
                f"{1e3 * setting.time.total:.1f}",
                f"{setting.samples_per_second:,.0f}",
                f"{setting.time.efficiency:.3f}",
                f"{setting.boundary_seconds:.2f}",
            ]
        )
        if _scans(plan):
            rows[-1] += [f"{setting.scan_memory / 1e9:.2f}", f"{1e3 * setting.scan_time.total:.1f}"]
    return f"Memory of a rank in GB. * predicted, not measured\n\n{table(head, rows)}"


def _communication_table(plan: Plan) -> str:
    head = ["GPUs", "ZeRO", "when", "collective", "of", "calls", "MB", "ring MB", "ring steps", "tree MB", "tree steps"]
    rows = []
    for setting in plan.settings:
        if setting.checkpointing != _shown_checkpointing(plan, setting):
            continue
        phases = {"step": setting.step, "between tasks": setting.boundary, "scanned batch": setting.scan}
        for when, collectives in phases.items():
            for row in communication_rows(collectives, setting.ranks, plan.question.network):
                mb = [f"{row[key] / 1e6:.3f}" for key in ("bytes", "ring_bytes", "tree_bytes")]
                rows.append(
                    [str(setting.ranks), str(setting.stage), when, row["kind"], row["purpose"], str(row["calls"])]
                    + [mb[0], mb[1], str(row["ring_steps"]), mb[2], str(row["tree_steps"])]
                )
    return (
        "Collectives of a rank: whole tensors, and what is sent as a ring and as a tree; without checkpointing where "
        f"that fits\n\n{table(head, rows)}"
    )


def _shown_checkpointing(plan: Plan, setting: Setting) -> bool:
    plain = next(
        s for s in plan.settings if (s.ranks, s.stage, s.checkpointing) == (setting.ranks, setting.stage, False)
    )
    return not plain.fits


def _best(plan: Plan) -> str:
    lines = []
    for ranks in plan.question.ranks:
        best = plan.best.get(ranks)
        if best is None:
            lines.append(f"{ranks} GPUs: nothing fits; use a smaller --batch or ZeRO 3")
        else:
            with_or_without = "with" if best.checkpointing else "without"
            lines.append(
                f"{ranks} GPUs: best is ZeRO {best.stage} {with_or_without} activation checkpointing, predicted "
                f"{best.samples_per_second:,.0f} samples/s in {best.memory.total / 1e9:.1f} GB"
            )
    return "\n".join(lines)


def as_png(plan: Plan) -> bytes:
    """Returns a picture: memory by kind of the settings on the most GPUs, and predicted efficiency over GPUs."""
    ranks = max(plan.question.ranks)
    shown = [setting for setting in plan.settings if setting.ranks == ranks]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bottoms = [0.0] * len(shown)
    for kind, colour in zip(_kinds(plan), _COLOURS, strict=False):
        values = [getattr(setting.memory, kind) / 1e9 for setting in shown]
        left.bar(range(len(shown)), values, bottom=bottoms, color=colour, label=kind, width=0.7)
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    left.axhline(plan.question.memory / 1e9, color="black", linewidth=1, linestyle="--")
    labels = [f"ZeRO {s.stage}" + ("\ncheckpointing" if s.checkpointing else "") for s in shown]
    left.set_xticks(range(len(shown)), labels, fontsize=7)
    left.set_ylabel(f"GB per GPU on {ranks} GPUs", fontsize=8)
    left.legend(fontsize=7, frameon=False)
    for stage in plan.question.stages:
        for checkpointing, style in ((False, "-"), (True, ":")):
            line = [s for s in plan.settings if (s.stage, s.checkpointing) == (stage, checkpointing)]
            label = f"ZeRO {stage}{', checkpointing' if checkpointing else ''}"
            values = [s.time.efficiency for s in line]
            colour = _COLOURS[stage]
            right.plot([s.ranks for s in line], values, style, marker=".", color=colour, label=label)
    right.set_xscale("log", base=2)
    right.set_xticks(plan.question.ranks, [str(count) for count in plan.question.ranks], fontsize=8)
    right.set(ylim=(0, 1.05))
    right.set_xlabel("GPUs", fontsize=8)
    right.set_ylabel("efficiency (predicted)", fontsize=8)
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)
