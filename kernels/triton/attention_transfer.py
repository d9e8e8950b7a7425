"""Triton kernels of `attention_transfer`: all taps in one launch forward and one backward, one program per sample.

The maps' addresses are kernel arguments, one tuple per side, so that no table of pointers is copied to the device: a
copy from pageable host memory would be a second operation, and inside a captured CUDA graph it would replay whatever
the host buffer holds by then. A program picks its tap's address with a chain of selects.

Forward: a program reads both maps of its sample once and leaves the energies sum_c |F|^p, one number per position, in
the coefficients (student) and in a scratch buffer (teacher), both still in the cache when norms, differences and
coefficients are formed from them. The last program to finish adds the samples' losses in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.config import (
    INT32_MAX,
    TRITON_TYPES,
    Configuration,
    device_guard,
    kernel_signature,
    refuse_device,
    refuse_dtype,
    tickets,
)
from hyperfast.kernels.triton.table import alignment, multiple, pick, pick_size, sum_before

__all__ = ["backward", "configurations", "forward", "supports"]

MAX_TAPS = 64
"""Taps of one launch; 64 pairs of addresses and sizes are a third of a launch's 4 KiB of arguments."""
SPLITS = 4
"""Programs per sample in the backward pass, which writes as much as it reads and needs no sum."""
FORWARD_OPTIONS = {"num_warps": 8, "num_stages": 2}
BACKWARD_OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def _power(x, POWER: tl.constexpr):
    """|x|^POWER."""
    if POWER == 1:
        return tl.abs(x)
    elif POWER == 2:
        return x * x
    else:
        return tl.abs(x) * x * x


@triton.jit
def _power_slope(x, POWER: tl.constexpr):
    """|x|^(POWER - 1) sign(x)."""
    if POWER == 1:
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # x last, so that NaN stays NaN
    elif POWER == 2:
        return x
    else:
        return tl.abs(x) * x


@triton.jit
def _tile(first_channel, first, C, N, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets in one sample's map and mask of a tile `[BLOCK_C, BLOCK_N]`, or its transpose for channels_last."""
    c = first_channel + tl.arange(0, BLOCK_C)
    n = first + tl.arange(0, BLOCK_N)
    if LAST:
        return n[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]
    else:
        return c[:, None] * N + n[None, :], (c < C)[:, None] & (n < N)[None, :]


@triton.jit
def _energy(
    target, source, C, N,
    POWER: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sum_c |F|^POWER of every position of one sample into `target`."""
    for first in range(0, N, BLOCK_N):
        acc = tl.zeros([BLOCK_N, BLOCK_C] if LAST else [BLOCK_C, BLOCK_N], tl.float32)
        for channel in range(0, C, BLOCK_C):
            offsets, mask = _tile(channel, first, C, N, LAST, BLOCK_C, BLOCK_N)
            acc += _power(tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32), POWER)
        n = first + tl.arange(0, BLOCK_N)
        tl.store(target + n, tl.sum(acc, 1 if LAST else 0), mask=n < N)


@triton.jit
def _energy_any(target, source, C, N, POWER: tl.constexpr, LAST: tl.constexpr):
    """`_energy` with tiles of 4096 elements shaped for the map: as long as its contiguous dimension, about."""
    if LAST:
        if C >= 64:
            _energy(target, source, C, N, POWER, LAST, 64, 64)
        else:
            _energy(target, source, C, N, POWER, LAST, 16, 256)
    else:
        if N > 512:
            _energy(target, source, C, N, POWER, LAST, 4, 1024)
        elif N > 128:
            _energy(target, source, C, N, POWER, LAST, 16, 256)
        else:
            _energy(target, source, C, N, POWER, LAST, 64, 64)


@triton.jit
def _norm(energy, N, scale, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        e = tl.load(energy + n, mask=n < N, other=0.0) * scale
        acc += e * e
    return tl.sqrt_rn(tl.sum(acc))


@triton.jit(do_not_specialize=["B"])
def attention_transfer_forward_kernel(
    losses,
    coefficients,
    teacher_energy,
    sample_losses,
    ticket,
    students,
    teachers,
    student_channels,
    teacher_channels,
    positions,
    B,
    eps,
    POWER: tl.constexpr,
    MODE: tl.constexpr,
    STUDENT_LAST: tl.constexpr,
    TEACHER_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Loss share and coefficients of one sample of one tap."""
    TAPS: tl.constexpr = len(students)
    BLOCK: tl.constexpr = 1024
    program = tl.program_id(0)
    tap = program // B
    sample = (program % B).to(tl.int64)
    # Sizes known to be multiples of ALIGN are read and written in whole vectors.
    N = multiple(pick_size(positions, tap), ALIGN)
    C_s = multiple(pick_size(student_channels, tap), ALIGN if STUDENT_LAST else 1)
    C_t = multiple(pick_size(teacher_channels, tap), ALIGN if TEACHER_LAST else 1)
    place = sum_before(positions, tap) * B + sample * N
    q_s = coefficients + place
    q_t = teacher_energy + place
    _energy_any(q_s, pick(students, tap) + sample * C_s * N, C_s, N, POWER, STUDENT_LAST)
    _energy_any(q_t, pick(teachers, tap) + sample * C_t * N, C_t, N, POWER, TEACHER_LAST)
    tl.debug_barrier()

    scale_s = 1.0 / C_s if MODE == "code" else 1.0
    scale_t = 1.0 / C_t if MODE == "code" else 1.0
    norm_s = _norm(q_s, N, scale_s, BLOCK)
    norm_t = _norm(q_t, N, scale_t, BLOCK)
    if MODE == "zoo":
        divisor_s = norm_s + eps
        divisor_t = norm_t + eps
    else:
        divisor_s = tl.maximum(norm_s, eps)
        divisor_t = tl.maximum(norm_t, eps)

    squared_acc = tl.zeros([BLOCK], tl.float32)
    along_acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        u = tl.load(q_s + n, mask=n < N, other=0.0) * scale_s / divisor_s
        difference = u - tl.load(q_t + n, mask=n < N, other=0.0) * scale_t / divisor_t
        squared_acc += difference * difference
        along_acc += u * difference
    squared = tl.sum(squared_acc)
    along = tl.sum(along_acc)
    # w = dL/du = weight * (u - v).
    if MODE == "paper":
        distance = tl.sqrt_rn(squared)
        loss = distance / B
        weight = tl.where(distance > 0, 1.0 / (tl.where(distance > 0, distance, 1.0) * B), 0.0)
    else:
        loss = squared / B / N
        weight = 2.0 / B / N
    if MODE == "zoo":
        along = along * divisor_s / tl.where(norm_s > 0, norm_s, 1.0)
    outer = weight / divisor_s * POWER * scale_s
    alive = norm_s > (0.0 if MODE == "zoo" else eps)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        u = tl.load(q_s + n, mask=n < N, other=0.0) * scale_s / divisor_s
        difference = u - tl.load(q_t + n, mask=n < N, other=0.0) * scale_t / divisor_t
        tl.store(q_s + n, tl.where(alive, (difference - u * along) * outer, 0.0), mask=n < N)
    tl.store(sample_losses + program, loss)

    # The barrier orders this program's store before the release; the acquire orders it before the last one's loads.
    tl.debug_barrier()
    finished = tl.atomic_add(ticket, 1, sem="acq_rel")
    if finished == tl.num_programs(0) - 1:
        tl.debug_barrier()
        tl.store(ticket, 0)
        for start in range(0, TAPS, 16):
            taps = start + tl.arange(0, 16)
            acc = tl.zeros([16, 64], tl.float32)
            for first in range(0, B, 64):
                b = first + tl.arange(0, 64)
                mask = (taps < TAPS)[:, None] & (b < B)[None, :]
                # .cg: other multiprocessors wrote this, the first-level cache does not know.
                source = sample_losses + taps[:, None] * B + b[None, :]
                acc += tl.load(source, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(losses + taps, tl.sum(acc, 1), mask=taps < TAPS)


@triton.jit
def _gradient(
    target, source, coefficients, grad, C, N, split,
    POWER: tl.constexpr, LAST: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's share of one sample: every SPLITS-th block of channels (of positions for channels_last)."""
    for first in range(split * BLOCK_N if LAST else 0, N, SPLITS * BLOCK_N if LAST else BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        scale = tl.load(coefficients + n, mask=n < N, other=0.0) * grad
        scale = tl.expand_dims(scale, 1 if LAST else 0)
        for channel in range(0 if LAST else split * BLOCK_C, C, BLOCK_C if LAST else SPLITS * BLOCK_C):
            offsets, mask = _tile(channel, first, C, N, LAST, BLOCK_C, BLOCK_N)
            x = tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(target + offsets, scale * _power_slope(x, POWER), mask=mask)


@triton.jit(do_not_specialize=["B"])
def attention_transfer_backward_kernel(
    gradients,
    students,
    coefficients,
    grad,
    channels,
    positions,
    B,
    POWER: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """dL/dF = grad[tap] * coefficient[position] * |F|^(POWER - 1) sign(F)."""
    program = tl.program_id(0)
    split = program % SPLITS
    tap = program // SPLITS // B
    sample = (program // SPLITS % B).to(tl.int64)
    N = multiple(pick_size(positions, tap), ALIGN)
    C = multiple(pick_size(channels, tap), ALIGN if LAST else 1)
    coefficients += sum_before(positions, tap) * B + sample * N
    target = pick(gradients, tap) + sample * C * N
    source = pick(students, tap) + sample * C * N
    scale = tl.load(grad + tap).to(tl.float32)
    if LAST:
        if C >= 64:
            _gradient(target, source, coefficients, scale, C, N, split, POWER, LAST, SPLITS, 64, 32)
        else:
            _gradient(target, source, coefficients, scale, C, N, split, POWER, LAST, SPLITS, 16, 128)
    else:
        if N > 512:
            _gradient(target, source, coefficients, scale, C, N, split, POWER, LAST, SPLITS, 2, 1024)
        elif N > 128:
            _gradient(target, source, coefficients, scale, C, N, split, POWER, LAST, SPLITS, 8, 256)
        else:
            _gradient(target, source, coefficients, scale, C, N, split, POWER, LAST, SPLITS, 32, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Launch


def _fits(features: Tensor, channels_last: bool) -> bool:
    return features.movedim(1, -1).is_contiguous() if channels_last else features.is_contiguous()


def _one_layout(features: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], bool]:
    """The maps in one memory format, and whether it is channels_last; maps are copied only where formats are mixed."""
    for channels_last in (False, True):
        if all(_fits(f, channels_last) for f in features):
            return tuple(features), channels_last
    return tuple(f.contiguous() for f in features), False


def _positions(features: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(f.shape[2:].numel() for f in features)


def _channels(features: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(f.shape[1] for f in features)


def supports(student: Sequence[Tensor], teacher: Sequence[Tensor], *_: Any) -> str | None:
    """Why these kernels cannot run on the maps, or `None` where they can. For `backward`, the student's maps twice."""
    for name, maps in (("student", student), ("teacher", teacher)):
        if len({f.dtype for f in maps}) > 1:
            return f"the {name} maps have different dtypes"
        if reason := refuse_device(maps[0].device) or refuse_dtype(maps[0].dtype):
            return reason
        if any(0 in f.shape[1:] or f.shape[1:].numel() > INT32_MAX for f in maps):
            return f"a {name} map has no elements or more than 2^31 per sample"
    return None if len(student) <= MAX_TAPS else f"{len(student)} taps; at most {MAX_TAPS}"


def forward(
    student: Sequence[Tensor], teacher: Sequence[Tensor], p: int, mode: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Losses and coefficients of `reference.attention_transfer_forward`, in one launch.

    Args:
        student: maps `[B, C, *spatial]`, contiguous or channels_last (other layouts are copied), of one dtype.
        teacher: as many maps with the same batch and spatial sizes, of one dtype.
        p: 1, 2 or 3.
        mode: `"code"`, `"paper"` or `"zoo"`.
        eps: lower bound of the norm (`zoo`: added to it).

    Returns:
        float32 losses `[L]` and float32 dL/dQ, flat `[sum(B * N)]`.
    """
    batch = student[0].shape[0]
    positions = _positions(student)
    total = batch * sum(positions)
    losses = student[0].new_empty(len(student), dtype=torch.float32)
    coefficients = student[0].new_empty(total, dtype=torch.float32)
    if not total:
        return losses.zero_(), coefficients
    students, student_last = _one_layout(student)
    teachers, teacher_last = _one_layout(teacher)
    aligned = [*positions, *(_channels(student) if student_last else ()), *(_channels(teacher) if teacher_last else ())]
    with device_guard(losses):
        attention_transfer_forward_kernel[(len(student) * batch,)](
            losses,
            coefficients,
            torch.empty_like(coefficients),
            losses.new_empty(len(student) * batch),
            tickets.take(losses.device),
            students,
            teachers,
            _channels(student),
            _channels(teacher),
            positions,
            batch,
            eps,
            p,
            mode,
            student_last,
            teacher_last,
            alignment(aligned),
            **FORWARD_OPTIONS,
        )
    return losses, coefficients


def backward(grad: Tensor, student: Sequence[Tensor], coefficients: Tensor, p: int) -> list[Tensor]:
    """dL/dF of every tap, in one launch; in the dtype and memory format of the student's maps.

    Args:
        grad: dL/d(loss of a tap), `[L]`.
        student: the maps `forward` had.
        coefficients: as `forward` returned them.
        p: as for `forward`.
    """
    gradients = [torch.empty_like(s) for s in student]
    if not coefficients.numel():
        return gradients
    maps, last = _one_layout(student)
    targets = [g if _fits(g, last) else torch.empty_like(s) for g, s in zip(gradients, maps, strict=True)]
    positions, batch = _positions(student), student[0].shape[0]
    with device_guard(grad):
        attention_transfer_backward_kernel[(len(student) * batch * SPLITS,)](
            tuple(targets),
            maps,
            coefficients.contiguous(),
            grad.contiguous(),
            _channels(student),
            positions,
            batch,
            p,
            last,
            alignment([*positions, *(_channels(student) if last else ())]),
            SPLITS,
            **BACKWARD_OPTIONS,
        )
    for gradient, target in zip(gradients, targets, strict=True):
        if gradient is not target:
            gradient.copy_(target)
    return gradients


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped, for the ahead-of-time gate

# (taps, p, mode, student channels_last, teacher channels_last, alignment)
_SHIPPED = (
    (3, 2, "code", False, False, 16),
    (1, 1, "paper", True, True, 4),
    (12, 3, "zoo", False, True, 1),
)


def configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """The compiled forms of both kernels for maps of `dtype`."""
    for taps, p, mode, student_last, teacher_last, align in _SHIPPED:
        maps, sizes = ("*" + TRITON_TYPES[dtype],) * taps, ("i32",) * taps
        types: dict[str, Any] = dict.fromkeys(attention_transfer_forward_kernel.arg_names, "*fp32")
        types |= dict.fromkeys(("students", "teachers", "gradients"), maps) | {"grad": "*fp32", "ticket": "*i32"}
        types |= dict.fromkeys(("student_channels", "teacher_channels", "channels", "positions"), sizes)
        types |= {"B": "i32", "eps": "fp32"}
        shared = {"POWER": p, "ALIGN": align}
        if align == 1:  # as the launch would for a first map of one position and one channel
            types |= dict.fromkeys(("student_channels", "channels", "positions"), ("constexpr", *sizes[1:]))
        forms: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
            (
                attention_transfer_forward_kernel,
                shared | {"MODE": mode, "STUDENT_LAST": student_last, "TEACHER_LAST": teacher_last},
                FORWARD_OPTIONS,
            ),
            (attention_transfer_backward_kernel, shared | {"LAST": student_last, "SPLITS": SPLITS}, BACKWARD_OPTIONS),
        ]
        for kernel, constants, options in forms:
            label = f"taps={taps} p={p} {mode} channels_last={student_last},{teacher_last} align={align} {dtype}"
            ones = {
                (index, 0): 1
                for index, name in enumerate(kernel.arg_names)
                if name not in constants and types[name][0] == "constexpr"
            }
            signature = kernel_signature(kernel, types, constants)
            yield Configuration(label, kernel, signature, constants | ones, options)
