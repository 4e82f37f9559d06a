"""Bugs in the kernels and what launches them, seen by the interpreter."""

from tests.mutants import Mutant

TESTS = ["tests/kernels/test_accumulate.py", "tests/kernels/test_attention.py"]
FORWARD, ATTRIBUTION, COLUMNS = "kernels/forward.py", "kernels/attribution.py", "kernels/column_lse.py"
ACCUMULATE, PRIMITIVES, SWEEP = "kernels/accumulate.py", "kernels/primitives.py", "kernels/sweep.py"
ROWS = "kernels/rows.py"
FEW_FORWARD, FEW_ATTRIBUTION, HOST = "kernels/few_forward.py", "kernels/few_attribution.py", "i2am/ops/triton.py"
FEW = ["tests/kernels/test_few_keys.py"]
TESTS_OF = {
    FEW_FORWARD: FEW,
    FEW_ATTRIBUTION: FEW,
    "i2am/ops/few.py": FEW,
    SWEEP: ["tests/kernels/test_sweep.py"],
    "i2am/ops/beside.py": ["tests/kernels/test_sweep.py"],
}
FINITE = 'b_top = tl.where(b_top == float("-inf"), 0.0, b_top)\n    return b_top + tl.log2(tl.exp2'
MUTANTS = [
    Mutant(FORWARD, 'm_counts = m_generated & (b_m > float("-inf"))', 'm_counts = b_m > float("-inf")', "all queries"),
    Mutant(ROWS, "b_l * b_rescale + tl.sum(b_p, 1)", "(b_l + tl.sum(b_p, 1)) * b_rescale", "scaled afterwards"),
    Mutant(FORWARD, "mask=(o_n >= 0) & (i_m > fresh)", "mask=(o_n >= 0) & (i_m > first)", "adds to unwritten memory"),
    Mutant(
        FORWARD,
        'power_of_two(b_m - pivot), float("nan"))',
        "power_of_two(b_m - pivot), 0.0)",
        "rows beyond the headroom are forgotten",
    ),
    Mutant(ROWS, "1.0 / tl.where(b_l == 0.0, 1.0, b_l)", "1.0 / b_l", "masked rows divide by 0"),
    Mutant(ROWS, 'return tl.where(b_m == float("-inf"), 0.0, b_m)', "return b_m", "-inf - -inf"),
    Mutant(PRIMITIVES, "b_bias * LOG2E, LOWEST", "b_bias, LOWEST", "a bias in the wrong unit"),
    Mutant(PRIMITIVES, "tl.maximum(b_bias * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL)", "b_bias * LOG2E"),
    Mutant(PRIMITIVES, "if not EVEN_N:", "if EVEN_N:", "padded keys take part"),
    Mutant(
        PRIMITIVES,
        "b = (b_main, tl.load(p + o_t[None, :], mask=m_n & (o_t < D)[None, :], other=0.0))",
        "b = (b_main, tl.load(p + o_t[None, :], mask=m_n, other=0.0))",
        "the tail reads the next token's features",
    ),
    Mutant(PRIMITIVES, FINITE, "return b_top + tl.log2(tl.exp2", "log2_add of nothing"),
    Mutant(
        ATTRIBUTION,
        'b_cf = tl.where(b_column == float("inf"), 0.0, tl.exp2(c - b_column))',
        "b_cf = tl.exp2(c - b_column)",
        "inf - inf where a tile is masked",
    ),
    Mutant(ATTRIBUTION, "tl.load(row_lse_max + i_m) - c <= REACH", "tl.load(row_lse_max + i_m) - c <= 1e9"),
    Mutant(ATTRIBUTION, "m_later = m_m & (i_n > first_n)", "m_later = m_m & (i_n > 0)", "adds to another group's slot"),
    Mutant(ATTRIBUTION, "tl.sum(b_p if EVEN_N else tl.where(m_n[None, :], b_p, 0.0), 1)", "tl.sum(b_p, 1)"),
    Mutant(
        ATTRIBUTION,
        "b_w = tl.load(p_w, mask=(o_r < R)[:, None] & m_m[None, :], other=0.0)",
        "b_w = tl.load(p_w, mask=(o_r < R)[:, None], other=0.0)",
        "weights of queries behind the last",
    ),
    Mutant(ATTRIBUTION, "regions += i_b * region_strides[0]", "regions += 0", "the first image's regions"),
    Mutant(ATTRIBUTION, "row_lse_max += i_bh * query_tiles", "row_lse_max += 0", "the first head's row maxima"),
    Mutant(
        COLUMNS,
        "last_split = tl.cdiv(query_span[1] - split_origin, queries_per_split)",
        "last_split = (query_span[1] - split_origin) // queries_per_split",
        "the last, partial split is left out",
    ),
    Mutant(
        COLUMNS,
        "first = tl.maximum(split_origin + i_split * queries_per_split, query_span[0])",
        "first = split_origin + i_split * queries_per_split",
        "queries before the generated ones",
    ),
    Mutant(
        COLUMNS, 'tl.where((o_m < last)[:, None], b_x, float("-inf"))', "b_x", "queries of the next split count twice"
    ),
    Mutant(
        ACCUMULATE,
        "% key_blocks * BLOCK + o_block",
        "% key_blocks + o_block",
        "SRAM of the first 512 keys alone",
    ),
    Mutant(ACCUMULATE, "counts[1], R.to(tl.int64) * K, o_n", "counts[1], K, o_n", "regions mixed between splits"),
    Mutant(ACCUMULATE, "o_n = (i_n - query_blocks) * BLOCK + o_block", "o_n = o_block", "G2R of 512 keys"),
    Mutant(FEW_FORWARD, "start, stop = tl.maximum(first, query_span[0]),", "start, stop = first,"),
    Mutant(FEW_FORWARD, "o_i = o_m - query_span[0]", "o_i = o_m", "regions begin at the wrong query"),
    Mutant(FEW_FORWARD, "sram_partial + i_slot * R * K", "sram_partial + i_slot * K"),
    Mutant(
        FEW_FORWARD,
        'b_x = tl.where((o_m < stop)[:, None], b_x, float("-inf"))',
        "b_x = b_x",
        "columns taken afresh count queries behind the last",
    ),
    Mutant(FEW_ATTRIBUTION, "* (1.0 / (stop - start))", "* (1.0 / K)", "the hull's number of keys"),
    Mutant(FEW_ATTRIBUTION, "i_bh * splits * K + spans[2 * n] - key_span[0]", "i_bh * splits * K + spans[2 * n]"),
    Mutant(FEW_ATTRIBUTION, "(i_bh * splits * R + i_r) * K", "(i_bh * R + i_r) * K", "heads share a slot"),
    Mutant(
        FEW_ATTRIBUTION,
        "tl.where(m_n[None, :], tl.exp2(b_x * factor - b_row[:, None]), 0.0)",
        "tl.exp2(b_x * factor - b_row[:, None])",
        "mass of the keys behind the reference",
    ),
    Mutant(
        SWEEP,
        'b_e = tl.where(m_m[:, None], b_l * factor - b_own_lse[None, :], float("-inf"))',
        "b_e = b_l * factor - b_own_lse[None, :]",
        "keys behind the last count",
    ),
    Mutant(SWEEP, "weights += i_b * weight_strides[0]", "weights += 0", "the first image's regions"),
    Mutant(SWEEP, "y_span[0] + o_i, o_n, Ny, Nx", "o_i, o_n, Ny, Nx", "a mask read from its first row"),
    Mutant(HOST, "keys=keys[done:], sums=sums[done:]", "keys=keys, sums=sums", "references are added twice"),
    Mutant(HOST, "q, scale = -q, -scale", "scale = -scale", "a negative scale changes sign"),
    Mutant(HOST, "regions.stride(0) * (regions.shape[0] > 1)", "regions.stride(0)", "another image's regions"),
    Mutant(HOST, "column_sum[first:] if first else column_sum", "column_sum", "columns of an unaligned span"),
]
