"""Fused Triton kernels, each beside its plain-PyTorch reference. Imports nothing else of this project.

`FUSIONS` says what each kernel fuses, by name. Without more, CUDA tensors go through Triton and CPU tensors through the
references; `with use("reference")` and `with use("triton")` force one path (on the CPU the latter needs Triton's
interpreter: TRITON_INTERPRET=1 before this import). The functions bear their modules' names, so
`from kernels import silu_mul` gives the function; its module's other names come by `from kernels.silu_mul import ...`.
"""

from kernels._dependent import can_depend
from kernels._fusion import Fusion
from kernels._triton import HAVE_TRITON, INTERPRETED, runs_triton, use
from kernels.causal_attention import FUSION as _CAUSAL_ATTENTION
from kernels.causal_attention import causal_attention
from kernels.compile_ahead import compiled_ahead
from kernels.decode_attention import FUSION as _DECODE_ATTENTION
from kernels.decode_attention import decode_attention
from kernels.decode_head import FUSION as _DECODE_HEAD
from kernels.decode_head import decode_head
from kernels.decode_linear import FUSION as _DECODE_LINEAR
from kernels.decode_linear import decode_linear
from kernels.embed_rows import embed_rows
from kernels.paged_attention import FUSION as _PAGED_ATTENTION
from kernels.paged_attention import paged_attention
from kernels.prefill_attention import FUSION as _PREFILL_ATTENTION
from kernels.prefill_attention import prefill_attention
from kernels.prefill_gate_up import FUSION as _PREFILL_GATE_UP
from kernels.prefill_gate_up import prefill_gate_up
from kernels.prefill_qkv_rope import FUSION as _PREFILL_QKV_ROPE
from kernels.prefill_qkv_rope import prefill_qkv_rope
from kernels.qk_norm_rope_cache import FUSION as _QK_NORM_ROPE_CACHE
from kernels.qk_norm_rope_cache import qk_norm_rope_cache
from kernels.rms_norm import rms_norm
from kernels.rms_norm_gate_up import FUSION as _RMS_NORM_GATE_UP_SILU
from kernels.rms_norm_gate_up import rms_norm_gate_up_silu
from kernels.rms_norm_linear import FUSION as _RMS_NORM_LINEAR
from kernels.rms_norm_linear import rms_norm_linear
from kernels.sample import CHOOSE_TOKEN as _CHOOSE_TOKEN
from kernels.sample import TILE_STATS as _TILE_STATS
from kernels.sample import choose_token, tile_stats
from kernels.silu_mul import FUSION as _SILU_MUL
from kernels.silu_mul import silu_mul
from kernels.write_kv import write_kv

FUSIONS: dict[str, Fusion] = {
    fusion.name: fusion
    for fusion in (
        _RMS_NORM_LINEAR,
        _RMS_NORM_GATE_UP_SILU,
        _QK_NORM_ROPE_CACHE,
        _PAGED_ATTENTION,
        _CAUSAL_ATTENTION,
        _SILU_MUL,
        _TILE_STATS,
        _CHOOSE_TOKEN,
        _DECODE_LINEAR,
        _DECODE_HEAD,
        _DECODE_ATTENTION,
        _PREFILL_ATTENTION,
        _PREFILL_GATE_UP,
        _PREFILL_QKV_ROPE,
    )
}

__all__ = [
    "FUSIONS",
    "HAVE_TRITON",
    "INTERPRETED",
    "Fusion",
    "can_depend",
    "causal_attention",
    "choose_token",
    "compiled_ahead",
    "decode_attention",
    "decode_head",
    "decode_linear",
    "embed_rows",
    "paged_attention",
    "prefill_attention",
    "prefill_gate_up",
    "prefill_qkv_rope",
    "qk_norm_rope_cache",
    "rms_norm",
    "rms_norm_gate_up_silu",
    "rms_norm_linear",
    "runs_triton",
    "silu_mul",
    "tile_stats",
    "use",
    "write_kv",
]
