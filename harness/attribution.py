"""Where each GPU kernel of a step belongs, told from its place in the step's sequence of kernels.

A decoder layer multiplies by four matrices (qkv, o, gate_up, down) and the head by one, so the matrix products, which
can be told by their names, cut any step into layers: 4 × layers + 1 of them, or the step is refused. What lies between
two of them is known from the model's order of operations:

    ... down | input_norm | QKV | qk_norm, rope, kv_write, attention | O | post_norm | GATE_UP | silu_mul | DOWN ...

Between qkv and o names decide where they say something; what they leave open belongs to all operations that fit there,
joined with "+". An operation without a kernel of its own is done by the matrix product beside it: a norm by the one
after, the activation by the one before. So a decode step of the fused engine may mix, product by product, its own
kernels with those of cuBLAS and separate norms. Every layer must come out with the same operations; but the first one's
norm has no product before it that could have done a part of it, and the last one may go on with the rows alone that are
drawn from: it picks them by kernels that count to what comes next, and takes other kernels for so few rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, pairwise

from engines.base import NO_LAYER, OPS, Site

PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
BETWEEN_QKV_AND_O = ("qk_norm", "rope", "kv_write", "attention")

_COPY = re.compile(r"Mem(cpy|set)\b")
_READ_BACK = re.compile(r"Memcpy DtoH")
_ATTENTION = re.compile(r"flash::|flash_(fwd|attn)|fmha|attention|attn")
_PRODUCT = re.compile(
    r"nvjet|gemm|gemv|cublas|xmma|matmul|triton_tem|norm_linear|decode_(linear|head)|prefill_(gate_up|qkv_rope)"
)
_PRODUCT_TAIL = re.compile(r"splitK_?reduce", re.IGNORECASE)
_MAY_NORM = re.compile(r"norm_linear|decode_(linear|head)")
"""Matrix products that can do the norm before them too."""
_ROTATES = re.compile(r"prefill_qkv_rope")
"""The matrix product that does all between it and attention too."""
_ADD = re.compile(r"CUDAFunctor_add|fused_add_\d+$")
_EMBED = re.compile(r"indexSelect|index_select|gather|embedding|embed_rows")
_DRAWS_AND_EMBEDS = re.compile(r"token_embed_kernel")
"""Draws tokens and embeds them for the step after."""
_PICK = re.compile(r"indexSelect|vectorized_gather")
_NORM = re.compile(r"norm|rsqrt")
_ROPE = re.compile(r"rotary|rope|_cat_|_sin_|_cos_")
_KV_WRITE = re.compile(r"cache|write_kv|kv_write")
_TORCH_OWN = "at::native"
_DELAY = "spin_kernel"
"""The kernel of `torch.cuda._sleep`: a known delay put into a layer to see whether it shows there."""


class NotDivisible(ValueError):
    """A step's kernels do not fall into the model's layers; the message says why."""


def is_copy(name: str) -> bool:
    """Whether it is a copy or a fill of memory, which CUPTI lists among the kernels."""
    return _COPY.match(name) is not None


def attribute(names: Sequence[str], num_layers: int, qk_norm: bool) -> list[Site | None]:
    """The site of each kernel of one step, in the order in which they ran; None where the place does not tell it.

    Block and layer are right or None; `op` joins what cannot be told apart. What prepares the step's inputs on the GPU
    is `prepare`, what brings tokens to the host `read_back`, both of block `step`. An embedding that also does layer
    0's first norm counts as embedding, a delay (`torch.cuda._sleep`) as part of what follows it. NotDivisible: the
    sequence is not that of `num_layers` layers and a head.
    """
    if any("nccl" in name.lower() for name in names):
        raise NotDivisible("Kernels of several GPUs that wait for each other have no place of their own yet.")
    work = [i for i, name in enumerate(names) if _DELAY not in name]
    if len(work) < len(names):
        placed = dict(zip(work, attribute([names[i] for i in work], num_layers, qk_norm), strict=True))
        return [placed[next((j for j in work if j >= i), work[-1])] for i in range(len(names))]
    products = _with_residual_adds(names, _products(names))
    wanted = len(PROJECTIONS) * num_layers + 1
    if len(products) != wanted:
        raise NotDivisible(
            f"{wanted} matrix products make a step ({len(PROJECTIONS)} in each of {num_layers} layers, one in the "
            f"head), and {len(products)} were found among {len(names)} kernels."
        )
    sites: list[Site | None] = [None] * len(names)
    first_norm = _attribute_start(names, sites, products[0].start)
    for layer in range(num_layers):
        own = products[len(PROJECTIONS) * layer :][: len(PROJECTIONS) + 1]
        start = first_norm if layer == 0 else products[len(PROJECTIONS) * layer - 1].stop
        normed = layer == 0 and _did_norm(sites[:first_norm])
        _attribute_layer(names, sites, layer, start, own, qk_norm, normed)
    _attribute_end(names, sites, products[-2].stop, products[-1])
    _check_alike(sites, num_layers)
    return sites


def _products(names: Sequence[str]) -> list[range]:
    """The kernels of each matrix product: the fill before it, itself, the sum of its parts after it."""
    found: list[range] = []
    for i, name in enumerate(names):
        if _PRODUCT_TAIL.search(name):
            if found and found[-1].stop == i:
                found[-1] = range(found[-1].start, i + 1)
        elif _PRODUCT.search(name) and not _ATTENTION.search(name):
            filled = i > 0 and names[i - 1].startswith("Memset")
            found.append(range(i - filled, i + 1))
    return found


def _with_residual_adds(names: Sequence[str], products: Sequence[range]) -> list[range]:
    """Products with the sum into the residual stream after them, where it is a kernel of its own and no norm's part."""
    found = list(products)
    for i, (one, other) in enumerate(pairwise(products)):
        between = names[one.stop : other.start]
        if _MAY_NORM.search(names[other.stop - 1]) and all(map(_ADD.search, between)):
            found[i] = range(one.start, other.start)
    return found


def _did_norm(before: Sequence[Site | None]) -> bool:
    """Whether the last kernel before layer 0 did its first norm, or may have."""
    return bool(before) and (before[-1] is None or "input_norm" in before[-1].op)


def _attribute_start(names: Sequence[str], sites: list[Site | None], end: int) -> int:
    """Everything before layer 0, whose first kernel's index is returned.

    Where no name speaks of an embedding, kernels may be its or the preparation's: only copies get a place.
    """
    embeds = [i for i in range(end) if _EMBED.search(names[i])]
    if not embeds:
        start = end - (end > 0 and _NORM.search(names[end - 1]) is not None)
        for i in range(start):
            sites[i] = Site(NO_LAYER, "step", "prepare") if is_copy(names[i]) else None
        return start
    embed = embeds[-1]
    _put(sites, range(embed), Site(NO_LAYER, "step", "prepare"))
    op = "embed+input_norm" if _NORM.search(names[embed]) else "embed"
    sites[embed] = Site(NO_LAYER, "embed", op)
    return embed + 1


def _attribute_layer(
    names: Sequence[str], sites: list[Site | None], layer: int, start: int, products: Sequence[range], qk_norm: bool,
    normed: bool,
) -> None:  # fmt: skip
    qkv, o, gate_up, down = products[:4]
    before_qkv, before_gate_up = range(start, qkv.start), range(o.stop, gate_up.start)
    before_down, middle = range(gate_up.stop, down.start), range(qkv.stop, o.start)

    qkv_ops = ["qkv_proj"] if before_qkv or normed else ["input_norm", "qkv_proj"]
    gate_up_ops = ["gate_up_proj"] if before_gate_up else ["post_norm", "gate_up_proj"]
    if not before_down:
        gate_up_ops.append("silu_mul")
    middle_ops = [op for op in BETWEEN_QKV_AND_O if qk_norm or op != "qk_norm"]
    if _ROTATES.search(names[qkv.stop - 1]):
        qkv_ops += middle_ops[:-1]
        middle_ops = middle_ops[-1:]
    if not middle:
        qkv_ops += middle_ops
    for block, where, ops in (
        ("attention", before_qkv, ["input_norm"]),
        ("attention", qkv, qkv_ops),
        ("attention", o, ["o_proj"]),
        ("mlp", before_gate_up, ["post_norm"]),
        ("mlp", gate_up, gate_up_ops),
        ("mlp", before_down, ["silu_mul"]),
        ("mlp", down, ["down_proj"]),
    ):
        _put(sites, where, Site(layer, block, "+".join(ops)))
    named = [i for i in middle if not _PICK.search(names[i])] or list(middle)
    for i, found in zip(named, _middle_ops([names[i] for i in named], middle_ops), strict=True):
        sites[i] = Site(layer, "attention", "+".join(op for op in OPS if op in found))
    for i in reversed(middle):
        sites[i] = sites[i] or sites[i + 1]


def _attribute_end(names: Sequence[str], sites: list[Site | None], start: int, head: range) -> None:
    """From the last layer's end on: final norm, picking of rows, head, sampling, copy of the tokens."""
    between = range(start, head.start)
    norms = [i for i in between if _NORM.search(names[i])]
    norm_end = norms[-1] + 1 if norms else min(start + 1, head.start)
    if norms and _TORCH_OWN in names[norms[-1]]:  # launched op by op, it ends with products that bear no name
        rest = range(norm_end, head.start)
        norm_end = next((i for i in rest if _TORCH_OWN not in names[i] or _PICK.search(names[i])), head.start)
    _put(sites, range(start, norm_end), Site(NO_LAYER, "head", "final_norm"))
    head_op = "lm_head" if between else "final_norm+lm_head"
    _put(sites, range(norm_end, head.stop), Site(NO_LAYER, "head", head_op))
    last = max((i for i in range(head.stop, len(names)) if not _READ_BACK.match(names[i])), default=head.stop - 1)
    drawing = range(head.stop, last + 1)
    embeds = any(_DRAWS_AND_EMBEDS.search(names[i]) for i in drawing)
    _put(sites, drawing, Site(NO_LAYER, "sample", "sample+embed" if embeds else "sample"))
    _put(sites, range(last + 1, len(names)), Site(NO_LAYER, "step", "read_back"))


def _put(sites: list[Site | None], where: range, site: Site) -> None:
    for i in where:
        sites[i] = site


def _named_ops(name: str, ops: Sequence[str]) -> set[str]:
    """Those of `ops` that a kernel's name speaks of."""
    if _ATTENTION.search(name):
        return {"attention"}
    patterns = {"qk_norm": _NORM, "rope": _ROPE, "kv_write": _KV_WRITE}
    return {op for op in ops if op in patterns and patterns[op].search(name)}


def _middle_ops(names: Sequence[str], ops: Sequence[str]) -> list[set[str]]:
    """What each kernel between qkv and o does: named ops by name, the others by elimination between those."""
    found = [_named_ops(name, ops) for name in names]
    rank = {op: i for i, op in enumerate(ops)}
    unnamed = [op for op in ops if not any(op in named for named in found)]
    result = []
    for i, named in enumerate(found):
        if named:
            result.append(set(named))
            continue
        low = max((rank[op] for before in found[:i] for op in before), default=0)
        high = min((rank[op] for after in found[i + 1 :] for op in after), default=len(ops) - 1)
        fitting = set(ops[low : high + 1]) or set(ops)
        # PyTorch's own small kernels are never a whole operation, so nothing follows from what is left over.
        left = set() if _TORCH_OWN in names[i] else fitting & set(unnamed)
        result.append(left or fitting)
    for op in unnamed:  # with no kernel that could be it, it is done by the kernel of the operation before, or after
        if names and not any(op in ops_of for ops_of in result):
            nearest = min(range(len(result)), key=lambda i: min(_distance(rank[o], rank[op]) for o in result[i]))
            result[nearest].add(op)
    return result


def _distance(rank: int, wanted: int) -> float:
    """Operations before the wanted one are nearer than those after it."""
    return wanted - rank if rank < wanted else (rank - wanted) * len(OPS)


def _check_alike(sites: Sequence[Site | None], num_layers: int) -> None:
    """Layers must do the same operations in the same number of kernels; the first may do its first norm in another
    way, or lack it, and the last take more or fewer kernels for an operation, or one for several."""
    ops: list[list[str]] = [[] for _ in range(num_layers)]
    for site in sites:
        if site is not None and site.layer_index != NO_LAYER:
            ops[site.layer_index].append(site.op)
    for layer, (one, other) in enumerate(pairwise(ops)):
        if layer == 0:
            one, other = _without_norm(one), _without_norm(other)
        if layer + 2 == num_layers:
            one, other = _apart(one), _apart(other)
        if one != other:
            at, left, right = first_difference(one, other)
            raise NotDivisible(
                f"Layers {layer} and {layer + 1} differ: kernel {at} of the one is {left}, of the other {right}."
            )


def _without_norm(ops: Sequence[str]) -> list[str]:
    return [op.removeprefix("input_norm+") for op in ops if op != "input_norm"]


def _apart(ops: Sequence[str]) -> list[str]:
    """`ops` with what one kernel does at once taken apart, and neighbours that are the same taken together."""
    return [op for op, _ in groupby(part for op in ops for part in op.split("+"))]


def first_difference(one: Sequence[str], other: Sequence[str]) -> tuple[int, str, str]:
    """(index, entry of `one`, entry of `other`) where two unequal sequences part; "nothing" where one has ended."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    left, right = (str(s[at]) if at < len(s) else "nothing" for s in (one, other))
    return at, left, right
