"""The experiments: which trials each consists of, by the labels of its table or figure.

tiny-wan has 8 blocks where Wan2.1 1.3B has 30; 10, 15, 20, 25 and 30 of 30 become 3, 4, 5, 7 and 8 of 8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..rates import Normalizer, Pattern, Rate
from .trial import Maps, Scale, Trial

THIRD, HALF, TWO_THIRDS, MOST, ALL = 3, 4, 5, 7, 8
BASE = Maps()
ONE_RATE = Maps(rates=(8,))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table or figure.

    Args:
        title: a heading.
        trials: label → trial; scored.
        banks: label → distillation, whose errors are wanted.
        pairs: (label, label): differences that are reported with an interval, second minus first.
        lengths: measure the errors of `banks` at `Scale.lengths` too.
        dead: report the share of features that no longer learn.
        frames: labels whose clips are shown side by side.
        shown: dimensions of the judge to report beside the summaries.
        axis: what the figure of scores runs over.
        extra: a further table: "correlations" of error and outcome over the trials, or the "grid" of Table 6.
    """

    title: str
    trials: Mapping[str, Trial] = field(default_factory=dict)
    banks: Mapping[str, Maps] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    lengths: bool = False
    dead: bool = False
    frames: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    axis: Literal["labels", "flops", "steps"] = "labels"
    extra: Literal["", "correlations", "grid"] = ""


def table3(scale: Scale) -> Experiment:
    """With and without distillation, linear and R = 8."""
    rows: list[tuple[int, Rate]] = [(HALF, "linear"), (TWO_THIRDS, 8)]
    trials, pairs = {}, []
    for blocks, rate in rows:
        one, two = (Trial(blocks=blocks, rate=rate, distilled=d, steps=scale.steps) for d in (False, True))
        trials |= {f"{one.name} not distilled": one, f"{two.name} distilled": two}
        pairs.append((f"{one.name} not distilled", f"{two.name} distilled"))
    return Experiment(
        title="Distilled or not, both fine-tuned (Table 3, Fig. 6)",
        trials=trials,
        pairs=tuple(pairs),
        frames=tuple(trials),
    )


def table4(scale: Scale) -> Experiment:
    """Homogeneous rates against the exact choice within the same cost, at four budgets."""
    trials, pairs = {}, []
    for blocks, rate in ((HALF, 4), (TWO_THIRDS, 4), (TWO_THIRDS, 8), (MOST, 8)):
        one, two = (
            Trial(blocks=blocks, rate=rate, heterogeneous=chosen, steps=scale.steps) for chosen in (False, True)
        )
        trials |= {f"{one.name} homogeneous": one, f"{one.name} heterogeneous": two}
        pairs.append((f"{one.name} homogeneous", f"{one.name} heterogeneous"))
    return Experiment(title="Homogeneous against heterogeneous rates (Table 4)", trials=trials, pairs=tuple(pairs))


def table5(scale: Scale) -> Experiment:
    """Attention against value distillation."""
    losses = {"attention": Maps(loss="attention", rates=(8,)), "value": BASE}
    trials, pairs = {}, [("attention", "value")]
    for blocks in (TWO_THIRDS, HALF):
        one, two = (Trial(maps=maps, blocks=blocks, rate=8, steps=scale.steps) for maps in losses.values())
        trials |= {f"{one.name} attention": one, f"{two.name} value": two}
        pairs.append((f"{one.name} attention", f"{two.name} value"))
    return Experiment(
        title="Distillation loss (Table 5)", trials=trials, banks=losses, pairs=tuple(pairs), shown=("motion",)
    )


def table6(scale: Scale) -> Experiment:
    """Degree and depth of φ."""
    trials, banks, pairs = {}, {}, []
    for degree, layers in ((6, 3), (4, 2), (3, 2), (2, 2)):
        if layers <= scale.most_layers:
            maps, label = Maps(degree=degree, layers=layers, rates=(8,)), f"P={degree} L={layers}"
            banks[label] = BASE if (degree, layers) == (BASE.degree, BASE.layers) else maps
            for blocks in (THIRD, HALF, TWO_THIRDS):
                trial = Trial(maps=banks[label], blocks=blocks, rate=8, steps=scale.steps)
                trials[f"{label} {trial.name}"] = trial
            pairs.append(("P=2 L=2", label))
    pairs = [(one, two) for one, two in pairs if one != two]
    pairs += [(f"{one} {n}×R8", f"{two} {n}×R8") for one, two in pairs for n in (THIRD, HALF, TWO_THIRDS)]
    return Experiment(
        title="Degree and depth of φ (Table 6)", trials=trials, banks=banks, pairs=tuple(pairs), extra="grid"
    )


def figure3(scale: Scale) -> Experiment:
    """Distillation error of every block at every rate."""
    return Experiment(title="Distillation error per block and rate (Fig. 3)", banks={"P=2 L=2": BASE})


def figure4(scale: Scale) -> Experiment:
    """Before and after fine-tuning, by blocks and rate; and before both, for one of them."""
    trials = {}
    for blocks in (HALF, TWO_THIRDS, MOST):
        for rate in (2, 8):
            for steps in (0, scale.steps):
                trial = Trial(blocks=blocks, rate=rate, steps=steps)
                trials[f"{trial.name} {'fine-tuned' if steps else 'distilled'}"] = trial
    pairs = tuple((label, label.replace("distilled", "fine-tuned")) for label in trials if "distilled" in label)
    raw = Trial(blocks=TWO_THIRDS, rate=8, distilled=False, steps=0)
    trials = {f"{raw.name} converted only": raw, **trials}
    return Experiment(
        title="Before and after distillation and fine-tuning (Fig. 4)",
        trials=trials,
        pairs=pairs,
        frames=tuple(trials),
    )


def figure5(scale: Scale) -> Experiment:
    """Score against remaining FLOPs for n blocks at rate R."""
    trials = [
        Trial(blocks=blocks, rate=rate, steps=scale.steps)
        for blocks in (HALF, TWO_THIRDS, MOST, ALL)
        for rate in (2, 4, 8)
    ]
    return Experiment(
        title="Score against remaining FLOPs (Fig. 5), and what predicts it",
        trials={trial.name: trial for trial in trials},
        pairs=(("8×R2", "4×R4"), ("5×R4", "4×R8"), ("8×R4", "7×R8")),  # fewer blocks at a higher rate, no more FLOPs
        axis="flops",
        extra="correlations",
    )


def normalizer(scale: Scale) -> Experiment:
    """max (Eq. 5) against mean, also at other lengths."""
    names: tuple[Normalizer, ...] = ("max", "mean")
    banks = {name: BASE if name == "mean" else Maps(normalizer=name, rates=(2, 4, 8)) for name in names}
    trials = {f"{name} 5×R8": Trial(maps=maps, blocks=TWO_THIRDS, rate=8, steps=0) for name, maps in banks.items()}
    trials |= {
        f"{name} 5×R8 fine-tuned": Trial(maps=maps, blocks=TWO_THIRDS, rate=8, steps=scale.steps)
        for name, maps in banks.items()
    }
    return Experiment(
        title="Normalizer: the row maximum of Eq. 5 against the mean exponential",
        trials=trials,
        banks=banks,
        pairs=(names, ("max 5×R8", "mean 5×R8"), ("max 5×R8 fine-tuned", "mean 5×R8 fine-tuned")),
        lengths=True,
    )


def pattern(scale: Scale) -> Experiment:
    """Which tokens keep softmax, at equal cost."""
    names: tuple[Pattern, ...] = ("stride", "staggered", "lattice")
    banks = {name: BASE if name == "stride" else Maps(pattern=name, rates=(2, 8)) for name in names}
    trials = {f"{name} 5×R8": Trial(maps=maps, blocks=TWO_THIRDS, rate=8, steps=0) for name, maps in banks.items()}
    trials |= {
        f"{name} 5×R8 fine-tuned": Trial(maps=maps, blocks=TWO_THIRDS, rate=8, steps=scale.steps)
        for name, maps in banks.items()
    }
    pairs = [
        (f"stride{end}", f"{name}{end}")
        for end in ("", " 5×R8", " 5×R8 fine-tuned")
        for name in ("staggered", "lattice")
    ]
    return Experiment(title="Token pattern at equal cost", trials=trials, banks=banks, pairs=tuple(pairs))


def activation(scale: Scale) -> Experiment:
    """Non-linearities, initial weights and learning rate of φ, by distillation error alone."""
    banks = {
        "ours (SiLU, squareplus, natural scale, lr 5e-3)": ONE_RATE,
        "final softplus": Maps(rates=(8,), final="softplus"),
        "final ReLU": Maps(rates=(8,), final="relu"),
        "final ELU + 1": Maps(rates=(8,), final="elu+1"),
        "hidden GELU": Maps(rates=(8,), hidden="gelu"),
        "hidden ReLU": Maps(rates=(8,), hidden="relu"),
        "weights as PyTorch draws them": Maps(rates=(8,), weights="pytorch"),
        "lr 1e-3": Maps(rates=(8,), lr=1e-3),
        "lr 1e-2": Maps(rates=(8,), lr=1e-2),
    }
    first = next(iter(banks))
    return Experiment(
        title="Non-linearities, initial weights and learning rate of φ",
        banks=banks,
        pairs=tuple((first, label) for label in banks if label != first),
        dead=True,
    )


def recovery(scale: Scale) -> Experiment:
    """Flow matching against the teacher's velocity, by fine-tuning steps."""
    trials, pairs = {}, []
    for steps in (0, scale.steps // 3, scale.steps, 2 * scale.steps):
        for objective in ("flow", "teacher"):
            if steps or objective == "flow":
                label = f"{objective} {steps}" if steps else "none 0"
                trials[label] = Trial(blocks=ALL, rate=8, steps=steps, objective=objective)
        if steps:
            pairs.append((f"flow {steps}", f"teacher {steps}"))
    return Experiment(title="Recovery: objective and steps", trials=trials, pairs=tuple(pairs), axis="steps")


EXPERIMENTS: dict[str, Callable[[Scale], Experiment]] = {
    "figure3": figure3,
    "activation": activation,
    "normalizer": normalizer,
    "pattern": pattern,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "figure5": figure5,
    "recovery": recovery,
    "table6": table6,
    "figure4": figure4,
}
"""By the name that the command line takes, in the order in which they are run."""
