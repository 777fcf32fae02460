"""The experiments: which trials each consists of, by the labels of its table or figure.

tiny-wan has 8 blocks where Wan2.1 1.3B has 30; 15, 20, 25 and 30 of 30 become 4, 5, 7 and 8 of 8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..rates import Normalizer, Pattern, Rate
from .trial import Maps, Scale, Trial

HALF, TWO_THIRDS, MOST, ALL = 4, 5, 7, 8
BASE = Maps()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table or figure.

    Args:
        title: a heading.
        trials: label → trial; scored.
        banks: label → distillation, of which only the errors are wanted.
        pairs: (label, label): differences that are reported with an interval, second minus first.
        lengths: measure the errors of `banks` at `Scale.lengths` too.
        frames: labels whose clips are shown side by side.
    """

    title: str
    trials: Mapping[str, Trial] = field(default_factory=dict)
    banks: Mapping[str, Maps] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    lengths: bool = False
    frames: tuple[str, ...] = ()


def table3(scale: Scale) -> Experiment:
    """With and without distillation, linear and R = 8."""
    rows: list[tuple[int, Rate]] = [(HALF, "linear"), (TWO_THIRDS, 8)]
    trials, pairs = {}, []
    for blocks, rate in rows:
        for distilled in (False, True):
            trial = Trial(blocks=blocks, rate=rate, distilled=distilled, steps=scale.steps)
            trials[f"{trial.name} {'distilled' if distilled else 'not distilled'}"] = trial
        pairs.append((f"{trial.name} not distilled", f"{trial.name} distilled"))
    return Experiment(
        title="Distilled or not (Table 3, Fig. 6)", trials=trials, pairs=tuple(pairs), frames=tuple(trials)
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
    trials, pairs = {}, []
    for blocks in (TWO_THIRDS, HALF):
        for loss, maps in (("attention", Maps(loss="attention", rates=(8,))), ("value", BASE)):
            trial = Trial(maps=maps, blocks=blocks, rate=8, steps=scale.steps)
            trials[f"{trial.name} {loss}"] = trial
        pairs.append((f"{trial.name} attention", f"{trial.name} value"))
    return Experiment(title="Distillation loss (Table 5)", trials=trials, pairs=tuple(pairs))


def table6(scale: Scale) -> Experiment:
    """Degree and depth of φ."""
    trials, banks = {}, {}
    for degree, layers in ((2, 2), (3, 2), (4, 2), (6, 3)):
        if layers <= scale.most_layers:
            maps = BASE if (degree, layers) == (2, 2) else Maps(degree=degree, layers=layers, rates=(8,))
            banks[f"P={degree} L={layers}"] = maps
            trials[f"P={degree} L={layers}"] = Trial(maps=maps, blocks=TWO_THIRDS, rate=8, steps=scale.steps)
    labels = list(trials)
    return Experiment(
        title="Degree and depth of φ (Table 6)",
        trials=trials,
        banks=banks,
        pairs=tuple((labels[0], label) for label in labels[1:]),
    )


def figure3(scale: Scale) -> Experiment:
    """Distillation error of every block at every rate."""
    return Experiment(title="Distillation error per block and rate (Fig. 3)", banks={"P=2 L=2": BASE})


def figure4(scale: Scale) -> Experiment:
    """Before and after fine-tuning, by blocks and rate."""
    trials = {}
    for blocks in (HALF, TWO_THIRDS, MOST):
        for rate in (2, 8):
            for steps in (0, scale.steps):
                trial = Trial(blocks=blocks, rate=rate, steps=steps)
                trials[f"{trial.name} {'fine-tuned' if steps else 'distilled'}"] = trial
    pairs = tuple((label, label.replace("distilled", "fine-tuned")) for label in trials if "distilled" in label)
    return Experiment(title="Before and after fine-tuning (Fig. 4)", trials=trials, pairs=pairs, frames=tuple(trials))


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
    )


def normalizer(scale: Scale) -> Experiment:
    """max (Eq. 5) against mean, also at other lengths."""
    names: tuple[Normalizer, ...] = ("max", "mean")
    banks = {name: BASE if name == "mean" else Maps(normalizer=name) for name in names}
    trials = {name: Trial(maps=maps, blocks=TWO_THIRDS, rate=8, steps=scale.steps) for name, maps in banks.items()}
    return Experiment(
        title="Normalizer: the row maximum of Eq. 5 against the mean exponential",
        trials=trials,
        banks=banks,
        pairs=(names,),
        lengths=True,
    )


def pattern(scale: Scale) -> Experiment:
    """Which tokens keep softmax, at equal cost."""
    names: tuple[Pattern, ...] = ("stride", "staggered", "lattice")
    banks = {name: BASE if name == "stride" else Maps(pattern=name, rates=(2, 8)) for name in names}
    trials = {name: Trial(maps=maps, blocks=TWO_THIRDS, rate=8, steps=scale.steps) for name, maps in banks.items()}
    return Experiment(
        title="Token pattern at equal cost",
        trials=trials,
        banks=banks,
        pairs=(("stride", "staggered"), ("stride", "lattice")),
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
    return Experiment(title="Recovery: objective and steps", trials=trials, pairs=tuple(pairs))


EXPERIMENTS: dict[str, Callable[[Scale], Experiment]] = {
    "figure3": figure3,
    "normalizer": normalizer,
    "pattern": pattern,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "figure5": figure5,
    "recovery": recovery,
    "figure4": figure4,
    "table6": table6,
}
"""By the name that the command line takes, in the order in which they are run."""
