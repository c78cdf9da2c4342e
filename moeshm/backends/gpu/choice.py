"""Which kernels compute a call, and how each is launched: everything that is tuned is here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ...dtypes import DType
from ...errors import SettingError
from ...layers import Activation, LayerInfo
from .device import Features, Macros


class Few(NamedTuple):
    """Up to where kernels for few tokens are taken."""

    n_tokens: int
    n_pairs: int


#: By kernels. Each of their blocks groups the pairs of tokens and experts itself, at most 1024 of
#: them (kernels/group.cuh); where the bounds are lower, those of prefill are faster, or decode_down
#: would need more shared memory than some cards have.
FEW: Mapping[str, Few] = {"mma": Few(128, 1024), "fma": Few(32, 512)}
#: Tokens beyond which every call is of many.
MOST_FEW_TOKENS = max(few.n_tokens for few in FEW.values())
#: Most slots of a layer for the kernels of few tokens.
MAX_DECODE_SLOTS = 1024
#: Most pairs of a call for the kernel that stays on its device.
RESIDENT_PAIRS = 128
#: Most pairs for `route`.
MAX_PAIRS = 65536

#: Macros beyond the shape's, as something that modules can be told apart by.
Definitions = tuple[tuple[str, int | str], ...]

_WEIGHTS = {DType.F32: "float", DType.F16: "f16", DType.BF16: "bf16"}


class Shape(NamedTuple):
    """What modules are compiled for: layers of one shape share them."""

    #: The model's.
    hidden_size: int
    #: intermediate_size, padded with zeros to a multiple of 64.
    inner: int
    weight_dtype: DType
    activation: Activation
    has_bias: bool

    @classmethod
    def of(cls, info: LayerInfo, has_bias: bool) -> Shape:
        """The layer's; `has_bias`: any of its experts has one."""
        inner = -(-info.intermediate_size // 64) * 64
        return cls(info.hidden_size, inner, info.weight_dtype, info.activation, has_bias)

    @property
    def hidden(self) -> int:
        """Values of a row of activations: hidden_size, padded with zeros to a multiple of 8."""
        return -(-self.hidden_size // 8) * 8

    @property
    def hidden_padded(self) -> int:
        """Values of a row of gate_proj and up_proj: a multiple of 64."""
        return -(-self.hidden_size // 64) * 64

    @property
    def block_bytes(self) -> int:
        """Of an expert's block, as kernels/ffn.cuh lays it out."""
        matrices = 3 * self.inner * self.hidden_padded * self.weight_dtype.itemsize
        return matrices + self.has_bias * 4 * (2 * self.inner + self.hidden_padded)

    def macros(self) -> dict[str, object]:
        """What kernels/ffn.cuh asks the compiler for."""
        return {
            "WEIGHT": _WEIGHTS[self.weight_dtype],
            "HIDDEN": self.hidden,
            "INNER": self.inner,
            "ACTIVATION": int(self.activation),
            "HAS_BIAS": int(self.has_bias),
        }


class Size(NamedTuple):
    """Of a call, as far as kernels are chosen by it."""

    n_tokens: int
    top_k: int
    #: The layer's: the call's ids are below it.
    n_slots: int

    @property
    def n_pairs(self) -> int:
        """Of tokens and experts, empty slots included."""
        return self.n_tokens * self.top_k

    @property
    def most_experts(self) -> int:
        """That the call can use."""
        return min(self.n_pairs, self.n_slots)

    def most_tiles(self, tile_rows: int) -> int:
        """That `route` can make of the call."""
        return self.most_experts + self.n_pairs // tile_rows


class Step(NamedTuple):
    """One launch."""

    file: str
    kernel: str
    #: Beyond the shape's.
    macros: Definitions
    grid: int
    block: int
    #: Dynamic ones of each block.
    shared_bytes: int

    def all_macros(self, shape: Shape | None) -> Macros:
        """For the compiler; None is for kernels that are of no layer."""
        return {**({} if shape is None else shape.macros()), **dict(self.macros)}


class Plan(NamedTuple):
    """How a call is computed: these launches, one after the other."""

    #: Formats of the activations as the kernels take them, and of what they keep in between.
    x_dtype: DType
    kept_dtype: DType
    #: Pairs of a tile of `route`; 0 where nothing is routed.
    tile_rows: int
    steps: tuple[Step, ...]


# --- the table ----------------------------------------------------------------------------

#: Kernels for few tokens and for many, the fastest first: the first that can is taken.
PREFERENCE: Mapping[str, tuple[str, ...]] = {
    "decode": ("mma", "fma"),
    "prefill": ("wgmma", "mma", "fma"),
}
#: Of `Features`, what kernels other than fma need. They take activations in the weights' format.
_NEEDS = {"mma": "has_mma", "wgmma": "has_wgmma"}


def plan(
    shape: Shape, size: Size, x_dtype: DType, features: Features, wanted: Mapping[str, str]
) -> Plan:
    """How a call is computed whose activations are in `x_dtype`.

    `wanted`: kernels by "decode" and "prefill" that go before the others, wherever they can.
    """
    able = {
        kind: next(
            each
            for each in ((wanted[kind], "fma") if kind in wanted else PREFERENCE[kind])
            if _can(each, shape, x_dtype, features)
        )
        for kind in PREFERENCE
    }
    kind = "decode" if _is_few(size, able["decode"]) else "prefill"
    kernels = able[kind]
    steps = _KERNELS[kind, kernels](shape, size, features)
    tile_rows = next((int(step.macros[0][1]) for step in steps if step.kernel == "route"), 0)
    if kernels == "fma":
        return Plan(x_dtype, DType.F32, tile_rows, steps)
    return Plan(shape.weight_dtype, shape.weight_dtype, tile_rows, steps)


def _is_few(size: Size, kernels: str) -> bool:
    few = FEW[kernels]
    return (
        size.n_tokens <= few.n_tokens
        and size.n_pairs <= few.n_pairs
        and size.n_slots <= MAX_DECODE_SLOTS
    )


def _can(kernels: str, shape: Shape, x_dtype: DType, features: Features) -> bool:
    if kernels == "fma":
        return True
    # Other activations are rounded to bfloat16, which has their range; float16 has not.
    takes_x = shape.weight_dtype is DType.BF16 or x_dtype is shape.weight_dtype is DType.F16
    return _has(features, kernels) and takes_x


def _has(features: Features, kernels: str) -> bool:
    return kernels == "fma" or bool(getattr(features, _NEEDS[kernels]))


def check_wanted(wanted: Mapping[str, str], features: Features) -> None:
    """SettingError where MOESHM_KERNELS names kernels that this device has not."""
    for kind, kernels in wanted.items():
        if not _has(features, kernels):
            able = [each for each in PREFERENCE[kind] if _has(features, each)]
            raise SettingError(
                f"MOESHM_KERNELS={kind}={kernels}, which {features.name} ({features.arch}) cannot "
                f"run; choose {', '.join(able)}"
            )


def _decode_mma(shape: Shape, size: Size, features: Features) -> tuple[Step, ...]:
    macros, shared = _few_by_mma(shape, size.n_pairs, features)
    tasks = size.most_experts * shape.inner // 8
    block, blocks = 32 * _TEAM_WARPS, _BLOCK_WARPS // _TEAM_WARPS
    rows = _ceil(shape.hidden, _DOWN_ROWS)
    return (
        _step("decode_mma.cu", "decode_gate_up", macros, tasks, blocks, block, features),
        _step("decode_mma.cu", "decode_down", macros, rows, 1, 32 * _BLOCK_WARPS, features, shared),
    )


#: Of a multiprocessor; of those that share a row of gate_proj; and rows of down_proj that a block
#: owns. On an H200, one token of Qwen3-30B-A3B took 21.0 us with teams of 8 and two warps a row of
#: down_proj, 22.5 with one, 23.7 with teams of 4 and one; other sizes differed by 2 % at most.
_BLOCK_WARPS, _TEAM_WARPS, _DOWN_ROWS = 16, 8, 16


def _few_by_mma(shape: Shape, n_pairs: int, features: Features) -> tuple[Definitions, int]:
    """What decode_mma.cuh is compiled with for calls of so many pairs, and the shared memory of a
    block for what its warps find of down_proj."""
    # So many warps share a row that each has several loads of it on their way, that all have some
    # if there are only 8 experts, and that memory allows.
    split = 2
    while split < min(_BLOCK_WARPS, shape.inner // 512):
        split *= 2
    room = features.shared_bytes - _GROUPS_BYTES
    while split > 1 and split * n_pairs * _DOWN_ROWS * 4 > room:
        split //= 2
    macros = (
        ("GATE_UP_WARPS", _TEAM_WARPS),
        ("DOWN_WARPS", _BLOCK_WARPS),
        ("DOWN_ROWS", _DOWN_ROWS),
        ("DOWN_SPLIT", split),
    )
    return macros, split * n_pairs * _DOWN_ROWS * 4


def _decode_fma(shape: Shape, size: Size, features: Features) -> tuple[Step, ...]:
    tasks = _ceil(size.most_experts * shape.inner // 2, 256 // features.warp)
    shared = size.n_pairs * 32
    return (
        _step("decode_fma.cu", "decode_gate_up", (), tasks, 2, 256, features),
        _step("decode_fma.cu", "decode_down", (), shape.hidden // 8, 2, 256, features, shared),
    )


def _prefill_wgmma(shape: Shape, size: Size, features: Features) -> tuple[Step, ...]:
    # Of a tile: pairs, and rows of weights. On an H100, tiles of 128, 160 and 192 pairs with as
    # many stages as fit were up to 20 % slower.
    rows, columns, stages = 144, 256, 4
    macros = (("TILE_ROWS", rows), ("STAGES", stages))
    shared = stages * (rows + columns) * 128 + _WGMMA_BYTES
    how = (columns, 1, 384, shared, features)
    return (
        _route(size, rows, features),
        *_products("prefill_wgmma.cu", macros, shape, size, *how),
        _combine(shape, size, "WEIGHT", features),
    )


def _prefill_mma(shape: Shape, size: Size, features: Features) -> tuple[Step, ...]:
    rows = _tile_rows(size, (32, 64, 128))
    macros = (("TILE_ROWS", rows),)
    shared = 3 * (rows + 128) * 128 + 1024
    return (
        _route(size, rows, features),
        *_products("prefill_mma.cu", macros, shape, size, 128, 2, 256, shared, features),
        _combine(shape, size, "WEIGHT", features),
    )


def _prefill_fma(shape: Shape, size: Size, features: Features) -> tuple[Step, ...]:
    rows = _tile_rows(size, (16, 32, 64))
    macros = (("TILE_ROWS", rows),)
    return (
        _route(size, rows, features),
        *_products("prefill_fma.cu", macros, shape, size, 128, 2, 256, 0, features),
        _combine(shape, size, "float", features),
    )


def _products(
    file: str,
    macros: Definitions,
    shape: Shape,
    size: Size,
    columns: int,
    blocks_per_multiprocessor: int,
    block: int,
    shared_bytes: int,
    features: Features,
) -> tuple[Step, Step]:
    """Both grouped products, in tiles of `columns` rows of weights; gate and up share a tile."""
    tiles = size.most_tiles(int(dict(macros)["TILE_ROWS"]))
    gate_up = tiles * _ceil(shape.inner, columns // 2)
    down = tiles * _ceil(shape.hidden, columns)
    how = (blocks_per_multiprocessor, block, features, shared_bytes)
    return (
        _step(file, "prefill_gate_up", macros, gate_up, *how),
        _step(file, "prefill_down", macros, down, *how),
    )


def _route(size: Size, tile_rows: int, features: Features) -> Step:
    # Every block counts all pairs: more of them shorten only what comes after.
    blocks = min(_ceil(size.n_pairs, 1024), 32)
    return _step("route.cu", "route", (("TILE_ROWS", tile_rows),), blocks, 1, 512, features)


def _combine(shape: Shape, size: Size, partial: str, features: Features) -> Step:
    blocks = _ceil(size.n_tokens * shape.hidden // 4, 256)
    return _step("combine.cu", "combine", (("PARTIAL", partial),), blocks, 8, 256, features)


def sizes(most_tokens: int, top_k: int, num_experts: int) -> Iterator[Size]:
    """Sizes of calls to such a layer, whatever it holds, for which every plan's modules are found.

    Modules depend on how many pairs, experts in use and pairs of each there are, by powers of two.
    """
    few = {n + more for n, _ in FEW.values() for more in (0, 1)}
    many = itertools.takewhile(lambda n: n < most_tokens, (1 << i for i in itertools.count()))
    n_slots = itertools.takewhile(lambda n: n < num_experts, (1 << i for i in itertools.count()))
    for n_tokens, k, slots in itertools.product(
        sorted({*few, *many, most_tokens}), range(1, top_k + 1), (*n_slots, num_experts)
    ):
        if n_tokens <= most_tokens:
            yield Size(n_tokens, k, slots)


def convert(shape: Shape, n_tokens: int, features: Features) -> Step:
    """The launch that gives activations another format."""
    blocks = _ceil(n_tokens * shape.hidden // 4, 256)
    return _step("convert.cu", "convert", (), blocks, 8, 256, features)


def admit(n_pairs: int, n_values: int, features: Features) -> Step:
    """The launch that takes ids and weights from a slab, and so many values of activations; it is
    of no layer."""
    # Of each block only ids and weights, or only activations, as far as grids go.
    blocks = _ceil(n_pairs, 256) + _ceil(n_values // 4, 256)
    return _step("admit.cu", "admit", (), blocks, 8, 256, features)


def resident(shape: Shape, features: Features) -> Step:
    """The launch of the kernel that stays, for calls of up to RESIDENT_PAIRS pairs."""
    macros, shared = _few_by_mma(shape, RESIDENT_PAIRS, features)
    # `GateUpSums` of each team.
    sums = _BLOCK_WARPS * 4 * 4 * 32 * 4
    grid, block = features.multiprocessors, 32 * _BLOCK_WARPS
    return Step("resident.cu", "resident", macros, grid, block, max(sums, shared))


def is_resident(plan: Plan, size: Size) -> bool:
    """Whether the kernel that stays can take such calls."""
    return plan.steps[0].file == "decode_mma.cu" and 0 < size.n_pairs <= RESIDENT_PAIRS


_KERNELS: Mapping[tuple[str, str], Callable[[Shape, Size, Features], tuple[Step, ...]]] = {
    ("decode", "mma"): _decode_mma,
    ("decode", "fma"): _decode_fma,
    ("prefill", "wgmma"): _prefill_wgmma,
    ("prefill", "mma"): _prefill_mma,
    ("prefill", "fma"): _prefill_fma,
}
#: Static shared memory of `Groups` in kernels/group.cuh, and some more.
_GROUPS_BYTES = 24 << 10
#: `Shared` in kernels/prefill_wgmma.cu, and 1024 to align.
_WGMMA_BYTES = 11 << 10


def _tile_rows(size: Size, choices: tuple[int, ...]) -> int:
    """The smallest tile that takes all pairs of an expert, were they spread evenly."""
    pairs_of_expert = size.n_pairs / size.most_experts
    return next((rows for rows in choices if rows >= pairs_of_expert), choices[-1])


def _step(
    file: str,
    kernel: str,
    macros: Definitions,
    tasks: int,
    blocks_per_multiprocessor: int,
    block: int,
    features: Features,
    shared_bytes: int = 0,
) -> Step:
    """As many blocks as there are tasks, or fit on the device at once: they take turns."""
    grid = max(1, min(tasks, blocks_per_multiprocessor * features.multiprocessors))
    return Step(file, kernel, macros, grid, block, shared_bytes)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
