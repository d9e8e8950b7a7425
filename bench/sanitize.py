"""Every operation once, forward and backward, on every GPU backend, at small sizes: food for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python3 bench/sanitize.py
"""

from __future__ import annotations

import sys

import torch
from registry import operation
from verify import largest_error

from hyperfast import BackendUnavailable

_PAIRED = ("activation_boundary", "channel_wise_distillation", "fitnets", "unit_distance")


def main() -> int:
    """Run all small cases; exit status 1 where a result is wrong."""
    if not torch.cuda.is_available():
        print("torch sees no GPU")
        return 1
    device, wrong = torch.device("cuda"), 0
    names = ("generate", "attention_transfer", "ranger_update", "similarity_preserving", "relational_distance_angle")
    for name in (*names, "flow_of_solution", "cross_entropy_distillation", "sub_logit_distillation", *_PAIRED):
        op = operation(name)
        for case in (case for case in op.cases if case.small):
            inputs = op.inputs(case.options, device, 0)
            truth = op.truth(inputs)
            for provider in (p for p in op.providers if p.name.startswith("hyperfast")):
                try:
                    found, result = largest_error(provider.build(inputs).results(), truth)
                except BackendUnavailable as error:
                    print(f"{name}, {provider.name}: not there: {error}")
                    continue
                torch.cuda.synchronize()
                right = found <= op.tolerance
                wrong += not right
                print(f"{name}, {provider.name}: {'ok' if right else 'WRONG'}, {result} is off by {found:.1e}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
