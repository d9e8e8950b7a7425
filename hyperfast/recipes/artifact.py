"""A compressed network as one file: what predicts its weights, and everything that is not predicted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast import models
from hyperfast.nn import WeightPredictor
from hyperfast.recipes import checkpoint
from hyperfast.recipes.checkpoint import JSON
from hyperfast.recipes.predictor_storage import STORED_WEIGHTS, StoredWeights, decode, encode, to_half
from hyperfast.recipes.size_report import SizeReport
from hyperfast.surgery import Coverage, Permutation
from hyperfast.surgery.select import CONVOLUTIONS, TRANSPOSED

FORMAT = 1
_KIND = "compressed network"
_CONVOLUTIONS = (*CONVOLUTIONS, *TRANSPOSED)


@dataclass(frozen=True, eq=False)
class Artifact:
    """A compressed network: complete, without the original. `Artifact.of` makes one from a network.

    Attributes:
        predictor: of the covered weights; made for `coverage.coordinates()`.
        coverage: which weights these are.
        permutation: which kernel stands at which coordinate.
        kept: every other tensor of the network's state dict: norms, biases, a classifier, uncovered convolutions.
        metadata: - `model`, `classes`, `model_options`: for `build`, as `hyperfast.models.create` takes them.
                  - `parameters`, `convolutions`: weights of the network, for `size_report`; `of` counts them.
                  - `aliases`: name -> covered name whose weight it shares; `of` finds them.
                  - and whatever else JSON can hold.
        stored: how the predictor was stored in the file that this was loaded from.

    Raises:
        ValueError: parts that do not belong together.

    Example:
        >>> Artifact.of(model, predictor, coverage, permutation, {"model": "resnet20", "classes": 10}).save(path)
        >>> model.load_state_dict(Artifact.load(path).state_dict())
    """

    predictor: WeightPredictor
    coverage: Coverage
    permutation: Permutation
    kept: Mapping[str, Tensor]
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    stored: StoredWeights = "fp32"

    def __post_init__(self) -> None:
        rows, outputs = len(self.predictor.indices), self.predictor.configuration["outputs"]
        if (rows, outputs) != (self.coverage.rows, self.coverage.outputs):
            raise ValueError(
                f"the predictor has {rows} rows of {outputs}; the coverage has {self.coverage.rows} of "
                f"{self.coverage.outputs}. Make it with coverage.coordinates() and outputs=coverage.outputs"
            )
        if self.permutation.grids != self.coverage.grids:
            raise ValueError("the permutation was found for another coverage: its grids differ")
        twice = [tensor.name for tensor in self.coverage.tensors if tensor.name in self.kept]
        if twice:
            raise ValueError(f"kept has {twice[0]}, which is covered; give only what is not predicted")

    @classmethod
    def of(
        cls,
        module: nn.Module,
        predictor: WeightPredictor,
        coverage: Coverage,
        permutation: Permutation,
        metadata: Mapping[str, JSON] | None = None,
    ) -> Artifact:
        """The artefact of a network: copies what is not predicted and counts weights.

        Raises:
            ValueError: `module` is not what the coverage was made for, or parts do not belong together.
        """
        coverage.check(module)
        covered = {tensor.name for tensor in coverage.tensors}
        named = dict(module.named_parameters(remove_duplicate=False))
        owners = {id(named[name]): name for name in covered}
        aliases = {name: owners[id(p)] for name, p in named.items() if id(p) in owners and name not in covered}
        kept = {
            name: tensor.detach().cpu().clone()
            for name, tensor in module.state_dict().items()
            if name not in covered and name not in aliases
        }
        convolutions = {m.weight for m in module.modules() if isinstance(m, _CONVOLUTIONS)}
        counted: dict[str, JSON] = {
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "convolutions": sum(weight.numel() for weight in convolutions),
            "aliases": aliases,
        }
        return cls(predictor, coverage, permutation, kept, {**(metadata or {}), **counted})

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The complete state dict of the reconstructed network, on the CPU; predicted weights are float32."""
        rows = self.permutation.invert(self.predictor().cpu())
        state = {name: weight.clone() for name, weight in self.coverage.scatter(rows).items()}
        aliases = {name: state[owner] for name, owner in self._aliases.items()}
        return {**state, **aliases, **{name: tensor.clone() for name, tensor in self.kept.items()}}

    def load_into(self, module: nn.Module) -> None:
        """Give `module` the reconstructed weights, all or none.

        Raises:
            ValueError: its layers are not those of the network that was compressed; says what changed.
        """
        self.coverage.check(module)
        checkpoint.load_module(module, self.state_dict(), "the reconstructed network")

    def build(self) -> nn.Module:
        """The reconstructed network in eval mode, made by the name in `metadata["model"]`.

        Raises:
            ValueError: there is no such name; the model of that name has other layers by now.
        """
        name = self.metadata.get("model")
        if not isinstance(name, str):
            raise ValueError(
                "the artefact does not say of which model it is (metadata['model']); make the network yourself and "
                "use load_into(module)"
            )
        classes: Any = self.metadata.get("classes", 10)
        model_options: Any = self.metadata.get("model_options") or {}
        with torch.random.fork_rng([]):
            module = models.create(name, classes, **model_options)
        self.load_into(module)
        return module.eval()

    def save(self, path: str | os.PathLike[str], *, weights: StoredWeights = "fp32") -> None:
        """Write the artefact as one safetensors file, all or nothing.

        Args:
            path: destination.
            weights: of the predictor: - `"fp32"`.
                - `"fp16"`; what is kept is stored in float16 as well, and loaded in its own dtype again.
                - `"int8"`: matrices as integers with a float32 scale per output, biases as float32. Train with
                  `fake_quantized` first.

        Raises:
            ValueError: an unknown choice; NaN or infinite parameters of the predictor, NaN in what is kept; a value
                that float16 cannot hold; a predictor of other coordinates than the coverage's.
            OSError: the file cannot be written. The one that was there before is unchanged.
        """
        self._check_numbers()
        self._check_coordinates()
        checkpoint.save(path, *self._contents(weights))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read an artefact. The same file gives the same weights every time.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut short, no compressed network, of a later format, or was changed after it was
                written.
        """
        read = checkpoint.load(path)
        description: dict[str, Any] = dict(read.metadata)
        if description.get("kind") != _KIND:
            raise ValueError(
                f"{path} was written by hyperfast, but it is no compressed network; give a file of `hyperfast compress`"
            )
        if description.get("format") != FORMAT:
            raise ValueError(
                f"{path} has artefact format {description.get('format')}; this hyperfast reads format {FORMAT}. "
                "Update hyperfast"
            )
        if description.pop("sha256", None) != _digest(read.tensors, description):
            raise ValueError(f"{path} was changed after it was written: its SHA-256 does not match")
        coverage = Coverage.from_json(description["coverage"])
        permutation = Permutation.unpack(read.tensors["permutation"], coverage, description["permutation"])
        predictor = _make(description["predictor"], coverage, read.tensors.get("frequencies"))
        checkpoint.load_module(predictor, decode(read.section("predictor")), str(path))
        dtypes = {name: getattr(torch, dtype) for name, dtype in description["dtypes"].items()}
        kept = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in read.section("kept").items()}
        artifact = cls(predictor, coverage, permutation, kept, description["metadata"], description["weights"])
        artifact._check_numbers()
        return artifact

    def size_report(self, weights: StoredWeights | None = None) -> SizeReport:
        """What the parts take, and the compression ratios with and without permutations.

        Args:
            weights: as `save` has it; default as it was `stored`.
        """
        weights = self.stored if weights is None else weights
        tensors, description = self._contents(weights)
        sizes = dict.fromkeys(("predictor", "frequencies", "permutation", "kept"), 0)
        for name, tensor in tensors.items():
            sizes[name.partition("/")[0]] += tensor.nbytes
        counts = {"covered weights": self.coverage.weights}
        for name, key in (("all parameters", "parameters"), ("convolutions", "convolutions")):
            count = self.metadata.get(key)
            if isinstance(count, int) and count:
                counts[name] = count
        return SizeReport(
            weights,
            sum(parameter.numel() for parameter in self._parameters.values()),
            sizes["predictor"] + sizes["frequencies"],
            sizes["permutation"],
            sizes["kept"],
            checkpoint.size(tensors, description) - sum(sizes.values()),
            4 * self.coverage.weights + sum(tensor.nbytes for tensor in self.kept.values()),
            counts,
        )

    @property
    def _aliases(self) -> dict[str, str]:
        aliases: Any = self.metadata.get("aliases") or {}
        return dict(aliases)

    @property
    def _parameters(self) -> dict[str, Tensor]:
        """As in the predictor's state dict, whose names change inside `fake_quantized`."""
        pairs = enumerate(zip(self.predictor.weights, self.predictor.biases, strict=True))
        return {f"layers.{i}.{kind}": t for i, pair in pairs for kind, t in zip(("weight", "bias"), pair, strict=True)}

    def _contents(self, weights: StoredWeights) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        """What the file holds: tensors and metadata."""
        if weights not in STORED_WEIGHTS:
            raise ValueError(f"weights is {weights!r}; choose one of {', '.join(map(repr, STORED_WEIGHTS))}")
        halved = {name for name, t in self.kept.items() if weights == "fp16" and t.is_floating_point()}
        kept = {name: to_half(t, name) if name in halved else t for name, t in self.kept.items()}
        tensors = checkpoint.section("predictor", encode(self._parameters, weights))
        if self.predictor.frequencies is not None:
            tensors["frequencies"] = self.predictor.frequencies
        tensors |= {"permutation": self.permutation.packed(), **checkpoint.section("kept", kept)}
        description: dict[str, JSON] = {
            "kind": _KIND,
            "format": FORMAT,
            "weights": weights,
            "predictor": self.predictor.configuration,
            "coverage": self.coverage.to_json(),
            "permutation": self.permutation.kind,
            "dtypes": {name: str(self.kept[name].dtype).removeprefix("torch.") for name in sorted(halved)},
            "metadata": checkpoint.as_json(self.metadata),
        }
        return tensors, {**description, "sha256": _digest(tensors, description)}

    def _check_numbers(self) -> None:
        for name, tensor in self._parameters.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"the predictor's {name} has NaN or infinite values: its training has failed")
        for name, tensor in self.kept.items():
            if bool(tensor.isnan().any()):
                raise ValueError(f"{name}, which is not predicted, has NaN values")

    def _check_coordinates(self) -> None:
        again = _make(self.predictor.configuration, self.coverage, self.predictor.frequencies)
        mine = [self.predictor.indices, *self.predictor.embeddings]
        if not all(torch.equal(a.cpu(), b) for a, b in zip(mine, [again.indices, *again.embeddings], strict=True)):
            raise ValueError("the predictor was made for other coordinates than coverage.coordinates()")


def _make(configuration: Mapping[str, Any], coverage: Coverage, frequencies: Tensor | None) -> WeightPredictor:
    with torch.random.fork_rng([]):  # whose parameters are about to be overwritten
        return WeightPredictor(coordinates=coverage.coordinates(), frequencies=frequencies, **configuration)


def _digest(tensors: Mapping[str, Tensor], description: Mapping[str, JSON]) -> str:
    """SHA-256 of everything in the file."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        dense = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {dense.dtype} {list(dense.shape)}".encode())
        digest.update(dense.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
