"""Inverse square roots of symmetric positive matrices, all views at once, by matrix products alone.

The iteration is in `newton_schulz`. Each product needs all tiles of the one before. In a sequence of launches, two a
step, that is a matter of course; in one launch, the programs of a view wait for each other. Both make the same roots,
bit for bit. A GPU is faster with the sequence, but for small matrices the host takes longer to launch it than the GPU
to compute it: so fewer than `FEW` numbers are one launch, unless it is recorded in a CUDA graph, or on a GPU without
`ample_shared_memory`.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.halves import ample_shared_memory, depth, empty_split, in_parts, parts_of
from msbreg.kernels.newton_schulz import affine_product, first_factors, loss_sum, normalisation, store_matrix
from msbreg.kernels.tiles import (
    FEW,
    cdiv,
    early,
    let_next_launch_begin,
    next_power_of_2,
    scalar,
    stages,
    wait_for_last_launch,
)

__all__ = ["first_factors_kernel", "inverse_root", "last_step_kernel", "root_kernel", "step_kernel"]


@triton.jit
def first_factors_kernel(
    gram_pointer,
    squares_pointer,
    a_pointer,
    t_pointer,
    root_scale_pointer,
    side,
    width,
    count,
    a: tl.float64,
    b: tl.float64,
    shift: tl.float64,
    floor: tl.float64,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A = s (G + h I), where the iteration begins, and T of the first step.

    gram_pointer: [views, side, side], G, contiguous.
    squares_pointer: [views, count], float64, which add up to |G|² of each view.
    a_pointer, t_pointer: [views, parts, width, width], split.
    root_scale_pointer: [views], float64, the square root of s, for the last step.
    a, b: of T = a I + b A.
    shift, floor: see `normalisation`.

    One program makes a tile of both.
    """
    wait_for_last_launch(EARLY)
    k = tl.program_id(2).to(tl.int64)
    matrix = k * parts_of(a_pointer) * width * width
    s, h = normalisation(squares_pointer + k * count, count, shift, floor)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(root_scale_pointer + k, tl.sqrt(s))
    p, r = block(tl.program_id(0), BLOCK), block(tl.program_id(1), BLOCK)
    first_factors(gram_pointer + k * side * side, a_pointer + matrix, t_pointer + matrix, side, width, a, b, s, h, p, r)


@triton.jit
def step_kernel(
    left_pointer,
    right_pointer,
    second_left_pointer,
    second_right_pointer,
    output_pointer,
    views,
    side,
    width,
    identity: tl.float64,
    scale: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    IN_PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One or two batches of products, i I + s L R.

    left_pointer, right_pointer: [views, parts, width, width], split, L and R of the first batch.
    second_left_pointer, second_right_pointer: those of the second batch.
    output_pointer: [1 or 2, views, parts, width, width], split.
    identity, scale: i and s.

    One program makes a tile of one product; those from `views` on in the third grid axis are the second batch.
    """
    wait_for_last_launch(EARLY)
    number = tl.program_id(2)
    second = number >= views
    k = tl.where(second, number - views, number).to(tl.int64)
    matrix = scalar(parts_of(left_pointer), tl.int64) * width * width
    p, r = block(tl.program_id(0), BLOCK_P), block(tl.program_id(1), BLOCK_P)
    left = tl.where(second, second_left_pointer, left_pointer) + k * matrix
    right = tl.where(second, second_right_pointer, right_pointer) + k * matrix
    i, s = scalar(identity, tl.float64), scalar(scale, tl.float64)
    x = affine_product(left, right, side, width, i, s, p, r, BLOCK_Q, IN_PARTS, WHOLE)
    let_next_launch_begin(EARLY)
    store_matrix(output_pointer + number * matrix, x, p, r, width)


@triton.jit
def last_step_kernel(
    left_pointer,
    right_pointer,
    root_scale_pointer,
    gram_pointer,
    output_pointer,
    sums_pointer,
    side,
    width,
    output_width,
    shift: tl.float64,
    trace_weight: tl.float64,
    root_weight: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    IN_PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Z = sqrt(s) L R = (G + h I)^(-1/2), and w_t trace(G) + w_r <G + shift I, Z> over each tile.

    left_pointer, right_pointer: [views, parts, width, width], split, L and R.
    root_scale_pointer: [views], float64, of `first_factors_kernel`, the square root of A's scale s.
    gram_pointer: [views, side, side], G, contiguous, read for the sums alone.
    output_pointer: [views, parts, output_width, output_width], split, or as it is.
    sums_pointer: [views, tiles], float64; None where they are not wanted.
    shift: see `normalisation`.
    trace_weight, root_weight: w_t and w_r.

    One program makes a tile.
    """
    wait_for_last_launch(EARLY)
    k = tl.program_id(2).to(tl.int64)
    matrix = k * parts_of(left_pointer) * width * width
    p, r = block(tl.program_id(0), BLOCK_P), block(tl.program_id(1), BLOCK_P)
    i, s = scalar(0.0, tl.float64), tl.load(root_scale_pointer + k)
    z = affine_product(left_pointer + matrix, right_pointer + matrix, side, width, i, s, p, r, BLOCK_Q, IN_PARTS, WHOLE)
    let_next_launch_begin(EARLY)
    size = scalar(parts_of(output_pointer), tl.int64) * output_width * output_width
    store_matrix(output_pointer + k * size, z, p, r, output_width)
    if sums_pointer is not None:
        total = loss_sum(gram_pointer + k * side * side, z, p, r, side, shift, trace_weight, root_weight)
        tile = (k * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums_pointer + tile, total)


@triton.jit
def root_kernel(
    gram_pointer,
    squares_pointer,
    coefficients_pointer,
    work_pointer,
    output_pointer,
    sums_pointer,
    counter_pointer,
    views,
    members,
    side,
    width,
    output_width,
    count,
    steps,
    shift: tl.float64,
    floor: tl.float64,
    trace_weight: tl.float64,
    root_weight: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    IN_PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """All steps at once.

    gram_pointer, output_pointer: as for `last_step_kernel`. squares_pointer: as for `first_factors_kernel`.
    sums_pointer: [views, members], else as for `last_step_kernel`.
    coefficients_pointer: [steps, 2], float64, a and b of each step; two steps or more.
    work_pointer: [5, views, parts, width, width], split: two pairs of Y and Z, which odd and even steps write in turn,
        then T, in whose place A is before the first product.
    counter_pointer: [views, 32] int32, zero; see `wait_for_all`.

    All programs run at the same time. So many members make the tiles of a view, in turns, and those of the next one
    that falls to them.
    """
    member = (tl.program_id(0) % members).to(tl.int64)
    across = scalar(tl.cdiv(width, BLOCK_P), tl.int64)
    tiles = across * across
    phases = scalar(2, tl.int64) * steps
    matrix = scalar(parts_of(work_pointer), tl.int64) * width * width
    iterate = views * matrix  # numbers of one iterate of all views
    for view in range(tl.program_id(0) // members, views, tl.num_programs(0) // members):
        k = scalar(view, tl.int64)
        gram, counter = gram_pointer + k * side * side, counter_pointer + 32 * k
        work = work_pointer + k * matrix
        t = work + 4 * iterate
        s, h = normalisation(squares_pointer + k * count, count, shift, floor)
        a, b = tl.load(coefficients_pointer), tl.load(coefficients_pointer + 1)
        for tile in range(member, tiles, members):  # A is where T will be, and the first T is Z
            p, r = block(tile // across, BLOCK_P), block(tile % across, BLOCK_P)
            first_factors(gram, t, work + iterate, side, width, a, b, s, h, p, r)

        # phase                     makes
        # 1, the first step's       Y = T A
        # 2, 4, 6, ...: mixing      T = a I + b Y Z of the next step
        # 3, 5, 7, ...              Y = T Y and, second, Z = Z T
        # the last one              Z = sqrt(s) Z T alone, into the output
        total = tl.zeros([], tl.float64)
        for phase in range(1, phases):
            wait_for_all(counter, phase * members)
            step = phase // 2
            first, mixing, last = phase == 1, phase % 2 == 0, phase == phases - 1
            y, new = work + (step + 1) % 2 * 2 * iterate, work + step % 2 * 2 * iterate  # Z comes behind Y
            identity, scale = scalar(0.0, tl.float64), scalar(1.0, tl.float64)
            if mixing:
                place = coefficients_pointer + 2 * step
                identity, scale = tl.load(place), tl.load(place + 1)
            if last:
                scale = tl.sqrt(s)
            for tile in range(member, tl.where(first | mixing | last, tiles, 2 * tiles), members):
                second = last | (tile >= tiles)
                left = tl.where(first, new + iterate, tl.where(second, y + iterate, tl.where(mixing, y, t)))
                right = tl.where(first | second, t, tl.where(mixing, y + iterate, y))
                p, r = block(tile % tiles // across, BLOCK_P), block(tile % across, BLOCK_P)
                x = affine_product(left, right, side, width, identity, scale, p, r, BLOCK_Q, IN_PARTS, WHOLE)
                if last:
                    size = scalar(parts_of(output_pointer), tl.int64) * output_width * output_width
                    store_matrix(output_pointer + k * size, x, p, r, output_width)
                    if sums_pointer is not None:
                        total += loss_sum(gram, x, p, r, side, shift, trace_weight, root_weight)
                else:
                    store_matrix(tl.where(mixing, t, tl.where(second, new + iterate, new)), x, p, r, width)
        if sums_pointer is not None:
            tl.store(sums_pointer + k * members + member, total)


@triton.jit
def wait_for_all(counter, goal):
    """Returns once all members of a view have come here, and sees what they had stored by then.

    counter: one int32, zero before the launch. goal: how many members there are, times how often they came until now.
    """
    tl.debug_barrier()  # all of this program's threads have stored
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < goal:
        arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def block(number, BLOCK: tl.constexpr):
    """The rows or columns of a block, int32."""
    return (scalar(number, tl.int64) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)


def inverse_root(
    gram: Tensor,
    squares: Tensor,
    shift: float,
    floor: float,
    steps: Sequence[tuple[float, float]],
    *,
    weights: tuple[float, float] | None = None,
    at_once: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Z = (G + h I)^(-1/2), and on request what adds up to w_t trace(G) + w_r <G + shift I, Z>.

    Args:
        gram: G, (K, p, p), contiguous, float32 or float64.
        squares: (K, n), float64, which add up to |G|² of each view.
        shift: h, at least 0.
        floor: where floor |G| (Frobenius) of a view is larger than shift, h is that.
        steps: (a, b) of T in each step, two or more, for eigenvalues from h / (|G| + h) to 1.
        weights: w_t and w_r; None for no sums.
        at_once: whether it is one launch; None: by the rule in the module's docstring.

    Returns:
        Z, (K, p, p), and None; or with weights Z split, (K, parts, w, w), and float64 numbers of any shape, which
        add up over a view.
    """
    views, side, _ = gram.shape
    output = torch.empty_like(gram) if weights is None else empty_split(gram, (views,), side, side, square=True)
    with torch.cuda.device_of(gram):
        if at_once is None:
            gpu_would_wait = gram.is_cuda and gram.numel() < FEW and not torch.cuda.is_current_stream_capturing()
            at_once = gpu_would_wait and ample_shared_memory(gram.device)  # others have not been measured
        run = one_launch if at_once else sequence
        return output, run(gram, squares, output, shift, floor, tuple(steps), weights)


def sequence(
    gram: Tensor,
    squares: Tensor,
    output: Tensor,
    shift: float,
    floor: float,
    steps: tuple[tuple[float, float], ...],
    weights: tuple[float, float] | None,
) -> Tensor | None:
    """Writes Z into `output` in 2 len(steps) launches; returns the sums, where they are wanted."""
    views, side, _ = gram.shape
    t = empty_split(gram, (views,), side, side, square=True)
    iterates = [empty_split(gram, (2, views), side, side, square=True) for _ in range(2)]
    width, count = t.shape[-1], squares.shape[1]
    root_scale = torch.empty(views, device=gram.device, dtype=torch.float64)
    begins, config = early(gram.device, gram.numel()), launch_config(gram)
    tiles = cdiv(width, config["BLOCK_P"])
    products = {"WHOLE": all_inside(width, config), **config, **begins}
    sums = None if weights is None else torch.empty(views, tiles**2, device=gram.device, dtype=torch.float64)

    def multiply(made: Tensor, *pairs: tuple[Tensor, Tensor], i: float = 0.0, s: float = 1.0) -> None:
        """i I + s L R for one or two (L, R)."""
        step_kernel[tiles, tiles, len(pairs) * views](*pairs[0], *pairs[-1], made, views, side, width, i, s, **products)

    y, z = iterates[0].unbind()
    a, first_t = t, z  # A is where T will be, and the first T is Z
    first_factors_kernel[cdiv(width, 32), cdiv(width, 32), views](
        gram, squares, a, first_t, root_scale, side, width, count, *steps[0], shift, floor, BLOCK=32, num_warps=4,
        enable_fp_fusion=True, **begins,
    )  # fmt: skip
    multiply(y, (first_t, a))
    for number, (identity, scale) in enumerate(steps[1:-1], start=1):
        multiply(t, (y, z), i=identity, s=scale)
        multiply(iterates[number % 2], (t, y), (z, t))
        y, z = iterates[number % 2].unbind()
    multiply(t, (y, z), i=steps[-1][0], s=steps[-1][1])
    last_step_kernel[tiles, tiles, views](  # Y is not needed any more
        z, t, root_scale, gram, output, sums, side, width, output.shape[-1], shift, *(weights or (0.0, 0.0)), **products
    )
    return sums


def one_launch(
    gram: Tensor,
    squares: Tensor,
    output: Tensor,
    shift: float,
    floor: float,
    steps: tuple[tuple[float, float], ...],
    weights: tuple[float, float] | None,
) -> Tensor | None:
    """As `sequence`, in one launch, and before it a small copy and the fill of a counter."""
    views, side, _ = gram.shape
    work = empty_split(gram, (5, views), side, side, square=True)
    width = work.shape[-1]
    config = launch_config(gram)
    programs = processors(gram.device)
    members = min(2 * cdiv(width, config["BLOCK_P"]) ** 2, max(1, programs // views))  # T Y and Z T at a time
    sums = None if weights is None else torch.empty(views, members, device=gram.device, dtype=torch.float64)
    if gram.is_cuda:
        config["launch_cooperative_grid"] = True  # all programs at the same time, or an error
    root_kernel[(members * min(views, programs // members),)](
        gram, squares, coefficients(steps).to(gram.device, non_blocking=True), work, output, sums,
        torch.zeros(views, 32, device=gram.device, dtype=torch.int32), views, members, side, width, output.shape[-1],
        squares.shape[1], len(steps), shift, floor, *(weights or (0.0, 0.0)),
        WHOLE=all_inside(width, config), **config,
    )  # fmt: skip
    return sums


def all_inside(width: int, config: dict[str, int | bool]) -> bool:
    """Whether no tile reaches beyond matrices of that width, so that none needs a mask."""
    return width % config["BLOCK_P"] == width % config["BLOCK_Q"] == 0


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs surely run at the same time; one in Triton's interpreter, which runs them one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache(maxsize=64)
def coefficients(steps: tuple[tuple[float, float], ...]) -> Tensor:
    """Those of all steps, on the CPU, pinned where there is a GPU, whose copy the host then does not wait for.

    The copy is not kept: it may be in the memory of a CUDA graph that is about to be recorded.
    """
    return torch.tensor(steps, dtype=torch.float64, device="cpu", pin_memory=torch.cuda.is_available())


def launch_config(gram: Tensor) -> dict[str, int | bool]:
    """The block sizes, warps and stages: small tiles while there are few, so that each processor has one."""
    if gram.dtype == torch.float64 or gram.shape[1] <= 64:
        block_size, block_depth = 32, min(32, depth(32, 32, gram))
    elif gram.numel() < FEW:
        block_size, block_depth = 64, 32
    else:
        block_size, block_depth = 128, depth(128, 128, gram)
    block_size = min(block_size, max(16, next_power_of_2(gram.shape[1])))
    return {
        "BLOCK_P": block_size,
        "BLOCK_Q": block_depth,
        "IN_PARTS": in_parts(gram.shape[1]),
        "num_warps": 8 if block_size == 128 else 4,
        "num_stages": stages(gram.device),
        "enable_fp_fusion": True,
    }
