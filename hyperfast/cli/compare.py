"""`hyperfast compare`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.measure import Measurement

from hyperfast.cli.distill import Distill, measure_teacher
from hyperfast.cli.options import HypernetOptions, Repeated, parse_losses
from hyperfast.cli.session import announce, describe, percent
from hyperfast.cli.suggest import nearest
from hyperfast.nn.initialization import SCHEMES
from hyperfast.recipes import METHODS, Comparison, compare
from hyperfast.recipes.compare_report import PAGE, failed, paired_table, table
from hyperfast.recipes.comparison import RECORD, run_folder
from hyperfast.recipes.seed_runs import terminal_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from hyperfast.cli.network import Network
    from hyperfast.recipes import ComparedRun, DistillConfig, LossTerm

PLAIN, MIP = "plain", "mip"
_WITHOUT_LABELS = "noce"
_NO_LIMIT = 10_000  # columns
# Where a student starts from; `mip` is the hypernetwork of the options.
STARTS = (PLAIN, MIP, *(scheme for scheme in SCHEMES if scheme != HypernetOptions.init))
LOSSES = (*METHODS, "kd")
# What is compared where nothing is asked for: the nine losses between like networks, and the logits'.
LAYER_WISE = ("at", "ab", "cwd", "fitnets", "fsp", "ft", "jacobian", "rkd", "sp", "kd")


@dataclass(frozen=True)
class Method:
    """How one of the students is trained.

    Attributes:
        start: one of `STARTS`.
        losses: as `hyperfast distill --loss` takes them; none: labels alone.
        labels: whether the student sees labels.
    """

    start: str = MIP
    losses: tuple[str, ...] = ()
    labels: bool = True

    @property
    def name(self) -> str:
        """The shortest way to write it."""
        start = () if self.losses and self.start == MIP else (self.start,)
        return ("" if self.labels else f"{_WITHOUT_LABELS}:") + "+".join((*start, *self.losses))

    @classmethod
    def parse(cls, text: str) -> Method:
        """`[noce:] [START +] LOSS[=WEIGHT][@FROM:TO] [+ ...]`, or a START alone.

        Raises:
            ValueError: an unknown name, a name given twice, a weight that is no positive number; no labels and no loss,
                or one that needs them.
        """
        prefix, colon, rest = text.partition(":")
        if not colon or "@" in prefix:  # the colon is of a part of the training
            prefix, rest = "", text
        if prefix and prefix != _WITHOUT_LABELS:
            raise ValueError(f"--method {text!r}: only {_WITHOUT_LABELS}: may stand in front, not {prefix}:")
        parts = rest.split("+")
        for part in parts:
            name = part.partition("@")[0].partition("=")[0]
            weight = part.removeprefix(name)
            known = (*STARTS, *LOSSES)
            if name not in known:
                raise ValueError(
                    f"--method {text!r}: unknown name {name!r}{nearest(name, known)}; choose from {', '.join(known)}"
                )
            if weight and name in STARTS:
                raise ValueError(f"--method {text!r}: {name} is no loss and has no weight")
        starts, losses = ([p for p in parts if (p in STARTS) == start] for start in (True, False))
        if len(starts) > 1:
            raise ValueError(f"--method {text!r}: a student starts from {starts[0]} or from {starts[1]}, not from both")
        if prefix and not losses:
            raise ValueError(f"--method {text!r}: nothing to learn from; add a loss, such as {text}+kd")
        try:
            terms = parse_losses(losses)
        except ValueError as error:
            raise ValueError(f"--method {text!r}: {str(error).removeprefix('--loss ')}") from None
        labelled = [name for name in terms if name in METHODS and METHODS[name].labels]
        if prefix and labelled:
            raise ValueError(f"--method {text!r}: {labelled[0]} has the labels in it; leave {prefix}: out")
        written = tuple(_written(name, term) for name, term in terms.items())
        return cls(starts[0] if starts else MIP, written, not prefix)


def parse_methods(given: Sequence[str], hypernetize: bool) -> dict[str, Method]:
    """The methods by name; none given: the labels alone, and each of `LAYER_WISE`.

    Raises:
        ValueError: as `Method.parse`; a method given twice; one that needs a hypernetwork where there is none.
    """
    methods: dict[str, Method] = {}
    for text in given or (MIP if hypernetize else PLAIN, *LAYER_WISE):
        method = Method.parse(text)
        if method.name in methods:
            raise ValueError(f"--method {method.name} is given more than once")
        methods[method.name] = method
    for name, method in methods.items():
        if not hypernetize and method.start != PLAIN and (method.start != MIP or not method.losses):
            raise ValueError(f"--method {name} needs a hypernetwork; leave --no-hypernetize out, or give {PLAIN}")
    return methods


@dataclass(frozen=True)
class Compare(Distill):
    """Compare methods: the options of "hyperfast distill", for all of them alike.

    Attributes:
        loss: those of each method.
        method: what to compare; may be given many times. plain (the network itself, labels alone), mip (hypernetised,
            labels alone), hyperfan_in, hyperfan_out or bias_hyperinit (labels alone, with this --init), any --loss of
            "hyperfast distill", hypernetised and with labels (at, at=500), several of them with + (at=500+kd=0.9, or
            plain+at, hyperfan_in+kd), and noce: in front of losses for no labels (noce:at+kd). Default: mip, the nine
            layer-wise losses and kd.
        seeds: runs of each method; their seeds are --seed and those after it.
        retry: run those again that have failed.
        out: folder of the comparison. Default: runs/compare-DATASET-MODEL. A comparison that is there already, with the
            same settings, is gone on with; new methods and seeds are added to it.
        resume: fail where there is no comparison to go on with.
        tensorboard: write TensorBoard events into the folder of each run (extra 'tensorboard').
    """

    loss: tyro.conf.Suppress[Repeated] = ()
    method: Repeated = ()
    seeds: int = 3
    retry: bool = False
    out: Path | None = None
    resume: bool = False
    tensorboard: bool = False

    @staticmethod
    def help() -> str:
        return """Compare methods of distillation: every method with every seed, one table and one page of curves.

Examples:
    hyperfast compare --dataset cifar10 --data DIR --model resnet20 --teacher cifar10_resnet20.safetensors \\
                      --method plain --method mip --method at --method at=500+kd=0.9 --method hyperfan_in \\
                      --seeds 3 --epochs 40 --out runs/compare
    hyperfast compare --dataset cifar10 --data DIR --model resnet20 --teacher cifar10_resnet20.safetensors \\
                      --method at=100 --method at=1000 --method at=10000 --out runs/sensitivity
    hyperfast compare --dataset digits --model resnet8 --teacher runs/train-digits-resnet8 \\
                      --method mip --method at --method noce:at+kd --seeds 2 --epochs 10

OUT holds results.csv, results.json, report.html and a folder METHOD-seedK for each run, which "hyperfast export" and
"hyperfast analyze" take. A run that fails stops no other. Ctrl-C writes a checkpoint; the same command then goes on
where it stopped. With more --method or --seeds it runs those that are new."""

    def run(self, console: Console) -> None:
        """Measure the teacher, train all students, and print the table."""
        methods = parse_methods(self.method, self.hypernetize)
        if self.seeds < 1:
            raise ValueError(f"--seeds is {self.seeds}; give at least 1")
        config = self.training.for_data(self.images)
        out = self.out or Path("runs") / f"compare-{self.images.dataset}-{self.model.replace(':', '-')}"
        if self.resume and not (out / RECORD).exists():
            raise FileNotFoundError(f"there is no {RECORD} in {out} to go on with; leave --resume out to start")
        distillations = {name: self._distillation_of(method) for name, method in methods.items()}
        splits, spec, teacher, network = self._prepare(console)
        judge, accuracy = measure_teacher(teacher.model, splits, config)
        console.print(f"teacher: {spec.model}, {percent(accuracy)} on the {judge} images", highlight=False)
        announce(network, network.build(config.seed), splits, console)

        def student(name: str, seed: int) -> nn.Module:
            own = _network_of(methods[name], network)
            # Beside the weights, so that other commands can build the network again.
            run = describe(own, splits, replace(config, seed=seed), command="compare", method=name)
            run.save(out / run_folder(name, seed))
            return own.build(seed)

        try:
            comparison = compare(
                distillations,
                student,
                teacher.model,
                splits,
                config,
                folder=out,
                seeds=range(config.seed, config.seed + self.seeds),
                settings={"data": self.images.settings(), "student": asdict(network)},
                retry=self.retry,
                progress=console.is_terminal,
                tensorboard=self.tensorboard,
                on_run=lambda run: _say(run, console),
            )
        except KeyboardInterrupt:
            so_far = Comparison.load(out)
            if any(run.result for run in so_far.runs):
                _print(so_far, console)
            raise
        _print(comparison, console)
        if not any(run.result for run in comparison.runs):
            raise ValueError(f"every run has failed, the first with {comparison.runs[0].error}")

    def _distillation_of(self, method: Method) -> DistillConfig | None:
        if method.losses:
            labels = self.comparison.cross_entropy_weight if method.labels else 0.0
            return replace(self.comparison, cross_entropy_weight=labels).config(method.losses)
        if not self.comparison.cross_entropy_weight:
            raise ValueError(
                f"--cross-entropy-weight 0 leaves {method.name} nothing to learn from; leave it out, and put "
                f"{_WITHOUT_LABELS}: before the methods that are to have no labels"
            )
        return None


def _network_of(method: Method, network: Network) -> Network:
    if method.start == PLAIN or network.hypernet is None:
        return replace(network, hypernet=None)
    if method.start == MIP:
        return network
    init: Any = method.start
    return replace(network, hypernet=replace(network.hypernet, init=init))


def _say(run: ComparedRun, console: Console) -> None:
    """A line for a log; a terminal has the bar."""
    if not console.is_terminal and run.result is not None:
        result, name = run.result, f"{run.method}, seed {run.seed}"
        accuracies = f"validation {percent(result.val_accuracy_best)}, test {percent(result.test_accuracy_best)}"
        console.print(f"{name}: {accuracies}, {result.ms_per_step:.1f} ms per step", highlight=False, soft_wrap=True)


def _print(comparison: Comparison, console: Console) -> None:
    shown = sized(console, *table(comparison), title=f"{comparison.folder}")
    if shown.width is None:
        shown = sized(console, *table(comparison, brief=True), title=f"{comparison.folder}")
    console.print(shown, crop=False)
    baseline = comparison.baseline
    if baseline is not None and (pairs := comparison.paired(baseline)):
        title = f"accuracy against {baseline}, seed by seed"
        console.print(sized(console, *paired_table(pairs), title=title), crop=False)
    for runs, message in failed(comparison).items():
        console.print(f"{runs} {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{comparison.folder / PAGE}", markup=False, highlight=False, soft_wrap=True)


def sized(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str | None]], title: str) -> Table:
    """As wide as it would like to be, in a log or where the terminal has room for that."""
    shown = terminal_table(columns, rows, title)
    wanted = Measurement.get(console, console.options.update(max_width=_NO_LIMIT), shown).maximum
    if not console.is_terminal or wanted <= console.width:
        shown.width = wanted
    return shown


def _written(name: str, term: LossTerm) -> str:
    weight = "" if term.beta is None else f"={_shortest(term.beta)}"
    start, end = term.span
    return name + weight + ("" if term.span == (0, 1) else f"@{_shortest(start)}:{_shortest(end)}")


def _shortest(weight: float) -> str:
    return repr(weight).removesuffix(".0")
