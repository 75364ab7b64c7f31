"""The kinds of kernels and the table of a profile, with names from real traces."""

from resnet_dist.commands import kernel_kinds as kinds
from resnet_dist.commands.kernel_kinds import KINDS, kind_of_kernel, kind_of_operator
from resnet_dist.commands.trace_table import build_table, format_table

# As profilers print them for ResNets on A100 and H100, eager and compiled; some are shortened.
KERNELS = {
    kinds.CONVOLUTION: (
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_"
        "warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn",
        "sm80_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc_"
        "tilesize32x256x32_stage3_warpsize1x4x1_g1_tensor16x8x16_execute_kernel_cudnn_train",
        "sm80_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_"
        "tilesize128x128x32_stage4",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_"
        "128x256_32x3_nhwc_align8>(cutlass_tensorop_bf16_s16816fprop_optimized::Params)",
        "void implicit_convolve_sgemm<float, float, 128, 6, 7, 3, 3, 5, 1, false, false, true>",
        "void conv2d_grouped_direct_kernel<false, true, false, false, 0, 0, int, float>",
    ),
    kinds.NORM: (
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var, "
        "c10::BFloat16, float, 4>(c10::BFloat16 const*, float*, float*)",
        "void at::native::batch_norm_transform_input_channels_last_kernel<c10::BFloat16, float, "
        "float, 4>(c10::BFloat16 const*, c10::BFloat16 const*, float const*)",
        "void at::native::batch_norm_backward_reduce_channels_last_kernel<4, c10::BFloat16>",
        "void at::native::batch_norm_backward_elemt_channels_last_kernel<4, c10::BFloat16>",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<__half, float, 512, true, 1>(cudnnTensorStruct)",
        "void cudnn::batchnorm_bwtr_nhwc_semiPersist<__nv_bfloat16, float>",
        "triton_red_fused__native_batch_norm_legit_functional_7",
        "triton_poi_fused__native_batch_norm_legit_functional_add_relu_12",
        "triton_red_fused_native_batch_norm_backward_threshold_backward_31",
    ),
    kinds.POOL: (
        "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16>",
        "void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16, float>",
        "triton_poi_fused_max_pool2d_with_indices_3",
    ),
    kinds.POINTWISE: (
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::"
        "launch_clamp_scalar(at::TensorIteratorBase&, c10::Scalar, c10::Scalar)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<"
        "c10::BFloat16>, std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
        "at::native::BinaryFunctor<float, float, float, at::native::binary_internal::MulFunctor>",
        "triton_poi_fused_add_relu_19",
    ),
    kinds.MATRIX_PRODUCT: (
        "nvjet_sm90_tst_112x64_64x9_2x1_v_bz_bias_TNN",
        "ampere_sgemm_128x64_nn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8>",
        "ampere_fp16_s16816gemm_fp16_64x64_ldg8_f2f_stages_64x5_tn",
    ),
    kinds.REDUCTION: (
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16, "
        "at::native::MeanOps<c10::BFloat16, float, float, c10::BFloat16> > >",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, true, false>",
        "triton_per_fused_mean_5",
    ),
    kinds.OPTIMIZER: (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous "
        "namespace)::TensorListMetadata<2>, at::native::(anonymous namespace)::"
        "BinaryOpListAlphaFunctor<float, 2, 2, 0>, std::plus<float>, float>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous "
        "namespace)::FusedOptimizerTensorListMetadata<3>, at::native::FusedSgdMathFunctor>",
        "void at::native::<unnamed>::multi_tensor_apply_kernel<at::native::<unnamed>::"
        "TensorListMetadata<(int)1>, at::native::LpNormFunctor<float, (NormType)2, float>>",
    ),
    kinds.COMMUNICATION: (
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*, unsigned long, ncclWork*)",
    ),
    kinds.COPY: (
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, true, false>",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda("
        "at::TensorIteratorBase&)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, unsigned int, 1, 64>",
    ),
    kinds.OTHER: ("dali::kernels::ResampleSeparable", "something new"),
}

OPERATORS = {
    kinds.CONVOLUTION: ("aten::mkldnn_convolution", "aten::convolution_backward"),
    kinds.NORM: ("aten::native_batch_norm", "aten::batch_norm_update_stats", "_NormalizeBackward"),
    kinds.POOL: ("aten::max_pool2d_with_indices", "aten::adaptive_avg_pool2d"),
    kinds.POINTWISE: ("aten::add_", "aten::threshold_backward", "aten::clamp_min_"),
    kinds.MATRIX_PRODUCT: ("aten::addmm", "aten::mm"),
    kinds.REDUCTION: ("aten::linalg_vector_norm", "aten::_log_softmax", "aten::sum"),
    kinds.OPTIMIZER: ("aten::_fused_sgd_", "aten::_foreach_copy_"),
    kinds.COMMUNICATION: ("c10d::allreduce_", "_c10d_functional::wait_tensor"),
    kinds.COPY: ("aten::copy_", "aten::_to_copy"),
    kinds.OTHER: ("aten::as_strided",),
}


def test_kinds_of_real_names():
    wrong = []
    for table, kind_of in ((KERNELS, kind_of_kernel), (OPERATORS, kind_of_operator)):
        assert set(table) == set(KINDS)
        for kind, names in table.items():
            wrong += [(name, kind_of(name), kind) for name in names if kind_of(name) != kind]
    assert wrong == []


def event(name, start, duration, category="kernel", thread=7):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "pid": 0,
        "tid": thread,
    }


def test_table_of_gpu_kernels():
    """Two steps of 10 ms; two streams overlap for 1 ms; 3 ms of each step are idle."""
    events = [{"ph": "M", "name": "process_name"}]
    for start in (0, 10_000):
        events += [
            event("aten::conv2d", start, 10_000, "cpu_op"),
            event("sm90_xmma_fprop_implicit_gemm", start, 4000),
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", start + 3000, 2000, thread=9),
            event("Memset (Device)", start + 8000, 2000, "gpu_memset"),
        ]
    table = build_table(events, 2)
    assert table.device == "cuda"
    assert table.step_milliseconds == 10.0
    found = {row.name: (row.milliseconds, row.count) for row in table.kinds}
    assert found == {
        "convolution": (4.0, 1.0),
        "communication": (2.0, 1.0),
        "copy": (2.0, 1.0),
        "idle": (3.0, 0.0),
    }
    assert table.longest[0].name == "sm90_xmma_fprop_implicit_gemm"
    text = format_table(table)
    assert "idle                 3.000    30.0%" in text


def test_table_of_cpu_operators_counts_each_microsecond_once():
    events = [
        event("aten::conv2d", 0, 1000, "cpu_op"),
        event("aten::mkldnn_convolution", 100, 600, "cpu_op"),
        event("aten::empty", 150, 100, "cpu_op"),
        event("aten::copy_", 800, 100, "cpu_op"),
        event("aten::add_", 1500, 500, "cpu_op", thread=8),
    ]
    table = build_table(events, 1)
    assert table.device == "cpu"
    found = {row.name: round(row.milliseconds, 9) for row in table.kinds}
    assert found == {"convolution": 0.8, "copy": 0.2, "pointwise": 0.5, "idle": 0.5}
