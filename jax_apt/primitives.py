"""Every primitive of JAX, and what `apt_quantize` does with it; docs/primitives.md is written from here.

Names of jax 0.10.2 through 0.12; `tests/test_primitives.py` fails when an installed JAX has one that stands
nowhere. A primitive that is not here (another library's, or a later JAX's) may hide anything, so the report
lists it unless it takes or gives no floats.
"""

from typing import NamedTuple


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PRODUCTS = ("dot_general", "conv_general_dilated")
RAGGED = ("ragged_dot_general",)

REPLAYED = _names("""
    call_hi_primitive closed_call composite cond custom_jvp_call custom_vjp_call custom_vmap_call
    eval_jaxpr jit remat2 scan shard_map while
    """)

# Left in float, with the reason that the report gives

NO_FIXED_POINT = _names("""
    bcoo_dot_general bcoo_dot_general_sampled bcoo_spdot_general bcsr_dot_general coo_matmat coo_matvec
    coo_spmm coo_spmv csr_matmat csr_matvec csr_spmm csr_spmv dot_product_attention_bwd
    dot_product_attention_bwd_wrapper dot_product_attention_fp8_bwd
    dot_product_attention_fp8_bwd_wrapper dot_product_attention_fp8_fwd
    dot_product_attention_fp8_fwd_wrapper dot_product_attention_fwd dot_product_attention_fwd_wrapper
    rnn_bwd rnn_fwd scaled_dot scaled_matmul scaled_matmul_wrapper
    """)
LINEAR_ALGEBRA = _names("""
    cholesky cholesky_update custom_linear_solve eig eigh geqp3 geqrf hessenberg householder_product lu
    ormqr qr schur spsolve svd symmetric_product triangular_solve tridiagonal tridiagonal_solve
    """)
OPAQUE = _names("""
    buffer_callback call_exported call_hi_primitive_linearized custom_lin ffi_call io_callback
    mosaic_gpu_p pure_callback tpu_custom_call thunky.all_gather thunky.all_reduce thunky.all_to_all
    thunky.async_done thunky.async_start thunky.call_jax thunky.call_thunky_nested
    thunky.collective_group thunky.collective_permute thunky.cond thunky.copy thunky.custom_call
    thunky.inline_constant thunky.memset thunky.memzero thunky.ptx_kernel thunky.reduce_scatter
    thunky.while
    """)

# Primitives with bodies that are not replayed: run as they are unless a body holds a product

BODIES = _names("""
    call compute_on core_map cudnn_fusion custom_fusion custom_jvp_call_jaxpr custom_partitioning
    emit_pipeline fused_call fusible jaxpr_call linear_call mpmd_map pallas_call
    parallel_loop pipeline_body reduce reduce_scatter reduce_window remat_opt run_scoped run_state
    scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub select_and_scatter
    xla_metadata_call
    """)

# What stands in the kernels of Pallas alone

KERNEL_PRODUCTS = _names("""
    conv matmul_acc_lhs matmul_lhs_fifo matmul_pop matmul_pop_fifo matmul_push_rhs mma tcgen05_mma wgmma
    """)
IN_KERNELS = _names("""
    assert_consumed_value async_copy_scales_to_tmem async_copy_smem_to_tmem
    async_copy_sparse_metadata_to_tmem async_load async_prefetch async_store_smem async_store_tmem
    atomic_cas atomic_rmw barrier barrier_arrive barrier_arrive_and_wait barrier_test barrier_wait
    commit_group commit_smem commit_tmem copy_gmem_to_smem copy_smem_to_gmem debug_barrier
    debug_barrier_p delay dma_start dma_wait einshape_lo elementwise_inline_asm elementwise_inline_asm_p
    get_barrier_semaphore get_global griddepcontrol_launch_dependents griddepcontrol_wait
    has_memory_space inline_mgpu inline_mgpu_p iota_2x32_shape layout_cast load log_extend masked_cummax
    masked_cummin masked_cumsum masked_load masked_sort masked_swap max_contiguous mgpu_atomic_store
    mosaic_gpu_reduce_max mosaic_gpu_reduce_min mosaic_gpu_reduce_prod mosaic_gpu_reduce_sum mulhi
    multimem_load_reduce multimem_store multiple_of num_programs pack_dtype pack_elementwise
    pbroadcast_dynamic print_layout program_id program_order query_cluster_cancel relayout
    remove_memory_space roll sc_fetch_and_add scan_count semaphore_read semaphore_signal
    semaphore_signal_multicast semaphore_signal_parallel semaphore_wait set_max_registers
    set_max_registers_p stochastic_round store tcgen05_commit_arrive threefry4x32 trace_value
    try_cluster_cancel unique unpack_dtype unpack_elementwise wait_gmem_to_smem wait_load_tmem
    wait_smem_to_gmem wgmma_accumulator_deref wgmma_accumulator_deref_p wgmma_accumulator_store
    wgmma_accumulator_store_p wgmma_ref wgmma_wait with_memory_space_constraint
    """)

WITHOUT_PRODUCT = _names("""
    _copysign abs accum_grad_in_ref acos acosh add add_any add_dependency addupdate after_all all_gather
    all_gather_done all_gather_invariant all_gather_reduced all_gather_reduced_start all_gather_start
    all_reduce_ffs all_reduce_population_count all_to_all all_to_all_done all_to_all_start and
    approx_top_k argmax argmin asin asinh atan atan2 atanh axis_index bcoo_extract bcoo_fromdense
    bcoo_sort_indices bcoo_sum_duplicates bcoo_todense bcoo_transpose bcsr_extract bcsr_fromdense
    bcsr_todense bessel_i0e bessel_i1e bitcast bitcast_convert_type box_get box_set broadcast_in_dim
    broadcast_to cbrt ceil check clamp clz complex concatenate conj consume convert_element_type
    coo_fromdense coo_todense copy cos cosh create_linear create_token csr_fromdense csr_todense
    cumlogsumexp cummax cummin cumprod cumsum dce_sink debug_callback debug_print device_put digamma
    dim_as_value dimension_size div dynamic_slice dynamic_update_slice empty empty2 empty_ref eq eq_to
    erf erf_inv erfc exp exp2 expm1 fft floor free_ref freeze from_edtype gather ge get
    global_array_to_host_local_array gt host_local_array_to_global_array igamma igamma_grad_a igammac
    imag inspect_sharding integer_pow iota is_finite jax_apt_once jax_apt_tangent
    layout_constraint le le_to lgamma log log1p log2 log_read logistic lt lt_to lu_pivots_to_permutation
    max min mul name ne neg new_box new_log new_ref nextafter not one_minus_square optimization_barrier
    or pack pad pbroadcast pbroadcast_done pbroadcast_start philox2x32 philox4x32 pin platform_index
    pmax pmin polygamma polynomial population_count pow ppermute ppermute_done ppermute_start precv
    preduced prng_join prng_random_bits prng_seed prng_split psend psum psum_done psum_invariant
    psum_invariant_start psum_start pvary ragged_all_to_all random_bits random_clone random_fold_in
    random_gamma random_seed random_split random_unwrap random_wrap real reciprocal reduce_and
    reduce_max reduce_min reduce_or reduce_precision reduce_prod reduce_scatter_done
    reduce_scatter_start reduce_sum reduce_window_max reduce_window_min reduce_window_sum reduce_xor
    reduced_vary_cast reduced_vary_cast_p regularized_incomplete_beta rem reshape reshard rev
    rng_bit_generator rng_uniform round rsqrt select_and_gather_add select_and_scatter_add select_n
    shape_assertion shard_alike sharding_constraint shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh slice sort split sqrt square squeeze stack stage stop_gradient sub
    swap tan tanh threefry2x32 tie tile to_edtype todense top_k transpose unpack unpin unreachable
    unreduced_pmax unreduced_pmin unreduced_psum unreduced_psum_start unreduced_reduce_scatter
    unreduced_reduce_scatter_start unstack vary_unreduced_cast vary_unreduced_cast_p xla_metadata_value
    xor zeros_like zeta
    """)


class Family(NamedTuple):
    """Primitives that are treated alike."""

    names: tuple[str, ...]
    outcome: str  # what happens with them, in a few words
    reason: str = ""  # what the report says of those that it lists as left in float


FAMILIES = {
    "Products": Family(PRODUCTS, "runs in fixed point; integer products stay as they are and are reported"),
    "Ragged products": Family(
        RAGGED,
        "runs in fixed point as one product over all groups; forms that have none stay in float, reported",
    ),
    "Replayed": Family(
        REPLAYED,
        "its bodies are replayed: products inside are quantized; of custom rules (a `call_hi_primitive` is "
        "one) also those of the gradient that the rule's author wrote",
    ),
    "Products without a fixed-point form": Family(
        NO_FIXED_POINT, "stays in float, reported", "it has no fixed-point form"
    ),
    "Linear algebra": Family(
        LINEAR_ALGEBRA, "stays in float, reported", "linear algebra: its steps need float's precision"
    ),
    "No JAX program": Family(
        OPAQUE, "stays as it is, reported", "not a JAX program: whatever it computes stays as it is"
    ),
    "Bodies that are not replayed": Family(
        BODIES,
        "an error that names your line if a product is inside, unless a rule leaves it in float; else runs "
        "as it is, reported if something inside stays in float",
    ),
    "Product instructions of Pallas kernels": Family(
        KERNEL_PRODUCTS,
        "a kernel that holds one is an error, unless a rule leaves it in float",
        "it has no fixed-point form",
    ),
    "Other instructions of Pallas kernels": Family(IN_KERNELS, "runs as it is"),
    "Without a product": Family(WITHOUT_PRODUCT, "runs as it is"),
}

FAMILY_OF = {name: family for family in FAMILIES.values() for name in family.names}


def is_product(name: str) -> bool:
    """Whether a primitive of this name is a product that must not be passed over in a body."""
    return name in PRODUCTS or name in RAGGED or name in KERNEL_PRODUCTS
