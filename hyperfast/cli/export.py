"""`hyperfast export`."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperfast.cli.network import Run, load_run
from hyperfast.nn import Hypernetwork, fold
from hyperfast.recipes import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console


@dataclass(frozen=True)
class Export:
    """Write an ordinary network.

    Attributes:
        checkpoint: folder of a run (its best weights), or one of best.safetensors, last.safetensors and
            checkpoint.safetensors in it (of the last one, the best weights so far). run.json must lie beside.
        out: file to write. Its ending chooses the form: .safetensors (state dict, with model, mean and std in the
            metadata), .pt2 (torch.export) or .onnx (needs onnx and onnxscript). The last two take batches of any size.
        condition: values in [0, 1] that the weights are generated from. Default: what the hypernetwork was trained
            with (0.5 for a stochastic condition).
        fold: of a network of "hyperfast inherit" with one head: two plain layers in the place of each inherited one.
    """

    checkpoint: tyro.conf.Positional[Path]
    out: Path
    condition: tuple[float, ...] | None = None
    fold: bool = False

    @staticmethod
    def help() -> str:
        return """Bake the weights of a trained hypernetwork into an ordinary network, and write that.

Examples:
    hyperfast export runs/distill-cifar10-resnet20 --out resnet20.safetensors
    hyperfast export runs/family/last.safetensors --condition 0.3 --out at_0.3.onnx
    hyperfast export runs/inherit-cifar10-resnet56/r16-h1-seed0 --fold --out resnet56_r16.onnx

The safetensors file can be the teacher of "hyperfast distill", and hyperfast.models.load_weights reads it."""

    def run(self, console: Console) -> None:
        """Materialise, write, and say what was written."""
        writers: dict[str, Callable[[nn.Module, Run, Path], None]] = {
            ".safetensors": write_safetensors,
            ".pt2": _write_program,
            ".onnx": _write_onnx,
        }
        if self.out.suffix not in writers:
            raise ValueError(f"--out is {self.out}; its ending chooses the form: {', '.join(writers)}")
        run, network = load_run(self.checkpoint)
        model = self._plain(run, network)
        if self.fold:
            run, model = self._folded(run, model)
        with checkpoint.staged(self.out) as staging:
            writers[self.out.suffix](model, run, staging)
        count = sum(parameter.numel() for parameter in model.parameters())
        console.print(
            f"{self.out}: {run.network.model}, {count:,} parameters, {self.out.stat().st_size:,} bytes",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def _plain(self, run: Run, network: nn.Module) -> nn.Module:
        if isinstance(network, Hypernetwork):
            return network.materialize(torch.tensor(self.condition) if self.condition is not None else None).eval()
        if self.condition is not None:
            raise ValueError(f"{self.checkpoint} is an ordinary {run.network.model}: it has no --condition")
        return network


    def _folded(self, run: Run, model: nn.Module) -> tuple[Run, nn.Module]:
        layers = run.network.inherited
        if layers is None:
            raise ValueError(f"--fold is for networks of hyperfast inherit; {self.checkpoint} has no inherited layer")
        for name, values in layers.items():
            if values["heads"] > 1:
                raise ValueError(
                    f"--fold: layer {name!r} has {values['heads']} heads, which are mixed anew for every image: no "
                    "plain layers do the same. Inherit with --heads 1; or hyperfast.nn.fold takes the mean of the heads"
                )
        folded = {name: {**values, "folded": True} for name, values in layers.items()}
        return replace(run, network=replace(run.network, inherited=folded)), fold(model)


def _example(run: Run) -> Tensor:
    return torch.zeros(2, *run.image)


def write_safetensors(model: nn.Module, run: Run, path: Path) -> None:
    """A state dict, with metadata that say what it is of and how its images are normalised."""
    metadata = {
        **run.network.metadata(),
        "mean": ",".join(map(str, run.mean)),
        "std": ",".join(map(str, run.std)),
    }
    # Copies: parameters that two modules share may not share memory in such a file.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)


def _write_program(model: nn.Module, run: Run, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (_example(run),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def _write_onnx(model: nn.Module, run: Run, path: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX needs {' and '.join(missing)}, not installed here; try `pip install onnx onnxscript`, or export to "
            ".pt2 or .safetensors",
            name=missing[0],
        )
    # The exporter talks about itself: packages it could use, deprecations in its own calls.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (_example(run),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
