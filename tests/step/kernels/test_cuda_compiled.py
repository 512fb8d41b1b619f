"""The Triton step, compiled for devices that are not here: what instructions it becomes."""

import re

import pytest
from step.kernels.triton_problems import TYPES, f32, f64, needs_triton

from popriskmin.step.kernels.cuda_table import COLUMNS


def compiled(kernel, types, **flags):
    """Return the assembly that Triton makes of a kernel for an A100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from popriskmin.step.kernels import cuda_step

    wide = f64 if f64 in (types[0], types[2]) else f32
    flags = {"PHASE": "all", "MASK": "snr", "DECOUPLED": True, "BIAS": True, "COLUMNS": COLUMNS, "BLOCK": 1024} | flags
    off = ["AMSGRAD", "COUPLED", "MAXIMIZE", "DEBIAS", "GIVEN", "MASK_DECAY", "FROM_END", "TENSOR_STEPS", "TENSOR_LR"]
    constants = {
        **dict.fromkeys(off, False),
        "SHRINK": "none",
        "CHUNK": 4096,
        "C": cuda_step.TYPES[wide],
        "ROUND": False,
        "CODED": False,
    }
    # Where the step rounds at random, it counts in float64.
    constants |= {"T": cuda_step.TYPES[f64 if flags.get("ROUND") else f32], **flags}
    constants |= {
        name: cuda_step.TYPES[t] for name, t in zip("PGMVSXZW", [*types, types[3], types[3], types[1], types[0]])
    }
    function = getattr(cuda_step, kernel)
    kinds = {"table": "*i64", "gradients": "*i64", "lr_at": "*fp64", "tensors": "i32", "blocks": "i32"}
    kinds["partials"] = "*fp64" if wide == f64 else "*fp32"
    number = "i64" if wide == f64 else "i32"
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, number) for name in names}
    places = {(names.index(name),): value for name, value in constants.items() if name in names}
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs={})
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "types", "flags"),
    [
        ("update", TYPES[0], {}),
        ("update", TYPES[1], {"MASK": "soft", "AMSGRAD": True, "COUPLED": True, "DECOUPLED": False}),
        ("update", TYPES[3], {"MASK": "hard", "MAXIMIZE": True}),
        ("update", TYPES[4], {"FROM_END": True, "MASK": "none"}),
        ("update", TYPES[5], {"DEBIAS": True, "TENSOR_STEPS": True, "TENSOR_LR": True, "MASK_DECAY": True}),
        ("update", TYPES[0], {"PHASE": "advance"}),
        ("update", TYPES[3], {"GIVEN": True, "DEBIAS": True, "TENSOR_STEPS": True}),
        ("update", TYPES[0], {"PHASE": "move", "AMSGRAD": True}),
        ("update", TYPES[0], {"SHRINK": "zero"}),
        ("update", TYPES[5], {"SHRINK": "start", "MASK": "soft", "DEBIAS": True, "TENSOR_STEPS": True}),
        ("update", TYPES[1], {"SHRINK": "start", "PHASE": "move"}),
        ("update", TYPES[3], {"ROUND": True}),
        ("update", TYPES[3], {"ROUND": True, "TENSOR_STEPS": True}),
        ("update", TYPES[0], {"CODED": True}),
        ("update", TYPES[0], {"CODED": True, "PHASE": "move", "SHRINK": "zero"}),
        ("pool", TYPES[0], {"DEBIAS": True, "TENSOR_STEPS": True}),
        ("pool", TYPES[1], {}),
    ],
)
def test_it_compiles_for_devices_without_fusing_products_and_sums(kernel, types, flags, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    try:
        assembly = compiled(kernel, types, **flags)
    except (ImportError, TypeError) as error:
        pytest.skip(f"this version of Triton is asked otherwise: {error}")
    assert not re.search(r"\bfma\.", assembly)
    assert not re.search(r"\b(div|sqrt)\.(approx|full)", assembly)
    # These return the other number where one is NaN.
    assert not re.search(r"\b(min|max)\.f(32|64)", assembly)
    if kernel == "update":
        # Sixteen bytes at a time.
        assert re.search(r"ld\.global\S*\.v[24]\.b(32|64)", assembly)
        assert re.search(r"st\.global\S*\.v[24]\.b(32|64)", assembly)
